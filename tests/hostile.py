"""
Honest and hostile updates, and a child process in which hostile ones may do their worst.

pycrdt can crash, hang or panic on bytes that a correct yrs never writes. Whoever stands in
front of it is tried here: run as a program, this file makes hostile updates from a seed and
hands each to a *door*. What the door lets through is applied to a real document, which is
then read and encoded. The parent (`run_children`) watches exit codes and the clock.

    python tests/hostile.py guard 7 5000     # door, seed, number of updates
    python tests/hostile.py state 7 5000     # whole states instead of changes

To try another layer, write a class like `GuardDoor` and add it to `DOORS`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from typing import Any, Protocol

from pycrdt import Doc, Map

from crdtstate.errors import InvalidUpdate
from crdtstate.guard import (
    DELETED,
    GC,
    ROOT,
    SEGMENT,
    SLOT,
    ParsedChange,
    ParsedLane,
    encode_deletes,
    join_states,
    parse_change,
    parse_state,
)
from crdtstate.guard import encode_varint as varint

Visible = dict[tuple[str, ...], dict[str, bytes]]
"""The live slots of a document, by the keys of group and segment, and by key."""

GROUP_SEGMENTS = 3


# Honest updates


class Writer:
    """An honest writer and its lane: one transaction per change, each key at most once.

    Args:
        client: Its yrs client id.
        capacity: How many slots a segment takes before the next one is opened.
    """

    def __init__(self, client: int, capacity: int = 4) -> None:
        self.client = client
        self.capacity = capacity
        self.doc: Doc[Any] = Doc(client_id=client)
        self.root = self.doc.get(ROOT, type=Map)
        self.changes: list[bytes] = []
        # key -> the segment its slot is in, by the keys of group and segment
        self.home: dict[str, tuple[str, str]] = {}
        # segment -> slots ever put there, for the living ones
        self.used: dict[tuple[str, str], int] = {}
        self.opened = 0
        self._subscription = self.doc.observe(lambda event: self.changes.append(event.update))
        with self.doc.transaction():
            self._open()

    def write(self, slots: dict[str, bytes | None], clean: bool = False) -> None:
        """Put slots, drop those given as None, and if told so, clean the emptiest segment."""
        with self.doc.transaction():
            for key, content in slots.items():
                self._write(key, content)
            if self.used[self.head] >= self.capacity:
                self._open()
            if clean and len(self.used) > 1:
                self._clean(set(slots))

    def _write(self, key: str, content: bytes | None) -> None:
        home = self.home.pop(key, None)
        if home is not None and (content is None or home != self.head):
            del self._map(home)[key]
        if content is not None:
            self._map(self.head)[key] = content
            self.home[key] = self.head
            self.used[self.head] += 1

    def _open(self) -> None:
        group = f"{self.client}/{self.opened // GROUP_SEGMENTS}"
        if self.opened % GROUP_SEGMENTS == 0:
            self.root[group] = Map({})
        self.head = (group, str(self.opened))
        self.opened += 1
        self.root[group][self.head[1]] = Map({})
        self.used[self.head] = 0

    def _map(self, name: tuple[str, str]) -> Any:
        return self.root[name[0]][name[1]]

    def _clean(self, written: set[str]) -> None:
        live = {name: [key for key in self.home if self.home[key] == name] for name in self.used}
        del live[self.head]
        name = min(live, key=lambda name: len(live[name]))
        if written.intersection(live[name]):
            return  # written in this change, to what was the head then
        for key in live[name]:
            self._map(self.head)[key] = bytes(self._map(name)[key])
            self.home[key] = self.head
            self.used[self.head] += 1
        del self.used[name]
        if any(group == name[0] for group, _ in [*self.used, self.head]):
            del self.root[name[0]][name[1]]
        else:
            del self.root[name[0]]


def honest_writer(client: int, rng: random.Random, changes: int, keys: int = 6) -> Writer:
    """A writer with a random history of that many changes."""
    writer = Writer(client, capacity=rng.choice([2, 4, 50]))
    while len(writer.changes) < changes:
        size = rng.choice([1, 1, 1, 2, 5])
        names = rng.sample([f"k{n}" if n else "" for n in range(keys)], min(size, keys))
        slots = {
            name: None if rng.random() < 0.3 else rng.randbytes(rng.choice([0, 3, 130]))
            for name in names
        }
        writer.write(slots, clean=rng.random() < 0.3)
    return writer


def load(*updates: bytes) -> Doc[Any]:
    """A fresh document with these updates applied."""
    doc: Doc[Any] = Doc()
    doc.get(ROOT, type=Map)
    for update in updates:
        doc.apply_update(update)
    return doc


def visible(doc: Doc[Any]) -> Visible:
    """What pycrdt shows of a document of lanes."""
    shown: Visible = {}

    def show(name: tuple[str, ...], held: dict[str, Any]) -> None:
        slots = shown[name] = {}
        for key, content in held.items():
            if isinstance(content, dict):
                show((*name, key), content)
            else:
                slots[key] = bytes(content)

    for key, held in (doc.get(ROOT, type=Map).to_py() or {}).items():
        show((key,), held)
    return shown


def visible_in(lanes: dict[int, ParsedLane]) -> Visible:
    """What the guard saw in a state."""
    shown: Visible = {}
    for lane in lanes.values():
        names: dict[int | str | None, tuple[str, ...]] = {ROOT: ()}
        for clock, _, kind, _, parent, key, content in lane.structs:
            if kind == SEGMENT:
                assert isinstance(key, str)
                names[clock] = (*names[parent], key)
                shown[names[clock]] = {}
            elif kind == SLOT:
                assert isinstance(parent, int) and key is not None and content is not None
                shown[names[parent]][key] = content
    return shown


# Update bytes by hand


def text(string: str | bytes) -> bytes:
    data = string.encode() if isinstance(string, str) else string
    return varint(len(data)) + data


def item(
    kind: int,
    content: bytes,
    client: int = 7,
    *,
    origin: int | None = None,
    right: int | None = None,
    parent: int | str = ROOT,
    key: str | bytes | None = None,
) -> bytes:
    """One item; its origins and parent are of *client*."""
    info = kind | (origin is not None) << 7 | (right is not None) << 6
    info |= (key is not None or origin is not None) << 5
    out = bytes([info])
    for reference in (origin, right):
        if reference is not None:
            out += varint(client) + varint(reference)
    if origin is None and right is None:
        if isinstance(parent, str):
            out += b"\x01" + text(parent)
        else:
            out += b"\x00" + varint(client) + varint(parent)
        if key is not None:
            out += text(key)
    return out + content


def slot(
    content: bytes = b"v",
    client: int = 7,
    *,
    origin: int | None = None,
    parent: int | str = 0,
    key: str | bytes | None = "k",
) -> bytes:
    buffer = b"\x01\x74" + text(content)
    return item(SLOT, buffer, client, origin=origin, parent=parent, key=key)


def segment(name: str = "7/0", client: int = 7, *, parent: int | str = ROOT) -> bytes:
    return item(SEGMENT, b"\x01", client, parent=parent, key=name)


def deleted(
    length: int, *, origin: int | None = None, parent: int | str = 0, key: str = "k"
) -> bytes:
    return item(DELETED, varint(length), origin=origin, parent=parent, key=key)


def gc(length: int) -> bytes:
    return bytes([GC]) + varint(length)


def section(client: int, clock: int, *structs: bytes) -> bytes:
    return varint(len(structs)) + varint(client) + varint(clock) + b"".join(structs)


def update(*sections: bytes, deletes: dict[int, list[tuple[int, int]]] | None = None) -> bytes:
    return varint(len(sections)) + b"".join(sections) + encode_deletes(deletes or {})


# Hostile updates


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Honest bytes, damaged."""
    out = bytearray(data)
    match rng.randrange(6):
        case 0:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case 1:
            for _ in range(rng.randrange(1, 4)):
                out[rng.randrange(len(out))] = rng.randrange(256)
        case 2:
            out[rng.randrange(len(out))] = rng.choice([0, 1, 2, 0x7F, 0x80, 0xFF])
        case 3:
            other = rng.choice(others)
            at = rng.randrange(len(other))
            out[rng.randrange(len(out)) :] = other[at : at + rng.randrange(60)]
        case 4:
            del out[rng.randrange(len(out)) :]
        case 5:
            out += rng.randbytes(rng.randrange(1, 9))
    return bytes(out)


def plausible(client: int, clock: int, rng: random.Random) -> bytes:
    """The right shape, next in order, but with origins, parents and deletes that are not."""
    structs = []
    for own in range(clock, clock + rng.choice([0, 1, 1, 1, 2, 3, 8])):
        key = rng.choice(["k0", "k1", "k2", "new", ""])
        origin = rng.randrange(max(1, own)) if rng.random() < 0.5 else None
        if rng.random() < 0.75:
            within = rng.randrange(max(1, own))
            structs.append(slot(rng.randbytes(2), client, origin=origin, parent=within, key=key))
        else:
            within = rng.choice([ROOT, ROOT, rng.randrange(max(1, own))])
            name = rng.choice([f"{client}/{rng.randrange(5)}", f"{client}/{own}", str(own), key])
            made = item(SEGMENT, b"\x01", client, origin=origin, parent=within, key=name)
            structs.append(made)
    ranges = []
    at = 0
    while rng.random() < 0.6 and at < clock:
        start = rng.randrange(at, clock)
        ranges.append((start, rng.randrange(1, clock - start + 1)))
        at = sum(ranges[-1]) + 1
    sections = [section(client, clock, *structs)] if structs else []
    return update(*sections, deletes={client: ranges} if ranges else {})


def wild(client: int, clock: int, rng: random.Random) -> bytes:
    """Well-formed Yjs with anything in it that the encoding can say."""

    def content(kind: int) -> bytes:
        size = rng.choice([0, 1, 1, 2, 100])
        match kind:
            case 1 | 10:
                return varint(size)
            case 2:
                return varint(size) + text("[1]") * size
            case 3:
                return text(rng.randbytes(size))
            case 4 | 5:
                return text("x" * size)
            case 6:
                return text("bold") + text("true")
            case 7:
                return varint(rng.choice([0, 1, 1, 1, 2, 3, 4, 6]))
            case 8:
                return varint(size) + b"".join(
                    rng.choice([b"\x74\x01v", b"\x77\x01s", b"\x7e", b"\x76\x00", b"\x75\x01\x7f"])
                    for _ in range(size)
                )
            case 9:
                return text("guid") + b"\x76\x00"
        return varint(size)

    def reference() -> int | None:
        return rng.randrange(clock + 3) if rng.random() < 0.3 else None

    def struct() -> bytes:
        kind = rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 8, 9, 10])
        if kind in (0, 10):
            return bytes([kind]) + content(1)
        parent: int | str = rng.choice([ROOT, "other"]) if rng.random() < 0.5 else rng.randrange(9)
        key = rng.choice([None, "k1", "k2"])
        return item(
            kind,
            content(kind),
            client,
            origin=reference(),
            right=reference(),
            parent=parent,
            key=key,
        )

    sections = [
        section(
            rng.choice([client, client, client + 1]),
            rng.choice([clock, clock, clock, 0, 2**31, 2**32 - 2]),
            *[struct() for _ in range(rng.randrange(1, 6))],
        )
        for _ in range(rng.choice([1, 1, 1, 2]))
    ]
    ranges = [(rng.randrange(clock + 3), rng.choice([0, 1, 5, 2**31])) for _ in range(2)]
    return update(*sections, deletes={client: ranges} if rng.random() < 0.3 else {})


def broken(lanes: dict[int, ParsedLane], rng: random.Random) -> bytes:
    """A state with some structs altered, and a delete set that agrees with the result."""
    sections = []
    deletes: dict[int, list[tuple[int, int]]] = {}
    for client in sorted(lanes, reverse=True):
        structs: list[list[Any]] = [list(struct) for struct in lanes[client].structs]
        for _ in range(rng.randrange(3)):
            struct = rng.choice(structs)
            match rng.randrange(7):
                case 0:
                    struct[1] = rng.choice([1, 2, 1000])
                case 1:
                    struct[2] = rng.choice([GC, DELETED, SEGMENT, SLOT])
                case 2:
                    struct[3] = rng.choice([None, rng.randrange(lanes[client].clock)])
                case 3:
                    struct[4] = rng.choice([ROOT, 0, rng.randrange(lanes[client].clock)])
                case 4:
                    struct[5] = rng.choice(["k0", "k1", "new", f"{client}/1"])
                case 5 if len(structs) > 1:
                    structs.remove(struct)
                case 6:
                    structs.insert(rng.randrange(len(structs)), list(struct))
        parts = []
        dead: list[tuple[int, int]] = []
        clock = 0
        for _, length, kind, origin, parent, key, content in structs:
            place: dict[str, Any] = {"origin": origin, "parent": parent or 0, "key": key or ""}
            match kind:
                case 0:
                    parts.append(gc(length))
                case 1:
                    parts.append(item(DELETED, varint(length), client, **place))
                case 7:
                    parts.append(item(SEGMENT, b"\x01", client, **place))
                    length = 1
                case 8:
                    parts.append(slot(content or b"", client, **place))
                    length = 1
            if kind in (GC, DELETED):
                if dead and sum(dead[-1]) == clock:
                    dead[-1] = (dead[-1][0], dead[-1][1] + length)
                else:
                    dead.append((clock, length))
            clock += length
        sections.append(section(client, 0, *parts))
        if dead:
            deletes[client] = dead
    return update(*sections, deletes=deletes)


# The child


class Scene:
    """A document in the middle of its history.

    Args:
        rng: Decides over everything.
    """

    def __init__(self, rng: random.Random) -> None:
        clients = rng.sample([1, 7, 200, 2**40, 2**53 - 1], rng.randrange(1, 4))
        writers = [honest_writer(client, rng, rng.randrange(2, 30)) for client in clients]
        cuts = [rng.randrange(1, len(writer.changes)) for writer in writers]
        past = [change for w, cut in zip(writers, cuts, strict=True) for change in w.changes[:cut]]
        self.rng = rng
        self.state = load(*past).get_update()
        self.next = [w.changes[cut] for w, cut in zip(writers, cuts, strict=True)]
        self.honest = [change for writer in writers for change in writer.changes]

    def hostile_change(self, clocks: dict[int, int]) -> bytes:
        client = self.rng.choice(list(clocks))
        match self.rng.randrange(6):
            case 0:
                return mutated(self.rng.choice(self.next), self.honest, self.rng)
            case 1:
                return wild(client, clocks[client], self.rng)
            case 2:
                change = plausible(client, clocks[client], self.rng)
                return mutated(change, self.honest, self.rng)
            case _:
                return plausible(client, clocks[client], self.rng)

    def hostile_state(self) -> bytes:
        change = broken(parse_state(self.state), self.rng)
        if self.rng.random() < 0.3:
            return mutated(change, [self.state, *self.honest], self.rng)
        return change


class Door(Protocol):
    """Decides over the updates for one document that starts as *state*."""

    doc: Doc[Any]
    clocks: dict[int, int]
    """The next clock of each client, so that hostile updates can be next in order."""

    def __init__(self, state: bytes) -> None: ...

    def accept(self, update: bytes) -> bool:
        """Apply *update* to the document if it is fit to be; say whether it was."""
        ...


class GuardDoor:
    """The guard and causal order, and nothing else: no signature, no index of the lanes."""

    def __init__(self, state: bytes) -> None:
        self.doc = load(state)
        self.clocks = {client: lane.clock for client, lane in parse_state(state).items()}

    def accept(self, update: bytes) -> bool:
        try:
            change = parse_change(update)
        except InvalidUpdate:
            return False
        if not self._is_next(change):
            return False
        self.doc.apply_update(update)
        if change.client is not None:
            self.clocks[change.client] = change.clock + len(change.items)
        return True

    def _is_next(self, change: ParsedChange) -> bool:
        if change.client is not None and change.clock != self.clocks.get(change.client, 0):
            return False
        return all(start + n <= self.clocks.get(client, 0) for client, start, n in change.deletes)


DOORS: dict[str, type[Door]] = {"guard": GuardDoor}


def try_changes(door_name: str, scene: Scene, count: int) -> dict[str, int]:
    """Feed *count* hostile changes to doors of that name. Return how many of each fate."""
    fates = {"accepted": 0, "refused": 0, "refused by yrs": 0}
    while sum(fates.values()) < count:
        door = DOORS[door_name](scene.state)
        for _ in range(scene.rng.randrange(1, 8)):
            update = scene.hostile_change(door.clocks)
            report(update)
            try:
                accepted = door.accept(update)
            except RuntimeError:
                fates["refused by yrs"] += 1
                break
            fates["accepted" if accepted else "refused"] += 1
            if accepted:
                door.doc.get(ROOT, type=Map).to_py()
                load(door.doc.get_update()).get(ROOT, type=Map).to_py()
    return fates


def try_states(scene: Scene, count: int) -> dict[str, int]:
    """Hand *count* hostile states to the guard; pycrdt must show what the guard saw."""
    fates = {"accepted": 0, "refused": 0}
    for _ in range(count):
        state = scene.hostile_state()
        report(state)
        try:
            lanes = parse_state(state)
        except InvalidUpdate:
            fates["refused"] += 1
            continue
        fates["accepted"] += 1
        doc = load(state)
        assert visible(doc) == visible_in(lanes)
        assert visible_in(parse_state(doc.get_update())) == visible_in(lanes)
        joined = load(join_states(scene.state, state, lambda client: scene.rng.random() < 0.5))
        assert visible_in(parse_state(joined.get_update())) == visible(joined)
    return fates


def report(update: bytes) -> None:
    """Say what comes next, past all buffers: it may be the last word."""
    os.write(1, update.hex().encode() + b"\n")


def main(door_name: str, seed: int, count: int) -> None:
    rng = random.Random(seed)
    total: Counter[str] = Counter()
    while total.total() < count:
        scene = Scene(rng)
        if door_name == "state":
            total.update(try_states(scene, 40))
        else:
            total.update(try_changes(door_name, scene, 80))
    print(json.dumps(total), flush=True)


# The parent


def run_children(
    door_name: str, seeds: list[int], count: int, seconds: float, program: str = __file__
) -> Counter[str]:
    """Run a child for each seed, side by side. Return the fates of all updates.

    Raises:
        AssertionError: A child crashed, panicked or hung. Tells its last update.
    """
    deadline = time.monotonic() + seconds
    children = []
    for seed in seeds:
        log = tempfile.TemporaryFile()
        command = [sys.executable, program, door_name, str(seed), str(count)]
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        children.append((command, child, log))
    fates: Counter[str] = Counter()
    for command, child, log in children:
        with log:
            try:
                code = child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                code = child.wait()
            log.seek(0)
            lines = log.read().decode().splitlines()
            assert code == 0, f"{command}: exit code {code} after {lines[-20:]}"
            fates.update(json.loads(lines[-1]))
    return fates


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
