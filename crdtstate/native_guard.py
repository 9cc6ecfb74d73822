"""
The guard of shared documents: reads Yjs updates of texts, arrays and maps, refuses the rest.

Nobody has a lane in a shared document: items of all writers stand beside each other and refer
to each other, as editors in browsers write them. What a writer's next change can be held to: its
items are its own and continue its clock; what they refer to is known and stands where they do;
it deletes known items; nothing is empty, endless, nested too deep or of a kind we don't share.

An honest word: this wall is lower than that of lanes. It keeps out every single update known to
crash pycrdt, but nobody can tell from outside that yrs survives each well-formed edit of a
sequence; 6 of 100 hostile histories that passed such a wall made it hang. Shared documents are
for members you trust; what browsers send goes through a process of its own with a time limit.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from crdtstate.clock import WRITER_MAX
from crdtstate.errors import InvalidUpdate
from crdtstate.guard import (
    CLOCK_MAX,
    KEY_BYTES_MAX,
    STATE_BYTES_MAX,
    Range,
    _parse_deletes,
    _parse_varint,
)

CHANGE_BYTES_MAX = 2 << 20
CHANGE_COUNT_MAX = 100_000
"""Items, deleted ranges and their writers in a change: a whole text can go in one stroke."""

DEPTH_MAX = 32
"""How deep types nest in types, and plain values in each other; yrs recurses on both."""

JSON_BYTES_MAX = 1 << 20
"""An embed, or the value of a format; a picture in a text is an embed."""

ROOT_CHARS_MAX = 200

# Kinds of content: the low bits of an item's info byte. The high ones say what it refers to.
GC, DELETED, BINARY, STRING, EMBED, FORMAT, TYPE, ANY = 0, 1, 3, 4, 5, 6, 7, 8
_KINDS = frozenset({DELETED, BINARY, STRING, EMBED, FORMAT, TYPE, ANY})
_LEFT, _RIGHT, _KEYED, _KIND = 0x80, 0x40, 0x20, 0x1F
_IN_ARRAYS, _IN_TEXTS = frozenset({BINARY, ANY}), frozenset({STRING, EMBED, FORMAT})
_ARRAY, _MAP, _TEXT = 0, 1, 2

# Kinds of plain values, the first with the bytes they take.
_SIZES = {127: 0, 126: 0, 124: 4, 123: 8, 122: 8, 121: 0, 120: 0}
_INT, _WORD, _OBJECT, _LIST, _BUFFER = 125, 119, 118, 117, 116

Id = tuple[int, int]
"""``(client, clock)`` of an item."""

Struct = tuple[int, int, int, Id | None, Id | None, Id | str | None, bool, list[int]]
"""``(clock, length, kind, left, right, parent, keyed, halves)``. The parent, a root's name or the
item that is a type, is only given where there are neither left nor right. Halves are the clocks
within the length that are the second of a character of two."""

Ranges = dict[int, list[Range]]
"""Client -> ranges of its clocks."""


class Place(NamedTuple):
    """Where items stand: in a type, *depth* types deep, in its sequence or under its keys.

    Attributes:
        parent: The item that is the type; None for a root.
        is_deleted: The items came with their content deleted; they may have been types.
    """

    root: str
    depth: int
    parent: Id | None
    keyed: bool
    is_deleted: bool


class Known:
    """Where every item stands that passed the guard, in runs."""

    def __init__(self) -> None:
        # Client -> its next clock.
        self.clocks: dict[int, int] = {}
        # Client -> where its runs start, and their places. None: collected, so nobody knows.
        self._starts: dict[int, list[int]] = {}
        self._places: dict[int, list[Place | None]] = {}
        # Items that are types -> which, and the roots of which it is known.
        self._types: dict[Id, int] = {}
        self._roots: dict[str, tuple[int, Id | None]] = {}
        # Where no item may be cut: yrs would keep an empty one, and nobody could read its state.
        self._halves: set[Id] = set()

    def roots(self) -> set[str]:
        return {place.root for places in self._places.values() for place in places if place}

    def roots_of(self, ranges: Ranges) -> set[str]:
        """The roots that these items stand in."""
        roots: set[str] = set()
        for client, spans in ranges.items():
            starts, places = self._starts[client], self._places[client]
            for start, length in spans:
                first, end = bisect_right(starts, start) - 1, bisect_left(starts, start + length)
                roots.update(place.root for place in places[first:end] if place)
        return roots

    def settle(self, root: str, kind: int, item: Id | None = None) -> bool:
        """Hold *root* to be a text or an array; False if it is the other one.

        The name of a root says nothing of its type, and an array that holds text which is not
        ASCII makes pycrdt hang when it is read.
        """
        return self._roots.setdefault(root, (kind, item))[0] == kind

    def join(self, other: Known) -> None:
        """Take in what *other* knows of the same document.

        Raises:
            InvalidUpdate: They disagree on the type of a root; nothing changed.
        """
        if any(self._roots.get(root, it)[0] != it[0] for root, it in other._roots.items()):
            raise InvalidUpdate(_TWO_TYPES)
        self._roots = other._roots | self._roots
        for client, clock in other.clocks.items():
            if clock > self.clocks.get(client, 0):
                self.clocks[client] = clock
                self._starts[client] = other._starts[client]
                self._places[client] = other._places[client]
        self._types.update(other._types)
        self._halves |= other._halves

    def extend(self, sections: Mapping[int, Sequence[Struct]], deletes: Ranges) -> None:
        """Add items, each after those it refers to, and check that what is deleted is there.

        Raises InvalidUpdate, with some of them added: `cut` them off again.
        """
        done = dict.fromkeys(sections, 0)
        todo = list(sections)
        # Client -> those whose next item refers to one of its later items.
        waiting: dict[int, list[int]] = {}
        while todo:
            client = todo.pop()
            before = done[client]
            for struct in sections[client][before:]:
                missing = self._missing(struct)
                if missing is not None:
                    waiting.setdefault(missing, []).append(client)
                    break
                self._add(client, struct)
                done[client] += 1
            if done[client] > before:
                todo += waiting.pop(client, [])
        if any(done[client] < len(structs) for client, structs in sections.items()):
            raise InvalidUpdate("an item refers to one that is not there, or is later")
        for client, spans in deletes.items():
            if sum(spans[-1]) > self.clocks.get(client, 0):
                raise InvalidUpdate("deletes what nobody has written")
            if any({(client, span[0]), (client, sum(span))} & self._halves for span in spans):
                raise InvalidUpdate("deletes half a character")

    def cut(self, client: int, clock: int) -> None:
        """Forget the items of *client* from *clock* on."""
        starts = self._starts.get(client, [])
        while starts and starts[-1] >= clock:
            starts.pop()
            self._places[client].pop()
        self.clocks[client] = clock

        def stays(item: Id | None) -> bool:
            return item is None or item[0] != client or item[1] < clock

        self._types = {item: kind for item, kind in self._types.items() if stays(item)}
        self._roots = {root: it for root, it in self._roots.items() if stays(it[1])}
        self._halves = set(filter(stays, self._halves))

    def _missing(self, struct: Struct) -> int | None:
        for reference in struct[3:6]:
            if type(reference) is tuple and reference[1] >= self.clocks.get(reference[0], 0):
                return reference[0]
        return None

    def _add(self, client: int, struct: Struct) -> None:
        clock, length, kind, left, right, *_, halves = struct
        if right in self._halves or left and (left[0], left[1] + 1) in self._halves:
            raise InvalidUpdate("an item within a character")
        self._halves.update((client, clock + half) for half in halves)
        place = self._place(struct) if kind != GC else None
        if place is not None:
            if place.depth > DEPTH_MAX:
                raise InvalidUpdate(f"types nest deeper than {DEPTH_MAX}")
            # Under a key each value follows the one before; only deleted ones form runs.
            is_one = length == 1 and kind in (BINARY, TYPE, ANY) or kind == DELETED
            if place.keyed and (right or not is_one):
                raise InvalidUpdate("what is under a key is not one value")
            self._check_type(place, kind, (client, clock))
        places = self._places.setdefault(client, [])
        starts = self._starts.setdefault(client, [])
        if not places or places[-1] != place:
            starts.append(clock)
            places.append(place)
        if made is not None:
            self._types[client, clock] = made
        self.clocks[client] = clock + length

    def _check_type(self, place: Place, kind: int, item: Id) -> None:
        """Check that the type this item is in can hold its kind."""
        wanted = _MAP if place.keyed else _ARRAY if kind in _IN_ARRAYS else _TEXT
        if place.parent is None:
            is_sure = kind in _IN_ARRAYS or kind in _IN_TEXTS
            if is_sure and not place.keyed and not self.settle(place.root, wanted, item):
                raise InvalidUpdate(_TWO_TYPES)
        pass

    def _place(self, struct: Struct) -> Place | None:
        _, _, kind, left, right, parent, keyed, _ = struct
        is_deleted = kind == DELETED
        if type(parent) is str:
            return Place(parent, 1, None, keyed, is_deleted)
        if type(parent) is tuple:
            holder = self._at(parent)
            if holder is None:
                return None
            if parent not in self._types and not holder.is_deleted:
                raise InvalidUpdate("an item in something that is not a type")
            return Place(holder.root, holder.depth + 1, parent, keyed, is_deleted)
        beside = [self._at(item) for item in (left, right) if item]
        place = beside[0]
        if place is None or beside[-1] is None:
            # Beside something collected, yrs collects it too; it doesn't matter where.
            return None
        # Merging updates, yrs forgets to say of an item that follows another that it is keyed.
        if place[:4] != beside[-1][:4] or keyed > place.keyed:
            raise InvalidUpdate("an item beside items of another place")
        return place if place.is_deleted == is_deleted else place._replace(is_deleted=is_deleted)

    def _at(self, item: Id) -> Place | None:
        client, clock = item
        return self._places[client][bisect_right(self._starts[client], clock) - 1]


def check_change(update: bytes, writer: int, known: Known) -> set[str]:
    """Check the next change of *writer*, add it to *known* and return the roots it touches.

    Raises:
        InvalidUpdate: It is not what an honest writer sends next; nothing changed.
    """
    if len(update) > CHANGE_BYTES_MAX:
        raise InvalidUpdate(f"a change of {len(update)} bytes; at most {CHANGE_BYTES_MAX}")
    sections, touched = _Reader(update).update(1, CHANGE_COUNT_MAX)
    clock = known.clocks.get(writer, 0)
    if not sections and not touched:
        raise InvalidUpdate("a change that changes nothing")
    if any(client != writer or structs[0][0] != clock for client, structs in sections.items()):
        raise InvalidUpdate(f"a change of {writer:x} does not continue its clock, {clock}")
    try:
        known.extend(sections, touched)
    except InvalidUpdate:
        known.cut(writer, clock)
        raise
    if sections:
        touched.setdefault(writer, []).append((clock, known.clocks[writer] - clock))
    return known.roots_of(touched)


def check_state(update: bytes) -> Known:
    """Check the whole state of a document and return what is in it.

    Raises:
        InvalidUpdate: It is not what a shared document encodes to.
    """
    if len(update) > STATE_BYTES_MAX:
        raise InvalidUpdate(f"a state of {len(update)} bytes; at most {STATE_BYTES_MAX}")
    sections, deletes = _Reader(update).update(CLOCK_MAX, CLOCK_MAX)
    if any(structs[0][0] for structs in sections.values()):
        raise InvalidUpdate("a client's items do not start at clock 0")
    known = Known()
    known.extend(sections, deletes)
    return known


def is_root_name(name: str) -> bool:
    return 0 < len(name) <= ROOT_CHARS_MAX and name.isprintable()


class _Reader:
    """A position in an update. A read past the end fails at the next byte, or at the very end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def update(self, clients_max: int, count_max: int) -> tuple[dict[int, list[Struct]], Ranges]:
        try:
            clients = self.number(clients_max)
            sections = dict(self.section(count_max) for _ in range(clients))
            deletes = _parse_deletes(self.data, self.at, count_max, count_max)
        except IndexError:
            raise InvalidUpdate("the update is cut off") from None
        except UnicodeDecodeError:
            raise InvalidUpdate("a string is not valid UTF-8") from None
        if len(sections) < clients:
            raise InvalidUpdate("a client comes twice")  # 26 bytes of this crash yrs.
        return sections, deletes

    def section(self, count_max: int) -> tuple[int, list[Struct]]:
        count, client, clock = self.number(count_max), self.number(WRITER_MAX), self.number()
        structs = []
        for _ in range(count):
            structs.append(self.struct(clock))
            clock += structs[-1][1]
        if not structs or clock > CLOCK_MAX:
            raise InvalidUpdate("a section is empty, or clocks are used up")
        return client, structs

    def struct(self, clock: int) -> Struct:
        info = self.byte()
        kind = info & _KIND
        left = right = parent = None
        keyed = info & _KEYED > 0
        if info:
            if kind not in _KINDS:
                raise InvalidUpdate(f"content of kind {kind} is not shared")
            left = self.id() if info & _LEFT else None
            right = self.id() if info & _RIGHT else None
            if not left and not right:
                parent = self.parent()
                if keyed:
                    self.text(KEY_BYTES_MAX)
        length, halves = self.content(kind)
        if not length:
            raise InvalidUpdate("an item of length 0")
        return clock, length, kind, left, right, parent, keyed, halves

    def parent(self) -> Id | str:
        if not self.number(1):
            return self.id()
        name = self.text(KEY_BYTES_MAX)
        if not is_root_name(name):
            raise InvalidUpdate("a root's name is empty, too long or not printable")
        return name

    def content(self, kind: int) -> tuple[int, list[int]]:
        """Skip what an item holds; return its length in clocks, and its halves of characters."""
        match kind:
            case 0 | 1:
                return self.number(), []
            case 3:
                self.bytes()
            case 4:
                return _measure(self.text())
            case 5 | 6:
                if kind == FORMAT:
                    self.text(KEY_BYTES_MAX)
                self.json()
            case 7:
                if self.byte() not in _TYPES:
                    raise InvalidUpdate("a type that is no array, map or text")
            case _:
                count = self.number()
                for _ in range(count):
                    self.any(DEPTH_MAX)
                return count, []
        return 1, []

    def json(self) -> None:
        try:
            value = json.loads(self.text(JSON_BYTES_MAX))
            # yrs takes no NaN, no lone surrogates, and no deep nesting.
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as exc:
            raise InvalidUpdate(f"an embed or format is not JSON: {exc}") from None
        if _depth(value) > DEPTH_MAX:
            raise InvalidUpdate(f"JSON nests deeper than {DEPTH_MAX}")

    def any(self, depth: int) -> None:
        """Skip a plain value."""
        kind = self.byte()
        if kind in _SIZES:
            self.at += _SIZES[kind]
        elif kind == _INT:
            start = self.at
            while self.byte() > 127:
                if self.at - start > 8:
                    raise InvalidUpdate("a number of more than 63 bits")
        elif kind == _WORD:
            self.text()
        elif kind == _BUFFER:
            self.bytes()
        elif kind in (_OBJECT, _LIST) and depth:
            for _ in range(self.number()):
                if kind == _OBJECT:
                    self.text(KEY_BYTES_MAX)
                self.any(depth - 1)
        else:
            raise InvalidUpdate(f"a plain value of kind {kind}, or nested too deep")

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def number(self, number_max: int = CLOCK_MAX) -> int:
        number = self.data[self.at]
        if number < 128:
            self.at += 1
        else:
            number, self.at = _parse_varint(self.data, self.at)
        if number > number_max:
            raise InvalidUpdate(f"a number is {number}; at most {number_max}")
        return number

    def id(self) -> Id:
        return self.number(WRITER_MAX), self.number()

    def bytes(self, size_max: int = CHANGE_BYTES_MAX) -> bytes:
        size = self.number(size_max)
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self, size_max: int = CHANGE_BYTES_MAX) -> str:
        return self.bytes(size_max).decode()


def _depth(value: Any) -> int:
    inner = value.values() if type(value) is dict else value if type(value) is list else ()
    return 1 + max(map(_depth, inner), default=0)


def _measure(text: str) -> tuple[int, list[int]]:
    """How many UTF-16 units, which is what clocks count, and those that are second halves."""
    if text.isascii():
        return len(text), []
    astral = [at for at, char in enumerate(text) if char > "\uffff"]
    return len(text) + len(astral), [at + count for count, at in enumerate(astral, 1)]
