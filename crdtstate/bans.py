"""
Who has gone too far: scores that decay, bans that end, and buckets that make the hasty wait.

An offence is held against a *culprit*: the key of who did it, or before that is known, the address.
Its weight is added to a score that decays; at `Limits.ban_score` the culprit is banned for a while,
twice as long each time, and after a clean day all is forgotten. So a mistake now and then costs
nothing, and somebody who tries all the time gets few tries.

Nothing here knows a clock: *now* is an argument, in seconds of any clock that does not go back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv6Address, ip_address, ip_network

from crdtstate.limits import Limits

CULPRITS_MAX = 10_000
"""More are not remembered: those that have been quiet for longest are forgotten."""

Culprit = str | bytes
"""An address as `address_of` names it, or a public key."""


class Offence(IntEnum):
    """What weighs how much; 100 is a ban."""

    SLOW = 5
    """A handshake that was begun and not finished."""
    RATE = 10
    """More than may come."""
    BAD_FRAME = 20
    """A message that is none."""
    BROKEN_RULES = 50
    """Changes or frames that break rules, again and again, or one that nobody can make by mistake:
    a wrong signature, an update that would crash the engine."""
    FORGERY = 100
    """Changes in the name of somebody else."""


@dataclass(slots=True)
class _Record:
    score: float
    at: float  # when the score was this
    bans: int = 0
    until: float = float("-inf")


class Bans:
    """Scores and bans of all culprits."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # Whose last offence is oldest comes first.
        self._records: dict[Culprit, _Record] = {}

    def blame(self, culprit: Culprit, weight: float, now: float) -> float:
        """Hold an offence against a culprit. Return for how long it is banned from now on, 0 if
        it is not."""
        limits = self._limits
        record = self._records.pop(culprit, None) or _Record(0.0, now)
        if now - max(record.at, record.until) >= limits.ban_memory:
            record.bans = 0
        record.score, record.at = self._decayed(record, now) + weight, now
        self._records[culprit] = record
        while len(self._records) > CULPRITS_MAX:
            del self._records[next(iter(self._records))]
        if record.score >= limits.ban_score and record.until <= now:
            # Doubling must not overflow before it is capped.
            record.until = now + min(
                limits.ban_time_max, limits.ban_time * 2.0 ** min(record.bans, 64)
            )
            record.bans += 1
            record.score = 0.0
        return max(0.0, record.until - now)

    def blame_handshake(self, culprit: Culprit, now: float) -> float:
        """Hold a failed handshake against a culprit: `Limits.handshake_failures` of them within a
        minute are a ban."""
        limits = self._limits
        weight = (limits.ban_score + limits.ban_decay) / limits.handshake_failures
        return self.blame(culprit, weight, now)

    def left(self, culprit: Culprit, now: float) -> float:
        """For how long a culprit is still banned; 0 if it is not."""
        record = self._records.get(culprit)
        return 0.0 if record is None else max(0.0, record.until - now)

    def score(self, culprit: Culprit, now: float) -> float:
        """What is held against a culprit."""
        record = self._records.get(culprit)
        return 0.0 if record is None else self._decayed(record, now)

    def __len__(self) -> int:
        return len(self._records)

    def _decayed(self, record: _Record, now: float) -> float:
        forgotten = max(0.0, now - record.at) * self._limits.ban_decay / 60
        return max(0.0, record.score - forgotten)


class Bucket:
    """A token bucket: what comes may come at a *rate*, and a *burst* of it at once.

    What is taken beyond that is a debt, which is paid off by waiting. So nothing is refused, and in
    any time ``t`` no more than ``burst + rate * t`` is taken by who waits as told, and what was
    under way when the time began.
    """

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at = now

    def take(self, amount: float, now: float) -> float:
        """Take *amount*. Return how long to wait before taking more: 0 unless there is a debt."""
        elapsed = max(0.0, now - self._at)
        self._left = min(self._burst, self._left + elapsed * self._rate) - amount
        self._at = max(now, self._at)
        return max(0.0, -self._left / self._rate)

    def has(self, amount: float, now: float) -> bool:
        """Whether *amount* could be taken without a debt."""
        return self._left + max(0.0, now - self._at) * self._rate >= amount


def address_of(host: str) -> str:
    """What one site is called: an IPv4 address, or the first 64 bits of an IPv6 address."""
    try:
        found = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ip_network((found, 64), strict=False))
    return str(found)


def is_loopback(host: str) -> bool:
    """Whether an address is of the loopback interface."""
    try:
        found = ip_address(host)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return (mapped or found).is_loopback
