"""
Two assistants share a memory: each starts a memory server of its own, as Claude Desktop or Cursor
do, and both name the same file. Nothing else is configured.

Here the assistants are the official client of MCP. In an assistant's settings this is

    {"mcpServers": {"memory": {"command": "crdtstate", "args": ["mcp-memory", "memory.jsonl"]}}}

Needs: pip install 'crdtstate[cli,mcp]'
"""

import asyncio
import os
import sys
import tempfile
from pathlib import Path

from mcp import Client, StdioServerParameters


def assistant(path: Path, name: str) -> Client:
    """An assistant with a memory server of its own."""
    arguments = ["-m", "crdtstate", "mcp-memory", str(path), "--name", name]
    server = StdioServerParameters(command=sys.executable, args=arguments, env=dict(os.environ))
    return Client(server)


async def tell(client: Client, fact: str) -> None:
    """Add something to what is remembered of Ann."""
    addition = {"entityName": "Ann", "contents": [fact]}
    await client.call_tool("add_observations", {"observations": [addition]})


async def main(folder: Path) -> None:
    path = folder / "memory.jsonl"
    async with assistant(path, "desktop") as desktop, assistant(path, "editor") as editor:
        ann = {"name": "Ann", "entityType": "person", "observations": ["likes short answers"]}
        await desktop.call_tool("create_entities", {"entities": [ann]})

        # The other one knows as soon as it was answered.
        found = await editor.call_tool("search_nodes", {"query": "short answers"})
        print("the editor knows:", found.structured_content["entities"][0]["name"])

        # Both add to it at the same time, and neither overwrites the other.
        await asyncio.gather(tell(desktop, "lives in Oslo"), tell(editor, "writes Python"))
        for name, client in (("desktop", desktop), ("editor", editor)):
            read = await client.call_tool("open_nodes", {"names": ["Ann"]})
            print(name, "reads:", sorted(read.structured_content["entities"][0]["observations"]))

    # For people, and for git; the official server reads it too.
    print("in the file:", path.read_text().count('"type":"entity"'), "entity")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder)))
