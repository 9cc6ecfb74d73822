"""
What the living do for an agent that died: bring what it had saved, and told nobody, to everybody.

An agent that is killed may have written what no peer has heard of. If its newest checkpoint lies in
a tier that others reach, that is not lost until it comes back: one of the living, the *adopter*,
reads it, with its own tiers and never at an address that came over the mesh, and takes it in like a
snapshot from a peer, by the same rules. From there it spreads as everything does. Then the adopter
says so in "@recovery" (`casebook`), which ends it for all.

Everybody waits for that, each by itself: who the adopter is follows from who is up (`rendezvous`).
If it dies meanwhile, somebody else finds out that it is next. Doing it twice changes nothing. The
agent itself, when it is back, goes on as ever: its dots are as it made them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from crdtstate import casebook
from crdtstate.announcements import SHARED_SCHEMES
from crdtstate.catalogue import Catalogue
from crdtstate.change import Snapshot, decode_change
from crdtstate.checkpoints import Checkpoint, Checkpoints
from crdtstate.clock import Cut, Version
from crdtstate.config import Config
from crdtstate.documents import DocumentSet
from crdtstate.errors import CRDTStateError, InvalidUpdate
from crdtstate.events import AgentRecovered, Event, MemberDown, MemberRetired, MemberUp
from crdtstate.ladder import has_disowned, is_ahead, is_fork
from crdtstate.manifest import LoadedDocument
from crdtstate.membership import Member, rendezvous
from crdtstate.sync import Sync

log = logging.getLogger("crdtstate")

TURNS_MAX = 10
"""How often it is looked whether an agent is still to be adopted, and tiers that fail are tried
again; each time after a pause that doubles. With 5 s at first that is a day and a half."""


@dataclass(slots=True)
class _Case:
    """An agent that is down, and when to look after it."""

    at: float
    pause: float
    turns: int = 0


class Adoption:
    """Takes care of agents that died, where it is this replica's turn.

    Args:
        documents: The documents.
        core: Takes in what a checkpoint has.
        checkpoints: Reads others' checkpoints in the own tiers.
        config: Settings.
        members: All known members.
        takes: Whether a document is to be here.
        emit: Gets the events.
        wake: Called when the core has something to do.
    """

    def __init__(
        self,
        documents: DocumentSet,
        core: Sync,
        checkpoints: Checkpoints,
        config: Config,
        *,
        members: Callable[[], list[Member]],
        takes: Callable[[str], bool],
        emit: Callable[[Event], None],
        wake: Callable[[], None],
    ) -> None:
        self._documents = documents
        self._core = core
        self._checkpoints = checkpoints
        self._config = config
        self._members = members
        self._takes = takes
        self._emit = emit
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        # Agent -> who is down and nobody has taken care of yet, as far as is known.
        self._cases: dict[str, _Case] = {}
        self._news = asyncio.Event()

    def note(self, event: Event) -> None:
        """Something happened that may be about somebody's death."""
        match event:
            case MemberDown(agent, _, "agent") if agent != self._documents.agent:
                pause = self._config.adopt_after
                self._cases.setdefault(agent, _Case(self._loop.time() + pause, pause))
                for case in self._cases.values():
                    # It may have been about to take care of them.
                    case.at = min(case.at, self._loop.time() + pause)
                self._news.set()
            case MemberUp(agent) | MemberRetired(agent) | AgentRecovered(agent):
                self._cases.pop(agent, None)

    async def run(self) -> None:
        """Take care of who is due, for as long as it takes."""
        while True:
            self._news.clear()
            now = self._loop.time()
            for agent in [agent for agent, case in self._cases.items() if case.at <= now]:
                await self._look_after(agent)
            soonest = min((case.at for case in self._cases.values()), default=None)
            try:
                async with asyncio.timeout_at(soonest):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _look_after(self, agent: str) -> None:
        case = self._cases.get(agent)
        writers = self._lost_writers(agent)
        if case is None or not writers:
            self._cases.pop(agent, None)
            return
        case.turns += 1
        case.pause *= 2
        case.at = self._loop.time() + case.pause
        is_last = case.turns >= TURNS_MAX
        if self._is_next(agent):
            try:
                if await self._adopt(agent, writers, is_last):
                    self._cases.pop(agent, None)
            except CRDTStateError as exc:
                log.warning("%s: %s is not taken care of: %s", self._documents.agent, agent, exc)
            except Exception:
                # What is in a tier can be anybody's: it must not stop the others.
                log.exception("%s: %s is not taken care of", self._documents.agent, agent)
        if is_last:
            self._cases.pop(agent, None)

    def _lost_writers(self, agent: str) -> list[int]:
        """As whom an agent wrote that is down; none if it is up again."""
        found = [member for member in self._members() if member.agent == agent]
        if any(member.state in ("up", "suspected") for member in found):
            return []
        return [member.writer for member in found if member.state == "down"]

    def _is_next(self, agent: str) -> bool:
        """Whether this agent is the one, among those that are up, to take care of another."""
        living = {
            member.agent
            for member in self._members()
            if member.state in ("up", "suspected") and member.role == "agent"
        }
        mine = self._documents.agent
        return rendezvous(f"adoption of {agent}", living | {mine}) == mine

    async def _adopt(self, agent: str, writers: Iterable[int], is_last: bool) -> bool:
        """Take in the newest checkpoint of an agent that can be had, and say so. False if the
        tiers fail that may have it; then it is to be tried again, unless this *is_last*."""
        theirs = await self._checkpoints.of(agent)
        found, brought = await self._take_newest(theirs)
        if found is None and theirs.failures() and not is_last:
            return False
        known = {
            name: Version({writer: version[writer] for writer in writers if writer in version})
            for name, version in self._documents.versions()
        }
        token = casebook.token(Cut({name: version for name, version in known.items() if version}))
        id = "" if found is None else found.id
        event = AgentRecovered(agent, self._documents.agent, id, token, brought)
        log.info("%s: took care of %s: %d changes brought", self._documents.agent, agent, brought)
        if self._takes(casebook.DOCUMENT):
            tiers = () if found is None else found.tiers
            shared = [url for url in tiers if urlsplit(url).scheme in SHARED_SCHEMES]
            casebook.adopt(self._documents, event, shared)
        self._emit(event)
        return True

    async def _take_newest(self, theirs: Catalogue) -> tuple[Checkpoint | None, int]:
        """Take in the newest that can be; returns it, and how many changes that brought."""
        here = dict(self._documents.versions())
        newest = max(theirs.believed(), default=None)
        if newest is not None and not is_ahead(theirs.find(newest).version, here, self._takes):
            # There is nothing in it that is not here.
            return theirs.describe(newest), 0
        async for checkpoint, loaded in theirs.newest():
            wanted = [document for document in loaded if self._takes(document.name)]
            manifest = theirs.find(checkpoint.id)
            reason = self._refusal(manifest.writer, manifest.stamp, wanted)
            if reason:
                log.warning("%s: checkpoint %s: %s", self._documents.agent, checkpoint.id, reason)
                continue
            brought = 0
            for document in wanted:
                brought += self._take(theirs.agent, document)
                await asyncio.sleep(0)
            return checkpoint, brought
        return None, 0

    def _refusal(self, writer: int, stamp: int, loaded: Iterable[LoadedDocument]) -> str:
        """Why a checkpoint must not be taken in; empty if it may."""
        book = casebook.disowned(self._documents.find(casebook.DOCUMENT))
        if has_disowned({each.name: each.version for each in loaded}, book):
            return "it has changes that were taken back"
        for theirs in loaded:
            document = self._documents.find(theirs.name)
            if document is not None:
                slots = ((slot.seq, slot.stamp) for slot in document.own_slots(writer).values())
                if is_fork(theirs.version.get(writer, 0), stamp, slots):
                    return "somebody else wrote under the same name: a store was rolled back"
        return ""

    def _take(self, agent: str, loaded: LoadedDocument) -> int:
        """Take in a document; returns how many changes that brought. Raises InvalidUpdate."""
        snapshot = Snapshot.decode(loaded.snapshot)
        changes = [decode_change(data) for data in loaded.changes]
        names = {snapshot.document, *(change.document for change in changes)}
        if names != {loaded.name}:
            raise InvalidUpdate(f"a checkpoint of {agent} has other documents than it says")
        before = self._total(loaded.name)
        self._core.take_in(snapshot, changes, agent, self._loop.time())
        self._wake()
        return self._total(loaded.name) - before

    def _total(self, name: str) -> int:
        document = self._documents.find(name)
        return document.version.total if document is not None else 0
