"""
What a relay answers to plain HTTP: its health, metrics, status, the digests of its documents, and
the page on which people watch all that.

Everybody is told its health, and gets the page's own files; all else who presents the token (see
`tokens`). What the page shows was written by agents, so it is text to it and nothing else: the
policy it is sent with lets no script run but its own, and nothing be loaded from elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import msgpack

from crdtstate import __version__
from crdtstate.document import Document
from crdtstate.glance import Glance
from crdtstate.relay import desks, metrics, rooms
from crdtstate.relay.browsers import Browsers, Service
from crdtstate.relay.chronicle import Chronicle
from crdtstate.relay.desks import Desks
from crdtstate.relay.guests import Guests
from crdtstate.relay.holdings import CONFLICTS_SHOWN, Holdings
from crdtstate.relay.live import VIEWERS_MAX, Live
from crdtstate.relay.rooms import Rooms
from crdtstate.replica import Replica
from crdtstate.transports import HttpAnswer, HttpRequest, HttpSocket, HttpStream

UNAVAILABLE = 503

LOCKED = HttpAnswer(
    b"It needs the token: Authorization: Bearer ... (see: crdtstate page --help)\n",
    status=401,
    headers=(("WWW-Authenticate", "Bearer"),),
)

DISK_FREE_MIN = 64 * 2**20
"""Room on the store's disk, in bytes, below which a relay wants help: what the store may have to
write at a time fits well within."""

DOCUMENTS_SHOWN = 200
"""Rows of the page's table of documents, the largest ones."""

POLICY = (
    (
        "Content-Security-Policy",
        "; ".join(
            (
                "default-src 'none'",
                "script-src 'self'",
                "style-src 'self'",
                "img-src 'self'",
                "connect-src 'self'",
                "base-uri 'none'",
                "form-action 'none'",
                "frame-ancestors 'none'",
                "require-trusted-types-for 'script'",
                "trusted-types 'none'",
            )
        ),
    ),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)

YJS, LANES = "/yjs/", "/lanes/"
"""Behind them stands a document's name."""

ASSETS = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/crdtstate.js": ("crdtstate.js", "text/javascript; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""The files of the page, in the directory of that name."""


class Site:
    """Everything that one relay answers to HTTP.

    Args:
        replica: The relay's replica; it may be opened later.
        may: Whether a token opens the pages.
        origins: Whose pages may write documents, beside its own.
    """

    def __init__(
        self, replica: Replica, may: Callable[[str], bool], origins: tuple[str, ...] = ()
    ) -> None:
        self.replica = replica
        self._may = may
        # It was told to stop, and is seeing to it.
        self.is_draining = False
        self.holdings = Holdings(replica)
        self.chronicle = Chronicle(replica)
        self.metrics = metrics.Metrics(replica, self.holdings, self.chronicle)
        self.live = Live(self._sections)
        self._browsers = Browsers(replica, may, origins)
        guests = Guests(replica)
        self._rooms = Rooms(replica, guests)
        self._desks = Desks(replica, guests)

    def end(self) -> None:
        """Send the browsers away: they come again when the relay is back."""
        self._browsers.is_closing = True
        self._rooms.end()
        self._desks.end()

    def close(self) -> None:
        """The relay ends."""
        self._rooms.close()
        self._desks.close()

    def answer(self, request: HttpRequest) -> HttpAnswer | HttpStream | HttpSocket | None:
        """Answer a GET; None if there is no such page."""
        match request.path:
            case "/healthz":
                found = self.health()
                return _json(found, 200 if found["ready"] else UNAVAILABLE)
            case "/metrics" | "/status" | "/digest" if not self._may(request.token):
                return LOCKED
            case "/metrics":
                return HttpAnswer(self._exposition(), metrics.CONTENT_TYPE)
            case "/status":
                return _json(status(self.replica))
            case "/digest":
                return _json(digests(self.replica))
            case "/live":
                if self.live.viewers >= VIEWERS_MAX:
                    return HttpAnswer(b"Too many are watching.\n", status=UNAVAILABLE)
                return HttpStream(self.live.texts, self._may)
            case path if path.startswith(YJS):
                service = Service(self._rooms.serve, rooms.MESSAGE_BYTES_MAX)
                return self._browsers.answer(request, YJS, service)
            case path if path.startswith(LANES):
                service = Service(self._desks.serve, desks.MESSAGE_BYTES_MAX)
                return self._browsers.answer(request, LANES, service)
            case path if path in ASSETS:
                name, content_type = ASSETS[path]
                body = files(__package__).joinpath("page", name).read_bytes()
                return HttpAnswer(body, content_type, headers=POLICY)
            case _:
                return None

    def health(self) -> dict[str, Any]:
        """Whether the relay does its work, and if not, why."""
        why = self._troubles(self.replica.glance())
        return {
            "ready": not why,
            "why": why,
            "agent": self.replica.agent,
            "role": self.replica.role,
            "peers": len(self.replica.peers()),
            "documents": len(list(self.replica.documents())),
        }

    def _troubles(self, glance: Glance) -> list[str]:
        if self.is_draining:
            return ["draining"]
        if glance.store_failure:
            return [f"the store fails: {glance.store_failure}"]
        if not glance.is_open:
            return ["it is closing"]
        free = glance.disk_free
        if free is not None and free < DISK_FREE_MIN:
            return [f"the disk is nearly full: {free:,} bytes are left"]
        return []

    def _exposition(self) -> bytes:
        is_ready = self.health()["ready"]
        viewers, browsers = self.live.viewers, self._browsers.counts.total()
        found = self.metrics.families(is_ready=is_ready, viewers=viewers, browsers=browsers)
        return metrics.encode(found)

    # The page

    def _sections(self) -> dict[str, Any]:
        glance = self.replica.glance()
        contested = self.holdings.contested()
        conflicts = [each for found in contested.values() for each in found.first]
        versions = dict(self.replica.versions())
        return {
            "relay": self._summary(glance, sum(version.total for version in versions.values())),
            "members": self._members(),
            "documents": {"count": len(versions), "rows": self._documents(glance.journal)},
            "conflicts": {
                "count": sum(found.count for found in contested.values()),
                "rows": conflicts[:CONFLICTS_SHOWN],
            },
            "events": self.chronicle.lines(),
        }

    def _summary(self, glance: Glance, changes: int) -> dict[str, Any]:
        traffic = self.replica.traffic
        return {
            "agent": self.replica.agent,
            "version": __version__,
            "why": self._troubles(glance),
            "unreachable": [f"{url}: {why}" for url, why in self.replica.unreachable().items()],
            "started": round(metrics.STARTED * 1000),
            "changes": changes,
            "pending": glance.pending + glance.missing,
            "bytes_in": traffic.bytes_in,
            "bytes_out": traffic.bytes_out,
        }

    def _members(self) -> list[dict[str, Any]]:
        peers = {peer.writer: peer for peer in self.replica.peers()}
        rows = []
        for member in self.replica.members():
            row: dict[str, Any] = {
                "agent": member.agent,
                # Browsers' numbers end at 53 bits, and people know writers in this form.
                "writer": f"{member.writer:x}",
                "role": member.role,
                "state": member.state,
                "address": member.address,
                "links": [f"{writer:x}" for writer in member.links],
                "self": member.is_self,
            }
            if peer := peers.get(member.writer):
                row["lag"] = peer.lag
                row["lag_seconds"] = round(peer.lag_seconds, 1)
                row["queued"] = peer.queued_bytes
            rows.append(row)
        return rows

    def _documents(self, journal: Mapping[str, int]) -> list[dict[str, Any]]:
        sizes = self.holdings.sizes()
        rows: list[dict[str, Any]] = []
        for name, version in self.replica.versions():
            size = sizes.get(name)
            row: dict[str, Any] = {
                "name": name,
                "changes": version.total,
                "journal": journal.get(name, 0),
            }
            if size is not None:
                row |= {"live": size.live, "dead": size.dead}
            rows.append(row)
        rows.sort(key=lambda row: (-(row.get("live") or 0) - row.get("dead", 0), row["name"]))
        return rows[:DOCUMENTS_SHOWN]


def _json(content: dict[str, Any], code: int = 200) -> HttpAnswer:
    return HttpAnswer(json.dumps(content).encode() + b"\n", "application/json", code)


def status(replica: Replica) -> dict[str, Any]:
    """`Replica.status` with the peers and members in full, and its version as a token."""
    return {
        **replica.status(),
        "peers": [asdict(peer) for peer in replica.peers()],
        "members": [asdict(member) for member in replica.members()],
        "version": str(replica.version()),
    }


def digests(replica: Replica) -> dict[str, Any]:
    """The replica's version as a token, and a digest of each document at that version."""
    version = str(replica.version())
    found = ((name, replica.find(name)) for name in replica.documents())
    return {"version": version, "documents": {name: digest(doc) for name, doc in found if doc}}


def digest(document: Document) -> str | None:
    """A hash of the document's content: every path with every replica's slot, conflicts included.

    Equal on replicas of equal version. None for native Yjs types, which have no canonical form.
    """
    if document.shared:
        return None
    found = hashlib.blake2b(digest_size=16)
    for path, cell in document.lanes.canonical().items():
        slots = [(writer, slot.encode()) for writer, slot in sorted(cell.items())]
        found.update(msgpack.packb([path, slots]))
    return found.hexdigest()
