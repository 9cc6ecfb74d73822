"""The session of the OpenAI Agents SDK: its contract, real runs, and several writers at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, RunConfig, Runner, SQLiteSession, set_tracing_disabled
from agents.memory import Session, SessionSettings
from agents.testing import ScriptedModel
from harness import asynchronous
from openai.types.responses import ResponseOutputMessage, ResponseOutputText

from crdtstate import Replica, UnsupportedValue
from crdtstate.integrations.entries import PIECE_CHARS
from crdtstate.integrations.openai_session import DOCUMENT, CrdtSession

LONG = 30.0

set_tracing_disabled(True)


def said(text: str, role: str = "user") -> Any:
    return {"role": role, "content": text}


def contents(items: list[Any]) -> list[str]:
    return [item["content"] for item in items]


def answer(text: str) -> Any:
    content = ResponseOutputText(text=text, type="output_text", annotations=[], logprobs=[])
    return ResponseOutputMessage(
        id="1", type="message", role="assistant", content=[content], status="completed"
    )


@asynccontextmanager
async def session(*texts: str, **options: Any) -> AsyncIterator[CrdtSession]:
    """A session in which these were said."""
    async with Replica("ann") as replica:
        found = CrdtSession("talk", replica, **options)
        await found.add_items([said(text) for text in texts])
        yield found


@asynchronous
async def test_it_is_a_session_by_the_sdks_own_protocol() -> None:
    async with session() as talk:
        assert isinstance(talk, Session)
        assert (talk.session_id, talk.session_settings) == ("talk", None)


@asynchronous
async def test_items_come_back_as_they_were_added_and_in_that_order() -> None:
    items = [
        said("O'Reilly'); DROP TABLE sessions;--"),
        said("こんにちは 😊 \ud83d half"),
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": [1.5, null]}'},
        {"type": "x", "nested": {"deep": [True, 2**60, -0.5, ""]}},
    ]
    async with session() as talk:
        await talk.add_items(items[:1])
        await talk.add_items(items[1:])

        assert await talk.get_items() == items


@asynchronous
async def test_a_limit_takes_the_newest() -> None:
    async with session("a", "b", "c", "d") as talk:
        assert contents(await talk.get_items(limit=2)) == ["c", "d"]
        assert len(await talk.get_items(limit=10)) == 4
        assert await talk.get_items(limit=0) == []


@asynchronous
async def test_the_settings_limit_what_is_read_unless_the_caller_does() -> None:
    async with session("a", "b", "c", "d", session_settings=SessionSettings(limit=3)) as talk:
        assert contents(await talk.get_items()) == ["b", "c", "d"]
        assert contents(await talk.get_items(limit=1)) == ["d"]


@asynchronous
async def test_pop_takes_the_newest_until_nothing_is_left() -> None:
    async with session("a", "b") as talk:
        assert await talk.pop_item() == said("b")
        assert await talk.get_items() == [said("a")]
        assert await talk.pop_item() == said("a")
        assert await talk.pop_item() is None


@asynchronous
async def test_sessions_of_one_replica_have_nothing_in_common() -> None:
    async with session("a") as talk, Replica("bob") as replica:
        other = CrdtSession("other", replica)
        await other.add_items([said("b")])
        await other.clear_session()

        assert await other.get_items() == []
        assert contents(await talk.get_items()) == ["a"]


@asynchronous
async def test_what_is_no_item_is_passed_over_and_goes_when_it_is_popped() -> None:
    async with session("a", "b") as talk:
        log = talk._entries._replica.document(DOCUMENT).map("log/talk")
        for number, text in enumerate(("not JSON {{{", "[" * 5000, 7, None)):
            log[f"ff{number}"] = text

        assert contents(await talk.get_items(limit=1)) == ["b"]
        assert await talk.pop_item() == said("b")
        assert len(log) == 1


@asynchronous
async def test_an_item_that_cannot_be_added_leaves_all_out() -> None:
    async with session() as talk:
        with pytest.raises(UnsupportedValue, match="entry 1"):
            await talk.add_items([said("a"), {"content": object()}])  # type: ignore[list-item]

        assert await talk.get_items() == []


@asynchronous
async def test_an_item_longer_than_a_value_is_kept_in_pieces_and_goes_whole() -> None:
    picture = said("x" * (3 * PIECE_CHARS + 7))
    async with session() as talk:
        await talk.add_items([picture, said("after")])
        assert await talk.get_items() == [picture, said("after")]

        await talk.clear_session()
        assert not list(talk._entries._replica.document(DOCUMENT).map("pieces/talk"))


@pytest.mark.parametrize("streamed", [False, True])
@asynchronous
async def test_a_run_goes_on_where_the_last_one_ended(streamed: bool) -> None:
    async with session() as talk:
        model = ScriptedModel()
        for question, reply in (("Which city?", "Paris"), ("Which country?", "France")):
            model.enqueue([answer(reply)])
            if streamed:
                running = Runner.run_streamed(Agent("a", model=model), question, session=talk)
                async for _ in running.stream_events():
                    pass
                assert running.final_output == reply
            else:
                result = await Runner.run(Agent("a", model=model), question, session=talk)
                assert result.final_output == reply

        asked: Any = model.calls[-1].input
        assert [item.get("role") for item in asked] == ["user", "assistant", "user"]
        assert len(await talk.get_items()) == 4


@asynchronous
async def test_a_run_may_limit_what_it_reads() -> None:
    async with session(*"abcdef") as talk:
        model = ScriptedModel()
        model.enqueue([answer("yes")])
        config = RunConfig(session_settings=SessionSettings(limit=2))
        await Runner.run(Agent("a", model=model), "new", session=talk, run_config=config)

        assert contents(model.calls[-1].input) == ["e", "f", "new"]  # type: ignore[arg-type]


@asynchronous
async def test_a_run_may_choose_what_of_the_history_it_sends_and_adds_only_what_is_new() -> None:
    def repeat_first(history: list[Any], new: list[Any]) -> list[Any]:
        return [*history, *history[:1], *new]

    async with session() as talk:
        model = ScriptedModel()
        for turn in range(3):
            model.enqueue([answer(f"reply {turn}")])
            config = RunConfig(session_input_callback=repeat_first)
            agent = Agent("a", model=model)
            await Runner.run(agent, f"question {turn}", session=talk, run_config=config)

        assert len(model.calls[-1].input) == 6
        stored: list[Any] = await talk.get_items()
        asked = [item["content"] for item in stored if item["role"] == "user"]
        assert asked == [f"question {turn}" for turn in range(3)]
        assert len(stored) == 6


@asynchronous
async def test_what_several_write_at_once_all_stays_in_one_causal_order(tmp_path: Path) -> None:
    path = tmp_path / "talk.db"
    names = "abcde"
    async with asyncio.TaskGroup() as group, CrdtSession.open(path, "talk", name="reader") as last:

        async def write(name: str) -> None:
            async with CrdtSession.open(path, "talk", name=name) as talk:
                for number in range(10):
                    await talk.add_items([said(f"{name} {number}"), said(f"{name} {number} re")])

        await asyncio.gather(*(group.create_task(write(name)) for name in names))
        await last._entries._replica.synced(timeout=LONG)
        found = contents(await last.get_items())

    assert sorted(found) == sorted(
        f"{n} {i}{end}" for n in names for i in range(10) for end in ("", " re")
    )
    for name in names:
        own = [text for text in found if text.startswith(name)]
        assert own == [f"{name} {i}{end}" for i in range(10) for end in ("", " re")]
    # Those that were added together are together.
    assert all(
        second == f"{first} re" for first, second in zip(found[::2], found[1::2], strict=True)
    )
    async with CrdtSession.open(path, "talk") as again:
        assert contents(await again.get_items()) == found


@asynchronous
async def test_an_answer_comes_after_its_question_whatever_the_clocks_say() -> None:
    async with Replica("ann", listen="ws://127.0.0.1:0") as ann:
        # A clock that is days ahead, which nobody follows.
        ann._wall = lambda: int(time.time() * 1000) + 300_000_000
        async with Replica("bob", peers=[ann.address or ""]) as bob:
            question, reply = CrdtSession("talk", ann), CrdtSession("talk", bob)
            await question.add_items([said("question")])
            await bob.wait_for(ann.version(), timeout=LONG)
            await reply.add_items([said("answer")])
            await ann.wait_for(bob.version(), timeout=LONG)

            for each in (question, reply):
                assert contents(await each.get_items()) == ["question", "answer"]
                assert contents(await each.get_items(limit=1)) == ["answer"]


@asynchronous
async def test_a_long_session_is_as_quick_to_add_to_as_the_sdks_own(tmp_path: Path) -> None:
    history = [said(f"message {number} {'x' * 200}") for number in range(10_000)]
    own = SQLiteSession("talk", tmp_path / "own.db")
    await own.add_items(history)
    async with session() as talk:
        await talk.add_items(history)
        took = {"own": 9.9, "talk": 9.9}
        for _ in range(20):
            for name, each in (("own", own), ("talk", talk)):
                start = time.perf_counter()
                await each.add_items([said("new")])
                await each.get_items(limit=20)
                took[name] = min(took[name], time.perf_counter() - start)
    own.close()
    print(took)

    assert took["talk"] < 3 * took["own"]


@asynchronous
async def test_a_name_that_cannot_be_is_refused() -> None:
    async with Replica("ann") as replica:
        with pytest.raises(UnsupportedValue):
            CrdtSession("new\nline", replica)
