"""
Growth: what a million writes leave behind.

A Yjs document remembers every write it ever took, which is what lanes are for (see
`crdtstate.lanes`). Each case writes in a process of its own, where a reader follows, and hands the
states of both over every 10,000 writes; here the live slots are put into fresh lanes, which is the
least that lanes can be. The larger state must stay below twice that and 40 KB, at every sample. A
bare `pycrdt.Map` that is overwritten the same way stands beside it, as naive.

No single change may take long either. A machine that has others to serve makes some of 200,000
wait, so each case runs twice, and each change counts with the shorter of its two times. The second
run has no reader where there is one writer, so that memory is that of one document.
"""

from __future__ import annotations

import gc
import random
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any

from pycrdt import Doc
from pycrdt import Map as YMap

from benchmarks.children import Child
from benchmarks.measure import (
    Effort,
    Result,
    Target,
    at_most,
    by_turns,
    cpu,
    new_documents,
    resident,
)
from crdtstate import guard
from crdtstate.change import Change, Snapshot, decode_change
from crdtstate.documents import DocumentSet
from crdtstate.lanes import Lanes
from crdtstate.slots import Slot

SAMPLE_EVERY = 10_000
LONGEST_TARGET_MS = 10.0
ALLOWANCE = 40 * 1024
"""Bytes that a state may have beyond twice its live content: two segments are never cleaned."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is written: *writes* over *keys*, *per_change* at a time, by *writers* in turn."""

    writes: int
    keys: int
    per_change: int
    writers: int = 1
    counts: bool = False

    @property
    def name(self) -> str:
        what = f"{self.writes:,} x {self.keys:,} "
        what += f"counters by {self.writers}" if self.counts else "keys"
        return f"{what}, {self.per_change} a change"

    def scaled(self, effort: Effort) -> Case:
        writes = effort.count(self.writes, least=200)
        return Case(writes, self.keys, self.per_change, self.writers, self.counts)

    @property
    def interval(self) -> int:
        """Writes between samples."""
        return min(SAMPLE_EVERY, self.writes // 2)


CASES = (
    Case(200_000, 10, 1),
    Case(200_000, 1_000, 1),
    Case(200_000, 10_000, 1),
    Case(1_000_000, 10, 20),
    Case(1_000_000, 1_000, 20),
    Case(1_000_000, 10_000, 20),
    Case(1_000_000, 100, 20, writers=10, counts=True),
)


@dataclass(frozen=True, slots=True)
class _Final:
    """What a case's process knows in the end."""

    states: list[bytes]
    snapshot: bytes
    contents: dict[str, int]
    grown: int
    """Bytes of memory."""
    sealing: array[float]
    """CPU seconds of each change."""


def growth(effort: Effort, cases: tuple[Case, ...] = CASES) -> list[Result]:
    """Size, memory, load time and longest change after many writes."""
    return [result for case in cases for result in _results(case.scaled(effort), effort.rounds)]


def _results(case: Case, rounds: int) -> Iterator[Result]:
    worst, live, ours = _watch(case)
    again = ours
    if rounds > 1:
        with Child(_write, case, False) as child:
            again = child.receive()
    with Child(_write_naively, case) as child:
        naive: _Final = child.receive()
    size = max(map(len, ours.states))
    loads = by_turns(
        rounds,
        lambda: _load(case, ours),
        lambda: _bare_load(ours.states[-1]),
        lambda: _bare_load(naive.states[-1]),
    )
    load_ms, bare_ms, naive_ms = (1000 * taken for taken in loads)
    bound = Target("<= 2x + 40 KB, always", lambda _: worst <= 1)
    naive_kb = f"naive {len(naive.states[-1]) / 1024:,.1f} KB"
    at_worst = f"at worst {worst:.2f} of the bound"
    sealing = sorted(map(min, ours.sealing, again.sealing))
    longest, median = 1000 * sealing[-1], 1000 * sealing[len(sealing) // 2]
    yield Result(
        f"{case.name}: size",
        "KB",
        size / 1024,
        live / 1024,
        bound,
        f"live slots in fresh lanes; {at_worst}; {naive_kb}",
    )
    yield Result(
        f"{case.name}: memory", "MB", again.grown / 2**20, naive.grown / 2**20, None, "naive"
    )
    note = f"bare apply_update of the same; naive {naive_ms:,.1f}"
    yield Result(f"{case.name}: load", "ms", load_ms, bare_ms, None, note)
    target = at_most(LONGEST_TARGET_MS)
    note = f"CPU, to seal it; median {median:.3f}"
    yield Result(f"{case.name}: longest change", "ms", longest, None, target, note)


def _watch(case: Case) -> tuple[float, int, _Final]:
    """Let a process write; return the largest part of the allowed size that a sample took, the
    live size in the end, and what the process knows."""
    worst, live = 0.0, 0
    with Child(_write, case, True) as child:
        while True:
            message = child.receive()
            if isinstance(message, _Final):
                return worst, live, message
            live = _live_size(message[0])
            worst = max(worst, max(map(len, message)) / (2 * live + ALLOWANCE))


def _live_size(state: bytes) -> int:
    """The size of a document that has what is live in *state* and has never had anything else."""
    doc: Doc[Any] = Doc()
    for writer, lane in guard.parse_state(state).items():
        slots: dict[str, Slot | None] = {}
        for struct in lane.structs:
            kind, path, content = struct[2], struct[5], struct[6]
            if kind == guard.SLOT and path is not None and content is not None:
                slots[path] = Slot.decode(content)
        fresh = Lanes(writer)
        for path, slot in slots.items():
            fresh.set_own(path, slot)
        doc.apply_update(fresh.write(slots))
        fresh.close()
    return len(doc.get_update())


def _load(case: Case, final: _Final) -> float:
    documents = new_documents()

    def load() -> None:
        snapshot = Snapshot.decode(final.snapshot)
        documents.find_or_make(snapshot.document, snapshot.shared).join(snapshot)

    taken = cpu(load)
    assert _contents(documents, case) == final.contents, "loading gave something else"
    documents.document("main").close()
    return taken


def _bare_load(state: bytes) -> float:
    return cpu(lambda: Doc().apply_update(state))


def _contents(documents: DocumentSet, case: Case) -> dict[str, int]:
    if not case.counts:
        return dict(documents.map("plan"))
    return {key: documents.counter(key).value for key in _keys(case)}


def _keys(case: Case) -> list[str]:
    return [f"key-{number}" for number in range(case.keys)]


# In the process of a case


def _write(pipe: Pipe, case: Case, is_watched: bool) -> None:
    """Write to documents, one for each writer, which a reader follows."""
    rng, keys = random.Random(1), _keys(case)
    before = resident()
    authors = [new_documents(1 + number) for number in range(case.writers)]
    is_followed = is_watched or case.writers > 1
    reader = new_documents() if is_followed else authors[0]
    # Whose state has all of it.
    wholes = [reader.document("main")]
    if case.writers == 1 and is_followed:
        wholes.append(authors[0].document("main"))
    writings = [_writing(author, case) for author in authors]
    sealing = array("d")
    for start in range(0, case.writes, case.per_change):
        turn = start // case.per_change % case.writers
        for number in range(start, start + case.per_change):
            writings[turn](keys[rng.randrange(case.keys)], number)
        # Python's collector has its pauses in any program, wherever it happens to allocate.
        gc.disable()
        before_seal = time.process_time()
        changes = [change for change, _ in authors[turn].take_sealed()]
        sealing.append(time.process_time() - before_seal)
        gc.enable()
        if is_followed:
            _apply(reader, changes)
        if is_watched and (start + case.per_change) % case.interval < case.per_change:
            pipe.send([document.engine.state() for document in wholes])
    grown = resident() - before
    states = [document.engine.state() for document in wholes]
    snapshot = wholes[0].snapshot().encode()
    pipe.send(_Final(states, snapshot, _contents(reader, case), grown, sealing))


def _writing(documents: DocumentSet, case: Case) -> Callable[[str, int], None]:
    if not case.counts:
        return documents.map("plan").__setitem__
    counters = {key: documents.counter(key) for key in _keys(case)}
    return lambda key, _: counters[key].increment()


def _apply(documents: DocumentSet, changes: list[Change]) -> None:
    for change in changes:
        documents.document(change.document).apply(decode_change(change.data))


def _write_naively(pipe: Pipe, case: Case) -> None:
    """The same with bare maps. Counters are a total for each writer, under a key of its own."""
    rng, keys = random.Random(1), _keys(case)
    before = resident()
    docs: list[Doc[Any]] = [Doc() for _ in range(case.writers)]
    reader = docs[0] if case.writers == 1 else Doc()
    maps = [doc.get("plan", type=YMap) for doc in docs]
    reader.get("plan", type=YMap)
    updates: list[bytes] = []
    subscriptions = [doc.observe(lambda event: updates.append(event.update)) for doc in docs]
    totals: list[dict[str, int]] = [{} for _ in docs]
    for start in range(0, case.writes, case.per_change):
        turn = start // case.per_change % case.writers
        with docs[turn].transaction():
            for number in range(start, start + case.per_change):
                key = keys[rng.randrange(case.keys)]
                if case.counts:
                    totals[turn][key] = number = totals[turn].get(key, 0) + 1
                    key = f"{turn}/{key}"
                maps[turn][key] = number
        if case.writers > 1:
            for update in updates:
                reader.apply_update(update)
        updates.clear()
    grown = resident() - before
    for doc, subscription in zip(docs, subscriptions, strict=True):
        doc.unobserve(subscription)
    pipe.send(_Final([reader.get_update()], b"", {}, grown, array("d")))
