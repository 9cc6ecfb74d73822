"""
A process that is there to be killed while it makes checkpoints, one after the other.

The nursery forks an agent for every line ``spawn STORE TIER SEED``. All write lines to one pipe:

    open PID           the agent is open
    saved ID COUNT     a checkpoint was made; COUNT is in it
"""

from __future__ import annotations

import asyncio
import os
import random
import sys

from crdtstate import Config, Replica, Retention


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


async def save_for_ever(store: str, tier: str, seed: int) -> None:
    rng = random.Random(seed)
    # Small enough that compactions, renewals and deletions happen while it is killed.
    config = Config(snapshot_after_bytes=30_000, log_bytes=20_000)
    keep = Retention(count=4)
    async with Replica(
        "victim", store=store, checkpoints=[tier], retention=keep, config=config
    ) as replica:
        log, count = replica.map("log"), replica.document("other").counter("count")
        say(f"open {os.getpid()}")
        while True:
            for _ in range(rng.choice((1, 1, 5, 40))):
                with replica.transaction():
                    count.increment()
                    log[f"k{rng.randrange(60)}"] = "x" * rng.randrange(200)
                    log["count"] = count.value
            checkpoint = await replica.checkpoint()
            say(f"saved {checkpoint.id} {count.value}")


def main() -> None:
    for line in sys.stdin:
        _, store, tier, seed = line.split()
        child = os.fork()
        if child == 0:
            asyncio.run(save_for_ever(store, tier, int(seed)))
        os.waitpid(child, 0)
        say(f"reaped {child}")


if __name__ == "__main__":
    main()
