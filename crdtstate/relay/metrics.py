"""
What a relay tells Prometheus: the text exposition format, version 0.0.4.

The format is three lines of grammar, so it is written here and not by a library. What needs care
is that agents choose their names, and documents': in a label everything is escaped that could end
it. A label never has more values than there are connections, or `DOCUMENTS_MAX` documents.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from crdtstate import __version__
from crdtstate.glance import Glance
from crdtstate.membership import State
from crdtstate.relay.chronicle import Chronicle
from crdtstate.relay.holdings import Holdings, Sizes
from crdtstate.replica import Replica

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

DOCUMENTS_MAX = 100
"""Documents with samples of their own, the largest; the others are summed under no name."""

STARTED = time.time()
"""When this module was loaded, which is when a relay's process started."""

Labels = Mapping[str, str]
Sample = tuple[Labels, float]


class Family(NamedTuple):
    """A metric with all its samples."""

    kind: Literal["gauge", "counter"]
    name: str
    help: str
    samples: Sequence[Sample]


def encode(families: Iterable[Family]) -> bytes:
    """Write *families* in the text format."""
    lines = []
    for family in families:
        lines.append(f"# HELP {family.name} {_escape(family.help)}\n")
        lines.append(f"# TYPE {family.name} {family.kind}\n")
        for labels, value in family.samples:
            pairs = ",".join(f'{name}="{_quote(text)}"' for name, text in labels.items())
            lines.append(
                f"{family.name}{{{pairs}}} {value}\n" if pairs else f"{family.name} {value}\n"
            )
    # A lone surrogate cannot be sent; nothing else is replaced.
    return "".join(lines).encode(errors="replace")


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _quote(text: str) -> str:
    return _escape(text).replace('"', '\\"')


class Metrics:
    """The metrics of one relay.

    Args:
        replica: The relay's replica.
        holdings: What its documents hold.
        chronicle: What happened.
    """

    def __init__(self, replica: Replica, holdings: Holdings, chronicle: Chronicle) -> None:
        self._replica = replica
        self._holdings = holdings
        self._chronicle = chronicle

    def families(self, *, is_ready: bool, viewers: int, browsers: int = 0) -> Iterator[Family]:
        """All metrics as they are now."""
        glance = self._replica.glance()
        yield from _of_the_process()
        yield _gauge("ready", "Whether the relay does its work (see /healthz).", int(is_ready))
        yield _gauge(
            "store_failing",
            "Whether the store refuses to write.",
            int(bool(glance.store_failure)),
        )
        yield from self._of_the_mesh()
        yield from self._of_the_traffic(glance)
        yield _gauge(
            "pending_changes", "Changes that wait for others they build on.", glance.pending
        )
        yield _gauge(
            "missing_changes",
            "Changes that peers announced and nobody sent yet.",
            glance.missing,
        )
        yield _gauge(
            "divergences",
            "Lanes that hold something else at a peer who has taken in the same.",
            glance.divergences,
        )
        yield from self._of_the_documents(glance.journal)
        yield from _of_the_checkpoints(glance)
        yield from _of_the_recovery(glance)
        yield from _of_the_file(glance)
        yield _counter(
            "events_total",
            "What happened, by the name of the event.",
            [({"event": kind}, count) for kind, count in self._chronicle.counts.items()],
        )
        yield _gauge("viewers", "Open status pages.", viewers)
        yield _gauge("browsers", "Browsers that are connected to documents.", browsers)

    def _of_the_mesh(self) -> Iterator[Family]:
        members, peers = self._replica.members(), self._replica.peers()
        roles = ("agent", "relay")
        yield _gauge(
            "members",
            "Known members of the mesh, this one included.",
            [
                (
                    {"role": role, "state": state},
                    sum((m.role, m.state) == (role, state) for m in members),
                )
                for role, state in product(roles, get_args(State))
            ],
        )
        yield _gauge(
            "peers",
            "Connected peers.",
            [({"role": role}, sum(peer.role == role for peer in peers)) for role in roles],
        )
        named = [({"agent": p.agent, "role": p.role, "writer": f"{p.writer:x}"}, p) for p in peers]
        yield _gauge(
            "peer_lag_changes",
            "Changes committed here that the peer has not acknowledged.",
            [(labels, peer.lag) for labels, peer in named],
        )
        yield _gauge(
            "peer_lag_seconds",
            "How long the oldest of these has been waiting.",
            [(labels, peer.lag_seconds) for labels, peer in named],
        )
        yield _gauge(
            "peer_outbox_bytes",
            "Bytes that wait to be sent to the peer.",
            [(labels, peer.queued_bytes) for labels, peer in named],
        )

    def _of_the_traffic(self, glance: Glance) -> Iterator[Family]:
        traffic = self._replica.traffic
        for what, received, sent in (
            ("messages", traffic.messages_in, traffic.messages_out),
            ("bytes", traffic.bytes_in, traffic.bytes_out),
        ):
            yield _counter(f"received_{what}_total", f"{what.title()} from peers.", received)
            yield _counter(f"sent_{what}_total", f"{what.title()} to peers.", sent)
        yield _counter(
            "received_changes_total", "Changes of others that were taken in.", traffic.changes_in
        )
        yield _counter(
            "quarantined_changes_total",
            "Changes of others that the rules of their documents refuse.",
            traffic.changes_hidden,
        )
        yield _counter(
            "refused_total",
            "Connections that were refused, or ended because a rule was broken, by why.",
            [({"reason": reason}, count) for reason, count in sorted(traffic.refused.items())],
        )
        yield _counter(
            "throttled_seconds_total",
            "For how long peers that sent too much were not read.",
            traffic.throttled_seconds,
        )
        yield _counter("own_changes_total", "Changes made here.", traffic.changes_out)
        yield _counter(
            "sent_changes_total", "Changes to peers, each counted for every peer.", glance.copies
        )

    def _of_the_documents(self, journal: Mapping[str, int]) -> Iterator[Family]:
        changes = {name: version.total for name, version in self._replica.versions()}
        sizes = self._holdings.sizes()
        contested = self._holdings.contested()
        yield _gauge("documents", "Documents.", len(changes))
        yield _gauge("conflicts", "Open conflicts.", sum(each.count for each in contested.values()))
        yield _counter(
            "delivered_changes_total", "Changes the documents are made of.", sum(changes.values())
        )
        shown = _largest(sizes, changes)
        yield _gauge(
            "document_changes",
            'Changes a document is made of; under "" those of all smaller documents.',
            [({"document": name}, sum(changes[each] for each in group)) for name, group in shown],
        )
        yield _gauge(
            "document_bytes",
            "Encoded size of a document: its live content, and what is dead or bookkeeping.",
            [
                (
                    {"document": name, "part": part},
                    sum(_part(sizes.get(each), part) for each in group),
                )
                for name, group in shown
                for part in ("live", "dead")
            ],
        )
        yield _gauge(
            "document_journal_bytes",
            "Changes of a document that are kept in the journal.",
            [
                ({"document": name}, sum(journal.get(each, 0) for each in group))
                for name, group in shown
            ],
        )
        yield _gauge("journal_bytes", "Changes kept in the journal.", sum(journal.values()))


def _part(sizes: Sizes | None, part: str) -> int:
    if sizes is None:
        return 0
    return (sizes.live or 0) if part == "live" else sizes.dead


def _largest(sizes: Mapping[str, Sizes], names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """The names that get samples of their own, and under an empty name, which no document has,
    all others."""

    def size(name: str) -> int:
        return _part(sizes.get(name), "live") + _part(sizes.get(name), "dead")

    ordered = sorted(names, key=lambda name: (-size(name), name))
    rest = ordered[DOCUMENTS_MAX:]
    return [(name, [name]) for name in ordered[:DOCUMENTS_MAX]] + ([("", rest)] if rest else [])


def _of_the_process() -> Iterator[Family]:
    about = {"version": __version__, "python": platform.python_version()}
    yield _gauge("build_info", "Of what the relay is made.", [(about, 1)])
    yield Family(
        "gauge", "process_start_time_seconds", "When it started, since 1970.", [({}, STARTED)]
    )
    yield Family(
        "counter",
        "process_cpu_seconds_total",
        "Processor time it took.",
        [({}, time.process_time())],
    )
    resident = _resident_bytes()
    if resident is not None:
        yield Family("gauge", "process_resident_memory_bytes", "Memory it takes.", [({}, resident)])


def _resident_bytes() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _of_the_checkpoints(glance: Glance) -> Iterator[Family]:
    if glance.checkpoint_at is not None:
        # By the wall clock, which can have been set back since.
        age = max(0.0, time.time() - glance.checkpoint_at)
        yield _gauge("checkpoint_age_seconds", "Since the newest checkpoint was made.", age)
    yield _gauge("checkpoints", "Checkpoints that can be loaded.", glance.checkpoints)
    tiers = [({"tier": url}, health) for url, health in glance.tiers.items()]
    yield _gauge(
        "tier_checkpoints",
        "Checkpoints in a tier.",
        [(labels, health.checkpoints) for labels, health in tiers],
    )
    yield _gauge(
        "tier_failing",
        "Whether a tier of checkpoints does not work.",
        [(labels, int(health.failure is not None)) for labels, health in tiers],
    )
    yield _counter(
        "tier_failures_total",
        "How often a tier of checkpoints has failed.",
        [(labels, health.failures) for labels, health in tiers],
    )


def _of_the_recovery(glance: Glance) -> Iterator[Family]:
    found = glance.recovery
    if found is not None:
        labels = {"source": found.source, "escalated": str(found.is_escalated).lower()}
        yield _gauge(
            "recovery_seconds",
            "How long it took to get the documents back when the relay started, and from where.",
            [(labels, found.seconds)],
        )


def _of_the_file(glance: Glance) -> Iterator[Family]:
    store = glance.store
    if store is None:
        return
    files = [
        ({"file": "database"}, _file_bytes(store)),
        ({"file": "wal"}, _file_bytes(f"{store}-wal")),
    ]
    yield _gauge("store_file_bytes", "Size of the store's files.", files)
    if glance.disk_free is not None:
        yield _gauge("store_free_bytes", "Room left on the store's disk.", glance.disk_free)


def _file_bytes(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _gauge(name: str, help: str, found: float | Sequence[Sample]) -> Family:
    return Family("gauge", f"crdtstate_{name}", help, _samples(found))


def _counter(name: str, help: str, found: float | Sequence[Sample]) -> Family:
    return Family("counter", f"crdtstate_{name}", help, _samples(found))


def _samples(found: float | Sequence[Sample]) -> Sequence[Sample]:
    return [({}, found)] if isinstance(found, (int, float)) else found
