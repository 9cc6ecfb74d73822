"""
Places as agents write them, which of them an agent may touch, and values as JSON.

A place is ``DOCUMENT/KIND/NAME``, in a map also ``.../NAME/KEY``, as on the command line. A slash
or a percent sign in a document's or view's own name is written ``%2F`` and ``%25``, so that a name
can never pass for another place; a key is all that follows, as it is.

What comes from agents is data: as JSON on one line, in which everything is escaped that is no plain
character. So no value can end its line, hide, or give orders to a terminal.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

from crdtstate.documents import SYSTEM
from crdtstate.errors import UsageError

KINDS = {"map": "m", "counter": "c", "register": "r", "set": "s"}
LETTERS = {letter: kind for kind, letter in KINDS.items()}

PLACE_CHARS_MAX = 2000

OWN = "state-claims"
"""The document that has the claims: it is reached through them only."""


class Place(NamedTuple):
    """A view, or a key in a map."""

    document: str
    kind: str
    name: str
    key: str | None = None

    def __str__(self) -> str:
        view = f"{_quote(self.document)}/{self.kind}/{_quote(self.name)}"
        return view if self.key is None else f"{view}/{self.key}"

    @property
    def view(self) -> Place:
        return self._replace(key=None)

    @property
    def container(self) -> str:
        """What the view is called inside its document."""
        return KINDS[self.kind] + self.name


def parse(text: str) -> Place:
    """Read a place. Raises UsageError."""
    if not isinstance(text, str) or len(text) > PLACE_CHARS_MAX:
        raise UsageError(f"a place is text of at most {PLACE_CHARS_MAX} characters")
    parts = text.split("/", 3)
    if len(parts) < 3 or not all(parts[:3]):
        raise UsageError(
            f"{as_json(text)} is no place: write DOCUMENT/KIND/NAME such as main/map/plan, or for "
            "one key of a map main/map/plan/goal"
        )
    document, kind, name = _unquote(parts[0]), parts[1], _unquote(parts[2])
    if kind not in KINDS:
        raise UsageError(
            f"{as_json(text)}: the second part is {', '.join(KINDS)}, not {as_json(kind)}"
        )
    key = parts[3] if len(parts) == 4 else None
    if key is not None and kind != "map":
        raise UsageError(f"{as_json(text)}: only maps have keys, a {kind} has none")
    if document.startswith(SYSTEM):
        raise UsageError(f"{as_json(text)}: documents that begin with {SYSTEM!r} are the system's")
    if document == OWN:
        raise UsageError(f"{as_json(text)}: the document {OWN!r} is kept by state_claim; use that")
    return Place(document, kind, name, key)


def _quote(name: str) -> str:
    return name.replace("%", "%25").replace("/", "%2F")


def _unquote(name: str) -> str:
    return name.replace("%2F", "/").replace("%2f", "/").replace("%25", "%")


class Scope:
    """Which places an agent may read and write.

    A pattern names a place or what is above it: ``plan`` a whole document, ``main/map/plan`` a map
    with its keys. ``*`` stands for any characters but a slash, ``**`` for any, ``?`` for one.

    Args:
        allow: What may be read and written.
        read_only: What may be read, and not written even if it is allowed.

    Raises:
        UsageError: A pattern is empty.
    """

    def __init__(self, allow: Iterable[str] = ("**",), read_only: Iterable[str] = ()) -> None:
        self.allow, self.read_only = tuple(allow), tuple(read_only)
        self._allowed = [_compile(pattern) for pattern in self.allow]
        self._read_only = [_compile(pattern) for pattern in self.read_only]

    def may_read(self, place: Place) -> bool:
        return self._is_in(self._allowed, place) or self._is_in(self._read_only, place)

    def may_write(self, place: Place) -> bool:
        return self._is_in(self._allowed, place) and not self._is_in(self._read_only, place)

    def check_read(self, place: Place) -> None:
        """Raise UsageError if it may not be read."""
        if not self.may_read(place):
            raise UsageError(f"{place}: outside of what this server may touch ({self})")

    def check_write(self, place: Place) -> None:
        """Raise UsageError if it may not be written."""
        self.check_read(place)
        if not self.may_write(place):
            raise UsageError(f"{place}: may be read here, but not written ({self})")

    @staticmethod
    def _is_in(patterns: list[re.Pattern[str]], place: Place) -> bool:
        text = str(place)
        return any(pattern.match(text) for pattern in patterns)

    def __str__(self) -> str:
        found = f"allowed: {', '.join(self.allow)}"
        return f"{found}; read-only: {', '.join(self.read_only)}" if self.read_only else found


def _compile(pattern: str) -> re.Pattern[str]:
    if not isinstance(pattern, str) or not pattern.strip("/"):
        raise UsageError(f"a pattern is a place with * and **, such as 'plan/**', not {pattern!r}")
    parts = re.split(r"(/\*\*(?=/|$)|\*\*/?|\*|\?)", pattern.strip("/"))
    known = {"/**": "(?:/.*)?", "**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    text = "".join(known.get(part, re.escape(part)) for part in parts)
    # What is below a place goes with it.
    return re.compile(f"{text}(?:/.*)?\\Z", re.DOTALL)


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
            return {
                key if isinstance(key, str) else as_json(key): plain(item)
                for key, item in value.items()
            }
        case list() | tuple():
            return [plain(item) for item in value]
    return value


def as_json(value: Any) -> str:
    """A value on one line, with all escaped that is no plain character."""
    return printable(json.dumps(plain(value), ensure_ascii=False))


def printable(text: str) -> str:
    """*text* with all escaped that is no plain character."""
    return text if text.isprintable() else "".join(map(_escape, text))


def _escape(character: str) -> str:
    return character if character.isprintable() else json.dumps(character)[1:-1]


def cut(text: str, chars_max: int) -> str:
    """*text*, or its beginning and how much there is."""
    if len(text) <= chars_max:
        return text
    return f"{text[:chars_max]}... ({len(text)} characters)"


def shown(name: object) -> str:
    """A name or place for people: as it is if nothing in it can pass for what stands around it,
    else as JSON."""
    text = str(name)
    return text if re.fullmatch(r"[\w.@+:/%-]+", text) else as_json(text)
