"""
The memory of several assistants: a graph in a file that they share, and what its tools do with it.

What is answered is saved: every call that writes returns once the file has it, whoever keeps that.
And it is current: every call has first taken in what other processes on this host had saved.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from crdtstate.config import Config
from crdtstate.credentials import Credentials, state_directory
from crdtstate.errors import StoreError, UsageError
from crdtstate.integrations.mcp_memory.graph import DOCUMENT, Graph, GraphError
from crdtstate.integrations.mcp_memory.jsonl import MemoryFile
from crdtstate.integrations.mcp_memory.tools import TOOLS, Answer, check
from crdtstate.integrations.one_file import OneFile

log = logging.getLogger("crdtstate")

FILE_VARIABLE = "MEMORY_FILE_PATH"

FILE_NAME = "memory.jsonl"

LOOK_EVERY = 1.0
"""Seconds between two looks whether somebody wrote into the file."""

WRITE_DELAY = 0.25
"""Seconds for which changes collect before the file is written,"""

WRITE_SHARE = 50
"""or so many times as long as the last writing took, if that is more."""

MERGED_AT_ONCE = 200
"""Entities or relations of a file that are taken in before others have their turn."""


class Memory:
    """A memory that is shared by all processes that name the same file.

    Use it as ``async with Memory(path) as memory``; then `call` its tools.

    Args:
        path: The JSON Lines that people read; the store is beside it, in ``<path>.db``.
        name: Who writes, for people.
        peers: Relays or agents on other hosts to share it with.
        listen: Where other hosts may come in.
        mesh: What proves that the processes belong to a mesh, as for `crdtstate.Replica`.
        config: Settings.
        on_change: Called soon after the graph has changed, whoever changed it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        name: str = "mcp-memory",
        *,
        peers: Iterable[str] = (),
        listen: str | None = None,
        mesh: str | Path | Credentials | None = None,
        config: Config | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        # A link is followed: what takes the file's place must not take the link's.
        self.path = Path(os.path.realpath(path))
        self._one = OneFile(
            f"{self.path}.db", name, peers=peers, listen=listen, mesh=mesh, config=config
        )
        self._file = MemoryFile(self.path)
        self._tell = on_change
        self._graph: Graph | None = None
        self._keeping: asyncio.Task[None] | None = None
        # Set when the file does not say what the graph says.
        self._is_late = asyncio.Event()
        # `Graph.changes` when the file was written last.
        self._written = -1

    @property
    def graph(self) -> Graph:
        """What is remembered."""
        if self._graph is None:
            raise UsageError(f"{self.path}: not open; use it inside `async with Memory(...)`")
        return self._graph

    @property
    def shared(self) -> OneFile:
        """The file that it shares with other processes."""
        return self._one

    # Opening and closing

    async def __aenter__(self) -> Self:
        await self._one.__aenter__()
        try:
            self._graph = Graph(self._one.replica, self._note)
            if self._one.is_keeper:
                await self._take_in()
        except BaseException:
            await self._one.close()
            raise
        self._keeping = asyncio.create_task(self._keep_file(), name=f"{self.path}: write")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Have the file say what is remembered, and leave. Idempotent."""
        keeping, self._keeping = self._keeping, None
        try:
            if keeping is not None:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
                if self._one.is_keeper:
                    await self._write_file()
        except StoreError as exc:
            log.error("%s", exc)
        finally:
            if self._graph is not None:
                self._graph.close()
            await self._one.close()

    # Calls

    async def call(self, name: str, arguments: dict[str, Any], client: str = "") -> Answer:
        """What the tool *name* answers. Once it does, what it wrote is saved.

        Args:
            name: One of the nine tools.
            arguments: From outside; they are checked.
            client: Who asks, for the history.

        Raises:
            GraphError: There is no such tool, or the arguments cannot be; nothing was done.
            ConfirmTimeout: It was done here, and nobody has said that it is saved yet.
        """
        tool = TOOLS.get(name)
        if tool is None:
            raise GraphError(f"MCP error -32602: Tool {name[:100]} not found")
        checked = check(tool, arguments)
        await self.refresh()
        answer = tool.run(self.graph, checked, f"{name} by {client}" if client else name)
        if not tool.reads:
            await self._one.saved()
        return answer

    async def refresh(self) -> None:
        """Take in what other processes on this host have saved. If nobody answers, because the
        keeper is hung or was just killed, what is here is what there is."""
        await self._one.current(DOCUMENT)

    # The file

    def _note(self) -> None:
        self._is_late.set()
        self._tell()

    async def _keep_file(self) -> None:
        """Keep the file and the graph the same, while this process keeps the store."""
        loop = asyncio.get_running_loop()
        await self._one.keeping.wait()
        pause, told = 0.0, ""
        while True:
            try:
                begun = loop.time()
                await self._take_in()
                await self._write_file()
                pause, told = WRITE_SHARE * (loop.time() - begun), ""
            except (StoreError, GraphError) as exc:
                if str(exc) != told:
                    log.error("%s", exc)
                told = str(exc)
            await asyncio.sleep(max(WRITE_DELAY, pause))
            try:
                async with asyncio.timeout(LOOK_EVERY):
                    await self._is_late.wait()
            except TimeoutError:
                pass

    async def _take_in(self) -> None:
        """Add what others wrote into the file. Raises StoreError, GraphError."""
        if not self._file.is_altered():
            return
        # Whatever it says now, it is to say what the graph says.
        self._written = -1
        facts = await asyncio.to_thread(self._file.read_altered)
        if facts is None:
            return
        count = 0
        for start in range(0, len(facts.entities), MERGED_AT_ONCE):
            part = facts.entities[start : start + MERGED_AT_ONCE]
            count += self.graph.merge(part, (), f"from {self.path.name}")
            await asyncio.sleep(0)
        for start in range(0, len(facts.relations), MERGED_AT_ONCE):
            chunk = facts.relations[start : start + MERGED_AT_ONCE]
            count += self.graph.merge((), chunk, f"from {self.path.name}")
            await asyncio.sleep(0)
        await self._one.saved(timeout=60.0)
        if count:
            log.info("%s: %d facts that others wrote into it were taken in", self.path, count)

    async def _write_file(self) -> None:
        """Have the file say what the graph says. Raises StoreError."""
        self._is_late.clear()
        changes = self.graph.changes
        if changes == self._written:
            return
        lines = self.graph.lines()
        if lines or self.path.exists():
            await asyncio.to_thread(self._file.write, lines)
        self._written = changes


def default_path() -> Path:
    """The file if nobody names one: ``MEMORY_FILE_PATH``, which is relative to where the default is
    (servers are started in whatever directory), or ``memory.jsonl`` among this user's state."""
    folder = state_directory()
    given = os.environ.get(FILE_VARIABLE, "")
    path = folder / (given or FILE_NAME)
    if path.parent == folder:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path
