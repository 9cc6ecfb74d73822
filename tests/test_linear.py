"""Linearizability: hand-made histories, a brute-force checker, and registers with planted bugs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, count, permutations
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdtstate import UsageError
from crdtstate.simulation.linear import Anomaly, History, Operation, Undecided, check


def write(value: Any, called: float, returned: float | None, key: str = "x") -> Operation:
    return Operation(f"writer of {value!r}", "write", key, value, called, returned)


def read(value: Any, called: float, returned: float | None, key: str = "x") -> Operation:
    return Operation("reader", "read", key, value, called, returned)


def anomaly_of(operations: Sequence[Operation]) -> Anomaly:
    anomaly = check(operations)
    assert anomaly is not None
    return anomaly


# What is linearizable


def test_nothing_is_linearizable() -> None:
    assert check([]) is None


def test_a_key_is_absent_until_it_is_written() -> None:
    history = [read(None, 0, 1), write(1, 2, 3), read(1, 4, 5), write(None, 6, 7), read(None, 8, 9)]

    assert check(history) is None


def test_a_key_may_hold_something_at_first() -> None:
    assert check([read("old", 0, 1)], initial="old") is None
    assert check([read(None, 0, 1)], initial="old") is not None


@pytest.mark.parametrize("seen", [1, 2])
def test_concurrent_writes_may_take_effect_in_either_order(seen: int) -> None:
    history = [write(1, 0, 10), write(2, 0, 10), read(seen, 11, 12), read(seen, 13, 14)]

    assert check(history) is None


def test_a_read_may_see_a_concurrent_write_or_not() -> None:
    history = [write(1, 0, 1), write(2, 2, 10), read(1, 3, 4), read(2, 5, 6)]

    assert check(history) is None


def test_operations_that_touch_at_one_time_are_concurrent() -> None:
    assert check([write(1, 0, 1), read(None, 1, 2)]) is None
    assert check([write(1, 0, 1), read(None, 1.001, 2)]) is not None


def test_operations_may_take_no_time() -> None:
    history = [write(1, 1, 1), write(2, 1, 1), read(1, 1, 1), read(2, 2, 2)]

    assert check(history) is None


def test_the_order_in_which_operations_are_given_does_not_matter() -> None:
    history = [write(1, 0, 1), write(2, 2, 3), read(2, 4, 5)]

    assert all(check(order) is None for order in permutations(history))


def test_values_need_not_be_hashable() -> None:
    history = [write({"a": [1]}, 0, 1), read({"a": [1]}, 2, 3)]

    assert check(history) is None
    assert check([*history, read({"a": [2]}, 4, 5)]) is not None


def test_keys_are_independent() -> None:
    history = [write(1, 0, 1, "x"), write(2, 0, 1, "y"), read(1, 2, 3, "x"), read(2, 2, 3, "y")]

    assert check(history) is None


# What is not


def test_a_stale_read_after_a_completed_write_is_caught() -> None:
    history = [write(1, 0, 1), write(2, 2, 3), read(1, 4, 5)]

    assert anomaly_of(history).core == tuple(history)


def test_a_lost_write_is_caught() -> None:
    history = [write(1, 0, 1), read(None, 2, 3)]

    assert anomaly_of(history).core == tuple(history)


def test_a_read_that_sees_the_future_is_caught() -> None:
    history = [read(1, 0, 1), write(1, 2, 3)]

    assert anomaly_of(history).core == tuple(history)


def test_new_old_inversion_between_two_reads_is_caught() -> None:
    history = [write(1, 0, 1), write(2, 2, 9), read(2, 3, 4), read(1, 5, 6)]

    assert anomaly_of(history).core == tuple(history)
    assert check([*history[:2], read(1, 3, 4), read(2, 5, 6)]) is None


def test_readers_must_agree_on_the_order_of_concurrent_writes() -> None:
    history = [write(1, 0, 9), write(2, 0, 9), read(1, 1, 2), read(2, 3, 4), read(1, 5, 6)]

    assert anomaly_of(history).core == tuple(history)
    assert check(history[:-1]) is None


def test_a_value_that_was_never_written_is_caught() -> None:
    history = [write(1, 0, 1), read(7, 2, 3), read(1, 4, 5)]

    assert anomaly_of(history).core == (history[1],)


def test_an_anomaly_on_one_key_is_not_hidden_by_another() -> None:
    good = [write(n, n, n + 0.5, "x") for n in range(20)]

    anomaly = anomaly_of([*good, write(1, 0, 1, "y"), read(None, 2, 3, "y")])

    assert anomaly.key == "y"
    assert anomaly.total == 2


# What nobody knows


def test_a_write_of_unknown_outcome_may_take_effect_late() -> None:
    lost = write(1, 0, None)

    assert check([lost, write(2, 1, 2), read(2, 3, 4), read(1, 50, 51)]) is None


def test_a_write_of_unknown_outcome_may_never_take_effect() -> None:
    lost = write(1, 0, None)

    assert check([lost, read(None, 1, 2), read(None, 50, 51)]) is None


def test_a_write_of_unknown_outcome_takes_effect_once() -> None:
    lost = write(1, 0, None)
    history = [lost, read(1, 1, 2), write(2, 3, 4), read(2, 5, 6), read(1, 7, 8)]

    assert check(history[:-1]) is None
    assert anomaly_of(history).total == 5


def test_a_write_of_unknown_outcome_takes_no_effect_before_its_call() -> None:
    history = [read(1, 0, 1), write(1, 2, None)]

    assert anomaly_of(history).core == tuple(history)


def test_a_read_of_unknown_outcome_says_nothing() -> None:
    history = [write(1, 0, 1), read(None, 2, None), read(1, 3, 4)]

    assert check(history) is None


# What a person is told


def test_an_anomaly_shows_the_few_operations_that_contradict_each_other() -> None:
    good = [write(n, n, n + 0.5) for n in range(50)] + [read(49, 50, 51)]
    bad = Operation("agent-7", "read", "x", 40, 50.25, 60.5)

    text = str(anomaly_of([*good, bad]))

    assert text.splitlines() == [
        "key 'x' is not linearizable: None at first, no order explains these 3 of 52 operations",
        "    40.000000 ..     40.500000 s  writer of 40 wrote 40",
        "    49.000000 ..     49.500000 s  writer of 49 wrote 49",
        "    50.250000 ..     60.500000 s  agent-7      read 40",
    ]


def test_an_operation_shows_that_its_outcome_is_unknown_and_cuts_what_is_long() -> None:
    text = str(Operation("agent-1", "write", "x", "y" * 1_000, 1.5, None))

    assert text.startswith("     1.500000 ..       unknown s  agent-1      wrote 'yyy")
    assert text.endswith("y…")
    assert len(text) < 120


# History


def test_a_history_takes_down_what_happens() -> None:
    history = History()

    first = history.call("a", "write", "x", 1, now=0.0)
    second = history.call("b", "read", "x", None, now=0.5)
    third = history.call("c", "write", "x", 2, now=0.75)
    fourth = history.call("c", "write", "y", 3, now=1.0)
    history.returned(second, 1, now=2.0)
    history.returned(first, None, now=3.0)
    history.failed(third)

    assert [first, second, third, fourth] == [0, 1, 2, 3]
    assert history.operations() == [
        Operation("a", "write", "x", 1, 0.0, 3.0),
        Operation("b", "read", "x", 1, 0.5, 2.0),
        Operation("c", "write", "y", 3, 1.0, None),
    ]


def test_what_certainly_failed_must_not_be_seen() -> None:
    history = History()
    refused = history.call("a", "write", "x", 1, now=0.0)
    history.failed(refused)
    seen = history.call("b", "read", "x", None, now=1.0)

    history.returned(seen, 1, now=2.0)

    assert check(history.operations()) is not None


def test_an_operation_ends_once_and_after_its_call() -> None:
    history = History()
    number = history.call("a", "write", "x", 1, now=5.0)

    with pytest.raises(UsageError, match="returned before it was called"):
        history.returned(number, None, now=4.0)
    history.returned(number, None, now=6.0)
    with pytest.raises(UsageError, match="not pending"):
        history.returned(number, None, now=7.0)
    with pytest.raises(UsageError, match="not pending"):
        history.failed(number)
    with pytest.raises(UsageError, match="not pending"):
        history.failed(99)


@pytest.mark.parametrize("end", [0.5, float("inf"), float("nan")])
def test_an_operation_returns_after_its_call_and_at_some_time(end: float) -> None:
    with pytest.raises(UsageError):
        write(1, 1.0, end)


# Against brute force


def has_order(operations: Sequence[Operation]) -> bool:
    """The definition: try every order of what returned and any of the writes that may have."""
    known = [op for op in operations if op.returned is not None]
    maybe = [op for op in operations if op.returned is None and op.kind == "write"]
    return any(
        _explains(order)
        for size in range(len(maybe) + 1)
        for happened in combinations(maybe, size)
        for order in permutations([*known, *happened])
    )


def _explains(order: Sequence[Operation]) -> bool:
    state = None
    for place, op in enumerate(order):
        later = order[place + 1 :]
        if any(other.returned is not None and other.returned < op.called for other in later):
            return False
        if op.kind == "write":
            state = op.value
        elif op.value != state:
            return False
    return True


@st.composite
def small_operations(draw: st.DrawFn) -> Operation:
    called, returned = sorted(draw(st.tuples(st.integers(0, 12), st.integers(0, 12))))
    is_known = draw(st.integers(0, 3)) > 0
    kind: Literal["read", "write"] = draw(st.sampled_from(["read", "write"]))
    value = draw(st.sampled_from([None, 1, 2, 3]))
    return Operation("client", kind, "x", value, called, returned if is_known else None)


@settings(max_examples=400, deadline=None)
@given(st.lists(small_operations(), max_size=6))
def test_the_verdict_is_that_of_brute_force(operations: list[Operation]) -> None:
    assert (check(operations) is None) == has_order(operations)


@settings(max_examples=200, deadline=None)
@given(st.lists(small_operations(), max_size=6))
def test_a_core_contradicts_itself_and_nothing_in_it_is_idle(operations: list[Operation]) -> None:
    anomaly = check(operations)
    if anomaly is None:
        return

    core = anomaly.core

    assert not has_order(core)
    seen = [op.value for op in core if op.kind == "read"]
    for n, op in enumerate(core):
        if op.kind == "read" or op.value not in seen:
            assert has_order(core[:n] + core[n + 1 :]), f"{op} could go from {anomaly}"


def test_both_verdicts_are_common_among_histories_that_look_plausible() -> None:
    verdicts = []

    for seed in range(1_000):
        rng = random.Random(seed)
        history = atomic_history(rng, operations=6, clients=3, values=3, unknown=0.2)
        reads = [n for n, op in enumerate(history) if op.kind == "read"]
        for n in reads[:1]:
            history[n] = replace(history[n], value=rng.choice([None, 0, 1, 2]))
        verdict = check(history) is None
        assert verdict == has_order(history), f"seed {seed}"
        verdicts.append(verdict)

    assert 200 < sum(verdicts) < 800


# Against an atomic register


def atomic_history(
    rng: random.Random,
    *,
    operations: int,
    clients: int,
    values: int | None = None,
    unknown: float = 0.0,
) -> list[Operation]:
    """What an atomic register answers: each operation happens at one moment in its interval.

    A share of the clients' calls has an unknown outcome: the write happens much later or never.
    Without *values*, each is written once.
    """
    plans = []
    for client in range(clients):
        now = rng.random()
        for _ in range(operations // clients):
            duration = rng.expovariate(1.0)
            is_known = rng.random() >= unknown
            moment = now + rng.random() * duration * (1 if is_known else 20)
            plans.append((moment, client, now, now + duration if is_known else None))
            now += duration + rng.random() * 0.1
    fresh = count()
    history, state = [], None
    for _, client, called, returned in sorted(plans, key=lambda plan: plan[0]):
        if rng.random() < 0.5:
            history.append(Operation(f"agent-{client}", "read", "x", state, called, returned))
            continue
        value = next(fresh) if values is None else rng.randrange(values)
        history.append(Operation(f"agent-{client}", "write", "x", value, called, returned))
        if returned is not None or rng.random() < 0.5:
            state = value
    return history


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    operations=st.integers(1, 120),
    clients=st.integers(1, 8),
    values=st.sampled_from([None, 1, 3]),
    unknown=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_whatever_an_atomic_register_answers_is_linearizable(
    seed: int, operations: int, clients: int, values: int | None, unknown: float
) -> None:
    history = atomic_history(
        random.Random(seed),
        operations=operations,
        clients=clients,
        values=values,
        unknown=unknown,
    )

    anomaly = check(history)

    assert anomaly is None, str(anomaly)


# The search's length


@pytest.mark.parametrize("unknown", [0.0, 0.05, 0.3])
def test_a_long_history_of_ten_clients_takes_two_steps_for_each_operation(unknown: float) -> None:
    for size in (200, 2_000):
        history = atomic_history(random.Random(1), operations=size, clients=10, unknown=unknown)

        assert check(history, steps_max=2 * size) is None


def test_values_that_are_written_again_and_again_take_ten_steps_for_each_operation() -> None:
    for seed in range(30):
        history = atomic_history(random.Random(seed), operations=200, clients=10, values=8)

        assert check(history, steps_max=2_000) is None


@pytest.mark.parametrize("unknown", [0.0, 0.05])
def test_one_stale_read_in_a_long_history_is_found_and_told_in_three_lines(unknown: float) -> None:
    history = atomic_history(random.Random(2), operations=2_000, clients=10, unknown=unknown)
    writes = [op for op in history if op.kind == "write" and op.returned is not None]
    stale = Operation("agent-3", "read", "x", writes[-300].value, writes[-1].called, 1_000.0)

    anomaly = check([*history, stale], steps_max=100_000)

    assert anomaly is not None
    assert stale in anomaly.core
    assert len(anomaly.core) == 3


def test_a_thousand_concurrent_writes_that_nobody_reads_are_no_choice() -> None:
    writes = [write(n, 0, 10) for n in range(1_000)]
    lost = [write(1_000 + n, 0, None) for n in range(1_000)]

    assert check([*writes, *lost, read(7, 11, 12)], steps_max=1_001) is None
    assert check([*writes, *lost, read(None, 11, 12)], steps_max=1_001) is not None


def test_a_search_that_gets_too_long_says_so() -> None:
    history = [write(n, n, n + 0.5) for n in range(20)]

    with pytest.raises(Undecided, match="key 'x': no verdict after 19 steps") as caught:
        check(history, steps_max=19)

    assert (caught.value.key, caught.value.steps) == ("x", 19)
    assert check(history, steps_max=20) is None


def test_an_anomaly_is_told_even_if_the_search_for_its_core_meets_its_bound() -> None:
    good = [op for n in range(50) for op in (write(n, n, n + 0.3), read(n, n + 0.5, n + 0.8))]
    history = [*good, read(48, 60, 61)]

    hurried, patient = check(history, steps_max=100), check(history)

    assert hurried is not None and patient is not None
    assert len(hurried.core) > len(patient.core) == 3
    assert check(hurried.core) is not None


def test_a_hard_history_ends_in_an_error_and_not_in_a_hang() -> None:
    # Twelve values, each written twice, all at once; a value that nobody wrote comes last.
    writes = [write(n % 12, 0, 100) for n in range(24)]
    reads = [read(n, 0, 100) for n in range(12)]

    with pytest.raises(Undecided):
        check([*writes, *reads, read("?", 101, 102)], steps_max=20_000)


# Planted bugs


@dataclass(frozen=True)
class Rules:
    """How a replicated register works: Attiya, Bar-Noy & Dolev, "Sharing memory robustly", 1995."""

    asked: int = 2
    """Voters that a read and the first half of a write hear, of three."""
    told: int = 2
    """Voters that must have a write before it returns."""
    reads_write_back: bool = True
    """Whether a read returns only when as many voters have what it returns."""
    stamps_above: bool = True
    """Whether a write goes above what its first half heard, or above what its client knew."""


Stamped = tuple[tuple[int, int], int | None]


class Voters:
    """Three voters that keep what has the highest stamp, and clients that stall and crash."""

    def __init__(self, rng: random.Random, rules: Rules) -> None:
        self.rng = rng
        self.rules = rules
        self.kept: list[Stamped] = [((0, 0), None)] * 3
        self.history = History()
        self.now = 0.0
        self._values = count(1)

    def run(self, *, clients: int, turns: int) -> list[Operation]:
        """Let the clients take turns, some messages in each, and now and then one crash."""
        names = count(1)
        running = [self._client(next(names)) for _ in range(clients)]
        for _ in range(turns):
            n = self.rng.randrange(clients)
            for _ in range(self.rng.randrange(1, 12)):
                self.now += 1.0
                next(running[n])
            if self.rng.random() < 0.02:
                running[n] = self._client(next(names))
        return self.history.operations()

    def _client(self, client: int) -> Iterator[str]:
        known = 0
        while True:
            is_read = self.rng.random() < 0.7
            value = None if is_read else next(self._values)
            kind: Literal["read", "write"] = "read" if is_read else "write"
            number = self.history.call(f"agent-{client}", kind, "x", value, self.now)
            heard: list[Stamped] = []
            for voter in self.rng.sample(range(3), self.rules.asked):
                yield "asks"
                heard.append(self.kept[voter])
            newest = max(heard, key=_stamp)
            if not is_read:
                known = (newest[0][0] if self.rules.stamps_above else known) + 1
                newest = ((known, client), value)
            if not is_read or self.rules.reads_write_back:
                for voter in self.rng.sample(range(3), self.rules.told):
                    yield "tells"
                    self.kept[voter] = max(self.kept[voter], newest, key=_stamp)
            yield "hears"
            self.history.returned(number, newest[1], self.now)
            # What touches in time counts as concurrent; a client's own operations are not.
            yield "rests"


def _stamp(stamped: Stamped) -> tuple[int, int]:
    return stamped[0]


def anomalies(rules: Rules, seeds: int) -> int:
    """In how many of the seeds a register of these rules is caught."""
    caught = 0
    for seed in range(seeds):
        voters = Voters(random.Random(seed), rules)
        history = voters.run(clients=4, turns=60)
        caught += check(history) is not None
    return caught


def test_a_majority_register_is_linearizable_though_clients_crash() -> None:
    assert anomalies(Rules(), seeds=300) == 0


@pytest.mark.parametrize(
    "rules",
    [
        Rules(asked=1),
        Rules(told=1),
        Rules(reads_write_back=False),
        Rules(stamps_above=False),
    ],
    ids=[
        "reads from a lagging replica",
        "writes are lost to others",
        "reads do not write back",
        "writes go below others",
    ],
)
def test_a_planted_bug_is_caught(rules: Rules) -> None:
    assert anomalies(rules, seeds=50) >= 5


@pytest.mark.parametrize("lag", [1, 5])
def test_a_replica_that_lags_behind_a_primary_is_caught(lag: int) -> None:
    history = History()
    log: list[int | None] = [None] * lag
    for n in range(100):
        writing = history.call("writer", "write", "x", n, now=2.0 * n)
        log.append(n)
        history.returned(writing, None, now=2.0 * n + 0.5)
        reading = history.call("reader", "read", "x", None, now=2.0 * n + 1.0)
        history.returned(reading, log[-1 - lag], now=2.0 * n + 1.5)

    anomaly = check(history.operations())

    assert anomaly is not None
    assert len(anomaly.core) <= 3
