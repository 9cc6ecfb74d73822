"""Document sets that keep a journal and can look back, for tests below the network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from harness import Agent
from hypothesis import strategies as st

from crdtstate.change import Change
from crdtstate.checkpoints import Checkpoint, Checkpoints
from crdtstate.clock import Version
from crdtstate.document import Document
from crdtstate.documents import DocumentSet
from crdtstate.errors import UnknownCheckpoint
from crdtstate.history import PastChange
from crdtstate.lookback import Lookback
from crdtstate.manifest import LoadedDocument
from crdtstate.past import Difference
from crdtstate.rewrite import Reverted
from crdtstate.stores import Entry, Saved
from crdtstate.stores.memory import MemoryStore
from crdtstate.sync import Sync


class _Shelf:
    """Checkpoints in a dict."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Checkpoint, list[LoadedDocument]]] = {}
        # The ids that were read.
        self.read: list[str] = []

    def saved(self) -> list[Checkpoint]:
        return [checkpoint for checkpoint, _ in self.kept.values()]

    async def load(self, id: str) -> list[LoadedDocument]:
        if id not in self.kept:
            raise UnknownCheckpoint(id)
        self.read.append(id)
        return self.kept[id][1]


class Archived(Agent):
    """An agent with a journal: what it seals and receives is committed at once."""

    def __init__(self, writer: int, name: str = "") -> None:
        super().__init__(writer, name)
        self.store = MemoryStore()
        self.shelf = _Shelf()
        self.lookback = Lookback(
            self,
            self.store,
            cast(Sync, self),
            cast(Checkpoints, self.shelf),
            settle=lambda: cast(None, self.sealed()),
            wait_until=_at_once,
            takes=lambda name: True,
        )

    def _written(self) -> None:
        # As a replica does: what is sealed is journaled before anybody looks.
        for change, _ in self._hand_over():
            self._keep(change)
            self.outbox.append(change)

    def sealed(self) -> list[Change]:
        count = len(self.outbox)
        if self._transaction is None:
            self._seal_open()
        return self.outbox[count:]

    def receive(self, change: Change) -> list[str]:
        document = self.find(change.document)
        known = document is not None and document.version.covers(change.dot)
        touched = super().receive(change)
        if not known:
            self._keep(change)
        return touched

    def _keep(self, change: Change) -> None:
        self.store.append([Entry(change.document, change.writer, change.seq, change.data)])

    def committed_version(self, name: str) -> Version:
        document = self.find(name)
        return document.version.copy() if document is not None else Version()

    def compact(self, name: str, keep_bytes: int = 0) -> None:
        """Renew the snapshot of a document, and forget changes that it contains."""
        snapshot = self.document(name).snapshot()
        self.store.compact(Saved(name, snapshot.version, snapshot.encode()), keep_bytes)

    def keep_checkpoint(self, id: str) -> Checkpoint:
        """Keep a checkpoint of all documents."""
        self.sealed()
        snapshots = [self.document(name).snapshot() for name in self.documents()]
        cut = self.version()
        checkpoint = Checkpoint(id, "", self.next_stamp(), cut, 0, ())
        loaded = [
            LoadedDocument(s.document, s.shared, s.version, s.encode(), []) for s in snapshots
        ]
        self.shelf.kept[id] = checkpoint, loaded
        return checkpoint

    # Looking back, at once

    def at(self, point: Any, **options: Any) -> Any:
        return asyncio.run(self.lookback.at(point, options.get("documents")))

    def diff(self, since: Any, until: Any = None, **options: Any) -> list[Difference]:
        documents, paths = options.get("documents"), options.get("paths")
        return asyncio.run(self.lookback.diff(since, until, documents, paths))

    def restore(self, point: Any, **options: Any) -> list[Difference]:
        given = [options.get("documents"), options.get("paths")]
        said = [options.get("message", ""), options.get("run", "")]
        return asyncio.run(self.lookback.restore(point, *given, *said))

    def revert(self, run: str, **options: Any) -> Reverted:
        return asyncio.run(
            self.lookback.revert(run, options.get("document"), options.get("agent"), "")
        )

    def history(self, name: str, **options: Any) -> list[PastChange]:
        names = ("since", "until", "agent", "run", "path", "limit")
        given = [options.get(each) for each in names]
        return list(self.lookback.history(name, *given, options.get("tidying", False)))


async def _at_once(ready: Callable[[], bool], what: str) -> None:
    assert ready(), f"{what}: not yet"


# What agents do


VERBS = ("put", "put", "delete", "increment", "decrement", "add", "discard", "set", "clear")

acts = st.tuples(
    st.sampled_from((*VERBS, "strategy", "hear", "seal")),
    st.sampled_from(["a", "b"]),
    st.integers(0, 3),
    st.sampled_from(["main", "tasks"]),
)
histories = st.lists(st.tuples(st.integers(0, 2), acts), max_size=24)


def act(agent: DocumentSet, verb: str, key: str, number: int, name: str = "main") -> None:
    """One write of an agent, by whichever view."""
    document = agent.document(name)
    match verb:
        case "put":
            document.map("plan")[key] = number
        case "delete":
            document.map("plan").pop(key, None)
        case "increment":
            document.counter(key).increment(number)
        case "decrement":
            document.counter(key).decrement(number)
        case "add":
            document.set("skills").add(key)
        case "discard":
            document.set("skills").discard(key)
        case "set":
            document.register("leader").value = number
        case "clear":
            document.register("leader").clear()
        case "strategy":
            document.map("plan", strategy=["lww", "max", "min", "merge"][number])


def read_document(document: Document | None) -> Any:
    """Everything that reading a document gives. An empty one reads as one that is not there."""
    if document is None:
        return {}
    found: dict[str, Any] = {}
    if items := dict(document.map("plan")):
        found["plan"] = dict(sorted(items.items()))
    for key in ("a", "b"):
        if count := document.counter(key).value:
            found[key] = count
    if elements := set(document.set("skills")):
        found["skills"] = elements
    if document.register("leader").is_set:
        found["leader"] = document.register("leader").value
    if rule := document.map("plan").strategies():
        found["rule"] = rule
    return found


def read(documents: DocumentSet) -> dict[str, Any]:
    """Everything that reading gives, by document."""
    every = {name: read_document(documents.find(name)) for name in documents.documents()}
    return {name: content for name, content in every.items() if content}
