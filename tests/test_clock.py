"""Versions, cuts and stamps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdtstate.clock import Cut, Dot, HybridClock, Stamp, Version
from crdtstate.errors import UsageError

versions = st.dictionaries(st.integers(1, 5), st.integers(1, 4), max_size=4).map(Version)
cuts = st.dictionaries(st.sampled_from("abc"), versions, max_size=3).map(Cut)


def merged(*parts: Version) -> Version:
    whole = Version()
    for part in parts:
        whole.merge(part)
    return whole


@given(versions, versions, versions)
def test_merging_versions_is_a_join(a: Version, b: Version, c: Version) -> None:
    assert merged(a, b) == merged(b, a)
    assert merged(merged(a, b), c) == merged(a, merged(b, c))
    assert merged(a, a) == a
    assert a <= merged(a, b) and b <= merged(a, b)


@given(versions, versions)
def test_two_versions_are_ordered_or_concurrent(a: Version, b: Version) -> None:
    relations = [a < b, a > b, a == b, a.concurrent_with(b)]

    assert relations.count(True) == 1
    assert (a != b) is not (a == b)


@given(versions)
def test_a_version_round_trips_through_its_flat_form(version: Version) -> None:
    assert Version.from_flat(version.flat()) == version


def test_a_version_covers_the_changes_it_counts() -> None:
    version = Version({1: 2})

    assert version.covers(Dot(1, 2)) and version.covers(Dot(1, 1))
    assert not version.covers(Dot(1, 3)) and not version.covers(Dot(2, 1))
    assert version == Version({1: 2, 3: 0})
    assert version.total == 2


@given(cuts, cuts)
def test_a_cut_round_trips_through_its_text(a: Cut, b: Cut) -> None:
    assert Cut.parse(str(a)) == a
    assert (a <= b) == all(version <= b.get(name, Version()) for name, version in a.items())


def test_a_cut_cannot_be_altered_through_what_it_gives() -> None:
    cut = Cut({"main": Version({1: 1})})

    cut["main"][1] = 9

    assert cut == Cut({"main": Version({1: 1})})


@pytest.mark.parametrize("text", ["", "?", "gaFhkQE=", "kQ=="])
def test_text_that_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a version token"):
        Cut.parse(text)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 10**6)), min_size=1))
def test_stamps_rise_however_the_wall_clock_jumps(steps: list[tuple[bool, int]]) -> None:
    clock, highest = HybridClock(), 0
    for is_own, wall in steps:
        if is_own:
            stamp = clock.issue(wall)
            assert stamp > highest
            highest = stamp
        elif clock.observe(wall << 16, wall):
            highest = max(highest, wall << 16)


def test_a_stamp_far_ahead_is_not_followed() -> None:
    clock = HybridClock(skew_max_ms=1000)

    assert not clock.observe(5000 << 16, 1000)
    assert clock.observe(2000 << 16, 1000)
    assert clock.issue(1000).wall_ms == 2000


def test_a_stamp_tells_its_time() -> None:
    stamp = Stamp(1_700_000_000_000 << 16 | 3)

    assert stamp.time.isoformat() == "2023-11-14T22:13:20+00:00"
    assert stamp.counter == 3
