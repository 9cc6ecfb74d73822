"""
How a replica gets its documents back: which source is tried next, and what may be taken from it.

There are three sources, in this order, and each is tried once at most:

    store       what the store has, and what the newest checkpoint has beyond it
    checkpoint  the newest checkpoint that is whole, and what can still be read of the store
    peers       nothing here: all of it comes from the others

What a source gives is only used if every hash is right, if it passes the guards that changes of
peers pass, and if the user's own check admits it. Dots decide what fits together. A dot is never
used twice (`identity`), so where own changes may be missing, another writer goes on; and what was
written under dots that were taken back later (*disowned*) must not come in again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from crdtstate.clock import SEQ_MAX, Version

Source = Literal["store", "checkpoint", "peers"]

SOURCES: tuple[Source, ...] = ("store", "checkpoint", "peers")

REASON_CHARS_MAX = 500

Versions = Mapping[str, Version]
"""The versions of documents, by name."""

Disowned = Mapping[int, Mapping[str, int] | None]
"""Writer -> document -> up to which of its changes there stand; what is above was taken back. None:
all of that writer's was."""


class Attempt(NamedTuple):
    """One try to get the documents back.

    Attributes:
        source: From where.
        reason: Why it failed, in words; empty if it did not.
    """

    source: Source
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Recovery:
    """How a replica got its documents back when it was opened.

    Attributes:
        source: From where: ``"store"``, ``"checkpoint"`` or ``"peers"``.
        attempts: What was tried, in order, with the reason of each that failed.
        is_escalated: Whether all of them failed; then it was opened with the best there was.
        seconds: How long it took.
        changes: How many changes came from where: ``"store"``, ``"checkpoint"``, and ``"journal"``,
            which is what could be read of a damaged store.
        checkpoint: The id of the checkpoint that was used, or empty.
        losses: What could not be read of a damaged store, or taken in from a checkpoint that has
            more than the store, in words; the first few.
        aside: Where the store is now that was not used, or empty.
        writer: As whom the replica wrote before, if it goes on as another; else None.
        is_checked: Whether the user's check has admitted what there is.
        agreed: The agents whose documents were compared afterwards, and are the same.
    """

    source: Source
    attempts: tuple[Attempt, ...]
    is_escalated: bool = False
    seconds: float = 0.0
    changes: Mapping[str, int] = field(default_factory=dict)
    checkpoint: str = ""
    losses: tuple[str, ...] = ()
    aside: str = ""
    writer: int | None = None
    is_checked: bool = False
    agreed: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        plain["attempts"] = [list(attempt) for attempt in self.attempts]
        plain["changes"] = dict(self.changes)
        plain["writer"] = None if self.writer is None else f"{self.writer:x}"
        return {**plain, "losses": list(self.losses), "agreed": list(self.agreed)}

    def __str__(self) -> str:
        parts = [f"{count} changes from the {where}" for where, count in self.changes.items()]
        failed = [f"{source}: {reason}" for source, reason in self.attempts if reason]
        if self.aside:
            parts.append(f"the store that was not used is now {self.aside}")
        text = f"recovered from {self.source} in {self.seconds:.2f} s"
        return "; ".join([text, *parts, *failed])


def next_source(attempts: Sequence[Attempt]) -> Source | None:
    """What to try after *attempts*; None after one that did not fail, or after all."""
    if any(not attempt.reason for attempt in attempts):
        return None
    tried = {attempt.source for attempt in attempts}
    return next((source for source in SOURCES if source not in tried), None)


def is_ahead(there: Versions, here: Versions, takes: Callable[[str], bool]) -> bool:
    """Whether *there* is something that is not *here*, in the documents that count."""
    return any(
        not version <= here.get(name, Version()) for name, version in there.items() if takes(name)
    )


def lacks_own(writer: int, there: Versions, here: Versions) -> bool:
    """Whether changes of *writer* are *there* that are not *here*."""
    return any(
        version.get(writer, 0) > here.get(name, Version()).get(writer, 0)
        for name, version in there.items()
    )


def has_disowned(versions: Versions, disowned: Disowned) -> bool:
    """Whether there are changes among *versions* that were taken back."""
    for name, version in versions.items():
        for writer in disowned.keys() & version.keys():
            kept = disowned[writer]
            if kept is None or version[writer] > kept.get(name, SEQ_MAX):
                return True
    return False


def is_fork(seq: int, stamp: int, slots: Iterable[tuple[int, int]]) -> bool:
    """Whether a checkpoint and a document that is here hold different changes of a writer under
    the same dots. Who makes a checkpoint has in it all that it wrote before, with lower stamps, and
    stamps higher what it writes afterwards. What breaks that was written by another who took
    itself for the same, out of a store that was rolled back or copied.

    Args:
        seq: Up to which of the writer's changes the checkpoint has,
        stamp: and when it was made.
        slots: What stands here of the writer: (seq, stamp).
    """
    return any((at > seq) != (when > stamp) for at, when in slots)
