"""
A disk that can be pulled out of the wall.

It keeps the contract of `stores.Store` in virtual time. What is written to it is a row of
*steps*, each of them atomic. Some time after a step was queued it is *committed* (it survives
the process), some time after that *synced* (it survives a power cut); with ``durability="power"``
both are one. A crash leaves a prefix of the steps: all that must survive, and by chance more.

What the steps amount to is kept in a `MemoryStore`; the journal decides by the same index what
to forget at a compaction.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from crdtstate.audit import Draft
from crdtstate.clock import Version
from crdtstate.identity import Session
from crdtstate.stores import Entry, Saved
from crdtstate.stores.memory import MemoryStore

Durability = Literal["process", "power"]

Step = Callable[["Image"], object]
"""One atomic write."""

SYNC_EVERY = 0.1
SLOW_COMMITS = 0.02
"""How many of the commits take as long as an unlucky fsync."""


class Image(MemoryStore):
    """The contents of a disk after some steps."""

    def __init__(self) -> None:
        super().__init__()
        # Document -> what rows and snapshot amount to.
        self.versions: dict[str, Version] = {}
        # The sessions: agent, writer, boot, place; and whether the newest was closed.
        self.epochs: list[tuple[str, int, int, int]] = []
        self.clean = False

    def copy(self) -> Image:
        twin = copy.copy(self)
        twin._rows, twin._saved = self._rows.copy(), self._saved.copy()
        twin._indexes = copy.deepcopy(self._indexes)
        twin.epochs = self.epochs.copy()
        twin.versions = {name: version.copy() for name, version in self.versions.items()}
        return twin

    def append(self, entries: Sequence[Entry], records: Sequence[Draft] = ()) -> int:
        """Keep *entries*."""
        for entry in entries:
            self.versions.setdefault(entry.document, Version())[entry.writer] = entry.seq
        return super().append(entries, records)

    def compact(self, saved: Saved, keep_bytes: int, records: Sequence[Draft] = ()) -> None:
        """Keep *saved* and forget old changes that it contains."""
        self.versions.setdefault(saved.document, Version()).merge(saved.version)
        super().compact(saved, keep_bytes, records)

    def forget(self, writer: int, after: Mapping[str, int]) -> None:
        """Remove the changes of *writer* above ``after[document]``."""
        super().forget(writer, after)
        for name, version in self.versions.items():
            version[writer] = min(version.get(writer, 0), after.get(name, 0))
            if not version[writer]:
                del version[writer]


class Disk:
    """The disk of one host; it outlives the replicas that run there.

    Args:
        durability: What a commit survives.
        rng: For how long commits take, and what a crash leaves.
    """

    def __init__(self, durability: Durability, rng: random.Random) -> None:
        self.durability = durability
        self.session = Session(None, None, False, False, False, False)
        # Numbers of the newest step queued, committed, synced.
        self.queued = 0
        self.committed = 0
        self.synced = 0
        self._rng = rng
        # What a power cut leaves, the steps after it, and what they amount to.
        self._kept = Image()
        self._steps: deque[Step] = deque()
        self._image = Image()
        # What is committed of each document.
        self._committed_versions: dict[str, Version] = {}
        self._sizes: deque[tuple[int, str, Version]] = deque()
        self._boot = 0
        self._place = 0
        self._call_later: Callable[[float, Callable[[], None]], None]
        self._on_progress: Callable[[], None] = lambda: None
        self._is_writing = False
        self._is_syncing = False
        self._stalled_until: Callable[[], float] = lambda: 0.0

    # Sessions

    def attach(self, call_later: Callable[[float, Callable[[], None]], None]) -> None:
        """Serve a new process, whose callbacks go through *call_later*."""
        self._call_later = call_later
        self._is_writing = self._is_syncing = False
        self.queued = self.committed = self.synced = 0
        image = self._image
        if not image.epochs:
            self.session = Session(None, None, False, False, False, False)
        else:
            agent, writer, boot, place = image.epochs[-1]
            self.session = Session(
                agent,
                writer,
                image.clean,
                boot == self._boot,
                place == self._place,
                self.durability == "power",
                frozenset(epoch[1] for epoch in image.epochs if epoch[3] == self._place),
            )

    def start(self, agent: str, writer: int, on_progress: Callable[[], None]) -> None:
        """Begin a session as *writer*, synced at once."""
        self._on_progress = on_progress
        epoch = (agent, writer, self._boot, self._place)

        def begin(image: Image) -> None:
            image.epochs.append(epoch)
            image.clean = False

        self._queue(begin)
        self._commit(self.queued)
        self._sync(self.queued)

    def close(self) -> None:
        """End the session in order."""

        def end(image: Image) -> None:
            image.clean = True

        self._queue(end)
        self._commit(self.queued)
        self._sync(self.queued)

    def crash(self, *, power: bool) -> None:
        """Lose what is not committed, or with *power* what is not synced; or not all of it."""
        safe = 0 if power else self.committed - self.synced
        self._boot += power
        if self._rng.random() < 0.5:
            safe += self._rng.randint(0, len(self._steps) - safe)
        for step in list(self._steps)[:safe]:
            step(self._kept)
        self._steps.clear()
        self._reset(self._kept)

    def promised(self, *, power: bool) -> dict[str, Version]:
        """What a crash now must leave of each document."""
        return self._kept.versions if power else self._committed_versions

    def backup(self) -> Image:
        """A copy of what is certainly on the disk."""
        return self._kept.copy()

    def put_back(self, backup: Image, *, unnoticed: bool) -> None:
        """Replace the contents by a *backup*, as a file of its own or, *unnoticed*, as the same
        file, as rolling back a virtual machine does."""
        assert not self._steps, "crash first"
        self._place += not unnoticed
        self._kept = backup.copy()
        self._reset(self._kept)

    def _reset(self, image: Image) -> None:
        self._image = image.copy()
        self._sizes.clear()
        self._committed_versions = {name: v.copy() for name, v in image.versions.items()}

    # Reading

    def load(self) -> Iterator[Saved | Entry]:
        """Yield all snapshots, then the newer committed entries, in the order of delivery."""
        for item in self._image.load():
            if isinstance(item, Entry):
                dot = (item.writer, item.seq)
                if not self.version(item.document).covers(dot):
                    continue
            yield item

    def version(self, document: str) -> Version:
        """What is committed of *document*."""
        return self._committed_versions.get(document) or Version()

    def floor(self, document: str) -> Version:
        """Up to which change of each writer the journal has forgotten."""
        return self._image.floor(document)

    def size(self, document: str) -> int:
        """Bytes of changes that the document's snapshot does not contain."""
        return self._image.size(document)

    def documents(self) -> list[str]:
        """The documents of which something is on the disk."""
        return sorted(self._image.versions)

    def measure(self, document: str, ranges: Sequence[tuple[int, int, int]]) -> int:
        """How many bytes the changes of *ranges* have, as far as they are kept."""
        return self._image.measure(document, ranges)

    def read(
        self, document: str, ranges: Sequence[tuple[int, int, int]], size_max: int
    ) -> tuple[list[bytes], bool]:
        """Return the committed changes of *ranges*, in the order of delivery, as far as they fit,
        and whether there are more."""
        here = self.version(document)
        committed = [(w, first, min(last, here.get(w, 0))) for w, first, last in ranges]
        return self._image.read(document, committed, size_max)

    # Writing

    def append(self, entries: Sequence[Entry]) -> int:
        """Queue *entries* for one atomic commit and return the ticket."""
        self._queue(lambda image: image.append(entries))
        versions: dict[str, Version] = {}
        for entry in entries:
            versions.setdefault(entry.document, Version())[entry.writer] = entry.seq
        for name, version in versions.items():
            self._sizes.append((self.queued, name, version))
        self._write()
        return self.queued

    def compact(self, saved: Saved, keep_bytes: int) -> None:
        """Keep *saved* as the document's snapshot and forget old changes that it contains."""
        self._queue(lambda image: image.compact(saved, keep_bytes))
        self._sizes.append((self.queued, saved.document, saved.version))
        self._write()

    def forget(self, writer: int, after: Mapping[str, int]) -> None:
        """Take out of the journal what *writer* wrote after the seq given for each document."""
        self._queue(lambda image: image.forget(writer, after))
        self._commit(self.queued)
        self._sync(self.queued)
        self._committed_versions = {n: v.copy() for n, v in self._image.versions.items()}

    def hurry(self) -> None:
        """Sync sooner."""
        if self.synced < self.committed:
            self._call_later(self._rng.uniform(0.0005, 0.01), self._sync_all)

    def stall(self, until: float, now: Callable[[], float]) -> None:
        """Commit nothing before *until*, as a disk that is full or busy."""
        self._stalled_until = lambda: until - now()

    def _queue(self, step: Step) -> None:
        self.queued += 1
        self._steps.append(step)
        step(self._image)

    def _write(self) -> None:
        """Commit at once, as the process does without durability="power", or begin to."""
        if self._is_writing:
            return
        rng, pause = self._rng, max(0.0, self._stalled_until())
        if self.durability == "process" and not pause and rng.random() < 0.5:
            self._commit(self.queued)
            return
        self._is_writing = True
        slow = rng.random() < SLOW_COMMITS
        delay = pause + (rng.uniform(0.05, 0.3) if slow else rng.uniform(0.0002, 0.008))
        goal = self.queued
        self._call_later(delay, lambda: self._finish(goal))

    def _finish(self, goal: int) -> None:
        self._is_writing = False
        self._commit(goal)
        if self.committed < self.queued:
            self._write()
        self._on_progress()

    def _commit(self, goal: int) -> None:
        self.committed = max(goal, self.committed)
        while self._sizes and self._sizes[0][0] <= goal:
            _, name, version = self._sizes.popleft()
            self._committed_versions.setdefault(name, Version()).merge(version)
        if self.durability == "power":
            self._sync(goal)
        elif not self._is_syncing:
            self._is_syncing = True
            self._call_later(SYNC_EVERY, self._sync_all)

    def _sync_all(self) -> None:
        self._is_syncing = False
        if self.synced < self.committed:
            self._sync(self.committed)
            self._on_progress()

    def _sync(self, goal: int) -> None:
        while self.synced < goal:
            self._steps.popleft()(self._kept)
            self.synced += 1
