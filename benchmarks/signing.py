"""
What it costs to prove whose changes are: signed against keyed against nothing.

From a write to a sealed change, and from the bytes of a change to a document of another that has
it, proof checked, in microseconds of CPU per write. The floor is the same without any proof.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from functools import partial

from benchmarks.measure import Effort, Result, by_turns, cpu
from crdtstate.authors import Authors, Unsigned, authors_of
from crdtstate.certificates import JoinToken, issue, parse_grant
from crdtstate.change import Change, decode_change
from crdtstate.credentials import open_credentials
from crdtstate.documents import DocumentSet
from crdtstate.signing import public_of

KEYS = [f"key-{number}" for number in range(1000)]
SIZES = (1, 16, 64)
DAY_MS = 24 * 3600 * 1000


def signing(effort: Effort) -> Sequence[Result]:
    """Microseconds for each write."""
    kinds: dict[str, Authors] = {
        "nothing": Unsigned(),
        "keyed": authors_of(open_credentials("words that all of us know"), None),
        "signed": authors_of(open_credentials(_token()), None),
    }
    found = []
    for size in SIZES:
        found += _of_size(effort, kinds, size)
    return found


def _of_size(effort: Effort, kinds: dict[str, Authors], size: int) -> list[Result]:
    writes = max(effort.count(20_000), size)
    sealed: dict[str, list[Change]] = {}

    def seal(kind: str) -> float:
        taken, sealed[kind] = _seal(kinds[kind], writes, size)
        return taken

    def take(kind: str) -> float:
        return _take(kinds[kind], sealed[kind])

    making = by_turns(effort.rounds, *(partial(seal, kind) for kind in kinds))
    taking = by_turns(effort.rounds, *(partial(take, kind) for kind in kinds))
    found = []
    for what, times in (("made", making), ("taken in", taking)):
        floor, *others = (1e6 * seconds / writes for seconds in times)
        for kind, ours in zip(("keyed", "signed"), others, strict=True):
            name = f"{kind}, {size} writes a change, {what}"
            found.append(Result(name, "us", ours, floor, note="without a proof"))
    # The newest: with the first comes the card.
    plain, *others = (len(sealed[kind][-1].data) for kind in kinds)
    for kind, size_bytes in zip(("keyed", "signed"), others, strict=True):
        name = f"{kind}, {size} writes a change, bytes of it"
        found.append(Result(name, "B", size_bytes, plain, note="without a proof"))
    return found


def _token() -> str:
    root, seed = os.urandom(32), os.urandom(32)
    now_ms = time.time_ns() // 1_000_000
    certificate = issue(
        root,
        agent="ann",
        key=public_of(seed),
        grants=[parse_grant("*:rws")],
        not_before_ms=now_ms - DAY_MS,
        not_after_ms=now_ms + DAY_MS,
        serial=os.urandom(16),
    )
    return JoinToken(public_of(root), (os.urandom(32),), (), seed, certificate).encode()


def _seal(authors: Authors, writes: int, size: int) -> tuple[float, list[Change]]:
    writer = authors.draw(random.Random())
    documents = DocumentSet("ann", writer, lambda: time.time_ns() // 1_000_000)
    documents.prover_of = authors.prover
    plan = documents.map("plan")
    changes: list[Change] = []

    def write() -> None:
        for number in range(writes):
            plan[KEYS[number % 1000]] = number
            if number % size == size - 1 or number == writes - 1:
                changes.extend(change for change, _ in documents.take_sealed())

    taken = cpu(write)
    documents.document("main").close()
    return taken, changes


def _take(authors: Authors, changes: Sequence[Change]) -> float:
    documents = DocumentSet("bob", 1, lambda: time.time_ns() // 1_000_000)
    document = documents.document("main")

    def apply() -> None:
        for each in changes:
            change = decode_change(each.data)
            authors.check(change, document.cards.get(change.writer, b""))
            document.apply(change)

    taken = cpu(apply)
    assert document.version.total == len(changes)
    document.close()
    return taken
