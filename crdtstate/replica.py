"""
The replica: documents that an agent reads and writes locally, and that merge by themselves.

This is the thin asyncio shell around the sync core (`sync`). Everything happens on the event loop
that opened it: writes wake the *pump*, which seals them, feeds the core, carries out its effects in
order (journal, then send, then tell observers) and arms one timer. What it does is done by its
parts: `Saving` for the journal, `Connections` for the network, `Observers` for whoever watches.
Nothing is decided here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from crdtstate import announcements, arguments, casebook, commands, quarantine, sync, wire
from crdtstate.admission import Door
from crdtstate.adoption import Adoption
from crdtstate.attestation import Attestation
from crdtstate.audit import Audit
from crdtstate.authors import authors_of
from crdtstate.borrowing import Loan, borrow, lease_limit
from crdtstate.certificates import Certificate, is_valid_at
from crdtstate.change import Change, decode_change
from crdtstate.checkpoints import Checkpoint, Checkpoints, default_tier
from crdtstate.clock import Dot, Stamp, Version
from crdtstate.comparing import Divergence
from crdtstate.config import Config
from crdtstate.connections import FAREWELL, Connections
from crdtstate.credentials import Credentials, open_credentials
from crdtstate.cutting import Cutter
from crdtstate.digests import describe
from crdtstate.document import Delivery, Document, EngineFailure
from crdtstate.errors import (
    CorruptStore,
    CRDTStateError,
    InvalidUpdate,
    NotAllowed,
    ReplicaClosed,
    StoreError,
    StoreUnavailable,
    UnsupportedValue,
    UsageError,
    WaitTimeout,
)
from crdtstate.events import (
    ChangeQuarantined,
    ChangeReleased,
    DivergenceDetected,
    EditsUndone,
    Event,
    IdentityRollback,
    KeyRevoked,
    PeerRejected,
    StoreFailed,
)
from crdtstate.examiner import Examiner
from crdtstate.glance import Glance
from crdtstate.identity import draw_writer
from crdtstate.keeping import Keeping
from crdtstate.ladder import Recovery
from crdtstate.link import takes
from crdtstate.lookback import Lookback
from crdtstate.membership import Member
from crdtstate.obeying import Docket, Obeying
from crdtstate.observers import Observers
from crdtstate.pacing import Pace
from crdtstate.quarantine import Quarantined
from crdtstate.recovering import Check, Recovering
from crdtstate.recovery import Ladder, Opened
from crdtstate.resolving import Resolving
from crdtstate.retention import Retention
from crdtstate.revoking import Revoking
from crdtstate.saving import Saving
from crdtstate.sharing import Packets, Sharing
from crdtstate.slots import SEPARATOR
from crdtstate.standing import Standing
from crdtstate.stores import Entry, Saved, Store
from crdtstate.stores.suspects import Suspects
from crdtstate.tiers import Tier
from crdtstate.transports import Http, Listener
from crdtstate.transports import lan as lan_module
from crdtstate.values import pack, unpack
from crdtstate.verdicts import Examine
from crdtstate.waiting import Waiting

log = logging.getLogger("crdtstate")

E = TypeVar("E", bound=Event)

REJECTED_MAX = 8


@dataclass(frozen=True, slots=True)
class Peer:
    """A connected peer.

    Attributes:
        lag: Changes committed here that it has not acknowledged,
        lag_seconds: and for how long the oldest of them, about.
        queued_bytes: Bytes waiting to be sent to it.
    """

    agent: str
    writer: int
    role: str
    address: str | None
    lag: int
    lag_seconds: float
    queued_bytes: int


class Replica(Revoking, Waiting, Keeping, Resolving, Obeying, Sharing, Recovering):
    """A set of replicated documents in this process.

    Use it as ``async with Replica(...) as replica``: inside, it is recovered, listening and
    dialling. Reads and writes are plain Python and immediate; only waiting is ``async``.

    Args:
        agent: The agent's name: stable, for people.
        store: The SQLite file that makes it durable; made on first use. None: memory only.
        listen: The URL to listen on, such as ``ws://127.0.0.1:0`` (any free port, see `address`).
            or ``unix:///path/to.sock``. None: only dial out. Beyond this machine it takes *mesh*.
        peers: URLs of relays or agents to stay connected to. ``wss://host:port#sha256=...`` names
            the fingerprint of the one certificate to trust there.
        mesh: What proves that this replica belongs to a mesh, and others have to prove to it: a
            join token (``crdtjoin1...``), words that all share (16 characters or more), or the
            path of a file with either. None: only processes of the same user on this machine.
        config: Settings.
        durability: What `durable` and sending wait for. ``"process"``: changes survive a kill of
            this process at once, and a power cut after 0.1 s. ``"power"``: both at once.
        role: ``"relay"`` for a replica that is there for others.
        subscribe: The documents to take part in, by name; ``"plan/*"`` names all that begin so.
            None: all. With it, this replica passes nothing on to others.
        lease: Write under a writer that a relay among *peers* lends, and hand it back at the end.
            For agents without a store of which there are many after each other: else each would
            leave a trace in every document. Opening waits for it, up to `Config.lease_timeout`.
        advertise: The URL under which others can reach this replica, if that is not *listen*:
            behind a proxy, when it listens on all interfaces, or with the fingerprint of its own
            certificate.
        lan: Find other replicas on the local network that give the same word here, and be found.
            Needs the extra ``crdtstate[lan]``.
        tls: The certificate to show with ``listen="wss://..."``; for peers, whom to trust.
        http: Answers plain HTTP requests on the listening port.
        checkpoints: The tiers that keep checkpoints, nearest first, such as ``["memory://",
            "sqlite:///agent.ckpt.db", "s3://bucket/run"]``. The first of SQLite, else the first
            of all, is the primary, in which alone they must succeed. If the last is another one
            of SQLite or S3, it is the archive for old ones. With it, a checkpoint is made every
            `Config.checkpoint_interval`. None: only when asked, beside the store
            (``<store>.checkpoints``, made then), or in memory if there is none. When a replica
            is opened, what the newest one of this agent has beyond the store is taken in.
        retention: Which checkpoints are kept; see `Retention`.
        check: Looks, when it is opened, whether what was recovered can be used: called with the
            replica, which it can read and not write, it raises or returns False if not; it may be
            ``async``. Then the next source is tried; see `recovery`. Not called for a replica
            with nothing in it; if all has to come from peers, once they have sent it.

    Raises:
        UsageError: An argument cannot be.
    """

    def __init__(
        self,
        agent: str,
        *,
        store: str | os.PathLike[str] | None = None,
        listen: str | None = None,
        peers: Iterable[str] = (),
        mesh: str | Path | Credentials | None = None,
        config: Config | None = None,
        durability: Literal["process", "power"] = "process",
        role: Literal["agent", "relay"] = "agent",
        subscribe: Iterable[str] | None = None,
        lease: bool = False,
        advertise: str | None = None,
        lan: str | None = None,
        tls: ssl.SSLContext | None = None,
        http: Http | None = None,
        checkpoints: Iterable[str | Tier] | None = None,
        retention: Retention | None = None,
        check: Check | None = None,
    ) -> None:
        arguments.check_agent(agent)
        arguments.check_peers(peers)
        arguments.check_settings(role, config, store, durability)
        if advertise is not None:
            arguments.check_url(advertise)
        if lease and store is not None:
            raise UsageError("lease=True is for agents without a store; this one has its writer")
        self._rng = random.Random()
        super().__init__(agent, draw_writer(self._rng), lambda: time.time_ns() // 1_000_000)
        self.config = config or Config()
        self.durability = durability
        self.role = role
        # Where it listens, once open.
        self.address: str | None = None
        self._store_path = None if store is None else Path(store)
        self._listen_url = listen
        self._peer_urls = list(dict.fromkeys(peers))
        self._credentials = open_credentials(mesh, self._store_path)
        arguments.check_credentials(agent, self._credentials)
        self._authors = authors_of(self._credentials, self.config.signing)
        if lease and self._authors.have_cards:
            raise UsageError("lease=True: in a mesh with certificates each writes in its own name")
        self._writer = self._authors.draw(self._rng)
        self.prover_of, self.scheme = self._authors.prover, self._authors.scheme
        self.may_rule = self._authors.may_rule
        self._door = Door(
            self._credentials,
            self.config.limits,
            has_tls_binding=self.config.tls_binding,
            has_room=lambda: self._connections.has_room(),
            is_revoked=lambda certificate: self._standing.is_revoked(certificate),
            emit=self._emit,
        )
        for url in self._peer_urls if listen is None else [listen, *self._peer_urls]:
            arguments.check_url(url)
            self._door.check(url)
        self._http = http
        self._advertise = advertise
        if lan is not None:
            arguments.check_lan(lan)
            lan_module.check_extra()
        self._lan = lan
        self._tls = tls
        self._subscribe = None if subscribe is None else arguments.check_patterns(subscribe)
        self._is_leasing = self._is_between_loans = lease
        self._session = self._rng.getrandbits(64)
        # While it is checked it can be read, and nothing else.
        self._state: Literal["new", "checking", "open", "closed"] = "new"
        self._store: Store
        self._sync: sync.Sync
        self._lookback: Lookback
        self._loop: asyncio.AbstractEventLoop
        self._saving: Saving
        self._adoption: Adoption
        self._connections = Connections(
            agent,
            self._peer_urls,
            tls,
            self._door,
            emit=self._emit,
            pump=self._pump,
            wake=self._wake,
            rearm=self._arm_timer,
        )
        # What came and went, for metrics.
        self.traffic = self._connections.traffic
        self._observers = Observers(agent, self.config.events_max, self._wake_if_idle)
        # What the process died of, perhaps.
        self._suspects: Suspects | None = None
        # Tries what others write in native documents.
        self._examiner = Examiner(agent, self._note_verdict, self._spawn)
        self._interval = 0.0 if checkpoints is None else self.config.checkpoint_interval
        tiers, made_late = default_tier(self._store_path)
        if checkpoints is not None:
            tiers, made_late = arguments.check_checkpoints(checkpoints), None
        arguments.check_retention(retention)
        self._checkpoints = Checkpoints(
            agent,
            tiers,
            self.config,
            self._emit,
            retention=retention,
            attestation=Attestation(
                self._authors, lambda: self._credentials.certificate, self._may_be_revoked
            ),
            made_late=made_late,
        )
        if check is not None and not callable(check):
            raise UsageError(f"check is a function of the replica, not {check!r}")
        self._check = check
        self._recovery: Recovery | None = None
        self._listener: Listener | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        # Where the pump is: called soon, or running.
        self._is_awake = False
        self._is_pumping = False
        # uvloop's handles do not tell when, and may be plain ones.
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0
        self._pace = Pace(self.config.seal_delay)
        self._woken_at = 0.0
        # Own seq by document at opening: what peers may know of this writer.
        self._base: dict[str, int] = {}
        self._opened: dict[str, int] = {}
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._audit = Audit(self, self._tell_decided)
        self._docket = Docket(self)
        self._keyring = self._credentials.keyring(self._beside("keys"))
        self._packets = Packets(self._beside("shared"))
        # Peer -> what was refused of it the last time, of the last few.
        self._rejected: dict[str, str] = {}

    # Opening and closing

    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise UsageError("a Replica is opened once; make a new one")
        self._loop = asyncio.get_running_loop()
        self._prepare_proof()
        loan = await self._borrow() if self._is_leasing else None
        opened: Opened | None = None
        self._state = "checking"
        try:
            opened = await self._climb()
            self._begin(opened)
            self._state = "open"
            if self._listen_url is not None:
                await self._listen(self._listen_url)
            await self._open_checkpoints()
        except BaseException:
            self._state = "closed"
            self._connections.close()
            self._observers.close()
            for task in self._tasks:
                task.cancel()
            try:
                if self._listener is not None:
                    await self._listener.close()
                await self._checkpoints.release()
            finally:
                if opened is not None:
                    opened.store.close(clean=False)
            raise
        self._tell_recovery(opened.recovery)
        if opened.checks_later or opened.recovery.changes:
            self._spawn(self._validate(opened), "validation")
        if self.role == "agent":
            self._spawn(self._adoption.run(), "adoption")
        self._tell_electorate()
        self._wake()
        if self._lan is not None:
            self._spawn(self._search(self._lan), "local network")
        if loan is not None:
            self._sync.borrow(loan.lender, loan.terms.seqs)
            await self._await_loan(loan)
        if takes(self._subscribe, commands.CONTROL):
            self._docket.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Save, say goodbye and stop. Idempotent; never raises for the network's or disk's sake."""
        if self._state != "open":
            return
        try:
            await self._docket.close()
            await self._checkpoints.close()
            self._seal_quietly()
            self._pump()
            if self._is_leasing:
                await self._give_back()
            self._sync.leave(self._loop.time())
            self._pump()
            await self._connections.say_goodbye()
        finally:
            self._state = "closed"
            self._connections.close()
            self._observers.close()
            for task in self._tasks:
                task.cancel()
            try:
                if self._listener is not None:
                    await self._listener.close()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                await self._checkpoints.release()
            finally:
                # Also if who closes it is cancelled meanwhile.
                self._let_go()

    def _let_go(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._suspects is not None:
            # While the store is nobody else's.
            self._suspects.close()
        self._saving.close()
        self._close_documents()
        for _, waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(ReplicaClosed(f"{self.agent}: closed while waiting"))

    async def _listen(self, url: str) -> None:
        tls = self._tls if url.startswith("wss:") else None
        self._listener = await self._connections.listen(url, http=self._http, tls=tls)
        self.address = self._listener.address
        self._sync.introduce(self._hello(), self._loop.time())

    def _prepare_proof(self) -> None:
        """Have at hand what others will ask for: what is wrong with that is said before opening."""
        urls = [*self._peer_urls, *([] if self._listen_url is None else [self._listen_url])]
        if any(not url.startswith("memory:") for url in urls):
            self._door.credentials()

    def _spawn(self, work: Any, name: str) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = self._loop.create_task(work, name=f"{self.agent}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _climb(self) -> Opened:
        """Open the store and load the documents, from wherever they can be had."""
        check = self._check
        ladder = Ladder(
            self,
            self._writer,
            None if self._is_leasing else self._checkpoints,
            self.config,
            path=self._store_path,
            durability=self.durability,
            takes=lambda name: takes(self._subscribe, name),
            check=None if check is None else lambda: check(self),
            has_peers=bool(self._peer_urls or self._listen_url or self._lan),
            is_own=self._authors.is_own,
            vouch=self._authors.vouch,
            draw=lambda: self._authors.draw(self._rng),
        )
        self._audit.is_loading = True
        try:
            return await ladder.climb()
        finally:
            self._audit.is_loading = False

    def _begin(self, opened: Opened) -> None:
        """Take up work with what was loaded."""
        self._store = opened.store
        self._check_mesh()
        now, seeds = self._loop.time(), self._peer_urls
        self._sync = sync.Sync(
            self, self._hello(), self.config, self._rng, now, seeds, authors=self._authors
        )
        self._standing = Standing(
            self,
            self._authors,
            self._credentials.root if self._authors.have_cards else None,
            emit=self._tell_standing,
            closed=self._close_lane,
            is_own=lambda writer: writer == self._writer or writer in self._sync.former,
            takes=lambda name: takes(self._subscribe, name) and self._authors.may_take(name),
        )
        self._sync.former.update(opened.former - {self._writer})
        self._sync.examines = True
        if opened.suspects is not None:
            self._suspects = opened.suspects
            for found in self._suspects.quarantined:
                what = (found.document, found.writer, found.seq, "", str(found))
                self._sync.quarantine(sync.Aside(found.id, *what, found.at_ms << 16))
                self._emit(ChangeQuarantined(*what))
        for name, version in self.versions():
            self._base[name] = self._opened[name] = version.get(self._writer, 0)
            store, stored = self._store, opened.stored.get(name, Version())
            self._sync.restore(name, stored, store.floor(name), store.size(name))
            if stored != version:
                self._sync.keep(name, now)
            self.resume_clock(self._documents[name])
        self._saving = Saving(self._store, self._sync, self._emit, self._wake)
        self._lookback = Lookback(
            self,
            self._store,
            self._sync,
            self._checkpoints,
            settle=self._settle,
            wait_until=self._wait_until,
            takes=lambda name: takes(self._subscribe, name),
            authors=self._authors,
        )
        self._adoption = Adoption(
            self,
            self._sync,
            self._checkpoints,
            self.config,
            members=self.members,
            takes=lambda name: takes(self._subscribe, name) and self._authors.may_take(name),
            may_hand=self._authors.may_hand,
            wait_until=self._wait_until,
            emit=self._emit,
            wake=self._wake,
        )
        self._connections.open(self._sync)
        self._saving.start(self.agent, self._writer)
        self._audit.begin()
        self._admit_foreign()
        self._standing.open(self._loop.time())

    def _load(self, item: Saved | Entry, only: Document | None = None) -> None:
        what = "snapshot"
        self._audit.is_loading = True
        try:
            if isinstance(item, Saved):
                self.load_snapshot(item.document, item.data, only)
            else:
                what = f"change {item.writer:x}:{item.seq}"
                self.load_change(item.document, item.data, only)
        except (InvalidUpdate, EngineFailure) as exc:
            path = self._store.path or "memory"
            hint = f"check it with: crdtstate verify {path}"
            raise CorruptStore(path, f"document {item.document!r}: {what}: {exc}; {hint}") from exc
        finally:
            self._audit.is_loading = False

    # Borrowing a writer

    async def _borrow(self) -> Loan:
        """Have a writer lent by one of the peers, before anything else."""
        async with lease_limit(self.agent, self.config.lease_timeout):
            loan = await borrow(self._hello(), self._peer_urls, self._door, self._tls)
        self._writer = loan.terms.writer
        return loan

    async def _await_loan(self, loan: Loan) -> None:
        """Wait until everything is here that was written under the borrowed writer."""
        try:
            async with lease_limit(self.agent, self.config.lease_timeout):
                await self._until(self._sync.has_borrowed_all, None, "the loan")
            self._is_between_loans = False
        except BaseException:
            self._is_leasing = False
            await self.close()
            raise

    async def _give_back(self) -> None:
        """Hand the borrowed writer back once a relay has all that was written under it."""

        def give_back() -> bool:
            self._is_between_loans = self._sync.give_back()
            return self._is_between_loans

        try:
            await self._until(give_back, FAREWELL, "a relay to have everything")
            self._pump()
        except WaitTimeout:
            log.info("%s: the leased writer could not be handed back", self.agent)

    def _hello(self) -> wire.Hello:
        return wire.Hello(
            wire.PROTOCOL_MIN,
            wire.PROTOCOL_MAX,
            self._writer,
            self._session,
            self.agent,
            self.role,
            self._advertise or (None if _is_anywhere(self.address) else self.address),
            is_durable=self._store_path is not None,
            documents=self._subscribe,
            head=self._authors.head(self._writer),
        )

    def system_document(self, name: str, *, shared: bool = False) -> Document:
        """See `DocumentSet.system_document`; of those that this replica subscribes to."""
        if isinstance(name, str) and not takes(self._subscribe, name):
            raise UsageError(f"{name!r} is not among the documents this replica subscribes to")
        return super().system_document(name, shared=shared)

    def _on_write(self, document: Document) -> None:
        if self._is_between_loans:
            raise ReplicaClosed(f"{self.agent}: its leased writer is not to be written under now")
        if not self._may_write(document.name):
            own = self._credentials.certificate
            is_expired = own is not None and not is_valid_at(own, self._wall())
            raise NotAllowed(self.agent, "w", document.name, is_expired=is_expired)
        if self._state == "checking":
            raise UsageError(
                f"{self.agent}: a check reads; it cannot write, as nothing is open yet"
            )
        super()._on_write(document)

    def _may_write(self, document: str) -> bool:
        if self._authors.may_write(document, self._wall()):
            return True
        # The certificate may have been renewed since.
        return self._door.renew() and self._authors.may_write(document, self._wall())

    def _make(self, name: str, shared: bool) -> Document:
        document = super()._make(name, shared)
        document.strong = self
        document.recall = lambda container, key: self._recall(name, container, key)
        return document

    def _delivered(self, delivery: Delivery) -> None:
        super()._delivered(delivery)
        if self._state == "open":
            self._standing.note(delivery)
        self._audit.note(delivery)
        self._tell_quarantine(delivery)
        self._docket.note(delivery)

    def _shown(self, document: Document, paths: list[str], agent: str) -> None:
        super()._shown(document, paths, agent)
        if self._state == "open" and not self._audit.is_loading:
            self._observers.tell_paths(document, paths, agent, local=False)
            self._sync.shown(document, self._loop.time())

    def _tell_quarantine(self, delivery: Delivery) -> None:
        """Tell what the rules of documents refuse, and what was released."""
        if self._state != "open" or self._audit.is_loading:
            return
        document, change = delivery.document, delivery.change
        for dot, refusal in delivery.refused:
            self.traffic.changes_hidden += 1
            paths = tuple(describe(path) for path in refusal.paths)
            told = (document.name, *dot, refusal.agent, refusal.reason, paths)
            self._emit(ChangeQuarantined(*told, is_hidden=True))
        if document.name == quarantine.QUARANTINE:
            by = change.origin.agent if change is not None else ""
            for name, dot in quarantine.heard(delivery.paths):
                if dot in quarantine.released(document, name):
                    self._emit(ChangeReleased(name, *dot, by))

    def _check_usable(self) -> None:
        if self._state == "new":
            raise ReplicaClosed(f"{self.agent}: not open; use it inside 'async with Replica(...)'")
        if self._state == "closed":
            raise ReplicaClosed(f"{self.agent}: closed")
        if self._state == "checking":
            return
        if self._saving.unsaved_bytes > self.config.unsaved_bytes:
            assert self._store.failure is not None
            raise StoreUnavailable(self._store.path or "memory", str(self._store.failure))

    async def _search(self, space: str) -> None:
        """Stay connected to those who are on the local network."""

        def found(url: str) -> None:
            self._sync.add_seed(url, self._loop.time())
            self._wake()

        def lost(url: str) -> None:
            if url not in self._peer_urls:
                self._sync.remove_seed(url)

        name = f"{self._session:016x}"
        await lan_module.Lan(space, name, self.address, found, lost).run()

    def connect(self, url: str) -> None:
        """Stay connected to the peer at *url* from now on, as if it had been in `peers`."""
        self._check_usable()
        arguments.check_url(url)
        self._door.check(url)
        if url not in self._peer_urls:
            self._peer_urls.append(url)
            self._sync.add_seed(url, self._loop.time())
            self._wake()

    # Guests

    def draw_guest(self) -> int:
        """A writer beside the own one, to bring in what others write who are no members."""
        self._check_usable()
        return self._authors.draw(self._rng)

    def guest_document(self, name: str, writer: int) -> Document:
        """An empty document of lanes that such a writer writes, for whoever feeds it: no part of
        this replica."""
        document = Document(
            name,
            writer=writer,
            agent=self.agent,
            clock=self._clock,
            wall=self._wall,
            on_write=lambda _: None,
        )
        document.prover, document.polls = self.prover_of(writer), self.polls
        # What is fed to it was judged.
        document.admits_unjudged = True
        return document

    def take_guest(self, change: Change) -> None:
        """Bring in a change that was made under such a writer; it must be ready. It is checked as
        if a peer had sent it, which may take a while: `Document.on_delivered` tells, or the event
        `ChangeQuarantined`.

        Raises:
            NotAllowed: This replica may not write the document.
        """
        self._check_usable()
        if not self._may_write(change.document):
            raise NotAllowed(self.agent, "w", change.document)
        self._sync.take_guest(change, self._loop.time())
        self._wake()

    # Checkpoints and the audit

    async def _open_checkpoints(self) -> None:
        cutter = Cutter(self, self._store, self._sync, self._settle, self._wait_until)
        checkpoints, interval = self._checkpoints, self._interval
        await checkpoints.open(cutter, self._spawn, self._announce, interval)

    def _announce(self, checkpoint: Checkpoint) -> None:
        if takes(self._subscribe, announcements.DOCUMENT):
            try:
                announcements.announce(self, checkpoint)
            except CRDTStateError as exc:
                log.info("%s: checkpoint %s is not announced: %s", self.agent, checkpoint.id, exc)

    def _record_command(self, agent: str, detail: str) -> None:
        """A command of *agent* was executed or refused here: put it on record."""
        self._saving.note(self._audit.commanded(agent, self.next_stamp(), detail))

    def _beside(self, what: str) -> Path | None:
        """The file beside the store for something else; None without a store."""
        return None if self._store_path is None else Path(f"{self._store_path}.{what}")

    def _tell_decided(self, place: tuple[str, str, str], agent: str) -> None:
        """Votes decide something else at a place than before: it reads differently."""
        name, container, key = place
        paths = [container + SEPARATOR + key]
        self._observers.tell_paths(self._documents[name], paths, agent, local=False)

    def _settle(self) -> None:
        """Seal what is open and hand it to the store."""
        if self._transaction is None:
            self._seal_quietly()
        self._pump()

    # Presence

    def present(self, value: Any, *, ttl: float = 30.0) -> None:
        """Show *value* to all members until it is replaced, or taken back with None, or this
        replica has been gone for *ttl* seconds. It is kept nowhere, and small: up to 4 KB packed.

        Raises:
            UnsupportedValue: *value* cannot be shared; what was shown before still is.
            UsageError: *ttl* is not from 1 to 3,600 seconds.
        """
        self._check_usable()
        if not isinstance(ttl, (int, float)) or not 1 <= ttl <= 3600:
            raise UsageError(f"ttl is from 1 to 3600 seconds, not {ttl!r}")
        packed = None if value is None else pack(value, "presence")
        if packed is not None and len(packed) > wire.PRESENCE_MAX:
            raise UnsupportedValue("presence", f"more than {wire.PRESENCE_MAX} bytes packed")
        self._sync.show(packed, float(ttl), self._loop.time())
        self._wake()

    def presence(self) -> dict[str, Any]:
        """What all agents show now, this one included: agent -> value."""
        if self._state != "open":
            return {}
        shown = self._sync.presence
        found = {agent: unpack(value) for _, agent, value in shown.values(self._loop.time())}
        if shown.own is not None:
            found[self.agent] = unpack(shown.own)
        return dict(sorted(found.items()))

    # Watching

    def on(self, event: type[E], handler: Callable[[E], object]) -> Callable[[], None]:
        """Call *handler* with every event of the type *event*, after it happened.

        Handlers run on the event loop, one after the other. One that raises is logged and harms
        nothing. Returns a function that ends it.

        Raises:
            UsageError: *event* is no type of event, or *handler* is no plain function.
        """
        return self._observers.on(event, handler)

    def events(self, *types: type[Event]) -> AsyncIterator[Event]:
        """Iterate over events of the given types (all, without any) from now on, until this
        replica is closed.

        Who does not keep up misses the oldest, beyond `Config.events_max`.
        """
        return self._observers.events(*types)

    def call_handlers(self) -> None:
        """Call the handlers of all that has happened so far, before this returns: who keeps
        something up to date with `on` has it up to date then. Not from a handler."""
        self._check_usable()
        self._pump()
        while self._observers.is_behind:
            self._observers.dispatch()

    # Looking

    @property
    def writer(self) -> int:
        """Whose lane this replica writes: its number in versions."""
        return self._writer

    def peers(self) -> list[Peer]:
        """The connected peers, by name."""
        if self._state != "open":
            return []
        found = []
        for link in self._sync.peers:
            assert link.hello is not None
            hello = link.hello
            lag = self._sync.lag(link.peer)
            seconds = self._sync.lag_seconds(link.peer, self._loop.time())
            who = (hello.agent, hello.writer, hello.role, hello.address)
            found.append(Peer(*who, lag, seconds, self._sync.queued_bytes(link.peer)))
        return sorted(found, key=lambda peer: (peer.agent, peer.writer))

    def members(self) -> list[Member]:
        """All known members of the mesh, this one included, by name."""
        if self._state != "open":
            return []
        found = self._sync.mesh.members.members()
        return sorted(found, key=lambda member: (member.agent, member.writer))

    def unreachable(self) -> dict[str, str]:
        """The addresses that are being dialled without success, and why."""
        return dict(self._connections.unreachable)

    def status(self) -> dict[str, Any]:
        """A summary of plain values, for people and monitoring."""
        glance = self.glance()
        return {
            "agent": self.agent,
            "role": self.role,
            "writer": f"{self._writer:x}",
            "address": self.address,
            "ready": glance.is_open and glance.store_failure is None,
            "store": glance.store,
            "store_failure": glance.store_failure,
            "recovery": None if glance.recovery is None else glance.recovery.as_dict(),
            "peers": [peer.agent for peer in self.peers()],
            "unreachable": self.unreachable(),
            "documents": {name: version.total for name, version in sorted(self.versions())},
            "conflicts": self.count_conflicts() if glance.is_open else 0,
            "pending": glance.pending,
            "missing": glance.missing,
            "divergences": [found._asdict() for found in self._divergences()],
        }

    def glance(self) -> Glance:
        """How it is doing, for those who ask often."""
        store = None if self._store_path is None else str(self._store_path)
        if self._state != "open":
            return Glance(False, store, None, 0, 0, 0, {})
        return Glance(
            True,
            store,
            None if self._store.failure is None else str(self._store.failure),
            self._sync.pending_count,
            self._sync.missing_count(),
            self._sync.copies,
            {name: self._store.kept(name) for name in self.documents()},
            *self._checkpoints.glance(),
            divergences=len(self._divergences()),
            recovery=self._recovery,
        )

    def _divergences(self) -> list[Divergence]:
        """Where this replica and others differ, as far as they have compared."""
        return list(self._sync.comparing.alarms.values()) if self._state == "open" else []

    def __repr__(self) -> str:
        if self._state != "open":
            return f"<Replica {self.agent} {'not open' if self._state == 'new' else 'closed'}>"
        peers, documents = len(self._sync.peers), len(self._documents)
        return f"<Replica {self.agent} {peers} peers {documents} documents>"

    # The pump

    def _written(self) -> None:
        if self._sealed:
            self._tell_sealed()
            self._wake_if_idle()
        else:
            self._wake()

    def _wake_if_idle(self) -> None:
        """Pump soon, for what a pump that is under way takes along."""
        if not self._is_pumping:
            self._wake()

    def _wake(self) -> None:
        if not self._is_awake and self._state == "open":
            self._is_awake = True
            self._woken_at = time.perf_counter()
            self._loop.call_soon(self._take_turn)

    def _take_turn(self) -> None:
        self._pace.waited(time.perf_counter() - self._woken_at)
        self._pump()

    def _pump(self) -> None:
        """Seal what was written, let the core decide, do what it says."""
        self._is_awake = False
        if self._state == "checking":
            raise UsageError(f"{self.agent}: a check reads; it cannot wait, as nothing is open yet")
        if self._is_pumping or self._state != "open":
            return
        self._is_pumping = True
        try:
            if self._open and self._transaction is None and not self._saving.is_busy:
                self._seal_in_time()
            self._saving.note_progress()
            while effects := self._sync.effects():
                self._carry_out(effects)
                self._saving.note_progress()
                self._standing.look(self._loop.time())
            self._saving.flush()
            self._arm_timer()
        finally:
            self._is_pumping = False
        self._check_waiters()
        self._observers.dispatch()

    def _seal_in_time(self) -> None:
        now = self._loop.time()
        if now >= self._pace.until:
            self._seal_quietly()
            self._pace.sealed(now)

    def _seal_quietly(self) -> None:
        """Seal what is open; there is no caller to tell what could not be."""
        try:
            self._seal_open()
        except UsageError as exc:
            log.error("%s: edits were undone: %s", self.agent, exc)
            self._emit(EditsUndone(str(exc)))

    def _tell_sealed(self) -> None:
        """Let the core know of every change at once: no snapshot may hold one it does not (S3)."""
        sealed = self._hand_over()
        self.traffic.changes_out += len(sealed)
        self._sync.local_changes((change for change, _ in sealed), self._loop.time())
        for change, paths in sealed:
            document = self._documents[change.document]
            if change.shared:
                self._examiner.feed(change)
            self._observers.tell_paths(document, paths, self.agent, local=True)

    def _carry_out(self, effects: list[sync.Effect]) -> None:
        try:
            self._carry_out_in_order(effects)
        finally:
            # Whatever failed, what was delivered is saved: the journal has no holes.
            self._saving.flush()

    def _carry_out_in_order(self, effects: list[sync.Effect]) -> None:
        for effect in effects:
            match effect:
                case sync.Transmit(peer):
                    self._connections.transmit(peer)
                case sync.Persist(number, change):
                    records = self._audit.take(change.document, change.dot)
                    self._saving.add(number, change, records)
                case sync.SaveSnapshot(number, name, version, data):
                    records = self._audit.take_with_snapshot(name)
                    self._saving.save(number, Saved(name, version, data), records)
                    # What it contains cannot be taken out of the store now (see `_reidentify`).
                    own = version.get(self._writer, 0)
                    self._base[name] = max(own, self._base.get(name, 0))
                case sync.Delivered(document, change, paths, agent):
                    self.traffic.changes_in += change is not None
                    self._observers.tell_paths(document, paths, agent, local=False)
                    for saved in announcements.heard(document, paths):
                        self._emit(saved)
                    for told in casebook.heard(document, paths):
                        self._emit(told)
                case sync.Fetch(peer, name, ranges):
                    self._saving.fetch(peer, name, ranges)
                case sync.Dial(url):
                    self._spawn(self._connections.dial(url), f"dial {url}")
                case sync.HangUp(peer, code, reason):
                    self._connections.hang_up(peer, code, reason)
                case sync.Emit(event):
                    self._emit(event)
                case sync.Hurry():
                    self._store.hurry()
                case Examine():
                    self._examiner.ask(effect)
                case sync.Rebuild(name):
                    self._saving.flush()
                    self._rebuild(name)
                case sync.Fork(change, seq):
                    self._saving.flush()
                    self._note_fork(change, seq)
                case sync.Reidentify(reason, keeps):
                    self._saving.flush()
                    self._reidentify(reason, keeps)
                    return

    def _emit(self, event: Event) -> None:
        if isinstance(event, PeerRejected):
            self._rejected[event.agent] = f"refused: {event.reason}"
            if len(self._rejected) > REJECTED_MAX:
                del self._rejected[next(iter(self._rejected))]
            if (record := self._audit.rejected(event.agent, event.reason)) is not None:
                self._saving.note(record)
        if isinstance(event, DivergenceDetected):
            where = f"{event.path!r} of {event.document!r}, in lane {event.writer:x}"
            log.error("%s: differs from %s at %s", self.agent, event.agent, where)
        if self.role == "agent" and self._state == "open":
            self._adoption.note(event)
        self._observers.tell(event)

    def _arm_timer(self) -> None:
        at = min(self._sync.next_deadline(), self._standing.next_deadline())
        if self._open and self._transaction is None:
            late = self._loop.time() + self.config.seal_delay
            at = min(at, late if self._saving.is_busy else self._pace.until)
        if self._timer is not None:
            if self._timer_at == at and not self._timer.cancelled():
                return
            self._timer.cancel()
        self._timer, self._timer_at = self._loop.call_at(at, self._tick), at

    def _tick(self) -> None:
        self._timer = None
        now = self._loop.time()
        self._pace.waited(now - self._timer_at)
        if now >= self._sync.next_deadline():
            self._sync.tick(now)
        elif self._transaction is None:
            self._seal_quietly()
        self._standing.look(now)
        self._pump()

    # What happens seldom

    def _may_be_revoked(self, certificate: Certificate) -> bool:
        """Whether a member is one no more. Before all is loaded nobody can tell: only this one's
        present key is sure."""
        if self._state == "open":
            return self._standing.is_revoked(certificate)
        return certificate.key != self._credentials.public

    def _check_mesh(self) -> None:
        """Raise UsageError if what was loaded is signed, and this replica has nothing to sign with:
        what it writes would be refused by all others."""
        if self._credentials.kind == "member":
            return
        for name, _ in self.versions():
            if self._documents[name].cards:
                raise UsageError(
                    f"{self._store_path}: {name!r} is signed by members of a mesh; open it with "
                    "this agent's join token: mesh=Path(FILE), or --mesh FILE"
                )

    def _admit_foreign(self) -> None:
        """What was written in another mesh, or in none, has proofs that nobody here believes. It is
        handed on as a snapshot, by a member who may."""
        if not self._authors.are_checked:
            return
        for name, _ in self.versions():
            document = self._documents[name]
            for writer, card in list(document.cards.items()):
                try:
                    self._authors.certificate(writer, card)
                except InvalidUpdate:
                    # Of another mesh: nobody here takes a snapshot with it.
                    del document.cards[writer]
                    self.foreign.add(name)
            document.agents.update(self._authors.unproven(document.agents, document.cards))
            if name in self.foreign:
                snapshot = document.snapshot()
                saved = Saved(name, snapshot.version, snapshot.encode())
                self._store.compact(saved, 0)
                self._sync.compacted(name, self._store.floor(name))
                log.info("%s: %r was written in another mesh", self.agent, name)

    def _reloaded(self, document: Document) -> None:
        super()._reloaded(document)
        self._standing.reloaded(document)

    def _note_fork(self, change: Change, seq: int) -> None:
        """A change came that does not fit to the change *seq* of its writer that is here."""
        found, _ = self._store.read(change.document, [(change.writer, seq, seq)], 1)
        agent = change.origin.agent
        log.error("%s: %s has gone on in two ways in %r", self.agent, agent, change.document)
        for data in found:
            held = decode_change(data)
            ids = f"changes {held.id.hex()} and {change.id.hex()} of {change.document!r}"
            if (record := self._audit.rejected(agent, f"went on in two ways: {ids}")) is not None:
                self._saving.note(record)
            self._standing.found(change, held)

    def _tell_standing(self, event: Event) -> None:
        self._emit(event)
        if isinstance(event, KeyRevoked):
            log.warning("%s: the key of %s is revoked: %s", self.agent, event.agent, event.reason)
            self._spawn(self._connections.recheck(), "revocation")

    def _close_lane(self, name: str, writer: int) -> None:
        """Nothing more of a writer is taken in."""
        self._sync.closed(name, writer, self._loop.time())
        self._wake()

    def quarantined(self, document: str | None = None) -> list[Quarantined]:
        """See `DocumentSet.quarantined`. After those come the changes that this replica alone keeps
        out, because pycrdt did not survive them; they name no paths."""
        asides = self._sync.quarantined() if self._state == "open" else []
        return super().quarantined(document) + [
            Quarantined(
                aside.document,
                Dot(aside.writer, aside.seq),
                aside.agent,
                aside.reason,
                (),
                Stamp(aside.stamp),
            )
            for aside in asides
            if document in (None, aside.document)
        ]

    def release(self, item: Quarantined, *, message: str = "") -> None:
        """See `DocumentSet.release`. A change that pycrdt did not survive is tried again, by this
        replica alone, once a peer sends it."""
        self._check_usable()
        for aside in self._sync.quarantined() if self._state == "open" else []:
            if isinstance(item, Quarantined) and aside[1:4] == (item.document, *item.dot):
                if self._suspects is not None:
                    self._suspects.release(aside.id)
                self._sync.release(aside.id, self._loop.time())
                self._wake()
                return
        super().release(item, message=message)

    def _note_verdict(self, number: int, fault: str | None) -> None:
        if self._state == "open":
            self._sync.examined(number, fault, self._loop.time())
            self._wake()

    def _rebuild(self, name: str) -> None:
        """Load a document from the store again, because its engine failed."""
        document = self._documents[name]
        self._examiner.forget(name)
        self.reload(document, self._writer, self._load_document)
        self._sync.rebuilt(name, self._loop.time())
        self._wake()

    def _load_document(self, document: Document) -> None:
        for item in self._store.load():
            if item.document == document.name:
                self._load(item, document)

    def _reidentify(self, reason: str, keeps: bool = False) -> None:
        """Go on under a new writer, because peers know more of the present one than we do.

        What was written since opening, and no peer has acknowledged, got dots that others use for
        something else. It is taken out of the journal and written again, by the new writer. If it
        *keeps* them, all that is stored stays.
        """
        old, new = self._writer, self._authors.draw(self._rng)
        if keeps:
            self._base = {name: version.get(old, 0) for name, version in self.versions()}
        for name, seq in self._sync.own_acked.items():
            self._base[name] = max(seq, self._base.get(name, 0))
        try:
            self._store.forget(old, self._base)
            self._saving.start(self.agent, new)
        except StoreError as exc:
            # The next thing that a peer says of our writer brings it up again.
            log.error("%s: cannot go on as another writer now: %s", self.agent, exc)
            self._emit(StoreFailed(str(exc)))
            self._sync.reidentify_later()
            return
        self._writer = new
        self._checkpoints.disown(old, self._base)
        taken_back = {
            name: self._base.get(name, 0)
            for name, version in self.versions()
            if version.get(old, 0) > self._base.get(name, 0)
        }
        self._base = {}
        self._opened = {}
        self._sync.reidentified(self._hello(), self._loop.time())

        def load(document: Document) -> None:
            self._load_document(document)
            name, store = document.name, self._store
            self._sync.restore(name, document.version, store.floor(name), store.size(name))

        for document in list(self._documents.values()):
            self._examiner.forget(document.name)
            self.reload(document, new, load)
        self._audit.begin()
        self._standing.say_again()
        self._tell_taken_back(old, taken_back)
        self._emit(IdentityRollback(old, new, reason))
        self._wake()


def _is_anywhere(address: str | None) -> bool:
    """Whether an address names no host: all interfaces are listened on."""
    return address is not None and urlsplit(address).hostname in ("0.0.0.0", "::")  # noqa: S104
