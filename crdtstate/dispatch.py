"""
Issuing commands: whom they are for, waiting for what comes of them, and how exclusive ones get
under way.

Controllers and whoever shares something use it alike. Who is *expected* to answer are those of the
target who are there when it is issued, and those it names; others who match still execute it when
they come back.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from crdtstate import verbs
from crdtstate.board import Board
from crdtstate.certificates import CONTROL as CONTROLS
from crdtstate.commands import (
    CONTROL,
    EXPIRY_MS_MAX,
    TARGETS_MAX,
    Command,
    is_pattern,
    matches,
)
from crdtstate.errors import CommandError, NotAllowed, UsageError, WaitTimeout
from crdtstate.judging import rally
from crdtstate.outcomes import Outcome, Results, TimedOut

if TYPE_CHECKING:
    from crdtstate.replica import Replica

ELECTION_SHARE = 0.5
"""Of the time for an exclusive command, what those have to accept it who are there."""


class Dispatch:
    """Issues commands as one agent.

    Args:
        home: The agent's replica.
    """

    def __init__(self, home: Replica) -> None:
        self._home = home
        self._board: Board = home._docket.board

    # Whom it is for

    def agents(self) -> dict[str, tuple[str, bool]]:
        """The known members by name -> role, and whether they are up. Those that left for good are
        not among them."""
        found: dict[str, tuple[str, bool]] = {}
        for member in self._home.members():
            is_up = member.state in ("up", "suspected")
            if member.state != "retired" and (is_up or member.agent not in found):
                found[member.agent] = member.role, is_up
        return found

    def matching(self, target: Iterable[str], *, up: bool) -> list[str]:
        """The known members that *target* means: those that are up, or all."""
        wanted = list(target)
        return sorted(
            agent
            for agent, (role, is_up) in self.agents().items()
            if (is_up or not up) and matches(wanted, agent, role)
        )

    # Issuing

    def make(
        self,
        verb: str,
        arguments: dict[str, Any],
        target: str | Iterable[str],
        expires: float,
        *,
        electorate: Iterable[str] = (),
    ) -> Command:
        """A command that is not issued yet.

        Args:
            expires: In so many seconds.

        Raises:
            UsageError: *target* or *expires* cannot be.
        """
        wanted = check_target(target)
        if not _is_number(expires) or not 0 < expires * 1000 <= EXPIRY_MS_MAX:
            raise UsageError(f"expires is a number of seconds, up to a year, not {expires!r}")
        now_ms = self._home.wall_ms()
        named = [each for each in wanted if not is_pattern(each)]
        expected = sorted({*self.matching(wanted, up=True), *named})
        return Command(
            secrets.token_hex(8),
            verb,
            arguments,
            self._home.agent,
            wanted,
            now_ms,
            now_ms + max(1, int(expires * 1000)),
            tuple(expected),
            tuple(electorate),
        )

    async def issue(self, command: Command) -> None:
        """Issue a command; when this returns, it survives the end of this process.

        Raises:
            CommandError: It is too large, or there are too many.
            StoreError: The store does not take it.
        """
        self._home._check_usable()
        self._home._check_settled()
        self._board.put(command)
        await self._home.durable()

    async def ask(self, command: Command, timeout: float | None) -> Results:
        """Issue a command and wait for what comes of it, though it is one that is removed as soon
        as it is settled. Raises what `issue` does."""
        awaited = self._home._docket.awaited
        awaited.add(command.id)
        try:
            await self.issue(command)
            return await self.settle(command, timeout)
        finally:
            awaited.discard(command.id)

    async def settle(self, command: Command, timeout: float | None) -> Results:
        """Wait until all who are expected to have answered, *timeout* seconds at most (None: until
        the command expires)."""
        await self._until_answered(command, timeout, final=True)
        return self.results(command)

    async def _until_answered(
        self, command: Command, timeout: float | None, *, final: bool
    ) -> None:
        waiting = list(command.expected)
        left = (command.expires_ms - self._home.wall_ms()) / 1000

        def is_told() -> bool:
            waiting[:] = [agent for agent in waiting if not self._is_told(command, agent, final)]
            return not waiting

        seconds = max(0.0, left if timeout is None else timeout)
        await self._wait(is_told, seconds)

    def _is_told(self, command: Command, agent: str, final: bool) -> bool:
        answer = self._board.answer(command.id, agent)
        return answer is not None and (answer.is_final or not final)

    def results(self, command: Command) -> Results:
        """What has come of a command so far."""
        said = {*command.expected, *self._board.answerers().get(command.id, ())}
        outcomes: dict[str, Outcome] = {}
        for agent in said:
            answer = self._board.answer(command.id, agent)
            if answer is not None or agent in command.expected:
                outcomes[agent] = answer.outcome if answer is not None else TimedOut()
        matching = self.matching(command.target, up=False)
        return Results(command, outcomes, [each for each in matching if each not in outcomes])

    def own(self, verb: str) -> list[Command]:
        """The commands with this verb that this agent has issued, and that are still there."""
        mine = self._home.agent
        return [each for each in self._board.commands() if (each.by, each.verb) == (mine, verb)]

    def forget(self, command: Command) -> None:
        """Remove a command and what came of it: nobody will ask for it."""
        with self._home.transaction(message="cleaning"):
            self._board.remove(command.id, self._board.answerers().get(command.id, ()))

    # Exclusive commands

    async def agree(
        self, command: Command, timeout: float | None, executors: Iterable[str] | None = None
    ) -> Command:
        """Wait for a majority of the electorate to accept an exclusive command; then let it go, or
        withdraw it.

        Args:
            executors: Who executes it; None: all who accepted it.
        """
        left = (command.expires_ms - self._home.wall_ms()) / 1000
        seconds = max(0.0, left if timeout is None else min(timeout, left))

        def is_decided() -> bool:
            return rally(self._board, command, is_late=False) != "wait"

        def is_enough() -> bool:
            return is_decided() or rally(self._board, command, is_late=True) == "go"

        # First for all who are there, then for the majority.
        await self._wait(is_decided, seconds * ELECTION_SHARE)
        await self._wait(is_enough, seconds * (1 - ELECTION_SHARE))
        if rally(self._board, command, is_late=True) == "go":
            return self._go(command, executors)
        return self.withdraw(command)

    async def _wait(self, ready: Callable[[], bool], seconds: float) -> None:
        try:
            await self._home._wait_until(ready, "agents to answer", seconds)
        except WaitTimeout:
            pass

    def _go(self, command: Command, executors: Iterable[str] | None) -> Command:
        accepted = [
            (agent, answer)
            for agent in command.electorate
            if (answer := self._board.answer(command.id, agent)) is not None
            and answer.state == "accepted"
        ]
        going = replace(
            command,
            state="going",
            executors=tuple(executors if executors is not None else (a for a, _ in accepted)),
            cut=str(verbs.join([*(a.value for _, a in accepted), verbs.version_token(self._home)])),
        )
        self._board.put(going)
        return going

    def withdraw(self, command: Command) -> Command:
        """Take a command back: who has not begun it will not."""
        gone = replace(command, state="withdrawn")
        self._board.put(gone)
        return gone


def check_target(target: object) -> tuple[str, ...]:
    """The names and patterns of a target. Raises UsageError."""
    wanted = [target] if isinstance(target, str) else target
    if not isinstance(wanted, Iterable):
        raise UsageError(f"target is an agent's name, a pattern or a list of these, not {target!r}")
    found = tuple(dict.fromkeys(wanted))
    if not found or len(found) > TARGETS_MAX:
        raise UsageError(f"target names 1 to {TARGETS_MAX} agents or patterns, not {len(found)}")
    for each in found:
        if not isinstance(each, str) or not 0 < len(each) <= 100 or not each.isprintable():
            raise UsageError(f"target is an agent's name or a pattern, not {each!r:.100}")
    return found


def check_timeout(timeout: object, *, may_be_none: bool = True) -> None:
    """Raise UsageError if this is no time to wait."""
    if timeout is None and may_be_none:
        return
    if not _is_number(timeout) or not timeout >= 0:  # type: ignore[operator]
        more = ", or None" if may_be_none else ""
        raise UsageError(f"timeout is a number of seconds{more}, not {timeout!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_own(home: Replica) -> None:
    """Raise CommandError if a replica's own settings say that it may not command, NotAllowed if
    its certificate does not let it."""
    if not home.is_controller(home.agent):
        raise NotAllowed(home.agent, CONTROLS, CONTROL)
    allowed = home.config.controllers
    if allowed is not None and home.agent not in allowed:
        raise CommandError(
            f"{home.agent!r} is not a controller: Config.controllers names {', '.join(allowed)}"
        )
