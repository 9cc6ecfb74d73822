"""Which checkpoints are kept: examples, and the laws of forgetting."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdtstate.clock import Version
from crdtstate.errors import UsageError
from crdtstate.manifest import Entry, Manifest, Part
from crdtstate.retention import Held, Retention, judge, near, orphans, total_bytes

NOW_MS = 1_000_000_000


def held(
    number: int, *, age: float = 0, label: str = "", parts: str = "a", verified: bool = True
) -> Held:
    """A checkpoint with one document for each letter of *parts*, of 100 bytes each."""
    documents = tuple(
        Entry(letter, False, Version({1: 1}), Part(letter * 64, 300, 100)) for letter in parts
    )
    created_ms = NOW_MS - int(1000 * age)
    manifest = Manifest("agent", 1, number, created_ms, label, None, documents)
    return Held(f"{number:016x}-{number:016x}", manifest, verified)


def kept(retention: Retention, *checkpoints: Held) -> list[int]:
    verdict = judge(retention, checkpoints, NOW_MS)
    return sorted(int(id[:16], 16) for id in verdict.kept)


def test_the_newest_are_kept_by_count() -> None:
    assert kept(Retention(count=2), *map(held, range(5))) == [3, 4]


def test_old_ones_go() -> None:
    checkpoints = [held(1, age=100), held(2, age=50), held(3, age=10)]

    assert kept(Retention(age=50), *checkpoints) == [2, 3]


def test_the_newest_that_verifies_stays_whatever_the_limits_say() -> None:
    checkpoints = [held(1, age=9e6), held(2, age=9e6), held(3, age=9e6, verified=False)]

    assert kept(Retention(age=1, bytes=1, count=1), *checkpoints) == [2]
    verdict = judge(Retention(age=1), checkpoints, NOW_MS)
    assert verdict.kept == {checkpoints[1].id: "it is the newest that verifies"}


def test_if_none_verifies_the_newest_stays() -> None:
    checkpoints = [held(1, age=9e6, verified=False), held(2, age=9e6, verified=False)]

    assert kept(Retention(age=1), *checkpoints) == [2]


def test_those_with_a_label_stay_longer() -> None:
    checkpoints = [
        held(1, age=600, label="long ago"),
        held(2, age=100, label="release"),
        held(3, age=100),
        held(4, age=5),
    ]

    assert kept(Retention(age=50, labelled=4), *checkpoints) == [2, 4]
    labelled = [held(number, label="x") for number in range(9)]
    assert kept(Retention(count=2, labelled=1.5), *labelled, held(9)) == [6, 7, 8, 9]


def test_bytes_that_are_shared_count_once() -> None:
    checkpoints = [held(1, parts="ab"), held(2, parts="bc"), held(3, parts="cd")]

    assert kept(Retention(bytes=400), *checkpoints) == [1, 2, 3]
    assert kept(Retention(bytes=399), *checkpoints) == [2, 3]
    assert kept(Retention(bytes=299), *checkpoints) == [3]


def test_labelled_ones_have_the_first_share_of_the_bytes() -> None:
    checkpoints = [held(1, parts="a", label="keep"), held(2, parts="b"), held(3, parts="c")]

    assert kept(Retention(bytes=200), *checkpoints) == [1, 3]


def test_every_checkpoint_has_a_reason() -> None:
    checkpoints = [
        held(1, age=50 * 3600, label="release"),
        held(2, age=3 * 3600),
        held(3, age=600, parts="x"),
        held(4, age=5),
    ]

    verdict = judge(Retention(age=2 * 3600, bytes=100), checkpoints, NOW_MS)

    assert list(verdict.kept.values()) == ["it is the newest that verifies"]
    assert {int(id[:16]): why for id, why in verdict.dropped.items()} == {
        3: "with it, checkpoints take more than 100 bytes",
        2: "with it, checkpoints take more than 100 bytes",
        1: "it is older than 20 hours",
    }
    fine = judge(Retention(), checkpoints, NOW_MS)
    assert not fine.dropped
    assert list(fine.kept.values())[1:] == [
        "it is among the newest 20, 10 minutes old, below 7 days",
        "it is among the newest 20, 3 hours old, below 7 days",
        "it has the label 'release': it is among the newest 200, 2 days old, below 70 days",
    ]


def test_without_limits_everything_stays() -> None:
    checkpoints = [held(number, age=9e8) for number in range(50)]

    assert len(kept(Retention(count=None, age=None, bytes=None), *checkpoints)) == 50


@pytest.mark.parametrize(
    "settings",
    [
        {"count": 0},
        {"count": 1.5},
        {"count": True},
        {"age": -1},
        {"age": float("nan")},
        {"age": float("inf")},
        {"bytes": 0},
        {"labelled": 0.5},
        {"labelled": None},
        {"near": 0},
        {"age": "a week"},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"Retention.{next(iter(settings))}"):
        Retention(**settings)  # type: ignore[arg-type]


# Laws

COUNTS = st.none() | st.integers(1, 6)
AGES = st.none() | st.floats(0, 200)
BYTES = st.none() | st.integers(1, 900)
SETTINGS = st.builds(
    Retention, count=COUNTS, age=AGES, bytes=BYTES, labelled=st.floats(1, 3), near=COUNTS
)
CHECKPOINTS = st.lists(
    st.tuples(
        st.floats(0, 300),
        st.sampled_from(["", "", "x"]),
        st.text("abcdefgh", min_size=1, max_size=4),
        st.booleans(),
    ),
    max_size=12,
).map(
    lambda drawn: [
        held(number, age=age, label=label, parts="".join(sorted(set(parts))), verified=verified)
        for number, (age, label, parts, verified) in enumerate(drawn)
    ]
)


@given(SETTINGS, CHECKPOINTS)
def test_everything_is_kept_or_dropped_and_the_newest_good_one_is_kept(
    retention: Retention, checkpoints: list[Held]
) -> None:
    verdict = judge(retention, checkpoints, NOW_MS)

    assert sorted([*verdict.kept, *verdict.dropped]) == sorted(each.id for each in checkpoints)
    good = [each.id for each in checkpoints if each.is_verified]
    assert not good or max(good) in verdict.kept
    assert not checkpoints or verdict.kept


@given(SETTINGS, CHECKPOINTS)
def test_no_kept_checkpoint_lacks_a_part(retention: Retention, checkpoints: list[Held]) -> None:
    verdict = judge(retention, checkpoints, NOW_MS)
    stay = [each.manifest for each in checkpoints if each.id in verdict.kept]
    all_parts = {name for each in checkpoints for name in each.manifest.parts()}

    gone = orphans(all_parts, stay)

    for manifest in stay:
        assert not gone & manifest.parts().keys()
    assert all_parts - gone == {name for manifest in stay for name in manifest.parts()}


@given(SETTINGS, CHECKPOINTS)
def test_what_is_kept_fits(retention: Retention, checkpoints: list[Held]) -> None:
    verdict = judge(retention, checkpoints, NOW_MS)
    stay = [each for each in checkpoints if each.id in verdict.kept]

    if retention.bytes is not None and len(stay) > 1:
        assert total_bytes(each.manifest for each in stay) <= retention.bytes
    if retention.count is not None:
        plain = [each for each in stay if not each.manifest.label]
        assert len(plain) <= retention.count + 1


@given(SETTINGS, CHECKPOINTS, st.floats(0, 500))
def test_what_is_dropped_stays_dropped(
    retention: Retention, checkpoints: list[Held], later: float
) -> None:
    now = judge(retention, checkpoints, NOW_MS)
    left = [each for each in checkpoints if each.id in now.kept]

    # Done again at once, nothing more goes; and nothing comes back with time.
    assert not judge(retention, left, NOW_MS).dropped
    assert judge(retention, left, NOW_MS).kept.keys() == now.kept.keys()
    after = judge(retention, checkpoints, NOW_MS + int(1000 * later))
    assert after.kept.keys() <= now.kept.keys()


@given(SETTINGS, CHECKPOINTS, st.data())
def test_a_tighter_limit_never_keeps_more(
    retention: Retention, checkpoints: list[Held], draw: st.DataObject
) -> None:
    name = draw.draw(st.sampled_from(["count", "age", "bytes"]))
    limit = getattr(retention, name)
    if name == "age":
        tighter: float = draw.draw(st.floats(0, 1000 if limit is None else limit))
    else:
        tighter = draw.draw(st.integers(1, 1000 if limit is None else limit))

    wide = judge(retention, checkpoints, NOW_MS)
    tight = judge(replace(retention, **{name: tighter}), checkpoints, NOW_MS)

    assert tight.kept.keys() <= wide.kept.keys()


@given(SETTINGS, CHECKPOINTS)
def test_the_newest_are_near(retention: Retention, checkpoints: list[Held]) -> None:
    ids = sorted(each.id for each in checkpoints)

    close = near(retention, ids)

    assert close == set(ids if retention.near is None else ids[-retention.near :])
