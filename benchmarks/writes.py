"""
Local writes: from ``plan["key"] = value`` to a change that is sealed, and on to one that is saved.

The floor is a bare pycrdt map, whose Doc is observed for the update's bytes, as it must be to send
them anywhere. Values are small ints under a thousand keys.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import apsw
from pycrdt import Doc
from pycrdt import Map as YMap

from benchmarks.measure import Effort, Result, at_least, by_turns, cpu, new_documents, rate
from crdtstate import Replica
from crdtstate.stores import Entry
from crdtstate.stores.journal import Journal

KEYS = [f"key-{number}" for number in range(1000)]
ROW_BYTES = 130
"""What a change of one small write takes."""

WRITER = 2**52

JOURNALED_TARGET = 40_000


def writes(effort: Effort) -> list[Result]:
    """Local writes per second, in memory and into a journal."""
    with tempfile.TemporaryDirectory() as directory:
        files = _Files(Path(directory))
        return [
            *_in_memory(effort),
            *_journaled(effort, files),
            *_through_a_replica(effort, files),
            *_appends(effort, files),
        ]


class _Files:
    """Names of new files in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0

    def new(self) -> Path:
        self._count += 1
        return self._directory / f"{self._count}.db"


def _in_memory(effort: Effort) -> list[Result]:
    count = effort.count(20_000)
    together = by_turns(effort.rounds, lambda: _coalesced(count), lambda: _bare(count, count))
    single = by_turns(effort.rounds, lambda: _sealed(count), lambda: _bare(count, 1))
    return [
        rate("map writes, coalesced", count, together, note="pycrdt, one transaction"),
        rate("map writes, one change each", count, single, note="pycrdt, a transaction each"),
    ]


def _coalesced(count: int) -> float:
    documents = new_documents()

    def write() -> None:
        plan = documents.map("plan")
        for number in range(count):
            plan[KEYS[number % 1000]] = number
        documents.take_sealed()

    return cpu(write)


def _sealed(count: int) -> float:
    documents = new_documents()

    def write() -> None:
        plan = documents.map("plan")
        for number in range(count):
            plan[KEYS[number % 1000]] = number
            documents.take_sealed()

    return cpu(write)


def _bare(count: int, per_transaction: int, save: Callable[[bytes], None] | None = None) -> float:
    doc: Doc[Any] = Doc()
    plan = doc.get("plan", type=YMap)
    updates: list[bytes] = []
    subscription = doc.observe(lambda event: updates.append(event.update))

    def write() -> None:
        for start in range(0, count, per_transaction):
            with doc.transaction():
                for number in range(start, min(start + per_transaction, count)):
                    plan[KEYS[number % 1000]] = number
            if save is not None:
                save(updates[-1])

    taken = cpu(write)
    doc.unobserve(subscription)
    return taken


# With a journal


def _journaled(effort: Effort, files: _Files) -> list[Result]:
    count = effort.count(20_000)
    results = []
    for batch, name in ((1, "a commit each"), (100, "100 changes a commit")):
        taken = by_turns(
            effort.rounds,
            partial(_saved, count, batch, files),
            partial(_bare_saved, count, batch, files),
        )
        note = "pycrdt, a transaction each, and rows in bare apsw"
        # A commit of its own for each change is what a writer gets that awaits `durable` each
        # time; the pump commits together what is sealed in one turn of the loop.
        target = at_least(JOURNALED_TARGET) if batch > 1 else None
        results.append(rate(f"one change each, journaled, {name}", count, taken, target, note))
    return results


def _saved(count: int, batch: int, files: _Files) -> float:
    documents = new_documents()
    journal = Journal(files.new())
    journal.start("agent", WRITER, lambda: None)

    def write() -> None:
        plan = documents.map("plan")
        entries: list[Entry] = []
        for number in range(count):
            plan[KEYS[number % 1000]] = number
            for change, _ in documents.take_sealed():
                entries.append(Entry(change.document, change.writer, change.seq, change.data))
            if len(entries) == batch:
                journal.append(entries)
                entries = []
        journal.append(entries)

    taken = cpu(write)
    journal.close()
    return taken


def _bare_saved(count: int, batch: int, files: _Files) -> float:
    database = _BareDatabase(files.new())
    rows: list[bytes] = []

    def save(update: bytes) -> None:
        rows.append(update)
        if len(rows) == batch:
            database.append(rows)
            rows.clear()

    taken = _bare(count, 1, save)
    database.close()
    return taken


class _BareDatabase:
    """The least that saves rows: one table, WAL, and no checksums."""

    def __init__(self, path: Path) -> None:
        self._db = apsw.Connection(str(path))
        self._db.pragma("journal_mode", "WAL")
        self._db.pragma("synchronous", "NORMAL")
        self._db.execute("CREATE TABLE journal(id INTEGER PRIMARY KEY, data BLOB NOT NULL) STRICT")

    def append(self, rows: Sequence[bytes]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("INSERT INTO journal(data) VALUES(?)", ((row,) for row in rows))
        self._db.execute("COMMIT")

    def close(self) -> None:
        self._db.close()


def _appends(effort: Effort, files: _Files) -> list[Result]:
    results = []
    for batch, commits in ((1, effort.count(5000)), (100, effort.count(500))):
        taken = by_turns(
            effort.rounds,
            partial(_append, commits, batch, files),
            partial(_bare_append, commits, batch, files),
        )
        name = f"journal appends of {batch} row{'s' * (batch > 1)}"
        results.append(rate(name, commits, taken, note="a commit in bare apsw, no checksums"))
    return results


def _append(commits: int, batch: int, files: _Files) -> float:
    journal = Journal(files.new())
    journal.start("agent", WRITER, lambda: None)
    data = bytes(ROW_BYTES)
    batches = [
        [Entry("main", WRITER, commit * batch + place + 1, data) for place in range(batch)]
        for commit in range(commits)
    ]

    def write() -> None:
        for entries in batches:
            journal.append(entries)

    taken = cpu(write)
    journal.close()
    return taken


def _bare_append(commits: int, batch: int, files: _Files) -> float:
    database = _BareDatabase(files.new())
    rows = [bytes(ROW_BYTES)] * batch

    def write() -> None:
        for _ in range(commits):
            database.append(rows)

    taken = cpu(write)
    database.close()
    return taken


# Through a replica


def _through_a_replica(effort: Effort, files: _Files) -> list[Result]:
    count = effort.count(20_000)
    note = "as above, 1 and 100 to a commit"
    plain = by_turns(
        effort.rounds,
        lambda: asyncio.run(_plain(count, files.new())),
        lambda: _bare_saved(count, 100, files),
    )
    turns = by_turns(
        effort.rounds,
        lambda: asyncio.run(_turns(count, files.new())),
        lambda: _bare_saved(count, 1, files),
    )
    transactions = by_turns(
        effort.rounds,
        lambda: asyncio.run(_transactions(count, files.new())),
        lambda: _bare_saved(count, 100, files),
    )
    return [
        rate("Replica, 1,000 writes a turn", count, plain, at_least(JOURNALED_TARGET), note),
        rate("Replica, a write each turn of the loop", count, turns, note=note),
        rate("Replica, 100 transactions a turn", count, transactions, note=note),
    ]


async def _turns(count: int, path: Path) -> float:
    async with Replica("agent", store=path) as replica:
        plan = replica.map("plan")
        before = time.process_time()
        for number in range(count):
            plan[KEYS[number % 1000]] = number
            await asyncio.sleep(0)
        await replica.durable()
        return time.process_time() - before


async def _plain(count: int, path: Path) -> float:
    async with Replica("agent", store=path) as replica:
        plan = replica.map("plan")
        before = time.process_time()
        for number in range(count):
            plan[KEYS[number % 1000]] = number
            if number % 1000 == 999:
                await asyncio.sleep(0)
        await replica.durable()
        return time.process_time() - before


async def _transactions(count: int, path: Path) -> float:
    async with Replica("agent", store=path) as replica:
        plan = replica.map("plan")
        before = time.process_time()
        for number in range(count):
            with replica.transaction():
                plan[KEYS[number % 1000]] = number
            if number % 100 == 99:
                await asyncio.sleep(0)
        await replica.durable()
        return time.process_time() - before
