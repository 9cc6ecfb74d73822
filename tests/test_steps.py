"""Kill -9 before every single step of what an agent does to the world; see `step_child`."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import asynchronous
from servers import RedisServer
from step_child import CONFIG, KEYS

from crdtstate import Replica
from crdtstate.documents import DocumentSet

NURSERY = Path(__file__).with_name("step_child.py")
STEPS_MAX = 200
SHM = Path(f"/dev/shm/crdtstate-{os.geteuid()}")


class Nursery:
    """Plays stories in processes that die on the way."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def play(self, step: int, story: str, *arguments: object) -> tuple[bool, list[str]]:
        """Play *story* up to *step*; returns whether it was killed there, and what it said."""
        assert self._process.stdin and self._process.stdout
        words = [str(word) for word in (step, story, *arguments)]
        self._process.stdin.write(f"{' '.join(words)}\n".encode())
        said: list[str] = []
        while True:
            line = (await self._process.stdout.readline()).decode().strip()
            assert line, "the nursery died"
            if line.startswith("ended"):
                break
            said.append(line)
        assert line in ("ended 9", "ended 0"), (line, said)
        return line == "ended 9", said


@asynccontextmanager
async def nursery() -> AsyncIterator[Nursery]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(NURSERY),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    try:
        yield Nursery(process)
    finally:
        process.stdin.close()
        await process.wait()


def told(said: list[str], what: str) -> list[str] | None:
    """The words after *what* in the last line that begins with it."""
    found = [line.split()[1:] for line in said if line.startswith(f"{what} ")]
    return found[-1] if found else None


@pytest.fixture
def tiers(tmp_path: Path, redis_server: RedisServer) -> Iterator[list[str]]:
    name = f"test-{uuid.uuid4().hex[:12]}"
    yield [f"shm://{name}", f"sqlite:///{tmp_path}/tier.db", f"{redis_server.url}?prefix={name}:"]
    shutil.rmtree(SHM / name, ignore_errors=True)


@asynchronous
async def test_at_every_step_of_a_checkpoint(tmp_path: Path, tiers: list[str]) -> None:
    safe, saved, kills = 0, {}, []
    async with nursery() as agents:
        for step in range(1, STEPS_MAX):
            was_killed, said = await agents.play(step, "checkpoint", tmp_path, *tiers)
            safe = int((told(said, "safe") or ["0"])[0])
            if made := told(said, "saved"):
                saved[made[0]] = int(made[1])
            if not was_killed:
                break
            kills.append(said[-1])
            async with Replica(
                "victim", store=tmp_path / "victim.db", checkpoints=tiers, config=CONFIG
            ) as survivor:
                assert survivor.counter("lives").value == len(survivor.map("log")) == safe
                listed = {found.id: found for found in survivor.checkpoints()}
                assert saved.keys() <= listed.keys(), kills[-1]
                for id in listed:
                    await survivor.verify(id)
                newest = max(listed, default=None)
                if newest is not None:
                    with await survivor.at(newest) as past:
                        lives = past.counter("lives").value
                        assert lives == len(past.map("log")) >= saved.get(newest, 1)
                if len(kills) % 4 == 0:
                    await survivor.prune_checkpoints()
        else:
            pytest.fail(f"it has more than {STEPS_MAX} steps")
    assert len(kills) >= 6 and len(set(kills)) >= 3, kills
    async with Replica("victim", store=tmp_path / "victim.db", checkpoints=tiers) as survivor:
        await survivor._checkpoints.settled()
        for tier in tiers:
            await survivor.verify(max(saved), tier=tier)


def reading(documents: DocumentSet) -> str:
    """The label that everything reads; fails if it is not one."""
    label: str = documents.document("other").register("label").value
    expected = {f"k{number}": f"{label} {number}" for number in range(KEYS)} | {label: True}
    assert dict(documents.map("plan")) == expected
    return label


async def play_restores(nursery: Nursery, story: str, directory: Path, tiers: list[str]) -> int:
    """Play *story* to every step of it; returns how many there were."""
    for step in range(1, STEPS_MAX):
        was_killed, said = await nursery.play(step, story, directory, *tiers)
        before, _, after = told(said, "from") or []
        async with Replica(
            "victim", store=directory / "victim.db", checkpoints=tiers, config=CONFIG
        ) as survivor:
            made = {found.label: found.id for found in survivor.checkpoints()}
            for label in ("one", "two"):
                with await survivor.at(made[label]) as past:
                    assert reading(past) == label
            if not was_killed:
                assert told(said, "restored") == [after] == [reading(survivor)]
                return step - 1
            if story == "restore":
                assert reading(survivor) == (after if told(said, "restored") else before)
            else:
                assert {f"{before} 0", f"{after} 0"} >= {survivor.map("plan")["k0"]}
                await survivor.restore(made[after])
                assert reading(survivor) == after
    pytest.fail(f"it has more than {STEPS_MAX} steps")


@asynchronous
async def test_at_every_step_of_a_restore(tmp_path: Path, tiers: list[str]) -> None:
    async with nursery() as agents:
        assert await play_restores(agents, "restore", tmp_path, tiers) >= 1


@asynchronous
async def test_at_every_step_of_a_restore_in_parts(tmp_path: Path, tiers: list[str]) -> None:
    async with nursery() as agents:
        assert await play_restores(agents, "restore_in_parts", tmp_path, tiers) >= 3


async def prepare(directory: Path, tier: str, state: str) -> set[str]:
    """Leave a store that is not as it was; returns what is to be had of it all the same."""
    path = directory / "victim.db"
    options: dict[str, Any] = {"store": path, "checkpoints": [tier], "config": CONFIG}
    for part in range(3):
        async with Replica("victim", **options) as victim:
            for number in range(10 * part, 10 * part + 10):
                victim.map("log")[str(number)] = f"needle {number} " + "x" * 200
                await victim.durable()
            if part == 1:
                await victim.checkpoint()
        if part == 0:
            shutil.copy(path, directory / "old.db")
    data = bytearray(path.read_bytes())
    match state:
        case "damaged":
            data[data.rindex(b"needle 25 ") + 20] ^= 1
            path.write_bytes(data)
            return {str(number) for number in range(25)}
        case "rolled back":
            path.write_bytes((directory / "old.db").read_bytes())
        case "gone":
            path.unlink()
    return {str(number) for number in range(20)}


@pytest.mark.parametrize("state", ["damaged", "rolled back", "gone"])
@asynchronous
async def test_at_every_step_of_a_recovery(tmp_path: Path, state: str) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    expected = await prepare(origin, f"sqlite:///{origin}/tier.db", state)
    broken = content(origin / "victim.db")
    kills: list[str] = []
    async with nursery() as agents:
        for step in range(1, STEPS_MAX):
            place = tmp_path / str(step)
            shutil.copytree(origin, place)
            tier = f"sqlite:///{place}/tier.db"
            was_killed, said = await agents.play(step, "recover", place, tier)
            for turn in range(2 if step % 4 == 0 else 1):
                async with Replica(
                    "victim", store=place / "victim.db", checkpoints=[tier], config=CONFIG
                ) as survivor:
                    assert set(survivor.map("log")) == expected, (step, said)
                    assert survivor.recovery is not None and not survivor.recovery.is_escalated
                    assert turn == 0 or len(survivor.recovery.attempts) == 1
            left = {found.name for found in place.iterdir()}
            assert not any("rebuilt" in name or "recovering" in name for name in left), left
            if state == "damaged":
                assert content(place / "victim.db.damaged-1") == broken
                assert "victim.db.damaged-2" not in left
            if not was_killed:
                assert told(said, "recovered")
                break
            kills.append(said[-1])
        else:
            pytest.fail(f"it has more than {STEPS_MAX} steps")
    assert len(kills) >= 2 and len(set(kills)) >= 2, kills


def content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
