"""
What comes out: the facts of the machine, and one table.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import apsw

from benchmarks.measure import Result

LIBRARIES = ("crdtstate", "pycrdt", "websockets", "apsw", "msgpack", "zstandard")
COLUMNS = ("name", "ours", "floor", "ratio", "target", "met?")


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    load = ", ".join(f"{part:.1f}" for part in os.getloadavg())
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, load {load}",
        "system": platform.platform(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "libraries": f"{libraries}, SQLite {apsw.sqlite_lib_version()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "?")


def as_json(results: Mapping[str, Sequence[Result]]) -> str:
    """Machine and results for machines."""
    found = {name: [_plain(each) for each in group] for name, group in results.items()}
    return json.dumps({"machine": machine(), "results": found}, indent=2)


def _plain(result: Result) -> dict[str, Any]:
    fields = asdict(result)
    fields["target"] = result.target.text if result.target else None
    return {**fields, "ratio": result.ratio, "is_met": result.is_met}


def as_table(results: Mapping[str, Sequence[Result]]) -> str:
    """The results as a table for people, with a heading for each benchmark."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    places = [("", "the floor, and notes")]
    for name, group in results.items():
        for result in group:
            rows.append(_cells(result))
            places.append((name, result.note))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines: list[str] = []
    heading = ""
    for row, (name, note) in zip(rows, places, strict=True):
        if name != heading:
            heading = name
            lines += ["", name]
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join([*cells, note]).rstrip())
    return "\n".join(lines)


def _cells(result: Result) -> tuple[str, ...]:
    return (
        result.name,
        f"{_short(result.ours)} {result.unit}",
        "-" if result.floor is None else f"{_short(result.floor)} {result.unit}",
        "-" if result.ratio is None else f"{result.ratio:.2f}",
        result.target.text if result.target else "-",
        {True: "yes", False: "NO", None: "-"}[result.is_met],
    )


def _short(number: float) -> str:
    if abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.2f}" if abs(number) >= 1 else f"{number:.3f}"
