"""`CrdtChannel`: what parallel nodes write to one key is merged, by the laws of a CRDT."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import permutations
from typing import Annotated, Any, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import EmptyChannelError
from langgraph.graph import END, START, StateGraph
from langgraph.types import Overwrite

from crdtstate import CRDTStateError, InvalidUpdate, UnsupportedValue, UsageError
from crdtstate.integrations.langgraph import DELETE, CrdtChannel, increment
from crdtstate.integrations.langgraph.merging import (
    MAGIC,
    REMOVED_MAX,
    State,
    merge_states,
)


def states(*updates: Any, on: State | None = None, first: int = 1) -> list[State]:
    """What comes of each update if all are made at the same time, from one state."""
    start = on or State()
    return [
        start.updated([update], 1000 + number, first + number)
        for number, update in enumerate(updates)
    ]


def merged(*parts: State) -> Any:
    """The value of all, which is the same in whatever order they are merged."""
    found = {
        merge_states([each.encode() for each in order]) for order in permutations(parts)
    }  # fmt: skip
    assert len(found) == 1
    return State.decode(found.pop()).value()


# What updates do


def test_keys_are_added_and_replaced_and_the_rest_stays() -> None:
    start = State().updated([{"a": 1, "b": [1], "c": {"d": {"e": 1}}}], 1, 1)
    after = start.updated([{"a": "x", "c": {"d": {"f": 2}}, "g": None}], 2, 2)

    assert after.value() == {"a": "x", "b": [1], "c": {"d": {"e": 1, "f": 2}}, "g": None}
    assert start.value() == {"a": 1, "b": [1], "c": {"d": {"e": 1}}}


def test_what_is_written_at_the_same_time_to_different_keys_is_all_kept() -> None:
    assert merged(*states({"a": 1}, {"b": 2}, {"c": {"x": 1}}, {"c": {"y": 2}})) == {
        "a": 1,
        "b": 2,
        "c": {"x": 1, "y": 2},
    }


def test_of_two_values_for_one_key_the_last_one_wins_everywhere() -> None:
    assert merged(*states({"a": 1}, {"a": 2}, {"a": "x"})) == {"a": "x"}


def test_what_a_node_returns_unchanged_is_no_write() -> None:
    start = State().updated([{"a": 1, "b": {"c": 1}}], 1, 1)

    assert merged(*states({"a": 2}, {"a": 1, "b": {"c": 5}}, on=start)) == {"a": 2, "b": {"c": 5}}


def test_lists_keep_what_everybody_appended_and_lose_what_anybody_removed() -> None:
    start = State().updated([{"l": ["a", "b", "c"]}], 1, 1)

    assert merged(*states({"l": ["a", "b", "c", 1, 2]}, {"l": ["a", "b", "c", 3]}, on=start)) == {
        "l": ["a", "b", "c", 1, 2, 3]
    }
    assert merged(*states({"l": ["b", "c"]}, {"l": ["a", "c"]}, on=start)) == {"l": ["c"]}
    assert merged(*states({"l": ["a", "x", "b", "c"]}, {"l": ["a", "b", "c", "y"]}, on=start)) == {
        "l": ["a", "x", "b", "c", "y"]
    }
    assert merged(*states({"l": []}, {"l": ["a", "b", "c", "z"]}, on=start)) == {"l": ["z"]}
    assert merged(*states({"new": [1]}, {"new": [2]}, {"new": []})) == {"new": [1, 2]}


def test_sets_are_merged_by_their_elements() -> None:
    start = State().updated([{"s": {"a", "b"}}], 1, 1)

    assert merged(*states({"s": {"a", "b", 1}}, {"s": {"b", (1, 2)}}, on=start)) == {
        "s": {"b", 1, (1, 2)}
    }
    assert start.updated([{"s": set()}], 2, 1).value() == {"s": set()}


def test_increments_of_all_count() -> None:
    start = State().updated([{"n": 5}], 1, 1)
    one, two = states({"n": increment(2)}, {"n": increment(-1)}, on=start)
    more = one.updated([{"n": increment()}, {"n": increment()}, {"fresh": increment(3)}], 9, 1)

    assert merged(more, two) == {"n": 8, "fresh": 3}
    assert merged(more, two, one) == {"n": 8, "fresh": 3}
    assert more.updated([{"n": 100}], 10, 4).value() == {"n": 100, "fresh": 3}


def test_a_key_that_was_deleted_is_gone_with_what_was_in_it_but_for_what_came_after() -> None:
    start = State().updated([{"d": {"a": 1}, "x": 1}], 1, 1)
    gone = start.updated([{"d": DELETE}], 2000, 2)
    later = start.updated([{"d": {"b": 2}}], 3000, 3)

    assert gone.value() == {"x": 1}
    assert merged(gone, later) == {"d": {"b": 2}, "x": 1}
    assert len(gone) == 2
    assert gone.updated([{"d": DELETE, "never": DELETE}], 4000, 4) == gone


def test_overwrite_replaces_all_there_is() -> None:
    start = State().updated([{"a": {"b": [1]}}], 1, 1)

    for overwrite in (Overwrite({"c": 1}), {"__overwrite__": {"c": 1}}):
        after = start.updated([overwrite, {"d": 2}], 2, 2)
        assert after.value() == {"c": 1, "d": 2}
        assert len(after) == 3


def test_a_value_that_changes_its_kind_leaves_nothing_behind() -> None:
    state, kinds = State(), [1, [1, 2], {"a": 1}, {1, 2}, "x", {"b": {"c": []}}, [], [3], set(), {}]
    for number, value in enumerate([*kinds, *reversed(kinds)]):
        state = state.updated([{"k": value}], number, 1)
        assert state.value() == {"k": value}


def test_removals_are_remembered_up_to_a_bound() -> None:
    state = State().updated([{"l": list(range(REMOVED_MAX + 500)), "k": 1}], 1, 1)
    state = state.updated([{"k": DELETE}], 2, 1)
    state = state.updated([{"l": [1]}], 3, 1)

    assert state.value() == {"l": [1]}
    assert len(state) == REMOVED_MAX + 2


# The laws

PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.just(datetime(2026, 1, 1, tzinfo=UTC)),
)
KEYS = st.sampled_from(["a", "b", "c", 1, ("t", 1)])
VALUES = st.recursive(
    PLAIN | st.sets(st.integers(0, 3)) | st.lists(PLAIN, max_size=4),
    lambda inner: st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, max_size=3),
    max_leaves=6,
)
UPDATES = st.dictionaries(st.sampled_from(["a", "b", "c"]), VALUES | st.just(DELETE), max_size=3)
# Which state to go on from, an update, and the time.
STEPS = st.lists(st.tuples(st.integers(0, 9), UPDATES, st.integers(0, 5)), max_size=9)


def grown(steps: list[tuple[int, Any, int]]) -> list[State]:
    """States that forked from each other, and merged now and then."""
    known = [State()]
    for number, (at, update, now) in enumerate(steps):
        base = known[at % len(known)]
        if number % 3 == 2:
            base = base.merged(known[-1])
        known.append(base.updated([update], now, number + 1))
    return known


@given(STEPS, st.data())
def test_merging_is_commutative_associative_and_idempotent(steps: Any, data: Any) -> None:
    known = grown(steps)
    a, b, c = (data.draw(st.sampled_from(known)) for _ in range(3))

    assert a.merged(b).encode() == b.merged(a).encode()
    assert a.merged(b).merged(c) == a.merged(b.merged(c))
    assert a.merged(a) == a
    assert a.merged(State()) == a
    assert a.merged(b).merged(b) == a.merged(b)
    assert a.merged(b).value() == b.merged(a).value()
    assert State.decode(a.encode()) == a


def applied(value: Any, update: Any) -> Any:
    """What one update makes of a value, as plain Python."""
    if update == DELETE:
        return None
    if not isinstance(update, dict) or not isinstance(value, dict):
        value = {}
    if not isinstance(update, dict):
        return update
    found = dict(value)
    for key, part in update.items():
        if part == DELETE:
            found.pop(key, None)
        else:
            found[key] = applied(found.get(key), part)
    return found


@given(st.lists(st.tuples(UPDATES, st.integers(0, 3)), max_size=8))
def test_one_after_the_other_it_is_a_dict_that_is_updated(steps: Any) -> None:
    state, model = State(), {}
    for number, (update, now) in enumerate(steps):
        state = State.decode(state.updated([update], now, number % 3).encode())
        model = applied(model, update)
        assert state.value() == model


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=6))
def test_a_list_reads_as_it_was_written_and_what_others_append_survives(lists: Any) -> None:
    state = State()
    for number, wanted in enumerate(lists):
        before = state.value().get("l", [])
        other = state.updated([{"l": [*before, "theirs"]}], number, 99 + number)
        mine = state.updated([{"l": wanted}], number, 1)
        assert mine.value() == {"l": wanted}
        both = mine.merged(other).value()["l"]
        assert both.count("theirs") == 1 + wanted.count("theirs")
        assert [each for each in both if each != "theirs"] == wanted
        state = mine


# At the door


@pytest.mark.parametrize(
    ("update", "error"),
    [
        (["no dict"], UsageError),
        ({"a": object()}, UnsupportedValue),
        ({"a": [object()]}, UnsupportedValue),
        ({float("nan"): 1}, UnsupportedValue),
        ({"a": {"__increment__": "x"}}, UsageError),
        ({"s": {"__increment__": 1}}, UsageError),
        ({"a": 2**20 * "x"}, UnsupportedValue),
    ],
)
def test_an_update_that_cannot_be_is_refused_and_changes_nothing(update: Any, error: Any) -> None:
    channel = CrdtChannel()
    channel.update([{"s": "text"}])
    before = channel.checkpoint()

    with pytest.raises(error):
        channel.update([update])
    assert channel.checkpoint() == before


def test_dicts_nest_to_a_bound() -> None:
    deep: Any = {}
    for _ in range(40):
        deep = {"a": deep}
    with pytest.raises(UnsupportedValue, match="nests deeper"):
        CrdtChannel().update([deep])


@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 255))
def test_bytes_of_strangers_are_a_state_or_refused(data: bytes, at: int, byte: int) -> None:
    good = bytearray(
        State().updated([{"a": [1, {"b": 2}], "s": {1}, "n": increment()}], 1, 1).encode()
    )
    good[at % len(good)] = byte
    for each in (MAGIC + data, bytes(good), bytes(good[: at % len(good)])):
        try:
            State.decode(each).value()
        except InvalidUpdate:
            pass


def test_a_channel_goes_on_from_what_it_was_before_it_was_one() -> None:
    one, two = (CrdtChannel().from_checkpoint({"a": [1]}) for _ in range(2))
    one.update([{"a": [1, 2]}])

    assert two.get() == {"a": [1]}
    assert merge_states([one.checkpoint(), two.checkpoint()]) == one.checkpoint()
    with pytest.raises(UsageError, match="not from list"):
        CrdtChannel().from_checkpoint([1])
    with pytest.raises(EmptyChannelError):
        CrdtChannel().get()
    assert not CrdtChannel().is_available()


# In graphs


class Shared(TypedDict, total=False):
    """A plan that all nodes write."""

    plan: Annotated[dict[str, Any], CrdtChannel()]


def test_parallel_nodes_that_write_one_key_merge_instead_of_raising() -> None:
    def node(name: str) -> Any:
        def work(state: Shared) -> Any:
            log = [*state["plan"]["log"], name]
            return {"plan": {**state["plan"], "log": log, name: "done", "count": increment()}}

        return work

    builder = StateGraph(Shared)
    names = [f"node-{number}" for number in range(10)]
    for name in names:
        builder.add_node(name, node(name))
        builder.add_edge(START, name)
        builder.add_edge(name, END)
    graph = builder.compile(checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "t"}}

    first = graph.invoke({"plan": {"log": [], "goal": "ship it"}}, config)["plan"]
    second = graph.invoke({"plan": {}}, config)["plan"]

    assert first == {"goal": "ship it", "count": 10, "log": names, **dict.fromkeys(names, "done")}
    assert second == {**first, "count": 20, "log": names + names}


def test_a_large_channel_says_what_to_do() -> None:
    channel = CrdtChannel()
    for number in range(17):
        channel.update([{str(number): b"x" * (2**20 - 100)}])
    with pytest.raises(CRDTStateError, match="replace all with Overwrite"):
        channel.checkpoint()
