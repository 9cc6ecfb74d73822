"""The handshake, sans-I/O: attacks A07, A08 and A16 to A24 of the reference, and its laws."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdtstate import handshake
from crdtstate.certificates import Certificate, Grant, issue, parse_grant
from crdtstate.errors import NotAdmitted, UsageError
from crdtstate.handshake import (
    FAILED,
    MESSAGE_BYTES_MAX,
    Dialler,
    Identity,
    Listener,
    secret_id,
)
from crdtstate.signing import public_of, sign

NOW = 1_800_000_000_000
DAY = 24 * 3600 * 1000
ROOT, OTHER_ROOT = bytes([1]) * 32, bytes([2]) * 32
SECRET, OTHER_SECRET = bytes([3]) * 32, bytes([4]) * 32
CHANNEL = bytes([5]) * 32


@dataclass
class Known:
    """Credentials that are not of a file."""

    kind: str
    secrets: tuple[bytes, ...] = (SECRET,)
    root: bytes | None = None
    certificate: Certificate | None = None
    seed: bytes = b""

    def sign(self, purpose: str, message: bytes) -> bytes:
        return sign(self.seed, purpose, message)


def seed_of(agent: str) -> bytes:
    return agent.encode().ljust(32, b"\1")


def certify(agent: str, root: bytes = ROOT, **changes: Any) -> Certificate:
    fields: dict[str, Any] = {
        "agent": agent,
        "key": public_of(seed_of(agent)),
        "grants": [parse_grant("plan/**:rw")],
        "not_before_ms": NOW - DAY,
        "not_after_ms": NOW + DAY,
        "serial": bytes(16),
    }
    return issue(root, **(fields | changes))


def member(agent: str, root: bytes = ROOT, **changes: Any) -> Known:
    secrets = changes.pop("secrets", (SECRET,))
    certificate = certify(agent, root, **changes)
    return Known("member", secrets, public_of(root), certificate, seed_of(agent))


def dialler(known: Known, channel: bytes = CHANNEL, at: int = NOW, nonce: int = 7) -> Dialler:
    return Dialler(known, bytes([nonce]) * 32, at, channel)


def listener(known: Known, channel: bytes = CHANNEL, at: int = NOW, nonce: int = 8) -> Listener:
    return Listener(known, bytes([nonce]) * 32, at, channel, bytes([9]) * 32)


Alter = Callable[[int, bytes], bytes]


def shake(
    dials: Dialler, listens: Listener, alter: Alter = lambda number, message: message
) -> tuple[Identity, Identity]:
    """Run a handshake; *alter* gets each message on its way. Return whom the dialler found, and
    whom the listener did."""
    second = listens.answer(alter(1, dials.greet()))
    third = dials.prove(alter(2, second))
    fourth, found = listens.admit(alter(3, third))
    return dials.finish(alter(4, fourth)), found


def fails(dials: Dialler, listens: Listener, alter: Alter = lambda _, message: message) -> None:
    with pytest.raises(NotAdmitted) as caught:
        shake(dials, listens, alter)
    assert str(caught.value) == FAILED


KINDS: dict[str, tuple[Known, Known]] = {
    "host": (Known("host"), Known("host")),
    "secret": (Known("secret"), Known("secret")),
    "member": (member("ann"), member("bob")),
}


@pytest.fixture(params=KINDS)
def both(request: pytest.FixtureRequest) -> tuple[Known, Known]:
    return KINDS[request.param]


# Those who belong


def test_both_sides_learn_who_the_other_is(both):
    at_the_dialler, at_the_listener = shake(dialler(both[0]), listener(both[1]))

    mine, theirs = (each.certificate for each in both)
    assert at_the_dialler == Identity(theirs and theirs.agent, theirs)
    assert at_the_listener == Identity(mine and mine.agent, mine)


def test_a_certificate_that_a_controller_issued_is_as_good(both):
    queen = certify("queen", grants=[parse_grant("*:crw")])
    bob = member("bob")
    key = public_of(seed_of("eve"))
    late = certify("eve", seed_of("queen"), key=key, parent=queen)
    eve = Known("member", (SECRET,), public_of(ROOT), late, seed_of("eve"))

    found, _ = shake(dialler(bob), listener(eve))

    assert found == Identity("eve", late)


@pytest.mark.parametrize(
    ("dials", "listens"),
    [
        ((SECRET, OTHER_SECRET), (SECRET,)),
        ((OTHER_SECRET, SECRET), (SECRET,)),
        ((SECRET,), (OTHER_SECRET, SECRET)),
        ((OTHER_SECRET, SECRET), (SECRET, OTHER_SECRET)),
    ],
)
def test_while_a_secret_is_replaced_either_will_do(dials, listens):
    shake(dialler(Known("secret", dials)), listener(Known("secret", listens)))


def test_all_messages_fit_with_the_largest_certificate():
    grants = [Grant("x" * 66 + f"{number:02}", frozenset("f")) for number in range(32)]
    queen = certify("queen", grants=[parse_grant("*:crw")])
    key = public_of(seed_of("e" * 32))
    certificate = certify("e" * 32, seed_of("queen"), key=key, parent=queen, grants=grants)
    large = Known("member", (SECRET,), public_of(ROOT), certificate, seed_of("e" * 32))
    sizes: list[int] = []

    def note(_: int, message: bytes) -> bytes:
        sizes.append(len(message))
        return message

    shake(dialler(large), listener(large), note)

    assert 2500 < max(sizes) <= MESSAGE_BYTES_MAX


# Those who do not


def strangers() -> Iterator[tuple[str, Known, Known]]:
    good = member("bob")
    yield "A07 another mesh", Known("secret", (OTHER_SECRET,)), Known("secret")
    yield "A07 a host's secret", Known("host", (OTHER_SECRET,)), Known("host")
    yield "no secret in common", member("ann", secrets=(OTHER_SECRET,)), good
    yield "A20 another root", member("ann", OTHER_ROOT), good
    yield "A20 both of another root than the other", good, member("ann", OTHER_ROOT)
    yield "words where members are", Known("secret"), good
    yield "a host where members are", Known("host"), good
    yield "words where a host is", Known("secret"), Known("host")
    yield "a host where words are", Known("host"), Known("secret")
    yield "members where words are", good, Known("secret")
    yield "A19 expired", member("ann", not_before_ms=0, not_after_ms=NOW - DAY), good
    yield "A19 not valid yet", member("ann", not_before_ms=NOW + DAY, not_after_ms=2 * NOW), good
    yield "A19 the listener's expired", good, member("ann", not_after_ms=NOW - DAY // 2)
    stolen = member("ann")
    stolen.seed = seed_of("mallory")
    yield "a certificate without its key", stolen, good
    yield "the listener's without its key", good, stolen
    bare = member("ann")
    bare.certificate = None
    yield "no certificate", bare, good
    yield "the listener without one", good, bare


@pytest.mark.parametrize(
    ("dials", "listens"), [pytest.param(d, x, id=name) for name, d, x in strangers()]
)
def test_who_does_not_belong_is_refused_in_the_same_words(dials, listens):
    fails(dialler(dials), listener(listens))


def test_a_wrong_secret_under_the_right_id_fails_at_the_dialler_s_proof():
    """A08: an attacker who has seen the id of the secret, which goes over the wire."""
    seen = dialler(Known("secret")).greet()
    listens = listener(Known("secret"))
    second = listens.answer(seen)
    with pytest.raises(NotAdmitted, match=FAILED):
        listens.admit(msgpack.packb([bytes(32), b"", b""]))

    # Nor does what came help to make one: under another secret it is something else.
    with pytest.raises(NotAdmitted, match=FAILED):
        dialler(Known("secret", (OTHER_SECRET,))).prove(second)


def test_a_clock_may_be_a_little_wrong():
    late = member("ann", not_after_ms=NOW - 60_000)

    shake(dialler(late), listener(member("bob")))


def test_a_role_that_was_edited_is_no_certificate():
    """A21."""
    ann = member("ann", grants=[parse_grant("plan:r")])
    assert ann.certificate is not None
    fields = {each: getattr(ann.certificate, each) for each in Certificate.__slots__}
    fields["data"] = ann.certificate.data.replace(b"\xa4plan\xa2fr", b"\xa4plan\xa2fw")
    assert fields["data"] != ann.certificate.data
    ann.certificate = Certificate(**fields)

    fails(dialler(ann), listener(member("bob")))


def test_a_weak_key_gets_no_certificate():
    """A24, and what would become of it here."""
    with pytest.raises(UsageError, match="weak"):
        certify("mallory", key=bytes([1]).ljust(32, b"\0"))


# What is on its way


def test_any_flipped_bit_in_any_message_is_a_failure(both):
    """A18, of all four."""
    sizes: dict[int, int] = {}

    def note(number: int, message: bytes) -> bytes:
        sizes[number] = len(message)
        return message

    shake(dialler(both[0]), listener(both[1]), note)
    assert len(sizes) == 4
    for number, size in sizes.items():
        for bit in range(size * 8):

            def flip(each: int, message: bytes, number: int = number, bit: int = bit) -> bytes:
                if each != number:
                    return message
                found = bytearray(message)
                found[bit // 8] ^= 1 << bit % 8
                return bytes(found)

            fails(dialler(both[0]), listener(both[1]), flip)


def test_what_is_cut_or_longer_is_a_failure(both):
    for number in range(1, 5):
        for change in (
            lambda message: message[:-1],
            lambda message: message + b"\0",
            lambda message: message + message,
            lambda message: b"",
        ):

            def alter(each: int, message: bytes, number: int = number, change=change) -> bytes:
                return change(message) if each == number else message

            fails(dialler(both[0]), listener(both[1]), alter)


def test_a_recording_is_worthless(both):
    """A16: the first and third message of a handshake that was good, to the same listener."""
    recorded: dict[int, bytes] = {}

    def record(number: int, message: bytes) -> bytes:
        recorded[number] = message
        return message

    shake(dialler(both[0]), listener(both[1]), record)
    again = listener(both[1], nonce=80)
    again.answer(recorded[1])
    with pytest.raises(NotAdmitted, match=FAILED):
        again.admit(recorded[3])

    # The listener's side of it, to a dialler that dials again.
    dials = dialler(both[0], nonce=70)
    dials.greet()
    with pytest.raises(NotAdmitted, match=FAILED):
        dials.prove(recorded[2])


def test_a_dialler_that_uses_its_nonces_again_harms_itself_alone(both):
    """A23 has it that an ephemeral key is zero. Here are none; a nonce is, and the listener's own
    makes each handshake another."""
    first, second = (dialler(both[0], nonce=0) for _ in range(2))
    one, two = listener(both[1], nonce=1), listener(both[1], nonce=2)
    third = first.prove(one.answer(first.greet()))
    second.prove(two.answer(second.greet()))

    with pytest.raises(NotAdmitted, match=FAILED):
        two.admit(third)


def test_what_the_listener_proved_is_no_proof_of_the_dialler(both):
    """A17: its second message reflected, as it is and as a third one."""
    dials, listens = dialler(both[0]), listener(both[1])
    second = listens.answer(dials.greet())
    _, nonce, chosen, mac = msgpack.unpackb(second)
    for reflected in (second, msgpack.packb([mac, b"", b""]), msgpack.packb([mac, nonce, chosen])):
        with pytest.raises(NotAdmitted, match=FAILED):
            listens.admit(reflected)
        listens = listener(both[1])
        listens.answer(dialler(both[0]).greet())


def test_who_dials_two_cannot_pass_the_proof_of_one_to_the_other():
    """Somebody in between who has the secret, but is neither of them: bob signs for whom he
    talks to, so ann notices that it is not she."""
    ann, bob, mallory = member("ann"), member("bob"), member("mallory")
    to_bob, at_bob = dialler(mallory, nonce=70), listener(bob)
    to_mallory, at_mallory = dialler(ann), listener(mallory, nonce=80)
    fourth, found = at_bob.admit(to_bob.prove(at_bob.answer(to_bob.greet())))
    assert found.agent == "mallory"
    at_mallory.admit(to_mallory.prove(at_mallory.answer(to_mallory.greet())))

    with pytest.raises(NotAdmitted, match=FAILED):
        to_mallory.finish(fourth)


def test_another_certificate_of_the_same_key_cannot_be_put_in():
    """An older one, with more rights: the one that is shown is signed for as well."""
    old = certify("ann", grants=[parse_grant("*:crw")])
    dials, listens = dialler(member("ann")), listener(member("bob"))
    mac, _, signature = msgpack.unpackb(dials.prove(listens.answer(dials.greet())))

    with pytest.raises(NotAdmitted, match=FAILED):
        listens.admit(msgpack.packb([mac, old.data, signature]))


def test_a_message_has_one_spelling():
    """Also the last one of a mesh without certificates, which says nothing and has no MAC."""
    for kind in ("host", "secret"):
        fails(
            dialler(Known(kind)),
            listener(Known(kind)),
            lambda n, m: m.replace(b"\xc4\0", b"\xc5\0\0", 1) if n == 4 else m,
        )


def test_who_has_no_certificates_takes_none():
    """Proved by somebody who knows the words."""
    dials, listens = dialler(Known("secret")), listener(Known("secret"))
    mac, _, _ = msgpack.unpackb(dials.prove(listens.answer(dials.greet())))

    with pytest.raises(NotAdmitted, match=FAILED):
        listens.admit(msgpack.packb([mac, certify("ann").data, bytes(64)]))


@pytest.mark.parametrize("first", [{0: 0}, {0: 2}, {1: "secret"}, {1: "host"}, {1: ""}])
def test_there_is_nothing_to_downgrade_to(first):
    def alter(number: int, message: bytes) -> bytes:
        if number != 1:
            return message
        fields = msgpack.unpackb(message)
        for index, value in first.items():
            fields[index] = value
        return bytes(msgpack.packb(fields))

    fails(dialler(member("ann")), listener(member("bob")), alter)


def test_another_version_is_not_spoken(monkeypatch):
    """By somebody who speaks it from the first message on, so nothing was altered on its way."""
    dials, listens = dialler(Known("secret")), listener(Known("secret"))
    with monkeypatch.context() as patched:
        patched.setattr(handshake, "VERSION", 2)
        first = dials.greet()
    second = listens.answer(first)

    with pytest.raises(NotAdmitted, match=FAILED):
        dials.prove(second)


def test_over_tls_both_must_have_seen_the_same_certificate(both):
    for seen, shown in ((CHANNEL, bytes(32)), (CHANNEL, b""), (b"", CHANNEL)):
        fails(dialler(both[0], seen), listener(both[1], shown))


# What strangers learn


def test_a_stranger_cannot_tell_which_secret_is_known_here():
    """A07 against A08: the answer to an id that is known, and to one that is not."""
    known = dialler(Known("secret")).greet()
    unknown = dialler(Known("secret", (OTHER_SECRET,))).greet()
    other_kind = dialler(Known("member")).greet()

    for first in (known, unknown, other_kind):
        listens = listener(Known("secret"))
        version, nonce, chosen, mac = msgpack.unpackb(listens.answer(first))
        assert (version, len(nonce), chosen, len(mac)) == (1, 32, msgpack.unpackb(first)[3][0], 32)
        with pytest.raises(NotAdmitted, match=FAILED):
            listens.admit(msgpack.packb([bytes(32), b"", b""]))


def test_what_strangers_are_answered_with_is_made_under_no_key_that_they_could_know():
    for guess in (b"", bytes(32), OTHER_SECRET, bytes([7]) * 32, bytes([8]) * 32):
        dials = dialler(Known("secret", (OTHER_SECRET,)))
        listens = listener(Known("secret"))
        second = listens.answer(dials.greet())
        dials._secret = guess
        dials._said.append(second)
        with pytest.raises(NotAdmitted, match=FAILED):
            listens.admit(msgpack.packb([dials._mac("dialler"), b"", b""]))


def test_nobody_who_does_not_know_the_secret_is_shown_a_name():
    dials = dialler(member("ann"))
    first = dials.greet()
    second = listener(member("bob")).answer(first)

    for message in (first, second):
        assert b"ann" not in message and b"bob" not in message
        assert SECRET not in message and public_of(ROOT) not in message
    assert secret_id(SECRET) in first and secret_id(SECRET) != secret_id(OTHER_SECRET)


# Order, and junk


def test_messages_are_taken_once_and_in_order():
    ann, bob = member("ann"), member("bob")
    dials, listens = dialler(ann), listener(bob)
    first = dials.greet()
    with pytest.raises(NotAdmitted):
        listener(bob).admit(first)
    with pytest.raises(NotAdmitted):
        dialler(ann).prove(first)
    second = listens.answer(first)
    third = dials.prove(second)
    fourth, _ = listens.admit(third)
    with pytest.raises(NotAdmitted):
        listens.admit(third)
    dials.finish(fourth)
    with pytest.raises(NotAdmitted):
        dials.finish(fourth)


def test_one_that_failed_takes_nothing_more():
    listens = listener(member("bob"))
    dials = dialler(member("ann"))
    second = listens.answer(dials.greet())
    with pytest.raises(NotAdmitted):
        listens.admit(b"\x93")
    with pytest.raises(NotAdmitted):
        listens.admit(dials.prove(second))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=5),
)


@given(st.binary(max_size=200) | JUNK.map(msgpack.packb))
def test_junk_is_a_failure_like_any(junk):
    fails(dialler(member("ann")), listener(member("bob")), lambda n, m: junk if n == 1 else m)
    listens = listener(member("bob"))
    listens.answer(dialler(member("ann")).greet())
    with pytest.raises(NotAdmitted, match=FAILED):
        listens.admit(junk)
    dials = dialler(member("ann"))
    dials.greet()
    with pytest.raises(NotAdmitted, match=FAILED):
        dials.prove(junk)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x91" * 4096,  # A26
        b"\xdd\xff\xff\xff\xff",  # A27
        b"\x9f" + b"\x80" * 4000,  # A28
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
    ],
)
def test_a_bomb_is_a_failure_and_takes_nothing(bomb):
    with pytest.raises(NotAdmitted, match=FAILED):
        listener(member("bob")).answer(bomb)


def test_splices_of_two_handshakes_fail():
    """Messages of one put into the other, in every combination."""
    rng = random.Random(1)
    ann, bob = member("ann"), member("bob")
    recordings = []
    for number in range(2):
        recorded: dict[int, bytes] = {}

        def record(each: int, message: bytes, into: dict[int, bytes] = recorded) -> bytes:
            into[each] = message
            return message

        shake(dialler(ann, nonce=10 + number), listener(bob, nonce=20 + number), record)
        recordings.append(recorded)
    for _ in range(50):
        taken = rng.randrange(1, 5)
        other = recordings[rng.randrange(2)]
        fails(
            dialler(ann, nonce=12),
            listener(bob, nonce=22),
            lambda n, m, taken=taken, other=other: other[n] if n == taken else m,
        )
