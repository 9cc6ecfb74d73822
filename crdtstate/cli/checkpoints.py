"""
The checkpoints in a tier, and what they have to do with a store.

Listing, verifying and comparing only read, and the agent may be running. Making one and restoring
is done as the agent that the store belongs to, and so while it does not run.

With ``--mesh`` it is looked who made them, too, as a replica with that file would. Who was revoked
is known from the checkpoints themselves and from the store beside them (`revoked`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from crdtstate.attestation import Attestation
from crdtstate.authors import authors_of
from crdtstate.catalogue import Catalogue, Checkpoint
from crdtstate.change import Snapshot
from crdtstate.cli.options import AsJson, Documents, Kept, Mesh, Modules, Paths, Store, Tier, Whose
from crdtstate.cli.printing import count, note, print_columns, print_json, printable
from crdtstate.cli.reaching import run
from crdtstate.cli.revoked import take_from_checkpoints, take_from_store
from crdtstate.cli.values import stand_in
from crdtstate.credentials import open_credentials
from crdtstate.documents import SYSTEM, DocumentSet
from crdtstate.errors import (
    CorruptCheckpoint,
    CRDTStateError,
    InvalidUpdate,
    StoreError,
    UnknownCheckpoint,
    UnknownStrategy,
    UsageError,
)
from crdtstate.manifest import agent_of
from crdtstate.past import ABSENT, Difference, Past, Selection, differences
from crdtstate.replica import Replica
from crdtstate.retention import Retention
from crdtstate.revocations import Revocations
from crdtstate.shelf import Shelf
from crdtstate.stores.file import read_agent, read_documents, reading
from crdtstate.tiers import open_tier

ALL = Retention(count=None, age=None, bytes=None, near=None)
"""What is kept is the agent's to say: nothing is let go from here."""


def list_checkpoints(
    tier: Kept, agent: Whose = None, mesh: Mesh = None, as_json: AsJson = False
) -> None:
    """List the checkpoints in a tier, by agent, oldest first.

    Example: [cyan]crdtstate checkpoints list agent-7.db[/cyan]
    """
    found = run(_list_checkpoints(_tier_url(tier), agent, _Believing(mesh, tier)))
    if as_json:
        print_json([_describe_checkpoint(*each, mesh=mesh) for each in found])
        return
    rows = [
        (owner, each.id, each.stamp.time.isoformat(timespec="seconds"), each.size, each.label)
        for owner, each in found
    ]
    print_columns([("AGENT", "ID", "MADE", "BYTES", "LABEL"), *rows])
    if others := sum(not each.is_proven for _, each in found):
        note(f"{count(others, 'checkpoint')} not proven: see crdtstate checkpoints verify {tier}")


def verify_checkpoints(
    tier: Kept,
    id: Annotated[str | None, typer.Argument(metavar="ID", help="Which; all without it.")] = None,
    agent: Whose = None,
    mesh: Mesh = None,
    as_json: AsJson = False,
) -> None:
    """Read checkpoints whole, and compare every byte with the hash it should have.

    With --mesh it also checks who made them, and that they were not revoked.

    Example: [cyan]crdtstate checkpoints verify agent-7.db[/cyan]
    """
    with _listed(tier):
        found = run(_verify_checkpoints(_tier_url(tier), agent, id, _Believing(mesh, tier)))
    if as_json:
        print_json([{"agent": who, "id": each, "problem": why} for who, each, why in found])
    else:
        for who, each, why in found:
            print(f"{printable(who)} {printable(each)}: {printable(why or 'intact')}")
    problems = sum(why is not None for _, _, why in found)
    if problems:
        what = "is damaged" if mesh is None else "is damaged, or not of this mesh"
        raise CRDTStateError(f"{tier} {what}: {count(problems, 'checkpoint')}")


def create_checkpoint(
    store: Store,
    label: Annotated[str, typer.Option(metavar="TEXT", help="What to call it.")] = "",
    tier: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where to keep it; otherwise beside the store."),
    ] = None,
    mesh: Mesh = None,
    modules: Modules = None,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint of a store whose agent does not run.

    Example: [cyan]crdtstate checkpoints create agent-7.db --label before-upgrade[/cyan]
    """
    agent = read_agent(store)
    made = run(_create_checkpoint(agent, store, label, tier, mesh))
    if as_json:
        print_json(_describe_checkpoint(agent, made, mesh=mesh))
    else:
        print(made.id)


def restore_checkpoint(
    store: Store,
    id: Annotated[str, typer.Argument(metavar="ID", help="Which.")],
    documents: Documents = None,
    paths: Paths = None,
    message: Annotated[str, typer.Option(metavar="TEXT", help="Why, for the history.")] = "",
    tier: Tier = None,
    mesh: Mesh = None,
    modules: Modules = None,
    as_json: AsJson = False,
) -> None:
    """Bring values back into a store whose agent does not run.

    It is a new change, which the others get when the agent runs again: what
    they have written since merges with it. Look at it before with
    [bold]crdtstate checkpoints diff[/bold].

    Example: [cyan]crdtstate checkpoints restore agent-7.db 01a20a426c100000-4766fd4cc9133770[/cyan]
    """
    agent = read_agent(store)
    url = None if tier is None else _tier_url(tier)
    with _listed(tier or str(store)):
        changed = run(_restore_checkpoint(agent, store, url, id, documents, paths, message, mesh))
    _print_differences(changed, as_json)
    note(f"{store}: {count(len(changed), 'place')} restored")


def compare_checkpoints(
    store: Annotated[
        str,
        typer.Argument(
            metavar="STORE", help="A replica's SQLite file; to compare two, a tier will do."
        ),
    ],
    since: Annotated[str, typer.Argument(metavar="ID", help="Which.")],
    until: Annotated[
        str | None, typer.Argument(metavar="ID", help="Which then; the store as it is without.")
    ] = None,
    documents: Documents = None,
    paths: Paths = None,
    tier: Tier = None,
    mesh: Mesh = None,
    modules: Modules = None,
    as_json: AsJson = False,
) -> None:
    """Print what reads differently now, or in a second checkpoint.

    Nothing is altered, and the agent may be running.

    Example: [cyan]crdtstate checkpoints diff agent-7.db 01a20a426c100000-4766fd4cc9133770[/cyan]
    """
    if until is None and "://" in store:
        raise typer.BadParameter(f"{store} is a tier: name a store, or a second ID")
    with _listed(tier or store):
        believing = _Believing(mesh, store)
        before, after = run(_load_two(_tier_url(tier or store), since, until, believing))
    if after is None:
        with reading(store) as db:
            after = read_documents(db, store)
    there = {*before.documents(), *after.documents()}
    if unknown := sorted(set(documents or ()) - there):
        raise CRDTStateError(f"there is no document {unknown[0]!r}, neither now nor then")
    names = documents or sorted(name for name in there if not name.startswith(SYSTEM))
    _print_differences(_compare(before, after, names, paths), as_json)


def _compare(
    before: DocumentSet, after: DocumentSet, names: list[str], paths: list[str] | None
) -> list[Difference]:
    while True:
        try:
            return list(differences(before, after, names, Selection(paths)))
        except UnknownStrategy as exc:
            stand_in(", ".join(names), exc.name)


def _print_differences(found: list[Difference], as_json: bool) -> None:
    if as_json:
        print_json([_describe_difference(each) for each in found])
        return
    for each in found:
        print(printable(str(each), "\n"))


def _describe_difference(found: Difference) -> dict[str, Any]:
    """Without a "before", or an "after", where there is nothing."""
    values = {"before": found.before, "after": found.after}
    place = {field: getattr(found, field) for field in ("document", "kind", "name", "key")}
    return place | {name: value for name, value in values.items() if value is not ABSENT}


@contextmanager
def _listed(where: str) -> Iterator[None]:
    """Say where to look for the ids there are."""
    try:
        yield
    except UnknownCheckpoint as exc:
        reason = f"there is no checkpoint {str(exc.id)[:80]!r}"
        raise CRDTStateError(f"{reason}; see: crdtstate checkpoints list {where}") from None


def _tier_url(text: str) -> str:
    """The URL of a tier that was named by its URL, its file, or the store beside it."""
    if "://" in text:
        return text
    for path in (Path(f"{text}.checkpoints"), Path(text)):
        if path.is_file():
            return f"sqlite:///{quote(str(path.absolute()))}"
    raise UsageError(f"{text}: no such file, nor one named {text}.checkpoints")


class _Believing:
    """Which checkpoints are believed.

    Args:
        mesh: The file with what proves who is a member; None: all are believed.
        beside: What is named, a tier or a store. If it is a store, it tells who was revoked, too.
    """

    def __init__(self, mesh: Path | None, beside: str) -> None:
        credentials = open_credentials(mesh)
        self.authors = authors_of(credentials, None)
        self._root = credentials.root
        self._revocations = Revocations()
        self.attestation = Attestation(
            self.authors, lambda: credentials.certificate, self._revocations.is_revoked
        )
        store = Path(beside.removesuffix(".checkpoints"))
        if self._root is None or "://" in beside or not store.is_file():
            return
        try:
            take_from_store(store, self._root, self._revocations)
        except StoreError as exc:
            # It may be a tier's file itself, which is no store.
            if Path(f"{store}.checkpoints").is_file():
                note(f"{store} does not tell who was revoked: {exc}")

    async def learn(self, url: str) -> None:
        """Look in the checkpoints of all agents who was revoked."""
        if self._root is None:
            return
        async with aclosing(_catalogues(url, None, self.attestation)) as catalogues:
            async for each in catalogues:
                await take_from_checkpoints(each, self._root, self._revocations)


async def _list_checkpoints(
    url: str, agent: str | None, believing: _Believing
) -> list[tuple[str, Checkpoint]]:
    await believing.learn(url)
    return [
        (each.agent, checkpoint)
        async for each in _catalogues(url, agent, believing.attestation)
        for checkpoint in each.saved()
    ]


async def _verify_checkpoints(
    url: str, agent: str | None, id: str | None, believing: _Believing
) -> list[tuple[str, str, str | None]]:
    await believing.learn(url)
    found: list[tuple[str, str, str | None]] = []
    async for each in _catalogues(url, agent, believing.attestation):
        (shelf,) = each.shelves
        whys = [(bad, why) for bad, why in shelf.unreadable.items() if id in (None, bad)]
        found += [(each.agent, bad, f"its manifest: {why}") for bad, why in sorted(whys)]
        for checkpoint in each.saved():
            if id not in (None, checkpoint.id):
                continue
            try:
                await each.verify(checkpoint.id)
                await each.check_believed(checkpoint.id)
                found.append((each.agent, checkpoint.id, None))
            except CorruptCheckpoint as exc:
                why = exc.reason.removeprefix(f"{checkpoint.id}: ")
                found.append((each.agent, checkpoint.id, why))
    if id is not None and not found:
        raise UnknownCheckpoint(id)
    return found


async def _catalogues(
    url: str, agent: str | None, attestation: Attestation
) -> AsyncGenerator[Catalogue, None]:
    """What a tier has, of each agent."""
    tier = await open_tier(url)
    try:
        agents = {agent_of(item.key) for item in await tier.items("")}
        for name in sorted(each for each in agents if each is not None and agent in (None, each)):
            shelf = Shelf(
                tier,
                name,
                limit=60,
                retry=1,
                retry_max=1,
                emit=lambda event: None,
                attestation=attestation,
            )
            catalogue = Catalogue(name, [shelf], Retention(), attestation)
            await catalogue.read(shelf)
            yield catalogue
    finally:
        await tier.close()


async def _load_two(
    url: str, since: str, until: str | None, believing: _Believing
) -> tuple[Past, DocumentSet | None]:
    before, after = None, None
    vouch = believing.authors.vouch
    await believing.learn(url)
    async with aclosing(_catalogues(url, None, believing.attestation)) as catalogues:
        async for each in catalogues:
            if since in each.manifests:
                before = await _load(each, since, vouch)
            if until is not None and until in each.manifests:
                after = await _load(each, until, vouch)
    for id, found in ((since, before), (until, after)):
        if id is not None and found is None:
            raise UnknownCheckpoint(id)
    assert before is not None
    return before, after


async def _load(catalogue: Catalogue, id: str, vouch: Callable[[Snapshot], Snapshot]) -> Past:
    past = Past()
    for name, shared, version, data, changes in await catalogue.load(id):
        try:
            past.fill(name, shared, version, vouch(Snapshot.decode(data)), changes)
        except InvalidUpdate as exc:
            raise CorruptCheckpoint("checkpoint", id, str(exc)) from exc
    return past


async def _restore_checkpoint(
    agent: str,
    store: Path,
    tier: str | None,
    id: str,
    documents: list[str] | None,
    paths: list[str] | None,
    message: str,
    mesh: Path | None,
) -> list[Difference]:
    async with _opened(agent, store, tier, mesh) as replica:
        changed = await replica.restore(id, documents=documents, paths=paths, message=message)
        await replica.durable()
        return changed


async def _create_checkpoint(
    agent: str, store: Path, label: str, tier: str | None, mesh: Path | None
) -> Checkpoint:
    async with _opened(agent, store, tier, mesh) as replica:
        return await replica.checkpoint(label)


def _opened(agent: str, store: Path, tier: str | None, mesh: Path | None) -> Replica:
    tiers = None if tier is None else [tier]
    return Replica(agent, store=store, checkpoints=tiers, retention=ALL, mesh=mesh)


def _describe_checkpoint(agent: str, checkpoint: Checkpoint, mesh: Path | None) -> dict[str, Any]:
    proven = {} if mesh is None else {"proven": checkpoint.is_proven}
    return {
        "agent": agent,
        "id": checkpoint.id,
        "label": checkpoint.label,
        "made": checkpoint.stamp.time,
        "bytes": checkpoint.size,
        "documents": {name: version.total for name, version in checkpoint.version.items()},
        "tiers": list(checkpoint.tiers),
        **proven,
    }
