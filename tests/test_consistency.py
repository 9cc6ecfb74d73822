"""Write concern and strong reads and writes: who counts, what failures say, and that it is true."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mutants
import pytest
import test_quorum
from harness import Agent, asynchronous
from test_quorum import Keeper, full, is_answer, star, waiting
from test_sync import connect, exchange, is_payload, run, write

from crdtstate import (
    Config,
    Confirm,
    ConfirmTimeout,
    QuorumLost,
    Receipt,
    Replica,
    UsageError,
    WaitTimeout,
    wire,
)
from crdtstate.clock import STAMP_MAX, Dot, Version
from crdtstate.consistency import Confirmation, StrongRead, StrongWrite
from crdtstate.document import Document
from crdtstate.quorum import Question
from crdtstate.simulation import Simulation
from crdtstate.simulation.linear import Anomaly, History, check
from crdtstate.simulation.shell import Machine, SimulatedReplica
from crdtstate.values import pack, unpack

VIEW = "mplan"
HERE = Path(__file__)
LOCAL = "ws://127.0.0.1:0"
STORM_SEEDS = 9
"""Seeds in which every mutant that breaks strong operations must show itself."""

VOTERS = ("agent-1", "agent-2", "agent-3")


def confirmation(node: Keeper, confirm: Confirm, *voters: str) -> Confirmation:
    """Waits for all that *node* has written in "main"."""
    writer = node.core.hello.writer
    written = Version({writer: node.document("main").version[writer]})
    return Confirmation(node.core, confirm, {"main": written}, voters, node.now)


def read(node: Keeper, key: str = "goal", voters: tuple[str, ...] = VOTERS) -> StrongRead:
    return StrongRead(node.core, node.document("main"), VIEW, key, voters, node.now)


def strong_write(
    node: Keeper, value: Any, key: str = "goal", voters: tuple[str, ...] = VOTERS
) -> StrongWrite:
    machine = StrongWrite(node.core, node.document("main"), VIEW, key, voters, node.now)
    machine.value = pack(value, "a value")
    return machine


def drive(node: Keeper, machine: Machine, *nodes: Keeper, seconds: float = 3.0) -> bool:
    """Let time pass until *machine*, which runs on *node*, is done; whether it is."""
    for _ in range(int(seconds / 0.05)):
        exchange(node, *nodes)
        if machine.poll(node.now):
            break
        run(node, *nodes, seconds=0.05)
    is_done = machine.poll(node.now)
    machine.close()
    exchange(node, *nodes)
    return is_done


def found(machine: StrongRead) -> Any:
    return None if machine.value is None else unpack(machine.value)


# How many must have it


@pytest.mark.parametrize(
    ("confirm", "voters", "needed"),
    [
        (Confirm(1), 0, 1),
        (Confirm(7), 0, 7),
        (Confirm(2), 3, 2),
        (Confirm(3), 3, 3),
        (Confirm.majority(), 1, 1),
        (Confirm.majority(), 2, 2),
        (Confirm.majority(), 3, 2),
        (Confirm.majority(), 4, 3),
        (Confirm.majority(durable=True), 5, 3),
        (Confirm.all(), 5, 5),
    ],
)
def test_a_confirm_says_how_many_it_takes(confirm: Confirm, voters: int, needed: int) -> None:
    assert confirm.needed(voters) == needed


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "2"])
def test_a_count_that_cannot_be_is_refused(count: Any) -> None:
    with pytest.raises(UsageError, match="Confirm takes how many replicas, from 1"):
        Confirm(count)


def test_no_count_and_no_share_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Confirm\(n\), Confirm.majority\(\) or Confirm.all\(\)"):
        Confirm(None)


def test_more_than_there_are_voters_can_never_be() -> None:
    node = Keeper(1)

    with pytest.raises(UsageError, match=r"Confirm\(3\) of 2 voters can never be"):
        Confirmation(node.core, Confirm(3), {"main": Version()}, ("a", "b"), 0.0)
    assert not node.core._quorum._questions


@pytest.mark.parametrize("confirm", [Confirm.majority(), Confirm.all()])
def test_a_share_takes_voters(confirm: Confirm) -> None:
    with pytest.raises(UsageError, match=r"of whom\? Name the voters: Config\(voters="):
        confirm.needed(0)


# Write concern


def test_without_voters_everybody_counts_the_writer_too() -> None:
    nodes = full(4)
    write(nodes[0], "goal")
    machine = confirmation(nodes[0], Confirm(4))

    assert drive(nodes[0], machine, *nodes)

    assert machine.receipt == Receipt(("agent-1", "agent-2", "agent-3", "agent-4"), False)


def test_one_is_the_writer_itself() -> None:
    node = Keeper(1)
    write(node, "goal")
    machine = confirmation(node, Confirm(1, durable=True))

    assert machine.poll(0.0)
    assert machine.receipt == Receipt(("agent-1",), True)


def test_with_voters_nobody_else_counts() -> None:
    nodes = star(5)
    write(nodes[4], "goal")
    machine = confirmation(nodes[4], Confirm.all(), "agent-1", "agent-3")

    assert drive(nodes[4], machine, *nodes)

    assert machine.receipt.by == ("agent-1", "agent-3")


def test_a_receipt_names_those_who_have_all_documents() -> None:
    one, two, three = full(3)
    write(one, "goal")
    one.document("tasks").map("open")["x"] = 1
    one.act()
    two.loses = is_answer
    versions = {name: version for name, version in one.versions()}
    machine = Confirmation(one.core, Confirm(2), versions, (), one.now)
    question = machine._questions[0]
    drive(one, machine, two, three)
    assert machine.receipt.by == ("agent-1", "agent-3")

    question.answers["agent-2"] = Version()

    assert machine.receipt.by == ("agent-1", "agent-3")


def test_where_nothing_was_written_there_is_nothing_to_wait_for() -> None:
    node = Keeper(1)
    machine = Confirmation(node.core, Confirm(3), {}, (), 0.0)

    assert machine.poll(0.0)
    assert machine.receipt.by == ()


def test_a_failure_says_who_has_it_and_of_whom_nothing_was_heard() -> None:
    one, two, three = full(3)
    for peer in list(three.links):
        three.disconnect(peer)
    write(one, "goal")
    machine = confirmation(one, Confirm.all(durable=True), *VOTERS)

    assert not drive(one, machine, two, seconds=1)

    error = machine.failure(1.0)
    assert (error.got, error.missing, error.unknown) == (("agent-1", "agent-2"), ("agent-3",), True)
    assert str(error) == (
        "confirmed by agent-1, agent-2 within 1.0 s, 3 are needed; not heard of agent-3. "
        "What was written stays, and may still get there"
    )
    assert isinstance(error, WaitTimeout) and isinstance(error, TimeoutError)


def test_a_failure_without_voters_names_nobody_as_missing() -> None:
    node = Keeper(1)
    node.commits = False
    node.document("main").map("plan")["goal"] = "ship"
    node.act()
    machine = confirmation(node, Confirm(2))

    error = machine.failure(None)

    assert (error.got, error.missing) == ((), ())
    assert str(error).startswith("confirmed by nobody within None s, 2 are needed. What was")


def test_a_confirmation_waits_for_the_commit() -> None:
    one, two = full(2)
    two.commits = False
    write(one, "goal")
    machine = confirmation(one, Confirm(2))
    assert not drive(one, machine, two, seconds=1)

    two.commits = True
    assert drive(one, confirmation(one, Confirm(2)), two)


# Strong reads and writes


def test_a_strong_read_finds_what_was_written_strongly_elsewhere() -> None:
    nodes = full(4)
    assert drive(nodes[3], strong_write(nodes[3], "ship"), *nodes)

    for node in nodes:
        reading = read(node)
        assert drive(node, reading, *nodes)
        assert found(reading) == "ship"


def test_what_is_not_there_is_none() -> None:
    nodes = full(3)
    reading = read(nodes[0])

    assert drive(nodes[0], reading, *nodes)

    assert reading.value is None


@pytest.mark.parametrize("kind", [StrongRead, StrongWrite])
def test_without_voters_nothing_is_strong(kind: Any) -> None:
    node = Keeper(1)

    with pytest.raises(UsageError, match=r"need voters: Config\(voters=\['relay-1', ...\]\)"):
        kind(node.core, node.document("main"), VIEW, "goal", (), 0.0)


def test_a_minority_that_is_down_stops_nobody() -> None:
    nodes = full(4)
    for peer in list(nodes[0].links):
        nodes[0].disconnect(peer)
    others = nodes[1:]

    assert drive(nodes[3], strong_write(nodes[3], "ship"), *others)
    reading = read(nodes[1])
    assert drive(nodes[1], reading, *others)

    assert found(reading) == "ship"


def test_without_a_majority_nothing_is_written_and_the_missing_are_named() -> None:
    nodes = full(4)
    for node in nodes[:2]:
        for peer in list(node.links):
            node.disconnect(peer)
    writing, reading = strong_write(nodes[3], "ship"), read(nodes[3])

    assert not drive(nodes[3], writing, nodes[2], seconds=5)
    assert not drive(nodes[3], reading, nodes[2], seconds=5)

    for machine in (writing, reading):
        error = machine.failure(5.0)
        assert (error.missing, error.unknown) == (("agent-1", "agent-2"), False)
        assert str(error) == (
            "no majority of 3 voters within 5.0 s; not heard of agent-1, agent-2: "
            "nothing was written"
        )
    assert "goal" not in nodes[3].map("plan")
    assert isinstance(writing.failure(None), TimeoutError)


def test_a_write_that_nobody_confirms_is_unknown_and_reads_agree_on_what_became_of_it() -> None:
    nodes = full(4)
    writer = nodes[3]
    assert drive(writer, strong_write(writer, "old"), *nodes)
    writer.loses = lambda frame: is_payload(frame) or isinstance(frame, wire.Have)
    writing = strong_write(writer, "new")

    assert not drive(writer, writing, *nodes, seconds=2)

    error = writing.failure(2.0)
    assert error.unknown
    assert error.missing == VOTERS
    assert str(error).endswith("it may have been written")
    # It is nowhere else, so it has not taken effect yet; once somebody has read it, it has.
    for node in nodes[:3]:
        reading = read(node)
        assert drive(node, reading, *nodes)
        assert found(reading) == "old"
    writer.loses = lambda frame: False
    reading = read(writer)
    assert drive(writer, reading, *nodes, seconds=10)
    assert found(reading) == "new"
    for node in nodes:
        reading = read(node)
        assert drive(node, reading, *nodes)
        assert found(reading) == "new"


def test_a_value_that_is_read_is_at_a_majority_before_the_read_returns() -> None:
    nodes = full(4)
    writer = nodes[3]
    peer_of_one = next(p for p, (node, _) in writer.links.items() if node is nodes[0])
    for peer in list(writer.links):
        if peer != peer_of_one:
            writer.disconnect(peer)
    # The write gets to one voter only, which gets it to nobody.
    nodes[0].loses = lambda frame: is_payload(frame) or isinstance(frame, wire.Have)
    writer.document("main").map("plan")["goal"] = "half written"
    exchange(*nodes)
    assert nodes[0].map("plan")["goal"] == "half written"

    reading = read(nodes[0])
    assert not drive(nodes[0], reading, *nodes[1:3], seconds=2)
    assert found(reading) == "half written"
    assert not reading.failure(2.0).unknown

    nodes[0].loses = lambda frame: False
    assert drive(nodes[0], read(nodes[0]), *nodes[1:3], seconds=10)
    assert all(node.map("plan")["goal"] == "half written" for node in nodes[1:3])


def test_who_cannot_catch_up_says_so() -> None:
    nodes = full(4)
    assert drive(nodes[0], strong_write(nodes[0], "ship"), *nodes[1:3])
    late = Keeper(9)
    late.now = nodes[0].now
    for node in nodes[:3]:
        node.loses = lambda frame: is_payload(frame) or isinstance(frame, wire.Have)
        connect(late, node)
    run(late, *nodes[:3], seconds=2)
    reading, writing = read(late), strong_write(late, "mine")

    assert not drive(late, reading, *nodes[:3], seconds=2)
    assert not drive(late, writing, *nodes[:3], seconds=2)

    for machine in (reading, writing):
        error = machine.failure(2.0)
        assert (error.missing, error.unknown) == ((), False)
        assert "; could not catch up with them: nothing was written" in str(error)


def test_a_read_of_what_a_majority_has_is_one_round() -> None:
    nodes = full(3)
    assert drive(nodes[0], strong_write(nodes[0], "ship"), *nodes)
    before = len(nodes[1].frames(wire.Ask))

    assert drive(nodes[1], read(nodes[1]), *nodes)

    assert len(nodes[1].frames(wire.Ask)) == before + 2


def test_nothing_is_left_in_the_core_however_it_ends() -> None:
    nodes = full(3)
    for machine in (read(nodes[0]), strong_write(nodes[0], 1)):
        machine.close()
    for machine in (read(nodes[0]), strong_write(nodes[0], 2)):
        assert drive(nodes[0], machine, *nodes)
    nodes[1].loses = nodes[2].loses = is_answer
    for machine in (read(nodes[0]), strong_write(nodes[0], 3)):
        drive(nodes[0], machine, *nodes, seconds=1)
    nodes[1].loses = nodes[2].loses = lambda frame: False
    run(*nodes, seconds=2)

    assert all(not node.core._quorum._questions for node in nodes)
    assert waiting(*nodes) == 0


def test_an_own_write_that_is_not_sealed_counts_in_a_read() -> None:
    nodes = full(3)
    nodes[0].document("main").map("plan")["goal"] = "mine"
    reading = read(nodes[0])

    assert drive(nodes[0], reading, *nodes)

    assert found(reading) == "mine"
    assert sum(node.map("plan").get("goal") == "mine" for node in nodes) >= 2


@pytest.mark.parametrize("strategy", ["lww", "max", "min", "merge"])
def test_whatever_the_strategy_a_strong_read_finds_what_was_written_last(strategy: str) -> None:
    nodes = full(3)
    nodes[0].map("plan", strategy=strategy)["goal"] = {"a": 9}
    nodes[1].map("plan")["goal"] = {"b": 9}
    run(*nodes, seconds=1)
    for number, node in enumerate(nodes):
        assert drive(node, strong_write(node, {"c": -number}), *nodes)

        for other in nodes:
            reading = read(other)
            assert drive(other, reading, *nodes)
            assert found(reading) == {"c": -number}


def test_a_clock_that_is_an_hour_ahead_does_not_hold_a_key() -> None:
    nodes = full(3)
    nodes[0]._wall = lambda: 1_700_000_000_000 + 3_600_000
    assert drive(nodes[0], strong_write(nodes[0], "of the future"), *nodes)

    for node in (nodes[1], nodes[0], nodes[2]):
        assert drive(node, strong_write(node, node.agent), *nodes)
        for other in nodes:
            reading = read(other)
            assert drive(other, reading, *nodes)
            assert found(reading) == node.agent
    cell = nodes[2].document("main").lanes.container(VIEW).cells["goal"]
    ahead = max(slot.stamp for slot in cell.values()) >> 16
    assert ahead >= 1_700_000_000_000 + 3_600_000


def test_a_clock_without_bounds_is_an_error_not_a_lost_write() -> None:
    nodes = full(3)
    document = nodes[0].document("main")
    document.map("plan")["goal"] = "ship"
    cells = document.lanes.container(VIEW)
    cells.update("goal", 1, cells.cells["goal"][1]._replace(stamp=STAMP_MAX))
    writing = strong_write(nodes[0], "later")

    with pytest.raises(UsageError, match="a clock without bounds has written at 'goal'"):
        drive(nodes[0], writing, *nodes)
    writing.close()
    assert not nodes[0].core._quorum._questions


class Told:
    """A core whose questions are answered: all have everything."""

    def __init__(self, agent: Agent) -> None:
        self.documents = agent

    def ask(
        self, document: str, version: Version, names: Any, now: float, **options: Any
    ) -> Question:
        asked = Question(1, frozenset(names), document, version, True, True, now)
        asked.answers.update(dict.fromkeys(names, version))
        return asked

    def catch_up(self, document: str, version: Version, now: float) -> None:
        pass

    def withdraw(self, question: Question) -> None:
        pass


def read_here(agent: Agent) -> Any:
    machine = StrongRead(Told(agent), agent.document("main"), VIEW, "goal", VOTERS, 0.0)  # type: ignore[arg-type]
    assert machine.poll(0.0)
    return found(machine)


def write_here(agent: Agent, value: str) -> None:
    agent.write_above(agent.document("main"), VIEW, "goal", pack(value, "a value"))


@pytest.mark.parametrize("is_mutant", [False, True])
def test_reads_never_go_back_to_a_value_that_was_read_before_another(
    is_mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three writes at the same time: 1 and 2 know nothing of each other, 3 builds on 2 alone, whose
    # clock is far ahead. Were the stamp of 3 that of its own clock, 1 would win over it again.
    if is_mutant:
        mutate = mutants.STRONG["strong_stamps_from_the_clock_alone"]
        monkeypatch.setattr(Document, "put_above", Document.put_above)
        mutate()
    one, two, three = Agent(1), Agent(2), Agent(3)
    hour = 3_600_000
    one._wall = lambda: 1_000_000 + hour
    two._wall = lambda: 1_000_000 + 2 * hour
    three._wall = lambda: 1_000_000
    write_here(one, "1")
    write_here(two, "2")
    for agent in (one, two):
        agent.sealed()
    three.receive(two.outbox[0])
    write_here(three, "3")
    three.sealed()

    reader = Agent(9)
    reads = []
    for agent in (one, two, three):
        reader.receive(agent.outbox[0])
        reads.append(read_here(reader))

    assert (reads == ["1", "2", "3"]) is not is_mutant
    assert (reads == ["1", "2", "1"]) is is_mutant


# A storm: clients that read and write one key strongly as fast as they can, while all goes wrong


class Storm:
    """Five replicas, three of them voters, each with a client that reads and writes *keys*."""

    def __init__(self, seed: int, *, keys: tuple[str, ...] = ("x",), faults: bool = True) -> None:
        self.rng = rng = random.Random(f"storm {seed}")
        # A third goes over long distances, which keeps apart what happens at once; in a third the
        # power is cut again and again; in the last anything goes wrong.
        self.is_wide, self.is_dark = seed % 3 == 0, seed % 3 == 1
        self.keys = keys
        voters = ("agent-0", "agent-1", "agent-2")
        config = Config(
            heartbeat=1.0,
            link_timeout=3.0,
            want_delay=rng.choice((0.05, 0.3)),
            want_retry=rng.choice((0.2, 1.0)),
            snapshot_after_bytes=rng.choice((200, 2**20)),
            log_bytes=rng.choice((1, 2**20)),
            mesh_max=rng.choice((16, 3)),
            voters=voters,
        )
        self.sim = Simulation(
            seed,
            5,
            latency=(0.002, 0.3) if self.is_wide else rng.choice(((0.0005, 0.003), (0.01, 0.1))),
            loss=rng.choice((0.0, 0.0, 0.1)) if faults else 0.0,
            skew=rng.choice((0.0, 3600.0)),
            durability=rng.choice(("process", "power")),
            config=config,
        )
        self.history = History()
        self.moments = 0
        self.values = 0
        self.ends_at = 8.0
        for name in self.sim.names:
            self.sim.at(rng.uniform(0.5, 1.5), partial(self.step, name))
        if faults:
            self.schedule_faults()

    def moment(self) -> float:
        self.moments += 1
        return float(self.moments)

    def step(self, name: str) -> None:
        """Begin an operation, and the next when it has ended."""
        if self.sim.now >= self.ends_at:
            return
        again = partial(self.step, name)
        replica = self.sim.up(name)
        if replica is None or replica.busy_until > self.sim.now:
            self.sim.at(self.sim.now + 0.1, again)
            return
        key = self.rng.choice(self.keys)
        act = self.read if self.rng.random() < 0.5 else self.write
        act(replica, key, self.rng.choice((0.3, 1.0, 4.0)), again)

    def read(
        self, replica: SimulatedReplica, key: str, patience: float, then: Callable[[], None]
    ) -> None:
        place = (replica.core, replica.document("strong"), VIEW, key)
        machine = StrongRead(*place, self.sim.config.voters, self.sim.now)
        call = self.history.call(replica.agent, "read", key, None, self.moment())

        def done() -> None:
            value = None if machine.value is None else unpack(machine.value)
            self.history.returned(call, value, self.moment())

        self.start(replica, machine, patience, done, then)

    def write(
        self, replica: SimulatedReplica, key: str, patience: float, then: Callable[[], None]
    ) -> None:
        self.values += 1
        value = self.values
        place = (replica.core, replica.document("strong"), VIEW, key)
        machine = StrongWrite(*place, self.sim.config.voters, self.sim.now)
        machine.value = pack(value, "a number")
        call = self.history.call(replica.agent, "write", key, value, self.moment())

        def failed() -> None:
            if not machine.failure(patience).unknown:
                self.history.failed(call)

        def done() -> None:
            self.history.returned(call, value, self.moment())

        self.start(replica, machine, patience, done, then, failed)

    def start(
        self,
        replica: SimulatedReplica,
        machine: Machine,
        patience: float,
        done: Callable[[], None],
        then: Callable[[], None],
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        is_over = False

        def end(ending: Callable[[], None]) -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                ending()
                self.sim.at(
                    self.sim.now + 0.0 if self.is_wide else self.rng.choice((0.0, 0.1, 0.3)), then
                )

        def expire() -> None:
            if replica.is_alive and not is_over:
                replica.stop_machine(machine)
                end(failed)
            else:
                # Its process died: nobody knows.
                end(lambda: None)

        self.sim.at(self.sim.now + patience, expire)
        replica.start(machine, lambda: end(done))

    def schedule_faults(self) -> None:
        if self.is_dark:
            for _ in range(8):
                self.sim.at(self.rng.uniform(1, self.ends_at), self.cut_power)
        for _ in range(self.rng.randrange(2 if self.is_wide else 8)):
            fault = self.rng.choice(
                (self.crash, self.crash, self.cut_power, self.part, self.part, self.cut_one)
                + (self.cut_one, self.slow_disk, self.stall, self.jump_clock)
            )
            self.sim.at(self.rng.uniform(1, self.ends_at), fault)

    def crash(self) -> None:
        name = self.rng.choice(self.sim.names)
        if self.sim.up(name) is not None:
            self.sim.crash(name, power=self.rng.random() < 0.5)
            pause = self.rng.choice((0.001, 0.5, 3.0))
            self.sim.at(self.sim.now + pause, partial(self.raise_up, name))

    def raise_up(self, name: str) -> None:
        if self.sim.up(name) is None:
            self.sim.restart(name)

    def cut_power(self) -> None:
        """Of the voters at once."""
        for name in self.sim.config.voters:
            if self.sim.up(name) is not None:
                self.sim.crash(name, power=True)
                self.sim.at(self.sim.now + self.rng.random(), partial(self.raise_up, name))

    def part(self) -> None:
        names = self.sim.names
        self.rng.shuffle(names)
        self.sim.partition(set(names[: self.rng.choice((1, 2, 3))]))
        self.sim.at(self.sim.now + self.rng.uniform(0.3, 2), self.sim.heal)

    def cut_one(self) -> None:
        one, two = self.rng.sample(self.sim.names, 2)
        self.sim.cut(one, two, silently=True, both=self.rng.random() < 0.5)
        self.sim.at(self.sim.now + self.rng.uniform(0.3, 2), self.sim.heal)

    def slow_disk(self) -> None:
        self.sim.stall_disk(self.rng.choice(self.sim.names), self.rng.uniform(0.2, 3))

    def stall(self) -> None:
        name = self.rng.choice(self.sim.names)
        if self.sim.up(name) is not None:
            self.sim.stall(name, self.rng.choice((0.3, 2.0)))

    def jump_clock(self) -> None:
        self.sim.jump_clock(self.rng.choice(self.sim.names), self.rng.choice((-3600, 3600)))

    def run(self) -> Anomaly | None:
        """What contradicts itself. Afterwards all is repaired, and everybody reads once more."""
        self.sim.run(self.ends_at)
        self.sim.heal()
        self.sim.snooze()
        for name in self.sim.names:
            self.raise_up(name)
        self.sim.run(1)
        for name in self.sim.names:
            for key in self.keys:
                self.read(self.sim[name], key, 15, lambda: None)
        before = len(self.history.operations()) - len(self.sim.names) * len(self.keys)
        self.sim.run(15)
        for operation in self.history.operations()[before:]:
            assert operation.returned is not None, f"{operation} does not end"
        for replica in self.sim.replicas:
            assert not replica.core._quorum._questions
        self.sim.end()
        return check(self.history.operations())


def storms(seeds: int) -> Iterator[tuple[int, str]]:
    """The seeds that contradict themselves, and how."""
    for seed in range(seeds):
        try:
            anomaly = Storm(seed).run()
        except AssertionError as exc:
            yield seed, f"assertion: {exc}"
        else:
            if anomaly is not None:
                yield seed, str(anomaly)


@pytest.mark.parametrize("seed", range(STORM_SEEDS))
def test_strong_reads_and_writes_are_linearizable_in_a_storm(seed: int) -> None:
    storm = Storm(seed)

    anomaly = storm.run()

    assert anomaly is None, str(anomaly)
    completed = [o for o in storm.history.operations() if o.returned is not None]
    assert len(completed) >= 20


@pytest.mark.parametrize("seed", range(4))
def test_several_keys_of_a_storm_are_linearizable(seed: int) -> None:
    anomaly = Storm(1000 + seed, keys=("x", "y")).run()

    assert anomaly is None, str(anomaly)


def test_when_nothing_goes_wrong_everything_ends() -> None:
    storm = Storm(1, faults=False)

    assert storm.run() is None

    operations = storm.history.operations()
    late = [o for o in operations if o.returned is None]
    # Those that were given 0.3 s by chance, in a mesh that has just begun.
    assert len(late) <= 3 and len(operations) > 50


@pytest.mark.parametrize("name", ["strong_without_asking", "one_voter_is_enough"])
def test_a_storm_kills_the_mutant(name: str) -> None:
    ran = subprocess.run(
        [sys.executable, str(HERE), name, str(STORM_SEEDS)],
        capture_output=True,
        text=True,
        check=True,
    )

    killed = json.loads(ran.stdout)
    assert killed is not None, f"{name} survived {STORM_SEEDS} storms"
    print(f"{name}: seed {killed[0]}")
    assert "is not linearizable" in killed[1], killed


KILLERS = {
    "strong_without_asking": test_who_cannot_catch_up_says_so,
    "writes_without_asking": test_who_cannot_catch_up_says_so,
    "reads_without_write_back": (
        test_a_value_that_is_read_is_at_a_majority_before_the_read_returns
    ),
    "answers_before_synced": test_quorum.test_a_durable_question_waits_until_the_store_has_synced,
    "answers_before_committed": test_quorum.test_it_is_answered_once_the_version_is_committed,
    "one_voter_is_enough": (test_without_a_majority_nothing_is_written_and_the_missing_are_named),
}
"""Mutants, and the scenario made for each; that of the stamps has its own test."""


@pytest.mark.parametrize("name", KILLERS)
def test_a_scenario_kills_the_mutant(name: str) -> None:
    killer = KILLERS[name]
    code = f"import {killer.__module__} as m, mutants; mutants.STRONG[{name!r}](); "
    ran = subprocess.run(
        [sys.executable, "-c", f"{code} m.{killer.__name__}()"],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 1 and "AssertionError" in ran.stderr, ran.stderr


@pytest.mark.parametrize("minority", ["agent-0", "agent-1", "agent-2"])
def test_the_others_go_on_while_a_voter_is_down(minority: str) -> None:
    storm = Storm(7, faults=False)
    sim = storm.sim
    sim.run(3)
    sim.crash(minority, power=True)
    before = len(storm.history.operations())
    sim.run(4)

    operations = storm.history.operations()[before:]
    assert sum(o.returned is not None for o in operations) > 10
    sim.end()


def test_what_a_receipt_says_survives_a_power_cut_of_all() -> None:
    for seed in range(5):
        sim = Simulation(seed, 4, config=Config(voters=["agent-1", "agent-2", "agent-3"]))
        sim.run(3)
        writer = sim["agent-0"]
        writer.map("plan")["goal"] = seed
        writer.seal_now(writer.document("main"))
        dot = Dot(writer.writer, 1)
        versions = {"main": Version([dot])}
        confirm, voters = Confirm.majority(durable=True), sim.config.voters
        machine = Confirmation(writer.core, confirm, versions, voters, sim.now)
        receipts: list[Receipt] = []
        writer.start(machine, lambda made=machine, to=receipts: to.append(made.receipt))  # type: ignore[misc]
        sim.until(lambda to=receipts: bool(to), timeout=10)  # type: ignore[misc]
        for name in sim.names:
            sim.crash(name, power=True)

        (receipt,) = receipts
        assert len(receipt.by) >= 2 and receipt.durable
        for name in receipt.by:
            assert sim.synced_version(name, "main").covers(dot)
            sim.restart(name)
        sim.run(5)
        assert sim[receipt.by[0]].map("plan")["goal"] == seed
        sim.end()


# Over real sockets


def address(replica: Replica) -> str:
    assert replica.address is not None
    return replica.address


NAMES = ("relay-1", "relay-2", "relay-3")


@asynccontextmanager
async def three_relays(tmp_path: Path, *names: str) -> Any:
    """Those of the three relays that are named, each with a store."""
    async with AsyncExitStack() as stack:
        relays: list[Replica] = []
        for name in names or NAMES:
            config = Config(voters=NAMES)
            peers = [address(relay) for relay in relays]
            made = Replica(
                name,
                store=tmp_path / f"{name}.db",
                listen=LOCAL,
                peers=peers,
                role="relay",
                config=config,
            )
            relays.append(await stack.enter_async_context(made))
        yield relays


def agent(relays: list[Replica], name: str = "ann") -> Replica:
    config = Config(voters=NAMES)
    return Replica(name, peers=[address(relay) for relay in relays[:2]], config=config)


@asynchronous
async def test_a_majority_of_relays_confirms_on_disk(tmp_path: Path) -> None:
    async with three_relays(tmp_path) as relays, agent(relays) as ann:
        ann.map("plan")["goal"] = "ship"
        receipt = await ann.confirm(Confirm.majority(durable=True), timeout=10)
        everybody = await ann.confirm(Confirm.all(durable=True), timeout=10)

        assert receipt.durable and len(receipt.by) >= 2 and set(receipt.by) <= set(NAMES)
        assert everybody.by == NAMES
        for relay in relays:
            assert relay.map("plan")["goal"] == "ship"


@asynchronous
async def test_what_is_written_strongly_is_read_by_others(tmp_path: Path) -> None:
    async with three_relays(tmp_path) as relays, agent(relays) as ann, agent(relays, "bob") as bob:
        plan = ann.map("plan", strategy="max")
        assert await plan.get_strong("leader", timeout=10) is None
        await plan.set_strong("leader", 9, timeout=10)
        assert await bob.map("plan").get_strong("leader", timeout=10) == 9
        await bob.map("plan").set_strong("leader", 1, timeout=10)
        assert await plan.get_strong("leader", timeout=10) == 1

        await bob.register("turn").set_strong("bob", timeout=10)
        assert await ann.register("turn").get_strong(timeout=10) == "bob"
        assert await relays[2].register("turn").get_strong(timeout=10) == "bob"


@asynchronous
async def test_many_clients_at_once_are_linearizable(tmp_path: Path) -> None:
    history = History()
    loop = asyncio.get_running_loop()

    async def client(replica: Replica, number: int) -> None:
        plan = replica.map("plan")
        for step in range(15):
            value = 100 * number + step
            call = history.call(replica.agent, "write", "x", value, loop.time())
            await plan.set_strong("x", value, timeout=20)
            history.returned(call, None, loop.time())
            call = history.call(replica.agent, "read", "x", None, loop.time())
            got = await plan.get_strong("x", timeout=20)
            history.returned(call, got, loop.time())

    async with three_relays(tmp_path) as relays, agent(relays) as ann, agent(relays, "bob") as bob:
        async with asyncio.TaskGroup() as group:
            for number, replica in enumerate([ann, bob, ann, bob, relays[0]]):
                group.create_task(client(replica, number))

    operations = history.operations()
    assert len(operations) == 150
    anomaly = check(operations)
    assert anomaly is None, str(anomaly)


@asynchronous
async def test_one_relay_less_is_still_a_majority(tmp_path: Path) -> None:
    async with three_relays(tmp_path, "relay-1", "relay-2") as relays, agent(relays) as ann:
        ann.map("plan")["goal"] = "ship"
        receipt = await ann.confirm(Confirm.majority(durable=True), timeout=10)
        await ann.map("plan").set_strong("leader", "ann", timeout=10)

        assert receipt.by == ("relay-1", "relay-2")
        assert await ann.map("plan").get_strong("leader", timeout=10) == "ann"
        with pytest.raises(ConfirmTimeout) as caught:
            await ann.confirm(Confirm.all(), timeout=0.3)
        assert caught.value.got == ("relay-1", "relay-2")
        assert caught.value.missing == ("relay-3",)
        assert caught.value.unknown
        assert not ann._sync._quorum._questions


@asynchronous
async def test_who_waits_for_others_does_not_keep_the_loop_busy() -> None:
    async with Replica("ann", config=Config(voters=["ann", "bob", "eve"])) as ann:
        ann.map("plan")["goal"] = "ship"
        await ann.durable()
        before = time.process_time()
        with pytest.raises(ConfirmTimeout):
            await ann.confirm(Confirm.majority(), timeout=0.5)
        with pytest.raises(QuorumLost):
            await ann.map("plan").get_strong("leader", timeout=0.5)

        # It was nearly all of the second, a pump after the other.
        assert time.process_time() - before < 0.3


@asynchronous
async def test_two_relays_less_are_no_majority(tmp_path: Path) -> None:
    async with three_relays(tmp_path, "relay-2") as relays, agent(relays) as ann:
        await ann.synced(timeout=10)
        ann.map("plan")["goal"] = "ship"
        with pytest.raises(ConfirmTimeout, match="confirmed by relay-2 within 0.5 s") as timeout:
            await ann.confirm(Confirm.majority(durable=True), timeout=0.5)
        with pytest.raises(QuorumLost, match="no majority of 3 voters within 0.3 s") as lost:
            await ann.map("plan").set_strong("leader", "ann", timeout=0.3)
        with pytest.raises(QuorumLost):
            await ann.map("plan").get_strong("leader", timeout=0.3)

        assert timeout.value.missing == lost.value.missing == ("relay-1", "relay-3")
        assert not lost.value.unknown
        assert "leader" not in ann.map("plan")
        # What was written and not confirmed stays.
        assert ann.map("plan")["goal"] == "ship"


@asynchronous
async def test_a_call_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    async with three_relays(tmp_path, "relay-2") as relays, agent(relays) as ann:
        calls: list[asyncio.Task[Any]] = [
            asyncio.create_task(ann.map("plan").get_strong("x", timeout=None)),
            asyncio.create_task(ann.map("plan").set_strong("x", 1, timeout=None)),
        ]
        await ann.synced(timeout=10)
        assert len(ann._sync._quorum._questions) == 2
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

        assert not ann._sync._quorum._questions
        assert not ann._waiters


@asynchronous
async def test_what_cannot_be_is_refused_at_the_door() -> None:
    async with Replica("ann") as ann, Replica("bob", config=Config(voters=["x"])) as bob:
        with pytest.raises(UsageError, match="confirm takes crdtstate.Confirm"):
            await ann.confirm(2)  # type: ignore[arg-type]
        ann.map("plan")["goal"] = 1
        with pytest.raises(UsageError, match="Name the voters"):
            await ann.confirm(Confirm.majority())
        with pytest.raises(UsageError, match="need voters"):
            await ann.map("plan").get_strong("goal")
        with pytest.raises(UsageError, match="need voters"):
            await ann.register("leader").set_strong(1)
        with pytest.raises(UsageError, match="can never be"):
            await bob.confirm(Confirm(2))
        with pytest.raises(UsageError):
            await bob.map("plan").set_strong("goal", object())
        with bob.transaction():
            with pytest.raises(UsageError, match="not inside a transaction"):
                await bob.map("plan").get_strong("goal")
        assert not ann._sync._quorum._questions and not bob._sync._quorum._questions


WRITER = """
import asyncio, sys
from crdtstate import Config, Confirm, Replica
async def main():
    config = Config(voters=["relay-1", "relay-2", "relay-3"])
    async with Replica("victim", store=sys.argv[1], peers=sys.argv[2:], config=config) as replica:
        for number in range(10**6):
            replica.map("log")[str(number)] = number
            receipt = await replica.confirm(Confirm.majority(durable=True), timeout=30)
            print(number, *receipt.by, flush=True)
asyncio.run(main())
"""


@asynchronous
async def test_what_was_confirmed_is_with_those_named_after_kill_9(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        running: list[asyncio.subprocess.Process] = []
        urls: list[str] = []

        async def spawn(*arguments: str) -> asyncio.StreamReader:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, stdout=asyncio.subprocess.PIPE
            )
            running.append(process)
            stack.push_async_callback(process.wait)
            assert process.stdout is not None
            return process.stdout

        for name in NAMES:
            peers = [part for url in urls for part in ("--peer", url)]
            store = ("--store", str(tmp_path / f"{name}.db"))
            options = ("--listen", LOCAL, "--name", name, "--json", *store, *peers)
            output = await spawn("-m", "crdtstate", "relay", *options)
            urls.append(json.loads(await output.readline())["address"])
        output = await spawn("-c", WRITER, str(tmp_path / "victim.db"), *urls[:2])
        receipts = [(await output.readline()).decode().split() for _ in range(20)]
        for process in reversed(running):
            os.kill(process.pid, signal.SIGKILL)
    stores = {}
    for name in (*NAMES, "victim"):
        async with Replica(name, store=tmp_path / f"{name}.db") as replica:
            stores[name] = dict(replica.map("log"))

    for number, *names in receipts:
        assert len(names) >= 2
        for name in names:
            assert stores[name][number] == int(number)
        assert stores["victim"][number] == int(number)


if __name__ == "__main__":
    if sys.argv[1] in mutants.STRONG:
        mutants.STRONG[sys.argv[1]]()
    print(json.dumps(next(storms(int(sys.argv[2])), None)))
