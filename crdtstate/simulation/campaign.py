"""
Campaigns: many short histories, each as nasty as chance can make it.

A seed decides on a fleet and its network, on tight limits, on who writes what when, and on what
goes wrong: connections that flap or lead nowhere, partitions, kills, power cuts (of all at once,
and right after a commit, which chance alone would hardly ever hit), slow peers, stalls, slow disks,
clocks that jump, engines that fail. Meanwhile some read and write strongly, or have writes
confirmed, and others come for a moment with a writer that a relay lends. Then everything is
repaired, and the fleet must become equal, all must see all up, and the strong operations must have
been linearizable. The oracle watches throughout.
``run_seed(seed)`` shows again what a seed showed.
"""

from __future__ import annotations

import hashlib
import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from crdtstate import comparing as comparing_module
from crdtstate import digests as digests_module
from crdtstate import document as document_module
from crdtstate import lanes as lanes_module
from crdtstate import serving as serving_module
from crdtstate import transfer as transfer_module
from crdtstate import wire as wire_module
from crdtstate.clock import Dot, Version
from crdtstate.config import Config
from crdtstate.consistency import Confirm, Confirmation, Receipt, StrongRead, StrongWrite
from crdtstate.document import Document
from crdtstate.simulation.disk import Image
from crdtstate.simulation.linear import History, check
from crdtstate.simulation.network import Datagrams
from crdtstate.simulation.oracle import TOKENS, Violation
from crdtstate.simulation.shell import Machine, SimulatedReplica
from crdtstate.simulation.world import Simulation
from crdtstate.values import pack, unpack

CHANGES = 60
"""Writes of one seed, unless told otherwise."""

ACTIVE = 6.0
"""Seconds in which they are made, and things go wrong."""

SETTLING = 90.0
"""Seconds after which a repaired fleet must be equal."""

COPIES_MAX = 5
"""Times that a change may be sent to each replica, whatever goes wrong."""

FORMED = 4.0
FORMED_LARGE = 25.0
"""Seconds after which a mesh has found itself, in `_Calm`."""

LASTING = 15.0
"""Seconds within which a strong operation must end when nothing is wrong."""

COMPARING = (0.0, 0.0, 0.0, 0.0, 0.2)
"""How often replicas compare; in one seed of five they do."""

KEYS = ("a", "b", "c")

STRONG = "strong"
STRONG_VIEW = "mplan"
STRONG_KEYS = ("x", "y")
"""Where strong reads and writes go, and nothing else."""

SIZES = (3,) * 12 + (4,) * 9 + (5,) * 5 + (6,) * 3 + (8,)
"""Agents of a seed: mostly few, for faults to meet."""


class Failure(NamedTuple):
    """An invariant that did not hold; ``run_seed(seed)`` shows it again."""

    seed: int
    invariant: str
    detail: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a seed showed. Times are in seconds."""

    seed: int
    failure: Failure | None
    hosts: int
    changes: int
    copies: int
    sent_bytes: int
    delays: Sequence[float]
    last_delays: Sequence[float]
    trace: str


@dataclass(frozen=True, slots=True)
class CampaignReport:
    """What a campaign showed.

    Attributes:
        seeds: How many were run.
        failures: Invariants that did not hold.
        redundancy: Copies of a change sent beyond the one that each replica needs, per needed one.
        delivery_ms: Percentiles of the time from a write to its delivery at a replica,
        last_ms: and at the last one.
        bytes_per_change: All that was sent, by number of changes.
        trace: A hash of all histories.
    """

    seeds: int
    failures: list[Failure]
    redundancy: float
    delivery_ms: dict[str, float]
    last_ms: dict[str, float]
    bytes_per_change: float
    trace: str

    @classmethod
    def of(cls, outcomes: Iterable[Outcome]) -> CampaignReport:
        """Sum up what seeds showed, in the order of the seeds."""
        found = sorted(outcomes, key=lambda outcome: outcome.seed)
        trace = hashlib.blake2b("".join(o.trace for o in found).encode(), digest_size=16)
        needed = sum(o.changes * (o.hosts - 1) for o in found)
        changes = sum(o.changes for o in found)
        return cls(
            seeds=len(found),
            failures=[o.failure for o in found if o.failure],
            redundancy=round(sum(o.copies for o in found) / max(needed, 1) - 1, 4),
            delivery_ms=_percentiles([d for o in found for d in o.delays]),
            last_ms=_percentiles([d for o in found for d in o.last_delays]),
            bytes_per_change=round(sum(o.sent_bytes for o in found) / max(changes, 1), 1),
            trace=found[0].trace if len(found) == 1 else trace.hexdigest(),
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values, as `crdtstate simulate --json` prints them."""
        return {**asdict(self), "failures": [failure._asdict() for failure in self.failures]}


def run_campaign(
    seeds: Iterable[int],
    *,
    agents: int | None = None,
    changes: int = CHANGES,
    faults: bool = True,
) -> CampaignReport:
    """Run seeds, one after the other. For several processes, give `run_seed` to their ``map`` and
    the outcomes to `CampaignReport.of`."""
    return CampaignReport.of(
        run_seed(seed, agents=agents, changes=changes, faults=faults) for seed in seeds
    )


def run_seed(
    seed: int, *, agents: int | None = None, changes: int = CHANGES, faults: bool = True
) -> Outcome:
    """Run one history.

    Args:
        seed: Which.
        agents: How many; None leaves it to the seed.
        changes: How many writes.
        faults: Whether anything goes wrong, and limits are tight.
    """
    rng = random.Random(f"campaign {seed}")
    history = (_Nasty if faults else _Calm)(seed, rng, agents, changes)
    failure = None
    try:
        history.run()
    except Violation as exc:
        failure = Failure(seed, exc.invariant, exc.detail)
    except AssertionError as exc:
        # The core asserts its own invariants; their names come first, or last in parentheses.
        failure = Failure(seed, "assertion", f"at {history.sim.now:.3f} s: {exc}")
    except Exception as exc:
        where = traceback.extract_tb(exc.__traceback__)[-1]
        detail = f"at {history.sim.now:.3f} s: {exc!r} in {where.name}, line {where.lineno}"
        failure = Failure(seed, "crash", detail)
    sim = history.sim
    sim.end()
    oracle = sim.oracle
    return Outcome(
        seed,
        failure,
        len(sim.names),
        oracle.changes,
        oracle.copies,
        oracle.sent_bytes,
        oracle.delays,
        oracle.last_delays,
        sim.trace,
    )


class _History:
    """One seed's fleet and writers."""

    active = ACTIVE

    def __init__(
        self, seed: int, rng: random.Random, agents: int | None, changes: int, **options: Any
    ) -> None:
        self.rng = rng
        self.changes = changes
        # Strong reads and writes, in the order in which they began and ended.
        self.history = History()
        self._moments = 0
        # Voters that lost what they had promised to keep: then nothing strong is promised.
        self.forgetful: set[str] = set()
        self.sim = Simulation(seed, agents or self._draw_size(), **options)
        # Agents that came with a borrowed writer, and had to get everything.
        self.visits = 0
        self._tokens = dict.fromkeys(self.sim.names, 0)

    def _draw_size(self) -> int:
        return self.rng.choice(SIZES)

    def settle(self) -> None:
        try:
            self.sim.settle(SETTLING)
        except Violation:
            raise
        except AssertionError as exc:
            raise Violation("I1", f"no convergence: {exc}") from exc
        self._compare_views()
        oracle = self.sim.oracle
        copies, changes = oracle.copies, oracle.changes
        limit = COPIES_MAX * changes * (len(self.sim.names) - 1 + self.visits) + 200
        oracle.expect(copies <= limit, "I6", f"{copies} copies of {changes} changes")
        for replica in self.sim.replicas:
            self.sim.oracle.check_leftovers(replica)

    # Strong reads and writes, and write concern

    def schedule_strong(self, count: int) -> None:
        """Let agents read and write strongly, and wait for confirmations."""
        for number in range(count):
            name, at = self.rng.choice(self.sim.names), self.rng.uniform(0.5, self.active)
            act = self.rng.choice((self.read, self.write_strongly, self.confirm))
            self.sim.at(at, partial(act, name, number))

    def _moment(self) -> float:
        """The place of what happens now among all that happens."""
        self._moments += 1
        return float(self._moments)

    def _free(self, name: str) -> SimulatedReplica | None:
        replica = self.sim.up(name)
        return None if replica is None or replica.busy_until > self.sim.now else replica

    def read(self, name: str, number: int) -> None:
        """Read a key strongly."""
        if (replica := self._free(name)) is None:
            return
        key = STRONG_KEYS[number % len(STRONG_KEYS)]
        voters = self.sim.config.voters
        document = replica.document(STRONG)
        machine = StrongRead(replica.core, document, STRONG_VIEW, key, voters, self.sim.now)
        call = self.history.call(name, "read", key, None, self._moment())

        def done() -> None:
            value = None if machine.value is None else unpack(machine.value)
            self.history.returned(call, value, self._moment())

        self._start(replica, machine, done)

    def write_strongly(self, name: str, number: int) -> None:
        """Write a key strongly; no value twice."""
        if (replica := self._free(name)) is None:
            return
        key = STRONG_KEYS[number % len(STRONG_KEYS)]
        voters = self.sim.config.voters
        document = replica.document(STRONG)
        machine = StrongWrite(replica.core, document, STRONG_VIEW, key, voters, self.sim.now)
        machine.value = pack(number, "a number")
        call = self.history.call(name, "write", key, number, self._moment())
        self._start(replica, machine, lambda: self.history.returned(call, number, self._moment()))

    def confirm(self, name: str, number: int) -> None:
        """Write something, and have it confirmed by a majority, on disk (I13)."""
        if (replica := self._free(name)) is None:
            return
        document = replica.document("main")
        if document.is_broken:
            # What is written now has no dot yet.
            return
        document.map("plan")[self.rng.choice(KEYS)] = number
        replica.seal_now(document)
        dot = Dot(replica.writer, document.version.get(replica.writer, 0))
        versions = {"main": Version([dot])}
        confirm, voters = Confirm.majority(durable=True), self.sim.config.voters
        machine = Confirmation(replica.core, confirm, versions, voters, self.sim.now)
        self._start(replica, machine, lambda: self._check_receipt(machine.receipt, dot))

    def _check_receipt(self, receipt: Receipt, dot: Dot) -> None:
        for name in receipt.by:
            kept = self.sim.synced_version(name, "main")
            if name not in self.forgetful:
                detail = f"{name} confirmed {dot.writer:x}:{dot.seq} and has synced {kept}"
                self.sim.oracle.expect(kept.covers(dot), "I13", detail)

    def _start(
        self, replica: SimulatedReplica, machine: Machine, on_done: Callable[[], None]
    ) -> None:
        def expire() -> None:
            if replica.is_alive:
                replica.stop_machine(machine)

        patience = LASTING if self.sim.now >= self.active else self.rng.choice((0.5, 3.0, 10.0))
        self.sim.at(self.sim.now + patience, expire)
        replica.start(machine, on_done)

    def check_strong(self) -> None:
        """Strong reads and writes are linearizable (I12), and go on once all is repaired."""
        before = len(self.history.operations())
        for number, name in enumerate(self.sim.names[:2]):
            self.read(name, number)
            self.write_strongly(name, 1000 + number)
        self.sim.run(LASTING)
        if not self.forgetful:
            for operation in self.history.operations()[before:]:
                lasting = operation.returned is not None
                self.sim.oracle.expect(lasting, "I12", f"{operation} does not end")
            anomaly = check(self.history.operations())
            self.sim.oracle.expect(anomaly is None, "I12", str(anomaly))

    def check_members(self) -> None:
        """When nothing is wrong, everybody sees everybody up, and nobody else (I14)."""
        writers = {replica.writer for replica in self.sim.replicas}

        def has_all(replica: SimulatedReplica) -> bool:
            members = replica.core.mesh.members.members()
            return {m.writer for m in members if m.state in ("up", "suspected")} == writers

        try:
            self.sim.until(lambda: all(map(has_all, self.sim.replicas)), LASTING)
        except Violation:
            raise
        except AssertionError:
            for replica in self.sim.replicas:
                seen = {m.agent: m.state for m in replica.core.mesh.members.members()}
                lacks = not has_all(replica)
                self.sim.oracle.expect(not lacks, "I14", f"{replica.agent} sees {seen}")

    def _compare_views(self) -> None:
        """What users read must be the same everywhere."""
        first, *others = self.sim.replicas
        wanted = _views(first)
        for other in others:
            found = _views(other)
            if found != wanted:
                detail = f"{first.agent} reads {wanted}, {other.agent} {found}"
                raise Violation("I1", detail)

    # Writing

    def schedule_writes(self) -> None:
        left = self.changes
        while left > 0:
            at = self.rng.uniform(0.05, self.active)
            burst = min(left, self.rng.choice((1, 1, 1, 2, 3, 5)))
            name = self.rng.choice(self.sim.names)
            self.sim.at(at, partial(self.write, name, burst))
            left -= burst

    def write(self, name: str, count: int) -> None:
        """Let an agent write, if it is up and not stalled."""
        replica = self.sim.up(name)
        if replica is None or replica.busy_until > self.sim.now:
            return
        if self.rng.random() < 0.1:
            self._transact(replica, count)
            return
        for _ in range(count):
            self._write(replica)
        if self.rng.random() < 0.15 and name in self._tokens:
            self._give_token(replica)

    def _transact(self, replica: SimulatedReplica, count: int) -> None:
        fails = self.rng.random() < 0.3
        try:
            with replica.transaction(message="why"):
                for _ in range(count + 1):
                    self._write(replica)
                if fails:
                    raise _Undo
        except _Undo:
            pass

    def _write(self, replica: SimulatedReplica) -> None:
        rng = self.rng
        document = replica.document("main" if rng.random() < 0.8 else "tasks")
        value = rng.randrange(1000)
        match rng.randrange(12):
            case 0 | 1 | 2 | 3:
                document.map("plan")[rng.choice(KEYS)] = value
            case 4 | 5:
                document.map("plan").pop(rng.choice(KEYS), None)
            case 6 | 7:
                document.counter("tokens").increment(rng.randint(-5, 9))
            case 8:
                document.set("skills").add(rng.choice(KEYS))
            case 9:
                document.set("skills").discard(rng.choice(KEYS))
            case 10:
                self._write_register(document, value)
            case _:
                plan = document.map("plan")
                for key in plan.conflicts():
                    plan.resolve(key, value)

    def _write_register(self, document: Document, value: int) -> None:
        if value % 4:
            document.register("leader").value = value
        else:
            document.register("leader").clear()

    def _give_token(self, replica: SimulatedReplica) -> None:
        """Write something, and let another replica wait for the token of it (I10)."""
        name = replica.agent
        self._tokens[name] += 1
        replica.map(TOKENS)[name] = self._tokens[name]
        other = self.rng.choice([n for n in self.sim.names if n != name] or [name])
        self.sim.oracle.wait_for(self.sim.index(other), name, self._tokens[name], replica.version())

    # Guests

    def schedule_visits(self, rng: random.Random) -> None:
        """Let agents come and go that borrow a writer: they write a little, and hand it back,
        unless they are killed or lose patience. Then nobody may write under it again (`leases`)."""
        for guest in self.sim.guests:
            at = rng.uniform(0.2, 2.0)
            self.sim.at(at, partial(self._visit, rng, guest))

    def _visit(self, rng: random.Random, guest: str) -> None:
        again = self.sim.now + rng.choice((0.1, 1.0)) * rng.random()
        if again > self.active:
            return
        relays = [each for each in self.sim.names if each.startswith("relay") and self._free(each)]
        if not relays:
            self.sim.at(again, partial(self._visit, rng, guest))
            return
        loan = self.sim.lend(rng.choice(relays))
        self.sim.at(again, partial(self._begin_visit, rng, guest, *loan))

    def _begin_visit(
        self, rng: random.Random, guest: str, lender: int, terms: wire_module.Lend
    ) -> None:
        self.visits += 1
        replica = self.sim.visit(guest, lender, terms)
        until = self.sim.now + rng.choice((0.1, 0.5, 2.0))
        patience = until + rng.choice((0.1, 1.0, LASTING))
        goes_back = rng.random() < 0.8

        def look() -> None:
            if self.sim.up(guest) is not replica:
                return
            now = self.sim.now
            if now < until:
                if replica.begin_loan() and rng.random() < 0.5:
                    self.write(guest, rng.choice((1, 2, 5)))
            elif not goes_back or now >= patience or replica.give_back():
                self.sim.end_visit(guest, in_order=rng.random() < 0.5)
                self._visit(rng, guest)
                return
            self.sim.at(now + rng.uniform(0.01, 0.2), look)

        look()


class _Undo(Exception):
    """Ends a transaction that is to be undone."""


class _Calm(_History):
    """Nothing goes wrong: for measuring."""

    def __init__(self, seed: int, rng: random.Random, agents: int | None, changes: int) -> None:
        super().__init__(seed, rng, agents, changes)
        self.active = max(ACTIVE, changes / 20)

    def run(self) -> None:
        begin = FORMED if len(self.sim.names) <= self.sim.config.mesh_max else FORMED_LARGE
        self.sim.run(begin)
        # What it took to find each other is not part of the changes' cost.
        self.sim.oracle.sent_bytes = 0
        for _ in range(self.changes):
            at = begin + self.rng.uniform(0.0, self.active)
            name = self.rng.choice(self.sim.names)
            self.sim.at(at, partial(self.write, name, 1))
        self.sim.run(self.active)
        self.settle()


class _Nasty(_History):
    """Everything goes wrong that can."""

    def __init__(self, seed: int, rng: random.Random, agents: int | None, changes: int) -> None:
        self.rng = rng
        agents = agents or self._draw_size()
        relays = rng.choice((0, 0, 0, 1, 2))
        names = [f"relay-{i}" for i in range(relays)] or [f"agent-{i}" for i in range(agents)]
        options: dict[str, Any] = {
            "latency": rng.choice(((0.0005, 0.003), (0.01, 0.05), (0.01, 0.2))),
            "relays": relays,
            "seeds": rng.choice((None, None, 1, 2)),
            "skew": rng.choice((0.0, 0.5, 100.0)),
            "durability": rng.choice(("process", "process", "power")),
            "config": replace(
                _draw_config(rng),
                voters=tuple(rng.sample(names, min(3, len(names)))),
                # By chance of its own: in most, where nobody compares, everything is as it was.
                compare_interval=random.Random(f"comparing {seed}").choice(COMPARING),
            ),
        }
        if rng.random() < 0.35:
            options["loss"] = rng.choice((0.0, 0.02, 0.15))
            options["duplication"] = rng.choice((0.0, 0.1))
            options["reordering"] = rng.choice((0.0, 0.2))
        options["guests"] = 2 * relays
        super().__init__(seed, rng, agents, changes, **options)
        self.is_repaired = False
        self.backups: dict[str, Image] = {}
        self.snipes = rng.choice((0, 0, 1, 2))
        self.segment_slots = rng.choice((2, 3, 5, 1000))
        self.chunk_bytes = rng.choice((100, 400, 65536))

    def run(self) -> None:
        settled, bulk_bytes = self.rng.choice((1, 3, 8)), self.rng.choice((300, 2**20))
        worth = self.rng.choice((500, 2**20))
        with _tight(self.segment_slots, self.chunk_bytes, settled, bulk_bytes, worth):
            self.schedule_writes()
            self.schedule_strong(12)
            self.schedule_faults()
            self.schedule_visits(random.Random(f"visits {self.sim.seed}"))
            self.sim.oracle.on_commit = self._snipe
            self.sim.run(self.active)
            self.sim.oracle.on_commit = lambda replica: None
            self.repair()
            self.settle()
            self.check_strong()
            self.check_members()

    # Faults

    def schedule_faults(self) -> None:
        rng, at = self.rng, self.sim.at
        for fault, most in self._faults():
            for _ in range(rng.randrange(most + 1)):
                at(rng.uniform(0.3, self.active), fault)
        for _ in range(8):
            at(rng.uniform(0.3, self.active), self._look)

    def _faults(self) -> list[tuple[Callable[[], None], int]]:
        """What may go wrong, and how often at most."""
        return [
            (self._flap, 4),
            (self._swallow, 2),
            (self._part, 2),
            (self._crash, 4),
            (self._cut_power, 1),
            (self._slow_peer, 2),
            (self._stall, 2),
            (self._jump_clock, 1),
            (self._slow_disk, 1),
            (self._fail_engine, 1),
            (self._back_up, 1),
        ]

    def _look(self) -> None:
        """Hold somebody against the invariants, between two moments."""
        if replicas := self.sim.replicas:
            self.sim.oracle.check(self.rng.choice(replicas))

    def _pair(self) -> tuple[str, str]:
        one, two = self.rng.sample(self.sim.names, 2)
        return one, two

    def _flap(self) -> None:
        self.sim.break_links(*self._pair())

    def _swallow(self) -> None:
        """A black hole, sometimes in one direction only."""
        one, two = self._pair()
        self.sim.cut(one, two, silently=True, both=self.rng.random() < 0.5)
        self.sim.at(self.sim.now + self.rng.uniform(0.2, 6), self.sim.heal)

    def _part(self) -> None:
        names = self.sim.names
        self.rng.shuffle(names)
        size = self.rng.choice((1, len(names) // 2))
        self.sim.partition(set(names[:size]))
        self.sim.at(self.sim.now + self.rng.uniform(0.5, 6), self.sim.heal)

    def _crash(self) -> None:
        self._fell(self.rng.choice(self.sim.names), power=self.rng.random() < 0.3)

    def _fell(self, name: str, *, power: bool) -> None:
        """Crash a replica, often while it writes; have it up again later."""
        if self.sim.up(name) is None:
            return
        delay = 0.0
        if self.rng.random() < 0.6:
            self.write(name, 2)
            delay = self.rng.choice((0.0, 1e-9, 0.001, 0.004, 0.03))
        self.sim.at(self.sim.now + delay, lambda: self._crash_now(name, power))

    def _crash_now(self, name: str, power: bool) -> None:
        if self.sim.up(name) is None or self.is_repaired:
            return
        if not power and self.rng.random() < 0.2:
            self.sim.close(name)
        else:
            self.sim.crash(name, power=power)
        pause = self.rng.choice((0.001, 0.5, 2.0, 5.0)) * self.rng.random()
        self.sim.at(self.sim.now + pause, lambda: self._raise(name))

    def _raise(self, name: str) -> None:
        if self.sim.up(name) is not None:
            return
        if name in self.backups and self.rng.random() < 0.5:
            self.sim.put_back(name, self.backups.pop(name))
            self.forgetful.add(name)
        self.sim.restart(name)

    def _back_up(self) -> None:
        """Make a backup, perhaps to be used after a crash."""
        name = self.rng.choice(self.sim.names)
        self.backups[name] = self.sim.backup(name)

    def _cut_power(self) -> None:
        """All, or nearly all, at the same instant."""
        for name in self.sim.names:
            if self.sim.up(name) is not None and self.rng.random() < 0.9:
                self._crash_now(name, True)

    def _snipe(self, replica: SimulatedReplica) -> None:
        """Something was committed just now: this is when a crash hurts."""
        if not self.snipes or self.sim.now < 0.5 or self.rng.random() > 0.04:
            return
        self.snipes -= 1
        delay = self.rng.choice((1e-9, 0.002, 0.06))
        everybody = self.rng.random() < 0.5
        name = replica.agent
        self.sim.at(
            self.sim.now + delay,
            self._cut_power if everybody else lambda: self._crash_now(name, True),
        )

    def _slow_peer(self) -> None:
        self.sim.clog(*self._pair(), self.rng.uniform(0.5, 5))

    def _stall(self) -> None:
        if (replica := self.sim.up(self.rng.choice(self.sim.names))) is not None:
            self.sim.stall(replica.agent, self.rng.choice((0.3, 2.0, 8.0)))

    def _jump_clock(self) -> None:
        self.sim.jump_clock(self.rng.choice(self.sim.names), self.rng.choice((-3600, -1, 1, 3600)))

    def _slow_disk(self) -> None:
        self.sim.stall_disk(self.rng.choice(self.sim.names), self.rng.uniform(0.2, 3))

    def _fail_engine(self) -> None:
        if (replica := self.sim.up(self.rng.choice(self.sim.names))) is not None:
            self.sim.oracle.fail_engine(replica, self.rng.choice(("main", "tasks")))

    def repair(self) -> None:
        """End all that is wrong, but not always what happens to single messages."""
        self.is_repaired = True
        sim = self.sim
        sim.snooze()
        sim.heal()
        if self.rng.random() < 0.5:
            sim.datagrams = Datagrams()
        for name in sim.names:
            replica = sim.up(name)
            if replica is None:
                sim.restart(name)
                continue
            for document in replica.documents():
                sim.oracle.fail_engine(replica, document, False)
            if replica.core.has_quarantine:
                # What an engine failed on is tried again by the next process only.
                sim.close(name)
                sim.restart(name)


def _draw_config(rng: random.Random) -> Config:
    """Settings of which many are so tight that their bounds are met."""
    pick = rng.choice
    return Config(
        heartbeat=1.0,
        link_timeout=pick((3.0, 5.0)),
        seal_delay=pick((0.001, 0.02)),
        have_delay=pick((0.03, 0.2, 0.4)),
        mesh_max=pick((16, 16, 2, 4)),
        active_links=pick((2, 3, 6)),
        want_delay=pick((0.05, 0.3)),
        want_retry=pick((0.2, 1.0)),
        want_retry_max=pick((2.0, 5.0)),
        tidy_delay=pick((0.05, 0.5, 2.0)),
        answer_bytes=pick((200, 1000, 256 * 1024)),
        pending_changes=pick((2, 10, 10_000)),
        pending_bytes=pick((1000, 2**20)),
        snapshot_after_bytes=pick((200, 200, 1000, 2**20)),
        log_bytes=pick((1, 1, 500, 2**20)),
        outbox_bytes=pick((500, 4000, 2**20)),
        reconnect_max=pick((0.5, 2.0)),
    )


@contextmanager
def _tight(
    segment_slots: int, chunk_bytes: int, settled: int, bulk_bytes: int, worth: int
) -> Iterator[None]:
    """Make limits that only large fleets meet so small that a history meets them."""
    places: list[tuple[Any, str, int | float]] = [
        (lanes_module, "SEGMENT_SLOTS", segment_slots),
        (wire_module, "CHUNK_BYTES_MAX", chunk_bytes),
        (document_module, "SETTLED_PER_CHANGE", settled),
        (serving_module, "BULK_WINDOW", bulk_bytes),
        (serving_module, "SNAPSHOT_WORTH", worth),
        (transfer_module, "CHUNKS_AHEAD", 2),
        (transfer_module, "STALL", 1.0),
        (transfer_module, "DOWNLOADS_MAX", 1),
        (comparing_module, "PORTION", 3),
        (digests_module, "LEAF_MAX", 2),
    ]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, value in places:
        assert hasattr(module, name)
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _views(replica: SimulatedReplica) -> dict[str, Any]:
    """All that users can read."""
    found: dict[str, Any] = {}
    for name in ("main", "tasks"):
        document = replica.document(name)
        found[name] = (
            sorted(document.map("plan").items()),
            sorted(document.map("plan").conflicts()),
            document.counter("tokens").value,
            sorted(document.set("skills")),
            document.register("leader").value,
            sorted(document.map(TOKENS).items()),
        )
    return found


def _percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    if not ordered:
        return {"p50": 0.0, "p99": 0.0}
    return {
        f"p{share}": round(1000 * ordered[min(len(ordered) - 1, len(ordered) * share // 100)], 2)
        for share in (50, 99)
    }
