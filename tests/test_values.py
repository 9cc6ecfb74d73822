"""Values come back as they were, or are refused by name; bytes of strangers do no harm."""

import array
import collections
import dataclasses
import decimal
import enum
import math
import pathlib
import random
import uuid
from datetime import UTC, date, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crdtstate.errors import InvalidUpdate, UnsupportedValue
from crdtstate.values import (
    DEPTH_MAX,
    INT_BYTES_MAX,
    VALUE_BYTES_MAX,
    check,
    check_all,
    pack,
    pack_key,
    unpack,
    unpack_key,
)

BERLIN = ZoneInfo("Europe/Berlin")

text = st.text()  # hypothesis leaves lone surrogates out unless asked
offsets = st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(timezone)
zones = st.sampled_from(["Europe/Berlin", "America/New_York", "Asia/Kathmandu", "UTC"]).map(
    ZoneInfo
)
times = st.datetimes(timezones=st.one_of(st.just(UTC), offsets, zones))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text, st.binary(), times)
big = st.integers(-(10**4297), 10**4297)
keys = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), text, st.binary()
)
values = st.recursive(
    scalars | big, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=20
)


def same(a, b):
    """Equal in type too, all the way down, where NaN is NaN."""
    if type(a) is not type(b):
        return False
    if type(a) is list:
        return len(a) == len(b) and all(map(same, a, b))
    if type(a) is dict:
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    if type(a) is float:
        return repr(a) == repr(b)
    if type(a) is datetime:
        return a.replace(tzinfo=None) == b.replace(tzinfo=None) and a.utcoffset() == b.utcoffset()
    return a == b


# Values


@settings(max_examples=300)
@given(values)
@example(-(2**63) - 1)
@example(2**64)
@example(-0.0)
@example({1: "int", "1": "str", b"1": "bytes", None: "none", 2.5: "float"})
@example({True: "bool", 0: "int"})
@example(datetime(2000, 1, 1, tzinfo=timezone(timedelta(microseconds=1))))
@example(datetime(2000, 1, 1, tzinfo=timezone(timedelta(microseconds=-1))))
def test_a_value_comes_back_with_the_type_it_had(value):
    packed = pack(value, "v")

    assert same(unpack(packed), value)
    assert pack(unpack(packed), "v") == packed
    check(packed)


raw = st.recursive(
    scalars.filter(lambda value: type(value) is not datetime)
    | st.builds(msgpack.ExtType, st.integers(0, 3), st.binary(max_size=20)),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(keys | st.tuples(keys) | st.just(float("nan")), inner)
        | st.tuples(inner, st.integers(55, 70)).map(lambda pair: wrapped(*pair))
    ),
    max_leaves=10,
)


def wrapped(value, depth):
    for _ in range(depth):
        value = [value]
    return value


@settings(max_examples=400, deadline=None)
@given(raw, st.data())
@example("x" * VALUE_BYTES_MAX, None)
@example([[["x" * 100]] * 70] * 3, None)
@example(wrapped(1, DEPTH_MAX), None)
@example(wrapped(1, DEPTH_MAX + 1), None)
@example(wrapped("x" * 100, DEPTH_MAX), None)
@example(wrapped("x" * 100, DEPTH_MAX + 1), None)
@example({"x" * 100: {1.5: [{None: b"y"}]}}, None)
def test_what_is_checked_is_exactly_what_can_be_read(value, data):
    packed = bytearray(msgpack.packb(value, default=lambda number: msgpack.ExtType(1, b"\1" * 9)))
    for _ in range(data.draw(st.integers(0, 2)) if data is not None else 0):
        at = data.draw(st.integers(0, len(packed) - 1))
        packed[at] = data.draw(st.integers(0, 255))

    assert is_accepted(check, bytes(packed)) == is_accepted(unpack, bytes(packed))
    assert is_accepted(check_all, [b"\1", bytes(packed)]) == is_accepted(unpack, bytes(packed))


def is_accepted(read, data):
    try:
        read(data)
    except InvalidUpdate:
        return False
    return True


def test_a_tuple_comes_back_as_a_list():
    assert unpack(pack((1, ("a", (2**70,))), "v")) == [1, ["a", [2**70]]]


@pytest.mark.parametrize("zone", [BERLIN, ZoneInfo("America/New_York"), ZoneInfo("UTC")])
def test_a_datetime_keeps_its_zone(zone):
    value = datetime(2024, 7, 1, 12, 30, 15, 123456, zone)

    back = unpack(pack(value, "v"))

    assert back == value and back.tzinfo is zone


def test_a_datetime_keeps_which_of_two_equal_hours_it_was_in():
    early = datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN)
    late = early.replace(fold=1)

    assert unpack(pack(early, "v")).utcoffset() == timedelta(hours=2)
    assert unpack(pack(late, "v")).utcoffset() == timedelta(hours=1)
    assert unpack(pack(late, "v")).tzinfo is BERLIN


@pytest.mark.parametrize(
    "zone", ["Atlantis/Poseidonis", "../../etc/passwd", "/etc", "Europe", "\0"]
)
def test_a_datetime_in_a_zone_unknown_here_keeps_its_offset(zone):
    packed = msgpack.packb(msgpack.ExtType(2, f"2024-07-01T12:00:00+02:00[{zone}]".encode()))

    assert unpack(packed) == datetime(2024, 7, 1, 12, tzinfo=timezone(timedelta(hours=2)))


def test_a_datetime_whose_zone_has_another_offset_here_keeps_its_instant():
    packed = msgpack.packb(msgpack.ExtType(2, b"2024-07-01T12:00:00+05:00[Europe/Berlin]"))

    assert unpack(packed) == datetime(2024, 7, 1, 7, tzinfo=UTC)


@pytest.mark.parametrize("value", [datetime.min, datetime.max])
def test_the_first_and_the_last_datetimes_come_back(value):
    for zone in (UTC, timezone(timedelta(hours=14)), timezone(timedelta(hours=-12)), BERLIN):
        assert same(unpack(pack(value.replace(tzinfo=zone), "v")), value.replace(tzinfo=zone))


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Name(enum.StrEnum):
    A = "a"


@dataclasses.dataclass
class Point:
    x: int


Pair = collections.namedtuple("Pair", "a b")


class Plain:
    pass


endless: list[object] = [1]
endless.append({"self": endless})

REFUSED = [
    ({1, 2}, "v", "use replica.set() or a sorted list"),
    (frozenset(), "v", "use replica.set() or a sorted list"),
    ({"goal": [0, 1, {"x": {3}}]}, "v['goal'][2]['x']", "a set cannot be shared"),
    ({3: ({b"k": {4}},)}, "v[3][0][b'k']", "a set cannot be shared"),
    ([Level.LOW], "v[0]", "use int(...)"),
    (Name.A, "v", "use str(...)"),
    (Color.RED, "v", "use its .value"),
    (Point(1), "v", "use dataclasses.asdict(...)"),
    (Pair(1, 2), "v", "use tuple(...)"),
    ([collections.OrderedDict()], "v[0]", "use dict(...)"),
    (collections.defaultdict(list), "v", "use dict(...)"),
    (bytearray(b"x"), "v", "use bytes(...)"),
    ([memoryview(b"x")], "v[0]", "use bytes(...)"),
    (decimal.Decimal("1.5"), "v", "use str(...)"),
    (uuid.UUID(int=0), "v", "use str(...)"),
    (pathlib.Path("x"), "v", "use str(...)"),
    (1j, "v", "two floats"),
    (array.array("b"), "v", "use None, bool, int"),
    (Plain(), "v", "a Plain cannot be shared"),
    (int, "v", "a type cannot be shared"),
    ((n for n in ()), "v", "use list(...)"),
    (date(2024, 1, 1), "v", "aware datetime"),
    (timedelta(1), "v", "use .total_seconds()"),
    ({"at": datetime(2024, 1, 1)}, "v['at']", "without timezone; add one"),
    (["ok", "\ud800"], "v[1]", "lone surrogate"),
    ({"\ud800": 1}, "a key in v", "lone surrogate"),
    ({(1, 2): 3}, "v", "has a tuple for a key; use a str"),
    ({"a": {UTC: 1}}, "v['a']", "has a timezone for a key"),
    ({(10**5000,): 1}, "v", "has a tuple for a key"),
    ({datetime(2024, 1, 1, tzinfo=UTC): 1}, "v", "has a datetime for a key"),
    ([{math.nan: 1}], "v[0]", "has NaN for a key"),
    ({Level.LOW: 1}, "v", "has a Level for a key"),
    (1 << INT_BYTES_MAX * 8, "v", "4,298 digits"),
    ({-1 << INT_BYTES_MAX * 8: 1}, "a key in v", "4,298 digits"),
    (endless, "v[1]['self'][1]['self']" + "[1]['self']" * (DEPTH_MAX // 2 - 2), "contains itself"),
    ("x" * VALUE_BYTES_MAX, "v", "larger than 1048576 bytes"),
    ([[b"x" * 1024] * 1024], "v", "larger than 1048576 bytes"),
    ([None] * (VALUE_BYTES_MAX + 1), "v", "larger than 1048576 bytes"),
]


@pytest.mark.parametrize(("value", "where", "reason"), REFUSED, ids=lambda part: None)
def test_a_refusal_names_the_place_and_what_to_do(value, where, reason):
    with pytest.raises(UnsupportedValue) as caught:
        pack(value, "v")

    assert caught.value.where == where
    assert reason in str(caught.value)


def nested(levels):
    value = []
    for _ in range(levels - 1):
        value = [value]
    return value


def test_nesting_ends_at_its_bound_when_packed_and_when_unpacked():
    assert unpack(pack(nested(DEPTH_MAX), "v")) == nested(DEPTH_MAX)

    with pytest.raises(UnsupportedValue, match="nests deeper than 64"):
        pack(nested(DEPTH_MAX + 1), "v")
    with pytest.raises(InvalidUpdate, match="nests deeper than 64"):
        unpack(msgpack.packb(nested(DEPTH_MAX + 1)))


def test_a_small_graph_that_is_a_huge_tree_is_refused_at_once():
    value = ["x"]
    for _ in range(50):
        value = [value, value]

    with pytest.raises(UnsupportedValue, match="larger than"):
        pack(value, "v")


def test_the_largest_ints_that_pass_can_be_printed():
    largest = (1 << (INT_BYTES_MAX * 8 - 1)) - 1

    assert str(unpack(pack([largest, -largest], "v"))[1]) == str(-largest)


# Bytes of strangers

HOSTILE = {
    "nothing": b"",
    "cut off": b"\x92\x01",
    "trailing bytes": b"\x01\x01",
    "reserved byte": b"\xc1",
    "list of 4 billion": b"\xdd\xff\xff\xff\xff",
    "dict of 4 billion": b"\xdf\xff\xff\xff\xff",
    "str of 4 billion": b"\xdb\xff\xff\xff\xff",
    "bad UTF-8": b"\xa1\xff",
    "surrogate in UTF-8": b"\xa3\xed\xa0\x80",
    "100,000 levels of lists": b"\x91" * 100_000 + b"\x01",
    "1,000 levels of lists": b"\x91" * 1_000 + b"\x01",
    "100,000 levels of dicts": b"\x81\x01" * 100_000 + b"\x01",
    "list as a key": b"\x81\x90\x01",
    "dict as a key": b"\x81\x80\x01",
    "NaN as a key": b"\x81\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00\x01",
    "datetime as a key": b"\x81" + pack(datetime(2024, 1, 1, tzinfo=UTC), "") + b"\x01",
    "unknown extension": b"\xd4\x05x",
    "huge int": msgpack.packb(msgpack.ExtType(1, b"\x7f" * (INT_BYTES_MAX + 1))),
    "naive datetime": msgpack.packb(msgpack.ExtType(2, b"2024-07-01T12:00:00")),
    "no datetime": msgpack.packb(msgpack.ExtType(2, b"yesterday")),
    "timestamp in the year 10,000,000": b"\xc7\x0c\xff\x00\x00\x00\x00\x7f" + b"\xff" * 7,
    "too large": b"\xc6\x00\x10\x00\x00" + bytes(VALUE_BYTES_MAX),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_bytes_are_refused_that_are(name):
    with pytest.raises(InvalidUpdate):
        unpack(HOSTILE[name])


@settings(max_examples=500)
@given(st.binary(max_size=60))
def test_random_bytes_give_a_value_or_are_refused(data):
    try:
        value = unpack(data)
    except InvalidUpdate:
        return
    assert same(unpack(pack(value, "v")), value)


def test_damaged_bytes_give_a_value_or_are_refused():
    rng = random.Random(1)
    sample = {
        "a": [1, 2.5, None, True, b"xyz", "text" * 20, -(2**70)],
        7: {"at": datetime(2024, 7, 1, tzinfo=BERLIN), b"k": [[[]]]},
    }
    packed = pack(sample, "v")
    for _ in range(5_000):
        damaged = bytearray(packed)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            value = unpack(bytes(damaged))
        except InvalidUpdate:
            continue
        assert same(unpack(pack(value, "v")), value)


# Elements of sets

elements = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), text, st.binary(),
        st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=st.just(UTC) | offsets),
    ),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=300)
@given(elements, elements)
@example(1, True)
@example(1.0, 1)
@example(0, -0.0)
@example((1, (True,)), (1.0, (1,)))
@example("1", 1)
@example("", b"")
@example((), ("",))
@example(1e300, int(1e300))
@example(2**53, float(2**53 + 1))
@example(math.inf, -math.inf)
def test_elements_have_the_same_key_exactly_when_python_calls_them_equal(a, b):
    assert (pack_key(a, "s") == pack_key(b, "s")) == (a == b)
    assert unpack_key(pack_key(a, "s")) == a


def test_equal_instants_are_one_element():
    here = datetime(2024, 7, 1, 14, tzinfo=BERLIN)

    key = pack_key(here, "s")

    assert key == pack_key(here.astimezone(UTC), "s") == "d2024-07-01T12:00:00"
    assert unpack_key(key) == here


def test_keys_of_elements_can_be_read_by_people():
    assert pack_key("python", "s") == "spython"
    assert pack_key(42, "s") == pack_key(42.0, "s") == "i42"
    assert pack_key(("a", 2.5), "s") == "t2:sa4:f2.5"
    assert pack_key(b"\x01", "s") == "b01"


@pytest.mark.parametrize(
    ("element", "where", "reason"),
    [
        ([1], "s", "use a tuple"),
        ({1}, "s", "cannot be an element of a set"),
        (("a", {"b": 1}), "s[1]", "cannot be an element of a set"),
        (math.nan, "s", "cannot be an element of a set"),
        (Level.LOW, "s", "cannot be an element of a set"),
        (Name.A, "s", "cannot be an element of a set"),
        ("\ud800", "s", "lone surrogate"),
        (datetime(2024, 1, 1), "s", "without timezone"),
        (datetime.min.replace(tzinfo=timezone(timedelta(hours=5))), "s", "out of range"),
        (1 << INT_BYTES_MAX * 8, "s", "4,298 digits"),
    ],
    ids=lambda part: None,
)
def test_an_element_is_refused_that_has_no_key(element, where, reason):
    with pytest.raises(UnsupportedValue) as caught:
        pack_key(element, where="s")

    assert caught.value.where == where
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "", "x", "i", "i01", "i+1", "i 1", "i1_0", "i1.0", "i" + "9" * 5000, "f1.0", "f1", "fnan",
        "f 2.5", "f2.50", "bZZ", "bAB", "b 01", "n ", "d", "d2024-07-01", "d2024-07-01T12:00:00Z",
        "t2:sa4:f2.5x", "t3:sa", "t-1:x", "t02:sa", "t2:i1x", "t" * 5000, "t9999:sa",
    ],
)  # fmt: skip
def test_a_key_that_is_not_the_one_way_to_write_an_element_is_refused(key):
    with pytest.raises(InvalidUpdate):
        unpack_key(key)


@settings(max_examples=500)
@given(st.text("tsifbnd0123456789:-.e ", max_size=12))
def test_random_keys_are_canonical_or_refused(key):
    try:
        element = unpack_key(key)
    except InvalidUpdate:
        return
    assert pack_key(element, "s") == key
