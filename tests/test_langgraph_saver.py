"""The LangGraph checkpointer: its conformance, runs that merge, and what it takes and returns."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from harness import asynchronous
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.types import Command, interrupt
from nacl.secret import SecretBox
from test_replica import LOCAL, url

from crdtstate import InvalidUpdate, Replica, ReplicaClosed, UsageError, blocking
from crdtstate.integrations.langgraph import CrdtChannel, CrdtSaver, increment, threads
from crdtstate.integrations.langgraph.blobs import BLOB_BYTES_MAX, STRIDE, Blobs, Cache
from crdtstate.integrations.langgraph.threads import document_name


class State(TypedDict, total=False):
    """A conversation, and what its agents noted."""

    notes: Annotated[dict[str, Any], CrdtChannel()]
    messages: Annotated[list[Any], add_messages]
    who: str


def config(thread: str = "t", **more: str) -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": "", **more}}


def noting(saver: CrdtSaver, gate: Any = None) -> Any:
    """A graph of one node that notes who was there, and counts."""

    async def note(state: State) -> Any:
        if gate is not None:
            await gate()
        return {"notes": {state["who"]: "done", "count": increment()}}

    builder = StateGraph(State)
    builder.add_node("note", note)
    builder.add_edge(START, "note")
    builder.add_edge("note", END)
    return builder.compile(checkpointer=saver)


class Together:
    """Lets nobody pass before all are there."""

    def __init__(self, parties: int) -> None:
        self._barrier = asyncio.Barrier(parties)

    async def __call__(self) -> None:
        await self._barrier.wait()


def checkpoint(number: int, **values: Any) -> Any:
    versions = dict.fromkeys(values, number)
    return {
        **empty_checkpoint(),
        "id": str(uuid6(clock_seq=number)),
        "channel_values": values,
        "channel_versions": versions,
    }


async def put(saver: CrdtSaver, at: Any, number: int, run: str = "r", **values: Any) -> Any:
    made = checkpoint(number, **values)
    told: Any = {"source": "loop", "step": number, "run_id": run}
    return await saver.aput(at, made, told, made["channel_versions"])


# Conformance


@checkpointer_test(name="CrdtSaver")
async def in_memory() -> AsyncIterator[CrdtSaver]:
    async with Replica("a") as replica:
        yield CrdtSaver(replica)


@asynchronous
async def test_it_passes_all_81_tests_of_the_conformance_suite() -> None:
    report = await validate(in_memory)

    failures = [failure for result in report.results.values() for failure in result.failures or ()]
    assert failures == []
    assert sum(result.tests_passed for result in report.results.values()) == 81
    assert len(report.results) == 8
    assert report.passed_all()


def test_the_blocking_methods_say_the_same_as_the_others(tmp_path: Path) -> None:
    with CrdtSaver.open(tmp_path / "a.db") as saver:
        first = saver.put(config(), checkpoint(1, x=[1]), {"source": "input", "step": -1}, {"x": 1})
        second = saver.put(first, checkpoint(2, x=[1, 2]), {"source": "loop", "step": 0}, {"x": 2})
        saver.put_writes(second, [("x", 3), ("y", None)], "task", "path")
        latest = saver.get_tuple(config())
        steps = [found.metadata["step"] for found in saver.list(config())]
        saver.copy_thread("t", "copy")
        saver.prune(["t"])
        saver.delete_for_runs(["nobody"])
        copied = [found.checkpoint["channel_values"] for found in saver.list(config("copy"))]
        kept = list(saver.list(None, filter={"step": 0}, limit=1))
        saver.delete_thread("t")

        assert latest is not None
        assert latest.checkpoint["channel_values"] == {"x": [1, 2]}
        assert latest.parent_config == first
        assert latest.pending_writes == [("task", "x", 3), ("task", "y", None)]
        assert steps == [0, -1]
        assert copied == [{"x": [1, 2]}, {"x": [1]}]
        assert [found.checkpoint["id"] for found in kept] == [latest.checkpoint["id"]]
        assert saver.get_tuple(config()) is None


# Real graphs


def test_a_graph_runs_on_threads_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    def answer(state: State) -> Any:
        return {"messages": [("ai", f"answer {len(state['messages'])}")]}

    builder = StateGraph(State)
    builder.add_node("answer", answer)
    builder.add_edge(START, "answer")

    for number in range(3):
        with CrdtSaver.open(tmp_path / "a.db") as saver:
            graph = builder.compile(checkpointer=saver)
            got = graph.invoke({"messages": [("user", f"question {number}")]}, config())
            assert len(list(graph.get_state_history(config()))) == 3 * (number + 1)

    assert [message.content for message in got["messages"]] == [
        "question 0",
        "answer 1",
        "question 1",
        "answer 3",
        "question 2",
        "answer 5",
    ]


@asynchronous
async def test_a_run_that_was_interrupted_is_resumed_by_another_process(tmp_path: Path) -> None:
    def ask(state: State) -> Any:
        return {"who": interrupt("who is it?")}

    builder = StateGraph(State)
    builder.add_node("ask", ask)
    builder.add_edge(START, "ask")

    async with CrdtSaver.open(tmp_path / "a.db") as saver:
        stopped = await builder.compile(checkpointer=saver).ainvoke({"notes": {"a": 1}}, config())
    async with CrdtSaver.open(tmp_path / "a.db") as saver:
        graph = builder.compile(checkpointer=saver)
        resumed = await graph.ainvoke(Command(resume="ann"), config())

    assert stopped["__interrupt__"][0].value == "who is it?"
    assert resumed == {"notes": {"a": 1}, "messages": [], "who": "ann"}


# Runs that merge


@asynchronous
async def test_five_runs_at_once_on_one_thread_are_all_kept() -> None:
    async with Replica("a") as replica:
        saver = CrdtSaver(replica)
        graph = noting(saver, Together(5))
        whos = [f"agent-{number}" for number in range(5)]

        await asyncio.gather(*(graph.ainvoke({"who": who}, config()) for who in whos))
        merged = (await graph.aget_state(config())).values["notes"]
        after = await noting(saver).ainvoke({"who": "late"}, config())
        heads = replica.document(document_name("t")).map("h/")

        assert merged == {"count": 5, **dict.fromkeys(whos, "done")}
        assert after["notes"] == {**merged, "late": "done", "count": 6}
        assert len(heads) == 1  # joined for good


@asynchronous
async def test_five_replicas_that_were_apart_read_the_same_once_they_meet() -> None:
    whos = [f"agent-{number}" for number in range(5)]
    async with AsyncExitStack() as stack:
        replicas = [
            await stack.enter_async_context(Replica(who, listen=LOCAL if number == 0 else None))
            for number, who in enumerate(whos)
        ]
        savers = [CrdtSaver(replica) for replica in replicas]
        for who, saver in zip(whos, savers, strict=True):
            await noting(saver).ainvoke({"who": who, "messages": [("user", who)]}, config())
        for replica in replicas[1:]:
            replica.connect(url(replicas[0]))
        versions = [replica.version() for replica in replicas]
        for replica in replicas:
            await asyncio.gather(*(replica.wait_for(version, 20) for version in versions))
        found = [await saver.aget_tuple(config()) for saver in savers]

    values = [each.checkpoint["channel_values"] for each in found if each is not None]
    assert len(values) == 5
    assert all(each == values[0] for each in values)
    assert CrdtChannel().from_checkpoint(values[0]["notes"]).get() == {
        "count": 5,
        **dict.fromkeys(whos, "done"),
    }
    assert [message.content for message in values[0]["messages"]] == ["agent-4"]  # as ever


@asynchronous
async def test_processes_that_share_a_file_merge_what_they_wrote(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with (
        CrdtSaver.open(path, name="one", shared=True) as one,
        CrdtSaver.open(path, name="two", shared=True) as two,
    ):
        gate = Together(2)
        await asyncio.gather(
            noting(one, gate).ainvoke({"who": "ann"}, config()),
            noting(two, gate).ainvoke({"who": "bob"}, config()),
        )
        seen = [(await noting(each).aget_state(config())).values["notes"] for each in (one, two)]
    async with CrdtSaver.open(path) as saver:
        stored = (await noting(saver).aget_state(config())).values["notes"]

    assert seen == [{"ann": "done", "bob": "done", "count": 2}] * 2
    assert stored == seen[0]


@asynchronous
async def test_runs_of_processes_that_are_killed_right_after_are_all_kept(tmp_path: Path) -> None:
    path, whos = tmp_path / "a.db", [f"agent-{number}" for number in range(3)]
    command = (sys.executable, Path(__file__).parent / "langgraph_child.py", path)
    pipe = asyncio.subprocess.PIPE
    children = [
        await asyncio.create_subprocess_exec(*command, who, stdin=pipe, stdout=pipe) for who in whos
    ]
    for child in children:
        assert child.stdout is not None
        assert await child.stdout.readline() == b"ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"go\n")
    ended = [await child.wait() for child in children]
    async with CrdtSaver.open(path) as saver:
        notes = (await noting(saver).aget_state(config())).values["notes"]

    assert ended == [-signal.SIGKILL] * 3
    assert notes == {"count": 3, **dict.fromkeys(whos, "done")}


@asynchronous
async def test_going_on_from_an_older_checkpoint_leaves_the_later_ones_behind() -> None:
    async with Replica("a") as replica:
        graph = noting(CrdtSaver(replica))
        for who in ("ann", "bob"):
            await graph.ainvoke({"who": who}, config())
        history = [each async for each in graph.aget_state_history(config())]
        [past] = [each for each in history if each.metadata["step"] == 1]
        assert past.values["notes"] == {"ann": "done", "count": 1}

        await graph.ainvoke({"who": "eve"}, past.config)
        now = (await graph.aget_state(config())).values["notes"]

        assert now == {"ann": "done", "eve": "done", "count": 2}


@asynchronous
async def test_an_update_of_the_state_by_hand_merges_too() -> None:
    async with Replica("a") as replica:
        graph = noting(CrdtSaver(replica))
        await graph.ainvoke({"who": "ann"}, config())
        await graph.aupdate_state(config(), {"notes": {"by hand": True}})

        assert (await graph.aget_state(config())).values["notes"] == {
            "ann": "done",
            "by hand": True,
            "count": 1,
        }


@asynchronous
async def test_metadata_is_found_by_names_and_paths() -> None:
    async with Replica("a") as replica:
        saver = CrdtSaver(replica)
        told: Any = {"source": "input", "a-b": 1, "user": {"id": 7}, "writes": {"x": 1}}
        await saver.aput(config(), checkpoint(1), told, {})
        for filter, count in (
            ({"a-b": 1}, 1),
            ({"user.id": 7}, 1),
            ({"user": {"id": 7}}, 1),
            ({"user.id": 8}, 0),
            ({"x') OR 1=1 --": 1}, 0),
        ):
            found = [each.metadata async for each in saver.alist(None, filter=filter)]
            assert found == [told] * count


@asynchronous
async def test_delta_channels_are_made_of_the_writes_before_and_circles_end() -> None:
    async with Replica("a") as replica:
        saver = CrdtSaver(replica)
        first = await put(saver, config(), 1, items="seed")
        second = await put(saver, first, 2)
        third = await put(saver, second, 3)
        for at, value in ((first, "a"), (second, "b"), (third, "pending")):
            await saver.aput_writes(at, [("items", value), ("other", 1)], "task")
        history = await saver.aget_delta_channel_history(config=config(), channels=["items", "no"])

        writes = [("task", "items", "a"), ("task", "items", "b")]
        assert history == {"items": {"seed": "seed", "writes": writes}, "no": {"writes": []}}

        # The first one again, with the third one for its parent.
        again = checkpoint(1)
        again["id"] = first["configurable"]["checkpoint_id"]
        await saver.aput(third, again, {"run_id": "r"}, {})
        history = await saver.aget_delta_channel_history(config=third, channels=["items"])
        assert history == {"items": {"writes": writes}}
        await saver.aprune(["t"])
        await saver.adelete_for_runs(["r"])
        assert [each async for each in saver.alist(config())] == []


@asynchronous
async def test_pruning_keeps_what_delta_channels_are_made_of() -> None:
    async with Replica("a") as replica:
        saver, at = CrdtSaver(replica), config()
        for number in range(6):
            values = {"items": "seed"} if number == 2 else {}
            told: Any = {"step": number, "counters_since_delta_snapshot": {"items": [1, 1]}}
            at = await saver.aput(at, checkpoint(number, **values), told, dict.fromkeys(values, 1))
            await saver.aput_writes(at, [("items", number)], "task")
        before = await saver.aget_delta_channel_history(config=config(), channels=["items"])
        await saver.aprune(["t"])

        assert [each.metadata["step"] async for each in saver.alist(config())] == [5, 4, 3, 2]
        after = await saver.aget_delta_channel_history(config=config(), channels=["items"])
        assert after == before
        assert after["items"]["seed"] == "seed"


# Size and space


@asynchronous
async def test_300_turns_with_300_kb_of_messages_stay_under_5_mb(tmp_path: Path) -> None:
    def answer(state: State) -> Any:
        return {"messages": [("ai", os.urandom(250).hex())]}

    builder = StateGraph(State)
    builder.add_node("answer", answer)
    builder.add_edge(START, "answer")
    async with CrdtSaver.open(tmp_path / "a.db") as saver:
        graph = builder.compile(checkpointer=saver)
        for _ in range(300):
            await graph.ainvoke({"messages": [("user", os.urandom(250).hex())]}, config())

    assert sum(entry.stat().st_size for entry in os.scandir(tmp_path)) < 5_000_000
    async with CrdtSaver.open(tmp_path / "a.db") as saver:
        latest = await saver.aget_tuple(config())
        assert latest is not None
        assert len(latest.checkpoint["channel_values"]["messages"]) == 600


@asynchronous
async def test_deleting_and_pruning_give_the_space_back() -> None:
    async with Replica("a") as replica:
        saver = CrdtSaver(replica)
        at, sizes = config(), []
        document = replica.document(document_name("t"))
        for number in range(20):
            at = await put(saver, at, number, f"run-{number}", text=os.urandom(50_000))
            await saver.aput_writes(at, [("text", os.urandom(10_000))], "task")
        sizes.append(document.sizes()[0])
        await saver.acopy_thread("t", "copy")
        await saver.adelete_for_runs([f"run-{number}" for number in range(10)])
        sizes.append(document.sizes()[0])
        await saver.aprune(["t"])
        sizes.append(document.sizes()[0])
        latest = await saver.aget_tuple(config())
        await saver.adelete_thread("t")
        sizes.append(document.sizes()[0])
        copied = [each async for each in saver.alist(config("copy"))]

        assert sizes[0] > 1_200_000
        assert sizes[1] < 0.6 * sizes[0]
        assert sizes[2] < 0.1 * sizes[0]
        assert sizes[3] < 5_000
        assert latest is not None and latest.checkpoint["id"] == at["configurable"]["checkpoint_id"]
        # The runs that were deleted, are so in all threads.
        assert len(copied) == 10 and len(copied[0].pending_writes or ()) == 1


@asynchronous
async def test_pruning_keeps_what_other_heads_say() -> None:
    async with Replica("a") as replica:
        saver = CrdtSaver(replica)
        graph = noting(saver, Together(3))
        await asyncio.gather(*(graph.ainvoke({"who": who}, config()) for who in "abc"))

        await saver.aprune(["t"])

        assert len([each async for each in saver.alist(config())]) == 1
        notes = (await graph.aget_state(config())).values["notes"]
        assert notes == {"a": "done", "b": "done", "c": "done", "count": 3}


@asynchronous
async def test_pruning_elsewhere_harms_no_run_that_goes_on_meanwhile() -> None:
    async with Replica("a", listen=LOCAL) as a, Replica("b", peers=[url(a)]) as b:
        one, two = CrdtSaver(a), CrdtSaver(b)
        at, items = config(), [os.urandom(100) for _ in range(300)]
        for number in range(6):
            items = [*items, os.urandom(100)]
            at = await put(one, at, number, items=items)
        await b.synced(timeout=20)
        await two.aprune(["t"])
        at = await put(one, at, 6, items=[*items, b"last"])  # on a parent that two has deleted
        await asyncio.gather(a.synced(timeout=20), b.synced(timeout=20))
        await b.wait_for(a.version(), 20)

        for saver in (one, two):
            latest = await saver.aget_tuple(config())
            assert latest is not None
            assert latest.checkpoint["channel_values"]["items"] == [*items, b"last"]


# Values


@asynchronous
async def test_a_value_of_20_mb_is_stored_in_parts_and_a_larger_one_is_refused() -> None:
    async with Replica("a") as replica:
        saver = CrdtSaver(replica)
        large = os.urandom(20 * 2**20)
        await put(saver, config(), 1, large=large)
        found = await saver.aget_tuple(config())

        assert found is not None and found.checkpoint["channel_values"]["large"] == large
        with pytest.raises(UsageError, match="67108864 is the limit"):
            await put(saver, config(), 2, large=bytes(BLOB_BYTES_MAX + 1))
        again = await saver.aget_tuple(config())
        assert again is not None and again.checkpoint["id"] == found.checkpoint["id"]


@asynchronous
async def test_versions_of_a_value_build_on_each_other_in_short_chains() -> None:
    async with Replica("a") as replica:
        pieces = replica.map("p")
        blobs, data, key, keys = Blobs(pieces, Cache()), os.urandom(5000), None, []
        for number in range(3 * STRIDE):
            data += os.urandom(20)
            if number % 10 == 9:
                data = data[:100] + b"edited" + data[110:]
            key, added = blobs.add(data, key)
            pieces.update(added)
            keys.append((key, data))

        fresh = Blobs(pieces, Cache(limit=0))
        assert [fresh.read(each) for each, _ in keys] == [each for _, each in keys]
        assert sum(len(str(piece)) for piece in pieces.values()) < 5 * 60_000
        assert len(list(fresh.reachable(keys[-1][0]))) <= 3 + STRIDE


@asynchronous
async def test_blobs_of_strangers_that_build_on_themselves_end() -> None:
    async with Replica("a") as replica:
        pieces = replica.map("p")
        pieces.update(
            itself=[5, "itself", b"", 0, 0, 0, b"x"],
            one=[5, "two", b"", 0, 0, 0, b"x"],
            two=[4, "one", b"", 0, 0, 0, b"x"],
            more=[1, "whole", b"", 2, 0, 0, b"x"],
            whole=[0, None, b"", 0, 0, 0, b"x"],
            lost=[1, "nowhere", b"", 0, 0, 0, b"x"],
        )
        blobs = Blobs(pieces, Cache())
        for key in ("itself", "one", "more"):
            with pytest.raises(InvalidUpdate):
                blobs.read(key)
            _, added = blobs.add(b"xy" * 100, key)
            assert all(piece[1] is None for piece in added.values())
        with pytest.raises(KeyError):
            blobs.read("lost")
        assert list(blobs.reachable("lost")) == ["lost"]
        assert blobs.read("whole") == b"x"


class Cipher:
    """Encrypts with a key."""

    def __init__(self, key: bytes) -> None:
        self._box = SecretBox(key)

    def encrypt(self, plaintext: bytes) -> tuple[str, bytes]:
        return "box", bytes(self._box.encrypt(plaintext))

    def decrypt(self, ciphername: str, ciphertext: bytes) -> bytes:
        assert ciphername == "box"
        return bytes(self._box.decrypt(ciphertext))


class Secret:
    """A class that no serializer knows."""


@dataclass
class Known:
    """A class of the user's own."""

    x: int


@asynchronous
async def test_values_of_unknown_classes_are_not_made_again_unless_allowed() -> None:
    async with Replica("a") as replica:
        with pytest.raises(UsageError, match="pickle_fallback"):
            CrdtSaver(replica, serde=JsonPlusSerializer(pickle_fallback=True))
        with pytest.raises(TypeError, match="Secret"):
            await put(CrdtSaver(replica), config(), 1, secret=Secret())
        allowed = JsonPlusSerializer(allowed_msgpack_modules=[(Known.__module__, "Known")])
        await put(CrdtSaver(replica, serde=allowed), config(), 1, known=Known(1))
        found = [
            await saver.aget_tuple(config())
            for saver in (CrdtSaver(replica), CrdtSaver(replica, serde=allowed))
        ]
        values = [each.checkpoint["channel_values"]["known"] for each in found if each is not None]
        assert values == [{"x": 1}, Known(1)]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({}, "needs a thread"),
        ({"configurable": {}}, "needs a thread"),
        ({"configurable": {"thread_id": ""}}, "a thread_id is a str"),
        ({"configurable": {"thread_id": "a\x1b[2J"}}, "a thread_id is a str"),
        ({"configurable": {"thread_id": 1.5}}, "a thread_id is a str"),
        ({"configurable": {"thread_id": "t", "checkpoint_ns": "\n"}}, "a checkpoint_ns is"),
        ({"configurable": {"thread_id": "t", "checkpoint_id": "x" * 101}}, "a checkpoint_id is"),
    ],
)
@asynchronous
async def test_what_names_no_place_is_refused(given: Any, error: str) -> None:
    async with Replica("a") as replica:
        with pytest.raises(UsageError, match=error):
            await CrdtSaver(replica).aget_tuple(given)
        assert list(replica.documents()) == []


@asynchronous
async def test_names_that_are_long_or_odd_are_kept() -> None:
    threads = ["7", "a/b c", "ü" * 500, "~x", "langgraph/t"]
    spaces = ["", "child:1", "a/b", "x" * 500, "~y"]
    async with Replica("a") as replica:
        saver = CrdtSaver(replica)
        for thread in threads:
            for space in spaces:
                await put(saver, config(thread, checkpoint_ns=space), 1, x=thread + space)
        listed = [each async for each in saver.alist(None)]

    found = {
        (each.config["configurable"]["thread_id"], each.config["configurable"]["checkpoint_ns"]):
        each.checkpoint["channel_values"]["x"] for each in listed
    }  # fmt: skip
    assert found == {(thread, space): thread + space for thread in threads for space in spaces}


# The extra

BLOCKED = """
import sys
import crdtstate
assert "langgraph" not in sys.modules
sys.modules["langgraph"] = None
import crdtstate.integrations.langgraph
"""


def test_only_who_imports_it_needs_the_extra() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)

    assert "ImportError: LangGraph is not installed; install it with" in done.stderr
    assert "pip install 'crdtstate[langgraph]'" in done.stderr


# Loops and threads


@asynchronous
async def test_blocking_methods_are_refused_on_the_loop_of_the_replica() -> None:
    async with Replica("a") as replica:
        saver = CrdtSaver(replica)
        with pytest.raises(UsageError, match="would wait for itself"):
            saver.get_tuple(config())
        assert await asyncio.to_thread(saver.get_tuple, config()) is None


def test_it_is_used_from_loops_and_threads_that_are_not_the_replicas(tmp_path: Path) -> None:
    with blocking.Replica("a", store=tmp_path / "a.db") as replica:
        saver = CrdtSaver(replica)
        asyncio.run(put(saver, config(), 1, x=1))
        asyncio.run(put(saver, config(), 2, x=2))
        found = saver.get_tuple(config())

    assert found is not None and found.checkpoint["channel_values"] == {"x": 2}
    with pytest.raises(ReplicaClosed):
        saver.get_tuple(config())


def test_it_says_how_it_is_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not str"):
        CrdtSaver("agents.db")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="inside 'async with Replica"):
        CrdtSaver(Replica("a"))
    closed = CrdtSaver.open(tmp_path / "a.db")
    with pytest.raises(ReplicaClosed, match="use it inside 'with' or 'async with'"):
        closed.get_tuple(config())
    with closed:
        assert closed.get_tuple(config()) is None
    with pytest.raises(UsageError, match="that happens once"):
        closed.__enter__()


@asynchronous
async def test_a_serializer_that_cannot_read_a_thread_does_not_pass_it_off_as_a_new_one() -> None:
    async with Replica("a") as replica:
        one, two = (
            CrdtSaver(replica, serde=EncryptedSerializer(Cipher(bytes([number]) * 32)))
            for number in (1, 2)
        )
        await noting(one).ainvoke({"who": "ann"}, config())

        found = await one.aget_tuple(config())
        assert found is not None
        assert CrdtChannel().from_checkpoint(found.checkpoint["channel_values"]["notes"]).get()
        with pytest.raises(InvalidUpdate, match="is it the one that wrote it"):
            await two.aget_tuple(config())


@asynchronous
async def test_many_large_writes_of_one_task_are_stored() -> None:
    async with Replica("a") as replica:
        saver = CrdtSaver(replica)
        at = await put(saver, config(), 1)
        writes = [(f"channel-{number}", os.urandom(3000)) for number in range(1000)]
        await saver.aput_writes(at, writes, "task")
        found = await saver.aget_tuple(config())

        assert found is not None and found.pending_writes is not None
        assert [each[1:] for each in found.pending_writes] == writes


@asynchronous
async def test_a_thread_that_is_full_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "THREAD_BYTES_MAX", 2**20)
    async with Replica("a") as replica:
        saver, at = CrdtSaver(replica), config()
        for number in range(2):
            at = await put(saver, at, number, x=os.urandom(400_000))
        with pytest.raises(UsageError, match="thread 't' holds .* bytes, and 1048576 is the limit"):
            await put(saver, at, 2, x=os.urandom(400_000))
        await saver.aprune(["t"])
        await put(saver, at, 3, x=os.urandom(400_000))


@asynchronous
async def test_a_record_that_somebody_else_spoiled_reads_as_if_there_were_none() -> None:
    async with Replica("a") as replica:
        saver = CrdtSaver(replica)
        first = await put(saver, config(), 1, x=os.urandom(500))
        document = replica.document(document_name("t"))
        second = await put(saver, first, 2, x=os.urandom(500))
        id = second["configurable"]["checkpoint_id"]

        good = document.map("c/")[id]
        for bad in (None, 1, "x", [], [1] * 10, {}, [*good[:9], {"x": ["msgpack", "nowhere"]}]):
            document.map("c/")[id] = bad
            assert await saver.aget_tuple(second) is None
            assert len([each async for each in saver.alist(config())]) == 1
        document.map("c/")[id] = good
        for key in list(document.map("p")):
            document.map("p")[key] = [0, None, b"", 0, 0, 2**40, b"(\xb5/\xfd"]
        other = CrdtSaver(replica)
        assert await other.aget_tuple(second) is None
