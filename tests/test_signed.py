"""Signed meshes: whose changes count, who may write what, and what happens to who lies."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crdtstate import Config, Controller, Replica
from crdtstate.certificates import Grant
from crdtstate.change import SIGNED, Change, Origin, decode_change, encode_change
from crdtstate.clock import Dot
from crdtstate.errors import InvalidUpdate, NotAllowed, Unproven, UsageError, WaitTimeout
from crdtstate.events import Equivocation, Event, KeyRevoked, PeerDisconnected, PeerRejected
from crdtstate.keys import write_private
from crdtstate.outcomes import Fulfilled
from tests.fleet_mesh import HOUR_MS, Mesh
from tests.harness import asynchronous

CONFIG = Config(heartbeat=0.2, link_timeout=2.0, discover=False)
LOCAL = "ws://127.0.0.1:0"


@asynccontextmanager
async def fleet(mesh: Mesh, *grants: str, **each: Any) -> AsyncIterator[list[Replica]]:
    """A relay and agents around it: ``name`` or ``name=pattern:roles``."""
    async with AsyncExitStack() as stack:
        relay = Replica(
            "relay", listen=LOCAL, role="relay", config=CONFIG, mesh=mesh.credentials("relay")
        )
        found = [await stack.enter_async_context(relay)]
        for text in grants:
            name, _, roles = text.partition("=")
            agent = Replica(
                name,
                peers=[str(relay.address)],
                config=CONFIG,
                mesh=mesh.credentials(name, *(roles.split(",") if roles else ())),
                **each,
            )
            found.append(await stack.enter_async_context(agent))
        yield found


async def even(*replicas: Replica) -> None:
    """Wait until all have what each has."""
    for replica in replicas:
        token = replica.version()
        for other in replicas:
            await other.wait_for(token, timeout=20)


class Heard:
    """The events of a kind from now on."""

    def __init__(self, replica: Replica, kind: type[Event]) -> None:
        self.events: list[Any] = []
        self._is_any = asyncio.Event()
        replica.on(kind, self._hear)

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        self._is_any.set()

    async def any(self) -> list[Any]:
        """Wait until there is one."""
        async with asyncio.timeout(20):
            await self._is_any.wait()
        return self.events


@asynchronous
async def test_changes_are_signed_and_come_through_a_relay() -> None:
    async with fleet(Mesh(), "ann", "bob") as (relay, ann, bob):
        ann.map("plan")["goal"] = "ship"
        bob.counter("tokens").increment(3)
        await even(relay, ann, bob)

        assert bob.map("plan")["goal"] == "ship"
        assert ann.counter("tokens").value == 3
        cards = relay.document("main").cards
        assert {relay.document("main").agents[writer] for writer in cards} == {"ann", "bob"}


@asynchronous
async def test_a_member_goes_on_as_the_same_writer_after_a_restart(tmp_path: Path) -> None:
    mesh = Mesh()
    credentials = mesh.credentials("ann")
    store = tmp_path / "ann.db"
    async with Replica("ann", store=store, mesh=credentials) as ann:
        ann.map("plan")["a"] = 1
        writer = ann.writer
        await ann.durable()
    async with Replica("ann", store=store, mesh=credentials) as ann:
        assert ann.writer == writer
        ann.map("plan")["a"] = 2
        await ann.durable()
    # Invited anew, with another key.
    async with Replica("ann", store=store, mesh=mesh.credentials("ann")) as ann:
        assert ann.writer != writer
        assert ann.map("plan")["a"] == 2


@asynchronous
async def test_what_was_written_without_a_mesh_is_handed_on_as_a_snapshot(tmp_path: Path) -> None:
    store = tmp_path / "ann.db"
    async with Replica("ann", store=store) as ann:
        ann.map("plan")["old"] = 1
        await ann.durable()
    mesh = Mesh()
    async with fleet(mesh, "bob") as (relay, bob):
        peers = [str(relay.address)]
        async with Replica("ann", store=store, mesh=mesh.credentials("ann"), peers=peers) as ann:
            ann.map("plan")["new"] = 2
            await even(relay, ann, bob)
            assert dict(bob.map("plan")) == {"old": 1, "new": 2}
            agents = [live.agent for key in ("old", "new") for live in bob.map("plan").live(key)]
            assert agents == ["ann (not proven)", "ann"]


@asynchronous
async def test_a_signed_store_is_not_opened_without_its_mesh(tmp_path: Path) -> None:
    store = tmp_path / "ann.db"
    async with Replica("ann", store=store, mesh=Mesh().credentials("ann")) as ann:
        ann.map("plan")["a"] = 1
        await ann.durable()
    for mesh in (None, "words that all of us know"):
        with pytest.raises(UsageError, match="join token"):
            async with Replica("ann", store=store, mesh=mesh):
                raise AssertionError("it was opened")


@asynchronous
async def test_a_store_can_be_taken_to_another_mesh(tmp_path: Path) -> None:
    store, mesh = tmp_path / "ann.db", Mesh()
    async with Replica("ann", store=store, mesh=Mesh().credentials("ann")) as ann:
        ann.map("plan")["old"] = 1
        await ann.durable()
    async with fleet(mesh, "bob") as (relay, bob):
        peers = [str(relay.address)]
        async with Replica("ann", store=store, mesh=mesh.credentials("ann"), peers=peers) as ann:
            ann.map("plan")["new"] = 2
            await even(relay, ann, bob)
            assert dict(bob.map("plan")) == {"old": 1, "new": 2}
            (live,) = bob.map("plan").live("old")
            assert live.agent == "ann (not proven)"


def forge(change: Change, **altered: Any) -> Change:
    """A change that is not what was signed, with right hashes."""
    fields: dict[str, Any] = {
        "document": change.document,
        "dot": change.dot,
        "deps": {dep.writer: dep.seq for dep in change.deps},
        "stamp": change.stamp,
        "kind": change.kind,
        "shared": change.shared,
        "update": change.update,
        "origin": change.origin,
        "prev": change.prev,
        "card": change.card,
    }

    class Same:
        scheme, card = SIGNED, change.card

        def prove(self, body: bytes) -> bytes:
            return change.proof

    return encode_change(**fields | altered, prover=Same())


def sealed(replica: Replica, write: Any) -> Change:
    """The change that a write makes."""
    found: list[Change] = []
    told = replica._delivered
    replica._delivered = lambda delivery: (found.append(delivery.change), told(delivery))  # type: ignore[method-assign, assignment, func-returns-value]
    try:
        with replica.transaction():
            write(replica)
    finally:
        del replica._delivered
    (change,) = found
    return change


@pytest.mark.parametrize(
    "altered",
    [
        {"update": b"\0\0"},
        {"document": "other"},
        {"stamp": 1 << 40},
        {"origin": Origin("bob")},
        {"origin": Origin("ann", "another message")},
        {"kind": 1},
        {"deps": {7: 1}},
        {"dot": Dot(7, 1)},
        {"card": b""},
        {"card": bytes(500)},
    ],
    ids=lambda altered: next(iter(altered)),
)
@asynchronous
async def test_what_was_altered_is_refused(altered: dict[str, Any]) -> None:
    mesh = Mesh()
    async with (
        Replica("ann", mesh=mesh.credentials("ann")) as ann,
        Replica("bob", mesh=mesh.credentials("bob")) as bob,
    ):
        change = sealed(ann, lambda r: r.map("plan").update({"a": 1}))
        check = bob._authors.check
        check(decode_change(change.data), b"")
        with pytest.raises(Unproven):
            check(decode_change(forge(change, **altered).data), b"")
        for at in range(17, 17 + 64):
            flipped = bytearray(change.data)
            flipped[at] ^= 1
            with pytest.raises(Unproven):
                check(decode_change(bytes(flipped)), b"")


@asynchronous
async def test_another_mesh_is_another_mesh() -> None:
    one, two = Mesh(), Mesh()
    async with (
        Replica("ann", mesh=one.credentials("ann")) as ann,
        Replica("bob", mesh=two.credentials("bob")) as bob,
    ):
        change = sealed(ann, lambda r: r.map("plan").update({"a": 1}))
        with pytest.raises(Unproven):
            bob._authors.check(change, b"")


@asynchronous
async def test_nothing_is_written_where_the_certificate_does_not_let_one() -> None:
    async with fleet(Mesh(), "ann=plan*:w,notes:r", "bob") as (relay, ann, bob):
        bob.document("notes").map("n")["x"] = 1
        bob.document("secret").map("n")["x"] = 1
        ann.document("plan/a").map("n")["x"] = 1
        await relay.wait_for(bob.version(), timeout=10)
        await relay.wait_for(ann.version(), timeout=10)
        await bob.wait_for(ann.version(), timeout=10)

        version = ann.version()
        with pytest.raises(NotAllowed, match="write 'notes'"):
            ann.document("notes").map("n")["y"] = 1
        with pytest.raises(NotAllowed):
            ann.counter("tokens").increment()
        assert ann.version() == version
        assert "y" not in ann.document("notes").map("n")
        assert "secret" not in list(ann.documents()), "nobody sends it what it may not read"


@asynchronous
async def test_a_reader_that_writes_all_the_same_is_refused_by_everybody() -> None:
    mesh = Mesh()
    async with fleet(mesh, "bob", "eve=*:r") as (relay, bob, eve):
        eve._authors.may_write = lambda document, ms: True  # type: ignore[method-assign]
        refused = Heard(relay, PeerRejected)
        eve.map("plan")["mine"] = 1
        bob.map("plan")["ours"] = 1
        await relay.wait_for(bob.version(), timeout=10)
        assert any("may not write" in event.reason for event in await refused.any())
        assert dict(relay.map("plan")) == {"ours": 1}


@asynccontextmanager
async def liars(mesh: Mesh, one: Replica, two: Replica) -> AsyncIterator[tuple[Replica, Replica]]:
    """Two processes of one member that write as one writer, each behind another replica."""
    credentials = mesh.credentials("eve")
    found = [
        Replica("eve", peers=[str(each.address)], config=CONFIG, mesh=credentials)
        for each in (one, two)
    ]
    authors = found[0]._authors
    for each in found:
        each._writer, each._authors = found[0].writer, authors
        each.prover_of = authors.prover
        # An honest one that hears of its copy takes another writer.
        each._reidentify = lambda reason: None  # type: ignore[method-assign]
    async with found[0], found[1]:
        yield found[0], found[1]


@pytest.mark.parametrize("goes_on", [True, False], ids=["goes on", "falls silent"])
@asynchronous
async def test_an_equivocation_is_proven_to_everybody_and_hidden(goes_on: bool) -> None:
    mesh = Mesh()
    async with AsyncExitStack() as stack:
        peers: list[str] = []
        honest = []
        for name in ("relay", "ann", "bob"):
            replica = Replica(
                name, listen=LOCAL, peers=peers, config=CONFIG, mesh=mesh.credentials(name)
            )
            honest.append(await stack.enter_async_context(replica))
            peers = [str(honest[0].address)]
        relay, ann, bob = honest
        heard = [Heard(each, Equivocation) for each in honest]
        ann.map("plan")["ours"] = 1
        one, two = await stack.enter_async_context(liars(mesh, ann, bob))
        one.map("plan").update({"lie": 1, "k1": 1})
        two.map("plan").update({"lie": 2, "k2": 1})
        one.counter("tokens").increment(5)
        two.counter("tokens").increment(7)
        await ann.wait_for(one.version(), timeout=10)
        if goes_on:
            one.map("plan")["more"] = 1
        for each in heard:
            assert {event.agent for event in await each.any()} == {"eve"}
        await even(relay, ann, bob)
        # Life goes on, also for what was built on one of the two.
        bob.map("plan")["after"] = 2
        await even(relay, ann, bob)
        for each in honest:
            assert dict(each.map("plan")) == {"ours": 1, "after": 2}
            assert each.counter("tokens").value == 0
            assert each.document("main").is_closed(one.writer) or each.document("main").is_closed(
                two.writer
            )


@asynchronous
async def test_a_copied_store_loses_nothing(tmp_path: Path) -> None:
    mesh = Mesh()
    credentials = mesh.credentials("ann")
    store, copy = tmp_path / "ann.db", tmp_path / "copy.db"
    async with Replica("ann", store=store, mesh=credentials) as ann:
        ann.map("plan")["start"] = 0
        await ann.durable()
    shutil.copy(store, copy)
    async with (
        Replica("relay", listen=LOCAL, config=CONFIG, mesh=mesh.credentials("relay")) as relay,
        Replica("ann", store=store, config=CONFIG, mesh=credentials) as ann,
        Replica("ann", store=copy, config=CONFIG, mesh=credentials) as other,
    ):
        for each, name in ((ann, "ann"), (other, "copy")):
            each.map("plan")[name] = 1
            each.map("plan")["who"] = name
        for each in (ann, other):
            each.connect(str(relay.address))
        for _ in range(2):
            for each in (ann, other, relay):
                await each.synced(timeout=20)
            await even(ann, other, relay)
        for each in (ann, other, relay):
            assert each.map("plan").keys() == {"start", "ann", "copy", "who"}


@asynchronous
async def test_who_is_revoked_is_parted_from_and_what_it_writes_is_hidden() -> None:
    mesh = Mesh()
    grants = ("queen=*:rws,*:c", "ann", "eve")
    async with fleet(mesh, *grants) as (relay, queen, ann, eve):
        eve.map("plan")["before"] = 1
        eve.counter("tokens").increment(5)
        await even(relay, queen, ann, eve)
        heard = [Heard(each, KeyRevoked) for each in (relay, queen, ann)]
        gone = Heard(relay, PeerDisconnected)
        # What the queen has not seen yet does not count.
        eve.map("plan")["after"] = 1
        eve.counter("tokens").increment(7)
        (revocation,) = queen.revoke("eve", reason="her laptop was stolen")
        for each in heard:
            assert (await each.any())[0].agent == "eve"
        assert any(event.agent == "eve" for event in await gone.any())
        ann.map("plan")["ann"] = 1
        await even(relay, queen, ann)
        for each in (relay, queen, ann):
            assert dict(each.map("plan")) == {"before": 1, "ann": 1}
            assert each.counter("tokens").value == 5
            assert [found.agent for found in each.revocations()] == ["eve"]
            assert each.revocations()[0].reason == "her laptop was stolen"
        eve.map("plan")["late"] = 1
        # A newcomer sees the same, whatever comes first.
        peers = [str(relay.address)]
        bob = Replica("bob", peers=peers, config=CONFIG, mesh=mesh.credentials("bob"))
        async with bob:
            await even(relay, bob)
            assert dict(bob.map("plan")) == {"before": 1, "ann": 1}
            assert bob.counter("tokens").value == 5
        assert "eve" not in {peer.agent for peer in relay.peers()}


@asynchronous
async def test_only_who_controls_revokes() -> None:
    async with fleet(Mesh(), "ann", "eve") as (relay, ann, eve):
        eve.map("plan")["x"] = 1
        await even(relay, ann, eve)
        with pytest.raises(NotAllowed, match="control the mesh"):
            ann.revoke("eve")
        with pytest.raises(NotAllowed):
            ann.system_document("@mesh").map("revoked")["x"] = 1
    async with Replica("ann") as ann:
        with pytest.raises(UsageError, match="certificates"):
            ann.revoke("eve")


@asynchronous
async def test_only_who_controls_is_obeyed() -> None:
    grants = ("queen=*:rws,*:c", "ann", "eve")
    async with fleet(Mesh(), *grants) as (relay, queen, ann, eve):
        obeyed: list[str] = []
        ann.serve_command("work", lambda command: obeyed.append(command.by))
        with pytest.raises(NotAllowed, match="control the mesh"):
            Controller(eve)
        # Her own process cannot keep her from trying.
        eve.is_controller = lambda agent: True  # type: ignore[method-assign]
        results = await Controller(eve).issue("work", target=["ann"], timeout=20)
        assert "not a controller" in str(results["ann"])
        results = await Controller(queen).issue("work", target=["ann"], timeout=20)
        assert isinstance(results["ann"], Fulfilled) and obeyed == ["queen"]


@asynchronous
async def test_what_is_known_of_a_liar_outlives_restarts_and_checkpoints(tmp_path: Path) -> None:
    mesh = Mesh()
    credentials = mesh.credentials("ann")
    store = tmp_path / "ann.db"
    async with AsyncExitStack() as stack:
        relay = await stack.enter_async_context(
            Replica("relay", listen=LOCAL, config=CONFIG, mesh=mesh.credentials("relay"))
        )
        ann = await stack.enter_async_context(
            Replica(
                "ann",
                store=store,
                listen=LOCAL,
                peers=[str(relay.address)],
                config=CONFIG,
                mesh=credentials,
            )
        )
        heard = Heard(ann, Equivocation)
        one, two = await stack.enter_async_context(liars(mesh, ann, relay))
        ann.map("plan")["ours"] = 1
        one.map("plan")["lie"] = 1
        two.map("plan")["lie"] = 2
        await heard.any()
        ann.map("plan")["after"] = 2
        await even(ann, relay)
        checkpoint = await ann.checkpoint()
        await ann.durable()
    liar = one.writer
    for from_checkpoint in (False, True):
        if from_checkpoint:
            store.write_bytes(b"ruined")
        async with Replica("ann", store=store, config=CONFIG, mesh=credentials) as ann:
            assert ann.recovery is not None
            assert ann.recovery.source == ("checkpoint" if from_checkpoint else "store")
            assert dict(ann.map("plan")) == {"ours": 1, "after": 2}
            assert ann.document("main").is_closed(liar)
            ann.map("plan")["more"] = 3
            past = await ann.at(checkpoint.id)
            assert dict(past.map("plan")) == {"ours": 1, "after": 2}
            ann.map("plan").pop("more")
            await ann.durable()


@asynchronous
async def test_a_certificate_is_renewed_while_its_member_works(tmp_path: Path) -> None:
    mesh = Mesh()
    file = tmp_path / "ann.token"
    token = mesh.invite("ann", hours=1)
    write_private(file, token.encode().encode())
    async with (
        Replica("relay", listen=LOCAL, config=CONFIG, mesh=mesh.credentials("relay")) as relay,
        Replica("ann", peers=[str(relay.address)], config=CONFIG, mesh=file) as ann,
    ):
        ann.map("plan")["a"] = 1
        await even(ann, relay)
        wall, writer = ann._wall, ann.writer
        ann._wall = lambda: wall() + 2 * HOUR_MS
        with pytest.raises(NotAllowed, match="expired"):
            ann.map("plan")["b"] = 2
        renewed = mesh.root.invite(
            "ann",
            [Grant("*", frozenset("rws"))],
            wall(),
            wall() + 9 * HOUR_MS,
            token.certificate.key,
        )
        write_private(file, replace(renewed, seed=token.seed).encode().encode())
        ann._door._reload_at = 0.0
        ann.map("plan")["b"] = 2
        await even(ann, relay)
        assert dict(relay.map("plan")) == {"a": 1, "b": 2}
        assert ann.writer == writer
        assert relay.document("main").cards[writer].endswith(renewed.certificate.data)


@asynchronous
async def test_a_secret_is_replaced_while_members_work() -> None:
    mesh = Mesh()
    old = mesh.credentials("relay"), mesh.credentials("ann")
    mesh.root.rotate()
    new = mesh.credentials("bob")
    async with (
        Replica("relay", listen=LOCAL, config=CONFIG, mesh=old[0]) as relay,
        Replica("ann", peers=[str(relay.address)], config=CONFIG, mesh=old[1]) as ann,
        Replica("bob", peers=[str(relay.address)], config=CONFIG, mesh=new) as bob,
    ):
        ann.map("plan")["a"] = 1
        bob.map("plan")["b"] = 1
        await even(relay, ann, bob)
        assert dict(relay.map("plan")) == {"a": 1, "b": 1}
        mesh.root.retire()
        late = Replica(
            "eve", peers=[str(relay.address)], config=CONFIG, mesh=mesh.credentials("eve")
        )
        async with late:
            # Who knows the new secret alone waits until the relay has it too.
            with pytest.raises(WaitTimeout):
                await late.synced(timeout=1)


@asynchronous
async def test_a_relay_that_only_forwards_does_just_that(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mesh = Mesh()
    async with (
        Replica(
            "relay",
            listen=LOCAL,
            role="relay",
            store=tmp_path / "relay.db",
            config=CONFIG,
            mesh=mesh.credentials("relay", "*:f"),
        ) as relay,
        AsyncExitStack() as stack,
    ):
        ann, bob = [
            await stack.enter_async_context(
                Replica(
                    name,
                    peers=[str(relay.address)],
                    store=tmp_path / f"{name}.db",
                    config=CONFIG,
                    mesh=mesh.credentials(name),
                )
            )
            for name in ("ann", "bob")
        ]
        ann.map("plan")["a"] = 1
        bob.counter("tokens").increment(2)
        await even(relay, ann, bob)
        assert bob.map("plan")["a"] == 1 and ann.counter("tokens").value == 2
        with pytest.raises(NotAllowed):
            relay.map("plan")["mine"] = 1
        await relay.checkpoint()
    assert not [each for each in caplog.records if each.levelname == "ERROR"], caplog.text


@asynchronous
async def test_who_was_a_controller_once_is_obeyed_no_more() -> None:
    mesh = Mesh()
    async with fleet(mesh, "boss=*:rws,*:c", "ann") as (relay, boss, ann):
        obeyed: list[str] = []
        ann.serve_command("work", lambda command: obeyed.append(command.by))
        await Controller(boss).issue("work", target=["ann"], timeout=20)
        assert obeyed == ["boss"]
        await boss.close()
        again = Replica(
            "boss",
            peers=[str(relay.address)],
            config=CONFIG,
            mesh=mesh.credentials("boss", "*:rws"),
        )
        async with again:
            with pytest.raises(NotAllowed):
                Controller(again)
            again.is_controller = lambda agent: True  # type: ignore[method-assign]
            results = await Controller(again).issue("work", target=["ann"], timeout=20)
            assert "not a controller" in str(results["ann"])
        assert obeyed == ["boss"]


def test_signing_needs_something_to_sign_with() -> None:
    with pytest.raises(UsageError, match="join token"):
        Replica("ann", config=Config(signing="signed"))
    with pytest.raises(UsageError, match="secret"):
        Replica("ann", config=Config(signing="keyed"))
    assert issubclass(Unproven, InvalidUpdate) and KeyRevoked
