"""The benchmarks run and say sane things; how fast it was is not a matter of tests."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.growth import CASES, growth
from benchmarks.measure import TINY, Result, Target, at_least, at_most, ratio_at_most
from benchmarks.report import as_json, as_table, machine


def check(results: Sequence[Result]) -> None:
    assert results
    assert len({result.name for result in results}) == len(results)
    for result in results:
        numbers = [result.ours, result.floor, result.ratio]
        assert all(math.isfinite(number) for number in numbers if number is not None), result
        assert result.ours >= 0, result
        assert result.is_met in (True, False, None)
        assert (result.is_met is None) is (result.target is None)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in ("growth", "faults")])
def test_a_benchmark_gives_results(name: str) -> None:
    check(BENCHMARKS[name](TINY))


def test_growth_is_measured_for_one_writer_and_for_many() -> None:
    results = growth(TINY, (CASES[0], CASES[-1]))

    check(results)
    kinds = [result.name.rpartition(": ")[2] for result in results]
    assert kinds == ["size", "memory", "load", "longest change"] * 2


def test_a_ratio_says_how_many_times_the_floor_something_costs() -> None:
    assert Result("half as fast", "/s", 10, 20).ratio == 2
    assert Result("twice as long", "ms", 20, 10).ratio == 2
    assert Result("nothing to compare with", "ms", 20).ratio is None


def test_targets_are_met_or_not() -> None:
    def is_met(target: Target) -> bool | None:
        return Result("", "ms", 20, 10, target).is_met

    assert [is_met(at_least(20)), is_met(at_most(20)), is_met(ratio_at_most(2))] == [True] * 3
    assert [is_met(at_least(21)), is_met(at_most(19)), is_met(ratio_at_most(1))] == [False] * 3
    assert Result("", "ms", 20).is_met is None


def test_the_table_shows_every_result_below_its_benchmark() -> None:
    results = {"writes": [Result("fast", "/s", 123456, 1e6, at_least(1), "bare")], "reads": []}

    table = as_table({**results, "growth": [Result("size", "KB", 0.5, None, at_most(0.1))]})

    lines = [line.split() for line in table.splitlines() if line]
    assert lines[0][:6] == ["name", "ours", "floor", "ratio", "target", "met?"]
    assert lines[1:3] == [
        ["writes"],
        ["fast", "123,456", "/s", "1,000,000", "/s", "8.10", ">=", "1", "yes", "bare"],
    ]
    assert lines[3:] == [["growth"], ["size", "0.500", "KB", "-", "-", "<=", "0.1", "NO"]]


def test_machines_read_the_same() -> None:
    read = json.loads(as_json({"reads": [Result("fast", "us", 1.0, 0.5, at_most(2), "dict")]}))

    assert read["machine"].keys() == machine().keys()
    assert read["results"]["reads"] == [
        {
            "name": "fast",
            "unit": "us",
            "ours": 1.0,
            "floor": 0.5,
            "target": "<= 2",
            "note": "dict",
            "ratio": 2.0,
            "is_met": True,
        }
    ]


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["speed"])

    assert "there is no benchmark speed" in capsys.readouterr().err
