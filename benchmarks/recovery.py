"""
Recovery: how long it takes until an agent that was started again has its documents back.

A journal's tail is replayed change by change, each checked as if a peer had sent it; a snapshot is
loaded at once. The floor reads the same rows with bare apsw and applies the same updates to a bare
Doc. With the default settings a tail never grows beyond the larger of 4 MiB and the snapshot.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
from pycrdt import Doc
from pycrdt import Map as YMap

from benchmarks.measure import Effort, Result, Target, at_most, by_turns, cpu, new_documents
from crdtstate import Config, Replica
from crdtstate.change import Change, Snapshot
from crdtstate.documents import DocumentSet
from crdtstate.past import Past
from crdtstate.stores import Entry, Saved
from crdtstate.stores.journal import Journal

SIZES = (10_000, 100_000)


@dataclass(frozen=True, slots=True)
class _Content:
    """A document of so many keys, written one by one."""

    documents: DocumentSet
    changes: list[Change]


def recovery(effort: Effort) -> list[Result]:
    """Milliseconds to open a store, and to encode a snapshot, join it and look back at it."""
    results: list[Result] = []
    for full in SIZES:
        keys = effort.count(full)
        content = _content(keys)
        # What takes seconds needs no more than a few rounds.
        rounds = max(1, effort.rounds * SIZES[0] // full) if effort.scale == 1 else effort.rounds
        rounds = max(rounds, min(3, effort.rounds))
        results += _opening(content, keys, rounds)
        results += _snapshots(content, keys, rounds)
    return results


def _content(keys: int) -> _Content:
    documents = new_documents()
    plan = documents.map("plan")
    changes: list[Change] = []
    for number in range(keys):
        plan[f"key-{number}"] = number
        changes += [change for change, _ in documents.take_sealed()]
    return _Content(documents, changes)


# Opening a replica


def _opening(content: _Content, keys: int, rounds: int) -> list[Result]:
    snapshot = content.documents.document("main").snapshot()
    with tempfile.TemporaryDirectory() as directory:
        tail, saved = Path(directory) / "tail.db", Path(directory) / "saved.db"
        _store(tail, content.changes, None)
        _store(saved, content.changes, snapshot)
        updates = [change.update for change in content.changes]
        tails = by_turns(
            rounds,
            lambda: asyncio.run(_open(tail, keys)),
            lambda: _bare_open(tail, "journal", updates),
        )
        snapshots = by_turns(
            rounds,
            lambda: asyncio.run(_open(saved, keys)),
            lambda: _bare_open(saved, "snapshot", [snapshot.state]),
        )
    note = "bare apsw and apply_update"
    return [
        _milliseconds(f"open, {keys:,} keys in {keys:,} changes", tails, note),
        _milliseconds(f"open, {keys:,} keys in a snapshot", snapshots, note, at_most(500)),
    ]


def _store(path: Path, changes: Sequence[Change], snapshot: Snapshot | None) -> None:
    """Make the file that a replica leaves behind."""
    journal = Journal(path)
    journal.start("agent", changes[0].writer, lambda: None)
    for start in range(0, len(changes), 1000):
        part = changes[start : start + 1000]
        journal.append([Entry(c.document, c.writer, c.seq, c.data) for c in part])
    if snapshot is not None:
        saved = Saved(snapshot.document, snapshot.version, snapshot.encode())
        journal.compact(saved, int(Config().log_bytes))
    journal.close()


async def _open(path: Path, keys: int) -> float:
    before = time.process_time()
    async with Replica("agent", store=path) as replica:
        taken = time.process_time() - before
        assert len(replica.map("plan")) == keys
        return taken


def _bare_open(path: Path, table: str, updates: Sequence[bytes]) -> float:
    def load() -> None:
        db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        rows = db.execute(f"SELECT * FROM {table}").fetchall()
        assert rows
        doc: Doc[Any] = Doc()
        doc.get("lanes", type=YMap)
        for update in updates:
            doc.apply_update(update)
        db.close()

    return cpu(load)


# Snapshots


def _snapshots(content: _Content, keys: int, rounds: int) -> list[Result]:
    document = content.documents.document("main")
    data = document.snapshot().encode()
    state = document.engine.state()
    bare: Doc[Any] = Doc()
    bare.apply_update(state)

    def join() -> None:
        snapshot = Snapshot.decode(data)
        new_documents(1).document("main").join(snapshot)

    def look_back() -> None:
        snapshot = Snapshot.decode(data)
        with Past() as past:
            past.fill(snapshot.document, snapshot.shared, snapshot.version, snapshot)
            assert len(past.map("plan")) == keys

    encoding = by_turns(
        rounds,
        lambda: cpu(lambda: document.snapshot().encode()),
        lambda: cpu(lambda: bare.get_update()),
    )
    joining = by_turns(rounds, lambda: cpu(join), lambda: cpu(lambda: Doc().apply_update(state)))
    looking = by_turns(
        rounds, lambda: cpu(look_back), lambda: cpu(lambda: Doc().apply_update(state))
    )
    size = f"{len(data) / 1024:,.0f} KB, {len(state) / 1024:,.0f} KB before compression"
    return [
        _milliseconds(f"encode a snapshot of {keys:,} keys", encoding, f"get_update; {size}"),
        _milliseconds(f"decode and join it, {keys:,} keys", joining, "apply_update", at_most(500)),
        _milliseconds(
            f"rebuild a past of it, {keys:,} keys", looking, "apply_update", at_most(500)
        ),
    ]


def _milliseconds(
    name: str, seconds: list[float], note: str, target: Target | None = None
) -> Result:
    ours, floor = (1000 * taken for taken in seconds)
    return Result(name, "ms", ours, floor, target, note)
