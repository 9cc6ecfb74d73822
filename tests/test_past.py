"""The past: what is rebuilt at a cut is what a replica read that had taken in exactly that."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from archived import Archived, act, histories, read
from harness import Agent, asynchronous, exchange
from hypothesis import given, settings
from hypothesis import strategies as st

from crdtstate import ABSENT, Config, Cut, Difference, PastForgotten, Replica, UsageError
from crdtstate.change import Change, Snapshot
from crdtstate.clock import Version
from crdtstate.documents import DocumentSet
from crdtstate.errors import CorruptStore, InvalidUpdate
from crdtstate.past import Past, PastDocument
from crdtstate.stores import Entry
from crdtstate.votes import Electorate


def play(history: list[Any], agents: list[Archived]) -> list[tuple[int, Cut, dict[str, Any], Any]]:
    """Let agents act. Gives, after each step: who, its version, and what it reads then."""
    seen = []
    for who, (verb, key, number, name) in history:
        agent = agents[who]
        if verb == "hear":
            exchange(agent, agents[number % 3])
        elif verb == "seal":
            agent.sealed()
        else:
            act(agent, verb, key, number, name)
        agent.sealed()
        seen.append((who, agent.version(), read(agent), _conflicts(agent)))
    return seen


def _conflicts(documents: DocumentSet) -> list[Any]:
    return [(c.document, c.name, c.key, c.candidates, c.value) for c in documents.conflicts()]


def three() -> list[Archived]:
    return [Archived(writer) for writer in (1, 2, 3)]


# Laws


@settings(max_examples=150, deadline=None)
@given(history=histories)
def test_a_past_reads_as_the_replica_did_at_that_moment(history: list[Any]) -> None:
    agents = three()
    seen = play(history, agents)
    exchange(*agents)

    for who, cut, content, conflicts in seen:
        # Everybody has it in the journal now, each in an order of its own.
        for reader in (agents[who], agents[(who + 1) % 3]):
            with reader.at(cut) as past:
                assert read(past) == content
                assert _conflicts(past) == conflicts
                assert past.version() == cut


@settings(max_examples=60, deadline=None)
@given(history=histories, later=histories)
def test_a_past_is_the_same_from_whatever_it_is_rebuilt(
    history: list[Any], later: list[Any]
) -> None:
    agents = three()
    play(history, agents)
    agent = agents[0]
    checkpoint = agent.keep_checkpoint("one")
    for name in list(agent.documents()):
        agent.compact(name)
    seen = [each for each in play(later, agents) if each[0] == 0]

    for _, cut, content, conflicts in seen:
        with agent.at(cut) as past:
            assert (read(past), _conflicts(past)) == (content, conflicts)
    with agent.at("one") as past, agent.at(checkpoint.version) as again:
        assert read(past) == read(again)
        assert past.version() == checkpoint.version == again.version()


@settings(max_examples=100, deadline=None)
@given(history=histories, data=st.data())
def test_a_difference_applied_to_what_was_gives_what_is(history: list[Any], data: Any) -> None:
    agents = three()
    seen = [each for each in play(history, agents) if each[0] == 0]
    if not seen:
        return
    agent = agents[0]
    _, one, before, _ = data.draw(st.sampled_from(seen))
    _, other, after, _ = data.draw(st.sampled_from(seen))

    found = agent.diff(one, other)

    assert _applied(before, found) == after
    # Nothing is named that does not differ, and nothing twice.
    assert all(difference.before != difference.after for difference in found)
    assert len({(d.document, d.kind, d.name, d.key) for d in found}) == len(found)
    assert _applied(after, agent.diff(other, one)) == before


def _applied(content: dict[str, Any], differences: list[Difference]) -> dict[str, Any]:
    """What content reads as with *differences*, told by themselves."""
    result = {
        name: {
            view: value if isinstance(value, int) else value.copy() for view, value in views.items()
        }
        for name, views in content.items()
    }
    for each in differences:
        views = result.setdefault(each.document, {})
        match each.kind:
            case "map":
                _set(views.setdefault("plan", {}), each.key, each.before, each.after)
            case "set":
                elements = views.setdefault("skills", set())
                assert (each.key in elements) == (each.before is True)
                (elements.add if each.after is True else elements.discard)(each.key)
            case "counter":
                assert views.get(each.name, 0) == each.before
                views[each.name] = each.after
            case "register":
                _set(views, "leader", each.before, each.after)
            case "strategy":
                _set(views.setdefault("rule", {}), "", each.before, each.after)
    for name, views in result.items():
        if "plan" in views:
            views["plan"] = dict(sorted(views["plan"].items()))
        # A counter of 0, like anything empty, is as if it had never been; a register may be 0.
        result[name] = {v: c for v, c in views.items() if c or v == "leader"}
    return {name: views for name, views in result.items() if views}


def _set(place: dict[str, Any], key: str, before: Any, after: Any) -> None:
    assert place.get(key, ABSENT) == before
    if after is ABSENT:
        del place[key]
    else:
        place[key] = after


# Reading


def test_all_views_of_the_past_can_be_read() -> None:
    agent = Archived(1, "ann")
    agent.map("plan")["goal"] = None
    agent.set("skills").add((1, 2))
    agent.register("leader").value = "ann"
    agent.counter("tokens").decrement(2)
    cut = agent.version()
    agent.map("plan")["goal"] = "more"

    past = agent.at(cut)

    assert past.map("plan")["goal"] is None and "more" not in past.map("plan")
    assert list(past.set("skills")) == [(1, 2)]
    assert past.register("leader").value == "ann"
    assert past.counter("tokens").value == -2
    assert past.map("plan").explain("goal").winner.agent == "ann"  # type: ignore[union-attr]
    assert list(past.documents()) == ["main"]
    assert repr(past) == "<Past 1 documents>"


def test_what_did_not_exist_then_reads_as_empty() -> None:
    agent = Archived(1)
    agent.map("plan")["goal"] = 1
    cut = agent.version()
    agent.document("later").map("m")["x"] = 1
    agent.document("notes", shared=True).text("body").insert(0, "later")

    past = agent.at(cut)

    assert dict(past.document("later").map("m")) == {}
    assert past.document("later").counter("n").value == 0
    assert str(past.document("notes", shared=True).text("body")) == ""
    assert list(past.documents()) == ["main"]


def test_conflicts_that_were_open_then_are_open_in_the_past_and_their_strategy_holds() -> None:
    one, two = Archived(1), Archived(2)
    one.map("plan", strategy="max")["x"] = 5
    two.map("plan")["x"] = 3
    exchange(one, two)
    cut = one.version()
    one.map("plan", strategy="min").resolve("x", 9)

    past = one.at(cut)

    (conflict,) = past.conflicts()
    assert sorted(c.value for c in conflict.candidates) == [3, 5]
    assert past.map("plan")["x"] == 5 and past.map("plan").strategy == "max"
    assert past.count_conflicts() == 1 and not one.conflicts()


def test_what_a_strategy_changes_where_values_conflict_is_a_difference() -> None:
    one, two = Archived(1), Archived(2)
    one.map("plan", strategy="max")["x"] = 5
    two.map("plan")["x"] = 3
    exchange(one, two)
    cut = one.version()
    one.map("plan").use_strategy("min")

    found = {str(difference) for difference in one.diff(cut)}

    assert found == {
        "main: strategies['mplan']: 'max' -> 'min'",
        "main: plan['x']: 5 -> 3",
    }


def test_votes_decide_in_the_past_too_whatever_documents_are_asked_for() -> None:
    ann, bob = Archived(1, "ann"), Archived(2, "bob")
    ann.map("plan", strategy="vote")["x"] = "ann's"
    bob.map("plan")["x"] = "bob's"
    exchange(ann, bob)
    (conflict,) = ann.conflicts()
    (other,) = {"ann's", "bob's"} - {ann.map("plan")["x"]}
    before = ann.version()
    ann.polls.cast(conflict, other, Electorate(("ann",), 60_000))
    voted = ann.version()
    ann.map("plan")["x"] = "later"

    for documents in (None, ["main"]):
        assert ann.at(before, documents=documents).map("plan")["x"] != other
        assert ann.at(voted, documents=documents).map("plan")["x"] == other
    assert [d.after for d in ann.diff(before, voted, documents=["main"])] == [other]
    ann.restore(voted, documents=["main"])
    assert ann.map("plan")["x"] == other


def test_native_types_of_the_past_can_be_read_with_what_is_in_them() -> None:
    agent = Archived(1)
    notes = agent.document("notes", shared=True)
    notes.text("body").insert(0, "bold plain")
    notes.text("body").format(0, 4, {"b": True})
    notes.array("list").extend([1, {"a": [True]}])
    notes.native_map("map")["key"] = "value"
    cut = agent.version()
    notes.text("body").clear()
    del notes.array("list")[0]
    notes.native_map("map")["key"] = "other"

    past = agent.at(cut).document("notes", shared=True)

    assert str(past.text("body")) == past.text("body").to_py() == "bold plain"
    assert past.text("body").diff()[0] == ("bold", {"b": True})
    assert list(past.array("list")) == past.array("list").to_py() == [1, {"a": [True]}]
    assert past.array("list")[0] == 1 and past.array("list")[0:1] == [1]
    assert dict(past.native_map("map")) == past.native_map("map").to_py() == {"key": "value"}
    assert len(past.text("body")) == 10


def test_the_past_cannot_be_written() -> None:
    agent = Archived(1)
    agent.map("plan")["goal"] = 1
    agent.set("skills").add(1)
    agent.register("leader").value = 1
    notes = agent.document("notes", shared=True)
    notes.text("body").insert(0, "x")
    notes.array("list").append(1)
    notes.native_map("map")["key"] = 1
    past = agent.at(agent.version())
    then = past.document("notes", shared=True)

    writes = [
        lambda: past.map("plan").__setitem__("goal", 2),
        lambda: past.map("plan").__delitem__("goal"),
        lambda: past.map("plan").update(goal=2),
        lambda: past.map("plan").resolve("goal", 2),
        lambda: past.map("plan", strategy="max"),
        lambda: past.map("new").__setitem__("x", 1),
        lambda: past.document("new").map("x").__setitem__("x", 1),
        lambda: past.counter("n").increment(),
        lambda: past.set("skills").add(2),
        lambda: past.set("skills").discard(1),
        lambda: setattr(past.register("leader"), "value", 2),
        lambda: past.register("leader").clear(),
        lambda: past.transaction().__enter__(),
        lambda: then.text("body").insert(0, "y"),
        lambda: then.text("body").__iadd__("y"),
        lambda: then.array("list").append(2),
        lambda: then.array("list").__setitem__(0, 2),
        lambda: then.native_map("map").__setitem__("key", 2),
        lambda: then.native_map("map").pop("key"),
    ]
    for write in writes:
        with pytest.raises(UsageError, match="past can only be read"):
            write()

    assert past.map("plan")["goal"] == 1 and dict(past.map("new")) == {}
    assert str(then.text("body")) == "x" and list(then.array("list")) == [1]
    assert past.take_sealed() == []


def test_a_closed_past_says_so_and_its_memory_goes() -> None:
    agent = Archived(1)
    agent.map("plan")["goal"] = 1
    agent.document("notes", shared=True).text("body").insert(0, "x")
    cut = agent.version()

    with agent.at(cut) as past:
        gone = [weakref.ref(past.document(name).lanes) for name in past.documents()]
        natives = weakref.ref(past.document("notes").native)
    past.close()

    with pytest.raises(UsageError, match="was closed"):
        past.map("plan")
    gc.collect()
    assert [each() for each in gone] == [None, None] and natives() is None
    assert repr(past) == "<Past closed>"


def test_a_past_can_be_read_on_another_thread() -> None:
    agent = Archived(1)
    agent.document("notes", shared=True).text("body").insert(0, "x")
    agent.map("plan")["goal"] = 1
    past = agent.at(agent.version())
    read_there: list[Any] = []

    def look() -> None:
        read_there.append(past.map("plan")["goal"])
        read_there.append(str(past.document("notes", shared=True).text("body")))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()

    assert read_there == [1, "x"]


def test_only_the_documents_that_are_asked_for_are_rebuilt() -> None:
    agent = Archived(1)
    for name in ("one", "two"):
        agent.document(name).map("m")["x"] = 1
    cut = agent.version()

    assert list(agent.at(cut, documents=["two"]).documents()) == ["two"]


# What cannot be had


def test_a_version_that_the_journal_forgot_is_refused_with_the_oldest_there_is() -> None:
    agent = Archived(1)
    plan = agent.map("plan")
    cuts = []
    for number in range(10):
        plan["n"] = number
        cuts.append(agent.version())
    agent.compact("main")

    with pytest.raises(PastForgotten, match="'main'.*oldest.*10 changes.*checkpoint") as failure:
        agent.at(cuts[3])

    assert failure.value.oldest == cuts[9]["main"]
    assert agent.at(cuts[9]).map("plan")["n"] == 9
    plan["n"] = 10
    assert agent.at(agent.version()).map("plan")["n"] == 10
    assert agent.at(cuts[9]).map("plan")["n"] == 9


def test_a_checkpoint_keeps_what_the_journal_forgets_and_is_read_only_then() -> None:
    agent = Archived(1)
    plan = agent.map("plan")
    for number in range(5):
        plan["n"] = number
        agent.sealed()
    checkpoint = agent.keep_checkpoint("one")
    floor = sum(len(change.data) for change in agent.outbox[3:])
    for number in range(5, 10):
        plan["n"] = number
        agent.sealed()
    kept = sum(len(change.data) for change in agent.outbox[3:])
    late = agent.version()

    # The journal still has what came after the checkpoint.
    assert agent.at(checkpoint.version).map("plan")["n"] == 4 and agent.shelf.read == []
    agent.compact("main", keep_bytes=kept)
    assert agent.store.floor("main") == {1: 3} and floor < kept
    assert agent.at(checkpoint.version).map("plan")["n"] == 4
    assert agent.shelf.read == ["one"]
    middle = Cut({"main": {1: 7}})
    assert agent.at(middle).map("plan")["n"] == 6
    assert agent.at(late).map("plan")["n"] == 9

    with pytest.raises(PastForgotten) as failure:
        agent.at(Cut({"main": {1: 4}}))
    assert failure.value.oldest == checkpoint.version["main"]


def test_a_version_that_is_not_here_yet_or_never_was_is_refused() -> None:
    one, two = Archived(1), Archived(2)
    one.map("plan")["x"] = 1
    two.map("plan")["y"] = 1
    exchange(one, two)
    one.map("plan")["x"] = 2
    one.sealed()
    exchange(one, two)
    two.map("plan")["y"] = 2

    with pytest.raises(UsageError, match="not here.*wait_for"):
        one.at(two.version())
    exchange(one, two)
    with pytest.raises(UsageError, match="no version that a replica can have had"):
        # The second of two builds on the second of one.
        one.at(Cut({"main": {1: 1, 2: 2}}))
    with pytest.raises(UsageError, match="a point in the past"):
        one.at(7)
    with pytest.raises(UsageError, match="documents are names"):
        one.at(one.version(), documents="main")


def test_damage_in_the_journal_is_named() -> None:
    agent = Archived(1)
    agent.map("plan")["x"] = 1
    cut = agent.version()
    (row,) = agent.store._rows.values()
    flipped = row.data[:-1] + bytes([row.data[-1] ^ 1])
    agent.store._rows[1] = Entry(row.document, row.writer, row.seq, flipped)
    agent.map("plan")["x"] = 2
    agent.sealed()

    with pytest.raises(CorruptStore, match="document 'main': a change"):
        agent.at(cut)


def test_a_past_that_does_not_come_out_at_its_version_is_refused() -> None:
    agent = Agent(1)
    agent.map("plan")["x"] = 1
    (change,) = agent.sealed()
    snapshot = agent.document("main").snapshot()
    agent.map("plan")["x"] = 2
    (second,) = agent.sealed()

    def fill(version: dict[int, int], *given: Change, base: Snapshot | None = None) -> Past:
        past = Past()
        past.fill("main", False, Version(version), base, [each.data for each in given])
        return past

    assert fill({1: 2}, change, second).map("plan")["x"] == 2
    assert fill({1: 2}, second, base=snapshot).map("plan")["x"] == 2
    for version, changes in [({1: 2}, [change]), ({1: 1}, [change, second])]:
        with pytest.raises(InvalidUpdate, match="came out at"):
            fill(version, *changes)
    with pytest.raises(InvalidUpdate, match="before what it builds on"):
        fill({1: 2}, second, change)


def test_a_past_that_was_completed_takes_no_more_changes() -> None:
    agent = Agent(1)
    agent.map("plan")["x"] = 1
    (first,) = agent.sealed()
    agent.map("plan")["x"] = 2
    (second,) = agent.sealed()
    past = Past()
    past.fill("main", False, Version({1: 1}), None, [first.data])
    document = past.find("main")
    assert isinstance(document, PastDocument)

    with pytest.raises(InvalidUpdate):
        document.take(second)

    assert past.map("plan")["x"] == 1


@pytest.mark.parametrize("whence", ["checkpoint", "journal"])
@asynchronous
async def test_others_have_their_turn_while_the_past_is_rebuilt(whence: str) -> None:
    agent = Archived(1)
    agent.map("plan").update({f"k{n}": n for n in range(20_000)})
    cut = agent.version()
    agent.keep_checkpoint("one")
    agent.map("plan")["k0"] = "later"
    agent.compact("main", 10**9)
    rebuilding = asyncio.create_task(
        agent.lookback.at("one" if whence == "checkpoint" else cut, None)
    )
    turns = 0

    while not rebuilding.done():
        await asyncio.sleep(0)
        turns += 1

    with rebuilding.result() as past:
        assert dict(past.map("plan")) == {f"k{n}": n for n in range(20_000)}
    assert turns > 100


# Differences


def test_differences_read_well() -> None:
    agent = Archived(1)
    notes = agent.document("notes", shared=True)
    plan = agent.map("plan")
    plan["goal"], plan["gone"] = "ship", 1
    agent.set("skills").add("python")
    notes.text("body").insert(0, "".join(f"line {n}\n" for n in range(60)))
    before = agent.version()
    plan["goal"], plan["new"] = "ship it", "x" * 500
    del plan["gone"]
    agent.set("skills").discard("python")
    agent.set("skills").add(3)
    agent.counter("tokens").increment(120)
    notes.text("body").insert(7, "another\n")
    notes.array("list").append("x")

    shown = [str(difference) for difference in agent.diff(before)]

    assert shown == [
        "main: tokens: 0 -> 120 (+120)",
        "main: plan['goal']: 'ship' -> 'ship it'",
        "main: plan['gone']: 1 removed",
        f"main: plan['new'] = 'x{'x' * 198}... (502 characters) (new)",
        "main: skills[3]: added",
        "main: skills['python']: removed",
        "notes: body:\n--- before\n+++ after\n@@ -1,4 +1,5 @@\n line 0\n+another\n line 1\n"
        " line 2\n line 3",
        "notes: list = ['x'] (new)",
    ]
    assert all(len(str(difference)) < 10_000 for difference in agent.diff(Cut(), before))


def test_a_difference_of_long_texts_is_bounded() -> None:
    agent = Archived(1)
    text = agent.document("notes", shared=True).text("body")
    text.insert(0, "".join(f"line {n} {'x' * 300}\n" for n in range(500)))
    before = agent.version()
    text.clear()
    text.insert(0, "".join(f"other {n}\n" for n in range(500)))

    (difference,) = agent.diff(before)

    assert "more lines" in str(difference) and len(str(difference)) < 20_000
    assert difference.before.startswith("line 0") and difference.after.startswith("other 0")


def test_differences_can_be_asked_of_documents_and_paths() -> None:
    agent = Archived(1)
    for name in ("one", "two", "@system"):
        agent.system_document(name).map("plan").update(a=1, b=2)
        agent.document(name).counter("n").increment()
    cut = Cut()

    def paths(**options: Any) -> set[str]:
        return {f"{d.document}:{d.path}" for d in agent.diff(cut, **options)}

    both = {f"{name}:{path}" for name in ("one", "two") for path in ("plan['a']", "plan['b']", "n")}
    assert paths() == both
    assert paths(documents=["one"], paths=["plan['a']"]) == {"one:plan['a']"}
    assert paths(paths=["n"]) == {"one:n", "two:n"}
    assert paths(documents=["@system"], paths=["n"]) == {"@system:n"}
    for bad in (["three"], "one", [], [3]):
        with pytest.raises(UsageError, match="document"):
            paths(documents=bad)
    with pytest.raises(UsageError, match="paths are several str"):
        paths(paths="plan")


def test_a_value_of_another_type_is_another_value() -> None:
    agent = Archived(1)
    plan = agent.map("plan")
    plan["x"] = 1
    cut = agent.version()
    plan["x"] = True

    assert [(d.before, d.after) for d in agent.diff(cut)] == [(1, True)]
    plan["x"] = 1
    assert agent.diff(cut) == []


# In a replica


@asynchronous
async def test_a_replica_looks_back_over_restarts_and_compactions(tmp_path: Path) -> None:
    config = Config(snapshot_after_bytes=4096, log_bytes=1)
    store = tmp_path / "a.db"
    async with Replica("ann", store=store, config=config) as ann:
        ann.map("plan")["n"] = -1
        first = ann.version()
        checkpoint = await ann.checkpoint("first")
        for number in range(300):
            ann.map("plan")["n"] = number
            await ann.durable()
        late = ann.version()
        (await ann.at(late)).close()
    async with Replica("ann", store=store, config=config) as ann:
        with await ann.at(late) as past:
            assert past.map("plan")["n"] == 299
        # The journal has forgotten it; the checkpoint has not.
        for point in (first, checkpoint, checkpoint.id):
            with await ann.at(point) as past:
                assert past.map("plan")["n"] == -1
        with pytest.raises(PastForgotten):
            await ann.at(Cut({"main": {ann.writer: 2}}))
        (difference,) = await ann.diff(checkpoint.id)
        assert (difference.before, difference.after) == (-1, 299)


@asynchronous
async def test_with_power_durability_the_past_waits_for_the_store(tmp_path: Path) -> None:
    async with Replica("ann", store=tmp_path / "a.db", durability="power") as ann:
        for number in range(20):
            ann.map("plan")["n"] = number
            cut = ann.version()
            ann.map("plan")["n"] = "later"
            with await ann.at(cut) as past:
                assert past.map("plan")["n"] == number


@asynchronous
async def test_inside_a_transaction_and_when_closed_there_is_no_past() -> None:
    async with Replica("ann") as ann:
        cut = ann.version()
        with ann.transaction():
            for call in (ann.at(cut), ann.diff(cut), ann.restore(cut), ann.revert(run="x")):
                with pytest.raises(UsageError, match="inside a transaction"):
                    await call
    with pytest.raises(UsageError, match="closed"):
        await ann.at(cut)
