"""
Moving encoded snapshots between replicas, in chunks. Sans-I/O; driven by `sync`.

Who serves a snapshot offers its digest and size; who wants it gets it chunk by chunk, some ahead.
The same bytes serve several who ask, and a transfer goes on where a lost connection broke it off.
What a snapshot holds, and what becomes of it, is the business of `sync`.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from crdtstate import wire
from crdtstate.change import Snapshot
from crdtstate.clock import Version
from crdtstate.errors import ProtocolError

CACHE_MAX = 64
CACHE_BYTES_MAX = 64 * 2**20
"""Encoded snapshots kept to be fetched, the newest alone excepted."""

SNAPSHOT_AGE_MAX = 30.0
"""Seconds for which an encoded snapshot is offered again."""

CHUNKS_AHEAD = 8
DOWNLOADS_MAX = 4
"""Transfers that hold or expect data at a time; more offers wait."""

STALL = 5.0
"""Seconds without a chunk after which it is asked for again."""

TRIES = 4

SERVED_MAX = 2
"""Peers that fetch snapshots at a time; others are told to ask again later. More at once would
take as long in all, and live changes would wait for them."""

SERVED_IDLE = 5.0
"""Seconds without a request after which a peer no longer counts as fetching."""

Sender = Callable[[int, wire.Frame], None]
"""Sends a frame to a peer."""


class _Offered(NamedTuple):
    digest: bytes
    data: bytes
    version: Version
    at: float


class Uploads:
    """Snapshots on their way out.

    Args:
        send: Sends a frame to a peer.
    """

    def __init__(self, send: Sender) -> None:
        self._send = send
        # Document -> peers that wait for an offer.
        self._asked: dict[str, set[int]] = {}
        self._cached: OrderedDict[str, _Offered] = OrderedDict()
        self._cached_bytes = 0
        # Peers that fetch, and when each asked for something the last time.
        self._served: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._cached)

    def may_serve(self, peer: int, now: float) -> bool:
        """Whether *peer* may fetch a snapshot now; then it counts as fetching."""
        for other, at in list(self._served.items()):
            if now >= at + SERVED_IDLE:
                del self._served[other]
        if peer not in self._served and len(self._served) >= SERVED_MAX:
            return False
        self._served[peer] = now
        return True

    @property
    def served(self) -> int:
        """How many peers fetch snapshots."""
        return len(self._served)

    def ask(self, document: str, peer: int) -> None:
        """Note that *peer* needs a snapshot."""
        self._asked.setdefault(document, set()).add(peer)

    def is_asked(self, document: str) -> bool:
        """Whether somebody waits for a snapshot."""
        return document in self._asked

    def drop(self, document: str) -> None:
        """Offer nobody anything: there is no such document."""
        self._asked.pop(document, None)

    def peer_down(self, peer: int) -> None:
        """Forget a peer that is gone."""
        self._served.pop(peer, None)
        for document in [name for name, peers in self._asked.items() if peer in peers]:
            self._asked[document].discard(peer)
            if not self._asked[document]:
                del self._asked[document]

    def offer(
        self, document: str, floor: Mapping[int, int], now: float, take: Callable[[], Snapshot]
    ) -> None:
        """Offer a snapshot to all who asked: the cached one if it is young and not below *floor*,
        or else the one that *take* returns."""
        cached = self._cached.get(document)
        if cached is None or now - cached.at > SNAPSHOT_AGE_MAX or not cached.version >= floor:
            snapshot = take()
            data = snapshot.encode()
            self._drop_cached(document)
            cached = self._cached[document] = _Offered(_digest(data), data, snapshot.version, now)
            self._cached_bytes += len(data)
        self._cached.move_to_end(document)
        while len(self._cached) > CACHE_MAX or (
            self._cached_bytes > CACHE_BYTES_MAX and len(self._cached) > 1
        ):
            self._drop_cached(next(iter(self._cached)))
        for peer in sorted(self._asked.pop(document, ())):
            self._send(peer, wire.Offer(document, cached.digest, len(cached.data)))

    def _drop_cached(self, document: str) -> None:
        old = self._cached.pop(document, None)
        if old is not None:
            self._cached_bytes -= len(old.data)

    def on_get(self, peer: int, frame: wire.Get, now: float) -> bool:
        """Send a chunk; False if that snapshot is not offered any more."""
        self._served[peer] = now
        cached = self._cached.get(frame.document)
        if cached is None or cached.digest != frame.digest:
            return False
        data = cached.data[frame.offset : frame.offset + wire.CHUNK_BYTES_MAX]
        if data:
            self._send(peer, wire.Chunk(frame.document, frame.digest, frame.offset, data))
        if frame.offset + len(data) >= len(cached.data):
            self._served.pop(peer, None)
        return True


@dataclass(slots=True)
class _Download:
    # None while the connection is lost.
    peer: int | None
    digest: bytes
    size: int
    at: float
    data: bytearray = field(default_factory=bytearray)
    asked: int = 0
    tries: int = 0


class Downloads:
    """Snapshots on their way in, one for each document at most.

    Args:
        send: Sends a frame to a peer.
    """

    def __init__(self, send: Sender) -> None:
        self._send = send
        self._running: dict[str, _Download] = {}
        # When to call `check`; None while nothing is on its way.
        self.check_at: float | None = None

    def __len__(self) -> int:
        return len(self._running)

    @property
    def active(self) -> int:
        """How many hold or expect data."""
        return sum(1 for download in self._running.values() if download.asked)

    def is_running(self, document: str) -> bool:
        """Whether a connected peer sends, or will send, a snapshot of *document*."""
        found = self._running.get(document)
        return found is not None and found.peer is not None

    def progress(self, document: str) -> tuple[int, int] | None:
        """How many bytes of how many of a snapshot are here, if one is on its way."""
        found = self._running.get(document)
        return None if found is None else (len(found.data), found.size)

    def peer_down(self, peer: int) -> None:
        """A peer is gone. What came from it is kept for a while: another may offer the rest."""
        for document, download in list(self._running.items()):
            if download.peer == peer:
                download.peer = None
                if not download.data:
                    del self._running[document]

    def is_from(self, document: str, peer: int) -> bool:
        """Whether a snapshot of a document is being fetched from *peer*."""
        found = self._running.get(document)
        return found is not None and found.peer == peer

    def on_offer(self, peer: int, frame: wire.Offer, now: float) -> None:
        """Take an offer that is wanted. Raises ProtocolError."""
        if not 0 < frame.size <= wire.SNAPSHOT_BYTES_MAX:
            raise ProtocolError(f"a snapshot of {frame.size} bytes")
        found = self._running.get(frame.document)
        if found is not None and found.peer not in (None, peer):
            return
        if found is not None and found.digest == frame.digest:
            # The connection was lost meanwhile, or the other side had forgotten its snapshot and
            # made the same again: go on where it broke off.
            found.peer, found.asked, found.at = peer, len(found.data), now
        else:
            self._running[frame.document] = _Download(peer, frame.digest, frame.size, now)
        self._get_more(now)

    def on_chunk(self, peer: int, frame: wire.Chunk, now: float) -> bytes | None:
        """Take a chunk; return the snapshot if it was the last. Raises ProtocolError."""
        found = self._running.get(frame.document)
        if found is None or found.digest != frame.digest or found.peer != peer:
            return None
        if frame.offset != len(found.data):
            return None
        left = found.size - len(found.data)
        if len(frame.data) < min(left, wire.CHUNK_BYTES_MAX):
            # Trickling would keep others from being asked.
            del self._running[frame.document]
            raise ProtocolError(f"a chunk of {len(frame.data)} bytes in the midst of a snapshot")
        found.data += frame.data
        found.at, found.tries = now, 0
        if len(found.data) >= found.size:
            del self._running[frame.document]
        self._get_more(now)
        if len(found.data) < found.size:
            return None
        if len(found.data) > found.size:
            raise ProtocolError("a snapshot longer than offered")
        data = bytes(found.data)
        if _digest(data) != found.digest:
            raise ProtocolError(f"a snapshot of {frame.document!r} does not match its digest")
        return data

    def check(self, now: float) -> None:
        """Ask again for chunks that do not come; give up on what does not go on."""
        for document, download in list(self._running.items()):
            if not download.asked or now < download.at + STALL:
                continue
            download.tries += 1
            download.at = now
            if download.tries > TRIES:
                del self._running[document]
            elif download.peer is not None:
                download.asked = len(download.data)
        self._get_more(now)

    def _get_more(self, now: float) -> None:
        """Ask for what may be asked for now."""
        active = self.active
        for document, download in self._running.items():
            if download.peer is None:
                continue
            if not download.asked and not download.data:
                if active >= DOWNLOADS_MAX:
                    continue
                active += 1
                download.at = now
            ahead = len(download.data) + CHUNKS_AHEAD * wire.CHUNK_BYTES_MAX
            while download.asked < min(download.size, ahead):
                frame = wire.Get(document, download.digest, download.asked)
                self._send(download.peer, frame)
                download.asked += wire.CHUNK_BYTES_MAX
        waiting = [download.at for download in self._running.values() if download.asked]
        self.check_at = max(now, min(waiting) + STALL) if waiting else None


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()
