"""
Proofs that a writer has gone on in two ways.

Two changes prove it that are both the writer's and cannot both be: two of one dot, or one that does
not follow the change before it (an *equivocation*; Kleppmann, "Making CRDTs Byzantine fault
tolerant", 2022). Where changes are signed, whoever has seen both can convince everybody; their
updates are not needed for it. A store that was copied and used twice looks the same as a lie.
"""

from __future__ import annotations

import msgpack

from crdtstate.authors import Authors
from crdtstate.change import CARD_BYTES_MAX, Change, decode_head
from crdtstate.errors import InvalidUpdate
from crdtstate.values import VALUE_BYTES_MAX

DOCUMENT = "@forks"
PROOFS = "proofs"

FORMAT = 1
PROOF_BYTES_MAX = VALUE_BYTES_MAX - 8
"""A proof is a value of a map. Any two changes fit, whatever they name: else who lies would name so
much that nobody could say so."""


def key_of(document: str, writer: int) -> str:
    """Where a proof about a writer stands in `PROOFS`."""
    return f"{writer:x}/{document}"


def place_of(key: str) -> tuple[str, int] | None:
    """The document and writer of a key in `PROOFS`; None if it is none."""
    number, _, document = key.partition("/")
    try:
        writer = int(number, 16)
    except ValueError:
        return None
    return (document, writer) if key_of(document, writer) == key else None


def has_forked(one: Change, other: Change) -> bool:
    """Whether two changes cannot both be of an honest writer."""
    if (one.writer, one.document) != (other.writer, other.document):
        return False
    if one.seq == other.seq:
        return one.id != other.id
    first, second = sorted((one, other), key=lambda change: change.seq)
    return second.seq == first.seq + 1 and second.prev != first.id


def encode(one: Change, other: Change, card: bytes) -> bytes:
    """Two changes that prove a fork, and the *card* of their writer."""
    data: bytes = msgpack.packb([FORMAT, one.head, other.head, card])
    return data


def card_of(proof: bytes) -> bytes:
    """The card in a proof that was decoded."""
    card: bytes = msgpack.unpackb(proof)[3]
    return card


def is_shared(proof: bytes) -> bool:
    """Whether a proof that was decoded is about a document of native types."""
    return decode_head(msgpack.unpackb(proof)[1]).shared


def decode(data: object, authors: Authors) -> tuple[str, int, str]:
    """Read a proof that may come from anybody: (document, writer, agent).

    Raises:
        InvalidUpdate: It proves nothing.
    """
    if type(data) is not bytes or len(data) > PROOF_BYTES_MAX:
        raise InvalidUpdate("a proof of the wrong shape")
    try:
        fields = msgpack.unpackb(
            data, use_list=False, max_array_len=4, max_map_len=0, max_ext_len=0
        )
    except Exception as exc:
        raise InvalidUpdate(f"a proof is not valid msgpack: {exc}") from exc
    if type(fields) is not tuple or len(fields) != 4 or fields[0] != FORMAT:
        raise InvalidUpdate("a proof of an unknown format")
    if not all(type(each) is bytes for each in fields[1:]) or len(fields[3]) > CARD_BYTES_MAX:
        raise InvalidUpdate("a proof of the wrong shape")
    one, other = decode_head(fields[1]), decode_head(fields[2])
    if not has_forked(one, other):
        raise InvalidUpdate("a proof of nothing")
    for change in (one, other):
        authors.check(change, fields[3])
    return one.document, one.writer, one.origin.agent
