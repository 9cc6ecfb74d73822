"""
What a relay's documents hold: how large they are, and which conflicts are open in them.

Both take a walk over all of a document's content, on the loop that serves the mesh. So a document
is looked at again only when it has changed, and when it has been left alone for fifty times as long
as the last look took; and whoever asks waits for no more than the first twentieth of a second's
worth of looks. What is told may therefore be a little old, where there is much of it.
"""

from __future__ import annotations

import reprlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from crdtstate.document import Document
from crdtstate.replica import Replica

T = TypeVar("T")

REST = 50
"""A document is left alone for so many times as long as it took to look at it."""

BUDGET = 0.05
"""Seconds of looking for one question; what is left over is for the next one."""

CONFLICTS_SHOWN = 50
CANDIDATES_SHOWN = 8
"""What is kept of a document's conflicts for show; all are counted."""


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200
        self.maxlevel = 3

    def repr_bytes(self, value: bytes, level: int) -> str:
        return self.repr_str(value, level)  # type: ignore[arg-type]  # it slices and shows


_repr = _Repr()


def shown(value: Any) -> str:
    """A value for people, as Python writes it, shortened if it is long."""
    return _repr.repr(value)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a document.

    Attributes:
        live: What is visible, or decides about what is; None if that is not known.
        dead: The rest of what its engine keeps: what was replaced, and bookkeeping.
    """

    live: int | None
    dead: int

    @classmethod
    def of(cls, document: Document) -> Sizes:
        encoded, live = document.sizes()
        return cls(encoded, 0) if live is None else cls(live, max(0, encoded - live))


@dataclass(frozen=True, slots=True)
class Contested:
    """A document's open conflicts: how many, and the first of them for show."""

    count: int
    first: list[dict[str, Any]]

    @classmethod
    def of(cls, document: Document) -> Contested:
        found = document.conflicts()
        return cls(len(found), [_described(each) for each in found[:CONFLICTS_SHOWN]])


def _described(conflict: Any) -> dict[str, Any]:
    candidates = [
        {"value": shown(each.value), "agent": each.agent, "at": each.stamp.wall_ms}
        for each in conflict.candidates[:CANDIDATES_SHOWN]
    ]
    return {
        "document": conflict.document,
        "kind": conflict.kind,
        "name": conflict.name,
        "key": conflict.key,
        "candidates": candidates,
        "more": len(conflict.candidates) - len(candidates),
    }


@dataclass(frozen=True, slots=True)
class _Look(Generic[T]):
    """What was found, when the document had how many changes, and when to look again."""

    found: T
    changes: int
    at: float
    next_at: float


class Looks(Generic[T]):
    """What is known of documents, and finding out more now and then.

    Args:
        look: Finds it out about one document.
        clock: Tells the time in seconds.
    """

    def __init__(
        self, look: Callable[[Document], T], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._look = look
        self._clock = clock
        self._looks: dict[str, _Look[T]] = {}

    def of(self, documents: Iterable[Document]) -> dict[str, T]:
        """What is known of *documents* by name, after some looking."""
        began = self._clock()
        stale = [document for document in documents if self._is_stale(document, began)]
        stale.sort(key=lambda document: self._last(document.name))
        for document in stale:
            now = self._clock()
            if now - began > BUDGET:
                break
            found = self._look(document)
            after = self._clock()
            again = after + REST * (after - now)
            self._looks[document.name] = _Look(found, document.version.total, now, again)
        return {name: look.found for name, look in self._looks.items()}

    def _is_stale(self, document: Document, now: float) -> bool:
        if document.is_broken:
            return False
        look = self._looks.get(document.name)
        return look is None or (look.next_at <= now and look.changes != document.version.total)

    def _last(self, name: str) -> float:
        look = self._looks.get(name)
        return look.at if look else float("-inf")


class Holdings:
    """The sizes and conflicts of a replica's documents, by name."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._sizes = Looks(Sizes.of)
        self._contested = Looks(Contested.of)

    def sizes(self) -> dict[str, Sizes]:
        """The sizes of the documents that were measured yet."""
        return self._sizes.of(self._documents())

    def contested(self) -> dict[str, Contested]:
        """The conflicts of the documents that were looked at yet."""
        return self._contested.of(self._documents())

    def _documents(self) -> list[Document]:
        found = (self._replica.find(name) for name in self._replica.documents())
        return [document for document in found if document is not None]
