"""
The guard: reads yrs update bytes, and refuses all that honest lanes never write.

pycrdt is not memory-safe against hostile updates: 26 bytes can crash the process, others
hang it. It is safe behind three walls: a signature, this guard, and causal order. So no
foreign byte reaches pycrdt before it was read here, and what was read is put to use: parsed
slots feed the index of the lanes, and states are joined by splicing their sections.

The shape of a document (Yjs update encoding, version 1): a root map "lanes" holds, as
"client/number", maps; those hold maps in turn, or slots (one buffer each), and a map in a map holds
slots only. `lanes` calls the former groups and the latter segments. All of a client stands in its
own section, refers to that section alone, and extends one of its *chains*: the items that one key
of one map has had, of which all but the last are deleted.

This module knows the shape. Whether a change extends the right chain of a lane as it stands
now, only the index can tell: that is checked in `lanes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from crdtstate.clock import WRITER_MAX
from crdtstate.errors import InvalidUpdate

ROOT = "lanes"

CLOCK_MAX = 2**31 - 1
"""yrs keeps clocks in 32 bits and panics, or worse, close to the end."""

KEY_BYTES_MAX = 1024

# The change of one transaction stays far below these; they bound the work for a hostile one.
CHANGE_BYTES_MAX = 4 << 20
CHANGE_ITEMS_MAX = 50_000
CHANGE_RANGES_MAX = 50_000
CHANGE_DELETED_MAX = 100_000
CHANGE_DELETE_CLIENTS_MAX = 64

STATE_BYTES_MAX = 256 << 20
STATE_LANES_MAX = 200_000
STATE_STRUCTS_MAX = 5_000_000  # what a full state of ordinary slots has; about 1 GiB parsed

RUN_MIN = 4
"""Shorter runs are taken apart: what a `Run` is made of takes the memory of a few structs, and
somebody may send a state of nothing but the shortest."""

GC = 0
"""A garbage range: what is left of the inside of a deleted segment."""
DELETED = 1
"""Deleted items that follow each other in one chain; the key they stood at is still known."""
SEGMENT = 7
"""A live map in the root, or in a map in the root."""
SLOT = 8
"""A live buffer."""

# The info byte of an item: its kind, 0x20 "has a key", 0x80 "follows an item of its chain".
# Without the latter it spells out parent and key. No right origin (0x40): maps have none.
_KEYED = 0x20
_CHAINED = 0x80
_KIND = 31
_LIVE = frozenset(kind | _KEYED | chained for kind in (SLOT, SEGMENT) for chained in (0, _CHAINED))
_STORED = _LIVE | {GC, DELETED | _KEYED, DELETED | _KEYED | _CHAINED}

_IN_ROOT = b"\x01" + bytes([len(ROOT)]) + ROOT.encode()
_ONE_BUFFER = b"\x01\x74"
_MAP = 1

_MISPLACED = "maps are in the root or one level below, and slots in maps"

Item = tuple[int | None, int | str | None, str | None, bytes | None]
"""``(origin, parent, key, content)`` of a new item. Either *origin*, the clock of the item it
follows in its chain; or the start of a chain: *parent*, a map's clock or `ROOT`, and *key*.
*content* is that of a slot, None for a new map."""

Struct = tuple[int, int, int, int | None, int | str | None, str | None, bytes | None]
"""``(clock, length, kind, origin, parent, key, content)`` of a part of a lane's state. Parent
and key are always given, found by way of the chain, except for a garbage range: all None."""

Range = tuple[int, int]
"""``(start, length)`` of deleted clocks."""

_T = TypeVar("_T")


class Run(NamedTuple):
    """Slots and deleted runs that follow each other, are in one map, and begin a chain each: nearly
    all that a state consists of. As lists they are taken in many times as fast as one by one."""

    parent: int
    clocks: list[int]
    keys: list[str]
    contents: list[bytes]
    """Of the slots, in order."""
    dead: list[tuple[int, int, str]]
    """``(clock, length, key)`` of the deleted runs."""

    @property
    def size(self) -> int:
        """How many structs it stands for."""
        return len(self.keys) + len(self.dead)

    def structs(self) -> list[Struct]:
        """The same, one by one."""
        live = zip(self.clocks, self.keys, self.contents, strict=True)
        found: list[Struct] = [
            (clock, 1, SLOT, None, self.parent, key, content) for clock, key, content in live
        ]
        found += [(at, size, DELETED, None, self.parent, key, None) for at, size, key in self.dead]
        return sorted(found)


class ParsedChange(NamedTuple):
    """What one change does. Item number i has the clock ``clock + i``."""

    client: int | None
    """Who wrote the items; None when there are none."""
    clock: int
    items: list[Item]
    deletes: list[tuple[int, int, int]]
    """``(client, start, length)``, sorted by start for each client, with gaps between."""


class ParsedLane(NamedTuple):
    """What a state holds of one client."""

    clock: int
    """The client's next clock: the sum of all lengths."""
    parts: list[Struct | Run]
    """All of it, in order."""
    deletes: list[Range]
    """The clocks of all structs that are GC or DELETED."""
    body: memoryview
    """The client's whole section of the update, head included; it refers to nothing else."""

    @property
    def structs(self) -> list[Struct]:
        """All of it, one by one."""
        return list(_one_by_one(self.parts))


# Changes


def parse_change(update: bytes) -> ParsedChange:
    """Read the update of one transaction of one client.

    Raises:
        InvalidUpdate: It is not exactly what such a transaction writes.
    """
    return _read(_parse_change, update, CHANGE_BYTES_MAX)


def _parse_change(data: bytes) -> ParsedChange:
    client: int | None = None
    clock = 0
    items: list[Item] = []
    at = 1
    if data[0]:
        if data[0] != 1:
            raise InvalidUpdate("a change has one author")
        client, clock, _, parts, at = _parse_section(data, at, _LIVE, CHANGE_ITEMS_MAX)
        places: set[object] = set()
        inner: set[int] = set()
        for at_clock, _, kind, origin, parent, key, content in _one_by_one(parts):
            if kind == SEGMENT and type(parent) is int:
                if parent in inner:
                    raise InvalidUpdate(_MISPLACED)
                inner.add(at_clock)
            if origin is None:
                places.add((parent, key))
            elif origin < clock:
                places.add(origin)
            else:
                raise InvalidUpdate("a change replaces what it writes itself")
            items.append((origin, parent, key, content))
        if len(places) != len(items):
            raise InvalidUpdate("a change writes a key twice")
    deletes = parse_deletes(data, at, CHANGE_DELETE_CLIENTS_MAX, CHANGE_RANGES_MAX)
    flat = [(owner, start, length) for owner in deletes for start, length in deletes[owner]]
    if sum(length for _, _, length in flat) > CHANGE_DELETED_MAX:
        raise InvalidUpdate(f"a change deletes more than {CHANGE_DELETED_MAX} items")
    if client in deletes and sum(deletes[client][-1]) > clock:
        raise InvalidUpdate("a change deletes what it writes itself, or nobody has written")
    return ParsedChange(client, clock, items, flat)


# States


def parse_state(update: bytes) -> dict[int, ParsedLane]:
    """Read the whole state of a document, lane by lane.

    Raises:
        InvalidUpdate: It is not exactly what a document of lanes encodes to.
    """
    return _read(_parse_state, update, STATE_BYTES_MAX)


def _parse_state(data: bytes) -> dict[int, ParsedLane]:
    sections, at = parse_varint(data, 0)
    if sections > STATE_LANES_MAX:
        raise InvalidUpdate(f"{sections} lanes; at most {STATE_LANES_MAX}")
    lanes: dict[int, ParsedLane] = {}
    left = STATE_STRUCTS_MAX
    before = WRITER_MAX + 1
    for _ in range(sections):
        start = at
        client, first, clock, parts, at = _parse_section(data, at, _STORED, left)
        left -= parse_varint(data, start)[0]
        # The order in which yrs writes them. It rules out that a client comes twice, which
        # yrs does not survive.
        if client >= before:
            raise InvalidUpdate("the lanes are not in descending order of their clients")
        before = client
        if first:
            raise InvalidUpdate(f"the lane of {client} does not start at clock 0")
        lanes[client] = _follow_chains(parts, clock, memoryview(data)[start:at])
    deletes = parse_deletes(data, at, sections, CLOCK_MAX)
    if not deletes.keys() <= lanes.keys():
        raise InvalidUpdate("the delete set names a client that has no lane")
    if any(deletes.get(client, []) != lane.deletes for client, lane in lanes.items()):
        raise InvalidUpdate("the delete set does not name exactly what is deleted")
    return lanes


def _follow_chains(raw: list[Struct | Run], end: int, body: memoryview) -> ParsedLane:
    """Check that the parts form chains, and tell each its parent and key."""
    # Live maps that are in the root; and of the root and all live maps the keys with a chain.
    outer: set[int] = set()
    begun: dict[int | str | None, set[str | None]] = {ROOT: set()}
    # Last clock of a deleted run -> where its chain stands. Taken out when followed, so a
    # chain doesn't fork; and as it holds deleted runs only, all but a chain's last are that.
    ends: dict[int, tuple[int | str | None, str | None]] = {}
    parts: list[Struct | Run] = []
    deletes: list[Range] = []
    for part in raw:
        parts.append(part)
        if isinstance(part, Run):
            _begin(begun, part.parent, part.keys)
            if part.dead:
                _begin(begun, part.parent, [name for _, _, name in part.dead])
                for clock, length, name in part.dead:
                    ends[clock + length - 1] = (part.parent, name)
                    _add(deletes, clock, length)
        else:
            clock, length, kind, origin, parent, key, content = part
            if kind != GC:
                if origin is None:
                    _begin(begun, parent, (key,))
                else:
                    place = ends.pop(origin, None)
                    if place is None:
                        raise InvalidUpdate("an item does not follow the deleted end of a chain")
                    parent, key = place
                    parts[-1] = (clock, length, kind, origin, parent, key, content)
                if kind == DELETED:
                    ends[clock + length - 1] = (parent, key)
                elif kind == SEGMENT:
                    if parent is ROOT:
                        outer.add(clock)
                    elif parent not in outer:
                        raise InvalidUpdate(_MISPLACED)
                    begun[clock] = set()
                elif parent is ROOT:
                    raise InvalidUpdate(_MISPLACED)
            if kind == GC or kind == DELETED:
                _add(deletes, clock, length)
    return ParsedLane(end, parts, deletes, body)


def _add(ranges: list[Range], clock: int, length: int) -> None:
    """Add a range that comes after all of *ranges*."""
    if ranges:
        start, before = ranges[-1]
        if start + before == clock:
            ranges[-1] = (start, before + length)
            return
    ranges.append((clock, length))


def _begin(
    begun: dict[int | str | None, set[str | None]],
    parent: int | str | None,
    keys: Sequence[str | None],
) -> None:
    """Note that chains begin in a map, at these *keys*."""
    there = begun.get(parent)
    if there is None:
        raise InvalidUpdate("an item in something that is not a live map")
    count = len(there) + len(keys)
    there.update(keys)
    if len(there) != count:
        raise InvalidUpdate("two chains at one key")


def join_states(ours: bytes, theirs: bytes, newer: Callable[[int], bool]) -> bytes:
    """Splice two states of a document, lane by lane, to an update for a fresh Doc.

    A lane has one writer, so one of two versions of it has all items of the other, and no
    lane refers to another. Deletes can come from other writers too (adoption), so those of
    both sides count. Beyond the section taken they stand in the delete set alone: only what
    a Doc that loaded the result encodes is a state again.

    Args:
        newer: Whether the lane of this client is newer in *theirs*; asked where both have it.

    Raises:
        InvalidUpdate: One of them is not a state of lanes.
    """
    lanes = parse_state(ours)
    for client, lane in parse_state(theirs).items():
        here = lanes.get(client)
        if here is not None:
            taken = lane if newer(client) else here
            lane = taken._replace(deletes=_union(here.deletes, lane.deletes, taken.clock))
        lanes[client] = lane
    return encode_state(lanes)


def _union(ranges: list[Range], others: list[Range], end: int) -> list[Range]:
    """All clocks below *end* in either, as sorted ranges with gaps between."""
    joined: list[Range] = []
    for start, length in sorted(ranges + others):
        stop = min(start + length, end)
        if joined and start <= sum(joined[-1]):
            stop = max(stop, sum(joined[-1]))
            start = joined.pop()[0]
        if start < stop:
            joined.append((start, stop - start))
    return joined


def encode_state(lanes: Mapping[int, ParsedLane]) -> bytes:
    """Put sections of lanes together to an update that `parse_state` and yrs read."""
    parts: list[bytes | memoryview] = [encode_varint(len(lanes))]
    parts += [lanes[client].body for client in sorted(lanes, reverse=True)]
    parts.append(encode_deletes({c: lanes[c].deletes for c in sorted(lanes) if lanes[c].deletes}))
    return b"".join(parts)


# Parts


def _read(parse: Callable[[bytes], _T], update: bytes, size_max: int) -> _T:
    # A slice past the end comes back short, but then the next byte is missing: IndexError.
    if len(update) > size_max:
        raise InvalidUpdate(f"an update of {len(update)} bytes; at most {size_max}")
    try:
        return parse(update)
    except IndexError:
        raise InvalidUpdate("the update is cut off") from None
    except UnicodeDecodeError:
        raise InvalidUpdate("a key is not valid UTF-8") from None


def _parse_section(
    data: bytes, at: int, allowed: frozenset[int], count_max: int
) -> tuple[int, int, int, list[Struct | Run], int]:
    """Read the structs of one client. Return client, first and next clock, structs, where it ends.

    Structs that follow in a chain come back without parent and key.
    """
    # All remote changes and all loads pass here: hence the index arithmetic, and numbers of
    # one byte are read in place.
    count, at = parse_varint(data, at)
    start = at
    client, at = parse_varint(data, at)
    mark = data[start:at]
    first, at = parse_varint(data, at)
    if not 0 < count <= count_max:
        raise InvalidUpdate(f"a section of {count} items; at least 1, at most {count_max}")
    if client > WRITER_MAX:
        raise InvalidUpdate("a client id of more than 53 bits")
    clock = first
    parts: list[Struct | Run] = []
    # How the newest struct names the map in which it begins a chain.
    place = b""
    while count:
        info = data[at]
        if info not in allowed:
            raise InvalidUpdate(f"info byte {info:#04x} is nothing that belongs here")
        at += 1
        kind = info & _KIND
        length = 1
        origin: int | None = None
        parent: int | str | None = None
        key: str | None = None
        content: bytes | None = None
        if info:
            start = at
            if info < _CHAINED and data.startswith(_IN_ROOT, at):
                at += len(_IN_ROOT)
                parent = ROOT
            else:
                if info < _CHAINED:
                    if data[at]:
                        raise InvalidUpdate(f"a root other than {ROOT!r}")
                    at += 1
                if not data.startswith(mark, at):
                    raise InvalidUpdate("an item refers to another client")
                at += len(mark)
                number, at = (data[at], at + 1) if data[at] < 128 else parse_varint(data, at)
                if number >= clock:
                    raise InvalidUpdate("an item refers to one that is not older")
                if info < _CHAINED:
                    parent = number
                else:
                    origin = number
            if info < _CHAINED:
                body = at
                key, at = _parse_key(data, at)
                if parent is ROOT and not _is_name(key, client):
                    raise InvalidUpdate(f"{key[:40]!r} does not name a map of {client}")
                if parent is ROOT and kind == SLOT:
                    raise InvalidUpdate(_MISPLACED)
        if kind == SLOT:
            content, at = _parse_buffer(data, at)
        elif kind == SEGMENT:
            if data[at] != _MAP:
                raise InvalidUpdate("a nested type that is not a map")
            at += 1
        else:
            length, at = _parse_length(data, at)
        parts.append((clock, length, kind, origin, parent, key, content))
        clock += length
        count -= 1
        if type(parent) is not int:
            place = b""
        elif count:
            before, place = place, data[start:body]
            if place == before and data.startswith(place, at + 1):
                # The third of one map: there will be more.
                run = Run(parent, [], [], [], [])
                clock, count, at = _parse_run(data, at, place, allowed, clock, count, run)
                parts += (run,) if run.size >= RUN_MIN else run.structs()
    if clock > CLOCK_MAX:
        raise InvalidUpdate("clocks are used up")
    return client, first, clock, parts, at


def _parse_run(
    data: bytes, at: int, place: bytes, allowed: frozenset[int], clock: int, count: int, run: Run
) -> tuple[int, int, int]:
    """Read slots and deleted runs as long as they begin chains in one map, which follows the info
    byte as *place*. Return the next clock, what is left of *count*, where it ends."""
    # The innermost loop of every load: what is compared is compared as it stands there, and the
    # common case of short keys and contents needs no call.
    skip = 1 + len(place)
    slot = bytes([SLOT | _KEYED]) + place
    deleted = bytes([DELETED | _KEYED]) + place
    _, clocks, keys, contents, dead = run
    add_clock, add_key, add_content = clocks.append, keys.append, contents.append
    starts = data.startswith
    while count:
        if starts(slot, at):
            at += skip
            size = data[at]
            if size < 128:
                start, at = at + 1, at + 1 + size
                add_key(data[start:at].decode())
            else:
                key, at = _parse_key(data, at)
                add_key(key)
            if starts(_ONE_BUFFER, at) and (size := data[at + 2]) < 128:
                start, at = at + 3, at + 3 + size
                add_content(data[start:at])
            else:
                content, at = _parse_buffer(data, at)
                add_content(content)
            add_clock(clock)
            clock += 1
        elif starts(deleted, at) and deleted[0] in allowed:
            key, at = _parse_key(data, at + skip)
            length, at = _parse_length(data, at)
            dead.append((clock, length, key))
            clock += length
        else:
            break
        count -= 1
    return clock, count, at


def _parse_buffer(data: bytes, at: int) -> tuple[bytes, int]:
    if not data.startswith(_ONE_BUFFER, at):
        raise InvalidUpdate("a slot is not exactly one buffer")
    size, at = parse_varint(data, at + len(_ONE_BUFFER))
    return data[at : at + size], at + size


def _parse_length(data: bytes, at: int) -> tuple[int, int]:
    length, at = parse_varint(data, at)
    if not length:
        raise InvalidUpdate("a deleted run of length 0")
    return length, at


def _parse_key(data: bytes, at: int) -> tuple[str, int]:
    size, at = parse_varint(data, at)
    if size > KEY_BYTES_MAX:
        raise InvalidUpdate(f"a key of {size} bytes; at most {KEY_BYTES_MAX}")
    return data[at : at + size].decode(), at + size


def _one_by_one(parts: Iterable[Struct | Run]) -> Iterator[Struct]:
    for part in parts:
        if isinstance(part, Run):
            yield from part.structs()
        else:
            yield part


def _is_name(key: str, client: int) -> bool:
    """Whether *key* is ``client/number``: so no two lanes meet at a key of the root."""
    owner, _, number = key.partition("/")
    return owner == str(client) and number.isascii() and number.isdigit()


def parse_deletes(
    data: bytes, at: int, clients_max: int, ranges_max: int
) -> dict[int, list[Range]]:
    """Read the delete set, with which the update ends. Return the ranges of each client."""
    clients, at = parse_varint(data, at)
    if clients > clients_max:
        raise InvalidUpdate(f"deletes of {clients} clients; at most {clients_max}")
    deletes: dict[int, list[Range]] = {}
    for _ in range(clients):
        client, at = parse_varint(data, at)
        count, at = parse_varint(data, at)
        if client > WRITER_MAX or client in deletes:
            raise InvalidUpdate("the delete set names a client twice, or one of more than 53 bits")
        ranges_max -= count
        if ranges_max < 0 or not count:
            raise InvalidUpdate(f"{count} deleted ranges of one client: none, or too many")
        ranges: list[Range] = []
        end = -1
        for _ in range(count):
            start, at = parse_varint(data, at)
            length, at = parse_varint(data, at)
            if start <= end or not length:
                raise InvalidUpdate("deleted ranges are empty, out of order or touch")
            end = start + length
            ranges.append((start, length))
        if end > CLOCK_MAX:
            raise InvalidUpdate("clocks are used up")
        deletes[client] = ranges
    if at != len(data):
        raise InvalidUpdate("bytes after the end of the update")
    return deletes


def encode_deletes(deletes: Mapping[int, list[Range]]) -> bytes:
    """Write a delete set; the ranges of each client sorted, with gaps between."""
    out = bytearray(encode_varint(len(deletes)))
    for client, ranges in deletes.items():
        out += encode_varint(client) + encode_varint(len(ranges))
        for start, length in ranges:
            out += encode_varint(start) + encode_varint(length)
    return bytes(out)


def parse_varint(data: bytes, at: int) -> tuple[int, int]:
    """Read an unsigned number. Return it and where it ends."""
    byte = data[at]
    at += 1
    number = byte & 127
    shift = 7
    while byte > 127:
        if shift > 56:
            raise InvalidUpdate("a number of more than 63 bits")
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        shift += 7
    # One encoding per number: so the bytes of a client id can be compared instead of read.
    if not byte and shift > 7:
        raise InvalidUpdate("a number is longer than it has to be")
    return number, at


def encode_varint(number: int) -> bytes:
    """Write an unsigned number, seven bits to a byte, lowest first."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)
