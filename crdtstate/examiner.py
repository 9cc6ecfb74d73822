"""
Asks `trial`, a process of its own, whether pycrdt survives what others wrote in native documents.

One process serves all native documents of a replica. It is started when it is first needed, and
started anew when it dies or does not answer. Questions are sent as they come, and answered in that
order. A bad word is believed only when it was said of one question alone, on a copy that was just
made; that the process died of it, only at the second time: it may have been killed by others. So
whenever it dies, or refuses something, all that is open is asked again, one by one.

What cannot be tried at all (the document alone is more than the process can hold) goes in untried.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from crdtstate import trial
from crdtstate.change import Change, Snapshot
from crdtstate.document import Document
from crdtstate.verdicts import Examine

log = logging.getLogger("crdtstate")

PATIENCE = 10.0
"""Seconds without an answer after which the process is killed, for one more of which there are
these bytes: it ends itself long before, unless something stops it altogether."""
PATIENCE_BYTES = trial.BYTES_PER_SECOND // 4

DEATHS = 2
"""How often a question that is asked alone may end the process."""

RETRY = 5.0
"""Seconds until starting the process is tried again."""

ANSWERS_BYTES_MAX = 1 << 20
LIBRARIES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")

# Not with the package's own __init__, which imports all of it: this starts in a third of the time.
START = """
import sys, types
sys.path[:] = __import__("json").loads(sys.argv[2])
package = types.ModuleType("crdtstate")
package.__path__ = [sys.argv[1]]
sys.modules["crdtstate"] = package
from crdtstate.trial import main
main()
"""


@dataclass(slots=True)
class _Question:
    number: int
    document: Document
    item: Change | Snapshot
    deaths: int = 0


class Examiner:
    """The process that tries, as the agent sees it.

    Args:
        agent: The agent's name.
        tell: Told the number of a question, and why what it is about is bad; None if it is not.
            If it is, all other questions about that document are forgotten.
        spawn: Runs a task of this name.
    """

    def __init__(
        self,
        agent: str,
        tell: Callable[[int, str | None], None],
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
    ) -> None:
        self._agent = agent
        self._tell = tell
        self._spawn = spawn
        self._open: dict[int, _Question] = {}
        # How far the copies in the process will be once it has read all that was sent to it.
        self._copies: dict[str, dict[int, int]] = {}
        self._process: asyncio.subprocess.Process | None = None
        # Up to which number they are asked one by one, and the one that is asked.
        self._careful = 0
        self._alone: int | None = None
        # Its document is being copied; the question follows once it is.
        self._is_copying = False
        self._asked = asyncio.Event()
        self._is_running = False
        # Since when an answer is waited for, and how many bytes were sent since; and how large
        # the copies are.
        self._since = 0.0
        self._sent = 0
        self._sizes: dict[str, int] = {}
        # How many processes there have been, and copies in them.
        self.started = 0
        self.copied = 0

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return None if self._process is None else self._process.pid

    # Asking

    def ask(self, examine: Examine) -> None:
        """Have something tried, after all that was asked for before."""
        if not self._open:
            self._await_answer()
        self._open[examine.number] = _Question(*examine)
        if not self._is_running:
            self._is_running = True
            self._spawn(self._run(), "examiner")
        self._asked.set()
        if self._process is not None and not self._careful:
            self._send(self._open[examine.number])

    def feed(self, change: Change) -> None:
        """An own change was sealed: whoever holds a copy of its document takes it in."""
        name = change.document
        if name in self._copies and self._process is not None:
            if self._advance(change):
                self._write(trial.FEED, 0, name, change.writer, change.update)
            else:
                self.forget(name)

    def forget(self, document: str) -> None:
        """A document was loaded anew: its copy is of no use."""
        self._copies.pop(document, None)
        self._sizes.pop(document, None)

    # The process

    async def _run(self) -> None:
        while True:
            try:
                if _is_frozen():
                    await self._take_untried()
                    continue
                await self._serve()
            except OSError as exc:
                # What others write in native documents waits until it can be tried.
                log.error("%s: no process to try changes in: %s", self._agent, exc)
                await asyncio.sleep(RETRY)
            except Exception:
                # A bug of ours; what waits is not to wait for ever.
                log.exception("%s: the examiner failed", self._agent)
                await asyncio.sleep(RETRY)
            self._asked.clear()
            if not self._open:
                await self._asked.wait()

    async def _take_untried(self) -> None:
        """There is no interpreter to start: all there is, is the guard."""
        if self._open:
            log.error("%s: nothing to try changes with; they go in untried", self._agent)
        for number in list(self._open):
            self._end(number, None)
        self._asked.clear()
        await self._asked.wait()

    async def _serve(self) -> None:
        """Start the process and talk to it until it is gone."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-c",
            START,
            str(Path(__file__).parent),
            json.dumps(_search_path()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd="/",
            # No secrets; only where the interpreter's own libraries are.
            env={name: os.environ[name] for name in LIBRARIES if name in os.environ},
        )
        self.started += 1
        self._process = process
        self._copies.clear()
        self._sizes.clear()
        self._await_answer()
        self._is_copying = False
        self._alone = None
        try:
            self._go_on()
            await self._listen(process)
        except BaseException:
            _kill(process)
            raise
        finally:
            self._process = None
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()
            # To its end, or it is never closed.
            assert process.stdout is not None
            while await process.stdout.read(ANSWERS_BYTES_MAX):
                pass
        self._note_death(process.returncode or 0)

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        frames = trial.Frames(ANSWERS_BYTES_MAX)
        while True:
            try:
                async with asyncio.timeout(self._patience()):
                    data = await process.stdout.read(ANSWERS_BYTES_MAX)
            except TimeoutError:
                waited = asyncio.get_running_loop().time() - self._since
                if self._open and waited > self._patience():
                    _kill(process)
                continue
            if not data:
                return
            self._await_answer()
            try:
                for number, verdict, reason in frames.feed(data):
                    if not self._note_answer(int(number), int(verdict), str(reason)):
                        break
            except (ValueError, TypeError) as exc:
                log.error("%s: an answer that is none: %s", self._agent, exc)
                _kill(process)

    def _await_answer(self) -> None:
        self._since, self._sent = asyncio.get_running_loop().time(), 0

    def _patience(self) -> float:
        """For how long an answer is waited for."""
        return PATIENCE + (self._sent + sum(self._sizes.values())) / PATIENCE_BYTES

    # Questions and answers

    def _go_on(self) -> None:
        """Send what may be sent now."""
        if not self._careful:
            for question in list(self._open.values()):
                if question.number in self._open:
                    self._send(question)
            return
        first = next(iter(self._open.values()), None)
        if first is None or first.number > self._careful:
            self._careful = 0
            self._go_on()
        else:
            self._alone, self._is_copying = first.number, True
            if not self._copy(first):
                self._alone, self._is_copying = None, False
                self._go_on()

    def _send(self, question: _Question) -> None:
        name = question.document.name
        if name not in self._copies or not self._advance(question.item):
            if any(each.document.name == name for each in self._before(question)):
                # What is asked about comes between the document and this.
                self._begin_anew()
                return
            if not self._copy(question):
                return
        self._write_item(question)

    def _before(self, question: _Question) -> Iterator[_Question]:
        return takewhile(lambda each: each is not question, self._open.values())

    def _copy(self, question: _Question) -> bool:
        """Have the document copied as it is, to ask the question after it; False if there is
        nothing to ask any more."""
        document, item = question.document, question.item
        if not document.is_broken:
            self._copies[document.name] = dict(document.version)
            if self._advance(item):
                state = document.engine.state()
                self._sizes[document.name] = len(state)
                self.copied += 1
                self._write(trial.LOAD, 0, document.name, 0, state)
                return True
        # The document was loaded anew, or has it from elsewhere. What is needed is asked again.
        self.forget(document.name)
        self._end(question.number, None)
        return False

    def _write_item(self, question: _Question) -> None:
        item = question.item
        if isinstance(item, Change):
            self._write(trial.CHANGE, question.number, item.document, item.writer, item.update)
        else:
            self._write(trial.SNAPSHOT, question.number, item.document, 0, item.state)

    def _advance(self, item: Change | Snapshot) -> bool:
        """Note that a copy gets this; False if it cannot take it."""
        copy = self._copies[item.document]
        if isinstance(item, Change):
            if copy.get(item.writer, 0) != item.seq - 1 or any(
                copy.get(writer, 0) < seq for writer, seq in item.deps
            ):
                return False
            copy[item.writer] = item.seq
        else:
            for writer, seq in item.version.items():
                copy[writer] = max(seq, copy.get(writer, 0))
        return True

    def _write(self, *request: object) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        data = trial.frame(*request)
        self._sent += len(data)
        self._process.stdin.write(data)

    def _note_answer(self, number: int, verdict: int, reason: str) -> bool:
        """Take an answer; False if the process has to be started anew."""
        if not number:
            # A copy was made.
            if self._is_copying and self._alone is not None and verdict == trial.SOUND:
                self._is_copying = False
                question = self._open.get(self._alone)
                if question is not None:
                    self._write_item(question)
                else:
                    self._alone = None
                    self._go_on()
            elif verdict != trial.SOUND:
                return self._cannot_copy(reason)
            return True
        if number not in self._open:
            return True
        is_alone = number == self._alone
        if verdict != trial.SOUND and not is_alone:
            self._begin_anew()
            return False
        self._alone = None
        self._end(number, None if verdict == trial.SOUND else reason)
        if is_alone and self._process is not None:
            self._go_on()
        return True

    def _cannot_copy(self, reason: str) -> bool:
        if self._alone is None:
            self._begin_anew()
            return False
        log.error("%s: what others write goes in untried: %s", self._agent, reason)
        number, self._alone = self._alone, None
        self._is_copying = False
        self._end(number, None)
        self._go_on()
        return True

    def _note_death(self, code: int) -> None:
        self._careful = max(self._open, default=0)
        question = None if self._alone is None else self._open.get(self._alone)
        if len(self._open) == 1:
            (question,) = self._open.values()
        if question is None:
            return
        question.deaths += 1
        if question.deaths < DEATHS:
            return
        why = _cause(code)
        if self._is_copying:
            log.error(
                "%s: %r is more than can be tried (%s): what others write there goes in untried",
                self._agent,
                question.document,
                why,
            )
            self._end(question.number, None)
        else:
            self._end(question.number, f"pycrdt does not survive it: {why}")

    def _end(self, number: int, fault: str | None) -> None:
        question = self._open.pop(number)
        if fault is not None:
            name = question.document.name
            self.forget(name)
            for other in [n for n, each in self._open.items() if each.document.name == name]:
                del self._open[other]
        self._tell(number, fault)

    def _begin_anew(self) -> None:
        """End the process, and ask again one by one."""
        self._careful = max(self._open, default=0)
        if self._process is not None:
            _kill(self._process)
            self._process = None


def _is_frozen() -> bool:
    """Whether `sys.executable` is the program itself, as PyInstaller makes it, or unknown."""
    return bool(getattr(sys, "frozen", False)) or not sys.executable


def _search_path() -> list[str]:
    return [os.path.abspath(path) for path in sys.path]


def _kill(process: asyncio.subprocess.Process) -> None:
    # Not by its method: that looks whether it has ended, and then asyncio cannot tell how.
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _cause(code: int) -> str:
    """Why a process ended with this code."""
    match -code:
        case signal.SIGPROF:
            return "it takes too long"
        case signal.SIGKILL:
            return "it takes too long, or too much memory"
        case number if number > 0:
            return f"signal {number}"
    return f"it panics, or takes too much memory (exit code {code})"
