"""
The mesh around one replica: its links, its place in the tree, and whom it knows.

It brings three things together: `membership` (who is there), `topology` (with whom to be
connected) and `tree` (along which links changes go). It sends heartbeats, waves and records; what
the replica replicates is none of its business but for a fingerprint that rides on heartbeats.
Driven by `sync`, and sans-I/O like it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping

from crdtstate import wire
from crdtstate.config import Config
from crdtstate.events import Event
from crdtstate.link import MISMATCH_QUIET, MISMATCHES_MAX, Link
from crdtstate.membership import Membership
from crdtstate.topology import Topology
from crdtstate.tree import Root, Tree

MISSED_MAX = 3
"""Heartbeats that a neighbour may miss before it is suspected."""

CUT_OFF = 0.3
"""Seconds after which a broken link counts as lost. Before, it may be made anew."""

WORK_DELAY = 0.05
WORK_DELAY_EACH = 0.0005
WORK_DELAY_MAX = 1.0
"""Seconds that news of members collect: a while, and for each member a bit more."""

URGENT_MAX = 64
"""Members up to which computing anew who is up costs so little that it need not wait."""

AGE_SHIFT = 20

BEAT_SLACK = 1.5
"""Heartbeats without a wave after which one is sent nevertheless."""

NOWHERE = Root(wire.PRIORITY_MAX + 1, 0)
"""What a link that is no way to the root tells."""


class Mesh:
    """The links of one replica, and what it knows of all members.

    Args:
        links: The connections by number; `sync` adds and removes them.
        hello: How this replica introduces itself.
        seeds: Addresses to stay connected to.
        config: Settings.
        rng: For choices and jitter.
        wall_ms: Returns the wall time in milliseconds since 1970.
        fingerprint: Returns 64 bits over all versions, as far as they concern a link.
        send: Sends a frame on a link.
        emit: Takes events.
        now: The time.
    """

    def __init__(
        self,
        links: Mapping[int, Link],
        hello: wire.Hello,
        seeds: Iterable[str],
        config: Config,
        rng: random.Random,
        wall_ms: Callable[[], int],
        fingerprint: Callable[[Link], int],
        send: Callable[[int, wire.Frame], None],
        emit: Callable[[Event], None],
        now: float,
    ) -> None:
        self._links = links
        self._config = config
        self._rng = rng
        self._fingerprint = fingerprint
        self._send = send
        self._emit = emit
        self.members = Membership(_record(hello), config, wall_ms, emit, now)
        # The eldest is the best root: else each newcomer of a lower number would become it, and
        # the tree be made anew.
        born = (wall_ms() << AGE_SHIFT | hello.session & ((1 << AGE_SHIFT) - 1)) & wire.UINT64_MAX
        self.tree = Tree(Root(_priority(hello), born), config.heartbeat, now)
        self.topology = Topology(seeds, hello.address, config, rng, now)
        # Links to give up, for `sync` to hang up.
        self.pruned: list[Link] = []
        # Addresses to dial, for `sync` to hand out.
        self.dials: list[str] = []
        # Writers whose link just broke -> when it counts as lost.
        self._fading: dict[int, float] = {}
        self.has_left = False
        self._suspects: frozenset[int] = frozenset()
        # Deadlines.
        self._beat_at = now + config.heartbeat * rng.random()
        self._look_at = now + config.heartbeat * rng.random()
        self._work_at: float | None = now
        self._judge_at: float | None = None
        self._dial_at = now
        # Before, new links are not told: in a large mesh everybody hears of each.
        self._publish_at = now

    # Looking

    @property
    def is_direct(self) -> bool:
        """Whether everybody is connected with everybody: then each sends its own to all."""
        return self.members.is_complete

    def is_eager(self, link: Link, now: float) -> bool:
        """Whether changes are sent on a link without being asked for."""
        return self.is_direct or self.tree.is_eager(link.peer, now)

    def next_deadline(self) -> float:
        """When to call `tick` at the latest."""
        soonest = min(self._beat_at, self._look_at, self._dial_at, self.tree.next_deadline())
        for at in (self._work_at, self._judge_at, *self._fading.values()):
            if at is not None and at < soonest:
                soonest = at
        return soonest

    def _up(self) -> list[Link]:
        return [link for link in self._links.values() if link.is_member]

    # Links

    def met(self, link: Link, now: float) -> None:
        """Both sides of a link know each other."""
        assert link.hello is not None
        self._fading.pop(link.hello.writer, None)
        if link.url is not None:
            self.topology.met(link.url, link.hello.writer, is_self=False)
            self._send(link.peer, wire.Roll(self.members.orders()))
        self._beat(link)
        self._work_soon(now)

    def gone(self, link: Link, now: float) -> None:
        """A link has ended, whoever ended it; it is no longer among the links."""
        self.topology.ended(link, now, is_pruned=link.bye is wire.ByeCode.PRUNED)
        if link.hello is None or link.is_visitor:
            self._dial_at = min(self._dial_at, now)
            return
        writer = link.hello.writer
        if self.tree.peer_down(link.peer, now) and self.tree.parent is not None:
            self._beat(self._links[self.tree.parent])
        if link.bye is None and all(other.writer != writer for other in self._links.values()):
            self._fading[writer] = now + CUT_OFF
        self._update(now, is_due=True)
        self._dial_at = min(self._dial_at, now)
        self._work_soon(now)

    def silent(self, link: Link, now: float) -> None:
        """Nothing came on a link for so long that it is given up."""
        if link.hello is not None:
            self.members.cut_off(link.hello.writer, now)
            self._work(now)

    # Receiving

    def on_heartbeat(self, link: Link, frame: wire.Heartbeat, now: float) -> None:
        """Take in a heartbeat."""
        if frame.neighbours is not None:
            link.neighbours = frozenset(frame.neighbours)
        root = NOWHERE if link.is_partial else Root(frame.priority, frame.root)
        if self.tree.on_beat(link.peer, root, frame.wave, frame.hops, frame.is_parent, now):
            self._beat_all(now)
        self._compare(link, frame)
        if link.writer in self._suspects:
            self._update(now, is_due=True)

    def _compare(self, link: Link, frame: wire.Heartbeat) -> None:
        """Ask for records when both sides differ for long, or at rest."""
        told = (frame.fingerprint, self._fingerprint(link), frame.members, self.members.fingerprint)
        if frame.members == self.members.fingerprint:
            link.members_mismatches = 0
        else:
            is_quiet = link.told is not None and link.told[2:] == told[2:]
            link.members_mismatches += MISMATCH_QUIET if is_quiet else 1
            if link.members_mismatches >= MISMATCHES_MAX:
                link.members_mismatches = 0
                self._send(link.peer, wire.Roll(self.members.orders()))
        link.told = told

    def on_members(self, link: Link, frame: wire.Members, now: float) -> None:
        """Take in records. Raises ProtocolError."""
        is_urgent = self.members.on_records(frame.records, link.peer)
        if is_urgent and len(self.members) <= URGENT_MAX:
            # Somebody lost a neighbour. To pass that on at once is what makes a death known soon.
            self._work(now)
        else:
            self._work_soon(now)

    def on_roll(self, link: Link, frame: wire.Roll) -> None:
        """Send the records that the peer lacks, and ask for those that are newer there."""
        newer = self.members.newer_than(frame.orders)
        if frame.is_answer:
            newer = [writer for writer in newer if writer in frame.orders]
        self._send_records(link.peer, newer)
        if not frame.is_answer and (wanted := self.members.older_than(frame.orders)):
            self._send(link.peer, wire.Roll(wanted, is_answer=True))

    def _send_records(self, peer: int, writers: Iterable[int]) -> None:
        for frame in wire.split_records(map(self.members.item, writers)):
            self._send(peer, frame)

    # Time

    def tick(self, now: float) -> None:
        """Do what is due at *now*."""
        for peer in self.tree.tick(now):
            if (link := self._links.get(peer)) is not None and link.is_up:
                self._beat(link)
        self._drop_faded(now)
        if self._judge_at is not None and self._judge_at <= now:
            self._update(now, is_due=True)
        if self._beat_at <= now:
            self.tree.start_wave(now)
            self._beat_all(now)
        if self._look_at <= now:
            # Not with the beats: whoever passes on waves in time has none of its own.
            self._look_at = now + self._config.heartbeat
            self._find_suspects(now)
            spared = {link.peer for link in self._up() if self.is_eager(link, now)}
            self.pruned += self.topology.excess(self._up(), self.members, spared, now)
            self._work_soon(now)
        if self._work_at is not None and self._work_at <= now:
            self._work(now)
        if self._dial_at <= now:
            self.dial(now)

    def slept(self, seconds: float) -> None:
        """This process did nothing for so long; it is not the others who were silent."""
        for link in self._links.values():
            link.heard += seconds
        self.tree.slept(seconds)
        self._fading = {writer: at + seconds for writer, at in self._fading.items()}

    def dial(self, now: float) -> None:
        """Dial who is to be connected and is not."""
        if self.has_left:
            self._dial_at = math.inf
            return
        links = [link for link in self._links.values() if not link.is_closing]
        chosen, again = self.topology.dial(links, self.members, now)
        self.dials += chosen
        # Who is up changes all the time; look at it with each heartbeat.
        self._dial_at = max(min(again, now + self._config.heartbeat), now + 0.001)

    def _drop_faded(self, now: float) -> None:
        faded = [writer for writer, at in self._fading.items() if at <= now]
        for writer in faded:
            del self._fading[writer]
            if all(link.writer != writer for link in self._links.values()):
                self.members.cut_off(writer, now)
        if faded:
            self._work(now)

    def _find_suspects(self, now: float) -> None:
        silence = MISSED_MAX * self._config.heartbeat
        found = {link.writer for link in self._up() if now - link.heard > silence}
        suspects = frozenset(writer for writer in found if writer is not None)
        if suspects != self._suspects:
            self._update(now, is_due=True)

    def _update(self, now: float, *, is_due: bool = False) -> None:
        """Compute who is up."""
        silence = MISSED_MAX * self._config.heartbeat
        linked = dict.fromkeys(self._fading, True)
        for link in self._up():
            assert link.hello is not None
            linked[link.hello.writer] = now - link.heard > silence
        suspects = frozenset(writer for writer, is_silent in linked.items() if is_silent)
        is_due |= suspects != self._suspects
        self._suspects = suspects
        if is_due or self.members.is_stale:
            self._judge_at = self.members.update(linked, now)

    def _work_soon(self, now: float) -> None:
        if self._work_at is None:
            delay = WORK_DELAY + WORK_DELAY_EACH * len(self.members)
            self._work_at = now + min(delay, WORK_DELAY_MAX)

    def _work(self, now: float) -> None:
        """Tell of the own links, compute who is up, pass on what is new."""
        self._work_at = None
        up = self._up()
        linked = {link.hello.writer for link in up if link.hello is not None} | self._fading.keys()
        members = self.members
        if now >= self._publish_at or not members.me.links or members.has_lost(linked, now):
            members.publish(self._named(up), linked, now)
            is_small = len(members) <= URGENT_MAX
            self._publish_at = now + (0.0 if is_small else self._config.heartbeat)
        self._update(now)
        self._spread_records(up, now)
        if up or self._fading:
            self._dial_at = min(self._dial_at, now)

    def _named(self, links: list[Link]) -> tuple[int, ...]:
        """The links to name in the own record. Whoever has few names all of them; so it is enough
        that who has many names some, and none to those who cannot be dialled, who have few."""
        if len(links) > wire.NEIGHBOURS_MAX:
            links = [link for link in links if not link.is_leaf]
        order = sorted(
            (link.hello.role != "relay", link.hello.writer)
            for link in links
            if link.hello is not None
        )
        return tuple(sorted(writer for _, writer in order[: wire.NEIGHBOURS_MAX]))

    def _spread_records(self, links: list[Link], now: float) -> None:
        news, self.members.news = self.members.news, {}
        if not news:
            return
        is_small = len(self.members) <= URGENT_MAX
        for link in links:
            # A flood of records would cost more than what it gains; who misses one finds out.
            if not (self.is_eager(link, now) if is_small else self.tree.is_branch(link.peer)):
                continue
            # Not spared to the neighbours of whom it came from: what is known of those is least
            # certain when records change.
            chosen = [writer for writer, source in news.items() if source != link.peer]
            if chosen:
                self._send_records(link.peer, chosen)

    # Heartbeats

    def _beat_all(self, now: float) -> None:
        is_root = self.tree.root == self.tree.me
        self._beat_at = now + self._config.heartbeat * (1.0 if is_root else BEAT_SLACK)
        for link in self._up():
            self._beat(link)

    def _beat(self, link: Link) -> None:
        writers = tuple(sorted(self._writers()))
        neighbours = writers if len(writers) <= wire.NEIGHBOURS_MAX else ()
        told = None if neighbours == link.told_neighbours else neighbours
        link.told_neighbours = neighbours
        tree = self.tree
        frame = wire.Heartbeat(
            self._fingerprint(link),
            told,
            tree.root.priority,
            tree.root.session,
            # A wave travels together with its hops.
            tree.wave,
            tree.hops,
            tree.parent == link.peer,
            self.members.fingerprint,
        )
        self._send(link.peer, frame)

    def _writers(self) -> Iterator[int]:
        return (link.hello.writer for link in self._up() if link.hello is not None)

    # Beginning anew, and ending

    def rename(self, hello: wire.Hello) -> None:
        """This replica goes on under another writer."""
        self.members.rename(_record(hello))

    def leave(self) -> None:
        """Say goodbye to the mesh: this replica closes."""
        self.has_left = True
        self.members.leave()
        for link in self._up():
            self._send_records(link.peer, [self.members.me.writer])


def _record(hello: wire.Hello) -> wire.Record:
    return wire.Record(
        hello.writer,
        hello.session,
        1,
        hello.agent,
        hello.role,
        False,
        hello.is_durable,
        hello.address,
    )


def _priority(hello: wire.Hello) -> int:
    """How good a root this replica is: relays are there for others, and last longest."""
    if hello.documents is not None:
        return 3
    if hello.role == "relay":
        return 0
    return 1 if hello.address is not None else 2
