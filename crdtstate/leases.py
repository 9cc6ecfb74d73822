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

`Leases` is the relay's side of it, `Loan` the borrower's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping

from crdtstate.clock import Version
from crdtstate.identity import draw_writer
from crdtstate.link import Link

FREE_MAX = 10_000
LENT_MAX = 100_000
"""Writers that are remembered as lent. Of more the oldest are forgotten: they are lent no more."""

_EMPTY = Version()


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


class Loan:
    """The writer that a replica has borrowed; of most replicas, nothing."""

    def __init__(self) -> None:
        self._lender: int | None = None
        # How much of each document was written under it before; of which this is lacking here.
        self._seqs: dict[str, int] = {}
        self._lacking: dict[str, int] = {}
        self.was_given_back = False

    @property
    def is_begun(self) -> bool:
        """Whether the writer is borrowed: others wrote under it before."""
        return self._lender is not None

    @property
    def is_between(self) -> bool:
        """Whether the writer is not to be written under: not yet, or no more."""
        return bool(self._lacking) or self.was_given_back

    def is_earlier(self, document: str, seq: int) -> bool:
        """Whether an own change that comes from elsewhere is an earlier borrower's."""
        return seq <= self._lacking.get(document, 0)

    def begin(self, lender: int, seqs: Mapping[str, int], takes: Callable[[str], bool]) -> None:
        """The relay *lender* lends a writer under which *seqs* were written. What of them is in
        documents that this replica *takes* part in has to be here first."""
        self._lender = lender
        self._seqs = dict(seqs)
        self._lacking = {name: seq for name, seq in seqs.items() if takes(name)}

    def has_all(self, have: Callable[[str], int]) -> bool:
        """Whether everything is here that was written before: *have* says how much of a document
        is."""
        self._lacking = {name: seq for name, seq in self._lacking.items() if have(name) < seq}
        return not self._lacking

    def give_back(
        self, writer: int, written: Mapping[str, int], peers: Iterable[Link]
    ) -> tuple[int, dict[str, int]] | None:
        """End the loan if the lender is among *peers* and has all that was *written*: to whom to
        return the writer, and with what."""
        for link in peers:
            if link.writer == self._lender and all(
                link.acked.get(name, _EMPTY).get(writer, 0) >= seq for name, seq in written.items()
            ):
                self.was_given_back = True
                # What earlier borrowers wrote where this one takes no part is there as well.
                return link.peer, {**self._seqs, **written}
        return None
