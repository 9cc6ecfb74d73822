"""Writers' numbers in a signed mesh: what a member can choose of them, and what comes of chance."""

from __future__ import annotations

import asyncio
import random
import secrets
from dataclasses import replace
from pathlib import Path

import pytest

from crdtstate import Config, Replica
from crdtstate.authors import COUNTS, Signed, _number
from crdtstate.certificates import Certificate, Grant
from crdtstate.change import CARD_HEAD
from crdtstate.credentials import open_credentials
from crdtstate.errors import Unproven, UsageError
from crdtstate.events import Equivocation, Event, IdentityRollback
from crdtstate.keys import write_private
from crdtstate.signing import public_of
from tests.fleet_mesh import HOUR_MS, Mesh
from tests.harness import asynchronous

CONFIG = Config(heartbeat=0.2, link_timeout=2.0, discover=False)
LOCAL = "ws://127.0.0.1:0"
GRANTS = [Grant("*", frozenset("frws"))]


def authors_of(mesh: Mesh, certificate: Certificate) -> Signed:
    return Signed(certificate.mesh, mesh.root.root, lambda: certificate, lambda why, what: b"")


def test_a_card_cannot_be_tried_until_its_number_is_somebody_elses() -> None:
    mesh = Mesh()
    certificate = mesh.invite("mallory").certificate
    authors = authors_of(mesh, certificate)
    writer = authors.draw(random.Random(1))

    assert authors.certificate(writer, authors.card(writer)) == certificate
    for head in (
        COUNTS.to_bytes(CARD_HEAD, "big"),
        b"\xff" * CARD_HEAD,
        b"\0" * (CARD_HEAD - 1),
        b"\0" * (CARD_HEAD + 5),
    ):
        assert _number(certificate, head) == 0
    for number in (1, writer):
        with pytest.raises(Unproven):
            authors.certificate(number, b"\xff" * CARD_HEAD + certificate.data)
    # All numbers of a key, against all of a large mesh.
    assert COUNTS * 100_000 < 2**53 / 50_000


def test_who_makes_its_own_key_cannot_try_keys_either() -> None:
    mesh, other = Mesh(), Mesh()
    seed = secrets.token_bytes(32)
    key = public_of(seed)
    head = b"\0" * CARD_HEAD

    one = mesh.root.invite("ann", GRANTS, 0, HOUR_MS, key).certificate
    # Whoever knows all that is public, but not the root's secret, cannot tell the number.
    elsewhere = replace(other.root, root=mesh.root.root).invite("ann", GRANTS, 0, HOUR_MS, key)
    assert one.serial != elsewhere.certificate.serial
    assert _number(one, head) != _number(replace(one, serial=elsewhere.certificate.serial), head)
    # Renewed, or read again from the root's file, it is the same.
    again = replace(mesh.root, invited={}).invite("ann", GRANTS, 5, 2 * HOUR_MS, key).certificate
    assert _number(again, head) == _number(one, head)
    assert mesh.invite("bob").certificate.serial != one.serial


def test_a_certificate_of_another_issuer_is_not_taken_while_a_member_works(tmp_path: Path) -> None:
    mesh = Mesh()
    token = mesh.invite("ann")
    path = tmp_path / "ann.join"
    write_private(path, token.encode().encode())
    held = open_credentials(path)
    queen = mesh.invite("queen", "*:rws", "*:c")
    queens = replace(mesh.root, seed=queen.seed, certificate=queen.certificate)
    own = token.certificate
    renewed = queens.invite(
        "ann",
        GRANTS,
        *(queen.certificate.not_before_ms, queen.certificate.not_after_ms, own.key),
    )
    write_private(path, replace(renewed, seed=token.seed).encode().encode())

    with pytest.raises(UsageError, match="another mesh, agent, key or issuer"):
        held.reload()
    assert held.certificate == own


def test_no_number_is_drawn_that_was_seen() -> None:
    mesh = Mesh()
    certificate = mesh.invite("ann").certificate
    one, two = authors_of(mesh, certificate), authors_of(mesh, certificate)
    writer = one.draw(random.Random(1))
    two.certificate(writer, one.card(writer))

    assert one.draw(random.Random(1)) != writer
    assert two.draw(random.Random(1)) != writer
    assert authors_of(mesh, certificate).draw(random.Random(1)) == writer


@pytest.mark.parametrize("written", [0, 1, 2, 5])
@asynchronous
async def test_who_draws_a_number_a_second_time_loses_nothing(written: int) -> None:
    mesh = Mesh()
    credentials = mesh.credentials("ann")
    bobs = mesh.credentials("bob")
    found: list[Event] = []
    async with Replica(
        "relay", listen=LOCAL, config=CONFIG, mesh=mesh.credentials("relay")
    ) as relay:
        relay.on(Equivocation, found.append)
        peers = [str(relay.address)]
        async with Replica("ann", peers=peers, config=CONFIG, mesh=credentials) as ann:
            for number in range(2):
                ann.map("plan")[f"old {number}"] = number
                ann.version()
            await relay.wait_for(ann.version(), timeout=20)
            writer, authors = ann.writer, ann._authors
        # It has no store, and chance has it that the number is the same.
        again = Replica("ann", config=CONFIG, mesh=credentials)
        again._writer, again._authors = writer, authors
        again.prover_of = authors.prover
        async with again, Replica("bob", peers=peers, config=CONFIG, mesh=bobs) as bob:
            for number in range(written):
                again.map("plan")[f"new {number}"] = number
                again.version()
            told = asyncio.Event()
            again.on(IdentityRollback, lambda event: told.set())
            again.connect(peers[0])
            async with asyncio.timeout(20):
                await told.wait()
            again.map("plan")["now"] = 1
            for each in (relay, bob):
                await each.wait_for(again.version(), timeout=20)
                old = {f"old {number}": number for number in range(2)}
                new = {f"new {number}": number for number in range(written)}
                assert dict(each.map("plan")) == old | new | {"now": 1}
            assert again.writer != writer
    assert found == []


@asynchronous
async def test_nobody_goes_on_as_a_writer_that_the_store_has_but_may_not_be_kept(
    tmp_path: Path,
) -> None:
    mesh = Mesh()
    credentials = mesh.credentials("ann")
    store = tmp_path / "ann.db"
    async with Replica("ann", store=store, mesh=credentials) as ann:
        ann.map("plan")["a"] = 1
        writer, authors = ann.writer, ann._authors
        await ann.durable()
    copy = tmp_path / "copy.db"
    copy.write_bytes(store.read_bytes())
    # A copy may not go on as the same writer, and by chance that is what was drawn.
    again = Replica("ann", store=copy, mesh=credentials)
    again._writer, again._authors = writer, authors
    again.prover_of = authors.prover
    async with again:
        assert again.writer != writer
        assert dict(again.map("plan")) == {"a": 1}
