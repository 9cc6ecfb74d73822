"""
With whom to be connected: whom to dial now, and which connections are too many.

Up to `Config.mesh_max` members, everybody is connected with everybody who can be dialled. Above,
each keeps a *view* in the manner of HyParView (Leitão et al. 2007): a few active links, some of
them to relays, and all other known members as the passive view from which lost ones are replaced.
Both views are drawn at random from the table of members (`membership`), which everybody has, so
no walks and shuffles are needed to mix them. Who cannot be dialled keeps links to two relays, or
to a few agents where there are none.

Nobody is given up: the addresses this replica was given are dialled for ever, and so, now and
then, are members that are down. Otherwise a partition would never heal.
"""

from __future__ import annotations

import math
import random
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import islice
from urllib.parse import urlsplit

from crdtstate.config import Config
from crdtstate.link import Link
from crdtstate.membership import Membership, State
from crdtstate.wire import Record

FIRST_PAUSE = 0.1
PATIENCE = 60.0
"""Seconds of failing after which pauses between attempts may become long."""

SHORT_PAUSE = 1.0
"""The longest pause before that."""

STEADY = 5.0
"""Seconds a connection lasts that was worth making."""

PRUNED_PAUSE = 30.0
DOWN_PAUSE = 60.0
"""Between two attempts to reach any member that is down, in a large mesh."""

DIALLING_MAX = 8
"""Attempts at a time, of those that nobody asked for by name."""

RELAYS = 2
"""Relays that an agent stays connected to."""

SLACK = 3
"""Links above `Config.active_links` before some are given up: not to undo what others just did."""

SHY = 0.5
"""Seconds that the lower of two writers lets the other dial first, at least."""


@dataclass(slots=True, eq=False)
class _Target:
    """An address that is dialled."""

    url: str
    is_seed: bool
    due: float
    pause: float = 0.0
    # Since when it fails, if it does.
    failing_since: float | None = None
    is_dialling: bool = False
    # Who answered there the last time.
    writer: int | None = None
    # It is this replica itself.
    is_self: bool = False
    # Whoever is there has given the connection up, having more than needed.
    is_pruned: bool = False


class Topology:
    """The links that one replica wants.

    Args:
        seeds: Addresses to stay connected to.
        address: The own one, if others can dial it.
        config: Settings.
        rng: For choices and jitter.
        now: The time.
    """

    def __init__(
        self,
        seeds: Iterable[str],
        address: str | None,
        config: Config,
        rng: random.Random,
        now: float,
    ) -> None:
        self.address = address
        self._config = config
        self._rng = rng
        self._targets = {url: _Target(url, True, now) for url in seeds}
        self._down_at = now + DOWN_PAUSE * (0.5 + rng.random())

    def __len__(self) -> int:
        return len(self._targets)

    def is_self(self, url: str) -> bool:
        """Whether this replica itself answered at an address."""
        target = self._targets.get(url)
        return target is not None and target.is_self

    def add_seed(self, url: str, now: float) -> None:
        """Stay connected to *url* from now on."""
        target = self._targets.setdefault(url, _Target(url, True, now))
        target.is_seed = True

    def remove_seed(self, url: str) -> None:
        """Treat *url* as any address that others tell."""
        if (target := self._targets.get(url)) is not None:
            target.is_seed = False

    # What became of it

    def dial_failed(self, url: str, now: float) -> None:
        """Nobody answered at an address."""
        if (target := self._targets.get(url)) is not None:
            target.is_dialling = False
            self._put_off(target, now)

    def connected(self, url: str) -> None:
        """A connection to an address stands."""
        if (target := self._targets.get(url)) is not None:
            target.is_dialling = target.is_pruned = False

    def met(self, url: str, writer: int, *, is_self: bool) -> None:
        """The other side of a dialled connection has said who it is."""
        if (target := self._targets.get(url)) is not None:
            target.writer, target.is_self = writer, is_self

    def ended(self, link: Link, now: float, *, is_pruned: bool) -> None:
        """A dialled connection has ended."""
        target = self._targets.get(link.url or "")
        if target is None:
            return
        if is_pruned:
            target.is_pruned = True
            target.due = now + PRUNED_PAUSE * (1 + self._rng.random())
        elif now - link.since >= STEADY:
            target.pause, target.failing_since = 0.0, None
            target.due = now + FIRST_PAUSE * self._rng.random()
        else:
            self._put_off(target, now)

    def _put_off(self, target: _Target, now: float) -> None:
        if target.failing_since is None:
            target.failing_since = now
        longest = self._config.reconnect_max
        if now - target.failing_since < PATIENCE:
            longest = min(longest, SHORT_PAUSE)
        target.due = now + target.pause * (0.5 + self._rng.random() / 2)
        target.pause = min(max(target.pause * 1.7, FIRST_PAUSE), longest)

    # Whom to dial

    def dial(
        self, links: Sequence[Link], members: Membership, now: float
    ) -> tuple[list[str], float]:
        """The addresses to dial now, and when to ask again."""
        self._refresh(links, members, now)
        linked = {link.writer for link in links}
        dialled = {link.url for link in links}
        open_targets = [
            target
            for target in self._targets.values()
            if not target.is_self
            and target.url not in dialled
            and (target.writer is None or target.writer not in linked)
            and not (target.is_pruned and self._can_do_without(target, links, members))
        ]
        # Who has waited longest comes first: else the same few would always be tried.
        open_targets.sort(key=lambda target: target.due)
        busy = sum(target.is_dialling for target in open_targets)
        chosen = []
        again = math.inf
        for target in open_targets:
            if target.is_dialling:
                continue
            if target.due > now:
                again = min(again, target.due)
            elif target.is_seed or busy < DIALLING_MAX:
                busy += 1
                target.is_dialling = True
                chosen.append(target.url)
        return chosen, again

    def _can_do_without(self, target: _Target, links: Sequence[Link], members: Membership) -> bool:
        """Whether to leave a seed alone that gave this side up: else all who were given the same
        seed would take turns at it for ever."""
        is_up = target.writer is not None and members.state(target.writer) == "up"
        return is_up and len(links) >= self._goal(members)

    def _goal(self, members: Membership) -> int:
        """How many links to have in a large mesh."""
        if self.address is not None:
            return self._config.active_links
        return RELAYS if members.relays else RELAYS + 1

    def _refresh(self, links: Sequence[Link], members: Membership, now: float) -> None:
        """Draw the targets that nobody asked for by name anew."""
        for target in self._targets.values():
            if target.writer is None:
                target.writer = members.writer_at(target.url)
        wanted = self._choose(links, members, now)
        dialled = {link.url for link in links}
        for url, target in list(self._targets.items()):
            # One that is being dialled is kept, to learn what becomes of it; and so is one that
            # was put off, or it would begin anew.
            is_idle = not target.is_dialling and target.due <= now and url not in dialled
            if is_idle and not target.is_seed and url not in wanted:
                del self._targets[url]
        for url, record in wanted.items():
            if (known := self._targets.get(url)) is not None:
                known.writer = known.writer or record.writer
                continue
            due = now
            if self.address is not None and members.me.writer < record.writer:
                due += SHY * (1 + self._rng.random())
            self._targets[url] = _Target(url, False, due, writer=record.writer)

    def _choose(self, links: Sequence[Link], members: Membership, now: float) -> dict[str, Record]:
        """The members to be connected to, besides those that are, by address."""
        if not self._config.discover:
            return {}
        is_small = members.count <= self._config.mesh_max
        relays = sum(1 for x in links if x.hello is not None and x.hello.role == "relay")
        missing_relays = max(0, min(RELAYS, members.relays) - relays)
        missing = self._goal(members) - len(links)
        if not is_small and missing_relays <= 0 and missing <= 0 and self._down_at > now:
            return {}
        found = self._reachable(links, members)
        if is_small:
            # Those who are down are many when most of a large mesh is on the other side of a cut.
            down = [record for record, state in found if state == "down"]
            given_up = set(self._rank_down(down)[self._config.mesh_max :])
            return {x.address or "": x for x, _ in found if x.writer not in given_up}
        self._rng.shuffle(found)
        found.sort(key=lambda each: self._rank(each[0].address or ""))
        up = [record for record, state in found if state == "up"]
        chosen = [record for record in up if record.role == "relay"][:missing_relays]
        others = (record for record in up if record.role != "relay")
        chosen += islice(others, max(0, missing - len(chosen)))
        down = [record for record, state in found if state == "down"]
        if not links:
            chosen += down[:RELAYS]
        elif self._down_at <= now:
            chosen += self._rng.sample(down, min(1, len(down)))
        if self._down_at <= now:
            self._down_at = now + DOWN_PAUSE * (0.5 + self._rng.random())
        return {record.address or "": record for record in chosen}

    def _rank_down(self, down: list[Record]) -> list[int]:
        """The writers of members that are down, those that are tried already first."""
        self._rng.shuffle(down)
        down.sort(key=lambda record: record.address not in self._targets)
        return [record.writer for record in down]

    def _rank(self, address: str) -> int:
        """Those that are tried already come first; last come those where that was in vain, or
        they would keep others from being tried."""
        target = self._targets.get(address)
        if target is None:
            return 1
        return 2 if target.is_pruned or target.failing_since is not None else 0

    def _reachable(self, links: Sequence[Link], members: Membership) -> list[tuple[Record, State]]:
        """Members that can be dialled and are not connected, retired ones excepted."""
        linked = {link.writer for link in links}
        may_local = self._may_dial_loopback()
        return [
            (record, state)
            for record, state in members.others()
            if record.address is not None
            and record.address != self.address
            and state != "retired"
            and record.writer not in linked
            and is_dialable(record.address, may_local)
        ]

    def _may_dial_loopback(self) -> bool:
        """Whether addresses on the loopback interface are of this host: only a replica that is
        on it, or has been given such an address, meets others who are."""
        if self.address is not None and is_loopback(self.address):
            return True
        return any(target.is_seed and is_loopback(url) for url, target in self._targets.items())

    # Which links are too many

    def excess(
        self, links: Sequence[Link], members: Membership, spared: Container[int], now: float
    ) -> list[Link]:
        """Links to give up now, if there are too many: none to or from who cannot be dialled,
        none that this side was given as a seed, and *spared* ones only if there are no others."""
        if members.count <= self._config.mesh_max or self.address is None:
            return []
        if members.me.role == "relay":
            # It is there to be connected to.
            return []
        between = [link for link in links if self._is_optional(link)]
        many = len(between) - self._config.active_links - SLACK
        if many <= 0:
            return []
        # Young ones are just being told of others to be connected to. A few at a time: else all
        # who were connected to a first seed would look for others at once.
        old = [link for link in between if now - link.since >= STEADY]
        free = [link for link in old if link.peer not in spared]
        return self._rng.sample(free or old, min(len(free or old), 1 + many // 4))

    def _is_optional(self, link: Link) -> bool:
        if link.hello is None or link.is_leaf or link.hello.role == "relay" or link.is_partial:
            return False
        target = self._targets.get(link.url or "")
        return target is None or not target.is_seed


def is_dialable(address: str, may_local: bool) -> bool:
    """Whether an address that a peer told may be dialled."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return False
    if parts.scheme == "unix":
        return may_local and not parts.netloc and parts.path.startswith("/")
    if parts.scheme not in ("ws", "wss", "memory") or not host or port == 0:
        return False
    # Resolvers take 127.1 and 0x7f.1 for numbers, whose meaning is better not guessed.
    last = host.removesuffix(".").rpartition(".")[2]
    if (last.isdigit() or last.startswith("0x")) and _ip(host) is None:
        return False
    return may_local or not is_loopback(address)


def is_loopback(address: str) -> bool:
    """Whether an address leads to whoever dials it."""
    host = (urlsplit(address).hostname or "").removesuffix(".")
    if host.rpartition(".")[2] == "localhost" or address.startswith(("memory:", "unix:")):
        return True
    found = _ip(host)
    if isinstance(found, IPv6Address):
        found = found.ipv4_mapped or found
    # Of the unspecified address one's own host is meant, by whoever dials it.
    return found is not None and (found.is_loopback or found.is_unspecified)


def _ip(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None
