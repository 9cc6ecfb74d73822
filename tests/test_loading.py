"""What is loaded is what was there; and what breaks a rule is refused, alone or among many."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator

import msgpack
import pytest
from hostile import deleted, item, section, segment, slot, update

from crdtstate import lanes as lanes_module
from crdtstate.clock import Version
from crdtstate.document import Document
from crdtstate.errors import InvalidUpdate
from crdtstate.guard import DELETED, RUN_MIN, SEGMENT, SLOT, Run, Struct, parse_state
from crdtstate.lanes import Lanes
from crdtstate.slots import Slot
from crdtstate.values import pack

from lanes_model import Model  # isort: skip


# Runs


def lane_of(rng: random.Random, maps: int, count: int) -> tuple[list[bytes], list[Struct]]:
    """A lane of slots and deleted runs, most of which begin chains, as bytes and as structs."""
    encoded = [segment("7/0"), *(segment(str(n), parent=0) for n in range(1, maps + 1))]
    structs: list[Struct] = [(0, 1, SEGMENT, None, "lanes", "7/0", None)]
    structs += [(n, 1, SEGMENT, None, 0, str(n), None) for n in range(1, maps + 1)]
    clock, parent = maps + 1, 1
    ends: dict[int, tuple[int, str]] = {}
    for number in range(count):
        if rng.random() < 0.2:
            parent = rng.randrange(1, maps + 1)
        origin = rng.choice(list(ends)) if ends and rng.random() < 0.1 else None
        key = f"k{number}" + "\u00e4" * rng.choice([0, 0, 3, 62, 63, 64, 300])
        place = (parent, key) if origin is None else ends.pop(origin)
        if rng.random() < 0.2:
            length = rng.choice([1, 1, 2, 200])
            encoded.append(deleted(length, origin=origin, parent=place[0], key=place[1]))
            structs.append((clock, length, DELETED, origin, *place, None))
            ends[clock + length - 1] = place
        else:
            length, content = 1, rng.randbytes(rng.choice([0, 1, 127, 128, 300]))
            encoded.append(slot(content, origin=origin, parent=place[0], key=place[1]))
            structs.append((clock, 1, SLOT, origin, *place, content))
        clock += length
    return encoded, structs


def state_of(encoded: list[bytes], structs: list[Struct]) -> bytes:
    dead: list[tuple[int, int]] = []
    for clock, length, kind, *_ in structs:
        if kind == DELETED and dead and sum(dead[-1]) == clock:
            dead[-1] = (dead[-1][0], dead[-1][1] + length)
        elif kind == DELETED:
            dead.append((clock, length))
    return update(section(7, 0, *encoded), deletes={7: dead} if dead else {})


@pytest.mark.parametrize("seed", range(60))
def test_a_lane_is_read_struct_by_struct_however_its_structs_lie(seed: int) -> None:
    rng = random.Random(seed)
    encoded, structs = lane_of(rng, rng.choice([1, 2, 5]), rng.randrange(40))

    lane = parse_state(state_of(encoded, structs))[7]

    assert lane.structs == structs
    assert lane.clock == sum(length for _, length, *_ in structs)
    assert lane.body == section(7, 0, *encoded)
    assert all(part.size >= RUN_MIN for part in lane.parts if isinstance(part, Run))


def test_many_slots_of_one_map_are_one_run() -> None:
    slots = [slot(str(n).encode(), key=str(n)) for n in range(1000)]

    parts = parse_state(update(section(7, 0, segment(), *slots)))[7].parts

    assert len(parts) <= 4
    assert sum(part.size for part in parts if isinstance(part, Run)) >= 997


# Lanes and index


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "SEGMENT_SLOTS", 20)


def shadow(lanes: Lanes) -> object:
    """Everything that is known of where slots lie, and what the index says."""
    return {
        "lanes": {
            writer: (
                lane.clock,
                lane.places,
                {clock: (segment.clock, path) for clock, (segment, path) in lane.items.items()},
                {
                    clock: (seg.tails, seg.live, seg.group.clock)
                    for clock, seg in lane.segments.items()
                },
                {clock: group.live for clock, group in lane.groups.items()},
                lane.head and lane.head.clock,
                lane.last and lane.last.clock,
            )
            for writer, lane in lanes.lanes.items()
            if lane.clock
        },
        "index": {
            name: (container.cells, container.dead, container.contested)
            for name, container in lanes.containers.items()
            if container.cells
        },
    }


@pytest.mark.parametrize("seed", range(12))
def test_what_is_loaded_is_what_was_there(small_segments: None, seed: int) -> None:
    rng = random.Random(seed)
    ticks: Iterator[int] = iter(range(1, 10**6))
    models = [Model(writer, ticks) for writer in (3, 5)]
    for step in range(120):
        model = rng.choice(models)
        document = model.document
        for _ in range(rng.choice([1, 1, 12])):
            key = f"k{rng.randrange(60)}"
            removes = rng.random() < 0.3
            document.put("mplan", key, None if removes else pack([step, key], "v"))
        document.put("sskills", f"i{rng.randrange(9)}", pack(True, "v"))
        document.count("cn", 1, 0)
        change = document.seal()
        if change is not None:
            model.inbox.append((change, []))
        if rng.random() < 0.5:
            # The other one hears of it all.
            other = models[model is models[0]]
            for theirs, _ in model.inbox:
                if other.document.is_ready(theirs):
                    other.document.apply(theirs)
            model.inbox = [
                each for each in model.inbox if not other.document.version.covers(each[0].dot)
            ]
    for model in models:
        document = model.document
        assert any(len(c.contested) or len(c.dead) for c in document.lanes.containers.values())
        again = Lanes(document.writer)

        again.load(document.lanes.state(), document.version)

        assert shadow(again) == shadow(document.lanes)
        again.close()
        document.close()


# Refusals

MINE = Version({7: 5, 9: 3})
GOOD = Slot(pack(1, "v"), 3, 8, {9: 2})


def encoded(**changed: object) -> bytes:
    return GOOD._replace(**changed).encode()  # type: ignore[arg-type]


REFUSED = {
    "a slot of a change to come": ("mplan\0k", encoded(seq=6), "newer than its document"),
    "covers of itself": ("mplan\0k", encoded(covers={7: 1}), "covers itself"),
    "covers of what is to come": ("mplan\0k", encoded(covers={9: 4}), "covers what is newer"),
    "covers of nobody": ("mplan\0k", encoded(covers={0: 1}), "covered writer is out of range"),
    "a slot that is no msgpack": ("mplan\0k", b"\xc1", "not valid msgpack"),
    "a slot with bytes behind it": ("mplan\0k", encoded() + b"\0", "not valid msgpack"),
    "a slot that is cut off": ("mplan\0k", encoded()[:-1], "not valid msgpack"),
    "a slot of two": ("mplan\0k", bytes(msgpack.packb([b"\1", 3])), "wrong shape"),
    "a slot of five": ("mplan\0k", bytes(msgpack.packb([b"\1", 3, 8, [], 0])), "wrong shape"),
    "a slot that is a number": ("mplan\0k", b"\x07", "wrong shape"),
    "a text for a value": ("mplan\0k", bytes(msgpack.packb(["x", 3, 8])), "value is not bytes"),
    "True for a seq": ("mplan\0k", bytes(msgpack.packb([b"\1", True, 8])), "seq is out of range"),
    "seq 0": ("mplan\0k", encoded(seq=0), "seq is out of range"),
    "a stamp beyond all": ("mplan\0k", encoded(stamp=2**63), "stamp is out of range"),
    "a value that is no msgpack": ("mplan\0k", encoded(value=b"\xc1"), "not a packed value"),
    "a value with bytes behind it": ("mplan\0k", encoded(value=b"\1\1"), "not a packed value"),
    "no value at all": ("mplan\0k", encoded(value=b""), "not a packed value"),
    "a value that is too deep": ("mplan\0k", encoded(value=b"\x91" * 65 + b"\1"), "deeper than"),
    "a key that is a list": ("mplan\0k", encoded(value=b"\x81\x91\1\1"), "not a packed value"),
    "a key that is NaN": ("mplan\0k", encoded(value=b"\x81\xca\x7f\xc0\0\0\1"), "keys that cannot"),
    "a path that is none": ("mplan", encoded(), "is not a path"),
    "a path without a name": ("m\0k", encoded(), "is not a path"),
    "an empty container": ("\0k", encoded(), "is not a path"),
    "a path of an unknown kind": ("zplan\0k", encoded(), "is not a path"),
    "an element that is none": ("sskills\0i1.5", encoded(), "not an element of a set"),
    "a counter without totals": ("cn\0", encoded(), "totals have the wrong shape"),
    "a counter with a key": ("cn\0k", encoded(value=pack([1, 0], "v")), "has a key"),
    "a register with a key": ("rleader\0k", encoded(), "has a key"),
    "a strategy that is a number": ("@strategies\0mplan", encoded(), "holds no name"),
    "a strategy that is removed": ("@strategies\0mplan", encoded(value=None), "holds no name"),
}


def lane_with(path: str, content: bytes, *, before: int, behind: int, good: bytes) -> bytes:
    """A state with one slot among others of the same segment."""
    head = [item(SEGMENT, b"\x01", key="7/0"), item(SEGMENT, b"\x01", parent=0, key="1")]
    slots = [slot(good, parent=1, key=f"mplan\0a{n}") for n in range(before)]
    slots.append(slot(content, parent=1, key=path))
    slots += [slot(good, parent=1, key=f"mplan\0b{n}") for n in range(behind)]
    return update(section(7, 0, *head, *slots))


@pytest.mark.parametrize(("before", "behind"), [(0, 0), (1, 0), (2, 0), (9, 9)])
@pytest.mark.parametrize("name", REFUSED)
def test_a_state_is_refused_for_one_slot(name: str, before: int, behind: int) -> None:
    path, content, reason = REFUSED[name]
    lanes = Lanes(9)
    lanes.load(lane_with("mplan\0k", encoded(), before=2, behind=0, good=encoded()), MINE)
    was = shadow(lanes)

    with pytest.raises(InvalidUpdate, match=reason):
        lanes.load(lane_with(path, content, before=before, behind=behind, good=encoded()), MINE)

    assert shadow(lanes) == was
    lanes.close()


GROUPS = [segment("7/0"), segment("1", parent=0), segment("2", parent=0)]


def many(parent: int, names: str) -> list[bytes]:
    return [slot(encoded(), parent=parent, key=f"mplan\0{name}") for name in names]


MISPLACED = {
    "one path in two segments": ([*GROUPS, *many(1, "abcdefgh"), *many(2, "stuvwxya")], "L4"),
    "one path in two segments, one by one": ([*GROUPS, *many(1, "a"), *many(2, "a")], "L4"),
    "slots in a group": ([*GROUPS, *many(0, "abcdefgh")], "no segment"),
    "a slot in a group": ([*GROUPS, *many(0, "a")], "no segment"),
    "a group of another number": ([segment("7/1")], "a group outside"),
    "a segment of another number": ([segment("7/0"), segment("2", parent=0)], "no segment"),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_a_state_is_refused_in_which_something_lies_where_it_cannot(name: str) -> None:
    structs, reason = MISPLACED[name]
    lanes = Lanes(9)

    with pytest.raises(InvalidUpdate, match=reason):
        lanes.load(update(section(7, 0, *structs)), MINE)

    assert not lanes.lanes and not lanes.containers
    lanes.close()


# The collector


@pytest.fixture
def loaded() -> Iterator[Document]:
    model = Model(3, iter(range(1, 1000)))
    model.document.put("mplan", "k", pack(1, "v"))
    model.document.seal()
    yield model.document
    model.document.close()


def test_loading_leaves_the_collector_as_it_was(loaded: Document) -> None:
    for wanted in (gc.disable, gc.enable):
        wanted()
        was = gc.isenabled()
        try:
            loaded.lanes.load(loaded.lanes.state(), loaded.version)
            assert gc.isenabled() == was
            with pytest.raises(InvalidUpdate):
                loaded.lanes.load(b"\1", loaded.version)
            assert gc.isenabled() == was
        finally:
            gc.enable()


def test_loading_does_not_thaw_what_somebody_froze(loaded: Document) -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()

        loaded.lanes.load(loaded.lanes.state(), loaded.version)

        assert gc.get_freeze_count() > 0.9 * frozen
    finally:
        gc.unfreeze()


def test_loading_freezes_nothing(loaded: Document) -> None:
    loaded.lanes.load(loaded.lanes.state(), loaded.version)

    assert gc.get_freeze_count() == 0
