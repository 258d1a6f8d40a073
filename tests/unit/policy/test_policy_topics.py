# SPDX-License-Identifier: Apache-2.0
"""Topic names and filters: what is refused, and matching, covering and meeting held against other implementations."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from bednet import topics
from bednet.errors import TopicError

LEVELS = ("a", "b", "", "$x", "+")
# 'c' and five levels are beyond what the filters below name, so that no wildcard can hide behind a finite world.
NAMES = [
    name
    for count in range(1, 6)
    for levels in itertools.product(("a", "b", "", "$x", "c"), repeat=count)
    if (name := "/".join(levels))
]

filters = st.builds(
    lambda levels, tail: "/".join([*levels, *tail]),
    st.lists(st.sampled_from(LEVELS), max_size=3),
    st.sampled_from([[], ["#"]]),
).filter(bool)


def model_matches(topic_filter: str, name: str) -> bool:
    """MQTT 5, 4.7, word by word."""
    if topic_filter[0] in "+#" and name.startswith("$"):
        return False
    wanted, found = topic_filter.split("/"), name.split("/")
    if wanted[-1] == "#":
        wanted.pop()
        if len(found) < len(wanted):
            return False
        found = found[: len(wanted)]
    return len(wanted) == len(found) and all(w in ("+", f) for w, f in zip(wanted, found, strict=True))


def matched(topic_filter: str) -> set[str]:
    return {name for name in NAMES if model_matches(topic_filter, name)}


@pytest.mark.parametrize(
    ("topic_filter", "code", "message"),
    [
        ("", "topic-empty", "an empty topic filter"),
        ("a/#/b", "topic-hash", "'#' in level 2"),
        ("#/a", "topic-hash", "'#' in level 1"),
        ("a/b#", "topic-hash", "'#' in level 2"),
        ("##", "topic-hash", "'#' in level 1"),
        ("a+", "topic-plus", "level 1"),
        ("a/+b/c", "topic-plus", "level 2"),
        ("++", "topic-plus", "level 1"),
        ("a\0b", "topic-character", "U\\+0000, which MQTT forbids"),
        ("a\nb", "topic-character", "U\\+000A, for which brokers drop"),
        ("a\x7f", "topic-character", "U\\+007F"),
        ("a\x85", "topic-character", "U\\+0085"),
        ("a\ufffe", "topic-character", "U\\+FFFE"),
        ("a\U0001ffff", "topic-character", "U\\+1FFFF"),
        ("a\ufdd0", "topic-character", "U\\+FDD0"),
        ("a\ud800", "topic-character", "U\\+D800, which MQTT forbids"),
        ("a" * 65536, "topic-too-long", "65536 bytes"),
        ("é" * 32768, "topic-too-long", "65536 bytes"),
    ],
)
def test_filters_that_mqtt_does_not_know_are_refused(topic_filter: str, code: str, message: str) -> None:
    with pytest.raises(TopicError, match=message) as refusal:
        topics.check_filter(topic_filter)
    assert refusal.value.code == code
    assert len(str(refusal.value)) < 250, "a message quotes no endless topic"


@pytest.mark.parametrize(
    "topic_filter", ["#", "+", "/", "//", "+/+", "a/#", "/#", "a/+/b", "a b", "é", "$SYS/#", "a" * 65535]
)
def test_filters_of_the_standard_are_taken(topic_filter: str) -> None:
    topics.check_filter(topic_filter)


@pytest.mark.parametrize(("name", "wildcard"), [("a/+", r"'\+'"), ("#", "'#'"), ("a#b", "'#'"), ("a+b", r"'\+'")])
def test_wildcards_in_a_name_are_refused(name: str, wildcard: str) -> None:
    with pytest.raises(TopicError, match=f"wildcard {wildcard}") as refusal:
        topics.check_name(name)
    assert refusal.value.code == "topic-wildcard"


@pytest.mark.parametrize(
    ("topic_filter", "inner"),
    [
        ("$share/g/a/b", "a/b"),
        ("$share/g//a", "/a"),
        ("$share/g/#", "#"),
        ("a/b", "a/b"),
        ("$shared/g/a", "$shared/g/a"),
    ],
)
def test_shared_subscriptions_are_unwrapped(topic_filter: str, inner: str) -> None:
    assert topics.unshare(topic_filter) == inner


@pytest.mark.parametrize(
    "topic_filter", ["$share", "$share/", "$share/g", "$share/g/", "$share//a", "$share/+/a", "$share/g#/a"]
)
def test_shared_subscriptions_without_group_or_filter_are_refused(topic_filter: str) -> None:
    with pytest.raises(TopicError, match="no valid group or no filter") as refusal:
        topics.unshare(topic_filter)
    assert refusal.value.code == "topic-share"


@pytest.mark.parametrize(("topic_filter", "name"), [("#", "$SYS/a"), ("+/a", "$SYS/a"), ("+", "$SYS"), ("+/#", "$SYS")])
def test_a_leading_wildcard_does_not_match_dollar_topics(topic_filter: str, name: str) -> None:
    assert not topics.matches(topic_filter, name)
    assert not topics.covers(topic_filter, name + "/#")
    assert not topics.overlaps(topic_filter, name + "/#")


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        ("#", "#", "#"),
        ("#", "+/#", "#"),
        ("a/#", "#", "a/#"),
        ("a/#", "a", "a"),
        ("a/+", "+/b/#", "a/b"),
        ("a/+", "a", None),
    ],
)
def test_an_intersection_is_written_as_one_would(one: str, other: str, common: str | None) -> None:
    assert topics.intersection(one, other) == common
    assert topics.intersection(other, one) == common


@given(filters, st.sampled_from(NAMES))
@example("a/#", "a")
@example("a/+", "a")
@example("a/+/#", "a")
@example("+/+", "/")
def test_matching_agrees_with_the_standard_and_with_paho(topic_filter: str, name: str) -> None:
    assert topics.matches(topic_filter, name) is model_matches(topic_filter, name)
    assert topics.matches(topic_filter, name) is topic_matches_sub(topic_filter, name)


@given(filters, filters)
@example("+/#", "#")
@example("a/#", "a")
@example("a/+/#", "a/#")
def test_covering_is_inclusion_of_what_is_matched(granted: str, requested: str) -> None:
    assert topics.covers(granted, requested) is (matched(requested) <= matched(granted))


@given(filters, filters)
@example("a/#", "+")
@example("#", "$x/#")
def test_an_intersection_matches_what_both_match(one: str, other: str) -> None:
    common = topics.intersection(one, other)
    assert (matched(common) if common is not None else set()) == matched(one) & matched(other)
    assert topics.overlaps(one, other) is (common is not None)
    if common is not None:
        topics.check_filter(common)


@given(st.lists(filters, max_size=12))
def test_widest_are_those_that_no_other_covers(some: list[str]) -> None:
    expected = [
        one
        for number, one in enumerate(some)
        if not any(
            topics.covers(other, one) and (place < number or not topics.covers(one, other))
            for place, other in enumerate(some)
            if place != number
        )
    ]
    assert topics.widest(some) == expected
