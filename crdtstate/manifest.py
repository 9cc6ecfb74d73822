"""
What a checkpoint consists of, as bytes and as a plan.

A *part* is a blob named by the SHA-256 of its plain bytes: a document's *base* (its snapshot), or a
*delta* (the changes after the part before it). A *manifest* names, for every document, the base and
the deltas that lead to its version. It is complete by itself: a document that did not change names
its parent's parts again, so no chain of manifests has to be walked to read one, and forgetting an
old checkpoint is a question of which parts are still named.

A checkpoint's *id* is its stamp and the hash of its manifest's bytes: ids sort by time, and tell
whether a manifest is what was written. Whose it is, is told by the proof at its end, if there is
one (`attestation`). Whatever is decoded here may come from anybody. It is bounded before anything
is allocated for it, and checked against the name it was asked for by.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import msgpack
import zstandard

from crdtstate.change import CHANGE_BYTES_MAX, CHANGE_SLACK, NAME_CHARS_MAX, STATE_BYTES_MAX
from crdtstate.clock import SEQ_MAX, STAMP_MAX, WRITER_MAX, Cut, Stamp, Version
from crdtstate.documents import DOCUMENTS_MAX
from crdtstate.errors import CRDTStateError

FORMAT = 1

SYSTEM = "@"
"""With this begin the names of the documents that crdtstate itself keeps."""

LABEL_CHARS_MAX = 200
MANIFEST_BYTES_MAX = 32 * 2**20
VERSION_WRITERS_MAX = 200_000
WALL_MS_MAX = 2**53
PROOF_BYTES_MAX = 4096
"""A signature and a certificate are less."""

# When a document's chain of deltas has become so long that loading it would be slow, it is
# renewed. The share is of the base's plain size, for the newest delta and for all together.
DELTA_SHARE_MAX = 0.5
DELTAS_MAX = 32
CHANGES_MAX = 5000

PART_BYTES_MAX = STATE_BYTES_MAX + 2**20
"""The most that a part unpacks to."""

LEVEL = 3
ARCHIVE_LEVEL = 9
"""How hard parts are compressed: nearby, and where old checkpoints are kept for long."""

_ID = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})")
_QUOTED_CHARS_MAX = 200

Range = tuple[int, int, int]
"""Changes of a document: writer, first seq, last seq."""


class Damaged(CRDTStateError):
    """Bytes that are not what was written, or not a manifest or part; nothing was altered."""


class Foreign(Damaged):
    """What was written under this id, and nothing that this version reads: a newer one may."""


class Part(NamedTuple):
    """A blob of a checkpoint.

    Attributes:
        name: SHA-256 of its plain bytes, 64 hexadecimal digits.
        size: How many bytes these are,
        stored: and how many they were when they were first stored.
        changes: How many changes it holds; 0 for a base.
    """

    name: str
    size: int
    stored: int
    changes: int = 0


class Entry(NamedTuple):
    """One document in a checkpoint: at *version* it is *base* with the changes of *deltas*."""

    name: str
    shared: bool
    version: Version
    base: Part
    deltas: tuple[Part, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.base, *self.deltas)


class LoadedDocument(NamedTuple):
    """One document as a checkpoint gives it back.

    Attributes:
        snapshot: For `Snapshot.decode`; empty if it is not to be believed.
        changes: What came after it, for `decode_change`, in an order in which they can be applied.
    """

    name: str
    shared: bool
    version: Version
    snapshot: bytes
    changes: list[bytes]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checkpoint's table of contents.

    Attributes:
        agent: Whose it is,
        writer: and as whom it wrote then.
        stamp: When, by the hybrid logical clock; above all that is in it.
        created_ms: When, by the wall clock, in milliseconds since 1970.
        label: For people.
        parent: The checkpoint it was made as a difference to, if there was one.
        documents: What is in it, by name.
        proof: Whose it is, for `attestation`; empty if nothing tells.
        names: The names of all of its parts.
    """

    agent: str
    writer: int
    stamp: int
    created_ms: int
    label: str
    parent: str | None
    documents: tuple[Entry, ...]
    proof: bytes = b""
    names: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = frozenset(part.name for entry in self.documents for part in entry.parts)
        object.__setattr__(self, "names", names)

    @property
    def version(self) -> Cut:
        """The versions of all documents."""
        return Cut({entry.name: entry.version for entry in self.documents})

    @property
    def size(self) -> int:
        """How many bytes its parts have when they are unpacked."""
        return sum(part.size for part in self.parts().values())

    @property
    def stored(self) -> int:
        """How many bytes its parts take, each counted once."""
        return sum(part.stored for part in self.parts().values())

    def parts(self) -> dict[str, Part]:
        """All of its parts, by name."""
        return {part.name: part for entry in self.documents for part in entry.parts}

    def find(self, document: str) -> Entry | None:
        """The entry of a document."""
        return next((entry for entry in self.documents if entry.name == document), None)

    def body(self) -> bytes:
        """What its proof is for: its bytes without one."""
        documents = [
            [e.name, e.shared, e.version.flat(), _pack_part(e.base), [*map(_pack_part, e.deltas)]]
            for e in self.documents
        ]
        head = [FORMAT, self.agent, self.writer, self.stamp, self.created_ms, self.label]
        data: bytes = msgpack.packb([*head, self.parent, documents], use_bin_type=True)
        return data

    def encode(self) -> bytes:
        """Its bytes: the same for the same content.

        Raises:
            Damaged: It is larger than a manifest may be.
        """
        data = self.body()
        if self.proof:
            # The same array, one longer.
            data = bytes([data[0] + 1]) + data[1:] + msgpack.packb(self.proof)
        if len(data) > MANIFEST_BYTES_MAX:
            raise Damaged(f"a manifest of {len(data)} bytes; {MANIFEST_BYTES_MAX} is the limit")
        return data

    @classmethod
    def decode(cls, data: bytes, id: str, agent: str) -> Manifest:
        """Read the manifest of the checkpoint *id* of *agent*.

        Raises:
            Damaged: It is not what was written under this id, or none at all.
        """
        if len(data) > MANIFEST_BYTES_MAX:
            raise Damaged(f"{len(data)} bytes; {MANIFEST_BYTES_MAX} is the limit of a manifest")
        stamp = check_id(id)
        if id != make_id(stamp, data):
            raise Damaged("its bytes are not those that its id was made of")
        try:
            found = _decode_manifest(data)
        except Damaged as exc:
            raise Foreign(str(exc)) from exc
        if found.stamp != stamp:
            raise Damaged("its stamp is not that of its id")
        if found.agent != agent:
            raise Damaged(f"it is a checkpoint of {found.agent!r}, not of {agent!r}")
        if found.encode() != data:
            # Else a copy of it, written anew, would go by another id.
            raise Damaged("it says the same as a manifest, in other bytes")
        return found


# Names


def make_id(stamp: int, data: bytes) -> str:
    """The id of a checkpoint with the manifest *data*."""
    return f"{stamp:016x}-{hashlib.sha256(data).hexdigest()[:16]}"


def check_id(id: object) -> Stamp:
    """The stamp in a checkpoint's id. Raises Damaged if it is no id."""
    match = _ID.fullmatch(id) if isinstance(id, str) else None
    if match is None or int(match[1], 16) > STAMP_MAX:
        raise Damaged(f"{str(id)[:80]!r} is not the id of a checkpoint")
    return Stamp(int(match[1], 16))


def is_id(id: str) -> bool:
    """Whether this can be the id of a checkpoint."""
    return _ID.fullmatch(id) is not None


def prefix_of(agent: str) -> str:
    """With what all keys begin that an agent uses in a tier."""
    quoted = quote(agent, safe="")
    if not quoted.strip("."):
        quoted = quoted.replace(".", "%2E")
    if len(quoted) > _QUOTED_CHARS_MAX:
        # A hundred letters that take four bytes each. Two such names differ in the hash.
        digest = hashlib.sha256(agent.encode()).hexdigest()[:32]
        quoted = f"{quoted[: _QUOTED_CHARS_MAX - 33]}~{digest}"
    return f"{quoted}/"


def agent_of(key: str) -> str | None:
    """Whose a key is; None if it is nobody's, or of a name too long to be read back."""
    name = unquote(key.partition("/")[0])
    return name if name and key.startswith(prefix_of(name)) else None


def manifest_key(agent: str, id: str) -> str:
    """Where a manifest is kept."""
    return f"{prefix_of(agent)}manifests/{id}"


def part_key(agent: str, name: str) -> str:
    """Where a part is kept."""
    return f"{prefix_of(agent)}parts/{name}"


def read_keys(agent: str, keys: Iterable[str]) -> tuple[list[str], list[str]]:
    """The ids of checkpoints and the names of parts among *keys*; what is neither is not ours."""
    ids: list[str] = []
    names: list[str] = []
    before = prefix_of(agent)
    for key in keys:
        kind, _, name = key.removeprefix(before).partition("/")
        if key.startswith(before) and kind == "manifests" and _ID.fullmatch(name):
            ids.append(name)
        elif key.startswith(before) and kind == "parts" and re.fullmatch("[0-9a-f]{64}", name):
            names.append(name)
    return ids, names


# Parts


def make_part(plain: bytes, changes: int = 0, level: int = LEVEL) -> tuple[Part, bytes]:
    """Name and compress a part. Takes a moment for a large one: not on the event loop."""
    stored = pack_part(plain, level)
    return Part(hashlib.sha256(plain).hexdigest(), len(plain), len(stored), changes), stored


def pack_part(plain: bytes, level: int) -> bytes:
    """The bytes that a tier keeps."""
    return zstandard.ZstdCompressor(level=level, write_checksum=True).compress(plain)


def unpack_part(part: Part, stored: bytes) -> bytes:
    """The plain bytes of *part*, verified.

    Raises:
        Damaged: These are not its bytes.
    """
    try:
        # What the frame states is what zstd allocates: so it is looked at before.
        size = zstandard.frame_content_size(stored)
        if size != part.size:
            raise Damaged(f"it states {size} bytes and should have {part.size}")
        plain: bytes = zstandard.ZstdDecompressor().decompress(stored, max_output_size=part.size)
    except (zstandard.ZstdError, ValueError, MemoryError) as exc:
        raise Damaged(f"it cannot be unpacked: {exc}") from exc
    if hashlib.sha256(plain).hexdigest() != part.name:
        raise Damaged("its bytes do not have the hash that it is named by")
    return plain


def encode_changes(changes: Sequence[bytes]) -> bytes:
    """Put encoded changes together to the plain bytes of a delta."""
    data: bytes = msgpack.packb([FORMAT, list(changes)], use_bin_type=True)
    return data


def decode_changes(part: Part, plain: bytes) -> list[bytes]:
    """Take a delta apart again.

    Raises:
        Damaged: These are not the changes that the manifest promises.
    """
    fields = _unpack(plain, CHANGES_MAX)
    if type(fields) is not list or len(fields) != 2 or fields[0] != FORMAT:
        raise Damaged("a delta of an unknown format")
    changes = fields[1]
    if type(changes) is not list or not all(type(change) is bytes for change in changes):
        raise Damaged("a delta that is not a list of changes")
    if len(changes) != part.changes:
        raise Damaged(f"{len(changes)} changes where {part.changes} are promised")
    return changes


# The plan


class Reuse(NamedTuple):
    """A document has not changed: its parts are named again."""

    entry: Entry


class Extend(NamedTuple):
    """The changes since the parent become a delta."""

    entry: Entry
    ranges: tuple[Range, ...]
    changes: int


class Renew(NamedTuple):
    """The document gets a new base, because of *reason*."""

    reason: str


Step = Reuse | Extend | Renew


def plan(
    before: Entry | None,
    shared: bool,
    version: Version,
    floor: Mapping[int, int],
    measure: Callable[[Sequence[Range]], int],
) -> Step:
    """How a document gets into a checkpoint.

    Args:
        before: What the parent says of it.
        shared: Whether it holds native types.
        version: Where it is now.
        floor: Up to where the journal has forgotten its changes.
        measure: How many bytes the changes of some ranges have in the journal.
    """
    if before is None or before.shared != shared:
        return Renew("it is new")
    if before.version == version:
        return Reuse(before)
    if not before.version <= version:
        return Renew("it does not contain its parent")
    ranges = changes_between(before.version, version)
    if any(floor.get(writer, 0) >= first for writer, first, _ in ranges):
        return Renew("the journal has forgotten changes since the parent")
    changes = sum(last - first + 1 for _, first, last in ranges)
    if len(before.deltas) >= DELTAS_MAX:
        return Renew("it has many deltas")
    if changes + sum(delta.changes for delta in before.deltas) > CHANGES_MAX:
        return Renew("it has many changes after its base")
    size = measure(ranges) + sum(delta.size for delta in before.deltas)
    if size > DELTA_SHARE_MAX * before.base.size:
        return Renew("its deltas are large beside its base")
    return Extend(before, ranges, changes)


def changes_between(old: Mapping[int, int], new: Mapping[int, int]) -> tuple[Range, ...]:
    """The changes that *new* has and *old* lacks."""
    return tuple(
        (writer, old.get(writer, 0) + 1, seq)
        for writer, seq in sorted(new.items())
        if seq > old.get(writer, 0)
    )


# Decoding


def _decode_manifest(data: bytes) -> Manifest:
    fields = _unpack(data, max(DOCUMENTS_MAX, 2 * VERSION_WRITERS_MAX))
    if type(fields) is not list or not 8 <= len(fields) <= 9 or fields[0] != FORMAT:
        raise Damaged("a manifest of an unknown format; a newer crdtstate may have written it")
    _, agent, writer, stamp, created_ms, label, parent, documents = fields[:8]
    proof = fields[8] if len(fields) == 9 else b""
    if type(proof) is not bytes or len(proof) > PROOF_BYTES_MAX:
        raise Damaged("a manifest's proof is malformed")
    _text(agent, 1, 100, "agent")
    _number(writer, 1, WRITER_MAX, "writer")
    _number(stamp, 0, STAMP_MAX, "stamp")
    _number(created_ms, 0, WALL_MS_MAX, "time")
    _text(label, 0, LABEL_CHARS_MAX, "label")
    if parent is not None:
        check_id(parent)
    if type(documents) is not list or len(documents) > DOCUMENTS_MAX:
        raise Damaged("a manifest's documents are malformed")
    entries = tuple(_decode_entry(each) for each in documents)
    names = [entry.name for entry in entries]
    if names != sorted(set(names)):
        raise Damaged("a manifest's documents are not each there once, in order")
    return Manifest(agent, writer, stamp, created_ms, label, parent, entries, proof)


def _decode_entry(fields: object) -> Entry:
    if type(fields) is not list or len(fields) != 5:
        raise Damaged("a document in a manifest is malformed")
    name, shared, flat, base, deltas = fields
    _text(name, 1, NAME_CHARS_MAX, "document's name")
    if type(shared) is not bool or type(deltas) is not list or len(deltas) > DELTAS_MAX:
        raise Damaged(f"document {name!r} in a manifest is malformed")
    version = _decode_version(flat)
    parts = tuple(_decode_part(each) for each in deltas)
    if not all(part.changes for part in parts) or sum(p.changes for p in parts) > CHANGES_MAX:
        raise Damaged(f"the deltas of {name!r} have no changes, or too many")
    found = _decode_part(base)
    if found.changes:
        raise Damaged(f"the base of {name!r} is a delta")
    return Entry(name, shared, version, found, parts)


def _decode_version(flat: object) -> Version:
    if type(flat) is not list or len(flat) % 2 or len(flat) > 2 * VERSION_WRITERS_MAX:
        raise Damaged("a version in a manifest has the wrong shape")
    for writer in flat[::2]:
        _number(writer, 1, WRITER_MAX, "writer in a version")
    for seq in flat[1::2]:
        _number(seq, 1, SEQ_MAX, "seq in a version")
    if any(one >= other for one, other in zip(flat[::2], flat[2::2], strict=False)):
        raise Damaged("the writers of a version are not in order")
    return Version.from_flat(flat)


def _pack_part(part: Part) -> list[Any]:
    return [bytes.fromhex(part.name), part.size, part.stored, part.changes]


def _decode_part(fields: object) -> Part:
    if type(fields) is not list or len(fields) != 4:
        raise Damaged("a part in a manifest is malformed")
    name, size, stored, changes = fields
    if type(name) is not bytes or len(name) != 32:
        raise Damaged("a part in a manifest has no hash for a name")
    _number(size, 1, PART_BYTES_MAX, "part's size")
    _number(stored, 1, 2 * PART_BYTES_MAX, "part's stored size")
    _number(changes, 0, CHANGES_MAX, "part's count of changes")
    return Part(name.hex(), size, stored, changes)


def _unpack(data: bytes, length_max: int) -> Any:
    try:
        return msgpack.unpackb(
            data,
            max_array_len=length_max,
            max_map_len=0,
            max_ext_len=0,
            max_str_len=4 * NAME_CHARS_MAX,
            max_bin_len=CHANGE_BYTES_MAX + CHANGE_SLACK,
        )
    except Exception as exc:
        raise Damaged(f"not valid msgpack: {exc}") from exc


def _number(value: object, low: int, high: int, what: str) -> None:
    if type(value) is not int or not low <= value <= high:
        raise Damaged(f"a manifest's {what} is out of range")


def _text(value: object, low: int, high: int, what: str) -> None:
    if type(value) is not str or not low <= len(value) <= high:
        raise Damaged(f"a manifest's {what} is malformed")


def parts_of(manifests: Iterable[Manifest]) -> Iterator[Part]:
    """The parts that any of *manifests* names; one that several name comes several times."""
    for manifest in manifests:
        yield from manifest.parts().values()
