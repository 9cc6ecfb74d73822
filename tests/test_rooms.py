"""
Browsers that write: Yjs clients in node against the rooms of a relay.

The clients are ``yjs`` and ``y-websocket`` as npm has them, many in one node process. Relays are
processes where they are restarted.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import websockets
from harness import asynchronous
from pycrdt import Array, Doc, Text, XmlFragment
from pycrdt import Map as YMap
from test_examiner import deadly as deadly
from test_relay import end, running

from crdtstate import Limits, Replica, blocking
from crdtstate.config import Config
from crdtstate.credentials import open_host_credentials
from crdtstate.guard import encode_varint
from crdtstate.limits import CloseCode
from crdtstate.native import Native, content
from crdtstate.native_guard import NotYet
from crdtstate.relay import yprotocol
from crdtstate.relay.pages import Site
from crdtstate.relay.tokens import token_of
from crdtstate.transports.websocket import _Dialled
from tests.fleet_mesh import Mesh, even

NODE = Path(__file__).parent / "node"
PATIENCE = 20


class Node:
    """Yjs clients in one node process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._number = 0

    def ask(self, method: str, *arguments: Any) -> Any:
        return self.ask_all([(method, *arguments)])[0]

    def ask_all(self, questions: list[tuple[Any, ...]]) -> list[Any]:
        """Ask for several things, one after the other."""
        assert self._process.stdin is not None and self._process.stdout is not None
        for question in questions:
            self._number += 1
            self._process.stdin.write(json.dumps([self._number, *question]) + "\n")
        self._process.stdin.flush()
        found = []
        for _ in questions:
            _, answer, *failure = json.loads(self._process.stdout.readline())
            assert not failure, failure
            found.append(answer)
        return found

    def open(self, name: str, address: str, room: str, token: str | None = None) -> int:
        number: int = self.ask("open", name, f"{address}/yjs", room, token or host_token())
        return number

    def run(self, name: str, code: str, *values: Any) -> Any:
        return self.ask("run", name, code, *values)


def host_token() -> str:
    return token_of(open_host_credentials())


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(["node", "room.mjs"], cwd=NODE, text=True, **pipes) as process:
        try:
            yield Node(process)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def relay() -> Iterator[str]:
    with running("--name", "relay-1") as (_, address):
        yield address


@contextmanager
def reader(name: str, address: str) -> Iterator[blocking.Replica]:
    with blocking.Replica(name, peers=[address]) as replica:
        yield replica


def wait(replica: blocking.Replica, document: str, found: Any) -> None:
    """Wait until a native document reads like this."""
    inner = replica._replica

    def reads() -> bool:
        held = inner.find(document)
        return held is not None and bool(found(held))

    replica._wait(lambda: inner._wait_until(reads, f"{document} to change", PATIENCE))


def test_yjs_and_python_write_the_same_document(node, relay):
    node.open("one", relay, "plan/one")
    node.ask("synced", "one")
    node.run(
        "one",
        """
        doc.transact(() => {
          doc.getMap('map').set('goal', 'ship it')
          doc.getArray('array').push([1, 'two', null])
          doc.getText('text').insert(0, 'Grüße 😀')
          const inner = new Y.Map()
          doc.getMap('map').set('inner', inner)
          inner.set('list', Y.Array.from([true]))
        })
        """,
    )
    with reader("ann", relay) as ann:
        wait(ann, "plan/one", lambda d: len(d.native_map("map")) == 2)

        def write(replica: Any) -> Any:
            document = replica.document("plan/one", shared=True)
            found = document.text("text").to_py(), document.array("array").to_py()
            document.native_map("map")["by"] = "ann"
            document.text("text").insert(0, "> ")
            document.array("array").append(2.5)
            document.native_map("map")["inner"]["list"].append(False)
            return found

        assert ann.call(write) == ("Grüße 😀", [1, "two", None])
        wanted = {
            "map": {"goal": "ship it", "inner": {"list": [True, False]}, "by": "ann"},
            "array": [1, "two", None, 2.5],
            "text": "> Grüße 😀",
        }
        node.ask("reads", "one", wanted)
        node.run("one", "doc.getText('text').delete(0, 2)")
        wait(ann, "plan/one", lambda d: d.text("text").to_py() == "Grüße 😀")
        history = {(change.agent, change.run) for change in ann.history("plan/one")}
        number = node.run("one", "return doc.clientID")
        assert {("relay-1", f"yjs/{number}"), ("ann", "")} <= history
    node.ask("destroy", "one")


def test_what_was_written_offline_comes_after_a_restart_and_at_another_relay(node, tmp_path):
    store = str(tmp_path / "relay.db")
    with running("--store", store, "--name", "first") as (process, address):
        node.open("far", address, "notes")
        node.ask("synced", "far")
        node.run("far", "doc.getText('text').insert(0, 'one ')")
        with reader("ann", address) as ann:
            wait(ann, "notes", lambda d: d.text("text").to_py() == "one ")
        assert end(process, signal.SIGTERM) == (0, "", "")
    node.run("far", "doc.getText('text').insert(4, 'two ')")
    port = address.rpartition(":")[2]
    with running("--store", store, "--name", "first", "--listen", f"ws://127.0.0.1:{port}") as (
        process,
        _,
    ):
        with reader("bob", address) as bob:
            # It has come back by itself.
            wait(bob, "notes", lambda d: d.text("text").to_py() == "one two ")
        process.kill()
        process.wait()
    # Another relay, which has nothing of it; what is sent twice is there once.
    with running("--name", "second") as (_, other):
        node.ask("disconnect", "far")
        node.run("far", "doc.getText('text').insert(8, 'three')")
        node.ask("destroy", "far")
        node.open("far", other, "notes")
        with reader("eve", other) as eve:
            wait(eve, "notes", lambda d: d.text("text").to_py() == "one two three")
            with running("--store", store, "--name", "first", "--peer", other) as (_, back):
                with reader("dan", back) as dan:
                    wait(dan, "notes", lambda d: d.text("text").to_py() == "one two three")
                    node.run("far", "doc.getText('text').insert(0, '> ')")
                    wait(dan, "notes", lambda d: d.text("text").to_py() == "> one two three")
                wait(eve, "notes", lambda d: d.text("text").to_py() == "> one two three")
    node.ask("destroy", "far")


def test_fifty_that_come_at_once_read_the_same_in_the_end(node, relay):
    names = [f"many-{at}" for at in range(50)]
    for name in names:
        node.open(name, relay, "crowd")
    node.ask_all([("synced", name) for name in names])
    code = """
    const [at] = values
    for (let each = 0; each < 3; each++) {
      doc.getMap('map').set(`${at}-${each}`, at)
      doc.getArray('array').push([at])
      doc.getText('text').insert(0, String.fromCharCode(97 + at % 26))
    }
    """
    node.ask_all([("run", name, code, at) for at, name in enumerate(names)])
    all_of_it = "doc.getMap('map').size === 150 && doc.getArray('array').length === 150"
    node.ask_all(
        [("until", name, f"{all_of_it} && doc.getText('text').length === 150") for name in names]
    )
    with reader("ann", relay) as ann:
        wait(ann, "crowd", lambda d: len(d.text("text")) == 150 and len(d.array("array")) == 150)
        read = ann.call(lambda r: r.document("crowd", shared=True).array("array").to_py())
        assert node.ask("read", "many-7")["array"] == read
    found = [node.ask("read", name) for name in names]
    assert found == [found[0]] * 50 and len(found[0]["map"]) == 150
    for name in names:
        node.ask("destroy", name)


def test_who_is_there_is_shown_here_and_at_other_relays(node, relay):
    with running("--peer", relay, "--name", "relay-2") as (_, two):
        numbers = {
            name: node.open(name, address, "aware")
            for name, address in (("ann", relay), ("bob", relay), ("eve", two))
        }
        code = "awareness.setLocalStateField('user', {name: values[0]})"
        node.ask_all([("run", name, code, name) for name in numbers])
        everybody = " && ".join(
            f"awareness.getStates().get({number})?.user?.name === '{name}'"
            for name, number in numbers.items()
        )
        node.ask_all([("until", name, everybody) for name in numbers])
        node.ask("destroy", "ann")
        node.ask_all(
            [
                ("until", name, f"!awareness.getStates().has({numbers['ann']})")
                for name in ("bob", "eve")
            ]
        )
        # What it calls itself stands in the history.
        node.run("bob", "doc.getMap('map').set('a', 1)")
        with reader("dan", two) as dan:
            wait(dan, "aware", lambda d: len(d.native_map("map")))
            (change,) = dan.history("aware")
            assert (change.agent, change.run, change.message) == (
                "relay-1",
                f"yjs/{numbers['bob']}",
                "bob",
            )
        for name in ("bob", "eve"):
            node.ask("destroy", name)


# Hostile ones, byte by byte. The relay is in this process.

GOOD = "what-opens-it-all"


@asynccontextmanager
async def site(
    name: str = "relay", mesh: Any = None, store: Path | None = None, **limits: Any
) -> AsyncIterator[Replica]:
    """A relay, opened by `GOOD`."""

    def http(request: Any) -> Any:
        return pages.answer(request)

    config = Config(limits=Limits(**limits))
    replica = Replica(
        name,
        listen="ws://127.0.0.1:0",
        role="relay",
        http=http,
        config=config,
        mesh=mesh,
        store=store,
        # A commit takes so long that whoever does not wait for it is seen.
        durability="power",
    )
    pages = Site(replica, GOOD.__eq__, ("https://app.example",))
    async with replica:
        yield replica
        pages.end()
        pages.close()


class Raw:
    """A browser that says what it likes."""

    def __init__(self, socket: websockets.ClientConnection) -> None:
        self.socket = socket

    async def send(self, *messages: bytes | str) -> None:
        for message in messages:
            await self.socket.send(message)

    async def until(self, check: Callable[[Any], bool]) -> Any:
        """Read until a message is one that is waited for."""
        async with asyncio.timeout(PATIENCE):
            while True:
                message = await self.socket.recv()
                if isinstance(message, str):
                    message = json.loads(message)
                if check(message):
                    return message

    async def code(self) -> tuple[int, str]:
        """How it is closed."""
        try:
            await self.until(lambda _: False)
        except websockets.ConnectionClosed as exc:
            assert exc.rcvd is not None
            return exc.rcvd.code, exc.rcvd.reason
        raise AssertionError


@asynccontextmanager
async def raw(replica: Replica, path: str, *protocols: str, **options: Any) -> AsyncIterator[Raw]:
    offered = protocols or ("crdtstate", f"crdtstate.token.{GOOD}")
    async with websockets.connect(
        f"{replica.address}{path}",
        subprotocols=offered,
        compression=None,
        max_size=None,
        create_connection=_Dialled,
        **options,
    ) as socket:
        yield Raw(socket)


def update(data: bytes) -> bytes:
    return yprotocol.sync(yprotocol.UPDATE, data)


def wrote(number: int, edit: Callable[[Doc[Any]], object], base: bytes = b"") -> bytes:
    """What a client of this number writes, upon a state."""
    doc: Doc[Any] = Doc(client_id=number)
    if base:
        doc.apply_update(base)
    before = doc.get_state()
    edit(doc)
    return doc.get_update(before)


def typed(text: str, at: int = 0) -> Callable[[Doc[Any]], object]:
    return lambda doc: doc.get("text", type=Text).insert(at, text)


def shown(message: bytes) -> set[tuple[int, int, str]]:
    """What a message of awareness says."""
    return {tuple(s) for s in yprotocol.read_states(yprotocol.Reader(message[1:]).bytes(), 4096)}


def is_update(message: Any) -> bool:
    return isinstance(message, bytes) and message[:2] == bytes([0, 2])


def edits(rng: random.Random, doc: Doc[Any]) -> None:
    """Somebody edits something."""
    text, array = doc.get("text", type=Text), doc.get("array", type=Array)
    at = rng.choice([0, len(str(text).encode())])
    match rng.randrange(6):
        case 0 | 1:
            text.insert(at, rng.choice(["ab", "é", "😀😀", "long enough to be cut"]))
        case 2 if len(str(text)):
            first = len(str(text)[0].encode())
            del text[0:first]
        case 3:
            array.extend([rng.random(), {"k": [1, None]}, "😀"])
        case 4 if len(array):
            del array[rng.randrange(len(array))]
        case _:
            doc.get("map", type=YMap)[rng.choice("abc")] = rng.choice([1, Text("in 😀"), "x"])


def native_content(native: Native) -> Any:
    return {name: content(root) for name, root in native.contents().items()}


@pytest.mark.parametrize("seed", range(25))
def test_what_overlaps_and_comes_in_another_order_reads_the_same(seed):
    rng = random.Random(seed)
    docs: list[Doc[Any]] = [Doc(client_id=number) for number in (7000, 2**32 - 1)]
    made: list[bytes] = []
    seen = [doc.get_state() for doc in docs]
    for _ in range(rng.randrange(8, 25)):
        doc = rng.choice(docs)
        edits(rng, doc)
        if rng.random() < 0.3:
            doc.apply_update(docs[docs[0] is doc].get_update(doc.get_state()))
        # All that was not known at some time, as a browser sends to a relay that lacks it.
        if (update := doc.get_update(rng.choice(seen))) != b"\0\0":
            made.append(update)
        seen.append(doc.get_state())
    made += [doc.get_update() for doc in docs]
    read = []
    for writer in (2**40, 2**41):
        native = Native(2**42, lambda: None)
        waiting = rng.sample(made, len(made))
        while waiting:
            left = []
            for each in waiting:
                try:
                    native.check(each, writer)
                    native.apply(each, writer)
                except NotYet:
                    left.append(each)
            assert len(left) < len(waiting)
            waiting = left
        # Once more does nothing.
        before = dict(native.clocks)
        for each in made:
            native.apply(each, writer + 1)
        assert native.clocks == before
        loaded = Native(1, lambda: None)
        loaded.load(native.state())
        assert native_content(loaded) == native_content(native)
        read.append((before, native_content(native)))
        native.close()
        loaded.close()
    assert read[0] == read[1]
    assert set(read[0][0]) <= {7000, 2**32 - 1}


GARBAGE = {
    "text": "hello",
    "nothing": b"",
    "an unknown kind": b"\x63",
    "a number without end": b"\xff" * 200_000,
    "a length beyond the end": bytes([0, 2]) + encode_varint(1 << 30),
    "bytes left over": bytes([3, 3]),
    "a state vector of 2**28 clients": bytes([0, 0, 5]) + b"\xff\xff\xff\x7f\x01",
    "states of more than there are": bytes([1, 2]) + b"\xff\x07",
    "a state that is not JSON": yprotocol.states([yprotocol.State(5000, 1, "{nope")]),
    "a state that JSON has no word for": yprotocol.states([yprotocol.State(5000, 1, "NaN")]),
    "nested too deep": yprotocol.states([yprotocol.State(5000, 1, "[" * 2000)]),
}

INVALID = {
    "a number that is no browser's": wrote(
        2**52, lambda doc: doc.get("t", type=Text).insert(0, "x")
    ),
    "no update": b"\x07\x07\x07",
    "a client twice": bytes.fromhex("0202 0500"),
    "a type that is not shared": wrote(
        5000, lambda doc: doc.get("x", type=XmlFragment).children.append("no")
    ),
    "values nested 100 deep": wrote(
        5000,
        lambda doc: doc.get("m", type=YMap).__setitem__("k", json.loads("[" * 100 + "]" * 100)),
    ),
}


@asynchronous
async def test_garbage_ends_the_connection_and_nothing_else():
    async with site() as replica:
        async with raw(replica, "/yjs/room") as honest:
            await honest.send(update(wrote(7000, typed("fine"))))
            large = wrote(5000, typed("x" * (2 << 20)))
            for path, messages, wanted in (
                ("/yjs/room", {"too large to take in": update(large)}, CloseCode.TOO_LARGE),
                ("/yjs/room", GARBAGE, CloseCode.BAD_FRAME),
                ("/yjs/room", {k: update(each) for k, each in INVALID.items()}, CloseCode.INVALID),
                ("/yjs/room", {"too large": bytes(9 << 20)}, 1009),
                ("/lanes/plan", {"binary": b"{}", "no JSON": "{", "no object": "[]"}, 4400),
                ("/lanes/plan", {"deep": "[" * 50_000, "no hello": '{"write": 1}'}, 4400),
                ("/lanes/plan", {"a short session": '{"hello": {"session": "me"}}'}, 4400),
            ):
                for label, message in messages.items():
                    async with raw(replica, path) as hostile:
                        await hostile.send(message)
                        code, reason = await hostile.code()
                        assert code == wanted and (reason or code == 1009), (label, code, reason)
            await honest.send(update(wrote(7001, typed("also "))))
            document = replica.document("room", shared=True)
            await replica._wait_until(lambda: len(str(document.text("text"))) == 9, "it", PATIENCE)
        assert str(document.text("text")) in ("also fine", "finealso ")
        refused = replica.traffic.refused
        assert refused["bad-frame"] >= len(GARBAGE) and refused["invalid-update"] == len(INVALID)
        assert document.native is not None and set(document.native.clocks) == {7000, 7001}


@asynchronous
async def test_nobody_writes_as_somebody_else():
    async with site() as replica:
        document = replica.document("room", shared=True)
        document.text("text").insert(0, "relay ")
        await replica.durable()
        own = document.writer
        async with raw(replica, "/yjs/room") as ann, raw(replica, "/yjs/room") as eve:
            first = wrote(7000, typed("ann "), document.native.state())
            await ann.send(update(first))
            await eve.until(is_update)
            state = document.native.state()
            for number in (7000, own):
                # What that one writes next, but for what it says.
                doc: Doc[Any] = Doc(client_id=number)
                doc.apply_update(state)
                before = doc.get_state()
                doc.get("text", type=Text).insert(0, "poison ")
                await eve.send(update(doc.get_update(before)))
            # What it writes as itself is taken, and comes after all that.
            await eve.send(update(wrote(8000, typed("eve "), state)))
            await ann.until(is_update)
            assert sorted(str(document.text("text")).split()) == ["ann", "eve", "relay"]
            assert document.native.clocks == {own: 6, 7000: 4, 8000: 4}
            assert replica.traffic.refused["foreign-items"] == 2
            # Ann goes on as if nothing had been.
            state = document.native.state()
            await ann.send(update(wrote(7000, typed("on "), state)))
            await eve.until(is_update)
            assert document.native.clocks[7000] == 7
            # Anybody may delete what is here; what is not here cannot be deleted.
            await eve.send(update(b"\0" + encode_varint(1) + encode_varint(9000) + b"\x01\0\x05"))
            await eve.send(update(b"\0" + encode_varint(1) + encode_varint(7000) + b"\x01\0\x7f"))
            await ann.until(is_update)
            assert sorted(str(document.text("text")).split()) == ["eve", "relay"]
            await ann.send(yprotocol.states([yprotocol.State(7000, 1, '{"a": 1}')]))
            seen = await eve.until(lambda m: m[0] == 1 and len(m) > 3)
            assert shown(seen) == {(7000, 1, '{"a":1}')}
            # Nor does anybody show itself as somebody else, or take that away.
            for number, clock, text in ((7000, 9, '"eve"'), (7000, 9, "null"), (8000, 1, '"e"')):
                await eve.send(yprotocol.states([yprotocol.State(number, clock, text)]))
            await ann.until(lambda m: m[0] == 1 and b'"e"' in m)
            async with raw(replica, "/yjs/room") as late:
                seen = await late.until(lambda m: m[0] == 1)
                assert shown(seen) == {(7000, 1, '{"a":1}'), (8000, 1, '"e"')}
            # The same browser comes back on a new connection, with all that it has.
            await ann.socket.close()
            async with raw(replica, "/yjs/room") as back:
                doc = Doc(client_id=7000)
                doc.apply_update(document.native.state())
                doc.get("text", type=Text).insert(0, "back ")
                await back.send(yprotocol.sync(yprotocol.STEP_2, doc.get_update()))
                await eve.until(is_update)
                assert "back" in str(document.text("text"))
        changes = [change async for change in replica.history("room")]
        assert {change.agent for change in changes} == {"relay"}


@pytest.mark.parametrize("how", ["SEGFAULT", "PANIC"])
@asynchronous
async def test_what_pycrdt_does_not_survive_ends_only_who_sent_it(how, deadly):
    async with (
        site() as replica,
        raw(replica, "/yjs/room") as ann,
        raw(replica, "/yjs/room") as eve,
        raw(replica, "/yjs/elsewhere") as bob,
    ):
        await ann.send(update(wrote(7000, typed("fine "))))
        await eve.until(is_update)
        room = replica.document("room", shared=True)
        state = room.native.state()
        await eve.send(update(wrote(8000, typed(f"xx {how} xx"), state)))
        # These come while it is tried.
        await ann.send(update(wrote(7000, typed("too "), state)))
        await bob.send(update(wrote(9000, typed("elsewhere"))))
        code, reason = await eve.code()
        assert code == CloseCode.INVALID and "does not survive" in reason
        other = replica.document("elsewhere", shared=True)
        await replica._wait_until(
            lambda: len(str(room.text("text"))) == 9 and str(other.text("text")) == "elsewhere",
            "it",
            PATIENCE,
        )
        assert sorted(str(room.text("text")).split()) == ["fine", "too"]
        # No dot was lost over it: who comes later can take in all of it.
        async with Replica("late", peers=[str(replica.address)]) as late:
            await even(replica, late)
            assert str(late.document("room", shared=True).text("text")) == str(room.text("text"))


@asynchronous
async def test_a_flood_of_cursors_ends_only_who_makes_it():
    async with (
        site(awareness_burst=20, awareness_per_second=1) as replica,
        raw(replica, "/yjs/room") as ann,
        raw(replica, "/yjs/room") as eve,
    ):
        large = yprotocol.State(7000, 1, json.dumps("x" * 5000))
        await eve.send(yprotocol.states([large]))
        for clock in range(100):
            await eve.send(yprotocol.states([yprotocol.State(7000, clock + 2, f"{clock}")]))
        assert (await eve.code())[0] == CloseCode.RATE
        assert replica.traffic.refused["awareness"] == 1
        # It is gone, and what it showed with it.
        gone = await ann.until(lambda m: m[0] == 1 and m.endswith(b"null"))
        assert len(gone) < 20
        await ann.send(update(wrote(9000, typed("fine"))))
        document = replica.document("room", shared=True)
        await replica._wait_until(lambda: str(document.text("text")) == "fine", "it", PATIENCE)


@asynchronous
async def test_who_may_come_and_how_many():
    async with site(browsers=3, browsers_per_document=2) as replica:
        for path in ("/yjs/room", "/lanes/plan"):
            for protocols in (("crdtstate",), ("crdtstate.token.wrong",), ("crdtstate.token.",)):
                async with raw(replica, path, *protocols) as stranger:
                    code, reason = await stranger.code()
                    assert code == CloseCode.NOT_ADMITTED and "token" in reason
        for origin, wanted in (("https://evil.example", 403), ("https://app.example", 101)):
            try:
                async with raw(replica, "/yjs/room", origin=origin) as browser:
                    assert browser.socket.subprotocol == "crdtstate"
                found = 101
            except websockets.InvalidStatus as exc:
                found = exc.response.status_code
            assert found == wanted
        for path in ("/yjs/@votes", "/yjs/", "/yjs/%00", "/lanes/@mesh", "/yjs/" + "x" * 201):
            with pytest.raises(websockets.InvalidStatus) as refused:
                async with raw(replica, path):
                    pass
            assert refused.value.response.status_code == 404
        replica.document("plan").map("m")["a"] = 1
        replica.document("room", shared=True)
        for path in ("/yjs/plan", "/lanes/room"):
            async with raw(replica, path) as wrong:
                assert (await wrong.code())[0] == CloseCode.FORBIDDEN
        async with raw(replica, "/yjs/one"), raw(replica, "/yjs/one"):
            for path in ("/yjs/one", "/yjs/two", "/yjs/three"):
                try:
                    async with raw(replica, path):
                        found = 101
                        if path == "/yjs/two":
                            with pytest.raises(websockets.InvalidStatus):
                                async with raw(replica, "/yjs/three"):
                                    pass
                except websockets.InvalidStatus as exc:
                    found = exc.response.status_code
                assert found == (503 if path == "/yjs/one" else 101)


def hello(session: str, **more: Any) -> str:
    return json.dumps({"hello": {"session": session * 16, **more}})


@asynchronous
async def test_what_a_session_had_not_seen_conflicts_with_what_it_writes():
    async with (
        site() as replica,
        raw(replica, "/lanes/plan") as ann,
        raw(replica, "/lanes/plan") as bob,
    ):
        plan = replica.document("plan")
        await ann.send(hello("a"))
        await bob.send(hello("b"))
        welcomes = [(await each.until(lambda m: "welcome" in m))["welcome"] for each in (ann, bob)]
        write = {"write": 1, "seen": welcomes[0]["number"], "ops": [["put", "m", "k", "ann"]]}
        await ann.send(json.dumps(write))
        await ann.until(lambda m: m.get("acked") == 1)
        told = await bob.until(lambda m: m.get("cells"))
        assert ["map", "m", "k", "ann"] in told["cells"]
        write = {"write": 1, "seen": welcomes[1]["number"], "ops": [["put", "m", "k", "bob"]]}
        await bob.send(json.dumps(write))
        told = await ann.until(lambda m: any(len(cell) == 5 for cell in m.get("cells", ())))
        agent = replica.agent
        assert ["map", "m", "k", "bob", [["ann", agent], ["bob", agent]]] in told["cells"]
        assert [each.value for each in plan.map("m").conflicts()["k"]] == ["ann", "bob"]
        # Who has seen both settles it. The same write again does nothing.
        write = {"write": 2, "seen": told["number"], "ops": [["put", "m", "k", "both"]]}
        for _ in range(2):
            await ann.send(json.dumps(write))
            await ann.until(lambda m: m.get("acked") == 2)
        assert not plan.map("m").conflicts() and plan.map("m")["k"] == "both"
        assert plan.version.total == 3
        # Sessions of one name: the newer connection goes on.
        async with raw(replica, "/lanes/plan") as again:
            await again.send(hello("a", last=2, relay=welcomes[0]["relay"]))
            welcome = (await again.until(lambda m: "welcome" in m))["welcome"]
            assert (welcome["known"], welcome["unsure"]) == (2, False)
            assert (await ann.code())[0] == CloseCode.DUPLICATE
        # To another relay's client it cannot tell.
        async with raw(replica, "/lanes/plan") as other:
            await other.send(hello("c", last=5, relay="another"))
            assert (await other.until(lambda m: "welcome" in m))["welcome"]["unsure"]


@asynchronous
async def test_what_a_browser_told_two_relays_is_there_once():
    async with site("one") as one, site("two") as two:
        doc: Doc[Any] = Doc(client_id=7000)
        updates: list[bytes] = []
        for at, word in enumerate(("Grüße ", "an 😀 ", "alle", "!")):
            before = doc.get_state()
            doc.get("text", type=Text).insert(len(doc.get("text", type=Text)), word)
            if at == 2:
                del doc.get("text", type=Text)[0:1]
            updates.append(doc.get_update(before))
        async with raw(one, "/yjs/room") as browser:
            await browser.send(*map(update, updates[:2]))
            found = one.document("room", shared=True)
            await one._wait_until(lambda: "an" in str(found.text("text")), "it", PATIENCE)
        # The other relay knows nothing of that, and is told all of it in one.
        async with raw(two, "/yjs/room") as browser:
            await browser.send(yprotocol.sync(yprotocol.STEP_2, doc.get_update()))
            other = two.document("room", shared=True)
            await two._wait_until(lambda: "!" in str(other.text("text")), "it", PATIENCE)
        one.connect(str(two.address))
        await even(one, two)
        wanted = str(doc.get("text", type=Text))
        for replica in (one, two):
            held = replica.document("room", shared=True)
            assert str(held.text("text")) == wanted
            assert held.native is not None and held.native.clocks == {
                7000: len("Grüße an xx alle!")
            }
        # Who comes later gets the sum of both, and reads the same.
        async with Replica("three", peers=[str(one.address)]) as three:
            await even(one, three)
            assert str(three.document("room", shared=True).text("text")) == wanted


@asynchronous
async def test_in_a_mesh_of_members_the_relay_signs_for_its_browsers():
    mesh = Mesh()
    relay_rights = mesh.credentials("relay", "*:frws")
    async with (
        site(mesh=relay_rights) as replica,
        Replica("ann", peers=[str(replica.address)], mesh=mesh.credentials("ann")) as ann,
        raw(replica, "/yjs/room") as page,
        raw(replica, "/lanes/plan") as other,
    ):
        await page.send(update(wrote(7000, typed("signed"))))
        await other.send(hello("a", name="Ann at her\ndesk"))
        await other.until(lambda m: "welcome" in m)
        ops = [["put", "m", "k", {"$bytes": "AAE="}], ["count", "c", {"$int": str(2**60)}]]
        await other.send(json.dumps({"write": 1, "seen": 0, "ops": ops}))
        await other.until(lambda m: m.get("acked") == 1)
        room = replica.document("room", shared=True)
        await replica._wait_until(lambda: str(room.text("text")) == "signed", "it", PATIENCE)
        await even(replica, ann)
        assert str(ann.document("room", shared=True).text("text")) == "signed"
        plan = ann.document("plan")
        assert (plan.map("m")["k"], plan.counter("c").value) == (b"\x00\x01", 2**60)
        for name, run, message in (
            ("room", "yjs/7000", ""),
            ("plan", "browser/aaaaaaaa", "Ann at her desk"),
        ):
            (change,) = [each async for each in ann.history(name)]
            assert (change.agent, change.run, change.message) == ("relay", run, message)
            (writer,) = ann.document(name).cards
            assert writer != replica.writer

    # One that may only hand on brings nothing in.
    async with site(mesh=mesh.credentials("relay", "*:fr")) as replica:
        async with raw(replica, "/yjs/room") as page, raw(replica, "/lanes/plan") as other:
            await page.send(update(wrote(7000, typed("no"))))
            assert (await page.code())[0] == CloseCode.FORBIDDEN
            await other.send(hello("a"), json.dumps({"write": 1, "seen": 0, "ops": ops}))
            assert (await other.code())[0] == CloseCode.FORBIDDEN
        assert not replica.document("plan").map("m")


@asynchronous
async def test_a_write_that_comes_again_after_a_restart_counts_once(tmp_path):
    ops = [["count", "c", 1], ["put", "m", "k", "first"]]
    write = json.dumps({"write": 1, "seen": 0, "ops": ops})
    known: dict[str, Any] = {}
    for time in range(3):
        async with site(store=tmp_path / "relay.db") as replica:
            plan = replica.document("plan")
            async with raw(replica, "/lanes/plan") as page:
                await page.send(hello("s", last=1, **({"relay": known["relay"]} if known else {})))
                known = (await page.until(lambda m: "welcome" in m))["welcome"]
                assert (known["known"], known["unsure"]) == (min(time, 1), False)
                await page.send(write)
                await page.until(lambda m: m.get("acked") == 1)
                # What is acknowledged is in the store.
                assert replica._sync.committed_version("plan") == plan.version
                assert (plan.counter("c").value, plan.map("m")["k"]) == (1, "first")
        # Cut off, not said goodbye.
    # A relay that has nothing of all that cannot tell.
    async with site("other") as replica, raw(replica, "/lanes/plan") as page:
        await page.send(hello("s", last=1, relay=known["relay"]))
        welcome = (await page.until(lambda m: "welcome" in m))["welcome"]
        assert (welcome["known"], welcome["unsure"]) == (0, True)


@asynchronous
async def test_what_the_rules_refuse_a_page_is_told_and_goes_on():
    async with site() as replica, raw(replica, "/lanes/plan") as page:
        plan = replica.document("plan")
        plan.map("m")["a"] = 1
        plan.limit(keys=3)
        await replica.durable()
        await page.send(hello("q"))
        number = (await page.until(lambda m: "welcome" in m))["welcome"]["number"]
        for at, (keys, word) in enumerate((("b", "acked"), ("cde", "refused"), ("f", "acked")), 1):
            ops = [["put", "m", key, at] for key in keys]
            await page.send(json.dumps({"write": at, "seen": number, "ops": ops}))
            told = await page.until(lambda m: "acked" in m or "refused" in m)
            assert told[word] == at, told
        assert dict(plan.map("m")) == {"a": 1, "b": 1, "f": 3}
        # Who has seen nothing for long is not waited for.
        for at in range(1100):
            plan.map("m")["a"] = at
            await replica.durable()
        ops = [["remove", "m", "b"], ["clear", "nothing"], ["discard", "s", 1]]
        await page.send(json.dumps({"write": 4, "seen": number, "ops": ops}))
        await page.until(lambda m: m.get("acked") == 4)
        assert dict(plan.map("m")) == {"a": 1099, "f": 3}
