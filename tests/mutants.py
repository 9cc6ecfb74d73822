"""
Mutants: bugs planted on purpose, to see whether the campaign finds them.

Each is a function that patches one thing. ``python tests/mutants.py NAME SEEDS`` plants it in this
process, runs seeds until one fails, and prints which, and which invariant told. A mutant that
survives means that the campaign is too weak; one that merely crashes the harness does not count.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from crdtstate import consistency, document, lanes, outgoing, slots, sync
from crdtstate.change import Change
from crdtstate.clock import Version
from crdtstate.comparing import Comparing
from crdtstate.consistency import StrongRead, StrongWrite
from crdtstate.document import Document
from crdtstate.lanes import Lanes
from crdtstate.leases import Leases, Loan
from crdtstate.ledger import Ledger
from crdtstate.pending import Pending
from crdtstate.quorum import Quorum
from crdtstate.serving import Serving
from crdtstate.simulation import run_seed, shell
from crdtstate.stores.index import DocumentIndex
from crdtstate.sync import Sync
from crdtstate.wants import Wants

MUTANTS: dict[str, Callable[[], None]] = {}


STRONG: dict[str, Callable[[], None]] = {}
"""Those that break strong operations and receipts; test_consistency.py has scenarios for each."""


def mutant(plant: Callable[[], None]) -> Callable[[], None]:
    MUTANTS[plant.__name__] = plant
    return plant


def strong(plant: Callable[[], None]) -> Callable[[], None]:
    STRONG[plant.__name__] = plant
    return mutant(plant)


def rare(plant: Callable[[], None]) -> Callable[[], None]:
    """One that the campaign would hardly ever meet."""
    STRONG[plant.__name__] = plant
    return plant


# Documents


@mutant
def no_causal_delivery() -> None:
    def is_ready(self: Document, change: Change) -> bool:
        return self.version.get(change.writer, 0) == change.seq - 1

    Document.is_ready = is_ready


@mutant
def empty_covers() -> None:
    document.covering = lambda cell, writer: slots.NO_COVERS


@mutant
def removals_dropped_early() -> None:
    settled = Lanes._is_settled

    def is_settled(self: Lanes, writer: int, path: str, slot: Any = None) -> bool:
        own = self.own_slot(path) if writer == self.writer else None
        return (own is not None and own.value is None) or settled(self, writer, path, slot)

    Lanes._is_settled = is_settled


@mutant
def covered_slots_never_dropped() -> None:
    Lanes._is_settled = lambda self, writer, path, slot=None: False


@mutant
def cleaning_forgets_a_slot() -> None:
    live_paths = lanes.Lane.live_paths

    def forgetful(self: lanes.Lane, segment: lanes.Segment) -> list[str]:
        first, *others = live_paths(self, segment) or [""]
        self.leave(first)
        return others

    lanes.Lane.live_paths = forgetful


@mutant
def snapshot_replaces_what_is_there() -> None:
    Lanes.join = lambda self, state, newer: state


@mutant
def heads_never_replaced() -> None:
    deliver = Document._deliver

    def keep(self: Document, change: Change) -> None:
        heads = dict(self.heads)
        deliver(self, change)
        self.heads = heads | self.heads

    Document._deliver = keep


@mutant
def adopters_drop_what_is_live() -> None:
    settled = Lanes._is_settled

    def is_settled(self: Lanes, writer: int, path: str, slot: Any = None) -> bool:
        return writer != self.writer or settled(self, writer, path, slot)

    Lanes._is_settled = is_settled


# Sync


@mutant
def dot_reused_after_a_crash_that_lost_the_tail() -> None:
    shell.may_keep_writer = lambda session: session.writer is not None


@mutant
def have_before_commit() -> None:
    persist = Sync._persist

    def eager(self: Sync, change: Change, own: Change | None) -> None:
        persist(self, change, own)
        self._commit(change.document, {change.writer: change.seq})

    Sync._persist = eager


@mutant
def sent_before_commit() -> None:
    local_changes = Sync.local_changes

    def eager(self: Sync, changes: Any, now: float) -> None:
        listed = list(changes)
        local_changes(self, listed, now)
        for change in listed:
            self._outgoing.add(change, None)

    Sync.local_changes = eager


@mutant
def no_want() -> None:
    def choose(self: Wants, *_: Any) -> dict[Any, Any]:
        for want in self._wants.values():
            want.due = float("inf")
        return {}

    Wants._choose = choose


@mutant
def snapshot_cut_at_received() -> None:
    init = Sync.__init__

    def begin(self: Sync, *args: Any) -> None:
        init(self, *args)
        offer = self._serving.uploads.offer

        def offer_more(name: str, floor: Any, now: float, take: Any) -> None:
            received = {
                writer: max(seqs)
                for (document, writer), seqs in self._pending.seqs().items()
                if document == name
            }
            made = take()
            version = Version(made.version)
            version.merge(received)
            ids = {writer: made.ids.get(writer, bytes(16)) for writer in version}
            offer(name, floor, now, lambda: made._replace(version=version, ids=ids))

        self._serving.uploads.offer = offer_more  # type: ignore[method-assign]

    Sync.__init__ = begin


@mutant
def snapshot_with_uncommitted_changes() -> None:
    Ledger.has_own_unsettled = lambda self, document: False


@mutant
def log_floor_above_delivered() -> None:
    compact = DocumentIndex.compact

    def greedy(self: DocumentIndex, version: Version, keep_bytes: int) -> Any:
        forgotten = compact(self, version, keep_bytes)
        for writer, index in self.writers.items():
            if index.first > version.get(writer, 0) and index.first > 1:
                index.first += 1
        return forgotten

    DocumentIndex.compact = greedy


@mutant
def log_floor_understated() -> None:
    floor = DocumentIndex.floor

    def lower(self: DocumentIndex) -> Version:
        return Version({writer: seq - 1 for writer, seq in floor(self).items() if seq > 1})

    DocumentIndex.floor = lower


@mutant
def no_deduplication() -> None:
    def take(self: Sync, link: Any, change: Change) -> None:
        found = self._find_or_make(change.document, change.shared)
        if found.version.get(change.writer, 0) >= change.seq:
            self._effects.append(sync.Delivered(found, change, [], ""))
        else:
            original(self, link, change)

    original = Sync._take
    Sync._take = take


@mutant
def fingerprint_ignored() -> None:
    on_heartbeat = Sync._on_heartbeat

    def beat(self: Sync, link: Any, frame: Any) -> None:
        on_heartbeat(self, link, frame)
        link.mismatches = 0

    Sync._on_heartbeat = beat


@mutant
def pending_unbounded() -> None:
    Pending._has_room = lambda self, change: True


@mutant
def pending_forgotten_after_a_snapshot() -> None:
    Sync._retry_pending = lambda self, found: self._pending._parked.clear()


@mutant
def want_below_the_floor_unanswered() -> None:
    Serving.offer = lambda self, name, now: None


@mutant
def forwards_nothing() -> None:
    may_lack = outgoing._may_lack

    def own_only(link: Any, change: Change, source: Any, mesh: Any) -> bool:
        return source is None and may_lack(link, change, source, mesh)

    def asks_nobody(self: Wants, *_: Any) -> dict[Any, Any]:
        self._wants.clear()
        return {}

    outgoing._may_lack = own_only
    Wants._choose = asks_nobody


# Comparing


@mutant
def alarm_without_waiting_for_what_the_other_had() -> None:
    settle = Comparing._is_settled
    Comparing._is_settled = lambda self, missing, now: settle(self, missing._replace(heads={}), now)


# Leases


@mutant
def borrower_writes_too_early() -> None:
    def has_all(self: Loan, have: Any) -> bool:
        self._lacking.clear()
        return True

    Loan.has_all = has_all


@mutant
def loan_ends_before_the_lender_has_everything() -> None:
    def give_back(self: Loan, writer: int, written: Any, peers: Any) -> Any:
        for link in peers:
            if link.writer == self._lender:
                self.was_given_back = True
                return link.peer, {**self._seqs, **written}
        return None

    def take_back(self: Leases, writer: int, written: Any, committed: Any) -> bool:
        if writer not in self._lent:
            return False
        del self._lent[writer]
        self._free.append(writer)
        return True

    Loan.give_back = give_back
    Leases.take_back = take_back


# Consistency


@strong
def strong_without_asking() -> None:
    def collect(self: Any, now: float) -> None:
        self._target = Version()

    StrongRead._collect = collect
    StrongWrite._collect = collect


@rare
def writes_without_asking() -> None:
    def collect(self: Any, now: float) -> None:
        self._target = Version()

    StrongWrite._collect = collect


@rare
def reads_without_write_back() -> None:
    StrongRead._is_held = lambda self, dot: True


@strong
def answers_before_synced() -> None:
    attempt = Quorum._try

    def hasty(self: Quorum, waiting: Any, persisted: int, synced: int) -> None:
        attempt(self, waiting, persisted, persisted)

    Quorum._try = hasty


@rare
def strong_stamps_from_the_clock_alone() -> None:
    Document.put_above = lambda self, container, key, value: self.put(container, key, value)


@rare
def answers_before_committed() -> None:
    init = Sync.__init__

    def begin(self: Sync, *args: Any) -> None:
        init(self, *args)
        self._quorum._committed = lambda name: self._version(name).copy()

    Sync.__init__ = begin


@strong
def one_voter_is_enough() -> None:
    consistency.majority = lambda voters: 1


def kills(seeds: int) -> Iterator[tuple[int, str, str]]:
    """The seeds that fail, with the invariant and what it said."""
    for seed in range(seeds):
        outcome = run_seed(seed)
        if outcome.failure is not None:
            yield seed, outcome.failure.invariant, outcome.failure.detail


if __name__ == "__main__":
    MUTANTS[sys.argv[1]]()
    print(json.dumps(next(kills(int(sys.argv[2])), None)))
