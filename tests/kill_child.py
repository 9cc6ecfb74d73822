"""
A process that is there to be killed: an agent that writes as fast as it can and says what is safe.

Run as a program it is the nursery: for every line ``spawn STORE PEER SEED`` it forks an agent, so
that two hundred of them cost one start of Python. Everybody writes lines to the same pipe:

    open PID WRITER COUNT KEYS      the agent is open and found this in its store
    safe COUNT                      `durable` has confirmed so many increments
    rollback                        the agent was told that it reused a dot
"""

from __future__ import annotations

import asyncio
import os
import random
import sys

import crdtstate.transports.websocket  # noqa: F401  (before the fork, or each child would)
from crdtstate import Config, IdentityRollback, Replica


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


async def write_for_ever(store: str, peer: str, seed: int) -> None:
    rng = random.Random(seed)
    # Small enough that snapshots, compactions and checkpoints happen while it is killed.
    config = Config(snapshot_after_bytes=30_000, log_bytes=20_000)
    async with Replica("victim", store=store, peers=[peer], config=config) as replica:
        replica.on(IdentityRollback, lambda event: say("rollback"))
        log, count = replica.map("log"), replica.counter("count")
        say(f"open {os.getpid()} {replica.writer} {count.value} {len(log)}")
        while True:
            for _ in range(rng.choice((1, 1, 5, 12))):
                with replica.transaction():
                    log[str(count.value)] = "x" * rng.randrange(200)
                    count.increment()
                    replica.map("hot")[f"k{rng.randrange(20)}"] = rng.random()
                if rng.random() < 0.3:
                    await asyncio.sleep(0)
            written = count.value
            await replica.durable()
            say(f"safe {written}")


def main() -> None:
    for line in sys.stdin:
        _, store, peer, seed = line.split()
        child = os.fork()
        if child == 0:
            asyncio.run(write_for_ever(store, peer, int(seed)))
        os.waitpid(child, 0)
        say(f"reaped {child}")


if __name__ == "__main__":
    main()
