"""Membership: records that merge in any order, and who is up by who can be reached."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdtstate import Config, wire
from crdtstate.errors import ProtocolError
from crdtstate.events import Event, MemberDown, MemberRetired, MemberUp
from crdtstate.membership import DOWN_DELAY, FORGET_AFTER, LOST_DELAY, SUSPICION, Membership
from crdtstate.wire import Record

CONFIG = Config(retire_after=1000.0, retire_memory_after=100.0)
PEER = 7
"""The number of the link by which records come."""


def record(writer: int, *links: int, seq: int = 1, agent: str | None = None) -> Record:
    name = agent or f"agent-{writer}"
    return Record(writer, writer, seq, name, is_durable=True, links=tuple(sorted(links)))


def gone(known: Record) -> Record:
    return replace(known, is_gone=True)


def item(record: Record) -> tuple[int, int, bytes]:
    """A record as it travels."""
    return record.writer, record.order, wire.encode_record(record)


class Host:
    """A membership with a clock and a log of its events."""

    def __init__(self, *records: Record, writer: int = 1, now: float = 0.0) -> None:
        self.now = now
        self.wall_ms = 1000
        self.events: list[Event] = []
        self.linked: dict[int, bool] = {}
        self.members = Membership(
            record(writer), CONFIG, lambda: self.wall_ms, self.events.append, now
        )
        self.take(*records)

    def take(self, *records: Record) -> None:
        self.members.on_records(map(item, records), PEER)

    def update(self, now: float | None = None, **linked: bool) -> float | None:
        """Compute the states; ``_2=True`` is a link to writer 2 that is silent."""
        self.now = self.now if now is None else now
        if linked:
            self.linked = {int(name[1:]): is_silent for name, is_silent in linked.items()}
        return self.members.update(self.linked, self.now)

    def run(self, until: float) -> None:
        """Compute the states as often as that is due, and no more often."""
        at = self.update()
        while at is not None and at <= until:
            assert at > self.now, "it asks to be asked again at once"
            at = self.update(at)
        self.now = until

    @property
    def states(self) -> dict[int, str | None]:
        return {record.writer: state for record, state in self.members.others()}

    def heard(self) -> list[tuple[str, str]]:
        """The events since the last time, as (what, agent)."""
        events, self.events[:] = self.events.copy(), []
        return [(type(event).__name__, event.agent) for event in events]  # type: ignore[attr-defined]


def exchange(asker: Host, other: Host) -> None:
    """What `mesh` does with a Roll, both ways."""
    orders = asker.members.orders()
    newer = other.members.newer_than(orders)
    wanted = other.members.older_than(orders)
    asker.members.on_records([other.members.item(writer) for writer in newer], PEER)
    back = [writer for writer in asker.members.newer_than(wanted) if writer in wanted]
    other.members.on_records([asker.members.item(writer) for writer in back], PEER)


# Records


RECORDS = st.builds(
    lambda writer, seq, is_gone, links: replace(record(writer, *links, seq=seq), is_gone=is_gone),
    st.integers(2, 6),
    st.integers(1, 5),
    st.booleans(),
    st.sets(st.integers(1, 6)),
)


def unlike(records: Iterable[Record]) -> list[Record]:
    """At most one of each writer and order: nobody says two things at once."""
    return list({(each.writer, each.order): each for each in records}.values())


@settings(deadline=None)
@given(records=st.lists(RECORDS).map(unlike), data=st.data())
def test_the_table_does_not_depend_on_order_and_repetition(
    records: list[Record], data: st.DataObject
) -> None:
    one, two = Host(*records), Host()

    shuffled = data.draw(st.permutations(records + records[: len(records) // 2]))
    for each in shuffled:
        two.take(each)
        two.update()

    assert one.members.orders() == two.members.orders()
    assert one.members.fingerprint == two.members.fingerprint
    newest = {
        each.writer: max(r.order for r in records if r.writer == each.writer) for each in records
    }
    assert one.members.orders() == {**newest, 1: one.members.me.order}


@settings(deadline=None)
@given(one=st.lists(RECORDS).map(unlike), two=st.lists(RECORDS).map(unlike))
def test_two_that_have_exchanged_rolls_agree(one: list[Record], two: list[Record]) -> None:
    both = {(each.writer, each.order): each for each in one + two}
    here = Host(*(both[each.writer, each.order] for each in one))
    there = Host(*(both[each.writer, each.order] for each in two), writer=9)

    exchange(here, there)

    assert here.members.fingerprint == there.members.fingerprint


def test_tables_that_differ_have_different_fingerprints() -> None:
    tables = [
        Host(),
        Host(record(2)),
        Host(record(2, seq=2)),
        Host(replace(record(2), session=5)),
        Host(record(3)),
        Host(record(2), record(3)),
    ]

    assert len({host.members.fingerprint for host in tables}) == len(tables)


def test_a_record_is_news_once_and_with_the_link_it_came_by() -> None:
    host = Host(record(2, seq=5))
    assert host.members.news[2] == PEER
    host.members.news.clear()

    host.take(record(2, seq=5), record(2, seq=4))

    assert host.members.news == {}


def test_a_record_is_passed_on_as_it_came() -> None:
    newer = b"\x9a" + wire.encode_record(record(2))[1:] + b"\xc0"
    host = Host()

    host.members.on_records([(2, record(2).order, newer)], PEER)

    assert host.members.item(2)[2] == newer


def test_junk_is_refused() -> None:
    with pytest.raises(ProtocolError):
        Host().members.on_records([(2, 2, b"\x93\x01\x02\x03")], PEER)


def test_who_asks_for_a_few_records_gets_no_others() -> None:
    host, other = Host(record(2), record(3, seq=9), record(4)), Host(record(3), writer=9)

    assert host.members.older_than({3: record(3, seq=10).order, 4: 2}) == {3: 18}
    assert host.members.newer_than(other.members.orders()) == [1, 2, 3, 4]


# Who is up


def test_all_are_up_to_whom_a_chain_of_links_leads() -> None:
    host = Host(record(2, 1, 3), record(3, 2, 4), record(4, 3))

    host.update(_2=False)

    assert host.states == {2: "up", 3: "up", 4: "up"}
    assert host.heard() == [("MemberUp", f"agent-{writer}") for writer in (2, 3, 4)]


def test_leaves_of_a_relay_are_up_though_it_names_only_some_of_them() -> None:
    relay = replace(record(2, 1, *range(3, 18)), role="relay")
    host = Host(relay, *(record(writer, 2) for writer in range(3, 303)))

    host.update(_2=False)

    assert set(host.states.values()) == {"up"} and len(host.states) == 301
    assert (host.members.count, host.members.relays) == (302, 1)


def test_a_member_is_not_down_while_another_one_hears_it() -> None:
    host = Host(record(2, 1, 3), record(3, 1, 2))
    host.update(_2=False, _3=False)

    host.members.cut_off(3, 0.0)
    host.linked = {2: False}
    host.run(10.0)

    assert host.states == {2: "up", 3: "up"}
    assert host.heard() == [("MemberUp", "agent-2"), ("MemberUp", "agent-3")]


def test_a_member_is_down_when_all_deny_the_links_it_claims() -> None:
    host = Host(record(2, 1, 3), record(3, 1, 2, seq=4))
    host.update(_2=False, _3=False)
    host.heard()

    host.linked = {2: False}
    host.run(1.0)
    assert host.states[3] == "up"
    host.take(replace(record(2, 1, seq=2), lost=((3, 4),)))
    host.run(1.0 + DOWN_DELAY)

    assert host.states == {2: "up", 3: "down"}
    assert host.heard() == [("MemberDown", "agent-3")]


def test_what_is_denied_of_an_old_record_is_not_denied_of_a_newer_one() -> None:
    host = Host(replace(record(2, 1), lost=((3, 4),)), record(3, 2, seq=5))

    host.update(_2=False)

    assert host.states[3] == "up"


def test_of_a_partition_all_beyond_are_down_and_up_again_without_a_word_of_theirs() -> None:
    host = Host(record(2, 1, 3), record(3, 2, 4), record(4, 3))
    host.update(_2=False)
    host.heard()

    host.take(replace(record(2, 1, seq=2), lost=((3, 1),)))
    host.run(1.0)
    assert host.states == {2: "up", 3: "down", 4: "down"}
    host.take(record(2, 1, 3, seq=3))
    host.run(2.0)

    assert host.states == {2: "up", 3: "up", 4: "up"}
    names = ("agent-3", "agent-4")
    assert host.heard() == [(k, n) for k in ("MemberDown", "MemberUp") for n in names]


def test_records_of_one_event_that_arrive_one_by_one_make_nobody_down() -> None:
    host = Host(record(2, 1, 3), record(3, 2))
    host.update(_2=False)
    host.heard()

    host.take(replace(record(2, 1, seq=2), lost=((3, 1),)))
    host.run(DOWN_DELAY / 2)
    host.take(record(4, 1, 3), record(3, 4, seq=2))
    host.update(_2=False, _4=False)
    host.run(5.0)

    assert host.heard() == [("MemberUp", "agent-4")]


def test_one_of_whom_we_hear_before_its_neighbours_is_down_for_nobody() -> None:
    host = Host(record(4, 3))
    host.update(_2=False)
    assert host.states == {}
    host.take(record(2, 1, 3), record(3, 2, 4))

    host.run(LOST_DELAY)

    assert host.states == {2: "up", 3: "up", 4: "up"}
    assert all(what == "MemberUp" for what, _ in host.heard())


def test_who_was_never_up_is_down_without_an_event() -> None:
    host = Host(record(4, 3))

    host.run(60.0)

    assert host.states == {4: "down"} and host.heard() == []


# Suspicion


def test_a_silent_neighbour_is_suspected_and_up_when_it_speaks() -> None:
    host = Host(record(2, 1))
    host.update(_2=False)

    host.update(3.0, _2=True)
    host.update(4.0, _2=True)
    host.update(5.0, _2=False)

    heard = [("MemberUp", "agent-2"), ("MemberSuspected", "agent-2"), ("MemberUp", "agent-2")]
    assert host.heard() == heard


def test_one_that_died_is_not_up_again_before_it_is_down() -> None:
    """Each of its neighbours notices in its own time; till the last one has, it is claimed."""
    host = Host(record(2, 1, 3), record(3, 1, 2))
    host.update(_2=False, _3=False)
    host.heard()

    host.update(1.0, _2=False, _3=True)
    host.members.cut_off(3, 10.0)
    host.update(10.0, _2=False)
    host.run(10.5)
    host.take(replace(record(2, 1, seq=2), lost=((3, 1),)))
    host.run(60.0)

    assert host.heard() == [("MemberSuspected", "agent-3"), ("MemberDown", "agent-3")]


def test_one_that_others_go_on_to_hear_is_suspected_for_a_while() -> None:
    host = Host(record(2, 1, 3), record(3, 1, 2))
    host.update(0.0, _2=False, _3=True)
    host.heard()

    host.update(0.0, _2=False)
    host.run(SUSPICION - 0.1)
    assert host.states[3] == "suspected"
    host.run(SUSPICION)

    assert host.heard() == [("MemberUp", "agent-3")]


# The own record


@pytest.mark.parametrize("is_gone", [False, True])
def test_what_others_say_of_oneself_is_outdone(is_gone: bool) -> None:
    host = Host()

    host.take(replace(record(1, 5, seq=10_000), is_gone=is_gone))

    assert host.members.me.order > record(1, seq=10_000).order + 1
    assert not host.members.me.is_gone and host.members.me.links == ()
    assert host.members.news[1] is None


def test_one_whom_others_retired_is_up_again_everywhere() -> None:
    host, other = Host(), Host(record(1, 9), writer=9)
    mine = host.members.me
    other.take(gone(mine))
    other.run(1.0)

    exchange(host, other)
    exchange(host, other)
    other.update(_1=False)

    assert other.states == {1: "up"}
    assert host.members.orders() == other.members.orders()


def test_own_records_rise_although_the_wall_clock_runs_backwards() -> None:
    host, seqs = Host(), []

    for wall_ms, links in ((5000, (2,)), (100, (2, 3)), (1, (3,)), (6000, ())):
        host.wall_ms = wall_ms
        host.members.publish(links, set(links), 0.0)
        seqs.append(host.members.me.seq)

    assert seqs == [5000, 5001, 5002, 6000]


def test_a_restart_with_a_clock_set_back_is_believed_once_it_meets_somebody() -> None:
    other = Host(writer=9)
    first = Host()
    first.wall_ms = 9000
    first.members.publish((9,), {9}, 0.0)
    exchange(first, other)

    again = Host()
    exchange(again, other)
    exchange(again, other)

    assert again.members.me.seq > 9000
    assert again.members.orders() == other.members.orders()


def test_nothing_is_published_without_news() -> None:
    host = Host()
    host.members.publish((2, 3), {2, 3}, 0.0)
    before = host.members.me

    host.members.publish((2, 3), {2, 3}, 9.0)

    assert host.members.me is before


def test_links_that_others_claim_are_denied_after_a_while_and_no_longer_than_claimed() -> None:
    host = Host(record(2, 1, seq=3), record(3, 1))

    host.members.publish((3,), {3}, 0.0)
    assert host.members.me.lost == ()
    host.members.publish((3,), {3}, LOST_DELAY)
    assert host.members.me.lost == ((2, 3),)
    host.take(record(2, seq=4))
    host.members.publish((3,), {3}, LOST_DELAY)

    assert host.members.me.lost == ()


def test_a_link_that_broke_is_denied_at_once() -> None:
    host = Host(record(2, 1, seq=3))
    host.members.publish((2,), {2}, 0.0)

    host.members.cut_off(2, 5.0)
    host.members.publish((), set(), 5.0)

    assert host.members.me.lost == ((2, 3),)


def test_a_record_never_denies_more_than_it_may_and_nobody_is_up_for_that() -> None:
    count = wire.LOST_MAX + 100
    host = Host(*(record(writer, 1, seq=2**52 - writer) for writer in range(2, 2 + count)))

    host.members.publish((), set(), 0.0)
    host.members.publish((), set(), LOST_DELAY)

    assert len(host.members.me.lost) == wire.LOST_MAX
    assert wire.decode_record(host.members.item(1)[2]) == host.members.me
    other = Host(writer=9999)
    exchange(other, host)
    other.update(_1=False)
    other.run(LOST_DELAY)
    assert set(other.states.values()) == {"up", "down"}
    assert [writer for writer, state in other.states.items() if state == "up"] == [1]
    gone_ones = set(range(2, 2 + count)) - other.states.keys()
    assert gone_ones == set(range(2 + wire.LOST_MAX, 2 + count))


# Restarts


def test_a_restart_as_the_same_writer_is_one_member_in_a_new_session() -> None:
    host = Host(record(2, 1, seq=5))
    host.update(_2=False)

    host.take(replace(record(2, seq=6), session=77))
    host.run(1.0)

    assert host.heard() == [("MemberUp", "agent-2")]
    assert len(host.members) == 2


def test_of_two_writers_of_one_agent_the_older_retires_when_it_is_down() -> None:
    host = Host(record(2, 1, seq=5))
    host.update(_2=False)

    host.take(record(3, 1, seq=6, agent="agent-2"))
    host.update(1.0, _3=False)
    host.run(2.0)

    assert host.states == {2: "retired", 3: "up"}
    assert host.events == [
        MemberUp("agent-2", 2, "agent"),
        MemberUp("agent-2", 3, "agent"),
        MemberDown("agent-2", 2, "agent"),
        MemberRetired("agent-2", 2, "agent"),
    ]


def test_two_living_members_of_one_name_are_two() -> None:
    host = Host(record(2, 1, seq=5), record(3, 1, seq=6, agent="agent-2"))

    host.update(_2=False, _3=False)
    host.run(60.0)

    assert host.states == {2: "up", 3: "up"}
    assert host.members.count == 3


# Leaving


def test_a_goodbye_retires_without_being_down() -> None:
    host = Host(record(2, 1))
    host.update(_2=False)

    host.take(gone(record(2, seq=2)))
    host.run(60.0)

    assert host.heard() == [("MemberUp", "agent-2"), ("MemberRetired", "agent-2")]
    assert host.members.count == 1


def test_two_processes_of_one_writer_find_each_other_out_and_one_that_restarts_does_not() -> None:
    one, copy = Host(), Host()
    copy.members.me = replace(copy.members.me, session=99)
    for turn in range(1, 10):
        for sender, taker in ((one, copy), (copy, one)):
            taker.wall_ms = sender.wall_ms = taker.wall_ms + 50
            sender.members.publish((turn,), set(), 0.0)
            taker.take(sender.members.me)
        if one.members.has_rival:
            break
    assert one.members.has_rival and copy.members.has_rival and turn > 1
    one.members.rename(record(2))
    assert not one.members.has_rival

    restarted = Host()
    for seq in (5, 800, 900, 1005):
        # What the session before said, in any order; the last just before it ended.
        restarted.take(replace(record(1, 3, seq=seq), session=98))
        restarted.take(gone(replace(record(1, seq=seq), session=98)))
    for seq in (5000, 6000, 7000, 8000):
        # What was said of this very session, whoever passes it on.
        restarted.take(record(1, 3, seq=seq))
    assert not restarted.members.has_rival


def test_to_leave_is_to_say_so_in_the_own_record() -> None:
    host, other = Host(), Host(writer=9)
    host.members.publish((9,), {9}, 0.0)
    exchange(other, host)
    other.update(_1=False)

    host.members.leave()
    exchange(other, host)
    other.update()

    assert other.heard() == [("MemberUp", "agent-1"), ("MemberRetired", "agent-1")]


def test_one_that_comes_back_after_a_goodbye_is_not_down_before_it_is_up() -> None:
    host = Host(record(2, 1), record(3, 1, 2))
    host.update(_2=False, _3=False)
    host.take(gone(record(2, seq=2)), record(3, 1, seq=2))
    host.update(1.0, _3=False)
    host.run(100.0)
    host.heard()

    # Its first record names no links, and its neighbour's has not come.
    host.take(record(2, seq=3))
    host.run(100.0 + LOST_DELAY / 2)
    host.take(record(3, 1, 2, seq=3))
    host.run(200.0)

    assert host.heard() == [("MemberUp", "agent-2")]


def test_a_goodbye_that_is_outdone_before_anybody_looked_is_none() -> None:
    host = Host(record(2, 1))
    host.update(_2=False)

    host.take(gone(record(2, 1)), record(2, 1, seq=2))
    host.run(60.0)

    assert host.heard() == [("MemberUp", "agent-2")]


def test_a_new_writer_of_this_replica_says_goodbye_for_the_old_one() -> None:
    host, other = Host(), Host(writer=9)
    exchange(other, host)
    other.update(_1=False)

    host.members.rename(record(5, agent="agent-1"))
    exchange(other, host)
    other.update(_5=False)

    assert other.states == {1: "retired", 5: "up"}
    assert host.members.me.writer == 5 and 1 in host.members


@pytest.mark.parametrize("is_durable", [False, True])
def test_a_member_that_is_down_for_long_retires_and_those_without_a_store_sooner(
    is_durable: bool,
) -> None:
    host = Host(replace(record(2, 1), is_durable=is_durable))
    host.update(_2=False)
    host.linked = {}
    after = CONFIG.retire_after if is_durable else CONFIG.retire_memory_after

    host.run(after - 1)
    assert host.states == {2: "down"} and host.members.count == 1
    host.run(after + 1)

    assert host.states == {2: "retired"} and host.members.count == 1
    heard = ["MemberUp", "MemberDown", "MemberRetired"]
    assert host.heard() == [(what, "agent-2") for what in heard]
    assert wire.decode_record(host.members.item(2)[2]).is_gone


def test_members_retire_for_all_who_hear_that_they_did() -> None:
    one, two = Host(record(2, 1), record(9, 1)), Host(record(2, 9), record(1, 9), writer=9)
    one.update(_2=False, _9=False)
    two.update(_2=False, _1=False)
    one.linked, two.linked = {9: False}, {1: False}

    one.run(CONFIG.retire_after + 1)
    two.run(DOWN_DELAY)
    exchange(two, one)
    two.run(1.0)

    assert two.states[2] == "retired"


# Forgetting


def test_a_retired_member_is_forgotten_in_the_end() -> None:
    host = Host(record(2, 1), gone(record(3)))
    empty = Host().members.fingerprint
    host.update(_2=False)
    host.take(gone(record(2)))

    host.run(FORGET_AFTER + 1)

    assert len(host.members) == 1 and host.states == {}
    assert host.members.fingerprint == empty


def test_nobody_reminds_of_one_that_was_forgotten() -> None:
    """Each forgets in its own time, and all the time somebody joins. If one were told by those
    who still know, and they by it, it would be remembered for ever."""
    late = gone(record(2))
    one, two = Host(late), Host(writer=9)
    two.now = FORGET_AFTER / 2
    two.take(late)
    two.run(FORGET_AFTER + 1)
    one.run(FORGET_AFTER + 1)
    assert 2 in two.members and 2 not in one.members
    exchange(one, two)
    exchange(two, one)

    newcomer = Host(writer=8)
    exchange(newcomer, two)
    exchange(two, newcomer)

    assert 2 not in one.members and 2 not in newcomer.members
    two.run(2 * FORGET_AFTER)
    assert 2 not in two.members


def test_while_it_is_remembered_an_older_record_does_not_bring_a_member_back() -> None:
    host, stale = Host(gone(record(2, seq=5))), Host(record(2, 9, seq=5), writer=9)
    host.update()

    exchange(host, stale)
    exchange(stale, host)
    stale.run(1.0)

    assert host.states[2] == stale.states[2] == "retired"
    assert host.members.fingerprint == stale.members.fingerprint


# Bounds


def test_the_table_is_bounded_and_makes_room_by_forgetting_who_does_not_count() -> None:
    host = Host(*(record(writer) for writer in range(2, wire.MEMBERS_MAX + 1)))
    host.take(record(99_998))
    assert len(host.members) == wire.MEMBERS_MAX and 99_998 not in host.members

    host.run(LOST_DELAY)
    host.take(record(99_999))

    assert len(host.members) == wire.MEMBERS_MAX
    assert 99_999 in host.members and 1 in host.members


def test_states_of_a_large_table_settle_without_being_asked_for_all_the_time() -> None:
    host = Host(record(2, 1), *(record(writer, 2) for writer in range(3, 300)))
    host.update(_2=False)
    host.linked = {}

    asked = 0
    while (at := host.update()) is not None and asked < 100:
        host.now, asked = at, asked + 1

    assert asked <= 10
    assert set(host.states.values()) <= {"retired"}


def test_no_event_comes_twice_however_links_flap() -> None:
    host = Host(record(2, 1, 3), record(3, 2))

    for step in range(200):
        is_up = step % 3 != 0
        host.take(
            replace(
                record(2, 1, *([3] if is_up else []), seq=step + 2), lost=() if is_up else ((3, 1),)
            )
        )
        host.update(step * 0.15, **({"_2": step % 5 == 0}))
        if step % 7 == 0:
            host.linked = {}

    last: dict[str, str] = {}
    for what, agent in host.heard():
        assert last.get(agent) != what, f"{what} twice in a row of {agent}"
        last[agent] = what


# A complete mesh


def test_a_mesh_is_complete_when_everybody_names_everybody() -> None:
    host = Host(record(2, 1, 3), record(3, 1))

    host.update(_2=False, _3=False)
    assert not host.members.is_complete
    host.take(record(3, 1, 2, seq=2))
    host.update()
    assert host.members.is_complete
    host.update(_2=False)

    assert not host.members.is_complete


def test_who_is_down_is_not_waited_for_by_a_complete_mesh() -> None:
    host = Host(record(2, 1), record(3, 1))
    host.update(_2=False, _3=False)

    host.update(_2=False)
    host.run(1.0)

    assert host.states[3] == "down" and host.members.is_complete


def test_members_are_listed_with_oneself() -> None:
    host = Host(record(2, 1), record(4, 3))

    host.update(_2=False)

    found = [(member.agent, member.state, member.is_self) for member in host.members.members()]
    assert found == [("agent-1", "up", True), ("agent-2", "up", False)]


def test_a_record_that_was_under_way_when_its_member_died_delays_nothing() -> None:
    host = Host(record(2, 1, seq=5))
    host.update(_2=False)
    host.linked = {}
    host.members.cut_off(2, host.now)

    host.take(record(2, 1, 3, seq=6))
    host.members.publish((), set(), host.now)

    assert host.members.me.lost == ((2, 6),)
