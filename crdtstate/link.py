"""
A connection, and what the core knows of whoever is on the other side.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from crdtstate import wire
from crdtstate.certificates import FORWARD, SNAPSHOT, Certificate
from crdtstate.clock import Version
from crdtstate.outbox import Outbox

MISMATCH_QUIET = 10
MISMATCHES_MAX = 30
"""Heartbeats in a row that tell of a difference, in what is committed or in the records of members,
before all is named anew; one at which neither side has changed since the one before counts as
ten."""

ALLOWED_MAX = 100_000
"""Documents of which is remembered whether the other side may have them."""


class Rival(NamedTuple):
    """Another session that says hello as the writer of a link that stands: *since* when, and
    whether the process behind that link has answered what it was asked then."""

    session: int
    since: float
    nonce: int
    is_answered: bool = False


@dataclass(slots=True, eq=False)
class Link:
    """One connection of this replica. *peer* is its number, *url* what was dialled, *certificate*
    what the other side has proved to have."""

    peer: int
    url: str | None
    since: float
    # When something came the last time.
    heard: float
    hello: wire.Hello | None = None
    # It has told us all it has; before, it might know more of our writer than we do.
    is_greeted: bool = False
    is_congested: bool = False
    is_closing: bool = False
    # The peer ended it in order, and why.
    bye: wire.ByeCode | None = None
    # Document -> what it has committed, by its HAVEs.
    acked: dict[str, Version] = field(default_factory=dict)
    # Document -> what it has at least in memory.
    known: dict[str, Version] = field(default_factory=dict)
    # Document -> writers whose committed seq it has not been told.
    dirty: dict[str, set[int]] = field(default_factory=dict)
    neighbours: frozenset[int] = frozenset()
    told_neighbours: tuple[int, ...] | None = None
    # Another session that said hello as the same writer.
    rival: Rival | None = None
    # The newest fingerprint that was the same on both sides.
    agreed: int | None = None
    # Heartbeats in a row on which it had the same versions as before, and others than we.
    mismatches: int = 0
    # The same for records of members.
    members_mismatches: int = 0
    # Its fingerprints of versions and of members in its newest heartbeat, and ours then.
    told: tuple[int, int, int, int] | None = None
    strikes: int = 0
    outbox: Outbox = field(default_factory=Outbox)
    certificate: Certificate | None = None
    # (document, writer) of whom it has another change than is here, and was asked for it.
    forks: set[tuple[str, int]] = field(default_factory=set)
    # Document -> until when it is doubtful whose our writer is: it was said once that there is
    # more of it, or something else, than is here.
    doubted: dict[str, float] = field(default_factory=dict)
    # Documents that it has told of and that were not here then; since when there is no room for
    # more, and when to look again whether there is.
    unheard: set[str] = field(default_factory=set)
    full_since: float | None = None
    full_until: float = 0.0
    # Document -> whether the certificate lets the other side have it.
    allowed: dict[str, bool] = field(default_factory=dict)

    @property
    def dialled(self) -> bool:
        """Whether this side dialled."""
        return self.url is not None

    @property
    def is_up(self) -> bool:
        """Whether the other side is known and nobody has hung up."""
        return self.hello is not None and not self.is_closing

    @property
    def agent(self) -> str:
        return self.hello.agent if self.hello else f"connection {self.peer}"

    @property
    def writer(self) -> int | None:
        return self.hello.writer if self.hello else None

    @property
    def is_leaf(self) -> bool:
        """Whether nobody can dial the other side: it has no other links than those it dialled."""
        return self.hello is not None and self.hello.address is None

    def takes(self, document: str) -> bool:
        """Whether the other side takes part in a document, and may."""
        if self.hello is not None and not takes(self.hello.documents, document):
            return False
        if self.certificate is None:
            return True
        found = self.allowed.get(document)
        if found is None:
            if len(self.allowed) >= ALLOWED_MAX:
                self.allowed.clear()
            found = self.allowed[document] = self.certificate.allows(FORWARD, document)
        return found

    def may_hand(self, document: str) -> bool:
        """Whether the other side is believed when it hands over a snapshot of a document."""
        return self.certificate is None or self.certificate.allows(SNAPSHOT, document)

    def doubts(self, document: str, now: float) -> bool:
        """Whether nothing of a document is to be sent to the other side yet, lest two changes get
        about that are one writer's and do not fit."""
        return self.doubted.get(document, now) > now

    @property
    def is_visitor(self) -> bool:
        """Whether the other side takes part in nothing: it only came to borrow a writer."""
        return self.hello is not None and self.hello.documents == ()

    @property
    def is_member(self) -> bool:
        """Whether the other side is up and takes part in the mesh."""
        return self.is_up and not self.is_visitor

    @property
    def is_partial(self) -> bool:
        """Whether the other side takes part in some documents only: it passes nothing on."""
        return self.hello is not None and self.hello.documents is not None


def takes(patterns: tuple[str, ...] | None, document: str) -> bool:
    """Whether *document* is among those that *patterns* name; None names all."""
    if patterns is None:
        return True
    return any(
        document.startswith(pattern[:-1]) if pattern.endswith("*") else document == pattern
        for pattern in patterns
    )
