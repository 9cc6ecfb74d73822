"""Checkpoints where it counts who made them: proven, believed in part, or not at all."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpointing import hear, quick
from harness import asynchronous

from crdtstate import Replica, blocking, cli, verbs
from crdtstate.attestation import Attestation
from crdtstate.authors import authors_of
from crdtstate.catalogue import Checkpoint
from crdtstate.certificates import Grant
from crdtstate.change import CARD_HEAD, Snapshot
from crdtstate.commands import RESTORE, Command
from crdtstate.credentials import Credentials, open_credentials
from crdtstate.documents import DocumentSet
from crdtstate.errors import (
    CheckpointFailed,
    CorruptCheckpoint,
    UnknownCheckpoint,
)
from crdtstate.events import CheckpointDamaged, PeerRejected, SnapshotReceived
from crdtstate.manifest import (
    Entry,
    Manifest,
    make_id,
    make_part,
    manifest_key,
    part_key,
    unpack_part,
)
from crdtstate.retention import Retention
from crdtstate.tiers import Tier, open_tier
from tests.fleet_mesh import HOUR_MS, Mesh

WORDS = "the words that all of them know"


def replica(name: str, tier: str, mesh: Any, **options: Any) -> Replica:
    return Replica(name, checkpoints=[tier], config=quick(), mesh=mesh, **options)


def url_of(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/tier.db"


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Tier]:
    tier = await open_tier(url)
    try:
        yield tier
    finally:
        await tier.close()


def expired(mesh: Mesh, agent: str) -> Credentials:
    """What an agent has to show that was a member until an hour ago."""
    now_ms = time.time_ns() // 1_000_000
    grants = [Grant("*", frozenset("rws"))]
    token = mesh.root.invite(agent, grants, now_ms - 2 * HOUR_MS, now_ms - HOUR_MS)
    return open_credentials(token.encode())


def put_back(store: Path, old: bytes) -> None:
    """A store as it was before."""
    store.write_bytes(old)
    for each in store.parent.glob(f"{store.name}-*"):
        each.unlink()


async def read(url: str, agent: str, id: str) -> Manifest:
    async with opened(url) as tier:
        data = await tier.get(manifest_key(agent, id))
    assert data is not None
    return Manifest.decode(data, id, agent)


async def put(url: str, manifest: Manifest, *parts: bytes, agent: str | None = None) -> str:
    """What somebody can do who may write to a tier. Returns the checkpoint's id."""
    data = manifest.encode()
    id = make_id(manifest.stamp, data)
    owner = agent or manifest.agent
    async with opened(url) as tier:
        for plain in parts:
            part, stored = make_part(plain)
            await tier.put(part_key(owner, part.name), stored)
        await tier.put(manifest_key(owner, id), data)
    return id


def proven(manifest: Manifest, credentials: Credentials) -> Manifest:
    """A manifest with the proof of who has these credentials."""
    attestation = Attestation(authors_of(credentials, None))
    return replace(manifest, proof=attestation.prove(manifest))


async def lie(
    url: str,
    saved: Checkpoint,
    owner: str,
    credentials: Credentials,
    alter: Callable[[Snapshot], Snapshot],
    later: int = 1 << 16,
) -> str:
    """A newer checkpoint of the owner's, proven as it should be, with another snapshot of main."""
    before = await read(url, owner, saved.id)
    entry = before.find("main")
    assert entry is not None
    async with opened(url) as tier:
        stored = await tier.get(part_key(owner, entry.base.name))
    assert stored is not None
    snapshot = alter(Snapshot.decode(unpack_part(entry.base, stored)))
    plain = snapshot.encode_plain()
    part, _ = make_part(plain)
    made = Entry("main", False, snapshot.version, part)
    manifest = replace(before, stamp=before.stamp + later, documents=(made,), proof=b"")
    return await put(url, proven(manifest, credentials), plain)


def names(documents: DocumentSet) -> dict[str, str]:
    """Who wrote the keys of the plan."""
    view = documents.map("plan")
    return {key: view.live(key)[-1].agent for key in view}


# Own checkpoints


@asynchronous
async def test_an_own_checkpoint_comes_back_by_itself(tmp_path: Path) -> None:
    credentials, url, store = Mesh().credentials("ann", "*:rw"), url_of(tmp_path), tmp_path / "a.db"
    async with replica("ann", url, credentials, store=store) as ann:
        ann.map("plan")["goal"] = "ship"
        saved = await ann.checkpoint("one")
        assert saved.is_proven and len((await read(url, "ann", saved.id)).proof) > 64
        ann.map("plan")["more"] = 1
        second = await ann.checkpoint("two")
    store.unlink()
    async with replica("ann", url, credentials, store=store) as ann:
        assert ann.recovery.source == "checkpoint" and ann.recovery.checkpoint == second.id
        assert dict(ann.map("plan")) == {"goal": "ship", "more": 1}
        assert [each.is_proven for each in ann.checkpoints()] == [True, True]
        assert (await ann.verify(saved.id)).intact


@asynchronous
async def test_what_the_store_lacks_is_taken_from_a_proven_checkpoint(tmp_path: Path) -> None:
    credentials, url, store = Mesh().credentials("ann"), url_of(tmp_path), tmp_path / "a.db"
    async with replica("ann", url, credentials, store=store) as ann:
        ann.map("plan")["a"] = 1
        await ann.durable()
    old = store.read_bytes()
    async with replica("ann", url, credentials, store=store) as ann:
        ann.map("plan")["b"] = 2
        await ann.checkpoint()
    put_back(store, old)
    async with replica("ann", url, credentials, store=store) as ann:
        assert dict(ann.map("plan")) == {"a": 1, "b": 2}


@asynchronous
async def test_what_nobody_believes_hides_nothing(tmp_path: Path) -> None:
    credentials, url, store = Mesh().credentials("ann"), url_of(tmp_path), tmp_path / "a.db"
    async with replica("ann", url, credentials, store=store) as ann:
        await ann.durable()
    old = store.read_bytes()
    async with replica("ann", url, credentials, store=store) as ann:
        ann.map("plan")["b"] = 2
        saved = await ann.checkpoint()
    good = await read(url, "ann", saved.id)
    await put(url, replace(good, stamp=good.stamp + 1, documents=(), proof=b""))
    put_back(store, old)
    async with replica("ann", url, credentials, store=store) as ann:
        assert dict(ann.map("plan")) == {"b": 2}


@asynchronous
async def test_who_is_invited_anew_takes_old_ones_in_only_when_asked_to(tmp_path: Path) -> None:
    mesh, url = Mesh(), url_of(tmp_path)
    async with replica("ann", url, mesh.credentials("ann")) as ann:
        ann.map("plan")["a"] = 1
        saved = await ann.checkpoint()
    # The key before may have been stolen, and who stole it may have revoked nothing.
    async with replica("ann", url, mesh.credentials("ann"), store=tmp_path / "a.db") as ann:
        assert dict(ann.map("plan")) == {}
        ann.map("plan")["b"] = 2
        second = await ann.checkpoint()
        assert (await read(url, "ann", second.id)).parent is None
        (found,) = [each for each in ann.checkpoints() if each.id == saved.id]
        assert found.is_proven
        await ann.restore(saved.id)
        assert dict(ann.map("plan")) == {"a": 1}


@asynchronous
async def test_none_is_made_under_a_certificate_that_has_expired(tmp_path: Path) -> None:
    mesh = Mesh()
    async with replica("ann", url_of(tmp_path), expired(mesh, "ann")) as ann:
        with pytest.raises(CheckpointFailed, match="certificate has expired"):
            await ann.checkpoint()
        assert ann.checkpoints() == []


# Who may


async def forged(mesh: Mesh, url: str, saved: Checkpoint, how: str) -> str:
    """A manifest of bob's, somehow wrong, beside the right one. Returns its id."""
    good = await read(url, "bob", saved.id)
    later = replace(good, stamp=good.stamp + 1, proof=b"")
    match how:
        case "signature":
            wrong = bytearray(good.proof)
            wrong[9] ^= 1
            return await put(url, replace(good, proof=bytes(wrong)))
        case "content":
            return await put(url, replace(good, label="another", proof=good.proof))
        case "time":
            return await put(url, replace(good, stamp=good.stamp + 1))
        case "cut short":
            return await put(url, replace(good, proof=good.proof[:40]))
        case "another mesh":
            return await put(url, proven(later, Mesh().credentials("bob")))
        case "another member":
            return await put(url, proven(later, mesh.credentials("eve")))
        case "relabelled":
            eve = proven(replace(later, agent="eve"), mesh.credentials("eve"))
            return await put(url, replace(eve, agent="bob"))
        case "expired":
            attested = authors_of(expired(mesh, "bob"), None).attest("checkpoint/1", later.body())
            return await put(url, replace(later, proof=attested))
        case "another purpose":
            other = mesh.credentials("bob")
            attested = authors_of(other, None).attest("checkpoint/2", later.body())
            return await put(url, replace(later, proof=attested))
        case "nothing":
            return await put(url, later)
    raise AssertionError(how)


WRONG = {
    "signature": "not signed by bob",
    "content": "not signed by bob",
    "time": "not signed by bob",
    "cut short": "certificate is not valid",
    "another mesh": "of another mesh",
    "another member": "it is eve's, not bob's",
    "relabelled": "not signed by eve",
    "expired": "when bob's certificate was not valid",
    "another purpose": "not signed by bob",
    "nothing": "nothing proves whose it is",
}


@pytest.mark.parametrize("how", WRONG)
@asynchronous
async def test_a_manifest_that_is_not_its_agents_is_damaged(tmp_path: Path, how: str) -> None:
    mesh, url = Mesh(), url_of(tmp_path)
    bobs = mesh.credentials("bob")
    async with replica("bob", url, bobs) as bob:
        bob.map("plan")["a"] = 1
        saved = await bob.checkpoint()
    wrong = await forged(mesh, url, saved, how)
    async with replica("ann", url, mesh.credentials("ann")) as ann:
        damages = hear(ann, CheckpointDamaged)
        theirs = await ann._checkpoints.of("bob")
        assert [*theirs.manifests] == [saved.id]
        with pytest.raises(UnknownCheckpoint):
            await theirs.load(wrong)
        await asyncio.sleep(0)
        (damage,) = damages
        assert damage.key == manifest_key("bob", wrong) and WRONG[how] in damage.reason
    if how == "nothing":
        return
    async with replica("bob", url, bobs, store=tmp_path / "b.db") as bob:
        damages = hear(bob, CheckpointDamaged)
        assert bob.recovery.checkpoint == saved.id, "and not the one that says it is newer"
        assert [each.id for each in bob.checkpoints()] == [saved.id]
        with pytest.raises(UnknownCheckpoint):
            await bob.restore(wrong)


@asynchronous
async def test_of_others_only_what_they_may_hand_out_is_taken(tmp_path: Path) -> None:
    mesh, url = Mesh(), url_of(tmp_path)
    async with replica("bob", url, mesh.credentials("bob", "*:rw", "team*:rws")) as bob:
        bob.map("plan")["a"] = 1
        bob.document("team/x").map("plan")["b"] = 2
        saved = await bob.checkpoint()
        assert saved.version.keys() == {"main", "team/x"}, "to itself it is good for all"
    async with replica("eve", url, mesh.credentials("eve", "*:rw")) as eve:
        eve.map("plan")["lie"] = 1
        await eve.checkpoint()
    async with replica("ann", url, mesh.credentials("ann")) as ann:
        theirs = await ann._checkpoints.of("bob")
        ((checkpoint, loaded),) = [each async for each in theirs.newest()]
        are_whole = {each.name: bool(each.snapshot) for each in loaded}
        assert are_whole == {"main": False, "team/x": True}
        assert checkpoint.version.keys() == {"team/x"} and checkpoint.is_proven
        hers = await ann._checkpoints.of("eve")
        ((_, loaded),) = [each async for each in hers.newest()]
        assert [(each.snapshot, each.changes) for each in loaded] == [(b"", [])]
        (id,) = hers.manifests
        with pytest.raises(CorruptCheckpoint, match="eve may not hand out snapshots of what"):
            await hers.load(id)


@asynchronous
async def test_a_dead_agents_checkpoint_is_adopted_as_far_as_it_may(tmp_path: Path) -> None:
    mesh, url = Mesh(), url_of(tmp_path)
    async with replica("bob", url, mesh.credentials("bob", "*:rw", "team*:rws")) as bob:
        bob.map("plan")["a"] = 1
        bob.document("team").map("plan")["b"] = 2
        saved = await bob.checkpoint()
    async with replica("ann", url, mesh.credentials("ann")) as ann:
        theirs = await ann._checkpoints.of("bob")
        found, brought, left = await ann._adoption._take_newest(theirs)
        assert found is not None and (found.id, brought, left) == (saved.id, 1, ["main"])
        assert dict(ann.document("team").map("plan")) == {"b": 2}
        assert dict(ann.map("plan")) == {}


@asynchronous
async def test_nothing_of_who_was_revoked_is_taken(tmp_path: Path) -> None:
    mesh, url = Mesh(), url_of(tmp_path)
    async with replica("eve", url, mesh.credentials("eve")) as eve:
        eve.map("plan")["a"] = 1
        saved = await eve.checkpoint()
    queen = mesh.credentials("queen", "*:rws", "*:c")
    async with replica("queen", url, queen) as reader:
        theirs = await reader._checkpoints.of("eve")
        assert theirs.believed() == [saved.id]
        key = theirs.attestation._maker(theirs.find(saved.id))
        assert key is not None
        reader.revoke(mesh.root.revoke("eve", key.key, {}, time.time_ns() // 1_000_000, "stolen"))
        assert theirs.believed() == [], "also what was read before that"
        with pytest.raises(CorruptCheckpoint, match=r"a key of eve that was.* revoked"):
            await theirs.load(saved.id)
        again = await reader._checkpoints.of("eve")
        assert await reader._adoption._take_newest(again) == (None, 0, [])


# Words


@asynchronous
async def test_where_all_know_the_words_they_are_the_proof(tmp_path: Path) -> None:
    url, store = url_of(tmp_path), tmp_path / "b.db"
    async with replica("bob", url, WORDS, store=store) as bob:
        bob.map("plan")["a"] = 1
        saved = await bob.checkpoint()
    wrong = replace(await read(url, "bob", saved.id), label="another")
    await put(url, wrong)
    async with replica("ann", url, WORDS) as ann:
        damages = hear(ann, CheckpointDamaged)
        theirs = await ann._checkpoints.of("bob")
        assert theirs.believed() == [saved.id] == [*theirs.manifests]
        await asyncio.sleep(0)
        assert "does not know the secret" in damages[0].reason
    async with replica("ann", url, "other words that strangers know") as ann:
        assert (await ann._checkpoints.of("bob")).manifests == {}
    # What was proven with a secret that was replaced still is.
    words = tmp_path / "words"
    words.write_text(f"newer words that all know\nformer: {WORDS}\n")
    words.chmod(0o600)
    store.unlink()
    async with replica("bob", url, words, store=store) as bob:
        assert bob.recovery.checkpoint == saved.id
        assert dict(bob.map("plan")) == {"a": 1}


@asynchronous
async def test_without_a_mesh_nothing_is_asked_for(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    async with replica("bob", url, None) as bob:
        bob.map("plan")["a"] = 1
        saved = await bob.checkpoint()
        assert (await read(url, "bob", saved.id)).proof == b""
    async with replica("ann", url, None) as ann:
        assert (await ann._checkpoints.of("bob")).believed() == [saved.id]


# From before there was a mesh


@asynchronous
async def test_an_old_one_is_only_restored_by_its_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, store = url_of(tmp_path), tmp_path / "a.db"
    async with replica("ann", url, None, store=store) as ann:
        ann.map("plan")["a"] = 1
        saved = await ann.checkpoint("before")
    store.unlink()
    async with replica("ann", url, Mesh().credentials("ann"), store=store) as ann:
        assert ann.recovery.source != "checkpoint" and dict(ann.map("plan")) == {}
        (found,) = ann.checkpoints()
        assert found == replace(saved, is_proven=False, tiers=found.tiers)
        ann.map("plan")["b"] = 2
        await ann.checkpoint()
        past = await ann.at(saved.id)
        assert names(past) == {"a": "ann (not proven)"}
        with caplog.at_level(logging.WARNING):
            await ann.restore(saved.id)
        assert f"nothing proves whose checkpoint {saved.id} is" in caplog.text
        assert dict(ann.map("plan")) == {"a": 1}
        await refuse_by_command(ann, saved.id)


@asynchronous
async def test_in_an_old_one_nobody_has_a_proven_name(tmp_path: Path) -> None:
    url, store = url_of(tmp_path), tmp_path / "a.db"
    listening = Replica("bob", listen="memory://before")
    async with listening as bob, replica("ann", url, None, store=store) as ann:
        ann.map("plan").update({f"key-{number}": number for number in range(100)})
        await ann.checkpoint()
        ann.connect("memory://before")
        bob.map("plan")["b"] = 1
        await ann.wait_for(bob.version(), timeout=10)
        saved = await ann.checkpoint()
    assert (await read(url, "ann", saved.id)).documents[-1].deltas, "bob is in a delta"
    async with replica("ann", url, Mesh().credentials("ann"), store=store) as ann:
        found = names(await ann.at(saved.id))
        assert (found["b"], found["key-1"]) == ("bob (not proven)", "ann (not proven)")


async def refuse_by_command(ann: Replica, id: str) -> None:
    """A controller does not get it restored."""
    arguments = {"executors": {"ann": [id, ["main"]]}, "checkpoint": id, "patience": 1.0}
    now = ann.wall_ms()
    command = Command("1", RESTORE, arguments, "queen", ("ann",), now, now + 1000)
    with pytest.raises(CorruptCheckpoint, match="nothing proves whose it is"):
        await verbs.restore(ann, replace(command, cut=str(ann.version())))


@asynchronous
async def test_what_nobody_believes_pushes_nothing_out(tmp_path: Path) -> None:
    url, near = url_of(tmp_path), f"sqlite:///{tmp_path}/near.db"
    credentials = Mesh().credentials("ann")
    keep = Retention(count=3, age=None, bytes=None)

    def agent() -> Replica:
        return Replica(
            "ann", checkpoints=[near, url], config=quick(), mesh=credentials, retention=keep
        )

    async with agent() as ann:
        for number in range(3):
            ann.map("plan")["a"] = number
            await ann.checkpoint()
        await ann._checkpoints.settled()
        mine = [each.id for each in ann.checkpoints()]
    good = await read(url, "ann", mine[-1])
    planted = [
        await put(url, replace(good, stamp=good.stamp + (ahead << 16), proof=b""))
        for ahead in range(1, 6)
    ]
    async with agent() as ann:
        await ann._checkpoints.settled()
        ann.map("plan")["a"] = "new"
        made = await ann.checkpoint()
        await ann._checkpoints.settled()
        believed = [each.id for each in ann.checkpoints() if each.is_proven]
        others = [each for each in ann.checkpoints() if not each.is_proven]
        assert believed == [*mine[1:], made.id]
        assert (await read(near, "ann", made.id)).parent == mine[-1]
        assert {each.id for each in others} <= set(planted) and len(others) == 3
        assert all(each.tiers == (url,) for each in others), "and it is not spread"
        assert ann.glance().checkpoints == 3


# What is in them: names are proven wherever a snapshot is joined


def unnamed(snapshot: Snapshot) -> Snapshot:
    """Its writers are called bob, and nothing says who they are."""
    return snapshot._replace(agents={writer: "bob" for writer in snapshot.agents}, cards={})


def renamed(snapshot: Snapshot) -> Snapshot:
    """Its writers are called bob, beside cards that say otherwise."""
    return snapshot._replace(agents={writer: "bob" for writer in snapshot.agents})


def stolen(snapshot: Snapshot) -> Snapshot:
    """Its writers have a card that is not theirs."""
    cards = {w: bytes(CARD_HEAD) + card[CARD_HEAD:] for w, card in snapshot.cards.items()}
    return snapshot._replace(cards=cards)


LIES = {unnamed: {"a": "bob (not proven)"}, renamed: {"a": "eve"}, stolen: None}


@pytest.mark.parametrize("alter", LIES)
@asynchronous
async def test_a_new_store_is_made_with_proven_names(tmp_path: Path, alter: Any) -> None:
    credentials, url, store = Mesh().credentials("eve"), url_of(tmp_path), tmp_path / "e.db"
    async with replica("eve", url, credentials) as eve:
        eve.map("plan")["a"] = 1
        saved = await eve.checkpoint()
    wrong = await lie(url, saved, "eve", credentials, alter)
    async with replica("eve", url, credentials, store=store) as eve:
        right = LIES[alter]
        assert eve.recovery.checkpoint == (wrong if right else saved.id)
        assert names(eve) == right or {"a": "eve"}
        await eve.durable()
    # Also once it is read from the store.
    async with Replica("eve", store=store, mesh=credentials) as eve:
        assert names(eve) == (right or {"a": "eve"})


@pytest.mark.parametrize("alter", LIES)
@asynchronous
async def test_what_goes_beyond_the_store_has_proven_names(tmp_path: Path, alter: Any) -> None:
    mesh, url, store = Mesh(), url_of(tmp_path), tmp_path / "ann.db"
    credentials = mesh.credentials("ann")
    async with Replica("ann", store=store, mesh=credentials) as ann:
        ann.map("plan")["mine"] = 1
        await ann.durable()
    old = store.read_bytes()
    listening = Replica("eve", listen="memory://lies", mesh=mesh.credentials("eve"))
    async with listening as eve, replica("ann", url, credentials, store=store) as ann:
        ann.connect("memory://lies")
        eve.map("plan")["a"] = 1
        await ann.wait_for(eve.version(), timeout=10)
        saved = await ann.checkpoint()
    await lie(url, saved, "ann", credentials, alter)
    # So that only the lie is there.
    async with opened(url) as tier:
        await tier.delete(manifest_key("ann", saved.id))
    put_back(store, old)
    async with replica("ann", url, credentials, store=store) as ann:
        right = LIES[alter]
        assert names(ann) == {**(right or {}), "mine": "ann"}
        if right is None:
            assert any("is another writer's" in loss for loss in ann.recovery.losses)


@pytest.mark.parametrize("alter", LIES)
@asynchronous
async def test_an_adopter_gives_nobody_anothers_name(tmp_path: Path, alter: Any) -> None:
    mesh, url = Mesh(), url_of(tmp_path)
    credentials = mesh.credentials("eve")
    async with replica("eve", url, credentials) as eve:
        eve.map("plan")["a"] = 1
        saved = await eve.checkpoint()
    await lie(url, saved, "eve", credentials, alter)
    async with replica("ann", url, mesh.credentials("ann")) as ann:
        theirs = await ann._checkpoints.of("eve")
        right = LIES[alter]
        if right is None:
            with pytest.raises(Exception, match="is another writer's"):
                await ann._adoption._take_newest(theirs)
        else:
            await ann._adoption._take_newest(theirs)
        assert names(ann) == (right or {})


@pytest.mark.parametrize("alter", LIES)
@asynchronous
async def test_the_past_gives_nobody_anothers_name(tmp_path: Path, alter: Any) -> None:
    credentials, url = Mesh().credentials("eve"), url_of(tmp_path)
    async with replica("eve", url, credentials) as eve:
        eve.map("plan")["a"] = 1
        saved = await eve.checkpoint()
        wrong = await lie(url, saved, "eve", credentials, alter)
        right = LIES[alter]
        if right is None:
            for read_it in (eve.at, eve.restore):
                with pytest.raises(CorruptCheckpoint, match="is another writer's"):
                    await read_it(wrong)
            return
        assert names(await eve.at(wrong)) == right
        eve.map("plan").clear()
        await eve.restore(wrong)
        assert names(eve) == {"a": "eve"}, "it is written anew by who restores it"


# On the command line


def test_commands_look_who_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh, store = Mesh(), tmp_path / "ann.db"
    files = {}
    for name in ("ann", "queen", "stranger"):
        files[name] = tmp_path / f"{name}.join"
        files[name].write_text((Mesh() if name == "stranger" else mesh).invite(name).encode())
        files[name].chmod(0o600)

    def run(line: str, who: str | None) -> tuple[int, str, str]:
        more = [] if who is None else ["--mesh", str(files[who])]
        monkeypatch.setattr(sys, "argv", ["crdtstate", "checkpoints", *line.split(), *more])
        return cli.main(), *capsys.readouterr()

    with blocking.Replica("ann", store=store) as ann:
        ann.map("plan")["goal"] = "old"
        old = ann.checkpoint("before").id
    with blocking.Replica("ann", store=store, mesh=files["ann"]) as ann:
        ann.map("plan")["goal"] = "ship"
        ann.durable()
    code, made, _ = run(f"create {store} --label mine", "ann")
    assert code == 0

    assert run(f"verify {store}", None)[0] == 0, "nothing is asked for without a mesh"
    for who in ("ann", "queen"):
        code, out, err = run(f"verify {store}", who)
        assert f"ann {made.strip()}: intact\n" in out
        assert f"ann {old}: nothing proves whose it is\n" in out
        assert code == 1 and "is damaged, or not of this mesh: 1 checkpoint" in err
    code, out, err = run(f"list {store} --json", "queen")
    assert [each["proven"] for each in json.loads(out)] == [False, True]
    assert "1 checkpoint not proven" in run(f"list {store}", "queen")[2]
    code, out, err = run(f"verify {store}", "stranger")
    assert code == 1 and "its manifest: " in out and "of another mesh" in out
    code, out, _ = run(f"diff {store} {made}", "queen")
    assert (code, out) == (0, "")
    code, out, _ = run(f"restore {store} {old}", "ann")
    assert code == 0 and "'old'" in out
    with blocking.Replica("ann", store=store, mesh=files["ann"]) as ann:
        assert ann.map("plan")["goal"] == "old"


# Snapshots over the wire


@pytest.mark.parametrize("roles", ["*:rw", "*:rws"])
@asynchronous
async def test_a_snapshot_comes_only_from_who_may_hand_one_out(tmp_path: Path, roles: str) -> None:
    mesh, store = Mesh(), tmp_path / "eve.db"
    async with Replica("eve", store=store) as eve:
        # What was written before there was a mesh can only be told as a snapshot.
        eve.map("plan")["lie"] = 1
        await eve.durable()
    config = quick(heartbeat=0.1)
    ann = Replica("ann", listen="ws://127.0.0.1:0", mesh=mesh.credentials("ann"), config=config)
    async with ann:
        told: asyncio.Queue[Any] = asyncio.Queue()
        for kind in (PeerRejected, SnapshotReceived):
            ann.on(kind, told.put_nowait)
        eve = Replica(
            "eve",
            store=store,
            peers=[str(ann.address)],
            mesh=mesh.credentials("eve", roles),
            config=config,
        )
        # Her own process cannot keep her from trying.
        eve._authors.may_hand = lambda document: True  # type: ignore[method-assign]
        async with eve:
            event = await asyncio.wait_for(told.get(), 20)
            if roles == "*:rw":
                assert isinstance(event, PeerRejected) and "may not" in event.reason
                assert dict(ann.map("plan")) == {}
            else:
                assert isinstance(event, SnapshotReceived)
                assert dict(ann.map("plan")) == {"lie": 1}
