"""Presence: what agents show now, until it is replaced, taken back, or over."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from harness import asynchronous
from test_replica import LOCAL, next_event, url
from test_sync import CONFIG, Node, connect, exchange, run

from crdtstate import (
    Config,
    PresenceChanged,
    Replica,
    ReplicaClosed,
    UnsupportedValue,
    UsageError,
    presence,
    wire,
)
from crdtstate.errors import ProtocolError
from crdtstate.presence import RENEW, Presence
from crdtstate.simulation import Simulation
from crdtstate.sync import Sync
from crdtstate.values import pack, unpack


def shown(writer: int, count: int, value: bytes | None = b"x", ttl: float = 10.0) -> wire.Presence:
    return wire.Presence(writer, f"agent-{writer}", count, int(ttl * 1000), value)


def seen(made: Presence, now: float) -> dict[str, bytes]:
    return {agent: value for _, agent, value in made.values(now)}


def shows(node: Node) -> dict[str, Any]:
    return {a: unpack(value) for _, a, value in node.core.presence.values(node.now)}


def show(node: Node, value: Any, ttl: float = 10.0) -> None:
    node.core.show(None if value is None else pack(value, "presence"), ttl, node.now)
    node.act()


def chain(count: int) -> list[Node]:
    nodes = [Node(number) for number in range(1, count + 1)]
    for one, two in pairwise(nodes):
        connect(one, two)
    run(*nodes, seconds=5)
    return nodes


# What one replica knows


def test_what_is_shown_ends_with_its_time_to_live() -> None:
    made = Presence(1, "me", 0)
    assert made.on_presence(shown(2, 1, b"a", ttl=10), 100.0)
    assert made.next_deadline() == 110.0

    assert seen(made, 109.9) == {"agent-2": b"a"}
    assert seen(made, 110.0) == {}
    assert made.tick(110.0) == (None, [(2, "agent-2")])
    assert made.tick(200.0) == (None, [])
    assert made.next_deadline() is None and len(made) == 0


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1), (3, 2, 1)])
def test_the_newest_wins_in_whatever_order_they_come(order: tuple[int, ...]) -> None:
    made = Presence(1, "me", 0)

    news = [made.on_presence(shown(2, count, b"%d" % count), 0.0) for count in order]

    assert seen(made, 1.0) == {"agent-2": b"3"}
    assert news == [count == max(order[: at + 1]) for at, count in enumerate(order)]


def test_the_same_twice_is_no_news() -> None:
    made = Presence(1, "me", 0)

    assert made.on_presence(shown(2, 5), 0.0)
    assert not made.on_presence(shown(2, 5), 0.0)


def test_what_was_taken_back_is_not_brought_back_by_what_is_older() -> None:
    made = Presence(1, "me", 0)
    made.on_presence(shown(2, 1), 0.0)

    assert made.on_presence(shown(2, 3, None), 1.0)
    assert not made.on_presence(shown(2, 2), 1.0)
    assert seen(made, 1.0) == {}
    assert made.tick(20.0) == (None, [])


def test_who_renews_in_time_is_shown_on() -> None:
    mine, theirs = Presence(1, "me", 0), Presence(2, "you", 0)
    now = 0.0
    theirs.on_presence(mine.show(b"a", 5.0, now), now)

    for _ in range(100):
        now = mine.next_deadline() or 0.0
        renewed, _ = mine.tick(now)
        assert renewed is not None
        theirs.tick(now)
        assert theirs.on_presence(renewed, now)
        assert seen(theirs, now) == {"me": b"a"}
    assert now == pytest.approx(100 * 5.0 * RENEW)


def test_two_renewals_may_be_lost() -> None:
    mine, theirs = Presence(1, "me", 0), Presence(2, "you", 0)
    theirs.on_presence(mine.show(b"a", 10.0, 0.0), 0.0)

    mine.tick(4.0)
    mine.tick(8.0)

    assert seen(theirs, 9.99) == {"me": b"a"}
    assert 2 * RENEW < 1


def test_a_later_process_of_the_same_writer_counts_on_above_an_earlier_one() -> None:
    theirs = Presence(2, "you", 0)
    before = Presence(1, "me", 1_700_000_000_000)
    for number in range(900):
        assert theirs.on_presence(before.show(b"%d" % number, 30.0, 0.0), 0.0)

    after = Presence(1, "me", 1_700_000_000_001)

    assert theirs.on_presence(after.show(b"anew", 30.0, 0.1), 0.1)
    assert seen(theirs, 0.2) == {"me": b"anew"}


def test_of_two_processes_of_one_name_the_newest_is_shown() -> None:
    # Without a store an agent comes back under another writer; the earlier one is not over yet.
    for order in ((0, 1), (1, 0)):
        made = Presence(9, "me", 0)
        frames = [
            Presence(2, "ann", 1_000).show(b"old", 30.0, 0.0),
            Presence(3, "ann", 2_000).show(b"new", 30.0, 0.0),
        ]
        for at in order:
            made.on_presence(frames[at], 0.0)

        assert seen(made, 1.0) == {"ann": b"new"}


def test_what_the_newest_process_took_back_does_not_uncover_an_older_one() -> None:
    made = Presence(9, "me", 0)
    made.on_presence(Presence(2, "ann", 1_000).show(b"old", 30.0, 0.0), 0.0)
    newer = Presence(3, "ann", 2_000)
    made.on_presence(newer.show(b"new", 30.0, 0.0), 0.0)

    made.on_presence(newer.show(None, 30.0, 1.0), 1.0)

    assert seen(made, 2.0) == {}


def test_what_is_older_does_not_come_back_after_what_is_newer_has_ended() -> None:
    # Somebody who was cut off still shows what was to last for an hour, and tells of it.
    mine, cut_off, other = Presence(1, "me", 0), Presence(2, "cut off", 0), Presence(3, "other", 0)
    long = mine.show(b"long", 3600.0, 0.0)
    cut_off.on_presence(long, 0.0)
    other.on_presence(long, 0.0)
    other.on_presence(mine.show(b"short", 1.0, 1.0), 1.0)
    assert other.tick(5.0) == (None, [(1, "me")])

    for frame in cut_off.all(10.0):
        assert not other.on_presence(frame, 10.0)

    assert seen(other, 10.0) == {}
    assert other.tick(3600.0) == (None, [])
    assert len(other) == 0


def test_what_was_taken_back_stays_so_as_long_as_somebody_may_still_show_it() -> None:
    mine, cut_off, other = Presence(1, "me", 0), Presence(2, "cut off", 0), Presence(3, "other", 0)
    cut_off.on_presence(mine.show(b"busy", 3600.0, 0.0), 0.0)
    other.on_presence(mine.show(None, 30.0, 1.0), 1.0)
    other.tick(100.0)

    for frame in cut_off.all(100.0):
        assert not other.on_presence(frame, 100.0)

    assert seen(other, 100.0) == {}


def test_who_was_away_when_it_was_taken_back_is_told_by_whoever_comes_first() -> None:
    mine, away, other = Presence(1, "me", 0), Presence(2, "away", 0), Presence(3, "other", 0)
    for each in (away, other):
        each.on_presence(mine.show(b"busy", 3600.0, 0.0), 0.0)
    other.on_presence(mine.show(None, 30.0, 1.0), 1.0)
    twin = Presence(4, "twin", 0)
    twin.on_presence(shown(1, 1, b"busy", 3600.0), 0.0)

    for frame in other.all(100.0):
        away.on_presence(frame, 100.0)
    for frame in mine.all(100.0):
        twin.on_presence(frame, 100.0)

    assert seen(away, 100.0) == seen(twin, 100.0) == {}
    # In the end nobody has to be told.
    assert mine.all(3700.0) == [] and other.all(3700.0) == []


def test_what_is_told_to_who_joins_late_lasts_no_longer_than_with_the_others() -> None:
    made, late = Presence(1, "me", 0), Presence(2, "late", 0)
    made.on_presence(shown(3, 1, b"a", ttl=10), 0.0)

    for frame in made.all(7.5):
        late.on_presence(frame, 50.0)

    assert seen(late, 52.49) == {"agent-3": b"a"}
    assert seen(late, 52.51) == {}


def test_own_values_that_come_back_are_none_of_others() -> None:
    made = Presence(1, "me", 0)
    frame = made.show(b"a", 10.0, 0.0)

    assert not made.on_presence(frame, 0.0)
    assert seen(made, 0.0) == {}
    assert made.own == b"a"


# Bounds


def test_how_many_values_are_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "ENTRIES_MAX", 5)
    made = Presence(1, "me", 0)
    for writer in range(2, 20):
        made.on_presence(shown(writer, 1), 0.0)
    assert len(made) == 5

    assert made.on_presence(shown(2, 2, b"newer"), 0.0)
    made.tick(10.0)
    assert made.on_presence(shown(19, 1), 10.0)


def test_what_they_add_up_to_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "BYTES_MAX", 100)
    made = Presence(1, "me", 0)
    assert made.on_presence(shown(2, 1, b"x" * 60), 0.0)
    assert not made.on_presence(shown(3, 1, b"x" * 60), 0.0)
    assert made.on_presence(shown(3, 1, b"x" * 40), 0.0)
    assert not made.on_presence(shown(3, 2, b"x" * 41), 0.0)

    assert made.on_presence(shown(2, 2, None), 0.0)
    assert made.on_presence(shown(3, 3, b"x" * 100), 0.0)
    made.tick(10.0)

    assert made.on_presence(shown(4, 1, b"x" * 100), 10.0)


def test_the_count_of_bytes_is_right_after_any_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "ENTRIES_MAX", 6)
    monkeypatch.setattr(presence, "BYTES_MAX", 200)
    for seed in range(50):
        rng = random.Random(seed)
        made, now = Presence(1, "me", 0), 0.0
        for _ in range(200):
            now += rng.random()
            match rng.randrange(4):
                case 0:
                    made.tick(now)
                case _:
                    value = None if rng.random() < 0.2 else b"x" * rng.randrange(60)
                    frame = shown(rng.randrange(2, 10), rng.randrange(50), value, rng.random() * 9)
                    made.on_presence(frame, now)
            kept = [entry.value or b"" for entry in made._shown.values()]
            assert made._bytes == sum(map(len, kept)) <= 200
            assert len(made) <= 6
        made.tick(now + 100)
        assert made._bytes == len(made) == 0


def test_a_value_of_more_than_4_kb_is_refused_by_the_wire() -> None:
    fits, too_much = (b"x" * size for size in (wire.PRESENCE_MAX, wire.PRESENCE_MAX + 1))
    assert wire.PRESENCE_MAX == 4096

    frame = wire.encode_frame(shown(2, 1, fits))
    assert wire.decode_message(wire.encode_message([frame])) == [shown(2, 1, fits)]
    frame = wire.encode_frame(shown(2, 1, too_much))
    with pytest.raises(ProtocolError):
        wire.decode_message(wire.encode_message([frame]))


# In the mesh


def test_a_value_reaches_everybody_through_others() -> None:
    nodes = chain(8)
    show(nodes[0], {"doing": "tests"})
    exchange(*nodes)

    assert all(shows(node) == {"agent-1": {"doing": "tests"}} for node in nodes[1:])
    assert nodes[7].heard(PresenceChanged) == [PresenceChanged("agent-1", 1, True)]
    assert nodes[0].heard(PresenceChanged) == []


def test_each_is_told_once() -> None:
    nodes = [Node(number) for number in range(1, 6)]
    for at, one in enumerate(nodes):
        for two in nodes[at + 1 :]:
            connect(one, two)
    run(*nodes, seconds=3)
    show(nodes[0], "here")
    exchange(*nodes)

    assert sum(len(node.frames(wire.Presence)) for node in nodes) == 4


def test_who_crashes_is_shown_no_more_after_the_time_to_live() -> None:
    nodes = chain(4)
    show(nodes[0], "here", ttl=10.0)
    run(*nodes, seconds=30)
    assert all(shows(node) == {"agent-1": "here"} for node in nodes[1:])

    for peer in list(nodes[0].links):
        nodes[0].disconnect(peer)
    run(*nodes[1:], seconds=5.9)
    assert all(shows(node) == {"agent-1": "here"} for node in nodes[1:])
    run(*nodes[1:], seconds=4.2)

    for node in nodes[1:]:
        assert shows(node) == {}
        changed = node.heard(PresenceChanged)
        assert changed[-1] == PresenceChanged("agent-1", 1, False)
        assert [event.is_shown for event in changed].count(False) == 1  # type: ignore[attr-defined]


def test_what_is_taken_back_is_gone_at_once_everywhere() -> None:
    nodes = chain(4)
    show(nodes[0], "here")
    exchange(*nodes)
    show(nodes[0], None)
    exchange(*nodes)

    for node in nodes[1:]:
        assert shows(node) == {}
        assert node.heard(PresenceChanged)[-1] == PresenceChanged("agent-1", 1, False)
    run(*nodes, seconds=60)
    assert len(nodes[3].heard(PresenceChanged)) == 2


def test_who_joins_late_hears_what_is_shown_with_the_time_that_is_left() -> None:
    nodes = chain(3)
    show(nodes[0], "here", ttl=20.0)
    exchange(*nodes)
    for peer in list(nodes[0].links):
        nodes[0].disconnect(peer)
    run(*nodes[1:], seconds=12)
    late = Node(9)
    late.now = nodes[1].now
    connect(late, nodes[2])
    run(*nodes[1:], late, seconds=1)
    assert shows(late) == {"agent-1": "here"}

    run(*nodes[1:], late, seconds=7.5)

    assert shows(late) == {}


def test_the_value_is_no_part_of_any_document() -> None:
    nodes = chain(3)
    show(nodes[0], "here")
    run(*nodes, seconds=10)

    for node in nodes:
        assert list(node.documents()) == []
        assert list(node.store.load()) == []
        assert node.persisted == 0


def test_under_a_new_writer_a_replica_goes_on_to_show_what_it_shows() -> None:
    one, two = chain(2)
    show(one, "before", ttl=30.0)
    exchange(one, two)
    one._writer = 77
    one.core.reidentified(wire.Hello(1, 1, 77, 77, "agent-1"), one.now)
    one.act()
    connect(one, two)
    run(one, two, seconds=2)
    show(one, "after", ttl=30.0)
    exchange(one, two)

    assert shows(two) == {"agent-1": "after"}
    show(one, None)
    exchange(one, two)
    assert shows(two) == {}
    assert shows(one) == {}


def test_a_new_process_of_the_same_agent_replaces_what_the_last_one_showed() -> None:
    one, two = chain(2)
    show(one, "before", ttl=3600.0)
    exchange(one, two)
    for peer in list(one.links):
        one.disconnect(peer)
    again = Node(1, session=55)
    again._wall = lambda: 1_700_000_000_500
    again.now = one.now
    again.core = Sync(again, wire.Hello(1, 1, 1, 55, "agent-1"), CONFIG, random.Random(5), one.now)
    connect(again, two)
    run(again, two, seconds=2)
    # What the last process showed ends by itself, as nobody knows what the new one thinks of it.
    assert shows(two) == {"agent-1": "before"}

    show(again, "after", ttl=5.0)
    exchange(again, two)
    assert shows(two) == {"agent-1": "after"}
    for peer in list(again.links):
        again.disconnect(peer)
    run(two, seconds=6)
    assert shows(two) == {}


def test_a_frame_of_a_hostile_peer_is_bounded_like_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "ENTRIES_MAX", 50)
    one, two = chain(2)
    there = two.core.peers[0].peer
    for number in range(500):
        two.core.receive(there, shown(1000 + number, 2**60, b"x" * 4096, 3600), two.now)
    two.act()
    exchange(one, two)

    assert len(two.core.presence) == 50
    show(one, "still here")
    exchange(one, two)
    assert two.core.next_deadline() > 0


@pytest.mark.parametrize("seed", range(3))
def test_in_a_torn_fleet_all_see_the_same_in_the_end(seed: int) -> None:
    sim = Simulation(seed, 8, relays=2, loss=0.05, config=Config(mesh_max=4))
    sim.run(3)
    for number, name in enumerate(sim.names[:6]):
        sim[name].core.show(pack(number, "presence"), 6.0, sim.now)
        sim[name]._wake()
    sim.partition({"agent-0", "agent-1", "relay-0"})
    sim.run(8)
    sim.heal()
    sim.crash("agent-5")
    sim["agent-4"].core.show(None, 6.0, sim.now)
    sim["agent-4"]._wake()
    sim.run(20)

    wanted = {f"agent-{number}": number for number in range(4)}
    for replica in sim.replicas:
        found = {a: unpack(v) for _, a, v in replica.core.presence.values(sim.now)}
        if replica.core.presence.own is not None:
            found[replica.agent] = unpack(replica.core.presence.own)
        assert found == wanted, replica.agent
    sim.end()


# Over real sockets


@asynchronous
async def test_agents_see_through_a_relay_what_others_show(tmp_path: Path) -> None:
    store = tmp_path / "relay.db"
    async with Replica("relay", store=store, listen=LOCAL, role="relay") as relay:
        async with (
            Replica("ann", peers=[url(relay)]) as ann,
            Replica("bob", peers=[url(relay)], store=tmp_path / "bob.db") as bob,
        ):
            arrived = asyncio.create_task(next_event(bob, PresenceChanged))
            await asyncio.sleep(0)
            ann.present({"doing": "unmistakable words"}, ttl=60)
            assert await arrived == PresenceChanged("ann", ann.writer, True)
            assert bob.presence() == ann.presence() == {"ann": {"doing": "unmistakable words"}}

            async with Replica("late", peers=[url(relay)]) as late:
                while "ann" not in late.presence():
                    await next_event(late, PresenceChanged)
                assert late.presence() == bob.presence()

            gone = asyncio.create_task(next_event(bob, PresenceChanged))
            await asyncio.sleep(0)
            ann.present(None)
            assert await gone == PresenceChanged("ann", ann.writer, False)
            assert bob.presence() == ann.presence() == {}
            assert list(relay.documents()) == list(bob.documents()) == []
    assert not any(map(is_in, (store, tmp_path / "bob.db")))


def is_in(path: Path) -> bool:
    """Whether the words are in a store, or in what lies beside it."""
    files = list(path.parent.glob(f"{path.name}*"))
    assert files
    return any(b"unmistakable" in file.read_bytes() for file in files)


@asynchronous
async def test_what_cannot_be_shown_is_refused_and_what_was_shown_stays() -> None:
    ann = Replica("ann")
    with pytest.raises(ReplicaClosed):
        ann.present("early")
    assert ann.presence() == {}
    async with ann:
        ann.present("here")
        with pytest.raises(UnsupportedValue, match="presence: more than 4096 bytes packed"):
            ann.present("x" * 4096)
        with pytest.raises(UnsupportedValue):
            ann.present(object())
        for ttl in (0, 0.5, 3601, -1, "9", None, float("nan")):
            with pytest.raises(UsageError, match="ttl is from 1 to 3600 seconds"):
                ann.present("there", ttl=ttl)  # type: ignore[arg-type]
        assert ann.presence() == {"ann": "here"}
        ann.present("x" * 4093)
        ann.present(False)
        assert ann.presence() == {"ann": False}
    assert ann.presence() == {}
