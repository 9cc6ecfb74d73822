"""
What replicas say to each other, and its bytes.

A *frame* says one thing: here are changes, this is what I have, please send that. Below,
each is a frozen dataclass. A *message* is what one websocket message carries: a header
byte and an msgpack array of frames. `encode_frame` turns a frame into bytes once for all
peers, `encode_message` bundles encoded frames, `decode_message` reads a message.

Everything that arrives is hostile until it has passed here: every length, count and number
has a limit, memory stays within a small multiple of the message, and whatever the bytes
are, the only exception is ProtocolError. What passes is well-formed, not yet true.

The format grows without breaking: fields added at the end of a frame are skipped by those
who don't know them, and so are whole frames with types from 128. A lower type that is
unknown ends the connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import chain, islice
from typing import Any, Literal, NoReturn, TypeVar

import msgpack
import zstandard

from crdtstate.change import CARD_BYTES_MAX, CARD_HEAD
from crdtstate.clock import SEQ_MAX, WRITER_MAX, Version
from crdtstate.digests import FANOUT, LEAF_MAX, PREFIX_BYTES_MAX
from crdtstate.errors import ProtocolError, TooLarge, UsageError
from crdtstate.votes import VOTERS_MAX

PROTOCOL_MIN = PROTOCOL_MAX = 1
"""The oldest and the newest meaning of frames spoken here, for Hello."""

WIRE_VERSION = 1
HEADER = WIRE_VERSION << 4
"""The first byte: how messages are framed, in 4 bits, and 4 reserved bits that are 0."""

MESSAGE_BYTES_MAX = 4 * 2**20
"""The most a message weighs, and the most its compressed frames add up to."""

BUNDLE_BYTES = 64 * 2**10
"""A writer stops adding to a bundle that weighs this much: more would only add latency."""

FRAME_BYTES_MAX = MESSAGE_BYTES_MAX - BUNDLE_BYTES - 2**10
"""Small enough that any frame still fits into a bundle that is below BUNDLE_BYTES."""

FIELDS_MAX = 64
"""Values in a frame's array, also in frames that are unknown here."""

BUNDLE_FRAMES_MAX = 256
CHANGES_MAX = 4096
RANGES_MAX = 4096
VERSION_ENTRIES_MAX = 200_000
HAVE_ID_BYTES = 8
PROOF_BYTES_MAX = 64
NEIGHBOURS_MAX = 16
"""Neighbours named in a heartbeat, and links in a record: as many as a complete mesh has."""

MEMBERS_MAX = 10_000
"""Members that a replica knows of."""

RECORD_BYTES_MAX = 32 * 2**10
RECORDS_MAX = 1024
RECORDS_CACHED = 4096
"""Decoded records that replicas of one process share."""

LOST_MAX = 1024
"""Members that one record says to have lost."""

ORDER_MAX = 2**54
WAVE_MAX = 2**53
WAVE_HOPS_MAX = 255
CHUNK_BYTES_MAX = 64 * 2**10
SNAPSHOT_BYTES_MAX = 2**30
NAME_CHARS_MAX = 200
HOPS_MAX = 64
DOCUMENTS_MAX = 10_000
PRESENCE_MAX = 4096
TTL_MS_MAX = 3600 * 1000
PATTERNS_MAX = 100
"""Names of documents in a Hello."""
DIGEST_BYTES = 32
RETRY_MS_MAX = 24 * 3600 * 1000
UINT64_MAX = 2**64 - 1
COMPARED_MAX = 256
"""Lanes that one frame compares."""
PATH_CHARS_MAX = 1100
HEADS_MAX = 40_000

COMPRESS_BYTES_MIN = 500
"""Smaller frames fit a packet anyway, and rarely shrink by more than the time they take."""

WINDOW_LOG = 20
"""zstd needs to look back 1 MiB at most."""


_COMPRESSED = 127
_COMPRESSED_HEAD = b"\x93\x7f\xce"
"""Frame type 127 wraps another, ``[127, raw size, zstd]``, with the raw size in four bytes."""

_SKIPPED_FROM = 128
"""Frames of unknown types from here on are skipped."""


PRIORITY_MAX = 3

Role = Literal["agent", "relay"]


class ByeCode(IntEnum):
    """Why a connection ends. A newer peer may send other numbers."""

    NORMAL = 0
    DUPLICATE = 1
    """These two have another connection; this one is dropped."""
    PROTOCOL = 2
    """The other side broke the protocol."""
    INCOMPATIBLE = 3
    """No version of the protocol is spoken by both."""
    SHUTDOWN = 4
    SAME_WRITER = 5
    """Two processes write as the same writer, as after copying a store. One must stop."""
    PRUNED = 6
    """The sender has more links than it needs; it is still a member. Don't dial it for a while."""


class Verdict(IntEnum):
    """Whether two replicas hold the same."""

    OTHER = 0
    """It cannot be told: the version is another one here, or there is no such thing."""
    SAME = 1
    DIFFERENT = 2
    BUSY = 3
    """It cannot be told now."""


ROLES: tuple[Role, ...] = ("agent", "relay")
"""A role travels as its place here."""

_Sized = TypeVar("_Sized", str, bytes)


# Frames


@dataclass(frozen=True, slots=True)
class Hello:
    """The first frame, both ways: who speaks, and which versions of the protocol."""

    proto_min: int
    proto_max: int
    writer: int
    session: int
    """64 random bits for each start of a process: tells a restart from a second process."""
    agent: str
    role: Role = "agent"
    address: str | None = None
    """The URL where others can reach this one, if they can."""
    is_durable: bool = False
    """It has a store."""
    documents: tuple[str, ...] | None = None
    """The names of the documents it takes part in, ``x*`` for all that begin with x; None: all."""
    head: bytes = b""
    """In a signed mesh, what the number of its writer is made of beside the key."""


@dataclass(frozen=True, slots=True)
class Bye:
    """The last frame: why the sender hangs up."""

    code: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Still here, in this state. Passed on at once as a wave, it also shapes the tree."""

    fingerprint: int
    """64 bits over all versions: the same on both sides when both have the same."""
    neighbours: tuple[int, ...] | None = None
    """The writers the sender is connected to, or None for as before."""
    priority: int = PRIORITY_MAX
    root: int = 0
    """Priority and session of whom the sender takes for the root of the tree."""
    wave: int = 0
    """The newest wave of that root that reached the sender,"""
    hops: int = 0
    """and how many passed it on until then."""
    is_parent: bool = False
    """The receiver is the sender's parent in the tree."""
    members: int = 0
    """64 bits over all member records, like the fingerprint."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a replica says of itself to the whole mesh. Of two, the one of higher `order` counts.

    Its links are what the others compute from who can be reached; a member is down when no
    living member says that it has a connection with it.
    """

    writer: int
    session: int
    seq: int
    """Rises with each record of this writer, over restarts too: it follows the wall clock."""
    agent: str
    role: Role = "agent"
    is_gone: bool = False
    """It said goodbye, or it was down for so long that it no longer counts."""
    is_durable: bool = False
    """It has a store."""
    address: str | None = None
    links: tuple[int, ...] = ()
    """Writers of members it is connected to; at most NEIGHBOURS_MAX, relays first."""
    lost: tuple[tuple[int, int], ...] = ()
    """(writer, seq) of records that claim a link to this replica that does not stand."""

    @property
    def order(self) -> int:
        """What tells the newer of two records of one writer."""
        return 2 * self.seq + self.is_gone


@dataclass(frozen=True, slots=True)
class Members:
    """Records: (writer, order, what `encode_record` made). Who has the order need not decode it."""

    records: tuple[tuple[int, int, bytes], ...]


@dataclass(frozen=True, slots=True)
class Roll:
    """Which records the sender has: writer -> order. Please send what is newer."""

    orders: dict[int, int]
    is_answer: bool = False
    """These records are older here than there: send them, and ask nothing back."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Encoded changes; their insides are none of the wire's business."""

    changes: tuple[bytes, ...]
    answer: bool = False
    """They answer a Want."""
    more: bool = False
    """The answer was cut by a size limit; ask again for the rest."""


@dataclass(frozen=True, slots=True)
class Have:
    """What the sender has durably: announcement, acknowledgement and digest in one."""

    document: str
    version: Version
    full: bool = False
    """All writers are named; otherwise only those that moved since the last Have."""
    ids: bytes = b""
    """The first HAVE_ID_BYTES of the id of each writer's change, in the order of writers; zeros
    where the sender does not know. Empty: nothing is said of them."""


@dataclass(frozen=True, slots=True)
class Want:
    """Please send these changes: ``(writer, first seq, last seq)``, ends included."""

    document: str
    ranges: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Offer:
    """What was wanted has left the log; here is a snapshot that includes it."""

    document: str
    digest: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Get:
    """Please send the offered snapshot's chunk at *offset*."""

    document: str
    digest: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a snapshot."""

    document: str
    digest: bytes
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Busy:
    """Not now; ask again in a while."""

    document: str
    retry_after_ms: int


@dataclass(frozen=True, slots=True)
class Ask:
    """Tell me when you have *version* of a document; see `quorum`."""

    nonce: int
    attempt: int
    """Counts how often it was asked; only the newest is passed on."""
    names: tuple[str, ...]
    """The agents that are asked; none: all."""
    document: str
    version: Version
    durable: bool = False
    """Have it so that a power cut does not take it."""
    tell: bool = False
    """Say which version you have."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What *agent* says to a question."""

    nonce: int
    agent: str
    version: Version
    hops: int = HOPS_MAX
    """How often it may still be passed on: the ways back of two questions can form a circle."""
    certificate: bytes = b""
    proof: bytes = b""
    """In a signed mesh, that the agent says so."""


@dataclass(frozen=True, slots=True)
class Presence:
    """What an agent shows now, until *ttl_ms* milliseconds from now; None: nothing."""

    writer: int
    agent: str
    count: int
    """Rises with each of this writer."""
    ttl_ms: int
    value: bytes | None


@dataclass(frozen=True, slots=True)
class Borrow:
    """May I write under a writer of yours? See `leases`."""


@dataclass(frozen=True, slots=True)
class Lend:
    """Yes, under *writer*, once you have this of it: document -> seq. Writer 0: no."""

    writer: int
    seqs: dict[str, int]


@dataclass(frozen=True, slots=True)
class Return:
    """Here is your writer back, with this written under it: document -> seq."""

    writer: int
    seqs: dict[str, int]


@dataclass(frozen=True, slots=True)
class Compare:
    """Do you hold the same? Of all of a document, or of some lanes; see `comparing`."""

    nonce: int
    document: str
    whole: tuple[int, int] | None
    """64 bits over its version, and over its content;"""
    lanes: tuple[tuple[int, int, int], ...] = ()
    """or (writer, seq, 64 bits over the lane's content). One of the two is given."""
    is_fresh: bool = False
    """It matters: go through it again, if that was not done just now."""


@dataclass(frozen=True, slots=True)
class Compared:
    """What is the same: one verdict for all of the document, or one for each lane."""

    nonce: int
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class Digests:
    """What the sender has, below a prefix of the hashes of paths, of a lane that differs: sums by
    the next byte, or slots."""

    document: str
    writer: int
    """Whose lane; 0: all of a document of native types."""
    mark: int
    """The lane's seq; of native types 64 bits over the version."""
    prefix: bytes
    children: tuple[int, ...]
    """FANOUT sums, or none: then these are all the slots:"""
    slots: tuple[tuple[str, int], ...]
    """(path, 64 bits over the slot)."""
    heads: dict[int, int]
    """Of the history that the sender has taken in."""


@dataclass(frozen=True, slots=True)
class Diverged:
    """Here we differ: this is what the sender has at a path. If it has nothing, the receiver is to
    find out whether that is a fault."""

    document: str
    writer: int
    mark: int
    path: str
    digest: int | None
    heads: dict[int, int]


Frame = (
    Hello
    | Bye
    | Heartbeat
    | Members
    | Roll
    | Changes
    | Have
    | Want
    | Offer
    | Get
    | Chunk
    | Busy
    | Ask
    | Answer
    | Borrow
    | Lend
    | Return
    | Presence
    | Compare
    | Compared
    | Digests
    | Diverged
)


# Encoding. Type numbers are for ever; from 128 on, those who do not know them skip them. Set aside
# for what is planned: 1, 6-10, 19-22, 27, 30, 31 (welcome, probes, bucketed versions,
# acknowledgements, stability, end of snapshot, credit, error).


def encode_frame(frame: Frame) -> bytes:
    """Return *frame*'s bytes, compressed where that pays. One encoding serves all peers.

    Fields are trusted to keep the limits: peers refuse a frame that doesn't.

    Raises:
        UsageError: The frame is larger than FRAME_BYTES_MAX; split it.
    """
    raw: bytes = msgpack.packb(_to_array(frame))
    if len(raw) <= COMPRESS_BYTES_MIN:
        return raw
    if len(raw) > FRAME_BYTES_MAX:
        name = type(frame).__name__
        raise UsageError(f"{name}: {len(raw)} bytes exceed {FRAME_BYTES_MAX}; split the frame")
    packed = _compress(raw)
    if len(packed) > 0.9 * len(raw):
        return raw
    return b"".join((_COMPRESSED_HEAD, len(raw).to_bytes(4, "big"), msgpack.packb(packed)))


def encode_message(frames: Iterable[bytes]) -> bytes:
    """Bundle encoded *frames*: at least one, at most BUNDLE_FRAMES_MAX.

    It always fits if a frame is only added while the others `weigh` below BUNDLE_BYTES.
    """
    bundle = list(frames)
    count = len(bundle)
    assert 0 < count <= BUNDLE_FRAMES_MAX, f"{count} frames in a bundle"
    assert sum(map(weigh, bundle)) < MESSAGE_BYTES_MAX - 4, "the bundle is too heavy"
    array = bytes((0x90 | count,)) if count < 16 else b"\xdc" + count.to_bytes(2, "big")
    return b"".join((bytes((HEADER,)), array, *bundle))


def weigh(frame: bytes) -> int:
    """Return how much an encoded *frame* adds to a message: its size when decompressed."""
    if frame.startswith(_COMPRESSED_HEAD):
        return int.from_bytes(frame[3:7], "big")
    return len(frame)


def _to_array(frame: Frame) -> tuple[Any, ...]:
    match frame:
        case Changes(changes, answer, more):
            return (16, changes, answer, more)
        case Have(document, version, full, ids):
            return (17, document, version.flat(), full, ids)
        case Want(document, ranges):
            return (18, document, tuple(chain.from_iterable(ranges)))
        case Heartbeat(fingerprint, neighbours, priority, root, wave, hops, is_parent, members):
            # None and () differ, and arrays are read as arrays: hence the flag.
            told = neighbours is not None
            tree = (priority, root, wave, hops, is_parent)
            return (3, fingerprint, told, neighbours or (), *tree, members)
        case Members(records):
            writers, orders, data = zip(*records, strict=True) if records else ((), (), ())
            return (4, writers, orders, data)
        case Roll(orders, is_answer):
            return (5, tuple(chain.from_iterable(sorted(orders.items()))), is_answer)
        case Offer(document, digest, size):
            return (24, document, digest, size)
        case Get(document, digest, offset):
            return (25, document, digest, offset)
        case Chunk(document, digest, offset, data):
            return (26, document, digest, offset, data)
        case Busy(document, retry_after_ms):
            return (28, document, retry_after_ms)
        case Hello(low, high, writer, session, agent, role, address, is_durable, documents, head):
            who = (writer, session, agent, ROLES.index(role), address, is_durable)
            return (0, low, high, *who, documents is not None, documents or (), head)
        case Ask(nonce, attempt, names, document, version, durable, tell):
            return (34, nonce, attempt, names, document, version.flat(), durable, tell)
        case Answer(nonce, agent, version, hops, certificate, proof):
            return (35, nonce, agent, version.flat(), hops, certificate, proof)
        case Borrow():
            return (36,)
        case Lend(writer, seqs):
            return (37, writer, tuple(seqs), tuple(seqs.values()))
        case Return(writer, seqs):
            return (38, writer, tuple(seqs), tuple(seqs.values()))
        case Presence(writer, agent, count, ttl_ms, value):
            return (40, writer, agent, count, ttl_ms, value)
        case Compare(nonce, document, whole, lanes, is_fresh):
            sums = (whole is not None, *(whole or (0, 0)))
            return (128, nonce, document, *sums, tuple(chain.from_iterable(lanes)), is_fresh)
        case Compared(nonce, verdicts):
            return (129, nonce, tuple(verdicts))
        case Digests(document, writer, mark, prefix, children, slots, heads):
            paths, entries = zip(*slots, strict=True) if slots else ((), ())
            flat = tuple(chain.from_iterable(heads.items()))
            return (130, document, writer, mark, prefix, children, paths, entries, flat)
        case Diverged(document, writer, mark, path, digest, heads):
            flat = tuple(chain.from_iterable(heads.items()))
            return (131, document, writer, mark, path, digest is not None, digest or 0, flat)
        case Bye(code, reason):
            return (2, code, reason)


def encode_record(record: Record) -> bytes:
    """Return a record's bytes, for `Members`. They are passed on as they are."""
    lost = tuple(chain.from_iterable(record.lost))
    role, flags = ROLES.index(record.role), record.is_gone + 2 * record.is_durable
    head = (record.writer, record.session, record.seq, record.agent, role, flags, record.address)
    raw: bytes = msgpack.packb((*head, record.links, lost))
    return raw


def split_records(records: Iterable[tuple[int, int, bytes]]) -> Iterator[Members]:
    """Put records in frames of a size that does not delay what comes after them."""
    part: list[tuple[int, int, bytes]] = []
    size = 0
    for record in records:
        if part and (size + len(record[2]) > BUNDLE_BYTES or len(part) >= RECORDS_MAX):
            yield Members(tuple(part))
            part, size = [], 0
        part.append(record)
        size += len(record[2])
    if part:
        yield Members(tuple(part))


# Decoding. Everything is read in the order in which it was written, one value at a time and
# never deeper than expected: an unpacker that builds what it finds can be made to allocate
# gigabytes by a kilobyte of arrays in arrays, each stating the largest length.


def decode_message(data: bytes) -> list[Frame]:
    """Return the frames of a message, without those of unknown types from 128.

    Raises:
        ProtocolError: The bytes are not a message; nothing of it was taken.
    """
    if not 0 < len(data) <= MESSAGE_BYTES_MAX:
        raise ProtocolError(f"a message of {len(data)} bytes; 1 to {MESSAGE_BYTES_MAX} are allowed")
    if data[0] != HEADER:
        raise ProtocolError(f"a message begins with {data[0]:#04x}, not {HEADER:#04x}")
    try:
        return _read_message(memoryview(data)[1:])
    except ProtocolError:
        raise
    except Exception as exc:
        raise ProtocolError(f"a message is malformed: {exc!r}") from exc


def _read_message(data: memoryview) -> list[Frame]:
    source = _source(data)
    frames = []
    room = MESSAGE_BYTES_MAX
    for _ in range(_number(source.read_array_header(), 0, BUNDLE_FRAMES_MAX)):
        length, kind = _read_head(source)
        if kind == _COMPRESSED:
            raw = _read_compressed(source, length, room)
            room -= len(raw)
            inner = _source(raw)
            frame = _read_frame(inner, *_read_head(inner))
            _check_end(inner, len(raw))
        else:
            frame = _read_frame(source, length, kind)
        if frame is not None:
            frames.append(frame)
    _check_end(source, len(data))
    return frames


def _source(data: bytes | memoryview) -> msgpack.Unpacker:
    """Return what the readers below read from: no arrays but those they open themselves."""
    source = msgpack.Unpacker(
        max_buffer_size=MESSAGE_BYTES_MAX,
        # Else it sets a megabyte aside, whose pages cost more than to read a small message.
        read_size=len(data),
        max_array_len=0,
        max_map_len=0,
        max_ext_len=0,
        ext_hook=_refuse,
    )
    source.feed(data)
    return source


def _refuse(*_: object) -> NoReturn:
    raise ProtocolError("an extension type")


def _check_end(source: msgpack.Unpacker, size: int) -> None:
    if source.tell() != size:
        raise ProtocolError(f"{size - source.tell()} bytes are left over")


def _read_head(source: msgpack.Unpacker) -> tuple[int, int]:
    """Read how many values a frame's array has and the first of them, its type."""
    length: int = source.read_array_header()
    return length, _number(source.unpack(), 0, UINT64_MAX)


def _read_frame(source: msgpack.Unpacker, length: int, kind: int) -> Frame | None:
    known = _LENGTHS.get(kind, 1 if kind >= _SKIPPED_FROM else 0)
    if not known:
        raise ProtocolError(f"unknown frame type {kind}")
    if not known <= length <= FIELDS_MAX:
        raise ProtocolError(f"a frame of type {kind} lacks fields or has too many: {length}")
    frame = _read_fields(source, kind) if kind in _LENGTHS else None
    for _ in range(length - known):
        source.skip()
    return frame


_LENGTHS = {
    **{0: 12, 2: 3, 3: 10, 4: 4, 5: 3},
    **{16: 4, 17: 5, 18: 3, 24: 4, 25: 4, 26: 5, 28: 3},
    **{34: 8, 35: 7, 36: 1, 37: 4, 38: 4, 40: 6},
    **{128: 8, 129: 3, 130: 9, 131: 8},
}
"""How many values a frame's array has at least, by type."""


def _read_fields(source: msgpack.Unpacker, kind: int) -> Frame:
    read = source.unpack
    match kind:
        case 16:
            changes = _read_array(source, CHANGES_MAX, bytes)
            return Changes(changes, _flag(read()), _flag(read()))
        case 17:
            name, version, full = _name(read()), _read_version(source), _flag(read())
            ids = _sized(read(), bytes, 0, HAVE_ID_BYTES * len(version))
            if ids and len(ids) != HAVE_ID_BYTES * len(version):
                raise ProtocolError("a Have with ids of others than it names")
            return Have(name, version, full, ids)
        case 18:
            return Want(_name(read()), _read_ranges(source))
        case 3:
            fingerprint, told = _number(read(), 0, UINT64_MAX), _flag(read())
            neighbours = _within(_read_array(source, NEIGHBOURS_MAX, int), WRITER_MAX)
            return Heartbeat(
                fingerprint,
                neighbours if told else None,
                priority=_number(read(), 0, PRIORITY_MAX),
                root=_number(read(), 0, UINT64_MAX),
                wave=_number(read(), 0, WAVE_MAX),
                hops=_number(read(), 0, WAVE_HOPS_MAX),
                is_parent=_flag(read()),
                members=_number(read(), 0, UINT64_MAX),
            )
        case 4:
            writers = _within(_read_array(source, RECORDS_MAX, int), WRITER_MAX)
            orders = _within(_read_array(source, RECORDS_MAX, int), ORDER_MAX)
            data = _read_array(source, RECORDS_MAX, bytes)
            if not len(writers) == len(orders) == len(data):
                raise ProtocolError("not one writer and one order for each record")
            return Members(tuple(zip(writers, orders, data, strict=True)))
        case 5:
            flat = _read_array(source, MEMBERS_MAX, int, group=2)
            _within(flat[0::2], WRITER_MAX)
            if flat and not 0 <= min(flat[1::2]) <= max(flat[1::2]) <= ORDER_MAX:
                raise ProtocolError("a record's order is out of range")
            return Roll(dict(zip(flat[0::2], flat[1::2], strict=True)), _flag(read()))
        case 24:
            return Offer(_name(read()), _digest(read()), _size(read()))
        case 25:
            return Get(_name(read()), _digest(read()), _size(read()))
        case 26:
            document, digest, offset = _name(read()), _digest(read()), _size(read())
            return Chunk(document, digest, offset, _sized(read(), bytes, 0, CHUNK_BYTES_MAX))
        case 28:
            return Busy(_name(read()), _number(read(), 0, RETRY_MS_MAX))
        case 34:
            return Ask(
                nonce=_number(read(), 0, UINT64_MAX),
                attempt=_number(read(), 1, 2**32),
                names=tuple(map(_agent, _read_array(source, VOTERS_MAX, str))),
                document=_name(read()),
                version=_read_version(source),
                durable=_flag(read()),
                tell=_flag(read()),
            )
        case 35:
            nonce, agent = _number(read(), 0, UINT64_MAX), _agent(read())
            version, hops = _read_version(source), _number(read(), 0, HOPS_MAX)
            certificate = _sized(read(), bytes, 0, CARD_BYTES_MAX)
            proof = _sized(read(), bytes, 0, PROOF_BYTES_MAX)
            return Answer(nonce, agent, version, hops, certificate, proof)
        case 36:
            return Borrow()
        case 37:
            return Lend(_number(read(), 0, WRITER_MAX), _read_seqs(source))
        case 38:
            return Return(_number(read(), 1, WRITER_MAX), _read_seqs(source))
        case 40:
            return Presence(
                writer=_number(read(), 1, WRITER_MAX),
                agent=_agent(read()),
                count=_number(read(), 0, UINT64_MAX),
                ttl_ms=_number(read(), 0, TTL_MS_MAX),
                value=None if (value := read()) is None else _sized(value, bytes, 0, PRESENCE_MAX),
            )
        case 128:
            return _read_compare(source)
        case 129:
            nonce = _number(read(), 0, UINT64_MAX)
            verdicts = tuple(map(Verdict, _read_array(source, COMPARED_MAX, int)))
            return Compared(nonce, verdicts)
        case 130:
            return _read_digests(source)
        case 131:
            place = (_name(read()), _number(read(), 0, WRITER_MAX), _number(read(), 0, UINT64_MAX))
            path, has_one, entry = _path(read()), _flag(read()), _number(read(), 0, UINT64_MAX)
            return Diverged(*place, path, entry if has_one else None, _read_heads(source))
        case 2:
            code, reason = _number(read(), 0, 0xFFFF), _sized(read(), str, 0, 500)
            return Bye(code, reason if reason.isprintable() else repr(reason)[1:-1])
        case _:
            return Hello(
                proto_min=_number(read(), 1, 0xFFFF),
                proto_max=_number(read(), 1, 0xFFFF),
                writer=_number(read(), 1, WRITER_MAX),
                session=_number(read(), 0, UINT64_MAX),
                agent=_agent(read()),
                role=ROLES[_number(read(), 0, len(ROLES) - 1)],
                address=_address(read()),
                is_durable=_flag(read()),
                documents=_read_patterns(source),
                head=_sized(read(), bytes, 0, CARD_HEAD),
            )


def _read_compare(source: msgpack.Unpacker) -> Compare:
    read = source.unpack
    nonce, document, told = _number(read(), 0, UINT64_MAX), _name(read()), _flag(read())
    whole = (_number(read(), 0, UINT64_MAX), _number(read(), 0, UINT64_MAX))
    flat = _read_array(source, COMPARED_MAX, int, group=3)
    writers, seqs = _within(flat[0::3], WRITER_MAX), _within(flat[1::3], SEQ_MAX)
    lanes = tuple(zip(writers, seqs, _uint64s(flat[2::3]), strict=True))
    if told == bool(lanes) or len(set(writers)) < len(writers):
        raise ProtocolError("compares nothing, or something twice")
    return Compare(nonce, document, whole if told else None, lanes, _flag(read()))


def _read_digests(source: msgpack.Unpacker) -> Digests:
    read = source.unpack
    place = (_name(read()), _number(read(), 0, WRITER_MAX), _number(read(), 0, UINT64_MAX))
    prefix = _sized(read(), bytes, 0, PREFIX_BYTES_MAX)
    children = _uint64s(_read_array(source, FANOUT, int))
    paths = tuple(map(_path, _read_array(source, LEAF_MAX, str)))
    entries = _uint64s(_read_array(source, LEAF_MAX, int))
    if len(children) not in (0, FANOUT) or (children and paths):
        raise ProtocolError("digests are sums or slots")
    if len(set(paths)) != len(entries):
        raise ProtocolError("not one digest for each path")
    slots = tuple(zip(paths, entries, strict=True))
    return Digests(*place, prefix, children, slots, _read_heads(source))


def _read_heads(source: msgpack.Unpacker) -> dict[int, int]:
    flat = _read_array(source, HEADS_MAX, int, group=2)
    writers, seqs = _within(flat[0::2], WRITER_MAX), _within(flat[1::2], SEQ_MAX)
    return dict(zip(writers, seqs, strict=True))


def _uint64s(numbers: tuple[int, ...]) -> tuple[int, ...]:
    if numbers and not 0 <= min(numbers) <= max(numbers) <= UINT64_MAX:
        raise ProtocolError("not all of these are numbers of 64 bits")
    return numbers


def _path(value: Any) -> str:
    return _sized(value, str, 1, PATH_CHARS_MAX)


@lru_cache(maxsize=RECORDS_CACHED)
def decode_record(data: bytes) -> Record:
    """Return the record that `encode_record` wrote; raises ProtocolError."""
    if not 0 < len(data) <= RECORD_BYTES_MAX:
        raise ProtocolError(f"a record of {len(data)} bytes")
    source = _source(data)
    try:
        if not RECORD_FIELDS <= source.read_array_header() <= FIELDS_MAX:
            raise ProtocolError("a record lacks fields or has too many")
        return _read_record(source)
    except ProtocolError:
        raise
    except Exception as exc:
        raise ProtocolError(f"a record is malformed: {exc!r}") from exc


def _read_record(source: msgpack.Unpacker) -> Record:
    read = source.unpack
    writer, session = _number(read(), 1, WRITER_MAX), _number(read(), 0, UINT64_MAX)
    seq, agent = _number(read(), 1, ORDER_MAX // 2 - 1), _agent(read())
    role, flags = ROLES[_number(read(), 0, len(ROLES) - 1)], _number(read(), 0, 3)
    address = _address(read())
    links = _within(_read_array(source, NEIGHBOURS_MAX, int), WRITER_MAX)
    lost = _read_array(source, LOST_MAX, int, group=2)
    _within(lost, ORDER_MAX)
    pairs = tuple(zip(lost[0::2], lost[1::2], strict=True))
    gone, durable = bool(flags & 1), bool(flags & 2)
    return Record(writer, session, seq, agent, role, gone, durable, address, links, pairs)


RECORD_FIELDS = 9
"""Values in a record's array; more, from a newer peer, are left unread."""


def _read_array(
    source: msgpack.Unpacker, groups_max: int, cls: type, group: int = 1
) -> tuple[Any, ...]:
    length = source.read_array_header()
    if length > groups_max * group or length % group:
        raise ProtocolError(f"an array of {length}, not of at most {groups_max} times {group}")
    values = tuple(islice(source, length))
    # The set of their types is the fastest way to ask, and tells False from 0.
    if len(values) < length or not set(map(type, values)) <= {cls}:
        raise ProtocolError(f"an array that is not {length} times {cls.__name__}")
    return values


def _read_version(source: msgpack.Unpacker) -> Version:
    flat = _read_array(source, VERSION_ENTRIES_MAX, int, group=2)
    writers, seqs = _within(flat[0::2], WRITER_MAX), _within(flat[1::2], SEQ_MAX)
    version = Version(zip(writers, seqs, strict=True))
    if len(version) < len(writers):
        raise ProtocolError("a version names a writer twice")
    return version


def _read_ranges(source: msgpack.Unpacker) -> tuple[tuple[int, int, int], ...]:
    flat = _read_array(source, RANGES_MAX, int, group=3)
    writers = _within(flat[0::3], WRITER_MAX)
    firsts, lasts = _within(flat[1::3], SEQ_MAX), _within(flat[2::3], SEQ_MAX)
    if any(first > last for first, last in zip(firsts, lasts, strict=True)):
        raise ProtocolError("a range ends before it begins")
    return tuple(zip(writers, firsts, lasts, strict=True))


def _read_patterns(source: msgpack.Unpacker) -> tuple[str, ...] | None:
    told = _flag(source.unpack())
    patterns = tuple(map(_name, _read_array(source, PATTERNS_MAX, str)))
    return patterns if told else None


def _within(numbers: tuple[int, ...], high: int) -> tuple[int, ...]:
    if numbers and not 1 <= min(numbers) <= max(numbers) <= high:
        raise ProtocolError(f"not all of these are from 1 to {high}: {numbers[:9]}")
    return numbers


def _number(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ProtocolError(f"not a number from {low} to {high}: {value!r:.50}")
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ProtocolError(f"neither true nor false: {value!r:.50}")
    return value


def _sized(value: Any, cls: type[_Sized], low: int, high: int) -> _Sized:
    if type(value) is not cls or not low <= len(value) <= high:
        raise ProtocolError(f"not {cls.__name__} of length {low} to {high}")
    return value


def _agent(value: Any) -> str:
    name = _sized(value, str, 1, 100)
    if not name.isprintable():
        # It is shown on terminals, and written to logs.
        raise ProtocolError("an agent's name cannot be printed")
    return name


def _read_seqs(source: msgpack.Unpacker) -> dict[str, int]:
    names = tuple(map(_name, _read_array(source, DOCUMENTS_MAX, str)))
    seqs = _within(_read_array(source, DOCUMENTS_MAX, int), SEQ_MAX)
    if len(set(names)) != len(seqs):
        raise ProtocolError("not one seq for each document")
    return dict(zip(names, seqs, strict=True))


def _address(value: Any) -> str | None:
    return None if value is None else _sized(value, str, 1, 500)


def _name(value: Any) -> str:
    name = _sized(value, str, 1, NAME_CHARS_MAX)
    if not name.isprintable():
        raise ProtocolError("a document's name cannot be printed")
    return name


def _digest(value: Any) -> bytes:
    return _sized(value, bytes, DIGEST_BYTES, DIGEST_BYTES)


def _size(value: Any) -> int:
    return _number(value, 0, SNAPSHOT_BYTES_MAX)


# Compression

_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(3, window_log=WINDOW_LOG)

# A compressor serves one thread at a time and is slow to create. Each call takes an idle
# one; there are never more than threads that used one at once. (pop and append are atomic.)
_compressors: list[zstandard.ZstdCompressor] = []
_decompressors: list[zstandard.ZstdDecompressor] = []


def _compress(raw: bytes) -> bytes:
    try:
        compressor = _compressors.pop()
    except IndexError:
        compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    packed: bytes = compressor.compress(raw)
    _compressors.append(compressor)
    return packed


def _read_compressed(source: msgpack.Unpacker, length: int, room: int) -> bytes:
    if length != 3:
        raise ProtocolError("a compressed frame is not [127, raw size, zstd]")
    raw_size = _number(source.unpack(), 1, UINT64_MAX)
    if raw_size > min(FRAME_BYTES_MAX, room):
        raise TooLarge(f"a compressed frame of {raw_size} bytes")
    packed = _sized(source.unpack(), bytes, 1, FRAME_BYTES_MAX)
    # zstd allocates what its header states and then ignores max_output_size, and minds the
    # window only when streaming. So nothing is unpacked before the header was read here.
    stated = zstandard.get_frame_parameters(packed)
    if stated.content_size != raw_size:
        raise TooLarge(f"a compressed frame of {raw_size} bytes states {stated.content_size}")
    if stated.window_size > 1 << WINDOW_LOG:
        raise TooLarge(f"a compressed frame looks back {stated.window_size} bytes")
    return _decompress(packed)


def _decompress(packed: bytes) -> bytes:
    try:
        decompressor = _decompressors.pop()
    except IndexError:
        decompressor = zstandard.ZstdDecompressor()
    try:
        raw: bytes = decompressor.decompress(packed, allow_extra_data=False)
        return raw
    finally:
        _decompressors.append(decompressor)
