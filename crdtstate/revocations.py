"""
Revocations: keys that are members no more, and what stays of what they wrote.

The root or a controller signs a *revocation* of a key. It holds for ever: an agent that comes back
is invited with a new key. Its *cuts* name, by document and writer, the last change that stays;
later ones are hidden wherever they turn up, also if they were written before, or are said to have
been. A writer that is not named keeps nothing. Of several revocations of one key the lowest cuts
hold, so it does not matter who hears of which first: merging is commutative, associative and
idempotent.

Whom a revoked controller had invited is revoked with it, by the same cuts, as nobody can tell when
it signed that. Revocations of the root and of controllers count alike, also those by a controller
that was revoked since: of two that revoke each other, both are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from crdtstate.certificates import (
    Certificate,
    check_agent,
    decode_certificate,
    fingerprint,
    mesh_of,
    unpack_bounded,
)
from crdtstate.clock import SEQ_MAX, WRITER_MAX, Version
from crdtstate.errors import InvalidCertificate, InvalidRevocation, UsageError
from crdtstate.signing import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    from_text,
    public_of,
    sign,
    to_text,
    verify,
)

FORMAT = 1
PURPOSE = "revocation/1"
PREFIX = "crdtrevoke1"

REVOCATION_BYTES_MAX = 256 * 1024
DOCUMENT_CHARS_MAX = 200
REASON_CHARS_MAX = 500
TIME_MS_MAX = 2**53

KEYS_MAX = 100_000
"""Revoked keys that a replica keeps; who invites that many has another trouble."""

ROOT_STAYS = "the root cannot be revoked; make a new mesh"

Cuts = Mapping[str, Mapping[int, int]]
"""Document -> writer -> the seq of its last change that stays. What is not named keeps nothing."""


@dataclass(frozen=True, slots=True, repr=False)
class Revocation:
    """That a key is a member no more, signed by the root or a controller.

    Attributes:
        mesh: Which mesh.
        agent: Whose key it was, for people; the key counts.
        key: The public key that is revoked.
        cuts: What stays.
        at_ms: When it was signed, in milliseconds since 1970.
        reason: Why, for people.
        by: The certificate of the controller who signed it, encoded; empty for the root.
        data: The bytes that were signed, and the signature.
    """

    mesh: bytes
    agent: str
    key: bytes
    cuts: Cuts
    at_ms: int
    reason: str
    by: bytes
    data: bytes

    def keeps(self, document: str, writer: int, seq: int) -> bool:
        """Whether a change of the key's owner stays."""
        return keeps(self.cuts, document, writer, seq)

    def encode(self) -> str:
        """The revocation as text."""
        return to_text(self.data, PREFIX)

    def __repr__(self) -> str:
        return f"<Revocation {self.agent!r} {fingerprint(self.key)}>"


def keeps(cuts: Cuts, document: str, writer: int, seq: int) -> bool:
    """Whether a change stays, by *cuts*."""
    return seq <= cuts.get(document, {}).get(writer, 0)


def merge(one: Cuts, other: Cuts) -> dict[str, Version]:
    """The cuts of two revocations of one key: of each writer the lowest."""
    found = {
        document: Version(
            (writer, min(seq, other[document][writer]))
            for writer, seq in writers.items()
            if writer in other[document]
        )
        for document, writers in one.items()
        if document in other
    }
    return {document: writers for document, writers in found.items() if writers}


def revoke(
    seed: bytes,
    *,
    agent: str,
    key: bytes,
    cuts: Cuts,
    at_ms: int,
    reason: str = "",
    by: Certificate | None = None,
) -> Revocation:
    """Sign a revocation.

    Args:
        seed: The secret key of the root, or of the controller whose certificate is *by*.

    Raises:
        UsageError: Nobody would believe it; the message says why.
    """
    issuer = public_of(seed)
    flat = [[name, Version(cuts[name]).flat()] for name in sorted(cuts) if cuts[name]]
    mesh = mesh_of(issuer) if by is None else by.mesh
    signer = b"" if by is None else by.data
    try:
        check_agent(agent)
        body: bytes = msgpack.packb([FORMAT, mesh, agent, key, flat, at_ms, reason, signer])
        found = _read(body + sign(seed, PURPOSE, body))
        if by is not None and (by.key != issuer or not by.is_controller):
            raise ValueError("who signs it is no controller")
        if by is None and key == issuer:
            raise ValueError(ROOT_STAYS)
        return found
    except (ValueError, TypeError, OverflowError) as exc:
        raise UsageError(f"a revocation of {agent!r} cannot be made: {exc}") from None


def decode_revocation(data: bytes | str, root: bytes) -> Revocation:
    """Read a revocation, as bytes or text, and check all of it.

    Args:
        data: The bytes as they came, or the text.
        root: The public key of the mesh's root.

    Raises:
        InvalidRevocation: Neither the root nor a controller has signed it, or it is malformed.
    """
    try:
        if isinstance(data, str):
            if len(data) > 2 * REVOCATION_BYTES_MAX:
                raise ValueError("it is too long")
            data = from_text(data, PREFIX, None)
        found = _read(data)
        if found.mesh != mesh_of(root):
            raise ValueError("it is of another mesh")
        signer = _signer(found.by, root)
        if not verify(PURPOSE, data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:], signer):
            raise ValueError("its signature is wrong")
        if found.key == root:
            raise ValueError(ROOT_STAYS)
        return found
    except (ValueError, InvalidCertificate) as exc:
        raise InvalidRevocation(str(exc)) from None


def _signer(by: bytes, root: bytes) -> bytes:
    """The key of who signed. A certificate need not be valid now, only to have been given."""
    if not by:
        return root
    certificate = decode_certificate(by, root)
    if not certificate.is_controller:
        raise ValueError("who signed it is no controller")
    return certificate.key


def _read(data: bytes) -> Revocation:
    if not isinstance(data, bytes) or not SIGNATURE_BYTES < len(data) <= REVOCATION_BYTES_MAX:
        raise ValueError(f"a revocation has at most {REVOCATION_BYTES_MAX} bytes")
    fields = unpack_bounded(data[:-SIGNATURE_BYTES], REVOCATION_BYTES_MAX)
    if type(fields) is not list or len(fields) != 8 or fields[0] != FORMAT:
        raise ValueError("it is none that this version reads")
    _, mesh, agent, key, flat, at_ms, reason, by = fields
    if type(mesh) is not bytes or type(by) is not bytes:
        raise ValueError("it is malformed")
    if type(key) is not bytes or len(key) != KEY_BYTES:
        raise ValueError("it names no key")
    check_agent(agent)
    if type(at_ms) is not int or not 0 <= at_ms <= TIME_MS_MAX:
        raise ValueError("its time is none")
    if type(reason) is not str or len(reason) > REASON_CHARS_MAX:
        raise ValueError(f"a reason has at most {REASON_CHARS_MAX} characters")
    return Revocation(mesh, agent, key, _read_cuts(flat), at_ms, reason, by, data)


def _read_cuts(flat: Any) -> dict[str, Version]:
    cuts: dict[str, Version] = {}
    if type(flat) is not list:
        raise ValueError("its cuts are malformed")
    for each in flat:
        if type(each) is not list or len(each) != 2:
            raise ValueError("its cuts are malformed")
        name, numbers = each
        if type(name) is not str or not 0 < len(name) <= DOCUMENT_CHARS_MAX or name in cuts:
            raise ValueError("its cuts name no document, or one twice")
        if type(numbers) is not list or not numbers or len(numbers) % 2:
            raise ValueError("its cuts are malformed")
        for writer, seq in zip(numbers[::2], numbers[1::2], strict=True):
            if type(writer) is not int or not 0 < writer <= WRITER_MAX:
                raise ValueError("its cuts name no writer")
            if type(seq) is not int or not 0 < seq <= SEQ_MAX:
                raise ValueError("its cuts name no change")
        cuts[name] = Version.from_flat(numbers)
        if 2 * len(cuts[name]) != len(numbers):
            raise ValueError("its cuts name a writer twice")
    return cuts


class Revocations:
    """All that were revoked, by key. Adding in any order, any number of times, ends the same."""

    def __init__(self) -> None:
        # Key -> what stays, the lowest cuts of all revocations.
        self._cuts: dict[bytes, Cuts] = {}

    def add(self, revocation: Revocation) -> bool:
        """Take in a checked revocation; return whether anything more is revoked now.

        Raises:
            InvalidRevocation: There are too many.
        """
        before = self._cuts.get(revocation.key)
        if before is None and len(self._cuts) >= KEYS_MAX:
            raise InvalidRevocation(f"{KEYS_MAX} keys are revoked already")
        now = merge(revocation.cuts, revocation.cuts if before is None else before)
        self._cuts[revocation.key] = now
        return before is None or now != before

    def cuts(self, key: bytes) -> Cuts | None:
        """What stays of what the owner of a key wrote; None if it is not revoked."""
        return self._cuts.get(key)

    def is_revoked(self, certificate: Certificate) -> bool:
        """Whether a certificate is worth nothing any more: its key was revoked, or that of the
        controller who signed it."""
        return certificate.key in self._cuts or certificate.issuer in self._cuts

    def cut(self, certificate: Certificate, document: str, writer: int) -> int | None:
        """The last change of a certificate's holder that stays; None if all do."""
        found = (self._cuts.get(key) for key in (certificate.key, certificate.issuer))
        stays = [cuts.get(document, {}).get(writer, 0) for cuts in found if cuts is not None]
        return min(stays, default=None)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._cuts)

    def __len__(self) -> int:
        return len(self._cuts)
