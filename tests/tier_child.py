"""
A process that is there to be killed: it puts values into a tier as fast as it can.

Run as a program it is the nursery: for every line ``URL PREFIX SEED`` it forks a writer, so that
many of them cost one start of Python. Everybody writes lines to the same pipe:

    open PID                the writer is about to put its first value
    put KEY NUMBER          that is kept now
    reaped PID              the writer is dead
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from hashlib import sha256

# Before the fork, or each child would.
import crdtstate.tiers.redis
import crdtstate.tiers.s3
import crdtstate.tiers.shm
import crdtstate.tiers.sqlite  # noqa: F401
from crdtstate.tiers import open_tier, split_url


def whole(key: str, number: int, size: int) -> bytes:
    """A value that tells whether it is there as a whole, and which one it is."""
    body = f"{key} {number} ".encode() + number.to_bytes(8, "big") * (size // 8)
    return sha256(body).digest() + body


def number_in(key: str, value: bytes) -> int:
    """The number of a value of `whole`; raises AssertionError if it is not whole."""
    assert sha256(value[32:]).digest() == value[:32], f"{key} is torn"
    named, number, _ = value[32:].split(b" ", 2)
    assert named == key.encode()
    return int(number)


async def put_for_ever(url: str, prefix: str, seed: int) -> None:
    rng = random.Random(seed)
    tier = await open_tier(url)
    os.write(1, f"open {os.getpid()}\n".encode())
    sizes = (100, 30_000, 300_000, 3_000_000)
    if split_url(url, "endpoint", "region", "prefix", "bytes_max")[0].scheme == "s3":
        sizes = (100, 300_000, 9 * 2**20)  # The last goes up in two parts.
    number = 0
    while True:
        number += 1
        key = f"{prefix}/{rng.randrange(3)}"
        await tier.put(key, whole(key, number, rng.choice(sizes)))
        os.write(1, f"put {key} {number}\n".encode())


def main() -> None:
    for line in sys.stdin:
        url, prefix, seed = line.split()
        child = os.fork()
        if child == 0:
            asyncio.run(put_for_ever(url, prefix, int(seed)))
        os.waitpid(child, 0)
        os.write(1, f"reaped {child}\n".encode())


if __name__ == "__main__":
    main()
