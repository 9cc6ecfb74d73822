"""Opening a replica when its store is damaged, old, or gone."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import asynchronous
from test_comparing import flip_value

from crdtstate import (
    CheckpointDamaged,
    Config,
    CorruptStore,
    Recovered,
    RecoveryEscalated,
    Replica,
    StoreError,
    StoreLocked,
    StoreUnavailable,
    UsageError,
    blocking,
)
from crdtstate.casebook import disown
from crdtstate.relay.chronicle import Chronicle
from crdtstate.relay.holdings import Holdings
from crdtstate.relay.metrics import Metrics, encode
from crdtstate.slots import SEPARATOR
from crdtstate.stores.file import connect

LOCAL = "ws://127.0.0.1:0"
KEYS = 120

Ruin = Callable[[Path], None]


def url(replica: Replica) -> str:
    assert replica.address is not None
    return replica.address


async def write(replica: Replica, first: int, last: int) -> None:
    for number in range(first, last):
        replica.map("plan")[f"k{number}"] = f"value {number} " + "needle" * 20
        replica.counter("count").increment()
        await replica.durable(timeout=10)


def numbers(replica: Replica) -> set[int]:
    """Which of the keys are there; each with its own value."""
    plan = dict(replica.map("plan"))
    assert all(value.startswith(f"value {key[1:]} ") for key, value in plan.items())
    return {int(key[1:]) for key in plan}


def content(path: object) -> bytes:
    """The bytes of a file; none if there is no such file."""
    return Path(str(path)).read_bytes() if Path(str(path)).exists() else b""


def put_back(backup: Path, path: Path) -> None:
    """Bring back an old copy in place, with its WAL if it has one."""
    for suffix in ("", "-wal"):
        if content(f"{backup}{suffix}"):
            Path(f"{path}{suffix}").write_bytes(content(f"{backup}{suffix}"))


def names(directory: Path) -> set[str]:
    return {found.name for found in directory.iterdir()}


def flip(path: Path, where: float, *, wal: bool = False) -> None:
    """Flip a bit of a file, at this share of its length."""
    path = Path(f"{path}-wal") if wal else path
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def alter(path: Path, at: int) -> None:
    """Flip a bit of the byte *at* in a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def flip_in_row(path: Path, row: int) -> None:
    """Flip a bit in the value of change *row* of the journal."""
    data = bytearray(path.read_bytes())
    needle = f"value {row} needle".encode()
    data[data.index(needle) + len(needle)] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path: Path) -> None:
    path.write_bytes(b"to whom it may concern\n" * 1000)


def blank_a_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3 * 4096 : 4 * 4096] = bytes(4096)
    path.write_bytes(data)


def ruin_value(tier: str, key: str, what: str) -> None:
    """Ruin a value in an SQLite tier: the page it begins in, or the value."""
    database = connect(tier)
    ((row, value),) = database.execute("SELECT id, data FROM value WHERE key LIKE ?", (f"%{key}",))
    if what != "a page":
        database.execute("UPDATE value SET data = zeroblob(20) WHERE id = ?", (row,))
    database.close()
    if what == "a page":
        data = bytearray(content(tier))
        data[data.index(value[200_000:200_100])] ^= 1
        Path(tier).write_bytes(data)


RUINS: dict[str, Ruin] = {
    "its header": lambda path: flip(path, 0.0),
    "its first page": lambda path: flip(path, 50 / path.stat().st_size),
    "a page": blank_a_page,
    "a value": lambda path: flip_in_row(path, 90),
    "its end": truncate,
    "all": overwrite,
    "nothing left": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


# The store


@asynchronous
async def test_a_restart_tells_what_it_did(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    async with Replica("ann", store=path) as ann:
        assert ann.recovery is not None and ann.recovery.source == "store"
        assert ann.recovery.changes == {} and not ann.recovery.attempts[0].reason
        await write(ann, 0, 5)
        writer = ann.writer
    again = Replica("ann", store=path)
    heard: list[Recovered] = []
    again.on(Recovered, heard.append)
    assert again.recovery is None
    async with again:
        found = again.recovery
        assert found is not None and found.source == "store" and found.writer is None
        assert found.attempts == (("store", ""),) and found.changes == {"store": 5}
        assert 0 < found.seconds < 10 and not found.is_escalated
        assert again.writer == writer and again.status()["recovery"]["source"] == "store"
        await asyncio.sleep(0)
        assert [event.recovery for event in heard] == [found]


@pytest.mark.parametrize("ruin", RUINS)
@asynchronous
async def test_a_damaged_store_is_replaced_and_with_a_peer_nothing_is_lost(
    tmp_path: Path, ruin: str
) -> None:
    path = tmp_path / "ann.db"
    async with Replica("bob", listen=LOCAL) as bob:
        async with Replica("ann", store=path, peers=[url(bob)]) as ann:
            await write(ann, 0, 60)
            await ann.checkpoint()
            await write(ann, 60, KEYS)
            await ann.synced(timeout=10)
            writer = ann.writer
        RUINS[ruin](path)
        broken = content(path)

        async with Replica("ann", store=path, peers=[url(bob)]) as ann:
            found = ann.recovery
            assert found is not None and found.source == "checkpoint"
            assert found.attempts[0].reason and not found.attempts[1].reason
            assert found.changes["checkpoint"] == 60 and found.checkpoint
            assert ann.writer != writer, "own changes may be missing"
            assert numbers(ann) >= set(range(60))
            if broken:
                assert content(found.aside) == broken
            ann.map("plan")["k999"] = "value 999 after"
            ann.counter("count").increment()
            await ann.synced(timeout=10)
            for replica in (ann, bob):
                assert numbers(replica) == {*range(KEYS), 999}
                assert replica.counter("count").value == KEYS + 1
            writer = ann.writer
            await ann.durable(timeout=10)
    async with Replica("ann", store=path) as ann:
        assert ann.recovery is not None and len(ann.recovery.attempts) == 1
        assert numbers(ann) == {*range(KEYS), 999} and ann.writer == writer
    left = names(tmp_path)
    assert left >= {"ann.db", "ann.db.checkpoints", "ann.db.lock"}
    assert not any("rebuilt" in name or "recovering" in name for name in left)


@asynchronous
async def test_what_can_be_read_of_a_damaged_journal_is_used_up_to_the_hole(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    async with Replica("ann", store=path) as ann:
        await write(ann, 0, 60)
        await ann.checkpoint()
        await write(ann, 60, KEYS)
    flip_in_row(path, 90)

    async with Replica("ann", store=path) as ann:
        found = ann.recovery
        # One of them tells the others of the checkpoint.
        assert found is not None and found.changes == {"checkpoint": 60, "journal": 30 + 1}
        assert numbers(ann) == set(range(90)), "what comes after builds on what was lost"
        assert any("29" in loss for loss in found.losses), found.losses
        assert "checksum" in found.attempts[0].reason and not found.is_escalated
        assert "31 changes from the journal" in str(found)


@asynchronous
async def test_without_a_checkpoint_there_is_what_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    config = Config(snapshot_after_bytes=4000, log_bytes=4000)
    async with Replica("ann", store=path, config=config) as ann:
        await write(ann, 0, KEYS)
        ann.document("notes", shared=True).text("body").insert(0, "text")
        ann.document("other").set("skills").add("x")
    database = sqlite3.connect(path)
    (newest,) = database.execute("SELECT max(id) FROM journal").fetchone()
    database.execute("UPDATE journal SET crc = crc + 1 WHERE id = ?", (newest,))
    database.commit()
    database.close()

    async with Replica("ann", store=path) as ann:
        found = ann.recovery
        # The change is as it was written: only what was noted of it is not.
        assert found is not None and found.source == "checkpoint" and not found.losses
        assert numbers(ann) == set(range(KEYS))
        assert str(ann.document("notes", shared=True).text("body")) == "text"
        assert set(ann.document("other").set("skills")) == {"x"}
        ann.map("plan")["k999"] = "value 999 after"
    async with Replica("ann", store=path) as ann:
        assert numbers(ann) == {*range(KEYS), 999} and ann.recovery.source == "store"  # type: ignore[union-attr]


@asynchronous
async def test_a_store_is_known_by_its_header_if_all_else_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    async with Replica("ann", store=path) as ann:
        await write(ann, 0, KEYS)
    os.unlink(f"{path}.lock")
    alter(path, 100)

    async with Replica("ann", store=path, listen=LOCAL) as ann:
        assert ann.recovery is not None and ann.recovery.aside.endswith(".damaged-1")


@asynchronous
async def test_what_was_damaged_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    kept: list[bytes] = []
    for number in range(3):
        async with Replica("ann", store=path) as ann:
            await write(ann, 10 * number, 10 * number + 10)
        overwrite(path)
        kept.append(path.read_bytes())

    async with Replica("ann", store=path, listen=LOCAL) as ann:
        assert ann.recovery is not None and ann.recovery.aside.endswith(".damaged-3")
    for number, data in enumerate(kept, 1):
        assert content(f"{path}.damaged-{number}") == data


@asynchronous
async def test_what_is_in_the_wal_is_read_although_the_file_is_beyond_use(tmp_path: Path) -> None:
    path, copy = tmp_path / "ann.db", tmp_path / "copy.db"
    async with Replica("ann", store=path) as ann:
        await write(ann, 0, 50)
        # As a kill would leave it.
        for suffix in ("", "-wal", ".lock"):
            shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
    assert content(f"{copy}-wal")
    overwrite(copy)

    async with Replica("ann", store=copy, listen=LOCAL) as ann:
        assert ann.recovery is not None and ann.recovery.changes == {"journal": 50}
        assert numbers(ann) == set(range(50))
        await write(ann, 50, 53)
    async with Replica("ann", store=copy) as ann:
        assert numbers(ann) == set(range(53))


# What is no damage


@asynchronous
async def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    letter, foreign = tmp_path / "letter.txt", tmp_path / "foreign.db"
    overwrite(letter)
    database = sqlite3.connect(foreign)
    database.execute("CREATE TABLE theirs(x)")
    database.commit()
    database.close()
    tier = f"sqlite:///{tmp_path}/tier.db"
    async with Replica("ann", checkpoints=[tier]) as ann:
        await write(ann, 0, 1)
        await ann.checkpoint()
    for path in (letter, foreign):
        before = path.read_bytes()

        with pytest.raises(CorruptStore, match=path.name):
            async with Replica("ann", store=path, listen=LOCAL, checkpoints=[tier]):
                pass

        assert path.read_bytes() == before
    assert not any("damaged" in name for name in names(tmp_path))


@asynchronous
async def test_who_wants_to_look_first_is_told_and_nothing_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    config = Config(recover=False)
    async with Replica("ann", store=path) as ann:
        await write(ann, 0, 100)
        await ann.checkpoint()
    with pytest.raises(StoreError, match="returned False"):
        async with Replica("ann", store=path, config=config, check=lambda replica: False):
            pass
    for ruin in (lambda: flip_in_row(path, 90), lambda: overwrite(path)):
        ruin()
        before = path.read_bytes()

        with pytest.raises(CorruptStore, match=r"ann\.db"):
            async with Replica("ann", store=path, config=config):
                pass

        assert path.read_bytes() == before
        assert not any("damaged" in name for name in names(tmp_path))


@asynchronous
async def test_a_store_that_another_has_open_is_not_recovered(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    async with Replica("ann", store=path) as ann:
        await write(ann, 0, 3)
        before = path.read_bytes()

        with pytest.raises(StoreLocked):
            async with Replica("ann", store=path, listen=LOCAL):
                pass

        assert path.read_bytes() == before and not any(
            "damaged" in name for name in names(tmp_path)
        )


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@asynchronous
async def test_a_full_disk_raises_and_leaves_the_damaged_store_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    async with Replica("ann", store=path) as ann:
        await write(ann, 0, 100)
        await ann.checkpoint()
    flip_in_row(path, 90)
    before = path.read_bytes()
    for size in (0, 10, 5_000, 15_000, 25_000):
        with pytest.raises(StoreUnavailable), files_no_longer_than(size):
            async with Replica("ann", store=path):
                pass
        assert content(path) == before and "ann.db.damaged-1" not in names(tmp_path)

    async with Replica("ann", store=path) as ann:
        assert numbers(ann) == set(range(100)) and ann.recovery is not None
        assert ann.recovery.source == "checkpoint" and content(ann.recovery.aside) == before
    assert not any("rebuilt" in name for name in names(tmp_path))


# Checkpoints


@asynchronous
async def test_an_old_copy_gets_what_a_checkpoint_has_and_another_writer(tmp_path: Path) -> None:
    path, backup = tmp_path / "ann.db", tmp_path / "backup.db"
    async with Replica("ann", store=path) as ann:
        await write(ann, 0, 10)
        writer = ann.writer
    shutil.copy(path, backup)
    async with Replica("ann", store=path) as ann:
        await write(ann, 10, 20)
        await ann.checkpoint()
    # In place, and the note of the last session with it: only the checkpoint tells.
    path.write_bytes(backup.read_bytes())
    path.with_name("ann.db.lock").unlink()

    async with Replica("ann", store=path) as ann:
        found = ann.recovery
        assert found is not None and found.source == "store" and found.writer == writer
        assert found.changes == {"store": 10, "checkpoint": 10} and found.checkpoint
        assert ann.writer != writer and numbers(ann) == set(range(20))
        assert ann.counter("count").value == 20
        await write(ann, 20, 21)
        writer = ann.writer
    async with Replica("ann", store=path) as ann:
        assert numbers(ann) == set(range(21)) and ann.writer == writer
        assert ann.recovery is not None and ann.recovery.changes == {"store": 21}


@pytest.mark.parametrize("is_hot", [False, True], ids=["closed", "while it ran"])
@asynchronous
async def test_an_old_copy_is_known_by_the_note_beside_it_and_loses_nothing(
    tmp_path: Path, is_hot: bool
) -> None:
    path, backup = tmp_path / "ann.db", tmp_path / "backup.db"
    async with Replica("bob", listen=LOCAL) as bob:
        async with Replica("ann", store=path, peers=[url(bob)]) as ann:
            await write(ann, 0, 5)
            if is_hot:
                shutil.copy(path, backup)
                shutil.copy(f"{path}-wal", f"{backup}-wal")
        if not is_hot:
            shutil.copy(path, backup)
        async with Replica("ann", store=path, peers=[url(bob)]) as ann:
            await write(ann, 5, 10)
            await ann.synced(timeout=10)
            writer = ann.writer
        put_back(backup, path)

        async with Replica("ann", store=path) as ann:
            assert ann.recovery is not None and ann.recovery.writer == writer != ann.writer
            # As many as were lost, so that numbers alone would not tell.
            for number in range(20, 25):
                ann.map("plan")[f"k{number}"] = f"value {number} alone"
                ann.counter("count").increment()
                await ann.durable(timeout=10)
        async with Replica("ann", store=path, peers=[url(bob)]) as ann:
            await ann.synced(timeout=10)
            for replica in (ann, bob):
                assert numbers(replica) == {*range(10), *range(20, 25)}
                assert replica.counter("count").value == 15
            assert not (await ann.compare(timeout=10)).diverged


@asynchronous
async def test_a_copy_beside_the_running_original_writes_as_another(tmp_path: Path) -> None:
    path, copy = tmp_path / "ann.db", tmp_path / "copy.db"
    async with Replica("ann", store=path, listen=LOCAL) as ann:
        await write(ann, 0, 5)
        for suffix in ("", "-wal", ".lock"):
            shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")

        async with Replica("copy", store=copy, peers=[url(ann)]) as other:
            assert other.writer != ann.writer and numbers(other) == set(range(5))
            ann.map("plan")["k5"] = "value 5 here"
            other.map("plan")["k6"] = "value 6 there"
            await other.synced(timeout=10)
            assert numbers(ann) == numbers(other) == set(range(7))


@asynchronous
async def test_a_checkpoint_of_another_history_is_not_mixed_in(tmp_path: Path) -> None:
    path, backup = tmp_path / "ann.db", tmp_path / "backup.db"
    tier = f"sqlite:///{tmp_path}/tier.db"
    async with Replica("ann", store=path) as ann:
        await write(ann, 0, 5)
        writer = ann.writer
    shutil.copy(path, backup)
    async with Replica("ann", store=path, checkpoints=[tier]) as ann:
        await write(ann, 5, 10)
        await ann.checkpoint()
    # Rolled back, and nothing tells: no note, and the tier is not reached.
    path.write_bytes(backup.read_bytes())
    path.with_name("ann.db.lock").unlink()
    async with Replica("ann", store=path) as ann:
        assert ann.writer == writer
        await write(ann, 20, 23)

    async with Replica("ann", store=path, checkpoints=[tier]) as ann:
        assert numbers(ann) == {*range(5), *range(20, 23)}, "what was written since stays"
        assert ann.writer != writer and ann.recovery is not None
        assert "somebody else wrote" in ann.recovery.losses[0]
        assert ann.recovery.changes == {"store": 8} and not ann.recovery.checkpoint


@asynchronous
async def test_without_a_store_the_checkpoint_is_what_there_is(tmp_path: Path) -> None:
    tier = f"sqlite:///{tmp_path}/tier.db"
    async with Replica("ann", checkpoints=[tier]) as ann:
        await write(ann, 0, 10)
        ann.document("other").map("plan")["a"] = 1
        await ann.checkpoint()
        writer = ann.writer

    async with Replica("ann", checkpoints=[tier], subscribe=["main", "@*"]) as ann:
        found = ann.recovery
        assert found is not None and found.source == "checkpoint"
        assert found.attempts[0] == ("store", "it is empty, and there is a checkpoint")
        assert ann.writer != writer and numbers(ann) == set(range(10))
        assert "other" not in list(ann.documents())
        await write(ann, 10, 12)
        await ann.checkpoint()
    async with Replica("ann", checkpoints=[tier]) as ann:
        assert numbers(ann) == set(range(12))


@pytest.mark.parametrize("what", ["a part", "a page", "a manifest"])
@asynchronous
async def test_a_damaged_checkpoint_is_named_and_the_next_good_one_is_used(
    tmp_path: Path, what: str
) -> None:
    path = tmp_path / "ann.db"
    async with Replica("ann", store=path) as ann:
        await write(ann, 0, 10)
        good = await ann.checkpoint()
        # So much that its part has pages of its own.
        ann.document("second").map("plan")["a"] = os.urandom(300_000)
        bad = await ann.checkpoint()
        entry = ann._checkpoints.manifests[bad.id].find("second")
        assert entry is not None
    ruin_value(f"{path}.checkpoints", bad.id if what == "a manifest" else entry.base.name, what)
    overwrite(path)

    ann = Replica("ann", store=path)
    named: list[CheckpointDamaged] = []
    ann.on(CheckpointDamaged, named.append)
    async with ann:
        assert ann.recovery is not None and ann.recovery.checkpoint == good.id != bad.id
        assert numbers(ann) == set(range(10)) and ann.recovery.source == "checkpoint"
        await asyncio.sleep(0)
        assert named or what == "a page"


@asynchronous
async def test_a_checkpoint_with_changes_that_were_taken_back_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    async with Replica("ann", store=path) as ann:
        await write(ann, 0, 5)
        good = await ann.checkpoint()
        await write(ann, 5, 10)
        await ann.checkpoint()
        # As after `IdentityRollback`, when no tier could be reached.
        disown(ann, ann.writer, {"main": 5})
        await ann.durable(timeout=10)
    # All that is left to tell of it is in the journal.
    flip_in_row(path, 3)

    async with Replica("ann", store=path) as ann:
        assert ann.recovery is not None and ann.recovery.checkpoint == good.id
        assert ann.recovery.changes["checkpoint"] == 5


# The check


@asynchronous
async def test_a_check_reads_and_does_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    seen: list[Any] = []

    async def look(replica: Replica) -> None:
        await asyncio.sleep(0)
        seen.append(len(replica.map("plan")))
        with pytest.raises(UsageError, match="a check reads"):
            replica.map("plan")["x"] = 1
        with pytest.raises(UsageError, match="a check reads"):
            await replica.durable()
        assert "x" not in replica.map("plan")

    async with Replica("ann", store=path, check=look) as ann:
        assert seen == [], "there was nothing to look at"
        await write(ann, 0, 5)
    async with Replica("ann", store=path, check=look) as ann:
        assert seen == [5] and ann.recovery is not None and ann.recovery.is_checked
        assert numbers(ann) == set(range(5))
    with pytest.raises(UsageError, match="check is a function"):
        Replica("ann", check=3)  # type: ignore[arg-type]


@asynchronous
async def test_what_the_check_does_not_admit_is_kept_and_the_next_source_used(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ann.db"
    async with Replica("ann", store=path) as ann:
        await write(ann, 0, 5)
        await ann.checkpoint()
        ann.map("plan")["poison"] = "value of a bug"
    before = path.read_bytes()

    async with Replica("ann", store=path, check=lambda r: "poison" not in r.map("plan")) as ann:
        found = ann.recovery
        assert found is not None and found.source == "checkpoint" and found.is_checked
        assert "returned False" in found.attempts[0].reason
        assert numbers(ann) == set(range(5))
        assert content(found.aside) == before


@pytest.mark.parametrize("kind", ["raises", "hangs", "returns False"])
@asynchronous
async def test_if_nothing_is_admitted_it_is_opened_with_the_best_and_told(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "ann.db"
    async with Replica("ann", store=path) as ann:
        await write(ann, 0, 5)
        await ann.checkpoint()
        await write(ann, 5, 8)

    async def refuse(replica: Replica) -> bool:
        if kind == "raises":
            raise ValueError("no goal")
        if kind == "hangs":
            await asyncio.Event().wait()
        return False

    ann = Replica("ann", store=path, check=refuse, config=Config(check_timeout=0.05))
    told: list[RecoveryEscalated] = []
    ann.on(RecoveryEscalated, told.append)
    async with ann:
        found = ann.recovery
        assert found is not None and found.is_escalated and found.source == "store"
        assert [each.source for each in found.attempts] == ["store", "checkpoint", "peers"]
        assert all(each.reason for each in found.attempts)
        assert {"raises": "no goal", "hangs": "longer than 0.05", "returns False": "returned"}[
            kind
        ] in found.attempts[1].reason
        assert numbers(ann) == set(range(8)) and not found.aside
        await asyncio.sleep(0)
        assert [event.attempts for event in told] == [found.attempts] and told[0].local
        said = dict(ann.document("@recovery").map("escalations"))["ann"]
        assert [source for source, _ in said["attempts"]] == ["store", "checkpoint", "peers"]


@asynchronous
async def test_with_nothing_left_and_nobody_to_ask_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    async with Replica("ann", store=path) as ann:
        await write(ann, 0, 5)
    overwrite(path)

    async with Replica("ann", store=path) as ann:
        assert ann.recovery is not None and ann.recovery.is_escalated
        assert ann.recovery.attempts[2] == ("peers", "no peers were named")
        assert numbers(ann) == set()
        await write(ann, 0, 2)
        async with Replica("bob", listen=LOCAL) as bob:
            heard: asyncio.Future[RecoveryEscalated] = asyncio.get_running_loop().create_future()
            bob.on(RecoveryEscalated, heard.set_result)
            ann.connect(url(bob))
            event = await asyncio.wait_for(heard, 10)
            assert event.agent == "ann" and not event.local
            assert event.attempts == ann.recovery.attempts


@asynchronous
async def test_what_comes_from_peers_is_checked_when_it_is_here(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    verdicts = [True, False]
    seen: list[int] = []

    def check(replica: Replica) -> bool:
        seen.append(len(replica.map("plan")))
        return verdicts.pop(0)

    async with Replica("bob", listen=LOCAL) as bob:
        async with Replica("ann", store=path, peers=[url(bob)]) as ann:
            await write(ann, 0, 5)
            await ann.synced(timeout=10)
        for expected in (Recovered, RecoveryEscalated):
            overwrite(path)
            ann = Replica("ann", store=path, peers=[url(bob)], check=check)
            told = ann.events(expected)
            async with ann:
                assert ann.recovery is not None and ann.recovery.source == "peers"
                assert not ann.recovery.is_checked and not ann.recovery.is_escalated
                async for event in told:
                    if isinstance(event, RecoveryEscalated) or event.recovery.agreed:
                        break
                assert ann.recovery.is_checked == (expected is Recovered)
                assert ann.recovery.is_escalated == (expected is RecoveryEscalated)
                assert numbers(ann) == set(range(5))
    assert seen == [5, 5]


# Peers


@asynchronous
async def test_peers_say_whether_they_have_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    async with (
        Replica("bob", listen=LOCAL) as bob,
        Replica("cat", listen=LOCAL, peers=[url(bob)]) as cat,
    ):
        async with Replica("ann", store=path, peers=[url(bob), url(cat)]) as ann:
            await write(ann, 0, 5)
            await ann.synced(timeout=10)

        async with Replica("ann", store=path, peers=[url(bob), url(cat)]) as ann:
            async for event in ann.events(Recovered):
                assert isinstance(event, Recovered)
                if event.recovery.agreed:
                    break
            assert ann.recovery is not None and ann.recovery.agreed
            assert set(ann.recovery.agreed) <= {"bob", "cat"} and not ann.recovery.is_escalated


@asynchronous
async def test_if_two_peers_have_something_else_everybody_is_told(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    async with (
        Replica("bob", listen=LOCAL) as bob,
        Replica("cat", listen=LOCAL, peers=[url(bob)]) as cat,
    ):
        peers = [url(bob), url(cat)]
        async with Replica("ann", store=path, peers=peers) as ann:
            ann.map("plan")["goal"] = "ship"
            await ann.synced(timeout=10)
        told: asyncio.Future[RecoveryEscalated] = asyncio.get_running_loop().create_future()
        bob.on(RecoveryEscalated, told.set_result)

        async with Replica("ann", store=path, peers=peers) as ann:
            # As memory does that fails.
            flip_value(ann.document("main"), "mplan" + SEPARATOR + "goal")
            event = await asyncio.wait_for(told, 20)

            assert event.agent == "ann" and [source for source, _ in event.attempts] == ["store"]
            assert "have something else at main: plan['goal']" in event.attempts[0].reason
            assert ann.recovery is not None and ann.recovery.is_escalated


# Elsewhere


def test_threads_learn_of_it_too(tmp_path: Path) -> None:
    path = tmp_path / "ann.db"
    with blocking.Replica("ann", store=path) as ann:
        ann.map("plan")["goal"] = "ship"
        assert ann.recovery is not None and not ann.recovery.changes
    seen: list[Any] = []
    again = blocking.Replica("ann", store=path, check=lambda r: seen.append(r.map("plan")["goal"]))
    assert again.recovery is None
    with again:
        assert again.recovery is not None and again.recovery.changes == {"store": 1}
        assert seen == ["ship"] and again.recovery.is_checked


@asynchronous
async def test_a_relay_tells_prometheus_how_it_came_back(tmp_path: Path) -> None:
    path = tmp_path / "relay.db"
    async with Replica("relay", store=path, role="relay") as relay:
        await write(relay, 0, 5)
        await relay.checkpoint()
    overwrite(path)
    async with Replica("relay", store=path, role="relay") as relay:
        metrics = Metrics(relay, Holdings(relay), Chronicle(relay))

        text = encode(metrics.families(is_ready=True, viewers=0)).decode()

        labels = 'source="checkpoint",escalated="false"'
        assert f"crdtstate_recovery_seconds{{{labels}}} 0." in text
