"""
Getting a replica's documents back when it is opened, from the sources of `ladder`, in its order.

Nothing that is there is altered before it is certain what takes its place: a store that is damaged,
or refused, stays as it is until a new one stands beside it, whole, checked and synced; then it is
put aside (`stores.rescue`). Only damage leads to that. A store that is locked, or a disk that is
full or refuses, is for somebody to mend: opening raises, and everything is as it was.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from crdtstate import casebook
from crdtstate.catalogue import each
from crdtstate.change import Change, Snapshot, decode_change
from crdtstate.checkpoints import Checkpoints
from crdtstate.clock import Version
from crdtstate.config import Config
from crdtstate.document import EngineFailure
from crdtstate.documents import DocumentSet
from crdtstate.errors import (
    CorruptCheckpoint,
    CorruptStore,
    CRDTStateError,
    InvalidUpdate,
    StoreError,
    TierError,
    UnknownCheckpoint,
)
from crdtstate.identity import may_keep_writer
from crdtstate.ladder import (
    REASON_CHARS_MAX,
    Attempt,
    Disowned,
    Recovery,
    Source,
    has_disowned,
    is_ahead,
    is_fork,
    lacks_own,
    next_source,
)
from crdtstate.manifest import LoadedDocument, Manifest, read_keys
from crdtstate.shelf import Shelf
from crdtstate.stores import Entry, Saved, Store
from crdtstate.stores.file import Host, claims_to_be_ours
from crdtstate.stores.journal import Journal
from crdtstate.stores.memory import MemoryStore
from crdtstate.stores.rescue import complete, rebuild, replace, salvaging
from crdtstate.stores.suspects import Suspects

log = logging.getLogger("crdtstate")

LOOK = 2.0
"""Seconds for which tiers are asked for their newest checkpoint. One that is slower does not hold
up a restart, unless the store is damaged and it is needed."""

TRIED_MAX = 10
"""Checkpoints that are tried, newest first, when they cannot be used."""


Vouch = Callable[[Snapshot], Snapshot]


class Unusable(Exception):
    """A source does not give what is needed; the message says why."""


@dataclass(slots=True)
class Opened:
    """What a replica goes on with.

    Attributes:
        store: The store, open; its session has not begun.
        stored: What is in it of each document. The documents may have more.
        former: As whom the replica wrote before.
        checks_later: Whether the user's check has to wait for the peers.
        suspects: What the process died of, perhaps; None without a store.
    """

    store: Store
    recovery: Recovery
    stored: dict[str, Version] = field(default_factory=dict)
    former: frozenset[int] = frozenset()
    checks_later: bool = False
    suspects: Suspects | None = None


class Pile:
    """What goes into a new store: of each document a snapshot, and the changes after it. All of it
    has been taken in by the documents, which check it like what comes from peers.

    Args:
        documents: The documents.
    """

    def __init__(self, documents: DocumentSet) -> None:
        self._documents = documents
        self.contents: dict[str, tuple[Saved | None, list[Entry]]] = {}

    def take_snapshot(self, snapshot: Snapshot, data: bytes) -> bool:
        """Take in a snapshot, which is *data* when it is encoded. Returns True, or raises
        InvalidUpdate; then nothing was taken in."""
        name = snapshot.document
        document = self._documents.find_or_make(name, snapshot.shared)
        before = document.version.copy()
        try:
            document.join(snapshot)
        except EngineFailure as exc:
            self._reload(name)
            raise InvalidUpdate(str(exc)) from exc
        if document.version == before:
            return True
        if before:
            # Neither of the two had all of it.
            snapshot = document.snapshot()
            data = snapshot.encode()
        self.contents[name] = Saved(name, snapshot.version.copy(), data), []
        return True

    def take_change(self, change: Change) -> bool:
        """Take in a change, if what it builds on is here; whether it is, or was already.

        Raises:
            InvalidUpdate: It breaks the rules; nothing was taken in.
        """
        name = change.document
        document = self._documents.find_or_make(name, change.shared)
        if document.version.covers(change.dot):
            return True
        if not document.is_ready(change):
            return False
        try:
            document.apply(change)
        except EngineFailure as exc:
            self._reload(name)
            raise InvalidUpdate(str(exc)) from exc
        _, entries = self.contents.setdefault(name, (None, []))
        entries.append(Entry(name, change.writer, change.seq, change.data))
        return True

    def _reload(self, name: str) -> None:
        """Bring a document whose engine failed back to what was taken in before."""
        document = self._documents.find(name)
        assert document is not None
        document.reset(document.writer)
        saved, entries = self.contents.get(name, (None, []))
        if saved is not None:
            document.join(Snapshot.decode(saved.data))
        for entry in entries:
            document.apply(decode_change(entry.data))


class Ladder:
    """Opens one replica's store, and gets its documents back.

    Args:
        documents: The replica's documents; nobody has been given one yet.
        fresh: As whom to write if the last writer must not go on.
        checkpoints: Where its checkpoints are; not open yet. None: they are not looked at.
        config: Settings.
        path: The store's file; None: it is in memory.
        takes: Whether a document is to be here.
        check: The user's; it returns False or raises if it does not admit what there is.
        has_peers: Whether others can be asked for everything.
        is_own: Whether this replica may go on as a writer that has this card.
        vouch: Gives a snapshot of a checkpoint the names of its writers that are proven, or raises
            InvalidUpdate. What lies in the store was taken in by that rule.
        draw: Another writer in place of *fresh*, should somebody have written as that one.
    """

    def __init__(
        self,
        documents: DocumentSet,
        fresh: int,
        checkpoints: Checkpoints | None,
        config: Config,
        *,
        path: Path | None,
        durability: Literal["process", "power"],
        takes: Callable[[str], bool],
        check: Callable[[], Awaitable[object] | object] | None,
        has_peers: bool,
        is_own: Callable[[int, bytes], bool] = lambda writer, card: True,
        vouch: Vouch = lambda snapshot: snapshot,
        draw: Callable[[], int] | None = None,
    ) -> None:
        self._documents = documents
        self._fresh = fresh
        self._checkpoints = checkpoints
        self._config = config
        self._host = None if path is None else Host(path.absolute())
        self._durability = durability
        self._takes = takes
        self._check = check
        self._has_peers = has_peers
        self._is_own = is_own
        self._vouch = vouch
        self._draw = draw
        # What the tiers say is the newest, once they were asked.
        self._newest: Manifest | None = None
        self._has_looked = False
        # What the store turned out to be.
        self._is_damaged = False
        self._is_empty = False
        self._former: frozenset[int] = frozenset()
        # As whom the documents are loaded, and as whom the last session wrote.
        self._writer = fresh
        self._before: int | None = None
        # What is to be told in the end; of the last source that was loaded.
        self._changes: dict[str, int] = {}
        self._used = ""
        self._losses: list[str] = []
        # Checkpoints that must not be used, and why; what is known to have been taken back.
        self._refused: dict[str, str] = {}
        self._disowned: Disowned = {}
        self._aside: Path | None = None
        self._is_checked = False
        # What the process died of, perhaps; None without a store.
        self._suspects: Suspects | None = None

    async def climb(self) -> Opened:
        """Try one source after the other.

        Raises:
            StoreLocked, StoreUnavailable: The store cannot be used now, damaged or not.
            CorruptStore: It is damaged and `Config.recover` says to leave it; or it is no file of
                ours at all.
            StoreError: The check refuses what is in it, and `Config.recover` says to leave it.
        """
        if self._host is None:
            return await self._climb()
        # From here to the end nobody else opens the file, whatever becomes of it.
        self._host.lock()
        try:
            self._aside = complete(self._host)
            self._suspects = self._documents.witness = Suspects(self._host.path)
            return await self._climb()
        except BaseException:
            if self._suspects is not None:
                self._suspects.close()
            raise
        finally:
            self._host.release()

    async def _climb(self) -> Opened:
        began = time.monotonic()
        sources = {
            "store": self._from_store,
            "checkpoint": self._from_checkpoint,
            "peers": self._from_peers,
        }
        attempts: list[Attempt] = []
        opened: Opened | None = None
        while (source := next_source(attempts)) is not None:
            try:
                opened = await sources[source]()
            except Unusable as exc:
                reason = str(exc)[:REASON_CHARS_MAX] or "it cannot be used"
                attempts.append(Attempt(source, reason))
                log.info("%s: %s: %s", self._documents.agent, source, reason)
            else:
                attempts.append(Attempt(source))
        used = attempts[-1].source
        if opened is None:
            used, opened = await self._best()
        opened.recovery = Recovery(
            source=used,
            attempts=tuple(attempts),
            is_escalated=bool(attempts[-1].reason),
            seconds=time.monotonic() - began,
            changes={where: count for where, count in self._changes.items() if count},
            checkpoint=self._used,
            losses=tuple(self._losses),
            aside="" if self._aside is None else str(self._aside),
            writer=None if self._before == self._writer else self._before,
            is_checked=self._is_checked,
        )
        opened.suspects = self._suspects
        return opened

    # The store

    async def _from_store(self) -> Opened:
        store = self._open()
        try:
            opened = await self._load(store)
            await self._admit()
        except (Unusable, CorruptStore) as exc:
            store.close(clean=False)
            self._is_damaged |= isinstance(exc, CorruptStore)
            if not self._config.recover:
                raise _left(exc, store.path) from exc
            raise Unusable(str(exc)) from exc
        except BaseException:
            store.close(clean=False)
            raise
        return opened

    def _open(self) -> Store:
        """Open the store; raises Unusable if it is damaged, and CorruptStore if it was never
        ours."""
        if self._host is None:
            return MemoryStore()
        host = self._host
        try:
            return Journal(host.path, durability=self._durability, host=lambda _: host)
        except CorruptStore as exc:
            # Somebody may have named another file by mistake, which is left alone: what its header
            # says, or what lies beside it, tells that a store was here.
            was_here = host.note is not None or Path(f"{host.path}.checkpoints").exists()
            if not self._config.recover or not (was_here or claims_to_be_ours(host.path)):
                raise
            self._is_damaged = True
            raise Unusable(str(exc)) from exc

    async def _load(self, store: Store) -> Opened:
        """Load what the store has, and the newest checkpoint if it has something beyond that."""
        session = store.session
        self._before = session.writer
        self._former |= session.writers
        is_kept = session.writer is not None and may_keep_writer(session)
        self._begin(session.writer if session.writer is not None and is_kept else self._fresh)
        stored = self._read(store)
        if self._writer != self._fresh and not self._is_own(self._writer, self._card()):
            # Nothing was written as that one, or in another mesh, or with another key.
            is_kept = False
            self._begin(self._fresh)
            stored = self._read(store)
        while not is_kept and self._draw is not None and _has(stored, self._writer):
            self._fresh = self._draw()
            self._begin(self._fresh)
            stored = self._read(store)
        newest = await self._look() if self._config.recover else None
        if newest is not None and is_ahead(newest.version, stored, self._takes):
            if not any(stored.values()):
                self._is_empty = True
                raise Unusable("it is empty, and there is a checkpoint")
            if lacks_own(self._writer, newest.version, stored):
                self._begin(self._fresh)
                self._read(store)
            await self._merge_newest(store)
        return Opened(store, NOTHING, stored, session.writers)

    def _card(self) -> bytes:
        """What the documents tell of who the writer is."""
        for name in self._documents.documents():
            document = self._documents.find(name)
            if document is not None and (card := document.cards.get(self._writer)):
                return card
        return b""

    def _begin(self, writer: int) -> None:
        self._writer = writer
        self._documents.start_over(writer)
        self._changes.clear()
        self._used, self._is_checked = "", False

    def _read(self, store: Store) -> dict[str, Version]:
        documents = self._documents
        for item in store.load():
            what = "snapshot"
            try:
                if isinstance(item, Saved):
                    documents.load_snapshot(item.document, item.data)
                else:
                    what = f"change {item.writer:x}:{item.seq}"
                    documents.load_change(item.document, item.data)
            except (InvalidUpdate, EngineFailure) as exc:
                path = store.path or "memory"
                reason = f"document {item.document!r}: {what}: {exc}"
                raise CorruptStore(
                    path, f"{reason}; check it with: crdtstate verify {path}"
                ) from exc
        self._count("store")
        return {name: version.copy() for name, version in documents.versions()}

    async def _merge_newest(self, store: Store) -> None:
        """Take in what the newest checkpoint has beyond the store. If that cannot be, there is
        what the store has."""
        agent = self._documents.agent
        try:
            async for id, loaded in self._candidates():
                try:
                    for document in loaded:
                        _join(self._documents, document, self._vouch)
                except (CRDTStateError, EngineFailure) as exc:
                    raise Unusable(f"checkpoint {id}: {exc}") from exc
                if not self._has_taken_back(id, loaded):
                    self._used = id
                    self._count("checkpoint")
                    return
                self._begin(self._writer)
                self._read(store)
        except Unusable as exc:
            log.warning("%s: nothing is taken in beside the store: %s", agent, exc)
            self._losses.append(str(exc)[:REASON_CHARS_MAX])
            self._begin(self._writer)
            self._read(store)

    # Checkpoints

    async def _look(self) -> Manifest | None:
        """The newest checkpoint, by what the tiers say that answer soon."""
        if self._has_looked or self._checkpoints is None:
            return self._newest
        self._has_looked = True
        agent, attestation = self._documents.agent, self._checkpoints.attestation
        found: dict[str, Manifest] = {}

        async def look(shelf: Shelf) -> None:
            try:
                ids, _ = read_keys(agent, await shelf.items())
                for id in sorted(ids, reverse=True)[:TRIED_MAX]:
                    try:
                        manifest = await shelf.manifest(id)
                        if attestation.believes(manifest):
                            found[id] = manifest
                            return
                    except CorruptCheckpoint as exc:
                        log.debug("%s: %s", agent, exc)
            except TierError as exc:
                # Whoever looks after the tiers later will tell.
                log.debug("%s: %s", agent, exc)

        try:
            async with asyncio.timeout(LOOK):
                await each(self._checkpoints.shelves, look)
        except TimeoutError:
            log.debug("%s: not all tiers answered within %g s", agent, LOOK)
        self._newest = found[max(found)] if found else None
        if self._newest is not None:
            # What is written now comes after it.
            self._documents.observe(self._newest.stamp)
        return self._newest

    async def _from_checkpoint(self) -> Opened:
        self._begin(self._fresh)
        pile = await self._pile_up()
        if not pile.contents:
            raise Unusable("there is nothing in it")
        await self._admit()
        return await self._go_on_with(pile)

    async def _pile_up(self) -> Pile:
        """Load the newest checkpoint that can be used, and what can be read of a damaged store.

        Raises:
            Unusable: There is neither.
        """
        reason = ""
        try:
            async for id, loaded in self._candidates():
                pile = Pile(self._documents)
                try:
                    for document in loaded:
                        _take_document(pile, document, self._vouch)
                except CRDTStateError as exc:
                    self._refuse(id, str(exc))
                else:
                    self._used = id
                    self._count("checkpoint")
                    self._salvage(pile)
                    if not self._has_taken_back(id, loaded):
                        return pile
                self._begin(self._writer)
        except Unusable as exc:
            reason = str(exc)
        pile = Pile(self._documents)
        self._salvage(pile)
        if not pile.contents and reason:
            raise Unusable(reason)
        return pile

    async def _candidates(self) -> AsyncIterator[tuple[str, list[LoadedDocument]]]:
        """The checkpoints that can be used as far as can be told, newest first, each with the
        documents that are to be here.

        Raises:
            Unusable: That was all of them; says what was wrong with them.
        """
        checkpoints = self._checkpoints
        if checkpoints is None:
            raise Unusable("checkpoints are not used")
        began = time.monotonic()
        await checkpoints.read_all()
        believed = checkpoints.believed()
        for id in reversed(believed):
            if len(self._refused) >= TRIED_MAX:
                break
            if id in self._refused:
                continue
            try:
                loaded = await checkpoints.load(id)
            except (StoreError, UnknownCheckpoint) as exc:
                self._refuse(id, str(exc))
                if time.monotonic() - began > self._config.tier_timeout:
                    # A tier that hangs does so for each.
                    break
                continue
            wanted = [document for document in loaded if self._takes(document.name)]
            if self._is_fork(checkpoints.manifests[id].stamp, wanted):
                reason = "somebody else wrote under the same name: a store was rolled back"
                self._refuse(id, reason)
            elif not self._has_taken_back(id, wanted):
                yield id, wanted
        troubles = {**self._refused, **checkpoints.failures()}
        told = [f"{where}: {why}" for where, why in troubles.items()]
        if others := checkpoints.manifests.keys() - set(believed):
            told.append(f"{max(others)}: not proven, so it is only restored if you name it")
        raise Unusable("; ".join(["there is no checkpoint that can be used", *told]))

    def _refuse(self, id: str, reason: str) -> None:
        log.warning("%s: checkpoint %s is not used: %s", self._documents.agent, id, reason)
        self._refused[id] = reason

    def _is_fork(self, stamp: int, loaded: Iterable[LoadedDocument]) -> bool:
        """Whether a checkpoint and what is here hold different changes under the same dots."""
        writer = self._before
        for theirs in loaded:
            document = self._documents.find(theirs.name)
            if writer is not None and document is not None:
                slots = ((slot.seq, slot.stamp) for slot in document.own_slots(writer).values())
                if is_fork(theirs.version.get(writer, 0), stamp, slots):
                    return True
        return False

    def _has_taken_back(self, id: str, loaded: Iterable[LoadedDocument]) -> bool:
        """Whether a checkpoint has changes that were taken back later; it is refused then. Asked
        again once all is loaded, because that may tell of it."""
        book = self._documents.find(casebook.DOCUMENT)
        self._disowned = {**self._disowned, **casebook.disowned(book)}
        found = has_disowned({each.name: each.version for each in loaded}, self._disowned)
        if found:
            self._refuse(id, "it has changes that were taken back")
        return found

    def _salvage(self, pile: Pile) -> None:
        """Take in what can be read of a damaged store. What builds on what was lost stays out."""
        if not self._is_damaged:
            return
        assert self._host is not None
        left = 0
        with salvaging(self._host) as wreck:
            for snapshot, data in wreck.snapshots():
                left += not self._take(pile.take_snapshot, snapshot, data)
            for change in wreck.changes():
                left += not self._take(pile.take_change, change)
            self._former |= wreck.writers()
        self._losses = list(wreck.losses)
        if left:
            self._losses.append(f"{left} changes or snapshots that were read do not fit any more")
        self._count("journal")

    def _take(self, take: Callable[..., bool], *what: object) -> bool:
        try:
            return take(*what)
        except CRDTStateError as exc:
            log.debug("%s: %r is not taken in: %s", self._documents.agent, what[0], exc)
            return False

    # Peers

    async def _from_peers(self) -> Opened:
        if not self._has_peers:
            raise Unusable("no peers were named")
        self._begin(self._fresh)
        opened = await self._go_on_with(Pile(self._documents))
        opened.checks_later = self._check is not None
        return opened

    # Going on

    async def _admit(self) -> None:
        """Ask the user's check, if there is anything to ask about.

        Raises:
            Unusable: It does not admit what there is, or takes too long.
        """
        if self._check is None or not any(version for _, version in self._documents.versions()):
            return
        await admit(self._check, self._config.check_timeout)
        self._is_checked = True

    async def _best(self) -> tuple[Source, Opened]:
        """All has failed: go on with the best there is, whatever the check says."""
        if not self._is_damaged:
            store = self._open()
            try:
                return "store", await self._load(store)
            except Unusable:
                return "store", Opened(store, NOTHING)
            except BaseException:
                store.close(clean=False)
                raise
        self._begin(self._fresh)
        try:
            pile = await self._pile_up()
        except Unusable:
            pile = Pile(self._documents)
        return "checkpoint" if pile.contents else "peers", await self._go_on_with(pile)

    async def _go_on_with(self, pile: Pile) -> Opened:
        """Make a store of what was loaded, in place of the one that cannot be used; an empty one
        gets it later.

        Raises:
            StoreUnavailable: The disk refuses. The old store is where it was, as it was.
        """
        if self._host is None or self._is_empty:
            return Opened(self._open(), NOTHING)
        host, agent = self._host, self._documents.agent
        rebuild(host, agent, self._writer, self._former, pile.contents.values())
        self._aside = replace(host)
        store = Journal(host.path, durability=self._durability, host=lambda _: host)
        stored = {name: version.copy() for name, version in self._documents.versions()}
        return Opened(store, NOTHING, stored, store.session.writers)

    def _count(self, where: str) -> None:
        """Note how many changes have come from *where*: all that are here and not counted yet."""
        total = sum(version.total for _, version in self._documents.versions())
        self._changes[where] = total - sum(self._changes.values())


async def admit(check: Callable[[], Awaitable[object] | object], seconds: float) -> None:
    """Ask the user's check. Raises Unusable if it does not admit what there is, or takes longer
    than *seconds*."""
    try:
        async with asyncio.timeout(seconds):
            verdict = check()
            if inspect.isawaitable(verdict):
                verdict = await verdict
    except TimeoutError:
        raise Unusable(f"the check took longer than {seconds:g} s") from None
    except Exception as exc:
        raise Unusable(f"the check does not admit it: {type(exc).__name__}: {exc}") from exc
    if verdict is False:
        raise Unusable("the check does not admit it: it returned False")


def _read_snapshot(loaded: LoadedDocument, vouch: Vouch) -> tuple[Snapshot, bytes]:
    """The snapshot in a document of a checkpoint, with the names of its writers as they are
    proven; and its bytes. Raises InvalidUpdate."""
    found = Snapshot.decode(loaded.snapshot)
    if found.document != loaded.name:
        raise InvalidUpdate(f"a snapshot of {found.document!r} in place of {loaded.name!r}")
    snapshot = vouch(found)
    is_same = snapshot.agents == found.agents
    return snapshot, loaded.snapshot if is_same else snapshot.encode()


def _take_document(pile: Pile, loaded: LoadedDocument, vouch: Vouch) -> None:
    """Take in a document of a checkpoint. Raises InvalidUpdate."""
    pile.take_snapshot(*_read_snapshot(loaded, vouch))
    for data in loaded.changes:
        change = decode_change(data)
        if change.document != loaded.name or not pile.take_change(change):
            raise InvalidUpdate(f"{change!r} does not follow what is before it")


def _join(documents: DocumentSet, loaded: LoadedDocument, vouch: Vouch) -> None:
    """Take in what a document of a checkpoint has beyond what is here. Raises InvalidUpdate and
    EngineFailure; then part of it may be here."""
    snapshot, _ = _read_snapshot(loaded, vouch)
    documents.find_or_make(loaded.name, snapshot.shared).join(snapshot)
    for data in loaded.changes:
        documents.load_change(loaded.name, data)


def _has(versions: Mapping[str, Version], writer: int) -> bool:
    return any(writer in version for version in versions.values())


def _left(exc: Exception, path: str | None) -> CRDTStateError:
    """What to raise for a store that is to be left as it is."""
    return exc if isinstance(exc, CorruptStore) else StoreError(path or "memory", str(exc))


NOTHING = Recovery("store", ())
"""Until it is told."""
