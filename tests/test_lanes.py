"""Lanes: the model with its mutants, sizes, and the rules that a foreign change must keep."""

from __future__ import annotations

import random
from collections.abc import Callable

import lanes_model
import pytest

from crdtstate import document as document_module
from crdtstate import lanes as lanes_module
from crdtstate.change import Change
from crdtstate.clock import Dot, HybridClock, Version
from crdtstate.document import Document
from crdtstate.errors import CRDTStateError, InvalidUpdate
from crdtstate.lanes import Lanes
from crdtstate.slots import NO_COVERS, Slot, candidates, live_slots
from crdtstate.values import pack


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of four slots, so that short histories open, clean and close many of them."""
    monkeypatch.setattr(lanes_module, "SEGMENT_SLOTS", 4)


def make(writer: int) -> Document:
    return Document(
        "main",
        writer=writer,
        agent=f"agent-{writer}",
        clock=HybridClock(),
        wall=lambda: 1_000,
        on_write=lambda document: None,
    )


def seal(document: Document) -> Change:
    change = document.seal()
    assert change is not None
    return change


# The model


@pytest.mark.parametrize("block", range(4))
def test_lanes_equal_a_reference_multi_value_store(small_segments: None, block: int) -> None:
    for seed in range(block * 75, block * 75 + 75):
        lanes_model.run(seed)


def _deps_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_ready(self: Document, change: Change) -> bool:
        return self.version.get(change.writer, 0) == change.seq - 1

    monkeypatch.setattr(Document, "is_ready", is_ready)


def _covers_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_module, "covering", lambda cell, writer: NO_COVERS)


def _removals_dropped_early(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Lanes._is_settled

    def is_settled(self: Lanes, path: str) -> bool:
        slot = self.own_slot(path)
        return (slot is not None and slot.value is None) or honest(self, path)

    monkeypatch.setattr(Lanes, "_is_settled", is_settled)


def _cleaned_without_dropping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lanes, "_take_out", lambda self, segment, path: None)


def _covered_slots_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lanes, "_is_settled", lambda self, path: False)


def _lower_seq_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Lanes.join
    monkeypatch.setattr(
        Lanes, "join", lambda self, state, newer: honest(self, state, lambda w: not newer(w))
    )


@pytest.mark.parametrize(
    "mutate",
    [
        _deps_ignored,
        _covers_empty,
        _removals_dropped_early,
        _cleaned_without_dropping,
        _covered_slots_kept,
        _lower_seq_joined,
    ],
)
def test_the_model_catches(
    small_segments: None,
    monkeypatch: pytest.MonkeyPatch,
    mutate: Callable[[pytest.MonkeyPatch], None],
) -> None:
    mutate(monkeypatch)

    with pytest.raises((AssertionError, CRDTStateError)):
        for seed in range(40):
            lanes_model.run(seed)


# Size


def test_a_lane_stays_small_however_often_it_is_overwritten() -> None:
    document, other = make(7), make(8)
    rng = random.Random(1)

    for number in range(20_000):
        document.put("mplan", f"key-{rng.randrange(500)}", pack(number, "plan"))
        other.apply(seal(document))

        if number % 1000 == 999:
            live = Lanes(9)
            cells = document.lanes.container("mplan").cells
            alone = len(live.write({f"mplan\0{key}": cell[7] for key, cell in cells.items()}))
            assert len(document.engine.state()) <= 2 * alone + 40_000
            assert len(document.lanes.lanes[7].items) <= 4 * len(cells) + 1000
            live.close()

    assert document.lanes.canonical() == other.lanes.canonical()
    assert len(document.engine.state()) == len(other.engine.state())


# Adoption (L6)


def relay(change: Change | None, *documents: Document) -> None:
    assert change is not None
    for document in documents:
        document.apply(change)


def test_an_adopted_lane_reads_as_before_and_leaves_nothing_behind() -> None:
    closed, heir, other = make(1), make(2), make(3)
    closed.put("mplan", "goal", pack("ship", "plan"))
    closed.count("cn", 5, 2)
    relay(seal(closed), heir, other)

    relay(heir.adopt(1), other)

    for document in (heir, other):
        assert document.map("plan")["goal"] == "ship"
        assert document.counter("n").value == 3
        assert not document.lanes.lanes[1].places
    assert heir.lanes.canonical() == other.lanes.canonical()


def test_a_write_that_covered_the_original_covers_the_adopted_copy() -> None:
    closed, heir, other = make(1), make(2), make(3)
    closed.put("mplan", "goal", pack("old", "plan"))
    closed.put("mplan", "gone", pack("old", "plan"))
    relay(seal(closed), heir, other)

    other.put("mplan", "goal", pack("new", "plan"))
    other.put("mplan", "gone", None)
    written, adopted = seal(other), heir.adopt(1)
    relay(written, heir)
    relay(adopted, other)

    for document in (heir, other):
        assert dict(document.map("plan")) == {"goal": "new"}
        assert document.map("plan").conflicts() == {}


def test_adopting_twice_counts_once() -> None:
    closed, one, two = make(1), make(2), make(3)
    closed.put("mplan", "goal", pack("ship", "plan"))
    closed.count("cn", 5, 0)
    relay(seal(closed), one, two)

    first, second = one.adopt(1), two.adopt(1)
    relay(first, two)
    relay(second, one)

    for document in (one, two):
        assert document.map("plan")["goal"] == "ship"
        assert document.map("plan").conflicts() == {}
        assert document.counter("n").value == 5
    assert one.lanes.canonical() == two.lanes.canonical()


def test_an_adopter_may_drop_what_a_change_it_has_not_seen_had_replaced() -> None:
    # Seeds 881 and 1083: the closed writer's last change had reached only the other.
    closed, heir, other = make(1), make(2), make(3)
    closed.map("plan")["goal"] = "first"
    relay(seal(closed), heir, other)
    closed.map("plan")["goal"] = "last"
    last = seal(closed)
    relay(last, other)

    adopted = heir.adopt(1)
    relay(adopted, other)
    relay(last, heir)

    assert heir.map("plan")["goal"] == other.map("plan")["goal"] == "last"
    assert heir.lanes.canonical() == other.lanes.canonical()


def test_a_late_change_of_an_adopted_lane_may_move_what_was_adopted(small_segments: None) -> None:
    # Seed 1475: the move of an old slot came when its adopter had taken it out of the lane.
    closed, heir, other = make(1), make(2), make(3)
    plan = closed.map("plan")
    plan["old"] = 0
    changes = [seal(closed)]
    for number in range(12):
        plan["goal"] = number
        changes.append(seal(closed))
    for change in changes[:3]:
        relay(change, heir, other)
    relay(heir.adopt(1), other)

    for change in changes[3:]:
        relay(change, heir, other)

    assert dict(heir.map("plan")) == dict(other.map("plan")) == {"old": 0, "goal": 11}
    assert heir.lanes.canonical() == other.lanes.canonical()


def test_a_removal_of_what_was_adopted_leaves_nothing_behind() -> None:
    # Seed 115: it covers the origin, which is gone already.
    closed, heir = make(1), make(2)
    closed.map("plan")["goal"] = "old"
    relay(seal(closed), heir)
    heir.adopt(1)
    del heir.map("plan")["goal"]
    seal(heir)

    seal(heir)

    assert heir.lanes.canonical() == {}


def test_an_adopted_removal_that_covers_nothing_leaves_nothing_behind() -> None:
    # Seeds 6 and 7.
    closed, heir, other = make(1), make(2), make(3)
    other.map("plan")["goal"] = "old"
    relay(seal(other), closed, heir)
    del closed.map("plan")["goal"]
    relay(seal(closed), heir, other)
    relay(other.seal(), closed, heir)

    heir.adopt(1)
    heir.seal()

    assert heir.lanes.canonical() == {}


def test_what_settles_while_it_is_written_to_is_dropped_later() -> None:
    one, two = make(1), make(2)
    two.map("plan")["goal"] = "theirs"
    relay(seal(two), one)
    del one.map("plan")["goal"]
    del two.map("plan")["goal"]
    relay(seal(two), one)

    assert one.needs_tidying
    seal(one)
    one.seal()

    assert one.lanes.canonical() == {}


def test_a_snapshot_from_before_an_adoption_does_not_bring_the_slots_back() -> None:
    closed, heir, other = make(1), make(2), make(3)
    closed.put("mplan", "goal", pack("ship", "plan"))
    relay(seal(closed), heir, other)
    other.put("mplan", "mine", pack(1, "plan"))
    seal(other)
    old = other.snapshot()
    heir.adopt(1)

    heir.join(old)

    assert not heir.lanes.lanes[1].places
    assert dict(heir.map("plan")) == {"goal": "ship", "mine": 1}


def test_nobody_deletes_in_the_lane_of_another() -> None:
    victim, thief, witness = make(1), make(2), make(3)
    victim.put("mplan", "goal", pack("ship", "plan"))
    relay(seal(victim), thief, witness)
    thief.put("mplan", "other", pack(1, "plan"))
    lane = thief.lanes.lanes[1]
    slots = {"mplan\0other": thief.lanes.own_slot("mplan\0other")}
    update = thief.lanes.write(slots, (lane, ["mplan\0goal"]))

    with pytest.raises(InvalidUpdate, match="L1"):
        witness.lanes.check(update, 2, 1, witness.version)

    assert dict(witness.map("plan")) == {"goal": "ship"}


# What a foreign change must keep


def _slot_of_the_future() -> Slot:
    return Slot(pack(1, "plan"), 1, 0, {3: 5})


def _slot_of_another_change() -> Slot:
    return Slot(pack(1, "plan"), 7, 0)


def _slot_with_foreign_origin() -> Slot:
    return Slot(pack(1, "plan"), 1, 0, NO_COVERS, Dot(9, 4))


def _slot_that_is_no_value() -> Slot:
    return Slot(b"\xc1", 1, 0)


@pytest.mark.parametrize(
    ("path", "slot", "reason"),
    [
        ("mplan\0k", _slot_of_the_future(), "L2"),
        ("mplan\0k", _slot_of_another_change(), "dated"),
        ("mplan\0k", _slot_with_foreign_origin(), "L6"),
        ("mplan\0k", _slot_that_is_no_value(), "value|msgpack"),
        ("xplan\0k", Slot(pack(1, "plan"), 1, 0), "not a path"),
        ("cn\0", Slot(pack("text", "plan"), 1, 0), "counter"),
        ("cn\0", Slot(pack([-1, 0], "plan"), 1, 0), "counter"),
        ("cn\0k", Slot(pack([1, 0], "plan"), 1, 0), "key"),
        ("rleader\0k", Slot(pack(1, "plan"), 1, 0), "key"),
        ("sskills\0?", Slot(pack(True, "plan"), 1, 0), "element|key"),
        ("@strategies\0mplan", Slot(pack([], "plan"), 1, 0), "name"),
    ],
)
def test_a_slot_is_refused(path: str, slot: Slot, reason: str) -> None:
    hostile, victim = Lanes(2), make(1)
    update = hostile.write({path: slot})

    with pytest.raises(InvalidUpdate, match=reason):
        victim.lanes.check(update, 2, 1, victim.version)

    assert victim.lanes.canonical() == {}
    assert victim.version == Version()


def test_a_change_of_another_client_is_refused() -> None:
    hostile, victim = make(2), make(1)
    hostile.put("mplan", "k", pack(1, "plan"))
    update = seal(hostile).update

    with pytest.raises(InvalidUpdate, match="L1"):
        victim.lanes.check(update, 3, 1, victim.version)


def test_a_change_with_a_gap_is_refused() -> None:
    hostile, victim = make(2), make(1)
    hostile.put("mplan", "k", pack(1, "plan"))
    seal(hostile)
    hostile.put("mplan", "k", pack(2, "plan"))
    update = seal(hostile).update

    with pytest.raises(InvalidUpdate, match="clock"):
        victim.lanes.check(update, 2, 1, victim.version)


# Slots


def test_a_slot_round_trips_through_its_bytes() -> None:
    for slot in (
        Slot(None, 1, 2),
        Slot(b"x", 1, 2**62, {4: 5, 6: 7}),
        Slot(b"x", 1, 2, NO_COVERS, Dot(8, 9)),
        Slot(None, 1, 2, {1: 1}, Dot(8, 9)),
    ):
        assert Slot.decode(slot.encode()) == slot


def test_candidates_come_oldest_first_and_covered_slots_do_not() -> None:
    cell = {
        1: Slot(b"a", 1, 30),
        2: Slot(b"b", 1, 10),
        3: Slot(b"c", 1, 20, {1: 1}),
        4: Slot(None, 1, 40, {9: 1}),
    }

    assert [writer for writer, _ in candidates(cell)] == [2, 3]
    assert [writer for writer, _ in live_slots(cell)] == [2, 3, 4]
