"""
What waits to be sent on one connection, in four lanes.

    CONTROL    heartbeats, records, questions: small, and what the rest depends on
    LIVE       changes as they are made, and what is said of them (in their order)
    EPHEMERAL  presence: each newer one makes the older ones worthless
    BULK       what was asked for: changes of the past, snapshots; and the goodbye, which comes last

A lane goes before those below it, but bulk always gets on a little. Everything is bounded: when
control and live frames add up to too much, the peer is *congested* and gets no more live ones (it
pulls what it lacks); presence beyond its share is dropped, the oldest first; bulk is given only for
requests, and no request is answered while a window's worth is under way (see `Sync`).
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum

from crdtstate import wire


class Lane(IntEnum):
    """Which goes first."""

    CONTROL = 0
    LIVE = 1
    EPHEMERAL = 2
    BULK = 3


EPHEMERAL_BYTES = 64 * 2**10

_LANES: dict[type[wire.Frame], Lane] = {
    wire.Have: Lane.LIVE,
    wire.Presence: Lane.EPHEMERAL,
    wire.Chunk: Lane.BULK,
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

    def __len__(self) -> int:
        return sum(map(len, self._lanes))

    @property
    def size_bytes(self) -> int:
        """What waits in all lanes."""
        return sum(self._sizes)

    @property
    def urgent_bytes(self) -> int:
        """What waits in the lanes that nobody asked for."""
        return self._sizes[Lane.CONTROL] + self._sizes[Lane.LIVE]

    def push(self, frame: bytes, lane: Lane) -> None:
        """Let a frame wait."""
        self._lanes[lane].append(frame)
        self._sizes[lane] += len(frame)
        while lane is Lane.EPHEMERAL and self._sizes[lane] > EPHEMERAL_BYTES:
            self._pop(lane)

    def take(self, frames_max: int = wire.BUNDLE_FRAMES_MAX) -> tuple[list[bytes], int]:
        """Take the frames of the next message, of which there must be one; and how many bytes of
        them were bulk."""
        taken: list[bytes] = []
        weight = bulk = 0
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
                bulk += len(frame) if lane is Lane.BULK else 0
                taken.append(frame)
        return taken, bulk

    def _pop(self, lane: Lane) -> bytes:
        frame = self._lanes[lane].popleft()
        self._sizes[lane] -= len(frame)
        return frame

    def clear(self) -> None:
        """Drop everything: the connection is gone."""
        for lane in Lane:
            self._lanes[lane].clear()
            self._sizes[lane] = 0
