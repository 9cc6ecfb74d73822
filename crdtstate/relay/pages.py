"""
What a relay answers to plain HTTP: its health, its status and the digests of its documents.

Answers are JSON objects for scripts and monitors. They say what a replica knows, never more: who
can reach the port can read everything anyway (see `Replica`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import msgpack

from crdtstate.document import Document
from crdtstate.replica import Replica
from crdtstate.transports import HttpAnswer

UNAVAILABLE = 503


def answer(replica: Replica, path: str) -> HttpAnswer | None:
    """Answer a GET of *path*; None if there is no such page."""
    match path:
        case "/healthz":
            found = health(replica)
            return _json(found, 200 if found["ready"] else UNAVAILABLE)
        case "/status":
            return _json(status(replica))
        case "/digest":
            return _json(digests(replica))
        case _:
            return None


def _json(content: dict[str, Any], code: int = 200) -> HttpAnswer:
    return HttpAnswer(json.dumps(content).encode() + b"\n", "application/json", code)


def health(replica: Replica) -> dict[str, Any]:
    """Whether the replica does its work, and if not, why."""
    found = replica.status()
    why = [f"the store fails: {found['store_failure']}"] if found["store_failure"] else []
    if not found["ready"] and not why:
        why = ["it is closing"]
    return {
        "ready": found["ready"],
        "why": why,
        "agent": found["agent"],
        "role": found["role"],
        "peers": len(found["peers"]),
        "documents": len(found["documents"]),
    }


def status(replica: Replica) -> dict[str, Any]:
    """`Replica.status` with the peers in full, and its version as a token."""
    return {
        **replica.status(),
        "peers": [asdict(peer) for peer in replica.peers()],
        "version": str(replica.version()),
    }


def digests(replica: Replica) -> dict[str, Any]:
    """The replica's version as a token, and a digest of each document at that version."""
    version = str(replica.version())
    found = ((name, replica.find(name)) for name in replica.documents())
    return {"version": version, "documents": {name: digest(doc) for name, doc in found if doc}}


def digest(document: Document) -> str | None:
    """A hash of the document's content: every path with every replica's slot, conflicts included.

    Equal on replicas of equal version. None for native Yjs types, which have no canonical form.
    """
    if document.shared:
        return None
    found = hashlib.blake2b(digest_size=16)
    for path, cell in document.lanes.canonical().items():
        slots = [(writer, slot.encode()) for writer, slot in sorted(cell.items())]
        found.update(msgpack.packb([path, slots]))
    return found.hexdigest()
