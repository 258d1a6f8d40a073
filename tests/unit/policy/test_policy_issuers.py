# SPDX-License-Identifier: Apache-2.0
"""Issuers of tokens in policy.yml: what is refused, and what gateways get to know.

Sharp edges: an issuer that could speak for another's devices or for a reserved id, a key that anybody on the way could
have put there, a private key in the site's folder, and a rule about devices that nobody knows.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from bednet import compiled, store
from bednet.cli import main
from bednet.difference import difference
from bednet.site import load_site
from tests.unit.jwks import jwk
from tests.unit.store.sites import secrets

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.policy.conftest import SiteFolder

Json = dict[str, Any]
ROLES = {
    "sensor": {"allow": {"publish": ["sensors/{device.location}/{device.id}/#"]}},
    "viewer": {"allow": {"subscribe": ["sensors/+/+/#"]}},
}
EC_KEY = jwk(ec.generate_private_key(ec.SECP256R1()).public_key(), kid="a")
SERVICE = {
    "name": "site",
    "issuer": "https://tokens.plant.example:8443",
    "audience": ["mqtts://plant.example"],
    "service": True,
}
FOREIGN = {"name": "sso", "issuer": "https://sso.example/r", "audience": ["mqtt"], "jwks_url": "https://sso.example/k"}
WITH_ROLES = {
    **FOREIGN,
    "device": {"claim": "azp", "prefix": "sso-"},
    "roles": {"claim": "realm_access.roles", "map": {"plant-sensor": "sensor"}},
    "attributes": {"location": "plant.location"},
}
DEVICE = {"id": "edge-1", "location": "hall-1", "roles": ["sensor", "viewer"], "authentication": ["token"]}


def write(folder: SiteFolder, *issuers: Json, rules: object = (), device: Json = DEVICE, roles: object = ROLES) -> None:
    policy = {"version": 1, "roles": roles, "rules": list(rules), "issuers": issuers}  # type: ignore[call-overload]
    folder.write(
        devices=json.dumps({"version": 1, "devices": [device]}),
        policy=json.dumps(policy, indent=1),
    )


def lines(folder: SiteFolder) -> list[Json]:
    return [json.loads(line) for line in compiled.lines(folder.load())]


def issuers_of(folder: SiteFolder) -> list[Json]:
    return [line for line in lines(folder) if "issuer" in line]


def test_an_issuer_has_these_defaults(site_folder: SiteFolder) -> None:
    write(site_folder, SERVICE, {**FOREIGN, "device": {"prefix": "x-"}})
    site, sso = issuers_of(site_folder)
    assert site == {
        "issuer": "https://tokens.plant.example:8443",
        "name": "site",
        "service": True,
        "audience": ["mqtts://plant.example"],
        "algorithms": ["ES256"],
        "leeway": 30,
        "longest": 86400,
        "typ": ["at+jwt"],
        "scope": "aif",
        "claim": "sub",
        "prefix": "",
        "roles": None,
        "keys": None,
        "jwks_url": None,
    }
    assert (sso["scope"], sso["claim"], sso["prefix"], sso["jwks_url"]) == ("policy", "sub", "x-", FOREIGN["jwks_url"])
    assert site_folder.load().warnings == ()


def test_what_is_said_of_an_issuer_gets_to_the_gateways(site_folder: SiteFolder, tmp_path: Path) -> None:
    more = {"algorithms": ["EdDSA", "PS256"], "leeway": 0, "longest": 600, "scope": "aif"}
    write(site_folder, {**WITH_ROLES, **more, "typ": ["application/AT+JWT", "JWT", "jwt", ""]})
    (found,) = issuers_of(site_folder)
    assert {key: found[key] for key in more} == more
    assert found["typ"] == ["at+jwt", "jwt", ""]
    assert (found["claim"], found["prefix"]) == ("azp", "sso-")
    mapping = {"value": "plant-sensor", "profile": "role:sensor", "claims": ["plant.location"]}
    assert found["roles"] == {"claim": "realm_access.roles", "map": [mapping]}
    plant = store.Store(tmp_path / "store")
    plant.apply(list(compiled.lines(site_folder.load())), secrets())
    assert plant.status(deep=True)["problems"] == []
    (shown,) = (line for line in plant.dump() if "audience" in line)
    expected = {key: found[key] for key in shown if key != "roles"} | {"roles": shown["roles"]}
    assert shown == expected
    assert shown["roles"]["map"][0]["profile"] == store.profile_key("role:sensor").hex()


def test_roles_may_be_words_of_one_text(site_folder: SiteFolder, tmp_path: Path) -> None:
    write(site_folder, {**WITH_ROLES, "roles": {"claim": "scp", "separator": " ", "map": {"sensors.write": "sensor"}}})
    (found,) = issuers_of(site_folder)
    mapping = {"value": "sensors.write", "profile": "role:sensor", "claims": ["plant.location"]}
    assert found["roles"] == {"claim": "scp", "separator": " ", "map": [mapping]}
    plant = store.Store(tmp_path / "store")
    plant.apply(list(compiled.lines(site_folder.load())), secrets())
    assert plant.status(deep=True)["problems"] == []
    (shown,) = (line for line in plant.dump() if "audience" in line)
    assert {key: shown["roles"][key] for key in ("claim", "separator")} == {"claim": "scp", "separator": " "}
    one = site_folder.load()
    write(site_folder, {**WITH_ROLES, "roles": {"claim": "scp", "map": {"sensors.write": "sensor"}}})
    assert "separator" not in issuers_of(site_folder)[0]["roles"]
    assert "  roles_separator (a space) -> (none)\n" in difference(one, site_folder.load())


def test_of_the_rules_a_device_of_a_token_has_those_without_when_and_all_denies(site_folder: SiteFolder) -> None:
    line = {"during": [{"hours": "06:00-22:00", "zone": "Europe/Berlin"}]}
    rules = [
        {"name": "all", "allow": {"publish": ["all/{device.id}"]}, **line},
        {"name": "some", "when": "device.location == 'x'", "allow": {"publish": ["some"]}, "deny": {"publish": ["no"]}},
        {"name": "none", "when": "device.location == 'x'", "deny": {"subscribe": ["sensors/{device.location}/#"]}},
    ]
    write(site_folder, WITH_ROLES, rules=rules)
    (profile,) = (entry for entry in lines(site_folder) if entry.get("profile") == "role:sensor" and "rules" in entry)
    assert profile["names"] == ["location"]
    assert [rule["id"] for rule in profile["rules"]] == [
        "role/sensor/allow/publish/0",
        "rule/all/allow/publish/0",
        "rule/some/deny/publish/0",
        "rule/none/deny/subscribe/0",
    ]
    assert [len(rule["during"]) for rule in profile["rules"]] == [0, 1, 0, 0]
    assert not any(entry.get("profile") == "role:viewer" for entry in lines(site_folder))


def _map(**values: str) -> Json:
    return {"claim": "r", "map": values}


REFUSED: list[tuple[str, list[Json], str, str]] = [
    (
        "no TLS",
        [{**FOREIGN, "issuer": "http://sso.example"}],
        "bad-url",
        "'issuer' is 'http://sso.example', which does",
    ),
    ("no host", [{**FOREIGN, "issuer": "https://"}], "bad-url", "no URL of a host"),
    ("a user", [{**FOREIGN, "issuer": "https://me@x"}], "bad-url", "no URL of a host"),
    ("a wrong port", [{**FOREIGN, "issuer": "https://x:99999"}], "bad-url", "which is no URL"),
    ("a query", [{**FOREIGN, "issuer": "https://x?a"}], "bad-url", "neither '\\?' nor '#'"),
    ("keys without TLS", [{**FOREIGN, "jwks_url": "http://x/k"}], "bad-url", "'jwks_url' is 'http://x/k'.*anybody on"),
    ("no keys", [{k: v for k, v in FOREIGN.items() if k != "jwks_url"}], "issuer-keys", "neither 'jwks_file' nor 'jw"),
    ("two places", [{**FOREIGN, "jwks_file": "a.json"}], "issuer-keys", "both 'jwks_file' and 'jwks_url'"),
    (
        "a service with a URL",
        [{**SERVICE, "jwks_url": "https://x/k"}],
        "service-keys",
        "hands its keys to the gateways",
    ),
    ("a service with a file", [{**SERVICE, "jwks_file": "x.json"}], "service-keys", "hands its keys to the gateways"),
    ("a service with roles", [{**SERVICE, "roles": _map(v="sensor")}], "service-roles", "devices.yml says which roles"),
    ("a service with ids", [{**SERVICE, "device": {"claim": "azp"}}], "service-device", "for devices by their ids"),
    ("a service without scope", [{**SERVICE, "scope": "policy"}], "service-scope", "always have a scope"),
    (
        "two services",
        [SERVICE, {**SERVICE, "name": "b", "issuer": "https://b"}],
        "service-twice",
        "second token service of the site, beside 'site'",
    ),
    ("one name twice", [FOREIGN, {**FOREIGN, "issuer": "https://b"}], "issuer-twice", "stands here again; .* line"),
    ("one iss twice", [FOREIGN, {**FOREIGN, "name": "b"}], "issuer-twice", "same 'issuer' as 'sso' in line"),
    ("another algorithm", [{**FOREIGN, "algorithms": ["HS256"]}], "bad-value", "ES256, EdDSA, RS256 or PS256"),
    ("no algorithm", [{**FOREIGN, "algorithms": ["none"]}], "bad-value", "'algorithms' is 'none'"),
    ("an algorithm twice", [{**FOREIGN, "algorithms": ["ES256", "ES256"]}], "listed-twice", "'ES256' twice"),
    ("a wide leeway", [{**FOREIGN, "leeway": 301}], "wrong-type", "0 to 300"),
    ("no time at all", [{**FOREIGN, "longest": 0}], "wrong-type", "1 to 31536000"),
    ("an empty audience", [{**FOREIGN, "audience": [""]}], "bad-audience", "is empty, too long"),
    ("no audience", [{**FOREIGN, "audience": []}], "wrong-type", "list of what may be the 'aud'"),
    ("an invisible audience", [{**FOREIGN, "audience": ["a\u200bb"]}], "bad-audience", "control characters"),
    ("an unknown key", [{**FOREIGN, "audiense": 1}], "unknown-key", "did you mean 'audience'"),
    ("no prefix", [{**WITH_ROLES, "device": {"claim": "azp"}}], "prefix-missing", "has no prefix for them"),
    ("a prefix that is reserved", [{**FOREIGN, "device": {"prefix": "Bednet-x"}}], "prefix-reserved", "is reserved"),
    ("one that can become so", [{**FOREIGN, "device": {"prefix": "b"}}], "prefix-reserved", "begins with 'bednet-'"),
    ("a prefix with a level", [{**FOREIGN, "device": {"prefix": "a/"}}], "bad-prefix", "no device's id can begin"),
    ("a prefix of nothing", [{**FOREIGN, "device": {"prefix": ""}}], "bad-prefix", "no device's id can begin"),
    (
        "prefixes of which one begins with the other",
        [
            {**WITH_ROLES, "device": {"prefix": "kc-"}},
            {**WITH_ROLES, "name": "b", "issuer": "https://b", "device": {"prefix": "kc-2"}},
        ],
        "prefix-overlap",
        "one id could be of both",
    ),
    ("an unknown role", [{**WITH_ROLES, "roles": _map(v="senser")}], "unknown-role", "did you mean 'sensor'"),
    ("no roles", [{**WITH_ROLES, "roles": {"claim": "r", "map": {}}}], "wrong-type", "values of the claim"),
    ("roles from nowhere", [{**WITH_ROLES, "roles": {"map": {"a": "sensor"}}}], "missing-key", "'claim' missing"),
    (
        "a claim that cannot be",
        [{**WITH_ROLES, "roles": {"claim": "a..b", "map": {"a": "sensor"}}}],
        "bad-claim",
        "'roles/claim' is 'a..b'",
    ),
    (
        "a separator that is none",
        [{**WITH_ROLES, "roles": {**_map(v="sensor"), "separator": ","}}],
        "bad-value",
        "'roles/separator' is ','.*one text with a space between two roles",
    ),
    (
        "two words as one role",
        [{**WITH_ROLES, "roles": {"claim": "scp", "separator": " ", "map": {"a b": "sensor"}}}],
        "bad-claim",
        "no role is 'a b', since 'separator' says .* map each word by itself",
    ),
    (
        "a placeholder without a claim",
        [{k: v for k, v in WITH_ROLES.items() if k != "attributes"}],
        "claim-missing",
        r"gives the role 'sensor', and says nowhere what \{device.location\} is",
    ),
    (
        "claims without roles",
        [{**FOREIGN, "attributes": {"location": "l"}}],
        "attributes-without-roles",
        "devices.yml says what its devices are",
    ),
    (
        "a claim for the id",
        [{**WITH_ROLES, "attributes": {"location": "l", "id": "sub"}}],
        "attribute-name",
        r"no claim can be \{device.id\}",
    ),
]


@pytest.mark.parametrize(("issuers", "code", "why"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_is_wrong_is_told_with_its_line_and_cure(
    site_folder: SiteFolder, issuers: list[Json], code: str, why: str
) -> None:
    write(site_folder, *issuers)
    problems = site_folder.problems()
    assert [problem.code for problem in problems] == [code]
    text = (site_folder.path / "policy.yml").read_text(encoding="utf-8").splitlines()
    assert problems[0].place.file.endswith("policy.yml")
    assert text.index(' "issuers": [') < problems[0].place.line <= len(text)
    assert problems[0].cure
    assert re.search(why, str(problems[0])), str(problems[0])


def test_a_claim_is_never_the_first_level_of_a_topic(site_folder: SiteFolder) -> None:
    roles = {**ROLES, "sensor": {"allow": {"publish": ["{device.location}/x"]}}}
    write(site_folder, WITH_ROLES, roles=roles)
    (problem,) = site_folder.problems()
    assert problem.code == "claim-first-level"
    write(site_folder, WITH_ROLES, roles={**ROLES, "sensor": {"allow": {"publish": ["{device.id}/{device.location}"]}}})
    assert site_folder.load().warnings == ()


def test_an_issuer_without_a_prefix_beside_others_is_odd(site_folder: SiteFolder) -> None:
    write(site_folder, SERVICE, FOREIGN)
    assert [warning.code for warning in site_folder.load().warnings] == ["issuer-for-all"]
    write(site_folder, FOREIGN)
    assert site_folder.load().warnings == ()


def test_a_claim_that_no_rule_uses_is_odd(site_folder: SiteFolder) -> None:
    write(site_folder, {**WITH_ROLES, "attributes": {"location": "l", "line": "l"}})
    (warning,) = site_folder.load().warnings
    assert (warning.code, "{device.line}" in warning.message) == ("unused-attribute", True)


def test_a_role_that_only_tokens_give_is_in_use(site_folder: SiteFolder) -> None:
    device = {"id": "a", "location": "l", "roles": ["viewer"]}
    write(site_folder, WITH_ROLES, device=device)
    assert site_folder.load().warnings == ()


def test_a_device_that_waits_for_a_token_of_nobody_is_odd(site_folder: SiteFolder) -> None:
    write(site_folder)
    assert [warning.code for warning in site_folder.load().warnings] == ["no-issuer"]


# --- keys in the site's folder


def with_file(folder: SiteFolder, content: object, **more: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder.path / "keys.json").write_text(text, encoding="utf-8")
    issuer = {key: value for key, value in FOREIGN.items() if key != "jwks_url"}
    write(folder, {**issuer, "jwks_file": "keys.json", **more})


def test_usable_keys_get_to_the_gateways_and_nothing_else_of_the_file(site_folder: SiteFolder) -> None:
    other = jwk(rsa.generate_private_key(65537, 2048).public_key(), use="enc", kid="e")
    with_file(site_folder, {"keys": [other, EC_KEY | {"use": "sig", "x5c": ["AAAA"]}], "more": 1})
    (found,) = issuers_of(site_folder)
    assert found["keys"] == [{key: EC_KEY[key] for key in ("kty", "crv", "x", "y", "kid")} | {"use": "sig"}]


def test_keys_for_other_algorithms_are_told_beside_good_ones(site_folder: SiteFolder) -> None:
    key = rsa.generate_private_key(65537, 2048).public_key()
    others = [jwk(key, kid="r"), jwk(key, kid="p", alg="PS256"), jwk(key, kid="e", use="enc"), {"kty": "RSA"}]
    with_file(site_folder, {"keys": [EC_KEY, *others]}, device={"prefix": "x-"})
    (warning,) = site_folder.load().warnings
    assert warning.code == "jwks-algorithm"
    assert warning.message.endswith("has keys for RS256, PS256 too, which its 'algorithms' do not name")
    assert warning.cure.startswith("add RS256, PS256 to 'algorithms', if it signs with them")
    with_file(site_folder, {"keys": [EC_KEY, *others]}, algorithms=["ES256", "RS256", "PS256"])
    assert site_folder.load().warnings == ()


@pytest.mark.parametrize(("algorithm", "names"), [(None, "RS256"), ("PS256", "PS256")])
def test_keys_for_other_algorithms_alone_are_refused_with_the_right_ones(
    site_folder: SiteFolder, algorithm: str | None, names: str
) -> None:
    key = jwk(rsa.generate_private_key(65537, 2048).public_key(), kid="r", **({"alg": algorithm} if algorithm else {}))
    with_file(site_folder, {"keys": [key]})
    (problem,) = site_folder.problems()
    assert (problem.code, problem.cure) == (
        "jwks-file",
        f"write 'algorithms: [{names}]', if that is what it signs with",
    )


PRIVATE = jwk(ec.generate_private_key(ec.SECP256R1()), kid="p")
SMALL = jwk(rsa.generate_private_key(65537, 1024).public_key())  # noqa: S505 - it is to be refused
FILES: list[tuple[str, object, str, str]] = [
    ("no JSON", "hello", "jwks-file", "is no JWK Set"),
    ("no set", [EC_KEY], "jwks-file", "is no JWK Set"),
    ("no keys", {"keys": []}, "jwks-file", "no key is usable"),
    ("private", {"keys": [PRIVATE, EC_KEY]}, "jwks-private", "has a private or secret key"),
    ("shared", {"keys": [{"kty": "oct", "k": "AAAA"}]}, "jwks-private", "has a private or secret key"),
    ("small", {"keys": [SMALL]}, "jwks-file", "modulus has 1024 bits"),
    ("another curve", {"keys": [jwk(ec.generate_private_key(ec.SECP384R1()).public_key())]}, "jwks-file", "'P-384'"),
    ("no point", {"keys": [{**EC_KEY, "y": EC_KEY["x"]}]}, "jwks-file", "no point of P-256"),
    (
        "another algorithm",
        {"keys": [jwk(ed25519.Ed25519PrivateKey.generate().public_key())]},
        "jwks-file",
        "EdDSA, whic",
    ),
    ("twice", {"keys": [EC_KEY, EC_KEY]}, "jwks-file", "two keys have the 'kid' 'a'"),
]


@pytest.mark.parametrize(("content", "code", "why"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_a_file_without_a_good_key_is_refused(site_folder: SiteFolder, content: object, code: str, why: str) -> None:
    algorithms = ["ES256", "RS256"]
    with_file(site_folder, content, algorithms=algorithms)
    (problem,) = site_folder.problems()
    assert problem.code == code
    assert why in problem.message
    assert PRIVATE["d"] not in str(problem)


@pytest.mark.parametrize("name", ["../keys.json", "/etc/passwd", "keys/a.json", ".keys", "", "nowhere.json"])
def test_a_file_elsewhere_is_not_read(site_folder: SiteFolder, name: str) -> None:
    with_file(site_folder, {"keys": [EC_KEY]}, jwks_file=name)
    assert [problem.code for problem in site_folder.problems()] == ["jwks-file"]


# --- what changes


def test_a_difference_names_issuers_their_keys_and_what_their_roles_mean(site_folder: SiteFolder) -> None:
    write(site_folder, SERVICE, WITH_ROLES)
    old = load_site(site_folder.path)
    with_file(site_folder, {"keys": [EC_KEY]})
    text = difference(old, load_site(site_folder.path))
    assert "issuer site (https://tokens.plant.example:8443): gone\n" in text
    for line in (
        "issuer sso (https://sso.example/r): changed",
        "  keys (none) -> a",
        "  prefix sso- -> (none)",
        "  jwks_url https://sso.example/k -> (none)",
        "  who has 'plant-sensor' in its token:",
        "    - publish sensors/{device.location}/{device.id}/# (role 'sensor'",
    ):
        assert f"\n{line}" in text
    again = jwk(ec.generate_private_key(ec.SECP256R1()).public_key(), kid="a")
    before = load_site(site_folder.path)
    with_file(site_folder, {"keys": [again]})
    assert "  keys some -> others of the same names" in difference(before, load_site(site_folder.path))
    same = load_site(site_folder.path)
    assert "issuer" not in difference(same, same)


def test_a_difference_names_another_way_to_get_tokens(site_folder: SiteFolder) -> None:
    write(site_folder, SERVICE)
    old = load_site(site_folder.path)
    write(site_folder, SERVICE, device={**DEVICE, "token_authentication": "client_secret_basic"})
    text = difference(old, load_site(site_folder.path))
    assert "edge-1: changed\n  + tokens by client_secret_basic\n  - tokens by tls_client_auth\n" in text


# --- devices with tokens


def test_a_device_says_how_it_gets_its_tokens(site_folder: SiteFolder, capsys: pytest.CaptureFixture[str]) -> None:
    write(site_folder, SERVICE)
    assert main(["compile", str(site_folder.path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [device["token"] for device in told["devices"]] == ["tls_client_auth"]
    assert (told["summary"]["token"], told["summary"]["issuers"]) == (1, 1)
    for way in ("private_key_jwt", "client_secret_basic"):
        write(site_folder, SERVICE, device={**DEVICE, "token_authentication": way})
        assert next(line for line in lines(site_folder) if line.get("device") == "edge-1")["token"] == way


def test_how_a_device_gets_tokens_is_for_those_that_use_them(site_folder: SiteFolder) -> None:
    write(site_folder, device={**DEVICE, "authentication": ["password"], "token_authentication": "private_key_jwt"})
    assert [problem.code for problem in site_folder.problems()] == ["no-token"]


@pytest.mark.parametrize(
    ("way", "code"),
    [("client_secret_basic", "csr-without-certificate"), ("private_key_jwt", None), ("tls_client_auth", None)],
)
def test_a_key_of_its_own_is_for_those_that_show_it(site_folder: SiteFolder, way: str, code: str | None) -> None:
    write(site_folder, SERVICE, device={**DEVICE, "token_authentication": way, "enrolment": "csr"})
    if code is None:
        assert site_folder.load().devices["edge-1"].certified
    else:
        assert [problem.code for problem in site_folder.problems()] == [code]


def test_an_acl_file_does_not_know_tokens(site_folder: SiteFolder, capsys: pytest.CaptureFixture[str]) -> None:
    write(site_folder, WITH_ROLES)
    command = ["compile", str(site_folder.path), "--access-control", "acl_file"]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert "[acl-token]" in told
    assert "[acl-issuer]" in told
    assert main([*command, "--strictest"]) == 0
    assert "edge-1" not in json.loads(capsys.readouterr().out)["acl_file"]


# --- bednet issuers


def test_whose_tokens_may_be_for_a_device(site_folder: SiteFolder, capsys: pytest.CaptureFixture[str]) -> None:
    third = {**FOREIGN, "name": "third", "issuer": "https://third.example"}
    write(site_folder, SERVICE, WITH_ROLES, third)

    def told(device: str, *words: str) -> Json:
        assert main(["issuers", str(site_folder.path), "--device", device, *words]) == 0
        answer: Json = json.loads(capsys.readouterr().out)
        return answer

    shown = {
        line["name"]: {"name": line["name"], "issuer": line["issuer"], "service": line is SERVICE}
        for line in (SERVICE, WITH_ROLES, third)
    }
    assert told("edge-1") == {"device": "edge-1", "listed": True, "issuers": [shown["site"], shown["third"]]}
    # Nobody but the issuer that makes devices of roles can be meant by an id that no list has.
    assert told("sso-cart") == {"device": "sso-cart", "listed": False, "issuers": [shown["sso"]]}
    assert told("sso-cart", "--issuer", "https://sso.example/r") == told("sso-cart")
    assert told("edge-1", "--issuer", "https://third.example") == told("edge-1")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (
            ("--device", "egde-1"),
            (
                r"there is no device 'egde-1' in \S+, and no issuer of policy\.yml gives such an id roles\. "
                r"Cure: did you mean 'edge-1'\? .* \[unknown-device\]"
            ),
        ),
        (("--device", "ss"), r"no device 'ss' in \S+, .* Cure: Name one of its lists, or an id with the prefix"),
        # An issuer without roles has a say for listed devices alone.
        (("--device", "o-cart"), r"\[unknown-device\]"),
        (
            ("--device", "edge-1", "--issuer", "https://sso.exampel/r"),
            (
                r"policy\.yml has no issuer 'https://sso\.exampel/r'\. Cure: did you mean 'https://sso\.example/r'\? "
                r"Name one as its tokens do: .* \[unknown-issuer\]"
            ),
        ),
        (
            ("--device", "edge-1", "--issuer", SERVICE["issuer"]),
            r"https://tokens\.plant\.example:8443 is the site's own token service\. Cure: say the token's jti alone",
        ),
        (
            ("--device", "edge-1", "--issuer", FOREIGN["issuer"]),
            r"no token of issuer 'sso' is for 'edge-1'\. Cure: .* with the prefix 'sso-', .* \[wrong-issuer\]",
        ),
    ],
)
def test_what_nobodys_token_can_say_is_refused(
    site_folder: SiteFolder, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], why: str
) -> None:
    write(site_folder, SERVICE, WITH_ROLES, {**FOREIGN, "name": "o", "issuer": "https://o", "device": {"prefix": "o-"}})
    assert main(["issuers", str(site_folder.path), *words]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert re.search(why, said.err)
