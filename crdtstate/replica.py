"""
The replica: documents that an agent reads and writes locally, and that merge by themselves.

This is the thin asyncio shell around the sync core (`sync`). Everything happens on the event loop
that opened it: writes wake the *pump*, which seals them, feeds the core, carries out its effects in
order (journal, then send, then tell observers) and arms one timer. Each connection has one task
that reads and one that writes; each address to dial has one that never gives up. Nothing is decided
here.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import random
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit

from crdtstate import sync, wire
from crdtstate.clock import Cut, Version
from crdtstate.config import Config
from crdtstate.consistency import Confirm, Confirmation, Receipt, StrongRead, StrongWrite
from crdtstate.crdts import Map, Register
from crdtstate.document import Document, EngineFailure
from crdtstate.documents import DocumentSet
from crdtstate.errors import (
    CorruptStore,
    InvalidUpdate,
    LeaseRefused,
    ProtocolError,
    ReplicaClosed,
    StoreError,
    StoreUnavailable,
    TransportError,
    UnsupportedValue,
    UsageError,
    WaitTimeout,
)
from crdtstate.events import (
    Changed,
    ConflictFound,
    ConflictResolved,
    EditsUndone,
    Event,
    IdentityRollback,
    PeerRejected,
    StoreFailed,
    StoreRecovered,
)
from crdtstate.identity import draw_writer, may_keep_writer
from crdtstate.link import takes
from crdtstate.membership import Member
from crdtstate.slots import SEPARATOR
from crdtstate.stores import Entry, Saved, Store
from crdtstate.stores.journal import Journal
from crdtstate.stores.memory import MemoryStore
from crdtstate.transports import Connection, Http, Listener, check_scheme, dial, listen
from crdtstate.transports import lan as lan_module
from crdtstate.values import pack, unpack, unpack_key

log = logging.getLogger("crdtstate")

E = TypeVar("E", bound=Event)

DIAL_TIMEOUT = 3.0
"""Short: when a network is whole again, the next attempt must not wait for the last one."""

STORE_RETRY = 1.0
FAREWELL = 1.0
"""How long closing waits for what is queued to leave."""

STRANGERS_MAX = 100
"""Connections above `Config.links_max` whose other side has not said yet who it is."""

PENDING_EVENTS_MAX = 1_000_000
"""Events that wait for handlers: as many as a large document has places. The oldest go first."""

DISPATCH_TIME = 0.01
"""Seconds for which handlers are called before connections have their turn."""

REJECTED_MAX = 8

KINDS = {"m": "map", "c": "counter", "r": "register", "s": "set", "y": "native"}


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


@dataclass(slots=True)
class Traffic:
    """What this replica has received and sent since it was opened."""

    messages_in: int = 0
    messages_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    changes_in: int = 0
    """Changes of others that were taken in; those that came with a snapshot are not counted."""
    changes_out: int = 0
    """Own changes."""


class _Loan(NamedTuple):
    """A writer that was lent: by the relay of which writer, and on which terms."""

    lender: int
    terms: wire.Lend


class _Link:
    """A connection's shell: whether its task has to send, and why it ended."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.wake = asyncio.Event()
        self.is_sending = False
        self.ending: tuple[wire.ByeCode, str] | None = None


class Replica(DocumentSet):
    """A set of replicated documents in this process.

    Use it as ``async with Replica(...) as replica``: inside, it is recovered, listening and
    dialling. Reads and writes are plain Python and immediate; only waiting is ``async``.

    Args:
        agent: The agent's name: stable, for people.
        store: The SQLite file that makes it durable; made on first use. None: memory only.
        listen: The URL to listen on, such as ``ws://127.0.0.1:0`` (any free port, see `address`).
            None: only dial out. Who can reach the port can read and write everything: listen on
            the loopback interface or on a network that you trust.
        peers: URLs of relays or agents to stay connected to.
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
            behind a proxy, or when it listens on all interfaces.
        lan: Find other replicas on the local network that give the same word here, and be found.
            Needs the extra ``crdtstate[lan]``.
        tls: The certificate to show with ``listen="wss://..."``; for peers, whom to trust.
        http: Answers plain HTTP requests on the listening port.

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
        config: Config | None = None,
        durability: Literal["process", "power"] = "process",
        role: Literal["agent", "relay"] = "agent",
        subscribe: Iterable[str] | None = None,
        lease: bool = False,
        advertise: str | None = None,
        lan: str | None = None,
        tls: ssl.SSLContext | None = None,
        http: Http | None = None,
    ) -> None:
        if not isinstance(agent, str) or not 0 < len(agent) <= 100 or not agent.isprintable():
            raise UsageError(f"an agent's name has 1 to 100 printable characters, not {agent!r}")
        if isinstance(peers, str) or not isinstance(peers, Iterable):
            raise UsageError("peers is a list of URLs, not one URL")
        if role not in ("agent", "relay"):
            raise UsageError(f'role is "agent" or "relay", not {role!r}')
        if config is not None and not isinstance(config, Config):
            raise UsageError(f"config is a crdtstate.Config, not {config!r}")
        if store is not None and not isinstance(store, (str, os.PathLike)):
            raise UsageError(f"store is the path of a file, not {store!r}")
        if durability not in ("process", "power"):
            raise UsageError(f'durability is "process" or "power", not {durability!r}')
        for each in [] if advertise is None else [advertise]:
            check_url(each)
        if lease and store is not None:
            raise UsageError("lease=True is for agents without a store; this one has its writer")
        self._rng = random.Random()
        super().__init__(agent, draw_writer(self._rng), lambda: time.time_ns() // 1_000_000)
        self.config = config or Config()
        self.durability = durability
        self.role = role
        # What came and went, for metrics.
        self.traffic = Traffic()
        # Where it listens, once open.
        self.address: str | None = None
        self._store_path = None if store is None else Path(store)
        self._listen_url = listen
        self._peer_urls = list(dict.fromkeys(peers))
        for url in self._peer_urls if listen is None else [listen, *self._peer_urls]:
            check_url(url)
        self._http = http
        self._advertise = advertise
        if lan is not None:
            if not isinstance(lan, str) or not lan:
                raise UsageError(f"lan is a word that replicas share, not {lan!r}")
            lan_module.check_extra()
        self._lan = lan
        self._tls = tls
        self._subscribe = None if subscribe is None else _check_patterns(subscribe)
        self._is_leasing = self._is_between_loans = lease
        self._session = self._rng.getrandbits(64)
        self._state: Literal["new", "open", "closed"] = "new"
        self._store: Store
        self._sync: sync.Sync
        self._loop: asyncio.AbstractEventLoop
        self._listener: Listener | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: dict[int, _Link] = {}
        # What went into one message last, and that: most peers get the same.
        self._message: tuple[list[bytes], bytes] = ([], b"")
        self._link_ended = asyncio.Event()
        self._next_peer = 1
        # Where the pump is: called soon, or running.
        self._is_awake = False
        self._is_pumping = False
        self._timer: asyncio.TimerHandle | None = None
        # What was handed to the store: (ticket, the core's number).
        self._tickets: deque[tuple[int, int]] = deque()
        # The same, of what is committed and not synced.
        self._unsynced: deque[tuple[int, int]] = deque()
        self._unsaved_bytes = 0
        self._failed: str | None = None
        # Own seq by document at opening: what peers may know of this writer.
        self._base: dict[str, int] = {}
        self._opened: dict[str, int] = {}
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._handlers: dict[type[Event], list[Callable[[Any], object]]] = {}
        self._pending_events: deque[Event] = deque()
        self._dropped_events = 0
        # Wakes those who iterate over events.
        self._listening: set[asyncio.Event] = set()
        self._contested: set[tuple[str, str]] = set()
        # Address -> why it could not be reached the last time.
        self._unreachable: dict[str, str] = {}
        # Peer -> what was refused of it the last time, of the last few.
        self._rejected: dict[str, str] = {}

    # Opening and closing

    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise UsageError("a Replica is opened once; make a new one")
        self._loop = asyncio.get_running_loop()
        loan = await self._borrow() if self._is_leasing else None
        self._store = self._open_store()
        try:
            self._recover()
            self._state = "open"
            if self._listen_url is not None:
                url, accept = self._listen_url, self._accept
                self._listener = await listen(url, accept, http=self._http, tls=self._tls_for(url))
                self.address = self._listener.address
                self._sync.introduce(self._hello(), self._loop.time())
        except BaseException:
            self._state = "closed"
            self._store.close(clean=False)
            raise
        self._wake()
        if self._lan is not None:
            self._spawn(self._search(self._lan), "local network")
        if loan is not None:
            self._sync.borrow(loan.lender, loan.terms.seqs)
            await self._await_loan(loan)
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
            self._seal_quietly()
            self._pump()
            if self._is_leasing:
                await self._give_back()
            self._sync.leave(self._loop.time())
            self._pump()
            await self._say_goodbye()
        finally:
            self._state = "closed"
            for task in self._tasks:
                task.cancel()
            if self._listener is not None:
                await self._listener.close()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._timer is not None:
                self._timer.cancel()
            self._store.close(clean=True)
            self._close_documents()
            for listening in self._listening:
                listening.set()
            for _, waiter in self._waiters:
                if not waiter.done():
                    waiter.set_exception(ReplicaClosed(f"{self.agent}: closed while waiting"))

    async def _say_goodbye(self) -> None:
        try:
            async with asyncio.timeout(FAREWELL):
                while self._links:
                    self._link_ended.clear()
                    await self._link_ended.wait()
        except TimeoutError:
            log.debug("%s: not everything queued could be sent", self.agent)

    def _open_store(self) -> Store:
        if self._store_path is None:
            return MemoryStore()
        return Journal(self._store_path, durability=self.durability)

    def _recover(self) -> None:
        """Load what the store has, and decide as whom to write."""
        session = self._store.session
        if session.writer is not None and may_keep_writer(session):
            self._writer = session.writer
        for item in self._store.load():
            self._load(item)
        now, seeds = self._loop.time(), self._peer_urls
        self._sync = sync.Sync(self, self._hello(), self.config, self._rng, now, seeds)
        self._sync.former.update(session.writers - {self._writer})
        for name, version in self.versions():
            self._base[name] = self._opened[name] = version.get(self._writer, 0)
            store = self._store
            self._sync.restore(name, version, store.floor(name), store.size(name))
            self._clock.observe(self._documents[name].stamp, 2**47)
        self._store.start(self.agent, self._writer, self._on_store_progress)

    def _load(self, item: Saved | Entry, only: Document | None = None) -> None:
        what = "snapshot"
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

    # Borrowing a writer

    async def _borrow(self) -> _Loan:
        """Ask the peers, one after the other, for a writer, before anything else."""
        why = "there are none"
        async with self._lease_limit():
            for url in self._peer_urls:
                try:
                    loan = await self._borrow_at(url)
                except (TransportError, ProtocolError) as exc:
                    why = str(exc)
                    continue
                if loan.terms.writer:
                    self._writer = loan.terms.writer
                    return loan
                why = f"{url} is no relay"
        raise LeaseRefused(f"{self.agent}: no relay among the peers lends a writer: {why}")

    @asynccontextmanager
    async def _lease_limit(self) -> AsyncIterator[None]:
        seconds = self.config.lease_timeout
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            reason = f"{self.agent}: no writer could be leased within {seconds} s"
            raise LeaseRefused(reason) from None

    async def _borrow_at(self, url: str) -> _Loan:
        connection = await dial(url, timeout=DIAL_TIMEOUT, tls=self._tls)
        try:
            hello = replace(self._hello(), documents=())
            frames = [wire.encode_frame(hello), wire.encode_frame(wire.Borrow())]
            await connection.send(wire.encode_message(frames))
            lender = 0
            while True:
                for frame in wire.decode_message(await connection.receive()):
                    if isinstance(frame, wire.Hello):
                        lender = frame.writer
                    elif isinstance(frame, wire.Lend):
                        return _Loan(lender, frame)
        finally:
            connection.abort()

    async def _await_loan(self, loan: _Loan) -> None:
        """Wait until everything is here that was written under the borrowed writer."""
        try:
            async with self._lease_limit():
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

    def _tls_for(self, url: str) -> ssl.SSLContext | None:
        return self._tls if url.startswith("wss:") else None

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
        )

    def document(self, name: str, *, shared: bool = False) -> Document:
        """See `DocumentSet.document`; of those that this replica subscribes to."""
        if isinstance(name, str) and not takes(self._subscribe, name):
            raise UsageError(f"{name!r} is not among the documents this replica subscribes to")
        return super().document(name, shared=shared)

    def _on_write(self, document: Document) -> None:
        if self._is_between_loans:
            raise ReplicaClosed(f"{self.agent}: its leased writer is not to be written under now")
        super()._on_write(document)

    def _make(self, name: str, shared: bool) -> Document:
        document = super()._make(name, shared)
        document.strong = self
        return document

    def _check_usable(self) -> None:
        if self._state == "new":
            raise ReplicaClosed(f"{self.agent}: not open; use it inside 'async with Replica(...)'")
        if self._state == "closed":
            raise ReplicaClosed(f"{self.agent}: closed")
        if self._unsaved_bytes > self.config.unsaved_bytes:
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
        check_url(url)
        if url not in self._peer_urls:
            self._peer_urls.append(url)
            self._sync.add_seed(url, self._loop.time())
            self._wake()

    # Consistency

    async def confirm(self, confirm: Confirm, timeout: float | None = None) -> Receipt:
        """Wait until as many replicas as *confirm* says have everything written here so far.

        Raises:
            ConfirmTimeout: It took longer than *timeout* seconds; says who has it. What was
                written stays, and may still get there.
            UsageError: *confirm* can never be, such as 3 of 2 voters.
        """
        if not isinstance(confirm, Confirm):
            raise UsageError(f"confirm takes crdtstate.Confirm(...), not {confirm!r}")
        self._check_usable()
        self._check_settled()
        self._seal_open()
        self._pump()
        writer = self._writer
        written = {
            name: Version({writer: version[writer]})
            for name, version in self.versions()
            if version.get(writer, 0) > self._opened.get(name, 0)
        }
        voters, now = self.config.voters, self._loop.time()
        confirmation = Confirmation(self._sync, confirm, written, voters, now)
        await self._run_machine(confirmation, timeout)
        return confirmation.receipt

    async def read_strong(
        self, document: Document, container: str, key: str, timeout: float | None
    ) -> bytes | None:
        """See `Map.get_strong`."""
        self._check_usable()
        self._check_settled()
        voters, now = self.config.voters, self._loop.time()
        read = StrongRead(self._sync, document, container, key, voters, now)
        await self._run_machine(read, timeout)
        return read.value

    async def write_strong(
        self, document: Document, container: str, key: str, value: bytes, timeout: float | None
    ) -> None:
        """See `Map.set_strong`."""
        self._check_usable()
        self._check_settled()
        voters, now = self.config.voters, self._loop.time()
        write = StrongWrite(self._sync, document, container, key, voters, now)
        write.value = value
        await self._run_machine(write, timeout)

    async def _run_machine(
        self, machine: Confirmation | StrongRead | StrongWrite, timeout: float | None
    ) -> None:
        """Let a machine of `consistency` go on until it is done, or time is up."""

        def poll() -> bool:
            is_done = machine.poll(self._loop.time())
            self._wake()
            return is_done

        try:
            await self._until(poll, timeout, "other replicas")
        except WaitTimeout:
            raise machine.failure(timeout) from None
        finally:
            machine.close()

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

    # Waiting

    async def durable(self, timeout: float | None = None) -> None:
        """Wait until everything written so far is committed, as `durability` says.

        Raises:
            StoreError: The store refuses to write. What was written stays in memory, and is saved
                when the store works again.
            WaitTimeout: It took longer than *timeout* seconds.
        """
        self._check_usable()
        self._check_settled()
        self._seal_open()
        self._pump()
        number = self._sync.persisted

        def is_saved() -> bool:
            if self._store.failure is not None:
                raise self._store.failure
            return self._sync.committed_number >= number

        await self._until(is_saved, timeout, "the store to commit")

    async def wait_for(self, version: Cut, timeout: float | None = None) -> None:
        """Wait until this replica has taken in everything in *version*, another's token.

        Raises:
            WaitTimeout: It took longer than *timeout* seconds; it may still come.
        """
        if not isinstance(version, Cut):
            raise UsageError("wait_for takes what replica.version() gave; see Cut.parse for text")

        def is_here() -> bool:
            return all(
                wanted <= (document.version if (document := self.find(name)) else Version())
                for name, wanted in version.items()
                if takes(self._subscribe, name)
            )

        await self._until(is_here, timeout, "a version")

    async def synced(self, timeout: float | None = None) -> None:
        """Wait until every connected peer has committed what this replica has, and it what they
        have. With `peers` given, at least one of them must be connected.

        Raises:
            WaitTimeout: It took longer than *timeout* seconds.
        """

        def is_synced() -> bool:
            if self._open or (self._peer_urls and not self._sync.peers):
                return False
            return self._sync.is_synced()

        await self._until(is_synced, timeout, "the peers")

    async def _until(self, ready: Callable[[], bool], timeout: float | None, what: str) -> None:
        self._check_usable()
        self._check_settled()
        self._pump()
        if ready():
            return
        future: asyncio.Future[None] = self._loop.create_future()
        waiter = (ready, future)
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout):
                await future
        except TimeoutError:
            troubles = [*self._unreachable.items(), *self._rejected.items()]
            hints = "".join(f"; {whom}: {why}" for whom, why in troubles)
            raise WaitTimeout(
                f"{self.agent}: waited {timeout} s for {what}, with {len(self._sync.peers)} peers "
                f"connected{hints}"
            ) from None
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    # Watching

    def on(self, event: type[E], handler: Callable[[E], object]) -> Callable[[], None]:
        """Call *handler* with every event of the type *event*, after it happened.

        Handlers run on the event loop, one after the other. One that raises is logged and harms
        nothing. Returns a function that ends it.

        Raises:
            UsageError: *event* is no type of event, or *handler* is no plain function.
        """
        check_event(event)
        if not callable(handler) or inspect.iscoroutinefunction(handler):
            raise UsageError(f"a handler is a plain function, not {handler!r}; see events()")
        self._handlers.setdefault(event, []).append(handler)

        def cancel() -> None:
            handlers = self._handlers.get(event, [])
            if handler in handlers:
                handlers.remove(handler)
            if not handlers:
                self._handlers.pop(event, None)

        return cancel

    async def events(self, *types: type[Event]) -> AsyncIterator[Event]:
        """Iterate over events of the given types (all, without any) from now on, until this
        replica is closed.

        Who does not keep up misses the oldest, beyond `Config.events_max`.
        """
        if self._state == "closed":
            self._check_usable()
        queue: deque[Event] = deque(maxlen=int(self.config.events_max))
        arrived = asyncio.Event()
        self._listening.add(arrived)

        def receive(event: Event) -> None:
            queue.append(event)
            arrived.set()

        cancels = [self.on(kind, receive) for kind in types or (Event,)]
        try:
            while True:
                while queue:
                    yield queue.popleft()
                if self._state == "closed":
                    return
                arrived.clear()
                await arrived.wait()
        finally:
            self._listening.discard(arrived)
            for cancel in cancels:
                cancel()

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
        return dict(self._unreachable)

    def status(self) -> dict[str, Any]:
        """A summary of plain values, for people and monitoring."""
        is_open = self._state == "open"
        failure = self._store.failure if is_open else None
        return {
            "agent": self.agent,
            "role": self.role,
            "writer": f"{self._writer:x}",
            "address": self.address,
            "ready": is_open and failure is None,
            "store": str(self._store_path) if self._store_path else None,
            "store_failure": str(failure) if failure else None,
            "peers": [peer.agent for peer in self.peers()],
            "unreachable": self.unreachable(),
            "documents": {name: version.total for name, version in sorted(self.versions())},
            "conflicts": len(self.conflicts()) if is_open else 0,
            "pending": self._sync.pending_count if is_open else 0,
            "missing": self._sync.missing_count() if is_open else 0,
        }

    def __repr__(self) -> str:
        if self._state != "open":
            return f"<Replica {self.agent} {'not open' if self._state == 'new' else 'closed'}>"
        peers, documents = len(self._sync.peers), len(self._documents)
        return f"<Replica {self.agent} {peers} peers {documents} documents>"

    # The pump

    def _written(self) -> None:
        if self._sealed:
            self._tell_sealed()
        self._wake()

    def _wake(self) -> None:
        if not self._is_awake and self._state == "open":
            self._is_awake = True
            self._loop.call_soon(self._pump)

    def _on_store_progress(self) -> None:
        """Called by the store's threads."""
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            # The loop is closed, and with it the replica.
            pass

    def _pump(self) -> None:
        """Seal what was written, let the core decide, do what it says."""
        self._is_awake = False
        if self._is_pumping or self._state != "open":
            return
        self._is_pumping = True
        try:
            if not self._is_store_busy() and self._transaction is None:
                self._seal_quietly()
            self._note_commits()
            while effects := self._sync.effects():
                self._carry_out(effects)
                self._note_commits()
            self._arm_timer()
        finally:
            self._is_pumping = False
        self._check_waiters()
        self._dispatch()

    def _seal_quietly(self) -> None:
        """Seal what is open; there is no caller to tell what could not be."""
        try:
            self._seal_open()
        except UsageError as exc:
            log.error("%s: edits were undone: %s", self.agent, exc)
            self._emit(EditsUndone(str(exc)))

    def _is_store_busy(self) -> bool:
        """Whether plain writes should go on collecting, because a commit is under way."""
        return bool(self._tickets) and self._store.failure is None

    def _tell_sealed(self) -> None:
        """Let the core know of every change at once: no snapshot may hold one it does not (S3)."""
        sealed = self._hand_over()
        self.traffic.changes_out += len(sealed)
        self._sync.local_changes((change for change, _ in sealed), self._loop.time())
        if self._has_observers():
            for change, paths in sealed:
                document = self._documents[change.document]
                self._note_paths(document, paths, self.agent, local=True)

    def _carry_out(self, effects: list[sync.Effect]) -> None:
        batch: list[tuple[int, Entry]] = []
        try:
            self._carry_out_in_order(effects, batch)
        finally:
            # Whatever failed, what was delivered is saved: the journal has no holes.
            self._append(batch)

    def _carry_out_in_order(
        self, effects: list[sync.Effect], batch: list[tuple[int, Entry]]
    ) -> None:
        """Carry out *effects*; what is left in *batch* is still to be appended."""
        for effect in effects:
            match effect:
                case sync.Transmit(peer):
                    self._transmit(peer)
                case sync.Persist(number, change):
                    entry = Entry(change.document, change.writer, change.seq, change.data)
                    batch.append((number, entry))
                case sync.SaveSnapshot():
                    self._append(batch)
                    self._save(effect)
                case sync.Delivered(document, change, paths, agent):
                    self.traffic.changes_in += change is not None
                    if self._has_observers():
                        self._note_paths(document, paths, agent, local=False)
                case sync.Fetch(peer, name, ranges):
                    self._fetch(peer, name, ranges)
                case sync.Dial(url):
                    self._spawn(self._dial(url), f"dial {url}")
                case sync.HangUp(peer, code, reason):
                    self._end_link(peer, code, reason)
                case sync.Emit(event):
                    self._emit(event)
                case sync.Hurry():
                    self._store.hurry()
                case sync.Rebuild(name):
                    self._append(batch)
                    self._rebuild(name)
                case sync.Reidentify(reason):
                    self._append(batch)
                    self._reidentify(reason)
                    return

    def _append(self, batch: list[tuple[int, Entry]]) -> None:
        """Hand *batch* to the store, and empty it."""
        if batch:
            ticket = self._store.append([entry for _, entry in batch])
            self._tickets.append((ticket, batch[-1][0]))
            if self._store.failure is not None:
                self._unsaved_bytes += sum(len(entry.data) for _, entry in batch)
            batch.clear()

    def _save(self, effect: sync.SaveSnapshot) -> None:
        saved = Saved(effect.document, effect.version, effect.data)
        self._store.compact(saved, int(self.config.log_bytes))
        if self._store.failure is not None:
            self._unsaved_bytes += len(effect.data)
        # What a snapshot contains can no longer be taken out of the store (see `_reidentify`).
        own = effect.version.get(self._writer, 0)
        self._base[effect.document] = max(own, self._base.get(effect.document, 0))
        # An empty batch, whose ticket tells when the snapshot before it is committed.
        self._tickets.append((self._store.append(()), effect.number))
        self._sync.compacted(effect.document, self._store.floor(effect.document))

    def _note_commits(self) -> None:
        store = self._store
        ticket = number = 0
        while self._tickets and self._tickets[0][0] <= store.committed:
            ticket, number = self._tickets.popleft()
        if number:
            self._unsynced.append((ticket, number))
            self._sync.committed(number, self._loop.time())
        if self._unsynced and self._unsynced[0][0] <= store.synced:
            self._note_syncs()
        if not self._tickets:
            self._unsaved_bytes = 0
        failure = str(store.failure) if store.failure else None
        if failure != self._failed:
            self._failed = failure
            self._emit(StoreFailed(failure) if failure else StoreRecovered())
            if failure:
                self._loop.call_later(STORE_RETRY, self._retry_store)

    def _note_syncs(self) -> None:
        number = 0
        while self._unsynced and self._unsynced[0][0] <= self._store.synced:
            number = self._unsynced.popleft()[1]
        self._sync.synced(number, self._loop.time())

    def _retry_store(self) -> None:
        if self._state == "open" and self._store.failure is not None:
            self._store.retry()
            self._wake()
            self._loop.call_later(STORE_RETRY, self._retry_store)

    def _fetch(self, peer: int, name: str, ranges: tuple[tuple[int, int, int], ...]) -> None:
        limit = int(self.config.answer_bytes)
        size, now = self._store.measure(name, ranges), self._loop.time()
        if self._sync.snapshot_instead(peer, name, size, now):
            return
        try:
            found, more = self._store.read(name, ranges, limit)
        except CorruptStore as exc:
            self._emit(StoreFailed(str(exc)))
            return
        self._sync.fetched(peer, found, more)

    def _arm_timer(self) -> None:
        at = self._sync.next_deadline()
        if self._open and self._is_store_busy():
            at = min(at, self._loop.time() + self.config.seal_delay)
        if self._timer is not None:
            if self._timer.when() == at and not self._timer.cancelled():
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = self._loop.time()
        if now >= self._sync.next_deadline():
            self._sync.tick(now)
        elif self._transaction is None:
            self._seal_quietly()
        self._pump()

    def _check_waiters(self) -> None:
        for ready, future in list(self._waiters):
            if future.done():
                continue
            try:
                if ready():
                    future.set_result(None)
            except Exception as exc:
                future.set_exception(exc)

    # What happens seldom

    def _rebuild(self, name: str) -> None:
        """Load a document from the store again, because its engine failed."""
        document = self._documents[name]
        self.reload(document, self._writer, self._load_document)
        self._sync.rebuilt(name, self._loop.time())
        self._wake()

    def _load_document(self, document: Document) -> None:
        for item in self._store.load():
            if item.document == document.name:
                self._load(item, document)

    def _reidentify(self, reason: str) -> None:
        """Go on under a new writer, because peers know more of the present one than we do.

        What was written since opening, and no peer has acknowledged, got dots that others use for
        something else. It is taken out of the journal and written again, by the new writer.
        """
        old, new = self._writer, draw_writer(self._rng)
        for name, seq in self._sync.own_acked.items():
            self._base[name] = max(seq, self._base.get(name, 0))
        try:
            self._store.forget(old, self._base)
            self._store.start(self.agent, new, self._on_store_progress)
        except StoreError as exc:
            # The next thing that a peer says of our writer brings it up again.
            log.error("%s: cannot go on as another writer now: %s", self.agent, exc)
            self._emit(StoreFailed(str(exc)))
            self._sync.reidentify_later()
            return
        self._tickets.clear()
        self._unsynced.clear()
        self._writer = new
        self._base = {}
        self._opened = {}
        self._sync.reidentified(self._hello(), self._loop.time())

        def load(document: Document) -> None:
            self._load_document(document)
            name, store = document.name, self._store
            self._sync.restore(name, document.version, store.floor(name), store.size(name))

        for document in list(self._documents.values()):
            self.reload(document, new, load)
        self._emit(IdentityRollback(old, new, reason))
        self._wake()

    # Observers

    def _has_observers(self) -> bool:
        handlers = self._handlers
        return bool(handlers) and any(
            kind in handlers for kind in (Event, Changed, ConflictFound, ConflictResolved)
        )

    def _note_paths(
        self, document: Document, paths: Iterable[str], agent: str, *, local: bool
    ) -> None:
        wants_changed = Changed in self._handlers or Event in self._handlers
        for path in paths:
            container, _, key = path.partition(SEPARATOR)
            kind = container[:1]
            if kind not in KINDS:
                continue
            if wants_changed:
                self._emit(_changed(document, kind, container[1:], key, agent, local))
            if kind in "mr":
                self._note_conflict(document, kind, container, key, agent)

    def _note_conflict(
        self, document: Document, kind: str, container: str, key: str, agent: str
    ) -> None:
        place = (document.name, container + SEPARATOR + key)
        contested = key in document.lanes.container(container).contested
        if not contested and place not in self._contested:
            return
        name = container[1:]
        view = Map(document, name) if kind == "m" else Register(document, name)
        found = view.candidates_of(key) if contested else []
        if found and place not in self._contested:
            self._contested.add(place)
            self._emit(ConflictFound(document.name, KINDS[kind], name, key, tuple(found)))
        elif not found and place in self._contested:
            self._contested.discard(place)
            event = _changed(document, kind, name, key, agent, False)
            self._emit(ConflictResolved(document.name, KINDS[kind], name, key, event.value, agent))

    def _emit(self, event: Event) -> None:
        log.debug("%s: %s", self.agent, event)
        if isinstance(event, PeerRejected):
            self._rejected[event.agent] = f"refused: {event.reason}"
            if len(self._rejected) > REJECTED_MAX:
                del self._rejected[next(iter(self._rejected))]
        if self._handlers:
            if len(self._pending_events) >= PENDING_EVENTS_MAX:
                self._pending_events.popleft()
                self._count_dropped_event()
            self._pending_events.append(event)
            self._wake()

    def _count_dropped_event(self) -> None:
        if not self._dropped_events:
            log.error("%s: handlers do not keep up; the oldest events are dropped", self.agent)
        self._dropped_events += 1

    def _dispatch(self) -> None:
        """Tell handlers, for a while; the rest after others had their turn on the event loop.
        Slow ones delay each other, and the mesh by one call at a time."""
        until = self._loop.time() + DISPATCH_TIME
        while self._pending_events:
            self._tell(self._pending_events.popleft())
            if self._loop.time() >= until:
                self._wake()
                return
        self._dropped_events = 0

    def _tell(self, event: Event) -> None:
        for kind in (type(event), Event):
            for handler in list(self._handlers.get(kind, ())):
                try:
                    handler(event)
                except Exception:
                    log.exception("%s: a handler of %s failed", self.agent, kind.__name__)

    # Connections

    def _spawn(self, work: Any, name: str) -> None:
        task: asyncio.Task[None] = self._loop.create_task(work, name=f"{self.agent}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, connection: Connection) -> None:
        is_full = len(self._links) >= self.config.links_max + STRANGERS_MAX
        if self._state == "open" and not self._sync.mesh.has_left and not is_full:
            await self._run(connection, None)

    async def _dial(self, url: str) -> None:
        """Try once to connect to an address, and serve the connection."""
        try:
            connection = await dial(url, timeout=DIAL_TIMEOUT, tls=self._tls_for(url))
        except (TransportError, UsageError) as exc:
            log.debug("%s: %s", self.agent, exc)
            self._note_trouble(url, str(exc).removeprefix(f"{url}: "))
            self._sync.dial_failed(url, self._loop.time())
            self._wake()
            return
        self._unreachable.pop(url, None)
        link = await self._run(connection, url)
        code = link.ending[0] if link.ending else None
        if code is not wire.ByeCode.DUPLICATE:
            self._note_trouble(url, link.ending[1] if link.ending else "the connection broke")

    def _note_trouble(self, url: str, why: str) -> None:
        """Remember why there is no connection to an address that the user gave."""
        if url in self._peer_urls:
            self._unreachable[url] = why

    async def _run(self, connection: Connection, url: str | None) -> _Link:
        """Serve one connection, made by dialling *url* if that is given, until it ends."""
        peer, self._next_peer = self._next_peer, self._next_peer + 1
        link = self._links[peer] = _Link(connection)
        self._sync.peer_up(peer, self._loop.time(), url=url)
        sender = self._loop.create_task(self._send_waiting(peer, link))
        self._pump()
        reason = "closed"
        try:
            while True:
                self._receive(peer, await connection.receive())
        except TransportError as exc:
            reason = str(exc)
        except ProtocolError as exc:
            reason = str(exc)
            self._emit(PeerRejected(connection.remote, reason))
        except Exception as exc:
            # A bug of ours. It costs this connection, not the replica.
            log.exception("%s: serving %s failed", self.agent, connection.remote)
            reason = f"internal error: {exc}"
        finally:
            sender.cancel()
            connection.abort()
            self._links.pop(peer, None)
            self._link_ended.set()
            if self._state == "open":
                reason = link.ending[1] if link.ending else reason
                self._sync.peer_down(peer, self._loop.time(), reason)
                self._wake()
        return link

    def _receive(self, peer: int, data: bytes) -> None:
        now = self._loop.time()
        self.traffic.messages_in += 1
        self.traffic.bytes_in += len(data)
        for frame in wire.decode_message(data):
            self._sync.receive(peer, frame, now)
        # Not at once: others may have sent something too.
        self._wake()

    def _transmit(self, peer: int) -> None:
        """Send what waits for a peer: at once if that is possible, else its task does."""
        link = self._links.get(peer)
        if link is None:
            return
        if link.connection.is_writable and not link.is_sending and self._sync.has_unsent(peer):
            link.connection.send_now(self._next_message(peer))
        if self._sync.has_unsent(peer) or link.ending is not None:
            link.wake.set()

    async def _send_waiting(self, peer: int, link: _Link) -> None:
        """Send what could not be sent at once, as much at a time as has collected."""
        try:
            while True:
                while self._sync.has_unsent(peer):
                    link.is_sending = True
                    await link.connection.send(self._next_message(peer))
                    link.is_sending = False
                    self._arm_timer()
                if link.ending is not None:
                    await link.connection.close(link.ending[1])
                    return
                link.wake.clear()
                await link.wake.wait()
        except TransportError:
            # The reader notices too, and ends the link.
            pass

    def _next_message(self, peer: int) -> bytes:
        frames = self._sync.take(peer)
        if frames != self._message[0]:
            self._message = frames, wire.encode_message(frames)
        message = self._message[1]
        self.traffic.messages_out += 1
        self.traffic.bytes_out += len(message)
        return message

    def _end_link(self, peer: int, code: wire.ByeCode, reason: str) -> None:
        """End a connection once what is queued has left, but soon."""
        link = self._links.get(peer)
        if link is not None and link.ending is None:
            link.ending = (code, reason)
            link.wake.set()
            self._loop.call_later(FAREWELL, link.connection.abort)


def _is_anywhere(address: str | None) -> bool:
    """Whether an address names no host: all interfaces are listened on."""
    return address is not None and urlsplit(address).hostname in ("0.0.0.0", "::")


def _check_patterns(patterns: object) -> tuple[str, ...]:
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise UsageError(f"subscribe is a list of documents' names, not {patterns!r}")
    found = tuple(patterns)
    if not found or len(found) > wire.PATTERNS_MAX:
        raise UsageError(f"subscribe names 1 to {wire.PATTERNS_MAX} documents, not {len(found)}")
    for each in found:
        if not isinstance(each, str) or not 0 < len(each) <= wire.NAME_CHARS_MAX:
            raise UsageError(f"subscribe is a list of documents' names, not {each!r}")
    return found


def check_url(url: object) -> None:
    """Raise UsageError if this is not a URL that a replica can dial or listen on."""
    if not isinstance(url, str):
        raise UsageError(f"a URL is a str such as ws://127.0.0.1:8765, not {url!r}")
    check_scheme(url)


def check_event(event: object) -> None:
    """Raise UsageError if this is no type of event."""
    if not isinstance(event, type) or not issubclass(event, Event):
        raise UsageError(f"events are told apart by type, such as crdtstate.Changed, not {event!r}")


def _changed(
    document: Document, kind: str, name: str, key: str, agent: str, local: bool
) -> Changed:
    """What a path reads as now. Where a strategy is not known here, or fails, that is the value
    written last."""
    shown = key if kind == "m" else unpack_key(key) if kind == "s" else None
    value: Any = None
    try:
        match kind:
            case "m":
                value = Map(document, name).get(key)
            case "r":
                value = document.register(name).value
            case "c":
                value = document.counter(name).value
            case "s":
                value = True if shown in document.set(name) else None
    except Exception as exc:
        # The user's own function: whatever it raises must not stop the pump.
        log.warning("%s: %s %r: %r", document.name, KINDS[kind], name, exc)
        view = Map(document, name) if kind == "m" else Register(document, name)
        found = view.candidates_of(key)
        value = found[-1].value if found else None
    return Changed(document.name, KINDS[kind], name, shown, value, agent, local)
