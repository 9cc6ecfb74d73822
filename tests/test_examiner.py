"""The examiner: real processes, some of which die of what they try."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from harness import Agent, asynchronous

from crdtstate import ChangeQuarantined, Config, PeerRejected, Replica, examiner, trial
from crdtstate.change import Change, Snapshot
from crdtstate.examiner import Examiner
from crdtstate.verdicts import Examine

# What pycrdt might not survive: the guard leaves no such change that is known.
DEADLY = """
import ctypes
from crdtstate.native import Native
apply, load = Native.apply, Native.load
def hurt(update):
    if b"SEGFAULT" in update:
        ctypes.string_at(0)
    while b"HANG" in update:
        pass
    if b"PANIC" in update:
        class PanicException(BaseException):
            pass
        raise PanicException
def apply_or_die(self, update, writer):
    hurt(update)
    return apply(self, update, writer)
def load_or_die(self, state):
    hurt(state)
    return load(self, state)
Native.apply, Native.load = apply_or_die, load_or_die
main()
"""


@pytest.fixture
def deadly(monkeypatch: pytest.MonkeyPatch) -> None:
    start = examiner.START.replace("\nmain()\n", DEADLY)
    assert start != examiner.START
    monkeypatch.setattr(examiner, "START", start)


class Court:
    """An examiner, the questions that it was asked, and its verdicts."""

    def __init__(self) -> None:
        self.verdicts: dict[int, str | None] = {}
        self.on_sound: Callable[[int], object] = lambda number: None
        self._tasks: list[asyncio.Task[None]] = []
        self._told = asyncio.Event()
        self._asked = 0
        self.examiner = Examiner("court", self._tell, self._spawn)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work, name=name))

    def _tell(self, number: int, fault: str | None) -> None:
        self.verdicts[number] = fault
        if fault is None:
            self.on_sound(number)
        self._told.set()

    def ask(self, agent: Agent, item: Change | Snapshot) -> int:
        self._asked += 1
        document = agent.find_or_make(item.document, True)
        self.examiner.ask(Examine(self._asked, document, item))
        return self._asked

    async def wait_for(self, *numbers: int) -> list[str | None]:
        while not self.verdicts.keys() >= set(numbers):
            self._told.clear()
            await self._told.wait()
        return [self.verdicts[number] for number in numbers]

    async def __aenter__(self) -> Court:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def typed(agent: Agent, text: str, document: str = "notes") -> Change:
    """Type at the end; returns the change."""
    body = agent.document(document, shared=True).text("body")
    body.insert(len(body), text)
    (change,) = agent.sealed()
    return change


@asynchronous
async def test_what_is_sound_is_found_sound_in_one_process() -> None:
    writer, reader = Agent(7), Agent(9)
    async with Court() as court:
        changes = [typed(writer, f"line {n}\n") for n in range(300)]
        asked = []
        for change in changes:
            asked.append(court.ask(reader, change))

        assert await court.wait_for(*asked) == [None] * 300
        assert court.examiner.started == 1


@asynchronous
async def test_own_changes_are_fed_to_the_copy() -> None:
    writer, reader = Agent(7), Agent(9)
    async with Court() as court:

        async def take(change: Change) -> None:
            assert await court.wait_for(court.ask(reader, change)) == [None]
            reader.receive(change)

        await take(typed(writer, "one"))
        for n in range(20):
            mine = typed(reader, f"mine {n}")
            court.examiner.feed(mine)
            writer.receive(mine)
            await take(typed(writer, f"yours {n}"))

        assert court.examiner.started == 1
        # Had the copy been made again and again, its size would have been noted anew.
        assert court.examiner.copied == 1


@asynchronous
async def test_a_change_that_builds_on_what_the_copy_lacks_has_it_made_anew() -> None:
    writer, reader = Agent(7), Agent(9)
    async with Court() as court:
        change = typed(writer, "one")
        assert await court.wait_for(court.ask(reader, change)) == [None]
        reader.receive(change)
        # Nobody feeds this one.
        writer.receive(typed(reader, "mine"))

        assert await court.wait_for(court.ask(reader, typed(writer, "two"))) == [None]
        assert court.examiner.copied == 2


@pytest.mark.parametrize("how", ["SEGFAULT", "PANIC", "HANG"])
@asynchronous
async def test_what_the_process_does_not_survive_is_named_and_the_rest_is_sound(
    how: str, deadly: None
) -> None:
    writer, other, reader = Agent(7), Agent(8), Agent(9)
    async with Court() as court:
        changes = [typed(writer, "fine"), typed(writer, f"xx{how}xx")]
        changes += [typed(other, f"{n}", "elsewhere") for n in range(20)]
        # What is found sound is delivered before anything else is asked.
        court.on_sound = lambda number: reader.receive(changes[number - 1])

        verdicts = await court.wait_for(*[court.ask(reader, change) for change in changes])

        assert [fault is None for fault in verdicts] == [True, False] + [True] * 20
        assert "does not survive" in str(verdicts[1])
        # One dies with all, one with this alone, and once more.
        assert court.examiner.started == 4


@asynchronous
async def test_a_process_that_others_kill_condemns_nobody() -> None:
    writer, reader = Agent(7), Agent(9)
    async with Court() as court:
        change = typed(writer, "fine")
        assert await court.wait_for(court.ask(reader, change)) == [None]
        reader.receive(change)
        assert court.examiner.pid is not None
        os.kill(court.examiner.pid, signal.SIGSTOP)
        asked = court.ask(reader, typed(writer, "more"))
        os.kill(court.examiner.pid, signal.SIGKILL)

        assert await court.wait_for(asked) == [None]
        assert court.examiner.started == 2


@asynchronous
async def test_a_frozen_program_starts_itself_not_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    writer, reader = Agent(7), Agent(9)
    async with Court() as court:
        for change in [typed(writer, "one"), typed(writer, "two")]:
            assert await court.wait_for(court.ask(reader, change)) == [None]

        assert court.examiner.started == 0


@asynchronous
async def test_a_snapshot_is_examined_too(deadly: None) -> None:
    writer, reader = Agent(7), Agent(9)
    async with Court() as court:
        typed(writer, "fine")
        snapshot = writer.document("notes").snapshot()
        assert await court.wait_for(court.ask(reader, snapshot)) == [None]

        typed(writer, "HANG")
        snapshot = writer.document("notes").snapshot()
        (fault,) = await court.wait_for(court.ask(reader, snapshot))
        assert fault is not None and "takes too long" in fault


@asynchronous
async def test_what_breaks_the_rules_is_refused_for_good_only_on_a_fresh_copy() -> None:
    writer, reader = Agent(7), Agent(9)
    async with Court() as court:
        one, two = typed(writer, "one"), typed(writer, "two")
        # The copy gets `two` in place of `one`, whatever the versions say.
        bad = one._replace(update=two.update)

        (fault,) = await court.wait_for(court.ask(reader, bad))

        assert fault is not None and "does not continue" in fault
        assert court.examiner.started == 2


# The process itself


def test_the_process_has_no_files_sockets_or_secrets_and_little_memory() -> None:
    code = """
import os, socket, sys
from crdtstate import trial
trial._give_up_everything()
def fails(what):
    try:
        what()
    except (OSError, MemoryError) as exc:
        return True
    return False
done = [
    fails(lambda: open("/etc/passwd")),
    fails(lambda: socket.socket()),
    fails(lambda: os.pipe()),
    fails(lambda: bytearray(3 << 30)),
]
print(done, sorted(os.environ.keys() & {"SECRET", "HOME"}))
"""
    start = examiner.START.replace("from crdtstate.trial import main\nmain()\n", code)
    done = subprocess.run(
        [sys.executable, "-I", "-c", start, str(Path(trial.__file__).parent), json.dumps(sys.path)],
        env={},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[True, True, True, True] []\n", done.stderr


def test_frames_come_out_as_they_went_in_however_they_were_cut() -> None:
    whole = trial.frame(1, "a") + trial.frame(2, b"x" * 1000) + trial.frame(3)
    frames = trial.Frames(2000)

    found = [each for at in range(0, len(whole), 7) for each in frames.feed(whole[at : at + 7])]

    assert found == [[1, "a"], [2, b"x" * 1000], [3]]
    with pytest.raises(ValueError, match="a frame of"):
        list(frames.feed(b"\xff\xff\xff\xff"))


# Replicas


FAST = Config(heartbeat=0.2, link_timeout=2.0, want_delay=0.05, want_retry=0.1)


async def until(condition: Callable[[], bool], *replicas: Replica) -> None:
    """Wait until something is so, looking at each event."""
    while not condition():
        await asyncio.wait(
            [asyncio.ensure_future(anext(replica.events())) for replica in replicas],
            return_when=asyncio.FIRST_COMPLETED,
            timeout=0.05,
        )


@asynchronous
async def test_a_deadly_change_is_quarantined_and_the_document_stays(deadly: None) -> None:
    async with (
        Replica("careful", listen="ws://127.0.0.1:0", config=FAST) as careful,
        Replica("hostile", peers=[str(careful.address)], config=FAST) as hostile,
        Replica("honest", peers=[str(careful.address)], config=FAST) as honest,
    ):
        told: list[ChangeQuarantined | PeerRejected] = []
        careful.on(ChangeQuarantined, told.append)
        careful.on(PeerRejected, told.append)
        mine = careful.document("notes", shared=True).text("body")
        mine.insert(0, "ours ")
        bad = hostile.document("notes", shared=True).text("body")
        # It breaks out of no examiner of its own: own edits are not examined.
        bad.insert(0, "SEGFAULT")
        await until(lambda: len(told) > 1, careful)
        theirs = honest.document("notes", shared=True).text("body")
        await until(lambda: "ours" in str(theirs), honest)
        theirs.insert(0, "still ")
        await until(lambda: "still" in str(mine), careful)

        assert str(mine) == "still ours "
        (aside,) = careful.quarantined()
        assert aside.dot == (hostile.writer, 1) and aside.agent == "hostile"
        assert "signal 11" in aside.reason
        assert {type(event) for event in told} == {ChangeQuarantined, PeerRejected}

        # Released, it is tried again, with the same outcome.
        told.clear()
        careful.release(aside)
        assert careful.quarantined() == []
        await until(lambda: len(told) > 1, careful)
        assert careful.quarantined() == [aside] and str(mine) == "still ours "
