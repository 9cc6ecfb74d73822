"""
A replica for programs without an event loop.

    with blocking.Replica("agent-7", store="agent-7.db", peers=[url]) as replica:
        replica.map("plan")["goal"] = "ship it"
        replica.synced(timeout=5)

It runs a `crdtstate.Replica` on a thread and event loop of its own, under the same names (but for
native Yjs types and the iteration over events, which `call` and `on` reach). Replica
and documents belong to that thread, so every read and write is carried out there while the caller
waits: about a tenth of a millisecond. Any number of threads may call; each call is atomic, such as
``pop`` and ``items`` of a map.

Inside ``with replica.transaction():`` that thread serves this transaction and nothing else: other
threads and peers wait until it ends. So be quick, and do not wait for others inside: after half of
`Config.link_timeout` (5 s) it is undone, since peers would soon take this replica for dead.

Handlers given to `on` run on the replica's thread. They read and write as usual but cannot wait.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import (
    Callable,
    Coroutine,
    ItemsView,
    Iterable,
    Iterator,
    MutableMapping,
    MutableSet,
    ValuesView,
)
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from datetime import datetime
from itertools import chain, islice
from typing import Any, Self, TypeVar

from crdtstate import controller, replica
from crdtstate.audit import Record
from crdtstate.checkpoints import Checkpoint, Pruning, Verification
from crdtstate.clock import Cut
from crdtstate.comparing import Comparison
from crdtstate.conflict import Conflict
from crdtstate.consistency import Confirm, Receipt
from crdtstate.documents import MAIN
from crdtstate.errors import ReplicaClosed, UsageError
from crdtstate.events import ConflictFound, Event
from crdtstate.history import PastChange
from crdtstate.ladder import Recovery
from crdtstate.lookback import Point
from crdtstate.membership import Member
from crdtstate.obeying import Handler
from crdtstate.outcomes import Results
from crdtstate.past import Difference, Past
from crdtstate.quarantine import Quarantined
from crdtstate.replica import Peer
from crdtstate.reports import Report
from crdtstate.revocations import Revocation
from crdtstate.rewrite import Reverted
from crdtstate.sharing import Shared
from crdtstate.system import SystemCheckpoint, SystemRestore

T = TypeVar("T")
E = TypeVar("E", bound=Event)

HISTORY_PORTION = 256
"""Changes of a history that are read at a time, while the replica does nothing else."""


class Replica:
    """A set of replicated documents, for ordinary threads: ``with Replica(...) as replica``.

    Args:
        agent: The agent's name.
        options: The keyword arguments of `crdtstate.Replica`.
    """

    def __init__(self, agent: str, **options: Any) -> None:
        self._replica = replica.Replica(agent, **options)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._closing: asyncio.Event
        # Work is handed over only while it is open and under the lock, so that none is forgotten.
        self._lock = threading.Lock()
        self._is_open = False
        self._is_closed = False
        # The `_Held` transaction that the current thread is in.
        self._local = threading.local()

    # Opening and closing

    def __enter__(self) -> Self:
        if self._thread is not None or self._is_closed:
            raise UsageError("a Replica is opened once; make a new one")
        opened: Future[None] = Future()
        # A daemon, so that a program that forgets to close still ends.
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._live(opened)),
            name=f"crdtstate {self.agent}",
            daemon=True,
        )
        self._thread.start()
        try:
            opened.result()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Save, say goodbye and stop. Idempotent. In a handler it does not wait for the end."""
        with self._lock:
            self._is_closed = True
            if self._is_open:
                self._is_open = False
                self._loop.call_soon_threadsafe(self._closing.set)
        if self._thread is not None and not self._is_here():
            self._thread.join()

    async def _live(self, opened: Future[None]) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with self._replica:
                with self._lock:
                    self._is_open = not self._is_closed
                opened.set_result(None)
                if self._is_open:
                    await self._closing.wait()
        except BaseException as exc:
            if opened.done():
                raise
            opened.set_exception(exc)

    # Reading and writing

    def map(self, name: str, *, strategy: str | None = None) -> Map:
        """The map *name* of the document "main"."""
        return self.document(MAIN).map(name, strategy=strategy)

    def counter(self, name: str) -> Counter:
        """The counter *name* of the document "main"."""
        return self.document(MAIN).counter(name)

    def register(self, name: str, *, strategy: str | None = None) -> Register:
        """The register *name* of the document "main"."""
        return self.document(MAIN).register(name, strategy=strategy)

    def set(self, name: str) -> Set:
        """The set *name* of the document "main"."""
        return self.document(MAIN).set(name)

    def document(self, name: str, *, shared: bool = False) -> Document:
        """The document *name*, made on first use.

        Raises:
            UsageError: *shared* is True. Native Yjs types belong to that thread; see `call`.
        """
        if shared:
            raise UsageError(
                "native Yjs types belong to the replica's thread; use them there, as in "
                f"replica.call(lambda r: str(r.document({name!r}, shared=True).text(...)))"
            )
        return Document(self, self.call(lambda inner: inner.document(name)))

    def documents(self) -> list[str]:
        """The names of all documents, sorted."""
        return self.call(lambda inner: list(inner.documents()))

    def conflicts(self) -> list[Conflict]:
        """The open conflicts of all documents."""
        return self.call(lambda inner: inner.conflicts())

    def vote(self, conflict: Conflict | ConflictFound, value: Any) -> None:
        """Vote for *value*, one of the candidates. See `crdtstate.Replica.vote`."""
        self.call(lambda inner: inner.vote(conflict, value))

    def resolve(self, conflict: Conflict | ConflictFound, value: Any) -> None:
        """Write *value* over the candidates of *conflict*. See `crdtstate.Replica.resolve`."""
        self.call(lambda inner: inner.resolve(conflict, value))

    def is_responsible(self, conflict: Conflict | ConflictFound) -> bool:
        """Whether this agent is the one to resolve *conflict*, if all agents try alike."""
        return self.call(lambda inner: inner.is_responsible(conflict))

    def audit(self, since: datetime | Record | None = None, **query: Any) -> list[Record]:
        """What was resolved, decided, voted, refused and commanded. See
        `crdtstate.Replica.audit`."""
        return self.call(lambda inner: inner.audit(since, **query))

    def version(self) -> Cut:
        """What this replica has taken in so far, its own writes included: a causal token."""
        return self.call(lambda inner: inner.version())

    @contextmanager
    def transaction(self, *, message: str = "", run: str = "") -> Iterator[None]:
        """Make all writes of this thread inside one change; an exception undoes them.

        Raises:
            UsageError: It was open for too long, and nothing of it happened.
        """
        if self._held is not None:
            yield
        elif self._is_here():
            with self._replica.transaction(message=message, run=run):
                yield
        else:
            held = _Held(self._replica.config.link_timeout / 2)
            served = self._hand_over(lambda: held.serve(self._replica, message, run))
            try:
                # The first call returns when the transaction is open.
                held.call(lambda: None)
                self._local.held = held
                yield
            except BaseException:
                held.undo()
                served.exception()
                raise
            else:
                held.commit()
                served.result()
            finally:
                self._local.held = None

    def call(self, function: Callable[[replica.Replica], T]) -> T:
        """Run *function* on the replica's thread and return what it returns.

        It gets the `crdtstate.Replica`, and thereby all that has no name here, for example
        ``replica.call(lambda r: str(r.document("notes", shared=True).text("body")))``.
        """
        if self._is_here() or self._has_ended():
            return function(self._replica)
        if self._held is not None:
            return self._held.call(lambda: function(self._replica))
        return self._hand_over(lambda: function(self._replica)).result()

    # Waiting

    def durable(self, timeout: float | None = None) -> None:
        """Wait until everything written so far is committed. See `crdtstate.Replica.durable`."""
        self._wait(lambda: self._replica.durable(timeout))

    def wait_for(self, version: Cut, timeout: float | None = None) -> None:
        """Wait until this replica has taken in everything in *version*, another's token."""
        self._wait(lambda: self._replica.wait_for(version, timeout))

    def synced(self, timeout: float | None = None) -> None:
        """Wait until every connected peer has what this replica has, and it what they have."""
        self._wait(lambda: self._replica.synced(timeout))

    def confirm(self, confirm: Confirm, timeout: float | None = None) -> Receipt:
        """Wait until as many replicas as *confirm* says have what was written here so far. See
        `crdtstate.Replica.confirm`."""
        return self._wait(lambda: self._replica.confirm(confirm, timeout))

    def compare(self, *, peers: int = 2, timeout: float | None = None) -> Comparison:
        """Compare what all documents hold with peers. See `crdtstate.Replica.compare`."""
        return self._wait(lambda: self._replica.compare(peers=peers, timeout=timeout))

    # The past

    def at(self, point: Point, *, documents: Iterable[str] | None = None) -> Past:
        """The documents as they were, to be read on any thread. See `crdtstate.Replica.at`."""
        return self._wait(lambda: self._replica.at(point, documents=documents))

    def diff(
        self,
        since: Point,
        until: Point | None = None,
        *,
        documents: Iterable[str] | None = None,
        paths: Iterable[str] | None = None,
    ) -> list[Difference]:
        """What reads differently at *until*, or now, than at *since*. See
        `crdtstate.Replica.diff`."""
        wanted = {"documents": documents, "paths": paths}
        return self._wait(lambda: self._replica.diff(since, until, **wanted))

    def history(self, document: str, **options: Any) -> Iterator[PastChange]:
        """The changes of a document, oldest first. The *options* are those of
        `crdtstate.Replica.history`."""
        told = self.call(lambda inner: iter(inner.history(document, **options)))
        portions = iter(lambda: self.call(lambda _: list(islice(told, HISTORY_PORTION))), [])
        return chain.from_iterable(portions)

    def restore(self, point: Point, **options: Any) -> list[Difference]:
        """Bring back what was. The *options* are those of `crdtstate.Replica.restore`."""
        return self._wait(lambda: self._replica.restore(point, **options))

    def revert(self, **options: Any) -> Reverted:
        """Undo what one run wrote. The *options* are those of `crdtstate.Replica.revert`."""
        return self._wait(lambda: self._replica.revert(**options))

    # Checkpoints

    def checkpoint(self, label: str = "") -> Checkpoint:
        """Make a checkpoint of everything written so far. See `crdtstate.Replica.checkpoint`."""
        return self._wait(lambda: self._replica.checkpoint(label))

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints of this agent, oldest first."""
        return self.call(lambda inner: inner.checkpoints())

    def verify(self, id: str, *, tier: str | None = None) -> Verification:
        """Read all of a checkpoint and compare it with its hashes. See
        `crdtstate.Replica.verify`."""
        return self._wait(lambda: self._replica.verify(id, tier=tier))

    def prune_checkpoints(self, *, dry_run: bool = False) -> Pruning:
        """Let go of the checkpoints that are not to be kept; with *dry_run* only say which. See
        `crdtstate.Replica.prune_checkpoints`."""
        return self._wait(lambda: self._replica.prune_checkpoints(dry_run=dry_run))

    def why_kept(self, id: str) -> str:
        """Why a checkpoint is kept, in words."""
        return self.call(lambda inner: inner.why_kept(id))

    # Commands and sharing

    def serve_command(
        self, verb: str, handler: Handler, *, idempotent: bool = False
    ) -> Callable[[], None]:
        """Let *handler* execute the commands *verb*, on the replica's thread, where it cannot
        wait. See `crdtstate.Replica.serve_command`."""
        end = self.call(lambda inner: inner.serve_command(verb, handler, idempotent=idempotent))
        return lambda: self.call(lambda _: end())

    def share(self, what: Any, *, to: str | Iterable[str], **options: Any) -> Results:
        """Give certain agents a signed copy of a view or document. See
        `crdtstate.Replica.share`."""
        given = what._inner if isinstance(what, _View) else what
        return self._wait(lambda: self._replica.share(given, to=to, **options))

    def shared(self, name: str | None = None) -> list[Shared]:
        """What others have shared with this agent. See `crdtstate.Replica.shared`."""
        return self.call(lambda inner: inner.shared(name))

    def trust(self, agent: str) -> None:
        """Believe the next key that *agent* shows."""
        self.call(lambda inner: inner.trust(agent))

    # Watching and looking

    def quarantined(self, document: str | None = None) -> list[Quarantined]:
        """The changes that are hidden. See `crdtstate.Replica.quarantined`."""
        return self.call(lambda inner: inner.quarantined(document))

    def release(self, item: Quarantined, *, message: str = "") -> None:
        """Show a change that was hidden. See `crdtstate.Replica.release`."""
        self.call(lambda inner: inner.release(item, message=message))

    def revoke(self, who: str | Revocation, *, reason: str = "") -> list[Revocation]:
        """Revoke a member for ever. See `crdtstate.Replica.revoke`."""
        return self.call(lambda inner: inner.revoke(who, reason=reason))

    def revocations(self) -> list[Revocation]:
        """Who was revoked, oldest first."""
        return self.call(lambda inner: inner.revocations())

    @property
    def recovery(self) -> Recovery | None:
        """How this replica came by its documents when it was opened; None before."""
        return self._replica.recovery

    def present(self, value: Any, *, ttl: float = 30.0) -> None:
        """Show *value* to all members. See `crdtstate.Replica.present`."""
        self.call(lambda inner: inner.present(value, ttl=ttl))

    def presence(self) -> dict[str, Any]:
        """What all agents show now: agent -> value."""
        return self.call(lambda inner: inner.presence())

    def members(self) -> list[Member]:
        """All known members of the mesh, this one included, by name."""
        return self.call(lambda inner: inner.members())

    def on(self, event: type[E], handler: Callable[[E], object]) -> Callable[[], None]:
        """Call *handler*, on the replica's thread, with every event of the type *event*.

        Returns a function that ends it.
        """
        cancel = self.call(lambda inner: inner.on(event, handler))
        return lambda: self.call(lambda _: cancel())

    @property
    def agent(self) -> str:
        """The agent's name."""
        return self._replica.agent

    @property
    def address(self) -> str | None:
        """Where it listens."""
        return self._replica.address

    @property
    def role(self) -> str:
        """Whether it is an agent or a relay."""
        return self._replica.role

    @property
    def writer(self) -> int:
        """Whose lane it writes: its number in versions."""
        return self._replica.writer

    def connect(self, url: str) -> None:
        """Stay connected to the peer at *url* from now on."""
        self.call(lambda inner: inner.connect(url))

    def unreachable(self) -> dict[str, str]:
        """The addresses that are being dialled without success, and why."""
        return self.call(lambda inner: inner.unreachable())

    def peers(self) -> list[Peer]:
        """The connected peers, by name."""
        return self.call(lambda inner: inner.peers())

    def status(self) -> dict[str, Any]:
        """A summary of plain values, for people and monitoring."""
        return self.call(lambda inner: inner.status())

    def __repr__(self) -> str:
        return repr(self._replica) if not self._is_open else self.call(repr)

    # Between the threads

    @property
    def _held(self) -> _Held | None:
        found: _Held | None = getattr(self._local, "held", None)
        return found

    def _is_here(self) -> bool:
        return self._thread is threading.current_thread()

    def _has_ended(self) -> bool:
        """Whether it was closed, and its thread is gone: it answers as a closed one does."""
        return self._is_closed and not (self._thread and self._thread.is_alive())

    def _hand_over(self, function: Callable[[], T]) -> Future[T]:
        """Let the loop run *function* between two of its turns."""
        answer: Future[T] = Future()
        with self._lock:
            self._check_open()
            self._loop.call_soon_threadsafe(_answer, answer, function)
        return answer

    def _wait(self, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if self._is_here() or self._held is not None:
            raise UsageError("in a handler or transaction nothing can be waited for")
        with self._lock:
            self._check_open()
            future = asyncio.run_coroutine_threadsafe(start(), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise ReplicaClosed(f"{self.agent}: closed while waiting") from None
        except BaseException:
            future.cancel()
            raise

    def _check_open(self) -> None:
        if not self._is_open:
            closed = "closed" if self._is_closed else "not open; use it inside 'with Replica(...)'"
            raise ReplicaClosed(f"{self.agent}: {closed}")


class Controller:
    """Commands a fleet; see `crdtstate.Controller`, whose methods these are.

    Args:
        replica: An open `Replica` of this module.
    """

    def __init__(self, replica: Replica) -> None:
        if not isinstance(replica, Replica):
            raise UsageError(f"a controller needs a blocking.Replica, not {replica!r}")
        self._home = replica
        self._inner = replica.call(controller.Controller)

    def issue(self, verb: str, **options: Any) -> Results:
        """Have agents execute a command of their own. See `crdtstate.Controller.issue`."""
        return self._home._wait(lambda: self._inner.issue(verb, **options))

    def result(self, id: str, *, timeout: float | None = 0.0) -> Results:
        """What has come of a command by now. See `crdtstate.Controller.result`."""
        return self._home._wait(lambda: self._inner.result(id, timeout=timeout))

    def commands(self) -> list[Results]:
        """The commands that are open or recent, of all controllers, oldest first."""
        return self._home.call(lambda _: self._inner.commands())

    def withdraw(self, id: str) -> None:
        """Take back a command that this agent has issued."""
        self._home.call(lambda _: self._inner.withdraw(id))

    def checkpoint_all(self, label: str = "", **options: Any) -> SystemCheckpoint:
        """Have every agent make a checkpoint. See `crdtstate.Controller.checkpoint_all`."""
        return self._home._wait(lambda: self._inner.checkpoint_all(label, **options))

    def restore_system(self, id: str, **options: Any) -> SystemRestore:
        """Bring all documents back to what they were at a checkpoint of the system. See
        `crdtstate.Controller.restore_system`."""
        return self._home._wait(lambda: self._inner.restore_system(id, **options))

    def resolve_conflicts(self, strategy: str | None = None, **options: Any) -> Results:
        """Have the open conflicts resolved. See `crdtstate.Controller.resolve_conflicts`."""
        return self._home._wait(lambda: self._inner.resolve_conflicts(strategy, **options))

    def report(self, *, timeout: float = 5.0) -> Report:
        """How all known agents do. See `crdtstate.Controller.report`."""
        return self._home._wait(lambda: self._inner.report(timeout=timeout))

    def __repr__(self) -> str:
        return repr(self._inner)


def _answer(answer: Future[T], function: Callable[[], T]) -> None:
    try:
        answer.set_result(function())
    except BaseException as exc:
        answer.set_exception(exc)


class _Undo(Exception):
    """Raised on the replica's thread to undo the transaction there."""


class _Held:
    """A transaction in which the replica's thread does what one other thread says.

    Args:
        limit: Seconds after which it is undone.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Why it was undone, and the answer that the other thread waits for.
        self._failure: BaseException | None = None
        self._asked: Future[Any] = Future()
        self._lock = threading.Lock()

    def serve(self, inner: replica.Replica, message: str, run: str) -> None:
        """Do the work as it comes; on the replica's thread."""
        deadline = time.monotonic() + self._limit
        try:
            with inner.transaction(message=message, run=run):
                while (work := self._next(deadline)) is not None:
                    work()
        except BaseException as exc:
            with self._lock:
                self._failure = exc
                if not self._asked.done():
                    self._asked.set_exception(exc)
            raise

    def _next(self, deadline: float) -> Callable[[], None] | None:
        try:
            return self._work.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise UsageError(
                f"a transaction was open for {self._limit:g} s, in which its replica could do "
                "nothing else; it was undone"
            ) from None

    def call(self, function: Callable[[], T]) -> T:
        """Have *function* called in the transaction; on the other thread."""
        answer: Future[T] = Future()
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._asked = answer
            self._work.put(lambda: _answer(answer, function))
        return answer.result()

    def commit(self) -> None:
        self._work.put(None)

    def undo(self) -> None:
        def work() -> None:
            raise _Undo

        self._work.put(work)


# Views


class _View:
    """Does what the view of the same name in `crdtstate` does, on the replica's thread."""

    def __init__(self, home: Replica, inner: Any) -> None:
        self._home = home
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if callable(getattr(type(self._inner), name, None)):
            return lambda *args, **kwargs: self._do(name, *args, **kwargs)
        return self._home.call(lambda _: getattr(self._inner, name))

    def _do(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._home.call(lambda _: getattr(self._inner, name)(*args, **kwargs))

    def __repr__(self) -> str:
        return str(self._do("__repr__"))


def _whole(name: str) -> Any:
    """A method done as one, where the abstract class would make several calls of it."""
    return lambda self, *args, **kwargs: self._do(name, *args, **kwargs)


class Document(_View):
    """A document; see `crdtstate.Document`."""

    def map(self, name: str, *, strategy: str | None = None) -> Map:
        return Map(self._home, self._do("map", name, strategy=strategy))

    def register(self, name: str, *, strategy: str | None = None) -> Register:
        return Register(self._home, self._do("register", name, strategy=strategy))

    def counter(self, name: str) -> Counter:
        return Counter(self._home, self._do("counter", name))

    def set(self, name: str) -> Set:
        return Set(self._home, self._do("set", name))


class Map(_View, MutableMapping[str, Any]):
    """A replicated dict; see `crdtstate.Map`."""

    __getitem__, __setitem__ = _whole("__getitem__"), _whole("__setitem__")
    __delitem__, __contains__ = _whole("__delitem__"), _whole("__contains__")
    __len__, get, setdefault = _whole("__len__"), _whole("get"), _whole("setdefault")
    pop, popitem, clear = _whole("pop"), _whole("popitem"), _whole("clear")
    update = _whole("update")

    def __iter__(self) -> Iterator[str]:
        return iter(self._home.call(lambda _: list(self._inner)))

    def get_strong(self, key: str, *, timeout: float | None = 5.0) -> Any:
        """See `crdtstate.Map.get_strong`."""
        return self._home._wait(lambda: self._inner.get_strong(key, timeout=timeout))

    def set_strong(self, key: str, value: Any, *, timeout: float | None = 5.0) -> None:
        """See `crdtstate.Map.set_strong`."""
        self._home._wait(lambda: self._inner.set_strong(key, value, timeout=timeout))

    def items(self) -> ItemsView[str, Any]:
        return self._home.call(lambda _: dict(self._inner)).items()

    def values(self) -> ValuesView[Any]:
        return self._home.call(lambda _: dict(self._inner)).values()


class Set(_View, MutableSet[Any]):
    """A replicated set; see `crdtstate.Set`."""

    __contains__, __len__, add = _whole("__contains__"), _whole("__len__"), _whole("add")
    discard, remove, update = _whole("discard"), _whole("remove"), _whole("update")
    pop, clear = _whole("pop"), _whole("clear")

    @classmethod
    def _from_iterable(cls, it: Any) -> set[Any]:
        return set(it)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._home.call(lambda _: list(self._inner)))


class Counter(_View):
    """A replicated whole number; see `crdtstate.Counter`."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


class Register(_View):
    """One replicated value; see `crdtstate.Register`."""

    @property
    def value(self) -> Any:
        return self._home.call(lambda _: self._inner.value)

    @value.setter
    def value(self, value: Any) -> None:
        self._home.call(lambda _: setattr(self._inner, "value", value))

    def get_strong(self, *, timeout: float | None = 5.0) -> Any:
        """See `crdtstate.Register.get_strong`."""
        return self._home._wait(lambda: self._inner.get_strong(timeout=timeout))

    def set_strong(self, value: Any, *, timeout: float | None = 5.0) -> None:
        """See `crdtstate.Register.set_strong`."""
        self._home._wait(lambda: self._inner.set_strong(value, timeout=timeout))
