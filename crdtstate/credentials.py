"""
Credentials: what a process has to show to be let into a mesh, and where it has it from.

    none     no mesh was named, and nothing was read
    host     the *host secret*, which all processes of one user on one machine share: 32 random
             bytes in ``$XDG_STATE_HOME/crdtstate/host.secret``, made when it is first needed
    secret   words that everybody in the mesh knows, also as a file, a line for each secret
    member   a join token (`certificates`), also as a file, a line for each token

A file is only its owner's to read. Its newest line comes first, so a secret is replaced without a
pause: the new one goes above the old one, in one file after the other, and once it is in all of
them the old one is marked ``former:``; it then proves only what was written under it. Lines that
begin with ``#`` are comments. A member that has made its key itself has it in the same file, a line
``crdtsec1...``, or in ``<store>.keys``. `Credentials.reload` sees that the file was altered.

Secrets are never in a repr, an error or a log.
"""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from nacl.signing import SigningKey

from crdtstate.certificates import (
    FORMER_MAX,
    JOIN,
    SECRET_BYTES,
    SECRETS_MAX,
    Certificate,
    JoinToken,
    decode_token,
    fingerprint,
    mesh_of,
)
from crdtstate.errors import InvalidCertificate, StoreError, UsageError
from crdtstate.keys import Keyring, create_private, read_private
from crdtstate.signing import SECRET, digest, from_text, public_of

Kind = Literal["none", "host", "secret", "member"]

WORDS_CHARS_MIN = 16
WORDS_CHARS_MAX = 1000

FILE_BYTES_MAX = 256 * 1024
LINES_MAX = 1000

FILE = "file:"
FORMER = "former:"
COMMENT = "#"

HOST_FILE = "host.secret"

# scrypt needs a salt. A salt of one's own for each mesh would have to be known to all before they
# can speak with each other, and all that they know is the words: so it is the same everywhere, and
# says only what the result is for. What it costs: one table of guesses would do for all meshes.
# Whom that worries takes words from `crdtstate keygen --words`, which nobody guesses.
_SALT = b"crdtstate/mesh secret/1"
_SCRYPT_COST = 2**14


class _Found(NamedTuple):
    """What was read, before it is taken."""

    kind: Kind
    secrets: tuple[bytes, ...]
    former: tuple[bytes, ...]
    token: JoinToken | None = None
    seed: bytes | None = None


class Credentials:
    """What this process has to show. Made by `open_credentials` and `open_host_credentials`.

    Attributes:
        kind: See the module.
        mesh: The id of the mesh, 32 bytes: of its root key, or of the oldest secret, so that it
            stays the same while secrets are replaced. Empty for ``"none"``.
        root: The public key of its root; a member's.
        certificate: The own certificate; a member's.
        secrets: The mesh's secrets that are in use, 32 bytes each, the newest first, two at most.
        former: Those that were in use before: what was proven with them is still believed.
        path: The file that they came from, if they did.
    """

    def __init__(self, found: _Found, path: Path | None = None, store: Path | None = None) -> None:
        self.path = path
        self._store = store
        self._seen = None if path is None else _look(path)
        self._take(found)

    def _take(self, found: _Found) -> None:
        self.kind: Kind = found.kind
        self.secrets, self.former = found.secrets, found.former
        self.root = None if found.token is None else found.token.root
        self.certificate: Certificate | None = None
        self._key: SigningKey | None = None
        if found.token is not None and found.seed is not None:
            self.certificate = found.token.certificate
            self._key = SigningKey(found.seed)
        self.mesh = b""
        if self.root is not None:
            self.mesh = mesh_of(self.root)
        elif self.secrets:
            self.mesh = mesh_of_secret((*self.secrets, *self.former)[-1])

    @property
    def public(self) -> bytes | None:
        """The public key of a member."""
        return None if self._key is None else bytes(self._key.verify_key)

    @property
    def seed(self) -> bytes:
        """The secret key of a member. Raises UsageError if there is none."""
        if self._key is None:
            raise UsageError(f"only a member has a key, and this is of kind {self.kind!r}")
        return bytes(self._key)

    def sign(self, purpose: str, message: bytes) -> bytes:
        """Sign *message* for a purpose with the key of the certificate. Raises UsageError if there
        is none."""
        if self._key is None:
            raise UsageError(f"only a member signs, and this has credentials of kind {self.kind!r}")
        return self._key.sign(digest(purpose, message)).signature

    def keyring(self, path: Path | None) -> Keyring:
        """The ring of keys in the file *path*; a member's signs with the key of its certificate."""
        return Keyring(path, None if self._key is None else bytes(self._key))

    def reload(self) -> bool:
        """Read the file again if it was altered; return whether anything is different now. On an
        error all stays as it was, and the next call looks again.

        Raises:
            UsageError: It is of another mesh, agent, key or issuer now: open the replica again for
                that, which makes it another writer.
            StoreError: It cannot be read, others may read it, or nothing valid is in it.
        """
        if self.path is None or (seen := _look(self.path)) == self._seen:
            return False
        found = _read_file(self.path, self._store)
        token = found.token
        own = self.certificate
        before = (self.kind, self.root, own and (own.agent, own.serial), self.public)
        now = (
            found.kind,
            token and token.root,
            token and (token.certificate.agent, token.certificate.serial),
            public_of(found.seed) if found.seed is not None else None,
        )
        if before != now:
            raise UsageError(
                f"{self.path}: is of another mesh, agent, key or issuer than before; "
                "what was opened goes on with the old ones until it is opened again"
            )
        data = self.certificate and self.certificate.data
        had = (self.secrets, self.former, data)
        # The id of a mesh of words stays, also if its oldest words are forgotten meanwhile.
        mesh = self.mesh
        self._take(found)
        self.mesh, self._seen = mesh, seen
        return had != (self.secrets, self.former, self.certificate and self.certificate.data)

    def __repr__(self) -> str:
        who = "" if self.certificate is None else f" {self.certificate!r}"
        known = "".join(f" {fingerprint(each)}" for each in self.secrets)
        return f"<Credentials {self.kind}{who}{' secrets' if known else ''}{known}>"


NONE = _Found("none", (), ())


def open_credentials(
    mesh: str | Path | Credentials | None, store: Path | None = None
) -> Credentials:
    """The credentials that an argument names.

    Args:
        mesh: Words that all know; a join token; the path of a file with either, as a Path or as
            ``"file:PATH"``; or None.
        store: The store of the replica: in ``<store>.keys`` beside it may be the key of a member
            that made it itself.

    Raises:
        UsageError: It is none of these, or words that are too easily guessed. Says what to do.
        StoreError: The file cannot be read, others may read it, or nothing valid is in it.
    """
    match mesh:
        case None:
            return Credentials(NONE)
        case Credentials():
            return mesh
        case os.PathLike():
            return _open_file(Path(mesh), store)
        case str() if mesh.startswith(FILE):
            return _open_file(Path(mesh.removeprefix(FILE)), store)
        case str():
            try:
                return Credentials(_parse([mesh.strip()], store, is_file=False))
            except InvalidCertificate as exc:
                raise UsageError(str(exc)) from None
    kind = type(mesh).__name__
    raise UsageError(f"mesh is words, a join token or the path of a file, not a {kind}")


def open_host_credentials() -> Credentials:
    """The secret that the processes of this user on this machine share, made if there is none. Of
    several processes that are the first at once, all have the same.

    Raises:
        StoreError: It cannot be read or made, or others may read it. Says what to do.
    """
    try:
        path = state_directory() / HOST_FILE
    except RuntimeError as exc:
        raise StoreError("XDG_STATE_HOME", "name a directory there: this user has none") from exc
    hint = "give a directory that can be written as XDG_STATE_HOME, or name a mesh"
    try:
        _make_directory(path.parent)
        if not path.exists():
            create_private(path, secrets.token_bytes(SECRET_BYTES))
        found = read_private(path, SECRET_BYTES, "secret", follow=False)
    except ValueError:
        found = b""
    except OSError as exc:
        raise StoreError(path, f"the host's secret cannot be read: {exc.strerror}; {hint}") from exc
    if len(found) != SECRET_BYTES:
        raise StoreError(path, f"is not {SECRET_BYTES} bytes; remove it, and a new one is made")
    return Credentials(_Found("host", (found,), ()))


def state_directory() -> Path:
    """Where the state of this user's programs is, and in there ours."""
    # A relative path is to be ignored, says the XDG Base Directory Specification.
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    base = given if given.is_absolute() else Path.home() / ".local" / "state"
    return base / "crdtstate"


def secret_of_words(words: str) -> bytes:
    """The secret that *words* stand for, 32 bytes. It takes 50 ms once, and much longer to guess.

    Raises:
        UsageError: They are too few or too many.
    """
    plain = unicodedata.normalize("NFC", words.strip())
    if not WORDS_CHARS_MIN <= len(plain) <= WORDS_CHARS_MAX:
        raise UsageError(
            f"the words that a mesh shares have {WORDS_CHARS_MIN} to {WORDS_CHARS_MAX} characters, "
            f"not {len(plain)}; random ones are made by: crdtstate keygen --words"
        )
    return _stretch(plain)


@functools.lru_cache(maxsize=32)
def _stretch(words: str) -> bytes:
    return hashlib.scrypt(words.encode(), salt=_SALT, n=_SCRYPT_COST, r=8, p=1, dklen=SECRET_BYTES)


def mesh_of_secret(secret: bytes) -> bytes:
    """The id of a mesh that has a secret and no root, 32 bytes. It does not tell the secret."""
    return hashlib.blake2b(secret, digest_size=32, person=b"crdtstate/word/1").digest()


# Files


def _open_file(path: Path, store: Path | None) -> Credentials:
    return Credentials(_read_file(path, store), path, store)


def _look(path: Path) -> tuple[int, ...] | None:
    """What differs once a file was written again; None if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode


def read_lines(path: Path) -> list[str]:
    """The lines of a file that is secret, without comments.

    Raises:
        StoreError: It cannot be read, or others may read it. Says what to do.
    """
    try:
        text = read_private(path, FILE_BYTES_MAX, "secret").decode()
    except FileNotFoundError as exc:
        hint = "a token is made by: crdtstate invite NAME --root FILE --out FILE"
        raise StoreError(path, f"there is no such file; {hint}") from exc
    except OSError as exc:
        raise StoreError(path, f"cannot be read: {exc.strerror}") from exc
    except ValueError:
        reason = "is neither a join token nor words; it is too large or no text"
        raise StoreError(path, reason) from None
    lines = [line.strip() for line in text.splitlines()[:LINES_MAX]]
    return [line for line in lines if line and not line.startswith(COMMENT)]


def _read_file(path: Path, store: Path | None) -> _Found:
    lines = read_lines(path)
    try:
        return _parse(lines, store, is_file=True)
    except (UsageError, InvalidCertificate) as exc:
        raise StoreError(path, str(exc)) from None


def _parse(lines: list[str], store: Path | None, *, is_file: bool) -> _Found:
    """Read tokens or words, the newest first. Raises UsageError or InvalidCertificate."""
    if any(line.startswith((JOIN, SECRET)) for line in lines):
        return _parse_tokens(lines, store)
    for line in lines:
        _check_is_words(line, is_file=is_file)
    current = [line for line in lines if not line.startswith(FORMER)]
    if not current:
        raise UsageError("nothing is in it; write words that all share, or a join token")
    if len(lines) > SECRETS_MAX + FORMER_MAX:
        raise UsageError(f"more than {SECRETS_MAX + FORMER_MAX} secrets are in it; forget some")
    found = [secret_of_words(line) for line in current]
    old = [secret_of_words(line.removeprefix(FORMER)) for line in lines if line not in current]
    return _Found("secret", tuple(found[:SECRETS_MAX]), _former(found, old))


def _check_is_words(text: str, *, is_file: bool) -> None:
    """Words that everybody can guess would be no secret."""
    if text.startswith("crdt") and text.partition("1")[0] in ("crdtpub", "crdtmesh", "crdtrevoke"):
        raise UsageError("this is no secret and no join token; see: crdtstate mesh show --help")
    if is_file:
        return
    try:
        there = Path(text).is_file()
    except (OSError, ValueError):
        return
    if there:
        raise UsageError(
            f"{text!r} is a file here, and would be taken for words; "
            f"write mesh=Path({text!r}) or mesh='file:{text}'"
        )


def _parse_tokens(lines: list[str], store: Path | None) -> _Found:
    seeds, tokens = [], []
    for line in lines:
        if line.startswith(SECRET):
            try:
                seeds.append(from_text(line, SECRET))
            except ValueError as exc:
                raise UsageError(f"the secret key in it is not to be read: {exc}") from None
        elif line.startswith(JOIN):
            tokens.append(decode_token(line))
        else:
            raise UsageError("beside a join token there is a line that is none")
    if not tokens:
        raise UsageError("it has a key and no join token; add what crdtstate invite prints")
    newest = tokens[0]
    if any(each.root != newest.root for each in tokens):
        raise UsageError("its join tokens are of different meshes")
    if newest.seed:
        seeds = [newest.seed]
    elif store is not None:
        seeds += _seed_beside(store)
    found = [each for each in seeds if public_of(each) == newest.certificate.key]
    if not found:
        raise UsageError(
            "the key of its certificate is not in it; add the line crdtsec1... that crdtstate "
            "keygen made, or invite it without --key"
        )
    current = [secret for each in tokens[:1] for secret in each.secrets]
    old = [secret for each in tokens for secret in (*each.former, *each.secrets)]
    return _Found("member", tuple(current[:SECRETS_MAX]), _former(current, old), newest, found[0])


def _former(current: list[bytes], old: Iterable[bytes]) -> tuple[bytes, ...]:
    """The secrets that are no more in use, each once, in order."""
    rest = [*current[SECRETS_MAX:], *old]
    return tuple(dict.fromkeys(each for each in rest if each not in current[:SECRETS_MAX]))[
        :FORMER_MAX
    ]


def _seed_beside(store: Path) -> list[bytes]:
    path = store.with_name(f"{store.name}.keys")
    return [Keyring(path).seed] if path.exists() else []


def _make_directory(path: Path) -> None:
    """Make a directory of one's own. Raises OSError, or StoreError if it is another's."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if os.name != "posix":
        return
    if found.st_uid != os.geteuid():
        raise StoreError(path, f"this directory belongs to another user (uid {found.st_uid})")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StoreError(path, f"others may write in this directory; do: chmod 700 {path}")
