"""A fleet of processes under every fault there is, in short; ``python -m benchmarks faults`` is the
long form."""

from __future__ import annotations

from benchmarks.faults import FAULTS, campaign, results_of

SECONDS = 0.2
"""For which each fault stays."""


def test_a_fleet_loses_nothing_and_all_its_checkpoints_can_be_restored() -> None:
    outcome = campaign(agents=3, rounds=1, seconds=SECONDS, seed=7)

    assert outcome.fleet.failures == []
    assert [result.name for result in results_of(outcome) if result.is_met is False] == []
    assert outcome.fleet.faults.keys() == FAULTS.keys()
    assert outcome.fleet.kills >= 5
    assert {"store", "checkpoint"} <= outcome.fleet.sources.keys()
    assert sum(found.altered for found in outcome.inspected) > 0, "nothing was altered at the end"
