# SPDX-License-Identifier: Apache-2.0
"""RFC 9431, 3: scopes in the form AIF-MQTT, cut down to the policy and never more."""

from __future__ import annotations

import json
import string
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bednet import topics
from bednet.token_service import jose, scope
from tests.token_service.plant import DEVICES, claims_of, compiled, refused, scope_of, scope_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.token_service.plant import Plant

MINE = "sensors/hall-1/edge-1/#"


def asked(plant: Plant, *entries: Any) -> list[Any]:
    """Ask for a scope. :returns: what was granted, as the token says."""
    response = plant.token(scope=scope_text(*entries))
    claims = claims_of(response)
    assert (response.json or {})["scope"] == claims["scope"]
    return scope_of(claims["scope"])


def test_without_a_scope_all_that_the_policy_allows_is_granted(plant: Plant) -> None:
    assert scope_of(claims_of(plant.token())["scope"]) == [
        [MINE, ["pub"]],
        ["commands/edge-1/#", ["sub"]],
        ["at-night/#", ["sub"]],
    ]


def test_scope_of_the_token_is_always_told(plant: Plant) -> None:
    assert scope_of((plant.token().json or {})["scope"])


@pytest.mark.parametrize(
    ("entries", "granted"),
    [
        ([[MINE, ["pub"]]], [[MINE, ["pub"]]]),
        ([["sensors/hall-1/edge-1/temperature", ["pub"]]], [["sensors/hall-1/edge-1/temperature", ["pub"]]]),
        ([["#", ["pub"]]], [[MINE, ["pub"]]]),
        ([["sensors/#", ["pub", "sub"]]], [[MINE, ["pub"]]]),
        ([["sensors/+/+/temperature", ["pub"]]], [["sensors/hall-1/edge-1/temperature", ["pub"]]]),
        ([["+/edge-1/now", ["sub"]]], [["commands/edge-1/now", ["sub"]], ["at-night/edge-1/now", ["sub"]]]),
        ([["commands/edge-1/#", ["sub"]], ["commands/edge-1/a", ["sub"]]], [["commands/edge-1/#", ["sub"]]]),
        ([[MINE, ["pub"]], ["commands/edge-2/#", ["sub"]]], [[MINE, ["pub"]]]),
        ([["#", ["sub"]]], [["commands/edge-1/#", ["sub"]], ["at-night/#", ["sub"]]]),
        # A deny in a part stays the broker's matter.
        ([["sensors/hall-1/edge-1/+/x", ["pub"]]], [["sensors/hall-1/edge-1/+/x", ["pub"]]]),
    ],
)
def test_asked_scope_is_cut_down_to_the_policy(plant: Plant, entries: list[Any], granted: list[Any]) -> None:
    assert asked(plant, *entries) == granted


@pytest.mark.parametrize(
    "entries",
    [
        [["sensors/hall-1/edge-2/#", ["pub"]]],
        [[MINE, ["sub"]]],
        [["commands/edge-1/#", ["pub"]]],
        [["$SYS/#", ["sub"]]],
        [["sensors", ["pub"]]],
        [["sensors/hall-1/edge-1/secret/#", ["pub"]]],
        [["sensors/hall-1/edge-1/secret/x", ["pub"]]],
        [["Sensors/hall-1/edge-1/x", ["pub"]]],
    ],
)
def test_scope_of_which_nothing_is_left_is_refused(plant: Plant, entries: list[Any]) -> None:
    refused(plant, plant.token(scope=scope_text(*entries)), "invalid_scope", "scope-empty")


def test_device_that_may_do_nothing_gets_no_token(plant: Plant) -> None:
    refused(plant, plant.token("idle-1"), "invalid_scope", "scope-empty")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("openid", "scope-malformed"),
        ("a b", "scope-malformed"),
        ("=", "scope-malformed"),
        (scope_text([MINE, ["pub"]]) + "=", "scope-malformed"),
        (scope_text([MINE, ["pub"]]) + " " + scope_text([MINE, ["pub"]]), "scope-malformed"),
        (scope_text(), "scope-malformed"),
        (scope_text(*[[f"a/{number}", ["pub"]] for number in range(101)]), "scope-malformed"),
        (scope_text([MINE]), "scope-malformed"),
        (scope_text([MINE, []]), "scope-malformed"),
        (scope_text([MINE, ["pub"], "x"]), "scope-malformed"),
        (scope_text([MINE, "pub"]), "scope-malformed"),
        (scope_text([MINE, ["publish"]]), "scope-malformed"),
        (scope_text([MINE, ["PUB"]]), "scope-malformed"),
        (scope_text([MINE, [1]]), "scope-malformed"),
        (scope_text([7, ["pub"]]), "scope-malformed"),
        (scope_text(MINE), "scope-malformed"),
        (scope_text(None), "scope-malformed"),
        (scope_text(["a/#/b", ["pub"]]), "scope-topic"),
        (scope_text(["a+", ["pub"]]), "scope-topic"),
        (scope_text(["", ["pub"]]), "scope-topic"),
        (scope_text(["a\0b", ["pub"]]), "scope-topic"),
        (scope_text(["\ud800", ["pub"]]), "scope-topic"),
        (scope_text(["$share/g/commands/edge-1/#", ["sub"]]), "scope-topic"),
        (scope_text(["$share", ["sub"]]), "scope-topic"),
    ],
)
def test_what_is_no_scope_is_refused_section_3(plant: Plant, text: str, reason: str) -> None:
    refused(plant, plant.token(scope=text), "invalid_scope", reason)


def test_placeholders_are_those_of_the_device(plant: Plant) -> None:
    here = [{**row, "values": ["hall-2"]} if row["device"] == "edge-1" else row for row in DEVICES]
    plant.apply(compiled(here))
    assert [MINE.replace("hall-1", "hall-2"), ["pub"]] in scope_of(claims_of(plant.token())["scope"])


def test_changed_policy_counts_from_the_next_token_on(plant: Plant) -> None:
    idle = [{**row, "profile": "idle", "values": []} if row["device"] == "edge-1" else row for row in DEVICES]
    plant.apply(compiled(idle))
    refused(plant, plant.token(), "invalid_scope", "scope-empty")


def test_scope_that_no_broker_would_read_is_refused(
    make_plant: Callable[..., Plant], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = make_plant()
    long = [("pub", f"{'x' * 250}/{number}") for number in range(30)]
    monkeypatch.setattr(scope, "permissions", lambda *_: (long, []))
    refused(plant, plant.token(), "invalid_scope", "scope-too-large")
    assert plant.token(scope=scope_text([f"{'x' * 250}/7", ["pub"]])).status_code == 200


# Scopes that are made to cost time


def overlapping(rules: int) -> tuple[list[Any], list[scope.Permission]]:
    """Return what to ask for, and rules, that all overlap each other, and none of which covers another."""
    entries = [[f"+/+/+/x{number}", ["pub", "sub"]] for number in range(100)]
    return entries, [(kind, f"r{number}/+/+/#") for number in range(rules) for kind in ("pub", "sub")]


def test_scope_that_overlaps_everything_is_refused_before_it_costs_anything(
    make_plant: Callable[..., Plant], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = make_plant()
    entries, rules = overlapping(40)
    monkeypatch.setattr(scope, "permissions", lambda *_: (rules, []))
    plant.token(scope=scope_text(entries[0]))
    begun = time.process_time()
    response = plant.token(scope=scope_text(*entries))
    assert time.process_time() - begun < 0.1
    refused(plant, response, "invalid_scope", "scope-too-large")


def test_nobody_waits_while_a_scope_is_cut(make_plant: Callable[..., Plant], monkeypatch: pytest.MonkeyPatch) -> None:
    plant = make_plant()
    plant.certificate("edge-1")
    cut, done = threading.Event(), threading.Event()
    real = scope.grant

    def grant(asked: Any, *rules: Any) -> scope.Scope:
        if asked is not None:
            cut.set()
            done.wait(20)
        return real(asked, *rules)

    monkeypatch.setattr(scope, "grant", grant)
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(plant.token(scope=scope_text([MINE, ["pub"]])).status_code))
    thread.start()
    try:
        assert cut.wait(20)
        assert plant.token("edge-2").status_code == 200
    finally:
        done.set()
        thread.join()
    assert answers == [200]


def test_what_fits_into_no_token_is_refused_before_it_is_compared() -> None:
    names = [("pub", first + second) for first in string.ascii_letters for second in string.ascii_letters]
    assert len(scope.grant(None, names[:307], [])) == 307
    with pytest.raises(scope.ScopeError, match="more of it than a token has room for"):
        scope.grant(None, names[:308], [])
    # Indeed: the scope is base64 in claims that are base64 themselves.
    assert len(jose.encode(scope.show(names[:308]).encode())) > jose.LONGEST
    with pytest.raises(scope.ScopeError, match="more of it than a token has room for"):
        scope.grant(None, [("pub", "x" * 5000)], [])


def test_honest_scope_of_a_hundred_entries_is_granted_as_it_is(
    make_plant: Callable[..., Plant], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = make_plant()
    rules = [("pub", "sensors/+/edge-1/#"), ("pub", "sensors/hall-1/#"), *overlapping(19)[1]]
    monkeypatch.setattr(scope, "permissions", lambda *_: (rules, [("pub", f"d/{n}/#") for n in range(40)]))
    entries = [[f"sensors/hall-1/edge-1/value-{number}", ["pub"]] for number in range(100)]
    assert asked(plant, *entries) == entries


# For all policies and all scopes

LEVELS = st.sampled_from(["a", "b", "", "$SYS"])
FILTERS = st.builds(
    lambda levels, end: "/".join(levels) + end if levels else "#",
    st.lists(st.one_of(LEVELS, st.just("+")), max_size=3),
    st.sampled_from(["", "/#"]),
).filter(bool)
NAMES = st.lists(LEVELS, min_size=1, max_size=4).map("/".join).filter(bool)
PERMISSIONS = st.lists(st.tuples(st.sampled_from(["pub", "sub"]), FILTERS), max_size=6)


def holds(permissions: Any, access: str, name: str) -> bool:
    return any(kind == access and topics.matches(topic, name) for kind, topic in permissions)


@given(st.none() | PERMISSIONS.filter(bool), PERMISSIONS, PERMISSIONS, st.sampled_from(["pub", "sub"]), NAMES)
def test_granted_is_within_asked_and_policy_and_all_of_both(
    asked: Any, allowed: Any, denied: Any, access: str, name: str
) -> None:
    try:
        granted = scope.grant(None if asked is None else tuple(asked), allowed, denied)
    except scope.ScopeError:
        granted = ()
    within = holds(granted, access, name)
    meant = (asked is None or holds(asked, access, name)) and holds(allowed, access, name)
    assert not within or meant
    # What is missing of it is denied.
    assert within or not meant or holds(denied, access, name)


def by_definition(asked: Any, allowed: Any, denied: Any) -> set[scope.Permission]:
    """What is granted: each of what is asked with each of what is allowed, but for what others of these cover."""
    found = list(dict.fromkeys(allowed))
    if asked is not None:
        both = (
            (kind, topics.intersection(one, other)) for kind, one in asked for this, other in allowed if kind == this
        )
        found = [(kind, topic) for kind, topic in dict.fromkeys(both) if topic is not None]
    found = [
        (kind, topic)
        for kind, topic in found
        if not any(kind == this and topics.covers(wide, topic) for this, wide in denied)
    ]
    return {
        (kind, topic)
        for number, (kind, topic) in enumerate(found)
        if not any(
            kind == this and topics.covers(wide, topic) and (other < number or not topics.covers(topic, wide))
            for other, (this, wide) in enumerate(found)
            if other != number
        )
    }


@given(st.none() | PERMISSIONS.filter(bool), PERMISSIONS, PERMISSIONS)
def test_granted_is_what_the_definition_says(asked: Any, allowed: Any, denied: Any) -> None:
    try:
        granted = scope.grant(None if asked is None else tuple(asked), allowed, denied)
    except scope.ScopeError:
        granted = ()
    assert set(granted) == by_definition(asked, allowed, denied)


@given(PERMISSIONS.filter(bool))
def test_scope_reads_as_it_was_written(permissions: Any) -> None:
    assert set(scope.parse(scope.show(permissions))) == set(permissions)


@given(PERMISSIONS.filter(bool), PERMISSIONS)
def test_granted_has_nothing_twice(allowed: Any, denied: Any) -> None:
    try:
        granted = scope.grant(None, allowed, denied)
    except scope.ScopeError:
        return
    for number, (access, topic) in enumerate(granted):
        others = granted[:number] + granted[number + 1 :]
        assert not any(kind == access and topics.covers(wide, topic) for kind, wide in others)


@given(st.text(max_size=40) | st.binary(max_size=60).map(lambda data: json.dumps(data.decode("latin-1"))))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        found = scope.parse(text)
    except scope.ScopeError:
        return
    assert set(scope.parse(scope.show(found))) == set(found)
