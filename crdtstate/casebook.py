"""
What the mesh is told of recoveries: the document "@recovery", which replicates like any other.

Four maps. In "escalations" an agent says that it could not get its documents back, in "adoptions"
who took care of an agent that died, by agent; in "passed" an agent says, until that is done, which
documents of such a one it cannot bring. In "disowned" a replica that goes on as another
writer says, by the writer it was, which changes it took back: a checkpoint that has them must not
be taken in any more.

What stands there comes from others and is read with care; what is malformed tells nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from crdtstate.clock import Cut
from crdtstate.crdts import Map
from crdtstate.document import Document
from crdtstate.documents import DocumentSet
from crdtstate.events import AdoptionPassed, AgentRecovered, Event, RecoveryEscalated
from crdtstate.ladder import REASON_CHARS_MAX, SOURCES, Attempt, Disowned
from crdtstate.slots import SEPARATOR

DOCUMENT = "@recovery"
ESCALATIONS = "escalations"
ADOPTIONS = "adoptions"
PASSED = "passed"
DISOWNED = "disowned"

TOKEN_CHARS_MAX = 64 * 1024
"""A longer token of a version is left out."""

DISOWNED_MAX = 1000
"""Documents that are named when changes are taken back. If it were more, all changes of that
writer count as taken back."""

LEFT_MAX = 1000
"""Documents that are named as left to others."""

TIERS_MAX = 16


# Telling


def escalate(documents: DocumentSet, attempts: Iterable[Attempt], version: Cut) -> None:
    """Tell that this agent could not get its documents back."""
    documents.system_document(DOCUMENT).map(ESCALATIONS)[documents.agent] = {
        "attempts": [[each.source, each.reason[:REASON_CHARS_MAX]] for each in attempts],
        "when": documents.wall_ms(),
        "version": token(version),
    }


def adopt(documents: DocumentSet, event: AgentRecovered, tiers: Iterable[str]) -> None:
    """Tell that this agent has taken care of another one that died."""
    documents.system_document(DOCUMENT).map(ADOPTIONS)[event.agent] = {
        "by": event.by,
        "when": documents.wall_ms(),
        "version": event.version,
        "checkpoint": event.checkpoint,
        "brought": event.brought,
        "tiers": list(tiers)[:TIERS_MAX],
        **({"left": list(event.left)[:LEFT_MAX]} if event.left else {}),
    }


def pass_on(documents: DocumentSet, event: AdoptionPassed) -> None:
    """Tell that this agent cannot bring all of another one that died."""
    documents.system_document(DOCUMENT).map(PASSED)[f"{event.agent}/{event.by}"] = {
        "agent": event.agent,
        "by": event.by,
        "checkpoint": event.checkpoint,
        "left": list(event.left)[:LEFT_MAX],
    }


def close(documents: DocumentSet, agent: str, by: str | None = None) -> None:
    """Remove what was told of passing on *agent*, or only what *by* told."""
    document = documents.find(DOCUMENT)
    if document is None or document.shared:
        return
    view = document.map(PASSED)
    for key in [f"{agent}/{each}" for each in passed(document, agent) if by in (None, each)]:
        del view[key]


def disown(documents: DocumentSet, writer: int, kept: Mapping[str, int]) -> None:
    """Tell that changes of *writer* were taken back: of each document in *kept* those above."""
    few = dict(kept) if len(kept) <= DISOWNED_MAX else {}
    documents.system_document(DOCUMENT).map(DISOWNED)[f"{writer:x}"] = {
        "all": len(kept) > DISOWNED_MAX,
        "kept": few,
    }


def token(version: Cut) -> str:
    """A version as text; empty if that would be too long to tell."""
    text = str(version)
    return text if len(text) <= TOKEN_CHARS_MAX else ""


# Hearing


def heard(document: Document, paths: Iterable[str]) -> Iterator[Event]:
    """What others say in *paths* of the document, which have just changed."""
    if document.name != DOCUMENT:
        return
    for path in paths:
        container, _, agent = path.partition(SEPARATOR)
        event: Event | None = None
        if container == Map.kind + ESCALATIONS:
            event = _read_escalation(agent, _newest(document, ESCALATIONS, agent))
        elif container == Map.kind + PASSED:
            event = next(_passes(document, agent), None)
        elif container == Map.kind + ADOPTIONS:
            event = _read_adoption(agent, _newest(document, ADOPTIONS, agent))
        if event is not None:
            yield event


def _read_escalation(agent: str, said: object) -> Event | None:
    found = said.get("attempts") if isinstance(said, dict) else None
    if not isinstance(found, list) or not 0 < len(found) <= len(SOURCES):
        return None
    attempts = []
    for each in found:
        match each:
            case [str(source), str(reason)] if source in SOURCES:
                attempts.append(Attempt(source, reason[:REASON_CHARS_MAX]))
            case _:
                return None
    return RecoveryEscalated(agent, tuple(attempts), False)


def _read_adoption(agent: str, said: object) -> AgentRecovered | None:
    if not isinstance(said, dict):
        return None
    by, checkpoint, version = (said.get(field) for field in ("by", "checkpoint", "version"))
    brought = said.get("brought")
    if not isinstance(by, str) or not isinstance(checkpoint, str) or not isinstance(version, str):
        return None
    if type(brought) is not int:
        return None
    left = _names(said.get("left", []))
    return None if left is None else AgentRecovered(agent, by, checkpoint, version, brought, left)


def passed(document: Document | None, agent: str) -> dict[str, frozenset[str]]:
    """Who has passed *agent* on, and which documents."""
    if document is None or document.shared:
        return {}
    container = document.lanes.containers.get(Map.kind + PASSED)
    keys = [key for key in container.cells if key.startswith(f"{agent}/")] if container else []
    found = (each for key in keys for each in _passes(document, key))
    return {each.by: frozenset(each.left) for each in found if each.agent == agent}


def _passes(document: Document, key: str) -> Iterator[AdoptionPassed]:
    """What stands in a key of "passed", by those in whose name it is, newest first."""
    container = document.lanes.containers.get(Map.kind + PASSED)
    cell = container.cells.get(key) if container is not None else None
    for candidate in reversed(document.candidates(cell) if cell else []):
        match candidate.value:
            case {"agent": str(agent), "by": str(by), "checkpoint": str(id), "left": list(names)}:
                left = _names(names)
                is_its = by == candidate.agent and key == f"{agent}/{by}"
                if is_its and left is not None:
                    yield AdoptionPassed(agent, by, id, left)


def _names(value: object) -> tuple[str, ...] | None:
    if not isinstance(value, list) or len(value) > LEFT_MAX:
        return None
    return tuple(value) if all(type(each) is str for each in value) else None


def disowned(document: Document | None) -> Disowned:
    """The changes that were taken back, as far as the document tells."""
    if document is None or document.shared:
        return {}
    found: dict[int, Mapping[str, int] | None] = {}
    container = document.lanes.containers.get(Map.kind + DISOWNED)
    for key in list(container.cells) if container is not None else ():
        said = _newest(document, DISOWNED, key)
        try:
            writer = int(key, 16)
        except ValueError:
            continue
        kept = said.get("kept") if isinstance(said, dict) else None
        if isinstance(kept, dict) and all(type(seq) is int for seq in kept.values()):
            found[writer] = None if said.get("all") is True else kept
    return found


def _newest(document: Document, name: str, key: str) -> Any:
    """What was written last, whatever strategy somebody gave the map."""
    container = document.lanes.containers.get(Map.kind + name)
    cell = container.cells.get(key) if container is not None else None
    found = document.candidates(cell) if cell else []
    return found[-1].value if found else None
