"""Commands by hand: who does what about them, once, and that two exclusive ones never overlap."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from harness import Agent
from hypothesis import given, settings
from hypothesis import strategies as st

from crdtstate import (
    CommandError,
    Cut,
    Fulfilled,
    Rejected,
    Results,
    TimedOut,
    board,
    judging,
    verbs,
)
from crdtstate.board import Board
from crdtstate.change import Change
from crdtstate.clock import Stamp
from crdtstate.commands import (
    COMMANDS,
    COMMANDS_MAX,
    CONTROL,
    EXPIRY_MS_MAX,
    KEYS,
    MARGIN_MS,
    REPORT,
    RESTORE,
    RESULTS,
    SYSTEM_CHECKPOINTS_MAX,
    Answer,
    Command,
    matches,
)
from crdtstate.judging import Judge, Step, rally

NAMES = ("agent-1", "agent-2", "agent-3", "agent-4", "agent-5")
EXPIRY = 30_000
STORMS = 200
"""Seeds in which every mutant has to show itself."""


def command(id: str = "c1", **more: Any) -> Command:
    made = Command(id, "pause", {}, "agent-1", ("*",), 1000, 1000 + EXPIRY, NAMES)
    return replace(made, **more)


class Node(Agent):
    """An agent that executes commands by hand, and can be killed."""

    def __init__(self, number: int, skew_ms: int = 0) -> None:
        super().__init__(number, f"agent-{number}")
        self.board = Board(self)
        self.skew_ms = skew_ms
        # What it does now, what it has ever begun, and what it has issued.
        self.running: dict[str, Command] = {}
        self.begun: list[str] = []
        self.issued: list[str] = []
        self.restart()

    def restart(self) -> None:
        """As after kill -9: only what stands in the documents is left."""
        self.running.clear()
        self.judge = Judge(self.board, self.agent, "agent", None)

    def look(self, now_ms: int) -> None:
        now_ms += self.skew_ms
        for id in self.board.ids():
            if id in self.running:
                continue
            step, found = self.judge.judge(id, now_ms)
            if found is None:
                continue
            match step.what:
                case "accept":
                    self.judge.accept(found, now_ms, "")
                case "decline":
                    self.judge.decline(found, now_ms, step.reason)
                case "refuse":
                    self.judge.settle(found, Rejected(step.reason), now_ms)
                case "run":
                    assert now_ms <= found.expires_ms, f"too late: {id}"
                    self.judge.start(found, now_ms)
                    self.running[id] = found
                    self.begun.append(id)
                case "resume":
                    self.judge.settle(found, Rejected("was interrupted"), now_ms)

    def finish(self, now_ms: int) -> None:
        if self.running:
            id, found = self.running.popitem()
            self.judge.settle(found, Fulfilled(None), now_ms + self.skew_ms)

    def cut_short(self, now_ms: int) -> None:
        for id, found in list(self.running.items()):
            if now_ms + self.skew_ms > found.expires_ms:
                del self.running[id]
                self.judge.settle(found, Rejected("was cancelled"), now_ms + self.skew_ms)


class Storm:
    """A few agents of whom two are controllers, in any order of events."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        count = rng.choice((2, 3, 4, 4))
        half = MARGIN_MS // 2 - 1
        self.nodes = [Node(n, rng.choice((-half, 0, half))) for n in range(1, count + 1)]
        self.names = tuple(node.agent for node in self.nodes)
        self.changes: list[Change] = []
        self.now_ms = 10_000_000
        self.went: list[str] = []

    def run(self, steps: int = 250) -> None:
        acts: list[Callable[[], None]] = [self.issue, self.decide, self.decide, self.wait]
        often: list[Callable[[], None]] = [self.look, self.look, self.finish, self.pull, self.pull]
        for _ in range(steps):
            self.rng.choice(often * 2 + acts + [self.crash] * (self.rng.random() < 0.5))()
            for node in self.nodes:
                self.changes += node.sealed()
                node.cut_short(self.now_ms)
            self.check()

    def check(self) -> None:
        exclusive = {
            id for node in self.nodes for id, each in node.running.items() if each.is_exclusive
        }
        assert len(exclusive) <= 1, f"at the same time: {exclusive}"
        for node in self.nodes:
            assert len(set(node.begun)) == len(node.begun), f"twice: {node.begun}"

    def issue(self) -> None:
        node = self.rng.choice(self.nodes[:2])
        newest = node.board.find(node.issued[-1]) if node.issued else None
        is_busy = newest is not None and newest.state == "issued" and newest.is_exclusive
        if len(node.issued) < 8 and not (is_busy and self.rng.random() < 0.9):
            issued_ms = self.now_ms + node.skew_ms
            expiry = self.rng.choice((EXPIRY, EXPIRY // 20))
            made = command(
                f"{node.agent}:{len(node.issued)}",
                by=node.agent,
                issued_ms=issued_ms,
                expires_ms=issued_ms + expiry,
                expected=self.names,
                electorate=self.names if self.rng.random() < 0.9 else (),
            )
            node.issued.append(made.id)
            node.board.put(made)

    def decide(self) -> None:
        node = self.rng.choice(self.nodes[:2])
        for id in node.issued:
            found = node.board.find(id)
            if found is None or not found.is_exclusive or found.state != "issued":
                continue
            said = rally(node.board, found, is_late=self.rng.random() < 0.15)
            if said == "go":
                answers = {name: node.board.answer(id, name) for name in self.names}
                accepted = [n for n, a in answers.items() if a is not None and a.has_accepted]
                node.board.put(replace(found, state="going", executors=tuple(accepted)))
                self.went.append(id)
            elif said == "withdraw":
                node.board.put(replace(found, state="withdrawn"))

    def crash(self) -> None:
        self.rng.choice(self.nodes).restart()

    def wait(self) -> None:
        self.now_ms += self.rng.choice((10, 100, 1000, 3000, EXPIRY // 4))

    def look(self) -> None:
        self.rng.choice(self.nodes).look(self.now_ms)

    def finish(self) -> None:
        self.rng.choice(self.nodes).finish(self.now_ms)

    def pull(self) -> None:
        """One agent takes in what some others have, in any order, some of it twice."""
        node, *sources = self.rng.sample(self.nodes, self.rng.randint(2, len(self.nodes)))
        document = node.find_or_make(CONTROL, False)
        for source in sources:
            there = source.find_or_make(CONTROL, False).version
            todo = [change for change in self.changes if there.covers(change.dot)]
            self.rng.shuffle(todo)
            while ready := [c for c in todo if document.is_ready(c)]:
                for change in ready:
                    node.receive(change)
                node.receive(self.rng.choice(ready))


def settle(nodes: list[Node], changes: list[Change], now_ms: int) -> None:
    """Let everybody see and do everything."""
    for _ in range(8):
        for node in nodes:
            node.look(now_ms)
            node.finish(now_ms)
            changes += node.sealed()
        for node in nodes:
            document = node.find_or_make(CONTROL, False)
            while ready := [c for c in changes if document.is_ready(c)]:
                for change in ready:
                    node.receive(change)


# Laws


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_nothing_runs_twice_and_exclusive_commands_never_overlap(seed: int) -> None:
    Storm(seed).run()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_everybody_comes_to_the_same_results_in_whatever_order(seed: int) -> None:
    storm = Storm(seed)
    storm.run(120)

    for _ in range(3):
        storm.now_ms += 2 * (EXPIRY + MARGIN_MS)
        settle(storm.nodes, storm.changes, storm.now_ms)

    seen = [
        {(id, name): node.board.answer(id, name) for id in node.board.ids() for name in storm.names}
        for node in storm.nodes
    ]
    assert all(each == seen[0] for each in seen)
    assert all(answer is not None and answer.is_final for answer in seen[0].values())


def test_exclusive_commands_do_go_in_storms() -> None:
    storms = [Storm(seed) for seed in range(20)]
    for storm in storms:
        storm.run()

    assert sum(len(storm.went) for storm in storms) > 12
    assert sum(len(node.begun) for storm in storms for node in storm.nodes) > 60


# Mutants


@contextmanager
def altered(where: Any, name: str, other: Any) -> Iterator[None]:
    whole = getattr(where, name)
    setattr(where, name, other)
    try:
        yield
    finally:
        setattr(where, name, whole)


def over_when_one_is_done(self: Board, id: str, now_ms: int) -> bool:
    found = self.find(id)
    return (
        found is None
        or found.state == "withdrawn"
        or now_ms > found.expires_ms + MARGIN_MS
        or (found.state == "going" and any(self._has_result(id, a) for a in found.executors))
    )


def half_is_enough(board: Board, found: Command, *, is_late: bool) -> str:
    answers = [board.answer(found.id, agent) for agent in found.electorate]
    accepted = sum(each is not None and each.has_accepted for each in answers)
    return "go" if 2 * accepted >= len(answers) else "withdraw" if is_late else "wait"


def judge_without_expiry(self: Judge, found: Command, own: Answer | None, now_ms: int) -> Step:
    return judge_as_it_is(self, found, own, min(now_ms, found.expires_ms))


judge_as_it_is = Judge._judge

MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "accepts several at a time": (Judge, "_accepted_other", lambda self, id, now_ms: None),
    "forgets in a crash what it accepted": (Judge, "_recall", lambda self: ()),
    "does not say that it started": (Judge, "start", lambda self, command, now_ms: None),
    "over when one is done": (Board, "is_over", over_when_one_is_done),
    "half is a majority": (__import__("sys").modules[__name__], "rally", half_is_enough),
    "a result does not last": (Answer, "is_final", property(lambda self: False)),
    "executes after expiry": (Judge, "_judge", judge_without_expiry),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str) -> None:
    with altered(*MUTANTS[name]):
        for seed in range(STORMS):
            try:
                Storm(seed).run()
            except AssertionError:
                return
    pytest.fail(f"{STORMS} storms did not show it")


# One by one


def alone() -> Node:
    return Node(1)


def test_who_comes_back_after_expiry_refuses() -> None:
    node = alone()
    node.board.put(command())
    node.look(1000 + EXPIRY + 1)

    assert node.board.answer("c1", "agent-1") == Answer("rejected", None, "expired", 1001 + EXPIRY)


def test_a_command_is_one_only_from_the_lane_of_its_author() -> None:
    one, two = Node(1), Node(2)
    two.board.put(command(by="agent-1"))
    for change in two.sealed():
        one.receive(change)

    assert one.board.find("c1") is None
    assert one.board.forged("c1") == [(2, "agent-2", "agent-1")]


def test_one_that_may_command_counts_before_a_newer_one_that_may_not() -> None:
    one, two = Node(1), Node(2)
    one.board.put(command(verb="work"))
    two.board.put(command(verb="harm", by="agent-2"))
    two.board.put(command(verb="harm", by="agent-2"))
    for change in two.sealed():
        one.receive(change)
    one.sealed()
    found = one.board.find("c1")
    assert found is not None and (found.verb, found.writer) == ("harm", 2)

    one.board.may_command = lambda command: command.by == "agent-1"

    found = one.board.find("c1")
    assert found is not None and (found.verb, found.writer) == ("work", 1)


def test_what_was_begun_is_not_taken_up_again_as_somebody_else_wants_it() -> None:
    one, two = Node(1), Node(2)
    one.board.put(command())
    one.look(2000)
    assert one.begun == ["c1"]
    for change in one.sealed():
        two.receive(change)
    two.board.put(command(verb="harm", by="agent-2"))
    for change in two.sealed():
        one.receive(change)
    one.board.may_command = lambda command: command.by == "agent-1"

    assert one.judge.judge("c1", 2000)[0] == Step("refuse", "not a controller")


def test_a_result_counts_only_from_the_lane_of_its_agent() -> None:
    one, two = Node(1), Node(2)
    one.board.put(command())
    changes = one.sealed()
    for change in changes:
        two.receive(change)
    two.board.say("c1", "agent-1", Answer("fulfilled", "forged"))
    for change in two.sealed():
        one.receive(change)

    assert one.board.answer("c1", "agent-1") is None
    one.look(2000)
    assert one.begun == ["c1"]


def test_only_controllers_are_obeyed() -> None:
    node = alone()
    node.board.put(command())
    judge = Judge(node.board, "agent-1", "agent", ("queen",))

    assert judge.judge("c1", 2000)[0] == Step("refuse", "not a controller")
    assert Judge(node.board, "agent-1", "agent", ("agent-1",)).judge("c1", 2000)[0].what == "run"


def test_what_was_accepted_counts_beyond_expiry_as_clocks_differ() -> None:
    node = alone()
    node.board.put(command("c1", electorate=NAMES, state="going", executors=("agent-2",)))
    node.board.say("c1", "agent-1", Answer("accepted", "", "", 2000, True))
    later = command("c2", electorate=NAMES, expires_ms=10 * EXPIRY)
    node.board.put(later)
    until_ms = 1000 + EXPIRY + MARGIN_MS

    # A clock that is slower by the margin may still execute it.
    assert node.judge.judge("c2", until_ms)[0].what == "decline"
    assert node.judge.judge("c2", until_ms + 1)[0].what == "accept"


def test_who_declined_does_its_part_all_the_same_once_others_agreed() -> None:
    node = alone()
    node.board.put(command("c1", electorate=NAMES))
    node.board.put(command("c2", verb=RESTORE, electorate=NAMES))
    node.look(2000)
    going = {"electorate": NAMES, "state": "going", "verb": RESTORE}
    node.board.put(command("c2", executors=("agent-1",), **going))

    assert node.judge.judge("c2", 3000)[0].what == "run"
    node.board.put(command("c2", executors=("agent-2",), **going))
    assert node.judge.judge("c2", 3000)[0].what == "follow"
    node.board.put(command("c2", verb=RESTORE, electorate=NAMES, state="withdrawn"))
    assert "c1 of agent-1 is under way" in node.judge.judge("c2", 3000)[0].reason


def test_a_refusal_names_what_is_in_the_way() -> None:
    node = alone()
    for id in ("c1", "c2"):
        node.board.put(command(id, verb=RESTORE, electorate=NAMES))
    node.look(2000)

    first, second = node.board.answer("c1", "agent-1"), node.board.answer("c2", "agent-1")
    assert first is not None and first.state == "accepted"
    assert second is not None and second.state == "declined"
    assert second.reason == "restore c1 of agent-1 is under way; only one such at a time"


def test_who_was_not_there_does_not_execute_what_was_agreed_on() -> None:
    node = alone()
    agreed = {"electorate": ("agent-2",), "executors": ("agent-2",), "state": "going"}
    node.board.put(command("c1", **agreed))
    node.board.put(command("c2", verb=RESTORE, **agreed))

    assert node.judge.judge("c1", 2000)[0].what == "refuse"
    assert node.judge.judge("c2", 2000)[0].what == "follow"


def test_a_majority_that_cannot_be_any_more_is_given_up() -> None:
    nodes = [Node(number) for number in (1, 2, 3)]
    names = ("agent-1", "agent-2", "agent-3")
    made = command(expected=names, electorate=names)
    nodes[0].board.put(made)
    changes = nodes[0].sealed()
    for node in nodes[1:]:
        for change in changes:
            node.receive(change)

    assert rally(nodes[0].board, made, is_late=False) == "wait"
    for node in nodes[1:]:
        node.board.say("c1", node.agent, Answer("declined", reason="busy"))
        for change in node.sealed():
            nodes[0].receive(change)

    assert rally(nodes[0].board, made, is_late=False) == "withdraw"


def test_a_first_result_stays() -> None:
    one, clone = Node(1), Agent(9, "agent-1")
    one.board.put(command())
    for change in one.sealed():
        clone.receive(change)
    one.board.say("c1", "agent-1", Answer("fulfilled", "first", "", 1))
    Board(clone).say("c1", "agent-1", Answer("started", None, "", 2))
    for change in clone.sealed():
        one.receive(change)

    assert one.board.answer("c1", "agent-1") == Answer("fulfilled", "first", "", 1)


def test_a_copy_of_an_agent_does_not_take_its_result_back() -> None:
    node = alone()
    node.board.put(command())
    found = node.board.find("c1")
    assert found is not None
    node.judge.settle(found, Fulfilled(1), 2000)
    node.judge.start(found, 3000)
    node.judge.settle(found, Rejected("late"), 3000)

    assert node.board.answer("c1", "agent-1") == Answer("fulfilled", 1, "", 2000)


def test_versions_of_others_are_joined_and_rubbish_tells_nothing() -> None:
    one, two = Cut({"main": {1: 5}}), Cut({"main": {1: 3, 2: 1}, "other": {2: 9}})
    joined = verbs.join([str(one), "rubbish", "", None, 7, str(two)])

    assert joined == Cut({"main": {1: 5, 2: 1}, "other": {2: 9}})
    assert verbs.parse("rubbish") == Cut()


@pytest.mark.parametrize(
    ("target", "agent", "role", "is_meant"),
    [
        (["*"], "agent-1", "agent", True),
        (["agent-*"], "agent-1", "agent", True),
        (["agent-*"], "queen", "agent", False),
        (["*"], "relay", "relay", False),
        (["relay"], "relay", "relay", True),
        (["a[1]"], "a[1]", "agent", True),
        (["x", "agent-?"], "agent-1", "agent", True),
        ([], "agent-1", "agent", False),
    ],
)
def test_a_target_is_names_and_patterns(
    target: list[str], agent: str, role: str, is_meant: bool
) -> None:
    assert matches(target, agent, role) is is_meant


plain = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.binary(max_size=5) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(command().encode())), plain))
def test_whatever_stands_there_is_read_or_is_no_command(said: dict[str, Any]) -> None:
    whole = {**command().encode(), **said}
    found = Command.read("c1", whole, Stamp(0))

    assert found is None or Command.read("c1", found.encode(), Stamp(0)) == found
    assert Answer.read(said) is None
    if found is not None:
        assert found.issued <= found.expires


@given(plain, plain, plain)
def test_whatever_stands_there_is_an_answer_or_is_none(state: Any, when: Any, more: Any) -> None:
    said = {"state": state if type(state) is str else "fulfilled", "when": when, "reason": more}
    found = Answer.read(said)

    assert found is None or Answer.read(found.encode()) == found


def test_a_command_reads_as_it_was_written() -> None:
    made = command(arguments={"reason": "budget"}, electorate=("a",), executors=("b",), cut="x")

    assert Command.read("c1", made.encode(), Stamp(7)) == made
    assert (
        Command.read("c1", {**made.encode(), "expires": 1000 + EXPIRY_MS_MAX + 1}, Stamp(0)) is None
    )


# Bounds and cleaning


def test_what_is_too_large_or_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    node = alone()
    with pytest.raises(CommandError, match="at most 65536. Write them into a document"):
        node.board.put(command(arguments={"text": "x" * 70_000}))
    with pytest.raises(CommandError, match="arguments.*set cannot be shared"):
        node.board.put(command(arguments={"text": {1}}))
    monkeypatch.setattr(board, "COMMANDS_MAX", 2)
    node.board.put(command("c1"))
    node.board.put(command("c2"))
    node.board.put(command("c2", state="withdrawn"))
    with pytest.raises(CommandError, match="2 commands|commands stand in @control already"):
        node.board.put(command("c3"))
    assert COMMANDS_MAX == 10_000


def sweep(node: Node, up: dict[str, bool], now_ms: int) -> list[tuple[str, str]]:
    gone = list(node.board.sweep(node.agent, up, now_ms, 5000 + MARGIN_MS))
    for name, key in gone:
        node.board.clear(name, key)
    return gone


def test_the_author_removes_what_has_expired_long_ago() -> None:
    node = alone()
    node.board.put(command())
    node.look(2000)
    node.finish(2000)
    late = 1000 + EXPIRY + 5000 + MARGIN_MS

    assert sweep(node, {"agent-1": True}, late) == []
    assert sweep(node, {"agent-1": True}, late + 1) == [
        (COMMANDS, "c1"),
        (RESULTS, "c1/agent-1"),
    ]
    assert node.board.ids() == []


def test_one_of_the_others_removes_what_an_author_left_behind() -> None:
    nodes = [Node(number) for number in (1, 2, 3)]
    for at in range(20):
        nodes[0].board.put(command(f"c{at}"))
    changes = nodes[0].sealed()
    late = 10 * EXPIRY
    up = {"agent-1": True, "agent-2": True, "agent-3": True}
    found = []
    for node in nodes[1:]:
        for change in changes:
            node.receive(change)
        assert sweep(node, up, late) == []
        found.append({key for _, key in sweep(node, {**up, "agent-1": False}, late)})

    assert all(found)
    assert not found[0] & found[1]
    assert found[0] | found[1] == {f"c{at}" for at in range(20)}


def test_questions_go_as_soon_as_they_are_settled() -> None:
    node = alone()
    node.board.put(command(verb=REPORT, expected=("agent-1",)))

    assert sweep(node, {"agent-1": True}, 2000) == []
    node.board.say("c1", "agent-1", Answer("fulfilled"))
    assert list(node.board.sweep("agent-1", {"agent-1": True}, 2000, 0, awaited={"c1"})) == []
    assert len(sweep(node, {"agent-1": True}, 2000)) == 2


def test_answers_that_crossed_the_removal_go_too_and_keys_of_nobody() -> None:
    node = alone()
    node.board.say("gone", "agent-1", Answer("fulfilled"))
    node.board.publish_key("agent-1", {"key": b"k", "lasts": True})

    assert sweep(node, {"agent-1": True}, 2000) == [(RESULTS, "gone/agent-1")]
    other = Node(2)
    for change in node.sealed():
        other.receive(change)
    assert sweep(other, {"agent-1": False, "agent-2": True}, 2000) == []
    assert sweep(other, {"agent-2": True}, 2000) == [(KEYS, "agent-1")]


def test_rubbish_goes_at_last() -> None:
    node = alone()
    node.system_document(CONTROL).map(COMMANDS)["rubbish"] = 7
    wall_ms = node.wall_ms()

    assert sweep(node, {}, wall_ms + EXPIRY_MS_MAX) == []
    assert sweep(node, {}, wall_ms + 2 * EXPIRY_MS_MAX) == [(COMMANDS, "rubbish")]


def test_little_is_removed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "SWEEP", 10)
    node = alone()
    for at in range(25):
        node.board.put(command(f"c{at}"))

    counts = [len(sweep(node, {}, 10 * EXPIRY)) for _ in range(4)]

    assert max(counts) <= 11
    assert sum(counts) == 25


def test_of_checkpoints_of_the_system_the_newest_are_kept() -> None:
    node = alone()
    for at in range(SYSTEM_CHECKPOINTS_MAX + 5):
        node.board.keep_checkpoint(f"s{at}", {"at": at})
        node.sealed()

    assert node.board.kept_checkpoint("s4") is None
    assert node.board.kept_checkpoint("s5") == {"at": 5}


def test_what_is_shared_as_a_native_document_holds_no_commands() -> None:
    node = Node(1)
    node.system_document(CONTROL, shared=True)

    assert node.board.ids() == []
    assert node.board.answer("c1", "agent-1") is None


# Results


def test_results_are_a_mapping_that_says_who_is_missing() -> None:
    found = Results(
        command(),
        {"b": Fulfilled(7), "a": Rejected("no"), "c": TimedOut()},
        missing=["d"],
    )

    assert list(found) == ["a", "b", "c"]
    assert found["b"] == Fulfilled(7)
    assert found.missing == ("a", "c", "d")
    assert not found.is_complete
    assert repr(found) == "<Results pause c1: 1 of 3 fulfilled>"
    assert str(found) == (
        "pause c1 by agent-1\n  a  rejected: no\n  b  fulfilled: 7\n  c  no answer\n  away: d"
    )


def test_a_judge_forgets_what_is_over() -> None:
    node = alone()
    node.board.put(command("c1", electorate=NAMES))
    node.look(2000)
    node.board.put(command("c1", electorate=NAMES, state="withdrawn"))
    node.board.put(command("c2", electorate=NAMES))

    assert node.judge.judge("c2", 3000)[0].what == "accept"
    assert judging.rally(node.board, command("c2", electorate=NAMES), is_late=True) == "withdraw"
