"""Topology: whom to dial and when, and which links to give up."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdtstate import Config, wire
from crdtstate.events import Event
from crdtstate.link import Link
from crdtstate.membership import Membership
from crdtstate.topology import (
    DIALLING_MAX,
    DOWN_PAUSE,
    PATIENCE,
    PRUNED_PAUSE,
    RELAYS,
    SHORT_PAUSE,
    SHY,
    SLACK,
    STEADY,
    Topology,
    is_dialable,
    is_loopback,
)
from crdtstate.wire import Record

ME = 1000
CONFIG = Config()
LARGE = range(1, 40)
SMALL = range(1, 11)


def url(writer: int) -> str:
    return f"ws://host-{writer}:9000"


def at(address: str) -> int:
    """Who answers there."""
    return int(address[10:-5]) if address.startswith("ws://host-") else 5000


def record(writer: int, role: wire.Role = "agent", *, address: str | None = "") -> Record:
    name = f"{role}-{writer}"
    return Record(writer, writer, 1, name, role, address=url(writer) if address == "" else address)


class Host:
    """A replica's view of its links: what it dials stands at once, unless told otherwise."""

    def __init__(
        self,
        *records: Record,
        seeds: tuple[str, ...] = (),
        address: str | None = url(ME),
        writer: int = ME,
        seed: int = 1,
    ) -> None:
        self.now = 0.0
        self.links: list[Link] = []
        self.events: list[Event] = []
        self.rng = random.Random(seed)
        self.topology = Topology(seeds, address, CONFIG, self.rng, 0.0)
        own = record(writer, address=address)
        self.members = Membership(own, CONFIG, lambda: 1, self.events.append, 0.0)
        self.is_up: dict[int, bool] = {}
        self.learn(*records)

    def learn(self, *records: Record, up: bool = True) -> None:
        """Hear of members; all are up or down."""
        items = [(each.writer, each.order, wire.encode_record(each)) for each in records]
        self.members.on_records(items, 0)
        self.is_up.update((each.writer, up) for each in records)
        self.judge()

    def judge(self) -> None:
        reached = {writer: False for writer, is_up in self.is_up.items() if is_up}
        for at in (self.now - 10, self.now):
            self.members.update(reached, at)

    def down(self, *writers: int) -> None:
        self.is_up.update(dict.fromkeys(writers, False))
        self.judge()

    def link(self, known: Record, *, dialled: str | None = None, since: float = 0.0) -> Link:
        role, address = known.role, known.address
        hello = wire.Hello(1, 1, known.writer, known.session, known.agent, role, address)
        link = Link(len(self.links) + 1, dialled, since, since, hello)
        self.links.append(link)
        return link

    def dial(self, now: float | None = None) -> list[str]:
        self.now = self.now if now is None else now
        return self.topology.dial(self.links, self.members, self.now)[0]

    def answer(self, address: str, known: Record) -> Link:
        """Somebody answered at an address that was dialled."""
        self.topology.connected(address)
        self.topology.met(address, known.writer, is_self=False)
        return self.link(known, dialled=address, since=self.now)

    def end(self, link: Link, *, is_pruned: bool = False) -> None:
        self.links.remove(link)
        self.topology.ended(link, self.now, is_pruned=is_pruned)

    def attempts(self, until: float, answers: bool = False) -> list[tuple[float, str]]:
        """Dial whenever that is due, in vain or with success, at the heartbeat at the latest."""
        found = []
        while self.now < until:
            chosen, again = self.topology.dial(self.links, self.members, self.now)
            for address in chosen:
                found.append((self.now, address))
                if answers:
                    self.answer(address, record(at(address)))
                else:
                    self.topology.dial_failed(address, self.now)
            # As `mesh` does.
            self.now = max(min(again, self.now + CONFIG.heartbeat), self.now + 0.001)
        return found


def agents(writers: range) -> list[Record]:
    return [record(writer) for writer in writers]


# Whom to dial


def test_in_a_small_mesh_everybody_is_dialled_a_few_at_a_time() -> None:
    host = Host(*agents(range(1, CONFIG.mesh_max)))

    first = host.dial()
    for address in first:
        host.answer(address, record(at(address)))
    second = host.dial()

    assert len(first) == DIALLING_MAX
    assert sorted(first + second) == sorted(map(url, range(1, CONFIG.mesh_max)))


def test_of_two_who_can_dial_each_other_the_lower_lets_the_other_dial_first() -> None:
    host = Host(record(7), writer=5)

    at, address = host.attempts(2.0)[0]

    assert address == url(7)
    assert SHY <= at <= 2 * SHY


def test_in_a_large_mesh_as_many_links_are_made_as_are_wanted() -> None:
    host = Host(*agents(LARGE))

    host.attempts(60.0, answers=True)

    assert len(host.links) == CONFIG.active_links


def test_lost_links_are_replaced_from_the_other_members() -> None:
    host = Host(*agents(LARGE))
    host.attempts(10.0, answers=True)
    lost = host.links[0]

    host.down(lost.writer or 0)
    host.end(lost)
    host.attempts(12.0, answers=True)

    assert len(host.links) == CONFIG.active_links
    assert lost.writer not in {link.writer for link in host.links}


@pytest.mark.parametrize("seed", range(5))
def test_relays_are_preferred(seed: int) -> None:
    host = Host(*agents(LARGE), *(record(writer, "relay") for writer in (50, 51, 52)), seed=seed)

    chosen = host.dial()

    relays = [address for address in chosen if address in map(url, (50, 51, 52))]
    assert (len(relays), len(chosen)) == (RELAYS, CONFIG.active_links)


def test_relays_are_added_to_links_that_are_enough() -> None:
    host = Host(*agents(LARGE), record(50, "relay"))
    for writer in range(1, 1 + CONFIG.active_links):
        host.link(record(writer))

    assert host.dial() == [url(50)]


def test_a_relay_that_is_down_is_not_made_up_for_by_ever_more_agents() -> None:
    host = Host(*agents(LARGE), record(50, "relay"), record(51, "relay"))
    host.down(51)

    host.attempts(30.0, answers=True)

    assert len([link for link in host.links if link.writer != 51]) == CONFIG.active_links


def test_who_cannot_be_dialled_keeps_links_to_two_relays_and_to_no_agents() -> None:
    relays = [record(writer, "relay") for writer in (50, 51, 52)]
    host = Host(*agents(LARGE), *relays, address=None)

    chosen = host.dial()

    assert len(chosen) == RELAYS
    assert set(chosen) <= {url(50), url(51), url(52)}


def test_who_cannot_be_dialled_keeps_links_to_a_few_agents_where_there_are_no_relays() -> None:
    host = Host(*agents(LARGE), address=None)

    host.attempts(10.0, answers=True)

    assert len(host.links) == RELAYS + 1


def test_neither_oneself_nor_who_is_connected_retired_or_cannot_be_dialled_is_dialled() -> None:
    leaf, twin = record(4, address=None), record(5, address=url(ME))
    host = Host(record(2), record(3), leaf, twin, replace(record(6), is_gone=True))
    host.link(record(2))

    assert host.dial() == [url(3)]


def test_who_answered_at_an_address_is_not_dialled_while_it_is_connected_otherwise() -> None:
    host = Host(record(2), seeds=("ws://entrance",))
    host.dial()
    link = host.answer("ws://entrance", record(3))
    host.end(link)
    host.link(record(3))
    host.link(record(2))

    assert host.attempts(100.0) == []


def test_oneself_is_dialled_once() -> None:
    host = Host(seeds=("ws://entrance",))
    assert host.dial() == ["ws://entrance"]

    host.topology.met("ws://entrance", ME, is_self=True)
    host.topology.dial_failed("ws://entrance", 0.0)

    assert host.topology.is_self("ws://entrance")
    assert host.attempts(100.0) == []


# Which addresses


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host-2",
        "http://host-2",
        "file:///etc/passwd",
        "ws://",
        "ws:///path",
        "ws://[::1",
        "ws://host-2:port",
        "ws://host-2:99999",
        "memory://",
        "unix://",
        "unix://host/mesh.sock",
        "ws://127.1:80",
        "ws://2130706433",
        "ws://0x7f.1",
    ],
)
def test_junk_is_never_dialled(address: str) -> None:
    assert not is_dialable(address, may_local=True)


LOOPBACK = [
    "ws://localhost:9000",
    "ws://LocalHost.",
    "wss://me.localhost/x",
    "ws://127.0.0.1",
    "ws://127.9.9.9:1",
    "ws://[::1]:9000",
    "ws://[::ffff:127.0.0.1]:9000",
    "ws://0.0.0.0:9000",
    "ws://[::]",
    "memory://agent-1",
    "unix:///run/user/1000/mesh.sock",
]


@pytest.mark.parametrize("address", LOOPBACK)
def test_addresses_of_whoever_dials_them_are_told_from_others(address: str) -> None:
    assert is_loopback(address)
    assert is_dialable(address, may_local=True)
    assert not is_dialable(address, may_local=False)


@pytest.mark.parametrize(
    "address",
    [
        "ws://10.0.0.1",
        "wss://4f2a",
        "ws://[fe80::1]:9",
        "ws://localhost.example.com",
        "wss://10.0.0.1:9#sha256=" + 64 * "0",
    ],
)
def test_other_addresses_may_be_dialled_by_all(address: str) -> None:
    assert is_dialable(address, may_local=False)


@pytest.mark.parametrize(
    ("own", "seeds", "dials"),
    [
        (url(ME), (), False),
        (None, (url(9),), False),
        ("ws://127.0.0.1:1", (), True),
        (None, ("ws://localhost:1",), True),
    ],
)
def test_loopback_is_dialled_only_by_who_is_on_it(
    own: str | None, seeds: tuple[str, ...], dials: bool
) -> None:
    host = Host(record(2, address="ws://127.0.0.1:2"), address=own, seeds=seeds)

    assert ("ws://127.0.0.1:2" in host.dial()) == dials


# When to dial again


@pytest.mark.parametrize("seed", range(3))
def test_attempts_are_frequent_for_a_minute_rarer_afterwards_and_never_end(seed: int) -> None:
    host = Host(seeds=("ws://entrance",), seed=seed)

    times = [at for at, _ in host.attempts(3600.0)]

    pauses = [later - at for at, later in zip(times, times[1:], strict=False)]
    early = [pause for at, pause in zip(times, pauses, strict=False) if at < PATIENCE]
    late = [pause for at, pause in zip(times, pauses, strict=False) if at > 4 * PATIENCE]
    assert max(early) <= SHORT_PAUSE + 0.001
    assert 50 < len(early) < 150
    assert CONFIG.reconnect_max / 2 <= min(late) < max(late) <= CONFIG.reconnect_max + 0.001
    assert len({round(pause, 2) for pause in late}) > len(late) / 4, "no jitter"
    assert times[-1] > 3600 - 2 * CONFIG.reconnect_max


def test_after_a_lasting_connection_attempts_are_frequent_again() -> None:
    host = Host(seeds=("ws://entrance",))
    host.attempts(600.0)
    while not host.dial():
        host.now += 0.1
    link = host.answer("ws://entrance", record(2))

    host.now += STEADY
    host.end(link)

    assert host.attempts(host.now + 1)


def test_a_connection_that_ends_at_once_counts_as_an_attempt_in_vain() -> None:
    host = Host(seeds=("ws://entrance",))
    times = []
    while host.now < 300:
        if host.dial():
            times.append(host.now)
            host.end(host.answer("ws://entrance", record(2)))
        host.now += 0.1

    assert 50 < len(times) < 150
    assert times[-1] - times[-2] > 10


@pytest.mark.parametrize("seed", range(3))
def test_who_gave_up_a_link_is_left_alone_for_a_while(seed: int) -> None:
    host = Host(seeds=("ws://entrance",), seed=seed)
    host.dial()
    link = host.answer("ws://entrance", record(2))

    host.now = 100.0
    host.end(link, is_pruned=True)

    at, _ = host.attempts(300.0)[0]
    assert PRUNED_PAUSE <= at - 100.0 <= 2 * PRUNED_PAUSE + CONFIG.heartbeat


def test_a_seed_that_gave_up_a_link_is_needed_only_with_too_few_links_or_when_it_was_down() -> None:
    """Else all who were given one seed would be connected to it in turns for ever."""
    host = Host(*agents(LARGE), seeds=(url(1),))
    host.attempts(STEADY, answers=True)
    host.end(next(link for link in host.links if link.writer == 1), is_pruned=True)
    host.attempts(host.now + 1, answers=True)
    assert len(host.links) == CONFIG.active_links

    alone = [address for _, address in host.attempts(host.now + 600)]
    host.down(1)
    after = [address for _, address in host.attempts(host.now + 60)]

    assert alone == []
    assert url(1) in after


def test_members_that_cannot_be_reached_do_not_keep_others_from_being_tried() -> None:
    """Up as they are, by what others say, but for example behind another router."""
    host = Host(*agents(LARGE))
    reachable = {url(writer) for writer in (3, 17)}

    tried = {address for _, address in host.attempts(30.0)}

    assert reachable <= tried


def test_members_that_are_down_are_dialled_now_and_then() -> None:
    host = Host(*agents(LARGE))
    host.attempts(10.0, answers=True)
    linked = {link.writer for link in host.links}
    lost = next(writer for writer in LARGE if writer not in linked)
    host.down(lost)

    found = host.attempts(10.0 + 20 * DOWN_PAUSE)

    assert {address for _, address in found} == {url(lost)}
    # More than once each time it is its turn, as with any address that does not answer.
    assert 10 <= len(found) <= 60


def test_who_has_no_links_at_all_dials_also_members_that_are_down() -> None:
    host = Host(*agents(LARGE))
    host.down(*LARGE)

    found = {address for _, address in host.attempts(60.0)}

    assert len(found) > 10


def test_seeds_are_dialled_however_many_others_are() -> None:
    seeds = tuple(f"ws://entrance-{number}" for number in range(20))
    host = Host(*agents(SMALL), seeds=seeds)

    assert set(seeds) <= set(host.dial())


def test_what_is_being_dialled_is_not_dialled_once_more() -> None:
    host = Host(*agents(SMALL), seeds=("ws://entrance",))

    first = host.dial()

    assert not set(host.dial(50.0)) & set(first)


def test_a_seed_that_is_added_is_dialled_also_if_it_is_known_as_a_member() -> None:
    host = Host(*agents(SMALL))
    host.dial()

    host.topology.add_seed(url(1), 0.0)
    host.topology.add_seed("ws://entrance", 0.0)

    assert "ws://entrance" in host.dial()


def test_addresses_are_forgotten_with_the_members_that_had_them() -> None:
    host = Host(seeds=("ws://entrance",), seed=3)
    sizes = []

    for turn in range(300):
        first = 1 + 20 * turn
        host.members = Membership(record(ME), CONFIG, lambda: 1, host.events.append, 0.0)
        host.is_up = {}
        host.learn(*agents(range(first, first + (40 if turn % 2 else 10))))
        if turn % 3 == 0:
            host.down(*list(host.is_up)[::2])
        host.attempts(host.now + 3.0, answers=turn % 5 == 0)
        if turn % 7 == 0:
            for link in list(host.links):
                host.end(link, is_pruned=turn % 2 == 0)
        sizes.append(len(host.topology))

    assert max(sizes) < 150
    for link in list(host.links):
        host.end(link)
    host.members = Membership(record(ME), CONFIG, lambda: 1, host.events.append, 0.0)
    host.attempts(host.now + 4 * PRUNED_PAUSE)
    assert len(host.topology) == 1


# Which links are too many


def crowd(host: Host, links: int) -> None:
    for writer in range(1, 1 + links):
        host.link(record(writer))


def excess(host: Host, now: float = 100.0) -> list[Link]:
    return host.topology.excess(host.links, host.members, set(), now)


def test_a_few_links_too_many_are_kept() -> None:
    host = Host(*agents(LARGE))
    crowd(host, CONFIG.active_links + SLACK)

    assert excess(host) == []


def test_links_that_are_too_many_are_given_up_a_few_at_a_time_and_not_too_far() -> None:
    host = Host(*agents(LARGE))
    crowd(host, 30)

    given_up = []
    while found := excess(host):
        given_up.append(len(found))
        for link in found:
            host.links.remove(link)

    assert max(given_up) <= 6
    assert CONFIG.active_links <= len(host.links) <= CONFIG.active_links + SLACK


def test_in_a_small_mesh_no_link_is_too_many() -> None:
    host = Host(*agents(range(1, CONFIG.mesh_max)))
    crowd(host, CONFIG.mesh_max - 1)

    assert excess(host) == []


def test_young_links_are_not_given_up() -> None:
    host = Host(*agents(LARGE))
    crowd(host, 30)

    assert excess(host, STEADY - 0.1) == []


def test_seeds_relays_leaves_and_those_with_few_documents_are_not_given_up() -> None:
    host = Host(*agents(LARGE), seeds=tuple(map(url, range(1, 11))))
    for writer in range(1, 11):
        host.link(record(writer), dialled=url(writer))
        host.link(record(100 + writer, "relay"))
        host.link(record(200 + writer, address=None))
        partial = host.link(record(300 + writer))
        assert partial.hello is not None
        partial.hello = replace(partial.hello, documents=("plan",))

    assert excess(host) == []


def test_who_cannot_be_dialled_gives_up_nothing() -> None:
    host = Host(*agents(LARGE), address=None)
    crowd(host, 30)

    assert excess(host) == []


# Whatever happens


OPERATIONS = st.sampled_from(
    ["dial", "fail", "answer", "end", "prune", "down", "up", "wait", "long", "incoming", "self"]
)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([3, 14, 40]),
    operations=st.lists(OPERATIONS, max_size=80),
)
def test_whatever_happens_nobody_is_dialled_twice_or_needlessly(
    seed: int, size: int, operations: list[str]
) -> None:
    rng = random.Random(seed)
    writers = range(1, size)
    seeds = ("ws://entrance", url(1))
    host = Host(*agents(writers), seeds=seeds, seed=seed)
    dialling: set[str] = set()

    for operation in operations:
        match operation:
            case "dial":
                linked = {link.writer for link in host.links}
                urls = {link.url for link in host.links}
                for address in host.dial():
                    assert address not in dialling and address not in urls
                    assert address != url(ME) and not host.topology.is_self(address)
                    if address != "ws://entrance":
                        assert at(address) not in linked
                    dialling.add(address)
            case "fail" if dialling:
                host.topology.dial_failed(dialling_one(dialling, rng), host.now)
            case "answer" if dialling:
                address = dialling_one(dialling, rng)
                writer = 1 if address == "ws://entrance" else at(address)
                link = host.answer(address, record(writer))
                if [each.writer for each in host.links].count(writer) > 1:
                    host.end(link)
            case "end" | "prune" if host.links:
                host.end(rng.choice(host.links), is_pruned=operation == "prune")
            case "down" | "up":
                host.learn(record(rng.choice(writers)), up=operation == "up")
            case "incoming":
                writer = rng.choice(writers)
                if writer not in {link.writer for link in host.links}:
                    host.link(record(writer), since=host.now)
            case "self" if "ws://entrance" in dialling:
                dialling.discard("ws://entrance")
                host.topology.connected("ws://entrance")
                host.topology.met("ws://entrance", ME, is_self=True)
            case "wait" | "long":
                host.now += rng.random() * (1 if operation == "wait" else 100)
        assert len(host.topology) <= size + len(seeds)


def dialling_one(dialling: set[str], rng: random.Random) -> str:
    address = rng.choice(sorted(dialling))
    dialling.discard(address)
    return address
