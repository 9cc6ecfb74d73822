"""
A queen and three agents: she has them all make a checkpoint, tells them to pause, and brings
everything back to where it was.

What she commands stands in a document that replicates like any other: an agent that is away when
she pauses the fleet pauses when it comes back, and another controller could go on in her place.
"""

import asyncio
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

from crdtstate import Command, Controller, MemberUp, Replica


async def main(folder: Path) -> None:
    async with AsyncExitStack() as stack:
        queen = Replica("queen", store=folder / "queen.db", listen="ws://127.0.0.1:0")
        await stack.enter_async_context(queen)
        controller = Controller(queen)

        async def start(name: str) -> Replica:
            met = queen.events(MemberUp)
            arrived = asyncio.ensure_future(anext(met))
            agent = Replica(name, store=folder / f"{name}.db", peers=[queen.address])
            await stack.enter_async_context(agent)
            agent.serve_command("pause", pause)
            await arrived
            return agent

        def pause(command: Command) -> str:
            return f"paused: {command.arguments['reason']}"

        agents = {name: await start(name) for name in ("agent-1", "agent-2", "agent-3")}
        for name, agent in agents.items():
            agent.map("plan")[name] = "working"
            agent.counter("tokens").increment(100)

        saved = await controller.checkpoint_all("nightly", timeout=10)
        print("in every checkpoint:", len(saved.checkpoints), "agents, missing", saved.missing)

        await agents.pop("agent-3").close()
        paused = await controller.issue(
            "pause", target=["agent-1", "agent-2", "agent-3"], reason="budget", timeout=1
        )
        print(str(paused).partition("\n")[2])

        agents["agent-3"] = await start("agent-3")
        later = await controller.result(paused.id, timeout=10)
        print("agent-3, once it is back:", later["agent-3"].value)

        agents["agent-1"].map("plan").clear()
        agents["agent-2"].counter("tokens").increment(1_000_000)
        restored = await controller.restore_system(saved.id, timeout=10)
        print("restored:", restored.is_complete, "by", set(restored.executors.values()))
        print(dict(sorted(queen.map("plan").items())), queen.counter("tokens").value)

        for each in (await controller.report()).values():
            print(
                each.agent, each.state, each.checkpoints, "checkpoint", each.conflicts, "conflicts"
            )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder)))
