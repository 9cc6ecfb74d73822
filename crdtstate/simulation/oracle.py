"""
The oracle: sees everything, remembers everything, and says what is wrong.

It hears of each write as it is made, with what its replica had seen by then; so it knows the true
past of every change, and what every version must read as, by a plain multi-value store with full
history that knows nothing of lanes. Replicas are held against that all the time:

I1   Equal versions have equal content, which is that of the reference; and all converge.
I2   A dot names one change for ever, and only changes somebody made are sent.
I3   The whole past of a change is delivered before it, also when a snapshot brought it.
I4   Each writer's changes are delivered in order, each once.
I5   What is committed survives a kill; what is synced survives a power cut.
I6   Whatever waits is bounded.
I7   The log's floor is not above what was delivered, and all above it can be read.
I8   HAVE names only what is committed, and no own change leaves before it is.
I9   The heads are the maximal elements of what was delivered.
I10  Who has taken in a causal token reads what its maker had written.
I11  What honest replicas say is never refused.
I12  Strong reads and writes are linearizable, and end when nothing is wrong (`campaign`, `linear`).
I13  Who confirmed that something is on its disk has it there after a power cut (`campaign`).
I14  When nothing is wrong, everybody sees everybody up, and nobody else (`campaign`).
I15  Replicas that are sound never say that they differ (`comparing`).
L3   At rest no lane holds what says nothing any more; see `lanes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from crdtstate import wire
from crdtstate.change import Change, Origin, Snapshot, decode_change
from crdtstate.clock import Cut, HybridClock, Version
from crdtstate.crdts import Counter
from crdtstate.document import Document, EngineFailure
from crdtstate.errors import ChangeRefused, InvalidUpdate
from crdtstate.events import DivergenceDetected, Event, PeerRejected
from crdtstate.guard import parse_change
from crdtstate.slots import SEPARATOR, Cell, Slot, candidates, live_slots, totals

if TYPE_CHECKING:
    from crdtstate.simulation.shell import SimulatedReplica

TOKENS = "tokens"
"""The map in which the campaign keeps, for each agent, how many tokens it has given out."""


class Violation(AssertionError):
    """An invariant does not hold. Nothing that happens afterwards means anything."""

    def __init__(self, invariant: str, detail: str) -> None:
        super().__init__(f"{invariant}: {detail}")
        self.invariant = invariant
        self.detail = detail


class Op(NamedTuple):
    """One write: what it says, and what its replica had seen."""

    path: str
    value: bytes | None
    amount: int
    seen: Version


@dataclass(eq=False, slots=True)
class Birth:
    """A change, as it was made."""

    document: str
    writer: int
    seq: int
    past: Version
    kind: int
    ops: tuple[Op, ...]
    data: bytes
    agent: str
    index: int
    at: float
    is_committed: bool = False
    was_sent: bool = False
    # Hosts that have it.
    seen_by: set[int] = field(default_factory=set)

    def __repr__(self) -> str:
        return f"change {self.writer:x}:{self.seq} of {self.agent} in {self.document!r}"


class WatchedDocument(Document):
    """A document whose writes the oracle hears of."""

    def __init__(
        self,
        name: str,
        *,
        replica: SimulatedReplica,
        oracle: Oracle,
        writer: int,
        clock: HybridClock,
        wall: Callable[[], int],
        on_write: Callable[[Document], None],
        shared: bool,
    ) -> None:
        super().__init__(
            name,
            writer=writer,
            agent=replica.agent,
            clock=clock,
            wall=wall,
            on_write=on_write,
            shared=shared,
        )
        self._replica = replica
        self._oracle = oracle
        self._ops: list[Op] = []
        self._marked = 0
        # Whether the engine is to fail on the next change.
        self.fails_next = False

    def put(self, container: str, key: str, value: bytes | None, *, kind: int = 0) -> None:
        """See `Document.put`."""
        op = Op(container + SEPARATOR + key, value, 0, self.version.copy())
        self._ops.append(op)
        try:
            super().put(container, key, value, kind=kind)
        except ChangeRefused:
            del self._ops[-1]
            raise

    def count(self, container: str, up: int, down: int) -> None:
        """See `Document.count`."""
        self._ops.append(Op(container + SEPARATOR, None, up - down, _NOTHING))
        try:
            super().count(container, up, down)
        except ChangeRefused:
            del self._ops[-1]
            raise

    def mark(self) -> Mapping[str, Slot | None]:
        """See `Document.mark`."""
        self._marked = len(self._ops)
        return super().mark()

    def rollback(self, mark: Mapping[str, Slot | None] | None = None) -> None:
        """See `Document.rollback`."""
        del self._ops[self._marked if mark else 0 :]
        super().rollback(mark)

    def apply(self, change: Change) -> list[str]:
        """See `Document.apply`."""
        if self.fails_next:
            self.fails_next, self.is_broken = False, True
            raise EngineFailure("the simulation wants it")
        return super().apply(change)

    def _load(self, state: bytes, version: Version) -> list[str]:
        if self.fails_next:
            self.fails_next, self.is_broken = False, True
            raise EngineFailure("the simulation wants it")
        return super()._load(state, version)

    def snapshot(self) -> Snapshot:
        """See `Document.snapshot`. Joined with itself: yrs folds garbage in an order that differs
        from run to run, and completely only at loading."""
        made = super().snapshot()
        return made._replace(state=self.engine.join(made.state, lambda writer: False))

    def reset(self, writer: int) -> dict[str, Any]:
        """See `Document.reset`."""
        self._ops.clear()
        return super().reset(writer)

    def _sealed(self, update: bytes, origin: Origin | None, kind: int) -> Change:
        past = self.version.copy()
        change = super()._sealed(update, origin, kind)
        try:
            decode_change(change.data)
            if not self.shared:
                parse_change(change.update)
        except InvalidUpdate as exc:
            raise Violation("I11", f"{change!r} is refused everywhere: {exc}") from exc
        ops, self._ops = tuple(self._ops), []
        self._oracle.born(self._replica, self, change, past, ops)
        return change


class Oracle:
    """Everything that was ever written, and who has what of it.

    Args:
        now: Returns the time.
        on_moment: Told what happened to whom: (replica, kind, document, change or detail).
    """

    def __init__(
        self, now: Callable[[], float], on_moment: Callable[[SimulatedReplica, str, Any], None]
    ) -> None:
        self._now = now
        self._on_moment = on_moment
        self.hosts = 0
        self.births: dict[str, list[Birth]] = {}
        self._by_data: dict[bytes, Birth] = {}
        self._by_dot: dict[tuple[str, int, int], Birth] = {}
        # (host, document) -> what was delivered there, by what its core said.
        self._delivered: dict[tuple[int, str], Version] = {}
        # Host -> what must be there when it is up again.
        self._promised: dict[int, Mapping[str, Version]] = {}
        # (document, version) -> the content that somebody had at it.
        self._contents: dict[tuple[str, frozenset[tuple[int, int]]], dict[str, Cell]] = {}
        # Host -> tokens it waits for: (agent, how many it had given out, token).
        self._tokens: dict[int, list[tuple[str, int, Cut]]] = {}
        # Called after commits; campaigns strike then.
        self.on_commit: Callable[[SimulatedReplica], None] = lambda replica: None
        # Whether disks were put back to an older state without notice: I2 is then at stake.
        self.expects_rollbacks = False
        # Whether something was damaged on purpose: then I15 promises nothing, nor after rollbacks.
        self.expects_damage = False
        # For the report.
        self.copies = 0
        self.messages = 0
        self.sent_bytes = 0
        self.delays: list[float] = []
        self.last_delays: list[float] = []

    @property
    def changes(self) -> int:
        """How many changes were made, but for those that were lost before anybody heard of them."""
        return sum(map(len, self.births.values()))

    def expect(self, condition: bool, invariant: str, detail: str) -> None:
        """Raise a Violation unless *condition*."""
        if not condition:
            raise Violation(invariant, f"at {self._now():.3f} s: {detail}")

    # What is written

    def make_document(
        self,
        replica: SimulatedReplica,
        name: str,
        shared: bool,
        clock: HybridClock,
        wall: Callable[[], int],
        on_write: Callable[[Document], None],
    ) -> Document:
        """A document that reports its writes."""
        return WatchedDocument(
            name,
            replica=replica,
            oracle=self,
            writer=replica.writer,
            clock=clock,
            wall=wall,
            on_write=on_write,
            shared=shared,
        )

    def born(
        self,
        replica: SimulatedReplica,
        document: Document,
        change: Change,
        past: Version,
        ops: tuple[Op, ...],
    ) -> None:
        """A change was sealed."""
        name, writer, seq = key = (change.document, change.writer, change.seq)
        birth = Birth(
            name,
            writer,
            seq,
            past,
            change.kind,
            ops,
            change.data,
            replica.agent,
            replica.index,
            self._now(),
        )
        birth.seen_by.add(replica.index)
        self._by_data[change.data] = birth
        self._version(replica, name)[writer] = seq
        self._on_moment(replica, "wrote", birth)
        old = self._by_dot.get(key)
        if old is not None:
            is_known = old.was_sent or len(old.seen_by) > 1
            if is_known and self.expects_rollbacks:
                # It must never leave; see `_sending_change`.
                return
            self.expect(not is_known, "I2", f"{old!r} is known, and its dot is used again")
            self._forget(old)
        self._by_dot[key] = birth
        self.births.setdefault(name, []).append(birth)

    def agent_of(self, document: str, writer: int) -> str:
        """Whose writer that is."""
        birth = self._by_dot.get((document, writer, 1))
        return birth.agent if birth else f"{writer:x}"

    def _forget(self, old: Birth) -> None:
        """A change was lost before anybody heard of it, and its dot is used again."""
        if self._by_data[old.data] is old:
            del self._by_data[old.data]
        self.births[old.document].remove(old)
        self._contents.clear()
        for index, waiting in self._tokens.items():
            # A token of what was not committed is worth nothing after a crash.
            kept = [(a, n, t) for a, n, t in waiting if not _covers(t, old)]
            self._tokens[index] = kept

    # What is taken in

    def _version(self, replica: SimulatedReplica, document: str) -> Version:
        return self._delivered.setdefault((replica.index, document), Version())

    def delivered(
        self, replica: SimulatedReplica, document: Document, change: Change | None, agent: str
    ) -> None:
        """A change, or with None a snapshot, was delivered."""
        if change is None:
            self._on_moment(replica, "joined", f"{document.name!r} from {agent}")
            return
        birth = self._by_data.get(change.data)
        self.expect(birth is not None, "I2", f"{replica.agent} got {change!r}; nobody made it")
        assert birth is not None
        self._on_moment(replica, "saw", birth)
        version = self._version(replica, change.document)
        have = version.get(change.writer, 0)
        if have != change.seq - 1:
            detail = f"{replica.agent} delivers {birth!r} after {have}"
            raise Violation("I4", detail)
        if not birth.past <= version:
            detail = f"{replica.agent} delivers {birth!r}, which builds on {birth.past}, at"
            raise Violation("I3", f"{detail} {version}")
        self.expect(birth.is_committed, "I8", f"{birth!r} left before it was committed")
        version[change.writer] = change.seq
        self._has(replica, birth)

    def saved(self, replica: SimulatedReplica, document: str, version: Version) -> None:
        """A snapshot is to be kept: one that was joined, or the document's own."""
        before = self._version(replica, document)
        if version == before:
            return
        # An own change may have been sealed since the core decided to save.
        others = Version({w: seq for w, seq in before.items() if w != replica.writer})
        self.expect(others <= version, "I4", f"{replica.agent} forgets: {before} -> {version}")
        self._check_closed(replica.agent, document, version)
        for birth in self.births.get(document, ()):
            dot = (birth.writer, birth.seq)
            if version.covers(dot) and not before.covers(dot):
                self.expect(birth.is_committed, "I8", f"{birth!r} is in a snapshot too early")
                self._has(replica, birth)
        before.merge(version)

    def _check_closed(self, agent: str, document: str, version: Version) -> None:
        """Check that a version holds the past of all it holds."""
        for writer, seq in version.items():
            birth = self._by_dot.get((document, writer, seq))
            self.expect(birth is not None, "I2", f"{agent} has {writer:x}:{seq}; nobody made it")
            assert birth is not None
            if not birth.past <= version:
                detail = f"{agent} has {birth!r} without what it builds on: {version}"
                raise Violation("I3", detail)

    def _has(self, replica: SimulatedReplica, birth: Birth) -> None:
        if replica.index in birth.seen_by:
            return
        birth.seen_by.add(replica.index)
        delay = self._now() - birth.at
        self.delays.append(delay)
        if len(birth.seen_by) == self.hosts:
            self.last_delays.append(delay)

    # What is committed and sent

    def committed(self, replica: SimulatedReplica) -> None:
        """The core was told of commits."""
        for name in replica.documents():
            self._note_commits(name, replica.writer, replica.disk.version(name))
        self.on_commit(replica)

    def _note_commits(self, document: str, writer: int, version: Version) -> None:
        seq = version.get(writer, 0)
        while seq and not (birth := self._by_dot[document, writer, seq]).is_committed:
            birth.is_committed = True
            seq -= 1

    def sending(self, replica: SimulatedReplica, frames: Iterable[wire.Frame]) -> None:
        """A message leaves."""
        for frame in frames:
            match frame:
                case wire.Have(name, version, _):
                    here = replica.disk.version(name)
                    if not version <= here:
                        detail = f"{replica.agent} says to have {version} of {name!r}, has {here}"
                        raise Violation("I8", detail)
                case wire.Changes(changes):
                    for data in changes:
                        self._sending_change(replica, data)

    def _sending_change(self, replica: SimulatedReplica, data: bytes) -> None:
        birth = self._by_data.get(data)
        self.copies += 1
        self.expect(birth is not None, "I2", f"{replica.agent} sends a change that nobody made")
        assert birth is not None
        if self._by_dot[birth.document, birth.writer, birth.seq] is not birth:
            raise Violation("I2", f"{replica.agent} sends two changes with one dot: {birth!r}")
        if not birth.was_sent:
            birth.was_sent = True
            on_disk = replica.disk.version(birth.document).covers((birth.writer, birth.seq))
            self.expect(on_disk, "I8", f"{birth!r} is sent before it is committed")

    def heard(self, replica: SimulatedReplica, event: Event) -> None:
        """A core says something. Nobody here is dishonest, so nobody may be refused."""
        if isinstance(event, PeerRejected):
            raise Violation("I11", f"{replica.agent} refuses {event.agent}: {event.reason}")
        is_sound = not self.expects_damage and not self.expects_rollbacks
        if isinstance(event, DivergenceDetected) and is_sound:
            where = f"{event.path!r} of {event.document!r}, in lane {event.writer:x}"
            raise Violation("I15", f"{replica.agent} differs from {event.agent} at {where}")

    # Ends and beginnings

    def fail_engine(self, replica: SimulatedReplica, name: str, fails: bool = True) -> None:
        """Let the engine of a document fail on the next change, or no more."""
        document = replica.find(name)
        if isinstance(document, WatchedDocument):
            document.fails_next = fails

    def crashed(self, index: int, promised: Mapping[str, Version]) -> None:
        """A host is down; its disk promised to keep *promised*."""
        self._promised[index] = {name: version.copy() for name, version in promised.items()}

    def rolled_back(self, index: int, *, unnoticed: bool) -> None:
        """A host's disk holds an older state again: what it promised is void."""
        self.expects_rollbacks |= unnoticed
        self._promised.pop(index, None)

    def started(self, replica: SimulatedReplica) -> None:
        """A replica has loaded what its disk had."""
        versions = dict(replica.versions())
        for name, version in self._promised.pop(replica.index, {}).items():
            here = versions.get(name, _NOTHING)
            self.expect(
                version <= here, "I5", f"{replica.agent} had {version} of {name!r}, has {here}"
            )
        for name in [name for index, name in self._delivered if index == replica.index]:
            del self._delivered[replica.index, name]
        for name in versions:
            self.reloaded(replica, name)

    def reloaded(self, replica: SimulatedReplica, name: str) -> None:
        """A replica has loaded a document from its disk."""
        document = replica.find(name)
        assert document is not None
        version = self._delivered[replica.index, name] = document.version.copy()
        self._check_closed(replica.agent, name, version)
        for writer in version:
            self._note_commits(name, writer, version)

    def reidentified(self, replica: SimulatedReplica, reason: str) -> None:
        """A replica found that it was rolled back."""
        self.expect(
            self.expects_rollbacks, "I2", f"{replica.agent} lost what it had sent: {reason}"
        )

    # Checks

    def check(self, replica: SimulatedReplica) -> None:
        """Hold a replica, between two moments, against all invariants."""
        self._check_bounds(replica)
        for name, version in replica.versions():
            document = replica.find(name)
            assert document is not None
            mine = self._version(replica, name)
            if version != mine:
                detail = f"{replica.agent} is at {version} of {name!r}, was told of {mine}"
                raise Violation("I4", detail)
            self._check_heads(replica.agent, document)
            self._check_log(replica, name, version)
            if not document.is_open:
                self.check_content(replica.agent, document)

    def _check_bounds(self, replica: SimulatedReplica) -> None:
        core, config = replica.core, replica.config
        self.expect(
            core.pending_count <= config.pending_changes,
            "I6",
            f"{replica.agent} has {core.pending_count} pending changes",
        )
        for name, size, limit in replica.loads():
            self.expect(size <= limit, "I6", f"{replica.agent}: {name}: {size} > {limit}")

    def _check_heads(self, agent: str, document: Document) -> None:
        version = document.version
        past = Version()
        for writer, seq in version.items():
            birth = self._by_dot[document.name, writer, seq]
            past.merge({w: s for w, s in birth.past.items() if w != writer})
        heads = {writer: seq for writer, seq in version.items() if past.get(writer, 0) < seq}
        if document.heads != heads:
            detail = f"{agent}: heads of {document.name!r} are {document.heads}, not {heads}"
            raise Violation("I9", detail)

    def _check_log(self, replica: SimulatedReplica, name: str, version: Version) -> None:
        disk = replica.disk
        floor, on_disk = disk.floor(name), disk.version(name)
        agent = replica.agent
        self.expect(floor <= version, "I7", f"{agent}: floor {floor} is above {version}")
        known = replica.core.floor(name)
        self.expect(floor <= known, "I7", f"{agent}: floor {floor}, its core thinks {known}")
        ranges = [
            (writer, floor.get(writer, 0) + 1, seq)
            for writer, seq in on_disk.items()
            if floor.get(writer, 0) < seq
        ]
        found, more = disk.read(name, ranges, 2**40)
        wanted = sum(last - first + 1 for _, first, last in ranges)
        self.expect(not more and len(found) == wanted, "I7", f"{agent}: the log has holes")

    def check_leftovers(self, replica: SimulatedReplica) -> None:
        """Check that a replica at rest has dropped of its lanes what says nothing any more."""
        for name in replica.documents():
            document = replica.find(name)
            assert document is not None
            for path, cell in document.lanes.canonical().items():
                own = cell.get(replica.writer)
                if own is None or path.startswith(Counter.kind):
                    continue
                is_live = any(writer == replica.writer for writer, _ in live_slots(cell))
                if not is_live or (own.value is None and len(cell) == 1):
                    raise Violation("L3", f"{replica.agent} keeps {own} at {path!r} of {name!r}")

    def check_content(self, agent: str, document: Document) -> None:
        """Hold a document against others that were at its version, and against the reference."""
        key = (document.name, frozenset(document.version.items()))
        content = document.lanes.canonical()
        known = self._contents.get(key)
        if known is not None:
            if known != content:
                where = [p for p in known.keys() | content.keys() if known.get(p) != content.get(p)]
                detail = f"{agent} differs at {sorted(where)[:3]!r} of {document.name!r}"
                raise Violation("I1", f"{detail} from a replica of equal version")
            return
        self._contents[key] = content
        wanted = self.reference(document.name, document.version)
        found = {path: _visible(path, cell) for path, cell in content.items()}
        for path in wanted.keys() | found.keys():
            want, have = wanted.get(path, {}), found.get(path, {})
            if want != have:
                detail = f"{agent} reads {have} at {path!r} of {document.name!r}, not {want}"
                raise Violation("I1", detail)

    def reference(self, document: str, version: Version) -> dict[str, dict[Any, Any]]:
        """What a version reads as: path -> visible dot -> value; a counter -> its sum."""
        cells: dict[str, dict[Any, Any]] = {}
        for birth in self.births.get(document, ()):
            dot = (birth.writer, birth.seq)
            if not version.covers(dot):
                continue
            for path, value, amount, seen in birth.ops:
                cell = cells.setdefault(path, {})
                if path.startswith(Counter.kind):
                    cell[0] = cell.get(0, 0) + amount
                    continue
                for old in [old for old in cell if old == dot or seen.covers(old)]:
                    del cell[old]
                if value is not None:
                    cell[dot] = value
        return cells

    def wait_for(self, index: int, agent: str, count: int, token: Cut) -> None:
        """Let a host wait for a token of *agent*, its *count*-th."""
        self._tokens.setdefault(index, []).append((agent, count, token))

    def pumped(self, replica: SimulatedReplica) -> None:
        """Check the tokens that *replica* waits for, as far as it has taken them in."""
        waiting = self._tokens.pop(replica.index, None)
        if waiting is None:
            return
        here = Cut(dict(replica.versions()))
        for agent, count, token in waiting:
            if not token <= here:
                self.wait_for(replica.index, agent, count, token)
                continue
            found = [c.value for c in replica.map(TOKENS).explain(agent).candidates]
            self.expect(
                bool(found) and max(found) >= count,
                "I10",
                f"{replica.agent} has the token of {agent} and reads {found}, not {count}",
            )


def _covers(token: Cut, birth: Birth) -> bool:
    return birth.document in token and token[birth.document].covers((birth.writer, birth.seq))


def _visible(path: str, cell: Cell) -> dict[Any, Any]:
    if path.startswith(Counter.kind):
        counted = [totals(slot) for slot in cell.values()]
        return {0: sum(up - down for up, down in counted)} if cell else {}
    return {(writer, slot.seq): slot.value for writer, slot in candidates(cell)}


_NOTHING = Version()
