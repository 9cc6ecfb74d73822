"""
Where a digest begins, as text.

A *token* says where the next digest begins. It is two versions and a place between them, as a
digest that does not fit goes on in the next one:

    since    what was told before
    until    what there was when this part was told
    after    what was told last: of the changes up to *until*, what is later is still to be told

What is neither in *since* nor told so far is told next, so tokens chain without gap or repetition.

It is handed to a model, and may come back altered, made up, or from elsewhere. It tells no names
but that of the place that was told last.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import msgpack

from crdtstate.clock import Stamp

TOKEN_CHARS_MAX = 1500
"""What is handed out at most."""

Versions = Mapping[str, Mapping[int, int]]
"""By the marks of documents' names, see `mark_of`."""

Order = tuple[int, int, str]
"""Stamp, writer, and place: where a change stands among others."""

START: Order = (0, 0, "")


class Token(NamedTuple):
    """See the module. What *process* has seen is counted, beside the versions; *is_older* says that
    what changed may have been before that."""

    since: Versions
    until: Versions
    after: Order
    seen_since: int
    seen_until: int
    process: str
    is_older: bool


def mark_of(document: str) -> str:
    """What stands for a document's name in a token, which tells no names."""
    digest = hashlib.blake2b(document.encode(), digest_size=6).digest()
    return base64.urlsafe_b64encode(digest).decode()


def encode(token: Token) -> str:
    """As text: writers once, and what the versions say of them by number."""
    writers = sorted({w for versions in token[:2] for v in versions.values() for w in v})
    number = {writer: each for each, writer in enumerate(writers)}
    flat = [
        {name: [n for w, seq in v.items() for n in (number[w], seq)] for name, v in each.items()}
        for each in (token.since, token.until)
    ]
    packed = msgpack.packb([writers, *flat, *token[2:]])
    return "t." + base64.urlsafe_b64encode(packed).decode().rstrip("=")


def decode(text: str) -> Token | None:
    """What `encode` wrote; None if it is no such thing."""
    if not text.startswith("t.") or len(text) > 2 * TOKEN_CHARS_MAX:
        return None
    try:
        packed = base64.urlsafe_b64decode(text[2:] + "=" * (-(len(text) - 2) % 4))
        writers, *both, after, since, until, process, is_older = msgpack.unpackb(packed)
        versions = []
        for each in both:
            found: dict[str, dict[int, int]] = {}
            for name, flat in each.items():
                pairs = zip(flat[::2], flat[1::2], strict=True)
                found[str(name)] = {int(writers[n]): int(seq) for n, seq in pairs}
            versions.append(found)
        stamp, writer, mark = after
        order = int(Stamp(stamp)), int(writer), str(mark)
        counts = int(since), int(until)
        return Token(versions[0], versions[1], order, *counts, str(process), bool(is_older))
    except Exception:
        # It comes from a model, which may have made it up.
        return None
