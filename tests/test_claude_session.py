"""The session store of the Claude Agent SDK: its own conformance suite, and several writers."""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from claude_agent_sdk import (
    fold_session_summary,
    list_sessions_from_store,
    project_key_for_directory,
)
from claude_agent_sdk.testing import run_session_store_conformance
from claude_agent_sdk.types import SessionStore
from harness import Agent, asynchronous, exchange
from hypothesis import given, settings
from hypothesis import strategies as st

from crdtstate import Replica, UsageError
from crdtstate.integrations.claude_session import DOCUMENT, CrdtSessionStore

KEY: Any = {"project_key": "proj", "session_id": "sess"}
SUB: Any = {**KEY, "subpath": "subagents/agent-1"}
LONG = 30.0


def entry(name: str, **fields: Any) -> Any:
    return {"type": "user", "uuid": name, **fields}


def title(text: str) -> Any:
    return {"type": "custom-title", "customTitle": text}


@asynchronous
async def test_it_keeps_all_contracts_of_the_sdk_and_skips_none() -> None:
    methods = ["list_sessions", "list_session_summaries", "delete", "list_subkeys"]
    assert all(getattr(CrdtSessionStore, m) is not getattr(SessionStore, m) for m in methods)
    made = 0
    async with Replica("ann") as replica:

        def make() -> CrdtSessionStore:
            nonlocal made
            made += 1
            return CrdtSessionStore(replica, document=f"sessions-{made}")

        await run_session_store_conformance(make)

    # One for each contract, and one to look at which methods there are.
    assert made == 15


@asynchronous
async def test_a_file_keeps_them_too(tmp_path: Path) -> None:
    async with CrdtSessionStore.open(tmp_path / "s.db") as store:
        await store.append(KEY, [entry("a", text="lone \ud83d half", big="x" * 2_000_000)])
        await store.append(SUB, [entry("b")])
        before = await store.load(KEY), await store.list_session_summaries("proj")
    async with Replica("reader", store=tmp_path / "s.db") as replica:
        again = CrdtSessionStore(replica)

        assert (await again.load(KEY), await again.list_session_summaries("proj")) == before
        assert await again.list_subkeys(KEY) == ["subagents/agent-1"]


@asynchronous
async def test_what_has_a_uuid_is_appended_once() -> None:
    async with Replica("ann") as replica:
        store = CrdtSessionStore(replica)
        await store.append(KEY, [entry("a"), entry("b"), entry("a")])
        await store.append(KEY, [entry("b"), title("x"), title("x")])

        assert await store.load(KEY) == [entry("a"), entry("b"), title("x"), title("x")]

        await store.delete(KEY)
        await store.append(KEY, [entry("a")])
        assert await store.load(KEY) == [entry("a")]


@asynchronous
async def test_writers_at_once_lose_nothing_and_agree_on_the_summary(tmp_path: Path) -> None:
    path, names = tmp_path / "s.db", "abcd"
    everybody = asyncio.Barrier(len(names))

    async def write(name: str) -> Any:
        async with CrdtSessionStore.open(path, name=name) as store:
            for number in range(10):
                # All append the shared one, as who tries again does.
                shared = entry(f"shared {number}", timestamp="2024-01-01T00:00:00Z")
                await store.append(KEY, [shared, title(f"{name} {number}")])
            await everybody.wait()
            await store._replica.synced(timeout=LONG)
            await everybody.wait()
            found = await store.load(KEY), await store.list_session_summaries("proj")
            await everybody.wait()
            return found

    found = await asyncio.gather(*(write(name) for name in names))

    loaded, (summary,) = found[0]
    assert all(each == found[0] for each in found)
    assert len([e for e in loaded if "uuid" in e]) == 10
    for name in names:
        own = [e["customTitle"] for e in loaded if e.get("customTitle", "").startswith(name)]
        assert own == [f"{name} {number}" for number in range(10)]
    assert summary["data"] == fold_session_summary(None, KEY, loaded)["data"]
    async with CrdtSessionStore.open(path) as store:
        (listed,) = await store.list_sessions("proj")
        assert listed == {"session_id": "sess", "mtime": summary["mtime"]}


class Peer(Agent):
    """One of two who meet by hand."""

    @property
    def writer(self) -> int:
        return self._writer


STEPS = st.tuples(st.integers(0, 1), st.sampled_from(["title", "prompt", "same", "meet", "delete"]))


@settings(max_examples=100, deadline=None)
@given(st.lists(STEPS, max_size=15))
def test_a_summary_is_what_the_sdk_folds_from_all_entries_in_order(
    steps: list[tuple[int, str]],
) -> None:
    """Two who write at once, meet now and then, and delete what they see."""
    agents: Any = Peer(1), Peer(2)
    stores = [CrdtSessionStore(agent, saved=at_once) for agent in agents]

    async def play() -> None:
        for number, (who, what) in enumerate([*steps, (0, "meet")]):
            store = stores[who]
            match what:
                case "title":
                    await store.append(KEY, [title(str(number))])
                case "prompt":
                    message = {"content": f"prompt {number}"}
                    await store.append(KEY, [entry(str(number), message=message)])
                case "same":
                    name = str(number % 3)
                    await store.append(KEY, [entry(name, customTitle=name)])
                case "delete":
                    await store.delete(KEY)
                case "meet":
                    exchange(*agents)
            for store in stores:
                loaded = await store.load(KEY)
                found = await store.list_session_summaries("proj")
                expected = fold_session_summary(None, KEY, loaded or [])["data"]
                assert [each["data"] for each in found if each["data"]] == [expected] * bool(loaded)
        assert await stores[0].load(KEY) == await stores[1].load(KEY)

    asyncio.run(play())


async def at_once() -> None:
    """Nothing has to be saved."""


@asynchronous
async def test_the_sdk_lists_sessions_from_it(tmp_path: Path) -> None:
    session_id = str(uuid.uuid4())
    async with Replica("ann") as replica:
        store = CrdtSessionStore(replica)
        key: Any = {"project_key": project_key_for_directory(tmp_path), "session_id": session_id}
        await store.append(key, [entry("a", message={"content": "fix the bug"})])

        (found,) = await list_sessions_from_store(store, directory=str(tmp_path))
        assert (found.session_id, found.summary) == (session_id, "fix the bug")


@asynchronous
async def test_what_others_wrote_there_that_is_none_of_it_is_passed_over() -> None:
    async with Replica("ann") as replica:
        store = CrdtSessionStore(replica)
        await store.append(KEY, [title("good")])
        document = replica.document(DOCUMENT)
        (project,) = [c[1:] for c in document.lanes.containers if c.startswith("sproject/")]
        (marks,) = [c[1:] for c in document.lanes.containers if c.startswith("mmarks/")]
        document.set(project).update([7, "x", "[]", '["a", 1]', "[" * 700])
        mark = json.dumps([1, "f" * 36, 1, "", 0, {"custom_title": "forged"}])
        document.map(marks).update({"1": 7, "2": "{", "3": "[]", "4": mark})

        (summary,) = await store.list_session_summaries("proj")
        assert summary["data"]["custom_title"] == "good"


@pytest.mark.parametrize("key", [{**KEY, "subpath": ""}, {**KEY, "session_id": 7}])
@asynchronous
async def test_a_key_that_cannot_be_is_refused(key: Any) -> None:
    async with Replica("ann") as replica:
        with pytest.raises(UsageError, match="not empty"):
            await CrdtSessionStore(replica).append(key, [entry("a")])
