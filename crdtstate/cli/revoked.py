"""
Who was revoked, as far as a store or the checkpoints in a tier tell: from their document ``@mesh``.

A revocation proves itself, so it does not matter whose file it stands in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from crdtstate import forks
from crdtstate.authors import Authors
from crdtstate.catalogue import Catalogue
from crdtstate.certificates import MESH, Certificate, fingerprint
from crdtstate.change import Snapshot
from crdtstate.documents import DocumentSet
from crdtstate.errors import InvalidRevocation, InvalidUpdate, StoreError
from crdtstate.manifest import decode_changes
from crdtstate.past import Past
from crdtstate.revocations import Revocations, decode_revocation
from crdtstate.standing import REVOKED
from crdtstate.stores.file import read_documents, reading

log = logging.getLogger("crdtstate")


class Hidden(NamedTuple):
    """Changes of a revoked member that a store holds and nobody is shown."""

    agent: str
    key: str
    document: str
    changes: int

    def __str__(self) -> str:
        count = "1 change" if self.changes == 1 else f"{self.changes} changes"
        return f"revoked: {self.agent} (key {self.key}): {self.document}: {count} hidden"


def take_from(documents: DocumentSet, root: bytes, found: Revocations) -> None:
    """Add the revocations that *documents* tell of. *root* is the public key of the mesh's root."""
    document = documents.find(MESH)
    if document is None or document.shared:
        return
    view = document.map(REVOKED)
    for key in view:
        for candidate in view.live(key):
            try:
                data, _ = candidate.value
                found.add(decode_revocation(data, root))
            except (InvalidRevocation, ValueError, TypeError):
                continue


def take_from_store(store: Path, root: bytes, found: Revocations) -> None:
    """Add those that a store tells of. Raises StoreError."""
    with reading(store) as db:
        take_from(read_documents(db, store, only={MESH}), root, found)


async def take_from_checkpoints(catalogue: Catalogue, root: bytes, found: Revocations) -> None:
    """Add those that any checkpoint tells of that can be read."""
    entries = {
        entry.parts: entry
        for manifest in catalogue.manifests.values()
        for entry in manifest.documents
        if entry.name == MESH
    }
    for entry in entries.values():
        past = Past()
        try:
            base = Snapshot.decode(await catalogue.read_part(entry.base))
            changes = [
                change
                for delta in entry.deltas
                for change in decode_changes(delta, await catalogue.read_part(delta))
            ]
            past.fill(MESH, entry.shared, entry.version, base, changes)
        except (InvalidUpdate, StoreError) as exc:
            # That it is damaged is said where checkpoints are verified.
            log.debug("%s: %s: %s", catalogue.agent, MESH, exc)
            continue
        take_from(past, root, found)


def hidden(documents: DocumentSet, authors: Authors, found: Revocations) -> Iterator[Hidden]:
    """What *documents* hold of the revoked above their cuts, by document and agent."""
    for name in documents.documents():
        counts: dict[tuple[str, str], int] = {}
        document = documents.document(name)
        for writer, card in document.cards.items():
            if document.is_closed(writer) or name in (MESH, forks.DOCUMENT):
                # Of a fork all is hidden; what is told there proves itself.
                continue
            certificate = _certificate(authors, writer, card)
            cut = found.cut(certificate, name, writer) if certificate is not None else None
            if certificate is None or cut is None:
                continue
            who = certificate.agent, fingerprint(certificate.key)
            counts[who] = counts.get(who, 0) + max(0, document.version.get(writer, 0) - cut)
        for (agent, key), changes in sorted(counts.items()):
            if changes:
                yield Hidden(agent, key, name, changes)


def _certificate(authors: Authors, writer: int, card: bytes) -> Certificate | None:
    try:
        return authors.certificate(writer, card)
    except InvalidUpdate:
        return None
