"""The mesh: who finds whom, what members see of each other, and that changes go along one tree."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from test_sync import Node, connect, exchange, run

from crdtstate import Config, wire
from crdtstate.events import (
    Event,
    MemberDown,
    MemberRetired,
    MemberSuspected,
    MemberUp,
    PeerConnected,
)
from crdtstate.simulation import Simulation
from crdtstate.simulation.network import Datagrams
from crdtstate.simulation.shell import SimulatedReplica
from crdtstate.topology import RELAYS, SLACK

MEMBER_EVENTS = (MemberUp, MemberSuspected, MemberDown, MemberRetired)
Heard = tuple[float, str, str, str]
"""When, who, what, of whom."""


def heard(sim: Simulation, since: float = 0.0) -> list[Heard]:
    """The events about members."""
    return [
        (moment.at, moment.agent, type(moment.what).__name__, moment.what.agent)
        for moment in sim.events
        if moment.kind == "event" and isinstance(moment.what, MEMBER_EVENTS) and moment.at >= since
    ]


def counted(sim: Simulation, since: float = 0.0) -> Counter[tuple[str, str]]:
    """How often it was heard what of whom."""
    return Counter((what, agent) for _, _, what, agent in heard(sim, since))


def states(replica: SimulatedReplica) -> Counter[str]:
    return Counter(state for _, state in replica.core.mesh.members.others())


def settled(*args: int, until: float = 4.0, **options: object) -> Simulation:
    sim = Simulation(*args, **options)  # type: ignore[arg-type]
    sim.run(until)
    return sim


def assert_agreed(sim: Simulation) -> None:
    """All have the same table, and see each other up."""
    assert len({replica.core.mesh.members.fingerprint for replica in sim.replicas}) == 1
    assert len({replica.core.mesh.is_direct for replica in sim.replicas}) == 1
    for replica in sim.replicas:
        assert states(replica)["up"] == len(sim.replicas) - 1, f"{replica}: {states(replica)}"


def assert_one_tree(sim: Simulation) -> None:
    """The eager links are a tree of all, and no flood lasts."""
    by_writer = {replica.writer: replica for replica in sim.replicas}
    eager = set()
    roots = set()
    for replica in sim.replicas:
        tree = replica.core.mesh.tree
        assert not tree.is_flooding(sim.now), f"{replica} floods"
        roots.add(tree.root)
        for link in replica.core.peers:
            if tree.is_eager(link.peer, sim.now):
                eager.add((replica.writer, link.writer))
    assert len(roots) == 1
    assert all((two, one) in eager for one, two in eager)
    assert len(eager) == 2 * (len(by_writer) - 1)
    seen: set[int] = set()
    queue = [next(iter(by_writer))]
    while queue:
        at = queue.pop()
        if at not in seen:
            seen.add(at)
            queue += [two for one, two in eager if one == at and two is not None]
    assert len(seen) == len(by_writer), "the tree does not span the mesh"


def assert_no_event_twice(sim: Simulation) -> None:
    """To nobody the same is told of one writer twice in a row."""
    last: dict[tuple[str, int], type[Event]] = {}
    for moment in sim.events:
        if moment.kind in ("restarted", "crashed"):
            last = {key: what for key, what in last.items() if key[0] != moment.agent}
        if moment.kind == "event" and isinstance(moment.what, MEMBER_EVENTS):
            key = (moment.agent, moment.what.writer)
            assert last.get(key) is not type(moment.what), f"{moment}"
            last[key] = type(moment.what)


class Traffic:
    """Counts what is sent in a simulation."""

    def __init__(self, sim: Simulation) -> None:
        self.messages = self.bytes = self.copies = 0
        self.frames: Counter[str] = Counter()
        self._next: Callable[..., None] = sim._network._on_message
        sim._network._on_message = self._on_message

    def _on_message(
        self,
        sender: SimulatedReplica,
        frames: list[wire.Frame],
        message: bytes,
        receiver: SimulatedReplica,
    ) -> None:
        self.messages += 1
        self.bytes += len(message)
        for frame in frames:
            self.frames[type(frame).__name__] += 1
            if isinstance(frame, wire.Changes):
                self.copies += len(frame.changes)
        self._next(sender, frames, message, receiver)


class OneEntrance(Simulation):
    """A fleet of which everybody is told of the same one."""

    def _draw_seeds(self, host: object, most: int | None) -> list[str]:
        return [] if host is self._hosts[0] else ["agent-0"]


# Small meshes


@pytest.mark.parametrize("seed", range(5))
def test_agents_that_know_one_seed_become_a_complete_mesh(seed: int) -> None:
    sim = settled(seed, 5, seeds=1, until=3.0)

    assert all(replica.core.mesh.is_direct for replica in sim.replicas)
    assert all(len(replica.core.peers) == 4 for replica in sim.replicas)
    assert_agreed(sim)
    assert {what for _, _, what, _ in heard(sim)} == {"MemberUp"}
    assert len(heard(sim)) == 5 * 4


def test_a_mesh_at_rest_says_nothing_but_heartbeats() -> None:
    sim = settled(1, 10, until=10.0)
    traffic = Traffic(sim)

    sim.run(10.0)

    per_second = traffic.messages / 10 / 10
    print(f"{per_second:.1f} messages/s and {traffic.bytes / 10 / 10:.0f} B/s of each of 10")
    assert set(traffic.frames) == {"Heartbeat"}
    assert per_second <= 9.1
    assert traffic.bytes / 10 / 10 <= 300
    assert len(heard(sim)) == 10 * 9


@pytest.mark.parametrize("seed", range(3))
def test_a_crash_is_noticed_by_all_within_a_second(seed: int) -> None:
    sim = settled(seed, 8)
    since = sim.now

    sim.crash("agent-1")
    sim.run(1.0)

    others = [name for name in sim.names if name != "agent-1"]
    for name in others:
        told = [what for _, who, what, _ in heard(sim, since) if who == name]
        assert told == ["MemberSuspected", "MemberDown"]
    sim.run(60.0)
    assert len(heard(sim, since)) == 2 * len(others), "it oscillates"


def test_a_host_cut_off_silently_is_down_in_time_and_nobody_else_is() -> None:
    sim = settled(2, 6)
    since = sim.now

    sim.partition({"agent-1"}, silently=True)
    sim.run(12.0)

    others = [each for each in heard(sim, since) if each[1] != "agent-1"]
    assert Counter((what, of) for _, _, what, of in others) == {
        ("MemberSuspected", "agent-1"): 5,
        ("MemberDown", "agent-1"): 5,
    }
    assert states(sim["agent-1"]) == {"down": 5}
    assert sim["agent-0"].core.mesh.is_direct


@pytest.mark.parametrize("name", ["agent-0", "agent-3"])
def test_a_stall_of_five_seconds_is_suspected_by_all_neighbours_and_is_no_death(name: str) -> None:
    sim = settled(3, 5)
    since = sim.now

    sim.stall(name, 5.0)
    sim.run(20.0)

    assert counted(sim, since) == {("MemberSuspected", name): 4, ("MemberUp", name): 4}
    assert_agreed(sim)
    assert_one_tree(sim)


def test_one_that_slept_too_long_does_not_take_the_others_for_dead() -> None:
    sim = settled(4, 5)
    since = sim.now

    sim.stall("agent-2", 25.0)
    sim.run(40.0)

    assert counted(sim, since)["MemberDown", "agent-2"] == 4
    assert {of for _, _, what, of in heard(sim, since) if what == "MemberDown"} == {"agent-2"}
    assert_agreed(sim)


@pytest.mark.parametrize("silently", [False, True])
def test_both_sides_of_a_partition_see_each_other_down_and_up_and_converge(silently: bool) -> None:
    sim = settled(5, 6)
    half = {"agent-0", "agent-1", "agent-2"}
    since = sim.now

    sim.partition(half, silently=silently)
    sim["agent-0"].map("plan")["left"] = 1
    sim["agent-5"].map("plan")["right"] = 2
    sim.run(13.0)
    for replica in sim.replicas:
        assert states(replica) == {"up": 2, "down": 3}
        assert replica.core.mesh.is_direct
    sim.heal()
    healed = sim.now
    sim.until(lambda: all(len(dict(each.map("plan"))) == 2 for each in sim.replicas), 3.0)
    sim.run(3.0 - (sim.now - healed))

    assert_agreed(sim)
    downs = [each for each in heard(sim, since) if each[2] == "MemberDown"]
    assert len(downs) == 2 * 9
    assert all((who in half) != (of in half) for _, who, _, of in downs)
    assert [what for _, _, what, _ in heard(sim, healed)] == ["MemberUp"] * 2 * 9


def test_who_closes_is_retired_and_never_down() -> None:
    sim = settled(6, 6)
    since = sim.now

    sim.close("agent-2")
    sim.run(30.0)

    assert counted(sim, since)["MemberRetired", "agent-2"] == 5
    assert not any(what == "MemberDown" for _, _, what, _ in heard(sim, since))
    assert sim["agent-0"].core.mesh.is_direct
    back = sim.restart("agent-2")
    sim.run(3.0)
    assert_agreed(sim)
    assert back.core.mesh.is_direct


def test_a_link_that_works_one_way_only_makes_nobody_down() -> None:
    sim = settled(7, 5)
    since = sim.now

    sim.cut("agent-1", "agent-2", silently=True, both=False)
    sim.run(60.0)

    assert not any(what == "MemberDown" for _, _, what, _ in heard(sim, since))
    assert not any(replica.core.mesh.is_direct for replica in sim.replicas)
    assert_one_tree(sim)
    sim.heal()
    sim.run(3.0)
    assert all(replica.core.mesh.is_direct for replica in sim.replicas)


def test_a_link_that_flaps_makes_nobody_down() -> None:
    sim = settled(8, 5)
    since = sim.now

    for _ in range(60):
        sim.break_links("agent-1", "agent-2")
        sim.run(0.25)
    sim.run(5.0)

    assert {of for _, _, _, of in heard(sim, since)} == {"agent-1", "agent-2"}
    assert not any(what == "MemberDown" for _, _, what, _ in heard(sim, since))
    assert_no_event_twice(sim)
    assert_agreed(sim)


def test_one_host_that_is_cut_off_again_and_again_makes_only_itself_down() -> None:
    sim = settled(9, 5)
    since = sim.now

    for _ in range(8):
        sim.partition({"agent-1"}, silently=False)
        sim.run(1.3)
        sim.heal()
        sim.run(1.3)
    sim.run(5.0)

    others = [each for each in heard(sim, since) if each[1] != "agent-1"]
    assert {of for _, _, _, of in others} == {"agent-1"}
    assert_no_event_twice(sim)
    assert_agreed(sim)


def test_restarts_under_new_writers_leave_one_member() -> None:
    sim = settled(10, 5)

    for _ in range(5):
        sim.crash("agent-1", power=True)
        sim.run(0.3)
        sim.restart("agent-1")
        sim.run(2.0)
    # The connections of a host without power fall silent; they are reset when it is back.
    sim.run(12.0)

    assert_agreed(sim)
    assert states(sim["agent-0"]) == {"up": 4, "retired": 5}
    assert_no_event_twice(sim)
    sim.run(700.0)
    assert states(sim["agent-0"]) == {"up": 4}


def test_a_restart_with_the_clock_set_back_an_hour_is_believed() -> None:
    sim = settled(11, 4)
    sim.crash("agent-1")
    sim.run(2.0)

    sim.jump_clock("agent-1", -3600.0)
    sim.restart("agent-1")
    sim.run(3.0)

    assert_agreed(sim)
    assert all(replica.core.mesh.is_direct for replica in sim.replicas)


def test_lost_doubled_and_overtaken_messages_make_nobody_down() -> None:
    sim = Simulation(12, agents=8, loss=0.05, duplication=0.1, reordering=0.1)

    sim.run(60.0)

    assert not any(what == "MemberDown" for _, _, what, _ in heard(sim))
    assert_agreed(sim)
    assert_no_event_twice(sim)


# Relays


@pytest.fixture(scope="module")
def behind_relays() -> Simulation:
    return settled(1, 20, relays=2, until=6.0)


def test_agents_behind_relays_have_two_links_and_see_all(behind_relays: Simulation) -> None:
    sim = behind_relays

    assert {len(sim[name].core.peers) for name in sim.names if "agent" in name} == {RELAYS}
    assert_agreed(sim)
    assert_one_tree(sim)
    assert sim["relay-0"].core.mesh.tree.parent is None or (
        sim["relay-1"].core.mesh.tree.parent is None
    )


def test_a_leaf_that_dies_is_down_for_all_within_a_second(behind_relays: Simulation) -> None:
    sim = behind_relays
    since = sim.now

    sim.crash("agent-3")
    sim.run(1.0)

    assert counted(sim, since)["MemberDown", "agent-3"] == 21
    sim.restart("agent-3")
    sim.run(4.0)
    assert_agreed(sim)


def test_a_relay_may_go_and_come_back_and_so_may_all(behind_relays: Simulation) -> None:
    sim = behind_relays
    since = sim.now

    sim.crash("relay-0")
    sim.run(7.0)
    assert counted(sim, since) == {
        ("MemberSuspected", "relay-0"): 21,
        ("MemberDown", "relay-0"): 21,
    }
    assert_one_tree(sim)
    sim.crash("relay-1")
    sim.run(5.0)
    assert states(sim["agent-0"]) == {"down": 21}
    sim.restart("relay-1")
    sim.restart("relay-0")
    sim.run(5.0)

    assert_agreed(sim)
    assert_no_event_twice(sim)
    assert_one_tree(sim)


def test_dialable_agents_do_not_pile_up_links_for_a_relay_that_is_down() -> None:
    sim = settled(3, 17, until=1.0, relays=2)
    for host in sim._hosts:
        host.address = f"memory://{host.name}"
    for name in sim.names:
        sim.crash(name)
        sim.restart(name)
    sim.run(20.0)

    sim.crash("relay-0")
    sim.run(10.0)
    traffic, before = Traffic(sim), len(sim.events)
    sim.run(20.0)

    connected = [m for m in sim.events[before:] if isinstance(m.what, PeerConnected)]
    assert connected == []
    assert set(traffic.frames) == {"Heartbeat"}


# Large meshes


@pytest.fixture(scope="module")
def crowd() -> Simulation:
    """Forty agents that joined at once, through one of them."""
    return OneEntrance(1, agents=40)


def test_forty_that_join_through_one_find_each_other_within_seconds(crowd: Simulation) -> None:
    crowd.run(4.0)

    assert_agreed(crowd)
    assert {what for _, _, what, _ in heard(crowd)} == {"MemberUp"}
    assert len(heard(crowd)) == 40 * 39


def test_links_that_are_too_many_are_given_up_and_that_comes_to_rest(crowd: Simulation) -> None:
    crowd.run(30.0)
    config = crowd.config
    traffic, before = Traffic(crowd), len(crowd.events)

    crowd.run(90.0)

    assert len(crowd.events) == before, "links come and go for ever"
    degrees = sorted(len(replica.core.peers) for replica in crowd.replicas)
    most = config.active_links + SLACK
    assert config.active_links - 1 <= degrees[0]
    # One link more to the entrance, which is nobody's to give up but its own.
    assert degrees[-1] <= most + 1
    assert len(heard(crowd)) == 40 * 39
    per_second = traffic.messages / 40 / 90
    print(f"{per_second:.1f} messages/s and {traffic.bytes / 40 / 90:.0f} B/s of each of 40")
    assert set(traffic.frames) == {"Heartbeat"}
    assert per_second <= sum(degrees) / 40 + 0.1
    assert_agreed(crowd)
    assert_one_tree(crowd)


def test_changes_go_along_the_tree_and_hardly_any_twice(crowd: Simulation) -> None:
    rng = random.Random(1)
    traffic = Traffic(crowd)

    for number in range(60):
        crowd[rng.choice(crowd.names)].map("plan")[f"key-{number}"] = number
        crowd.run(0.1)
    crowd.settle()

    changes = len(crowd.oracle.births["main"])
    redundancy = traffic.copies / changes / (len(crowd.names) - 1) - 1
    print(f"redundancy {redundancy:.4f}")
    assert -0.001 <= redundancy <= 0.02
    assert_one_tree(crowd)


def test_in_a_large_mesh_a_crash_is_noticed_by_all_within_seconds(crowd: Simulation) -> None:
    for name in ("agent-0", "agent-7"):
        since = crowd.now

        crowd.crash(name)
        crowd.run(3.0)

        found = heard(crowd, since)
        assert {of for _, _, _, of in found} == {name}
        downs = [at - since for at, _, what, _ in found if what == "MemberDown"]
        print(f"down after {min(downs):.2f} to {max(downs):.2f} s")
        assert len(downs) == len(crowd.replicas)
        assert not any(what == "MemberUp" for _, _, what, _ in found), "it oscillates"
    for name in ("agent-0", "agent-7"):
        crowd.restart(name)
    crowd.run(10.0)
    assert_agreed(crowd)


def test_in_a_large_mesh_a_silent_host_is_down_in_time_and_nobody_else(crowd: Simulation) -> None:
    since = crowd.now

    crowd.partition({"agent-5"}, silently=True)
    crowd.run(12.5)

    others = [each for each in heard(crowd, since) if each[1] != "agent-5"]
    assert {of for _, _, _, of in others} == {"agent-5"}
    assert sum(what == "MemberDown" for _, _, what, _ in others) == 39
    crowd.heal()
    crowd.run(10.0)
    assert_agreed(crowd)


def test_when_a_quarter_dies_with_the_root_the_others_have_one_tree_again(
    crowd: Simulation,
) -> None:
    root = crowd.replicas[0].core.mesh.tree.root
    (first,) = (each.agent for each in crowd.replicas if each.core.mesh.tree.me == root)
    dead = {first, *random.Random(1).sample(crowd.names, 10)}
    since = crowd.now

    for name in dead:
        crowd.crash(name)
    crowd.run(8.0)

    assert_one_tree(crowd)
    assert {of for _, _, what, of in heard(crowd, since) if what == "MemberDown"} == dead
    for replica in crowd.replicas:
        assert states(replica) == {"up": 39 - len(dead), "down": len(dead)}
    for name in dead:
        crowd.restart(name)
    crowd.run(40.0)
    assert_agreed(crowd)
    assert_one_tree(crowd)


def test_the_halves_of_a_large_mesh_find_each_other_again(crowd: Simulation) -> None:
    half = set(crowd.names[::2])
    since = crowd.now

    crowd.partition(half, silently=False)
    crowd.run(8.0)
    assert all(states(each) == {"up": 19, "down": 20} for each in crowd.replicas)
    crowd["agent-0"].map("plan")["left"] = 1
    crowd["agent-1"].map("plan")["right"] = 2
    crowd.heal()
    healed = crowd.now
    crowd.until(
        lambda: all({"left", "right"} <= set(each.map("plan")) for each in crowd.replicas), 3.0
    )
    # Links beyond those wanted are given up now, and with them records get lost on their way.
    crowd.run(15.0)

    assert_agreed(crowd)
    assert all(what == "MemberUp" for _, _, what, _ in heard(crowd, healed))
    assert sum(what == "MemberDown" for _, _, what, _ in heard(crowd, since)) == 40 * 20
    assert_no_event_twice(crowd)


# Whatever happens


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happened_the_mesh_is_one_again_a_minute_later(seed: int) -> None:
    rng = random.Random(seed)
    config = Config(
        mesh_max=rng.choice((16, 4, 2)),
        active_links=rng.choice((2, 3, 6)),
        link_timeout=rng.choice((3.0, 10.0)),
    )
    loss = rng.choice((0.0, 0.0, 0.02))
    sim = Simulation(
        seed,
        agents=rng.choice((3, 5, 8, 12)),
        relays=rng.choice((0, 0, 1, 2)),
        seeds=rng.choice((None, 1, 2)),
        latency=rng.choice(((0.0005, 0.003), (0.01, 0.05), (0.01, 0.2))),
        skew=rng.choice((0.0, 100.0)),
        loss=loss,
        duplication=2 * loss,
        reordering=2 * loss,
        config=config,
    )

    for _ in range(rng.randrange(5, 20)):
        sim.run(rng.choice((0.1, 1.0, 5.0)))
        befall(sim, rng)
    for name in sim.names:
        if sim.up(name) is None:
            sim.restart(name)
    sim.heal()
    sim.snooze()
    sim.datagrams = Datagrams()
    sim.run(60.0)

    assert_agreed(sim)
    assert_one_tree(sim)
    assert_no_event_twice(sim)


def befall(sim: Simulation, rng: random.Random) -> None:
    """Let some accident happen to some host."""
    name, other = rng.sample(sim.names, 2)
    if sim.up(name) is None:
        sim.restart(name)
        return
    match rng.choice(("kill", "power", "close", "part", "heal", "stall", "break", "cut", "jump")):
        case "kill":
            sim.crash(name)
        case "power":
            sim.crash(name, power=True)
        case "close":
            sim.close(name)
        case "part":
            sim.partition(set(rng.sample(sim.names, len(sim.names) // 2)))
        case "heal":
            sim.heal()
        case "stall":
            sim.stall(name, rng.choice((1.0, 5.0, 15.0)))
        case "break":
            sim.break_links(name, other)
        case "cut":
            sim.cut(name, other, both=False)
        case "jump":
            sim.jump_clock(name, rng.choice((-3600.0, 3600.0)))


# Single cores: what a peer says, and what gets lost


def strangers(writers: range, seq: int = 1) -> Iterator[wire.Record]:
    for writer in writers:
        yield wire.Record(writer, writer, seq, f"agent-{writer}")


def tell(node: Node, peer: int, *records: wire.Record) -> None:
    items = tuple((each.writer, each.order, wire.encode_record(each)) for each in records)
    node.core.receive(peer, wire.Members(items), node.now)
    node.act()


def guest(node: Node, writer: int = 99) -> int:
    """A peer of which the test plays the other side."""
    node.core.peer_up(1000 + writer, node.now, url=None)
    node.core.receive(1000 + writer, wire.Hello(1, 1, writer, writer, "guest"), node.now)
    node.act()
    return 1000 + writer


def told(node: Node, peer: int) -> list[int]:
    """Of whom a peer was sent records, in order."""
    return [
        writer
        for at, frame in node.sent
        if at == peer and isinstance(frame, wire.Members)
        for writer, _, _ in frame.records
    ]


def test_who_asks_for_a_few_records_is_sent_no_others() -> None:
    one = Node(1)
    peer = guest(one)
    tell(one, peer, *strangers(range(50, 60)))
    other = guest(one, 98)
    one.sent.clear()

    one.core.receive(other, wire.Roll({52: 0, 57: 0}, is_answer=True), one.now)
    one.act()

    assert told(one, other) == [52, 57]


def test_a_roll_brings_both_sides_up_to_date() -> None:
    one, two = Node(1), Node(2)
    peer = guest(one)
    tell(one, peer, *strangers(range(50, 55)), *strangers(range(60, 62), seq=9))
    peer = guest(two, 98)
    tell(two, peer, *strangers(range(55, 65)))

    connect(one, two)
    exchange(one, two)

    here, there = one.core.mesh.members.orders(), two.core.mesh.members.orders()
    # Their own records have just changed, and are on their way.
    assert {w: here[w] for w in range(50, 65)} == {w: there[w] for w in range(50, 65)}
    assert here[60] == 18


def test_a_lost_record_is_made_up_for_although_others_change_all_the_time() -> None:
    one, two = Node(1), Node(2)
    connect(one, two)
    peer = guest(one)
    run(one, two, seconds=3)
    one.loses = lambda frame: isinstance(frame, wire.Members)
    tell(one, peer, *strangers(range(50, 51)))
    run(one, two, seconds=0.5)
    one.loses = lambda frame: False

    for turn in range(50):
        tell(one, peer, *strangers(range(60, 61), seq=2 + turn))
        run(one, two, seconds=0.9)

    assert 50 in two.core.mesh.members


def test_a_lost_record_is_made_up_for_soon_when_all_is_at_rest() -> None:
    one, two = Node(1), Node(2)
    connect(one, two)
    peer = guest(one)
    run(one, two, seconds=3)
    one.loses = lambda frame: isinstance(frame, wire.Members)
    tell(one, peer, *strangers(range(50, 51)))
    run(one, two, seconds=0.5)
    one.loses = lambda frame: False

    run(one, two, seconds=6)

    assert 50 in two.core.mesh.members


def test_what_others_say_of_oneself_is_outdone_and_spread() -> None:
    one, two = Node(1), Node(2)
    connect(one, two)
    peer = guest(one)
    run(one, two, seconds=3)
    claim = replace(one.core.mesh.members.me, seq=2**50, is_gone=True)

    tell(one, peer, claim)
    run(one, two, seconds=1)

    order = two.core.mesh.members.orders()[1]
    assert order == one.core.mesh.members.me.order > claim.order
    assert two.heard(MemberRetired) == []


def test_a_root_that_falls_silent_is_replaced_long_before_its_links_are_given_up() -> None:
    nodes = [Node(writer, session=writer) for writer in (1, 2, 3)]
    root, *others = nodes
    connect(root, others[0])
    connect(*others)
    connect(others[1], root)
    run(*nodes, seconds=4)
    assert {node.core.mesh.tree.root for node in nodes} == {root.core.mesh.tree.me}

    root.loses = lambda frame: True
    run(*nodes, seconds=6)

    assert {node.core.mesh.tree.root for node in others} == {others[0].core.mesh.tree.me}
    assert [len(node.core.peers) for node in others] == [2, 2]
