"""
A LangGraph thread as a document: its checkpoints, their writes and the pieces that values lie in.

Each thread has a document of its own, so it costs what it holds, and replicas that subscribe to
some threads have these only. In it, for each checkpoint namespace (by its *token*):

    h/token             the *heads*: checkpoints on which none was built yet
    c/token             checkpoint id -> `Record`, whose values are references
    w/token/checkpoint  task and index -> a pending write
    p                   the pieces of all values (`blobs`), once each

A checkpoint replaces its parent among the heads. Runs that go on from the same one, here or on
replicas apart, leave several heads: that is how anybody can tell that they have to be merged. All
of it is deterministic: equal documents have equal heads.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from crdtstate.crdts import Map
from crdtstate.document import Document
from crdtstate.errors import InvalidUpdate, UsageError
from crdtstate.integrations.langgraph.blobs import Blobs, Cache

PREFIX = "langgraph/"
"""The names of threads' documents begin so."""

INLINE_BYTES = 48
"""A channel's value up to this size lies in the record itself: a reference would be as large."""

WRITE_INLINE_BYTES = 4096
"""The same for a write, which only one record has."""

TOGETHER_BYTES = 64 * 1024
"""Pieces up to this size are written in one change with the record that names them; larger ones
before it."""

GRACE_MS = 60_000
"""Pieces of other writers that nothing names are left alone for so long: what names them may be
on its way."""

THREAD_BYTES_MAX = 128 * 2**20
"""What the pieces of one thread may have: half of what a document can hold."""

ID_CHARS_MAX = 100
THREAD_CHARS_MAX = 1000
NAMESPACE_CHARS_MAX = 10_000
CHANNELS_MAX = 10_000

_PLAIN = re.compile(r"[A-Za-z0-9_.:@+=-]{1,120}")
_TOKEN_CHARS_MAX = 60


class Value(NamedTuple):
    """Where the value of a channel is.

    Attributes:
        type: What the serializer calls it.
        ref: Its bytes, or the key of their blob.
        merges: Whether it is the state of a channel that can be merged.
    """

    type: str
    ref: str | bytes
    merges: bool


class Record(NamedTuple):
    """A checkpoint. Bodies and metadata are as the serializer wrote them, (type, bytes).

    Attributes:
        thread: The thread's id and the namespace, where their names do not say them.
        parent: The checkpoint it was built on.
        run: The run that made it, if the metadata says so.
        body: The checkpoint without the values of its channels.
    """

    thread: str | None
    namespace: str | None
    parent: str | None
    run: str | None
    metadata: tuple[str, bytes]
    body: tuple[str, bytes]
    channels: dict[str, Value]


class Thread:
    """The document of one thread.

    Args:
        id: The thread's id.
        document: Its document.
        cache: Of the contents of blobs.
    """

    def __init__(self, id: str, document: Document, cache: Cache) -> None:
        self.id = id
        self.document = document
        self.pieces = document.map("p")
        self.blobs = Blobs(self.pieces, cache)
        # The keys of pieces that are written, and not yet what names them.
        self.writing: set[str] = set()
        # About how many bytes all pieces have; None before they were counted.
        self._bytes: int | None = None

    # Reading

    def namespaces(self) -> list[str]:
        """The tokens of the namespaces that have checkpoints, sorted."""
        containers = self.document.lanes.containers
        tokens = [name[3:] for name in containers if name.startswith("mc/")]
        return sorted(token for token in tokens if len(self.checkpoints(token)))

    def checkpoints(self, token: str) -> Map:
        """The records of a namespace by checkpoint id."""
        return self.document.map(f"c/{token}")

    def heads(self, token: str) -> list[str]:
        """The checkpoints of a namespace on which none was built, newest first."""
        return sorted(self.document.map(f"h/{token}"), reverse=True)

    def record(self, token: str, id: str) -> Record | None:
        """A checkpoint, if it is here and whole."""
        packed = self.checkpoints(token).get(id)
        if packed is None:
            return None
        try:
            return _read_record(packed)
        except (ValueError, TypeError):
            return None

    def has(self, ref: str | bytes) -> bool:
        """Whether a value is here, as far as one look tells."""
        return isinstance(ref, bytes) or ref in self.pieces

    def load(self, ref: str | bytes) -> bytes:
        """The bytes of a value. Raises KeyError, InvalidUpdate: a piece of it is gone or bad."""
        return ref if isinstance(ref, bytes) else self.blobs.read(ref)

    def writes(self, token: str, id: str) -> list[tuple[str, str, int, str, str, str | bytes]]:
        """The pending writes of a checkpoint: path, task, index, channel, type and reference, in
        the order in which they are applied."""
        found = []
        for key, packed in self.document.map(f"w/{token}/{id}").items():
            task, _, index = key.rpartition("/")
            match packed:
                case [str(path), str(channel), str(type_), str() | bytes() as ref]:
                    found.append((path, task, int(index), channel, type_, ref))
        return sorted(found, key=lambda each: each[:3])

    # Writing: nothing here waits, so each call is one moment

    def store(
        self, data: bytes, previous: str | None, inline: int, pieces: dict[str, Any]
    ) -> str | bytes:
        """The reference to *data*; what has to be written for it is added to *pieces*."""
        if len(data) <= inline:
            return bytes(data)
        key, added = self.blobs.add(data, previous)
        pieces.update(added)
        return key

    def check_room(self, pieces: dict[str, Any]) -> None:
        """Count what is going to be written.

        Raises:
            UsageError: The thread is full.
        """
        more = sum(map(size_of, pieces.values()))
        if self._bytes is None or self._bytes + more > THREAD_BYTES_MAX:
            self._bytes = sum(map(size_of, self.pieces.values()))
        if self._bytes + more > THREAD_BYTES_MAX:
            raise UsageError(
                f"thread {self.id!r} holds {self._bytes} bytes, and {THREAD_BYTES_MAX} is the "
                "limit: prune it, or begin another one"
            )
        self._bytes += more

    def put(self, token: str, id: str, record: Record, superseded: Iterable[str]) -> None:
        """Write a checkpoint, which takes the place of the heads that are *superseded*."""
        heads = self.document.map(f"h/{token}")
        self.checkpoints(token)[id] = _pack_record(record)
        for each in superseded:
            if each in heads and each != id:
                del heads[each]
        heads[id] = True

    def put_writes(self, token: str, id: str, writes: dict[str, list[Any]]) -> None:
        """Write pending writes, by task and index."""
        self.document.map(f"w/{token}/{id}").update(writes)

    # Deleting

    def drop(self, token: str, ids: Iterable[str]) -> None:
        """Delete checkpoints and their writes; those that are left without any built on them
        become heads. Pieces stay until `sweep`."""
        gone = set(ids)
        records = self.checkpoints(token)
        heads = self.document.map(f"h/{token}")
        lost = [id for id in gone if id in heads]
        parents = {id: record.parent for id in records if (record := self.record(token, id))}
        for id in gone:
            if id in records:
                del records[id]
            _clear(self.document.map(f"w/{token}/{id}"))
        for id in lost:
            del heads[id]
            # The nearest one before it that stays, unless something else is built on that.
            above, passed = parents.get(id), {id}
            while above in gone and above is not None and above not in passed:
                passed.add(above)
                above = parents.get(above)
            if above is not None and above in parents and above not in gone:
                if not any(parent == above for at, parent in parents.items() if at not in gone):
                    heads[above] = True

    def clear(self) -> None:
        """Delete all."""
        for name in list(self.document.lanes.containers):
            if name.startswith(("mh/", "mc/", "mw/")):
                _clear(self.document.map(name[1:]))
        _clear(self.pieces)

    def sweep(self, now_ms: int, also: Iterable[str] = ()) -> None:
        """Delete the pieces that no checkpoint or write needs any more, but those of *also*, those
        that are being written here, and young ones of others."""
        needed = {*also, *self.writing}
        for token in self.namespaces():
            for id in self.checkpoints(token):
                record = self.record(token, id)
                if record is not None:
                    needed.update(self.needs(record))
        for name in list(self.document.lanes.containers):
            if name.startswith("mw/"):
                for packed in self.document.map(name[1:]).values():
                    match packed:
                        case [_, _, _, str(key)] if key not in needed:
                            needed.update(self._reachable(key))
        for key in list(self.pieces):
            if key not in needed and not self._is_young(key, now_ms):
                del self.pieces[key]

    def _is_young(self, key: str, now_ms: int) -> bool:
        own = self.document.writer
        return any(
            candidate.writer != own and now_ms - candidate.stamp.wall_ms < GRACE_MS
            for candidate in self.pieces.live(key)
        )

    def needs(self, record: Record) -> set[str]:
        """The keys of all pieces that a checkpoint needs."""
        found: set[str] = set()
        for ref in (value.ref for value in record.channels.values()):
            if isinstance(ref, str) and ref not in found:
                found.update(self._reachable(ref))
        return found

    def _reachable(self, key: str) -> set[str]:
        found: set[str] = set()
        try:
            found.update(self.blobs.reachable(key))
        except InvalidUpdate:
            pass  # it cannot be read, and is not deleted by us
        return found

    def copy_to(self, target: Thread) -> Iterator[None]:
        """Copy all to another thread: pieces, then writes, then checkpoints."""
        for key, piece in self.pieces.items():
            if key not in target.pieces:
                target.pieces[key] = piece
                yield
        names = sorted(self.document.lanes.containers)
        for prefix in ("mw/", "mc/", "mh/"):
            for name in names:
                if name.startswith(prefix):
                    for key, value in self.document.map(name[1:]).items():
                        if prefix == "mc/" and isinstance(value, list) and value[1] is not None:
                            value = [value[0], target.id, *value[2:]]
                        target.document.map(name[1:])[key] = value
                        yield


# Names


def document_name(thread: str) -> str:
    """The name of a thread's document: the thread's id if it can be a name, else its hash."""
    return PREFIX + (thread if _PLAIN.fullmatch(thread) else _hashed(thread))


def thread_of(name: str) -> str | None:
    """The id of the thread in a document, if the document's name says it."""
    plain = name.removeprefix(PREFIX)
    return plain if plain != name and _PLAIN.fullmatch(plain) else None


def token_of(namespace: str) -> str:
    """What stands for a checkpoint namespace in names: itself if it is short, else its hash."""
    if len(namespace) <= _TOKEN_CHARS_MAX and "/" not in namespace and namespace.isprintable():
        if not namespace.startswith("~"):
            return namespace
    return _hashed(namespace)


def _hashed(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:18]
    return "~" + base64.urlsafe_b64encode(digest).decode()


def check_text(value: object, what: str, limit: int, *, empty: bool = False) -> str:
    """Return *value* if it can name something.

    Raises:
        UsageError: It is not a str of 1 to *limit* printable characters.
    """
    if isinstance(value, str) and len(value) <= limit and value.isprintable():
        if value or empty:
            return value
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:80] + "..."
    raise UsageError(f"{what} is a str of 1 to {limit} printable characters, not {shown}")


# Records as values


def _pack_record(record: Record) -> list[Any]:
    channels = {
        name: [value.type, value.ref, value.merges] if value.merges else [value.type, value.ref]
        for name, value in record.channels.items()
    }
    return [
        1,
        record.thread,
        record.namespace,
        record.parent,
        record.run,
        *record.metadata,
        *record.body,
        channels,
    ]


def _read_record(packed: Any) -> Record:
    """Read a record that may come from anybody. Raises ValueError, TypeError."""
    version, thread, namespace, parent, run, mt, mb, bt, bb, packed_channels = packed
    if version != 1 or len(packed_channels) > CHANNELS_MAX:
        raise ValueError("a record of another version, or too large")
    for text in (thread, namespace, parent, run):
        if text is not None and type(text) is not str:
            raise ValueError("a record names something that is not text")
    if (type(mt), type(mb), type(bt), type(bb)) != (str, bytes, str, bytes):
        raise ValueError("a record without a body")
    channels = {}
    for name, (type_, ref, *merges) in packed_channels.items():
        if type(name) is not str or type(type_) is not str or type(ref) not in (str, bytes):
            raise ValueError("a record with a channel that is none")
        channels[name] = Value(type_, ref, bool(merges))
    return Record(thread, namespace, parent, run, (mt, mb), (bt, bb), channels)


def size_of(piece: Any) -> int:
    """About how many bytes a piece has."""
    if not isinstance(piece, list):
        return len(piece) if isinstance(piece, bytes) else 0
    return sum(len(part) for part in piece if isinstance(part, bytes)) + 100


def _clear(view: Map) -> None:
    for key in list(view):
        del view[key]
