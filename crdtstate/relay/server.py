"""
The relay as a process: opened, announced, drained and closed in order when it is told to stop.

Draining is what lets a relay be restarted under a running fleet: it says that it is on its way out
(``/healthz``, systemd), goes on until its peers have what it has, or a few seconds are over, tells
them goodbye, and closes its store. They dial again until it is back.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from crdtstate.credentials import Credentials, open_credentials, open_host_credentials
from crdtstate.errors import UsageError, WaitTimeout
from crdtstate.relay import leash, notify
from crdtstate.relay.pages import Site
from crdtstate.relay.settings import Settings
from crdtstate.relay.tokens import Tokens
from crdtstate.replica import Replica
from crdtstate.transports import HttpAnswer, HttpRequest, HttpSocket, HttpStream


def import_modules(names: Iterable[str]) -> None:
    """Import modules for what they register, from the working directory too.

    Raises:
        UsageError: One cannot be imported.
    """
    for name in names:
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            importlib.import_module(name)
        except Exception as exc:
            raise UsageError(f"module {name!r}: {type(exc).__name__}: {exc}") from exc


async def serve(settings: Settings, announce: Callable[[str, str], object]) -> None:
    """Run a relay until SIGTERM or SIGINT, then drain it. A second signal ends it at once, as it
    does any program; the store stands that.

    Args:
        settings: What kind of relay.
        announce: Called with the address it listens on, once it does, and the token of its pages.

    Raises:
        TransportError: The address cannot be had.
        StoreError: The store cannot be opened.
        UsageError: A setting cannot be.
    """

    def http(request: HttpRequest) -> HttpAnswer | HttpStream | HttpSocket | None:
        return site.answer(request)

    import_modules(settings.modules)
    store = None if settings.store is None else Path(settings.store)
    mesh = open_credentials(None if settings.mesh is None else Path(settings.mesh), store)
    known = open_host_credentials() if mesh.kind == "none" else mesh
    tokens = Tokens(known, _token_file(settings, mesh))
    replica = Replica(
        settings.name,
        store=settings.store,
        listen=settings.listen,
        advertise=settings.advertise,
        peers=settings.peers,
        mesh=mesh,
        checkpoints=settings.checkpoints or None,
        config=settings.config,
        durability=settings.durability,
        role="relay",
        http=http,
        tls=settings.tls_context(),
    )
    site = Site(replica, tokens.may, settings.origins)
    stop = asyncio.Event()
    if settings.attached:
        loop = asyncio.get_running_loop()
        leash.follow(partial(loop.call_soon_threadsafe, stop.set))
    _stop_on_signals(stop)
    async with replica:
        assert replica.address is not None
        announce(replica.address, tokens.newest)
        notify.tell("READY=1")
        await _run_until(stop, replica)
        site.is_draining = True
        notify.tell("STOPPING=1", "STATUS=draining")
        site.end()
        await _drain(replica, settings.drain)
        site.close()


def _token_file(settings: Settings, mesh: Credentials) -> Path | None:
    """Where the token of the pages lies, if it lies anywhere: a member's beside its store."""
    if settings.token_file is not None:
        return Path(settings.token_file)
    if mesh.kind == "member" and settings.store is not None:
        return Path(f"{settings.store}.token")
    return None


async def _run_until(stop: asyncio.Event, replica: Replica) -> None:
    """Wait, and keep telling systemd how it is going. Being told from the event loop, its watchdog
    notices when that stands still."""
    while not stop.is_set():
        peers, documents = len(replica.peers()), len(list(replica.documents()))
        notify.tell("WATCHDOG=1", f"STATUS={peers} peers, {documents} documents")
        try:
            async with asyncio.timeout(notify.every()):
                await stop.wait()
        except TimeoutError:
            pass


async def _drain(replica: Replica, timeout: float) -> None:
    """Wait until what was committed when this began has reached all who are connected."""
    if replica.peers() and timeout:
        try:
            await replica.synced(timeout=timeout)
        except WaitTimeout:
            # They get the rest from others, or from here when this relay is back.
            pass


def announce_as_text(address: str) -> None:
    """Print where the relay listens; the last word is the address."""
    print(f"relay listening on {address}", flush=True)


def announce_as_json(address: str) -> None:
    """Print where the relay listens, for scripts."""
    print(json.dumps({"address": address}), flush=True)


def _stop_on_signals(stop: asyncio.Event) -> None:
    """Let the first SIGTERM or SIGINT set *stop*. The next one does what it does by default."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def on_signal() -> None:
        stop.set()
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in numbers:
        try:
            loop.add_signal_handler(number, on_signal)
        except (NotImplementedError, RuntimeError):
            # Windows; and threads other than the main one, which get no signals.
            pass
