"""Leases: writers that relays lend, so that many short-lived agents leave few traces."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import asynchronous, join
from test_replica import LOCAL, url
from test_sync import CONFIG, Node, connect, exchange, run

from crdtstate import Changed, Config, LeaseRefused, Replica, UsageError, leases, wire
from crdtstate.change import decode_change
from crdtstate.clock import Dot
from crdtstate.document import Document
from crdtstate.leases import FREE_MAX, Leases
from crdtstate.sync import Sync
from crdtstate.transports import Connection, listen
from crdtstate.transports.memory import MemoryConnection
from crdtstate.wire import decode_message, encode_frame, encode_message

WRITERS_MAX = 64
"""Client ids in a document that ten thousand agents wrote to, eight at a time."""

QUICK = Config(have_delay=0.002, want_delay=0.05, lease_timeout=20.0)


def lender() -> Leases:
    return Leases(random.Random(7))


class Relay(Node):
    """A relay's core."""

    def __init__(self, writer: int = 1000, config: Config = CONFIG) -> None:
        super().__init__(writer, config)
        hello = wire.Hello(1, 1, writer, writer, self.agent, "relay")
        self.core = Sync(self, hello, self.config, random.Random(writer), 0.0)

    @property
    def lent(self) -> int:
        assert self.core.leases is not None
        return self.core.leases.lent

    @property
    def free(self) -> int:
        assert self.core.leases is not None
        return self.core.leases.free


def borrow(relay: Relay) -> wire.Lend:
    """What a relay answers to somebody who asks for a writer."""
    visitor = Node(999_999)
    hello = wire.Hello(1, 1, 999_999, random.getrandbits(64), "visitor", documents=())
    visitor.core = Sync(visitor, hello, relay.config, random.Random(1), relay.now)
    visitor.now = relay.now
    here, _ = connect(visitor, relay)
    exchange(visitor, relay)
    number = visitor.links[here][1]
    relay.core.receive(number, wire.Borrow(), relay.now)
    relay.act()
    (lend,) = [frame for peer, frame in relay.sent if peer == number and type(frame) is wire.Lend]
    visitor.disconnect(here)
    assert isinstance(lend, wire.Lend)
    return lend


def borrower(relay: Relay, session: int, **options: Any) -> tuple[Node, wire.Lend]:
    """A node that writes under a borrowed writer and is connected with the relay."""
    lend = borrow(relay)
    node = Node(lend.writer, session=session)
    if options:
        hello = wire.Hello(1, 1, lend.writer, session, node.agent, **options)
        node.core = Sync(node, hello, node.config, random.Random(session), 0.0)
    node.now = relay.now
    node.core.borrow(1000, lend.seqs)
    connect(node, relay)
    return node, lend


# What a relay keeps


def test_a_writer_that_comes_back_in_order_is_lent_again() -> None:
    made = lender()
    writer = made.lend()

    assert made.take_back(writer, {"main": 3}, {"main": 3})
    assert made.lend() == writer
    assert (made.lent, made.free) == (1, 0)


def test_writers_that_are_lent_at_the_same_time_differ() -> None:
    made = lender()

    assert len({made.lend() for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("written", "committed"),
    [
        ({"main": 3}, {"main": 2}),
        ({"main": 3}, {"main": 4}),
        ({"main": 3}, {}),
        ({"main": 3, "tasks": 1}, {"main": 3}),
        ({"main": 3}, {"main": 3, "tasks": 1}),
        ({}, {"main": 3}),
    ],
)
def test_a_return_that_does_not_match_is_refused(
    written: dict[str, int], committed: dict[str, int]
) -> None:
    made = lender()
    writer = made.lend()

    assert not made.take_back(writer, written, committed)
    assert made.lend() != writer
    assert made.lent == 2


def test_what_was_not_lent_is_not_taken() -> None:
    made = lender()
    writer = made.lend()
    assert not made.take_back(12345, {}, {})
    assert made.take_back(writer, {}, {})

    assert not made.take_back(writer, {}, {})
    assert made.free == 1


def test_what_was_lent_and_what_is_free_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "FREE_MAX", 10)
    monkeypatch.setattr(leases, "LENT_MAX", 30)
    made = lender()
    lent = [made.lend() for _ in range(50)]
    assert made.lent == 30
    # The oldest were forgotten, which is as if they had not been handed back.
    assert not made.take_back(lent[0], {}, {})

    assert sum(made.take_back(writer, {}, {}) for writer in lent) == 10
    assert (made.free, made.lent) == (10, 20)
    assert FREE_MAX >= 10_000


# Cores


def test_who_borrows_is_told_what_was_written_under_the_writer() -> None:
    relay = Relay()
    first, lend = borrower(relay, 1)
    assert lend.seqs == {}
    run(first, relay, seconds=1)
    assert first.core.has_borrowed_all()
    first.map("plan")["a"] = 1
    first.document("tasks").map("open")["b"] = 2
    run(first, relay, seconds=1)
    assert first.core.give_back()
    exchange(first, relay)
    assert (relay.lent, relay.free) == (0, 1)

    again = borrow(relay)

    assert again == wire.Lend(lend.writer, {"main": 1, "tasks": 1})


def test_a_borrower_may_not_write_before_it_has_everything() -> None:
    relay = Relay()
    first, _ = borrower(relay, 1)
    run(first, relay, seconds=1)
    for number in range(5):
        first.map("plan")[str(number)] = number
        first.act()
    run(first, relay, seconds=1)
    assert first.core.give_back()
    exchange(first, relay)
    first.disconnect(next(iter(first.links)))

    relay.loses = lambda frame: isinstance(frame, wire.Changes)
    second, lend = borrower(relay, 2)
    assert lend.seqs == {"main": 5}
    run(second, relay, seconds=2)
    assert not second.core.has_borrowed_all()
    relay.loses = lambda frame: False
    run(second, relay, seconds=3)

    assert second.core.has_borrowed_all()
    assert second.reidentified == []
    second.map("plan")["0"] = "again"
    run(second, relay, seconds=1)
    assert relay.document("main").version == {lend.writer: 6}
    assert relay.map("plan")["0"] == "again"


def test_what_the_relay_does_not_have_is_not_handed_back() -> None:
    relay = Relay()
    node, _ = borrower(relay, 1)
    run(node, relay, seconds=1)
    relay.commits = False
    node.map("plan")["a"] = 1
    run(node, relay, seconds=1)

    assert not node.core.give_back()

    relay.commits = True
    relay.commit()
    run(node, relay, seconds=1)
    assert node.core.give_back()


def test_a_relay_that_restarts_lends_nothing_that_it_lent_before() -> None:
    relay = Relay()
    node, lend = borrower(relay, 1)
    run(node, relay, seconds=1)
    node.map("plan")["a"] = 1
    run(node, relay, seconds=1)
    node.disconnect(next(iter(node.links)))
    after = Relay()
    after.now = node.now
    after.core = Sync(
        after,
        wire.Hello(1, 1, 1000, 77, "relay", "relay"),
        after.config,
        random.Random(3),
        node.now,
    )
    connect(node, after)
    run(node, after, seconds=3)
    assert after.map("plan")["a"] == 1

    assert node.core.give_back()
    exchange(node, after)

    assert (after.lent, after.free) == (0, 0)
    assert borrow(after).writer != lend.writer


def test_an_agent_lends_nothing() -> None:
    node = Node(5)
    other = Node(6)
    here, there = connect(other, node)
    exchange(other, node)

    node.core.receive(there, wire.Borrow(), node.now)
    node.act()

    assert node.frames(wire.Lend) == [wire.Lend(0, {})]


def test_a_loan_that_nobody_asked_for_is_a_breach() -> None:
    one, two = Node(5), Node(6)
    here, there = connect(one, two)
    exchange(one, two)

    one.core.receive(here, wire.Lend(77, {}), one.now)

    assert [link.strikes for link in one.core.peers] == [1]
    assert one.core.hello.writer == 5


# Ten thousand agents


def live_in_cores(agents: int, at_once: int = 1) -> dict[str, Any]:
    """Let so many cores borrow, write and hand back, some at a time; tell what they left."""
    began = time.perf_counter()
    relay = Relay(config=replace(CONFIG, snapshot_after_bytes=5000, log_bytes=1))
    for start in range(0, agents, at_once):
        crew = []
        for number in range(start, min(start + at_once, agents)):
            node, _ = borrower(relay, number)
            crew.append(node)
        until = relay.now + 10
        while not all(node.core.has_borrowed_all() for node in crew):
            assert relay.now < until, "somebody still waits"
            run(relay, *crew, seconds=0.5)
        for number, node in enumerate(crew, start):
            node.map("plan")[f"k{number % 20}"] = number
            node.counter("tokens").increment()
        run(relay, *crew, seconds=0.5)
        for node in crew:
            until = relay.now + 10
            while not node.core.give_back():
                assert relay.now < until, "somebody cannot hand back"
                run(relay, *crew, seconds=0.5)
            exchange(relay, node)
            node.core.leave(node.now)
            exchange(relay, node)
            assert not node.reidentified
            node._close_documents()
    document = relay.document("main")
    return {
        "agents": agents,
        "counted": relay.counter("tokens").value,
        "writers": len(document.version),
        "client_ids": client_ids(document),
        "lent": relay.lent,
        "seconds": round(time.perf_counter() - began, 2),
    }


@pytest.mark.parametrize("at_once", [1, 8])
def test_hundreds_of_cores_leave_as_many_writers_as_there_were_at_once(at_once: int) -> None:
    left = live_in_cores(240, at_once)

    print(left)
    assert left["counted"] == left["agents"]
    assert left["writers"] == at_once and left["client_ids"] <= at_once + 1
    assert left["lent"] == 0


async def short_life(relay: str, number: int, *, crash: bool) -> None:
    """Open, write something, close."""
    replica = Replica(f"agent-{number}", peers=[relay], config=QUICK, lease=True)
    await replica.__aenter__()
    try:
        replica.map("plan")[f"k{number % 20}"] = number
        replica.counter("tokens").increment()
        if crash:
            await replica.synced(timeout=10)
            replica._is_leasing = False
    finally:
        await replica.close()


def client_ids(document: Document) -> int:
    """How many clients yrs knows in a document: the first number of its state vector."""
    number = shift = 0
    for byte in document.lanes._doc.get_state():
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return number
    raise AssertionError("a state vector has no end")


async def live(agents: int, at_once: int, crash_every: int = 0) -> dict[str, Any]:
    """Let so many short-lived agents come and go; tell what they left."""
    began = time.perf_counter()
    async with Replica("relay", listen=LOCAL, role="relay", config=QUICK) as relay:
        left = iter(range(agents))

        async def lane() -> None:
            for number in left:
                crash = bool(crash_every) and number % crash_every == 5
                await short_life(url(relay), number, crash=crash)

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(lane())
        document = relay.document("main")
        assert relay._sync.leases is not None
        return {
            "agents": agents,
            "counted": relay.counter("tokens").value,
            "writers": len(document.version),
            "lanes": len(document.lanes.lanes),
            "client_ids": client_ids(document),
            "lent": relay._sync.leases.lent,
            "seconds": round(time.perf_counter() - began, 2),
        }


@asynchronous
async def test_hundreds_of_agents_one_after_the_other_leave_one_writer() -> None:
    left = await live(60, 1)

    print(left)
    assert left["counted"] == 60
    assert left["writers"] == left["lanes"] == 1
    assert left["client_ids"] <= 2
    assert left["lent"] == 0


@asynchronous
async def test_agents_at_the_same_time_leave_as_many_writers_as_there_were_at_once() -> None:
    left = await live(120, 8)

    print(left)
    assert left["counted"] == 120
    assert left["writers"] <= 8 and left["client_ids"] <= 9
    assert left["lent"] == 0


@asynchronous
async def test_each_crash_costs_a_writer_and_no_more() -> None:
    left = await live(60, 3, crash_every=20)

    print(left)
    assert left["counted"] == 60
    assert left["lent"] == 3
    assert left["writers"] <= 3 + 3


# Over real sockets


@asynchronous
async def test_a_borrower_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    async with Replica("relay", store=tmp_path / "relay.db", listen=LOCAL, role="relay") as relay:
        writers = []
        for number in range(3):
            async with Replica(f"a{number}", peers=[url(relay)], lease=True) as replica:
                assert replica.counter("n").value == number
                replica.counter("n").increment()
                replica.map("plan")["last"] = number
                writers.append(replica.writer)

        assert len(set(writers)) == 1
        assert relay.document("main").version == {writers[0]: 3}
        assert relay.map("plan")["last"] == 2 and relay.counter("n").value == 3


@asynchronous
async def test_after_a_restart_the_relay_lends_new_writers(tmp_path: Path) -> None:
    store = tmp_path / "relay.db"
    async with Replica("relay", store=store, listen=LOCAL, role="relay") as relay:
        async with Replica("a", peers=[url(relay)], lease=True) as first:
            first.map("plan")["a"] = 1
    async with Replica("relay", store=store, listen=LOCAL, role="relay") as relay:
        async with Replica("b", peers=[url(relay)], lease=True) as second:
            assert second.writer != first.writer
            await second.synced(timeout=10)
            assert second.map("plan")["a"] == 1


@asynchronous
async def test_a_crashed_borrower_s_writer_is_never_lent_again() -> None:
    async with Replica("relay", listen=LOCAL, role="relay") as relay:
        crashed = Replica("a", peers=[url(relay)], lease=True)
        await crashed.__aenter__()
        crashed.map("plan")["a"] = 1
        await crashed.synced(timeout=10)
        for link in crashed._connections._links.values():
            link.connection.abort()
        seen = {crashed.writer}
        for number in range(5):
            async with Replica(f"b{number}", peers=[url(relay)], lease=True) as other:
                assert other.writer != crashed.writer
                seen.add(other.writer)
        assert len(seen) == 2
        await crashed.close()


# What is refused


@asynchronous
async def test_without_peers_nobody_lends() -> None:
    with pytest.raises(LeaseRefused, match="a: no relay among the peers lends a writer: there are"):
        await Replica("a", lease=True).__aenter__()


@asynchronous
async def test_an_agent_is_no_relay() -> None:
    async with Replica("b", listen=LOCAL) as agent:
        made = Replica("a", peers=[url(agent)], lease=True)
        with pytest.raises(LeaseRefused, match=f"lends a writer: {url(agent)} is no relay"):
            await made.__aenter__()
        assert repr(made) == "<Replica a not open>"


@asynchronous
async def test_where_nobody_listens_the_reason_is_told() -> None:
    with pytest.raises(LeaseRefused, match="lends a writer: memory://nowhere: nobody listens"):
        await Replica("a", peers=["memory://nowhere"], lease=True).__aenter__()


@asynchronous
async def test_the_next_peer_is_asked_when_one_cannot() -> None:
    async with Replica("relay", listen=LOCAL, role="relay") as relay:
        peers = ["memory://nowhere", url(relay)]
        async with Replica("a", peers=peers, lease=True) as replica:
            replica.map("plan")["a"] = 1
        assert relay.map("plan")["a"] == 1


@asynchronous
async def test_a_relay_that_says_nothing_is_not_waited_for_longer_than_was_set() -> None:
    async def silent(connection: Connection) -> None:
        while True:
            await connection.receive()

    listener = await listen("memory://silent", silent, http=None, tls=None)
    try:
        config = Config(lease_timeout=0.2)
        with pytest.raises(LeaseRefused, match="no writer could be leased within 0.2 s"):
            await Replica("a", peers=["memory://silent"], config=config, lease=True).__aenter__()
    finally:
        await listener.close()


@asynchronous
async def test_a_loan_that_is_not_fulfilled_ends_the_opening() -> None:
    """The relay lends a writer of which it then gives nothing."""

    async def liar(connection: Connection) -> None:
        hello = wire.Hello(1, 1, 5, 5, "liar", "relay")
        await connection.send(encode_message([encode_frame(hello)]))
        while True:
            for frame in decode_message(await connection.receive()):
                if isinstance(frame, wire.Borrow):
                    lend = wire.Lend(77, {"main": 3})
                    await connection.send(encode_message([encode_frame(lend)]))

    listener = await listen("memory://liar", liar, http=None, tls=None)
    try:
        made = Replica("a", peers=["memory://liar"], config=Config(lease_timeout=0.3), lease=True)
        with pytest.raises(LeaseRefused, match="within 0.3 s"):
            await made.__aenter__()
        assert repr(made) == "<Replica a closed>"
    finally:
        await listener.close()


def test_who_has_a_store_has_a_writer() -> None:
    with pytest.raises(UsageError, match="lease=True is for agents without a store"):
        Replica("a", store="a.db", lease=True)


@asynchronous
async def test_a_stranger_s_return_is_not_believed_when_it_does_not_match() -> None:
    async with Replica("relay", listen=LOCAL, role="relay") as relay:
        async with Replica("a", peers=[url(relay)], lease=True) as borrowing:
            borrowing.map("plan")["a"] = 1
            await borrowing.synced(timeout=10)
            connection = await join(url(relay))
            hello = wire.Hello(1, 1, 7, 1, "mallory")
            frames = [hello, wire.Return(borrowing.writer, {}), wire.Return(123, {})]
            frames += [wire.Return(borrowing.writer, {"main": 9}), wire.Borrow()]
            await connection.send(encode_message([encode_frame(frame) for frame in frames]))
            lend = None
            while lend is None:
                for frame in decode_message(await connection.receive()):
                    lend = frame if isinstance(frame, wire.Lend) else lend
            await connection.close("done")

            assert lend.writer != borrowing.writer


# What does not hold yet


def test_a_borrower_of_some_documents_hands_its_writer_back() -> None:
    relay = Relay()
    first, lend = borrower(relay, 1)
    run(first, relay, seconds=1)
    first.document("tasks").map("open")["b"] = 2
    run(first, relay, seconds=1)
    assert first.core.give_back()
    exchange(first, relay)
    first.disconnect(next(iter(first.links)))

    second, again = borrower(relay, 2, documents=("main",))
    assert again.writer == lend.writer
    run(second, relay, seconds=1)
    assert second.core.has_borrowed_all()
    second.map("plan")["a"] = 1
    run(second, relay, seconds=1)
    assert second.core.give_back()
    exchange(second, relay)

    assert (relay.lent, relay.free) == (0, 1)


def test_a_borrower_does_not_tidy_before_it_has_everything() -> None:
    relay = Relay(config=replace(CONFIG, answer_bytes=1))
    first, lend = borrower(relay, 1)
    other = Node(7)
    other.now = relay.now
    connect(other, relay)
    run(first, other, relay, seconds=0.1)
    first.map("plan")["a"] = "of the first"
    run(first, other, relay, seconds=0.1)
    other.map("plan")["a"] = "written over"
    run(first, other, relay, seconds=0.1)
    first.map("plan")["b"] = 2
    run(first, other, relay, seconds=0.1)
    assert first.core.give_back()
    exchange(first, relay)
    first.disconnect(next(iter(first.links)))

    last = Dot(lend.writer, 2)
    relay.loses = lambda frame: (
        isinstance(frame, wire.Changes)
        and any(decode_change(data).dot == last for data in frame.changes)
    )
    second, again = borrower(relay, 2)
    assert again.seqs == {"main": 2}
    run(second, relay, seconds=5)

    assert not second.core.has_borrowed_all()
    assert second.document("main").version[lend.writer] == 1


def test_nothing_leaves_under_a_writer_that_was_handed_back() -> None:
    # As when a handler of events, or another task, writes while the replica closes.
    relay = Relay()
    first, lend = borrower(relay, 1)
    run(first, relay, seconds=1)
    first.map("plan")["a"] = "first"
    run(first, relay, seconds=1)
    assert first.core.give_back()
    first.map("plan")["b"] = "too late"
    exchange(first, relay)
    second, again = borrower(relay, 2)
    assert again == wire.Lend(lend.writer, {"main": 1})

    run(first, second, relay, seconds=3)

    assert "b" not in relay.map("plan")


@asynchronous
async def test_a_handler_cannot_write_before_the_borrower_has_everything() -> None:
    async with Replica("relay", listen=LOCAL, role="relay") as relay:
        async with Replica("first", peers=[url(relay)], lease=True) as first:
            for number in range(3):
                first.document("a").map("m")[str(number)] = number
                first.document("b").map("m")[str(number)] = number
                await first.durable()
        second = Replica("second", peers=[url(relay)], lease=True)
        refused: list[Exception] = []

        def react(event: Changed) -> None:
            try:
                second.document("c").map("m")["x"] = 1
                for name in ("a", "b"):
                    # Under this writer there may be more than has arrived.
                    second.document(name).map("m")["x"] = 1
            except UsageError as exc:
                refused.append(exc)

        second.on(Changed, react)
        async with second:
            pass
        assert refused


def test_only_the_borrower_can_hand_a_writer_back() -> None:
    relay = Relay()
    first, lend = borrower(relay, 1)
    other = Node(7)
    other.now = relay.now
    here, there = connect(other, relay)
    run(first, other, relay, seconds=1)
    first.map("plan")["a"] = 1
    run(first, other, relay, seconds=1)

    relay.core.receive(there, wire.Return(lend.writer, {"main": 1}), relay.now)

    assert relay.free == 0


@asynchronous
async def test_what_was_sent_before_a_close_is_read_in_one_event_loop_too() -> None:
    here, there = MemoryConnection.pair("relay")
    await here.send(b"last words")
    await here.close("done")
    here.abort()

    assert await there.receive() == b"last words"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Let thousands of agents borrow writers.")
    parser.add_argument("--agents", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--crash-every", type=int, default=0)
    parser.add_argument("--sockets", action="store_true", help="over real ones")
    options = parser.parse_args()
    if options.sockets:
        outcome = asyncio.run(live(options.agents, options.at_once, options.crash_every))
    else:
        outcome = live_in_cores(options.agents, options.at_once)
    print(outcome)
    sys.exit(outcome["client_ids"] > WRITERS_MAX)
