"""The tree: who is root, who is whose parent, and that all accidents leave one tree."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterable
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crdtstate.mesh import BEAT_SLACK, NOWHERE
from crdtstate.tree import FLOOD, HOPS_MAX, PATIENCE, ROOT_SILENCE, ROOTS_MAX, Root, Tree

RELAY, AGENT = 0, 1
ROOT = Root(RELAY, 1)


def make(session: int = 9, priority: int = AGENT) -> Tree:
    return Tree(Root(priority, session), 1.0, 0.0)


def follow(tree: Tree, peer: int, *, wave: int = 1, hops: int = 0, now: float = 0.0) -> bool:
    """Let *peer* bring a wave of ROOT."""
    return tree.on_beat(peer, ROOT, wave, hops, False, now)


# Election


@pytest.mark.parametrize(
    ("other", "wins"),
    [
        (Root(AGENT, 8), True),
        (Root(AGENT, 10), False),
        (Root(RELAY, 10), True),
        (Root(AGENT + 1, 8), False),
    ],
)
def test_the_lowest_is_root_and_relays_come_first(other: Root, wins: bool) -> None:
    tree = make()

    is_new = tree.on_beat(1, other, 1, 0, False, 0.0)

    assert is_new == wins
    assert tree.root == (other if wins else tree.me)
    assert tree.parent == (1 if wins else None)


def test_only_the_root_starts_waves_and_each_has_a_higher_number() -> None:
    tree = make()
    assert tree.start_wave(1.0) and tree.wave == 1
    assert tree.start_wave(2.0) and tree.wave == 2

    follow(tree, 1)

    assert not tree.start_wave(3.0)


def test_a_wave_is_passed_on_once() -> None:
    tree = make()

    assert follow(tree, 1, wave=4)
    assert not follow(tree, 2, wave=4)
    assert not follow(tree, 1, wave=4)
    assert not follow(tree, 2, wave=3)
    assert follow(tree, 2, wave=5)


def test_a_wave_of_its_own_that_comes_back_is_nothing_new() -> None:
    tree = make()
    tree.start_wave(0.0)

    assert not tree.on_beat(1, tree.me, 7, 3, False, 0.1)
    assert (tree.root, tree.parent, tree.wave) == (tree.me, None, 1)


def test_a_link_that_is_no_way_to_the_root_leads_to_no_parent_but_may_lead_to_a_child() -> None:
    tree = make()

    assert not tree.on_beat(1, NOWHERE, 5, 0, True, 0.0)

    assert (tree.root, tree.parent) == (tree.me, None)
    assert tree.is_eager(1, FLOOD + 1)


# The parent


def test_the_parent_stays_if_it_brings_the_wave_a_moment_later_than_another() -> None:
    tree = make()
    follow(tree, 1, wave=1, now=0.0)
    follow(tree, 2, wave=2, hops=1, now=1.0)

    follow(tree, 1, wave=2, now=1.0 + PATIENCE / 2)

    assert tree.tick(1.0 + PATIENCE) == []
    assert tree.parent == 1


def test_the_parent_is_replaced_if_it_brings_the_wave_much_later_and_both_are_told() -> None:
    tree = make()
    follow(tree, 1, wave=1, now=0.0)
    follow(tree, 2, wave=2, now=1.0)
    assert tree.next_deadline() == 1.0 + PATIENCE

    told = tree.tick(1.0 + PATIENCE)

    assert told == [1, 2]
    assert tree.parent == 2
    assert not tree.is_eager(1, FLOOD + 1) and tree.is_eager(2, FLOOD + 1)


def test_a_parent_that_got_the_wave_by_a_longer_way_than_another_is_replaced() -> None:
    """It may have it from here: two who take each other for the parent would stay so for ever."""
    tree = make()
    follow(tree, 1, wave=1, hops=0)
    follow(tree, 2, wave=2, hops=3, now=1.0)
    assert tree.hops == 4

    follow(tree, 1, wave=2, hops=tree.hops + 1, now=1.001)

    assert tree.tick(1.0 + PATIENCE) == [1, 2]
    assert tree.parent == 2


def test_hops_are_not_counted_for_ever() -> None:
    tree = make()

    follow(tree, 1, hops=HOPS_MAX)

    assert tree.hops == HOPS_MAX


def test_a_link_is_eager_if_it_leads_to_the_parent_or_a_child_or_while_the_tree_is_torn() -> None:
    tree = make()
    follow(tree, 1)
    tree.on_beat(2, ROOT, 1, 1, True, 0.0)
    tree.on_beat(3, ROOT, 1, 1, False, 0.0)

    eager = [[tree.is_eager(peer, now) for peer in (1, 2, 3)] for now in (FLOOD / 2, FLOOD)]

    assert eager == [[True, True, True], [True, True, False]]


def test_a_child_that_found_another_parent_is_none() -> None:
    tree = make()
    tree.on_beat(2, ROOT, 1, 1, True, 0.0)

    tree.on_beat(2, ROOT, 2, 1, False, 1.0)

    assert tree.children == set()


# Losing the parent


def test_a_lost_parent_is_replaced_by_who_is_nearer_to_the_root_and_all_links_are_eager() -> None:
    tree = make()
    follow(tree, 1, hops=4)
    follow(tree, 2, hops=5)
    tree.on_beat(3, ROOT, 1, 3, True, 0.0)
    follow(tree, 4, hops=3)

    assert tree.peer_down(1, 10.0)

    assert tree.parent == 4
    assert tree.is_eager(2, 10.0 + FLOOD - 0.01)
    assert not tree.is_eager(2, 10.0 + FLOOD)


def test_without_a_replacement_all_links_are_eager_until_the_next_wave() -> None:
    tree = make()
    follow(tree, 1)
    tree.on_beat(2, ROOT, 1, 1, True, 0.0)
    follow(tree, 3, hops=1)

    tree.peer_down(1, 1.0)

    assert tree.parent is None
    assert tree.is_eager(3, 1.0 + 10 * FLOOD)
    assert follow(tree, 3, wave=2, hops=4, now=2.0)
    assert tree.parent == 3
    assert not tree.is_flooding(1.0 + FLOOD)


def test_losing_another_link_changes_nothing() -> None:
    tree = make()
    follow(tree, 1)
    follow(tree, 2, hops=1)

    assert not tree.peer_down(2, 10.0)

    assert tree.parent == 1 and not tree.is_flooding(10.0)


def test_the_link_that_was_to_lead_to_the_parent_may_break_before_it_does() -> None:
    tree = make()
    follow(tree, 1, wave=1)
    follow(tree, 2, wave=2, now=1.0)

    tree.peer_down(2, 1.01)

    assert tree.tick(1.0 + PATIENCE) == []
    assert tree.parent == 1


# Losing the root


def test_of_a_silent_root_everybody_takes_leave_and_the_next_lowest_is_elected() -> None:
    tree = make(session=9)
    follow(tree, 1, now=5.0)
    lost = 5.0 + ROOT_SILENCE
    assert tree.next_deadline() == lost
    assert tree.tick(lost - 0.01) == [] and tree.root == ROOT

    assert tree.tick(lost) == [1]

    assert (tree.root, tree.parent, tree.is_flooding(lost)) == (tree.me, None, True)
    assert tree.on_beat(2, Root(AGENT, 8), 3, 0, False, lost + 1)
    assert tree.root == Root(AGENT, 8)


def test_old_waves_that_others_still_tell_of_do_not_bring_a_dead_root_back() -> None:
    tree = make()
    follow(tree, 1, wave=7)
    tree.tick(ROOT_SILENCE)

    for peer in (1, 2, 3):
        assert not follow(tree, peer, wave=7, hops=peer, now=4.0)

    assert tree.root == tree.me
    assert follow(tree, 1, wave=8, now=5.0), "it was not dead after all"
    assert tree.root == ROOT


def test_who_was_root_before_starts_above_its_former_waves() -> None:
    tree = make()
    tree.start_wave(0.0)
    tree.start_wave(1.0)
    follow(tree, 1, wave=50, now=1.5)
    tree.tick(1.5 + ROOT_SILENCE)

    assert tree.start_wave(6.0)
    assert tree.wave == 3


def test_waves_that_come_from_higher_roots_do_not_keep_a_silent_one_alive() -> None:
    tree = make()
    follow(tree, 1, now=0.0)

    for wave in range(1, 4):
        assert not tree.on_beat(2, Root(AGENT, 99), wave, 0, False, float(wave))

    assert tree.next_deadline() == ROOT_SILENCE


def test_a_pause_of_ones_own_is_no_silence_of_the_root() -> None:
    tree = make()
    follow(tree, 1, now=0.0)

    tree.slept(10.0)

    assert tree.tick(10.0 + ROOT_SILENCE - 0.1) == []
    assert tree.root == ROOT


def test_a_crowd_of_would_be_roots_is_forgotten_and_the_present_one_is_not() -> None:
    tree = make()
    follow(tree, 1, wave=5)

    for session in range(2 * ROOTS_MAX):
        tree.on_beat(2, Root(AGENT, 100 + session), 1, 0, False, 0.0)
        assert not follow(tree, 2, wave=4, hops=1)

    assert (tree.root, tree.wave, tree.parent) == (ROOT, 5, 1)


# Many trees: nothing but heartbeats on links that take their time


class Fleet:
    """Trees that send each other heartbeats over links, each with its latency, as `mesh` does."""

    def __init__(self, edges: Iterable[tuple[int, int, float]], rng: random.Random) -> None:
        self.now = 0.0
        self.trees: dict[int, Tree] = {}
        self.links: dict[int, dict[int, float]] = {}
        self._rng = rng
        self._beat_at: dict[int, float] = {}
        self._order = count()
        # (when, order, receiver, sender, root, wave, hops, is_parent)
        self._heap: list[tuple[float, int, int, int, Root, int, int, bool]] = []
        for one, two, latency in edges:
            self.link(one, two, latency)

    def link(self, one: int, two: int, latency: float) -> None:
        for node in (one, two):
            if node not in self.trees:
                root = Root(self._rng.choice((RELAY, AGENT)), self._rng.getrandbits(64))
                self.trees[node] = Tree(root, 1.0, self.now)
                self.links[node] = {}
                self._beat_at[node] = self.now + self._rng.random()
        self.links[one][two] = self.links[two][one] = latency
        self._beat(one, two)
        self._beat(two, one)

    def kill(self, node: int) -> None:
        del self.trees[node], self._beat_at[node]
        for other in self.links.pop(node):
            del self.links[other][node]
            tree = self.trees[other]
            if tree.peer_down(node, self.now) and tree.parent is not None:
                self._beat(other, tree.parent)

    def _beat(self, node: int, other: int) -> None:
        tree, at = self.trees[node], self.now + self.links[node][other]
        told = (tree.root, tree.wave, tree.hops, tree.parent == other)
        heapq.heappush(self._heap, (at, next(self._order), other, node, *told))

    def _beat_all(self, node: int) -> None:
        tree = self.trees[node]
        self._beat_at[node] = self.now + (1.0 if tree.root == tree.me else BEAT_SLACK)
        for other in self.links[node]:
            self._beat(node, other)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            deadlines = {n: min(t.next_deadline(), self._beat_at[n]) for n, t in self.trees.items()}
            node = min(deadlines, key=deadlines.__getitem__)
            at = self._heap[0][0] if self._heap else math.inf
            if min(at, deadlines[node]) > end:
                break
            if at <= deadlines[node]:
                self.now = at
                self._receive(*heapq.heappop(self._heap)[2:])
            else:
                self.now = deadlines[node]
                self._tick(node)
        self.now = end

    def _receive(
        self, node: int, sender: int, root: Root, wave: int, hops: int, is_parent: bool
    ) -> None:
        if node not in self.trees or sender not in self.links[node]:
            return
        if self.trees[node].on_beat(sender, root, wave, hops, is_parent, self.now):
            self._beat_all(node)

    def _tick(self, node: int) -> None:
        tree = self.trees[node]
        for peer in tree.tick(self.now):
            if peer in self.links[node]:
                self._beat(node, peer)
        if self._beat_at[node] <= self.now:
            tree.start_wave(self.now)
            self._beat_all(node)

    # What must be true

    def is_connected(self) -> bool:
        seen: set[int] = set()
        queue = [next(iter(self.trees))]
        while queue:
            node = queue.pop()
            if node not in seen:
                seen.add(node)
                queue += self.links[node]
        return len(seen) == len(self.trees)

    def assert_one_tree(self) -> None:
        trees = self.trees
        assert {tree.root for tree in trees.values()} == {min(tree.me for tree in trees.values())}
        (root,) = (node for node, tree in trees.items() if tree.parent is None)
        for node, tree in trees.items():
            at, steps = node, 0
            while (parent := trees[at].parent) is not None:
                assert parent in self.links[at]
                at, steps = parent, steps + 1
                assert steps < len(trees), f"a circle above {node}"
            assert at == root
            children = {other for other in self.links[node] if trees[other].parent == node}
            assert tree.children == children

    def assert_calm(self) -> None:
        """Both ends of a link agree whether it is eager, and no more are than a tree has."""
        eager = {
            (node, other)
            for node, tree in self.trees.items()
            for other in self.links[node]
            if tree.is_eager(other, self.now)
        }
        assert all((two, one) in eager for one, two in eager)
        assert len(eager) == 2 * (len(self.trees) - 1)


def draw_edges(
    rng: random.Random, nodes: int, slowest: float, first: int = 0
) -> list[tuple[int, int, float]]:
    """A random connected graph, from a mere tree to a dense one."""
    pairs = {(first + rng.randrange(node), first + node) for node in range(1, nodes)}
    for _ in range(rng.randrange(3 * nodes)):
        one, two = sorted(rng.sample(range(nodes), 2))
        pairs.add((first + one, first + two))
    return [(one, two, rng.uniform(0.0002, slowest)) for one, two in sorted(pairs)]


LAWS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SLOWEST = st.sampled_from([0.001, 0.01, 0.05])
SETTLING = 6.0


@LAWS
@given(seed=st.integers(0, 2**32), nodes=st.integers(3, 40), slowest=SLOWEST)
def test_any_connected_mesh_grows_one_tree(seed: int, nodes: int, slowest: float) -> None:
    rng = random.Random(seed)
    fleet = Fleet(draw_edges(rng, nodes, slowest), rng)

    fleet.run(SETTLING)

    fleet.assert_one_tree()
    fleet.assert_calm()


@LAWS
@given(seed=st.integers(0, 2**32), nodes=st.integers(4, 40), slowest=SLOWEST)
def test_after_any_deaths_there_is_one_tree_again(seed: int, nodes: int, slowest: float) -> None:
    rng = random.Random(seed)
    fleet = Fleet(draw_edges(rng, nodes, slowest), rng)
    fleet.run(SETTLING)
    root = next(node for node, tree in fleet.trees.items() if tree.parent is None)

    for node in [root, *rng.sample(range(nodes), nodes // 4)]:
        if node in fleet.trees and len(fleet.trees) > 2:
            links = dict(fleet.links[node])
            if len(links) == 1 or _survives(fleet, node):
                fleet.kill(node)
                fleet.run(rng.choice((0.0, 0.0, 0.1, 2.0)))
    assert fleet.is_connected()
    fleet.run(SETTLING + nodes * slowest)

    fleet.assert_one_tree()
    fleet.run(FLOOD)
    fleet.assert_calm()


def _survives(fleet: Fleet, node: int) -> bool:
    """Whether the others are still connected without *node*."""
    others = [other for other in fleet.trees if other != node]
    seen, queue = set(), [others[0]]
    while queue:
        at = queue.pop()
        if at not in seen and at != node:
            seen.add(at)
            queue += fleet.links[at]
    return len(seen) == len(others)


@LAWS
@given(seed=st.integers(0, 2**32), nodes=st.integers(2, 20), slowest=SLOWEST)
def test_two_meshes_that_meet_have_one_tree(seed: int, nodes: int, slowest: float) -> None:
    rng = random.Random(seed)
    edges = draw_edges(rng, nodes, slowest) + draw_edges(rng, nodes, slowest, first=nodes)
    fleet = Fleet(edges, rng)
    fleet.run(SETTLING)

    for _ in range(rng.choice((1, 3))):
        fleet.link(rng.randrange(nodes), nodes + rng.randrange(nodes), rng.uniform(0.0002, slowest))
    fleet.run(FLOOD + 1 + nodes * slowest)

    fleet.assert_one_tree()
    fleet.assert_calm()


def test_a_circle_of_parents_does_not_last() -> None:
    """As after several deaths at once: 1, 2 and 3 were each other's parents, and all of them got
    every wave from outside too; on a fast network each parent passed it on in time."""
    fast = [(1, 2, 0.001), (2, 3, 0.001), (1, 3, 0.001)]
    fleet = Fleet([(0, 1, 0.004), (0, 2, 0.004), (0, 3, 0.004), *fast], random.Random(1))
    fleet.trees[0].me = fleet.trees[0].root = ROOT
    fleet.run(SETTLING)

    for node, parent in ((1, 2), (2, 3), (3, 1)):
        fleet.trees[node].parent = parent
    fleet.run(3.0)

    fleet.assert_one_tree()


def test_flapping_links_leave_one_tree_and_no_lasting_flood() -> None:
    rng = random.Random(5)
    edges = draw_edges(rng, 20, 0.02)
    fleet = Fleet(edges, rng)
    fleet.run(SETTLING)

    for _ in range(200):
        one, two, latency = rng.choice(edges)
        for here, there in ((one, two), (two, one)):
            if fleet.links[here].pop(there, None):
                fleet.trees[here].peer_down(there, fleet.now)
        fleet.run(0.05)
        fleet.link(one, two, latency)
    fleet.run(FLOOD + 1)

    fleet.assert_one_tree()
    fleet.assert_calm()
