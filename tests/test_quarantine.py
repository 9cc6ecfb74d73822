"""Quarantine over real replicas: what rules refuse is hidden alike, told, and released."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import fleet_mesh
import pytest
from harness import asynchronous

import crdtstate
from crdtstate import (
    Changed,
    ChangeQuarantined,
    ChangeRefused,
    ChangeReleased,
    Config,
    Event,
    Quarantined,
    Replica,
    SnapshotReceived,
    UnknownValidator,
    UsageError,
    ValidatorMissing,
)
from crdtstate import validators as validators_module
from crdtstate.documents import DocumentSet
from crdtstate.errors import NotAllowed
from crdtstate.hiding import Ceiling
from crdtstate.relay import server as relay_server
from crdtstate.relay import settings as relay_settings
from crdtstate.simulation import Simulation
from crdtstate.stores.file import verify

FAST = Config(heartbeat=0.1, link_timeout=5.0, want_delay=0.02, want_retry=0.1, tidy_delay=0.1)

_numbers = itertools.count()


@crdtstate.validator("test: whole tasks")
def whole_tasks(proposal: crdtstate.Proposal) -> str | None:
    for write in proposal.writes:
        if write.name == "tasks" and not write.removed and "title" not in write.value:
            return f"{write.path} has no title"
    return None


def here() -> str:
    return f"memory://quarantine-{os.getpid()}-{next(_numbers)}"


def lawless(replica: DocumentSet, name: str = "main") -> None:
    """Let this replica write what it likes: its process does not ask what the rules say."""
    document = replica.document(name)
    document.admit_open = lambda origin: None  # type: ignore[method-assign]
    document._admit_write = lambda *write: None  # type: ignore[method-assign]


class Mesh:
    """A few replicas around the first one."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.url = here()
        self.replicas: list[Replica] = []
        self.events: dict[str, list[Event]] = {}
        self._stirred = asyncio.Event()

    async def add(self, agent: str, **options: Any) -> Replica:
        where = {"peers": [self.url]} if self.replicas else {"listen": self.url}
        options = {"config": FAST, **where, **options}
        replica = await self._stack.enter_async_context(Replica(agent, **options))
        self.replicas.append(replica)
        self.events[agent] = []

        def note(event: Event) -> None:
            self.events[agent].append(event)
            self._stirred.set()

        replica.on(Event, note)
        return replica

    async def until(self, is_so: Callable[[], object]) -> None:
        """Wait for what is told by an event."""
        async with asyncio.timeout(30):
            while not is_so():
                self._stirred.clear()
                await self._stirred.wait()

    async def settle(self, *replicas: Replica) -> None:
        """Wait until all have everything."""
        for replica in replicas or self.replicas:
            await replica.synced(timeout=30)
        versions = [replica.version() for replica in replicas or self.replicas]
        for replica in replicas or self.replicas:
            for version in versions:
                await replica.wait_for(version, timeout=30)

    def told(self, agent: str, kind: type[Event]) -> list[Any]:
        return [event for event in self.events[agent] if type(event) is kind]


@contextmanager
def unregistered(name: str) -> Iterator[None]:
    """As in a process that has not registered a validator."""
    function = validators_module._registry.pop(name)
    try:
        yield
    finally:
        validators_module._registry[name] = function


@asynchronous
async def test_what_rules_refuse_is_hidden_on_all_told_and_released_by_one() -> None:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        ann, bob, eve = [await mesh.add(name) for name in ("ann", "bob", "eve")]
        ann.document("main").use_validator("test: whole tasks")
        ann.map("tasks")["1"] = {"title": "one"}
        await mesh.settle()
        lawless(eve)
        with eve.transaction(message="why not", run="run-7"):
            eve.map("tasks")["2"] = {"no": "title"}
            eve.map("tasks")["1"] = {"no": "title"}
        eve.map("other")["fine"] = True
        await mesh.settle()

        for replica in (ann, bob):
            assert dict(replica.map("tasks")) == {"1": {"title": "one"}}
            assert dict(replica.map("other")) == {"fine": True}
            (item,) = replica.quarantined()
            assert (item.document, item.agent, item.dot.writer) == ("main", "eve", eve.writer)
            assert item.paths == ("tasks['1']", "tasks['2']")
            assert item.reason == "test: whole tasks: tasks['1'] has no title"
            assert item.reason in str(item)
            (event,) = mesh.told(replica.agent, ChangeQuarantined)
            assert event.is_hidden and event.paths == item.paths and event.agent == "eve"
            (record,) = replica.audit(kind="quarantine")
            assert record.agent == "eve" and record.document == "main"
            assert item.reason in record.detail and "tasks['2']" in record.detail
            assert replica.traffic.changes_hidden == 1
        assert ann.quarantined() == bob.quarantined()

        bob.release(item, message="it is fine")
        with pytest.raises(UsageError, match="is not quarantined"):
            bob.release(item)
        await mesh.settle(ann, bob)

        for replica in (ann, bob):
            assert dict(replica.map("tasks")) == {"1": {"no": "title"}, "2": {"no": "title"}}
            assert replica.quarantined() == []
            (record,) = replica.audit(kind="release")
            assert record.agent == "bob" and record.document == "main"
            assert f"{item.dot.writer:x}:{item.dot.seq} counts" in record.detail
            assert "it is fine" in record.detail
            (event,) = mesh.told(replica.agent, ChangeReleased)
            assert event.by == "bob" and event.document == "main"
        changed = [e for e in mesh.told("ann", Changed) if e.path == "tasks['2']"]
        assert changed[-1].value == {"no": "title"} and changed[-1].agent == "bob"
        found = await ann.compare()
        assert found.agreed and not found.diverged and not found.uncompared


@asynchronous
async def test_who_comes_later_by_a_snapshot_agrees() -> None:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        small = dataclasses.replace(FAST, snapshot_after_bytes=1, log_bytes=1)
        ann = await mesh.add("ann", config=small)
        eve = await mesh.add("eve", config=small)
        ann.document("main").use_validator("test: whole tasks")
        await mesh.settle()
        lawless(eve)
        for number in range(40):
            eve.map("tasks")[str(number)] = {"title": "x" * 500} if number % 4 else {}
            await mesh.settle()
        bad = ann.quarantined()
        assert len(bad) == 10
        ann.release(bad[3])
        await mesh.settle()

        late = await mesh.add("late")
        await mesh.settle(ann, late)

        assert any(event.document == "main" for event in mesh.told("late", SnapshotReceived))
        assert dict(late.map("tasks")) == dict(ann.map("tasks"))
        assert len(late.map("tasks")) == 31
        assert late.quarantined() == ann.quarantined() == [*bad[:3], *bad[4:]]
        assert {e.seq for e in mesh.told("late", ChangeQuarantined)} >= {i.dot.seq for i in bad[4:]}
        # It goes by the same rules from here on.
        with pytest.raises(ChangeRefused):
            late.map("tasks")["x"] = {}
        eve.map("tasks")["y"] = {}
        await mesh.settle(ann, late)
        assert len(late.quarantined()) == 10 and late.quarantined() == ann.quarantined()


@asynchronous
async def test_a_replica_opens_with_what_it_had_hidden_and_not_without_the_validator(
    tmp_path: Path,
) -> None:
    store = tmp_path / "ann.db"
    url = here()
    async with (
        Replica("ann", listen=url, store=store, config=FAST) as ann,
        Replica("eve", peers=[url], config=FAST) as eve,
    ):
        ann.document("main").use_validator("test: whole tasks")
        await ann.synced(timeout=30)
        await eve.wait_for(ann.version(), timeout=30)
        lawless(eve)
        for number in range(3):
            eve.map("tasks")[str(number)] = {}
            await ann.wait_for(eve.version(), timeout=30)
        ann.release(ann.quarantined()[1])
        before, tasks = ann.quarantined(), dict(ann.map("tasks"))
        records = ann.audit(kind="quarantine")
    assert [item.paths for item in before] == [("tasks['0']",), ("tasks['2']",)]

    with (
        unregistered("test: whole tasks"),
        pytest.raises(UnknownValidator, match=r"Register it with @crdtstate.validator\("),
    ):
        async with Replica("ann", store=store, config=FAST):
            pass
    with unregistered("test: whole tasks"):
        # Who only looks at the file does not need it.
        assert not verify(store).problems

    async with Replica("ann", store=store, config=FAST) as ann:
        assert ann.quarantined() == before and dict(ann.map("tasks")) == tasks == {"1": {}}
        # What was recorded when it came is not recorded again.
        assert ann.audit(kind="quarantine") == records
        found = await ann.diff(ann.version(), None)
        assert found == []


@asynchronous
async def test_without_the_validator_changes_wait_and_are_judged_once_it_is_there() -> None:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        ann, eve = await mesh.add("ann"), await mesh.add("eve")
        ann.document("main").use_validator("test: whole tasks")
        await mesh.settle()
        lawless(eve)
        with unregistered("test: whole tasks"):
            with eve.transaction():
                eve.map("tasks")["1"] = {}
            with eve.transaction():
                eve.map("tasks")["2"] = {"title": "two"}
            eve.document("free").map("m")["x"] = 1
            await mesh.until(lambda: mesh.told("ann", ValidatorMissing))
            # Other documents go on.
            await mesh.until(lambda: dict(ann.document("free").map("m")) == {"x": 1})
            assert dict(ann.map("tasks")) == {}
            with pytest.raises(UnknownValidator):
                ann.map("tasks")["3"] = {"title": "three"}
            (event,) = mesh.told("ann", ValidatorMissing)
            assert (event.document, event.validator) == ("main", "test: whole tasks")
            assert "@crdtstate.validator('test: whole tasks')" in event.reason
            assert ann.status()["pending"] >= 1
        await mesh.settle()

        assert dict(ann.map("tasks")) == {"2": {"title": "two"}}
        assert [item.paths for item in ann.quarantined()] == [("tasks['1']",)]
        assert ann.status()["pending"] == 0


@asynchronous
async def test_a_quota_holds_against_who_does_not_keep_it() -> None:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        ann, bob, eve = [await mesh.add(name) for name in ("ann", "bob", "eve")]
        ann.document("main").limit(keys=5, bytes=10_000)
        await mesh.settle()
        lawless(eve)
        for number in range(20):
            eve.map("flood")[str(number)] = "x" * 100
            await mesh.settle(ann, bob)
            await ann.wait_for(eve.version(), timeout=30)
        bob.map("mine").update(dict.fromkeys("abcde", 1))
        with pytest.raises(ChangeRefused, match="quota"):
            bob.map("mine")["f"] = 1
        await mesh.settle()

        for replica in (ann, bob):
            assert len(replica.map("flood")) == 5 and len(replica.map("mine")) == 5
            assert len(replica.quarantined("main")) == 15
        assert ann.quarantined() == bob.quarantined()
        assert ann.quarantined("other") == []


@asynchronous
async def test_a_value_that_a_refused_change_wrote_over_is_brought_back_by_a_revert() -> None:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        ann, eve = await mesh.add("ann"), await mesh.add("eve")
        eve.map("tasks")["1"] = {"title": "one"}
        ann.document("main").use_validator("test: whole tasks")
        await mesh.settle()
        lawless(eve)
        with eve.transaction(run="run-666"):
            eve.map("tasks")["1"] = {}
        await mesh.settle()
        assert dict(ann.map("tasks")) == {}

        reverted = await ann.revert(run="run-666")

        assert [str(each) for each in reverted.changed] == [
            "main: tasks['1'] = {'title': 'one'} (new)"
        ]
        assert dict(ann.map("tasks")) == {"1": {"title": "one"}}
        assert ann.quarantined() == [] or ann.quarantined()[0].paths == ("tasks['1']",)


@asynchronous
async def test_the_past_and_checkpoints_hide_what_is_hidden_now() -> None:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        ann = await mesh.add("ann", checkpoints=["memory://"])
        eve = await mesh.add("eve")
        ann.document("main").use_validator("test: whole tasks")
        await mesh.settle()
        lawless(eve)
        eve.map("tasks").update({"1": {}, "2": {}})
        await mesh.settle()
        cut, checkpoint = ann.version(), await ann.checkpoint()

        for point in (cut, checkpoint):
            with await ann.at(point) as past:
                assert dict(past.map("tasks")) == {}
        ann.release(ann.quarantined()[0])
        for point in (cut, checkpoint):
            with await ann.at(point) as past:
                assert dict(past.map("tasks")) == {"1": {}, "2": {}}
        assert await ann.restore(checkpoint) == []
        ann.hide("main", eve.writer, Ceiling(0))
        with await ann.at(checkpoint) as past:
            assert dict(past.map("tasks")) == {} == dict(ann.map("tasks"))
        assert [change.agent for change in ann.history("main")] == ["ann", "eve"]


@asynchronous
async def test_an_observer_hears_what_a_ceiling_changes() -> None:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        ann, eve = await mesh.add("ann"), await mesh.add("eve")
        eve.map("plan")["goal"] = "evil"
        await mesh.settle()

        ann.hide("main", eve.writer, Ceiling(0))
        ann.hide("main", eve.writer, None)
        ann.hide("nowhere", eve.writer, Ceiling(0))
        await mesh.until(lambda: len(mesh.told("ann", Changed)) >= 3)

        assert [event.value for event in mesh.told("ann", Changed)] == ["evil", None, "evil"]


@asynchronous
async def test_a_release_of_who_is_hidden_releases_nothing() -> None:
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        ann, bob, eve = [await mesh.add(name) for name in ("ann", "bob", "eve")]
        ann.document("main").use_validator("test: whole tasks")
        await mesh.settle()
        lawless(eve)
        eve.map("tasks")["1"] = {}
        await mesh.settle()
        (item,) = ann.quarantined()
        bob.release(item)
        await mesh.settle(ann, bob)
        assert dict(ann.map("tasks")) == {"1": {}}

        ann.hide("@quarantine", bob.writer, Ceiling(0))

        assert dict(ann.map("tasks")) == {} and ann.quarantined() == [item]
        ann.hide("@quarantine", bob.writer, None)
        assert dict(ann.map("tasks")) == {"1": {}}


@asynchronous
async def test_only_what_was_listed_can_be_released() -> None:
    async with Replica("ann") as ann:
        with pytest.raises(UsageError, match="what quarantined"):
            ann.release("main")  # type: ignore[arg-type]
        nobody = Quarantined("main", crdtstate.Dot(1, 1), "", "", (), crdtstate.Stamp(0))
        with pytest.raises(UsageError, match="is not quarantined"):
            ann.release(nobody)
        assert "@quarantine" not in list(ann.documents())


def test_a_relay_imports_what_registers_the_validators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"rules_{os.getpid()}"
    Path(f"{name}.py").write_text(
        "import crdtstate\n\n"
        f"@crdtstate.validator('test: {name}')\n"
        "def anything(proposal):\n"
        "    return None\n"
    )
    settings = relay_settings.load({"modules": [name]}, {})

    relay_server.import_modules(settings.modules)

    assert f"test: {name}" in validators_module.known_validators()
    with pytest.raises(UsageError, match="module 'no_such_module': ModuleNotFoundError"):
        relay_server.import_modules(["no_such_module"])
    with pytest.raises(UsageError, match="--module must be the name of a Python module"):
        relay_settings.load({"modules": ["a/b.py"]}, {})


# A fleet in virtual time


def run_fleet(seed: int, steps: int = 60) -> tuple[Simulation, int]:
    """A fleet in which one writes what the rules refuse, with crashes, cuts and snapshots; returns
    it, settled, and how many changes are hidden."""
    config = Config(snapshot_after_bytes=2_000, log_bytes=4_000, tidy_delay=2.0)
    fleet = Simulation(seed, 4, loss=0.02, skew=5.0, config=config)
    rng = random.Random(seed)
    eve = fleet.names[-1]
    fleet["agent-0"].document("main").use_validator("test: whole tasks")
    fleet["agent-1"].document("main").limit(keys=6)
    fleet.run(1.0)
    for step in range(steps):
        name = rng.choice(fleet.names)
        replica = fleet.up(name)
        roll = rng.random()
        if replica is None:
            replica = fleet.restart(name)
        elif roll < 0.06 and name != "agent-0":
            fleet.crash(name, power=rng.random() < 0.3)
            continue
        elif roll < 0.1:
            half = rng.sample(fleet.names, 2)
            fleet.partition(half, [each for each in fleet.names if each not in half])
        elif roll < 0.2:
            fleet.heal()
        elif roll < 0.3 and (items := replica.quarantined()):
            replica.release(rng.choice(items))
        if name == eve:
            lawless(replica)
        is_bad = name == eve and rng.random() < 0.6
        with suppress(ChangeRefused):
            key = rng.choice("abcdefgh")
            if rng.random() < 0.2:
                replica.map("tasks").pop(key, None)
            else:
                replica.map("tasks")[key] = {} if is_bad else {"title": str(step)}
            replica.counter("n").increment(rng.choice((1, 10)))
        fleet.run(rng.choice((0.05, 0.3, 1.0, 4.0)))
    fleet.heal()
    for name in fleet.names:
        if fleet.up(name) is None:
            fleet.restart(name)
    fleet.settle(120.0)
    fleet.assert_converged()
    return fleet, len(fleet["agent-0"].quarantined())


def everything(replica: Any) -> tuple[Any, ...]:
    """All that can be read, and all that is hidden."""
    document = replica.document("main")
    return (
        dict(sorted(replica.map("tasks").items())),
        replica.counter("n").value,
        replica.quarantined(),
        document.validators(),
        document.quota,
        document.rules.flat(),
    )


@pytest.mark.parametrize("block", range(4))
def test_a_fleet_reads_the_same_whatever_happens_to_it(block: int) -> None:
    hidden = 0
    for seed in range(block * 8, block * 8 + 8):
        fleet, count = run_fleet(seed)
        first = everything(fleet["agent-0"])
        for replica in fleet.replicas:
            assert everything(replica) == first, (seed, replica.agent)
        hidden += count
        fleet.end()
    assert hidden > 8, "nothing was hidden; the test shows nothing"


# In a mesh with certificates


@asynchronous
async def test_only_who_controls_sets_rules_and_releases() -> None:
    certified = fleet_mesh.Mesh()
    async with AsyncExitStack() as stack:
        mesh = Mesh(stack)
        chief = await mesh.add("chief", mesh=certified.credentials("chief", "*:frwsc"))
        writers = [
            await mesh.add(name, mesh=certified.credentials(name, "*:frw"))
            for name in ("ann", "eve")
        ]
        ann, eve = writers
        for replica in writers:
            with pytest.raises(NotAllowed):
                replica.document("main").limit(keys=0)
        chief.document("main").use_validator("test: whole tasks")
        await mesh.settle()
        lawless(eve)
        eve.map("tasks")["1"] = {}
        await mesh.settle()
        eve.document("main").may_rule = lambda writer, card: True
        eve.document("main").drop_validator("test: whole tasks")
        await mesh.settle()
        eve.map("tasks")["2"] = {}
        await mesh.settle()

        for replica in (chief, ann):
            assert dict(replica.map("tasks")) == {}
            assert replica.document("main").validators() == ("test: whole tasks",)
            assert [item.reason.split(":")[0] for item in replica.quarantined()] == [
                "test",
                "rules",
                "test",
            ]
        (first, *_) = ann.quarantined()
        for replica in writers:
            with pytest.raises(NotAllowed):
                replica.release(first)
        chief.release(first)
        await mesh.settle(chief, ann)
        assert dict(ann.map("tasks")) == dict(chief.map("tasks")) == {"1": {}}
