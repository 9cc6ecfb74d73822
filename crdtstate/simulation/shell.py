"""
A replica in virtual time: the shell around the sync core, without sockets, threads and clocks.

It is the twin of `replica.Replica`, step by step: writes wake the pump, which seals them, feeds
the core, and carries out its effects in order. What differs is only who calls: a schedule in
place of an event loop, a simulated disk and network in place of real ones.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from crdtstate import sync, wire
from crdtstate.change import Change, Snapshot, decode_change
from crdtstate.comparing import Inquiry
from crdtstate.config import Config
from crdtstate.consistency import Confirmation, StrongRead, StrongWrite
from crdtstate.document import Document
from crdtstate.documents import DocumentSet
from crdtstate.errors import ReplicaClosed
from crdtstate.events import Event, IdentityRollback
from crdtstate.identity import draw_writer, may_keep_writer
from crdtstate.simulation.disk import Disk
from crdtstate.simulation.network import End, Network
from crdtstate.simulation.schedule import Schedule
from crdtstate.stores import Entry, Saved

if TYPE_CHECKING:
    from crdtstate.simulation.oracle import Oracle

Machine = Confirmation | StrongRead | StrongWrite

EPOCH_MS = 1_700_000_000_000
"""The wall time at the beginning of every simulation."""


@dataclass(eq=False)
class Host:
    """A machine with a disk and a clock, on which one replica at a time runs."""

    index: int
    name: str
    role: Literal["agent", "relay"]
    disk: Disk
    rng: random.Random
    # Where it can be dialled, if it can, and whom it is told to dial.
    address: str | None = None
    # How far its wall clock is ahead, in seconds.
    skew: float = 0.0
    replica: SimulatedReplica | None = None
    seeds: list[str] = field(default_factory=list)


class SimulatedReplica(DocumentSet):
    """A set of replicated documents on a simulated host.

    Read and write as with `Replica`; the time is that of the simulation. After a crash it is
    closed for good: take the host's new replica from the simulation.

    Args:
        host: Where it runs.
        config: Settings.
        schedule: The time.
        network: The network.
        oracle: Watches everything that is written and taken in.
        on_event: Told of events.
        loan: The writer of the relay that lends this one's, and the terms; it keeps nothing.
    """

    def __init__(
        self,
        host: Host,
        config: Config,
        schedule: Schedule,
        network: Network,
        oracle: Oracle,
        on_event: Callable[[SimulatedReplica, Event], None],
        loan: tuple[int, wire.Lend] | None = None,
    ) -> None:
        self.host = host
        self._loan = loan
        # See `Replica`: its borrowed writer is not to be written under now.
        self.is_between_loans = loan is not None
        self.index = host.index
        self.rng = random.Random(host.rng.getrandbits(64))
        super().__init__(host.name, draw_writer(self.rng), self._wall_ms)
        self.config = config
        # The process: see `schedule.Process`.
        self.is_alive = True
        self.busy_until = 0.0
        self._schedule = schedule
        self._network = network
        self._oracle = oracle
        self._on_event = on_event
        self._disk = host.disk
        self._session = self.rng.getrandbits(64)
        self._links: dict[int, End] = {}
        self._peers = 0
        # Machines of `consistency` that run, and what to call when each is done.
        self._machines: list[tuple[Machine, Callable[[], None]]] = []
        # Ends for which something waits, in order.
        self._unsent: dict[int, End] = {}
        self._is_awake = False
        self._is_pumping = False
        self._armed_at: float | None = None
        self._tickets: deque[tuple[int, int]] = deque()
        self._unsynced: deque[tuple[int, int]] = deque()
        self._base: dict[str, int] = {}
        self._recover()

    def _wall_ms(self) -> int:
        return EPOCH_MS + int((self._schedule.now + self.host.skew) * 1000)

    def _recover(self) -> None:
        disk = self._disk
        disk.attach(lambda delay, call: self._schedule.call_later(delay, self, call))
        session = disk.session
        if session.writer is not None and may_keep_writer(session):
            self._writer = session.writer
        if self._loan is not None:
            self._writer = self._loan[1].writer
        for item in disk.load():
            self._load(item)
        now = self._schedule.now
        seeds = self.host.seeds
        self.core = sync.Sync(self, self._hello(), self.config, self.rng, now, seeds)
        self.core.former.update(session.writers - {self._writer})
        for name, version in self.versions():
            self._base[name] = version.get(self._writer, 0)
            self.core.restore(name, version, disk.floor(name), disk.size(name))
            self.resume_clock(self._documents[name])
        if self._loan is not None:
            self.core.borrow(self._loan[0], self._loan[1].seqs)
        disk.start(self.agent, self._writer, self._wake)
        self._oracle.started(self)
        self._wake()

    def _load(self, item: Saved | Entry, only: Document | None = None) -> None:
        if isinstance(item, Saved):
            snapshot = Snapshot.decode(item.data)
            document = only or self.find_or_make(item.document, snapshot.shared)
            document.join(snapshot)
            return
        change = decode_change(item.data)
        document = only or self.find_or_make(item.document, change.shared)
        if not document.version.covers(change.dot):
            self._oracle.expect(
                document.is_ready(change), "I3", f"{change!r} lies before what it builds on"
            )
            document.apply(change)

    def _hello(self) -> wire.Hello:
        low, high = wire.PROTOCOL_MIN, wire.PROTOCOL_MAX
        return wire.Hello(
            low,
            high,
            self._writer,
            self._session,
            self.agent,
            self.host.role,
            self.host.address,
            is_durable=self._loan is None,
        )

    def _check_usable(self) -> None:
        if not self.is_alive:
            raise ReplicaClosed(f"{self.agent}: crashed; after restart() take it anew")

    def _on_write(self, document: Document) -> None:
        if self.is_between_loans:
            raise ReplicaClosed(f"{self.agent}: its leased writer is not to be written under now")
        super()._on_write(document)

    def _make(self, name: str, shared: bool) -> Document:
        document = self._oracle.make_document(
            self, name, shared, self._clock, self._wall, self._on_write
        )
        self._documents[name] = document
        return document

    # Looking

    @property
    def writer(self) -> int:
        """Whose lane this replica writes."""
        return self._writer

    @property
    def disk(self) -> Disk:
        """The disk it writes to."""
        return self._disk

    def busy_with(self) -> list[str]:
        """What waits here: to be sealed, committed, tidied or adopted."""
        waits = {
            "writes": self._open,
            "commits": self._tickets,
            "adoptions": self.core.peers and self.core.unadopted(),
            "tidying": any(document.needs_tidying for document in self._documents.values()),
        }
        return [what for what, there_is in waits.items() if there_is]

    def loads(self) -> Iterator[tuple[str, int, int]]:
        """What may pile up: (name, size, limit)."""
        yield from self.core.loads()

    def __repr__(self) -> str:
        state = f"{len(self.core.peers)} peers" if self.is_alive else "crashed"
        return f"<SimulatedReplica {self.agent} {state}>"

    # The pump; see Replica

    def _written(self) -> None:
        if self._sealed:
            self.core.local_changes((c for c, _ in self._hand_over()), self._schedule.now)
        self._wake()

    def _wake(self) -> None:
        if not self._is_awake and self.is_alive:
            self._is_awake = True
            self._schedule.call_at(self._schedule.now, self, self.pump)

    def pump(self) -> None:
        """Seal what was written, let the core decide, do what it says."""
        self._is_awake = False
        if self._is_pumping or not self.is_alive:
            return
        self._is_pumping = True
        if self._open and not self._tickets and self._transaction is None:
            self._seal_open()
        self._note_commits()
        effects = self.core.effects()
        while True:
            self._carry_out(effects)
            self._note_commits()
            self._poll_machines()
            if not (effects := self.core.effects()):
                break
        self._arm_timer()
        self._is_pumping = False
        unsent, self._unsent = self._unsent, {}
        for end in unsent.values():
            if end.is_open:
                self._network.flush(end)
        self._arm_timer()
        self._oracle.pumped(self)

    def _carry_out(self, effects: list[sync.Effect]) -> None:
        batch: list[tuple[int, Change]] = []
        for effect in effects:
            match effect:
                case sync.Transmit(peer):
                    if (end := self._links.get(peer)) is not None:
                        self._unsent[peer] = end
                case sync.Persist(number, change):
                    batch.append((number, change))
                case sync.SaveSnapshot():
                    self._append(batch)
                    batch = []
                    self._save(effect)
                case sync.Delivered(document, change, _, agent):
                    self._oracle.delivered(self, document, change, agent)
                case sync.Fetch(peer, name, ranges):
                    limit, size = int(self.config.answer_bytes), self._disk.measure(name, ranges)
                    now = self._schedule.now
                    if not self.core.snapshot_instead(peer, name, size, now):
                        self.core.fetched(peer, *self._disk.read(name, ranges, limit))
                case sync.Dial(url):
                    self._network.dial(self, url)
                case sync.HangUp(peer, code, reason):
                    self._hang_up(peer, code, reason)
                case sync.Emit(event):
                    self._oracle.heard(self, event)
                    self._on_event(self, event)
                case sync.Hurry():
                    self._disk.hurry()
                case sync.Rebuild(name):
                    self._append(batch)
                    batch = []
                    self._rebuild(name)
                case sync.Reidentify(reason):
                    self._append(batch)
                    self._reidentify(reason)
                    return
        self._append(batch)

    def compare(self, peers: int = 2) -> Inquiry:
        """Begin to compare with others; see `Replica.compare`."""
        inquiry = self.core.comparing.begin(peers, self._schedule.now)
        self.pump()
        return inquiry

    def begin_loan(self) -> bool:
        """Whether it may write from now on: all that was written under its writer is here."""
        if self.is_between_loans and self.core.has_borrowed_all():
            self.is_between_loans = False
        return not self.is_between_loans

    def give_back(self) -> bool:
        """Hand the borrowed writer back, if its lender has everything."""
        self.is_between_loans = self.core.give_back()
        self.pump()
        return self.is_between_loans

    def start(self, machine: Machine, on_done: Callable[[], None]) -> None:
        """Let a machine of `consistency` run; *on_done* is called when it is done."""
        self._machines.append((machine, on_done))
        self._poll_machines()
        self._wake()

    def stop_machine(self, machine: Machine) -> None:
        """Its time is up."""
        self._machines = [each for each in self._machines if each[0] is not machine]
        machine.close()

    def _poll_machines(self) -> None:
        for machine, on_done in list(self._machines):
            if machine.poll(self._schedule.now):
                self.stop_machine(machine)
                on_done()

    def _append(self, batch: list[tuple[int, Change]]) -> None:
        if batch:
            entries = [Entry(c.document, c.writer, c.seq, c.data) for _, c in batch]
            self._tickets.append((self._disk.append(entries), batch[-1][0]))

    def _save(self, effect: sync.SaveSnapshot) -> None:
        self._oracle.saved(self, effect.document, effect.version)
        saved = Saved(effect.document, effect.version, effect.data)
        self._disk.compact(saved, int(self.config.log_bytes))
        own = effect.version.get(self._writer, 0)
        self._base[effect.document] = max(own, self._base.get(effect.document, 0))
        self._tickets.append((self._disk.append(()), effect.number))
        self.core.compacted(effect.document, self._disk.floor(effect.document))

    def _note_commits(self) -> None:
        ticket = number = 0
        while self._tickets and self._tickets[0][0] <= self._disk.committed:
            ticket, number = self._tickets.popleft()
        if number:
            self._unsynced.append((ticket, number))
            self.core.committed(number, self._schedule.now)
            self._oracle.committed(self)
        number = 0
        while self._unsynced and self._unsynced[0][0] <= self._disk.synced:
            number = self._unsynced.popleft()[1]
        if number:
            self.core.synced(number, self._schedule.now)

    def _arm_timer(self) -> None:
        at = self.core.next_deadline()
        if self._open and self._tickets:
            at = min(at, self._schedule.now + self.config.seal_delay)
        if self._armed_at is None or at < self._armed_at:
            self._armed_at = at
            self._schedule.call_at(max(at, self._schedule.now), self, self._tick, at)

    def _tick(self, at: float) -> None:
        if at != self._armed_at:
            return
        self._armed_at = None
        now = self._schedule.now
        if now >= self.core.next_deadline():
            self.core.tick(now)
        elif self._transaction is None:
            self._seal_open()
        self.pump()

    def _rebuild(self, name: str) -> None:
        document = self._documents[name]
        self.reload(document, self._writer, self._load_document)
        self._oracle.reloaded(self, name)
        self.core.rebuilt(name, self._schedule.now)
        self._wake()

    def _load_document(self, document: Document) -> None:
        for item in self._disk.load():
            if item.document == document.name:
                self._load(item, document)

    def _reidentify(self, reason: str) -> None:
        old, new = self._writer, draw_writer(self.rng)
        self._oracle.reidentified(self, reason)
        for name, seq in self.core.own_acked.items():
            self._base[name] = max(seq, self._base.get(name, 0))
        self._tickets.clear()
        self._unsynced.clear()
        self._disk.forget(old, self._base)
        self._disk.start(self.agent, new, self._wake)
        self._writer = new
        self._base = {}
        self.core.reidentified(self._hello(), self._schedule.now)

        def load(document: Document) -> None:
            self._load_document(document)
            name, disk = document.name, self._disk
            self.core.restore(name, document.version, disk.floor(name), disk.size(name))

        for document in list(self._documents.values()):
            self.reload(document, new, load)
        for name in self.documents():
            self._oracle.reloaded(self, name)
        self._on_event(self, IdentityRollback(old, new, reason))
        self._wake()

    # Connections

    def next_peer(self) -> int:
        """A new number for a connection."""
        self._peers += 1
        return self._peers

    def connected(self, end: End, url: str | None) -> None:
        """A connection stands, made by dialling *url* if that is given."""
        self._links[end.peer] = end
        self.core.peer_up(end.peer, self._schedule.now, url=url)
        self.pump()

    def dial_failed(self, url: str) -> None:
        """Nobody answered."""
        self.core.dial_failed(url, self._schedule.now)
        self.pump()

    def disconnected(self, end: End, reason: str) -> None:
        """A connection is gone."""
        if self._links.pop(end.peer, None) is not None:
            self.core.peer_down(end.peer, self._schedule.now, reason)
            self.pump()

    def receive(self, end: End, frames: list[wire.Frame]) -> None:
        """A message arrived."""
        for frame in frames:
            self.core.receive(end.peer, frame, self._schedule.now)
        self.pump()

    def _hang_up(self, peer: int, code: wire.ByeCode, reason: str) -> None:
        end = self._links.get(peer)
        if end is not None and end.ending is None:
            end.ending = (code, reason)
            self._unsent[peer] = end
            if end.clogged_until > self._schedule.now:
                self._network.close(end)

    # Ending

    def close(self) -> None:
        """Save, say goodbye and stop."""
        self.pump()
        self.core.leave(self._schedule.now)
        self.pump()
        self._disk.close()
        self.stop()

    def stop(self) -> None:
        """The process is dead: nothing of it happens any more."""
        self.is_alive = False
        self._close_documents()
