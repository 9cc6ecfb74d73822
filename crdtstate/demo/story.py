"""
What happens in the demo, from the first process to the verdict.

Agents survey a tree. When a fifth of the files is done two of them lose the network, and go on
without; at two fifths another is killed, and starts again from its store a little later; at three
fifths the network is back. Then all replicas must be equal, and what they hold must be exactly what
one process finds alone. Nothing is paced by the clock: only a cut lasts two seconds at least.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from crdtstate.clock import Cut
from crdtstate.demo import survey
from crdtstate.demo.fleet import DemoFailure, Fleet, Member, last_line
from crdtstate.demo.survey import DOCUMENT, Survey, differences, names, read
from crdtstate.relay import digests
from crdtstate.replica import Replica
from crdtstate.stores.journal import verify

CUT_AT, KILL_AT, RESTART_AT, MEND_AT = 0.2, 0.4, 0.5, 0.6
"""Shares of the files done, at which these things happen."""

CUT_MIN = 2.0
"""Seconds that a cut lasts at least."""

ROUNDS_MAX = 100
"""Comparisons of replicas that tidy up meanwhile; a few are the rule."""

PINGS = 50
"""Changes by which the latency at rest is measured."""


@dataclass(slots=True)
class Outage:
    """A time in which an agent was not connected. Wall times in milliseconds."""

    agent: str
    begin_ms: float
    end_ms: float = float("inf")
    # Files it had done before.
    files: int = 0

    def held_up(self, written_ms: float, *agents: str) -> bool:
        """Whether a change between these agents may have had to wait for the end of this."""
        return self.agent in agents and self.begin_ms - 1000 <= written_ms <= self.end_ms


@dataclass(slots=True)
class Report:
    """What the demo showed. Times are in seconds."""

    agents: int
    path: str
    seed: int
    files: int = 0
    lines: int = 0
    functions: int = 0
    classes: int = 0
    unparsable: int = 0
    modules: int = 0
    largest: str = ""
    changes: int = 0
    changes_per_s: float = 0.0
    start_s: float = 0.0
    survey_s: float = 0.0
    cut: list[str] = field(default_factory=list)
    cut_s: float = 0.0
    files_while_cut: int = 0
    mend_s: float = 0.0
    killed: str = ""
    files_when_killed: int = 0
    files_in_store: int = 0
    restart_s: float = 0.0
    recovery_s: float = 0.0
    converge_s: float = 0.0
    newcomer_s: float = 0.0
    at_work_ms: dict[str, float] = field(default_factory=dict)
    at_rest_ms: dict[str, float] = field(default_factory=dict)
    replicas: int = 0
    digest: str = ""
    stores_verified: int = 0
    elapsed_s: float = 0.0
    differences: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all was as it must be."""
        return not self.differences


class Story:
    """One run of the demo.

    Args:
        fleet: The processes, none of them started.
        seed: Chooses who is cut off and who is killed.
        say: Told what happens, in one line.
    """

    def __init__(self, fleet: Fleet, seed: int, say: Callable[[str], object]) -> None:
        self.fleet = fleet
        self.report = Report(len(fleet.agents), str(fleet.root), seed)
        self.began = time.monotonic()
        self._say = say
        chosen = random.Random(seed).sample(fleet.agents, 3)
        self.cut_off, self.killed = chosen[:2], chosen[2]
        self._outages: list[Outage] = []

    async def tell(self) -> None:
        """Let it all happen; `report` says what came of it.

        Raises:
            DemoFailure: Something could not even be compared.
        """
        report = self.report
        await self._start()
        reference = asyncio.create_task(self._survey_alone())
        try:
            await self._work()
            await self._converge()
            if not reference.done():
                self._say("all replicas are equal; one process still surveys the tree alone")
            wanted = await reference
        finally:
            await _cancel(reference)
        found = await self._join_as_newcomer()
        report.differences += differences(wanted, found)
        self._sum_up(found)
        await self._measure_latency()

    async def end(self) -> None:
        """Stop everybody in order, and look at what they leave behind."""
        await self.fleet.stop()
        self._verify_stores()
        self.report.elapsed_s = self._elapsed(self.began)

    def _elapsed(self, since: float) -> float:
        return round(time.monotonic() - since, 3)

    # The acts

    async def _start(self) -> None:
        fleet = self.fleet
        if not names(fleet.root):
            raise DemoFailure(f"{fleet.root}: no Python files there")
        await fleet.start_relay()
        for agent in self.cut_off:
            await fleet.add_proxy(agent)
        for agent in fleet.agents:
            await fleet.start_agent(agent)
        await fleet.until(
            lambda: all("ready" in agent.said and agent.peers for agent in fleet.agents),
            "the agents to connect",
        )
        self.report.start_s = self._elapsed(self.began)
        self._say(f"{len(fleet.agents)} agents connected to a relay at {fleet.url}")

    async def _survey_alone(self) -> Survey:
        """What one process finds, without any replica."""
        with (self.fleet.folder / "alone.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", survey.__file__, str(self.fleet.root)),
                stdin=PIPE,
                stdout=PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert process.stdout is not None
        try:
            output = await process.stdout.read()
            await process.wait()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        if process.returncode:
            why = last_line(self.fleet.folder / "alone.log")
            raise DemoFailure(f"the survey of one process failed: {why}")
        return Survey(**json.loads(output))

    async def _work(self) -> None:
        fleet, report = self.fleet, self.report
        begin = time.monotonic()
        for agent in fleet.agents:
            fleet.tell(agent, "go")
        await self._until_done(CUT_AT)
        cut = await self._cut()
        await self._until_done(KILL_AT)
        await self._kill()
        await self._until_done(RESTART_AT)
        recovery = asyncio.create_task(self._restart())
        try:
            await self._until_done(MEND_AT)
            await asyncio.sleep(max(0.0, cut + CUT_MIN - time.monotonic()))
            await self._mend(cut)
            await recovery
        finally:
            await _cancel(recovery)
        await fleet.until(
            lambda: all(agent.is_done for agent in fleet.agents), "all files to be done", 3600
        )
        report.survey_s = self._elapsed(begin)
        self._say(f"all {fleet.of} files done")

    async def _until_done(self, share: float) -> None:
        """Wait until that share of the files is done, or nobody is left who could go on."""
        fleet = self.fleet
        await fleet.until(
            lambda: (
                fleet.done >= share * fleet.of
                or all(agent.is_done or agent.trouble == "killed" for agent in fleet.agents)
            ),
            f"{share:.0%} of the files",
            3600,
        )

    async def _cut(self) -> float:
        cut = time.monotonic()
        for agent in self.cut_off:
            self.fleet.proxies[agent.name].cut()
            agent.trouble = "cut off"
            self._outages.append(Outage(agent.name, time.time() * 1000, files=agent.done))
        await self.fleet.until(
            lambda: all(agent.peers == 0 for agent in self.cut_off), "the cut to be noticed"
        )
        self.report.cut = [agent.name for agent in self.cut_off]
        self._say(f"{' and '.join(self.report.cut)} lost the network, and go on without")
        return cut

    async def _kill(self) -> None:
        agent = self.killed
        self._outages.append(Outage(agent.name, time.time() * 1000))
        await self.fleet.kill(agent)
        agent.trouble = "killed"
        self.report.killed = agent.name
        self.report.files_when_killed = agent.done
        self._say(f"{agent.name} was killed (SIGKILL) after {agent.done} of {agent.of} files")

    async def _restart(self) -> None:
        agent, fleet, report = self.killed, self.fleet, self.report
        others = fleet.newest(without=[agent, *self.cut_off])
        begin = time.monotonic()
        await fleet.start_agent(agent, until=others)
        agent.trouble = "recovering"
        await fleet.until(lambda: "ready" in agent.said, f"{agent.name} to start again")
        report.files_in_store = agent.done
        report.restart_s = self._elapsed(begin)
        await fleet.until(lambda: "recovered" in agent.said, f"{agent.name} to recover")
        report.recovery_s = self._elapsed(begin)
        self._close_outages([agent])
        agent.trouble = "recovered"
        fleet.tell(agent, "go")
        self._say(
            f"{agent.name} is back: {report.files_in_store} files from its store, and equal with "
            f"the others {report.recovery_s:.2f} s after its start"
        )

    async def _mend(self, cut: float) -> None:
        fleet, report = self.fleet, self.report
        newest = fleet.newest(without=[self.killed])
        before = {agent.name: agent.done for agent in self.cut_off}
        begin = time.monotonic()
        report.cut_s = round(begin - cut, 3)
        for agent in self.cut_off:
            await fleet.proxies[agent.name].mend()
            agent.trouble = "catching up"
        caught_up = (*self.cut_off, fleet.relay)
        await fleet.until(
            lambda: all(newest <= member.version for member in caught_up), "those cut off to return"
        )
        report.mend_s = self._elapsed(begin)
        for outage in self._outages:
            if outage.agent in before:
                report.files_while_cut += before[outage.agent] - outage.files
        self._close_outages(self.cut_off)
        for agent in self.cut_off:
            agent.trouble = ""
        self._say(
            f"the network was back after {report.cut_s:.1f} s, and {' and '.join(report.cut)} had "
            f"what the others had {report.mend_s:.2f} s later"
        )

    def _close_outages(self, agents: list[Member]) -> None:
        for outage in self._outages:
            if any(agent.name == outage.agent for agent in agents):
                outage.end_ms = min(outage.end_ms, time.time() * 1000)

    # The verdict

    async def _converge(self) -> None:
        """Wait until all replicas have the same changes, then compare what they made of them."""
        fleet, report = self.fleet, self.report
        begin = time.monotonic()
        for _ in range(ROUNDS_MAX):
            await fleet.until(
                lambda: all(fleet.lag(member) == 0 for member in fleet.members),
                "all replicas to have all changes",
            )
            found = {agent.name: await fleet.ask(agent, "digest") for agent in fleet.agents}
            found["relay"] = await fleet.get("/digest")
            # Else somebody has just tidied up, which is a change too.
            if len({answer["version"] for answer in found.values()}) == 1:
                break
        else:
            raise DemoFailure("the replicas make changes without end")
        report.converge_s = self._elapsed(begin)
        report.replicas = len(found)
        report.digest = found["relay"]["documents"][DOCUMENT]
        report.changes = Cut.parse(found["relay"]["version"])[DOCUMENT].total
        report.changes_per_s = round(report.changes / report.survey_s, 1)
        report.differences += [
            f"{name} has the changes that the relay has, and other content"
            for name, answer in found.items()
            if answer["documents"][DOCUMENT] != report.digest
        ]

    async def _join_as_newcomer(self) -> Survey:
        """Read the shared survey as a replica that has only just heard of it."""
        begin = time.monotonic()
        async with Replica("newcomer", peers=[self.fleet.url]) as replica:
            for _ in range(ROUNDS_MAX):
                await replica.synced(60)
                mine, theirs = digests(replica), await self.fleet.get("/digest")
                if mine["version"] == theirs["version"]:
                    break
            self.report.newcomer_s = self._elapsed(begin)
            if mine != theirs:
                difference = "a newcomer has the changes that the relay has, and other content"
                self.report.differences.append(difference)
            return read(replica.document(DOCUMENT))

    def _sum_up(self, found: Survey) -> None:
        for counter, count in found.counters.items():
            setattr(self.report, counter, count)
        self.report.modules = len(found.modules)
        if found.largest:
            self.report.largest = f"{found.largest[1]} ({found.largest[0]} lines)"

    async def _measure_latency(self) -> None:
        """How long changes took from agent to agent, by the clock of this machine.

        At work: from the stamp of a change, without what had to wait because its writer or its
        reader was cut off or killed. At rest: from just before a write.
        """
        fleet = self.fleet
        for number in range(PINGS):
            await fleet.ask(fleet.agents[number % len(fleet.agents)], "ping")
        at_work: list[float] = []
        at_rest: list[float] = []
        for agent in fleet.agents:
            answer = await fleet.ask(agent, "delays")
            at_rest += answer["rest"]
            for writer, written_ms, delay in answer["work"]:
                if not any(o.held_up(written_ms, writer, agent.name) for o in self._outages):
                    at_work.append(delay)
        self.report.at_work_ms = _percentiles(at_work)
        self.report.at_rest_ms = _percentiles(at_rest)

    def _verify_stores(self) -> None:
        for member in self.fleet.members:
            problems = verify(self.fleet.store(member)).problems
            self.report.differences += [f"{member.name}.db: {problem}" for problem in problems]
            self.report.stores_verified += 1


async def _cancel(task: asyncio.Task[Any]) -> None:
    """End a task; what it failed of has been raised elsewhere."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()


def _percentiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    if not ordered:
        return {}
    found = {f"p{p}": round(ordered[p * (len(ordered) - 1) // 100], 1) for p in (50, 99)}
    return {**found, "arrivals": len(ordered)}
