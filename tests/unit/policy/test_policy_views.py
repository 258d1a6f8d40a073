# SPDX-License-Identifier: Apache-2.0
"""What is shown of a policy: explanations at a moment, differences of two sites, the matrix; and stricter acl_files.

Each view is also held against the evaluator, which it must not contradict.
"""

from __future__ import annotations

import copy
import ipaddress
import itertools
import json
import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from bednet.acl_file import acl_problems, compile_acl_file
from bednet.cli import main
from bednet.difference import difference
from bednet.explain import changes_at
from bednet.matrix import matrix_of
from bednet.moment import parse_instant
from bednet.policy import Access, Moment
from bednet.site import decide, load_site
from tests.unit.policy.test_policy_decisions import NAMES, Broker

if TYPE_CHECKING:
    from pathlib import Path

    from bednet.site import Site
    from tests.unit.policy.conftest import SiteFolder

PUBLISH, SUBSCRIBE = Access.PUBLISH, Access.SUBSCRIBE
ZONE = "zone: Europe/Berlin"
RULES = f"""\
version: 1
roles:
  sensor: {{allow: {{publish: ["s/{{device.id}}/#"]}}}}
rules:
  - name: shift
    during: [{{days: [mon, tue], hours: "06:00-22:00", {ZONE}}}]
    from: [10.20.0.0/16]
    allow: {{publish: ["f/#"], subscribe: ["f/#"]}}
  - name: pause
    during: [{{hours: "12:00-13:00", {ZONE}}}]
    deny: {{publish: ["f/#"]}}
"""


# explain


def explained(site_folder: SiteFolder, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["explain", str(site_folder.path), "--device", "temp-101", *words]) == 0
    return capsys.readouterr().out.splitlines()


MONDAY = ["--at", "2026-03-02"]
INSIDE = ["--from", "10.20.1.1"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([*MONDAY, "T11:00:00+01:00", *INSIDE], ["may publish", "rule 'shift'", "until 2026-03-02T12:00:00+01:00"]),
        ([*MONDAY, "T12:30:00+01:00", *INSIDE], ["may NOT", "rule 'pause'", "until 2026-03-02T13:00:00+01:00"]),
        ([*MONDAY, "T14:00:00Z", *INSIDE], ["may publish", "rule 'shift'", "until 2026-03-02T21:00:00Z"]),
        (["--at", "2026-03-04", "T10:00:00+01:00", *INSIDE], ["may NOT", "again at 2026-03-09T06:00:00+01:00"]),
        ([*MONDAY, "T11:00:00+01:00", "--from", "10.21.1.1"], ["may NOT", "10.21.1.1 is in none of its networks"]),
        ([*MONDAY, "T11:00:00+01:00"], ["may NOT", "from certain addresses only: ask with --from"]),
        (INSIDE, ["may NOT", "rule 'pause' denies", "it denies that at certain times only"]),
        ([], ["may NOT", "rule 'pause' denies", "it denies that at certain times only: ask with --at"]),
    ],
)
def test_explain_at_a_moment_says_how_long_and_what_is_missing(
    site_folder: SiteFolder, capsys: pytest.CaptureFixture[str], words: list[str], expected: list[str]
) -> None:
    site_folder.write(policy=RULES)
    if "--at" in words:
        words = ["--at", "".join(words[1:3]), *words[3:]]
    lines = explained(site_folder, capsys, "--publish", "f/x", *words)
    place = 0
    for part in expected:
        place = next(number for number in range(place, len(lines)) if part in lines[number])
    assert ("rule/" in "".join(lines)) is any("'shift'" in part or "'pause'" in part for part in expected)


def test_explain_tells_the_end_of_access(site_folder: SiteFolder, capsys: pytest.CaptureFixture[str]) -> None:
    site_folder.write(
        devices="version: 1\ndevices:\n  - {id: temp-101, location: l, roles: [sensor], until: 2026-12-31T17:00:00Z}\n"
    )
    publish = ("--publish", "sensors/temp-101/t")
    assert explained(site_folder, capsys, *publish)[-1] == "  until 2026-12-31T17:00:00Z, when its access ends"
    assert (
        explained(site_folder, capsys, *publish, "--at", "2026-12-31T12:00:00Z")[-1] == "  until 2026-12-31T17:00:00Z"
    )
    assert "access ended at" in explained(site_folder, capsys, *publish, "--at", "2027-01-01T12:00:00Z")[1]


def test_explain_now_is_now(site_folder: SiteFolder, capsys: pytest.CaptureFixture[str]) -> None:
    lines = explained(site_folder, capsys, "--publish", "sensors/temp-101/t", "--at", "now")
    assert re.fullmatch(r"temp-101 may publish to sensors/temp-101/t at 20\d\d-\d\d-\d\dT.*\+00:00", lines[0])


@pytest.mark.parametrize(
    "words",
    [
        ["explain", "x", "--device", "d", "--publish", "a", "--at", "tomorrow"],
        ["explain", "x", "--device", "d", "--publish", "a", "--at", "2026-03-02T11:00:00"],
        ["explain", "x", "--device", "d", "--publish", "a", "--from", "10.0.0.0/8"],
        ["explain", "x", "--device", "d", "--publish", "a", "--access-control", "none"],
        ["diff", "x"],
        ["policy"],
        ["policy", "matrix"],
        ["policy", "matrix", "x", "--at", "1"],
    ],
)
def test_a_wrong_command_line_is_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: bednet" in capsys.readouterr().err


hours = st.tuples(st.integers(0, 23), st.integers(0, 24)).map(lambda pair: f"{pair[0]:02}:00-{pair[1]:02}:00")
windows = st.fixed_dictionaries(
    {"hours": hours, "zone": st.sampled_from(["Europe/Berlin", "America/New_York", "UTC"])},
    optional={"days": st.lists(st.sampled_from(["mon", "wed", "sat", "sun"]), min_size=1, unique=True)},
)
LEVELS = ("a", "b", "{device.id}", "+")
templates = st.builds(
    lambda levels, tail: "/".join([*levels, *tail]),
    st.lists(st.sampled_from(LEVELS), max_size=3),
    st.sampled_from([[], ["#"]]),
).filter(bool)
lists = st.fixed_dictionaries(
    {access: st.lists(templates, max_size=2, unique=True) for access in ("publish", "subscribe")}
)
rules = st.fixed_dictionaries(
    {},
    optional={
        "allow": lists,
        "deny": lists,
        "during": st.lists(
            windows, min_size=1, max_size=2, unique_by=lambda window: json.dumps(window, sort_keys=True)
        ),
        "from": st.lists(st.sampled_from(["10.0.0.0/8", "192.0.2.1", "2001:db8::/32"]), min_size=1, unique=True),
        "when": st.sampled_from(["device.location == 'l1'", "'x' in device.tags", "device.id != 'd1'"]),
    },
).filter(lambda rule: "allow" in rule or "deny" in rule)
policies = st.fixed_dictionaries(
    {
        "roles": st.fixed_dictionaries({"r": st.fixed_dictionaries({}, optional={"allow": lists, "deny": lists})}),
        "rules": st.lists(rules, max_size=4).map(
            lambda made: [{**rule, "name": f"n{number}"} for number, rule in enumerate(made)]
        ),
    }
)
devices = st.lists(
    st.fixed_dictionaries(
        {"location": st.sampled_from(["l1", "l2"]), "roles": st.sampled_from([["r"], []])},
        optional={
            "tags": st.just(["x"]),
            "until": st.just("2026-03-29T06:00:00Z"),
            "authentication": st.sampled_from([["psk"], ["psk", "password"], ["password"]]),
            "revoked": st.just("superseded"),
        },
    ),
    min_size=1,
    max_size=4,
).map(lambda made: [{**entry, "id": f"d{number}"} for number, entry in enumerate(made)])
TIMES = [parse_instant(f"2026-03-{day}T{hour:02}:30:00Z") for day in (28, 29, 30) for hour in (0, 1, 5, 12, 22)]
ADDRESSES = [None, *map(ipaddress.ip_address, ("10.1.2.3", "192.0.2.1", "192.0.2.2", "2001:db8::7"))]
MOMENTS = [Moment(at, address) for at in TIMES for address in ADDRESSES]
plain = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def site_of(site_folder: SiteFolder, policy: dict[str, Any], listed: list[Any]) -> Site:
    site_folder.write(
        devices=json.dumps({"version": 1, "devices": listed}), policy=json.dumps({"version": 1, **policy})
    )
    return load_site(site_folder.path)


@plain
@given(policies, devices, st.sampled_from(["a", "a/b", "b/d0"]), st.sampled_from(TIMES))
def test_an_answer_stays_until_the_time_that_is_told(
    site_folder: SiteFolder, policy: dict[str, Any], listed: list[Any], topic: str, at: Any
) -> None:
    site = site_of(site_folder, policy, listed)
    moment = Moment(at, ADDRESSES[1])
    turn = changes_at(site, "d0", PUBLISH, topic, moment)
    now = decide(site, "d0", PUBLISH, topic, moment).allowed
    event(f"turns: {turn is not None}")
    if turn is not None:
        assert turn > at
        assert decide(site, "d0", PUBLISH, topic, Moment(turn, moment.address)).allowed is not now
    for later in TIMES:
        if at < later and (turn is None or later < turn):
            assert decide(site, "d0", PUBLISH, topic, Moment(later, moment.address)).allowed is now


# acl_file


@plain
@given(policies, devices, st.lists(st.sampled_from(NAMES), min_size=10, max_size=20, unique=True))
def test_the_strictest_acl_file_never_allows_more_and_the_exact_one_says_the_same(
    site_folder: SiteFolder, policy: dict[str, Any], listed: list[Any], names: list[str]
) -> None:
    site = site_of(site_folder, policy, listed)
    strictest = Broker.reading(compile_acl_file(site, strictest=True))
    exact = None if acl_problems(site) else Broker.reading(compile_acl_file(site))
    event("exact" if exact else "stricter only")
    for device, name, access in itertools.product(site.devices, names, Access):
        if access is SUBSCRIBE and name.startswith("$share/"):
            continue
        granted = strictest.grants(device, access, name)
        if granted:
            assert all(decide(site, device, access, name, moment).allowed for moment in MOMENTS[::7])
        if exact:
            allowed = decide(site, device, access, name).allowed
            assert exact.grants(device, access, name) is allowed
            assert granted is allowed


@pytest.mark.parametrize(
    ("devices", "policy", "code", "message", "strictest"),
    [
        (
            "",
            "rules: [{name: x, from: [10.0.0.0/8], allow: {publish: [b]}}]",
            "acl-condition",
            r"policy.yml:3: rule 'x' allows publish 'b' only from 10.0.0.0/8 .* which allows nothing here",
            ["topic write a"],
        ),
        (
            "",
            'rules: [{name: x, during: [{days: [mon], zone: UTC}], deny: {publish: ["a/#"]}}]',
            "acl-condition",
            "denies publish 'a/#' only mon UTC .* which denies always here",
            ["topic deny a", "topic write a"],
        ),
        (", until: 2030-01-01T00:00:00Z", "", "acl-until", r"devices.yml:3: device 'd' has access until 2030", None),
        (", authentication: [psk]", "", "acl-psk", "device 'd' authenticates with a pre-shared key", None),
        (", authentication: [psk, password]", "", "acl-psk", "without the key", ["topic write a"]),
    ],
)
def test_what_an_acl_file_cannot_say_is_refused_or_stricter(
    site_folder: SiteFolder,
    capsys: pytest.CaptureFixture[str],
    devices: str,
    policy: str,
    code: str,
    message: str,
    strictest: list[str] | None,
) -> None:
    site_folder.write(
        devices=f"version: 1\ndevices:\n  - {{id: d, location: l, roles: [r]{devices}}}\n",
        policy=f"version: 1\nroles: {{r: {{allow: {{publish: [a]}}}}}}\n{policy}\n",
    )
    compiled = ["compile", str(site_folder.path), "--access-control"]
    assert main([*compiled, "acl_file"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(message, output.err), output.err
    assert f"[{code}]" in output.err
    assert "deploy with the plugin" in output.err
    assert main([*compiled, "plugin"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["acl_file"], [device["id"] for device in result["devices"]]) == (None, ["d"])
    assert main([*compiled, "acl_file", "--strictest"]) == 0
    acl_file = json.loads(capsys.readouterr().out)["acl_file"]
    if strictest is None:
        assert "user d\n" not in acl_file
    else:
        assert acl_file.split("user d\n")[1].strip().split("\n") == strictest


def test_a_deny_of_one_access_denies_both_when_told(site_folder: SiteFolder) -> None:
    site_folder.write_data(
        devices=[{"id": "d", "location": "l", "roles": ["r"]}],
        roles={"r": {"allow": {"publish": ["a/#"], "subscribe": ["a/#"]}, "deny": {"publish": ["a/x"]}}},
    )
    site = load_site(site_folder.path)
    assert [problem.code for problem in acl_problems(site)] == ["acl-one-sided-deny"]
    broker = Broker.reading(compile_acl_file(site, strictest=True))
    assert not broker.grants("d", SUBSCRIBE, "a/x")
    assert broker.grants("d", SUBSCRIBE, "a/y")


@pytest.mark.parametrize(
    ("role", "lines", "codes"),
    [
        ({"allow": {"publish": [" a", "b"]}}, ["topic write b"], []),
        ({"allow": {"publish": ["/" * 201, "b"]}}, ["topic write b"], []),
        ({"allow": {"publish": ["a/#"]}, "deny": {"publish": ["a/b "]}}, None, ["acl-space"]),
        ({"allow": {"publish": ["#"]}, "deny": {"publish": ["/" * 201]}}, None, ["acl-levels"]),
        ({"allow": {"publish": ["b"]}, "deny": {"publish": ["a "]}}, ["topic write b"], []),
    ],
)
def test_what_cannot_be_written_is_left_out_only_where_that_is_stricter(
    site_folder: SiteFolder, role: object, lines: list[str] | None, codes: list[str]
) -> None:
    site_folder.write_data(devices=[{"id": "d", "location": "l", "roles": ["r"]}], roles={"r": role})
    site = load_site(site_folder.path)
    assert [problem.code for problem in acl_problems(site, strictest=True)] == codes
    if lines is not None:
        assert compile_acl_file(site, strictest=True).split("user d\n")[1].strip().split("\n") == lines


# diff


def two_sites(
    tmp_path: Path, old: tuple[list[Any], dict[str, Any]], new: tuple[list[Any], dict[str, Any]]
) -> tuple[Site, Site]:
    sites = []
    for name, (listed, policy) in (("old", old), ("new", new)):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "devices.yml").write_text(json.dumps({"version": 1, "devices": listed}), encoding="utf-8")
        (folder / "policy.yml").write_text(json.dumps({"version": 1, **policy}), encoding="utf-8")
        sites.append(load_site(folder))
    return sites[0], sites[1]


def entry(identifier: str = "d", **others: object) -> dict[str, object]:
    return {"id": identifier, "location": "l", "roles": ["r"], **others}


def role(**lists_of_role: object) -> dict[str, Any]:
    return {"roles": {"r": lists_of_role}}


A = {"publish": ["a/#"]}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((entry(), role(allow=A)), (entry(), role(allow=A)), []),
        ((entry(), role(allow=A)), (entry(), role(allow={"publish": ["a/#", "a/b"]})), []),
        ((entry(), role(allow=A)), (entry(), role(allow=A, deny={"publish": ["b"]})), []),
        ((entry(), role(allow=A)), (entry(), role(allow={"publish": ["a/b"]})), ["- publish a/# "]),
        ((entry(), role(allow={"publish": ["a/b"]})), (entry(), role(allow=A)), ["+ publish a/# "]),
        ((entry(), role(allow=A)), (entry(), role(allow=A, deny={"publish": ["a/b"]})), ["- publish a/b, denied now"]),
        (
            (entry(), role(allow=A, deny={"publish": ["a/b"]})),
            (entry(), role(allow=A)),
            ["+ publish a/b, no longer denied"],
        ),
        (
            (entry(), role(allow=A)),
            (entry(), {"roles": {"r": {}}, "rules": [{"name": "x", "from": ["10.0.0.0/8"], "allow": A}]}),
            ["- publish a/#, but for from 10.0.0.0/8 "],
        ),
        (
            (entry(), {"roles": {"r": {}}, "rules": [{"name": "x", "from": ["10.0.0.0/8"], "allow": A}]}),
            (entry(), {"roles": {"r": {}}, "rules": [{"name": "x", "from": ["10.1.0.0/16"], "allow": A}]}),
            ["- publish a/# from 10.0.0.0/8, but for from 10.1.0.0/16"],
        ),
        (
            (entry(location="l1"), role(allow={"publish": ["{device.location}/x", "y"]})),
            (entry(location="l2"), role(allow={"publish": ["{device.location}/x", "y"]})),
            ["+ publish l2/x ", "- publish l1/x "],
        ),
        (
            (entry(), role(allow=A)),
            (entry(revoked="keyCompromise"), role(allow=A)),
            ["- all access: revoked, keyCompromise", "- publish a/#"],
        ),
        (
            (entry(revoked="superseded"), role(allow=A)),
            (entry(), role(allow=A)),
            ["+ access: no longer revoked, which was superseded", "+ authentication by certificate", "+ publish a/#"],
        ),
        (
            (entry(authentication=["password"]), role(allow=A)),
            (entry(authentication=["psk"]), role(allow=A)),
            ["+ authentication by psk", "- authentication by password"],
        ),
        (
            (entry(), role(allow=A)),
            (entry(until="2030-01-01T00:00:00Z"), role(allow=A)),
            ["- access until 2030-01-01T00:00:00Z"],
        ),
        (
            (entry(until="2029-01-01T00:00:00Z"), role(allow=A)),
            (entry(until="2030-01-01T00:00:00Z"), role(allow=A)),
            ["+ access until 2030-01-01T00:00:00Z, before: 2029-01-01T00:00:00Z"],
        ),
        ((entry(revoked="superseded"), role(allow=A)), (entry(revoked="superseded"), role()), []),
    ],
)
def test_a_difference_says_what_a_device_gains_and_loses(
    tmp_path: Path, old: tuple[Any, Any], new: tuple[Any, Any], expected: list[str]
) -> None:
    text = difference(*two_sites(tmp_path, ([old[0]], old[1]), ([new[0]], new[1])))
    told = [line.strip() for line in text.split("\n") if line.startswith("  ")]
    assert len(told) == len(expected), text
    for line, words in zip(told, expected, strict=True):
        assert line.startswith(words), text
    changed = int(bool(expected))
    assert f"New: 0. Gone: 0. Changed: {changed}. As before: {1 - changed}." in text


def test_ten_thousand_devices_are_told_in_a_few_lines(tmp_path: Path) -> None:
    listed = [entry(f"d{number:05}", roles=["r"] if number % 2 else ["s"]) for number in range(10_000)]
    old = {"roles": {"r": {"allow": {"publish": ["a/{device.id}"]}}, "s": {}}}
    new = {"roles": {"r": {"allow": {"publish": ["a/{device.id}/#"]}}, "s": {}}}
    text = difference(*two_sites(tmp_path, (listed[:9_990], old), (listed[10:], new)))
    assert len(text.split("\n")) < 30
    assert "Devices: 9990 before, 9990 now. New: 10. Gone: 10. Changed: 4990. As before: 4990." in text
    assert "4990 devices (d00011, d00013, d00015, d00017, d00019 and 4985 more): changed" in text
    assert "  + publish a/{device.id}/# (role 'r', " in text


@plain
@given(policies, policies, devices, devices)
def test_who_is_not_named_gains_and_loses_nothing(
    site_folder: SiteFolder, one: dict[str, Any], two: dict[str, Any], before: list[Any], after: list[Any]
) -> None:
    old, new = two_sites(site_folder.path, (before, one), (after, two))
    text = difference(old, new)
    named = set(re.findall(r"\bd\d\b", "\n".join(line for line in text.split("\n") if re.match(r"d\d", line))))
    event(f"named: {len(named)}")
    for device in {*old.devices, *new.devices} - named:
        for name, access in itertools.product(NAMES[:120:3], Access):
            for moment in MOMENTS[::11]:
                answers = {decide(site, device, access, name, moment).allowed for site in (old, new)}
                assert len(answers) == 1, (device, access, name, moment, text)


def test_diff_is_a_command(site_folder: SiteFolder, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(site_folder.path)
    assert main(["diff", path, path]) == 0
    assert capsys.readouterr().out == "Devices: 1 before, 1 now. New: 0. Gone: 0. Changed: 0. As before: 1.\n"
    assert main(["diff", path, path + "/nowhere"]) == 1
    assert "there is no such folder" in capsys.readouterr().err


# matrix


@plain
@given(policies, devices, st.sampled_from([Moment(), *MOMENTS[::9]]))
def test_the_matrix_says_what_is_decided(
    site_folder: SiteFolder, policy: dict[str, Any], listed: list[Any], moment: Moment
) -> None:
    tests = [{"device": "d0", "cannot": {"publish": ["zz/d1", "a/b"], "subscribe": ["a/+", "zz/#"]}}]
    site = site_of(site_folder, {**policy, "tests": tests}, listed)
    matrix = matrix_of(site, moment)
    assert sorted(device for group in matrix.groups for device in group) == sorted(site.devices)
    assert {"zz/d1", "a/b", "a/+", "zz/#"} <= set(matrix.topics)
    for group, column in zip(matrix.groups, matrix.columns, strict=True):
        for topic, (publish, subscribe) in zip(matrix.topics, column, strict=True):
            for device in group:
                decision = decide(site, device, SUBSCRIBE, topic, moment)
                assert (subscribe.sure == 2) is decision.allowed
                assert (subscribe.sure == 1) is (decision.verdict == "partly")
                best = decide(site, device, SUBSCRIBE, topic, moment, generous=True)
                assert (subscribe.possible == 2) is best.allowed
                if "+" not in topic and "#" not in topic:
                    assert (publish.sure == 2) is decide(site, device, PUBLISH, topic, moment).allowed


def test_the_matrix_is_a_table_and_a_picture(
    site_folder: SiteFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    site_folder.write(policy=RULES + "tests: [{device: temp-101, cannot: {publish: [x<y&z]}}]\n")
    assert main(["policy", "matrix", str(site_folder.path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == f"{site_folder.path}: who may do what"
    assert table[2] == "1  temp-101"
    assert [line.split() for line in table[5:9]] == [["f/#", "P*S*"], ["s/+/#", "p"], ["x<y&z", "."], []]
    picture = tmp_path / "matrix.svg"
    command = ["policy", "matrix", str(site_folder.path), "--output", str(picture)]
    assert main([*command, "--at", "2026-03-02T11:00:00+01:00", "--from", "10.20.0.1"]) == 0
    root = ElementTree.fromstring(picture.read_text(encoding="utf-8"))  # noqa: S314 - we made it
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"f/#", "s/+/#", "x<y&z", "temp-101"} <= set(texts)
    titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "temp-101: f/#: publish all" in titles
    assert "temp-101: s/+/#: publish a part" in titles
    assert not any(title and title.startswith("temp-101: x<y&z") for title in titles)
    assert main([*command[:-1], str(tmp_path / "matrix.png")]) == 1
    assert "only SVG is drawn here. Cure: end the name with .svg" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "no" / "matrix.svg")]) == 1
    assert "No such file or directory. Cure: name a file that you may write" in capsys.readouterr().err


def test_the_matrix_of_ten_thousand_devices_has_few_columns(site_folder: SiteFolder) -> None:
    listed = [entry(f"d{number}", location=f"l{number % 7}") for number in range(10_000)]
    policy = role(allow={"publish": ["a/{device.location}/{device.id}/#"]})
    tests = [{"device": "d7", "can": {"publish": ["a/l0/d7/x"]}}]
    matrix = matrix_of(site_of(site_folder, {**policy, "tests": tests}, listed), Moment())
    assert [group[:2] for group in matrix.groups] == [("d0", "d1"), ("d7",)]
    assert "d0, d1, d2 and 9996 more" in matrix.text()


# warnings

_IDLE = re.compile(r"(role|rule) '(\w+)': (allow|deny) (publish|subscribe) '(.+)' (?:changes nothing|never holds): ")


@plain
@given(policies, devices)
def test_a_line_that_is_said_to_change_nothing_can_be_taken_out(
    site_folder: SiteFolder, policy: dict[str, Any], listed: list[Any]
) -> None:
    site = site_of(site_folder, policy, listed)
    told = [match for warning in site.warnings if (match := _IDLE.match(warning.message))]
    event(f"told: {min(len(told), 3)}")
    for match in told[:3]:
        kind, name, effect, access, template = match.groups()
        without = copy.deepcopy(policy)
        owner = without["roles"][name] if kind == "role" else without["rules"][int(name[1:])]
        owner[effect][access].remove(template)
        changed = site_of(site_folder, without, listed)
        for device, topic, moment in itertools.product(site.devices, NAMES[:150:3], MOMENTS[::8]):
            for asked in Access:
                answers = {decide(either, device, asked, topic, moment).allowed for either in (site, changed)}
                assert len(answers) == 1, (match[0], device, asked, topic, moment)
