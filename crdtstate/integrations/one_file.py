"""
One file, many processes: those that name the same store file form one mesh by themselves.

Each process has a replica of its own, in memory, that it reads and writes. The one that gets the
file's lock is also its *keeper*: it runs a second replica on the store, a relay, which listens on a
socket beside the file (``<file>.run/mesh.sock``) and lends the others their writers. When its
process ends, or is killed, the next one that gets the lock takes over, and the others dial it.

The rule: a write is *saved* once the keeper has committed it. What was saved survives any kill of
any of them, and a power cut a tenth of a second later; what was not is still in the replica that
wrote it, which gives it to whoever keeps the file next.

Peers, an address to listen on and a mesh are the keeper's: through it all processes join other
hosts. All that name a file should therefore give the same.

The keeper works on the event loop of its process: one that blocks for long holds up the others.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from crdtstate.clock import Version
from crdtstate.config import Config
from crdtstate.consistency import Confirm, Confirmation
from crdtstate.credentials import Credentials, open_credentials
from crdtstate.errors import (
    ConfirmTimeout,
    CRDTStateError,
    LeaseRefused,
    StoreLocked,
    UsageError,
    WaitTimeout,
)
from crdtstate.events import PeerConnected, PeerDisconnected
from crdtstate.link import takes
from crdtstate.recovery import Opened
from crdtstate.replica import Replica
from crdtstate.transports import Listener
from crdtstate.transports.unix import PATH_BYTES_MAX

log = logging.getLogger("crdtstate")

OPEN_TIMEOUT = 60.0
"""Seconds that opening may take: the keeper may have a large file to load first."""

SYNC_TIMEOUT = 30.0
"""Seconds within which the keeper has to hand over what is in the file."""

ASK_AGAIN = 0.25
"""Seconds after which it is asked anew whether a write was saved: whoever was asked may be gone."""

LOOK_EVERY = 0.05
"""Seconds between two tries to get the lock, while nobody answers: takeovers are seldom."""

LOOK_EVERY_MAX = 2.0
"""The same after tries that failed for another reason than the lock."""

REDIAL_MAX = 0.2
"""Seconds between two tries to reach the keeper: a socket on this machine costs nothing."""

LARGE_BYTES = 2**20
"""Changes of a document, in bytes, from which on it is handed on within a process as a whole."""

PROCESSES_MAX = 1000
"""Processes with one key that may be connected with the keeper of a signed mesh."""


class OneFile:
    """A file that any number of processes of one user on one host share.

    Use it as ``async with OneFile(path, name) as one``: inside, `replica` has what is in the file.

    Args:
        path: The store file; made on first use. Its directory has to be there.
        name: Who writes, for people: the agent's name in each change. In a mesh of members it is
            the name in the certificate instead.
        peers: Relays or agents on other hosts that the keeper stays connected to.
        listen: Where the keeper lets others in, such as ``ws://0.0.0.0:8765``.
        mesh: What proves that the processes belong to a mesh, as for `Replica`.
        config: Settings.
        subscribe: The documents that this process takes part in, as for `Replica`. The file keeps
            all.
        checkpoints: The tiers that have this process's own checkpoints, as for `Replica`; none is
            made but when it is asked. In memory if it is None.
        open_timeout: Seconds that opening may take.

    Raises:
        UsageError: An argument cannot be.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        name: str,
        *,
        peers: Iterable[str] = (),
        listen: str | None = None,
        mesh: str | Path | Credentials | None = None,
        config: Config | None = None,
        subscribe: Iterable[str] | None = None,
        checkpoints: Iterable[str] | None = None,
        open_timeout: float = OPEN_TIMEOUT,
    ) -> None:
        # By whatever name: links and relative paths lead to one file.
        self.path = Path(os.path.realpath(path))
        self._credentials = open_credentials(mesh, self.path)
        certificate = self._credentials.certificate
        self.name = name if certificate is None else certificate.agent
        self.keeper_name = keeper_name(self.path) if certificate is None else certificate.agent
        self._is_signed = certificate is not None
        self._peers = tuple(peers)
        self._listen = listen
        self._config = config or Config()
        self._subscribe = None if subscribe is None else tuple(subscribe)
        self._checkpoints = None if checkpoints is None else tuple(checkpoints)
        self._open_timeout = open_timeout
        self._socket = socket_of(self.path)
        self._keeper: _Keeper | None = None
        self._replica: _Member | None = None
        self._watch: asyncio.Task[None] | None = None
        # Set while there is no connection to a keeper.
        self._is_alone = asyncio.Event()
        # Why this process could not become the keeper, if that was not the lock.
        self._trouble: CRDTStateError | None = None
        self.keeping = asyncio.Event()
        """Set while this process keeps the file."""
        # Arguments that cannot be are refused here, not once this process takes over.
        self._make_keeper()
        self._make_member()

    @property
    def replica(self) -> Replica:
        """The process's own replica: read and write it as plain Python."""
        if self._replica is None:
            raise UsageError(f"{self.path}: not open; use it inside `async with OneFile(...)`")
        return self._replica

    @property
    def is_keeper(self) -> bool:
        """Whether this process keeps the file now."""
        return self._keeper is not None

    @property
    def address(self) -> str | None:
        """Where this process lets other hosts in; None if it is not the keeper, or does not."""
        return None if self._keeper is None else self._keeper.address

    # Opening and closing

    async def __aenter__(self) -> Self:
        if self._replica is not None or self._watch is not None:
            raise UsageError("a OneFile is opened once; make a new one")
        try:
            async with asyncio.timeout(self._open_timeout):
                await self._open()
        except TimeoutError:
            await self.close()
            raise WaitTimeout(
                f"{self.path}: whoever keeps the file did not answer within {self._open_timeout} s"
                f"{self._hint()}"
            ) from None
        except BaseException:
            await self.close()
            raise
        self._watch = asyncio.create_task(self._stand_by(), name=f"{self.name}: stand by")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Hand over what was written, and the file if this process keeps it. Idempotent."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
        member, keeper = self._replica, self._keeper
        try:
            # First, while the keeper is still there to take it all.
            if member is not None:
                await member.close()
        finally:
            self._keeper = None
            self.keeping.clear()
            if keeper is not None:
                await keeper.close()

    async def _open(self) -> None:
        """Find the keeper, or become it; then have what is in the file."""
        while self._replica is None:
            await self._try_to_keep()
            member = self._make_member()
            if self._keeper is not None:
                # Far less work than to have it come over the socket, change by change.
                member.begin_with(self._keeper)
            try:
                self._replica = await member.__aenter__()
            except LeaseRefused:
                # Nobody listens yet, or no more.
                await asyncio.sleep(LOOK_EVERY)
        self._replica.on(PeerConnected, lambda _: self._look())
        self._replica.on(PeerDisconnected, lambda _: self._look())
        while True:
            try:
                return await self._replica.synced(timeout=LOOK_EVERY_MAX)
            except WaitTimeout:
                # The keeper may have been killed in between.
                await self._try_to_keep()

    async def _stand_by(self) -> None:
        """Take the file over whenever nobody keeps it."""
        pause = LOOK_EVERY
        while True:
            self._look()
            await self._is_alone.wait()
            try:
                await self._try_to_keep()
                pause = LOOK_EVERY
            except CRDTStateError as exc:
                log.error("%s: cannot take over %s: %s", self.name, self.path, exc)
                self._trouble = exc
                pause = min(2 * pause, LOOK_EVERY_MAX)
            await asyncio.sleep(pause)

    def _look(self) -> None:
        """See whether there is a connection to a keeper."""
        if self._replica is not None and self._replica.peers():
            self._is_alone.clear()
        else:
            self._is_alone.set()

    async def _try_to_keep(self) -> None:
        """Become the keeper, unless somebody is. Raises what opening a `Replica` does."""
        if self._keeper is not None:
            return
        keeper = self._make_keeper()
        try:
            await keeper.__aenter__()
        except StoreLocked:
            return
        self._keeper, self._trouble = keeper, None
        self.keeping.set()

    def _make_keeper(self) -> _Keeper:
        config = self._config
        if not self._peers and self._listen is None:
            # Those of this host only copy from it; of a large document it would take the loop's
            # time from whoever calls.
            config = replace(config, compare_interval=0)
        if self._is_signed:
            # All processes of this host have one key.
            limits = replace(
                config.limits,
                connections_per_key=max(config.limits.connections_per_key, PROCESSES_MAX),
                writers_per_hour=max(config.limits.writers_per_hour, 10 * PROCESSES_MAX),
            )
            config = replace(config, limits=limits)
        return _Keeper(
            self.keeper_name,
            self._socket,
            store=self.path,
            listen=self._listen,
            peers=self._peers,
            mesh=self._credentials,
            config=config,
        )

    def _make_member(self) -> _Member:
        config = replace(
            self._config,
            discover=False,
            reconnect_max=REDIAL_MAX,
            compare_interval=0,
            checkpoint_interval=0,
        )
        return _Member(
            self.name,
            peers=[f"unix://{self._socket}"],
            mesh=self._credentials,
            config=config,
            subscribe=self._subscribe,
            checkpoints=self._checkpoints,
            lease=not self._is_signed,
        )

    # Saving

    async def saved(self, timeout: float = 10.0) -> None:
        """Wait until everything written here so far is committed in the file, by whoever keeps it.

        Raises:
            ConfirmTimeout: Nobody said so within *timeout* seconds. What was written stays here,
                and will usually get there: the outcome is unknown, not bad.
        """
        if self._replica is None:
            raise UsageError(f"{self.path}: not open; use it inside `async with OneFile(...)`")
        try:
            await self._replica.kept_by(self.keeper_name, self._is_signed, timeout)
        except ConfirmTimeout as exc:
            if hint := self._hint():
                exc.add_note(hint.removeprefix("; "))
            raise

    async def current(self, document: str, timeout: float = 1.0) -> bool:
        """Wait until this process has what is in the file now of *document*, so that it reads what
        any process had saved before this was called.

        Returns:
            Whether it does; False if nobody answered within *timeout* seconds, and what is read
            may be older.
        """
        if self._replica is None:
            raise UsageError(f"{self.path}: not open; use it inside `async with OneFile(...)`")
        if self._keeper is not None:
            # Nobody has to be asked.
            return await self._replica.has(document, self._keeper.version_of(document), timeout)
        return await self._replica.catch_up(self.keeper_name, self._is_signed, document, timeout)

    def _hint(self) -> str:
        """Why there is no keeper, as far as this process knows."""
        if self._trouble is not None:
            return f"; this process cannot keep it: {self._trouble}"
        if self._replica is not None and (why := self._replica.unreachable()):
            return f"; {'; '.join(f'{url}: {reason}' for url, reason in why.items())}"
        return ""

    def __repr__(self) -> str:
        state = "not open" if self._replica is None else "keeper" if self._keeper else "member"
        return f"<OneFile {self.path} {self.name} {state}>"


class _Keeper(Replica):
    """The replica on the file. Beside the address for other hosts it listens on a socket, of which
    nobody elsewhere is told."""

    def __init__(self, agent: str, local: Path, **options: Any) -> None:
        super().__init__(agent, role="relay", **options)
        self._local = local

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        try:
            _make_folder(self._local.parent)
            url = f"unix://{self._local}"
            local = await self._connections.listen(url, http=None, tls=None)
            # It is closed with the other one: after the last goodbye, and before the file is let
            # go, as whoever takes that over listens there.
            self._listener = local if self._listener is None else _Both(self._listener, local)
        except BaseException:
            await self.close()
            raise
        return self

    async def _validate(self, opened: Opened) -> None:
        # Only other hosts could know better: those of this one copy from it.
        if self._peer_urls or self._listen_url:
            await super()._validate(opened)

    def large(self, name: str) -> bytes | None:
        """A document, as a snapshot, if that is far less work to take in than its changes."""
        found = self.find(name)
        if found is None or found.shared or self._store.kept(name) < LARGE_BYTES:
            return None
        return found.snapshot().encode()

    def version_of(self, name: str) -> Version:
        """What it has of a document."""
        found = self.find(name)
        return found.version.copy() if found is not None else Version()


class _Both:
    """Two listeners as one; see `crdtstate.transports.Listener`."""

    def __init__(self, public: Listener, local: Listener) -> None:
        self.address = public.address
        self._both = public, local

    async def close(self) -> None:
        """See `crdtstate.transports.Listener`."""
        await asyncio.gather(*(each.close() for each in self._both))


class _Member(Replica):
    """The replica of one process, in memory, connected with the keeper only."""

    # Document -> own seq that the keeper has committed; of which writer.
    _kept: dict[str, int]
    _kept_writer = 0

    _beginning: list[tuple[str, bytes]] | None = None

    def begin_with(self, keeper: _Keeper) -> None:
        """Begin with what the keeper in this process has of large documents. Small ones come as
        ever, change by change, so that their history is here as well; native ones too, as what is
        in them is tried first."""
        self._beginning = [
            (name, data)
            for name, _ in keeper.versions()
            if takes(self._subscribe, name) and (data := keeper.large(name)) is not None
        ]

    async def _climb(self) -> Opened:
        opened = await super()._climb()
        self._audit.is_loading = True
        try:
            for name, data in self._beginning or ():
                self.load_snapshot(name, data)
        finally:
            self._audit.is_loading = False
            self._beginning = None
        return opened

    async def has(self, document: str, version: Version, timeout: float) -> bool:
        """Wait until this replica has a version of a document; whether it has."""
        try:
            await self._until(
                lambda: version <= ((found := self.find(document)) and found.version or Version()),
                timeout,
                "the keeper",
            )
        except WaitTimeout:
            return False
        return True

    async def kept_by(self, keeper: str, is_signed: bool, timeout: float) -> None:
        """Wait until *keeper* has committed what was written here so far."""
        deadline = self._loop.time() + timeout
        while True:
            # Anew each time: this replica may go on under another writer meanwhile.
            unkept = self._unkept()
            if not unkept:
                return
            left = deadline - self._loop.time()
            # In a signed mesh all of this host have one name, but only the keeper has a store, and
            # only who has one says that anything is durable.
            confirm = Confirm(1, durable=is_signed)
            versions = {name: Version({self._writer: seq}) for name, seq in unkept.items()}
            writer, now = self._writer, self._loop.time()
            asked = Confirmation(self._sync, confirm, versions, (keeper,), now)
            try:
                seconds = max(0.0, min(left, ASK_AGAIN))
                await self._until(partial(asked.poll, now), seconds, "the keeper")
            except WaitTimeout:
                if left <= ASK_AGAIN:
                    raise ConfirmTimeout((), (keeper,), 1, timeout) from None
                continue
            finally:
                asked.close()
            if writer == self._writer:
                for name, seq in unkept.items():
                    self._kept[name] = max(seq, self._kept.get(name, 0))
                return

    async def catch_up(self, keeper: str, is_signed: bool, document: str, timeout: float) -> bool:
        """Wait until this replica has what *keeper* has committed of a document; whether it has."""
        core, now = self._sync, self._loop.time()
        question = core.ask(document, Version(), (keeper,), now, durable=is_signed, tell=True)

        def is_here() -> bool:
            told = question.answers.get(keeper)
            found = self.find(document)
            return told is not None and told <= (found.version if found else Version())

        try:
            await self._until(is_here, timeout, "the keeper")
        except WaitTimeout:
            return False
        finally:
            core.withdraw(question)
        return True

    def _unkept(self) -> dict[str, int]:
        """The documents in which something was written here of which it is not known whether it is
        kept, with the own seq in each."""
        self._check_usable()
        self._check_settled()
        self._seal_open()
        self._pump()
        if self._kept_writer != self._writer:
            self._kept_writer, self._kept = self._writer, {}
        return {
            name: seq
            for name, version in self.versions()
            if (seq := version.get(self._writer, 0)) > self._kept.get(name, 0)
        }


def keeper_name(path: Path) -> str:
    """What other hosts see the keeper of a file as: the file, the host, and what tells files of one
    name apart."""
    file = "".join(each if each.isprintable() else "?" for each in path.name)
    mark = hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()
    return f"{file[:40]}@{socket.gethostname()[:40]}-{mark}"


def socket_of(path: Path) -> Path:
    """Where the keeper of a file listens: beside it, or in a folder of the user's if the path is
    too long for a socket. All processes have to come to the same, so no environment counts."""
    beside = Path(f"{path}.run") / "mesh.sock"
    if len(os.fsencode(beside)) <= PATH_BYTES_MAX:
        return beside
    mark = hashlib.blake2b(os.fsencode(path), digest_size=16).hexdigest()
    folder = Path(f"/run/user/{os.geteuid()}")
    if not folder.is_dir():
        folder = Path("/tmp")  # noqa: S108 (the folder in it is checked to be the user's alone)
    return folder / f"crdtstate-{os.geteuid()}" / f"{mark}.sock"


def _make_folder(folder: Path) -> None:
    """Make the folder of a socket, for this user alone."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as exc:
        raise UsageError(f"{folder}: cannot be made ({exc.strerror}); the socket is in it") from exc
