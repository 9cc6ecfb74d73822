"""
The state in a `CrdtChannel`: a nested dict as a CRDT, small, immutable and made of bytes.

It is a map from paths to *entries* (stamp, actor, packed value or None for removed), and merging
two states takes the newer entry of each path (a last-writer-wins element map: Shapiro et al.,
2011). A step of a path is a key of a dict (``k``), an element of a set (``s``), the id of one
of a list (``l``) or an actor's share in a counter (``c``). An entry hides all that is below its
path and not newer, and what is hidden is dropped, so removing a dict removes what was in it and not
what is added to it afterwards. From that follow all laws: a merge is commutative, associative and
idempotent, and whoever merged the same states has the same bytes.

Updates are *compared with what they were made from*. What a node returns unchanged is no write of
its, and two nodes that each append to the list that both read have both appended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import msgpack

from crdtstate.errors import InvalidUpdate, UnsupportedValue, UsageError
from crdtstate.values import pack, pack_key, unpack, unpack_key

MAGIC = b"\xc1crdt1"
"""What a state begins with. No msgpack does: 0xC1 is never used."""

STATE_BYTES_MAX = 16 * 2**20
"""What a state may have; more belongs into documents."""

DEPTH_MAX = 32
"""How deep dicts may nest."""

REMOVED_MAX = 1000
"""Removals that are remembered. Beyond, the oldest go: should a run that has not seen one of them
still be merged, that element comes back."""

COMPARED_MAX = 1_000_000
"""Pairs of elements that are compared to find out how a list was edited in its middle."""

DELETE = {"__delete__": True}
"""In an update, in place of a value: remove this key."""

_INCREMENT = "__increment__"
_OVERWRITE = "__overwrite__"

Path = tuple[str, ...]
"""The steps to a place, each its kind's letter and what `pack_key` made of it; lists' and counters'
are ids."""

_ABSENT = object()
_KINDS: dict[type, str] = {dict: "k", set: "s", frozenset: "s", list: "l", tuple: "l"}
_PRESENT = pack(True, "present")


class Entry(NamedTuple):
    """What was written at a path, when and by whom."""

    stamp: int
    actor: int
    value: bytes | None


class _Node:
    """A place in the tree that entries make up."""

    __slots__ = ("below", "entry")

    def __init__(self) -> None:
        self.entry: Entry | None = None
        self.below: dict[str, _Node] = {}


_NOWHERE = _Node()


def increment(by: int = 1) -> dict[str, int]:
    """In an update, in place of a value: add to the number that is there, with everybody else.

    Raises:
        UsageError: *by* is not an int.
    """
    if type(by) is not int:
        raise UsageError(f"increment takes an int, not {by!r}")
    return {_INCREMENT: by}


class State:
    """A state. Nothing alters it: `merged` and `updated` make new ones."""

    __slots__ = ("_entries", "_tree", "top")

    def __init__(self, entries: dict[Path, Entry] | None = None) -> None:
        self._entries = entries or {}
        self._tree: _Node | None = None
        # The highest stamp in it.
        self.top = max((entry.stamp for entry in self._entries.values()), default=0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and self._entries == other._entries

    def __hash__(self) -> int:
        return hash(self.encode())

    def __len__(self) -> int:
        return len(self._entries)

    # Reading

    def value(self) -> dict[Any, Any]:
        """What it holds, made anew each time."""
        found = _read(self._root(), None)
        return found if type(found) is dict else {}

    def _root(self) -> _Node:
        if self._tree is None:
            self._tree = _Node()
            for path, entry in self._entries.items():
                node = self._tree
                for step in path:
                    node = node.below.setdefault(step, _Node())
                node.entry = entry
        return self._tree

    # Merging

    def merged(self, other: State) -> State:
        """All that either has."""
        entries = dict(self._entries)
        for path, entry in other._entries.items():
            mine = entries.get(path)
            if mine is None or _rank(mine) < _rank(entry):
                entries[path] = entry
        return State(_visible(entries))

    # Updating

    def updated(self, updates: Sequence[Any], now_ms: int, actor: int) -> State:
        """What it is after *updates*, which were all made from this state, in the order given.

        Args:
            now_ms: Milliseconds since 1970; stamps rise even if that does not.
            actor: Whoever updates; no two that may be merged ever have the same.

        Raises:
            UsageError: An update is not a dict, increments what is no number, or is too large.
            UnsupportedValue: A value cannot be shared.
        """
        writing = _Writing(max(now_ms << 16, self.top + 1), actor)
        overwrites = [(is_all, value) for is_all, value in map(_overwriting, updates)]
        for _, value in (each for each in overwrites if each[0]):
            writing.write((), None)
            writing.fill((), value, _NOWHERE)
        for _, value in (each for each in overwrites if not each[0]):
            writing.fill((), value, self._root())
        entries = {**self._entries, **writing.entries}
        entries = _visible(entries)
        removed = [path for path, entry in entries.items() if entry.value is None]
        if len(removed) > REMOVED_MAX:
            removed.sort(key=lambda path: _rank(entries[path]))
            for path in removed[: len(removed) - REMOVED_MAX]:
                del entries[path]
        return State(entries)

    # As bytes

    def encode(self) -> bytes:
        """The state as bytes: equal states have equal ones, and new entries come last.

        Raises:
            UsageError: It has grown beyond `STATE_BYTES_MAX`.
        """
        entries = sorted(self._entries.items(), key=lambda each: (each[1][:2], each[0]))
        packed = [msgpack.packb([*entry, *path]) for path, entry in entries]
        data = b"".join((MAGIC, *packed))
        if len(data) > STATE_BYTES_MAX:
            raise UsageError(
                f"a channel of {len(data)} bytes; {STATE_BYTES_MAX} is the limit: remove keys, or "
                "replace all with Overwrite({...})"
            )
        return data

    @classmethod
    def decode(cls, data: bytes) -> State:
        """Read what `encode` wrote, or anybody else.

        Raises:
            InvalidUpdate: It is no state.
        """
        if not is_state(data) or len(data) > STATE_BYTES_MAX:
            raise InvalidUpdate("not the state of a CrdtChannel, or too large")
        entries: dict[Path, Entry] = {}
        unpacker = msgpack.Unpacker(max_buffer_size=STATE_BYTES_MAX, strict_map_key=False)
        unpacker.feed(data[len(MAGIC) :])
        try:
            for stamp, actor, value, *steps in unpacker:
                path = _check_entry(stamp, actor, value, steps)
                entries[path] = Entry(stamp, actor, value)
        except (ValueError, TypeError, msgpack.UnpackException) as exc:
            raise InvalidUpdate(f"a damaged state of a CrdtChannel: {exc}") from None
        if unpacker.tell() != len(data) - len(MAGIC):
            raise InvalidUpdate("a state of a CrdtChannel that is cut off")
        return cls(_visible(entries))


def is_state(value: object) -> bool:
    """Whether *value* is the bytes of a state, by its first ones."""
    return type(value) is bytes and value.startswith(MAGIC)


def merge_states(states: Iterable[bytes]) -> bytes:
    """Merge states, in any order. Raises InvalidUpdate: one of them is none."""
    merged = State()
    for data in states:
        merged = merged.merged(State.decode(data))
    return merged.encode()


# Updates


class _Writing:
    """The entries that updates come to."""

    def __init__(self, stamp: int, actor: int) -> None:
        self.stamp, self.actor = stamp, actor
        self.entries: dict[Path, Entry] = {}

    def write(self, path: Path, value: bytes | None) -> None:
        self.entries[path] = Entry(self.stamp, self.actor, value)
        self.stamp += 1

    def fill(self, path: Path, update: Mapping[Any, Any], node: _Node) -> None:
        """Write the keys of a dict, those of *node* otherwise staying as they are."""
        if len(path) >= DEPTH_MAX:
            raise UnsupportedValue("a value in a CrdtChannel", f"nests deeper than {DEPTH_MAX}")
        for key, value in update.items():
            step = "k" + pack_key(key, "a key of a CrdtChannel")
            self.assign((*path, step), value, node.below.get(step, _NOWHERE))

    def assign(self, path: Path, value: Any, node: _Node) -> None:
        floor = node.entry
        if isinstance(value, dict) and len(value) == 1:
            if value == DELETE:
                if _read(node, None) is not _ABSENT:
                    self.write(path, None)
                return
            if _INCREMENT in value:
                self._count(path, value[_INCREMENT], node)
                return
        kind = _KINDS.get(type(value))
        if kind is None:
            if not _is_same(_read(node, None), value):
                self.write(path, pack(value, _where(path)))
            return
        present = _kind(node, floor)
        if present is not None and present != kind:
            # The elements of what was there must not come back with the next change of kind.
            self.write(path, None)
            node = _NOWHERE
        if present != kind:
            # Says that there is one, also while it is empty. Not at the path itself: it would hide
            # the elements of who makes one there at the same time.
            self.write((*path, kind), _PRESENT)
        if kind == "k":
            self.fill(path, value, node)
        elif kind == "s":
            self._fill_set(path, value, node)
        else:
            self._fill_list(path, value, node)

    def _count(self, path: Path, by: Any, node: _Node) -> None:
        current = _read(node, None)
        if type(by) is not int or (current is not _ABSENT and type(current) not in (int, float)):
            raise UsageError(f"{_where(path)}: increment(int) adds to a number, not {current!r}")
        step = f"c{self.actor:x}"
        own = self.entries.get((*path, step)) or _live_entry(node, step)
        before = unpack(own.value) if own is not None and own.value is not None else 0
        self.write((*path, step), pack(before + by, _where(path)))

    def _fill_set(self, path: Path, value: AbstractSet[Any], node: _Node) -> None:
        wanted = {"s" + pack_key(each, _where(path)) for each in value}
        here = {step for step in node.below if step[0] == "s" and _live_entry(node, step)} - {"s"}
        for step in sorted(wanted - here):
            self.write((*path, step), _PRESENT)
        for step in sorted(here - wanted):
            self.write((*path, step), None)

    def _fill_list(self, path: Path, value: Sequence[Any], node: _Node) -> None:
        wanted = [pack(each, _where(path)) for each in value]
        here = _elements(node)
        kept = _match([element.value for element in here], wanted)
        for at in sorted(set(range(len(here))) - set(kept.values())):
            self.write((*path, here[at].step), None)
        # What follows the first new one is put behind it, by one more run of positions.
        first = next((at for at in range(len(wanted)) if at not in kept), len(wanted))
        after = here[kept[first - 1]].start + 1 if first else 0
        run = [self.stamp, self.actor]
        if not any(at in kept for at in range(first, len(wanted))):
            after = max([after, *(element.start + 1 for element in here)])
        for at in range(first, len(wanted)):
            step = here[kept[at]].step if at in kept else f"l{self.stamp:x}.{self.actor:x}"
            self.write((*path, step), pack([after, run, at - first, wanted[at]], _where(path)))


class _Element(NamedTuple):
    """An element of a list: its place among the others, its step and its packed value."""

    start: int
    run: list[int]
    place: int
    step: str
    value: bytes


def _elements(node: _Node) -> list[_Element]:
    """The elements of a list, in order. Raises InvalidUpdate."""
    found = []
    for step in node.below:
        if step[0] == "l" and len(step) > 1 and (entry := _live_entry(node, step)):
            match unpack(entry.value or b""):
                case [int(start), [int(), int()] as run, int(index), bytes(value)]:
                    found.append(_Element(start, run, index, step, value))
                case _:
                    raise InvalidUpdate("an element of a list without its place")
    return sorted(found)


def _match(old: list[bytes], new: list[bytes]) -> dict[int, int]:
    """Which of the new elements are old ones that stayed: new index -> old index."""
    low, most = 0, min(len(old), len(new))
    while low < most and old[low] == new[low]:
        low += 1
    tail = 0
    while tail < most - low and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    kept = {at: at for at in range(low)}
    kept.update({len(new) - 1 - at: len(old) - 1 - at for at in range(tail)})
    one, two = old[low : len(old) - tail], new[low : len(new) - tail]
    if 0 < len(one) * len(two) <= COMPARED_MAX:
        for block in SequenceMatcher(None, one, two, autojunk=False).get_matching_blocks():
            for at in range(block.size):
                kept[low + block.b + at] = low + block.a + at
    return kept


def _overwriting(update: Any) -> tuple[bool, Mapping[Any, Any]]:
    """Whether an update replaces all there is, and its dict."""
    is_all = False
    if type(update).__name__ == "Overwrite" and hasattr(update, "value"):
        is_all, update = True, update.value
    elif isinstance(update, dict) and len(update) == 1 and _OVERWRITE in update:
        is_all, update = True, update[_OVERWRITE]
    if not isinstance(update, Mapping):
        raise UsageError(f"a CrdtChannel is updated with a dict, not {type(update).__name__}")
    return is_all, update


# The tree


def _rank(entry: Entry) -> tuple[int, int, bool, bytes]:
    return entry.stamp, entry.actor, entry.value is not None, entry.value or b""


def _visible(entries: dict[Path, Entry]) -> dict[Path, Entry]:
    """Without what newer entries above hide."""
    hiding = {path for path in entries if not path or path[-1][0] == "k"}

    def is_hidden(path: Path, entry: Entry) -> bool:
        for end in range(len(path)):
            above = path[:end]
            if above in hiding and entries[above][:2] >= entry[:2]:
                return True
        return False

    return {path: entry for path, entry in entries.items() if not is_hidden(path, entry)}


def _live_entry(node: _Node, step: str) -> Entry | None:
    """The entry at a step below, unless that was removed or is hidden."""
    below = node.below.get(step)
    if below is None or below.entry is None or below.entry.value is None:
        return None
    if node.entry is not None and node.entry[:2] >= below.entry[:2]:
        return None
    return below.entry


def _kind(node: _Node, floor: Entry | None) -> str | None:
    """The kind of container at a node: that of its newest live part."""
    newest: tuple[tuple[int, int], str] | None = None
    for step, below in node.below.items():
        if step[0] == "c" or (stamp := _newest(below)) is None:
            continue
        if floor is not None and floor[:2] >= stamp:
            continue
        if newest is None or newest[0] < stamp:
            newest = stamp, step[0]
    return None if newest is None else newest[1]


def _newest(node: _Node) -> tuple[int, int] | None:
    """The stamp of the newest thing at or below a node that is there."""
    stamps = [stamp for below in node.below.values() if (stamp := _newest(below)) is not None]
    if node.entry is not None and node.entry.value is not None:
        stamps.append(node.entry[:2])
    return max(stamps, default=None)


def _read(node: _Node, floor: Entry | None) -> Any:
    """The value at a node, or `_ABSENT`."""
    entry = node.entry
    kind = _kind(node, entry)
    if kind == "k":
        found = {
            unpack_key(step[1:]): value
            for step, below in sorted(node.below.items())
            if step[0] == "k" and len(step) > 1 and (value := _read(below, entry)) is not _ABSENT
        }
        return found
    if kind == "s":
        steps = (step for step in node.below if step[0] == "s" and len(step) > 1)
        return {unpack_key(step[1:]) for step in steps if _live_entry(node, step)}
    if kind == "l":
        return [unpack(element.value) for element in _elements(node)]
    value = _ABSENT if entry is None or entry.value is None else unpack(entry.value)
    shares = [
        unpack(share.value or b"")
        for step in node.below
        if step[0] == "c" and (share := _live_entry(node, step))
    ]
    if shares and (value is _ABSENT or type(value) in (int, float)):
        return (0 if value is _ABSENT else value) + sum(shares)
    return value


def _is_same(one: Any, two: Any) -> bool:
    """Whether two values are the same, in type too."""
    return type(one) is type(two) and bool(one == two)


def _where(path: Path) -> str:
    return "".join(f"[{_shown(step)}]" for step in path) or "a CrdtChannel"


def _shown(step: str) -> str:
    return repr(unpack_key(step[1:])) if step[0] in "ks" and len(step) > 1 else step


def _check_entry(stamp: Any, actor: Any, value: Any, steps: Any) -> Path:
    """Check an entry that may come from anybody. Raises ValueError, InvalidUpdate."""
    if type(stamp) is not int or type(actor) is not int or not 0 <= stamp < 2**63:
        raise ValueError("a stamp or actor that is none")
    if value is not None and type(value) is not bytes:
        raise ValueError("a value that is not packed")
    if len(steps) > DEPTH_MAX + 1 or not all(type(step) is str and step for step in steps):
        raise ValueError("a path that is none")
    path = tuple(steps)
    for at, step in enumerate(path):
        if step[0] not in "kslc" or (step[0] != "k" and at < len(path) - 1):
            raise ValueError("a path that is none")
        if step[0] in "ks" and len(step) > 1:
            unpack_key(step[1:])
    if value is not None:
        found = unpack(value)
        if path and path[-1][0] == "c" and type(found) is not int:
            raise ValueError("a counter that does not count")
        if path and path[-1][0] == "l" and len(path[-1]) > 1:
            match found:
                case [int(), [int(), int()], int(), bytes(inner)]:
                    unpack(inner)
                case _:
                    raise ValueError("an element of a list without its place")
    return path
