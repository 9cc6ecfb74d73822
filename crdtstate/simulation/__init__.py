"""
A fleet in virtual time, for tests and notebooks: one seed, one history.

    sim = Simulation(seed=7, agents=5)
    sim["agent-0"].map("plan")["goal"] = "left"
    sim.settle()

`world` is the fleet and what befalls it, `shell` a replica in it, `network`, `disk` and `schedule`
what that runs on. `oracle` holds every replica against what must be true, `campaign` makes
histories that are as nasty as chance can, `diagram` shows one.
"""

from crdtstate.simulation.campaign import CampaignReport, Failure, Outcome, run_campaign, run_seed
from crdtstate.simulation.shell import SimulatedReplica
from crdtstate.simulation.world import Simulation

__all__ = [
    "CampaignReport",
    "Failure",
    "Outcome",
    "SimulatedReplica",
    "Simulation",
    "run_campaign",
    "run_seed",
]
