"""History: each change once, in causal order, with what it wrote, however far the journal goes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from archived import Archived, act, histories, read_document
from harness import asynchronous, exchange
from hypothesis import given, settings

from crdtstate import Config, Cut, PastChange, PastForgotten, Replica, UsageError, blocking
from crdtstate.change import TIDY, decode_change
from crdtstate.clock import Dot, Version
from crdtstate.history import Names
from crdtstate.lookback import PORTION


def play(history: list[Any], agents: list[Archived]) -> None:
    for who, (verb, key, number, name) in history:
        if verb == "hear":
            exchange(agents[who], agents[number % 3])
        elif verb == "seal":
            agents[who].sealed()
        else:
            act(agents[who], verb, key, number, name)


def three() -> list[Archived]:
    return [Archived(writer) for writer in (1, 2, 3)]


def listed(agent: Archived, name: str = "main", **options: Any) -> list[PastChange]:
    return agent.history(name, tidying=True, **options)


async def listed_asynchronously(agent: Archived, name: str = "main") -> list[PastChange]:
    reader = agent.lookback.history(name, None, None, None, None, None, None, True)
    return [change async for change in reader]


# Laws


@settings(max_examples=100, deadline=None)
@given(history=histories)
def test_each_change_is_told_once_in_causal_order(history: list[Any]) -> None:
    agents = three()
    play(history, agents)
    exchange(*agents)
    made = {(c.document, c.dot): c for agent in agents for c in agent.outbox}

    for agent in agents:
        for name in list(agent.documents()):
            told = listed(agent, name)
            dots = [change.dot for change in told]
            assert sorted(dots) == sorted(dot for where, dot in made if where == name)
            seen = Version()
            for dot in dots:
                change = made[name, dot]
                assert all(seen.covers(dep) for dep in change.deps)
                assert seen.get(dot.writer, 0) == dot.seq - 1
                seen[dot.writer] = dot.seq
            assert asyncio.run(listed_asynchronously(agent, name)) == told


@settings(max_examples=100, deadline=None)
@given(history=histories)
def test_what_a_change_is_told_to_have_written_is_what_differs_after_it(
    history: list[Any],
) -> None:
    agents = three()
    play(history, agents)
    exchange(*agents)
    agent = agents[0]

    before = Version()
    for change in listed(agent) if agent.find("main") else []:
        after = before.copy()
        after.merge({change.dot.writer: change.dot.seq})
        found = agent.diff(Cut({"main": before}), Cut({"main": after}))
        # A write of the same value, or one that loses, is a write that makes no difference. A
        # strategy makes one where it was not written.
        if "strategies['mplan']" not in change.paths:
            assert {difference.path for difference in found} <= set(change.paths)
        if change.kind == "tidying":
            assert not change.paths and not found
        assert not change.is_partial
        before = after


@settings(max_examples=80, deadline=None)
@given(history=histories, later=histories)
def test_history_after_a_compaction_is_the_end_of_history_before_it(
    history: list[Any], later: list[Any]
) -> None:
    agents = three()
    play(history, agents)
    exchange(*agents)
    agent = agents[0]
    # It takes in the same in the same order, and forgets nothing.
    whole = Archived(9)
    rows = dict(agent.store._rows)
    for name in list(agent.documents()):
        size = agent.store.kept(name)
        agent.compact(name, keep_bytes=size // 2)
    play(later, agents)
    exchange(*agents)
    for _, row in sorted((rows | agent.store._rows).items()):
        whole.receive(decode_change(row.data))

    for name in whole.documents():
        told = {change.dot: change for change in listed(agent, name)}
        expected = {change.dot: change for change in listed(whole, name)}
        floor = agent.store.floor(name)
        assert told.keys() == {dot for dot in expected if not floor.covers(dot)}
        for dot, change in told.items():
            if not change.is_partial:
                # Without the lanes, what was only tidied away counts as written.
                assert set(expected[dot].paths) <= set(change.paths)
            assert change.size == expected[dot].size


@settings(max_examples=60, deadline=None)
@given(history=histories, later=histories)
def test_history_since_a_version_and_until_one_is_what_lies_between(
    history: list[Any], later: list[Any]
) -> None:
    agents = three()
    play(history, agents)
    exchange(*agents)
    since = agents[0].version()
    play(later, agents)
    exchange(*agents)
    agent = agents[0]
    until = agents[0].version()
    act(agent, "put", "a", 1)

    for name in since:
        told = listed(agent, name, since=since, until=until)
        whole = listed(agent, name)
        assert told == [
            change
            for change in whole
            if not since[name].covers(change.dot) and until[name].covers(change.dot)
        ]


# Examples


def test_a_change_says_who_made_it_why_and_what_it_wrote() -> None:
    agent = Archived(1, "ann")
    with agent.transaction(message="replan", run="run-42"):
        agent.map("plan")["goal"] = "ship"
        agent.counter("tokens").increment(3)
        agent.set("skills").add(("a", 1))
        agent.register("leader").value = "ann"
    agent.sealed()
    del agent.map("plan")["goal"]

    first, second = agent.history("main")

    assert (first.agent, first.run, first.message) == ("ann", "run-42", "replan")
    assert first.document == "main" and first.dot == Dot(1, 1) and first.kind == "write"
    assert set(first.paths) == {"plan['goal']", "tokens", "skills[('a', 1)]", "leader"}
    assert first.size == len(agent.outbox[0].data)
    assert first.stamp == agent.outbox[0].stamp and first.stamp.time.year >= 1970
    assert second.paths == ("plan['goal']",) and second.run == second.message == ""
    assert "ann [run-42] write" in str(first) and str(first).endswith(": replan")


def test_resolutions_are_told_as_such_and_tidying_only_on_demand() -> None:
    one, two = Archived(1, "ann"), Archived(2, "bob")
    one.map("plan")["x"] = 1
    two.map("plan")["x"] = 2
    exchange(one, two)
    one.map("plan").resolve("x", 3)
    exchange(one, two)
    two.seal_tidying(two.document("main"))
    exchange(one, two)
    assert two.outbox[-1].kind == TIDY

    assert [c.kind for c in one.history("main")] == ["write", "write", "resolution"]
    everything = one.history("main", tidying=True)
    assert [(c.kind, c.paths) for c in everything[2:]] == [
        ("resolution", ("plan['x']",)),
        ("tidying", ()),
    ]


def test_tidying_beside_a_write_is_not_taken_for_writing() -> None:
    one, two = Archived(1), Archived(2)
    one.map("plan")["x"] = 1
    exchange(one, two)
    two.map("plan")["x"] = 2
    exchange(one, two)
    one.map("plan")["y"] = 1
    exchange(one, two)

    # The last change also drops what the second has covered.
    assert 1 not in one.document("main").lanes.containers["mplan"].cells["x"]
    assert [c.paths for c in two.history("main")] == [
        ("plan['x']",),
        ("plan['x']",),
        ("plan['y']",),
    ]


def test_history_can_be_narrowed() -> None:
    one, two = Archived(1, "ann"), Archived(2, "bob")
    for number in range(3):
        with one.transaction(run=f"run-{number}"):
            one.map("plan")["a"] = number
        with two.transaction(run="other"):
            two.map("plan")["b"] = number
        exchange(one, two)

    def dots(**options: Any) -> list[tuple[int, int]]:
        return [tuple(c.dot) for c in one.history("main", **options)]

    assert dots(agent="ann") == [(1, 1), (1, 2), (1, 3)]
    assert dots(run="run-1") == [(1, 2)]
    assert dots(path="plan['b']") == [(2, 1), (2, 2), (2, 3)]
    assert len(dots(path="plan")) == 6 and dots(path="pla") == []
    assert len(dots(limit=4)) == 4 and dots(agent="bob", limit=1) == [(2, 1)]
    for wrong in ({"limit": 0}, {"limit": True}, {"agent": 7}, {"path": ["plan"]}):
        with pytest.raises(UsageError):
            dots(**wrong)
    with pytest.raises(UsageError, match="no document 'x'"):
        one.history("x")
    with pytest.raises(UsageError, match="not committed here"):
        dots(until=Cut({"main": {1: 9}}))
    with pytest.raises(UsageError, match="from a Checkpoint or a version"):
        dots(since=3)


def test_the_history_of_a_shared_document_names_its_roots() -> None:
    agent = Archived(1)
    notes = agent.document("notes", shared=True)
    notes.text("body").insert(0, "x")
    agent.sealed()
    notes.text("body").insert(1, "y")
    notes.native_map("map")["key"] = 1

    assert [set(c.paths) for c in agent.history("notes")] == [{"body"}, {"body", "map"}]


def test_long_histories_are_read_in_portions_and_reach_back_into_the_middle() -> None:
    agent = Archived(1)
    plan = agent.map("plan")
    middle = Cut()
    for number in range(1500):
        plan[f"key-{number % 7}"] = "x" * 300
        agent.sealed()
        if number == 999:
            middle = agent.version()
    assert agent.store.kept("main") > 2 * PORTION

    told = agent.history("main", since=middle)

    assert len(told) == 500
    assert [c.paths[0] for c in told[:3]] == [f"plan['key-{n % 7}']" for n in (1000, 1001, 1002)]


def test_places_whose_names_the_journal_forgot_are_said_to_be_missing() -> None:
    agent = Archived(1)
    plan = agent.map("plan")
    for number in range(20):
        plan["x"] = number
        plan["y"] = number
        agent.sealed()
    plan["z"] = 1
    agent.sealed()
    agent.compact("main", keep_bytes=sum(len(c.data) for c in agent.outbox[-5:]))

    told = agent.history("main")

    assert [c.dot.seq for c in told] == [17, 18, 19, 20, 21]
    # "x" and "y" were spelled out in the first change only; "z" in the last.
    assert [(c.paths, c.is_partial) for c in told] == [((), True)] * 4 + [(("plan['z']",), False)]
    plan["y"] = "again"
    (newest,) = agent.history("main", since=Cut({"main": {1: 21}}))
    assert (newest.paths, newest.is_partial) == (("plan['y']",), False)


def test_names_are_told_without_lanes_where_the_journal_spells_them_out() -> None:
    agent = Archived(1)
    plan = agent.map("plan")
    for number in range(3000):
        plan[f"key-{number % 5}"] = number
        if number % 11 == 0:
            plan.pop(f"key-{(number + 1) % 5}", None)
        agent.sealed()
    names = Names()

    told = [names.take(change) for change in agent.outbox]

    assert all(is_whole for _, is_whole in told)
    for (paths, _), change in zip(told, listed(agent), strict=True):
        assert sorted(path.partition("\0")[2] for path in paths) == sorted(
            path.removeprefix("plan['").removesuffix("']") for path in change.paths
        )


def test_what_the_journal_forgets_while_it_is_read_is_an_error_not_a_gap() -> None:
    agent = Archived(1)
    for _ in range(3000):
        agent.map("plan")["x"] = "x" * 300
        agent.sealed()
    reader = iter(agent.lookback.history("main", None, None, None, None, None, None, False))
    next(reader)
    agent.compact("main")

    with pytest.raises(PastForgotten):
        list(reader)
    with pytest.raises(PastForgotten):
        agent.history("main", since=Cut({"main": {1: 5}}))


# In a replica


@asynchronous
async def test_the_history_of_a_replica_with_and_without_waiting(tmp_path: Path) -> None:
    config = Config(snapshot_after_bytes=30_000, log_bytes=30_000)
    async with Replica("ann", store=tmp_path / "a.db", config=config) as ann:
        checkpoint = None
        for number in range(800):
            ann.map("plan")[f"key-{number % 3}"] = number
            await ann.durable()
            if number == 600:
                checkpoint = await ann.checkpoint()
        assert checkpoint is not None

        told = list(ann.history("main"))
        assert [change async for change in ann.history("main")][-10:] == told[-10:]
        assert told[-1].dot.seq == 800 and told[0].dot.seq > 1
        since = list(ann.history("main", since=checkpoint))
        assert [change.dot.seq for change in since] == list(range(602, 801))
        # A checkpoint knows what the journal has forgotten.
        replayed = [change async for change in ann.history("main", since=checkpoint)]
        assert [change.dot for change in replayed] == [change.dot for change in since]
        assert [change.paths for change in replayed[:2]] == [("plan['key-1']",), ("plan['key-2']",)]
        assert not any(change.is_partial for change in replayed) and since[0].is_partial
        reader = ann.history("main", since=checkpoint, limit=3)
        assert [c.dot.seq for c in reader] == [c.dot.seq async for c in reader] == [602, 603, 604]


def test_a_blocking_replica_looks_back_restores_and_reverts() -> None:
    with blocking.Replica("ann") as ann:
        plan = ann.map("plan")
        with ann.transaction(run="one", message="first"):
            plan["goal"] = "ship"
        before = ann.version()
        with ann.transaction(run="two"):
            plan["goal"] = "sail"
            plan["more"] = 1
        checkpoint = ann.checkpoint("now")

        assert [c.run for c in ann.history("main")] == ["one", "two"]
        assert ann.at(before).map("plan")["goal"] == "ship"
        assert [d.path for d in ann.diff(before)] == ["plan['goal']", "plan['more']"]
        reverted = ann.revert(run="two")
        assert [d.path for d in reverted.changed] == ["plan['goal']", "plan['more']"]
        assert dict(plan) == {"goal": "ship"}
        assert len(ann.restore(checkpoint)) == 2
        assert dict(plan) == {"goal": "sail", "more": 1}
        with pytest.raises(UsageError):
            ann.history("nothing")


def test_reading_a_document_gives_nothing_for_one_that_is_not_there() -> None:
    assert read_document(None) == {}
