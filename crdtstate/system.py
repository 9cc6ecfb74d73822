"""
Checkpoints of the whole system, and what came of restoring one: what controllers tell of them, and
what stands in ``@control``. What agents wrote there is read with care.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from crdtstate import verbs
from crdtstate.clock import Cut
from crdtstate.commands import CHECKPOINT, Command
from crdtstate.manifest import Damaged, check_id
from crdtstate.outcomes import Fulfilled, Outcome, Rejected, Results


@dataclass(frozen=True, slots=True)
class AgentCheckpoint:
    """The checkpoint of one agent, as a part of one of the whole system.

    Attributes:
        id: Its id at that agent.
        hash: SHA-256 of its manifest, which names all of its content by hash.
        version: What is in it; empty if that is not known any more.
        documents: Which documents.
        size: The bytes it takes in a tier.
    """

    id: str
    hash: str
    version: Cut
    documents: tuple[str, ...]
    size: int


class SystemCheckpoint(Results):
    """A checkpoint of the whole system: agent -> `Fulfilled` with its `AgentCheckpoint`, `Rejected`
    or `TimedOut`.

    What any agent had written or seen before `Controller.checkpoint_all` was called is in *cut*,
    and *cut* is in the checkpoint of each agent (as far as it takes part in these documents);
    except for the agents in *unheard*, who did not say in time how far they were.

    Attributes:
        label: What it was called.
        cut: What all of them have.
        unheard: Agents that were expected to tell how far they are, and did not.
        missing: Agents without a checkpoint: they failed, were late, or away.
    """

    def __init__(
        self,
        command: Command,
        outcomes: Mapping[str, Outcome],
        missing: Iterable[str],
        label: str,
        cut: Cut,
        unheard: Iterable[str],
    ) -> None:
        super().__init__(command, outcomes, missing)
        self.label = label
        self.cut = cut
        self.unheard = tuple(sorted(unheard))

    @property
    def checkpoints(self) -> dict[str, AgentCheckpoint]:
        """The checkpoints there are, by agent."""
        return {agent: each.value for agent, each in self.items() if isinstance(each, Fulfilled)}


class SystemRestore(Results):
    """What came of restoring the whole system: agent -> `Fulfilled` once it has what was restored.

    Attributes:
        executors: Document -> the agent that restores it.
        has_begun: Whether a majority accepted it. If not, nothing was restored, nor will be.
    """

    def __init__(self, results: Results, command: Command, executors: Mapping[str, str]) -> None:
        super().__init__(command, results, results.missing)
        self.executors = dict(executors)
        self.has_begun = command.state == "going"


def read_checkpoint(command: Command, results: Results) -> SystemCheckpoint:
    """What a command to make checkpoints, and what came of it, come to."""
    arguments = command.arguments
    label, unheard = arguments.get("label"), arguments.get("unheard")
    outcomes: dict[str, Outcome] = {agent: read_made(each) for agent, each in results.items()}
    return SystemCheckpoint(
        command,
        outcomes,
        results.missing,
        label if isinstance(label, str) else "",
        verbs.parse(arguments.get("cut")),
        [str(each) for each in unheard] if isinstance(unheard, list) else [],
    )


def read_made(outcome: Outcome) -> Outcome:
    """An agent's answer, with the checkpoint it made."""
    if not isinstance(outcome, Fulfilled):
        return outcome
    match outcome.value:
        case {"id": str(id), "hash": str(hash), "version": str(token), "size": int(size)}:
            cut = verbs.parse(token)
            return Fulfilled(AgentCheckpoint(id, hash, cut, tuple(cut), size))
    return Rejected("answered with something that is no checkpoint")


def note(found: SystemCheckpoint) -> dict[str, Any]:
    """What is noted of a checkpoint of the system: all but the versions."""
    names = sorted({name for each in found.checkpoints.values() for name in each.documents})
    number = {name: at for at, name in enumerate(names)}
    return {
        "label": found.label,
        "by": found.by,
        "issued": int(found.issued.timestamp() * 1000),
        "cut": str(found.cut),
        "documents": names,
        "agents": {
            agent: [each.id, each.hash, each.size, [number[name] for name in each.documents]]
            for agent, each in found.checkpoints.items()
        },
        "missing": list(found.missing),
    }


def read_noted(id: str, value: object) -> SystemCheckpoint | None:
    """Read what was noted of a checkpoint of the system; None if that is something else."""
    match value:
        case {
            "label": str(label),
            "by": str(by),
            "issued": int(issued),
            "cut": str(cut),
            "documents": list(documents),
            "agents": dict(agents),
            "missing": list(missing),
        } if 0 <= issued < 2**47:
            command = Command(id, CHECKPOINT, {}, by, ("*",), issued, issued)
            outcomes: dict[str, Outcome] = {}
            for agent, said in agents.items():
                match said:
                    case [str(made), str(hash), int(size), list(numbers)]:
                        names = tuple(str(documents[at]) for at in numbers if _is_in(at, documents))
                        found = AgentCheckpoint(made, hash, Cut(), names, size)
                        outcomes[str(agent)] = Fulfilled(found)
            away = [str(each) for each in missing]
            return SystemCheckpoint(command, outcomes, away, label, verbs.parse(cut), ())
    return None


def _is_in(at: object, names: list[Any]) -> bool:
    return type(at) is int and 0 <= at < len(names)


def is_in_time(command: Command, agent: str, made: AgentCheckpoint) -> bool:
    """Whether a checkpoint was made when it was asked for, by one who was there."""
    patience = command.arguments.get("patience")
    try:
        made_ms = check_id(made.id).wall_ms
    except Damaged:
        return False
    until_ms = command.issued_ms + 1000 * (patience if isinstance(patience, float) else 0.0)
    return agent in command.expected and made_ms <= until_ms


def executors_of(command: Command) -> dict[str, str]:
    """Who restores which document, as a command to restore says: document -> agent."""
    said = command.arguments.get("executors")
    found: dict[str, str] = {}
    for agent, part in said.items() if isinstance(said, dict) else ():
        match part:
            case [str(), list(names)]:
                found.update((str(name), str(agent)) for name in names)
    return found
