"""Subscriptions: replicas that take part in some documents only."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from harness import Agent, asynchronous
from test_replica import LOCAL, next_event, url
from test_sync import CONFIG, Node, connect, run

from crdtstate import Changed, Replica, UsageError, wire
from crdtstate.link import takes
from crdtstate.sync import Sync

PATTERNS = ("plan", "task/*")


class Partial(Node):
    """A node that takes part in some documents only."""

    def __init__(self, writer: int, *patterns: str) -> None:
        super().__init__(writer)
        self.patterns = patterns or PATTERNS
        hello = wire.Hello(1, 1, writer, writer, self.agent, documents=self.patterns)
        self.core = Sync(self, hello, CONFIG, random.Random(writer), 0.0)

    def _make(self, name: str, shared: bool):  # type: ignore[no-untyped-def]
        assert takes(self.patterns, name), f"{name!r} was made"
        return super()._make(name, shared)


def put(node: Node, document: str, key: str = "k", value: object = 1) -> None:
    node.document(document).map("m")[key] = value
    node.act()


def relay_and(*partial: Partial) -> tuple[Node, ...]:
    relay = Node(1000)
    nodes = (relay, *partial)
    for node in partial:
        connect(node, relay)
    run(*nodes, seconds=3)
    return nodes


# Which


@pytest.mark.parametrize(
    ("patterns", "document", "is_taken"),
    [
        (None, "anything", True),
        ((), "anything", False),
        (("plan",), "plan", True),
        (("plan",), "plans", False),
        (("plan",), "pla", False),
        (("plan*",), "plan", True),
        (("plan*",), "plans/x", True),
        (("plan/*",), "plan", False),
        (("plan/*",), "plan/", True),
        (("plan/*",), "plan/x/y", True),
        (("*",), "anything", True),
        (("a*b",), "axb", False),
        (("a*b",), "a*b", True),
        (("x", "y/*"), "y/1", True),
        (("*x",), "ax", False),
        (("ä/*",), "ä/1", True),
    ],
)
def test_a_subscription_names_documents_or_how_they_begin(
    patterns: tuple[str, ...] | None, document: str, is_taken: bool
) -> None:
    assert takes(patterns, document) is is_taken


@pytest.mark.parametrize(
    "wrong", ["plan", [], [""], [1], ["x" * 201], [f"d{n}" for n in range(101)], 7, [None]]
)
def test_what_is_no_list_of_names_is_refused(wrong: object) -> None:
    with pytest.raises(UsageError, match="subscribe "):
        Replica("ann", subscribe=wrong)  # type: ignore[arg-type]


# What is sent


def test_only_what_is_subscribed_to_is_taken_in() -> None:
    relay, part = relay_and(Partial(1))
    for name in ("plan", "task/1", "task/2", "other", "tas"):
        put(relay, name)
    run(relay, part, seconds=2)

    assert list(part.documents()) == ["plan", "task/1", "task/2"]
    assert {item.document for item in part.store.load()} == {"plan", "task/1", "task/2"}
    sent = {name for frame in relay.frames(wire.Have) for name in [frame.document]}  # type: ignore[attr-defined]
    assert "other" not in sent


def test_who_comes_late_gets_what_it_takes_and_no_more() -> None:
    relay = Node(1000)
    for name in ("plan", "other"):
        for number in range(50):
            put(relay, name, str(number))
    part = Partial(1)
    connect(part, relay)
    run(relay, part, seconds=5)

    assert len(part.document("plan").map("m")) == 50
    assert list(part.documents()) == ["plan"]
    assert relay.copies == 50


def test_what_is_written_here_gets_to_others() -> None:
    relay, one, two = relay_and(Partial(1, "a", "both"), Partial(2, "b", "both"))
    put(one, "both", "of one")
    put(two, "both", "of two")
    put(one, "a")
    put(two, "b")
    run(relay, one, two, seconds=2)

    assert list(relay.documents()) == ["a", "b", "both"]
    for node in (relay, one, two):
        assert set(node.document("both").map("m")) == {"of one", "of two"}
    assert list(one.documents()) == ["a", "both"]
    assert list(two.documents()) == ["b", "both"]


def test_two_that_take_different_documents_have_nothing_to_say_to_each_other() -> None:
    one, two = Partial(1, "a", "both"), Partial(2, "b", "both")
    connect(one, two)
    run(one, two, seconds=3)
    put(one, "a")
    put(two, "b")
    put(one, "both")
    run(one, two, seconds=20)

    assert set(two.documents()) == {"b", "both"}
    assert set(one.documents()) == {"a", "both"}
    assert one.copies == 1 and two.copies == 0


def test_a_partial_replica_passes_nothing_on() -> None:
    left, right = Node(2), Node(3)
    middle = Partial(1, "plan")
    connect(left, middle)
    connect(right, middle)
    run(left, middle, right, seconds=3)
    put(left, "other")
    run(left, middle, right, seconds=5)

    assert list(right.documents()) == []
    assert list(middle.documents()) == []


# At rest


@pytest.mark.parametrize("kind", [(), ("a", "both"), ("*",), ("nothing here",)])
def test_at_rest_nothing_is_named_again(kind: tuple[str, ...]) -> None:
    relay, one, two = relay_and(Partial(1, *kind), Partial(2, "b", "both"))
    for name in ("a", "b", "both", "plan", "task/1", "c"):
        put(relay, name)
    for name in ("b", "both"):
        put(two, name, "of two")
    run(relay, one, two, seconds=5)
    before = [len(node.sent) for node in (relay, one, two)]

    run(relay, one, two, seconds=60)

    for node, start in zip((relay, one, two), before, strict=True):
        frames = Counter(type(frame).__name__ for _, frame in node.sent[start:])
        # And once in a while they compare what they hold, which takes no names either.
        assert set(frames) <= {"Heartbeat", "Compare", "Compared"}, frames
        assert frames["Compare"] <= 2
        assert frames["Heartbeat"] <= 2 * 60 * len(node.core.peers)
    for node in (relay, one, two):
        assert all(link.mismatches == 0 for link in node.core.peers)


def test_two_partial_replicas_at_rest_agree_too() -> None:
    one, two = Partial(1, "a", "both/*"), Partial(2, "b", "both/*")
    connect(one, two)
    for node, own in ((one, "a"), (two, "b")):
        put(node, own)
        put(node, "both/1", node.agent)
    run(one, two, seconds=5)
    before = len(one.sent) + len(two.sent)

    run(one, two, seconds=60)

    assert set(one.document("both/1").map("m")) == {"agent-1", "agent-2"}
    assert len(one.sent) + len(two.sent) - before <= 2 * 2 * 60
    assert len(one.frames(wire.Have)) <= 6


def test_a_have_that_was_lost_is_made_up_for() -> None:
    relay, part = relay_and(Partial(1))
    relay.loses = lambda frame: isinstance(frame, (wire.Have, wire.Changes))
    put(relay, "plan")
    put(relay, "other")
    run(relay, part, seconds=3)
    assert list(part.documents()) == []

    relay.loses = lambda frame: False
    run(relay, part, seconds=10)

    assert list(part.documents()) == ["plan"]


# Hostile peers


def test_what_a_hostile_peer_sends_of_other_documents_is_dropped() -> None:
    relay, part = relay_and(Partial(1))
    mallory = Agent(66)
    mallory.document("other").map("m")["k"] = "poison"
    mallory.document("plan").map("m")["k"] = "fine"
    changes = tuple(change.data for change in mallory.sealed())
    there = part.core.peers[0].peer

    part.core.receive(there, wire.Have("other", mallory.document("other").version, True), part.now)
    part.core.receive(there, wire.Changes(changes), part.now)
    part.core.receive(there, wire.Changes(changes, answer=True, more=True), part.now)
    part.core.receive(there, wire.Offer("other", b"d" * 32, 100), part.now)
    part.core.receive(there, wire.Chunk("other", b"d" * 32, 0, b"x" * 100), part.now)
    part.core.receive(there, wire.Busy("other", 5), part.now)
    part.core.receive(there, wire.Get("other", b"d" * 32, 0), part.now)
    run(relay, part, seconds=3)

    assert list(part.documents()) == ["plan"]
    assert {item.document for item in part.store.load()} == {"plan"}
    assert part.core.missing_count() == part.core.pending_count == 0


def test_a_question_about_another_document_is_not_answered_as_if_it_were_there() -> None:
    relay, part = relay_and(Partial(1))
    put(relay, "other")
    version = relay.core.committed_version("other")
    asked = relay.core.ask("other", version, ["agent-1"], relay.now, durable=False)
    relay.act()
    run(relay, part, seconds=5)

    assert asked.answers == {}


# Replicas


@asynchronous
async def test_another_document_cannot_be_opened() -> None:
    async with Replica("ann", subscribe=["main", "task/*"]) as ann:
        ann.map("plan")["a"] = 1
        ann.document("task/1").map("m")["a"] = 1
        with pytest.raises(UsageError, match="'other' is not among the documents"):
            ann.document("other")
        with pytest.raises(UsageError):
            ann.document("task")
        assert list(ann.documents()) == ["main", "task/1"]


@asynchronous
async def test_a_subscriber_receives_little_more_than_the_documents_it_takes(
    tmp_path: Path,
) -> None:
    async with Replica("relay", listen=LOCAL, role="relay") as relay:
        async with Replica("writer", peers=[url(relay)]) as writer:
            for number in range(40):
                document = writer.document(f"doc/{number}")
                for key in range(20):
                    document.map("m")[str(key)] = os.urandom(150)
                    await asyncio.sleep(0)
            await writer.synced(timeout=30)
        names = [f"doc/{number}" for number in range(4)]
        store = tmp_path / "part.db"
        async with Replica("part", peers=[url(relay)], subscribe=names, store=store) as part:
            await part.synced(timeout=30)
            while len(list(part.documents())) < 4:
                await next_event(part, Changed)
            await part.synced(timeout=30)

            assert list(part.documents()) == names
            for name in names:
                assert dict(part.document(name).map("m")) == dict(relay.document(name).map("m"))
            received = part.traffic.bytes_in
            taken = sum(relay._store.size(name) for name in names)
        secret = relay.document("doc/9").map("m")["0"]
        held = b"".join([file.read_bytes() for file in files(tmp_path)])
    print(f"{received} bytes received for {taken} bytes of changes: {received / taken:.2f}")
    assert received <= 1.5 * taken
    assert secret not in held


def files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]


@asynchronous
async def test_a_token_of_what_is_taken_can_be_waited_for() -> None:
    async with Replica("relay", listen=LOCAL, role="relay") as relay:
        async with Replica("part", peers=[url(relay)], subscribe=["plan"]) as part:
            relay.document("plan").map("m")["a"] = 1
            await part.wait_for(relay.version(), timeout=10)
            assert part.document("plan").map("m")["a"] == 1
            await part.synced(timeout=10)
            part.document("plan").map("m")["b"] = 2
            await relay.wait_for(part.version(), timeout=10)
            await part.synced(timeout=10)
            await relay.synced(timeout=10)


# What does not hold yet


@asynchronous
async def test_who_has_more_than_a_subscriber_takes_is_synced_with_it() -> None:
    async with Replica("relay", listen=LOCAL, role="relay") as relay:
        async with Replica("part", peers=[url(relay)], subscribe=["plan"]) as part:
            relay.document("plan").map("m")["a"] = 1
            relay.document("other").map("m")["a"] = 1
            await part.synced(timeout=10)
            await relay.synced(timeout=1)


def test_a_subscriber_does_not_lag_behind_in_what_it_does_not_take() -> None:
    relay, part = relay_and(Partial(1))
    put(relay, "plan")
    put(relay, "other")
    run(relay, part, seconds=30)

    assert relay.core.lag(relay.core.peers[0].peer) == 0


@asynchronous
async def test_a_token_is_waited_for_as_far_as_it_is_taken() -> None:
    async with Replica("relay", listen=LOCAL, role="relay") as relay:
        async with Replica("part", peers=[url(relay)], subscribe=["plan"]) as part:
            relay.document("plan").map("m")["a"] = 1
            relay.document("other").map("m")["a"] = 1
            await part.wait_for(relay.version(), timeout=1)


@asynchronous
async def test_a_store_that_holds_more_can_be_opened_with_a_subscription(tmp_path: Path) -> None:
    async with Replica("ann", store=tmp_path / "ann.db") as ann:
        ann.document("plan").map("m")["a"] = 1
        ann.document("other").map("m")["a"] = 1
    async with Replica("ann", store=tmp_path / "ann.db", subscribe=["plan"]) as ann:
        assert ann.document("plan").map("m")["a"] == 1


def test_a_want_for_another_document_leaves_nothing_behind() -> None:
    relay, part = relay_and(Partial(1))
    there = part.core.peers[0].peer
    for number in range(50):
        part.core.receive(there, wire.Want(f"other-{number}", ((7, 1, 9),)), part.now)
    part.act()

    assert list(part.core._ledger.pages) == []
