"""
What a replica's user can wait for: the disk, a version, the peers, a quorum.

Each wait is a question that is asked again whenever the pump has run, until the answer is yes or
time is up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from crdtstate import sync
from crdtstate.clock import Cut, Version
from crdtstate.comparing import Comparison
from crdtstate.config import Config
from crdtstate.consistency import Confirm, Confirmation, Receipt, StrongRead, StrongWrite
from crdtstate.document import Document
from crdtstate.documents import DocumentSet
from crdtstate.errors import UsageError, WaitTimeout
from crdtstate.link import takes
from crdtstate.stores import Store


class Waiting(DocumentSet):
    """Documents that are saved, sent and acknowledged while the program goes on."""

    config: Config
    _sync: sync.Sync
    _store: Store
    _loop: asyncio.AbstractEventLoop
    # When the pump runs by itself.
    _timer_at: float
    _peer_urls: list[str]
    _subscribe: tuple[str, ...] | None
    _waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]]
    # Peer -> what was refused of it the last time, of the last few.
    _rejected: dict[str, str]
    # Own seq by document at opening.
    _opened: dict[str, int]

    def _wake(self) -> None:
        """Run the pump soon."""
        raise NotImplementedError

    def _pump(self) -> None:
        """Seal what was written, let the core decide, do what it says."""
        raise NotImplementedError

    def unreachable(self) -> dict[str, str]:
        """The addresses that are being dialled without success, and why."""
        raise NotImplementedError

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
            # Not each time: every pump polls, and would be followed by another.
            if self._sync.is_stirred or self._sync.next_deadline() < self._timer_at:
                self._wake()
            return is_done

        # What it asks first is on its way then.
        self._wake()
        try:
            await self._until(poll, timeout, "other replicas")
        except WaitTimeout:
            raise machine.failure(timeout) from None
        finally:
            machine.close()

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

    async def compare(self, *, peers: int = 2, timeout: float | None = None) -> Comparison:
        """Compare what all documents hold with *peers* of those who are connected now (fewer, if
        there are not so many), and say who agrees. A difference is a fault, and raises
        `DivergenceDetected` on both sides; nothing is changed. See `crdtstate.comparing`.

        Each lane is compared when both have taken in the same of it. What is written all the time
        is tried a few times and then named in `Comparison.uncompared`; compare at a quiet moment,
        or after `synced`, to have all of it compared. Two that disagree do not show which of them
        is right; with more, see who agrees with whom. Who has not answered within *timeout*
        seconds is in `Comparison.unanswered`; nothing is raised for it.

        Raises:
            UsageError: *peers* is not a number above 0.
        """
        self._check_usable()
        self._check_settled()
        if type(peers) is not int or peers < 1:
            raise UsageError(f"peers is a number above 0, not {peers!r}")
        self._seal_open()
        self._pump()
        inquiry = self._sync.comparing.begin(peers, self._loop.time())
        try:
            await self._wait_until(lambda: inquiry.is_done, "peers to compare with", timeout)
        except WaitTimeout:
            # They are named.
            pass
        finally:
            self._sync.comparing.withdraw(inquiry)
        return inquiry.result()

    async def _until(self, ready: Callable[[], bool], timeout: float | None, what: str) -> None:
        self._check_settled()
        await self._wait_until(ready, what, timeout)

    async def _wait_until(
        self, ready: Callable[[], bool], what: str, timeout: float | None = None
    ) -> None:
        self._check_usable()
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
            troubles = [*self.unreachable().items(), *self._rejected.items()]
            hints = "".join(f"; {whom}: {why}" for whom, why in troubles)
            raise WaitTimeout(
                f"{self.agent}: waited {timeout} s for {what}, with {len(self._sync.peers)} peers "
                f"connected{hints}"
            ) from None
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    # For the pump

    def _check_waiters(self) -> None:
        for ready, future in list(self._waiters):
            if future.done():
                continue
            try:
                if ready():
                    future.set_result(None)
            except Exception as exc:
                future.set_exception(exc)
