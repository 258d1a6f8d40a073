# SPDX-License-Identifier: Apache-2.0
"""Tests of a policy, and questions, about devices that only a token describes.

Sharp edges: a test of a token that no gateway would let in, one of a device whose token means nothing, a common rule
that is decided otherwise than the plugin does, and a test that can only hold because it is not run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bednet.cli import main
from bednet.issuers import MOST_ROLES, TokenDevice, token_faults
from bednet.policy import Access
from bednet.site import decide, failing_tests, load_one, load_site

if TYPE_CHECKING:
    from tests.unit.policy.conftest import SiteFolder

Json = dict[str, Any]

ROLES = """\
version: 1
roles:
  sensor:
    allow:
      publish: ["sensors/{device.line}/{device.id}/#"]
  viewer:
    allow:
      subscribe: ["sensors/+/+/#"]
  other:
    allow:
      publish: ["other/{device.id}"]
rules:
  - name: day
    during: [{hours: "06:00-22:00", zone: UTC}]
    from: [10.0.0.0/8]
    allow: {publish: ["all/{device.id}"]}
  - name: quiet
    when: "device.type == 'loud'"
    deny: {publish: ["sensors/+/+/noise"]}
issuers:
  - name: keycloak
    issuer: https://sso.example/realms/plant
    audience: [mqtt-broker]
    jwks_url: https://sso.example/realms/plant/certs
    device: {claim: azp, prefix: "kc-"}
    roles:
      claim: roles
      map: {a: sensor, b: viewer, c: sensor}
    attributes: {line: plant_line}
  - name: listed
    issuer: https://listed.example
    audience: [mqtt-broker]
    jwks_url: https://listed.example/certs
    device: {prefix: "l-"}
"""
DEVICES = """\
version: 1
devices:
  - {id: kc-listed, location: hall-1, type: quiet, roles: [other], authentication: [token]}
"""
ROBOT = '{issuer: keycloak, id: kc-robot-7, roles: [sensor], attributes: {line: "1"}}'
TESTS_AT = len(ROLES.splitlines()) + 2


@pytest.fixture
def folder(site_folder: SiteFolder) -> SiteFolder:
    """A site with an issuer that gives roles, and one that gives none."""
    site_folder.write(devices=DEVICES, policy=ROLES)
    return site_folder


def write(folder: SiteFolder, token: str, *lines: str) -> None:
    test = "\n".join(f"    {line}" for line in lines or ("can: {publish: [sensors/1/kc-robot-7/t]}",))
    folder.write(devices=DEVICES, policy=f"{ROLES}tests:\n  - token: {token}\n{test}\n")


@pytest.mark.parametrize(
    "lines",
    [
        ("can: {publish: [sensors/1/kc-robot-7/t]}",),
        ("cannot: {publish: [sensors/2/kc-robot-7/t]}",),
        ("cannot: {publish: [sensors/1/kc-robot-8/t], subscribe: [sensors/1/kc-robot-7/t]}",),
        # Whatever a `when` asks, a deny is for it.
        ("cannot: {publish: [sensors/1/kc-robot-7/noise]}",),
        ('at: "2026-11-02T06:00:00Z"', "from: 10.1.2.3", "can: {publish: [all/kc-robot-7]}"),
        ('at: "2026-11-02T05:59:59Z"', "from: 10.1.2.3", "cannot: {publish: [all/kc-robot-7]}"),
        ('at: "2026-11-02T06:00:00Z"', "from: 11.1.2.3", "cannot: {publish: [all/kc-robot-7]}"),
    ],
)
def test_what_a_token_describes_is_tested_like_a_device(folder: SiteFolder, lines: tuple[str, ...]) -> None:
    write(folder, ROBOT, *lines)
    assert folder.load().tests
    expectation, _, topics = lines[-1].partition(":")
    turned = {"can": "cannot", "cannot": "can"}[expectation]
    write(folder, ROBOT, *lines[:-1], f"{turned}:{topics}")
    for problem in folder.problems():
        assert problem.code == "test-failed"
        assert problem.place.line >= TESTS_AT
        assert problem.message.startswith("test failed: 'kc-robot-7' ")


def test_several_roles_are_all_of_their_rights(folder: SiteFolder) -> None:
    both = '{issuer: keycloak, id: kc-robot-7, roles: [viewer, sensor], attributes: {line: "1"}}'
    write(folder, both, "can: {publish: [sensors/1/kc-robot-7/t], subscribe: [sensors/2/+/#]}")
    site = folder.load()
    device = site.tests[0].device
    assert isinstance(device, TokenDevice)
    decided = decide(site, device, Access.PUBLISH, "sensors/1/kc-robot-7/t")
    assert decided.rule is not None
    assert decided.rule.id == "role/sensor/allow/publish/0"


def token(**more: str) -> str:
    keys = {"issuer": "keycloak", "id": "kc-robot-7", "roles": "[sensor]", "attributes": '{line: "1"}', **more}
    return "{" + ", ".join(f"{key}: {value}" for key, value in keys.items() if value) + "}"


REFUSED: list[tuple[str, str, str, str]] = [
    (token(issuer="keyclaok"), "unknown-issuer", "no issuer 'keyclaok' in policy.yml", "did you mean 'keycloak'?"),
    (token(issuer="listed", id="l-1"), "token-issuer", "issuer 'listed' gives no roles", "add 'roles' to the issuer"),
    (token(id="robot-7"), "token-id", "ids begin with 'kc-'", "as in kc-robot-7"),
    (token(id="KC-robot-7"), "token-id", "ids begin with 'kc-'", "write the whole id"),
    (token(id='"kc-a/b"'), "id-wildcard", "contains '/'", "leave out"),
    (token(id="kc-" + 62 * "a"), "id-too-long", "65 characters", "at most 64"),
    (token(id="kc-listed"), "token-listed", "'kc-listed' is in devices.yml", "name it as a device"),
    (token(roles="[senser]"), "token-role", "gives nobody the role 'senser'", "did you mean 'sensor'?"),
    (token(roles="[other]"), "token-role", "gives nobody the role 'other'", "Its 'map' gives: sensor, viewer"),
    (token(attributes=""), "placeholder-value-missing", "has no 'line' of its token", "the claim 'plant_line' has it"),
    (token(attributes="{line: '1', hall: '2'}"), "token-attribute", "no claim for {device.hall}", "are: line"),
    *(
        (token(attributes=f"{{line: {value}}}"), "placeholder-value", f"'line' {why}", "a token with such a claim")
        for value, why in (
            ('"1/2"', "contains '/'"),
            ('"#"', "contains '#'"),
            ('"$1"', "begins or ends with a space, or begins with '$'"),
            ('""', "is empty"),
            (f'"{256 * "l"}"', "has 256 bytes"),
            ('"a\\u0001"', "cannot stand in a topic"),
        )
    ),
]


@pytest.mark.parametrize(("described", "code", "message", "cure"), REFUSED)
def test_what_no_gateway_would_let_in_is_refused(
    folder: SiteFolder, described: str, code: str, message: str, cure: str
) -> None:
    write(folder, described)
    (problem,) = folder.problems()
    assert problem.code == code
    assert problem.place.file.endswith("policy.yml")
    assert problem.place.line == TESTS_AT
    assert problem.message.startswith("test of '")
    assert message in problem.message
    assert cure in problem.cure


def test_the_line_is_that_of_the_key(folder: SiteFolder) -> None:
    keys = ("issuer: keycloak", "id: kc-robot-7", "roles: [sensor, senser]", "attributes:", '  line: "+"')
    write(folder, "".join(f"\n      {key}" for key in keys))
    found = {problem.code: problem.place.line for problem in folder.problems()}
    assert found == {"token-role": TESTS_AT + 3, "placeholder-value": TESTS_AT + 5}


def test_more_roles_than_a_token_can_have(folder: SiteFolder) -> None:
    site = folder.load()
    for count, wrong in ((0, True), (1, False), (MOST_ROLES, False), (MOST_ROLES + 1, True)):
        device = TokenDevice("keycloak", "kc-1", ("viewer",) * count)
        faults = list(token_faults(device, site.issuers, site.role_profiles))
        assert [fault.code for fault in faults] == ["token-role"] * wrong


def test_the_plugin_counts_as_many_roles_of_a_token() -> None:
    source = Path(__file__).parents[3] / "src/plugin/token.c"
    stated = re.findall(r"^#define ROLES_MAX (\d+)\b", source.read_text(encoding="utf-8"), re.MULTILINE)
    assert stated == [str(MOST_ROLES)]


SHAPES: list[tuple[str, str, str]] = [
    ("  - can: {publish: [a]}\n", "missing-key", "neither 'device' nor 'token'"),
    (
        f"  - device: kc-listed\n    token: {ROBOT}\n    can: {{publish: [a]}}\n",
        "one-of-two",
        "both 'device' and 'token'",
    ),
    (f"  - token: {ROBOT}\n", "missing-key", "neither 'can' nor 'cannot'"),
    ("  - token: {issuer: keycloak, id: kc-1}\n    can: {publish: [a]}\n", "missing-key", "'token': 'roles' missing"),
    (f"  - token: {token(roles='[]')}\n    can: {{publish: [a]}}\n", "wrong-type", "'token/roles' is an empty list"),
    (f"  - token: {token(roles='sensor')}\n    can: {{publish: [a]}}\n", "wrong-type", "'token/roles' is 'sensor'"),
    (f"  - token: {token(attributes='{line: 1}')}\n    can: {{publish: [a]}}\n", "wrong-type", "is the number 1"),
    (f"  - token: {token(claims='{line: x}')}\n    can: {{publish: [a]}}\n", "unknown-key", "unknown key 'claims'"),
    (f"  - token: {ROBOT}\n    can: {{publish: ['a/#']}}\n", "topic-wildcard", "test of 'kc-robot-7': "),
    (f"  - token: {ROBOT}\n    at: noon\n    can: {{publish: [a]}}\n", "bad-time", "test of 'kc-robot-7': 'at'"),
]


@pytest.mark.parametrize(("tests", "code", "message"), SHAPES)
def test_a_test_of_another_shape_is_refused(folder: SiteFolder, tests: str, code: str, message: str) -> None:
    folder.write(devices=DEVICES, policy=f"{ROLES}tests:\n{tests}")
    (problem,) = folder.problems()
    assert problem.code == code
    assert message in str(problem)
    assert problem.cure


def test_one_device_alone_leaves_the_tests_of_tokens_out(folder: SiteFolder) -> None:
    write(folder, ROBOT, "can: {publish: [nothing]}")
    site, device = load_one(folder.path, b'{"id": "a", "location": "l", "type": "t", "roles": ["viewer"]}', "stdin")
    assert device.id == "a"
    assert failing_tests(site) == []


def test_a_test_says_that_a_wide_filter_of_a_role_of_tokens_is_meant(folder: SiteFolder) -> None:
    policy = ROLES.replace('subscribe: ["sensors/+/+/#"]', 'subscribe: ["#"]')
    devices = DEVICES.replace("[other]", "[other, viewer]")
    folder.write(devices=devices, policy=policy)
    assert "wide-filter" in {warning.code for warning in folder.load().warnings}
    meant = 'tests:\n  - token: {issuer: keycloak, id: kc-screen, roles: [viewer]}\n    can: {subscribe: ["#"]}\n'
    folder.write(devices=devices, policy=policy + meant)
    assert "wide-filter" not in {warning.code for warning in folder.load().warnings}


# --- bednet explain


def explain(folder: SiteFolder, *more: str, device: str = "kc-robot-7") -> list[str]:
    usual = ["explain", str(folder.path), "--device", device, "--publish", "sensors/1/kc-robot-7/t"]
    return [*usual, *more]


KNOWN = ("--issuer", "keycloak", "--role", "sensor", "--attribute", "line=1")


def test_explain_answers_for_a_token(folder: SiteFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(explain(folder, *KNOWN)) == 0
    told = capsys.readouterr().out
    assert told.startswith("kc-robot-7 may publish to sensors/1/kc-robot-7/t\n  because role 'sensor' allows")
    assert main(explain(folder, "--issuer", "keycloak", "--role", "sensor", "--attribute", "line=2")) == 0
    assert capsys.readouterr().out.startswith("kc-robot-7 may NOT publish to sensors/1/kc-robot-7/t\n")


def test_explain_says_until_when_a_rule_holds_for_a_token(
    folder: SiteFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--at", "2026-11-02T21:59:59+00:00", "--from", "10.1.1.1"]
    command = ["explain", str(folder.path), "--device", "kc-1", "--issuer", "keycloak", "--role", "viewer"]
    assert main([*command, "--publish", "all/kc-1", *asked]) == 0
    told = capsys.readouterr().out
    assert "kc-1 may publish to all/kc-1" in told
    assert "  until 2026-11-02T22:00:00Z\n" in told


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--issuer", "keyclaok", "--role", "sensor"), "unknown-issuer", "did you mean 'keycloak'?"),
        (("--issuer", "keycloak", "--role", "sensor"), "placeholder-value-missing", "has no 'line' of its token"),
        (("--issuer", "keycloak"), "token-role", "has 0 roles of its token"),
        (("--issuer", "keycloak", "--role", "other"), "token-role", "gives nobody the role 'other'"),
        ((), "unknown-device", "or say with --issuer, --role and --attribute what its token says"),
    ],
)
def test_explain_refuses_what_no_gateway_would_let_in(
    folder: SiteFolder, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], code: str, said: str
) -> None:
    assert main(explain(folder, *more)) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert f"[{code}]\n" in told.err
    assert said in told.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--role", "sensor"), "arguments --role and --attribute: need --issuer"),
        (("--attribute", "line=1"), "arguments --role and --attribute: need --issuer"),
        ((*KNOWN, "--attribute", "line"), "'line' is not NAME=VALUE"),
        ((*KNOWN, "--access-control", "acl_file"), "argument --issuer: tokens need the plugin"),
    ],
)
def test_explain_refuses_half_a_token(
    folder: SiteFolder, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(explain(folder, *more))
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_explain_names_a_listed_device_as_one(folder: SiteFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(explain(folder, "--issuer", "keycloak", "--role", "viewer", device="kc-listed")) == 1
    assert "is in devices.yml, so what a token says of its roles" in capsys.readouterr().err
    assert load_site(folder.path).devices["kc-listed"].roles == ("other",)
