"""The outbox: what goes first, and that it stays bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from crdtstate import wire
from crdtstate.clock import Version
from crdtstate.outbox import EPHEMERAL_BYTES, Lane, Outbox, lane_of

lanes = st.sampled_from(list(Lane))


def drain(outbox: Outbox, frames_max: int = 256) -> list[bytes]:
    found = []
    while outbox:
        frames, _ = outbox.take(frames_max)
        assert 0 < len(frames) <= frames_max
        found += frames
    return found


def test_a_lane_goes_before_those_below_it() -> None:
    outbox = Outbox()
    for lane in reversed(Lane):
        outbox.push(lane.name.encode(), lane)

    frames, bulk = outbox.take()

    assert frames == [b"CONTROL", b"LIVE", b"EPHEMERAL", b"BULK"] and bulk == 4
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

    frames, bulk = outbox.take()

    assert bulk == 1000 and sum(map(len, frames)) <= wire.BUNDLE_BYTES


def test_a_heartbeat_waits_for_no_snapshot() -> None:
    outbox = Outbox()
    for _ in range(100):
        outbox.push(b"c" * 64 * 1024, Lane.BULK)
    outbox.take()

    outbox.push(b"beat", Lane.CONTROL)

    assert outbox.take()[0][0] == b"beat"


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

    assert (outbox.urgent_bytes, outbox.size_bytes, len(outbox)) == (5, 9, 3)
    outbox.clear()
    assert (outbox.urgent_bytes, outbox.size_bytes, len(outbox)) == (0, 0, 0)
