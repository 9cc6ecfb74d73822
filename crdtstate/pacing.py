"""
When plain writes are sealed: at once while the event loop is quick, together while it lags.

Each change costs every replica the same again, however little is in it. Where all of a turn goes
into others' changes, a writer gets to one write in each turn, and if each became a change of its
own, turns would never get shorter. So what counts is how long the pump waits for its turn. While
that is long, writes collect for a pause after each change, which doubles as long as it stays so and
is halved once it does not: additive steps would take too long to find the range, from one turn to a
hundred (compare Chiu & Jain, "Analysis of the Increase and Decrease Algorithms for Congestion
Avoidance", 1989). Who writes less often than a pause lasts never notices.

Nothing here reads a clock.
"""

from __future__ import annotations

LAG = 0.002
"""Seconds that the pump may wait for its turn without anybody minding."""

LAGS = 8
"""The first pause, in waits: turns are short while nothing is sealed."""


class Pace:
    """When to seal next.

    Args:
        pause_max: The longest pause, in seconds.
    """

    def __init__(self, pause_max: float) -> None:
        self._pause_max = pause_max
        self._pause = 0.0
        # How long the pump waited for its turn, at most, since the newest change.
        self._lag = 0.0
        # Nothing is to be sealed before.
        self.until = 0.0

    def waited(self, lag: float) -> None:
        """The pump had to wait so many seconds."""
        if lag > self._lag:
            self._lag = lag

    def sealed(self, now: float) -> None:
        """What was written so far is sealed."""
        if self._lag > LAG:
            self._pause = min(max(2 * self._pause, LAGS * self._lag), self._pause_max)
        else:
            self._pause = self._pause / 2 if self._pause > LAG else 0.0
        self._lag = 0.0
        self.until = now + self._pause
