"""A mesh with certificates for tests."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from crdtstate.authority import Authority
from crdtstate.certificates import Grant, JoinToken
from crdtstate.credentials import Credentials, open_credentials
from crdtstate.signing import public_of

HOUR_MS = 3600 * 1000


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
