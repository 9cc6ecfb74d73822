"""
Telling peers what is committed here. Sans-I/O; driven by `sync`.

A HAVE is announcement, acknowledgement and digest in one. Each peer is told, a moment after
something was committed, how far the writers concerned have come; when it connects, and when its
fingerprint has differed for long without a reason, it is told everything. So the loss of any HAVE
heals, and so does what a bug broke. A peer whose fingerprint is ours has all that we have, and
counts as having said so.

What a peer says to have takes room before anything of it is here, and anybody can make up names. So
there is room for a bounded number of documents that are not here, for each connection, and it goes
with the connection; no place among a replica's documents is taken before there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from crdtstate import wire
from crdtstate.clock import Version
from crdtstate.config import Config
from crdtstate.documents import SYSTEM_DOCUMENTS
from crdtstate.errors import ProtocolError
from crdtstate.ledger import Ledger
from crdtstate.link import MISMATCH_QUIET, MISMATCHES_MAX, Link
from crdtstate.mesh import Mesh
from crdtstate.outbox import Lane

UNHEARD_MAX = 10_000
UNHEARD_BEATS = 120
"""Documents that are not here, of which one peer may tell at a time; and heartbeats after which at
least one of so many has to have come."""


class Haves:
    """What one replica tells of what it has.

    Args:
        links: The connections by number; `sync` adds and removes them.
        ledger: Knows what is committed.
        config: Settings.
        push: Lets an encoded frame wait for a peer.
        ids: Tells the ids of changes, as `wire.Have` does, of a document at a version.
    """

    def __init__(
        self,
        links: Mapping[int, Link],
        ledger: Ledger,
        config: Config,
        push: Callable[[Link, bytes, Lane], None],
        ids: Callable[[str, Version], bytes],
    ) -> None:
        self._links = links
        self._ledger = ledger
        self._config = config
        self._push = push
        self._ids = ids
        # When to call `flush`; None while there is nothing to tell.
        self.flush_at: float | None = None

    # Hearing

    def has_room(self, link: Link, name: str, now: float) -> bool:
        """Whether to remember what a peer says to have of a document. Of those that are not here
        there is room for so many at a time; what is not remembered is told again (`compare`).

        Raises:
            ProtocolError: It tells of more and more, and for long none of them has come.
        """
        here = self._ledger.pages
        if name in here or name in link.unheard or name in SYSTEM_DOCUMENTS:
            return True
        if len(link.unheard) >= UNHEARD_MAX and now >= link.full_until:
            link.full_until = now + self._config.heartbeat
            link.unheard = {each for each in link.unheard if each not in here}
        if len(link.unheard) < UNHEARD_MAX:
            link.unheard.add(name)
            link.full_since = None
            return True
        if link.full_since is None:
            link.full_since = now
        if now - link.full_since > UNHEARD_BEATS * self._config.heartbeat:
            raise ProtocolError(f"tells of {UNHEARD_MAX} documents and more, and none has come")
        return False

    # News

    def note(self, document: str, writers: Collection[int], mesh: Mesh, now: float) -> None:
        """More of *writers* is committed: tell everybody soon."""
        if writers:
            for link in self._links.values():
                link.dirty.setdefault(document, set()).update(writers)
        if self._links:
            self.arm(mesh, now)

    def arm(self, mesh: Mesh, now: float) -> None:
        """Tell soon whoever has not been told: in a large mesh somewhat later."""
        if self.flush_at is None:
            is_small = mesh.members.count <= self._config.mesh_max
            delay = self._config.have_delay if is_small else self._config.have_delay_max
            self.flush_at = now + delay

    def flush(self) -> None:
        """Tell every peer what was committed since it was last told."""
        self.flush_at = None
        # Most have to be told the same.
        encoded: dict[tuple[str, frozenset[int]], bytes] = {}
        for link in self._links.values():
            if link.hello is None or link.is_congested or link.is_closing:
                continue
            dirty, link.dirty = link.dirty, {}
            for name, writers in dirty.items():
                if not link.takes(name):
                    continue
                key = (name, frozenset(writers))
                frame = encoded.get(key)
                if frame is None:
                    committed = self._ledger.pages[name].committed
                    moved = Version({writer: committed[writer] for writer in sorted(writers)})
                    have = wire.Have(name, moved, False, self._ids(name, moved))
                    frame = encoded[key] = wire.encode_frame(have)
                self._push(link, frame, Lane.LIVE)

    # Everything

    def tell_all(self, link: Link, lane: Lane = Lane.LIVE) -> None:
        """Tell a peer all that is committed. Who has just come is told before anything else is said
        or asked: it may write as a writer that it drew a second time (`authors`)."""
        for name in sorted(self._ledger.pages):
            if link.takes(name):
                link.dirty.pop(name, None)
                committed = self._ledger.committed(name)
                frame = wire.Have(name, committed, True, self._ids(name, committed))
                self._push(link, wire.encode_frame(frame), lane)

    def compare(
        self, link: Link, mine: int, theirs: int, before: tuple[int, int, int, int] | None
    ) -> None:
        """A heartbeat told *their* fingerprint, while *mine* concerns this link; *before* begins
        with both as of the last heartbeat."""
        if theirs == mine:
            link.mismatches = 0
            if link.agreed != mine:
                link.agreed = mine
                self._note_agreement(link)
            return
        # While changes are on their way nothing else is to be expected.
        is_quiet = before is not None and before[:2] == (theirs, mine)
        link.mismatches += MISMATCH_QUIET if is_quiet else 1
        if link.mismatches >= MISMATCHES_MAX:
            link.mismatches = 0
            self.tell_all(link)

    def _note_agreement(self, link: Link) -> None:
        """The peer has committed just what we have: it need not name it, should a HAVE be lost."""
        for name, page in self._ledger.pages.items():
            if link.takes(name):
                link.acked.setdefault(name, Version()).merge(page.committed)
