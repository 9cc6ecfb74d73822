"""The command line of keys: make a mesh, invite, renew, rotate and revoke."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from crdtstate import blocking, cli
from crdtstate.authority import read_root
from crdtstate.certificates import (
    FORWARD,
    READ,
    SNAPSHOT,
    WRITE,
    decode_certificate,
    decode_token,
    mesh_of,
)
from crdtstate.credentials import open_credentials
from crdtstate.revocations import Revocation, decode_revocation
from crdtstate.signing import from_text, public_of, show
from crdtstate.tiers import open_tier


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in a directory of its own, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(line: str, *more: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["crdtstate", *shlex.split(line), *more])
        code = cli.main()
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def mesh(run: Run) -> bytes:
    """A mesh in the file mesh.root; its root's public key."""
    return from_text(run("mesh create mesh.root").out.strip(), "crdtmesh1")


def done(result: Result) -> Result:
    assert result.code == 0, result.err
    return result


def mode(name: str) -> int:
    return stat.S_IMODE(Path(name).stat().st_mode)


def shown(run: Run, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(done(run(f"mesh show {name} --json")).out)
    return found


# Making a mesh


def test_a_mesh_is_a_file_and_says_what_comes_next(run: Run) -> None:
    made = done(run("mesh create mesh.root"))

    root = from_text(made.out.strip(), "crdtmesh1")
    authority = read_root(Path("mesh.root"))
    assert authority is not None and authority.root == root
    assert mode("mesh.root") == 0o600
    assert "next: crdtstate invite agent-1 --root mesh.root --out agent-1.join" in made.err
    again = run("mesh create mesh.root")
    assert (again.code, again.out) == (1, "")
    assert "mesh.root exists, and a root key is never written over" in again.err
    Path("keys").mkdir()
    assert "keys/mesh.root has the root key" in done(run("mesh create keys")).err
    assert "cannot be written: No such file" in run("mesh create no/mesh.root").err


# Inviting


def test_who_is_invited_without_a_word_is_a_full_member(run: Run, mesh: bytes) -> None:
    invited = done(run("invite agent-7 --root mesh.root --out agent-7.join"))

    assert invited.out == ""
    assert "whoever has agent-7.join is 'agent-7': hand it over in private" in invited.err
    found = open_credentials(Path("agent-7.join"))
    assert (found.kind, found.root, found.mesh) == ("member", mesh, mesh_of(mesh))
    assert found.certificate is not None and found.certificate.agent == "agent-7"
    assert all(found.certificate.allows(role, "x") for role in (FORWARD, READ, WRITE, SNAPSHOT))
    assert not found.certificate.is_controller
    days = (found.certificate.not_after_ms - found.certificate.not_before_ms) / 86_400_000
    assert days == 30
    assert mode("agent-7.join") == 0o600
    again = run("invite agent-7 --root mesh.root --out agent-7.join")
    assert again.code == 1 and "agent-7.join exists, and is not written over" in again.err


def test_a_token_goes_to_stdout_and_nothing_else_does(run: Run, mesh: bytes) -> None:
    invited = done(run("invite agent-7 --root mesh.root"))

    token = decode_token(invited.out.strip())
    assert token.root == mesh and token.certificate.agent == "agent-7"
    assert invited.out.count("\n") == 1
    assert "crdtjoin1" not in invited.err
    assert "whoever has it is 'agent-7'" in invited.err


def test_roles_are_granted_by_pattern_and_no_more(run: Run, mesh: bytes) -> None:
    line = "invite ann --root mesh.root --roles 'plan/**:rw' --roles notes:r --expires 12h"
    found = decode_token(done(run(line)).out.strip()).certificate

    assert [str(each) for each in found.grants] == ["plan/*:rw", "notes:r"]
    assert found.not_after_ms - found.not_before_ms == 12 * 3_600_000
    said = run(line).err
    assert "'ann': plan/* (forward, read, write), notes (forward, read), until 20" in said
    assert "'ann' was invited before, and that key stays valid" in said


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--roles plan", "'plan' is no PATTERN:ROLES such as 'plan/**:rw'"),
        ("--roles plan:x", "there is no role 'x'"),
        ("--roles p*n:r", "at its end only"),
        ("--roles *:c", "controlling is given by --controller"),
        ("--expires soon", "write a time such as 12h, 30d or 1y"),
        ("--expires 0d", "write a time such as"),
        ("--expires 21y", "20y at most"),
        ("--key crdtpub1x", "this is no public key"),
    ],
)
def test_what_is_wrong_with_an_invitation_is_said(
    run: Run, mesh: bytes, options: str, reason: str
) -> None:
    found = run(f"invite ann --root mesh.root {options}")

    assert found.code == 2 and found.out == ""
    assert reason in " ".join(found.err.replace("│", " ").split())


def test_a_weak_key_is_refused(run: Run, mesh: bytes) -> None:
    """A24."""
    found = run(f"invite ann --root mesh.root --key {show(bytes([1]) + bytes(31))}")

    assert found.code == 2 and "this is a weak key" in found.err


def test_names_that_a_terminal_would_obey_are_refused_and_not_printed(
    run: Run, mesh: bytes
) -> None:
    found = run("invite --root mesh.root", "a\x1b]0;owned\x07")

    assert found.code == 1 and "\x1b" not in found.err
    assert "an agent's name has 1 to 100 printable characters" in found.err


def test_a_controller_invites_with_its_token(run: Run, mesh: bytes) -> None:
    done(run("invite boss --root mesh.root --controller --expires 10d --out boss.join"))
    done(run("invite ann --root boss.join --out ann.join"))

    boss, ann = (open_credentials(Path(f"{name}.join")).certificate for name in ("boss", "ann"))
    assert boss is not None and ann is not None
    assert boss.is_controller and not ann.is_controller
    assert (ann.issuer, ann.not_after_ms) == (boss.key, boss.not_after_ms)
    assert decode_certificate(ann.data, mesh) == ann
    late = run("invite bob --root boss.join --expires 30d")
    assert late.code == 1 and "is later than the certificate that invites" in late.err
    nobody = run("invite bob --root ann.join")
    assert nobody.code == 1 and "'ann', which is no controller; take the root's file" in nobody.err
    further = run("invite bob --root boss.join --roles '*:r' --controller --out bob.join")
    assert further.code == 0
    deeper = run("invite eve --root bob.join --roles '*:r'")
    assert deeper.code == 1 and "not signed by the root of this mesh" in deeper.err


# An agent's own key


def test_an_agent_may_make_its_key_itself(run: Run, mesh: bytes) -> None:
    made = done(run("keygen --out me.join"))
    public = made.out.strip()
    assert mode("me.join") == 0o600 and "crdtsec1" not in made.out + made.err
    token = done(run(f"invite me --root mesh.root --key {public}"))
    assert decode_token(token.out.strip()).seed == b""
    assert "it is of use with the secret key only" in token.err
    with Path("me.join").open("a") as file:
        file.write(token.out)

    found = open_credentials(Path("me.join"))
    assert found.public == from_text(public, "crdtpub1")
    before = run("keygen --out me.join")
    assert before.code == 1 and "is not written over" in before.err
    done(run("mesh renew me.join --root mesh.root"))
    assert open_credentials(Path("me.join")).public == found.public


def test_keys_and_words_are_made(run: Run) -> None:
    key, words = done(run("keygen")).out.splitlines(), done(run("keygen --words")).out.strip()

    assert key[0] == f"# {show(public_of(from_text(key[1], 'crdtsec1')))}"
    assert open_credentials(words).kind == "secret"
    assert run("keygen --words").out.strip() != words


# Looking


def test_a_file_is_shown_without_its_secrets(run: Run, mesh: bytes) -> None:
    done(run("invite ann --root mesh.root --roles plan:r --out ann.join"))
    done(run("keygen --words --out words"))
    secret = Path("ann.join").read_text().strip()[9:]
    texts = [
        done(run(f"mesh show {name}{as_json}")).out
        for name in ("ann.join", "mesh.root", "words")
        for as_json in ("", " --json")
    ]

    for text in texts:
        assert secret not in text and "crdtsec1" not in text
        assert Path("words").read_text().strip() not in text
        assert "\x1b" not in text
    assert re.search(r"^agent +ann$", texts[0], re.M)
    assert re.search(r"^roles +plan \(forward, read\)$", texts[0], re.M)
    assert re.search(r"^state +valid$", texts[0], re.M)
    assert re.search(r"^ann +valid +20.* crdtpub1", texts[2], re.M)
    assert re.search(r"^kind +words$", texts[4], re.M)
    ids = {shown(run, name)["id"] for name in ("ann.join", "mesh.root")}
    assert ids == {mesh_of(mesh).hex()}


def test_what_cannot_be_shown_is_said(run: Run, mesh: bytes) -> None:
    Path("open").write_text("words that all of us know")
    Path("open").chmod(0o644)
    for name, reason in (
        ("none", "there is no such file"),
        ("open", "do: chmod 600 open"),
        (".", "is kept in a file, and this is none"),
    ):
        found = run(f"mesh show {name}")
        assert (found.code, found.out) == (1, "") and reason in found.err


def test_a_root_key_that_others_may_read_is_not_used(run: Run, mesh: bytes) -> None:
    """A70."""
    Path("mesh.root").chmod(0o644)
    found = run("invite ann --root mesh.root")

    assert (found.code, found.out) == (1, "")
    assert found.err == (
        "crdtstate: mesh.root: others may read this root key; do: chmod 600 mesh.root\n"
    )


# Renewing and rotating


def test_a_token_is_renewed_in_its_file(run: Run, mesh: bytes) -> None:
    done(run("invite ann --root mesh.root --roles plan:r --expires 1d --out ann.join"))
    found = open_credentials(Path("ann.join"))
    before = found.certificate
    done(run("mesh renew ann.join --root mesh.root --expires 60d"))

    assert found.reload()
    assert before is not None and found.certificate is not None
    assert found.certificate.key == before.key
    assert found.certificate.grants == before.grants
    assert found.certificate.not_after_ms > before.not_after_ms
    assert mode("ann.join") == 0o600
    done(run("mesh renew ann.join --root mesh.root --roles *:w --controller --out more.join"))
    more = open_credentials(Path("more.join")).certificate
    assert more is not None and more.is_controller and more.allows(WRITE, "x")
    done(run("mesh renew more.join --root mesh.root"))
    kept = open_credentials(Path("more.join")).certificate
    assert kept is not None and kept.is_controller and kept.allows(WRITE, "x")
    done(run("mesh renew more.join --root mesh.root --no-controller"))
    less = open_credentials(Path("more.join")).certificate
    assert less is not None and not less.is_controller and less.allows(WRITE, "x")
    done(run("mesh create other.root"))
    strange = run("mesh renew ann.join --root other.root")
    assert strange.code == 1 and "ann.join is of another mesh than other.root" in strange.err
    words = run("mesh renew mesh.root --root mesh.root")
    assert words.code == 1 and "there is no join token in it" in words.err


def test_the_secret_is_replaced_while_all_stay_together(run: Run, mesh: bytes) -> None:
    for name in ("ann", "bob"):
        done(run(f"invite {name} --root mesh.root --out {name}.join"))
    ann, bob = (open_credentials(Path(f"{name}.join")) for name in ("ann", "bob"))
    (old,) = ann.secrets

    def meet() -> bool:
        return bool(set(ann.secrets) & set(bob.secrets))

    assert "renew: crdtstate mesh renew TOKEN" in done(run("mesh rotate mesh.root")).err
    early = run("mesh rotate mesh.root")
    assert early.code == 1 and "a secret is being replaced already" in early.err
    for token in (ann, bob):
        done(run(f"mesh renew {token.path} --root mesh.root"))
        assert token.reload() and meet()
    done(run("mesh rotate mesh.root --finish"))
    for token in (ann, bob):
        done(run(f"mesh renew {token.path} --root mesh.root"))
        assert token.reload() and meet()
        assert old not in token.secrets and token.former == (old,)
    late = run("mesh rotate mesh.root --finish")
    assert late.code == 1 and "has one secret only" in late.err
    wrong = run("mesh rotate ann.join")
    assert wrong.code == 1 and "no controller" in wrong.err


def test_only_the_root_rotates(run: Run, mesh: bytes) -> None:
    done(run("invite boss --root mesh.root --controller --out boss.join"))
    before = Path("boss.join").read_text()
    found = run("mesh rotate boss.join")

    assert found.code == 1 and "boss.join is no root's file" in found.err
    assert Path("boss.join").read_text() == before


# Revoking


def revoked(text: str, mesh: bytes) -> list[Revocation]:
    return [decode_revocation(line, mesh) for line in text.splitlines()]


def test_a_name_is_revoked_with_all_its_keys(run: Run, mesh: bytes) -> None:
    keys = {
        decode_token(run("invite ann --root mesh.root").out.strip()).certificate.key
        for _ in range(2)
    }
    done(run("invite bob --root mesh.root --out bob.join"))
    line = "revoke ann --root mesh.root --everything --reason 'left us' --out ann.revoked"
    told = done(run(line))
    found = revoked(Path("ann.revoked").read_text(), mesh)

    assert {each.key for each in found} == keys
    assert all((each.agent, each.reason, each.cuts) == ("ann", "left us", {}) for each in found)
    assert "nothing of it stays" in told.err and "by revoke(); then: mesh rotate" in told.err
    # What was signed may be lost.
    again = revoked(done(run("revoke ann --root mesh.root --everything")).out, mesh)
    assert {each.key for each in again} == keys
    nobody = run("revoke eve --root mesh.root --everything")
    assert nobody.code == 1 and "no key of 'eve'. It has noted ann, bob." in nobody.err
    states = {(e["agent"], e["state"]) for e in shown(run, "mesh.root")["invited"]}  # type: ignore[attr-defined]
    assert states == {("ann", "revoked"), ("bob", "valid")}


def test_what_cannot_be_handed_out_is_not_noted(run: Run, mesh: bytes) -> None:
    done(run("invite ann --root mesh.root --out ann.join"))
    before = Path("mesh.root").read_bytes(), Path("ann.join").read_bytes()
    for line in (
        "invite bob --root mesh.root --out ann.join",
        "revoke ann --root mesh.root --everything --out ann.join",
        "mesh renew ann.join --root mesh.root --out ann.join",
    ):
        found = run(line)
        assert found.code == 1 and "ann.join exists, and is not written over" in found.err
    assert before == (Path("mesh.root").read_bytes(), Path("ann.join").read_bytes())


def test_a_revoked_key_is_not_renewed(run: Run, mesh: bytes) -> None:
    done(run("invite ann --root mesh.root --out ann.join"))
    done(run("revoke ann --root mesh.root --everything"))
    found = run("mesh renew ann.join --root mesh.root")

    assert found.code == 1 and "was revoked for ever; invite it with a new one" in found.err
    done(run("invite ann --root mesh.root --out new.join"))


def test_what_a_store_has_of_an_agent_stays(run: Run, mesh: bytes) -> None:
    done(run("invite ann --root mesh.root --out ann.join"))
    done(run("invite boss --root mesh.root --controller --out boss.join"))
    with (
        blocking.Replica("ann", store="ann.db", listen="ws://127.0.0.1:0") as ann,
        blocking.Replica("bob", store="bob.db", peers=[str(ann.address)]) as bob,
    ):
        ann.map("plan")["goal"] = "ship"
        ann.document("notes").map("x")["y"] = 1
        bob.map("plan")["by"] = "bob"
        ann.synced(timeout=20)
        bob.synced(timeout=20)
        bob.durable()
        hers, his = ann.writer, bob.writer
    told = done(run("revoke ann --root mesh.root --store bob.db"))
    (found,) = revoked(told.out, mesh)

    assert found.cuts["main"] == {hers: 1} and found.cuts["notes"] == {hers: 1}
    assert found.keeps("main", hers, 1) and not found.keeps("main", hers, 2)
    assert re.search(r"what stays of it: [0-9]+ changes", told.err)
    # Whom a controller has invited is revoked with it, and by the same cuts.
    (all_of_them,) = revoked(done(run("revoke boss --root mesh.root --store bob.db")).out, mesh)
    assert all_of_them.cuts["main"] == {hers: 1, his: 1}


def test_a_key_is_revoked_by_a_controller(run: Run, mesh: bytes) -> None:
    done(run("invite boss --root mesh.root --controller --out boss.join"))
    done(run("invite ann --root boss.join --out ann.join"))
    key = str(shown(run, "ann.join")["key"])
    by_name = run("revoke ann --root boss.join --everything")
    assert by_name.code == 1 and "a controller has no notes of names" in by_name.err
    (found,) = revoked(done(run(f"revoke {key} --root boss.join --everything")).out, mesh)

    assert show(found.key) == key and found.by


def test_what_stays_has_to_be_said(run: Run, mesh: bytes) -> None:
    done(run("invite ann --root mesh.root --out ann.join"))
    for options in ("", "--everything --store ann.db"):
        found = run(f"revoke ann --root mesh.root {options}")
        assert found.code == 2 and "say what stays: --store FILE, or --everything" in found.err
    none = run("revoke ann --root mesh.root --store none.db")
    assert none.code == 1 and "none.db" in none.err
    # Nothing was noted.
    assert shown(run, "mesh.root")["invited"][0]["state"] == "valid"  # type: ignore[index]


# Help


@pytest.mark.parametrize(
    "command",
    ["keygen", "invite", "revoke", "mesh", "mesh create", "mesh show", "mesh renew", "mesh rotate"],
)
def test_each_command_explains_itself(run: Run, command: str) -> None:
    told = done(run(f"{command} --help")).out

    assert "Example: crdtstate" in told or command == "mesh"
    assert "[cyan]" not in told


def test_the_help_says_what_is_granted_without_a_word(run: Run) -> None:
    told = " ".join(done(run("invite --help")).out.replace("│", " ").split())

    assert "Without --roles it may read and write all documents and hand out snapshots" in told
    assert "30d if nothing is said" in told


# What is said of who was revoked


@pytest.fixture
def fallen(run: Run, mesh: bytes) -> None:
    """The store ``ann.db`` with a checkpoint of its own, and a tier with one of ``eve``'s, whose
    key was revoked: ``ann.db`` knows of that, and has a change of hers that is hidden."""
    for name in ("ann", "eve"):
        assert run(f"invite {name} --root mesh.root --roles *:rws --out {name}.join").code == 0
    assert run("invite boss --root mesh.root --controller --out boss.join").code == 0
    here = Path.cwd()
    tier = f"sqlite:///{here}/tier.db"
    options: dict[str, Any] = {"checkpoints": [tier]}
    with blocking.Replica(
        "ann", store="ann.db", mesh=here / "ann.join", listen="ws://127.0.0.1:0"
    ) as ann:
        peers = [str(ann.address)]
        with blocking.Replica("boss", mesh=here / "boss.join", peers=peers) as boss:
            with blocking.Replica("eve", mesh=here / "eve.join", peers=peers, **options) as eve:
                eve.map("plan")["a"] = 1
                eve.synced(timeout=20)
                boss.wait_for(eve.version(), timeout=20)
                eve.checkpoint()
            key = eve._replica._credentials.public
            boss.revoke(_of_before(here, "eve", key))
            boss.synced(timeout=20)
            ann.wait_for(boss.version(), timeout=20)
        ann.checkpoint()


def _of_before(here: Path, agent: str, key: bytes) -> Revocation:
    """The root's revocation of a key, of which nothing stays."""
    return read_root(here / "mesh.root").revoke(agent, key, {}, 1, "stolen")


def test_a_store_s_verification_says_what_is_hidden_of_who_was_revoked(
    run: Run, fallen: None
) -> None:
    code, out, err = run("verify ann.db --mesh ann.join")
    assert (code, err) == (0, "")
    assert re.search(r"^revoked: eve \(key [0-9a-f]{16}\): main: 1 change hidden$", out, re.M)
    told = json.loads(run("verify ann.db --mesh ann.join --json").out)
    found = [(each["agent"], each["document"], each["changes"]) for each in told["revoked"]]
    assert ("eve", "main", 1) in found and {each[0] for each in found} == {"eve"}
    assert "revoked" not in run("verify ann.db").out


def test_checkpoints_of_who_was_revoked_are_said_to_be_that(run: Run, fallen: None) -> None:
    code, out, err = run("checkpoints verify tier.db --mesh ann.join")
    assert (code, err) == (0, ""), "nothing there tells"
    shutil.copy("ann.db", "tier")
    Path("tier.db").rename("tier.checkpoints")

    # The store beside it does;
    code, out, err = run("checkpoints verify tier --mesh ann.join")
    assert code == 1 and re.search(r"^eve .*proven by a key of eve that was, or may be", out, re.M)
    (line,) = run("checkpoints list tier --mesh ann.join --json").out.splitlines()
    (found,) = json.loads(line)
    assert found["proven"] is False
    code, out, err = run(f"checkpoints diff tier {found['id']} --mesh ann.join")
    assert code == 1 and "revoked" in err

    # and a checkpoint of somebody who knew.
    Path("tier").unlink()
    assert run("checkpoints verify tier.checkpoints --mesh ann.join").code == 0
    asyncio.run(_copy("ann.db.checkpoints", "tier.checkpoints"))
    code, out, err = run("checkpoints verify tier.checkpoints --mesh ann.join")
    told = out.splitlines()
    assert code == 1 and len(told) == 2
    assert told[0].startswith("ann ") and told[0].endswith(": intact") and "revoked" in told[1]


async def _copy(source: str, target: str) -> None:
    """Put all of one tier into another."""
    there, here = [await open_tier(f"sqlite:///{Path.cwd()}/{each}") for each in (source, target)]
    for item in await there.items(""):
        data = await there.get(item.key)
        assert data is not None
        await here.put(item.key, data)
    await there.close()
    await here.close()
