"""
The board: what stands in ``@control`` as one replica sees it, how it writes there, and what goes.

A result counts only from a lane of the agent it is of, a command only from a lane of the agent
that it names as its author. (That keeps mistakes away. Where changes are not signed, whoever is let
into the mesh can take any name.) Of several under one id, one counts that its writer may give.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from crdtstate.commands import (
    ARGUMENTS_BYTES_MAX,
    CHECKPOINTS,
    COMMANDS,
    COMMANDS_MAX,
    CONTROL,
    EXPIRY_MS_MAX,
    KEYS,
    MARGIN_MS,
    OWN_BYTES_MAX,
    PASSING,
    RESULTS,
    SWEEP,
    SYSTEM_CHECKPOINTS_MAX,
    Answer,
    Command,
)
from crdtstate.crdts import Map
from crdtstate.document import Document
from crdtstate.documents import DocumentSet
from crdtstate.errors import CommandError, UnsupportedValue
from crdtstate.membership import rendezvous
from crdtstate.values import pack


class Board:
    """What stands in ``@control``, as one replica sees it, and how it writes there.

    Args:
        documents: The replica's documents.
        may_command: Whether who wrote a command may give it.
    """

    def __init__(
        self,
        documents: DocumentSet,
        may_command: Callable[[Command], bool] = lambda command: True,
    ) -> None:
        self._documents = documents
        self.may_command = may_command

    def _view(self, name: str) -> Map | None:
        document = self._documents.find(CONTROL)
        return None if document is None or document.shared else Map(document, name)

    # Reading

    def ids(self) -> list[str]:
        """The ids of all commands."""
        return list(self._view(COMMANDS) or ())

    def find(self, id: str) -> Command | None:
        """The command *id*, if there is one and it is its author's own: the newest that its writer
        may give, else the newest."""
        found = None
        for command, agent in self._read(id):
            if command.by == agent:
                if self.may_command(command):
                    return command
                found = found or command
        return found

    def _read(self, id: str) -> Iterator[tuple[Command, str]]:
        """What there is under *id*, newest first, each with the agent that wrote it."""
        view = self._view(COMMANDS)
        for candidate in reversed(view.live(id) if view is not None else []):
            command = Command.read(id, candidate.value, candidate.stamp, candidate.writer)
            if command is not None:
                yield command, candidate.agent

    def commands(self) -> Iterator[Command]:
        """All commands."""
        found = map(self.find, self.ids())
        return (command for command in found if command is not None)

    def forged(self, id: str) -> list[tuple[int, str, str]]:
        """Who wrote what there is under *id* in the name of somebody else: (writer, its agent, the
        name)."""
        return [
            (command.writer, agent, command.by)
            for command, agent in self._read(id)
            if command.by != agent
        ]

    def answer(self, id: str, agent: str) -> Answer | None:
        """What *agent* says of a command: the first result, if it has told one."""
        view = self._view(RESULTS)
        found: Answer | None = None
        for candidate in view.live(f"{id}/{agent}") if view is not None else []:
            said = Answer.read(candidate.value) if candidate.agent == agent else None
            if said is not None and said.is_final:
                return said
            found = said or found
        return found

    def answerers(self) -> dict[str, list[str]]:
        """Of which commands there are results of whom: id -> agents."""
        found: dict[str, list[str]] = {}
        for key in self._view(RESULTS) or ():
            id, _, agent = key.partition("/")
            found.setdefault(id, []).append(agent)
        return found

    def is_settled(self, command: Command) -> bool:
        """Whether all who were expected to have answered."""
        return all(self._has_result(command.id, agent) for agent in command.expected)

    def _has_result(self, id: str, agent: str) -> bool:
        answer = self.answer(id, agent)
        return answer is not None and answer.is_final

    def is_over(self, id: str, now_ms: int) -> bool:
        """Whether nobody executes an exclusive command any more, nor will."""
        command = self.find(id)
        if command is None or command.state == "withdrawn":
            return True
        if now_ms > command.expires_ms + MARGIN_MS:
            return True
        return command.state == "going" and all(
            self._has_result(id, agent) for agent in command.executors
        )

    # Writing

    def _open(self, name: str) -> Map:
        document: Document = self._documents.system_document(CONTROL)
        return document.map(name)

    def put(self, command: Command) -> None:
        """Write a command, or what has become of it.

        Raises:
            CommandError: It is too large, or there are too many.
        """
        view = self._open(COMMANDS)
        if command.id not in view and len(view) >= COMMANDS_MAX:
            raise CommandError(
                f"{COMMANDS_MAX} commands stand in {CONTROL} already; each goes "
                "Config.command_retention after it has expired: issue fewer, or let them expire "
                "sooner (expires=)"
            )
        self._check_size(command)
        view[command.id] = command.encode()

    def _check_size(self, command: Command) -> None:
        is_own = command.verb.startswith("@")
        limit = OWN_BYTES_MAX if is_own else ARGUMENTS_BYTES_MAX
        try:
            size = len(pack(command.arguments, "arguments"))
        except UnsupportedValue as exc:
            raise CommandError(f"{command.verb}: {exc}") from exc
        if size > limit:
            raise CommandError(
                f"{command.verb}: its arguments have {size} bytes packed; at most {limit}. Write "
                "them into a document, and tell where"
            )

    def say(self, id: str, agent: str, answer: Answer) -> None:
        """Write what *agent*, whose documents these are, says of a command."""
        self._open(RESULTS)[f"{id}/{agent}"] = answer.encode()

    def remove(self, id: str, agents: Iterable[str] = ()) -> None:
        """Remove a command, and what *agents* say of it."""
        self._drop(COMMANDS, id)
        for agent in agents:
            self._drop(RESULTS, f"{id}/{agent}")

    def _drop(self, name: str, key: str) -> None:
        view = self._view(name)
        if view is not None and key in view:
            del view[key]

    # Checkpoints of the whole system

    def keep_checkpoint(self, id: str, record: dict[str, Any]) -> None:
        """Note a checkpoint of the whole system; the oldest go if there are too many."""
        view = self._open(CHECKPOINTS)
        view[id] = record
        if len(view) > SYSTEM_CHECKPOINTS_MAX:
            by_age = sorted(view, key=lambda each: max(c.stamp for c in view.live(each)))
            for old in by_age[:-SYSTEM_CHECKPOINTS_MAX]:
                del view[old]

    def kept_checkpoint(self, id: str) -> object:
        """What was noted of a checkpoint of the whole system; None without one."""
        view = self._view(CHECKPOINTS)
        return None if view is None else view.get(id)

    # Keys

    def keys_of(self, agent: str) -> list[object]:
        """What *agent* published as its public key, the newest last."""
        view = self._view(KEYS)
        found = view.live(agent) if view is not None else []
        return [candidate.value for candidate in found if candidate.agent == agent]

    def publish_key(self, agent: str, key: object) -> None:
        """Publish the public key of *agent*, whose documents these are."""
        if self.keys_of(agent)[-1:] != [key]:
            self._open(KEYS)[agent] = key

    # Cleaning

    def sweep(
        self,
        me: str,
        known: Mapping[str, bool],
        now_ms: int,
        retention_ms: int,
        awaited: Collection[str] = (),
    ) -> Iterator[tuple[str, str]]:
        """Which entries are to be removed here: (map, key), `SWEEP` of them at most.

        Each command, with its results, goes *retention_ms* after it has expired: its author sees
        to that, or if he is away the one for whom the id was drawn.

        Args:
            known: The agents that are members -> whether they are up.
            awaited: Commands that stay, because somebody waits for their results.
        """
        up = {agent for agent, is_up in known.items() if is_up} | {me}
        answerers = self.answerers()
        left = SWEEP
        for id in self.ids():
            if id in awaited or not self._is_due(id, me, up, now_ms, retention_ms):
                continue
            keys = [f"{id}/{agent}" for agent in answerers.pop(id, ())]
            if len(keys) >= left and left < SWEEP:
                return
            left -= len(keys) + 1
            yield COMMANDS, id
            yield from ((RESULTS, key) for key in keys)
        # Answers to what is not there any more: they crossed its removal.
        view = self._view(COMMANDS)
        for id, agents in answerers.items():
            for agent in agents:
                gone = view is None or id not in view
                if left > 0 and gone and _is_mine(id, agent, me, up):
                    left -= 1
                    yield RESULTS, f"{id}/{agent}"
        for agent in self._view(KEYS) or ():
            if left > 0 and agent not in known and agent != me and _is_mine(agent, agent, me, up):
                left -= 1
                yield KEYS, agent

    def _is_due(
        self, id: str, me: str, up: Collection[str], now_ms: int, retention_ms: int
    ) -> bool:
        command = self.find(id)
        if command is None:
            # Whatever it is, it is as old as it says.
            view = self._view(COMMANDS)
            found = view.live(id) if view is not None else []
            age_ms = now_ms - max((each.stamp.wall_ms for each in found), default=0)
            return age_ms > retention_ms + EXPIRY_MS_MAX and _is_mine(id, "", me, up)
        if command.by == me and command.verb in PASSING:
            return now_ms > command.expires_ms or self.is_settled(command)
        is_due = now_ms > command.expires_ms + max(retention_ms, MARGIN_MS)
        return is_due and _is_mine(id, command.by, me, up)

    def clear(self, name: str, key: str) -> None:
        """Remove an entry that `sweep` named."""
        self._drop(name, key)


def _is_mine(subject: str, owner: str, me: str, up: Collection[str]) -> bool:
    """Whether it is for *me* to remove what *owner* does not."""
    return owner == me or (owner not in up and rendezvous(subject, up) == me)
