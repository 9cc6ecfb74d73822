"""
Certificates: who is a member of a mesh, under which name and key, and what it may do.

A mesh has a *root* key, kept offline. It signs a certificate for each member, which names the
member's agent, its key, and its *grants*: roles for documents by pattern.

    f  forward    pass on changes of others, without reading them (a relay)
    r  read       includes forwarding
    w  write      includes reading
    s  snapshot   be believed when it hands others a snapshot; includes reading
    c  control    command the mesh, invite and revoke; of the whole mesh only (``*``)

A pattern is a document's name, ``plan*`` for all names that begin with plan, or ``*`` for all
(``plan/**`` is the same as ``plan/*``). Documents of the system (``@...``) go with the others: who
may read or write anything may read or write them. But ``@mesh``, which says who was revoked, is
every member's to read, and only who controls may write it.

A controller invites in the name of the root: its own certificate is then part of the one that it
signs, and what it grants can only be less than what it has. A chain has two certificates at most.

A certificate is checked over the bytes that came, and never encoded again: msgpack has several
spellings of one value. Time is not checked here but by `is_valid_at`. What an agent is handed is a
`JoinToken`: its certificate, its secret key, and the secrets of the mesh that keep strangers out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack

from crdtstate.errors import InvalidCertificate, UsageError
from crdtstate.signing import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    from_text,
    is_weak,
    public_of,
    sign,
    to_text,
    verify,
)

FORWARD, READ, WRITE, SNAPSHOT, CONTROL = "f", "r", "w", "s", "c"
ROLES = {
    FORWARD: "forward",
    READ: "read",
    WRITE: "write",
    SNAPSHOT: "snapshot",
    CONTROL: "control",
}
"""The roles, and what they are called."""

_INCLUDED = {
    FORWARD: {FORWARD},
    READ: {FORWARD, READ},
    WRITE: {FORWARD, READ, WRITE},
    SNAPSHOT: {FORWARD, READ, SNAPSHOT},
    CONTROL: {CONTROL},
}

FORMAT = 1
PURPOSE = "certificate/1"
JOIN = "crdtjoin1"

MESH = "@mesh"
"""The document of revocations."""

CONTROLLED = (MESH, "@quarantine", "@electorate")
"""Documents that only controllers write: there it is told what counts."""

SYSTEM = "@"
ALL = "*"

CERTIFICATE_BYTES_MAX = 3840
"""With the certificate that it stands on. A message of the handshake has 4 KiB, and it has to fit
in there with its proof."""

GRANTS_MAX = 32
AGENT_CHARS_MAX = 100
PATTERN_CHARS_MAX = 200
TIME_MS_MAX = 2**53
SERIAL_BYTES = 16

SECRET_BYTES = 32
SECRETS_MAX = 2
"""Secrets of a mesh that are in use: one, and while it is replaced another."""

FORMER_MAX = 6
"""Secrets that were in use before: what was proven with them is still believed."""

SKEW_MS = 300_000
"""By so much clocks may differ."""

TOKEN_CHARS_MAX = 8192


class Grant(NamedTuple):
    """Roles for the documents that a pattern names; those that are included are among them."""

    pattern: str
    roles: frozenset[str]

    def covers(self, document: str) -> bool:
        """Whether the pattern names this document."""
        return _covers(self.pattern, document)

    def __str__(self) -> str:
        plain = self.roles - {FORWARD} if READ in self.roles else self.roles
        return f"{self.pattern}:{''.join(role for role in ROLES if role in plain)}"


@dataclass(frozen=True, slots=True, repr=False)
class Certificate:
    """Who a member is, signed by the root of its mesh, or by a controller.

    Attributes:
        mesh: Which mesh, `mesh_of` its root key.
        agent: The agent's name, the only one that it may use.
        key: Its public key.
        grants: What it may do.
        not_before_ms: From when on it is valid, in milliseconds since 1970;
        not_after_ms: and until when.
        serial: 16 bytes that nobody knew before, the same for all of one key by one issuer.
        issuer: The public key of who signed: the root's, or that of the certificate `parent`.
        parent: The certificate of a controller, encoded; empty if the root signed.
        data: The bytes that were signed, and the signature.
    """

    mesh: bytes
    agent: str
    key: bytes
    grants: tuple[Grant, ...]
    not_before_ms: int
    not_after_ms: int
    serial: bytes
    issuer: bytes
    parent: bytes
    data: bytes

    def allows(self, role: str, document: str) -> bool:
        """Whether its holder has a role for a document."""
        if not document.startswith(SYSTEM):
            return any(role in roles and _covers(each, document) for each, roles in self.grants)
        if document == MESH and role in (FORWARD, READ):
            # Whoever is a member has to know who is one no more.
            return True
        is_controlled = role == WRITE and document in CONTROLLED
        return self.is_controller or (self._has(role) and not is_controlled)

    @property
    def is_controller(self) -> bool:
        """Whether its holder may command, invite and revoke."""
        return self._has(CONTROL)

    def _has(self, role: str) -> bool:
        return any(role in roles for _, roles in self.grants)

    def __repr__(self) -> str:
        grants = " ".join(map(str, self.grants))
        return f"<Certificate {self.agent!r} {fingerprint(self.key)} {grants}>"


def mesh_of(root: bytes) -> bytes:
    """The id of a mesh, 32 bytes: a hash of its root key."""
    return hashlib.blake2b(root, digest_size=32, person=b"crdtstate/mesh/1").digest()


def fingerprint(key: bytes) -> str:
    """What to call a key, or a secret, where it may be read by others: 16 hexadecimal digits."""
    return hashlib.blake2b(key, digest_size=8, person=b"crdtstate/name/1").hexdigest()


def is_valid_at(certificate: Certificate, ms: int, skew_ms: int = SKEW_MS) -> bool:
    """Whether a certificate is valid at a time, in milliseconds since 1970, by a clock that may be
    wrong by *skew_ms*."""
    return certificate.not_before_ms - skew_ms <= ms < certificate.not_after_ms + skew_ms


def parse_grant(text: str) -> Grant:
    """Read ``PATTERN:ROLES``, such as ``plan/**:rw``. Raises UsageError."""
    pattern, separator, letters = text.rpartition(":")
    if not separator or not letters:
        raise UsageError(f"{text!r} is no PATTERN:ROLES such as 'plan/**:rw'")
    if unknown := sorted(set(letters) - ROLES.keys()):
        known = ", ".join(f"{letter} ({name})" for letter, name in ROLES.items())
        raise UsageError(f"{text!r}: there is no role {unknown[0]!r}; the roles are {known}")
    if pattern.endswith("**"):
        pattern = pattern[:-1]
    try:
        return _grant(pattern, letters)
    except ValueError as exc:
        raise UsageError(f"{text!r}: {exc}") from None


def issue(
    seed: bytes,
    *,
    agent: str,
    key: bytes,
    grants: Iterable[Grant],
    not_before_ms: int,
    not_after_ms: int,
    serial: bytes,
    parent: Certificate | None = None,
) -> Certificate:
    """Sign a certificate.

    Args:
        seed: The secret key of the root, or of the controller whose certificate is *parent*.

    Raises:
        UsageError: Nobody would believe it; the message says why.
    """
    issuer = public_of(seed)
    root = issuer if parent is None else _root_of(parent)
    fields = [
        FORMAT,
        mesh_of(root),
        agent,
        key,
        [[each.pattern, "".join(sorted(each.roles))] for each in grants],
        not_before_ms,
        not_after_ms,
        serial,
        issuer,
        b"" if parent is None else parent.data,
    ]
    try:
        check_agent(agent)
        body: bytes = msgpack.packb(fields)
        return _decode(body + sign(seed, PURPOSE, body), root, is_parent=False)
    except (ValueError, TypeError, OverflowError) as exc:
        raise UsageError(f"a certificate for {agent!r} cannot be made: {exc}") from None


def decode_certificate(data: bytes, root: bytes) -> Certificate:
    """Read a certificate, and check all of it but the time.

    Args:
        data: The bytes as they came.
        root: The public key of the mesh's root.

    Raises:
        InvalidCertificate: The root has not signed it, or none whom it allowed to; or it is
            malformed, or grants what it cannot.
    """
    try:
        return _decode(data, root, is_parent=False)
    except ValueError as exc:
        raise InvalidCertificate(str(exc)) from None


def read_certificate(data: bytes) -> Certificate:
    """Read a certificate that was checked before: nothing is proven by it. Raises
    InvalidCertificate."""
    try:
        return _read(data)
    except ValueError as exc:
        raise InvalidCertificate(str(exc)) from None


def _decode(data: bytes, root: bytes, *, is_parent: bool) -> Certificate:
    """Read and check a certificate. Raises ValueError."""
    found, parent = _read(data), None
    if found.mesh != mesh_of(root):
        raise ValueError("it is of another mesh")
    if found.issuer != root:
        if is_parent or not found.parent:
            raise ValueError("it is not signed by the root of this mesh, nor by a controller")
        parent = _decode(found.parent, root, is_parent=True)
    elif found.parent:
        raise ValueError("the root signs in its own name")
    body, signature = data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]
    if not verify(PURPOSE, body, signature, found.issuer):
        raise ValueError("its signature is wrong")
    if is_weak(found.key):
        raise ValueError("its key is weak: a signature would prove nothing")
    if found.key in (root, found.issuer):
        raise ValueError("its key is that of who signed it; each member has a key of its own")
    if parent is not None:
        _check_narrows(found, parent)
    return found


def _check_narrows(child: Certificate, parent: Certificate) -> None:
    if not parent.is_controller or parent.key != child.issuer:
        raise ValueError("who signed it is no controller")
    if child.not_after_ms > parent.not_after_ms or child.not_before_ms < parent.not_before_ms:
        raise ValueError("it would be valid when that of the controller who signed it is not")
    for pattern, roles in child.grants:
        for role in roles:
            if not any(role in has and _covers(of, pattern) for of, has in parent.grants):
                what = f"the role {ROLES[role]!r} for {pattern!r}"
                raise ValueError(f"it grants {what}, which the controller who signed it has not")


def _read(data: bytes) -> Certificate:
    if not isinstance(data, bytes) or not SIGNATURE_BYTES < len(data) <= CERTIFICATE_BYTES_MAX:
        raise ValueError(f"a certificate has at most {CERTIFICATE_BYTES_MAX} bytes")
    fields = unpack_bounded(data[:-SIGNATURE_BYTES], CERTIFICATE_BYTES_MAX)
    if type(fields) is not list or len(fields) != 10 or fields[0] != FORMAT:
        raise ValueError("it is no certificate that this version reads")
    _, mesh, agent, key, grants, before, after, serial, issuer, parent = fields
    sizes = ((mesh, 32), (key, KEY_BYTES), (issuer, KEY_BYTES), (serial, SERIAL_BYTES))
    for value, size in (*sizes, (parent, None)):
        _check_bytes(value, size)
    check_agent(agent)
    for time in (before, after):
        if type(time) is not int or not 0 <= time <= TIME_MS_MAX:
            raise ValueError("its time is none")
    if before >= after:
        raise ValueError("it ends before it begins")
    if type(grants) is not list or not 0 < len(grants) <= GRANTS_MAX:
        raise ValueError(f"it has 1 to {GRANTS_MAX} grants")
    if not all(type(each) is list and len(each) == 2 for each in grants):
        raise ValueError("a grant is a pattern and roles")
    given = tuple(_grant(pattern, letters) for pattern, letters in grants)
    return Certificate(mesh, agent, key, given, before, after, serial, issuer, parent, data)


def _grant(pattern: Any, letters: Any) -> Grant:
    if type(pattern) is not str or not 0 < len(pattern) <= PATTERN_CHARS_MAX:
        raise ValueError(f"a pattern has 1 to {PATTERN_CHARS_MAX} characters")
    if not pattern.isprintable():
        raise ValueError("a pattern is made of printable characters")
    if ALL in pattern[:-1]:
        raise ValueError("a pattern has * at its end only, as in 'plan/*'")
    if pattern.startswith(SYSTEM):
        raise ValueError("documents of the system go with the others, and are not granted")
    if type(letters) is not str or not letters or set(letters) - ROLES.keys():
        raise ValueError(f"roles are letters of {''.join(ROLES)!r}")
    if CONTROL in letters and pattern != ALL:
        raise ValueError("who controls, controls the whole mesh: '*:c'")
    return Grant(pattern, frozenset().union(*(_INCLUDED[letter] for letter in letters)))


def _covers(pattern: str, name: str) -> bool:
    """Whether all that *name* names, a document or a pattern, is among what *pattern* does."""
    if pattern.endswith(ALL):
        return name.startswith(pattern[:-1])
    return name == pattern


def _root_of(certificate: Certificate) -> bytes:
    """The root key of a checked certificate."""
    return _read(certificate.parent).issuer if certificate.parent else certificate.issuer


def check_agent(agent: object) -> None:
    """Raise ValueError if this is no agent's name."""
    if type(agent) is not str or not 0 < len(agent) <= AGENT_CHARS_MAX or not agent.isprintable():
        raise ValueError(f"an agent's name has 1 to {AGENT_CHARS_MAX} printable characters")


def unpack_bounded(data: bytes, size_max: int) -> Any:
    """Unpack msgpack without maps and extensions, in which nothing is larger than its bytes can
    hold. Raises ValueError."""
    try:
        return msgpack.unpackb(
            data,
            max_str_len=size_max,
            max_bin_len=size_max,
            max_array_len=size_max,
            max_map_len=0,
            max_ext_len=0,
        )
    except Exception as exc:
        raise ValueError("it is not valid msgpack") from exc


def _check_bytes(value: object, size: int | None) -> None:
    if type(value) is not bytes or size not in (None, len(value)):
        raise ValueError("it is malformed")


# Join tokens


@dataclass(frozen=True, slots=True, repr=False)
class JoinToken:
    """What an agent needs to be a member. It is secret, and is shown by fingerprints only.

    Attributes:
        root: The public key of the mesh's root.
        secrets: The secrets of the mesh, the newest first, 32 bytes each.
        former: Those that were in use before.
        seed: The agent's secret key; empty if the agent has made one itself.
        certificate: Its certificate.
    """

    root: bytes
    secrets: tuple[bytes, ...]
    former: tuple[bytes, ...]
    seed: bytes
    certificate: Certificate

    def encode(self) -> str:
        """The token as text. Whoever has it is the member."""
        fields = [FORMAT, self.root, self.secrets, self.former, self.seed, self.certificate.data]
        return to_text(msgpack.packb(fields), JOIN)

    def __repr__(self) -> str:
        secrets = " ".join(map(fingerprint, self.secrets))
        return f"<JoinToken {self.certificate!r} secrets {secrets}>"


def decode_token(text: str) -> JoinToken:
    """Read a join token, and check all of it but the time. The text is never told.

    Raises:
        InvalidCertificate: It is none, or its certificate is not to be believed.
    """
    try:
        if not isinstance(text, str) or len(text) > TOKEN_CHARS_MAX:
            raise ValueError("it is too long")
        data = from_text(text, JOIN, None)
        fields = unpack_bounded(data, len(data))
        if type(fields) is not list or len(fields) != 6 or fields[0] != FORMAT:
            raise ValueError("this version does not read it")
        _, root, secrets, former, seed, encoded = fields
        for value, size in ((root, KEY_BYTES), (seed, None), (encoded, None)):
            _check_bytes(value, size)
        _check_secrets(secrets, 1, SECRETS_MAX)
        _check_secrets(former, 0, FORMER_MAX)
        if len(seed) not in (0, KEY_BYTES):
            raise ValueError("its key is none")
        if is_weak(root):
            raise ValueError("the root key of its mesh is weak")
    except ValueError as exc:
        raise InvalidCertificate(f"a join token is not as it was written: {exc}") from None
    certificate = decode_certificate(encoded, root)
    if seed and public_of(seed) != certificate.key:
        raise InvalidCertificate("a join token's key is not that of its certificate")
    return JoinToken(root, tuple(secrets), tuple(former), seed, certificate)


def _check_secrets(secrets: object, least: int, most: int) -> None:
    if type(secrets) is not list or not least <= len(secrets) <= most:
        raise ValueError("it has too many secrets, or none")
    for each in secrets:
        _check_bytes(each, SECRET_BYTES)
