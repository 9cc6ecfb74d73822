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

**What one cannot bring, another one can.** An adopter takes in nothing that it could not hand on:
documents that it takes no part in, and in a mesh with certificates snapshots that it may not hand
out, or that the dead agent might not. Of those it takes the changes that came after the snapshot,
as each proves itself. If a document still lacks something then, the adopter says so (it *passes*)
and the next one looks, until all is brought or nobody is left; what is missing then is named.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
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
from crdtstate.errors import CRDTStateError, InvalidUpdate, WaitTimeout
from crdtstate.events import (
    AdoptionPassed,
    AgentRecovered,
    Event,
    MemberDown,
    MemberRetired,
    MemberUp,
)
from crdtstate.ladder import has_disowned, is_ahead, is_fork
from crdtstate.manifest import LoadedDocument
from crdtstate.membership import Member, rendezvous
from crdtstate.sync import Sync

log = logging.getLogger("crdtstate")

TURNS_MAX = 10
"""How often it is looked whether an agent is still to be adopted, and tiers that fail are tried
again; each time after a pause that doubles. With 5 s at first that is a day and a half."""

EXAMINED_WITHIN = 60.0
"""Seconds that a native document's changes may take to be examined."""


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
        takes: Whether a document is to be here, and may.
        may_hand: Whether others believe this replica when it hands them a snapshot of one.
        wait_until: Waits until something is so; takes a word for what is waited for, and for how
            many seconds.
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
        may_hand: Callable[[str], bool],
        wait_until: Callable[[Callable[[], bool], str, float], Awaitable[None]],
        emit: Callable[[Event], None],
        wake: Callable[[], None],
    ) -> None:
        self._documents = documents
        self._core = core
        self._checkpoints = checkpoints
        self._config = config
        self._members = members
        self._takes = takes
        self._may_hand = may_hand
        self._wait_until = wait_until
        self._emit = emit
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        # Agent -> who is down and nobody has taken care of yet, as far as is known.
        self._cases: dict[str, _Case] = {}
        # Who is back, whom this replica may have passed on.
        self._back: set[str] = set()
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
            case AdoptionPassed(agent) if agent in self._cases:
                # It may be this one's turn now.
                case = self._cases[agent]
                case.at = min(case.at, self._loop.time() + self._config.adopt_after)
                case.turns = max(0, case.turns - 1)
                self._news.set()
            case MemberUp(agent) | MemberRetired(agent) | AgentRecovered(agent):
                self._cases.pop(agent, None)
                if not isinstance(event, AgentRecovered):
                    self._back.add(agent)
                    self._news.set()

    async def run(self) -> None:
        """Take care of who is due, for as long as it takes."""
        while True:
            self._news.clear()
            self._forget_passes()
            now = self._loop.time()
            for agent in [agent for agent, case in self._cases.items() if case.at <= now]:
                await self._look_after(agent)
            soonest = min((case.at for case in self._cases.values()), default=None)
            try:
                async with asyncio.timeout_at(soonest):
                    await self._news.wait()
            except TimeoutError:
                pass

    def _forget_passes(self) -> None:
        """What was said of those who are back is no help when they die again."""
        while self._back:
            agent = self._back.pop()
            try:
                casebook.close(self._documents, agent, by=self._documents.agent)
            except CRDTStateError as exc:
                log.warning("%s: %s", self._documents.agent, exc)

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
        """Whether this agent is the one, among those that are up and have not passed, to take care
        of another."""
        mine = self._documents.agent
        living = self._living()
        able = living - self._passed(agent).keys()
        return rendezvous(f"adoption of {agent}", able or living) == mine

    def _living(self) -> set[str]:
        """The agents that are up, this one among them."""
        living = {
            member.agent
            for member in self._members()
            if member.state in ("up", "suspected") and member.role == "agent"
        }
        return living | {self._documents.agent}

    def _passed(self, agent: str) -> dict[str, frozenset[str]]:
        """Who has passed an agent on, and which documents."""
        return casebook.passed(self._documents.find(casebook.DOCUMENT), agent)

    async def _adopt(self, agent: str, writers: Iterable[int], is_last: bool) -> bool:
        """Take in the newest checkpoint of an agent that can be had, and say so. False if the
        tiers fail that may have it, or others are to go on: then it is to be looked at again,
        unless this *is_last*."""
        theirs = await self._checkpoints.of(agent)
        found, brought, lacking = await self._take_newest(theirs)
        if found is None and theirs.failures() and not is_last:
            return False
        mine, passed = self._documents.agent, self._passed(agent)
        # What somebody did not name it has brought.
        left = tuple(sorted(frozenset(lacking).intersection(*passed.values())))
        id = "" if found is None else found.id
        takes_part = self._takes(casebook.DOCUMENT)
        if left and takes_part and not is_last and self._living() - passed.keys() - {mine}:
            event = AdoptionPassed(agent, mine, id, tuple(lacking))
            log.info("%s: passes %s on: cannot bring %s", mine, agent, ", ".join(lacking[:10]))
            casebook.pass_on(self._documents, event)
            self._emit(event)
            return False
        known = {
            name: Version({writer: version[writer] for writer in writers if writer in version})
            for name, version in self._documents.versions()
        }
        token = casebook.token(Cut({name: version for name, version in known.items() if version}))
        done = AgentRecovered(agent, mine, id, token, brought, left)
        log.info("%s: took care of %s: %d changes brought", mine, agent, brought)
        if left:
            names = ", ".join(left[:10])
            log.warning("%s: nobody can bring what %s had saved of %s", mine, agent, names)
        if takes_part:
            tiers = () if found is None else found.tiers
            shared = [url for url in tiers if urlsplit(url).scheme in SHARED_SCHEMES]
            casebook.adopt(self._documents, done, shared)
            casebook.close(self._documents, agent)
        self._emit(done)
        return True

    async def _take_newest(self, theirs: Catalogue) -> tuple[Checkpoint | None, int, list[str]]:
        """Take in the newest that can be; returns it, how many changes that brought, and the
        documents of which it has something that cannot be brought from here."""
        here = dict(self._documents.versions())
        newest = max(theirs.known(), default=None)
        if newest is not None and not is_ahead(
            theirs.find(newest).version, here, lambda name: True
        ):
            # There is nothing in it that is not here.
            return theirs.describe(newest), 0, []
        async for checkpoint, loaded in theirs.newest():
            wanted = [document for document in loaded if self._takes(document.name)]
            manifest = theirs.find(checkpoint.id)
            reason = self._refusal(manifest.writer, manifest.stamp, wanted)
            if reason:
                log.warning("%s: checkpoint %s: %s", self._documents.agent, checkpoint.id, reason)
                continue
            brought, left = 0, [each.name for each in loaded if not self._takes(each.name)]
            for document in wanted:
                brought += await self._take(theirs.agent, document)
                if not document.version <= self._version(document.name):
                    left.append(document.name)
            return checkpoint, brought, sorted(left)
        return None, 0, []

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

    async def _take(self, agent: str, loaded: LoadedDocument) -> int:
        """Take in a document, or what can be handed on of it; returns how many changes that
        brought. Raises InvalidUpdate if it is not what the checkpoint says."""
        name, before = loaded.name, self._count(loaded)
        if loaded.version <= self._version(name):
            return 0
        is_whole = bool(loaded.snapshot) and self._may_hand(name)
        snapshot = Snapshot.decode(loaded.snapshot) if is_whole else None
        changes = [decode_change(data) for data in loaded.changes]
        names = {change.document for change in changes}
        if snapshot is not None:
            names.add(snapshot.document)
        if not names <= {name}:
            raise InvalidUpdate(f"a checkpoint of {agent} has other documents than it says")
        try:
            self._core.take_in(snapshot, changes, agent, self._loop.time())
        except InvalidUpdate as exc:
            if is_whole:
                raise
            log.info("%s: %r of %s, in part: %s", self._documents.agent, name, agent, exc)
        self._wake()
        await asyncio.sleep(0)
        if self._core.is_examining(name):
            try:
                await self._wait_until(
                    lambda: not self._core.is_examining(name), "verdicts", EXAMINED_WITHIN
                )
            except WaitTimeout as exc:
                log.warning("%s: %r of %s: %s", self._documents.agent, name, agent, exc)
        return self._count(loaded) - before

    def _version(self, name: str) -> Version:
        document = self._documents.find(name)
        return document.version if document is not None else Version()

    def _count(self, loaded: LoadedDocument) -> int:
        """How many of its changes are here."""
        here = self._version(loaded.name)
        return sum(min(here.get(writer, 0), seq) for writer, seq in loaded.version.items())
