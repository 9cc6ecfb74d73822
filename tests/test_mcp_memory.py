"""The memory server: the official one's equal to its clients, and shared without loss."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import asynchronous
from mcp import Client

from crdtstate import ConfirmTimeout, Replica, StoreError
from crdtstate.integrations.mcp_memory import graph as graphs
from crdtstate.integrations.mcp_memory.graph import Graph, GraphError
from crdtstate.integrations.mcp_memory.memory import Memory, default_path
from crdtstate.integrations.mcp_memory.server import RESOURCE, MemoryServer
from crdtstate.integrations.mcp_memory.tools import NAME_CHARS_MAX, TEXT_CHARS_MAX, TOOLS

NODE = Path(__file__).parent / "node"
OFFICIAL = NODE / "node_modules/@modelcontextprotocol/server-memory/dist/index.js"
NURSERY = Path(__file__).parent / "mcp_memory_child.py"
OURS = [sys.executable, "-m", "crdtstate", "mcp-memory"]

LONG = 60.0
"""Seconds after which something that was waited for does not come any more."""

Call = tuple[str, dict[str, Any]]

# Clients of the older era are to be served all the same.
pytestmark = pytest.mark.filterwarnings("ignore:resources/.* is removed as of 2026-07-28")


class Server:
    """A server that is spoken to in JSON-RPC, as the protocol was until 2025."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pid: int):
        self._reader, self._writer, self.pid = reader, writer, pid
        self._number = 0
        self.notes: list[dict[str, Any]] = []

    async def begin(self) -> None:
        who = {"clientInfo": {"name": "test", "version": "1"}}
        told = {"protocolVersion": "2025-11-25", "capabilities": {}} | who
        await self.ask("initialize", told)
        self._send({"jsonrpc": "2.0", "method": "notifications/initialized"})

    async def ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request, without its number and what says nothing."""
        self._number += 1
        number = self._number
        self._send({"jsonrpc": "2.0", "id": number, "method": method, "params": params})
        while (message := await self._read()).get("id") != number:
            self.notes.append(message)
        del message["id"]
        result = message.get("result", {})
        if result.get("isError") is False:
            del result["isError"]
        return message

    async def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        message = await self.ask("tools/call", {"name": name, "arguments": arguments})
        return dict(message["result"])

    async def read(self) -> dict[str, Any]:
        return dict((await self.call("read_graph"))["structuredContent"])

    async def next_note(self) -> dict[str, Any]:
        return self.notes.pop(0) if self.notes else await self._read()

    def close(self) -> None:
        self._writer.close()

    def _send(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")

    async def _read(self) -> dict[str, Any]:
        async with asyncio.timeout(LONG):
            line = await self._reader.readline()
        if not line:
            raise EOFError
        return dict(json.loads(line))


@asynccontextmanager
async def started(command: list[str], path: Path) -> AsyncIterator[Server]:
    """A server as a process of its own."""
    pipe = asyncio.subprocess.PIPE
    environment = os.environ | {"MEMORY_FILE_PATH": str(path)}
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, limit=2**24
    )
    assert process.stdin is not None and process.stdout is not None
    server = Server(process.stdout, process.stdin, process.pid)
    try:
        await server.begin()
        yield server
    finally:
        server.close()
        async with asyncio.timeout(LONG):
            await process.wait()
    assert process.returncode == 0


@asynccontextmanager
async def fleet(number: int, path: Path) -> AsyncIterator[list[Server]]:
    """Servers that share a file, each a process."""
    loop = asyncio.get_running_loop()
    ends = [(os.pipe(), os.pipe()) for _ in range(number)]
    passed = [end for (source, _), (_, sink) in ends for end in (source, sink)]
    lines = [f"{source} {sink} {path}\n" for (source, _), (_, sink) in ends]
    servers: list[Server] = []
    transports: list[asyncio.BaseTransport] = []
    with subprocess.Popen(  # noqa: ASYNC220 (it takes no time, compared with what follows)
        [sys.executable, str(NURSERY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        pass_fds=passed,
    ) as nursery:
        assert nursery.stdin is not None and nursery.stdout is not None
        for end in passed:
            os.close(end)
        try:
            for ((_, into), (out, _)), line in zip(ends, lines, strict=True):
                nursery.stdin.write(line)
                nursery.stdin.flush()
                pid = int(await asyncio.to_thread(nursery.stdout.readline))
                reader = asyncio.StreamReader(limit=2**24)
                protocol = asyncio.StreamReaderProtocol(reader)
                pipe = os.fdopen(out, "rb", buffering=0)
                transports.append((await loop.connect_read_pipe(lambda p=protocol: p, pipe))[0])  # type: ignore[misc]
                mixin = asyncio.streams.FlowControlMixin
                sending, flow = await loop.connect_write_pipe(
                    mixin, os.fdopen(into, "wb", buffering=0)
                )
                transports.append(sending)
                writer = asyncio.StreamWriter(sending, flow, None, loop)
                servers.append(Server(reader, writer, pid))
            await asyncio.gather(*(server.begin() for server in servers))
            yield servers
        finally:
            for server in servers:
                server.close()
            for server in servers:
                # Once it has left, it has let go of its output.
                while await _has_more(server):
                    pass
            for transport in transports:
                transport.close()
            nursery.stdin.close()


async def _has_more(server: Server) -> bool:
    try:
        await server.next_note()
    except EOFError:
        return False
    return True


# The official server's equal


class Pair:
    """Both servers; every call goes to both and is answered alike."""

    def __init__(self, official: Server, ours: Server, path: Path) -> None:
        self.official, self.ours, self.path = official, ours, path

    async def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        theirs = await self.official.call(name, **arguments)
        assert await self.ours.call(name, **arguments) == theirs
        return theirs

    async def clear(self) -> None:
        graph = await self.ours.read()
        await self.call("delete_entities", entityNames=[e["name"] for e in graph["entities"]])
        await self.call("delete_relations", relations=graph["relations"])


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as found:
        yield found


@pytest.fixture(scope="module")
def pair(
    runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Callable[[Any], Any], Pair]]:
    """Both servers, and what runs coroutines that use them."""
    folder = tmp_path_factory.mktemp("pair")
    stack = AsyncExitStack()

    async def open_both() -> Pair:
        path = folder / "ours.jsonl"
        official = await stack.enter_async_context(
            started(["node", str(OFFICIAL)], folder / "official.jsonl")
        )
        return Pair(official, await stack.enter_async_context(started(OURS, path)), path)

    both = runner.run(open_both())
    yield runner.run, both
    runner.run(stack.aclose())


PEOPLE: Call = (
    "create_entities",
    {
        "entities": [
            {"name": "Alice", "entityType": "person", "observations": ["works at Acme Corp"]},
            {"name": "Bob", "entityType": "person", "observations": ["likes Programming", "tall"]},
            {"name": "Acme Corp", "entityType": "company", "observations": []},
        ]
    },
)
LINKS: Call = (
    "create_relations",
    {
        "relations": [
            {"from": "Alice", "to": "Acme Corp", "relationType": "works_at"},
            {"from": "Bob", "to": "Acme Corp", "relationType": "competes_with"},
            {"from": "Alice", "to": "Bob", "relationType": "knows"},
        ]
    },
)


def add(*pairs: tuple[str, list[str]]) -> Call:
    return "add_observations", {
        "observations": [{"entityName": name, "contents": texts} for name, texts in pairs]
    }


def forget(name: str, *texts: str) -> Call:
    return "delete_observations", {"deletions": [{"entityName": name, "observations": list(texts)}]}


def unlink(source: str, kind: str, target: str) -> Call:
    return "delete_relations", {"relations": [{"from": source, "to": target, "relationType": kind}]}


# A sentence, and the calls that follow on people and their links.
BEHAVIOURS: dict[str, list[Call]] = {
    "new entities are told": [],
    "an entity that is there is not made again": [PEOPLE],
    "of several entities those are made that are not there": [
        (
            "create_entities",
            {
                "entities": [
                    {"name": "Alice", "entityType": "robot", "observations": ["is a robot"]},
                    {"name": "Carol", "entityType": "person", "observations": []},
                ]
            },
        )
    ],
    "no entities are none": [("create_entities", {"entities": []})],
    "names are told apart by case": [
        (
            "create_entities",
            {"entities": [{"name": "alice", "entityType": "p", "observations": ["x"]}]},
        )
    ],
    "a relation that is there is not made again": [LINKS],
    "a relation of another type is another one": [
        (
            "create_relations",
            {"relations": [{"from": "Alice", "to": "Bob", "relationType": "likes"}]},
        )
    ],
    "no relations are none": [("create_relations", {"relations": []})],
    "a relation may lead to what is not there": [
        (
            "create_relations",
            {"relations": [{"from": "Alice", "to": "Nobody", "relationType": "seeks"}]},
        ),
        ("open_nodes", {"names": ["Alice"]}),
        ("open_nodes", {"names": ["Nobody"]}),
    ],
    "observations are added at the end": [add(("Alice", ["has a dog", "drinks tea"]))],
    "observations that are there are not added": [
        add(("Alice", ["works at Acme Corp", "has a dog"]))
    ],
    "one call adds to several entities, and twice to one": [
        add(("Alice", ["a"]), ("Bob", ["b"]), ("Alice", ["a", "c"]))
    ],
    "observations need their entity": [add(("Nobody", ["x"]))],
    "if one entity is not there nothing is added": [add(("Alice", ["x"]), ("Nobody", ["y"]))],
    "no observations are none": [add(), add(("Alice", []))],
    "a deleted entity is gone": [("delete_entities", {"entityNames": ["Bob"]})],
    "with an entity its relations go": [("delete_entities", {"entityNames": ["Acme Corp"]})],
    "what is not there is deleted in silence": [("delete_entities", {"entityNames": ["Nobody"]})],
    "with a name that is only linked to its relations go": [
        (
            "create_relations",
            {"relations": [{"from": "Alice", "to": "Nobody", "relationType": "seeks"}]},
        ),
        ("delete_entities", {"entityNames": ["Nobody"]}),
    ],
    "an entity that was deleted is made anew, and is the last": [
        ("delete_entities", {"entityNames": ["Alice"]}),
        PEOPLE,
    ],
    "an observation is deleted": [forget("Bob", "tall")],
    "with its last observation an entity stays": [forget("Alice", "works at Acme Corp")],
    "observations that are not there are deleted in silence": [
        forget("Alice", "x"),
        forget("Nobody", "x"),
    ],
    "an observation that was deleted is added again, at the end": [
        forget("Bob", "likes Programming"),
        add(("Bob", ["likes Programming"])),
    ],
    "a relation is deleted, and others of the same two stay": [
        (
            "create_relations",
            {"relations": [{"from": "Alice", "to": "Bob", "relationType": "likes"}]},
        ),
        unlink("Alice", "knows", "Bob"),
    ],
    "a relation that is not there is deleted in silence": [unlink("Bob", "knows", "Alice")],
    "names are searched": [("search_nodes", {"query": "Alice"})],
    "types are searched": [("search_nodes", {"query": "company"})],
    "observations are searched": [("search_nodes", {"query": "programming"})],
    "the case does not matter": [("search_nodes", {"query": "aLICE"})],
    "what is found comes with all relations that touch it": [("search_nodes", {"query": "Acme"})],
    "nothing is found": [("search_nodes", {"query": "nowhere to be found"})],
    "everything is found": [("search_nodes", {"query": ""})],
    "nodes are opened by name, in their own order": [("open_nodes", {"names": ["Bob", "Alice"]})],
    "what leads to a node comes with it": [("open_nodes", {"names": ["Acme Corp"]})],
    "what is not there is not opened": [("open_nodes", {"names": ["Nobody"]})],
    "no names open nothing": [("open_nodes", {"names": []})],
    "text stays text": [
        add(
            ("Alice", ['"quoted" \\ /', "line\nline\ttab\r\x00\x1f\x7f", "é ß İ \u2028 \U0001f600"])
        ),
        ("search_nodes", {"query": "\u2028 \U0001f600"}),
        ("search_nodes", {"query": "\x00"}),
    ],
    "empty names are names": [
        ("create_entities", {"entities": [{"name": "", "entityType": "", "observations": [""]}]}),
        ("open_nodes", {"names": [""]}),
    ],
    "long texts and names are kept": [
        (
            "create_entities",
            {"entities": [{"name": "n" * 900, "entityType": "t", "observations": ["o" * 5000]}]},
        ),
        add(("n" * 900, ["o" * 5001])),
        forget("n" * 900, "o" * 5000),
    ],
    "what looks like a key is a name": [
        (
            "create_entities",
            {"entities": [{"name": n, "entityType": "t", "observations": [n]} for n in "#[{@"]},
        ),
        ("delete_entities", {"entityNames": ["#"]}),
    ],
    "what the schema does not name is left out": [
        (
            "create_entities",
            {
                "entities": [
                    {"name": "X", "entityType": "t", "observations": [], "secret": 1},
                ],
                "more": True,
            },
        )
    ],
    "arguments that are missing are told": [
        ("create_entities", {}),
        ("search_nodes", {}),
        ("add_observations", {"observations": [{}]}),
        ("open_nodes", {"names": None}),
    ],
    "arguments of the wrong type are told": [
        ("create_entities", {"entities": "x"}),
        (
            "create_entities",
            {"entities": [{"name": 1, "entityType": None, "observations": ["a", 2]}, 5, True]},
        ),
        ("create_relations", {"relations": [{"from": [], "to": {}, "relationType": 1.5}]}),
        ("delete_entities", {"entityNames": {"a": 1}}),
        ("search_nodes", {"query": 5}),
    ],
    "a tool that is not there is told": [("forget_everything", {})],
}


@pytest.mark.parametrize("sentence", BEHAVIOURS)
def test_it_behaves_as_the_official_server(
    pair: tuple[Callable[[Any], Any], Pair], sentence: str
) -> None:
    run, both = pair

    async def compare() -> None:
        await both.clear()
        for name, arguments in (PEOPLE, LINKS, *BEHAVIOURS[sentence]):
            await both.call(name, **arguments)
        await both.call("read_graph")
        question = {"uri": RESOURCE}
        theirs = await both.official.ask("resources/read", question)
        assert await both.ours.ask("resources/read", question) == theirs

    run(compare())


def test_it_offers_what_the_official_server_offers(
    pair: tuple[Callable[[Any], Any], Pair],
) -> None:
    run, both = pair

    async def compare() -> None:
        for method in ("tools/list", "resources/list", "resources/templates/list", "ping"):
            assert await both.ours.ask(method, {}) == await both.official.ask(method, {})
        for uri in (RESOURCE, "memory://elsewhere"):
            theirs = await both.official.ask("resources/subscribe", {"uri": uri})
            assert await both.ours.ask("resources/subscribe", {"uri": uri}) == theirs
        theirs = await both.official.ask("resources/read", {"uri": "memory://elsewhere"})
        assert await both.ours.ask("resources/read", {"uri": "memory://elsewhere"}) == theirs
        await both.clear()
        await both.call(PEOPLE[0], **PEOPLE[1])
        assert await both.ours.next_note() == await both.official.next_note()
        for server in (both.ours, both.official):
            await server.ask("resources/unsubscribe", {"uri": RESOURCE})

    run(compare())


def test_the_file_is_the_official_servers(pair: tuple[Callable[[Any], Any], Pair]) -> None:
    run, both = pair

    async def compare() -> None:
        await both.clear()
        for name, arguments in (PEOPLE, LINKS, add(("Alice", ['é \u2028 "x" \x7f']))):
            await both.call(name, **arguments)
        theirs = both.path.with_name("official.jsonl")
        await written(both.path, theirs.read_text())
        # And the other way round: it reads the file at each call.
        await both.ours.call("delete_entities", entityNames=["Bob"])
        await both.ours.call("create_entities", entities=[entity("last")])
        await written(both.path, "last")
        theirs.write_bytes(both.path.read_bytes())
        assert await both.official.read() == await both.ours.read()

    run(compare())


# Shared


def entity(name: str, *observations: str, kind: str = "t") -> dict[str, Any]:
    return {"name": name, "entityType": kind, "observations": list(observations)}


def names_in(graph: dict[str, Any]) -> set[str]:
    return {each["name"] for each in graph["entities"]}


@asynchronous
async def test_ten_processes_lose_nothing_and_a_kill_takes_nothing_with_it(tmp_path: Path) -> None:
    path = tmp_path / "memory.jsonl"
    acknowledged: set[str] = set()

    async def create(server: Server, prefix: str) -> None:
        for number in range(20):
            name = f"{prefix}-{number}"
            await server.call("create_entities", entities=[entity(name, f"by {server.pid}")])
            acknowledged.add(name)

    async with fleet(10, path) as servers:
        await asyncio.gather(*(create(each, str(i)) for i, each in enumerate(servers)))

        # What was answered, everybody reads, and in the same order.
        graphs = await asyncio.gather(*(server.read() for server in servers))
        assert len(acknowledged) == 200
        assert all(names_in(graph) == acknowledged for graph in graphs)
        assert all(graph == graphs[0] for graph in graphs)

        keeper = int((tmp_path / "memory.jsonl.db.lock").read_text().split()[0])
        (first,) = [server for server in servers if server.pid == keeper]
        *others, watch = [server for server in servers if server.pid != keeper]
        writing = [
            asyncio.create_task(create(each, f"again-{i}"))
            for i, each in enumerate([first, *others[:3]])
        ]
        while len(acknowledged) < 215:
            await watch.call("open_nodes", names=[])
        os.kill(keeper, signal.SIGKILL)
        outcomes = await asyncio.gather(*writing, return_exceptions=True)
        assert isinstance(outcomes[0], EOFError) and outcomes[1:] == [None] * 3

        left = [server for server in servers if server.pid != keeper]
        found = [await server.read() for server in left]
        assert all(acknowledged <= names_in(graph) for graph in found)
        assert all(graph == found[0] for graph in found)

    lines = path.read_text().split("\n")
    assert [json.loads(line)["name"] for line in lines] == [e["name"] for e in found[0]["entities"]]


@asynchronous
async def test_clients_of_either_era_are_told_what_another_process_changed(tmp_path: Path) -> None:
    path = tmp_path / "memory.jsonl"
    old, new = MemoryServer(opening(path, "old")), MemoryServer(opening(path, "new"))
    told: asyncio.Queue[Any] = asyncio.Queue()

    async def note(message: Any) -> None:
        await told.put(message)

    async with (
        old.opened() as first,
        new.opened() as second,
        Client(first, mode="legacy", message_handler=note) as legacy,
        Client(second, mode="2026-07-28") as modern,
    ):
        await legacy.subscribe_resource(RESOURCE)
        async with modern.listen(resource_subscriptions=[RESOURCE]) as events:
            await modern.call_tool("create_entities", {"entities": [entity("from the new one")]})
            async with asyncio.timeout(LONG):
                update = await told.get()
                await anext(events)
            assert update.params.uri == RESOURCE
            read = await legacy.read_resource(RESOURCE)
            assert "from the new one" in read.contents[0].text

            while not told.empty():
                told.get_nowait()
            await legacy.call_tool("create_entities", {"entities": [entity("from the old one")]})
            async with asyncio.timeout(LONG):
                await anext(events)
                found = await modern.call_tool("search_nodes", {"query": "OLD ONE"})
        assert found.structured_content["entities"] == [entity("from the old one")]


def opening(path: Path, name: str) -> Callable[[Callable[[], None]], Memory]:
    return lambda note: Memory(path, name, on_change=note)


@asynchronous
async def test_the_clients_in_typescript_of_both_eras_share_a_memory(tmp_path: Path) -> None:
    path = tmp_path / "memory.jsonl"

    async def use(script: str) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            "node", script, *OURS, str(path), cwd=NODE, stdout=subprocess.PIPE
        )
        async with asyncio.timeout(LONG):
            out, _ = await process.communicate()
        assert process.returncode == 0
        return dict(json.loads(out))

    answers = await asyncio.gather(use("memory_legacy.mjs"), use("memory_modern.mjs"))

    for answer in answers:
        assert answer["tools"] == list(TOOLS)
        assert answer["told"] == RESOURCE
        assert answer["found"]["structuredContent"]["entities"]
        assert answer["made"]["structuredContent"] == {
            "entities": answer["found"]["structuredContent"]["entities"]
        }
    async with Memory(path) as memory:
        assert {"Old", "New"} == {each.name for each in memory.graph.read().entities}
        by = [change.message for change in memory.shared.replica.history(graphs.DOCUMENT)]
        assert sorted(by) == ["create_entities by new-client", "create_entities by old-client"]


@asynchronous
async def test_the_memory_is_shared_with_other_hosts(tmp_path: Path) -> None:
    words = "correct horse battery staple"
    here = Memory(tmp_path / "here.jsonl", "a", listen="ws://127.0.0.1:0", mesh=words)
    async with here:
        await here.call("create_entities", {"entities": [entity("told here")]})
        peers = [str(here.shared.address)]
        async with Memory(tmp_path / "there.jsonl", "b", peers=peers, mesh=words) as there:
            replica = there.shared.replica
            await replica.wait_for(here.shared.replica.version(), timeout=LONG)
            await there.call("add_observations", add(("told here", ["seen there"]))[1])
            await here.shared.replica.wait_for(replica.version(), timeout=LONG)

            answer = await here.call("open_nodes", {"names": ["told here"]})
            assert answer.data["entities"] == [entity("told here", "seen there")]


# The graph, when several write at once


@asynccontextmanager
async def apart() -> AsyncIterator[tuple[Graph, Graph, Callable[[], Any]]]:
    """Two graphs that meet when they are told to."""
    address = f"memory://{os.urandom(4).hex()}"
    async with Replica("a", listen=address) as a, Replica("b", peers=[address]) as b:
        graphs = Graph(a), Graph(b)

        async def meet() -> None:
            async with asyncio.timeout(LONG):
                await b.synced()
                await a.synced()
                # The index follows soon after.
                while graphs[0].read().as_dict() != graphs[1].read().as_dict():  # noqa: ASYNC110
                    await asyncio.sleep(0)

        # Until somebody waits, what is written here is not known there.
        yield *graphs, meet


def told(graph: Graph) -> dict[str, Any]:
    found = graph.read()
    assert [json.loads(line) for line in graph.lines()] == [
        *({"type": "entity"} | each for each in found.as_dict()["entities"]),
        *({"type": "relation"} | each for each in found.as_dict()["relations"]),
    ]
    # What the index says is what it says when it is made anew.
    graph.rebuild()
    assert graph.read().as_dict() == found.as_dict()
    return found.as_dict()


@asynchronous
async def test_an_entity_that_two_create_at_once_has_the_observations_of_both() -> None:
    async with apart() as (a, b, meet):
        a.create_entities([("X", "person", ["by a", "both"])], "")
        b.create_entities([("X", "robot", ["both", "by b"]), ("Y", "t", [])], "")
        await meet()

        (x, y) = told(a)["entities"]
        assert x["entityType"] in ("person", "robot") and y["name"] == "Y"
        assert sorted(x["observations"]) == ["both", "by a", "by b"]
        assert told(a) == told(b)


@asynchronous
async def test_what_is_added_to_an_entity_while_it_is_deleted_stays() -> None:
    async with apart() as (a, b, meet):
        a.create_entities([("X", "person", ["old"]), ("Z", "t", [])], "")
        a.create_relations([("X", "knows", "Z")], "")
        await meet()
        a.delete_entities(["X"], "")
        b.add_observations([("X", ["new"])], "")
        await meet()

        assert told(a) == told(b)
        assert entity("X", "new", kind="person") in told(a)["entities"]
        assert told(a)["relations"] == []

        # It goes on as any entity: its last observation can go, and so can it.
        b.delete_observations([("X", ["new"])], "")
        await meet()
        assert entity("X", kind="person") in told(a)["entities"]
        b.delete_entities(["X"], "")
        await meet()
        assert [each["name"] for each in told(a)["entities"]] == ["Z"]


@asynchronous
async def test_what_both_delete_is_gone_and_can_be_made_again() -> None:
    async with apart() as (a, b, meet):
        a.create_entities([("X", "person", ["old"])], "")
        await meet()
        a.delete_entities(["X"], "")
        b.delete_entities(["X"], "")
        await meet()
        assert told(a) == told(b) == {"entities": [], "relations": []}

        b.create_entities([("X", "thing", ["new"])], "")
        await meet()
        assert told(a)["entities"] == [entity("X", "new", kind="thing")]


@asynchronous
async def test_a_fact_that_two_tell_at_once_is_there_once_and_no_conflict() -> None:
    async with apart() as (a, b, meet):
        a.create_entities([("X", "person", ["old"])], "")
        await meet()
        for graph in (a, b):
            graph.add_observations([("X", ["same"])], "")
            graph.create_relations([("X", "is", "X")], "")
        await meet()

        assert told(a)["entities"] == [entity("X", "old", "same", kind="person")]
        assert len(told(b)["relations"]) == 1


@asynchronous
async def test_what_others_write_that_makes_no_sense_is_passed_over() -> None:
    async with Replica("a") as replica:
        document = replica.document(graphs.DOCUMENT)
        document.map("entities")["X"] = ["t", 0, ["other name"]]
        document.map("entities")["bad"] = 5
        document.map("entities")["#" + "0" * 40] = ["t", 0, ["forged"]]
        for key in ("no json", "[1,2]", '["X"]', '["X", "spaced"]', "[" * 10_0):
            document.map("observations")[key] = "t"
            document.map("relations")[key] = ""
        document.map("relations")['["a","b","c"]'] = {"place": 1}
        graph = Graph(replica)

        assert told(graph) == {"entities": [entity("X")], "relations": []}


@asynchronous
async def test_large_calls_are_several_changes_and_all_of_it_is_there() -> None:
    async with Replica("a") as replica:
        graph = Graph(replica)
        graph.create_entities([(f"e{n}", "t", ["x" * 900]) for n in range(3000)], "")
        graph.create_relations([("e0", "of", f"e{n}") for n in range(5000)], "")
        assert len(told(graph)["entities"]) == 3000

        assert len(graph.open(["e0"]).relations) == 5000
        assert [e.name for e in graph.search("E29").entities][:2] == ["e29", "e290"]
        graph.delete_entities(["e0"], "")
        assert told(graph)["relations"] == []
        assert len(graph.search("").entities) == 2999


@asynchronous
async def test_no_more_facts_are_taken_than_the_graph_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "FACTS_MAX", 3)
    async with Replica("a") as replica:
        graph = Graph(replica)
        graph.create_entities([("X", "t", ["1", "2"])], "")
        with pytest.raises(GraphError, match="delete some"):
            graph.add_observations([("X", ["3"])], "")

        assert told(graph)["entities"] == [entity("X", "1", "2")]
        graph.delete_observations([("X", ["1"])], "")
        graph.add_observations([("X", ["3"])], "")


# Bounds


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (("create_entities", {"entities": [entity("n" * (NAME_CHARS_MAX + 1))]}), "split it"),
        (("create_entities", {"entities": [entity("X", "o" * (TEXT_CHARS_MAX + 1))]}), "split it"),
        (("open_nodes", {"names": ["x"] * 10_001}), "several calls"),
        (("search_nodes", {"query": "q" * (TEXT_CHARS_MAX + 1)}), "split it"),
        (("create_entities", {"entities": [entity("\ud800")]}), "no valid Unicode"),
    ],
)
@asynchronous
async def test_what_is_too_much_is_refused_and_says_why(
    tmp_path: Path, call: Call, reason: str
) -> None:
    async with Memory(tmp_path / "memory.jsonl") as memory:
        with pytest.raises(GraphError, match=reason):
            await memory.call(*call)

        assert len(memory.graph) == 0


# The file

OLD = [
    {"type": "entity", "name": "Alice", "entityType": "person", "observations": ["a", "b"]},
    {"type": "relation", "from": "Alice", "to": "Bob", "relationType": "knows"},
    {"type": "entity", "name": "Bob", "entityType": "person", "observations": []},
]


def write(path: Path, *items: dict[str, Any] | str) -> None:
    lines = [each if isinstance(each, str) else json.dumps(each) for each in items]
    path.write_text("\n".join(lines) + "\n")


def kept_beside(path: Path) -> list[Path]:
    """The files as they were before something in them was left out."""
    return sorted(path.parent.glob(f"{path.name}.before-*"))


def says(path: Path, text: str) -> bool:
    return path.exists() and text in path.read_text()


async def written(path: Path, text: str) -> None:
    """Wait until a file has a text."""
    async with asyncio.timeout(LONG):
        while not says(path, text):  # noqa: ASYNC110 (another process writes it)
            await asyncio.sleep(0.02)


@asynchronous
async def test_an_existing_memory_is_taken_over_and_written_as_the_official_server_does(
    tmp_path: Path,
) -> None:
    path = tmp_path / "memory.jsonl"
    write(path, *OLD)
    path.chmod(0o644)
    async with Memory(path) as memory:
        found = memory.graph.read().as_dict()
    assert [each["name"] for each in found["entities"]] == ["Alice", "Bob"]
    assert found["relations"] == [{"from": "Alice", "to": "Bob", "relationType": "knows"}]

    # Entities come first, no newline at the end, and who may read it is as before.
    lines = [json.dumps(each, separators=(",", ":")) for each in (OLD[0], OLD[2], OLD[1])]
    assert path.read_text() == "\n".join(lines)
    assert path.stat().st_mode & 0o777 == 0o644
    # Nothing is lost, so nothing had to be kept beside.
    assert not kept_beside(path)


@asynchronous
async def test_what_is_added_by_hand_is_taken_in_and_what_is_removed_comes_back(
    tmp_path: Path,
) -> None:
    path = tmp_path / "memory.jsonl"
    write(path, *OLD)
    async with Memory(path) as memory:
        await written(path, "Bob")
        write(path, OLD[0] | {"observations": ["a", "by hand"]}, OLD[1])
        await written(path, '"Bob","entityType"')

        alice, bob = memory.graph.read().as_dict()["entities"]
        assert alice["observations"] == ["a", "b", "by hand"]
        assert bob["name"] == "Bob"
    # While nobody is there as well.
    write(path, OLD[0] | {"observations": ["once more"]})
    async with Memory(path) as memory:
        assert memory.graph.open(["Alice"]).entities[0].observations[-1] == "once more"
        assert memory.graph.entity("Bob") is not None


@asynchronous
async def test_when_the_keeper_hangs_nothing_is_promised_and_when_it_dies_nothing_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "memory.jsonl"
    async with fleet(1, path) as (keeper,):
        await keeper.call("create_entities", entities=[entity("X"), entity("Y")])
        await written(path, "Y")
        async with Memory(path) as memory:
            await keeper.call("delete_entities", entityNames=["X"])
            os.kill(keeper.pid, signal.SIGSTOP)
            saved = memory.shared.saved
            monkeypatch.setattr(memory.shared, "saved", lambda: saved(0.2))
            with pytest.raises(ConfirmTimeout):
                await memory.call("create_entities", {"entities": [entity("Z")]})
            monkeypatch.undo()
            os.kill(keeper.pid, signal.SIGKILL)
            await memory.shared.saved()

            # X is in the file that the dead one wrote, perhaps; that was no other's doing.
            assert names_in((await memory.call("read_graph", {})).data) == {"Y", "Z"}
    assert "X" not in path.read_text() and "Z" in path.read_text()


@asynchronous
async def test_of_a_file_with_the_marks_of_a_merge_both_sides_are_taken_in(tmp_path: Path) -> None:
    path = tmp_path / "memory.jsonl"
    theirs = OLD[0] | {"observations": ["theirs"]}
    odd = [{"type": "entity", "name": 5}, {"type": "entity", "name": "X", "entityType": "t"}, [1]]
    marks = ["<<<<<<< HEAD", OLD[0], "=======", theirs, ">>>>>>> main", *map(json.dumps, odd)]
    write(path, *marks, "[" * 100_000)
    before = path.read_bytes()
    async with Memory(path) as memory:
        assert memory.graph.read().as_dict()["entities"] == [
            entity("Alice", "a", "b", "theirs", kind="person")
        ]

    (kept,) = kept_beside(path)
    assert kept.read_bytes() == before


@asynchronous
async def test_a_file_that_is_removed_or_emptied_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "memory.jsonl"
    write(path, *OLD)
    async with Memory(path):
        await written(path, "Bob")
        path.unlink()
        await written(path, "Bob")
        path.write_text("")
        await written(path, "Bob")


@asynchronous
async def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    real, link = tmp_path / "repository" / "memory.jsonl", tmp_path / "memory.jsonl"
    write(real, *OLD)
    link.symlink_to(real)
    async with Memory(link) as memory:
        await memory.call("create_entities", {"entities": [entity("X")]})

    assert link.is_symlink() and "X" in real.read_text()


@asynchronous
async def test_a_file_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "memory.jsonl"
    async with Memory(path) as memory:
        path.mkdir()
        await memory.call("create_entities", {"entities": [entity("X")]})
        assert names_in((await memory.call("read_graph", {})).data) == {"X"}
    assert "cannot be" in caplog.text
    with pytest.raises(StoreError, match="directory"):
        async with Memory(path):
            pass


def test_where_the_file_is_when_nobody_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("MEMORY_FILE_PATH", raising=False)
    assert default_path() == tmp_path / "crdtstate" / "memory.jsonl"
    monkeypatch.setenv("MEMORY_FILE_PATH", "team.jsonl")
    assert default_path() == tmp_path / "crdtstate" / "team.jsonl"
    monkeypatch.setenv("MEMORY_FILE_PATH", "/somewhere/else.jsonl")
    assert default_path() == Path("/somewhere/else.jsonl")


def test_what_keeps_it_from_serving_is_said_and_ends_it(tmp_path: Path) -> None:
    ended = subprocess.run(
        [*OURS, str(tmp_path / "nowhere" / "memory.jsonl")],
        stdin=subprocess.PIPE,
        capture_output=True,
        timeout=LONG,
    )
    assert ended.returncode == 1
    assert b"create it first" in ended.stderr and b"Traceback" not in ended.stderr


def test_without_the_extra_it_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['mcp'] = None; sys.argv = ['crdtstate', 'mcp-memory', 'x.jsonl']\n"
        "from crdtstate import cli; sys.exit(cli.main())"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=LONG)

    assert ended.returncode == 1
    assert b"pip install 'crdtstate[cli,mcp]'" in ended.stderr


def test_nothing_else_imports_what_the_extra_brings() -> None:
    program = (
        "import sys, crdtstate.cli, crdtstate.integrations.mcp_memory.memory\n"
        "sys.exit('mcp' in sys.modules or 'mcp_types' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=LONG).returncode == 0
