"""Kill -9 of an agent at each step of a command, and of a controller in each phase."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from harness import asynchronous
from test_controller import Fleet, fleet, reason, until, url, value

from crdtstate import Controller, Fulfilled, Replica, SystemCheckpoint, SystemRestore, commands

CHILD = Path(__file__).with_name("controller_child.py")


class Child:
    """A process of `controller_child`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def says(self) -> list[str]:
        assert self.process.stdout is not None
        return (await self.process.stdout.readline()).decode().split()

    async def died(self) -> None:
        """Wait until it has killed itself."""
        assert await asyncio.wait_for(self.process.wait(), 30) == -9


@asynccontextmanager
async def child(*arguments: object) -> AsyncIterator[Child]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(CHILD), *map(str, arguments), stdout=asyncio.subprocess.PIPE
    )
    try:
        found = Child(process)
        assert await found.says() == ["open"]
        yield found
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


@pytest.mark.parametrize(
    ("where", "is_idempotent", "acts", "counted"),
    [
        ("started", False, 0, 0),
        ("acted", False, 1, 0),
        ("told", False, 1, 1),
        ("started", True, 1, 1),
        ("acted", True, 2, 1),
        ("told", True, 1, 1),
    ],
)
@asynchronous
async def test_an_agent_that_is_killed_at_any_step_acts_once_or_says_so(
    tmp_path: Path, where: str, is_idempotent: bool, acts: int, counted: int
) -> None:
    effects = tmp_path / "effects"
    async with fleet(tmp_path) as found:
        queen = found["queen"]
        base = ("agent", "victim", tmp_path / "victim.db", url(queen), effects)
        async with child(*base, where, is_idempotent) as victim:
            results = await Controller(queen).issue("act", target="victim", timeout=0)
            await victim.died()
        async with child(*base, "never", is_idempotent):
            told = await Controller(queen).result(results.id, timeout=20)
            done = is_idempotent or where == "told"
            assert isinstance(told["victim"], Fulfilled) is done
            assert done or "was interrupted" in reason(told, "victim")
            assert lines(effects) == [results.id] * acts
            assert queen.counter("acts").value == counted


async def queen_dies(found: Fleet, what: str, where: str) -> None:
    peer = url(found["queen"])
    async with child("queen", "regent", found.folder / "regent.db", peer, what, where) as regent:
        await regent.died()


@asynchronous
async def test_a_controller_that_is_killed_while_it_makes_checkpoints(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        heir = Controller(found["queen"])
        found["agent-1"].counter("tokens").increment(5)

        await queen_dies(found, "checkpoint", "asked")
        assert heir.commands() == []

        await queen_dies(found, "checkpoint", "issued")
        (listed,) = heir.commands()
        told = await heir.result(listed.id, timeout=0.5)
        assert isinstance(told, SystemCheckpoint) and told.by == "regent"
        assert set(told.checkpoints) >= {"agent-1", "queen"}
        found["agent-1"].counter("tokens").increment(7)
        # It noted nothing more; what stands there is enough to restore.
        voters = ["agent-1", "queen"]
        done = await heir.restore_system(told.id, timeout=5, electorate=voters)
        assert done.has_begun
        assert found["agent-1"].counter("tokens").value == 5


@asynchronous
async def test_a_controller_that_is_killed_while_it_restores(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        queen, heir = found["queen"], Controller(found["queen"])
        found["agent-1"].counter("tokens").increment(5)
        saved = await heir.checkpoint_all()
        found["agent-1"].counter("tokens").increment(7)

        await queen_dies(found, f"restore:{saved.id}", "issued")
        await until(queen, lambda: len(heir.commands()) == 2)
        before = heir.commands()[-1]
        assert isinstance(before, SystemRestore) and not before.has_begun
        voters = ["agent-1", "queen"]
        refused = await heir.restore_system(saved.id, timeout=0.5, electorate=voters)
        under_way = f"restore {before.id} of regent is under way; only one such at a time"
        assert not refused.has_begun and reason(refused, "agent-1") == under_way
        assert queen.counter("tokens").value == 12

        # It comes back, and tries again: its own command is in the way too, until it expires.
        withdraw(queen, before.id)
        await queen_dies(found, f"restore:{saved.id}", "agreed")
        await until(queen, lambda: queen.counter("tokens").value == 5)

        def both_have_it() -> bool:
            last = heir.commands()[-1]
            return all(isinstance(last.get(agent), Fulfilled) for agent in voters)

        await until(queen, both_have_it)
        told = await heir.result(heir.commands()[-1].id)
        assert isinstance(told, SystemRestore) and told.has_begun
        assert {agent for agent, each in told.items() if isinstance(each, Fulfilled)} >= set(voters)
        assert value(told, told.executors["main"])["changed"] == 1
        assert queen.counter("tokens").value == found["agent-1"].counter("tokens").value == 5


def withdraw(replica: Replica, id: str) -> None:
    """As if a command had expired, and the margin for clocks were over."""
    replica.document(commands.CONTROL).map(commands.COMMANDS).pop(id)
