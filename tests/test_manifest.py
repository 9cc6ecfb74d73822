"""Manifests, parts and the plan: what is decoded is what was encoded, or a clear error."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from crdtstate.change import Snapshot
from crdtstate.clock import SEQ_MAX, STAMP_MAX, WRITER_MAX, Version
from crdtstate.errors import UsageError
from crdtstate.manifest import (
    CHANGES_MAX,
    DELTAS_MAX,
    MANIFEST_BYTES_MAX,
    PART_BYTES_MAX,
    Damaged,
    Entry,
    Extend,
    Manifest,
    Part,
    Range,
    Renew,
    Reuse,
    agent_of,
    changes_between,
    check_id,
    decode_changes,
    encode_changes,
    make_id,
    make_part,
    manifest_key,
    pack_part,
    part_key,
    plan,
    prefix_of,
    read_keys,
    unpack_part,
)
from crdtstate.tiers import check_key

WRITERS = st.integers(1, WRITER_MAX)
VERSIONS = st.dictionaries(WRITERS, st.integers(1, SEQ_MAX), max_size=5).map(Version)
HASHES = st.binary(min_size=32, max_size=32).map(bytes.hex)
SIZES = st.integers(1, PART_BYTES_MAX)
BASES = st.builds(Part, HASHES, SIZES, SIZES, st.just(0))
DELTAS = st.builds(Part, HASHES, SIZES, SIZES, st.integers(1, CHANGES_MAX // 4))
NAMES = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=10)
ENTRIES = st.builds(
    Entry, NAMES, st.booleans(), VERSIONS, BASES, st.lists(DELTAS, max_size=4).map(tuple)
)
MANIFESTS = st.builds(
    Manifest,
    NAMES,
    WRITERS,
    st.integers(0, STAMP_MAX),
    st.integers(0, 2**53),
    st.text(max_size=20),
    st.none() | st.just(f"{1:016x}-{2:016x}"),
    st.lists(ENTRIES, max_size=4, unique_by=lambda entry: entry.name).map(
        lambda entries: tuple(sorted(entries))
    ),
)

BASE = Part("ab" * 32, 10_000, 3000)
ENTRY = Entry("main", False, Version({1: 5}), BASE)
MANIFEST = Manifest("agent", 1, 77, 1000, "label", None, (ENTRY,))


def decode(fields: Any, agent: str = "agent") -> Manifest:
    """Decode a manifest of these raw fields, under the id that is right for its bytes."""
    data = fields if isinstance(fields, bytes) else msgpack.packb(fields)
    return Manifest.decode(data, make_id(77, data), agent)


def fields_of(manifest: Manifest) -> list[Any]:
    fields: list[Any] = msgpack.unpackb(manifest.encode())
    return fields


# Manifests


@given(MANIFESTS)
def test_a_manifest_reads_as_it_was_written(manifest: Manifest) -> None:
    data = manifest.encode()

    found = Manifest.decode(data, make_id(manifest.stamp, data), manifest.agent)

    assert found == manifest
    assert found.encode() == data
    assert found.stored == sum(
        {p.name: p.stored for e in found.documents for p in e.parts}.values()
    )


@given(MANIFESTS, st.data())
def test_no_bit_can_flip_unnoticed(manifest: Manifest, draw: st.DataObject) -> None:
    data = bytearray(manifest.encode())
    id = make_id(manifest.stamp, bytes(data))
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    data[bit // 8] ^= 1 << bit % 8

    with pytest.raises(Damaged):
        Manifest.decode(bytes(data), id, manifest.agent)


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(Damaged):
        decode(data)


@settings(max_examples=300)
@given(MANIFESTS, st.data())
def test_hostile_bytes_under_their_right_id_are_refused_or_a_manifest(
    manifest: Manifest, draw: st.DataObject
) -> None:
    data = bytearray(replace(manifest, stamp=77, agent="agent").encode())
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))

    try:
        found = decode(bytes(data))
    except Damaged:
        return
    assert found.encode() == bytes(data)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, 2),
        (1, ""),
        (1, "a" * 101),
        (1, 7),
        (2, 0),
        (2, 2**53),
        (2, True),
        (3, -1),
        (4, -5),
        (5, "l" * 201),
        (5, b"label"),
        (6, "not an id"),
        (6, f"{2**63:016x}-{0:016x}"),
        (7, None),
        (7, {}),
        (7, [[]]),
        (7, [["main", 1, [], [b"a" * 32, 1, 1, 0], []]]),
        (7, [["main", False, [1], [b"a" * 32, 1, 1, 0], []]]),
        (7, [["main", False, [2, 1, 1, 1], [b"a" * 32, 1, 1, 0], []]]),
        (7, [["main", False, [1, 1, 1, 1], [b"a" * 32, 1, 1, 0], []]]),
        (7, [["main", False, [1, 0], [b"a" * 32, 1, 1, 0], []]]),
        (7, [["main", False, [], [b"a" * 31, 1, 1, 0], []]]),
        (7, [["main", False, [], [b"a" * 32, 0, 1, 0], []]]),
        (7, [["main", False, [], [b"a" * 32, PART_BYTES_MAX + 1, 1, 0], []]]),
        (7, [["main", False, [], [b"a" * 32, 1, 1, 3], []]]),
        (7, [["main", False, [], [b"a" * 32, 1, 1, 0], [[b"a" * 32, 1, 1, 0]]]]),
        (7, [["main", False, [], [b"a" * 32, 1, 1, 0], [[b"a" * 32, 1, 1, 5000]] * 2]]),
        (7, [["main", False, [], [b"a" * 32, 1, 1, 0], [[b"a" * 32, 1, 1, 1]] * 33]]),
        (7, [["main", False, [], [b"a" * 32, 1, 1, 0], []]] * 2),
        (
            7,
            [
                ["b", False, [], [b"a" * 32, 1, 1, 0], []],
                ["a", False, [], [b"a" * 32, 1, 1, 0], []],
            ],
        ),
    ],
)
def test_a_field_out_of_bounds_is_refused(at: int, value: object) -> None:
    fields = fields_of(MANIFEST)
    assert decode(fields) == MANIFEST
    fields[at] = value

    with pytest.raises(Damaged, match="manifest|version|document|base|deltas|id of"):
        decode(fields)


def test_a_manifest_of_another_agent_or_under_another_id_is_refused() -> None:
    data = MANIFEST.encode()

    with pytest.raises(Damaged, match="of 'agent', not of 'other'"):
        Manifest.decode(data, make_id(77, data), "other")
    with pytest.raises(Damaged, match="stamp"):
        Manifest.decode(data, make_id(78, data), "agent")
    with pytest.raises(Damaged, match="is not the id"):
        Manifest.decode(data, "../../etc/passwd", "agent")


def test_the_same_in_other_bytes_is_refused() -> None:
    # The number 77 in nine bytes instead of one.
    data = MANIFEST.encode().replace(b"\x01\x4d", b"\x01\xcf" + (77).to_bytes(8, "big"), 1)
    assert msgpack.unpackb(data) == fields_of(MANIFEST)

    with pytest.raises(Damaged, match="other bytes"):
        decode(data)


def test_promises_of_gigabytes_allocate_nothing() -> None:
    claims = [
        b"\xdd\xff\xff\xff\xff",  # An array of four billion,
        b"\x98\x01" + b"\xdb\xff\xff\xff\xff",  # a string,
        b"\x98\x01" + b"\xc6\xff\xff\xff\xff",  # bytes,
        b"\xdf\xff\xff\xff\xff",  # a map,
        b"\x91" * 100_000,  # and a nest.
    ]
    tracemalloc.start()
    for claim in claims:
        with pytest.raises(Damaged):
            decode(claim)
    with pytest.raises(Damaged, match="limit"):
        decode(bytes(MANIFEST_BYTES_MAX + 1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < MANIFEST_BYTES_MAX + 8 * 2**20


def test_a_manifest_that_nobody_could_read_is_not_written() -> None:
    version = Version({writer: 2**31 - 1 for writer in range(2**52, 2**52 + 200_000)})
    entries = tuple(Entry(f"d{n:02}", False, version, BASE) for n in range(15))

    with pytest.raises(Damaged, match="limit"):
        replace(MANIFEST, documents=entries).encode()


# Names


@given(st.integers(0, STAMP_MAX), st.integers(0, STAMP_MAX), st.binary(), st.binary())
def test_ids_sort_by_time(one: int, other: int, data: bytes, more: bytes) -> None:
    if one != other:
        assert (make_id(one, data) < make_id(other, more)) == (one < other)
    assert check_id(make_id(one, data)) == one


@given(st.text(min_size=1, max_size=100), st.text(min_size=1, max_size=100))
def test_every_agent_has_keys_of_its_own(one: str, other: str) -> None:
    try:
        keys = [manifest_key(one, make_id(1, b"")), part_key(one, "ab" * 32)]
    except UnicodeEncodeError:
        return
    for key in keys:
        check_key(key)
        assert key.startswith(prefix_of(one))
        assert not {".", "..", ""} & set(key.split("/"))
        assert agent_of(key) in (one, None)
    assert agent_of(keys[0]) == one or len(one) > 15
    assert read_keys(one, [*keys, "foreign", prefix_of(one) + "other/x"]) == (
        [make_id(1, b"")],
        ["ab" * 32],
    )
    if one != other and other.isprintable():
        assert not prefix_of(one).startswith(prefix_of(other))
        assert read_keys(other, keys) == ([], [])


def test_the_longest_agents_are_told_apart() -> None:
    with pytest.raises(UsageError):
        check_key("a" * 401)

    one, other = "🐝" * 100, "🐝" * 99 + "🐜"

    assert prefix_of(one) != prefix_of(other)
    check_key(part_key(one, "ab" * 32))
    assert prefix_of("agent-7") == "agent-7/"
    assert prefix_of("a/b c") == "a%2Fb%20c/"
    assert prefix_of("..") == "%2E%2E/"


# Parts


@given(st.binary(min_size=1, max_size=5000), st.sampled_from([1, 3, 9]))
def test_a_part_unpacks_to_what_it_was(plain: bytes, level: int) -> None:
    part, stored = make_part(plain)

    assert unpack_part(part, stored) == plain
    assert unpack_part(part, pack_part(plain, level)) == plain
    assert part.name == hashlib.sha256(plain).hexdigest()
    assert (part.size, part.stored) == (len(plain), len(stored))


@given(st.binary(min_size=1, max_size=500), st.data())
def test_no_bit_of_a_part_can_flip_unnoticed(plain: bytes, draw: st.DataObject) -> None:
    part, stored = make_part(plain)
    flipped = bytearray(stored)
    bit = draw.draw(st.integers(0, 8 * len(stored) - 1))
    flipped[bit // 8] ^= 1 << bit % 8

    try:
        found = unpack_part(part, bytes(flipped))
    except Damaged:
        return
    # A bit that zstd does not read, such as one it reserves: then what comes out is right.
    assert found == plain


def test_other_bytes_are_no_part() -> None:
    part, stored = make_part(b"what was written")

    with pytest.raises(Damaged, match="hash"):
        unpack_part(part, make_part(b"WHAT WAS WRITTEN")[1])
    with pytest.raises(Damaged, match="states 3 bytes and should have 16"):
        unpack_part(part, make_part(b"abc")[1])
    with pytest.raises(Damaged, match="unpacked"):
        unpack_part(part, b"")
    with pytest.raises(Damaged, match="unpacked"):
        unpack_part(part, stored[:-3])


def test_a_bomb_is_not_unpacked() -> None:
    bomb = zstandard.ZstdCompressor(level=3).compress(bytes(200 * 2**20))
    part, _ = make_part(b"small")
    # It may also not say how large it is.
    silent = zstandard.ZstdCompressor(level=3, write_content_size=False).compress(bytes(2**20))

    tracemalloc.start()
    for stored in (bomb, silent):
        with pytest.raises(Damaged):
            unpack_part(part, stored)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 2**20


@given(st.lists(st.binary(max_size=50), max_size=20))
def test_changes_come_apart_as_they_were_put_together(changes: list[bytes]) -> None:
    plain = encode_changes(changes)
    part = Part("", len(plain), 1, len(changes))

    assert decode_changes(part, plain) == changes
    with pytest.raises(Damaged, match="promised"):
        decode_changes(part._replace(changes=len(changes) + 1), plain)


@pytest.mark.parametrize("fields", [[2, []], [1], [1, "text"], [1, ["text"]], {}, None, [1, {}]])
def test_what_is_no_delta_is_refused(fields: object) -> None:
    with pytest.raises(Damaged):
        decode_changes(Part("", 1, 1, 1), msgpack.packb(fields))


def test_a_plain_snapshot_reads_like_a_packed_one() -> None:
    version, state = Version({3: 4}), b"state" * 1000
    snapshot = Snapshot(
        "main", False, version, {3: 4}, 9, {3: "agent"}, state, {3: bytes(16)}, {3: b"somebody"}
    )

    assert Snapshot.decode(snapshot.encode_plain()) == snapshot
    assert Snapshot.decode(snapshot.encode()) == snapshot
    assert len(snapshot.encode_plain()) > 5000 > len(snapshot.encode())


# The plan


def of_size(size: int) -> Any:
    def measure(ranges: Sequence[Range]) -> int:
        return size

    return measure


def test_an_unchanged_document_is_named_again() -> None:
    assert plan(ENTRY, False, Version({1: 5}), {1: 5}, of_size(0)) == Reuse(ENTRY)


def test_few_changes_become_a_delta() -> None:
    step = plan(ENTRY, False, Version({1: 7, 2: 3}), {1: 5}, of_size(5000))

    assert step == Extend(ENTRY, ((1, 6, 7), (2, 1, 3)), 5)


@pytest.mark.parametrize(
    ("before", "shared", "version", "floor", "size", "reason"),
    [
        (None, False, {1: 5}, {}, 10, "new"),
        (ENTRY, True, {1: 6}, {}, 10, "new"),
        (ENTRY, False, {1: 4, 2: 1}, {}, 10, "parent"),
        (ENTRY, False, {2: 1}, {}, 10, "parent"),
        (ENTRY, False, {1: 6}, {1: 6}, 10, "forgotten"),
        (ENTRY, False, {1: 6, 2: 1}, {2: 1}, 10, "forgotten"),
        (ENTRY, False, {1: 6}, {}, 5001, "large"),
        (ENTRY, False, {1: 6 + CHANGES_MAX}, {}, 10, "many changes"),
        (
            ENTRY._replace(deltas=(Part("", 10, 10, 1),) * DELTAS_MAX),
            False,
            {1: 6},
            {},
            10,
            "many deltas",
        ),
        (ENTRY._replace(deltas=(Part("", 4000, 10, 1),)), False, {1: 6}, {}, 1001, "large"),
        (
            ENTRY._replace(deltas=(Part("", 10, 10, CHANGES_MAX),)),
            False,
            {1: 6},
            {},
            10,
            "many changes",
        ),
    ],
)
def test_a_document_gets_a_new_base(
    before: Entry | None,
    shared: bool,
    version: dict[int, int],
    floor: dict[int, int],
    size: int,
    reason: str,
) -> None:
    step = plan(before, shared, Version(version), floor, of_size(size))

    assert isinstance(step, Renew)
    assert reason in step.reason


@given(VERSIONS, VERSIONS)
def test_what_lies_between_two_versions_is_all_that_one_lacks(old: Version, new: Version) -> None:
    reached = old.copy()
    for writer, first, last in changes_between(old, new):
        assert first == old.get(writer, 0) + 1 <= last
        reached[writer] = last

    joined = old.copy()
    joined.merge(new)
    assert reached == joined


@given(ENTRIES, VERSIONS, VERSIONS, st.integers(0, 10_000))
def test_a_chain_stays_short(before: Entry, newer: Version, floor: Version, size: int) -> None:
    version = before.version.copy()
    version.merge(newer)

    step = plan(before, before.shared, version, floor, of_size(size))

    if isinstance(step, Extend):
        assert len(before.deltas) < DELTAS_MAX
        assert step.changes == version.total - before.version.total > 0
        assert step.changes + sum(d.changes for d in before.deltas) <= CHANGES_MAX
        assert 2 * (size + sum(d.size for d in before.deltas)) <= before.base.size
        assert all(first > floor.get(writer, 0) for writer, first, _ in step.ranges)
    assert isinstance(step, Reuse) == (version == before.version)
