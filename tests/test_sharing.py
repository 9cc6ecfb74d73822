"""Sharing signed packets of state, and the keys they are signed with."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from harness import asynchronous
from test_controller import fleet, reason, until, value

from crdtstate import (
    CommandError,
    Config,
    CorruptStore,
    Fulfilled,
    KeyChanged,
    Replica,
    SharedState,
    StoreError,
    TimedOut,
    UsageError,
    commands,
    keys,
    sharing,
)
from crdtstate.commands import SHARE, SHARE_BYTES_MAX, Command
from crdtstate.dispatch import Dispatch
from crdtstate.keys import Keyring, from_text, show, to_text, verify
from tests.fleet_mesh import Mesh

# Keys


def test_a_key_is_kept_where_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.db.keys"
    ring = Keyring(path)
    signature = ring.sign("share/1", b"hello")

    assert verify("share/1", b"hello", signature, ring.public)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Keyring(path).public == ring.public
    assert Keyring(path).lasts and not Keyring(None).lasts
    assert ring.public.hex() not in repr(ring)
    assert [each.name for each in tmp_path.iterdir()] == ["a.db.keys"]
    path.chmod(0o640)
    with pytest.raises(StoreError, match=f"others may read this key; do: chmod 600 {path}"):
        Keyring(path).sign("share/1", b"hello")


def test_a_signature_is_for_one_message_one_purpose_and_one_key() -> None:
    ring, other = Keyring(None), Keyring(None)
    signature = ring.sign("share/1", b"hello")

    assert not verify("share/2", b"hello", signature, ring.public)
    assert not verify("share/1", b"hullo", signature, ring.public)
    assert not verify("share/1", b"hello", signature, other.public)
    for at in range(0, len(signature), 7):
        flipped = signature[:at] + bytes([signature[at] ^ 1]) + signature[at + 1 :]
        assert not verify("share/1", b"hello", flipped, ring.public)
    for rubbish in (b"", b"x", bytes(64), signature + b"x"):
        assert not verify("share/1", b"hello", rubbish, ring.public)
    # The identity: with it, one signature would be right for every message.
    weak = bytes([1]) + bytes(31)
    assert not verify("share/1", b"hello", weak + bytes(32), weak)
    assert not verify("share/1", b"hello", signature, b"short")


def test_what_is_signed_is_written_down() -> None:
    hashed = hashlib.blake2b(b"hello", digest_size=32).digest()

    assert keys.digest("share/1", b"hello") == b"crdtstate/share/1\0" + hashed


def test_keys_are_pinned_at_first_sight(tmp_path: Path) -> None:
    path = tmp_path / "a.db.keys"
    ring = Keyring(path)
    one, two = b"1" * 32, b"2" * 32

    assert ring.pin("ann", one, lasts=True) == "new"
    assert ring.pin("ann", one, lasts=True) == "known"
    assert ring.pin("ann", two, lasts=True) == "refused"
    assert Keyring(path).pin("ann", two, lasts=True) == "refused"
    assert Keyring(path).pinned("ann") == one
    assert ring.pin("bob", one, lasts=False) == "new"
    assert ring.pin("bob", two, lasts=False) == "replaced"
    ring.unpin("ann")
    assert Keyring(path).pin("ann", two, lasts=True) == "new"


def test_the_pins_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "PINS_MAX", 3)
    ring = Keyring(None)
    for at in range(5):
        ring.pin(f"agent-{at}", bytes([at]) * 32, lasts=True)

    assert [ring.pinned(f"agent-{at}") is not None for at in range(5)] == [False] * 2 + [True] * 3


def test_keys_as_text_say_if_they_were_copied_wrongly() -> None:
    text = show(b"k" * 32)

    assert text.startswith("crdtpub1") and text.islower()
    assert from_text(text, "crdtpub1") == b"k" * 32
    for wrong in (text[:-1], text + "a", text.replace("n", "m"), "crdtsec1" + text[8:], "", 7):
        with pytest.raises(ValueError):
            from_text(wrong, "crdtpub1")
    assert to_text(b"k" * 32, "crdtsec1").startswith("crdtsec1")


@pytest.mark.parametrize(
    "damage",
    [
        lambda said: b"",
        lambda said: b"[]",
        lambda said: b"\xff" * 100,
        lambda said: json.dumps({**said, "ed25519": said["ed25519"][:-3]}).encode(),
        lambda said: json.dumps({**said, "pinned": {"ann": "x"}}).encode(),
        lambda said: json.dumps({**said, "pinned": []}).encode(),
    ],
)
def test_a_damaged_file_of_keys_is_named(
    tmp_path: Path, damage: Callable[[dict[str, Any]], bytes]
) -> None:
    path = tmp_path / "a.db.keys"
    Keyring(path).sign("share/1", b"")
    path.write_bytes(damage(json.loads(path.read_bytes())))

    with pytest.raises(CorruptStore, match=r"a\.db\.keys: is no file of keys"):
        Keyring(path).sign("share/1", b"")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the key cannot be saved"):
        Keyring(tmp_path / "no" / "a.db.keys").sign("share/1", b"")


# Sharing


@asynchronous
async def test_what_is_shared_arrives_with_its_version(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1", "agent-2", "agent-3") as found:
        queen = found["queen"]
        heard: list[SharedState] = []
        found["agent-1"].on(SharedState, heard.append)
        queen.map("plan")["goal"] = "ship it"
        results = await queen.share("plan", to=["agent-1", "agent-2", "nobody"])

        version = value(results, "agent-1")
        assert version["main"] == queen.document("main").version
        assert reason(results, "nobody").startswith("unknown agent")
        assert results.missing == ("nobody",)
        assert heard == [SharedState("queen", "plan", version, {"goal": "ship it"})]
        (got,) = found["agent-2"].shared()
        assert (got.agent, got.document, got.value) == ("queen", "main", {"goal": "ship it"})
        assert found["agent-2"].map("plan")["goal"] == "ship it"
        assert found["agent-3"].shared() == []
        assert queen.document(commands.CONTROL).map(commands.COMMANDS).keys() == set()
        (record,) = found["agent-1"].audit(kind="command")
        assert record.detail == f"@share {results.id}: fulfilled"


@asynchronous
async def test_whatever_has_plain_values_can_be_shared(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        queen, agent = found["queen"], found["agent-1"]
        queen.counter("tokens").increment(5)
        queen.register("leader").value = "ann"
        queen.set("skills").update(["python", ("a", 1)])
        queen.document("tasks").map("open")["t1"] = 1
        queen.document("tasks").counter("done").increment(2)
        for what in ("tokens", queen.register("leader"), "skills", "tasks"):
            await queen.share(what, to="agent-1")

        got = {each.name: each.value for each in agent.shared()}
        assert (got["tokens"], got["leader"]) == (5, "ann")
        assert sorted(got["skills"], key=str) == [["a", 1], "python"]
        assert got["tasks"] == {"map": {"open": {"t1": 1}}, "counter": {"done": 2}}
        await queen.share(queen.document("main"), to="agent-1")
        (main,) = agent.shared("main")
        assert main.value["register"] == {"leader": "ann"}


@asynchronous
async def test_who_is_told_wrongly_hears_so(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        queen = found["queen"]
        queen.map("plan")["goal"] = "x"
        queen.counter("plan").increment()
        queen.document("notes", shared=True).text("body").insert(0, "hi")
        with pytest.raises(UsageError, match="several things here"):
            await queen.share("plan", to="agent-1")
        with pytest.raises(UsageError, match="nothing here has the name 'nothing'"):
            await queen.share("nothing", to="agent-1")
        with pytest.raises(UsageError, match="native Yjs types"):
            await queen.share("notes", to="agent-1")
        with pytest.raises(UsageError, match="share a view or document"):
            await queen.share(7, to="agent-1")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="is not of this replica"):
            await queen.share(found["agent-1"].map("plan"), to="agent-1")
        queen.map("big")["x"] = "x" * SHARE_BYTES_MAX
        results = await queen.share("big", to=["agent-1", "nobody"])
        assert f"at most {SHARE_BYTES_MAX}" in reason(results, "agent-1")
        assert "unknown agent" in reason(results, "nobody")


@asynchronous
async def test_what_waits_to_be_taken_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "SHARES_BYTES_MAX", 1000)
    async with fleet(tmp_path, "agent-1") as found:
        queen = found["queen"]
        queen.map("plan")["goal"] = "x" * 600
        await found["agent-1"].synced(5)
        found["agent-1"]._sync.leave = lambda now: None  # type: ignore[method-assign]
        await found["agent-1"].close()
        late = await queen.share("plan", to="agent-1", timeout=0)
        assert late["agent-1"] == TimedOut()
        with pytest.raises(CommandError, match="nobody has taken yet has 1[0-9]{3} bytes"):
            await queen.share("plan", to="agent-1", timeout=0)

        back = await found.open("agent-1", queen)
        await until(back, lambda: len(back.shared("plan")) == 1)
        command = queen._docket.board
        await until(queen, lambda: not command.ids())


def damage(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(path.read_bytes()[:-1] + b"x")


@asynchronous
async def test_who_takes_no_part_in_the_document_keeps_the_packet(tmp_path: Path) -> None:
    async with fleet(tmp_path) as found:
        queen = found["queen"]
        reader = await found.open("reader", queen, subscribe=["@control"])
        await found.met()
        for goal in ("first", "second"):
            queen.map("plan")["goal"] = goal
            await queen.share("plan", to="reader")
        path = Path(f"{reader._store_path}.shared")
        await reader.close()
        again = await found.open("reader", queen, subscribe=["@control"])

        assert [each.value for each in again.shared("plan")] == [{"goal": "second"}]
        await again.close()
        damage(path)
        third = await found.open("reader", queen, subscribe=["@control"])
        assert third.shared() == []


@asynchronous
async def test_a_packet_that_cannot_be_stored_is_rejected(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        found["queen"].map("plan")["goal"] = "x"
        found["agent-1"]._packets._path = tmp_path / "no" / "where"
        results = await found["queen"].share("plan", to="agent-1")

        assert "a packet cannot be stored" in reason(results, "agent-1")
        assert found["agent-1"].shared() == []


def forged(queen: Replica, alter: Callable[[dict[str, Any]], None], to: str) -> Command:
    """A packet as *queen* would send it, but for something."""
    queen.map("plan")["goal"] = "x"
    document = queen.document("main")
    queen.seal_now(document)
    made = Dispatch(queen).make(SHARE, {}, to, 60)
    data: bytes = msgpack.packb({"goal": "x"})
    sharing._seal(made, "main", "plan", str(queen.version()), data, queen._keyring)
    key = {"key": queen._keyring.public, "lasts": True}
    queen._docket.board.publish_key(queen.agent, key)
    alter(made.arguments)
    return made


def with_other_data(arguments: dict[str, Any]) -> None:
    arguments["data"] = msgpack.packb({"goal": "y"})


def with_other_data_and_hash(arguments: dict[str, Any]) -> None:
    with_other_data(arguments)
    arguments["sha256"] = hashlib.sha256(arguments["data"]).digest()


def with_other_name(arguments: dict[str, Any]) -> None:
    arguments["name"] = "other"


def with_rubbish(arguments: dict[str, Any]) -> None:
    arguments["data"] = b"\xc1"
    arguments["sha256"] = hashlib.sha256(b"\xc1").digest()


def with_too_much(arguments: dict[str, Any]) -> None:
    arguments["data"] = bytes(SHARE_BYTES_MAX + 1)


@pytest.mark.parametrize(
    ("alter", "why"),
    [
        (with_other_data, "its content is not what was hashed"),
        (with_other_data_and_hash, "its signature is wrong"),
        (with_other_name, "its signature is wrong"),
        (with_rubbish, "not a packed value"),
        (with_too_much, "too large"),
        (lambda arguments: arguments.pop("signature"), "it is no packet"),
        (lambda arguments: arguments.update(signature=b"short"), "its signature is wrong"),
        (lambda arguments: arguments.update(version="?"), "not a version token"),
    ],
)
@asynchronous
async def test_what_was_altered_is_rejected(
    tmp_path: Path, alter: Callable[[dict[str, Any]], None], why: str
) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        found["agent-1"].on(SharedState, lambda event: pytest.fail("it was believed"))
        made = forged(found["queen"], alter, "agent-1")
        dispatch = Dispatch(found["queen"])
        await dispatch.issue(made)
        results = await dispatch.settle(made, 5)

        assert why in reason(results, "agent-1")
        assert found["agent-1"].shared() == []


@asynchronous
async def test_a_packet_is_not_one_under_another_id(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        made = forged(found["queen"], lambda arguments: None, "agent-1")
        dispatch = Dispatch(found["queen"])
        await dispatch.issue(made)
        assert isinstance((await dispatch.settle(made, 5))["agent-1"], Fulfilled)
        again = replace(made, id="0123456789abcdef")
        await dispatch.issue(again)

        assert reason(await dispatch.settle(again, 5), "agent-1") == "its signature is wrong"


@asynchronous
async def test_who_shows_another_key_is_not_believed_until_somebody_says_so(
    tmp_path: Path,
) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        queen, agent = found["queen"], found["agent-1"]
        changed: list[KeyChanged] = []
        agent.on(KeyChanged, changed.append)
        queen.map("plan")["goal"] = "x"
        assert (await queen.share("plan", to="agent-1")).is_complete
        before, queen._keyring = queen._keyring, Keyring(tmp_path / "other.keys")
        results = await queen.share("plan", to="agent-1")

        assert "another key than its sender had before" in reason(results, "agent-1")
        known = show(before.public), show(queen._keyring.public)
        assert changed == [KeyChanged("queen", *known, False)]
        agent.trust("queen")
        assert (await queen.share("plan", to="agent-1")).is_complete


@asynchronous
async def test_who_has_no_store_has_a_key_for_each_session(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1") as found:
        agent = found["agent-1"]
        changed: list[KeyChanged] = []
        agent.on(KeyChanged, changed.append)
        for _ in range(2):
            fleeting = await found.open("fleeting", found["queen"], store=None, listen=None)
            await until(fleeting, lambda r=fleeting: len(r.members()) >= 3)  # type: ignore[misc]
            fleeting.map("plan")["goal"] = "x"
            assert (await fleeting.share("plan", to="agent-1")).is_complete
            await fleeting.close()

        assert [event.is_taken for event in changed] == [True]


@asynchronous
async def test_anybody_may_share_also_where_few_may_command(tmp_path: Path) -> None:
    async with fleet(tmp_path, "agent-1", controllers=["queen"]) as found:
        found["agent-1"].map("plan")["goal"] = "x"
        results = await found["agent-1"].share("plan", to="queen")

        assert isinstance(results["queen"], Fulfilled)


@asynchronous
async def test_the_packets_kept_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "PACKETS_MAX", 2)
    async with fleet(tmp_path, "agent-1") as found:
        queen = found["queen"]
        for name in ("one", "two", "three"):
            queen.map(name)["x"] = 1
            await queen.share(name, to="agent-1")

        assert [each.name for each in found["agent-1"].shared()] == ["two", "three"]


@asynchronous
async def test_older_packets_do_not_replace_newer_ones() -> None:
    kept = sharing.Packets(None)
    async with Replica("queen") as queen:
        first = forged(queen, lambda arguments: None, "queen")
        second = forged(queen, lambda arguments: None, "queen")
        stamped = [replace(each, stamp=queen.next_stamp()) for each in (first, second)]
        await kept.keep(stamped[1])
        await kept.keep(stamped[0])

        assert [each.at for each in kept.all()] == [second.issued]
        assert kept._kept[("queen", "main", "plan")].id == second.id


@asynchronous
async def test_results_stay_as_long_as_somebody_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that it is cleaned as soon as the last result is here.
    monkeypatch.setattr("crdtstate.obeying.RETRY", 0.0)
    async with fleet(tmp_path, "agent-1") as found:
        found["queen"].map("plan")["goal"] = "x"
        for _ in range(10):
            assert (await found["queen"].share("plan", to="agent-1", timeout=2)).is_complete


# In a mesh with certificates


async def knows(replica: Replica, agent: str) -> None:
    await until(replica, lambda: agent in {member.agent for member in replica.members()})


@asynchronous
async def test_a_certificate_says_whose_a_key_is(tmp_path: Path) -> None:
    mesh = Mesh()
    here, quick = "memory://shared", Config(heartbeat=0.2)
    bobs, store = mesh.credentials("bob"), tmp_path / "bob.db"
    async with Replica("bob", mesh=bobs, listen=here, store=store, config=quick) as bob:
        changed: list[KeyChanged] = []
        bob.on(KeyChanged, changed.append)
        keys_of_ann = []
        for number in range(2):
            # The second time she was invited anew.
            anns = mesh.credentials("ann")
            async with Replica("ann", mesh=anns, peers=[here], config=quick) as ann:
                ann.register("plan").value = number
                await knows(ann, "bob")
                results = await ann.share("plan", to=["bob"], timeout=10)
                assert isinstance(results["bob"], Fulfilled), results
                assert ann._keyring.public == anns.public
            keys_of_ann.append(anns.public)
        assert bob._keyring.pinned("ann") == keys_of_ann[1]
        assert [each.value for each in bob.shared("plan")] == [1]
    told = (show(keys_of_ann[0] or b""), show(keys_of_ann[1] or b""))
    assert [(each.known, each.offered, each.is_taken) for each in changed] == [(*told, True)]
    assert json.loads((tmp_path / "bob.db.keys").read_text())["ed25519"] is None


@asynchronous
async def test_nobody_shares_in_the_name_of_another_member() -> None:
    mesh, here = Mesh(), "memory://not hers"
    async with (
        Replica("bob", mesh=mesh.credentials("bob"), listen=here) as bob,
        Replica("ann", mesh=mesh.credentials("ann"), peers=[here]) as ann,
        Replica("eve", mesh=mesh.credentials("eve"), peers=[here]) as eve,
    ):
        ann.register("plan").value = "hers"
        await bob.wait_for(ann.version(), timeout=10)
        # She says that this is ann's key, and signs with it.
        key = {"key": eve._keyring.public, "lasts": True}
        eve._docket.board.publish_key("ann", key)
        await bob.wait_for(eve.version(), timeout=10)
        assert bob._docket.board.keys_of("ann") == []
        command = replace(Dispatch(eve).make(SHARE, {}, ["bob"], 60.0), by="ann")
        sharing._seal(command, "main", "plan", str(eve.version()), b"\xa4lies", eve._keyring)
        with pytest.raises(CommandError, match="its signature is wrong"):
            sharing._check_signature(bob, command)
        assert bob._keyring.pinned("ann") is None
        sharing._seal(command, "main", "plan", str(eve.version()), b"\xa4lies", ann._keyring)
        sharing._check_signature(bob, command)
        assert bob._keyring.pinned("ann") == ann._credentials.public
