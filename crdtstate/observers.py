"""
Who watches a replica: handlers by type of event, and the events that wait for them.

Events are told after the fact and in order, in slices of time: handlers are the user's code, and
one that is slow or raises must not stop the mesh. What waits is bounded; the oldest goes first. Of
changes this knows the paths they wrote: from these it makes `Changed`, and `ConflictFound` and
`ConflictResolved` by what was contested before. While nobody watches, none of it is done.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from crdtstate.arguments import check_event
from crdtstate.clock import Dot
from crdtstate.crdts import Map, Register
from crdtstate.document import Document
from crdtstate.errors import ReplicaClosed, UsageError
from crdtstate.events import Changed, ConflictFound, ConflictResolved, Event
from crdtstate.slots import SEPARATOR
from crdtstate.values import unpack, unpack_key

log = logging.getLogger("crdtstate")

E = TypeVar("E", bound=Event)

PENDING_EVENTS_MAX = 1_000_000
"""Events that wait for handlers: as many as a large document has places. The oldest go first."""

DISPATCH_TIME = 0.01
"""Seconds for which handlers are called before connections have their turn."""

KINDS = {"m": "map", "c": "counter", "r": "register", "s": "set", "y": "native"}


class Observers:
    """The observers of one replica.

    Args:
        agent: The agent's name.
        events_max: Events that wait for one who iterates over them.
        wake: Called when events wait; `dispatch` is to be called soon.
    """

    def __init__(self, agent: str, events_max: int, wake: Callable[[], None]) -> None:
        self._agent = agent
        self._events_max = events_max
        self._wake = wake
        self._handlers: dict[type[Event], list[Callable[[Any], object]]] = {}
        self._pending: deque[Event] = deque()
        self._dropped = 0
        # Wakes those who iterate over events.
        self._listening: set[asyncio.Event] = set()
        self._is_closed = False
        # Where values met that nobody has resolved yet: (document, path) -> which.
        self._contested: dict[tuple[str, str], frozenset[Dot]] = {}

    # Watching

    def on(self, event: type[E], handler: Callable[[E], object]) -> Callable[[], None]:
        """See `Replica.on`."""
        check_event(event)
        if not callable(handler) or inspect.iscoroutinefunction(handler):
            raise UsageError(f"a handler is a plain function, not {handler!r}; see events()")
        self._handlers.setdefault(event, []).append(handler)

        is_on = True

        def cancel() -> None:
            nonlocal is_on
            if is_on:
                is_on = False
                self._handlers[event].remove(handler)
                if not self._handlers[event]:
                    del self._handlers[event]

        return cancel

    async def events(self, *types: type[Event]) -> AsyncIterator[Event]:
        """See `Replica.events`."""
        if self._is_closed:
            raise ReplicaClosed(f"{self._agent}: closed")
        queue: deque[Event] = deque(maxlen=int(self._events_max))
        arrived = asyncio.Event()
        self._listening.add(arrived)

        def receive(event: Event) -> None:
            queue.append(event)
            arrived.set()

        cancels = [self.on(kind, receive) for kind in types or (Event,)]
        try:
            while True:
                while queue:
                    yield queue.popleft()
                if self._is_closed:
                    return
                arrived.clear()
                await arrived.wait()
        finally:
            self._listening.discard(arrived)
            for cancel in cancels:
                cancel()

    def close(self) -> None:
        """Let those who iterate end, once they have what they got. Idempotent."""
        self._is_closed = True
        for arrived in self._listening:
            arrived.set()

    # Telling

    def tell(self, event: Event) -> None:
        """Something happened: tell handlers at the next `dispatch`."""
        self._tell_all((event,))

    def _tell_all(self, events: Sequence[Event]) -> None:
        if log.isEnabledFor(logging.DEBUG):
            for event in events:
                log.debug("%s: %s", self._agent, event)
        if self._handlers and events:
            self._pending.extend(events)
            while len(self._pending) > PENDING_EVENTS_MAX:
                self._pending.popleft()
                self._count_dropped()
            self._wake()

    def tell_paths(
        self, document: Document, paths: Iterable[str], agent: str, *, local: bool
    ) -> None:
        """The content at *paths* changed: tell what that means, if anybody wants to know."""
        handlers = self._handlers
        wants_changed = Changed in handlers or Event in handlers
        if not wants_changed and ConflictFound not in handlers and ConflictResolved not in handlers:
            return
        told: list[Event] = []
        containers = document.lanes.containers
        for path in paths:
            container, _, key = path.partition(SEPARATOR)
            kind = container[:1]
            if kind not in KINDS:
                continue
            if wants_changed:
                told.append(_changed(document, kind, container[1:], key, agent, local))
            if kind in "mr":
                cells = containers.get(container)
                # Nearly always there is nothing to tell, and that takes two look-ups.
                if self._contested or (cells is not None and key in cells.contested):
                    told += self._conflict_of(document, kind, container, key, agent)
        self._tell_all(told)

    def _conflict_of(
        self, document: Document, kind: str, container: str, key: str, agent: str
    ) -> Iterator[Event]:
        """What a write to a place means for the conflict there, if there is or was one."""
        place = (document.name, container + SEPARATOR + key)
        contested = key in document.lanes.container(container).contested
        if not contested and place not in self._contested:
            return
        name = container[1:]
        view = Map(document, name) if kind == "m" else Register(document, name)
        found = view.candidates_of(key) if contested else []
        dots = frozenset(candidate.dot for candidate in found)
        if found and self._contested.get(place) != dots:
            self._contested[place] = dots
            yield ConflictFound(document.name, KINDS[kind], name, key, tuple(found))
        elif not found and place in self._contested:
            del self._contested[place]
            event = _changed(document, kind, name, key, agent, False)
            yield ConflictResolved(document.name, KINDS[kind], name, key, event.value, agent)

    def _count_dropped(self) -> None:
        if not self._dropped:
            log.error("%s: handlers do not keep up; the oldest events are dropped", self._agent)
        self._dropped += 1

    # Dispatching

    @property
    def is_behind(self) -> bool:
        """Whether events wait for handlers."""
        return bool(self._pending)

    def dispatch(self) -> None:
        """Call handlers, for a while; the rest after others had their turn on the event loop.
        Slow ones delay each other, and the mesh by one call at a time."""
        clock = asyncio.get_running_loop().time
        until = clock() + DISPATCH_TIME
        while self._pending:
            self._call(self._pending.popleft())
            if clock() >= until:
                self._wake()
                return
        self._dropped = 0

    def _call(self, event: Event) -> None:
        for kind in (type(event), Event):
            for handler in list(self._handlers.get(kind, ())):
                try:
                    handler(event)
                except Exception:
                    log.exception("%s: a handler of %s failed", self._agent, kind.__name__)


def _changed(
    document: Document, kind: str, name: str, key: str, agent: str, local: bool
) -> Changed:
    """What a path reads as now. Where a strategy is not known here, or fails, that is the value
    written last."""
    shown = key if kind == "m" else unpack_key(key) if kind == "s" else None
    value: Any = None
    try:
        match kind:
            case "m":
                value = _read_map(document, name, key)
            case "r":
                value = document.register(name).value
            case "c":
                value = document.counter(name).value
            case "s":
                value = True if shown in document.set(name) else None
    except Exception as exc:
        # The user's own function: whatever it raises must not stop the pump.
        log.warning("%s: %s %r: %r", document.name, KINDS[kind], name, exc)
        view = Map(document, name) if kind == "m" else Register(document, name)
        found = view.candidates_of(key)
        value = found[-1].value if found else None
    return Changed(document.name, KINDS[kind], name, shown, value, agent, local)


def _read_map(document: Document, name: str, key: str) -> Any:
    """What a map has at *key*, or None. A lone slot, as nearly all are, is read as it lies there:
    every change passes here if somebody watches."""
    container = document.lanes.containers.get("m" + name)
    cell = container.cells.get(key) if container is not None else None
    if cell is None:
        return None
    if len(cell) == 1:
        (slot,) = cell.values()
        return None if slot.value is None else unpack(slot.value)
    return Map(document, name).get(key)
