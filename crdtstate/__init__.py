"""
crdtstate: shared state for fleets of AI agents.

Each agent embeds a `Replica`: documents of maps, counters, registers and sets that it reads and
writes locally, as plain Python, and that merge by themselves with every other agent's.

    async with Replica("agent-7", store="agent-7.db", peers=["ws://127.0.0.1:8765"]) as replica:
        plan = replica.map("plan")
        plan["goal"] = "ship it"

The map of the house, from the ground up; a module imports from its own floor and below
(``tests/test_house.py``; the reasons stand in ARCHITECTURE.md):

    floor 0  errors  clock (Dot, Version, Cut, Stamp)  values (user values as bytes)
             signing (keys, signatures)
    floor 1  guard (checks Yjs updates)  slots (what lanes say of a path)  lane  loading
             lanes (over pycrdt)
             native_guard  native (Yjs types)  native_edits  conflict (strategies)  votes
             change (Change, Snapshot)  crdts (Map, Counter, Register, Set)  document
             documents (a set of them)  digests (what they say, in a few numbers)
             certificates (who may do what)  revocations
             hiding (what all have and nobody sees)  validators  rules (what a document admits)
             quarantine (what they refused)
    floor 2  outcomes  commands (what stands in @control)  board  judging (who does what, once)
             events  config  wire (frames)  identity (who may write as whom)  link  tree
             membership  topology  mesh (whom to be connected to)  transfer  ledger (what is
             committed)  haves  wants  pending  verdicts  outgoing  serving  upkeep
             comparing  sync (the core)
             past (read-only)  history  rewrite (bringing back)  manifest (of a checkpoint)
             retention  ladder (what a replica recovers from)
    floor 3  trial (a process that may die of it)  audit (a chain of records)
             keys (of agents, pinned)  credentials (what a mesh asks for)
             authority (who invites)  transports (memory, websocket)
             stores (memory, SQLite journal)  tiers (memory, shm, sqlite, redis, s3)
    floor 4  arguments  glance (how it is doing)  observers (handlers, events)  saving (into the
             store)  connections  borrowing (a writer)  cutting (a moment)  shelf (a tier)
             catalogue  tending (of tiers)  checkpoints  announcements  casebook (what
             stands in @recovery)  recovery  recovering  adoption (of agents that died)  lookback
             keeping  resolving  waiting (what users see of these)  verbs  dispatch (of commands)
             sharing  obeying (commands)  replica (the asyncio shell)
    floor 5  reports  system  controller  blocking  relay  simulation  integrations  demo  cli

Floors 0 to 2 know no clock, socket, disk or thread: time and randomness are arguments.
"""

from crdtstate.audit import Record
from crdtstate.checkpoints import Checkpoint, Pruning, Verification
from crdtstate.clock import Cut, Dot, Stamp, Version
from crdtstate.commands import Command
from crdtstate.comparing import Comparison, Divergence, Uncompared
from crdtstate.config import Config
from crdtstate.conflict import Candidate, Conflict, Explanation, Vote, strategy
from crdtstate.consistency import Confirm, Receipt
from crdtstate.controller import Controller
from crdtstate.crdts import Counter, Map, Register, Set
from crdtstate.document import Document
from crdtstate.errors import (
    ChangeRefused,
    CheckpointFailed,
    CommandError,
    ConfirmTimeout,
    CorruptCheckpoint,
    CorruptStore,
    CRDTStateError,
    InvalidUpdate,
    LeaseRefused,
    NotAdmitted,
    NotAllowed,
    PastForgotten,
    ProtocolError,
    QuorumLost,
    ReplicaClosed,
    StoreError,
    StoreLocked,
    StoreUnavailable,
    TierError,
    TransportError,
    UnknownCheckpoint,
    UnknownStrategy,
    UnknownValidator,
    UnsupportedValue,
    UsageError,
    WaitTimeout,
)
from crdtstate.events import (
    AdoptionPassed,
    AgentRecovered,
    CatchingUp,
    Changed,
    ChangeQuarantined,
    ChangeReleased,
    CheckpointDamaged,
    CheckpointSaved,
    ClockSkew,
    CommandReceived,
    CommandSettled,
    ConflictFound,
    ConflictResolved,
    DivergenceDetected,
    DocumentRebuilt,
    EditsUndone,
    Equivocation,
    Event,
    IdentityRollback,
    KeyChanged,
    KeyRevoked,
    MemberDown,
    MemberRetired,
    MemberSuspected,
    MemberUp,
    PeerConnected,
    PeerDisconnected,
    PeerRejected,
    PresenceChanged,
    Recovered,
    RecoveryEscalated,
    SharedState,
    SnapshotReceived,
    StoreFailed,
    StoreRecovered,
    TierFailed,
    TierRecovered,
    ValidatorMissing,
)
from crdtstate.history import PastChange
from crdtstate.ladder import Attempt, Recovery
from crdtstate.limits import Limits
from crdtstate.membership import Member
from crdtstate.outcomes import Fulfilled, Rejected, Results, TimedOut
from crdtstate.past import ABSENT, Difference, Past
from crdtstate.quarantine import Quarantined
from crdtstate.replica import Peer, Replica
from crdtstate.reports import AgentReport, Report
from crdtstate.retention import Retention
from crdtstate.revocations import Revocation
from crdtstate.rewrite import Kept, Reverted
from crdtstate.rules import Quota, Use
from crdtstate.sharing import Shared
from crdtstate.system import AgentCheckpoint, SystemCheckpoint, SystemRestore
from crdtstate.validators import Proposal, Write, validator

__version__ = "0.1.0"

__all__ = [
    "ABSENT",
    "AdoptionPassed",
    "AgentCheckpoint",
    "AgentRecovered",
    "AgentReport",
    "Attempt",
    "CRDTStateError",
    "Candidate",
    "CatchingUp",
    "ChangeQuarantined",
    "ChangeRefused",
    "ChangeReleased",
    "Changed",
    "Checkpoint",
    "CheckpointDamaged",
    "CheckpointFailed",
    "CheckpointSaved",
    "ClockSkew",
    "Command",
    "CommandError",
    "CommandReceived",
    "CommandSettled",
    "Comparison",
    "Config",
    "Confirm",
    "ConfirmTimeout",
    "Conflict",
    "ConflictFound",
    "ConflictResolved",
    "Controller",
    "CorruptCheckpoint",
    "CorruptStore",
    "Counter",
    "Cut",
    "Difference",
    "Divergence",
    "DivergenceDetected",
    "Document",
    "DocumentRebuilt",
    "Dot",
    "EditsUndone",
    "Equivocation",
    "Event",
    "Explanation",
    "Fulfilled",
    "IdentityRollback",
    "InvalidUpdate",
    "Kept",
    "KeyChanged",
    "KeyRevoked",
    "LeaseRefused",
    "Limits",
    "Map",
    "Member",
    "MemberDown",
    "MemberRetired",
    "MemberSuspected",
    "MemberUp",
    "NotAdmitted",
    "NotAllowed",
    "Past",
    "PastChange",
    "PastForgotten",
    "Peer",
    "PeerConnected",
    "PeerDisconnected",
    "PeerRejected",
    "PresenceChanged",
    "Proposal",
    "ProtocolError",
    "Pruning",
    "Quarantined",
    "QuorumLost",
    "Quota",
    "Receipt",
    "Record",
    "Recovered",
    "Recovery",
    "RecoveryEscalated",
    "Register",
    "Rejected",
    "Replica",
    "ReplicaClosed",
    "Report",
    "Results",
    "Retention",
    "Reverted",
    "Revocation",
    "Set",
    "Shared",
    "SharedState",
    "SnapshotReceived",
    "Stamp",
    "StoreError",
    "StoreFailed",
    "StoreLocked",
    "StoreRecovered",
    "StoreUnavailable",
    "SystemCheckpoint",
    "SystemRestore",
    "TierError",
    "TierFailed",
    "TierRecovered",
    "TimedOut",
    "TransportError",
    "Uncompared",
    "UnknownCheckpoint",
    "UnknownStrategy",
    "UnknownValidator",
    "UnsupportedValue",
    "UsageError",
    "Use",
    "ValidatorMissing",
    "Verification",
    "Version",
    "Vote",
    "WaitTimeout",
    "Write",
    "strategy",
    "validator",
]
