"""
Reports: how each agent of a fleet does, by its own answer and by what is known of it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from crdtstate import announcements, casebook
from crdtstate.crdts import Map
from crdtstate.outcomes import Fulfilled, Outcome, Rejected
from crdtstate.replica import Replica


@dataclass(frozen=True, slots=True)
class AgentReport:
    """How one agent does.

    Attributes:
        agent, role: Who.
        state: ``"up"``, ``"suspected"``, ``"down"`` or ``"retired"``, as it is seen here.
        last_seen: When it was last known to be reachable; None if that was before our time.
        has_answered: Whether the rest is its own answer, of now; else what is known here.
        is_ready: Whether it is open and its store works; None if it did not answer.
        trouble: What does not work, in words; empty if all does.
        checkpoint: The id of its newest checkpoint, and *checkpoint_at* when that was made.
        checkpoints: How many it has; None if it did not answer.
        conflicts: How many conflicts are open there; None if it did not answer.
        lag: Changes that the slowest of its peers has not acknowledged yet.
        metrics: Numbers by name.
        escalation, adoption: What stands in ``@recovery`` of it: why it could not recover by
            itself; who looks after what it left.
    """

    agent: str
    role: str
    state: str
    last_seen: datetime | None = None
    has_answered: bool = False
    is_ready: bool | None = None
    trouble: str = ""
    checkpoint: str = ""
    checkpoint_at: datetime | None = None
    checkpoints: int | None = None
    conflicts: int | None = None
    lag: int | None = None
    metrics: Mapping[str, Any] | None = None
    escalation: Mapping[str, Any] | None = None
    adoption: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        return "  ".join(self.row()).rstrip()

    def row(self) -> tuple[str, ...]:
        """Itself as a row of `Report`."""
        return (
            self.agent,
            self.state if self.has_answered else f"{self.state}, no answer",
            _clock(self.last_seen),
            _clock(self.checkpoint_at),
            *("-" if each is None else str(each) for each in (self.conflicts, self.lag)),
            self._troubles(),
        )

    def _troubles(self) -> str:
        said = [self.trouble] if self.trouble else []
        if self.escalation is not None:
            said.append(f"could not recover: {_last_attempt(self.escalation)}")
        if self.adoption is not None:
            said.append(f"adopted by {self.adoption.get('by', 'somebody')}")
        return "; ".join(said)


class Report(dict[str, AgentReport]):
    """How all known agents do, by name; as text, a table."""

    def __str__(self) -> str:
        head = ("agent", "state", "last seen", "checkpoint", "conflicts", "lag", "trouble")
        rows = [head, *(each.row() for each in self.values())]
        widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
        return "\n".join(
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def __repr__(self) -> str:
        up = sum(each.state in ("up", "suspected") for each in self.values())
        return f"<Report {len(self)} agents, {up} up>"


# What is known here


def known_here(replica: Replica) -> dict[str, AgentReport]:
    """What is known here of all members, and of those of whom something is on record."""
    found: dict[str, AgentReport] = {}
    now = datetime.now(UTC)
    rank = ("retired", "down", "suspected", "up")
    for member in replica.members():
        before = found.get(member.agent)
        if before is None or rank.index(member.state) > rank.index(before.state):
            seen_ms = replica._sync.mesh.members.seen_ms(member.writer, replica._loop.time())
            seen = now if member.is_self else _time(seen_ms)
            found[member.agent] = AgentReport(member.agent, member.role, member.state, seen)
    newest = _entries(replica, announcements.DOCUMENT, announcements.NEWEST)
    escalations = _entries(replica, casebook.DOCUMENT, casebook.ESCALATIONS)
    adoptions = _entries(replica, casebook.DOCUMENT, casebook.ADOPTIONS)
    for agent in (*escalations, *adoptions):
        found.setdefault(agent, AgentReport(agent, "agent", "retired"))
    for agent, each in found.items():
        said = newest.get(agent, {})
        id = said.get("id")
        found[agent] = replace(
            each,
            checkpoint=id if isinstance(id, str) else "",
            checkpoint_at=_time(said.get("when")),
            escalation=escalations.get(agent),
            adoption=adoptions.get(agent),
        )
    return found


def _entries(replica: Replica, document: str, name: str) -> dict[str, dict[str, Any]]:
    """A map of the system's, as far as it is made of dicts."""
    found = replica.find(document)
    if found is None or found.shared:
        return {}
    return {key: each for key, each in Map(found, name).items() if isinstance(each, dict)}


# What agents answer


def read_report(known: AgentReport, outcome: Outcome) -> AgentReport:
    """What is known of an agent, with its own answer."""
    if isinstance(outcome, Rejected):
        return replace(known, trouble=outcome.reason)
    said = outcome.value if isinstance(outcome, Fulfilled) else None
    if not isinstance(said, dict):
        return known
    failing, newest = said.get("tiers_failing"), said.get("checkpoint")
    tiers = failing if isinstance(failing, dict) else {}
    troubles = [f"store: {said['store_failure']}"] if said.get("store_failure") else []
    troubles += [f"{url}: {why}" for url, why in tiers.items()]
    metrics = said.get("metrics")
    made = newest if isinstance(newest, dict) else {}
    id = made.get("id")
    return replace(
        known,
        has_answered=True,
        is_ready=said.get("ready") is True,
        trouble="; ".join(troubles),
        checkpoint=id if isinstance(id, str) else known.checkpoint,
        checkpoint_at=_time(made.get("when")) or known.checkpoint_at,
        checkpoints=_count(said.get("checkpoints")),
        conflicts=_count(said.get("conflicts")),
        lag=_count(said.get("lag")),
        metrics=metrics if isinstance(metrics, dict) else {},
    )


def _last_attempt(escalation: Mapping[str, Any]) -> str:
    match escalation.get("attempts"):
        case [*_, [str(source), str(reason)]]:
            return f"{source}: {reason}"
    return "it does not say why"


def _count(value: object) -> int | None:
    return value if type(value) is int else None


def _time(ms: object) -> datetime | None:
    is_time = type(ms) is int and 0 <= ms < 2**47
    return datetime.fromtimestamp(ms / 1000, UTC) if is_time and isinstance(ms, int) else None


def _clock(when: datetime | None) -> str:
    return "-" if when is None else when.isoformat(sep=" ", timespec="seconds")[:19]
