"""
An honest mesh with one member that lies.

Some members and one more, *mallory*, who has a certificate to write like they, run the shipped
core over connections in virtual time. What leaves mallory is altered, forged, replayed, told in two
ways; and whatever a frame can say is said falsely. In the end the honest ones must be equal, have
all that each of them ever wrote, show nothing that one of them did not write under its name, and
have found fault with nobody but mallory. All chance comes from one seed.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from crdtstate import forks, sync, wire
from crdtstate.authors import Signed
from crdtstate.certificates import Certificate, Grant, issue, mesh_of
from crdtstate.change import Change, Snapshot, decode_change, encode_change
from crdtstate.clock import SEQ_MAX, Dot, Version
from crdtstate.config import Config
from crdtstate.document import Delivery, Document
from crdtstate.documents import DocumentSet
from crdtstate.errors import CRDTStateError, ProtocolError
from crdtstate.events import Equivocation, Event, PeerRejected
from crdtstate.signing import public_of, sign
from crdtstate.standing import Standing
from crdtstate.stores import Entry, Saved
from crdtstate.stores.memory import MemoryStore

EPOCH_MS = 1_700_000_000_000
DAY_MS = 24 * 3600 * 1000

MALLORY = "mallory"

CONFIG = Config(heartbeat=0.5, link_timeout=5.0, discover=False, compare_interval=0)

DELAY_MAX = 0.05
AGAIN = 1.0
"""Seconds until a message arrives, at most, and until a connection that ended is made again."""

QUIET = 60.0
"""Seconds within which the honest ones have to be equal once mallory is silent."""


class Fault(AssertionError):
    """What must not be, is."""


class Member(DocumentSet):
    """A member of the mesh: a core with documents and a store in memory."""

    def __init__(self, world: World, name: str, seed: bytes, certificate: Certificate) -> None:
        self.rng = random.Random(world.rng.getrandbits(64))
        super().__init__(name, 1, lambda: EPOCH_MS + int(world.now * 1000))
        self.world = world
        self.certificate = certificate
        self.authors = Signed(
            certificate.mesh,
            world.root,
            lambda: certificate,
            lambda purpose, message: sign(seed, purpose, message),
        )
        self._writer = self.authors.draw(self.rng)
        self.prover_of, self.scheme = self.authors.prover, self.authors.scheme
        self.may_rule = self.authors.may_rule
        self.store = MemoryStore()
        self.session = self.rng.getrandbits(64)
        self.core = sync.Sync(
            self, self._hello(), CONFIG, self.rng, world.now, authors=self.authors
        )
        self.standing = Standing(
            self,
            self.authors,
            world.root,
            emit=self.hear,
            closed=lambda name, writer: self.core.closed(name, writer, world.now),
            is_own=lambda writer: writer == self._writer or writer in self.core.former,
        )
        # Number of a connection -> who is at the other end, and its number there.
        self.links: dict[int, tuple[Member, int]] = {}
        self.peers = 0
        self.persisted = 0
        # Own seq that is in the stored snapshot, by document.
        self._base: dict[str, int] = {}
        self.tick_at = 0.0
        self.events: list[Event] = []
        # What was written here: key -> value, and how much was counted.
        self.wrote: dict[str, int] = {}
        self.counted = 0

    @property
    def writer(self) -> int:
        """Whose lane it writes."""
        return self._writer

    def _hello(self) -> wire.Hello:
        return wire.Hello(
            wire.PROTOCOL_MIN,
            wire.PROTOCOL_MAX,
            self._writer,
            self.session,
            self.agent,
            head=self.authors.head(self._writer),
        )

    def _delivered(self, delivery: Delivery) -> None:
        super()._delivered(delivery)
        self.standing.note(delivery)

    def _reloaded(self, document: Document) -> None:
        self.standing.reloaded(document)

    def _written(self) -> None:
        self.core.local_changes((change for change, _ in self._hand_over()), self.world.now)

    def hear(self, event: Event) -> None:
        """Something happened that a user is told."""
        self.events.append(event)

    # What the shell does

    def pump(self) -> None:
        """Seal what was written, and carry out what the core says."""
        self.standing.look(self.world.now)
        self.take_sealed()
        while effects := self.core.effects():
            for effect in effects:
                if self._carry_out(effect):
                    break
            self.core.committed(self.persisted, self.world.now)
            self.standing.look(self.world.now)
        self.tick_at = min(self.core.next_deadline(), self.standing.next_deadline())

    def _carry_out(self, effect: sync.Effect) -> bool:
        """Returns whether all that follows is void."""
        core, now = self.core, self.world.now
        match effect:
            case sync.Transmit(peer):
                while frames := core.take(peer):
                    self.world.send(self, peer, frames)
            case sync.Persist(number, change):
                self.store.append([Entry(change.document, change.writer, change.seq, change.data)])
                self.persisted = number
            case sync.SaveSnapshot(number, name, version, data):
                self.store.compact(Saved(name, version, data), int(CONFIG.log_bytes))
                self._base[name] = version.get(self._writer, 0)
                self.persisted = number
                core.compacted(name, self.store.floor(name))
            case sync.Fetch(peer, name, ranges):
                if not core.snapshot_instead(peer, name, self.store.measure(name, ranges), now):
                    core.fetched(peer, *self.store.read(name, ranges, int(CONFIG.answer_bytes)))
            case sync.HangUp(peer, _, reason):
                self.world.disconnect(self, peer, reason)
            case sync.Rebuild(name):
                self.reload(self._documents[name], self._writer, self._load)
                core.rebuilt(name, now)
            case sync.Fork(change, seq):
                found, _ = self.store.read(change.document, [(change.writer, seq, seq)], 1)
                for data in found:
                    self.standing.found(change, decode_change(data))
            case sync.Reidentify(_, keeps):
                self._reidentify(keeps)
                return True
            case sync.Emit(event):
                self.hear(event)
        return False

    def _load(self, document: Document) -> None:
        for item in self.store.load():
            if item.document != document.name:
                continue
            if isinstance(item, Saved):
                document.join(Snapshot.decode(item.data))
            elif not document.version.covers((item.writer, item.seq)):
                document.apply(decode_change(item.data))

    def _reidentify(self, keeps: bool) -> None:
        self.world.reidentified[self.agent] += 1
        old, base = self._writer, dict(self._base)
        for name, seq in self.core.own_acked.items():
            base[name] = max(seq, base.get(name, 0))
        self._base = {}
        if keeps:
            base = {name: version.get(old, 0) for name, version in self.versions()}
        self._writer = self.authors.draw(self.rng)
        self.store.forget(old, base)
        self.core.reidentified(self._hello(), self.world.now)

        def load(document: Document) -> None:
            self._load(document)
            name = document.name
            self.core.restore(name, document.version, self.store.floor(name), 0)

        for document in list(self._documents.values()):
            self.reload(document, self._writer, load)
        self.standing.say_again()


class World:
    """The members, their connections, and the time.

    Args:
        seed: Everything that is left to chance follows from it.
        honest: How many members there are beside mallory.
    """

    def __init__(self, seed: int, honest: int = 4) -> None:
        self.rng = random.Random(f"byzantine {seed}")
        self.now = 0.0
        root = self.root_seed = self.rng.randbytes(32)
        self.root = public_of(root)
        self.reidentified: Counter[str] = Counter()
        # What mallory has tried, and how often.
        self.tried: Counter[str] = Counter()
        self._messages: list[tuple[float, int, Member, int, bytes]] = []
        self._sent = 0
        self._due: dict[tuple[str, str], float] = {}
        # Where few are believed with snapshots, more hangs on changes and proofs.
        roles = ["rws" if seed % 2 or not n else "rw" for n in range(honest)]
        self.honest = [self._join(Member, f"agent-{n}", root, each) for n, each in enumerate(roles)]
        self.mallory = self._join(Mallory, MALLORY, root, "rw")
        for one in self.honest:
            for other in (*self.honest, self.mallory):
                if one.agent < other.agent:
                    self._due[one.agent, other.agent] = 0.0

    def _join(self, kind: type[Any], name: str, root: bytes, roles: str) -> Any:
        seed = self.rng.randbytes(32)
        certificate = issue(
            root,
            agent=name,
            key=public_of(seed),
            grants=[Grant("*", frozenset(roles))],
            not_before_ms=EPOCH_MS - DAY_MS,
            not_after_ms=EPOCH_MS + DAY_MS,
            serial=self.rng.randbytes(16),
        )
        assert certificate.mesh == mesh_of(self.root)
        return kind(self, name, seed, certificate)

    @property
    def members(self) -> list[Member]:
        """All, mallory last."""
        return [*self.honest, self.mallory]

    # Connections

    def _connect(self, one: Member, other: Member) -> None:
        numbers = []
        for each in (one, other):
            each.peers += 1
            numbers.append(each.peers)
        here, there = numbers
        one.links[here], other.links[there] = (other, there), (one, here)
        # What the handshake has proved.
        one.core.peer_up(
            here, self.now, url=f"memory://{other.agent}", certificate=other.certificate
        )
        other.core.peer_up(there, self.now, url=None, certificate=one.certificate)
        one.pump()
        other.pump()

    def disconnect(self, member: Member, peer: int, reason: str) -> None:
        """A connection ends."""
        found = member.links.pop(peer, None)
        if found is None:
            return
        other, number = found
        other.links.pop(number, None)
        member.core.peer_down(peer, self.now, reason)
        other.core.peer_down(number, self.now, reason)
        pair = (min(member.agent, other.agent), max(member.agent, other.agent))
        self._due[pair] = self.now + AGAIN

    def send(self, member: Member, peer: int, frames: list[bytes]) -> None:
        """Something leaves a member."""
        found = member.links.get(peer)
        if found is None:
            return
        if isinstance(member, Mallory):
            for message in member.corrupt(frames, found[0]):
                self._post(found, message)
        else:
            self._post(found, wire.encode_message(frames))

    def _post(self, to: tuple[Member, int], message: bytes) -> None:
        # In order on each connection, as on a stream.
        at = self.now + self.rng.uniform(0, DELAY_MAX)
        self._sent += 1
        last = max((m[0] for m in self._messages if m[2:4] == to), default=0.0)
        self._messages.append((max(at, last), self._sent, *to, message))

    # Time

    def step(self) -> None:
        """Let one thing happen: a message arrive, a timer run out, a member write, mallory lie."""
        chance = self.rng.random()
        if chance < 0.1:
            self._write(self.rng.choice(self.members))
        elif chance < 0.25:
            self.mallory.attack()
        self._pass_time()

    def _pass_time(self) -> None:
        message = min(self._messages, default=None, key=lambda each: each[:2])
        member = min(self.members, key=lambda each: each.tick_at)
        pair = min(self._due, default=None, key=lambda each: self._due[each])
        times = [
            message[0] if message else float("inf"),
            member.tick_at,
            self._due[pair] if pair else float("inf"),
        ]
        self.now = max(self.now, min(times))
        if message is not None and message[0] == min(times):
            self._messages.remove(message)
            self._arrive(message[2], message[3], message[4])
        elif pair is not None and self._due[pair] == min(times):
            del self._due[pair]
            names = {each.agent: each for each in self.members}
            self._connect(names[pair[0]], names[pair[1]])
        else:
            member.core.tick(self.now)
            member.pump()

    def _arrive(self, member: Member, peer: int, message: bytes) -> None:
        if peer not in member.links:
            return
        try:
            for frame in wire.decode_message(message):
                member.core.receive(peer, frame, self.now)
        except ProtocolError as exc:
            member.hear(PeerRejected(member.links[peer][0].agent, str(exc)))
            self.disconnect(member, peer, str(exc))
        member.pump()

    def _write(self, member: Member) -> None:
        number = len(member.wrote)
        member.map("plan")[f"{member.agent}/{number}"] = number
        member.wrote[f"{member.agent}/{number}"] = number
        if self.rng.random() < 0.3:
            member.counter("tokens").increment(number)
            member.counted += number
        member.pump()

    # The end

    def settle(self) -> None:
        """Let mallory be silent, and time pass until the honest ones are equal.

        Raises:
            Fault: They are not, or something is that must not be.
        """
        for peer in list(self.mallory.links):
            self.disconnect(self.mallory, peer, "gone")
        for pair in [pair for pair in self._due if MALLORY in pair]:
            del self._due[pair]
        self.mallory.tick_at = float("inf")
        self._messages = [each for each in self._messages if each[2] is not self.mallory]
        end = self.now + QUIET
        while self.now < end:
            self._pass_time()
            self.mallory.tick_at = float("inf")
            if not self._messages and self._is_equal():
                break
        self.check()

    def _is_equal(self) -> bool:
        first, *others = (
            {name: version for name, version in each.versions() if version} for each in self.honest
        )
        return all(other == first for other in others)

    def check(self) -> None:
        """Look at what must be. Raises Fault."""
        first = self.honest[0]
        for other in self.honest[1:]:
            for name in {*first.documents(), *other.documents()}:
                here, there = (_version(each, name) for each in (first, other))
                if here != there:
                    raise Fault(f"{other.agent} is at another version of {name!r}")
            if _read(first) != _read(other):
                raise Fault(f"{first.agent} and {other.agent} read different things")
        for member in self.honest:
            self._check_member(member)

    def _check_store(self, member: Member) -> None:
        again = DocumentSet(member.agent, 1, lambda: EPOCH_MS)
        try:
            _load(member.store, again)
        except CRDTStateError as exc:
            raise Fault(f"{member.agent} could not be opened again: {exc}") from exc
        for name, version in member.versions():
            found = again.find(name)
            if version and (found is None or found.version != version):
                raise Fault(f"{member.agent} would be at another version of {name!r}")

    def _check_member(self, member: Member) -> None:
        read = dict(member.map("plan"))
        for honest in self.honest:
            for key, value in honest.wrote.items():
                if read.get(key) != value:
                    raise Fault(f"{member.agent} reads {key!r} as {read.get(key)!r}, not {value}")
            mine = {key for key in read if key.startswith(f"{honest.agent}/")}
            if mine - honest.wrote.keys():
                raise Fault(f"{member.agent} reads what {honest.agent} has not written")
            counted = sum(
                _counted(member, writer) for writer in {honest.writer, *honest.core.former}
            )
            if counted != honest.counted:
                raise Fault(f"{member.agent} counts {counted} of {honest.agent}'s {honest.counted}")
        blamed = {
            event.agent for event in member.events if isinstance(event, PeerRejected | Equivocation)
        }
        if blamed - {MALLORY}:
            raise Fault(f"{member.agent} finds fault with {blamed}")
        self._check_store(member)
        if self.reidentified[member.agent] > 1:
            raise Fault(f"{member.agent} was made to go on as another writer again and again")
        document = member.find("main")
        if document is not None and self.mallory.is_known_liar:
            if not document.is_closed(self.mallory.forked):
                raise Fault(f"{member.agent} does not know that mallory has gone on in two ways")


def _load(store: MemoryStore, into: DocumentSet) -> None:
    """Load all that is stored, as when a replica is opened."""
    for item in store.load():
        if isinstance(item, Saved):
            into.load_snapshot(item.document, item.data)
        else:
            into.load_change(item.document, item.data)


def _version(member: Member, name: str) -> Version:
    document = member.find(name)
    return document.version if document is not None else Version()


def _read(member: Member) -> Any:
    found: dict[tuple[str, ...], Any] = {}
    for name in member.documents():
        document = member.find(name)
        assert document is not None
        for container, cells in document.lanes.containers.items():
            if container[0] == "c":
                found[name, container] = member.document(name).counter(container[1:]).value
                continue
            for key in list(cells.cells):
                values = document.candidates(cells.cells[key])
                if values:
                    place = (name, container, key)
                    found[place] = sorted((each.writer, repr(each.value)) for each in values)
    return found


def _counted(member: Member, writer: int) -> int:
    document = member.find("main")
    return sum(document.counted(writer).values()) if document is not None else 0


class Mallory(Member):
    """The member that lies."""

    def __init__(self, world: World, name: str, seed: bytes, certificate: Certificate) -> None:
        super().__init__(world, name, seed, certificate)
        # Changes of others, to be forged and replayed; and messages.
        self._seen: deque[Change] = deque(maxlen=200)
        # From when on it goes on in two ways, as which writer, and towards whom the other one.
        self._forks_at = world.rng.choice((0, 3, 12, 10**9))
        self.forked = 0
        self._deceived: set[str] = set()
        self._other: dict[tuple[str, int], Change] = {}
        # Who has got which of the two: (document, seq) -> ids.
        self._told: dict[tuple[str, int], dict[str, bytes]] = {}

    @property
    def is_known_liar(self) -> bool:
        """Whether two honest ones have got different changes of one dot."""
        return any(len(set(told.values())) > 1 for told in self._told.values())

    def _delivered(self, delivery: Delivery) -> None:
        super()._delivered(delivery)
        if delivery.change is not None:
            self._seen.append(delivery.change)

    # What leaves

    def corrupt(self, frames: list[bytes], to: Member) -> Iterator[bytes]:
        """What is sent in place of *frames*."""
        rng = self.world.rng
        decoded = wire.decode_message(wire.encode_message(frames))
        told = [self._retell(frame, to) for frame in decoded]
        message = wire.encode_message([wire.encode_frame(frame) for frame in told])
        chance = rng.random()
        if chance < 0.01:
            self.world.tried["flipped message"] += 1
            flipped = bytearray(message)
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            yield bytes(flipped)
        elif chance < 0.02:
            self.world.tried["message twice"] += 1
            yield message
            yield message
        elif chance < 0.03:
            self.world.tried["message lost"] += 1
        else:
            yield message

    def _retell(self, frame: wire.Frame, to: Member) -> wire.Frame:
        if not isinstance(frame, wire.Changes):
            return frame
        told = tuple(self._tell(data, to) for data in frame.changes)
        return wire.Changes(told, frame.answer, frame.more)

    def _tell(self, data: bytes, to: Member) -> bytes:
        """A change as it is told to somebody: of own ones there are two."""
        change = decode_change(data)
        if change.writer != self._writer or change.document != "main":
            return data
        if len(self.wrote) > self._forks_at and not self.forked:
            self.forked = self._writer
            self._deceived = {
                each.agent for each in self.world.honest if self.world.rng.random() < 0.5
            }
            self._first = change.seq
        if self.forked != self._writer or change.seq < self._first:
            return data
        place = (change.document, change.seq)
        if place not in self._other:
            self.world.tried["told in two ways"] += 1
            before = self._other.get((change.document, change.seq - 1))
            prev = before.id if before is not None else change.prev
            self._other[place] = self._again(
                change, prev=prev, origin=change.origin._replace(message="the other way")
            )
        found = self._other[place] if to.agent in self._deceived else change
        return found.data

    def _again(self, change: Change, **altered: Any) -> Change:
        """A change like another one, signed by mallory."""
        fields: dict[str, Any] = {
            "document": change.document,
            "dot": change.dot,
            "deps": {dep.writer: dep.seq for dep in change.deps},
            "stamp": change.stamp,
            "kind": change.kind,
            "shared": change.shared,
            "update": change.update,
            "origin": change.origin,
            "prev": change.prev,
            "card": change.card,
        }
        prover = self.authors.prover(self._writer)
        return encode_change(**fields | altered, prover=prover)

    # What is said beside that

    def attack(self) -> None:
        """Say something false to somebody."""
        if not self.links:
            return
        rng = self.world.rng
        peer = rng.choice(list(self.links))
        lie = rng.choice(self._lies())
        frame = lie()
        if frame is not None:
            self.world.tried[lie.__name__.strip("_")] += 1
            message = wire.encode_message([wire.encode_frame(frame)])
            self.world._post(self.links[peer], message)

    def _lies(self) -> list[Callable[[], wire.Frame | None]]:
        return [
            self._forged,
            self._forged,
            self._flipped,
            self._replayed,
            self._gap,
            self._from_the_future,
            self._of_nothing,
            self._has_all,
            self._wants_all,
            self._offer,
            self._chunk,
            self._rival,
            self._same_writer,
            self._presence,
            self._answer,
            self._digests,
            self._lease,
            self._second_hello,
            self._made_up,
            self._unsay,
        ]

    def _victim(self) -> Member:
        found: Member = self.world.rng.choice(self.world.honest)
        return found

    def _any(self) -> Change | None:
        return self.world.rng.choice(tuple(self._seen)) if self._seen else None

    def _forged(self) -> wire.Frame | None:
        """The next change of somebody else, signed by mallory, or with a signature of another."""
        change, victim = self._any(), self._victim()
        if change is None:
            return None
        name, writer = change.document, victim.writer
        document = self.find(name)
        assert document is not None
        seq = document.version.get(writer, 0) + 1
        rng = self.world.rng
        mine = self.authors.card(self._writer)
        card = rng.choice((b"", document.cards.get(writer, b""), mine))
        if change.writer != self._writer and rng.random() < 0.3:
            # What it has just said, in other words: it may get to some before the true one.
            origin = change.origin._replace(agent=MALLORY, message="forged")
            return wire.Changes((self._again(change, origin=origin, card=mine).data,))
        forged = self._again(
            change,
            dot=Dot(writer, min(seq, SEQ_MAX)),
            prev=document.ids.get(writer, bytes(16)) if seq > 1 else b"",
            deps={},
            origin=change.origin._replace(agent=victim.agent),
            card=card,
        )
        if rng.random() < 0.5:
            data = bytearray(forged.data)
            data[17 : 17 + 64] = change.proof.ljust(64, b"\0")[:64]
            return wire.Changes((bytes(data),))
        return wire.Changes((forged.data,))

    def _flipped(self) -> wire.Frame | None:
        change = self._any()
        if change is None:
            return None
        data = bytearray(change.data)
        data[self.world.rng.randrange(len(data))] ^= 1 << self.world.rng.randrange(8)
        return wire.Changes((bytes(data),))

    def _replayed(self) -> wire.Frame | None:
        change = self._any()
        if change is None:
            return None
        if self.world.rng.random() < 0.5:
            return wire.Changes((change.data,) * 3)
        return wire.Changes((self._again(change, document="other").data,))

    def _own(self, **altered: Any) -> wire.Frame | None:
        """A change of mallory's that breaks a rule."""
        mine = [each for each in self._seen if each.writer == self._writer]
        if not mine:
            return None
        return wire.Changes((self._again(mine[-1], **altered).data,))

    def _gap(self) -> wire.Frame | None:
        seq = self.world.rng.randrange(1000, SEQ_MAX)
        return self._own(document="gaps", dot=Dot(self._writer, seq), prev=bytes(16))

    def _from_the_future(self) -> wire.Frame | None:
        stamp = (EPOCH_MS + 3650 * DAY_MS) << 16
        return self._own(document="future", dot=Dot(self._writer, 1), prev=b"", stamp=stamp)

    def _of_nothing(self) -> wire.Frame | None:
        update = self.world.rng.randbytes(self.world.rng.randrange(200))
        return self._own(document="nothing", dot=Dot(self._writer, 1), prev=b"", update=update)

    def _version(self) -> Version:
        rng = self.world.rng
        writers = [each.writer for each in self.world.members]
        found = {rng.choice(writers): rng.choice((1, 5, 10**6, SEQ_MAX)) for _ in range(3)}
        return Version({**found, rng.randrange(1, 2**53): 3})

    def _has_all(self) -> wire.Frame | None:
        version = self._version()
        ids = self.world.rng.choice((b"", self.world.rng.randbytes(8 * len(version))))
        return wire.Have("main", version, self.world.rng.random() < 0.5, ids)

    def _wants_all(self) -> wire.Frame | None:
        name = self.world.rng.choice(("main", "@forks", "nowhere"))
        ranges = tuple((each.writer, 1, SEQ_MAX) for each in self.world.members)
        return wire.Want(name, ranges)

    def _offer(self) -> wire.Frame | None:
        return wire.Offer("main", self.world.rng.randbytes(32), 1000)

    def _chunk(self) -> wire.Frame | None:
        return wire.Chunk("main", self.world.rng.randbytes(32), 0, b"chunk")

    def _rival(self) -> wire.Frame | None:
        """Somebody else's record: gone, or another process of it."""
        victim = self._victim()
        record = wire.Record(
            victim.writer,
            self.world.rng.choice((victim.session, 7)),
            EPOCH_MS * 2,
            victim.agent,
            is_gone=self.world.rng.random() < 0.5,
        )
        return wire.Members(((record.writer, record.order, wire.encode_record(record)),))

    def _same_writer(self) -> wire.Frame | None:
        if self.world.rng.random() < 0.8:
            return None
        return wire.Bye(wire.ByeCode.SAME_WRITER, "two processes write as one writer")

    def _presence(self) -> wire.Frame | None:
        victim = self._victim()
        return wire.Presence(victim.writer, victim.agent, 2**50, 3_600_000, b"\xa5false")

    def _answer(self) -> wire.Frame | None:
        return wire.Answer(self.world.rng.getrandbits(64), self._victim().agent, self._version())

    def _digests(self) -> wire.Frame | None:
        writer, rng = self._victim().writer, self.world.rng
        return wire.Digests("main", writer, 1, b"", (), (("mplan\0x", rng.getrandbits(64)),), {})

    def _lease(self) -> wire.Frame | None:
        return wire.Return(self._victim().writer, {"main": 1})

    def _made_up(self) -> wire.Frame | None:
        """A document that there is not."""
        rng = self.world.rng
        return wire.Have(f"made up {rng.getrandbits(40)}", self._version(), rng.random() < 0.5)

    def _unsay(self) -> wire.Frame | None:
        """Write over what is said of forks, or say nonsense of them."""
        rng = self.world.rng
        proofs = self.system_document(forks.DOCUMENT).map(forks.PROOFS)
        key = forks.key_of("main", self.forked or self._victim().writer)
        self.world.tried["proof unsaid"] += 1
        if key in proofs and rng.random() < 0.7:
            del proofs[key]
        else:
            proofs[key] = rng.choice((1, "x", rng.randbytes(40)))
        self.pump()
        return None

    def _second_hello(self) -> wire.Frame | None:
        victim = self._victim()
        return wire.Hello(1, 1, victim.writer, 9, victim.agent)


def run(seed: int, steps: int = 1000) -> World:
    """One history of so many steps.

    Raises:
        Fault: Something was that must not be.
    """
    world = World(seed)
    for _ in range(steps):
        world.step()
    world.settle()
    return world


def campaign(seeds: range, steps: int) -> tuple[Counter[str], list[tuple[int, str]]]:
    """Many histories: what was tried, and which seeds failed, and how."""
    tried: Counter[str] = Counter()
    failed = []
    for seed in seeds:
        try:
            tried += run(seed, steps).tried
        except (Fault, CRDTStateError) as exc:
            failed.append((seed, str(exc)))
    return tried, failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign and print what came of it; 1 if a seed failed."""
    parser = argparse.ArgumentParser(
        prog="python -m crdtstate.simulation.byzantine",
        description="Honest members and one that lies, in virtual time. A seed is one history.",
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--steps", type=int, default=800, help="of each")
    given = parser.parse_args(arguments)
    tried, failed = campaign(range(given.seed, given.seed + given.seeds), given.steps)
    print(f"{given.seeds} seeds of {given.steps} steps, {len(failed)} failed")
    for what, count in tried.most_common():
        print(f"{count:8,}  {what.replace('_', ' ')}")
    for seed, why in failed:
        print(f"seed {seed}: {why}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
