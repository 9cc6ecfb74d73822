"""Bringing back: everything reads as then, or as if one run had never been, and nobody's else
writes are lost."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import pytest
from archived import Archived, act, histories, read
from harness import asynchronous, contents, exchange
from hypothesis import given, settings
from hypothesis import strategies as st

from crdtstate import Config, Cut, Replica, UnknownStrategy, UsageError, strategy
from crdtstate.document import CHANGE_PATHS_MAX


def play(history: list[Any], agents: list[Archived]) -> list[tuple[int, Cut, dict[str, Any]]]:
    seen = []
    for who, (verb, key, number, name) in history:
        agent = agents[who]
        if verb == "hear":
            exchange(agent, agents[number % 3])
        elif verb != "seal":
            act(agent, verb, key, number, name)
        agent.sealed()
        seen.append((who, agent.version(), read(agent)))
    return seen


def three() -> list[Archived]:
    return [Archived(writer) for writer in (1, 2, 3)]


# Restoring: laws


@settings(max_examples=150, deadline=None)
@given(history=histories, data=st.data())
def test_after_a_restore_everything_reads_as_then_and_another_one_changes_nothing(
    history: list[Any], data: Any
) -> None:
    agents = three()
    seen = [each for each in play(history, agents) if each[0] == 0]
    if not seen:
        return
    agent = agents[0]
    _, cut, then = data.draw(st.sampled_from(seen))
    expected = agent.diff(agent.version(), cut)

    changed = agent.restore(cut)

    assert changed == expected
    assert read(agent) == then and agent.diff(cut) == []
    version = agent.version()
    assert agent.restore(cut) == [] and agent.version() == version
    exchange(*agents)
    assert _lanes(agents[0]) == _lanes(agents[1]) == _lanes(agents[2])


def _lanes(agent: Archived) -> dict[str, Any]:
    return {name: content for name, content in contents(agent).items() if content}


def test_a_restore_tells_what_it_changed_by_name() -> None:
    agent = Archived(1)
    cut = agent.version()
    for key in "bca":
        agent.map("plan")[key] = 1
        agent.map("first")[key] = 1

    changed = agent.restore(cut)

    assert [each.path for each in changed] == [
        f"{name}[{key!r}]" for name in ("first", "plan") for key in "abc"
    ]


@asynchronous
async def test_others_can_write_while_a_restore_looks_and_nothing_of_it_is_lost() -> None:
    agent = Archived(1)
    plan = agent.map("plan")
    then = {f"k{n}": n for n in range(10_000)}
    plan.update(then)
    cut = agent.version()
    plan.update({key: "changed" for key in list(then)[::7]})
    plan["new"] = 1
    restoring = asyncio.create_task(agent.lookback.restore(cut, None, None, "", ""))
    written: set[str] = set()

    while not restoring.done():
        key = f"k{len(written) * 37 % 10_000}"
        plan[key] = "meanwhile"
        written.add(key)
        await asyncio.sleep(0)

    changed = {each.key for each in restoring.result()}
    assert changed >= set(list(then)[::7]) - written | {"new"}
    assert len(written) > 10
    assert {key for key in then if plan[key] != then[key]} <= written and "new" not in plan
    assert all(plan[key] in (then[key], "meanwhile") for key in then)
    agent.sealed()
    await agent.lookback.restore(cut, None, None, "", "")
    assert dict(plan) == then


@settings(max_examples=100, deadline=None)
@given(history=histories, later=histories, data=st.data())
def test_a_restore_merges_with_what_others_write_and_all_come_out_equal(
    history: list[Any], later: list[Any], data: Any
) -> None:
    agents = three()
    seen = [each for each in play(history, agents) if each[0] == 0]
    if not seen:
        return
    _, cut, then = data.draw(st.sampled_from(seen))
    # The others have not heard of the restore when they write.
    others = [Archived(4), Archived(5)]
    exchange(*agents)
    exchange(*agents, *others)
    counts = {(name, key): agents[0].document(name).counter(key).value for name, key in COUNTERS}
    agents[0].restore(cut)
    for _, (verb, key, number, name) in later:
        if verb not in ("hear", "seal"):
            act(others[number % 2], verb, key, number, name)
    added = {
        (name, key): sum(o.document(name).counter(key).value - counts[name, key] for o in others)
        for name, key in COUNTERS
    }
    written = {key: value for other in others for key, value in _written(other).items()}
    exchange(*agents, *others)

    assert read(agents[0]) == read(others[0]) == read(others[1])
    assert _lanes(agents[0]) == _lanes(others[0]) == _lanes(others[1])
    main = agents[0].document("main").map("plan")
    for key, values in written.items():
        # A value that was written at the same time is never lost: it is among the candidates.
        standing = {candidate.value for candidate in main.live(key)}
        assert values <= standing, (key, values, standing)
    for name, key in COUNTERS:
        before = then.get(name, {}).get(key, 0)
        assert agents[0].document(name).counter(key).value == before + added[name, key]


COUNTERS = [(name, key) for name in ("main", "tasks") for key in ("a", "b")]


def _written(agent: Archived) -> dict[str, set[int]]:
    """The values that stand in an agent's own lane of the map "plan"."""
    found: dict[str, set[int]] = {}
    plan = agent.document("main").map("plan")
    for key in ("a", "b"):
        own = {c.value for c in plan.live(key) if c.writer == agent.document("main").writer}
        if own:
            found[key] = own
    return found


# Restoring: examples


def test_a_restore_is_one_recorded_change_of_each_document() -> None:
    agent = Archived(1, "ann")
    agent.map("plan").update(goal="ship", step=1)
    agent.document("tasks").counter("open").increment(3)
    agent.map("plan")["tags"] = ["a"]
    cut = agent.version()
    agent.map("plan").update(goal="sail", extra=True)
    del agent.map("plan")["step"]
    agent.document("tasks").counter("open").increment(39)
    agent.document("new").set("s").add(1)
    agent.sealed()
    count = len(agent.outbox)

    changed = agent.restore(cut, message="back to the plan", run="run-9")

    assert {str(each) for each in changed} == {
        "main: plan['extra']: True removed",
        "main: plan['goal']: 'sail' -> 'ship'",
        "main: plan['step'] = 1 (new)",
        "new: s[1]: removed",
        "tasks: open: 42 -> 3 (-39)",
    }
    made = agent.outbox[count:]
    assert sorted(change.document for change in made) == ["main", "new", "tasks"]
    assert {change.origin for change in made} == {("ann", "back to the plan", "run-9")}


def test_a_restore_can_be_of_documents_and_paths_and_leaves_the_rest() -> None:
    agent = Archived(1)
    for name in ("one", "two", "@system"):
        agent.system_document(name).map("plan").update(a=1, b=1)
    cut = agent.version()
    for name in ("one", "two", "@system"):
        agent.system_document(name).map("plan").update(a=2, b=2, c=2)
        agent.document(name).counter("n").increment()

    agent.restore(cut, documents=["one"], paths=["plan['a']", "plan['c']"])
    assert dict(agent.document("one").map("plan")) == {"a": 1, "b": 2}
    assert dict(agent.document("two").map("plan")) == {"a": 2, "b": 2, "c": 2}
    agent.restore(cut, paths=["n"])
    assert [agent.document(name).counter("n").value for name in ("one", "two")] == [0, 0]
    agent.restore(cut)
    assert dict(agent.document("two").map("plan")) == {"a": 1, "b": 1}
    # What belongs to the system is only brought back if it is named.
    assert dict(agent.document("@system").map("plan")) == {"a": 2, "b": 2, "c": 2}
    agent.restore(cut, documents=["@system"])
    assert dict(agent.document("@system").map("plan")) == {"a": 1, "b": 1}


def test_names_and_paths_that_name_nothing_are_refused_and_nothing_changes() -> None:
    agent = Archived(1)
    agent.map("plan")["a"] = 1
    cut = agent.version()
    agent.map("plan")["a"] = 2
    version = agent.version()

    for options, message in [
        ({"documents": ["mian"]}, "no document 'mian'"),
        ({"paths": ["plan['a']", "plan['z']"]}, r"plan\['z'\].*names nothing"),
        ({"paths": ["pln"]}, "'pln' names nothing"),
        ({"paths": "plan"}, "paths are several"),
    ]:
        with pytest.raises(UsageError, match=message):
            agent.restore(cut, **options)
    assert agent.version() == version and agent.map("plan")["a"] == 2


def test_a_conflict_that_is_open_now_is_written_over_and_one_of_then_reads_as_it_did() -> None:
    one, two = Archived(1), Archived(2)
    one.map("plan", strategy="max")["x"] = 5
    two.map("plan")["x"] = 3
    exchange(one, two)
    then = one.version()
    one.map("plan")["x"] = 1
    exchange(one, two)
    one.map("plan")["x"] = 7
    two.map("plan")["x"] = 8
    exchange(one, two)
    assert one.map("plan")["x"] == 8 and one.conflicts()

    one.restore(then)

    assert one.map("plan")["x"] == 5 and not one.conflicts()


def test_the_strategy_of_then_comes_back() -> None:
    agent = Archived(1)
    agent.map("plan", strategy="max")["x"] = 1
    cut = agent.version()
    agent.map("plan", strategy="merge").use_strategy("min", prefix="score/")

    changed = agent.restore(cut)

    assert agent.map("plan").strategies() == {"": "max"}
    assert [(d.kind, d.before, d.after) for d in changed][0] == ("strategy", "merge", "max")


def test_where_a_strategy_is_not_known_here_nothing_is_changed_by_guess() -> None:
    @strategy("only-in-this-test")
    def choose(candidates: Any) -> Any:
        return candidates[0].value

    one, two = Archived(1), Archived(2)
    one.map("plan", strategy="only-in-this-test")["x"] = 5
    two.map("plan")["x"] = 3
    exchange(one, two)
    cut = one.version()
    one.map("plan")["x"] = 1
    one.map("plan")["y"] = 1
    from crdtstate import conflict

    del conflict._registry["only-in-this-test"]
    version = one.version()

    with pytest.raises(UnknownStrategy):
        one.restore(cut)
    assert one.version() == version


def test_a_large_restore_is_made_in_several_changes_that_others_take_in() -> None:
    agent, other = Archived(1), Archived(2)
    cut_at = 2 * CHANGE_PATHS_MAX + 500
    plan = agent.map("plan")
    plan.update({f"key-{n}": n for n in range(CHANGE_PATHS_MAX - 10)})
    agent.sealed()
    plan.update({f"more-{n}": n for n in range(CHANGE_PATHS_MAX - 10)})
    agent.sealed()
    plan.update({f"rest-{n}": n for n in range(520)})
    agent.map("big")["text"] = "x" * 900_000
    agent.sealed()
    agent.map("big")["more"] = "y" * 900_000
    agent.sealed()
    agent.map("big")["third"] = "z" * 900_000
    cut = agent.version()
    for name in ("plan", "big"):
        for key in list(agent.map(name)):
            del agent.map(name)[key]
            agent.sealed()
    count = len(agent.outbox)

    changed = agent.restore(cut)

    assert len(changed) == cut_at + 3
    assert agent.diff(cut) == []
    made = agent.outbox[count:]
    assert 3 <= len(made) <= 6
    exchange(agent, other)
    assert dict(other.map("plan")) == dict(agent.map("plan"))


def test_writes_that_come_between_the_changes_of_a_restore_are_covered_or_stay_whole() -> None:
    agent, other = Archived(1), Archived(2)
    plan = agent.map("plan")
    keys = [f"key-{n:05}" for n in range(CHANGE_PATHS_MAX + 5)]
    for start in range(0, len(keys), 10_000):
        plan.update({key: "then" for key in keys[start : start + 10_000]})
        agent.sealed()
    cut = agent.version()
    for start in range(0, len(keys), 10_000):
        plan.update({key: "now" for key in keys[start : start + 10_000]})
        agent.sealed()
    exchange(agent, other)
    other.map("plan")[keys[0]] = "theirs"
    other.map("plan")[keys[-1]] = "theirs"
    other.map("plan")["zz new"] = "theirs"
    (foreign,) = other.sealed()
    settle = agent.lookback._settle

    def hear_in_between() -> None:
        settle()
        if plan[keys[0]] == "then":
            agent.receive(foreign)

    agent.lookback._settle = hear_in_between
    changed = agent.restore(cut)

    # It came after the first place was restored, and before the last one was.
    assert {c.value for c in plan.live(keys[0])} == {"then", "theirs"}
    assert [c.value for c in plan.live(keys[-1])] == ["then"]
    assert plan["zz new"] == "theirs"
    assert [d.before for d in changed if d.key == keys[-1]] == ["theirs"]


# Native types


def test_native_types_come_back_by_small_edits() -> None:
    agent, other = Archived(1), Archived(2)
    notes = agent.document("notes", shared=True)
    text = notes.text("body")
    text.insert(0, "".join(f"Zeile {n} äöü 😀\n" for n in range(2000)))
    notes.array("list").extend([1, {"a": [1]}, "x", None])
    notes.native_map("map").update({"one": 1, "two": [2]})
    cut = agent.version()
    then = str(text)
    at = len("".join(f"Zeile {n} äöü 😀\n" for n in range(7)).encode())
    text.insert(at, "dazwischen\n")
    del text[0:5]
    del notes.array("list")[1]
    notes.array("list").append("new")
    del notes.native_map("map")["one"]
    notes.native_map("map")["three"] = 3
    exchange(agent, other)

    changed = agent.restore(cut)

    assert str(text) == then
    assert list(notes.array("list")) == [1, {"a": [1]}, "x", None]
    assert dict(notes.native_map("map")) == {"one": 1, "two": [2]}
    assert sorted((d.kind, d.name) for d in changed) == [
        ("array", "list"),
        ("native_map", "map"),
        ("text", "body"),
    ]
    made = agent.sealed() or agent.outbox[-1:]
    assert len(made[-1].data) < 1000, "it wrote more than what differed"
    exchange(agent, other)
    assert str(other.document("notes").text("body")) == then
    assert agent.restore(cut) == []


def test_formatted_texts_and_nested_types_come_back() -> None:
    from pycrdt import Array, Map, Text

    agent = Archived(1)
    notes = agent.document("notes", shared=True)
    text = notes.text("body")
    text.insert(0, "some bold text")
    text.format(5, 9, {"b": True})
    text.insert_embed(4, {"image": "x.png"})
    nested = notes.array("list")
    nested.append(Map({"title": Text("hello"), "tags": Array(["a"])}))
    nested.append("end")
    cut = agent.version()
    then = (text.diff(), nested.to_py())
    text.format(0, 4, {"i": True})
    text.format(6, 8, {"b": None})
    text.insert(1, "###")
    kept = nested[0]["title"]
    kept.insert(5, " world")
    nested[0]["tags"].append("b")
    nested.insert(0, "start")

    agent.restore(cut)

    assert _joined(text.diff()) == _joined(then[0]) and nested.to_py() == then[1]
    # The nested text is still the one that it was.
    kept.insert(0, "!")
    assert str(nested[0]["title"]) == "!hello"
    assert agent.at(cut).document("notes").array("list").to_py() == then[1]


def _joined(runs: Any) -> list[Any]:
    """Runs of a text; pycrdt may cut one in two where nothing changes."""
    found: list[Any] = []
    for part, attributes in runs:
        if found and isinstance(part, str) and isinstance(found[-1][0], str):
            if found[-1][1] == (attributes or {}):
                found[-1][0] += part
                continue
        found.append([part, attributes or {}])
    return found


texts = st.text(st.sampled_from("ab\nä😀 "), max_size=30)


@settings(max_examples=150, deadline=None)
@given(before=texts, after=texts, concurrent=st.booleans())
def test_any_text_becomes_any_other_again(before: str, after: str, concurrent: bool) -> None:
    agent, other = Archived(1), Archived(2)
    text = agent.document("notes", shared=True).text("body")
    text.insert(0, before)
    agent.document("notes").array("l").extend(list(before))
    cut = agent.version()
    text.clear()
    text.insert(0, after)
    array = agent.document("notes").array("l")
    array.clear()
    array.extend(list(after))
    exchange(agent, other)
    if concurrent:
        other.find_or_make("notes", True).text("body").insert(0, "!")

    agent.restore(cut)

    assert str(text) == before and list(array) == list(before)
    exchange(agent, other)
    assert str(other.find_or_make("notes", True).text("body")) == str(text)
    if concurrent:
        assert "!" in str(text)


def test_a_text_larger_than_a_change_comes_back_in_several() -> None:
    agent, other = Archived(1), Archived(2)
    text = agent.document("notes", shared=True).text("body")
    lines = "".join(f"{n} {'x' * 100}\n" for n in range(12_000))
    for start in range(0, len(lines), 200_000):
        text.insert(len(text), lines[start : start + 200_000])
        agent.sealed()
    cut = agent.version()
    for _ in range(3):
        text.clear()
        agent.sealed()
    count = len(agent.outbox)

    agent.restore(cut)

    assert str(text) == lines and len(agent.outbox) - count == 1
    text.clear()
    agent.sealed()
    exchange(agent, other)
    assert str(other.document("notes").text("body")) == ""


# Reverting: laws


runs = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from(["", "", "run"]),
        st.tuples(
            st.sampled_from(
                ["put", "put", "delete", "increment", "add", "discard", "set", "clear"]
            ),
            st.sampled_from(["a", "b"]),
            st.integers(0, 3),
        ),
        st.booleans(),
    ),
    max_size=20,
)


def _act_in(agent: Archived, run: str, action: Any) -> None:
    with agent.transaction(run=run):
        act(agent, *action)


@settings(max_examples=150, deadline=None)
@given(history=histories, last=st.lists(runs.map(lambda found: found[:1]), max_size=8))
def test_reverting_the_only_run_is_restoring_what_was_before_it(
    history: list[Any], last: list[Any]
) -> None:
    agent = Archived(1)
    for _, (verb, key, number, name) in history:
        if verb not in ("hear", "seal", "strategy"):
            act(agent, verb, key, number, name)
    cut, before = agent.version(), read(agent)
    count = 0
    for found in last:
        for _, _, action, _ in found:
            _act_in(agent, "run", action)
            agent.sealed()
            count = sum(change.origin.run == "run" for change in agent.outbox)
    if not count:
        with pytest.raises(UsageError, match="no changes of a run"):
            agent.revert("run")
        return

    expected = agent.diff(agent.version(), cut)
    reverted = agent.revert("run")

    assert sorted(map(str, reverted.changed)) == sorted(map(str, expected))
    assert read(agent) == before
    again = agent.revert("run")
    assert again.changed == () and read(agent) == before


@settings(max_examples=250, deadline=None)
@given(history=runs)
def test_a_revert_leaves_what_would_have_been_without_the_run(history: list[Any]) -> None:
    """One agent after the other writes, each having seen all before. So without the run, all
    others' writes would have been the same, and what they left is what a revert leaves."""
    agents, clean = [Archived(1), Archived(2)], Archived(3)
    is_run = False
    for who, run, action, _ in history:
        exchange(*agents)
        version = agents[who].version()
        _act_in(agents[who], run, action)
        agents[who].sealed()
        if agents[who].version() == version:
            # Such as removing what the run has removed before: nobody wrote anything.
            continue
        is_run = is_run or run == "run"
        if run != "run":
            act(clean, *action)
    exchange(*agents)
    if not is_run:
        return

    reverted = agents[0].revert("run")

    got, want = read(agents[0]).get("main", {}), read(clean).get("main", {})
    assert got == want, reverted
    exchange(*agents)
    assert contents(agents[0]) == contents(agents[1])


@settings(max_examples=250, deadline=None)
@given(history=runs)
def test_a_revert_keeps_the_writes_of_others_that_stand(history: list[Any]) -> None:
    agents = [Archived(1), Archived(2)]
    is_run = False
    for who, run, action, hears in history:
        if hears:
            exchange(*agents)
        version = agents[who].version()
        _act_in(agents[who], run, action)
        agents[who].sealed()
        is_run = is_run or (run == "run" and agents[who].version() != version)
    exchange(*agents)
    if not is_run:
        return
    agent = agents[0]
    dots = {change.dot for each in agents for change in each.outbox if change.origin.run == "run"}

    def others() -> dict[tuple[str, str], set[Any]]:
        """The values that stand and that the run did not write, by place."""
        found: dict[tuple[str, str], set[Any]] = {}
        for key in ("a", "b"):
            live = [c for c in agent.map("plan").live(key) if c.dot not in dots]
            if live:
                found["plan", key] = {c.value for c in live}
        live = [c for c in agent.register("leader").live("") if c.dot not in dots]
        if live:
            found["leader", ""] = {c.value for c in live}
        return found

    before = others()
    shown = read(agent).get("main", {})
    reverted = agent.revert("run")

    after = read(agent).get("main", {})
    changed = {(d.name, d.key or "") for d in reverted.changed}
    for (name, key), values in before.items():
        value = after["plan"][key] if name == "plan" else after["leader"]
        assert value in values
        if (name, key) not in changed:
            assert value == (shown["plan"][key] if name == "plan" else shown["leader"])
    # Every place that the run wrote is accounted for, and none that it did not.
    listed = [*reverted.changed, *reverted.kept]
    assert len({(d.kind, d.name, d.key) for d in listed}) == len(listed)
    written = {path for c in agent.history("main", run="run") for path in c.paths}
    assert {d.path for d in listed} == written
    exchange(*agents)
    assert contents(agents[0]) == contents(agents[1])


# Reverting: examples


def test_a_revert_undoes_a_run_and_says_what_it_left() -> None:
    ann, bob = Archived(1, "ann"), Archived(2, "bob")
    ann.map("plan").update(goal="ship", step=1, owner="ann")
    ann.counter("tokens").increment(10)
    ann.set("skills").add("python")
    exchange(ann, bob)
    with bob.transaction(run="run-7"):
        bob.map("plan").update(goal="sail", owner="bob", extra=True)
        del bob.map("plan")["step"]
        bob.counter("tokens").increment(5)
        bob.set("skills").add("rust")
        bob.set("skills").discard("python")
        bob.document("tasks").register("lead").value = "bob"
    exchange(ann, bob)
    ann.map("plan")["owner"] = "eve"
    ann.counter("tokens").increment(100)
    exchange(ann, bob)

    reverted = ann.revert("run-7")

    assert dict(ann.map("plan")) == {"goal": "ship", "step": 1, "owner": "eve"}
    assert ann.counter("tokens").value == 110
    assert set(ann.set("skills")) == {"python"}
    assert not ann.document("tasks").register("lead").is_set
    assert len(reverted.changed) == 7
    (kept,) = reverted.kept
    assert str(kept) == "main: plan['owner']: ann has written over it since"
    made = [change for change in ann.outbox if change.origin.run == "revert run-7"]
    assert {change.document for change in made} == {"main", "tasks"}


def test_reverting_a_revert_brings_the_run_back() -> None:
    agent = Archived(1)
    agent.map("plan")["goal"] = "ship"
    agent.sealed()
    with agent.transaction(run="one"):
        agent.map("plan")["goal"] = "sail"
        agent.counter("n").increment(3)
    before = read(agent)

    agent.revert("one")
    assert agent.counter("n").value == 0
    agent.revert("revert one")

    assert read(agent) == before


def test_only_the_part_of_one_agent_or_document_can_be_reverted() -> None:
    ann, bob = Archived(1, "ann"), Archived(2, "bob")
    for who in (ann, bob):
        with who.transaction(run="both"):
            for name in ("main", "tasks"):
                who.document(name).counter("n").increment(1 if who is ann else 10)
                who.document(name).map("plan")[who.agent] = 1
        exchange(ann, bob)

    ann.revert("both", agent="bob", document="main")
    assert dict(ann.map("plan")) == {"ann": 1} and ann.counter("n").value == 1
    assert ann.document("tasks").counter("n").value == 11
    ann.revert("both", agent="bob", document="main")
    assert ann.counter("n").value == 1
    ann.revert("both")
    assert ann.counter("n").value == ann.document("tasks").counter("n").value == 0
    reverted = ann.revert("both", agent="ann")
    assert ann.counter("n").value == 0
    assert {kept.reason for kept in reverted.kept if kept.name == "n"} == {
        "the whole run was reverted before"
    }
    for wrong in ("", 7, None):
        with pytest.raises(UsageError):
            ann.revert(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no document"):
        ann.revert("both", document="x")


def test_a_value_written_at_the_same_time_takes_the_place_of_the_runs() -> None:
    ann, bob = Archived(1, "ann"), Archived(2, "bob")
    bob.map("plan").update(x="bob", y="early")
    with ann.transaction(run="run"):
        ann.map("plan").update(x="ann", y="ann")
    bob.sealed()
    bob.map("plan")["y"] = "late"
    exchange(ann, bob)
    assert ann.map("plan")["x"] == "ann" and ann.map("plan")["y"] == "late"

    reverted = ann.revert("run")

    assert dict(ann.map("plan")) == {"x": "bob", "y": "late"}
    assert [d.key for d in reverted.changed] == ["x"]
    assert [(k.key, k.reason) for k in reverted.kept] == [
        ("y", "a value that was written at the same time stands")
    ]


def test_what_two_have_removed_at_the_same_time_does_not_come_back() -> None:
    ann, bob = Archived(1, "ann"), Archived(2, "bob")
    ann.map("plan").update(x=1, y=1)
    exchange(ann, bob)
    with bob.transaction(run="run"):
        del bob.map("plan")["x"]
        del bob.map("plan")["y"]
    del ann.map("plan")["x"]
    ann.sealed()
    base, removed = ann.outbox[:1], [ann.outbox[1:], bob.outbox]

    for order in (removed, removed[::-1]):
        reader = Archived(9)
        for change in [*base, *order[0], *order[1]]:
            reader.receive(change)
        reverted = reader.revert("run")
        assert dict(reader.map("plan")) == {"y": 1}, reverted


def test_what_was_before_the_run_and_is_no_longer_in_the_log_is_left_and_listed() -> None:
    agent = Archived(1)
    agent.map("plan").update(a="before", b="before", c="before")
    agent.sealed()
    with agent.transaction(run="run"):
        agent.map("plan").update(a="run", b="run")
        agent.counter("n").increment(5)
    agent.sealed()
    agent.compact("main", keep_bytes=len(agent.outbox[-1].data))
    with agent.transaction(run="run"):
        agent.map("plan").update(b="run again", c="run")
        agent.counter("n").increment(2)
    agent.sealed()

    reverted = agent.revert("run")

    assert dict(agent.map("plan")) == {"a": "run", "b": "run again", "c": "before"}
    assert agent.counter("n").value == 5
    assert [d.path for d in reverted.changed] == ["n", "plan['c']"]
    assert sorted((k.path, k.reason) for k in reverted.kept) == [
        ("n", "it may have added more than this, which is no longer in the log"),
        ("plan['a']", "what was there before the run is no longer in the log"),
        ("plan['b']", "what was there before the run is no longer in the log"),
    ]


def test_with_a_checkpoint_before_the_run_it_can_be_reverted_whole() -> None:
    agent = Archived(1)
    agent.map("plan").update(a="before")
    agent.keep_checkpoint("one")
    with agent.transaction(run="run"):
        agent.map("plan").update(a="run", b="run")
    agent.sealed()
    agent.compact("main", keep_bytes=len(agent.outbox[-1].data))

    reverted = agent.revert("run")

    assert dict(agent.map("plan")) == {"a": "before"} and reverted.kept == ()


def test_texts_come_back_if_nobody_else_has_edited_them() -> None:
    ann, bob = Archived(1, "ann"), Archived(2, "bob")
    notes = ann.document("notes", shared=True)
    notes.text("one").insert(0, "first")
    notes.text("two").insert(0, "second")
    exchange(ann, bob)
    theirs = bob.document("notes")
    with bob.transaction(run="run"):
        theirs.text("one").insert(5, " and more")
        theirs.text("two").insert(6, " and more")
        theirs.array("new").append(1)
    exchange(ann, bob)
    notes.text("two").insert(0, "the ")
    exchange(ann, bob)

    reverted = ann.revert("run")

    assert str(notes.text("one")) == "first" and list(notes.array("new")) == []
    assert str(notes.text("two")) == "the second and more"
    assert [d.name for d in reverted.changed] == ["new", "one"]
    (kept,) = reverted.kept
    assert (kept.name, kept.kind) == ("two", "text") and "others have edited it" in kept.reason


# In replicas


@asynchronous
async def test_a_restore_in_one_replica_reaches_the_others_and_their_writes_stay() -> None:
    local = "ws://127.0.0.1:0"
    async with Replica("ann", listen=local) as ann:
        async with Replica("bob", peers=[str(ann.address)]) as bob:
            ann.map("plan").update(goal="ship", step=1)
            ann.counter("n").increment(5)
            checkpoint = await ann.checkpoint("before")
            ann.map("plan").update(goal="sail", extra=1)
            ann.counter("n").increment(5)
            await bob.wait_for(ann.version(), timeout=10)

            changed = await ann.restore(checkpoint)
            # He may have heard of it or not.
            bob.map("plan")["mine"] = True
            bob.counter("n").increment()
            await ann.wait_for(bob.version(), timeout=10)
            await bob.wait_for(ann.version(), timeout=10)

            assert len(changed) == 3
            for replica in (ann, bob):
                plan = dict(replica.map("plan"))
                assert plan == {"goal": "ship", "step": 1, "mine": True}
                assert replica.counter("n").value == 6
            history = [change.message for change in bob.history("main") if change.message]
            assert history == [f"restore of {checkpoint.id}"]


@asynchronous
async def test_only_subscribed_documents_are_restored() -> None:
    async with Replica("ann", subscribe=["plan/*"]) as ann:
        ann.document("plan/a").map("m")["x"] = 1
        cut = ann.version()
        ann.document("plan/a").map("m")["x"] = 2

        assert [d.document for d in await ann.restore(cut)] == ["plan/a"]


@asynchronous
async def test_documents_with_many_keys_are_restored_quickly(tmp_path: Path) -> None:
    config = Config(snapshot_after_bytes=2**20)
    async with Replica("ann", store=tmp_path / "a.db", config=config) as ann:
        plan = ann.map("plan")
        for start in range(0, 10_000, 5_000):
            plan.update({f"key-{n}": {"n": n} for n in range(start, start + 5_000)})
            await ann.durable()
        checkpoint = await ann.checkpoint()
        rng = random.Random(1)
        for start in range(0, 10_000, 5_000):
            plan.update({f"key-{n}": rng.random() for n in range(start, start + 5_000)})
            await ann.durable()

        began = time.perf_counter()
        changed = await ann.restore(checkpoint.id)
        took = time.perf_counter() - began

        assert len(changed) == 10_000 and plan["key-77"] == {"n": 77}
        # It takes 0.2 s; on a busy machine a few times that.
        assert took < 5
