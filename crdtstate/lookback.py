"""
Looking back: what a replica's store and checkpoints still tell of the past, and bringing it back.

The journal keeps changes from a floor on, and a snapshot of each document that is newer than the
floor. So a document can be rebuilt at a version if the journal reaches back to its beginning, or
to a *base* at or below that version: the snapshot, or a checkpoint. This finds the best base, reads
the changes after it a portion at a time, and lets the event loop turn in between. What to write to
bring values back is decided in `rewrite`; here it is written, in as few transactions as can be.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from typing import NamedTuple, TypeVar

from crdtstate.authors import Authors, Unsigned
from crdtstate.change import CHANGE_BYTES_MAX, Change, Snapshot, decode_change
from crdtstate.checkpoints import Checkpoint, Checkpoints
from crdtstate.clock import Cut, Version
from crdtstate.document import CHANGE_PATHS_MAX
from crdtstate.documents import SYSTEM, DocumentSet
from crdtstate.errors import (
    CorruptCheckpoint,
    CorruptStore,
    InvalidUpdate,
    PastForgotten,
    TierError,
    UnknownCheckpoint,
    UsageError,
)
from crdtstate.hiding import Hiding
from crdtstate.history import History, PastChange, Teller
from crdtstate.manifest import LoadedDocument
from crdtstate.past import (
    Difference,
    Past,
    PastDocument,
    Place,
    Selection,
    differences,
    natives,
    portions,
)
from crdtstate.rewrite import Dots, Kept, Reverted, RunTrace, Step, restoring
from crdtstate.stores import Store
from crdtstate.sync import Sync
from crdtstate.votes import ELECTORATE, VOTES

PORTION = 256 * 1024
"""Bytes of changes that are read from the store at a time."""

TOLD = 1000
"""Differences that are unpacked at a time."""

NEAR_BYTES = 4 * 2**20
"""Changes that are rather read from the journal than a checkpoint from its tier."""

TRANSACTION_BYTES_MAX = CHANGE_BYTES_MAX - 64 * 1024
"""What is written to a document in one transaction; a little less than it takes."""

Point = Cut | Checkpoint | str
"""A point in the past: a version, a checkpoint, or the id of one."""

Content = tuple[bytes | Snapshot | None, list[bytes]]
"""A snapshot, none for a document's very beginning, and encoded changes after it."""

T = TypeVar("T")

Loaded = dict[str, list[LoadedDocument]]
"""Checkpoints that were read already, by id."""


class Base(NamedTuple):
    """A version of a document that can be had without looking into the journal.

    Attributes:
        version: Which.
        take: Gives it, if it is at hand;
        fetch: if not, this does.
    """

    version: Version
    take: Callable[[], Content] | None
    fetch: Callable[[], Awaitable[Content]] | None = None


class Lookback:
    """The past of one replica's documents.

    Args:
        documents: The living ones.
        store: Where their journal is.
        core: Knows what is committed.
        checkpoints: What else is kept.
        settle: Seals what is open and hands it to the store.
        wait_until: Waits until something is so; takes a word for what is waited for.
        takes: Whether a document is to be here.
        authors: Tells who the writers in a checkpoint are.
    """

    def __init__(
        self,
        documents: DocumentSet,
        store: Store,
        core: Sync,
        checkpoints: Checkpoints,
        settle: Callable[[], None],
        wait_until: Callable[[Callable[[], bool], str], Awaitable[None]],
        takes: Callable[[str], bool],
        authors: Authors | None = None,
    ) -> None:
        self._documents = documents
        self._store = store
        self._core = core
        self._checkpoints = checkpoints
        self._settle = settle
        self._wait_until = wait_until
        self._takes = takes
        self._authors: Authors = authors or Unsigned()

    # What users ask for

    async def at(self, point: Point, documents: Iterable[str] | None) -> Past:
        """See `Replica.at`."""
        names = _check_names(documents)
        if names is not None:
            # They decide what is read where values conflict.
            names += [VOTES, ELECTORATE]
        if isinstance(point, Cut):
            return await self._rebuild(point, names)
        if not isinstance(point, (Checkpoint, str)):
            raise UsageError(
                "a point in the past is a checkpoint, its id, or what replica.version() gave, "
                f"not {point!r}"
            )
        id = point if isinstance(point, str) else point.id
        past = self._past()
        for loaded in await self._checkpoints.load(id):
            if names is None or loaded.name in names:
                snapshot = await self._read_snapshot(id, loaded)
                content = (loaded.name, loaded.shared, loaded.version, snapshot, loaded.changes)
                try:
                    await _aside(loaded.shared, partial(past.fill, *content))
                except InvalidUpdate as exc:
                    raise CorruptCheckpoint("checkpoint", id, str(exc)) from exc
                document = past.document(loaded.name)
                # Also those who are named by its changes only.
                document.agents.update(self._authors.unproven(document.agents, document.cards))
        return past

    async def _read_snapshot(self, id: str, loaded: LoadedDocument) -> Snapshot:
        """The snapshot in a document of a checkpoint, with the names of its writers as they are
        proven. Raises CorruptCheckpoint."""
        try:
            snapshot = await asyncio.to_thread(Snapshot.decode, loaded.snapshot)
            return self._authors.vouch(snapshot)
        except InvalidUpdate as exc:
            raise CorruptCheckpoint("checkpoint", id, str(exc)) from exc

    async def diff(
        self,
        since: Point,
        until: Point | None,
        documents: Iterable[str] | None,
        paths: Iterable[str] | None,
    ) -> list[Difference]:
        """See `Replica.diff`."""
        names = _check_names(documents)
        chosen = Selection(paths)
        with await self.at(since, names) as before:
            if until is None:
                self._settle()
                wanted = self._names(names, before, self._documents)
                return list(differences(before, self._documents, wanted, chosen))
            with await self.at(until, names) as after:
                wanted = self._names(names, before, after)
                return list(differences(before, after, wanted, chosen))

    async def restore(
        self,
        point: Point,
        documents: Iterable[str] | None,
        paths: Iterable[str] | None,
        message: str,
        run: str,
    ) -> list[Difference]:
        """See `Replica.restore`."""
        names = _check_names(documents)
        chosen = Selection(paths)
        with await self.at(point, names) as past:
            self._settle()
            wanted = [
                name for name in self._names(names, past, self._documents) if self._takes(name)
            ]
            found = {name: await self._compare(past, name, chosen) for name in wanted}
            if paths is not None:
                chosen.check()
            steps = restoring(self._documents, past, found, chosen)
            return await self._write(steps, message or f"restore of {_name(point)}", run)

    async def revert(
        self, run: str, document: str | None, agent: str | None, message: str
    ) -> Reverted:
        """See `Replica.revert`."""
        for label, given in (("run", run), ("document", document), ("agent", agent)):
            if not isinstance(given, str) and (given is not None or label == "run"):
                raise UsageError(f"{label} is a str, not {given!r}")
        if not run:
            raise UsageError("which run? Changes without one cannot be told apart")
        self._settle()
        names = self._names(None if document is None else [document], self._documents)
        until = Cut(
            {name: version for name, version in self._documents.versions() if name in names}
        )
        await self._reach(until)
        traces: list[RunTrace] = []
        for name in names:
            if name in until and (trace := await self._trace(name, run, agent, until[name])):
                traces.append(trace)
        if not traces:
            raise UsageError(f"the journal has no changes of a run {run!r}, or has forgotten them")
        kept: list[Kept] = []
        steps = chain.from_iterable(trace.steps(self._documents, kept) for trace in traces)
        told = Dots.name_of_revert(run, agent)
        changed = await self._write(steps, message or f"revert of {run}", told)
        return Reverted(tuple(changed), tuple(kept))

    def _names(self, names: list[str] | None, *sets: DocumentSet) -> list[str]:
        """Those of the documents in *sets* that are meant: *names*, or all but the system's."""
        there = {name for each in sets for name in each.documents()}
        if names is None:
            return sorted(name for name in there if not name.startswith(SYSTEM))
        for name in names:
            if name not in there:
                raise UsageError(f"there is no document {name!r}, neither now nor then")
        return names

    async def _compare(self, past: Past, name: str, chosen: Selection) -> list[Place]:
        """The places of a document that can read differently in *past*. Others may write meanwhile:
        that is as if they did so afterwards."""
        then, now = past.find(name), self._documents.find(name)
        for root in natives(then).keys() | natives(now).keys():
            chosen.covers(root, lambda: None)
        found: list[Place] = []
        for portion in portions(then, now, chosen):
            found += portion
            await asyncio.sleep(0)
        return sorted(found, key=Place.order)

    # Writing

    async def _write(self, steps: Iterator[Step], message: str, run: str) -> list[Difference]:
        """Take all *steps*, in as few transactions as their limits allow."""
        done: list[Callable[[], Difference]] = []
        step = next(steps, None)
        while step is not None:
            room = _Room()
            with self._documents.transaction(message=message, run=run):
                while step is not None and room.takes(step):
                    made = step.take()
                    if made is not None:
                        done.append(made)
                    step = next(steps, None)
            if step is not None and step.can_wait:
                self._settle()
                await asyncio.sleep(0)
        changed: list[Difference] = []
        for at in range(0, len(done), TOLD):
            changed += [tell() for tell in done[at : at + TOLD]]
            await asyncio.sleep(0)
        return changed

    def _past(self) -> Past:
        past = Past(self._hiding)
        past.may_rule, past.scheme = self._documents.may_rule, self._documents.scheme
        return past

    def _hiding(self, name: str) -> Hiding | None:
        living = self._documents.find(name)
        return None if living is None else living.hiding

    # Rebuilding

    async def _rebuild(self, cut: Cut, names: list[str] | None) -> Past:
        wanted = [name for name in cut if names is None or name in names]
        await self._reach(Cut({name: cut[name] for name in wanted}))
        past, loaded = self._past(), Loaded()
        for name in wanted:
            await self._fill(past, name, cut[name], loaded)
        return past

    async def _reach(self, cut: Cut) -> None:
        """Wait until *cut* is committed.

        Raises:
            UsageError: It names changes that are not here.
            StoreError: The store refuses to write.
        """
        self._settle()
        for name, version in cut.items():
            document = self._documents.find(name)
            if document is None or not version <= document.version:
                raise UsageError(
                    f"{name!r}: this version has changes that are not here (yet); "
                    "await replica.wait_for(version) first, or leave it out with documents="
                )

        def is_committed() -> bool:
            if self._store.failure is not None:
                raise self._store.failure
            return all(
                version <= self._core.committed_version(name) for name, version in cut.items()
            )

        await self._wait_until(is_committed, "the store to commit")

    async def _fill(self, past: Past, name: str, version: Version, loaded: Loaded) -> None:
        bases = self._usable(name, version, self._all_bases(name, loaded))
        if not bases:
            raise self._forgotten(name)
        document = await self._start(past, name, self._in_order(name, version, bases))
        for changes in self._read(name, document.version.copy(), version):
            await _aside(document.shared, partial(self._replay, document, changes))
        document.finish(version)

    def _replay(self, document: PastDocument, changes: list[Change]) -> None:
        for change in changes:
            if not document.is_ready(change):
                raise UsageError(
                    f"{document.name!r}: this is no version that a replica can have had: "
                    f"{change!r} builds on changes that it lacks"
                )
            try:
                document.take(change)
            except InvalidUpdate as exc:
                raise self._damaged(document.name, exc) from exc

    async def _start(self, past: Past, name: str, bases: list[Base]) -> PastDocument:
        """The document at the first of *bases* that can be had."""
        failure: Exception | None = None
        living = self._documents.find(name)
        shared = living is None or living.shared
        for base in bases:
            try:
                content = await base.fetch() if base.fetch is not None else _taken(base)
                return await _aside(shared, partial(self._begin, past, name, *content))
            except (TierError, CorruptCheckpoint, UnknownCheckpoint) as exc:
                failure = exc
        assert failure is not None
        raise failure

    def _begin_now(self, past: Past, name: str, base: Base) -> PastDocument:
        return self._begin(past, name, *_taken(base))

    def _begin(
        self, past: Past, name: str, snapshot: bytes | Snapshot | None, changes: list[bytes]
    ) -> PastDocument:
        living = self._documents.find(name)
        try:
            if isinstance(snapshot, bytes):
                snapshot = Snapshot.decode(snapshot)
            shared = snapshot.shared if snapshot else living is not None and living.shared
            document = past.begin(name, shared, snapshot)
            for data in changes:
                document.take(decode_change(data))
        except InvalidUpdate as exc:
            raise self._damaged(name, exc) from exc
        return document

    def _damaged(self, name: str, exc: Exception) -> CorruptStore:
        return CorruptStore(self._store.path or "memory", f"document {name!r}: {exc}")

    # Bases

    def _usable(self, name: str, version: Version, bases: list[Base]) -> list[Base]:
        """Those from which the journal leads to *version*, the nearest first."""
        floor = self._store.floor(name)
        usable = [
            base
            for base in bases
            if base.version <= version
            and all(
                floor.get(writer, 0) < first for writer, first, _ in _ranges(base.version, version)
            )
        ]
        # Of equal ones that at hand, which comes first.
        return sorted(usable, key=lambda base: -base.version.total)

    def _in_order(self, name: str, version: Version, bases: list[Base]) -> list[Base]:
        """The same, but what is at hand first if little has to be read after it."""
        near = next((base for base in bases if base.fetch is None), None)
        if near is not None:
            ranges = _ranges(near.version, version)
            if self._store.measure(name, ranges) <= NEAR_BYTES:
                return [near]
        return bases

    def _bases(self, name: str) -> list[Base]:
        """What is at hand."""
        found: list[Base] = []
        living = self._documents.find(name)
        if living is not None and not living.is_broken:
            found.append(Base(living.version.copy(), lambda: (living.snapshot(), [])))
        saved = self._store.saved(name)
        if saved is not None:
            found.append(Base(saved.version, lambda: (saved.data, [])))
        return [*found, Base(Version(), lambda: (None, []))]

    def _all_bases(self, name: str, loaded: Loaded) -> list[Base]:
        """The same, and what is in checkpoints."""

        async def fetch(id: str) -> Content:
            if id not in loaded:
                loaded[id] = await self._checkpoints.load(id)
            found = next((each for each in loaded[id] if each.name == name), None)
            if found is None:
                raise CorruptCheckpoint("checkpoint", id, f"{name!r} is not to be believed")
            return await self._read_snapshot(id, found), found.changes

        saved = [
            each for each in self._checkpoints.saved() if each.is_proven and name in each.version
        ]
        return self._bases(name) + [
            Base(each.version[name], None, partial(fetch, each.id)) for each in saved
        ]

    def _forgotten(self, name: str) -> PastForgotten:
        living = self._documents.find(name)
        assert living is not None, f"{name!r} is not here"
        bases = self._usable(name, living.version, self._all_bases(name, {}))
        return PastForgotten(name, bases[-1].version if bases else living.version)

    # Reading

    def _read(self, name: str, start: Version, end: Version) -> Iterator[list[Change]]:
        """The changes after *start* up to *end*, in causal order, a portion at a time.

        Raises:
            PastForgotten: The journal forgets some of them, or has done so.
            CorruptStore: One of them is damaged.
        """
        position = start.copy()
        while ranges := _ranges(position, end):
            floor = self._store.floor(name)
            if any(floor.get(writer, 0) >= first for writer, first, _ in ranges):
                raise self._forgotten(name)
            found, _ = self._store.read(name, ranges, PORTION)
            if not found:
                raise UsageError(
                    f"{name!r}: the store has not saved everything up to there yet; "
                    "await replica.durable() first"
                )
            try:
                changes = [decode_change(data) for data in found]
            except InvalidUpdate as exc:
                raise self._damaged(name, exc) from exc
            position.merge({change.writer: change.seq for change in changes})
            yield changes

    # History

    def history(
        self,
        name: str,
        since: Cut | Checkpoint | None,
        until: Cut | Checkpoint | None,
        agent: str | None,
        run: str | None,
        path: str | None,
        limit: int | None,
        tidying: bool,
    ) -> HistoryReader:
        """See `Replica.history`."""
        teller = Teller(agent, run, path, limit, tidying=tidying)
        if not isinstance(name, str) or self._documents.find(name) is None:
            raise UsageError(f"there is no document {name!r}")
        self._settle()
        committed = self._core.committed_version(name)
        end = committed if until is None else _version_of(until, name)
        if not end <= committed:
            raise UsageError(
                f"{name!r}: *until* has changes that are not committed here; "
                "await replica.wait_for(version), and replica.durable(), first"
            )
        if since is None:
            return HistoryReader(self, name, self._floor(name, end), end, teller)
        start = _version_of(since, name)
        floor = self._store.floor(name)
        if any(floor.get(writer, 0) >= first for writer, first, _ in _ranges(start, end)):
            raise self._forgotten(name)
        return HistoryReader(self, name, start, end, teller)

    def portions_now(self, reader: HistoryReader) -> Iterator[list[PastChange]]:
        """History from what is at hand."""
        bases = self._nearest(reader, self._bases(reader.name))
        begun = self._begin_now(self._past(), reader.name, bases[0]) if bases else None
        return self._portions(reader, begun)

    async def portions(self, reader: HistoryReader) -> Iterator[list[PastChange]]:
        """History from whatever is nearest."""
        bases = self._nearest(reader, self._all_bases(reader.name, {}))
        begun = await self._start(self._past(), reader.name, bases) if bases else None
        return self._portions(reader, begun)

    def _portions(
        self, reader: HistoryReader, base: PastDocument | None
    ) -> Iterator[list[PastChange]]:
        read = partial(self._read, reader.name)
        try:
            yield from History(reader.start, reader.until, base, read).portions(reader.teller)
        except InvalidUpdate as exc:
            raise self._damaged(reader.name, exc) from exc

    def _nearest(self, reader: HistoryReader, bases: list[Base]) -> list[Base]:
        """The bases before the start, in order; else the earliest after it."""
        usable = self._usable(reader.name, reader.until, bases)
        before = [base for base in usable if base.version <= reader.start]
        if before:
            return self._in_order(reader.name, reader.start, before)
        return usable[::-1]

    # Runs

    async def _trace(
        self, name: str, run: str, agent: str | None, until: Version
    ) -> RunTrace | None:
        """What a run did to a document, up to *until*; None if the journal has nothing of it."""
        dots = Dots(run, agent)
        for changes in self._read(name, self._floor(name, until), until):
            for change in changes:
                dots.note(change)
            await asyncio.sleep(0)
        if not dots:
            return None
        usable = self._usable(name, until, self._all_bases(name, {}))
        if not usable:
            raise self._forgotten(name)
        before = [base for base in usable if dots.are_after(base.version)]
        document = await self._start(self._past(), name, before or usable[::-1])
        trace = RunTrace(document, dots)
        for changes in self._read(name, document.version.copy(), until):
            for change in changes:
                try:
                    trace.follow(change)
                except InvalidUpdate as exc:
                    raise self._damaged(name, exc) from exc
            await asyncio.sleep(0)
        return trace

    def _floor(self, name: str, until: Version) -> Version:
        floor = self._store.floor(name)
        return Version({writer: seq for writer, seq in floor.items() if writer in until})


class HistoryReader:
    """The history of a document, to be iterated over, as often as needed.

    ``for`` reads it portion by portion from the journal and keeps the event loop waiting;
    ``async for`` lets it turn after each portion, and can begin at a checkpoint, so that
    less has to be replayed. Writing on meanwhile is fine.
    """

    def __init__(
        self,
        lookback: Lookback,
        name: str,
        start: Version,
        until: Version,
        teller: Teller,
    ) -> None:
        self.name = name
        self.start = start
        self.until = until
        self.teller = teller
        self._lookback = lookback

    def __iter__(self) -> Iterator[PastChange]:
        told = chain.from_iterable(self._lookback.portions_now(self))
        return islice(told, self.teller.limit)

    async def __aiter__(self) -> AsyncIterator[PastChange]:
        count = 0
        for portion in await self._lookback.portions(self):
            for change in portion:
                if count == self.teller.limit:
                    return
                count += 1
                yield change
            await asyncio.sleep(0)

    def __repr__(self) -> str:
        return f"<HistoryReader {self.name}: {self.until.total - self.start.total} changes>"


async def _aside(shared: bool, work: Callable[[], T]) -> T:
    """Do what may take long in a thread, while the loop turns; but for native types, whose objects
    stay in the thread of the loop."""
    if shared:
        await asyncio.sleep(0)
        return work()
    return await asyncio.to_thread(work)


def _taken(base: Base) -> Content:
    assert base.take is not None
    return base.take()


class _Room:
    """How much more fits into a transaction."""

    def __init__(self) -> None:
        # Document's name -> how many places were written to it, and their bytes.
        self._taken: dict[str, tuple[int, int]] = {}

    def takes(self, step: Step) -> bool:
        """Whether *step* fits; then it counts."""
        count, size = self._taken.get(step.document.name, (0, 0))
        if count and (count >= CHANGE_PATHS_MAX or size + step.size > TRANSACTION_BYTES_MAX):
            return False
        self._taken[step.document.name] = count + 1, size + step.size
        return True


def _ranges(start: Version, end: Version) -> list[tuple[int, int, int]]:
    """The changes after *start* up to *end*: writer, first seq, last seq."""
    return [
        (writer, start.get(writer, 0) + 1, seq)
        for writer, seq in end.items()
        if seq > start.get(writer, 0)
    ]


def _check_names(documents: Iterable[str] | None) -> list[str] | None:
    if documents is None:
        return None
    names = [] if isinstance(documents, str) else list(documents)
    if not names or not all(isinstance(name, str) for name in names):
        raise UsageError(f'documents are names, such as ["main"], not {documents!r}')
    return list(dict.fromkeys(names))


def _version_of(point: Cut | Checkpoint, name: str) -> Version:
    cut = point.version if isinstance(point, Checkpoint) else point
    if not isinstance(cut, Cut):
        raise UsageError(f"history is told from a Checkpoint or a version on, not from {point!r}")
    return cut.get(name, Version())


def _name(point: Point) -> str:
    return repr(point) if isinstance(point, Cut) else str(getattr(point, "id", point))
