"""
Bytes of any size in a map, each version of them stored as what it adds to an earlier one.

A *blob* is whole, or a delta: a number of bytes to take from the beginning and from the end of
another blob, its *base*, and new ones between them. Lists that grow share all but their end, so
they cost what was added. In a chain, each blob builds on the one before, and every 32nd on the 32nd
before: so each byte is stored about twice, reading takes at most 96 steps, and nothing is ever
written again.

A blob is stored under the hash of what is stored: the same one is there once, forks share what they
have in common, and two replicas never disagree about a key. Large ones lie in *parts*, and what
zstd makes smaller is stored so.
"""

from __future__ import annotations

import base64
import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack
import zstandard

from crdtstate.crdts import Map
from crdtstate.errors import InvalidUpdate, UsageError

PART_BYTES = 256 * 1024
"""What is larger lies in parts of this size: well below what one value and one change may have."""

BLOB_BYTES_MAX = 64 * 2**20
"""What one blob may have: 256 parts."""

STRIDE = 32
"""Every such blob of a chain builds on the one as many before it."""

CHAIN_MAX = 2048
"""Blobs of a chain before a whole one begins the next."""

STEPS_MAX = CHAIN_MAX // STRIDE + STRIDE
"""Blobs that have to be read for one."""

PARTS_MAX = BLOB_BYTES_MAX // PART_BYTES

SQUEEZE_BYTES = 256
"""What is smaller is not compressed."""

CACHE_BYTES = 32 * 2**20
"""Bytes of blobs read or written last that are kept in memory, to build on and to read again."""


class Blob(NamedTuple):
    """A blob as it is stored.

    Attributes:
        number: Its place in the chain; 0 for whole ones.
        base: The key of the blob that it builds on, None for whole ones.
        head: The first bytes, if they state a length and so differ each time.
        prefix: After the head, the bytes to take from the beginning of the base's rest,
        suffix: and from its end.
        plain: The bytes between, if they are compressed; else 0.
        literal: These, as they are stored; parts are named by their keys.
    """

    number: int
    base: str | None
    head: bytes
    prefix: int
    suffix: int
    plain: int
    literal: bytes | tuple[str, ...]


class Cache:
    """The contents of blobs by key, those used last, up to `CACHE_BYTES`."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self._limit = limit
        self._size = 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def get(self, key: str) -> bytes | None:
        data = self._kept.get(key)
        if data is not None:
            self._kept.move_to_end(key)
        return data

    def put(self, key: str, data: bytes) -> None:
        if len(data) > self._limit // 4 or key in self._kept:
            return
        self._kept[key] = data
        self._size += len(data)
        while self._size > self._limit:
            _, old = self._kept.popitem(last=False)
            self._size -= len(old)


class Blobs:
    """The blobs in the map *pieces*."""

    def __init__(self, pieces: Map, cache: Cache) -> None:
        self._pieces = pieces
        self._cache = cache

    def add(self, data: bytes, previous: str | None = None) -> tuple[str, dict[str, Any]]:
        """The key of a blob of *data*, and the pieces that have to be written for it, by key: also
        if they are here, as somebody who knows nothing that needs them may be deleting them.

        Args:
            previous: The key of the blob whose successor it is.

        Raises:
            UsageError: It is larger than `BLOB_BYTES_MAX`.
        """
        if len(data) > BLOB_BYTES_MAX:
            raise UsageError(
                f"a value of {len(data)} bytes; {BLOB_BYTES_MAX} is the limit: keep large things "
                "elsewhere and share a reference"
            )
        if previous is not None and self._cache.get(previous) == data:
            return previous, {}
        blob = self._delta(data, previous) or _whole(data)
        found: dict[str, Any] = {}
        literal = blob.literal
        if isinstance(literal, bytes) and len(literal) > PART_BYTES:
            parts = [literal[at : at + PART_BYTES] for at in range(0, len(literal), PART_BYTES)]
            keyed = [(_key(b"p" + part), part) for part in parts]
            found.update(keyed)
            blob = blob._replace(literal=tuple(key for key, _ in keyed))
        key = _key(b"b" + msgpack.packb(blob))
        found[key] = list(blob)
        self._cache.put(key, data)
        return key, found

    def read(self, key: str) -> bytes:
        """The content of a blob.

        Raises:
            KeyError: It, or what it builds on, is not here.
            InvalidUpdate: It is not one; somebody else wrote it.
        """
        data = self._cache.get(key)
        if data is not None:
            return data
        chain: list[Blob] = []
        for _, blob in self._chain(key):
            chain.append(blob)
            if blob.base is not None and (data := self._cache.get(blob.base)) is not None:
                break
        for blob in reversed(chain):
            data = self._apply(blob, data)
        assert data is not None, "the first of a chain is whole"
        self._cache.put(key, data)
        return data

    def reachable(self, key: str) -> Iterator[str]:
        """The keys of all pieces that a blob needs, as far as they are here."""
        try:
            for at, blob in self._chain(key):
                yield at
                if isinstance(blob.literal, tuple):
                    yield from blob.literal
        except KeyError:
            return

    def _delta(self, data: bytes, previous: str | None) -> Blob | None:
        if previous is None:
            return None
        try:
            number = self._blob(previous).number + 1
            wanted = number - (1 if number % STRIDE else STRIDE)
            base, found = next(each for each in self._chain(previous) if each[1].number <= wanted)
            old = self.read(base)
        except (KeyError, InvalidUpdate):
            # Somebody has deleted or spoiled it meanwhile.
            return None
        if number >= CHAIN_MAX or found.number != wanted:
            return None
        head, rest = _split(data)
        _, old_rest = _split(old)
        if rest[:16] != old_rest[:16] and rest[-16:] != old_rest[-16:]:
            return None
        prefix = _common(old_rest, rest)
        suffix = _common_end(old_rest, rest, prefix)
        if 2 * (len(rest) - prefix - suffix + 40) > len(rest):
            return None
        plain, literal = _squeeze(rest[prefix : len(rest) - suffix])
        return Blob(number, base, head, prefix, suffix, plain, literal)

    def _chain(self, key: str) -> Iterator[tuple[str, Blob]]:
        """A blob and those that it builds on, to a whole one. Raises KeyError, InvalidUpdate."""
        at: str | None = key
        number = CHAIN_MAX
        for _ in range(STEPS_MAX + 1):
            if at is None:
                return
            blob = self._blob(at)
            if blob.number >= number or (blob.base is None) != (blob.number == 0):
                break
            yield at, blob
            at, number = blob.base, blob.number
        raise InvalidUpdate(f"the blob {key} builds on itself, or on too many others")

    def _apply(self, blob: Blob, base: bytes | None) -> bytes:
        literal = blob.literal
        if isinstance(literal, tuple):
            parts = [self._pieces[key] for key in literal]
            if not all(type(part) is bytes for part in parts):
                raise InvalidUpdate("a part of a blob is not bytes")
            literal = b"".join(parts)
        if blob.plain:
            literal = _unsqueeze(literal, blob.plain)
        rest = b"" if base is None else _split(base)[1]
        if blob.prefix + blob.suffix > len(rest):
            raise InvalidUpdate("a blob takes more from its base than there is")
        end = rest[len(rest) - blob.suffix :] if blob.suffix else b""
        data = b"".join((blob.head, rest[: blob.prefix], literal, end))
        if len(data) > BLOB_BYTES_MAX:
            raise InvalidUpdate("a blob is larger than any may be")
        return data

    def _blob(self, key: str) -> Blob:
        """The blob *key*, which may come from anybody. Raises KeyError, InvalidUpdate."""
        match self._pieces[key]:
            case [
                int(number),
                str() | None as base,
                bytes(head),
                int(prefix),
                int(suffix),
                int(plain),
                literal,
            ] if 0 <= number < CHAIN_MAX and min(prefix, suffix, plain) >= 0:
                if type(literal) is bytes:
                    return Blob(number, base, head, prefix, suffix, plain, literal)
                if type(literal) is list and len(literal) <= PARTS_MAX:
                    if all(type(each) is str for each in literal):
                        return Blob(number, base, head, prefix, suffix, plain, tuple(literal))
        raise InvalidUpdate(f"the piece {key} is not a blob")


def _whole(data: bytes) -> Blob:
    return Blob(0, None, b"", 0, 0, *_squeeze(data))


def _squeeze(data: bytes) -> tuple[int, bytes]:
    """The size of *data* and its bytes compressed, or 0 and *data* if that is hardly smaller."""
    if len(data) >= SQUEEZE_BYTES:
        # Level 1: it must not take longer than writing what it saves.
        packed = zstandard.ZstdCompressor(level=1).compress(data)
        if len(packed) < len(data) * 7 // 8:
            return len(data), packed
    return 0, data


def _unsqueeze(packed: bytes, size: int) -> bytes:
    """Undo `_squeeze`, for bytes that may come from anybody. Raises InvalidUpdate."""
    try:
        if size <= BLOB_BYTES_MAX and zstandard.frame_content_size(packed) == size:
            data: bytes = zstandard.ZstdDecompressor().decompress(packed, max_output_size=size)
            return data
    except (zstandard.ZstdError, MemoryError) as exc:
        raise InvalidUpdate(f"a blob that zstd cannot read: {exc}") from None
    raise InvalidUpdate("a blob does not have the size that it says")


def _key(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()[:15]).decode()


def _split(data: bytes) -> tuple[bytes, bytes]:
    """The header of a msgpack list or dict, which says how long it is, and the rest."""
    first = data[0] if data else 0
    if 0x80 <= first <= 0x9F:
        size = 1
    else:
        size = {0xDC: 3, 0xDE: 3, 0xDD: 5, 0xDF: 5}.get(first, 0)
    return data[:size], data[size:]


def _common(one: bytes, two: bytes) -> int:
    """How many bytes two begin with alike."""
    high = min(len(one), len(two))
    if two.startswith(one) or one.startswith(two):
        return high
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == two[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _common_end(one: bytes, two: bytes, but: int) -> int:
    """How many bytes two end with alike, not counting the first *but* of them."""
    high = min(len(one), len(two)) - but
    low = 0
    if high <= 0 or one[len(one) - high :] == two[len(two) - high :]:
        return max(high, 0)
    while high - low > 1:
        middle = (low + high) // 2
        if one[len(one) - middle : len(one) - low] == two[len(two) - middle : len(two) - low]:
            low = middle
        else:
            high = middle
    return low
