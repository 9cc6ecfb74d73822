"""
Answering those who catch up: with changes from the log, or a snapshot in their place. Sans-I/O;
driven by `sync`.

A WANT is answered from the log if that reaches back so far; below the floor, or when the changes
would be far more than the document, a snapshot is offered, at exactly the delivered version and
without own changes that are not committed (S3 of `sync`). Requests are the credits of bulk: who
has enough under way is told to ask again later, or asks again by itself. `transfer` moves the
snapshots.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from crdtstate import wire
from crdtstate.config import Config
from crdtstate.document import Document
from crdtstate.documents import DocumentSet
from crdtstate.ledger import Ledger
from crdtstate.link import Link
from crdtstate.outgoing import CHANGES_FRAME_BYTES, split
from crdtstate.transfer import Sender, Uploads

BULK_WINDOW = 2**20
"""Bytes of what a peer asked for that are under way to it, above which it has to wait."""

BUSY_PAUSE = 0.5
"""Seconds after which it may ask again, and as many at random."""

SNAPSHOT_WORTH = 512 * 1024
"""Bytes of changes up to which nobody looks whether a snapshot is less."""

SNAPSHOT_SHARE = 1.5
"""How much more than the document the changes have to be: who joins a snapshot has more to do."""

SNAPSHOT_SHARE_NEW = 0.25
"""The same for a peer that has nothing of the document: to load it takes less than a tenth of what
its changes take, one after the other."""

MEASURED_FOR = 10.0
"""Seconds for which the size of a document counts as known."""


class Serving:
    """What one replica gives to those who ask.

    Args:
        documents: The documents.
        ledger: Knows what of them is committed, and their floors.
        config: Settings.
        rng: For jitter.
        takes: Tells whether this replica takes part in a document,
        may_hand: and whether others believe it when it hands them a snapshot of one.
        send: Sends a frame to a peer.
    """

    def __init__(
        self,
        documents: DocumentSet,
        ledger: Ledger,
        config: Config,
        rng: random.Random,
        takes: Callable[[str], bool],
        may_hand: Callable[[str], bool],
        send: Sender,
    ) -> None:
        self._documents = documents
        self._ledger = ledger
        self._config = config
        self._rng = rng
        self._takes = takes
        self._may_hand = may_hand
        self._send = send
        self.uploads = Uploads(send)
        # How many changes were sent.
        self.copies = 0

    @property
    def share_bytes(self) -> int:
        """What may wait for one peer of what it asked for: a window, and one answer beyond."""
        return BULK_WINDOW + self._config.answer_bytes + 2 * CHANGES_FRAME_BYTES

    # Changes

    def on_want(self, link: Link, frame: wire.Want, now: float) -> tuple[tuple[int, int, int], ...]:
        """Return what to read from the log for a peer, and then to hand to `send_changes`: the
        wanted ranges, as far as they are committed. Nothing if it is answered otherwise."""
        if link.outbox.bulk_bytes > BULK_WINDOW:
            self._refuse(link, frame.document)
            return ()
        if not self._takes(frame.document):
            return ()
        page = self._ledger.pages.get(frame.document)
        if page is None:
            return ()
        if any(first <= page.floor.get(writer, 0) for writer, first, _ in frame.ranges):
            self._ask_snapshot(link, frame.document, now)
            return ()
        committed = page.committed
        return tuple(
            (writer, first, min(last, committed.get(writer, 0)))
            for writer, first, last in frame.ranges
            if first <= committed.get(writer, 0)
        )

    def send_changes(self, peer: int, changes: Sequence[bytes], more: bool) -> None:
        """Send what was read from the log; *more* if it was cut short."""
        self.copies += len(changes)
        frames = split(changes)
        for index, part in enumerate(frames):
            is_last = index == len(frames) - 1
            self._send(peer, wire.Changes(tuple(part), answer=True, more=more and is_last))

    def _refuse(self, link: Link, name: str) -> None:
        """Let a peer ask again later: enough is under way to it."""
        pause_ms = int(BUSY_PAUSE * 1000 * (1 + self._rng.random()))
        self._send(link.peer, wire.Busy(name, pause_ms))

    # Snapshots

    def snapshot_instead(self, link: Link, name: str, log_bytes: int, now: float) -> bool:
        """Offer a snapshot if it is less than *log_bytes* of changes; whether it is."""
        found = self._documents.find(name)
        if found is None or found.is_broken or log_bytes < SNAPSHOT_WORTH:
            return False
        if not self._may_hand(name):
            return False
        share = SNAPSHOT_SHARE if link.acked.get(name) else SNAPSHOT_SHARE_NEW
        if log_bytes < share * self._measure(found, now):
            return False
        self._ask_snapshot(link, name, now)
        return True

    def _measure(self, document: Document, now: float) -> int:
        """About how large a document's snapshot is; as costly as one, so not looked at often."""
        page = self._ledger.page(document.name)
        if page.measured_at is None or now >= page.measured_at + MEASURED_FOR:
            page.measured_at, page.measured = now, len(document.engine.state())
        return page.measured

    def _ask_snapshot(self, link: Link, name: str, now: float) -> None:
        """Let a peer have a snapshot, if not too many others fetch one."""
        if self._may_hand(name) and self.uploads.may_serve(link.peer, now):
            self.uploads.ask(name, link.peer)
            self.offer(name, now)
        else:
            self._refuse(link, name)

    def offer(self, name: str, now: float) -> None:
        """Offer a snapshot to those who wait for one, once no own change in it is uncommitted
        (S3), and once the document was rebuilt if its engine failed."""
        if not self.uploads.is_asked(name) or self._ledger.has_own_unsettled(name):
            return
        document = self._documents.find(name)
        if document is None:
            self.uploads.drop(name)
        elif not document.is_broken:
            floor = self._ledger.page(name).floor
            self.uploads.offer(name, floor, now, document.snapshot)

    def on_get(self, link: Link, frame: wire.Get, now: float) -> None:
        """Send a peer the chunk that it asks for."""
        if link.outbox.bulk_bytes > BULK_WINDOW:
            # It asks again for what does not come.
            return
        if not self.uploads.on_get(link.peer, frame, now):
            # It has been replaced by a newer one: offer that.
            self.uploads.ask(frame.document, link.peer)
            self.offer(frame.document, now)
