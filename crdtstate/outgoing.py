"""
Changes on their way out as they are made. Sans-I/O; driven by `sync`.

Each is sent along the eager links of the `mesh`: in a complete one to every peer that may lack it
(not to the one it came from, nor to that one's neighbours, which have it from there), in a larger
one along a tree. Who is slow to read gets none; it pulls what it lacks (`wants`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from crdtstate import wire
from crdtstate.change import Change
from crdtstate.link import Link
from crdtstate.mesh import Mesh
from crdtstate.outbox import Lane

CHANGES_FRAME_BYTES = 256 * 1024

SPREAD_FREE = 16
SPREAD_EACH = 0.0001
SPREAD_MAX = 0.05
"""Seconds between two times that changes are sent to many: so many for each connection above so
many, and at most so many."""


class Outgoing:
    """The changes that one replica has to send on.

    Args:
        links: The connections by number; `sync` adds and removes them.
        push: Lets an encoded frame wait for a peer.
    """

    def __init__(
        self, links: Mapping[int, Link], push: Callable[[Link, bytes, Lane], None]
    ) -> None:
        self._links = links
        self._push = push
        # With the link that each came from.
        self._changes: list[tuple[Change, Link | None]] = []
        self._spread_at = 0.0
        # How many changes were sent, each counted for every peer.
        self.copies = 0
        # Documents of which own changes were sent to anybody.
        self.left: set[str] = set()

    def add(self, change: Change, source: Link | None) -> None:
        """Send a change on; *source* is the link that it came from."""
        self._changes.append((change, source))

    def clear(self) -> None:
        """Send none of what was added."""
        self._changes.clear()

    def next_deadline(self) -> float | None:
        """When to call `spread`; None if there is nothing to send."""
        return self._spread_at if self._changes else None

    def spread(self, mesh: Mesh, now: float) -> None:
        """Send the changes, each to those that may lack it; to many only now and then.

        A message to each of two hundred connections costs more than to write one change, so what
        arrives from them one by one goes out by the dozen.
        """
        changes, self._changes = self._changes, []
        encoded: dict[tuple[int, ...], list[bytes]] = {}
        peers = 0
        for link in self._links.values():
            if not link.is_member or not link.is_greeted or link.is_congested:
                continue
            if not mesh.is_eager(link, now):
                continue
            chosen = tuple(
                index
                for index, (change, source) in enumerate(changes)
                if _may_lack(link, change, source, mesh) and not link.doubts(change.document, now)
            )
            if not chosen:
                continue
            frames = encoded.get(chosen)
            if frames is None:
                frames = encoded[chosen] = _encode([changes[i][0].data for i in chosen])
            peers += 1
            self.copies += len(chosen)
            for frame in frames:
                self._push(link, frame, Lane.LIVE)
        if peers:
            self.left.update(change.document for change, source in changes if source is None)
        pause = min(max(0, peers - SPREAD_FREE) * SPREAD_EACH, SPREAD_MAX)
        self._spread_at = now + pause


def _may_lack(link: Link, change: Change, source: Link | None, mesh: Mesh) -> bool:
    if not link.takes(change.document) or link is source:
        return False
    if source is not None and mesh.is_direct and link.writer in source.neighbours:
        return False
    known = link.known.get(change.document)
    return known is None or known.get(change.writer, 0) < change.seq


def _encode(changes: Sequence[bytes]) -> list[bytes]:
    return [wire.encode_frame(wire.Changes(tuple(part))) for part in split(changes)]


def split(changes: Sequence[bytes]) -> list[list[bytes]]:
    """Cut a run of changes into frames of a size that does not delay what comes after it."""
    frames: list[list[bytes]] = [[]]
    size = 0
    for data in changes:
        if frames[-1] and (
            size + len(data) > CHANGES_FRAME_BYTES or len(frames[-1]) >= wire.CHANGES_MAX
        ):
            frames.append([])
            size = 0
        frames[-1].append(data)
        size += len(data)
    return frames
