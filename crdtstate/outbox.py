"""
What waits to be sent on one connection, in four lanes.

    CONTROL    heartbeats, records, questions: small, and what the rest depends on
    LIVE       changes as they are made, and what is said of them (in their order)
    EPHEMERAL  presence: each newer one makes the older ones worthless
    BULK       what was asked for: changes of the past, snapshots, comparisons; and the goodbye,
               which comes last

A lane goes before those below it, but bulk always gets on a little. Everything is bounded: when
control and live frames add up to too much, for one peer or for all together, the peer is
*congested* and gets no more live ones (it pulls what it lacks), and one that takes nothing at all
is cut off; presence beyond its share is dropped, the oldest first; bulk is given only for requests,
and no request is answered while a window's worth is under way (see `Sync`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import Generic, Protocol, TypeVar

from crdtstate import wire
from crdtstate.config import Config


class Lane(IntEnum):
    """Which goes first."""

    CONTROL = 0
    LIVE = 1
    EPHEMERAL = 2
    BULK = 3


EPHEMERAL_BYTES = 64 * 2**10

URGENT_BYTES_MAX = 8 * 2**20
"""Bytes that a peer may leave unread before it is cut off; not even a congested one that reads
anything lets so much gather."""

FAIR_BYTES = 64 * 2**10
"""Bytes that each peer may leave unread also when all together leave too many."""

_LANES: dict[type[wire.Frame], Lane] = {
    wire.Have: Lane.LIVE,
    wire.Presence: Lane.EPHEMERAL,
    wire.Chunk: Lane.BULK,
    wire.Compare: Lane.BULK,
    wire.Compared: Lane.BULK,
    wire.Digests: Lane.BULK,
    wire.Diverged: Lane.BULK,
    wire.Bye: Lane.BULK,
}


def lane_of(frame: wire.Frame) -> Lane:
    """The lane that a frame belongs in."""
    if isinstance(frame, wire.Changes):
        return Lane.BULK if frame.answer else Lane.LIVE
    return _LANES.get(type(frame), Lane.CONTROL)


class Outbox:
    """The frames that wait for one connection."""

    def __init__(self) -> None:
        self._lanes: tuple[deque[bytes], ...] = tuple(deque() for _ in Lane)
        self._sizes = [0 for _ in Lane]
        # What waits in all lanes.
        self.size_bytes = 0

    def __bool__(self) -> bool:
        return self.size_bytes > 0

    @property
    def urgent_bytes(self) -> int:
        """What waits in the lanes that nobody asked for."""
        return self._sizes[Lane.CONTROL] + self._sizes[Lane.LIVE]

    @property
    def bulk_bytes(self) -> int:
        """What waits of what was asked for."""
        return self._sizes[Lane.BULK]

    def push(self, frame: bytes, lane: Lane) -> None:
        """Let a frame wait."""
        self._lanes[lane].append(frame)
        self._sizes[lane] += len(frame)
        self.size_bytes += len(frame)
        while lane is Lane.EPHEMERAL and self._sizes[lane] > EPHEMERAL_BYTES:
            self._pop(lane)

    def take(self, frames_max: int = wire.BUNDLE_FRAMES_MAX) -> list[bytes]:
        """Take the frames of the next message, of which there must be one."""
        taken: list[bytes] = []
        weight = 0
        has_bulk = bool(self._lanes[Lane.BULK]) and frames_max > 1
        # With half a message of the others, bulk comes along.
        room = wire.BUNDLE_BYTES // 2 if has_bulk else wire.BUNDLE_BYTES
        for lane in Lane:
            if lane is Lane.BULK:
                room = wire.BUNDLE_BYTES
            while self._lanes[lane] and weight < room and len(taken) < frames_max:
                if lane is not Lane.BULK and has_bulk and len(taken) >= frames_max - 1:
                    break
                frame = self._pop(lane)
                weight += wire.weigh(frame)
                taken.append(frame)
        return taken

    def _pop(self, lane: Lane) -> bytes:
        frame = self._lanes[lane].popleft()
        self._sizes[lane] -= len(frame)
        self.size_bytes -= len(frame)
        return frame

    def clear(self) -> None:
        """Drop everything: the connection is gone."""
        for lane in Lane:
            self._lanes[lane].clear()
            self._sizes[lane] = 0
        self.size_bytes = 0


class Recipient(Protocol):
    """Whose outbox it is: a `Link`."""

    outbox: Outbox
    is_congested: bool


R = TypeVar("R", bound=Recipient)


class Outboxes(Generic[R]):
    """All outboxes of a replica, and the limits that they share.

    Args:
        config: Settings.
        cut_off: Called for whoever takes nothing.
    """

    def __init__(self, config: Config, cut_off: Callable[[R], None]) -> None:
        self._config = config
        self._cut_off = cut_off
        self.size_bytes = 0

    def push(self, link: R, frame: bytes, lane: Lane) -> None:
        """Let a frame wait for a connection."""
        outbox, config = link.outbox, self._config
        before = outbox.size_bytes
        outbox.push(frame, lane)
        self.size_bytes += outbox.size_bytes - before
        if lane > Lane.LIVE:
            return
        waiting = outbox.urgent_bytes
        if waiting > URGENT_BYTES_MAX:
            self._cut_off(link)
        elif waiting > config.outbox_bytes or (
            waiting > FAIR_BYTES and self.size_bytes > config.outbox_bytes_total
        ):
            link.is_congested = True

    def take(self, link: R, frames_max: int = wire.BUNDLE_FRAMES_MAX) -> list[bytes]:
        """Take the frames of the next message to a connection, if there are any."""
        outbox = link.outbox
        if not outbox:
            return []
        before = outbox.size_bytes
        frames = outbox.take(frames_max)
        self.size_bytes -= before - outbox.size_bytes
        if link.is_congested:
            below = min(self._config.outbox_bytes / 4, FAIR_BYTES)
            link.is_congested = outbox.urgent_bytes >= below
        return frames

    def clear(self, link: R) -> None:
        """Drop what waits for a connection."""
        self.size_bytes -= link.outbox.size_bytes
        link.outbox.clear()
