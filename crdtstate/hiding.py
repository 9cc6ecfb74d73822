"""
Hiding: what every replica has taken in, and nobody is to see.

Some changes must not count: those that the document's own rules refuse (`rules`), those of a writer
whose certificate was revoked, all of a writer that has gone on in two ways. To refuse them at the
door is no way out, as whoever has let one in is then at another version for ever, and whatever
builds on it waits for ever. So all deliver all of it, and hide some (what Keyhive calls whiteout).
What is read is then a function of the delivered changes and of what is hidden, and of no order.

What is hidden are *dots*, for three reasons that do not know of each other:

    refused    single changes, told when they are delivered from what they build on alone, so
               everywhere alike; it stays with the change. A *release* (`quarantine`) shows it.
    ceilings   all changes of a writer above a seq; 0 hides the whole lane. Told at any time, before
               or after the changes are there, and taken back at any time.

In the index (`lanes`) a *stand-in* takes the place of a hidden slot, which is kept beside it (L7):

- It has the slot's seq and stamp, no value, and covers nothing. So it reads as nothing, and what
  the hidden slot covered is there again, if its owner has not dropped it by then (L3).
- A write covers all that lies at its path, hidden or not. So a value that was written over while
  it was hidden does not come back when it is shown: hiding and showing again, whatever was written
  in between, leaves what is there as if nothing had ever been hidden.
- What its own writer had said at the path before is gone, as a lane keeps one slot for a path.
  `Replica.revert` brings it back.

Counters. A slot holds all that its lane has ever counted, so without its newest change it would
count nothing, and with the next one all of it again. Therefore of a refused change what it *added*
is withheld: the difference to the slot before it, which everybody has when the change is
delivered, and which is a function of the lane alone. The counter reads as if that change, and no
other, had not been; also after many more, and also when the document comes as a snapshot, which
carries it. Of a lane that is cut off by a ceiling the total at that point is known to nobody any
more. So the decision says what still counts of it (`Ceiling.counts`), and else it is nothing.

A snapshot says which changes were refused, since who joins by it cannot judge them any more; it is
believed in that as in all else. All that is kept is proportional to what is hidden and stands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from crdtstate.clock import SEQ_MAX, STAMP_MAX, WRITER_MAX, Dot
from crdtstate.errors import InvalidUpdate, UnsupportedValue
from crdtstate.slots import NO_COVERS, Slot, split_path, totals
from crdtstate.values import pack, unpack

WITHHELD_MAX = 200
"""What refused changes of one lane have added to counters is remembered so many times, for them to
be released; of older ones only the sum, which cannot be."""

REASON_CHARS_MAX = 200

TEXT_CHARS_MAX = 1000
"""Characters of an agent's name, a reason or a path."""

NO_COUNTS: Mapping[str, int] = {}


class Refusal(NamedTuple):
    """A change that is delivered and hidden.

    Attributes:
        agent: Who made it.
        stamp: When, by the writer's hybrid logical clock.
        reason: Why it was refused.
        paths: What it wrote and still stands.
        counts: Path of a counter -> what it added.
    """

    agent: str
    stamp: int
    reason: str
    paths: tuple[str, ...]
    counts: Mapping[str, int] = NO_COUNTS


class Ceiling(NamedTuple):
    """All changes of a writer above *seq* are hidden.

    Attributes:
        counts: Path of a counter -> what the lane counts there if its newest slot is hidden.
    """

    seq: int
    counts: Mapping[str, int] = NO_COUNTS


class Hiding:
    """What is hidden of one document."""

    def __init__(self) -> None:
        # Writer -> seq -> refusal, released ones too.
        self.refused: dict[int, dict[int, Refusal]] = {}
        self.released: frozenset[Dot] = frozenset()
        self.ceilings: dict[int, Ceiling] = {}
        # What older refused changes have added to a counter: (writer, path) -> net.
        self._folded: dict[tuple[int, str], int] = {}
        # The same of those in `refused`: (writer, path) -> seq -> net; and by writer, oldest first.
        self._withheld: dict[tuple[int, str], dict[int, int]] = {}
        self._oldest: dict[int, deque[tuple[int, str]]] = {}

    # Looking

    def __bool__(self) -> bool:
        """Whether there is anything to be hidden."""
        return bool(self.refused or self.ceilings or self._folded)

    def hides(self, writer: int, seq: int) -> bool:
        """Whether a change is hidden."""
        ceiling = self.ceilings.get(writer)
        if ceiling is not None and seq > ceiling.seq:
            return True
        return seq in self.refused.get(writer, ()) and (writer, seq) not in self.released

    def hides_all(self, writer: int) -> bool:
        """Whether the whole lane of a writer is hidden."""
        ceiling = self.ceilings.get(writer)
        return ceiling is not None and ceiling.seq == 0

    def stand_in(self, writer: int, path: str, slot: Slot) -> Slot:
        """What the index has in place of a lane's *slot*: that itself if it can be seen."""
        if path[0] == "c":
            return self._counter(writer, path, slot)
        if not self.hides(writer, slot.seq):
            return slot
        return Slot(None, slot.seq, slot.stamp, NO_COVERS)

    def _counter(self, writer: int, path: str, slot: Slot) -> Slot:
        ceiling, place = self.ceilings.get(writer), (writer, path)
        withheld = self._withheld.get(place, {})
        if ceiling is not None and slot.seq > ceiling.seq:
            net = ceiling.counts.get(path, 0) + sum(
                added
                for seq, added in withheld.items()
                if seq <= ceiling.seq and (writer, seq) in self.released
            )
        else:
            less = self._folded.get(place, 0) + sum(
                added for seq, added in withheld.items() if (writer, seq) not in self.released
            )
            if not less:
                return slot
            net = net_of(slot) - less
        try:
            value = pack([max(net, 0), max(-net, 0)], "counter")
        except UnsupportedValue:
            # Somebody counts in numbers that nobody can read.
            value = pack([0, 0], "counter")
        return slot._replace(value=value)

    def places(self, writer: int) -> set[str]:
        """The paths at which refused changes of a writer stand."""
        found = {path for whose, path in self._folded if whose == writer}
        for refusal in self.refused.get(writer, {}).values():
            found.update(refusal.paths, refusal.counts)
        return found

    def withheld(self) -> Iterator[tuple[Dot, Refusal]]:
        """The refused changes that are hidden, by writer and seq."""
        for writer, refusals in sorted(self.refused.items()):
            for seq, refusal in sorted(refusals.items()):
                if (writer, seq) not in self.released:
                    yield Dot(writer, seq), refusal

    def counted(self, writer: int, path: str, slot: Slot) -> int:
        """What a lane counts without anything that was refused: for a `Ceiling`."""
        withheld = self._withheld.get((writer, path), {})
        return net_of(slot) - self._folded.get((writer, path), 0) - sum(withheld.values())

    # Changing

    def refuse(self, dot: Dot, refusal: Refusal) -> None:
        """Hide a change that is about to be delivered; those of a writer come in order."""
        self.refused.setdefault(dot.writer, {})[dot.seq] = refusal
        oldest = self._oldest.setdefault(dot.writer, deque())
        for path, added in sorted(refusal.counts.items()):
            self._withheld.setdefault((dot.writer, path), {})[dot.seq] = added
            oldest.append((dot.seq, path))
        while len(oldest) > WITHHELD_MAX:
            self._fold(dot.writer, *oldest.popleft())

    def _fold(self, writer: int, seq: int, path: str) -> None:
        place = writer, path
        self._folded[place] = self._folded.get(place, 0) + self._withheld[place].pop(seq)
        refusal = self.refused[writer][seq]
        counts = {where: added for where, added in refusal.counts.items() if where != path}
        self._renew(Dot(writer, seq), refusal._replace(counts=counts))

    def unrefuse(self, dot: Dot) -> None:
        """The change was not delivered after all. Only right for the newest of its writer."""
        refusal = self.refused[dot.writer][dot.seq]
        for path in refusal.counts:
            del self._withheld[dot.writer, path][dot.seq]
            self._oldest[dot.writer].remove((dot.seq, path))
        self._renew(dot, refusal._replace(paths=(), counts=NO_COUNTS))

    def _renew(self, dot: Dot, refusal: Refusal) -> None:
        refusals = self.refused[dot.writer]
        if refusal.paths or refusal.counts:
            refusals[dot.seq] = refusal
        else:
            del refusals[dot.seq]
            if not refusals:
                del self.refused[dot.writer]

    def stand(self, writer: int, seqs: Mapping[str, int]) -> None:
        """Of the refused changes of a writer, whose slots have the *seqs*, by path, keep what
        stands: no others count."""
        refusals = self.refused.get(writer, {})
        standing: dict[int, list[str]] = {}
        for path, seq in seqs.items():
            if path[0] != "c" and seq in refusals:
                standing.setdefault(seq, []).append(path)
        for seq, refusal in list(refusals.items()):
            paths = tuple(sorted((*standing.get(seq, ()), *refusal.counts)))
            if paths != refusal.paths or not paths:
                self._renew(Dot(writer, seq), refusal._replace(paths=paths))

    def emptied(self) -> Hiding:
        """The same without the refused changes: for a document that is loaded anew."""
        found = Hiding()
        found.released, found.ceilings = self.released, self.ceilings
        return found

    def joined(self, other: Hiding, newer: Iterable[int]) -> Hiding:
        """This, with the lanes of the writers *newer* as in *other*. What was refused of a lane is
        a function of its seq, so each side has all of its own."""
        found, theirs = self.emptied(), frozenset(newer)
        for source, is_theirs in ((self, False), (other, True)):
            for writer, refusals in source.refused.items():
                if (writer in theirs) == is_theirs:
                    found.refused[writer] = dict(refusals)
            for place, added in source._folded.items():
                if (place[0] in theirs) == is_theirs:
                    found._folded[place] = added
        found._count()
        return found

    def _count(self) -> None:
        for writer, refusals in self.refused.items():
            oldest = self._oldest[writer] = deque()
            for seq, refusal in sorted(refusals.items()):
                for path, added in sorted(refusal.counts.items()):
                    self._withheld.setdefault((writer, path), {})[seq] = added
                    oldest.append((seq, path))

    # As bytes

    def flat(self) -> list[Any]:
        """The refused changes as plain values, for a snapshot. Where they stand is not told: it
        follows from the document."""
        texts: dict[str, int] = {}

        def number(text: str) -> int:
            return texts.setdefault(text, len(texts))

        refused, counts = [], []
        for writer, refusals in sorted(self.refused.items()):
            numbers = [writer]
            for seq, refusal in sorted(refusals.items()):
                numbers += seq, refusal.stamp, number(refusal.agent), number(refusal.reason)
                for path, added in sorted(refusal.counts.items()):
                    counts.append([writer, seq, number(path), pack(added, path)])
            refused.append(numbers)
        for (writer, path), added in sorted(self._folded.items()):
            counts.append([writer, 0, number(path), pack(added, path)])
        return [list(texts), refused, counts]

    @classmethod
    def from_flat(cls, flat: Any, changes_max: int) -> Hiding:
        """Read what may come from anybody: of at most so many changes, and those that count;
        `stand` has to be told where they stand. Raises InvalidUpdate."""
        found = cls()
        try:
            texts, refused, counts = flat
            changes = sum(len(numbers) - 1 for numbers in refused) / 4
            if changes > changes_max + len(counts):
                raise InvalidUpdate("a snapshot refuses more changes than there can be")
            if not all(type(text) is str and len(text) <= TEXT_CHARS_MAX for text in texts):
                raise InvalidUpdate("a snapshot's refusals have malformed texts")
            for writer, *numbers in refused:
                found._read(writer, numbers, texts)
            for writer, seq, number, packed in counts:
                found._read_count(writer, seq, texts[_place(number, texts)], packed)
        except (TypeError, ValueError, AttributeError) as exc:
            raise InvalidUpdate(f"a snapshot's refusals are malformed: {exc}") from exc
        found._count()
        if any(len(oldest) > WITHHELD_MAX for oldest in found._oldest.values()):
            raise InvalidUpdate("a snapshot withholds more counts than it can")
        return found

    def _read(self, writer: object, numbers: Sequence[int], texts: Sequence[str]) -> None:
        for seq, stamp, agent, reason in zip(*[iter(numbers)] * 4, strict=True):
            dot = _dot(writer, seq)
            if type(stamp) is not int or not 0 <= stamp <= STAMP_MAX:
                raise InvalidUpdate("a snapshot refuses changes of no time")
            who, why = texts[_place(agent, texts)], texts[_place(reason, texts)]
            self.refused.setdefault(dot.writer, {})[dot.seq] = Refusal(who, stamp, why, ())

    def _read_count(self, writer: object, seq: object, path: str, packed: object) -> None:
        added = unpack(packed) if type(packed) is bytes else None
        if split_path(path)[0][0] != "c" or type(added) is not int:
            raise InvalidUpdate("a snapshot's counts are malformed")
        if seq == 0:
            self._folded[_dot(writer, 1).writer, path] = added
            return
        dot = _dot(writer, seq)
        refusal = self.refused.get(dot.writer, {}).get(dot.seq)
        if refusal is None:
            raise InvalidUpdate("a snapshot withholds counts of what it does not refuse")
        counts = {**refusal.counts, path: added}
        self.refused[dot.writer][dot.seq] = refusal._replace(counts=counts)


def net_of(slot: Slot | None) -> int:
    """What a lane counts."""
    if slot is None:
        return 0
    up, down = totals(slot)
    return up - down


def _dot(writer: object, seq: object) -> Dot:
    if type(writer) is not int or not 1 <= writer <= WRITER_MAX:
        raise InvalidUpdate("a snapshot refuses changes of nobody")
    if type(seq) is not int or not 1 <= seq <= SEQ_MAX:
        raise InvalidUpdate("a snapshot refuses changes that cannot be")
    return Dot(writer, seq)


def _place(number: object, texts: Sequence[str]) -> int:
    if type(number) is not int or not 0 <= number < len(texts):
        raise InvalidUpdate("a snapshot's refusals name no text")
    return number
