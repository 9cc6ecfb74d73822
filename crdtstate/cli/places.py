"""
Places and values, as they are written on a command line.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import typer

from crdtstate.documents import SYSTEM

KINDS = ("map", "counter", "register", "set")


class Place(NamedTuple):
    """Where something stands, as written on the command line."""

    document: str
    kind: str
    name: str
    key: str | None

    def __str__(self) -> str:
        return "/".join(part for part in self if part is not None)


def parse_place(text: str) -> Place:
    """Read ``DOCUMENT/KIND/NAME[/KEY]``; a key may contain slashes. Raises typer.BadParameter."""
    parts = text.split("/", 3)
    if len(parts) < 3 or not all(parts[:3]):
        raise typer.BadParameter(f"{text!r}: write DOCUMENT/KIND/NAME, such as main/map/plan")
    document, kind, name = parts[:3]
    if kind not in KINDS:
        raise typer.BadParameter(f"{text!r}: the kind is {', '.join(KINDS)}, not {kind!r}")
    key = parts[3] if len(parts) == 4 else None
    if key is not None and kind != "map":
        raise typer.BadParameter(f"{text!r}: only maps have keys, a {kind} has none")
    return Place(document, kind, name, key)


def parse_place_to_write(text: str) -> Place:
    """The same, of a place that is a user's. Raises typer.BadParameter."""
    place = parse_place(text)
    if place.document.startswith(SYSTEM):
        reason = f"documents whose names begin with {SYSTEM!r} are the system's"
        raise typer.BadParameter(f"{text!r}: {reason}; they can be read, not written")
    return place


def parse_value(text: str) -> Any:
    """Read JSON, or else take *text* as it is."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError:
        return text
