"""
Lending writers: how thousands of short-lived agents leave few traces.

Every writer leaves a trace in each document for ever, and pycrdt becomes slower with each. So an
agent that lives for minutes borrows a writer from a relay, goes on where the last borrower
stopped, and hands it back when it ends. It may write only once it has everything that was written
under that writer; the relay lends it on only if everything that was written since is there.

A writer that is not handed back in order (its borrower crashed, or could not send everything) is
never lent again: what the relay does not know of might still turn up. Nor are those that were lent
when the relay ended; so a relay needs no more writers than agents run at once, and some for each
crash.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from crdtstate.identity import draw_writer

FREE_MAX = 10_000
LENT_MAX = 100_000
"""Writers that are remembered as lent. Of more the oldest are forgotten: they are lent no more."""


class Leases:
    """The writers that a relay lends.

    Args:
        rng: Draws them.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._free: list[int] = []
        # In the order in which they were lent.
        self._lent: dict[int, None] = {}

    @property
    def lent(self) -> int:
        """How many are lent, or were never handed back."""
        return len(self._lent)

    @property
    def free(self) -> int:
        """How many may be lent again."""
        return len(self._free)

    def lend(self) -> int:
        """A writer that nobody else writes as."""
        writer = self._free.pop() if self._free else draw_writer(self._rng)
        self._lent[writer] = None
        if len(self._lent) > LENT_MAX:
            del self._lent[next(iter(self._lent))]
        return writer

    def take_back(
        self, writer: int, written: Mapping[str, int], committed: Mapping[str, int]
    ) -> bool:
        """Take a writer back: its borrower says to have *written* so much of each document, and
        so much is *committed* here. True if it may be lent again."""
        if writer not in self._lent:
            return False
        if dict(written) != dict(committed) or len(self._free) >= FREE_MAX:
            return False
        del self._lent[writer]
        self._free.append(writer)
        return True
