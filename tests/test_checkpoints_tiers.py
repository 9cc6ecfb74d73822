"""Checkpoints in the real tiers, each of them stopped, killed, full and lying in turn."""

# ruff: noqa: ASYNC230, ASYNC240 (files of a test that nobody else waits for)

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
from checkpointing import agent, fill, hear, load, quick, rebuild, users
from fault_vfs import Disk, FaultHost
from harness import asynchronous
from servers import SHM, Gateway, RedisServer, S3Server, stopped, url_of

from crdtstate import (
    CheckpointDamaged,
    CheckpointFailed,
    CheckpointSaved,
    CorruptCheckpoint,
    Replica,
    Retention,
    TierError,
    TierFailed,
    TierRecovered,
    UnknownCheckpoint,
)
from crdtstate.manifest import manifest_key, part_key, prefix_of
from crdtstate.tiers import Tier, open_tier
from crdtstate.tiers.sqlite import SqliteTier

REAL = ["shm", "sqlite", "redis", "s3"]

PATIENT = {"tier_timeout": 10.0}
"""Where nothing fails, a busy machine is waited for."""

HASTY = {"tier_timeout": 0.5}
"""Where something hangs."""

DEADLINE_SECONDS = 30.0


@pytest.fixture(params=REAL)
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from url_of(request.param, request)


@pytest.fixture
def urls(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """One tier of every kind, by kind, nearest first."""
    with ExitStack() as stack:
        yield {
            kind: stack.enter_context(contextmanager(url_of)(kind, request))
            for kind in ("redis", "shm", "sqlite", "s3")
        }


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Tier]:
    """A tier behind the replica's back."""
    tier = await open_tier(url)
    try:
        yield tier
    finally:
        await tier.close()


async def caught_up(replica: Replica) -> None:
    """Wait until every tier works and has all it should."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    shelves = replica._checkpoints.shelves
    while True:
        await replica._checkpoints.settled()
        if all(shelf.failure is None for shelf in shelves):
            return
        assert time.monotonic() < deadline, [shelf.failure for shelf in shelves]
        await asyncio.sleep(0.01)


async def told(heard: list[Any], count: int = 1) -> None:
    """Wait until as many events were heard."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while len(heard) < count:
        assert time.monotonic() < deadline, heard
        await asyncio.sleep(0.01)


async def flip(url: str, key: str) -> None:
    """Alter one bit of what is kept under *key*."""
    async with opened(url) as tier:
        data = bytearray(await tier.get(key) or b"")
        data[len(data) // 2] ^= 1
        await tier.put(key, bytes(data))


async def held(url: str) -> dict[str, bytes | None]:
    """All that is in a tier."""
    async with opened(url) as tier:
        return {item.key: await tier.get(item.key) for item in await tier.items("")}


async def two(replica: Replica) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """Make two checkpoints, the second with a delta; also what was there at each."""
    fill(replica, 500)
    replica.counter("tokens").increment(7)
    replica.document("notes", shared=True).text("body").insert(0, "hello")
    first, before = await replica.checkpoint("first"), users(replica)
    replica.map("plan")["new"] = 1
    second, after = await replica.checkpoint(), users(replica)
    entry = replica._checkpoints.find(second.id).find("main")
    assert entry is not None and entry.deltas
    return first.id, second.id, before, after


# All is well


@asynchronous
async def test_any_tier_alone_keeps_checkpoints(url: str, tmp_path: Path) -> None:
    store = tmp_path / "agent.db"
    async with agent(url, store=store, settings=PATIENT) as replica:
        first, second, before, after = await two(replica)

        assert [(c.id, c.label) for c in replica.checkpoints()] == [(first, "first"), (second, "")]
        for id, content in ((first, before), (second, after)):
            assert (await replica.verify(id)).failed == {}
            assert await load(replica, id) == content
        assert (await replica.at(first)).map("plan").get("new") is None
        assert [d.path for d in await replica.diff(first)] == ["plan['new']"]
        await replica.restore(first)
        assert "new" not in replica.map("plan")

    async with agent(url, store=store, settings=PATIENT, retention=Retention(count=1)) as replica:
        assert [c.id for c in replica.checkpoints()] == [first, second]
        third = await replica.checkpoint()
        assert await load(replica, third.id) == users(replica)
        pruning = await replica.prune_checkpoints()
        await caught_up(replica)
        # The first has a label, and so is counted for itself.
        assert [c.id for c in replica.checkpoints()] == [first, third.id]
        assert pruning.dropped.keys() <= {second}
        named = {
            part_key("agent", name)
            for id in (first, third.id)
            for name in replica._checkpoints.find(id).parts()
        }
        manifests = {manifest_key("agent", id) for id in (first, third.id)}
        assert (await held(url)).keys() == named | manifests


@asynchronous
async def test_all_tiers_together_outlive_the_disk(urls: dict[str, str], tmp_path: Path) -> None:
    async with agent(*urls.values(), store=tmp_path / "agent.db", settings=PATIENT) as replica:
        first, second, before, after = await two(replica)
        await caught_up(replica)
        shown = tuple(shelf.url for shelf in replica._checkpoints.shelves)
        assert [c.tiers for c in replica.checkpoints()] == [shown, shown]
        assert (await replica.verify(second)).intact == shown

    # Store and primary are gone; then Redis, too; then the host.
    for path in tmp_path.iterdir():
        path.unlink()
    for lost in (None, "redis", "shm"):
        if lost is not None:
            async with opened(urls[lost]) as tier:
                for item in await tier.items(""):
                    await tier.delete(item.key)
        async with agent(*urls.values(), settings=PATIENT) as replica:
            await caught_up(replica)
            assert [c.id for c in replica.checkpoints()] == [first, second]
            assert await load(replica, first) == before
            async for checkpoint, documents in replica._checkpoints.newest():
                assert checkpoint.id == second and rebuild(documents) == after
                break
            # And it is everywhere again.
            for tier_url in shown:
                assert (await replica.verify(second, tier=tier_url)).failed == {}
            await replica.restore(second)
            assert users(replica).keys() == after.keys()
            assert replica.counter("tokens").value == 7


@asynchronous
async def test_old_ones_move_to_s3_and_load_from_there(urls: dict[str, str]) -> None:
    rule = Retention(near=1)
    async with agent(*urls.values(), settings=PATIENT, retention=rule) as replica:
        first, second, before, after = await two(replica)
        await caught_up(replica)
        for shelf in replica._checkpoints.shelves:
            shelf.wake()
        await caught_up(replica)

        old, new = replica.checkpoints()
        archive = replica._checkpoints.shelves[-1].url
        assert archive.startswith("s3://")
        assert old.tiers == (archive,) and len(new.tiers) == 4
        assert await load(replica, first) == before
        assert await load(replica, second) == after


# Gone and slow


class Breakable(Protocol):
    """A server of a test's own."""

    url: str
    process: Any

    def start(self) -> None: ...
    def kill(self) -> None: ...
    def stop(self) -> None: ...


@pytest.fixture(params=["redis", "s3"])
def server(request: pytest.FixtureRequest) -> Iterator[Breakable]:
    if request.param == "redis":
        made: Any = RedisServer()
    else:
        request.getfixturevalue("s3_credentials")
        made = Gateway(*(request.getfixturevalue(each) for each in ("s3_server", "bucket")))
    yield made
    made.stop()


@contextmanager
def broken(server: Breakable, how: str) -> Iterator[None]:
    """Let it hang, or be dead, meanwhile; a Redis that was dead is empty."""
    if how == "hangs":
        with stopped(server.process):
            yield
    else:
        server.kill()
        yield
        server.start()


@pytest.mark.parametrize("how", ["hangs", "dies"])
@asynchronous
async def test_a_server_that_fails_holds_nothing_up_and_catches_up(
    server: Breakable, how: str, tmp_path: Path
) -> None:
    primary = f"sqlite:///{tmp_path}/primary.db"
    async with agent(server.url, primary, store=tmp_path / "a.db", settings=HASTY) as replica:
        first, second, _, after = await two(replica)
        await caught_up(replica)
        failed, recovered = hear(replica, TierFailed), hear(replica, TierRecovered)
        with broken(server, how):
            start = time.monotonic()
            replica.map("plan")["meanwhile"] = True
            await replica.durable()
            third = await replica.checkpoint()
            assert time.monotonic() - start < HASTY["tier_timeout"], "it was waited for"
            assert third.tiers == (primary,)
            # Reading goes on as well, after one look at what is nearest.
            assert await load(replica, second) == after
            await told(failed)
            assert (failed[0].tier, failed[0].is_primary) == (server.url, False)
            assert recovered == []

        await caught_up(replica)
        await told(recovered)
        assert [event.tier for event in recovered] == [server.url]
        assert len(failed) == 1, "it is told of once"
        for id in (first, second, third.id):
            assert (await replica.verify(id, tier=server.url)).failed == {}


@pytest.mark.parametrize("how", ["hangs", "dies"])
@asynchronous
async def test_a_primary_that_fails_is_told_and_works_again_afterwards(
    server: Breakable, how: str
) -> None:
    async with agent(server.url, settings=HASTY) as replica:
        first, second, _, after = await two(replica)
        failed = hear(replica, TierFailed)
        with broken(server, how):
            replica.map("plan")["meanwhile"] = True
            with pytest.raises(CheckpointFailed, match="no answer within|cannot be reached|answer"):
                await replica.checkpoint()
            with pytest.raises(TierError):
                await replica.verify(second)
            await told(failed)
            assert failed[0].is_primary
            assert [c.id for c in replica.checkpoints()] == [first, second], "they may be there"

        third = await made(replica)
        await caught_up(replica)
        assert await load(replica, third.id) == users(replica)
        assert (await replica.verify(third.id)).failed == {}
        if isinstance(server, Gateway):
            assert await load(replica, second) == after
        for checkpoint in replica.checkpoints():
            assert (await replica.verify(checkpoint.id)).failed == {}, "it is listed"


async def made(replica: Replica) -> Any:
    """A checkpoint, as soon as one can be made."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        try:
            return await replica.checkpoint()
        except CheckpointFailed:
            # What a hanging server was asked for it may still be doing.
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


# Full


class Room(NamedTuple):
    """A tier that can be filled up.

    Attributes:
        fill: Leaves no room in it,
        clear: and gives it back.
    """

    tier: str | Tier
    fill: Callable[[], Any]
    clear: Callable[[], Any]


FILLER_BYTES = (40_000, 4_000, 400)


async def fill_up(url: str) -> None:
    async with opened(url) as tier:
        for size in FILLER_BYTES:
            with pytest.raises(TierError, match="full"):
                for number in range(1000):
                    await tier.put(f"filler/{size}/{number}", os.urandom(size))


async def clear(url: str) -> None:
    async with opened(url) as tier:
        for item in await tier.items("filler/"):
            await tier.delete(item.key)


@pytest.fixture(params=["shm", "sqlite", "disk", "redis", "s3"])
def room(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Room]:
    name = f"test-{uuid.uuid4().hex[:12]}"
    with ExitStack() as stack:
        match request.param:
            case "shm":
                url = f"shm://{name}?bytes_max=300000"
                stack.callback(shutil.rmtree, SHM / name, ignore_errors=True)
            case "sqlite":
                url = f"sqlite:///{tmp_path}/{name}.db?bytes_max=600000"
            case "disk":
                disk = Disk()
                host = partial(FaultHost, disk=disk)
                tier = SqliteTier("sqlite:////full.db", Path("/full.db"), None, host)
                yield Room(tier, partial(limit, disk, 0), partial(limit, disk, None))
                return
            case "redis":
                server = RedisServer("--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
                stack.callback(server.stop)
                url = server.url
            case "s3":
                request.getfixturevalue("s3_credentials")
                s3: S3Server = request.getfixturevalue("s3_server")
                bucket = s3.make_bucket()
                s3.limit(bucket, 300_000)
                url = s3.url(bucket)
        yield Room(url, partial(fill_up, url), partial(clear, url))


async def limit(disk: Disk, free: int | None) -> None:
    disk.capacity = None if free is None else disk.used + free


@asynchronous
async def test_a_full_tier_is_told_of_and_gets_what_it_lacks_when_there_is_room(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    primary = f"sqlite:///{tmp_path}/primary.db"
    async with agent(primary, room.tier, settings=PATIENT) as replica:
        first, second, before, _ = await two(replica)
        await caught_up(replica)
        failed, recovered = hear(replica, TierFailed), hear(replica, TierRecovered)
        await room.fill()
        replica.map("plan")["large"] = os.urandom(50_000)
        third = await replica.checkpoint()
        await told(failed)
        assert "full" in failed[0].reason and not failed[0].is_primary
        full = failed[0].tier
        # What was in it before still is.
        assert (await replica.verify(first, tier=full)).failed == {}
        assert await load(replica, first) == before
        with pytest.raises(CorruptCheckpoint):
            await replica.verify(third.id, tier=full)

        await room.clear()
        await told(recovered)
        await caught_up(replica)
        for id in (first, second, third.id):
            assert (await replica.verify(id, tier=full)).failed == {}


@asynchronous
async def test_a_full_primary_makes_none_and_keeps_what_it_has(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    async with agent(room.tier, settings=PATIENT) as replica:
        first, second, before, after = await two(replica)
        await room.fill()
        replica.map("plan")["large"] = os.urandom(50_000)
        with pytest.raises(CheckpointFailed, match="full"):
            await replica.checkpoint()
        assert [c.id for c in replica.checkpoints()] == [first, second]
        assert await load(replica, first) == before
        assert await load(replica, second) == after
        assert (await replica.verify(second)).failed == {}

        await room.clear()
        third = await replica.checkpoint()
        assert await load(replica, third.id) == users(replica)


@asynchronous
async def test_letting_old_ones_go_makes_room_in_a_full_tier() -> None:
    name = f"test-{uuid.uuid4().hex[:12]}"
    url = f"shm://{name}?bytes_max=400000"
    try:
        async with agent("memory://", url, settings=PATIENT, retention=Retention(count=2)) as r:
            for number in range(12):
                r.map("plan")[f"key-{number % 2}"] = os.urandom(60_000)
                await r.checkpoint()
            await caught_up(r)

            assert len(r.checkpoints()) == 2
            for checkpoint in r.checkpoints():
                assert (await r.verify(checkpoint.id, tier=url)).failed == {}
    finally:
        shutil.rmtree(SHM / name, ignore_errors=True)


# Lying


@asynchronous
async def test_a_flipped_bit_in_any_tier_is_found_named_and_mended(url: str) -> None:
    async with agent(url, "memory://", settings=PATIENT) as replica:
        first, second, before, after = await two(replica)
        await caught_up(replica)
        lying = replica._checkpoints.primary.url
        damaged = hear(replica, CheckpointDamaged)
        good = await held(url)
        for key in sorted(good):
            damaged.clear()
            await flip(url, key)

            # The next tier's is used.
            assert await load(replica, first) == before
            assert await load(replica, second) == after
            for id in (first, second):
                assert "memory://" in (await replica.verify(id)).intact
            await told(damaged)
            await caught_up(replica)
            assert {(event.tier, event.key) for event in damaged} == {(lying, key)}
            assert (await held(url))[key] == good[key], "it was not mended"


@asynchronous
async def test_if_nobody_else_has_it_the_next_good_checkpoint_is_used(url: str) -> None:
    async with agent(url, settings=PATIENT) as replica:
        first, second, before, _ = await two(replica)
        damaged = hear(replica, CheckpointDamaged)
        manifest = replica._checkpoints.find(second)
        (name,) = manifest.names - replica._checkpoints.find(first).names - system(manifest)
        await flip(url, part_key("agent", name))

        async for checkpoint, documents in replica._checkpoints.newest():
            assert checkpoint.id == first and rebuild(documents) == before
            break
        else:
            raise AssertionError("there is a good one")
        with pytest.raises(CorruptCheckpoint, match=name):
            await replica.verify(second)
        assert [c.id for c in replica.checkpoints()] == [first]
        await told(damaged)
        assert {event.key for event in damaged} == {part_key("agent", name)}
        # The next one writes anew what it shares with it.
        third = await replica.checkpoint()
        assert await load(replica, third.id) == users(replica)


def system(manifest: Any) -> set[str]:
    entries = [entry for entry in manifest.documents if entry.name.startswith("@")]
    return {part.name for entry in entries for part in entry.parts}


@asynchronous
async def test_a_page_that_rots_in_sqlite_costs_nothing_that_another_tier_has(
    url: str, tmp_path: Path
) -> None:
    path = tmp_path / "primary.db"
    async with agent(f"sqlite:///{path}", url, settings=PATIENT) as replica:
        first, second, before, after = await two(replica)
        await caught_up(replica)
    size = path.stat().st_size
    with open(path, "r+b") as file:
        for offset in range(100, size, 4096):
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
    async with agent(f"sqlite:///{path}", url, settings=PATIENT) as replica:
        with pytest.raises(CheckpointFailed, match="damaged.*move the file away|not an SQLite"):
            await replica.checkpoint()
        await replica._checkpoints.settled()
        assert [c.id for c in replica.checkpoints()] == [first, second]
        assert await load(replica, first) == before
        assert await load(replica, second) == after

        # As its error says: a new one is begun, and gets everything.
        for each in tmp_path.glob("primary.db*"):
            each.rename(tmp_path / f"bad-{each.name}")
        await caught_up(replica)
        for id in (first, second):
            assert (await replica.verify(id, tier=f"sqlite:///{path}")).failed == {}


# Others' checkpoints


@asynchronous
async def test_another_agents_newest_whole_checkpoint_is_read_from_shared_tiers(
    urls: dict[str, str], tmp_path: Path
) -> None:
    shared = [urls["redis"], urls["s3"]]
    own = [f"sqlite:///{tmp_path}/{name}.db" for name in ("agent", "other")]
    async with agent(own[0], *shared, settings=PATIENT) as one:
        first, second, before, after = await two(one)
        await caught_up(one)
        manifest = one._checkpoints.find(second)
    (delta,) = manifest.names - system(manifest) - {entry.base.name for entry in manifest.documents}
    settings = one.config
    async with Replica("other/ä", checkpoints=[own[1], *shared], config=settings) as other:
        replica_of_other = other._checkpoints
        fill(other, 20)
        mine = await other.checkpoint()
        await caught_up(other)
        damaged, failed = hear(other, CheckpointDamaged), hear(other, TierFailed)

        async def newest() -> tuple[str, dict[str, Any]] | None:
            theirs = await replica_of_other.of("agent")
            assert theirs.failures() == {}
            async for checkpoint, documents in theirs.newest():
                return checkpoint.id, rebuild(documents)
            return None

        theirs = await replica_of_other.of("agent")
        assert [(c.id, c.label) for c in theirs.saved()] == [(first, "first"), (second, "")]
        assert all(len(c.tiers) == 2 for c in theirs.saved())
        assert await newest() == (second, after)

        before_reading = [await held(url) for url in shared]
        await flip(shared[0], part_key("agent", delta))
        flipped = await held(shared[0])
        assert await newest() == (second, after), "S3 has it"
        await told(damaged)
        assert damaged[0].key == part_key("agent", delta)
        assert await held(shared[0]) == flipped, "it is not ours to mend"

        await flip(shared[1], part_key("agent", delta))
        assert await newest() == (first, before)
        await flip(shared[1], manifest_key("agent", first))
        await flip(shared[0], manifest_key("agent", first))
        assert await newest() is None

        # The own ones, and what is in the tiers, are as they were.
        for url, content in zip(shared, before_reading, strict=True):
            assert (await held(url)).keys() == content.keys()
        assert [c.id for c in other.checkpoints()] == [mine.id] and failed == []
        assert (await other.verify(mine.id)).failed == {}
        assert (await replica_of_other.of("nobody")).saved() == []


@asynchronous
async def test_others_are_told_which_shared_tiers_have_the_newest(urls: dict[str, str]) -> None:
    order = [urls[kind] for kind in ("sqlite", "shm", "redis", "s3")]
    shared = order[2:]
    config = quick(**PATIENT)
    async with Replica("agent", checkpoints=order, config=config, listen="ws://127.0.0.1:0") as one:
        async with Replica("other", peers=[str(one.address)]) as other:
            heard = hear(other, CheckpointSaved)
            fill(one)
            checkpoint = await one.checkpoint("shared")
            while not heard or set(heard[-1].tiers) != set(shared):
                await told(heard, len(heard) + 1)

            assert {(event.agent, event.id, event.local) for event in heard} == {
                ("agent", checkpoint.id, False)
            }
            counts = [len(event.tiers) for event in heard]
            assert counts == sorted(counts)
            await caught_up(one)
            written = one.version()
            one._checkpoints.shelves[0].wake()
            await caught_up(one)
            assert one.version() == written, "what stands there is not written again"


@pytest.mark.parametrize("how", ["hangs", "dies"])
@asynchronous
async def test_of_another_agents_tiers_one_that_works_is_enough(
    server: Breakable, how: str, tmp_path: Path
) -> None:
    good = f"sqlite:///{tmp_path}/shared.db"
    async with agent(server.url, good, settings=HASTY) as one:
        _, second, _, after = await two(one)
        await caught_up(one)
    async with Replica("other", checkpoints=[server.url, good], config=one.config) as other:
        await caught_up(other)
        with broken(server, how):
            theirs = await other._checkpoints.of("agent")
            assert [*theirs.failures()] == [server.url]
            async for checkpoint, documents in theirs.newest():
                assert checkpoint.id == second and rebuild(documents) == after
                break
            else:
                raise AssertionError("there is one")
    async with Replica("third", checkpoints=[server.url], config=one.config) as third:
        with broken(server, how):
            theirs = await third._checkpoints.of("agent")
            # Nobody can tell whether there is one: that is said, and nothing is lost.
            assert theirs.saved() == [] and [*theirs.failures()] == [server.url]
            with pytest.raises(TierError, match="no answer|cannot be reached"):
                await theirs.load(second)
            with pytest.raises(UnknownCheckpoint):
                await theirs.load("no id")


@asynchronous
async def test_agents_that_share_tiers_leave_each_others_alone(url: str) -> None:
    rule = Retention(count=1)
    async with (
        agent(url, settings=PATIENT, retention=rule) as one,
        Replica("agent-2", checkpoints=[url], config=one.config, retention=rule) as two_,
    ):
        for number in range(3):
            for replica in (one, two_):
                fill(replica, 10 + number)
            made = await asyncio.gather(one.checkpoint(), two_.checkpoint())
        await caught_up(one)
        await caught_up(two_)

        for replica, checkpoint in zip((one, two_), made, strict=True):
            assert [c.id for c in replica.checkpoints()] == [checkpoint.id]
            assert (await replica.verify(checkpoint.id)).failed == {}
            assert await load(replica, checkpoint.id) == users(replica)
        keys = await held(url)
        for name in ("agent", "agent-2"):
            assert sum(key.startswith(f"{prefix_of(name)}manifests/") for key in keys) == 1
