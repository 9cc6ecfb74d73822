"""
Conflicts: several live values at one path, and the rules that choose among them.

A *strategy* is a pure function of the candidates, applied when the path is read. Its *name* is
replicated data of the document; its code is registered in every process. Nothing that a merge saw
is dropped before somebody writes over it, so a strategy can be changed at any time, and
`Explanation` can always say who wrote what, what lost and by which rule.

    @crdtstate.strategy("longest")
    def longest(candidates):
        return max(candidates, key=lambda candidate: len(candidate.value)).value
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from crdtstate.clock import Stamp
from crdtstate.errors import UnknownStrategy, UsageError

DEFAULT_STRATEGY = "lww"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the live values at a path.

    Attributes:
        value: The value.
        writer: Whose lane it lies in.
        agent: The name of the agent that writes that lane.
        stamp: When it was written, by the writer's hybrid logical clock.
    """

    value: Any
    writer: int
    agent: str
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Conflict:
    """A path with several different live values, oldest first."""

    document: str
    kind: str
    """``"map"`` or ``"register"``."""
    name: str
    key: str
    candidates: tuple[Candidate, ...]


Resolver = Callable[[Sequence[Candidate]], Any]
"""Chooses or builds a value; gets at least one candidate, oldest first, and must depend on
nothing else: every replica has to come to the same answer."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a path reads as it does.

    Attributes:
        path: The path, such as ``plan['goal']``.
        value: What reading gives (None when there is no candidate).
        rule: ``"only value"``, ``"no value"``, or the name of the strategy that decided.
        winner: The candidate whose value was chosen; None if the strategy built a value.
        candidates: All live values, oldest first.
        lost: The candidates that were not chosen; they stay until somebody writes over them.
    """

    path: str
    value: Any
    rule: str
    winner: Candidate | None
    candidates: tuple[Candidate, ...]
    lost: tuple[Candidate, ...]

    def __str__(self) -> str:
        lines = [f"{self.path} = {self.value!r} ({self.rule})"]
        for candidate in reversed(self.candidates):
            mark = "->" if candidate is self.winner else "  "
            when = candidate.stamp.time.isoformat(timespec="milliseconds")
            lines.append(f"  {mark} {candidate.value!r} by {candidate.agent} at {when}")
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


def explain(path: str, rule: str, candidates: Sequence[Candidate]) -> Explanation:
    """Say what *rule* makes of *candidates* (oldest first)."""
    if not candidates:
        return Explanation(path, None, "no value", None, (), ())
    if len(candidates) == 1:
        only = candidates[0]
        return Explanation(path, only.value, "only value", only, (only,), ())
    value = resolver(rule)(candidates)
    winner = next((c for c in reversed(candidates) if same(c.value, value)), None)
    lost = tuple(c for c in candidates if c is not winner) if winner else tuple(candidates)
    return Explanation(path, value, rule, winner, tuple(candidates), lost)


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


_BUILT_IN: dict[str, Resolver] = {"lww": lww, "max": largest, "min": smallest, "merge": merged}
_registry.update(_BUILT_IN)
