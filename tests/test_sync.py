"""The sync core: directed scenarios of cores connected back to back, without a network or clock."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from crdtstate import Config, sync, wire
from crdtstate.change import Change, Origin, Snapshot, decode_change, encode_change
from crdtstate.clock import Dot, Version
from crdtstate.document import Document, EngineFailure
from crdtstate.documents import DocumentSet
from crdtstate.errors import InvalidUpdate
from crdtstate.events import (
    DocumentRebuilt,
    Event,
    PeerConnected,
    PeerDisconnected,
    PeerRejected,
    SnapshotReceived,
)
from crdtstate.stores import Entry, Saved
from crdtstate.stores.memory import MemoryStore
from crdtstate.sync import STRIKES_MAX, Sync
from crdtstate.transfer import DOWNLOADS_MAX, Downloads

CONFIG = Config(want_delay=0.1, want_retry=0.5, have_delay=0.01, tidy_delay=0.5)
TINY_LOG = replace(CONFIG, snapshot_after_bytes=1, log_bytes=1)
SMALL_OUTBOX = replace(CONFIG, outbox_bytes=40_000)


class FragileDocument(Document):
    """A document whose engine fails on a change when it is told to."""

    fails_on: Dot | None = None

    def _apply(self, change: Change) -> list[str]:
        if change.dot == self.fails_on:
            self.is_broken = True
            raise EngineFailure("as told")
        return super()._apply(change)


class Node(DocumentSet):
    """A core with documents and a store, and a log of all it does."""

    def __init__(
        self,
        writer: int,
        config: Config = CONFIG,
        *,
        session: int | None = None,
        store: MemoryStore | None = None,
    ) -> None:
        super().__init__(f"agent-{writer}", writer, lambda: 1_700_000_000_000)
        self.now = 0.0
        self.config = config
        self.store = store or MemoryStore()
        for item in self.store.load():
            self._load(item)
        hello = wire.Hello(1, 1, writer, writer if session is None else session, self.agent)
        self.core = Sync(self, hello, config, random.Random(writer), 0.0)
        for name, version in self.versions():
            self.core.restore(name, version, self.store.floor(name))
        # Whether the store commits at once; if not, `commit` does.
        self.commits = True
        self.persisted = 0
        self.links: dict[int, tuple[Node, int]] = {}
        self.inbox: deque[tuple[int, wire.Frame]] = deque()
        self.sent: list[tuple[int, wire.Frame]] = []
        self.events: list[Event] = []
        self.reidentified: list[str] = []
        self.rebuilds: list[str] = []
        # Peers that do not read.
        self.clogged: set[int] = set()
        # Frames for which this is true are lost on their way.
        self.loses: Callable[[wire.Frame], bool] = lambda frame: False

    def _written(self) -> None:
        self.core.local_changes((change for change, _ in self._hand_over()), self.now)

    def _make(self, name: str, shared: bool) -> Document:
        document = FragileDocument(
            name,
            writer=self._writer,
            agent=self.agent,
            clock=self._clock,
            wall=self._wall,
            on_write=self._on_write,
        )
        self._documents[name] = document
        return document

    def _load(self, item: Saved | Entry) -> None:
        document = self.find_or_make(item.document, False)
        if isinstance(item, Saved):
            document.join(Snapshot.decode(item.data))
        elif not document.version.covers((item.writer, item.seq)):
            document.apply(decode_change(item.data))

    def act(self) -> None:
        """Seal what was written, and carry out what the core says."""
        self.take_sealed()
        while effects := self.core.effects():
            for effect in effects:
                self._carry_out(effect)
            if self.commits:
                self.commit()

    def _carry_out(self, effect: sync.Effect) -> None:
        match effect:
            case sync.Transmit(peer):
                self.transmit(peer)
            case sync.Persist(number, change):
                self.store.append([Entry(change.document, change.writer, change.seq, change.data)])
                self.persisted = number
            case sync.SaveSnapshot(number, name, version, data):
                self.store.compact(Saved(name, version, data), int(self.config.log_bytes))
                self.persisted = number
                self.core.compacted(name, self.store.floor(name))
            case sync.Fetch(peer, name, ranges):
                found, more = self.store.read(name, ranges, int(self.config.answer_bytes))
                self.core.fetched(peer, found, more)
            case sync.HangUp(peer, _, reason):
                self.disconnect(peer, reason)
            case sync.Rebuild(name):
                self.rebuilds.append(name)
                self.reload(self.document(name), self._writer, self._load_one)
                self.core.rebuilt(name, self.now)
            case sync.Reidentify(reason):
                self.reidentified.append(reason)
            case sync.Emit(event):
                self.events.append(event)

    def transmit(self, peer: int) -> None:
        """Send what waits for a peer, unless that does not read."""
        while peer not in self.clogged and self.transmit_one(peer):
            pass

    def transmit_one(self, peer: int) -> bool:
        """Send a peer one message, if there is one."""
        frames = self.core.take(peer)
        if frames:
            for frame in wire.decode_message(wire.encode_message(frames)):
                self.sent.append((peer, frame))
                if peer in self.links and not self.loses(frame):
                    other, number = self.links[peer]
                    other.inbox.append((number, frame))
        return bool(frames)

    def _load_one(self, document: Document) -> None:
        for item in self.store.load():
            if item.document == document.name:
                self._load(item)

    def commit(self) -> None:
        """Let everything that was persisted be committed."""
        self.core.committed(self.persisted, self.now)

    def disconnect(self, peer: int, reason: str = "gone") -> None:
        """Take a connection away from both sides; what is under way still arrives."""
        if peer not in self.links:
            return
        other, number = self.links.pop(peer)
        self.core.peer_down(peer, self.now, reason)
        while other.inbox and any(at == number for at, _ in other.inbox):
            other.receive_one()
        if number in other.links:
            other.disconnect(number)

    def receive_one(self) -> None:
        peer, frame = self.inbox.popleft()
        self.core.receive(peer, frame, self.now)
        self.act()

    def frames(self, kind: type[wire.Frame]) -> list[wire.Frame]:
        """What of one type was sent, in order."""
        return [frame for _, frame in self.sent if isinstance(frame, kind)]

    def heard(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def copies(self) -> int:
        """How many changes were sent, each time counted."""
        return sum(len(frame.changes) for frame in self.frames(wire.Changes))


_numbers = itertools.count(1)


def connect(one: Node, two: Node) -> tuple[int, int]:
    """Connect two nodes, dialled by *one*; return their numbers for it."""
    here, there = next(_numbers), next(_numbers)
    one.links[here], two.links[there] = (two, there), (one, here)
    one.core.peer_up(here, one.now, url="memory://dialled")
    two.core.peer_up(there, two.now, url=None)
    return here, there


def mesh(nodes: list[Node]) -> None:
    for one, two in itertools.combinations(nodes, 2):
        connect(one, two)
    run(*nodes, seconds=2.5)


def exchange(*nodes: Node) -> None:
    """Deliver all frames, without time passing."""
    for node in nodes:
        node.act()
    while any(node.inbox for node in nodes):
        for node in nodes:
            while node.inbox:
                node.receive_one()


def run(*nodes: Node, seconds: float) -> None:
    """Let time pass for all, and deliver all frames at once."""
    exchange(*nodes)
    end = nodes[0].now + seconds
    while (at := min(node.core.next_deadline() for node in nodes)) <= end:
        for node in nodes:
            node.now = max(node.now, at)
            if node.core.next_deadline() <= at:
                node.core.tick(node.now)
        exchange(*nodes)
    for node in nodes:
        node.now = end


def pair(config: Config = CONFIG) -> tuple[Node, Node, int, int]:
    """Two connected nodes that have met, and their numbers for the connection."""
    one, two = Node(1, config), Node(2, config)
    here, there = connect(one, two)
    run(one, two, seconds=1.5)
    return one, two, here, there


def write(node: Node, *keys: str) -> list[Change]:
    """Write keys of the map "plan", each in a change of its own; return the changes."""
    document = node.document("main")
    before = document.version.get(node.core.hello.writer, 0)
    for key in keys:
        document.map("plan")[key] = f"{key} of {node.agent}"
        node.act()
    writer = node.core.hello.writer
    found, _ = node.store.read("main", [(writer, before + 1, before + len(keys))], 2**30)
    return [decode_change(data) for data in found]


def congest(node: Node, peer: int) -> None:
    """Let a peer read nothing until it is congested."""
    (link,) = (link for link in node.core.peers if link.peer == peer)
    node.clogged.add(peer)
    count = 0
    while not link.is_congested:
        write(node, f"old {count}")
        count += 1


def read_on(node: Node, peer: int) -> None:
    """Let it read again."""
    node.clogged.discard(peer)
    node.transmit(peer)


def is_payload(frame: wire.Frame) -> bool:
    return isinstance(frame, wire.Changes)


def keys(node: Node) -> set[str]:
    return set(node.map("plan"))


# Connections


def test_both_sides_of_a_connection_learn_who_the_other_is() -> None:
    one, two, _, _ = pair()

    assert [peer.agent for peer in one.core.peers] == ["agent-2"]
    assert one.heard(PeerConnected) == [PeerConnected("agent-2", 2, "agent")]
    assert two.heard(PeerConnected) == [PeerConnected("agent-1", 1, "agent")]


def test_a_frame_before_hello_ends_the_connection() -> None:
    one = Node(1)
    one.core.peer_up(7, 0.0, url=None)
    one.core.receive(7, wire.Have("main", Version(), True), 0.0)
    one.act()

    assert one.frames(wire.Bye) == [wire.Bye(wire.ByeCode.PROTOCOL, "a frame before Hello")]
    assert one.core.peers == []


def test_of_two_connections_between_a_pair_both_keep_the_same_one() -> None:
    one, two = Node(1), Node(2)
    connect(one, two)
    kept = connect(two, one)

    run(one, two, seconds=2)

    assert list(two.links), list(one.links) == ([kept[0]], [kept[1]])
    assert len(one.core.peers) == len(two.core.peers) == 1


def test_a_restarted_peer_replaces_the_connection_of_its_former_life() -> None:
    one, old, here, _ = pair()
    new = Node(2, session=7)
    del old.links, one.links[here]

    # It may be that both are alive: so the old one gets a few heartbeats to answer.
    connect(one, new)
    run(one, new, seconds=1)
    assert [link.peer for link in one.core.peers] == [here]
    run(one, new, seconds=1.5)
    fresh, _ = connect(one, new)
    run(one, new, seconds=1)

    assert [link.peer for link in one.core.peers] == [fresh]
    assert not one.reidentified and not new.reidentified


def test_two_that_write_as_one_writer_are_both_told_by_a_third() -> None:
    one, copied, _, _ = pair()
    one.commits = False
    copied.document("plan").counter("done").increment()
    copy = Node(2, session=7)
    for _ in range(4):
        connect(one, copy)
        run(one, copied, copy, seconds=1)
        if copied.reidentified:
            break

    assert len(copied.reidentified) == len(copy.reidentified) == 1
    assert not one.reidentified
    # What got there stays as it is. Written again as well, it would count twice.
    assert copied.core.own_acked == {"plan": 1} and copy.core.own_acked == {}


def test_a_connection_to_oneself_ends() -> None:
    one = Node(1)
    one.core.peer_up(7, 0.0, url="memory://dialled")
    one.core.receive(7, one.core.hello, 0.0)
    one.act()

    assert one.frames(wire.Bye) == [wire.Bye(wire.ByeCode.DUPLICATE, "this is myself")]
    assert one.reidentified == []


def test_a_copied_store_is_noticed_by_both() -> None:
    one, copy = Node(1), Node(1, session=7)
    connect(one, copy)

    exchange(one, copy)

    assert one.frames(wire.Bye)[0].code == wire.ByeCode.SAME_WRITER
    assert len(one.reidentified) == len(copy.reidentified) == 1


def test_a_protocol_that_only_one_side_speaks_is_refused() -> None:
    one = Node(1)
    one.core.peer_up(7, 0.0, url="memory://dialled")
    one.core.receive(7, wire.Hello(8, 9, 2, 1, "agent-2"), 0.0)
    one.act()

    (bye,) = one.frames(wire.Bye)
    assert bye == wire.Bye(wire.ByeCode.INCOMPATIBLE, "protocol 8-9, here 1-1")
    assert one.heard(PeerConnected) == []


def test_a_second_hello_is_a_strike_and_changes_nothing() -> None:
    one, two, here, _ = pair()
    one.core.receive(here, wire.Hello(1, 1, 9, 9, "impostor"), one.now)
    one.act()

    assert one.heard(PeerRejected) == [PeerRejected("agent-2", "a second Hello")]
    assert [peer.agent for peer in one.core.peers] == ["agent-2"]


def test_a_silent_peer_is_given_up_after_the_link_timeout() -> None:
    one, two, here, _ = pair()
    two.loses = lambda frame: True
    run(one, two, seconds=CONFIG.link_timeout + 2)

    assert one.core.peers == []
    assert "nothing heard for too long" in [e.reason for e in one.heard(PeerDisconnected)]


def test_who_was_asleep_itself_does_not_blame_its_peers() -> None:
    one, two, _, _ = pair()
    one.now = two.now = 100.0
    one.core.tick(one.now)
    one.act()

    assert [peer.agent for peer in one.core.peers] == ["agent-2"]
    two.core.tick(two.now)
    run(one, two, seconds=5)
    assert [peer.agent for peer in one.core.peers] == ["agent-2"]


# Changes


def test_a_full_mesh_gets_exactly_one_copy_each() -> None:
    nodes = [Node(writer) for writer in range(1, 7)]
    mesh(nodes)

    for node in nodes:
        write(node, f"key {node.agent}")
    run(*nodes, seconds=3)

    assert all(len(keys(node)) == len(nodes) for node in nodes)
    assert sum(node.copies for node in nodes) == len(nodes) * (len(nodes) - 1)


def test_a_star_forwards_through_its_middle_with_one_copy_each() -> None:
    middle, *outer = (Node(writer) for writer in range(1, 6))
    for node in outer:
        connect(middle, node)
    run(middle, *outer, seconds=2.5)

    write(outer[0], "goal")
    run(middle, *outer, seconds=3)

    assert all(keys(node) == {"goal"} for node in outer)
    assert middle.copies + outer[0].copies == 4


def test_a_local_change_leaves_only_after_it_was_committed() -> None:
    one, two, _, _ = pair()
    one.commits = False
    one.map("plan")["goal"] = "ship"
    run(one, two, seconds=2)

    assert not one.frames(wire.Changes) and not keys(two)
    one.commit()
    exchange(one, two)
    assert keys(two) == {"goal"}


def test_have_names_only_what_is_committed() -> None:
    one, two, _, _ = pair()
    two.commits = False
    write(one, "goal")
    run(one, two, seconds=2)

    assert keys(two) == {"goal"}
    assert not two.frames(wire.Have)
    two.commit()
    run(one, two, seconds=1)
    id = one.document("main").ids[1][: wire.HAVE_ID_BYTES]
    assert two.frames(wire.Have) == [wire.Have("main", Version({1: 1}), False, id)]
    assert one.core.is_synced()


def test_own_changes_leave_on_a_link_only_after_the_peer_has_told_what_it_knows() -> None:
    one, two = Node(1), Node(2)
    two.loses = lambda frame: isinstance(frame, wire.Heartbeat)
    connect(one, two)
    exchange(one, two)

    write(one, "goal")

    assert not one.frames(wire.Changes)


def test_what_was_lost_is_announced_and_asked_for() -> None:
    one, two, _, _ = pair()
    one.loses = is_payload
    write(one, "a", "b")
    one.loses = lambda frame: False
    run(one, two, seconds=2)

    assert keys(two) == {"a", "b"}
    assert two.frames(wire.Want) == [wire.Want("main", ((1, 1, 2),))]


def test_a_change_that_overtook_another_waits_for_it_and_only_that_is_asked_for() -> None:
    one, two, _, _ = pair()
    one.loses = is_payload
    write(one, "a")
    one.loses = lambda frame: False
    write(one, "b")
    exchange(one, two)

    assert keys(two) == set() and two.core.pending_count == 1
    run(one, two, seconds=1)
    assert keys(two) == {"a", "b"} and two.core.pending_count == 0
    assert two.frames(wire.Want) == [wire.Want("main", ((1, 1, 1),))]


def test_a_change_waits_for_what_its_writer_had_seen() -> None:
    one, two, three = Node(1), Node(2), Node(3)
    connect(one, two)
    late, _ = connect(one, three)
    connect(two, three)
    run(one, two, three, seconds=2.5)
    one.loses = lambda frame: is_payload(frame) and one.sent[-1][0] == late
    write(one, "cause")
    two.loses = lambda frame: is_payload(frame) and b"cause" in frame.changes[0]
    exchange(one, two, three)
    write(two, "effect")
    exchange(one, two, three)

    assert keys(two) == {"cause", "effect"}
    assert keys(three) == set()
    one.loses = two.loses = lambda frame: False
    run(one, two, three, seconds=2)
    assert keys(three) == {"cause", "effect"}


def test_pending_is_bounded_and_what_did_not_fit_is_asked_for_again() -> None:
    one, two, _, _ = pair(replace(CONFIG, pending_changes=3))
    one.loses = is_payload
    write(one, "first")
    one.loses = lambda frame: False
    write(one, *"abcdefgh")
    exchange(one, two)

    assert two.core.pending_count == 3
    assert not keys(two)
    run(one, two, seconds=5)
    assert keys(two) == {"first", *"abcdefgh"}
    assert two.core.pending_count == 0 and two.core.missing_count() == 0


def test_asking_does_not_stop_at_what_is_pending_beyond_the_peers_knowledge() -> None:
    # Seed 833: what waited above the peer's newest hid the gap below it.
    one, two, here, there = pair()
    one.loses = is_payload
    first, second = write(one, "a", "b")
    one.loses = lambda frame: False
    two.core.receive(there, wire.Changes((second.data,)), two.now)
    two.act()
    two.core.receive(there, wire.Have("main", Version({1: 1}), True), two.now)
    one.loses = lambda frame: isinstance(frame, wire.Have)
    run(one, two, seconds=2)

    assert two.frames(wire.Want)[0] == wire.Want("main", ((1, 1, 1),))
    assert keys(two) == {"a", "b"}


def test_answers_are_cut_and_asked_on() -> None:
    one, two = Node(1, replace(CONFIG, answer_bytes=400)), Node(2)
    write(one, *(f"{number}" for number in range(20)))
    connect(one, two)
    run(one, two, seconds=3)

    assert len(keys(two)) == 20
    answers = one.frames(wire.Changes)
    assert len(answers) > 2 and all(frame.answer for frame in answers)


def test_a_lost_have_is_made_up_for_by_equal_fingerprints() -> None:
    # Seed 4: the acknowledgement was lost, and nobody ever knew that both were equal.
    one, two, _, _ = pair()
    two.loses = lambda frame: isinstance(frame, wire.Have)
    write(one, "goal")
    run(one, two, seconds=1)
    two.loses = lambda frame: False
    run(one, two, seconds=2.5)

    assert one.core.is_synced() and two.core.is_synced()
    assert one.core.lag(one.core.peers[0].peer) == 0


def test_three_fingerprints_that_differ_heal_a_hole_that_nothing_announces() -> None:
    one, two, _, _ = pair()
    one.loses = lambda frame: not isinstance(frame, wire.Heartbeat)
    write(one, "goal")
    run(one, two, seconds=0.5)
    one.loses = lambda frame: False

    run(one, two, seconds=1)
    assert keys(two) == set()
    run(one, two, seconds=5)
    assert keys(two) == {"goal"}


def test_a_slow_peer_gets_no_live_changes_and_pulls_them_later() -> None:
    one, two, here, _ = pair(SMALL_OUTBOX)
    congest(one, here)
    late = {change.data for change in write(one, "a", "b")}
    run(one, two, seconds=0.4)
    read_on(one, here)
    run(one, two, seconds=2)

    assert keys(two) == keys(one)
    live = {data for f in one.frames(wire.Changes) if not f.answer for data in f.changes}
    assert live and not live & late


# What honest peers never send


def forged(change: Change, seq: int) -> Change:
    """A change with a valid checksum that breaks the rules of lanes."""
    update = b"\x00\x01" + change.update
    deps = dict(change.deps)
    dot = Dot(change.writer, seq)
    prev = change.id if seq > 1 else b""
    return encode_change(
        "main", dot, deps, change.stamp, 0, False, update, change.origin, prev=prev
    )


def test_a_change_that_breaks_the_rules_is_refused_and_nothing_of_it_applied() -> None:
    one, two, _, there = pair()
    (change,) = write(one, "goal")
    exchange(one, two)
    bad = forged(change, 2)

    two.core.receive(there, wire.Changes((bad.data,)), two.now)
    two.act()

    assert [event.agent for event in two.heard(PeerRejected)] == ["agent-1"]
    assert two.document("main").version == {1: 1}
    write(one, "next")
    run(one, two, seconds=2)
    assert keys(two) == {"goal", "next"}


def test_a_peer_that_goes_on_breaking_rules_is_dropped() -> None:
    one, two, _, there = pair()
    for number in range(STRIKES_MAX):
        two.core.receive(there, wire.Changes((bytes([number]) * 40,)), two.now)
    two.act()

    assert len(two.heard(PeerRejected)) == STRIKES_MAX
    assert two.frames(wire.Bye)[0].code == wire.ByeCode.PROTOCOL
    assert two.core.peers == []


def test_who_knows_more_of_my_writer_than_i_do_makes_me_another() -> None:
    one, two, here, _ = pair()
    write(one, "goal")
    one.core.receive(here, wire.Have("main", Version({1: 3}), False), one.now)
    one.act()

    assert one.reidentified == ["agent-2 has 3 changes of this writer in 'main'"]


def test_a_change_of_my_writer_that_i_did_not_make_makes_me_another() -> None:
    one, two, here, _ = pair()
    (change,) = write(one, "goal")
    one.core.receive(here, wire.Changes((forged(change, 2).data,)), one.now)
    one.act()

    assert one.reidentified == ["agent-2 has change 2 of this writer in 'main'"]


def test_going_on_as_another_writer_closes_all_connections_and_forgets_what_was_committed() -> None:
    one, two, _, _ = pair()
    write(one, "goal")
    exchange(one, two)

    one.core.reidentified(replace(one.core.hello, writer=9), one.now)
    one.act()

    assert one.core.peers == []
    assert one.core.committed_version("main") == {}
    one.core.restore("main", Version({1: 1}), Version())
    assert one.core.committed_version("main") == {1: 1}


# Snapshots


def big(node: Node, count: int) -> None:
    """Write so much that does not compress that its snapshot has several chunks."""
    for number in range(count):
        node.map("plan")[f"{number}"] = random.Random(number).randbytes(50_000)
        node.act()


def announce(node: Node, peer: int, name: str = "main") -> None:
    """Let *peer* say that it has a change that *node* lacks, and be asked for it."""
    node.core.receive(peer, wire.Have(name, Version({999: 1}), False), node.now)
    node.now += node.config.want_delay
    node.core.tick(node.now)


def test_who_is_below_the_floor_gets_a_snapshot_at_exactly_the_version() -> None:
    one = Node(1, TINY_LOG)
    write(one, *"abc")
    two = Node(2)
    write(two, "mine")
    connect(one, two)
    run(one, two, seconds=3)

    assert one.core.floor("main") == {1: 3}
    assert keys(one) == keys(two) == {*"abc", "mine"}
    assert two.document("main").version == {1: 3, 2: 1}
    assert len(two.heard(SnapshotReceived)) == 1
    assert two.core.committed_version("main") == {1: 3, 2: 1}


def test_a_snapshot_waits_until_own_changes_in_it_are_committed() -> None:
    one = Node(1, TINY_LOG)
    write(one, *"abc")
    two = Node(2)
    connect(one, two)
    one.commits = False
    one.map("plan")["late"] = 1
    # Sealed, while the store is busy: the core must know of it.
    one.version()
    run(one, two, seconds=3)

    assert not one.frames(wire.Offer) and not keys(two)
    one.commit()
    run(one, two, seconds=3)
    assert keys(two) == {*"abc", "late"}


def test_a_snapshot_goes_on_where_a_lost_connection_broke_it_off() -> None:
    one = Node(1, TINY_LOG)
    big(one, 14)
    two = Node(2)
    here, _ = connect(one, two)
    chunks = (number for number in itertools.count())
    one.loses = lambda frame: isinstance(frame, wire.Chunk) and next(chunks) >= 5
    run(one, two, seconds=2)
    one.disconnect(here)
    one.loses = lambda frame: False
    asked = len(two.frames(wire.Get))

    connect(one, two)
    run(one, two, seconds=3)

    assert len(keys(two)) == 14
    assert two.frames(wire.Get)[asked].offset == 5 * wire.CHUNK_BYTES_MAX


def test_a_chunk_that_does_not_come_is_asked_for_again() -> None:
    one = Node(1, TINY_LOG)
    big(one, 3)
    two = Node(2)
    connect(one, two)
    chunks = (number for number in itertools.count())
    one.loses = lambda frame: isinstance(frame, wire.Chunk) and next(chunks) == 1
    run(one, two, seconds=15)

    assert len(keys(two)) == 3


def test_a_corrupt_chunk_spoils_the_snapshot_and_nothing_else() -> None:
    one, two, _, there = pair()
    write(two, "mine")
    offer = wire.Offer("main", b"d" * 32, 10)
    announce(two, there)
    two.core.receive(there, offer, two.now)
    two.act()
    two.core.receive(there, wire.Chunk("main", offer.digest, 0, b"corrupted!"), two.now)
    two.act()

    (rejected,) = two.heard(PeerRejected)
    assert "does not match its digest" in rejected.reason
    assert keys(two) == {"mine"}


def test_a_snapshot_larger_than_its_offer_is_refused() -> None:
    one, two, _, there = pair()
    offer = wire.Offer("main", b"d" * 32, 3)
    announce(two, there)
    two.core.receive(there, offer, two.now)
    two.core.receive(there, wire.Chunk("main", offer.digest, 0, b"longer"), two.now)
    two.act()

    assert "longer than offered" in two.heard(PeerRejected)[0].reason


def test_a_snapshot_with_more_of_my_writer_makes_me_another() -> None:
    one, other = Node(1), Node(1)
    write(one, "a")
    write(other, "a", "b")
    relay = Node(3, TINY_LOG)
    connect(relay, other)
    run(relay, other, seconds=2)
    here, _ = connect(one, relay)
    one.core.receive(here, relay.core.hello, one.now)
    snapshot = relay.document("main").snapshot().encode()
    digest = hashlib.blake2b(snapshot, digest_size=32).digest()
    announce(one, here)
    one.core.receive(here, wire.Offer("main", digest, len(snapshot)), one.now)
    one.core.receive(here, wire.Chunk("main", digest, 0, snapshot), one.now)
    one.act()

    assert len(one.reidentified) == 1
    assert one.document("main").version == {1: 1}


def test_a_snapshot_that_nobody_asked_for_is_not_fetched() -> None:
    _, two, _, there = pair()
    two.core.receive(there, wire.Offer("main", b"d" * 32, 10), two.now)
    two.act()

    assert not two.frames(wire.Get)


def test_only_some_snapshots_are_fetched_at_a_time_and_the_others_after_them() -> None:
    names = [f"document-{number}" for number in range(DOWNLOADS_MAX + 3)]
    one = Node(1, TINY_LOG)
    for name in names:
        one.document(name).map("plan")["goal"] = name
        one.act()
        one.document(name).map("plan")["goal"] = f"{name} again"
        one.act()
    two = Node(2)
    connect(one, two)
    one.loses = lambda frame: isinstance(frame, wire.Chunk)
    run(one, two, seconds=2)
    assert len({frame.document for frame in two.frames(wire.Get)}) == DOWNLOADS_MAX
    assert all(size <= limit for _, size, limit in two.core.loads())

    one.loses = lambda frame: False
    run(one, two, seconds=10)

    for name in names:
        assert two.document(name).map("plan")["goal"] == f"{name} again"


def test_a_snapshot_that_its_peer_replaced_is_fetched_anew() -> None:
    _, two, _, there = pair()
    announce(two, there)
    for digest in (b"a" * 32, b"b" * 32):
        two.core.receive(there, wire.Offer("main", digest, 10), two.now)
    two.act()

    gets = [frame for frame in two.frames(wire.Get) if isinstance(frame, wire.Get)]
    assert [frame.digest[:1] for frame in gets] == [b"a", b"b"]


def test_a_snapshot_that_its_peer_forgot_and_made_again_goes_on() -> None:
    # Review: with more snapshots than the peer keeps, each first Get met an Offer of the same.
    _, two, _, there = pair()
    announce(two, there)
    offer = wire.Offer("main", b"a" * 32, 10)
    two.core.receive(there, offer, two.now)
    two.core.receive(there, offer, two.now)
    two.act()

    assert len(two.frames(wire.Get)) == 2


def test_a_peer_that_trickles_is_given_up_for_others() -> None:
    _, two, _, there = pair()
    announce(two, there)
    offer = wire.Offer("main", b"a" * 32, 10)
    two.core.receive(there, offer, two.now)
    two.core.receive(there, wire.Chunk("main", offer.digest, 0, b""), two.now)
    two.act()

    assert "0 bytes" in two.heard(PeerRejected)[0].reason
    assert not two.core._downloads.is_running("main")


def test_a_stalled_transfer_is_asked_for_again_while_another_flows() -> None:
    sent: list[tuple[int, wire.Frame]] = []
    downloads = Downloads(lambda peer, frame: sent.append((peer, frame)))
    size = 100 * wire.CHUNK_BYTES_MAX
    downloads.on_offer(1, wire.Offer("stalled", b"a" * 32, size), 0.0)
    downloads.on_offer(2, wire.Offer("flowing", b"b" * 32, size), 0.0)
    sent.clear()
    for number in range(8):
        now = 1.0 + number
        chunk = wire.Chunk(
            "flowing", b"b" * 32, number * wire.CHUNK_BYTES_MAX, bytes(wire.CHUNK_BYTES_MAX)
        )
        downloads.on_chunk(2, chunk, now)
        if downloads.check_at is not None and downloads.check_at <= now:
            downloads.check(now)

    assert wire.Get("stalled", b"a" * 32, 0) in [frame for peer, frame in sent if peer == 1]


def test_strikes_go_to_whoever_sent_the_change_and_not_to_who_sent_what_it_waited_for() -> None:
    one, honest, hostile = Node(1), Node(2), Node(3)
    connect(one, honest)
    here, _ = connect(one, hostile)
    run(one, honest, hostile, seconds=2)
    for writer in range(101, 105):
        junk = encode_change("main", Dot(writer, 1), {2: 1}, 1, 0, False, b"junk", Origin("x"))
        one.core.receive(here, wire.Changes((junk.data,)), one.now)
    write(honest, "a")
    exchange(one, honest, hostile)

    assert {event.agent for event in one.heard(PeerRejected)} == {hostile.agent}
    assert keys(one) == {"a"}


def test_what_a_peer_builds_on_is_not_taken_back() -> None:
    # Review: a reply that came before its writer's HAVE; taken back, the journal had a hole.
    one, two, _, _ = pair()
    two.loses = lambda frame: isinstance(frame, wire.Have | wire.Heartbeat)
    write(one, "question")
    exchange(one, two)
    write(two, "reply")
    exchange(one, two)

    assert one.core.own_acked == {"main": 1}


def test_after_a_snapshot_everything_that_waited_is_delivered_once() -> None:
    # Seeds 39 and 94: two pending changes, of which the first makes the second ready.
    one = Node(1, TINY_LOG)
    write(one, "a", "b")
    three = Node(3)
    connect(one, three)
    run(one, three, seconds=3)
    later = write(three, "c", "d", "e")
    two = Node(2)
    here, there = connect(one, two)
    one.loses = is_payload
    exchange(one, two)
    two.core.receive(there, wire.Changes((later[1].data, later[2].data, later[0].data)), two.now)
    two.act()
    assert two.core.pending_count == 3

    run(one, two, seconds=3)

    assert two.core.pending_count == 0
    assert keys(two) == {*"abcde"}
    assert two.document("main").version == {1: 2, 3: 3}


def test_compaction_is_renewed_when_the_log_outgrows_the_snapshot() -> None:
    one = Node(1, replace(CONFIG, snapshot_after_bytes=300, log_bytes=200))
    write(one, *"abcdefghij")

    floor, version = one.core.floor("main"), one.document("main").version
    assert 0 < floor[1] < version[1]
    found, more = one.store.read("main", [(1, floor[1] + 1, version[1])], 2**30)
    assert len(found) == version[1] - floor[1] and not more


# Engines that fail


def test_a_document_whose_engine_failed_is_rebuilt_once_the_store_has_all_of_it() -> None:
    # Seeds 27 and 28: rebuilt too early it forgot changes, which then came a second time.
    one, two, _, there = pair()
    two.commits = False
    write(one, "a", "b")
    exchange(one, two)
    document = two.document("main")
    assert isinstance(document, FragileDocument)
    document.fails_on = Dot(1, 3)
    write(one, "c")
    exchange(one, two)

    assert document.is_broken and two.rebuilds == []
    two.commit()
    two.act()
    assert two.rebuilds == ["main"] and not document.is_broken
    assert [event.document for event in two.heard(DocumentRebuilt)] == ["main"]
    assert keys(two) == {"a", "b"}


def test_writes_to_a_broken_document_are_sealed_after_it_was_rebuilt() -> None:
    one, two, _, _ = pair()
    write(one, "a")
    exchange(one, two)
    document = two.document("main")
    assert isinstance(document, FragileDocument)
    document.fails_on = Dot(1, 2)
    two.commits = False
    two.document("other").map("plan")["x"] = 1
    write(two, "before")
    write(one, "b")
    exchange(one, two)
    two.map("plan")["while broken"] = 1
    two.act()
    assert document.version == {1: 1, 2: 1}

    two.commits = True
    two.commit()
    run(one, two, seconds=2)

    assert document.version == {1: 1, 2: 2}
    assert {"before", "while broken"} <= keys(one)


def test_what_waited_for_a_document_is_delivered_after_it_was_rebuilt() -> None:
    one, two, three = Node(1), Node(2), Node(3)
    bad = write(three, "bad")
    a, b = write(one, "a", "b")
    _, there = connect(one, two)
    one.loses = lambda frame: is_payload(frame) or isinstance(frame, wire.Have)
    exchange(one, two)
    document = two.document("main")
    assert isinstance(document, FragileDocument)
    document.fails_on = Dot(3, 1)
    two.core.receive(there, wire.Changes((b.data, bad[0].data, a.data)), two.now)
    two.act()
    assert two.rebuilds == ["main"]

    one.loses = lambda frame: False
    run(one, two, seconds=6)

    assert keys(two) == {"a", "b"}


def test_a_broken_document_gives_no_snapshot_before_it_was_rebuilt() -> None:
    # Seed 110: what is left of a failed engine is nobody's state.
    one = Node(1, TINY_LOG)
    write(one, *"abc")
    two, three = Node(2), Node(3)
    connect(two, one)
    run(one, two, seconds=3)
    one.commits = False
    document = one.document("main")
    assert isinstance(document, FragileDocument)
    document.fails_on = Dot(2, 2)
    write(two, "good", "bad")
    exchange(one, two)
    assert document.is_broken

    connect(three, one)
    run(one, two, three, seconds=3)
    assert not keys(three) and document.is_broken
    one.commits = True
    one.commit()
    run(one, two, three, seconds=3)

    assert not document.is_broken
    assert keys(three) >= {*"abc", "good"}


def test_a_broken_document_joins_no_snapshot_before_it_was_rebuilt() -> None:
    one = Node(1, TINY_LOG)
    write(one, *"abc")
    two, three = Node(2), Node(3)
    connect(two, three)
    run(two, three, seconds=2)
    two.commits = False
    write(two, "mine")
    document = two.document("main")
    assert isinstance(document, FragileDocument)
    document.fails_on = Dot(3, 1)
    write(three, "bad")
    exchange(two, three)
    assert document.is_broken

    connect(one, two)
    run(one, two, three, seconds=3)
    assert document.version == {2: 1} and two.frames(wire.Get)
    two.commits = True
    two.commit()
    run(one, two, three, seconds=20)

    assert {*"abc", "mine"} <= keys(two)


def test_a_broken_document_is_not_compacted() -> None:
    one, two, _, _ = pair(TINY_LOG)
    document = one.document("main")
    assert isinstance(document, FragileDocument)
    one.commits = False
    document.map("plan")["long"] = "x" * 5000
    one.act()
    document.fails_on = Dot(2, 1)
    write(two, "bad")
    exchange(one, two)
    assert document.is_broken

    one.commits = True
    one.commit()
    one.act()

    assert one.rebuilds == ["main"] and not document.is_broken
    assert keys(one) == {"long"}


def test_a_change_that_the_engine_fails_on_is_not_tried_again() -> None:
    one, two, _, _ = pair()
    document = two.document("main")
    assert isinstance(document, FragileDocument)
    document.fails_on = Dot(1, 1)
    write(one, "a")
    run(one, two, seconds=20)

    assert two.rebuilds == ["main"]
    assert two.core.has_quarantine
    assert one.copies < 20


# Tidying


def test_what_others_wrote_over_is_dropped_after_a_while() -> None:
    one, two, _, _ = pair()
    write(one, "goal")
    exchange(one, two)
    write(two, "goal")
    run(one, two, seconds=3)

    cell = one.document("main").lanes.canonical()["mplan\0goal"]
    assert list(cell) == [2]
    assert one.document("main").version == {1: 2, 2: 1}


def test_what_was_to_be_tidied_before_a_restart_is_tidied_after_it() -> None:
    # Seed 23: nobody looked at what was loaded.
    one, two, _, _ = pair(replace(CONFIG, tidy_delay=1000.0))
    write(one, "goal")
    exchange(one, two)
    write(two, "goal")
    exchange(one, two)
    assert one.document("main").needs_tidying

    again = Node(1, store=one.store)
    run(again, seconds=3)

    assert not again.document("main").needs_tidying
    assert list(again.document("main").lanes.canonical()["mplan\0goal"]) == [2]


# Bounds


def test_all_that_may_pile_up_is_listed_with_its_limit() -> None:
    one, _, _, _ = pair()

    assert all(size <= limit for _, size, limit in one.core.loads())
    assert {name for name, _, _ in one.core.loads()} >= {"pending changes", "cached snapshots"}


def test_refusals_never_raise(caplog: pytest.LogCaptureFixture) -> None:
    one, _, here, _ = pair()
    rng = random.Random(1)
    frames: Iterable[wire.Frame] = (
        wire.Changes((os.urandom(50),)),
        wire.Want("nothing", ((5, 1, 9),)),
        wire.Get("nothing", b"x" * 32, 0),
        wire.Chunk("nothing", b"x" * 32, 0, b"data"),
        wire.Offer("nothing", b"x" * 32, 0),
        wire.Busy("nothing", 1000),
        wire.Have("nothing", Version({rng.getrandbits(40): 3}), True),
        wire.Heartbeat(5, (1, 2, 3)),
    )
    for frame in frames:
        one.core.receive(here, frame, one.now)
        one.act()

    with pytest.raises(InvalidUpdate):
        decode_change(b"")


def test_the_lane_of_a_former_writer_is_adopted_once_no_peer_has_more_of_it() -> None:
    lost, one, two = Node(9), Node(1), Node(2)
    changes = write(lost, "a", "b")
    connect(lost, two)
    run(lost, two, seconds=2)
    one.core.former.add(9)
    one.store.append([Entry("main", 9, 1, changes[0].data)])
    one._load(next(iter(one.store.load())))
    one.core.restore("main", one.document("main").version, one.store.floor("main"))
    lanes = one.document("main").lanes

    run(one, seconds=3)
    assert lanes.tended == [1]
    connect(one, two)
    one.map("plan")["a"] = "mine"
    run(one, two, seconds=5)

    assert lanes.tended == [1, 9]
    assert set(lanes.lanes[9].places) == {"mplan\0b"}
    assert one.document("main").lanes.canonical() == two.document("main").lanes.canonical()


def test_a_peer_that_caught_up_is_told_at_once_what_it_lacks() -> None:
    one, two, here, _ = pair(SMALL_OUTBOX)
    congest(one, here)
    write(one, "a")
    run(one, two, seconds=1)
    assert keys(two) == set()

    read_on(one, here)
    run(one, two, seconds=1)

    assert "a" in keys(two)
