"""Votes: a majority decides, a minority never does, and every replica reads the same."""

from __future__ import annotations

import itertools
import random
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from harness import Agent, asynchronous, exchange
from hypothesis import example, given, settings
from hypothesis import strategies as st

from crdtstate import Config, Replica
from crdtstate import votes as votes_module
from crdtstate.clock import COUNTER_BITS, Dot, Stamp
from crdtstate.conflict import VOTE, Candidate, Conflict, Decision
from crdtstate.errors import InvalidUpdate, NotAllowed, UsageError
from crdtstate.stores.file import read_documents, reading
from crdtstate.votes import ELECTORATE, VOTES, Ballot, Electorate, count, poll
from tests.fleet_mesh import Members, even

NAMES = ("ann", "bob", "cy", "dan", "eve")
MINUTE = 60_000


def electorate(voters: int = 5, deadline_ms: int = MINUTE) -> Electorate:
    return Electorate(NAMES[:voters], deadline_ms)


def stamp(ms: int) -> Stamp:
    return Stamp(ms << COUNTER_BITS)


def candidates_of(*values: Any) -> list[Candidate]:
    return [Candidate(v, at, NAMES[at - 1], stamp(at), at) for at, v in enumerate(values, 1)]


def ballot(agent: int, choice: int, ms: int = 10) -> Ballot:
    return Ballot(NAMES[agent], Dot(choice, choice), stamp(ms), agent + 1)


# The count


ballots = st.lists(
    st.builds(ballot, st.integers(0, 4), st.integers(1, 4), st.integers(5, 12)), max_size=12
)


@given(cast=ballots, voters=st.integers(1, 5), seed=st.integers(0, 99))
@example(cast=[ballot(0, 1, 8), ballot(0, 2, 8)], voters=1, seed=1)
def test_the_count_knows_no_order_of_arrival(cast: list[Ballot], voters: int, seed: int) -> None:
    found = candidates_of("a", "b", "c", "a")
    who = electorate(voters, deadline_ms=6)  # up to stamp 10
    shuffled = random.Random(seed).sample(cast, len(cast))

    assert count(found, shuffled, who) == count(found, cast, who)


@given(cast=ballots, voters=st.integers(1, 5))
def test_a_majority_wins_and_a_minority_never(cast: list[Ballot], voters: int) -> None:
    found = candidates_of("a", "b", "c", "a")
    who = electorate(voters, deadline_ms=6)

    decision = count(found, cast, who)

    # The specification, without cleverness: the newest vote in time of each voter.
    supporters: dict[str, set[str]] = {}
    for name in who.voters:
        timely = [b for b in cast if b.agent == name and b.stamp <= stamp(10)]
        if timely:
            newest = max(b.stamp for b in timely)
            choice = max(b.choice for b in timely if b.stamp == newest)
            supporters.setdefault(found[choice.writer - 1].value, set()).add(name)
    won = [value for value, names in supporters.items() if 2 * len(names) > voters]
    if won:
        assert (decision.value, decision.rule) == (won[0], VOTE)
    else:
        assert (decision.value, decision.rule) == ("a", "lww"), "the last write is the fourth"


def test_equal_values_of_different_writers_stand_together() -> None:
    found = candidates_of("a", "b", "a")

    decision = count(found, [ballot(0, 1), ballot(1, 3), ballot(2, 2)], electorate(3))

    assert decision[:2] == ("a", VOTE)


def test_a_tie_goes_to_the_last_write() -> None:
    votes = [ballot(0, 1), ballot(1, 1), ballot(2, 2), ballot(3, 2)]

    assert count(candidates_of("a", "b"), votes, electorate(4))[:2] == ("b", "lww")


def test_a_vote_beyond_the_deadline_is_shown_and_does_not_count() -> None:
    found = candidates_of("a", "b")
    end = 2 + MINUTE
    votes = [ballot(0, 1, end), ballot(1, 1, end + 1)]

    decision = count(found, votes, electorate(3))

    assert decision[:2] == ("b", "lww")
    assert [(v.agent, v.counts) for v in decision.votes] == [("ann", True), ("bob", False)]
    assert count(found, [*votes, ballot(2, 1, end)], electorate(3))[:2] == ("a", VOTE)


def test_a_vote_beyond_the_deadline_does_not_undo_one_in_time() -> None:
    votes = [ballot(0, 1, 10), ballot(0, 2, 2 + MINUTE + 1)]

    assert count(candidates_of("a", "b"), votes, electorate(1))[:2] == ("a", VOTE)


def test_values_that_python_does_not_compare_can_be_chosen() -> None:
    found = candidates_of(float("nan"), {"a": [1]}, None)

    for at, candidate in enumerate(found, 1):
        decision = count(found, [ballot(0, at)], electorate(1))
        assert decision.value is candidate.value and decision.rule == VOTE


def test_what_conflicts_decides_which_poll_it_is() -> None:
    dots = [Dot(1, 1), Dot(2, 7)]
    names = {
        poll("main", "mplan", "goal", dots),
        poll("main", "mplan", "goal", [*dots, Dot(3, 1)]),
        poll("main", "mplan", "goal", dots[:1]),
        poll("main", "mplan", "other", dots),
        poll("main", "rplan", "goal", dots),
        poll("mai", "nmplan", "goal", dots),
    }

    assert len(names) == 6
    assert poll("main", "mplan", "goal", reversed(dots)) in names


# Voting


def agents(number: int = 3) -> list[Agent]:
    return [Agent(at, NAMES[at - 1]) for at in range(1, number + 1)]


def disagree(*who: Agent, key: str = "goal") -> None:
    """Let each write its name, knowing nothing of the others."""
    for agent in who:
        agent.map("plan", strategy=VOTE)[key] = agent.agent


def conflict_at(agent: Agent, key: str = "goal") -> Conflict:
    (found,) = [c for c in agent.conflicts() if c.key == key]
    return found


def vote(agent: Agent, value: Any, key: str = "goal", *, voters: int = 3) -> None:
    agent.polls.cast(conflict_at(agent, key), value, electorate(voters))


def ballots_in(agent: Agent) -> list[str]:
    book = agent.find(VOTES)
    return sorted(key.partition("/")[2] for key in book.map("ballots")) if book else []


def test_the_majority_is_read_everywhere_also_by_those_who_have_no_vote() -> None:
    ann, bob, cy = everyone = agents()
    witness = Agent(9, "witness")
    disagree(*everyone)
    exchange(*everyone, witness)
    assert {a.map("plan")["goal"] for a in everyone} == {"cy"}, "the last write"

    vote(ann, "ann")
    exchange(*everyone, witness)
    assert {a.map("plan")["goal"] for a in (*everyone, witness)} == {"cy"}
    vote(bob, "ann")
    exchange(*everyone, witness)

    assert {a.map("plan")["goal"] for a in (*everyone, witness)} == {"ann"}
    told = witness.map("plan").explain("goal")
    assert (told.value, told.rule, told.winner) == ("ann", VOTE, told.candidates[0])
    assert [(v.agent, v.value, v.counts) for v in told.votes] == [
        ("ann", "ann", True),
        ("bob", "ann", True),
    ]
    assert "vote of bob for 'ann'" in str(told)
    (found,) = cy.conflicts()
    assert (found.value, found.rule, found.strategy) == ("ann", VOTE, VOTE)
    assert found.votes == told.votes


def test_who_votes_again_has_one_vote() -> None:
    ann, bob, cy = everyone = agents()
    disagree(*everyone)
    exchange(*everyone)
    vote(ann, "ann")
    exchange(*everyone)
    vote(ann, "bob")
    vote(bob, "ann")
    exchange(*everyone)
    assert cy.map("plan")["goal"] == "cy"

    vote(ann, "ann")
    exchange(*everyone)
    assert {a.map("plan")["goal"] for a in everyone} == {"ann"}


def test_a_register_is_voted_on_too() -> None:
    ann, bob = everyone = agents(2)
    for agent in everyone:
        agent.register("leader", strategy=VOTE).value = agent.agent
    exchange(*everyone)
    for agent in everyone:
        agent.polls.cast(agent.conflicts()[0], "ann", electorate(2))
    exchange(*everyone)

    assert bob.register("leader").value == ann.register("leader").value == "ann"
    assert bob.register("leader").explain().rule == VOTE


def test_overlapping_conflicts_are_different_questions() -> None:
    ann, bob, cy = everyone = agents()
    disagree(*everyone)
    exchange(ann, bob)
    vote(ann, "ann")
    vote(bob, "ann")
    exchange(ann, bob)
    assert ann.map("plan")["goal"] == bob.map("plan")["goal"] == "ann"

    exchange(*everyone)

    # Nobody was asked about three candidates yet.
    assert {a.map("plan")["goal"] for a in everyone} == {"cy"}
    assert conflict_at(cy).votes == ()
    vote(cy, "ann")
    vote(bob, "ann")
    exchange(*everyone)
    assert {a.map("plan")["goal"] for a in everyone} == {"ann"}


def test_a_candidate_taken_back_brings_the_old_question_back() -> None:
    ann, bob, cy = everyone = agents()
    disagree(ann, bob)
    exchange(ann, bob)
    vote(ann, "ann")
    vote(bob, "ann")
    cy.map("plan")["goal"] = "cy"
    exchange(cy, Agent(9))
    del cy.map("plan")["goal"]  # without having heard of the others
    cy.sealed()
    ann.receive(cy.outbox[0])
    assert ann.map("plan")["goal"] == "cy"
    vote(ann, "cy")  # sweeps, but the votes on the first two are still good

    exchange(*everyone)

    assert {a.map("plan")["goal"] for a in everyone} == {"ann"}
    assert conflict_at(cy).votes[0].value == "ann"


def test_another_writer_cannot_vote_in_ones_name() -> None:
    ann, bob, cy = everyone = agents()
    disagree(*everyone)
    exchange(*everyone)
    vote(ann, "ann")
    exchange(*everyone)
    book = cy.document(VOTES).map("ballots")
    ((key, value),) = book.items()
    book[key.replace("/ann", "/bob")] = value
    exchange(*everyone)

    assert {a.map("plan")["goal"] for a in everyone} == {"cy"}
    assert [v.agent for v in conflict_at(bob).votes] == ["ann"]


NONSENSE = [None, 7, [], [1, 2, "main", "mplan", "goal", [1]], [1, 2, 3, 4, 5, []], {"a": 1}]


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_what_is_no_vote_counts_for_nothing(nonsense: Any) -> None:
    ann, bob, _ = everyone = agents()
    disagree(*everyone)
    exchange(*everyone)
    vote(ann, "ann")
    (key,) = ann.document(VOTES).map("ballots")
    bob.system_document(VOTES).map("ballots")[key.replace("/ann", "/bob")] = nonsense
    bob.document(VOTES).map("rules")["other"] = nonsense
    exchange(*everyone)
    assert {a.map("plan")["goal"] for a in everyone} == {"cy"}

    bob.document(VOTES).map("rules")["electorate"] = nonsense
    exchange(*everyone)
    assert {a.map("plan")["goal"] for a in everyone} == {"cy"}
    vote(bob, "ann")
    exchange(*everyone)
    assert {a.map("plan")["goal"] for a in everyone} == {"ann"}


def test_a_document_of_votes_of_the_other_type_decides_nothing() -> None:
    ann, bob = everyone = agents(2)
    disagree(*everyone)
    exchange(*everyone)
    ann.system_document(VOTES, shared=True).text("body").insert(0, "hello")
    # Nobody takes it in; where it was made, it decides nothing.
    with pytest.raises(InvalidUpdate, match="no native types"):
        exchange(*everyone)

    assert not bob.system_document(VOTES).version
    assert {a.map("plan")["goal"] for a in everyone} == {"bob"}
    with pytest.raises(UsageError, match="shared=True"):
        vote(ann, "ann", voters=2)


def test_a_vote_that_would_not_count_is_refused() -> None:
    ann, bob, cy = everyone = agents()
    disagree(ann, bob)
    exchange(*everyone)
    before = conflict_at(ann)

    def refused(match: str, conflict: Conflict = before, value: Any = "ann", voters: int = 3):
        with pytest.raises(UsageError, match=match):
            cy.polls.cast(conflict, value, electorate(voters))

    refused("'cy' has no vote.*ann, bob", voters=2)
    refused(r"main: plan\['goal'\]: 'eve' is none of the candidates: 'ann', 'bob'", value="eve")
    for _ in range(5):
        cy.next_stamp()  # time passes
    with pytest.raises(UsageError, match="votes counted until 1970.*vote_deadline"):
        cy.polls.cast(before, "ann", electorate(3, deadline_ms=1))
    cy.map("plan").use_strategy("max")
    refused("'max' decides there, not votes")
    cy.map("plan").use_strategy(VOTE)
    cy.map("plan")["goal"] = "over"
    refused("not in conflict as given any more")
    refused("not in conflict", conflict=Conflict("absent", "map", "plan", "goal", ()))
    with cy.transaction(), pytest.raises(UsageError, match="inside a transaction"):
        cy.polls.cast(before, "ann", electorate())
    exchange(*everyone)
    assert ballots_in(ann) == []


# What is left


def test_who_resolves_removes_the_votes() -> None:
    everyone = ann, bob, cy = agents()
    disagree(*everyone)
    exchange(*everyone)
    for agent in everyone:
        vote(agent, "ann")
    exchange(*everyone)
    assert ballots_in(cy) == ["ann", "bob", "cy"]

    bob.map("plan").resolve("goal", bob.map("plan")["goal"])
    exchange(*everyone)

    assert {a.map("plan")["goal"] for a in everyone} == {"ann"}
    assert [a.conflicts() for a in everyone] == [[], [], []]
    assert [ballots_in(a) for a in everyone] == [[], [], []]


def test_a_vote_on_what_was_resolved_meanwhile_is_swept_by_the_next() -> None:
    everyone = ann, bob, cy = agents()
    disagree(*everyone)
    exchange(*everyone)
    bob.map("plan").resolve("goal", "bob")
    vote(cy, "cy")  # has not heard of it
    exchange(*everyone)
    assert ballots_in(ann) == ["cy"]

    disagree(*everyone, key="next")
    exchange(*everyone)
    vote(ann, "ann", "next")
    exchange(*everyone)
    assert ballots_in(cy) == ["ann"]


def test_votes_do_not_grow_with_the_number_of_conflicts() -> None:
    everyone = ann, bob, cy = agents()
    for number in range(60):
        disagree(*everyone, key=f"k{number}")
        exchange(*everyone)
        if number % 2:
            vote(ann, "ann", f"k{number}")
            exchange(ann, cy)
            cy.map("plan").resolve(f"k{number}", "ann")
        else:
            cy.map("plan").resolve(f"k{number}", "cy")
        vote(bob, "bob", f"k{number}")  # always too late
        exchange(*everyone)
        assert len(ballots_in(ann)) <= 2


# All of it, in any order


steps = st.lists(
    st.tuples(
        st.sampled_from(["write", "vote", "vote", "hear", "resolve", "remove", "restart"]),
        st.integers(0, 2),
        st.integers(0, 2),
        st.sampled_from(["a", "b"]),
    ),
    max_size=24,
)


def restarted(agent: Agent) -> Agent:
    """The same agent, as it comes back from its store or from its peers."""
    twin = Agent(agent._writer, agent.agent)
    twin.load(agent)
    twin.outbox = agent.outbox
    return twin


def act(everyone: list[Agent], verb: str, who: int, other: int, key: str) -> None:
    agent = everyone[who]
    plan = agent.map("plan")
    match verb:
        case "write":
            plan[key] = agent.agent
        case "remove":
            plan.pop(key, None)
        case "hear":
            exchange(agent, everyone[other])
        case "restart":
            everyone[who] = restarted(agent)
        case _:
            found = [c for c in agent.conflicts() if c.key == key]
            for conflict in found:
                value = conflict.candidates[other % len(conflict.candidates)].value
                if verb == "vote":
                    agent.polls.cast(conflict, value, electorate(3))
                else:
                    plan.resolve(key, value)


def readings(agent: Agent) -> Any:
    plan = agent.map("plan")
    return dict(plan), [(c.key, c.value, c.rule, c.votes) for c in agent.conflicts()]


OVER_A_VOTE = [
    ("write", 0, 0, "a"),
    ("write", 1, 0, "a"),
    ("hear", 0, 1, "a"),
    ("vote", 0, 0, "a"),
    ("write", 0, 0, "a"),
]


@settings(max_examples=150, deadline=None)
@example(story=OVER_A_VOTE, seed=0, dead=0)
@given(story=steps, seed=st.integers(0, 2**16), dead=st.integers(0, 3))
def test_replicas_of_equal_versions_read_the_same(
    story: list[tuple[str, int, int, str]], seed: int, dead: int
) -> None:
    everyone = agents()
    everyone[0].map("plan", strategy=VOTE)
    exchange(*everyone)
    for step in story:
        act(everyone, *step)
        if dead < 3 and step[1] == dead and step[0] == "vote":
            dead = 9  # from now on nobody hears of it but through what was said
    changes = [change for agent in everyone for change in (agent.sealed(), agent.outbox)[1]]
    rng = random.Random(seed)
    replicas = [Agent(10 + at, f"reader-{at}") for at in range(3)]
    for replica in replicas:
        waiting = changes * 2
        while waiting:
            rng.shuffle(waiting)
            for change in list(waiting):
                document = replica.find_or_make(change.document, change.shared)
                if document.version.covers(change.dot) or document.is_ready(change):
                    replica.receive(change)
                    waiting.remove(change)
    joined = Agent(20, "joiner")
    for agent in everyone:
        joined.load(agent)
    exchange(*everyone)

    assert {str(a.version()) for a in (*everyone, *replicas, joined)} == {str(joined.version())}
    for agent in (*everyone, *replicas, joined):
        assert readings(agent) == readings(joined)


@settings(max_examples=60, deadline=None)
@given(
    choices=st.lists(st.integers(0, 2), min_size=5, max_size=5),
    silent=st.sets(st.integers(0, 4)),
    seed=st.integers(0, 2**16),
)
def test_any_subset_of_voters_in_any_order(choices: list[int], silent: set[int], seed: int) -> None:
    everyone = agents(5)
    disagree(*everyone[:3])
    exchange(*everyone)
    rng = random.Random(seed)
    for who in rng.sample(range(5), 5):
        if who not in silent:
            vote(everyone[who], NAMES[choices[who]], voters=5)
            if rng.random() < 0.5:
                exchange(*rng.sample(everyone, 2))
    exchange(*everyone)

    cast = [choices[who] for who in range(5) if who not in silent]
    (won,) = [c for c in range(3) if cast.count(c) >= 3] or [2]
    assert {agent.map("plan")["goal"] for agent in everyone} == {NAMES[won]}


# Mutants: what the stories above must not let pass


def _by_those_who_voted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Electorate, "majority", property(lambda self: 1))


def _no_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = votes_module.poll
    monkeypatch.setattr(
        votes_module, "poll", lambda name, container, key, dots: honest(name, container, key, [])
    )


def _anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    def cast_in(book: Any, name: str, voters: Any) -> Any:
        for agent, candidate in itertools.product(voters, [None]):
            for candidate in book.live(f"{name}/{agent}"):
                parsed = votes_module._parse(candidate.value)
                if parsed is not None:
                    yield Ballot(agent, parsed[0], candidate.stamp, candidate.writer)

    monkeypatch.setattr(votes_module, "_cast_in", cast_in)


def _eager_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_void(self: Any, value: Any) -> bool:
        _, (name, container, key), dots = votes_module._parse(value)  # type: ignore[misc]
        document = self._documents.find(name)
        return document is None or document.live_dots(container, key) != frozenset(dots)

    monkeypatch.setattr(votes_module.Polls, "_is_void", is_void)


def _no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(votes_module.Polls, "_sweep", lambda self: None)


@pytest.mark.parametrize(
    ("mutate", "story"),
    [
        (_by_those_who_voted, test_a_tie_goes_to_the_last_write),
        (_no_dots, test_overlapping_conflicts_are_different_questions),
        (_anybody, test_another_writer_cannot_vote_in_ones_name),
        (_eager_sweep, test_a_candidate_taken_back_brings_the_old_question_back),
        (_no_sweep, test_votes_do_not_grow_with_the_number_of_conflicts),
    ],
)
def test_the_stories_catch(monkeypatch: pytest.MonkeyPatch, mutate: Any, story: Any) -> None:
    mutate(monkeypatch)

    with pytest.raises(AssertionError):
        story()


def test_nothing_voted_is_the_last_write() -> None:
    assert count(candidates_of("a", "b"), [], electorate()) == Decision("b", "lww", ())


# Replicas

LOCAL = "ws://127.0.0.1:0"
CONFIG = Config(voters=["ann", "bob", "cy"], link_timeout=1.0, heartbeat=0.2)


@asynchronous
async def test_voters_die_and_come_back_and_all_read_the_same(tmp_path: Path) -> None:
    stores = {name: tmp_path / f"{name}.db" for name in CONFIG.voters}
    async with Replica("relay", listen=LOCAL, role="relay") as relay, AsyncExitStack() as stack:

        async def opened(name: str) -> Replica:
            agent = Replica(name, store=stores[name], peers=[str(relay.address)], config=CONFIG)
            return await stack.enter_async_context(agent)

        ann, bob, cy = [await opened(name) for name in CONFIG.voters]
        await even(ann, bob, cy, relay)
        for agent in (ann, bob, bob, cy, cy):
            # Twice, each in a change of its own, to be later than hers in any one millisecond.
            agent.register("leader", strategy="vote").value = agent.agent
            agent.version()
        await even(ann, bob, cy, relay)
        bob.vote(bob.conflicts()[0], "ann")
        await even(ann, bob, cy, relay)
        await bob.close()
        assert cy.register("leader").value == relay.register("leader").value != "ann"

        # The dead one's vote counts: with one more it is a majority of three.
        cy.vote(cy.conflicts()[0], "ann")
        await even(ann, cy, relay)
        bob = await opened("bob")
        await even(ann, bob, cy, relay)
        for replica in (ann, bob, cy, relay):
            assert replica.register("leader").value == "ann"
            assert replica.register("leader").explain().rule == VOTE

        await bob.close()
        bob = await opened("bob")
        await even(ann, bob, cy, relay)
        assert bob.register("leader").value == "ann"
        bob.resolve(bob.conflicts()[0], "ann")
        await even(ann, bob, cy, relay)
        assert [r.conflicts() for r in (ann, bob, cy, relay)] == [[]] * 4
        assert [len(r.document(VOTES).map("ballots")) for r in (ann, bob, cy, relay)] == [0] * 4


@asynchronous
async def test_without_the_document_of_votes_there_is_no_voting() -> None:
    async with (
        Replica("relay", listen=LOCAL, role="relay") as relay,
        Replica("ann", peers=[str(relay.address)], config=CONFIG, subscribe=["main"]) as ann,
    ):
        await even(ann, relay)
        for replica in (ann, relay):
            replica.register("leader", strategy="vote").value = replica.agent
        await even(ann)
        await ann.wait_for(relay.version(), timeout=20)
        with pytest.raises(UsageError, match="'@votes' is not among the documents"):
            ann.vote(ann.conflicts()[0], "ann")


# Where there are certificates


SIGNED = Config(voters=["ann", "bob", "cy"], link_timeout=2.0, heartbeat=0.2, discover=False)
WRITER = ("*:rws",)
BOSS = ("*:rws", "*:c")


async def split(*replicas: Replica) -> None:
    """Let all write the leader before they hear of each other, the last one last."""
    for replica in replicas:
        for _ in range(1 + (replica is replicas[-1])):
            replica.register("leader", strategy="vote").value = replica.agent
            replica.version()


@asynchronous
async def test_who_votes_is_what_controllers_say_and_nobody_else(tmp_path: Path) -> None:
    async with Members() as members:
        relay = await members.open("relay", *WRITER, store=tmp_path / "relay.db")
        boss = await members.open("boss", *BOSS, config=SIGNED)
        ann, bob, eve = [await members.open(name, *WRITER) for name in ("ann", "bob", "eve")]
        everybody = relay, boss, ann, bob, eve
        await even(*everybody)
        await split(ann, bob)
        await even(*everybody)
        (found,) = eve.conflicts()
        assert found.value == "bob" and found.rule == "lww"

        # She may write votes, as everybody who may write anything; who votes she may not say.
        eve.is_controller = lambda agent: True  # type: ignore[method-assign]
        with pytest.raises(NotAllowed):
            eve.system_document(ELECTORATE).map("rules")["electorate"] = [MINUTE, "eve"]
        with pytest.raises(UsageError, match="not among the voters"):
            eve.vote(found, "ann")
        book = eve.system_document(VOTES)
        book.map("rules")["electorate"] = [MINUTE, "eve"]
        dots = [number for dot in sorted(found.dots) for number in dot]
        (choice,) = [each.dot for each in found.candidates if each.value == "ann"]
        book.map("ballots")[f"{found.poll}/eve"] = [*choice, "main", "rleader", "", dots]
        await even(*everybody)
        for replica in everybody:
            assert replica.register("leader").value == "bob", replica.agent
            assert replica.polls.electorate() == Electorate.of(SIGNED.voters, 600.0)

        # Nor does it matter whom a voter's own settings name.
        ann.config = Config(voters=["ann"])
        ann.vote(ann.conflicts()[0], "ann")
        await even(*everybody)
        assert {each.register("leader").value for each in everybody} == {"bob"}
        bob.vote(bob.conflicts()[0], "ann")
        await even(*everybody)
        assert {each.register("leader").value for each in everybody} == {"ann"}
        point = relay.version()
        await relay.durable()
        with await relay.at(point, documents=["main"]) as past:
            assert past.register("leader").value == "ann"
        with reading(tmp_path / "relay.db") as db:
            assert read_documents(db, tmp_path / "relay.db").register("leader").value == "ann"

        # Who controls no more has said nothing since.
        other = await members.open("chief", *BOSS)
        await even(*everybody, other)
        other.revoke("boss")
        for replica in (relay, ann, bob, eve):
            await replica.wait_for(other.version(), timeout=20)
        assert {each.register("leader").value for each in (relay, ann, bob, eve)} == {"ann"}


@asynchronous
async def test_who_may_not_write_there_has_no_vote_there() -> None:
    async with Members() as members:
        relay = await members.open("relay", *WRITER)
        boss = await members.open("boss", *BOSS, config=SIGNED)
        ann, bob = [await members.open(name, *WRITER) for name in ("ann", "bob")]
        cy = await members.open("cy", "main:r", "notes:rw")
        everybody = relay, boss, ann, bob, cy
        await even(*everybody)
        await split(ann, bob)
        await even(*everybody)
        ann.vote(ann.conflicts()[0], "ann")
        (found,) = cy.conflicts()
        with pytest.raises(NotAllowed, match="main"):
            cy.vote(found, "ann")

        # As who has altered the program would.
        cy.polls.cast(found, "ann", None)
        await even(*everybody)

        for replica in everybody:
            (now,) = replica.conflicts()
            assert now.value == "bob" and [vote.agent for vote in now.votes] == ["ann"]


@asynchronous
async def test_without_a_controller_s_word_nobody_votes() -> None:
    async with Members() as members:
        relay = await members.open("relay", *WRITER)
        ann, bob = [await members.open(name, *WRITER, config=SIGNED) for name in ("ann", "bob")]
        await even(relay, ann, bob)
        await split(ann, bob)
        await even(relay, ann, bob)
        with pytest.raises(UsageError, match="a controller does"):
            ann.vote(ann.conflicts()[0], "ann")
        boss = await members.open("boss", *BOSS, config=SIGNED)
        await even(relay, ann, bob, boss)

        for voter in (ann, bob):
            voter.vote(voter.conflicts()[0], "ann")

        await even(relay, ann, bob, boss)
        assert {r.register("leader").value for r in (relay, ann, bob, boss)} == {"ann"}


def is_up(replica: Replica, name: str) -> bool:
    return any(m.agent == name and m.state == "up" for m in replica.members())


@asynchronous
async def test_one_agent_is_responsible_and_another_if_it_goes() -> None:
    async with Replica("relay", listen=LOCAL, role="relay", config=CONFIG) as relay:
        agents = [
            Replica(f"agent-{n}", peers=[str(relay.address)], config=CONFIG) for n in range(4)
        ]
        async with AsyncExitStack() as stack:
            for agent in agents:
                await stack.enter_async_context(agent)
            conflicts = [
                Conflict("main", "map", "plan", str(n), tuple(candidates_of(1, 2)))
                for n in range(40)
            ]

            def chosen(conflict: Conflict) -> list[str]:
                return [a.agent for a in agents if a.is_responsible(conflict)]

            for agent in agents:
                await agent._wait_until(lambda a=agent: len(a.members()) == 5, "members", 20)
            before = [chosen(conflict) for conflict in conflicts]
            assert all(len(names) == 1 for names in before)
            assert len({names[0] for names in before}) == 4
            assert not any(relay.is_responsible(c) for c in conflicts)

            await agents.pop().close()
            for agent in agents:
                await agent._wait_until(lambda a=agent: not is_up(a, "agent-3"), "members", 20)
            after = [chosen(conflict) for conflict in conflicts]
            assert all(len(names) == 1 for names in after)
            for old, new in zip(before, after, strict=True):
                assert old == new or old == ["agent-3"], "only what the dead one had moves"
