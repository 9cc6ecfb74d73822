"""
Checkpoints: how long it takes to make one and to have it back, and what it takes in a tier.

Made in an SQLite tier, which syncs, by an agent with keys as agents have them: small records in a
few words. The floor is the same Doc, encoded with `get_update`, compressed, hashed and written to a
file with fsync; to have it back, that file read, unpacked, hashed and applied. The time on the loop
is the longest for which nothing else had its turn. Times are by the wall clock.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zstandard
from pycrdt import Doc

from benchmarks.measure import Effort, Result, Target, at_most, new_documents
from crdtstate import Config, Replica
from crdtstate.checkpoints import Checkpoints
from crdtstate.manifest import LoadedDocument

KEYS, MANY_KEYS = 10_000, 100_000
CHANGED = 0.01
WORDS = [
    "plan draft review merge ship wait block retry fetch parse index report answer summary budget",
    "token model prompt tool search result error owner agent queue worker customer invoice ticket",
]


def checkpoints(effort: Effort) -> Sequence[Result]:
    """Milliseconds to make a full one and a small one and to load, and the share of raw bytes."""
    return asyncio.run(_checkpoints(effort))


async def _checkpoints(effort: Effort) -> list[Result]:
    few, many = effort.count(KEYS), effort.count(MANY_KEYS)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        async with Replica("agent", store=directory / "few.db") as replica:
            _fill(replica, few)
            results += await _full(replica, few, directory / "few", effort.rounds, at_most(100))
        async with Replica("agent", store=directory / "many.db") as replica:
            _fill(replica, many)
            rounds = max(1, effort.rounds // 2)
            results += await _full(replica, many, directory / "many", rounds, None)
            results += await _changed(replica, many, directory, effort.rounds)
            results += await _loading(replica, many, directory, rounds)
    return results


def _fill(replica: Replica, keys: int) -> None:
    rng = random.Random(1)
    plan = replica.map("plan")
    for number in range(keys):
        plan[f"task-{number}"] = record(rng)


def record(rng: random.Random) -> dict[str, Any]:
    words = " ".join(WORDS).split()
    return {
        "title": " ".join(rng.choices(words, k=8)),
        "owner": f"agent-{rng.randrange(10)}",
        "state": rng.choice(["open", "doing", "done"]),
        "score": round(rng.random(), 3),
        "at": 1_700_000_000 + rng.randrange(10**7),
    }


# Making


async def _full(
    replica: Replica, keys: int, directory: Path, rounds: int, target: Target | None
) -> list[Result]:
    os.mkdir(directory)
    ours: list[float] = []
    floors: list[float] = []
    blocked: list[float] = []
    size = raw = 0
    for number in range(rounds):
        made = await _opened(replica, directory / f"{number}.db")
        seconds, stall = await _timed(lambda made=made: made.create())  # type: ignore[misc]
        ours.append(seconds)
        blocked.append(stall)
        floors.append(_clocked(lambda: bare_save(replica, directory / "bare")))
        manifest = made.find(made.saved()[-1].id)
        size, raw = manifest.stored, manifest.size
        await made.release()
    note = "get_update, zstd, sha256, write, fsync"
    return [
        _milliseconds(f"make, {keys:,} keys, all of them", ours, floors, target, note),
        _milliseconds(f"make, {keys:,} keys, longest on the loop", blocked),
        Result(
            f"size, {keys:,} keys, of raw",
            "of 1",
            size / raw,
            None,
            at_most(0.6),
            f"{size / 1024:,.0f} KB of {raw / 1024:,.0f} KB",
        ),
    ]


async def _changed(replica: Replica, keys: int, directory: Path, rounds: int) -> list[Result]:
    made = await _opened(replica, directory / "changed.db")
    await made.create()
    rng = random.Random(2)
    plan = replica.map("plan")
    ours: list[float] = []
    floors: list[float] = []
    blocked: list[float] = []
    for _ in range(rounds):
        before = replica.document("main").lanes._doc.get_state()
        for _ in range(10):
            for _ in range(max(1, int(keys * CHANGED / 10))):
                plan[f"task-{rng.randrange(keys)}"] = record(rng)
            await replica.durable()
        seconds, stall = await _timed(made.create)
        ours.append(seconds)
        blocked.append(stall)
        floors.append(
            _clocked(lambda before=before: bare_save(replica, directory / "bare", before))
        )
    await made.release()
    note = "get_update of what changed, zstd, sha256, write, fsync"
    name = f"make, {keys:,} keys, 1 % changed"
    return [
        _milliseconds(name, ours, floors, at_most(100), note),
        _milliseconds(f"{name}, longest on the loop", blocked),
    ]


# Loading


async def _loading(replica: Replica, keys: int, directory: Path, rounds: int) -> list[Result]:
    made = await _opened(replica, directory / "loading.db")
    checkpoint = await made.create()
    bare_save(replica, directory / "bare")
    loads: list[float] = []
    joins: list[float] = []
    floors: list[float] = []
    bare: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        loaded = await made.load(checkpoint.id)
        loads.append(time.perf_counter() - started)
        joins.append(loads[-1] + _clocked(lambda loaded=loaded: _join(loaded, keys)))  # type: ignore[misc]
        bare.append(_clocked(lambda: bare_load(directory / "bare")))
        floors.append(_clocked(lambda: Doc().apply_update(bare_load(directory / "bare"))))
    await made.release()
    return [
        _milliseconds(f"load, {keys:,} keys", loads, bare, at_most(500), "read, unpack, sha256"),
        _milliseconds(
            f"load and join, {keys:,} keys", joins, floors, at_most(500), "the same, apply_update"
        ),
    ]


def _join(loaded: Sequence[LoadedDocument], keys: int) -> None:
    documents = new_documents(9)
    for name, _, _, snapshot, changes in loaded:
        documents.load_snapshot(name, snapshot)
        for change in changes:
            documents.load_change(name, change)
    assert len(documents.map("plan")) == keys


# The floor


def bare_save(replica: Replica, path: Path, state: bytes | None = None) -> None:
    doc: Doc[Any] = replica.document("main").lanes._doc
    plain = doc.get_update() if state is None else doc.get_update(state)
    packed = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(plain)
    with open(path, "wb") as file:
        file.write(hashlib.sha256(plain).digest() + packed)
        file.flush()
        os.fsync(file.fileno())


def bare_load(path: Path) -> bytes:
    data = path.read_bytes()
    plain: bytes = zstandard.ZstdDecompressor().decompress(data[32:])
    assert hashlib.sha256(plain).digest() == data[:32]
    return plain


# What several need


async def _opened(replica: Replica, path: Path) -> Checkpoints:
    """Checkpoints of a replica in a new file, beside its own."""
    made = Checkpoints("agent", [f"sqlite:///{path}"], Config(), lambda event: None)
    cutter = replica._checkpoints._cutter
    assert cutter is not None
    await made.open(cutter, replica._spawn, lambda checkpoint: None, 0)
    await made.settled()
    return made


async def _timed(work: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """The seconds that *work* takes, and the longest for which the loop did nothing else."""
    gc.collect()
    with _stalls() as longest:
        await asyncio.sleep(0)
        started = time.perf_counter()
        await work()
        return time.perf_counter() - started, longest()


@contextmanager
def _stalls() -> Iterator[Callable[[], float]]:
    loop = asyncio.get_running_loop()
    last, longest = time.perf_counter(), 0.0

    def tick() -> None:
        nonlocal last, longest, handle
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        # Not at once: the loop would only spin, and take the threads' turns.
        handle = loop.call_later(0.0005, tick)

    handle = loop.call_soon(tick)
    yield lambda: longest
    handle.cancel()


def _clocked(work: Callable[[], object]) -> float:
    gc.collect()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _milliseconds(
    name: str,
    ours: Sequence[float],
    floor: Sequence[float] | None = None,
    target: Target | None = None,
    note: str = "",
) -> Result:
    low = None if floor is None else 1000 * statistics.median(floor)
    return Result(name, "ms", 1000 * statistics.median(ours), low, target, note)
