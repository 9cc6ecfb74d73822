"""Rules: which hold for a change follows from what it builds on, and so does what they say."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import pytest
from harness import Agent, exchange
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hiding import Lawless, give, make, reading, seal

import crdtstate
from crdtstate import ChangeRefused, Proposal, Quota, UnknownValidator, UsageError, Use
from crdtstate import document as document_module
from crdtstate import rules as rules_module
from crdtstate import validators as validators_module
from crdtstate.change import Change, Origin, Snapshot
from crdtstate.clock import Dot
from crdtstate.document import Document
from crdtstate.errors import InvalidUpdate, NotAllowed
from crdtstate.rules import ON, QUOTA, VALIDATOR, Force, Rules, read_quota, write_quota


@crdtstate.validator("test: no red")
def no_red(proposal: Proposal) -> str | None:
    return next((f"{w.path} is red" for w in proposal.writes if w.value == "red"), None)


@crdtstate.validator("test: no blue")
def no_blue(proposal: Proposal) -> bool:
    return all(write.value != "blue" for write in proposal.writes)


seen: list[Proposal] = []


@crdtstate.validator("test: looks")
def looks(proposal: Proposal) -> None:
    seen.append(proposal)


@crdtstate.validator("test: fails")
def fails(proposal: Proposal) -> None:
    raise ZeroDivisionError("whatever it says")


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    seen.clear()


# Validators


def test_a_validator_is_registered_under_one_name_by_one_function() -> None:
    assert "test: no red" in validators_module.known_validators()
    with pytest.raises(UsageError, match="taken by"):
        crdtstate.validator("test: no red")(no_blue)
    assert crdtstate.validator("test: no red")(no_red) is no_red
    for name in ("", "x" * 101, 7, "a\nb"):
        with pytest.raises(UsageError, match="1 to 100 characters"):
            crdtstate.validator(name)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is a function"):
        crdtstate.validator("test: none")(7)  # type: ignore[arg-type]


def test_a_write_that_a_validator_refuses_raises_at_once_and_nothing_is_written() -> None:
    agent = Agent(1)
    plan, document = agent.map("plan"), agent.document("main")
    document.use_validator("test: no red")
    plan["a"] = "green"

    with pytest.raises(
        ChangeRefused, match=r"'main' does not admit this: test: no red: plan\['b'"
    ) as info:
        plan["b"] = "red"
    with pytest.raises(ChangeRefused):
        plan["a"] = "red"

    assert info.value.document == "main" and info.value.reason == "test: no red: plan['b'] is red"
    assert dict(plan) == {"a": "green"}
    assert [change.seq for change in agent.sealed()] == [1, 2]
    assert agent.sealed() == []


def test_a_transaction_is_judged_whole_when_it_ends_and_undone_whole() -> None:
    agent = Agent(1)
    plan = agent.map("plan")
    other = agent.document("other")
    agent.document("main").use_validator("test: no red")
    agent.sealed()

    with pytest.raises(ChangeRefused), agent.transaction(message="why", run="run-7"):
        other.map("m")["x"] = 1
        plan["a"] = "green"
        plan["b"] = "red"
    assert dict(plan) == {} and dict(other.map("m")) == {} and agent.sealed() == []

    # What is written over before the end is not asked about.
    with agent.transaction():
        plan["b"] = "red"
        plan["b"] = "green"
    assert dict(plan) == {"b": "green"}


def test_a_proposal_says_what_is_in_the_change_and_what_its_writer_had_said() -> None:
    one, two = Agent(1, "ann"), Agent(2, "bob")
    one.document("main").use_validator("test: looks")
    exchange(one, two)
    with two.transaction(message="why", run="run-7"):
        two.map("plan")["a"] = {"x": datetime(2026, 1, 1, tzinfo=UTC)}
        two.counter("n").increment(5)
        two.set("tags").add(("t", 1))
        two.register("r").value = None
    two.map("plan")["a"] = None
    two.counter("n").decrement(7)
    exchange(one, two)

    local = [p for p in seen if p.run]
    assert len(local) == 2 and local[0] == local[1]
    whole = local[0]
    assert (whole.document, whole.agent, whole.writer) == ("main", "bob", 2)
    assert (whole.message, whole.run, whole.kind) == ("why", "run-7", "write")
    assert [(w.kind, w.name, w.key, w.value, w.before, w.removed) for w in whole.writes] == [
        ("counter", "n", None, 5, 0, False),
        ("map", "plan", "a", {"x": datetime(2026, 1, 1, tzinfo=UTC)}, None, False),
        ("register", "r", None, None, None, False),
        ("set", "tags", ("t", 1), True, None, False),
    ]
    assert whole.size == sum(write.size for write in whole.writes) > 0
    # The plain writes were judged one by one here, and together as a change there.
    last = seen[-1]
    assert [(w.path, w.value, w.before) for w in last.writes] == [
        ("n", -7, 5),
        ("plan['a']", None, {"x": datetime(2026, 1, 1, tzinfo=UTC)}),
    ]
    assert last in seen[:-1]


def test_a_removal_is_told_whoever_wrote_what_is_removed() -> None:
    one, two = Agent(1), Agent(2)
    one.map("plan").update({"a": 1, "b": 2})
    one.document("main").use_validator("test: looks")
    exchange(one, two)
    del two.map("plan")["a"]
    del one.map("plan")["b"]
    exchange(one, two)

    told = {(p.agent, w.path, w.removed, w.before) for p in seen for w in p.writes}
    assert told == {("agent-2", "plan['a']", True, None), ("agent-1", "plan['b']", True, 2)}
    for agent in (one, two):
        assert dict(agent.map("plan")) == {}
    tidy(one, two)
    assert one.document("main").lanes.canonical().keys() == {f"@rules\0{VALIDATOR}test: looks"}


def tidy(*agents: Agent) -> None:
    """Let all drop what is settled, and tell each other."""
    for _ in range(3):
        for agent in agents:
            agent.seal_tidying(agent.document("main"))
        exchange(*agents)


def test_a_validator_that_raises_refuses() -> None:
    agent = Agent(1)
    agent.document("main").use_validator("test: fails")

    with pytest.raises(ChangeRefused, match="test: fails: it failed: ZeroDivisionError"):
        agent.map("plan")["a"] = 1
    # The rules themselves are not judged: else nobody could take them back.
    agent.document("main").drop_validator("test: fails")
    agent.map("plan")["a"] = 1
    assert agent.document("main").validators() == ()


def test_a_validator_that_is_not_registered_here_judges_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = Agent(1), Agent(2)
    one.document("main").use_validator("test: no red")
    exchange(one, two)
    one.map("plan")["a"] = 1
    (change,) = one.sealed()
    before = two.document("main").version.copy()
    monkeypatch.delitem(validators_module._registry, "test: no red")

    with pytest.raises(
        UnknownValidator, match=r"'main' uses the validator 'test: no red'.*crdtstate.validator"
    ):
        two.map("plan")["b"] = 1
    with pytest.raises(UnknownValidator):
        two.receive(change)
    with pytest.raises(UnknownValidator):
        two.document("main").use_validator("test: nowhere")

    assert two.document("main").version == before and dict(two.map("plan")) == {}
    # A snapshot brings the verdict.
    two.load(one)
    assert dict(two.map("plan")) == {"a": 1}


def test_rules_are_of_documents_that_can_hide_and_set_alone() -> None:
    agent = Agent(1)
    document = agent.document("main")
    with pytest.raises(UsageError, match="outside of transactions"), agent.transaction():
        document.use_validator("test: no red")
    with pytest.raises(UsageError, match="has no rules"):
        agent.document("notes", shared=True).use_validator("test: no red")
    with pytest.raises(UsageError, match="has no rules"):
        agent.system_document("@votes").limit(keys=1)
    for wrong in ({"bytes": -1}, {"keys": 1.5}, {"keys": True}):
        with pytest.raises(UsageError, match="a limit is a number"):
            document.limit(**wrong)  # type: ignore[arg-type]
    document.map("plan")["a"] = 1
    document.use_validator("test: no red")
    document.use_validator("test: no red")
    document.map("plan")["b"] = 1

    # What was open before is a change of its own, and so is the rule.
    assert len(agent.sealed()) == 4


def test_one_writer_can_set_so_many_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_module, "SAID_MAX", 3)
    agent, lawless = Agent(1), make(2, kind=Lawless)
    document = agent.document("main")
    for number in range(3):
        document.limit(keys=number)
    with pytest.raises(UsageError, match="too many rules"):
        document.limit(keys=9)

    give(lawless, *agent.sealed())
    for number in range(5):
        lawless.put(rules_module.RULES, QUOTA, document_module.pack(f"/{number + 10}", ""))
        give(document, seal(lawless))
    assert document.quota == Quota(None, 12)


# Quotas


def test_a_quota_is_of_what_one_writer_has() -> None:
    one, two = Agent(1), Agent(2)
    document, plan = one.document("main"), one.map("plan")
    document.limit(keys=3)
    exchange(one, two)
    plan.update({"a": 1, "b": 2, "c": 3})
    two.map("plan")["d"] = 4
    with pytest.raises(ChangeRefused, match="quota: 4 keys of one writer, 3 is the limit"):
        plan["e"] = 5
    plan["c"] = "again"
    exchange(one, two)

    # A key is of who wrote it last; its owner has room once it has dropped its own.
    two.map("plan")["a"] = 1
    exchange(one, two)
    tidy(one, two)
    assert document.usage().keys == 2 and two.document("main").usage().keys == 2
    plan["e"] = 5
    del plan["e"]
    plan["f"] = 6
    exchange(one, two)
    assert dict(plan) == dict(two.map("plan"))
    assert one.quarantined() == two.quarantined() == []


def test_a_quota_counts_bytes_and_admits_what_makes_it_no_larger() -> None:
    agent = Agent(1)
    document, plan = agent.document("main"), agent.map("plan")
    plan["a"] = b"x" * 100
    plan["b"] = b"x" * 50
    size = document.usage().size
    assert size == len("plan") + 1 + 1 + 102 + len("plan") + 1 + 1 + 52
    document.limit(bytes=size - 60)

    with pytest.raises(ChangeRefused, match=f"quota: {size + 1} bytes of one writer"):
        plan["b"] = b"x" * 51
    plan["b"] = b"x" * 50
    plan["a"] = b"x" * 99
    del plan["b"]
    # Judged is what a change comes to: this one has made room.
    plan["c"] = b""
    agent.sealed()
    assert document.usage().size > size - 60 and document.usage() == _measured(document)
    with pytest.raises(ChangeRefused):
        plan["d"] = 1
    document.limit()
    plan["d"] = b"x" * 1000
    assert document.quota == Quota()
    agent.sealed()
    assert document.usage() == _measured(document)


def _measured(document: Document) -> Use:
    found = Use()
    for path, slot in document.lanes.slots(document.writer).items():
        found = found.plus(path, slot)
    return found


def test_counters_and_transactions_keep_to_the_quota() -> None:
    agent = Agent(1)
    agent.document("main").limit(keys=2)
    agent.counter("n").increment(1)
    with pytest.raises(ChangeRefused), agent.transaction():
        agent.counter("n").increment(1)
        agent.map("plan").update({"a": 1, "b": 2})
    assert agent.counter("n").value == 1 and dict(agent.map("plan")) == {}
    agent.map("plan")["a"] = 1
    with pytest.raises(ChangeRefused):
        agent.counter("m").increment(1)


@pytest.mark.parametrize("text", ["", "/", "x/y", "-1/2", "1/2/3", "9" * 17 + "/", "１/２", " 1/1"])
def test_a_quota_that_makes_no_sense_limits_nothing_by_that(text: str) -> None:
    quota = read_quota(text)
    assert quota.size is None
    assert quota.keys in (None, 2, 1)


def test_quotas_come_out_as_they_went_in() -> None:
    for quota in (Quota(), Quota(5, None), Quota(None, 7), Quota(0, 0)):
        assert read_quota(write_quota(quota)) == quota


# Which rules hold


def test_who_has_not_heard_of_a_rule_is_not_bound_by_it() -> None:
    one, two, three = Agent(1), Agent(2), Agent(3)
    two.map("plan")["early"] = "red"
    one.document("main").use_validator("test: no red")
    exchange(one, two, three)

    for agent in (one, two, three):
        assert dict(agent.map("plan")) == {"early": "red"} and agent.quarantined() == []
    with pytest.raises(ChangeRefused):
        two.map("plan")["late"] = "red"


def test_rules_that_were_set_at_the_same_time_both_hold_until_set_anew() -> None:
    one, two, three = Agent(1), Agent(2), Agent(3)
    one.document("main").limit(keys=10, bytes=1000)
    two.document("main").limit(keys=5)
    one.document("main").use_validator("test: no red")
    two.document("main").use_validator("test: no blue")
    exchange(one, two, three)
    for agent in (one, two, three):
        assert agent.document("main").quota == Quota(1000, 5)
        assert agent.document("main").validators() == ("test: no blue", "test: no red")

    three.document("main").limit(keys=7)
    three.document("main").drop_validator("test: no red")
    exchange(one, two, three)
    for agent in (one, two, three):
        assert agent.document("main").quota == Quota(None, 7)
        assert agent.document("main").validators() == ("test: no blue",)


def test_a_change_that_is_open_while_a_rule_comes_is_undone_if_it_is_refused() -> None:
    one, two = Agent(1), Agent(2)
    one.document("main").use_validator("test: no red")
    (rule,) = one.sealed()
    two.map("plan")["a"] = "red"
    two.receive(rule)

    with pytest.raises(ChangeRefused):
        two.take_sealed()

    assert dict(two.map("plan")) == {} and two.take_sealed() == []


def test_a_refused_change_sets_no_rules() -> None:
    one, lawless = make(1), make(2, kind=Lawless)
    one.use_validator("test: no red")
    give(lawless, seal(one))
    lawless.map("plan")["a"] = "red"
    lawless.put(rules_module.RULES, QUOTA, document_module.pack("/0", ""))
    change = seal(lawless)

    give(one, change)
    one.release([change.dot])

    assert one.quota == Quota() and one.map("plan")["a"] == "red"


def test_where_there_are_rules_nobody_adopts() -> None:
    closed, heir, other = make(1), make(2), make(3)
    closed.map("plan")["a"] = "old"
    first = seal(closed)
    give(other, first)
    other.map("plan")["a"] = "new"
    second = seal(other)
    give(heir, first, second)
    heir.limit(keys=100)
    rule = seal(heir)
    heir.adopt(1)
    assert heir.seal() is None and not heir.needs_tidying

    evil = make(4, kind=Lawless)
    give(evil, first, second, rule)
    evil.adopt(1)
    known, evil.rules = evil.rules, Rules()
    change = seal(evil)
    evil.rules = known
    with pytest.raises(InvalidUpdate, match="where there are rules"):
        give(heir, change)


class World:
    """Writers who all do as they please, and a naive account of what they did."""

    def __init__(self, seed: int, steps: int) -> None:
        self.rng = rng = random.Random(seed)
        ticks = itertools.count(1)
        self.writers: list[Any] = [make(n, ticks, Lawless) for n in (1, 2, 3)]
        self.changes: list[Change] = []
        # Dot -> all that it builds on; the rules it sets; what it writes; how much its writer has.
        self.pasts: dict[Dot, frozenset[Dot]] = {}
        self.says: dict[Dot, dict[str, str]] = {}
        self.values: dict[Dot, set[str | None]] = {}
        self.uses: dict[Dot, tuple[Use, Use]] = {}
        for _ in range(steps):
            document = rng.choice(self.writers)
            roll = rng.random()
            if roll < 0.25:
                self._set_rule(document)
            elif roll < 0.65:
                self._write(document)
            for change in rng.sample(self.changes, min(len(self.changes), 4)):
                if change.writer != document.writer and not document.version.covers(change.dot):
                    if document.is_ready(change):
                        give(document, change)

    def _set_rule(self, document: Any) -> None:
        key, text = self.rng.choice(
            [
                (VALIDATOR + "test: no red", ON),
                (VALIDATOR + "test: no red", ""),
                (VALIDATOR + "test: no blue", ON),
                (QUOTA, "/3"),
                (QUOTA, "40/"),
                (QUOTA, ""),
            ]
        )
        is_mixed = self.rng.random() < 0.2
        if is_mixed:
            document.map("plan")["mixed"] = "red"
        document.put(rules_module.RULES, key, document_module.pack(text, ""))
        self._seal(document, {key: text}, {"red"} if is_mixed else set())

    def _write(self, document: Any) -> None:
        rng = self.rng
        values = {}
        for key in rng.sample("abcde", rng.choice((1, 1, 2, 3))):
            values[key] = rng.choice(("red", "blue", "green", "green", None))
            value = values[key]
            document.put("mplan", key, None if value is None else document_module.pack(value, ""))
        self._seal(document, {}, set(values.values()))

    def _seal(self, document: Any, says: dict[str, str], values: set[str | None]) -> None:
        before = Use()
        for path, slot in document.own_slots(document.writer).items():
            before = before.plus(path, document.unsealed.get(path, slot))
        change = document.seal(Origin())
        if change is None:
            return
        self.changes.append(change)
        past: set[Dot] = set()
        for dep in (*change.deps, Dot(change.writer, change.seq - 1)):
            if dep.seq:
                past |= self.pasts[dep] | {dep}
        self.pasts[change.dot] = frozenset(past)
        self.says[change.dot] = says
        self.values[change.dot] = values
        self.uses[change.dot] = before, _measured(document)

    def refused(self) -> set[Dot]:
        """What is to be refused."""
        found: set[Dot] = set()
        for change in self.changes:
            dot = change.dot
            said = [
                (other, key, text)
                for other in self.pasts[dot]
                if other not in found
                for key, text in self.says[other].items()
            ]
            force: dict[str, list[str]] = {}
            for other, key, text in said:
                if not any(k == key and other in self.pasts[d] for d, k, _ in said):
                    force.setdefault(key, []).append(text)
            if self._is_refused(dot, force):
                found.add(dot)
        return found

    def _is_refused(self, dot: Dot, force: dict[str, list[str]]) -> bool:
        values, (before, after) = self.values[dot], self.uses[dot]
        if not values:
            return False
        for color in ("red", "blue"):
            if ON in force.get(f"{VALIDATOR}test: no {color}", ()) and color in values:
                return True
        quotas = force.get(QUOTA, ())
        if "/3" in quotas and after.keys > 3 and after.keys > before.keys:
            return True
        return "40/" in quotas and after.size > 40 and after.size > before.size


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(10, 90))
def test_whatever_order_changes_come_in_the_same_ones_are_refused(seed: int, steps: int) -> None:
    world = World(seed, steps)
    rng = random.Random(seed + 1)
    replicas = []
    for number in range(3):
        document = make(10 + number)
        waiting = list(world.changes)
        while waiting:
            change = rng.choice([each for each in waiting if document.is_ready(each)])
            waiting.remove(change)
            give(document, change)
            if rng.random() < 0.1 and replicas:
                document.join(Snapshot.decode(rng.choice(replicas).snapshot().encode()))
                waiting = [each for each in waiting if not document.version.covers(each.dot)]
        replicas.append(document)

    expected = world.refused()
    first = replicas[0]
    for document in replicas:
        refused = {Dot(w, seq) for w, seqs in document.hiding.refused.items() for seq in seqs}
        standing = {
            Dot(w, slot.seq)
            for cell in document.lanes.canonical().values()
            for w, slot in cell.items()
        }
        assert refused & standing == expected & standing
        assert refused <= expected
        assert reading(document) == reading(first)
        assert document.rules.flat() == first.rules.flat()
        assert document.withheld() == first.withheld()
        assert document.rules.now == first.rules.now


def _those_that_are_here(self: Rules, dot: Dot, deps: Iterable[Dot]) -> Force:
    return self.now


def _those_of_own_alone(self: Rules, dot: Dot, deps: Iterable[Dot], said: Any) -> bool:
    return said.known.get(dot.writer, 2**60) < dot.seq  # type: ignore[no-any-return]


def _nothing_noted(self: Rules, dot: Dot, deps: Iterable[Dot], says: dict[str, str]) -> None:
    for key, text in says.items():
        self._add(rules_module.Said(dot, key, text, {dot.writer: dot.seq}))
    self._renew()


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("for_change", _those_that_are_here),
        ("_builds_on", _those_of_own_alone),
        ("note", _nothing_noted),
    ],
)
def test_the_law_catches(monkeypatch: pytest.MonkeyPatch, name: str, mutant: Any) -> None:
    monkeypatch.setattr(Rules, name, mutant)
    law = test_whatever_order_changes_come_in_the_same_ones_are_refused.hypothesis.inner_test  # type: ignore[attr-defined]

    with pytest.raises(AssertionError):
        for seed in range(60):
            law(seed, 80)


@pytest.mark.parametrize(
    "flat",
    [
        7,
        [[1, 1, "quota", "/1"]],
        [[0, 1, "quota", "/1", [1, 1]]],
        [[1, 1, 7, "/1", [1, 1]]],
        [[1, 1, "quota", "/1", [1]]],
        [[1, 1, "quota", "/1", [1, -1]]],
        [[1, 1, "quota", "/1", [2**70, 1]]],
        [[1, True, "quota", "/1", [1, 1]]],
    ],
)
def test_what_a_snapshot_says_of_rules_may_come_from_anybody(flat: Any) -> None:
    with pytest.raises(InvalidUpdate):
        Rules.from_flat(flat)


def test_a_snapshot_whose_rules_are_no_msgpack_is_refused_and_changes_nothing() -> None:
    one, two = make(1), make(2)
    one.limit(keys=5)
    one.map("plan")["a"] = 1
    seal(one)
    snapshot = one.snapshot()

    for told in (b"\xc1", b"\x91\x00", b"\x92\x90\x07"):
        with pytest.raises(InvalidUpdate):
            two.join(snapshot._replace(told=told))
    assert reading(two) == {} and two.version == {}
    two.join(snapshot)
    assert two.quota == Quota(None, 5)


def test_who_may_not_set_rules_is_refused_whether_there_are_any_or_not() -> None:
    def may_rule(writer: int, card: bytes) -> bool:
        return writer == 1

    one, other, lawless = make(1), make(2), make(3, kind=Lawless)
    for document in (one, other):
        document.may_rule = may_rule
    with pytest.raises(NotAllowed, match="may not"):
        other.use_validator("test: no red")
    lawless.map("plan")["a"] = 1
    lawless.put(rules_module.RULES, QUOTA, document_module.pack("/0", ""))
    bad = seal(lawless)
    give(other, bad)
    one.limit(keys=2)
    rule = seal(one)
    give(one, bad)
    give(other, rule)

    for document in (one, other):
        assert document.quota == Quota(None, 2) and dict(document.map("plan")) == {}
        ((dot, refusal),) = document.withheld()
        assert dot == bad.dot and refusal.reason == "rules: who made it may not set them"
    one.map("plan")["b"] = 1


def test_who_writes_over_what_builds_on_a_rule_has_heard_of_it() -> None:
    one, liar = make(1), make(2, kind=Lawless)
    one.use_validator("test: no red")
    rule = seal(one)
    one.map("plan")["a"] = "green"
    seen = seal(one)
    give(liar, rule, seen)
    # It names nothing that it builds on, as if it had heard of nothing.
    liar.heads.clear()
    liar.map("plan")["b"] = "red"
    backdated = seal(liar)
    liar.map("plan")["a"] = "red"
    given_away = seal(liar)
    assert backdated.deps == given_away.deps == ()

    give(one, backdated, given_away)

    assert dict(one.map("plan")) == {"a": "green", "b": "red"}
    assert [dot for dot, _ in one.withheld()] == [given_away.dot]
