"""
Limits: how much anybody may cost this process, and how a connection ends that goes beyond.

Those of connections are settings, here; a breach has a close code, a reason, a count in the metrics
and never a loss: what was not taken in is asked for again.

Bounds of what is sent are constants where they are checked, as all replicas must agree on them:

    wire       messages, frames, names, versions, tables of members; what zstd may unpack
    change     a change and a snapshot: header, deps, names, what zstd may unpack
    guard      an update of lanes: structs, clients, depth, keys, values
    native_guard   an update of native types
    certificates   certificates and join tokens; `handshake` its messages
    config     what waits (`pending_*`, `outbox_*`, `unsaved_bytes`), connections (`links_max`),
               the audit, events, commands
    transfer   snapshots under way; `serving` what a peer may ask for at a time
    transports.websocket   headers, times to open and to close, what waits to be read
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

from crdtstate.errors import UsageError


class CloseCode(IntEnum):
    """Why a connection is closed, beyond what RFC 6455 has numbers for. What peers with each other
    agree on (too many links, a goodbye) is a frame, `wire.Bye`, and not here."""

    BAD_FRAME = 4400
    """A message that is none, or rules that were broken again and again."""
    NOT_ADMITTED = 4401
    """The handshake failed; all failures look alike."""
    FORBIDDEN = 4403
    """The document is not of this kind, or this relay may not write it."""
    TIMEOUT = 4408
    """The handshake took too long."""
    DUPLICATE = 4409
    """This key has newer connections, as many as it may have."""
    TOO_LARGE = 4413
    """Something compressed that would take more room than it may. (A message that is larger than
    any is 1009, of strangers above 4 KiB.)"""
    INVALID = 4422
    """What a browser wrote cannot be taken in; the reason says why."""
    RATE = 4429
    """This key has come under too many names of writers lately; or a browser tells too much."""
    REVOKED = 4430
    """The certificate was revoked, or has expired meanwhile."""
    BANNED = 4431
    """Too much went wrong with this key; the reason says for how long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits for what comes from outside. Times are in seconds, sizes in bytes.

    An *address* is an IPv4 address, or the 64 bits of an IPv6 address that one site has.

    Raises:
        UsageError: A limit is out of its range.
    """

    handshake_timeout: float = 5.0
    """From a connection's first byte until it is known who is there. Then it is closed (4408)."""

    half_open: int = 64
    """Connections of which that is not known yet, those that have not finished TLS among them. More
    are answered 503."""

    half_open_per_address: int = 8
    """The same for one address."""

    handshake_failures: int = 5
    """Handshakes of one address that may fail within a minute; then it is banned, as those who
    break rules are: 429 for `ban_time`."""

    spare_loopback: bool = True
    """Whether connections on the loopback interface have no limits by address and rate, as those
    over ``unix://`` have none: they are one's own. False if others work on this machine, or if a
    proxy on it lets everybody in."""

    connections_per_key: int = 8
    """Connections of one certificate's key. A new one closes the oldest (4409)."""

    writers_per_hour: int = 600
    """Writers under which one certificate's key may come within an hour (4429). An agent without a
    store is a new one each time it is opened, and so is a command."""

    frames_per_second: float = 5_000
    """Frames that a peer may send for long. Beyond, it is read more slowly, so it has to wait;
    nothing is dropped."""

    frames_burst: int = 20_000
    """Frames that it may send at once, after a while of silence."""

    bytes_per_second: float = 16 * 2**20
    """The same in bytes: for long,"""

    bytes_burst: int = 64 * 2**20
    """and at once."""

    browsers: int = 256
    """Browsers that are connected to the documents of a relay; more are answered 503,"""

    browsers_per_document: int = 128
    """and to one document."""

    browser_frames_per_second: float = 200
    """Messages that a browser may send for long. Beyond, it is read more slowly."""

    browser_frames_burst: int = 2_000
    """Messages that it may send at once, after a while of silence."""

    awareness_per_second: float = 50
    """How often a browser may show where its cursor is, and so on, for long;"""

    awareness_burst: int = 500
    """and at once. Beyond, it is closed (4429)."""

    awareness_bytes: int = 4096
    """What it may show; more is not shown."""

    ban_score: float = 100
    """What an address or key has to be blamed for to be banned. What weighs how much stands in
    `bans.Offence`."""

    ban_decay: float = 10
    """How much of that is forgotten in a minute."""

    ban_time: float = 60.0
    """How long the first ban lasts. Each further one lasts twice as long,"""

    ban_time_max: float = 3600.0
    """up to this;"""

    ban_memory: float = 24 * 3600.0
    """after so long without offence it begins anew."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "spare_loopback":
                if not isinstance(value, bool):
                    raise UsageError(f"Limits.{field.name} is True or False, not {value!r}")
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise UsageError(f"Limits.{field.name} must be a number above 0, not {value!r}")
