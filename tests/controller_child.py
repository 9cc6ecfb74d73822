"""
A process that kills itself in the midst of a command, as an agent or as a controller.

    agent NAME STORE PEER EFFECTS WHERE IDEMPOTENT    serves "act", which writes a line to EFFECTS
    queen NAME STORE PEER WHAT WHERE                  does WHAT: checkpoint, or restore ID

WHERE says after which step it dies: of an agent "started", "acted" or "told"; of a controller
"asked", "issued" or "agreed". "never" is never. It prints what it has done.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from crdtstate import Command, Config, Controller, Replica
from crdtstate.dispatch import Dispatch
from crdtstate.obeying import Docket

CONFIG = Config(heartbeat=0.2, link_timeout=1.0, have_delay=0.01, command_grace=5)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def say(*words: object) -> None:
    print(*words, flush=True)


async def obey(agent: str, store: str, peer: str, effects: str, where: str, again: str) -> None:
    note_start, settle = Docket._note_start, Docket._settle

    async def note_start_and_die(self: Docket, command: Command) -> None:
        await note_start(self, command)
        if where == "started":
            die()

    def settle_and_die(self: Docket, command: Command, outcome: Any) -> None:
        if where == "acted":
            die()
        settle(self, command, outcome)
        if where == "told":
            self._home._settle()
            die()

    Docket._note_start = note_start_and_die  # type: ignore[method-assign]
    Docket._settle = settle_and_die  # type: ignore[method-assign]
    async with Replica(agent, store=store, peers=[peer], config=CONFIG) as replica:

        def act(command: Command) -> int:
            with Path(effects).open("a") as file:
                file.write(f"{command.id}\n")
            replica.counter("acts").increment()
            return replica.counter("acts").value

        replica.serve_command("act", act, idempotent=again == "True")
        say("open")
        await asyncio.Event().wait()


async def command(agent: str, store: str, peer: str, what: str, where: str) -> None:
    issue, agree = Dispatch.issue, Dispatch.agree
    dies_at = {"asked": "@version", "issued": f"@{what.partition(':')[0]}"}.get(where)

    async def issue_and_die(self: Dispatch, command: Command) -> None:
        await issue(self, command)
        if command.verb == dies_at:
            await self._home.synced(10)
            die()

    async def agree_and_die(self: Dispatch, *args: Any) -> Command:
        agreed = await agree(self, *args)
        if where == "agreed":
            await self._home.synced(10)
            die()
        return agreed

    Dispatch.issue = issue_and_die  # type: ignore[method-assign]
    Dispatch.agree = agree_and_die  # type: ignore[method-assign,assignment]
    async with Replica(agent, store=store, peers=[peer], config=CONFIG) as replica:
        await replica._wait_until(
            lambda: sum(member.state == "up" for member in replica.members()) >= 3, "all", 20
        )
        await replica.synced(10)
        say("open")
        controller = Controller(replica)
        if what == "checkpoint":
            say("done", (await controller.checkpoint_all("child")).id)
        elif what != "wait":
            restored = await controller.restore_system(what.partition(":")[2], timeout=10)
            say("done", restored.has_begun)
        await asyncio.Event().wait()


if __name__ == "__main__":
    role, *rest = sys.argv[1:]
    asyncio.run(obey(*rest) if role == "agent" else command(*rest))
