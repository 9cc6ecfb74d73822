"""Checkpoints in tiers that fail in every way: what is listed can be loaded, and is right."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import msgpack
import pytest
from checkpointing import agent, fill, happens, hear, load, quick, rebuild, users
from faulty_tier import FaultyTier, Mood
from harness import asynchronous
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from crdtstate import (
    CheckpointDamaged,
    CheckpointFailed,
    CheckpointSaved,
    Config,
    CorruptCheckpoint,
    CorruptStore,
    Cut,
    Replica,
    ReplicaClosed,
    Retention,
    StoreUnavailable,
    TierError,
    TierFailed,
    TierRecovered,
    UnknownCheckpoint,
    UsageError,
    blocking,
)
from crdtstate.checkpoints import Checkpoints
from crdtstate.documents import DocumentSet
from crdtstate.manifest import (
    DELTAS_MAX,
    make_id,
    make_part,
    manifest_key,
    part_key,
)
from crdtstate.relay.chronicle import Chronicle
from crdtstate.relay.holdings import Holdings
from crdtstate.relay.metrics import Metrics, encode
from crdtstate.stores.memory import MemoryStore
from crdtstate.tending import ORPHAN_GRACE

MOODS = [mood for mood in get_args(Mood) if mood != "well"]
NURSERY = Path(__file__).with_name("checkpoint_child.py")
KILLS = 60


def keys(tier: FaultyTier, kind: str) -> list[str]:
    return sorted(key for key in tier.values if f"/{kind}/" in key)


# Making and loading


@asynchronous
async def test_a_checkpoint_gives_back_what_was_there() -> None:
    async with agent("memory://") as replica:
        fill(replica)
        replica.counter("tokens").increment(7)
        replica.document("tasks").set("open").add("write")
        replica.document("notes", shared=True).text("body").insert(0, "hello")
        then = replica.version()

        checkpoint = await replica.checkpoint("before")
        before = users(replica)
        fill(replica, 200)
        replica.document("later").map("x")["y"] = 1

        assert await load(replica, checkpoint.id) == before != users(replica)
        loaded = {each.name: each for each in await replica._checkpoints.load(checkpoint.id)}
        assert loaded["notes"].shared and not loaded["main"].shared
        assert checkpoint.version == then
        assert checkpoint.label == "before"
        assert checkpoint.tiers == ("memory://",)
        assert checkpoint.size > 0
        assert replica.checkpoints() == [checkpoint]
        assert (await replica.verify(checkpoint.id)).intact == ("memory://",)


@asynchronous
async def test_an_empty_replica_has_checkpoints_too() -> None:
    async with Replica("agent") as replica:
        checkpoint = await replica.checkpoint()

        assert await load(replica, checkpoint.id) == {}
        assert checkpoint.version == Cut() and checkpoint.size == 0


@asynchronous
async def test_beside_a_store_they_are_kept_in_a_file_made_with_the_first(tmp_path: Path) -> None:
    store, file = tmp_path / "a b.db", tmp_path / "a b.db.checkpoints"
    async with Replica("agent", store=store) as replica:
        assert replica.checkpoints() == []
        await replica.prune_checkpoints()
        with pytest.raises(UnknownCheckpoint):
            await replica.verify(f"{1:016x}-{1:016x}")
        assert not file.exists()
        fill(replica)
        checkpoint = await replica.checkpoint()
        before = users(replica)
        assert file.exists()
    async with Replica("agent", store=store) as replica:
        assert replica.checkpoints() == [checkpoint]
        assert (await replica.verify(checkpoint.id)).failed == {}
        assert await load(replica, checkpoint.id) == before


@asynchronous
async def test_what_has_not_changed_is_not_written_again() -> None:
    tier = FaultyTier()
    async with agent(tier) as replica:
        fill(replica)
        replica.document("other").map("x")["y"] = 1
        first = await replica.checkpoint()
        tier.puts.clear()
        second = await replica.checkpoint()
        put = [key for key in tier.puts if "/parts/" in key]

        # The first was announced in a document of the system's, and that is all.
        manifest = replica._checkpoints.find(second.id)
        system = manifest.find("@checkpoints")
        assert system is not None
        assert put == [part_key("agent", system.base.name)]
        assert manifest.find("main") == replica._checkpoints.find(first.id).find("main")
        assert manifest.parent == first.id


@asynchronous
async def test_few_changes_are_a_delta_until_the_chain_is_renewed() -> None:
    async with agent("memory://") as replica:
        fill(replica, 1000)
        await replica.checkpoint()
        lengths = []
        for number in range(DELTAS_MAX + 3):
            replica.map("plan")["key-7"] = f"value {number}"
            checkpoint = await replica.checkpoint()
            entry = replica._checkpoints.find(checkpoint.id).find("main")
            assert entry is not None
            lengths.append(len(entry.deltas))
            assert await load(replica, checkpoint.id) == users(replica)

        assert lengths == [*range(1, DELTAS_MAX + 1), 0, 1, 2]


@asynchronous
async def test_what_the_journal_forgot_makes_a_new_base(tmp_path: Path) -> None:
    small = {"snapshot_after_bytes": 2000, "log_bytes": 1000}
    async with agent("memory://", store=tmp_path / "agent.db", settings=small) as replica:
        fill(replica, 1000)
        await replica.checkpoint()
        for number in range(300):
            replica.map("plan")[f"key-{number}"] = "x" * 300
            await replica.durable()
        assert replica._store.floor("main")

        checkpoint = await replica.checkpoint()

        entry = replica._checkpoints.find(checkpoint.id).find("main")
        assert entry is not None and entry.deltas == ()
        assert await load(replica, checkpoint.id) == users(replica)


@asynchronous
async def test_if_the_journal_forgets_meanwhile_the_cut_is_taken_again() -> None:
    async with agent("memory://") as replica:
        fill(replica, 1000)
        await replica.checkpoint()
        replica.map("plan")["key-1"] = "changed"
        read, attempts = replica._store.read, []

        def forgetting(document: str, *rest: Any) -> Any:
            attempts.append(document)
            return [], False

        replica._store.read = forgetting  # type: ignore[method-assign]
        checkpoint = await replica.checkpoint()
        before = users(replica)
        replica._store.read = read  # type: ignore[method-assign]

        assert attempts
        assert await load(replica, checkpoint.id) == before


@asynchronous
async def test_a_damaged_journal_does_not_keep_checkpoints_from_being_made() -> None:
    async with agent("memory://") as replica:
        fill(replica, 1000)
        await replica.checkpoint()
        replica.map("plan")["key-1"] = "changed"

        def damaged(*_: Any) -> Any:
            raise CorruptStore("store", "row 7 fails its checksum")

        replica._store.read = damaged  # type: ignore[method-assign]
        checkpoint = await replica.checkpoint()

        assert await load(replica, checkpoint.id) == users(replica)


@asynchronous
async def test_a_checkpoint_holds_only_what_is_committed(tmp_path: Path) -> None:
    store = tmp_path / "agent.db"
    async with agent("memory://", store=store, durability="power") as replica:
        for number in range(30):
            with replica.transaction():
                replica.map("plan")["n"] = number
                replica.document("other").map("plan")["n"] = number
            checkpoint = await replica.checkpoint()

            for name, version in checkpoint.version.items():
                assert version <= replica._sync.committed_version(name)


class StubbornStore(MemoryStore):
    """A store that commits nothing while it fails."""

    def append(self, entries: Sequence[Any], *rest: Any) -> int:
        if self.failure is None:
            return super().append(entries, *rest)
        return self.committed + 1


@asynchronous
async def test_while_the_store_fails_there_is_no_checkpoint() -> None:
    class Stubborn(Replica):
        def _open_store(self) -> MemoryStore:
            return StubbornStore()

    tier = FaultyTier()
    async with Stubborn("agent", checkpoints=[tier], config=quick()) as replica:
        replica._store.failure = StoreUnavailable("disk", "full")
        replica.map("plan")["lost"] = True

        with pytest.raises(CheckpointFailed, match="disk: full"):
            await replica.checkpoint()

        assert replica.checkpoints() == [] and not tier.values


@asynchronous
async def test_a_transaction_is_in_a_checkpoint_or_not() -> None:
    async with agent("memory://") as replica:
        documents = [replica.document(f"d{number}") for number in range(3)]
        writes = 0
        is_done = False

        async def write() -> None:
            nonlocal writes
            while not is_done:
                with replica.transaction():
                    for document in documents:
                        document.counter("count").increment()
                        document.map("log")[f"k{writes % 50}"] = writes
                writes += 1
                await asyncio.sleep(0)

        writer = asyncio.ensure_future(write())
        seen = []
        for _ in range(40):
            checkpoint = await replica.checkpoint()
            found = DocumentSet("reader", 99, lambda: 1)
            for name, _, _, snapshot, changes in await replica._checkpoints.load(checkpoint.id):
                found.load_snapshot(name, snapshot)
                for change in changes:
                    found.load_change(name, change)
            counts = {found.document(f"d{n}").counter("count").value for n in range(3)}
            assert len(counts) == 1, f"torn: {counts}"
            seen += counts
        is_done = True
        await writer

        assert seen == sorted(seen) and len(set(seen)) > 20
        assert writes >= seen[-1]


@asynchronous
async def test_a_transaction_that_is_open_is_not_in_a_checkpoint() -> None:
    async with agent("memory://") as replica:
        fill(replica)
        before = users(replica)
        with replica.transaction():
            fill(replica, 1)
            replica.map("plan")["half"] = "done"
            with pytest.raises(UsageError, match="transaction"):
                await replica.checkpoint()
            # As a periodic one would be made, while somebody awaits in a transaction.
            checkpoint = await replica._checkpoints.create()

        assert await load(replica, checkpoint.id) == before


# Tiers that fail


@pytest.mark.parametrize("mood", MOODS)
@asynchronous
async def test_only_the_primary_must_succeed_and_the_others_catch_up(mood: Mood) -> None:
    primary, other = FaultyTier("primary"), FaultyTier("other")
    async with agent(primary, other) as replica:
        fill(replica)
        await replica.checkpoint("both have it")
        await replica._checkpoints.settled()
        failing = asyncio.ensure_future(happens(replica, TierFailed))
        recovering = asyncio.ensure_future(happens(replica, TierRecovered))
        await asyncio.sleep(0)
        other.mood = mood
        made = []
        for number in range(3):
            replica.map("plan")["n"] = number
            made.append(await replica.checkpoint())
            assert made[-1].tiers == (primary.url,)

        failed = await failing
        assert failed.tier == other.url and failed.reason and not failed.is_primary
        other.mood = "well"
        assert (await recovering).tier == other.url
        await replica._checkpoints.settled()

        for checkpoint in made:
            assert (await replica.verify(checkpoint.id)).intact == (primary.url, other.url)
        assert other.values.keys() == primary.values.keys()


@pytest.mark.parametrize("mood", MOODS)
@asynchronous
async def test_without_the_primary_there_is_no_checkpoint_until_it_works(mood: Mood) -> None:
    primary, other = FaultyTier("primary"), FaultyTier("other")
    async with agent(primary, other) as replica:
        heard = hear(replica, TierFailed, CheckpointSaved)
        fill(replica)
        good = await replica.checkpoint()
        await replica._checkpoints.settled()
        before = users(replica)
        replica.map("plan")["more"] = 1
        primary.mood = mood
        heard.clear()

        with pytest.raises(CheckpointFailed) as failed:
            await replica.checkpoint()

        assert failed.value.path == primary.url
        assert [c.id for c in replica.checkpoints()] == [good.id]
        # Nearest first would be the primary: it fails, and the other has it.
        if mood in ("gone", "silent", "surprising"):
            assert await load(replica, good.id) == before
        primary.mood = "well"
        again = await replica.checkpoint()
        assert [type(event) for event in heard] == [TierFailed, CheckpointSaved]
        assert heard[0].is_primary
        assert await load(replica, again.id) == users(replica)


@asynchronous
async def test_a_tier_that_lies_is_found_out() -> None:
    primary = FaultyTier("primary")
    async with agent(primary) as replica:
        fill(replica)
        for mood, what in (("forgetful", "nothing"), ("altering", "other bytes")):
            primary.mood = mood  # type: ignore[assignment]
            with pytest.raises(CheckpointFailed, match=f"gives back {what}"):
                await replica.checkpoint()


@asynchronous
async def test_a_tier_that_lost_everything_gets_it_again() -> None:
    primary, other = FaultyTier("primary"), FaultyTier("other")
    async with agent(other, primary) as replica:
        primary_first = replica._checkpoints.primary.url
        assert primary_first == other.url, "without SQLite the first is the primary"
        fill(replica)
        first = await replica.checkpoint()
        await replica._checkpoints.settled()
        for tier in (primary, other):
            for key in [*tier.values]:
                if tier is primary or "/parts/" in key:
                    tier.remove(key)
            if tier is primary:
                replica.map("plan")["n"] = 1
                await replica.checkpoint()
                await replica._checkpoints.settled()
                assert primary.values.keys() == other.values.keys()

        # The parts of the primary are gone, and come back from the other.
        second = await replica.checkpoint()
        await replica._checkpoints.settled()

        assert await load(replica, second.id) == users(replica)
        for id in (first.id, second.id):
            assert (await replica.verify(id)).failed == {}


@asynchronous
async def test_what_a_tier_has_already_is_looked_at_before_it_counts() -> None:
    primary, other = FaultyTier("primary"), FaultyTier("other")
    async with agent(primary, other) as replica:
        other.mood = "gone"
        fill(replica)
        checkpoint = await replica.checkpoint()
        for name in replica._checkpoints.find(checkpoint.id).parts():
            # From a former life, under the right name.
            other.write(part_key("agent", name), b"not what was written")
        recovering = asyncio.ensure_future(happens(replica, TierRecovered))
        await asyncio.sleep(0)
        other.mood = "well"
        await recovering

        assert (await replica.verify(checkpoint.id)).intact == (primary.url, other.url)


@asynchronous
async def test_a_part_that_nobody_has_is_written_anew() -> None:
    tier = FaultyTier()
    async with agent(tier) as replica:
        fill(replica)
        first = await replica.checkpoint()
        for key in keys(tier, "parts"):
            tier.flip(key, 80)
        # What was found whole a moment ago is not looked at again, unless something is said.
        with pytest.raises(CorruptCheckpoint):
            await replica.verify(first.id)
        second = await replica.checkpoint()

        assert await load(replica, second.id) == users(replica)
        assert (await replica.verify(second.id)).failed == {}


# Damage


async def two_checkpoints(replica: Replica) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """Two checkpoints, the second with a delta, and what was there at each."""
    fill(replica, 300)
    replica.document("other").map("x")["y"] = 1
    first, before = await replica.checkpoint(), users(replica)
    fill(replica, 5)
    replica.map("plan")["new"] = 1
    second, after = await replica.checkpoint(), users(replica)
    await replica._checkpoints.settled()
    return first.id, second.id, before, after


@asynchronous
async def test_a_flipped_bit_anywhere_is_found_named_and_mended_from_the_next_tier() -> None:
    near, far = FaultyTier("near"), FaultyTier("far")
    rng = random.Random(4)
    async with agent(near, far) as replica:
        _, id, _, after = await two_checkpoints(replica)
        damaged = hear(replica, CheckpointDamaged)
        manifest = replica._checkpoints.find(id)
        entry = manifest.find("main")
        assert entry is not None and entry.deltas
        parts = [part_key("agent", name) for name in manifest.parts()]
        for key in [*parts, manifest_key("agent", id)]:
            good = near.values[key]
            near.flip(key, rng.randrange(8 * len(good)))
            damaged.clear()

            assert await load(replica, id) == after
            result = await replica.verify(id)
            await replica._checkpoints.settled()

            # Or loading had found it, and it was mended already.
            if result.failed:
                assert result.intact == (far.url,) and [*result.failed] == [near.url]
            assert {(event.tier, event.key) for event in damaged} == {(near.url, key)}
            assert near.values[key] == good, "it was not mended"
            assert (await replica.verify(id, tier=near.url)).failed == {}


@asynchronous
async def test_damage_that_nobody_can_mend_is_named_and_the_next_good_one_is_used() -> None:
    tier = FaultyTier()
    async with agent(tier) as replica:
        first, second, before, _ = await two_checkpoints(replica)
        only = replica._checkpoints.find(second).parts().keys() - (
            replica._checkpoints.find(first).parts().keys()
        )
        damaged = hear(replica, CheckpointDamaged)
        for name in sorted(only):
            key = part_key("agent", name)
            good = tier.values[key]
            tier.flip(key, 8 * len(good) - 1)

            with pytest.raises(CorruptCheckpoint) as found:
                await replica._checkpoints.load(second)
            assert (found.value.path, found.value.key) == (tier.url, key)
            with pytest.raises(CorruptCheckpoint):
                await replica.verify(second)
            assert [c.id for c in replica.checkpoints()] == [first], "it is still listed"
            async for checkpoint, documents in replica._checkpoints.newest():
                assert checkpoint.id == first
                assert rebuild(documents) == before
                break
            else:
                raise AssertionError("there is a good one")
            tier.write(key, good)
            assert (await replica.verify(second)).failed == {}
            assert [c.id for c in replica.checkpoints()] == [first, second]
        await asyncio.sleep(0)
        assert {event.key for event in damaged} == {part_key("agent", name) for name in only}


@asynchronous
async def test_what_was_damaged_while_closed_is_found_at_opening_or_at_use(
    tmp_path: Path,
) -> None:
    tier, store = FaultyTier(), tmp_path / "agent.db"
    async with agent(tier, store=store) as replica:
        first, second, before, after = await two_checkpoints(replica)
    key = manifest_key("agent", second)
    good = tier.values[key]
    tier.flip(key, 99)
    async with agent(tier, store=store) as replica:
        assert [c.id for c in replica.checkpoints()] == [first]
        with pytest.raises(UnknownCheckpoint):
            await replica.verify(second)
        assert await load(replica, first) == before
        assert key in tier.values, "evidence is not deleted"
    tier.write(key, good)
    async with agent(tier, store=store) as replica:
        assert await load(replica, second) == after


@asynchronous
async def test_a_tier_that_cannot_be_asked_is_not_taken_for_one_that_lost_it() -> None:
    tier = FaultyTier()
    async with agent(tier) as replica:
        fill(replica)
        checkpoint = await replica.checkpoint()
        tier.mood = "gone"
        with pytest.raises(TierError, match="nobody there"):
            await replica._checkpoints.load(checkpoint.id)
        with pytest.raises(TierError, match="nobody there"):
            await replica.verify(checkpoint.id)
        tier.mood = "well"

        assert await load(replica, checkpoint.id) == users(replica)
        assert [c.id for c in replica.checkpoints()] == [checkpoint.id]


@asynchronous
async def test_foreign_manifests_with_hostile_bytes_do_no_harm() -> None:
    tier = FaultyTier()
    tier.write(manifest_key("agent", f"{5:016x}-{6:016x}"), b"\xdd\xff\xff\xff\xff" * 9)
    tier.write("agent/manifests/nonsense", b"x")
    tier.write("agent/other", b"x")
    tier.write("agent/parts/zz", b"x")
    tier.write("somebody/manifests/x", b"x")
    async with agent(tier) as replica:
        fill(replica)
        checkpoint = await replica.checkpoint()
        await replica.prune_checkpoints()

        assert [c.id for c in replica.checkpoints()] == [checkpoint.id]
        assert tier.deletes == []


# Asking for what is not there


@asynchronous
async def test_unknown_checkpoints_tiers_and_labels_are_refused() -> None:
    async with agent("memory://") as replica:
        checkpoint = await replica.checkpoint()
        for id in ("", "../x", f"{1:016x}-{1:016x}", None):
            with pytest.raises(UnknownCheckpoint, match="replica.checkpoints"):
                await replica.verify(id)  # type: ignore[arg-type]
            with pytest.raises(UnknownCheckpoint):
                replica.why_kept(id)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="which has memory://"):
            await replica.verify(checkpoint.id, tier="s3://elsewhere")
        for label in ("x" * 201, 7, "a\nb", "\ud800"):
            with pytest.raises(UsageError, match="label"):
                await replica.checkpoint(label)  # type: ignore[arg-type]
    with pytest.raises(ReplicaClosed):
        await replica.checkpoint()
    assert [c.id for c in replica.checkpoints()] == [checkpoint.id]


@pytest.mark.parametrize(
    "tiers", ["memory://", [], ["memory://", "memory://"], ["ftp://x"], [7], 7, ["memory://x"]]
)
def test_tiers_that_cannot_be_are_refused_at_the_door(tiers: Any) -> None:
    with pytest.raises(UsageError):
        Replica("agent", checkpoints=tiers)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="retention"):
        Replica("agent", retention=5)  # type: ignore[arg-type]
    assert Config(checkpoint_interval=0).checkpoint_interval == 0
    for wrong in ({"checkpoint_interval": -1}, {"tier_timeout": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Config(**wrong)  # type: ignore[arg-type]


# At the same time


@asynchronous
async def test_two_at_once_are_made_one_after_the_other() -> None:
    tier = FaultyTier()
    async with agent(tier) as replica:
        fill(replica)
        made = await asyncio.gather(*(replica.checkpoint(str(number)) for number in range(5)))

        assert sorted(c.label for c in replica.checkpoints()) == ["0", "1", "2", "3", "4"]
        assert len({checkpoint.id for checkpoint in made}) == 5
        order = [key for key in tier.puts if "/manifests/" in key]
        assert order == sorted(order) and len(order) == 5
        for checkpoint in made:
            assert (await replica.verify(checkpoint.id)).failed == {}


@asynchronous
async def test_closing_waits_for_the_checkpoint_that_is_being_made() -> None:
    tier = FaultyTier()
    replica = agent(tier, settings={"tier_timeout": 60})
    async with replica:
        fill(replica)
        tier.gate = asyncio.Event()
        making = asyncio.ensure_future(replica.checkpoint("last"))
        await tier.is_putting.wait()
        closing = asyncio.ensure_future(replica.close())
        for _ in range(10):
            await asyncio.sleep(0)
        with pytest.raises(ReplicaClosed):
            await replica._checkpoints.create("too late")
        assert not closing.done()
        tier.gate.set()
        checkpoint = await making
        await closing

    assert keys(tier, "manifests") == [manifest_key("agent", checkpoint.id)]


@asynchronous
async def test_who_does_not_wait_leaves_nothing_half_done() -> None:
    tier = FaultyTier()
    async with agent(tier, settings={"tier_timeout": 60}) as replica:
        fill(replica)
        tier.gate = asyncio.Event()
        making = asyncio.ensure_future(replica.checkpoint("first"))
        await tier.is_putting.wait()
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
        tier.gate.set()
        second = await replica.checkpoint("second")

        assert [c.label for c in replica.checkpoints()] == ["first", "second"]
        assert (await replica.verify(second.id)).failed == {}


@asynchronous
async def test_a_slow_tier_holds_up_neither_writing_nor_closing() -> None:
    primary, slow = FaultyTier("primary"), FaultyTier("slow")
    slow.mood = "silent"
    async with agent(primary, slow, settings={"tier_timeout": 3600}) as replica:
        fill(replica)
        for _ in range(3):
            await replica.checkpoint()
        assert len(keys(primary, "manifests")) == 3


# By itself


@asynchronous
async def test_what_changed_is_saved_by_itself() -> None:
    async with agent("memory://", settings={"checkpoint_interval": 0.01}) as replica:
        for number in range(3):
            saving = asyncio.ensure_future(happens(replica, CheckpointSaved))
            await asyncio.sleep(0)
            replica.map("plan")["n"] = number
            event = await saving
            assert event.local and event.agent == "agent" and event.tiers == ("memory://",)
            assert Cut.parse(event.version) <= replica.version()
            if not replica._checkpoints._has_changed():
                assert await load(replica, event.id) == users(replica)


@asynchronous
async def test_only_the_users_documents_make_one_necessary() -> None:
    async with agent("memory://") as replica:
        checkpoints = replica._checkpoints
        assert not checkpoints._has_changed()
        fill(replica)
        replica.version()
        assert checkpoints._has_changed()
        await replica.checkpoint()
        assert not checkpoints._has_changed()
        replica.system_document("@control").map("x")["y"] = 1
        replica.version()
        assert not checkpoints._has_changed()
        replica.document("new").map("x")["y"] = 1
        replica.version()
        assert checkpoints._has_changed()


@asynchronous
async def test_a_periodic_one_that_fails_comes_again() -> None:
    tier = FaultyTier()
    tier.mood = "full"
    async with agent(tier, settings={"checkpoint_interval": 0.01}) as replica:
        failing = asyncio.ensure_future(happens(replica, TierFailed))
        saving = asyncio.ensure_future(happens(replica, CheckpointSaved))
        await asyncio.sleep(0)
        fill(replica)
        await failing
        tier.mood = "well"
        event = await saving

        assert await load(replica, event.id) == users(replica)


# For those who look from outside


@asynchronous
async def test_a_glance_tells_how_the_tiers_do() -> None:
    primary, other = FaultyTier("primary"), FaultyTier("other")
    async with agent(primary, other) as replica:
        found = replica.glance()
        assert (found.checkpoints, found.checkpoint_at) == (0, None)
        fill(replica)
        failing = asyncio.ensure_future(happens(replica, TierFailed))
        await asyncio.sleep(0)
        other.mood = "full"
        checkpoint = await replica.checkpoint()
        await failing

        found = replica.glance()
        assert found.checkpoints == 1
        assert found.checkpoint_at == checkpoint.stamp.wall_ms / 1000
        assert found.tiers[primary.url] == (None, 0, 1)
        assert found.tiers[other.url].failure == "no room"
        assert found.tiers[other.url].failures >= 1


@asynchronous
async def test_a_relay_tells_its_checkpoints_to_prometheus() -> None:
    tier = FaultyTier()
    async with agent(tier) as replica:
        metrics = Metrics(replica, Holdings(replica), Chronicle(replica))

        def told() -> dict[str, float]:
            families = text_string_to_metric_families(
                encode(metrics.families(is_ready=True, viewers=0)).decode()
            )
            return {s.name: s.value for f in families for s in f.samples if "c" in s.name}

        assert "crdtstate_checkpoint_age_seconds" not in told()
        await replica.checkpoint()
        tier.mood = "gone"
        with pytest.raises(CheckpointFailed):
            await replica.checkpoint()
        found = told()

        assert 0 <= found["crdtstate_checkpoint_age_seconds"] < 60
        assert found["crdtstate_checkpoints"] == found["crdtstate_tier_checkpoints"] == 1
        assert found["crdtstate_tier_failing"] == 1
        assert found["crdtstate_tier_failures_total"] >= 1


def test_threads_make_checkpoints_too(tmp_path: Path) -> None:
    with blocking.Replica("agent", store=tmp_path / "agent.db") as replica:
        replica.map("plan")["goal"] = "ship"
        checkpoint = replica.checkpoint("from a thread")

        assert replica.checkpoints() == [checkpoint]
        assert replica.verify(checkpoint.id).intact == checkpoint.tiers
        assert replica.verify(checkpoint.id, tier=checkpoint.tiers[0]).failed == {}
        assert "newest" in replica.why_kept(checkpoint.id)
        assert replica.prune_checkpoints(dry_run=True).dropped == {}


# The mesh


@asynchronous
async def test_others_hear_of_a_checkpoint() -> None:
    async with Replica("one", listen="ws://127.0.0.1:0", checkpoints=["memory://"]) as one:
        async with Replica("other", peers=[str(one.address)]) as other:
            await other.synced(timeout=20)
            hearing = asyncio.ensure_future(happens(other, CheckpointSaved))
            await asyncio.sleep(0)
            one.map("plan")["goal"] = "ship"
            checkpoint = await one.checkpoint("released")
            event = await hearing

            assert (event.agent, event.id, event.label) == ("one", checkpoint.id, "released")
            assert Cut.parse(event.version) == checkpoint.version
            assert not event.local and event.tiers == (), "nobody else reaches a process's memory"
            assert other.checkpoints() == []


@asynchronous
async def test_nonsense_in_the_document_tells_nothing() -> None:
    async with Replica("one", listen="ws://127.0.0.1:0") as one:
        async with Replica("other", peers=[str(one.address)]) as other:
            heard = hear(other, CheckpointSaved)
            newest = one.system_document("@checkpoints").map("newest")
            good = {"id": "i", "label": "l", "version": "v", "tiers": []}
            newest["a"] = 7
            newest["b"] = {}
            newest["c"] = {**good, "tiers": "s3://x"}
            newest["d"] = {**good, "tiers": [7]}
            newest["e"] = {**good, "id": None}
            one.document("@checkpoints").map("other")["f"] = good
            newest["g"] = good
            await one.synced(timeout=20)
            await other.wait_for(one.version(), timeout=20)
            await asyncio.sleep(0)

            assert [event.agent for event in heard] == ["g"]


@asynchronous
async def test_who_does_not_subscribe_to_it_makes_checkpoints_all_the_same() -> None:
    async with agent("memory://", subscribe=["main"]) as replica:
        fill(replica)
        checkpoint = await replica.checkpoint()

        assert [*checkpoint.version] == ["main"]
        assert [*replica.documents()] == ["main"]


@asynchronous
async def test_what_the_replica_disowns_is_in_no_checkpoint() -> None:
    tier = FaultyTier()
    async with agent(tier) as replica:
        empty = await replica.checkpoint("before all")
        fill(replica)
        wrong = await replica.checkpoint("under a writer that is not ours")

        replica._reidentify("peers know more of it")
        await replica._checkpoints.settled()

        labels = [c.label for c in replica.checkpoints()]
        assert wrong.id not in [c.id for c in replica.checkpoints()], labels
        assert manifest_key("agent", wrong.id) not in tier.values
        assert empty.id in [c.id for c in replica.checkpoints()]
        again = await replica.checkpoint()
        assert wrong.version["main"].keys() & again.version["main"].keys() == set()
        assert await load(replica, again.id) == users(replica)


@asynchronous
async def test_a_checkpoint_that_is_disowned_while_it_is_written_was_not_made() -> None:
    tier = FaultyTier()
    async with agent(tier, settings={"tier_timeout": 60}) as replica:
        fill(replica)
        tier.gate = asyncio.Event()
        making = asyncio.ensure_future(replica.checkpoint())
        await tier.is_putting.wait()
        replica._reidentify("peers know more of it")
        tier.gate.set()

        with pytest.raises(CheckpointFailed, match="another writer"):
            await making
        await replica._checkpoints.settled()

        assert replica.checkpoints() == [] and keys(tier, "manifests") == []
        again = await replica.checkpoint()
        assert await load(replica, again.id) == users(replica)


# Retention


@asynchronous
async def test_old_ones_go_and_nothing_that_is_kept_lacks_a_part() -> None:
    near, far = FaultyTier("near"), FaultyTier("far")
    keep = Retention(count=3, labelled=1)
    async with agent(near, far, retention=keep) as replica:
        for number in range(12):
            fill(replica, 100 + number)
            replica.map("plan")["big"] = os.urandom(3000 if number % 4 == 0 else 10)
            await replica.checkpoint("kept" if number == 2 else "")
            await replica._checkpoints.settled()

            kept = replica.checkpoints()
            for checkpoint in kept:
                result = await replica.verify(checkpoint.id)
                assert result.intact == (near.url, far.url)
            named = {n for c in kept for n in replica._checkpoints.find(c.id).parts()}
            for tier in (near, far):
                assert keys(tier, "parts") == sorted(part_key("agent", name) for name in named)
                assert len(keys(tier, "manifests")) == len(kept)

        assert near.torn == far.torn == []
        assert [c.label for c in kept] == ["kept", "", "", ""]
        assert "it has the label 'kept'" in replica.why_kept(kept[0].id)
        assert replica.why_kept(kept[-1].id) == "it is the newest that verifies"


@asynchronous
async def test_a_dry_run_says_what_is_then_done(tmp_path: Path) -> None:
    tier, store = FaultyTier(), tmp_path / "agent.db"
    async with agent(tier, store=store) as replica:
        for number in range(8):
            fill(replica, 10 * number + 1)
            await replica.checkpoint()
    tight = Retention(count=2)
    tier.mood = "gone"
    async with agent(tier, store=store, retention=tight) as replica:
        recovering = asyncio.ensure_future(happens(replica, TierRecovered))
        await asyncio.sleep(0)
        assert replica.checkpoints() == []
        tier.mood = "well"
        # It is read as soon as it works, and what it has too much goes.
        await recovering
        await replica._checkpoints.settled()
        assert len(keys(tier, "manifests")) == 2
    async with agent(tier, store=store, retention=Retention(count=1)) as replica:
        before = sum(len(data) for key, data in tier.values.items() if "/parts/" in key)
        ids = sorted(key.rpartition("/")[2] for key in keys(tier, "manifests"))
        await replica._checkpoints.settled()
        assert [c.id for c in replica.checkpoints()] == ids[-1:]
        assert sum(len(d) for k, d in tier.values.items() if "/parts/" in k) < before
    async with agent(tier, store=store) as replica:
        for number in range(4):
            fill(replica, 100 + number)
            await replica.checkpoint()
        replica._checkpoints.retention = Retention(count=2)
        parts = {key: len(tier.values[key]) for key in keys(tier, "parts")}

        dry = await replica.prune_checkpoints(dry_run=True)
        assert len(replica.checkpoints()) == 5
        assert parts.keys() == set(keys(tier, "parts"))
        done = await replica.prune_checkpoints()

        assert dry == done and len(done.dropped) == 3
        assert [c.id for c in replica.checkpoints()] == sorted(done.kept)
        left = sum(len(tier.values[key]) for key in keys(tier, "parts"))
        assert sum(parts.values()) - left == done.freed_bytes > 0
        assert (await replica.prune_checkpoints()).dropped == {}


@asynchronous
async def test_the_newest_that_can_be_loaded_stays_also_if_it_is_not_known_yet(
    tmp_path: Path,
) -> None:
    tier, store = FaultyTier(), tmp_path / "agent.db"
    async with agent(tier, store=store) as replica:
        first, second, before, _ = await two_checkpoints(replica)
        names = replica._checkpoints.find(second).names - replica._checkpoints.find(first).names
    tier.flip(part_key("agent", min(names)), 80)
    async with agent(tier, store=store, retention=Retention(count=1)) as replica:
        await replica._checkpoints.settled()

        assert "newest that verifies" in replica.why_kept(first)
        assert await load(replica, first) == before
        fill(replica, 9)
        third = await replica.checkpoint()
        await replica._checkpoints.settled()
        assert [c.id for c in replica.checkpoints()] == [third.id]


@asynchronous
async def test_a_manifest_goes_before_its_parts_also_if_it_is_let_go_meanwhile() -> None:
    primary, other = FaultyTier("primary"), FaultyTier("other")
    async with agent(primary, other, retention=Retention(count=2)) as replica:
        for number in range(2):
            fill(replica, 100 + number)
            await replica.checkpoint()
        await replica._checkpoints.settled()
        other.delete_gate = asyncio.Event()
        fill(replica, 200)
        third = await replica.checkpoint()
        await other.is_deleting.wait()
        # The other tier is about to delete the first, when the second has to go as well.
        fill(replica, 300)
        fourth = await replica.checkpoint()
        other.delete_gate.set()
        await replica._checkpoints.settled()

        assert other.torn == primary.torn == []
        assert keys(other, "manifests") == [manifest_key("agent", c.id) for c in (third, fourth)]
        assert other.values == primary.values


@asynchronous
async def test_parts_that_a_checkpoint_being_made_uses_again_are_not_collected() -> None:
    tier = FaultyTier()
    async with agent(tier) as replica:
        checkpoints = replica._checkpoints
        fill(replica)
        first = await replica.checkpoint()
        cutter = checkpoints._cutter
        assert cutter is not None
        take = cutter.take

        async def take_slowly(*args: Any) -> Any:
            cut = await take(*args)
            # Its parent is let go, and collected, before it is written.
            checkpoints.drop([first.id])
            await checkpoints.settled()
            return cut

        cutter.take = take_slowly  # type: ignore[method-assign]
        second = await replica.checkpoint()
        await checkpoints.settled()

        assert checkpoints.find(second.id).parent == first.id
        assert keys(tier, "manifests") == [manifest_key("agent", second.id)]
        assert (await replica.verify(second.id)).failed == {}
        assert await load(replica, second.id) == users(replica)


@asynchronous
async def test_what_a_newer_version_wrote_is_left_alone() -> None:
    tier = FaultyTier()
    fields = [2, "agent", {"of": "the future"}]
    data = msgpack.packb(fields)
    key = manifest_key("agent", make_id(5, data))
    part, stored = make_part(b"of that checkpoint")
    tier.write(key, data)
    tier.write(part_key("agent", part.name), stored)
    async with agent(tier, retention=Retention(count=1)) as replica:
        for number in range(3):
            fill(replica, 10 + number)
            await replica.checkpoint()
        await replica._checkpoints.settled()

        assert key in tier.values and part_key("agent", part.name) in tier.values
        assert len(replica.checkpoints()) == 1


@asynchronous
async def test_parts_that_nobody_names_are_collected_after_a_while() -> None:
    tier = FaultyTier()
    async with agent(tier) as replica:
        fill(replica)
        first = await replica.checkpoint()
        # From a crash a moment ago, and from one long ago by the tier's clock.
        fresh, fresh_data = make_part(b"fresh")
        old, old_data = make_part(b"old")
        await tier._inner.put(part_key("agent", fresh.name), fresh_data)
        await tier._inner.put(part_key("agent", old.name), old_data)
        data, at = tier._inner._values[part_key("agent", old.name)]
        tier._inner._values[part_key("agent", old.name)] = data, at - ORPHAN_GRACE - 1
        tier.age = -1e9  # Its clock is not ours.
        await replica.prune_checkpoints()
        replica._checkpoints.primary.wake()
        await replica._checkpoints.settled()

        assert part_key("agent", old.name) not in tier.values
        assert part_key("agent", fresh.name) in tier.values
        assert (await replica.verify(first.id)).failed == {}


# The archive


@asynchronous
async def test_old_ones_move_to_the_archive_and_load_from_there(tmp_path: Path) -> None:
    near = FaultyTier("near")
    primary = f"sqlite:///{tmp_path}/primary.db"
    archive = f"sqlite:///{tmp_path}/archive.db"
    rule = Retention(near=2)
    async with agent(near, primary, archive, retention=rule) as replica:
        found = {}
        for number in range(5):
            fill(replica, 500 + number)
            replica.map("plan")["text"] = "to be or not to be " * 100 * number
            checkpoint = await replica.checkpoint()
            found[checkpoint.id] = users(replica)
        await replica._checkpoints.settled()
        for shelf in replica._checkpoints.shelves:
            shelf.wake()
        await replica._checkpoints.settled()

        checkpoints = replica.checkpoints()
        assert [c.id for c in checkpoints] == sorted(found)
        assert [c.tiers for c in checkpoints[:3]] == [(archive,)] * 3
        assert [c.tiers for c in checkpoints[3:]] == [(near.url, primary, archive)] * 2
        for id, content in found.items():
            assert await load(replica, id) == content
            assert (await replica.verify(id)).failed == {}


@asynchronous
async def test_nothing_is_moved_to_an_archive_that_does_not_have_it(tmp_path: Path) -> None:
    near = FaultyTier("near")
    rule = Retention(near=1)
    archive = f"sqlite:///{tmp_path}/missing/archive.db"
    async with agent(near, "sqlite:///" + str(tmp_path / "p.db"), archive, retention=rule) as r:
        for number in range(4):
            fill(r, 10 + number)
            await r.checkpoint()
        await r._checkpoints.settled()

        assert len(keys(near, "manifests")) == 4
        assert all(len(c.tiers) == 2 for c in r.checkpoints())


@asynchronous
async def test_the_archive_compresses_harder_under_the_same_names(tmp_path: Path) -> None:
    archive = f"sqlite:///{tmp_path}/archive.db"
    async with agent("sqlite:///" + str(tmp_path / "p.db"), archive) as replica:
        rng = random.Random(1)
        words = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(2, 9))) for _ in range(900)]
        for number in range(40):
            replica.map("plan")[f"k{number}"] = " ".join(rng.choices(words, k=400))
        checkpoint = await replica.checkpoint()
        await replica._checkpoints.settled()
        items = [await shelf.items() for shelf in replica._checkpoints.shelves]

        assert items[0].keys() == items[1].keys()
        (base,) = replica._checkpoints.find(checkpoint.id).parts()
        sizes = [each[part_key("agent", base)].size_bytes for each in items]
        assert sizes[1] < sizes[0]


# Laws

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from("abc"), st.integers(0, 30), st.integers()),
        st.tuples(st.just("remove"), st.sampled_from("abc"), st.integers(0, 30)),
        st.tuples(st.just("count"), st.sampled_from("abc"), st.integers(1, 9)),
        st.tuples(st.just("save")),
        st.tuples(st.just("break"), st.integers(0, 1), st.sampled_from(MOODS)),
        st.tuples(st.just("mend")),
        st.tuples(st.just("rot"), st.integers(0, 1), st.integers(0, 10**9), st.integers(0, 10**9)),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_every_checkpoint_loads_to_exactly_what_was_there(steps: list[Any]) -> None:
    asyncio.run(follow(steps))


async def follow(steps: list[Any]) -> None:
    tiers = [FaultyTier("near"), FaultyTier("far")]
    quickly = {"tier_timeout": 0.02, "tier_retry": 0.001, "tier_retry_max": 0.001}
    rotten = False
    async with agent(*tiers, settings=quickly, retention=Retention(count=3)) as replica:
        found: dict[str, dict[str, Any]] = {}
        for step in steps:
            match step:
                case "put", name, key, value:
                    replica.document(name).map("m")[f"k{key}"] = value
                case "remove", name, key:
                    replica.document(name).map("m").pop(f"k{key}", None)
                case "count", name, by:
                    replica.document(name).counter("c").increment(by)
                case ("save",):
                    replica.version()
                    now = users(replica)
                    try:
                        found[(await replica.checkpoint()).id] = now
                    except CheckpointFailed:
                        assert tiers[0].mood != "well"
                case "break", which, mood:
                    tiers[which].mood = mood
                case ("mend",):
                    for tier in tiers:
                        tier.mood = "well"
                case "rot", which, place, bit:
                    rotten = True
                    if values := sorted(tiers[which].values):
                        key = values[place % len(values)]
                        tiers[which].flip(key, bit % (8 * len(tiers[which].values[key])))
        for tier in tiers:
            tier.mood = "well"
        assert {c.id for c in replica.checkpoints()} <= found.keys()
        assert [tier.torn for tier in tiers] == [[], []]
        for id, content in found.items():
            try:
                assert await load(replica, id) == content
            except UnknownCheckpoint:
                assert id not in [c.id for c in replica.checkpoints()]
                assert rotten or id not in sorted(found)[-3:], "nothing was altered"
            except CorruptCheckpoint:
                assert rotten, "nothing was altered, and it is lost"


# Kills


@asynchronous
async def test_kill_9_while_checkpoints_are_made_leaves_only_whole_ones(tmp_path: Path) -> None:
    rng = random.Random(7)
    store, tier = tmp_path / "victim.db", f"sqlite:///{tmp_path}/victim.ckpt.db"
    nursery = await asyncio.create_subprocess_exec(
        sys.executable,
        str(NURSERY),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert nursery.stdin and nursery.stdout
    newest, total = "", 0
    for number in range(KILLS):
        nursery.stdin.write(f"spawn {store} {tier} {number}\n".encode())
        opened = (await nursery.stdout.readline()).decode().split()
        assert opened[0] == "open", opened
        for _ in range(rng.choice((0, 1, 1, 3))):
            line = (await nursery.stdout.readline()).decode().split()
            assert line[0] == "saved", line
            newest, total = line[1], total + 1
        # Not a wait for something: the moment is the point.
        await asyncio.sleep(rng.random() * 0.02)
        os.kill(int(opened[1]), signal.SIGKILL)
        while (line := (await nursery.stdout.readline()).decode().split())[0] != "reaped":
            assert line[0] == "saved", line
            newest, total = line[1], total + 1
        if newest:
            await check_tier(tier, newest)
    nursery.stdin.close()
    await nursery.wait()
    assert total > KILLS / 2


async def check_tier(url: str, newest: str) -> None:
    """Everything that is listed verifies and is not torn, and what was reported last is there."""
    reader = Checkpoints("victim", [url], Config(), lambda event: None)
    await reader.read_all()
    ids = [checkpoint.id for checkpoint in reader.saved()]
    assert newest in ids or max(ids) > newest
    for id in ids:
        assert (await reader.verify(id)).failed == {}
        found = DocumentSet("reader", 99, lambda: 1)
        for name, _, version, snapshot, changes in await reader.load(id):
            found.load_snapshot(name, snapshot)
            for change in changes:
                found.load_change(name, change)
            document = found.find(name)
            assert document is not None and document.version == version
        if "other" in found.documents():
            count = found.document("other").counter("count").value
            assert found.map("log").get("count", 0) == count, "a transaction was torn"
    await reader.release()
