"""
Changes that came before what they build on: the causal buffer. Sans-I/O; driven by `sync`.

A change is delivered after all it builds on (L5 of `lanes`). One that comes too early is *parked*
under the first change that it lacks, which is wanted from then on, and tried again once that one
is delivered: it is ready then, or waits for the next that it lacks. After a jump of the version (a
snapshot was joined, a document rebuilt) everything that waits in that document is tried again.

What is parked was never acknowledged, so none of it has to be kept: when too much waits, a change
is turned away, to be asked for again (S6 of `sync`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from crdtstate.change import Change
from crdtstate.clock import Dot
from crdtstate.config import Config
from crdtstate.document import Document
from crdtstate.wants import Wants

SHARE = 4
SHARE_CHANGES_MIN = 64
SHARE_BYTES_MIN = 2**20
"""One writer may have a quarter of what may wait, or this if it is more: gaps that never close must
not keep out what others' changes wait for."""

Place = tuple[str, int, int]
"""Where a change belongs: document, writer, seq."""


class Parked(NamedTuple):
    """A change that waits, and the peer that sent it."""

    change: Change
    peer: int


class Share(NamedTuple):
    """How much of one writer waits."""

    changes: int = 0
    size_bytes: int = 0


class Pending:
    """The changes of one replica that wait for others.

    Args:
        config: Settings, with the limits.
        wants: Is told what they wait for.
    """

    def __init__(self, config: Config, wants: Wants) -> None:
        self._config = config
        self._wants = wants
        self._parked: dict[Place, Parked] = {}
        # Lacking change -> those that wait for it.
        self._waiting: dict[Place, list[Place]] = {}
        # Those that wait for nothing but a verdict; see `verdicts`.
        self._held: set[Place] = set()
        self.size_bytes = 0
        # Writer -> how much of its waits.
        self._shares: dict[int, Share] = {}

    # Looking

    def __len__(self) -> int:
        return len(self._parked)

    def __contains__(self, place: Place) -> bool:
        return place in self._parked

    @property
    def awaited(self) -> int:
        """How many changes others wait for."""
        return len(self._waiting)

    def seqs(self) -> dict[tuple[str, int], list[int]]:
        """What is parked, by document and writer."""
        found: dict[tuple[str, int], list[int]] = {}
        for name, writer, seq in self._parked:
            found.setdefault((name, writer), []).append(seq)
        return found

    # Waiting

    def park(self, document: Document, change: Change, peer: int, now: float) -> None:
        """Let a change wait for the first one it lacks; or, when too many do, forget it: it was
        not acknowledged, so it will be asked for again (S6)."""
        if not self._has_room(change):
            due = now + self._config.want_retry
            self._wants.want(change.document, change.writer, change.seq, due)
            return
        self._put_in(change, peer)
        self._wait(document, change, now)

    def hold(self, change: Change, peer: int, now: float) -> bool:
        """Let a change wait until it is taken out; False if too much waits: forget it then."""
        if not self._has_room(change):
            due = now + self._config.want_retry
            self._wants.want(change.document, change.writer, change.seq, due)
            return False
        self._put_in(change, peer)
        self._held.add(_place(change))
        return True

    def release(self, change: Change) -> bool:
        """Take out a change that is held; False if it is not held any more."""
        place = _place(change)
        is_held = place in self._held
        if is_held:
            self._take_out(place)
        return is_held

    def _has_room(self, change: Change) -> bool:
        limit, size = self._config, len(change.data)
        shares = self._shares.get(change.writer, Share())
        return (
            len(self._parked) < limit.pending_changes
            and self.size_bytes + size <= limit.pending_bytes
            and shares.changes < max(SHARE_CHANGES_MIN, limit.pending_changes // SHARE)
            and shares.size_bytes + size <= max(SHARE_BYTES_MIN, limit.pending_bytes // SHARE)
        )

    def _put_in(self, change: Change, peer: int) -> None:
        self._parked[_place(change)] = Parked(change, peer)
        self._count(change, 1)

    def _count(self, change: Change, sign: int) -> None:
        size = sign * len(change.data)
        self.size_bytes += size
        share = self._shares.get(change.writer, Share())
        share = Share(share.changes + sign, share.size_bytes + size)
        self._shares[change.writer] = share
        if not share.changes:
            del self._shares[change.writer]

    def _wait(self, document: Document, change: Change, now: float) -> None:
        version = document.version
        lacking = Dot(change.writer, change.seq - 1)
        if version.covers(lacking):
            lacking = next(dep for dep in change.deps if not version.covers(dep))
        self._waiting.setdefault((change.document, *lacking), []).append(_place(change))
        due = now + self._config.want_delay
        self._wants.want(change.document, lacking.writer, lacking.seq, due)

    # Trying again

    def delivered(self, change: Change) -> Sequence[Place]:
        """A change was delivered: `retry` each of these."""
        return self._waiting.pop(_place(change), ())

    def jumped(self, document: Document) -> Sequence[Place]:
        """The version has jumped: forget what it contains, and `retry` each of these."""
        name, version = document.name, document.version
        places = [place for place in self._parked if place[0] == name]
        for place in [place for place in self._waiting if place[0] == name]:
            del self._waiting[place]
        for place in places:
            if version.covers(place[1:]):
                self._take_out(place)
        return places

    def retry(self, document: Document, place: Place, now: float) -> Parked | None:
        """Take a change out if it is ready to be delivered; if not, it waits on."""
        parked = self._parked.get(place)
        if parked is None or place in self._held:
            return None
        if document.is_ready(parked.change):
            return self._take_out(place)
        self._wait(document, parked.change, now)
        return None

    def _take_out(self, place: Place) -> Parked:
        self._held.discard(place)
        parked = self._parked.pop(place)
        self._count(parked.change, -1)
        return parked


def _place(change: Change) -> Place:
    return change.document, change.writer, change.seq
