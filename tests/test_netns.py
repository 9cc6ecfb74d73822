"""
A fleet on hosts of its own: six processes in six network namespaces, and what happens to networks.

Five agents and a relay, each with a store, each in a namespace with an address, all on one bridge
in a seventh: real kernels' TCP, with real black holes, losses and resets. Namespaces are held by
`cat` and end with it, so nothing is left behind whatever happens to the tests. Loss and delay are
netem's; where the kernel has none, those of `netns_cable`.

The scenarios take long because networks do, so all that were selected run at the same time, each
with a fleet of its own, and each test waits for its own. ``pytest -s`` shows what was measured.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest

from crdtstate import Cut, Version

HERE = Path(__file__).parent
AGENTS = ("ann", "bob", "cid", "dot", "eve")
RELAY = "relay"
NAMES = (RELAY, *AGENTS)
ENOUGH = 60.0
"""Seconds after which what should have happened has not."""

EQUAL_WITHIN = 3.0
KILL_SEEN_WITHIN = 1.5
"""A timeout would take ten."""

BLACK_HOLE_SEEN_WITHIN = 12.0
WRITE_EVERY = 0.05
NOWHERE = "02:00:00:00:00:ff"
"""A hardware address that nobody has."""


# What this machine can do


def why_not() -> str | None:
    """What is missing for network namespaces on a bridge; None if nothing is."""
    try:
        with subprocess.Popen(
            [*UNSHARE, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as holder:
            said, problem = holder.communicate(b"here\n", timeout=10)
        if said != b"here\n":
            return f"no network namespace can be made here: {problem.decode().strip()}"
        script = (
            "ip link set lo up && ip link add port type veth peer name eth0 && "
            "ip link add br0 type bridge && ip link set port master br0"
        )
        done = subprocess.run([*UNSHARE, "sh", "-c", script], capture_output=True, timeout=10)
        if done.returncode:
            return f"no veth on a bridge can be made here: {done.stderr.decode().strip()}"
        subprocess.run(["nsenter", "--version"], capture_output=True, check=True, timeout=10)
    except FileNotFoundError as exc:
        return f"{exc.filename} is not installed (packages iproute2 and util-linux)"
    except (OSError, subprocess.SubprocessError) as exc:
        return f"network namespaces cannot be tried here: {exc}"
    return None


def has_netem() -> bool:
    script = "ip link set lo up && tc qdisc add dev lo root netem delay 1ms"
    done = subprocess.run([*UNSHARE, "sh", "-c", script], capture_output=True, timeout=10)
    return done.returncode == 0


def has_tap() -> bool:
    script = "ip tuntap add dev tap0 mode tap && exec 3<>/dev/net/tun"
    done = subprocess.run([*UNSHARE, "sh", "-c", script], capture_output=True, timeout=10)
    return done.returncode == 0


IS_ROOT = os.geteuid() == 0
# Who is not root is root in a user namespace, if the kernel allows that.
UNSHARE = ["unshare", "--net"] if IS_ROOT else ["unshare", "--map-root-user", "--net"]


# Namespaces


class Namespace:
    """A network namespace, held by a process that ends with this one.

    Args:
        beside: Another one, in whose user namespace this one is made.
    """

    def __init__(self, beside: Namespace | None = None) -> None:
        self._beside = beside

    async def __aenter__(self) -> Self:
        if IS_ROOT or self._beside is None:
            command = [*UNSHARE, "cat"]
        else:
            command = [*self._beside._enter("--user"), "unshare", "--net", "cat"]
        self._holder = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert self._holder.stdin and self._holder.stdout
        # Whoever echoes has come so far as to be in it.
        self._holder.stdin.write(b"here\n")
        assert await self._holder.stdout.readline() == b"here\n"
        self.pid = self._holder.pid
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._holder.stdin
        self._holder.stdin.close()
        await self._holder.wait()

    def _enter(self, *options: str) -> list[str]:
        user = [] if IS_ROOT else ["--preserve-credentials"]
        return ["nsenter", "--target", str(self.pid), *user, *options]

    def inside(self, *command: str) -> list[str]:
        """The command that runs *command* in here."""
        return [*self._enter("--net", *([] if IS_ROOT else ["--user"])), *command]

    async def run(self, script: str) -> None:
        """Run lines of shell in here."""
        process = await asyncio.create_subprocess_exec(
            *self.inside("sh", "-ec", script), stderr=asyncio.subprocess.PIPE
        )
        _, problem = await process.communicate()
        assert process.returncode == 0, f"{script}: {problem.decode()}"


class Lines:
    """A process that is told and tells lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, command: list[str]) -> Self:
        pipe = asyncio.subprocess.PIPE
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))

    def tell(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line.encode() + b"\n")

    async def hear(self) -> str:
        """The next line; empty at the end."""
        assert self.process.stdout
        return (await self.process.stdout.readline()).decode()

    async def end(self) -> None:
        """Close its standard input, which ends it in order; kill it if that does not."""
        assert self.process.stdin
        self.process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


# Hosts


class Host:
    """A namespace with an address, and the replica that runs in it.

    Args:
        seeds: The addresses that it is given as peers.
    """

    def __init__(
        self, name: str, number: int, space: Namespace, store: Path, seeds: list[str]
    ) -> None:
        self.name, self.number, self.space = name, number, space
        self.address = f"10.0.0.{number}"
        role = "relay" if name == RELAY else "agent"
        arguments = [name, role, f"ws://{self.address}:8765", str(store), *seeds]
        self._command = space.inside(sys.executable, str(HERE / "netns_host.py"), *arguments)
        # (event, agent, at), of all its processes.
        self.events: list[tuple[str, str, float]] = []
        # Writes that it has said are safe.
        self.wrote = 0
        self.is_running = False
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._told = asyncio.Condition()
        self._numbers = itertools.count(1)

    async def start(self) -> float:
        """Start the process; return when its replica was open."""
        self._answers[0] = opened = asyncio.get_running_loop().create_future()
        self._lines = await Lines.start(self._command)
        self.is_running = True
        self._reading = asyncio.create_task(self._read())
        async with asyncio.timeout(ENOUGH):
            answer = await opened
        assert answer["wrote"] >= self.wrote, f"{self.name} has lost what it said was safe"
        return answer["at"]

    async def kill(self) -> None:
        """Kill it without a word."""
        self.signal(signal.SIGKILL)
        await self.end()

    async def end(self) -> None:
        """End the process in order, if there is one."""
        if self.is_running:
            self.is_running = False
            await self._lines.end()
            await self._reading

    def signal(self, number: signal.Signals) -> None:
        if self._lines.process.returncode is None:
            self._lines.process.send_signal(number)

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._lines.process.pid

    def waited(self) -> float:
        """Seconds that its process was ready to run and there was no CPU for it."""
        try:
            schedstat = Path(f"/proc/{self.pid}/schedstat").read_text()
        except OSError:
            return 0.0
        return int(schedstat.split()[1]) / 1e9

    async def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Let it do something, and wait for what comes of it."""
        number = next(self._numbers)
        self._answers[number] = future = asyncio.get_running_loop().create_future()
        self._lines.tell(json.dumps({"id": number, "do": do, **arguments}))
        async with asyncio.timeout(ENOUGH):
            answer = await future
        assert "error" not in answer, f"{self.name}: {do}: {answer['error']}"
        self.wrote = max(self.wrote, answer.get("wrote", 0))
        return answer

    async def heard(self, event: str, agent: str, since: float) -> float:
        """Wait until it has told of an event; return how long after *since* that was."""
        try:
            async with asyncio.timeout(ENOUGH), self._told:
                while not (found := list(self.times(event, agent, since))):
                    await self._told.wait()
        except TimeoutError:
            raise AssertionError(f"{self.name} never heard {event} of {agent}") from None
        return found[0] - since

    def times(self, event: str, agent: str | None = None, since: float = 0) -> Iterator[float]:
        """When it told of events."""
        for kind, whose, at in self.events:
            if kind == event and agent in (None, whose) and at >= since:
                yield at

    async def _read(self) -> None:
        while line := await self._lines.hear():
            said = json.loads(line)
            if "event" not in said:
                self._answers.pop(said["re"]).set_result(said)
                continue
            async with self._told:
                self.events.append((said["event"], said["agent"], said["at"]))
                self._told.notify_all()
        for answer in self._answers.values():
            answer.cancel()
        self._answers.clear()


class Moment(NamedTuple):
    """When it was, and how long each process of a fleet had waited for a CPU until then."""

    at: float
    waited: dict[int, float]


class Fleet:
    """Six hosts on a bridge."""

    def __init__(self, switch: Namespace, cable: Lines | None) -> None:
        self._switch = switch
        self._cable = cable
        self.impaired_by = "netem" if cable is None else "netns_cable"
        self.hosts: dict[str, Host] = {}
        self.agents: list[Host] = []

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts.values())

    def others(self, host: Host) -> list[Host]:
        return [each for each in self if each is not host]

    @property
    def wrote(self) -> int:
        """Writes of all that are safe."""
        return sum(host.wrote for host in self)

    def moment(self) -> Moment:
        """Now, for `within`."""
        return Moment(time.monotonic(), self._waited())

    def within(self, limit: float, since: Moment) -> float:
        """The limit for something that took from *since* until now. Time in which hosts could not
        run because the machine had other things to do is not theirs."""
        now = self._waited()
        return limit + sum(waited - since.waited.get(pid, 0.0) for pid, waited in now.items())

    def _waited(self) -> dict[int, float]:
        return {host.pid: host.waited() for host in self if host.is_running}

    def number(self, event: str) -> int:
        """How often somebody told of an event."""
        return sum(len(list(host.times(event))) for host in self)

    # The network

    async def plug(self, hosts: Iterable[Host], bridge: str) -> Moment:
        """Put the cables of *hosts* into a bridge. To each other, those in different bridges are
        black holes: nobody is told."""
        lines = [f"ip link set port{host.number} master {bridge}" for host in hosts]
        moment = self.moment()
        await self._switch.run("\n".join(lines))
        return moment

    async def impair(self, loss: float, delay: float) -> Moment:
        """Lose and hold back what hosts send."""
        moment = self.moment()
        if self._cable is not None:
            self._cable.tell(f"{loss} {delay}")
            await self._cable.hear()
        else:
            verb = "add" if loss else "del"
            what = f"netem loss {loss:.0%} delay {delay * 1000:.0f}ms limit 10000" if loss else ""
            await together(h.space.run(f"tc qdisc {verb} dev eth0 root {what}") for h in self)
        return moment

    # The content

    async def start_writing(self) -> None:
        await together(host.ask("start", every=WRITE_EVERY) for host in self)

    async def stop_writing(self) -> str:
        """Let all stop; return the version that has everything."""
        answers = await together(host.ask("stop") for host in self)
        versions: dict[str, Version] = {}
        for answer in answers:
            for name, version in Cut.parse(answer["version"]).items():
                versions.setdefault(name, Version()).merge(version)
        return str(Cut(versions))

    async def equal_at(self, version: str, timeout: float = 30.0) -> float:
        """Wait until all have *version*, and check that all is there; return when the last had."""
        answers = await together(
            host.ask("reach", version=version, timeout=timeout) for host in self
        )
        contents = await together(host.ask("content") for host in self)
        for host, content in zip(self, contents, strict=True):
            assert content["digest"] == contents[0]["digest"], f"{host.name} is not like {RELAY}"
        writes = contents[0]["writes"]
        assert contents[0]["is_whole"], writes
        assert writes == {host.name: host.wrote for host in self if host.wrote}, "lost or doubled"
        assert contents[0]["count"] == sum(writes.values())
        return max(answer["at"] for answer in answers)

    def downs(self, since: float) -> set[tuple[str, str]]:
        """Who was declared down since then: (by whom, who)."""
        return {
            (host.name, agent)
            for host in self
            for event, agent, at in host.events
            if event == "MemberDown" and at >= since
        }

    def story(self, agent: str, since: float) -> str:
        """What all told of one, in order."""
        told = [
            (at, f"{at - since:6.2f} {host.name}: {event}")
            for host in self
            for event, whose, at in host.events
            if whose == agent and at >= since
        ]
        return "\n".join(["", *(line for _, line in sorted(told))])


def pairs(some: Iterable[Host], others: Iterable[Host]) -> set[tuple[str, str]]:
    """Everybody of the ones with everybody of the others, both ways round."""
    one_way = set(itertools.product((host.name for host in some), (host.name for host in others)))
    return one_way | {(second, first) for first, second in one_way}


async def heard(fleet: Fleet, event: str, among: set[tuple[str, str]], since: float) -> list[float]:
    """Wait until all have told of an event of another; return how long after *since*, sorted."""
    return sorted(await together(fleet[by].heard(event, who, since) for by, who in among))


async def together(work: Iterable[Awaitable[Any]]) -> list[Any]:
    return list(await asyncio.gather(*work))


@asynccontextmanager
async def make_fleet(directory: Path, *, is_cabled: bool = False) -> AsyncIterator[Fleet]:
    """Six hosts that run and know each other, everybody connected with everybody.

    Args:
        is_cabled: The hosts' devices are those of `netns_cable`, instead of veths.
    """
    numbers = range(1, len(NAMES) + 1)
    async with AsyncExitStack() as stack:
        switch = await stack.enter_async_context(Namespace())
        await switch.run("for b in br0 br1; do ip link add $b type bridge; ip link set $b up; done")
        cable = None
        if is_cabled:
            script = str(HERE / "netns_cable.py")
            cable = await Lines.start(switch.inside(sys.executable, script, *map(str, numbers)))
            stack.push_async_callback(cable.end)
            assert await cable.hear() == "ready\n"
        fleet = Fleet(switch, cable)
        for number, name in zip(numbers, NAMES, strict=True):
            space = await stack.enter_async_context(Namespace(beside=switch))
            await switch.run(
                ("" if is_cabled else f"ip link add port{number} type veth peer name host{number}")
                + f"""
                ip link set host{number} netns {space.pid} name eth0
                ip link set port{number} master br0
                ip link set port{number} up
                """
            )
            await space.run(
                f"ip addr add 10.0.0.{number}/24 dev eth0; ip link set lo up; ip link set eth0 up"
            )
            seeds = [] if name == RELAY else ["ws://10.0.0.1:8765"]
            host = Host(name, number, space, directory / f"{name}.db", seeds)
            fleet.hosts[name] = host
        fleet.agents = [fleet[name] for name in AGENTS]
        for host in fleet:
            stack.push_async_callback(host.end)
        await fleet[RELAY].start()
        await together(host.start() for host in fleet.agents)
        await together(host.ask("settle", members=len(NAMES)) for host in fleet)
        yield fleet


# Scenarios

Scenario = Callable[[Fleet], Awaitable[str]]
"""What happens to a fleet; returns what was measured."""

SCENARIOS: dict[str, Scenario] = {}
BAD_CABLES = "test_a_tenth_of_packets_lost_and_the_rest_late_is_nobodys_death"


def scenario(run: Scenario) -> Callable[[Stage], None]:
    """A test that waits for a scenario, which is under way together with the others."""
    name = run.__name__
    SCENARIOS[name] = run

    def test(stage: Stage) -> None:
        print("\n" + stage.wait(name))

    test.__name__, test.__doc__, test.__module__ = name, run.__doc__, run.__module__
    return test


class Stage:
    """A thread with a loop, on which scenarios run at the same time.

    Args:
        names: Of the scenarios.
        directory: For their stores.
    """

    def __init__(self, names: list[str], directory: Path) -> None:
        self._directory = directory
        self._outcomes: dict[str, Future[str]] = {name: Future() for name in names}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="netns", daemon=True)
        self._thread.start()

    def wait(self, name: str) -> str:
        """What a scenario measured."""
        if name not in self._outcomes:
            pytest.skip("no bad cables here: neither netem (sch_netem) nor TAP (/dev/net/tun)")
        return self._outcomes[name].result(timeout=3 * ENOUGH)

    def close(self) -> None:
        """End what still runs: no test waits for it any more."""
        with suppress(RuntimeError):  # there is no loop any more
            self._loop.call_soon_threadsafe(self._all.cancel)
        self._thread.join(ENOUGH)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._all = self._loop.create_task(self._run_all())
        try:
            self._loop.run_until_complete(self._all)
        except asyncio.CancelledError:
            pass
        finally:
            self._loop.close()

    async def _run_all(self) -> None:
        # Starting a process is most of what it costs: only then do the clocks run.
        ready = asyncio.Barrier(len(self._outcomes))
        await together(self._run_one(name, ready) for name in self._outcomes)

    async def _run_one(self, name: str, ready: asyncio.Barrier) -> None:
        directory = self._directory / name
        directory.mkdir()
        try:
            async with make_fleet(directory, is_cabled=name == BAD_CABLES and not has_netem()) as f:
                await ready.wait()
                measured = await SCENARIOS[name](f)
            self._outcomes[name].set_result(measured)
        except BaseException as exc:
            if not self._outcomes[name].done():
                self._outcomes[name].set_exception(exc)
            await ready.abort()
            if not isinstance(exc, Exception):
                raise


@pytest.fixture(scope="module")
def stage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    if problem := why_not():
        pytest.skip(problem)
    selected = [item.name for item in request.session.items if item.name in SCENARIOS]
    if BAD_CABLES in selected and not has_netem() and not has_tap():
        selected.remove(BAD_CABLES)
    stage = Stage(selected, tmp_path_factory.mktemp("netns"))
    yield stage
    stage.close()


@scenario
async def test_halves_that_were_apart_for_20_s_are_equal_3_s_after(fleet: Fleet) -> str:
    left, right = [fleet[name] for name in NAMES[:3]], [fleet[name] for name in NAMES[3:]]
    across = pairs(left, right)
    await fleet.start_writing()

    cut = await fleet.plug(right, "br1")
    await asyncio.sleep(20)
    downs = await heard(fleet, "MemberDown", across, cut.at)
    down_limit = fleet.within(BLACK_HOLE_SEEN_WITHIN, cut)
    version = await fleet.stop_writing()
    healed = await fleet.plug(right, "br0")
    took = await fleet.equal_at(version) - healed.at
    equal_limit = fleet.within(EQUAL_WITHIN, healed)
    ups = await heard(fleet, "MemberUp", across, healed.at)

    assert took <= equal_limit
    assert downs[-1] <= down_limit
    assert fleet.downs(0) == across
    return (
        f"halves, 20 s apart: others down after {span(downs)} s, up {span(ups)} s after healing; "
        f"all equal after {took:.2f} s, {fleet.wrote} writes"
    )


@scenario
async def test_a_tenth_of_packets_lost_and_the_rest_late_is_nobodys_death(fleet: Fleet) -> str:
    began = await fleet.impair(0.1, 0.1)
    await fleet.start_writing()
    await asyncio.sleep(15)
    version = await fleet.stop_writing()
    ended = await fleet.impair(0, 0)
    took = await fleet.equal_at(version) - ended.at

    assert took <= fleet.within(EQUAL_WITHIN, ended)
    assert fleet.downs(0) == set()
    suspicions, broken = fleet.number("MemberSuspected"), fleet.number("PeerDisconnected")
    return (
        f"10 % loss and 100 ms, by {fleet.impaired_by}, for {ended.at - began.at:.0f} s: all equal "
        f"{took:.2f} s after its end, nobody down, {suspicions} suspicions, {broken} links broken, "
        f"{fleet.wrote} writes"
    )


@scenario
async def test_two_of_whom_one_hears_the_other_are_down_for_nobody(fleet: Fleet) -> str:
    ann, bob = fleet["ann"], fleet["bob"]
    await fleet.start_writing()

    cut = fleet.moment()
    await ann.space.run(f"ip neigh replace {bob.address} lladdr {NOWHERE} dev eth0 nud permanent")
    await asyncio.sleep(15)
    broke = await bob.heard("PeerDisconnected", "ann", cut.at)
    stopped = fleet.moment()
    detour = await fleet.equal_at(await fleet.stop_writing()) - stopped.at
    detour_limit = fleet.within(EQUAL_WITHIN, stopped)
    await fleet.start_writing()
    healed = fleet.moment()
    await ann.space.run(f"ip neigh del {bob.address} dev eth0")
    took = await fleet.equal_at(await fleet.stop_writing()) - healed.at
    took_limit = fleet.within(EQUAL_WITHIN, healed)
    again = await bob.heard("PeerConnected", "ann", healed.at)

    assert detour <= detour_limit
    assert took <= took_limit
    assert fleet.downs(0) == set()
    return (
        f"nothing from ann to bob: their link broke after {broke:.1f} s, nobody down; all equal "
        f"{detour:.2f} s after the last write while cut, {took:.2f} s after healing; linked again "
        f"after {again:.2f} s"
    )


@scenario
async def test_who_is_killed_is_down_in_a_second_and_misses_nothing_when_back(fleet: Fleet) -> str:
    measured = []
    for victim in (fleet["eve"], fleet[RELAY]):
        mourning = {(host.name, victim.name) for host in fleet.others(victim)}
        await fleet.start_writing()
        await victim.ask("write", count=50)

        killed = fleet.moment()
        await victim.kill()
        downs = await heard(fleet, "MemberDown", mourning, killed.at)
        down_limit = fleet.within(KILL_SEEN_WITHIN, killed)
        dead = fleet.moment()
        back = await victim.start()
        took = await fleet.equal_at(await fleet.stop_writing()) - back
        took_limit = fleet.within(EQUAL_WITHIN, dead)
        ups = await heard(fleet, "MemberUp", mourning, dead.at)
        await together(host.ask("settle", members=len(NAMES)) for host in fleet)

        assert downs[-1] <= down_limit, fleet.story(victim.name, killed.at)
        assert took <= took_limit
        assert fleet.downs(killed.at) == mourning
        measured.append(
            f"{victim.name} killed: down after {span(downs)} s; back, all equal {took:.2f} s after "
            f"its return, up {dead.at + ups[-1] - back:.2f} s after"
        )
    return "\n".join(measured)


@scenario
async def test_a_host_in_a_black_hole_is_down_in_12_s(fleet: Fleet) -> str:
    eve = fleet["eve"]
    apart = pairs([eve], fleet.others(eve))
    await fleet.start_writing()

    cut = await fleet.plug([eve], "br1")
    downs = await heard(fleet, "MemberDown", apart, cut.at)
    down_limit = fleet.within(BLACK_HOLE_SEEN_WITHIN, cut)
    version = await fleet.stop_writing()
    healed = await fleet.plug([eve], "br0")
    took = await fleet.equal_at(version) - healed.at
    equal_limit = fleet.within(EQUAL_WITHIN, healed)
    ups = await heard(fleet, "MemberUp", apart, healed.at)

    assert downs[-1] <= down_limit
    assert took <= equal_limit
    assert fleet.downs(0) == apart
    return (
        f"eve in a black hole: down after {span(downs)} s; all equal {took:.2f} s after healing, "
        f"up after {span(ups)} s"
    )


@scenario
async def test_who_stands_still_for_5_s_is_down_for_nobody(fleet: Fleet) -> str:
    eve = fleet["eve"]
    await fleet.start_writing()

    stopped = time.monotonic()
    eve.signal(signal.SIGSTOP)
    await asyncio.sleep(5)
    woken = fleet.moment()
    suspicious = {
        (h.name, "eve") for h in fleet if list(h.times("MemberSuspected", "eve", stopped + 2))
    }
    eve.signal(signal.SIGCONT)
    took = await fleet.equal_at(await fleet.stop_writing()) - woken.at
    took_limit = fleet.within(EQUAL_WITHIN, woken)
    ups = await heard(fleet, "MemberUp", suspicious, woken.at)

    assert took <= took_limit
    assert fleet.downs(0) == set()
    return (
        f"eve stopped for 5 s: suspected by {len(suspicious)} and up again {span(ups)} s after it "
        f"went on, nobody down; all equal {took:.2f} s after"
    )


def span(times: list[float]) -> str:
    """The first and the last, in short."""
    return f"{times[0]:.2f} to {times[-1]:.2f}" if times else "-"
