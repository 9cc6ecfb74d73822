"""
Keys: what an agent signs with, whose keys it knows, and files that only their owner may read.

A member of a mesh signs with the key of its certificate. Any other agent has a key of its own: with
a store it is kept in the file ``<store>.keys`` beside it, made when it is first needed; without
one it is new in each session. The key of another agent is *pinned* when it is first seen, as ssh
does with hosts: if the agent shows another one later, that is not believed, unless the one before
was for its session only, or the new one stands in a certificate of the mesh.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shlex
import stat
from pathlib import Path
from typing import Any, Literal

from nacl.signing import SigningKey

from crdtstate.errors import CorruptStore, StoreError
from crdtstate.signing import (
    KEY_BYTES,
    PUBLIC,
    SECRET,
    SIGNATURE_BYTES,
    digest,
    from_text,
    show,
    to_text,
    verify,
)

__all__ = [
    "KEY_BYTES",
    "SIGNATURE_BYTES",
    "Keyring",
    "create_private",
    "digest",
    "from_text",
    "read_bounded",
    "read_private",
    "show",
    "to_text",
    "verify",
    "write_private",
]

PINS_MAX = 10_000
"""Agents whose keys are remembered; those first seen go first."""

FILE_BYTES_MAX = 4 * 2**20


class Keyring:
    """The key of one agent, and the keys it has pinned.

    Args:
        path: The file; None: memory only.
        key: The secret key, if it is another's to keep: that of a member's certificate. Without,
            the file has one.
    """

    def __init__(self, path: Path | None, key: bytes | None = None) -> None:
        self._path = path
        self._given = None if key is None else SigningKey(key)
        self._key: SigningKey | None = None
        # The key that the file has, as text: it stays there while another is given.
        self._kept: str | None = None
        # Agent -> its key, and whether it is kept beyond a session.
        self._pinned: dict[str, tuple[bytes, bool]] = {}

    @property
    def lasts(self) -> bool:
        """Whether the key is kept beyond this session."""
        return self._path is not None or self._given is not None

    @property
    def public(self) -> bytes:
        """The public key. Raises what `sign` does."""
        return bytes(self._open().verify_key)

    @property
    def seed(self) -> bytes:
        """The secret key. Raises what `sign` does."""
        return bytes(self._open())

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

    def certify(self, agent: str, key: bytes) -> Literal["known", "new", "replaced"]:
        """Remember the *key* that a checked certificate gives an agent, whatever was known.
        Raises what `sign` does."""
        if (before := self.pinned(agent)) == key and self._pinned[agent][1]:
            return "known"
        self._pinned.pop(agent, None)
        self.pin(agent, key, lasts=True)
        return "new" if before is None else "replaced"

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
            if self._path is not None and self._path.exists():
                self._key = self._load(self._path)
            else:
                self._key = self._given or SigningKey.generate()
                if self._given is None:
                    self._kept = to_text(bytes(self._key), SECRET)
                    self._save()
        return self._key

    def _load(self, path: Path) -> SigningKey:
        try:
            found = json.loads(read_private(path, FILE_BYTES_MAX, "key"))
            if (kept := found["ed25519"]) is not None or self._given is None:
                seed = from_text(kept, SECRET)
            self._pinned = {
                str(agent): (from_text(text, PUBLIC), lasts is True)
                for agent, (text, lasts) in found["pinned"].items()
            }
            self._kept = kept
            return self._given or SigningKey(seed)
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
            "ed25519": self._kept,
            "pinned": {a: [to_text(k, PUBLIC), lasts] for a, (k, lasts) in self._pinned.items()},
        }
        try:
            write_private(self._path, json.dumps(content).encode())
        except OSError as exc:
            raise StoreError(self._path, f"the key cannot be saved: {exc}") from exc


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


def create_private(path: Path, data: bytes) -> bool:
    """Make a file that only its owner may read, whole or not at all; return whether there was none
    before. Of several processes that try at once, one does. Raises OSError."""
    made = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    write_private(made, data)
    try:
        os.link(made, path)
    except FileExistsError:
        return False
    finally:
        made.unlink()
    return True


def read_private(path: Path, size_max: int, what: str, *, follow: bool = True) -> bytes:
    """Read a file that is secret.

    Args:
        path: The file.
        size_max: How many bytes it has at most.
        what: What is in it, for errors, such as "key".
        follow: Whether a symbolic link is followed.

    Raises:
        StoreError: Others may read it, or it is another user's, or no file. Says what to do.
        OSError: It cannot be read.
        ValueError: It is larger.
    """
    # Not blocking: it may be a pipe that nobody writes to.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    if not follow:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise StoreError(path, "is a symbolic link, which is not followed; remove it") from exc
        raise
    try:
        _check_private(path, os.fstat(descriptor), what)
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(size_max + 1)
    finally:
        os.close(descriptor)
    if len(data) > size_max:
        raise ValueError(f"larger than {size_max} bytes")
    return data


def _check_private(path: Path, found: os.stat_result, what: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise StoreError(path, f"a {what} is kept in a file, and this is none")
    if os.name == "posix":
        if found.st_uid not in (os.geteuid(), 0):
            raise StoreError(path, f"this {what} belongs to another user (uid {found.st_uid})")
        if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            command = f"chmod 600 {shlex.quote(str(path))}"
            raise StoreError(path, f"others may read this {what}; do: {command}")
