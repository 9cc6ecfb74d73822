"""
The views: maps, counters, registers and sets, as plain Python objects over a document's cells.

A view holds no state, only a document and the name of a *container*: the kind's letter and the
view's name. Reading looks at the cells of that container, writing puts a slot into the own lane.

    Map        a `MutableMapping` with a cell for each key
    Register   one cell
    Set        a `MutableSet` with a cell for each element; a concurrent add wins over a remove
               (observed-remove set: Shapiro et al., "A comprehensive study of CRDTs", 2011)
    Counter    one cell in which every lane keeps its own totals; the value is their sum
               (PN-counter, ibid.)

Where several live values meet, maps and registers read what the view's strategy makes of them
(see `conflict`); the values stay until somebody writes over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, MutableSet
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from crdtstate.change import RESOLUTION
from crdtstate.conflict import Candidate, Explanation, explain
from crdtstate.errors import UnsupportedValue, UsageError
from crdtstate.slots import Cell, candidates, is_conflict, totals
from crdtstate.values import pack, pack_key, unpack, unpack_key

if TYPE_CHECKING:
    from crdtstate.document import Document

STRATEGIES = "@strategies"
"""The container in which a document keeps the names of its views' strategies: by container, or for
a map's keys with a prefix by container, `SEPARATOR` and prefix. An empty name is none."""

_EMPTY: dict[str, Cell] = {}
_PRESENT = pack(True, "set")
_MISSING = object()


class Strong(Protocol):
    """What reads and writes over a quorum; the replica."""

    async def read_strong(
        self, document: Document, container: str, key: str, timeout: float | None
    ) -> bytes | None:
        """Return the packed value at a path, or None."""

    async def write_strong(
        self, document: Document, container: str, key: str, value: bytes, timeout: float | None
    ) -> None:
        """Write the packed *value* at a path."""


class View:
    """What all views share."""

    kind = ""

    def __init__(self, document: Document, name: str) -> None:
        self._document = document
        self._name = name
        self._container = self.kind + name

    @property
    def name(self) -> str:
        return self._name

    @property
    def _cells(self) -> dict[str, Cell]:
        # Looked up each time: a snapshot replaces the containers.
        container = self._document.lanes.containers.get(self._container)
        return _EMPTY if container is None else container.cells

    def _where(self, key: str) -> str:
        return f"{self._name}[{key!r}]"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name} in {self._document.name}>"


class _Choosing(View):
    """A view in which values can conflict."""

    @property
    def strategy(self) -> str:
        """The name of the rule that decides where values conflict; replicated."""
        return self._document.strategy(self._container)

    def _candidates(self, cell: Cell) -> list[Candidate]:
        return self._document.candidates(cell)

    def _decide(self, key: str) -> partial[Any]:
        return partial(self._document.decide, self._container, key)

    def _read(self, key: str) -> Any:
        """The value of a cell, or `_MISSING`."""
        cell = self._cells.get(key)
        if cell is None:
            return _MISSING
        if len(cell) == 1:
            for slot in cell.values():
                return _MISSING if slot.value is None else unpack(slot.value)
        found = candidates(cell)
        if len(found) <= 1:
            return unpack(found[0][1].value or b"") if found else _MISSING
        return self._document.decide(self._container, key, self._candidates(cell)).value

    def live(self, key: str) -> list[Candidate]:
        """All live values of a cell, oldest first, whether they differ or not."""
        return self._candidates(self._cells.get(key, {}))

    def candidates_of(self, key: str) -> list[Candidate]:
        """The candidates of a cell if they differ, oldest first; else nothing."""
        cell = self._cells.get(key, {})
        return self._candidates(cell) if is_conflict(cell) else []

    @property
    def _strong(self) -> Strong:
        if self._document.strong is None:
            raise UsageError("strong reads and writes need an open Replica")
        return self._document.strong

    async def _get_strong(self, key: str, timeout: float | None) -> Any:
        found = await self._strong.read_strong(self._document, self._container, key, timeout)
        return None if found is None else unpack(found)

    async def _set_strong(self, key: str, value: Any, where: str, timeout: float | None) -> None:
        packed = pack(value, where)
        document = self._document
        await self._strong.write_strong(document, self._container, key, packed, timeout)

    def _explain(self, key: str, where: str) -> Explanation:
        earlier = self._document.earlier(self._container, key)
        return explain(where, self.live(key), self._decide(key), earlier)

    def _resolve(self, key: str, value: Any, where: str) -> None:
        self._document.put(self._container, key, pack(value, where), kind=RESOLUTION)


class Map(_Choosing, MutableMapping[str, Any]):
    """A replicated dict: ``str`` keys, any packable values.

    Reads give fresh copies: changing a list that was read changes nothing until it is assigned.
    ``len`` and iteration cost in proportion to the map, everything else to the key.
    """

    kind = "m"

    def __getitem__(self, key: str) -> Any:
        value = self._read(key)
        if value is _MISSING:
            raise KeyError(key)
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        """Raises UnsupportedValue, naming the part that cannot be shared; nothing changed."""
        document = self._document
        document.check_key(key, self._name)
        document.put(self._container, key, pack(value, self._where(key)))

    async def get_strong(self, key: str, *, timeout: float | None = 5.0) -> Any:
        """The value that a linearizable read finds, None if there is none: at least what every
        strong write has written that completed before, wherever that was, and every strong read
        has read. Of values written at the same time it is the last one, whatever the strategy.

        Raises:
            QuorumLost: A majority of `Config.voters` did not answer within *timeout* seconds.
            UsageError: There are no voters.
        """
        return await self._get_strong(key, timeout)

    async def set_strong(self, key: str, value: Any, *, timeout: float | None = 5.0) -> None:
        """Write so that every strong read that begins afterwards finds this or something newer,
        and a majority of `Config.voters` has it on disk. There is no compare-and-set: of two
        writes at the same time both succeed. A key that is written strongly should only be.

        Raises:
            QuorumLost: A majority did not answer within *timeout* seconds; its `unknown` says
                whether it may have been written nevertheless.
            UsageError, UnsupportedValue: It cannot be; nothing changed.
        """
        self._document.check_key(key, self._name)
        await self._set_strong(key, value, self._where(key), timeout)

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self._document.put(self._container, key, None)

    def __contains__(self, key: object) -> bool:
        container = self._document.lanes.containers.get(self._container)
        return container is not None and key in container.cells and key not in container.dead

    def __iter__(self) -> Iterator[str]:
        container = self._document.lanes.containers.get(self._container)
        return iter(()) if container is None else iter(list(container.keys()))

    def __len__(self) -> int:
        container = self._document.lanes.containers.get(self._container)
        return 0 if container is None else len(container)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set several keys: all of them, or on an error none."""
        items = dict(*args, **kwargs)
        packed = {
            self._document.check_key(key, self._name): pack(value, self._where(key))
            for key, value in items.items()
        }
        for key, data in packed.items():
            self._document.put(self._container, key, data)

    def conflicts(self) -> dict[str, list[Candidate]]:
        """The keys with several different live values, and these, oldest first."""
        container = self._document.lanes.containers.get(self._container)
        contested = sorted(container.contested) if container is not None else []
        return {key: found for key in contested if (found := self.candidates_of(key))}

    def use_strategy(self, name: str | None, *, prefix: str = "") -> None:
        """Let the strategy *name* decide conflicts from now on, on all replicas.

        It changes what is read, at once and also where values conflict already; nothing is
        written over. With a *prefix* it is for the keys that begin so, such as
        ``use_strategy("max", prefix="score/")``; of several prefixes, the longest counts. None
        takes it back: then the next shorter prefix counts, or the map's own, or ``"lww"``.

        Raises:
            UnknownStrategy: There is none of this name in this process.
            UnsupportedValue: *prefix* cannot begin a key, or is too long.
        """
        self._document.use_strategy(self._container, name, prefix)

    def strategy_of(self, key: str) -> str:
        """The name of the strategy that decides conflicts at *key*."""
        return self._document.strategy(self._container, key)

    def strategies(self) -> dict[str, str]:
        """The strategies by prefix; that of the whole map, if it was set, by the empty one."""
        return self._document.strategies(self._container)

    def explain(self, key: str) -> Explanation:
        """Who wrote what at *key*, what is chosen, by which rule and votes, and what earlier
        conflicts there came to."""
        return self._explain(key, self._where(key))

    def resolve(self, key: str, value: Any) -> None:
        """Write *value* over all candidates of *key*, marked as a resolution."""
        self._document.check_key(key, self._name)
        self._resolve(key, value, self._where(key))

    def __repr__(self) -> str:
        return f"<Map {self._name} in {self._document.name}: {len(self)} keys>"


class Register(_Choosing):
    """One replicated value; None until somebody sets it."""

    kind = "r"

    @property
    def value(self) -> Any:
        value = self._read("")
        return None if value is _MISSING else value

    @value.setter
    def value(self, value: Any) -> None:
        self._document.put(self._container, "", pack(value, self._name))

    async def get_strong(self, *, timeout: float | None = 5.0) -> Any:
        """See `Map.get_strong`."""
        return await self._get_strong("", timeout)

    async def set_strong(self, value: Any, *, timeout: float | None = 5.0) -> None:
        """See `Map.set_strong`."""
        await self._set_strong("", value, self._name, timeout)

    @property
    def is_set(self) -> bool:
        """Whether it holds a value (which may be None)."""
        return bool(candidates(self._cells.get("", {})))

    def clear(self) -> None:
        """Remove the value."""
        if self.is_set:
            self._document.put(self._container, "", None)

    def conflicts(self) -> list[Candidate]:
        """The live values if there are several different ones, oldest first; else nothing."""
        return self.candidates_of("")

    def use_strategy(self, name: str | None) -> None:
        """Let the strategy *name* decide conflicts; see `Map.use_strategy`."""
        self._document.use_strategy(self._container, name)

    def explain(self) -> Explanation:
        """Who wrote what, what is chosen, by which rule and votes, and what earlier conflicts
        came to."""
        return self._explain("", self._name)

    def resolve(self, value: Any) -> None:
        """Write *value* over all candidates, marked as a resolution."""
        self._resolve("", value, self._name)

    def __repr__(self) -> str:
        return f"<Register {self._name} in {self._document.name}: {self.value!r}>"


class Counter(View):
    """A replicated whole number. Concurrent increments and decrements all count."""

    kind = "c"

    @property
    def value(self) -> int:
        counted = (totals(slot) for slot in self._cells.get("", {}).values())
        return sum(up - down for up, down in counted)

    def increment(self, by: int = 1) -> None:
        """Add *by*, a whole number of either sign.

        Raises:
            UnsupportedValue: *by* is not an int. Count money in cents, time in microseconds.
        """
        if type(by) is not int:
            raise UnsupportedValue(self._name, f"counters count in int, not {type(by).__name__}")
        if by:
            self._document.count(self._container, max(by, 0), max(-by, 0))

    def decrement(self, by: int = 1) -> None:
        """Subtract *by*."""
        if type(by) is not int:
            raise UnsupportedValue(self._name, f"counters count in int, not {type(by).__name__}")
        self.increment(-by)

    def __int__(self) -> int:
        return self.value

    def __index__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"<Counter {self._name} in {self._document.name}: {self.value}>"


class Set(View, MutableSet[Any]):
    """A replicated set of hashable packable values. A concurrent add wins over a remove."""

    kind = "s"

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> set[Any]:
        # What ``&``, ``|`` and ``-`` give is a plain set: it belongs to no document.
        return set(it)

    def add(self, value: Any) -> None:
        """Add *value*; also if it is there, so that a concurrent remove does not win."""
        self._document.put(self._container, pack_key(value, self._name), _PRESENT)

    def discard(self, value: Any) -> None:
        """Remove *value* if it is there."""
        key = pack_key(value, self._name)
        if self._has(key):
            self._document.put(self._container, key, None)

    def update(self, values: Iterable[Any]) -> None:
        """Add all of *values*: all of them, or on an error none."""
        for key in [pack_key(value, self._name) for value in values]:
            self._document.put(self._container, key, _PRESENT)

    def _has(self, key: str) -> bool:
        container = self._document.lanes.containers.get(self._container)
        return container is not None and key in container.cells and key not in container.dead

    def __contains__(self, value: object) -> bool:
        try:
            return self._has(pack_key(value, self._name))
        except UsageError:
            return False

    def __iter__(self) -> Iterator[Any]:
        container = self._document.lanes.containers.get(self._container)
        keys = [] if container is None else list(container.keys())
        return map(unpack_key, keys)

    def __len__(self) -> int:
        container = self._document.lanes.containers.get(self._container)
        return 0 if container is None else len(container)

    def __repr__(self) -> str:
        return f"<Set {self._name} in {self._document.name}: {len(self)} elements>"
