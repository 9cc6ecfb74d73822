"""
A document: one replicated unit of state, and the changes that carry it from replica to replica.

Plain writes collect in an *open change* that reads already see. Sealing it writes one transaction
to the engine and yields a `Change`: the dot (writer, seq), the heads of the history it builds on,
a stamp, the Yjs update, and where it came from. Applying changes of others in causal order (L5 of
`lanes`) and sealing own ones is all that ever alters a document; a `Snapshot` carries the sum of
them at exactly one version.

The *engine* holds the content: `lanes.Lanes` for maps, counters, registers and sets, or
`native.Native` for the Yjs types of a document opened with ``shared=True``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from crdtstate.change import (
    CHANGE_BYTES_MAX,
    NAME_CHARS_MAX,
    TIDY,
    WRITE,
    Change,
    Origin,
    Snapshot,
    encode_change,
)
from crdtstate.clock import SEQ_MAX, STAMP_MAX, Dot, HybridClock, Version
from crdtstate.conflict import DEFAULT_STRATEGY, Conflict, resolver
from crdtstate.crdts import STRATEGIES, Counter, Map, Register, Set, Strong
from crdtstate.errors import CRDTStateError, InvalidUpdate, UnsupportedValue, UsageError
from crdtstate.lanes import Lanes
from crdtstate.native import Array, Native, Text, YMap
from crdtstate.slots import (
    NO_COVERS,
    SEPARATOR,
    Slot,
    candidates,
    covering,
    is_conflict,
    totals,
)
from crdtstate.values import pack, unpack

KEY_BYTES_MAX = 800
"""Bytes of a map's key in UTF-8; with the name it stays below what the guard admits."""

CHANGE_BYTES_GOAL = 128 * 1024
CHANGE_PATHS_GOAL = 1024
"""Where plain writes are sealed without waiting for the end of the loop turn."""

CHANGE_PATHS_MAX = 20_000
"""Paths that one transaction may write."""

SETTLED_PER_CHANGE = 500
"""Slots dropped per change because others cover them; bounds the length of a change."""


class EngineFailure(Exception):
    """pycrdt failed on a checked update. The document's Doc is beyond use and must be rebuilt
    from the store without this change; reads go on, from the index."""


class Document:
    """One document of a replica.

    Args:
        name: Its name.
        writer: This replica's writer.
        agent: This replica's agent, named in own changes.
        clock: The replica's hybrid logical clock.
        wall: Returns the wall time in milliseconds since 1970.
        on_write: Called with the document when a change opens, and when one is so large that it
            should be sealed now.
        shared: Whether it holds native Yjs types.
    """

    def __init__(
        self,
        name: str,
        *,
        writer: int,
        agent: str,
        clock: HybridClock,
        wall: Callable[[], int],
        on_write: Callable[[Document], None],
        shared: bool = False,
    ) -> None:
        check_name(name, "a document's name")
        self.name = name
        self.writer = writer
        self.agent = agent
        self.shared = shared
        # What has been delivered: own sealed changes and applied ones of others.
        self.version = Version()
        # The changes that no delivered change depends on yet.
        self.heads: dict[int, int] = {}
        # Who writes which lane.
        self.agents: dict[int, str] = {}
        # The highest stamp delivered.
        self.stamp = 0
        self.lanes = Lanes(writer)
        self.native = Native(writer, self._native_written) if shared else None
        # The engine failed; nothing can be taken in before the document is rebuilt.
        self.is_broken = False
        # Reads and writes over a quorum, where there is one.
        self.strong: Strong | None = None
        self._clock = clock
        self._wall = wall
        self._on_write = on_write
        # The open change: own slots as they were before it, its stamp and size so far.
        self._before: dict[str, Slot | None] = {}
        self._open_stamp = 0
        self._open_bytes = 0
        self._open_kind = WRITE
        # The paths that the newest sealed change wrote.
        self.written: list[str] = []

    def __repr__(self) -> str:
        return f"<Document {self.name} {self.version.total} changes>"

    @property
    def engine(self) -> Lanes | Native:
        return self.native or self.lanes

    def close(self) -> None:
        """Let the engine's memory go."""
        self.lanes.close()
        if self.native is not None:
            self.native.close()

    # Reading

    @property
    def is_open(self) -> bool:
        """Whether there are writes that are not sealed yet."""
        return bool(self._before) or (self.native is not None and self.native.is_open)

    def map(self, name: str, *, strategy: str | None = None) -> Map:
        """The map *name*. Give *strategy* to set, on all replicas, what decides conflicts."""
        view = Map(self, self._view_name(name, "map"))
        self._set_strategy(Map.kind + name, strategy)
        return view

    def register(self, name: str, *, strategy: str | None = None) -> Register:
        """The register *name*. Give *strategy* to set, on all replicas, what decides conflicts."""
        view = Register(self, self._view_name(name, "register"))
        self._set_strategy(Register.kind + name, strategy)
        return view

    def counter(self, name: str) -> Counter:
        """The counter *name*."""
        return Counter(self, self._view_name(name, "counter"))

    def set(self, name: str) -> Set:
        """The set *name*."""
        return Set(self, self._view_name(name, "set"))

    def text(self, name: str) -> Text:
        """The native Yjs text *name*, of a document opened with ``shared=True``."""
        return self._native("text").text(check_name(name, "a text's name"))

    def array(self, name: str) -> Array[Any]:
        """The native Yjs array *name*, of a document opened with ``shared=True``."""
        return self._native("array").array(check_name(name, "an array's name"))

    def native_map(self, name: str) -> YMap[Any]:
        """The native Yjs map *name*, of a document opened with ``shared=True``."""
        return self._native("native_map").map(check_name(name, "a map's name"))

    def _view_name(self, name: str, kind: str) -> str:
        if self.shared:
            raise UsageError(
                f"document {self.name!r} is shared=True and holds native Yjs types (text, array, "
                f"native_map); use a {kind} of another document"
            )
        return check_name(name, f"a {kind}'s name")

    def _native(self, kind: str) -> Native:
        if self.native is None:
            raise UsageError(
                f"{kind}() needs a document of native Yjs types: document(..., shared=True)"
            )
        return self.native

    def strategy(self, container: str) -> str:
        """The name of the strategy of a view, given by kind letter and name."""
        cell = self.lanes.container(STRATEGIES).cells.get(container)
        found = candidates(cell) if cell else []
        return unpack(found[-1][1].value or b"") if found else DEFAULT_STRATEGY

    def _set_strategy(self, container: str, name: str | None) -> None:
        if name is not None:
            resolver(name)
            if name != self.strategy(container):
                self.put(STRATEGIES, container, pack(name, "strategy"))

    def conflicts(self) -> list[Conflict]:
        """The open conflicts of all views, by view and key."""
        found: list[Conflict] = []
        for container, cells in sorted(self.lanes.containers.items()):
            kind, name = container[0], container[1:]
            if kind == "m":
                for key, values in Map(self, name).conflicts().items():
                    found.append(Conflict(self.name, "map", name, key, tuple(values)))
            elif kind == "r" and cells.contested and (values := Register(self, name).conflicts()):
                found.append(Conflict(self.name, "register", name, "", tuple(values)))
        return found

    def count_conflicts(self) -> int:
        """How many conflicts are open, without reading the values."""
        return sum(
            is_conflict(cells.cells[key])
            for container, cells in self.lanes.containers.items()
            if container[0] in "mr"
            for key in cells.contested
        )

    def sizes(self) -> tuple[int, int | None]:
        """The bytes of the document as it is encoded, and those of its live content alone (None
        for native types, which do not tell). As costly as a snapshot."""
        return len(self.engine.state()), None if self.shared else self.lanes.live_bytes()

    @property
    def needs_tidying(self) -> bool:
        """Whether there may be slots here to drop because others cover them (L3)."""
        return bool(self.lanes.settled)

    # Writing

    def put(self, container: str, key: str, value: bytes | None, *, kind: int = WRITE) -> None:
        """Write the packed *value* (None: remove) at a path; reads see it at once. *kind* is
        `RESOLUTION` if that resolves a conflict, which the open change then is."""
        path = container + SEPARATOR + key
        lanes = self.lanes
        cells = lanes.container(container)
        cell = cells.cells.get(key)
        covers = covering(cell, self.writer) if cell else NO_COVERS
        own = cell.get(self.writer) if cell else None
        self._open(path, own, (len(value) if value is not None else 0) + 14 * len(covers))
        self._open_kind = kind or self._open_kind
        if value is None and not covers:
            cells.update(key, self.writer, None)
        else:
            seq = self.version.get(self.writer, 0) + 1
            cells.update(key, self.writer, Slot(value, seq, self._open_stamp, covers))
        self._check_goal()

    def put_above(self, container: str, key: str, value: bytes) -> None:
        """`put`, with a stamp above those of all slots at the path, however far ahead of the own
        clock they are.

        Raises:
            UsageError: A stamp there is the highest possible.
        """
        cells = self.lanes.container(container)
        top = max((slot.stamp for slot in cells.cells.get(key, {}).values()), default=0)
        if top >= STAMP_MAX:
            raise UsageError(f"{self.name!r}: a clock without bounds has written at {key!r}")
        self.put(container, key, value)
        slot = cells.cells[key][self.writer]
        if slot.stamp <= top:
            cells.update(key, self.writer, slot._replace(stamp=top + 1))

    def count(self, container: str, up: int, down: int) -> None:
        """Add to this lane's totals of a counter."""
        path = container + SEPARATOR
        cells = self.lanes.container(container)
        own = cells.cells.get("", {}).get(self.writer)
        ups, downs = totals(own) if own else (0, 0)
        value = pack([ups + up, downs + down], "counter")
        self._open(path, own, len(value))
        seq = self.version.get(self.writer, 0) + 1
        cells.update("", self.writer, Slot(value, seq, self._open_stamp))
        self._check_goal()

    def _open(self, path: str, own: Slot | None, size: int) -> None:
        before = self._before
        if not before:
            self._open_stamp = self._clock.issue(self._wall())
            self._open_bytes = 0
            self._on_write(self)
        if path not in before:
            if len(before) >= CHANGE_PATHS_MAX:
                raise UsageError(
                    f"a transaction in {self.name!r} writes more than {CHANGE_PATHS_MAX} places; "
                    "split it into smaller ones"
                )
            before[path] = own
        size += (len(path) if path.isascii() else len(path.encode())) + 32
        self._open_bytes += size
        if self._open_bytes > CHANGE_BYTES_MAX:
            # What was written again and again counts once.
            self._open_bytes = size + self._measure(but_for=path)
            if self._open_bytes > CHANGE_BYTES_MAX:
                raise UsageError(
                    f"a transaction in {self.name!r} grew beyond {CHANGE_BYTES_MAX} bytes; "
                    "split it into smaller ones"
                )

    def _measure(self, but_for: str) -> int:
        """The bytes of the open change without one path."""
        slots = ((path, self.lanes.own_slot(path)) for path in self._before if path != but_for)
        return sum(
            len(path.encode())
            + 32
            + (len(slot.value or b"") + 14 * len(slot.covers) if slot else 0)
            for path, slot in slots
        )

    def _check_goal(self) -> None:
        if self._open_bytes > CHANGE_BYTES_GOAL or len(self._before) > CHANGE_PATHS_GOAL:
            self._on_write(self)

    def _native_written(self) -> None:
        self._on_write(self)

    @staticmethod
    def check_key(key: object, where: str) -> str:
        """See `check_key`."""
        return check_key(key, where)

    def mark(self) -> Mapping[str, Slot | None]:
        """What is open now, for `rollback`."""
        return {path: self.lanes.own_slot(path) for path in self._before}

    def rollback(self, mark: Mapping[str, Slot | None] | None = None) -> None:
        """Forget what was written since *mark*, or since the last change: none of it happened."""
        before, self._before = self._before, {}
        for path, slot in before.items():
            if mark and path in mark:
                self._before[path] = slot
                self.lanes.set_own(path, mark[path])
            else:
                self.lanes.set_own(path, slot)
        if not self._before:
            self._open_kind, self._open_stamp = WRITE, 0
        if self.native is not None:
            self.native.rollback()

    def seal(self, origin: Origin | None = None) -> Change | None:
        """Turn the open change, and what can be tidied (L3), into a `Change`.

        Returns None if that leaves nothing to say. The caller must journal the change, and only
        then send it.

        Raises:
            UsageError: Native edits that cannot be sent (too large, nested too deep, of another
                type); the document reads as before them.
        """
        kind, self._open_kind = (self._open_kind if self.is_open else TIDY), WRITE
        if self.native is not None:
            update = self.native.take()
            self.written = self.native.touched
        else:
            update = self._write()
        return self._sealed(update, origin, kind) if update else None

    def _write(self) -> bytes:
        before, self._before = self._before, {}
        lanes = self.lanes
        slots: dict[str, Slot | None] = {}
        for path, slot in before.items():
            now = lanes.own_slot(path)
            if now != slot:
                slots[path] = now
        self.written = list(slots)
        drops = lanes.settle(SETTLED_PER_CHANGE, before) if lanes.settled else []
        if len(lanes.tended) > 1:
            lanes.look_at(slots)
        return lanes.write(slots, drops) if slots or drops else b""

    def _sealed(self, update: bytes, origin: Origin | None, kind: int) -> Change:
        seq = self.version.get(self.writer, 0) + 1
        deps = {writer: at for writer, at in self.heads.items() if writer != self.writer}
        stamp = self._open_stamp or self._clock.issue(self._wall())
        self._open_stamp = 0
        origin = origin._replace(agent=self.agent) if origin else Origin(self.agent)
        dot = Dot(self.writer, seq)
        change = encode_change(self.name, dot, deps, stamp, kind, self.shared, update, origin)
        self._deliver(change)
        return change

    def adopt(self, writer: int) -> None:
        """Look after the lane of a closed *writer* from now on (L6): what is settled in it is
        dropped with what is settled in the own one. Only right once all its changes are
        delivered."""
        self.lanes.adopt(writer)

    def reset(self, writer: int) -> dict[str, Slot]:
        """Empty the document, to be loaded anew by `writer`; return the own slots as they were.

        Views stay valid, and so do the handles of native root types.
        """
        own = self.own_slots(self.writer)
        self.lanes.close()
        self.is_broken = False
        self.writer = writer
        self.version, self.heads, self.stamp = Version(), {}, 0
        self._before, self._open_kind, self._open_stamp = {}, WRITE, 0
        self.lanes = Lanes(writer)
        if self.native is not None:
            self.native.reset(writer)
        return own

    def own_slots(self, writer: int) -> dict[str, Slot]:
        """The slots of *writer*'s lane by path, those of the open change included."""
        return {
            container + SEPARATOR + key: cell[writer]
            for container, cells in self.lanes.containers.items()
            for key, cell in cells.cells.items()
            if writer in cell
        }

    def rewrite(self, wanted: Mapping[str, Slot], lane: int) -> None:
        """Write again what *wanted* says and the loaded *lane* does not: the values that its
        writer had written and that the store, or the mesh, does not know of."""
        loaded = self.own_slots(lane)
        for path in sorted(wanted.keys() | loaded.keys()):
            want, have = wanted.get(path), loaded.get(path)
            if want == have:
                continue
            container, _, key = path.partition(SEPARATOR)
            if container.startswith("c"):
                new, old = (totals(slot) if slot else (0, 0) for slot in (want, have))
                self.count(container, max(0, new[0] - old[0]), max(0, new[1] - old[1]))
            else:
                self.put(container, key, want.value if want else None)

    # Replicating

    def is_ready(self, change: Change) -> bool:
        """Whether everything *change* builds on has been delivered (L5)."""
        version = self.version
        if version.get(change.writer, 0) != change.seq - 1:
            return False
        return all(version.get(writer, 0) >= seq for writer, seq in change.deps)

    def apply(self, change: Change) -> list[str]:
        """Take in a change of another writer that `is_ready`; return the paths that changed.

        Raises:
            InvalidUpdate: The change breaks the rules; nothing changed.
            EngineFailure: pycrdt failed; the document must be rebuilt.
        """
        assert self.is_ready(change), f"{change!r} is not ready"
        assert not self.is_broken, f"{self.name!r} must be rebuilt first"
        if change.shared != self.shared:
            raise InvalidUpdate(f"{change!r} is for a document of the other type")
        touched = self._apply(change)
        if self._before:
            # What is open is not in the lane yet; it is judged when it has been sealed (L3).
            self.lanes.settled.update(
                ((self.writer, path), None) for path in touched if path in self._before
            )
        self._deliver(change)
        return touched

    def _apply(self, change: Change) -> list[str]:
        plan = None
        if self.native is None:
            plan = self.lanes.check(
                change.update, change.writer, change.seq, self.version, self._before
            )
        try:
            if self.native is not None:
                return self.native.apply(change.update, change.writer)
            assert plan is not None
            with self._open_kept(path for writer, path in plan.drops if writer == self.writer):
                return self.lanes.apply(change.update, plan)
        except CRDTStateError:
            raise
        except BaseException as exc:
            # pycrdt's PanicException is a BaseException, and whatever came out, the Doc may be
            # half changed. Those that are not pycrdt's have nothing to do here.
            if isinstance(exc, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            self.is_broken = True
            raise EngineFailure(f"{change!r}: {type(exc).__name__}: {exc}") from exc

    def _deliver(self, change: Change) -> None:
        """Count *change* as taken in."""
        heads = self.heads
        for dep in change.deps:
            if heads.get(dep.writer, SEQ_MAX + 1) <= dep.seq:
                del heads[dep.writer]
        heads[change.writer] = change.seq
        self.version[change.writer] = change.seq
        self.stamp = max(self.stamp, change.stamp)
        if change.writer not in self.agents:
            self.agents[change.writer] = change.origin.agent

    def snapshot(self) -> Snapshot:
        """The document at exactly its version; the open change is not part of it."""
        assert not self.is_broken, f"{self.name!r} must be rebuilt first"
        return Snapshot(
            self.name,
            self.shared,
            self.version.copy(),
            dict(self.heads),
            self.stamp,
            dict(self.agents),
            self.engine.state(),
        )

    def join(self, snapshot: Snapshot) -> list[str]:
        """Take in everything *snapshot* has and keep everything here; return the paths that may
        have changed. The open change stays open.

        Raises:
            InvalidUpdate: The snapshot breaks the rules; nothing changed.
            EngineFailure: pycrdt failed; the document must be rebuilt.
        """
        assert not self.is_broken, f"{self.name!r} must be rebuilt first"
        if snapshot.shared != self.shared:
            raise InvalidUpdate(f"a snapshot of {self.name!r} of the other type")
        theirs, mine = snapshot.version, self.version
        if theirs <= mine:
            return []
        state = snapshot.state
        if not mine <= theirs:
            state = self.engine.join(state, lambda w: theirs.get(w, 0) > mine.get(w, 0))
        joined = mine.copy()
        joined.merge(theirs)
        touched = self._load(state, joined)
        self._join_heads(snapshot)
        mine.merge(theirs)
        self.stamp = max(self.stamp, snapshot.stamp)
        self.agents = {**snapshot.agents, **self.agents}
        return touched

    def _load(self, state: bytes, version: Version) -> list[str]:
        before = self.lanes.containers
        try:
            if self.native is not None:
                return self.native.load(state)
            with self._open_kept(list(self._before)):
                self.lanes.load(state, version)
        except CRDTStateError:
            raise
        except BaseException as exc:
            if isinstance(exc, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            self.is_broken = True
            raise EngineFailure(f"a snapshot of {self.name}: {exc}") from exc
        return list(_differing(before, self.lanes))

    @contextmanager
    def _open_kept(self, paths: Iterable[str]) -> Iterator[None]:
        """Let the own lane change beneath open writes at *paths*; they stay as they are."""
        lanes = self.lanes
        slots = {path: lanes.own_slot(path) for path in paths if path in self._before}
        yield
        for path, slot in slots.items():
            self._before[path] = lanes.own_slot(path)
            lanes.set_own(path, slot)
            lanes.settled[self.writer, path] = None

    def _join_heads(self, snapshot: Snapshot) -> None:
        theirs, mine = snapshot.heads, self.heads
        version = self.version
        heads = {
            w: s for w, s in mine.items() if theirs.get(w) == s or s > snapshot.version.get(w, 0)
        }
        for writer, seq in theirs.items():
            if mine.get(writer) == seq or seq > version.get(writer, 0):
                heads[writer] = max(seq, heads.get(writer, 0))
        self.heads = heads


def _differing(before: Mapping[str, Any], lanes: Lanes) -> Iterator[str]:
    """The paths whose cells differ between an older index and the one of *lanes*."""
    for name in before.keys() | lanes.containers.keys():
        old = before[name].cells if name in before else {}
        new = lanes.container(name).cells
        for key in old.keys() | new.keys():
            if old.get(key) != new.get(key):
                yield name + SEPARATOR + key


def check_name(name: object, what: str) -> str:
    """Return *name* if it can name a document or view.

    Raises:
        UnsupportedValue: It is not a string of 1 to 200 characters without control characters.
    """
    if type(name) is not str or not 0 < len(name) <= NAME_CHARS_MAX:
        raise UnsupportedValue(repr(name)[:80], f"{what} has 1 to {NAME_CHARS_MAX} characters")
    if not name.isprintable():
        raise UnsupportedValue(repr(name)[:80], f"{what} has printable characters only")
    return name


def check_key(key: object, where: str) -> str:
    """Return *key* if it can be a map's key.

    Raises:
        UnsupportedValue: It is not a string, too long, or not valid Unicode.
    """
    if type(key) is not str:
        raise UnsupportedValue(f"{where}[{key!r}]", f"keys are str, not {type(key).__name__}")
    if len(key) > KEY_BYTES_MAX or not key.isascii():
        try:
            size = len(key.encode())
        except UnicodeEncodeError as exc:
            raise UnsupportedValue(f"{where}[{key!r}]", f"not valid Unicode: {exc}") from exc
        if size > KEY_BYTES_MAX:
            short = f"{where}[{key[:40]!r}...]"
            raise UnsupportedValue(short, f"a key of {size} bytes; {KEY_BYTES_MAX} is the limit")
    return key
