"""Limits, bans and buckets: laws, and what the settings refuse."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdtstate import Config, Limits, UsageError
from crdtstate.bans import CULPRITS_MAX, Bans, Bucket, Offence, address_of, is_loopback

LIMITS = Limits()

seconds = st.floats(0, 10_000, allow_nan=False)


# Settings


@pytest.mark.parametrize("field", [each.name for each in fields(Limits)])
def test_a_limit_is_a_number_above_0(field):
    for wrong in (0, -1, "8", None, True if field != "spare_loopback" else 1):
        with pytest.raises(UsageError, match=f"Limits.{field}"):
            Limits(**{field: wrong})


def test_limits_are_part_of_the_configuration():
    assert Config().limits == LIMITS
    assert Config(limits=Limits(half_open=3)).limits.half_open == 3
    with pytest.raises(UsageError, match="Config.limits is a crdtstate.Limits"):
        Config(limits={"half_open": 3})
    with pytest.raises(UsageError, match="Config.tls_binding is True or False"):
        Config(tls_binding=1)


# Buckets


@given(
    rate=st.floats(1, 1e6),
    burst=st.floats(1, 1e6),
    takes=st.lists(st.tuples(seconds, st.floats(0, 1e5)), max_size=50),
)
def test_who_waits_as_told_never_gets_more_than_the_rate_allows(rate, burst, takes):
    bucket, now, taken, last = Bucket(rate, burst, 0.0), 0.0, 0.0, 0.0
    for pause, amount in takes:
        now += pause
        wait = bucket.take(amount, now)
        taken += amount
        last = amount
        assert taken - last <= (burst + rate * now) * (1 + 1e-9) + 1e-6
        now += wait
    assert taken <= (burst + rate * now) * (1 + 1e-6) + 1e-3


@given(st.lists(st.integers(0, 1000), max_size=50))
def test_who_stays_below_the_rate_never_waits(pauses):
    bucket, now = Bucket(16, 8, 0.0), 0.0
    for pause in pauses:
        now += pause / 16
        assert bucket.take(min(8, pause), now) == 0


def test_a_debt_is_paid_off_by_waiting_and_not_more():
    bucket = Bucket(rate=10, burst=20, now=0)

    assert bucket.take(20, 0) == 0
    assert bucket.take(5, 0) == pytest.approx(0.5)
    assert bucket.take(0, 0.25) == pytest.approx(0.25)
    assert bucket.take(0, 0.5) == 0
    assert bucket.take(20, 1000) == 0 and bucket.take(1, 1000) > 0


def test_a_clock_that_goes_back_gives_nothing():
    bucket = Bucket(rate=10, burst=1, now=100)
    bucket.take(1, 100)

    assert bucket.take(1, 50) == pytest.approx(0.1)
    assert bucket.take(0, 100) == pytest.approx(0.1)


# Bans


def test_the_fifth_handshake_that_fails_within_a_minute_is_a_ban():
    """A07: so the sixth try is refused."""
    bans = Bans(LIMITS)
    for number in range(4):
        assert bans.blame_handshake("1.2.3.4", number * 12) == 0

    assert bans.blame_handshake("1.2.3.4", 59) == LIMITS.ban_time
    assert bans.left("1.2.3.4", 59) == 60 and bans.left("1.2.3.5", 59) == 0
    assert bans.left("1.2.3.4", 119) == 0


def test_mistakes_now_and_then_are_forgotten():
    bans = Bans(LIMITS)
    for number in range(1000):
        assert bans.blame("k", Offence.BAD_FRAME, number * 121) == 0
        assert bans.blame("slow", Offence.SLOW, number * 30) == 0


def test_each_ban_is_twice_as_long_up_to_an_hour_and_a_clean_day_begins_anew():
    bans, now, lengths = Bans(LIMITS), 0.0, []
    for _ in range(9):
        lengths.append(bans.blame(b"key", Offence.FORGERY, now))
        now += lengths[-1]
    assert lengths == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]

    assert bans.blame(b"key", Offence.FORGERY, now + LIMITS.ban_memory) == 60


def test_what_is_done_while_banned_does_not_prolong_it_but_weighs_afterwards():
    bans = Bans(LIMITS)
    bans.blame("x", Offence.FORGERY, 0)

    assert bans.blame("x", Offence.FORGERY, 30) == 30
    assert bans.score("x", 30) == 100
    assert bans.blame("x", Offence.BAD_FRAME, 61) == 120


offences = st.lists(
    st.tuples(st.sampled_from(["a", "b", b"c"]), st.sampled_from(list(Offence)), seconds),
    max_size=60,
)


@given(offences)
def test_laws_of_bans(history):
    """Scores are never below 0, bans never longer than the longest, one culprit's offences are
    not another's, and the score without decay bounds that with it."""
    bans, now, blamed = Bans(LIMITS), 0.0, dict.fromkeys(["a", "b", b"c"], 0.0)
    for culprit, offence, pause in history:
        now += pause
        before = {each: bans.score(each, now) for each in blamed}
        left = bans.blame(culprit, offence, now)
        blamed[culprit] += offence
        assert 0 <= left <= LIMITS.ban_time_max
        assert left == bans.left(culprit, now)
        for each in blamed:
            assert 0 <= bans.score(each, now) <= blamed[each]
            if each != culprit:
                assert bans.score(each, now) == before[each]
    assert all(bans.left(each, now + LIMITS.ban_time_max) == 0 for each in blamed)


def test_an_attacker_with_many_addresses_takes_no_more_memory():
    bans = Bans(LIMITS)
    for number in range(CULPRITS_MAX + 1000):
        bans.blame(str(number), Offence.SLOW, number / 1000)

    assert len(bans) == CULPRITS_MAX
    assert bans.score("0", 11) == 0 and bans.score(str(CULPRITS_MAX), 11) > 0


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("10.0.0.5", "10.0.0.5"),
        ("::ffff:10.0.0.5", "10.0.0.5"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("whatever", "whatever"),
    ],
)
def test_an_address_is_what_one_site_has(host, address):
    assert address_of(host) == address


def test_loopback_is_told_from_others():
    for host in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"):
        assert is_loopback(host)
    for host in ("10.0.0.1", "::2", "localhost", "", "127.0.0.1.example"):
        assert not is_loopback(host)
