"""
Sharing: a signed packet of state for certain agents, each of whom says what came of it.

A packet is a command with the verb ``@share``: the content of a view or document as plain values,
the version it is of, its SHA-256, and a signature over all of that, the ids and the names. Who gets
it checks hash and signature, and answers once it has stored the packet durably, and has taken in
that version itself if it takes part in the document. The command is removed once all have answered,
or when it expires; each agent keeps the last packet of each name from each sender, beside its store
in the file ``<store>.shared``.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgpack

from crdtstate import keys
from crdtstate.clock import Cut, Stamp
from crdtstate.commands import SHARE, SHARE_BYTES_MAX, SHARES_BYTES_MAX, Command
from crdtstate.config import Config
from crdtstate.crdts import Counter, Map, Register, Set, View
from crdtstate.dispatch import Dispatch, check_target, check_timeout
from crdtstate.document import Document
from crdtstate.documents import MAIN, DocumentSet
from crdtstate.errors import CommandError, CRDTStateError, StoreError, UsageError
from crdtstate.events import KeyChanged, SharedState
from crdtstate.keys import Keyring
from crdtstate.link import takes
from crdtstate.outcomes import Fulfilled, Outcome, Rejected, Results
from crdtstate.values import pack, unpack

if TYPE_CHECKING:
    from crdtstate.replica import Replica

log = logging.getLogger("crdtstate")

PURPOSE = "share/1"

PATIENCE = 60.0
"""Seconds in which an agent has to get the version that was shared by itself."""

PACKETS_MAX = 256
PACKETS_BYTES_MAX = 4 * 2**20
"""Packets that an agent keeps; the oldest go."""

VIEWS = {"map": Map, "register": Register, "counter": Counter, "set": Set}


@dataclass(frozen=True, slots=True)
class Shared:
    """What an agent has shared with this one.

    Attributes:
        agent: Who.
        name: The name of the view or document.
        document: The document.
        version: Of which version of the document it is.
        value: The content: of a map a dict, of a set a list; of a document a dict of these, by
            kind and name.
        at: When it was issued, by the clock of whoever shared it.
    """

    agent: str
    name: str
    document: str
    version: Cut
    value: Any
    at: datetime


class Sharing(DocumentSet):
    """Documents of an agent that shares; a replica opens the shelf of packets."""

    config: Config
    _packets: Packets
    _keyring: Keyring
    _subscribe: tuple[str, ...] | None

    async def share(
        self,
        what: str | View | Document,
        *,
        to: str | Iterable[str],
        timeout: float | None = 10.0,
        expires: float | None = None,
    ) -> Results:
        """Give certain agents a signed copy of a view or document, as it is now.

        Each of them gets it also if it does not take part in the document: as the event
        `SharedState`, and from `shared`. The result says of each what came of it: Fulfilled with
        the version once it has stored it durably, and has itself what it takes part in;
        Rejected, such as for a signature that is wrong, or as an agent that nobody knows;
        TimedOut, if it is away. It gets it when it comes back, until it expires.

        Args:
            what: A view or document, or the name of a view of the document "main", or of a
                document.
            to: Names of agents.
            timeout: How many seconds to wait for all of them; None: until it expires.
            expires: For how many seconds it waits for who is away; None: `Config.command_expiry`.

        Raises:
            UsageError: There is nothing of this name, or two things; or it holds native types.
            CommandError: Too much waits to be taken by others already.
            StoreError: The store does not take it, or the key cannot be read.
        """
        self._check_usable()
        self._check_settled()
        check_timeout(timeout)
        home: Replica = self  # type: ignore[assignment]
        wanted = check_target(to)
        name, kind, document = _find(self, what)
        self.seal_now(document)
        value = _content(kind, name, document)
        dispatch = Dispatch(home)
        known = dispatch.agents()
        target = [agent for agent in wanted if agent in known]
        refused: dict[str, Outcome] = {
            agent: Rejected("unknown agent: no member of the mesh has this name")
            for agent in wanted
            if agent not in known
        }
        data = pack(value, name)
        if len(data) > SHARE_BYTES_MAX:
            reason = f"too large: {len(data)} bytes packed; at most {SHARE_BYTES_MAX}"
            refused |= {agent: Rejected(reason) for agent in target}
            target = []
        seconds = self.config.command_expiry if expires is None else expires
        command = dispatch.make(SHARE, {}, target or [self.agent], seconds)
        if not target:
            return Results(command, refused)
        version = str(Cut({document.name: document.version}))
        _seal(command, document.name, name, version, data, self._keyring)
        self._check_room(dispatch, len(data))
        key: dict[str, Any] = {"key": self._keyring.public, "lasts": self._keyring.lasts}
        home._docket.board.publish_key(self.agent, key)
        found = await dispatch.ask(command, timeout)
        if home._docket.board.is_settled(command):
            dispatch.forget(command)
        outcomes = {
            agent: Fulfilled(Cut.parse(version)) if isinstance(each, Fulfilled) else each
            for agent, each in found.items()
        }
        return Results(command, {**refused, **outcomes})

    def _check_room(self, dispatch: Dispatch, size: int) -> None:
        waiting = size + sum(len(each.arguments["data"]) for each in dispatch.own(SHARE))
        if waiting > SHARES_BYTES_MAX:
            raise CommandError(
                f"what {self.agent} shares and nobody has taken yet has {waiting} bytes; at most "
                f"{SHARES_BYTES_MAX}. Share less, or let it expire sooner (expires=)"
            )

    def shared(self, name: str | None = None) -> list[Shared]:
        """What others have shared with this agent: of each name from each of them the last, the
        newest last. With *name*, only that."""
        self._check_usable()
        return [each for each in self._packets.all() if name in (None, each.name)]

    def trust(self, agent: str) -> None:
        """Believe the next key that *agent* shows, after `KeyChanged`. In a mesh with certificates
        they say whose a key is, and this is not needed. Raises StoreError."""
        self._check_usable()
        self._keyring.unpin(agent)


def _find(
    documents: DocumentSet, what: object
) -> tuple[str, Literal["map", "register", "counter", "set", "document"], Document]:
    """What is to be shared: its name, kind and document."""
    if isinstance(what, Document) or isinstance(what, View):
        document = what if isinstance(what, Document) else what._document
        if documents.find(document.name) is not document:
            raise UsageError(f"{what!r} is not of this replica")
        found = [(k, document) for k, view in VIEWS.items() if isinstance(what, view)]
        name = what.name
    elif isinstance(what, str):
        name, found = what, []
        main = documents.find(MAIN)
        if main is not None and not main.shared:
            there = main.lanes.containers
            found = [(k, main) for k, v in VIEWS.items() if v.kind + name in there]
        named = documents.find(name)
        if len(found) + (named is not None) != 1:
            how = "several things here have" if found else "nothing here has"
            raise UsageError(f"{how} the name {name!r}; give the view or document itself")
        document = named if named is not None else found[0][1]
    else:
        raise UsageError(f"share a view or document, or its name, not {what!r}")
    if document.shared:
        raise UsageError(f"{name!r} holds native Yjs types, which are no plain values")
    return name, found[0][0] if found else "document", document  # type: ignore[return-value]


def _content(kind: str, name: str, document: Document) -> Any:
    match kind:
        case "map":
            return dict(document.map(name))
        case "set":
            return [_as_value(each) for each in document.set(name)]
        case "register":
            return document.register(name).value
        case "counter":
            return document.counter(name).value
    content: dict[str, dict[str, Any]] = {}
    for container in sorted(document.lanes.containers):
        for each, view in VIEWS.items():
            if container[0] == view.kind:
                value = _content(each, container[1:], document)
                content.setdefault(each, {})[container[1:]] = value
    return content


def _as_value(element: Any) -> Any:
    return [_as_value(each) for each in element] if isinstance(element, tuple) else element


# Packets


def _signed(command: Command, arguments: dict[str, Any]) -> bytes:
    """What of a packet is signed: all of it, the data by their hash."""
    fields = [1, command.id, command.by, list(command.target), command.issued_ms]
    fields += [command.expires_ms, *(arguments[key] for key in ("document", "name", "version"))]
    packed: bytes = msgpack.packb([*fields, arguments["sha256"], len(arguments["data"])])
    return packed


def _seal(
    command: Command, document: str, name: str, version: str, data: bytes, keyring: Keyring
) -> None:
    """Put the content into the command, and sign it."""
    command.arguments.update(
        document=document,
        name=name,
        version=version,
        data=data,
        sha256=hashlib.sha256(data).digest(),
    )
    signed = keyring.sign(PURPOSE, _signed(command, command.arguments))
    command.arguments["signature"] = signed


def read(command: Command) -> Shared:
    """Read a packet whose signature was checked, or that was stored. Raises CRDTStateError."""
    match command.arguments:
        case {
            "document": str(document),
            "name": str(name),
            "version": str(version),
            "data": bytes(data),
            "sha256": bytes(digest),
            "signature": bytes(),
        }:
            if len(data) > SHARE_BYTES_MAX:
                raise CommandError(f"too large: {len(data)} bytes packed")
            if hashlib.sha256(data).digest() != digest:
                raise CommandError("its content is not what was hashed")
            cut = Cut.parse(version)
            return Shared(command.by, name, document, cut, unpack(data), command.issued)
    raise CommandError("it is no packet")


async def take(home: Replica, command: Command) -> str:
    """Take what another agent shares: check it, take part in it up to there, and store it."""
    packet = read(command)
    _check_signature(home, command)
    if takes(home._subscribe, packet.document):
        await home.wait_for(packet.version, timeout=PATIENCE)
        await home.durable()
    await home._packets.keep(command)
    home._emit(SharedState(packet.agent, packet.name, packet.version, packet.value))
    return str(packet.version)


def _check_signature(home: Replica, command: Command) -> None:
    has_certificates = home._authors.have_cards
    found = list(_certified(home, command.by) if has_certificates else _offered(home, command.by))
    if not found:
        what = "has no certificate that counts" if has_certificates else "has published no key"
        raise CommandError(f"its sender {what}")
    message, signature = _signed(command, command.arguments), command.arguments["signature"]
    right = [each for each in found if keys.verify(PURPOSE, message, signature, each[0])]
    if not right:
        raise CommandError("its signature is wrong")
    key, lasts = right[-1]
    before = home._keyring.pinned(command.by)
    if has_certificates:
        # Whatever was pinned: the mesh says whose it is.
        said: str = home._keyring.certify(command.by, key)
    else:
        said = home._keyring.pin(command.by, key, lasts=lasts)
    if said in ("replaced", "refused"):
        assert before is not None
        names = keys.show(before), keys.show(key)
        home._emit(KeyChanged(command.by, *names, said == "replaced"))
    if said == "refused":
        raise CommandError("signed with another key than its sender had before; see Replica.trust")


def _certified(home: Replica, agent: str) -> Iterator[tuple[bytes, bool]]:
    """The keys that certificates of the mesh give an agent, as far as they were shown here."""
    found = home._certificates_of(agent)
    for key in {each.key for each in found if not home._standing.is_revoked(each)}:
        yield key, True


def _offered(home: Replica, agent: str) -> Iterator[tuple[bytes, bool]]:
    """The keys that an agent says it has, and whether it keeps them."""
    for value in home._docket.board.keys_of(agent):
        match value:
            case {"key": bytes(key), "lasts": bool(lasts)} if len(key) == keys.KEY_BYTES:
                yield key, lasts


class Packets:
    """The packets that others have shared with one agent.

    Args:
        path: The file; None: memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        # (sender, document, name) -> the command, the newest last.
        self._kept: dict[tuple[str, str, str], Command] = {}
        self._is_read = path is None
        self._lock = asyncio.Lock()

    def all(self) -> list[Shared]:
        """All that are kept."""
        self._read()
        return [read(command) for command in self._kept.values()]

    async def keep(self, command: Command) -> None:
        """Keep a packet, unless there is a newer one.

        Raises:
            StoreError: It cannot be stored.
        """
        async with self._lock:
            self._read()
            place = (command.by, command.arguments["document"], command.arguments["name"])
            before = self._kept.get(place)
            if before is not None and before.stamp >= command.stamp:
                return
            kept = {key: each for key, each in self._kept.items() if key != place}
            kept[place] = replace(command, target=(), expected=())
            while len(kept) > PACKETS_MAX or _size(kept.values()) > PACKETS_BYTES_MAX:
                del kept[next(iter(kept))]
            if self._path is not None:
                data = _encode(kept.values())
                try:
                    await asyncio.to_thread(keys.write_private, self._path, data)
                except OSError as exc:
                    raise StoreError(self._path, f"a packet cannot be stored: {exc}") from exc
            self._kept = kept

    def _read(self) -> None:
        if self._is_read or self._path is None:
            return
        self._is_read = True
        try:
            data = keys.read_bounded(self._path, 2 * PACKETS_BYTES_MAX)
            for command in _decode(data):
                packet = read(command)
                self._kept[packet.agent, packet.document, packet.name] = command
        except FileNotFoundError:
            pass
        except (OSError, ValueError, CRDTStateError) as exc:
            # They are copies. What comes next is written over it.
            log.error("%s: shared packets are lost: %s", self._path, exc)


def _size(packets: Iterable[Command]) -> int:
    return sum(len(command.arguments["data"]) for command in packets)


def _encode(packets: Iterable[Command]) -> bytes:
    content = [[each.id, int(each.stamp), each.encode()] for each in packets]
    body: bytes = msgpack.packb(content)
    return hashlib.sha256(body).digest() + body


def _decode(data: bytes) -> Iterator[Command]:
    digest, body = data[:32], data[32:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("it is not what was written")
    for id, stamp, value in msgpack.unpackb(body):
        command = Command.read(id, value, Stamp(stamp))
        if command is None:
            raise ValueError("it has no packets")
        yield command
