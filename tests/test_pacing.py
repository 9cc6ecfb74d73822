"""Writes are sealed at once while the loop is quick, and collect while it lags."""

from __future__ import annotations

import asyncio
import time

from crdtstate import Replica
from crdtstate.pacing import LAG, LAGS, Pace


def test_nothing_waits_while_the_loop_is_quick() -> None:
    pace = Pace(0.1)

    for step in range(100):
        pace.waited(LAG)
        pace.sealed(now=step)

        assert pace.until == step


def test_a_pause_doubles_while_the_loop_lags_up_to_the_longest() -> None:
    pace = Pace(0.1)
    pauses = []

    for step in range(5):
        pace.waited(0.003)
        pace.waited(0.001)
        pace.sealed(now=step)
        pauses.append(round(pace.until - step, 6))

    assert pauses == [LAGS * 0.003, 2 * LAGS * 0.003, 4 * LAGS * 0.003, 0.1, 0.1]


def test_a_pause_halves_once_the_loop_is_quick_again_and_ends() -> None:
    pace = Pace(0.1)
    pace.waited(1.0)
    pauses = []

    for step in range(9):
        pace.sealed(now=step)
        pauses.append(round(pace.until - step, 6))

    assert pauses == [0.1, 0.05, 0.025, 0.0125, 0.00625, 0.003125, 0.001563, 0.0, 0.0]


async def _lag(replica: Replica) -> None:
    """Let the pump wait for its turn behind others' work, until it seals no more at once."""
    loop = asyncio.get_running_loop()
    for _ in range(5):
        replica.map("plan")["lag"] = 1
        loop.call_soon(time.sleep, 5 * LAG)
        # The pump comes before what is asked for now.
        await asyncio.sleep(0)
        await asyncio.sleep(0)


def test_what_is_written_while_the_loop_lags_becomes_few_changes() -> None:
    async def main() -> None:
        async with Replica("ann") as replica:
            await _lag(replica)
            before = replica.document("main").version.total

            for step in range(1000):
                replica.map("plan")["step"] = step
                await asyncio.sleep(0)
            after = replica.version()["main"].total

            assert 1 <= after - before <= 20

    asyncio.run(main())


def test_who_waits_for_what_was_written_waits_for_no_pause() -> None:
    async def main() -> None:
        async with Replica("ann") as replica:
            await _lag(replica)
            replica.map("plan")["goal"] = "ship"

            await replica.durable()

            assert replica.document("main").map("plan")["goal"] == "ship"
            assert not replica.document("main").is_open

    asyncio.run(main())
