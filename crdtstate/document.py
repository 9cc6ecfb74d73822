"""
A document: one replicated unit of state, and the changes that carry it from replica to replica.

Plain writes collect in an *open change* that reads already see. Sealing it writes one transaction
to the engine and yields a `Change`: the dot (writer, seq), the heads of the history it builds on,
a stamp, the Yjs update, and where it came from. Applying changes of others in causal order (L5 of
`lanes`) and sealing own ones is all that ever alters a document; a `Snapshot` carries the sum of
them at exactly one version.

The *engine* holds the content: `lanes.Lanes` for maps, counters, registers and sets, or
`native.Native` for the Yjs types of a document opened with ``shared=True``.

A document can have *rules* (`rules`). What they refuse of others is delivered all the same, and
hidden (`hiding`); what they refuse of own writes raises when it is written, or when the transaction
ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from crdtstate.change import (
    CHANGE_BYTES_MAX,
    ID_BYTES,
    NAME_CHARS_MAX,
    RESOLUTION,
    TIDY,
    WRITE,
    Change,
    Origin,
    Prover,
    Snapshot,
    encode_change,
)
from crdtstate.clock import SEQ_MAX, STAMP_MAX, Dot, HybridClock, Stamp, Version
from crdtstate.conflict import (
    DEFAULT_STRATEGY,
    VOTE,
    Candidate,
    Conflict,
    Decision,
    Resolution,
    decide,
    resolver,
    same,
)
from crdtstate.crdts import STRATEGIES, Counter, Map, Register, Set, Strong
from crdtstate.enforcement import Enforcement
from crdtstate.errors import (
    CRDTStateError,
    Forked,
    InvalidUpdate,
    UnknownValidator,
    UnsupportedValue,
    UsageError,
)
from crdtstate.hiding import Ceiling, Hiding, Refusal
from crdtstate.lanes import Lanes
from crdtstate.native import Array, Native, Text, YMap
from crdtstate.rules import (
    NUMBER_MAX,
    ON,
    QUOTA,
    VALIDATOR,
    Quota,
    Rules,
    Use,
    rules_of,
    write_quota,
)
from crdtstate.slots import (
    NO_COVERS,
    SEPARATOR,
    Cell,
    Container,
    Slot,
    candidates,
    covering,
    is_conflict,
    totals,
)
from crdtstate.validators import is_known, known_validators
from crdtstate.values import pack, unpack
from crdtstate.withholding import Withholding

if TYPE_CHECKING:
    from crdtstate.audit import Record
    from crdtstate.lanes import Plan
    from crdtstate.votes import Polls

PATH_BYTES_MAX = 1000
"""Bytes of a view's name and a key together, in UTF-8: a little less than the guard admits."""

KEY_BYTES_MAX = 800
"""Bytes of a map's key in UTF-8."""

CHANGE_BYTES_GOAL = 128 * 1024
CHANGE_PATHS_GOAL = 1024
"""Where plain writes are sealed without waiting for the end of the loop turn."""

CHANGE_PATHS_MAX = 20_000
"""Paths that one transaction may write."""

JUDGED_PATHS_GOAL = 64
"""The same for paths in a document with rules: with each write, all that is open is judged."""

SETTLED_PER_CHANGE = 500
"""Slots dropped per change because others cover them; bounds the length of a change."""


class EngineFailure(Exception):
    """pycrdt failed on a checked update. The document's Doc is beyond use and must be rebuilt
    from the store without this change; reads go on, from the index."""


class Witness(Protocol):
    """Knows what pycrdt is given, for who finds the process dead."""

    def begin(self, id: bytes, document: str, writer: int, seq: int) -> None:
        """pycrdt is given a change; or a snapshot, whose writer and seq are 0. Raises InvalidUpdate
        if it must not be."""

    def end(self, id: bytes) -> None:
        """It has taken or refused it."""


class Delivery(NamedTuple):
    """What was just taken in.

    Attributes:
        change: The change; None for a snapshot.
        paths: What it wrote.
        resolutions: What that resolved.
        local: Whether it was sealed here.
        refused: The changes in it that the document's rules refuse, with their dots.
    """

    document: Document
    change: Change | None
    paths: list[str]
    resolutions: list[Resolution]
    local: bool
    refused: Sequence[tuple[Dot, Refusal]] = ()


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
        # Who writes which lane: by name, and in a signed mesh by their cards.
        self.agents: dict[int, str] = {}
        self.cards: dict[int, bytes] = {}
        # The id of each writer's newest change.
        self.ids: dict[int, bytes] = {}
        # Proves own changes, if the mesh asks for that.
        self.prover: Prover | None = None
        # The highest stamp delivered.
        self.stamp = 0
        self.lanes = Lanes(writer)
        self.native = Native(writer, self._native_written) if shared else None
        # The engine failed; nothing can be taken in before the document is rebuilt.
        self.is_broken = False
        # Reads and writes over a quorum, where there is one.
        self.strong: Strong | None = None
        # The votes, where there is a set of documents.
        self.polls: Polls | None = None
        # The resolutions at a path (container, key) that an audit remembers.
        self.recall: Callable[[str, str], tuple[Record, ...]] | None = None
        # Told of all that pycrdt is given.
        self.witness: Witness | None = None
        # Called after each change, own ones too, with what it wrote and what that resolved; and
        # after a snapshot.
        self.on_delivered: Callable[[Delivery], None] | None = None
        # Whether a writer with this card, see `Change.card`, may set rules here.
        self.may_rule: Callable[[int, bytes], bool] = lambda writer, card: True
        # Whether a transaction is open, at whose end what is written is judged.
        self.is_grouped: Callable[[], bool] = lambda: False
        # What the document admits, as it says itself.
        self.rules = Rules()
        # Whether changes are admitted that cannot be judged here: only by who tells nobody.
        self.admits_unjudged = False
        self._withholding = Withholding(self)
        self._enforcement = Enforcement(self, self._withholding, on_write)
        self._clock = clock
        self._wall = wall
        self._on_write = on_write
        # The open change: own slots as they were before it, its stamp and size so far.
        self._before: dict[str, Slot | None] = {}
        self._open_stamp = 0
        self._open_bytes = 0
        self._open_kind = WRITE
        # Path -> what conflicted when it was first written over, and whether to resolve that.
        self._met: dict[str, tuple[list[Candidate], bool]] = {}
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
        if strategy is not None:
            self.use_strategy(Map.kind + name, strategy)
        return view

    def register(self, name: str, *, strategy: str | None = None) -> Register:
        """The register *name*. Give *strategy* to set, on all replicas, what decides conflicts."""
        view = Register(self, self._view_name(name, "register"))
        if strategy is not None:
            self.use_strategy(Register.kind + name, strategy)
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

    # Conflicts

    def strategy(self, container: str, key: str = "") -> str:
        """The name of the strategy of a view, given by kind letter and name, or at a key of it."""
        if not (names := self._strategies()):
            return DEFAULT_STRATEGY
        for length in range(len(key), 0, -1):
            if name := _newest_name(names.get(container + SEPARATOR + key[:length])):
                return name
        return _newest_name(names.get(container)) or DEFAULT_STRATEGY

    def strategies(self, container: str) -> dict[str, str]:
        """The names of the strategies of a view, by prefix."""
        found: dict[str, str] = {}
        for place, cell in sorted(self._strategies().items()):
            whose, _, prefix = place.partition(SEPARATOR)
            if whose == container and (name := _newest_name(cell)):
                found[prefix] = name
        return found

    # Rules

    def validators(self) -> tuple[str, ...]:
        """The validators that this document uses, by name."""
        return self.rules.now.validators

    def use_validator(self, name: str) -> None:
        """Let the validator *name* judge all changes from now on, on all replicas: those that
        build on this one. See `validators`.

        Raises:
            UnknownValidator: There is none of this name in this process.
            UsageError: Inside a transaction, or in a document of native types or of the system.
        """
        if not is_known(name):
            raise UnknownValidator(name, self.name, known_validators())
        self._enforcement.set_rule(VALIDATOR + name, ON)

    def drop_validator(self, name: str) -> None:
        """Let the validator *name* judge no more. What it has refused stays so, until released."""
        if name in self.validators():
            self._enforcement.set_rule(VALIDATOR + name, "")

    @property
    def quota(self) -> Quota:
        """How much one writer may have here."""
        return self.rules.now.quota

    def limit(self, *, bytes: int | None = None, keys: int | None = None) -> None:
        """Let no writer have more than so much in this document, on all replicas, in changes that
        build on this one: bytes of names, keys and packed values, and places that hold a value.
        None: as much as it likes. A place counts for who wrote it last.

        Raises:
            UsageError: The numbers cannot be; or see `use_validator`.
        """
        for number in (bytes, keys):
            if number is not None and (type(number) is not int or not 0 <= number <= NUMBER_MAX):
                raise UsageError(f"a limit is a number of at least 0, or None, not {number!r}")
        wanted = Quota(bytes, keys)
        if wanted != self.quota:
            self._enforcement.set_rule(QUOTA, write_quota(wanted))

    def usage(self) -> Use:
        """How much this replica's writer has here, as `limit` counts."""
        return self.lanes.use(self.writer)

    def admit_open(self, origin: Origin) -> None:
        """Judge the open change, as one that *origin* makes.

        Raises:
            ChangeRefused: The rules refuse it.
            UnknownValidator: It cannot be judged here.
        """
        self._enforcement.admit_open(origin, self._open_kind)

    def _admit_write(self, path: str, slot: Slot, kind: int) -> None:
        self._enforcement.admit_write(path, slot, kind or self._open_kind)

    # Hiding

    @property
    def hiding(self) -> Hiding:
        """What of this document is hidden."""
        return self.lanes.hiding

    def hide(self, writer: int, ceiling: Ceiling | None) -> list[str]:
        """Hide all changes of *writer* above a seq, whether they are here or still come; 0 hides
        its whole lane, None shows all of it again. Returns the paths that read differently."""
        return self._withholding.hide(writer, ceiling)

    def release(self, dots: Iterable[Dot]) -> list[str]:
        """Show what the rules refused in the changes *dots*, and in no others. Returns the paths
        that read differently."""
        return self._withholding.release(dots)

    def withheld(self) -> list[tuple[Dot, Refusal]]:
        """The changes that the rules refused and nobody has released, as far as they stand, oldest
        first."""
        return self._withholding.withheld()

    def counted(self, writer: int) -> dict[str, int]:
        """What the lane of *writer* counts in each counter, without what was refused: what a
        `Ceiling` at its present seq is to say."""
        return self._withholding.counted(writer)

    def use_strategy(self, container: str, name: str | None, prefix: str = "") -> None:
        """See `Map.use_strategy`."""
        if name is not None:
            resolver(name)
        check_key(prefix, container[1:])
        place = container + SEPARATOR + prefix if prefix else container
        if len((STRATEGIES + SEPARATOR + place).encode()) > PATH_BYTES_MAX:
            raise UnsupportedValue(f"{container[1:]}[{prefix[:40]!r}...]", "too long for a prefix")
        default = "" if prefix else DEFAULT_STRATEGY
        present = _newest_name(self._strategies().get(place))
        if (name or default) != (present or default):
            self.put(STRATEGIES, place, pack(name or "", "strategy"))

    def _strategies(self) -> Mapping[str, Cell]:
        found = self.lanes.containers.get(STRATEGIES)
        return found.cells if found is not None else {}

    def candidates(self, cell: Cell) -> list[Candidate]:
        """The live values of a cell, oldest first."""
        agents = self.agents
        # Who has sealed nothing yet is not among them.
        names = {self.writer: self.agent} if self.writer not in agents else {}
        return [
            Candidate(
                unpack(slot.value or b""),
                writer,
                agents.get(writer) or names.get(writer, ""),
                Stamp(slot.stamp),
                slot.seq,
            )
            for writer, slot in candidates(cell)
        ]

    def live_dots(self, container: str, key: str) -> frozenset[Dot]:
        """The changes that wrote the live values at a path."""
        cells = self.lanes.containers.get(container)
        cell = cells.cells.get(key, {}) if cells is not None else {}
        return frozenset(Dot(writer, slot.seq) for writer, slot in candidates(cell))

    def decide(self, container: str, key: str, found: Sequence[Candidate]) -> Decision:
        """What the strategy at a path makes of several candidates, oldest first.

        Raises:
            UnknownStrategy: It is not registered in this process.
        """
        strategy = self.strategy(container, key)
        if strategy == VOTE and self.polls is not None:
            return self.polls.decide(self.name, container, key, found)
        return decide(strategy, found)

    def conflict(self, container: str, key: str) -> Conflict | None:
        """The open conflict at a path, if there is one."""
        cells = self.lanes.containers.get(container)
        cell = cells.cells.get(key) if cells is not None else None
        if cell is None or container[0] not in _KINDS or not is_conflict(cell):
            return None
        return self._conflict(container, key, self.candidates(cell))

    def _conflict(self, container: str, key: str, found: Sequence[Candidate]) -> Conflict:
        try:
            decision = self.decide(container, key, found)
        except Exception:
            # The user's own function, or one that is registered elsewhere only.
            decision = Decision(None, "unknown")
        place = (self.name, _KINDS[container[0]], container[1:], key)
        strategy = self.strategy(container, key)
        value, rule, votes = decision
        return Conflict(*place, tuple(found), value, rule, strategy, votes)

    def conflicts(self) -> list[Conflict]:
        """The open conflicts of all views, by view and key."""
        return [
            found
            for container, cells in sorted(self.lanes.containers.items())
            for key in sorted(cells.contested)
            if (found := self.conflict(container, key)) is not None
        ]

    def earlier(self, container: str, key: str) -> tuple[Record, ...]:
        """The resolutions at a path that an audit remembers, oldest first."""
        return self.recall(container, key) if self.recall is not None else ()

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
    def unsealed(self) -> Mapping[str, Slot | None]:
        """The paths of the open change, each with the own slot as it was before it."""
        return self._before

    @property
    def needs_tidying(self) -> bool:
        """Whether there may be slots here to drop because others cover them (L3)."""
        return bool(self.lanes.settled)

    # Writing

    def put(self, container: str, key: str, value: bytes | None, *, kind: int = WRITE) -> None:
        """Write the packed *value* (None: remove) at a path; reads see it at once. *kind* is
        `RESOLUTION` if that resolves a conflict, which the open change then is."""
        path = container + SEPARATOR + key
        if len(path) * 4 > PATH_BYTES_MAX and (size := len(path.encode())) > PATH_BYTES_MAX:
            where = f"{container[1:41]}...[{key[:40]!r}...]"
            reason = f"name and key have {size} bytes together; {PATH_BYTES_MAX} is the limit"
            raise UnsupportedValue(where, reason)
        lanes = self.lanes
        cells = lanes.container(container)
        cell = cells.cells.get(key)
        covers = covering(cell, self.writer) if cell else NO_COVERS
        seq = self.version.get(self.writer, 0) + 1
        if self.rules.said:
            self._admit_write(path, Slot(value, seq, 0, covers), kind)
        own = cell.get(self.writer) if cell else None
        is_plain = lanes.is_plain
        if not is_plain:
            own = lanes.own_slot(path)
        self._open(path, own, (len(value) if value is not None else 0) + 14 * len(covers))
        self._open_kind = kind or self._open_kind
        if covers and cell and key in cells.contested and container[0] in _KINDS:
            self._meet(path, cell, kind == RESOLUTION)
        slot = None
        # Where there are rules a removal is always said, for them to see it.
        if value is not None or covers or self.rules.said:
            slot = Slot(value, seq, self._open_stamp, covers)
        if is_plain:
            cells.update(key, self.writer, slot)
        else:
            lanes.set_own(path, slot)
        self._check_goal()

    def _meet(self, path: str, cell: Cell, is_meant: bool) -> None:
        """Remember what conflicts at a path that is being written over."""
        met, was_meant = self._met.get(path, ([], False))
        known = {candidate.dot for candidate in met}
        # Not what the open change itself said before.
        known.add(Dot(self.writer, self.version.get(self.writer, 0) + 1))
        met = met + [each for each in self.candidates(cell) if each.dot not in known]
        self._met[path] = sorted(met, key=_by_age), is_meant or was_meant

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
        path = container + SEPARATOR + key
        slot = self.lanes.own_slot(path)
        assert slot is not None, f"{path!r} was written just now"
        if slot.stamp <= top:
            self.lanes.set_own(path, slot._replace(stamp=top + 1))

    def count(self, container: str, up: int, down: int) -> None:
        """Add to this lane's totals of a counter."""
        path = container + SEPARATOR
        cells = self.lanes.container(container)
        own = self.lanes.own_slot(path)
        ups, downs = totals(own) if own else (0, 0)
        value = pack([ups + up, downs + down], "counter")
        seq = self.version.get(self.writer, 0) + 1
        if self.rules:
            self._admit_write(path, Slot(value, seq, 0), WRITE)
        self._open(path, own, len(value))
        slot = Slot(value, seq, self._open_stamp)
        if self.lanes.is_plain:
            cells.update("", self.writer, slot)
        else:
            self.lanes.set_own(path, slot)
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
        goal = JUDGED_PATHS_GOAL if self.rules.said else CHANGE_PATHS_GOAL
        if self._open_bytes > CHANGE_BYTES_GOAL or len(self._before) > goal:
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
                self._met.pop(path, None)
        if not self._before:
            self._open_kind, self._open_stamp = WRITE, 0
        self._enforcement.admitted = None
        if self.native is not None:
            self.native.rollback()

    def seal(self, origin: Origin | None = None) -> Change | None:
        """Turn the open change, and what can be tidied (L3), into a `Change`.

        Returns None if that leaves nothing to say. The caller must journal the change, and only
        then send it.

        Raises:
            UsageError: Native edits that cannot be sent (too large, nested too deep, of another
                type), or writes that are refused by rules that came after them; the document
                reads as before them.
        """
        if self.rules.said and self._before:
            try:
                self.admit_open(origin._replace(agent=self.agent) if origin else Origin(self.agent))
            except UsageError:
                self.rollback()
                raise
        opened, use = self._enforcement.unadmitted()
        self._enforcement.admitted = None
        kind, self._open_kind = (self._open_kind if self.is_open else TIDY), WRITE
        met, self._met = self._met, {}
        if self.native is not None:
            update = self.native.take()
            self.written = self.native.touched
        else:
            update = self._write()
        if not update:
            return None
        change = self._sealed(update, origin, kind)
        refused = self._enforcement.judge_own(change, opened, use) if opened else None
        if self.rules.said or any(path[0] == "@" for path in self.written):
            says = {path: self.lanes.own_slot(path) for path in self.written}
            told = rules_of(says) if refused is None else {}
            self.rules.note(change.dot, change.deps, told)
        if self.on_delivered is not None:
            resolutions = []
            for path in self.written if met else ():
                found, is_meant = met.get(path, ([], False))
                if _differ(found):
                    slot = self.lanes.own_slot(path)
                    resolutions.append(self._resolution(path, found, slot, is_meant, change))
            hidden = [(change.dot, refused)] if refused is not None else []
            self.on_delivered(Delivery(self, change, self.written, resolutions, True, hidden))
        return change

    def _resolution(
        self,
        path: str,
        found: Sequence[Candidate],
        slot: Slot | None,
        is_meant: bool,
        change: Change,
    ) -> Resolution:
        """What the *slot* that *change* wrote makes of the candidates that it *found*."""
        container, _, key = path.partition(SEPARATOR)
        conflict = self._conflict(container, key, found)
        removed = slot is None or slot.value is None
        value = None if slot is None or slot.value is None else unpack(slot.value)
        is_read = not removed and conflict.rule != "unknown" and same(value, conflict.value)
        rule = "resolve" if is_meant else "write"
        if is_read and (conflict.rule == VOTE or not is_meant):
            rule = conflict.rule
        who = change.origin.agent
        return Resolution(conflict, value, removed, rule, who, change.dot, Stamp(change.stamp))

    def _write(self) -> bytes:
        before, self._before = self._before, {}
        lanes = self.lanes
        slots: dict[str, Slot | None] = {}
        for path, slot in before.items():
            now = lanes.own_slot(path)
            if now != slot:
                slots[path] = now
        self.written = list(slots)
        # Where there are rules nobody adopts; see `rules`.
        adopts = not self.rules
        drops = lanes.settle(SETTLED_PER_CHANGE, before, adopts=adopts) if lanes.settled else []
        if len(lanes.tended) > 1:
            lanes.look_at(slots)
        elif self.rules:
            # Removals that cover nothing; see `put`.
            lanes.look_at([path for path, slot in slots.items() if slot and slot.value is None])
        return lanes.write(slots, drops) if slots or drops else b""

    def _sealed(self, update: bytes, origin: Origin | None, kind: int) -> Change:
        seq = self.version.get(self.writer, 0) + 1
        deps = {writer: at for writer, at in self.heads.items() if writer != self.writer}
        stamp = self._open_stamp or self._clock.issue(self._wall())
        self._open_stamp = 0
        origin = origin._replace(agent=self.agent) if origin else Origin(self.agent)
        dot = Dot(self.writer, seq)
        prover = self.prover
        card = prover.card if prover is not None else b""
        change = encode_change(
            self.name,
            dot,
            deps,
            stamp,
            kind,
            self.shared,
            update,
            origin,
            prev=self.ids.get(self.writer, b""),
            card=card if card != self.cards.get(self.writer) else b"",
            prover=prover,
        )
        self._deliver(change)
        return change

    def live_slots(self, writer: int) -> dict[str, Slot]:
        """The values and totals of a lane that nobody has written over, by path."""
        found = {}
        for path, slot in self.lanes.slots(writer).items():
            if path.startswith("c") or writer in dict(candidates(self.lanes.cell(path))):
                found[path] = slot
        return found

    def is_closed(self, writer: int) -> bool:
        """Whether nothing more of a writer is taken in here."""
        return self.version.get(writer, 0) == SEQ_MAX

    def close_lane(self, writer: int) -> None:
        """Take in nothing more of a writer: it counts as delivered to the end, so that nobody waits
        for what builds on it. What is here of it is to be hidden (`hide`)."""
        self.version[writer] = SEQ_MAX
        self.ids[writer] = bytes(ID_BYTES)
        self.heads.pop(writer, None)

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
        self.ids = {}
        self._before, self._open_kind, self._open_stamp = {}, WRITE, 0
        self._met = {}
        self._enforcement.admitted = None
        self.rules = Rules()
        self.lanes = Lanes(writer, self.hiding.emptied())
        if self.native is not None:
            self.native.reset(writer)
        return own

    def own_slots(self, writer: int) -> dict[str, Slot]:
        """The slots of *writer*'s lane by path, those of the open change included."""
        return self.lanes.slots(writer)

    def rewrite(self, wanted: Mapping[str, Slot], lane: int) -> None:
        """Write again what *wanted* says and the loaded *lane* does not: the values that its
        writer had written and that the store, or the mesh, does not know of."""
        loaded = self.own_slots(lane)
        # There is nobody to be told what the rules refuse now, before it is sealed.
        self._enforcement.judges = False
        try:
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
        finally:
            self._enforcement.judges = True

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
            Forked: Its writer has gone on in two ways; nothing changed.
            InvalidUpdate: The change breaks the rules of lanes; nothing changed.
            UnknownValidator: It cannot be told here whether the document admits it; nothing
                changed.
            EngineFailure: pycrdt failed; the document must be rebuilt.
        """
        assert self.is_ready(change), f"{change!r} is not ready"
        if change.prev != self.ids.get(change.writer, b""):
            raise Forked(f"{change!r} does not follow the one before it that is here")
        assert not self.is_broken, f"{self.name!r} must be rebuilt first"
        if change.shared != self.shared:
            raise InvalidUpdate(f"{change!r} is for a document of the other type")
        if self.witness is None:
            touched, met, refused = self._apply(change)
        else:
            self.witness.begin(change.id, self.name, change.writer, change.seq)
            try:
                touched, met, refused = self._apply(change)
            finally:
                self.witness.end(change.id)
        if self._before:
            # What is open is not in the lane yet; it is judged when it has been sealed (L3).
            self.lanes.settled.update(
                ((self.writer, path), None) for path in touched if path in self._before
            )
        self._deliver(change)
        if self.on_delivered is not None:
            is_meant = change.kind == RESOLUTION
            resolutions = [
                self._resolution(path, found, slot, is_meant, change) for path, slot, found in met
            ]
            told = [(change.dot, refused)] if refused is not None else []
            self.on_delivered(Delivery(self, change, touched, resolutions, False, told))
        return touched

    def _apply(self, change: Change) -> tuple[list[str], list[_Met], Refusal | None]:
        plan, refused = None, None
        if self.native is None:
            plan = self.lanes.check(
                change.update, change.writer, change.seq, self.version, self._before
            )
            if self.rules.said or any(put[2][0] == "@" for put in plan.puts):
                refused = self._enforcement.judge(plan, change)
        if refused is not None:
            self.hiding.refuse(change.dot, refused)
            self._withholding.prune_some(change.writer)
            self.lanes.watch()
        try:
            touched, met = self._apply_checked(plan, change)
        except BaseException:
            if refused is not None:
                self.hiding.unrefuse(change.dot)
            raise
        if plan is not None and (self.rules.said or any(put[2][0] == "@" for put in plan.puts)):
            says = {} if refused is not None else rules_of(plan.written(change.seq))
            self.rules.note(change.dot, plan.builds_on(change.deps), says)
        return touched, met, refused

    def _apply_checked(self, plan: Plan | None, change: Change) -> tuple[list[str], list[_Met]]:
        try:
            if self.native is not None:
                return self.native.apply(change.update, change.writer), []
            assert plan is not None
            is_seen = not self.hiding.hides(change.writer, change.seq)
            met = self._met_by(plan) if self.on_delivered is not None and is_seen else []
            with self._open_kept(path for writer, path in plan.drops if writer == self.writer):
                return self.lanes.apply(change.update, plan), met
        except CRDTStateError:
            raise
        except BaseException as exc:
            # pycrdt's PanicException is a BaseException, and whatever came out, the Doc may be
            # half changed. Those that are not pycrdt's have nothing to do here.
            if isinstance(exc, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            self.is_broken = True
            raise EngineFailure(f"{change!r}: {type(exc).__name__}: {exc}") from exc

    def _met_by(self, plan: Plan) -> list[_Met]:
        """What conflicts here and will be written over by a checked change."""
        found: list[_Met] = []
        for _, _, path, slot in plan.puts:
            if not slot.covers or path in plan.moved:
                continue
            container, _, key = path.partition(SEPARATOR)
            cells = self.lanes.containers.get(container)
            if cells is None or key not in cells.contested or container[0] not in _KINDS:
                continue
            live = self.candidates(cells.cells[key])
            covers = {**slot.covers, plan.writer: slot.seq}
            if _differ([each for each in live if covers.get(each.writer, 0) >= each.seq]):
                found.append((path, slot, live))
        return found

    def _deliver(self, change: Change) -> None:
        """Count *change* as taken in."""
        heads = self.heads
        for dep in change.deps:
            if heads.get(dep.writer, SEQ_MAX + 1) <= dep.seq:
                del heads[dep.writer]
        heads[change.writer] = change.seq
        self.version[change.writer] = change.seq
        self.stamp = max(self.stamp, change.stamp)
        self.ids[change.writer] = change.id
        if change.writer not in self.agents:
            self.agents[change.writer] = change.origin.agent
        if change.card:
            self.cards[change.writer] = change.card

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
            dict(self.ids),
            dict(self.cards),
            self._withholding.told(),
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
        before, known = self.lanes.containers, (self.rules, self.hiding)
        rules, hiding = self._withholding.hear(snapshot)
        self.rules, self.lanes.hiding = rules, hiding
        try:
            touched = self._load_witnessed(snapshot, state, joined)
        except BaseException:
            self.rules, self.lanes.hiding = known
            raise
        for writer, seq in theirs.items():
            if seq > mine.get(writer, 0):
                self.ids[writer] = snapshot.ids[writer]
                if writer in snapshot.cards:
                    self.cards[writer] = snapshot.cards[writer]
        self._join_heads(snapshot)
        mine.merge(theirs)
        self.stamp = max(self.stamp, snapshot.stamp)
        self.agents = {**snapshot.agents, **self.agents}
        if self.on_delivered is not None:
            resolutions = list(self._resolved_since(before, snapshot))
            was = dict(known[1].withheld())
            told = [each for each in hiding.withheld() if each[0] not in was]
            self.on_delivered(Delivery(self, None, touched, resolutions, False, told))
        return touched

    def _resolved_since(
        self, before: Mapping[str, Container], snapshot: Snapshot
    ) -> Iterator[Resolution]:
        """What conflicted in an older index and was written over since. By whom is said by what
        stands there now; what was written in between is not known."""
        for container, cells in before.items():
            if container[0] not in _KINDS:
                continue
            for key in cells.contested:
                found, live = self.candidates(cells.cells[key]), self.live_dots(container, key)
                if not _differ([each for each in found if each.dot not in live]):
                    continue
                now = self.lanes.container(container).cells.get(key, {})
                newest = self.candidates(now)[-1:]
                conflict = self._conflict(container, key, found)
                if not newest:
                    nobody, stamp = Dot(0, 0), Stamp(snapshot.stamp)
                    yield Resolution(conflict, None, True, "write", "", nobody, stamp)
                for each in newest:
                    rule = conflict.rule if same(each.value, conflict.value) else "write"
                    who = (each.agent, each.dot, each.stamp)
                    yield Resolution(conflict, each.value, False, rule, *who)

    def _load_witnessed(self, snapshot: Snapshot, state: bytes, version: Version) -> list[str]:
        if self.witness is None:
            return self._load(state, version)
        id = hashlib.blake2b(snapshot.state, digest_size=ID_BYTES).digest()
        self.witness.begin(id, self.name, 0, 0)
        try:
            return self._load(state, version)
        finally:
            self.witness.end(id)

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


_KINDS = {"m": "map", "r": "register"}
"""The views in which values conflict, by their letter."""

_Met = tuple[str, Slot, list[Candidate]]
"""A path, the slot that is written there, and what it found."""


def _by_age(candidate: Candidate) -> tuple[int, int]:
    return candidate.stamp, candidate.writer


def _differ(found: Sequence[Candidate]) -> bool:
    """Whether there are different values."""
    return len(found) > 1 and len({pack(each.value, "candidate") for each in found}) > 1


def _newest_name(cell: Cell | None) -> str | None:
    """The name of a strategy as it stands in a cell, if one does."""
    found = candidates(cell) if cell else []
    return unpack(found[-1][1].value or b"") or None if found else None


def _differing(before: Mapping[str, Any], lanes: Lanes) -> Iterator[str]:
    """The paths whose cells differ between an older index and the one of *lanes*."""
    for name in before.keys() | lanes.containers.keys():
        old = before[name].cells if name in before else {}
        new = lanes.container(name).cells
        if not old:
            prefix = name + SEPARATOR
            yield from [prefix + key for key in new]
            continue
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
