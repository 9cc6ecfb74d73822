"""
Who may join: making a mesh, inviting into it, renewing, and revoking.

Nothing here speaks with the mesh. A root's file, or the join token of a controller, signs what
agents are handed as files; what is secret goes into files that only their owner may read.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from crdtstate.authority import Authority, Invited, changing, create_root, read_root
from crdtstate.certificates import (
    CONTROL,
    JOIN,
    ROLES,
    Certificate,
    Grant,
    JoinToken,
    decode_token,
    fingerprint,
    is_valid_at,
    mesh_of,
    parse_grant,
)
from crdtstate.cli.options import AsJson
from crdtstate.cli.printing import count, note, print_columns, print_json, printable
from crdtstate.clock import Version
from crdtstate.credentials import open_credentials, read_lines
from crdtstate.errors import CRDTStateError, StoreError, UsageError
from crdtstate.keys import create_private, write_private
from crdtstate.revocations import Revocation
from crdtstate.signing import MESH, PUBLIC, SECRET, from_text, is_weak, public_of, show, to_text
from crdtstate.stores.file import read_documents, reading

ROOT_NAME = "mesh.root"

MEMBER = ("*:rws",)
"""What is granted if nothing is said: all that a member of a mesh of one secret may do."""

DAY = 24 * 3600
UNITS = {"m": 60, "h": 3600, "d": DAY, "w": 7 * DAY, "y": 365 * DAY}
EXPIRES_MAX = 20 * UNITS["y"]
DEFAULT_EXPIRES = "30d"

Root = Annotated[
    Path, typer.Option(metavar="FILE", help="The root's file, or a controller's join token.")
]
Roles = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN:ROLES",
        help="What it may do: roles of f forward, r read, w write, s snapshot, in the documents "
        "named so, as 'plan/**:rw'; repeatable.",
    ),
]
Expires = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="For how long: 12h, 30d, 1y; 30d if nothing is said."),
]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write it to a new file, not to stdout.")
]


def keygen(
    out: Out = None,
    words: Annotated[
        bool, typer.Option("--words", help="Make words for a mesh of one secret instead.")
    ] = False,
) -> None:
    """Make a key for an agent, on the machine where it will be.

    The secret key stays there; the public one (crdtpub1...) goes to whoever
    invites. Most need no such key: an invitation without --key has one.

    Example: [cyan]crdtstate keygen --out agent-7.join[/cyan]
    """
    if words:
        _hand_out(secrets.token_hex(16), out)
        note("all members of the mesh need these words; a file with them is given by --mesh")
        return
    seed = secrets.token_bytes(32)
    public = show(public_of(seed))
    _hand_out(f"# {public}\n{to_text(seed, SECRET)}", out)
    if out is not None:
        print(public)
        note(f"{out} has the secret key. Then: crdtstate invite NAME --key {public[:16]}...")
        note(f"and add the join token that comes of it to {out}, as a line")


def create_mesh(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A new file, or a directory.")],
) -> None:
    """Make a mesh: its root key, and its first secret.

    Whoever has the file can invite anybody and revoke everybody. It is not
    needed while the mesh runs: keep it elsewhere, with a copy.

    Example: [cyan]crdtstate mesh create mesh.root[/cyan]
    """
    if path.is_dir():
        path /= ROOT_NAME
    made = create_root(path)
    print(to_text(made.root, MESH))
    note(f"{path} has the root key. Keep it off the machines of the mesh, with a copy")
    note(f"next: crdtstate invite agent-1 --root {path} --out agent-1.join")


def invite(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The agent's name.")],
    root: Root,
    roles: Roles = None,
    controller: Annotated[
        bool,
        typer.Option(
            "--controller", help="It may also command the mesh, invite others and revoke."
        ),
    ] = False,
    key: Annotated[
        str | None,
        typer.Option(metavar="crdtpub1...", help="Its public key, if it has made one itself."),
    ] = None,
    expires: Expires = None,
    out: Out = None,
) -> None:
    """Invite an agent: make the join token that it is opened with.

    Without --roles it may read and write all documents and hand out snapshots
    of them, but not command. With --roles it may do what they say and no more.
    Writing includes reading, and reading includes passing on.

    Example: [cyan]crdtstate invite ann --root mesh.root --roles 'plan/**:rw' --out ann.join[/cyan]
    """
    public = None if key is None else _public(key)
    grants = _grants(roles, controller)
    _check_new(out)
    with changing(root, now := _now_ms()) as authority:
        until = _until(expires, now, authority)
        before = [e for e in authority.keys_of(name) if e.until_ms > now and e.key != public]
        token = authority.invite(name, grants, now, until, public)
    _hand_out(token.encode(), out)
    _say_granted(token.certificate)
    where = "it" if out is None else str(out)
    if public is None:
        note(f"whoever has {where} is {name!r}: hand it over in private")
    else:
        note(f"it is of use with the secret key only: add {where} to the file of that key")
    if before:
        note(f"{name!r} was invited before, and that key stays valid; crdtstate revoke ends it")


def show_mesh(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="A join token, a root's file, or words.")
    ],
    as_json: AsJson = False,
) -> None:
    """Say what a file is good for, without its secrets.

    Example: [cyan]crdtstate mesh show agent-7.join[/cyan]
    """
    found = read_root(path)
    told = _describe_root(found) if found is not None else _describe_member(path)
    if as_json:
        print_json(told)
        return
    invited = told.pop("invited", None)
    print_columns([(name, _shown(value)) for name, value in told.items()])
    if invited:
        rows = [(each["agent"], each["state"], each["until"], each["key"]) for each in invited]
        print()
        print_columns([("INVITED", "STATE", "UNTIL", "KEY"), *rows])


def rotate_secret(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The root's file.")],
    finish: Annotated[
        bool, typer.Option("--finish", help="Admit only the newest secret from now on.")
    ] = False,
) -> None:
    """Replace the secret of the mesh, while it runs.

    Three steps: rotate; renew the token of each member; then rotate --finish,
    and renew again. Until then both secrets work. Running agents see that
    their token's file was altered.

    Example: [cyan]crdtstate mesh rotate mesh.root[/cyan]
    """
    with changing(path, _now_ms()) as authority:
        if authority.certificate is not None:
            raise UsageError(f"{path} is no root's file; only that rotates the secret")
        two = len(authority.secrets) > 1
        if finish and not two:
            raise UsageError(f"{path} has one secret only; nothing was being replaced")
        if two and not finish:
            raise UsageError(
                f"{path}: a secret is being replaced already. Renew all tokens, then end the old "
                f"one: crdtstate mesh rotate {path} --finish"
            )
        if finish:
            authority.retire()
        else:
            authority.rotate()
    for each in authority.secrets:
        print(fingerprint(each))
    what = "only this secret is admitted now" if finish else "the new secret stands first"
    note(f"{path}: {what}. Then renew: crdtstate mesh renew TOKEN --root {path}")
    if not finish:
        note(f"once all have it, end the old one: crdtstate mesh rotate {path} --finish")


def renew(
    token: Annotated[Path, typer.Argument(metavar="TOKEN", help="The join token's file.")],
    root: Root,
    roles: Roles = None,
    controller: Annotated[
        bool | None,
        typer.Option("--controller/--no-controller", help="Otherwise as it was."),
    ] = None,
    expires: Expires = None,
    out: Out = None,
) -> None:
    """Renew a join token, in its file: the same agent and key, the mesh's newest secrets.

    What it may do stays, unless --roles says otherwise. A running agent sees
    that the file was altered.

    Example: [cyan]crdtstate mesh renew agent-7.join --root mesh.root --expires 30d[/cyan]
    """
    _check_new(out)
    before, others = _read_token(token)
    certificate = before.certificate
    grants = list(certificate.grants) if roles is None else _grants(roles, False)
    keeps = certificate.is_controller if controller is None else controller
    grants = [each for each in grants if CONTROL not in each.roles]
    if keeps:
        grants.append(parse_grant("*:c"))
    with changing(root, now := _now_ms()) as authority:
        if authority.root != before.root:
            raise UsageError(f"{token} is of another mesh than {root}")
        until = _until(expires, now, authority)
        made = authority.invite(certificate.agent, grants, now, until, certificate.key)
    made = JoinToken(made.root, made.secrets, made.former, before.seed, made.certificate)
    lines = "\n".join([made.encode(), *others])
    if out is not None:
        _hand_out(lines, out)
    else:
        _write_over(token, lines)
    _say_granted(made.certificate)


def revoke(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The agent, or its key (crdtpub1...).")
    ],
    root: Root,
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Any replica's store: what it has of the agent stays, no more."
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Nothing stays of what the agent ever wrote.")
    ] = False,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why.")] = "",
    out: Out = None,
) -> None:
    """Revoke a key, for ever.

    What is signed here counts once a running replica has taken it in.

    What the agent has written up to now stays, by what the --store has of it;
    anything else of it is hidden, also what turns up later and says it is
    older. Whom a revoked controller had invited goes with it. The agent still
    knows the mesh's secret: rotate that too.

    Example: [cyan]crdtstate revoke ann --root mesh.root --store relay.db --out ann.revoked[/cyan]
    """
    if everything == (store is not None):
        raise typer.BadParameter("say what stays: --store FILE, or --everything for nothing")
    _check_new(out)
    with changing(root, now := _now_ms()) as authority:
        wanted = _whom(name, authority, root)
        made = [
            authority.revoke(each.agent, each.key, _cuts(store, each), now, reason)
            for each in wanted
        ]
    _hand_out("\n".join(each.encode() for each in made), out)
    for each in made:
        _say_revoked(each)
    if out is not None:
        note(f"give a controller's replica what is in {out}, by revoke(); then: mesh rotate")


# What is read


def _public(text: str) -> bytes:
    try:
        found = from_text(text, PUBLIC)
    except ValueError as exc:
        raise typer.BadParameter(f"this is no public key: {exc}") from None
    if is_weak(found):
        raise typer.BadParameter("this is a weak key: a signature under it would prove nothing")
    return found


def _grants(roles: Iterable[str] | None, controller: bool) -> list[Grant]:
    try:
        found = [parse_grant(each) for each in (roles or MEMBER)]
        if any(CONTROL in each.roles for each in found):
            raise UsageError("controlling is given by --controller")
    except UsageError as exc:
        raise typer.BadParameter(str(exc)) from None
    return [*found, parse_grant("*:c")] if controller else found


def parse_time(text: str) -> int:
    """Read a length of time such as ``30d``; return seconds. Raises typer.BadParameter."""
    found = re.fullmatch(r"([0-9]{1,6})([mhdwy])", text)
    seconds = int(found[1]) * UNITS[found[2]] if found else 0
    if not 0 < seconds <= EXPIRES_MAX:
        raise typer.BadParameter(f"{text!r}: write a time such as 12h, 30d or 1y, 20y at most")
    return seconds


def _until(expires: str | None, now: int, authority: Authority) -> int:
    until = now + 1000 * parse_time(expires or DEFAULT_EXPIRES)
    own = authority.certificate
    if own is None or until <= own.not_after_ms:
        return until
    if expires is None:
        return own.not_after_ms
    when = _when(own.not_after_ms)
    raise UsageError(f"--expires {expires} is later than the certificate that invites, {when}")


def _now_ms() -> int:
    return int(time.time() * 1000)


def _read_token(path: Path) -> tuple[JoinToken, list[str]]:
    """The newest token of a file, and the other lines that stay."""
    lines = read_lines(path)
    tokens = [each for each in lines if each.startswith(JOIN)]
    if not tokens:
        raise StoreError(path, "there is no join token in it; crdtstate invite makes one")
    return decode_token(tokens[0]), [each for each in lines if not each.startswith(JOIN)]


def _whom(name: str, authority: Authority, root: Path) -> list[Invited]:
    if name.startswith(PUBLIC):
        key = _public(name)
        return [authority.invited.get(key) or Invited("unknown", key, 0, may_invite=True)]
    # Who was revoked already is revoked again: what was signed may be lost.
    noted = [each for each in authority.invited.values() if each.agent == name]
    if found := authority.keys_of(name) or noted:
        return found
    if authority.certificate is not None:
        raise UsageError("a controller has no notes of names: name the key, crdtpub1...")
    known = ", ".join(sorted({each.agent for each in authority.invited.values()})[:20])
    there = f" It has noted {known}." if known else ""
    raise UsageError(
        f"{root} has noted no key of {name!r}.{there} Or name the key itself, crdtpub1..."
    )


def _cuts(store: Path | None, whose: Invited) -> dict[str, Version]:
    """What a store has of an agent; of one who may have invited others, of everybody."""
    if store is None:
        return {}
    with reading(store) as db:
        documents = read_documents(db, store)
    cuts = {}
    for name in documents.documents():
        document = documents.document(name)
        cuts[name] = Version(
            (writer, seq)
            for writer, seq in document.version.items()
            if whose.may_invite or document.agents.get(writer) == whose.agent
        )
    return cuts


# What is handed out


def _check_new(out: Path | None) -> None:
    """Raise UsageError before anything is signed and noted that could then not be handed out."""
    if out is not None and os.path.lexists(out):
        raise _exists(out)


def _exists(out: Path) -> UsageError:
    return UsageError(f"{out} exists, and is not written over; name another file")


def _hand_out(text: str, out: Path | None) -> None:
    if out is None:
        print(text)
        return
    try:
        is_new = create_private(out, f"{text}\n".encode())
    except OSError as exc:
        raise CRDTStateError(f"{out}: cannot be written: {exc.strerror}") from exc
    if not is_new:
        raise _exists(out)


def _write_over(path: Path, text: str) -> None:
    try:
        write_private(path.resolve(), f"{text}\n".encode())
    except OSError as exc:
        raise StoreError(path, f"cannot be written: {exc.strerror}") from exc


def _say_granted(certificate: Certificate) -> None:
    grants = ", ".join(map(_describe_grant, certificate.grants))
    note(f"{certificate.agent!r}: {grants}, until {_when(certificate.not_after_ms)}")


def _say_revoked(found: Revocation) -> None:
    stays = sum(writers.total for writers in map(Version, found.cuts.values()))
    kept = f"what stays of it: {count(stays, 'change')}" if stays else "nothing of it stays"
    note(f"{found.agent!r} ({show(found.key)[:16]}...) is revoked once this is taken in; {kept}")


def _describe_root(found: Authority) -> dict[str, Any]:
    now = _now_ms()
    return {
        "kind": "root",
        "mesh": to_text(found.root, MESH),
        "id": mesh_of(found.root).hex(),
        "secrets": [fingerprint(each) for each in found.secrets],
        "former": [fingerprint(each) for each in found.former],
        "invited": [
            {
                "agent": each.agent,
                "key": show(each.key),
                "until": _when(each.until_ms),
                "state": "revoked"
                if each.is_revoked
                else "expired"
                if each.until_ms <= now
                else "valid",
            }
            for each in found.invited.values()
        ],
    }


def _describe_member(path: Path) -> dict[str, Any]:
    found = open_credentials(path)
    told: dict[str, Any] = {"kind": "words" if found.kind == "secret" else "join token"}
    if found.root is not None:
        told["mesh"] = to_text(found.root, MESH)
    told["id"] = found.mesh.hex()
    if found.certificate is not None:
        told |= _describe_certificate(found.certificate)
    told["secrets"] = [fingerprint(each) for each in found.secrets]
    told["former"] = [fingerprint(each) for each in found.former]
    return told


def _describe_certificate(found: Certificate) -> dict[str, Any]:
    by = "the root" if not found.parent else f"a controller, {show(found.issuer)}"
    return {
        "agent": found.agent,
        "key": show(found.key),
        "roles": [_describe_grant(each) for each in found.grants],
        "from": _when(found.not_before_ms),
        "until": _when(found.not_after_ms),
        "state": _state(found),
        "invited by": by,
    }


def _state(found: Certificate) -> str:
    now = _now_ms()
    if is_valid_at(found, now, 0):
        return "valid"
    return "expired" if now >= found.not_after_ms else "not valid yet"


def _describe_grant(found: Grant) -> str:
    names = ", ".join(name for letter, name in ROLES.items() if letter in found.roles)
    return f"{found.pattern} ({names})"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return printable(", ".join(value)) or "none"
    return printable(str(value))


def _when(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds")
