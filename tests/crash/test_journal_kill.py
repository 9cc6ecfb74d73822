"""Real processes, killed with SIGKILL while they write: what they confirmed is there."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from journal_writer import WRITER, change

from crdtstate.stores import Saved
from crdtstate.stores.journal import Journal, verify

ROUNDS = 40


@pytest.fixture
def writers() -> Iterator[subprocess.Popen[str]]:
    script = Path(__file__).with_name("journal_writer.py")
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


def kill_a_writer(writers: subprocess.Popen[str], path: Path, confirmed_min: int) -> int:
    """Kill a writer some time after so many confirmations; return the newest confirmed seq."""
    print(path, file=writers.stdin, flush=True)
    pid = int(next(writers.stdout).removeprefix("pid "))
    for _ in range(confirmed_min):
        line = next(writers.stdout)
    os.kill(pid, signal.SIGKILL)
    for later in iter(writers.stdout.readline, "end\n"):
        line = later
    return int(line.removeprefix("confirmed "))


def test_whatever_was_confirmed_survives_kill_9(
    writers: subprocess.Popen[str], tmp_path: Path
) -> None:
    path = tmp_path / "state.db"
    rng = random.Random(9)

    for _ in range(ROUNDS):
        confirmed = kill_a_writer(writers, path, rng.randint(1, 300))

        with closing(Journal(path)) as journal:
            session = journal.session
            assert (session.writer, session.clean) == (WRITER, False)
            assert session.same_boot and session.same_file
            known = 0
            for item in journal.load():
                if isinstance(item, Saved):
                    known = item.version[WRITER]
                else:
                    assert item == change(known + 1)
                    known += 1
            assert known >= confirmed
            first = journal.floor("plan").get(WRITER, 0) + 1
            kept, _ = journal.read("plan", [(WRITER, first, known)], 10**9)
            assert kept == [change(seq).data for seq in range(first, known + 1)]

    # Nothing is damaged; but the changes are made up, and do not fit.
    problem, *_ = verify(path).problems
    assert problem.endswith(("of an unknown scheme", "checksum does not match"))
    assert confirmed > 10 * ROUNDS
