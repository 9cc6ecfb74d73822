"""Strategies: what they choose, and that it depends on the candidates alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdtstate.clock import Stamp
from crdtstate.conflict import (
    Candidate,
    decide,
    explain,
    known_strategies,
    resolver,
    same,
    strategy,
)
from crdtstate.errors import UnknownStrategy, UsageError

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats()
    | st.text(max_size=2)
    | st.binary(max_size=2)
    | st.just(datetime(2026, 1, 1, tzinfo=UTC)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=1), inner),
    max_leaves=5,
)


def candidates_of(found: Sequence[Any]) -> list[Candidate]:
    return [Candidate(v, at, f"agent-{at}", Stamp(at << 16)) for at, v in enumerate(found, 1)]


@pytest.mark.parametrize("name", ["lww", "max", "min", "merge"])
@given(found=st.lists(values, min_size=1, max_size=4))
def test_every_strategy_takes_any_values_and_answers_the_same_again(
    name: str, found: list[Any]
) -> None:
    rule = resolver(name)

    assert repr(rule(candidates_of(found))) == repr(rule(candidates_of(found)))


@pytest.mark.parametrize("name", ["max", "min"])
@given(found=st.lists(values, min_size=1, max_size=4))
def test_the_largest_and_smallest_do_not_depend_on_who_wrote_when(
    name: str, found: list[Any]
) -> None:
    rule = resolver(name)
    answers = {_order(rule(candidates_of(order))) for order in itertools.permutations(found)}

    assert len(answers) == 1


def _order(value: Any) -> str:
    # 0, 0.0 and False are equally large; which of them is chosen is decided by age.
    return (
        repr(value).replace("False", "0").replace("True", "1").replace(".0", "").replace("-0", "0")
    )


def test_the_last_write_wins_by_default() -> None:
    assert resolver("lww")(candidates_of(["old", "new"])) == "new"


def test_the_largest_of_lists_is_their_order() -> None:
    assert resolver("max")(candidates_of([[3, "a"], [20, "b"], [3, "z"]])) == [20, "b"]
    assert resolver("min")(candidates_of([2, 1.5, True])) is True


def test_merging_unites_dicts_and_lists_deeply() -> None:
    older = {"a": 1, "tags": ["x", "y"], "deep": {"p": 1}}
    newer = {"b": 2, "tags": ["y", "z"], "deep": {"p": 2, "q": 3}}

    united = resolver("merge")(candidates_of([older, newer]))

    assert united == {"a": 1, "b": 2, "tags": ["x", "y", "z"], "deep": {"p": 2, "q": 3}}


def test_an_own_strategy_is_registered_by_name() -> None:
    @strategy("longest-of-test")
    def longest(candidates: Sequence[Candidate]) -> Any:
        return max(candidates, key=lambda candidate: len(candidate.value)).value

    assert resolver("longest-of-test")(candidates_of(["aaa", "b"])) == "aaa"
    assert "longest-of-test" in known_strategies()


def test_built_in_names_and_empty_ones_cannot_be_taken() -> None:
    with pytest.raises(UsageError, match="built in"):
        strategy("lww")(lambda candidates: None)
    with pytest.raises(UsageError, match="1 to 100"):
        strategy("")


def test_an_unknown_strategy_says_what_is_known() -> None:
    with pytest.raises(UnknownStrategy, match="lww, max, merge, min"):
        resolver("nobody")


def test_an_explanation_names_winner_losers_and_rule() -> None:
    told = explain("plan['goal']", candidates_of(["old", "new"]), partial(decide, "lww"))

    assert (told.value, told.rule) == ("new", "lww")
    assert told.winner == told.candidates[1]
    assert told.lost == (told.candidates[0],)
    assert str(told).splitlines() == [
        "plan['goal'] = 'new' (lww)",
        "  -> 'new' by agent-2 at 1970-01-01T00:00:00.002+00:00",
        "     'old' by agent-1 at 1970-01-01T00:00:00.001+00:00",
    ]


def test_a_value_that_a_strategy_built_has_no_winner() -> None:
    told = explain("k", candidates_of([["a"], ["b"]]), partial(decide, "merge"))

    assert told.value == ["a", "b"]
    assert told.winner is None
    assert len(told.lost) == 2


def test_sameness_tells_types_apart() -> None:
    assert same(1, 1) and not same(1, True) and not same(1, 1.0)
