"""
How a replica is doing, for those who ask often.

`Replica.status` also counts the conflicts, for which it reads them all. This does not, and is the
one place in `relay` that looks behind a replica's public names.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from crdtstate.replica import Replica


@dataclass(frozen=True, slots=True)
class Glance:
    """A replica at one moment.

    Attributes:
        is_open: Whether it is open.
        store: The store's file; None: memory only.
        store_failure: Why the store refuses to write, if it does.
        pending: Changes that wait for others they build on.
        missing: Changes that peers announced and nobody sent yet.
        journal: Bytes of changes kept in the journal, by document.
    """

    is_open: bool
    store: str | None
    store_failure: str | None
    pending: int
    missing: int
    journal: dict[str, int]

    @classmethod
    def at(cls, replica: Replica) -> Glance:
        path = replica._store_path
        store = None if path is None else str(path)
        if replica._state != "open":
            return cls(False, store, None, 0, 0, {})
        journal = {name: replica._store.kept(name) for name in replica.documents()}
        failure = replica._store.failure
        return cls(
            True,
            store,
            str(failure) if failure else None,
            replica._sync.pending_count,
            replica._sync.missing_count(),
            journal,
        )

    @property
    def disk_free(self) -> int | None:
        """The bytes left on the store's disk; None without a store, or if it does not say."""
        try:
            return (
                shutil.disk_usage(Path(self.store).absolute().parent).free if self.store else None
            )
        except OSError:
            return None
