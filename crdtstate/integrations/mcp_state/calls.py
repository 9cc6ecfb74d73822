"""
What the tools do: one method each, over one replica, and only where they may go.

Each takes arguments that were checked, and gives an `Answer`: the same as data and as text. What is
outside of the scope is refused before anything is read, and nothing says whether it is there. What
a method that writes has answered is durable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

from crdtstate.conflict import Candidate
from crdtstate.crdts import Map, Register
from crdtstate.documents import SYSTEM
from crdtstate.errors import UsageError
from crdtstate.events import Changed
from crdtstate.integrations.mcp_state.claims import SETTLE, Claims, Outcome, claimed_place
from crdtstate.integrations.mcp_state.digest import Digests, is_at, place_of
from crdtstate.integrations.mcp_state.places import (
    KINDS,
    LETTERS,
    OWN,
    Place,
    Scope,
    as_json,
    cut,
    parse,
    plain,
    printable,
    shown,
)
from crdtstate.replica import Replica
from crdtstate.slots import Cell, candidates
from crdtstate.values import unpack_key

CHARS_DEFAULT, CHARS_MAX = 20_000, 200_000
"""Of one answer."""

DIGEST_DEFAULT, DIGEST_MIN = 4000, 200

LIMIT_DEFAULT, LIMIT_MAX = 50, 500

WATCH_DEFAULT, WATCH_MAX = 25.0, 300.0
"""Seconds; many clients give up after 60."""

WATCHED_MAX = 100
"""Changes that one watching tells of."""

CLAIMS_SHOWN = 20

SEARCH_CHARS = 200
"""Of a value that search shows."""

TURN = 500
"""Places that are searched before others have their turn."""

ARRIVE_TIMEOUT = 2.0
"""Seconds to wait for the changes that a token of another agent names."""

HISTORY_MAX = 200


class Answer(NamedTuple):
    """What a tool answers: as data, and as text."""

    data: dict[str, Any]
    text: str | None = None


class Calls:
    """What agents ask of one replica.

    Args:
        replica: What they read and write; it is open.
        saved: Waits until what was written so far is durable.
        scope: Which places they may touch.
        settle: How long a claim waits at most for others.
    """

    def __init__(
        self,
        replica: Replica,
        saved: Callable[[], Awaitable[None]],
        scope: Scope,
        settle: float = SETTLE,
    ) -> None:
        self.replica, self._saved, self.scope = replica, saved, scope
        self.digests = Digests(replica, scope)
        self.claims = Claims(replica, saved, settle)

    def close(self) -> None:
        self.digests.close()

    # Reading

    async def get(self, given: dict[str, Any]) -> Answer:
        place = parse(given["place"])
        chars_max = given.get("max_chars", CHARS_DEFAULT)
        found: dict[str, Any] = {"place": str(place), "exists": False, "value": None}
        found["truncated"] = False
        document = self.replica.find(place.document)
        if place.key is None and place.kind in ("map", "set"):
            return Answer(self._get_all(place, given.get("after"), chars_max, found))
        self.scope.check_read(place)
        if document is None or document.shared:
            return Answer(found)
        if place.kind == "counter":
            cells = document.lanes.containers.get(place.container)
            found["exists"] = cells is not None and "" in cells.cells
            found["value"] = document.counter(place.name).value
            return Answer(found)
        view, key = self._view(place)
        live = view.live(key)
        if live:
            value = plain(_value_of(view, key))
            text = as_json(value)
            found |= {"exists": True, "value": value}
            if len(text) > chars_max:
                found |= {"value": text[:chars_max], "truncated": True}
            found |= _by(live[-1])
        if conflict := view.candidates_of(key):
            found["conflict"] = [_candidate(each) for each in conflict]
        return Answer(found)

    def _get_all(
        self, place: Place, after: str | None, chars_max: int, found: dict[str, Any]
    ) -> dict[str, Any]:
        """All of a map or a set that may be seen, in order, as far as it fits."""
        document = self.replica.find(place.document)
        may_all = self.scope.may_read(place)
        cells = None
        if document is not None and not document.shared:
            cells = document.lanes.containers.get(place.container)
        keys = sorted(cells.keys()) if cells is not None else []
        if place.kind == "map" and not may_all:
            keys = [key for key in keys if self.scope.may_read(place._replace(key=key))]
        if not may_all and (place.kind == "set" or not keys):
            self.scope.check_read(place)
        values: dict[str, Any] = {}
        room = chars_max
        for key in keys:
            if after is not None and key <= after:
                continue
            assert document is not None
            if place.kind == "map":
                value = plain(_value_of(document.map(place.name), key))
            else:
                value = plain(unpack_key(key))
            room -= len(as_json(value)) + len(key) + 6
            if room < 0 and values:
                found |= {"truncated": True, "next": next(reversed(values))}
                break
            if room < 0:
                value = as_json(value)[:chars_max]
                found["truncated"] = True
            values[key] = value
        contents = values if place.kind == "map" else list(values.values())
        return found | {"exists": bool(keys), "value": contents, "count": len(keys)}

    async def search(self, given: dict[str, Any]) -> Answer:
        query, under = given.get("query", "").casefold(), given.get("under", "")
        limit = given.get("limit", LIMIT_DEFAULT)
        found: list[dict[str, Any]] = []
        more = False
        looked = 0
        for place, document, cell, key in self.all_places():
            looked += 1
            if looked % TURN == 0:
                await asyncio.sleep(0)
            text = str(place)
            if under and not (text == under or text.startswith(under.rstrip("/") + "/")):
                continue
            value = self._shown_value(place, document, cell, key)
            if query and query not in text.casefold() and query not in value.casefold():
                continue
            if len(found) == limit:
                more = True
                break
            found.append({"place": text, "value": cut(value, SEARCH_CHARS)})
        lines = [f"{shown(each['place'])} = {each['value']}" for each in found]
        lines.append("# there is more: raise limit, or search under a place" if more else "")
        text = "\n".join(lines).strip() or "# nothing found"
        return Answer({"found": found, "more": more}, text)

    def all_places(self) -> Iterator[tuple[Place, Any, Cell, str]]:
        """All that may be seen, as it is when it is come by."""
        for name in list(self.replica.documents()):
            document = self.replica.find(name)
            if name.startswith(SYSTEM) or name == OWN or document is None or document.shared:
                continue
            for container in sorted(document.lanes.containers):
                kind = LETTERS.get(container[0])
                cells = document.lanes.containers.get(container)
                if kind is None or cells is None:
                    continue
                may_all = self.scope.may_read(Place(name, kind, container[1:]))
                keys = [""] if kind == "counter" else sorted(cells.keys())
                for key in keys:
                    cell = cells.cells.get(key)
                    place = Place(name, kind, container[1:], key if kind == "map" else None)
                    if cell and (may_all or self.scope.may_read(place)):
                        yield place, document, cell, key

    def views(self) -> Iterator[Place]:
        """All views of which something may be seen."""
        for name in self.replica.documents():
            document = self.replica.find(name)
            if name.startswith(SYSTEM) or name == OWN or document is None or document.shared:
                continue
            for container, cells in sorted(document.lanes.containers.items()):
                if (kind := LETTERS.get(container[0])) is None or not len(cells):
                    continue
                view = Place(name, kind, container[1:])
                if self.scope.may_read(view) or any(
                    kind == "map" and self.scope.may_read(view._replace(key=key))
                    for key in cells.keys()
                ):
                    yield view

    def _shown_value(self, place: Place, document: Any, cell: Cell, key: str) -> str:
        match place.kind:
            case "counter":
                return str(document.counter(place.name).value)
            case "set":
                return as_json(unpack_key(key))
        view = document.map(place.name) if place.kind == "map" else document.register(place.name)
        return as_json(_value_of(view, key)) if candidates(cell) else ""

    async def history(self, given: dict[str, Any]) -> Answer:
        place = parse(given["place"])
        self.scope.check_read(place)
        limit = given.get("limit", 20)
        changes: list[dict[str, Any]] = []
        # A change names views without their kind.
        for kind in KINDS:
            namesake = place.view._replace(kind=kind)
            if self._is_there(namesake) and not self._may_see(namesake, place):
                raise UsageError(f"{place}: its history cannot be told apart from what is outside")
        if self.replica.find(place.document) is not None:
            await self._saved()
            path = place.name if place.key is None else f"{place.name}[{place.key!r}]"
            reader = self.replica.history(place.document, path=path)
            async for change in reader:
                changes.append(
                    {
                        "agent": change.agent,
                        "when": change.stamp.time.isoformat(),
                        "kind": change.kind,
                        "message": change.message,
                        "run": change.run,
                    }
                )
                del changes[:-limit]
        lines = [
            f"{each['when']} {shown(each['agent'])} {each['kind']}"
            + (f": {as_json(each['message'])}" if each["message"] else "")
            for each in changes
        ]
        text = "\n".join(lines) or "# nothing is known of it"
        return Answer({"place": str(place), "changes": changes}, text)

    def _is_there(self, view: Place) -> bool:
        document = self.replica.find(view.document)
        return document is not None and view.container in document.lanes.containers

    def _may_see(self, namesake: Place, place: Place) -> bool:
        """Whether a view may be read, as far as it could pass for *place*."""
        if place.key is None or namesake.kind not in ("map", "set"):
            return place.key is not None or self.scope.may_read(namesake)
        same = namesake._replace(key=place.key) if namesake.kind == "map" else namesake
        return self.scope.may_read(same)

    async def explain(self, given: dict[str, Any]) -> Answer:
        place = parse(given["place"])
        self.scope.check_read(place)
        self._check_value_place(place)
        data: dict[str, Any] = {"place": str(place), "value": None, "rule": "no value"}
        data |= {"candidates": [], "resolved_before": []}
        if self.replica.find(place.document) is None:
            return Answer(data)
        view, key = self._view(place)
        found = view.explain(key) if isinstance(view, Map) else view.explain()
        data |= {"value": plain(found.value), "rule": found.rule}
        data["candidates"] = [_candidate(each) for each in found.candidates]
        data["is_conflict"] = bool(view.candidates_of(key))
        data["resolved_before"] = [cut(printable(str(each)), 500) for each in found.earlier]
        return Answer(data)

    async def changes_since(self, given: dict[str, Any]) -> Answer:
        token = given.get("token", "")
        if self.digests.is_ahead(token):
            await self._arrive(token)
        chars_max = given.get("max_chars", DIGEST_DEFAULT)
        claims = self._claims_text(chars_max // 4)
        report = self.digests.since(token, chars_max - len(claims))
        data = {
            "text": report.text,
            "token": report.token,
            "is_full": report.is_full,
            "more": report.more,
            "changes": [
                {
                    "place": str(line.place),
                    "value": cut(as_json(line.value), SEARCH_CHARS),
                    "removed": line.is_removal,
                    "agents": list(line.agents),
                }
                for line in report.lines
            ],
            "left_out": report.left_out,
            "conflicts": [str(place_of(each)) for each in report.conflicts],
        }
        return Answer(data, f"{report.text}{claims}\n# token: {report.token}")

    async def _arrive(self, token: str) -> None:
        """Wait for what another agent had when it got a token; in vain, if that is elsewhere."""
        changed = asyncio.Event()
        cancel = self.replica.on(Changed, lambda _: changed.set())
        try:
            async with asyncio.timeout(ARRIVE_TIMEOUT):
                while self.digests.is_ahead(token):
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            pass
        finally:
            cancel()

    def _claims_text(self, chars_max: int) -> str:
        """Who has claimed what, the newest; nothing if nobody has, or if it would be too long."""
        found = [
            each
            for each in self.claims.all()
            if (place := claimed_place(each)) is not None and self.scope.may_read(place)
        ]
        if not found:
            return ""
        lines = [
            f"{shown(each.place)} until {_time(each.until)} ({shown(each.agent)})"
            for each in found[-CLAIMS_SHOWN:]
        ]
        head = f"\n# {len(found)} claimed, newest last:"
        while lines and len(head) + sum(len(line) + 1 for line in lines) > chars_max:
            del lines[0]
        return "\n".join([head, *lines])

    # Waiting

    async def watch(self, given: dict[str, Any]) -> Answer:
        place = parse(given["place"])
        if place.kind != "map" or place.key is not None:
            self.scope.check_read(place)
        token = given.get("token", "")
        changes: list[dict[str, Any]] = []
        if token:
            if self.digests.is_ahead(token):
                await self._arrive(token)
            found = self.digests.changes_at(place, token)
            for line in (found or [])[-WATCHED_MAX:]:
                agent = ", ".join(line.agents)
                changes.append(_change(line.place, line.value, agent, line.is_removal))
        if not changes:
            await self._watch(place, given.get("timeout", WATCH_DEFAULT), changes)
        data = {"changed": bool(changes), "changes": changes, "token": self.digests.now()}
        return Answer(data)

    async def _watch(self, place: Place, timeout: float, changes: list[dict[str, Any]]) -> None:
        arrived = asyncio.Event()

        def note(event: Changed) -> None:
            if event.kind not in ("map", "counter", "register", "set"):
                return
            key = event.key if event.kind == "map" else None
            where = Place(event.document, event.kind, event.name, key)
            if is_at(where, place) and self.scope.may_read(where) and len(changes) < WATCHED_MAX:
                removed = event.value is None and event.kind != "counter"
                value = event.key if event.kind == "set" else event.value
                changes.append(_change(where, value, event.agent, removed))
                arrived.set()

        cancel = self.replica.on(Changed, note)
        try:
            async with asyncio.timeout(timeout):
                await arrived.wait()
        except TimeoutError:
            pass
        finally:
            cancel()

    # Writing

    async def set(self, given: dict[str, Any]) -> Answer:
        place = self._to_write(given)
        self._check_value_place(place)
        view, key = self._view(place)
        covered = len(view.candidates_of(key))
        with self.replica.transaction(message=given.get("message", "")):
            if isinstance(view, Map):
                view[key] = given["value"]
            else:
                view.value = given["value"]
        await self._saved()
        return Answer({"place": str(place), "saved": True, "covered_conflict": covered > 0})

    async def delete(self, given: dict[str, Any]) -> Answer:
        place = self._to_write(given)
        self._check_value_place(place)
        view, key = self._view(place)
        existed = bool(view.live(key))
        with self.replica.transaction(message=given.get("message", "")):
            if isinstance(view, Map):
                view.pop(key, None)
            else:
                view.clear()
        await self._saved()
        return Answer({"place": str(place), "existed": existed})

    async def increment(self, given: dict[str, Any]) -> Answer:
        place = self._to_write(given, "counter")
        counter = self.replica.document(place.document).counter(place.name)
        with self.replica.transaction(message=given.get("message", "")):
            counter.increment(int(given.get("by", 1)))
        await self._saved()
        return Answer({"place": str(place), "value": counter.value})

    async def add(self, given: dict[str, Any]) -> Answer:
        return await self._alter_set(given, is_there=True)

    async def remove(self, given: dict[str, Any]) -> Answer:
        return await self._alter_set(given, is_there=False)

    async def _alter_set(self, given: dict[str, Any], *, is_there: bool) -> Answer:
        place = self._to_write(given, "set")
        found = self.replica.document(place.document).set(place.name)
        element = _hashable(given["value"])
        was_there = element in found
        with self.replica.transaction(message=given.get("message", "")):
            (found.add if is_there else found.discard)(element)
        await self._saved()
        data = {"place": str(place), "was_there": was_there, "count": len(found)}
        return Answer(data)

    async def resolve(self, given: dict[str, Any]) -> Answer:
        place = self._to_write(given)
        self._check_value_place(place)
        view, key = self._view(place)
        lost = [_candidate(each) for each in view.candidates_of(key)]
        if lost:
            with self.replica.transaction(message=given.get("message", "")):
                if isinstance(view, Map):
                    view.resolve(key, given["value"])
                else:
                    view.resolve(given["value"])
            await self._saved()
        return Answer({"place": str(place), "resolved": bool(lost), "candidates": lost})

    async def claim(self, given: dict[str, Any]) -> Answer:
        place = parse(given["place"])
        match given.get("action", "claim"):
            case "look":
                self.scope.check_read(place)
                found = self.claims.look(place)
            case "release":
                self.scope.check_write(place)
                found = await self.claims.release(place)
            case _:
                self.scope.check_write(place)
                found = await self.claims.claim(place, given.get("ttl", 300), given.get("why", ""))
        return Answer(_outcome(place, found), _outcome_text(place, found))

    async def checkpoint(self, given: dict[str, Any]) -> Answer:
        await self._saved()
        found = await self.replica.checkpoint(given.get("label", ""))
        data = {"id": found.id, "label": found.label, "bytes": found.size}
        return Answer(data | {"when": found.stamp.time.isoformat(), "kept_in": list(found.tiers)})

    def _to_write(self, given: dict[str, Any], kind: str = "") -> Place:
        place = parse(given["place"])
        self.scope.check_write(place)
        if kind and place.kind != kind:
            raise UsageError(f"{place} is a {place.kind}, not a {kind}: {_USE[place.kind]}")
        return place

    def _check_value_place(self, place: Place) -> None:
        """Raise UsageError unless it has one value: a map's key, or a register."""
        if place.kind not in ("map", "register"):
            raise UsageError(f"{place} is a {place.kind}: {_USE[place.kind]}")
        if place.kind == "map" and place.key is None:
            raise UsageError(f"{place} is a whole map; say which key: {place}/KEY")

    def _view(self, place: Place) -> tuple[Map | Register, str]:
        document = self.replica.document(place.document)
        if place.kind == "map":
            return document.map(place.name), document.check_key(place.key or "", place.name)
        return document.register(place.name), ""


_USE = {
    "map": "state_set, state_get and state_delete take DOCUMENT/map/NAME/KEY",
    "register": "state_set, state_get and state_delete take it",
    "counter": "state_increment adds to it, state_get reads it",
    "set": "state_add and state_remove alter it, state_get reads it",
}


def _value_of(view: Map | Register, key: str) -> Any:
    """What is read; where a strategy fails, or is of other agents, what was written last."""
    try:
        return view[key] if isinstance(view, Map) else view.value
    except Exception:
        # The strategy is the user's own function.
        return view.live(key)[-1].value


def _hashable(value: Any) -> Any:
    return tuple(_hashable(each) for each in value) if isinstance(value, list) else value


def _by(candidate: Candidate) -> dict[str, Any]:
    return {"agent": candidate.agent, "when": candidate.stamp.time.isoformat()}


def _candidate(candidate: Candidate) -> dict[str, Any]:
    text = as_json(candidate.value)
    value = plain(candidate.value) if len(text) <= CHARS_DEFAULT else text[:CHARS_DEFAULT]
    return {"value": value, **_by(candidate)}


def _change(place: Place, value: Any, agent: str, is_removal: bool) -> dict[str, Any]:
    text = as_json(value)
    shown_value = plain(value) if len(text) <= CHARS_DEFAULT else text[:CHARS_DEFAULT]
    return {"place": str(place), "value": shown_value, "agent": agent, "removed": is_removal}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _outcome(place: Place, found: Outcome) -> dict[str, Any]:
    until = _time(found.until) if found.holder is not None else None
    data = {"place": str(place), "state": found.state, "holder": found.holder, "until": until}
    return data | {"why": found.why, "all_heard": found.is_settled}


def _outcome_text(place: Place, found: Outcome) -> str:
    where = shown(place)
    match found.state:
        case "won":
            text = f"{where} is yours until {_time(found.until)}; release it when you are done"
        case "free" | "released":
            text = f"{where} is free"
        case _ if found.holder is None:
            text = f"{where} is not yours: the claim was gone before it counted; try again"
        case _:
            text = f"{where} is held by {shown(found.holder)} until {_time(found.until)}"
            text += f": {as_json(found.why)}" if found.why else ""
    if not found.is_settled:
        text += " (not all agents answered in time: one that cannot be reached may think otherwise)"
    return text
