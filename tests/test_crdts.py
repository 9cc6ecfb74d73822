"""The views: their laws, checked on histories that hypothesis makes up, and their behaviour."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from harness import Agent, contents, exchange
from hypothesis import given, settings
from hypothesis import strategies as st

from crdtstate import crdts as crdts_module
from crdtstate import document as document_module
from crdtstate.conflict import strategy
from crdtstate.errors import CRDTStateError, UnknownStrategy, UnsupportedValue, UsageError
from crdtstate.slots import NO_COVERS

Action = tuple[str, str, int]
"""What an agent does: (verb, key, number)."""

actions = st.tuples(
    st.sampled_from(["write", "remove", "write", "hear", "seal"]),
    st.sampled_from(["a", "b"]),
    st.integers(0, 3),
)
histories = st.lists(st.tuples(st.integers(0, 2), actions), max_size=14)


def act_on_map(agent: Agent, action: Action) -> None:
    verb, key, number = action
    plan = agent.map("view", strategy=None)
    if verb == "write":
        plan[key] = number
    elif verb == "remove":
        plan.pop(key, None)


def act_on_register(agent: Agent, action: Action) -> None:
    verb, _, number = action
    register = agent.register("view")
    if verb == "write":
        register.value = number
    elif verb == "remove":
        register.clear()


def act_on_counter(agent: Agent, action: Action) -> None:
    verb, _, number = action
    if verb == "write":
        agent.counter("view").increment(number)
    elif verb == "remove":
        agent.counter("view").decrement(number)


def act_on_set(agent: Agent, action: Action) -> None:
    verb, key, _ = action
    elements = agent.set("view")
    if verb == "write":
        elements.add(key)
    elif verb == "remove":
        elements.discard(key)


VIEWS: dict[str, Callable[[Agent, Action], None]] = {
    "map": act_on_map,
    "register": act_on_register,
    "counter": act_on_counter,
    "set": act_on_set,
}


def read(agent: Agent, view: str) -> Any:
    match view:
        case "map":
            plan = agent.map("view")
            return dict(plan), len(plan), sorted(plan.conflicts())
        case "register":
            return agent.register("view").value
        case "counter":
            return agent.counter("view").value
        case "set":
            return set(agent.set("view")), len(agent.set("view"))


def play(view: str, history: list[tuple[int, Action]]) -> list[Agent]:
    """Three agents that act, and sometimes hear of one another."""
    agents = [Agent(writer) for writer in (1, 2, 3)]
    for who, action in history:
        if action[0] == "hear":
            exchange(agents[who], agents[action[2] % 3])
        elif action[0] == "seal":
            agents[who].sealed()
        else:
            VIEWS[view](agents[who], action)
    return agents


def deliver_in_any_order(agent: Agent, agents: list[Agent], rng: random.Random) -> None:
    """Give *agent* all changes, some twice, in an order of its own that keeps causality."""
    waiting = [change for other in agents for change in other.outbox] * 2
    while waiting:
        rng.shuffle(waiting)
        for change in list(waiting):
            document = agent.find_or_make(change.document, change.shared)
            if document.version.covers(change.dot) or document.is_ready(change):
                agent.receive(change)
                waiting.remove(change)


@pytest.mark.parametrize("view", VIEWS)
@settings(max_examples=60, deadline=None)
@given(history=histories, seed=st.integers(0, 2**16))
def test_merging_does_not_depend_on_order_or_repetition(
    view: str, history: list[tuple[int, Action]], seed: int
) -> None:
    rng = random.Random(seed)
    agents = play(view, history)
    for agent in agents:
        agent.sealed()
    late = Agent(9)
    for agent in [*agents, late]:
        deliver_in_any_order(agent, agents, rng)

    for agent in agents:
        assert read(agent, view) == read(late, view)
        assert contents(agent) == contents(late)


@pytest.mark.parametrize("view", VIEWS)
@settings(max_examples=40, deadline=None)
@given(history=histories)
def test_joining_snapshots_gives_what_the_changes_give(
    view: str, history: list[tuple[int, Action]]
) -> None:
    agents = play(view, history)
    forward, backward, twice = Agent(7), Agent(8), Agent(9)
    for agent in agents:
        forward.load(agent)
    for agent in reversed(agents):
        backward.load(agent)
    for agent in [*agents, *agents]:
        twice.load(agent)
    exchange(*agents)

    for joined in (forward, backward, twice):
        assert read(joined, view) == read(agents[0], view)
        assert contents(joined) == contents(agents[0])


def _lost_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_module, "covering", lambda cell, writer: NO_COVERS)


def _totals_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crdts_module, "totals", lambda slot: (0, 0))


def _remove_always_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def has(self: crdts_module.Set, key: str) -> bool:
        cell = self._cells.get(key, {})
        return bool(cell) and all(slot.value is not None for slot in cell.values())

    monkeypatch.setattr(crdts_module.Set, "_has", has)


@pytest.mark.parametrize("mutate", [_lost_covers, _totals_lost, _remove_always_wins])
def test_the_story_below_catches(
    monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mutate(monkeypatch)

    with pytest.raises((AssertionError, CRDTStateError)):
        test_two_agents_see_the_same_story()


def test_two_agents_see_the_same_story() -> None:
    one, two = Agent(1), Agent(2)
    one.map("plan")["goal"] = "ship"
    one.counter("tokens").increment(120)
    one.set("skills").add("python")
    exchange(one, two)
    two.map("plan")["goal"] = "ship it well"
    two.counter("tokens").increment(5)
    two.counter("tokens").decrement(2)
    two.set("skills").discard("python")
    one.set("skills").add("python")
    exchange(one, two)

    for agent in (one, two):
        assert dict(agent.map("plan")) == {"goal": "ship it well"}
        assert agent.map("plan").conflicts() == {}
        assert agent.counter("tokens").value == 123
        assert set(agent.set("skills")) == {"python"} and "python" in agent.set("skills")


# Map


def test_a_map_is_a_dict() -> None:
    plan = Agent(1).map("plan")
    plan.update({"a": 1}, b=[2, {"c": None}])
    plan.setdefault("d", b"x")

    assert dict(plan) == {"a": 1, "b": [2, {"c": None}], "d": b"x"}
    assert len(plan) == 3 and "a" in plan and list(plan) == ["a", "b", "d"]
    assert plan.pop("a") == 1 and plan.get("a") is None
    with pytest.raises(KeyError):
        del plan["a"]
    with pytest.raises(KeyError):
        plan["a"]
    assert plan == {"b": [2, {"c": None}], "d": b"x"}
    plan.clear()
    assert len(plan) == 0 and not plan


@pytest.mark.parametrize(
    "value",
    [
        0,
        2**70,
        -(2**70),
        1.0,
        float("inf"),
        True,
        None,
        "",
        "ä€😀",
        b"\0\xff",
        [],
        {},
        [1, [2, [3]]],
        {"a": {1: b"x", None: False}},
        datetime(2026, 11, 23, 8, 0, tzinfo=UTC),
        datetime(2026, 11, 23, 8, 0, tzinfo=timezone(timedelta(hours=5, minutes=30))),
    ],
)
def test_a_value_arrives_with_its_type(value: Any) -> None:
    one, two = Agent(1), Agent(2)
    one.map("plan")["k"] = value
    exchange(one, two)

    arrived = two.map("plan")["k"]

    assert arrived == value and type(arrived) is type(value)
    assert repr(arrived) == repr(value)


def test_what_was_read_can_be_altered_without_altering_the_map() -> None:
    plan = Agent(1).map("plan")
    plan["list"] = [1]

    plan["list"].append(2)

    assert plan["list"] == [1]


@pytest.mark.parametrize(
    ("write", "where"),
    [
        (
            lambda a: a.map("plan").update(ok=1, goal={"x": [1, {2, 3}]}),
            r"plan\['goal'\]\['x'\]\[1\]",
        ),
        (lambda a: a.map("plan").__setitem__("goal", object()), r"plan\['goal'\]"),
        (lambda a: a.map("plan").__setitem__("goal", "\ud800"), r"plan\['goal'\]"),
        (
            lambda a: a.map("plan").__setitem__("goal", datetime(2026, 1, 1)),
            r"plan\['goal'\].*zone",
        ),
        (lambda a: a.map("plan").__setitem__("goal", "x" * 2**21), r"plan\['goal'\]"),
        (lambda a: a.map("plan").__setitem__(7, 1), r"plan\[7\].*str"),
        (lambda a: a.map("plan").__setitem__("k" * 900, 1), r"plan\['kkk"),
        (lambda a: a.map("plan").__setitem__("\ud800", 1), "Unicode"),
        (lambda a: a.map(""), "name"),
        (lambda a: a.map("a\0b"), "name"),
        (lambda a: a.document("x" * 300), "name"),
        (lambda a: a.set("skills").add([1]), "skills"),
        (lambda a: a.counter("tokens").increment(0.5), "tokens.*int"),
        (lambda a: a.counter("tokens").increment(True), "tokens.*int"),
        (lambda a: a.register("leader").__setattr__("value", {1}), "leader"),
    ],
)
def test_what_cannot_be_shared_is_refused_and_changes_nothing(
    write: Callable[[Agent], object], where: str
) -> None:
    agent = Agent(1)

    with pytest.raises(UnsupportedValue, match=where):
        write(agent)

    assert agent.sealed() == []


# Counter, register, set


def test_a_counter_counts_in_both_directions_without_bound() -> None:
    tokens = Agent(1).counter("tokens")
    tokens.increment(2**70)
    tokens.decrement()
    tokens.increment(-4)
    tokens.increment(0)

    assert tokens.value == int(tokens) == 2**70 - 5
    assert list(range(10))[tokens:tokens] == []


def test_a_register_is_none_until_it_is_set() -> None:
    leader = Agent(1).register("leader")

    assert leader.value is None and not leader.is_set
    leader.value = None
    assert leader.is_set
    leader.clear()
    leader.clear()
    assert not leader.is_set


def test_a_set_is_a_set() -> None:
    skills = Agent(1).set("skills")
    skills.update(["python", 3, ("a", 1)])
    skills |= {b"x"}

    assert set(skills) == {"python", 3, ("a", 1), b"x"} and len(skills) == 4
    assert ("a", 1) in skills and [1] not in skills
    assert skills & {"python", "rust"} == {"python"}
    skills.remove(3)
    with pytest.raises(KeyError):
        skills.remove(3)
    skills -= {"python"}
    assert skills == {("a", 1), b"x"}


def test_views_of_different_kinds_do_not_meet_under_one_name() -> None:
    agent = Agent(1)
    agent.map("x")["k"] = 1
    agent.counter("x").increment()
    agent.set("x").add("k")
    agent.register("x").value = "r"

    assert dict(agent.map("x")) == {"k": 1}
    assert (agent.counter("x").value, set(agent.set("x")), agent.register("x").value) == (
        1,
        {"k"},
        "r",
    )


def test_reprs_are_status_lines() -> None:
    agent = Agent(1)
    agent.map("plan")["goal"] = 1
    agent.counter("tokens").increment(7)
    agent.set("skills").add("x")
    agent.register("leader").value = "a"

    assert [repr(agent.map("plan")), repr(agent.counter("tokens"))] == [
        "<Map plan in main: 1 keys>",
        "<Counter tokens in main: 7>",
    ]
    assert repr(agent.set("skills")) == "<Set skills in main: 1 elements>"
    assert repr(agent.register("leader")) == "<Register leader in main: 'a'>"


# Conflicts


def conflicting(strategy: str | None = None) -> tuple[Agent, Agent]:
    one, two = Agent(1, "ann"), Agent(2, "bob")
    one.map("plan", strategy=strategy)
    exchange(one, two)
    one.map("plan")["goal"] = [1, 2]
    two.map("plan")["goal"] = [2, 3]
    exchange(one, two)
    return one, two


def test_concurrent_writes_stay_visible_and_the_later_wins() -> None:
    for agent in conflicting():
        plan = agent.map("plan")
        assert plan["goal"] == [2, 3]
        assert [(c.value, c.agent) for c in plan.conflicts()["goal"]] == [
            ([1, 2], "ann"),
            ([2, 3], "bob"),
        ]
        told = plan.explain("goal")
        assert told.winner is not None and told.winner.agent == "bob" and told.rule == "lww"
        assert [c.agent for c in told.lost] == ["ann"]


def test_a_resolution_covers_all_candidates_everywhere() -> None:
    one, two = conflicting()

    one.map("plan").resolve("goal", [1])
    exchange(one, two)

    for agent in (one, two):
        assert agent.map("plan")["goal"] == [1]
        assert agent.map("plan").conflicts() == {} and agent.conflicts() == []


def test_conflicts_are_counted_without_reading_them() -> None:
    one, two = Agent(1), Agent(2)
    one.document("notes", shared=True)
    for agent in (one, two):
        plan = agent.map("plan")
        plan.update({"same": "x", "gone": agent.agent, "a": agent.agent, "b": agent.agent})
        agent.map("other")["a"] = agent.agent
        agent.register("leader").value = agent.agent
        agent.document("tasks").map("plan")["a"] = agent.agent
        agent.set("tags").add("red")
        agent.counter("tokens").increment()
    for agent, wanted in ((one, 0), (two, 0)):
        assert agent.count_conflicts() == len(agent.conflicts()) == wanted
    exchange(one, two)
    for agent in (one, two):
        assert agent.count_conflicts() == len(agent.conflicts()) == 6
    del one.map("plan")["gone"]
    two.map("plan").resolve("b", "c")
    exchange(one, two)

    for agent in (one, two):
        assert agent.count_conflicts() == len(agent.conflicts()) == 4
        assert agent.document("tasks").count_conflicts() == 1


def test_the_same_value_from_two_agents_is_no_conflict() -> None:
    one, two = Agent(1), Agent(2)
    one.map("plan")["goal"] = "x"
    two.map("plan")["goal"] = "x"
    exchange(one, two)

    assert one.map("plan").conflicts() == {} and one.conflicts() == []


def test_a_strategy_is_replicated_by_name_and_rewrites_nothing() -> None:
    one, two = conflicting("merge")

    assert two.map("plan").strategy == "merge"
    assert one.map("plan")["goal"] == two.map("plan")["goal"] == [1, 2, 3]
    two.map("plan", strategy="max")
    exchange(one, two)
    assert one.map("plan")["goal"] == [2, 3]
    assert len(one.map("plan").conflicts()["goal"]) == 2


def test_asking_again_for_the_strategy_in_force_writes_nothing() -> None:
    agent = Agent(1)
    agent.map("plan", strategy="merge")
    agent.sealed()

    agent.map("plan", strategy="merge")

    assert agent.sealed() == []


def test_a_strategy_that_is_not_registered_is_named_when_it_is_needed() -> None:
    one, two = conflicting()
    with pytest.raises(UnknownStrategy, match="nobody"):
        one.map("plan", strategy="nobody")
    one.document("main").put(crdts_module.STRATEGIES, "mplan", crdts_module.pack("nobody", ""))
    exchange(one, two)

    with pytest.raises(UnknownStrategy, match="nobody"):
        two.map("plan")["goal"]
    two.map("plan")["other"] = 1
    assert two.map("plan")["other"] == 1


def test_a_register_conflicts_explains_and_resolves() -> None:
    one, two = Agent(1, "ann"), Agent(2, "bob")
    one.register("leader", strategy="min").value = "a"
    two.register("leader", strategy="min").value = "b"
    exchange(one, two)

    for agent in (one, two):
        assert agent.register("leader").value == "a"
        assert [c.value for c in agent.register("leader").conflicts()] == ["a", "b"]
        assert agent.register("leader").explain().rule == "min"
        assert [(c.kind, c.name) for c in agent.conflicts()] == [("register", "leader")]
    one.register("leader").resolve("c")
    exchange(one, two)
    assert two.register("leader").value == "c" and two.conflicts() == []


def test_native_types_and_views_live_in_different_documents() -> None:
    agent = Agent(1)
    notes = agent.document("notes", shared=True)

    for use in (notes.map, notes.counter, notes.register, notes.set):
        with pytest.raises(UsageError, match="shared=True"):
            use("x")
    for use in (agent.document("main").text, agent.document("main").array):
        with pytest.raises(UsageError, match="shared=True"):
            use("x")
    with pytest.raises(UsageError, match="not shared"):
        agent.document("main", shared=True)


# Strategies by prefix


prefixes = st.sampled_from(["", "s", "score/", "score/team/"])
names = st.sampled_from(["lww", "max", "min", None])
settings_made = st.lists(st.tuples(st.integers(0, 2), prefixes, names), max_size=8)


@settings(max_examples=60, deadline=None)
@given(made=settings_made, seed=st.integers(0, 2**16))
def test_strategies_by_prefix_are_read_the_same_everywhere(
    made: list[tuple[int, str, str | None]], seed: int
) -> None:
    rng = random.Random(seed)
    agents = [Agent(writer) for writer in (1, 2, 3)]
    for number, agent in enumerate(agents):
        for key in ("goal", "score/a", "score/team/b"):
            agent.map("view")[key] = rng.choice([0, 5, 9]) + number
    for who, prefix, name in made:
        agents[who].map("view").use_strategy(name, prefix=prefix)
        if rng.random() < 0.3:
            exchange(agents[who], rng.choice(agents))
    for agent in agents:
        agent.sealed()
    late = Agent(9)
    for agent in [*agents, late]:
        deliver_in_any_order(agent, agents, rng)
    joined = Agent(10)
    joined.load(late)

    for agent in (*agents, joined):
        assert dict(agent.map("view")) == dict(late.map("view"))
        assert agent.map("view").strategies() == late.map("view").strategies()
        assert [c.strategy for c in agent.conflicts()] == [c.strategy for c in late.conflicts()]


def test_the_longest_prefix_decides_and_nothing_is_rewritten() -> None:
    one, two = Agent(1), Agent(2)
    for agent, number in ((one, 9), (two, 1)):
        for key in ("goal", "score/a", "score/team/b", "score"):
            agent.map("plan")[key] = number
    exchange(one, two)
    plan = one.map("plan")
    assert dict(plan) == {"goal": 1, "score/a": 1, "score/team/b": 1, "score": 1}
    before = {key: plan.live(key) for key in plan}

    plan.use_strategy("max", prefix="score/")
    plan.use_strategy("lww", prefix="score/team/")
    exchange(one, two)
    for agent in (one, two):
        assert dict(agent.map("plan")) == {"goal": 1, "score/a": 9, "score/team/b": 1, "score": 1}
    plan.use_strategy("max")
    assert plan.strategies() == {"": "max", "score/": "max", "score/team/": "lww"}
    assert plan.strategy_of("score/team/b") == "lww" and plan.strategy_of("goal") == "max"
    plan.use_strategy(None, prefix="score/team/")
    plan.use_strategy(None)
    exchange(one, two)
    for agent in (one, two):
        assert dict(agent.map("plan")) == {"goal": 1, "score/a": 9, "score/team/b": 9, "score": 1}
        assert agent.map("plan").strategy == "lww"
        assert agent.map("plan").strategies() == {"score/": "max"}
        assert {key: agent.map("plan").live(key) for key in before} == before
    assert one.map("planet").strategies() == {}
    assert plan.explain("score/a").rule == "max"


def test_a_prefix_that_cannot_be_is_refused() -> None:
    one = Agent(1)
    with pytest.raises(UnknownStrategy):
        one.map("plan").use_strategy("nobody", prefix="a")
    with pytest.raises(UnsupportedValue, match="keys are str"):
        one.map("plan").use_strategy("max", prefix=7)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedValue, match="too long for a prefix"):
        one.map("ä" * 200).use_strategy("max", prefix="ä" * 350)
    assert one.sealed() == []


def test_the_longest_place_for_a_strategy_is_taken_in_by_others() -> None:
    one, two = Agent(1), Agent(2)
    one.map("p" * 200).use_strategy("max", prefix="x" * 780)
    exchange(one, two)

    assert two.map("p" * 200).strategy_of("x" * 790) == "max"


def test_registers_change_their_strategy_too() -> None:
    one, two = Agent(1), Agent(2)
    one.register("best").value, two.register("best").value = 9, 1
    exchange(one, two)
    assert two.register("best").value == 1
    two.register("best").use_strategy("max")
    exchange(one, two)
    assert one.register("best").value == 9
    one.register("best").use_strategy(None)
    exchange(one, two)
    assert two.register("best").value == 1


# The inbox


def test_the_inbox_says_what_is_read_and_why() -> None:
    one, two = Agent(1), Agent(2)
    one.map("plan", strategy="max")
    for agent, number in ((one, 9), (two, 1)):
        agent.map("plan")["goal"] = number
        agent.document("other").register("leader").value = number
    exchange(one, two)

    goal, leader = two.conflicts()
    assert (goal.path, goal.value, goal.rule, goal.strategy) == ("plan['goal']", 9, "max", "max")
    assert (leader.document, leader.path, leader.value, leader.rule) == (
        "other",
        "leader",
        1,
        "lww",
    )
    assert goal.dots == {c.dot for c in goal.candidates} == {(1, 1), (2, 1)}
    assert two.count_conflicts() == 2


def test_the_inbox_does_not_fail_where_a_strategy_does() -> None:
    @strategy("fails-of-test")
    def fails(candidates: Any) -> Any:
        raise ZeroDivisionError

    one, two = Agent(1), Agent(2)
    one.map("plan", strategy="fails-of-test")
    for agent in (one, two):
        agent.map("plan")["goal"] = agent.agent
    exchange(one, two)

    (found,) = two.conflicts()
    assert (found.rule, found.strategy, found.value) == ("unknown", "fails-of-test", None)
    with pytest.raises(ZeroDivisionError):
        two.map("plan")["goal"]


# Resolutions


def watched(agent: Agent) -> list[Any]:
    """What an agent's documents tell of resolutions from now on."""
    found: list[Any] = []
    honest = agent._delivered

    def delivered(delivery: Any) -> None:
        found.extend(
            (r.conflict.path, r.agent, r.value, r.rule, len(r.conflict.candidates))
            for r in delivery.resolutions
        )
        honest(delivery)

    for name in agent.documents():
        agent.document(name).on_delivered = delivered
    return found


def test_a_write_over_a_conflict_is_told_by_all_as_a_resolution() -> None:
    one, two, three = agents = [Agent(1), Agent(2), Agent(3)]
    for agent in agents:
        agent.map("plan")["goal"] = agent.agent
        agent.register("r").value = agent.agent
        agent.map("plan")["calm"] = 1
    exchange(*agents)
    told = [watched(agent) for agent in agents]

    two.map("plan")["goal"] = "first"
    two.map("plan")["goal"] = "then"
    two.map("plan")["calm"] = 2
    two.sealed()
    two.register("r").resolve("agent-1")
    exchange(*agents)
    one.map("plan")["goal"] = "nothing conflicted"
    exchange(*agents)

    expected = [
        ("plan['goal']", "agent-2", "then", "write", 3),
        ("r", "agent-2", "agent-1", "resolve", 3),
    ]
    assert [sorted(each) for each in told] == [expected] * 3


def test_what_is_undone_resolved_nothing() -> None:
    one, two = Agent(1), Agent(2)
    for agent in (one, two):
        agent.map("plan")["goal"] = agent.agent
    exchange(one, two)
    told = watched(one)
    with pytest.raises(ZeroDivisionError), one.transaction():
        one.map("plan")["goal"] = "never"
        raise ZeroDivisionError
    one.map("plan")["other"] = 1
    exchange(one, two)
    assert told == [] and len(two.conflicts()) == 1


def test_a_candidate_that_comes_while_a_write_is_open_is_met_when_written_over_again() -> None:
    one, two, three = Agent(1), Agent(2), Agent(3)
    for agent in (one, two, three):
        agent.map("plan")["goal"] = agent.agent
    exchange(one, two)
    told = watched(one)
    one.map("plan")["goal"] = "open"
    three.sealed()
    one.receive(three.outbox[0])
    assert len(one.map("plan").conflicts()["goal"]) == 2
    one.map("plan")["goal"] = "all"
    exchange(one, two, three)

    assert told == [("plan['goal']", "agent-1", "all", "write", 3)]
    assert three.map("plan")["goal"] == "all" and three.conflicts() == []
