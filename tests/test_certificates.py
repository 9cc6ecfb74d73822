"""Certificates and join tokens: who is a member, and what it may do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdtstate.certificates import (
    CERTIFICATE_BYTES_MAX,
    CONTROL,
    FORWARD,
    GRANTS_MAX,
    PURPOSE,
    READ,
    ROLES,
    SNAPSHOT,
    WRITE,
    Certificate,
    Grant,
    JoinToken,
    decode_certificate,
    decode_token,
    is_valid_at,
    issue,
    mesh_of,
    parse_grant,
)
from crdtstate.errors import InvalidCertificate, NotAllowed, ProtocolError, UsageError
from crdtstate.signing import (
    SIGNATURE_BYTES,
    from_text,
    is_weak,
    public_of,
    show,
    sign,
    to_text,
    verify,
)

ROOT, BOSS, ANN = b"r" * 32, b"b" * 32, b"a" * 32
PUBLIC = public_of(ROOT)
DAY = 86_400_000

WEAK = [
    bytes.fromhex(text)
    for half in (
        # The neutral element and 0: of order 1 and 4; then of order 8, 8, 2; then p and p + 1.
        "01" + "00" * 31,
        "00" * 32,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
    for text in (half, half[:62] + f"{int(half[62:], 16) | 0x80:02x}")
]


def certify(
    *roles: str,
    seed: bytes = ROOT,
    agent: str = "ann",
    key: bytes | None = None,
    start: int = 0,
    end: int = 30 * DAY,
    parent: Certificate | None = None,
) -> Certificate:
    return issue(
        seed,
        agent=agent,
        key=public_of(ANN) if key is None else key,
        grants=[parse_grant(each) for each in roles or ("*:rw",)],
        not_before_ms=start,
        not_after_ms=end,
        serial=bytes(16),
        parent=parent,
    )


def boss(*roles: str, **changes: Any) -> Certificate:
    return certify(
        *(roles or ("*:rw", "*:c")), agent="boss", key=public_of(BOSS), end=20 * DAY, **changes
    )


def forged(alter: Callable[[list[Any]], Any], seed: bytes = ROOT) -> bytes:
    """A certificate that was signed with something else in it."""
    fields = msgpack.unpackb(certify().data[:-SIGNATURE_BYTES])
    alter(fields)
    body: bytes = msgpack.packb(fields)
    return body + sign(seed, PURPOSE, body)


def why(data: bytes, root: bytes = PUBLIC) -> str:
    with pytest.raises(InvalidCertificate) as caught:
        decode_certificate(data, root)
    assert isinstance(caught.value, ProtocolError)
    return caught.value.reason


# What is believed


def test_what_the_root_signed_is_read_as_it_was_written() -> None:
    made = certify("plan/**:rw", "notes:r")
    found = decode_certificate(made.data, PUBLIC)

    assert found == made
    assert (found.mesh, found.agent, found.key) == (mesh_of(PUBLIC), "ann", public_of(ANN))
    assert (found.issuer, found.parent) == (PUBLIC, b"")
    assert [str(each) for each in found.grants] == ["plan/*:rw", "notes:r"]
    assert len(made.data) < 300


def test_every_flipped_bit_is_refused() -> None:
    """A21, for whoever edits a role and for whatever else."""
    chained = certify(seed=BOSS, parent=boss(), end=DAY)
    for made in (certify("plan/**:rw", "notes:r"), chained):
        for at in range(8 * len(made.data)):
            flipped = bytearray(made.data)
            flipped[at // 8] ^= 1 << at % 8
            why(bytes(flipped))


def test_it_has_no_more_and_no_less_bytes() -> None:
    data = certify().data

    for cut in range(len(data)):
        why(data[:cut])
    why(data + b"\0")
    why(data[:-SIGNATURE_BYTES] + b"\xc0" + data[-SIGNATURE_BYTES:])


def test_one_of_another_root_is_refused() -> None:
    """A20."""
    other = public_of(b"x" * 32)

    assert why(certify().data, other) == "it is of another mesh"
    assert why(certify(seed=b"x" * 32).data) == "it is of another mesh"

    def claim(fields: list[Any]) -> None:
        fields[8] = other

    assert "not signed by the root" in why(forged(claim, b"x" * 32))
    assert why(forged(lambda fields: None, b"x" * 32)) == "its signature is wrong"


def test_an_edited_role_is_refused() -> None:
    """A21."""
    made = certify("plan:r")
    at = made.data.index(b"\xa2fr")

    assert why(made.data[:at] + b"\xa2fw" + made.data[at + 3 :]) == "its signature is wrong"


def test_a_signature_for_something_else_is_none() -> None:
    body = certify().data[:-SIGNATURE_BYTES]

    assert why(body + sign(ROOT, "share/1", body)) == "its signature is wrong"


@pytest.mark.parametrize("key", WEAK, ids=[key.hex()[:2] + key.hex()[-2:] for key in WEAK])
def test_weak_keys_are_refused_where_they_are_signed_and_where_they_come(key: bytes) -> None:
    """A24, with all encodings of small order, also those that are not canonical."""
    assert is_weak(key)
    with pytest.raises(UsageError, match="its key is weak"):
        certify(key=key)
    body: bytes = msgpack.packb(
        [1, mesh_of(PUBLIC), "ann", key, [["*", "r"]], 0, DAY, bytes(16), PUBLIC, b""]
    )
    assert why(body + sign(ROOT, PURPOSE, body)).startswith("its key is weak")
    assert not verify("share/1", b"anything", key + bytes(32), key)
    assert why(body + sign(ROOT, PURPOSE, body), key) == "it is of another mesh"


def test_there_are_fourteen_weak_keys_and_a_real_one_is_none_of_them() -> None:
    assert len(set(WEAK)) == 14
    assert not is_weak(PUBLIC)
    assert is_weak(PUBLIC[:31]) and is_weak(bytes([2]) + bytes(31))


def test_nobody_signs_for_his_own_key() -> None:
    with pytest.raises(UsageError, match="each member has a key of its own"):
        certify(key=PUBLIC)
    parent = boss()
    for key in (PUBLIC, parent.key):
        with pytest.raises(UsageError, match="each member has a key of its own"):
            certify(seed=BOSS, key=key, parent=parent, end=DAY)


def set_to(at: int, value: Any) -> Callable[[list[Any]], None]:
    def alter(fields: list[Any]) -> None:
        fields[at] = value

    return alter


@pytest.mark.parametrize(
    "alter",
    [
        set_to(0, 2),
        set_to(0, "1"),
        lambda fields: fields.append(1),
        lambda fields: fields.pop(),
        *(set_to(1, each) for each in ("mesh", b"", bytes(31), bytes(33))),
        *(set_to(2, each) for each in ("", "x" * 101, "a\nb", "a\x1b[0m", "a‮b", b"ann", 7, None)),
        *(set_to(3, each) for each in (b"", bytes(31), "key")),
        *(
            set_to(4, each)
            for each in (
                [],
                [["*", "r"]] * (GRANTS_MAX + 1),
                {"*": "r"},
                "*:r",
                [["*"]],
                [["*", "r", "w"]],
                [["*", ""]],
                [["*", "x"]],
                [["*", b"r"]],
                [[b"*", "r"]],
                [["", "r"]],
                [["x" * 201, "r"]],
                [["a*b", "r"]],
                [["**", "r"]],
                [["a\n", "r"]],
                [["@mesh", "w"]],
                [["@*", "w"]],
                [["plan", "c"]],
                [[["*"], "r"]],
            )
        ),
        *(set_to(5, each) for each in (-1, 2**53 + 1, True, "0", 1.5, 30 * DAY)),
        *(set_to(6, each) for each in (0, -1, 2**64 - 1, None)),
        *(set_to(7, each) for each in (b"", bytes(15), bytes(17), "serial")),
        *(set_to(8, each) for each in (b"", "root")),
        *(set_to(9, each) for each in (None, "parent", b"x", certify().data)),
    ],
)
def test_what_is_malformed_is_refused_though_the_root_signed_it(
    alter: Callable[[list[Any]], Any],
) -> None:
    assert why(forged(alter))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x80",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 3000,
        b"\xdf\xff\xff\xff\xff",
        b"\xc7\xff\x01",
        msgpack.packb({1: 2}),
        msgpack.packb([1] * 10),
    ],
)
def test_rubbish_is_refused(body: bytes) -> None:
    assert why(body + sign(ROOT, PURPOSE, body))


@given(st.binary(max_size=400))
def test_any_bytes_are_refused_in_one_way(data: bytes) -> None:
    assert why(data)
    assert why(data + sign(ROOT, PURPOSE, data))


def test_its_size_is_bounded() -> None:
    many = [f"{'x' * 190}{at}:r" for at in range(GRANTS_MAX)]
    with pytest.raises(UsageError, match=f"at most {CERTIFICATE_BYTES_MAX} bytes"):
        certify(*many)
    with pytest.raises(UsageError, match="1 to 32 grants"):
        certify(*(f"plan-{at}:r" for at in range(GRANTS_MAX + 1)))
    assert why(bytes(10**6)) == f"a certificate has at most {CERTIFICATE_BYTES_MAX} bytes"
    assert len(certify(*(f"{'x' * 95}{at}:r" for at in range(GRANTS_MAX))).data) > 3000


def test_who_issues_wrongly_hears_why() -> None:
    with pytest.raises(UsageError, match="1 to 100 printable characters"):
        certify(agent="ann\ud800")
    with pytest.raises(UsageError, match="ends before it begins"):
        certify(start=DAY, end=DAY)
    with pytest.raises(UsageError, match="'ann' cannot be made"):
        certify(end=2**70)


# Time


def test_time_is_a_question_of_its_own() -> None:
    """A19: both ends, with clocks that differ by five minutes."""
    made = certify(start=10 * DAY, end=20 * DAY)
    minutes = 60_000

    assert decode_certificate(made.data, PUBLIC) == made
    assert not is_valid_at(made, 10 * DAY - 5 * minutes - 1)
    assert is_valid_at(made, 10 * DAY - 5 * minutes)
    assert is_valid_at(made, 20 * DAY + 5 * minutes - 1)
    assert not is_valid_at(made, 20 * DAY + 5 * minutes)
    assert not is_valid_at(made, 20 * DAY, 0) and is_valid_at(made, 20 * DAY - 1, 0)


# Controllers


def test_a_controller_invites_in_the_name_of_the_root() -> None:
    parent = boss()
    made = certify("plan/*:rw", seed=BOSS, parent=parent, end=DAY)
    found = decode_certificate(made.data, PUBLIC)

    assert (found.issuer, found.parent, found.mesh) == (parent.key, parent.data, parent.mesh)
    assert found.allows(WRITE, "plan/x") and not found.is_controller


@pytest.mark.parametrize(
    ("has", "grants", "is_less"),
    [
        ("*:rw", "*:rw", True),
        ("*:rw", "plan:r", True),
        ("*:rw", "*:f", True),
        ("*:rw", "*:s", False),
        ("*:r", "*:w", False),
        ("plan/*:w", "plan/*:w", True),
        ("plan/*:w", "plan/a/*:r", True),
        ("plan/*:w", "plan*:r", False),
        ("plan/*:w", "*:r", False),
        ("plan:w", "plan:w", True),
        ("plan:w", "plan*:w", False),
        ("plan:w", "plans:w", False),
        ("*:f", "plan:r", False),
    ],
)
def test_what_a_controller_grants_is_less_than_what_it_has(
    has: str, grants: str, is_less: bool
) -> None:
    parent = boss(has, "*:c")
    if is_less:
        assert certify(grants, seed=BOSS, parent=parent, end=DAY)
        return
    with pytest.raises(UsageError, match="which the controller who signed it has not"):
        certify(grants, seed=BOSS, parent=parent, end=DAY)
    body: bytes = msgpack.packb(
        [1, parent.mesh, "ann", public_of(ANN), [grants.split(":")], 0, DAY, bytes(16)]
        + [parent.key, parent.data]
    )
    assert "has not" in why(body + sign(BOSS, PURPOSE, body))


def test_it_is_valid_no_longer_than_that_of_its_controller() -> None:
    with pytest.raises(UsageError, match="when that of the controller who signed it is not"):
        certify(seed=BOSS, parent=boss(), end=20 * DAY + 1)
    with pytest.raises(UsageError, match="when that of the controller who signed it is not"):
        certify(seed=BOSS, parent=boss(start=DAY), start=DAY - 1, end=2 * DAY)


def test_only_a_controller_invites_and_nobody_in_its_name() -> None:
    member = boss("*:rws")
    with pytest.raises(UsageError, match="who signed it is no controller"):
        certify(seed=BOSS, parent=member, end=DAY)
    with pytest.raises(UsageError, match="who signed it is no controller"):
        certify(seed=b"x" * 32, parent=boss(), end=DAY)
    with pytest.raises(UsageError, match="the root signs in its own name"):
        certify(parent=boss(), end=DAY)


def test_a_chain_has_two_certificates() -> None:
    second = certify("*:r", "*:c", seed=BOSS, parent=boss(), end=DAY)
    with pytest.raises(UsageError, match="not signed by the root of this mesh"):
        certify("*:r", seed=ANN, key=public_of(b"z" * 32), parent=second, end=DAY)


# Roles


def test_roles_include_those_below() -> None:
    allowed = {
        letter: {role for role in ROLES if certify(f"*:{letter}").allows(role, "plan")}
        for letter in ROLES
    }

    assert allowed == {
        FORWARD: {FORWARD},
        READ: {FORWARD, READ},
        WRITE: {FORWARD, READ, WRITE},
        SNAPSHOT: {FORWARD, READ, SNAPSHOT},
        CONTROL: {CONTROL},
    }


def test_patterns_name_documents_as_subscriptions_do() -> None:
    made = certify("plan:w", "notes/**:r", "log*:f")

    assert made.allows(WRITE, "plan") and not made.allows(WRITE, "plans")
    assert made.allows(READ, "notes/") and made.allows(READ, "notes/a/b")
    assert not made.allows(READ, "notes") and not made.allows(WRITE, "notes/a")
    assert made.allows(FORWARD, "logs") and not made.allows(READ, "logs")
    assert not made.allows(FORWARD, "main")


def test_documents_of_the_system_go_with_the_others() -> None:
    writer, reader, relay, controller = (
        certify(role) for role in ("plan:w", "plan:r", "*:f", "*:c")
    )

    assert writer.allows(WRITE, "@control") and writer.allows(READ, "@control")
    assert not reader.allows(WRITE, "@control") and reader.allows(READ, "@control")
    assert relay.allows(FORWARD, "@control") and not relay.allows(READ, "@control")
    assert not writer.allows(SNAPSHOT, "@control")
    assert certify("*:s").allows(SNAPSHOT, "@control")
    for role in ROLES:
        assert controller.allows(role, "@control") and controller.allows(role, "@mesh")
    for member in (writer, reader, relay):
        assert member.allows(READ, "@mesh") and member.allows(FORWARD, "@mesh")
        assert not member.allows(WRITE, "@mesh") and not member.allows(CONTROL, "@mesh")
        assert not member.allows(CONTROL, "@control")


@pytest.mark.parametrize(
    ("text", "pattern", "roles"),
    [
        ("plan/**:rw", "plan/*", {FORWARD, READ, WRITE}),
        ("plan/*:r", "plan/*", {FORWARD, READ}),
        ("**:f", "*", {FORWARD}),
        ("*:c", "*", {CONTROL}),
        ("a:b:s", "a:b", {FORWARD, READ, SNAPSHOT}),
    ],
)
def test_grants_are_written_as_people_write_them(text: str, pattern: str, roles: set[str]) -> None:
    assert parse_grant(text) == Grant(pattern, frozenset(roles))
    assert parse_grant(str(parse_grant(text))) == parse_grant(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("plan", "no PATTERN:ROLES"),
        ("plan:", "no PATTERN:ROLES"),
        (":r", "1 to 200 characters"),
        ("plan:x", "there is no role 'x'"),
        ("p*n:r", "at its end only"),
        ("***:r", "at its end only"),
        ("plan:c", "controls the whole mesh"),
        ("@mesh:w", "are not granted"),
        ("a\x1b:r", "printable"),
    ],
)
def test_grants_that_are_none_are_explained(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_grant(text)


def test_the_error_says_who_may_not_do_what() -> None:
    error = NotAllowed("ann", WRITE, "plan")

    assert isinstance(error, UsageError)
    assert (error.agent, error.role, error.document) == ("ann", "w", "plan")
    assert str(error).startswith("'ann' may not write 'plan'") and "'plan:w'" in str(error)
    assert "may not control the mesh" in str(NotAllowed("ann", CONTROL, "@control"))


# Join tokens


def token(**changes: Any) -> JoinToken:
    made = JoinToken(PUBLIC, (b"s" * 32, b"t" * 32), (b"u" * 32,), ANN, certify())
    return replace(made, **changes)


def test_a_join_token_is_text_and_back() -> None:
    made = token()
    text = made.encode()

    assert text.startswith("crdtjoin1") and text.islower() and text.isalnum()
    assert decode_token(text) == made
    assert decode_token(token(seed=b"").encode()).seed == b""


def test_a_join_token_that_was_copied_wrongly_is_refused() -> None:
    text = token().encode()
    letters = "abcdefghijklmnopqrstuvwxyz234567"

    for at in range(len(text)):
        other = letters[(letters.find(text[at]) + 1) % 32]
        for wrong in (text[:at] + other + text[at + 1 :], text[:at] + text[at + 1 :]):
            with pytest.raises(InvalidCertificate):
                decode_token(wrong)
    for wrong in (
        "",
        "crdtjoin1",
        "crdtjoin1aaaa",
        text.upper(),
        text + "a",
        "crdtpub1" + text[9:],
    ):
        with pytest.raises(InvalidCertificate):
            decode_token(wrong)
    with pytest.raises(InvalidCertificate, match="too long"):
        decode_token("crdtjoin1" + "a" * 10**6)


@pytest.mark.parametrize(
    "fields",
    [
        [2, PUBLIC, [bytes(32)], [], b"", certify().data],
        [1, PUBLIC, [bytes(32)], [], b""],
        [1, PUBLIC, [], [], b"", certify().data],
        [1, PUBLIC, [bytes(32)] * 3, [], b"", certify().data],
        [1, PUBLIC, [bytes(31)], [], b"", certify().data],
        [1, PUBLIC, ["words"], [], b"", certify().data],
        [1, PUBLIC, [bytes(32)], [bytes(32)] * 7, b"", certify().data],
        [1, PUBLIC, [bytes(32)], [], b"short", certify().data],
        [1, PUBLIC, [bytes(32)], [], BOSS, certify().data],
        [1, PUBLIC[:31], [bytes(32)], [], b"", certify().data],
        [1, public_of(BOSS), [bytes(32)], [], b"", certify().data],
        [1, WEAK[0], [bytes(32)], [], b"", certify().data],
        [1, PUBLIC, [bytes(32)], [], b"", b""],
        [1, PUBLIC, [bytes(32)], [], b"", None],
        {"v": 1},
    ],
)
def test_a_join_token_is_checked_whole(fields: Any) -> None:
    with pytest.raises(InvalidCertificate):
        decode_token(to_text(msgpack.packb(fields), "crdtjoin1"))


def test_a_join_token_shows_no_secret() -> None:
    made = token()

    for shown in (repr(made), str(made), f"{made}", repr([made]), repr(made.certificate)):
        assert "ann" in shown
        for secret in (*made.secrets, made.seed):
            for form in (secret.hex(), repr(secret), show(secret)[8:], to_text(secret, "")):
                assert form not in shown
        assert made.encode()[9:] not in shown


def test_text_that_was_copied_wrongly_is_not_told() -> None:
    text = to_text(ANN, "crdtsec1")
    with pytest.raises(ValueError) as caught:
        from_text(text[:-1], "crdtsec1")

    assert text[10:20] not in str(caught.value)
