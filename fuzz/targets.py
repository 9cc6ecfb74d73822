"""
What is attacked, and what must hold afterwards.

A target makes honest histories, one for each *block* of sequences, and tries hostile inputs on what
came of it; what is taken in is judged, and the next sequence begins from the honest state again. So
a sequence depends on its number alone. What must hold of a document: it is as before if the input
was refused; if not, its change altered nothing but its writer's lane, except that it may have
dropped what is settled; and it can be read, written, exported and loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import random
from typing import Any, Protocol

import harness
import hostile_changes
import hypothesis
import msgpack
import zstandard
from harness import Agent, contents
from hostile import Scene, broken, plausible, section, slot, update, wild
from nacl.signing import SigningKey
from test_native import Member
from test_native import damaged as damaged_native

from crdtstate import certificates, wire
from crdtstate.change import Change, Origin, Snapshot, decode_change, encode_change
from crdtstate.clock import SEQ_MAX, Dot, Version
from crdtstate.errors import CRDTStateError, InvalidUpdate, ProtocolError
from crdtstate.guard import encode_varint, parse_change, parse_state
from crdtstate.native_guard import Known, check_change, check_state, is_guest
from crdtstate.slots import is_settled
from fuzz import strategies
from fuzz.mutations import mutated

BLOCK = 64
"""Sequences that share a history."""


class Attack(Protocol):
    """A target.

    Attributes:
        tried: How many inputs it was given.
        taken: How many of them were taken in.
        last: The newest of them.
    """

    tried: int
    taken: int
    last: bytes

    def run(self, number: int) -> None:
        """Run one sequence. Raises whatever is found wrong."""


def history(rng: random.Random) -> tuple[Agent, Agent, list[Change]]:
    """A writer, a victim that has heard of all but its last changes, and these: one at least."""
    while True:
        writer, victim, last = hostile_changes.history(rng)
        if last:
            return writer, victim, last


class Blocks:
    """Makes what a block of sequences shares, and counts."""

    def __init__(self) -> None:
        self.tried = self.taken = 0
        self.last = b""
        self._block = -1

    def run(self, number: int) -> None:
        if number // BLOCK != self._block:
            self._block = number // BLOCK
            harness._ticks = itertools.count(1_000_000)
            self.begin(random.Random(f"{type(self).__name__} {self._block}"))
        # Else what was written before would show in the stamps.
        harness._ticks = itertools.count(2_000_000)
        self.attack(random.Random(f"{type(self).__name__} {self._block}:{number}"))

    def begin(self, rng: random.Random) -> None:
        """Make what the sequences share."""

    def attack(self, rng: random.Random) -> None:
        """Run one sequence."""

    def give(self, data: bytes) -> bytes:
        """Note an input."""
        self.tried += 1
        self.last = data
        return data


# Documents of lanes


class LaneChanges(Blocks):
    """Changes to a document of lanes, by a writer with all rights."""

    def begin(self, rng: random.Random) -> None:
        self.writer, self.victim, self.honest = history(rng)
        snapshot = self.victim.document("main").snapshot()
        self.base = snapshot
        self.fresh = False

    def _document(self) -> Any:
        if not self.fresh:
            self.victim._close_documents()
            self.victim = Agent(9)
            self.victim.find_or_make("main", False).join(self.base)
            self.fresh = True
        return self.victim.document("main")

    def attack(self, rng: random.Random) -> None:
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            document = self._document()
            change = self._hostile(document, rng)
            if change is None:
                continue
            before = document.lanes.canonical()
            version, agents = document.version.copy(), dict(document.agents)
            try:
                document.apply(change)
            except InvalidUpdate:
                assert document.version == version, "a refused change left a trace"
                if rng.random() < 0.02:
                    assert document.lanes.canonical() == before, "a refused change left a trace"
                continue
            self.taken += 1
            self.fresh = False
            judge(document, change, before, version)
            assert agents.items() <= document.agents.items()
            if rng.random() < 0.3:
                hostile_changes.use(self.victim)
            else:
                assert reloaded(document) == contents(self.victim)["main"]

    def _hostile(self, document: Any, rng: random.Random) -> Change | None:
        honest = rng.choice(self.honest)
        if rng.random() < 0.3:
            data = self.give(hostile_changes.forged(honest, self.victim, rng))
            try:
                change = decode_change(data)
            except InvalidUpdate:
                return None
            known = document.is_ready(change) and change.writer != document.writer
            return change if known else None
        lane = document.lanes.lane(7)
        updates = [each.update for each in self.honest]
        match rng.randrange(8):
            case 0:
                made = plausible(7, lane.clock, rng)
            case 1:
                made = wild(7, lane.clock, rng)
            case 2:
                made = mutated(plausible(7, lane.clock, rng), updates, rng)
            case 3:
                # As somebody else, or as one whom yrs takes for somebody else.
                who = rng.choice((9, 2**53 + 9, 2**53 + 7, 2**32 + 7, 11))
                made = plausible(who, document.lanes.lane(who & 2**53 - 1).clock, rng)
            case 4:
                other = document.lanes.lane(rng.choice((7, 9)))
                start = rng.randrange(other.clock + 3)
                length = rng.choice((1, 1, 2, 2**31 - 1, 2**32 - start))
                body = rng.choice((b"\0", updates[0][:-1]))
                made = (
                    body
                    + b"\1"
                    + b"".join(encode_varint(n) for n in (other.writer, 1, start, length))
                )
            case 5:
                made = _slots(lane, rng)
            case _:
                made = mutated(rng.choice(updates), updates, rng)
        self.give(made)
        heard = document.version.get(9, 0)
        deps = {9: rng.randrange(1, heard + 1)} if heard else {}
        return encode_change(
            "main",
            Dot(7, document.version.get(7, 0) + 1),
            deps,
            honest.stamp,
            0,
            False,
            made,
            honest.origin,
            prev=document.ids.get(7, b""),
        )


def _slots(lane: Any, rng: random.Random) -> bytes:
    """Slots where they may be, that say what they may not."""
    paths = [*hostile_changes.PATHS, *list(lane.places)[:3]]
    maps = list(lane.segments) or [0]
    made, dead = [], set()
    for path in rng.sample(paths, rng.choice((1, 1, 2))):
        content = hostile_changes.hostile_slot(rng)
        if path in lane.places and rng.random() < 0.8:
            dead.add(lane.places[path])
            home = lane.items[lane.places[path]][0].clock
            origin = lane.places[path] if rng.random() < 0.7 else None
            made.append(slot(content, 7, origin=origin, parent=home, key=path))
        else:
            made.append(slot(content, 7, parent=rng.choice(maps), key=path))
    ranges = [(at, 1) for at in sorted(dead)]
    return update(section(7, lane.clock, *made), deletes={7: ranges} if ranges else {})


def judge(document: Any, change: Change, before: dict[str, Any], version: Version) -> None:
    """What a change may do that was taken in. Raises AssertionError for a forgery."""
    writer = change.writer
    now = version.copy()
    now[writer] = version.get(writer, 0) + 1
    assert document.version == now, f"forgery: {document.version} after {version}"
    after = document.lanes.canonical()
    for path in before.keys() | after.keys():
        old, new = before.get(path, {}), after.get(path, {})
        for owner in (old.keys() | new.keys()) - {writer}:
            if old.get(owner) == new.get(owner):
                continue
            assert owner in old and owner not in new, f"forgery: {path!r} of {owner}"
            assert not path.startswith("c"), f"forgery: a counter's share of {owner} is gone"
            settled = old[owner].value is None or is_settled({**old, **new}, owner)
            assert settled, f"forgery: {path!r} of {owner} is gone"
        made = new.get(writer)
        if made is not None and made != old.get(writer):
            assert all(seq <= version.get(w, 0) for w, seq in made.covers.items()), (
                f"forgery: {path!r} covers what its writer cannot have seen"
            )


def reloaded(document: Any) -> dict[str, Any]:
    """What a document says that is saved and loaded."""
    again = Agent(11)
    again.find_or_make("main", False).join(Snapshot.decode(document.snapshot().encode_plain()))
    found = contents(again)["main"]
    again._close_documents()
    return found


class LaneStates(Blocks):
    """Whole states, as snapshots: parsed, loaded, joined with what is there."""

    def begin(self, rng: random.Random) -> None:
        self.writer, victim, _ = history(rng)
        self.mine = victim.document("main").snapshot()
        # The writer knows more of its own lane, and less of the victim's.
        for agent in (self.writer, victim):
            hostile_changes.act(agent, rng)
            agent.sealed()
        self.theirs = self.writer.document("main").snapshot()
        self.scene = Scene(rng)

    def attack(self, rng: random.Random) -> None:
        if rng.random() < 0.5:
            state = self.give(self.scene.hostile_state())
            try:
                parse_state(state)
            except InvalidUpdate:
                return
            self.taken += 1
            return
        state = self.theirs.state
        if rng.random() < 0.5:
            state = mutated(state, [self.mine.state], rng)
        else:
            state = broken(parse_state(state), rng)
        version = self.theirs.version.copy()
        if rng.random() < 0.3:
            # Of the victim's own writer the core takes nothing that is news to it.
            version[rng.choice((7, 11))] = rng.choice((1, 5, SEQ_MAX))
        ids = {writer: self.theirs.ids.get(writer, bytes(16)) for writer in version}
        heads = {w: seq for w, seq in self.theirs.heads.items() if seq <= version.get(w, 0)}
        hostile = self.theirs._replace(
            state=self.give(state), version=version, ids=ids, heads=heads
        )
        victim = Agent(9)
        document = victim.find_or_make("main", False)
        document.join(self.mine)
        before = document.lanes.canonical()
        try:
            document.join(hostile)
        except InvalidUpdate:
            assert document.lanes.canonical() == before, "a refused snapshot left a trace"
            victim._close_documents()
            return
        self.taken += 1
        newer = {w for w, seq in version.items() if seq > self.mine.version.get(w, 0)}
        if self.mine.version <= version:
            # It is taken as it is: who may make snapshots is believed.
            newer = set(version)
        for path, cell in document.lanes.canonical().items():
            for owner, found in cell.items():
                if owner not in newer:
                    assert before.get(path, {}).get(owner) == found, f"forgery: {path!r} of {owner}"
        hostile_changes.use(victim)
        victim._close_documents()


# Native documents


class NativeChanges(Blocks):
    """Changes to a native document, in causal order."""

    def begin(self, rng: random.Random) -> None:
        # The last is a guest, whose items are carried by a writer that has none of its own.
        members = [Member(writer) for writer in (3, 1000, 2**40, 7000)]
        self.changes: list[tuple[int, bytes]] = []
        for _ in range(rng.randrange(4, 14)):
            member = rng.choice(members)
            for _ in range(rng.randrange(1, 5)):
                member.edit(rng)
            if made := member.native.take():
                writer = 2**41 if is_guest(member.writer) else member.writer
                self.changes.append((writer, made))
                for other in members:
                    if other is not member:
                        other.native.apply(made, writer)
        for member in members:
            member.native.close()
        cut = rng.randrange(len(self.changes))
        base = Member(9)
        for writer, made in self.changes[:cut]:
            base.native.apply(made, writer)
        self.state, self.next = base.native.state(), self.changes[cut]
        base.native.close()

    def attack(self, rng: random.Random) -> None:
        member = Member(9)
        if self.state != b"\0\0":
            member.native.load(self.state)
        others = [made for _, made in self.changes]
        try:
            for _ in range(rng.choice((1, 1, 2, 4))):
                writer, honest = self.next if rng.random() < 0.8 else rng.choice(self.changes)
                damage = rng.choice((mutated, mutated, damaged_native))
                made = self.give(damage(honest, others, rng))
                before, clocks = member.native.state(), dict(member.native._known.clocks)
                try:
                    member.native.apply(made, writer)
                except InvalidUpdate:
                    assert member.native.state() == before, "a refused change left a trace"
                    continue
                self.taken += 1
                after = member.native._known.clocks
                for client in clocks.keys() | after.keys():
                    had, has = clocks.get(client, 0), after.get(client, 0)
                    assert has == had or client == writer or is_guest(client), "forgery"
                    assert has >= had, "something is known no more"
                member.native.exercise()
                check_state(member.native.state())
        finally:
            member.native.close()


class NativeStates(NativeChanges):
    """Whole states of native documents."""

    def attack(self, rng: random.Random) -> None:
        others = [made for _, made in self.changes]
        state = self.give(mutated(self.state, others, rng))
        try:
            check_state(state)
        except InvalidUpdate:
            return
        member = Member(9)
        before = member.native.state()
        try:
            member.native.load(state)
            self.taken += 1
            member.native.exercise()
        except InvalidUpdate:
            # A root is of another type than here.
            assert member.native.state() == before, "a refused state left a trace"
        finally:
            member.native.close()


# Decoders: the only exception is ProtocolError, whatever the bytes


def refuses(take: Any, data: bytes) -> bool:
    try:
        take(data)
    except ProtocolError:
        return True
    return False


class Guards(Blocks):
    """The parsers of the guards, alone: fast, with much damage."""

    def begin(self, rng: random.Random) -> None:
        self.scene = Scene(rng)
        self.clocks = {c: lane.clock for c, lane in parse_state(self.scene.state).items()}

    def attack(self, rng: random.Random) -> None:
        for _ in range(rng.randrange(1, 5)):
            made = self.give(mutated(rng.choice(self.scene.honest), self.scene.honest, rng))
            self.taken += not refuses(parse_change, made)
            known = Known()
            self.taken += not refuses(lambda data: check_change(data, 7, known), made)  # noqa: B023
            self.taken += not refuses(check_state, made)
        state = self.give(mutated(self.scene.state, self.scene.honest, rng))
        self.taken += not refuses(parse_state, state)


class Changes(Blocks):
    """The decoder of changes, with checksums that are right as often as not."""

    def begin(self, rng: random.Random) -> None:
        _, _, changes = history(rng)
        self.changes = [change.data for change in changes]

    def attack(self, rng: random.Random) -> None:
        data = rng.choice(self.changes)
        if rng.random() < 0.3:
            data = mutated(data, self.changes, rng)
        else:
            change = decode_change(data)
            body = mutated(change.body, self.changes, rng)
            made = (
                mutated(change.update, self.changes, rng) if rng.random() < 0.3 else change.update
            )
            if rng.random() < 0.5:
                hashed = hashlib.blake2b(change.update, digest_size=16).digest()
                body = body.replace(hashed, hashlib.blake2b(made, digest_size=16).digest())
            id = hashlib.blake2b(body, digest_size=16).digest()
            data = b"\0" + id + len(body).to_bytes(4, "big") + body + made
        self.taken += not refuses(decode_change, self.give(data))


class Snapshots(Blocks):
    """The decoder of snapshots, packed and plain."""

    def begin(self, rng: random.Random) -> None:
        writer, victim, _ = history(rng)
        snapshots = [agent.document("main").snapshot() for agent in (writer, victim)]
        self.bodies = [snapshot.encode_plain()[16:] for snapshot in snapshots]
        self.packed = [snapshot.encode()[16:] for snapshot in snapshots]

    def attack(self, rng: random.Random) -> None:
        match rng.randrange(3):
            case 0:
                data = mutated(rng.choice(self.bodies), self.packed, rng)
            case 1:
                data = mutated(rng.choice(self.packed), self.bodies, rng)
            case _:
                level = rng.choice((1, 3))
                plain = mutated(rng.choice(self.bodies), self.bodies, rng)
                data = zstandard.ZstdCompressor(level=level).compress(plain)
        data = hashlib.blake2b(data, digest_size=16).digest() + data
        self.taken += not refuses(Snapshot.decode, self.give(data))


class Frames(Blocks):
    """The decoder of messages, and of the records in them."""

    def begin(self, rng: random.Random) -> None:
        self.frames = [wire.encode_frame(frame) for frame in _some_frames(rng)]
        self.records = [_some_record(rng) for _ in range(4)]

    def attack(self, rng: random.Random) -> None:
        match rng.randrange(6):
            case 0:
                data = mutated(wire.encode_message(rng.sample(self.frames, 3)), self.frames, rng)
            case 1:
                raw = mutated(rng.choice(self.frames), self.frames, rng)
                packed = zstandard.ZstdCompressor(level=3).compress(raw)
                size = len(raw) + rng.choice((0, 0, 0, 1, -1, 2**20))
                if rng.random() < 0.3:
                    packed = mutated(packed, self.frames, rng)
                frame = b"\x93\x7f\xce" + max(0, size).to_bytes(4, "big") + msgpack.packb(packed)
                data = bytes([wire.HEADER, 0x91]) + frame
            case 2:
                self.taken += not refuses(
                    wire.decode_record, self.give(mutated(rng.choice(self.records), [], rng))
                )
                return
            case _:
                made = mutated(rng.choice(self.frames), self.frames, rng)
                data = bytes([wire.HEADER, 0x91]) + made
        self.taken += not refuses(wire.decode_message, self.give(data))


def _some_frames(rng: random.Random) -> list[wire.Frame]:
    def number() -> int:
        return rng.choice((1, 5, SEQ_MAX))

    version = Version({number(): number() for _ in range(3)})
    digest = rng.randbytes(32)
    record = _some_record(rng)
    return [
        wire.Hello(1, 1, 7, 5, "a", "agent", "ws://x", True, ("x*",)),
        wire.Bye(1, "x"),
        wire.Heartbeat(5, (1, 2), 3, 5, 6, 7, True, 8),
        wire.Members(((7, 3, record), (8, 1, record))),
        wire.Roll({7: 1, 8: 3}, True),
        wire.Changes((rng.randbytes(rng.randrange(300)), b"x"), True, False),
        wire.Want("x", ((1, 1, 5), (2, 1, 1))),
        wire.Offer("x", digest, 5000),
        wire.Get("x", digest, 500),
        wire.Chunk("x", digest, 0, rng.randbytes(400)),
        wire.Busy("x", 500),
        wire.Ask(5, 1, ("a", "b"), "x", version, True, False),
        wire.Answer(5, "a", version, 3),
        wire.Borrow(),
        wire.Lend(5, {"x": 3}),
        wire.Return(5, {"x": 3, "y": 5}),
        wire.Presence(7, "a", 3, 500, rng.randbytes(20)),
        wire.Compare(5, "x", (1, 2), (), True),
        wire.Compared(5, (wire.Verdict.SAME, wire.Verdict.OTHER)),
        wire.Digests("x", 7, 5, b"", tuple(range(wire.FANOUT)), (), {7: 3}),
        wire.Diverged("x", 7, 5, "mplan\0x", 5, {7: 3}),
    ]


def _some_record(rng: random.Random) -> bytes:
    return wire.encode_record(
        wire.Record(
            7, 5, rng.randrange(1, 9), "a", "agent", False, True, "ws://x", (8, 9), ((3, 4),)
        )
    )


class Certificates(Blocks):
    """The decoder of certificates, also with signatures that are right: a hostile controller's."""

    def begin(self, rng: random.Random) -> None:
        self.seed = rng.randbytes(32)
        self.root = bytes(SigningKey(self.seed).verify_key)
        grants = [certificates.parse_grant("*:rwsc"), certificates.parse_grant("x:r")]
        common: dict[str, Any] = {
            "grants": grants,
            "not_before_ms": 10**12,
            "not_after_ms": 2 * 10**12,
            "serial": rng.randbytes(16),
        }
        seed = rng.randbytes(32)
        boss = certificates.issue(
            self.seed, agent="boss", key=bytes(SigningKey(seed).verify_key), **common
        )
        member = bytes(SigningKey(rng.randbytes(32)).verify_key)
        mine = certificates.issue(seed, agent="a", key=member, parent=boss, **common)
        self.signers = [(self.seed, boss.data), (seed, mine.data)]

    def attack(self, rng: random.Random) -> None:
        seed, data = rng.choice(self.signers)
        others = [each for _, each in self.signers]
        if rng.random() < 0.5:
            data = mutated(data, others, rng)
        else:
            body = mutated(data[:-64], others, rng)
            data = body + certificates.sign(seed, certificates.PURPOSE, body)
        self.give(data)
        try:
            found = certificates.decode_certificate(data, self.root)
        except CRDTStateError:
            return
        self.taken += 1
        assert found.mesh == certificates.mesh_of(self.root)
        assert len(found.grants) <= 32
        for role in "frwsc":
            found.allows(role, "plan")


class Structured(Blocks):
    """Updates of `strategies`, a block at a time, to lanes and to native documents."""

    def run(self, number: int) -> None:
        if number % BLOCK:
            return
        rng = random.Random(f"Structured {number}")
        _, lanes, _ = history(rng)
        base = lanes.document("main").snapshot()
        native = NativeChanges()
        native.begin(rng)

        @hypothesis.seed(number)
        @hypothesis.settings(
            max_examples=BLOCK,
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(strategies.updates(), hypothesis.strategies.booleans())
        def attempt(made: bytes, is_native: bool) -> None:
            self.give(made)
            if is_native:
                self._try_native(native.state, made)
            else:
                self._try_lanes(base, made)

        attempt()

    def _try_lanes(self, base: Snapshot, made: bytes) -> None:
        victim = Agent(9)
        document = victim.find_or_make("main", False)
        document.join(base)
        dot = Dot(7, document.version.get(7, 0) + 1)
        ids = document.ids.get(7, b"")
        change = encode_change("main", dot, {}, 0, 0, False, made, Origin(), prev=ids)
        before, version = document.lanes.canonical(), document.version.copy()
        try:
            document.apply(change)
            self.taken += 1
            judge(document, change, before, version)
            hostile_changes.use(victim)
        except InvalidUpdate:
            assert document.lanes.canonical() == before, "a refused change left a trace"
        finally:
            victim._close_documents()

    def _try_native(self, base: bytes, made: bytes) -> None:
        member = Member(9)
        try:
            if base != b"\0\0":
                member.native.load(base)
            for writer in (7, 3):
                try:
                    member.native.apply(made, writer)
                except InvalidUpdate:
                    continue
                self.taken += 1
                member.native.exercise()
        finally:
            member.native.close()


class Trouble(Blocks):
    """What a target may do, for the test of the supervisor: the fifth sequence does it.

    Args:
        what: "crash", "hang", "panic", "memory" or "forgery".
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def run(self, number: int) -> None:
        self.give(str(number).encode())
        if number != 5:
            return
        match self._what:
            case "crash":
                ctypes.string_at(0)
            case "hang":
                while True:
                    pass
            case "panic":
                raise type("PanicException", (BaseException,), {})("from afar")
            case "memory":
                bytearray(2**40)
            case "forgery":
                raise AssertionError("forgery: of 9")


TARGETS: dict[str, Any] = {
    "lanes": LaneChanges,
    "states": LaneStates,
    "native": NativeChanges,
    "native-states": NativeStates,
    "structured": Structured,
    "guards": Guards,
    "changes": Changes,
    "snapshots": Snapshots,
    "frames": Frames,
    "certificates": Certificates,
    **{
        f"trouble-{what}": functools.partial(Trouble, what)
        for what in ("crash", "hang", "panic", "memory", "forgery")
    },
}

SHARES = {
    "lanes": 30,
    "states": 8,
    "native": 8,
    "native-states": 4,
    "structured": 2,
    "guards": 12,
    "changes": 10,
    "snapshots": 8,
    "frames": 12,
    "certificates": 6,
}
"""Of a campaign, in hundredths."""
