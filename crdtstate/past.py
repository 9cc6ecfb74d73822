"""
The past: documents as they were at a cut, to be read and compared, never written.

A `Past` is a set of documents rebuilt from a snapshot and the changes after it. It reads as a
replica read that had taken in exactly those changes: values, conflicts, strategies. It is made
where it is asked for and belongs to nobody else, so it takes part in nothing; what it takes is the
memory of its documents, until it is closed or forgotten.

`differences` compares two sets of documents, each a past or a living one, place by place. What a
place reads as is compared as it is packed: 1 and True differ, and nothing has to be unpacked that
is the same on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import unified_diff
from functools import partial
from itertools import chain, islice
from types import TracebackType
from typing import Any, NoReturn, Self

from crdtstate.change import Change, Snapshot, decode_change
from crdtstate.clock import Cut, HybridClock, Version
from crdtstate.document import Document, EngineFailure
from crdtstate.documents import DocumentSet
from crdtstate.errors import InvalidUpdate, UsageError
from crdtstate.hiding import Hiding
from crdtstate.lanes import Lanes, Plan
from crdtstate.loading import read_state
from crdtstate.native import Array, Text, YMap, content, plain
from crdtstate.rules import RULES
from crdtstate.slots import SEPARATOR, Cell, candidates, totals
from crdtstate.values import pack, unpack, unpack_key

WRITER = 1
"""As whom a past would write if it could."""

LONG = 200
"""Characters of a value beyond which a difference is shown in part, or a text's line by line."""

LINES_MAX = 60
"""Lines of a difference of texts that are shown."""

PORTION = 2000
"""Places that are compared at a time."""

KINDS = {"m": "map", "r": "register", "c": "counter", "s": "set", "@": "strategy"}
"""What a container holds, by the first letter of its name."""

NATIVE: dict[type, str] = {Text: "text", Array: "array", YMap: "native_map"}


NO_NAME = pack("", "strategy")
"""What stands where a strategy was taken back."""


class Absent:
    """The type of `ABSENT`: what a place reads as where there is nothing."""

    def __repr__(self) -> str:
        return "ABSENT"

    def __bool__(self) -> bool:
        return False

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT = Absent()
"""Stands in a `Difference` for no value, as None is one."""


class Past(DocumentSet):
    """The documents as they were, to be read: ``past.map("plan")["goal"]``, ``past.conflicts()``,
    ``past.document("notes").text("body")``, as in a replica.

    Writes raise UsageError. Documents that did not exist then read as empty ones. Any thread may
    read it. Use it in a ``with`` block, or `close` it, to give its memory back at once.

    Args:
        hiding: What is hidden of a document *now*, by its name: who was found out since is not to
            be seen in the past either, and what was released since is.
    """

    def __init__(self, hiding: Callable[[str], Hiding | None] = lambda name: None) -> None:
        super().__init__("past", WRITER, lambda: 0)
        self._hiding = hiding
        self._is_closed = False

    # Making

    def fill(
        self,
        name: str,
        shared: bool,
        version: Version,
        snapshot: bytes | Snapshot | None,
        changes: Iterable[bytes] = (),
    ) -> None:
        """Take in the document *name* at *version*: *snapshot*, if there is one, and then
        *changes*, in causal order.

        Raises:
            InvalidUpdate: They are damaged, break the rules, or do not lead to *version*.
        """
        document = self.begin(name, shared, snapshot)
        for data in changes:
            document.take(decode_change(data))
        document.finish(version)

    def begin(self, name: str, shared: bool, snapshot: bytes | Snapshot | None) -> PastDocument:
        """A document of this past, at *snapshot* or empty, to be given its changes."""
        document = PastDocument(name, self._refuse, shared)
        document.may_rule = partial(self.may_rule, name)
        if (hiding := self._hiding(name)) is not None:
            document.lanes.hiding = hiding.emptied()
        if snapshot is not None:
            document.start(Snapshot.decode(snapshot) if isinstance(snapshot, bytes) else snapshot)
        document.polls = self.polls
        self._documents[name] = document
        return document

    # Reading

    def document(self, name: str, *, shared: bool = False) -> Document:
        """The document *name* as it was; an empty one if there was none.

        Raises:
            UsageError: It is of the other type.
        """
        self._check_usable()
        found = self._documents.get(name)
        if found is None:
            return PastDocument(name, self._refuse, shared)
        if shared and not found.shared:
            raise UsageError(f"document {name!r} is not shared=True")
        return found

    def version(self) -> Cut:
        """Which cut this is."""
        return Cut(dict(self.versions()))

    @contextmanager
    def transaction(self, *, message: str = "", run: str = "") -> Iterator[None]:
        """Raises UsageError: nothing can be written here."""
        self._refuse()
        yield

    def close(self) -> None:
        """Give the memory back. Views of it that are still held stay as they are. Idempotent."""
        self._is_closed = True
        self._documents = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"{len(self._documents)} documents"
        return f"<Past {state}>"

    def _check_usable(self) -> None:
        if self._is_closed:
            raise UsageError("this past was closed; ask the replica for it again")

    def _refuse(self, document: Document | None = None) -> NoReturn:
        raise UsageError(
            "the past can only be read; replica.restore(...) brings values back, as a new change"
        )


class PastDocument(Document):
    """A document of a past. It has no engine but for native types: only the index is kept."""

    def __init__(self, name: str, refuse: Callable[[Document], None], shared: bool) -> None:
        super().__init__(
            name,
            writer=WRITER,
            agent="past",
            clock=HybridClock(),
            wall=lambda: 0,
            on_write=refuse,
            shared=shared,
        )
        self.lanes.close()
        self.lanes = self.index = Index(WRITER)
        if self.native is not None:
            # What is not observed goes when nobody holds it any more.
            self.native.close()

    def start(self, snapshot: Snapshot) -> None:
        """Take *snapshot* for what the document is at first. Raises InvalidUpdate."""
        try:
            if self.native is not None or snapshot.shared:
                self.join(snapshot)
                return
        except EngineFailure as exc:
            raise InvalidUpdate(f"a snapshot of {self.name!r} cannot be loaded: {exc}") from exc
        self.rules, self.lanes.hiding = self._withholding.hear(snapshot)
        self.index.load(snapshot.state, snapshot.version)
        self.version, self.heads = snapshot.version.copy(), dict(snapshot.heads)
        self.stamp, self.agents = snapshot.stamp, dict(snapshot.agents)
        self.ids, self.cards = dict(snapshot.ids), dict(snapshot.cards)

    def take(self, change: Change) -> list[str]:
        """Take in a change, unless it is contained; return the paths it wrote. What it only tidied
        away is not among them. Raises InvalidUpdate."""
        if self.version.covers(change.dot):
            return []
        if change.document != self.name or not self.is_ready(change):
            raise InvalidUpdate(f"{change!r} comes before what it builds on")
        try:
            touched = self.apply(change)
        except EngineFailure as exc:
            raise InvalidUpdate(f"{change!r} cannot be applied: {exc}") from exc
        return touched if self.shared else list(self.index.replaced)

    def finish(self, version: Version) -> None:
        """Check that this is the document at *version*; no change can be taken in any more.
        Raises InvalidUpdate."""
        if self.version != version:
            raise InvalidUpdate(f"{self.name!r} came out at {self.version}, not {version}")
        # Where slots lie is only asked for by changes, and takes a quarter of the memory.
        self.index.lanes = {}

    # What pycrdt gives for native types could be written to.

    def text(self, name: str) -> PastText:  # type: ignore[override]
        """The text *name* as it was."""
        return PastText(self._native("text").text(name))

    def array(self, name: str) -> PastArray:  # type: ignore[override]
        """The array *name* as it was."""
        return PastArray(self._native("array").array(name))

    def native_map(self, name: str) -> PastMap:  # type: ignore[override]
        """The native map *name* as it was."""
        return PastMap(self._native("native_map").map(name))


class Index(Lanes):
    """Lanes without an engine: they can be read, and brought forward by what was checked."""

    def __init__(self, writer: int) -> None:
        super().__init__(writer)
        # Nothing is ever tidied here.
        self.tended = []
        # What the newest change wrote, by path: the cell before it.
        self.replaced: dict[str, Cell] = {}
        # What it took out of its writer's lane without a difference that can be seen.
        self.dropped: list[str] = []

    def _begin(self) -> None:
        """There is no Doc: those belong to one thread."""

    def close(self) -> None:
        """Nothing has to be let go."""

    def apply(self, update: bytes, plan: Plan) -> list[str]:
        """Bring the index after a checked change, and remember what was there before."""
        before: dict[str, Cell] = {}
        for _, path in plan.drops:
            before[path] = dict(self.cell(path))
        for _, _, path, _ in plan.puts:
            if path not in plan.moved:
                before[path] = dict(self.cell(path))
        touched = self.enter(plan)
        written = {path for _, _, path, _ in plan.puts if path not in plan.moved}
        self.replaced = {
            path: cell
            for path, cell in before.items()
            # Else it was only tidied away: nobody could see it any more.
            if path in written or candidates(cell) != candidates(self.cell(path))
        }
        own = (path for writer, path in plan.drops if writer == plan.writer)
        self.dropped = [path for path in own if path not in self.replaced]
        return touched

    def load(self, state: bytes, version: Version) -> None:
        """Take *state*, the document at *version*. Raises InvalidUpdate; then nothing changed."""
        # What values are like was checked when they came; here it would take a third of the time.
        self.lanes, self.containers = read_state(state, version, lambda *slot: None)
        self._veil_all()


# Native types


class _Frozen:
    """Raises UsageError for everything that would write."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError("the past can only be read; replica.restore(...) brings values back")

    __setitem__ = __delitem__ = __iadd__ = _refuse
    insert = append = extend = clear = pop = format = insert_embed = update = move = _refuse


class PastText(_Frozen):
    """A text as it was: ``str(text)``, and ``text.diff()`` with how it is formatted."""

    def __init__(self, inner: Text) -> None:
        self._inner = inner

    def diff(self) -> list[tuple[Any, dict[str, Any] | None]]:
        """The runs of the text, each with its attributes."""
        return [(_read_only(part), attributes) for part, attributes in self._inner.diff()]

    def to_py(self) -> str:
        """The text alone."""
        return str(self._inner)

    def __str__(self) -> str:
        return str(self._inner)

    def __len__(self) -> int:
        return len(self._inner)

    def __repr__(self) -> str:
        return f"<PastText {shorten(str(self))}>"


class PastArray(_Frozen, Sequence[Any]):
    """An array as it was."""

    def __init__(self, inner: Array[Any]) -> None:
        self._inner = inner

    def to_py(self) -> list[Any]:
        """The whole as plain Python."""
        found: list[Any] = as_python(self._inner)
        return found

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [_read_only(value) for value in list(self._inner)[at]]
        return _read_only(self._inner[at])

    def __len__(self) -> int:
        return len(self._inner)

    def __repr__(self) -> str:
        return f"<PastArray {shorten(repr(self.to_py()))}>"


class PastMap(_Frozen, Mapping[str, Any]):
    """A native map as it was."""

    def __init__(self, inner: YMap[Any]) -> None:
        self._inner = inner

    def to_py(self) -> dict[str, Any]:
        """The whole as plain Python."""
        found: dict[str, Any] = as_python(self._inner)
        return found

    def __getitem__(self, key: str) -> Any:
        return _read_only(self._inner[key])

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._inner.keys()))

    def __len__(self) -> int:
        return len(self._inner)

    def __repr__(self) -> str:
        return f"<PastMap {shorten(repr(self.to_py()))}>"


def _read_only(value: Any) -> Any:
    match value:
        case Text():
            return PastText(value)
        case Array():
            return PastArray(value)
        case YMap():
            return PastMap(value)
    return value


def as_python(value: Any) -> Any:
    """A native type as plain Python: a text as a str, or as its runs if it is formatted."""
    match value:
        case Text():
            runs = value.diff()
            if all(isinstance(part, str) and not attributes for part, attributes in runs):
                return str(value)
            return [[as_python(part), plain(attributes or {})] for part, attributes in runs]
        case Array():
            return [as_python(inner) for inner in value]
        case YMap():
            return {key: as_python(value[key]) for key in sorted(value.keys())}
    return plain(value)


# Differences


@dataclass(frozen=True, slots=True)
class Difference:
    """A place that reads differently at two points in time.

    Attributes:
        document: The document's name.
        kind: ``"map"``, ``"register"``, ``"counter"``, ``"set"``, ``"strategy"`` (by which rule a
            view decides conflicts), or, in shared documents, ``"text"``, ``"array"`` or
            ``"native_map"``.
        name: The view's name.
        key: The map's key, or the set's element; None where there is one value.
        before: What it read as; `ABSENT` for nothing. Elements of sets read as True.
        after: What it reads as later.
    """

    document: str
    kind: str
    name: str
    key: Any
    before: Any
    after: Any

    @property
    def path(self) -> str:
        """The place as text, such as ``plan['goal']``."""
        return path_text(self.name, self.key)

    def __str__(self) -> str:
        where = f"{self.document}: {self.path}"
        before, after = self.before, self.after
        if self.kind == "counter":
            return f"{where}: {before} -> {after} ({after - before:+d})"
        if self.kind == "set":
            return f"{where}: {'removed' if after is ABSENT else 'added'}"
        if self.kind == "text" and isinstance(before, str) and isinstance(after, str):
            if max(len(before), len(after)) > LONG:
                return f"{where}:\n{_text_diff(before, after)}"
        if before is ABSENT:
            return f"{where} = {shorten(repr(after))} (new)"
        if after is ABSENT:
            return f"{where}: {shorten(repr(before))} removed"
        return f"{where}: {shorten(repr(before))} -> {shorten(repr(after))}"


def path_text(name: str, key: Any) -> str:
    """A place as text, as in events: ``plan['goal']``, or the name alone."""
    return name if key is None else f"{name}[{key!r}]"


def shorten(text: str) -> str:
    """*text*, cut where it is too long to be read."""
    return text if len(text) <= LONG else f"{text[:LONG]}... ({len(text)} characters)"


def _text_diff(before: str, after: str) -> str:
    lines = unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="")
    shown = [shorten(line) for line in islice(lines, LINES_MAX)]
    rest = sum(1 for _ in lines)
    return "\n".join(shown + ([f"... {rest} more lines"] if rest else []))


class Place:
    """One place of a document of lanes, and how to read it there.

    Args:
        container: The kind's letter and the view's name.
        key: As in the index.
    """

    __slots__ = ("container", "key")

    def __init__(self, container: str, key: str) -> None:
        self.container = container
        self.key = key

    @classmethod
    def of(cls, path: str) -> Place:
        """The place at a *path* of lanes."""
        container, _, key = path.partition(SEPARATOR)
        return cls(container, key)

    def order(self) -> tuple[str, str]:
        """By which places are sorted."""
        return self.container, self.key

    @property
    def kind(self) -> str:
        return KINDS[self.container[0]]

    @property
    def name(self) -> str:
        return self.container[1:]

    @property
    def shown_key(self) -> Any:
        """The key as users know it."""
        match self.container[0]:
            case "r" | "c":
                return None
            case "s":
                return unpack_key(self.key)
        return self.key

    @property
    def path(self) -> str:
        """The place as text."""
        return path_text(self.name, self.shown_key)

    def cell(self, document: Document | None) -> Cell:
        """The slots there."""
        return _cells(document, self.container).get(self.key) or {}

    def read(self, document: Document | None) -> bytes | None:
        """What the place reads as, packed; None for nothing. A counter that counts nothing
        reads as 0.

        Raises:
            UnknownStrategy: Values conflict, and what decides is not registered here.
        """
        cell = self.cell(document)
        if self.container[0] == "c":
            counted = (totals(slot) for slot in cell.values())
            return pack(sum(up - down for up, down in counted), "counter")
        if self.container[0] == "@":
            named = candidates(cell)
            return named[-1][1].value if named and named[-1][1].value != NO_NAME else None
        if len(cell) == 1:
            for slot in cell.values():
                return slot.value
        found = candidates(cell)
        if len(found) < 2 or self.container[0] == "s":
            return found[-1][1].value if found else None
        assert document is not None
        known = document.candidates(cell)
        return pack(document.decide(self.container, self.key, known).value, self.path)

    def write(self, document: Document, packed: bytes | None) -> None:
        """Let the place, other than a counter, read as *packed*."""
        if self.container[0] == "@" and packed is None:
            # A strategy is never removed.
            packed = NO_NAME
        document.put(self.container, self.key, packed)

    def shown(self, packed: bytes | None) -> Any:
        """What *packed* is for users."""
        return ABSENT if packed is None else unpack(packed)

    def difference(self, name: str, before: bytes | None, after: bytes | None) -> Difference:
        """The place as one that differs, in the document *name*."""
        shown = (self.shown(before), self.shown(after))
        return Difference(name, self.kind, self.name, self.shown_key, *shown)


class Selection:
    """Which places are meant.

    Args:
        paths: Names of views (``plan``) and places in them (``plan['goal']``); None: all.
    """

    def __init__(self, paths: Iterable[str] | None) -> None:
        if isinstance(paths, str) or not all(isinstance(path, str) for path in paths or ()):
            raise UsageError(f"paths are several str, such as [\"plan['goal']\"], not {paths!r}")
        self._paths = None if paths is None else frozenset(paths)
        # Those that were found, to tell whether one names nothing.
        self._found: set[str] = set()

    def covers(self, name: str, key: Callable[[], Any]) -> bool:
        """Whether a place is among them; *key* gives its key as users know it."""
        if self._paths is None:
            return True
        if name in self._paths:
            self._found.add(name)
            return True
        text = path_text(name, key())
        if text in self._paths:
            self._found.add(text)
            return True
        return False

    def covers_place(self, place: Place) -> bool:
        return self.is_all or self.covers(place.name, lambda: place.shown_key)

    def covers_some_of(self, name: str) -> bool:
        """Whether places of the view *name* can be among them."""
        inside = path_text(name, "")[: len(name) + 1]
        return self.is_all or any(
            path == name or path.startswith(inside) for path in self._paths or ()
        )

    @property
    def is_all(self) -> bool:
        """Whether every place is meant."""
        return self._paths is None

    def check(self) -> None:
        """Raise UsageError if one of them has named nothing."""
        missing = sorted((self._paths or frozenset()) - self._found)
        if missing:
            raise UsageError(f"{missing[0]!r} names nothing, neither now nor then")


def portions(
    before: Document | None, after: Document | None, chosen: Selection
) -> Iterator[list[Place]]:
    """The places where two documents of lanes, or nothing, can read differently, in no order, a
    portion at a time; in between both may change."""
    names = {name for each in (before, after) if each is not None for name in each.lanes.containers}
    for container in names:
        if container[0] not in KINDS or not chosen.covers_some_of(container[1:]):
            continue
        if container == RULES:
            # They say what is admitted from now on, and are nothing that was.
            continue
        keys = list(olds := _cells(before, container))
        keys += [key for key in _cells(after, container) if key not in olds]
        for at in range(0, len(keys), PORTION):
            part = keys[at : at + PORTION]
            if not chosen.is_all:
                part = [key for key in part if chosen.covers_place(Place(container, key))]
            olds, news = _cells(before, container), _cells(after, container)
            yield [
                Place(container, key)
                for key in part
                # The same candidates can read differently, by another strategy or other votes.
                if (cell := olds.get(key)) != news.get(key) or (cell is not None and len(cell) > 1)
            ]


def places(before: Document | None, after: Document | None, chosen: Selection) -> Iterator[Place]:
    """The same, one by one, by name, so that equal pasts give equal lists."""
    yield from sorted(chain.from_iterable(portions(before, after, chosen)), key=Place.order)


def _cells(document: Document | None, container: str) -> Mapping[str, Cell]:
    found = document.lanes.containers.get(container) if document is not None else None
    return found.cells if found is not None else {}


def natives(document: Document | None) -> dict[str, Text | Array[Any] | YMap[Any]]:
    """The roots of a shared document, as they are."""
    if document is None or document.native is None:
        return {}
    return document.native.contents()


def differences(
    before: DocumentSet,
    after: DocumentSet,
    documents: Iterable[str],
    chosen: Selection,
) -> Iterator[Difference]:
    """What reads differently in *after*, in those of its documents that are named.

    Raises:
        UnknownStrategy: Values conflict, and what decides is not registered here.
    """
    for name in documents:
        old, new = before.find(name), after.find(name)
        for place in places(old, new, chosen):
            was, is_now = place.read(old), place.read(new)
            if was != is_now:
                yield place.difference(name, was, is_now)
        yield from _native_differences(name, natives(old), natives(new), chosen)


def _native_differences(
    name: str, old: Mapping[str, Any], new: Mapping[str, Any], chosen: Selection
) -> Iterator[Difference]:
    for root in sorted(old.keys() | new.keys()):
        one, other = old.get(root), new.get(root)
        if not chosen.covers(root, lambda: None):
            continue
        if one is None or other is None or content(one) != content(other):
            yield native_difference(name, root, one, other)


def native_difference(name: str, root: str, one: Any, other: Any) -> Difference:
    """A root of a shared document as one that differs; None is one that is empty."""
    kind = NATIVE[type(other if one is None else one)]
    shown = (ABSENT if value is None else as_python(value) for value in (one, other))
    return Difference(name, kind, root, None, *shown)
