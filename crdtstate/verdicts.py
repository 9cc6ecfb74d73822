"""
Foreign changes of native documents, while somebody else looks whether pycrdt survives them.
Sans-I/O; driven by `sync`.

A change that is ready is *asked about* (`Examine`) and waits in `pending` for its verdict, as one
that came too early waits for what it builds on. So as not to wait for each of many that follow
each other, one that builds on what is asked about is asked about as well: verdicts come in the
order of the questions. One that is *refused* ends all questions about its document, since what
came after it may build on it; whoever tries them forgets them too. Snapshots are kept here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from crdtstate.change import Change, Snapshot
from crdtstate.document import Document

SNAPSHOTS_MAX = 2
"""Snapshots that wait for a verdict; more are turned away, and come again."""


class Examine(NamedTuple):
    """Try a change or snapshot of a native document where it can do no harm, after those that were
    asked about before; then call `Sync.examined` with *number*."""

    number: int
    document: Document
    item: Change | Snapshot


class Asked(NamedTuple):
    """What waits for a verdict.

    Attributes:
        peer: Who sent it; 0 for nobody.
        agent: Whose snapshot it is, and *size* how long it was.
    """

    document: str
    item: Change | Snapshot
    peer: int
    agent: str = ""
    size: int = 0


class Verdicts:
    """What one replica has asked about.

    Args:
        ask: Hands a question on.
    """

    def __init__(self, ask: Callable[[Examine], None]) -> None:
        self._ask = ask
        self._asked: dict[int, Asked] = {}
        self._newest = 0
        # Document -> writer -> seq of its newest change that is asked about; and how many
        # questions there are about it.
        self._ahead: dict[str, dict[int, int]] = {}
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._asked)

    @property
    def snapshots(self) -> int:
        """How many snapshots wait."""
        return sum(isinstance(asked.item, Snapshot) for asked in self._asked.values())

    def waits(self, document: str) -> bool:
        """Whether anything of a document waits."""
        return self._counts[document] > 0

    def is_ready(self, document: Document, change: Change) -> bool:
        """Whether everything *change* builds on is delivered or asked about, and some of it the
        latter."""
        ahead = self._ahead.get(document.name)
        if not ahead:
            return False
        version, writer = document.version, change.writer
        if max(version.get(writer, 0), ahead.get(writer, 0)) != change.seq - 1:
            return False
        return all(max(version.get(w, 0), ahead.get(w, 0)) >= seq for w, seq in change.deps)

    def ask(self, document: Document, asked: Asked) -> None:
        """Ask about something that is ready."""
        self._newest += 1
        self._asked[self._newest] = asked
        self._counts[document.name] += 1
        if isinstance(asked.item, Change):
            self._ahead.setdefault(document.name, {})[asked.item.writer] = asked.item.seq
        self._ask(Examine(self._newest, document, asked.item))

    def answer(self, number: int) -> Asked | None:
        """There is a verdict; returns on what. None: nobody wants to know any more."""
        asked = self._asked.pop(number, None)
        if asked is not None:
            self._counts[asked.document] -= 1
            if not self._counts[asked.document]:
                self._end(asked.document)
        return asked

    def forget(self, document: str) -> list[Asked]:
        """End all questions about a document; returns what they were about, in order."""
        self._end(document)
        numbers = [n for n, asked in self._asked.items() if asked.document == document]
        return [self._asked.pop(number) for number in numbers]

    def _end(self, document: str) -> None:
        self._ahead.pop(document, None)
        del self._counts[document]
