"""
Looking at a relay, an agent or a store: how it does, what conflicts, why, what was recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from crdtstate.audit import KINDS as AUDITED
from crdtstate.audit import Query, Record
from crdtstate.authors import Authors, authors_of
from crdtstate.cli.options import AsJson, Mesh, Modules, Peer, Store, Timeout, TokenFile, WholePlace
from crdtstate.cli.places import Place, parse_place
from crdtstate.cli.printing import (
    as_text,
    count,
    describe_candidate,
    note,
    print_columns,
    print_json,
    printable,
)
from crdtstate.cli.reaching import check_url, dialled, fetch, find_token, run
from crdtstate.cli.revoked import Hidden, hidden, take_from_store
from crdtstate.cli.values import readable
from crdtstate.conflict import Conflict, Explanation, same
from crdtstate.credentials import open_credentials
from crdtstate.errors import CRDTStateError, TransportError, UsageError
from crdtstate.relay.tokens import page_of
from crdtstate.revocations import Revocations
from crdtstate.stores.file import read_audit, read_documents, reading
from crdtstate.stores.file import verify as verify_store


def peers(
    peer: Peer,
    mesh: Mesh = None,
    token_file: TokenFile = None,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """List who is connected to a relay.

    Lag is how many changes they have not acknowledged yet. In a mesh of
    members it takes the token of the relay's pages.

    Example: [cyan]crdtstate peers --peer ws://127.0.0.1:8765[/cyan]
    """
    found = fetch(peer, "/status", timeout, find_token(peer, mesh, token_file))
    if found is None:
        raise TransportError(
            f"{peer}: an agent, not a relay, or it wants another token; see --token-file"
        )
    if as_json:
        print_json(found["peers"])
        return
    columns = ("agent", "role", "lag", "queued_bytes", "address")
    rows = [["-" if entry[c] is None else entry[c] for c in columns] for entry in found["peers"]]
    print_columns([[column.upper().replace("_", " ") for column in columns], *rows])


def page(peer: Peer, mesh: Mesh = None, token_file: TokenFile = None) -> None:
    """Print the URL of a relay's page, for a browser.

    It has the token of the relay's pages in it, which opens them: keep it to
    yourself.

    Example: [cyan]crdtstate page --peer ws://127.0.0.1:8765[/cyan]
    """
    token = find_token(check_url(peer), mesh, token_file)
    if token is None:
        raise UsageError(
            "in a mesh of members each relay has a token of its own: --token-file FILE, which is "
            "STORE.token beside the relay's store"
        )
    if peer.startswith("unix:"):
        raise UsageError(f"{peer}: no browser opens that; let the relay listen on ws:// instead")
    print(page_of(peer, token))


def status(
    peer: Peer,
    mesh: Mesh = None,
    modules: Modules = None,
    token_file: TokenFile = None,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Say how a relay or agent is doing and what it has.

    Example: [cyan]crdtstate status --peer ws://127.0.0.1:8765[/cyan]
    """
    token = find_token(peer, mesh, token_file)
    found = fetch(peer, "/status", timeout, token) or run(_status(peer, timeout, mesh))
    if as_json:
        print_json(found)
        return
    print_columns(list(_describe(found)))


async def _status(url: str, timeout: float, mesh: Path | None) -> dict[str, Any]:
    """What can be learned of an agent, which has no pages, from its part in the mesh."""
    async with dialled(url, timeout, mesh) as replica:
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
        waiting = f"{count(found['pending'], 'change')} here, {found['missing']} announced"
        yield "waiting", waiting
    yield "conflicts", str(found["conflicts"])
    for name, changes in found["documents"].items():
        yield "document", f"{name}: {count(changes, 'change')}"


def conflicts(
    peer: Peer,
    mesh: Mesh = None,
    modules: Modules = None,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """List where values conflict, what is read there and what decides.

    Example: [cyan]crdtstate conflicts --peer ws://127.0.0.1:8765[/cyan]
    """
    found = run(_conflicts(peer, timeout, mesh))
    if as_json:
        print_json([_describe_conflict(each) for each in found])
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
    note(count(len(found), "conflict"))


async def _conflicts(url: str, timeout: float, mesh: Path | None) -> list[Conflict]:
    async with dialled(url, timeout, mesh) as replica:
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
        "candidates": [describe_candidate(each) for each in conflict.candidates],
        "votes": [
            {"agent": vote.agent, "value": vote.value, "counts": vote.counts}
            for vote in conflict.votes
        ],
    }


def explain(
    place: WholePlace,
    peer: Peer,
    mesh: Mesh = None,
    modules: Modules = None,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Say why a place reads as it does: who wrote what, and what decides.

    Example: [cyan]crdtstate explain main/map/plan/goal --peer ws://127.0.0.1:8765[/cyan]
    """
    where = parse_place(place)
    if where.kind not in ("map", "register") or (where.kind == "map" and where.key is None):
        raise typer.BadParameter(f"{place!r}: a map's key or a register can be explained")
    told = run(_explain(peer, timeout, mesh, where))
    if as_json:
        print_json(
            {
                "place": str(where),
                "value": told.value,
                "rule": told.rule,
                "candidates": [describe_candidate(each) for each in told.candidates],
                "votes": [{"agent": vote.agent, "value": vote.value} for vote in told.votes],
            }
        )
    else:
        print(printable(str(told), "\n"))


async def _explain(url: str, timeout: float, mesh: Path | None, place: Place) -> Explanation:
    async with dialled(url, timeout, mesh) as replica:
        document = replica.document(place.document)
        if place.kind == "register":
            return readable(document.register(place.name)).explain()
        return readable(document.map(place.name)).explain(place.key or "")


def audit(
    store: Store,
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
            print_json(_describe_record(record))
        else:
            print(printable(f"{record.number}: {record}"))


def _describe_record(record: Record) -> dict[str, Any]:
    fields = ("number", "kind", "agent", "document", "path", "chosen", "rule", "detail", "at")
    return {
        **{field: getattr(record, field) for field in fields},
        "when": record.stamp.time,
        "candidates": [describe_candidate(each) for each in record.candidates],
        "version": {f"{writer:x}": seq for writer, seq in record.version.items()},
        "sha256": record.hash.hex(),
    }


def verify(
    store: Store,
    mesh: Mesh = None,
    as_json: AsJson = False,
) -> None:
    """Check every page, change, snapshot and audit record of a store.

    Its owner may be running. That each change follows the one before it is
    checked always; with --mesh also whether it is its writer's, by its
    signature or keyed hash, and it is said what is hidden of who was revoked.

    Example: [cyan]crdtstate verify agent-7.db --mesh agent-7.join[/cyan]
    """
    credentials = None if mesh is None else open_credentials(mesh, store)
    authors = None if credentials is None else authors_of(credentials, None)
    found = verify_store(store, authors)
    root = None if credentials is None else credentials.root
    told: list[Hidden] = []
    if authors is not None and root is not None and not found.problems:
        told = _hidden_in(store, authors, root)
    if as_json:
        names = ("documents", "snapshots", "changes", "bytes", "records")
        counts = {name: getattr(found, name) for name in names}
        lists = {"problems": found.problems, "quarantined": found.quarantined}
        proven: dict[str, Any] = {} if mesh is None else {"proven": found.proven}
        if root is not None:
            proven["revoked"] = [each._asdict() for each in told]
        print_json({"store": str(store), **counts, **proven, **lists})
    else:
        for problem in found.problems:
            print(printable(problem))
        for quarantined in found.quarantined:
            print(printable(f"quarantined: {quarantined}"))
        for each in told:
            print(printable(str(each)))
    if found.problems:
        what = "is damaged" if mesh is None else "is damaged, or not of this mesh"
        raise CRDTStateError(f"{store} {what}: {count(len(found.problems), 'problem')}")
    if not as_json:
        sizes = [(found.documents, "document"), (found.snapshots, "snapshot")]
        sizes += [(found.changes, "change"), (found.bytes, "byte"), (found.records, "record")]
        what = ", ".join(count(number, noun) for number, noun in sizes)
        if mesh is not None:
            what += f"; {count(found.proven, 'change')} proven"
        print(f"{printable(str(store))}: sound ({what})")


def _hidden_in(store: Path, authors: Authors, root: bytes) -> list[Hidden]:
    revocations = Revocations()
    take_from_store(store, root, revocations)
    if not len(revocations):
        return []
    with reading(store) as db:
        return list(hidden(read_documents(db, store), authors, revocations))
