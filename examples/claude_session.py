"""Transcripts of the Claude Agent SDK that two processes write and any other can resume."""

import asyncio
import tempfile
from pathlib import Path

from claude_agent_sdk import ClaudeAgentOptions

from crdtstate.integrations.claude_session import CrdtSessionStore

KEY = {"project_key": "web-shop", "session_id": "7d9c2c1e-0000-4000-8000-000000000001"}


def said(uuid: str, text: str) -> dict:
    return {"type": "user", "uuid": uuid, "message": {"role": "user", "content": text}}


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "team.db"
        # As a rule each is in a process, or on a host, of its own.
        here = CrdtSessionStore.open(file, name="laptop")
        there = CrdtSessionStore.open(file, name="server")
        async with here as laptop, there as server:
            # Given to the SDK, it keeps every session: ClaudeSDKClient(options), or query().
            options = ClaudeAgentOptions(session_store=laptop)
            assert options.session_store is laptop

            # What the SDK does then, from two places at once.
            await asyncio.gather(
                laptop.append(KEY, [said("a", "fix the checkout")]),
                server.append(KEY | {"subpath": "subagents/tests"}, [said("b", "run the tests")]),
            )
            # It tries again when it is not sure.
            await laptop.append(KEY, [said("a", "fix the checkout"), said("c", "and the cart")])

        async with CrdtSessionStore.open(file, name="tomorrow") as store:
            for entry in await store.load(KEY) or []:
                print(entry["message"]["content"])
            print("subagents:", await store.list_subkeys(KEY))
            (summary,) = await store.list_session_summaries("web-shop")
            print("about:", summary["data"]["first_prompt"])


asyncio.run(main())
