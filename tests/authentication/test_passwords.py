# SPDX-License-Identifier: Apache-2.0
"""Who is let in with a password: those of the plant who have one, and nobody who guesses.

The sharp edges: MQTT 3.1.1 and 5 say no in different words, an empty password is not a missing one, and a device that
has a certificate only must have no password that works, not even an empty one. And who fails too often is refused for
that: whatever is refused here could be so for this reason alone, so the journal is asked which it was.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest

from bednet import probe
from bednet.probe import NOBODY, Answer, Credentials, Outcome
from tests.live import CONNECT_REFUSED, Audit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bednet.probe import Version
    from testbed.attacker import Attacker
    from tests.conftest import Plant

pytestmark = pytest.mark.lab

GATEWAYS = ["gateway-1", "gateway-2"]
VERSIONS: list[Version] = [4, 5]
STORE = "/var/lib/bednet/store"
# mosquitto_login_failures: so often a minute may one identity fail from one address; all together ten times as often.
FAILURES = 10


def forget_failures(plant: Plant) -> None:
    """Let the broker count failed logins anew."""
    plant.lab.hosts["gateway-1"].exec(["systemctl", "restart", "mosquitto"])


@pytest.fixture(autouse=True, scope="module")
def nobody_is_throttled(plant: Plant) -> Iterator[None]:
    """What other tests failed at does not count here, and what fails here does not count there."""
    forget_failures(plant)
    yield
    forget_failures(plant)


@pytest.fixture
def audit(plant: Plant) -> Audit:
    return Audit(plant.lab.hosts["gateway-1"])


def refused(answer: Answer, version: int) -> None:
    assert (answer.outcome, answer.code) == (Outcome.REFUSED, CONNECT_REFUSED[version]), answer


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("gateway", GATEWAYS)
def test_a_device_with_its_password_is_let_in(plant: Plant, gateway: str, version: Version) -> None:
    assert len(plant.with_password) >= 3
    for device in plant.with_password:
        answer = probe.enter(plant.passwords(gateway), plant.password(device), version=version)
        assert answer.accepted, f"{device}: {answer}"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("gateway", GATEWAYS)
def test_nobody_gets_in_without_credentials(plant: Plant, gateway: str, version: Version) -> None:
    refused(probe.enter(plant.passwords(gateway), NOBODY, version=version), version)


def near_misses(password: str) -> list[str]:
    """Return passwords that are nearly right."""
    return [
        "",
        " ",
        password[:-1],
        password + "x",
        password + " ",
        password + "\n",
        password.swapcase(),
        password[::-1],
        secrets.token_urlsafe(len(password)),
        "admin",
        "x" * 60000,
    ]


def test_a_wrong_password_is_refused(plant: Plant, audit: Audit) -> None:
    right = plant.password("energy-1").password
    assert isinstance(right, str)
    for number, wrong in enumerate(near_misses(right)):
        assert wrong != right
        version = VERSIONS[number % 2]
        answer = probe.enter(plant.passwords(), Credentials(username="energy-1", password=wrong), version=version)
        refused(answer, version)
        # Whoever is let in has failed at nothing: so all of them are looked at.
        assert probe.enter(plant.passwords(), plant.password("energy-1")).accepted
    count = len(near_misses(right))
    written = [line["reason"] for line in audit.await_lines(count, action="connect")]
    # The first one is empty, which is the same as none to the broker.
    assert written == ["password"] * count


@pytest.mark.parametrize("version", VERSIONS)
def test_a_user_name_without_a_password_is_refused(plant: Plant, version: Version) -> None:
    for device in ("energy-1", "temp-101", "nobody"):
        refused(probe.enter(plant.passwords(), Credentials(username=device), version=version), version)


@pytest.mark.parametrize("version", VERSIONS)
def test_another_devices_password_is_refused(plant: Plant, audit: Audit, version: Version) -> None:
    borrowed = plant.password("energy-2").password
    refused(
        probe.enter(plant.passwords(), Credentials(username="energy-1", password=borrowed), version=version), version
    )
    audit.line(action="connect", device="energy-1", reason="password")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "name",
    ["nobody", "ENERGY-1", "energy-1 ", "energy-1/", "+", "#", "$SYS", "energy-1:x", "bednet-canary", "root", ""],
)
def test_an_unknown_user_is_refused(plant: Plant, audit: Audit, name: str, version: Version) -> None:
    password = plant.password("energy-1").password
    refused(probe.enter(plant.passwords(), Credentials(username=name, password=password), version=version), version)
    audit.line(action="connect", reason="unknown-device", **({"device": name} if name else {}))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_right_password_with_another_client_id_is_refused(plant: Plant, audit: Audit, version: Version) -> None:
    for name in ("energy-2", "tablet-jo", "energy-1x"):
        answer = probe.enter(plant.passwords(), plant.password("energy-1"), client_id=name, version=version)
        refused(answer, version)
        audit.line(action="connect", device="energy-1", client_id=name, reason="client-id")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_device_with_a_certificate_only_has_no_password(plant: Plant, audit: Audit, version: Version) -> None:
    for device in ("temp-101", "line-1", "historian"):
        for password in ("", "temp-101", plant.password("energy-1").password):
            answer = probe.enter(plant.passwords(), Credentials(username=device, password=password), version=version)
            refused(answer, version)
        audit.line(action="connect", device=device, reason="method")


def test_a_revoked_device_has_no_password(plant: Plant, audit: Audit) -> None:
    refused(probe.enter(plant.passwords(), Credentials(username="vib-212", password="vib-212")), 5)  # noqa: S106
    audit.line(action="connect", device="vib-212", reason="revoked")


def test_guessing_passwords_finds_nothing(plant: Plant, attacker: Attacker, audit: Audit) -> None:
    """An attacker in the plant's network tries the usual ones, and then is not heard any more, right as it may be."""
    usual = ["admin", "password", "mosquitto", "123456", "energy-2", "changeme", "public", "letmein", "root", "1"]
    right = plant.password("energy-2").password
    assert isinstance(right, str)
    assert len(usual) == FAILURES
    # The control: with the right one it is let in.
    assert attacker.guess("gateway-1", 8884, "energy-2", [*usual[1:], right]) == [5] * (FAILURES - 1) + [0]
    assert attacker.guess("gateway-1", 8884, "energy-2", [*usual, right]) == [5] * (FAILURES + 1)
    audit.line(device="energy-2", reason="throttled", address=plant.lab.hosts["attacker"].address)
    # From where it belongs the device comes in all the while, and so does its neighbour from the attacker's address.
    assert probe.enter(plant.passwords(), plant.password("energy-2")).accepted
    neighbour = plant.password("energy-1").password
    assert isinstance(neighbour, str)
    assert attacker.guess("gateway-1", 8884, "energy-1", [neighbour]) == [0]


def test_no_password_lies_readable_on_a_gateway(plant: Plant) -> None:
    for gateway in plant.gateways:
        there = {path: gateway.read_file(path) for path in (f"{STORE}/data.mdb", "/var/lib/bednet/site.jsonl")}
        for device in plant.with_password:
            password = plant.password(device).password
            assert isinstance(password, str)
            for path, data in there.items():
                assert password.encode() not in data, path
                assert device.encode() in data, path
        told = gateway.exec(["stat", "-c", "%a %U:%G", f"{STORE}/data.mdb"]).stdout
        assert told.strip() == "640 bednet-store:mosquitto"
