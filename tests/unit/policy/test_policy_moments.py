# SPDX-License-Identifier: Apache-2.0
"""Windows of time and addresses: what the clocks of a zone show, to the second, and what an unknown moment means.

The sharp edges: hours that a clock skips or shows twice, windows past midnight, a day that a whole country skipped,
the first and the last second, and rules whose condition nobody can decide.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import itertools
import zoneinfo
from typing import TYPE_CHECKING

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from bednet.errors import Place
from bednet.moment import all_of, any_of, instant_text, parse_instant, within
from bednet.policy import Access, Effect, Grant, Moment, Rule, Window, decide_by

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bednet.moment import Network

BERLIN = "Europe/Berlin"
EVERY_DAY = frozenset(range(7))
ZONES = (
    "UTC",
    BERLIN,
    "America/New_York",
    "America/St_Johns",  # its clocks change at one minute past midnight, until 2011
    "Australia/Lord_Howe",  # by half an hour
    "Antarctica/Troll",  # by two hours
    "Asia/Kathmandu",  # 5:45
    "Pacific/Apia",  # no 30 December 2011
    "Africa/Casablanca",  # back for Ramadan
)
# Instants at which one of their clocks is changed, in seconds of unix time.
CHANGES = [
    int(parse_instant(text).timestamp())
    for text in (
        "2026-03-29T01:00:00Z",
        "2026-10-25T01:00:00Z",
        "2026-03-08T07:00:00Z",
        "2026-11-01T06:00:00Z",
        "2010-03-14T03:31:00Z",
        "2010-11-07T02:31:00Z",
        "2026-04-04T15:00:00Z",
        "2026-10-03T15:30:00Z",
        "2011-12-30T10:00:00Z",
        "2026-02-15T02:00:00Z",
        "2026-03-22T02:00:00Z",
    )
]


def utc(text: str) -> dt.datetime:
    return parse_instant(text)


def oracle(window: Window, at: dt.datetime) -> bool:
    """What the clocks show, and whether that is in the window that began today or yesterday."""
    offset = at.astimezone(zoneinfo.ZoneInfo(window.zone)).utcoffset()
    assert offset is not None
    wall = at.astimezone(dt.UTC).replace(tzinfo=None, microsecond=0) + offset
    length = window.end - window.start + (86400 if window.end <= window.start else 0)
    for days_ago in (0, 1):
        begin = dt.datetime.combine(wall.date() - dt.timedelta(days=days_ago), dt.time())
        if begin.weekday() in window.days:
            begin += dt.timedelta(seconds=window.start)
            if begin <= wall < begin + dt.timedelta(seconds=length):
                return True
    return False


seconds = st.one_of(st.integers(0, 86399), st.sampled_from([0, 1, 3599, 3600, 7199, 7200, 9000, 10800, 86399]))
windows = st.builds(
    Window,
    st.frozensets(st.integers(0, 6), min_size=1),
    seconds,
    st.one_of(seconds, st.just(86400)),
    st.sampled_from(ZONES),
)
near_changes = st.builds(
    lambda change, distance: dt.datetime.fromtimestamp(change + distance, dt.UTC),
    st.sampled_from(CHANGES),
    st.one_of(st.integers(-90_000, 90_000), st.sampled_from([-3601, -3600, -1, 0, 1, 3599, 3600])),
)
instants = st.one_of(
    near_changes, st.datetimes(dt.datetime(2000, 1, 1), dt.datetime(2099, 1, 1), timezones=st.just(dt.UTC))
)


@settings(max_examples=500, deadline=None)
@given(windows, instants)
def test_a_window_holds_when_the_clocks_say_so(window: Window, at: dt.datetime) -> None:
    event(f"holds: {window.holds(at)}")
    assert window.holds(at) is oracle(window, at)


@settings(max_examples=200, deadline=None)
@given(windows, instants)
@example(Window(EVERY_DAY, 8100, 9900, BERLIN), utc("2026-03-28T23:00:00Z"))
@example(Window(frozenset([6]), 8100, 9900, BERLIN), utc("2026-03-22T04:00:00Z"))
def test_the_next_change_is_the_first_one(window: Window, at: dt.datetime) -> None:
    change = window.next_change(at)
    second = dt.timedelta(seconds=1)
    end = at + dt.timedelta(days=10) if change is None else change - second
    quarter = dt.timedelta(minutes=7)
    between = [at + quarter * number for number in range(int((end - at) / quarter) + 1)]
    assert {window.holds(moment) for moment in between} == {window.holds(at)}
    if change is None:
        event("never")
        assert window.always or 86400 * len(window.days) > 86400 * 6 or window.start == window.end
    else:
        assert at < change
        assert change.microsecond == 0
        assert window.holds(change) is not window.holds(at)
        assert window.holds(change - dt.timedelta(microseconds=1)) is window.holds(at)


@pytest.mark.parametrize(
    ("days", "hours", "at", "holds"),
    [
        # to the second
        ({0}, (21600, 79200), "2026-03-02T05:59:59.999999+01:00", False),
        ({0}, (21600, 79200), "2026-03-02T06:00:00+01:00", True),
        ({0}, (21600, 79200), "2026-03-02T21:59:59.999999+01:00", True),
        ({0}, (21600, 79200), "2026-03-02T22:00:00+01:00", False),
        ({0}, (21600, 79200), "2026-03-03T12:00:00+01:00", False),
        # the whole day
        ({0}, (0, 86400), "2026-03-02T00:00:00+01:00", True),
        ({0}, (0, 86400), "2026-03-02T23:59:59+01:00", True),
        ({0}, (0, 86400), "2026-03-03T00:00:00+01:00", False),
        # past midnight it belongs to the day on which it began
        ({4}, (79200, 21600), "2026-03-06T21:59:59+01:00", False),
        ({4}, (79200, 21600), "2026-03-06T22:00:00+01:00", True),
        ({4}, (79200, 21600), "2026-03-07T05:59:59+01:00", True),
        ({4}, (79200, 21600), "2026-03-07T06:00:00+01:00", False),
        ({4}, (79200, 21600), "2026-03-06T05:00:00+01:00", False),
        ({6}, (79200, 21600), "2026-03-09T05:00:00+01:00", True),  # Sunday's runs into Monday
        ({0}, (79200, 0), "2026-03-02T23:59:59+01:00", True),
        ({0}, (79200, 0), "2026-03-03T00:00:00+01:00", False),
        # spring: from 02:00 to 03:00 on the last Sunday of March
        (EVERY_DAY, (9000, 10800), "2026-03-29T01:59:59+01:00", False),
        (EVERY_DAY, (9000, 10800), "2026-03-29T03:00:00+02:00", False),
        (EVERY_DAY, (3600, 9000), "2026-03-29T01:59:59+01:00", True),
        (EVERY_DAY, (3600, 9000), "2026-03-29T02:00:00+01:00", False),  # which is 03:00
        (EVERY_DAY, (9000, 12600), "2026-03-29T03:00:00+02:00", True),
        # autumn: from 03:00 back to 02:00 on the last Sunday of October
        (EVERY_DAY, (8100, 9900), "2026-10-25T02:15:00+02:00", True),
        (EVERY_DAY, (8100, 9900), "2026-10-25T02:45:00+02:00", False),
        (EVERY_DAY, (8100, 9900), "2026-10-25T02:15:00+01:00", True),
        (EVERY_DAY, (8100, 9900), "2026-10-25T02:45:00+01:00", False),
        # the offset of the question does not matter
        ({0}, (21600, 79200), "2026-03-02T10:00:00+05:00", True),
        ({0}, (21600, 79200), "2026-03-02T09:59:59+05:00", False),
    ],
)
def test_edges_of_windows_in_berlin(days: Iterable[int], hours: tuple[int, int], at: str, holds: bool) -> None:
    assert Window(frozenset(days), *hours, BERLIN).holds(utc(at)) is holds


def test_a_day_that_a_country_skipped_has_no_windows() -> None:
    friday = Window(frozenset([4]), 0, 86400, "Pacific/Apia")
    hours = [utc("2011-12-28T00:00:00Z") + dt.timedelta(hours=number) for number in range(24 * 5)]
    assert [hour for hour in hours if friday.holds(hour)] == []


@pytest.mark.parametrize(
    ("days", "start", "end", "text"),
    [
        (EVERY_DAY, 21600, 79200, "every day 06:00-22:00 Europe/Berlin"),
        ({0, 1, 2, 3, 4}, 0, 86400, "mon-fri Europe/Berlin"),
        ({5, 6}, 0, 43200, "sat, sun 00:00-12:00 Europe/Berlin"),
        ({0, 2, 4}, 3605, 7200, "mon, wed, fri 01:00:05-02:00 Europe/Berlin"),
    ],
)
def test_a_window_in_words(days: Iterable[int], start: int, end: int, text: str) -> None:
    assert str(Window(frozenset(days), start, end, BERLIN)) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:01Z", 1),
        ("1970-01-01t01:00:01+01:00", 1),
        ("1969-12-31 23:00:01-01:00", 1),
        ("1970-01-01T00:00:01.5Z", 1.5),
        ("1970-01-01T00:00:01.1234567899z", 1.123456),
        ("1970-01-01T00:00:01-00:00", 1),
    ],
)
def test_instants_of_rfc_3339(text: str, seconds: float) -> None:
    assert parse_instant(text).timestamp() == seconds
    assert parse_instant(text).tzinfo is dt.UTC
    assert parse_instant(instant_text(parse_instant(text))) == parse_instant(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2026-03-29",
        "2026-03-29T02:30:00",
        "2026-03-29T02:30Z",
        "20260329T023000Z",
        "2026-02-29T00:00:00Z",
        "2026-13-01T00:00:00Z",
        "2026-03-29T24:00:00Z",
        "2026-12-31T23:59:60Z",
        "2026-03-29T02:30:00+25:00",
        "2026-03-29T02:30:00 Europe/Berlin",
        "٢026-03-29T02:30:00Z",
        "2026-03-29T02:30:00Z\n",
    ],
)
def test_what_is_no_instant(text: str) -> None:
    with pytest.raises(ValueError, match=r"RFC 3339|month|hour|second|day|offset|range"):
        parse_instant(text)


def test_a_moment_knows_its_offset() -> None:
    with pytest.raises(ValueError, match="needs a time zone"):
        Moment(dt.datetime(2026, 3, 2, 12))


@pytest.mark.parametrize(
    ("address", "network", "inside"),
    [
        ("10.20.0.0", "10.20.0.0/16", True),
        ("10.20.255.255", "10.20.0.0/16", True),
        ("10.21.0.0", "10.20.0.0/16", False),
        ("10.19.255.255", "10.20.0.0/16", False),
        ("192.0.2.1", "0.0.0.0/0", True),
        ("2001:db8::1", "0.0.0.0/0", False),
        ("192.0.2.1", "::/0", False),
        ("::ffff:10.20.1.1", "10.20.0.0/16", True),
        ("::ffff:10.21.1.1", "10.20.0.0/16", False),
        ("::ffff:10.20.1.1", "::/0", False),
        ("2001:db8:ffff:ffff::", "2001:db8::/32", True),
        ("2001:db9::", "2001:db8::/32", False),
        ("fe80::1%eth0", "fe80::/10", True),
    ],
)
def test_addresses_and_networks(address: str, network: str, inside: bool) -> None:
    assert within(ipaddress.ip_address(address), ipaddress.ip_network(network)) is inside


ANSWERS: tuple[bool | None, ...] = (True, False, None)


@pytest.mark.parametrize("answers", list(itertools.product(ANSWERS, repeat=3)))
def test_what_is_unknown_counts_only_where_it_cannot_matter(answers: tuple[bool | None, ...]) -> None:
    completions = list(itertools.product(*((answer,) if answer is not None else (True, False) for answer in answers)))
    conjunctions = {all(completion) for completion in completions}
    disjunctions = {any(completion) for completion in completions}
    assert all_of(answers) is (conjunctions.pop() if len(conjunctions) == 1 else None)
    assert any_of(answers) is (disjunctions.pop() if len(disjunctions) == 1 else None)


# Rules with conditions that can be chosen one by one: hour n and address n are within for those rules whose bit is set.

HOURS = [utc("2026-03-02T00:30:00Z") + dt.timedelta(hours=number) for number in range(4)]
ADDRESSES = [ipaddress.ip_address(f"192.0.2.{number}") for number in range(4)]
TOPICS = ("a", "a/b", "a/b/c", "b", "b/c")
FILTERS = (*TOPICS, "#", "+", "a/#", "a/+", "+/b", "+/#", "a/+/c")


def during(bit: int) -> tuple[Window, ...]:
    """Windows that are open in those of the four hours whose number has this bit."""
    hours = [number for number in range(4) if number >> bit & 1]
    return tuple(Window(EVERY_DAY, 3600 * number, 3600 * (number + 1), "UTC") for number in hours)


def networks(bit: int) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(f"192.0.2.{number}") for number in range(4) if number >> bit & 1)


@st.composite
def grants_with_conditions(draw: st.DrawFn, *, independent: bool) -> tuple[Grant, ...]:
    """Draw rules; each bit of time and of address is used by one of them at most when they are to be independent."""
    found = []
    bits = {"time": [None, 0, 1], "address": [None, 0, 1]}
    for number in range(draw(st.integers(1, 5))):
        chosen = {}
        for kind, free in bits.items():
            chosen[kind] = draw(st.sampled_from(free))
            if independent and chosen[kind] is not None:
                free.remove(chosen[kind])
        rule = Rule(
            f"r/{number}",
            "rule",
            draw(st.sampled_from(Effect)),
            draw(st.sampled_from(Access)),
            draw(st.sampled_from(FILTERS)),
            Place("p", number),
            () if chosen["time"] is None else during(chosen["time"]),
            () if chosen["address"] is None else networks(chosen["address"]),
        )
        found.append(Grant(rule, rule.template))
    return tuple(found)


def allowed(grants: tuple[Grant, ...], access: Access, topic: str, moment: Moment, *, generous: bool = False) -> bool:
    return decide_by(grants, access, topic, moment, generous=generous).allowed


questions = st.one_of(
    st.tuples(st.just(Access.PUBLISH), st.sampled_from(TOPICS)),
    st.tuples(st.just(Access.SUBSCRIBE), st.sampled_from(FILTERS)),
)
MOMENTS = [Moment(at, address) for at in HOURS for address in ADDRESSES]


@settings(max_examples=300, deadline=None)
@given(grants_with_conditions(independent=True), questions)
def test_unknown_is_the_worst_case_over_all_moments(grants: tuple[Grant, ...], question: tuple[Access, str]) -> None:
    answers = {allowed(grants, *question, moment) for moment in MOMENTS}
    event(f"answers: {sorted(answers)}")
    assert allowed(grants, *question, Moment()) is (answers == {True})
    assert allowed(grants, *question, Moment(), generous=True) is (True in answers)
    for at in HOURS:
        answers = {allowed(grants, *question, Moment(at, address)) for address in ADDRESSES}
        assert allowed(grants, *question, Moment(at)) is (answers == {True})
        assert allowed(grants, *question, Moment(at), generous=True) is (True in answers)
    for address in ADDRESSES:
        answers = {allowed(grants, *question, Moment(at, address)) for at in HOURS}
        assert allowed(grants, *question, Moment(None, address)) is (answers == {True})
        assert allowed(grants, *question, Moment(None, address), generous=True) is (True in answers)


@settings(max_examples=300, deadline=None)
@given(grants_with_conditions(independent=False), questions)
def test_unknown_never_promises_too_much(grants: tuple[Grant, ...], question: tuple[Access, str]) -> None:
    answers = {allowed(grants, *question, moment) for moment in MOMENTS}
    assert not allowed(grants, *question, Moment()) or answers == {True}
    assert allowed(grants, *question, Moment(), generous=True) or answers == {False}


@settings(max_examples=300, deadline=None)
@given(grants_with_conditions(independent=False), st.sampled_from(FILTERS), st.sampled_from([*MOMENTS, Moment()]))
def test_what_a_subscription_delivers_is_allowed_one_by_one(
    grants: tuple[Grant, ...], wanted: str, moment: Moment
) -> None:
    decision = decide_by(grants, Access.SUBSCRIBE, wanted, moment)
    delivered = {topic: decide_by(grants, Access.SUBSCRIBE, topic, moment, delivery=True).allowed for topic in TOPICS}
    event(decision.verdict)
    for topic in TOPICS:
        assert delivered[topic] is allowed(grants, Access.SUBSCRIBE, topic, moment)
        if (
            decision.allowed
            and decide_by(
                [Grant(Rule("x", "x", Effect.ALLOW, Access.SUBSCRIBE, wanted, Place("p", 1)), wanted)],
                Access.SUBSCRIBE,
                topic,
            ).allowed
        ):
            assert delivered[topic]


def test_a_delivery_is_asked_of_names_and_of_subscribe_rules() -> None:
    rule = Rule("x", "x", Effect.ALLOW, Access.SUBSCRIBE, "$SYS/#", Place("p", 1))
    grants = (Grant(rule, rule.template),)
    assert decide_by(grants, Access.SUBSCRIBE, "$SYS/broker/uptime", delivery=True).allowed
    with pytest.raises(ValueError, match="subscribe rules"):
        decide_by(grants, Access.PUBLISH, "a", delivery=True)
    with pytest.raises(Exception, match=r"contains the wildcard '\+'"):
        decide_by(grants, Access.SUBSCRIBE, "a/+", delivery=True)
