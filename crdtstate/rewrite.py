"""
Bringing values back: what to write so that documents read as they did, or as if one run had never
written.

Nothing is rolled back. Both are *steps*, each an ordinary write that covers what it sees, decided
when its turn comes: in between others may write, and nobody's write is judged before it is there.
Whoever takes the steps puts them into transactions, as many in each as fit.

A restore compares with a past. A *revert* needs to know what one run did: `RunTrace` follows the
history of a document and keeps, for each place that the run wrote, what was there before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from crdtstate.change import TIDY, Change
from crdtstate.clock import Dot, Version
from crdtstate.document import Document
from crdtstate.documents import ORIGIN_CHARS_MAX, DocumentSet
from crdtstate.native import Array, Native, Text, YMap, content
from crdtstate.native_edits import edits
from crdtstate.past import (
    NATIVE,
    Difference,
    Past,
    PastDocument,
    Place,
    Selection,
    native_difference,
    natives,
    path_text,
)
from crdtstate.rules import RULES
from crdtstate.slots import Cell, Slot, candidates, totals
from crdtstate.values import pack, unpack


class Step(NamedTuple):
    """One write of many.

    Attributes:
        document: The document it writes to.
        size: How many bytes that takes at most, as a transaction counts them.
        can_wait: Whether others may write before it is taken.
        take: Makes it; gives what tells what it changed, if it did.
    """

    document: Document
    size: int
    can_wait: bool
    take: Callable[[], Callable[[], Difference] | None]


# Restoring


def restoring(
    documents: DocumentSet, past: Past, found: Mapping[str, Iterable[Place]], chosen: Selection
) -> Iterator[Step]:
    """Steps after which documents read as in *past*, at those of their places that were *found* to
    be able to read differently. Each has to be taken before the next is asked for."""
    for name, differing in found.items():
        then = past.find(name)
        now = documents.find(name)
        if now is None:
            if then is None:
                continue
            now = documents.system_document(name, shared=then.shared)
        for place in differing:
            wanted = place.read(then)
            if place.read(now) != wanted:
                yield _writing(now, place, wanted)
        yield from _restoring_natives(now, natives(then), chosen)


def _writing(document: Document, place: Place, wanted: bytes | None) -> Step:
    """A step after which *place* reads as *wanted*."""

    def take() -> Callable[[], Difference] | None:
        before = place.read(document)
        if before == wanted:
            return None
        if place.container[0] == "c":
            count = unpack(wanted or pack(0, "counter")) - unpack(before or pack(0, "counter"))
            document.count(place.container, max(count, 0), max(-count, 0))
        else:
            place.write(document, wanted)
        return partial(place.difference, document.name, before, wanted)

    return Step(document, _size(document, place, wanted), True, take)


def _size(document: Document, place: Place, wanted: bytes | None) -> int:
    covers = 14 * len(place.cell(document))
    return len(wanted or b"") + covers + len(place.container) + 4 * len(place.key) + 64


def _restoring_natives(
    document: Document, wanted: dict[str, Any], chosen: Selection
) -> Iterator[Step]:
    if document.native is None:
        return
    for root in sorted(wanted.keys() | natives(document).keys()):
        if chosen.covers(root, lambda: None):
            yield from _rewriting(document, root, wanted.get(root))


def _rewriting(document: Document, root: str, wanted: Any) -> Iterator[Step]:
    """Steps after which a root of a shared document reads as *wanted*; None: is empty."""
    # Here others may write; from now on the edits count on each other.
    yield Step(document, 0, True, lambda: None)
    before = natives(document).get(root)
    if wanted is None and before is None:
        return
    if wanted is not None and before is not None and content(before) == content(wanted):
        return
    kind = type(before if wanted is None else wanted)
    living = getattr(document, NATIVE[kind])(root)
    for size, edit in edits(living, _empty(kind) if wanted is None else wanted):
        yield Step(document, size, False, partial(_make, edit))
    done = native_difference(document.name, root, before, wanted)
    yield Step(document, 0, False, lambda: lambda: done)


def _make(edit: Callable[[], Any]) -> None:
    edit()


def _empty(kind: type) -> Any:
    native = Native(1, lambda: None)
    native.close()
    roots: dict[type, Any] = {Text: native.text, Array: native.array, YMap: native.map}
    return roots[kind]("empty")


# Reverting


@dataclass(frozen=True, slots=True)
class Kept:
    """A place that a run wrote and `Replica.revert` left as it is.

    Attributes:
        document: The document's name.
        kind: As in `Difference`.
        name: The view's name.
        key: The key or element; None where there is one value.
        reason: Why.
    """

    document: str
    kind: str
    name: str
    key: Any
    reason: str

    @property
    def path(self) -> str:
        """The place as text, such as ``plan['goal']``."""
        return path_text(self.name, self.key)

    def __str__(self) -> str:
        return f"{self.document}: {self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Reverted:
    """What `Replica.revert` did.

    Attributes:
        changed: What it brought back.
        kept: What the run wrote and was left as it is, and why.
    """

    changed: tuple[Difference, ...]
    kept: tuple[Kept, ...]


FORGOTTEN = "what was there before the run is no longer in the log"
SAME = "it reads as before the run anyway"
REMOVED = "it was removed, or changed again, since"
CONCURRENT = "a value that was written at the same time stands"
MIXED = "others have edited it since the run began, and edits cannot be told apart"


class Dots:
    """The changes of one run in one document.

    Args:
        run: Its name.
        agent: Whose; None: of anybody.
    """

    def __init__(self, run: str, agent: str | None) -> None:
        self._run = run
        self._agent = agent
        self._reverts = {self.name_of_revert(run, agent), self.name_of_revert(run, None)}
        # Writer -> seqs, and the first of them.
        self._seqs: dict[int, set[int]] = {}
        self.first = Version()

    @staticmethod
    def name_of_revert(run: str, agent: str | None) -> str:
        """The run under which a revert is written, so that another one knows of it."""
        whose = f" of {agent}" if agent is not None else ""
        return f"revert {run}{whose}"[:ORIGIN_CHARS_MAX]

    def note(self, change: Change) -> None:
        """Look at a change; the changes of each writer come in order."""
        origin = change.origin
        if origin.run == self._run and self._agent in (None, origin.agent):
            self._seqs.setdefault(change.writer, set()).add(change.seq)
            self.first.setdefault(change.writer, change.seq)

    def is_revert(self, change: Change) -> bool:
        """Whether *change* reverts the run."""
        return change.origin.run in self._reverts or (
            self._agent is None and change.origin.run.startswith(f"revert {self._run} of ")
        )

    def __bool__(self) -> bool:
        return bool(self._seqs)

    def __contains__(self, dot: tuple[int, int]) -> bool:
        seqs = self._seqs.get(dot[0])
        return seqs is not None and dot[1] in seqs

    def is_of_all(self, change: Change) -> bool:
        """Whether a revert is one of the whole run, though this is about one agent."""
        return self._agent is not None and change.origin.run == self.name_of_revert(self._run, None)

    def are_after(self, version: Version) -> bool:
        """Whether *version* contains none of them."""
        return all(version.get(writer, 0) < seq for writer, seq in self.first.items())

    def wrote(self, slot: tuple[int, Slot]) -> bool:
        """Whether the run wrote a slot, given with its lane's writer."""
        return (slot[0], slot[1].seq) in self


class RunTrace:
    """What a run did to one document, found by following its history on a past of it.

    Args:
        document: The document as it was before the run, or, if that cannot be had, at some time
            in the midst of it.
        dots: The run's changes.
    """

    def __init__(self, document: PastDocument, dots: Dots) -> None:
        self._document = document
        self._dots = dots
        self._is_whole = dots.are_after(document.version)
        # Path -> what was visible before the run wrote it: the last that was not the run's own.
        self._before: dict[str, bytes | None] = {}
        # Those of which that is not known.
        self._forgotten: set[str] = set()
        # Path of a place that the run wrote -> whether the newest write there was the run's.
        self._is_last: dict[str, bool] = {}
        # Path of a counter -> what the run added, and its reverts.
        self._counted: dict[str, int] = {}
        # Those of them that a revert of the whole run has been to, if this is about one agent.
        self._undone: set[str] = set()
        # Path -> the run's newest change there, if that left nothing to be seen.
        self._removals: dict[str, Dot] = {}
        self._knowledge = _Knowledge(dots)
        # The document before the first change of the run, and the roots written since: by the
        # run, and by others.
        self._state: bytes | None = None
        self._roots: tuple[set[str], set[str]] = (set(), set())

    def follow(self, change: Change) -> None:
        """Take in the next change. Raises InvalidUpdate."""
        is_own = change.dot in self._dots
        native = self._document.native
        if native is not None:
            if is_own and self._state is None:
                self._state = native.state()
            touched = self._document.take(change)
            if self._state is not None:
                self._roots[0 if is_own else 1].update(path[1:-1] for path in touched)
            return
        self._document.take(change)
        self._knowledge.note(change)
        replaced = self._document.index.replaced
        is_revert = self._dots.is_revert(change)
        for path, cell in replaced.items():
            if path.startswith(RULES):
                continue
            if path.startswith("c"):
                if is_own or is_revert:
                    self._note_count(path, cell, change, is_revert)
            elif is_own:
                self._note_own(path, cell, change)
            elif path in self._is_last:
                self._is_last[path] = False
                self._removals.pop(path, None)
        if not is_own and change.kind != TIDY:
            self._note_removals(change)

    def _note_count(self, path: str, before: Cell, change: Change, is_revert: bool) -> None:
        now = Place.of(path).cell(self._document)
        old, new = before.get(change.writer), now.get(change.writer)
        (up, down), (ups, downs) = (totals(slot) if slot else (0, 0) for slot in (old, new))
        self._counted[path] = self._counted.get(path, 0) + ups - up - downs + down
        if is_revert and self._dots.is_of_all(change):
            self._undone.add(path)

    def _note_own(self, path: str, before: Cell, change: Change) -> None:
        place = Place.of(path)
        found = candidates(before)
        others = [slot for slot in found if not self._dots.wrote(slot)]
        if others:
            self._before[path] = read_among(self._document, place, others)
            self._forgotten.discard(path)
        elif found or self._is_last.get(path):
            # The run wrote what is replaced here: what was there before that counts.
            if path not in self._before:
                self._forgotten.add(path)
        else:
            self._before[path] = None
            self._forgotten.discard(path)
        self._is_last[path] = True
        if candidates(place.cell(self._document)):
            self._removals.pop(path, None)
        else:
            self._removals[path] = change.dot

    def _note_removals(self, change: Change) -> None:
        """Who had not seen that the run removed something has removed it too: it stays so."""
        for path in self._document.index.dropped:
            dot = self._removals.get(path)
            if dot is not None and not self._knowledge.has(change, dot):
                self._is_last[path] = False

    # Undoing

    def steps(self, documents: DocumentSet, kept: list[Kept]) -> Iterator[Step]:
        """Steps that undo the run in the living document; what cannot be goes to *kept*."""
        document = documents.document(self._document.name)
        for path, count in sorted(self._counted.items()):
            yield self._uncounting(document, Place.of(path), count, kept)
        for path in sorted(self._is_last):
            yield self._undoing(document, path, kept)
        if document.native is not None:
            yield from self._undoing_natives(document, kept)
        elif not self._is_whole:
            self._keep_forgotten(document, kept)

    def _uncounting(self, document: Document, place: Place, count: int, kept: list[Kept]) -> Step:
        def take() -> Callable[[], Difference] | None:
            if not self._is_whole:
                reason = "it may have added more than this, which is no longer in the log"
                kept.append(_kept(document, place, reason))
            if place.container in {path.split("\0")[0] for path in self._undone}:
                kept.append(_kept(document, place, "the whole run was reverted before"))
                return None
            if not count:
                kept.append(_kept(document, place, SAME))
                return None
            before = place.read(document)
            document.count(place.container, max(-count, 0), max(count, 0))
            return partial(place.difference, document.name, before, place.read(document))

        return Step(document, _size(document, place, b"") + 64, True, take)

    def _undoing(self, document: Document, path: str, kept: list[Kept]) -> Step:
        place = Place.of(path)

        def take() -> Callable[[], Difference] | None:
            wanted = self._wanted(document, path)
            now = place.read(document)
            if isinstance(wanted, str):
                kept.append(_kept(document, place, wanted))
                return None
            if wanted == now:
                kept.append(_kept(document, place, SAME))
                return None
            place.write(document, wanted)
            return partial(place.difference, document.name, now, wanted)

        return Step(document, _size(document, place, self._before.get(path)), True, take)

    def _wanted(self, document: Document, path: str) -> bytes | None | str:
        """What is to be at *path*, or, as a str, why it stays as it is."""
        place = Place.of(path)
        cell = place.cell(document)
        found = candidates(cell)
        others = [slot for slot in found if not self._dots.wrote(slot)]
        if not found:
            # Nobody may have been here since the run removed it.
            if not self._is_last[path] or cell != place.cell(self._document):
                return REMOVED
        elif len(others) == len(found):
            by = document.agents.get(found[-1][0]) or "somebody"
            return f"{by} has written over it since"
        elif others:
            wanted = read_among(document, place, others)
            return CONCURRENT if wanted == place.read(document) else wanted
        if path in self._forgotten:
            return FORGOTTEN
        return self._before[path]

    def _undoing_natives(self, document: Document, kept: list[Kept]) -> Iterator[Step]:
        ours, others = self._roots
        if self._state is None:
            return
        before = PastDocument(document.name, lambda _: None, True)
        assert before.native is not None
        before.native.load(self._state)
        wanted, then = natives(before), natives(self._document)
        for root in sorted(ours):
            value = natives(document).get(root)
            is_same = content(value) == content(then.get(root))
            if root in others or not is_same or not self._is_whole:
                kind = NATIVE[type(value or then.get(root) or wanted.get(root) or Text())]
                reason = MIXED if self._is_whole else FORGOTTEN
                kept.append(Kept(document.name, kind, root, None, reason))
            else:
                yield from _rewriting(document, root, wanted.get(root))

    def _keep_forgotten(self, document: Document, kept: list[Kept]) -> None:
        """List what the run wrote before the past begins, and still stands."""
        for container, cells in sorted(document.lanes.containers.items()):
            for key, cell in sorted(cells.cells.items()):
                place = Place(container, key)
                if container[0] != "c" and any(map(self._dots.wrote, candidates(cell))):
                    if f"{container}\0{key}" not in self._is_last:
                        kept.append(_kept(document, place, FORGOTTEN))


class _Knowledge:
    """Which of a run's changes each change knew of, through whatever it builds on: of each of the
    run's writers the newest."""

    def __init__(self, dots: Dots) -> None:
        self._dots = dots
        # Writer -> what its newest change knew, and what it knew from which seq on.
        self._newest: dict[int, Version] = {}
        self._steps: dict[int, list[tuple[int, Version]]] = {}

    def note(self, change: Change) -> None:
        """Look at the next change."""
        before = self._newest.get(change.writer, Version())
        known = before.copy()
        for dep in change.deps:
            known.merge(self._at(dep.writer, dep.seq))
        if known != before:
            self._newest[change.writer] = known
            self._steps.setdefault(change.writer, []).append((change.seq, known))

    def _at(self, writer: int, seq: int) -> Version:
        steps = self._steps.get(writer, [])
        at = bisect_right(steps, seq, key=lambda step: step[0])
        known = steps[at - 1][1].copy() if at else Version()
        if writer in self._dots.first:
            known.merge({writer: seq})
        return known

    def has(self, change: Change, dot: Dot) -> bool:
        """Whether *change*, the newest of its writer, knew of *dot*, one of the run."""
        return self._newest.get(change.writer, Version()).covers(dot)


def read_among(document: Document, place: Place, found: list[tuple[int, Slot]]) -> bytes | None:
    """What *place* would read as if only these of its candidates were there."""
    if len(found) < 2 or place.container[0] in "s@":
        return found[-1][1].value if found else None
    known = document.candidates(dict(found))
    return pack(document.decide(place.container, place.key, known).value, place.path)


def _kept(document: Document, place: Place, reason: str) -> Kept:
    return Kept(document.name, place.kind, place.name, place.shown_key, reason)
