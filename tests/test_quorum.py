"""Questions through the mesh: who is asked, who answers, what is lost, and that nothing is left."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from test_sync import CONFIG, Node, connect, exchange, mesh, run, write

from crdtstate import Config, quorum, sync, wire
from crdtstate.clock import Version
from crdtstate.link import Link
from crdtstate.quorum import PATIENCE, RETRY_MAX, ROUTES_MAX, Question, Quorum
from crdtstate.simulation import Simulation
from crdtstate.sync import Sync

NOTHING = Version()


class Keeper(Node):
    """A node with a store that syncs what it commits at once, or when told to."""

    is_durable = True

    def __init__(self, writer: int, config: Config = CONFIG) -> None:
        super().__init__(writer, config)
        hello = wire.Hello(1, 1, writer, writer, self.agent, is_durable=self.is_durable)
        self.core = Sync(self, hello, config, random.Random(writer), 0.0)
        self.syncs = True
        self.hurries = 0

    def _carry_out(self, effect: sync.Effect) -> None:
        self.hurries += isinstance(effect, sync.Hurry)
        super()._carry_out(effect)

    def commit(self) -> None:
        super().commit()
        if self.syncs:
            self.sync()

    def sync(self) -> None:
        self.core.synced(self.persisted, self.now)

    def ask(self, *names: str, **options: Any) -> Question:
        """Ask *names* for what this node has of "main" by now, durably."""
        version = options.pop("version", self.core.committed_version("main"))
        asked = self.core.ask("main", version, names, self.now, **{"durable": True, **options})
        self.act()
        return asked


class Forgetful(Keeper):
    """A node without a store."""

    is_durable = False


def chain(count: int, kind: Callable[[int], Keeper] = Keeper) -> list[Keeper]:
    nodes = [kind(number) for number in range(1, count + 1)]
    for one, two in pairwise(nodes):
        connect(one, two)
    run(*nodes, seconds=5)
    return nodes


def star(count: int) -> list[Keeper]:
    """The first is connected with all others, which are not with each other."""
    nodes = [Keeper(number) for number in range(1, count + 1)]
    for node in nodes[1:]:
        connect(node, nodes[0])
    run(*nodes, seconds=5)
    return nodes


def full(count: int) -> list[Keeper]:
    nodes = [Keeper(number) for number in range(1, count + 1)]
    mesh(nodes)  # type: ignore[arg-type]
    return nodes


def is_ask(frame: wire.Frame) -> bool:
    return isinstance(frame, wire.Ask)


def is_answer(frame: wire.Frame) -> bool:
    return isinstance(frame, wire.Answer)


def waiting(*nodes: Keeper) -> int:
    """How many questions wait anywhere to be answered."""
    return sum(size for n in nodes for name, size, _ in n.core.loads() if name == "questions")


def alone(**options: Any) -> tuple[Quorum, list[tuple[int, wire.Frame]]]:
    """A quorum by itself, with what it sent; it has everything that is asked for, committed."""
    sent: list[tuple[int, wire.Frame]] = []
    options = {"committed": lambda name: Version({1: 10}), "hurry": lambda: None, **options}
    made = Quorum(
        "me", True, options["committed"], lambda p, f: sent.append((p, f)), options["hurry"]
    )
    return made, sent


def question(nonce: int, *names: str, version: Version = NOTHING, durable: bool = True) -> wire.Ask:
    return wire.Ask(nonce, 1, names, "main", version, durable)


# Ways


@pytest.mark.parametrize("build", [chain, star, full])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_everybody_who_is_asked_answers(build: Any, count: int) -> None:
    nodes = build(count)
    asker, names = nodes[-1], [node.agent for node in nodes]
    write(asker, "goal")
    asked = asker.ask(*names)

    run(*nodes, seconds=1)

    assert asked.is_settled
    assert sorted(asked.answers) == sorted(names)
    assert waiting(*nodes) == 0


def test_an_answer_comes_back_through_a_long_chain() -> None:
    nodes = chain(30)
    write(nodes[0], "goal")
    asked = nodes[0].ask(nodes[-1].agent, tell=True)

    run(*nodes, seconds=2)

    assert asked.answers == {nodes[-1].agent: nodes[0].core.committed_version("main")}


def test_those_who_are_connected_are_asked_without_others() -> None:
    nodes = star(5)
    asked = nodes[0].ask(nodes[3].agent)
    exchange(*nodes)

    assert asked.is_settled
    assert [sum(map(is_ask, [f for _, f in node.sent])) for node in nodes] == [1, 0, 0, 0, 0]


def test_a_question_that_names_nobody_is_for_all() -> None:
    nodes = chain(5)
    write(nodes[2], "goal")
    asked = nodes[2].ask()

    run(*nodes, seconds=1)

    assert sorted(asked.answers) == [node.agent for node in nodes]


def test_questions_die_out_where_ways_form_circles() -> None:
    config = Config(have_delay=0.01, mesh_max=2)
    nodes = [Keeper(number, config) for number in range(1, 9)]
    for at, node in enumerate(nodes):
        for other in (nodes[(at + 1) % 8], nodes[(at + 3) % 8]):
            connect(node, other)
    # All links are eager at first.
    exchange(*nodes)
    asked = nodes[0].ask("nobody", *(node.agent for node in nodes))
    exchange(*nodes)

    assert len(asked.answers) == 8
    links = sum(len(node.core.peers) for node in nodes)
    assert sum(len(node.frames(wire.Ask)) for node in nodes) <= links
    assert waiting(*nodes) == 0


def test_answers_die_out_where_ways_form_circles() -> None:
    # Two who each think that the other asked, as after a question that was asked again.
    one, two = alone(), alone()
    for made, _ in (one, two):
        made.on_ask(Link(5, None, 0, 0), question(7, "far"), 0.0, 0, 0)

    frame = wire.Answer(7, "far", NOTHING)
    passed = 0
    made, sent = one
    other = two
    made.on_answer(frame)
    while sent:
        passed += 1
        _, frame = sent.pop()  # type: ignore[assignment]
        (made, sent), other = other, (made, sent)
        made.on_answer(frame)

    assert passed == wire.HOPS_MAX


# What goes wrong


@pytest.mark.parametrize("is_lost", [is_ask, is_answer])
def test_what_is_lost_is_asked_again(is_lost: Callable[[wire.Frame], bool]) -> None:
    nodes = chain(4)
    nodes[1].loses = is_lost
    nodes[2].loses = is_lost
    asked = nodes[0].ask(*(node.agent for node in nodes))
    run(*nodes, seconds=3)
    assert nodes[3].agent not in asked.answers

    nodes[1].loses = nodes[2].loses = lambda frame: False
    run(*nodes, seconds=RETRY_MAX)

    assert asked.is_settled


def test_it_is_asked_again_less_and_less_often_and_for_ever() -> None:
    nodes = full(3)
    asked = nodes[0].ask("not yet there")
    before = len(nodes[0].frames(wire.Ask))

    run(*nodes, seconds=100)

    attempts = (len(nodes[0].frames(wire.Ask)) - before) // 2
    assert 100 / RETRY_MAX <= attempts <= 100 / RETRY_MAX + 6
    assert asked.attempt == attempts + 1
    assert nodes[0].core.next_deadline() <= nodes[0].now + RETRY_MAX


def test_a_settled_question_is_not_asked_again() -> None:
    nodes = full(3)
    nodes[0].ask(nodes[1].agent, nodes[2].agent)
    exchange(*nodes)
    before = len(nodes[0].frames(wire.Ask))

    run(*nodes, seconds=60)

    assert len(nodes[0].frames(wire.Ask)) == before


def test_a_voter_that_restarts_meanwhile_is_asked_again() -> None:
    one, two = full(2)
    two.commits = False
    write(one, "goal")
    asked = one.ask(two.agent)
    run(one, two, seconds=0.2)
    assert not asked.answers

    peer = next(iter(two.links))
    two.disconnect(peer)
    again = Keeper(2)
    again.now = one.now
    again.core = Sync(
        again,
        wire.Hello(1, 1, 2, 77, "agent-2", is_durable=True),
        CONFIG,
        random.Random(9),
        one.now,
    )
    connect(again, one)
    run(one, again, seconds=3)

    assert set(asked.answers) == {"agent-2"}


def test_a_way_back_that_broke_is_replaced_by_that_of_the_next_attempt() -> None:
    # Two ways from the first to the last; the question waits there while the first way breaks.
    left, one, two, right = nodes = [Keeper(number) for number in (1, 2, 3, 4)]
    connect(left, one)
    connect(one, right)
    run(*nodes[:2], right, seconds=3)
    right.commits = False
    write(left, "goal")
    asked = left.ask(right.agent)
    run(left, one, right, seconds=0.3)
    for node in (one,):
        for peer in list(node.links):
            node.disconnect(peer)
    two.now = left.now
    connect(left, two)
    connect(two, right)
    right.commits = True
    run(*nodes, seconds=4)

    assert asked.is_settled


def test_names_that_do_not_exist_harm_nobody() -> None:
    nodes = star(4)
    asked = nodes[1].ask("nobody", nodes[2].agent)

    run(*nodes, seconds=130)

    assert set(asked.answers) == {nodes[2].agent}
    assert waiting(*nodes) == 0
    nodes[1].core.withdraw(asked)
    before = len(nodes[1].frames(wire.Ask))
    run(*nodes, seconds=30)
    assert len(nodes[1].frames(wire.Ask)) == before


def test_an_answer_that_comes_after_the_question_was_withdrawn_harms_nobody() -> None:
    one, two = full(2)
    two.commits = False
    write(one, "goal")
    asked = one.ask(two.agent)
    exchange(one, two)
    one.core.withdraw(asked)

    two.commits = True
    run(one, two, seconds=1)

    assert asked.answers == {}
    assert len(two.frames(wire.Answer)) == 1
    assert waiting(one, two) == 0


# Who counts


def test_an_answer_of_somebody_who_was_not_asked_is_not_counted() -> None:
    one, two = full(2)
    asked = one.ask("relay-1", "relay-2", tell=True)

    there = one.core.peers[0].peer
    for name in ("relay-3", "agent-2"):
        one.core.receive(there, wire.Answer(asked.nonce, name, Version({5: 5})), one.now)

    assert asked.answers == {}


def test_an_agent_that_answers_twice_counts_once() -> None:
    one, two = full(2)
    asked = one.ask("relay-1", "relay-2")
    there = one.core.peers[0].peer

    for _ in range(2):
        one.core.receive(there, wire.Answer(asked.nonce, "relay-1", NOTHING), one.now)

    assert list(asked.answers) == ["relay-1"]
    assert not asked.is_settled


def test_an_answer_to_no_question_is_dropped() -> None:
    one, two = full(2)
    there = one.core.peers[0].peer
    before = len(one.sent)

    one.core.receive(there, wire.Answer(123, "relay-1", NOTHING), one.now)
    one.act()

    assert len(one.sent) == before


def test_who_asks_for_itself_answers_itself() -> None:
    node = Keeper(1)
    node.commits = False
    node.document("main").map("plan")["goal"] = "ship"
    node.act()
    asked = node.ask("agent-1", version=node.document("main").version)
    assert not asked.is_settled

    node.commit()

    assert asked.is_settled
    assert waiting(node) == 0


# When it is answered


def test_it_is_answered_once_the_version_is_committed() -> None:
    one, two = full(2)
    two.commits = False
    write(one, "goal")
    asked = one.ask(two.agent, durable=False)
    run(one, two, seconds=0.3)
    assert two.document("main").version == one.document("main").version
    assert not asked.answers

    two.commit()
    exchange(one, two)

    assert asked.is_settled


def test_a_durable_question_waits_until_the_store_has_synced() -> None:
    one, two = full(2)
    two.syncs = False
    write(one, "goal")
    hasty, lasting = one.ask(two.agent, durable=False), one.ask(two.agent)
    run(one, two, seconds=0.3)
    assert hasty.is_settled and not lasting.answers
    assert two.hurries >= 1

    two.sync()
    exchange(one, two)

    assert lasting.is_settled


def test_what_is_told_with_a_durable_answer_was_synced() -> None:
    one, two = full(2)
    write(two, "a")
    two.syncs = False
    write(two, "b")
    asked = one.ask(two.agent, version=NOTHING, tell=True)
    exchange(one, two)
    assert not asked.answers
    told = two.core.committed_version("main")
    number = two.persisted
    write(two, "c")

    two.core.synced(number, two.now)
    two.act()
    exchange(one, two)

    assert asked.answers == {two.agent: told}


def test_who_keeps_nothing_never_says_that_it_is_durable() -> None:
    nodes = [Keeper(1), Forgetful(2), Keeper(3)]
    mesh(nodes)  # type: ignore[arg-type]
    write(nodes[0], "goal")
    lasting, hasty = nodes[0].ask(), nodes[0].ask(durable=False)
    own = nodes[1].ask()

    run(*nodes, seconds=30)

    assert set(lasting.answers) == {"agent-1", "agent-3"}
    assert set(hasty.answers) == {"agent-1", "agent-2", "agent-3"}
    assert set(own.answers) == {"agent-1", "agent-3"}
    assert waiting(*nodes) == 0


def test_the_empty_version_is_answered_at_once() -> None:
    one, two = full(2)
    asked = one.ask(two.agent, version=NOTHING, tell=True)
    exchange(one, two)

    assert asked.answers == {two.agent: NOTHING}


def test_asking_again_does_not_put_off_an_answer() -> None:
    # A store that lags behind by more than the pause between attempts, and is never idle.
    made, sent = alone()
    link = Link(5, None, 0, 0)
    for attempt in range(1, 4):
        frame = wire.Ask(7, attempt, ("me",), "main", NOTHING, True)
        made.on_ask(link, frame, 0.0, 10 * attempt, 10 * (attempt - 1))

    assert [peer for peer, _ in sent] == [5]


def test_the_answer_goes_the_way_of_the_newest_attempt() -> None:
    made, sent = alone()
    made.on_ask(Link(5, None, 0, 0), wire.Ask(7, 1, ("me",), "main", NOTHING, True), 0.0, 10, 0)
    made.on_ask(Link(6, None, 0, 0), wire.Ask(7, 2, ("me",), "main", NOTHING, True), 0.0, 20, 0)

    made.progressed(None, 20, 20)

    assert [peer for peer, _ in sent] == [6]
    assert len(made) == 0


def test_after_a_change_of_writer_an_own_question_is_still_answered_here() -> None:
    made, _ = alone()
    asked = Question(7, frozenset(["me"]), "main", NOTHING, True, True, 0.0)
    made.ask(asked, 10, 5)
    assert not asked.is_settled

    made.reset()
    made.progressed(None, 20, 20)

    assert asked.is_settled


def test_what_was_committed_before_a_change_of_writer_is_not_counted() -> None:
    has = Version({1: 10})
    made, _ = alone(committed=lambda name: has)
    asked = Question(7, frozenset(["me", "other"]), "main", Version({1: 10}), True, False, 0.0)
    made.ask(asked, 10, 10)
    assert set(asked.answers) == {"me"}

    has = Version({1: 4})
    made.reset()
    made.progressed(None, 20, 20)

    assert asked.answers == {}


# Bounds


def test_what_waits_for_one_link_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quorum, "WAITING_EACH", 5)
    monkeypatch.setattr(quorum, "WAITING_MAX", 12)
    made, sent = alone()
    future = Version({1: 99})
    for peer in range(4):
        for number in range(10):
            frame = question(100 * peer + number, "me", version=future)
            made.on_ask(Link(peer, None, 0, 0), frame, 0.0, 0, 0)
            assert len(made) <= min(12, 5 * (peer + 1))
    assert len(made) == 12

    # Who is in again asks anew and is not one more.
    made.on_ask(Link(0, None, 0, 0), wire.Ask(0, 2, ("me",), "main", future, True), 0.0, 0, 0)
    assert len(made) == 12
    # What is asked here is never refused.
    made.ask(Question(999, frozenset(["me"]), "main", future, True, False, 0.0), 0, 0)
    assert len(made) == 13


def test_what_waits_is_given_up_after_a_while_but_not_what_was_asked_here() -> None:
    made, _ = alone()
    future = Version({1: 99})
    made.on_ask(Link(5, None, 0, 0), question(7, "me", version=future), 0.0, 0, 0)
    made.ask(Question(8, frozenset(["me"]), "main", future, True, False, 0.0), 0, 0)

    made.expire(PATIENCE - 0.1)
    assert len(made) == 2
    made.expire(PATIENCE)
    assert len(made) == 1
    made.expire(10 * PATIENCE)
    assert len(made) == 1


def test_a_core_gives_up_what_nobody_asks_any_more() -> None:
    nodes = chain(3)
    future = Version({99: 99})
    nodes[0].ask(nodes[2].agent, version=future)
    exchange(*nodes)
    assert waiting(*nodes) == 1

    for peer in list(nodes[0].links):
        nodes[0].disconnect(peer)
    run(*nodes[1:], seconds=PATIENCE + 2)

    assert waiting(*nodes) == 0


def test_ways_that_are_remembered_are_bounded_also_for_own_questions() -> None:
    made, _ = alone()
    for number in range(ROUTES_MAX + 10):
        asked = Question(number, frozenset(["other"]), "main", NOTHING, True, False, 0.0)
        made.ask(asked, 0, 0)
        made.forget(asked)
    assert made.routes == ROUTES_MAX

    for number in range(50):
        made.on_ask(Link(5, None, 0, 0), question(10**9 + number, "other"), 0.0, 0, 0)
    assert made.routes == ROUTES_MAX


def test_nothing_is_left_of_a_thousand_questions() -> None:
    nodes = full(3)
    for number in range(1000):
        asked = nodes[number % 3].ask(*(node.agent for node in nodes))
        exchange(*nodes)
        assert asked.is_settled
        nodes[number % 3].core.withdraw(asked)

    assert waiting(*nodes) == 0
    assert all(not node.core._quorum._questions for node in nodes)


# In a simulated fleet


@pytest.mark.parametrize("seed", range(6))
def test_in_a_tree_that_is_torn_all_answer_in_the_end(seed: int) -> None:
    config = Config(mesh_max=4, active_links=3)
    sim = Simulation(seed, 14, relays=2, loss=0.05, config=config)
    sim.run(4)
    asker = sim["agent-0"]
    asker.map("plan")["goal"] = "ship"
    sim.run(0.5)
    version = asker.core.committed_version("main")
    asked = asker.core.ask("main", version, sim.names, sim.now, durable=True)
    asker._wake()

    sim.crash("relay-0")
    sim.run(3)
    sim.restart("relay-0")
    sim.until(lambda: asked.is_settled, timeout=40)

    for name in sim.names:
        assert version <= sim.synced_version(name, "main")
    sim.end()
