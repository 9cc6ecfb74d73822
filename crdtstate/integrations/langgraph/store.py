"""
LangGraph's long-term store in replicated documents: what one agent remembers, all do.

An item is a key of a map, one for each namespace; so items are merged one by one, and of two writes
of one item at the same time the last one is read and the other one stays visible as a conflict of
that map. Namespaces lie in `BUCKETS` documents, by their first two labels: a search that names two
looks into one of them.

When an item expires stands beside it, so reading one that is refreshed by that writes a few bytes.
An expired item is not read any more, and deleted by `sweep_ttl`.

There are no vectors. A ``query`` is searched for as words (`finding`); ``index`` says in which
fields: of the store ``index={"fields": [...]}``, of an item a list of paths, or False for none. By
default all texts of an item are searched.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from langgraph.store.base import (
    BaseStore,
    GetOp,
    Item,
    ListNamespacesOp,
    Op,
    PutOp,
    Result,
    SearchItem,
    SearchOp,
    TTLConfig,
    get_text_at_path,
    tokenize_path,
    validate_op_namespace,
)

from crdtstate import blocking
from crdtstate.crdts import Map
from crdtstate.document import Document
from crdtstate.errors import CRDTStateError, UsageError
from crdtstate.integrations.langgraph.channel import wall_ms
from crdtstate.integrations.langgraph.finding import matches, matches_namespace, rank, texts_in
from crdtstate.integrations.langgraph.home import Door, Home
from crdtstate.replica import Replica
from crdtstate.values import pack

log = logging.getLogger("crdtstate")

PREFIX = "langgraph-store/"
BUCKETS = 64
"""Documents that namespaces are spread over; never to be changed."""

LABELS_MAX = 64
NAMESPACE_CHARS_MAX = 4000
TTL_MINUTES_MAX = 100 * 366 * 24 * 60

TOGETHER_BYTES = 512 * 1024
"""The items of one batch, up to so much, are written in one change for each document."""

REFRESH_SHARE = 0.01
"""The part of its time to live by which a read has to prolong an item to be worth a write."""

_NAME_CHARS_MAX = 150


class Stored(NamedTuple):
    """An item as it is stored.

    Attributes:
        searched: Where queries look: None as the store says, False nowhere, or paths.
        namespace: If the map's name does not say it.
    """

    created_ms: int
    updated_ms: int
    searched: list[str] | bool | None
    value: dict[str, Any]
    namespace: list[str] | None


class CrdtStore(Door, BaseStore):
    """A store: ``builder.compile(store=CrdtStore(saver))``.

    Its ``a...`` methods can be awaited on any loop; the others are for threads that run none, or
    another one than the replica's.

    Args:
        replica: An open `Replica`, on its loop, or `blocking.Replica`; or a saver or store, to
            share theirs.
        ttl: LangGraph's ``TTLConfig``. Reads prolong items only with ``refresh_on_read``, as in
            its own stores; ``omit_expired`` is True unless it says otherwise. With
            ``sweep_interval_minutes`` expired items are deleted by themselves.
        index: ``{"fields": [...]}``: the paths that queries search, such as ``"notes[*].text"``.
        now_ms: Returns milliseconds since 1970.

    Raises:
        UsageError: *replica* is none, *ttl* is out of range, or *index* asks for vectors.
    """

    supports_ttl = True

    def __init__(
        self,
        replica: Replica | blocking.Replica | Door | Home,
        *,
        ttl: TTLConfig | None = None,
        index: dict[str, Any] | None = None,
        now_ms: Callable[[], int] = wall_ms,
    ) -> None:
        if unknown := set(index or {}) - {"fields"}:
            raise UsageError(
                f"index={{'fields': [...]}} says where queries look for words; {sorted(unknown)} "
                "are of vectors, which there are not"
            )
        for key in ("default_ttl", "sweep_interval_minutes"):
            _check_minutes((ttl or {}).get(key), f"ttl[{key!r}]")
        self.ttl_config = ttl
        self._fields = None if index is None else _paths(index.get("fields") or ["$"])
        self._now_ms = now_ms
        self.home = replica if isinstance(replica, Home) else Home.of(replica)
        self._sweeper: asyncio.Task[None] | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        name: str = "langgraph",
        shared: bool = False,
        ttl: TTLConfig | None = None,
        index: dict[str, Any] | None = None,
        **options: Any,
    ) -> CrdtStore:
        """A store with a replica of its own, for ``with`` or ``async with``. To have a checkpointer
        in the same file, open that and give it to `CrdtStore`.

        Args:
            path: The store file; made on first use.
            name: The agent's name.
            shared: Whether several processes of this host may have the file open. Each put then
                goes through the one that keeps it, which costs about a millisecond.
            options: Those of `Replica`, such as ``peers``; or of `OneFile`.
        """
        return cls(Home.at(path, name, shared, options), ttl=ttl, index=index)

    # All else of a store stands on these two

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Carry out operations: first what reads, then what writes, at once.

        Raises:
            UsageError: One of them cannot be; nothing was written.
            StoreError: The store refuses to write.
        """
        return self.home.run(self._batch(list(ops)), "batch")

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """See `batch`."""
        return await self.home.arun(self._batch(list(ops)), "batch")

    def sweep_ttl(self) -> int:
        """Delete the items that have expired; return how many."""
        return self.home.run(self._sweep(), "sweep_ttl")

    async def asweep_ttl(self) -> int:
        """See `sweep_ttl`."""
        return await self.home.arun(self._sweep(), "sweep_ttl")

    # On the replica's loop

    async def _batch(self, ops: list[Op]) -> list[Result]:
        for op in ops:
            validate_op_namespace(op)
            if isinstance(op, PutOp) and not op.namespace:
                raise UsageError("a namespace has at least one label")
        await self.home.current(*sorted(set(_buckets(ops))))
        now = self._now_ms()
        self._start_sweeping()
        results: list[Result] = []
        puts: dict[tuple[tuple[str, ...], str], PutOp] = {}
        is_written = False
        for op in ops:
            match op:
                case GetOp():
                    result, is_refreshed = self._get(op, now)
                    is_written |= is_refreshed
                    results.append(result)
                case SearchOp():
                    found, is_refreshed = self._search(op, now)
                    is_written |= is_refreshed
                    results.append(found)
                case ListNamespacesOp():
                    results.append(self._list_namespaces(op, now))
                case PutOp():
                    puts[(tuple(op.namespace), op.key)] = op
                    results.append(None)
                case _:
                    raise UsageError(f"a store does not know {type(op).__name__}")
        if puts:
            self._put(list(puts.values()), now)
        if puts or is_written:
            await self.home.saved()
        return results

    def _get(self, op: GetOp, now: int) -> tuple[Item | None, bool]:
        place = self._find(op.namespace)
        stored = None if place is None else place.read(op.key)
        if place is None or stored is None or not self._is_live(place, op.key, now):
            return None, False
        is_refreshed = op.refresh_ttl and self._refresh(place, op.key, now)
        created, updated = _time(stored.created_ms), _time(stored.updated_ms)
        item = Item(
            value=stored.value,
            key=op.key,
            namespace=place.namespace,
            created_at=created,
            updated_at=updated,
        )
        return item, is_refreshed

    def _search(self, op: SearchOp, now: int) -> tuple[list[SearchItem], bool]:
        if op.limit < 0 or op.offset < 0:
            raise UsageError(f"limit and offset are not below 0: {op.limit}, {op.offset}")
        found = [
            (place, key, stored)
            for place in self._places(tuple(op.namespace_prefix))
            for key in place.items
            if self._is_live(place, key, now)
            if (stored := place.read(key)) is not None and matches(stored.value, op.filter)
        ]
        scores: list[float | None] = [None] * len(found)
        if op.query:
            ranked = rank(op.query, (self._texts(stored) for _, _, stored in found))
            scores = [score or None for score in ranked]
        order = [at for at in range(len(found)) if not op.query or scores[at] is not None]
        order.sort(key=lambda at: (found[at][0].namespace, found[at][1]))
        order.sort(key=lambda at: (scores[at] or 0.0, found[at][2].updated_ms), reverse=True)
        page = order[op.offset : op.offset + op.limit]
        is_refreshed = False
        if op.refresh_ttl:
            for at in page:
                is_refreshed |= self._refresh(found[at][0], found[at][1], now)
        items = [
            SearchItem(
                namespace=place.namespace,
                key=key,
                value=stored.value,
                created_at=_time(stored.created_ms),
                updated_at=_time(stored.updated_ms),
                score=scores[at],
            )
            for at in page
            for place, key, stored in (found[at],)
        ]
        return items, is_refreshed

    def _list_namespaces(self, op: ListNamespacesOp, now: int) -> list[tuple[str, ...]]:
        if op.limit < 0 or op.offset < 0 or (op.max_depth is not None and op.max_depth < 1):
            raise UsageError("limit and offset are not below 0, max_depth not below 1")
        found = {
            place.namespace[: op.max_depth]
            for place in self._places(())
            if all(
                matches_namespace(place.namespace, condition.match_type, condition.path)
                for condition in op.match_conditions or ()
            )
            if any(self._is_live(place, key, now) for key in place.items)
        }
        return sorted(found)[op.offset : op.offset + op.limit]

    def _put(self, ops: Sequence[PutOp], now: int) -> None:
        """Check all, then write all."""
        size = 0
        for op in ops:
            _check_minutes(op.ttl, "ttl")
            if op.value is not None:
                where = f"the item {op.key!r} in {'.'.join(op.namespace)!r}"
                Document.check_key(op.key, "a store")
                size += len(pack([0, 0, _index(op.index), dict(op.value), None], where))
        if size > TOGETHER_BYTES:
            for op in ops:
                self._put_one(op, now)
            return
        with self.home.replica.transaction():
            for op in ops:
                self._put_one(op, now)

    def _put_one(self, op: PutOp, now: int) -> None:
        place = self._find(op.namespace, make=op.value is not None)
        if place is None:
            return
        if op.value is None:
            place.items.pop(op.key, None)
            place.expiries.pop(op.key, None)
            return
        before = place.read(op.key)
        created = now if before is None else before.created_ms
        spelled = None if place.is_spelled else list(op.namespace)
        place.items[op.key] = [created, now, _index(op.index), dict(op.value), spelled]
        if op.ttl is not None:
            place.expiries[op.key] = [now + round(op.ttl * 60_000), float(op.ttl)]
        else:
            place.expiries.pop(op.key, None)

    def _texts(self, stored: Stored) -> Iterable[str]:
        if stored.searched is False:
            return ()
        fields = self._fields
        if isinstance(stored.searched, list):
            fields = _paths(stored.searched)
        if fields is None:
            return texts_in(stored.value)
        return (
            text
            for field in fields
            for text in (texts_in(stored.value) if field is None else _at(stored.value, field))
        )

    # Expiry

    def _is_live(self, place: Place, key: str, now: int) -> bool:
        if not (self.ttl_config or {}).get("omit_expired", True):
            return True
        expiry = place.expiry(key)
        return expiry is None or expiry[0] > now

    def _refresh(self, place: Place, key: str, now: int) -> bool:
        """Let an item live on from now; True if that was wanted and worth a write."""
        if not (self.ttl_config or {}).get("refresh_on_read", False):
            return False
        expiry = place.expiry(key)
        if expiry is None:
            return False
        until, ttl = now + round(expiry[1] * 60_000), expiry[1]
        if until - expiry[0] < max(1, REFRESH_SHARE * ttl * 60_000):
            return False
        place.expiries[key] = [until, ttl]
        return True

    async def _sweep(self) -> int:
        now, count = self._now_ms(), 0
        for place in self._places((), empty=True):
            for key in list(place.expiries):
                expiry = place.expiry(key)
                if expiry is None or expiry[0] <= now:
                    count += place.items.pop(key, None) is not None
                    del place.expiries[key]
                elif key not in place.items:
                    del place.expiries[key]
        await self.home.saved()
        return count

    def _start_sweeping(self) -> None:
        minutes = (self.ttl_config or {}).get("sweep_interval_minutes")
        if minutes and (self._sweeper is None or self._sweeper.done()):
            self._sweeper = self.home.spawn(self._keep_sweeping(minutes * 60), "crdtstate sweeper")

    async def _keep_sweeping(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await self._sweep()
            except CRDTStateError as exc:
                # Closed, or its disk is full: the next operation starts it again.
                log.info("expired items are not swept: %s", exc)
                return

    # Where namespaces lie

    def _find(self, namespace: Sequence[str], *, make: bool = False) -> Place | None:
        if len(namespace) > LABELS_MAX or sum(map(len, namespace)) > NAMESPACE_CHARS_MAX:
            raise UsageError(
                f"a namespace has at most {LABELS_MAX} labels and {NAMESPACE_CHARS_MAX} characters"
            )
        name, replica = _bucket(namespace), self.home.replica
        document = replica.document(name) if make else replica.find(name)
        return None if document is None else Place(document, _spelled(namespace), tuple(namespace))

    def _places(self, prefix: tuple[str, ...], *, empty: bool = False) -> Iterator[Place]:
        """The namespaces that begin with *prefix*; those without items only if *empty*."""
        replica = self.home.replica
        names = [_bucket(prefix)] if len(prefix) >= 2 else list(replica.documents())
        for name in names:
            document = replica.find(name)
            if document is None or not name.startswith(PREFIX):
                continue
            containers = set(document.lanes.containers)
            for container in sorted(containers):
                if container.startswith("mi/") or (
                    empty
                    and container.startswith("mx/")
                    and f"mi/{container[3:]}" not in containers
                ):
                    place = Place(document, container[3:], None)
                    is_named = place.namespace and place.namespace[: len(prefix)] == prefix
                    if empty or (len(place.items) and is_named):
                        yield place


class Place:
    """The items of one namespace.

    Args:
        document: The bucket that it lies in.
        name: What its maps are called, after their kind.
        namespace: Itself; None if the name, or an item, is to tell.
    """

    def __init__(self, document: Document, name: str, namespace: tuple[str, ...] | None) -> None:
        self.items: Map = document.map(f"i/{name}")
        self.expiries: Map = document.map(f"x/{name}")
        self.is_spelled = not name.startswith("~")
        self.namespace = namespace or self._told(name)

    def _told(self, name: str) -> tuple[str, ...]:
        if self.is_spelled:
            return tuple(name.split("."))
        for key in self.items:
            stored = self.read(key)
            if stored is not None and stored.namespace and _spelled(stored.namespace) == name:
                return tuple(stored.namespace)
        return ()

    def read(self, key: str) -> Stored | None:
        """An item, unless there is none, or somebody wrote something else there."""
        match self.items.get(key):
            case [
                int(created),
                int(updated),
                bool() | None as index,
                dict(value),
                list() | None as ns,
            ]:
                return Stored(created, updated, index, value, _texts_only(ns))
            case [int(created), int(updated), [*index], dict(value), list() | None as ns]:
                return Stored(created, updated, _texts_only(index) or [], value, _texts_only(ns))
        return None

    def expiry(self, key: str) -> tuple[int, float] | None:
        """When an item expires, in milliseconds since 1970, and its time to live in minutes."""
        match self.expiries.get(key):
            case [int(at), float(ttl)] if 0 < ttl <= TTL_MINUTES_MAX:
                return at, ttl
        return None


def _bucket(namespace: Sequence[str]) -> str:
    digest = hashlib.sha256(".".join(namespace[:2]).encode("utf-8", "surrogatepass")).digest()
    return f"{PREFIX}{digest[0] % BUCKETS:02d}"


def _buckets(ops: Iterable[Op]) -> Iterator[str]:
    """The documents that operations look into."""
    for op in ops:
        if isinstance(op, (GetOp, PutOp)):
            yield _bucket(op.namespace)
        elif isinstance(op, SearchOp) and len(op.namespace_prefix) >= 2:
            yield _bucket(op.namespace_prefix)
        else:
            yield from (f"{PREFIX}{number:02d}" for number in range(BUCKETS))


def _spelled(namespace: Sequence[str]) -> str:
    """What the maps of a namespace are called: itself, or its hash if that is no name."""
    text = ".".join(namespace)
    if len(text) <= _NAME_CHARS_MAX and text.isprintable() and not text.startswith("~"):
        return text
    return "~" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _texts_only(given: list[Any] | None) -> list[str] | None:
    return given if given and all(type(each) is str for each in given) else None


def _index(given: Any) -> list[str] | bool | None:
    """An item's index. Raises UsageError: it is none."""
    if given is None or given is False:
        return given
    _paths(given)
    return list(given)


def _paths(given: Any) -> list[list[str] | None]:
    """Paths to fields, ready to follow; None is the whole item. Raises UsageError."""
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise UsageError(
            f'index is False or a list of paths such as "notes[*].text", not {given!r}'
        )
    return [None if each == "$" else tokenize_path(each) for each in given]


def _at(value: dict[str, Any], field: list[str]) -> list[str]:
    found: list[str] = get_text_at_path(value, field)
    return found


def _check_minutes(given: Any, what: str) -> None:
    if given is None:
        return
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not is_number or not 0 < given <= TTL_MINUTES_MAX:
        raise UsageError(f"{what} is a number of minutes above 0, or None, not {given!r}")


def _time(ms: int) -> datetime:
    return datetime.fromtimestamp(min(max(ms, 0), 253402300799000) / 1000, UTC)
