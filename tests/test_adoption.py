"""What is done for agents that died, and what keeps a writer from being two."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest
from harness import asynchronous

from crdtstate import (
    AdoptionPassed,
    AgentRecovered,
    Config,
    Event,
    IdentityRollback,
    MemberDown,
    MemberRetired,
    RecoveryEscalated,
    Replica,
    adoption,
    casebook,
)
from crdtstate.clock import Cut
from crdtstate.link import takes
from crdtstate.membership import rendezvous
from crdtstate.stores.file import Host, connect
from tests.fleet_mesh import Mesh

LOCAL = "ws://127.0.0.1:0"
SOON = Config(adopt_after=0.05, tier_retry=0.05)

E = TypeVar("E", bound=Event)


def url(replica: Replica) -> str:
    assert replica.address is not None
    return replica.address


def listening(
    replica: Replica, kind: type[E], wanted: Callable[[E], bool] = lambda event: True
) -> asyncio.Task[E]:
    """Hear the next event of a kind, from now on."""
    found: asyncio.Future[E] = asyncio.get_running_loop().create_future()

    def hear(event: E) -> None:
        if not found.done() and wanted(event):
            found.set_result(event)

    replica.on(kind, hear)

    async def wait() -> E:
        return await asyncio.wait_for(found, 20)

    return asyncio.get_running_loop().create_task(wait())


def mute(replica: Replica) -> None:
    """From now on nothing that it says gets out."""
    replica._connections.transmit = lambda peer: None  # type: ignore[method-assign]


async def die(replica: Replica) -> None:
    """End without a word, as a kill does."""
    replica._state = "closed"
    replica._connections.close()
    for link in list(replica._connections._links.values()):
        link.connection.abort()
    for task in list(replica._tasks):
        task.cancel()
    await asyncio.gather(*replica._tasks, return_exceptions=True)
    if replica._listener is not None:
        await replica._listener.close()
    await replica._checkpoints.release()
    if replica._timer is not None:
        replica._timer.cancel()
    replica._store.close(clean=False)


class Fleet:
    """Agents that know each other, and a tier that all of them reach."""

    def __init__(self, directory: Path, *names: str) -> None:
        self.directory = directory
        self.tier = f"sqlite:///{directory}/shared.db"
        self.names = names
        self.alive: dict[str, Replica] = {}

    async def __aenter__(self) -> Fleet:
        for name in self.names:
            await self.start(name)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for replica in self.alive.values():
            await replica.close()

    async def start(self, name: str, **options: Any) -> Replica:
        replica = Replica(
            name,
            store=self.directory / f"{name}.db",
            listen=LOCAL,
            peers=[url(each) for each in self.alive.values()],
            **{"checkpoints": [self.tier], "config": SOON} | options,
        )
        self.alive[name] = await replica.__aenter__()
        for other in self.alive.values():
            await other.synced(timeout=20)
            await other._wait_until(lambda other=other: self._knows_all(other), "members", 20)
        return replica

    def _knows_all(self, replica: Replica) -> bool:
        return self.alive.keys() <= {m.agent for m in replica.members() if m.state == "up"}

    async def kill(self, name: str) -> None:
        await die(self.alive.pop(name))

    async def same(self) -> None:
        """Wait until all have the same."""
        async with asyncio.timeout(20):
            for one in self.alive.values():
                for other in self.alive.values():
                    await other.wait_for(self._common(one, other))

    @staticmethod
    def _common(one: Replica, other: Replica) -> Cut:
        """What one has of the documents that the other takes part in."""
        found = one.version()
        return Cut({name: found[name] for name in found if takes(other._subscribe, name)})


async def write_unheard(replica: Replica) -> str:
    """Write something, make a checkpoint of it, and let nobody hear of either."""
    mute(replica)
    replica.map("plan")["unheard"] = 1
    replica.counter("tokens").increment(5)
    return (await replica.checkpoint()).id


@asynchronous
async def test_what_a_dead_agent_had_saved_and_told_nobody_reaches_everybody(
    tmp_path: Path,
) -> None:
    async with Fleet(tmp_path, "ann", "bob", "cat") as fleet:
        ann = fleet.alive["ann"]
        ann.counter("tokens").increment(100)
        await ann.synced(timeout=10)
        id = await write_unheard(ann)
        waiting = [listening(fleet.alive[name], AgentRecovered) for name in ("bob", "cat")]
        writer, version = ann.writer, ann.version()["main"]
        await fleet.kill("ann")

        events = [await each for each in waiting]

        adopter = rendezvous("adoption of ann", {"bob", "cat"})
        for event in events:
            assert (event.agent, event.by, event.checkpoint) == ("ann", adopter, id)
            assert event.brought == 1 and Cut.parse(event.version)["main"] == version
        await fleet.same()
        for name in ("bob", "cat"):
            assert fleet.alive[name].map("plan")["unheard"] == 1
            assert fleet.alive[name].counter("tokens").value == 105
        said = fleet.alive["bob"].document("@recovery").map("adoptions")["ann"]
        assert said["by"] == adopter and said["tiers"] == [], "a file is a private matter"

        ann = await fleet.start("ann")
        rolled: list[IdentityRollback] = []
        ann.on(IdentityRollback, rolled.append)
        ann.counter("tokens").increment()
        await fleet.same()
        assert ann.writer == writer and not rolled
        assert {each.counter("tokens").value for each in fleet.alive.values()} == {106}


@asynchronous
async def test_if_the_adopter_dies_too_another_one_finds_that_it_is_next(tmp_path: Path) -> None:
    async with Fleet(tmp_path, "ann", "bob", "cat", "dan") as fleet:
        first = rendezvous("adoption of ann", {"bob", "cat", "dan"})
        others = {"bob", "cat", "dan"} - {first}
        begun = asyncio.Event()

        async def hang(agent: str) -> Any:
            begun.set()
            await asyncio.Event().wait()

        fleet.alive[first]._checkpoints.of = hang  # type: ignore[method-assign]
        await write_unheard(fleet.alive["ann"])
        await fleet.kill("ann")
        await asyncio.wait_for(begun.wait(), 20)
        # The first one is adopted as well, and has left nothing.
        waiting = [
            listening(fleet.alive[name], AgentRecovered, lambda event: event.agent == "ann")
            for name in others
        ]

        await fleet.kill(first)

        for event in [await each for each in waiting]:
            assert event.by in others and event.brought == 1
        await fleet.same()
        assert all(fleet.alive[name].map("plan")["unheard"] == 1 for name in others)


@asynchronous
async def test_who_leaves_in_order_or_is_back_soon_is_not_adopted(tmp_path: Path) -> None:
    async with Fleet(tmp_path, "ann", "bob") as fleet:
        bob = fleet.alive["bob"]
        gone = listening(bob, MemberRetired)
        await fleet.alive.pop("ann").close()
        await gone
        assert not bob._adoption._cases

        await fleet.start("ann")
        down = listening(bob, MemberDown)
        bob._adoption._config = Config(adopt_after=3600.0)
        await fleet.kill("ann")
        await down
        assert set(bob._adoption._cases) == {"ann"}
        await fleet.start("ann")
        assert not bob._adoption._cases and bob.find("@recovery") is None


@asynchronous
async def test_a_tier_that_fails_is_tried_again_before_it_is_said_that_there_is_nothing(
    tmp_path: Path,
) -> None:
    async with Fleet(tmp_path, "ann", "bob") as fleet:
        bob = fleet.alive["bob"]
        id = await write_unheard(fleet.alive["ann"])
        tier = tmp_path / "shared.db"
        await bob._checkpoints.release()
        bob._checkpoints.shelves[0]._is_closed = False
        looked = asyncio.Event()
        look = bob._checkpoints.of

        async def looking(agent: str) -> Any:
            found = await look(agent)
            looked.set()
            return found

        bob._checkpoints.of = looking  # type: ignore[method-assign]
        await fleet.kill("ann")
        tier.rename(tmp_path / "away.db")
        tier.mkdir()
        await asyncio.wait_for(looked.wait(), 20)
        recovered = listening(bob, AgentRecovered)
        assert bob.find("@recovery") is None
        tier.rmdir()
        (tmp_path / "away.db").rename(tier)

        event = await recovered

        assert event.checkpoint == id and event.brought == 1


@asynchronous
async def test_if_there_is_no_checkpoint_that_is_said_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adoption, "TURNS_MAX", 2)
    async with Fleet(tmp_path, "ann", "bob") as fleet:
        bob = fleet.alive["bob"]
        ann = fleet.alive["ann"]
        ann.map("plan")["a"] = 1
        await ann.synced(timeout=10)
        version = ann.version()["main"]
        event = listening(bob, AgentRecovered)
        await fleet.kill("ann")

        found = await event

        assert (found.checkpoint, found.brought) == ("", 0)
        assert Cut.parse(found.version)["main"] == version


@asynchronous
async def test_a_fleet_that_dies_at_once_comes_back_with_all_it_had_saved(tmp_path: Path) -> None:
    names = ("ann", "bob", "cat")
    async with Fleet(tmp_path, *names) as fleet:
        for name in names:
            mute(fleet.alive[name])
            fleet.alive[name].map("plan")[name] = 1
            fleet.alive[name].counter("tokens").increment()
            await fleet.alive[name].durable(timeout=10)
        writers = {name: fleet.alive[name].writer for name in names}
        for name in names:
            await fleet.kill(name)

        for name in reversed(names):
            replica = await fleet.start(name)
            assert replica.recovery is not None and replica.recovery.source == "store"
            assert replica.writer == writers[name]
        await fleet.same()

        for replica in fleet.alive.values():
            assert dict(replica.map("plan")) == dict.fromkeys(names, 1)
            assert replica.counter("tokens").value == 3


# What one cannot bring


def drawn(agent: str, *living: str) -> tuple[str, str]:
    """Of two who takes care of an agent first, and who next."""
    first = rendezvous(f"adoption of {agent}", living)
    (second,) = set(living) - {first}
    return first, second


async def die_unheard(fleet: Fleet, *hearers: str) -> tuple[list[Event], list[Event]]:
    """Let ann write what nobody hears, save it and die; returns what the others hear of that,
    once one of them has done what there is to do."""
    told: tuple[list[Event], list[Event]] = ([], [])
    for name, heard in zip(hearers, told, strict=True):
        for kind in (AdoptionPassed, AgentRecovered):
            fleet.alive[name].on(kind, heard.append)
    await write_unheard(fleet.alive["ann"])
    waiting = [listening(fleet.alive[name], AgentRecovered) for name in hearers]
    await fleet.kill("ann")
    for each in waiting:
        await each
    await fleet.same()
    return told


@asynchronous
async def test_who_may_not_hand_out_snapshots_leaves_it_to_who_may(tmp_path: Path) -> None:
    first, second = drawn("ann", "bob", "cat")
    mesh = Mesh()
    async with Fleet(tmp_path) as fleet:
        for name, roles in (("ann", "*:rws"), (first, "*:rw"), (second, "*:rws")):
            await fleet.start(name, mesh=mesh.credentials(name, roles))
        fleet.alive["ann"].map("plan")["heard"] = 1
        await fleet.same()

        for told in await die_unheard(fleet, first, second):
            passed, done = told
            assert isinstance(passed, AdoptionPassed) and isinstance(done, AgentRecovered)
            assert (passed.agent, passed.by, passed.left) == ("ann", first, ("main",))
            assert (done.by, done.brought, done.left) == (second, 1, ())
            assert done.checkpoint == passed.checkpoint

        for replica in fleet.alive.values():
            assert dict(replica.map("plan")) == {"heard": 1, "unheard": 1}
            assert casebook.passed(replica.find(casebook.DOCUMENT), "ann") == {}


@asynchronous
async def test_what_nobody_may_hand_out_is_taken_in_by_nobody_and_named(tmp_path: Path) -> None:
    mesh = Mesh()
    async with Fleet(tmp_path) as fleet:
        for name in ("ann", "bob", "cat"):
            await fleet.start(name, mesh=mesh.credentials(name, "*:rw"))
        for told in await die_unheard(fleet, "bob", "cat"):
            done = told[-1]
            assert isinstance(done, AgentRecovered)
            assert (done.brought, done.left) == (0, ("main",))
        for replica in fleet.alive.values():
            assert "unheard" not in replica.map("plan")
            said = replica.document(casebook.DOCUMENT).map(casebook.ADOPTIONS)["ann"]
            assert said["left"] == ["main"]


@asynchronous
async def test_signed_changes_are_brought_by_who_may_hand_out_nothing(tmp_path: Path) -> None:
    mesh = Mesh()
    async with Fleet(tmp_path) as fleet:
        for name in ("ann", "bob", "cat"):
            await fleet.start(name, mesh=mesh.credentials(name, "*:rw"))
        ann = fleet.alive["ann"]
        # What all have is the base of what they have not.
        for number in range(200):
            ann.map("plan")[f"{number}"] = "x" * 100
        await fleet.same()
        await ann.checkpoint()

        for told in await die_unheard(fleet, "bob", "cat"):
            (done,) = told
            assert isinstance(done, AgentRecovered) and (done.brought, done.left) == (1, ())

        for replica in fleet.alive.values():
            assert replica.map("plan")["unheard"] == 1 and replica.counter("tokens").value == 5


@asynchronous
async def test_a_document_that_the_first_takes_no_part_in_is_left_to_the_next(
    tmp_path: Path,
) -> None:
    first, second = drawn("ann", "bob", "cat")
    async with Fleet(tmp_path, "ann") as fleet:
        await fleet.start(first, subscribe=["main", "@*"])
        await fleet.start(second)
        ann = fleet.alive["ann"]
        mute(ann)
        ann.document("other").map("plan")["a"] = 1

        done = (await die_unheard(fleet, first, second))[1][-1]

        assert isinstance(done, AgentRecovered) and (done.by, done.left) == (second, ())
        assert fleet.alive[second].document("other").map("plan")["a"] == 1
        for replica in fleet.alive.values():
            assert replica.map("plan")["unheard"] == 1


@asynchronous
async def test_what_is_passed_on_is_forgotten_when_the_agent_is_back(tmp_path: Path) -> None:
    async with Fleet(tmp_path, "ann", "bob") as fleet:
        bob = fleet.alive["bob"]
        bob._adoption._config = Config(adopt_after=3600.0)
        await fleet.kill("ann")
        casebook.pass_on(bob, AdoptionPassed("ann", "bob", "", ("main",)))
        # In another's name it says nothing.
        casebook.pass_on(bob, AdoptionPassed("ann", "eve", "", ("main",)))
        assert casebook.passed(bob.find(casebook.DOCUMENT), "ann") == {"bob": {"main"}}

        await fleet.start("ann")

        await bob._wait_until(
            lambda: not casebook.passed(bob.find(casebook.DOCUMENT), "ann"), "that", 20
        )


@asynchronous
async def test_what_is_brought_of_a_native_document_is_counted_once_it_was_examined(
    tmp_path: Path,
) -> None:
    async with Fleet(tmp_path, "ann", "bob") as fleet:
        ann = fleet.alive["ann"]
        text = ann.document("notes", shared=True).text("body")
        text += "heard"
        await fleet.same()
        mute(ann)
        for word in (" and", " not"):
            text += word
            await ann.durable(timeout=10)
        recovered = listening(fleet.alive["bob"], AgentRecovered)
        await ann.checkpoint()
        await fleet.kill("ann")

        assert (await recovered).brought == 2
        body = fleet.alive["bob"].document("notes", shared=True).text("body")
        assert str(body) == "heard and not"


# What must not come in again


def restore(copy: Path, path: Path) -> None:
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    shutil.copy(copy, path)


async def fork(fleet: Fleet, tell: bool) -> None:
    """An agent is rolled back unnoticed, writes alone, and leaves a checkpoint of that behind when
    it finds out, in a tier that is down until it is dead. With *tell*, it tells the others."""
    directory = fleet.directory
    ann = fleet.alive["ann"]
    ann.map("plan")["a"] = 0
    ann.document("other").map("plan")["a"] = 0
    await ann.synced(timeout=10)
    await fleet.alive.pop("ann").close()
    shutil.copy(directory / "ann.db", directory / "backup.db")
    ann = await fleet.start("ann", checkpoints=["memory://"])
    for number in range(5):
        ann.map("plan")["a"] = number
        await ann.durable(timeout=10)
    ann.document("other").counter("tokens").increment(1)
    await fleet.same()
    writer = ann.writer
    await fleet.alive.pop("ann").close()
    (directory / "ann.db").write_bytes((directory / "backup.db").read_bytes())
    (directory / "ann.db.lock").unlink()

    async with Replica("ann", store=directory / "ann.db", checkpoints=[fleet.tier]) as alone:
        assert alone.writer == writer, "nothing tells yet"
        alone.map("plan")["b"] = 1
        for _ in range(3):
            alone.document("other").counter("tokens").increment(10)
            await alone.durable(timeout=10)
        await alone.checkpoint()
        kept = directory / "kept.db"
        with closing(connect(directory / "shared.db")) as database:
            database.execute("VACUUM INTO ?", (str(kept),))
        rolled = listening(alone, IdentityRollback)
        if not tell:
            alone._tell_taken_back = lambda *_: None  # type: ignore[method-assign]
        for other in fleet.alive.values():
            alone.connect(url(other))
        await rolled
        await alone.synced(timeout=20)
        assert alone.document("other").counter("tokens").value == 31
        fleet.alive["ann"] = alone
        await fleet.same()
        await alone._checkpoints.settled()
        await fleet.kill("ann")
    # The tier works again, and has what was never deleted there.
    for other in fleet.alive.values():
        await other._checkpoints.release()
        other._checkpoints.shelves[0]._is_closed = False
    restore(kept, directory / "shared.db")


@pytest.mark.parametrize("tell", [True, False], ids=["told", "not told"])
@asynchronous
async def test_what_an_agent_took_back_is_not_brought_back_by_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell: bool
) -> None:
    if tell:
        # What it said is enough, also where nothing else shows it.
        monkeypatch.setattr(adoption, "is_fork", lambda *_: False)
    async with Fleet(tmp_path, "bob", "ann") as fleet:
        bob = fleet.alive["bob"]
        recovered = listening(bob, AgentRecovered)

        await fork(fleet, tell)

        event = await recovered
        assert event.agent == "ann" and not event.checkpoint and not event.brought
        theirs = await bob._checkpoints.of("ann")
        assert len(theirs.manifests) == 1 and not theirs.failures(), "there was one to be had"
        assert bob.document("other").counter("tokens").value == 31, "not counted twice"
        assert dict(bob.map("plan")) == {"a": 4, "b": 1}
        assert tell == bool(casebook.disowned(bob.find("@recovery")))


# Copies


@pytest.mark.parametrize("alone_first", [False, True], ids=["online", "offline"])
@asynchronous
async def test_a_copy_on_a_machine_that_is_a_copy_too_is_noticed_by_a_third(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone_first: bool
) -> None:
    # As in two machines made of one image: the same path, inode and device.
    monkeypatch.setattr(Host, "place", lambda self: "the same")
    config = Config(discover=False, heartbeat=0.2, link_timeout=2.0)
    async with Replica("ann", store=tmp_path / "ann.db") as ann:
        ann.map("plan")["start"] = 0
        await ann.durable(timeout=10)
    for suffix in ("", ".lock"):
        shutil.copy(f"{tmp_path}/ann.db{suffix}", f"{tmp_path}/copy.db{suffix}")
    async with (
        Replica("relay", listen=LOCAL, role="relay", config=config) as relay,
        Replica("ann", store=tmp_path / "ann.db", config=config) as ann,
        Replica("ann", store=tmp_path / "copy.db", config=config) as copy,
    ):
        assert ann.writer == copy.writer
        noticed = [listening(each, IdentityRollback) for each in (ann, copy)]

        def write() -> None:
            for name, each in (("ann", ann), ("copy", copy)):
                each.map("plan")["who"] = name
                each.map("plan")[name] = 1
                each.counter("count").increment()

        if alone_first:
            write()
        ann.connect(url(relay))
        await ann.synced(timeout=10)
        copy.connect(url(relay))
        for each in noticed:
            await each
        if not alone_first:
            write()

        async with asyncio.timeout(20):
            for _ in range(2):
                for one in (ann, copy, relay):
                    await one.synced()
                for one in (ann, copy):
                    await relay.wait_for(one.version())
                    await one.wait_for(relay.version())
        found = [dict(each.map("plan")) for each in (ann, copy, relay)]
        assert found[0] == found[1] == found[2] and found[0].keys() >= {"start", "ann", "copy"}
        assert {each.counter("count").value for each in (ann, copy, relay)} == {2}
        comparison = await relay.compare(peers=2, timeout=10)
        assert not comparison.diverged


@asynchronous
async def test_a_store_put_back_in_place_and_written_to_is_noticed_by_a_peer(
    tmp_path: Path,
) -> None:
    """As many changes as were lost: only their ids tell that they are others."""
    store, lock = tmp_path / "ann.db", tmp_path / "ann.db.lock"
    config = Config(discover=False, heartbeat=0.2, link_timeout=2.0)
    async with Replica("relay", listen=LOCAL, role="relay", config=config) as relay:
        async with Replica("ann", store=store, config=config) as ann:
            ann.map("plan")["start"] = 0
            await ann.durable(timeout=10)
        before = [store.read_bytes(), lock.read_bytes()]
        async with Replica("ann", store=store, peers=[url(relay)], config=config) as ann:
            ann.map("plan")["lost"] = 1
            await relay.wait_for(ann.version(), timeout=10)
        for path, data in zip((store, lock), before, strict=True):
            with path.open("r+b") as file:
                # The same file, as far as it can tell.
                file.write(data)
                file.truncate()
        for suffix in ("-wal", "-shm"):
            store.with_name(store.name + suffix).unlink(missing_ok=True)
        async with Replica("ann", store=store, config=config) as ann:
            writer = ann.writer
            noticed = listening(ann, IdentityRollback)
            ann.map("plan")["other"] = 2
            assert ann.version() == relay.version()
            ann.connect(url(relay))
            await noticed
            assert ann.writer != writer
            for _ in range(2):
                await ann.synced(timeout=10)
                await relay.wait_for(ann.version(), timeout=10)
                await ann.wait_for(relay.version(), timeout=10)
            for each in (ann, relay):
                assert dict(each.map("plan")) == {"start": 0, "lost": 1, "other": 2}


# The document


@asynchronous
async def test_nonsense_in_the_document_tells_nothing() -> None:
    async with Replica("bob", listen=LOCAL) as bob, Replica("eve", peers=[url(bob)]) as eve:
        told: list[Event] = []
        bob.on(AgentRecovered, told.append)
        bob.on(RecoveryEscalated, told.append)
        book = eve.system_document(casebook.DOCUMENT)
        sound = {"by": "x", "checkpoint": "", "version": "", "brought": 1}
        for number, nonsense in enumerate(
            [
                None,
                3,
                {},
                {"attempts": 3},
                {"attempts": []},
                {"attempts": [["store", 1]]},
                {"attempts": [["moon", "x"]]},
                {"attempts": [["store", "x"]] * 4},
                *({**sound, field: []} for field in sound),
            ]
        ):
            for name in (casebook.ESCALATIONS, casebook.ADOPTIONS, casebook.DISOWNED, "other"):
                book.map(name)[f"{number}"] = nonsense
        for key in ("zz", "-1", "", "f" * 400):
            book.map(casebook.DISOWNED)[key] = {"kept": {"main": 1}}
        # Somebody's strategy, which nobody else has.
        book.lanes.container("m" + casebook.ADOPTIONS)
        await eve.synced(timeout=10)
        book.map(casebook.ADOPTIONS)["ann"] = sound
        book.map(casebook.ESCALATIONS)["ann"] = {"attempts": [["store", "x" * 9999]]}
        await eve.synced(timeout=10)
        await bob.wait_for(eve.version(), timeout=10)
        await asyncio.sleep(0)

        assert [type(event) for event in told] == [AgentRecovered, RecoveryEscalated]
        assert isinstance(told[1], RecoveryEscalated) and len(told[1].attempts[0].reason) == 500
        assert casebook.disowned(bob.find(casebook.DOCUMENT)).keys() <= {-1, int("f" * 400, 16)}
