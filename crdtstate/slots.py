"""
Slots and cells: what the lanes of a document say about one path, and what follows from it.

Pure values and functions: nothing here knows where slots are kept. `live_slots` is the one place
that decides what is visible (invariant L2 of `lanes`); everything else asks it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgpack

from crdtstate import values
from crdtstate.clock import SEQ_MAX, STAMP_MAX, WRITER_MAX
from crdtstate.errors import InvalidUpdate

SEPARATOR = "\0"
"""Between container and key in a path; no container has it."""

COVERS_MAX = 10_000
"""Lanes that one slot may cover; more writers than that do not meet at one path."""

COVERS_BYTES_MAX = 20 * COVERS_MAX
SMALL = 64 * 1024

NO_COVERS: Mapping[int, int] = {}


class Slot(NamedTuple):
    """What one lane says about one path.

    Attributes:
        value: The packed value, or None for a removal.
        seq: The change of the lane's writer that wrote it.
        stamp: When, by the writer's hybrid logical clock.
        covers: The slots of other lanes that were visible here when it was written.
    """

    value: bytes | None
    seq: int
    stamp: int
    covers: Mapping[int, int] = NO_COVERS

    def encode(self) -> bytes:
        parts: list[Any] = [self.value, self.seq, self.stamp]
        if self.covers:
            parts.append([number for pair in self.covers.items() for number in pair])
        packed: bytes = _pack(parts)
        return packed

    @classmethod
    def decode(cls, data: bytes) -> Slot:
        """Read a slot that may come from anybody. Raises InvalidUpdate."""
        return decode_slots((data,))[0]


def decode_slots(contents: Iterable[bytes]) -> list[Slot]:
    """Read slots that may come from anybody. Raises InvalidUpdate."""
    slots: list[Slot] = []
    for data in contents:
        try:
            if len(data) > SMALL:
                _check_weight(data)
            parts = _unpack(data, use_list=False)
        except Exception as exc:
            raise InvalidUpdate(f"a slot is not valid msgpack: {exc}") from exc
        if type(parts) is not tuple or not 3 <= len(parts) <= 4:
            raise InvalidUpdate("a slot has the wrong shape")
        covers = NO_COVERS
        if len(parts) == 3:
            value, seq, stamp = parts
        else:
            value, seq, stamp, flat = parts
            covers = _decode_covers(flat)
        if type(value) is not bytes and value is not None:
            raise InvalidUpdate("a slot's value is not bytes")
        if type(seq) is not int or not 0 < seq <= SEQ_MAX:
            raise InvalidUpdate("a slot's seq is out of range")
        if type(stamp) is not int or not 0 <= stamp <= STAMP_MAX:
            raise InvalidUpdate("a slot's stamp is out of range")
        slots.append(_new(Slot, (value, seq, stamp, covers)))
    return slots


def _check_weight(data: bytes) -> None:
    """Check that most of a large slot is its value: other msgpack can take seventy times its bytes
    when it is unpacked. Raises ValueError."""
    width = {0xC4: 1, 0xC5: 2, 0xC6: 4}.get(data[1], 0)
    if not width or len(data) - int.from_bytes(data[2 : 2 + width], "big") > COVERS_BYTES_MAX:
        raise ValueError("more than a value and what it covers")


_pack = msgpack.Packer(use_bin_type=True).pack
_unpack = msgpack.unpackb
# What a NamedTuple does to make one, without its detour through Python.
_new = tuple.__new__


def _check_int(number: object, low: int, high: int, what: str) -> None:
    if type(number) is not int or not low <= number <= high:
        raise InvalidUpdate(f"{what} is out of range")


def _decode_covers(flat: object) -> Mapping[int, int]:
    if type(flat) is not tuple or len(flat) % 2 or len(flat) > 2 * COVERS_MAX:
        raise InvalidUpdate("a slot's covers have the wrong shape")
    for writer in flat[::2]:
        _check_int(writer, 1, WRITER_MAX, "a covered writer")
    for seq in flat[1::2]:
        _check_int(seq, 1, SEQ_MAX, "a covered seq")
    return dict(zip(flat[::2], flat[1::2], strict=True))


Cell = dict[int, Slot]
"""The slots of one path: lane's writer -> slot."""


def candidates(cell: Cell) -> list[tuple[int, Slot]]:
    """The live slots of *cell* that hold a value, as (lane's writer, slot), oldest first."""
    live = [pair for pair in live_slots(cell) if pair[1].value is not None]
    if len(live) > 1:
        live.sort(key=lambda pair: (pair[1].stamp, pair[0]))
    return live


def is_conflict(cell: Cell) -> bool:
    """Whether *cell* has candidates that differ; tells without reading them."""
    return len({slot.value for _, slot in candidates(cell)}) > 1


def live_slots(cell: Cell) -> list[tuple[int, Slot]]:
    """The slots of *cell* that no other covers, removals included (L2)."""
    if len(cell) == 1:
        return list(cell.items())
    covered: dict[int, int] = {}
    for slot in cell.values():
        for other, seq in slot.covers.items():
            if seq > covered.get(other, 0):
                covered[other] = seq
    if not covered:
        return list(cell.items())
    return [pair for pair in cell.items() if covered.get(pair[0], 0) < pair[1].seq]


def is_settled(cell: Cell, writer: int) -> bool:
    """Whether the slot of *writer* can go: it is covered, or a removal that covers nothing
    visible (L3). Once it is so, it stays so (L5)."""
    slot = cell[writer]
    if any(other.covers.get(writer, 0) >= slot.seq for other in cell.values()):
        return True
    return slot.value is None and not any(
        slot.covers.get(other, 0) >= there.seq for other, there in cell.items()
    )


def covering(cell: Cell, writer: int) -> Mapping[int, int]:
    """The covers of a slot that *writer* writes now: all it sees in other lanes."""
    covers = {other: slot.seq for other, slot in cell.items() if other != writer}
    return covers or NO_COVERS


class Container:
    """The cells of one view, and which of them hold nothing or more than one value."""

    __slots__ = ("cells", "dead", "contested", "is_counter")

    def __init__(self, name: str) -> None:
        self.cells: dict[str, Cell] = {}
        self.dead: set[str] = set()
        self.contested: set[str] = set()
        # Every lane's totals of a counter count; there is nothing to choose from.
        self.is_counter = name.startswith("c")

    def update(self, key: str, writer: int, slot: Slot | None) -> None:
        """Set or drop the slot of one lane."""
        cell = self.cells.get(key)
        if cell is None:
            if slot is None:
                return
            cell = self.cells[key] = {writer: slot}
            if slot.value is not None:
                return
        elif slot is None:
            cell.pop(writer, None)
            if not cell:
                del self.cells[key]
                self.dead.discard(key)
                self.contested.discard(key)
                return
        else:
            cell[writer] = slot
        if len(cell) == 1 and slot is not None and slot.value is not None:
            if self.dead:
                self.dead.discard(key)
            if self.contested:
                self.contested.discard(key)
        elif not self.is_counter:
            self._judge(key, cell)

    def enter(self, writer: int, keys: list[str], slots: list[Slot]) -> None:
        """Set the slots of a lane that has said nothing at these *keys*; `update` for many."""
        cells, is_counter = self.cells, self.is_counter
        for key, slot in zip(keys, slots, strict=True):
            if key in cells:
                self.update(key, writer, slot)
            else:
                cells[key] = {writer: slot}
                if slot.value is None and not is_counter:
                    self.dead.add(key)

    def _judge(self, key: str, cell: Cell) -> None:
        count = len(candidates(cell))
        (self.dead.discard if count else self.dead.add)(key)
        (self.contested.add if count > 1 else self.contested.discard)(key)

    def keys(self) -> Iterator[str]:
        """The keys that hold a value."""
        dead = self.dead
        return (key for key in self.cells if key not in dead) if dead else iter(self.cells)

    def __len__(self) -> int:
        return len(self.cells) - len(self.dead)


KINDS = frozenset("mcrs@")
"""First letter of a container: map, counter, register, set, and what the document keeps itself."""


def check_contents(container: str, keys: list[str], slots: list[Slot]) -> None:
    """Check that foreign slots of one container hold what views of its kind can read. Raises
    InvalidUpdate."""
    values.check_all([slot.value for slot in slots if slot.value is not None])
    if container[0] != "m":
        for key, slot in zip(keys, slots, strict=True):
            _check_kind(container, key, slot)


def _check_kind(container: str, key: str, slot: Slot) -> None:
    kind = container[0]
    if kind == "c":
        totals(slot)
    elif kind == "s":
        values.unpack_key(key)
    elif kind == "@" and (slot.value is None or type(values.unpack(slot.value)) is not str):
        raise InvalidUpdate(f"slot {key!r} of {container!r} holds no name")
    if key and kind in "cr":
        raise InvalidUpdate(f"{container!r} has a key where there is one value: {key!r}")


def split_path(path: str) -> tuple[str, str]:
    """The container and the key that a foreign *path* names. Raises InvalidUpdate."""
    container, separator, key = path.partition(SEPARATOR)
    if not separator or len(container) < 2 or container[0] not in KINDS:
        raise InvalidUpdate(f"path {path!r} is not a path")
    return container, key


def totals(slot: Slot) -> tuple[int, int]:
    """What a lane has added to a counter, and what it has taken off. Raises InvalidUpdate."""
    try:
        flat = values.unpack(slot.value or b"")
    except Exception as exc:
        raise InvalidUpdate(f"a counter's totals are malformed: {exc}") from exc
    if (
        type(flat) is not list
        or len(flat) != 2
        or not all(type(number) is int and number >= 0 for number in flat)
    ):
        raise InvalidUpdate("a counter's totals have the wrong shape")
    up, down = flat
    return up, down
