"""
Three agents work off one list of tasks: a map of tasks, a counter of what they cost, and a set of
what they learned.

A transaction makes a task's end, its cost and its lessons one change: others see all of it or
nothing. Everybody picks tasks by a rule that needs no locks, because there are none: a task belongs
to the agent whose turn its number is.
"""

import asyncio

from crdtstate import Changed, Replica

TASKS = ["read the code", "write a test", "fix the bug", "write the docs", "tidy up", "release"]
NAMES = ["ann", "bob", "eve"]


async def work(replica: Replica, turn: int) -> None:
    tasks = replica.map("tasks")
    for number, task in enumerate(TASKS):
        if number % len(NAMES) != turn:
            continue
        await asyncio.sleep(0)  # here an agent would think
        with replica.transaction(message=f"did: {task}", run="run-42"):
            tasks[task] = {"by": replica.agent, "state": "done"}
            replica.counter("tokens").increment(100 + number)
            replica.set("lessons").add(f"how to {task}")


async def main() -> None:
    async with (
        Replica("relay", listen="ws://127.0.0.1:0", role="relay") as relay,
        Replica("ann", peers=[relay.address]) as ann,
        Replica("bob", peers=[relay.address]) as bob,
        Replica("eve", peers=[relay.address]) as eve,
    ):
        all_done = asyncio.Event()

        def notice(event: Changed) -> None:
            if len(ann.map("tasks")) == len(TASKS):
                all_done.set()

        ann.on(Changed, notice)
        await asyncio.gather(*(work(agent, turn) for turn, agent in enumerate([ann, bob, eve])))
        async with asyncio.timeout(10):
            await all_done.wait()

        for task in TASKS:
            print(f"{task}: {ann.map('tasks')[task]['by']}")
        print("tokens:", ann.counter("tokens").value)
        print("lessons:", len(ann.set("lessons")))


if __name__ == "__main__":
    asyncio.run(main())
