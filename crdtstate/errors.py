"""
Every error crdtstate raises, named for the situation, and the state it leaves behind.

    CRDTStateError
    ├── UsageError              the caller's mistake; nothing changed
    │   ├── UnsupportedValue    a value, key or name that cannot be shared
    │   ├── UnknownStrategy     a conflict names a strategy this process has not registered
    │   ├── UnknownValidator    a document uses a validator this process has not registered
    │   ├── ChangeRefused       the rules of the document refuse what was written
    │   ├── UnknownCheckpoint   there is none with this id, or it was not kept
    │   ├── CommandError        a command that cannot be issued, or that nobody knows
    │   ├── NotAllowed          the certificate does not grant it
    │   └── ReplicaClosed       the replica was closed or not opened yet
    ├── ProtocolError           a peer's mistake; its message was dropped, our state is untouched
    │   ├── InvalidCertificate  a certificate or join token that proves nothing
    │   ├── InvalidRevocation   a revocation that nobody signed who may
    │   ├── TooLarge            something compressed that was not unpacked
    │   ├── NotAdmitted         a handshake in which somebody proved nothing; nothing was told
    │   └── InvalidUpdate       a change or snapshot that breaks the rules of lanes
    ├── TransportError          a connection could not be made or broke; it is dialled again
    ├── StoreError              the disk's; what was durable stays durable
    │   ├── StoreLocked         another process has the store open
    │   ├── StoreUnavailable    the store refuses writes; reads and the mesh go on
    │   ├── CorruptStore        a stored row or page fails its checksum; nothing was altered
    │   ├── TierError           a tier of checkpoints is gone, slow, full or refuses
    │   ├── CorruptCheckpoint   a checkpoint is not what was written; nothing was altered
    │   └── CheckpointFailed    no checkpoint was made; those there are stay
    ├── PastForgotten           neither journal nor checkpoint lead there; nothing changed
    ├── LeaseRefused            no relay lent a writer; nothing was opened
    ├── QuorumLost              too few voters answered; a read had no effect, a write may have
    └── WaitTimeout             what was waited for has not happened yet; it still may
        └── ConfirmTimeout      too few replicas said that they have it; more may

Foreign exceptions are translated into these where they enter. Errors carry their facts
as attributes and end with what to do, where that is known.
"""

from __future__ import annotations

from collections.abc import Mapping


class CRDTStateError(Exception):
    """The root of all errors raised by crdtstate."""


class UsageError(CRDTStateError):
    """The caller asked for something that cannot be; nothing changed."""


class UnsupportedValue(UsageError):
    """A value (or key, or name) that cannot be replicated; nothing changed.

    Attributes:
        where: The path of the offending part, such as ``plan['goal'][2]``.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason


class UnknownStrategy(UsageError):
    """A strategy's name that nobody registered in this process; nothing changed."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(
            f"unknown strategy {name!r}; known here: {', '.join(known)}. "
            f"Register it with @crdtstate.strategy({name!r}) before reading."
        )
        self.name = name


class UnknownValidator(UsageError):
    """A document uses a validator that nobody registered in this process, so it cannot be told
    here which changes it admits. Nothing changed; changes of others wait.

    Attributes:
        name: The validator,
        document: and which document uses it.
    """

    def __init__(self, name: str, document: str, known: list[str]) -> None:
        super().__init__(
            f"{document!r} uses the validator {name!r}, which is unknown here; known are: "
            f"{', '.join(known) or 'none'}. Register it with @crdtstate.validator({name!r}) "
            "before the replica is opened"
        )
        self.name, self.document = name, document


class ChangeRefused(UsageError):
    """The rules of the document refuse what was written: a validator, or its quota. Nothing of it
    was written; inside a transaction, nothing of that.

    Attributes:
        document: The document.
        reason: Why, beginning with the validator's name, or ``"quota"``.
    """

    def __init__(self, document: str, reason: str) -> None:
        super().__init__(f"{document!r} does not admit this: {reason}")
        self.document, self.reason = document, reason


class ReplicaClosed(UsageError):
    """The replica is not open; nothing changed. Use it inside ``async with Replica(...)``."""


class ProtocolError(CRDTStateError):
    """A peer broke the protocol; its message was dropped and our state is untouched."""


class InvalidUpdate(ProtocolError):
    """Update bytes that are malformed or break the rules of lanes; nothing was applied."""


class Unproven(InvalidUpdate):
    """A change that is not provably its writer's, or that its writer may not make; nothing was
    applied."""


class Forked(InvalidUpdate):
    """A change that does not follow the one before it that is here: its writer has gone on in two
    ways. Nothing was applied."""


class InvalidCertificate(ProtocolError):
    """A certificate or join token that is malformed, of another mesh, or signed by nobody who may;
    it was not believed."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the certificate is not valid: {reason}")
        self.reason = reason


class InvalidRevocation(ProtocolError):
    """A revocation that is malformed, or that neither the root nor a controller has signed; it
    revokes nothing."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the revocation is not valid: {reason}")
        self.reason = reason


class TooLarge(ProtocolError):
    """Something compressed that would take more room than it may; it was not unpacked."""


class NotAdmitted(ProtocolError):
    """The other side did not prove that it is of this mesh; nothing was said to it."""


class TransportError(CRDTStateError):
    """A connection could not be made or broke; nothing is lost, it is dialled again."""


class StoreError(CRDTStateError):
    """The store failed; whatever it confirmed as durable is still there.

    Attributes:
        path: The store's file.
    """

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason


class StoreLocked(StoreError):
    """Another process has the store open; this one touched nothing."""


class StoreUnavailable(StoreError):
    """The store refuses writes (disk full, read-only, I/O error); reads and the mesh go on."""


class CorruptStore(StoreError):
    """Stored data fails its checksum or is not ours; nothing was altered."""


class TierError(StoreError):
    """A tier of checkpoints is gone, slow, full or refuses; what it held before is still there.

    Attributes:
        path: The tier's URL, without a password.
    """


class CorruptCheckpoint(StoreError):
    """A checkpoint, or a part of it, is not what was written; nothing was altered.

    Attributes:
        path: The tier's URL.
        key: What is wrong in it.
    """

    def __init__(self, tier: str, key: str, reason: str) -> None:
        super().__init__(tier, f"{key}: {reason}")
        self.key = key


class CheckpointFailed(StoreError):
    """No checkpoint was made; those that there are stay as they were.

    Attributes:
        path: The URL of the primary tier.
    """


class UnknownCheckpoint(UsageError):
    """No checkpoint has this id, or it was not kept; see `Replica.checkpoints`."""

    def __init__(self, id: object) -> None:
        super().__init__(f"there is no checkpoint {str(id)[:80]!r}; see replica.checkpoints()")
        self.id = id


class CommandError(UsageError):
    """A command that cannot be issued (a bad verb, too large, by who is no controller), or that
    nobody knows (any more); nothing changed."""


class NotAllowed(UsageError):
    """The agent's certificate does not grant this; nothing changed.

    Attributes:
        agent: Who.
        role: What it may not do: ``"r"`` read, ``"w"`` write, ``"s"`` hand out snapshots, ``"c"``
            control, ``"f"`` forward.
        document: The document.
    """

    def __init__(self, agent: str, role: str, document: str, *, is_expired: bool = False) -> None:
        names = {"r": "read", "w": "write", "s": "hand out snapshots of", "f": "forward"}
        what = "control the mesh" if role == "c" else f"{names[role]} {document!r}"
        how = "--controller" if role == "c" else f"'{document}:{role}' among its --roles"
        why = "its certificate has expired" if is_expired else "its certificate does not grant it"
        more = "" if is_expired else f" with {how}"
        super().__init__(
            f"{agent!r} may not {what}: {why}. Whoever keeps the root key can renew it{more}"
        )
        self.agent, self.role, self.document = agent, role, document


class WaitTimeout(CRDTStateError, TimeoutError):
    """What was waited for has not happened yet; nothing was undone and it still may happen."""


class PastForgotten(CRDTStateError):
    """A point in the past that nothing leads to any more: the journal has forgotten the changes,
    and no checkpoint is near. Nothing changed. A checkpoint keeps what it was made of.

    Attributes:
        document: The document that cannot be had.
        oldest: The oldest version of it that can.
    """

    def __init__(self, document: str, oldest: Mapping[int, int]) -> None:
        changes = sum(oldest.values())
        super().__init__(
            f"{document!r} cannot be looked at there any more: the journal has forgotten the "
            f"changes, and no checkpoint leads there. The oldest that can be had is after "
            f"{changes} changes: {oldest!r}. What will be wanted later, keep with "
            "replica.checkpoint()"
        )
        self.document, self.oldest = document, oldest


class LeaseRefused(CRDTStateError):
    """No relay among the peers lent a writer; the replica was not opened."""


class ConfirmTimeout(WaitTimeout):
    """Too few replicas have said in time that they have what was written. It is not undone, and
    will usually get there: the outcome is unknown, not bad.

    Attributes:
        got: The agents that have it.
        missing: The voters that have not said so; empty without voters.
        unknown: Always True.
    """

    unknown = True

    def __init__(
        self, got: tuple[str, ...], missing: tuple[str, ...], needed: int, seconds: float | None
    ) -> None:
        who = ", ".join(got) or "nobody"
        lacking = f"; not heard of {', '.join(missing)}" if missing else ""
        super().__init__(
            f"confirmed by {who} within {seconds} s, {needed} are needed{lacking}. "
            "What was written stays, and may still get there"
        )
        self.got, self.missing = got, missing


class QuorumLost(CRDTStateError, TimeoutError):
    """Less than a majority of the voters answered in time.

    Attributes:
        missing: The voters that did not answer.
        unknown: Whether a write may have taken effect, now or later. If False, nothing happened.
    """

    def __init__(
        self, missing: tuple[str, ...], voters: int, seconds: float | None, *, is_unknown: bool
    ) -> None:
        outcome = "it may have been written" if is_unknown else "nothing was written"
        who = (
            f"; not heard of {', '.join(missing)}" if missing else "; could not catch up with them"
        )
        super().__init__(f"no majority of {voters} voters within {seconds} s{who}: {outcome}")
        self.missing = missing
        self.unknown = is_unknown
