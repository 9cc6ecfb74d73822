"""
The token of a relay's pages: what whoever looks at them presents.

Other users of a machine can dial its loopback interface, and everybody a public relay. So all pages
that tell something need a token; `/healthz` and the page's own files do not. Where one user owns
all replicas (without a mesh, or with words that all share) the token follows from the secret:
whoever knows that can read everything anyway, and `crdtstate status` needs no other. In a mesh of
members each relay has a random one, in a file that only its owner may read, since not every member
may read all documents.

A token is presented as ``Authorization: Bearer``, or by a page as the first message of a websocket,
or as its subprotocol (`browsers`). In a URL it only ever stands behind a ``#``: browsers send that
to nobody. There is one kind of token: it lets a browser write whatever the relay may write.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from pathlib import Path
from urllib.parse import urlsplit

from crdtstate.credentials import Credentials
from crdtstate.errors import StoreError
from crdtstate.keys import create_private, read_private

TOKEN_BYTES = 32
FILE_BYTES_MAX = 1024
TOKEN_CHARS_MIN = 16


class Tokens:
    """What opens the pages of one relay.

    Args:
        credentials: Those of the relay.
        path: The file of the token, made if it is not there; None: it follows from the secret, or
            for a member is a new one each time.

    Raises:
        StoreError: The file cannot be read, or others may read it.
    """

    def __init__(self, credentials: Credentials, path: Path | None) -> None:
        self._credentials = credentials
        self._own: str | None = None
        if path is not None:
            self._own = read_token(path, make=True)
        elif credentials.kind == "member":
            self._own = _random()

    @property
    def newest(self) -> str:
        """The one to hand out."""
        return self._own or token_of(self._credentials)

    def may(self, token: str) -> bool:
        """Whether this opens the pages. It takes as long for all that do not."""
        found = [token_of_secret(each) for each in self._derived()]
        if self._own is not None:
            found.append(self._own)
        return any([hmac.compare_digest(token.encode(), each.encode()) for each in found])

    def _derived(self) -> tuple[bytes, ...]:
        return () if self._credentials.kind == "member" else self._credentials.secrets


def token_of(credentials: Credentials) -> str:
    """The token of the pages of relays that have these credentials; none of a member's."""
    assert credentials.kind in ("host", "secret"), f"{credentials!r} gives no token"
    return token_of_secret(credentials.secrets[0])


def token_of_secret(secret: bytes) -> str:
    """The token that follows from a secret, of which it tells nothing."""
    person = b"crdt/pages/1"
    return _as_text(hashlib.blake2b(digest_size=TOKEN_BYTES, key=secret, person=person).digest())


def read_token(path: Path, *, make: bool = False) -> str:
    """The token in a file.

    Raises:
        StoreError: It cannot be read, others may read it, or it is too short to be one.
    """
    try:
        if make and not path.exists():
            create_private(path, f"{_random()}\n".encode())
        found = read_private(path, FILE_BYTES_MAX, "token").decode("ascii").strip()
    except OSError as exc:
        raise StoreError(path, f"the token cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise StoreError(path, "is no token") from exc
    if len(found) < TOKEN_CHARS_MIN or not found.isprintable() or " " in found:
        raise StoreError(path, f"a token has {TOKEN_CHARS_MIN} or more characters, on one line")
    return found


def page_of(address: str, token: str) -> str:
    """The URL of the page of a relay, for a browser."""
    parts = urlsplit(address)
    scheme = {"ws": "http", "wss": "https"}[parts.scheme]
    return f"{scheme}://{parts.netloc}/#token={token}"


def _random() -> str:
    return _as_text(secrets.token_bytes(TOKEN_BYTES))


def _as_text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
