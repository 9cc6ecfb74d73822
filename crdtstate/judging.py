"""
What an agent has to do about a command, and when an exclusive one goes.

**At most once.** `Judge` decides by what stands on the board and nothing else. Before an agent
executes a command, it writes that it has *started*, and waits until that is durable; a command
with a result, or one that was started, is never simply executed again. So an agent that is killed
at any moment finds out what it had begun. Who comes back after a command has expired refuses it;
expiry is told by the agent's own clock. Others than its author remove a command only long after.

**Exclusive commands.** What must not happen twice at once, such as restoring everything, runs in
two steps. Each agent of the *electorate* (all agents that are known, also those that are down)
*accepts* one such command at a time, durably, and *declines* others meanwhile, naming the one it
has accepted. Once more than half have accepted, the author writes that the command *goes*, and for
whom. Two majorities have an agent in common. It accepted the second command only after the first
was *over*: withdrawn, expired, or with a result of all who were to execute it. So executions of
two exclusive commands never overlap, and of two at the same time at most one goes (or none: then
somebody tries again).

- Its author dies before it goes: nobody executes it, and those who accepted it are free again when
  it has expired. After that it goes on without him.
- In a partition, the side without a majority of the electorate cannot start one.
- Clocks that differ: execution ends at expiry, by the clock of who executes; what was accepted
  counts for `MARGIN_MS` longer. Clocks may differ by that much.
- Controllers who do not know the same agents have different electorates, whose majorities need not
  meet if they differ by more than one agent. Whoever has just joined knows all others after a
  moment.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple

from crdtstate.board import Board
from crdtstate.commands import RESTORE, SHARE, Answer, Command
from crdtstate.outcomes import Fulfilled, Rejected


class Step(NamedTuple):
    """What an agent has to do about a command: ``"done"`` (nothing any more), ``"wait"``,
    ``"accept"`` or ``"decline"`` that it goes, ``"refuse"`` it for good, ``"run"``, ``"resume"``
    (it was started), ``"follow"`` (see what those make of it who execute it)."""

    what: Literal["done", "wait", "accept", "decline", "refuse", "run", "resume", "follow"]
    reason: str = ""


class Judge:
    """Says what one agent has to do about commands.

    Args:
        board: Where they stand.
        agent: Whose.
        role: ``"agent"`` or ``"relay"``.
        controllers: Who may command; None: everybody of those that the board believes.
    """

    def __init__(
        self,
        board: Board,
        agent: str,
        role: str,
        controllers: Collection[str] | None,
    ) -> None:
        self._board = board
        self._agent = agent
        self._role = role
        self._controllers = controllers
        # Exclusive commands that were accepted here, and may not be over.
        self._accepted: set[str] = set()
        self._is_fresh = False

    def judge(self, id: str, now_ms: int) -> tuple[Step, Command | None]:
        """What to do about the command *id* now."""
        command = self._board.find(id)
        if command is None or not command.is_for(self._agent, self._role):
            return Step("done"), command
        return self._judge(command, self._board.answer(id, self._agent), now_ms), command

    def _judge(self, command: Command, own: Answer | None, now_ms: int) -> Step:
        if own is not None and own.is_final:
            return Step("done")
        # Also of one that was started: somebody may have written over it.
        if command.verb != SHARE and self._is_stranger(command):
            return Step("refuse", "not a controller")
        if own is not None and own.state == "started":
            return Step("resume")
        declined = own.reason if own is not None and own.state == "declined" else ""
        if command.state == "withdrawn":
            return Step("refuse", declined or "withdrawn")
        if now_ms > command.expires_ms:
            return Step("refuse", declined or "expired")
        if command.is_exclusive:
            return self._judge_exclusive(command, own, now_ms)
        return Step("run")

    def _is_stranger(self, command: Command) -> bool:
        if self._controllers is not None and command.by not in self._controllers:
            return True
        return not self._board.may_command(command)

    def _judge_exclusive(self, command: Command, own: Answer | None, now_ms: int) -> Step:
        if command.state == "going":
            if self._agent in command.executors:
                return Step("run")
            if command.verb == RESTORE:
                return Step("follow")
            return Step("refuse", "it was agreed on without this agent")
        if own is not None or self._agent not in command.electorate:
            return Step("wait")
        other = self._accepted_other(command.id, now_ms)
        if other is not None:
            verb, id, by = other.verb.lstrip("@"), other.id, other.by
            return Step("decline", f"{verb} {id} of {by} is under way; only one such at a time")
        return Step("accept")

    def _accepted_other(self, id: str, now_ms: int) -> Command | None:
        """Another exclusive command that was accepted here and is not over."""
        if not self._is_fresh:
            self._is_fresh = True
            self._accepted.update(self._recall())
        for other in sorted(self._accepted - {id}):
            if self._board.is_over(other, now_ms):
                self._accepted.discard(other)
            else:
                return self._board.find(other)
        return None

    def _recall(self) -> Iterator[str]:
        """What was accepted before this was opened."""
        for command in self._board.commands():
            own = self._board.answer(command.id, self._agent)
            if own is not None and own.has_accepted:
                yield command.id

    def accept(self, command: Command, now_ms: int, cut: str) -> None:
        """Write that this agent would execute an exclusive command, and no other meanwhile."""
        self._accepted.add(command.id)
        answer = Answer("accepted", cut, "", now_ms, True)
        self._board.say(command.id, self._agent, answer)

    def decline(self, command: Command, now_ms: int, reason: str) -> None:
        """Write that this agent is not for an exclusive command; others may be."""
        self._say(command, Answer("declined", None, reason, now_ms))

    def start(self, command: Command, now_ms: int) -> None:
        """Write that this agent is about to execute a command."""
        self._say(command, Answer("started", None, "", now_ms))

    def settle(self, command: Command, outcome: Fulfilled | Rejected, now_ms: int) -> None:
        """Write what came of a command here, for good. Another result that is there stays."""
        match outcome:
            case Fulfilled(value):
                self._say(command, Answer("fulfilled", value, "", now_ms))
            case Rejected(reason):
                self._say(command, Answer("rejected", None, reason, now_ms))

    def _say(self, command: Command, answer: Answer) -> None:
        own = self._board.answer(command.id, self._agent)
        if own is not None and own.is_final:
            # Of a copy of this agent, which is up as well.
            return
        has_accepted = own is not None and own.has_accepted
        said = Answer(answer.state, answer.value, answer.reason, answer.when_ms, has_accepted)
        self._board.say(command.id, self._agent, said)


# What the author of an exclusive command has to do


def rally(board: Board, command: Command, *, is_late: bool) -> Literal["wait", "go", "withdraw"]:
    """Whether an exclusive command can go: once more than half of its electorate have accepted it,
    and all who are expected to have answered, or the time for that is over."""
    answers = [board.answer(command.id, agent) for agent in command.electorate]
    accepted = sum(each is not None and each.has_accepted for each in answers)
    refused = sum(
        each is not None and (each.is_final or each.state == "declined") for each in answers
    )
    has_majority = 2 * accepted > len(command.electorate)
    if 2 * (len(command.electorate) - refused) <= len(command.electorate):
        return "withdraw"
    is_told = all(board.answer(command.id, agent) is not None for agent in command.expected)
    if has_majority and (is_told or is_late):
        return "go"
    return "withdraw" if is_late else "wait"
