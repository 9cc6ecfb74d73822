"""
Who is in the mesh, and who of them can be reached.

Each replica publishes one small *record* of itself: its name, where it listens, and the members
it is connected to. Records spread to everybody, the newer of two of one writer counts, so the
table of them is a CRDT of its own. Who is up is then computed, by everyone alike, as in a
link-state routing protocol (OSPF, Moy 1998): a member is up if a chain of links leads there. A
link stands if a reachable member says so, or if the member behind it does and the reachable one
does not deny it (it is not *lost*). So nobody is declared dead for one broken link while another
member still hears it, a partition shows as soon as its edge is known, and nothing has to be
refuted when it heals: new links are new records.

    up           reachable
    suspected    connected to this replica, and silent for three heartbeats or just cut off
    down         not reachable
    retired      said goodbye, or has been down for `Config.retire_after`

Only a member's neighbours watch it: on TCP a killed process shows at once, a black hole after
`Config.link_timeout`. That a stalled event loop is not taken for either is the link's business.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from crdtstate import wire
from crdtstate.clock import mix
from crdtstate.config import Config
from crdtstate.errors import ProtocolError
from crdtstate.events import Event, MemberDown, MemberRetired, MemberSuspected, MemberUp
from crdtstate.wire import Record

State = Literal["up", "suspected", "down", "retired"]

DOWN_DELAY = 0.2
"""Seconds a member is unreachable before it is down: records of one event arrive one by one."""

LOST_DELAY = 2.0
"""Seconds a record may claim a link that does not stand before it is denied: it may be old, or
the link so new that only one side knows it."""

SUSPICION = 2.0
"""Seconds for which who was suspected stays so after the link to it is gone, while others still
claim one: they notice what happened within a heartbeat."""

RIVAL_AFTER_MS = 10
"""Milliseconds after a replica began for which records of its writer may be those of the session
before."""

RIVAL_RECORDS = 4
"""Newer records of its own writer after which a replica knows that another process is that writer,
too. They come of themselves, as each wants to be the newer one. One or two may be left from before
a clock was set back."""

FORGET_AFTER = 600.0
"""Seconds for which a retired member's record is kept, so that no older one brings it back."""


@dataclass(frozen=True, slots=True)
class Member:
    """A replica that is, or was, in the mesh.

    Attributes:
        agent: Its agent's name.
        writer: Its number in versions; unique where names are not.
        role: ``"agent"`` or ``"relay"``.
        state: ``"up"``, ``"suspected"`` (not heard for a while), ``"down"`` (nobody hears it) or
            ``"retired"`` (it said goodbye, or was down for long).
        address: The URL where it can be reached, if it can.
        links: The writers of the members it is connected to, as far as it tells.
        is_self: Whether it is this replica.
    """

    agent: str
    writer: int
    role: str
    state: State
    address: str | None
    links: tuple[int, ...]
    is_self: bool = False


@dataclass(slots=True, eq=False)
class _Known:
    record: Record
    # As it came, to be passed on.
    data: bytes
    state: State | None = None
    # Whether it was reachable in our time.
    was_up: bool = False
    # Since when it is unreachable, down or retired.
    since: float | None = None
    # Until when it stays suspected, after the link to it is gone.
    suspected_until: float | None = None
    # Since when it claims a link that does not stand.
    claims_since: float | None = None


class Membership:
    """The members that one replica knows.

    Args:
        me: Its own record, to begin with.
        config: Settings.
        wall_ms: Returns the wall time in milliseconds since 1970, for the seqs of own records.
        emit: Takes the events.
        now: The time.
    """

    def __init__(
        self,
        me: Record,
        config: Config,
        wall_ms: Callable[[], int],
        emit: Callable[[Event], None],
        now: float,
    ) -> None:
        self._config = config
        self._wall_ms = wall_ms
        self._emit = emit
        self._known: dict[int, _Known] = {}
        # 64 bits over the records of all who are not gone.
        self.fingerprint = 0
        # Writers whose records changed and were not spread yet -> the link each came by.
        self.news: dict[int, int | None] = {}
        # Writers whose records claim a link to this replica.
        self._claiming: set[int] = set()
        # Whether everyone who is up is connected with everyone else, and they are few.
        self.is_complete = False
        # Members that are up, this one included, and relays among the others.
        self.count, self.relays = 1, 0
        # Whether a record changed since the states were computed.
        self.is_stale = True
        self.me = replace(me, seq=max(1, wall_ms()))
        # How often somebody else has spoken of itself as this writer since we began to.
        self._contradictions = 0
        self._began = self.me.seq
        self._store(self.me, wire.encode_record(self.me), None)

    # Looking

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, writer: int) -> bool:
        return writer in self._known

    def members(self) -> Iterator[Member]:
        """All known members."""
        for writer, known in self._known.items():
            record = known.record
            is_self = writer == self.me.writer
            state = "up" if is_self else known.state
            if state is not None:
                yield Member(
                    record.agent, writer, record.role, state, record.address, record.links, is_self
                )

    def others(self) -> Iterator[tuple[Record, State]]:
        """The records of all other members that have a state, with it."""
        for writer, known in self._known.items():
            if writer != self.me.writer and known.state is not None:
                yield known.record, known.state

    @property
    def has_rival(self) -> bool:
        """Whether another process speaks of itself as the same writer."""
        return self._contradictions >= RIVAL_RECORDS

    def state(self, writer: int) -> State | None:
        """A member's state; None if it is not known."""
        known = self._known.get(writer)
        return known.state if known else None

    def seen_ms(self, writer: int, now: float) -> int:
        """When a member was last known to be reachable, in milliseconds since 1970; of one that
        was not in our time, when it last told of itself; 0 if it is not known."""
        known = self._known.get(writer)
        if known is None:
            return 0
        if known.state in ("up", "suspected"):
            return self._wall_ms()
        if known.state == "down" and known.was_up and known.since is not None:
            return self._wall_ms() - int((now - known.since) * 1000)
        return known.record.seq

    def orders(self) -> dict[int, int]:
        """Which records are here: writer -> order."""
        return {writer: known.record.order for writer, known in self._known.items()}

    def writer_at(self, address: str) -> int | None:
        """Who is to be found at an address, if a member says so."""
        for writer, known in self._known.items():
            if known.record.address == address and not known.record.is_gone:
                return writer
        return None

    def item(self, writer: int) -> tuple[int, int, bytes]:
        """A record as it is passed on."""
        known = self._known[writer]
        return writer, known.record.order, known.data

    # Taking in

    def on_records(self, records: Iterable[tuple[int, int, bytes]], peer: int) -> bool:
        """Take in what a peer knows. True if it is news that somebody lost a neighbour.

        Raises:
            ProtocolError: These are no records.
        """
        is_urgent = False
        for writer, order, data in records:
            # Most come more than once.
            known = self._known.get(writer)
            if known is not None and known.record.order >= order:
                continue
            record = wire.decode_record(data)
            if (record.writer, record.order) != (writer, order):
                raise ProtocolError(f"a record of {record.writer:x} in place of {writer:x}")
            is_urgent |= self._on_record(record, data, peer) and bool(record.lost)
        return is_urgent

    def _on_record(self, record: Record, data: bytes, peer: int) -> bool:
        """Take in a record that is newer; whether it was."""
        known = self._known.get(record.writer)
        if record.writer == self.me.writer:
            # An older session of this replica, or somebody who takes it for gone: be newer.
            if record.session != self.me.session and record.seq > self._began + RIVAL_AFTER_MS:
                self._contradictions += 1
            self._republish(replace(self.me, seq=record.seq))
            return False
        if known is None and len(self._known) >= wire.MEMBERS_MAX and not self._make_room():
            return False
        self._store(record, data, peer)
        return True

    def _make_room(self) -> bool:
        """Forget one that does not count any more, if there is one."""
        for wanted in ("retired", "down"):
            for writer, known in self._known.items():
                if known.state == wanted:
                    self._forget(writer)
                    return True
        return False

    def _store(self, record: Record, data: bytes, peer: int | None) -> None:
        known = self._known.get(record.writer)
        if known is None:
            self._known[record.writer] = known = _Known(record, data)
        else:
            self.fingerprint ^= _mix(known.record)
            if known.state == "retired" and not record.is_gone:
                # It is back: as one of whom we hear for the first time.
                known.state = known.since = None
            known.record, known.data = record, data
        self.fingerprint ^= _mix(record)
        if self.me.writer in record.links:
            self._claiming.add(record.writer)
        else:
            self._claiming.discard(record.writer)
            known.claims_since = None
        self.news[record.writer] = peer
        self.is_stale = True

    def _forget(self, writer: int) -> None:
        self.fingerprint ^= _mix(self._known.pop(writer).record)
        self.news.pop(writer, None)
        self._claiming.discard(writer)

    def newer_than(self, orders: Mapping[int, int]) -> list[int]:
        """The writers of records that are newer here than in *orders*, or lacking there. Who is
        gone and lacking there may be forgotten already."""
        return [
            writer
            for writer, known in self._known.items()
            if known.record.order > orders.get(writer, 0)
            and (writer in orders or not known.record.is_gone)
        ]

    def older_than(self, orders: Mapping[int, int]) -> dict[int, int]:
        """Of *orders* those that are newer there: writer -> order here."""
        found = {}
        for writer, order in orders.items():
            known = self._known.get(writer)
            have = known.record.order if known else 0
            # An odd order tells of one who is gone: forgotten here, or never heard of.
            if order > have and (known is not None or order % 2 == 0):
                found[writer] = have
        return found

    # Telling

    def publish(self, links: tuple[int, ...], linked: set[int], now: float) -> None:
        """Tell everybody of the own links, if that is news. *links* are the ones to name, *linked*
        are all."""
        lost = self._bound(list(self._lost(linked, now)))
        if links != self.me.links or lost != self.me.lost:
            self._republish(replace(self.me, links=links, lost=lost))

    def has_lost(self, linked: set[int], now: float) -> bool:
        """Whether a link that everybody knows of does not stand any more."""
        if any(writer not in linked for writer in self.me.links):
            return True
        lost = {writer for writer, _ in self._lost(linked, now)}
        return not lost <= {writer for writer, _ in self.me.lost}

    def _lost(self, linked: set[int], now: float) -> Iterator[tuple[int, int]]:
        """Records that claim a link to this replica that has not stood for a while."""
        for writer in self._claiming:
            known = self._known[writer]
            if writer in linked or known.record.is_gone:
                known.claims_since = None
                continue
            if known.claims_since is None:
                known.claims_since = now
            if now >= known.claims_since + LOST_DELAY:
                yield writer, known.record.seq

    def _bound(self, lost: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        """Retire whom this record has no room to deny, those not heard of for longest: they would
        be up again."""
        lost.sort(key=lambda each: each[1], reverse=True)
        for writer, _ in lost[wire.LOST_MAX :]:
            self._retire(self._known[writer])
        return tuple(sorted(lost[: wire.LOST_MAX]))

    def cut_off(self, writer: int, now: float) -> None:
        """The link to a member broke, and was not made anew: what it claims is false."""
        if (known := self._known.get(writer)) is not None:
            known.claims_since = now - LOST_DELAY
            self.is_stale = True

    def leave(self) -> None:
        """Say goodbye."""
        self._republish(replace(self.me, is_gone=True, links=(), lost=()))

    def rename(self, me: Record) -> None:
        """Go on as another writer: the one so far has left."""
        self.leave()
        self._claiming.clear()
        self.me = replace(me, seq=self.me.seq)
        self._republish(self.me)
        self._contradictions, self._began = 0, self.me.seq

    def _republish(self, record: Record) -> None:
        seq = max(record.seq + 1, self._wall_ms())
        self.me = replace(record, seq=min(seq, wire.ORDER_MAX // 2 - 1))
        self._store(self.me, wire.encode_record(self.me), None)

    # States

    def update(self, linked: Mapping[int, bool], now: float) -> float | None:
        """Compute everybody's state anew; return when to do it again, whatever happens.

        Args:
            linked: The writers this replica is connected to -> whether they are suspected.
        """
        self.is_stale = False
        reached = self._reach(linked)
        again: float | None = None
        for writer, known in list(self._known.items()):
            if writer == self.me.writer:
                continue
            at = self._judge(writer, known, reached, linked.get(writer), now)
            if at is not None and (again is None or at < again):
                again = at
        living = [known for known in self._known.values() if known.state in ("up", "suspected")]
        self.count = 1 + len(living)
        self.relays = sum(1 for known in living if known.record.role == "relay")
        self.is_complete = self._find_complete(linked)
        return again

    def _reach(self, linked: Iterable[int]) -> set[int]:
        """The members to whom a chain of links leads from here."""
        known = self._known
        claims: dict[int, list[int]] = {}
        for writer, each in known.items():
            if not each.record.is_gone:
                for other in each.record.links:
                    claims.setdefault(other, []).append(writer)
        me = self.me.writer
        reached = {me}
        queue = deque([me])
        while queue:
            at = queue.popleft()
            for writer in linked if at == me else self._around(at, claims):
                if writer not in reached and self._is_here(writer):
                    reached.add(writer)
                    queue.append(writer)
        return reached

    def _is_here(self, writer: int) -> bool:
        """Whether there is a record of a member that has not left."""
        known = self._known.get(writer)
        return known is not None and not known.record.is_gone

    def _around(self, writer: int, claims: Mapping[int, list[int]]) -> Iterator[int]:
        """Whom a reachable member is connected to: whom it names, and who names it unless it
        denies that."""
        record = self._known[writer].record
        yield from record.links
        lost = dict(record.lost)
        for other in claims.get(writer, ()):
            if self._known[other].record.seq > lost.get(other, 0):
                yield other

    def _judge(
        self, writer: int, known: _Known, reached: set[int], is_silent: bool | None, now: float
    ) -> float | None:
        """Set one member's state; return when to look again, if that is known. *is_silent* is None
        if there is no link to it."""
        if known.record.is_gone:
            return self._judge_gone(writer, known, now)
        if writer in reached:
            known.since = None
            return self._judge_reached(known, is_silent, now)
        if known.since is None:
            known.since = now
        # One of whom we hear for the first time may have neighbours of whom we shall hear.
        down_at = known.since + (LOST_DELAY if known.state is None else DOWN_DELAY)
        if now < down_at and known.state != "down":
            return down_at
        self._set(known, "down")
        config = self._config
        durable = known.record.is_durable
        retire_at = known.since + (config.retire_after if durable else config.retire_memory_after)
        if now < retire_at and not self._is_replaced(known.record, reached):
            return retire_at
        self._retire(known)
        return self._judge_gone(writer, known, now)

    def _retire(self, known: _Known) -> None:
        gone = replace(known.record, is_gone=True)
        self._store(gone, wire.encode_record(gone), None)

    def _judge_reached(self, known: _Known, is_silent: bool | None, now: float) -> float | None:
        if is_silent is None and known.state == "suspected":
            if known.suspected_until is None:
                known.suspected_until = now + SUSPICION
            if now < known.suspected_until:
                return known.suspected_until
        known.suspected_until = None
        self._set(known, "suspected" if is_silent else "up")
        return None

    def _judge_gone(self, writer: int, known: _Known, now: float) -> float | None:
        if known.state != "retired":
            self._set(known, "retired")
            known.since = now
        assert known.since is not None
        if now < known.since + FORGET_AFTER:
            return known.since + FORGET_AFTER
        self._forget(writer)
        return None

    def _is_replaced(self, record: Record, reached: set[int]) -> bool:
        """Whether the same agent is up as another writer."""
        return any(
            self._known[writer].record.agent == record.agent
            and self._known[writer].record.seq > record.seq
            for writer in reached
        )

    def _set(self, known: _Known, state: State) -> None:
        before, known.state = known.state, state
        known.was_up |= state == "up"
        if state == before:
            return
        record = known.record
        kinds: dict[State, type[MemberUp | MemberSuspected | MemberDown | MemberRetired]] = {
            "up": MemberUp,
            "suspected": MemberSuspected,
            "down": MemberDown,
            "retired": MemberRetired,
        }
        if before is None and state in ("down", "retired"):
            # It was over before we heard of it.
            return
        self._emit(kinds[state](record.agent, record.writer, record.role))

    def _find_complete(self, linked: Mapping[int, bool]) -> bool:
        up = {writer for writer, known in self._known.items() if known.state in ("up", "suspected")}
        if len(up) >= wire.NEIGHBOURS_MAX or not up <= linked.keys():
            return False
        for writer in up:
            around = set(self._known[writer].record.links)
            if not (up - {writer}) <= around:
                return False
        return True


def _mix(record: Record) -> int:
    """A record's share of the fingerprint. Who is gone has none: each forgets it in its own time,
    and nobody is to be reminded of it."""
    return 0 if record.is_gone else mix(record.session, record.writer, record.order)


def rendezvous(subject: str, names: Collection[str]) -> str:
    """Which of *names* is the one for *subject*: the same for all who know the same names, and if
    it goes, only its subjects move (Thaler & Ravishankar, "A name-based mapping scheme for
    rendezvous", 1996)."""

    def weight(name: str) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{subject}\0{name}".encode(), digest_size=8).digest(), name

    return max(names, key=weight)
