"""
Reading and writing values through a peer, or reading them from a store.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from crdtstate.cli.options import (
    Agent,
    AsJson,
    MaybePeer,
    Mesh,
    Modules,
    Peer,
    StoreToRead,
    Timeout,
    WholePlace,
    choose,
)
from crdtstate.cli.places import Place, parse_place, parse_place_to_write, parse_value
from crdtstate.cli.printing import as_text, note, print_json, printable
from crdtstate.cli.reaching import dialled, run, sync
from crdtstate.conflict import known_strategies, lww, strategy
from crdtstate.crdts import Map, Register
from crdtstate.documents import DocumentSet
from crdtstate.errors import CRDTStateError
from crdtstate.events import Changed, PeerConnected, PeerDisconnected
from crdtstate.stores.file import read_documents, reading

View = TypeVar("View", Map, Register)


def get(
    context: typer.Context,
    place: WholePlace,
    peer: MaybePeer = None,
    store: StoreToRead = None,
    mesh: Mesh = None,
    modules: Modules = None,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Print a value, or a whole map or set.

    Example: [cyan]crdtstate get main/map/plan/goal --peer ws://127.0.0.1:8765[/cyan]
    """
    where = parse_place(place)
    choose(context, peer, store)
    if store is not None:
        with reading(store) as db:
            value = _read(read_documents(db, store), where)
    else:
        assert peer is not None
        value = run(_get(peer, timeout, mesh, where))
    if as_json:
        print_json(value)
    elif isinstance(value, dict) and where.kind == "map" and where.key is None:
        for key in sorted(value):
            print(f"{printable(key)} = {as_text(value[key])}")
    elif where.kind == "set":
        for item in value:
            print(printable(item) if isinstance(item, str) else as_text(item))
    else:
        print(printable(value, "\n\t") if isinstance(value, str) else as_text(value))


async def _get(peer: str, timeout: float, mesh: Path | None, place: Place) -> Any:
    async with dialled(peer, timeout, mesh) as replica:
        return _read(replica, place)


def _read(documents: DocumentSet, place: Place) -> Any:
    document = documents.document(place.document)
    match place.kind:
        case "counter":
            return document.counter(place.name).value
        case "set":
            return sorted(document.set(place.name), key=as_text)
        case "map":
            view = readable(document.map(place.name))
            if place.key is None:
                return dict(view)
            if place.key in view:
                return view[place.key]
        case "register":
            register = readable(document.register(place.name))
            if register.is_set:
                return register.value
    raise CRDTStateError(f"{place}: nothing there")


def readable(view: View) -> View:
    """*view*, with a stand-in for its strategy if that is registered in the agents only."""
    if (name := view.strategy) not in known_strategies():
        stand_in(view.name, name)
    return view


def stand_in(view: str, name: str) -> None:
    """Let the last write win under the strategy *name*, and say so."""
    note(f"{view}: unknown strategy {name!r}; of several values, the newest is shown")
    strategy(name)(lww)


def set_(
    place: WholePlace,
    value: Annotated[
        str, typer.Argument(metavar="VALUE", help="JSON; what is not JSON is taken as a string.")
    ],
    peer: Peer,
    agent: Agent = "cli",
    mesh: Mesh = None,
    modules: Modules = None,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Set a map's key or a register, or add to a set.

    Example: [cyan]crdtstate set main/map/plan/goal "ship it" --peer ws://127.0.0.1:8765[/cyan]
    """
    where = parse_place_to_write(place)
    if where.kind == "map" and where.key is None:
        raise typer.BadParameter(f"{place!r} is a whole map; say which key: {place}/KEY")
    if where.kind == "counter":
        raise typer.BadParameter("a counter is not set but incremented: crdtstate increment")
    run(_set(peer, timeout, mesh, agent, where, parse_value(value)))
    if as_json:
        print_json({"place": str(where), "value": parse_value(value)})
    else:
        print(f"{printable(str(where))} = {as_text(parse_value(value))}")


async def _set(
    peer: str, timeout: float, mesh: Path | None, agent: str, place: Place, value: Any
) -> None:
    async with dialled(peer, timeout, mesh, agent) as replica:
        document = replica.document(place.document)
        match place.kind:
            case "map":
                document.map(place.name)[place.key or ""] = value
            case "register":
                document.register(place.name).value = value
            case "set":
                document.set(place.name).add(value)
        await sync(replica, peer, timeout)


def increment(
    place: WholePlace,
    peer: Peer,
    by: Annotated[int, typer.Argument(metavar="BY", help="How much; may be negative.")] = 1,
    agent: Agent = "cli",
    mesh: Mesh = None,
    modules: Modules = None,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Add to a counter and print what it is then.

    Example: [cyan]crdtstate increment main/counter/tokens 120 --peer ws://127.0.0.1:8765[/cyan]
    """
    where = parse_place_to_write(place)
    if where.kind != "counter":
        raise typer.BadParameter(f"{place!r} is not a counter")
    value = run(_increment(peer, timeout, mesh, agent, where, by))
    if as_json:
        print_json({"place": str(where), "value": value})
    else:
        print(value)


async def _increment(
    peer: str, timeout: float, mesh: Path | None, agent: str, place: Place, by: int
) -> int:
    async with dialled(peer, timeout, mesh, agent) as replica:
        counter = replica.document(place.document).counter(place.name)
        counter.increment(by)
        await sync(replica, peer, timeout)
        return counter.value


def watch(
    place: WholePlace,
    peer: Peer,
    mesh: Mesh = None,
    modules: Modules = None,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Print changes of a place as they happen, until Ctrl-C.

    Example: [cyan]crdtstate watch main/map/plan --peer ws://127.0.0.1:8765[/cyan]
    """
    run(_watch(peer, timeout, mesh, parse_place(place), as_json))


async def _watch(peer: str, timeout: float, mesh: Path | None, place: Place, as_json: bool) -> None:
    stop = asyncio.Event()

    def show(event: Changed) -> None:
        if (event.document, event.kind, event.name) != place[:3]:
            return
        if place.key is not None and event.key != place.key:
            return
        try:
            _print_change(event, as_json)
        except BrokenPipeError:
            stop.set()

    async with dialled(peer, timeout, mesh) as replica:
        document = replica.find(place.document)
        if document is not None and place.kind == "map":
            readable(document.map(place.name))
        elif document is not None and place.kind == "register":
            readable(document.register(place.name))
        replica.on(Changed, show)
        note(f"watching {place} at {peer}")
        replica.on(PeerDisconnected, lambda event: note(f"{peer}: {event.reason}; dialling again"))
        replica.on(PeerConnected, lambda event: note(f"{peer}: connected to {event.agent}"))
        await stop.wait()


def _print_change(event: Changed, as_json: bool) -> None:
    if as_json:
        fields = ("document", "kind", "name", "key", "value", "agent")
        print_json({field: getattr(event, field) for field in fields})
        return
    key = event.key if isinstance(event.key, str) or event.key is None else as_text(event.key)
    place = Place(event.document, event.kind, event.name, key)
    by = f"  ({printable(event.agent)})" if event.agent else ""
    print(f"{printable(str(place))} = {as_text(event.value)}{by}", flush=True)
