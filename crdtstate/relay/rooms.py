"""
Rooms: browsers that edit a document of native types with ``yjs`` and ``y-websocket``, as these are.

    new WebsocketProvider(`ws://${host}/yjs`, "notes", doc, {protocols: ["crdtstate", ...]})

A room is a document (`Document.shared`) and the browsers that have it open. What the document
takes in, from wherever, goes to all of them. What one of them writes is cut down to what it may
write, held to the guard, made into a change of a guest of this relay (see `guests`), and tried in a
process of its own, as what any peer sends; only then is it in the document, here and everywhere.

Yjs knows each item by the number of its client and a clock, and a browser draws that number itself:
32 bits, so it is hardly ever a replica's. The items keep it in the mesh. So a browser that comes
back after this relay was restarted, or to another relay, can send what is missing there, and what
it sends twice is there once. What follows from that:

- A number belongs to the connection that first writes or shows itself under it, until it is gone.
  Others' items under it are passed over: somebody else's may be known here already, and come by
  the mesh if they are not. So a hostile browser cannot write as one that is connected, or as a
  replica.
- What builds on something that is not here yet is passed over too, and asked for again once more
  has come (`_Member.lacks`).
- Everybody may delete everything that is here: that is what editing is.
- Who has the token can take up the number of a browser that is away, and write under it what that
  browser never wrote; at two relays at once even two different things, over which replicas then
  differ for good, and say so (`DivergenceDetected`). The token is for people who trust each other
  that far.

What somebody shows (awareness) goes to everybody in the room and, if it is little, to the same room
at other relays, by `Replica.present`. Nothing of it is kept.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from crdtstate.bans import Bucket
from crdtstate.clock import Dot
from crdtstate.document import Delivery, Document
from crdtstate.errors import CRDTStateError, InvalidUpdate, NotAllowed
from crdtstate.events import ChangeQuarantined, PresenceChanged
from crdtstate.guard import CLOCK_MAX
from crdtstate.limits import CloseCode
from crdtstate.native import Native
from crdtstate.native_guard import (
    CHANGE_BYTES_MAX,
    NotYet,
    Part,
    Ranges,
    is_guest,
    join_update,
    split_update,
)
from crdtstate.relay import yprotocol
from crdtstate.relay.browsers import AGAIN, Breach, Browser
from crdtstate.relay.guests import Guests
from crdtstate.relay.yprotocol import State
from crdtstate.replica import Replica

log = logging.getLogger("crdtstate")

MESSAGE_BYTES_MAX = 4 * CHANGE_BYTES_MAX
"""A larger one ends the connection (1009). An update may have a quarter of it (4413); so may all
that a browser knows, where a relay knows nothing of it yet."""

BATCH = 64
"""Updates of one browser that become one change, if they came while the one before was tried."""

QUEUE_MAX = 256
QUEUE_BYTES_MAX = 2 * CHANGE_BYTES_MAX
"""Updates of one browser that wait; until they are fewer it is not read."""

NUMBERS_MAX = 32
"""Clients that one connection may be: itself, and what it wrote as before it was loaded anew."""

CLIENTS_MAX = 4096
"""Clients whose items one message may hold."""

SILENCE_MAX = 15.0
"""Seconds after which browsers hear that the relay is still there; y-websocket gives it up after
30."""

ASK_EVERY = 1.0
"""Seconds between two questions for what somebody has that could not be taken in before."""

VERDICT_TIMEOUT = 60.0
"""How long a change may wait for its verdict. The process that tries it gives up long before."""

SHOW_EVERY = 0.2
"""Seconds between two messages to the mesh about what is shown."""

SHOWN_BYTES_MAX = 3500
"""What of it other relays are told."""


class _Member:
    """A browser in a room."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        # The clients that it is; the newest one that it showed itself as, and what it calls itself.
        self.numbers: set[int] = set()
        self.number = 0
        self.name = ""
        # Updates that it sent, and whether each is all that it has; who takes them in; and whether
        # there is room for more.
        self.queue: deque[tuple[bytes, bool]] = deque()
        self.queued_bytes = 0
        self.writing: asyncio.Task[None] | None = None
        self.has_room = asyncio.Event()
        # It has something that could not be taken in yet.
        self.lacks = False
        limits = browser.limits
        now = asyncio.get_running_loop().time()
        self.awareness = Bucket(limits.awareness_per_second, limits.awareness_burst, now)


class Room:
    """One document, and the browsers that have it open.

    Args:
        replica: The relay's replica.
        document: The document, of native types.
        guests: Has the writer that changes are made under.
        changed: Called when something else is shown.
        idle: Called when what somebody wrote who is gone has been dealt with.
    """

    def __init__(
        self,
        replica: Replica,
        document: Document,
        guests: Guests,
        *,
        changed: Callable[[], None],
        idle: Callable[[], None],
    ) -> None:
        assert document.native is not None, f"{document!r} holds no native types"
        self.document = document
        self._replica = replica
        self._native: Native = document.native
        self._guests = guests
        self._changed = changed
        self._idle = idle
        self._writer = guests.borrow()
        self._members: set[_Member] = set()
        # Who writes under which number.
        self._owners: dict[int, _Member] = {}
        # What is shown here, and at other relays.
        self.shown: dict[int, State] = {}
        self._elsewhere: dict[int, State] = {}
        # Whether the mesh brought something since it was asked for what is lacking.
        self._has_news = False
        self._turn = asyncio.Lock()
        # Who is, or was, a member and has updates that wait.
        self._writes: set[asyncio.Task[None]] = set()
        # The change that waits for its verdict; None means that it was taken in.
        self._awaited: Dot | None = None
        self._verdict: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._writing: _Member | None = None
        self._before = document.on_delivered
        document.on_delivered = self._delivered
        self._stop = replica.on(ChangeQuarantined, self._quarantined)
        self._chores = asyncio.create_task(self._do_chores(), name=f"room {document.name}")

    @property
    def is_empty(self) -> bool:
        return not self._members and not self._writes

    def close(self) -> None:
        self._chores.cancel()
        for writing in self._writes:
            writing.cancel()
        self._stop()
        self.document.on_delivered = self._before
        self._guests.give_back(self._writer)

    def end(self) -> None:
        """Ask everybody to come again later."""
        for member in self._members:
            member.browser.end(Breach(AGAIN, "the relay is on its way out"))

    # A browser

    async def serve(self, browser: Browser) -> None:
        """Talk with a browser until it has gone. Raises Breach, TransportError."""
        member = _Member(browser)
        self._members.add(member)
        try:
            self._ask(member)
            self._show_all(member)
            while True:
                await self._take(member, await browser.receive())
        finally:
            self._members.discard(member)
            self._leave(member)

    def _leave(self, member: _Member) -> None:
        # With the clock that it had: who comes back soon says the same one again.
        gone = []
        for number in member.numbers:
            self._owners.pop(number, None)
            if (state := self.shown.pop(number, None)) is not None:
                gone.append(state._replace(text="null"))
        if gone:
            self._tell(yprotocol.states(gone))
            self._changed()
        for other in self._members:
            if other.lacks:
                self._ask(other)

    async def _take(self, member: _Member, data: str | bytes) -> None:
        if isinstance(data, str):
            raise Breach(CloseCode.BAD_FRAME, "y-websocket speaks binary", "bad-frame")
        try:
            reader = yprotocol.Reader(data)
            kind = reader.number(CLOCK_MAX)
            step = reader.number(yprotocol.UPDATE) if kind == yprotocol.SYNC else 0
            body = reader.bytes() if kind in (yprotocol.SYNC, yprotocol.AWARENESS) else b""
            if kind != yprotocol.AUTH:
                reader.end()
            if kind == yprotocol.AWARENESS:
                self._show(member, body)
            elif kind == yprotocol.QUERY:
                self._show_all(member)
            elif kind == yprotocol.SYNC and step == yprotocol.STEP_1:
                missing = self._native.since(yprotocol.read_vector(body))
                member.browser.send(yprotocol.sync(yprotocol.STEP_2, missing))
            elif kind == yprotocol.SYNC:
                await self._enqueue(member, body, is_all=step == yprotocol.STEP_2)
            elif kind != yprotocol.AUTH:
                raise InvalidUpdate(f"a message of kind {kind}")
        except InvalidUpdate as exc:
            raise Breach(CloseCode.BAD_FRAME, str(exc), "bad-frame") from exc

    def _ask(self, member: _Member) -> None:
        """Ask a browser for what it has and this relay lacks."""
        member.lacks = False
        vector = yprotocol.vector(self._native.clocks)
        member.browser.send(yprotocol.sync(yprotocol.STEP_1, vector))

    def _tell(self, data: bytes) -> None:
        for member in self._members:
            member.browser.send(data)

    async def _do_chores(self) -> None:
        silent = 0.0
        while True:
            await asyncio.sleep(ASK_EVERY)
            silent += ASK_EVERY
            if silent >= SILENCE_MAX:
                silent = 0.0
                self._tell(yprotocol.SILENCE)
            for member in self._members:
                if member.lacks and self._has_news:
                    self._ask(member)
            self._has_news = False

    # Writing

    async def _enqueue(self, member: _Member, update: bytes, *, is_all: bool) -> None:
        """Take in what a browser wrote, soon; if that *is all* it has, the relay may know most of
        it."""
        if len(update) > CHANGE_BYTES_MAX:
            reason = f"an update of {len(update)} bytes; at most {CHANGE_BYTES_MAX}"
            raise Breach(AGAIN if is_all else CloseCode.TOO_LARGE, reason, "large-update")
        member.queue.append((update, is_all))
        member.queued_bytes += len(update)
        if member.writing is None:
            member.writing = asyncio.create_task(self._write_all(member))
            self._writes.add(member.writing)
            member.writing.add_done_callback(self._written)
        while len(member.queue) > QUEUE_MAX or member.queued_bytes > QUEUE_BYTES_MAX:
            member.has_room.clear()
            await member.has_room.wait()

    async def _write_all(self, member: _Member) -> None:
        """Take in what waits of a browser, to the end, also if it goes meanwhile: else nobody would
        know what became of the change, and its writer could not go on."""
        try:
            while member.queue:
                async with self._turn:
                    await self._write(member)
                member.has_room.set()
        except Breach as breach:
            member.browser.end(breach)
        except Exception:
            member.browser.end(Breach(AGAIN, "it cannot be taken in now", "undecided"))
            raise
        finally:
            member.queue.clear()
            member.queued_bytes = 0
            member.writing = None
            member.has_room.set()

    def _written(self, writing: asyncio.Task[None]) -> None:
        self._writes.discard(writing)
        if not writing.cancelled() and (failure := writing.exception()) is not None:
            log.error("room %s: a write failed", self.document.name, exc_info=failure)
        self._idle()

    async def _write(self, member: _Member) -> None:
        """Take in the first that waits of a browser."""
        try:
            found = self._gather(member)
            if found is None:
                return
            if not self._guests.is_sure(self._writer, self.document.name):
                self._writer = self._guests.borrow()
            self._native.check(found, self._writer)
        except NotYet:
            member.lacks = True
            return
        except InvalidUpdate as exc:
            raise Breach(CloseCode.INVALID, str(exc), "invalid-update") from exc
        if (fault := await self._try(member, found)) is not None:
            raise Breach(CloseCode.INVALID, fault, "invalid-update")

    def _gather(self, member: _Member) -> bytes | None:
        """What of the first updates that wait is new here, and this browser's to write, as one;
        None: nothing."""
        clocks = dict(self._native.clocks)
        mine: dict[int, Part] = {}
        wanted: Ranges = {}
        size = 0
        for _ in range(min(BATCH, len(member.queue))):
            update, is_all = member.queue[0]
            size += len(update)
            if size > CHANGE_BYTES_MAX and size > len(update):
                break
            parts, deletes = split_update(update, CLIENTS_MAX)
            if any(part.clock < mine[each].end for each, part in parts.items() if each in mine):
                break  # What it says again is for the next change.
            member.queue.popleft()
            member.queued_bytes -= len(update)
            for client, part in self._cut(member, parts, clocks, is_all).items():
                mine[client] = mine[client].then(part) if client in mine else part
                clocks[client] = part.end
            known = self._native.deleted() if is_all and deletes else {}
            for client, ranges in yprotocol.clipped(deletes, clocks, known).items():
                wanted[client] = yprotocol.union(wanted.get(client, []) + ranges)
        return join_update(mine, wanted) if mine or wanted else None

    def _cut(
        self, member: _Member, parts: dict[int, Part], clocks: dict[int, int], is_all: bool
    ) -> dict[int, Part]:
        """What of an update is new, where *clocks* are known, and this browser's to write."""
        if not is_all and parts and not any(is_guest(each) or each in clocks for each in parts):
            # It is told, as it would go on for ever without anybody knowing.
            raise InvalidUpdate("a client's number has 32 bits and is at least 1024, as yjs has it")
        mine: dict[int, Part] = {}
        for client, part in parts.items():
            if part.end <= clocks.get(client, 0):
                continue
            if not self._own(member, client):
                # Of somebody else, whose it is to send. In all that it has that is to be expected.
                member.browser.refused["foreign-items"] += not is_all
                member.lacks = True
            elif part.clock > clocks.get(client, 0):
                member.lacks = True
            else:
                mine[client] = part
        return mine

    def _own(self, member: _Member, client: int) -> bool:
        """Whether a browser may write as *client*, which nobody else does from now on."""
        if member not in self._members:
            # It is gone, and what it was is somebody else's by now, perhaps.
            return client in member.numbers and client not in self._owners
        owner = self._owners.get(client)
        if owner is None and is_guest(client) and client not in self.document.agents:
            if len(member.numbers) >= NUMBERS_MAX:
                return False
            self._owners[client] = owner = member
            member.numbers.add(client)
        return owner is member

    async def _try(self, member: _Member, update: bytes) -> str | None:
        """Bring an update in; returns what is wrong with it, None if nothing is."""
        run = f"yjs/{member.number or next(iter(member.numbers), 0)}"
        origin = self._guests.origin(run, member.name)
        change = self._guests.make(self.document, self._writer, update, origin)
        self._awaited, self._writing = change.dot, member
        self._verdict = asyncio.get_running_loop().create_future()
        try:
            self._replica.take_guest(change)
            async with asyncio.timeout(VERDICT_TIMEOUT):
                fault = await self._verdict
        except NotAllowed as exc:
            self._guests.take_back(change)
            raise Breach(CloseCode.FORBIDDEN, str(exc), "forbidden") from exc
        except (TimeoutError, CRDTStateError) as exc:
            raise Breach(AGAIN, "it cannot be taken in now", "undecided") from exc
        finally:
            self._awaited = self._writing = None
        if fault is not None:
            self._guests.take_back(change)
        return fault

    def _delivered(self, delivery: Delivery) -> None:
        if self._before is not None:
            self._before(delivery)
        change = delivery.change
        update = change.update if change is not None else self._native.state()
        message = yprotocol.sync(yprotocol.UPDATE, update)
        for member in self._members:
            if member is not self._writing or change is None or change.dot != self._awaited:
                member.browser.send(message)
        if change is not None and change.dot == self._awaited:
            self._settle(None)
        else:
            self._has_news = True

    def _quarantined(self, event: ChangeQuarantined) -> None:
        if event.document == self.document.name and self._awaited == (event.writer, event.seq):
            self._settle(event.reason)

    def _settle(self, fault: str | None) -> None:
        if not self._verdict.done():
            self._verdict.set_result(fault)

    # Showing

    def _show(self, member: _Member, body: bytes) -> None:
        now = asyncio.get_running_loop().time()
        if member.awareness.take(1, now):
            raise Breach(CloseCode.RATE, "it shows something else too often", "awareness")
        new = []
        for state in yprotocol.read_states(body, member.browser.limits.awareness_bytes):
            # What it heard of others it says again; it may only speak for itself.
            if state.client in self._elsewhere or not self._own(member, state.client):
                continue
            held = self.shown.get(state.client)
            if held is not None and (state.clock, state.text) == held[1:]:
                continue
            if state.text == "null":
                self.shown.pop(state.client, None)
            else:
                self.shown[state.client] = state
                member.number, member.name = state.client, _name(state.text)
            new.append(state)
        if new:
            self._tell(yprotocol.states(new))
            self._changed()

    def _show_all(self, member: _Member) -> None:
        shown = [*self._elsewhere.values(), *self.shown.values()]
        if shown:
            member.browser.send(yprotocol.states(shown))

    def show_elsewhere(self, found: dict[int, State]) -> None:
        """This is shown at other relays now."""
        found = {number: state for number, state in found.items() if number not in self._owners}
        gone = [
            state._replace(text="null")
            for number, state in self._elsewhere.items()
            if number not in found and number not in self.shown
        ]
        new = [state for number, state in found.items() if self._elsewhere.get(number) != state]
        self._elsewhere = found
        if new or gone:
            self._tell(yprotocol.states([*new, *gone]))


class Rooms:
    """The rooms of one relay.

    Args:
        replica: The relay's replica.
        guests: The writers of its guests.
    """

    def __init__(self, replica: Replica, guests: Guests) -> None:
        self._replica = replica
        self._guests = guests
        self._rooms: dict[str, Room] = {}
        self._showing: asyncio.TimerHandle | None = None
        self._stop: Callable[[], None] | None = None

    async def serve(self, name: str, browser: Browser) -> None:
        """Talk with a browser about the document *name* until it has gone. Raises Breach."""
        room = self._rooms.get(name)
        if room is None:
            try:
                document = self._replica.document(name, shared=True)
            except CRDTStateError as exc:
                raise Breach(CloseCode.FORBIDDEN, str(exc), "forbidden") from exc
            room = self._rooms[name] = Room(
                self._replica,
                document,
                self._guests,
                changed=self._show_soon,
                idle=lambda: self._drop(name),
            )
            self._hear(None)
            if self._stop is None:
                self._stop = self._replica.on(PresenceChanged, self._hear)
        try:
            await room.serve(browser)
        finally:
            self._drop(name)

    def _drop(self, name: str) -> None:
        room = self._rooms.get(name)
        if room is not None and room.is_empty:
            del self._rooms[name]
            room.close()

    def end(self) -> None:
        """Ask all browsers to come again later."""
        for room in self._rooms.values():
            room.end()

    def close(self) -> None:
        """The relay ends."""
        if self._showing is not None:
            self._showing.cancel()
        for room in self._rooms.values():
            room.close()
        self._rooms.clear()

    def _show_soon(self) -> None:
        if self._showing is None:
            loop = asyncio.get_running_loop()
            self._showing = loop.call_later(SHOW_EVERY, self._show_now)

    def _show_now(self) -> None:
        """Tell other relays what is shown here, as far as there is room for it."""
        self._showing = None
        left = SHOWN_BYTES_MAX
        told: dict[str, list[list[Any]]] = {}
        for name, room in self._rooms.items():
            for state in room.shown.values():
                left -= len(state.text) + len(name) + 24
                if left >= 0:
                    told.setdefault(name, []).append(list(state))
        try:
            self._replica.present({"yjs": told} if told else None)
        except CRDTStateError:
            # It is closing.
            pass

    def _hear(self, _: PresenceChanged | None) -> None:
        """Look at what other relays show."""
        found: dict[str, dict[int, State]] = {}
        for agent, value in self._replica.presence().items():
            is_other = type(value) is dict and agent != self._replica.agent
            told = value.get("yjs") if is_other else None
            for name, states in told.items() if type(told) is dict else ():
                for state in _states(states):
                    found.setdefault(name, {})[state.client] = state
        for name, room in self._rooms.items():
            room.show_elsewhere(found.get(name, {}))


def _states(told: object) -> list[State]:
    """States as another relay shows them, if they are any."""
    try:
        encoded = yprotocol.states(State(*each) for each in told)  # type: ignore[attr-defined]
        body = yprotocol.Reader(encoded[1:]).bytes()
        return yprotocol.read_states(body, SHOWN_BYTES_MAX)
    except (TypeError, ValueError, AttributeError, InvalidUpdate):
        return []


def _name(text: str) -> str:
    """What somebody calls itself in what it shows: ``user.name``, as most editors do."""
    user = json.loads(text)
    user = user.get("user") if type(user) is dict else None
    name = user.get("name") if type(user) is dict else None
    return name if type(name) is str else ""
