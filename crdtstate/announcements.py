"""
Which checkpoints there are in the mesh: each agent writes its newest into the document
"@checkpoints", which replicates like any other. So everybody can tell how far back an agent would
fall that lost everything, and where its newest checkpoint can be had.

What stands there comes from others and is read with care; what is malformed tells nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit

from crdtstate.catalogue import Checkpoint
from crdtstate.crdts import Map
from crdtstate.document import Document
from crdtstate.documents import DocumentSet
from crdtstate.events import CheckpointSaved
from crdtstate.slots import SEPARATOR

DOCUMENT = "@checkpoints"
NEWEST = "newest"

TOKEN_CHARS_MAX = 64 * 1024
"""A longer token of the version is left out: it would be written again with each checkpoint."""

SHARED_SCHEMES = {"redis", "rediss", "s3"}
"""Tiers that others can reach, too."""


def announce(documents: DocumentSet, checkpoint: Checkpoint) -> None:
    """Tell the mesh of the newest checkpoint, unless that stands there already."""
    token = str(checkpoint.version)
    view = documents.system_document(DOCUMENT).map(NEWEST)
    said = {
        "id": checkpoint.id,
        "label": checkpoint.label,
        "version": token if len(token) <= TOKEN_CHARS_MAX else "",
        "when": checkpoint.stamp.wall_ms,
        "tiers": [url for url in checkpoint.tiers if urlsplit(url).scheme in SHARED_SCHEMES],
    }
    if view.get(documents.agent) != said:
        view[documents.agent] = said


def heard(document: Document, paths: Iterable[str]) -> Iterator[CheckpointSaved]:
    """What others say in *paths* of the document, which have just changed."""
    if document.name != DOCUMENT:
        return
    view = Map(document, NEWEST)
    for path in paths:
        container, _, agent = path.partition(SEPARATOR)
        if container == Map.kind + NEWEST:
            # Not as the map reads it: whoever sets a strategy there must not decide about this.
            live = view.live(agent)
            event = _read(agent, live[-1].value) if live else None
            if event is not None:
                yield event


def _read(agent: str, said: object) -> CheckpointSaved | None:
    if not isinstance(said, dict):
        return None
    texts = [said.get(field) for field in ("id", "label", "version")]
    tiers = said.get("tiers")
    if not all(isinstance(text, str) for text in texts) or not isinstance(tiers, list):
        return None
    if not all(isinstance(url, str) for url in tiers):
        return None
    id, label, version = map(str, texts)
    return CheckpointSaved(agent, id, label, version, tuple(tiers), False)
