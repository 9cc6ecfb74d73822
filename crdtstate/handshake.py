"""
The handshake: four messages before the first frame, in which both sides prove that they belong.

    1  dialler -> listener   [1, kind, nonce, ids of the secrets it knows]
    2  listener -> dialler   [1, nonce, id, MAC(secret, "listener", all so far)]
    3  dialler -> listener   [MAC(secret, "dialler", all so far), certificate, signature]
    4  listener -> dialler   [certificate, signature]

First the mesh's *secret* is proved, then, where there are certificates, who one is: each side signs
what was said so far, and its certificate. Nothing is told to who does not know the secret: a
listener answers every first message alike (to a stranger with a random MAC), and whatever is wrong
is the same failure with the same text. Nonces make a recording worthless, labels a reflection, and
as everything said is under the MACs, nothing can be taken off it: not the version, not the kind.
Over TLS the server's certificate is under them too (the *channel*), so that nobody sits in between.
The shape is SIGMA's (Krawczyk 2003) with a shared secret in place of Diffie-Hellman: what is
confidential is so by TLS.

Sans-I/O: bytes in, bytes out; randomness and time are arguments.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgpack

from crdtstate.certificates import Certificate, decode_certificate, is_valid_at
from crdtstate.errors import NotAdmitted, ProtocolError
from crdtstate.signing import verify

VERSION = 1
NONCE_BYTES = 32
ID_BYTES = 8
MAC_BYTES = 32
IDS_MAX = 2
"""Secrets that are tried: while one is replaced, there are two."""

MESSAGE_BYTES_MAX = 4096

FAILED = "not admitted"
"""What every failure says, whatever it was."""


class Credentials(Protocol):
    """What one side can prove, and of whom it believes what."""

    @property
    def kind(self) -> str:
        """``"host"``, ``"secret"`` or ``"member"``: only equals meet."""

    @property
    def root(self) -> bytes | None:
        """The mesh's root key, if there are certificates."""

    @property
    def certificate(self) -> Certificate | None:
        """The own one, for ``"member"``."""

    @property
    def secrets(self) -> tuple[bytes, ...]:
        """The mesh's secrets, 32 bytes each, newest first."""
        raise NotImplementedError

    def sign(self, purpose: str, message: bytes) -> bytes:
        """Sign with the key that the certificate names."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is at the other end, as far as it was proved.

    Attributes:
        agent: The only name it may use; None: it proved to be of the mesh, and no more.
        certificate: What says so.
    """

    agent: str | None = None
    certificate: Certificate | None = None


ANYBODY = Identity()


class _Side:
    """What both sides do."""

    def __init__(
        self, credentials: Credentials, nonce: bytes, wall_ms: int, channel: bytes
    ) -> None:
        assert len(nonce) == NONCE_BYTES, f"a nonce of {len(nonce)} bytes"
        self._credentials = credentials
        self._nonce = nonce
        self._wall_ms = wall_ms
        self._channel = channel
        self._secrets = {secret_id(secret): secret for secret in credentials.secrets[:IDS_MAX]}
        # Id of the secret -> the secret; what was said so far, of which later proofs are made.
        self._secret = b""
        self._said: list[bytes] = []
        # Which message comes next; a machine that failed takes none.
        self._step = 0

    def _expect(self, step: int) -> None:
        if self._step != step:
            raise NotAdmitted(FAILED)
        self._step = -1  # until this one is found right

    def _mac(self, label: str, parts: Sequence[bytes] = ()) -> bytes:
        body = _pack([label, self._channel, *self._said, *parts])
        return hashlib.blake2b(
            body, digest_size=MAC_BYTES, key=self._secret, person=b"crdt/handshake/1"
        ).digest()

    def _introduce(self, label: str) -> list[bytes]:
        """The own certificate, and the signature that goes with it; both empty without one."""
        mine = self._credentials.certificate
        if mine is None:
            return [b"", b""]
        return [mine.data, self._credentials.sign(f"handshake/{label}/1", self._signed(mine.data))]

    def _identify(self, label: str, data: bytes, signature: bytes) -> Identity:
        """Who the other side is. Raises NotAdmitted."""
        root = self._credentials.root
        if root is None:
            if data or signature:
                raise NotAdmitted(FAILED)
            return ANYBODY
        certificate = decode_certificate(data, root)
        signed = self._signed(data)
        if not verify(f"handshake/{label}/1", signed, signature, certificate.key):
            raise NotAdmitted(FAILED)
        if not is_valid_at(certificate, self._wall_ms):
            raise NotAdmitted(FAILED)
        return Identity(certificate.agent, certificate)

    def _signed(self, certificate: bytes) -> bytes:
        return _pack([self._channel, *self._said, certificate])


class Dialler(_Side):
    """The side that dialled: `greet`, send; `prove` what comes, send; `finish` with what comes.

    Args:
        credentials: What it can prove.
        nonce: 32 random bytes, never used before.
        wall_ms: Now, since 1970: certificates have to be valid.
        channel: SHA-256 of the certificate that the server showed; empty without TLS.

    Raises:
        NotAdmitted: From each method: the other side is not of the mesh, or is not who it says.
    """

    def greet(self) -> bytes:
        """The first message."""
        ids = list(self._secrets)
        first = _pack([VERSION, self._credentials.kind, self._nonce, ids])
        self._said.append(first)
        self._step = 2
        return first

    def prove(self, message: bytes) -> bytes:
        """Take the second message, make the third. From here on the other side has proved that it
        knows the secret."""
        self._expect(2)
        version, nonce, chosen, mac = _read(message, (int, bytes, bytes, bytes))
        secret = self._secrets.get(chosen)
        if version != VERSION or len(nonce) != NONCE_BYTES or secret is None:
            raise NotAdmitted(FAILED)
        self._secret = secret
        if not hmac.compare_digest(mac, self._mac("listener", [nonce, chosen])):
            raise NotAdmitted(FAILED)
        self._said.append(message)
        third = _pack([self._mac("dialler"), *self._introduce("dialler")])
        self._said.append(third)
        self._step = 4
        return third

    def finish(self, message: bytes) -> Identity:
        """Take the fourth message, which says who listens."""
        self._expect(4)
        certificate, signature = _read(message, (bytes, bytes))
        found = _checked(self._identify, "listener", certificate, signature)
        self._step = 0
        return found


class Listener(_Side):
    """The side that was dialled: `answer` what comes, send; `admit` what comes, send.

    Args:
        credentials: What it can prove.
        nonce: 32 random bytes, never used before.
        wall_ms: Now, since 1970: certificates have to be valid.
        channel: SHA-256 of the own TLS certificate; empty without TLS.
        decoy: 32 other random bytes, for strangers.

    Raises:
        NotAdmitted: From each method: the other side is not of the mesh, or is not who it says.
    """

    def __init__(
        self,
        credentials: Credentials,
        nonce: bytes,
        wall_ms: int,
        channel: bytes,
        decoy: bytes,
    ) -> None:
        super().__init__(credentials, nonce, wall_ms, channel)
        self._decoy = decoy
        self._step = 1

    def answer(self, message: bytes) -> bytes:
        """Take the first message, make the second; to strangers one that looks the same."""
        self._expect(1)
        version, kind, nonce, ids = _read(message, (int, str, bytes, list))
        is_sound = all(type(each) is bytes and len(each) == ID_BYTES for each in ids)
        if len(nonce) != NONCE_BYTES or not 0 < len(ids) <= IDS_MAX or not is_sound:
            raise NotAdmitted(FAILED)
        self._said.append(message)
        known = next((each for each in self._secrets if each in ids), None)
        if known is None or version != VERSION or kind != self._credentials.kind:
            # No secret: a key that nobody has makes the third message fail.
            chosen, self._secret = ids[0], self._decoy
        else:
            chosen, self._secret = known, self._secrets[known]
        mac = self._mac("listener", [self._nonce, chosen])
        second = _pack([VERSION, self._nonce, chosen, mac])
        self._said.append(second)
        self._step = 3
        return second

    def admit(self, message: bytes) -> tuple[bytes, Identity]:
        """Take the third message, make the fourth; the other side is who it says."""
        self._expect(3)
        mac, certificate, signature = _read(message, (bytes, bytes, bytes))
        if not hmac.compare_digest(mac, self._mac("dialler")):
            raise NotAdmitted(FAILED)
        found = _checked(self._identify, "dialler", certificate, signature)
        self._said.append(message)
        self._step = 0
        return _pack(self._introduce("listener")), found


def secret_id(secret: bytes) -> bytes:
    """The name of a secret, which tells nothing of it."""
    return hashlib.blake2b(secret, digest_size=ID_BYTES, person=b"crdt/secret-id/1").digest()


def _checked(identify: Any, label: str, certificate: bytes, signature: bytes) -> Identity:
    try:
        found: Identity = identify(label, certificate, signature)
    except ProtocolError:
        raise NotAdmitted(FAILED) from None
    return found


def _pack(content: list[Any]) -> bytes:
    packed: bytes = msgpack.packb(content)
    return packed


def _read(message: bytes, kinds: tuple[type, ...]) -> list[Any]:
    """The fields of a message that is spelled as `_pack` spells it: there is one spelling."""
    if len(message) > MESSAGE_BYTES_MAX:
        raise NotAdmitted(FAILED)
    try:
        found = msgpack.unpackb(message, strict_map_key=True, max_array_len=8, max_map_len=0)
        if type(found) is not list or tuple(map(type, found)) != kinds or _pack(found) != message:
            raise NotAdmitted(FAILED)
    except NotAdmitted:
        raise
    except Exception:
        # Whatever msgpack finds wrong: it raises a dozen things.
        raise NotAdmitted(FAILED) from None
    return found
