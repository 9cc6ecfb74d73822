"""
The system's own commands, as an agent executes them: tell a version, make a checkpoint, restore
one, resolve conflicts, report.

Each can be begun again after a crash: a checkpoint that carries the command's id is found and not
made again, and what was restored or resolved is not restored or resolved a second time.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from crdtstate.checkpoints import Checkpoint
from crdtstate.clock import Cut, Version
from crdtstate.commands import CHECKPOINT, CONTROL, REPORT, RESOLVE, RESTORE, VERSION, Command
from crdtstate.conflict import VOTE, Conflict, decide, resolver
from crdtstate.errors import CommandError, UsageError, WaitTimeout

if TYPE_CHECKING:
    from crdtstate.replica import Replica

TIERS_TOLD_MAX = 8
REPORT_CHARS_MAX = 300
TURN = 200
"""Conflicts after which others have their turn."""


# Versions


def version_token(home: Replica) -> str:
    """What *home* has seen, but for the commands themselves."""
    return str(Cut({name: each for name, each in home.version().items() if name != CONTROL}))


def parse(token: object) -> Cut:
    """Read a token that somebody else wrote; what is none tells of nothing."""
    try:
        return Cut.parse(token) if isinstance(token, str) and token else Cut()
    except UsageError:
        return Cut()


def join(tokens: Iterable[object]) -> Cut:
    """The version that has everything of all of these."""
    joined: dict[str, Version] = {}
    for token in tokens:
        for name, version in parse(token).items():
            joined.setdefault(name, Version()).merge(version)
    return Cut(joined)


async def version(home: Replica, command: Command) -> str:
    """What this agent has written and seen."""
    return version_token(home)


async def _reach(home: Replica, cut: str, seconds: float) -> None:
    try:
        await home.wait_for(parse(cut), timeout=seconds)
    except WaitTimeout:
        raise CommandError(
            f"lacks some of what others had written, and did not get it within {seconds:g} s"
        ) from None


# Checkpoints


def label_of(label: str, id: str) -> str:
    """How the checkpoints are labelled that belong to a command."""
    return f"{label} [{id}]".strip()


async def checkpoint(home: Replica, command: Command) -> dict[str, Any]:
    """Make a checkpoint that has everything in the cut."""
    arguments = command.arguments
    label = label_of(_get(arguments, "label", str), command.id)
    there = (each for each in home.checkpoints() if each.is_proven)
    made = next((each for each in there if each.label == label), None)
    if made is None:
        await _reach(home, _get(arguments, "cut", str), _get(arguments, "patience", float))
        made = await home.checkpoint(label)
    return describe_checkpoint(home, made)


def describe_checkpoint(home: Replica, made: Checkpoint) -> dict[str, Any]:
    """A checkpoint as a plain value."""
    manifest = home._checkpoints.find(made.id)
    return {
        "id": made.id,
        "hash": hashlib.sha256(manifest.encode()).hexdigest(),
        "version": str(made.version),
        "size": made.size,
    }


async def restore(home: Replica, command: Command) -> dict[str, Any]:
    """Restore the documents that are this agent's to restore, from its own checkpoint."""
    arguments = command.arguments
    match _get(arguments, "executors", dict).get(home.agent):
        case [str(id), list(names)]:
            pass
        case _:
            raise CommandError("the command names nothing for this agent to restore")
    await _reach(home, command.cut, _get(arguments, "patience", float))
    saved = next((each for each in home.checkpoints() if each.id == id), None)
    there = {*home.documents(), *(saved.version if saved is not None else names)}
    wanted = [name for name in names if name in there]
    changed = 0
    if wanted:
        await home._checkpoints.check_believed(id)
        told = f"restore of the system to {_get(arguments, 'checkpoint', str)}"
        run = f"restore {command.id}"
        changed = len(await home.restore(id, documents=wanted, message=told, run=run))
    now = home.version()
    # No await from the last write to the result: they are committed together.
    return {
        "version": str(Cut({name: now[name] for name in wanted if name in now})),
        "changed": changed,
    }


async def follow(home: Replica, command: Command) -> dict[str, Any]:
    """Take in what those restore who do."""
    board = home._docket.board
    waiting = set(command.executors)
    found: dict[str, Any] = {}

    def is_done() -> bool:
        for agent in list(waiting):
            answer = board.answer(command.id, agent)
            if answer is not None and answer.is_final:
                waiting.discard(agent)
                found[agent] = answer
        return not waiting

    await home._wait_until(is_done, "others to restore")
    for agent, answer in sorted(found.items()):
        if answer.state == "rejected":
            raise CommandError(f"{agent} did not restore its part: {answer.reason}")
    restored = join(_get(answer.value, "version", str) for answer in found.values())
    await home.wait_for(restored)
    await home.durable()
    return {"version": str(restored)}


# Conflicts


async def resolve(home: Replica, command: Command) -> int:
    """Resolve the conflicts that this agent is responsible for."""
    arguments = command.arguments
    strategy, documents = arguments.get("strategy"), arguments.get("documents")
    if strategy is not None:
        resolver(strategy)
    await _reach(home, _get(arguments, "cut", str), _get(arguments, "patience", float))
    resolved, failed = 0, []
    for number, found in enumerate(home.conflicts()):
        if documents is not None and found.document not in documents:
            continue
        if number % TURN == TURN - 1:
            await asyncio.sleep(0)
        if home.is_responsible(found):
            try:
                resolved += _resolve(home, found, strategy)
            except Exception as exc:
                # The user's function; or somebody has written there since.
                failed.append(f"{found.document}: {found.path}: {exc}")
    if failed:
        raise CommandError(f"resolved {resolved}, but not {len(failed)}, such as {failed[0]}")
    return resolved


def _resolve(home: Replica, found: Conflict, strategy: str | None) -> bool:
    if strategy is None:
        if found.rule == "unknown":
            # Its strategy is registered elsewhere.
            return False
        value = found.value
    elif strategy == VOTE:
        place = found.kind[0] + found.name, found.key
        value = home.polls.decide(found.document, *place, found.candidates).value
    else:
        value = decide(strategy, found.candidates).value
    home.resolve(found, value)
    return True


# Reports


async def report(home: Replica, command: Command) -> dict[str, Any]:
    """How this agent does: plain values, few and short."""
    glance, traffic = home.glance(), home.traffic
    peers, made = home.peers(), home.checkpoints()
    newest = made[-1] if made else None
    failing = {url: tier.failure for url, tier in glance.tiers.items() if tier.failure}
    return {
        "role": home.role,
        "ready": glance.is_open and glance.store_failure is None,
        "store_failure": _short(glance.store_failure),
        "tiers_failing": {
            url[:REPORT_CHARS_MAX]: _short(why)
            for url, why in list(failing.items())[:TIERS_TOLD_MAX]
        },
        "checkpoints": len(made),
        "checkpoint": None
        if newest is None
        else {"id": newest.id, "label": newest.label, "when": newest.stamp.wall_ms},
        "conflicts": home.count_conflicts(),
        "lag": max((peer.lag for peer in peers), default=0),
        "lag_seconds": max((peer.lag_seconds for peer in peers), default=0.0),
        "metrics": {
            "peers": len(peers),
            "documents": sum(1 for _ in home.documents()),
            "changes": sum(each.total for _, each in home.versions()),
            "pending": glance.pending,
            "missing": glance.missing,
            "journal_bytes": sum(glance.journal.values()),
            "disk_free": glance.disk_free,
            "bytes_in": traffic.bytes_in,
            "bytes_out": traffic.bytes_out,
            "changes_in": traffic.changes_in,
            "changes_out": traffic.changes_out,
        },
    }


def _short(text: str | None) -> str | None:
    return None if text is None else text.encode(errors="replace").decode()[:REPORT_CHARS_MAX]


def _get(arguments: Mapping[str, Any], name: str, kind: type) -> Any:
    """An argument of the right type; what comes from others need not have it."""
    found = arguments.get(name) if isinstance(arguments, Mapping) else None
    if not isinstance(found, kind):
        raise CommandError(f"{name} is a {kind.__name__}, not {found!r:.100}")
    return found


VERBS: dict[str, Callable[[Replica, Command], Coroutine[Any, Any, Any]]] = {
    VERSION: version,
    CHECKPOINT: checkpoint,
    RESTORE: restore,
    RESOLVE: resolve,
    REPORT: report,
}
