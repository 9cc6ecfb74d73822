"""
A fleet in virtual time: hosts, what runs on them, and what befalls them.

The replicas are made of the shipped parts, documents, sync core, wire format; only the outermost
shell is simulated: event loop, disks, network, clocks. All chance comes from one seed, so one seed
is one history, to the last bit: `Simulation.trace` names it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Iterator
from itertools import combinations
from struct import pack
from typing import Any, Literal

from crdtstate import wire
from crdtstate.clock import Version
from crdtstate.config import Config
from crdtstate.errors import UsageError
from crdtstate.events import Event
from crdtstate.simulation.diagram import Diagram, Moment, describe
from crdtstate.simulation.disk import Disk, Durability, Image
from crdtstate.simulation.network import Datagrams, Network
from crdtstate.simulation.oracle import Oracle
from crdtstate.simulation.schedule import Schedule
from crdtstate.simulation.shell import Host, SimulatedReplica

MUTUAL = 0.3
"""How many of the pairs in a mesh dial each other both; one of their connections stays."""

ALL_SEEDS = 1000
FEW_SEEDS = 3

STEP = 0.1
"""Seconds between two looks whether what is waited for has come."""


class Simulation:
    """A simulated fleet of agents, connected with each other or through relays.

    Every invariant of `oracle` is asserted while it runs.

    Args:
        seed: Everything that is left to chance follows from it.
        agents: How many: "agent-0", "agent-1", ...
        latency: Seconds that a message takes, least and most; each pair of hosts has its own.
        loss: How many of the messages are lost. With this or one of the next two, connections
            are harsher than any stream.
        duplication: How many of the messages arrive twice.
        reordering: How many of the messages are overtaken.
        skew: Wall clocks are wrong by at most so many seconds.
        relays: 0 lets all agents be dialled by all others; with more, they cannot be dialled and
            meet through so many relays ("relay-0", ...).
        guests: On so many more hosts ("guest-0", ...), which are in no list of `names`, agents
            come and go that borrow a writer from a relay: see `lend` and `visit`.
        seeds: How many of the others each is told of at the beginning; the rest it hears of from
            them. None: all, in a small mesh.
        config: Settings of all replicas.
        durability: As of `Replica`.
    """

    def __init__(
        self,
        seed: int = 0,
        agents: int = 5,
        *,
        latency: tuple[float, float] = (0.01, 0.05),
        loss: float = 0.0,
        duplication: float = 0.0,
        reordering: float = 0.0,
        skew: float = 0.0,
        relays: int = 0,
        guests: int = 0,
        seeds: int | None = None,
        config: Config | None = None,
        durability: Literal["process", "power"] = "process",
    ) -> None:
        if agents < 1 or relays < 0:
            raise UsageError("a simulation needs agents")
        if not 0 <= latency[0] <= latency[1]:
            raise UsageError(f"latency is (least, most) in seconds, not {latency!r}")
        if not all(0 <= share < 1 for share in (loss, duplication, reordering)):
            raise UsageError("loss, duplication and reordering are below 1")
        self.seed = seed
        self.config = config or Config()
        # What happened, for people: see `diagram`.
        self.events: list[Moment] = []
        self._rng = random.Random(f"crdtstate {seed}")
        self._schedule = Schedule()
        self._trace = hashlib.blake2b(digest_size=16)
        # Knows what must be true, and asserts it.
        self.oracle = Oracle(lambda: self._schedule.now, self._on_moment)
        self._network = Network(
            self._schedule,
            random.Random(self._rng.getrandbits(64)),
            latency,
            Datagrams(loss, duplication, reordering),
            self._replica_at,
            self._host_at,
            self._on_message,
        )
        self._hosts = list(self._make_hosts(agents, relays, skew, durability))
        self._by_name = {host.name: host for host in self._hosts}
        self.oracle.hosts = len(self._hosts)
        self._relays = relays
        for host in self._hosts:
            host.seeds = sorted(f"memory://{name}" for name in self._draw_seeds(host, seeds))
        for host in self._hosts:
            self._start(host)
        self._guests = list(self._make_guests(guests))

    def _make_hosts(
        self, agents: int, relays: int, skew: float, durability: Durability
    ) -> Iterator[Host]:
        for index in range(agents + relays):
            is_agent = index < agents
            rng = random.Random(self._rng.getrandbits(64))
            disk = Disk(durability, random.Random(rng.getrandbits(64)))
            name = f"agent-{index}" if is_agent else f"relay-{index - agents}"
            yield Host(
                index,
                name,
                "agent" if is_agent else "relay",
                disk,
                rng,
                f"memory://{name}" if not is_agent or not relays else None,
                rng.uniform(-skew, skew),
            )

    def _make_guests(self, guests: int) -> Iterator[Host]:
        # With chance of their own: without them, everything is as it would be.
        rng = random.Random(f"guests {self.seed}")
        for number in range(guests):
            own = random.Random(rng.getrandbits(64))
            disk = Disk("process", random.Random(own.getrandbits(64)))
            host = Host(len(self._hosts), f"guest-{number}", "agent", disk, own, None, 0.0)
            host.seeds = [
                each.address for each in self._hosts if each.role == "relay" and each.address
            ]
            self._hosts.append(host)
            self._by_name[host.name] = host
            yield host

    def _draw_seeds(self, host: Host, most: int | None) -> list[str]:
        """Whom a host is told of: so that nobody is left out, always some of those before it."""
        if most is None:
            most = ALL_SEEDS if len(self._hosts) <= self.config.mesh_max else FEW_SEEDS
        others = [other for other in self._hosts if other.address and other is not host]
        before = [other.name for other in others if other.index < host.index]
        after = [other.name for other in others if other.index > host.index]
        if host.role == "agent" and self._relays:
            return self._rng.sample(after, min(len(after), max(most, 1), 2))
        return [
            *self._rng.sample(before, min(len(before), max(most, 1))),
            *(name for name in after if most == ALL_SEEDS and self._rng.random() < MUTUAL),
        ]

    def _may_meet(self, one: Host, two: Host) -> bool:
        """Whether one of two hosts can dial the other."""
        return one.address is not None or two.address is not None

    def _pairs(self) -> Iterator[tuple[Host, Host]]:
        """The pairs of hosts that may be connected."""
        for one, two in combinations(self._hosts, 2):
            if self._may_meet(one, two):
                yield one, two

    # Looking

    @property
    def names(self) -> list[str]:
        """The names of all hosts: agents, then relays; not the guests'."""
        return [host.name for host in self._hosts if host not in self._guests]

    @property
    def guests(self) -> list[str]:
        """The names of the guests' hosts."""
        return [host.name for host in self._guests]

    @property
    def now(self) -> float:
        """Seconds since the simulation began."""
        return self._schedule.now

    def __getitem__(self, name: str) -> SimulatedReplica:
        """The replica that runs on a host now.

        Raises:
            UsageError: It has crashed, or there is no such host.
        """
        replica = self._host(name).replica
        if replica is None:
            raise UsageError(f"{name} is down; restart({name!r}) first")
        return replica

    def _host(self, name: str) -> Host:
        try:
            return self._by_name[name]
        except KeyError:
            raise UsageError(f"no {name!r} here; there are {', '.join(self.names)}") from None

    def _replica_at(self, index: int) -> SimulatedReplica | None:
        return self._hosts[index].replica

    def _host_at(self, url: str) -> int:
        return self._by_name[url.removeprefix("memory://")].index

    @property
    def replicas(self) -> list[SimulatedReplica]:
        """The replicas that run now."""
        return [host.replica for host in self._hosts if host.replica is not None]

    @property
    def trace(self) -> str:
        """A hash of everything that happened so far: equal seeds and calls, equal traces."""
        return self._trace.hexdigest()

    def diagram(self, since: float = 0.0, until: float | None = None) -> Diagram:
        """Who wrote and saw what when: text, or a picture in notebooks."""
        end = self.now if until is None else until
        moments = [moment for moment in self.events if since <= moment.at <= end]
        return Diagram(self.names, moments, since, end)

    def __repr__(self) -> str:
        up = len(self.replicas)
        return f"<Simulation seed {self.seed} {up}/{len(self._hosts)} hosts up at {self.now:.3f} s>"

    def up(self, name: str) -> SimulatedReplica | None:
        """The replica that runs on a host now, or None."""
        return self._host(name).replica

    def index(self, name: str) -> int:
        """The place of a host in `names`."""
        return self._host(name).index

    # Time

    def at(self, at: float, call: Callable[[], object]) -> None:
        """Call something at a time to come."""
        self._schedule.call_at(max(at, self.now), None, call)

    def run(self, seconds: float) -> None:
        """Let time pass."""
        self._schedule.run_until(self.now + seconds)

    def until(self, condition: Callable[[], bool], timeout: float = 60.0) -> None:
        """Let time pass until *condition* holds.

        Raises:
            AssertionError: It did not within *timeout* seconds.
        """
        end = self.now + timeout
        while not condition():
            if self.now >= end:
                raise AssertionError(f"it did not happen within {timeout} s")
            self.run(STEP)

    def settle(self, timeout: float = 60.0) -> None:
        """Let time pass until all replicas that can reach each other are equal and quiet.

        Raises:
            AssertionError: They are not within *timeout* seconds; names who lacks what.
        """
        end = self.now + timeout
        while lacking := self._find_lacking():
            if self.now >= end:
                raise AssertionError(f"not settled after {timeout} s: {'; '.join(lacking)}")
            self.run(STEP)
        for replica in self.replicas:
            self.oracle.check(replica)

    def _find_lacking(self) -> list[str]:
        """Who is not quiet, or lacks what somebody within reach has."""
        found = []
        for group in self._groups():
            whole: dict[str, Version] = {}
            for replica in group:
                if waiting := replica.busy_with():
                    found.append(f"{replica.agent} has {' and '.join(waiting)} to do")
                for name, version in replica.versions():
                    whole.setdefault(name, Version()).merge(version)
            found += [line for replica in group for line in self._lacks(replica, whole)]
        return found

    def _lacks(self, replica: SimulatedReplica, whole: dict[str, Version]) -> Iterator[str]:
        for name, version in whole.items():
            document = replica.find(name)
            here = document.version if document else Version()
            for writer, seq in version.items():
                have = here.get(writer, 0)
                if have < seq:
                    whose = self.oracle.agent_of(name, writer)
                    yield f"{replica.agent} lacks {whose}'s {have + 1} to {seq} of {name!r}"

    def _groups(self) -> list[list[SimulatedReplica]]:
        """The living replicas, by who can reach whom."""
        if not self._network.cuts():
            return [self.replicas]
        groups: dict[int, set[int]] = {r.index: {r.index} for r in self.replicas}
        for first, second in self._pairs():
            one, two = first.index, second.index
            is_cut = self._network.is_cut(one, two)
            if one in groups and two in groups and not is_cut and groups[one] is not groups[two]:
                groups[one] |= groups[two]
                for index in groups[one]:
                    groups[index] = groups[one]
        unique = {min(group): sorted(group) for group in groups.values()}
        replicas = {replica.index: replica for replica in self.replicas}
        return [[replicas[index] for index in group] for _, group in sorted(unique.items())]

    def assert_converged(self) -> None:
        """Assert that all replicas that run have the same content.

        Raises:
            AssertionError: They have not; says who differs where.
        """
        first, *others = self.replicas
        for other in others:
            for name in sorted({*first.documents(), *other.documents()}):
                one, two = first.find(name), other.find(name)
                here = one.lanes.canonical() if one else {}
                there = two.lanes.canonical() if two else {}
                differing = {p for p in here.keys() | there.keys() if here.get(p) != there.get(p)}
                assert not differing, (
                    f"{first.agent} and {other.agent} differ in {name!r} at "
                    f"{', '.join(sorted(map(describe, differing))[:5])}"
                )

    def end(self) -> None:
        """Let the memory of all replicas go. Nothing can happen any more."""
        for replica in self.replicas:
            replica.stop()

    # Faults

    def partition(self, *groups: Collection[str], silently: bool | None = None) -> None:
        """Cut each group of hosts off from all others; what no group names is one more.

        Args:
            silently: Connections across become black holes, or else break at once; None leaves
                it to chance.
        """
        place = {name: number for number, group in enumerate(groups, 1) for name in group}
        for name in place:
            self._host(name)
        for one, two in self._pairs():
            if place.get(one.name, 0) != place.get(two.name, 0):
                self.cut(one.name, two.name, silently=silently)
        self._note("partitioned", " | ".join(", ".join(sorted(group)) for group in groups))

    def cut(self, one: str, two: str, *, silently: bool | None = None, both: bool = True) -> None:
        """Cut two hosts off from each other, or without *both* only the second from what the
        first sends; see `partition`."""
        a, b = self._host(one).index, self._host(two).index
        if silently is None:
            silently = self._rng.random() < 0.5
        if not silently:
            for connection in self._network.between(a, b):
                self._network.break_off(connection)
        self._network.cut(a, b)
        if both:
            self._network.cut(b, a)

    def heal(self) -> None:
        """End all cuts."""
        cuts = self._network.cuts()
        for one, two in cuts:
            self._network.heal(one, two)
        if cuts:
            self._note("healed", "")

    def crash(self, name: str, *, power: bool = False) -> None:
        """Kill the replica on a host, or with *power* cut the host's power.

        A kill keeps what was committed, a power cut what was synced (with durability="power"
        that is the same); of the rest, as much as chance wants.
        """
        host = self._host(name)
        replica = self[name]
        self._moment(host, "power cut" if power else "crashed", None)
        self.oracle.crashed(host.index, host.disk.promised(power=power))
        replica.stop()
        host.replica = None
        self._network.fell_silent(replica, notice=not power)
        host.disk.crash(power=power)

    def close(self, name: str) -> None:
        """End the replica on a host in order."""
        host, replica = self._host(name), self[name]
        self._moment(host, "closed", None)
        replica.close()
        host.replica = None
        self.oracle.crashed(host.index, host.disk.promised(power=True))
        self._network.fell_silent(replica, notice=True)
        host.disk.crash(power=False)

    def backup(self, name: str) -> Image:
        """A copy of what is certainly on a host's disk now; see `put_back`."""
        return self._host(name).disk.backup()

    def synced_version(self, name: str, document: str) -> Version:
        """What of a document is on a host's disk for good, whatever happens."""
        return self._host(name).disk.promised(power=True).get(document, Version())

    def put_back(self, name: str, backup: Image, *, unnoticed: bool = False) -> None:
        """Put a backup on the disk of a host that is down: as another file, or *unnoticed*, as
        rolling back a virtual machine does."""
        host = self._host(name)
        if host.replica is not None:
            raise UsageError(f"{name} is running; crash it first")
        self.oracle.rolled_back(host.index, unnoticed=unnoticed)
        host.disk.put_back(backup, unnoticed=unnoticed)

    def restart(self, name: str) -> SimulatedReplica:
        """Start a replica on a host again; return it."""
        host = self._host(name)
        if host.replica is not None:
            raise UsageError(f"{name} is running")
        replica = self._start(host)
        self._network.reset_stale(host.index)
        return replica

    def lend(self, name: str) -> tuple[int, wire.Lend]:
        """Let a relay lend a writer to a visitor; return the relay's writer, and the terms."""
        relay, now = self[name], self.now
        low, high = wire.PROTOCOL_MIN, wire.PROTOCOL_MAX
        hello = wire.Hello(low, high, 1, 1, "visitor", "agent", documents=())
        peer = relay.next_peer()
        relay.core.peer_up(peer, now, url=None)
        for frame in (hello, wire.Borrow()):
            relay.core.receive(peer, frame, now)
        (terms,) = (
            frame
            for frame in wire.decode_message(wire.encode_message(relay.core.take(peer)))
            if isinstance(frame, wire.Lend)
        )
        relay.core.peer_down(peer, now)
        relay.pump()
        return relay.writer, terms

    def visit(self, name: str, lender: int, terms: wire.Lend) -> SimulatedReplica:
        """Start an agent without a store on a guest's host, under a writer that was lent."""
        host = self._host(name)
        if host.replica is not None:
            raise UsageError(f"{name} is running")
        host.disk = Disk("process", random.Random(host.rng.getrandbits(64)))
        replica = self._start(host, (lender, terms))
        self._network.reset_stale(host.index)
        return replica

    def end_visit(self, name: str, *, in_order: bool) -> None:
        """End the agent on a guest's host, in order or by a kill; what only it has is lost."""
        host, replica = self._host(name), self[name]
        self._moment(host, "closed" if in_order else "crashed", None)
        if in_order:
            replica.close()
        else:
            replica.stop()
        host.replica = None
        self.oracle.crashed(host.index, {})
        self._network.fell_silent(replica, notice=True)

    def stall(self, name: str, seconds: float) -> None:
        """Let a replica's event loop do nothing for a while."""
        replica = self[name]
        replica.busy_until = max(replica.busy_until, self.now + seconds)

    def stall_disk(self, name: str, seconds: float) -> None:
        """Let a host's disk commit nothing for a while."""
        until = self.now + seconds
        self._host(name).disk.stall(until, lambda: self.now)

    def snooze(self) -> None:
        """End all stalls."""
        for replica in self.replicas:
            replica.busy_until = self.now

    @property
    def datagrams(self) -> Datagrams:
        """What happens to single messages."""
        return self._network.datagrams

    @datagrams.setter
    def datagrams(self, datagrams: Datagrams) -> None:
        self._network.datagrams = datagrams

    def jump_clock(self, name: str, seconds: float) -> None:
        """Set a host's wall clock forward, or back."""
        self._host(name).skew += seconds

    def clog(self, name: str, other: str, seconds: float) -> None:
        """Let *other* read nothing of what *name* sends for a while."""
        here, there = self._host(name).index, self._host(other).index
        for connection in self._network.between(here, there):
            for end in connection.ends:
                if end.replica.index == here:
                    self._network.clog(end, self.now + seconds)

    def break_links(self, name: str, other: str) -> None:
        """Break the connections between two hosts; they are made anew."""
        here, there = self._host(name).index, self._host(other).index
        for connection in self._network.between(here, there):
            self._network.break_off(connection)

    def _start(self, host: Host, loan: tuple[int, wire.Lend] | None = None) -> SimulatedReplica:
        if self.now or host.disk.documents():
            self._moment(host, "restarted", None)
        host.replica = SimulatedReplica(
            host, self.config, self._schedule, self._network, self.oracle, self._on_event, loan
        )
        return host.replica

    # What happened

    def _on_message(
        self,
        sender: SimulatedReplica,
        frames: list[wire.Frame],
        message: bytes,
        receiver: SimulatedReplica,
    ) -> None:
        self._trace.update(pack("<dII", self.now, sender.index, receiver.index))
        self._trace.update(message)
        self.oracle.messages += 1
        self.oracle.sent_bytes += len(message)
        self.oracle.sending(sender, frames)

    def _on_moment(self, replica: SimulatedReplica, kind: str, what: Any) -> None:
        if kind != "saw":
            self._trace.update(f"{self.now!r} {replica.index} {kind}".encode())
        self.events.append(Moment(self.now, replica.agent, kind, what))

    def _on_event(self, replica: SimulatedReplica, event: Event) -> None:
        self._on_moment(replica, "event", event)

    def _moment(self, host: Host, kind: str, what: Any) -> None:
        self._trace.update(f"{self.now!r} {host.index} {kind}".encode())
        self.events.append(Moment(self.now, host.name, kind, what))

    def _note(self, kind: str, text: str) -> None:
        self._trace.update(f"{self.now!r} {kind} {text}".encode())
        self.events.append(Moment(self.now, "", kind, text))
