# SPDX-License-Identifier: Apache-2.0
"""Who is let in with a password: those of the plant who have one, and nobody who guesses.

The sharp edges: MQTT 3.1.1 and 5 say no in different words, an empty password is not a missing one, and a device that
has a certificate only must have no password that works, not even an empty one.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest

from bednet import probe
from bednet.probe import NOBODY, Answer, Credentials, Outcome

if TYPE_CHECKING:
    from bednet.probe import Version
    from testbed.attacker import Attacker
    from tests.conftest import Plant

pytestmark = pytest.mark.lab

GATEWAYS = ["gateway-1", "gateway-2"]
VERSIONS: list[Version] = [4, 5]
# "Not authorized", in MQTT 3.1.1 (table 3.1) and in MQTT 5 (3.2.2.2).
REFUSAL = {4: 5, 5: 0x87}


def refused(answer: Answer, version: int) -> None:
    assert (answer.outcome, answer.code) == (Outcome.REFUSED, REFUSAL[version]), answer


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


@pytest.mark.parametrize("version", VERSIONS)
def test_a_wrong_password_is_refused(plant: Plant, version: Version) -> None:
    right = plant.password("energy-1").password
    assert isinstance(right, str)
    for wrong in near_misses(right):
        assert wrong != right
        answer = probe.enter(plant.passwords(), Credentials(username="energy-1", password=wrong), version=version)
        refused(answer, version)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_user_name_without_a_password_is_refused(plant: Plant, version: Version) -> None:
    for device in ("energy-1", "temp-101", "nobody"):
        refused(probe.enter(plant.passwords(), Credentials(username=device), version=version), version)


@pytest.mark.parametrize("version", VERSIONS)
def test_another_devices_password_is_refused(plant: Plant, version: Version) -> None:
    borrowed = plant.password("energy-2").password
    refused(
        probe.enter(plant.passwords(), Credentials(username="energy-1", password=borrowed), version=version), version
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "name",
    ["nobody", "ENERGY-1", "energy-1 ", "energy-1/", "+", "#", "$SYS", "energy-1:x", "bednet-canary", "root", ""],
)
def test_an_unknown_user_is_refused(plant: Plant, name: str, version: Version) -> None:
    password = plant.password("energy-1").password
    refused(probe.enter(plant.passwords(), Credentials(username=name, password=password), version=version), version)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_device_with_a_certificate_only_has_no_password(plant: Plant, version: Version) -> None:
    for password in ("", "temp-101", plant.password("energy-1").password):
        for device in ("temp-101", "line-1", "historian"):
            answer = probe.enter(plant.passwords(), Credentials(username=device, password=password), version=version)
            refused(answer, version)


def test_a_revoked_device_has_no_password(plant: Plant) -> None:
    refused(probe.enter(plant.passwords(), Credentials(username="vib-212", password="")), 5)


def test_guessing_passwords_finds_nothing(plant: Plant, attacker: Attacker) -> None:
    """An attacker in the plant's network tries the usual ones; the control is the right one among them."""
    usual = ["admin", "password", "mosquitto", "123456", "energy-1", "changeme", "public", "letmein", "root", ""]
    right = plant.password("energy-1").password
    assert isinstance(right, str)
    codes = attacker.guess("gateway-1", 8884, "energy-1", [*usual, right])
    assert codes[:-1] == [5] * len(usual)
    assert codes[-1] == 0


def test_no_password_lies_readable_on_a_gateway(plant: Plant) -> None:
    for gateway in plant.gateways:
        text = gateway.read_file("/etc/mosquitto/password_file").decode()
        for device in plant.with_password:
            password = plant.password(device).password
            assert isinstance(password, str)
            assert f"{device}:$7$" in text
            assert password not in text
