"""
All settings of a replica, in one frozen dataclass. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Literal

from crdtstate.errors import UsageError
from crdtstate.limits import Limits
from crdtstate.votes import VOTERS_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings. The defaults suit a fleet on a local network.

    Raises:
        UsageError: A setting is out of its range.
    """

    heartbeat: float = 1.0
    """How often peers hear from each other when there is nothing else to say."""

    link_timeout: float = 10.0
    """A connection on which nothing came for so long is closed and dialled again. At least three
    heartbeats; a shorter one mistakes a busy event loop for a dead peer."""

    seal_delay: float = 0.1
    """How long plain writes may collect in one change while the store or the event loop's thread
    is busy. Longer means fewer, larger changes; otherwise they are sealed at the end of the loop
    turn, and always before `durable`, `confirm` and all else that says what was written."""

    have_delay: float = 0.05
    """How long acknowledgements collect before they are sent."""

    have_delay_max: float = 0.25
    """The same in a mesh of more than `mesh_max` members, where they are most of the traffic."""

    want_delay: float = 0.3
    """How long to wait for a change that a peer announced before asking for it: most are on their
    way by a faster path. Above the usual round trip."""

    want_retry: float = 1.0
    """When to ask another peer for what did not come; grows with every try."""

    want_retry_max: float = 15.0

    tidy_delay: float = 1.0
    """How long slots that others wrote over stay in the own lane when no write takes them along."""

    answer_bytes: int = 256 * 1024
    """Changes sent for one request. The asker asks on, so this bounds what a slow peer costs."""

    pending_changes: int = 10_000
    """Changes that wait for others they build on. What does not fit is asked for again."""

    pending_bytes: int = 16 * 2**20

    snapshot_after_bytes: int = 4 * 2**20
    """Journaled bytes of a document after which its snapshot is renewed; bounds start-up time."""

    log_bytes: int = 64 * 2**20
    """Changes of a document that are kept although its snapshot contains them, so that peers who
    were away get the changes they lack instead of a whole snapshot."""

    outbox_bytes: int = 2**20
    """Bytes waiting for one slow peer before live changes are no longer queued for it; it then
    pulls what it lacks at its own pace."""

    outbox_bytes_total: int = 64 * 2**20
    """The same for all peers together; beyond, those with more than 64 KB waiting are slow ones."""

    unsaved_bytes: int = 64 * 2**20
    """Local changes that may wait in memory while the store refuses them. Beyond, writing raises
    StoreUnavailable."""

    skew_max: float = 60.0
    """A remote clock further ahead is not believed; see `HybridClock`."""

    reconnect_max: float = 30.0
    """The longest pause between two attempts to reach a peer; they never end. In the first minute
    it is a second, so that a partition heals soon after the network does."""

    retire_after: float = 24 * 3600.0
    """How long a member that has a store may be down before it no longer counts."""

    retire_memory_after: float = 600.0
    """The same for a member without a store, which loses all it knew when it ends."""

    voters: tuple[str, ...] = ()
    """The agents (relays, best) that decide on `Confirm.majority` and strong reads and writes,
    and that vote where the strategy of conflicts is ``"vote"``, by name. Each has a store of its
    own. The same everywhere; to change them, change one at a time. In a mesh with certificates
    those of controllers say who votes."""

    vote_deadline: float = 600.0
    """For how long after its newest candidate was written votes on a conflict count, by the
    clocks of those who voted: far more than these differ. What was not decided then is read as
    the last write. The same everywhere."""

    audit_max: int = 100_000
    """Records that the audit keeps; the oldest go."""

    audit_bytes: int = 64 * 2**20
    """About what they take at most."""

    lease_timeout: float = 5.0
    """How long opening with ``lease=True`` may take."""

    discover: bool = True
    """Also connect to members that others tell of, not only to the `peers` that were named."""

    mesh_max: int = 16
    """Members up to which everybody is connected with everybody. Above, each keeps a few links,
    and changes go along a tree."""

    active_links: int = 6
    """Links that an agent keeps in a larger mesh. Fewer survive fewer failures at once; more cost
    heartbeats."""

    leaves_max: int = 64
    """Connections that an agent takes from others that nobody can dial; relays take more."""

    links_max: int = 4096
    """Connections of any kind, of agents and relays alike."""

    events_max: int = 10_000
    """Events kept for one slow ``async for`` over `Replica.events`; the oldest go first."""

    checkpoint_interval: float = 60.0
    """How often a replica opened with ``checkpoints=`` makes one by itself, if anything changed.
    0: only when it is asked. Bounds what is lost with the journal's disk."""

    tier_timeout: float = 30.0
    """How long a tier may take for one operation before it counts as failed."""

    tier_retry: float = 1.0
    """When a tier that failed is tried again; doubles with every try."""

    tier_retry_max: float = 60.0

    compare_interval: float = 60.0
    """How often a replica compares what a document holds with one of its peers, a document at a
    time; see `DivergenceDetected`. 0: only in `Replica.compare`."""

    recover: bool = True
    """Whether a store that is damaged is replaced, from checkpoints and peers, when a replica is
    opened; see `Replica.recovery`. False: then opening raises `CorruptStore` and alters nothing."""

    check_timeout: float = 30.0
    """How long the ``check`` of a replica may take before it counts as failed."""

    adopt_after: float = 5.0
    """How long an agent has to be down before another one takes care of what it left in tiers that
    both reach. Most that are restarted are back sooner."""

    controllers: tuple[str, ...] | None = None
    """The agents whose commands are obeyed here, by name; others' are refused, and the audit says
    so. None: every member's. Names are what members say they are: this keeps mistakes away, and
    not yet who means harm."""

    command_expiry: float = 3600.0
    """For how long after it was issued a command is executed by agents that were away, unless its
    controller says otherwise."""

    command_retention: float = 24 * 3600.0
    """For how long after that a command and its results can be looked up."""

    command_grace: float = 5.0
    """How long after opening commands wait whose handlers are not registered yet. Later they are
    refused at once."""

    signing: Literal["signed", "keyed"] | None = None
    """What proves whose a change is: a signature of the member that made it, which takes a join
    token; or only that somebody made it who knows the mesh's secret, where one user owns every
    replica. None: what `Replica(mesh=)` gives, and nothing without it. The same everywhere."""

    limits: Limits = field(default_factory=Limits)
    """What those may cost who connect; see `Limits`."""

    tls_binding: bool = True
    """Whether it is part of the proof of each side which certificate the server shows. False for
    who listens behind a proxy that does the TLS, and for those who dial it."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "limits":
                if not isinstance(value, Limits):
                    raise UsageError(f"Config.limits is a crdtstate.Limits, not {value!r}")
                continue
            if each.name == "signing":
                if value not in (None, "signed", "keyed"):
                    raise UsageError(f'Config.signing is "signed", "keyed" or None, not {value!r}')
                continue
            may_be_0 = each.name in ("checkpoint_interval", "compare_interval")
            if may_be_0 and value == 0 and type(value) is not bool:
                continue
            if each.name in ("discover", "recover", "tls_binding"):
                if not isinstance(value, bool):
                    raise UsageError(f"Config.{each.name} is True or False, not {value!r}")
                continue
            if each.name == "voters":
                object.__setattr__(self, "voters", _names(each.name, value))
                continue
            if each.name == "controllers":
                if value is not None:
                    object.__setattr__(self, "controllers", _names(each.name, value))
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise UsageError(f"Config.{each.name} must be a number above 0, not {value!r}")
        if self.link_timeout < 3 * self.heartbeat:
            raise UsageError("Config.link_timeout must be at least three heartbeats")


def _names(setting: str, value: object) -> tuple[str, ...]:
    """Different names of agents, sorted."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UsageError(f"Config.{setting} is a list of agents' names, not {value!r}")
    names = list(value)
    if not all(isinstance(name, str) and 0 < len(name) <= 100 for name in names):
        raise UsageError(f"Config.{setting} is a list of agents' names, not {names!r}")
    if len(set(names)) < len(names) or len(names) > VOTERS_MAX:
        raise UsageError(f"Config.{setting} names up to {VOTERS_MAX} agents, each once: {names!r}")
    return tuple(sorted(names))
