"""The simulation: a fleet in virtual time, the campaign of nasty histories, and its mutants."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from mutants import MUTANTS

from crdtstate import Config, ReplicaClosed, UsageError
from crdtstate.simulation import CampaignReport, Outcome, Simulation, run_campaign, run_seed
from crdtstate.simulation.oracle import Violation

SEEDS = 600
MUTANT_SEEDS = 400
"""Seeds in which every mutant must show itself; most do in the first few."""


# The campaign


def _run_seeds(seeds: Iterable[int]) -> tuple[list[Outcome], float]:
    began = time.process_time()
    return [run_seed(seed) for seed in seeds], time.process_time() - began


def test_hundreds_of_nasty_histories_keep_every_invariant() -> None:
    with ProcessPoolExecutor(2) as pool:
        parts = list(pool.map(_run_seeds, (range(0, SEEDS, 2), range(1, SEEDS, 2))))

    report = CampaignReport.of(outcome for outcomes, _ in parts for outcome in outcomes)
    spent = sum(seconds for _, seconds in parts)
    print(f"{SEEDS} seeds in {spent:.1f} s of CPU: {60 * SEEDS / spent:.0f} seeds/min and core")
    assert report.failures == []
    assert report.seeds == SEEDS


@pytest.mark.parametrize("name", MUTANTS)
def test_the_campaign_kills_the_mutant(name: str) -> None:
    script = Path(__file__).with_name("mutants.py")
    ran = subprocess.run(
        [sys.executable, str(script), name, str(MUTANT_SEEDS)],
        capture_output=True,
        text=True,
        check=True,
    )

    killed = json.loads(ran.stdout)
    assert killed is not None, f"{name} survived {MUTANT_SEEDS} seeds"
    seed, invariant, detail = killed
    print(f"{name}: seed {seed}, {invariant}")
    assert invariant != "crash", f"{name} crashed the harness: {detail}"


def test_one_seed_is_one_history() -> None:
    assert run_seed(7).trace == run_seed(7).trace
    assert run_seed(7).trace != run_seed(8).trace


def test_a_history_does_not_depend_on_how_strings_are_hashed() -> None:
    code = "from crdtstate.simulation import run_campaign; print(run_campaign(range(6)).trace)"

    traces = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }

    assert len(traces) == 1


def test_a_calm_full_mesh_sends_each_change_once_to_everybody() -> None:
    report = run_campaign([1], agents=10, changes=40, faults=False)

    assert report.failures == []
    assert report.redundancy == 0.0
    assert 10 <= report.delivery_ms["p50"] <= report.delivery_ms["p99"] <= 100
    assert report.delivery_ms["p50"] <= report.last_ms["p50"] <= report.last_ms["p99"]


def test_in_a_large_fleet_changes_go_along_a_tree() -> None:
    report = run_campaign([1], agents=30, changes=40, faults=False)

    assert report.failures == []
    assert report.redundancy <= 0.01


def test_a_report_is_plain_json() -> None:
    report = run_campaign(range(2)).as_json()

    assert json.loads(json.dumps(report)) == report
    assert set(report) == {
        "seeds",
        "failures",
        "redundancy",
        "delivery_ms",
        "last_ms",
        "bytes_per_change",
        "trace",
    }


def test_the_outcomes_of_several_processes_sum_up_to_the_same_report() -> None:
    outcomes = [run_seed(seed) for seed in (3, 1, 2)]

    assert CampaignReport.of(outcomes) == run_campaign([1, 2, 3])


# A fleet


def test_concurrent_writes_across_a_partition_are_both_kept() -> None:
    sim = Simulation(seed=7, agents=5, latency=(0.01, 0.05), loss=0.02)
    a, b = sim["agent-0"], sim["agent-1"]

    a.map("plan")["goal"] = "left"
    sim.partition({"agent-0"})
    b.map("plan")["goal"] = "right"
    sim.heal()
    sim.settle()

    sim.assert_converged()
    assert {c.value for c in sim["agent-4"].map("plan").conflicts()["goal"]} == {"left", "right"}


def test_a_partition_keeps_groups_apart_until_it_heals() -> None:
    sim = Simulation(agents=4)
    sim.settle()
    sim.partition({"agent-0", "agent-1"}, silently=True)

    sim["agent-0"].map("plan")["goal"] = "ship"
    sim.settle()

    assert sim["agent-1"].map("plan")["goal"] == "ship"
    assert "goal" not in sim["agent-2"].map("plan")
    with pytest.raises(AssertionError, match=r"differ in 'main' at plan\['goal'\]"):
        sim.assert_converged()
    sim.heal()
    sim.settle()
    sim.assert_converged()


@pytest.mark.parametrize("silently", [False, True])
def test_a_partition_longer_than_the_link_timeout_heals(silently: bool) -> None:
    sim = Simulation(agents=3, config=Config(link_timeout=3.0))
    sim.settle()

    sim.partition({"agent-2"}, silently=silently)
    sim["agent-2"].counter("tokens").increment(3)
    sim["agent-0"].counter("tokens").increment(4)
    sim.run(10)
    sim.heal()
    sim.settle()

    assert [replica.counter("tokens").value for replica in sim.replicas] == [7, 7, 7]


def test_a_killed_replica_comes_back_with_what_was_committed() -> None:
    sim = Simulation(agents=2)
    sim["agent-0"].map("plan")["goal"] = "ship"
    sim.settle()
    writer = sim["agent-0"].writer
    stale = sim["agent-0"]

    sim.crash("agent-0")

    with pytest.raises(ReplicaClosed):
        stale.map("plan")["goal"] = "late"
    with pytest.raises(UsageError, match="agent-0 is down"):
        sim["agent-0"]
    back = sim.restart("agent-0")
    assert back is sim["agent-0"]
    assert back.map("plan")["goal"] == "ship"
    assert back.writer == writer


def test_a_power_cut_takes_what_was_not_synced_and_with_it_the_writer() -> None:
    sim = Simulation(seed=3, agents=2)
    sim.settle()
    sim["agent-0"].map("plan")["goal"] = "ship"
    sim.until(lambda: "goal" in sim["agent-1"].map("plan"))
    writer = sim["agent-0"].writer

    sim.crash("agent-0", power=True)
    sim.run(20)
    sim.restart("agent-0")
    sim.settle()

    assert sim["agent-0"].writer != writer
    assert sim["agent-0"].map("plan")["goal"] == "ship"


def test_with_durability_power_nothing_committed_is_lost_and_the_writer_stays() -> None:
    sim = Simulation(agents=2, durability="power")
    sim["agent-0"].map("plan")["goal"] = "ship"
    sim.settle()
    writer = sim["agent-0"].writer

    sim.crash("agent-0", power=True)
    sim.partition({"agent-0"})

    assert sim.restart("agent-0").map("plan")["goal"] == "ship"
    assert sim["agent-0"].writer == writer


def test_a_disk_that_was_rolled_back_unnoticed_is_found_out_and_nothing_is_lost() -> None:
    sim = Simulation(agents=3)
    sim["agent-0"].map("plan")["goal"] = "old"
    sim.settle()
    backup = sim.backup("agent-0")
    sim["agent-0"].map("plan")["goal"] = "new"
    sim.settle()
    sim["agent-0"].counter("tokens").increment(5)
    sim.settle()
    writer = sim["agent-0"].writer

    sim.crash("agent-0")
    sim.put_back("agent-0", backup, unnoticed=True)
    back = sim.restart("agent-0")
    back.map("plan")["note"] = "written before anybody told"
    sim.settle()

    sim.assert_converged()
    assert sim["agent-0"].writer != writer
    plan = sim["agent-2"].map("plan")
    assert dict(plan) == {"goal": "new", "note": "written before anybody told"}
    assert sim["agent-2"].counter("tokens").value == 5
    assert any("IdentityRollback" in str(moment) for moment in sim.events)


@pytest.mark.parametrize("seed", range(10))
def test_a_rollback_loses_nothing_whatever_was_written_before_it_was_found_out(seed: int) -> None:
    rng = random.Random(seed)
    config = Config(log_bytes=rng.choice((1, 500, 2**20)), tidy_delay=0.2)
    sim = Simulation(seed, agents=3, config=config)
    sim["agent-0"].map("plan")["a"] = 0
    sim.settle()
    backup = sim.backup("agent-0")
    for number in range(6):
        for name in ("agent-0", "agent-1"):
            sim[name].map("plan")[rng.choice("abc")] = number
            sim[name].counter("tokens").increment()
        sim.run(0.2)
    sim.settle()

    sim.crash("agent-0")
    sim.put_back("agent-0", backup, unnoticed=True)
    back = sim.restart("agent-0")
    written = rng.randrange(3)
    for number in range(written):
        back.map("plan")["new"] = number
        back.counter("tokens").increment()
        sim.run(0.003)
    sim.settle()

    sim.assert_converged()
    assert sim["agent-2"].counter("tokens").value == 12 + written


def test_a_fleet_around_a_relay_goes_on_when_the_relay_does() -> None:
    sim = Simulation(agents=3, relays=1)
    sim.settle()
    sim.crash("relay-0")
    sim["agent-0"].map("plan")["goal"] = "ship"
    sim.run(5)

    assert "goal" not in sim["agent-1"].map("plan")
    sim.restart("relay-0")
    sim.settle()
    sim.assert_converged()


def test_settling_says_who_lacks_what() -> None:
    sim = Simulation(agents=2)
    sim.settle()
    sim["agent-0"].map("plan")["goal"] = "ship"
    sim.stall("agent-1", 100)

    with pytest.raises(AssertionError, match="agent-1 lacks agent-0's 1 to 1 of 'main'"):
        sim.settle(timeout=2)


def test_waiting_ends_after_its_timeout() -> None:
    sim = Simulation(agents=1)

    with pytest.raises(AssertionError, match="within 1.0 s"):
        sim.until(lambda: False, timeout=1.0)
    assert sim.now == pytest.approx(1.0, abs=0.2)


def test_clocks_may_be_wrong() -> None:
    sim = Simulation(agents=2, skew=1000.0)
    sim.jump_clock("agent-0", 7200)
    sim["agent-0"].register("leader").value = "far ahead"
    sim.settle()

    sim["agent-1"].register("leader").value = "later"
    sim.settle()

    assert sim["agent-0"].register("leader").value == "later"


def test_transactions_arrive_as_a_whole() -> None:
    sim = Simulation(agents=2)
    with sim["agent-0"].transaction(message="replan"):
        sim["agent-0"].map("plan")["goal"] = "ship"
        sim["agent-0"].counter("tokens").increment()
    seen = []

    def look() -> None:
        there = sim["agent-1"]
        seen.append(("goal" in there.map("plan"), there.counter("tokens").value))

    for step in range(100):
        sim.at(step * 0.01, look)
    sim.run(1.0)

    assert set(seen) == {(False, 0), (True, 1)}


@pytest.mark.parametrize(
    "wrong",
    [{"agents": 0}, {"latency": (0.2, 0.1)}, {"loss": 1.0}, {"relays": -1}],
)
def test_impossible_fleets_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Simulation(**wrong)  # type: ignore[arg-type]


def test_unknown_names_are_refused() -> None:
    sim = Simulation(agents=2)

    with pytest.raises(UsageError, match="no 'agent-2' here; there are agent-0, agent-1"):
        sim["agent-2"]
    with pytest.raises(UsageError):
        sim.partition({"agent-9"})
    with pytest.raises(UsageError, match="agent-0 is running"):
        sim.restart("agent-0")


def test_the_oracle_notices_when_content_is_tampered_with() -> None:
    sim = Simulation(agents=2)
    sim["agent-0"].map("plan")["goal"] = "ship"
    sim.settle()

    cells = sim["agent-1"].document("main").lanes.container("mplan").cells
    writer, slot = next(iter(cells["goal"].items()))
    cells["goal"][writer] = slot._replace(value=b"\x01")

    with pytest.raises(Violation, match="I1"):
        sim.settle()


# The diagram


def test_a_diagram_shows_who_wrote_and_saw_what_when() -> None:
    sim = Simulation(agents=2)
    sim["agent-0"].map("plan")["goal"] = "ship"
    sim.settle()
    sim["agent-1"].counter("tokens").increment(3)
    sim["agent-1"].set("skills").add("python")
    sim.settle()
    sim.partition({"agent-0"})
    sim.heal()
    sim.crash("agent-1")
    sim.restart("agent-1")

    lines = str(sim.diagram()).splitlines()

    assert lines[0].split() == ["time", "agent-0", "agent-1"]
    assert "● plan['goal'] = 'ship'" in lines[1]
    assert "○ plan['goal'] = 'ship'" in lines[2]
    text = "\n".join(lines)
    for shown in ("● tokens += 3 (+1)", "≠ partitioned agent-0", "= healed", "✕ crashed"):
        assert shown in text
    assert "↻ restarted" in text


def test_a_diagram_is_a_picture_in_which_values_stay_text() -> None:
    sim = Simulation(agents=2)
    sim["agent-0"].map("plan")["<b>"] = "<script>alert(1)</script>"
    sim.settle()

    picture = sim.diagram()._repr_svg_()

    assert picture.startswith("<svg ") and picture.endswith("</svg>")
    assert "<script" not in picture and "<b>" not in picture
    assert "&lt;script&gt;" in picture
    assert picture in sim.diagram()._repr_html_()


def test_a_diagram_can_show_a_part() -> None:
    sim = Simulation(agents=2)
    sim["agent-0"].map("plan")["goal"] = 1
    sim.settle()
    middle = sim.now
    sim.run(0.1)
    sim["agent-0"].map("plan")["goal"] = 2
    sim.settle()

    assert "= 1" not in str(sim.diagram(since=middle + 0.001))
    assert "= 2" not in str(sim.diagram(until=middle))


def test_moments_are_lines_of_text() -> None:
    sim = Simulation(agents=2)
    sim["agent-0"].map("plan")["goal"] = 1
    sim.settle()

    assert any("agent-0      ● plan['goal'] = 1" in str(moment) for moment in sim.events)
