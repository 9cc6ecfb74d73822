"""
The LangGraph checkpointer beside LangGraph's own one on SQLite, by turns in one run.

A put is measured for a conversation that grows by a message, and for a value that is all new; by
the wall clock, as both wait for a thread of the database. The floor is `AsyncSqliteSaver` on a file
of its own, which also waits for the disk at each put; ours is written out within 0.1 s, and both
survive a kill of the process. The size is that of the files after turns of two messages of 500
characters, each with three checkpoints.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from benchmarks.measure import Effort, Result, ratio_at_most

SIZES = {"1 KB": 1000, "64 KB": 64_000, "1 MB": 1_000_000}
PUTS = 40
ROUNDS_MAX = 3
TURNS = 300
MESSAGE = 500


def langgraph(effort: Effort) -> Sequence[Result]:
    """Microseconds of a put and a get, median, and megabytes."""
    found = []
    for label, size in SIZES.items():
        for what in ("grows by a message", "is all new"):
            found += asyncio.run(_compare(effort, f"{label} that {what}", size, what))
    sizes = asyncio.run(_sizes(effort))
    turns = effort.count(TURNS, 3)
    found.append(Result(f"{turns} turns: size", "MB", *sizes, ratio_at_most(1), "AsyncSqliteSaver"))
    return found


def _savers(folder: str) -> dict[str, AbstractAsyncContextManager[Any]]:
    # The extra is needed for this benchmark only, and takes a second to import.
    from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

    from crdtstate.integrations.langgraph import CrdtSaver

    return {
        "ours": CrdtSaver.open(Path(folder) / "ours" / "a.db"),
        "floor": AsyncSqliteSaver.from_conn_string(f"{folder}/floor/a.db"),
    }


async def _compare(effort: Effort, name: str, size: int, what: str) -> list[Result]:
    times: dict[str, list[list[float]]] = {"ours": [[], []], "floor": [[], []]}
    for _ in range(min(effort.rounds, ROUNDS_MAX)):
        with tempfile.TemporaryDirectory() as folder:
            for kind, opening in _savers(_prepare(folder)).items():
                async with opening as saver:
                    puts, gets = await _put_and_get(saver, effort.count(PUTS, 3), size, what)
                times[kind][0].append(puts)
                times[kind][1].append(gets)
    note = "AsyncSqliteSaver"
    found = []
    for at, verb in enumerate(("put", "get")):
        ours, floor = (1e6 * statistics.median(times[kind][at]) for kind in ("ours", "floor"))
        # A value that is all new has to be written whole by either.
        target = None if verb == "put" and what == "is all new" else ratio_at_most(1)
        found.append(Result(f"{name}: {verb}", "us", ours, floor, target, note))
    return found


async def _put_and_get(saver: Any, count: int, size: int, what: str) -> tuple[float, float]:
    """The median seconds of a put and of the get of the latest after it."""
    rng = random.Random(size)
    place: dict[str, Any] = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    latest, messages = place, [_text(rng, MESSAGE) for _ in range(size // MESSAGE)]
    puts, gets = [], []
    for number in range(1, count + 1):
        if what == "is all new":
            value: Any = _text(rng, size)
        else:
            value = messages = [*messages, _text(rng, MESSAGE)]
        made = _checkpoint(number, value)
        told = {"source": "loop", "step": number}
        before = time.perf_counter()
        latest = await saver.aput(latest, made, told, {"messages": number})
        puts.append(time.perf_counter() - before)
        before = time.perf_counter()
        found = await saver.aget_tuple(place)
        gets.append(time.perf_counter() - before)
        assert found.checkpoint["channel_values"] == {"messages": value}
    return statistics.median(puts), statistics.median(gets)


async def _sizes(effort: Effort) -> tuple[float, float]:
    """The megabytes of both after a conversation."""
    from langgraph.graph import START, StateGraph
    from langgraph.graph.message import MessagesState

    rng = random.Random(1)
    builder = StateGraph(MessagesState)
    builder.add_node("answer", lambda state: {"messages": [("ai", _text(rng, MESSAGE))]})
    builder.add_edge(START, "answer")
    config: Any = {"configurable": {"thread_id": "t"}}
    with tempfile.TemporaryDirectory() as folder:
        for opening in _savers(_prepare(folder)).values():
            async with opening as saver:
                graph = builder.compile(checkpointer=saver)
                for _ in range(effort.count(TURNS, 3)):
                    await graph.ainvoke({"messages": [("user", _text(rng, MESSAGE))]}, config)
        ours, floor = (_megabytes(Path(folder) / kind) for kind in ("ours", "floor"))
    return ours, floor


def _prepare(folder: str) -> str:
    for kind in ("ours", "floor"):
        (Path(folder) / kind).mkdir()
    return folder


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


def _text(rng: random.Random, size: int) -> str:
    # Half of which is redundant, as in a text.
    return rng.randbytes(size // 2).hex()


def _checkpoint(number: int, value: Any) -> Any:
    from langgraph.checkpoint.base import empty_checkpoint
    from langgraph.checkpoint.base.id import uuid6

    return {
        **empty_checkpoint(),
        "id": str(uuid6(clock_seq=number)),
        "channel_values": {"messages": value},
        "channel_versions": {"messages": number},
        "versions_seen": {"answer": {"messages": number - 1}},
    }
