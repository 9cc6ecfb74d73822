"""Revocations: whose key is worth nothing any more, and what stays."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_certificates import ANN, BOSS, PUBLIC, ROOT, boss, certify

from crdtstate import revocations
from crdtstate.clock import SEQ_MAX, WRITER_MAX
from crdtstate.errors import InvalidRevocation, ProtocolError, UsageError
from crdtstate.revocations import (
    PURPOSE,
    REVOCATION_BYTES_MAX,
    Cuts,
    Revocation,
    Revocations,
    decode_revocation,
    keeps,
    merge,
    revoke,
)
from crdtstate.signing import SIGNATURE_BYTES, public_of, sign

HERS = public_of(ANN)
CUTS = {"main": {7: 3, 9: 1}, "plan": {7: 2}}

all_cuts = st.dictionaries(
    st.sampled_from(["main", "plan", "notes"]),
    st.dictionaries(st.integers(1, 4), st.integers(1, 5), min_size=1),
)
PLACES = list(product(("main", "plan", "notes", "other"), range(1, 6), range(1, 7)))


def ended(cuts: Cuts = CUTS, seed: bytes = ROOT, **changes: Any) -> Revocation:
    given: dict[str, Any] = {"agent": "ann", "key": HERS, "at_ms": 5, "reason": "left", **changes}
    return revoke(seed, cuts=cuts, **given)


def why(data: bytes | str, root: bytes = PUBLIC) -> str:
    with pytest.raises(InvalidRevocation) as caught:
        decode_revocation(data, root)
    assert isinstance(caught.value, ProtocolError)
    return caught.value.reason


# What is believed


def test_what_the_root_signed_is_read_as_it_was_written() -> None:
    made = ended()

    assert decode_revocation(made.data, PUBLIC) == made
    assert decode_revocation(made.encode(), PUBLIC) == made
    assert made.encode().startswith("crdtrevoke1")
    assert (made.agent, made.key, made.cuts, made.at_ms) == ("ann", HERS, CUTS, 5)
    assert (made.reason, made.by) == ("left", b"")


def test_a_controller_revokes() -> None:
    made = ended(seed=BOSS, by=boss())

    assert decode_revocation(made.data, PUBLIC).by == boss().data


def test_who_is_no_controller_revokes_nobody() -> None:
    member = boss("*:rws")
    with pytest.raises(UsageError, match="no controller"):
        ended(seed=BOSS, by=member)
    with pytest.raises(UsageError, match="no controller"):
        ended(seed=b"x" * 32, by=boss())

    def by(certificate: bytes, seed: bytes) -> bytes:
        body: bytes = msgpack.packb([1, member.mesh, "ann", HERS, [], 5, "", certificate])
        return body + sign(seed, PURPOSE, body)

    assert decode_revocation(by(boss().data, BOSS), PUBLIC)
    assert why(by(member.data, BOSS)) == "who signed it is no controller"
    assert why(by(boss().data, b"x" * 32)) == "its signature is wrong"
    assert why(by(b"", BOSS)) == "its signature is wrong"
    assert why(by(certify(seed=b"x" * 32).data, ANN)).endswith("it is of another mesh")
    second = certify("*:r", "*:c", seed=BOSS, parent=boss(), end=10)
    assert decode_revocation(by(second.data, ANN), PUBLIC)


def test_every_flipped_bit_is_refused() -> None:
    for made in (ended(), ended(seed=BOSS, by=boss())):
        for at in range(8 * len(made.data)):
            flipped = bytearray(made.data)
            flipped[at // 8] ^= 1 << at % 8
            why(bytes(flipped))
        for cut in range(len(made.data)):
            why(made.data[:cut])


def test_one_of_another_mesh_or_purpose_is_refused() -> None:
    body = ended().data[:-SIGNATURE_BYTES]

    assert why(ended().data, public_of(b"x" * 32)) == "it is of another mesh"
    assert why(body + sign(ROOT, "certificate/1", body)) == "its signature is wrong"
    assert why(certify().data)


def test_the_root_stays() -> None:
    with pytest.raises(UsageError, match="the root cannot be revoked"):
        ended(key=PUBLIC)
    body: bytes = msgpack.packb([1, boss().mesh, "r", PUBLIC, [], 5, "", boss().data])
    assert why(body + sign(BOSS, PURPOSE, body)).startswith("the root cannot be revoked")


def set_to(at: int, value: Any) -> Callable[[list[Any]], None]:
    def alter(fields: list[Any]) -> None:
        fields[at] = value

    return alter


@pytest.mark.parametrize(
    "alter",
    [
        set_to(0, 2),
        lambda fields: fields.append(1),
        lambda fields: fields.pop(),
        set_to(1, "mesh"),
        *(set_to(2, each) for each in ("", "a\n", b"ann", "x" * 101)),
        *(set_to(3, each) for each in (b"", bytes(31), "key")),
        *(
            set_to(4, each)
            for each in (
                None,
                {"main": [7, 3]},
                [["main"]],
                ["main", [7, 3]],
                [["", [7, 3]]],
                [["x" * 201, [7, 3]]],
                [[b"main", [7, 3]]],
                [["main", [7, 3]], ["main", [9, 1]]],
                [["main", []]],
                [["main", [7]]],
                [["main", [7, 3, 7, 4]]],
                [["main", [0, 3]]],
                [["main", [WRITER_MAX + 1, 3]]],
                [["main", [7, 0]]],
                [["main", [7, SEQ_MAX + 1]]],
                [["main", [7, True]]],
                [["main", [7, "3"]]],
            )
        ),
        *(set_to(5, each) for each in (-1, 2**53 + 1, True, None)),
        *(set_to(6, each) for each in ("x" * 501, b"", None)),
        *(set_to(7, each) for each in ("by", None, b"x")),
    ],
)
def test_what_is_malformed_is_refused_though_the_root_signed_it(
    alter: Callable[[list[Any]], Any],
) -> None:
    fields = msgpack.unpackb(ended().data[:-SIGNATURE_BYTES])
    alter(fields)
    body: bytes = msgpack.packb(fields)

    assert why(body + sign(ROOT, PURPOSE, body))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_in_one_way(data: bytes) -> None:
    assert why(data)
    assert why(data + sign(ROOT, PURPOSE, data))


def test_its_size_is_bounded() -> None:
    with pytest.raises(UsageError, match=f"at most {REVOCATION_BYTES_MAX} bytes"):
        ended({"main": {WRITER_MAX - at: SEQ_MAX for at in range(20_000)}})
    assert ended({"main": {WRITER_MAX - at: SEQ_MAX for at in range(15_000)}})
    assert "at most" in why(bytes(REVOCATION_BYTES_MAX + 1))
    assert why("crdtrevoke1" + "a" * 10**6) == "it is too long"
    for text in ("", "crdtrevoke1", ended().encode()[:-1], ended().encode()[:-1] + "é"):
        assert why(text)


# What stays


def test_what_was_written_before_the_cut_stays() -> None:
    made = ended()

    assert made.keeps("main", 7, 3) and not made.keeps("main", 7, 4)
    assert made.keeps("plan", 7, 2) and not made.keeps("plan", 9, 1)
    assert not made.keeps("notes", 7, 1) and not made.keeps("main", 8, 1)
    assert not ended({}).keeps("main", 7, 1)


@given(all_cuts, all_cuts, all_cuts)
def test_merging_is_commutative_associative_and_idempotent(
    one: Cuts, two: Cuts, three: Cuts
) -> None:
    assert merge(one, one) == one
    assert merge(one, two) == merge(two, one)
    assert merge(merge(one, two), three) == merge(one, merge(two, three))
    for place in PLACES:
        assert keeps(merge(one, two), *place) == (keeps(one, *place) and keeps(two, *place))


@given(st.lists(all_cuts, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_all_end_the_same_in_whatever_order_they_hear(found: list[Cuts], random: Any) -> None:
    made = [
        ended(cuts, **changes)
        for cuts in found
        for changes in ({}, {"seed": BOSS, "by": boss()}, {"key": public_of(BOSS)})
    ]
    mine, yours = Revocations(), Revocations()
    for each in made:
        mine.add(each)
    random.shuffle(made)
    for each in [*made, *made]:
        yours.add(each)

    assert {key: mine.cuts(key) for key in mine} == {key: yours.cuts(key) for key in yours}
    assert len(mine) == 2
    assert not any(yours.add(each) for each in made)


def test_it_is_told_whether_more_is_revoked_now() -> None:
    found = Revocations()

    assert found.cuts(HERS) is None and len(found) == 0
    assert found.add(ended({"main": {7: 3}}))
    assert not found.add(ended({"main": {7: 3, 9: 9}}))
    assert not found.add(ended({"main": {7: 4}, "plan": {1: 1}}))
    assert found.add(ended({"main": {7: 2}}))
    assert found.cuts(HERS) == {"main": {7: 2}}
    assert found.add(ended({}))
    assert found.cuts(HERS) == {}
    assert list(found) == [HERS]


def test_who_was_invited_by_a_revoked_controller_goes_with_it() -> None:
    mine = certify(seed=BOSS, parent=boss(), end=10)
    found = Revocations()
    found.add(ended({"main": {7: 3}}, key=public_of(BOSS)))

    assert found.is_revoked(mine) and found.is_revoked(boss())
    assert not found.is_revoked(certify())
    assert (found.cut(mine, "main", 7), found.cut(mine, "plan", 7)) == (3, 0)
    assert found.cut(certify(), "main", 7) is None
    # Of two that end it, by its own key and by its controller's, the lower counts.
    found.add(ended({"main": {7: 1}, "plan": {7: 9}}))
    assert found.is_revoked(certify())
    assert (found.cut(mine, "main", 7), found.cut(mine, "plan", 7)) == (1, 0)
    assert (found.cut(certify(), "main", 7), found.cut(certify(), "plan", 7)) == (1, 9)


def test_of_two_who_revoke_each_other_both_are() -> None:
    queen = certify("*:r", "*:c", agent="queen")
    found = Revocations()
    for made in (
        ended(seed=BOSS, by=boss()),
        ended(seed=ANN, by=queen, agent="boss", key=public_of(BOSS)),
    ):
        found.add(decode_revocation(made.data, PUBLIC))

    assert found.is_revoked(queen) and found.is_revoked(boss())


def test_how_many_are_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocations, "KEYS_MAX", 2)
    found = Revocations()
    for at in range(2):
        found.add(ended(key=bytes([at]) * 32))
    with pytest.raises(InvalidRevocation, match="2 keys are revoked already"):
        found.add(ended())
    assert found.add(ended({}, key=bytes(32)))
