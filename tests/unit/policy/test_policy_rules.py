# SPDX-License-Identifier: Apache-2.0
"""Rules for devices by their attributes: what is refused and why, what is odd, and which devices a rule is for."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bednet.devices import Device
from bednet.errors import Place
from bednet.moment import instant_text, parse_instant
from bednet.policy import Access, Moment, Verdict
from bednet.site import decide, load_site
from bednet.when import MAX_SECONDS, When, WhenError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bednet.yamlfile import Scalar
    from tests.unit.policy.conftest import SiteFolder

PLACE = Place("policy.yml", 1)
HEAD = "version: 1\nroles: {sensor: {}}\nrules:\n  - name: r\n"
ALLOW = "    allow: {publish: [a]}\n"
BERLIN = "zone: Europe/Berlin"


def device(attributes: Mapping[str, Scalar] | None = None, **others: object) -> Device:
    made = Device("d1", "hall-1", ("sensor",), PLACE, attributes=attributes or {})
    return dataclasses.replace(made, **others)  # type: ignore[arg-type] # whatever a test names


def means(text: str, attributes: Mapping[str, Scalar] | None = None, **others: object) -> bool:
    return When(text, PLACE).matches(device(attributes, **others))


# when


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("true", True),
        ("device.id == 'd1'", True),
        ("device.location == 'hall-1' && device.type == ''", True),
        ("'Cold' in device.tags", True),
        ("'cold' in device.tags", False),
        ("size(device.tags) == 2 && device.tags[0] == 'Cold'", True),
        ("'sensor' in device.roles", True),
        ("device.line == 1", True),
        ("device.line == 1.0", True),
        ("device.line == '1'", False),
        ("device.line >= 2", False),
        ("device.ratio > 1.4 && device.ratio < 2", True),
        ("device.spare", True),
        ("!device.spare || device.name == 'é'", True),
        ("device.attributes.line == 1", True),
        ("device['line'] == 1", True),
        ("'line' in device", True),
        ("has(device.missing)", False),
        ("has(device.missing) && device.missing == 1", False),
        ("device.missing == 1 || device.line == 1", True),
        ("device.id.matches('^d[0-9]$')", True),
        ("device.id.matches('D')", False),
        ("device.tags.exists(t, t.startsWith('Ro'))", True),
        ("device.tags.all(t, t.startsWith('Ro'))", False),
        ("device.line in [2, 1]", True),
        ("device\n  .location == 'hall-1'", True),
        ("device.location == 'hall-1' // as ever", True),
    ],
)
def test_conditions_on_devices(text: str, matches: bool) -> None:
    attributes: dict[str, Scalar] = {"line": 1, "ratio": 1.5, "spare": True, "name": "é"}
    assert means(text, attributes, tags=("Cold", "Rotating")) is matches


@pytest.mark.parametrize(
    ("text", "code", "message", "cure"),
    [
        ("", "when-syntax", "at character 1: it ends too early", "write a condition such as"),
        ("device.id = 'x'", "when-syntax", "at character 11", "compare with =="),
        ("device.id == 'x", "when-syntax", "at character 14", "close the quote"),
        ('device.id == "x', "when-syntax", "at character 14", "close the quote"),
        ("device.id ==", "when-syntax", "at character 13: it ends too early", "write a condition"),
        ("true &&\n a..b", "when-syntax", "at line 2, character 4", "write a condition"),
        ("devcie.id == 'x'", "when-syntax", "'devcie.id' is not known here", "did you mean 'device'?"),
        ("location == 'x'", "when-syntax", "at character 1: 'location' is not known", "write device.location"),
        ("now() > 3", "when-syntax", "'now' is not known here", "nothing but `device`"),
        ("hall == device.location", "when-syntax", "'hall' is not known here", "text stands in quotes"),
        ("'a' < 1", "when-syntax", "at character 5: < is not made for string and int", "of one kind"),
        ("device.id && 1", "when-syntax", "&& is not made for a value and int", "of one kind"),
        ("1", "when-type", "'when' is int, neither true nor false", "write a condition"),
        ("device.tags.map(t, t)", "when-type", "neither true nor false", "write a condition"),
        ("(" * 40 + "true" + ")" * 40, "when-limits", "too deep or too long", "split the rule"),
        ("1" + " + 1" * 40 + " > 0", "when-limits", "too deep or too long", "split the rule"),
        ("true || " * 600 + "true", "when-limits", "4804 characters, and 4096 are the most", "split the rule"),
    ],
)
def test_conditions_that_are_none(site_folder: SiteFolder, text: str, code: str, message: str, cure: str) -> None:
    with pytest.raises(WhenError) as refusal:
        When(text, PLACE)
    assert refusal.value.code == code
    assert message in str(refusal.value)
    assert cure in refusal.value.cure
    assert "INVALID_ARGUMENT" not in str(refusal.value)
    site_folder.write(policy=f"{HEAD}    when: {json.dumps(text)}\n{ALLOW}")
    problem = site_folder.problem(code)
    assert problem.place.line == 5
    assert problem.message == f"rule 'r': {refusal.value}"


@pytest.mark.parametrize(
    ("text", "code", "message", "cure"),
    [
        ("device.missing == 1", "when-failed", "needs 'missing', which is missing", "has(device.missing) && ..."),
        ("device.enrolment == 'csr'", "when-failed", "needs 'enrolment'", "has(device.enrolment)"),
        ("device.line + 'x' == ''", "when-failed", "has no answer: no matching overloads", "ask first"),
        ("device.tags[7] == ''", "when-failed", "has no answer: index error", "ask first"),
        ("device.id.matches('(')", "when-failed", "invalid regular expression", "ask first"),
        ("device.line / 0 == 1", "when-failed", "divide by zero", "ask first"),
        ("device.line", "when-type", "is int, neither true nor false", "as in device.line == 1"),
        ("device.tags", "when-type", "neither true nor false", "compare it"),
    ],
)
def test_conditions_without_an_answer(text: str, code: str, message: str, cure: str) -> None:
    with pytest.raises(WhenError) as refusal:
        means(text, {"line": 1})
    assert refusal.value.code == code
    assert message in str(refusal.value)
    assert cure in refusal.value.cure


def nested(depth: int) -> str:
    text = "true"
    for number in range(depth):
        text = f"[1,2,3,4,5,6,7,8,9,10].all(x{number}, {text})"
    return text


@pytest.mark.timeout(60)
def test_a_runaway_condition_is_stopped() -> None:
    assert means(nested(3))
    with pytest.raises(WhenError, match="too much work: Iteration budget exceeded") as refusal:
        means(nested(8))
    assert refusal.value.code == "when-limits"
    # What other libraries need years for.
    assert not means(r"device.id.matches('^(a+)+$')", id="a" * 60 + "-")


def test_a_condition_that_is_slow_for_all_devices_together_is_stopped() -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.3
        return now

    when = When("device.id == 'd1'", PLACE, clock)
    for _ in range(int(MAX_SECONDS / 0.3) - 1):
        assert when.matches(device())
    with pytest.raises(WhenError, match="took more than 60 seconds"):
        list(map(when.matches, [device()] * 3))
    assert now > MAX_SECONDS


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        ("true", set()),
        ("device.line == 1 && device.location == ''", {"line", "location"}),
        ("has(device.line)", {"line"}),
        ("device.attributes.line == 1", {"attributes"}),
        ("device.tags.exists(device, device == 'x')", None),
        ("device['line'] == 1", None),
        ("'line' in device", None),
        ("device . line == 1", None),
        ("'device' == 'x'", None),
    ],
)
def test_what_a_condition_reads(text: str, reads: set[str] | None) -> None:
    assert When(text, PLACE).reads == (None if reads is None else frozenset(reads))


CONDITIONS = (
    "device.line == 1",
    "device.line == 1.0 && type(device.line) == int",
    "device.line == true",
    "type(device.line) == bool",
    "has(device.name) && device.name == 'x'",
    "has(device.name) || device.location == 'l1'",
    "'a' in device.tags",
    "device.tags == ['a', 'b']",
    "device.type == '' || 'r2' in device.roles",
    "device.id.endsWith('1')",
    "size(device) > 7",
)
values = st.sampled_from([1, 1.0, True, "1", "x"])
made_up_devices = st.lists(
    st.fixed_dictionaries(
        {
            "location": st.sampled_from(["l1", "l2"]),
            "roles": st.lists(st.sampled_from(["r1", "r2"]), unique=True),
            "attributes": st.fixed_dictionaries({"line": values}, optional={"name": values}),
        },
        optional={"type": st.just("t"), "tags": st.lists(st.sampled_from(["a", "b"]), unique=True)},
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made_up_devices, st.lists(st.sampled_from(CONDITIONS), min_size=1, max_size=4))
def test_devices_that_are_alike_are_asked_once_and_still_get_their_own_answer(
    site_folder: SiteFolder, entries: list[dict[str, object]], conditions: list[str]
) -> None:
    """1, 1.0 and true are equal in Python, and must not be mixed up here."""
    rules = [
        {"name": f"c{number}", "when": text, "allow": {"publish": [f"c{number}/#"]}}
        for number, text in enumerate(conditions)
    ]
    roles: dict[str, object] = {name: {"allow": {"publish": [f"{name}/#"]}} for name in ("r1", "r2")}
    devices = [{**entry, "id": f"d{number}"} for number, entry in enumerate(entries)]
    site_folder.write(
        devices=json.dumps({"version": 1, "devices": devices}),
        policy=json.dumps({"version": 1, "roles": roles, "rules": rules}),
    )
    site = site_folder.load()
    for made in site.devices.values():
        expected = [f"{name}/#" for name in ("r1", "r2") if name in made.roles]
        expected += [f"c{n}/#" for n, text in enumerate(conditions) if When(text, PLACE).matches(made)]
        assert [grant.topic_filter for grant in site.grants[made.id]] == expected
        assert site.profiles[site.profile_of[made.id]] == tuple(grant.rule for grant in site.grants[made.id])
    assert len(site.profiles) == len({*site.profile_of.values()})


def test_devices_share_their_profile_whatever_the_order_of_their_roles(site_folder: SiteFolder) -> None:
    devices: list[object] = [
        {"id": f"d{number}", "location": "l", "roles": held}
        for number, held in enumerate([["a", "b"], ["b", "a"], ["a"], []])
    ]
    site_folder.write_data(devices=devices, roles={"a": {"allow": {"publish": ["a"]}}, "b": {}})
    site = site_folder.load()
    assert dict(site.profile_of) == {"d0": "a+b", "d1": "a+b", "d2": "a", "d3": "-"}
    assert {key: [rule.id for rule in rules] for key, rules in site.profiles.items()} == {
        "a+b": ["role/a/allow/publish/0"],
        "a": ["role/a/allow/publish/0"],
        "-": [],
    }
    assert (len(site.grants), list(site.grants)) == (4, ["d0", "d1", "d2", "d3"])


def test_the_ids_of_rules_count_the_lines_of_their_list(site_folder: SiteFolder) -> None:
    site_folder.write(
        policy="""\
version: 1
roles: {sensor: {allow: {publish: [a, b], subscribe: [a]}, deny: {subscribe: [c]}}}
rules:
  - {name: x, allow: {publish: [d, e]}}
  - {name: y, from: [192.0.2.0/24], deny: {publish: [d]}}
"""
    )
    site = site_folder.load()
    assert site.profile_of["temp-101"] == "sensor|x+y"
    assert [(rule.id, rule.template) for rule in site.profiles["sensor|x+y"]] == [
        ("role/sensor/allow/publish/0", "a"),
        ("role/sensor/allow/publish/1", "b"),
        ("role/sensor/allow/subscribe/0", "a"),
        ("role/sensor/deny/subscribe/0", "c"),
        ("rule/x/allow/publish/0", "d"),
        ("rule/x/allow/publish/1", "e"),
        ("rule/y/deny/publish/0", "d"),
    ]


def test_failures_of_many_devices_are_told_once(site_folder: SiteFolder) -> None:
    devices: list[object] = [{"id": f"d{number}", "location": "l", "roles": []} for number in range(50)]
    devices.append({"id": "last", "location": "l", "roles": [], "attributes": {"line": 1}})
    site_folder.write(
        devices=json.dumps({"version": 1, "devices": devices}), policy=f"{HEAD}    when: device.line == 1\n{ALLOW}"
    )
    problem = site_folder.problem("when-failed")
    assert problem.message == "rule 'r': 'when' needs 'line', which is missing, for 'd0', 'd1', 'd2' and 47 more"


def test_an_attribute_that_nobody_has_is_told_with_the_nearest(site_folder: SiteFolder) -> None:
    site_folder.write(policy=f"{HEAD}    when: device.locaton == 'x'\n{ALLOW}")
    problem = site_folder.problem("when-failed")
    assert problem.message == "rule 'r': no device has the attribute 'locaton' that 'when' needs"
    assert problem.cure.startswith("did you mean 'location'? A condition can read id, location, type, tags")


# The rest of a rule


@pytest.mark.parametrize(
    ("rest", "line", "code", "message", "cure"),
    [
        ("", 4, "missing-key", "rule 'r': neither 'allow' nor 'deny'", "add one of them"),
        ("    alow: {}\n" + ALLOW, 5, "unknown-key", "rule 'r': unknown key 'alow'", "did you mean 'allow'"),
        (ALLOW + "  - allow: {publish: [a]}\n", 6, "missing-key", "rule number 2: 'name' missing", "add 'name'"),
        (ALLOW + f"  - name: a/b\n{ALLOW}", 6, "bad-name", "'name' is 'a/b'", "a word of letters"),
        (ALLOW + f"  - name: r\n{ALLOW}", 6, "rule-twice", "'r' stands here again; .* line 4 already", "rename one"),
        ("    when: [a]\n" + ALLOW, 5, "wrong-type", "'when' is a list", "condition on the device in CEL"),
        ("    when: true\n" + ALLOW, 5, "wrong-type", "'when' is true", "as text in quotes"),
        ("    during: {}\n" + ALLOW, 5, "wrong-type", "'during' is an empty mapping", "a list of windows"),
        ("    during: []\n" + ALLOW, 5, "wrong-type", "'during' is an empty list", "a list of windows"),
        ("    during: [{days: [mon]}]\n" + ALLOW, 5, "missing-key", "'zone' missing", "time zone of the IANA"),
        (f"    during: [{{days: [monday], {BERLIN}}}]\n" + ALLOW, 5, "bad-value", "'monday'", "mon, tue"),
        (f"    during: [{{days: [], {BERLIN}}}]\n" + ALLOW, 5, "wrong-type", "is an empty list", "list of the days"),
        (f"    during: [{{days: [mon, mon], {BERLIN}}}]\n" + ALLOW, 5, "listed-twice", "'mon' twice", "remove one"),
        (f"    during: [{{hours: 6, {BERLIN}}}]\n" + ALLOW, 5, "wrong-type", "is the number 6", "two times of day"),
        *(
            (f'    during: [{{hours: "{hours}", {BERLIN}}}]\n' + ALLOW, 5, "bad-hours", f"'{hours}'", "06:00-22:00")
            for hours in ("6-22", "06:00", "24:00-06:00", "06:00-24:01", "06:60-07:00", "06:00 - 22:00", "06:00-25:00")
        ),
        *(
            (f'    during: [{{hours: "06:00-22:00", zone: "{zone}"}}]\n' + ALLOW, 5, "bad-zone", message, cure)
            for zone, message, cure in (
                ("Europe/Belrin", "zone 'Europe/Belrin' is not known", "did you mean 'Europe/Berlin'"),
                ("europe/berlin", "not known", "did you mean 'Europe/Berlin'"),
                ("CET+1", "not known", "IANA database"),
                ("Europe", "not known", "IANA database"),
                ("../UTC", "not known", "IANA database"),
                ("/etc/passwd", "not known", "IANA database"),
                ("right/UTC", "not known", "IANA database"),
            )
        ),
        ("    from: 10.0.0.0/8\n" + ALLOW, 5, "wrong-type", "'from' is '10.0.0.0/8'", "a list of networks"),
        ("    from: [10.0.0.0/8, 10.0.0.0/8]\n" + ALLOW, 5, "listed-twice", "twice", "remove one"),
        (
            "    from: [10.20.1.5/16]\n" + ALLOW,
            5,
            "bad-network",
            "has bits beyond its prefix",
            "write 10.20.0.0/16 for the whole network, or 10.20.1.5 for",
        ),
        (
            '    from: ["2001:db8::1/32"]\n' + ALLOW,
            5,
            "bad-network",
            "has bits beyond its prefix",
            "write 2001:db8::/32 for",
        ),
        (
            '    from: ["::ffff:10.0.0.0/104"]\n' + ALLOW,
            5,
            "bad-network",
            "an IPv4 network in the form of IPv6",
            "write 10.0.0.0/8",
        ),
        *(
            (f'    from: ["{network}"]\n' + ALLOW, 5, "bad-network", "is not a network", "as in 10.20.0.0/16")
            for network in (
                "office",
                "10.0.0.0/33",
                "10.0.0/8",
                "10.0.0.0/255.0.0.0",
                "10.0.0.0/0.255.255.255",
                "010.0.0.0/8",
                "fe80::1%eth0/64",
                "10.0.0.0/",
                "",
            )
        ),
        (
            "    from: [" + ", ".join(f"10.0.{n}.0/24" for n in range(101)) + "]\n" + ALLOW,
            5,
            "too-many",
            "'from' has 101 elements, and 100 are the most",
            "split the rule",
        ),
        ("    allow: {publish: [a+]}\n", 5, "topic-plus", "rule 'r': topic filter 'a\\+'", "whole level"),
        ("    deny: {publish: ['a/{device.lien}']}\n", 5, "placeholder-value-missing", "no device has", "Add 'lien'"),
    ],
)
def test_rules_that_say_nothing_sensible_are_refused(
    site_folder: SiteFolder, rest: str, line: int, code: str, message: str, cure: str
) -> None:
    site_folder.write(policy=HEAD + rest)
    problem = site_folder.problem(code)
    assert (problem.place.file, problem.place.line) == (str(site_folder.path / "policy.yml"), line)
    assert re.search(message, problem.message), problem.message
    assert re.search(cure, problem.cure), problem.cure


def test_a_machine_without_time_zones_says_what_to_install(
    site_folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoneinfo.available_timezones", set)
    site_folder.write(policy=f'{HEAD}    during: [{{hours: "06:00-22:00", {BERLIN}}}]\n{ALLOW}')
    assert "install the package tzdata" in site_folder.problem("bad-zone").cure


@pytest.mark.parametrize(
    "rest",
    [
        'hours: "00:00-24:00", ',
        'hours: "06:00-06:00", ',
        'hours: "22:00-24:00:00", days: [sun], ',
        'hours: "06:00:01-06:00:02", ',
        "days: [mon, tue, wed, thu, fri, sat, sun], ",
        "",
    ],
)
def test_windows_that_are_taken(site_folder: SiteFolder, rest: str) -> None:
    site_folder.write(policy=f"{HEAD}    during: [{{{rest}{BERLIN}}}]\n{ALLOW}")
    site = site_folder.load()
    (rule,) = site.profiles["sensor|r"]
    always = rule.during[0].always
    assert always is ("22" not in rest and ":01" not in rest)
    assert [warning.code for warning in site.warnings] == ["window-always"] * always
    # A window that never closes is no condition at an unknown time.
    assert decide(site, "temp-101", Access.PUBLISH, "a").allowed is always


@pytest.mark.parametrize(
    ("test", "line", "code", "message"),
    [
        ("at: 2026-03-29T02:30:00", 8, "bad-time", "'at' is '2026-03-29T02:30:00': not a date and time"),
        ('at: "2026-02-30T02:30:00Z"', 8, "bad-time", "day is out of range"),
        ("at: 2026", 8, "wrong-type", "'at' is the number 2026"),
        ("from: 10.20.0.0/16", 8, "bad-address", "is not an IP address"),
        ("from: [10.20.0.1]", 8, "wrong-type", "'from' is a list"),
        ("form: 10.20.0.1", 8, "unknown-key", "unknown key 'form'"),
    ],
)
def test_moments_of_tests_that_are_none(site_folder: SiteFolder, test: str, line: int, code: str, message: str) -> None:
    site_folder.write(policy=f"{HEAD}{ALLOW}tests:\n  - device: temp-101\n    {test}\n    cannot: {{publish: [b]}}\n")
    problem = site_folder.problem(code)
    assert problem.place.line == line
    assert message in problem.message


RULES = f"""\
{HEAD}    during: [{{days: [mon], hours: "06:00-22:00", {BERLIN}}}]
    from: [10.20.0.0/16]
    allow: {{publish: [a]}}
  - name: s
    from: [10.20.9.0/24]
    deny: {{publish: [a]}}
tests:
  - device: temp-101
"""


@pytest.mark.parametrize(
    ("moment", "can"),
    [
        ('at: "2026-03-02T12:00:00+01:00"\n    from: 10.20.1.1', True),
        ('at: "2026-03-02T12:00:00+01:00"\n    from: 10.20.9.1', False),
        ('at: "2026-03-03T12:00:00+01:00"\n    from: 10.20.1.1', False),
        ('at: "2026-03-02T12:00:00+01:00"\n    from: 10.21.1.1', False),
    ],
)
def test_tests_at_a_moment(site_folder: SiteFolder, moment: str, can: bool) -> None:
    for word in ("can", "cannot"):
        site_folder.write(policy=f"{RULES}    {moment}\n    {word}: {{publish: [a]}}\n")
        if (word == "can") is can:
            assert len(site_folder.load().tests) == 1
        else:
            assert "a test without" not in site_folder.problem("test-failed").cure


@pytest.mark.parametrize(
    ("moment", "missing"),
    [
        ("", "'at' and 'from'"),
        ('at: "2026-03-02T12:00:00+01:00"', "'from'"),
        ("from: 10.20.1.1", "'at'"),
    ],
)
def test_a_test_that_leaves_the_moment_open_must_hold_always(
    site_folder: SiteFolder, moment: str, missing: str
) -> None:
    one_rule = RULES.split("  - name: s", maxsplit=1)[0] + "tests:\n  - device: temp-101\n"
    for word in ("can", "cannot"):
        site_folder.write(policy=f"{one_rule}    {moment}\n    {word}: {{publish: [a]}}\n")
        problem = site_folder.problem("test-failed")
        assert problem.cure.endswith(f"a test without {missing} must hold always")
        assert "rule 'r' allows publish 'a' only mon 06:00-22:00 Europe/Berlin, from 10.20.0.0/16" in problem.message
    site_folder.write(policy=f"{RULES}    from: 10.21.1.1\n    cannot: {{publish: [a]}}\n")
    assert len(site_folder.load().tests) == 1


# until


def test_access_ends_at_the_second(site_folder: SiteFolder) -> None:
    site_folder.write(
        devices='version: 1\ndevices: [{id: d, location: l, roles: [sensor], until: "2026-12-31T18:00:00+01:00"}]\n',
        policy="version: 1\nroles: {sensor: {allow: {publish: [a]}}}\ntests: [{device: d, can: {publish: [a]}}]\n",
    )
    site = site_folder.load()
    until = site.devices["d"].until
    assert until is not None
    assert instant_text(until) == "2026-12-31T17:00:00Z"
    before = decide(site, "d", Access.PUBLISH, "a", Moment(parse_instant("2026-12-31T16:59:59.999Z")))
    after = decide(site, "d", Access.PUBLISH, "a", Moment(parse_instant("2026-12-31T17:00:00Z")))
    assert (before.allowed, after.allowed, after.verdict) == (True, False, Verdict.ENDED)
    assert "access ended at 2026-12-31T17:00:00Z" in after.reason
    assert "devices.yml:2" in after.reason


@pytest.mark.parametrize(
    ("until", "code", "message"),
    [
        ("2026-12-31", "bad-time", "not a date and time of RFC 3339"),
        ('"2026-12-31T17:00:00"', "bad-time", "not a date and time of RFC 3339 with an offset"),
        ('"2026-12-31T17:00:00.5Z"', "bad-time", "counts whole seconds"),
        ('"1969-12-31T17:00:00Z"', "bad-time", "after 1970"),
        ("tomorrow", "bad-time", "not a date and time"),
        ("2026", "wrong-type", "'until' is the number 2026"),
    ],
)
def test_ends_that_are_none(site_folder: SiteFolder, until: str, code: str, message: str) -> None:
    site_folder.write(
        devices=f"version: 1\ndevices:\n  - id: d\n    location: l\n    roles: [sensor]\n    until: {until}\n"
    )
    problem = site_folder.problem(code)
    assert problem.place.line == 6
    assert message in problem.message


def test_a_device_may_use_a_pre_shared_key_alone(site_folder: SiteFolder) -> None:
    site_folder.write(devices="version: 1\ndevices: [{id: d, location: l, roles: [], authentication: [psk]}]\n")
    assert site_folder.load().devices["d"].authentication == ("psk",)


# Placeholders


@pytest.mark.parametrize(
    ("location", "template", "refused"),
    [
        ("bednet", "{device.location}/probe/own/x", True),
        ("net", "bed{device.location}/x", True),
        ("bednet", "x/{device.location}", False),
        ("hall", "{device.location}/bednet", False),
    ],
)
def test_a_value_cannot_reach_the_reserved_topics(
    site_folder: SiteFolder, location: str, template: str, refused: bool
) -> None:
    site_folder.write(
        devices=f"version: 1\ndevices: [{{id: d, location: {location}, roles: [sensor]}}]\n",
        policy=f'version: 1\nroles: {{sensor: {{allow: {{publish: ["{template}"]}}}}}}\n',
    )
    if refused:
        assert "for device 'd'" in site_folder.problem("topic-reserved").message
    else:
        site_folder.load()


@pytest.mark.parametrize(("length", "fits"), [(255, True), (256, False)])
def test_a_value_is_at_most_255_bytes(site_folder: SiteFolder, length: int, fits: bool) -> None:
    value = "é" * (length // 2) + "x" * (length % 2)
    devices: list[object] = [{"id": "d", "location": "l", "roles": ["r"], "attributes": {"name": value}}]
    site_folder.write_data(devices=devices, roles={"r": {"allow": {"publish": ["a/{device.name}"]}}})
    if fits:
        site_folder.load()
    else:
        assert "has 256 bytes, and a value in a topic at most 255" in site_folder.problem("placeholder-value").message


def test_a_rule_that_needs_a_value_says_how_to_leave_devices_out(site_folder: SiteFolder) -> None:
    more = "  - {id: e, location: l, roles: [], attributes: {line: 1}}\n"
    site_folder.write(
        devices=f"version: 1\ndevices:\n  - {{id: d, location: l, roles: []}}\n{more}",
        policy=f'{HEAD}    allow: {{publish: ["a/{{device.line}}"]}}\n',
    )
    problem = site_folder.problem("placeholder-value-missing")
    assert problem.message.startswith("device 'd' has no 'line', which rule 'r' allows publish 'a/{device.line}'")
    assert problem.cure == "add 'line' to 'attributes' of the device, or add has(device.line) to the 'when'"
    site_folder.write(
        devices=f"version: 1\ndevices:\n  - {{id: d, location: l, roles: []}}\n{more}",
        policy=f'{HEAD}    when: has(device.line)\n    allow: {{publish: ["a/{{device.line}}"]}}\n',
    )
    assert [grant.topic_filter for grant in site_folder.load().grants["e"]] == ["a/1"]


# What is odd


def warnings(site_folder: SiteFolder, policy: str) -> list[tuple[int, str, str]]:
    site_folder.write(
        devices="""\
version: 1
devices:
  - {id: d1, location: l, roles: [sensor, extra]}
  - {id: d2, location: l, roles: [sensor]}
  - {id: gone, location: l, roles: [sensor], revoked: superseded}
""",
        policy="version: 1\n" + policy,
    )
    site = site_folder.load()
    assert {warning.code for warning in site.warnings} <= site_folder.documented_codes
    assert all(warning.warning and warning.cure for warning in site.warnings)
    return [(warning.place.line, warning.code, f"{warning.message}. {warning.cure}") for warning in site.warnings]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ('sensor: {allow: {publish: ["a/#", "b"]}}', []),
        ('sensor: {allow: {publish: ["a/#", "a/b"]}}', [("rule-covered", "publish 'a/b' changes nothing: role 'sens")]),
        ('sensor: {allow: {publish: ["a/b", "a/b"]}}', [("rule-covered", "changes nothing")]),
        ('sensor: {deny: {publish: ["a/+", "a/b"]}}', [("rule-covered", "deny publish 'a/b' changes nothing")]),
        ('sensor: {allow: {publish: ["a/#"], subscribe: ["a/b"]}}', []),
        ('sensor: {allow: {publish: ["s/{device.id}/#", "s/{device.id}/x"]}}', [("rule-covered", "s/{device.id}/x")]),
        ('sensor: {allow: {publish: ["s/+/x", "s/{device.id}/x"]}}', [("rule-covered", ""), ("wide-filter", "")]),
        ('sensor: {allow: {publish: ["a/b"]}, deny: {publish: ["a/#"]}}', [("allow-denied", "and deny wins")]),
        ('sensor: {allow: {publish: ["a/#"]}, deny: {publish: ["a/b"]}}', []),
        ('sensor: {allow: {publish: ["a/b"]}, deny: {subscribe: ["a/#"]}}', []),
        # only for the device with both roles
        ('sensor: {allow: {publish: ["a/b"]}}\n  extra: {allow: {publish: ["a/#"]}}', []),
        ('extra: {allow: {publish: ["a/b"]}}\n  sensor: {allow: {publish: ["a/#"]}}', [("rule-covered", "")]),
        ('sensor: {allow: {publish: ["a/b"]}}\n  extra: {deny: {publish: ["a/#"]}}', []),
        # wide filters
        ('sensor: {allow: {publish: ["#"]}}', [("wide-filter", "every branch, all that anybody says. name the bran")]),
        ('sensor: {allow: {publish: ["+/#"]}}', [("wide-filter", "all that anybody says")]),
        ('sensor: {allow: {subscribe: ["+/x"]}}', [("wide-filter", "every branch, those to come too")]),
        ('sensor: {deny: {publish: ["#"]}}', []),
        ('sensor: {allow: {publish: ["s/{device.id}"], subscribe: ["s/+"]}}', []),
        (
            'sensor: {allow: {publish: ["s/{device.id}"]}}\n  extra: {allow: {publish: ["s/+"]}}',
            [("wide-filter", "reaches into the branches of other devices, which role 'sensor' keeps apart with")],
        ),
        (
            'sensor: {allow: {publish: ["s/{device.id}/a"]}}\n  extra: {allow: {publish: ["s/#"]}}',
            [("wide-filter", "write {device.id} in place of the wildcard; or, if it is meant, say so in a test")],
        ),
        ('sensor: {allow: {publish: ["s/{device.id}/a"]}}\n  extra: {allow: {publish: ["s/+/b"]}}', []),
    ],
)
def test_odd_roles_are_told(site_folder: SiteFolder, policy: str, expected: list[tuple[str, str]]) -> None:
    roles = f"{policy}\n" + ("" if "extra:" in policy else "  extra: {}\n")
    found = warnings(site_folder, f"roles:\n  {roles}")
    assert [code for _, code, _ in found] == [code for code, _ in expected]
    for (_, _, text), (_, words) in zip(found, expected, strict=True):
        assert words in text


def conditional(condition: str, lists: str) -> str:
    return f"roles:\n  sensor: {{}}\n  extra: {{}}\nrules:\n{condition}    {lists}\n"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("", "from: [10.0.0.0/8]", "the condition of this one has no effect"),
        ("from: [10.0.0.0/8]", "", ""),
        ("from: [10.0.0.0/8]", "from: [10.1.0.0/16]", "remove one of the two"),
        ("from: [10.1.0.0/16]", "from: [10.0.0.0/8]", ""),
        ("from: [10.0.0.0/8]", 'from: ["2001:db8::/32"]', ""),
        (f"during: [{{days: [mon], {BERLIN}}}]", f"during: [{{days: [mon], {BERLIN}}}]", "remove one of the two"),
        (f"during: [{{days: [mon], {BERLIN}}}]", f"during: [{{days: [tue], {BERLIN}}}]", ""),
        (
            f"during: [{{days: [mon], {BERLIN}}}, {{days: [tue], {BERLIN}}}]",
            f"during: [{{days: [tue], {BERLIN}}}]",
            "remove one of the two",
        ),
        (f"during: [{{days: [mon], {BERLIN}}}]", "from: [10.0.0.0/8]", ""),
    ],
)
def test_a_rule_covers_another_only_while_it_holds(
    site_folder: SiteFolder, first: str, second: str, expected: str
) -> None:
    def rule(name: str, condition: str, topic: str) -> str:
        return f"  - name: {name}\n    {condition or 'description: always'}\n    allow: {{publish: [{topic}]}}\n"

    roles = "roles:\n  sensor: {}\n  extra: {}\nrules:\n"
    found = warnings(site_folder, roles + rule("one", first, "a/#") + rule("two", second, "a/b"))
    if expected:
        ((_, code, text),) = found
        assert (code, expected in text) == ("rule-covered", True)
        assert "rule 'two': allow publish 'a/b'" in text
    else:
        assert found == []


@pytest.mark.parametrize(
    ("role", "test", "told"),
    [
        ('subscribe: ["#"]', 'subscribe: ["#"]', False),
        ('subscribe: ["#"]', "subscribe: [$share/g/#]", False),
        ('subscribe: ["#"]', "subscribe: [a]", True),
        ('subscribe: ["+/status"]', 'subscribe: ["+/status"]', False),
        ('publish: ["#"]', "publish: [a/x]", True),
        ('publish: ["#"]', "publish: [a/x, b]", False),
        ('publish: ["s/+/x"]', "publish: [s/d1/x]", True),
        ('publish: ["s/+/x"]', "publish: [s/d2/x]", False),
    ],
)
def test_a_test_shows_that_a_wide_filter_is_meant(site_folder: SiteFolder, role: str, test: str, told: bool) -> None:
    roles = f'roles:\n  sensor: {{allow: {{publish: ["s/{{device.id}}/#"]}}}}\n  extra: {{allow: {{{role}}}}}\n'
    found = warnings(site_folder, f"{roles}tests: [{{device: d1, can: {{{test}}}}}]\n")
    codes = [code for _, code, _ in found if code != "rule-covered"]
    assert codes == (["wide-filter"] if told else [])


def test_a_rule_for_nobody_is_told_with_a_guess(site_folder: SiteFolder) -> None:
    roles = "roles:\n  sensor: {}\n  extra: {}\nrules:\n"
    rule = "  - name: one\n    when: has(device.loction)\n    allow: {publish: [a]}\n"
    ((line, code, text),) = warnings(site_folder, roles + rule)
    assert (line, code) == (7, "unused-rule")
    assert text.startswith("rule 'one' is for no device. no device has 'loction'; did you mean 'location'?")


def test_devices_from_elsewhere_take_the_place_of_the_file(site_folder: SiteFolder) -> None:
    (site_folder.path / "devices.yml").unlink()
    made = {f"d{number}": device(id=f"d{number}") for number in range(3)}
    site = load_site(site_folder.path, made)
    assert [grant.topic_filter for grant in site.grants["d2"]] == ["sensors/d2/#"]
    assert list(itertools.islice(site.devices, 2)) == ["d0", "d1"]
