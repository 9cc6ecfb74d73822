"""
More than eventual: write concern, and strong reads and writes. Sans-I/O.

Each is a small machine around questions to members (`quorum`): the shell calls `poll` whenever
something happened, until that says that it is done, and `close` in any case. Nothing is ever
rolled back: what runs out of time may still come about.

`Confirmation` waits until so many members have what was written here. `StrongWrite` and
`StrongRead` make a map's key or a register linearizable over `Config.voters` (multi-writer ABD):

1. Ask a majority of the voters which version of the document they have synced. Whatever a strong
   operation completed before this one began is in at least one of these.
2. Catch up with all of it. The value is now the candidate of the highest stamp.
3. A write covers it, with a higher stamp. (Stamps order what is concurrent. A clock too far ahead
   is not followed, so the stamp is raised above what is covered, not only drawn from the clock.)
4. Wait until a majority has synced the change that wrote the value, a read too ("reads must
   write": else a later read could miss what this one saw). All it builds on is there as well.

There is no compare-and-set here and no lock: two writes at the same time both succeed, in some
order that all agree on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from crdtstate.clock import Dot, Version
from crdtstate.document import Document
from crdtstate.errors import ConfirmTimeout, QuorumLost, UsageError
from crdtstate.quorum import Question
from crdtstate.slots import candidates

if TYPE_CHECKING:
    from crdtstate.sync import Sync


@dataclass(frozen=True, slots=True)
class Confirm:
    """How many replicas must have what was written.

    Without `Config.voters` all replicas count, this one included; with them only those.

    Attributes:
        count: So many; None: a majority of the voters, or all.
        share: Which of them, if *count* is None.
        durable: They must have it so that a power cut does not take it.
    """

    count: int | None
    durable: bool = False
    share: str = ""

    def __post_init__(self) -> None:
        if self.count is None and self.share not in ("majority", "all"):
            raise UsageError("Confirm(n), Confirm.majority() or Confirm.all()")
        if self.count is not None and (type(self.count) is not int or self.count < 1):
            raise UsageError(f"Confirm takes how many replicas, from 1, not {self.count!r}")

    @classmethod
    def majority(cls, *, durable: bool = False) -> Self:
        """More than half of the voters."""
        return cls(None, durable, "majority")

    @classmethod
    def all(cls, *, durable: bool = False) -> Self:
        """All voters."""
        return cls(None, durable, "all")

    def needed(self, voters: int) -> int:
        """How many that are of so many voters.

        Raises:
            UsageError: There are not so many, or none and it would take voters.
        """
        if self.count is not None:
            if voters and self.count > voters:
                raise UsageError(f"Confirm({self.count}) of {voters} voters can never be")
            return self.count
        if not voters:
            raise UsageError(
                f"Confirm.{self.share}() of whom? Name the voters: Config(voters=['relay-1', ...])"
            )
        return voters if self.share == "all" else majority(voters)


@dataclass(frozen=True, slots=True)
class Receipt:
    """Who has what was written.

    Attributes:
        by: The agents' names, sorted.
        durable: Whether they have it so that a power cut does not take it.
    """

    by: tuple[str, ...]
    durable: bool


def majority(voters: int) -> int:
    """More than half."""
    return voters // 2 + 1


class Confirmation:
    """Waits until enough members have some versions.

    Args:
        core: Asks them.
        confirm: How many.
        versions: Of which documents they must have what.
        voters: Who counts; none: everybody.
        now: The time.

    Raises:
        UsageError: It can never be.
    """

    def __init__(
        self,
        core: Sync,
        confirm: Confirm,
        versions: Mapping[str, Version],
        voters: tuple[str, ...],
        now: float,
    ) -> None:
        self._core = core
        self._confirm = confirm
        self._voters = frozenset(voters)
        self._needed = confirm.needed(len(voters))
        self._questions = [
            core.ask(name, version, voters, now, durable=confirm.durable)
            for name, version in versions.items()
        ]

    @property
    def receipt(self) -> Receipt:
        """Who has it all by now."""
        answered = [set(question.answers) for question in self._questions]
        names = set.intersection(*answered) if answered else set()
        return Receipt(tuple(sorted(names)), self._confirm.durable)

    def poll(self, now: float) -> bool:
        """Whether enough have it."""
        return not self._questions or len(self.receipt.by) >= self._needed

    def failure(self, seconds: float | None) -> ConfirmTimeout:
        """What to raise when time is up."""
        got = self.receipt.by
        missing = tuple(sorted(self._voters.difference(got)))
        return ConfirmTimeout(got, missing, self._needed, seconds)

    def close(self) -> None:
        """Ask no more."""
        for question in self._questions:
            self._core.withdraw(question)


class _Strong(ABC):
    """A strong operation: asks, catches up, acts, and has the outcome confirmed.

    Args:
        core: Asks the voters.
        document: Of which document,
        container: which view, and
        key: which place.
        voters: `Config.voters`.
        now: The time.
    """

    def __init__(
        self,
        core: Sync,
        document: Document,
        container: str,
        key: str,
        voters: tuple[str, ...],
        now: float,
    ) -> None:
        if not voters:
            raise UsageError(
                "strong reads and writes need voters: Config(voters=['relay-1', ...]) with the "
                "names of replicas that have a store, the same everywhere"
            )
        self._core = core
        self._document = document
        self._container = container
        self._key = key
        self._voters = voters
        self._majority = majority(len(voters))
        # The version to catch up with, once a majority has told.
        self._target: Version | None = None
        # The change that wrote the outcome, once that stands.
        self._dot: Dot | None = None
        self._is_done = False
        self._question = core.ask(document.name, Version(), voters, now, durable=True, tell=True)
        self._confirming: Question | None = None

    def poll(self, now: float) -> bool:
        """Go on as far as possible; whether it is done."""
        if self._target is None:
            self._collect(now)
        if self._target is not None and self._dot is None and not self._is_done:
            if not self._target <= self._document.version or self._document.is_broken:
                return False
            self._dot = self._act()
            self._is_done = self._dot is None or self._is_held(self._dot)
        if self._dot is not None and not self._is_done:
            self._confirm(self._dot, now)
        return self._is_done

    def _collect(self, now: float) -> None:
        """Phase 1: the join of what a majority has."""
        answers = self._question.answers
        if len(answers) < self._majority:
            return
        target = Version()
        for version in answers.values():
            target.merge(version)
        self._target = target
        self._core.catch_up(self._document.name, target, now)

    @abstractmethod
    def _act(self) -> Dot | None:
        """Phase 2: write or read; returns the change that wrote the outcome, if any did."""

    def _is_held(self, dot: Dot) -> bool:
        """Whether a majority told that it has *dot*: then nobody has to be asked again."""
        answers = self._question.answers.values()
        return sum(version.covers(dot) for version in answers) >= self._majority

    def _confirm(self, dot: Dot, now: float) -> None:
        """Phase 3: a majority has it."""
        if self._confirming is None:
            version = Version([dot])
            self._confirming = self._core.ask(
                self._document.name, version, self._voters, now, durable=True
            )
        self._is_done = len(self._confirming.answers) >= self._majority

    def failure(self, seconds: float | None) -> QuorumLost:
        """What to raise when time is up."""
        asked = self._confirming or self._question
        missing = tuple(sorted(asked.names.difference(asked.answers)))
        return QuorumLost(missing, len(self._voters), seconds, is_unknown=self._is_unknown)

    @property
    def _is_unknown(self) -> bool:
        """Whether it may have taken effect nevertheless."""
        return False

    def close(self) -> None:
        """Ask no more."""
        self._core.withdraw(self._question)
        if self._confirming is not None:
            self._core.withdraw(self._confirming)


class StrongWrite(_Strong):
    """Writes the packed *value*; see `_Strong`."""

    value = b""

    def _act(self) -> Dot | None:
        place = self._document, self._container, self._key
        return self._core.documents.write_above(*place, self.value)

    @property
    def _is_unknown(self) -> bool:
        return self._dot is not None


class StrongRead(_Strong):
    """Reads; `value` is then the packed one, or None if there is none."""

    value: bytes | None = None

    def _act(self) -> Dot | None:
        # What was written here and not sealed is no part of any version yet.
        self._core.documents.seal_now(self._document)
        cell = self._document.lanes.container(self._container).cells.get(self._key, {})
        found = candidates(cell)
        if not found:
            return None
        writer, slot = found[-1]
        self.value = slot.value
        return Dot(writer, slot.seq)
