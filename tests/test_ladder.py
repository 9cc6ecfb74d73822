"""The ladder: which source is tried next, and what may be taken from it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from crdtstate.clock import Version
from crdtstate.ladder import (
    SOURCES,
    Attempt,
    Recovery,
    has_disowned,
    is_ahead,
    is_fork,
    lacks_own,
    next_source,
)

WRITERS = st.integers(1, 3)
VERSIONS = st.dictionaries(WRITERS, st.integers(1, 5)).map(Version)
CUTS = st.dictionaries(st.sampled_from(["a", "b"]), VERSIONS)


@given(st.lists(st.booleans(), min_size=3, max_size=3))
def test_each_source_is_tried_once_in_order_until_one_works(fails: list[bool]) -> None:
    attempts: list[Attempt] = []
    while (source := next_source(attempts)) is not None:
        attempts.append(Attempt(source, "broken" if fails[len(attempts)] else ""))

    assert [attempt.source for attempt in attempts] == list(SOURCES[: len(attempts)])
    assert all(attempt.reason for attempt in attempts[:-1])
    assert len(attempts) == 3 or not attempts[-1].reason


@given(CUTS, CUTS)
def test_what_is_ahead_brings_something_and_afterwards_is_not(
    there: dict[str, Version], here: dict[str, Version]
) -> None:
    joined = {name: here.get(name, Version()).copy() for name in here.keys() | there.keys()}
    for name, version in there.items():
        joined[name].merge(version)

    assert is_ahead(there, here, lambda name: True) == any(
        joined[name] != here.get(name, Version()) for name in joined
    )
    assert not is_ahead(there, joined, lambda name: True)
    assert not is_ahead(there, here, lambda name: False)


@given(CUTS, CUTS, WRITERS)
def test_own_changes_are_missing_only_in_what_is_ahead(
    there: dict[str, Version], here: dict[str, Version], writer: int
) -> None:
    if lacks_own(writer, there, here):
        assert is_ahead(there, here, lambda name: True)
    assert any(lacks_own(each, there, here) for each in (1, 2, 3)) == is_ahead(
        there, here, lambda name: True
    )


@given(
    CUTS, st.dictionaries(WRITERS, st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 5)))
)
def test_what_stays_within_what_was_kept_has_nothing_that_was_taken_back(
    versions: dict[str, Version], kept: dict[int, dict[str, int]]
) -> None:
    within = {
        name: Version({w: min(seq, kept.get(w, {}).get(name, 9)) for w, seq in version.items()})
        for name, version in versions.items()
    }

    assert not has_disowned(within, kept)
    assert has_disowned(versions, kept) == any(
        versions[name][w] > within[name][w] for name in versions for w in versions[name]
    )
    assert has_disowned(versions, {1: None}) == any(1 in version for version in versions.values())


@given(st.lists(st.integers(1, 9), min_size=1, unique=True).map(sorted), st.data())
def test_one_history_is_never_a_fork_wherever_it_was_cut(stamps: list[int], data: object) -> None:
    # Change 1, 2, ... of a writer at rising stamps; a cut between two of them, at a stamp between.
    history = [(seq, 10 * stamp) for seq, stamp in enumerate(stamps, 1)]
    cut = data.draw(st.integers(0, len(history)))  # type: ignore[attr-defined]
    stamp = history[cut - 1][1] + 5 if cut else 5

    assert not is_fork(cut, stamp, history)
    if cut < len(history):
        # The same numbers written again later by another, which the cut has not seen; or the
        # other way round, a cut that misses what came before it.
        assert is_fork(cut + 1, stamp, history)
        assert is_fork(cut, history[-1][1] + 5, history)


def test_a_recovery_says_what_happened_in_a_line() -> None:
    recovery = Recovery(
        "checkpoint",
        (Attempt("store", "row 7 is damaged"), Attempt("checkpoint")),
        seconds=0.25,
        changes={"checkpoint": 40, "journal": 2},
        aside="/x/agent.db.damaged-1",
        writer=255,
    )

    assert str(recovery) == (
        "recovered from checkpoint in 0.25 s; 40 changes from the checkpoint; 2 changes from the "
        "journal; the store that was not used is now /x/agent.db.damaged-1; store: row 7 is damaged"
    )
    plain = recovery.as_dict()
    assert plain["writer"] == "ff" and plain["attempts"][0] == ["store", "row 7 is damaged"]
    assert plain["changes"] == {"checkpoint": 40, "journal": 2}
