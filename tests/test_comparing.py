"""Comparing state: sound replicas always agree, and whatever is damaged is found and named."""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from harness import Agent, asynchronous, contents
from harness import exchange as exchange_all
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycrdt import Doc, Text
from test_replica import LOCAL, next_event, url
from test_sync import Node, connect, exchange, run

from crdtstate import Replica, blocking, comparing, digests, values, wire
from crdtstate import lanes as lanes_module
from crdtstate.change import decode_change
from crdtstate.comparing import Comparing, Comparison
from crdtstate.config import Config
from crdtstate.digests import Memory, Sums, describe, list_slots, sum_up
from crdtstate.document import Document
from crdtstate.errors import UsageError
from crdtstate.events import DivergenceDetected
from crdtstate.simulation import Simulation, campaign, run_seed
from crdtstate.simulation.shell import SimulatedReplica
from crdtstate.slots import Slot
from crdtstate.stores import Entry
from crdtstate.stores.memory import MemoryStore
from crdtstate.wire import Verdict

OFTEN = Config(compare_interval=0.5, tidy_delay=0.2)
QUIET = Config(compare_interval=0, tidy_delay=0.2)


def fleet(agents: int = 3, config: Config = OFTEN, seed: int = 0) -> Simulation:
    """Agents who have written this and that, and are equal."""
    sim = Simulation(seed, agents, config=config)
    rng = random.Random(seed)
    for number in range(40):
        agent = sim[rng.choice(sim.names)]
        agent.map("plan")[f"k{rng.randrange(30)}"] = number
        agent.counter("tokens").increment()
        agent.set("skills").add(number % 5)
        sim.run(0.02)
    sim["agent-0"].map("plan")["goal"] = "ship"
    sim.settle()
    return sim


def heard(sim: Simulation) -> list[tuple[str, DivergenceDetected]]:
    """Who raised which alarm."""
    return [
        (moment.agent, moment.what)
        for moment in sim.events
        if moment.kind == "event" and isinstance(moment.what, DivergenceDetected)
    ]


def find(document: Document, path: str) -> tuple[int, Slot]:
    """The lane and the slot of the one who wrote *path* last."""
    container, _, key = path.partition("\0")
    cell = document.lanes.containers[container].cells[key]
    return max(cell.items(), key=lambda pair: pair[1].stamp)


def finish(work: digests.Portions, now: float = 1.0) -> Any:
    """Do all of a piece of work at one moment."""
    return portions(work, now)[0]


def portions(work: digests.Portions, now: float = 1.0) -> tuple[Any, list[int]]:
    """The same; also returns what each portion took."""
    took = [next(work)]
    while True:
        try:
            took.append(work.send(now))
        except StopIteration as stop:
            return stop.value, took


def summed(document: Document, memory: Memory | None = None) -> Sums:
    sums = finish(sum_up(document, memory or Memory(), 0.0))
    assert isinstance(sums, Sums)
    return sums


# What can be damaged in one replica: each makes plan["goal"] another place there.

PATH = "mplan\0goal"


def flip_value(document: Document, path: str) -> None:
    writer, slot = find(document, path)
    document.lanes._update(path, writer, slot._replace(value=b"\x07"))


def flip_stamp(document: Document, path: str) -> None:
    writer, slot = find(document, path)
    document.lanes._update(path, writer, slot._replace(stamp=slot.stamp + 1))


def drop_from_index(document: Document, path: str) -> None:
    document.lanes._update(path, find(document, path)[0], None)


def drop_from_lane(document: Document, path: str) -> None:
    """The lane does not know of it any more; it is still read."""
    document.lanes.lanes[find(document, path)[0]].leave(path)


def drop_from_doc_and_lane(document: Document, path: str) -> None:
    """Only the index has it."""
    _delete(document, path)
    drop_from_lane(document, path)


def flip_in_doc(document: Document, path: str) -> None:
    """It still reads as before, but snapshots will carry something else."""
    lanes = document.lanes
    writer, slot = find(document, path)
    segment = lanes.lanes[writer].items[lanes.lanes[writer].places[path]][0]
    other: Doc[Any] = Doc(client_id=7)
    other.apply_update(lanes.state())
    group = other.get("lanes", type=lanes._root.__class__)[segment.group.key]
    group[str(segment.clock)][path] = slot._replace(value=b"\x07").encode()
    lanes._doc.apply_update(other.get_update())
    lanes._updates.clear()


def drop_everywhere(document: Document, path: str) -> None:
    _delete(document, path)
    writer, _ = find(document, path)
    drop_from_lane(document, path)
    document.lanes._update(path, writer, None)


def _delete(document: Document, path: str) -> None:
    lanes = document.lanes
    lane = lanes.lanes[find(document, path)[0]]
    segment = lane.items[lane.places[path]][0]
    del lanes._root[segment.group.key][str(segment.clock)][path]
    lanes._updates.clear()


DAMAGES = [
    flip_value,
    flip_stamp,
    flip_in_doc,
    drop_from_index,
    drop_from_lane,
    drop_from_doc_and_lane,
    drop_everywhere,
]


def damage(sim: Simulation, name: str, how: Callable[[Document, str], None]) -> int:
    """Damage a replica, let nobody trust what was summed up before, and return whose lane it is."""
    sim.oracle.expects_damage = True
    document = sim[name].document("main")
    writer, _ = find(document, PATH)
    how(document, PATH)
    forget_sums(sim)
    return writer


# What is found


def found_on_both_sides(how: Callable[[Document, str], None], whose: str = "agent-1") -> None:
    """The damaged one hears of each of the others, and each of them of it, once; nobody else."""
    sim = fleet()
    writer = damage(sim, whose, how)
    sim.until(lambda: len(heard(sim)) >= 4)
    sim.run(10)

    others = {"agent-0", "agent-1", "agent-2"} - {whose}
    pairs = [(whose, other) for other in others] + [(other, whose) for other in others]
    assert sorted((who, event.agent) for who, event in heard(sim)) == sorted(pairs)
    for _, event in heard(sim):
        assert (event.document, event.path, event.writer) == ("main", "plan['goal']", writer)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("whose", ["agent-0", "agent-1"])
def test_damage_is_found_and_named_on_both_sides(
    how: Callable[[Document, str], None], whose: str
) -> None:
    found_on_both_sides(how, whose)


def phantom_is_found() -> None:
    sim = fleet()
    sim.oracle.expects_damage = True
    writer, document = sim["agent-2"].writer, sim["agent-1"].document("main")
    document.lanes._update(PATH, writer, Slot(b"\x07", 1, 1))
    forget_sums(sim)

    sim.until(lambda: len(heard(sim)) == 4)

    assert {(event.path, event.writer) for _, event in heard(sim)} == {("plan['goal']", writer)}


def test_what_only_the_index_of_one_replica_has_is_found() -> None:
    phantom_is_found()


def forget_sums(sim: Simulation) -> None:
    """Let nobody trust what was summed up before."""
    for replica in sim.replicas:
        replica.core.comparing.forget("main")


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_in_a_lane_that_rests_is_found_while_others_never_do(
    how: Callable[[Document, str], None],
) -> None:
    sim = fleet()
    sim["agent-2"].map("plan")["goal"] = "win"
    sim.settle()
    writer = damage(sim, "agent-1", how)

    def write() -> None:
        for name in ("agent-0", "agent-1"):
            sim[name].counter("busy").increment()
        sim.at(sim.now + 0.01, write)

    write()
    sim.until(lambda: bool(heard(sim)))

    assert {(event.path, event.writer) for _, event in heard(sim)} == {("plan['goal']", writer)}
    assert writer == sim["agent-2"].writer


def found_when_aged() -> None:
    """What is damaged without a change is found once digests of before are not trusted."""
    with pytest.MonkeyPatch.context() as patch:
        if comparing.TRUSTED_FOR < 1e6:
            patch.setattr(comparing, "TRUSTED_FOR", 60.0)
        sim = fleet(2, Config(compare_interval=2.0))
        sim.run(5)
        sim.oracle.expects_damage = True
        flip_value(sim["agent-1"].document("main"), PATH)

        sim.run(20)
        assert heard(sim) == []
        sim.run(80)
        assert {who for who, _ in heard(sim)} == {"agent-0", "agent-1"}


def test_what_was_damaged_without_a_change_is_found_when_digests_have_aged() -> None:
    found_when_aged()


def test_an_alarm_ends_when_the_two_agree_again() -> None:
    sim = fleet(2)
    damage(sim, "agent-1", flip_value)
    sim.until(lambda: len(heard(sim)) == 2)
    assert sim["agent-0"].core.comparing.alarms

    # The lane goes on, and with it goes what was wrong.
    sim["agent-0"].map("plan")["goal"] = "ship again"
    sim.run(10)

    assert not sim["agent-0"].core.comparing.alarms
    assert not sim["agent-1"].core.comparing.alarms
    assert len(heard(sim)) == 2


def test_another_place_that_differs_is_another_alarm() -> None:
    sim = fleet(2)
    damage(sim, "agent-1", flip_value)
    sim.until(lambda: len(heard(sim)) == 2)

    sim["agent-0"].map("plan").update(note="new", goal="new")
    sim.run(2)
    flip_value(sim["agent-1"].document("main"), "mplan\0note")
    forget_sums(sim)
    sim.run(10)

    paths = [event.path for _, event in heard(sim)]
    assert paths == ["plan['goal']"] * 2 + ["plan['note']"] * 2


# Asking


def compared(sim: Simulation, replica: SimulatedReplica, peers: int = 2) -> Comparison:
    inquiry = replica.compare(peers)
    sim.until(lambda: inquiry.is_done)
    return inquiry.result()


def test_who_asks_hears_that_all_agree() -> None:
    sim = fleet(4, QUIET)

    found = compared(sim, sim["agent-0"], peers=3)

    assert found == Comparison(agreed=("agent-1", "agent-2", "agent-3"))


@pytest.mark.parametrize("how", DAMAGES)
def test_who_asks_several_sees_who_agrees_with_whom(how: Callable[[Document, str], None]) -> None:
    sim = fleet(4, QUIET)
    writer = damage(sim, "agent-2", how)

    healthy = compared(sim, sim["agent-0"], peers=3)
    damaged = compared(sim, sim["agent-2"], peers=3)

    assert healthy.agreed == ("agent-1", "agent-3")
    assert healthy.diverged == (("agent-2", "main", "plan['goal']", writer),)
    assert damaged.agreed == ()
    assert {each.agent for each in damaged.diverged} == {"agent-0", "agent-1", "agent-3"}
    assert healthy.unanswered == damaged.unanswered == ()


def test_every_lane_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # However many: as long as more are found, it goes on.
    monkeypatch.setattr(comparing, "DESCENTS", 1)
    monkeypatch.setattr(comparing, "ROUNDS", 2)
    sim = fleet(3, QUIET)
    for name in sim.names:
        sim[name].map("own")[name] = 1
    sim.settle()
    sim.oracle.expects_damage = True
    for name in sim.names:
        flip_value(sim["agent-1"].document("main"), f"mown\0{name}")

    found = compared(sim, sim["agent-0"])

    assert found.agreed == ("agent-2",)
    assert {each.path for each in found.diverged} == {f"own[{name!r}]" for name in sim.names}


def test_what_is_written_all_the_time_is_named_as_not_compared() -> None:
    sim = fleet(2, QUIET)

    def write() -> None:
        sim["agent-1"].counter("busy").increment()
        sim.at(sim.now + 0.003, write)

    write()
    found = compared(sim, sim["agent-0"])

    assert found.agreed == ("agent-1",)
    (each,) = found.uncompared
    assert each == (
        "agent-1",
        "main",
        "1 lanes: it changes all the time, or is at another version there",
    )


def test_who_does_not_answer_is_named() -> None:
    sim = fleet(3, QUIET)
    sim.stall("agent-1", 100)
    sim.partition({"agent-2"}, silently=True)

    found = compared(sim, sim["agent-0"])

    assert found == Comparison(unanswered=("agent-1", "agent-2"))


def test_an_old_peer_that_does_not_know_the_frames_is_not_hurt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = wire.Compare(1, "main", (2, 3))
    message = wire.encode_message([wire.encode_frame(asked)])
    assert wire.decode_message(message) == [asked]

    old = {kind: length for kind, length in wire._LENGTHS.items() if kind < 128}
    monkeypatch.setattr(wire, "_LENGTHS", old)

    assert wire.decode_message(message) == []


def test_nobody_to_ask_is_no_error() -> None:
    sim = Simulation(agents=1)
    sim["agent-0"].map("plan")["goal"] = "ship"

    assert compared(sim, sim["agent-0"]) == Comparison()


def test_an_inquiry_ends_with_the_connection() -> None:
    sim = fleet(2, QUIET)
    inquiry = sim["agent-0"].compare()
    sim.break_links("agent-0", "agent-1")
    sim.run(0.5)

    assert inquiry.is_done
    assert inquiry.result() == Comparison(unanswered=("agent-1",))


# No false alarms


def test_nasty_histories_in_which_all_compare_all_the_time_give_no_alarm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The campaign of test_simulation.py compares now and then; its mutants show that it would see.
    monkeypatch.setattr(campaign, "COMPARING", (0.1,))

    failures = [run_seed(seed).failure for seed in range(6)]

    assert [failure for failure in failures if failure] == []


def adopter() -> tuple[Node, Node]:
    """Two nodes of which only the first has heard what an adopter dropped in lane 1."""
    first, one, two = Node(1, QUIET), Node(2, QUIET), Node(3, QUIET)
    connect(first, one)
    connect(one, two)
    first.map("plan")["goal"] = "ship"
    run(first, one, two, seconds=2)
    first.disconnect(next(iter(first.links)))
    one.map("plan")["goal"] = "win"
    run(one, two, seconds=2)

    # What is news from here on does not get to the second.
    one.loses = lambda frame: isinstance(frame, wire.Changes) and 4 in writers_of(frame)
    second = Node(4, QUIET)
    second.now = second.core._now = one.now
    second.core.former.add(1)
    connect(second, one)
    run(second, one, two, seconds=3)
    return one, two


def writers_of(frame: wire.Changes) -> set[int]:
    return {decode_change(data).writer for data in frame.changes}


def lane_paths(node: Node, writer: int) -> set[str]:
    return set(node.document("main").lanes.lane(writer).places)


def test_a_slot_that_an_adopter_dropped_is_no_alarm_for_who_has_not_heard_of_it() -> None:
    one, two = adopter()
    assert (lane_paths(one, 1), lane_paths(two, 1)) == (set(), {PATH})
    assert one.document("main").version[1] == two.document("main").version[1] == 1

    for asker in (one, two):
        inquiry = asker.core.comparing.begin(9, asker.now)
        run(one, two, seconds=6)

        # They cannot tell yet, and say so.
        result = inquiry.result()
        assert not result.agreed or result.agreed == ("agent-4",)
        (found,) = (e for e in result.uncompared if e.agent in ("agent-2", "agent-3"))
        assert found.reason.endswith("something differs that could not be traced to a place")
    one.loses = lambda frame: False
    run(one, two, seconds=6)
    inquiry = two.core.comparing.begin(9, two.now)
    run(one, two, seconds=2)

    assert inquiry.result() == Comparison(agreed=("agent-2",))
    assert one.heard(DivergenceDetected) == two.heard(DivergenceDetected) == []


def test_an_open_change_is_not_compared() -> None:
    agent = Agent(1)
    plan = agent.map("plan")
    plan.update(a=1, b=2)
    agent.counter("tokens").increment()
    agent.sealed()
    document = agent.document("main")
    before = summed(document)

    plan["a"] = 3
    plan["new"] = 4
    del plan["b"]
    agent.counter("tokens").increment()

    assert document.is_open
    assert summed(document) == before
    agent.sealed()
    assert summed(document) != before


# What they are made of

KEYS = [f"k{number}" for number in range(8)]

steps = st.lists(
    st.tuples(
        st.sampled_from(["put", "remove", "count", "add", "exchange", "snapshot", "again"]),
        st.integers(0, 2),
        st.integers(0, 7),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=60)
@given(steps)
def test_digests_are_equal_wherever_contents_are(history: list[tuple[str, int, int]]) -> None:
    # However it came about: by changes or snapshots, with or without what was summed up before.
    agents = [Agent(1), Agent(2), Agent(3)]
    memories = [Memory() for _ in agents]
    for what, who, number in history:
        agent = agents[who]
        match what:
            case "put":
                agent.map("plan")[KEYS[number]] = number
            case "remove":
                agent.map("plan").pop(KEYS[number], None)
            case "count":
                agent.counter("tokens").increment(number)
            case "add":
                agent.set("skills").add(number)
            case "exchange":
                exchange_all(*agents)
            case "snapshot":
                agent.load(agents[number % 3])
                memories[who] = Memory()
            case _:
                sum_up_all(agent, memories[who])
        agent.sealed()
    exchange_all(*agents)

    sums = [sum_up_all(agent, memory) for agent, memory in zip(agents, memories, strict=True)]
    anew = [sum_up_all(agent, Memory()) for agent in agents]

    assert contents(agents[0]) == contents(agents[1]) == contents(agents[2])
    assert sums[0] == sums[1] == sums[2] == anew[0] == anew[1] == anew[2]


def sum_up_all(agent: Agent, memory: Memory) -> Sums:
    return summed(agent.document("main"), memory)


def written(count: int) -> Document:
    """A document with a lane of many slots, of which some were written again."""
    agent = Agent(1)
    plan = agent.map("plan")
    for number in range(count + count // 4):
        plan[f"key {number * 7 % count}"] = number
        if number % 100 == 99:
            agent.sealed()
    agent.sealed()
    return agent.document("main")


def test_only_what_has_changed_is_summed_up_again() -> None:
    document, memory = written(3000), Memory()
    first, took = portions(sum_up(document, memory, 0.0))
    again, took_again = portions(sum_up(document, memory, 0.0))
    document.map("plan")["key 1"] = "new"
    document.seal()
    changed, took_then = portions(sum_up(document, memory, 0.0))
    aged, took_at_last = portions(sum_up(document, memory, 2.0))

    assert first == again != changed == aged
    assert sum(took) >= 3000
    assert sum(took_again) == 0
    # The segment that it was written to, and the one that it left.
    assert 0 < sum(took_then) <= 2 * lanes_module.SEGMENT_SLOTS
    assert sum(took_at_last) >= 3000
    assert max(took + took_at_last) <= lanes_module.SEGMENT_SLOTS


def test_a_lane_that_moves_on_between_portions_is_summed_up_as_of_one_moment() -> None:
    document = written(3000)
    work = sum_up(document, Memory(), 0.0)
    next(work)
    sums = None
    for now in itertools.count(1):
        try:
            work.send(float(now))
        except StopIteration as stop:
            sums = stop.value
            break
        if now in (5, 9, 13):
            document.map("plan")[f"key {now}"] = "meanwhile"
            document.seal()

    assert sums == summed(document)


def test_a_lane_that_never_rests_is_not_summed_up_and_others_are() -> None:
    busy, other = Agent(1), Agent(2)
    other.map("plan")["goal"] = "ship"
    exchange_all(busy, other)
    for number in range(3000):
        busy.map("plan")[f"key {number}"] = number
    busy.sealed()
    document, rng = busy.document("main"), random.Random(1)
    work = sum_up(document, Memory(), 0.0)
    next(work)
    sums = None
    for now in itertools.count(1):
        try:
            work.send(float(now))
        except StopIteration as stop:
            sums = stop.value
            break
        busy.map("plan")[f"key {rng.randrange(3000)}"] = now
        busy.sealed()

    assert isinstance(sums, Sums)
    assert sums.mark is None
    assert sums.lanes == {2: summed(document).lanes[2]}


def test_going_down_leads_to_every_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "LEAF_MAX", 1)
    document, memory = written(400), Memory()
    todo: list[bytes] = [b""]
    found: dict[str, int] = {}
    while todo:
        prefix = todo.pop()
        node = finish(list_slots(document, memory, 1, prefix))
        assert isinstance(node, digests.Node)
        if node.is_leaf:
            found |= node.entries
            assert len(node.entries) == node.size
        else:
            todo += [prefix + bytes((at,)) for at, child in enumerate(node.children) if child]

    assert len(found) == 400
    assert sum(found.values()) & digests.MASK == summed(document).lanes[1][1]
    for path in list(found)[:20]:
        assert digests.slot_digest(document, memory, 1, path) == found[path]


def test_paths_of_any_kind_and_from_anybody_have_a_name() -> None:
    assert describe("mplan\0goal") == "plan['goal']"
    assert describe("ctokens\0") == "tokens"
    assert describe("sskills\0" + values.pack_key(5, "")) == "skills[5]"
    assert describe("sskills\0\xff") == "skills['\xff']"
    assert describe("") == ""


# One writer, twice


def test_a_cloned_store_that_fooled_everybody_is_found_out() -> None:
    found_out()


def found_out() -> None:
    # Two copies of agent-1's store write as one writer, each to one half of the fleet.
    first = Node(1, QUIET)
    first.map("plan")["note"] = "same"
    first.act()
    copy = MemoryStore()
    for item in first.store.load():
        assert isinstance(item, Entry)
        copy.append([item])
    clone = Node(1, QUIET, session=99, store=copy)
    left, right = Node(2, QUIET), Node(3, QUIET)
    connect(first, left)
    connect(clone, right)
    first.map("plan")["goal"] = "left"
    clone.map("plan")["goal"] = "right"
    run(first, left, seconds=2)
    run(clone, right, seconds=2)
    first.disconnect(next(iter(first.links)))
    clone.disconnect(next(iter(clone.links)))
    connect(left, right)
    run(left, right, seconds=2)
    assert left.document("main").version == right.document("main").version

    inquiry = left.core.comparing.begin(2, left.now)
    run(left, right, seconds=2)

    assert inquiry.result().diverged == (("agent-3", "main", "plan['goal']", 1),)
    assert right.heard(DivergenceDetected) == [
        DivergenceDetected("agent-2", "main", "plan['goal']", 1)
    ]


# Peers that mean harm


def stranger() -> tuple[Node, Node, int]:
    """A node with content, a peer that can be made to say anything, and the node's number of it."""
    one, two = Node(1, QUIET), Node(2, QUIET)
    here, _ = connect(one, two)
    for number in range(1000):
        one.map("plan")[f"key {number}"] = number
    run(one, two, seconds=2)
    one.sent.clear()
    return one, two, here


def test_what_a_peer_may_have_gone_through_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "CREDIT_MAX", 20_000)
    monkeypatch.setattr(comparing, "CREDIT_RATE", 2_000)
    one, _, here = stranger()
    version = one.document("main").version
    lanes = tuple((writer, seq, 7) for writer, seq in version.items())
    spent = one.core.comparing.spent

    for number in range(2_000):
        one.core.receive(here, wire.Compare(number, "main", None, lanes, True), one.now)
        one.core.receive(
            here, wire.Digests("main", 1, version[1], b"", (7,) * 256, (), {}), one.now
        )
        one.core.tick(one.now)
        one.now += 0.01
        one.core.take(here)
    waited = 20

    took = one.core.comparing.spent - spent
    assert took <= comparing.CREDIT_MAX + comparing.CREDIT_RATE * waited + 2 * 1000
    assert len(one.core.comparing) <= comparing.JOBS_MAX


def test_one_that_asks_too_much_is_told_to_wait_and_others_are_not() -> None:
    one, two, here = stranger()
    three = Node(3, QUIET)
    three.now = one.now
    connect(one, three)
    run(one, two, three, seconds=2)
    one.core.comparing._credits[here] = 0.0, one.now
    nonce = 5
    one.core.receive(here, wire.Compare(nonce, "main", (0, 0)), one.now)
    exchange(one, two, three)

    inquiry = three.core.comparing.begin(1, three.now)
    run(one, two, three, seconds=1)

    assert wire.Compared(nonce, (Verdict.BUSY,)) in one.frames(wire.Compared)
    assert inquiry.result().agreed == ("agent-1",)


def test_false_claims_name_who_makes_them_and_change_nothing() -> None:
    one, two, here = stranger()
    document = one.document("main")
    before = contents_of(document)
    mark = document.version[1]

    for number in range(500):
        path, writer = f"mplan\0key {number}", 1 if number % 2 else 1000 + number
        claim = wire.Diverged("main", writer, mark if number % 2 else 0, path, 9, {})
        one.core.receive(here, claim, one.now)
        one.act()

    told = one.heard(DivergenceDetected)
    assert told and {event.agent for event in told if isinstance(event, DivergenceDetected)} == {
        "agent-2"
    }
    assert len(one.core.comparing.alarms) <= comparing.ALARMS_EACH
    assert contents_of(document) == before
    assert one.map("plan")["key 1"] == 1


def contents_of(document: Document) -> dict[str, dict[int, Slot]]:
    return document.lanes.canonical()


_one_stranger = functools.cache(stranger)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_frame_hurts(data: st.DataObject) -> None:
    one, _, here = _one_stranger()
    version = one.document("main").version
    writers = st.sampled_from([0, 1, 2, 77])
    marks = st.sampled_from([0, 1, version[1], 2**64 - 1])
    names = st.sampled_from(["main", "other", "@votes"])
    numbers = st.integers(0, 2**64 - 1)
    paths = st.sampled_from(["mplan\0key 1", "mplan\0none", "\0", "x", "s\0\xff", "ybody\0"])
    heads = st.dictionaries(st.integers(1, 9), st.integers(1, 9), max_size=3)
    slots = st.dictionaries(paths, numbers, max_size=5).map(lambda d: tuple(d.items()))
    frame = data.draw(
        st.one_of(
            st.builds(
                wire.Compare,
                numbers,
                names,
                st.none(),
                st.just(((1, version[1], 5), (9, 9, 9))),
                st.booleans(),
            ),
            st.builds(wire.Compare, numbers, names, st.tuples(marks, numbers)),
            st.builds(wire.Compared, numbers, st.lists(st.sampled_from(list(Verdict))).map(tuple)),
            st.builds(
                wire.Digests,
                names,
                writers,
                marks,
                st.binary(max_size=8),
                st.sampled_from([(), (3,) * 256]),
                slots,
                heads,
            ),
            st.builds(wire.Diverged, names, writers, marks, paths, st.none() | numbers, heads),
        )
    )
    before = contents_of(one.document("main"))

    one.core.receive(here, frame, one.now)
    one.act()
    one.now += 0.05
    one.core.tick(one.now)
    one.act()

    assert contents_of(one.document("main")) == before
    assert list(one.documents()) == ["main"]
    assert one.core.peers


# Real replicas


@asynchronous
async def test_replicas_compare_over_a_network() -> None:
    async with (
        Replica("ann", listen=LOCAL, config=QUIET) as ann,
        Replica("bob", peers=[url(ann)], config=QUIET) as bob,
    ):
        ann.map("plan")["goal"] = "ship"
        ann.document("notes", shared=True).text("body").insert(0, "text")
        bob.document("tasks").map("open")["one"] = 1
        await bob.synced(10)
        await ann.synced(10)

        assert await ann.compare(timeout=10) == Comparison(agreed=("bob",))
        found = asyncio.ensure_future(next_event(bob, DivergenceDetected))
        flip_value(bob.document("main"), PATH)
        bob._sync.comparing.forget("main")
        comparison = await ann.compare(timeout=10)

        assert comparison.diverged == (("bob", "main", "plan['goal']", ann.writer),)
        assert await found == DivergenceDetected("ann", "main", "plan['goal']", ann.writer)
        assert [each["path"] for each in ann.status()["divergences"]] == ["plan['goal']"]
        assert bob.glance().divergences == 1


@asynchronous
async def test_native_documents_are_compared_when_versions_are_equal() -> None:
    async with (
        Replica("ann", listen=LOCAL, config=QUIET) as ann,
        Replica("bob", peers=[url(ann)], config=QUIET) as bob,
    ):
        one, two = (each.document("notes", shared=True) for each in (ann, bob))
        one.text("body").insert(0, "some text")
        two.text("body").insert(0, "more ")
        two.native_map("meta")["title"] = {"b": 1.5, "a": [1, None, "x"]}
        await ann.synced(10)
        await bob.synced(10)
        assert await ann.compare(timeout=10) == Comparison(agreed=("bob",))

        # An edit that no change carries: what an engine that fails would make.
        assert two.native is not None
        other: Doc[Any] = Doc()
        other.apply_update(two.native.state())
        other.get("body", type=Text).insert(0, "x")
        two.native._sealed.apply_update(other.get_update())
        bob._sync.comparing.forget("notes")
        found = await ann.compare(timeout=10)

        assert found.diverged == (("bob", "notes", "body", 0),)


@asynchronous
async def test_comparing_with_a_number_that_is_none_is_refused() -> None:
    async with Replica("ann") as ann:
        with pytest.raises(UsageError, match="peers is a number above 0, not 0"):
            await ann.compare(peers=0)
        assert await ann.compare() == Comparison()


def test_a_blocking_replica_compares() -> None:
    with blocking.Replica("ann") as ann:
        assert ann.compare(timeout=5) == Comparison()


# Mutants


def leaves_out_the_value(patch: pytest.MonkeyPatch) -> None:
    def blind(path: str, slot: Slot | None, held: bytes | None) -> int:
        return digests.hash_of(path.encode(), bytes([slot is None, held is None]))

    patch.setattr(digests, "_digest", blind)


def skips_the_lanes_of_others(patch: pytest.MonkeyPatch) -> None:
    begin = digests.sum_up

    def own_only(document: Document, memory: Memory, since: float, writers: Any = None) -> Any:
        chosen = document.version if writers is None else writers
        return begin(document, memory, since, [w for w in chosen if w == document.writer])

    patch.setattr(digests, "sum_up", own_only)


def never_compares(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Comparing, "_compare_one", lambda self, now: None)


def answers_that_all_is_the_same(patch: pytest.MonkeyPatch) -> None:
    def answer(self: Comparing, link: Any, nonce: int, verdicts: tuple[Verdict, ...]) -> None:
        self._send(link.peer, wire.Compared(nonce, (Verdict.SAME,) * len(verdicts)))

    patch.setattr(Comparing, "_answer", answer)
    patch.setattr(Comparing, "_descend", lambda self, *rest: None)


def tells_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Comparing, "_tell", lambda self, *rest: None)


def trusts_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(comparing, "TRUSTED_FOR", 1e9)


def reads_the_index_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(digests, "_is_said", lambda held, slot: True)


def knows_no_strays(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(digests, "_is_stray", lambda document, writer, path: False)


def sums_up_what_is_open(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Document, "unsealed", {})


@pytest.mark.parametrize(
    ("plant", "scenario"),
    [
        (leaves_out_the_value, found_out),
        (skips_the_lanes_of_others, lambda: found_on_both_sides(flip_value)),
        (never_compares, lambda: found_on_both_sides(flip_value)),
        (answers_that_all_is_the_same, lambda: found_on_both_sides(flip_value)),
        (tells_nobody, lambda: found_on_both_sides(drop_everywhere)),
        (reads_the_index_only, lambda: found_on_both_sides(flip_in_doc)),
        (knows_no_strays, phantom_is_found),
        (trusts_for_ever, found_when_aged),
        (sums_up_what_is_open, test_an_open_change_is_not_compared),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_mutants_are_killed(
    plant: Callable[[pytest.MonkeyPatch], None],
    scenario: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scenario()
    plant(monkeypatch)

    with pytest.raises(AssertionError):
        scenario()
