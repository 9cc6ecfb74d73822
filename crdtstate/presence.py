"""
Presence: what agents are doing right now.

Each agent may show one small value to all others. It is kept by nobody: not journaled, not part
of any document, replaced by the next, and gone when its time to live is over, so also when the
agent crashed. While the agent lives it renews its value before that. Values travel along the tree
like changes, but each newer one makes the older ones worthless, so they may be dropped anywhere.

The same idea as the awareness protocol of Yjs, with the time counted by each hop and not by
comparing clocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from crdtstate import wire

RENEW = 0.4
"""Share of the time to live after which an own value is sent again: two may be lost."""

ENTRIES_MAX = 10_000
BYTES_MAX = 16 * 2**20
"""Values of others kept, and what they may add up to."""


@dataclass(slots=True, eq=False)
class _Shown:
    agent: str
    count: int
    # None: it was taken back, or is over.
    value: bytes | None
    until: float
    # Its count is remembered until then, so that nobody who was away brings an older one back.
    known_until: float

    @property
    def ends_at(self) -> float:
        """When there is something to do about it."""
        return self.known_until if self.value is None else self.until


class Presence:
    """What one replica knows of who shows what.

    Args:
        writer: Its writer, and
        agent: its name.
        wall_ms: The wall time in milliseconds since 1970, to begin counting above what an earlier
            process of this writer counted.
    """

    def __init__(self, writer: int, agent: str, wall_ms: int) -> None:
        self._writer = writer
        self._agent = agent
        self._count = wall_ms * 1000
        self._shown: dict[int, _Shown] = {}
        self._bytes = 0
        self._own: tuple[bytes, float] | None = None
        # Until when somebody may show an own value.
        self._own_until = 0.0
        self._renew_at: float | None = None
        # When the next value ends, at the earliest.
        self._ends_at: float | None = None

    def __len__(self) -> int:
        return len(self._shown)

    # Looking

    def values(self, now: float) -> Iterator[tuple[int, str, bytes]]:
        """What the others show: (writer, agent, packed value). Of several writers of one name the
        newest counts: the others are what an agent without a store was in earlier lives."""
        newest = {self._agent: self._count}
        for shown in self._shown.values():
            newest[shown.agent] = max(shown.count, newest.get(shown.agent, 0))
        for writer, shown in self._shown.items():
            is_newest = shown.count >= newest[shown.agent]
            if shown.value is not None and shown.until > now and is_newest:
                yield writer, shown.agent, shown.value

    @property
    def own(self) -> bytes | None:
        """What this replica shows."""
        return self._own[0] if self._own else None

    def next_deadline(self) -> float | None:
        """When to call `tick`."""
        if self._ends_at is None or self._renew_at is None:
            return self._ends_at or self._renew_at
        return min(self._ends_at, self._renew_at)

    # Showing

    def show(self, value: bytes | None, ttl: float, now: float) -> wire.Presence:
        """Show a value from now on, or none any more; returns what to tell everybody."""
        if value is None:
            self._own = self._renew_at = None
            self._count += 1
            # It must be remembered for as long as anybody may show what is taken back.
            self._own_until = max(self._own_until, now + ttl)
            return self._frame(None, self._own_until - now)
        self._own = value, ttl
        return self._renew(now)

    def _renew(self, now: float) -> wire.Presence:
        assert self._own is not None
        value, ttl = self._own
        self._renew_at = now + ttl * RENEW
        self._own_until = max(self._own_until, now + ttl)
        self._count += 1
        return self._frame(value, ttl)

    def _frame(self, value: bytes | None, ttl: float) -> wire.Presence:
        return wire.Presence(self._writer, self._agent, self._count, int(ttl * 1000), value)

    def rename(self, writer: int) -> None:
        """Go on as another writer."""
        self._writer = writer

    # Hearing

    def on_presence(self, frame: wire.Presence, now: float) -> bool:
        """Take in what somebody shows. True if it is news: pass it on."""
        if frame.writer == self._writer:
            return False
        known = self._shown.get(frame.writer)
        if known is not None and known.count >= frame.count:
            return False
        size = len(frame.value or b"") - len((known.value if known else None) or b"")
        if known is None and len(self._shown) >= ENTRIES_MAX:
            return False
        if self._bytes + size > BYTES_MAX:
            return False
        self._bytes += size
        until = now + frame.ttl_ms / 1000
        known_until = max(until, known.known_until) if known else until
        shown = _Shown(frame.agent, frame.count, frame.value, until, known_until)
        self._shown[frame.writer] = shown
        self._ends_at = min(
            shown.ends_at, shown.ends_at if self._ends_at is None else self._ends_at
        )
        return True

    def all(self, now: float) -> list[wire.Presence]:
        """What to tell somebody who has just joined."""
        found = []
        if self._own is not None:
            found.append(self._renew(now))
        elif self._own_until > now:
            found.append(self._frame(None, self._own_until - now))
        for writer, shown in self._shown.items():
            left_ms = int((shown.ends_at - now) * 1000)
            if left_ms > 0:
                frame = wire.Presence(writer, shown.agent, shown.count, left_ms, shown.value)
                found.append(frame)
        return found

    def tick(self, now: float) -> tuple[wire.Presence | None, list[tuple[int, str]]]:
        """Return the own value to send again, if that is due, and who shows nothing any more."""
        ended = []
        if self._ends_at is not None and self._ends_at <= now:
            for writer, shown in list(self._shown.items()):
                if shown.value is not None and shown.until <= now:
                    ended.append((writer, shown.agent))
                    self._bytes -= len(shown.value)
                    shown.value = None
                if shown.ends_at <= now:
                    del self._shown[writer]
            self._ends_at = min((shown.ends_at for shown in self._shown.values()), default=None)
        if self._renew_at is None or self._renew_at > now:
            return None, ended
        return self._renew(now), ended
