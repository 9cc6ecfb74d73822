"""The contract of a store, kept by every one of them, and what those with a file keep besides."""

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from crdtstate.clock import Version
from crdtstate.stores import Entry, Saved, Session, Store
from crdtstate.stores.journal import Journal
from crdtstate.stores.memory import MemoryStore

ANNA, BERT = 2**53 - 1, 7
NEW = Session(None, None, False, False, False, False)


@dataclass
class Opened:
    """A started store, and how to wait for it."""

    store: Store
    progress: threading.Event = field(default_factory=threading.Event)

    def start(self) -> "Opened":
        self.store.start("agent", ANNA, self.progress.set)
        return self

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            assert self.progress.wait(10), "no progress for 10 seconds"
            self.progress.clear()

    def append(self, *entries: Entry) -> int:
        """Append and wait for the commit."""
        ticket = self.store.append(entries)
        self.wait_for(lambda: self.store.committed >= ticket)
        return ticket

    def compact(self, document: str, version: dict[int, int], keep_bytes: int = 0) -> None:
        """Compact and wait until that is committed, too."""
        self.store.compact(saved(document, version), keep_bytes)
        self.append()


def change(document: str, writer: int, seq: int, size: int = 10) -> Entry:
    return Entry(document, writer, seq, f"{document} {writer} {seq} ".encode().ljust(size, b"."))


def changes(document: str, writer: int, first: int, last: int) -> list[Entry]:
    return [change(document, writer, seq) for seq in range(first, last + 1)]


def saved(document: str, version: dict[int, int]) -> Saved:
    return Saved(document, Version(version), f"{document} at {sorted(version.items())}".encode())


def data(entries: list[Entry]) -> list[bytes]:
    return [entry.data for entry in entries]


def read(store: Store, document: str, writer: int, first: int, last: int) -> list[bytes]:
    """One range, whatever its size."""
    found, is_more = store.read(document, [(writer, first, last)], 10**9)
    assert not is_more
    return found


Opener = Callable[[], Opened]


def opener_of(kind: str, path: Path) -> Iterator[Opener]:
    """A way to open the store of that *kind*; opening it again closes it before."""
    opened: list[Opened] = []

    def open_it() -> Opened:
        for before in opened:
            before.store.close()
        match kind:
            case "memory":
                store: Store = MemoryStore()
            case "process":
                store = Journal(path)
            case "power":
                store = Journal(path, durability="power")
        opened.append(Opened(store).start())
        return opened[-1]

    yield open_it
    for before in opened:
        before.store.close()


@pytest.fixture(params=["memory", "process", "power"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    yield from opener_of(request.param, tmp_path / "state.db")


@pytest.fixture(params=["process", "power"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    yield from opener_of(request.param, tmp_path / "state.db")


# Appending


def test_a_new_store_is_empty(open_store: Opener) -> None:
    store = open_store().store

    assert store.session == NEW
    assert (store.committed, store.synced, store.failure) == (0, 0, None)
    assert list(store.load()) == []
    assert store.read("plan", [(ANNA, 1, 9)], 100) == ([], False)
    assert store.floor("plan") == {}
    assert store.size("plan") == 0


def test_batches_get_tickets_in_order_and_are_committed_and_synced_in_that_order(
    open_store: Opener,
) -> None:
    opened = open_store()
    store = opened.store

    tickets = [store.append([change("plan", ANNA, seq)]) for seq in range(1, 6)]

    assert tickets == [1, 2, 3, 4, 5]
    opened.wait_for(lambda: store.synced <= store.committed == 5)
    opened.wait_for(lambda: store.synced == store.committed == 5)
    assert store.failure is None


def test_an_empty_batch_has_a_ticket_too(open_store: Opener) -> None:
    opened = open_store()

    assert opened.append() == 1
    assert opened.append(change("plan", ANNA, 1)) == 2


def test_entries_come_back_in_the_order_of_delivery(open_store: Opener) -> None:
    opened = open_store()
    entries = [
        change("plan", ANNA, 1),
        change("notes", BERT, 1),
        change("plan", BERT, 1),
        change("plan", ANNA, 2),
        change("notes", ANNA, 1),
    ]

    opened.append(*entries[:2])
    opened.append(*entries[2:])

    assert list(opened.store.load()) == entries


def test_a_change_that_would_leave_a_gap_or_come_twice_is_a_bug_of_the_caller(
    open_store: Opener,
) -> None:
    opened = open_store()
    opened.append(change("plan", ANNA, 1))

    for seq in (1, 3):
        with pytest.raises(AssertionError, match="I7"):
            opened.store.append([change("plan", ANNA, seq)])

    assert list(opened.store.load()) == [change("plan", ANNA, 1)]


@pytest.mark.parametrize("seed", range(8))
def test_what_is_loaded_is_the_snapshots_and_what_they_lack(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    stores = opener_of("process", tmp_path / "state.db")
    open_it = next(stores)
    opened = open_it()
    delivered: list[Entry] = []
    versions: dict[str, dict[int, int]] = {"plan": {}, "notes": {}}
    kept: dict[str, Saved] = {}
    for _ in range(40):
        name, writer = rng.choice(["plan", "plan", "notes"]), rng.choice([ANNA, BERT])
        seq = versions[name][writer] = versions[name].get(writer, 0) + 1
        delivered.append(change(name, writer, seq))
        opened.append(delivered[-1])
        if rng.random() < 0.1:
            # A snapshot may be a little older than what is in the journal by then.
            at = {who: max(1, seq - rng.choice([0, 0, 3])) for who, seq in versions[name].items()}
            before = kept[name].version if name in kept else Version()
            if before <= Version(at):
                kept[name] = saved(name, at)
                opened.compact(name, at, rng.choice([0, 50, 10**6]))
        if rng.random() < 0.05:
            opened = open_it()

        found = list(opened.store.load())

        snapshots = [each for each in found if isinstance(each, Saved)]
        assert {each.document: each for each in snapshots} == kept
        assert found[len(snapshots) :] == [
            each
            for each in delivered
            if each.document not in kept
            or not kept[each.document].version.covers((each.writer, each.seq))
        ]
    opened.store.close()


# Reading ranges


def test_a_range_of_one_writers_changes_is_read_in_order(open_store: Opener) -> None:
    opened = open_store()
    for seq in range(1, 6):
        opened.append(change("plan", BERT, seq), change("plan", ANNA, seq))

    assert read(opened.store, "plan", ANNA, 2, 4) == data(changes("plan", ANNA, 2, 4))


def test_several_ranges_are_read_in_the_order_of_delivery(open_store: Opener) -> None:
    opened = open_store()
    entries = [
        change("plan", BERT, 1),
        change("plan", ANNA, 1),
        change("plan", ANNA, 2),
        change("plan", BERT, 2),
        change("plan", ANNA, 3),
    ]
    opened.append(*entries)

    found = opened.store.read("plan", [(ANNA, 2, 3), (BERT, 1, 2)], 1000)

    assert found == (data([entries[0], *entries[2:]]), False)


def test_a_range_ends_where_the_journal_does(open_store: Opener) -> None:
    opened = open_store()
    opened.append(*changes("plan", ANNA, 1, 3))

    assert read(opened.store, "plan", ANNA, 2, 99) == data(changes("plan", ANNA, 2, 3))
    assert read(opened.store, "plan", ANNA, 4, 9) == []
    assert read(opened.store, "plan", ANNA, 3, 2) == []
    assert read(opened.store, "plan", BERT, 1, 9) == []
    assert read(opened.store, "notes", ANNA, 1, 9) == []


def test_an_answer_ends_at_the_size_but_has_one_change_at_least(open_store: Opener) -> None:
    opened = open_store()
    entries = [change("plan", ANNA, seq, size=100) for seq in range(1, 6)]
    opened.append(*entries)
    ask = opened.store.read

    assert ask("plan", [(ANNA, 1, 5)], 1) == (data(entries[:1]), True)
    assert ask("plan", [(ANNA, 1, 5)], 299) == (data(entries[:2]), True)
    assert ask("plan", [(ANNA, 1, 5)], 300) == (data(entries[:3]), True)
    assert ask("plan", [(ANNA, 3, 4)], 200) == (data(entries[2:4]), False)
    assert ask("plan", [(ANNA, 1, 2), (ANNA, 5, 5)], 10_000) == (
        data([*entries[:2], entries[4]]),
        False,
    )


# Compacting


def test_what_the_snapshot_contains_is_not_loaded_but_can_be_read(open_store: Opener) -> None:
    opened = open_store()
    opened.append(*changes("plan", ANNA, 1, 4), change("plan", BERT, 1))

    opened.compact("plan", {ANNA: 3}, keep_bytes=1000)

    rest = [change("plan", ANNA, 4), change("plan", BERT, 1)]
    assert list(opened.store.load()) == [saved("plan", {ANNA: 3}), *rest]
    assert opened.store.floor("plan") == {}
    assert read(opened.store, "plan", ANNA, 1, 4) == data(changes("plan", ANNA, 1, 4))


def test_a_newer_snapshot_takes_the_older_ones_place(open_store: Opener) -> None:
    opened = open_store()
    opened.append(*changes("plan", ANNA, 1, 4))

    opened.compact("plan", {ANNA: 2})
    opened.compact("plan", {ANNA: 4})

    assert list(opened.store.load()) == [saved("plan", {ANNA: 4})]


def test_the_oldest_contained_changes_are_forgotten_until_few_enough_bytes_stay(
    open_store: Opener,
) -> None:
    opened = open_store()
    for seq in range(1, 6):
        opened.append(change("plan", ANNA, seq, size=100), change("plan", BERT, seq, size=100))

    opened.compact("plan", {ANNA: 4, BERT: 5}, keep_bytes=599)

    # Of the nine that are contained, the newest five stay.
    assert opened.store.floor("plan") == {ANNA: 2, BERT: 2}
    assert read(opened.store, "plan", ANNA, 2, 5) == []
    assert len(read(opened.store, "plan", ANNA, 3, 5)) == 3
    assert len(read(opened.store, "plan", BERT, 3, 5)) == 3


def test_the_snapshot_of_one_document_can_be_read_alone(open_store: Opener) -> None:
    opened = open_store()
    opened.append(change("plan", ANNA, 1), change("notes", ANNA, 1))
    opened.compact("plan", {ANNA: 1})
    opened.append(change("plan", ANNA, 2))

    assert opened.store.saved("plan") == saved("plan", {ANNA: 1})
    assert opened.store.saved("notes") is None and opened.store.saved("tasks") is None
    opened.compact("plan", {ANNA: 2})
    assert opened.store.saved("plan") == saved("plan", {ANNA: 2})


def test_what_the_snapshot_does_not_contain_is_never_forgotten(open_store: Opener) -> None:
    opened = open_store()
    opened.append(*changes("plan", ANNA, 1, 3), *changes("plan", BERT, 1, 3))

    opened.compact("plan", {ANNA: 2})

    assert opened.store.floor("plan") == {ANNA: 2}
    assert read(opened.store, "plan", ANNA, 3, 3) == data(changes("plan", ANNA, 3, 3))
    assert read(opened.store, "plan", BERT, 1, 3) == data(changes("plan", BERT, 1, 3))


def test_compacting_leaves_other_documents_alone(open_store: Opener) -> None:
    opened = open_store()
    opened.append(*changes("plan", ANNA, 1, 3), *changes("notes", ANNA, 1, 3))

    opened.compact("plan", {ANNA: 3})

    assert opened.store.floor("notes") == {}
    assert list(opened.store.load())[1:] == changes("notes", ANNA, 1, 3)


def test_a_snapshot_from_a_peer_lets_the_journal_skip_ahead(open_store: Opener) -> None:
    opened = open_store()
    opened.append(*changes("plan", ANNA, 1, 3))

    opened.compact("plan", {ANNA: 10, BERT: 5}, keep_bytes=1000)
    opened.append(change("plan", ANNA, 11), change("plan", BERT, 6))

    assert opened.store.floor("plan") == {ANNA: 10, BERT: 5}
    assert read(opened.store, "plan", ANNA, 2, 11) == []
    assert read(opened.store, "plan", ANNA, 11, 11) == [change("plan", ANNA, 11).data]
    assert list(opened.store.load()) == [
        saved("plan", {ANNA: 10, BERT: 5}),
        change("plan", ANNA, 11),
        change("plan", BERT, 6),
    ]


def test_a_snapshot_below_the_floor_is_a_bug_of_the_caller(open_store: Opener) -> None:
    opened = open_store()
    opened.append(*changes("plan", ANNA, 1, 3))
    opened.compact("plan", {ANNA: 3})

    with pytest.raises(AssertionError, match="I7"):
        opened.store.compact(saved("plan", {ANNA: 2}), 0)


def test_the_size_is_what_the_snapshot_lacks(open_store: Opener) -> None:
    opened = open_store()
    entries = [change("plan", ANNA, seq, size=100) for seq in range(1, 6)]
    opened.append(*entries)
    assert opened.store.size("plan") == 500

    opened.compact("plan", {ANNA: 3}, keep_bytes=200)
    assert opened.store.size("plan") == 200

    opened.append(change("plan", ANNA, 6, size=100))
    assert opened.store.size("plan") == 300


def test_what_is_kept_is_all_that_was_not_forgotten(open_store: Opener) -> None:
    opened = open_store()
    opened.append(*[change("plan", ANNA, seq, size=100) for seq in range(1, 6)])
    opened.append(change("plan", BERT, 1, size=50), change("notes", BERT, 1, size=10))
    assert opened.store.kept("plan") == 550

    opened.compact("plan", {ANNA: 4}, keep_bytes=200)
    assert opened.store.kept("plan") == 350
    assert (opened.store.kept("notes"), opened.store.kept("nothing")) == (10, 0)

    opened.store.forget(ANNA, {"plan": 4})
    assert opened.store.kept("plan") == 250


# Removing


def test_changes_of_a_lost_future_can_be_removed(open_store: Opener) -> None:
    opened = open_store()
    opened.append(*changes("plan", ANNA, 1, 5), *changes("plan", BERT, 1, 2))
    opened.append(*changes("notes", ANNA, 1, 3))
    opened.compact("plan", {ANNA: 2}, keep_bytes=1000)
    size = opened.store.size("plan")

    opened.store.forget(ANNA, {"plan": 3})

    assert read(opened.store, "plan", ANNA, 1, 5) == data(changes("plan", ANNA, 1, 3))
    assert read(opened.store, "notes", ANNA, 1, 3) == []
    assert opened.store.size("plan") == size - sum(map(len, data(changes("plan", ANNA, 4, 5))))
    assert opened.store.size("notes") == 0
    other = [Entry("plan", ANNA, 4, b"as it was"), Entry("notes", ANNA, 1, b"so was this")]
    opened.append(*other)
    rest = [change("plan", ANNA, 3), *changes("plan", BERT, 1, 2), *other]
    assert list(opened.store.load()) == [saved("plan", {ANNA: 2}), *rest]


def test_changes_that_are_still_queued_are_removed_too(open_store: Opener) -> None:
    opened = open_store()
    for entry in changes("plan", ANNA, 1, 50):
        opened.store.append([entry])

    opened.store.forget(ANNA, {"plan": 2})

    opened.append()
    assert list(opened.store.load()) == changes("plan", ANNA, 1, 2)


# Coming back


def test_everything_is_there_after_reopening(reopen: Opener) -> None:
    opened = reopen()
    opened.append(*changes("plan", ANNA, 1, 9), *changes("notes", BERT, 1, 2))
    opened.compact("plan", {ANNA: 5}, keep_bytes=25)
    before = list(opened.store.load())

    opened = reopen()

    assert (opened.store.committed, opened.store.synced) == (0, 0)
    assert list(opened.store.load()) == before
    assert opened.store.floor("plan") == {ANNA: 4}
    assert read(opened.store, "plan", ANNA, 4, 9) == []
    assert read(opened.store, "plan", ANNA, 5, 9) == data(changes("plan", ANNA, 5, 9))
    assert opened.store.size("plan") == sum(map(len, data(changes("plan", ANNA, 6, 9))))
    opened.append(change("plan", ANNA, 10), change("notes", BERT, 3), change("todo", BERT, 1))
    assert list(reopen().store.load())[-3:] == [
        change("plan", ANNA, 10),
        change("notes", BERT, 3),
        change("todo", BERT, 1),
    ]


def test_what_was_removed_stays_removed(reopen: Opener) -> None:
    opened = reopen()
    opened.append(*changes("plan", ANNA, 1, 5))

    opened.store.forget(ANNA, {"plan": 2})
    opened = reopen()
    opened.append(Entry("plan", ANNA, 3, b"as it was"))

    assert list(reopen().store.load()) == [
        *changes("plan", ANNA, 1, 2),
        Entry("plan", ANNA, 3, b"as it was"),
    ]


def test_a_journal_that_has_forgotten_all_goes_on_where_it_was(reopen: Opener) -> None:
    opened = reopen()
    opened.append(*changes("plan", ANNA, 1, 3))
    opened.compact("plan", {ANNA: 3})

    opened = reopen()
    opened.append(change("plan", ANNA, 4))

    assert opened.store.floor("plan") == {ANNA: 3}
    assert list(reopen().store.load()) == [saved("plan", {ANNA: 3}), change("plan", ANNA, 4)]


def test_the_next_opener_learns_who_closed_the_store(reopen: Opener) -> None:
    assert reopen().store.session == NEW
    second = reopen()

    session = second.store.session
    assert (session.agent, session.writer) == ("agent", ANNA)
    assert session.clean and session.same_boot and session.same_file
    assert session.power_safe == (getattr(second.store, "durability", None) == "power")


# Against a model that keeps everything


@pytest.mark.parametrize("seed", range(5))
def test_random_histories_match_a_plain_list(open_store: Opener, seed: int) -> None:
    rng = random.Random(seed)
    opened = open_store()
    history: list[Entry] = []
    snapshots: dict[str, Version] = {}
    newest = {(d, w): 0 for d in ("plan", "notes") for w in (ANNA, BERT, 3)}

    for _ in range(60):
        batch = []
        for document, writer in rng.choices(list(newest), k=rng.randrange(4)):
            newest[document, writer] += 1
            batch.append(change(document, writer, newest[document, writer], rng.randrange(90)))
        opened.append(*batch)
        history += batch
        if rng.random() < 0.2:
            document = rng.choice(["plan", "notes"])
            version = snapshots.get(document, Version()).copy()
            for (d, writer), seq in newest.items():
                if d == document and seq:
                    version[writer] = rng.randint(version.get(writer, 0), seq)
            keep_bytes = rng.randrange(1000)
            opened.compact(document, version, keep_bytes)
            snapshots[document] = version
            floor = opened.store.floor(document)
            kept = [
                e
                for e in history
                if e.document == document and version.covers((e.writer, e.seq))
                if not floor.covers((e.writer, e.seq))
            ]
            assert sum(len(e.data) for e in kept) <= keep_bytes

        for (document, writer), seq in newest.items():
            floor = opened.store.floor(document)
            assert floor <= snapshots.get(document, Version())
            first = floor.get(writer, 0) + 1
            assert read(opened.store, document, writer, first, seq) == [
                e.data
                for e in history
                if (e.document, e.writer) == (document, writer) and e.seq >= first
            ]
        newer = [
            e for e in history if not snapshots.get(e.document, Version()).covers((e.writer, e.seq))
        ]
        found = list(opened.store.load())
        assert [e for e in found if isinstance(e, Entry)] == newer
        for document in ("plan", "notes"):
            expected = sum(len(e.data) for e in newer if e.document == document)
            assert opened.store.size(document) == expected
