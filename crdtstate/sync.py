"""
The sync core: what to say to whom, and when. Sans-I/O.

One state machine serves agent, relay and simulator. The shell feeds it (`peer_up`, `receive`,
`local_changes`, `committed`, `tick`, ...) with the time as an argument, then takes `effects()` in
order, carries them out, and calls `tick` at `next_deadline()`. Nothing here knows a clock, a
socket or a disk.

How it works. A change is *delivered* to its document once everything it builds on is there (L5 of
`lanes`); until then it is *pending*, in memory, bounded. A delivered change is persisted and sent
on along the eager links of the `mesh`: in a complete one to every peer that may lack it (not to the
one it came from, nor to that one's neighbours, which have it from there), in a larger one along a
tree. A *local* change leaves only after it was committed. HAVE tells a peer what is
committed here: announcement, acknowledgement and digest in one. What a HAVE shows to be missing,
and does not come by itself, is asked for with WANT. Below the log's floor a WANT is answered by a
snapshot at exactly the delivered version, which is joined, never put in place of what is there.

Every frame may be lost: HAVE heals it. Heartbeats carry a fingerprint of all that is committed;
three that differ in a row make a full HAVE, so the protocol heals also what a bug broke
("self-stabilising": Dijkstra 1974). The rules kept here, asserted and checked by simulation:

S1  A local change is committed before its first byte leaves (journal before send).
S2  HAVE names only what is committed.
S3  A snapshot holds exactly its version, and no local change that is not committed.
S4  floor <= version, and every change in (floor, version] can be had from the log.
S5  Each change is delivered once, after all it builds on.
S6  What waits is bounded: pending changes, downloads, cached snapshots, each peer's share.
"""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from crdtstate import wire
from crdtstate.change import Change, Snapshot, decode_change
from crdtstate.clock import Dot, Version, mix
from crdtstate.config import Config
from crdtstate.document import Document, EngineFailure
from crdtstate.documents import DOCUMENTS_MAX, DocumentSet
from crdtstate.errors import InvalidUpdate, ProtocolError
from crdtstate.events import (
    CatchingUp,
    ClockSkew,
    DocumentRebuilt,
    Event,
    PeerConnected,
    PeerDisconnected,
    PeerRejected,
    PresenceChanged,
    SnapshotReceived,
)
from crdtstate.leases import Leases
from crdtstate.link import Link, takes
from crdtstate.mesh import Mesh
from crdtstate.outbox import FAIR_BYTES, Lane, Outboxes, lane_of
from crdtstate.presence import Presence
from crdtstate.quorum import ROUTES_MAX, WAITING_MAX, Question, Quorum
from crdtstate.transfer import CACHE_MAX, DOWNLOADS_MAX, SERVED_MAX, Downloads, Uploads

CHANGES_FRAME_BYTES = 256 * 1024
CHECKSUM_BYTES = 17
"""The head of a change's bytes that tells it from all others."""

MISMATCH_QUIET = 10
MISMATCHES_MAX = 30
"""Heartbeats in a row that tell of a difference before all is named anew; one at which neither
side has changed since the one before counts as ten."""

BULK_WINDOW = 2**20
"""Bytes of what a peer asked for that are under way to it, above which it has to wait."""

BUSY_PAUSE = 0.5
"""Seconds after which it may ask again, and as many at random."""

SNAPSHOT_WORTH = 512 * 1024
"""Bytes of changes up to which nobody looks whether a snapshot is less."""

SNAPSHOT_SHARE = 1.5
"""How much more than the document the changes have to be: who joins a snapshot has more to do."""

MEASURED_FOR = 10.0
"""Seconds for which the size of a document counts as known."""

QUARANTINE_MAX = 1000
HISTORY_MAX = 600
"""Heartbeats for which it is remembered how much was committed."""

SPREAD_FREE = 16
SPREAD_EACH = 0.0001
SPREAD_MAX = 0.05
"""Seconds between two times that changes are sent to many: so many for each connection above so
many, and at most so many."""

STRIKES_MAX = 20
_EMPTY = Version()


# What the shell has to do


class Transmit(NamedTuple):
    """Something waits for a peer: `Sync.take` it, a message at a time, as the connection can."""

    peer: int


class Persist(NamedTuple):
    """Append a change to the store; then call `Sync.committed` with *number*."""

    number: int
    change: Change


class SaveSnapshot(NamedTuple):
    """Keep a snapshot in the store, after all that was persisted before; then call
    `Sync.committed` with *number* and `Sync.compacted` with the new floor."""

    number: int
    document: str
    version: Version
    data: bytes


class Fetch(NamedTuple):
    """Read changes from the store and hand them to `Sync.fetched`."""

    peer: int
    document: str
    ranges: tuple[tuple[int, int, int], ...]


class Dial(NamedTuple):
    """Try once to connect to an address; then call `Sync.peer_up` or `Sync.dial_failed`."""

    url: str


class HangUp(NamedTuple):
    """Close a connection, after what waits for it; then call `Sync.peer_down`."""

    peer: int
    code: wire.ByeCode
    reason: str


class Delivered(NamedTuple):
    """Content changed: tell observers. *change* is None when a snapshot brought it."""

    document: Document
    change: Change | None
    paths: list[str]
    agent: str


class Rebuild(NamedTuple):
    """A document's engine failed: load it from the store, then call `Sync.rebuilt`."""

    document: str


class Reidentify(NamedTuple):
    """This writer's history is known elsewhere beyond ours: go on under another writer."""

    reason: str


class Hurry(NamedTuple):
    """Sync the store soon; then call `Sync.synced`. It does so by itself, but somebody waits."""


class Emit(NamedTuple):
    """Tell the user."""

    event: Event


Effect = (
    Transmit
    | Persist
    | SaveSnapshot
    | Fetch
    | Dial
    | HangUp
    | Delivered
    | Rebuild
    | Reidentify
    | Hurry
    | Emit
)


@dataclass(slots=True)
class _Ledger:
    """What the core knows of one document beside the document itself."""

    # Tells the document's share of the fingerprint from others', and that share.
    salt: int
    fingerprint: int = 0
    committed: Version = field(default_factory=Version)
    floor: Version = field(default_factory=Version)
    # Bytes persisted since the snapshot, and the size of that.
    log_bytes: int = 0
    snapshot_bytes: int = 0
    tidy_at: float | None = None
    # The size of the document's state, and when it was measured.
    measured: int = 0
    measured_at: float | None = None


@dataclass(slots=True)
class _Missing:
    """A peer announced changes of a writer that are not here."""

    target: int
    due: float
    tries: int = 0
    # Who was asked last.
    peer: int = 0


class Sync:
    """The sync core of one replica.

    Args:
        documents: The documents; the core delivers into them.
        hello: How this replica introduces itself.
        config: Settings.
        rng: For jitter and choices between equals.
        now: The time, in seconds on any clock that does not run backwards.
        seeds: Addresses to stay connected to.
    """

    def __init__(
        self,
        documents: DocumentSet,
        hello: wire.Hello,
        config: Config,
        rng: random.Random,
        now: float,
        seeds: Iterable[str] = (),
    ) -> None:
        self.documents = documents
        self.hello = hello
        self.config = config
        self._rng = rng
        self._now = now
        self._ledgers: dict[str, _Ledger] = {}
        self._links: dict[int, Link] = {}
        self._seeds = tuple(seeds)
        self.mesh = self._make_mesh(now)
        self._effects: list[Effect] = []
        self._outboxes: Outboxes[Link] = Outboxes(config, self._cut_off)
        # For whom something new waits, in order.
        self._unsent: dict[int, None] = {}
        # Changes to send on: (change, the link it came from); and when they may be.
        self._outgoing: list[tuple[Change, Link | None]] = []
        self._spread_at = 0.0
        # What was persisted and is not committed: (number, document, own change or None,
        # writer and seq or a whole version).
        self._uncommitted: deque[tuple[int, str, Change | None, Version | Dot]] = deque()
        self._persisted = 0
        # Pending changes by dot, with the peer that sent each; and by the dot they wait for.
        self._pending: dict[tuple[str, int, int], tuple[Change, int]] = {}
        self._waiting: dict[tuple[str, int, int], list[tuple[str, int, int]]] = {}
        self._pending_bytes = 0
        self._missing: dict[tuple[str, int], _Missing] = {}
        # Document -> changes that came as answers since it began to catch up.
        self._caught_up: dict[str, int] = {}
        self._uploads = Uploads(self._send)
        self._downloads = Downloads(self._send)
        # Changes that the engine failed on; never tried again.
        # By checksum, not by dot: else one forged change would keep the true one out for ever.
        self._quarantine: OrderedDict[bytes, None] = OrderedDict()
        # Documents to rebuild, and why.
        self._broken: dict[str, str] = {}
        self._fingerprint = 0
        self._is_reidentifying = False
        self._synced = 0
        # How many changes were committed, and how many had been at each heartbeat.
        self._commits = 0
        self._history: deque[tuple[float, int]] = deque(maxlen=HISTORY_MAX)
        self._quorum = Quorum(
            hello.agent,
            hello.is_durable,
            self.committed_version,
            self._send,
            lambda: self._effects.append(Hurry()),
        )
        self.presence = Presence(hello.writer, hello.agent, documents.wall_ms())
        # Of relays: the writers they lend. Of borrowers: what must be here before they may write.
        self.leases = Leases(rng) if hello.role == "relay" else None
        self._borrowed: dict[str, int] = {}
        self._lender: int | None = None
        self._loan: dict[str, int] = {}
        self._was_given_back = False
        # Document -> own seq that a peer acknowledged after it got it from here.
        self.own_acked: dict[str, int] = {}
        # Writers that this replica wrote as in earlier sessions.
        self.former: set[int] = set()
        # Deadlines; None while there is nothing to do. When a connection may have been silent for
        # too long, at the earliest.
        self._silence_at = now + config.link_timeout
        self._adopt_at = now + config.heartbeat
        self._flush_at: float | None = None
        self._want_at: float | None = None
        self._tidy_at: float | None = None

    # Looking

    @property
    def peers(self) -> list[Link]:
        """The connections whose other side is known."""
        return [link for link in self._links.values() if link.is_member]

    def committed_version(self, document: str) -> Version:
        """What of *document* is committed here."""
        ledger = self._ledgers.get(document)
        return ledger.committed.copy() if ledger else Version()

    def floor(self, document: str) -> Version:
        """Up to where the log of *document* is forgotten."""
        ledger = self._ledgers.get(document)
        return ledger.floor.copy() if ledger else Version()

    def lag(self, peer: int) -> int:
        """How many changes that are committed here the peer has not acknowledged."""
        link = self._links[peer]
        return sum(
            max(0, seq - link.acked.get(name, _EMPTY).get(writer, 0))
            for name, ledger in self._ledgers.items()
            if link.takes(name)
            for writer, seq in ledger.committed.items()
        )

    def lag_seconds(self, peer: int, now: float) -> float:
        """For how long, about, changes that are committed here have not been acknowledged."""
        lag = self.lag(peer)
        if not lag:
            return 0.0
        reached = self._commits - lag
        since = next((at for at, commits in reversed(self._history) if commits <= reached), None)
        if since is None:
            since = self._history[0][0] if self._history else now
        return max(0.0, now - since)

    def missing_count(self) -> int:
        """How many changes peers have announced that are not delivered here."""
        return sum(
            max(0, wanted.target - self._version(name).get(writer, 0))
            for (name, writer), wanted in self._missing.items()
        )

    @property
    def pending_count(self) -> int:
        """How many changes wait for others that they build on."""
        return len(self._pending)

    def loads(self) -> Iterator[tuple[str, int, int]]:
        """What may pile up here: (name, size, limit) (S6)."""
        config = self.config
        yield "pending changes", len(self._pending), config.pending_changes
        yield "questions", len(self._quorum), WAITING_MAX
        yield "routes", self._quorum.routes, ROUTES_MAX
        yield "members", len(self.mesh.members), wire.MEMBERS_MAX
        yield "pending bytes", self._pending_bytes, config.pending_bytes
        yield "places waited for", len(self._waiting), config.pending_changes
        yield "cached snapshots", len(self._uploads), CACHE_MAX
        yield "uploads", self._uploads.served, max(SERVED_MAX, len(self._links))
        yield "downloads", self._downloads.active, DOWNLOADS_MAX
        yield "offers", len(self._downloads), len(self._ledgers)
        slack = config.answer_bytes + 2 * CHANGES_FRAME_BYTES
        share = BULK_WINDOW + slack
        for link in self._links.values():
            yield "outbox", link.outbox.size_bytes, config.outbox_bytes + share
        total = config.outbox_bytes_total + len(self._links) * (FAIR_BYTES + share)
        yield "outboxes", self._outboxes.size_bytes, total
        yield "quarantined changes", len(self._quarantine), QUARANTINE_MAX

    @property
    def has_quarantine(self) -> bool:
        """Whether the engine failed on a change, which is therefore lacking."""
        return bool(self._quarantine)

    @property
    def persisted(self) -> int:
        """The number of the newest `Persist` or `SaveSnapshot`."""
        return self._persisted

    @property
    def committed_number(self) -> int:
        """Up to which of these numbers everything is committed."""
        return self._uncommitted[0][0] - 1 if self._uncommitted else self._persisted

    def is_synced(self) -> bool:
        """Whether every connected peer has committed what we have, and we what they have."""
        if self._uncommitted or self._broken:
            return False
        if any(link.hello is None and link.dialled for link in self._links.values()):
            return False
        for link in self.peers:
            if not link.is_greeted:
                return False
            for name in self._ledgers.keys() | link.acked.keys():
                if not link.takes(name):
                    continue
                mine, theirs = self.committed_version(name), link.acked.get(name, _EMPTY)
                if not mine <= theirs or not theirs <= mine:
                    return False
        return True

    def _has_all_of(self, writer: int) -> bool:
        return all(
            acked.get(writer, 0) <= self._version(name).get(writer, 0)
            for link in self.peers
            for name, acked in link.acked.items()
        )

    def _version(self, document: str) -> Version:
        found = self.documents.find(document)
        return found.version if found else _EMPTY

    def next_deadline(self) -> float:
        """When to call `tick` at the latest."""
        soonest = min(self.mesh.next_deadline(), self._silence_at, self._adopt_at)
        for at in (
            self._flush_at,
            self._want_at,
            self._downloads.check_at,
            self._tidy_at,
            self._quorum.next_deadline(),
            self.presence.next_deadline(),
            self._spread_at if self._outgoing else None,
        ):
            if at is not None and at < soonest:
                soonest = at
        return soonest

    # Starting

    def restore(self, document: str, version: Version, floor: Version, log_bytes: int = 0) -> None:
        """Take note of a document that was loaded from the store at *version*; *log_bytes* of
        its changes are not in the stored snapshot."""
        ledger = self._ledger(document)
        ledger.log_bytes = log_bytes
        self._commit(ledger, document, version)
        ledger.floor = floor.copy()
        if (found := self.documents.find(document)) is not None:
            self._note_tidying(found)

    def _make_mesh(self, now: float) -> Mesh:
        return Mesh(
            self._links,
            self.hello,
            self._seeds,
            self.config,
            self._rng,
            self.documents.wall_ms,
            self._fingerprint_for,
            self._send,
            lambda event: self._effects.append(Emit(event)),
            now,
        )

    def introduce(self, hello: wire.Hello, now: float) -> None:
        """Take *hello* for the introduction, before the first connection: it is known only now
        where this replica listens."""
        assert not self._links, "somebody has been told otherwise"
        self.hello = hello
        self.mesh = self._make_mesh(now)

    # Connections

    def add_seed(self, url: str, now: float) -> None:
        """Stay connected to *url* from now on."""
        self._now = now
        self._seeds = (*self._seeds, url)
        self.mesh.topology.add_seed(url, now)
        self.mesh.dial(now)

    def remove_seed(self, url: str) -> None:
        """Do not insist on a connection to *url* any more; one that stands is kept."""
        self._seeds = tuple(seed for seed in self._seeds if seed != url)
        self.mesh.topology.remove_seed(url)

    def dial_failed(self, url: str, now: float) -> None:
        """What a `Dial` asked for failed; it will be tried again."""
        self._now = now
        self.mesh.topology.dial_failed(url, now)
        self.mesh.dial(now)

    def peer_up(self, peer: int, now: float, *, url: str | None) -> None:
        """A connection stands; *peer* is any new number for it, *url* what a `Dial` named."""
        self._now = now
        self._links[peer] = Link(peer, url, now, now)
        if url is not None:
            self.mesh.topology.connected(url)
        self._send(peer, self.hello)
        if self.mesh.has_left:
            self._hang_up(self._links[peer], wire.ByeCode.SHUTDOWN, "closing")

    def peer_down(self, peer: int, now: float, reason: str = "closed") -> None:
        """A connection is gone, whoever ended it."""
        self._now = now
        link = self._links.pop(peer, None)
        if link is None:
            return
        if link.hello is not None and not link.is_visitor:
            event = PeerDisconnected(link.hello.agent, link.hello.writer, reason)
            self._effects.append(Emit(event))
        self._outboxes.clear(link)
        self._uploads.peer_down(peer)
        self._downloads.peer_down(peer)
        self.mesh.gone(link, now)

    def leave(self, now: float) -> None:
        """Say goodbye to everybody: this replica closes. What follows is carried out as ever."""
        self._now = now
        self._spread()
        self.mesh.leave()
        for link in list(self._links.values()):
            self._hang_up(link, wire.ByeCode.SHUTDOWN, "closing")

    def take(self, peer: int, frames_max: int = wire.BUNDLE_FRAMES_MAX) -> list[bytes]:
        """Take what goes to a peer with the next message: encoded frames, none if nothing waits."""
        if not self.has_unsent(peer):
            return []
        link = self._links[peer]
        was_congested = link.is_congested
        frames = self._outboxes.take(link, frames_max)
        if was_congested and not link.is_congested:
            # It pulls what it lacks once it is told.
            self._arm_flush()
        return frames

    def has_unsent(self, peer: int) -> bool:
        """Whether something waits for a peer."""
        link = self._links.get(peer)
        return link is not None and bool(link.outbox)

    def queued_bytes(self, peer: int) -> int:
        """How much waits for a peer."""
        return self._links[peer].outbox.size_bytes

    def _cut_off(self, link: Link) -> None:
        self._hang_up(link, wire.ByeCode.NORMAL, "it does not read what is sent")

    # Local changes

    def local_changes(self, changes: Iterable[Change], now: float) -> None:
        """Own changes were sealed: persist them; they leave once they are committed (S1)."""
        self._now = now
        if self._was_given_back:
            # Somebody else writes under this writer by now. The shell refuses writes before this.
            return
        for change in changes:
            assert change.writer == self.hello.writer, f"{change!r} is of another writer"
            self._persist(change, change)
            if (document := self.documents.find(change.document)) is not None:
                self._note_tidying(document)

    def committed(self, number: int, now: float) -> None:
        """Everything persisted up to *number* is committed."""
        self._now = now
        touched: set[str] = set()
        while self._uncommitted and self._uncommitted[0][0] <= number:
            _, name, own, what = self._uncommitted.popleft()
            ledger = self._ledger(name)
            self._commit(ledger, name, what if isinstance(what, Version) else {what[0]: what[1]})
            touched.add(name)
            if own is not None:
                self._outgoing.append((own, None))
        for name in sorted(touched):
            self._serve_asked(name)
            self._maybe_compact(name)
        if self._quorum:
            self._quorum.progressed(touched, self._persisted, self._synced)
        if self._broken:
            self._rebuild_broken()

    def synced(self, number: int, now: float) -> None:
        """Everything persisted up to *number* is synced: a power cut does not take it."""
        if number > self._synced:
            self._now, self._synced = now, number
            if self._quorum:
                self._quorum.progressed(None, self._persisted, number)

    def _persist(self, change: Change, own: Change | None) -> None:
        self._persisted += 1
        self._effects.append(Persist(self._persisted, change))
        self._uncommitted.append((self._persisted, change.document, own, change.dot))
        self._ledger(change.document).log_bytes += len(change.data)

    def _commit(self, ledger: _Ledger, name: str, version: Version | dict[int, int]) -> None:
        """Count *version* as committed, and tell peers soon (S2)."""
        committed = ledger.committed
        salt = ledger.salt
        for writer, seq in version.items():
            before = committed.get(writer, 0)
            if seq <= before:
                continue
            moved = mix(salt, writer, seq)
            if before:
                moved ^= mix(salt, writer, before)
            self._commits += seq - before
            self._fingerprint ^= moved
            ledger.fingerprint ^= moved
            committed[writer] = seq
            for link in self._links.values():
                link.dirty.setdefault(name, set()).add(writer)
        if self._links:
            self._arm_flush()

    # Receiving

    def receive(self, peer: int, frame: wire.Frame, now: float) -> None:
        """Take in one frame from *peer*. Never raises for what a peer sent."""
        self._note_sleep(now)
        self._now = now
        link = self._links.get(peer)
        if link is None or link.is_closing:
            return
        link.heard = now
        if link.hello is None and not isinstance(frame, (wire.Hello, wire.Bye)):
            self._hang_up(link, wire.ByeCode.PROTOCOL, "a frame before Hello")
            return
        try:
            self._handle(link, frame)
        except ProtocolError as exc:
            self._strike(link, str(exc))

    def _handle(self, link: Link, frame: wire.Frame) -> None:
        match frame:
            case wire.Changes():
                self._on_changes(link, frame)
            case wire.Have():
                self._on_have(link, frame)
            case wire.Heartbeat():
                self._on_heartbeat(link, frame)
            case wire.Want():
                self._on_want(link, frame)
            case wire.Members():
                self.mesh.on_members(link, frame, self._now)
            case wire.Roll():
                self.mesh.on_roll(link, frame)
            case wire.Ask():
                if self._quorum.on_ask(link, frame, self._now, self._persisted, self._synced):
                    self._pass_on(frame, link, frozenset(frame.names))
            case wire.Answer():
                self._quorum.on_answer(frame)
            case wire.Presence():
                if self.presence.on_presence(frame, self._now):
                    self._emit_presence(frame)
                    self._pass_on(frame, link)
            case wire.Borrow():
                self._on_borrow(link)
            case wire.Lend():
                raise ProtocolError("a loan that nobody asked for")
            case wire.Return():
                self._on_return(link, frame)
            case wire.Hello():
                self._on_hello(link, frame)
            case wire.Offer():
                self._on_offer(link, frame)
            case wire.Get():
                self._on_get(link, frame)
            case wire.Chunk():
                self._on_chunk(link, frame)
            case wire.Busy():
                self._on_busy(frame)
            case wire.Bye():
                link.is_closing = True
                code = link.bye = _bye_code(frame.code)
                self._effects.append(HangUp(link.peer, code, f"they said: {frame.reason}"))

    def _strike(self, link: Link, reason: str) -> None:
        """A peer broke a rule. What it sent is dropped; if it goes on, so is the connection."""
        link.strikes += 1
        self._effects.append(Emit(PeerRejected(link.agent, reason)))
        if link.strikes >= STRIKES_MAX:
            self._hang_up(link, wire.ByeCode.PROTOCOL, reason)

    def _hang_up(self, link: Link, code: wire.ByeCode, reason: str) -> None:
        if not link.is_closing:
            bye = wire.Bye(code, reason[:200])
            self._outboxes.push(link, wire.encode_frame(bye), lane_of(bye))
            self._unsent[link.peer] = None
            link.is_closing = True
            link.bye = code
            self._effects.append(HangUp(link.peer, code, reason))

    def _on_hello(self, link: Link, hello: wire.Hello) -> None:
        if link.hello is not None:
            raise ProtocolError("a second Hello")
        mine = self.hello
        if hello.proto_min > wire.PROTOCOL_MAX or hello.proto_max < wire.PROTOCOL_MIN:
            ours = f"{wire.PROTOCOL_MIN}-{wire.PROTOCOL_MAX}"
            reason = f"protocol {hello.proto_min}-{hello.proto_max}, here {ours}"
            self._hang_up(link, wire.ByeCode.INCOMPATIBLE, reason)
            return
        if hello.writer == mine.writer:
            if hello.session == mine.session:
                if link.url is not None:
                    self.mesh.topology.met(link.url, hello.writer, is_self=True)
                self._hang_up(link, wire.ByeCode.DUPLICATE, "this is myself")
            else:
                self._reidentify(f"{hello.agent!r} writes as the same writer: a copied store")
                self._hang_up(link, wire.ByeCode.SAME_WRITER, "two processes write as one writer")
            return
        for other in self.peers:
            if other.hello is not None and other.hello.writer == hello.writer:
                if not self._replaces(link, other, hello):
                    if link.url is not None:
                        self.mesh.topology.met(link.url, hello.writer, is_self=False)
                    self._hang_up(link, wire.ByeCode.DUPLICATE, "there is another connection")
                    return
                self._hang_up(other, wire.ByeCode.DUPLICATE, "replaced by another connection")
        if self._is_full(hello):
            self._hang_up(link, wire.ByeCode.PRUNED, "too many connections")
            return
        link.hello = hello
        if not link.is_visitor:
            self._effects.append(Emit(PeerConnected(hello.agent, hello.writer, hello.role)))
        if link.is_visitor:
            return
        self._send_full_haves(link)
        self.mesh.met(link, self._now)
        for presence in self.presence.all(self._now):
            self._send(link.peer, presence)

    def _is_full(self, hello: wire.Hello) -> bool:
        """Whether this replica has all the connections it can take."""
        peers = self.peers
        if self.hello.role == "agent" and hello.address is None:
            return sum(link.is_leaf for link in peers) >= self.config.leaves_max
        return len(peers) >= self.config.links_max

    def _replaces(self, new: Link, old: Link, hello: wire.Hello) -> bool:
        """Which of two connections with one peer stays; both sides must say the same."""
        assert old.hello is not None
        if hello.session != old.hello.session or new.dialled == old.dialled:
            return True
        return new.dialled == (self.hello.writer > hello.writer)

    # Changes

    def _on_changes(self, link: Link, frame: wire.Changes) -> None:
        asked: dict[tuple[str, int], int] = {}
        for data in frame.changes:
            change = decode_change(data)
            if frame.answer:
                before = self._version(change.document).get(change.writer, 0)
                asked.setdefault((change.document, change.writer), before)
            self._take(link, change)
        advanced: set[str] = set()
        for (name, writer), before in asked.items():
            if self._version(name).get(writer, 0) > before:
                advanced.add(name)
                if (wanted := self._missing.get((name, writer))) is not None:
                    wanted.tries = 0
                    wanted.due = self._now + self.config.want_retry
        for name in advanced:
            self._note_progress(link, name, frame)
        if frame.more and advanced:
            # Ask this peer on, but only after an answer that helped: else two who cannot help
            # each other yet would talk as fast as the network lets them.
            for (name, _), wanted in self._missing.items():
                if name in advanced and wanted.peer == link.peer:
                    wanted.due = self._now
        if self._missing:
            self._arm_want()

    def _note_progress(self, link: Link, name: str, frame: wire.Changes) -> None:
        """Tell how far catching up is, if it takes more than one answer."""
        if not frame.more and name not in self._caught_up:
            return
        came = self._caught_up.get(name, 0) + len(frame.changes)
        left = sum(
            max(0, wanted.target - self._version(name).get(writer, 0))
            for (document, writer), wanted in self._missing.items()
            if document == name
        )
        self._effects.append(Emit(CatchingUp(name, link.agent, came, came + left, "changes")))
        self._caught_up[name] = came
        if not left:
            del self._caught_up[name]

    def _take(self, link: Link, change: Change) -> None:
        name, writer, seq = key = (change.document, change.writer, change.seq)
        if not self._takes(name):
            return
        known = link.known.setdefault(name, Version())
        if known.get(writer, 0) == seq - 1:
            known[writer] = seq
        if seq <= self._version(name).get(writer, 0) or key in self._pending:
            return
        if writer == self.hello.writer and not self._is_borrowed(name, seq):
            self._reidentify(f"{link.agent} has change {seq} of this writer in {name!r}")
            return
        if self._quarantine and change.data[:CHECKSUM_BYTES] in self._quarantine:
            return
        document = self._find_or_make(name, change.shared)
        if document.is_broken:
            self._want(name, writer, seq, self._now + self.config.want_retry)
        elif document.is_ready(change):
            self._deliver(link, document, change)
        else:
            self._park(link, document, change)

    def _find_or_make(self, name: str, shared: bool) -> Document:
        found = self.documents.find(name)
        if found is None:
            self._ledger(name)
            found = self.documents.find_or_make(name, shared)
        return found

    def _park(self, link: Link, document: Document, change: Change) -> None:
        """Let a change wait for the first one it lacks; or, when too many do, forget it: it was
        not acknowledged, so it will be asked for again (S6)."""
        limit = self.config
        if (
            len(self._pending) >= limit.pending_changes
            or self._pending_bytes + len(change.data) > limit.pending_bytes
        ):
            self._want(change.document, change.writer, change.seq, self._now + limit.want_retry)
            return
        key = (change.document, change.writer, change.seq)
        self._pending[key] = (change, link.peer)
        self._pending_bytes += len(change.data)
        self._wait(document, change)

    def _wait(self, document: Document, change: Change) -> None:
        version = document.version
        lacking = Dot(change.writer, change.seq - 1)
        if version.covers(lacking):
            lacking = next(dep for dep in change.deps if not version.covers(dep))
        key = (change.document, change.writer, change.seq)
        self._waiting.setdefault((change.document, *lacking), []).append(key)
        due = self._now + self.config.want_delay
        self._want(change.document, lacking.writer, lacking.seq, due)

    def _unpark(self, key: tuple[str, int, int]) -> tuple[Change, Link | None]:
        """Take a pending change out; return it with the link that it came by, if that is up."""
        change, peer = self._pending.pop(key)
        self._pending_bytes -= len(change.data)
        return change, self._links.get(peer)

    def _deliver(self, link: Link | None, document: Document, change: Change) -> None:
        """Deliver a ready change and all that waited for it."""
        ready = [(change, link)]
        while ready:
            change, link = ready.pop()
            if document.is_broken:
                self._want(change.document, change.writer, change.seq, self._now)
                continue
            if not self._apply(link, document, change):
                continue
            for key in self._waiting.pop((change.document, change.writer, change.seq), ()):
                if key not in self._pending:
                    continue
                if document.is_ready(self._pending[key][0]):
                    ready.append(self._unpark(key))
                else:
                    self._wait(document, self._pending[key][0])

    def _apply(self, link: Link | None, document: Document, change: Change) -> bool:
        try:
            paths = document.apply(change)
        except InvalidUpdate as exc:
            self._set_aside(change)
            if link is not None:
                self._strike(link, f"{change!r}: {exc}")
            return False
        except EngineFailure as exc:
            self._set_aside(change)
            self._rebuild(document.name, str(exc))
            return False
        if not self.documents.observe(change.stamp):
            ahead = (change.stamp >> 16) / 1000 - self.documents.wall_ms() / 1000
            self._effects.append(Emit(ClockSkew(change.origin.agent, ahead)))
        self._persist(change, None)
        for writer, seq in change.deps:
            if writer == self.hello.writer:
                # Who wrote it has ours, so it can no more be taken back.
                self.own_acked[document.name] = max(seq, self.own_acked.get(document.name, 0))
        self._outgoing.append((change, link))
        self._effects.append(Delivered(document, change, paths, change.origin.agent))
        self._note_tidying(document)
        return True

    def _set_aside(self, change: Change) -> None:
        """Remember a change that cannot be taken in, so as not to try it again and again."""
        self._quarantine[change.data[:CHECKSUM_BYTES]] = None
        if len(self._quarantine) > QUARANTINE_MAX:
            self._quarantine.popitem(last=False)

    def _rebuild(self, name: str, reason: str) -> None:
        self._broken[name] = reason
        self._rebuild_broken()

    def _rebuild_broken(self) -> None:
        """Have broken documents rebuilt, once the store has all that was delivered to them."""
        busy = {document for _, document, _, _ in self._uncommitted}
        for name in [name for name in self._broken if name not in busy]:
            self._effects.append(Rebuild(name))
            self._effects.append(Emit(DocumentRebuilt(name, self._broken.pop(name))))

    def rebuilt(self, document: str, now: float) -> None:
        """The document was loaded from the store again."""
        self._now = now
        for (name, _), wanted in self._missing.items():
            if name == document:
                wanted.due = now
        self._arm_want()
        found = self.documents.find(document)
        assert found is not None, f"{document!r} was rebuilt and is not there"
        self._retry_pending(found)
        self._serve_asked(document)
        self._note_tidying(found)

    def _spread(self) -> None:
        """Send the outgoing changes, each to those that may lack it; to many only now and then.

        A message to each of two hundred connections costs more than to write one change, so what
        arrives from them one by one goes out by the dozen.
        """
        outgoing, self._outgoing = self._outgoing, []
        encoded: dict[tuple[int, ...], list[bytes]] = {}
        copies = 0
        for link in self._links.values():
            if not link.is_member or not link.is_greeted or link.is_congested:
                continue
            if not self.mesh.is_eager(link, self._now):
                continue
            chosen = tuple(
                index
                for index, (change, source) in enumerate(outgoing)
                if self._may_lack(link, change, source)
            )
            if not chosen:
                continue
            frames = encoded.get(chosen)
            if frames is None:
                frames = encoded[chosen] = _encode_changes([outgoing[i][0].data for i in chosen])
            copies += 1
            for frame in frames:
                self._push(link, frame, Lane.LIVE)
        pause = min(max(0, copies - SPREAD_FREE) * SPREAD_EACH, SPREAD_MAX)
        self._spread_at = self._now + pause

    def _may_lack(self, link: Link, change: Change, source: Link | None) -> bool:
        if not link.takes(change.document) or link is source:
            return False
        if source is not None and self.mesh.is_direct and link.writer in source.neighbours:
            return False
        known = link.known.get(change.document)
        return known is None or known.get(change.writer, 0) < change.seq

    # HAVE and WANT

    def _on_have(self, link: Link, frame: wire.Have) -> None:
        name = frame.document
        if not self._takes(name):
            return
        self._ledger(name)
        acked = link.acked.setdefault(name, Version())
        link.known.setdefault(name, Version()).merge(frame.version)
        acked.merge(frame.version)
        own = frame.version.get(self.hello.writer, 0)
        version = self._version(name)
        if own > version.get(self.hello.writer, 0) and not self._is_borrowed(name, own):
            self._reidentify(f"{link.agent} has {own} changes of this writer in {name!r}")
            return
        if own and not frame.full:
            self.own_acked[name] = max(own, self.own_acked.get(name, 0))
        due = self._now if frame.full else self._now + self.config.want_delay
        for writer, seq in frame.version.items():
            if seq > version.get(writer, 0):
                self._want(name, writer, seq, due)

    def _want(self, name: str, writer: int, seq: int, due: float) -> None:
        wanted = self._missing.get((name, writer))
        if wanted is None:
            self._missing[name, writer] = _Missing(seq, due)
        else:
            wanted.target = max(wanted.target, seq)
            wanted.due = min(wanted.due, due) if not wanted.tries else wanted.due
        self._arm_want(due)

    def _ask(self) -> None:
        """Ask for what is missing and due, each of it at one peer that has it."""
        now = self._now
        asks: dict[tuple[int, str], list[tuple[int, int, int]]] = {}
        parked: dict[tuple[str, int], list[int]] = {}
        for name, writer, seq in self._pending:
            parked.setdefault((name, writer), []).append(seq)
        for (name, writer), wanted in list(self._missing.items()):
            have = self._version(name).get(writer, 0)
            if have >= wanted.target:
                del self._missing[name, writer]
                continue
            if wanted.due > now:
                continue
            peers = sorted(
                link.peer
                for link in self.peers
                if link.acked.get(name, _EMPTY).get(writer, 0) > have
            )
            if not peers:
                # Somebody's next HAVE will bring it up again.
                del self._missing[name, writer]
                continue
            if self._downloads.is_running(name):
                wanted.due = now + self.config.want_retry
                continue
            start = wanted.tries if wanted.tries else self._rng.randrange(len(peers))
            peer = peers[start % len(peers)]
            last = min(wanted.target, self._links[peer].acked[name].get(writer, 0))
            gaps = _gaps(writer, have + 1, last, sorted(parked.get((name, writer), ())))
            asks.setdefault((peer, name), []).extend(gaps)
            wanted.tries += 1
            wanted.peer = peer
            pause = self.config.want_retry * 1.5 ** min(wanted.tries - 1, 10)
            wanted.due = now + min(pause, self.config.want_retry_max)
        for (peer, name), ranges in asks.items():
            for at in range(0, len(ranges), wire.RANGES_MAX):
                self._send(peer, wire.Want(name, tuple(ranges[at : at + wire.RANGES_MAX])))

    def _on_want(self, link: Link, frame: wire.Want) -> None:
        if link.outbox.bulk_bytes > BULK_WINDOW:
            self._refuse(link, frame.document)
            return
        if not self._takes(frame.document):
            return
        ledger = self._ledger(frame.document)
        if any(first <= ledger.floor.get(writer, 0) for writer, first, _ in frame.ranges):
            self._ask_snapshot(link, frame.document)
            return
        committed = ledger.committed
        ranges = tuple(
            (writer, first, min(last, committed.get(writer, 0)))
            for writer, first, last in frame.ranges
            if first <= committed.get(writer, 0)
        )
        if ranges:
            self._effects.append(Fetch(link.peer, frame.document, ranges))

    def _ask_snapshot(self, link: Link, name: str) -> None:
        """Let a peer have a snapshot, if not too many others fetch one."""
        if self._uploads.may_serve(link.peer, self._now):
            self._uploads.ask(name, link.peer)
            self._serve_asked(name)
        else:
            self._refuse(link, name)

    def snapshot_instead(self, peer: int, document: str, log_bytes: int, now: float) -> bool:
        """Of what a `Fetch` asks for the log has *log_bytes*: whether a snapshot is less. Then it
        is offered, and nothing is to be read."""
        self._now = now
        link, found = self._links.get(peer), self.documents.find(document)
        if link is None or found is None or found.is_broken or log_bytes < SNAPSHOT_WORTH:
            return False
        if log_bytes < SNAPSHOT_SHARE * self._measure(found):
            return False
        self._ask_snapshot(link, document)
        return True

    def _measure(self, document: Document) -> int:
        """About how large a document's snapshot is; as costly as one, so not looked at often."""
        ledger = self._ledger(document.name)
        if ledger.measured_at is None or self._now >= ledger.measured_at + MEASURED_FOR:
            ledger.measured_at, ledger.measured = self._now, document.sizes()[0]
        return ledger.measured

    def _refuse(self, link: Link, name: str) -> None:
        """Let a peer ask again later: enough is under way to it."""
        pause_ms = int(BUSY_PAUSE * 1000 * (1 + self._rng.random()))
        self._send(link.peer, wire.Busy(name, pause_ms))

    def fetched(self, peer: int, changes: Sequence[bytes], more: bool) -> None:
        """What a `Fetch` found, in the order of the journal; *more* if it was cut short."""
        if not changes or peer not in self._links:
            return
        frames = _split(changes)
        for index, part in enumerate(frames):
            is_last = index == len(frames) - 1
            self._send(peer, wire.Changes(tuple(part), answer=True, more=more and is_last))

    def _on_heartbeat(self, link: Link, frame: wire.Heartbeat) -> None:
        link.is_greeted = True
        mine = self._fingerprint_for(link)
        told = link.told
        self.mesh.on_heartbeat(link, frame, self._now)
        if frame.fingerprint == mine:
            link.mismatches = 0
            if link.agreed != mine:
                link.agreed = mine
                self._note_agreement(link)
            return
        # While changes are on their way nothing else is to be expected.
        is_quiet = told is not None and told[:2] == (frame.fingerprint, mine)
        link.mismatches += MISMATCH_QUIET if is_quiet else 1
        if link.mismatches >= MISMATCHES_MAX:
            link.mismatches = 0
            self._send_full_haves(link)

    def _fingerprint_for(self, link: Link) -> int:
        """64 bits over all that is committed here and concerns a link."""
        if not link.is_partial and self.hello.documents is None:
            return self._fingerprint
        found = 0
        for name, ledger in self._ledgers.items():
            if link.takes(name) and self._takes(name):
                found ^= ledger.fingerprint
        return found

    def _takes(self, name: str) -> bool:
        """Whether this replica takes part in a document."""
        return takes(self.hello.documents, name)

    def _note_agreement(self, link: Link) -> None:
        """The peer has committed just what we have: it need not name it, should a HAVE be lost."""
        for name, ledger in self._ledgers.items():
            if link.takes(name):
                link.acked.setdefault(name, Version()).merge(ledger.committed)

    def _send_full_haves(self, link: Link) -> None:
        for name in sorted(self._ledgers):
            if link.takes(name):
                link.dirty.pop(name, None)
                self._send(link.peer, wire.Have(name, self._ledgers[name].committed.copy(), True))

    def _flush(self) -> None:
        """Tell every peer what was committed since it was last told."""
        # Most have to be told the same.
        encoded: dict[tuple[str, frozenset[int]], bytes] = {}
        for link in self._links.values():
            if link.hello is None or link.is_congested or link.is_closing:
                continue
            dirty, link.dirty = link.dirty, {}
            for name, writers in dirty.items():
                if not link.takes(name):
                    continue
                key = (name, frozenset(writers))
                frame = encoded.get(key)
                if frame is None:
                    committed = self._ledgers[name].committed
                    moved = Version({writer: committed[writer] for writer in sorted(writers)})
                    frame = encoded[key] = wire.encode_frame(wire.Have(name, moved, False))
                self._push(link, frame, Lane.LIVE)

    # Snapshots

    def _serve_asked(self, name: str) -> None:
        """Offer a snapshot to those who wait for one, once no own change in it is uncommitted
        (S3), and once the document was rebuilt if its engine failed."""
        if not self._uploads.is_asked(name) or self._has_uncommitted(name):
            return
        document = self.documents.find(name)
        if document is None:
            self._uploads.drop(name)
        elif not document.is_broken:
            floor = self._ledger(name).floor
            self._uploads.offer(name, floor, self._now, document.snapshot)

    def _has_uncommitted(self, name: str) -> bool:
        return any(own is not None and doc == name for _, doc, own, _ in self._uncommitted)

    def _on_offer(self, link: Link, frame: wire.Offer) -> None:
        if any(
            name == frame.document and wanted.peer == link.peer and wanted.tries
            for (name, _), wanted in self._missing.items()
        ):
            self._downloads.on_offer(link.peer, frame, self._now)

    def _on_get(self, link: Link, frame: wire.Get) -> None:
        if link.outbox.bulk_bytes > BULK_WINDOW:
            # It asks again for what does not come.
            return
        if not self._uploads.on_get(link.peer, frame, self._now):
            # It has been replaced by a newer one: offer that.
            self._uploads.ask(frame.document, link.peer)
            self._serve_asked(frame.document)

    def _on_chunk(self, link: Link, frame: wire.Chunk) -> None:
        data = self._downloads.on_chunk(link.peer, frame, self._now)
        if (progress := self._downloads.progress(frame.document)) is not None:
            self._effects.append(Emit(CatchingUp(frame.document, link.agent, *progress, "bytes")))
        if data is not None:
            self._join(link, frame.document, data)

    def _join(self, link: Link, name: str, data: bytes) -> None:
        snapshot = Snapshot.decode(data)
        if snapshot.document != name:
            raise ProtocolError(f"a snapshot of {snapshot.document!r} in place of {name!r}")
        own = snapshot.version.get(self.hello.writer, 0)
        is_known = own <= self._version(name).get(self.hello.writer, 0)
        if not is_known and not self._is_borrowed(name, own):
            self._reidentify(f"a snapshot of {link.agent} has more of this writer in {name!r}")
            return
        document = self._find_or_make(name, snapshot.shared)
        if document.is_broken:
            # What it has will be asked for again.
            return
        try:
            paths = document.join(snapshot)
        except EngineFailure as exc:
            self._rebuild(name, str(exc))
            return
        self.documents.observe(snapshot.stamp)
        self._save(document)
        self._effects.append(Delivered(document, None, paths, link.agent))
        self._effects.append(Emit(SnapshotReceived(name, link.agent, len(data))))
        self._note_tidying(document)
        self._retry_pending(document)

    def _retry_pending(self, document: Document) -> None:
        """After a jump of the version: deliver what became ready, forget what is contained."""
        name, version = document.name, document.version
        keys = [key for key in self._pending if key[0] == name]
        for place in [place for place in self._waiting if place[0] == name]:
            del self._waiting[place]
        for key in keys:
            if version.covers((key[1], key[2])):
                self._unpark(key)
        for key in keys:
            if key not in self._pending:
                continue
            if document.is_ready(self._pending[key][0]):
                change, link = self._unpark(key)
                self._deliver(link, document, change)
            else:
                self._wait(document, self._pending[key][0])

    def _save(self, document: Document) -> None:
        """Let the store keep the document as it is now, as its snapshot."""
        ledger = self._ledger(document.name)
        snapshot = document.snapshot()
        data = snapshot.encode()
        self._persisted += 1
        number = self._persisted
        self._effects.append(SaveSnapshot(number, document.name, snapshot.version, data))
        self._uncommitted.append((number, document.name, None, snapshot.version))
        ledger.log_bytes, ledger.snapshot_bytes = 0, len(data)

    def _maybe_compact(self, name: str) -> None:
        """Renew the stored snapshot when the log has outgrown it. Local, at any time, without
        asking anybody: who falls below the floor gets a snapshot."""
        ledger = self._ledgers[name]
        limit = max(self.config.snapshot_after_bytes, ledger.snapshot_bytes)
        document = self.documents.find(name)
        if document is None or document.is_broken or self._uncommitted:
            return
        if ledger.log_bytes > limit:
            self._save(document)

    def compacted(self, name: str, floor: Version) -> None:
        """The store has forgotten the changes up to *floor*."""
        assert floor <= self._version(name), f"S4: {name!r} forgot what was not delivered"
        self._ledger(name).floor = floor.copy()

    def _on_busy(self, frame: wire.Busy) -> None:
        later = self._now + frame.retry_after_ms / 1000
        for (name, _), wanted in self._missing.items():
            if name == frame.document:
                wanted.due = max(wanted.due, later)

    # Questions, presence, leases

    def ask(
        self,
        document: str,
        version: Version,
        names: Iterable[str],
        now: float,
        *,
        durable: bool,
        tell: bool = False,
    ) -> Question:
        """Ask the agents *names* (none: everybody) until they have *version* of a document.

        The `Question`'s answers grow. Call `withdraw` when it is of no more interest.
        """
        self._now = now
        nonce = self._rng.getrandbits(64)
        question = Question(nonce, frozenset(names), document, version, durable, tell, now)
        self._quorum.ask(question, self._persisted, self._synced)
        self._ask_questions()
        return question

    def withdraw(self, question: Question) -> None:
        """Ask it no more."""
        self._quorum.forget(question)

    def _ask_questions(self) -> None:
        for frame in self._quorum.due(self._now):
            self._pass_on(frame, None, frozenset(frame.names))

    def catch_up(self, document: str, version: Version, now: float) -> None:
        """Get *version* of a document as soon as somebody is known to have it."""
        self._now = now
        have = self._version(document)
        for writer, seq in version.items():
            if seq > have.get(writer, 0):
                self._want(document, writer, seq, now)

    def _pass_on(
        self, frame: wire.Frame, source: Link | None, names: frozenset[str] = frozenset()
    ) -> None:
        """Send something that is for all members, or for *names*, on from link to link."""
        if self.mesh.is_direct and source is not None:
            return
        links = [link for link in self.peers if link is not source]
        if names:
            # Those who are connected need nobody's help.
            near = [link for link in links if link.agent in names]
            if len({link.agent for link in near}) >= len(names - {self.hello.agent}):
                links = near
        encoded, lane = wire.encode_frame(frame), lane_of(frame)
        for link in links:
            if self.mesh.is_eager(link, self._now) or link.agent in names:
                self._push(link, encoded, lane)

    def show(self, value: bytes | None, ttl: float, now: float) -> None:
        """Show everybody a packed value until *ttl* seconds after the last sign of life."""
        self._now = now
        self._pass_on(self.presence.show(value, ttl, now), None)

    def _emit_presence(self, frame: wire.Presence) -> None:
        event = PresenceChanged(frame.agent, frame.writer, frame.value is not None)
        self._effects.append(Emit(event))

    def _tick_presence(self) -> None:
        renewed, ended = self.presence.tick(self._now)
        if renewed is not None:
            self._pass_on(renewed, None)
        for writer, agent in ended:
            self._effects.append(Emit(PresenceChanged(agent, writer, False)))

    def borrow(self, lender: int, seqs: dict[str, int]) -> None:
        """This replica borrowed its writer from the relay *lender*: it may write once it has
        *seqs* of it."""
        self._lender = lender
        self._loan = dict(seqs)
        self._borrowed = {name: seq for name, seq in seqs.items() if self._takes(name)}

    def has_borrowed_all(self) -> bool:
        """Whether everything is here that was written under the borrowed writer."""
        writer = self.hello.writer
        self._borrowed = {
            name: seq
            for name, seq in self._borrowed.items()
            if self._version(name).get(writer, 0) < seq
        }
        return not self._borrowed

    def give_back(self) -> bool:
        """Hand the borrowed writer back, if the lender has all that was written. False if not."""
        writer = self.hello.writer
        written = {n: v[writer] for n, v in self.documents.versions() if writer in v}
        for link in self.peers:
            if link.writer == self._lender and all(
                link.acked.get(name, _EMPTY).get(writer, 0) >= seq for name, seq in written.items()
            ):
                # What earlier borrowers wrote where this one takes no part is there as well.
                self._send(link.peer, wire.Return(writer, {**self._loan, **written}))
                self._was_given_back = True
                return True
        return False

    @property
    def _is_between_loans(self) -> bool:
        """Whether the borrowed writer is not to be written under: not yet, or no more."""
        return bool(self._borrowed) or self._was_given_back

    def _on_borrow(self, link: Link) -> None:
        writer, seqs = 0, {}
        if self.leases is not None:
            writer = self.leases.lend()
            seqs = self._committed_of(writer)
        self._send(link.peer, wire.Lend(writer, seqs))

    def _committed_of(self, writer: int) -> dict[str, int]:
        return {
            name: ledger.committed[writer]
            for name, ledger in self._ledgers.items()
            if writer in ledger.committed
        }

    def _on_return(self, link: Link, frame: wire.Return) -> None:
        if self.leases is not None and link.writer == frame.writer:
            self.leases.take_back(frame.writer, frame.seqs, self._committed_of(frame.writer))

    # Identity

    def _is_borrowed(self, name: str, seq: int) -> bool:
        """Whether an own change that comes from elsewhere is an earlier borrower's."""
        return seq <= self._borrowed.get(name, 0)

    def _reidentify(self, reason: str) -> None:
        if not self._is_reidentifying:
            self._is_reidentifying = True
            self._effects.append(Reidentify(reason))
            # What waits may tell of changes that are not to be.
            self._outgoing.clear()
            for link in self._links.values():
                self._outboxes.clear(link)

    def reidentify_later(self) -> None:
        """The store could not do it now: part from all, to hear of it anew."""
        self._is_reidentifying = False
        for link in list(self._links.values()):
            self._hang_up(link, wire.ByeCode.NORMAL, "the store fails")

    def reidentified(self, hello: wire.Hello, now: float) -> None:
        """This replica goes on as ``hello.writer``. Load its documents anew; `restore` each.

        All connections are closed, to be made anew under the new name.
        """
        self._now = now
        self.former.add(self.hello.writer)
        self.hello = hello
        self._is_reidentifying = False
        self.own_acked.clear()
        self._uncommitted.clear()
        self._outgoing.clear()
        self._effects = [e for e in self._effects if not isinstance(e, (Persist, SaveSnapshot))]
        self._fingerprint = 0
        for ledger in self._ledgers.values():
            ledger.committed, ledger.fingerprint = Version(), 0
        # The store synced what it kept, and what was told may not be among it.
        self._synced = self._persisted
        self._quorum.reset()
        self.mesh.rename(hello)
        self.presence.rename(hello.writer)
        for link in list(self._links.values()):
            self._hang_up(link, wire.ByeCode.NORMAL, "new writer")

    # Time

    def tick(self, now: float) -> None:
        """Do what is due at *now*."""
        self._note_sleep(now)
        self._now = now
        if self._flush_at is not None and self._flush_at <= now:
            self._flush_at = None
            # What is named is not to be asked for if it comes anyway.
            self._spread()
            self._flush()
        if self._want_at is not None and self._want_at <= now:
            self._ask()
            self._want_at = min((w.due for w in self._missing.values()), default=None)
        if self._downloads.check_at is not None and self._downloads.check_at <= now:
            self._downloads.check(now)
        if self._tidy_at is not None and self._tidy_at <= now:
            self._tidy()
        if self._silence_at <= now:
            self._end_silent()
        self.mesh.tick(now)
        self._ask_questions()
        self._tick_presence()
        if self._adopt_at <= now:
            self._quorum.expire(now)
            if self._quorum:
                self._quorum.progressed(None, self._persisted, self._synced)
            self._history.append((now, self._commits))
            self._adopt_at = now + self.config.heartbeat
            self._adopt()

    def _note_sleep(self, now: float) -> None:
        """If nothing was done here for long, it was this process that slept, not the others."""
        if now - self._now > self.config.heartbeat:
            late = now - max(self._now, self.next_deadline())
            if late > self.config.heartbeat:
                self.mesh.slept(late)

    def _end_silent(self) -> None:
        """Give up the connections on which nothing came for too long."""
        timeout = self.config.link_timeout
        for link in list(self._links.values()):
            if link.heard + timeout <= self._now and not link.is_closing:
                self._hang_up(link, wire.ByeCode.NORMAL, "nothing heard for too long")
                self.mesh.silent(link, self._now)
        heard = [link.heard for link in self._links.values() if not link.is_closing]
        self._silence_at = min(heard, default=self._now) + timeout

    def unadopted(self) -> list[tuple[Document, int]]:
        """Lanes of own former writers that nobody looks after."""
        found = []
        if self.former:
            for document in map(self.documents.find, self._ledgers):
                if document is not None:
                    lanes = document.lanes
                    waiting = self.former.intersection(lanes.lanes).difference(lanes.tended)
                    found += [(document, writer) for writer in sorted(waiting)]
        return found

    def _adopt(self) -> None:
        """Look after the lanes of former writers of whom no peer has more than we have (L6)."""
        waiting = self.unadopted()
        if self._is_between_loans or not waiting or not self.peers or not self.is_synced():
            return
        for document, writer in waiting:
            if self._has_all_of(writer):
                document.adopt(writer)
                self._note_tidying(document)

    def _note_tidying(self, document: Document) -> None:
        ledger = self._ledger(document.name)
        if document.needs_tidying and ledger.tidy_at is None:
            ledger.tidy_at = self._now + self.config.tidy_delay * (0.5 + self._rng.random())
            if self._tidy_at is None or ledger.tidy_at < self._tidy_at:
                self._tidy_at = ledger.tidy_at

    def _tidy(self) -> None:
        if self._is_between_loans:
            self._tidy_at = self._now + self.config.heartbeat
            return
        self._tidy_at = None
        for name, ledger in self._ledgers.items():
            if ledger.tidy_at is None:
                continue
            if ledger.tidy_at <= self._now:
                ledger.tidy_at = None
                document = self.documents.find(name)
                if document is not None and document.needs_tidying:
                    self.documents.seal_tidying(document)
                    self._note_tidying(document)
            if ledger.tidy_at is not None and (
                self._tidy_at is None or ledger.tidy_at < self._tidy_at
            ):
                self._tidy_at = ledger.tidy_at

    # Output

    def effects(self) -> list[Effect]:
        """Take what is to be done, in order."""
        if self._outgoing and self._spread_at <= self._now:
            self._spread()
        mesh = self.mesh
        if mesh.pruned:
            for link in mesh.pruned:
                self._hang_up(link, wire.ByeCode.PRUNED, "more links than needed")
            mesh.pruned = []
        if mesh.dials:
            self._effects.extend(Dial(url) for url in mesh.dials)
            mesh.dials = []
        effects, self._effects = self._effects, []
        if self._unsent:
            # First: all of it was committed, or is others' and may be lost.
            unsent, self._unsent = self._unsent, {}
            effects[:0] = map(Transmit, unsent)
        return effects

    def _send(self, peer: int, frame: wire.Frame) -> None:
        if (link := self._links.get(peer)) is not None:
            self._push(link, wire.encode_frame(frame), lane_of(frame))

    def _push(self, link: Link, frame: bytes, lane: Lane) -> None:
        if not link.is_closing and not self._is_reidentifying:
            self._outboxes.push(link, frame, lane)
            self._unsent[link.peer] = None

    def _ledger(self, name: str) -> _Ledger:
        ledger = self._ledgers.get(name)
        if ledger is None:
            if len(self._ledgers) >= DOCUMENTS_MAX:
                raise ProtocolError(f"more than {DOCUMENTS_MAX} documents")
            ledger = self._ledgers[name] = _Ledger(_salt(name))
        return ledger

    def _arm_flush(self) -> None:
        if self._flush_at is None:
            is_small = self.mesh.members.count <= self.config.mesh_max
            config = self.config
            self._flush_at = self._now + (config.have_delay if is_small else config.have_delay_max)

    def _arm_want(self, due: float | None = None) -> None:
        if due is None:
            due = min((w.due for w in self._missing.values()), default=None)
        if due is not None and (self._want_at is None or due < self._want_at):
            self._want_at = due


def _gaps(writer: int, first: int, last: int, known: list[int]) -> list[tuple[int, int, int]]:
    """The parts of *first* to *last* that are not in *known*, which is sorted."""
    gaps = []
    for seq in known:
        if seq > last:
            break
        if first < seq:
            gaps.append((writer, first, seq - 1))
        first = max(first, seq + 1)
    if first <= last:
        gaps.append((writer, first, last))
    return gaps


def _bye_code(number: int) -> wire.ByeCode:
    try:
        return wire.ByeCode(number)
    except ValueError:
        return wire.ByeCode.NORMAL


def _split(changes: Sequence[bytes]) -> list[list[bytes]]:
    """Cut a run of changes into frames of a size that does not delay what comes after it."""
    frames: list[list[bytes]] = [[]]
    size = 0
    for data in changes:
        if frames[-1] and (
            size + len(data) > CHANGES_FRAME_BYTES or len(frames[-1]) >= wire.CHANGES_MAX
        ):
            frames.append([])
            size = 0
        frames[-1].append(data)
        size += len(data)
    return frames


def _encode_changes(changes: Sequence[bytes]) -> list[bytes]:
    return [wire.encode_frame(wire.Changes(tuple(part))) for part in _split(changes)]


def _salt(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
