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
    # None: it was taken back; remembered until then, so that no older one brings it back.
    value: bytes | None
    until: float


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
        self._own: tuple[bytes | None, float] | None = None
        self._renew_at: float | None = None
        # When the next value ends, at the earliest.
        self._ends_at: float | None = None

    def __len__(self) -> int:
        return len(self._shown)

    # Looking

    def values(self, now: float) -> Iterator[tuple[int, str, bytes]]:
        """What the others show: (writer, agent, packed value)."""
        for writer, shown in self._shown.items():
            if shown.value is not None and shown.until > now:
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
        self._own = None if value is None else (value, ttl)
        self._renew_at = None if value is None else now + ttl * RENEW
        return self._frame(value, ttl)

    def _frame(self, value: bytes | None, ttl: float) -> wire.Presence:
        self._count += 1
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
        self._ends_at = until if self._ends_at is None else min(self._ends_at, until)
        self._shown[frame.writer] = _Shown(frame.agent, frame.count, frame.value, until)
        return True

    def drop(self, writer: int) -> bool:
        """Forget what a member shows: it is down. True if it showed something."""
        shown = self._shown.pop(writer, None)
        if shown is None:
            return False
        self._bytes -= len(shown.value or b"")
        return shown.value is not None

    def all(self, now: float) -> list[wire.Presence]:
        """What to tell somebody who has just joined."""
        found = []
        if self._own is not None:
            found.append(self._frame(*self._own))
        for writer, shown in self._shown.items():
            left_ms = int((shown.until - now) * 1000)
            if shown.value is not None and left_ms > 0:
                frame = wire.Presence(writer, shown.agent, shown.count, left_ms, shown.value)
                found.append(frame)
        return found

    def tick(self, now: float) -> tuple[wire.Presence | None, list[tuple[int, str]]]:
        """Return the own value to send again, if that is due, and who shows nothing any more."""
        ended = []
        if self._ends_at is not None and self._ends_at <= now:
            for writer, shown in list(self._shown.items()):
                if shown.until <= now and self.drop(writer):
                    ended.append((writer, shown.agent))
            self._ends_at = min((shown.until for shown in self._shown.values()), default=None)
        if self._own is None or self._renew_at is None or self._renew_at > now:
            return None, ended
        value, ttl = self._own
        self._renew_at = now + ttl * RENEW
        return self._frame(value, ttl), ended
