"""Credentials: where they come from, who else may read them, and what they never show."""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import multiprocessing
import os
import re
import time
import traceback
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from test_certificates import ANN, BOSS, PUBLIC, ROOT, boss, certify, token

from crdtstate import CorruptStore, Replica, StoreError, UsageError
from crdtstate.authority import Authority, changing, create_root, open_authority, read_root
from crdtstate.certificates import (
    FORMER_MAX,
    Certificate,
    decode_certificate,
    fingerprint,
    mesh_of,
    parse_grant,
)
from crdtstate.credentials import (
    open_credentials,
    open_host_credentials,
    secret_of_words,
    state_directory,
)
from crdtstate.keys import Keyring, create_private, read_private
from crdtstate.signing import public_of, show, to_text, verify

WORDS = "words that all of us know"
DAY = 86_400_000


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the host's secret is."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "crdtstate" / "host.secret"


def write(path: Path, *lines: str) -> Path:
    """A file that is only its owner's to read."""
    path.unlink(missing_ok=True)
    path.touch(0o600)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# The kinds


def test_without_a_mesh_nothing_is_read(state: Path) -> None:
    found = open_credentials(None)

    assert (found.kind, found.mesh, found.secrets) == ("none", b"", ())
    assert found.root is found.certificate is found.public is None
    assert not state.exists()
    assert open_credentials(found) is found
    assert not found.reload()
    with pytest.raises(UsageError, match="only a member signs"):
        found.sign("share/1", b"")


def test_words_are_stretched_the_same_everywhere() -> None:
    found = open_credentials(WORDS)

    assert found.kind == "secret"
    assert found.secrets == open_credentials(f" {WORDS}\n").secrets
    assert found.secrets != open_credentials(WORDS + "!").secrets
    assert len(found.secrets[0]) == len(found.mesh) == 32
    assert found.mesh != found.secrets[0]
    salt = b"crdtstate/mesh secret/1"
    raw = hashlib.scrypt(WORDS.encode(), salt=salt, n=2**14, r=8, p=1, dklen=32)
    assert found.secrets[0] == raw
    # Typed on two systems, which write an umlaut in two ways.
    assert secret_of_words("sechzehn Zöpfe und") == secret_of_words("sechzehn Zöpfe und")


@pytest.mark.parametrize("words", ["", "short", "x" * 15, " " * 20, "x" * 1001])
def test_words_that_are_easily_guessed_are_refused(words: str) -> None:
    with pytest.raises(UsageError, match=r"16 to 1000 characters.*crdtstate keygen --words"):
        open_credentials(words)


def test_what_is_no_secret_is_not_taken_for_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "agent-7-of-ours.join", WORDS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is a file here, and would be taken for words"):
        open_credentials("agent-7-of-ours.join")
    for text in (show(PUBLIC), to_text(PUBLIC, "crdtmesh1")):
        with pytest.raises(UsageError, match="no secret and no join token"):
            open_credentials(text)
    with pytest.raises(UsageError, match="has a key and no join token"):
        open_credentials(to_text(ANN, "crdtsec1"))
    with pytest.raises(UsageError, match="mesh is words, a join token or the path"):
        open_credentials(7)  # type: ignore[arg-type]
    assert open_credentials("file:agent-7-of-ours.join").secrets == (secret_of_words(WORDS),)


def test_a_join_token_makes_a_member() -> None:
    found = open_credentials(token().encode())

    assert (found.kind, found.root, found.mesh) == ("member", PUBLIC, mesh_of(PUBLIC))
    assert found.certificate == certify()
    assert (found.secrets, found.former) == ((b"s" * 32, b"t" * 32), (b"u" * 32,))
    assert found.public == public_of(ANN)
    signature = found.sign("share/1", b"hello")
    assert verify("share/1", b"hello", signature, certify().key)
    wrong = token().encode()[:-3]
    with pytest.raises(UsageError, match="not as it was written") as caught:
        open_credentials(wrong)
    assert wrong[9:30] not in str(caught.value)


def test_a_file_has_its_newest_line_first(tmp_path: Path) -> None:
    path = write(tmp_path / "mesh", "# ours", "", *(f"{WORDS} {at}" for at in range(3)))
    found = open_credentials(path)

    assert found.secrets == tuple(secret_of_words(f"{WORDS} {at}") for at in range(2))
    assert found.former == (secret_of_words(f"{WORDS} 2"),)
    write(path, WORDS, f"former: {WORDS} 0")
    found = open_credentials(f"file:{path}")
    assert (found.secrets, found.former) == (
        (secret_of_words(WORDS),),
        (secret_of_words(f"{WORDS} 0"),),
    )


def test_the_mesh_stays_the_same_while_its_secret_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "mesh"
    files = ([WORDS], ["x" * 16, WORDS], ["x" * 16, f"former:{WORDS}"])

    assert len({open_credentials(write(path, *lines)).mesh for lines in files}) == 1
    assert open_credentials(write(path, "x" * 16)).mesh != open_credentials(WORDS).mesh


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "nothing is in it"),
        (["# only this"], "nothing is in it"),
        (["former: " + WORDS], "nothing is in it"),
        (["short"], "16 to 1000"),
        ([WORDS] * 9, "more than 8 secrets"),
        ([token().encode(), WORDS], "a line that is none"),
        ([token().encode()[:-1]], "not as it was written"),
        ([token(seed=b"").encode()], "the key of its certificate is not in it"),
        ([token(seed=b"").encode(), to_text(BOSS, "crdtsec1")], "is not in it"),
        ([token().encode(), to_text(BOSS, "crdtsec1")[:-1]], "not to be read"),
        ([to_text(ANN, "crdtsec1")], "has a key and no join token"),
        ([show(PUBLIC)], "no secret and no join token"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, lines: list[str], reason: str) -> None:
    path = write(tmp_path / "mesh", *lines)
    with pytest.raises(StoreError, match=reason) as caught:
        open_credentials(path)

    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no such file; a token is made by"):
        open_credentials(tmp_path / "none")
    with pytest.raises(StoreError, match="is kept in a file, and this is none"):
        open_credentials(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(StoreError, match="is kept in a file, and this is none"):
        open_credentials(tmp_path / "pipe")
    large = write(tmp_path / "large", "x" * 300_000)
    with pytest.raises(StoreError, match="too large or no text"):
        open_credentials(large)
    large.write_bytes(b"\xff" * 32)
    with pytest.raises(StoreError, match="too large or no text"):
        open_credentials(large)


def test_a_member_that_made_its_key_itself_has_it_beside(tmp_path: Path) -> None:
    bare = token(seed=b"").encode()
    together = write(tmp_path / "mesh", "# mine", to_text(ANN, "crdtsec1"), bare)

    assert open_credentials(together).public == public_of(ANN)
    store = tmp_path / "a.db"
    ring = Keyring(tmp_path / "a.db.keys")
    made = token(seed=b"", certificate=certify(key=ring.public)).encode()
    assert open_credentials(made, store).public == ring.public
    with pytest.raises(UsageError, match="the key of its certificate is not in it"):
        open_credentials(made)
    with pytest.raises(UsageError, match="the key of its certificate is not in it"):
        open_credentials(bare, store)


def test_of_several_tokens_the_first_counts_and_the_others_secrets_were(tmp_path: Path) -> None:
    new = token(secrets=(b"n" * 32,), former=(), certificate=certify("*:r"))
    found = open_credentials(write(tmp_path / "mesh", new.encode(), token().encode()))

    assert found.certificate == certify("*:r")
    assert found.secrets == (b"n" * 32,)
    assert set(found.former) == {b"s" * 32, b"t" * 32, b"u" * 32}
    other = token(root=public_of(BOSS), certificate=certify(seed=BOSS))
    with pytest.raises(StoreError, match="of different meshes"):
        open_credentials(write(tmp_path / "mesh", new.encode(), other.encode()))


# Who may read them


@pytest.mark.parametrize("wrong", [0o640, 0o604, 0o644, 0o660, 0o777])
def test_files_that_others_may_read_are_refused(tmp_path: Path, wrong: int, state: Path) -> None:
    """A70: with the very command to run."""
    spaced = write(tmp_path / "my mesh", WORDS)
    keys = tmp_path / "a.db.keys"
    Keyring(keys).sign("share/1", b"")
    create_root(tmp_path / "mesh.root")
    open_host_credentials()
    for path in (spaced, keys, tmp_path / "mesh.root", state):
        path.chmod(wrong)
    quoted = re.escape(f"do: chmod 600 '{spaced}'")
    with pytest.raises(StoreError, match=f"others may read this secret; {quoted}"):
        open_credentials(spaced)
    with pytest.raises(StoreError, match=f"do: chmod 600 {keys}$"):
        Keyring(keys).sign("share/1", b"")
    with pytest.raises(StoreError, match=f"do: chmod 600 {tmp_path}/mesh.root$"):
        open_authority(tmp_path / "mesh.root", 0)
    with pytest.raises(StoreError, match=f"do: chmod 600 {state}$"):
        open_host_credentials()
    spaced.chmod(0o400)
    assert open_credentials(spaced).kind == "secret"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files of another user")
def test_files_of_another_user_are_refused(tmp_path: Path, state: Path) -> None:
    path = write(tmp_path / "mesh", WORDS)
    os.chown(path, 12345, -1)
    with pytest.raises(StoreError, match="belongs to another user \\(uid 12345\\)"):
        open_credentials(path)
    open_host_credentials()
    os.chown(state.parent, 12345, -1)
    with pytest.raises(StoreError, match="directory belongs to another user"):
        open_host_credentials()


# The host's secret


def test_the_hosts_secret_is_made_once_and_is_private(state: Path) -> None:
    found = open_host_credentials()

    assert found.kind == "host"
    assert found.secrets == (state.read_bytes(),) and len(state.read_bytes()) == 32
    assert open_host_credentials().secrets == found.secrets
    assert (mode(state), mode(state.parent)) == (0o600, 0o700)
    assert [each.name for each in state.parent.iterdir()] == ["host.secret"]


def race(rounds: list[str], barrier: Barrier) -> list[bytes]:
    found = []
    for each in rounds:
        os.environ["XDG_STATE_HOME"] = each
        barrier.wait(60)
        found += open_host_credentials().secrets
    return found


def racer(rounds: list[str], barrier: Barrier, sink: multiprocessing.Queue[list[bytes]]) -> None:
    sink.put(race(rounds, barrier))


def test_processes_that_are_the_first_at_once_have_the_same_secret(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    rounds = [str(tmp_path / f"state-{at}") for at in range(40)]
    barrier, sink = context.Barrier(2), context.Queue()
    started = [context.Process(target=racer, args=(rounds, barrier, sink)) for _ in range(2)]
    for each in started:
        each.start()
    mine, yours = sink.get(timeout=60), sink.get(timeout=60)
    for each in started:
        each.join(60)

    assert mine == yours and len(set(mine)) == len(rounds)
    for each in rounds:
        assert [found.name for found in Path(each, "crdtstate").iterdir()] == ["host.secret"]


def test_the_hosts_secret_is_no_link(tmp_path: Path, state: Path) -> None:
    state.parent.mkdir(mode=0o700)
    state.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is a symbolic link, which is not followed"):
        open_host_credentials()
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "elsewhere").write_bytes(bytes(32))
    with pytest.raises(StoreError, match="is a symbolic link, which is not followed"):
        open_host_credentials()


def test_the_hosts_secret_is_whole_and_where_nobody_else_writes(state: Path) -> None:
    open_host_credentials()
    for damaged in (b"", bytes(31), bytes(33)):
        state.write_bytes(damaged)
        with pytest.raises(StoreError, match="is not 32 bytes; remove it"):
            open_host_credentials()
    state.parent.chmod(0o770)
    with pytest.raises(StoreError, match=f"do: chmod 700 {state.parent}"):
        open_host_credentials()


def test_where_there_is_no_place_for_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "file")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(StoreError, match="give a directory that can be written as XDG_STATE_HOME"):
        open_host_credentials()
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "relative/path"):
        monkeypatch.setenv("XDG_STATE_HOME", unset)
        assert state_directory() == tmp_path / ".local/state/crdtstate"


# Renewal


def test_a_file_that_was_altered_is_taken_in(tmp_path: Path) -> None:
    path = write(tmp_path / "mesh", token().encode())
    found = open_credentials(path)
    assert not found.reload()

    renewed = token(secrets=(b"n" * 32, b"s" * 32), certificate=certify("*:rws"))
    write(path, renewed.encode())
    assert found.reload()
    assert found.certificate == certify("*:rws")
    assert found.secrets == (b"n" * 32, b"s" * 32)
    assert not found.reload()
    # Written again, with the same in it.
    write(path, "# a comment", renewed.encode())
    assert not found.reload()


def test_words_are_replaced_in_a_running_process(tmp_path: Path) -> None:
    path = write(tmp_path / "mesh", WORDS)
    found = open_credentials(path)
    mesh = found.mesh
    write(path, "x" * 16, WORDS)

    assert found.reload()
    assert found.secrets == (secret_of_words("x" * 16), secret_of_words(WORDS))
    write(path, "x" * 16)
    assert found.reload()
    assert (found.secrets, found.mesh) == ((secret_of_words("x" * 16),), mesh)


def test_what_cannot_be_taken_in_leaves_what_was(tmp_path: Path) -> None:
    path = write(tmp_path / "mesh", token().encode())
    found = open_credentials(path)
    before = found.certificate, found.secrets, found.public
    for text, error in (
        ("rubbish", StoreError),
        (WORDS, UsageError),
        (token(certificate=certify(agent="bob")).encode(), UsageError),
        (token(seed=BOSS, certificate=certify(key=public_of(BOSS))).encode(), UsageError),
        (token(root=public_of(BOSS), certificate=certify(seed=BOSS)).encode(), UsageError),
    ):
        write(path, text)
        for _ in range(2):
            with pytest.raises(error):
                found.reload()
    path.unlink()
    with pytest.raises(StoreError, match="no such file"):
        found.reload()
    assert before == (found.certificate, found.secrets, found.public)
    write(path, token(certificate=certify("*:r")).encode())
    assert found.reload() and found.certificate == certify("*:r")


# What they show


def forms(secret: bytes) -> list[str]:
    return [
        secret.hex(),
        secret[:8].hex(" "),
        repr(secret),
        repr(secret)[2:-1],
        to_text(secret, "crdtsec1")[8:30],
    ]


def test_secrets_are_never_shown(tmp_path: Path, state: Path) -> None:
    """A70, as far as objects go: whatever prints them, and a log of everything."""
    word = write(tmp_path / "words", WORDS)
    member = open_credentials(write(tmp_path / "mesh", token().encode()))
    root = create_root(tmp_path / "mesh.root")
    found: list[object] = [member, open_credentials(word), open_host_credentials(), token(), root]
    shown = "".join(f"{each!r} {each} {[each]}" for each in found)
    secrets = [ANN, b"s" * 32, b"t" * 32, root.seed, *root.secrets, state.read_bytes()]
    secrets += open_credentials(word).secrets

    assert fingerprint(b"s" * 32) in shown and "'ann'" in shown
    for secret in secrets:
        assert not any(form in shown for form in forms(secret))
    assert WORDS not in shown and token().encode()[9:] not in shown


def test_a_session_at_debug_level_logs_no_secret(tmp_path: Path) -> None:
    """A70: two members meet, one signs a packet for the other, a token is damaged, a stranger comes
    with other words, and everything is logged that anybody logs."""
    told = io.StringIO()
    root, logged = logging.getLogger(), logging.getLogger("websockets")
    before, levels = root.handlers[:], (root.level, logged.level)
    root.handlers = [logging.StreamHandler(told)]
    root.setLevel(logging.DEBUG)
    logged.setLevel(logging.DEBUG)
    authority = create_root(tmp_path / "mesh.root")
    now = time.time_ns() // 1_000_000
    tokens = [
        authority.invite(name, [parse_grant("*:rws")], now, now + DAY) for name in ("ann", "bob")
    ]
    paths = [
        write(tmp_path / each.certificate.agent, each.encode(), "# a comment") for each in tokens
    ]

    async def session() -> None:
        async with Replica("ann", mesh=paths[0], listen="ws://127.0.0.1:0") as one:
            url = str(one.address)
            async with (
                Replica("bob", mesh=tokens[1].encode(), peers=[url]) as two,
                Replica("eve", mesh=WORDS, peers=[url]),
            ):
                two.map("plan")["goal"] = "x"
                await two.synced(20)
                await one.share("plan", to="bob")
        member = open_credentials(paths[0])
        write(paths[0], tokens[0].encode()[:-1])
        try:
            member.reload()
        except StoreError:
            logging.exception("the token in %s of %r", paths[0], member)

    try:
        asyncio.run(session(), debug=True)
    finally:
        root.handlers = before
        root.setLevel(levels[0])
        logged.setLevel(levels[1])
    text = told.getvalue()
    assert "not as it was written" in text and "GET /" in text
    for secret in (authority.seed, *authority.secrets, *(each.seed for each in tokens)):
        assert not any(form in text for form in forms(secret))
    assert WORDS not in text and secret_of_words(WORDS).hex() not in text
    for each in tokens:
        assert not any(part in text for part in re.findall(".{20}", each.encode()[9:]))


def test_errors_do_not_quote_what_is_secret(tmp_path: Path) -> None:
    wrong = write(tmp_path / "mesh", to_text(ANN, "crdtsec1")[:-1], token().encode())
    for mesh in (wrong, WORDS[:15], token().encode()[:-1]):
        try:
            open_credentials(mesh)
        except (UsageError, StoreError) as exc:
            said = str(exc) + "".join(traceback.format_exception_only(exc))
        assert to_text(ANN, "crdtsec1")[8:20] not in said
        assert WORDS[:15] not in said and token().encode()[9:20] not in said


# The ring of keys


def test_a_member_signs_with_the_key_of_its_certificate(tmp_path: Path) -> None:
    path = tmp_path / "a.db.keys"
    own = Keyring(path).public
    ring = open_credentials(token().encode()).keyring(path)

    assert ring.public == public_of(ANN) != own
    assert verify("share/1", b"x", ring.sign("share/1", b"x"), public_of(ANN))
    assert ring.lasts and open_credentials(token().encode()).keyring(None).lasts
    ring.pin("bob", b"1" * 32, lasts=True)
    # What the file has stays there, and the secret of the token does not get there.
    assert to_text(ANN, "crdtsec1") not in path.read_text()
    again = Keyring(path)
    assert (again.public, again.pinned("bob")) == (own, b"1" * 32)


def test_a_members_ring_needs_no_key_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.db.keys"
    ring = Keyring(path, ANN)
    ring.sign("share/1", b"x")
    assert not path.exists()
    ring.pin("bob", b"1" * 32, lasts=True)

    assert Keyring(path, ANN).pinned("bob") == b"1" * 32
    assert "crdtsec1" not in path.read_text() and mode(path) == 0o600
    with pytest.raises(CorruptStore, match="is no file of keys"):
        Keyring(path).sign("share/1", b"")


def test_a_certificate_replaces_a_pinned_key(tmp_path: Path) -> None:
    path = tmp_path / "a.db.keys"
    ring = Keyring(path)
    one, two, three = b"1" * 32, b"2" * 32, b"3" * 32

    assert ring.certify("ann", one) == "new"
    assert ring.certify("ann", one) == "known"
    assert ring.pin("ann", two, lasts=True) == "refused"
    assert ring.certify("ann", two) == "replaced"
    ring.pin("bob", three, lasts=False)
    # Known for a session only; now for good.
    assert ring.certify("bob", three) == "replaced"
    assert ring.pin("bob", one, lasts=True) == "refused"
    assert Keyring(path).pinned("ann") == two


# Files


def test_a_private_file_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "secret"

    assert create_private(path, b"one")
    assert not create_private(path, b"two")
    assert (path.read_bytes(), mode(path)) == (b"one", 0o600)
    assert [each.name for each in tmp_path.iterdir()] == ["secret"]
    with pytest.raises(ValueError, match="larger than 2 bytes"):
        read_private(path, 2, "secret")


# Who may invite


def member_of(authority: Authority, name: str, *roles: str) -> Certificate:
    grants = [parse_grant(each) for each in roles or ("*:rw",)]
    return authority.invite(name, grants, 0, DAY).certificate


def test_a_root_invites_and_notes_whom(tmp_path: Path) -> None:
    path = tmp_path / "mesh.root"
    made = create_root(path)
    with changing(path, 0) as authority:
        found = member_of(authority, "ann")

    assert mode(path) == 0o600
    assert decode_certificate(found.data, made.root) == found
    again = open_authority(path, 0)
    assert (again.root, again.secrets) == (made.root, made.secrets)
    assert [(each.agent, each.key) for each in again.invited.values()] == [("ann", found.key)]
    with pytest.raises(UsageError, match="a root key is never written over"):
        create_root(path)
    with pytest.raises(StoreError, match="the root key cannot be written"):
        create_root(tmp_path / "no" / "mesh.root")


def test_what_failed_is_not_noted(tmp_path: Path) -> None:
    path = tmp_path / "mesh.root"
    create_root(path)
    with pytest.raises(UsageError), changing(path, 0) as authority:
        member_of(authority, "ann")
        member_of(authority, "")

    assert open_authority(path, 0).invited == {}


def inviter(path: str, name: str, barrier: Barrier) -> None:
    barrier.wait(60)
    for at in range(20):
        with changing(Path(path), 0) as authority:
            member_of(authority, f"{name}-{at}")


def test_processes_that_invite_at_once_lose_no_note(tmp_path: Path) -> None:
    path = tmp_path / "mesh.root"
    create_root(path)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    started = [
        context.Process(target=inviter, args=(str(path), name, barrier)) for name in ("a", "b")
    ]
    for each in started:
        each.start()
    for each in started:
        each.join(60)

    assert len(open_authority(path, 0).invited) == 40
    assert [each.name for each in tmp_path.iterdir()] == ["mesh.root"]


def test_a_controller_invites_with_its_token(tmp_path: Path) -> None:
    made = token(seed=BOSS, certificate=boss())
    path = write(tmp_path / "boss.join", made.encode())
    text = path.read_text()
    with changing(path, DAY) as authority:
        found = authority.invite("ann", [parse_grant("*:r")], DAY, 2 * DAY)

    assert found.certificate.issuer == public_of(BOSS)
    assert (found.secrets, found.former, found.root) == (made.secrets, made.former, PUBLIC)
    assert path.read_text() == text
    assert authority.revoke("ann", found.certificate.key, {}, 0, "").by == boss().data
    with pytest.raises(UsageError, match="the certificate of 'boss' is not valid now"):
        open_authority(path, 20 * DAY)
    member = write(tmp_path / "ann.join", token().encode())
    with pytest.raises(UsageError, match="which is no controller"):
        open_authority(member, 0)
    with pytest.raises(UsageError, match="is no root's file, and no join token"):
        open_authority(write(tmp_path / "words", WORDS), 0)


def test_a_revoked_key_is_not_invited_again(tmp_path: Path) -> None:
    authority = Authority(ROOT, PUBLIC, (bytes(32),))
    key = member_of(authority, "ann").key
    assert [each.key for each in authority.keys_of("ann")] == [key]
    authority.revoke("ann", key, {}, 0, "")

    assert authority.keys_of("ann") == []
    with pytest.raises(UsageError, match="was revoked for ever"):
        authority.invite("ann", [parse_grant("*:r")], 0, DAY, key)
    assert member_of(authority, "ann").key != key


def test_secrets_are_replaced_in_two_steps() -> None:
    authority = Authority(ROOT, PUBLIC, (bytes(32),))
    authority.rotate()
    new, old = authority.secrets
    assert old == bytes(32) and authority.former == ()
    authority.retire()
    assert (authority.secrets, authority.former) == ((new,), (old,))
    for _ in range(10):
        authority.rotate()
        authority.retire()
    assert len(authority.former) == FORMER_MAX and old not in authority.former


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: text.replace('"v": 1', '"v": 2'),
        lambda text: text.replace("mesh-root", "replica-key"),
        lambda text: text.replace('"ed25519": "crdtsec1', '"ed25519": "crdtsec1a'),
        lambda text: re.sub(r'"secrets": \[[^]]*\]', '"secrets": []', text),
        lambda text: text.replace('"invited": []', '"invited": [["ann"]]'),
        lambda text: "{}",
        lambda text: "{" * 100,
    ],
)
def test_a_damaged_root_is_named(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    path = tmp_path / "mesh.root"
    create_root(path)
    text = path.read_text()
    write(path, damage(text))
    with pytest.raises(CorruptStore, match="is no root's file") as caught:
        read_root(path)

    assert text[30:60] not in str(caught.value)
    assert read_root(write(path, WORDS)) is None
