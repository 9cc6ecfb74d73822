"""
Reads: they never leave Python, so the floor is a dict of packed values and msgpack.
"""

from __future__ import annotations

from typing import Any

import msgpack

from benchmarks.measure import Effort, Result, Target, at_most, by_turns, cpu, new_documents
from crdtstate.change import decode_change
from crdtstate.documents import DocumentSet

READ_TARGET_US = 2.0
TASK = {"goal": "ship it", "step": 3, "tags": ["red", "green"]}


def reads(effort: Effort) -> list[Result]:
    """Microseconds for a read of a map, a counter, a whole map."""
    return [
        _map_read(effort, "map read of a str", "ready to ship it"),
        _map_read(effort, "map read of a small dict", TASK),
        _counter_read(effort, 1),
        _counter_read(effort, 10),
        _iteration(effort),
    ]


def _map_read(effort: Effort, name: str, value: Any) -> Result:
    count = effort.count(100_000)
    documents = new_documents()
    plan = documents.map("plan")
    keys = [f"key-{number}" for number in range(1000)]
    plan.update(dict.fromkeys(keys, value))
    documents.take_sealed()
    bare = dict.fromkeys(keys, msgpack.packb(value))
    unpack = msgpack.unpackb
    wanted = [keys[number % 1000] for number in range(count)]

    def ours() -> None:
        for key in wanted:
            plan[key]

    def floor() -> None:
        for key in wanted:
            unpack(bare[key])

    taken = by_turns(effort.rounds, lambda: cpu(ours), lambda: cpu(floor))
    return _each(name, count, taken, at_most(READ_TARGET_US), "dict lookup and unpackb")


def _counter_read(effort: Effort, lanes: int) -> Result:
    count = effort.count(50_000)
    counter = _counted(lanes).counter("tokens")
    bare = {writer: msgpack.packb([120, 3]) for writer in range(lanes)}
    unpack = msgpack.unpackb

    def ours() -> None:
        for _ in range(count):
            _ = counter.value

    def floor() -> None:
        for _ in range(count):
            total = 0
            for packed in bare.values():
                up, down = unpack(packed)
                total += up - down

    assert counter.value == 117 * lanes
    taken = by_turns(effort.rounds, lambda: cpu(ours), lambda: cpu(floor))
    name = f"counter read, {lanes} lane{'s' * (lanes > 1)}"
    return _each(name, count, taken, note="unpackb of each lane, summed up")


def _counted(lanes: int) -> DocumentSet:
    """Documents in which so many writers have counted."""
    reader = new_documents()
    for number in range(1, lanes + 1):
        documents = new_documents(number)
        documents.counter("tokens").increment(120)
        documents.counter("tokens").decrement(3)
        for change, _ in documents.take_sealed():
            reader.document("main").apply(decode_change(change.data))
    return reader


def _iteration(effort: Effort) -> Result:
    size = effort.count(10_000)
    documents = new_documents()
    plan = documents.map("plan")
    plan.update({f"key-{number}": number for number in range(size)})
    documents.take_sealed()
    bare = {f"key-{number}": msgpack.packb(number) for number in range(size)}

    def ours() -> None:
        for _ in plan.items():
            pass

    def floor() -> None:
        for key, packed in bare.items():
            _ = key, msgpack.unpackb(packed)

    taken = by_turns(effort.rounds, lambda: cpu(ours), lambda: cpu(floor))
    return _each(f"item of a map of {size:,}, iterated", size, taken, note="dict and unpackb")


def _each(
    name: str, count: int, seconds: list[float], target: Target | None = None, note: str = ""
) -> Result:
    ours, floor = (taken / count * 1e6 for taken in seconds)
    return Result(name, "us", ours, floor, target, note)
