"""
The history of a document, as a peer or a store tells it.

A store is read as it is, whatever its owner writes meanwhile. The journal's order is one of
causality, so replaying it needs no more than the rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import apsw
import typer

from crdtstate.change import Change, Snapshot, decode_change
from crdtstate.cli.options import AsJson, MaybePeer, Mesh, Modules, StoreToRead, Timeout, choose
from crdtstate.cli.printing import note, print_json, printable
from crdtstate.cli.reaching import dialled, run
from crdtstate.clock import Version
from crdtstate.errors import CRDTStateError, InvalidUpdate
from crdtstate.history import History, PastChange, Teller
from crdtstate.past import Past
from crdtstate.stores.file import changes, damage, reading, snapshots


def history(
    context: typer.Context,
    document: Annotated[str, typer.Argument(metavar="DOCUMENT", help="Whose history.")],
    path: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Only what wrote this: plan, or plan['goal']."),
    ] = None,
    agent: Annotated[str | None, typer.Option(metavar="NAME", help="Only what it wrote.")] = None,
    of_run: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Only what was written in it.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 100,
    peer: MaybePeer = None,
    store: StoreToRead = None,
    mesh: Mesh = None,
    modules: Modules = None,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """Print the changes of a document, oldest first: who wrote what, when and why.

    Where the journal has forgotten the oldest, it begins later; "+" then marks
    changes that may have written more places than are named.

    Example: [cyan]crdtstate history main --store agent-7.db --path "plan['goal']"[/cyan]
    """
    choose(context, peer, store)
    teller = Teller(agent, of_run, path, None, tidying=False)
    found: deque[PastChange] = deque(maxlen=limit)
    if store is not None:
        with reading(store) as db:
            found.extend(_read(db, store, document, teller))
    else:
        assert peer is not None
        run(_ask(peer, timeout, mesh, document, (agent, of_run, path), found))
    for change in found:
        if as_json:
            print_json(_describe(change))
        else:
            print(printable(f"{change}{' +' if change.is_partial else ''}", "\n"))
    if not found:
        note(f"{document}: no changes" if not (agent or of_run or path) else "no such changes")


async def _ask(
    peer: str,
    timeout: float,
    mesh: Path | None,
    document: str,
    wanted: tuple[str | None, str | None, str | None],
    found: deque[PastChange],
) -> None:
    agent, of_run, path = wanted
    async with dialled(peer, timeout, mesh) as replica:
        if replica.find(document) is None:
            raise _nothing(document, replica.documents())
        async for change in replica.history(document, agent=agent, run=of_run, path=path):
            found.append(change)


def _read(db: apsw.Connection, store: Path, document: str, teller: Teller) -> Iterator[PastChange]:
    """What a store tells."""
    names = {name for (name,) in db.execute("SELECT name FROM document")}
    if document not in names:
        raise _nothing(document, names)
    base, first, end = Version(), dict[int, int](), Version()
    snapshot: Snapshot | None = None
    shared = False
    for saved, is_intact in snapshots(db):
        if saved.document == document:
            if not is_intact:
                raise damage(store, f"table snapshot, document {document!r}")
            base, snapshot = saved.version, Snapshot.decode(saved.data)
            shared = snapshot.shared
    for change in _changes(db, store, document):
        shared = change.shared
        first.setdefault(change.writer, change.seq)
        end[change.writer] = change.seq
    end.merge(base)
    # What the journal has forgotten: of each writer what comes before its first change there.
    start = Version({writer: first.get(writer, seq + 1) - 1 for writer, seq in end.items()})
    start = Version({writer: seq for writer, seq in start.items() if seq})
    try:
        beginning = Past().begin(document, shared, snapshot if start else None)
        read = _Rows(db, store, document).between
        yield from chain.from_iterable(History(start, end, beginning, read).portions(teller))
    except InvalidUpdate as exc:
        raise damage(store, f"document {document!r}: {exc}") from exc


class _Rows:
    """The journal's changes of one document."""

    def __init__(self, db: apsw.Connection, store: Path, document: str) -> None:
        self._what = db, store, document

    def between(self, start: Version, end: Version) -> Iterator[list[Change]]:
        for change in _changes(*self._what):
            if not start.covers(change.dot) and end.covers(change.dot):
                yield [change]


def _changes(db: apsw.Connection, store: Path, document: str) -> Iterator[Change]:
    for row, entry, is_intact in changes(db):
        if entry.document == document:
            if not is_intact:
                raise damage(store, f"table journal, row {row}, document {document!r}")
            yield decode_change(entry.data)


def _nothing(document: str, names: Iterable[str]) -> CRDTStateError:
    known = ", ".join(sorted(names)[:10]) or "none"
    return CRDTStateError(f"there is no document {document!r}; there are: {known}")


def _describe(change: PastChange) -> dict[str, Any]:
    fields = ("document", "agent", "run", "message", "kind", "size", "is_partial")
    return {
        "change": f"{change.dot.writer:x}:{change.dot.seq}",
        **{field: getattr(change, field) for field in fields},
        "when": change.stamp.time,
        "paths": list(change.paths),
    }
