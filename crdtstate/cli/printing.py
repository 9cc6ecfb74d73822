"""
What is printed: values for people and for scripts, and nothing that a terminal would obey.

Values come from agents, and agents may be anybody's: whatever is not a plain character is escaped.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any, TextIO

from rich.cells import cell_len

from crdtstate.conflict import Candidate


def printable(text: str, keep: str = "") -> str:
    """*text* with everything escaped that is no plain character: a terminal would obey it."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def as_text(value: Any) -> str:
    """A value for people, on one line."""
    return printable(json.dumps(plain(value), ensure_ascii=False))


def plain(value: Any) -> Any:
    """A value in the types of JSON: bytes as ``{"base64": ...}``, times in ISO 8601."""
    match value:
        case bytes():
            return {"base64": base64.b64encode(value).decode()}
        case datetime():
            return value.isoformat()
        case float() if not math.isfinite(value):
            return str(value)
        case dict():
            return {_plain_key(key): plain(item) for key, item in value.items()}
        case list():
            return [plain(item) for item in value]
    return value


def _plain_key(key: Any) -> str:
    return key if isinstance(key, str) else json.dumps(plain(key))


def print_json(value: Any) -> None:
    print(json.dumps(plain(value)), flush=True)


def print_columns(rows: Sequence[Sequence[Any]], out: TextIO | None = None) -> None:
    """Print rows with their cells aligned."""
    texts = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        cells = (
            cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)
        )
        print("  ".join(cells).rstrip(), file=out)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def note(text: str) -> None:
    print(f"crdtstate: {printable(text)}", file=sys.stderr)


def describe_candidate(candidate: Candidate) -> dict[str, Any]:
    when = candidate.stamp.time
    return {"value": candidate.value, "agent": candidate.agent, "written": when}
