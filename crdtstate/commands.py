"""
Commands: what stands in the document ``@control``.

A controller writes a command, the agents write what came of it, each in its own lane, and both
replicate like anything else: they reach who was away, and outlive who issued them.

    commands     id -> who issued which verb with which arguments, for whom, until when
    results      id/agent -> what came of it there
    checkpoints  id -> a checkpoint of the whole system, for those who will restore it
    keys         agent -> the public key of what it shares

What stands there was written by others and is read with care; what is malformed is no command.
`board` reads and writes it, `judging` says what follows from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any, Literal

from crdtstate.clock import Stamp
from crdtstate.outcomes import Fulfilled, Outcome, Rejected, TimedOut

CONTROL = "@control"

COMMANDS = "commands"
RESULTS = "results"
CHECKPOINTS = "checkpoints"
KEYS = "keys"

VERB_CHARS_MAX = 100
TARGETS_MAX = 10_000
"""Agents that a command names; as many as there are members."""

COMMANDS_MAX = 10_000
"""Commands in the document. They go some time after they have expired."""

ARGUMENTS_BYTES_MAX = 64 * 1024
RESULT_BYTES_MAX = 64 * 1024
"""What a handler returns; larger things are better written into a document."""

SHARE_BYTES_MAX = 256 * 1024
"""What is shared at once."""

SHARES_BYTES_MAX = 8 * 2**20
"""What may wait to be taken by those it is shared with, of one agent."""

OWN_BYTES_MAX = 512 * 1024
"""Arguments and results of verbs that are the system's."""

REASON_CHARS_MAX = 1000

EXPIRY_MS_MAX = 366 * 24 * 3600 * 1000

MARGIN_MS = 60_000
"""How long after its expiry an exclusive command still counts as accepted."""

SWEEP = 1000
"""Entries that are removed at once."""

SYSTEM_CHECKPOINTS_MAX = 100
"""Checkpoints of the whole system that stand in the document; the oldest go."""

CHECKPOINT, RESOLVE, RESTORE = "@checkpoint", "@resolve", "@restore"
REPORT, SHARE, VERSION = "@report", "@share", "@version"

QUESTIONS = frozenset({REPORT, VERSION})
"""Verbs that change nothing: they are answered at once, as often as somebody asks."""

PASSING = frozenset({REPORT, VERSION, SHARE})
"""Verbs whose commands are removed as soon as they are settled."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command, as an agent gets it.

    Attributes:
        id: Its name.
        verb: What to do,
        arguments: with what: plain values by name.
        by: Who issued it.
        target: For whom: names of agents, and patterns such as ``agent-*``.
        issued_ms, expires_ms: When it was issued, and until when it may be executed.
        expected: Those it was for who were there.
        electorate: If it is exclusive, those of whom a majority has to accept it.
        executors: Who executes it, once that is agreed on.
        cut: What they had seen who accepted it: a token of `Cut`.
        state: ``"issued"``, ``"going"`` (of an exclusive one: it was agreed on), ``"withdrawn"``.
        stamp: When it was written, by the clock of its author: the order of execution.
        writer: Whose lane it stands in.
    """

    id: str
    verb: str
    arguments: dict[str, Any]
    by: str
    target: tuple[str, ...]
    issued_ms: int
    expires_ms: int
    expected: tuple[str, ...] = ()
    electorate: tuple[str, ...] = ()
    executors: tuple[str, ...] = ()
    cut: str = ""
    state: Literal["issued", "going", "withdrawn"] = "issued"
    stamp: Stamp = field(default=Stamp(0), compare=False)
    writer: int = field(default=0, compare=False)

    @property
    def issued(self) -> datetime:
        """When it was issued."""
        return datetime.fromtimestamp(self.issued_ms / 1000, UTC)

    @property
    def expires(self) -> datetime:
        """Until when it may be executed."""
        return datetime.fromtimestamp(self.expires_ms / 1000, UTC)

    @property
    def is_exclusive(self) -> bool:
        """Whether it runs only when a majority has accepted it, and no other such one then."""
        return bool(self.electorate)

    def is_for(self, agent: str, role: str) -> bool:
        """Whether *agent* is to execute it. Patterns mean agents, a name also a relay."""
        return matches(self.target, agent, role)

    def encode(self) -> dict[str, Any]:
        """Itself as a plain value."""
        return {
            "verb": self.verb,
            "arguments": self.arguments,
            "by": self.by,
            "target": list(self.target),
            "issued": self.issued_ms,
            "expires": self.expires_ms,
            "expected": list(self.expected),
            "electorate": list(self.electorate),
            "executors": list(self.executors),
            "cut": self.cut,
            "state": self.state,
        }

    @classmethod
    def read(cls, id: str, value: object, stamp: Stamp, writer: int = 0) -> Command | None:
        """Read what somebody wrote; None if that is no command."""
        match value:
            case {
                "verb": str(verb),
                "arguments": dict(arguments),
                "by": str(by),
                "target": list(target),
                "issued": int(issued),
                "expires": int(expires),
                "expected": list(expected),
                "electorate": list(electorate),
                "executors": list(executors),
                "cut": str(cut),
                "state": "issued" | "going" | "withdrawn" as state,
            }:
                is_command = (
                    0 < len(verb) <= VERB_CHARS_MAX
                    and all(type(key) is str for key in arguments)
                    and all(map(_are_names, (target, expected, electorate, executors)))
                    and 0 <= issued <= expires <= issued + EXPIRY_MS_MAX
                    # As a datetime it is still one.
                    and issued < 2**47
                )
                if is_command:
                    return cls(
                        id,
                        verb,
                        arguments,
                        by,
                        tuple(target),
                        issued,
                        expires,
                        tuple(expected),
                        tuple(electorate),
                        tuple(executors),
                        cut,
                        state,
                        stamp,
                        writer,
                    )
        return None


def _are_names(names: list[Any]) -> bool:
    return len(names) <= TARGETS_MAX and all(type(name) is str for name in names)


def matches(target: Iterable[str], agent: str, role: str) -> bool:
    """Whether *target*, names and patterns, means an agent. Patterns do not mean relays."""
    for each in target:
        if each == agent or (role == "agent" and is_pattern(each) and fnmatchcase(agent, each)):
            return True
    return False


def is_pattern(target: str) -> bool:
    """Whether this may mean several agents."""
    return any(sign in target for sign in "*?[")


@dataclass(frozen=True, slots=True)
class Answer:
    """What an agent says of a command.

    Attributes:
        state: Of an exclusive one first ``"accepted"`` or ``"declined"``; then ``"started"``, and
            in the end ``"fulfilled"`` or ``"rejected"``.
        value: What came of it; of an accepted one, what the agent has seen: a token of `Cut`.
        reason: Why it was declined or rejected.
        when_ms: When this was said.
        has_accepted: Whether it was accepted before.
    """

    state: Literal["accepted", "declined", "started", "fulfilled", "rejected"]
    value: Any = None
    reason: str = ""
    when_ms: int = 0
    has_accepted: bool = False

    @property
    def is_final(self) -> bool:
        return self.state in ("fulfilled", "rejected")

    @property
    def outcome(self) -> Outcome:
        """The same for users."""
        if self.state == "fulfilled":
            return Fulfilled(self.value)
        return Rejected(self.reason) if self.state == "rejected" else TimedOut()

    def encode(self) -> dict[str, Any]:
        """Itself as a plain value."""
        said: dict[str, Any] = {"state": self.state, "when": self.when_ms}
        if self.value is not None:
            said["value"] = self.value
        if self.reason:
            said["reason"] = self.reason
        if self.has_accepted:
            said["accepted"] = True
        return said

    @classmethod
    def read(cls, value: object) -> Answer | None:
        """Read what somebody wrote; None if that is no answer."""
        match value:
            case {
                "state": "accepted" | "declined" | "started" | "fulfilled" | "rejected" as state,
                "when": int(when),
                **rest,
            }:
                reason = rest.get("reason", "")
                if type(reason) is str:
                    return cls(state, rest.get("value"), reason, when, rest.get("accepted") is True)
        return None
