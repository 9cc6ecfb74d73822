"""
The command line: what a person or a script does with a fleet from outside.

    crdtstate set main/map/plan/goal "ship it" --peer ws://127.0.0.1:8765

Commands that read or write dial a peer with a replica that lives in memory only, wait until both
have the same, do what they were asked, wait until the peer has that too, and leave. A place is
written ``DOCUMENT/KIND/NAME[/KEY]``.

What was asked for goes to stdout, errors and notes to stderr. Values come from agents, so nothing
in them that a terminal would obey is ever printed (`printable`). Exit codes: 0 done, 1 failed,
2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TextIO, TypeVar
from urllib.parse import quote, urlsplit

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import track

from crdtstate import __version__, relay
from crdtstate.__main__ import announcing, gather
from crdtstate.audit import KINDS as AUDITED
from crdtstate.audit import Query, Record
from crdtstate.catalogue import Catalogue, Checkpoint
from crdtstate.conflict import (
    Candidate,
    Conflict,
    Explanation,
    known_strategies,
    lww,
    same,
    strategy,
)
from crdtstate.crdts import Map, Register
from crdtstate.documents import DocumentSet
from crdtstate.errors import (
    CorruptCheckpoint,
    CRDTStateError,
    TransportError,
    UnknownCheckpoint,
    UsageError,
    WaitTimeout,
)
from crdtstate.events import Changed, PeerConnected, PeerDisconnected
from crdtstate.manifest import agent_of
from crdtstate.relay.settings import DEFAULT_LISTEN, is_url
from crdtstate.replica import Replica
from crdtstate.retention import Retention
from crdtstate.shelf import Shelf
from crdtstate.stores.file import read_agent, read_audit, read_documents, reading
from crdtstate.stores.file import verify as verify_store
from crdtstate.tiers import open_tier

T = TypeVar("T")
View = TypeVar("View", Map, Register)

KINDS = ("map", "counter", "register", "set")
PAGE_BYTES_MAX = 64 * 2**20

app = typer.Typer(
    name="crdtstate",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What several commands share

Peer = Annotated[
    str,
    typer.Option(
        envvar="CRDTSTATE_PEER", metavar="URL", help="The relay or agent to ask: ws://HOST:PORT."
    ),
]
Timeout = Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How long to try.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Agent = Annotated[str, typer.Option(metavar="NAME", help="As whom to write.")]
WholePlace = Annotated[
    str, typer.Argument(metavar="PLACE", help="DOCUMENT/KIND/NAME or, in a map, .../NAME/KEY.")
]


def main() -> int:
    """Run the command line; return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="crdtstate")
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CRDTStateError, OSError) as exc:
        print(f"crdtstate: {printable(str(exc))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 0
    return 0


def _run(work: Coroutine[Any, Any, T]) -> T:
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except asyncio.CancelledError:
        # By SIGTERM.
        raise typer.Exit(143) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"crdtstate {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Shared state for fleets of AI agents: look at it, change it, run relays, see it work.

    Start with [bold]crdtstate demo[/bold].
    """


# Places and values


class Place(NamedTuple):
    """Where something stands, as written on the command line."""

    document: str
    kind: str
    name: str
    key: str | None

    def __str__(self) -> str:
        return "/".join(part for part in self if part is not None)


def parse_place(text: str) -> Place:
    """Read ``DOCUMENT/KIND/NAME[/KEY]``; a key may contain slashes. Raises typer.BadParameter."""
    parts = text.split("/", 3)
    if len(parts) < 3 or not all(parts[:3]):
        raise typer.BadParameter(f"{text!r}: write DOCUMENT/KIND/NAME, such as main/map/plan")
    document, kind, name = parts[:3]
    if kind not in KINDS:
        raise typer.BadParameter(f"{text!r}: the kind is {', '.join(KINDS)}, not {kind!r}")
    key = parts[3] if len(parts) == 4 else None
    if key is not None and kind != "map":
        raise typer.BadParameter(f"{text!r}: only maps have keys, a {kind} has none")
    return Place(document, kind, name, key)


def parse_value(text: str) -> Any:
    """Read JSON, or else take *text* as it is."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError:
        return text


def printable(text: str, keep: str = "") -> str:
    """*text* with everything escaped that is no plain character: a terminal would obey it."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def as_text(value: Any) -> str:
    """A value for people, on one line."""
    return printable(json.dumps(plain(value), ensure_ascii=False))


def plain(value: Any) -> Any:
    """A value in the types of JSON: bytes as ``{"base64": ...}``, times in ISO 8601."""
    match value:
        case bytes():
            return {"base64": base64.b64encode(value).decode()}
        case datetime():
            return value.isoformat()
        case float() if not math.isfinite(value):
            return str(value)
        case dict():
            return {_plain_key(key): plain(item) for key, item in value.items()}
        case list():
            return [plain(item) for item in value]
    return value


def _plain_key(key: Any) -> str:
    return key if isinstance(key, str) else json.dumps(plain(key))


def _print_json(value: Any) -> None:
    print(json.dumps(plain(value)), flush=True)


def _print_columns(rows: Sequence[Sequence[Any]], out: TextIO | None = None) -> None:
    """Print rows with their cells aligned."""
    texts = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        cells = (
            cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)
        )
        print("  ".join(cells).rstrip(), file=out)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _note(text: str) -> None:
    print(f"crdtstate: {printable(text)}", file=sys.stderr)


# Reaching a peer


def _check_url(url: str) -> str:
    if is_url(url):
        return url
    raise typer.BadParameter(f"{url!r} is not a URL like ws://127.0.0.1:8765")


@asynccontextmanager
async def _dialled(url: str, timeout: float, agent: str = "cli") -> AsyncIterator[Replica]:
    """A replica in memory that has what the peer has."""
    async with Replica(agent, peers=[_check_url(url)]) as replica:
        await _sync(replica, url, timeout)
        yield replica


async def _sync(replica: Replica, url: str, timeout: float) -> None:
    try:
        await replica.synced(timeout)
    except WaitTimeout:
        why = replica.unreachable().get(url)
        if why is None:
            found = "not in sync" if replica.peers() else "no answer"
            why = f"{found} after {timeout:g} s; give it a longer --timeout"
        raise TransportError(f"{url}: {why}") from None


def _fetch(url: str, page: str, timeout: float) -> dict[str, Any] | None:
    """Get a page of a relay; None if the peer has no such pages."""
    parts = urlsplit(_check_url(url))
    secure = parts.scheme == "wss"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    with closing(kind(parts.hostname or "", parts.port, timeout=timeout)) as connection:
        try:
            connection.request("GET", page)
            answer = connection.getresponse()
            if answer.status == http.HTTPStatus.NOT_FOUND:
                return None
            found = json.loads(answer.read(PAGE_BYTES_MAX))
        except ConnectionRefusedError:
            why = "connection refused: is a relay listening there?"
        except TimeoutError:
            why = f"no answer after {timeout:g} s"
        except OSError as exc:
            why = exc.strerror or str(exc)
        except (http.client.HTTPException, ValueError):
            why = "it does not answer as a relay"
        else:
            if isinstance(found, dict):
                return found
            why = "it does not answer as a relay"
    raise TransportError(f"{url}: {why}")


# Reading and writing


@app.command(rich_help_panel="Read and write")
def get(
    context: typer.Context,
    place: WholePlace,
    peer: Annotated[
        str | None,
        typer.Option(
            envvar="CRDTSTATE_PEER",
            metavar="URL",
            help="The relay or agent to ask: ws://HOST:PORT.",
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Read a store, instead of a peer."),
    ] = None,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Print a value, or a whole map or set.

    Example: [cyan]crdtstate get main/map/plan/goal --peer ws://127.0.0.1:8765[/cyan]
    """
    where = parse_place(place)
    if store is not None:
        source = context.get_parameter_source("peer")
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter("give --peer or --store, not both")
        with reading(store) as db:
            value = _read(read_documents(db, store), where)
    elif peer is not None:
        value = _run(_get(peer, timeout, where))
    else:
        raise typer.BadParameter("say whom to ask: --peer ws://HOST:PORT, or --store FILE")
    if as_json:
        _print_json(value)
    elif isinstance(value, dict) and where.kind == "map" and where.key is None:
        for key in sorted(value):
            print(f"{printable(key)} = {as_text(value[key])}")
    elif where.kind == "set":
        for item in value:
            print(printable(item) if isinstance(item, str) else as_text(item))
    else:
        print(printable(value, "\n\t") if isinstance(value, str) else as_text(value))


async def _get(peer: str, timeout: float, place: Place) -> Any:
    async with _dialled(peer, timeout) as replica:
        return _read(replica, place)


def _read(documents: DocumentSet, place: Place) -> Any:
    document = documents.document(place.document)
    match place.kind:
        case "counter":
            return document.counter(place.name).value
        case "set":
            return sorted(document.set(place.name), key=as_text)
        case "map":
            view = _readable(document.map(place.name))
            if place.key is None:
                return dict(view)
            if place.key in view:
                return view[place.key]
        case "register":
            register = _readable(document.register(place.name))
            if register.is_set:
                return register.value
    raise CRDTStateError(f"{place}: nothing there")


def _readable(view: View) -> View:
    """*view*, with a stand-in for its strategy if that is registered in the agents only."""
    if (name := view.strategy) not in known_strategies():
        _note(f"{view.name}: unknown strategy {name!r}; of several values, the newest is shown")
        strategy(name)(lww)
    return view


@app.command("set", rich_help_panel="Read and write")
def set_(
    place: WholePlace,
    value: Annotated[
        str, typer.Argument(metavar="VALUE", help="JSON; what is not JSON is taken as a string.")
    ],
    peer: Peer,
    agent: Agent = "cli",
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Set a map's key or a register, or add to a set.

    Example: [cyan]crdtstate set main/map/plan/goal "ship it" --peer ws://127.0.0.1:8765[/cyan]
    """
    where = parse_place(place)
    if where.kind == "map" and where.key is None:
        raise typer.BadParameter(f"{place!r} is a whole map; say which key: {place}/KEY")
    if where.kind == "counter":
        raise typer.BadParameter("a counter is not set but incremented: crdtstate increment")
    _run(_set(peer, timeout, agent, where, parse_value(value)))
    if as_json:
        _print_json({"place": str(where), "value": parse_value(value)})
    else:
        print(f"{printable(str(where))} = {as_text(parse_value(value))}")


async def _set(peer: str, timeout: float, agent: str, place: Place, value: Any) -> None:
    async with _dialled(peer, timeout, agent) as replica:
        document = replica.document(place.document)
        match place.kind:
            case "map":
                document.map(place.name)[place.key or ""] = value
            case "register":
                document.register(place.name).value = value
            case "set":
                document.set(place.name).add(value)
        await _sync(replica, peer, timeout)


@app.command(rich_help_panel="Read and write", context_settings={"ignore_unknown_options": True})
def increment(
    place: WholePlace,
    peer: Peer,
    by: Annotated[int, typer.Argument(metavar="BY", help="How much; may be negative.")] = 1,
    agent: Agent = "cli",
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Add to a counter and print what it is then.

    Example: [cyan]crdtstate increment main/counter/tokens 120 --peer ws://127.0.0.1:8765[/cyan]
    """
    where = parse_place(place)
    if where.kind != "counter":
        raise typer.BadParameter(f"{place!r} is not a counter")
    value = _run(_increment(peer, timeout, agent, where, by))
    if as_json:
        _print_json({"place": str(where), "value": value})
    else:
        print(value)


async def _increment(peer: str, timeout: float, agent: str, place: Place, by: int) -> int:
    async with _dialled(peer, timeout, agent) as replica:
        counter = replica.document(place.document).counter(place.name)
        counter.increment(by)
        await _sync(replica, peer, timeout)
        return counter.value


@app.command(rich_help_panel="Read and write")
def watch(
    place: WholePlace,
    peer: Peer,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Print changes of a place as they happen, until Ctrl-C.

    Example: [cyan]crdtstate watch main/map/plan --peer ws://127.0.0.1:8765[/cyan]
    """
    _run(_watch(peer, timeout, parse_place(place), as_json))


async def _watch(peer: str, timeout: float, place: Place, as_json: bool) -> None:
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

    async with _dialled(peer, timeout) as replica:
        document = replica.document(place.document)
        if place.kind == "map":
            _readable(document.map(place.name))
        elif place.kind == "register":
            _readable(document.register(place.name))
        replica.on(Changed, show)
        _note(f"watching {place} at {peer}")
        replica.on(PeerDisconnected, lambda event: _note(f"{peer}: {event.reason}; dialling again"))
        replica.on(PeerConnected, lambda event: _note(f"{peer}: connected to {event.agent}"))
        await stop.wait()


def _print_change(event: Changed, as_json: bool) -> None:
    if as_json:
        fields = ("document", "kind", "name", "key", "value", "agent")
        _print_json({field: getattr(event, field) for field in fields})
        return
    key = event.key if isinstance(event.key, str) or event.key is None else as_text(event.key)
    place = Place(event.document, event.kind, event.name, key)
    by = f"  ({printable(event.agent)})" if event.agent else ""
    print(f"{printable(str(place))} = {as_text(event.value)}{by}", flush=True)


# Looking


@app.command(rich_help_panel="Look")
def peers(peer: Peer, timeout: Timeout = 5.0, as_json: AsJson = False) -> None:
    """List who is connected to a relay.

    Lag is how many changes they have not acknowledged yet.

    Example: [cyan]crdtstate peers --peer ws://127.0.0.1:8765[/cyan]
    """
    found = _fetch(peer, "/status", timeout)
    if found is None:
        raise TransportError(f"{peer}: an agent, not a relay, and does not tell its peers")
    if as_json:
        _print_json(found["peers"])
        return
    columns = ("agent", "role", "lag", "queued_bytes", "address")
    rows = [["-" if entry[c] is None else entry[c] for c in columns] for entry in found["peers"]]
    _print_columns([[column.upper().replace("_", " ") for column in columns], *rows])


@app.command(rich_help_panel="Look")
def status(peer: Peer, timeout: Timeout = 5.0, as_json: AsJson = False) -> None:
    """Say how a relay or agent is doing and what it has.

    Example: [cyan]crdtstate status --peer ws://127.0.0.1:8765[/cyan]
    """
    found = _fetch(peer, "/status", timeout) or _run(_status(peer, timeout))
    if as_json:
        _print_json(found)
        return
    _print_columns(list(_describe(found)))


async def _status(url: str, timeout: float) -> dict[str, Any]:
    """What can be learned of an agent, which has no pages, from its part in the mesh."""
    async with _dialled(url, timeout) as replica:
        peer = replica.peers()[0]
        return {
            "agent": peer.agent,
            "role": peer.role,
            "writer": f"{peer.writer:x}",
            "address": peer.address,
            "documents": {name: version.total for name, version in sorted(replica.versions())},
            "conflicts": len(replica.conflicts()),
            "version": str(replica.version()),
        }


def _describe(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "agent", f"{found['agent']} ({found['role']})"
    yield "address", found["address"] or "-"
    if "ready" in found:
        yield "ready", "yes" if found["ready"] else f"no: {found['store_failure']}"
        yield "store", found["store"] or "memory"
        yield "peers", ", ".join(peer["agent"] for peer in found["peers"]) or "none"
        for url, why in found["unreachable"].items():
            yield "unreachable", f"{url}: {why}"
        waiting = f"{_count(found['pending'], 'change')} here, {found['missing']} announced"
        yield "waiting", waiting
    yield "conflicts", str(found["conflicts"])
    for name, count in found["documents"].items():
        yield "document", f"{name}: {_count(count, 'change')}"


@app.command(rich_help_panel="Look")
def conflicts(peer: Peer, timeout: Timeout = 5.0, as_json: AsJson = False) -> None:
    """List where values conflict, what is read there and what decides.

    Example: [cyan]crdtstate conflicts --peer ws://127.0.0.1:8765[/cyan]
    """
    found = _run(_conflicts(peer, timeout))
    if as_json:
        _print_json([_describe_conflict(each) for each in found])
        return
    for each in found:
        place = _place_of(each)
        read = "?" if each.rule == "unknown" else as_text(each.value)
        print(f"{printable(str(place))} = {read}  ({printable(each.rule)})")
        votes = {vote.agent: vote for vote in each.votes}
        for candidate in reversed(each.candidates):
            stamp = candidate.stamp.time.isoformat(timespec="milliseconds")
            line = f"  {as_text(candidate.value)} by {printable(candidate.agent)} at {stamp}"
            names = [a for a, v in votes.items() if v.counts and same(v.value, candidate.value)]
            print(line + (f", votes: {printable(', '.join(names))}" if names else ""))
    _note(_count(len(found), "conflict"))


async def _conflicts(url: str, timeout: float) -> list[Conflict]:
    async with _dialled(url, timeout) as replica:
        return replica.conflicts()


def _place_of(conflict: Conflict) -> Place:
    key = conflict.key if conflict.kind == "map" else None
    return Place(conflict.document, conflict.kind, conflict.name, key)


def _describe_conflict(conflict: Conflict) -> dict[str, Any]:
    return {
        "place": str(_place_of(conflict)),
        "value": conflict.value,
        "rule": conflict.rule,
        "strategy": conflict.strategy,
        "candidates": [_describe_candidate(each) for each in conflict.candidates],
        "votes": [
            {"agent": vote.agent, "value": vote.value, "counts": vote.counts}
            for vote in conflict.votes
        ],
    }


def _describe_candidate(candidate: Candidate) -> dict[str, Any]:
    when = candidate.stamp.time
    return {"value": candidate.value, "agent": candidate.agent, "written": when}


@app.command(rich_help_panel="Look")
def explain(place: WholePlace, peer: Peer, timeout: Timeout = 5.0, as_json: AsJson = False) -> None:
    """Say why a place reads as it does: who wrote what, and what decides.

    Example: [cyan]crdtstate explain main/map/plan/goal --peer ws://127.0.0.1:8765[/cyan]
    """
    where = parse_place(place)
    if where.kind not in ("map", "register") or (where.kind == "map" and where.key is None):
        raise typer.BadParameter(f"{place!r}: a map's key or a register can be explained")
    told = _run(_explain(peer, timeout, where))
    if as_json:
        _print_json(
            {
                "place": str(where),
                "value": told.value,
                "rule": told.rule,
                "candidates": [_describe_candidate(each) for each in told.candidates],
                "votes": [{"agent": vote.agent, "value": vote.value} for vote in told.votes],
            }
        )
    else:
        print(printable(str(told), "\n"))


async def _explain(url: str, timeout: float, place: Place) -> Explanation:
    async with _dialled(url, timeout) as replica:
        document = replica.document(place.document)
        if place.kind == "register":
            return _readable(document.register(place.name)).explain()
        return _readable(document.map(place.name)).explain(place.key or "")


@app.command(rich_help_panel="Look")
def audit(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A replica's SQLite file.")],
    document: Annotated[str | None, typer.Option(metavar="NAME", help="Only of this one.")] = None,
    agent: Annotated[str | None, typer.Option(metavar="NAME", help="Only what it did.")] = None,
    kind: Annotated[
        str | None, typer.Option(metavar="KIND", help=f"Only this: {', '.join(AUDITED)}.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Print what a replica recorded: resolutions, votes, rejections, commands.

    Its owner may be running. Whether the records were tampered with is told
    by [bold]crdtstate verify[/bold].

    Example: [cyan]crdtstate audit agent-7.db --kind resolution[/cyan]
    """
    if kind is not None and kind not in AUDITED:
        raise typer.BadParameter(f"{kind!r}: the kind is one of {', '.join(AUDITED)}")
    query = Query(document=document, agent=agent, kind=kind, limit=limit)
    with reading(store) as db:
        records = [Record.read(row) for row in read_audit(db, query)]
    for record in records:
        if as_json:
            _print_json(_describe_record(record))
        else:
            print(printable(f"{record.number}: {record}"))


def _describe_record(record: Record) -> dict[str, Any]:
    fields = ("number", "kind", "agent", "document", "path", "chosen", "rule", "detail", "at")
    return {
        **{field: getattr(record, field) for field in fields},
        "when": record.stamp.time,
        "candidates": [_describe_candidate(each) for each in record.candidates],
        "version": {f"{writer:x}": seq for writer, seq in record.version.items()},
        "sha256": record.hash.hex(),
    }


@app.command(rich_help_panel="Look")
def verify(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A replica's SQLite file.")],
    as_json: AsJson = False,
) -> None:
    """Check every page, change, snapshot and audit record of a store.

    Its owner may be running.

    Example: [cyan]crdtstate verify agent-7.db[/cyan]
    """
    found = verify_store(store)
    if as_json:
        names = ("documents", "snapshots", "changes", "bytes", "records")
        counts = {name: getattr(found, name) for name in names}
        _print_json({"store": str(store), **counts, "problems": found.problems})
    else:
        for problem in found.problems:
            print(printable(problem))
    if found.problems:
        raise CRDTStateError(f"{store} is damaged: {_count(len(found.problems), 'problem')}")
    if not as_json:
        sizes = [(found.documents, "document"), (found.snapshots, "snapshot")]
        sizes += [(found.changes, "change"), (found.bytes, "byte"), (found.records, "record")]
        what = ", ".join(_count(number, noun) for number, noun in sizes)
        print(f"{printable(str(store))}: sound ({what})")


# Checkpoints

saved = typer.Typer(help="Look at checkpoints, check them, and make one.", no_args_is_help=True)
app.add_typer(saved, name="checkpoints", rich_help_panel="Look")

Kept = Annotated[
    str,
    typer.Argument(
        metavar="TIER", help="Where they are: a tier's URL, its file, or the store beside it."
    ),
]
Whose = Annotated[
    str | None, typer.Option("--agent", metavar="NAME", help="Only those of this agent.")
]


@saved.command("list")
def list_checkpoints(tier: Kept, agent: Whose = None, as_json: AsJson = False) -> None:
    """List the checkpoints in a tier, by agent, oldest first.

    Example: [cyan]crdtstate checkpoints list agent-7.db[/cyan]
    """
    found = _run(_list_checkpoints(_tier_url(tier), agent))
    if as_json:
        _print_json([_describe_checkpoint(*each) for each in found])
        return
    rows = [
        (owner, each.id, each.stamp.time.isoformat(timespec="seconds"), each.size, each.label)
        for owner, each in found
    ]
    _print_columns([("AGENT", "ID", "MADE", "BYTES", "LABEL"), *rows])


@saved.command("verify")
def verify_checkpoints(
    tier: Kept,
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="Which; all without it.")] = None,
    agent: Whose = None,
    as_json: AsJson = False,
) -> None:
    """Read checkpoints whole, and compare every byte with the hash it should have.

    Example: [cyan]crdtstate checkpoints verify agent-7.db[/cyan]
    """
    found = _run(_verify_checkpoints(_tier_url(tier), agent, id))
    if as_json:
        _print_json([{"agent": who, "id": each, "problem": why} for who, each, why in found])
    else:
        for who, each, why in found:
            print(f"{printable(who)} {printable(each)}: {printable(why or 'intact')}")
    problems = sum(why is not None for _, _, why in found)
    if problems:
        raise CRDTStateError(f"{tier} is damaged: {_count(problems, 'checkpoint')}")


@saved.command("create")
def create_checkpoint(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A replica's SQLite file.")],
    label: Annotated[str, typer.Option(metavar="TEXT", help="What to call it.")] = "",
    tier: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where to keep it; otherwise beside the store."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint of a store whose agent does not run.

    Example: [cyan]crdtstate checkpoints create agent-7.db --label before-upgrade[/cyan]
    """
    agent = read_agent(store)
    made = _run(_create_checkpoint(agent, store, label, tier))
    if as_json:
        _print_json(_describe_checkpoint(agent, made))
    else:
        print(made.id)


def _tier_url(text: str) -> str:
    """The URL of a tier that was named by its URL, its file, or the store beside it."""
    if "://" in text:
        return text
    for path in (Path(f"{text}.checkpoints"), Path(text)):
        if path.is_file():
            return f"sqlite:///{quote(str(path.absolute()))}"
    raise UsageError(f"{text}: no such file, nor one named {text}.checkpoints")


async def _list_checkpoints(url: str, agent: str | None) -> list[tuple[str, Checkpoint]]:
    return [
        (each.agent, checkpoint)
        async for each in _catalogues(url, agent)
        for checkpoint in each.saved()
    ]


async def _verify_checkpoints(
    url: str, agent: str | None, id: str | None
) -> list[tuple[str, str, str | None]]:
    found: list[tuple[str, str, str | None]] = []
    async for each in _catalogues(url, agent):
        (shelf,) = each.shelves
        whys = [(bad, why) for bad, why in shelf.unreadable.items() if id in (None, bad)]
        found += [(each.agent, bad, f"its manifest: {why}") for bad, why in sorted(whys)]
        for checkpoint in each.saved():
            if id not in (None, checkpoint.id):
                continue
            try:
                await each.verify(checkpoint.id)
                found.append((each.agent, checkpoint.id, None))
            except CorruptCheckpoint as exc:
                found.append((each.agent, checkpoint.id, exc.reason))
    if id is not None and not found:
        raise UnknownCheckpoint(id)
    return found


async def _catalogues(url: str, agent: str | None) -> AsyncIterator[Catalogue]:
    """What a tier has, of each agent."""
    tier = await open_tier(url)
    try:
        agents = {agent_of(item.key) for item in await tier.items("")}
        for name in sorted(each for each in agents if each is not None and agent in (None, each)):
            shelf = Shelf(tier, name, limit=60, retry=1, retry_max=1, emit=lambda event: None)
            catalogue = Catalogue(name, [shelf], Retention())
            await catalogue.read(shelf)
            yield catalogue
    finally:
        await tier.close()


async def _create_checkpoint(agent: str, store: Path, label: str, tier: str | None) -> Checkpoint:
    tiers = None if tier is None else [tier]
    async with Replica(agent, store=store, checkpoints=tiers) as replica:
        return await replica.checkpoint(label)


def _describe_checkpoint(agent: str, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "agent": agent,
        "id": checkpoint.id,
        "label": checkpoint.label,
        "made": checkpoint.stamp.time,
        "bytes": checkpoint.size,
        "documents": {name: version.total for name, version in checkpoint.version.items()},
        "tiers": list(checkpoint.tiers),
    }


# Running


class Durability(StrEnum):
    """What a commit survives; see `Replica`."""

    process = "process"
    power = "power"


@app.command("relay", rich_help_panel="Run")
def run_relay(
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help=f"Where to listen; port 0 takes any free one. [default: {DEFAULT_LISTEN}]",
        ),
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="What members are told to reach it by, if that is not where it listens.",
        ),
    ] = None,
    store: Annotated[
        str | None, typer.Option(metavar="FILE", help="The SQLite file that keeps everything.")
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option("--peer", metavar="URL", help="Another relay; repeatable."),
    ] = None,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A tier to keep checkpoints in; repeatable."),
    ] = None,
    durability: Annotated[
        Durability | None,
        typer.Option(help="What a commit survives: a kill, or a power cut as well."),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="What peers see.")] = None,
    tls_certificate: Annotated[
        str | None, typer.Option(metavar="FILE", help="The certificate in PEM, for wss://.")
    ] = None,
    tls_key: Annotated[
        str | None, typer.Option(metavar="FILE", help="Its key, if that is in another file.")
    ] = None,
    drain: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long stopping may wait for peers to catch up."),
    ] = None,
    attached: Annotated[
        bool, typer.Option("--attached", help="Stop when standard input ends.")
    ] = False,
    as_json: AsJson = False,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="Settings in TOML, as in examples/.")
    ] = None,
    check_config: Annotated[
        bool, typer.Option("--check-config", help="Print all settings, and do no more.")
    ] = False,
) -> None:
    """Run a relay, for agents that cannot reach each other.

    Ctrl-C or SIGTERM ends it in order, a second one at once. The mesh is on
    /mesh, a page for people on /; /healthz, /metrics, /status and /digest
    answer plain HTTP. Who can reach the port can read and write everything:
    keep it on the loopback interface, or on a network that you trust.

    Each setting can also come from the file, by the name of its flag, or from
    the environment, as CRDTSTATE_RELAY_LISTEN. A flag goes before that, and
    that before the file.

    Example: [cyan]crdtstate relay --listen ws://127.0.0.1:8765 --store relay.db[/cyan]
    """
    for url in [*([listen] if listen is not None else []), *(peers or [])]:
        _check_url(url)
    flags = {
        "listen": listen,
        "advertise": advertise,
        "store": store,
        "peers": tuple(peers) if peers else None,
        "checkpoints": tuple(checkpoints) if checkpoints else None,
        "durability": durability and durability.value,
        "name": name,
        "tls_certificate": tls_certificate,
        "tls_key": tls_key,
        "drain": drain,
        "attached": attached or None,
        "json": as_json or None,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    try:
        found = gather(given, config, only_check=check_config)
    except UsageError as exc:
        _note(str(exc))
        raise typer.Exit(2) from None
    if found is not None:
        _run(relay.serve(found, announcing(found)))


@app.command(rich_help_panel="Run")
def simulate(
    agents: Annotated[
        int | None, typer.Option(min=2, help="How many; otherwise each seed decides.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to run.")] = 1,
    changes: Annotated[int, typer.Option(min=1, help="Writes of each seed.")] = 60,
    faults: Annotated[
        bool, typer.Option("--faults/--no-faults", help="Whether anything goes wrong.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Run fleets in virtual time through all that can go wrong.

    Invariants are checked at every step; a seed shows the same history again.

    Example: [cyan]crdtstate simulate --agents 20 --seed 7 --seeds 50[/cyan]
    """
    from crdtstate.simulation import CampaignReport

    jobs = [(number, agents, changes, faults) for number in range(seed, seed + seeds)]
    workers = min(len(jobs), os.cpu_count() or 1)
    # Signals are for this process only, and only once there is a pool: leaving it ends the others.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with multiprocessing.Pool(workers, _leave_signals) as pool:
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            outcomes: Iterable[Any] = pool.imap_unordered(_run_seed, jobs)
            if sys.stderr.isatty():
                console = Console(stderr=True)
                outcomes = track(outcomes, "Simulating", len(jobs), console=console, transient=True)
            report = CampaignReport.of(outcomes)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        finally:
            signal.signal(signal.SIGTERM, before)
    if as_json:
        _print_json(report.as_json())
    else:
        _print_columns(list(_sum_up(report)))
    if report.failures:
        numbers = ", ".join(str(failure.seed) for failure in report.failures[:10])
        failed = f"{len(report.failures)} of {_count(seeds, 'seed')} failed"
        raise CRDTStateError(f"{failed}: {numbers}")


def _leave_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _terminate(*_: object) -> None:
    raise SystemExit(143)


def _run_seed(job: tuple[int, int | None, int, bool]) -> Any:
    from crdtstate.simulation import run_seed

    seed, agents, changes, faults = job
    return run_seed(seed, agents=agents, changes=changes, faults=faults)


def _sum_up(report: Any) -> Iterator[tuple[str, str]]:
    yield "seeds", str(report.seeds)
    yield "failures", str(len(report.failures))
    for failure in report.failures:
        yield f"  {failure.seed}", f"{failure.invariant}: {failure.detail}"
    yield "redundancy", f"{report.redundancy:.4f}"
    for label, times in (("delivery", report.delivery_ms), ("at the last", report.last_ms)):
        yield label, ", ".join(f"{name} {value:g} ms" for name, value in times.items())
    yield "bytes per change", f"{report.bytes_per_change:g}"
    yield "trace", report.trace


@app.command(rich_help_panel="Run")
def demo(
    agents: Annotated[int, typer.Option(min=3, max=100, help="How many agent processes.")] = 10,
    path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What to survey; else Python's standard library."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses who is cut off and who is killed.")] = 1,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the stores there, to look at them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """See it work: real processes, real work, real faults.

    A relay and agents run as processes on this machine. The agents survey a
    tree of Python source together, two of them lose the network meanwhile,
    and one is killed. At the end all replicas must be equal, and what they
    hold must be exactly what one process finds alone.

    Example: [cyan]crdtstate demo --agents 10[/cyan]
    """
    from crdtstate.demo.command import run

    _run(run(agents, path, seed=seed, keep=keep, as_json=as_json))
