"""What the tests of checkpoints share: replicas that wait for nothing long, and looks into them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from harness import contents

from crdtstate import Config, Event, Replica
from crdtstate.documents import DocumentSet
from crdtstate.manifest import LoadedDocument

E = TypeVar("E", bound=Event)


def quick(**settings: Any) -> Config:
    """Settings under which nothing that fails is waited for long."""
    fast = {"checkpoint_interval": 0, "tier_timeout": 0.3}
    return Config(**{**fast, "tier_retry": 0.01, "tier_retry_max": 0.02, **settings})


def agent(*tiers: Any, store: Path | None = None, **options: Any) -> Replica:
    config = quick(**options.pop("settings", {}))
    return Replica("agent", checkpoints=tiers, store=store, config=config, **options)


def users(documents: DocumentSet) -> dict[str, Any]:
    """What lies in the documents that are not the system's."""
    return {name: lanes for name, lanes in contents(documents).items() if name[0] != "@"}  # type: ignore[arg-type]


def rebuild(loaded: Iterable[LoadedDocument]) -> dict[str, Any]:
    """What lies in the documents of a checkpoint."""
    documents = DocumentSet("reader", 99, lambda: 1)
    for name, shared, version, snapshot, changes in loaded:
        documents.load_snapshot(name, snapshot)
        for change in changes:
            documents.load_change(name, change)
        found = documents.find(name)
        assert found is not None and found.version == version and found.shared == shared
    return users(documents)


async def load(replica: Replica, id: str) -> dict[str, Any]:
    return rebuild(await replica._checkpoints.load(id))


def hear(replica: Replica, *kinds: type[Event]) -> list[Any]:
    heard: list[Event] = []
    for kind in kinds:
        replica.on(kind, heard.append)
    return heard


async def happens(replica: Replica, kind: type[E], done: Callable[[E], bool] = lambda _: True) -> E:
    """Wait for an event; start it as a task before what causes it."""
    async for event in replica.events(kind):
        assert isinstance(event, kind)
        if done(event):
            return event
    raise AssertionError("closed before it happened")


def fill(replica: Replica, keys: int = 100) -> None:
    replica.map("plan").update({f"key-{number}": number for number in range(keys)})
