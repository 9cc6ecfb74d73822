"""
What is missing here, and whom to ask for it. Sans-I/O; driven by `sync`.

A HAVE, or a change that builds on another, shows that a writer has written more than is here. Most
of it comes by itself, so each such *want* is due only after a while. What is still missing then is
asked for with WANT, at one peer that has it, without what is parked in `pending`; if that does not
help, at the next one, more and more seldom. A want that no peer can fulfil is forgotten: somebody's
next HAVE brings it up again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from crdtstate import wire
from crdtstate.clock import Version
from crdtstate.config import Config
from crdtstate.link import Link
from crdtstate.transfer import Downloads, Sender

Ranges = list[tuple[int, int, int]]
"""Runs of changes: writer, first and last seq."""

_EMPTY = Version()


@dataclass(slots=True)
class _Want:
    """Changes of one writer, up to *target*, that a peer announced and that are not here."""

    target: int
    due: float
    tries: int = 0
    # Who was asked last.
    peer: int = 0


class Wants:
    """What one replica misses.

    Args:
        config: Settings.
        rng: Chooses whom to ask first.
        downloads: While a snapshot of a document comes, no changes are asked for.
        version: Returns what of a document is delivered here.
        send: Sends a frame to a peer.
    """

    def __init__(
        self,
        config: Config,
        rng: random.Random,
        downloads: Downloads,
        version: Callable[[str], Version],
        send: Sender,
    ) -> None:
        self._config = config
        self._rng = rng
        self._downloads = downloads
        self._version = version
        self._send = send
        # By document and writer.
        self._wants: dict[tuple[str, int], _Want] = {}
        # Document -> changes that came as answers since it began to catch up.
        self._caught_up: dict[str, int] = {}
        # When to call `ask`; None while nothing is missing.
        self.ask_at: float | None = None

    # Looking

    def count(self) -> int:
        """How many changes peers have announced that are not delivered here."""
        return sum(self._left(name, writer, want) for (name, writer), want in self._wants.items())

    def _left(self, name: str, writer: int, want: _Want) -> int:
        return max(0, want.target - self._version(name).get(writer, 0))

    def is_asked(self, document: str, peer: int) -> bool:
        """Whether *peer* was asked for something of a document, and has not answered."""
        return any(
            name == document and want.peer == peer and want.tries
            for (name, _), want in self._wants.items()
        )

    # Wanting

    def want(self, document: str, writer: int, seq: int, due: float) -> None:
        """All of *writer* up to *seq* is to be here: ask for it at *due* if it has not come."""
        want = self._wants.get((document, writer))
        if want is None:
            self._wants[document, writer] = _Want(seq, due)
        else:
            want.target = max(want.target, seq)
            want.due = min(want.due, due) if not want.tries else want.due
        self._arm(due)

    def hurry(self, document: str, now: float) -> None:
        """Ask for what a document lacks now."""
        for (name, _), want in self._wants.items():
            if name == document:
                want.due = now
        self._arm_soonest()

    def put_off(self, document: str, until: float) -> None:
        """Ask for nothing of a document before *until*: a peer is busy."""
        for (name, _), want in self._wants.items():
            if name == document:
                want.due = max(want.due, until)

    def _arm(self, due: float) -> None:
        if self.ask_at is None or due < self.ask_at:
            self.ask_at = due

    def _arm_soonest(self) -> None:
        if self._wants:
            self._arm(min(want.due for want in self._wants.values()))

    # Hearing answers

    def answered(
        self, peer: int, before: Mapping[tuple[str, int], int], more: bool, now: float
    ) -> set[str]:
        """Changes came from *peer*. Of those that answer a WANT, *before* says how far each writer
        was; *more* if the answer was cut short. Returns the documents that it brought on."""
        advanced: set[str] = set()
        for (name, writer), seq in before.items():
            if self._version(name).get(writer, 0) > seq:
                advanced.add(name)
                if (want := self._wants.get((name, writer))) is not None:
                    want.tries = 0
                    want.due = now + self._config.want_retry
        if more and advanced:
            # Ask this peer on, but only after an answer that helped: else two who cannot help
            # each other yet would talk as fast as the network lets them.
            for (name, _), want in self._wants.items():
                if name in advanced and want.peer == peer:
                    want.due = now
        self._arm_soonest()
        return advanced

    def progress(self, document: str, count: int, more: bool) -> tuple[int, int] | None:
        """*count* changes more came as an answer: how many of how many came since the document
        began to catch up. None if this answer is all it takes."""
        if not more and document not in self._caught_up:
            return None
        came = self._caught_up.get(document, 0) + count
        left = sum(
            self._left(name, writer, want)
            for (name, writer), want in self._wants.items()
            if name == document
        )
        self._caught_up[document] = came
        if not left:
            del self._caught_up[document]
        return came, came + left

    # Asking

    def ask(
        self, links: Iterable[Link], parked: Mapping[tuple[str, int], Iterable[int]], now: float
    ) -> None:
        """Ask *links* for what is missing and due; not for what is *parked*."""
        for (peer, name), ranges in self._choose(list(links), parked, now).items():
            for at in range(0, len(ranges), wire.RANGES_MAX):
                self._send(peer, wire.Want(name, tuple(ranges[at : at + wire.RANGES_MAX])))
        self.ask_at = min((want.due for want in self._wants.values()), default=None)

    def _choose(
        self, links: list[Link], parked: Mapping[tuple[str, int], Iterable[int]], now: float
    ) -> dict[tuple[int, str], Ranges]:
        """What to ask for now, each of it at one peer that has it: by peer and document."""
        asks: dict[tuple[int, str], Ranges] = {}
        for (name, writer), want in list(self._wants.items()):
            have = self._version(name).get(writer, 0)
            if have >= want.target:
                del self._wants[name, writer]
                continue
            if want.due > now:
                continue
            able = [link for link in links if link.acked.get(name, _EMPTY).get(writer, 0) > have]
            if not able:
                # Somebody's next HAVE will bring it up again.
                del self._wants[name, writer]
                continue
            if self._downloads.is_running(name):
                want.due = now + self._config.want_retry
                continue
            able.sort(key=lambda link: link.peer)
            start = want.tries if want.tries else self._rng.randrange(len(able))
            link = able[start % len(able)]
            last = min(want.target, link.acked[name].get(writer, 0))
            gaps = _gaps(writer, have + 1, last, sorted(parked.get((name, writer), ())))
            asks.setdefault((link.peer, name), []).extend(gaps)
            want.tries += 1
            want.peer = link.peer
            pause = self._config.want_retry * 1.5 ** min(want.tries - 1, 10)
            want.due = now + min(pause, self._config.want_retry_max)
        return asks


def _gaps(writer: int, first: int, last: int, known: list[int]) -> Ranges:
    """The parts of *first* to *last* that are not in *known*, which is sorted."""
    gaps = []
    for seq in known:
        if seq > last:
            break
        if first < seq:
            gaps.append((writer, first, seq - 1))
        first = max(first, seq + 1)
    if first <= last:
        gaps.append((writer, first, last))
    return gaps
