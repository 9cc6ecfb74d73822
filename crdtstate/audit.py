"""
The audit: what was resolved, voted, refused and commanded, as a chain that shows tampering.

Each replica keeps its own, beside its journal: a table of the store's SQLite file, or a list in
memory. A `Record` says who, when, where, what there was to choose from, what was chosen, by which
rule, and at which version of the document. These are recorded:

    resolution  a write over values that conflicted here: own ones, and those of others once, when
                their change is delivered. What conflicted is told as this replica saw it.
    decision    a majority of votes came about, or changed, by what was written or delivered here
    vote        this agent voted
    rejection   a peer broke the rules and what it sent was dropped; of a peer that does so again
                and again only the first few, and how many there were
    command     a command was carried out or refused here
    quarantine  a change of this agent was delivered that the rules of its document refuse
    release     this agent let such a change count after all

**What is guaranteed.** A record of a change (resolution, decision, vote, quarantine, release) is in
the same transaction as that change: after a crash both are there or neither, whatever the
durability. So a change that is durable has its record, exactly once; one that was lost and comes
again from peers is recorded then. A rejection or command is written with the next commit, and may
be lost if the process ends before. What came with a snapshot is told as far as can be seen:
conflicts that were open here and are not any more, without those that came and went in between.

**The chain.** Each row's hash covers the row and the hash before it (SHA-256), and one row beside
the table holds the newest hash and, once old rows were dropped, the *anchor*: the number and hash
of the last that was. ``crdtstate verify`` finds a row that was altered, removed, added or moved,
also at either end, and names the first. It cannot find a chain that somebody computed anew from
some row on, with the file in their hands; compare the newest hash with one noted elsewhere.

It is bounded by `Config.audit_max` rows and `Config.audit_bytes`; the oldest go. Long values are
named by length and hash, of many candidates the newest are told.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgpack

from crdtstate.change import Change
from crdtstate.clock import Dot, Stamp, Version
from crdtstate.conflict import VOTE, Candidate, Conflict, Resolution
from crdtstate.crdts import STRATEGIES
from crdtstate.digests import describe
from crdtstate.document import Delivery
from crdtstate.documents import DocumentSet
from crdtstate.errors import UnsupportedValue
from crdtstate.hiding import Refusal
from crdtstate.quarantine import QUARANTINE, heard, released
from crdtstate.slots import SEPARATOR
from crdtstate.values import pack, unpack
from crdtstate.votes import ELECTORATE, VOTES

KINDS = ("resolution", "decision", "vote", "rejection", "command", "quarantine", "release")

FORMAT = 1
HASH_BYTES = 32
NO_HASH = bytes(HASH_BYTES)

VALUE_BYTES_MAX = 1000
"""Longer values are not kept, but named by their hash."""

CANDIDATES_MAX = 16
"""Of more candidates than these the newest are kept."""

DETAIL_CHARS_MAX = 1000

REJECTIONS_AT_ONCE = 20
"""Rejections of one peer that are recorded; then one for each `REJECTIONS_EVERY_MS`."""

REJECTIONS_EVERY_MS = 60_000

REJECTIONS_MAX = 100
"""Rejections of all peers that are recorded in that time: else they would push out the rest."""

REJECTED_PEERS_MAX = 100

TRIM = 64
"""How many rows more than necessary are dropped at once."""


class Draft(NamedTuple):
    """A record before it has its place in the chain.

    Attributes:
        place: Container and key; empty where there is none.
        at: When it was recorded, in milliseconds since 1970.
        data: The rest, packed.
    """

    kind: str
    agent: str
    document: str
    place: str
    stamp: int
    at: int
    data: bytes


class Row(NamedTuple):
    """A record as it is stored: number, the fields of `Draft`, hash."""

    number: int
    kind: str
    agent: str
    document: str
    place: str
    stamp: int
    at: int
    data: bytes
    hash: bytes


class Query(NamedTuple):
    """Which records are wanted; None admits all."""

    after: int = 0
    since_ms: int = 0
    document: str | None = None
    place: str | None = None
    agent: str | None = None
    kind: str | None = None
    limit: int = 1000

    def admits(self, row: Row) -> bool:
        """Whether *row* is among them."""
        return (
            row.number > self.after
            and row.at >= self.since_ms
            and self.document in (None, row.document)
            and self.place in (None, row.place)
            and self.agent in (None, row.agent)
            and self.kind in (None, row.kind)
        )


def link(before: bytes, number: int, draft: Draft) -> Row:
    """Give a record its place in the chain, after the one with the hash *before*."""
    digest = hashlib.sha256(before + msgpack.packb([number, *draft])).digest()
    return Row(number, *draft, digest)


class Chain:
    """The end of a chain, and what it measures.

    Args:
        dropped: The number of the last row that was dropped.
        newest: The number of the newest row, and *head* its hash.
        sizes: The bytes of the rows that are there.
    """

    def __init__(
        self, dropped: int = 0, newest: int = 0, head: bytes = NO_HASH, sizes: Iterable[int] = ()
    ) -> None:
        self.dropped = dropped
        self.newest = newest
        self.head = head
        self._sizes = array("Q", sizes)
        self._bytes = sum(self._sizes)

    def add(self, draft: Draft) -> Row:
        """Link a record."""
        self.newest += 1
        row = link(self.head, self.newest, draft)
        self.head = row.hash
        self._sizes.append(size_of(len(row.data)))
        self._bytes += self._sizes[-1]
        return row

    def trim(self, rows_max: int, bytes_max: int) -> int:
        """Drop the oldest rows if there are too many; return the number of the last dropped."""
        if len(self._sizes) <= rows_max and self._bytes <= bytes_max:
            return self.dropped
        count, size = 0, self._bytes
        spare = min(TRIM, rows_max // 2)
        while len(self._sizes) - count > rows_max - spare or size > bytes_max:
            size -= self._sizes[count]
            count += 1
        del self._sizes[:count]
        self._bytes = size
        self.dropped += count
        return self.dropped


def size_of(length: int) -> int:
    """About the bytes that a row takes whose data have *length* bytes."""
    return length + 250


def broken(
    rows: Iterable[Row], dropped: int, anchor: bytes, newest: int, head: bytes
) -> Iterator[str]:
    """What is wrong with a chain: its first broken row, if there is one."""
    number, last = dropped, anchor
    for row in rows:
        number += 1
        if row.number != number:
            yield f"table audit, row {number}: missing; row {row.number} is what comes next"
            return
        if row != link(last, number, Draft(*row[1:-1])):
            yield f"table audit, row {number}: was altered, or what is before it (wrong SHA-256)"
            return
        last = row.hash
    if (number, last) != (newest, head):
        yield f"table audit, row {number + 1}: missing; the chain goes up to row {newest}"


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of the audit.

    Attributes:
        number: Its place in the chain of this replica.
        kind: ``"resolution"``, ``"decision"``, ``"vote"``, ``"rejection"``, ``"command"``,
            ``"quarantine"`` or ``"release"``.
        agent: Who did it; of a decision, whose change brought it about.
        stamp: When, by the hybrid logical clock of whoever did it.
        at: When it was recorded here.
        document: The document, or empty.
        path: The place, such as ``plan['goal']``, or empty.
        candidates: What there was to choose from, oldest first.
        chosen: What was written, voted for or decided; None also if it was removed.
        rule: Of a resolution see `Resolution`; of a decision ``"vote"``.
        version: The document's version, as the changes that no other builds on.
        detail: In words: why something was refused; the command; who voted how.
        hash: Covers this record and all before it.
    """

    number: int
    kind: str
    agent: str
    stamp: Stamp
    at: datetime
    document: str
    path: str
    candidates: tuple[Candidate, ...]
    chosen: Any
    rule: str
    version: Version
    detail: str
    hash: bytes

    @classmethod
    def read(cls, row: Row) -> Record:
        """Read a stored row. One that is damaged says so in its *detail*."""
        try:
            _, found, chosen, rule, heads, detail = msgpack.unpackb(row.data)
            candidates = tuple(
                Candidate(unpack(value), writer, agent, Stamp(stamp), seq)
                for value, writer, agent, stamp, seq in found
            )
            value, version = unpack(chosen), Version.from_flat(heads)
        except Exception:
            # Whatever somebody wrote into the file; the chain tells where it begins.
            candidates, value, rule, version = (), None, "", Version()
            detail = "this record is damaged; see: crdtstate verify"
        return cls(
            row.number,
            row.kind,
            row.agent,
            Stamp(row.stamp),
            datetime.fromtimestamp(row.at / 1000, UTC),
            row.document,
            _shown(row.place),
            candidates,
            value,
            rule,
            version,
            detail,
            row.hash,
        )

    def __str__(self) -> str:
        when = self.stamp.time.isoformat(timespec="milliseconds")
        parts = [f"{when} {self.kind} by {self.agent or 'somebody'}"]
        if self.path:
            over = ", ".join(f"{c.value!r} by {c.agent}" for c in self.candidates)
            how = f" ({self.rule})" if self.rule else ""
            parts.append(f"{self.document}: {self.path} = {self.chosen!r}{how} over {over}")
        if self.detail:
            parts.append(self.detail)
        return ": ".join(parts)


def _shown(place: str) -> str:
    container, _, key = place.partition(SEPARATOR)
    return f"{container[1:]}[{key!r}]" if container[:1] == "m" else container[1:]


def draft(
    kind: str,
    agent: str,
    stamp: int,
    at: int,
    *,
    conflict: Conflict | None = None,
    chosen: Any = None,
    rule: str = "",
    heads: Version | None = None,
    detail: str = "",
    document: str = "",
) -> Draft:
    """Write a record down."""
    found = conflict.candidates[-CANDIDATES_MAX:] if conflict is not None else ()
    candidates = [(_short(c.value), c.writer, c.agent, int(c.stamp), c.seq) for c in found]
    flat = heads.flat() if heads is not None else []
    rest = [FORMAT, candidates, _short(chosen), rule, flat, detail[:DETAIL_CHARS_MAX]]
    data: bytes = msgpack.packb(rest)
    place = ""
    if conflict is not None:
        document = conflict.document
        place = conflict.kind[0] + conflict.name + SEPARATOR + conflict.key
    return Draft(kind, agent, document, place, int(stamp), at, data)


def _short(value: Any) -> bytes:
    try:
        packed = pack(value, "audit")
    except UnsupportedValue:
        # What a strategy built.
        return pack(repr(value)[:100], "audit")
    if len(packed) <= VALUE_BYTES_MAX:
        return packed
    digest = hashlib.sha256(packed).hexdigest()
    return pack(f"<{len(packed)} bytes packed, SHA-256 {digest}>", "audit")


class Audit:
    """What one replica has to record, until it goes into the store with the change it tells of.

    Args:
        documents: The replica's documents.
        on_decided: Called with a place and whose change it was when votes decide something else
            there than before.
    """

    def __init__(
        self,
        documents: DocumentSet,
        on_decided: Callable[[tuple[str, str, str], str], None] = lambda place, agent: None,
    ) -> None:
        self._documents = documents
        self._on_decided = on_decided
        # Nothing is recorded while what is stored is loaded: it was, when it came.
        self.is_loading = False
        # Document -> what waits for its change, by dot; of a snapshot under `_SNAPSHOT`.
        self._waiting: dict[str, list[tuple[Dot, Draft]]] = {}
        # What votes have decided: place -> candidates and value.
        self._decided: dict[tuple[str, str, str], tuple[frozenset[Dot], bytes]] = {}
        # Peer -> rejections, and when the newest was recorded.
        self._rejected: dict[str, tuple[int, int]] = {}
        # Since when, and how many of all peers were recorded since.
        self._rejections = (0, 0)

    def begin(self) -> None:
        """All that is stored was loaded: what is decided by now is recorded already."""
        self._waiting.clear()
        self._decided.clear()
        for place in self._documents.polls.places():
            if (found := self._conflict(place)) is not None and found.rule == VOTE:
                self._decided[place] = found.dots, _short(found.value)

    def note(self, delivery: Delivery) -> None:
        """A change or snapshot was taken in: record what it resolved, voted and decided."""
        document, change = delivery.document, delivery.change
        if self.is_loading:
            return
        is_book = document.name in (VOTES, ELECTORATE)
        drafts = [self._quarantined(delivery, *each) for each in delivery.refused]
        if document.name == QUARANTINE and change is not None:
            drafts += self._released(delivery, change)
        has_votes = is_book or self._documents.find(VOTES) is not None
        if not delivery.resolutions and not has_votes and not drafts:
            return
        if not is_book:
            drafts += [self._resolved(delivery, r) for r in delivery.resolutions]
        if is_book and delivery.local:
            drafts += self._voted(delivery)
        if has_votes:
            drafts += self._newly_decided(delivery)
        if drafts:
            dot = _SNAPSHOT if change is None else change.dot
            self._waiting.setdefault(document.name, []).extend((dot, each) for each in drafts)

    def take(self, document: str, dot: Dot) -> list[Draft]:
        """What there is to record with a change, once."""
        waiting = self._waiting.get(document)
        if not waiting:
            return []
        taken = [each for at, each in waiting if at == dot]
        self._waiting[document] = [pair for pair in waiting if pair[0] != dot]
        return taken

    def take_with_snapshot(self, document: str) -> list[Draft]:
        """What there is to record with a snapshot that was taken in, once."""
        return self.take(document, _SNAPSHOT)

    # What is recorded

    def _resolved(self, delivery: Delivery, resolution: Resolution) -> Draft:
        return draft(
            "resolution",
            resolution.agent,
            resolution.stamp,
            self._documents.wall_ms(),
            conflict=resolution.conflict,
            chosen=resolution.value,
            rule=resolution.rule,
            heads=Version(delivery.document.heads),
            detail="removed" if resolution.removed else _told(resolution.conflict),
        )

    def _quarantined(self, delivery: Delivery, dot: Dot, refusal: Refusal) -> Draft:
        """A change that the rules of its document refuse."""
        paths = ", ".join(describe(path) for path in refusal.paths)
        return draft(
            "quarantine",
            refusal.agent,
            refusal.stamp,
            self._documents.wall_ms(),
            heads=Version(delivery.document.heads),
            detail=f"change {dot.writer:x}:{dot.seq}: {refusal.reason}: {paths}",
            document=delivery.document.name,
        )

    def _released(self, delivery: Delivery, change: Change) -> Iterator[Draft]:
        """What a change of ``@quarantine`` releases, or hides again."""
        for name, dot in heard(delivery.paths):
            is_released = dot in released(delivery.document, name)
            why = f": {change.origin.message}" if change.origin.message else ""
            what = "counts from now on" if is_released else "is hidden again"
            yield draft(
                "release",
                change.origin.agent,
                change.stamp,
                self._documents.wall_ms(),
                heads=Version(delivery.document.heads),
                detail=f"change {dot.writer:x}:{dot.seq} {what}{why}",
                document=name,
            )

    def _voted(self, delivery: Delivery) -> Iterator[Draft]:
        """Own votes."""
        assert delivery.change is not None
        for key in _keys(delivery.paths, "mballots"):
            vote = self._documents.polls.vote_at(key)
            conflict = self._conflict(vote[1]) if vote is not None else None
            if vote is None or conflict is None or not key.endswith(f"/{self._documents.agent}"):
                continue
            chosen = [each.value for each in conflict.candidates if each.dot == vote[0]]
            if chosen:
                yield draft(
                    "vote",
                    self._documents.agent,
                    delivery.change.stamp,
                    self._documents.wall_ms(),
                    conflict=conflict,
                    chosen=chosen[0],
                    rule=VOTE,
                    heads=self._heads(conflict.document),
                )

    def _newly_decided(self, delivery: Delivery) -> Iterator[Draft]:
        """Majorities that this brought about."""
        change = delivery.change
        agent = change.origin.agent if change is not None else ""
        for place in self._affected(delivery):
            found = self._conflict(place)
            if found is None or found.rule != VOTE:
                if self._decided.pop(place, None) is not None and found is not None:
                    self._on_decided(place, agent)
                continue
            what = found.dots, _short(found.value)
            if self._decided.get(place) != what:
                self._decided[place] = what
                self._on_decided(place, agent)
                yield draft(
                    "decision",
                    agent,
                    change.stamp if change is not None else delivery.document.stamp,
                    self._documents.wall_ms(),
                    conflict=found,
                    chosen=found.value,
                    rule=VOTE,
                    heads=self._heads(found.document),
                    detail=_told(found),
                )

    def _affected(self, delivery: Delivery) -> set[tuple[str, str, str]]:
        """Where what votes decide may be different now."""
        document, paths, polls = delivery.document, delivery.paths, self._documents.polls
        if document.name == ELECTORATE:
            return polls.places()
        if document.name == VOTES:
            if delivery.change is None or any(path.startswith("mrules") for path in paths):
                return polls.places()
            votes = [polls.vote_at(key) for key in _keys(paths, "mballots")]
            return {vote[1] for vote in votes if vote is not None}
        if any(path.startswith(STRATEGIES) for path in paths):
            return {place for place in polls.places() if place[0] == document.name}
        found = set()
        containers = document.lanes.containers
        for path in paths:
            container, _, key = path.partition(SEPARATOR)
            place = document.name, container, key
            cells = containers.get(container)
            if place in self._decided or (cells is not None and key in cells.contested):
                found.add(place)
        return found

    def _conflict(self, place: tuple[str, str, str]) -> Conflict | None:
        name, container, key = place
        document = self._documents.find(name)
        return document.conflict(container, key) if document is not None else None

    def _heads(self, name: str) -> Version:
        document = self._documents.find(name)
        return Version(document.heads) if document is not None else Version()

    def rejected(self, peer: str, reason: str) -> Draft | None:
        """What *peer* sent was refused; None if that is one of too many."""
        now = self._documents.wall_ms()
        count, last = self._rejected.pop(peer, (0, 0))
        count += 1
        since, recorded = self._rejections
        if now - since >= REJECTIONS_EVERY_MS:
            since, recorded = now, 0
        is_due = count <= REJECTIONS_AT_ONCE or now - last >= REJECTIONS_EVERY_MS
        is_due = is_due and recorded < REJECTIONS_MAX
        self._rejections = since, recorded + is_due
        if len(self._rejected) >= REJECTED_PEERS_MAX:
            del self._rejected[next(iter(self._rejected))]
        self._rejected[peer] = count, now if is_due else last
        if not is_due:
            return None
        detail = reason if count <= REJECTIONS_AT_ONCE else f"{reason} (number {count})"
        return draft("rejection", peer, self._documents.next_stamp(), now, detail=detail)

    def commanded(self, agent: str, stamp: int, detail: str) -> Draft:
        """A command of *agent* was carried out or refused."""
        return draft("command", agent, stamp, self._documents.wall_ms(), detail=detail)


_SNAPSHOT = Dot(0, 0)


def _keys(paths: Sequence[str], container: str) -> Iterator[str]:
    for path in paths:
        name, _, key = path.partition(SEPARATOR)
        if name == container:
            yield key


def _told(conflict: Conflict) -> str:
    """Who voted how, in words."""
    return ", ".join(
        f"{vote.agent} for {vote.value!r:.60}" + ("" if vote.counts else " (too late)")
        for vote in conflict.votes
    )
