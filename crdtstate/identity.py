"""
Who may write as whom: when a writer may be kept across a restart.

A dot is never used twice: two different changes under one dot make replicas differ for ever while
their versions say that they are equal. A writer's number is therefore kept only when every change
that was sent under it is certainly in the store; otherwise a new one is drawn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from crdtstate.clock import WRITER_BITS


@dataclass(frozen=True, slots=True)
class Session:
    """What the store knew of its last user when it was opened; decides who may write next.

    Attributes:
        agent: The agent's name, or None for a new store.
        writer: The writer that the last session used, or None for a new store.
        clean: The last session closed the store in order.
        same_boot: The machine has not rebooted since; what was committed is therefore here.
        same_file: The file is the one that was written, not a copy or a restored backup.
        power_safe: Every commit of the last session was fsynced before it was confirmed.
        writers: All that sessions of this very file used.
    """

    agent: str | None
    writer: int | None
    clean: bool
    same_boot: bool
    same_file: bool
    power_safe: bool
    writers: frozenset[int] = frozenset()


def draw_writer(rng: random.Random) -> int:
    """A new writer: 53 random bits, which collide once in ten million fleets of 100,000."""
    return rng.getrandbits(WRITER_BITS) or 1


def may_keep_writer(session: Session) -> bool:
    """Whether the last session's writer may go on.

    It may if the file is the one that was written (not a copy, not a backup), and nothing that was
    sent can be missing: the store was closed in order, or the machine has not rebooted since, so
    that every committed change is still there, or every commit was synced before it was sent.
    """
    if session.writer is None or not session.same_file:
        return False
    return session.clean or session.same_boot or session.power_safe
