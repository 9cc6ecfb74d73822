"""
Telling peers what is committed here. Sans-I/O; driven by `sync`.

A HAVE is announcement, acknowledgement and digest in one. Each peer is told, a moment after
something was committed, how far the writers concerned have come; when it connects, and when its
fingerprint has differed for long without a reason, it is told everything. So the loss of any HAVE
heals, and so does what a bug broke. A peer whose fingerprint is ours has all that we have, and
counts as having said so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from crdtstate import wire
from crdtstate.clock import Version
from crdtstate.config import Config
from crdtstate.ledger import Ledger
from crdtstate.link import MISMATCH_QUIET, MISMATCHES_MAX, Link
from crdtstate.mesh import Mesh
from crdtstate.outbox import Lane


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

    def tell_all(self, link: Link) -> None:
        """Tell a peer all that is committed."""
        for name in sorted(self._ledger.pages):
            if link.takes(name):
                link.dirty.pop(name, None)
                committed = self._ledger.committed(name)
                frame = wire.Have(name, committed, True, self._ids(name, committed))
                self._push(link, wire.encode_frame(frame), Lane.LIVE)

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
