"""
The processes of the demo: a relay and agents, and what they say.

All are started here and end here: `Fleet.close` asks, waits and kills. If this process is killed,
they end because their standard input does. They are sessions of their own, so Ctrl-C reaches only
the demo.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crdtstate.clock import Cut, Version
from crdtstate.demo.proxy import Proxy
from crdtstate.demo.survey import DOCUMENT
from crdtstate.errors import CRDTStateError, WaitTimeout

PATIENCE = 120.0
"""Seconds in which whatever is waited for must happen, on however busy a machine."""

FAREWELL = 5.0
"""Seconds in which processes must end when they are told to."""

LINE_BYTES_MAX = 64 * 2**20


class DemoFailure(CRDTStateError):
    """The demo did not go as it must; its message says what was different."""


@dataclass(slots=True)
class Member:
    """A process, and what it said last."""

    name: str
    log: Path
    process: Process | None = None
    state: str = "starting"
    # Files of its share: done, and in all.
    done: int = 0
    of: int = 0
    peers: int = 0
    version: Version = field(default_factory=Version)
    # Answers that are being waited for.
    answers: dict[str, Any] = field(default_factory=dict)
    reader: asyncio.Task[None] | None = None

    @property
    def is_done(self) -> bool:
        return 0 < self.of == self.done or self.state == "done"


class Fleet:
    """The relay and the agents.

    Args:
        folder: Where stores and logs are.
        root: The tree to survey.
        agents: How many agents.
        run: What their changes say they belong to.
    """

    def __init__(self, folder: Path, root: Path, agents: int, run: str) -> None:
        self.folder = folder
        self.root = root
        self.run = run
        self.relay = Member("relay", folder / "relay.log")
        width = len(str(agents))
        self.agents = [
            Member(f"agent-{n + 1:0{width}}", folder / f"agent-{n + 1:0{width}}.log")
            for n in range(agents)
        ]
        self.url = ""
        self.proxies: dict[str, Proxy] = {}
        self._port = 0
        self._moved = asyncio.Event()
        self._failure: str | None = None

    @property
    def done(self) -> int:
        """Files done, by all."""
        return sum(agent.done for agent in self.agents)

    @property
    def of(self) -> int:
        """Files there are."""
        return sum(agent.of for agent in self.agents)

    def newest(self) -> Version:
        """All changes that anybody has."""
        newest = Version()
        for member in (self.relay, *self.agents):
            newest.merge(member.version)
        return newest

    def lag(self, member: Member) -> int:
        """Changes that somebody has and *member* has not."""
        return sum(
            max(0, seq - member.version.get(writer, 0)) for writer, seq in self.newest().items()
        )

    def store(self, member: Member) -> Path:
        return self.folder / f"{member.name}.db"

    # Starting and ending

    async def start_relay(self) -> None:
        arguments = ["-m", "crdtstate", "relay", "--listen", "ws://127.0.0.1:0", "--json"]
        arguments += ["--store", str(self.store(self.relay)), "--attached"]
        await self._spawn(self.relay, arguments)
        await self.until(lambda: "address" in self.relay.answers, "the relay to listen")
        self.url = self.relay.answers["address"]
        self._port = int(self.url.rpartition(":")[2])
        self.relay.state = "up"

    async def start_agent(self, agent: Member, *, until: Version | None = None) -> None:
        """Start an agent, anew if it was killed; then it first takes in *until*."""
        url = self.url
        if agent.name in self.proxies:
            url = f"ws://127.0.0.1:{self.proxies[agent.name].port}"
        arguments = ["-m", "crdtstate.demo.agent", "--name", agent.name, "--peer", url]
        arguments += ["--index", str(self.agents.index(agent)), "--of", str(len(self.agents))]
        arguments += ["--path", str(self.root), "--store", str(self.store(agent))]
        arguments += ["--run", self.run]
        if until is not None:
            arguments += ["--until", str(Cut({DOCUMENT: until}))]
        agent.answers.clear()
        await self._spawn(agent, arguments)

    async def add_proxy(self, agent: Member) -> None:
        """Lead the agent's connection through a network that can be cut."""
        proxy = self.proxies[agent.name] = Proxy(self._port)
        await proxy.mend()

    async def _spawn(self, member: Member, arguments: list[str]) -> None:
        with member.log.open("ab") as log:
            member.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                stdin=PIPE,
                stdout=PIPE,
                stderr=log,
                limit=LINE_BYTES_MAX,
                start_new_session=True,
            )
        member.reader = asyncio.create_task(self._listen(member, member.process))

    async def kill(self, agent: Member) -> None:
        """SIGKILL: no goodbye, nothing saved that was not saved."""
        assert agent.process is not None
        agent.state = "killed"
        agent.process.kill()
        await agent.process.wait()
        assert agent.reader is not None
        await agent.reader
        agent.peers = 0

    async def stop(self) -> None:
        """End all processes in order: the agents, then the relay."""
        for member in (*self.agents, self.relay):
            member.state = "stopped"
            assert member.process is not None and member.process.stdin is not None
            member.process.stdin.close()
            if member is self.relay:
                await self._end(self.relay)
        for agent in self.agents:
            await self._end(agent)

    async def _end(self, member: Member) -> None:
        assert member.process is not None
        async with asyncio.timeout(FAREWELL):
            code = await member.process.wait()
        if code:
            raise DemoFailure(
                f"{member.name} ended with exit code {code}: {_last_line(member.log)}"
            )

    async def close(self) -> None:
        """Kill what still runs. Idempotent."""
        for member in (self.relay, *self.agents):
            if member.process is not None and member.process.returncode is None:
                member.process.kill()
        for member in (self.relay, *self.agents):
            if member.process is not None:
                await member.process.wait()
            if member.reader is not None:
                await member.reader
        for proxy in self.proxies.values():
            proxy.close()

    # Talking

    def tell(self, agent: Member, command: str) -> None:
        """Send a line to an agent."""
        assert agent.process is not None and agent.process.stdin is not None
        agent.process.stdin.write(command.encode() + b"\n")

    async def ask(self, agent: Member, command: str) -> Any:
        """Send a line to an agent, and wait for what it says under that name."""
        agent.answers.pop(command, None)
        self.tell(agent, command)
        await self.until(lambda: command in agent.answers, f"{agent.name} to answer {command}")
        return agent.answers[command]

    async def until(self, ready: Callable[[], bool], what: str, timeout: float = PATIENCE) -> None:
        """Wait until *ready*, looking whenever somebody said something.

        Raises:
            DemoFailure: It took too long, or a process ended.
        """
        try:
            async with asyncio.timeout(timeout):
                while not self._failure and not ready():
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            raise DemoFailure(f"waited {timeout:g} s for {what}") from None
        if self._failure:
            raise DemoFailure(self._failure)

    async def _listen(self, member: Member, process: Process) -> None:
        """Take note of all that a process says."""
        assert process.stdout is not None
        async for line in process.stdout:
            said = json.loads(line)
            for name in ("done", "of", "peers"):
                setattr(member, name, said.pop(name, getattr(member, name)))
            if "version" in said:
                member.version = Cut.parse(said.pop("version")).get(DOCUMENT, Version())
            member.answers |= said
            self._note_state(member)
            self._moved.set()
        if member.state not in ("killed", "stopped"):
            code = await process.wait()
            last = _last_line(member.log)
            self._failure = f"{member.name} ended with exit code {code}: {last}"
            self._moved.set()
