"""
Changes and snapshots: what travels between replicas and lies in journals.

A `Change` is one sealed transaction of one document: its dot, the heads of the history it builds
on (dots instead of whole vectors: 105 bytes against 6,400 with a thousand writers), a stamp, the
Yjs update and where it comes from. It is encoded once; the same bytes are journaled, sent and
relayed. A `Snapshot` is a whole document at exactly one version.

A change is named by the hash of its *body*, in which the update is named by its own hash, and so is
the writer's change before it: a chain, as in p2panda's logs. Whoever knows the newest knows which
ones are meant by all the older; a writer that goes on in two ways is found out (`forks`). The
*proof* says that the body is the writer's: nothing, a keyed hash, or a signature (`proofs`).

What is decoded here is well-formed and unaltered, not yet true: `Document.apply` checks the update
against the document before anything changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple, Protocol

import msgpack
import zstandard

from crdtstate.clock import SEQ_MAX, STAMP_MAX, WRITER_MAX, Dot, Version
from crdtstate.errors import InvalidUpdate

NAME_CHARS_MAX = 200
"""Characters of a document's or view's name."""

CHANGE_BYTES_MAX = 2 * 1024 * 1024
"""Bytes of one change. A transaction beyond it is refused as a whole."""

CHANGE_SLACK = 1024 * 1024
"""What tidying, cleaning and dependencies may add to that."""

DEPS_MAX = 35_000
"""Heads that a change builds on: with so many, two changes still fit into a value (`forks`)."""

STATE_BYTES_MAX = 256 * 1024 * 1024
FORMAT = 2

WRITE, RESOLUTION, TIDY = range(3)
"""Kinds of change: plain writes, a resolved conflict, dropping what is covered."""

CHECKSUM, KEYED, SIGNED = range(3)
"""Schemes, the first byte of a change: the id alone, or also a keyed hash, or a signature."""

EXPANSION_MAX = 200
"""How many times as large as when it was sent a snapshot may become. One that zstd makes smaller
than that is stored and sent as it is."""

SMALL = 64 * 1024
FIELDS_MAX = 64
ENTRIES_MAX = 3 * 200_000

ID_BYTES = 16
PROOF_BYTES = (0, 16, 64)
CARD_BYTES_MAX = 8 * 1024
CARDS_BYTES_MAX = 64 * 2**20
CARD_HEAD = 3
"""Bytes of a card before the certificate: they differ between the writers of one agent."""


class Origin(NamedTuple):
    """Where a change comes from, in the words of whoever made it."""

    agent: str = ""
    message: str = ""
    run: str = ""


class Change(NamedTuple):
    """One sealed transaction; the unit of journal and wire.

    Attributes:
        document: The document's name.
        writer: Who made it; with *seq* its dot.
        seq: The how-manieth of this writer in this document.
        deps: Heads of the history its writer had delivered, without the writer's own.
        stamp: The writer's hybrid logical clock.
        kind: `WRITE`, `RESOLUTION` or `TIDY`.
        shared: Whether *update* is for native Yjs types.
        update: The Yjs update, one transaction of one client.
        origin: Provenance.
        data: The whole as bytes, as journaled, sent and relayed.
        id: The hash of its body, 16 bytes.
        prev: The id of the writer's change before it in this document; empty for the first.
        card: Who the writer is, in a signed mesh: with its first change here, and when it has a
            new certificate; else empty.
    """

    document: str
    writer: int
    seq: int
    deps: tuple[Dot, ...]
    stamp: int
    kind: int
    shared: bool
    update: bytes
    origin: Origin
    data: bytes
    id: bytes
    prev: bytes
    card: bytes

    @property
    def dot(self) -> Dot:
        return Dot(self.writer, self.seq)

    @property
    def scheme(self) -> int:
        """What kind of proof it has: `CHECKSUM` for none, `KEYED`, `SIGNED`."""
        return self.data[0]

    @property
    def proof(self) -> bytes:
        """The proof that its writer made it."""
        return self.data[1 + ID_BYTES : 1 + ID_BYTES + PROOF_BYTES[self.data[0]]]

    @property
    def body(self) -> bytes:
        """What the proof is for."""
        return _split(self.data)[0]

    @property
    def head(self) -> bytes:
        """The change without its update: enough to prove who made it."""
        return self.data[: len(self.data) - len(self.update)]

    def __repr__(self) -> str:
        return f"<Change {self.document} {self.writer:x}:{self.seq} {len(self.data)} bytes>"


class Prover(Protocol):
    """Proves that changes are the writer's."""

    @property
    def scheme(self) -> int:
        """`KEYED` or `SIGNED`."""
        raise NotImplementedError

    @property
    def card(self) -> bytes:
        """Who the writer is, as `Change.card`."""
        raise NotImplementedError

    def prove(self, body: bytes) -> bytes:
        """The proof for the body of a change."""
        raise NotImplementedError


_pack = msgpack.Packer(use_bin_type=True).pack


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, use_list=False, max_map_len=0, max_ext_len=0)


def _read_fields(data: bytes) -> tuple[Any, ...]:
    """Read an array of values and of flat arrays, whatever its size: an unpacker that builds what
    it finds makes seventy bytes of memory out of one. Raises ValueError."""
    source = msgpack.Unpacker(
        max_buffer_size=STATE_BYTES_MAX,
        use_list=False,
        max_array_len=0,
        max_map_len=0,
        max_ext_len=0,
    )
    source.feed(data)
    fields: list[Any] = []
    try:
        for _ in range(min(source.read_array_header(), FIELDS_MAX)):
            is_array = data[source.tell()] in _ARRAYS
            fields.append(_read_array(source) if is_array else source.unpack())
    except (msgpack.OutOfData, IndexError):
        raise ValueError("it was cut short") from None
    if source.tell() != len(data):
        raise ValueError("bytes are left over")
    return tuple(fields)


_ARRAYS = frozenset((*range(0x90, 0xA0), 0xDC, 0xDD))


def _read_array(source: msgpack.Unpacker) -> tuple[Any, ...]:
    length = source.read_array_header()
    if length > ENTRIES_MAX:
        raise ValueError(f"an array of {length} values")
    values = tuple(islice(source, length))
    if len(values) < length:
        raise ValueError("it was cut short")
    return values


def encode_change(
    document: str,
    dot: Dot,
    deps: Mapping[int, int],
    stamp: int,
    kind: int,
    shared: bool,
    update: bytes,
    origin: Origin,
    *,
    prev: bytes = b"",
    card: bytes = b"",
    prover: Prover | None = None,
) -> Change:
    """Build a change and its bytes."""
    flat = [number for dep in sorted(deps.items()) for number in dep]
    hashed = hashlib.blake2b(update, digest_size=ID_BYTES).digest()
    body = _pack([FORMAT, document, *dot, flat, stamp, kind, shared, hashed, *origin, prev, card])
    id = hashlib.blake2b(body, digest_size=ID_BYTES).digest()
    scheme, proof = (prover.scheme, prover.prove(body)) if prover else (CHECKSUM, b"")
    data = b"".join((bytes([scheme]), id, proof, len(body).to_bytes(4, "big"), body, update))
    heads = tuple(Dot(writer, seq) for writer, seq in sorted(deps.items()))
    return Change(
        document,
        dot.writer,
        dot.seq,
        heads,
        stamp,
        kind,
        shared,
        update,
        origin,
        data,
        id,
        prev,
        card,
    )


def _split(data: bytes) -> tuple[bytes, bytes]:
    """The body and the update of a change."""
    if not data or data[0] >= len(PROOF_BYTES):
        raise InvalidUpdate("a change of an unknown scheme")
    at = 1 + ID_BYTES + PROOF_BYTES[data[0]] + 4
    end = at + int.from_bytes(data[at - 4 : at], "big")
    if not at < end <= len(data):
        raise InvalidUpdate("a change was cut short")
    return data[at:end], data[end:]


def decode_change(data: bytes) -> Change:
    """Read a change that may come from anybody. Its proof is not looked at.

    Raises:
        InvalidUpdate: A hash does not match or a field is malformed or out of bounds.
    """
    if len(data) > CHANGE_BYTES_MAX + CHANGE_SLACK:
        raise InvalidUpdate(f"a change of {len(data)} bytes is too long")
    data = bytes(data)
    body, update = _split(data)
    fields = _decode_body(data, body)
    _, document, writer, seq, flat, stamp, kind, shared, hashed = fields[:9]
    agent, message, run, prev, card = fields[9:]
    if hashlib.blake2b(update, digest_size=ID_BYTES).digest() != hashed:
        raise InvalidUpdate("a change's update is not the one it was made with")
    deps = decode_dots(flat)
    for dep in deps:
        if dep.writer == writer:
            raise InvalidUpdate("a change depends on its own writer")
    origin = Origin(agent, message, run)
    id = data[1 : 1 + ID_BYTES]
    return Change(
        document, writer, seq, deps, stamp, kind, shared, update, origin, data, id, prev, card
    )


def decode_head(data: bytes) -> Change:
    """Read a change that may have come without its update, see `Change.head`. Raises
    InvalidUpdate."""
    body, update = _split(data)
    if update:
        return decode_change(data)
    fields = _decode_body(data, body)
    _, document, writer, seq, flat, stamp, kind, shared, _, agent, message, run, prev, card = fields
    origin, id = Origin(agent, message, run), data[1 : 1 + ID_BYTES]
    deps = decode_dots(flat)
    return Change(
        document, writer, seq, deps, stamp, kind, shared, b"", origin, data, id, prev, card
    )


def _decode_body(data: bytes, body: bytes) -> tuple[Any, ...]:
    """The fields of a change, checked but for what they mean together."""
    if hashlib.blake2b(body, digest_size=ID_BYTES).digest() != data[1 : 1 + ID_BYTES]:
        raise InvalidUpdate("a change's checksum does not match")
    try:
        read = _unpack if len(body) <= SMALL else _read_fields
        fields = read(body)
    except Exception as exc:
        raise InvalidUpdate(f"a change is not valid msgpack: {exc}") from exc
    if type(fields) is not tuple or len(fields) != 14 or fields[0] != FORMAT:
        raise InvalidUpdate("a change of an unknown format")
    _, document, writer, seq, _, stamp, kind, shared, hashed, *origin, prev, card = fields
    if not _is_name(document):
        raise InvalidUpdate("a change's document has no valid name")
    _check(writer, 1, WRITER_MAX, "writer")
    _check(seq, 1, SEQ_MAX, "seq")
    _check(stamp, 0, STAMP_MAX, "stamp")
    _check(kind, 0, TIDY, "kind")
    if type(shared) is not bool or type(hashed) is not bytes:
        raise InvalidUpdate("a change's update is malformed")
    if shared and document.startswith("@"):
        raise InvalidUpdate("a document of the system holds no native types")
    for text in origin:
        if type(text) is not str or len(text) > 1000:
            raise InvalidUpdate("a change's origin is malformed")
    if not origin[0].isprintable():
        # It is shown on terminals, and written to logs.
        raise InvalidUpdate("a change's agent has a name that cannot be printed")
    if type(prev) is not bytes or len(prev) != (0 if seq == 1 else ID_BYTES):
        raise InvalidUpdate("a change does not say what it follows")
    if type(card) is not bytes or len(card) > CARD_BYTES_MAX:
        raise InvalidUpdate("a change's writer is malformed")
    return fields


def _is_name(name: object) -> bool:
    return type(name) is str and 0 < len(name) <= NAME_CHARS_MAX and name.isprintable()


def decode_dots(flat: object) -> tuple[Dot, ...]:
    if flat == ():
        return ()
    if type(flat) is not tuple or len(flat) % 2 or len(flat) > 2 * DEPS_MAX:
        raise InvalidUpdate("dots have the wrong shape")
    for writer in flat[::2]:
        _check(writer, 1, WRITER_MAX, "writer")
    for seq in flat[1::2]:
        _check(seq, 1, SEQ_MAX, "seq")
    return tuple(map(Dot, flat[::2], flat[1::2]))


def _check(number: object, low: int, high: int, what: str) -> None:
    if type(number) is not int or not low <= number <= high:
        raise InvalidUpdate(f"a change's {what} is out of range")


class Snapshot(NamedTuple):
    """A whole document at exactly *version*: the sum of all changes up to it, no more, no less.

    Attributes:
        heads: The changes of it that no other one builds on.
        stamp: The highest of their stamps.
        agents: Who the writers are, by name.
        state: The Yjs state.
        ids: The id of each writer's newest change, see `Change.id`.
        cards: In a signed mesh, the newest card of each writer, see `Change.card`.
        told: The document's rules, and which of the changes they refuse; see `rules`, `hiding`.
            Empty if there are none.
    """

    document: str
    shared: bool
    version: Version
    heads: Mapping[int, int]
    stamp: int
    agents: Mapping[int, str]
    state: bytes
    ids: Mapping[int, bytes]
    cards: Mapping[int, bytes]
    told: bytes = b""

    def encode(self) -> bytes:
        """The bytes that are stored and sent: zstd, with a checksum of their own."""
        body = self._body()
        packed = zstandard.ZstdCompressor(level=3).compress(body)
        if len(body) > EXPANSION_MAX * len(packed):
            packed = body
        return hashlib.blake2b(packed, digest_size=16).digest() + packed

    def encode_plain(self) -> bytes:
        """The same without compression, for who compresses otherwise; `decode` reads both."""
        body = self._body()
        return hashlib.blake2b(body, digest_size=16).digest() + body

    def _body(self) -> bytes:
        # Many writers are the same agent's: one certificate, other numbers.
        places = {card[CARD_HEAD:]: 0 for card in self.cards.values()}
        places = {certificate: place for place, certificate in enumerate(sorted(places))}
        body: bytes = _pack(
            [
                FORMAT,
                self.document,
                self.shared,
                self.version.flat(),
                Version(self.heads).flat(),
                self.stamp,
                [part for pair in sorted(self.agents.items()) for part in pair],
                self.state,
                b"".join(self.ids[writer] for writer in sorted(self.version)),
                list(places),
                [
                    part
                    for writer, card in sorted(self.cards.items())
                    for part in (writer, card[:CARD_HEAD], places[card[CARD_HEAD:]])
                ],
                *([self.told] if self.told else []),
            ]
        )
        return body

    @classmethod
    def decode(cls, data: bytes) -> Snapshot:
        """Read a snapshot that may come from anybody. Raises InvalidUpdate."""
        if hashlib.blake2b(data[16:], digest_size=16).digest() != data[:16]:
            raise InvalidUpdate("a snapshot's checksum does not match")
        try:
            fields = _read_fields(_unpacked(data[16:]))
        except (zstandard.ZstdError, ValueError, MemoryError) as exc:
            raise InvalidUpdate(f"a snapshot cannot be read: {exc}") from exc
        if type(fields) is not tuple or not 11 <= len(fields) <= 12 or fields[0] != FORMAT:
            raise InvalidUpdate("a snapshot of an unknown format")
        told = fields[11] if len(fields) == 12 else b""
        if type(told) is not bytes:
            raise InvalidUpdate("a snapshot's rules are malformed")
        _, document, shared, version, heads, stamp, agents, state, ids, certificates, flat = fields[
            :11
        ]
        if not _is_name(document):
            raise InvalidUpdate("a snapshot's document has no valid name")
        if type(shared) is not bool or type(state) is not bytes or type(agents) is not tuple:
            raise InvalidUpdate("a snapshot is malformed")
        if shared and document.startswith("@"):
            raise InvalidUpdate("a document of the system holds no native types")
        _check(stamp, 0, STAMP_MAX, "stamp")
        pairs = list(zip(agents[::2], agents[1::2], strict=False))
        if len(agents) % 2 or not all(
            type(w) is int and type(a) is str and len(a) <= 1000 for w, a in pairs
        ):
            raise InvalidUpdate("a snapshot's agents are malformed")
        names = dict(pairs)
        taken = _decode_version(version)
        tips = _decode_version(heads)
        if not tips <= taken:
            raise InvalidUpdate("a snapshot's heads are not part of it")
        if type(ids) is not bytes or len(ids) != ID_BYTES * len(taken):
            raise InvalidUpdate("a snapshot's ids are malformed")
        each = (ids[at : at + ID_BYTES] for at in range(0, len(ids), ID_BYTES))
        known = dict(zip(sorted(taken), each, strict=True))
        cards = _decode_cards(certificates, flat, taken)
        return cls(document, shared, taken, tips, stamp, names, state, known, cards, told)


def _decode_cards(certificates: object, flat: object, version: Version) -> dict[int, bytes]:
    if type(certificates) is not tuple or type(flat) is not tuple or len(flat) % 3:
        raise InvalidUpdate("a snapshot's cards are malformed")
    if not all(type(each) is bytes and len(each) <= CARD_BYTES_MAX for each in certificates):
        raise InvalidUpdate("a snapshot's cards are malformed")
    cards = {}
    size = 0
    for writer, head, place in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
        if type(writer) is not int or writer not in version or writer in cards:
            raise InvalidUpdate("a snapshot has a card of nobody")
        is_head = type(head) is bytes and len(head) == CARD_HEAD
        if not is_head or type(place) is not int or not 0 <= place < len(certificates):
            raise InvalidUpdate("a snapshot's cards are malformed")
        cards[writer] = head + certificates[place]
        size += len(cards[writer])
        if size > CARDS_BYTES_MAX:
            raise InvalidUpdate("a snapshot has too many cards")
    return cards


def _unpacked(body: bytes) -> bytes:
    is_plain = not body.startswith(zstandard.FRAME_HEADER)
    # The size that the frame states is what zstd allocates, whatever else it is told.
    size = len(body) if is_plain else zstandard.frame_content_size(body)
    if not 0 < size <= min(STATE_BYTES_MAX, EXPANSION_MAX * len(body)):
        raise InvalidUpdate(f"a snapshot of {size} bytes is out of bounds")
    if is_plain:
        return body
    plain: bytes = zstandard.ZstdDecompressor().decompress(body, max_output_size=size)
    return plain


def _decode_version(flat: object) -> Version:
    if type(flat) is not tuple or len(flat) % 2 or len(flat) > 400_000:
        raise InvalidUpdate("a version has the wrong shape")
    for writer in flat[::2]:
        _check(writer, 1, WRITER_MAX, "writer")
    for seq in flat[1::2]:
        _check(seq, 1, SEQ_MAX, "seq")
    return Version.from_flat(flat)
