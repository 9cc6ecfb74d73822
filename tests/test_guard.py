"""The guard lets through all that honest lanes write, and nothing else."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hostile import (
    Visible,
    Writer,
    deleted,
    gc,
    honest_writer,
    item,
    load,
    run_children,
    section,
    segment,
    slot,
    text,
    update,
    visible,
    visible_in,
)
from pycrdt import Map

from crdtstate.errors import InvalidUpdate
from crdtstate.guard import (
    CHANGE_BYTES_MAX,
    CHANGE_DELETED_MAX,
    CHANGE_ITEMS_MAX,
    CHANGE_RANGES_MAX,
    CLOCK_MAX,
    DELETED,
    GC,
    KEY_BYTES_MAX,
    ROOT,
    SEGMENT,
    SLOT,
    STATE_LANES_MAX,
    ParsedChange,
    encode_state,
    encode_varint,
    join_states,
    parse_change,
    parse_state,
)


class Reader:
    """Knows of a document only what the guard read in its changes."""

    def __init__(self) -> None:
        # (client, clock) of every item -> where it stands; and the content of those alive
        self.places: dict[tuple[int, int], tuple[int | str | None, str | None]] = {}
        self.alive: dict[tuple[int, int], bytes | None] = {}

    def take(self, change: ParsedChange) -> None:
        for client, start, length in change.deletes:
            for clock in range(start, start + length):
                del self.alive[client, clock]
        for at, (origin, parent, key, content) in enumerate(change.items):
            assert change.client is not None
            dot = (change.client, change.clock + at)
            if origin is None:
                place = (parent, key)
            else:
                assert (change.client, origin) not in self.alive
                place = self.places[change.client, origin]
            self.places[dot] = place
            self.alive[dot] = content

    def visible(self) -> Visible:
        shown: Visible = {}
        names: dict[tuple[int, int | str | None], tuple[str, ...]] = {}
        for dot, content in sorted(self.alive.items()):
            parent, key = self.places[dot]
            assert key is not None
            if content is None:
                names[dot] = (key,) if parent == ROOT else (*names[dot[0], parent], key)
                shown[names[dot]] = {}
            else:
                shown[names[dot[0], parent]][key] = content
        return shown


# Honest updates


@pytest.mark.parametrize("seed", range(30))
def test_every_change_of_an_honest_writer_says_what_pycrdt_did(seed):
    rng = random.Random(seed)
    writer = Writer(rng.choice([1, 127, 128, 2**53 - 1]), capacity=rng.choice([2, 4, 50]))
    reader = Reader()
    for step in range(80):
        keys = rng.sample("abcdefgh", rng.choice([1, 1, 2, 5]))
        slots = {key: None if rng.random() < 0.3 else rng.randbytes(step * 3) for key in keys}

        writer.write(slots, clean=rng.random() < 0.3)

        for change in writer.changes:
            reader.take(parse_change(change))
        writer.changes.clear()
        assert reader.visible() == visible(writer.doc)


@pytest.mark.parametrize("seed", range(20))
def test_every_state_of_an_honest_document_is_read_and_written_alike(seed):
    rng = random.Random(seed)
    clients = rng.sample([1, 7, 300, 2**40, 2**53 - 1], 3)
    writers = [honest_writer(client, rng, 40) for client in clients]
    remote = load()
    queues = [list(writer.changes) for writer in writers]
    while any(queues):
        remote.apply_update(rng.choice([queue for queue in queues if queue]).pop(0))
        state = remote.get_update()

        lanes = parse_state(state)

        assert visible_in(lanes) == visible(remote)
        assert encode_state(lanes) == state
    reloaded = load(remote.get_update())
    assert visible_in(parse_state(reloaded.get_update())) == visible(reloaded) == visible(remote)
    assert visible(remote) == {k: v for w in writers for k, v in visible(w.doc).items()}


def test_an_empty_update_is_a_change_of_nobody_and_a_state_of_nothing():
    assert parse_change(b"\0\0") == (None, 0, [], [])
    assert parse_state(b"\0\0") == {}
    assert encode_state({}) == b"\0\0"


def test_a_change_is_read_item_by_item():
    change = update(
        section(7, 5, segment("7/1"), slot(b"", origin=3), slot(b"x", parent=5, key="")),
        deletes={7: [(0, 1), (3, 2)]},
    )

    assert parse_change(change) == ParsedChange(
        client=7,
        clock=5,
        items=[(None, ROOT, "7/1", None), (3, None, None, b""), (None, 5, "", b"x")],
        deletes=[(7, 0, 1), (7, 3, 2)],
    )


def test_a_state_is_read_struct_by_struct():
    body = section(
        7, 0, segment("7/0"), deleted(3, key="a"), slot(b"A", origin=3), gc(2), slot(b"B", key="b")
    )

    lanes = parse_state(update(body, deletes={7: [(1, 3), (5, 2)]}))

    assert lanes[7].clock == 8
    assert lanes[7].deletes == [(1, 3), (5, 2)]
    assert lanes[7].body == body
    assert lanes[7].structs == [
        (0, 1, SEGMENT, None, ROOT, "7/0", None),
        (1, 3, DELETED, None, 0, "a", None),
        (4, 1, SLOT, 3, 0, "a", b"A"),
        (5, 2, GC, None, None, None, None),
        (7, 1, SLOT, None, 0, "b", b"B"),
    ]


# Joins


@pytest.mark.parametrize("seed", range(60))
def test_a_join_of_two_states_is_what_yrs_would_merge(seed):
    rng = random.Random(seed)
    clients = rng.sample([1, 7, 300, 90_000, 2**40, 2**53 - 1], 4)
    histories = {client: honest_writer(client, rng, 25).changes for client in clients}
    ours, theirs = (
        {client: rng.randrange(len(histories[client]) + 1) for client in clients} for _ in "ab"
    )
    both = {client: max(ours[client], theirs[client]) for client in clients}

    def state(seen: dict[int, int]) -> bytes:
        return load(
            *(c for client in clients for c in histories[client][: seen[client]])
        ).get_update()

    # Once each: what yrs does not fold differs from time to time.
    here, there = state(ours), state(theirs)
    joined = join_states(here, there, lambda c: theirs[c] > ours[c])
    reverse = join_states(there, here, lambda c: ours[c] > theirs[c])

    assert visible(load(joined)) == visible(load(reverse))
    assert load(joined).get_update() == load(reverse).get_update()
    assert visible(load(joined)) == visible(load(here, there))
    assert visible(load(joined)) == visible(load(state(both)))
    assert visible_in(parse_state(joined)) == visible(load(joined))
    clocks = {client: lane.clock for client, lane in parse_state(state(both)).items()}
    assert {client: lane.clock for client, lane in parse_state(joined).items()} == clocks


@pytest.mark.parametrize("seed", range(30))
def test_a_join_keeps_what_others_deleted_in_a_lane(seed):
    # As an adopter does: deletes in another's lane, while that one may still be writing.
    rng = random.Random(seed)
    writer = honest_writer(7, rng, 30)
    cut = rng.randrange(2, len(writer.changes))
    ours, theirs = load(*writer.changes[:cut]), load(*writer.changes)
    for doc in (ours, theirs):
        for name, slots in visible(doc).items():
            held: Any = doc.get(ROOT, type=Map)
            for step in name:
                held = held[step]
            for key in slots:
                if rng.random() < 0.3:
                    del held[key]

    joined = join_states(ours.get_update(), theirs.get_update(), lambda client: True)

    merged = load(ours.get_update(), theirs.get_update())
    assert visible(load(joined)) == visible(merged)
    state = load(joined).get_update()
    assert visible_in(parse_state(state)) == visible(merged)


def test_a_join_deletes_nothing_past_the_end_of_a_section():
    ours = update(section(7, 0, segment()))
    theirs = update(section(7, 0, segment(), deleted(2), gc(3)), deletes={7: [(1, 5)]})

    assert join_states(ours, theirs, lambda client: False) == ours
    assert join_states(ours, theirs, lambda client: True) == theirs


def test_a_joined_document_goes_on_in_either_lane():
    a, b = Writer(7), Writer(9)
    a.write({"x": b"1"})
    b.write({"y": b"2"})
    joined = load(join_states(a.doc.get_update(), b.doc.get_update(), lambda client: True))

    a.write({"x": b"3"})
    joined.apply_update(a.changes[-1])

    shown = {name: slots for name, slots in visible(joined).items() if slots}
    assert shown == {("7/0", "0"): {"x": b"3"}, ("9/0", "0"): {"y": b"2"}}


# Refusals

NEST = b"\x75\x01" * 30_000 + b"\x7e"
LANE = [segment(), slot()]

REFUSED_CHANGES = {
    # What crashed, hung or poisoned pycrdt, by the names of the reports
    "one client listed twice": (update(section(7, 0, segment()), section(7, 1)), "one author"),
    "many clients set one key": (
        update(*(section(c, 0, slot(client=c)) for c in range(100, 0, -1))),
        "one author",
    ),
    "nested Any": (
        update(section(7, 1, item(SLOT, b"\x01" + NEST, parent=0, key="k"))),
        "one buffer",
    ),
    "map as a value": (
        update(section(7, 1, item(SLOT, b"\x01\x76\xff\xff\xff\x7f", parent=0, key="k"))),
        "one buffer",
    ),
    "nested types": (
        update(section(7, 1, *(segment(f"7/{n}", parent=n) for n in range(1000)))),
        "one level below",
    ),
    "XmlFragment as a value": (
        update(section(7, 1, item(SEGMENT, b"\x04", key="7/0"))),
        "not a map",
    ),
    "clock near 2**32": (update(section(7, 2**32 - 2, slot())), "clocks are used up"),
    "huge garbage": (update(section(7, 1, gc(2**32 - 2), gc(2**32 - 2))), "info byte 0x00"),
    "garbage of length 0": (update(section(7, 1, gc(0)), deletes={7: [(0, 1)]}), "info byte 0x00"),
    "ContentJSON": (
        update(section(7, 1, item(2, b"\x01\x00", parent=0, key="k"))),
        "info byte 0x22",
    ),
    "right origin": (
        update(section(7, 5, item(SLOT, b"\x01\x74\x00", origin=1, right=2))),
        "info byte 0xe8",
    ),
    "declared 2**28 clients": (encode_varint(2**28), "one author"),
    "declared 2**28 items": (b"\x01" + encode_varint(2**28) + b"\x07\x00", "at most"),
    "declared 2**28 deletes": (b"\x00" + encode_varint(2**28), "at most"),
    "declared 2**28 ranges": (b"\x00\x01\x07" + encode_varint(2**28), "too many"),
    "delete all of a client": (update(deletes={7: [(0, 2**32)]}), "clocks are used up"),
    # Other things that yrs can say and lanes don't
    "skip": (update(section(7, 1, b"\x0a\x01")), "info byte 0x0a"),
    "deleted item": (update(section(7, 1, deleted(1))), "info byte 0x21"),
    "binary": (update(section(7, 1, item(3, text("x"), parent=0, key="k"))), "info byte 0x23"),
    "string": (update(section(7, 1, item(4, text("x"), parent=0, key="k"))), "info byte 0x24"),
    "embed": (update(section(7, 1, item(5, text("1"), parent=0, key="k"))), "info byte 0x25"),
    "format": (update(section(7, 1, item(6, text("b") * 2, parent=0, key="k"))), "info byte 0x26"),
    "subdocument": (
        update(section(7, 1, item(9, text("g") * 2, parent=0, key="k"))),
        "info byte 0x29",
    ),
    "unknown content": (update(section(7, 1, item(11, b"", parent=0, key="k"))), "info byte 0x2b"),
    "list item": (update(section(7, 1, slot(key=None))), "info byte 0x08"),
    "origin without key bit": (
        update(section(7, 3, b"\x88\x07\x01\x01\x74\x00")),
        "info byte 0x88",
    ),
    "array": (update(section(7, 0, item(SEGMENT, b"\x00", key="7/0"))), "not a map"),
    "two buffers": (
        update(section(7, 1, item(SLOT, b"\x02\x74\x00\x74\x00", parent=0, key="k"))),
        "one buffer",
    ),
    "no buffer": (update(section(7, 1, item(SLOT, b"\x00", parent=0, key="k"))), "one buffer"),
    "a string for a buffer": (
        update(section(7, 1, item(SLOT, b"\x01\x77\x00", parent=0, key="k"))),
        "one buffer",
    ),
    "other root": (update(section(7, 0, item(SEGMENT, b"\x01", parent="m", key="7/0"))), "root"),
    "slot in the root": (update(section(7, 0, slot(parent=ROOT, key="7/0"))), "slots in maps"),
    "segment of another": (update(section(7, 0, segment("9/0"))), "does not name a map of 7"),
    "segment without number": (update(section(7, 0, segment("7/x"))), "does not name a map"),
    # References
    "origin of another client": (update(section(7, 3, slot(client=9, origin=1))), "another client"),
    "parent of another client": (update(section(7, 3, slot(client=9))), "another client"),
    "origin is itself": (update(section(7, 3, slot(origin=3))), "not older"),
    "origin in the future": (update(section(7, 3, slot(origin=2**40))), "not older"),
    "origin in the same change": (
        update(section(7, 3, slot(), slot(origin=3))),
        "replaces what it writes itself",
    ),
    "parent in the future": (update(section(7, 3, slot(parent=3))), "not older"),
    "one key twice": (update(section(7, 3, slot(), slot())), "a key twice"),
    "one origin twice": (update(section(7, 3, slot(origin=1), slot(origin=1))), "a key twice"),
    # Delete sets
    "delete of a new item": (
        update(section(7, 3, slot()), deletes={7: [(3, 1)]}),
        "deletes what it writes itself",
    ),
    "empty range": (update(deletes={7: [(3, 0)]}), "empty"),
    "no range": (update(deletes={7: []}), "none"),
    "unsorted ranges": (update(deletes={7: [(3, 1), (1, 1)]}), "out of order"),
    "overlapping ranges": (update(deletes={7: [(3, 2), (4, 2)]}), "out of order"),
    "touching ranges": (update(deletes={7: [(3, 2), (5, 2)]}), "touch"),
    "client twice in the delete set": (
        b"\x00\x02" + b"\x07\x01\x00\x01" * 2,
        "names a client twice",
    ),
    # Bounds
    "client of 54 bits": (update(section(2**53, 0, segment(client=2**53))), "53 bits"),
    "deletes of a client of 54 bits": (update(deletes={2**53: [(0, 1)]}), "53 bits"),
    "clock above the maximum": (update(section(7, CLOCK_MAX, slot())), "clocks are used up"),
    "no items": (update(section(7, 0)), "at least 1"),
    "too many items": (
        update(section(7, 1, *(slot(b"", key=str(n)) for n in range(CHANGE_ITEMS_MAX + 1)))),
        "at most",
    ),
    "too many ranges": (
        update(deletes={7: [(2 * n, 1) for n in range(CHANGE_RANGES_MAX + 1)]}),
        "too many",
    ),
    "too many ranges of two clients": (
        update(
            deletes={c: [(2 * n, 1) for n in range(CHANGE_RANGES_MAX // 2 + 1)] for c in (1, 2)}
        ),
        "too many",
    ),
    "too many deleted": (update(deletes={7: [(0, CHANGE_DELETED_MAX + 1)]}), "deletes more than"),
    "too many clients with deletes": (update(deletes={c: [(0, 1)] for c in range(65)}), "at most"),
    "too long a key": (update(section(7, 1, slot(key="k" * (KEY_BYTES_MAX + 1)))), "a key of"),
    "too large": (bytes(CHANGE_BYTES_MAX + 1), "at most"),
    # Encoding
    "trailing bytes": (update(section(7, 1, slot())) + b"\x00", "after the end"),
    "trailing bytes after nothing": (b"\x00\x00\x00", "after the end"),
    "nothing": (b"", "cut off"),
    "bad UTF-8": (update(section(7, 1, slot(key=b"\xff"))), "UTF-8"),
    "surrogate in UTF-8": (update(section(7, 1, slot(key=b"\xed\xa0\x80"))), "UTF-8"),
    "overlong client": (b"\x01\x01\x87\x00\x00" + segment() + b"\x00", "longer than it has to be"),
    "overlong clock": (b"\x01\x01\x07\x80\x00" + segment() + b"\x00", "longer than it has to be"),
    "endless number": (b"\x00" + b"\x80" * 20, "63 bits"),
    "version 2 encoding": (
        bytes.fromhex("000002a50100000104060374686501020101000001010000"),
        "after the end",
    ),
}


MANY = [slot(key=f"a{n}") for n in range(8)]

# What stands among many of one kind is read in another way.
REFUSED_CHANGES |= {
    f"{name} among many": (update(section(7, 1, *MANY, struct)), reason)
    for name, struct, reason in [
        ("deleted item", deleted(1, key="x"), "info byte 0x21"),
        ("two buffers", item(SLOT, b"\x02\x74\x00\x74\x00", parent=0, key="k"), "one buffer"),
        ("no buffer", item(SLOT, b"\x00", parent=0, key="k"), "one buffer"),
        ("a string for a buffer", item(SLOT, b"\x01\x77\x00", parent=0, key="k"), "one buffer"),
        ("parent of another client", slot(client=9, key="x"), "another client"),
        ("parent in the future", slot(parent=9, key="x"), "not older"),
        ("one key twice", slot(key="a3"), "a key twice"),
        ("too long a key", slot(key="k" * (KEY_BYTES_MAX + 1)), "a key of"),
        ("bad UTF-8", slot(key=b"\xff"), "UTF-8"),
        ("bad UTF-8 in a long key", slot(key=b"\xff" * 200), "UTF-8"),
        ("overlong size of a key", b"\x28\x00\x07\x00\x81\x00k" + b"\x01\x74\x00", "longer"),
        ("overlong size of a slot", b"\x28\x00\x07\x00\x01k\x01\x74\x81\x00v", "longer"),
        ("endless size of a slot", b"\x28\x00\x07\x00\x01k\x01\x74" + b"\xff" * 20, "63 bits"),
    ]
}


@pytest.mark.parametrize("name", REFUSED_CHANGES)
def test_a_change_is_refused_that_has(name):
    change, reason = REFUSED_CHANGES[name]

    with pytest.raises(InvalidUpdate, match=reason):
        parse_change(change)


REFUSED_STATES = {
    "one client listed twice": (
        update(section(7, 0, segment()), section(7, 1, segment("7/1"))),
        "descending order",
    ),
    "clients in ascending order": (
        update(section(7, 0, segment()), section(9, 0, segment("9/0", 9))),
        "descending order",
    ),
    "a lane that starts late": (update(section(7, 1, segment())), "does not start at clock 0"),
    "nested Any": (
        update(section(7, 0, segment(), item(SLOT, b"\x01" + NEST, parent=0, key="k"))),
        "one buffer",
    ),
    "nested types": (
        update(section(7, 0, segment(), segment("1", parent=0), segment("2", parent=1))),
        "one level below",
    ),
    "nested types behind a chain": (
        update(
            section(
                7,
                0,
                *(segment(), segment("1", parent=0), deleted(1, parent=1)),
                item(SEGMENT, b"\x01", origin=2),
            ),
            deletes={7: [(2, 1)]},
        ),
        "one level below",
    ),
    "slot in the root behind a chain": (
        update(
            section(7, 0, deleted(1, parent=ROOT, key="7/0"), slot(origin=0)),
            deletes={7: [(0, 1)]},
        ),
        "slots in maps",
    ),
    "huge garbage": (update(section(7, 0, gc(2**32 - 2), gc(2**32 - 2))), "clocks are used up"),
    "garbage of length 0": (update(section(7, 0, *LANE, gc(0))), "length 0"),
    "deleted run of length 0": (update(section(7, 0, *LANE, deleted(0, key="x"))), "length 0"),
    "skip": (update(section(7, 0, *LANE, b"\x0a\x01")), "info byte 0x0a"),
    "ContentJSON": (update(section(7, 0, *LANE, item(2, b"\x00", parent=0, key="x"))), "0x22"),
    "segment at another's name": (update(section(7, 0, segment("9/0"))), "does not name a map"),
    "deleted segment at another's name": (
        update(section(7, 0, deleted(1, parent=ROOT, key="9/0")), deletes={7: [(0, 1)]}),
        "does not name a map",
    ),
    "two chains at one key": (update(section(7, 0, *LANE, slot())), "two chains"),
    "two segments of one name": (update(section(7, 0, segment(), segment())), "two chains"),
    "two live items in a chain": (update(section(7, 0, *LANE, slot(origin=1))), "deleted end"),
    "fork of a chain": (
        update(
            section(7, 0, segment(), deleted(1), slot(origin=1), slot(origin=1)),
            deletes={7: [(1, 1)]},
        ),
        "deleted end",
    ),
    "origin inside of a run": (
        update(section(7, 0, segment(), deleted(3), slot(origin=2)), deletes={7: [(1, 3)]}),
        "deleted end",
    ),
    "origin in garbage": (
        update(section(7, 0, gc(1), slot(origin=0)), deletes={7: [(0, 1)]}),
        "deleted end",
    ),
    "slot in a slot": (update(section(7, 0, *LANE, slot(parent=1))), "live map"),
    "slot in a deleted segment": (
        update(section(7, 0, deleted(1, parent=ROOT, key="7/0"), slot()), deletes={7: [(0, 1)]}),
        "live map",
    ),
    "origin of another client": (
        update(section(7, 0, segment(), deleted(1), slot(client=9, origin=1))),
        "another client",
    ),
    "delete of what lives": (update(section(7, 0, *LANE), deletes={7: [(1, 1)]}), "exactly"),
    "no delete of what is dead": (update(section(7, 0, segment(), deleted(1))), "exactly"),
    "delete of what is to come": (update(section(7, 0, *LANE), deletes={7: [(2, 1)]}), "exactly"),
    "deletes without a lane": (
        update(section(7, 0, *LANE), deletes={9: [(0, 1)]}),
        "a client that has no lane",
    ),
    "declared 2**28 lanes": (encode_varint(2**28), f"at most {STATE_LANES_MAX}"),
    "declared 2**28 items": (b"\x01" + encode_varint(2**28) + b"\x07\x00", "at most 5000000"),
    "fewer items than declared": (b"\x01\x05\x07\x00" + segment(), "cut off"),
    "client of 54 bits": (update(section(2**53, 0, segment(client=2**53))), "53 bits"),
    "trailing bytes": (update(section(7, 0, *LANE)) + b"\x00", "after the end"),
    "bad UTF-8": (update(section(7, 0, segment(), slot(key=b"\xff"))), "UTF-8"),
    "nothing": (b"", "cut off"),
}


REFUSED_STATES |= {
    f"{name} among many": (update(section(7, 0, segment(), *MANY, *structs), deletes=dead), reason)
    for name, structs, dead, reason in [
        ("two chains at one key", [slot(key="a3")], None, "two chains"),
        ("a deleted chain at the key of a live one", [deleted(1, key="a3")], {7: [(9, 1)]}, "two"),
        (
            "two deleted chains at one key",
            [deleted(1, key="x"), slot(), deleted(1, key="x")],
            {7: [(9, 1), (11, 1)]},
            "two chains",
        ),
        ("deleted run of length 0", [deleted(0, key="x")], None, "length 0"),
        ("no delete of what is dead", [deleted(1, key="x")], None, "exactly"),
        ("fork of a chain", [deleted(1, key="x"), *[slot(origin=9)] * 2], {7: [(9, 1)]}, "end"),
        ("two live items in a chain", [slot(origin=3)], None, "deleted end"),
        ("slots in a slot", [slot(parent=1, key=str(n)) for n in range(8)], None, "live map"),
        ("huge run", [deleted(2**32, key="x")], {7: [(9, 2**32)]}, "clocks are used up"),
    ]
}


REFUSED_STATES |= {
    f"{declared} items declared and 9 there": (
        b"\x01" + encode_varint(declared) + b"\x07\x00" + segment() + b"".join(MANY) + b"\x00",
        reason,
    )
    for declared, reason in [(3, "deletes of 40 clients"), (8, "deletes of 40"), (20, "cut off")]
}


@pytest.mark.parametrize("name", REFUSED_STATES)
def test_a_state_is_refused_that_has(name):
    state, reason = REFUSED_STATES[name]

    with pytest.raises(InvalidUpdate, match=reason):
        parse_state(state)


def test_an_update_that_is_cut_off_anywhere_is_refused():
    writer = honest_writer(300, random.Random(1), 20)
    for change in writer.changes:
        for end in range(len(change)):
            with pytest.raises(InvalidUpdate):
                parse_change(change[:end])
    state = writer.doc.get_update()
    for end in range(len(state)):
        with pytest.raises(InvalidUpdate):
            parse_state(state[:end])


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**31, 2**53 - 1])
def test_a_number_has_one_encoding_and_yrs_reads_it(number):
    assert encode_varint(number) == bytes(encode_varint(number))
    assert parse_change(update(deletes={number: [(0, 1)]})).deletes == [(number, 0, 1)]


# Hostile updates


def test_what_the_guard_lets_through_does_pycrdt_no_harm():
    fates = run_children("guard", seeds=[1, 2], count=10_000, seconds=60)

    assert fates["accepted"] > 5_000 and fates["refused"] > 5_000


def test_pycrdt_shows_of_a_hostile_state_exactly_what_the_guard_saw():
    fates = run_children("state", seeds=[1, 2], count=4_000, seconds=60)

    assert fates["accepted"] > 1_000 and fates["refused"] > 1_000
