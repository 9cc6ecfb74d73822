"""
Changes of others: from the bytes of a change to a document that has it.

The floor is ``apply_update`` of the very same updates, unchecked, on a bare Doc.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pycrdt import Doc
from pycrdt import Map as YMap

from benchmarks.measure import Effort, Result, at_least, by_turns, cpu, new_documents, rate
from crdtstate.change import Change, decode_change

KEYS = [f"key-{number}" for number in range(1000)]
APPLIES_TARGET = 30_000


def applies(effort: Effort) -> list[Result]:
    """Changes of others taken in per second."""
    count = effort.count(20_000)
    single = _changes(count, 1)
    many = _changes(max(count, 100), 100)
    ones = by_turns(effort.rounds, lambda: _apply(single), lambda: _bare_apply(single))
    hundreds = by_turns(effort.rounds, lambda: _apply(many), lambda: _bare_apply(many))
    note = "apply_update of the same updates"
    return [
        rate("changes of one write", len(single), ones, at_least(APPLIES_TARGET), note),
        rate("writes, in changes of 100", 100 * len(many), hundreds, note=note),
    ]


def _changes(writes: int, per_change: int) -> list[Change]:
    documents = new_documents()
    plan = documents.map("plan")
    changes: list[Change] = []
    for number in range(writes):
        plan[KEYS[number % 1000]] = number
        if number % per_change == per_change - 1:
            changes += [change for change, _ in documents.take_sealed()]
    return changes


def _apply(changes: Sequence[Change]) -> float:
    documents = new_documents(1)
    document = documents.document("main")

    def apply() -> None:
        for change in changes:
            document.apply(decode_change(change.data))

    taken = cpu(apply)
    assert document.version.total == len(changes)
    document.close()
    return taken


def _bare_apply(changes: Sequence[Change]) -> float:
    doc: Doc[Any] = Doc()
    doc.get("lanes", type=YMap)

    def apply() -> None:
        for change in changes:
            doc.apply_update(change.update)

    return cpu(apply)
