"""
Quarantine: which changes the rules of documents have refused, and which were released.

What is refused (`rules`) lies in the document and is hidden (`hiding`), on every replica. Somebody
can look at it and let it count after all: a *release*, which is ordinary replicated content of the
document ``@quarantine``, with a map for each document and a key for each change that was released.
So all replicas show it from when they hear of it, whatever came first, also who gets the change
later, or with a snapshot. Whoever may write that document may release: in a mesh with certificates,
controllers.

A release says nothing of changes that are not refused; it waits for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crdtstate.clock import Dot, Stamp
from crdtstate.crdts import Map
from crdtstate.digests import describe
from crdtstate.slots import SEPARATOR

if TYPE_CHECKING:
    from crdtstate.document import Document

QUARANTINE = "@quarantine"
"""The document in which releases stand."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A change that everybody has and nobody sees, because the document's rules refuse it.

    Attributes:
        document: The document's name.
        dot: Which change it is: its writer, and the how-manieth of this writer.
        agent: Who made it.
        reason: Why it is refused: by which validator, and in its words.
        paths: The places where something of it would be read, such as ``plan['goal']``.
        when: When it was made, by its writer's hybrid logical clock.
    """

    document: str
    dot: Dot
    agent: str
    reason: str
    paths: tuple[str, ...]
    when: Stamp

    def __str__(self) -> str:
        when = self.when.time.isoformat(timespec="milliseconds")
        what = ", ".join(self.paths[:5]) + (", ..." if len(self.paths) > 5 else "")
        return f"{when} {self.agent}: {self.document}: {what}: {self.reason}"


def withheld(document: Document) -> list[Quarantined]:
    """The changes of a document that are refused and not released, as far as they stand, oldest
    first."""
    return [
        Quarantined(
            document.name,
            dot,
            refusal.agent,
            refusal.reason,
            tuple(describe(path) for path in refusal.paths),
            Stamp(refusal.stamp),
        )
        for dot, refusal in document.withheld()
    ]


def key_of(dot: Dot) -> str:
    """The key of a change in ``@quarantine``."""
    return f"{dot.writer:x}:{dot.seq}"


def _dot_of(key: str) -> Dot | None:
    writer, _, seq = key.partition(":")
    try:
        return Dot(int(writer, 16), int(seq))
    except ValueError:
        return None


def released(book: Document | None, name: str) -> frozenset[Dot]:
    """The changes of the document *name* that were released."""
    if book is None or book.shared:
        return frozenset()
    return frozenset(dot for key in book.map(name) if (dot := _dot_of(key)) is not None)


def heard(paths: Iterable[str]) -> Iterator[tuple[str, Dot]]:
    """The documents, and the changes of theirs, that *paths* of ``@quarantine`` are about."""
    for path in paths:
        container, _, key = path.partition(SEPARATOR)
        if container[:1] == Map.kind and (dot := _dot_of(key)) is not None:
            yield container[1:], dot
