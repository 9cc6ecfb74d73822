"""
The sync core: what to say to whom, and when. Sans-I/O.

One state machine serves agent, relay and simulator. The shell feeds it (`peer_up`, `receive`,
`local_changes`, `committed`, `tick`, ...) with the time as an argument, then takes `effects()` in
order, carries them out, and calls `tick` at `next_deadline()`. Nothing here knows a clock, a
socket or a disk.

How it works. A change is *delivered* to its document once everything it builds on is there (L5 of
`lanes`); until then it waits in `pending`, in memory, bounded. A delivered change is persisted and
sent on along the eager links of the `mesh` (`outgoing`). A *local* change leaves only after it was
committed (`ledger`). HAVE tells a peer what is committed here (`haves`). What a HAVE shows to be
missing, and does not come by itself, is asked for with WANT (`wants`). It is answered from the log,
and below the log's floor by a snapshot at exactly the delivered version (`serving`), which is
joined, never put in place of what is there.

Every frame may be lost: HAVE heals it. Heartbeats carry a fingerprint of all that is committed;
three that differ in a row make a full HAVE, so the protocol heals also what a bug broke
("self-stabilising": Dijkstra 1974). The rules kept here and in the parts that `Sync` owns, asserted
and checked by simulation:

S1  A local change is committed before its first byte leaves (journal before send).
S2  HAVE names only what is committed.
S3  A snapshot holds exactly its version, and no local change that is not committed.
S4  floor <= version, and every change in (floor, version] can be had from the log.
S5  Each change is delivered once, after all it builds on.
S6  What waits is bounded: pending changes, downloads, cached snapshots, each peer's share.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from crdtstate import wire
from crdtstate.authors import Authors, Unsigned
from crdtstate.certificates import Certificate
from crdtstate.change import ID_BYTES, PROOF_BYTES, Change, Snapshot, decode_change
from crdtstate.clock import Version
from crdtstate.comparing import JOBS_MAX, Comparing
from crdtstate.config import Config
from crdtstate.document import Document, EngineFailure
from crdtstate.documents import DocumentSet
from crdtstate.errors import Forked, InvalidUpdate, ProtocolError, UnknownValidator, Unproven
from crdtstate.events import (
    CatchingUp,
    ChangeQuarantined,
    ClockSkew,
    DocumentRebuilt,
    Event,
    PeerConnected,
    PeerDisconnected,
    PeerRejected,
    PresenceChanged,
    SnapshotReceived,
    ValidatorMissing,
)
from crdtstate.haves import UNHEARD_MAX, Haves
from crdtstate.leases import Leases, Loan
from crdtstate.ledger import Ledger
from crdtstate.link import Link, Rival, takes
from crdtstate.mesh import Mesh
from crdtstate.outbox import FAIR_BYTES, Lane, Outboxes, lane_of
from crdtstate.outgoing import Outgoing
from crdtstate.pending import Pending
from crdtstate.presence import Presence
from crdtstate.quorum import ROUTES_MAX, WAITING_MAX, Question, Quorum
from crdtstate.serving import Serving
from crdtstate.transfer import CACHE_MAX, DOWNLOADS_MAX, SERVED_MAX, Downloads
from crdtstate.upkeep import Upkeep
from crdtstate.validators import is_known
from crdtstate.verdicts import SNAPSHOTS_MAX, Asked, Examine, Verdicts
from crdtstate.wants import Wants

"""The head of a change's bytes that tells it from all others."""

PROVEN_MAX = 10_000
FORKS_MAX = 1_000
"""Changes of which is remembered that they are proven; forks that a peer is asked about."""

QUARANTINE_MAX = 1000
STRIKES_MAX = 20

RIVAL_BEATS = 3
"""Heartbeats within which a process that lives answers; see `Sync._keeps`."""

DOUBT_BEATS = 3
"""Heartbeats for which it is waited for proof that an own writer has written elsewhere."""

RIVAL_DOCUMENT = "@recovery"
"""Any name: of nothing, everybody has all."""

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


class Fork(NamedTuple):
    """A writer has gone on in two ways: *change* does not fit to its change *seq* that is here.
    Find that in the store, prove it (`forks`), and tell everybody."""

    change: Change
    seq: int


class Reidentify(NamedTuple):
    """This writer's history is known elsewhere beyond ours: go on under another writer."""

    reason: str
    keeps: bool = False
    """Take nothing back: it is only said that there is another process."""


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
    | Fork
    | Examine
    | Hurry
    | Emit
)


class Aside(NamedTuple):
    """A change that is not taken in, and why; *agent* is empty if it is not known, and *stamp* then
    says when it was found."""

    id: bytes
    document: str
    writer: int
    seq: int
    agent: str
    reason: str
    stamp: int


class Sync:
    """The sync core of one replica.

    Args:
        documents: The documents; the core delivers into them.
        hello: How this replica introduces itself.
        config: Settings.
        rng: For jitter and choices between equals.
        now: The time, in seconds on any clock that does not run backwards.
        seeds: Addresses to stay connected to.
        authors: Tells whose changes these are; by default everybody who connects is believed.
    """

    def __init__(
        self,
        documents: DocumentSet,
        hello: wire.Hello,
        config: Config,
        rng: random.Random,
        now: float,
        seeds: Iterable[str] = (),
        authors: Authors | None = None,
    ) -> None:
        self.documents = documents
        self.authors: Authors = authors or Unsigned()
        self.hello = hello
        self.config = config
        self._rng = rng
        self._now = now
        self._ledger = Ledger()
        self._links: dict[int, Link] = {}
        self._seeds = tuple(seeds)
        self.mesh = self._make_mesh(now)
        self._effects: list[Effect] = []
        self._outboxes: Outboxes[Link] = Outboxes(config, self._cut_off)
        # For whom something new waits, in order.
        self._unsent: dict[int, None] = {}
        self._haves = Haves(self._links, self._ledger, config, self._push, self._ids)
        self._outgoing = Outgoing(self._links, self._push)
        self._downloads = Downloads(self._send)
        self._wants = Wants(config, rng, self._downloads, self._version, self._send)
        self._pending = Pending(config, self._wants)
        # Whether the shell carries out `Examine`; without, changes of native documents are taken
        # in as they come.
        self.examines = False
        self._verdicts = Verdicts(lambda examine: self._effects.append(examine))
        self._serving = Serving(
            documents, self._ledger, config, rng, self._takes, self.authors.may_hand, self._send
        )
        self._upkeep = Upkeep(documents, self._ledger, config, rng)
        # Changes that the engine failed on; never tried again.
        # By checksum, not by dot: else one forged change would keep the true one out for ever.
        self._quarantine: OrderedDict[bytes, None] = OrderedDict()
        # Those among them that pycrdt does not survive, by id: they may be right.
        self._aside: OrderedDict[bytes, Aside] = OrderedDict()
        # Changes that were found to be their writers', so as not to look twice; the newest.
        self._proven: OrderedDict[bytes, None] = OrderedDict()
        # Changes that wait in `pending` for a validator; and which, by document, are unknown here.
        self._unjudged: list[Change] = []
        self._unknown: dict[tuple[str, str], None] = {}
        # Documents to rebuild, and why.
        self._broken: dict[str, str] = {}
        self._is_reidentifying = False
        # Documents in which a writer was closed, to be saved.
        self._closed_in: dict[str, None] = {}
        # Somebody has said that there is a copy of this replica.
        self._was_told = False
        self._quorum = Quorum(
            hello.agent,
            hello.is_durable,
            self.committed_version,
            self._send,
            lambda: self._effects.append(Hurry()),
            self.authors.prove_answer,
            self.authors.is_answer,
        )
        self.presence = Presence(hello.writer, hello.agent, documents.wall_ms())
        # Of relays: the writers they lend; and what this replica borrowed.
        self.leases = Leases(rng) if hello.role == "relay" else None
        self._loan = Loan()
        self.comparing = Comparing(
            documents,
            self._links,
            config,
            # Chance of its own: without comparisons, everything is as it would be.
            random.Random(f"comparing {hello.session}"),
            self._takes,
            self._send,
            lambda event: self._effects.append(Emit(event)),
            now,
        )
        # Document -> own seq that a peer acknowledged after it got it from here.
        self.own_acked: dict[str, int] = {}
        # When a connection may have been silent for too long, at the earliest; and when to look
        # after what is done with each heartbeat.
        self._silence_at = now + config.link_timeout
        self._adopt_at = now + config.heartbeat

    # Looking

    @property
    def peers(self) -> list[Link]:
        """The connections whose other side is known."""
        return [link for link in self._links.values() if link.is_member]

    def committed_version(self, document: str) -> Version:
        """What of *document* is committed here."""
        return self._ledger.committed(document)

    def floor(self, document: str) -> Version:
        """Up to where the log of *document* is forgotten."""
        return self._ledger.floor(document)

    def lag(self, peer: int) -> int:
        """How many changes that are committed here the peer has not acknowledged."""
        return self._ledger.lag(self._links[peer])

    def lag_seconds(self, peer: int, now: float) -> float:
        """For how long, about, changes that are committed here have not been acknowledged."""
        return self._ledger.lag_seconds(self._links[peer], now)

    @property
    def copies(self) -> int:
        """How many changes were sent, own ones and others', each counted for every peer."""
        return self._outgoing.copies + self._serving.copies

    def missing_count(self) -> int:
        """How many changes peers have announced that are not delivered here."""
        return self._wants.count()

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
        yield "pending bytes", self._pending.size_bytes, config.pending_bytes
        yield "snapshots to examine", self._verdicts.snapshots, SNAPSHOTS_MAX
        yield "places waited for", self._pending.awaited, config.pending_changes
        uploads = self._serving.uploads
        yield "cached snapshots", len(uploads), CACHE_MAX
        yield "uploads", uploads.served, max(SERVED_MAX, len(self._links))
        yield "downloads", self._downloads.active, DOWNLOADS_MAX
        yield "comparisons", len(self.comparing), 2 * JOBS_MAX
        yield "offers", len(self._downloads), len(self._ledger.pages) + UNHEARD_MAX
        share = self._serving.share_bytes
        for link in self._links.values():
            yield "outbox", link.outbox.size_bytes, config.outbox_bytes + share
        total = config.outbox_bytes_total + len(self._links) * (FAIR_BYTES + share)
        yield "outboxes", self._outboxes.size_bytes, total
        yield "quarantined changes", len(self._quarantine), QUARANTINE_MAX

    @property
    def has_quarantine(self) -> bool:
        """Whether the engine failed on a change, which is therefore lacking."""
        return bool(self._quarantine or self._aside)

    def quarantined(self) -> list[Aside]:
        """The changes that pycrdt does not survive, oldest first."""
        return list(self._aside.values())

    @property
    def persisted(self) -> int:
        """The number of the newest `Persist` or `SaveSnapshot`."""
        return self._ledger.persisted

    @property
    def committed_number(self) -> int:
        """Up to which of these numbers everything is committed."""
        return self._ledger.committed_number

    @property
    def former(self) -> set[int]:
        """Writers that this replica wrote as in earlier sessions."""
        return self._upkeep.former

    def is_synced(self) -> bool:
        """Whether every connected peer has committed what we have, and we what they have."""
        if not self._ledger.is_settled or self._broken:
            return False
        if any(link.hello is None and link.dialled for link in self._links.values()):
            return False
        for link in self.peers:
            if not link.is_greeted:
                return False
            for name in self._ledger.pages.keys() | link.acked.keys():
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
            self._haves.flush_at,
            self._wants.ask_at,
            self._downloads.check_at,
            self._upkeep.tidy_at,
            self._quorum.next_deadline(),
            self.presence.next_deadline(),
            self.comparing.next_deadline(),
            self._outgoing.next_deadline(),
        ):
            if at is not None and at < soonest:
                soonest = at
        return soonest

    # Starting

    def restore(self, document: str, version: Version, floor: Version, log_bytes: int = 0) -> None:
        """Take note of a document that was loaded from the store at *version*; *log_bytes* of
        its changes are not in the stored snapshot."""
        page = self._ledger.page(document)
        page.log_bytes = log_bytes
        self._commit(document, version)
        page.floor = floor.copy()
        if self.hello.writer in version:
            self._outgoing.left.add(document)
        if (found := self.documents.find(document)) is not None:
            self._upkeep.note(found, self._now)

    def keep(self, document: str, now: float) -> None:
        """A document has more than the store, from a checkpoint: let the store keep it."""
        self._now = now
        found = self.documents.find(document)
        assert found is not None, f"{document!r} is not here"
        self.comparing.forget(document)
        self._save(found)
        self._upkeep.note(found, now)

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

    def peer_up(
        self, peer: int, now: float, *, url: str | None, certificate: Certificate | None = None
    ) -> None:
        """A connection stands; *peer* is any new number for it, *url* what a `Dial` named,
        *certificate* what the other side has proved to have."""
        self._now = now
        self._links[peer] = Link(peer, url, now, now, certificate=certificate)
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
        self._serving.uploads.peer_down(peer)
        self._downloads.peer_down(peer)
        self.comparing.peer_down(peer)
        self.mesh.gone(link, now)

    def leave(self, now: float) -> None:
        """Say goodbye to everybody: this replica closes. What follows is carried out as ever."""
        self._now = now
        self._outgoing.spread(self.mesh, now)
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
            self._haves.arm(self.mesh, self._now)
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
        if self._loan.was_given_back:
            # Somebody else writes under this writer by now. The shell refuses writes before this.
            return
        for change in changes:
            assert change.writer == self.hello.writer, f"{change!r} is of another writer"
            self._persist(change, change)
            if (document := self.documents.find(change.document)) is not None:
                self._upkeep.note(document, self._now)

    def take_guest(self, change: Change, now: float) -> None:
        """Bring in what this process made for a guest, under a writer that is not this replica's
        own: it is checked and delivered as if a peer had sent it. It must be ready."""
        self._now = now
        document = self._find_or_make(change.document, change.shared)
        assert document.is_ready(change), f"{change!r} is not ready"
        self._deliver(None, document, change)

    def committed(self, number: int, now: float) -> None:
        """Everything persisted up to *number* is committed."""
        self._now = now
        touched: set[str] = set()
        for name, version, own in self._ledger.settle(number):
            self._commit(name, version)
            touched.add(name)
            if own is not None:
                self._outgoing.add(own, None)
        for name in sorted(touched):
            self._serving.offer(name, now)
            self._maybe_compact(name)
        if self._quorum:
            self._quorum.progressed(touched, self._ledger.persisted, self._ledger.synced)
        if self._broken:
            self._rebuild_broken()

    def synced(self, number: int, now: float) -> None:
        """Everything persisted up to *number* is synced: a power cut does not take it."""
        if number > self._ledger.synced:
            self._now, self._ledger.synced = now, number
            if self._quorum:
                self._quorum.progressed(None, self._ledger.persisted, number)

    def _persist(self, change: Change, own: Change | None) -> None:
        number = self._ledger.enter(change.document, change.dot, own)
        self._effects.append(Persist(number, change))
        self._ledger.open(change.document).log_bytes += len(change.data)

    def _commit(self, name: str, version: Mapping[int, int]) -> None:
        """Count *version* as committed, and tell peers soon (S2)."""
        self._haves.note(name, self._ledger.commit(name, version), self.mesh, self._now)

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
                # Where changes are signed, two processes are found out by what they write, and
                # nobody can make a member change its writer by what it says of it.
                is_told = self.mesh.members.has_rival and not self.authors.have_cards
                if is_told and not self._loan.is_begun:
                    self._reidentify("another process writes as the same writer: a copied store")
            case wire.Roll():
                self.mesh.on_roll(link, frame)
            case wire.Ask():
                persisted, synced = self._ledger.persisted, self._ledger.synced
                if self._quorum.on_ask(link, frame, self._now, persisted, synced):
                    self._pass_on(frame, link, frozenset(frame.names))
            case wire.Answer():
                self._on_answer(link, frame)
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
            case wire.Compare():
                self.comparing.on_compare(link, frame, self._now)
            case wire.Compared():
                self.comparing.on_compared(link, frame, self._now)
            case wire.Digests():
                self.comparing.on_digests(link, frame, self._now)
            case wire.Diverged():
                self.comparing.on_diverged(link, frame, self._now)
            case wire.Offer():
                self._on_offer(link, frame)
            case wire.Get():
                if frame.document in self._ledger.pages:
                    self._outgoing.left.add(frame.document)
                self._serving.on_get(link, frame, self._now)
            case wire.Chunk():
                self._on_chunk(link, frame)
            case wire.Busy():
                later = self._now + frame.retry_after_ms / 1000
                self._wants.put_off(frame.document, later)
            case wire.Bye():
                link.is_closing = True
                code = link.bye = _bye_code(frame.code)
                if code is wire.ByeCode.SAME_WRITER and not self._loan.is_begun:
                    self._on_same_writer(link)
                self._effects.append(HangUp(link.peer, code, f"they said: {frame.reason}"))

    def _on_same_writer(self, link: Link) -> None:
        """A peer says that another process writes as this writer."""
        reason = f"{link.agent} hears two processes: a copied store"
        if not self.authors.have_cards:
            self._reidentify(reason)
        elif not self._was_told:
            # Anybody may say so. It is believed once, and nothing is written again for it, which
            # would count twice what has got elsewhere. If it is so, that is proven later (`forks`).
            self._was_told = True
            self._reidentify(reason, keeps=True)

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
        if link.certificate is not None and not self.authors.is_right(hello, link.certificate):
            reason = f"{hello.agent!r} is not who its certificate says, {link.certificate.agent!r}"
            self._effects.append(Emit(PeerRejected(link.certificate.agent, reason)))
            self._hang_up(link, wire.ByeCode.PROTOCOL, reason)
            return
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
                if hello.session != other.hello.session and self._keeps(other, hello.session):
                    if other.rival is not None and other.rival.is_answered:
                        reason = "two processes write as one writer"
                        self._settle(other)
                        self._hang_up(other, wire.ByeCode.SAME_WRITER, reason)
                        self._hang_up(link, wire.ByeCode.SAME_WRITER, reason)
                    else:
                        reason = "there is another connection, perhaps of a former life"
                        self._hang_up(link, wire.ByeCode.DUPLICATE, reason)
                    return
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
        self._haves.tell_all(link, Lane.CONTROL)
        self.mesh.met(link, self._now)
        for presence in self.presence.all(self._now):
            self._send(link.peer, presence)

    def _is_full(self, hello: wire.Hello) -> bool:
        """Whether this replica has all the connections it can take."""
        peers = self.peers
        if self.hello.role == "agent" and hello.address is None:
            return sum(link.is_leaf for link in peers) >= self.config.leaves_max
        return len(peers) >= self.config.links_max

    def _keeps(self, old: Link, session: int) -> bool:
        """Whether a link of a writer stays although another *session* of it says hello. Either
        the old process died without a word; or both live, and one is a copy. So the old one is
        asked something, and the new one has to come again, until it is known which."""
        patience = RIVAL_BEATS * self.config.heartbeat
        if self._now - old.heard > patience:
            return False
        if old.rival is None or old.rival.session != session:
            nonce = self._rng.getrandbits(64)
            old.rival = Rival(session, self._now, nonce)
            self._send(old.peer, wire.Ask(nonce, 1, (old.agent,), RIVAL_DOCUMENT, Version()))
        return old.rival.is_answered or self._now - old.rival.since < patience

    def _settle(self, link: Link) -> None:
        """Tell a peer that has to go on as another writer which of its changes are here: it writes
        the others again, and a counter would count those twice."""
        assert link.hello is not None
        writer = link.hello.writer
        for name, version in self.documents.versions():
            seq = version.get(writer, 0)
            if seq and link.takes(name):
                # Delivered is enough. If a crash takes it, it is asked for under its old dot.
                frame = wire.encode_frame(wire.Have(name, Version({writer: seq}), False))
                # Not later than the Bye.
                self._push(link, frame, Lane.CONTROL)

    def _on_answer(self, link: Link, frame: wire.Answer) -> None:
        if link.rival is not None and link.rival.nonce == frame.nonce:
            # What was on its way from a process that died is no answer to what came later.
            link.rival = link.rival._replace(is_answered=True)
        self._quorum.on_answer(frame)

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
        for name in sorted(self._wants.answered(link.peer, asked, frame.more, self._now)):
            # How far catching up is, if it takes more than one answer.
            progress = self._wants.progress(name, len(frame.changes), frame.more)
            if progress is not None:
                self._effects.append(Emit(CatchingUp(name, link.agent, *progress, "changes")))

    def _take(self, link: Link, change: Change) -> None:
        name, writer, seq = key = (change.document, change.writer, change.seq)
        if not self._takes(name):
            return
        if self._haves.has_room(link, name, self._now):
            known = link.known.setdefault(name, Version())
            if known.get(writer, 0) == seq - 1:
                known[writer] = seq
        at = self._version(name).get(writer, 0)
        if seq <= at or key in self._pending:
            if writer == self.hello.writer and self._is_unheard(name):
                if self._is_proven(link, change):
                    self._reidentify(f"{link.agent} has changes of this writer in {name!r}")
            elif seq == at:
                self._compare(change)
            return
        if writer == self.hello.writer and not self._loan.is_earlier(name, seq):
            if not self._is_proven(link, change):
                return
            self._reidentify(f"{link.agent} has change {seq} of this writer in {name!r}")
            return
        if self._quarantine and _key(change) in self._quarantine or change.id in self._aside:
            return
        try:
            is_proven = self._prove(change)
        except Unproven as exc:
            self._set_aside(change)
            self._strike(link, str(exc))
            return
        if not is_proven and self.documents.find(name) is None:
            # Nobody makes a document, and says of which type it is, with what nothing proves. It is
            # asked for again, once what tells who its writer is has come.
            return
        document = self._find_or_make(name, change.shared)
        if document.is_broken:
            self._wants.want(name, writer, seq, self._now + self.config.want_retry)
        elif document.is_ready(change):
            self._deliver(link, document, change)
        elif self._verdicts.is_ready(document, change):
            self._examine(link, document, change)
        else:
            self._pending.park(document, change, link.peer, self._now)

    def _is_proven(self, link: Link, change: Change) -> bool:
        try:
            self._prove(change, is_due=True)
        except Unproven as exc:
            self._strike(link, str(exc))
            return False
        return True

    def _prove(self, change: Change, is_due: bool = False) -> bool:
        """Check that a change is its writer's, as soon as it is known who that is: at the latest
        when it *is due* to be delivered. Returns whether it was checked; raises Unproven."""
        if not self.authors.are_checked:
            return True
        found = self.documents.find(change.document)
        card = found.cards.get(change.writer, b"") if found is not None else b""
        if not (card or change.card or is_due) and self.authors.have_cards:
            return False
        key = _key(change)
        if key not in self._proven:
            self.authors.check(change, card)
            self._proven[key] = None
            if len(self._proven) > PROVEN_MAX:
                self._proven.popitem(last=False)
        return True

    def _find_or_make(self, name: str, shared: bool) -> Document:
        found = self.documents.find(name)
        if found is None:
            self._ledger.page(name)
            found = self.documents.find_or_make(name, shared)
        return found

    def _deliver(self, link: Link | None, document: Document, change: Change) -> None:
        """Deliver a ready change and all that waited for it; in native documents, have it examined
        first."""
        if document.shared and self.examines:
            self._examine(link, document, change)
        else:
            self._deliver_now(link, document, change)

    def _deliver_now(self, link: Link | None, document: Document, change: Change) -> None:
        ready = [(change, link)]
        while ready:
            change, link = ready.pop()
            if document.is_broken:
                self._wants.want(change.document, change.writer, change.seq, self._now)
                continue
            if not self._apply(link, document, change):
                continue
            for place in self._pending.delivered(change):
                parked = self._pending.retry(document, place, self._now)
                if parked is not None and document.shared and self.examines:
                    self._examine(self._links.get(parked.peer), document, parked.change)
                elif parked is not None:
                    ready.append((parked.change, self._links.get(parked.peer)))

    def _examine(self, link: Link | None, document: Document, change: Change) -> None:
        """Have a change examined, which waits for the verdict; see `verdicts`."""
        peer = link.peer if link is not None else 0
        if self._pending.hold(change, peer, self._now):
            self._verdicts.ask(document, Asked(change.document, change, peer))

    def examined(self, number: int, fault: str | None, now: float) -> None:
        """What an `Examine` asked: *fault* is what is wrong, None if nothing is. If something is,
        all other questions about that document are to be forgotten; they are asked again."""
        self._now = now
        asked = self._verdicts.answer(number)
        document = self.documents.find(asked.document) if asked is not None else None
        if asked is None or document is None:
            return
        link, item = self._links.get(asked.peer), asked.item
        is_here = isinstance(item, Snapshot) or self._pending.release(item)
        if fault is not None:
            if isinstance(item, Change):
                self._quarantine_change(item, fault)
            if link is not None:
                self._strike(link, f"{document.name!r}: {fault}")
            self._ask_anew(document)
        elif isinstance(item, Snapshot):
            self._take_examined(document, asked, item)
        elif is_here and document.is_broken:
            due = self._now + self.config.want_retry
            self._wants.want(item.document, item.writer, item.seq, due)
        elif is_here and document.is_ready(item):
            self._deliver_now(link, document, item)
        elif is_here and not document.version.covers(item.dot):
            self._pending.park(document, item, asked.peer, self._now)

    def _ask_anew(self, document: Document) -> None:
        """Something was refused. What else was asked about may build on it."""
        for asked in self._verdicts.forget(document.name):
            item = asked.item
            # A snapshot comes again.
            if isinstance(item, Change) and self._pending.release(item):
                if document.is_ready(item) or self._verdicts.is_ready(document, item):
                    self._examine(self._links.get(asked.peer), document, item)
                else:
                    self._pending.park(document, item, asked.peer, self._now)

    def _take_examined(self, document: Document, asked: Asked, snapshot: Snapshot) -> None:
        try:
            if not document.is_broken:
                self._take_in(document, snapshot, asked.agent, asked.size)
        except ProtocolError as exc:
            if (link := self._links.get(asked.peer)) is not None:
                self._strike(link, str(exc))

    def _apply(self, link: Link | None, document: Document, change: Change) -> bool:
        try:
            self._prove(change, is_due=True)
            paths = document.apply(change)
        except Forked:
            self._set_aside(change)
            self._effects.append(Fork(change, change.seq - 1))
            return False
        except InvalidUpdate as exc:
            self._set_aside(change)
            if link is not None:
                self._strike(link, f"{change!r}: {exc}")
            return False
        except EngineFailure as exc:
            self._quarantine_change(change, str(exc))
            self._rebuild(document.name, str(exc))
            return False
        except UnknownValidator as exc:
            self._await_validator(link, change, exc)
            return False
        if not self.documents.observe(change.stamp):
            ahead = (change.stamp >> 16) / 1000 - self.documents.wall_ms() / 1000
            self._effects.append(Emit(ClockSkew(change.origin.agent, ahead)))
        self._persist(change, None)
        for writer, seq in change.deps:
            if writer == self.hello.writer:
                # Who wrote it has ours, so it can no more be taken back.
                self.own_acked[document.name] = max(seq, self.own_acked.get(document.name, 0))
        self._outgoing.add(change, link)
        self._effects.append(Delivered(document, change, paths, change.origin.agent))
        self._upkeep.note(document, self._now)
        return True

    def _await_validator(self, link: Link | None, change: Change, exc: UnknownValidator) -> None:
        """Nobody can tell here whether a document admits a change: keep it, and what builds on it,
        until somebody can, or a snapshot says so. To take it in unjudged could make this replica
        read something else than all others."""
        if self._pending.hold(change, link.peer if link is not None else 0, self._now):
            self._unjudged.append(change)
        if (exc.document, exc.name) not in self._unknown:
            self._unknown[exc.document, exc.name] = None
            self._effects.append(Emit(ValidatorMissing(exc.document, exc.name, str(exc))))

    def _judge_again(self) -> None:
        """Try again what waits for validators that are registered by now."""
        found = [key for key in self._unknown if is_known(key[1])]
        for key in found:
            del self._unknown[key]
        if not found:
            return
        waiting, self._unjudged = self._unjudged, []
        for change in waiting:
            document = self.documents.find(change.document)
            if self._pending.release(change) and document is not None:
                if document.is_broken or not document.is_ready(change):
                    self._wants.want(change.document, change.writer, change.seq, self._now)
                else:
                    self._deliver(None, document, change)

    def shown(self, document: Document, now: float) -> None:
        """What is hidden of a document changed: there may be something to tidy."""
        self._now = now
        self._upkeep.note(document, now)

    def _quarantine_change(self, change: Change, reason: str) -> None:
        who = (change.document, change.writer, change.seq, change.origin.agent)
        self.quarantine(Aside(change.id, *who, reason[:500], change.stamp))
        self._effects.append(Emit(ChangeQuarantined(*who, reason[:500])))

    def quarantine(self, aside: Aside) -> None:
        """Do not take in this change, until it is released: pycrdt does not survive it."""
        self._aside[aside.id] = aside
        if len(self._aside) > QUARANTINE_MAX:
            self._aside.popitem(last=False)

    def _not_wanted(self) -> Mapping[tuple[str, int], Iterable[int]]:
        """The changes that are not to be asked for: they wait here, or are quarantined."""
        found: Mapping[tuple[str, int], Iterable[int]] = self._pending.seqs()
        if not self._aside:
            return found
        every = {place: set(seqs) for place, seqs in found.items()}
        for aside in self._aside.values():
            every.setdefault((aside.document, aside.writer), set()).add(aside.seq)
        return every

    def release(self, id: bytes, now: float) -> bool:
        """Take in a quarantined change after all, once it comes again; False if none was."""
        self._now = now
        aside = self._aside.pop(id, None)
        if aside is not None:
            self._wants.want(aside.document, aside.writer, aside.seq, now)
        return aside is not None

    def _set_aside(self, change: Change) -> None:
        """Remember a change that cannot be taken in, so as not to try it again and again."""
        self._quarantine[_key(change)] = None
        if len(self._quarantine) > QUARANTINE_MAX:
            self._quarantine.popitem(last=False)

    def _rebuild(self, name: str, reason: str) -> None:
        self._broken[name] = reason
        self._rebuild_broken()

    def _rebuild_broken(self) -> None:
        """Have broken documents rebuilt, once the store has all that was delivered to them."""
        busy = self._ledger.unsettled()
        for name in [name for name in self._broken if name not in busy]:
            self._effects.append(Rebuild(name))
            self._effects.append(Emit(DocumentRebuilt(name, self._broken.pop(name))))

    def rebuilt(self, document: str, now: float) -> None:
        """The document was loaded from the store again."""
        self._now = now
        self.comparing.forget(document)
        self._wants.hurry(document, now)
        found = self.documents.find(document)
        assert found is not None, f"{document!r} was rebuilt and is not there"
        self._retry_pending(found)
        self._serving.offer(document, now)
        self._upkeep.note(found, self._now)

    # HAVE and WANT

    def _on_have(self, link: Link, frame: wire.Have) -> None:
        name = frame.document
        if not self._takes(name) or not link.takes(name):
            return
        if not self._haves.has_room(link, name, self._now):
            return
        acked = link.acked.setdefault(name, Version())
        link.known.setdefault(name, Version()).merge(frame.version)
        acked.merge(frame.version)
        own = frame.version.get(self.hello.writer, 0)
        version = self._version(name)
        if frame.ids and self._has_forked(link, frame):
            return
        mine = version.get(self.hello.writer, 0)
        if own > mine and not self._loan.is_earlier(name, own):
            if self.authors.have_cards:
                # It is believed when it shows one: only this replica's own key can have made that.
                self._doubt(link, name)
                self._send(link.peer, wire.Want(name, ((self.hello.writer, mine + 1, own),)))
            else:
                self._reidentify(f"{link.agent} has {own} changes of this writer in {name!r}")
                return
        if 0 < own <= mine and self._is_unheard(name):
            self._doubt(link, name)
            self._send(link.peer, wire.Want(name, ((self.hello.writer, own, own),)))
        elif 0 < own <= mine and not frame.full:
            self.own_acked[name] = max(own, self.own_acked.get(name, 0))
        due = self._now if frame.full else self._now + self.config.want_delay
        for writer, seq in frame.version.items():
            is_own = writer == self.hello.writer and not self._loan.is_earlier(name, seq)
            if seq > version.get(writer, 0) and not is_own:
                self._wants.want(name, writer, seq, due)

    def _ids(self, name: str, version: Version) -> bytes:
        """What a HAVE tells of the ids of changes. Of a writer of whom more was delivered than is
        committed it is not known."""
        document = self.documents.find(name)
        if document is None:
            return b""
        ids, here = document.ids, document.version
        size, none = wire.HAVE_ID_BYTES, bytes(wire.HAVE_ID_BYTES)
        return b"".join(
            ids[writer][:size] if here.get(writer) == seq else none
            for writer, seq in sorted(version.items())
        )

    def _has_forked(self, link: Link, frame: wire.Have) -> bool:
        """Whether a peer has another change of this writer than is here, as when a store was
        restored and written to again. If it has another one of somebody else, it is asked for
        that."""
        document = self.documents.find(frame.document)
        if document is None:
            return False
        for place, (writer, seq) in enumerate(sorted(frame.version.items())):
            theirs = frame.ids[place * wire.HAVE_ID_BYTES : (place + 1) * wire.HAVE_ID_BYTES]
            if document.version.get(writer, 0) != seq or not any(theirs):
                continue
            if document.ids[writer].startswith(theirs):
                continue
            if writer == self.hello.writer and not self.authors.have_cards:
                where = f"change {seq} of this writer in {frame.document!r}"
                self._reidentify(f"{link.agent} has another {where}")
                return True
            if writer == self.hello.writer:
                self._doubt(link, frame.document)
            if len(link.forks) < FORKS_MAX and (frame.document, writer) not in link.forks:
                link.forks.add((frame.document, writer))
                self._send(link.peer, wire.Want(frame.document, ((writer, seq, seq),)))
        return False

    def _is_unheard(self, name: str) -> bool:
        """Whether nobody can have changes of this writer from here, so that what somebody has is
        another process's, which drew the same number (`authors`)."""
        return self.authors.have_cards and name not in self._outgoing.left

    def _doubt(self, link: Link, name: str) -> None:
        """A peer says that there are other changes of this writer: send it none before that has
        been looked at. Only once, as anybody can say so."""
        link.doubted.setdefault(name, self._now + DOUBT_BEATS * self.config.heartbeat)

    def closed(self, name: str, writer: int, now: float) -> None:
        """Nothing more of a writer is taken in, in one document: it counts as delivered to the
        end (`Document.close_lane`)."""
        self._now = now
        document = self.documents.find(name)
        if document is not None:
            self._closed_in[name] = None
            if writer == self.hello.writer:
                # Its documents are loaded anew, and what is stored has to fit together.
                self._save_closed()
                self._reidentify(f"others have proof that {name!r} is written twice")

    def _save_closed(self) -> None:
        """Save the documents in which writers were closed, each once for all of them."""
        while self._closed_in:
            name, _ = self._closed_in.popitem()
            document = self.documents.find(name)
            if document is not None and not document.is_broken:
                # What comes next may build on what nobody here has: the store has to know first.
                self._save(document)
                self._retry_pending(document)

    def _compare(self, change: Change) -> None:
        """A change came whose dot is that of the newest of its writer here: are they the same?"""
        document = self.documents.find(change.document)
        if document is None or document.ids.get(change.writer) == change.id:
            return
        with suppress(Unproven):
            self._prove(change, is_due=True)
            if change.writer == self.hello.writer:
                where = f"change {change.seq} of this writer in {change.document!r}"
                self._reidentify(f"there is another {where}")
            else:
                self._effects.append(Fork(change, change.seq))

    def _on_want(self, link: Link, frame: wire.Want) -> None:
        if not link.takes(frame.document):
            raise ProtocolError(f"asks for {frame.document!r}, which it takes no part in")
        if link.doubts(frame.document, self._now):
            return
        ranges = self._serving.on_want(link, frame, self._now)
        if ranges:
            self._outgoing.left.add(frame.document)
            self._effects.append(Fetch(link.peer, frame.document, ranges))

    def snapshot_instead(self, peer: int, document: str, log_bytes: int, now: float) -> bool:
        """Of what a `Fetch` asks for the log has *log_bytes*: whether a snapshot is less. Then it
        is offered, and nothing is to be read."""
        self._now = now
        link = self._links.get(peer)
        return link is not None and self._serving.snapshot_instead(link, document, log_bytes, now)

    def fetched(self, peer: int, changes: Sequence[bytes], more: bool) -> None:
        """What a `Fetch` found, in the order of the journal; *more* if it was cut short."""
        if changes and peer in self._links:
            self._serving.send_changes(peer, changes, more)

    def _on_heartbeat(self, link: Link, frame: wire.Heartbeat) -> None:
        link.is_greeted = True
        mine = self._fingerprint_for(link)
        before = link.told
        self.mesh.on_heartbeat(link, frame, self._now)
        self._haves.compare(link, mine, frame.fingerprint, before)

    def _fingerprint_for(self, link: Link) -> int:
        """64 bits over all that is committed here and concerns a link."""
        if not link.is_partial and self.hello.documents is None:
            return self._ledger.fingerprint
        return self._ledger.fingerprint_of(
            name for name in self._ledger.pages if link.takes(name) and self._takes(name)
        )

    def _takes(self, name: str) -> bool:
        """Whether this replica takes part in a document, and may."""
        return takes(self.hello.documents, name) and self.authors.may_take(name)

    # Snapshots

    def _on_offer(self, link: Link, frame: wire.Offer) -> None:
        if not link.may_hand(frame.document):
            raise ProtocolError(f"offers a snapshot of {frame.document!r}, and may not")
        # Who is asked for more of a snapshot that it has not any more offers its newest.
        is_next = self._downloads.is_from(frame.document, link.peer)
        is_asked = self._wants.is_asked(frame.document, link.peer)
        if is_next or is_asked or link.doubts(frame.document, self._now):
            self._downloads.on_offer(link.peer, frame, self._now)

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
        self._take_snapshot(snapshot, link.agent, len(data), link.peer)

    def _take_snapshot(self, snapshot: Snapshot, agent: str, size: int, peer: int = 0) -> None:
        name = snapshot.document
        snapshot = self.authors.vouch(snapshot)
        own = snapshot.version.get(self.hello.writer, 0)
        is_known = own <= self._version(name).get(self.hello.writer, 0)
        if not is_known and not self._loan.is_earlier(name, own):
            self._reidentify(f"a snapshot of {agent} has more of this writer in {name!r}")
            return
        document = self._find_or_make(name, snapshot.shared)
        if document.is_broken:
            # What it has will be asked for again.
            return
        if document.shared and self.examines:
            if self._verdicts.snapshots < SNAPSHOTS_MAX:
                self._verdicts.ask(document, Asked(name, snapshot, peer, agent, size))
            return
        self._take_in(document, snapshot, agent, size)

    def _take_in(self, document: Document, snapshot: Snapshot, agent: str, size: int) -> None:
        name = document.name
        try:
            paths = document.join(snapshot)
        except EngineFailure as exc:
            self._rebuild(name, str(exc))
            return
        self.comparing.forget(name)
        self.documents.observe(snapshot.stamp)
        self._save(document)
        self._effects.append(Delivered(document, None, paths, agent))
        self._effects.append(Emit(SnapshotReceived(name, agent, size)))
        self._upkeep.note(document, self._now)
        self._retry_pending(document)

    def is_examining(self, name: str) -> bool:
        """Whether something of a document waits for a verdict."""
        return self._verdicts.waits(name)

    def take_in(
        self, snapshot: Snapshot | None, changes: Iterable[Change], agent: str, now: float
    ) -> None:
        """Take in what a checkpoint of *agent* has of a document, by the rules for what comes from
        peers: a snapshot, if there is one, and the changes after it in causal order. In native
        documents it waits for verdicts: see `is_examining`.

        Raises:
            InvalidUpdate: It breaks the rules, or does not follow what is here; what came before
                that is taken in.
        """
        self._now = now
        mine = self.hello.writer
        if snapshot is not None and not snapshot.version <= self._version(snapshot.document):
            self._take_snapshot(snapshot, agent, len(snapshot.state))
        for change in changes:
            name = change.document
            if snapshot is None:
                self._prove(change, is_due=True)
                document: Document | None = self._find_or_make(name, change.shared)
            else:
                document = self.documents.find(name)
            if self._is_reidentifying or document is None or document.is_broken:
                return
            if document.version.covers(change.dot):
                continue
            if change.writer == mine and not self._loan.is_earlier(name, change.seq):
                self._reidentify(f"a checkpoint of {agent} has more of this writer in {name!r}")
            elif document.is_ready(change):
                self._deliver(None, document, change)
            elif document.shared and self.examines:
                if self._verdicts.is_ready(document, change):
                    self._examine(None, document, change)
                else:
                    self._pending.park(document, change, 0, self._now)
            else:
                raise InvalidUpdate(f"{change!r} does not follow what is before it")

    def _retry_pending(self, document: Document) -> None:
        """After a jump of the version: deliver what became ready, forget what is contained."""
        for place in self._pending.jumped(document):
            parked = self._pending.retry(document, place, self._now)
            if parked is not None:
                self._deliver(self._links.get(parked.peer), document, parked.change)

    def _save(self, document: Document) -> None:
        """Let the store keep the document as it is now, as its snapshot."""
        page = self._ledger.page(document.name)
        snapshot = document.snapshot()
        data = snapshot.encode()
        number = self._ledger.enter(document.name, snapshot.version, None)
        self._effects.append(SaveSnapshot(number, document.name, snapshot.version, data))
        page.log_bytes, page.snapshot_bytes = 0, len(data)

    def _maybe_compact(self, name: str) -> None:
        """Renew the stored snapshot when the log has outgrown it. Local, at any time, without
        asking anybody: who falls below the floor gets a snapshot."""
        document = self.documents.find(name)
        if document is None or document.is_broken or not self._ledger.is_settled:
            return
        if self._ledger.has_outgrown(name, self.config.snapshot_after_bytes):
            self._save(document)

    def compacted(self, name: str, floor: Version) -> None:
        """The store has forgotten the changes up to *floor*."""
        assert floor <= self._version(name), f"S4: {name!r} forgot what was not delivered"
        self._ledger.page(name).floor = floor.copy()

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
        self._quorum.ask(question, self._ledger.persisted, self._ledger.synced)
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
                self._wants.want(document, writer, seq, now)

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
        self._loan.begin(lender, seqs, self._takes)

    def has_borrowed_all(self) -> bool:
        """Whether everything is here that was written under the borrowed writer."""
        writer = self.hello.writer
        return self._loan.has_all(lambda name: self._version(name).get(writer, 0))

    def give_back(self) -> bool:
        """Hand the borrowed writer back, if the lender has all that was written. False if not."""
        writer = self.hello.writer
        written = {n: v[writer] for n, v in self.documents.versions() if writer in v}
        returned = self._loan.give_back(writer, written, self.peers)
        if returned is None:
            return False
        lender, seqs = returned
        self._send(lender, wire.Return(writer, seqs))
        return True

    def _on_borrow(self, link: Link) -> None:
        writer, seqs = 0, {}
        if self.leases is not None:
            writer = self.leases.lend()
            seqs = self._ledger.committed_of(writer)
        self._send(link.peer, wire.Lend(writer, seqs))

    def _on_return(self, link: Link, frame: wire.Return) -> None:
        if self.leases is not None and link.writer == frame.writer:
            committed = self._ledger.committed_of(frame.writer)
            self.leases.take_back(frame.writer, frame.seqs, committed)

    # Identity

    def _reidentify(self, reason: str, *, keeps: bool = False) -> None:
        if not self._is_reidentifying:
            self._is_reidentifying = True
            self._effects.append(Reidentify(reason, keeps))
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
        self._outgoing.clear()
        self._outgoing.left.clear()
        self._effects = [e for e in self._effects if not isinstance(e, (Persist, SaveSnapshot))]
        self._ledger.reset()
        self._quorum.reset()
        self.mesh.rename(hello)
        self.presence.rename(hello.writer)
        self.comparing.reset()
        for link in list(self._links.values()):
            self._hang_up(link, wire.ByeCode.NORMAL, "new writer")

    # Time

    def tick(self, now: float) -> None:
        """Do what is due at *now*."""
        self._note_sleep(now)
        self._now = now
        if self._haves.flush_at is not None and self._haves.flush_at <= now:
            # What is named is not to be asked for if it comes anyway.
            self._outgoing.spread(self.mesh, now)
            self._haves.flush()
        if self._wants.ask_at is not None and self._wants.ask_at <= now:
            self._wants.ask(self.peers, self._not_wanted(), now)
        if self._downloads.check_at is not None and self._downloads.check_at <= now:
            self._downloads.check(now)
        if self._upkeep.tidy_at is not None and self._upkeep.tidy_at <= now:
            if self._loan.is_between:
                self._upkeep.put_off(now + self.config.heartbeat)
            else:
                self._upkeep.tidy(now)
        if self._silence_at <= now:
            self._end_silent()
        self.mesh.tick(now)
        self._ask_questions()
        self._tick_presence()
        self.comparing.tick(now)
        if self._adopt_at <= now:
            self._quorum.expire(now)
            if self._quorum:
                self._quorum.progressed(None, self._ledger.persisted, self._ledger.synced)
            self._ledger.note_time(now)
            self._adopt_at = now + self.config.heartbeat
            self._adopt()
            if self._unknown:
                self._judge_again()

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
        return self._upkeep.unadopted()

    def _adopt(self) -> None:
        """Look after the lanes of former writers of whom no peer has more than we have (L6)."""
        waiting = self._upkeep.unadopted()
        if self._loan.is_between or not waiting or not self.peers or not self.is_synced():
            return
        found = ((where, writer) for where, writer in waiting if self._has_all_of(writer))
        self._upkeep.adopt(found, self._now)

    # Output

    @property
    def is_stirred(self) -> bool:
        """Whether there is something to be done since `effects` were taken."""
        return bool(self._effects or self._unsent)

    def effects(self) -> list[Effect]:
        """Take what is to be done, in order."""
        self._save_closed()
        spread_at = self._outgoing.next_deadline()
        if spread_at is not None and spread_at <= self._now:
            self._outgoing.spread(self.mesh, self._now)
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


def _key(change: Change) -> bytes:
    """Names the bytes of a change: the scheme, its id and the proof."""
    return change.data[: 1 + ID_BYTES + PROOF_BYTES[change.data[0]]]


def _bye_code(number: int) -> wire.ByeCode:
    try:
        return wire.ByeCode(number)
    except ValueError:
        return wire.ByeCode.NORMAL
