"""
Keys: what an agent signs with, and whose keys it knows.

Each agent has an Ed25519 key (RFC 8032, through libsodium, which refuses weak keys). An agent with
a store keeps it in the file ``<store>.keys`` beside it, which only its owner may read, made when it
is first needed; one without has a new key in each session. The key of another agent is *pinned*
when it is first seen, as ssh does with hosts: if the agent shows another one later, that is not
believed, unless the one before was for its session only.

What is signed is a hash under a *purpose*, such as ``share/1``, so that a signature for one thing
is never one for another. As text, keys are ``crdtpub1...`` and ``crdtsec1...``: the bytes and four
of their hash, in base32.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any, Literal

from nacl.exceptions import CryptoError
from nacl.signing import SigningKey, VerifyKey

from crdtstate.errors import CorruptStore, StoreError

KEY_BYTES = 32
SIGNATURE_BYTES = 64

PINS_MAX = 10_000
"""Agents whose keys are remembered; those first seen go first."""

FILE_BYTES_MAX = 4 * 2**20

_PUBLIC, _SECRET = "crdtpub1", "crdtsec1"


class Keyring:
    """The key of one agent, and the keys it has pinned.

    Args:
        path: The file; None: memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._key: SigningKey | None = None
        # Agent -> its key, and whether it is kept beyond a session.
        self._pinned: dict[str, tuple[bytes, bool]] = {}

    @property
    def lasts(self) -> bool:
        """Whether the key is kept beyond this session."""
        return self._path is not None

    @property
    def public(self) -> bytes:
        """The public key. Raises what `sign` does."""
        return bytes(self._open().verify_key)

    def sign(self, purpose: str, message: bytes) -> bytes:
        """Sign *message* for a purpose.

        Raises:
            StoreError: The file cannot be read or written, or others may read it.
        """
        return self._open().sign(digest(purpose, message)).signature

    def pin(
        self, agent: str, key: bytes, *, lasts: bool
    ) -> Literal["known", "new", "replaced", "refused"]:
        """Remember the *key* of an agent: if none is known (``"new"``), or if that one was for its
        session only (``"replaced"``); else it is refused. Raises what `sign` does."""
        self._open()
        known = self._pinned.get(agent)
        if known is not None and known[0] == key:
            return "known"
        if known is not None and known[1]:
            return "refused"
        self._pinned[agent] = key, lasts
        while len(self._pinned) > PINS_MAX:
            del self._pinned[next(iter(self._pinned))]
        self._save()
        return "new" if known is None else "replaced"

    def pinned(self, agent: str) -> bytes | None:
        """The key that is known of an agent. Raises what `sign` does."""
        self._open()
        found = self._pinned.get(agent)
        return found[0] if found is not None else None

    def unpin(self, agent: str) -> None:
        """Forget the key of an agent: the next that it shows is pinned. Raises what `sign` does."""
        self._open()
        if self._pinned.pop(agent, None) is not None:
            self._save()

    # The file

    def _open(self) -> SigningKey:
        if self._key is None:
            if self._path is None or not self._path.exists():
                self._key = SigningKey.generate()
                self._save()
            else:
                self._key = self._load(self._path)
        return self._key

    def _load(self, path: Path) -> SigningKey:
        try:
            mode = path.stat().st_mode
            if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise StoreError(path, f"others may read this key; do: chmod 600 {path}")
            found = json.loads(read_bounded(path, FILE_BYTES_MAX))
            seed = from_text(found["ed25519"], _SECRET)
            self._pinned = {
                str(agent): (from_text(text, _PUBLIC), lasts is True)
                for agent, (text, lasts) in found["pinned"].items()
            }
            return SigningKey(seed)
        except OSError as exc:
            raise StoreError(path, f"the key cannot be read: {exc}") from exc
        except (ValueError, TypeError, LookupError, AttributeError) as exc:
            hint = "restore it from a copy, or remove it for a new key, which others must trust"
            raise CorruptStore(path, f"is no file of keys ({exc}); {hint}") from exc

    def _save(self) -> None:
        if self._path is None or self._key is None:
            return
        content: dict[str, Any] = {
            "v": 1,
            "kind": "replica-key",
            "ed25519": to_text(bytes(self._key), _SECRET),
            "pinned": {a: [to_text(k, _PUBLIC), lasts] for a, (k, lasts) in self._pinned.items()},
        }
        try:
            write_private(self._path, json.dumps(content).encode())
        except OSError as exc:
            raise StoreError(self._path, f"the key cannot be saved: {exc}") from exc


def verify(purpose: str, message: bytes, signature: bytes, key: bytes) -> bool:
    """Whether *signature* is that of *message* for a purpose by the owner of *key*."""
    try:
        VerifyKey(key).verify(digest(purpose, message), signature)
    except (CryptoError, ValueError, TypeError):
        return False
    return True


def digest(purpose: str, message: bytes) -> bytes:
    """What is signed: the purpose in plain, and the hash of the message (BLAKE2b-256)."""
    return f"crdtstate/{purpose}\0".encode() + hashlib.blake2b(message, digest_size=32).digest()


def show(key: bytes) -> str:
    """A public key as text."""
    return to_text(key, _PUBLIC)


def to_text(key: bytes, prefix: str) -> str:
    """A key as text that says if it was copied wrongly."""
    check = hashlib.blake2b(key).digest()[:4]
    return prefix + base64.b32encode(key + check).decode().rstrip("=").lower()


def from_text(text: object, prefix: str) -> bytes:
    """Read what `to_text` wrote. Raises ValueError."""
    if not isinstance(text, str) or not text.startswith(prefix):
        raise ValueError(f"a key begins with {prefix}")
    body = text.removeprefix(prefix).upper()
    data = base64.b32decode(body + "=" * (-len(body) % 8))
    key, check = data[:KEY_BYTES], data[KEY_BYTES:]
    if len(key) != KEY_BYTES or check != hashlib.blake2b(key).digest()[:4]:
        raise ValueError("a key is not as it was written")
    return key


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, whole or not at all. Raises OSError."""
    made = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    try:
        with open(os.open(made, flags, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        made.replace(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_bounded(path: Path, size_max: int) -> bytes:
    """Read a file of at most so many bytes. Raises OSError, or ValueError if it is larger."""
    with path.open("rb") as file:
        data = file.read(size_max + 1)
    if len(data) > size_max:
        raise ValueError(f"larger than {size_max} bytes")
    return data
