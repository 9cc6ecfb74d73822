"""
A process that shares a file with others and is there to be killed.

It writes as fast as it can under ``NAME-NUMBER`` and says on its output:

    open            it has what is in the file
    keeping         it keeps the file
    saved NUMBER    this one and all before it are in the file
    seen COUNT      how many there are, from everybody; said when its input ends, before it leaves
"""

from __future__ import annotations

import asyncio
import os
import sys

from crdtstate.integrations.one_file import OneFile


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


async def write_until(path: str, name: str, ended: asyncio.Event) -> None:
    async with OneFile(path, name) as one:
        say("open")
        keeping = asyncio.create_task(tell_keeping(one))
        log = one.replica.map("log")
        number = 0
        while not ended.is_set():
            log[f"{name}-{number}"] = number
            await one.saved()
            say(f"saved {number}")
            number += 1
        keeping.cancel()
        await one.replica.synced(timeout=10)
        say(f"seen {len(log)}")


async def tell_keeping(one: OneFile) -> None:
    await one.keeping.wait()
    say("keeping")


async def main() -> None:
    path, name = sys.argv[1:]
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, ended.set)
    await write_until(path, name, ended)


if __name__ == "__main__":
    asyncio.run(main())
