# SPDX-License-Identifier: Apache-2.0
"""The gateway does what the policy says, on topics that nobody thought of.

`bednet.site.decide` says what the policy means; the store and the plugin's reading of it are what happens. Hypothesis
makes up topics and filters from the plant's words and odd ones, and compares the two: each publish and each
subscription by its reason code, each delivery by who gets it.
"""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bednet import topics
from bednet.errors import TopicError
from bednet.policy import Access
from bednet.probe import NOT_AUTHORIZED
from bednet.site import decide

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bednet.probe import Session
    from tests.conftest import Plant

    Everyone = dict[str, Session]

pytestmark = pytest.mark.lab

DEVICES = [
    "temp-101",
    "temp-102",
    "plc-1-filler",
    "plc-2-packer",
    "line-1",
    "line-2",
    "hmi-1",
    "tablet-jo",
    "historian",
    "energy-1",
]
WORDS = [
    *DEVICES,
    *("sensors", "commands", "factory", "hall-1", "hall-2", "hall-3", "line-3", "filler", "packer"),
    *("temperature", "safety", "firmware", "state", "setpoint", "alarms", "ack", "energy", "bednet", "probe", "x"),
    *("", " ", "$SYS", "$share", "$", ".", "..", "é", "%u", "%c", "user", "topic", "pattern", "read", "\N{SNOWMAN}"),
]


def valid(topic: str) -> bool:
    try:
        topics.check_name(topic)
    except TopicError:
        return False
    return True


def likely(head: str, *rest: list[str]) -> st.SearchStrategy[str]:
    """Make topics that begin as the plant's do."""
    return st.tuples(*(st.sampled_from(words) for words in ([head], *rest))).map("/".join)


LEVELS = st.one_of(
    st.sampled_from(WORDS), st.text(st.characters(blacklist_characters="+#/", min_codepoint=32), max_size=3)
)
TOPICS = st.one_of(
    st.lists(LEVELS, min_size=1, max_size=6).map("/".join),
    likely("sensors", DEVICES, WORDS),
    likely("sensors", DEVICES, ["safety", "level", ""], WORDS),
    likely("commands", DEVICES, WORDS),
    likely("commands", WORDS, ["firmware", "start", ""], WORDS),
    likely("factory", ["hall-1", "hall-2"], ["line-1", "line-2", "energy", "alarms"], WORDS),
    likely("factory", ["hall-1", "hall-2"], ["line-1", "line-2"], ["filler", "packer", "setpoint"], ["state", "speed"]),
).filter(valid)
BATCHES = st.lists(st.tuples(st.sampled_from(DEVICES), TOPICS), min_size=15, max_size=15)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(batch=BATCHES)
def test_the_gateway_does_what_the_policy_says(plant: Plant, everyone: Everyone, batch: list[tuple[str, str]]) -> None:
    sent = [
        (device, topic, token := secrets.token_bytes(8), everyone[device].send(topic, token)) for device, topic in batch
    ]
    granted: dict[bytes, str] = {}
    for device, topic, token, mid in sent:
        code = everyone[device].acknowledged(mid).code
        decision = decide(plant.site, device, Access.PUBLISH, topic)
        assert code in ((0x00, 0x10) if decision.allowed else (NOT_AUTHORIZED,)), f"{device} -> {topic!r}: {decision}"
        if decision.allowed:
            granted[token] = topic
    # $ topics would need a subscription of their own; nobody may publish them.
    assert not [topic for topic in granted.values() if topic.startswith("$")]
    for reader, session in everyone.items():
        heard = {message.payload for message in session.settle()}
        expected = {
            token
            for token, topic in granted.items()
            if decide(plant.site, reader, Access.SUBSCRIBE, topic, delivery=True).allowed
        }
        assert heard == expected, f"{reader} heard {[granted.get(token) for token in heard ^ expected]} otherwise"


def sound(topic_filter: str) -> bool:
    try:
        topics.check_filter(topics.unshare(topic_filter))
    except TopicError:
        return False
    return True


FILTER_LEVELS = st.one_of(LEVELS, st.sampled_from(["+", "+", "temp-101", "line-1", "hall-1"]))
FILTERS = (
    st.tuples(
        st.sampled_from(["", "", "", "$share/group/"]),
        st.one_of(TOPICS, st.lists(FILTER_LEVELS, min_size=1, max_size=4).map("/".join)),
        st.sampled_from(["", "/#", "/+", "/+/#"]),
    )
    .map("".join)
    .filter(sound)
)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(batch=st.lists(FILTERS, min_size=15, max_size=15, unique=True))
def test_the_gateway_grants_the_subscriptions_that_the_policy_grants(
    plant: Plant, readers: Everyone, batch: list[str]
) -> None:
    for device, session in readers.items():
        codes = [told.code for told in session.subscribe(*batch)]
        session.unsubscribe(*batch)
        for topic_filter, code in zip(batch, codes, strict=True):
            decision = decide(plant.site, device, Access.SUBSCRIBE, topic_filter)
            assert code == (1 if decision.allowed else NOT_AUTHORIZED), f"{device}: {topic_filter!r}: {decision}"


@pytest.fixture(scope="module")
def readers(plant: Plant) -> Iterator[Everyone]:
    """Devices of different roles on the other gateway."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(plant.session(name, "gateway-2"))
            for name in ("temp-101", "plc-1-filler", "line-1", "hmi-1", "tablet-jo", "historian", "energy-1")
        }
