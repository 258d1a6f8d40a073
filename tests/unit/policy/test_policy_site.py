# SPDX-License-Identifier: Apache-2.0
"""What is refused in devices.yml, policy.yml and csr/: each with its line, its reason and its cure."""

from __future__ import annotations

import importlib.resources
import json
import re
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from jsonschema import Draft202012Validator

from bednet.errors import SiteError
from bednet.site import KEY_TYPES, load_site

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.policy.conftest import SiteFolder

HEAD = "version: 1\ndevices:\n  - id: temp-101\n    location: hall-1\n    roles: [sensor]\n"


def roles(rest: str) -> str:
    """A policy whose role `sensor` goes on with `rest` from line 4 on."""
    return f"version: 1\nroles:\n  sensor:\n{rest}"


@pytest.mark.parametrize(
    ("devices", "line", "code", "message", "cure"),
    [
        ("version: 1\n", 1, "missing-key", "'devices' missing", "add 'devices' \\(a list of devices"),
        ("devices: []\n", 1, "missing-key", "'version' missing", "which is 1"),
        ("version: 2\ndevices: []\n", 1, "version", "'version' is the number 2", "write the number of this format"),
        ("version: true\ndevices: []\n", 1, "version", "'version' is true", "which is 1"),
        ("version: 1\ndevices:\n", 2, "wrong-type", "'devices' is empty", "a list of devices"),
        ("version: 1\ndevices: {}\n", 2, "wrong-type", "'devices' is an empty mapping", "a list of devices"),
        (
            "version: 1\ndevices: [temp]\n",
            2,
            "wrong-type",
            "element 1 of 'devices' is 'temp'|device number 1 is 'temp'",
            "a device:",
        ),
        (
            HEAD + "    rolse: [x]\n",
            6,
            "unknown-key",
            "device 'temp-101': unknown key 'rolse'",
            "did you mean 'roles'\\?",
        ),
        (HEAD + "    Location: x\n", 6, "unknown-key", "unknown key 'Location'", "did you mean 'location'\\?"),
        (HEAD + "    xyzzy: x\n", 6, "unknown-key", "unknown key 'xyzzy'", "^The keys here are: id, location"),
        (
            "version: 1\ndevices:\n  - id: a\n",
            3,
            "missing-key",
            "device 'a': 'location', 'roles' missing",
            "add 'location'",
        ),
        (
            "version: 1\ndevices:\n  - location: a\n    roles: [sensor]\n",
            3,
            "missing-key",
            "device number 1: 'id' missing",
            "add 'id'",
        ),
        (
            HEAD + "  - id: 102\n    location: a\n    roles: [sensor]\n",
            6,
            "wrong-type",
            "'id' is the number 102",
            "in quotes",
        ),
        (
            HEAD + "    authentication: certificate\n",
            6,
            "wrong-type",
            "'authentication' is 'certificate'",
            "\\[certificate\\]",
        ),
        (
            HEAD + "    authentication: []\n",
            6,
            "wrong-type",
            "'authentication' is an empty list",
            "write a list of ways",
        ),
        (HEAD + "    authentication: [passwrod]\n", 6, "bad-value", "is 'passwrod'", "did you mean 'password'\\?"),
        (
            HEAD + "    authentication: [password, password]\n",
            6,
            "listed-twice",
            "contains 'password' twice",
            "remove one",
        ),
        (HEAD + "    enrolment: usb\n", 6, "bad-value", "'enrolment' is 'usb'", "'bundle' .* or 'csr'"),
        (
            HEAD + "    revoked: keycompromise\n",
            6,
            "bad-value",
            "is 'keycompromise'",
            "did you mean 'keyCompromise'\\?",
        ),
        (HEAD + "    revoked: true\n", 6, "bad-value", "'revoked' is true", "write the reason"),
        (
            HEAD + "    key_types: [P256]\n",
            6,
            "bad-value",
            "element 1 of 'key_types' is 'P256'",
            "did you mean 'P-256'\\?",
        ),
        (HEAD + "    type: a b\n", 6, "bad-name", "'type' is 'a b'", "write what the device is"),
        (HEAD + '    type: "ab\\n"\n', 6, "bad-name", "'type' is 'ab\\\\n'", "write what the device is"),
        (HEAD + "    tags: [a/b]\n", 6, "bad-name", "element 1 of 'tags' is 'a/b'", "a word of letters"),
        (HEAD + "    attributes: {a-b: 1}\n", 6, "bad-name", "'a-b' is not a valid name", "letters, digits and '_'"),
        (HEAD + "    attributes: {a: [1]}\n", 6, "wrong-type", "'attributes/a' is a list", "text, a number"),
        (
            HEAD + "    attributes: {location: x}\n",
            6,
            "attribute-name",
            "cannot be called 'location'",
            "choose another name",
        ),
        (HEAD + "    attributes: {id: x}\n", 6, "attribute-name", "cannot be called 'id'", "choose another name"),
    ],
)
def test_devices_of_the_wrong_shape_are_refused(
    site_folder: SiteFolder, devices: str, line: int, code: str, message: str, cure: str
) -> None:
    site_folder.write(devices=devices)
    problem = site_folder.problem(code)
    assert (problem.place.file, problem.place.line) == (str(site_folder.path / "devices.yml"), line)
    assert re.search(message, problem.message), problem.message
    assert re.search(cure, problem.cure), problem.cure


@pytest.mark.parametrize(
    ("identifier", "code", "message", "cure"),
    [
        ("a+b", "id-wildcard", r"contains '\+'", "topics of other devices"),
        ("#", "id-wildcard", "contains '#'", "topics of other devices"),
        ("a/b", "id-wildcard", "contains '/'", "topics of other devices"),
        ("a.b", "id-dot", "contains a dot", "OpenSSL"),
        ("a\\u0007", "id-control", r"U\+0007", "take it out"),
        ("a\\0", "id-control", r"U\+0000", "take it out"),
        ("a\\n", "id-control", r"U\+000A", "take it out"),
        ("a\\u200Bb", "id-control", r"U\+200B", "take it out"),
        ("", "id-empty", "is empty", "temp-101"),
        ("x" * 65, "id-too-long", "65 characters", "at most 64"),
        ("-a", "id-characters", "'-a'", "begin with a letter or digit"),
        ("a b", "id-characters", "'a b'", "letters"),
        ("%u", "id-characters", "'%u'", "letters"),
        ("é", "id-characters", "'é'", "A-Z"),
        ("bednet-probe", "id-reserved", "begins with 'bednet-'", "another beginning"),
        ("Bednet-x", "id-reserved", "begins with 'bednet-'", "another beginning"),
    ],
)
def test_ids_that_could_reach_elsewhere_are_refused(
    site_folder: SiteFolder, identifier: str, code: str, message: str, cure: str
) -> None:
    site_folder.write(devices=HEAD + f'  - location: hall-1\n    roles: [sensor]\n    id: "{identifier}"\n')
    problem = site_folder.problem(code)
    assert problem.place.line == 8
    assert re.search(message, problem.message), problem.message
    assert re.search(cure, problem.cure), problem.cure


@pytest.mark.parametrize("identifier", ["a", "9", "A_b-C", "x" * 64, "bednet", "bed-net"])
def test_ids_within_the_limits_are_taken(site_folder: SiteFolder, identifier: str) -> None:
    site_folder.write(devices=HEAD.replace("temp-101", f"'{identifier}'"))
    assert list(site_folder.load().devices) == [identifier]


def test_a_device_listed_twice_is_refused_with_both_lines(site_folder: SiteFolder) -> None:
    site_folder.write(devices=HEAD + HEAD.split("devices:\n")[1])
    problem = site_folder.problem("device-twice")
    assert str(problem.place) == f"{site_folder.path / 'devices.yml'}:6"
    assert problem.message == "device 'temp-101' is listed again; it is listed in line 3 already"
    assert problem.cure == "remove the entry in line 6 or the one in line 3"


def test_an_unknown_role_is_refused_with_the_nearest_known(site_folder: SiteFolder) -> None:
    site_folder.write(devices=HEAD.replace("[sensor]", "[senser]"))
    problem = site_folder.problem("unknown-role")
    assert problem.place.line == 5
    assert problem.message == "device 'temp-101' has the role 'senser', which policy.yml does not define"
    assert problem.cure == "did you mean 'sensor'? The roles of policy.yml are: sensor"


def test_a_role_that_nobody_has_is_a_warning(site_folder: SiteFolder) -> None:
    site_folder.write(policy=roles("    allow: {publish: [a]}\n  spare: {}\n"))
    (warning,) = site_folder.load().warnings
    assert (warning.code, warning.place.line, warning.warning) == ("unused-role", 5, True)
    assert "warning: no device has the role 'spare'. Cure: give it to a device" in str(warning)


@pytest.mark.parametrize(
    ("policy", "line", "code", "message", "cure"),
    [
        ("version: 1\n", 1, "missing-key", "'roles' missing", "add 'roles'"),
        ("version: 1\nroles: [a]\n", 2, "wrong-type", "'roles' is a list", "roles by name"),
        ("version: 1\nroles:\n  sensor:\n", 3, "wrong-type", "role 'sensor' is empty", "write a role"),
        ("version: 1\nroles: {sensor: {}, a/b: {}}\n", 2, "bad-name", "'a/b' is not a valid name", "a word of letters"),
        (roles("    alow: {}\n"), 4, "unknown-key", "role 'sensor': unknown key 'alow'", "did you mean 'allow'"),
        (roles("    allow: {}\n"), 4, "wrong-type", "'allow' is an empty mapping", "'publish' and 'subscribe'"),
        (roles("    allow: {read: [a]}\n"), 4, "unknown-key", "unknown key 'read'", "publish, subscribe"),
        (roles("    allow: {publish: a}\n"), 4, "wrong-type", "'allow/publish' is 'a'", "a list of topics"),
        (
            roles("    allow:\n      publish:\n        - #\n"),
            6,
            "wrong-type",
            "element 1 of 'allow/publish' is empty",
            "in quotes",
        ),
        (roles("    allow:\n      publish:\n        - 7\n"), 6, "wrong-type", "is the number 7", "as text"),
        (
            roles('    allow:\n      publish:\n        - ""\n'),
            6,
            "topic-empty",
            "role 'sensor': an empty topic filter",
            "write the",
        ),
        (
            roles("    allow:\n      publish:\n        - a/#/b\n"),
            6,
            "topic-hash",
            "'a/#/b' has '#' in level 2",
            "last level",
        ),
        (roles("    deny:\n      publish:\n        - a+\n"), 6, "topic-plus", "'a\\+' has '\\+'", "a whole level"),
        (roles('    allow:\n      publish:\n        - "a\\0"\n'), 6, "topic-character", "U\\+0000", "take it out"),
        (
            roles(f"    allow:\n      publish:\n        - {'é' * 33000}\n"),
            6,
            "topic-too-long",
            "66000 bytes",
            "shorten",
        ),
        (
            roles("    allow:\n      subscribe:\n        - $share/g/a\n"),
            6,
            "topic-share-in-rule",
            "shared",
            "holds for shared",
        ),
        (
            roles("    allow:\n      publish:\n        - $SYS/a\n"),
            6,
            "topic-dollar",
            "belong to the broker",
            "only to subscribe",
        ),
        (
            roles("    allow:\n      subscribe:\n        - $CONTROL/#\n"),
            6,
            "topic-dollar",
            "belong to the broker",
            "'\\$SYS'",
        ),
        (
            roles("    allow:\n      publish:\n        - bednet/probe/x\n"),
            6,
            "topic-reserved",
            "reserved",
            "another first level",
        ),
        (
            roles("    allow:\n      publish:\n        - a/{device.id\n"),
            6,
            "placeholder-brace",
            "without its partner",
            "{device.id}",
        ),
        (
            roles("    allow:\n      publish:\n        - a/}/b\n"),
            6,
            "placeholder-brace",
            "without its partner",
            "{device.id}",
        ),
        (
            roles("    allow:\n      publish:\n        - a/{id}\n"),
            6,
            "placeholder-unknown",
            "'{id}'",
            "use {device.id}",
        ),
        (roles("    allow:\n      publish:\n        - a/{}\n"), 6, "placeholder-unknown", "'{}'", "use {device.id}"),
        (
            roles("    allow:\n      publish:\n        - a/{device.a.b}\n"),
            6,
            "placeholder-unknown",
            "{device.a.b}",
            "use {device.id}",
        ),
        (roles("    allow:\n      publish:\n        - +{device.id}\n"), 6, "topic-plus", "level 1", "a whole level"),
        (
            roles("    allow:\n      publish:\n        - a/{device.lien}\n"),
            6,
            "placeholder-value-missing",
            "no device has",
            "Add 'lien'",
        ),
        (
            roles("    allow:\n      publish:\n        - a/{device.roles}\n"),
            6,
            "placeholder-value-missing",
            "no device has",
            "Add",
        ),
    ],
)
def test_policies_that_say_nothing_sensible_are_refused(
    site_folder: SiteFolder, policy: str, line: int, code: str, message: str, cure: str
) -> None:
    site_folder.write(policy=policy)
    problem = site_folder.problem(code)
    assert (problem.place.file, problem.place.line) == (str(site_folder.path / "policy.yml"), line)
    assert re.search(message, problem.message), problem.message
    assert re.search(cure, problem.cure), problem.cure


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"a/b"', r"'line' contains '/', which would reach into other topics"),
        ('"+"', r"'line' contains '\+'"),
        ('"#"', r"'line' contains '#'"),
        ('""', "cannot stand in a topic"),
        ('" a"', "begins or ends with a space"),
        ('"$SYS"', r"begins with '\$'"),
        ('"a\\n"', "begins or ends with a space"),
        ('"a\\u0001b"', "cannot stand in a topic"),
        ("1.10", "is neither text nor a whole number"),
        ("true", "is neither text nor a whole number"),
    ],
)
def test_a_value_that_would_widen_a_grant_is_refused_where_it_stands(
    site_folder: SiteFolder, value: str, message: str
) -> None:
    site_folder.write(
        devices=HEAD + f"    attributes:\n      line: {value}\n",
        policy=roles('    allow: {publish: ["a/{device.line}/#"]}\n    deny: {publish: ["a/{device.line}/x"]}\n'),
    )
    problem = site_folder.problem("placeholder-value")
    assert str(problem.place) == f"{site_folder.path / 'devices.yml'}:7"
    assert re.search(message, problem.message), problem.message
    assert "role 'sensor' allows publish 'a/{device.line}/#'" in problem.message
    assert "without + # and /" in problem.cure


@pytest.mark.parametrize(("value", "topic"), [("3", "a/3/#"), ('"03"', "a/03/#"), ("x y", "a/x y/#"), ("{a}", None)])
def test_text_and_whole_numbers_fill_placeholders(site_folder: SiteFolder, value: str, topic: str | None) -> None:
    site_folder.write(
        devices=HEAD + f"    attributes: {{line: {value}}}\n",
        policy=roles('    allow: {publish: ["a/{device.line}/#"]}\n'),
    )
    if topic is None:
        assert site_folder.problem("wrong-type").place.line == 6
    else:
        assert [grant.topic_filter for grant in site_folder.load().grants["temp-101"]] == [topic]


def test_each_device_without_a_needed_value_is_named(site_folder: SiteFolder) -> None:
    more = "".join(f"  - id: d{n}\n    location: hall-1\n    roles: [sensor]\n" for n in range(2))
    site_folder.write(
        devices=HEAD + "    attributes: {line: 1}\n" + more,
        policy=roles('    allow: {publish: ["a/{device.line}", "b/{device.line}", "c/{device.type}"]}\n'),
    )
    problems = site_folder.problems()
    assert [(problem.place.line, problem.message.split(",")[0]) for problem in problems] == [
        (3, "device 'temp-101' has no 'type'"),
        (7, "device 'd0' has no 'line'"),
        (7, "device 'd0' has no 'type'"),
        (10, "device 'd1' has no 'line'"),
        (10, "device 'd1' has no 'type'"),
    ]
    assert {problem.code for problem in problems} == {"placeholder-value-missing"}
    assert problems[1].cure == "add 'line' to 'attributes' of the device, or take the role from it"


def test_a_topic_that_only_becomes_too_long_for_a_device_is_refused(site_folder: SiteFolder) -> None:
    template = "a" * 65520 + "/{device.id}"
    site_folder.write(
        devices=HEAD.replace("temp-101", "x" * 64), policy=roles(f'    allow: {{publish: ["{template}"]}}\n')
    )
    problem = site_folder.problem("topic-too-long")
    assert problem.place.line == 4
    assert "65585 bytes" in problem.message


def test_problems_of_both_files_are_told_at_once(site_folder: SiteFolder) -> None:
    site_folder.write(
        devices=HEAD + "    rolse: 1\n  - id: a/b\n    location: x\n    roles: [nobody]\n",
        policy=roles("    allow: {publish: [a+, b/#/c]}\n"),
    )
    assert [problem.code for problem in site_folder.problems()] == [
        "unknown-key",
        "id-wildcard",
        "topic-plus",
        "topic-hash",
    ]


def test_a_broken_devices_file_does_not_hide_the_policys_problems(site_folder: SiteFolder) -> None:
    site_folder.write(devices="- [", policy=roles("    allow: {publish: [a+]}\n"))
    assert {problem.code for problem in site_folder.problems()} == {"yaml-syntax", "topic-plus"}


def test_missing_files_and_folders_are_problems(site_folder: SiteFolder) -> None:
    (site_folder.path / "policy.yml").unlink()
    problem = site_folder.problem("file-missing")
    assert str(problem.place) == f"{site_folder.path / 'policy.yml'}:1"
    with pytest.raises(SiteError, match=r"there is no such folder\. Cure: name a folder with devices\.yml"):
        load_site(site_folder.path / "nowhere")


@pytest.mark.parametrize(
    ("tests", "line", "code", "message"),
    [
        ("  - device: temp-102\n    can: {publish: [a]}\n", 7, "test-unknown-device", "'temp-102', which devices.yml"),
        ("  - device: temp-101\n", 7, "missing-key", "test number 1: neither 'can' nor 'cannot'"),
        ("  - device: temp-101\n    can: {publish: [a/+]}\n", 8, "topic-wildcard", "one publishes to one topic"),
        ("  - device: temp-101\n    cannot: {publish: ['#']}\n", 8, "topic-wildcard", "one publishes to one topic"),
        ("  - device: temp-101\n    can: {subscribe: [a+]}\n", 8, "topic-plus", "test of 'temp-101'"),
        ("  - device: temp-101\n    can: {subscribe: [$share/a]}\n", 8, "topic-share", "no valid group"),
        (
            "  - device: temp-101\n    can: {publish: [sensors/temp-101/t]}\n    cna: {}\n",
            9,
            "unknown-key",
            "test number 1",
        ),
        (
            "  - device: temp-101\n    can:\n      publish: [sensors/temp-101/t, x]\n",
            9,
            "test-failed",
            "can publish 'x', but it cannot: no rule",
        ),
        (
            "  - device: temp-101\n    cannot:\n      publish:\n        - sensors/temp-101/t\n",
            10,
            "test-failed",
            r"cannot publish .*, but it can: role 'sensor' allows publish 'sensors/\{device.id\}/#' \(.*policy.yml:4\)",
        ),
        (
            "  - device: temp-101\n    can: {publish: [sensors/temp-101/x/y]}\n",
            8,
            "test-failed",
            r"but it cannot: role 'sensor' denies publish 'sensors/\+/x/#' \(.*policy.yml:5\)",
        ),
        (
            "  - device: temp-101\n    can: {subscribe: [a/b]}\n",
            8,
            "test-failed",
            "can subscribe to 'a/b', but it cannot",
        ),
    ],
)
def test_tests_that_fail_or_make_no_sense_are_refused(
    site_folder: SiteFolder, tests: str, line: int, code: str, message: str
) -> None:
    rules = '    allow: {publish: ["sensors/{device.id}/#"]}\n    deny: {publish: ["sensors/+/x/#"]}\n'
    site_folder.write(policy=f"{roles(rules)}tests:\n{tests}")
    problem = site_folder.problem(code)
    assert problem.place.line == line
    assert re.search(message, problem.message), problem.message


# CSRs of devices that make their own key


def csr_pem(name: str | None, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else [])
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, algorithm)
    return request.public_bytes(serialization.Encoding.PEM)


def write_csr(site_folder: SiteFolder, content: bytes, name: str = "temp-101") -> Path:
    site_folder.write(devices=HEAD + "    enrolment: csr\n")
    path = site_folder.path / "csr" / f"{name}.csr"
    path.write_bytes(content)
    return path


def test_a_device_whose_csr_is_not_there_waits(site_folder: SiteFolder) -> None:
    site_folder.write(devices=HEAD + "    enrolment: csr\n")
    site = site_folder.load()
    assert (site.devices["temp-101"].enrolment, site.devices["temp-101"].csr) == ("csr", None)
    assert site.warnings == ()


@pytest.mark.parametrize("name", ["temp-101", None])
def test_a_good_csr_is_handed_on(site_folder: SiteFolder, name: str | None) -> None:
    pem = csr_pem(name, ec.generate_private_key(ec.SECP256R1()))
    write_csr(site_folder, b"some words that openssl prints before\n" + pem)
    assert site_folder.load().devices["temp-101"].csr == pem.decode()


def broken_signature() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    der = bytearray(x509.load_pem_x509_csr(csr_pem("temp-101", key)).public_bytes(serialization.Encoding.DER))
    place = bytes(der).index(b"temp-101")
    der[place : place + 8] = b"temp-102"
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)


def weak_rsa() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 1024)  # noqa: S505 - the villain of this test


def private_key() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


@pytest.mark.parametrize(
    ("make", "code", "message", "cure"),
    [
        (
            lambda: b"",
            "csr-invalid",
            "not a certificate signing request",
            "openssl req -new -key KEY -subj /CN=temp-101",
        ),
        (lambda: b"\xff\x00nonsense", "csr-invalid", "not a certificate signing request", "on the device"),
        (
            lambda: b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
            "csr-invalid",
            "not a",
            "openssl",
        ),
        (
            private_key,
            "csr-private-key",
            "holds a private key, which is now known here",
            "make a new key on the device",
        ),
        (broken_signature, "csr-signature", "the signature of this CSR is wrong", "bring the CSR"),
        (
            lambda: csr_pem("temp-102", ec.generate_private_key(ec.SECP256R1())),
            "csr-name",
            "made for 'temp-102', not for 'temp-101'",
            "name of its device",
        ),
        (lambda: csr_pem("temp-101", ec.generate_private_key(ec.SECP521R1())), "csr-key", "does not certify", "P-256"),
        (lambda: csr_pem("temp-101", weak_rsa()), "csr-key", "does not certify", "RSA-2048"),
    ],
    ids=["empty", "nonsense", "no-asn1", "private-key", "signature", "other-name", "p521", "rsa1024"],
)
def test_a_csr_that_should_not_be_signed_is_refused(
    site_folder: SiteFolder, make: object, code: str, message: str, cure: str
) -> None:
    assert callable(make)
    path = write_csr(site_folder, make())
    problem = site_folder.problem(code)
    assert str(problem.place) == f"{path}:1"
    assert message in problem.message
    assert cure in problem.cure


def test_two_devices_with_the_same_key_are_refused(site_folder: SiteFolder) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    write_csr(site_folder, csr_pem("temp-101", key))
    (site_folder.path / "csr" / "temp-102.csr").write_bytes(csr_pem("temp-102", key))
    second = HEAD.split("devices:\n")[1].replace("101", "102") + "    enrolment: csr\n"
    site_folder.write(devices=HEAD + "    enrolment: csr\n" + second)
    problem = site_folder.problem("csr-same-key")
    assert problem.place.file.endswith("csr/temp-102.csr")
    assert "also the key of device 'temp-101'" in problem.message


def test_a_csr_that_no_device_uses_is_a_warning(site_folder: SiteFolder) -> None:
    write_csr(site_folder, b"", name="temp-999")
    (warning,) = site_folder.load().warnings
    assert (warning.code, warning.warning) == ("csr-unused", True)
    assert warning.place.file.endswith("csr/temp-999.csr")


def test_a_csr_without_certificate_authentication_is_refused(site_folder: SiteFolder) -> None:
    site_folder.write(devices=HEAD + "    authentication: [password]\n    enrolment: csr\n")
    problem = site_folder.problem("csr-without-certificate")
    assert problem.place.line == 7
    assert "add 'certificate' to 'authentication'" in problem.cure


# Key types


def test_a_device_that_cannot_verify_the_cas_keys_is_refused(site_folder: SiteFolder) -> None:
    site_folder.write(devices=HEAD + "    key_types: [RSA-2048, P-256]\n")
    assert site_folder.load("P-256").devices["temp-101"].key_types == ("RSA-2048", "P-256")
    problem = site_folder.problem("key-type", "Ed25519")
    assert problem.place.line == 6
    assert problem.message.startswith("device 'temp-101' cannot verify Ed25519")
    assert "it can: RSA-2048, P-256" in problem.message


def test_a_revoked_device_does_not_hold_the_key_type_back(site_folder: SiteFolder) -> None:
    site_folder.write(devices=HEAD + "    key_types: [P-256]\n    revoked: superseded\n")
    assert site_folder.load("RSA-4096").devices["temp-101"].revoked == "superseded"


# The schemas


@pytest.mark.parametrize("name", ["devices", "policy"])
def test_the_schemas_are_valid_and_describe_what_they_want(name: str) -> None:
    text = (importlib.resources.files("bednet") / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8")
    schema = json.loads(text)
    Draft202012Validator.check_schema(schema)
    if name == "devices":
        assert schema["$defs"]["device"]["properties"]["key_types"]["items"]["enum"] == list(KEY_TYPES)

    def undescribed(part: object, path: str) -> list[str]:
        if not isinstance(part, dict):
            return []
        wants = {"type", "enum", "const", "pattern"} & part.keys() and path and not path.endswith("/properties")
        here = [path] if wants and "description" not in part else []
        return here + [name for key, value in part.items() for name in undescribed(value, f"{path}/{key}")]

    assert undescribed(schema, "") == [], "the cures of our messages are these descriptions"
