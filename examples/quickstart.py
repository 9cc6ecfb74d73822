"""
Two agents share state: each reads and writes locally, and both see the same.

Here they live in one process and talk over a websocket on the loopback interface. Elsewhere they
are processes on several machines, and often all dial a relay (`crdtstate relay`).
"""

import asyncio

from crdtstate import Replica


async def main() -> None:
    async with (
        Replica("ann", listen="ws://127.0.0.1:0") as ann,
        Replica("bob", peers=[ann.address]) as bob,
    ):
        ann.map("plan")["goal"] = "ship it"
        ann.counter("tokens").increment(120)

        await bob.wait_for(ann.version(), timeout=5)
        print("bob reads:", bob.map("plan")["goal"], bob.counter("tokens").value)

        bob.counter("tokens").increment(30)
        bob.set("skills").add("python")
        bob.register("leader").value = "bob"

        await bob.synced(timeout=5)
        print("ann reads:", ann.counter("tokens").value, set(ann.set("skills")))
        print("leader:", ann.register("leader").value)
        print(ann)


if __name__ == "__main__":
    asyncio.run(main())
