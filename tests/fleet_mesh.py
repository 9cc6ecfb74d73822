"""A mesh with certificates for tests."""

from __future__ import annotations

import secrets
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from crdtstate import Config, Replica
from crdtstate.authority import Authority
from crdtstate.certificates import Grant, JoinToken
from crdtstate.credentials import Credentials, open_credentials
from crdtstate.signing import public_of

HOUR_MS = 3600 * 1000

CONFIG = Config(link_timeout=2.0, heartbeat=0.2, discover=False)


class Mesh:
    """A root, and whom it has invited."""

    def __init__(self) -> None:
        seed = secrets.token_bytes(32)
        self.root = Authority(seed, public_of(seed), (secrets.token_bytes(32),))

    def invite(self, agent: str, *grants: str, hours: float = 1.0) -> JoinToken:
        """A token for an agent; *grants* as ``pattern:roles``, by default ``*:rws``."""
        now_ms = time.time_ns() // 1_000_000
        found = []
        for text in grants or ("*:frws",):
            pattern, _, roles = text.rpartition(":")
            found.append(Grant(pattern, frozenset(roles)))
        until_ms = now_ms + int(hours * HOUR_MS)
        return self.root.invite(agent, found, now_ms - 1000, until_ms)

    def credentials(self, agent: str, *grants: str, store: Path | None = None) -> Credentials:
        """What an agent has to show."""
        return open_credentials(self.invite(agent, *grants).encode(), store)


class Members(AsyncExitStack):
    """Members of a mesh, of whom the first is who all others dial."""

    def __init__(self) -> None:
        super().__init__()
        self.mesh = Mesh()
        self.first: Replica | None = None

    async def open(self, name: str, *grants: str, **options: Any) -> Replica:
        """Open a member, until the end of the block; *grants* as in `Mesh.invite`."""
        return await self.enter_async_context(self.member(name, *grants, **options))

    def member(self, name: str, *grants: str, **options: Any) -> Replica:
        """The same, to be opened."""
        if "mesh" not in options:
            options["mesh"] = self.mesh.credentials(name, *grants)
        if self.first is None:
            self.first = Replica(
                name, listen="ws://127.0.0.1:0", role="relay", **{"config": CONFIG} | options
            )
            return self.first
        return Replica(name, peers=[str(self.first.address)], **{"config": CONFIG} | options)


async def even(*replicas: Replica) -> None:
    """Wait until all have what each has."""
    for replica in replicas:
        token = replica.version()
        for other in replicas:
            await other.wait_for(token, timeout=20)
