"""
Conflicts: several live values at one path, and the rules that choose among them.

A *strategy* is a pure function of the candidates, applied when the path is read. Its *name* is
replicated data of the document, for a map, for its keys that begin with a prefix, or for a
register; its code is registered in every process. Nothing that a merge saw is dropped before
somebody writes over it, so a strategy can be changed at any time, and `Explanation` can always say
who wrote what, what lost and by which rule. The strategy ``"vote"`` also looks at votes (`votes`).

    @crdtstate.strategy("longest")
    def longest(candidates):
        return max(candidates, key=lambda candidate: len(candidate.value)).value
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack

from crdtstate.clock import Dot, Stamp
from crdtstate.errors import UnknownStrategy, UsageError

if TYPE_CHECKING:
    from crdtstate.audit import Record

DEFAULT_STRATEGY = "lww"

VOTE = "vote"
"""The strategy that lets a majority of the voters decide."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the live values at a path.

    Attributes:
        value: The value.
        writer: Whose lane it lies in.
        agent: The name of the agent that writes that lane.
        stamp: When it was written, by the writer's hybrid logical clock.
        seq: Which change of the writer wrote it.
    """

    value: Any
    writer: int
    agent: str
    stamp: Stamp
    seq: int = 0

    @property
    def dot(self) -> Dot:
        """The change that wrote it."""
        return Dot(self.writer, self.seq)


@dataclass(frozen=True, slots=True)
class Vote:
    """What one agent voted for.

    Attributes:
        counts: Whether it was in time, and of one of the voters.
    """

    agent: str
    value: Any
    stamp: Stamp
    counts: bool


class Decision(NamedTuple):
    """What is read where values conflict, by which rule, and who voted."""

    value: Any
    rule: str
    votes: tuple[Vote, ...] = ()


@dataclass(frozen=True, slots=True)
class Conflict:
    """A path with several different live values.

    Attributes:
        kind: ``"map"`` or ``"register"``.
        key: The key in the map; empty for a register.
        candidates: The values, oldest first.
        value: What reading gives now; None if this process cannot tell (see *rule*).
        rule: What decides now: the name of the strategy; ``"lww"`` for a strategy ``"vote"``
            without a majority; ``"unknown"`` if its function is not registered here, or failed.
        strategy: The name of the strategy.
        votes: What was voted on these candidates.
    """

    document: str
    kind: str
    name: str
    key: str
    candidates: tuple[Candidate, ...]
    value: Any = None
    rule: str = DEFAULT_STRATEGY
    strategy: str = DEFAULT_STRATEGY
    votes: tuple[Vote, ...] = ()

    @property
    def path(self) -> str:
        """The place as text, such as ``plan['goal']``."""
        return self.name if self.kind == "register" else f"{self.name}[{self.key!r}]"

    @property
    def poll(self) -> str:
        """A name for exactly this conflict, the same on every replica."""
        return poll(self.document, self.kind[0] + self.name, self.key, self.dots)

    @property
    def dots(self) -> frozenset[Dot]:
        """The changes that wrote the candidates. With the place they say which conflict it is:
        another candidate, or one less, makes another conflict."""
        return frozenset(candidate.dot for candidate in self.candidates)


def poll(document: str, container: str, key: str, dots: Iterable[Dot]) -> str:
    """The name of the conflict of the candidates *dots* at a place."""
    flat = [number for dot in sorted(dots) for number in dot]
    packed = msgpack.packb([document, container, key, flat])
    return hashlib.blake2b(packed, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Resolution:
    """A write over values that conflicted.

    Attributes:
        conflict: What conflicted where it was written or delivered, and what was read there.
        value: What was written; None also if it was removed.
        removed: Whether it was removed.
        rule: ``"vote"`` if a majority had voted for this value; ``"resolve"`` if somebody said
            that it resolves the conflict (of others' changes this is known of the whole change);
            the strategy's name if it is what was read anyway; else ``"write"``.
    """

    conflict: Conflict
    value: Any
    removed: bool
    rule: str
    agent: str
    dot: Dot
    stamp: Stamp


Resolver = Callable[[Sequence[Candidate]], Any]
"""Chooses or builds a value; gets at least one candidate, oldest first, and must depend on
nothing else: every replica has to come to the same answer."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a path reads as it does.

    Attributes:
        path: The path, such as ``plan['goal']``.
        value: What reading gives (None when there is no candidate).
        rule: ``"only value"``, ``"no value"``, or the name of the strategy that decided; where
            votes have no majority, that is ``"lww"``.
        winner: The candidate whose value was chosen; None if the strategy built a value.
        candidates: All live values, oldest first.
        lost: The candidates that were not chosen; they stay until somebody writes over them.
        votes: What was voted on these candidates.
        earlier: The resolutions at this path that this replica's audit remembers, oldest first.
    """

    path: str
    value: Any
    rule: str
    winner: Candidate | None
    candidates: tuple[Candidate, ...]
    lost: tuple[Candidate, ...]
    votes: tuple[Vote, ...] = ()
    earlier: tuple[Record, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.path} = {self.value!r} ({self.rule})"]
        for candidate in reversed(self.candidates):
            mark = "->" if candidate is self.winner else "  "
            when = candidate.stamp.time.isoformat(timespec="milliseconds")
            lines.append(f"  {mark} {candidate.value!r} by {candidate.agent} at {when}")
        for vote in self.votes:
            late = "" if vote.counts else " (does not count)"
            lines.append(f"  vote of {vote.agent} for {vote.value!r}{late}")
        lines += [f"  earlier: {record}" for record in self.earlier]
        return "\n".join(lines)


_registry: dict[str, Resolver] = {}


def strategy(name: str) -> Callable[[Resolver], Resolver]:
    """Register the decorated function as the strategy *name*, in this process.

    Register it under the same name in every process that reads the document, before it reads.

    Raises:
        UsageError: The name is empty, too long or taken by a different function. The same one,
            defined anew, takes its place.
    """
    if not isinstance(name, str) or not 0 < len(name) <= 100:
        raise UsageError(f'use it as @strategy("name"), 1 to 100 characters, not {name!r}')

    def register(function: Resolver) -> Resolver:
        if not callable(function):
            raise UsageError(f"a strategy is a function of candidates, not {function!r}")
        if name in _BUILT_IN:
            raise UsageError(f"the strategy {name!r} is built in; choose another name")
        if name in _registry and _place(_registry[name]) != _place(function):
            raise UsageError(f"the strategy {name!r} is taken by {_place(_registry[name])}")
        _registry[name] = function
        return function

    return register


def _place(function: Resolver) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"


def known_strategies() -> list[str]:
    """The names that can be given as ``strategy=`` in this process."""
    return sorted(_registry)


def resolver(name: str) -> Resolver:
    """The function registered as *name*.

    Raises:
        UnknownStrategy: There is none.
    """
    try:
        return _registry[name]
    except KeyError:
        raise UnknownStrategy(name, known_strategies()) from None


def decide(strategy: str, candidates: Sequence[Candidate]) -> Decision:
    """What *strategy* makes of *candidates* (oldest first), without votes.

    Raises:
        UnknownStrategy: There is none of this name.
    """
    value = resolver(strategy)(candidates)
    return Decision(value, DEFAULT_STRATEGY if strategy == VOTE else strategy)


def explain(
    path: str,
    candidates: Sequence[Candidate],
    decide: Callable[[Sequence[Candidate]], Decision],
    earlier: tuple[Record, ...] = (),
) -> Explanation:
    """Say what *decide* makes of *candidates* (oldest first), if there are several."""
    if not candidates:
        return Explanation(path, None, "no value", None, (), (), (), earlier)
    if len(candidates) == 1:
        only = candidates[0]
        return Explanation(path, only.value, "only value", only, (only,), (), (), earlier)
    value, rule, votes = decide(candidates)
    winner = next((c for c in reversed(candidates) if same(c.value, value)), None)
    lost = tuple(c for c in candidates if c is not winner) if winner else tuple(candidates)
    return Explanation(path, value, rule, winner, tuple(candidates), lost, votes, earlier)


def same(one: Any, other: Any) -> bool:
    """Equality that tells 1 from True and 1.0, as the codec does."""
    return type(one) is type(other) and bool(one == other)


# The built-in strategies


def lww(candidates: Sequence[Candidate]) -> Any:
    """Last write wins: the highest stamp, then the highest writer."""
    return candidates[-1].value


def largest(candidates: Sequence[Candidate]) -> Any:
    """The largest value; values that do not compare are ordered by the name of their type."""
    return max(candidates, key=lambda candidate: _order(candidate.value)).value


def smallest(candidates: Sequence[Candidate]) -> Any:
    """The smallest value, in the order of `largest`."""
    return min(candidates, key=lambda candidate: _order(candidate.value)).value


def merged(candidates: Sequence[Candidate]) -> Any:
    """The deep union: dicts by key, lists by element (each once, oldest first). Where values of
    other kinds meet, the last write wins."""
    value = candidates[0].value
    for candidate in candidates[1:]:
        value = _union(value, candidate.value)
    return value


def _union(older: Any, newer: Any) -> Any:
    if isinstance(older, dict) and isinstance(newer, dict):
        union = dict(older)
        for key, value in newer.items():
            union[key] = _union(union[key], value) if key in union else value
        return union
    if isinstance(older, list) and isinstance(newer, list):
        union_list = list(older)
        for item in newer:
            if not any(same(item, present) for present in union_list):
                union_list.append(item)
        return union_list
    return newer


class _Ordered:
    """Compares any two values of the codec, in one total order."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __lt__(self, other: _Ordered) -> bool:
        one, two = self.value, other.value
        ranks = _rank(one), _rank(two)
        if ranks[0] != ranks[1]:
            return ranks[0] < ranks[1]
        if one is None:
            return False
        if isinstance(one, dict):
            return [_Pair(i) for i in sorted(one.items(), key=repr)] < [
                _Pair(i) for i in sorted(two.items(), key=repr)
            ]
        if isinstance(one, list):
            return [_Ordered(i) for i in one] < [_Ordered(i) for i in two]
        if one != one or two != two:
            # NaN compares with nothing; it is smaller than every number.
            return bool(one != one and two == two)
        return bool(one < two)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Ordered) and not self < other and not other < self

    __hash__ = None  # type: ignore[assignment]


class _Pair(_Ordered):
    """A dict's item: by key, then value."""

    def __lt__(self, other: _Ordered) -> bool:
        return [_Ordered(part) for part in self.value] < [_Ordered(part) for part in other.value]


def _order(value: Any) -> _Ordered:
    return _Ordered(value)


def _rank(value: Any) -> str:
    if isinstance(value, (bool, int, float)):
        return "number"
    return "" if value is None else type(value).__name__


_BUILT_IN: dict[str, Resolver] = {
    "lww": lww,
    "max": largest,
    "min": smallest,
    "merge": merged,
    # What is read where no majority has decided; votes are counted in `votes`.
    VOTE: lww,
}
_registry.update(_BUILT_IN)
