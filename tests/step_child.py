"""
A process that is there to be killed at one certain step of what it does.

What a process leaves behind changes only where it acts on the world: when a database commits, a
file is made, renamed or removed, a server is told something, a frame is sent. Dying between two
such steps is the same wherever between them it happens. So the steps are counted, the process kills
itself before the one that it was told, and with every number tried there is no moment left.

Run as a program it is the nursery: for every line ``STEP STORY DIRECTORY TIERS...`` it forks an
agent that plays the story of that name and dies before step number STEP of it. All write lines to
one pipe; the last is ``ended NUMBER``: 9 for one that was killed, 0 for one that had fewer steps.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from asyncio import selector_events
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw

# Before the fork, or each child would.
import crdtstate.tiers.redis
import crdtstate.tiers.shm
import crdtstate.tiers.sqlite
import crdtstate.transports.websocket  # noqa: F401
from crdtstate import Config, Replica, lookback

CONFIG = Config(snapshot_after_bytes=30_000, log_bytes=20_000, checkpoint_interval=3600.0)
KEYS = 60

FILE_EVENTS = {"os.rename", "os.remove", "os.truncate", "os.link", "os.mkdir", "os.rmdir"}
REDIS_WRITES = (b"HSET", b"UNLINK")


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


class Steps:
    """Counts what this process does to the world, once armed, and kills it before one step."""

    def __init__(self, kill_before: int) -> None:
        self.left = kill_before
        self.is_armed = False

    def arm(self) -> None:
        self.is_armed = True

    def count(self, what: str) -> None:
        if not self.is_armed:
            return
        self.left -= 1
        # Two threads may have counted at once.
        if self.left <= 0:
            say(f"killed before {what}")
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """See every step from now on, of all threads."""

        def audited(event: str, args: tuple[Any, ...]) -> None:
            if event == "os.mkdir" and _is_directory(args[0], args[2]):
                return
            if event in FILE_EVENTS:
                self.count(event)
            elif event == "open" and type(args[2]) is int and args[2] & (os.O_WRONLY | os.O_RDWR):
                self.count("opening a file to write")

        def connected(db: apsw.Connection) -> None:
            def committing() -> bool:
                self.count("a commit")
                return False

            db.set_commit_hook(committing, id="steps")

        transport: Any = selector_events._SelectorSocketTransport  # type: ignore[attr-defined]
        transport.write = self._counted(transport.write)
        apsw.connection_hooks.append(connected)
        sys.addaudithook(audited)

    def _counted(self, send: Callable[..., None]) -> Callable[..., None]:
        def counting(transport: Any, data: Any) -> None:
            # What only asks Redis something changes nothing.
            if not bytes(data).startswith(b"*") or any(verb in data for verb in REDIS_WRITES):
                self.count("a send")
            send(transport, data)

        return counting


def _is_directory(path: str, directory: int) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path, dir_fd=None if directory < 0 else directory).st_mode)
    except OSError:
        return False


def write(replica: Replica, label: str) -> None:
    """Make everything read *label*, in one transaction."""
    with replica.transaction():
        plan = replica.map("plan")
        for number in range(KEYS):
            plan[f"k{number}"] = f"{label} {number}"
        for key in [key for key in plan if not key.startswith("k")]:
            del plan[key]
        plan[label] = True
        replica.document("other").register("label").value = label


async def checkpoint(directory: Path, tiers: list[str], steps: Steps) -> None:
    """Write, be sure of it, and make a checkpoint, in all tiers."""
    async with Replica(
        "victim", store=directory / "victim.db", checkpoints=tiers, config=CONFIG
    ) as replica:
        count = replica.counter("lives")
        with replica.transaction():
            count.increment()
            replica.map("log")[str(count.value)] = "x" * 100
        await replica.durable()
        say(f"safe {count.value}")
        steps.arm()
        made = await replica.checkpoint("by step")
        say(f"saved {made.id} {count.value}")
        await replica._checkpoints.settled()
        steps.is_armed = False


async def restore(directory: Path, tiers: list[str], steps: Steps) -> None:
    """Bring back the checkpoint that is not what stands, of two: "one" and "two"."""
    async with Replica(
        "victim", store=directory / "victim.db", checkpoints=tiers, config=CONFIG
    ) as replica:
        made = {found.label: found.id for found in replica.checkpoints()}
        for label in ("one", "two"):
            if label not in made:
                write(replica, label)
                made[label] = (await replica.checkpoint(label)).id
                await replica._checkpoints.settled()
        now = replica.document("other").register("label").value
        other = "one" if now == "two" else "two"
        say(f"from {now} to {other}")
        steps.arm()
        await replica.restore(made[other])
        await replica.durable()
        say(f"restored {other}")
        steps.is_armed = False


async def restore_in_parts(directory: Path, tiers: list[str], steps: Steps) -> None:
    """The same, as it is done where more differs than fits into one transaction."""
    lookback.CHANGE_PATHS_MAX = 20
    await restore(directory, tiers, steps)


async def recover(directory: Path, tiers: list[str], steps: Steps) -> None:
    """Open whatever is there."""
    steps.arm()
    async with Replica(
        "victim", store=directory / "victim.db", checkpoints=tiers, config=CONFIG
    ) as replica:
        await replica.durable()
        steps.is_armed = False
        assert replica.recovery is not None
        say(f"recovered {replica.recovery.source} {len(replica.map('log'))}")


STORIES = {
    "checkpoint": checkpoint,
    "restore": restore,
    "restore_in_parts": restore_in_parts,
    "recover": recover,
}


def main() -> None:
    for line in sys.stdin:
        step, story, directory, *tiers = line.split()
        child = os.fork()
        if child == 0:
            steps = Steps(int(step))
            steps.watch()
            asyncio.run(STORIES[story](Path(directory), tiers, steps))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        say(f"ended {os.waitstatus_to_exitcode(status) * -1}")


if __name__ == "__main__":
    main()
