"""One file that many processes share: who keeps it, who takes over, and that nothing is lost."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from fleet_mesh import Mesh
from harness import asynchronous

from crdtstate import ConfirmTimeout, CorruptStore, Replica, StoreUnavailable, UsageError
from crdtstate.integrations.one_file import OneFile, socket_of
from crdtstate.transports.unix import PATH_BYTES_MAX

CHILD = Path(__file__).parent / "one_file_child.py"
LONG = 60.0
"""Seconds after which something that was waited for does not come any more."""


class Child:
    """A process of `one_file_child`, and what it has said."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self.process, self.name = process, name
        self.saved = -1
        self.seen = 0
        self.is_keeper = False

    async def hear(self) -> bool:
        """Take in one line; False at the end of its output."""
        assert self.process.stdout is not None
        async with asyncio.timeout(LONG):
            line = (await self.process.stdout.readline()).decode()
        match line.split():
            case ["saved", number]:
                self.saved = int(number)
            case ["seen", count]:
                self.seen = int(count)
            case ["keeping"]:
                self.is_keeper = True
        return line != ""

    async def hear_saved(self, more: int) -> None:
        """Wait until so many more are saved."""
        goal = self.saved + more
        while self.saved < goal:
            assert await self.hear(), f"{self.name} has ended"

    async def kill(self) -> None:
        """Kill it, and hear what it had said."""
        self.process.kill()
        while await self.hear():
            pass
        await self.process.wait()

    async def end(self) -> None:
        """Have it end in order."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        while await self.hear():
            pass
        assert await self.process.wait() == 0


@asynccontextmanager
async def children(path: Path, names: str) -> AsyncIterator[list[Child]]:
    """Processes that share *path*, all opened; those that still run are killed at the end."""
    started: list[Child] = []
    pipe = asyncio.subprocess.PIPE
    try:
        for name in names:
            command = [sys.executable, str(CHILD), str(path), name]
            process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
            started.append(Child(process, name))
        for child in started:
            await child.hear_saved(1)
        yield started
    finally:
        for child in started:
            if child.process.returncode is None:
                await child.kill()


async def keeper_among(found: list[Child]) -> Child:
    """Who keeps the file now; it may have to take over first."""
    async with asyncio.timeout(LONG):
        while True:
            for child in found:
                await child.hear_saved(1)
                if child.is_keeper:
                    return child


async def in_file(path: Path) -> dict[str, int]:
    """What a replica finds that opens the file alone."""
    async with Replica("reader", store=path) as replica:
        return dict(replica.map("log"))


@asynchronous
async def test_no_saved_write_is_lost_when_one_keeper_after_the_other_is_killed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "shared.db"
    async with children(path, "abcd") as running:
        everybody = list(running)
        for _ in range(2):
            keeper = await keeper_among(running)
            await keeper.kill()
            running.remove(keeper)
            for child in running:
                await child.hear_saved(20)
        for child in running:
            await child.end()

    found = await in_file(path)

    promised = {f"{child.name}-{n}" for child in everybody for n in range(child.saved + 1)}
    assert len(promised) > 80
    assert promised <= found.keys()
    # Whoever ended last in order had seen everything.
    assert max(child.seen for child in everybody) == len(found)


@asynchronous
async def test_a_keeper_that_leaves_in_order_hands_the_file_over(tmp_path: Path) -> None:
    path = tmp_path / "shared.db"
    first, second = OneFile(path, "first"), OneFile(path, "second")
    async with second_after_first(first, second):
        assert (first.is_keeper, second.is_keeper) == (True, False)
        second.replica.map("log")["before"] = 1
        await first.close()
        second.replica.map("log")["after"] = 2
        await second.saved()

        assert second.is_keeper

    assert await in_file(path) == {"before": 1, "after": 2}


@asynccontextmanager
async def second_after_first(first: OneFile, second: OneFile) -> AsyncIterator[None]:
    async with first, second:
        yield


@asynchronous
async def test_what_one_process_saved_all_others_read(tmp_path: Path) -> None:
    async with OneFile(tmp_path / "shared.db", "a") as a, OneFile(tmp_path / "shared.db", "b") as b:
        a.replica.map("log")["by a"] = 1
        b.replica.map("log")["by b"] = 2
        await asyncio.gather(a.saved(), b.saved())
        assert await a.current("main", LONG) and await b.current("main", LONG)

        assert dict(a.replica.map("log")) == dict(b.replica.map("log")) == {"by a": 1, "by b": 2}
        assert [change.agent for change in a.replica.history("main")] == ["a", "b"]


@asynchronous
async def test_a_large_file_is_there_at_once_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "shared.db"
    async with OneFile(path, "a") as one:
        for number in range(40):
            one.replica.map("log")[str(number)] = os.urandom(50_000)
            await one.saved()
        before = dict(one.replica.map("log"))
    async with OneFile(path, "a") as one, OneFile(path, "b") as other:
        assert dict(one.replica.map("log")) == dict(other.replica.map("log")) == before

        other.replica.map("log")["more"] = b""
        await other.saved()
        assert await one.current("main", LONG)
        assert len(one.replica.map("log")) == 41


@asynchronous
async def test_processes_that_come_and_go_leave_one_writer_behind(tmp_path: Path) -> None:
    path = tmp_path / "shared.db"
    async with OneFile(path, "keeper") as keeper:
        for number in range(20):
            async with OneFile(path, f"visitor {number}") as visitor:
                visitor.replica.map("log")[str(number)] = number
                await visitor.saved()

        assert len(keeper.replica.map("log")) == 20
        assert len(keeper.replica.document("main").version) == 1


@asynchronous
async def test_other_hosts_join_through_the_keeper(tmp_path: Path) -> None:
    words = "correct horse battery staple"
    here = OneFile(tmp_path / "here.db", "a", listen="ws://127.0.0.1:0", mesh=words)
    async with here:
        assert here.address is not None
        there = OneFile(tmp_path / "there.db", "b", peers=[here.address], mesh=words)
        async with there, OneFile(tmp_path / "there.db", "c", mesh=words) as third:
            third.replica.map("log")["from c"] = 1
            await third.saved()
            await here.replica.wait_for(third.replica.version(), timeout=LONG)

            assert dict(here.replica.map("log")) == {"from c": 1}


@asynchronous
async def test_in_a_mesh_of_members_processes_write_as_the_one_of_the_certificate(
    tmp_path: Path,
) -> None:
    token = Mesh().invite("agent-7").encode()
    path = tmp_path / "shared.db"
    async with OneFile(path, "whoever", mesh=token) as a, OneFile(path, "b", mesh=token) as b:
        a.replica.map("log")["by a"] = 1
        b.replica.map("log")["by b"] = 2
        await asyncio.gather(a.saved(), b.saved())

        assert {change.agent for change in a.replica.history("main")} == {"agent-7"}
        assert b.replica.agent == "agent-7"

    async with OneFile(path, "again", mesh=token) as again:
        assert dict(again.replica.map("log")) == {"by a": 1, "by b": 2}


@asynchronous
async def test_who_names_a_file_by_a_link_or_a_relative_path_shares_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "real.db")
    monkeypatch.chdir(tmp_path)
    async with OneFile(tmp_path / "real.db", "a"), OneFile("link.db", "b") as second:
        assert not second.is_keeper


@asynchronous
async def test_a_path_too_long_for_a_socket_is_shared_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * PATH_BYTES_MAX)
    folder.mkdir()
    path = folder / "shared.db"
    async with OneFile(path, "a") as a, OneFile(path, "b") as b:
        assert len(os.fsencode(socket_of(path))) <= PATH_BYTES_MAX
        a.replica.map("log")["a"] = 1
        await a.saved()
        await b.replica.wait_for(a.replica.version(), timeout=LONG)

        assert not b.is_keeper


@contextmanager
def nobody_gets_in(folder: Path) -> Iterator[None]:
    """Others could get into the socket's folder, so nobody listens there."""
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    yield


@asynchronous
async def test_a_folder_that_others_can_get_into_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shared.db"
    with nobody_gets_in(tmp_path / "shared.db.run"):
        with pytest.raises(UsageError, match="chmod 700"):
            async with OneFile(path, "a"):
                pass


@asynchronous
async def test_what_cannot_be_saved_is_told_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "shared.db"
    async with children(path, "a") as (keeper,):
        async with OneFile(path, "b") as one:
            keeper.process.send_signal(19)  # SIGSTOP: it holds the lock and does not answer
            one.replica.map("log")["b"] = 1
            with pytest.raises(ConfirmTimeout):
                await one.saved(timeout=0.2)
            assert not await one.current("main", timeout=0.1)

            await keeper.kill()
            await one.saved()
            assert one.is_keeper

    assert (await in_file(path))["b"] == 1


@asynchronous
async def test_a_directory_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="create it first"):
        async with OneFile(tmp_path / "nowhere" / "shared.db", "a"):
            pass


@asynchronous
async def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a store\n" * 100)
    with pytest.raises(CorruptStore):
        async with OneFile(path, "a"):
            pass

    assert path.read_text() == "not a store\n" * 100


@asynchronous
async def test_it_is_used_while_it_is_open(tmp_path: Path) -> None:
    one = OneFile(tmp_path / "shared.db", "a")
    with pytest.raises(UsageError, match="not open"):
        _ = one.replica
    async with one:
        assert repr(one).endswith("a keeper>")
        with pytest.raises(UsageError, match="opened once"):
            await one.__aenter__()
    with pytest.raises(UsageError):
        await one.saved()
