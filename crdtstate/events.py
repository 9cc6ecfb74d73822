"""
What a replica tells the code around it: frozen values, handed to ``replica.on`` and
``replica.events`` after the fact. Handlers cannot alter or stop what happened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crdtstate.clock import Cut
from crdtstate.conflict import Candidate, Conflict
from crdtstate.ladder import Attempt, Recovery
from crdtstate.outcomes import Outcome


@dataclass(frozen=True, slots=True)
class Event:
    """The base of all events: subscribe to it to get every one."""


@dataclass(frozen=True, slots=True)
class Changed(Event):
    """The content at a path changed, here or elsewhere. One for each path of a change.

    Attributes:
        document: The document's name.
        kind: ``"map"``, ``"counter"``, ``"register"``, ``"set"`` or ``"native"``.
        name: The view's name.
        key: The key or element; None for counters, registers and native types.
        value: What reading gives now; None when it was removed.
        agent: Whose change it was; empty when it came with a snapshot.
        local: Whether it was this replica's own.
    """

    document: str
    kind: str
    name: str
    key: Any
    value: Any
    agent: str
    local: bool

    @property
    def path(self) -> str:
        """The place as text, such as ``plan['goal']``."""
        return self.name if self.key is None else f"{self.name}[{self.key!r}]"


@dataclass(frozen=True, slots=True)
class ConflictFound(Event):
    """Values that did not know of each other met at a path. All stay until resolved. Told again
    when the candidates change, since that is another conflict."""

    document: str
    kind: str
    name: str
    key: str
    candidates: tuple[Candidate, ...]

    @property
    def conflict(self) -> Conflict:
        """The same, without what is read now and the votes; see `Replica.conflicts` for these."""
        return Conflict(self.document, self.kind, self.name, self.key, self.candidates)


@dataclass(frozen=True, slots=True)
class ConflictResolved(Event):
    """A path that had several values has one again."""

    document: str
    kind: str
    name: str
    key: str
    value: Any
    agent: str


@dataclass(frozen=True, slots=True)
class PeerConnected(Event):
    """A connection to a peer stands, and both know who the other is."""

    agent: str
    writer: int
    role: str


@dataclass(frozen=True, slots=True)
class PeerDisconnected(Event):
    """The connection to a peer ended. If this side dialled it, it dials again."""

    agent: str
    writer: int
    reason: str


@dataclass(frozen=True, slots=True)
class PeerRejected(Event):
    """A peer sent something that breaks the rules; it was dropped, nothing changed."""

    agent: str
    reason: str


@dataclass(frozen=True, slots=True)
class MemberUp(Event):
    """A member of the mesh can be reached: it is new, or back, or was suspected wrongly."""

    agent: str
    writer: int
    role: str


@dataclass(frozen=True, slots=True)
class MemberSuspected(Event):
    """Nothing was heard of a neighbour for three heartbeats, or the connection just broke. Nobody
    is told; it takes part in the mesh as before."""

    agent: str
    writer: int
    role: str


@dataclass(frozen=True, slots=True)
class MemberDown(Event):
    """A member cannot be reached: no member that can be reached hears it. It may come back."""

    agent: str
    writer: int
    role: str


@dataclass(frozen=True, slots=True)
class MemberRetired(Event):
    """A member said goodbye, or was down for longer than `Config.retire_after`."""

    agent: str
    writer: int
    role: str


@dataclass(frozen=True, slots=True)
class PresenceChanged(Event):
    """An agent shows something else, or with *is_shown* False nothing any more; see
    `Replica.present`."""

    agent: str
    writer: int
    is_shown: bool


@dataclass(frozen=True, slots=True)
class ClockSkew(Event):
    """A peer's clock is so far ahead that it is not followed."""

    agent: str
    ahead_s: float


@dataclass(frozen=True, slots=True)
class IdentityRollback(Event):
    """Peers know changes of this writer that this replica does not: its store was rolled back or
    copied. It goes on under a new writer, and gets the missing changes from the peers."""

    writer: int
    new_writer: int
    reason: str


@dataclass(frozen=True, slots=True)
class Recovered(Event):
    """This replica was opened and has its documents back; see `Recovery`. Told once more when its
    peers were asked whether they have the same."""

    agent: str
    recovery: Recovery


@dataclass(frozen=True, slots=True)
class RecoveryEscalated(Event):
    """A replica could not get its documents back from anywhere: its store, its checkpoints, its
    peers. It goes on with the best there was, and somebody should look at it.

    Attributes:
        agent: Whose replica.
        attempts: What was tried, each with the reason why it failed.
        local: Whether it is this replica.
    """

    agent: str
    attempts: tuple[Attempt, ...]
    local: bool


@dataclass(frozen=True, slots=True)
class AgentRecovered(Event):
    """An agent that died was taken care of: what it had in its newest checkpoint that others can
    read, and had told nobody, is with everybody now. When it comes back it goes on as ever.

    Attributes:
        agent: Who died.
        by: Who took care of it.
        checkpoint: The id of that checkpoint; empty if there was none to be had.
        version: How far the agent's own changes are known: a causal token, for `Cut.parse`; empty
            if it was too long to tell.
        brought: How many changes the checkpoint had that nobody else had told.
        left: The documents of which it has changes that nobody who was up could bring: nobody takes
            part in them, or may hand out the snapshot that they are in (role ``s``), or who died
            might not.
    """

    agent: str
    by: str
    checkpoint: str
    version: str
    brought: int
    left: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdoptionPassed(Event):
    """An agent that died was to be taken care of by one that can do so in part only, which leaves
    the rest to the others: `AgentRecovered` follows.

    Attributes:
        agent: Who died.
        by: Who passes it on.
        checkpoint: The id of its checkpoint.
        left: The documents of which it has something that *by* cannot bring.
    """

    agent: str
    by: str
    checkpoint: str
    left: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DivergenceDetected(Event):
    """This replica and another have taken in the same and do not hold the same: one of them was
    damaged, or two processes wrote as one writer. Which of the two is right cannot be told from
    two; `Replica.compare` asks more. Nothing was changed. Told once for each lane and agent,
    until what differs changes.

    Attributes:
        agent: The other one, which is also who says so if it was the first to notice.
        document: Where.
        path: A place that differs, such as ``plan['goal']``; there may be more.
        writer: Whose lane it lies in; 0 in documents of native types.
    """

    agent: str
    document: str
    path: str
    writer: int


@dataclass(frozen=True, slots=True)
class ChangeQuarantined(Event):
    """A change of another does not count. The documents read as they would without it. See
    `Replica.quarantined`.

    Either the rules of its document refuse it: then all replicas have it and hide it, alike. Or it
    is not taken in here, because pycrdt does not survive it; what builds on it waits.

    Attributes:
        agent: Whose change it is; empty if that is not known.
        reason: Why it is refused, or what happened when it was tried.
        paths: The places where it would be read, such as ``plan['goal']``; of what is not taken in
            they are not known.
        is_hidden: Whether it is here, and hidden, on all replicas.
    """

    document: str
    writer: int
    seq: int
    agent: str
    reason: str
    paths: tuple[str, ...] = ()
    is_hidden: bool = False


@dataclass(frozen=True, slots=True)
class ChangeReleased(Event):
    """A change that the rules of its document refuse counts after all, on all replicas: somebody
    has released it. See `Replica.release`.

    Attributes:
        by: Who released it; empty if that came with a snapshot.
    """

    document: str
    writer: int
    seq: int
    by: str


@dataclass(frozen=True, slots=True)
class ValidatorMissing(Event):
    """A document uses a validator that is not registered in this process, so its changes wait here:
    it cannot be told which of them it admits.

    Attributes:
        validator: The name of the validator.
        reason: What to do.
    """

    document: str
    validator: str
    reason: str


@dataclass(frozen=True, slots=True)
class SnapshotReceived(Event):
    """A document was brought up to date by a snapshot instead of single changes."""

    document: str
    agent: str
    size: int


@dataclass(frozen=True, slots=True)
class CatchingUp(Event):
    """A document that lacks much is being brought up to date; for progress bars.

    Attributes:
        agent: Who sends what it lacks.
        done: How much of it is here,
        total: of how much; it grows when more is written meanwhile.
        unit: ``"changes"``, or ``"bytes"`` of a snapshot.
    """

    document: str
    agent: str
    done: int
    total: int
    unit: str


@dataclass(frozen=True, slots=True)
class DocumentRebuilt(Event):
    """The engine failed on a change that had passed all checks. The change is set aside and the
    document was rebuilt from the store."""

    document: str
    reason: str


@dataclass(frozen=True, slots=True)
class EditsUndone(Event):
    """Edits of native types could not be sent (too large, nested too deep, or of a type that is
    not supported); the document reads as before them."""

    reason: str


@dataclass(frozen=True, slots=True)
class StoreFailed(Event):
    """The store refuses writes; reads and the mesh go on, own changes wait to be saved."""

    reason: str


@dataclass(frozen=True, slots=True)
class StoreRecovered(Event):
    """The store writes again, and what waited is saved."""


@dataclass(frozen=True, slots=True)
class CheckpointSaved(Event):
    """A checkpoint was made, here or elsewhere, and verified in its agent's primary tier.

    Attributes:
        agent: Whose it is.
        id: Its id, and *label*, which is for people.
        version: A causal token of what is in it, for `Cut.parse`; empty if it was too long to tell.
        tiers: The tiers that have it; of others' those that are no private matter of their host.
            An event of another agent's comes again when more of these have it.
        local: Whether it is this replica's own.
    """

    agent: str
    id: str
    label: str
    version: str
    tiers: tuple[str, ...]
    local: bool


@dataclass(frozen=True, slots=True)
class CheckpointDamaged(Event):
    """A checkpoint, or a part of it, is not in a tier as it was written. Another tier's copy is
    used and written back, if there is a good one.

    Attributes:
        key: What is wrong in the tier.
    """

    tier: str
    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class TierFailed(Event):
    """A tier of checkpoints is gone, slow, full or lies. It is tried again, less and less often,
    and gets what it lacks when it works again.

    Attributes:
        is_primary: Whether no checkpoint can be made meanwhile.
    """

    tier: str
    reason: str
    is_primary: bool


@dataclass(frozen=True, slots=True)
class TierRecovered(Event):
    """A tier that had failed works again, and has what it should have."""

    tier: str


@dataclass(frozen=True, slots=True)
class CommandReceived(Event):
    """A command is about to be executed here."""

    id: str
    verb: str
    by: str


@dataclass(frozen=True, slots=True)
class CommandSettled(Event):
    """An agent has executed or refused a command. Told at that agent, and where the command was
    issued.

    Attributes:
        by: Who issued it.
        agent: Who was to execute it.
        outcome: `Fulfilled` or `Rejected`.
    """

    id: str
    verb: str
    by: str
    agent: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class SharedState(Event):
    """An agent has shared state with this one; see `Replica.share`. Its signature was right, and
    what it shared is stored.

    Attributes:
        agent: Who.
        name: The name of the view or document.
        version: Of which version of the document that is.
        value: The content, as plain values.
    """

    agent: str
    name: str
    version: Cut
    value: Any


@dataclass(frozen=True, slots=True)
class Equivocation(Event):
    """A writer has gone on in two ways: its agent lies, or its store was copied or restored.

    Where changes are signed this is proven to everybody, and all that the writer wrote in that
    document is hidden.

    Attributes:
        seq: Its change that does not fit; 0 if others have found it.
    """

    agent: str
    document: str
    writer: int
    seq: int


@dataclass(frozen=True, slots=True)
class KeyRevoked(Event):
    """A key is a member of the mesh no more.

    Attributes:
        key: The public key.
        reason: Why, in the words of who revoked it.
    """

    agent: str
    key: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class KeyChanged(Event):
    """An agent signs with another key than before: it lost its key, or somebody took its name.

    Attributes:
        known: The key it had, as text,
        offered: and the one that it shows now.
        is_taken: Whether it is believed: if the key before was only for one session, or a
            certificate says whose this one is. Else what it shares is refused until
            `Replica.trust` says otherwise.
    """

    agent: str
    known: str
    offered: str
    is_taken: bool
