"""What a process died of: noted beside the store, and quarantined at the third start."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import crash_child
import pytest
from crash_child import FAST
from harness import asynchronous

from crdtstate import InvalidUpdate, Replica
from crdtstate.stores.file import verify
from crdtstate.stores.suspects import DEATHS_MAX, SNAPSHOT_DEATHS_MAX, Suspects, beside, read

ONE, TWO = b"1" * 16, b"2" * 16


def die(path: Path, id: bytes, writer: int = 7) -> None:
    """What a process leaves behind that dies while it applies something."""
    suspects = Suspects(path)
    suspects.begin(id, "plan", writer, 3)
    suspects.close()


def test_a_process_that_lives_leaves_no_suspects(tmp_path: Path) -> None:
    suspects = Suspects(tmp_path / "store.db")
    suspects.begin(ONE, "plan", 7, 3)
    suspects.end(ONE)
    suspects.close()

    assert list(tmp_path.iterdir()) == []
    again = Suspects(tmp_path / "store.db")
    assert (list(again), again.died_at) == ([], None)


def test_the_second_death_quarantines_a_change(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    for deaths in range(1, DEATHS_MAX + 1):
        die(path, ONE)
        suspects = Suspects(path)
        assert [(s.document, s.writer, s.seq, s.deaths) for s in suspects] == [
            ("plan", 7, 3, deaths)
        ]
        assert bool(suspects.quarantined) == (deaths == DEATHS_MAX)
        suspects.close()

    third = Suspects(path)
    assert third.died_at is None
    with pytest.raises(InvalidUpdate, match="change 7:3 ended the process 2 times"):
        third.begin(ONE, "plan", 7, 3)
    third.begin(TWO, "plan", 7, 4)
    assert [s.id for s in read(path) if s.is_quarantined] == [ONE]

    third.release(ONE)
    third.begin(ONE, "plan", 7, 3)
    third.close()
    assert read(path) == []


def test_what_applies_in_the_end_is_no_suspect_any_more(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    die(path, ONE)
    suspects = Suspects(path)
    suspects.begin(ONE, "plan", 7, 3)
    suspects.end(ONE)
    suspects.close()

    die(path, ONE)
    assert not Suspects(path).quarantined


def test_a_snapshot_is_given_more_chances(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    for _ in range(SNAPSHOT_DEATHS_MAX):
        assert not Suspects(path).quarantined
        die(path, ONE, writer=0)

    (found,) = Suspects(path).quarantined
    assert str(found) == "document 'plan': the snapshot ended the process 5 times"


@pytest.mark.parametrize(
    "data", [b"", b"applying1", b"\xff" * 5000, b"applying1".ljust(2048, b"\1") + b"\xc1"]
)
def test_a_file_that_is_none_tells_nothing(tmp_path: Path, data: bytes) -> None:
    beside(tmp_path / "store.db").write_bytes(data)

    suspects = Suspects(tmp_path / "store.db")
    suspects.begin(ONE, "plan", 7, 3)
    assert list(suspects) == []


def test_without_a_writable_directory_the_store_works_as_well(tmp_path: Path) -> None:
    suspects = Suspects(tmp_path / "gone" / "store.db")
    suspects.begin(ONE, "plan", 7, 3)
    suspects.end(ONE)
    assert list(suspects) == []


# Real processes


async def child(store: Path, peer: str, how: str, *wanted: str) -> tuple[int, Any]:
    """Run an agent until it ends; returns its exit code and what it has to say."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        crash_child.__file__,
        str(store),
        peer,
        how,
        "until",
        *wanted,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    code = process.returncode
    assert code is not None
    return code, json.loads(out) if code == 0 else None


@asynchronous
async def test_a_change_that_kills_whoever_applies_it_is_quarantined_at_the_third_start(
    tmp_path: Path,
) -> None:
    store = tmp_path / "victim.db"
    async with (
        Replica("writer", listen="ws://127.0.0.1:0", config=FAST) as writer,
        Replica("other", peers=[str(writer.address)], config=FAST) as other,
    ):
        peer = str(writer.address)
        writer.map("plan")["first"] = "fine"
        other.map("plan")["theirs"] = "fine"
        assert (await child(store, peer, "deadly", "first=fine", "theirs=fine"))[0] == 0
        writer.map("plan")["bad"] = "DEADLY"

        assert (await child(store, peer, "deadly", "bad=DEADLY"))[0] == -signal.SIGSEGV
        assert (await child(store, peer, "deadly", "bad=DEADLY"))[0] == -signal.SIGSEGV
        # Written without knowing of it, or after it.
        writer.map("plan")["later"] = "waits"
        code, third = await child(store, peer, "deadly", "first=fine", "theirs=fine")

        assert code == 0
        assert third["plan"] == {"first": "fine", "theirs": "fine"}
        assert third["aside"] == [["main", writer.writer, 2]]
        assert third["source"] == "store"
        assert verify(store).problems == []
        (told,) = verify(store).quarantined
        assert told.endswith(f"change {writer.writer:x}:2 ended the process 2 times")
        command = (sys.executable, "-m", "crdtstate", "verify", str(store))
        shown = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        out, _ = await shown.communicate()
        assert shown.returncode == 0 and f"quarantined: {told}" in " ".join(out.decode().split())

        # Once it is released, all is well with a pycrdt that survives it.
        suspects = Suspects(store)
        suspects.release(suspects.quarantined[0].id)
        suspects.close()
        code, fourth = await child(store, peer, "harmless", "bad=DEADLY", "later=waits")
        assert code == 0
        assert fourth["plan"].keys() == {"first", "theirs", "bad", "later"}


@asynchronous
async def test_a_row_that_kills_at_opening_is_quarantined_at_the_third_start(
    tmp_path: Path,
) -> None:
    store = tmp_path / "victim.db"
    async with Replica("writer", listen="ws://127.0.0.1:0", config=FAST) as writer:
        peer = str(writer.address)
        writer.map("plan")["first"] = "fine"
        await writer.durable()
        writer.map("plan")["bad"] = "DEADLY"
        assert (await child(store, peer, "harmless", "bad=DEADLY"))[0] == 0

        # Nobody else is there now.
        assert (await child(store, "", "deadly", "first=fine"))[0] == -signal.SIGSEGV
        assert (await child(store, "", "deadly", "first=fine"))[0] == -signal.SIGSEGV
        code, third = await child(store, "", "deadly", "first=fine")

        assert code == 0
        assert third["plan"] == {"first": "fine"}
        assert third["source"] == "checkpoint"
        assert verify(store).problems == []
        assert len(verify(store).quarantined) == 1
        # What was put aside has all.
        assert verify(Path(f"{store}.damaged-1")).changes == 2
        # And it stays so when the writer is there.
        code, fourth = await child(store, peer, "deadly", "first=fine")
        assert (code, fourth["plan"]) == (0, {"first": "fine"})
