"""Two agents, each with an MCP server of its own, share a plan in one file."""

import asyncio
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

from mcp import Client

from crdtstate.integrations.mcp_state.server import StateServer
from crdtstate.integrations.one_file import OneFile


@asynccontextmanager
async def agent(name: str, file: Path):
    """What ``crdtstate mcp --file FILE --name NAME`` serves, without the pipe between."""
    server = StateServer.over(OneFile(file, name))
    async with server.opened() as tools, Client(server.server) as client:

        async def call(tool: str, **arguments):
            result = await client.call_tool(f"state_{tool}", arguments)
            assert not result.is_error, result.content
            return result.structured_content

        # Programs have both; agents have the tools only.
        yield call, tools.replica


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "team.db"
        async with agent("ann", file) as (ann, _), agent("bob", file) as (bob, replica):
            await ann("set", place="main/map/tasks/login", value="open", message="found a bug")
            await ann("increment", place="main/counter/tokens", by=120)
            await replica.synced(timeout=5)

            digest = await bob("changes_since")
            for line in digest["text"].splitlines():
                print(line)

            # Both want it; one gets it, and both know who.
            place = "main/map/tasks/login"
            first, second = await asyncio.gather(
                ann("claim", place=place, ttl=60), bob("claim", place=place, ttl=60)
            )
            print("claims:", sorted([first["state"], second["state"]]))
            assert first["holder"] == second["holder"]

            worker = ann if first["state"] == "won" else bob
            await worker("set", place=place, value="done", message="fixed")
            await worker("claim", place=place, action="release")
            await replica.synced(timeout=5)

            later = await bob("changes_since", token=digest["token"])
            print("changed since:", [each["place"] for each in later["changes"]])
            history = await bob("history", place=place)
            print("why:", [each["message"] for each in history["changes"]])


asyncio.run(main())
