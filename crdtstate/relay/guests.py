"""
Guests: whoever writes through a relay without being a replica, such as a page in a browser.

What a guest writes is made into a change here, under a writer that is this relay's and not its own:
a *guest's writer*. It then goes the way of a change that a peer has sent. It is proved as the
relay's other changes are; `Change.origin` names the relay as the agent, and the guest as the run.

A writer leaves a trace in each document for ever, so one that is no longer needed is given to the
next guest. A dot is never used twice: a writer that was used before the process began is not known
here any more, and when it is not sure what became of a change, its writer is given up.
"""

from __future__ import annotations

from crdtstate.change import WRITE, Change, Origin, encode_change
from crdtstate.clock import Dot
from crdtstate.document import Document
from crdtstate.replica import Replica

TEXT_CHARS_MAX = 100
"""What is kept of what a guest says about itself."""


class Guests:
    """The writers of the guests of one relay.

    Args:
        replica: The relay's replica.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._free: list[int] = []
        # The newest change that was made, by document and writer.
        self._made: dict[tuple[str, int], int] = {}

    def borrow(self) -> int:
        """A writer that nobody else writes as."""
        while self._free:
            writer = self._free.pop()
            if all(self.is_sure(writer, name) for name, other in self._made if other == writer):
                return writer
        while True:
            writer = self._replica.draw_guest()
            if not any(writer in version for _, version in self._replica.versions()):
                return writer

    def give_back(self, writer: int) -> None:
        """A guest is gone."""
        self._free.append(writer)

    def is_sure(self, writer: int, document: str) -> bool:
        """Whether everything that was made under a writer is in a document here. It is not if that
        had to be loaded anew; what comes next would take a dot that is used already."""
        found = self._replica.find(document)
        at = found.version.get(writer, 0) if found is not None else 0
        return at >= self._made.get((document, writer), 0)

    def make(self, document: Document, writer: int, update: bytes, origin: Origin) -> Change:
        """The next change of a writer, from a Yjs update for native types that the guard let
        through."""
        replica = self._replica
        seq = document.version.get(writer, 0) + 1
        prover = replica.prover_of(writer)
        card = prover.card if prover is not None else b""
        change = encode_change(
            document.name,
            Dot(writer, seq),
            {other: at for other, at in document.heads.items() if other != writer},
            replica.next_stamp(),
            WRITE,
            document.shared,
            update,
            origin,
            prev=document.ids.get(writer, b""),
            card=card if card != document.cards.get(writer) else b"",
            prover=prover,
        )
        self.note(change)
        return change

    def note(self, change: Change) -> None:
        """A change was made."""
        self._made[change.document, change.writer] = change.seq

    def take_back(self, change: Change) -> None:
        """A change was refused, and nobody has it: its dot is free."""
        self._made[change.document, change.writer] = change.seq - 1

    def origin(self, run: str, message: str = "") -> Origin:
        """Where a guest's change comes from; *message* is what it says about itself."""
        return Origin(self._replica.agent, printable(message), run)


def printable(text: str) -> str:
    """Somebody's words, on one line and not too long."""
    return "".join(each if each.isprintable() else " " for each in text[:TEXT_CHARS_MAX]).strip()
