"""
Changes and snapshots: what travels between replicas and lies in journals.

A `Change` is one sealed transaction of one document: its dot, the heads of the history it builds
on (dots instead of whole vectors: 105 bytes against 6,400 with a thousand writers), a stamp, the
Yjs update and where it comes from. It is encoded once; the same bytes are journaled, sent and
relayed. A `Snapshot` is a whole document at exactly one version.

What is decoded here is well-formed and unaltered, not yet true: `Document.apply` checks the update
against the document before anything changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

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

DEPS_MAX = 40_000
STATE_BYTES_MAX = 256 * 1024 * 1024
FORMAT = 1

WRITE, RESOLUTION, TIDY = range(3)
"""Kinds of change: plain writes, a resolved conflict, dropping what is covered."""

CHECKSUM = 0
"""Scheme byte in front of a change: BLAKE2b-128 of the body follows."""


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

    @property
    def dot(self) -> Dot:
        return Dot(self.writer, self.seq)

    def __repr__(self) -> str:
        return f"<Change {self.document} {self.writer:x}:{self.seq} {len(self.data)} bytes>"


_pack = msgpack.Packer(use_bin_type=True).pack


def encode_change(
    document: str,
    dot: Dot,
    deps: Mapping[int, int],
    stamp: int,
    kind: int,
    shared: bool,
    update: bytes,
    origin: Origin,
) -> Change:
    """Build a change and its bytes."""
    flat = [number for dep in sorted(deps.items()) for number in dep]
    body = _pack([FORMAT, document, *dot, flat, stamp, kind, shared, update, *origin])
    data = bytes([CHECKSUM]) + hashlib.blake2b(body, digest_size=16).digest() + body
    heads = tuple(Dot(writer, seq) for writer, seq in sorted(deps.items()))
    return Change(document, dot.writer, dot.seq, heads, stamp, kind, shared, update, origin, data)


def decode_change(data: bytes) -> Change:
    """Read a change that may come from anybody.

    Raises:
        InvalidUpdate: The checksum does not match or a field is malformed or out of bounds.
    """
    if len(data) > CHANGE_BYTES_MAX + CHANGE_SLACK:
        raise InvalidUpdate(f"a change of {len(data)} bytes is too long")
    if len(data) < 18 or data[0] != CHECKSUM:
        raise InvalidUpdate("a change of an unknown scheme")
    body = data[17:]
    if hashlib.blake2b(body, digest_size=16).digest() != data[1:17]:
        raise InvalidUpdate("a change's checksum does not match")
    try:
        fields = msgpack.unpackb(body, use_list=False)
    except Exception as exc:
        raise InvalidUpdate(f"a change is not valid msgpack: {exc}") from exc
    if type(fields) is not tuple or len(fields) != 12 or fields[0] != FORMAT:
        raise InvalidUpdate("a change of an unknown format")
    _, document, writer, seq, flat, stamp, kind, shared, update, agent, message, run = fields
    if type(document) is not str or not 0 < len(document) <= NAME_CHARS_MAX:
        raise InvalidUpdate("a change's document has no valid name")
    _check(writer, 1, WRITER_MAX, "writer")
    _check(seq, 1, SEQ_MAX, "seq")
    _check(stamp, 0, STAMP_MAX, "stamp")
    _check(kind, 0, TIDY, "kind")
    if type(shared) is not bool or type(update) is not bytes:
        raise InvalidUpdate("a change's update is malformed")
    for text in (agent, message, run):
        if type(text) is not str or len(text) > 1000:
            raise InvalidUpdate("a change's origin is malformed")
    deps = decode_dots(flat)
    for dep in deps:
        if dep.writer == writer:
            raise InvalidUpdate("a change depends on its own writer")
    origin = Origin(agent, message, run)
    return Change(document, writer, seq, deps, stamp, kind, shared, update, origin, bytes(data))


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
    """A whole document at exactly *version*: the sum of all changes up to it, no more, no less."""

    document: str
    shared: bool
    version: Version
    heads: Mapping[int, int]
    stamp: int
    agents: Mapping[int, str]
    state: bytes

    def encode(self) -> bytes:
        """The bytes that are stored and sent: zstd, with a checksum of their own."""
        packed = zstandard.ZstdCompressor(level=3).compress(self._body())
        return hashlib.blake2b(packed, digest_size=16).digest() + packed

    def encode_plain(self) -> bytes:
        """The same without compression, for who compresses otherwise; `decode` reads both."""
        body = self._body()
        return hashlib.blake2b(body, digest_size=16).digest() + body

    def _body(self) -> bytes:
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
            ]
        )
        return body

    @classmethod
    def decode(cls, data: bytes) -> Snapshot:
        """Read a snapshot that may come from anybody. Raises InvalidUpdate."""
        if hashlib.blake2b(data[16:], digest_size=16).digest() != data[:16]:
            raise InvalidUpdate("a snapshot's checksum does not match")
        try:
            fields = msgpack.unpackb(_unpacked(data[16:]), use_list=False)
        except (zstandard.ZstdError, ValueError, MemoryError) as exc:
            raise InvalidUpdate(f"a snapshot cannot be read: {exc}") from exc
        if type(fields) is not tuple or len(fields) != 8 or fields[0] != FORMAT:
            raise InvalidUpdate("a snapshot of an unknown format")
        _, document, shared, version, heads, stamp, agents, state = fields
        if type(document) is not str or not 0 < len(document) <= NAME_CHARS_MAX:
            raise InvalidUpdate("a snapshot's document has no valid name")
        if type(shared) is not bool or type(state) is not bytes or type(agents) is not tuple:
            raise InvalidUpdate("a snapshot is malformed")
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
        return cls(document, shared, taken, tips, stamp, names, state)


def _unpacked(body: bytes) -> bytes:
    is_plain = not body.startswith(zstandard.FRAME_HEADER)
    # The size that the frame states is what zstd allocates, whatever else it is told.
    size = len(body) if is_plain else zstandard.frame_content_size(body)
    if not 0 < size <= STATE_BYTES_MAX:
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
