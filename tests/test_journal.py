"""The journal's file: owners, sessions, schemas, damage, and disks that fail."""

import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import apsw
import pytest
from fault_vfs import Disk, FaultHost

from crdtstate.change import Origin, encode_change
from crdtstate.clock import Dot, Version
from crdtstate.documents import DocumentSet
from crdtstate.errors import CorruptStore, StoreError, StoreLocked, StoreUnavailable
from crdtstate.stores import Entry, Saved
from crdtstate.stores.file import MIGRATIONS, Host, connect, migrate
from crdtstate.stores.journal import Journal, verify

ANNA, BERT = 2**53 - 1, 7


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def started(path: Path | str, progress: Callable[[], None] = lambda: None, **options) -> Journal:
    journal = Journal(path, **options)
    journal.start("agent", ANNA, progress)
    return journal


def change(document: str, writer: int, seq: int, size: int = 20) -> Entry:
    return Entry(document, writer, seq, f"{document} {writer} {seq} ".encode().ljust(size, b"."))


def snapshot(document: str, version: dict[int, int]) -> Saved:
    return Saved(document, Version(version), f"{document} at {sorted(version.items())}".encode())


def filled(path: Path) -> list[Saved | Entry]:
    """Make a store of two documents with a few hundred changes; return what it loads."""
    with closing(started(path, upkeep_every=None)) as journal:
        for seq in range(1, 151):
            journal.append([change("plan", ANNA, seq, 90), change("notes", BERT, seq)])
        journal.compact(snapshot("plan", {ANNA: 100}), keep_bytes=3000)
        return list(journal.load())


def sealed(documents: DocumentSet) -> list[Entry]:
    """What was written there, as entries; changes made like this can be loaded."""
    taken = [change for change, _ in documents.take_sealed()]
    return [Entry(change.document, change.writer, change.seq, change.data) for change in taken]


def lived_in(path: Path) -> None:
    """Make a store as a replica does: two documents, one of them with a snapshot."""
    documents = DocumentSet("agent", ANNA, lambda: 1)
    with closing(started(path, upkeep_every=None)) as journal:
        for number in range(40):
            documents.document("plan").map("goals")["first"] = number
            documents.document("notes").map("pages")[str(number)] = "x" * 90
            journal.append(sealed(documents))
            if number == 30:
                plan = documents.document("plan").snapshot()
                journal.compact(Saved("plan", plan.version, plan.encode()), keep_bytes=1000)


def damage_in(path: Path) -> list[str]:
    """What is damaged in a store of `filled`. That its changes say nothing does not count."""
    try:
        problems = verify(path).problems
    except CorruptStore as exc:
        problems = [exc.reason]
    made_up = ("a change of an unknown scheme", "a snapshot's checksum does not match")
    return [problem for problem in problems if not problem.endswith(made_up)]


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in another process."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )


KILLED = """
import os, sys
from crdtstate.stores import Entry
from crdtstate.stores.journal import Journal
journal = Journal(sys.argv[1], durability=sys.argv[2])
journal.start("agent", 42, lambda: None)
os._exit(9)
"""

# Owners


def test_a_second_process_learns_who_has_the_file(path: Path) -> None:
    code = "import sys; from crdtstate.stores.journal import Journal; Journal(sys.argv[1])"
    with closing(started(path)):
        other = run(code, path)

    assert other.returncode == 1
    error = other.stderr.splitlines()[-1]
    assert error.startswith("crdtstate.errors.StoreLocked")
    assert str(path) in error and f"process {os.getpid()} " in error


def test_a_second_journal_in_the_same_process_is_locked_out_too(path: Path) -> None:
    with closing(started(path)), pytest.raises(StoreLocked, match=f"process {os.getpid()} "):
        Journal(path)

    Journal(path).close()


def test_a_killed_owner_holds_no_lock(path: Path) -> None:
    run(KILLED, path, "process")

    Journal(path).close()


# Sessions


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_session_that_was_killed_is_not_clean(path: Path, durability: str) -> None:
    filled(path)

    run(KILLED, path, durability)

    with closing(Journal(path)) as journal:
        session = journal.session
    assert (session.agent, session.writer, session.clean) == ("agent", 42, False)
    assert session.same_boot and session.same_file
    assert session.power_safe == (durability == "power")


def test_a_session_can_be_closed_without_being_clean(path: Path) -> None:
    started(path).close(clean=False)

    with closing(Journal(path)) as journal:
        assert not journal.session.clean


def test_a_look_without_a_session_leaves_the_last_one_as_it_was(path: Path) -> None:
    filled(path)

    Journal(path).close()

    with closing(Journal(path)) as journal:
        assert journal.session.clean and journal.session.writer == ANNA


def test_the_writer_can_change_within_a_session(path: Path) -> None:
    with closing(started(path)) as journal:
        journal.append([change("plan", ANNA, 1)])
        journal.start("agent", BERT, lambda: None)
        journal.append([change("plan", BERT, 1)])

    with closing(Journal(path)) as journal:
        assert journal.session.writer == BERT and journal.session.clean


def test_a_copied_moved_or_restored_file_is_not_the_same(path: Path) -> None:
    filled(path)
    copy, moved = path.with_name("copy.db"), path.with_name("moved.db")
    shutil.copy(path, copy)

    with closing(Journal(copy)) as journal:
        assert journal.session.clean and not journal.session.same_file
    path.rename(moved)
    with closing(Journal(moved)) as journal:
        assert not journal.session.same_file
    copy.rename(path)
    with closing(Journal(path)) as journal:
        assert not journal.session.same_file


@pytest.mark.parametrize("boot", ["another boot", None])
def test_after_a_reboot_or_when_nobody_knows_it_is_not_the_same_boot(
    path: Path, boot: str | None
) -> None:
    class OtherHost(Host):
        def boot(self) -> str | None:
            return boot

    filled(path)

    with closing(Journal(path, host=OtherHost)) as journal:
        assert not journal.session.same_boot
        assert journal.session.same_file


def test_closing_twice_does_no_harm(path: Path) -> None:
    journal = started(path)
    journal.close()
    journal.close()


# Schemas


def test_a_migration_keeps_a_copy_and_the_contents(path: Path) -> None:
    contents = filled(path)
    steps = (*MIGRATIONS, "ALTER TABLE document ADD COLUMN colour TEXT")
    backup = path.with_name(f"state.pre-v{len(steps)}.db")
    partial = backup.with_name(f"{backup.name}.partial")
    partial.write_text("of a migration that was interrupted")

    with closing(connect(path)) as db:
        migrate(db, path, steps)

        assert db.pragma("user_version") == len(steps)
        assert db.execute("SELECT name, colour FROM document ORDER BY id").fetchall() == [
            ("plan", None),
            ("notes", None),
        ]
    with closing(Journal(backup)) as journal:
        assert list(journal.load()) == contents
    assert not partial.exists()


def test_a_migration_that_fails_changes_nothing(path: Path) -> None:
    contents = filled(path)
    steps = (*MIGRATIONS, "DELETE FROM journal; SELECT no_such_function()")

    with closing(connect(path)) as db, pytest.raises(apsw.SQLError):
        migrate(db, path, steps)

    with closing(Journal(path)) as journal:
        assert list(journal.load()) == contents


def test_a_store_of_a_newer_crdtstate_is_refused(path: Path) -> None:
    filled(path)
    with closing(connect(path)) as db:
        db.pragma("user_version", 99)
    before = path.read_bytes()

    with pytest.raises(StoreError, match="newer crdtstate wrote it.*upgrade") as raised:
        Journal(path)

    assert raised.value.path == str(path)
    assert path.read_bytes() == before


# Files and places that are no store


def test_a_file_that_is_not_sqlite_is_refused_and_left_alone(path: Path) -> None:
    path.write_text("Dear diary, " * 100)

    with pytest.raises(CorruptStore, match=r"state.db: this is not an SQLite file"):
        Journal(path)

    assert path.read_text() == "Dear diary, " * 100


@pytest.mark.parametrize("application", [0, 77])
def test_another_programs_database_is_refused_and_left_alone(path: Path, application: int) -> None:
    with closing(apsw.Connection(str(path))) as db:
        db.execute("CREATE TABLE diary(day, entry)")
        db.pragma("application_id", application)
    before = path.read_bytes()

    with pytest.raises(CorruptStore, match="another program's SQLite file"):
        Journal(path)

    assert path.read_bytes() == before


def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch()

    filled(path)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="this is a directory"):
        Journal(tmp_path)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=rf"no directory {tmp_path}/a/b; create it"):
        Journal(tmp_path / "a" / "b" / "state.db")


def test_a_file_in_place_of_the_directory_is_named(path: Path) -> None:
    path.touch()

    with pytest.raises(StoreUnavailable, match=f"no directory {path}"):
        Journal(path / "state.db")


@contextmanager
def unprivileged() -> Iterator[None]:
    """Let permissions count, also when the tests run as root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that others may enter, unlike those that pytest makes."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        yield Path(name)
        Path(name).chmod(0o755)


def test_a_read_only_directory_is_named(place: Path) -> None:
    with unprivileged(), pytest.raises(StoreUnavailable, match=f"cannot write {place}/new.db.lock"):
        Journal(place / "new.db")


def test_a_read_only_file_is_named(place: Path) -> None:
    place.chmod(0o777)
    filled(place / "state.db")
    for file in place.iterdir():
        file.chmod(0o444 if file.suffix == ".db" else 0o666)

    with unprivileged(), pytest.raises(StoreUnavailable, match="state.db: the file is read-only"):
        Journal(place / "state.db")


def test_a_failed_opening_holds_no_lock(path: Path) -> None:
    path.write_text("Dear diary, " * 100)
    with pytest.raises(CorruptStore):
        Journal(path)
    path.unlink()

    filled(path)


# Damage


def everything(path: Path) -> list[object]:
    """All that a store gives to its user."""
    with closing(Journal(path)) as journal:
        loaded: list[object] = list(journal.load())
        ranges = [(w, s + 1, 999) for w, s in journal.floor("plan").items()]
        return [*loaded, *journal.read("plan", ranges, 10**6)[0], journal.session.writer]


def test_a_flipped_bit_in_a_page_is_found_and_never_returned(path: Path) -> None:
    filled(path)
    sound, image = everything(path), path.read_bytes()
    rng = random.Random(1)
    found = 0

    for _ in range(80):
        damaged = bytearray(image)
        damaged[rng.randrange(len(image))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert everything(path) == sound
        except StoreError as exc:
            assert str(path) in str(exc)
            found += 1
        assert damage_in(path)

    # The rest is in indexes and in the audit, which are not read at opening.
    assert found >= 60


@pytest.mark.parametrize("column", ["data = x'00'", "crc = crc + 1", "seq = seq + 9", "writer = 3"])
def test_a_damaged_row_is_named(path: Path, column: str) -> None:
    filled(path)
    plant(path, f"UPDATE journal SET {column} WHERE id = 290")

    with pytest.raises(CorruptStore, match=r"journal, row 29\d.*crdtstate verify"):
        everything(path)

    assert any("journal, row 29" in problem for problem in verify(path).problems)


def test_a_row_that_came_to_another_document_is_found(path: Path) -> None:
    with closing(started(path)) as journal:
        journal.append([change("plan", ANNA, 1), change("notes", ANNA, 1)])
    plant(path, "UPDATE journal SET document = 3 - document")

    with pytest.raises(CorruptStore, match="journal, row 1"):
        everything(path)


def test_changes_that_swapped_places_are_found(path: Path) -> None:
    with closing(started(path)) as journal:
        journal.append([change("plan", ANNA, 1), change("plan", ANNA, 2)])
    plant(path, "UPDATE journal SET seq = 3 - seq, id = 10 - id")

    with pytest.raises(CorruptStore, match="journal, row 8"):
        everything(path)


@pytest.mark.parametrize("column", ["data", "version", "sha256", "floor"])
def test_a_damaged_snapshot_is_named(path: Path, column: str) -> None:
    filled(path)
    with closing(connect(path)) as db:
        (value,) = db.execute(f"SELECT {column} FROM snapshot").fetchone()
        db.execute(f"UPDATE snapshot SET {column} = ?", (value[:-1] + bytes([value[-1] ^ 1]),))

    with pytest.raises(CorruptStore, match="snapshot, document 'plan'|journal, row"):
        everything(path)

    assert "table snapshot, document 'plan': wrong SHA-256" in verify(path).problems


def test_a_damaged_change_is_not_handed_to_a_peer(path: Path) -> None:
    filled(path)
    plant(path, "UPDATE journal SET data = x'00' WHERE seq = 90 AND document = 1")

    with closing(Journal(path)) as journal:
        assert len(list(journal.load())) > 100
        with pytest.raises(CorruptStore, match="document 'plan'"):
            journal.read("plan", [(ANNA, 90, 90)], 1000)


def plant(path: Path, damage: str) -> None:
    """Change rows behind the store's back, with page checksums that are right."""
    with closing(connect(path)) as db:
        db.execute(damage)
        assert db.changes()


# Verifying


def test_verify_counts_what_is_in_a_sound_store_and_leaves_it_alone(path: Path) -> None:
    lived_in(path)
    before = path.read_bytes(), sorted(path.parent.iterdir())

    found = verify(path)

    assert found.problems == []
    assert (found.documents, found.snapshots) == (2, 1)
    assert found.changes >= 9 + 40
    assert found.bytes > 40 * 90
    assert (path.read_bytes(), sorted(path.parent.iterdir())) == before


def test_verify_works_beside_the_owner(path: Path) -> None:
    documents = DocumentSet("agent", ANNA, lambda: 1)
    with closing(started(path)) as journal:
        documents.map("plan")["goal"] = 1
        journal.append(sealed(documents))

        assert verify(path).changes == 1
        assert verify(path).problems == []

        documents.map("plan")["goal"] = 2
        journal.append(sealed(documents))
        assert journal.failure is None
        assert run("import sys, crdtstate.stores.journal as j; j.Journal(sys.argv[1])", path)
        assert verify(path).changes == 2


def test_verify_finds_a_missing_row(path: Path) -> None:
    filled(path)
    plant(path, "DELETE FROM journal WHERE seq = 120 AND document = 1")

    # Then come the changes, which are made up here.
    problem, *_ = verify(path).problems
    assert "change 121 after 119" in problem


def test_verify_of_something_else(path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="no such file"):
        verify(path)
    with pytest.raises(StoreUnavailable, match="this is a directory"):
        verify(path.parent)
    path.touch()
    with pytest.raises(CorruptStore, match="this is empty, not a crdtstate store"):
        verify(path)
    assert path.read_bytes() == b""
    path.write_text("Dear diary, " * 100)
    with pytest.raises(CorruptStore, match="not an SQLite file, so not a crdtstate store"):
        verify(path)


def test_verify_finds_a_change_that_comes_before_what_it_builds_on(path: Path) -> None:
    anna, bert = DocumentSet("anna", ANNA, lambda: 1), DocumentSet("bert", BERT, lambda: 1)
    anna.map("plan")["goal"] = 1
    ((first, _),) = anna.take_sealed()
    bert.document("main").apply(first)
    bert.map("plan")["goal"] = 2
    with closing(started(path)) as journal:
        journal.append([*sealed(bert), Entry("main", ANNA, 1, first.data)])

    (problem,) = verify(path).problems

    assert problem == "document 'main': change 7:1: it comes before what it builds on"


def test_verify_finds_a_change_that_breaks_the_rules(path: Path) -> None:
    evil = encode_change("main", Dot(BERT, 1), {}, 1, 0, False, b"evil", Origin("bert"))
    with closing(started(path)) as journal:
        journal.append([Entry("main", BERT, 1, evil.data)])

    (problem,) = verify(path).problems

    assert problem.startswith("document 'main': change 7:1: ")


def test_verify_says_everything_once_and_what_the_reader_does_not_do_already(path: Path) -> None:
    lived_in(path)
    with closing(connect(path)) as db:
        (page,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'journal'").fetchone()
    image = bytearray(path.read_bytes())
    image[page * 4096 - 100] ^= 1
    path.write_bytes(image)

    problems = verify(path).problems

    assert "a page (wrong checksum) is damaged" in problems
    assert len(set(problems)) == len(problems)
    assert not any("crdtstate verify" in problem for problem in problems)


def test_each_line_of_what_sqlite_finds_is_a_problem(path: Path) -> None:
    lived_in(path)
    with closing(connect(path)) as db:
        db.execute("CREATE TABLE lost(x)")
        db.config(apsw.SQLITE_DBCONFIG_DEFENSIVE, 0)
        db.pragma("writable_schema", True)
        db.execute("DELETE FROM sqlite_schema WHERE name = 'lost'")

    problems = verify(path).problems

    assert problems
    assert not any("\n" in problem or "***" in problem for problem in problems)


def test_verify_needs_no_writable_directory(place: Path) -> None:
    path = place / "state.db"
    lived_in(path)

    with unprivileged():
        assert verify(path).problems == []


def test_a_store_that_cannot_be_checked_is_not_called_damaged(place: Path) -> None:
    path = place / "state.db"
    run(KILLED, path, "process")
    Path(f"{path}-shm").unlink()

    with unprivileged(), pytest.raises(StoreUnavailable, match="it cannot be opened"):
        verify(path)


def test_a_store_that_is_opened_while_it_is_verified_is_not_called_damaged(path: Path) -> None:
    filled(path)

    def write_during_the_check(db: apsw.Connection) -> None:
        def trace(_cursor: object, sql: str, _bindings: object) -> bool:
            if "quick_check" in sql:
                os.utime(path, (1, 1))
            return True

        db.exec_trace = trace

    apsw.connection_hooks.append(write_during_the_check)
    try:
        with pytest.raises(StoreUnavailable, match="written to while it was read; try again"):
            verify(path)
    finally:
        apsw.connection_hooks.remove(write_during_the_check)


# Upkeep


def test_forgotten_rows_leave_the_file_little_by_little(path: Path) -> None:
    with closing(started(path, upkeep_every=None)) as journal:
        journal.append([change("plan", ANNA, seq) for seq in range(1, 3001)])
        journal.compact(snapshot("plan", {ANNA: 2990}), keep_bytes=0)
        counts = []
        for _ in range(4):
            journal.upkeep()
            counts.append(verify(path).changes)

    assert counts == [2000, 1000, 10, 10]


def test_rows_that_a_killed_session_left_are_deleted_by_the_next(path: Path) -> None:
    with closing(started(path, upkeep_every=None)) as journal:
        journal.append([change("plan", ANNA, seq) for seq in range(1, 101)])
        journal.compact(snapshot("plan", {ANNA: 90}), keep_bytes=0)
    assert verify(path).changes == 100

    with closing(started(path, upkeep_every=None)) as journal:
        assert journal.floor("plan") == {ANNA: 90}
        assert len(list(journal.load())) == 11
        journal.upkeep()

    assert verify(path).changes == 10


def test_the_wal_stays_short_while_much_is_written(path: Path) -> None:
    wal = Path(f"{path}-wal")
    sizes = []
    with closing(started(path)) as journal:
        for seq in range(1, 15_001):
            journal.append([change("plan", ANNA, seq, 100)])
            if seq % 100 == 0:
                sizes.append(wal.stat().st_size)
        assert journal.failure is None

    # Each commit writes a page, so 60 MiB went through it.
    assert 4 * 2**20 < max(sizes) < 16 * 2**20


def test_the_wal_is_cut_once_a_long_reader_is_gone(path: Path) -> None:
    wal = Path(f"{path}-wal")
    with closing(started(path, upkeep_every=None)) as journal:
        journal.append([change("plan", ANNA, 1)])
        with closing(connect(path, flags=apsw.SQLITE_OPEN_READONLY)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM journal").fetchall()
            for seq in range(2, 4502):
                journal.append([change("plan", ANNA, seq)])
                if seq % 500 == 0:
                    journal.upkeep()
            assert wal.stat().st_size > 17 * 2**20
        for seq in range(4502, 6000):
            journal.append([change("plan", ANNA, seq)])
        journal.upkeep()
        journal.append([change("plan", ANNA, 6000)])

        assert wal.stat().st_size <= 12 * 2**20
        assert journal.failure is None


# Disks that fail


class Machine:
    """A journal on a `Disk`; it can be switched off and on."""

    def __init__(self, durability: str) -> None:
        self.disk = Disk()
        self.durability = durability
        self.progress = threading.Event()

    def open(self) -> Journal:
        return Journal(
            "/state.db",
            durability=self.durability,
            host=partial(FaultHost, disk=self.disk),
            upkeep_every=None,
        )

    def start(self) -> Journal:
        journal = self.open()
        journal.start("agent", ANNA, self.progress.set)
        return journal

    def settle(self, journal: Journal, ticket: int) -> None:
        """Wait until *ticket* is committed, or until that failed."""
        while journal.committed < ticket and not journal.failure:
            assert self.progress.wait(10), "no progress for 10 seconds"
            self.progress.clear()

    def append(self, journal: Journal, entries: list[Entry]) -> int:
        ticket = journal.append(entries)
        self.settle(journal, ticket)
        return ticket

    def retry(self, journal: Journal, ticket: int) -> None:
        """Retry and wait until *ticket* is committed."""
        journal.retry()
        while journal.committed < ticket:
            assert self.progress.wait(10), "no progress for 10 seconds"
            self.progress.clear()


@pytest.fixture(params=["process", "power"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    # Errors that a dying connection meets in the VFS have nowhere to go.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    return Machine(request.param)


BATCHES = [
    [change("plan", ANNA, 1), change("plan", BERT, 1)],
    [change("notes", ANNA, 1)],
    [change("plan", ANNA, 2, 9000), change("notes", ANNA, 2), change("plan", BERT, 2)],
    [change("plan", ANNA, 3)],
    [change("plan", BERT, 3), change("todo", BERT, 1)],
    [change("plan", ANNA, 4)],
    [change("todo", BERT, 2), change("plan", ANNA, 5)],
]
COMPACTIONS = {3: ({ANNA: 2, BERT: 1}, 9000), 5: ({ANNA: 3, BERT: 3}, 0)}


def test_a_full_disk_is_told_and_what_waits_is_written_in_order(machine: Machine) -> None:
    journal = machine.start()
    machine.append(journal, BATCHES[0])
    machine.disk.capacity = machine.disk.used

    tickets = [machine.append(journal, batch) for batch in BATCHES[1:4]]

    assert journal.committed == 1
    assert isinstance(journal.failure, StoreUnavailable)
    assert "/state.db: the disk is full; free some space" in str(journal.failure)
    machine.disk.capacity = None
    machine.retry(journal, tickets[-1])
    assert list(journal.load()) == [entry for batch in BATCHES[:4] for entry in batch]
    journal.close()
    assert machine.open().session.clean


def test_the_next_append_writes_what_waits_first(machine: Machine) -> None:
    journal = machine.start()
    machine.disk.failing.add("write")
    machine.append(journal, BATCHES[0])
    assert journal.failure is not None

    machine.disk.failing.clear()
    ticket = journal.append(BATCHES[1])
    while journal.committed < ticket:
        assert machine.progress.wait(10)
        machine.progress.clear()

    assert journal.failure is None
    assert list(journal.load()) == BATCHES[0] + BATCHES[1]
    journal.close()


def test_what_cannot_be_written_until_the_end_makes_the_session_unclean(machine: Machine) -> None:
    journal = machine.start()
    machine.append(journal, BATCHES[0])
    machine.disk.failing.add("write")
    machine.append(journal, BATCHES[1])

    journal.close(clean=True)

    assert isinstance(journal.failure, StoreUnavailable)
    machine.disk.failing.clear()
    journal = machine.open()
    assert not journal.session.clean
    assert list(journal.load()) == BATCHES[0]
    journal.close()


def test_a_change_that_waits_cannot_be_read_yet(machine: Machine) -> None:
    journal = machine.start()
    machine.append(journal, BATCHES[0])
    machine.disk.failing.add("write")
    machine.append(journal, BATCHES[2][:1])
    machine.disk.failing.clear()

    machine.retry(journal, 2)

    assert len(journal.read("plan", [(ANNA, 1, 9)], 10**6)[0]) == 2
    journal.close()


def test_removing_needs_a_disk_that_works(machine: Machine) -> None:
    journal = machine.start()
    machine.append(journal, BATCHES[0])
    machine.disk.failing.add("write")

    with pytest.raises(StoreUnavailable):
        journal.forget(ANNA, {})

    machine.disk.failing.clear()
    machine.append(journal, [change("plan", ANNA, 2)])
    assert list(journal.load()) == [*BATCHES[0], change("plan", ANNA, 2)]
    journal.close()


def test_a_snapshot_is_not_taken_apart(path: Path) -> None:
    filled(path)

    with closing(started(path)) as journal:
        with pytest.raises(StoreError, match="snapshot of 'plan' contains changes"):
            journal.forget(ANNA, {"plan": 99})
        assert len(list(journal.load())) == 201


def test_what_is_committed_during_a_sync_is_not_yet_synced() -> None:
    class BusyHost(FaultHost):
        def sync_wal(self) -> None:
            super().sync_wal()
            journal.append([change("plan", ANNA, 2)])

    machine = Machine("process")
    host = partial(BusyHost, disk=machine.disk)
    journal = started("/state.db", host=host, upkeep_every=None)
    journal.append([change("plan", ANNA, 1)])

    journal.upkeep()

    assert (journal.committed, journal.synced) == (2, 1)
    machine.disk.is_dead = True
    journal.close(clean=False)


def test_a_session_is_noted_for_good_before_it_writes_anything(machine: Machine) -> None:
    with closing(machine.open()) as journal:
        journal.start("agent", BERT, lambda: None)
    journal = machine.start()
    machine.disk.is_dead = True
    journal.close(clean=False)

    machine.disk.reboot("none", random.Random(0))

    with closing(machine.open()) as journal:
        assert (journal.session.writer, journal.session.clean) == (ANNA, False)


def test_a_new_file_is_not_rolled_back_by_the_journal_of_its_making(machine: Machine) -> None:
    """SQLite deletes its rollback journal; only synchronous=EXTRA makes that durable."""
    with closing(connect("/state.db", machine.disk.vfs.name)) as db:
        # Without shared memory and exclusive locking the switch to WAL is refused.
        with pytest.raises(StoreUnavailable, match="cannot share memory"):
            migrate(db, Path("/state.db"))
        machine.disk.is_dead = True

    machine.disk.reboot("none", random.Random(0))

    with closing(connect("/state.db", machine.disk.vfs.name)) as db:
        assert db.pragma("user_version") == len(MIGRATIONS)


def test_everything_is_written_once_whichever_operation_fails(machine: Machine) -> None:
    operations = act(machine.start(), machine)
    expected = contents(machine.open())

    for failing in range(1, operations):
        again = Machine(machine.durability)
        journal = again.start()
        again.disk.fail_at = again.disk.operations + failing
        act(journal, again)
        again.disk.reboot("none", random.Random(0))

        assert contents(again.open()) == expected


def act(journal: Journal, machine: Machine) -> int:
    """Write everything, with retries, and close; return the operations that it took."""
    before = machine.disk.operations
    for number, batch in enumerate(BATCHES):
        if number in COMPACTIONS:
            version, keep_bytes = COMPACTIONS[number]
            journal.compact(snapshot("plan", version), keep_bytes)
        ticket = machine.append(journal, batch)
        if journal.committed < ticket:
            machine.retry(journal, ticket)
        journal.upkeep()
    while journal.synced < len(BATCHES) or journal.failure:
        journal.upkeep()
    journal.close()
    return machine.disk.operations - before


def contents(journal: Journal) -> list[object]:
    """Everything in a store, and that it is in order."""
    with closing(journal):
        floor = journal.floor("plan")
        ranges = [(writer, floor.get(writer, 0) + 1, 99) for writer in (ANNA, BERT)]
        return [*journal.load(), dict(floor), journal.read("plan", ranges, 10**6)]


def test_after_a_failed_sync_nothing_counts_as_synced_before_it_is(machine: Machine) -> None:
    """Linux drops what it could not sync, and the next sync succeeds without it."""
    journal = machine.start()
    machine.append(journal, BATCHES[0])
    journal.upkeep()
    machine.disk.failing.add("sync")
    machine.append(journal, BATCHES[1])
    journal.upkeep()
    assert (journal.synced, type(journal.failure)) == (1, StoreUnavailable)

    machine.disk.failing.clear()
    journal.retry()
    while journal.synced < 2:
        journal.upkeep()
    machine.disk.is_dead = True
    journal.close(clean=False)
    machine.disk.reboot("none", random.Random(0))

    assert list(machine.open().load()) == BATCHES[0] + BATCHES[1]


@pytest.mark.parametrize("keep", ["none", "some", "all"])
def test_a_power_cut_at_any_moment_takes_nothing_that_was_synced(
    machine: Machine, keep: str
) -> None:
    """Neither a hole nor half a batch: what is there is what was, some batches ago."""
    rng = random.Random(4)
    states = [dots_of_batches(count) for count in range(len(BATCHES) + 1)]
    cut_at = 0
    is_cut = True

    while is_cut:
        cut_at += 1
        again = Machine(machine.durability)
        again.disk.cut_at = cut_at
        synced = live_until_the_cut(again)
        is_cut = again.disk.is_dead
        again.disk.reboot(keep, rng)
        journal = again.start()

        dots = all_dots(journal)
        assert dots in states[synced:], f"cut at {cut_at}"
        floor = journal.floor("plan")
        for writer in (ANNA, BERT):
            newest = max((s for d, w, s in dots if (d, w) == ("plan", writer)), default=0)
            found, _ = journal.read("plan", [(writer, floor.get(writer, 0) + 1, 99)], 10**6)
            assert len(found) == newest - floor.get(writer, 0)
        journal.append([change("new", ANNA, 1)])
        journal.close()
        assert journal.failure is None

    assert cut_at > 80


@pytest.mark.parametrize("keep", ["none", "some"])
def test_a_power_cut_soon_after_a_failure_takes_nothing_that_was_synced(
    machine: Machine, keep: str
) -> None:
    rng = random.Random(5)
    states = [dots_of_batches(count) for count in range(len(BATCHES) + 1)]

    for fail_at in range(30, 90, 2):
        for later in range(1, 15, 2):
            again = Machine(machine.durability)
            again.disk.fail_at, again.disk.cut_at = fail_at, fail_at + later
            synced = live_until_the_cut(again)
            again.disk.reboot(keep, rng)

            with closing(again.open()) as journal:
                assert all_dots(journal) in states[synced:], f"{fail_at}, {later} later"


def live_until_the_cut(machine: Machine) -> int:
    """Do what `act` does, without retries; return what was synced when the power went."""
    try:
        journal = machine.start()
    except StoreError:
        return 0
    synced = 0
    for number, batch in enumerate(BATCHES):
        if number in COMPACTIONS:
            version, keep_bytes = COMPACTIONS[number]
            journal.compact(snapshot("plan", version), keep_bytes)
        machine.append(journal, batch)
        if number % 2:
            journal.upkeep()
        synced = journal.synced
    journal.close()
    return max(synced, journal.synced)


def dots_of_batches(count: int) -> set[tuple[str, int, int]]:
    return {(e.document, e.writer, e.seq) for batch in BATCHES[:count] for e in batch}


def all_dots(journal: Journal) -> set[tuple[str, int, int]]:
    """What is in a store, in snapshots or in the journal, each only once."""
    dots: set[tuple[str, int, int]] = set()
    for item in journal.load():
        if isinstance(item, Saved):
            for writer, seq in item.version.items():
                dots |= {(item.document, writer, s) for s in range(1, seq + 1)}
        else:
            assert (item.document, item.writer, item.seq) not in dots
            assert item.data.startswith(f"{item.document} {item.writer} {item.seq} ".encode())
            dots.add((item.document, item.writer, item.seq))
    return dots


def test_what_arrives_during_a_commit_shares_the_next_one() -> None:
    machine = Machine("power")
    journal = machine.start()
    rounds = 0
    is_done, in_sync, go_on = threading.Event(), threading.Event(), threading.Event()

    def progress() -> None:
        nonlocal rounds
        rounds += 1
        if journal.committed == 11:
            is_done.set()

    journal.start("agent", ANNA, progress)
    sync = machine.disk.sync

    def slow_sync(file: object) -> None:
        in_sync.set()
        assert go_on.wait(10)
        sync(file)

    machine.disk.sync = slow_sync
    journal.append([change("plan", ANNA, 1)])
    assert in_sync.wait(10)
    for seq in range(2, 12):
        journal.append([change("plan", ANNA, seq)])
    assert journal.committed == 0
    go_on.set()

    assert is_done.wait(10)
    assert rounds == 2
    journal.close()


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_real_file_that_cannot_grow_is_told_and_goes_on_later(path: Path) -> None:
    with closing(started(path)) as journal:
        journal.append([change("plan", ANNA, 1)])
        size = Path(f"{path}-wal").stat().st_size

        with files_no_longer_than(size):
            for seq in (2, 3):
                journal.append([change("plan", ANNA, seq, 9000)])
            assert isinstance(journal.failure, StoreUnavailable)
            assert journal.committed == 1
            waiting = journal.read("plan", [(ANNA, 1, 9)], 10**6)
            assert waiting == ([change("plan", ANNA, 1).data], True)
        journal.retry()

        assert journal.failure is None
        assert journal.committed == 3
        assert [entry.seq for entry in journal.load()] == [1, 2, 3]
    assert damage_in(path) == []
