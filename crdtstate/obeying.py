"""
What an agent does with commands: it finds those that are for it, executes them, and says what came
of it.

The `Docket` of a replica looks at the board whenever something there changes, and does what
`judging` says. Commands run one after the other, in the order of their stamps. Aside from that
order run those that must not wait, or that others must not wait for: questions, packets that are
shared, and what only watches others. Before each that changes something, the agent writes that it
has started, and waits until that is durable.
"""

from __future__ import annotations

import asyncio
import heapq
import inspect
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from crdtstate import sharing, verbs
from crdtstate.board import Board
from crdtstate.commands import (
    COMMANDS,
    COMMANDS_MAX,
    CONTROL,
    OWN_BYTES_MAX,
    PASSING,
    QUESTIONS,
    REASON_CHARS_MAX,
    REPORT,
    RESULT_BYTES_MAX,
    RESULTS,
    SHARE,
    VERB_CHARS_MAX,
    VERSION,
    Command,
)
from crdtstate.document import Delivery
from crdtstate.documents import DocumentSet
from crdtstate.errors import (
    CommandError,
    CRDTStateError,
    ReplicaClosed,
    StoreError,
    UnsupportedValue,
    UsageError,
)
from crdtstate.events import CommandReceived, CommandSettled
from crdtstate.judging import Judge, Step
from crdtstate.link import takes
from crdtstate.outcomes import Fulfilled, Rejected
from crdtstate.slots import SEPARATOR
from crdtstate.values import pack

if TYPE_CHECKING:
    from crdtstate.replica import Replica

log = logging.getLogger("crdtstate")

Handler = Callable[[Command], Any]
"""Executes a command, and returns a plain value for its author; it may be ``async``."""

ASIDE = frozenset({REPORT, VERSION, SHARE})
"""Verbs that do not wait for their turn."""

ASIDE_MAX = 64
"""Commands that are carried out aside at a time, but for questions, which are answered at once."""

RETRY = 1.0
"""Seconds after which what failed for the store's sake is tried again."""

LOOK_EVERY = 60.0
"""Seconds after which the docket looks at the board though nothing changed there."""


class Served(NamedTuple):
    """A handler, and whether it may begin again what it was interrupted in."""

    handler: Handler
    is_idempotent: bool


class Obeying(DocumentSet):
    """Documents of an agent that takes commands; a replica opens the docket."""

    _docket: Docket
    _subscribe: tuple[str, ...] | None

    def serve_command(
        self, verb: str, handler: Handler, *, idempotent: bool = False
    ) -> Callable[[], None]:
        """Let *handler* execute the commands *verb* that controllers issue for this agent.

        It gets the `Command` and returns a plain value, which the controller reads; what it
        raises is told as the reason why it failed. It may be ``async``: it is cancelled when the
        command expires. A plain one runs on the event loop, and should be quick; what it writes
        and its result are committed together. Commands run one after the other, in the order in
        which they were issued: start a task for what goes on for long.

        A command runs once here, also if the process is killed (as far as the store is durable;
        without a store, as long as the process lives). One that was begun and not ended is
        rejected when the replica opens again, or begun anew if the handler is *idempotent*.

        Register handlers right after opening. Commands that come when there is none are refused,
        but for the first `Config.command_grace` seconds. Returns a function that ends it.

        Raises:
            UsageError: *verb* cannot be one, has a handler already, or this replica does not
                subscribe to ``@control``.
        """
        if not callable(handler):
            raise UsageError(f"a handler is a function of the command, not {handler!r}")
        if not takes(self._subscribe, CONTROL):
            raise UsageError(f"commands need the document {CONTROL}: name it in subscribe=")
        return self._docket.serve(check_verb(verb), Served(handler, idempotent))


def check_verb(verb: object) -> str:
    """Return *verb* if it can be one of a user's.

    Raises:
        CommandError: It is not.
    """
    is_text = isinstance(verb, str) and 0 < len(verb) <= VERB_CHARS_MAX and verb.isprintable()
    if not isinstance(verb, str) or not is_text or verb.startswith("@"):
        raise CommandError(
            f"a verb has 1 to {VERB_CHARS_MAX} printable characters, of which the first is not @: "
            f"{str(verb)[:VERB_CHARS_MAX]!r}"
        )
    return verb


class Docket:
    """The commands that one agent has to carry out.

    Args:
        home: The agent's replica.
    """

    def __init__(self, home: Replica) -> None:
        self._home = home
        self.board = Board(home, home.may_command)
        self._judge = Judge(self.board, home.agent, home.role, home.config.controllers)
        self._served: dict[str, Served] = {
            verb: Served(_own(handler, home), True) for verb, handler in verbs.VERBS.items()
        }
        self._served[SHARE] = Served(_own(sharing.take, home), True)
        # Ids to be judged, and those whose turn comes, in order.
        self._open: set[str] = set()
        self._queue: list[tuple[int, str]] = []
        # Being carried out; and the one of these that the queue waits for.
        self._running: dict[str, asyncio.Task[None]] = {}
        self._current: str | None = None
        # Of own commands those whose results somebody here waits for: they stay until then.
        self.awaited: set[str] = set()
        # Keys of results that came, for events.
        self._told: list[str] = []
        # What is in others' names and was told, or stood there at first: (id, writer).
        self._forged: dict[tuple[str, int], None] = {}
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._opened_at = 0.0
        self._sweep_at = 0.0
        self._is_closing = False

    # For the replica

    def open(self) -> None:
        """Begin."""
        self._opened_at = asyncio.get_running_loop().time()
        self._sweep_at = self._opened_at + RETRY
        for id in self._open:
            self._forged.update(((id, writer), None) for writer, _, _ in self.board.forged(id))
        self._told.clear()
        self._task = self._home._spawn(self._run(), "commands")

    async def close(self) -> None:
        """End; what is being carried out is cancelled, and counts as interrupted. Idempotent."""
        self._is_closing = True
        tasks = [*self._running.values(), *([self._task] if self._task is not None else [])]
        # One of the handlers may be who closes the replica.
        others = [task for task in tasks if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def note(self, delivery: Delivery) -> None:
        """Something was taken in: look whether it is about commands."""
        if delivery.document.name != CONTROL:
            return
        for path in delivery.paths:
            container, _, key = path.partition(SEPARATOR)
            if container == "m" + COMMANDS:
                self._open.add(key)
            elif container == "m" + RESULTS and not delivery.local:
                self._told.append(key)
        self._news.set()

    def serve(self, verb: str, served: Served) -> Callable[[], None]:
        """See `Obeying.serve_command`."""
        if verb in self._served:
            raise UsageError(f"{verb!r} has a handler already; end that first")
        self._served[verb] = served
        self._news.set()

        def end() -> None:
            if self._served.get(verb) is served:
                del self._served[verb]

        return end

    # Looking

    async def _run(self) -> None:
        while True:
            self._news.clear()
            try:
                delay = self._look()
            except CRDTStateError as exc:
                # The store is full, or somebody made a mess of the document.
                log.warning("%s: commands have to wait: %s", self._home.agent, exc)
                delay = RETRY
            try:
                async with asyncio.timeout(delay):
                    await self._news.wait()
            except TimeoutError:
                pass

    def _look(self) -> float:
        """Do what there is to do; return after how many seconds to look again."""
        now, now_ms = asyncio.get_running_loop().time(), self._home.wall_ms()
        self._tell_results(now)
        delay = LOOK_EVERY
        for id in [id for id in self._open if id not in self._running]:
            self._note_forged(id)
            step, command = self._judge.judge(id, now_ms)
            if step.what == "wait" and command is not None:
                delay = min(delay, (command.expires_ms - now_ms) / 1000)
                continue
            waits = command is not None and (step.what == "follow" or command.verb == SHARE)
            if waits and len(self._running) >= ASIDE_MAX:
                continue
            self._open.discard(id)
            self._take(step, id, command)
        delay = min(delay, self._start_next(now, now_ms))
        if now >= self._sweep_at:
            self._sweep(now, now_ms)
        return max(0.001, min(delay, self._sweep_at - now))

    def _take(self, step: Step, id: str, command: Command | None) -> None:
        if command is None:
            return
        match step.what:
            case "accept":
                cut = verbs.version_token(self._home)
                cut = cut if len(cut) <= OWN_BYTES_MAX else ""
                self._judge.accept(command, self._home.wall_ms(), cut)
                self._open.add(id)
                self._news.set()
            case "decline":
                self._judge.decline(command, self._home.wall_ms(), step.reason)
                self._open.add(id)
                self._news.set()
            case "refuse":
                self._settle(command, Rejected(step.reason))
            case "follow":
                self._spawn(command, "follow")
            case ("run" | "resume") as what:
                if command.verb in ASIDE:
                    self._spawn(command, what)
                else:
                    heapq.heappush(self._queue, (int(command.stamp), id))

    def _start_next(self, now: float, now_ms: int) -> float:
        """Start the command whose turn it is, if it can be; return when to look again."""
        grace = self._opened_at + self._home.config.command_grace - now
        while self._queue and self._current is None:
            _, id = self._queue[0]
            step, command = self._judge.judge(id, now_ms)
            if step.what in ("run", "resume") and command is not None:
                if command.verb not in self._served and grace > 0:
                    return grace
                self._current = id
                self._spawn(command, step.what)
            else:
                self._take(step, id, command)
            heapq.heappop(self._queue)
        return LOOK_EVERY

    def _note_forged(self, id: str) -> None:
        for writer, agent, name in self.board.forged(id):
            if (id, writer) not in self._forged:
                self._forged[id, writer] = None
                self._home._record_command(agent, f"{id}: refused: in the name of {name}")
        while len(self._forged) > COMMANDS_MAX:
            del self._forged[next(iter(self._forged))]

    def _tell_results(self, now: float) -> None:
        told, self._told = self._told, []
        for key in told:
            id, _, agent = key.partition("/")
            command, answer = self.board.find(id), self.board.answer(id, agent)
            if command is None or command.by != self._home.agent or answer is None:
                continue
            if command.verb in PASSING:
                self._sweep_at = min(self._sweep_at, now + RETRY)
            outcome = answer.outcome
            if agent != self._home.agent and isinstance(outcome, (Fulfilled, Rejected)):
                self._emit_settled(command, agent, outcome)

    # Carrying out

    def _spawn(self, command: Command, what: Literal["run", "resume", "follow"]) -> None:
        work = self._carry_out(command, what)
        self._running[command.id] = self._home._spawn(work, f"command {command.verb}")

    async def _carry_out(self, command: Command, what: Literal["run", "resume", "follow"]) -> None:
        try:
            if what == "follow":
                outcome = await self._call(_own(verbs.follow, self._home), command)
            else:
                outcome = await self._execute(command, is_resumed=what == "resume")
            await self._settle_at_last(command, outcome)
        except ReplicaClosed:
            pass
        except CRDTStateError as exc:
            # The document is not as it should be: perhaps it will be.
            log.warning("%s: %s %s: %s", self._home.agent, command.verb, command.id, exc)
            await asyncio.sleep(RETRY)
            self._open.add(command.id)
        finally:
            self._running.pop(command.id, None)
            if self._current == command.id:
                self._current = None
            self._news.set()

    async def _execute(self, command: Command, *, is_resumed: bool) -> Fulfilled | Rejected:
        served = self._served.get(command.verb)
        if is_resumed and (served is None or not served.is_idempotent):
            return Rejected("was interrupted: closed or killed while it was being executed")
        if served is None:
            return Rejected(f"no handler for {command.verb!r} here")
        if command.verb not in QUESTIONS:
            if command.verb not in ASIDE and not is_resumed:
                await self._note_start(command)
            if self._home.wall_ms() > command.expires_ms:
                return Rejected("expired")
            own = self.board.answer(command.id, self._home.agent)
            if own is not None and own.is_final:
                # A copy of this agent, which is up as well, has done it.
                return Rejected("done already")
            self._home._emit(CommandReceived(command.id, command.verb, command.by))
        return await self._call(served.handler, command)

    async def _note_start(self, command: Command) -> None:
        self._judge.start(command, self._home.wall_ms())
        while True:
            try:
                return await self._home.durable()
            except ReplicaClosed:
                raise
            except StoreError:
                # Nothing is executed that a crash could make us forget.
                await asyncio.sleep(RETRY)

    async def _call(self, handler: Handler, command: Command) -> Fulfilled | Rejected:
        left = (command.expires_ms - self._home.wall_ms()) / 1000
        try:
            async with asyncio.timeout(max(0.0, left)) as limit:
                value = handler(command)
                if inspect.isawaitable(value):
                    value = await value
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return Rejected("it was cancelled")
        except ReplicaClosed:
            if self._is_closing:
                raise
            return Rejected("ReplicaClosed")
        except Exception as exc:
            if isinstance(exc, TimeoutError) and limit.expired():
                return Rejected("was cancelled: it had not ended when the command expired")
            return Rejected(_reason(exc))
        return _fulfil(command.verb, value)

    async def _settle_at_last(self, command: Command, outcome: Fulfilled | Rejected) -> None:
        while True:
            # At once, in the turn of the handler: what it wrote is committed with the result.
            try:
                return self._settle(command, outcome)
            except StoreError as exc:
                log.warning("%s: %s: no result yet: %s", self._home.agent, command.verb, exc)
            await asyncio.sleep(RETRY)

    def _settle(self, command: Command, outcome: Fulfilled | Rejected) -> None:
        if self.board.find(command.id) is None:
            # It was removed meanwhile: nobody asks.
            return
        self._judge.settle(command, outcome, self._home.wall_ms())
        if command.verb not in QUESTIONS or isinstance(outcome, Rejected):
            said = "fulfilled" if isinstance(outcome, Fulfilled) else f"rejected: {outcome.reason}"
            detail = f"{command.verb} {command.id}: {said}"
            self._home._record_command(command.by, detail)
        if command.verb not in QUESTIONS:
            self._emit_settled(command, self._home.agent, outcome)

    def _emit_settled(self, command: Command, agent: str, outcome: Fulfilled | Rejected) -> None:
        told = CommandSettled(command.id, command.verb, command.by, agent, outcome)
        self._home._emit(told)

    # Cleaning

    def _sweep(self, now: float, now_ms: int) -> None:
        home = self._home
        retention = home.config.command_retention
        self._sweep_at = now + min(LOOK_EVERY, max(0.05, retention / 4))
        known: dict[str, bool] = {}
        for member in home.members():
            is_up = member.state in ("up", "suspected") and member.role == "agent"
            known[member.agent] = known.get(member.agent, False) or is_up
        ms = int(min(retention * 1000, 2**47))
        if gone := list(self.board.sweep(home.agent, known, now_ms, ms, self.awaited)):
            with home.transaction(message="cleaning"):
                for name, key in gone:
                    self.board.clear(name, key)


def _own(work: Callable[[Replica, Command], Coroutine[Any, Any, Any]], home: Replica) -> Handler:
    return lambda command: work(home, command)


def _fulfil(verb: str, value: Any) -> Fulfilled | Rejected:
    try:
        size = len(pack(value, "its result"))
    except UnsupportedValue as exc:
        return Rejected(f"was done, but {exc}"[:REASON_CHARS_MAX])
    limit = OWN_BYTES_MAX if verb.startswith("@") else RESULT_BYTES_MAX
    if size > limit:
        return Rejected(
            f"was done, but its result has {size} bytes packed; at most {limit}. Write it into a "
            "document, and return where"
        )
    return Fulfilled(value)


def _reason(exc: Exception) -> str:
    """Why something failed, as text that can be shared."""
    text = str(exc) if isinstance(exc, CRDTStateError) else f"{type(exc).__name__}: {exc}"
    return text.encode(errors="replace").decode()[:REASON_CHARS_MAX]
