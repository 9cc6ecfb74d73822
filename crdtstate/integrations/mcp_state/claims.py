"""
Claims: who works on what, so that two agents do not do the same.

A CRDT has no locks, so a claim is an agreement by waiting. Each who wants a place writes a
*candidate* under a key of its own, with a stamp, its name and until when it counts. Then it waits
until all members that can be reached have that, and longer again, for candidates that were on
their way meanwhile. The winner is the one of the least (stamp, name): everybody comes to the same.
Who lost takes its candidate back. A candidate that counts already wins over any later one, so as
long as a claim is held nobody else gets it.

What it cannot do: in a partition both sides may win, as neither hears the other; when it heals the
later one has lost, and learns of it when it looks or renews. The same holds if an agent is not
heard for longer than the wait, or if clocks are further apart than `GRACE`. Where that must never
be, use `Map.set_strong` and voters.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from crdtstate.clock import STAMP_MAX
from crdtstate.consistency import Confirm
from crdtstate.crdts import Map
from crdtstate.errors import ConfirmTimeout, UsageError
from crdtstate.integrations.mcp_state.places import OWN, Place, parse
from crdtstate.replica import Replica

SETTLE = 3.0
"""Seconds that a claim waits at most for others to have heard of it."""

PAUSE_MIN = 0.25
"""Seconds that it waits at least after that, for what was on its way."""

TTL_MIN, TTL_MAX = 1.0, 86_400.0

GRACE = 2.0
"""Seconds for which others still count a claim that has expired: clocks differ."""

FORGET = 86_400.0
"""Seconds after which anybody clears away what has expired: much longer than clocks differ."""

CLEARED_MAX = 1000
"""Of these, how many at a time."""

CANDIDATES_MAX = 10_000

WHY_CHARS_MAX = 500


class Candidate(NamedTuple):
    """Who wants a place, in the order in which one wins."""

    stamp: int
    agent: str
    id: str
    until: float
    why: str
    place: str


class Outcome(NamedTuple):
    """What came of a claim.

    Attributes:
        state: ``"won"``, ``"lost"``, ``"free"``, ``"held"`` (by somebody else) or ``"released"``.
        holder: Who has it, if anybody.
        until: Until when, in seconds since 1970.
        why: What the holder says of it.
        is_settled: Whether all members that can be reached had heard of the claim in time.
    """

    state: str
    holder: str | None = None
    until: float = 0.0
    why: str = ""
    is_settled: bool = True


class Claims:
    """The claims of one process.

    Args:
        replica: Where they are.
        saved: Waits until what was written so far is durable.
        settle: Seconds to wait at most for others to have heard.
    """

    def __init__(
        self, replica: Replica, saved: Callable[[], Awaitable[None]], settle: float = SETTLE
    ) -> None:
        self._replica, self._saved, self._settle = replica, saved, settle
        # Of this process: agents may have one name.
        self._id = secrets.token_hex(8)
        # Only one claim of a place at a time; a lock is there while somebody has it.
        self._busy: WeakValueDictionary[Place, asyncio.Lock] = WeakValueDictionary()

    def look(self, place: Place) -> Outcome:
        """Who has a place now."""
        holder = self._holder(place)
        if holder is None:
            return Outcome("free")
        state = "won" if holder.id == self._id else "held"
        return Outcome(state, holder.agent, holder.until, holder.why)

    async def claim(self, place: Place, ttl: float, why: str = "") -> Outcome:
        """Claim a place for *ttl* seconds, or prolong a claim that is held here.

        Raises:
            UsageError: The time or the reason cannot be.
            ConfirmTimeout: It could not be saved; it expires by itself.
        """
        if not TTL_MIN <= ttl <= TTL_MAX:
            raise UsageError(f"ttl is {TTL_MIN:g} to {TTL_MAX:g} seconds, not {ttl:g}")
        if len(why) > WHY_CHARS_MAX:
            raise UsageError(f"say why in at most {WHY_CHARS_MAX} characters")
        lock = self._busy.setdefault(place, asyncio.Lock())
        async with lock:
            return await self._claim(place, ttl, why)

    async def release(self, place: Place) -> Outcome:
        """Give back a place that is held here; nothing happens to one that is not."""
        if self._id in self._map(place):
            del self._map(place)[self._id]
            await self._saved()
            return Outcome("released")
        return self.look(place)

    def all(self) -> list[Candidate]:
        """Who holds what, oldest first."""
        document = self._replica.find(OWN)
        if document is None:
            return []
        holders = []
        for container in sorted(document.lanes.containers):
            if container[0] == Map.kind:
                found = self._live(document.map(container[1:]))
                if found:
                    holders.append(min(found))
        return sorted(holders)

    async def _claim(self, place: Place, ttl: float, why: str) -> Outcome:
        holder = self._holder(place)
        until = self._now() + ttl
        if holder is not None and holder.id != self._id:
            return Outcome("lost", holder.agent, holder.until, holder.why)
        if holder is not None and holder.until > self._now():
            # Still held, and as before: nobody else can have won.
            self._write(place, holder._replace(until=until, why=why or holder.why))
            await self._saved()
            holder = self._holder(place) or holder
            state = "won" if holder.id == self._id else "lost"
            return Outcome(state, holder.agent, holder.until, holder.why)
        self._clear()
        self._map(place).pop(self._id, None)
        stamp, agent = int(self._replica.next_stamp()), self._replica.agent
        self._write(place, Candidate(stamp, agent, self._id, until, why, str(place)))
        try:
            is_settled = await self._wait()
            holder = self._holder(place)
        except BaseException:
            # Whoever asked has gone, or it could not be saved.
            self._map(place).pop(self._id, None)
            raise
        if holder is not None and holder.id == self._id:
            return Outcome("won", holder.agent, holder.until, holder.why, is_settled)
        self._map(place).pop(self._id, None)
        await self._saved()
        if holder is None:
            return Outcome("lost", is_settled=is_settled)
        return Outcome("lost", holder.agent, holder.until, holder.why, is_settled)

    async def _wait(self) -> bool:
        """Wait until all others have heard of what was written here, and we of what they wrote
        before. Whether they have."""
        replica, clock = self._replica, asyncio.get_running_loop().time
        await self._saved()
        start = clock()
        # By name: those of one certificate have one name, and answer as one.
        names = {member.agent for member in replica.members() if member.state == "up"}
        names |= {replica.agent, *(peer.agent for peer in replica.peers())}
        confirm = Confirm.all() if replica.config.voters else Confirm(len(names))
        try:
            await replica.confirm(confirm, timeout=self._settle)
        except ConfirmTimeout:
            return False
        # Theirs took no longer on its way here than ours to them and the answer back.
        await asyncio.sleep(max(PAUSE_MIN, 2 * (clock() - start)))
        return True

    # Candidates

    def _holder(self, place: Place) -> Candidate | None:
        return min(self._live(self._map(place)), default=None)

    def _live(self, found: Map) -> list[Candidate]:
        """The candidates that count now."""
        limit = self._now()
        read = (_read(id, found.get(id)) for id in list(found)[:CANDIDATES_MAX])
        return [
            each
            for each in read
            if each is not None
            and each.until + (0 if each.id == self._id else GRACE) > limit
            and each.until <= limit + TTL_MAX + GRACE
        ]

    def _clear(self) -> None:
        """Remove what expired long ago, by agents that never came back."""
        document, limit = self._replica.document(OWN), self._now() - FORGET
        cleared = 0
        for container in list(document.lanes.containers):
            if container[0] != Map.kind:
                continue
            found = document.map(container[1:])
            for id in list(found):
                candidate = _read(id, found.get(id))
                if (candidate is None or candidate.until < limit) and cleared < CLEARED_MAX:
                    del found[id]
                    cleared += 1

    def _write(self, place: Place, candidate: Candidate) -> None:
        stamp, agent, id, until, why, name = candidate
        self._map(place)[id] = [stamp, agent, until, why, name]

    def _map(self, place: Place) -> Map:
        """The map of a place's candidates: named as it is, or by a hash if it cannot be."""
        name = str(place)
        if len(name) > 150 or not name.isprintable():
            name = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        return self._replica.document(OWN).map(name)

    def _now(self) -> float:
        return self._replica.wall_ms() / 1000


def _read(id: str, value: Any) -> Candidate | None:
    """A candidate, which anybody can have written; None if it is none."""
    match value:
        case [int(stamp), str(agent), float() | int() as until, str(why), str(name)]:
            if 0 <= stamp <= STAMP_MAX and 0 <= until < 2**40 and len(why) <= WHY_CHARS_MAX:
                return Candidate(stamp, agent, id, float(until), why, name)
    return None


def claimed_place(candidate: Candidate) -> Place | None:
    """The place that a candidate is of, if it says so rightly."""
    try:
        return parse(candidate.place)
    except UsageError:
        return None
