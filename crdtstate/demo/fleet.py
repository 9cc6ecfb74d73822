"""
The processes of the demo: a relay and agents, and what they say.

All are started here and end here: `Fleet.close` asks, waits and kills. If this process is killed,
they end because their standard input does. They are sessions of their own, so Ctrl-C reaches only
the demo.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crdtstate.clock import Cut, Version
from crdtstate.credentials import open_host_credentials
from crdtstate.demo.proxy import Proxy
from crdtstate.demo.survey import DOCUMENT
from crdtstate.errors import CRDTStateError
from crdtstate.relay.tokens import token_of

PATIENCE = 120.0
"""Seconds in which whatever is waited for must happen, on however busy a machine."""

FAREWELL = 20.0
"""Seconds in which processes must end when they are told to."""

POLL_EVERY = 0.25
"""Seconds between looks at the relay."""

LINE_BYTES_MAX = 64 * 2**20


class DemoFailure(CRDTStateError):
    """The demo did not go as it must; its message says what was different."""


@dataclass(slots=True, eq=False)
class Member:
    """A process, and what it said last."""

    name: str
    log: Path
    process: Process | None = None
    # What is wrong with it: "cut off", "killed", ...
    trouble: str = ""
    is_stopping: bool = False
    # Files of its share: done, and in all.
    done: int = 0
    of: int = 0
    peers: int = 0
    version: Version = field(default_factory=Version)
    # What else it said, by the names of the lines.
    said: dict[str, Any] = field(default_factory=dict)
    listener: asyncio.Task[None] | None = None

    @property
    def is_done(self) -> bool:
        """Whether it has done its share."""
        return "ready" in self.said and self.done == self.of


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
        # Where the relay listens.
        self.url = ""
        # By the names of the agents whose network can be cut.
        self.proxies: dict[str, Proxy] = {}
        self._poller: asyncio.Task[None] | None = None
        # Somebody said something.
        self._moved = asyncio.Event()
        self._failure: str | None = None

    @property
    def members(self) -> list[Member]:
        """Everybody."""
        return [*self.agents, self.relay]

    @property
    def relay_port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def done(self) -> int:
        """Files done, by all."""
        return sum(agent.done for agent in self.agents)

    @property
    def of(self) -> int:
        """Files there are."""
        return sum(agent.of for agent in self.agents)

    def newest(self, *, without: Collection[Member] = ()) -> Version:
        """All changes that anybody is known to have, or anybody but some."""
        newest = Version()
        for member in (self.relay, *self.agents):
            if member not in without:
                newest.merge(member.version)
        return newest

    def lag(self, member: Member, newest: Version | None = None) -> int:
        """Changes that somebody has and *member* has not."""
        wanted = self.newest() if newest is None else newest
        return sum(max(0, seq - member.version.get(w, 0)) for w, seq in wanted.items())

    def store(self, member: Member) -> Path:
        return self.folder / f"{member.name}.db"

    # Starting and ending

    async def start_relay(self) -> None:
        """Start the relay, and look at it from then on."""
        arguments = ["-m", "crdtstate", "relay", "--listen", "ws://127.0.0.1:0", "--json"]
        arguments += ["--store", str(self.store(self.relay)), "--attached"]
        await self._spawn(self.relay, arguments)
        await self.until(lambda: "address" in self.relay.said, "the relay to listen")
        self.url = self.relay.said["address"]
        self._poller = asyncio.create_task(self._poll_relay())

    async def start_agent(self, agent: Member, *, until: Version | None = None) -> None:
        """Start an agent, or start it again, when it has to take in *until* first."""
        port = self.proxies[agent.name].port if agent.name in self.proxies else self.relay_port
        arguments = ["-m", "crdtstate.demo.agent", "--name", agent.name]
        arguments += ["--peer", f"ws://127.0.0.1:{port}", "--run", self.run]
        arguments += ["--index", str(self.agents.index(agent)), "--of", str(len(self.agents))]
        arguments += ["--path", str(self.root), "--store", str(self.store(agent))]
        if until is not None:
            arguments += ["--until", str(Cut({DOCUMENT: until}))]
        agent.said.clear()
        await self._spawn(agent, arguments)

    async def add_proxy(self, agent: Member) -> None:
        """Lead the connection of an agent that is started later through a `Proxy`."""
        self.proxies[agent.name] = Proxy(self.relay_port)
        await self.proxies[agent.name].mend()

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
        member.is_stopping = False
        member.listener = asyncio.create_task(self._listen(member, member.process))

    async def kill(self, agent: Member) -> None:
        """SIGKILL: no goodbye, and nothing saved that is not saved yet."""
        agent.is_stopping = True
        _signal(agent, signal.SIGKILL)
        await self._ended(agent)
        agent.peers = 0

    async def stop(self) -> None:
        """End all processes in order: the agents, then the relay."""
        for agent in self.agents:
            agent.is_stopping = True
            assert agent.process is not None and agent.process.stdin is not None
            agent.process.stdin.close()
        for agent in self.agents:
            await self._end(agent)
        self.relay.is_stopping = True
        if self._poller is not None:
            self._poller.cancel()
        _signal(self.relay, signal.SIGTERM)
        await self._end(self.relay)

    async def _end(self, member: Member) -> None:
        try:
            async with asyncio.timeout(FAREWELL):
                code = await self._ended(member)
        except TimeoutError:
            raise DemoFailure(f"{member.name} did not end when it was told to") from None
        if code:
            raise DemoFailure(f"{member.name} ended with exit code {code}: {last_line(member.log)}")

    async def _ended(self, member: Member) -> int:
        assert member.process is not None and member.listener is not None
        # Who is cancelled while waiting must not cancel the listener: others wait for it too.
        await asyncio.wait([member.listener])
        return await member.process.wait()

    async def close(self) -> None:
        """Kill whoever still runs. Idempotent."""
        started = [member for member in (*self.agents, self.relay) if member.process is not None]
        for proxy in self.proxies.values():
            proxy.close()
        if self._poller is not None:
            self._poller.cancel()
        for member in started:
            member.is_stopping = True
            _signal(member, signal.SIGKILL)
        for member in started:
            await self._ended(member)

    # Talking

    def tell(self, agent: Member, command: str) -> None:
        """Send a line to an agent."""
        assert agent.process is not None and agent.process.stdin is not None
        agent.process.stdin.write(command.encode() + b"\n")

    async def ask(self, agent: Member, command: str) -> Any:
        """Send a line to an agent and wait for what it says under the same name."""
        agent.said.pop(command, None)
        self.tell(agent, command)
        await self.until(lambda: command in agent.said, f"{agent.name} to tell its {command}")
        return agent.said[command]

    async def get(self, page: str) -> dict[str, Any]:
        """Get one of the relay's pages."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.relay_port)
        try:
            bearer = f"Authorization: Bearer {token_of(open_host_credentials())}\r\n"
            writer.write(f"GET {page} HTTP/1.1\r\nHost: 127.0.0.1\r\n{bearer}\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        if b" 200 " not in head[:20]:
            raise DemoFailure(f"the relay answers {head[:40]!r} to {page}")
        found: dict[str, Any] = json.loads(body)
        return found

    async def until(self, ready: Callable[[], bool], what: str, timeout: float = PATIENCE) -> None:
        """Wait until *ready*, looking whenever somebody says something.

        Raises:
            DemoFailure: It took too long, or a process ended.
        """
        try:
            async with asyncio.timeout(timeout):
                while not self._failure and not ready():
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            behind = [f"{m.name} lacks {self.lag(m)}" for m in self.members if self.lag(m)]
            about = f"; of the changes {', '.join(behind)}" if behind else ""
            raise DemoFailure(f"waited {timeout:g} s for {what}{about}") from None
        if self._failure:
            raise DemoFailure(self._failure)

    async def _listen(self, member: Member, process: Process) -> None:
        """Take note of all that a process says."""
        assert process.stdout is not None
        async for line in process.stdout:
            if not line.endswith(b"\n"):
                break  # It was killed in the middle of the line.
            said = json.loads(line)
            for name in ("done", "of", "peers"):
                setattr(member, name, said.pop(name, getattr(member, name)))
            self._note_version(member, said)
            member.said |= said
            self._moved.set()
        if not member.is_stopping:
            code = await process.wait()
            self._fail(f"{member.name} ended with exit code {code}: {last_line(member.log)}")

    async def _poll_relay(self) -> None:
        while True:
            try:
                found = await self.get("/status")
            except (OSError, DemoFailure) as exc:
                self._fail(f"the relay does not answer: {exc}")
                return
            self.relay.peers = len(found["peers"])
            self._note_version(self.relay, found)
            self._moved.set()
            await asyncio.sleep(POLL_EVERY)

    def _note_version(self, member: Member, said: dict[str, Any]) -> None:
        if "version" in said:
            member.version = Cut.parse(said.pop("version")).get(DOCUMENT, Version())

    def _fail(self, why: str) -> None:
        self._failure = self._failure or why
        self._moved.set()


def last_line(log: Path) -> str:
    """What a process said last on standard error, which tells most about its end."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def _signal(member: Member, number: int) -> None:
    """Send a signal to a process that may have ended. Not by its object: that looks first whether
    it has, and takes the exit code from under asyncio's watcher, which complains of it."""
    assert member.process is not None
    if member.process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(member.process.pid, number)
