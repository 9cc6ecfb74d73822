"""
Clocks that are wrong, and writers who say they are: a key is nobody's hostage, and no clock is
dragged along (A58 and A59 of the threat model).

What covers what is told by causality, never by stamps: a stamp only decides between values that did
not know of each other. So a stamp of the year 2100 wins until somebody who has seen the value
writes, and then it is gone, whatever that writer's clock says.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from harness import Agent, asynchronous, exchange
from hypothesis import given, settings
from hypothesis import strategies as st

from crdtstate import ClockSkew, Config, Replica
from crdtstate.clock import COUNTER_BITS, STAMP_MAX, HybridClock
from crdtstate.document import Document

FAST = Config(heartbeat=0.1, want_delay=0.02, want_retry=0.1, tidy_delay=0.1)

TEN_YEARS_MS = 10 * 365 * 86_400_000
YEAR_2100_MS = 4_102_444_800_000

_numbers = itertools.count()


class Wrong(Agent):
    """An agent whose wall clock is far off."""

    def __init__(self, writer: int, ahead_ms: int) -> None:
        super().__init__(writer)
        right = self._wall
        self._wall = lambda: max(0, right() + ahead_ms)


def forge(document: Document, value: Any, stamp: int) -> None:
    """Write as if the clock said *stamp*, which is in the change and in the slot."""
    document.map("plan")["goal"] = value
    slot = document.lanes.own_slot("mplan\0goal")
    assert slot is not None
    document._open_stamp = stamp
    document.lanes.set_own("mplan\0goal", slot._replace(stamp=stamp))


def make(writer: int, wall_ms: int) -> Document:
    return Document(
        "main",
        writer=writer,
        agent=f"agent-{writer}",
        clock=HybridClock(),
        wall=lambda: wall_ms,
        on_write=lambda document: None,
    )


@pytest.mark.parametrize("ahead_ms", [TEN_YEARS_MS, YEAR_2100_MS, 2**46])
def test_a_later_write_covers_one_of_the_future_whatever_its_stamp(ahead_ms: int) -> None:
    one, two, fast = Agent(1), Agent(2), Wrong(3, ahead_ms)
    fast.map("plan")["goal"] = "mine for ever"
    exchange(one, two, fast)
    assert one.map("plan")["goal"] == "mine for ever"

    two.map("plan")["goal"] = "ours"
    exchange(one, two, fast)

    for agent in (one, two, fast):
        assert agent.map("plan")["goal"] == "ours"
        assert agent.conflicts() == []
    written = two.map("plan").live("goal")[0].stamp
    assert written.wall_ms < ahead_ms


def test_the_highest_stamp_there_is_is_written_over_like_any_other() -> None:
    one, evil = make(1, 1_000), make(2, 1_000)
    forge(evil, "mine", STAMP_MAX)
    change = evil.seal()
    assert change is not None and change.stamp == STAMP_MAX
    one.apply(change)

    one.map("plan")["goal"] = "ours"
    mine = one.seal()
    assert mine is not None
    evil.apply(mine)

    for document in (one, evil):
        assert document.map("plan")["goal"] == "ours" and not document.conflicts()
    assert mine.stamp < STAMP_MAX


def test_a_fast_clock_wins_only_against_who_has_not_seen_it() -> None:
    one, fast = Agent(1), Wrong(2, TEN_YEARS_MS)
    fast.map("plan")["goal"] = "fast"
    one.map("plan")["goal"] = "right"
    exchange(one, fast)

    # Both stay to be seen, and the loser is one write away.
    for agent in (one, fast):
        (conflict,) = agent.conflicts()
        assert conflict.value == "fast"
        assert {candidate.value for candidate in conflict.candidates} == {"fast", "right"}
    one.map("plan").resolve("goal", "right")
    exchange(one, fast)
    for agent in (one, fast):
        assert agent.map("plan")["goal"] == "right" and agent.conflicts() == []


def test_a_clock_of_1970_loses_where_nobody_had_seen_it_and_counts_where_it_is_later() -> None:
    one, slow = Agent(1), Wrong(2, -(2**46))
    slow.map("plan")["goal"] = "slow"
    one.map("plan")["goal"] = "right"
    exchange(one, slow)
    assert slow.map("plan")["goal"] == one.map("plan")["goal"] == "right"
    assert slow.map("plan").live("goal")[0].stamp.wall_ms < 1000

    slow.map("plan")["goal"] = "seen and changed"
    exchange(one, slow)
    assert one.map("plan")["goal"] == "seen and changed" and one.conflicts() == []


def test_nobody_follows_a_clock_that_is_far_ahead() -> None:
    clock, wall = HybridClock(), 1_000_000
    before = clock.issue(wall)

    for ahead in (60_001, TEN_YEARS_MS, 2**46):
        assert not clock.observe((wall + ahead) << COUNTER_BITS, wall)
    assert not clock.observe(STAMP_MAX, wall)

    after = clock.issue(wall)
    assert before < after and after.wall_ms == wall
    # One that is a little ahead is followed, by no more than that.
    assert clock.observe((wall + 60_000) << COUNTER_BITS, wall)
    assert clock.issue(wall).wall_ms == wall + 60_000


def test_an_own_clock_that_was_in_2100_holds_nothing_up_when_it_is_right_again() -> None:
    walls = iter([YEAR_2100_MS] * 2 + [1_000_000] * 50)
    one = Document(
        "main",
        writer=1,
        agent="a",
        clock=HybridClock(),
        wall=lambda: next(walls),
        on_write=lambda document: None,
    )
    two = make(2, 1_000_000)
    for value in range(5):
        one.map("plan")["goal"] = value
        change = one.seal()
        assert change is not None
        two.apply(change)
        two.map("plan")["goal"] = -value
        back = two.seal()
        assert back is not None
        one.apply(back)
        assert one.map("plan")["goal"] == two.map("plan")["goal"] == -value
        # Its own stamps go on from there, one by one; nobody else's do.
        assert change.stamp >> COUNTER_BITS >= YEAR_2100_MS
        assert back.stamp >> COUNTER_BITS == 1_000_000


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_who_saw_it_last_has_the_last_word_whatever_all_clocks_say(seed: int) -> None:
    rng = random.Random(seed)
    agents = [Wrong(n, rng.choice((0, -(2**46), TEN_YEARS_MS, 2**46))) for n in range(1, 5)]
    for step in range(12):
        writer = rng.choice(agents)
        writer.map("plan")["goal"] = step
        exchange(*agents)
        for agent in agents:
            assert agent.map("plan")["goal"] == step and agent.conflicts() == []


@asynchronous
async def test_a_replica_ten_years_ahead_drags_nobody_and_keeps_no_key() -> None:
    url = f"memory://fast-clock-{os.getpid()}-{next(_numbers)}"
    async with AsyncExitStack() as stack:
        ann = await stack.enter_async_context(Replica("ann", listen=url, config=FAST))
        bob = await stack.enter_async_context(Replica("bob", peers=[url], config=FAST))
        eve = Replica("eve", peers=[url], config=FAST)
        eve._wall = lambda: time.time_ns() // 1_000_000 + TEN_YEARS_MS
        await stack.enter_async_context(eve)
        skews: list[ClockSkew] = []
        bob.on(ClockSkew, skews.append)

        eve.map("plan")["goal"] = "eve's"
        await bob.wait_for(eve.version(), timeout=30)
        assert bob.map("plan")["goal"] == "eve's"
        bob.map("plan")["goal"] = "ours"
        for replica in (ann, eve):
            await replica.wait_for(bob.version(), timeout=30)

        for replica in (ann, bob, eve):
            assert replica.map("plan")["goal"] == "ours" and replica.conflicts() == []
        now = time.time_ns() // 1_000_000
        for replica in (ann, bob):
            assert abs(replica.next_stamp().wall_ms - now) < 60_000
        assert abs(bob.map("plan").live("goal")[0].stamp.wall_ms - now) < 60_000
        assert skews and skews[0].agent == "eve"
        assert abs(skews[0].ahead_s - TEN_YEARS_MS / 1000) < 60


@asynchronous
async def test_a_replica_that_opens_with_stamps_of_the_future_is_not_dragged_either(
    tmp_path: Path,
) -> None:
    url = f"memory://fast-clock-{os.getpid()}-{next(_numbers)}"
    store = tmp_path / "ann.db"
    eve = Replica("eve", listen=url, config=FAST)
    eve._wall = lambda: time.time_ns() // 1_000_000 + TEN_YEARS_MS
    async with eve, Replica("ann", store=store, peers=[url], config=FAST) as ann:
        eve.map("plan")["goal"] = "eve's"
        await ann.wait_for(eve.version(), timeout=30)
        ann.map("plan")["mine"] = 1
        await ann.durable(timeout=30)
        own = ann.map("plan").live("mine")[0].stamp

    async with Replica("ann", store=store, config=FAST) as ann:
        now = time.time_ns() // 1_000_000
        assert abs(ann.next_stamp().wall_ms - now) < 60_000
        assert ann.next_stamp() > own


@asynchronous
async def test_a_replica_goes_on_above_its_own_stamps_also_if_its_clock_went_back(
    tmp_path: Path,
) -> None:
    store = tmp_path / "ann.db"
    fast = Replica("ann", store=store, config=FAST)
    fast._wall = lambda: time.time_ns() // 1_000_000 + TEN_YEARS_MS
    async with fast:
        fast.map("plan")["mine"] = 1
        own = fast.map("plan").live("mine")[0].stamp

    async with Replica("ann", store=store, config=FAST) as ann:
        assert ann.next_stamp() > own
