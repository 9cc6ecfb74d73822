"""The outbox: what goes first, and that it stays bounded."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from crdtstate import wire
from crdtstate.clock import Version
from crdtstate.config import Config
from crdtstate.outbox import EPHEMERAL_BYTES, URGENT_BYTES_MAX, Lane, Outbox, Outboxes, lane_of

lanes = st.sampled_from(list(Lane))


def drain(outbox: Outbox, frames_max: int = 256) -> list[bytes]:
    found = []
    while outbox:
        frames = outbox.take(frames_max)
        assert 0 < len(frames) <= frames_max
        found += frames
    return found


def test_a_lane_goes_before_those_below_it() -> None:
    outbox = Outbox()
    for lane in reversed(Lane):
        outbox.push(lane.name.encode(), lane)

    frames = outbox.take()

    assert frames == [b"CONTROL", b"LIVE", b"EPHEMERAL", b"BULK"]
    assert not outbox and outbox.size_bytes == 0


@given(st.lists(st.tuples(lanes, st.binary(min_size=1, max_size=50)), max_size=60))
def test_each_lane_keeps_its_order_and_nothing_is_lost(pushed: list[tuple[Lane, bytes]]) -> None:
    outbox = Outbox()
    for number, (lane, data) in enumerate(pushed):
        outbox.push(bytes([lane]) + number.to_bytes(2, "big") + data, lane)
    size = outbox.size_bytes

    found = drain(outbox, 3)

    assert sum(map(len, found)) == size and len(found) == len(pushed)
    for lane in Lane:
        assert (mine := [each for each in found if each[0] == lane]) == sorted(mine)


def test_bulk_gets_on_while_much_is_live() -> None:
    outbox = Outbox()
    outbox.push(b"b" * 1000, Lane.BULK)
    for _ in range(100):
        outbox.push(b"l" * 2000, Lane.LIVE)

    frames = outbox.take()

    assert frames[-1] == b"b" * 1000 and sum(map(len, frames)) <= wire.BUNDLE_BYTES


def test_a_heartbeat_waits_for_no_snapshot() -> None:
    outbox = Outbox()
    for _ in range(100):
        outbox.push(b"c" * 64 * 1024, Lane.BULK)
    outbox.take()

    outbox.push(b"beat", Lane.CONTROL)

    assert outbox.take()[0] == b"beat"


def test_of_presence_the_newest_is_kept() -> None:
    outbox = Outbox()
    for number in range(1000):
        outbox.push(number.to_bytes(2, "big") * 100, Lane.EPHEMERAL)

    found = drain(outbox)

    assert found[-1] == (999).to_bytes(2, "big") * 100
    assert sum(map(len, found)) <= EPHEMERAL_BYTES


def test_what_is_asked_for_is_bulk_and_the_goodbye_comes_last() -> None:
    assert lane_of(wire.Changes((), answer=True)) is Lane.BULK
    assert lane_of(wire.Changes(())) is lane_of(wire.Have("d", Version())) is Lane.LIVE
    assert lane_of(wire.Bye(0)) is Lane.BULK
    assert lane_of(wire.Heartbeat(0)) is lane_of(wire.Want("d", ())) is Lane.CONTROL


def test_what_nobody_asked_for_counts_as_urgent() -> None:
    outbox = Outbox()
    outbox.push(b"12", Lane.CONTROL)
    outbox.push(b"345", Lane.LIVE)
    outbox.push(b"6789", Lane.BULK)

    assert (outbox.urgent_bytes, outbox.bulk_bytes, outbox.size_bytes) == (5, 4, 9) and outbox
    outbox.clear()
    assert (outbox.urgent_bytes, outbox.bulk_bytes, outbox.size_bytes) == (0, 0, 0) and not outbox


@dataclass(eq=False)
class Reader:
    """Somebody who is sent things."""

    outbox: Outbox = field(default_factory=Outbox)
    is_congested: bool = False


def test_a_reader_for_whom_too_much_waits_is_congested_until_little_does() -> None:
    outboxes: Outboxes[Reader] = Outboxes(Config(outbox_bytes=200_000), lambda reader: None)
    slow, quick = Reader(), Reader()
    for _ in range(100):
        for reader in (slow, quick):
            outboxes.push(reader, bytes(2100), Lane.LIVE)
        outboxes.take(quick)

    assert slow.is_congested and not quick.is_congested
    assert outboxes.size_bytes == slow.outbox.size_bytes == 210_000
    while slow.outbox.urgent_bytes > 52_000:
        outboxes.take(slow, 1)
        assert slow.is_congested
    while slow.outbox.urgent_bytes > 48_000:
        outboxes.take(slow, 1)
    assert not slow.is_congested


def test_all_together_share_a_limit_and_each_keeps_a_fair_part_of_it() -> None:
    config = Config(outbox_bytes_total=300_000)
    outboxes: Outboxes[Reader] = Outboxes(config, lambda reader: None)
    readers = [Reader() for _ in range(5)]
    for reader in readers:
        outboxes.push(reader, bytes(60_000), Lane.LIVE)
    assert not any(reader.is_congested for reader in readers)

    outboxes.push(readers[0], bytes(6_000), Lane.LIVE)
    outboxes.push(readers[1], bytes(1_000), Lane.LIVE)

    assert [reader.is_congested for reader in readers] == [True, False, False, False, False]
    outboxes.clear(readers[0])
    assert outboxes.size_bytes == 241_000


def test_who_takes_nothing_is_cut_off() -> None:
    gone: list[Reader] = []
    outboxes: Outboxes[Reader] = Outboxes(Config(), gone.append)
    stopped, fetching = Reader(), Reader()
    while not gone:
        outboxes.push(stopped, bytes(10_000), Lane.CONTROL)
        outboxes.push(fetching, bytes(10_000), Lane.BULK)

    assert gone == [stopped] and stopped.outbox.urgent_bytes <= URGENT_BYTES_MAX + 10_000
