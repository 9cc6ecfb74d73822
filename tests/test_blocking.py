"""Replicas for programs without an event loop."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import crdtstate
from crdtstate import (
    Changed,
    Config,
    Confirm,
    MemberUp,
    ReplicaClosed,
    UnsupportedValue,
    UsageError,
    WaitTimeout,
)
from crdtstate.blocking import Replica
from tests.fleet_mesh import Mesh


@pytest.fixture
def replica() -> Iterator[Replica]:
    with Replica("agent-7") as replica:
        yield replica


def test_views_read_and_write_as_in_the_asyncio_replica(replica):
    plan = replica.map("plan")
    plan["goal"] = "ship it"
    plan.update(step=1, owner="agent-7")
    del plan["step"]
    tokens = replica.counter("tokens")
    tokens.increment(120)
    tokens.decrement()
    leader = replica.register("leader", strategy="max")
    leader.value = "agent-7"
    skills = replica.set("skills")
    skills.add("python")
    skills |= {"sql", "c"}

    assert plan == {"goal": "ship it", "owner": "agent-7"}
    assert (tokens.value, int(tokens)) == (119, 119)
    assert (leader.value, leader.strategy, leader.is_set) == ("agent-7", "max", True)
    assert skills == {"python", "sql", "c"} and skills & {"c"} == {"c"}
    assert replica.documents() == ["main"]
    assert replica.document("main").map("plan")["goal"] == "ship it"
    assert repr(plan) == "<Map plan in main: 2 keys>"


def test_a_maps_compound_methods_are_one_call_each(replica):
    plan = replica.map("plan")
    plan.update(a=1, b=2)

    assert plan.setdefault("a", 9) == 1
    assert plan.pop("a") == 1
    assert plan.pop("a", None) is None
    assert dict(plan.items()) == {"b": 2} and list(plan.values()) == [2] and list(plan) == ["b"]
    plan.clear()
    assert not plan


def test_a_register_is_cleared_and_views_explain_themselves(replica):
    leader = replica.register("leader")
    leader.value = "agent-7"

    assert leader.explain().rule == "only value"
    leader.clear()
    assert leader.value is None and not leader.is_set
    assert replica.map("plan").conflicts() == {} and replica.conflicts() == []


def test_errors_are_raised_in_the_callers_thread(replica):
    with pytest.raises(KeyError):
        replica.map("plan")["missing"]
    with pytest.raises(UnsupportedValue):
        replica.map("plan")["key"] = object()
    with pytest.raises(AttributeError):
        replica.map("plan").nonsense()
    with pytest.raises(WaitTimeout):
        replica.wait_for(crdtstate.Cut({"main": {1: 1}}), timeout=0.01)


def test_it_is_durable_and_recovers(tmp_path):
    path = tmp_path / "agent.db"
    with Replica("agent-7", store=path) as replica:
        replica.map("plan")["goal"] = "ship it"
        replica.durable()

    with Replica("agent-7", store=path) as replica:
        assert replica.map("plan")["goal"] == "ship it"
        assert replica.status()["store"] == str(path)


def test_two_replicas_meet_over_a_websocket():
    with Replica("a", listen="ws://127.0.0.1:0") as a, Replica("b", peers=[a.address]) as b:
        a.map("plan")["goal"] = "ship it"
        b.wait_for(a.version(), timeout=10)
        b.counter("tokens").increment()
        b.synced(timeout=10)

        assert b.map("plan")["goal"] == "ship it" and a.counter("tokens").value == 1
        assert [peer.agent for peer in a.peers()] == ["b"]


def test_handlers_run_on_the_replicas_thread_and_may_write(replica):
    seen: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()

    def handle(event: Changed) -> None:
        if event.name == "plan":
            replica.counter("changes").increment()
            with replica.transaction():
                replica.map("log")["last"] = event.path
            seen.put((event.path, threading.current_thread().name))

    cancel = replica.on(Changed, handle)
    replica.map("plan")["goal"] = "ship it"

    assert seen.get(timeout=10) == ("plan['goal']", "crdtstate agent-7")
    assert replica.counter("changes").value == 1 and replica.map("log")["last"] == "plan['goal']"
    cancel()
    replica.map("plan")["goal"] = "again"
    assert replica.counter("changes").value == 1


def test_a_transaction_is_one_change_and_reads_its_own_writes(replica):
    changes = []
    replica.on(Changed, lambda event: changes.append(event.path))
    before = replica.version()

    with replica.transaction(message="replan", run="run-42"):
        replica.map("plan")["goal"] = "ship it"
        with replica.transaction(message="joins"):
            replica.counter("tokens").increment()
        assert replica.map("plan")["goal"] == "ship it"

    assert len(before) == 0
    assert replica.document("main").version.total == 1
    assert replica.call(lambda _: sorted(changes)) == ["plan['goal']", "tokens"]


def test_an_exception_undoes_a_transaction(replica):
    replica.map("plan")["goal"] = "ship it"

    with pytest.raises(ZeroDivisionError):
        with replica.transaction():
            replica.map("plan")["goal"] = "give up"
            replica.counter("tokens").increment(1 // 0)

    assert replica.map("plan")["goal"] == "ship it" and replica.counter("tokens").value == 0


def test_what_a_transaction_refuses_is_refused_at_once(replica):
    with pytest.raises(UnsupportedValue):
        with replica.transaction(message="m" * 1001):
            raise AssertionError("not reached")
    with pytest.raises(UsageError, match="nothing can be waited for"):
        with replica.transaction():
            replica.synced()


def test_other_threads_wait_while_a_transaction_is_open(replica):
    plan = replica.map("plan")
    plan["n"] = 0
    inside, written = threading.Event(), threading.Event()

    def write() -> None:
        inside.wait(10)
        plan["n"] = 1
        written.set()

    thread = threading.Thread(target=write)
    thread.start()
    with replica.transaction():
        inside.set()
        assert not written.wait(0.05)
        assert plan["n"] == 0
        plan["m"] = 2
    thread.join(10)

    assert plan == {"n": 1, "m": 2}
    assert replica.document("main").version.total == 3


def test_transactions_of_many_threads_do_not_mix(replica):
    plan = replica.map("plan")
    plan["n"] = 0

    def count() -> None:
        for _ in range(20):
            with replica.transaction():
                plan["n"] = plan["n"] + 1

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert plan["n"] == 80


def test_a_transaction_that_is_open_for_too_long_is_undone():
    config = Config(heartbeat=0.01, link_timeout=0.2)
    with Replica("agent-7", config=config) as replica:
        plan = replica.map("plan")
        began = time.monotonic()
        with pytest.raises(UsageError, match="open for 0.1 s"):
            with replica.transaction():
                plan["goal"] = "hold"
                while time.monotonic() < began + 10:
                    plan["goal"]

        assert "goal" not in plan
        with pytest.raises(UsageError, match="open for 0.1 s"):
            with replica.transaction():
                plan["goal"] = "hold"
                threading.Event().wait(0.3)
        assert "goal" not in plan


def test_it_is_used_only_while_it_is_open(tmp_path):
    replica = Replica("agent-7")
    with pytest.raises(ReplicaClosed, match="not open"):
        replica.map("plan")

    with replica:
        plan = replica.map("plan")
        with pytest.raises(UsageError, match="opened once"):
            replica.__enter__()
    replica.close()

    with pytest.raises(ReplicaClosed, match="closed"):
        plan["goal"] = "late"
    with pytest.raises(ReplicaClosed, match="closed"):
        replica.synced()
    assert repr(replica) == "<Replica agent-7 closed>"


def test_what_is_waited_for_ends_with_the_replica():
    with Replica("agent-7") as replica:
        failures: list[BaseException] = []

        def wait() -> None:
            try:
                replica.wait_for(crdtstate.Cut({"main": {1: 1}}))
            except ReplicaClosed as exc:
                failures.append(exc)

        thread = threading.Thread(target=wait)
        thread.start()
        while not replica.call(lambda inner: inner._waiters):
            pass
    thread.join(10)

    assert len(failures) == 1


def test_what_keeps_it_from_opening_is_raised(tmp_path):
    with pytest.raises(UsageError):
        Replica("")
    with pytest.raises(crdtstate.StoreError):
        with Replica("agent-7", store=tmp_path / "absent" / "agent.db"):
            raise AssertionError("not reached")


def test_native_types_are_refused_with_what_to_do(replica):
    with pytest.raises(UsageError, match=r"replica\.call"):
        replica.document("notes", shared=True)

    def write(inner: crdtstate.Replica) -> str:
        body = inner.document("notes", shared=True).text("body")
        body += "x"
        return str(body)

    assert replica.call(write) == "x"


def test_it_can_be_looked_at_before_and_after(tmp_path):
    replica = Replica("agent-7", store=tmp_path / "a.db", listen="ws://127.0.0.1:0")
    with replica:
        plan = replica.map("plan")
        plan["goal"] = "ship it"
        with Replica("agent-8") as other:
            other.connect(replica.address)
            other.synced(timeout=10)
            assert [peer.agent for peer in other.peers()] == ["agent-7"]
            assert other.unreachable() == {} and other.role == "agent"
            assert other.writer != replica.writer

    assert replica.peers() == [] and replica.status()["ready"] is False
    assert "closed" in repr(replica) and "plan" in repr(plan)
    with pytest.raises(ReplicaClosed):
        plan["goal"] = "more"
    with pytest.raises(UsageError, match="once"):
        replica.__enter__()


def test_it_confirms_reads_strongly_and_shows_itself(tmp_path: Path) -> None:
    config = Config(voters=["ann"])
    with Replica("ann", store=tmp_path / "ann.db", config=config) as ann:
        plan, leader = ann.map("plan"), ann.register("leader")
        plan["goal"] = "ship it"

        assert ann.confirm(Confirm.majority(durable=True), timeout=10).by == ("ann",)
        plan.set_strong("owner", "ann")
        leader.set_strong("ann", timeout=10)
        ann.present("busy")

        assert (plan.get_strong("owner"), leader.get_strong()) == ("ann", "ann")
        assert plan.get_strong("nothing") is None
        assert ann.presence() == {"ann": "busy"}
        assert [(member.agent, member.state) for member in ann.members()] == [("ann", "up")]
        with ann.transaction(), pytest.raises(UsageError, match="nothing can be waited for"):
            plan.get_strong("owner")


# Conflicts


def test_conflicts_are_voted_on_resolved_and_audited() -> None:
    config = Config(voters=["ann", "bob"])
    with (
        Replica("ann", listen="ws://127.0.0.1:0", config=config) as ann,
        Replica("bob", peers=[ann.address], config=config) as bob,
    ):

        def even() -> None:
            ann.wait_for(bob.version(), timeout=20)
            bob.wait_for(ann.version(), timeout=20)

        even()
        ann.map("plan").use_strategy("max", prefix="best/")
        ann.map("plan").use_strategy("vote")
        with ann.transaction():
            ann.map("plan")["goal"] = "a"
            bob.map("plan")["goal"] = "b"
            ann.map("plan")["best/run"] = 7
            bob.map("plan")["best/run"] = 5
        even()
        assert bob.map("plan")["best/run"] == 7
        assert bob.map("plan").strategy_of("best/run") == "max"
        for agent in (ann, bob):
            (goal,) = [each for each in agent.conflicts() if each.key == "goal"]
            agent.vote(goal, "a")
        even()
        assert bob.map("plan")["goal"] == ann.map("plan")["goal"] == "a"
        for agent in (ann, bob):
            seen: queue.Queue[MemberUp] = queue.Queue()
            agent.on(MemberUp, seen.put)
            while len(agent.members()) < 2:
                seen.get(timeout=20)
        assert ann.is_responsible(goal) != bob.is_responsible(goal)
        bob.resolve(goal, "settled")
        even()
        assert [(r.kind, r.chosen) for r in ann.audit(kind="resolution")] == [
            ("resolution", "settled")
        ]
        assert [r.kind for r in bob.audit(bob.audit()[0], limit=5)] == ["decision", "resolution"]
        assert [c.key for c in bob.conflicts()] == ["best/run"]


def test_a_mesh_with_members_from_a_thread() -> None:
    mesh = Mesh()
    with (
        Replica("relay", listen="ws://127.0.0.1:0", mesh=mesh.credentials("relay")) as relay,
        Replica(
            "queen",
            peers=[str(relay.address)],
            mesh=mesh.credentials("queen", "*:rws", "*:c"),
        ) as queen,
    ):
        with Replica("eve", peers=[str(relay.address)], mesh=mesh.credentials("eve")) as eve:
            eve.map("plan")["a"] = 1
            queen.wait_for(eve.version(), timeout=10)
        (revocation,) = queen.revoke("eve", reason="it is over")
        relay.wait_for(queen.version(), timeout=10)
        assert relay.revocations() == [revocation]
        assert relay.quarantined() == []
        with pytest.raises(UsageError):
            queen.release("nothing")
