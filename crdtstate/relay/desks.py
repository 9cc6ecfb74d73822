"""
Desks: browsers that read and write a document of lanes, with ``crdtstate.js``.

A browser has a *session*, with a lane of its own: a guest's writer (see `guests`) and a document
that only this session writes. That document is where the browser is: it takes in what the browser
has seen when it writes, and nothing more. So a write covers what was seen, as everybody's does, and
what was not seen conflicts with it.

Messages are JSON (see `plain`), in both directions:

    {"hello": {"session", "name", "relay", "last"}}              who it is, its newest pending write
    {"welcome": {"relay", "epoch", "number", "known", "unsure"}, "cells": [...]}
    {"number": 7, "cells": [[kind, name, key, value, conflicts]...]}   what changed; no value: gone
    {"write": 3, "seen": 7, "ops": [[op, name, ...]...]}
    {"acked": 3}, {"refused": 3, "reason": "..."}
    {"bye": true}                                                the session will not come back

A write is acknowledged when it is committed. Which writes of a session there were is written in the
same change, under the session in the map `SESSIONS`: so a write that comes again, after a broken
connection or a restart of this relay, is told from one that is new. Another relay, or one that has
lost its store, may not know yet what the first has. There a browser is told that it is *unsure*
whether its pending writes were made, and does not send them again.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from crdtstate.change import Change
from crdtstate.document import Delivery, Document
from crdtstate.errors import CRDTStateError, NotAllowed, UsageError
from crdtstate.events import ChangeQuarantined, ChangeReleased, Event, KeyRevoked
from crdtstate.limits import CloseCode
from crdtstate.relay import plain
from crdtstate.relay.browsers import AGAIN, Breach, Browser
from crdtstate.relay.guests import Guests, printable
from crdtstate.replica import Replica
from crdtstate.slots import SEPARATOR
from crdtstate.values import unpack_key

SESSIONS = "@sessions"
"""The map of a document in which sessions say what they have written: session -> ``[write, day]``.
Names that begin with @ are not shown to browsers."""

MESSAGE_BYTES_MAX = 1 << 20
"""A larger one ends the connection (1009)."""

STATE_BYTES_MAX = 8 * 2**20
"""Documents that are larger, encoded, are not for browsers."""

OPS_MAX = 1000
"""What one write may do."""

UNSEEN_MAX = 1000
"""Changes that a session has not seen and may still not count as seen."""

GRACE = 60.0
"""Seconds for which a session that is cut off stays as it is."""

AWAY_MAX = 64
"""Sessions that stay so."""

DAYS = 30
"""Sessions that have not written for so long are forgotten, a few whenever one begins."""
FORGOTTEN_AT_ONCE = 50

SAVE_TIMEOUT = 30.0

SILENCE_MAX = 15.0
"""Seconds after which browsers hear that the relay is still there."""

SESSION = re.compile(r"[A-Za-z0-9_-]{16,64}")
KINDS = {"m": "map", "r": "register", "c": "counter", "s": "set"}


class _Session:
    """One browser, and where it is in the document.

    Args:
        name: Its name, which nobody can guess.
        document: The document as it has seen it.
    """

    def __init__(self, name: str, document: Document) -> None:
        self.name = name
        self.document = document
        self.browser: Browser | None = None
        self.label = ""
        # What it has not seen, with the numbers under which it was told.
        self.unseen: deque[tuple[int, Change]] = deque()
        self.refused: dict[int, str] = {}
        # What it wrote is not what the document has.
        self.is_spoilt = False
        self.leaving: asyncio.TimerHandle | None = None

    def see(self, number: int) -> None:
        """It has seen what it was told up to *number*."""
        while self.unseen and self.unseen[0][0] <= number:
            _, change = self.unseen.popleft()
            if not self.document.version.covers(change.dot):
                self.document.apply(change)


class Desk:
    """One document, and the sessions that have it open.

    Args:
        replica: The relay's replica.
        document: The document.
        guests: Has the writers of the sessions.
    """

    def __init__(self, replica: Replica, document: Document, guests: Guests) -> None:
        self.document = document
        self._replica = replica
        self._guests = guests
        self._sessions: dict[str, _Session] = {}
        self._number = 0
        self._epoch = f"{id(self):x}-{time.time_ns():x}"
        self._before = document.on_delivered
        document.on_delivered = self._delivered
        watched: tuple[type[Event], ...] = (ChangeQuarantined, ChangeReleased, KeyRevoked)
        self._stops = [replica.on(kind, self._reread) for kind in watched]
        self._chores = asyncio.create_task(self._say_so(), name=f"desk {document.name}")

    @property
    def is_empty(self) -> bool:
        return not self._sessions

    def close(self) -> None:
        self._chores.cancel()
        for stop in self._stops:
            stop()
        for session in list(self._sessions.values()):
            self._part(session)
        self.document.on_delivered = self._before

    def end(self) -> None:
        """Ask everybody to come again later."""
        for session in self._sessions.values():
            if session.browser is not None:
                session.browser.end(Breach(AGAIN, "the relay is on its way out"))

    # A browser

    async def serve(self, browser: Browser, left: Callable[[], None]) -> None:
        """Talk with a browser until it has gone; *left* is called when its session has ended.
        Raises Breach, TransportError."""
        hello = _fields(await browser.receive()).get("hello")
        if type(hello) is not dict:
            raise Breach(CloseCode.BAD_FRAME, "say hello first", "bad-frame")
        session = self._begin(hello, browser)
        is_over = False
        try:
            self._welcome(session, hello)
            while not is_over:
                message = _fields(await browser.receive())
                if "write" in message:
                    await self._write(session, message)
                is_over = bool(message.get("bye"))
        finally:
            if session.browser is browser:
                session.browser = None
                away = sum(each.browser is None for each in self._sessions.values())
                if is_over or away > AWAY_MAX:
                    self._end(session, is_over, left)
                else:
                    loop = asyncio.get_running_loop()
                    session.leaving = loop.call_later(GRACE, self._end, session, False, left)

    def _begin(self, hello: dict[str, Any], browser: Browser) -> _Session:
        name = hello.get("session")
        if type(name) is not str or not SESSION.fullmatch(name):
            raise Breach(CloseCode.BAD_FRAME, "a session has 16 to 64 characters", "bad-frame")
        session = self._sessions.get(name)
        if session is not None and not self._is_sound(session):
            self._part(session)
            session = None
        if session is None:
            session = self._sessions[name] = _Session(name, self._open())
        elif session.browser is not None:
            session.browser.end(Breach(CloseCode.DUPLICATE, "the session goes on elsewhere"))
        if session.leaving is not None:
            session.leaving.cancel()
            session.leaving = None
        session.browser = browser
        label = hello.get("name")
        session.label = printable(label) if type(label) is str else ""
        return session

    def _open(self) -> Document:
        """The document as a new session has it."""
        snapshot = self.document.snapshot()
        if len(snapshot.state) > STATE_BYTES_MAX:
            reason = f"the document is larger than {STATE_BYTES_MAX} bytes"
            raise Breach(CloseCode.TOO_LARGE, reason, "large-document")
        found = self._replica.guest_document(self.document.name, self._guests.borrow())
        found.join(snapshot)
        return found

    def _is_sound(self, session: _Session) -> bool:
        is_sure = self._guests.is_sure(session.document.writer, self.document.name)
        return is_sure and not session.is_spoilt

    def _part(self, session: _Session) -> None:
        """A session is gone, as far as this process knows."""
        if session.leaving is not None:
            session.leaving.cancel()
        del self._sessions[session.name]
        self._guests.give_back(session.document.writer)
        session.document.close()

    def _end(self, session: _Session, is_over: bool, left: Callable[[], None]) -> None:
        if self._sessions.get(session.name) is not session:
            return
        if is_over:
            try:
                session.see(self._number)
                if session.name in session.document.map(SESSIONS):
                    del session.document.map(SESSIONS)[session.name]
                self._bring_in(session)
            except (CRDTStateError, Breach):
                session.document.rollback()
        self._part(session)
        left()

    def _known(self, session: str) -> int:
        """The newest write of a session that is in the document."""
        match self.document.map(SESSIONS).get(session):
            case [int(number), _]:
                return number
        return 0

    def _welcome(self, session: _Session, hello: dict[str, Any]) -> None:
        relay, known = f"{self.document.writer:x}", self._known(session.name)
        last = hello.get("last")
        pending = type(last) is int and last > known
        told = {
            "relay": relay,
            "epoch": self._epoch,
            "number": self._number,
            "known": known,
            "unsure": pending and hello.get("relay") not in (None, relay),
        }
        assert session.browser is not None
        session.browser.send(plain.write({"welcome": told, "cells": self._cells(self._paths())}))

    # Writing

    async def _write(self, session: _Session, message: dict[str, Any]) -> None:
        match message:
            case {"write": int(number), "seen": int(seen), "ops": [_, *_] as ops}:
                is_right = 0 < number <= plain.SAFE_MAX and len(ops) <= OPS_MAX
            case _:
                is_right = False
        if not is_right:
            raise Breach(CloseCode.BAD_FRAME, "a write has a number and operations", "bad-frame")
        browser = session.browser
        if browser is None:
            return
        if number not in session.refused and number > self._known(session.name):
            if not self._is_sound(session):
                raise Breach(AGAIN, "the document was loaded anew")
            self._make(session, number, seen, ops)
        if number in session.refused:
            browser.send(plain.write({"refused": number, "reason": session.refused[number]}))
            return
        try:
            await self._replica.durable(SAVE_TIMEOUT)
        except CRDTStateError as exc:
            raise Breach(AGAIN, f"it cannot be saved now: {exc}", "undecided") from exc
        browser.send(plain.write({"acked": number}))

    def _make(self, session: _Session, number: int, seen: int, ops: list[Any]) -> None:
        """Make a write, or note why it is refused."""
        session.see(seen)
        document = session.document
        try:
            for op in ops:
                _do(document, op)
            self._note(session, number)
            self._bring_in(session)
        except NotAllowed as exc:
            document.rollback()
            raise Breach(CloseCode.FORBIDDEN, str(exc), "forbidden") from exc
        except CRDTStateError as exc:
            document.rollback()
            session.refused[number] = str(exc)
            if len(session.refused) > OPS_MAX:
                del session.refused[next(iter(session.refused))]

    def _note(self, session: _Session, number: int) -> None:
        """Write down that there was this write; and, with its first, forget old sessions."""
        sessions = session.document.map(SESSIONS)
        today = self._replica.wall_ms() // 86_400_000
        if session.name not in sessions:
            old = [name for name, found in sessions.items() if _is_old(found, today)]
            for name in old[:FORGOTTEN_AT_ONCE]:
                del sessions[name]
        sessions[session.name] = [number, today]

    def _bring_in(self, session: _Session) -> None:
        """Make a change of what is open in the session's document, for everybody."""
        origin = self._guests.origin(f"browser/{session.name[:8]}", session.label)
        change = session.document.seal(origin)
        if change is None:
            return
        self._guests.note(change)
        self._replica.take_guest(change)
        if not self.document.version.covers(change.dot):
            # What it has written is nowhere: it begins anew.
            self._guests.take_back(change)
            session.is_spoilt = True
            raise Breach(AGAIN, "it cannot be taken in now", "undecided")

    # Reading

    def _delivered(self, delivery: Delivery) -> None:
        if self._before is not None:
            self._before(delivery)
        self._number += 1
        change = delivery.change
        for session in self._sessions.values():
            if change is None:
                session.unseen.clear()
                session.document.join(self.document.snapshot())
            elif change.writer != session.document.writer:
                session.unseen.append((self._number, change))
                if len(session.unseen) > UNSEEN_MAX:
                    session.see(session.unseen[0][0])
        is_all = change is None or any(path.startswith("@") for path in delivery.paths)
        self._tell(self._paths() if is_all else delivery.paths)

    def _reread(self, event: Event) -> None:
        """Something is hidden, or shown again."""
        if getattr(event, "document", self.document.name) == self.document.name:
            self._number += 1
            self._tell(self._paths())

    def _tell(self, paths: Iterable[str]) -> None:
        browsers = [each.browser for each in self._sessions.values() if each.browser is not None]
        if browsers:
            text = plain.write({"number": self._number, "cells": self._cells(paths)})
            for browser in browsers:
                browser.send(text)

    async def _say_so(self) -> None:
        while True:
            await asyncio.sleep(SILENCE_MAX)
            self._tell(())

    def _paths(self) -> list[str]:
        return [
            container + SEPARATOR + key
            for container, cells in self.document.lanes.containers.items()
            for key in list(cells.cells)
        ]

    def _cells(self, paths: Iterable[str]) -> list[list[Any]]:
        """What stands at these paths, for browsers."""
        return [
            cell
            for path in paths
            if path[0] in KINDS and path[1] != "@" and (cell := self._cell(path)) is not None
        ]

    def _cell(self, path: str) -> list[Any] | None:
        container, _, key = path.partition(SEPARATOR)
        document, name = self.document, container[1:]
        kind = KINDS[container[0]]
        if kind == "counter":
            return [kind, name, None, plain.encode(document.counter(name).value)]
        if kind == "set":
            try:
                element = unpack_key(key)
            except (CRDTStateError, ValueError):
                return None
            return [kind, name, plain.encode(element), element in document.set(name)]
        live = document.map(name).live(key) if kind == "map" else document.register(name).live("")
        place: list[Any] = [kind, name, key if kind == "map" else None]
        if not live:
            return place
        try:
            view = document.map(name) if kind == "map" else None
            value = view[key] if view is not None else document.register(name).value
        except Exception:
            # The strategy is not known here, or fails.
            value = live[-1].value
        place.append(plain.encode(value))
        found = document.conflict(container, key)
        if found is not None:
            place.append([[plain.encode(each.value), each.agent] for each in found.candidates])
        return place


class Desks:
    """The desks of one relay.

    Args:
        replica: The relay's replica.
        guests: The writers of its guests.
    """

    def __init__(self, replica: Replica, guests: Guests) -> None:
        self._replica = replica
        self._guests = guests
        self._desks: dict[str, Desk] = {}

    async def serve(self, name: str, browser: Browser) -> None:
        """Talk with a browser about the document *name* until it has gone. Raises Breach."""
        desk = self._desks.get(name)
        if desk is None:
            try:
                document = self._replica.document(name)
            except CRDTStateError as exc:
                raise Breach(CloseCode.FORBIDDEN, str(exc), "forbidden") from exc
            if document.shared:
                reason = f"{name!r} holds native Yjs types; see /yjs/"
                raise Breach(CloseCode.FORBIDDEN, reason, "forbidden")
            desk = self._desks[name] = Desk(self._replica, document, self._guests)
        try:
            await desk.serve(browser, lambda: self._left(name, desk))
        finally:
            self._left(name, desk)

    def _left(self, name: str, desk: Desk) -> None:
        if desk.is_empty and self._desks.get(name) is desk:
            del self._desks[name]
            desk.close()

    def end(self) -> None:
        """Ask all browsers to come again later."""
        for desk in self._desks.values():
            desk.end()

    def close(self) -> None:
        """The relay ends."""
        for desk in self._desks.values():
            desk.close()
        self._desks.clear()


def _fields(data: str | bytes) -> dict[str, Any]:
    """A message. Raises Breach if it is none."""
    try:
        found = plain.read(data) if isinstance(data, str) else None
    except ValueError:
        found = None
    if type(found) is not dict:
        raise Breach(CloseCode.BAD_FRAME, "a message is a JSON object", "bad-frame")
    return found


def _is_old(found: Any, today: int) -> bool:
    match found:
        case [_, int(day)]:
            return day < today - DAYS
    return True


def _do(document: Document, op: Any) -> None:
    """Do what a browser asks for. Raises CRDTStateError."""
    if type(op) is not list or len(op) < 2 or type(op[1]) is not str or op[1].startswith("@"):
        raise UsageError("an operation is a list: what to do, and the name of what it is done to")
    what, name, *rest = op
    match what, rest:
        case "put", [str(key), value]:
            document.map(name)[key] = plain.decode(value)
        case "remove", [str(key)]:
            document.map(name).pop(key, None)
        case "set", [value]:
            document.register(name).value = plain.decode(value)
        case "clear", []:
            document.register(name).clear()
        case "count", [by]:
            document.counter(name).increment(plain.decode(by))
        case "add", [value]:
            document.set(name).add(_element(plain.decode(value)))
        case "discard", [value]:
            document.set(name).discard(_element(plain.decode(value)))
        case _:
            raise UsageError(f"no such operation: {str(what)[:40]}, with {len(rest)} arguments")


def _element(value: Any) -> Any:
    """A list stands for a tuple, which can be in a set."""
    return tuple(_element(each) for each in value) if type(value) is list else value
