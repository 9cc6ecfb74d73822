"""
The engine of a shared document: native Yjs types, which editors in browsers understand.

Users edit root types through pycrdt's own API, so an edit is in the *living* Doc before anybody
could hold it back. A second, *sealed* Doc takes in exactly what changes carry: own edits when
they are taken, those of others at once. So a state never holds open edits, and there is always
something to go back to. The price is twice the memory.

Yjs cannot abort, so `Native.rollback` edits the living Doc until it reads as the sealed one, in
place: handles and observers stay. The edits it undoes and its own travel with the next change,
as tombstones and copies; what came with the undone ones can be read nowhere. A type that they
had deleted comes back as a new one, so older handles to it are dead. Edits that the guard
refuses are undone by starting again from the sealed Doc: handles to roots go on, those to nested
types raise when written to, observers are gone.

Indices of a pycrdt text count UTF-8 bytes. Edits within a character mostly get refused; those that
are not end up elsewhere.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

from pycrdt import Array, Decoder, Doc, Subscription, Text, TransactionEvent, merge_updates
from pycrdt import Map as YMap

from crdtstate.errors import InvalidUpdate, UsageError
from crdtstate.guard import CLOCK_MAX, encode_deletes, encode_varint, parse_deletes
from crdtstate.native_guard import (
    ARRAY,
    CHANGE_BYTES_MAX,
    MAP,
    TEXT,
    Known,
    Ranges,
    check_change,
    check_state,
    is_root_name,
    try_change,
)
from crdtstate.slots import SEPARATOR

__all__ = ["Array", "Native", "Text", "YMap"]

CHANGE_BYTES_GOAL = 128 * 1024
"""Open edits beyond it are announced again, to be taken at once."""

MERGE_WIDTH = 32
"""Updates merged at a time. All together would take pycrdt quadratic time."""

ORIGIN = "crdtstate"
"""Origin of transactions that are no edits of the user; an UndoManager leaves those alone."""

SHARED = (Text, Array, YMap)
_KINDS: dict[int, Any] = {TEXT: Text, ARRAY: Array, MAP: YMap}
_T = TypeVar("_T", Text, Array[Any], YMap[Any])


class Native:
    """The native types of one document.

    Args:
        writer: The writer of this replica.
        on_write: Called in the transaction of an edit, when it opens a change, and for each one
            beyond `CHANGE_BYTES_GOAL`. It cannot read the document then, but it can `take`.
    """

    def __init__(self, writer: int, on_write: Callable[[], None]) -> None:
        self._on_write = on_write
        # The paths of the roots that the newest own change touches.
        self.touched: list[str] = []
        # Root types by name, as users hold them.
        self._handles: dict[str, Text | Array[Any] | YMap[Any]] = {}
        # The living Doc, and the one before it, to tell those who still write to that.
        self._observed: list[tuple[Doc[Any], Subscription]] = []
        self.reset(writer)

    def reset(self, writer: int) -> None:
        """Empty it, to be loaded anew and written by *writer*. Handles to roots stay valid."""
        self.writer = writer
        self._sealed: Doc[Any] = Doc(client_id=writer)
        # What is in the sealed Doc.
        self._known = Known()
        for name, handle in self._handles.items():
            self._settle(name, type(handle))
        self._start()

    def _start(self) -> None:
        doc: Doc[Any] = Doc(client_id=self.writer)
        doc.apply_update(self._sealed.get_update())
        for name, handle in self._handles.items():
            doc[name] = handle
        self._doc = doc
        # What no change carries yet: what a rollback left, and the edits since.
        self._undone: list[bytes] = []
        self._edits: list[bytes] = []
        # The clock of the first of those edits, and how many bytes they are.
        self._first = 0
        self._size = 0
        # Takes updates that are not edits of the user.
        self._aside: list[bytes] | None = None
        self._observed.append((doc, doc.observe(partial(self._notice, doc))))
        self._unobserve(2)

    def close(self) -> None:
        """Let the Docs go; one that is still observed is never freed."""
        self._unobserve(0)

    def _unobserve(self, keep: int) -> None:
        while len(self._observed) > keep:
            doc, subscription = self._observed.pop(0)
            doc.unobserve(subscription)

    # Editing

    def text(self, name: str) -> Text:
        """The root text *name*. Raises UsageError if the name is used for another type here."""
        return self._root(name, Text)

    def array(self, name: str) -> Array[Any]:
        """The root array *name*; as `text`."""
        return self._root(name, Array)

    def map(self, name: str) -> YMap[Any]:
        """The root map *name*; as `text`."""
        return self._root(name, YMap)

    def _root(self, name: str, kind: type[_T]) -> _T:
        found = self._handles.get(name)
        if found is None:
            if not is_root_name(name):
                raise UsageError(f"{name[:80]!r} cannot name a shared type")
            if not self._settle(name, kind):
                used = "text" if kind is Array else "array"
                raise UsageError(f"{name!r} is in use as {used} elsewhere; choose another name")
            found = self._handles[name] = self._doc.get(name, type=kind)
        if not isinstance(found, kind):
            used, wanted = type(found).__name__.lower(), kind.__name__.lower()
            raise UsageError(f"{name!r} is in use as {used}; it cannot be used as {wanted} too")
        return found

    def _settle(self, name: str, kind: type) -> bool:
        return kind is YMap or self._known.settle(name, TEXT if kind is Text else ARRAY)

    def _notice(self, doc: Doc[Any], event: TransactionEvent) -> None:
        if doc is not self._doc:
            raise UsageError("this type was left behind by an undone edit; get it from its root")
        if self._aside is not None:
            self._aside.append(event.update)
            return
        was_open = self.is_open
        if not was_open:
            self._first = self._known.clocks.get(self.writer, 0)
            self._size = 0
        self._edits.append(event.update)
        self._size += len(self._edits[-1])
        if not was_open or CHANGE_BYTES_GOAL < self._size <= CHANGE_BYTES_MAX:
            self._on_write()

    @property
    def is_open(self) -> bool:
        """Whether there is something to `take`."""
        return bool(self._undone or self._edits)

    def take(self) -> bytes:
        """Close the open change and return it as one update; empty if none is open. `touched` are
        the paths of its roots then.

        Raises:
            UsageError: Other members would refuse it. Its edits have been undone.
        """
        if not self.is_open:
            return b""
        update = _merge(self._undone + self._edits)
        try:
            touched = check_change(update, self.writer, self._known)
        except InvalidUpdate as exc:
            self._start()
            raise UsageError(f"edits were undone, as others would refuse them: {exc}") from exc
        self._sealed.apply_update(update)
        self._undone, self._edits = [], []
        self.touched = _paths(touched)
        return update

    def rollback(self) -> None:
        """Make the document read as if the open change had never been.

        Raises:
            UsageError: A pycrdt transaction is open; nothing changed.
        """
        if not self._edits:
            return
        base: Doc[Any] = Doc()
        for update in (self._sealed.get_update(), *self._undone):
            base.apply_update(update)
        with self._transaction() as updates:
            count = self._next_clock() - self._first
            if count:
                ours = encode_deletes({self.writer: [(self._first, count)]})
                self._doc.apply_update(b"\0" + ours)
            roots = [(name, root) for name, root in self._doc.items() if root is not None]
            pairs = [(root, base.get(name, type=type(root))) for name, root in roots]
            for living, wanted in pairs:
                _mend(living, wanted)
        if any(content(living) != content(wanted) for living, wanted in pairs):
            self._start()
            return
        # What came and went since then comes out of another Doc as mere tombstones.
        subscription = base.observe(lambda event: self._undone.append(event.update))
        base.apply_update(_merge(self._edits + updates))
        base.unobserve(subscription)
        self._edits = []
        self._first = self._next_clock()

    def _next_clock(self) -> int:
        reader = Decoder(self._doc.get_state())
        read = reader.read_var_uint
        return {read(): read() for _ in range(read())}.get(self.writer, 0)

    # Reading

    @property
    def length(self) -> int:
        """How many characters and items were ever written here, open edits not included."""
        return sum(self._known.clocks.values())

    def contents(self) -> dict[str, Text | Array[Any] | YMap[Any]]:
        """The roots that hold something, open edits not included, as they are now: in a Doc of
        their own, which nobody observes."""
        doc: Doc[Any] = Doc()
        doc.apply_update(self.state())
        roots = {
            name: doc.get(name, type=_KINDS[kind])
            for name, kind in sorted(self._known.kinds().items())
        }
        return {name: root for name, root in roots.items() if len(root)}

    def exercise(self) -> int:
        """Do all that is ever done with what is here: read it, save it, load that, read and write
        it there. Shows what pycrdt does not survive. Returns the size of the state."""
        state = self.state()
        doc: Doc[Any] = Doc()
        doc.apply_update(state)
        kinds = self._known.kinds()
        for name, kind in kinds.items():
            content(self._doc.get(name, type=_KINDS[kind]))
            root = doc.get(name, type=_KINDS[kind])
            content(root)
            match root:
                case Text():
                    root.insert(len(root), "x")
                    root.insert(0, "x")
                case Array():
                    root.append(0)
                    root.insert(0, 0)
                case YMap():
                    for key in list(root.keys()):
                        root[key] = 0
        doc.get_update()
        return len(state)

    # Replicating

    def apply(self, update: bytes, writer: int) -> list[str]:
        """Take in the next change of *writer*; return the paths of the roots it touches.

        Whatever pycrdt raises comes out as it is, PanicException (a BaseException) included; the
        engine is then beyond use, until `reset`.

        Raises:
            InvalidUpdate: It breaks the rules; nothing changed.
            UsageError: A pycrdt transaction is open; nothing changed.
        """
        with self._transaction():
            if writer == self.writer and self.is_open:
                raise InvalidUpdate("an own change from elsewhere, while there are open edits")
            touched = check_change(update, writer, self._known)
            self._sealed.apply_update(update)
            self._doc.apply_update(update)
        return _paths(touched)

    def check(self, update: bytes, writer: int) -> None:
        """Whether the guard would let the next change of *writer* in; nothing changes. Raises
        InvalidUpdate."""
        try_change(update, writer, self._known)

    @property
    def clocks(self) -> Mapping[int, int]:
        """How many characters and items each client ever wrote, open edits not included."""
        return self._known.clocks

    def deleted(self) -> Ranges:
        """What is deleted here, open edits not included: ranges of clocks by client."""
        update = self._sealed.get_update(self._sealed.get_state())
        return parse_deletes(update, 1, CLOCK_MAX, CLOCK_MAX)

    def since(self, clocks: Mapping[int, int]) -> bytes:
        """What is here beyond these clocks of clients, open edits not included, as one update."""
        known = self._known.least(clocks)
        pairs = b"".join(encode_varint(c) + encode_varint(at) for c, at in known.items())
        return self._sealed.get_update(encode_varint(len(known)) + pairs)

    def state(self) -> bytes:
        """The whole document without open edits, as one update."""
        return self._sealed.get_update()

    def load(self, state: bytes) -> list[str]:
        """Take in *state*, from anybody; return the paths of its roots. Raises what `apply` does.

        A state of lanes takes the place of what is here. But Yjs itself joins states of native
        types, and a fresh Doc would cost users their handles. So it goes into the Docs there are.
        """
        with self._transaction():
            known = check_state(state)
            here, there = (k.clocks.get(self.writer, 0) for k in (self._known, known))
            if here < there and self.is_open:
                raise InvalidUpdate("own changes from elsewhere, while there are open edits")
            self._known.join(known)
            self._sealed.apply_update(state)
            self._doc.apply_update(state)
        return [f"y{root}{SEPARATOR}" for root in sorted(known.roots())]

    def join(self, state: bytes, newer: Callable[[int], bool]) -> bytes:
        """Return what to `load` for the join of *state* and this document: Yjs joins them."""
        return state

    @contextmanager
    def _transaction(self) -> Iterator[list[bytes]]:
        """A transaction that is no edit of the user; its update is in the list afterwards."""
        try:
            transaction = self._doc.transaction(origin=ORIGIN)
        except RuntimeError:
            raise UsageError("a pycrdt transaction is open; never await inside one") from None
        aside: list[bytes] = []
        self._aside = aside
        try:
            with transaction:
                yield aside
        except ExceptionGroup as failures:
            if failures.__context__ is not None:
                raise
            # Observers are the user's. They fail after the fact, and nobody waits for them.
            sys.excepthook(type(failures), failures, failures.__traceback__)
        finally:
            self._aside = None


def _paths(roots: set[str]) -> list[str]:
    return [f"y{root}{SEPARATOR}" for root in sorted(roots)]


def _merge(updates: list[bytes]) -> bytes:
    while len(updates) > 1:
        starts = range(0, len(updates), MERGE_WIDTH)
        updates = [merge_updates(*updates[at : at + MERGE_WIDTH]) for at in starts]
    return updates[0]


# Going back


def content(value: Any) -> Any:
    """What a value reads as; equal only if the types are: 1.0 is not True here."""
    match value:
        case str():
            return value
        case Text():
            return [Text, *_runs(value)]
        case Array():
            return [Array, *map(content, value)]
        case YMap():
            return [YMap, {key: content(value[key]) for key in list(value.keys())}]
        case dict():
            return {key: content(inner) for key, inner in value.items()}
        case list():
            return [content(inner) for inner in value]
        case int() | float() if not isinstance(value, bool):
            # An int beyond 2**53 stays one only where it was written.
            return float, repr(float(value))
    return type(value), repr(value)


def _mend(living: Any, wanted: Any) -> None:
    """Put back into *living* what it lost. It has nothing that *wanted*, the same of another
    Doc, does not have."""
    match living, wanted:
        case Text(), Text():
            if content(living) != content(wanted):
                _mend_text(living, wanted)
        case Array(), Array():
            for at, value in enumerate(wanted):
                # Items have the same identity in both.
                if at < len(living) and _item(living, at) == _item(wanted, at):
                    _mend(living[at], value)
                else:
                    put_copy(value, partial(living.insert, at))
        case YMap(), YMap():
            for key in list(wanted.keys()):
                if key in living:
                    _mend(living[key], wanted[key])
                else:
                    put_copy(wanted[key], partial(living.__setitem__, key))


def _item(array: Array[Any], at: int) -> bytes:
    return array.sticky_index(at).encode()


def _mend_text(living: Text, wanted: Text) -> None:
    have = deque((content(value), size_of(value)) for value, _, _ in cells_of(living))
    if sum(size for _, size in have) != len(living):
        return  # An embedded string: it looks like text. That it stays is noticed later.
    lost: list[tuple[bool, _Cell]] = []
    for cell in cells_of(wanted):
        is_lost = not have or have[0][0] != content(cell[0])
        lost.append((is_lost, cell))
        if not is_lost:
            have.popleft()
    at = 0
    for (is_lost, (is_text, _)), run in groupby(lost, key=lambda pair: (pair[0], pair[1][2])):
        cells = [cell for _, cell in run]
        attributes = plain(cells[0][1])
        if is_lost and is_text:
            living.insert(at, "".join(value for value, _, _ in cells), attributes)
        elif is_lost:
            for value, _, _ in reversed(cells):
                put_copy(value, partial(living.insert_embed, at, attrs=attributes))
        at += sum(size_of(value) for value, _, _ in cells)
    if content(living) != content(wanted):
        mend_formats(living, wanted)


def mend_formats(living: Text, wanted: Text) -> None:
    """Format *living*, which has the same characters, as *wanted* is."""
    clear = {name: None for _, attributes, _ in cells_of(living) for name in attributes}
    at = 0
    for value, attributes in wanted.diff():
        end = at + size_of(value)
        living.format(at, end, clear | plain(attributes or {}))
        at = end


def _runs(text: Text) -> Iterator[tuple[Any, Any]]:
    """What a text reads as; pycrdt may cut a run in two where nothing changes."""
    for style, runs in groupby(text.diff(), key=_style):
        parts = [part for part, _ in runs]
        yield style, "".join(parts) if style[0] else [content(part) for part in parts]


_Cell = tuple[Any, dict[str, Any], tuple[bool, Any]]
"""``(value, attributes, style)`` of a character or embed of a text."""


def cells_of(text: Text) -> list[_Cell]:
    """The characters and embeds of a text."""
    cells: list[_Cell] = []
    for run in text.diff():
        part, attributes = run
        style = _style(run)
        cells += [(value, attributes or {}, style) for value in (part if style[0] else [part])]
    return cells


def _style(run: tuple[Any, dict[str, Any] | None]) -> tuple[bool, Any]:
    """Whether a run of a text is characters, and how it is formatted."""
    return isinstance(run[0], str), content(run[1] or {})


def size_of(value: Any) -> int:
    """How far a character or embed moves the index of a text."""
    return len(value.encode()) if isinstance(value, str) else 1


def put_copy(value: Any, put: Callable[[Any], None]) -> None:
    """Have *put* put a copy of *value* where it belongs."""
    if not isinstance(value, SHARED):
        put(plain(value))
        return
    made = type(value)()
    put(made)
    _mend(made, value)


def plain(value: Any) -> Any:
    """What pycrdt takes for what it gave: of a bytearray in a list it silently makes None."""
    match value:
        case bytearray():
            return bytes(value)
        case list():
            return [plain(inner) for inner in value]
        case dict():
            return {key: plain(inner) for key, inner in value.items()}
    return value
