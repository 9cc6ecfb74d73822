"""
What to do when agents disagree: a rule, a vote, or somebody who thinks about it.

Agents write at the same time and nothing is lost: all values stay until somebody writes over them.
Where no rule should decide, an async function does, in the place of an LLM or a person. All agents
run it, and for each conflict one of them is responsible.
"""

import asyncio
import itertools
from contextlib import suppress

from crdtstate import Config, Conflict, ConflictFound, ConflictResolved, Replica, UsageError


async def think(conflict: Conflict) -> str:
    """Ask somebody who needs a while; here it is the longest text."""
    await asyncio.sleep(0)
    return max((candidate.value for candidate in conflict.candidates), key=len)


def resolve_in(tasks: asyncio.TaskGroup, replica: Replica) -> None:
    async def resolve(conflict: Conflict) -> None:
        chosen = await think(conflict)
        with suppress(UsageError):  # by now it is another conflict, of which we are told again
            replica.resolve(conflict, chosen)

    def found(event: ConflictFound) -> None:
        if event.name == "plan" and replica.is_responsible(event):
            tasks.create_task(resolve(event.conflict))

    replica.on(ConflictFound, found)


async def even(*agents: Replica) -> None:
    for one, other in itertools.permutations(agents, 2):
        await other.wait_for(one.version(), timeout=10)


async def main() -> None:
    config = Config(voters=["ann", "bob", "cy"])
    async with (
        Replica("ann", listen="ws://127.0.0.1:0", config=config) as ann,
        Replica("bob", peers=[ann.address], config=config) as bob,
        Replica("cy", peers=[ann.address], config=config) as cy,
        asyncio.TaskGroup() as tasks,
    ):
        agents = (ann, bob, cy)
        await even(*agents)
        ann.map("scores").use_strategy("max", prefix="best/")  # on all replicas
        ann.register("leader", strategy="vote")
        resolved = aiter(bob.events(ConflictResolved))
        for agent, score in zip(agents, (7, 9, 8), strict=True):
            resolve_in(tasks, agent)
            agent.map("scores")["best/run"] = score
            agent.register("leader").value = agent.agent
        ann.map("plan")["goal"], cy.map("plan")["goal"] = "ship it", "ship it well"
        print("resolved:", (await anext(resolved)).value)
        await even(*agents)
        print("best:", cy.map("scores")["best/run"])
        for agent, choice in zip(agents, ("bob", "bob", "cy"), strict=True):
            (conflict,) = [each for each in agent.conflicts() if each.name == "leader"]
            agent.vote(conflict, choice)
        await even(*agents)
        print("leader:", cy.register("leader").value, "by", cy.register("leader").explain().rule)
        print("audit:", [f"{each.kind} by {each.rule}" for each in ann.audit()])


if __name__ == "__main__":
    asyncio.run(main())
