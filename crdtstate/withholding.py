"""
Withholding: what is hidden of one document, and what a snapshot says of it.

What is hidden stands in `hiding`, and what is read instead in `lanes`. Here one is changed and the
other follows: hiding and showing, forgetting what its own writer has written over, and handing on
to who joins by a snapshot what it cannot judge any more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgpack

from crdtstate.change import Snapshot
from crdtstate.clock import Dot
from crdtstate.errors import InvalidUpdate
from crdtstate.hiding import Ceiling, Hiding, Refusal
from crdtstate.rules import Rules

if TYPE_CHECKING:
    from crdtstate.document import Document

PRUNE_MIN = 256
"""Refused changes of a writer that are remembered whether they stand or not."""

TOLD_BYTES_MIN = 4 * 2**20
"""What a snapshot may say of rules and refused changes, beside the bytes of its state."""

SLOT_BYTES_MIN = 8
"""Bytes of a state that one slot takes at least; each refused change has one."""


class Withholding:
    """What one document hides.

    Args:
        document: The document.
    """

    def __init__(self, document: Document) -> None:
        self._document = document
        # With how many refused changes of a writer to forget those that do not stand any more.
        self._prune_at = PRUNE_MIN

    def hide(self, writer: int, ceiling: Ceiling | None) -> list[str]:
        """Hide all changes of *writer* above a seq, whether they are here or still come; 0 hides
        its whole lane, None shows all of it again. Returns the paths that read differently."""
        document = self._document
        ceilings = document.hiding.ceilings
        if ceilings.get(writer) == ceiling:
            return []
        if ceiling is None:
            del ceilings[writer]
        else:
            ceilings[writer] = ceiling
        return document.lanes.review(writer)

    def release(self, dots: Iterable[Dot]) -> list[str]:
        """Show what the rules refused in the changes *dots*, and in no others. Returns the paths
        that read differently."""
        document = self._document
        hiding = document.hiding
        before, hiding.released = hiding.released, frozenset(dots)
        changed: list[str] = []
        for writer in sorted({dot.writer for dot in before ^ hiding.released}):
            if writer in hiding.refused:
                changed += document.lanes.review(writer, hiding.places(writer))
        return changed

    def withheld(self) -> list[tuple[Dot, Refusal]]:
        """The changes that the rules refused and nobody has released, as far as they stand, oldest
        first."""
        self._prune()
        return sorted(self._document.hiding.withheld(), key=lambda each: (each[1].stamp, each[0]))

    def counted(self, writer: int) -> dict[str, int]:
        """What the lane of *writer* counts in each counter, without what was refused: what a
        `Ceiling` at its present seq is to say."""
        document = self._document
        found = {}
        for path, slot in document.lanes.slots(writer).items():
            if path[0] == "c":
                found[path] = document.hiding.counted(writer, path, slot)
        return found

    def prune_some(self, writer: int) -> None:
        """Do that if there is twice as much of a writer as after the last time."""
        document = self._document
        if len(document.hiding.refused[writer]) > self._prune_at:
            newest = max(document.hiding.refused[writer])
            refusal = document.hiding.refused[writer][newest]
            self._prune()
            # It does not stand yet.
            document.hiding.refused.setdefault(writer, {})[newest] = refusal
            self._prune_at = max(PRUNE_MIN, 2 * len(document.hiding.refused[writer]))

    def _prune(self) -> None:
        """Forget what was refused and has been written over by its own writer."""
        document, lanes = self._document, self._document.lanes
        for writer in list(document.hiding.refused):
            slots = {path: lanes.slot(writer, path) for path in document.hiding.places(writer)}
            stands = {path: slot.seq for path, slot in slots.items() if slot is not None}
            document.hiding.stand(writer, stands)

    def told(self) -> bytes:
        """What a snapshot says of rules and refused changes."""
        document = self._document
        self._prune()
        if not document.rules and not document.hiding.refused:
            return b""
        told: bytes = msgpack.packb([document.rules.flat(), document.hiding.flat()])
        return told

    def hear(self, snapshot: Snapshot) -> tuple[Rules, Hiding]:
        """What will be known of rules and refused changes with a snapshot. Raises InvalidUpdate."""
        document = self._document
        rules, hiding = read_told(snapshot)
        mine, theirs = document.version, snapshot.version
        newer = [writer for writer, seq in theirs.items() if seq > mine.get(writer, 0)]
        return document.rules.joined(rules), document.hiding.joined(hiding, newer)


def read_told(snapshot: Snapshot) -> tuple[Rules, Hiding]:
    """Read what a snapshot says of rules and refused changes. Raises InvalidUpdate."""
    told, size = snapshot.told, len(snapshot.state)
    if not told:
        return Rules(), Hiding()
    if len(told) > TOLD_BYTES_MIN + size:
        raise InvalidUpdate("a snapshot says more of its rules than of its content")
    try:
        rules, hiding = msgpack.unpackb(told, use_list=False, max_map_len=0, max_ext_len=0)
    except Exception as exc:
        raise InvalidUpdate(f"a snapshot's rules cannot be read: {exc}") from exc
    return Rules.from_flat(rules), Hiding.from_flat(hiding, size // SLOT_BYTES_MIN)
