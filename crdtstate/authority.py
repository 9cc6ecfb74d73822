"""
Who may invite: the root of a mesh, or a controller in its name.

The root's file holds the root key and the secrets of the mesh, and notes whom it has invited and
whose key was revoked, so that people can say names. It is needed to invite, to renew and to revoke,
and by nobody at any other time: it is kept off the machines of the mesh. A controller does the same
with its own join token; it keeps no notes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from crdtstate.certificates import (
    FORMER_MAX,
    SECRET_BYTES,
    SECRETS_MAX,
    SERIAL_BYTES,
    Certificate,
    Grant,
    JoinToken,
    check_agent,
    is_valid_at,
    issue,
)
from crdtstate.credentials import open_credentials
from crdtstate.errors import CorruptStore, StoreError, UsageError
from crdtstate.keys import create_private, read_private, write_private
from crdtstate.revocations import Cuts, Revocation, revoke
from crdtstate.signing import KEY_BYTES, PUBLIC, SECRET, from_text, public_of, to_text

FORMAT = 1
KIND = "mesh-root"
FILE_BYTES_MAX = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Invited:
    """What the root's file notes of an invitation.

    Attributes:
        agent: Whom.
        key: Its public key.
        until_ms: Until when the certificate is valid, in milliseconds since 1970.
        may_invite: Whether it is a controller, who invites others.
        is_revoked: Whether the key was revoked.
    """

    agent: str
    key: bytes
    until_ms: int
    may_invite: bool = False
    is_revoked: bool = False


@dataclass(slots=True, repr=False)
class Authority:
    """Signs invitations and revocations.

    Attributes:
        seed: The secret key that signs.
        root: The public key of the mesh's root.
        secrets: The secrets of the mesh, the newest first.
        former: Those that were in use before.
        certificate: A controller's; None for the root.
        invited: Whom the root has invited, by key, the newest last.
    """

    seed: bytes
    root: bytes
    secrets: tuple[bytes, ...]
    former: tuple[bytes, ...] = ()
    certificate: Certificate | None = None
    invited: dict[bytes, Invited] = field(default_factory=dict)

    def invite(
        self, agent: str, grants: list[Grant], now_ms: int, until_ms: int, key: bytes | None = None
    ) -> JoinToken:
        """Sign a certificate.

        Args:
            agent: For whom.
            grants: What it may do.
            now_ms: From when on it is valid,
            until_ms: and until when.
            key: The public key of an agent that has made it itself; otherwise one is made, and
                the token has it.

        Raises:
            UsageError: Nobody would believe it, or the key was revoked.
        """
        seed = secrets.token_bytes(KEY_BYTES) if key is None else b""
        public = public_of(seed) if key is None else key
        if (known := self.invited.get(public)) is not None and known.is_revoked:
            raise UsageError(f"the key of {agent!r} was revoked for ever; invite it with a new one")
        certificate = issue(
            self.seed,
            agent=agent,
            key=public,
            grants=grants,
            not_before_ms=now_ms,
            not_after_ms=until_ms,
            serial=self._serial(public),
            parent=self.certificate,
        )
        if self.certificate is None:
            self.invited.pop(public, None)
            self.invited[public] = Invited(agent, public, until_ms, certificate.is_controller)
        return JoinToken(self.root, self.secrets, self.former, seed, certificate)

    def _serial(self, key: bytes) -> bytes:
        """The serial of a key's certificates, always the same. The numbers of its writers follow
        from it (`authors`), so whoever makes a key must not know it beforehand."""
        secret = hashlib.blake2b(self.seed, digest_size=32, person=b"crdtstate/serial").digest()
        return hashlib.blake2b(key, key=secret, digest_size=SERIAL_BYTES).digest()

    def revoke(self, agent: str, key: bytes, cuts: Cuts, now_ms: int, reason: str) -> Revocation:
        """Sign a revocation. Raises UsageError if nobody would believe it."""
        found = revoke(
            self.seed,
            agent=agent,
            key=key,
            cuts=cuts,
            at_ms=now_ms,
            reason=reason,
            by=self.certificate,
        )
        if self.certificate is None:
            known = self.invited.get(key, Invited(agent, key, 0, may_invite=True))
            self.invited[key] = replace(known, is_revoked=True)
        return found

    def rotate(self) -> None:
        """Put a new secret above the one in use; that one goes on working beside it."""
        found = (secrets.token_bytes(SECRET_BYTES), *self.secrets)
        self.secrets, old = found[:SECRETS_MAX], found[SECRETS_MAX:]
        self.former = (*old, *self.former)[:FORMER_MAX]

    def retire(self) -> None:
        """Admit only the newest secret from now on."""
        self.former = (*self.secrets[1:], *self.former)[:FORMER_MAX]
        self.secrets = self.secrets[:1]

    def keys_of(self, agent: str) -> list[Invited]:
        """The keys of an agent that the root has invited, and not revoked, the newest last."""
        return [i for i in self.invited.values() if i.agent == agent and not i.is_revoked]

    def encode(self) -> bytes:
        """The root's file."""
        content: dict[str, Any] = {
            "v": FORMAT,
            "kind": KIND,
            "ed25519": to_text(self.seed, SECRET),
            "secrets": [to_text(each, SECRET) for each in self.secrets],
            "former": [to_text(each, SECRET) for each in self.former],
            "invited": [
                [i.agent, to_text(i.key, PUBLIC), i.until_ms, i.may_invite, i.is_revoked]
                for i in self.invited.values()
            ],
        }
        return json.dumps(content, indent=1).encode()

    def __repr__(self) -> str:
        who = "root" if self.certificate is None else repr(self.certificate)
        return f"<Authority {who}: {len(self.invited)} invited>"


def create_root(path: Path) -> Authority:
    """Make a mesh: its root key, its first secret, and the file with both.

    Raises:
        UsageError: The file exists; it was not altered.
        StoreError: It cannot be written.
    """
    seed = secrets.token_bytes(KEY_BYTES)
    made = Authority(seed, public_of(seed), (secrets.token_bytes(SECRET_BYTES),))
    try:
        is_new = create_private(path, made.encode())
    except OSError as exc:
        raise StoreError(path, f"the root key cannot be written: {exc.strerror}") from exc
    if not is_new:
        raise UsageError(f"{path} exists, and a root key is never written over; name another file")
    return made


def open_authority(path: Path, now_ms: int) -> Authority:
    """What a root's file, or the token file of a controller, may sign.

    Raises:
        UsageError: It is of a member that is no controller, or is not valid now.
        StoreError: It cannot be read, or others may read it. Says what to do.
    """
    found = read_root(path)
    if found is not None:
        return found
    member = open_credentials(path)
    certificate = member.certificate
    if certificate is None or member.root is None:
        raise UsageError(f"{path} is no root's file, and no join token of a controller")
    if not certificate.is_controller:
        raise UsageError(
            f"{path} is the join token of {certificate.agent!r}, which is no controller; "
            "take the root's file"
        )
    if not is_valid_at(certificate, now_ms, 0):
        raise UsageError(f"{path}: the certificate of {certificate.agent!r} is not valid now")
    seed = member.keyring(None).seed
    return Authority(seed, member.root, member.secrets, member.former, certificate)


def read_root(path: Path) -> Authority | None:
    """Read a root's file; None if it is another file.

    Raises:
        StoreError: It cannot be read, or others may read it. Says what to do.
    """
    try:
        data = read_private(path, FILE_BYTES_MAX, "root key")
    except FileNotFoundError as exc:
        raise StoreError(
            path, "there is no such file; crdtstate mesh create and crdtstate invite make some"
        ) from exc
    except (OSError, ValueError) as exc:
        raise StoreError(path, f"the root key cannot be read: {exc}") from exc
    if not data.startswith(b"{"):
        return None
    try:
        return _decode(json.loads(data))
    except (ValueError, TypeError, LookupError, AttributeError) as exc:
        hint = "restore it from a copy"
        raise CorruptStore(path, f"is no root's file ({type(exc).__name__}); {hint}") from None


def _decode(found: Any) -> Authority:
    if found["v"] != FORMAT or found["kind"] != KIND:
        raise ValueError("a newer version may have written it")
    seed = from_text(found["ed25519"], SECRET)
    known, former = ([from_text(e, SECRET) for e in found[name]] for name in ("secrets", "former"))
    if not 0 < len(known) <= SECRETS_MAX or len(former) > FORMER_MAX:
        raise ValueError("it has no secret, or too many")
    invited = {}
    for agent, text, until_ms, may_invite, is_revoked in found["invited"]:
        check_agent(agent)
        key = from_text(text, PUBLIC)
        invited[key] = Invited(agent, key, int(until_ms), may_invite is True, is_revoked is True)
    return Authority(seed, public_of(seed), tuple(known), tuple(former), None, invited)


@contextmanager
def changing(path: Path, now_ms: int) -> Iterator[Authority]:
    """An authority whose notes are written back, also if several processes invite at once; not if
    the block raises. Raises what `open_authority` does."""
    with _locked(path):
        found = open_authority(path, now_ms)
        yield found
        if found.certificate is None:
            try:
                # Written where a link leads to, not over the link.
                write_private(path.resolve(), found.encode())
            except OSError as exc:
                reason = f"whom was invited cannot be noted: {exc.strerror}"
                raise StoreError(path, reason) from exc


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. The file is replaced by each, so its directory is what they lock."""
    try:
        directory = os.open(path.resolve().parent, os.O_RDONLY)
    except OSError as exc:
        raise StoreError(path, f"cannot be read: {exc.strerror}") from exc
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)
