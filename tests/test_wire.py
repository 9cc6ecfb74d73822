"""Frames and messages: what goes in comes out, and nothing else gets in."""

import functools
import random
import struct
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import msgpack
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crdtstate.clock import SEQ_MAX, WRITER_MAX, Version
from crdtstate.errors import ProtocolError, UsageError
from crdtstate.wire import (
    BUNDLE_BYTES,
    BUNDLE_FRAMES_MAX,
    FRAME_BYTES_MAX,
    HEADER,
    MESSAGE_BYTES_MAX,
    Answer,
    Ask,
    Borrow,
    Busy,
    Bye,
    ByeCode,
    Changes,
    Chunk,
    Compare,
    Compared,
    Digests,
    Diverged,
    Frame,
    Get,
    Have,
    Heartbeat,
    Hello,
    Lend,
    Members,
    Offer,
    Presence,
    Record,
    Return,
    Roll,
    Verdict,
    Want,
    decode_message,
    decode_record,
    encode_frame,
    encode_message,
    encode_record,
    split_records,
    weigh,
)

DIGEST = bytes(range(32))

# Frames and their bytes. These never change: replicas of different ages must understand them.
GOLDEN: list[tuple[Frame, str]] = [
    (Hello(1, 1, 7, 0, "a"), "9c 00 01 01 07 00 a161 00 c0 c2 c2 90 c400"),
    (
        Hello(1, 2, WRITER_MAX, 2**64 - 1, "planner", "relay", "ws://h:1/mesh", True, ("x*",)),
        "9c 00 01 02 cf001fffffffffffff cfffffffffffffffff a7706c616e6e6572 01"
        "ad77733a2f2f683a312f6d657368 c3 c3 91 a2782a c400",
    ),
    (Bye(ByeCode.SAME_WRITER, "copied store"), "93 02 05 ac636f706965642073746f7265"),
    (Heartbeat(2**63), "9a 03 cf8000000000000000 c2 90 03 00 00 00 c2 00"),
    (Heartbeat(0, (1, 2**40)), "9a 03 00 c3 92 01 cf0000010000000000 03 00 00 00 c2 00"),
    (Heartbeat(0, (), 1, 2, 3, 5, True, 4), "9a 03 00 c3 90 01 02 03 05 c3 04"),
    (Members(((7, 8, b"one"), (9, 1, b"two"))), "94 04 92 07 09 92 08 01 92 c4036f6e65 c40374776f"),
    (
        Ask(9, 2, ("ann", "bob"), "plan", Version({5: 2}), True, False),
        "98 22 09 02 92 a3616e6e a3626f62 a4706c616e 92 05 02 c3 c2",
    ),
    (Answer(9, "ann", Version({5: 2}), 3), "97 23 09 a3616e6e 92 05 02 03 c400 c400"),
    (
        Answer(9, "ann", Version(), 3, b"card", b"proof"),
        "97 23 09 a3616e6e 90 03 c40463617264 c40570726f6f66",
    ),
    (Borrow(), "91 24"),
    (Lend(5, {"plan": 2}), "94 25 05 91 a4706c616e 91 02"),
    (Return(5, {"plan": 2}), "94 26 05 91 a4706c616e 91 02"),
    (Presence(5, "ann", 7, 1000, b"x"), "96 28 05 a3616e6e 07 cd03e8 c40178"),
    (Presence(5, "ann", 8, 0, None), "96 28 05 a3616e6e 08 00 c0"),
    (Roll({9: 1, 5: 2}), "93 05 94 05 02 09 01 c2"),
    (Roll({}, is_answer=True), "93 05 90 c3"),
    (Changes((b"one", b"")), "94 10 92 c4036f6e65 c400 c2 c2"),
    (Changes((), answer=True, more=True), "94 10 90 c3 c3"),
    (Have("plan", Version({9: 1, 5: 2})), "95 11 a4706c616e 94 05 02 09 01 c2 c400"),
    (Have("plan", Version(), full=True), "95 11 a4706c616e 90 c3 c400"),
    (
        Have("plan", Version({9: 1}), True, b"12345678"),
        "95 11 a4706c616e 92 09 01 c3 c4083132333435363738",
    ),
    (Want("plan", ((5, 1, 2), (5, 4, 4))), "93 12 a4706c616e 96 05 01 02 05 04 04"),
    (Offer("plan", DIGEST, 70_000), f"94 18 a4706c616e c420{DIGEST.hex()} ce00011170"),
    (Get("plan", DIGEST, 65_536), f"94 19 a4706c616e c420{DIGEST.hex()} ce00010000"),
    (Chunk("plan", DIGEST, 0, b"data"), f"95 1a a4706c616e c420{DIGEST.hex()} 00 c40464617461"),
    (Busy("plan", 500), "93 1c a4706c616e cd01f4"),
    (Compare(7, "plan", (2, 3)), "98 cc80 07 a4706c616e c3 02 03 90 c2"),
    (
        Compare(7, "plan", None, ((5, 2, 9), (6, 1, 0)), True),
        "98 cc80 07 a4706c616e c2 00 00 96 05 02 09 06 01 00 c3",
    ),
    (Compared(7, (Verdict.SAME, Verdict.OTHER)), "93 cc81 07 92 01 00"),
    (
        Digests("plan", 5, 2, b"\x80", (), (("mp\0a", 9),), {5: 2}),
        "99 cc82 a4706c616e 05 02 c40180 90 91 a46d700061 91 09 92 05 02",
    ),
    (
        Diverged("plan", 5, 2, "mp\0a", 9, {5: 2}),
        "98 cc83 a4706c616e 05 02 a46d700061 c3 09 92 05 02",
    ),
    (
        Diverged("plan", 0, 2, "yp\0", None, {}),
        "98 cc83 a4706c616e 00 02 a3797000 c2 00 90",
    ),
]

# A loaded machine is no failure.
patient = functools.partial(settings, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Strategies

writers = st.integers(1, WRITER_MAX)
seqs = st.integers(1, SEQ_MAX)
printable = st.characters(codec="utf-8", exclude_categories=["C", "Z"])
names = st.text(printable, min_size=1, max_size=200)
digests = st.binary(min_size=32, max_size=32)
sizes = st.integers(0, 2**30)
uint64s = st.integers(0, 2**64 - 1)
protos = st.integers(1, 2**16 - 1)
ranges = st.tuples(writers, seqs, seqs).map(lambda r: (r[0], min(r[1:]), max(r[1:])))

agents = names.filter(lambda name: len(name) <= 100)
heads = st.dictionaries(writers, seqs, max_size=10)
versions = st.dictionaries(writers, seqs, max_size=30).map(Version)

frames: st.SearchStrategy[Frame] = st.one_of(
    st.builds(
        Hello,
        proto_min=protos,
        proto_max=protos,
        writer=writers,
        session=uint64s,
        agent=names.filter(lambda name: len(name) <= 100),
        role=st.sampled_from(["agent", "relay"]),
        address=st.none() | names,
        is_durable=st.booleans(),
        documents=st.none() | st.lists(names, max_size=5).map(tuple),
    ),
    st.builds(Bye, st.integers(0, 2**16 - 1), st.text(printable, max_size=500)),
    st.builds(
        Heartbeat,
        uint64s,
        st.none() | st.lists(writers, max_size=16).map(tuple),
        st.integers(0, 3),
        uint64s,
        st.integers(0, 2**53),
        st.integers(0, 255),
        st.booleans(),
        uint64s,
    ),
    st.builds(
        Members,
        st.lists(
            st.tuples(writers, st.integers(1, 2**54), st.binary(max_size=300)), max_size=20
        ).map(tuple),
    ),
    st.builds(Roll, st.dictionaries(writers, st.integers(0, 2**54), max_size=30), st.booleans()),
    st.builds(
        Changes,
        st.lists(st.binary(max_size=300), max_size=20).map(tuple),
        st.booleans(),
        st.booleans(),
    ),
    st.builds(Have, names, st.dictionaries(writers, seqs, max_size=30).map(Version), st.booleans()),
    st.builds(Want, names, st.lists(ranges, max_size=30).map(tuple)),
    st.builds(Offer, names, digests, sizes),
    st.builds(Get, names, digests, sizes),
    st.builds(Chunk, names, digests, sizes, st.binary(max_size=1000)),
    st.builds(Busy, names, st.integers(0, 86_400_000)),
    st.builds(
        Ask,
        uint64s,
        st.integers(1, 2**32),
        st.lists(agents, max_size=5).map(tuple),
        names,
        versions,
        st.booleans(),
        st.booleans(),
    ),
    st.builds(Answer, uint64s, agents, versions, st.integers(0, 64)),
    st.just(Borrow()),
    st.builds(Lend, st.integers(0, WRITER_MAX), st.dictionaries(names, seqs, max_size=5)),
    st.builds(Return, writers, st.dictionaries(names, seqs, max_size=5)),
    st.builds(
        Presence,
        writers,
        agents,
        uint64s,
        st.integers(0, 3_600_000),
        st.none() | st.binary(max_size=300),
    ),
    st.builds(Compare, uint64s, names, st.tuples(uint64s, uint64s), is_fresh=st.booleans()),
    st.builds(
        Compare,
        uint64s,
        names,
        st.none(),
        st.lists(
            st.tuples(writers, seqs, uint64s),
            min_size=1,
            max_size=20,
            unique_by=lambda lane: lane[0],
        ).map(tuple),
        st.booleans(),
    ),
    st.builds(Compared, uint64s, st.lists(st.sampled_from(list(Verdict)), max_size=20).map(tuple)),
    st.builds(
        Digests,
        names,
        st.integers(0, WRITER_MAX),
        uint64s,
        st.binary(max_size=8),
        st.lists(uint64s, min_size=256, max_size=256).map(tuple),
        st.just(()),
        heads,
    ),
    st.builds(
        Digests,
        names,
        st.integers(0, WRITER_MAX),
        uint64s,
        st.binary(max_size=8),
        st.just(()),
        st.dictionaries(names, uint64s, max_size=16).map(lambda slots: tuple(slots.items())),
        heads,
    ),
    st.builds(
        Diverged,
        names,
        st.integers(0, WRITER_MAX),
        uint64s,
        names,
        st.none() | uint64s,
        heads,
    ),
)


def message_of(*arrays: Any) -> bytes:
    """A message of hand-made frames."""
    return bytes((HEADER,)) + msgpack.packb(arrays)


def compressed(raw: bytes, raw_size: int | None = None, window_log: int = 20) -> list[Any]:
    """A hand-made compressed frame."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compress(raw)
    return [127, len(raw) if raw_size is None else raw_size, packed]


def random_bytes(size: int) -> bytes:
    """Bytes that don't shrink, the same each time."""
    return random.Random(size).randbytes(size)


records = st.builds(
    Record,
    writer=writers,
    session=uint64s,
    seq=st.integers(1, 2**53 - 1),
    agent=names.filter(lambda name: len(name) <= 100),
    role=st.sampled_from(["agent", "relay"]),
    is_gone=st.booleans(),
    is_durable=st.booleans(),
    address=st.none() | names,
    links=st.lists(writers, max_size=16).map(tuple),
    lost=st.lists(st.tuples(writers, writers), max_size=20).map(tuple),
)

# What goes in comes out


@pytest.mark.parametrize(("frame", "expected"), GOLDEN, ids=lambda value: type(value).__name__)
def test_the_bytes_of_a_frame_never_change(frame: Frame, expected: str) -> None:
    assert encode_frame(frame) == bytes.fromhex(expected)
    assert decode_message(encode_message([encode_frame(frame)])) == [frame]


def test_the_bytes_of_a_record_never_change() -> None:
    record = Record(9, 8, 7, "ann", "relay", True, True, "ws://h:1", (5, 6), ((3, 4),))

    expected = "99 09 08 07 a3616e6e 01 03 a877733a2f2f683a31 92 05 06 92 03 04"
    assert encode_record(record) == bytes.fromhex(expected)
    assert record.order == 15


@patient()
@given(records)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    assert decode_record(encode_record(record)) == record


@patient()
@given(records, st.data())
def test_whatever_is_done_to_a_record_it_is_read_or_refused(
    record: Record, data: st.DataObject
) -> None:
    encoded = bytearray(encode_record(record))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= 1 << data.draw(st.integers(0, 7))

    try:
        decode_record(bytes(encoded[: data.draw(st.integers(0, len(encoded)))]))
    except ProtocolError:
        pass


def test_many_records_go_in_several_frames() -> None:
    record = Record(1, 1, 1, "x" * 100)

    frames = list(split_records([(1, record.order, encode_record(record))] * 3000))

    assert sum(len(frame.records) for frame in frames) == 3000
    assert all(len(encode_frame(frame)) <= 65 * 1024 for frame in frames)
    assert list(split_records([])) == []


def test_the_bytes_of_a_message_never_change() -> None:
    busy = encode_frame(Busy("d", 1))

    assert encode_message([busy, busy]) == bytes.fromhex("10 92 931ca16401 931ca16401")
    assert encode_message([busy] * 16) == bytes.fromhex("10 dc0010" + 16 * "931ca16401")


def test_the_bytes_of_a_compressed_frame_never_change() -> None:
    frame = Changes((b"a" * 600,))
    raw = bytes.fromhex("94 10 91 c50258") + b"a" * 600 + bytes.fromhex("c2 c2")

    encoded = encode_frame(frame)

    # The compressor's output may change with its version, the rest may not.
    assert encoded[:9] == bytes.fromhex("93 7f ce") + struct.pack(">I", len(raw)) + bytes.fromhex(
        "c4"
    ) + bytes([len(encoded) - 9])
    assert zstandard.decompress(encoded[9:]) == raw
    assert decode_message(encode_message([encoded])) == [frame]


@given(st.lists(frames, min_size=1, max_size=5))
@patient(max_examples=200)
def test_frames_survive_the_journey_in_order(sent: list[Frame]) -> None:
    assert decode_message(encode_message(map(encode_frame, sent))) == sent


def test_a_version_arrives_as_a_version() -> None:
    (have,) = decode_message(encode_message([encode_frame(Have("d", Version({1: 2})))]))

    assert isinstance(have, Have)
    assert type(have.version) is Version


def test_frames_at_their_limits_survive() -> None:
    largest: list[Frame] = [
        Have("d" * 200, Version({WRITER_MAX - n: SEQ_MAX for n in range(200_000)}), full=True),
        Want("d", ((WRITER_MAX, 1, SEQ_MAX),) * 4096),
        Changes((b"x",) * 4096),
        Chunk("d", DIGEST, 2**30, b"x" * 65_536),
    ]
    for frame in largest:
        assert decode_message(encode_message([encode_frame(frame)])) == [frame]


def test_only_frames_that_shrink_are_compressed() -> None:
    compressible, noise = Changes((b"word " * 100,)), Changes((random_bytes(500),))

    assert len(encode_frame(compressible)) < 100
    assert len(encode_frame(noise)) == len(msgpack.packb([16, noise.changes, False, False]))


def test_a_frame_beyond_the_limit_is_the_senders_mistake() -> None:
    with pytest.raises(UsageError, match="split"):
        encode_frame(Changes((b"x" * FRAME_BYTES_MAX,)))


def test_a_bundle_below_its_weight_has_room_for_any_frame() -> None:
    fill = encode_frame(Changes((random_bytes(256) * 255,)))
    largest = encode_frame(Changes((b"x" * (FRAME_BYTES_MAX - 20),)))
    noise = encode_frame(Changes((random_bytes(FRAME_BYTES_MAX - 20),)))

    assert weigh(fill) < BUNDLE_BYTES
    assert weigh(largest) > FRAME_BYTES_MAX - 20 > len(largest)
    assert weigh(noise) == len(noise)
    assert len(decode_message(encode_message([fill, largest]))) == 2
    assert len(decode_message(encode_message([fill, noise]))) == 2


def test_too_large_a_bundle_is_a_bug() -> None:
    busy = encode_frame(Busy("d", 1))
    assert len(decode_message(encode_message([busy] * BUNDLE_FRAMES_MAX))) == BUNDLE_FRAMES_MAX

    with pytest.raises(AssertionError):
        encode_message([busy] * (BUNDLE_FRAMES_MAX + 1))
    with pytest.raises(AssertionError):
        encode_message([encode_frame(Changes((b"x" * 3_000_000,)))] * 2)


def test_threads_can_encode_and_decode_at_the_same_time() -> None:
    def journey(number: int) -> bool:
        sent = [Changes((f"{number} {n} ".encode() * 3000,)) for n in range(20)]
        return all(decode_message(encode_message([encode_frame(f)])) == [f] for f in sent)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(journey, range(32)))


# The future


def test_unknown_frames_from_128_are_skipped() -> None:
    news = [200, "anything", [1, [2.5, [None]]], b"at all"]
    busy = [28, "d", 1]

    message = message_of([199], busy, news, compressed(msgpack.packb(news)), [2**64 - 1])

    assert decode_message(message) == [Busy("d", 1)]


@pytest.mark.parametrize("kind", [1, 6, 15, 19, 126])
def test_unknown_frames_below_128_are_refused(kind: int) -> None:
    with pytest.raises(ProtocolError, match=f"unknown frame type {kind}"):
        decode_message(message_of([kind, 1, 2, 3]))


@pytest.mark.parametrize(("frame", "encoded"), GOLDEN, ids=lambda value: type(value).__name__)
def test_fields_added_at_the_end_are_ignored_and_missing_ones_refused(
    frame: Frame, encoded: str
) -> None:
    array = msgpack.unpackb(bytes.fromhex(encoded))

    assert decode_message(message_of([*array, "new", [1, 2]])) == [frame]
    for length in range(1, len(array)):
        with pytest.raises(ProtocolError, match="lacks fields|type"):
            decode_message(message_of(array[:length]))


# What is malformed

HELLO = [0, 1, 1, 7, 0, "a", 0, None]

MALFORMED: list[Any] = [
    None,
    1,
    "text",
    [],
    ["0"],
    [-1],
    [True],
    [0.0],
    [None, 1],
    *(
        [*HELLO[:place], bad, *HELLO[place + 1 :]]
        for place, values in {
            1: [0, 2**16, "1", None, 1.0, True],
            2: [0, 2**16],
            3: [0, -1, WRITER_MAX + 1, 2**64 - 1, "7", True],
            4: [-1, 0.5, None, b"x"],
            5: ["", "a" * 101, b"a", None, 1],
            6: [-1, 2, False, "agent", None],
            7: ["", "a" * 501, b"ws://", 1],
        }.items()
        for bad in values
    ),
    # Of comparisons: nothing and everything, a writer twice, verdicts and digests that are none.
    [128, 7, "d", False, 0, 0, [], False],
    [128, 7, "d", True, 0, 0, [5, 1, 1], False],
    [128, 7, "d", True, 0, -1, [], False],
    [128, 7, "d", False, 0, 0, [5, 1, 1, 5, 2, 1], False],
    [128, 7, "d", False, 0, 0, [5, 1], False],
    [128, 7, "d", False, 0, 0, [0, 1, 1], False],
    [128, 7, "d", False, 0, 0, [5, 1, -1], False],
    [128, 7, "d", False, 0, 0, [n for i in range(257) for n in (i + 1, 1, 1)], False],
    [129, 7, [4]],
    [129, 7, [1] * 257],
    [129, 7, [True]],
    [130, "d", 5, 2, b"123456789", [], [], [], []],
    [130, "d", 5, 2, b"", [1] * 255, [], [], []],
    [130, "d", 5, 2, b"", [1] * 256, ["a"], [1], []],
    [130, "d", 5, 2, b"", [-1] * 256, [], [], []],
    [130, "d", 5, 2, b"", [], ["a"], [], []],
    [130, "d", 5, 2, b"", [], ["a", "a"], [1, 2], []],
    [130, "d", 5, 2, b"", [], [""], [1], []],
    [130, "d", 5, 2, b"", [], ["a" * 1101], [1], []],
    [130, "d", 5, 2, b"", [], [f"{n}" for n in range(17)], [1] * 17, []],
    [130, "d", 5, 2, b"", [], [], [], [1]],
    [131, "d", -1, 2, "a", True, 9, []],
    [131, "d", 5, 2, "a", 1, 9, []],
    [131, "d", 5, 2, "a", True, None, []],
    [131, "d", 5, 2, 7, True, 9, []],
    [2, -1, ""],
    [2, 2**16, ""],
    [2, 0, "r" * 501],
    [2, 0, b"reason"],
    [3, -1, False, []],
    [3, 1.0, False, []],
    [3, 1, None, []],
    [3, 1, False, None],
    [3, 1, True, [0]],
    [3, 1, True, [WRITER_MAX + 1]],
    [3, 1, True, [True]],
    [3, 1, True, list(range(1, 18))],
    [3, 1, True, "neighbours"],
    [16, b"change", False, False],
    [16, ["text"], False, False],
    [16, [b"", None], False, False],
    [16, [b""] * 4097, False, False],
    [16, [b""], 0, False],
    [16, [b""], False, None],
    [17, "", [1, 1], True],
    [17, "d" * 201, [1, 1], True],
    [17, b"d", [1, 1], True],
    [17, "d", [1], True],
    [17, "d", [1, 1, 1, 2], True],
    [17, "d", [1, 0], True],
    [17, "d", [1, SEQ_MAX + 1], True],
    [17, "d", [0, 1], True],
    [17, "d", [WRITER_MAX + 1, 1], True],
    [17, "d", [1, True], True],
    [17, "d", [1, 1.0], True],
    [17, "d", [[1, 1]], True],
    [17, "d", None, True],
    [17, "d", [], 1],
    [18, "d", [1, 1]],
    [18, "d", [1, 2, 1]],
    [18, "d", [0, 1, 1]],
    [18, "d", [1, 0, 1]],
    [18, "d", [1, 1, SEQ_MAX + 1]],
    [18, "d", [1, 1, None]],
    [18, "d", [1, 1, 1] * 4097],
    [24, "d", DIGEST[1:], 1],
    [24, "d", DIGEST.decode("latin-1"), 1],
    [24, "d", DIGEST, -1],
    [24, "d", DIGEST, 2**30 + 1],
    [25, "d", DIGEST, None],
    [26, "d", DIGEST, 0, b"x" * 65_537],
    [26, "d", DIGEST, 0, "x"],
    [28, "d", -1],
    [28, "d", 86_400_001],
    [127],
    [127, 5],
    [127, "5", b""],
    [127, 5, "text"],
    [127, 5, b""],
    [127, 5, b"no zstd"],
]


@pytest.mark.parametrize("array", MALFORMED, ids=lambda array: repr(array)[:40])
def test_a_malformed_frame_is_refused(array: Any) -> None:
    with pytest.raises(ProtocolError):
        decode_message(message_of(array))
    with pytest.raises(ProtocolError):
        decode_message(message_of([28, "d", 1], array))
    with pytest.raises(ProtocolError):
        decode_message(message_of(compressed(msgpack.packb(array))))


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x10",
        b"\x00\x90",
        b"\x20\x90",
        b"\x11\x90",
        b"\x90",
        b"\x10\x90\x90",
        b"\x10\xc0",
        b"\x10\xa1\xff",
        b"\x10\x91\x94\x12",
        b"\x10\xc1",
        b"\x10" + msgpack.packb([[200]] * 257),
        b"\x10" * (MESSAGE_BYTES_MAX + 1),
    ],
    ids=lambda message: message[:6].hex(),
)
def test_what_is_no_message_is_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_message(message)


def test_maps_and_extensions_are_skipped_where_unknown_and_refused_where_not() -> None:
    values = [{}, {"a": [{1: 2}]}, msgpack.Timestamp(1, 2), msgpack.ExtType(5, b"x" * 9)]

    assert decode_message(message_of([200, *values], [28, "d", 1, *values])) == [Busy("d", 1)]
    for value in values:
        with pytest.raises(ProtocolError):
            decode_message(message_of([28, "d", value]))
        with pytest.raises(ProtocolError):
            decode_message(message_of([16, [value], False, False]))


@given(st.binary(max_size=200))
@patient(max_examples=500)
def test_random_bytes_give_frames_or_a_protocol_error(data: bytes) -> None:
    for message in (data, bytes((HEADER,)) + data, bytes((HEADER, 0x91)) + data):
        try:
            decode_message(message)
        except ProtocolError:
            pass


@given(st.lists(frames, min_size=1, max_size=3), st.data())
@patient(max_examples=500)
def test_mutated_messages_give_frames_or_a_protocol_error(
    sent: list[Frame], data: st.DataObject
) -> None:
    message = bytearray(encode_message(map(encode_frame, sent)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(message) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert"])):
            case "set":
                message[place] = data.draw(st.integers(0, 255))
            case "cut":
                del message[place + 1 :]
            case "insert":
                message[place:place] = data.draw(st.binary(max_size=9))

    try:
        received = decode_message(bytes(message))
    except ProtocolError:
        return

    # What got through is something we could have said ourselves.
    for frame in received:
        assert decode_message(encode_message([encode_frame(frame)])) == [frame]


# Bombs


def zstd_frame(content_size: int, window: int | None = None) -> bytes:
    """A zstd header that promises *content_size* bytes, followed by an empty last block."""
    if window is None:
        head = b"\xe0" + struct.pack("<Q", content_size)  # one segment: no window of its own
    else:
        head = b"\xc0" + bytes([(window - 10) << 3]) + struct.pack("<Q", content_size)
    return struct.pack("<I", zstandard.MAGIC_NUMBER) + head + b"\x01\x00\x00"


def many(count: int, value: bytes) -> bytes:
    """An msgpack array of *count* times *value*."""
    return b"\xdd" + struct.pack(">I", count) + value * count


BUSY = b"\x93\x1c\xa1d\x01"
CHANGES, HAVE = b"\x10\x91\x94\x10", b"\x10\x91\x94\x11\xa1d"
UNKNOWN = b"\x10\x91\x92\xcc\xc8"

BOMBS = {
    "zeros": message_of(compressed(bytes(256 * 2**20))),
    "zeros, a smaller size stated": message_of(compressed(bytes(64 * 2**20), 1000)),
    "no size stated inside": message_of(
        [127, 1000, zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**24))]
    ),
    "2**60 bytes": message_of([127, 2**60, zstd_frame(2**60)]),
    "2**31 bytes": message_of([127, 2**31, zstd_frame(2**31)]),
    "4 MB promised, nothing there": message_of([127, 4_000_000, zstd_frame(4_000_000)]),
    "a window of 4 MB, nothing there": message_of([127, 1000, zstd_frame(1000, window=22)]),
    "a window of 2 MiB, all there": message_of(compressed(bytes(3_000_000), window_log=21)),
    "a window of 2 GiB": message_of([127, 1000, zstd_frame(1000, window=31)]),
    "compressed twice": message_of(compressed(msgpack.packb(compressed(BUSY)))),
    "compressed twice by type": message_of(compressed(msgpack.packb([127, 5, BUSY]))),
    "more than it says": message_of([127, 5, zstandard.compress(BUSY) + zstandard.compress(BUSY)]),
    "two frames for one": message_of(compressed(BUSY + BUSY)),
    "many large frames": message_of(*[compressed(msgpack.packb([200, bytes(2**20)]))] * 5),
    "a long array": b"\x10\x91\xdd\xff\xff\xff\xff",
    "a long array of changes": CHANGES + b"\xdd\xff\xff\xff\xff",
    "a long text": b"\x10\x91\x92\x02\xdb\xff\xff\xff\xff",
    "a long map": b"\x10\x91\x92\x02\xdf\xff\xff\xff\xff",
    "a long version": HAVE + many(400_002, b"\x01"),
    "a version of maps": HAVE + many(400_000, b"\x80"),
    "a version of arrays": HAVE + many(400_000, b"\x90"),
    "a version of extensions": HAVE + many(400_000, b"\xc7\x00\x05"),
    "a version of floats": HAVE + many(400_000, b"\xcb" + bytes(8)),
    "a version of texts": HAVE + many(400_000, b"\xa2ab"),
    "one writer": HAVE + many(400_000, b"\x01") + b"\xc2",
    "many fields": b"\x10\x91" + many(4_000_000, b"\x7f"),
    "many unknown fields": b"\x10\x91" + many(2_000_000, b"\xcc\xc8"),
    "deep": b"\x10" + b"\x91" * 1_000_000,
    "deep and wide": b"\x10" + (b"\xdd" + struct.pack(">I", 400_000)) * 1000,
    "deep and wide in changes": CHANGES + (b"\xdd" + struct.pack(">I", 4096)) * 1000,
    "deep and wide where unknown": UNKNOWN + (b"\xdd" + struct.pack(">I", 2**32 - 1)) * 1000,
}

HARMLESS = {
    "many values": UNKNOWN + many(4_000_000, b"\xc0"),
    "many maps": UNKNOWN + many(4_000_000, b"\x80"),
    "arrays in arrays": UNKNOWN + b"\x91" * 500 + b"\xc0",
    "compressed": message_of(compressed(b"\x92\xcc\xc8" + many(3_000_000, b"\x80"))),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_without_its_memory(name: str) -> None:
    with memory_below(48 * 2**20), pytest.raises(ProtocolError):
        decode_message(BOMBS[name])


@pytest.mark.parametrize("name", HARMLESS)
def test_a_bomb_that_is_skipped_does_not_go_off(name: str) -> None:
    with memory_below(10 * 2**20):
        assert decode_message(HARMLESS[name]) == []


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak / 2**20:.0f} MiB"


@pytest.mark.parametrize("text", ["\x1b[2J", "two\nlines", "\u202ereversed", "\x00"])
def test_what_is_shown_cannot_steer_a_terminal(text: str) -> None:
    """Names are refused; a reason is spelled out."""
    (bye,) = decode_message(encode_message([encode_frame(Bye(1, text))]))
    assert isinstance(bye, Bye) and bye.reason.isprintable() and bye.reason

    for frame in (Hello(1, 1, 7, 0, text), Have(text, Version()), Presence(5, text, 7, 9, b"x")):
        with pytest.raises(ProtocolError, match="printed"):
            decode_message(encode_message([encode_frame(frame)]))
