"""
The loop that documents live on, and the way to it from any thread and any other loop.

LangGraph calls the same saver and store from coroutines, worker threads and plain programs, while a
replica belongs to one event loop. A `Home` knows that loop. What a door does is written once, as a
coroutine, and either awaited there (`arun`) or waited for from outside (`run`). A home is somebody
else's replica, or one that it opens and closes itself: on the loop that is running (``async with``)
or on a thread with a loop of its own (``with``). A file is opened by one process, which is fast,
or shared by several (`one_file`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from crdtstate import blocking
from crdtstate.errors import ReplicaClosed, UsageError
from crdtstate.integrations.one_file import OneFile
from crdtstate.replica import Replica

T = TypeVar("T")


class WouldWait(UsageError, asyncio.InvalidStateError):
    """A loop would wait for itself; nothing was done. LangGraph's own parts raise the second."""


class Place(Protocol):
    """A replica, and how to wait until what was written is safe there."""

    @property
    def replica(self) -> Replica:
        """Read and write it on its loop."""

    async def saved(self) -> None:
        """Everything written so far is committed in the store."""

    async def current(self, documents: Collection[str]) -> None:
        """What others have saved of some documents in this place is here."""


class Running:
    """A replica that somebody else opened."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica

    async def saved(self) -> None:
        """Wait until what was written is committed. Raises StoreError."""
        await self.replica.durable()

    async def current(self, documents: Collection[str]) -> None:
        """It is the store's only reader and writer."""


class Home:
    """Where the documents of a saver or store are.

    Args:
        place: The replica, if it is open; else *opening* makes one.
        loop: Its loop.
        opening: Opens a place, once, when this home is entered.
    """

    def __init__(
        self,
        place: Place | None,
        loop: asyncio.AbstractEventLoop | None,
        opening: Callable[[], AbstractAsyncContextManager[Place]] | None = None,
    ) -> None:
        self._place = place
        self._loop = loop
        self._opening = opening
        self._entered: AbstractAsyncContextManager[Place] | None = None
        self._thread: threading.Thread | None = None
        self._closing: asyncio.Event | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @classmethod
    def of(cls, given: object) -> Home:
        """The home of a replica that is open, or of a saver or store.

        Raises:
            UsageError: It is none, or its loop is not the one that is running.
        """
        if isinstance(home := getattr(given, "home", None), Home):
            return home
        if isinstance(given, blocking.Replica):
            inner, loop = given.call(lambda replica: (replica, asyncio.get_running_loop()))
            return cls(Running(inner), loop)
        if not isinstance(given, Replica):
            raise UsageError(
                f"give an open Replica, or use open('agents.db'); not {type(given).__name__}"
            )
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise UsageError(
                "make this inside 'async with Replica(...)', on its event loop; without a loop "
                "use open('agents.db') or a crdtstate.blocking.Replica"
            ) from None
        if not given.glance().is_open:
            raise ReplicaClosed(f"{given.agent}: not open; use it inside 'async with Replica(...)'")
        return cls(Running(given), loop)

    @classmethod
    def at(cls, path: str | Path, name: str, shared: bool, options: dict[str, Any]) -> Home:
        """A home that opens the store file *path* when it is entered.

        Raises:
            UsageError: An option cannot be.
        """
        opened: _Opened | _Shared
        opened = _Shared(path, name, options) if shared else _Opened(path, name, options)
        return cls(None, None, lambda: opened)

    # Where everything runs

    @property
    def replica(self) -> Replica:
        """The replica; only for use on its loop."""
        if self._place is None:
            raise ReplicaClosed("not open; use it inside 'with' or 'async with'")
        return self._place.replica

    async def saved(self) -> None:
        """Wait until everything written so far is committed."""
        if self._place is None:
            raise ReplicaClosed("closed while waiting")
        await self._place.saved()

    async def current(self, *documents: str) -> None:
        """Wait until what others saved of some documents in the same file is here."""
        if self._place is not None:
            await self._place.current(documents)

    def run(self, work: Coroutine[Any, Any, T], name: str) -> T:
        """Carry out *work* on the replica's loop while this thread waits.

        Raises:
            WouldWait: This is the replica's loop.
        """
        loop = self._loop
        if loop is None or loop.is_closed():
            work.close()
            raise ReplicaClosed(f"{name}: not open; use it inside 'with' or 'async with'")
        if _running_loop() is loop:
            work.close()
            raise WouldWait(
                f"{name}() on the event loop of its replica would wait for itself: await the "
                f"method of that name with an 'a' before it, or call this from another thread"
            )
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    async def arun(self, work: Coroutine[Any, Any, T], name: str) -> T:
        """Carry out *work* on the replica's loop, from whichever loop this is."""
        loop = self._loop
        if loop is None or loop.is_closed():
            work.close()
            raise ReplicaClosed(f"{name}: not open; use it inside 'with' or 'async with'")
        if asyncio.get_running_loop() is loop:
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Let *work* go on beside everything else, on the replica's loop, where this is called."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Opening and closing

    def _take_opening(self) -> Callable[[], AbstractAsyncContextManager[Place]]:
        if self._opening is None:
            raise UsageError("its replica is somebody else's, or it was opened: that happens once")
        opening, self._opening = self._opening, None
        return opening

    async def aenter(self) -> None:
        """Open on the loop that is running."""
        entered = self._take_opening()()
        self._place = await entered.__aenter__()
        self._entered, self._loop = entered, asyncio.get_running_loop()

    async def aexit(self) -> None:
        """Save and close. Idempotent."""
        entered, self._entered = self._entered, None
        for task in list(self._tasks):
            task.cancel()
        if entered is not None:
            self._loop = None
            try:
                await entered.__aexit__(None, None, None)
            finally:
                self._place = None

    def enter(self) -> None:
        """Open on a thread with a loop of its own."""
        if _running_loop() is not None:
            raise UsageError("use 'async with' where an event loop is running")
        opening = self._take_opening()
        opened: Future[None] = Future()
        # A daemon, so that a program that forgets to close still ends.
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._live(opening, opened)),
            name="crdtstate langgraph",
            daemon=True,
        )
        self._thread.start()
        try:
            opened.result()
        except BaseException:
            self.exit()
            raise

    async def _live(
        self, opening: Callable[[], AbstractAsyncContextManager[Place]], opened: Future[None]
    ) -> None:
        self._opening = opening
        self._closing = asyncio.Event()
        try:
            await self.aenter()
        except BaseException as exc:
            opened.set_exception(exc)
            return
        opened.set_result(None)
        await self._closing.wait()
        await self.aexit()

    def exit(self) -> None:
        """Save, close and end the thread. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if self._loop is not None and self._closing is not None:
            self._loop.call_soon_threadsafe(self._closing.set)
        thread.join()


class Door:
    """What saver and store share: a home, and being opened by ``with`` or ``async with``."""

    home: Home

    async def __aenter__(self) -> Self:
        await self.home.aenter()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.home.aexit()

    def __enter__(self) -> Self:
        self.home.enter()
        return self

    def __exit__(self, *exc: object) -> None:
        self.home.exit()


class _Opened(Running):
    """A replica of our own, for as long as it is entered."""

    def __init__(self, path: str | Path, name: str, options: dict[str, Any]) -> None:
        super().__init__(Replica(name, store=path, **options))

    async def __aenter__(self) -> Self:
        await self.replica.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.replica.close()


class _Shared:
    """One process's part of a file that several have open."""

    def __init__(self, path: str | Path, name: str, options: dict[str, Any]) -> None:
        self._file = OneFile(path, name, **options)

    @property
    def replica(self) -> Replica:
        return self._file.replica

    async def saved(self) -> None:
        await self._file.saved()

    async def current(self, documents: Collection[str]) -> None:
        # If nobody answers, what is here is read: a takeover is going on.
        await asyncio.gather(*(self._file.current(name) for name in documents))

    async def __aenter__(self) -> Self:
        await self._file.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._file.close()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
