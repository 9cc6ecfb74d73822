"""
Signatures: what is signed, how it is checked, and keys as text.

Keys are Ed25519 (RFC 8032), through libsodium. What is signed is a hash under a *purpose*, such as
``share/1``, so that a signature for one thing is never one for another. A *weak* key is one under
which a signature can be right for messages that nobody signed, or that has two spellings: such a
key is never admitted, and no signature is right under it.

As text, 32 bytes and tokens are a prefix, the bytes and four of their hash, in base32:
``crdtpub1...`` (a public key), ``crdtsec1...`` (a secret one), ``crdtmesh1...`` (the root key of a
mesh), ``crdtjoin1...`` (a join token), ``crdtrevoke1...`` (a revocation). Text that is secret is
never in an error.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

from nacl.bindings import crypto_core_ed25519_is_valid_point
from nacl.exceptions import CryptoError
from nacl.signing import SigningKey, VerifyKey

KEY_BYTES = 32
SIGNATURE_BYTES = 64
CHECKSUM_BYTES = 4

PUBLIC, SECRET, MESH = "crdtpub1", "crdtsec1", "crdtmesh1"


def digest(purpose: str, message: bytes) -> bytes:
    """What is signed: the purpose in plain, and the hash of the message (BLAKE2b-256)."""
    return f"crdtstate/{purpose}\0".encode() + hashlib.blake2b(message, digest_size=32).digest()


def sign(seed: bytes, purpose: str, message: bytes) -> bytes:
    """Sign *message* for a purpose with the secret key of *seed*."""
    return SigningKey(seed).sign(digest(purpose, message)).signature


def verify(purpose: str, message: bytes, signature: bytes, key: bytes) -> bool:
    """Whether *signature* is that of *message* for a purpose by the owner of *key*."""
    try:
        VerifyKey(key).verify(digest(purpose, message), signature)
    except (CryptoError, ValueError, TypeError):
        return False
    return True


def public_of(seed: bytes) -> bytes:
    """The public key of a secret one."""
    return bytes(SigningKey(seed).verify_key)


def is_weak(key: bytes) -> bool:
    """Whether *key* is none to believe: of small order, not on the curve, or spelled otherwise
    than it should be."""
    return len(key) != KEY_BYTES or not crypto_core_ed25519_is_valid_point(key)


# As text


def show(key: bytes) -> str:
    """A public key as text."""
    return to_text(key, PUBLIC)


def to_text(data: bytes, prefix: str) -> str:
    """A key as text that says if it was copied wrongly."""
    check = hashlib.blake2b(data).digest()[:CHECKSUM_BYTES]
    return prefix + base64.b32encode(data + check).decode().rstrip("=").lower()


def from_text(text: object, prefix: str, size: int | None = KEY_BYTES) -> bytes:
    """Read what `to_text` wrote.

    Args:
        text: What is read.
        prefix: What it begins with.
        size: How many bytes it has; None admits any number. Its length is the caller's to bound.

    Raises:
        ValueError: It is something else, or was copied wrongly. The text is not told.
    """
    if not isinstance(text, str) or not text.startswith(prefix):
        raise ValueError(f"a key begins with {prefix}")
    body = text.removeprefix(prefix)
    try:
        data = base64.b32decode(body.upper() + "=" * (-len(body) % 8))
    except binascii.Error:
        raise ValueError("a key is not as it was written") from None
    found = data[:-CHECKSUM_BYTES]
    # Not all bits of the last letter are read, and capitals are the same: there is one spelling.
    if size not in (None, len(found)) or to_text(found, prefix) != text:
        raise ValueError("a key is not as it was written")
    return found
