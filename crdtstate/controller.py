"""
The controller ("queen") of a fleet: it commands all agents at once, and sees how they do.

    controller = Controller(replica)
    result = await controller.checkpoint_all("nightly", timeout=10)
    await controller.restore_system(result.id)
    print(await controller.report())

A controller holds nothing of its own: what it issues stands in the document ``@control`` (see
`commands`), where it outlives the controller, and where any other controller finds it. No call
raises because an agent failed: each agent's result is one of `Fulfilled`, `Rejected`, `TimedOut`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from crdtstate import verbs
from crdtstate.board import Board
from crdtstate.commands import (
    CHECKPOINT,
    QUESTIONS,
    REPORT,
    RESOLVE,
    RESTORE,
    SHARE,
    VERSION,
    Command,
)
from crdtstate.dispatch import Dispatch, check_own, check_target, check_timeout
from crdtstate.documents import SYSTEM
from crdtstate.errors import CommandError, UnsupportedValue, UsageError
from crdtstate.manifest import LABEL_CHARS_MAX
from crdtstate.membership import rendezvous
from crdtstate.obeying import check_verb
from crdtstate.outcomes import Fulfilled, Results, TimedOut
from crdtstate.replica import Replica
from crdtstate.reports import Report, known_here, read_report
from crdtstate.system import (
    AgentCheckpoint,
    SystemCheckpoint,
    SystemRestore,
    executors_of,
    is_in_time,
    note,
    read_checkpoint,
    read_noted,
)

log = logging.getLogger("crdtstate")

PATIENCE_MIN = 10.0
"""Seconds for which an agent at least waits for what others had written."""

RESTORE_EXPIRY_MIN = 60.0
"""Seconds for which a restore of the system at least may take; while it does, no other can."""

ID_CHARS = 16


class Controller:
    """Commands a fleet, from an open replica that is a member of its mesh.

    Args:
        replica: Whose agent issues the commands.

    Raises:
        CommandError: `Config.controllers` does not name this agent.
        NotAllowed: Its certificate does not let it control the mesh.
    """

    def __init__(self, replica: Replica) -> None:
        if not isinstance(replica, Replica):
            raise UsageError(f"a controller needs a crdtstate.Replica, not {replica!r}")
        check_own(replica)
        self._replica = replica
        self._dispatch = Dispatch(replica)
        self._board: Board = replica._docket.board

    def __repr__(self) -> str:
        return f"<Controller {self._replica.agent}>"

    # Any command

    async def issue(
        self,
        verb: str,
        *,
        target: str | Iterable[str] = "*",
        timeout: float | None = 10.0,
        expires: float | None = None,
        exclusive: bool = False,
        arguments: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Results:
        """Have agents execute a command of their own, see `Replica.serve_command`.

        Args:
            target: Names of agents, and patterns such as ``agent-*``, which mean agents and no
                relays. Those who are there now are waited for, and those that are named; who
                matches and comes later executes it too, until it expires.
            timeout: How many seconds to wait for them; None: until it expires.
            expires: For how many seconds it may be executed; None: `Config.command_expiry`.
            exclusive: Execute it only if a majority of the known agents of the target agree to,
                and no other exclusive command before it is over. Only those who agreed do.
            arguments, more: What the handlers get: plain values by name.

        Raises:
            CommandError: *verb* cannot be one; it is too large; there are too many commands; it is
                exclusive, and nobody is there to agree.
            UsageError: *target* or a time cannot be.
            StoreError: The store does not take it now; it is issued when the store works again.
        """
        given = {**(arguments or {}), **more}
        if not all(type(name) is str for name in given):
            raise UsageError("arguments have names that are str")
        check_timeout(timeout)
        seconds = self._replica.config.command_expiry if expires is None else expires
        wanted = check_target(target)
        electorate = self._dispatch.matching(wanted, up=False) if exclusive else []
        if exclusive and not electorate:
            raise CommandError(f"no agent is known that could agree to {verb!r:.100}")
        command = self._dispatch.make(
            check_verb(verb), given, wanted, seconds, electorate=electorate
        )
        await self._dispatch.issue(command)
        if not electorate:
            return await self._dispatch.settle(command, timeout)
        deadline = _Deadline(seconds if timeout is None else timeout)
        command = await self._dispatch.agree(command, deadline.left())
        return await self._dispatch.settle(command, deadline.left(at_least=1.0))

    async def result(self, id: str, *, timeout: float | None = 0.0) -> Results:
        """What has come of a command by now, of whichever controller, after waiting *timeout*
        seconds for those who are expected to answer.

        Raises:
            CommandError: There is no such command, or not any longer.
        """
        check_timeout(timeout)
        command = self._board.find(id)
        if command is None:
            kept = read_noted(id, self._board.kept_checkpoint(id))
            if kept is None:
                raise CommandError(f"there is no command {id!r:.40} (any more); see commands()")
            return kept
        results = await self._dispatch.settle(command, timeout)
        return self._told(command, results)

    def commands(self) -> list[Results]:
        """The commands that are open or recent, of all controllers, oldest first, with what has
        come of them so far."""
        found = [each for each in self._board.commands() if each.verb not in {*QUESTIONS, SHARE}]
        found.sort(key=lambda each: each.stamp)
        return [self._told(each, self._dispatch.results(each)) for each in found]

    def withdraw(self, id: str) -> None:
        """Take back a command that this agent has issued: who has not begun it will not.

        Raises:
            CommandError: There is no such command, or it is another agent's.
        """
        command = self._board.find(id)
        if command is None or command.by != self._replica.agent:
            whose = f"it is {command.by}'s" if command is not None else "there is none"
            raise CommandError(f"{id!r:.40} cannot be withdrawn: {whose}")
        self._dispatch.withdraw(command)

    def _told(self, command: Command, results: Results) -> Results:
        """Results in the shape for their verb."""
        if command.verb == CHECKPOINT:
            return read_checkpoint(command, results)
        if command.verb == RESTORE:
            return SystemRestore(results, command, executors_of(command))
        return results

    # Checkpoints

    async def checkpoint_all(
        self,
        label: str = "",
        *,
        target: str | Iterable[str] = "*",
        timeout: float = 10.0,
        expires: float | None = None,
    ) -> SystemCheckpoint:
        """Have every agent make a checkpoint, each with everything that any of them had written
        before this was called.

        It takes two steps. Every agent tells how far it is; what they tell is joined to a cut, and
        every agent makes its checkpoint once it has all of that. Agents that are away make one
        when they come back, until it expires. *missing* names those without one.

        Args:
            label: What the checkpoints are called; they are kept longer then.
            target: Which agents.
            timeout: How many seconds it may take, of which half for the first step.
            expires: For how many seconds agents that were away still do it.

        Raises:
            UsageError: *label*, *target* or a time cannot be.
            CommandError, StoreError: It could not be issued.
        """
        check_timeout(timeout, may_be_none=False)
        wanted = check_target(target)
        if not isinstance(label, str) or len(label) > LABEL_CHARS_MAX - ID_CHARS - 3:
            raise UsageError(
                f"a label is text of up to {LABEL_CHARS_MAX - ID_CHARS - 3} characters: {label!r}"
            )
        if not label.isprintable():
            raise UsageError(f"a label is text that can be printed: {label!r}")
        deadline = _Deadline(timeout)
        asked = self._dispatch.make(VERSION, {}, wanted, max(timeout, 1.0))
        heard = await self._dispatch.ask(asked, deadline.left() / 2)
        self._dispatch.forget(asked)
        tokens = [each.value for each in heard.values() if isinstance(each, Fulfilled)]
        cut = verbs.join([*tokens, verbs.version_token(self._replica)])
        unheard = [agent for agent, each in heard.items() if not isinstance(each, Fulfilled)]
        arguments = {
            "label": label,
            "cut": str(cut),
            "unheard": unheard,
            "patience": max(float(timeout), PATIENCE_MIN),
        }
        seconds = self._replica.config.command_expiry if expires is None else expires
        command = self._dispatch.make(CHECKPOINT, arguments, wanted, seconds)
        await self._dispatch.issue(command)
        results = await self._dispatch.settle(command, deadline.left(at_least=timeout / 2))
        found = read_checkpoint(command, results)
        try:
            self._board.keep_checkpoint(command.id, note(found))
        except UnsupportedValue as exc:
            # The command and its results stand there for a while.
            log.warning("checkpoint %s of the system cannot be noted: %s", command.id, exc)
        await self._replica.durable()
        return found

    async def restore_system(
        self,
        id: str,
        *,
        timeout: float = 60.0,
        electorate: Iterable[str] | None = None,
    ) -> SystemRestore:
        """Bring all documents back to what they were at a checkpoint of the whole system; those
        made since are emptied. As with `Replica.restore`, that is a new change, which merges.

        Every document is restored by one agent, from its own checkpoint: by this one where it can,
        else by one that is up where there is one. Checkpoints of agents that were away at the time
        and made theirs later are only used for what nobody else has. Who restores has then seen
        what those had written who accepted the command, so that this is written over. The result
        of an agent is Fulfilled when it has what was restored.

        It is an exclusive command (see `judging`): it goes only when more than half of all known
        agents have accepted it, also counting those that are down, and two never go at the same
        time. `SystemRestore.has_begun` tells whether it did; if not, nothing was restored, and the
        results name who was in the way.

        Args:
            id: Of what `checkpoint_all` gave, here or at another controller.
            timeout: How many seconds it may take; an agent that was away takes part until twice
                that, and a minute at least.
            electorate: The agents of whom a majority has to accept, when others are gone for good.

        Raises:
            CommandError: There is no such checkpoint, or no agent has anything of it.
            UsageError: *electorate* or *timeout* cannot be.
            StoreError: The store does not take the command.
        """
        check_timeout(timeout, may_be_none=False)
        checkpoints, late = self._checkpoints_of(id)
        executors = self._appoint(checkpoints, late)
        mine: dict[str, list[str]] = {}
        for document, agent in executors.items():
            mine.setdefault(agent, []).append(document)
        expiry = max(2 * timeout, RESTORE_EXPIRY_MIN)
        wanted = ("*", self._replica.agent, *sorted(mine))
        known = self._dispatch.matching(["*", self._replica.agent], up=False)
        arguments = {
            "checkpoint": id,
            "executors": {agent: [checkpoints[agent].id, names] for agent, names in mine.items()},
            "patience": max(float(timeout), PATIENCE_MIN),
        }
        voters = known if electorate is None else check_target(electorate)
        command = self._dispatch.make(
            RESTORE, arguments, dict.fromkeys(wanted), expiry, electorate=voters
        )
        deadline = _Deadline(timeout)
        await self._dispatch.issue(command)
        command = await self._dispatch.agree(command, deadline.left(), sorted(mine))
        results = await self._dispatch.settle(command, deadline.left(at_least=1.0))
        return SystemRestore(results, command, executors)

    def _checkpoints_of(self, id: object) -> tuple[dict[str, AgentCheckpoint], set[str]]:
        """What there is of a checkpoint of the system, and who of these came late: theirs have all
        that was in the cut, but also what was written after it."""
        text = str(id)
        kept = read_noted(text, self._board.kept_checkpoint(text))
        found = dict(kept.checkpoints) if kept is not None else {}
        late: set[str] = set()
        command = self._board.find(text)
        if command is not None and command.verb == CHECKPOINT:
            results = self._dispatch.results(command)
            told = read_checkpoint(command, results).checkpoints
            late = told.keys() - found.keys()
            if kept is None:
                late -= {agent for agent, made in told.items() if is_in_time(command, agent, made)}
            found.update(told)
        if not found:
            raise CommandError(f"there is no checkpoint of the system {text!r:.40}")
        return found, late

    def _appoint(
        self, checkpoints: Mapping[str, AgentCheckpoint], late: Collection[str]
    ) -> dict[str, str]:
        """Who restores which document: document -> agent."""
        me, agents = self._replica.agent, self._dispatch.agents()
        holders: dict[str, list[str]] = {}
        for agent, made in checkpoints.items():
            for name in made.documents:
                if not name.startswith(SYSTEM):
                    holders.setdefault(name, []).append(agent)

        def choose(name: str, among: list[str]) -> str:
            among = [agent for agent in among if agent not in late] or among
            if me in among:
                return me
            up = [agent for agent in among if agents.get(agent, ("", False))[1]]
            return rendezvous(name, up or among)

        found = {name: choose(name, among) for name, among in sorted(holders.items())}
        # Those made since are in nobody's checkpoint.
        new = [name for name in self._replica.documents() if not name.startswith(SYSTEM)]
        for name in new:
            found.setdefault(name, choose("", sorted(checkpoints)))
        return found

    # Conflicts

    async def resolve_conflicts(
        self,
        strategy: str | None = None,
        *,
        documents: Iterable[str] | None = None,
        timeout: float = 10.0,
    ) -> Results:
        """Have the open conflicts resolved that are known here, each by the agent that is
        responsible for it (`Replica.is_responsible`); the result of each is how many. Doing it
        twice is harmless.

        Args:
            strategy: The name of the strategy that decides, which every agent has registered;
                None: what is read where they are.
            documents: Only in these.

        Raises:
            UsageError: *documents* or *timeout* cannot be.
            CommandError, StoreError: It could not be issued.
        """
        check_timeout(timeout, may_be_none=False)
        if isinstance(documents, str):
            raise UsageError("documents is a list of names, not one name")
        arguments = {
            "strategy": strategy,
            "documents": None if documents is None else list(documents),
            "cut": verbs.version_token(self._replica),
            "patience": max(float(timeout), PATIENCE_MIN),
        }
        expiry = max(timeout, PATIENCE_MIN)
        command = self._dispatch.make(RESOLVE, arguments, "*", expiry)
        await self._dispatch.issue(command)
        return await self._dispatch.settle(command, timeout)

    # Reports

    async def report(self, *, timeout: float = 5.0) -> Report:
        """How all known agents do. Those that are there are asked; of the others it tells what is
        known here.

        Raises:
            UsageError: *timeout* cannot be.
            CommandError, StoreError: The question could not be asked.
        """
        check_timeout(timeout, may_be_none=False)
        names = [agent for agent, (_, is_up) in self._dispatch.agents().items() if is_up]
        asked = self._dispatch.make(REPORT, {}, names, max(timeout, 1.0))
        answers = await self._dispatch.ask(asked, timeout)
        self._dispatch.forget(asked)
        return Report(
            (agent, read_report(each, answers.get(agent, TimedOut())))
            for agent, each in sorted(known_here(self._replica).items())
        )


class _Deadline:
    """A moment by which several steps are to be done."""

    def __init__(self, seconds: float) -> None:
        self._clock = asyncio.get_running_loop().time
        self._at = self._clock() + seconds

    def left(self, at_least: float = 0.0) -> float:
        return max(at_least, self._at - self._clock())
