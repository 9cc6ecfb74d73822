"""
The memory as an MCP server, for clients of both eras of the protocol.

Clients up to 2025-11-25 subscribe to the resource (``resources/subscribe``), later ones listen
(``subscriptions/listen``). Either are told when the graph changes, whichever process changed it.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import mcp_types as types
from mcp.server import NotificationOptions, Server, ServerRequestContext
from mcp.server.session import ServerSession
from mcp.server.subscriptions import InMemorySubscriptionBus, ListenHandler, ResourceUpdated
from mcp.shared.exceptions import MCPError

from crdtstate import __version__
from crdtstate.errors import CRDTStateError
from crdtstate.integrations import mcp_stdio
from crdtstate.integrations.mcp_memory.memory import Memory
from crdtstate.integrations.mcp_memory.tools import TOOLS, text_of

RESOURCE = "memory://knowledge-graph"

TELL_EVERY = 0.02
"""Seconds between two notifications, as each says the same."""

CLIENT_CHARS_MAX = 60

Context = ServerRequestContext[Any, Any]


class MemoryServer:
    """Serves one memory.

    Args:
        make: Makes the memory, given what to call when it changes; it is opened while the client
            is already being served, which waits with its first call.
    """

    def __init__(self, make: Callable[[Callable[[], None]], Memory]) -> None:
        self._memory = make(self._note)
        self._is_open = asyncio.Event()
        self._is_new = asyncio.Event()
        self._bus = InMemorySubscriptionBus()
        # The client, if it has subscribed in the old way. There is one.
        self._subscriber: ServerSession | None = None
        self._tools = [types.Tool.model_validate(tool.definition) for tool in TOOLS.values()]
        self.server: Server[Any] = Server(
            "crdtstate-memory",
            version=__version__,
            title="Shared memory",
            on_list_tools=self._list_tools,
            on_call_tool=self._call_tool,
            on_list_resources=self._list_resources,
            on_list_resource_templates=self._list_templates,
            on_read_resource=self._read_resource,
            on_subscribe_resource=self._subscribe,
            on_unsubscribe_resource=self._unsubscribe,
            on_subscriptions_listen=ListenHandler(self._bus),
        )

    async def run(self) -> None:
        """Serve on standard input and output until the client leaves; then all is saved.

        Raises:
            CRDTStateError: The memory cannot be opened.
        """
        options = self.server.create_initialization_options(
            NotificationOptions(tools_changed=True, resources_changed=True)
        )
        tasks = [
            asyncio.create_task(mcp_stdio.run(self.server, options), name="serve"),
            asyncio.create_task(self._open(), name="open"),
        ]
        try:
            async with mcp_stdio.until_terminated():
                # What opens it keeps it open, so it ends only by failing.
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if not task.cancelled() and (failure := task.exception()) is not None:
                raise failure

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Server[Any]]:
        """Open the memory, and tell of its changes; yields the server, to be served anywhere."""
        async with self._memory:
            self._is_open.set()
            telling = asyncio.create_task(self._tell(), name="tell")
            try:
                yield self.server
            finally:
                telling.cancel()

    async def _open(self) -> None:
        async with self.opened():
            # What is here now stays: the collector need not look at it again and again.
            gc.collect()
            gc.freeze()
            await asyncio.get_running_loop().create_future()

    def _note(self) -> None:
        self._is_new.set()

    async def _tell(self) -> None:
        """Tell all who want to know that the graph has changed."""
        self._is_new.clear()
        while True:
            await self._is_new.wait()
            self._is_new.clear()
            if self._subscriber is not None:
                await self._subscriber.send_resource_updated(RESOURCE)
            await self._bus.publish(ResourceUpdated(uri=RESOURCE))
            await asyncio.sleep(TELL_EVERY)

    # Handlers

    async def _list_tools(
        self, context: Context, params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=self._tools)

    async def _call_tool(
        self, context: Context, params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        await self._is_open.wait()
        try:
            arguments = params.arguments or {}
            answer = await self._memory.call(params.name, arguments, _client_of(context))
        except CRDTStateError as exc:
            return types.CallToolResult(
                content=[types.TextContent(type="text", text=str(exc))], is_error=True
            )
        return types.CallToolResult(
            content=[types.TextContent(type="text", text=answer.text)],
            structured_content=answer.data,
        )

    async def _list_resources(
        self, context: Context, params: types.PaginatedRequestParams | None
    ) -> types.ListResourcesResult:
        resource = types.Resource(
            uri=RESOURCE,
            name="knowledge-graph",
            title="Knowledge Graph",
            description="The full knowledge graph with all entities and relations",
            mime_type="application/json",
        )
        return types.ListResourcesResult(resources=[resource])

    async def _list_templates(
        self, context: Context, params: types.PaginatedRequestParams | None
    ) -> types.ListResourceTemplatesResult:
        return types.ListResourceTemplatesResult(resource_templates=[])

    async def _read_resource(
        self, context: Context, params: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:
        uri = str(params.uri)
        if uri != RESOURCE:
            text = f"MCP error -32602: Resource {uri[:200]} not found"
            raise MCPError(code=types.INVALID_PARAMS, message=text)
        await self._is_open.wait()
        await self._memory.refresh()
        text = text_of(self._memory.graph.read())
        content = types.TextResourceContents(uri=RESOURCE, mime_type="application/json", text=text)
        return types.ReadResourceResult(contents=[content])

    async def _subscribe(
        self, context: Context, params: types.SubscribeRequestParams
    ) -> types.EmptyResult:
        if str(params.uri) == RESOURCE:
            self._subscriber = context.session
        return types.EmptyResult()

    async def _unsubscribe(
        self, context: Context, params: types.UnsubscribeRequestParams
    ) -> types.EmptyResult:
        if str(params.uri) == RESOURCE:
            self._subscriber = None
        return types.EmptyResult()


def _client_of(context: Context) -> str:
    """What the client calls itself, if it does, for the history."""
    found = context.session.client_params
    name = found.client_info.name if found is not None else ""
    return "".join(each for each in name[:CLIENT_CHARS_MAX] if each.isprintable())
