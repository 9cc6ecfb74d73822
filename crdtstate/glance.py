"""
How a replica is doing, for those who ask often: a relay's health, its metrics and its page.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from crdtstate.ladder import Recovery


class TierHealth(NamedTuple):
    """How a tier of checkpoints does: why it fails, if it does, how often it has failed since
    opening, and how many checkpoints it has."""

    failure: str | None
    failures: int
    checkpoints: int


@dataclass(frozen=True, slots=True)
class Glance:
    """A replica at one moment.

    Attributes:
        is_open: Whether it is open.
        store: The store's file; None: memory only.
        store_failure: Why the store refuses to write, if it does.
        pending: Changes that wait for others they build on.
        missing: Changes that peers announced and nobody sent yet.
        copies: Changes sent since it was opened, each counted for every peer.
        journal: Bytes of changes kept in the journal, by document.
        checkpoints: How many checkpoints there are.
        checkpoint_at: When the newest was made, in seconds since 1970; None without one.
        tiers: The tiers of checkpoints, by URL.
        divergences: Lanes that hold something else elsewhere; see `crdtstate.comparing`.
        recovery: How it came by its documents when it was opened.
    """

    is_open: bool
    store: str | None
    store_failure: str | None
    pending: int
    missing: int
    copies: int
    journal: dict[str, int]
    checkpoints: int = 0
    checkpoint_at: float | None = None
    tiers: dict[str, TierHealth] = field(default_factory=dict)
    divergences: int = 0
    recovery: Recovery | None = None

    @property
    def disk_free(self) -> int | None:
        """The bytes left on the store's disk; None without a store, or if it does not say."""
        try:
            return (
                shutil.disk_usage(Path(self.store).absolute().parent).free if self.store else None
            )
        except OSError:
            return None
