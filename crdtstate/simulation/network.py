"""
The network: connections that are slow, break, or lead into a black hole.

A connection carries whole messages in order, as a websocket does, until it ends; then what was
under way is lost, and each side notices in its own time. With loss, duplication or reordering it
does the same to single messages and is harsher than any stream: what survives that survives TCP.
Only the greeting always comes first.

A *cut* between two hosts swallows what is sent in that direction. A stream keeps it, to be sent
again when the cut heals, if the connection lasts so long.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from crdtstate import wire
from crdtstate.simulation.schedule import Schedule

if TYPE_CHECKING:
    from crdtstate.simulation.shell import SimulatedReplica

ATTEMPTS = (0.0, 1.0, 3.0)
"""When a host that does not answer is asked again, in seconds after the first time; TCP does so."""

FAREWELL = 1.0
"""How long a connection that is to end waits for what cannot be sent."""

DECODED_MAX = 256


class Datagrams(NamedTuple):
    """How often a message is lost, comes twice, or is overtaken."""

    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0


class End:
    """One side of a connection."""

    def __init__(self, connection: Connection, replica: SimulatedReplica, peer: int) -> None:
        self.connection = connection
        self.replica = replica
        # The number by which the replica's core knows it.
        self.peer = peer
        self.is_open = True
        # While the other side does not read.
        self.clogged_until = 0.0
        # Why it is to end, once nothing waits for it.
        self.ending: tuple[wire.ByeCode, str] | None = None
        # When the newest message arrives on the other side, and what a cut has swallowed.
        self.arrival = 0.0
        self.swallowed: list[bytes] = []
        self.has_greeted = False

    @property
    def other(self) -> End:
        one, two = self.connection.ends
        return two if self is one else one


class Connection:
    """A connection between two replicas, made by the first, which dialled *url*."""

    def __init__(self, url: str, one: SimulatedReplica, two: SimulatedReplica) -> None:
        self.url = url
        self.ends = (End(self, one, one.next_peer()), End(self, two, two.next_peer()))


class Network:
    """All connections, and what happens to them.

    Args:
        schedule: The time.
        rng: For latencies and accidents.
        latency: Seconds from host to host, least and most; each pair has its own.
        datagrams: Accidents of single messages.
        replica_at: The living replica of a host, by index.
        host_at: The host at an address.
        on_message: Told of every message: sender, frames, bytes, receiver.
    """

    def __init__(
        self,
        schedule: Schedule,
        rng: random.Random,
        latency: tuple[float, float],
        datagrams: Datagrams,
        replica_at: Callable[[int], SimulatedReplica | None],
        host_at: Callable[[str], int],
        on_message: Callable[[SimulatedReplica, list[wire.Frame], bytes, SimulatedReplica], None],
    ) -> None:
        self.schedule = schedule
        self.rng = rng
        self.datagrams = datagrams
        self.replica_at = replica_at
        self.host_at = host_at
        self._latency = latency
        self._on_message = on_message
        self._latencies: dict[tuple[int, int], float] = {}
        # Directions in which nothing arrives.
        self._cuts: set[tuple[int, int]] = set()
        self._connections: list[Connection] = []
        self._decoded: dict[bytes, list[wire.Frame]] = {}

    def latency(self, one: int, two: int) -> float:
        """How long a message from *one* to *two* takes this time."""
        pair = (one, two) if one < two else (two, one)
        found = self._latencies.get(pair)
        if found is None:
            found = self._latencies[pair] = self.rng.uniform(*self._latency)
        return found * (0.9 + 0.2 * self.rng.random())

    def is_cut(self, one: int, two: int) -> bool:
        """Whether no connection can be made between two hosts."""
        return (one, two) in self._cuts or (two, one) in self._cuts

    # Faults

    def cut(self, one: int, two: int) -> None:
        """Let nothing from *one* arrive at *two* any more."""
        self._cuts.add((one, two))

    def heal(self, one: int, two: int) -> None:
        """Let messages from *one* to *two* through again, and those that were swallowed."""
        if (one, two) not in self._cuts:
            return
        self._cuts.discard((one, two))
        for connection in self._connections:
            for end in connection.ends:
                if end.replica.index == one and end.other.replica.index == two:
                    self._resend(end)

    def cuts(self) -> list[tuple[int, int]]:
        """The directions in which nothing arrives."""
        return sorted(self._cuts)

    def between(self, one: int, two: int) -> list[Connection]:
        """The connections between two hosts."""
        hosts = {one, two}
        return [c for c in self._connections if {e.replica.index for e in c.ends} == hosts]

    def all(self) -> list[Connection]:
        """All connections."""
        return self._connections.copy()

    def break_off(self, connection: Connection) -> None:
        """Break a connection; each side notices in its own time."""
        for end in connection.ends:
            if end.is_open:
                delay = self.latency(*(e.replica.index for e in connection.ends))
                self.schedule.call_later(delay, None, self._fall, end, "the connection broke")

    def fell_silent(self, replica: SimulatedReplica, *, notice: bool) -> None:
        """A process is dead; with *notice* its system closes its connections, and they know."""
        for connection in self._connections.copy():
            for end in connection.ends:
                if end.replica is replica:
                    end.is_open = False
                    if notice:
                        self.reset(end.other)
            self._tidy(connection)

    def reset(self, end: End) -> None:
        """Tell the side *end* that the other one is gone, unless a cut hides it."""
        here, there = end.replica.index, end.other.replica.index
        if end.is_open and (there, here) not in self._cuts:
            delay = self.latency(there, here)
            self.schedule.call_later(delay, None, self._fall, end, "the connection was reset")

    def reset_stale(self, host: int) -> None:
        """A host is up again: it knows nothing of the connections it had before."""
        for connection in self._connections:
            for end in connection.ends:
                if end.replica.index == host and not end.is_open:
                    self.reset(end.other)

    # Connecting

    def dial(self, replica: SimulatedReplica, url: str) -> None:
        """Let a replica try to connect to an address."""
        target = self.host_at(url)
        delay = self.latency(replica.index, target)
        self.schedule.call_later(delay, replica, self._dial, replica, url, target, 0)

    def _dial(self, replica: SimulatedReplica, url: str, target: int, attempt: int) -> None:
        there = self.replica_at(target)
        if self.is_cut(replica.index, target):
            if attempt + 1 < len(ATTEMPTS):
                pause = ATTEMPTS[attempt + 1] - ATTEMPTS[attempt]
                self.schedule.call_later(
                    pause, replica, self._dial, replica, url, target, attempt + 1
                )
                return
        elif there is not None:
            self._connect(url, replica, there)
            return
        replica.dial_failed(url)

    def _connect(self, url: str, one: SimulatedReplica, two: SimulatedReplica) -> None:
        connection = Connection(url, one, two)
        self._connections.append(connection)
        for end, dialled in zip(connection.ends, (url, None), strict=True):
            self.schedule.call_at(self.schedule.now, end.replica, self._stand, end, dialled)

    def _stand(self, end: End, url: str | None) -> None:
        if end.is_open:
            end.replica.connected(end, url)

    def _fall(self, end: End, reason: str) -> None:
        """One side of a connection is gone."""
        if not end.is_open:
            return
        end.is_open = False
        replica, connection = end.replica, end.connection
        if replica.is_alive:
            why = end.ending[1] if end.ending else reason
            self.schedule.call_at(self.schedule.now, replica, replica.disconnected, end, why)
        self.reset(end.other)
        self._tidy(connection)

    def _tidy(self, connection: Connection) -> None:
        if not any(end.is_open for end in connection.ends) and connection in self._connections:
            self._connections.remove(connection)

    # Sending

    def flush(self, end: End) -> None:
        """Send what waits for a connection, unless the other side does not read."""
        if end.clogged_until > self.schedule.now:
            return
        frames_max = 1 if any(self.datagrams) else wire.BUNDLE_FRAMES_MAX
        while end.is_open and (frames := end.replica.core.take(end.peer, frames_max)):
            self._transmit(end, wire.encode_message(frames))
        if end.ending is not None:
            self.close(end)

    def clog(self, end: End, until: float) -> None:
        """Let the other side of *end* read nothing until then."""
        end.clogged_until = max(end.clogged_until, until)
        self.schedule.call_at(until, end.replica, self._unclog, end)

    def _unclog(self, end: End) -> None:
        if end.is_open:
            self.flush(end)
            end.replica.pump()

    def _transmit(self, end: End, message: bytes) -> None:
        here, there = end.replica, end.other.replica
        self._on_message(here, self._decode(message), message, there)
        if (here.index, there.index) in self._cuts:
            end.swallowed.append(message)
            return
        self._carry(end, message)

    def _resend(self, end: End) -> None:
        swallowed, end.swallowed = end.swallowed, []
        for message in swallowed:
            self._carry(end, message)

    def _carry(self, end: End, message: bytes) -> None:
        now, rng = self.schedule.now, self.rng
        arrival = now + self.latency(end.replica.index, end.other.replica.index)
        loss, duplication, reordering = self.datagrams
        if end.has_greeted and (loss or duplication or reordering):
            if rng.random() < loss:
                return
            if rng.random() < reordering:
                # It falls behind; those after it do not wait.
                self._arrive_at(max(arrival, end.arrival) + rng.random() * 0.2, end, message)
                return
            if rng.random() < duplication:
                self._arrive_at(max(arrival, end.arrival) + rng.random() * 0.1, end, message)
        end.has_greeted = True
        end.arrival = max(arrival, end.arrival)
        self._arrive_at(end.arrival, end, message)

    def _arrive_at(self, at: float, end: End, message: bytes) -> None:
        self.schedule.call_at(at, end.other.replica, self._arrive, end.other, message)

    def _arrive(self, end: End, message: bytes) -> None:
        if end.is_open:
            end.replica.receive(end, self._decode(message))

    def _decode(self, message: bytes) -> list[wire.Frame]:
        """Decode a message; the same bytes go to many, and need not be decoded for each."""
        frames = self._decoded.get(message)
        if frames is None:
            if len(self._decoded) >= DECODED_MAX:
                self._decoded.clear()
            frames = self._decoded[message] = wire.decode_message(message)
        return frames

    def close(self, end: End) -> None:
        """End a connection in order: after what was sent."""
        here, there = end.replica.index, end.other.replica.index
        at = self.schedule.now + FAREWELL
        if not end.replica.core.has_unsent(end.peer) and (here, there) not in self._cuts:
            at = max(end.arrival, self.schedule.now)
            self.schedule.call_at(at, None, self._fall, end.other, "closed by the other side")
        self.schedule.call_at(at, None, self._fall, end, "closed")
