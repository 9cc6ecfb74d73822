"""What can be read of a damaged store, and how another one takes its place."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import Agent

from crdtstate.change import Change, Snapshot
from crdtstate.errors import StoreUnavailable
from crdtstate.stores import Entry, Saved
from crdtstate.stores.file import Host, Note, is_rolled_back
from crdtstate.stores.journal import Journal
from crdtstate.stores.rescue import complete, rebuild, replace, salvaging

ANN, BOB = 0xA, 0xB


@contextmanager
def owned(path: Path) -> Iterator[Host]:
    host = Host(path)
    host.lock()
    try:
        yield host
    finally:
        host.release()


def history() -> tuple[list[Change], Snapshot]:
    """Changes of two documents, and a snapshot of one of them after the first fifty."""
    agent = Agent(ANN)
    snapshot = None
    for number in range(100):
        agent.map("plan")[f"k{number % 30}"] = "x" * 50 + str(number)
        agent.document("other").counter("n").increment(number)
        agent.sealed()
        if number == 49:
            snapshot = agent.document("main").snapshot()
    assert snapshot is not None
    return agent.outbox, snapshot


def fill(path: Path, changes: list[Change], snapshot: Snapshot) -> None:
    journal = Journal(path, upkeep_every=None)
    journal.start("ann", BOB, lambda: None)
    journal.start("ann", ANN, lambda: None)
    for change in changes:
        journal.append([Entry(change.document, change.writer, change.seq, change.data)])
        if change.document == "main" and change.seq == 50:
            journal.compact(Saved("main", snapshot.version, snapshot.encode()), 2**20)
    journal.close()


def test_all_of_a_sound_store_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    changes, snapshot = history()
    fill(path, changes, snapshot)

    with owned(path) as host, salvaging(host) as wreck:
        assert list(wreck.changes()) == changes
        assert [found for found, _ in wreck.snapshots()] == [snapshot]
        assert wreck.writers() == {ANN, BOB} and not wreck.losses


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_ruined_what_is_read_was_written_in_this_order(
    tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    path = tmp_path / "ann.db"
    changes, snapshot = history()
    fill(path, changes, snapshot)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 3, 20))):
        at = rng.randrange(len(data))
        length = rng.choice((1, 1, 50, 4096))
        data[at : at + length] = rng.randbytes(min(length, len(data) - at))
    path.write_bytes(data)

    with owned(path) as host, salvaging(host) as wreck:
        found = list(wreck.changes())
        snapshots = [found for found, _ in wreck.snapshots()]
        wreck.writers()
    written = {change.data: number for number, change in enumerate(changes)}
    places = [written[change.data] for change in found]
    assert places == sorted(set(places)), "in the order of delivery"
    assert all(each == snapshot for each in snapshots)
    assert path.read_bytes() == data, "reading alters nothing"


def test_one_bad_page_costs_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    changes, snapshot = history()
    fill(path, changes, snapshot)
    data = bytearray(path.read_bytes())
    start = data.index(changes[100].data) // 4096 * 4096
    data[start : start + 4096] = bytes(4096)
    path.write_bytes(data)

    with owned(path) as host, salvaging(host) as wreck:
        found = len(list(wreck.changes()))

    assert len(changes) - 40 < found < len(changes) and wreck.losses


def test_a_new_store_takes_the_place_of_the_old_one_which_stays(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    path.write_bytes(b"damaged")
    Path(f"{path}-wal").write_bytes(b"its wal")
    changes, snapshot = history()
    later = [change for change in changes if change.document == "main" and change.seq > 50]
    entries = [Entry(each.document, each.writer, each.seq, each.data) for each in later]
    saved = Saved("main", snapshot.version, snapshot.encode())

    with owned(path) as host:
        host.leave_note(Note(99, 1, True))
        rebuild(host, "ann", BOB, [ANN], [(saved, entries)])
        assert path.read_bytes() == b"damaged"
        aside = replace(host)
    with Journal_at(path) as journal:
        assert list(journal.load()) == [saved, *entries]
        session = journal.session
    assert (session.agent, session.writer, session.clean) == ("ann", BOB, True)
    assert session.writers == {ANN, BOB}
    assert aside.read_bytes() == b"damaged"
    assert Path(f"{aside}-wal").read_bytes() == b"its wal"
    assert {found.name for found in tmp_path.iterdir()} == {
        *("ann.db", "ann.db.lock", "ann.db.damaged-1", "ann.db.damaged-1-wal")
    }


@contextmanager
def Journal_at(path: Path) -> Iterator[Journal]:  # noqa: N802
    journal = Journal(path)
    try:
        yield journal
    finally:
        journal.close()


@pytest.mark.parametrize("moved", range(4))
def test_what_was_decided_is_completed(tmp_path: Path, moved: int) -> None:
    path = tmp_path / "ann.db"
    parts = ["-wal", "-shm", ""]
    for suffix in parts:
        Path(f"{path}{suffix}").write_text(f"old{suffix}")
    Path(f"{path}.rebuilt").write_text("new")
    Path(f"{path}.recovering").write_text("ann.db.damaged-7\n")
    for suffix in parts[:moved]:
        Path(f"{path}{suffix}").rename(f"{path}.damaged-7{suffix}")

    with owned(path) as host:
        assert complete(host) == tmp_path / "ann.db.damaged-7"
        assert complete(host) is None

    assert path.read_text() == "new"
    for suffix in parts:
        assert Path(f"{path}.damaged-7{suffix}").read_text() == f"old{suffix}"
    assert not Path(f"{path}.recovering").exists() and not Path(f"{path}-wal").exists()


@pytest.mark.parametrize("text", ["", "ann.db.dam", "../../etc/passwd\n", "other.damaged-1\n"])
def test_a_torn_line_of_intent_decides_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ann.db"
    path.write_text("old")
    Path(f"{path}.recovering").write_text(text)

    with owned(path) as host:
        assert complete(host) is None

    assert path.read_text() == "old" and not Path(f"{path}.recovering").exists()


def test_a_store_that_somebody_put_there_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    path.write_text("what the user brought back")
    Path(f"{path}.damaged-1").write_text("old")
    Path(f"{path}.rebuilt").write_text("new")
    Path(f"{path}.recovering").write_text("ann.db.damaged-1\n")

    with owned(path) as host:
        complete(host)

    assert path.read_text() == "what the user brought back"


def test_what_cannot_be_moved_is_tried_again_later(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    Path(f"{path}.recovering").mkdir()

    with owned(path) as host, pytest.raises(StoreUnavailable):
        complete(host)


# The note beside a store


@pytest.mark.parametrize(
    ("epoch", "note", "expected"),
    [
        (None, None, False),
        (Note(3, 1, True), None, False),
        (Note(3, 1, True), Note(3, 1, True), False),
        (Note(3, 1, True), Note(3, 1, False), False),  # Killed before it was noted.
        (Note(4, 2, False), Note(3, 1, True), False),  # The same.
        (None, Note(3, 1, True), True),
        (Note(2, 1, True), Note(3, 1, True), True),
        (Note(3, 1, False), Note(3, 1, True), True),
        (Note(3, 2, True), Note(3, 1, True), True),  # Another life of the same number.
    ],
)
def test_a_file_older_than_its_note_was_rolled_back(
    epoch: Note | None, note: Note | None, expected: bool
) -> None:
    assert is_rolled_back(epoch, note) is expected


@pytest.mark.parametrize("note", [Note(1, 2, True), Note(10**17, 10**17, False)])
def test_a_note_is_read_as_it_was_written(note: Note) -> None:
    assert Note.parse(f"4711\n{note}".encode()) == note
    for text in (b"", b"4711", b"4711\nepoch", f"4711\n{note}".encode()[:-3]):
        assert Note.parse(text) is None


def test_a_journal_notes_its_sessions(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    for number in (1, 2):
        with Journal_at(path) as journal:
            journal.start("ann", ANN, lambda: None)
            lines = Path(f"{path}.lock").read_text()
            assert f"epoch {number} of" in lines and "open" in lines
        assert "closed" in Path(f"{path}.lock").read_text()
        before = path.read_bytes() if number == 1 else b""
        if number == 1:
            old = before
    path.write_bytes(old)

    with Journal_at(path) as journal:
        assert journal.session.clean and not journal.session.same_file
