"""
A process that is there to be killed: it makes conflicts with another replica, and one of the two
resolves each. Arguments: store, durability, seed. It prints ``open`` and then a line for each.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from typing import Any

from crdtstate import Config, Replica


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


async def resolve_for_ever(store: str, durability: Any, seed: int) -> None:
    rng = random.Random(seed)
    config = Config(voters=["victim"], have_delay=0.01)
    async with (
        Replica(
            "victim", store=store, listen="ws://127.0.0.1:0", durability=durability, config=config
        ) as victim,
        Replica("other", peers=[str(victim.address)], config=config) as other,
    ):
        both = victim, other
        await other.synced()
        say("open")
        victim.map("plan", strategy="vote")
        number = 0
        while True:
            number += 1
            key = f"k{number % 20}"
            for replica in both:
                replica.map("plan")[key] = f"{replica.agent} {number}"
            await victim.wait_for(other.version())
            await other.wait_for(victim.version())
            if rng.random() < 0.3:
                (conflict,) = [found for found in victim.conflicts() if found.key == key]
                victim.vote(conflict, f"victim {number}")
            rng.choice(both).map("plan").resolve(key, number)
            await victim.wait_for(other.version())
            await other.wait_for(victim.version())
            say(f"resolved {number}")


if __name__ == "__main__":
    asyncio.run(resolve_for_ever(sys.argv[1], sys.argv[2], int(sys.argv[3])))
