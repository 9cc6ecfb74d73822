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
    floor 1  guard (checks Yjs updates)  slots (what lanes say of a path)  lanes (over pycrdt)
             native_guard  native (Yjs types)  native_edits  conflict (strategies)  votes
             change (Change, Snapshot)  crdts (Map, Counter, Register, Set)  document
             documents (a set of them)
    floor 2  events  config  wire (frames)  identity (who may write as whom)  link  tree
             membership  topology  mesh (whom to be connected to)  transfer  ledger (what is
             committed)  haves  wants  pending  outgoing  serving  upkeep  sync (the core)
             past (read-only)  history  rewrite (bringing back)  manifest (of a checkpoint)
             retention
    floor 3  audit (a chain of records)  transports (memory, websocket)  stores (memory, SQLite
             journal)
    floor 4  arguments  glance (how it is doing)  observers (handlers, events)  saving (into the
             store)  connections  borrowing (a writer)  cutting (a moment)  shelf (a tier)
             catalogue  tending (of tiers)  checkpoints  announcements  lookback (into the past)
             keeping  resolving  waiting (what users see of these)  replica (the asyncio shell)
    floor 5  blocking  relay  simulation  demo  cli

Floors 0 to 2 know no clock, socket, disk or thread: time and randomness are arguments.
"""

from crdtstate.audit import Record
from crdtstate.checkpoints import Checkpoint, Pruning, Verification
from crdtstate.clock import Cut, Dot, Stamp, Version
from crdtstate.config import Config
from crdtstate.conflict import Candidate, Conflict, Explanation, Vote, strategy
from crdtstate.consistency import Confirm, Receipt
from crdtstate.crdts import Counter, Map, Register, Set
from crdtstate.document import Document
from crdtstate.errors import (
    CheckpointFailed,
    ConfirmTimeout,
    CorruptCheckpoint,
    CorruptStore,
    CRDTStateError,
    InvalidUpdate,
    LeaseRefused,
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
    UnsupportedValue,
    UsageError,
    WaitTimeout,
)
from crdtstate.events import (
    CatchingUp,
    Changed,
    CheckpointDamaged,
    CheckpointSaved,
    ClockSkew,
    ConflictFound,
    ConflictResolved,
    DocumentRebuilt,
    EditsUndone,
    Event,
    IdentityRollback,
    MemberDown,
    MemberRetired,
    MemberSuspected,
    MemberUp,
    PeerConnected,
    PeerDisconnected,
    PeerRejected,
    PresenceChanged,
    SnapshotReceived,
    StoreFailed,
    StoreRecovered,
    TierFailed,
    TierRecovered,
)
from crdtstate.history import PastChange
from crdtstate.membership import Member
from crdtstate.past import ABSENT, Difference, Past
from crdtstate.replica import Peer, Replica
from crdtstate.retention import Retention
from crdtstate.rewrite import Kept, Reverted

__version__ = "0.1.0"

__all__ = [
    "ABSENT",
    "CRDTStateError",
    "Candidate",
    "CatchingUp",
    "Changed",
    "Checkpoint",
    "CheckpointDamaged",
    "CheckpointFailed",
    "CheckpointSaved",
    "ClockSkew",
    "Config",
    "Confirm",
    "ConfirmTimeout",
    "Conflict",
    "ConflictFound",
    "ConflictResolved",
    "CorruptCheckpoint",
    "CorruptStore",
    "Counter",
    "Cut",
    "Difference",
    "Document",
    "DocumentRebuilt",
    "Dot",
    "EditsUndone",
    "Event",
    "Explanation",
    "IdentityRollback",
    "InvalidUpdate",
    "Kept",
    "LeaseRefused",
    "Map",
    "Member",
    "MemberDown",
    "MemberRetired",
    "MemberSuspected",
    "MemberUp",
    "Past",
    "PastChange",
    "PastForgotten",
    "Peer",
    "PeerConnected",
    "PeerDisconnected",
    "PeerRejected",
    "PresenceChanged",
    "ProtocolError",
    "Pruning",
    "QuorumLost",
    "Receipt",
    "Record",
    "Register",
    "Replica",
    "ReplicaClosed",
    "Retention",
    "Reverted",
    "Set",
    "SnapshotReceived",
    "Stamp",
    "StoreError",
    "StoreFailed",
    "StoreLocked",
    "StoreRecovered",
    "StoreUnavailable",
    "TierError",
    "TierFailed",
    "TierRecovered",
    "TransportError",
    "UnknownCheckpoint",
    "UnknownStrategy",
    "UnsupportedValue",
    "UsageError",
    "Verification",
    "Version",
    "Vote",
    "WaitTimeout",
    "strategy",
]
