"""
What serves assistants on standard input and output: MCP servers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from crdtstate.checkpoints import default_tier
from crdtstate.cli.options import Mesh
from crdtstate.cli.reaching import check_url, run
from crdtstate.credentials import state_directory


def mcp_memory(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="The memory, as JSON Lines; the store is beside it. Otherwise what "
            "MEMORY_FILE_PATH names, or memory.jsonl among this user's state.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(metavar="NAME", help="As whom to write, for the history.")
    ] = "mcp-memory",
    peers: Annotated[
        list[str] | None,
        typer.Option(
            "--peer", metavar="URL", help="A relay or memory on another host; repeatable."
        ),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="URL", help="Where other hosts may come in.")
    ] = None,
    mesh: Mesh = None,
) -> None:
    """Serve a memory to an assistant, over MCP.

    In the place of @modelcontextprotocol/server-memory, with the same tools.
    Assistants that name the same file share it, however many there are, and
    nothing that was answered is lost.

    The file follows the memory, to be read and committed. What is added to it by
    hand is taken in; what is removed there comes back: delete with the tools.

    Example: [cyan]crdtstate mcp-memory ~/notes/memory.jsonl[/cyan]
    """
    from crdtstate.integrations.mcp_memory.memory import Memory, default_path
    from crdtstate.integrations.mcp_stdio import check_extra

    check_extra()
    for url in [*([listen] if listen is not None else []), *(peers or [])]:
        check_url(url)
    path = file or default_path()

    async def serve() -> None:
        from crdtstate.integrations.mcp_memory.server import MemoryServer

        server = MemoryServer(
            lambda note: Memory(
                path, name, peers=peers or (), listen=listen, mesh=mesh, on_change=note
            )
        )
        await server.run()

    run(serve())


def mcp(
    file: Annotated[
        Path | None,
        typer.Option(
            envvar="CRDTSTATE_FILE",
            metavar="FILE",
            help="The store that agents on this machine share; made on first use. Otherwise "
            "state.db among this user's state.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            envvar="CRDTSTATE_AGENT",
            metavar="NAME",
            help="Which agent this is, for the others and the history; mcp-PID otherwise.",
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="What may be read and written, such as 'plan/**' or 'main/map/tasks'; repeatable. "
            "Otherwise all.",
        ),
    ] = None,
    read_only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="What may be read and not written; repeatable."),
    ] = None,
    settle: Annotated[
        float,
        typer.Option(
            min=0.1, max=60, metavar="SECONDS", help="How long a claim waits at most for others."
        ),
    ] = 3.0,
    peers: Annotated[
        list[str] | None,
        typer.Option("--peer", metavar="URL", help="A relay or agent on another host; repeatable."),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="URL", help="Where other hosts may come in.")
    ] = None,
    mesh: Mesh = None,
) -> None:
    """Serve state that agents share to one of them, over MCP.

    Maps, counters, registers and sets that merge: read, write, search, watch,
    history, conflicts, claims, checkpoints, and what changed since last time.
    Agents that name the same file share it, and nothing that was answered is
    lost; with --peer or --listen those of other hosts too.

    Example: [cyan]crdtstate mcp --file team.db --name agent-7 --allow 'plan/**'[/cyan]
    """
    from crdtstate.integrations.mcp_state.places import Scope
    from crdtstate.integrations.mcp_stdio import check_extra
    from crdtstate.integrations.one_file import OneFile

    check_extra()
    for url in [*([listen] if listen is not None else []), *(peers or [])]:
        check_url(url)
    scope = Scope(allow or ["**"], read_only or [])
    path = file or _default_store()
    tiers = [str(tier) for tier in default_tier(path)[0]]
    one = OneFile(
        path,
        name or f"mcp-{os.getpid()}",
        peers=peers or (),
        listen=listen,
        mesh=mesh,
        checkpoints=tiers,
    )

    async def serve() -> None:
        from crdtstate.integrations.mcp_state.server import StateServer

        await StateServer.over(one, scope, settle).run()

    run(serve())


def _default_store() -> Path:
    """``state.db`` among this user's state, in a folder that is made."""
    folder = state_directory()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / "state.db"
