"""
The tree: along which links changes go, when a mesh is too large to send each to everybody.

All replicas share one spanning tree, shaped by their heartbeats. Its *root*, the living replica
of lowest (priority, session), relays first, starts a numbered *wave* at each heartbeat; everyone
passes the first copy of a wave on at once. The link on which it came first leads to the *parent*;
the other side learns that, and so the link is *eager* on both sides. Changes go along eager links;
what the others lack for whatever reason is announced on all links and asked for (`sync`).

A parent is kept while it delivers waves hardly later than others do, and was nearer to the root
when it got them: waves count their hops. Without that, some who are each other's parents in a
circle would pass every wave on to each other in time, and never part.

It is the spanning tree protocol of Ethernet bridges (Perlman 1985) in place of PlumTree (Leitão
et al. 2007), whose tree suits a single writer and never settles with many. A root counts as alive
only while its waves rise: an older wave, still told by others, must not bring it back (the "count
to infinity" of distance-vector routing). While there is no parent, and for a while after a parent
or root was lost, all links are eager: a flood bridges the gap.

Pure: heartbeats and the time come in, and answers say what to do.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from crdtstate.wire import WAVE_HOPS_MAX

ROOT_SILENCE = 3.5
"""Heartbeats without a new wave after which the root counts as lost."""

PATIENCE = 0.03
"""Seconds by which the parent may deliver a wave later than another link did."""

FLOOD = 2.0
"""Seconds for which all links are eager after a parent or root was lost."""

ROOTS_MAX = 256
HOPS_MAX = WAVE_HOPS_MAX
"""Hops are not counted further: that far from the root, a parent is kept only while it is first."""


class Root(NamedTuple):
    """A root, or who might be: the lowest wins."""

    priority: int
    session: int


@dataclass(slots=True)
class _Heard:
    root: Root
    wave: int
    hops: int


class Tree:
    """This replica's place in the tree.

    Args:
        me: Itself as a root.
        heartbeat: Seconds between waves.
        now: The time.
    """

    def __init__(self, me: Root, heartbeat: float, now: float) -> None:
        self.me = me
        self.root = me
        self.wave = 0
        # How many passed that wave on until it was here.
        self.hops = 0
        self.parent: int | None = None
        self.children: set[int] = set()
        self._own_wave = 0
        self._heartbeat = heartbeat
        self._wave_at = now
        self._flood_until = now + FLOOD
        # What each link told last, and the highest wave of each root, the newest roots last.
        self._heard: dict[int, _Heard] = {}
        self._waves: OrderedDict[Root, int] = OrderedDict()
        # The link that brought the present wave first while the parent has not, until when it may.
        self._rival: int | None = None
        self._decide_at: float | None = None

    # Looking

    def is_flooding(self, now: float) -> bool:
        """Whether all links are eager, because the tree is torn."""
        return now < self._flood_until or (self.parent is None and self.root != self.me)

    def is_eager(self, peer: int, now: float) -> bool:
        """Whether changes are sent on this link without being asked for."""
        return peer == self.parent or peer in self.children or self.is_flooding(now)

    def is_branch(self, peer: int) -> bool:
        """Whether this link is part of the tree; without a way to the root, all are."""
        is_lost = self.parent is None and self.root != self.me
        return is_lost or peer == self.parent or peer in self.children

    def next_deadline(self) -> float:
        """When to call `tick` at the latest."""
        silent = self._wave_at + ROOT_SILENCE * self._heartbeat
        return silent if self._decide_at is None else min(silent, self._decide_at)

    # Hearing

    def on_beat(
        self, peer: int, root: Root, wave: int, hops: int, is_parent: bool, now: float
    ) -> bool:
        """Take in a heartbeat. True if it brought a new wave: pass it on, on all links, at once."""
        if is_parent:
            self.children.add(peer)
        else:
            self.children.discard(peer)
        self._heard[peer] = heard = _Heard(root, wave, hops)
        if wave <= self._waves.get(root, 0) or root == self.me:
            if peer == self.parent and self._is_upstream(heard):
                self._decide_at = self._rival = None
            return False
        self._note_wave(root, wave)
        if root > self.root:
            return False
        if root < self.root:
            self._follow(root, peer, now)
        elif self.parent is None:
            self.parent = peer
        elif self.parent != peer:
            self._rival, self._decide_at = peer, now + PATIENCE
        else:
            self._decide_at = self._rival = None
        self.wave, self.hops, self._wave_at = wave, min(hops + 1, HOPS_MAX), now
        return True

    def _is_upstream(self, heard: _Heard) -> bool:
        """Whether a neighbour had the present wave by a shorter way, so not from here."""
        return heard.root == self.root and heard.wave == self.wave and heard.hops < self.hops

    def _note_wave(self, root: Root, wave: int) -> None:
        self._waves[root] = wave
        self._waves.move_to_end(root)
        if len(self._waves) > ROOTS_MAX:
            # The present root may be older than a crowd of others.
            del self._waves[next(each for each in self._waves if each != self.root)]

    def _follow(self, root: Root, peer: int | None, now: float) -> None:
        self.root, self.parent = root, peer
        self._decide_at = self._rival = None
        self._flood_until = now + FLOOD

    def peer_down(self, peer: int, now: float) -> bool:
        """A link is gone. True if it led to the parent; tell the new one by a heartbeat."""
        self._heard.pop(peer, None)
        self.children.discard(peer)
        if peer == self._rival:
            self._decide_at = self._rival = None
        if peer != self.parent:
            return False
        self.parent = next(
            (
                other
                for other, heard in self._heard.items()
                if self._is_upstream(heard) and other not in self.children
            ),
            None,
        )
        self._flood_until = now + FLOOD
        return True

    # Time

    def start_wave(self, now: float) -> bool:
        """Start a new wave if this is the root; True if it is."""
        if self.root != self.me:
            return False
        self._own_wave += 1
        self.wave, self.hops, self._wave_at = self._own_wave, 0, now
        return True

    def tick(self, now: float) -> list[int]:
        """Do what is due. Returns the links to send a heartbeat on at once: those that led to the
        parent before, or do now."""
        if self._decide_at is not None and self._decide_at <= now:
            # The parent did not bring the wave in time: whoever did is nearer to the root.
            before, self.parent = self.parent, self._rival
            self._decide_at = self._rival = None
            return [peer for peer in (before, self.parent) if peer is not None]
        if self._wave_at + ROOT_SILENCE * self._heartbeat <= now:
            before = self.parent
            if self.root != self.me:
                self._follow(self.me, None, now)
                self.wave, self.hops = self._own_wave, 0
            self._wave_at = now
            return [] if before is None else [before]
        return []

    def slept(self, seconds: float) -> None:
        """This process did nothing for so long: no root was lost in the meantime."""
        self._wave_at += seconds
