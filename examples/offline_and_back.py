"""
Two agents write the same key while they cannot reach each other. Nothing is lost: both values stay,
a strategy chooses what is read, and somebody may decide.

Each agent keeps its state in a store, so bob's work offline survives the end of its process.
"""

import asyncio
import tempfile
from pathlib import Path

from crdtstate import ConflictFound, Replica


async def main(folder: Path) -> None:
    async with Replica("ann", store=folder / "ann.db", listen="ws://127.0.0.1:0") as ann:
        async with Replica("bob", store=folder / "bob.db", peers=[ann.address]) as bob:
            ann.map("plan")["goal"] = "ship it"
            await bob.wait_for(ann.version(), timeout=5)

        # Bob is on a train: the same store, but nobody to talk to.
        async with Replica("bob", store=folder / "bob.db") as bob:
            bob.map("plan")["goal"] = "ship it on Friday"
            bob.counter("tokens").increment(5)

        ann.map("plan")["goal"] = "ship it today"
        ann.counter("tokens").increment(7)

        found: list[ConflictFound] = []
        ann.on(ConflictFound, found.append)
        async with Replica("bob", store=folder / "bob.db", peers=[ann.address]) as bob:
            await bob.synced(timeout=5)

            print("tokens:", ann.counter("tokens").value)
            print("conflicts:", [event.key for event in found])
            print(ann.map("plan").explain("goal"))

            ann.map("plan").resolve("goal", "ship it on Friday")
            await bob.wait_for(ann.version(), timeout=5)
            print("bob reads:", bob.map("plan")["goal"], bob.conflicts())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder)))
