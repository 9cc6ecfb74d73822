"""
Yjs updates as hypothesis makes them: well-formed, with every reference, length and key there is to
choose small enough to hit something. Who fails on one gets the smallest that fails.
"""

from __future__ import annotations

from hypothesis import strategies as st

from crdtstate.guard import encode_deletes, encode_varint

CLIENTS = st.sampled_from([7, 9, 11, 2**53 - 1, 2**53 + 7, 2**53 + 9])
CLOCKS = st.one_of(
    st.integers(0, 40), st.sampled_from([2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 3])
)
LENGTHS = st.one_of(st.integers(0, 5), st.sampled_from([1000, 2**31 - 1, 2**32 - 1, 2**32]))
KEYS = st.sampled_from(
    ["mplan\0goal", "mplan\0k1", "cn\0", "sskills\0spython", "7/0", "7/3", "9/0", "0", "3", "", "é"]
)
VALUES = st.one_of(
    st.just(b"\x7e"),
    st.just(b"\x7f"),
    st.binary(max_size=6).map(lambda data: b"\x74" + encode_varint(len(data)) + data),
    st.integers(0, 3).map(lambda depth: b"\x75\x01" * depth + b"\x7e"),
    st.just(b"\x93\xc4\x01\x01\x02\x00").map(lambda data: b"\x74\x06" + data),
)


def _text(value: str) -> bytes:
    return encode_varint(len(value.encode())) + value.encode()


@st.composite
def _ids(draw: st.DrawFn) -> bytes:
    return encode_varint(draw(CLIENTS)) + encode_varint(draw(CLOCKS))


@st.composite
def _contents(draw: st.DrawFn, kind: int) -> bytes:
    match kind:
        case 0 | 1 | 10:
            return encode_varint(draw(LENGTHS))
        case 3 | 4:
            return _text(draw(st.sampled_from(["", "x", "é", "😀x", "xyz" * 50])))
        case 5:
            return _text(draw(st.sampled_from(["null", "{}", "[1]", "x", "NaN"])))
        case 6:
            return _text("bold") + _text(draw(st.sampled_from(["true", "null", "x"])))
        case 7:
            return encode_varint(draw(st.sampled_from([0, 1, 1, 1, 2, 3, 4, 6, 9])))
    values = draw(st.lists(VALUES, max_size=3))
    stated = draw(st.sampled_from([len(values), len(values), len(values), 2**28]))
    return encode_varint(stated) + b"".join(values)


@st.composite
def structs(draw: st.DrawFn) -> bytes:
    """An item, a garbage range or a skip."""
    kind = draw(st.sampled_from([0, 1, 3, 4, 5, 6, 7, 7, 8, 8, 8, 9, 10]))
    if kind in (0, 10):
        return bytes([kind]) + draw(_contents(kind))
    left, right, keyed = (draw(st.booleans()) for _ in range(3))
    out = bytes([kind | left << 7 | right << 6 | keyed << 5])
    for is_there in (left, right):
        if is_there:
            out += draw(_ids())
    if not left and not right:
        if draw(st.booleans()):
            out += b"\1" + _text(draw(st.sampled_from(["lanes", "body", "other", ""])))
        else:
            out += b"\0" + draw(_ids())
        if keyed:
            out += _text(draw(KEYS))
    return out + draw(_contents(kind))


@st.composite
def updates(draw: st.DrawFn) -> bytes:
    """A whole update."""
    sections = []
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
        made = draw(st.lists(structs(), max_size=6))
        stated = draw(st.sampled_from([len(made), len(made), len(made), 2**28]))
        head = (stated, draw(CLIENTS), draw(CLOCKS))
        sections.append(b"".join(map(encode_varint, head)) + b"".join(made))
    ranges = st.lists(st.tuples(CLOCKS, LENGTHS), max_size=3)
    deletes = draw(st.dictionaries(CLIENTS, ranges, max_size=2))
    return encode_varint(len(sections)) + b"".join(sections) + encode_deletes(deletes)
