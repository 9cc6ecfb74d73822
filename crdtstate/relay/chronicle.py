"""
What happened on a relay of late, as lines for people, and how often each kind of thing did.

Every event of the replica is kept but for `Changed`: these are the changes themselves, too many to
tell, and having nobody ask for them saves the relay the work of finding out what changed.
"""

from __future__ import annotations

import re
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from crdtstate.events import Changed, Event
from crdtstate.relay.holdings import shown
from crdtstate.replica import Replica

KEPT = 100

PLACE = ("document", "kind", "name", "key")
UNTOLD = {*PLACE, "writer", "new_writer", "candidates"}
"""Fields that are no news to people, or told as a place."""


class Chronicle:
    """The newest events of a replica, and a count of each kind."""

    def __init__(self, replica: Replica) -> None:
        self.counts: Counter[str] = Counter()
        self._lines: deque[dict[str, Any]] = deque(maxlen=KEPT)
        for kind in event_kinds():
            self.counts[kind.__name__] = 0
            replica.on(kind, self._note)

    def lines(self) -> list[dict[str, Any]]:
        """The events, newest first."""
        return list(reversed(self._lines))

    def _note(self, event: Event) -> None:
        kind = type(event).__name__
        self.counts[kind] += 1
        line = {"id": self.counts.total(), "at": time.time_ns() // 1_000_000}
        self._lines.append({**line, "kind": kind, "what": in_words(kind), "text": tell(event)})


def event_kinds() -> list[type[Event]]:
    """The kinds that are kept."""
    return [kind for kind in Event.__subclasses__() if kind is not Changed]


def in_words(kind: str) -> str:
    """``PeerConnected`` as "Peer connected"."""
    return re.sub(r"(?<=.)([A-Z])", lambda found: " " + found[1].lower(), kind)


def tell(event: Event) -> str:
    """What an event says, on one line."""
    return " · ".join(_tell(event))


def _tell(event: Event) -> Iterator[str]:
    found = {field.name: getattr(event, field.name) for field in fields(event)}
    place = [str(found[part])[:200] for part in PLACE if found.get(part)]
    if place:
        yield "/".join(place)
    for name, value in found.items():
        if name not in UNTOLD and value != "":
            yield value[:300] if isinstance(value, str) else shown(value)
