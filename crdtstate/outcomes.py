"""
What came of a command, agent by agent: done, refused or failed, or not heard of. Nothing is raised
because one of many failed; who asked looks at each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Fulfilled:
    """It was done.

    Attributes:
        value: What the handler returned.
    """

    value: Any = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """It was refused, or failed.

    Attributes:
        reason: Why, in words.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class TimedOut:
    """No answer in time, or not yet. It may still come until the command expires."""


Outcome = Fulfilled | Rejected | TimedOut


class Issued(Protocol):
    """What `Results` needs of a command."""

    @property
    def id(self) -> str:
        """Its name."""

    @property
    def verb(self) -> str:
        """What to do."""

    @property
    def by(self) -> str:
        """Who issued it."""

    @property
    def issued(self) -> datetime:
        """When."""

    @property
    def expires(self) -> datetime:
        """Until when it may be executed."""


class Results(Mapping[str, Outcome]):
    """What came of a command, as far as is known: agent -> `Fulfilled`, `Rejected`, `TimedOut`.

    It stays as it is; ``await controller.result(id)`` tells what has come since.

    Attributes:
        id: The command's id.
        verb, by, issued, expires: What was to be done, who issued it, when, and until when agents
            that were away still do it.
        missing: Agents that are to do it, and have not: refused, failed, late or away.
    """

    def __init__(
        self,
        command: Issued,
        outcomes: Mapping[str, Outcome],
        missing: Iterable[str] = (),
    ) -> None:
        self.id = command.id
        self.verb = command.verb
        self.by = command.by
        self.issued = command.issued
        self.expires = command.expires
        self._outcomes = dict(sorted(outcomes.items()))
        undone = {name for name, each in outcomes.items() if not isinstance(each, Fulfilled)}
        self.missing = tuple(sorted({*undone, *missing}))

    def __getitem__(self, agent: str) -> Outcome:
        return self._outcomes[agent]

    def __iter__(self) -> Iterator[str]:
        return iter(self._outcomes)

    def __len__(self) -> int:
        return len(self._outcomes)

    @property
    def is_complete(self) -> bool:
        """Whether everybody who was asked has done it."""
        return all(isinstance(each, Fulfilled) for each in self._outcomes.values())

    def __repr__(self) -> str:
        done = sum(isinstance(each, Fulfilled) for each in self._outcomes.values())
        return f"<{type(self).__name__} {self.verb} {self.id[:8]}: {done} of {len(self)} fulfilled>"

    def __str__(self) -> str:
        lines = [f"{self.verb} {self.id} by {self.by}"]
        width = max(map(len, self), default=0)
        lines += [f"  {agent:{width}}  {_told(each)}" for agent, each in self.items()]
        away = [agent for agent in self.missing if agent not in self._outcomes]
        return "\n".join([*lines, *([f"  away: {', '.join(away)}"] if away else [])])


def _told(outcome: Outcome) -> str:
    match outcome:
        case Fulfilled(value):
            return "fulfilled" if value is None else f"fulfilled: {value!r:.200}"
        case Rejected(reason):
            return f"rejected: {reason}"
    return "no answer"
