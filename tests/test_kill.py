"""Kill -9 at random moments: what was confirmed is there, and no dot is used twice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path

from harness import asynchronous

from crdtstate import Replica
from crdtstate.change import decode_change

ROUNDS = 200
NURSERY = Path(__file__).with_name("kill_child.py")


class Witness(Replica):
    """A peer that remembers every change it was ever sent, by dot."""

    def __init__(self) -> None:
        super().__init__("witness", listen="ws://127.0.0.1:0")
        self.seen: dict[tuple[str, int, int], bytes] = {}
        self.reused: list[str] = []
        self.news = asyncio.Event()

    def note(self, data: bytes) -> None:
        change = decode_change(data)
        key = (change.document, change.writer, change.seq)
        if self.seen.setdefault(key, data) != data:
            self.reused.append(repr(change))
        self.news.set()


def watch(witness: Witness) -> None:
    """Look at everything that comes in, also what is thrown away because its dot is known."""
    receive = witness._sync.receive

    def noting(peer: int, frame: object, now: float) -> None:
        for data in getattr(frame, "changes", ()):
            witness.note(data)
        receive(peer, frame, now)  # type: ignore[arg-type]

    witness._sync.receive = noting  # type: ignore[method-assign,assignment]


@asynchronous
async def test_nothing_confirmed_is_lost_and_no_dot_is_reused(tmp_path: Path) -> None:
    rng = random.Random(20261123)
    store = tmp_path / "victim.db"
    async with Witness() as witness:
        watch(witness)
        nursery = await asyncio.create_subprocess_exec(
            sys.executable,
            str(NURSERY),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert nursery.stdin and nursery.stdout
        safe, writers, most = 0, set(), 0
        for number in range(ROUNDS):
            nursery.stdin.write(f"spawn {store} {witness.address} {number}\n".encode())
            opened = (await nursery.stdout.readline()).decode().split()
            assert opened[0] == "open", opened
            pid, writer, count, keys = map(int, opened[1:])
            writers.add(writer)
            assert count >= safe, f"round {number}: {safe} were confirmed, {count} are there"
            assert count == keys, f"round {number}: a transaction was torn"
            most = max(most, count)
            for _ in range(rng.choice((0, 1, 1, 2, 5))):
                line = (await nursery.stdout.readline()).decode().split()
                assert line[0] == "safe", line
                safe = int(line[1])
            if number % 4 == 0:  # most lives are too short to be heard of
                witness.news.clear()
                await asyncio.wait_for(witness.news.wait(), 20)
            # Not a wait for something: the moment is the point.
            await asyncio.sleep(rng.random() * 0.004)
            os.kill(pid, signal.SIGKILL)
            while (line := (await nursery.stdout.readline()).decode().split())[0] != "reaped":
                assert line[0] == "safe", line
                safe = int(line[1])
        nursery.stdin.close()
        await nursery.wait()

        assert writers == {witness_writer(witness)}, "on one boot, a kill loses no writer"
        assert witness.reused == []
        async with Replica("victim", store=store, peers=[str(witness.address)]) as survivor:
            await survivor.synced(timeout=20)
            assert survivor.counter("count").value == len(survivor.map("log")) >= safe
            assert dict(survivor.map("log")) == dict(witness.map("log"))
            assert dict(survivor.map("hot")) == dict(witness.map("hot"))
            assert survivor.counter("count").value == witness.counter("count").value


def witness_writer(witness: Witness) -> int:
    (writer,) = witness.document("main").version
    return writer
