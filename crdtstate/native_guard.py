"""
The guard of shared documents: reads Yjs updates of texts, arrays and maps, refuses the rest.

Nobody has a lane in a shared document: items of all writers stand beside each other and refer
to each other, as editors in browsers write them. What a writer's next change can be held to: its
items are its own and continue its clock; what they refer to is known, stands in the same type,
and such a type holds such items; it deletes known items; it cuts no character in half; nothing
is empty, endless, nested too deep or of a kind we don't share. `Known` remembers what for.

A browser writes under a number that it has drawn itself, and a relay brings that in (see
`relay.rooms`). Such numbers, those of *guests*, are below 2**32; nearly no writer's is. Any
writer's change may carry items of guests. The browser may send them to another relay again, before
that has them from the first: so they may begin before what is known of the guest, and what is known
is passed over.

An honest word: this wall is lower than that of lanes. Of 220,000 hostile histories made from the
grammar none crashed or hung pycrdt behind it (with a laxer one 6 in 100 did), but nobody can tell
from outside that yrs survives each well-formed edit of a sequence, and some (1 to 3 in 100) read
differently after a reload. So what others send is tried first in a process of its own with limits
on time and memory (`trial`), where a replica takes it in.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from crdtstate.clock import WRITER_MAX
from crdtstate.errors import InvalidUpdate
from crdtstate.guard import (
    CHANGE_RANGES_MAX,
    CLOCK_MAX,
    KEY_BYTES_MAX,
    STATE_BYTES_MAX,
    Range,
    encode_deletes,
    encode_varint,
    parse_deletes,
    parse_varint,
)

CHANGE_BYTES_MAX = 2 << 20
CHANGE_ITEMS_MAX = 100_000

DEPTH_MAX = 32
"""How deep types nest in types, and plain values in each other; yrs recurses on both."""

JSON_BYTES_MAX = 1 << 20
"""An embed, or the value of a format; a picture in a text is an embed."""

ROOT_CHARS_MAX = 200

GUEST_MIN, GUEST_MAX = 2**10, 2**32 - 1
"""What Yjs in a browser draws for a number: 32 bits; the lowest are left out."""

GUESTS_MAX = 64
"""Guests of which one change carries items."""

# Kinds of content: the low bits of an item's info byte. The high ones say what it refers to.
GC, DELETED, BINARY, STRING, EMBED, FORMAT, TYPE, ANY = 0, 1, 3, 4, 5, 6, 7, 8
_KINDS = frozenset({DELETED, BINARY, STRING, EMBED, FORMAT, TYPE, ANY})
_LEFT, _RIGHT, _KEYED, _KIND = 0x80, 0x40, 0x20, 0x1F

ARRAY, MAP, TEXT = 0, 1, 2
_HOLDERS = {BINARY: ARRAY, ANY: ARRAY, STRING: TEXT, EMBED: TEXT, FORMAT: TEXT}
"""Which type has this in its sequence. Deleted items and types can be in both."""

# Kinds of plain values, the first with the bytes they take.
_SIZES = {127: 0, 126: 0, 124: 4, 123: 8, 122: 8, 121: 0, 120: 0}
_INT, _WORD, _OBJECT, _LIST, _BUFFER = 125, 119, 118, 117, 116

_LATER = "an item refers to one that is not there, or is later"
_WRONG_TYPE = "an item in a type that holds no such items; is a name used for two types?"

Id = tuple[int, int]
"""``(client, clock)`` of an item."""

Ranges = dict[int, list[Range]]
"""Client -> ranges of its clocks."""


class NotYet(InvalidUpdate):
    """It refers to what is not here, or not yet."""


class Struct(NamedTuple):
    """An item, or a run of items that one writer made in one go.

    Attributes:
        parent: The item that is the type it is in, or a root's name; only given where it is
            not said by a neighbour.
        made: Which type it is, if it is one.
        halves: Its clocks, counted from the first, that are the second half of a character.
    """

    clock: int
    length: int
    kind: int
    left: Id | None
    right: Id | None
    parent: Id | str | None
    keyed: bool
    made: int | None
    halves: list[int]


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
    """What passed the guard, as far as the next change is held to it."""

    def __init__(self) -> None:
        # Client -> its next clock.
        self.clocks: dict[int, int] = {}
        # Client -> where runs of one place start, and those places. None: collected, unknown.
        self._starts: dict[int, list[int]] = {}
        self._places: dict[int, list[Place | None]] = {}
        # Item -> which type it is.
        self._types: dict[Id, int] = {}
        # Root -> whether it is a text or an array, and the item that told.
        self._roots: dict[str, tuple[int, Id | None]] = {}
        # Second halves of characters. Where an item is cut there, yrs keeps an empty one, and
        # then nobody can read its state.
        self._halves: dict[Id, None] = {}

    def roots(self) -> set[str]:
        return {place.root for places in self._places.values() for place in places if place}

    def kinds(self) -> dict[str, int]:
        """What each root is: `ARRAY`, `MAP` or `TEXT`. One of which all is deleted may pass for a
        map."""
        return {root: self._roots.get(root, (MAP, None))[0] for root in self.roots()}

    def roots_of(self, ranges: Ranges) -> set[str]:
        """The roots that these items stand in."""
        roots: set[str] = set()
        for client, spans in ranges.items():
            starts, places = self._starts[client], self._places[client]
            for start, length in spans:
                first, end = bisect_right(starts, start) - 1, bisect_left(starts, start + length)
                roots.update(place.root for place in places[first:end] if place)
        return roots

    def settle(self, root: str, made: int, item: Id | None = None) -> bool:
        """Hold *root* to be a text or an array; False if it is the other one.

        Updates don't tell the type of a root. Where one member has it for a text and another for
        an array, pycrdt hangs when the latter reads a character that is not ASCII.
        """
        return self._roots.setdefault(root, (made, item))[0] == made

    def join(self, other: Known) -> None:
        """Take in what *other* knows of the same document.

        Raises:
            InvalidUpdate: They disagree on the type of a root; nothing changed.
        """
        if any(self._roots.get(root, it)[0] != it[0] for root, it in other._roots.items()):
            raise InvalidUpdate(_WRONG_TYPE)
        self._roots = other._roots | self._roots
        for client, clock in other.clocks.items():
            if clock > self.clocks.get(client, 0):
                self.clocks[client] = clock
                self._starts[client] = other._starts[client]
                self._places[client] = other._places[client]
        self._types |= other._types
        self._halves |= other._halves

    def extend(self, sections: Mapping[int, Sequence[Struct]], deletes: Ranges) -> None:
        """Add items, each after those it refers to, and check what is deleted.

        Raises InvalidUpdate, with some of them added: `cut` them off again.
        """
        done = dict.fromkeys(sections, 0)
        todo = list(sections)
        # Client -> those whose next item refers to one of its later items.
        waiting: dict[int, list[int]] = {}
        while todo:
            client = todo.pop()
            structs = sections[client]
            before = at = done[client]
            missing = None
            while at < len(structs) and (missing := self._missing(structs[at])) is None:
                self._add(client, structs[at])
                at += 1
            done[client] = at
            if missing is not None:
                waiting.setdefault(missing, []).append(client)
            if at > before:
                todo += waiting.pop(client, [])
        if any(done[client] < len(structs) for client, structs in sections.items()):
            raise NotYet(_LATER)
        for client, spans in deletes.items():
            if sum(spans[-1]) > self.clocks.get(client, 0):
                raise NotYet("deletes what nobody has written")
            halves = self._halves.keys()
            if any({(client, span[0]), (client, sum(span))} & halves for span in spans):
                raise InvalidUpdate("deletes half a character")

    def least(self, clocks: Mapping[int, int]) -> dict[int, int]:
        """Of *clocks*, which may come from anybody, what is known, and ends within no character."""
        found = {}
        for client, clock in clocks.items():
            at = min(clock, self.clocks.get(client, 0))
            at -= (client, at) in self._halves
            if at > 0:
                found[client] = at
        return found

    def cut(self, clocks: Mapping[int, int]) -> None:
        """Forget the items of clients from these clocks on, which `extend` added last."""

        def is_new(item: Id | None) -> bool:
            return item is not None and item[1] >= clocks.get(item[0], CLOCK_MAX + 1)

        for client, clock in clocks.items():
            starts = self._starts.get(client, [])
            del self._places.get(client, [])[bisect_left(starts, clock) :]
            del starts[bisect_left(starts, clock) :]
            self.clocks[client] = clock
            if not clock:
                for known in (self.clocks, self._starts, self._places):
                    known.pop(client, None)
        while self._types and is_new(next(reversed(self._types))):
            self._types.popitem()
        while self._roots and is_new(next(reversed(self._roots.values()))[1]):
            self._roots.popitem()
        while self._halves and is_new(next(reversed(self._halves))):
            self._halves.popitem()

    def _missing(self, struct: Struct) -> int | None:
        for item in (struct.left, struct.right, struct.parent):
            if type(item) is tuple and item[1] >= self.clocks.get(item[0], 0):
                return item[0]
        return None

    def _add(self, client: int, struct: Struct) -> None:
        clock, left, right = struct.clock, struct.left, struct.right
        if right in self._halves or left and (left == right or _after(left) in self._halves):
            raise InvalidUpdate("an item within a character, or between an item and itself")
        place = self._place(struct) if struct.kind != GC else None
        if place is not None:
            self._check(place, struct, (client, clock))
        places = self._places.setdefault(client, [])
        starts = self._starts.setdefault(client, [])
        if not places or places[-1] != place:
            starts.append(clock)
            places.append(place)
        self.clocks[client] = clock + struct.length
        if struct.made is not None:
            self._types[client, clock] = struct.made
        for half in struct.halves:
            self._halves[client, clock + half] = None

    def _place(self, struct: Struct) -> Place | None:
        parent, is_deleted = struct.parent, struct.kind == DELETED
        if type(parent) is str:
            return Place(parent, 1, None, struct.keyed, is_deleted)
        if type(parent) is tuple:
            holder = self._at(parent)
            if holder is None:
                return None
            if parent not in self._types and not holder.is_deleted:
                raise InvalidUpdate("an item in something that is not a type")
            return Place(holder.root, holder.depth + 1, parent, struct.keyed, is_deleted)
        beside = [
            place for item in (struct.left, struct.right) if item and (place := self._at(item))
        ]
        if not beside:
            return None
        place, other = beside[0], beside[-1]
        # Merging updates, yrs forgets to say of an item that follows another that it is keyed.
        if place[:4] != other[:4] or struct.keyed > place.keyed:
            raise InvalidUpdate("an item beside items of another place")
        return place if place.is_deleted == is_deleted else place._replace(is_deleted=is_deleted)

    def _at(self, item: Id) -> Place | None:
        client, clock = item
        return self._places[client][bisect_right(self._starts[client], clock) - 1]

    def _check(self, place: Place, struct: Struct, item: Id) -> None:
        """Check that the type can hold the item where it stands."""
        kind = struct.kind
        if place.depth > DEPTH_MAX:
            raise InvalidUpdate(f"types nest deeper than {DEPTH_MAX}")
        holder = self._types.get(place.parent) if place.parent else None
        if place.keyed:
            # A value follows the one before; only deleted ones form runs.
            if (
                struct.right
                or kind != DELETED
                and (struct.length > 1 or _HOLDERS.get(kind) == TEXT)
            ):
                raise InvalidUpdate("what is under a key is not one value")
            fits = holder in (None, MAP)
        elif kind not in _HOLDERS:
            fits = holder != MAP
        elif place.parent:
            fits = holder in (None, _HOLDERS[kind])
        else:
            fits = self.settle(place.root, _HOLDERS[kind], item)
        if not fits:
            raise InvalidUpdate(_WRONG_TYPE)


def check_change(update: bytes, writer: int, known: Known) -> set[str]:
    """Check the next change of *writer*, add it to *known* and return the roots it touches.

    Raises:
        InvalidUpdate: It is not what an honest writer sends next; nothing changed. `NotYet`: it
            may be, once there is more.
    """
    clocks, touched = _extend(update, writer, known)
    for client, clock in clocks.items():
        if (count := known.clocks.get(client, 0) - clock) > 0:
            touched.setdefault(client, []).append((clock, count))
    return known.roots_of(touched)


def try_change(update: bytes, writer: int, known: Known) -> None:
    """Check the next change of *writer*, as `check_change` does, and leave *known* as it is."""
    clocks, _ = _extend(update, writer, known)
    known.cut(clocks)


def _extend(update: bytes, writer: int, known: Known) -> tuple[dict[int, int], Ranges]:
    """Check and add a change; returns the clocks before it, and what it deletes."""
    if len(update) > CHANGE_BYTES_MAX:
        raise InvalidUpdate(f"a change of {len(update)} bytes; at most {CHANGE_BYTES_MAX}")
    sections, deletes = _Reader(update).update(1 + GUESTS_MAX, CHANGE_ITEMS_MAX, CHANGE_RANGES_MAX)
    if not sections and not deletes:
        raise InvalidUpdate("a change that changes nothing")
    clocks = {client: known.clocks.get(client, 0) for client in sections}
    for client, structs in sections.items():
        clock = clocks[client]
        if client == writer:
            if structs[0].clock != clock:
                raise InvalidUpdate(f"a change of {writer:x} does not continue its clock, {clock}")
        elif not is_guest(client):
            raise InvalidUpdate(f"a change of {writer:x} with items of {client:x}")
        elif structs[0].clock > clock:
            raise NotYet(f"items of the guest {client:x} do not continue its clock, {clock}")
        else:
            sections[client] = _rest(client, structs, clock)
    try:
        known.extend(sections, deletes)
    except InvalidUpdate:
        known.cut(clocks)
        raise
    return clocks, deletes


def _rest(client: int, structs: list[Struct], clock: int) -> list[Struct]:
    """The items from *clock* on; of one that begins before it the rest."""
    found = []
    for struct in structs:
        known = clock - struct.clock
        if known <= 0:
            found.append(struct)
        elif known < struct.length:
            halves = [half - known for half in struct.halves if half >= known]
            left = None if struct.kind == GC else (client, clock - 1)
            found.append(
                struct._replace(
                    clock=clock,
                    length=struct.length - known,
                    left=left,
                    parent=None,
                    halves=halves,
                )
            )
    return found


def is_guest(client: int) -> bool:
    """Whether a number is one that browsers draw."""
    return GUEST_MIN <= client <= GUEST_MAX


class Part(NamedTuple):
    """What an update holds of one client: its items from *clock* to *end*, as they came.

    Attributes:
        structs: How many structs they are.
        data: These, encoded.
    """

    clock: int
    end: int
    structs: int
    data: bytes

    def then(self, other: Part) -> Part:
        """This and what follows it."""
        assert self.end == other.clock, f"{other.clock} does not follow {self.end}"
        return Part(self.clock, other.end, self.structs + other.structs, self.data + other.data)


def split_update(update: bytes, clients_max: int) -> tuple[dict[int, Part], Ranges]:
    """The items of each client in an update that may come from anybody, and what it deletes.

    Raises:
        InvalidUpdate: It is malformed, too large, or holds what is not shared.
    """
    if len(update) > CHANGE_BYTES_MAX:
        raise InvalidUpdate(f"an update of {len(update)} bytes; at most {CHANGE_BYTES_MAX}")
    return _Reader(update).parts(clients_max)


def join_update(parts: Mapping[int, Part], deletes: Ranges) -> bytes:
    """An update of these."""
    body = bytearray(encode_varint(len(parts)))
    for client, part in parts.items():
        body += encode_varint(part.structs) + encode_varint(client) + encode_varint(part.clock)
        body += part.data
    return bytes(body) + encode_deletes(deletes)


def check_state(update: bytes) -> Known:
    """Check the whole state of a document and return what is in it.

    Raises:
        InvalidUpdate: It is not what a shared document encodes to.
    """
    if len(update) > STATE_BYTES_MAX:
        raise InvalidUpdate(f"a state of {len(update)} bytes; at most {STATE_BYTES_MAX}")
    sections, deletes = _Reader(update).update(CLOCK_MAX, CLOCK_MAX, CLOCK_MAX)
    if any(structs[0].clock for structs in sections.values()):
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

    def update(
        self, clients_max: int, items_max: int, ranges_max: int
    ) -> tuple[dict[int, list[Struct]], Ranges]:
        try:
            clients = self.number(clients_max)
            sections = dict(self.section(items_max) for _ in range(clients))
            deletes = parse_deletes(self.data, self.at, ranges_max, ranges_max)
        except IndexError:
            raise InvalidUpdate("the update is cut off") from None
        except UnicodeDecodeError:
            raise InvalidUpdate("a string is not valid UTF-8") from None
        if len(sections) < clients:
            raise InvalidUpdate("a client comes twice")  # 26 bytes of this crash yrs.
        return sections, deletes

    def parts(self, clients_max: int) -> tuple[dict[int, Part], Ranges]:
        found: dict[int, Part] = {}
        try:
            clients = self.number(clients_max)
            for _ in range(clients):
                start = self.at
                client, structs = self.section(CHANGE_ITEMS_MAX)
                first, end = structs[0].clock, structs[-1].clock + structs[-1].length
                for _ in range(3):  # the count, the client and the clock
                    _, start = parse_varint(self.data, start)
                found[client] = Part(first, end, len(structs), self.data[start : self.at])
            ranges = parse_deletes(self.data, self.at, CHANGE_RANGES_MAX, CHANGE_RANGES_MAX)
        except IndexError:
            raise InvalidUpdate("the update is cut off") from None
        except UnicodeDecodeError:
            raise InvalidUpdate("a string is not valid UTF-8") from None
        if len(found) < clients:
            raise InvalidUpdate("a client comes twice")
        return found, ranges

    def section(self, items_max: int) -> tuple[int, list[Struct]]:
        count, client, clock = self.number(items_max), self.number(WRITER_MAX), self.number()
        structs: list[Struct] = []
        for _ in range(count):
            structs.append(self.struct(clock))
            clock += structs[-1].length
        if not structs or clock > CLOCK_MAX:
            raise InvalidUpdate("a section is empty, or clocks are used up")
        return client, structs

    def struct(self, clock: int) -> Struct:
        info = self.byte()
        kind = info & _KIND
        left = right = parent = made = None
        halves: list[int] = []
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
        length = 1
        if kind in (GC, DELETED):
            length = self.number()
        elif kind == STRING:
            length, halves = _measure(self.text())
        elif kind == ANY:
            length = self.number()
            for _ in range(length):
                self.any(DEPTH_MAX)
        elif kind == TYPE:
            made = self.number(TEXT)
        elif kind == BINARY:
            self.bytes()
        else:
            if kind == FORMAT:
                self.text(KEY_BYTES_MAX)
            self.json()
        if not length:
            raise InvalidUpdate("an item of length 0")
        return Struct(clock, length, kind, left, right, parent, keyed, made, halves)

    def parent(self) -> Id | str:
        if not self.number(1):
            return self.id()
        name = self.text(KEY_BYTES_MAX)
        if not is_root_name(name):
            raise InvalidUpdate("a root's name is empty, too long or not printable")
        return name

    def json(self) -> None:
        try:
            value = json.loads(self.text(JSON_BYTES_MAX))
            # yrs takes no NaN, no lone surrogates, and no deep nesting.
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
            if _depth(value) > DEPTH_MAX:
                raise ValueError(f"nested deeper than {DEPTH_MAX}")
        except (ValueError, RecursionError) as exc:
            raise InvalidUpdate(f"an embed or format is not JSON that yrs reads: {exc}") from None

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
            number, self.at = parse_varint(self.data, self.at)
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


def _after(item: Id) -> Id:
    return item[0], item[1] + 1


def _measure(text: str) -> tuple[int, list[int]]:
    """How many UTF-16 units, for that is what clocks count, and which are second halves."""
    if text.isascii():
        return len(text), []
    astral = [at for at, char in enumerate(text) if char > "\uffff"]
    return len(text) + len(astral), [at + count for count, at in enumerate(astral, 1)]


def _depth(value: Any) -> int:
    inner = value.values() if type(value) is dict else value if type(value) is list else ()
    return 1 + max(map(_depth, inner), default=0)
