# SPDX-License-Identifier: Apache-2.0
"""The scenario `alternative`: Debian 12, the CA on the control machine, nearly every variable other than its default.

The sharp edges: a check run that changes something or says nothing, a second run that changes something, a variable
that nobody reads, and input that is refused too late.
"""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from testbed.lab import Lab
    from tests.scenario import Scenario

pytestmark = pytest.mark.lab


def _server_certificate(scenario: Scenario) -> x509.Certificate:
    return x509.load_pem_x509_certificate(scenario.lab.hosts["gateway-1"].read_file("/etc/mosquitto/tls/server.pem"))


# --- check, converge, again, verify


def test_a_key_type_that_a_device_cannot_verify_is_refused_before_anything_is_changed(alternative_before: Lab) -> None:
    devices = alternative_before.site / "devices.yml"
    if "key_types" not in devices.read_text(encoding="utf-8"):
        pytest.fail("the example plant no longer has a device with key_types: this test needs one")
    result = alternative_before.play("site.yml", check=False)
    assert result.rc != 0
    assert re.search(r"devices\.yml:\d+: device 'temp-104' cannot verify RSA-2048", result.stdout)
    assert result.changed == 0


def test_check_mode_tells_what_it_would_do_on_a_fresh_host(alternative: Scenario) -> None:
    tasks = {task["task"] for task in alternative.check.changed_tasks}
    assert any("Report what a real run would make" in task for task in tasks)
    assert any("Report what a real run would issue" in task for task in tasks)
    assert any("Report what a real run would configure" in task for task in tasks)
    assert any("packages are installed" in task for task in tasks)


def test_check_mode_changes_nothing_on_a_fresh_host(alternative: Scenario) -> None:
    assert "no packages found" in alternative.traces
    assert "No such file" in alternative.traces


def test_a_first_run_converges(alternative: Scenario) -> None:
    assert alternative.converge.failed == 0
    assert alternative.converge.changed > 0


def test_a_second_run_changes_nothing(alternative: Scenario) -> None:
    assert alternative.again.failed == 0
    assert alternative.again.changed_tasks == []


def test_the_deployed_site_holds(alternative: Scenario) -> None:
    result = alternative.lab.play("verify.yml")
    assert result.failed == 0
    assert result.changed == 0


# --- every variable arrives


def test_the_ca_is_what_was_asked_for(alternative: Scenario) -> None:
    issuing = x509.load_pem_x509_certificate((alternative.ca_home / "issuing/issuing.pem").read_bytes())
    key = issuing.public_key()
    assert isinstance(key, rsa.RSAPublicKey)
    assert key.key_size == 2048
    assert "Other Plant" in issuing.subject.rfc4514_string()
    constraints = issuing.extensions.get_extension_for_class(x509.NameConstraints)
    assert not constraints.critical
    permitted = {str(name.value) for name in constraints.value.permitted_subtrees or ()}
    assert {"plant.example", "other.example", "10.0.0.0/8"} <= permitted
    assert (issuing.not_valid_after_utc - issuing.not_valid_before_utc).days in {999, 1000}
    path_length = issuing.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
    assert path_length == 0


def test_the_root_key_is_encrypted(alternative: Scenario) -> None:
    assert b"ENCRYPTED" in (alternative.ca_home / "root/root.key").read_bytes()


def test_the_server_certificate_is_what_was_asked_for(alternative: Scenario) -> None:
    certificate = _server_certificate(alternative)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.other.example", "gateway-1.plant.example"]
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days in {89, 90}


def test_the_bundles_were_picked_up_and_nobody_else_can_read_them(alternative: Scenario) -> None:
    folder = alternative.lab.folder / "picked-up"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "temp-101/key.pem").stat().st_mode & 0o077 == 0
    assert not (folder / ".bundles.tar").exists()
    assert not (alternative.ca_home / "bundles.tar").exists()


def test_the_broker_listens_where_it_was_told_and_nowhere_else(alternative: Scenario) -> None:
    sockets = alternative.lab.hosts["gateway-1"].exec(["ss", "-Hltn"]).stdout
    ports = {int(line.split()[3].rsplit(":", 1)[1]) for line in sockets.splitlines() if "127.0.0.11" not in line}
    assert ports == {22, 18883, 18884, 19001}


def test_a_ca_on_the_control_machine_leaves_no_timer_that_fetches_a_crl(alternative: Scenario) -> None:
    timers = alternative.lab.hosts["gateway-1"].exec(["systemctl", "list-timers", "--all"]).stdout
    assert "bednet-crl-fetch" not in timers


@pytest.mark.parametrize("unit", ["mosquitto.service"])
def test_exposure_is_at_most_1_5_on_debian_12(alternative: Scenario, unit: str) -> None:
    told = alternative.lab.hosts["gateway-1"].exec(["systemd-analyze", "security", "--no-pager", unit]).stdout
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert exposure is not None
    assert float(exposure[1]) <= 1.5


# --- bad input is refused before anything is changed, and the site goes on


def _refused(scenario: Scenario, *args: str, why: str) -> None:
    gateway = scenario.lab.hosts["gateway-1"]
    before = gateway.exec(["systemctl", "show", "mosquitto", "--property=MainPID,ExecMainStartTimestamp"]).stdout
    result = scenario.lab.play("site.yml", *args, check=False)
    assert result.rc != 0
    assert re.search(why, re.sub(r"\s+", " ", result.stdout)), result.stdout
    assert result.changed == 0
    after = gateway.exec(["systemctl", "show", "mosquitto", "--property=MainPID,ExecMainStartTimestamp"]).stdout
    assert after == before
    assert "MainPID=0" not in after


def test_a_missing_vault_passphrase_is_refused(alternative: Scenario) -> None:
    _refused(alternative, "-e", "vault_ca_root_passphrase=", why="ca_root_passphrase is missing or shorter.*vault.yml")


def test_another_key_type_for_a_ca_that_is_there_is_refused(alternative: Scenario) -> None:
    _refused(alternative, "-e", "ca_key_type=P-256", why="ca_key_type is P-256, but the CA in .* was made with RSA")


def test_another_name_for_a_ca_that_is_there_is_refused(alternative: Scenario) -> None:
    _refused(alternative, "-e", "ca_organization=New Plant", why="ca_organization is New Plant, but .* of Other Plant")


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("ca_key_type=secp256k1", r"invalid choice: 'secp256k1' \(choose from"),
        ("ca_crl_refresh_before_days=20", "must be above 0 and below ca_crl_validity_days"),
        ('{"mosquitto_tls_groups": ["P-384"]}', "it must name P-256"),
        ("mosquitto_password_port=18883", "listeners' ports differ"),
        ("mosquitto_password_port=1883", "none is 1883"),
        ("bednet_domain=Plant!", "bednet_domain is not set, or is not a DNS domain"),
    ],
)
def test_a_value_that_cannot_be_is_refused(alternative: Scenario, setting: str, why: str) -> None:
    _refused(alternative, "-e", setting, why=why)


def test_a_full_disk_is_refused(alternative: Scenario) -> None:
    gateway = alternative.lab.hosts["gateway-1"]
    gateway.exec(["mount", "-t", "tmpfs", "-o", "size=1m", "full", "/var/lib/mosquitto"])
    try:
        _refused(alternative, why=r"has \d+ MiB free on /var/lib/mosquitto, and 32 are wanted")
    finally:
        gateway.exec(["umount", "/var/lib/mosquitto"])


def test_a_wrong_clock_is_refused(alternative: Scenario) -> None:
    gateway = alternative.lab.hosts["gateway-1"]
    # A container shares the clock of its machine; the gateway's own `date` is what the role asks.
    gateway.write_file(
        "/usr/local/bin/date", '#!/bin/sh\nexec /bin/date --date="61 seconds ago 2 seconds ago" "$@"\n', mode="0755"
    )
    try:
        _refused(alternative, why=r"The clock of gateway-1 is -6[0-9] s off")
    finally:
        gateway.exec(["rm", "/usr/local/bin/date"])


@pytest.fixture
def newer_mosquitto(alternative: Scenario) -> Iterator[None]:
    """A package source on the gateway that offers Mosquitto 2.1, for one test."""
    gateway = alternative.lab.hosts["gateway-1"]
    gateway.exec(["mkdir", "-p", "/srv/newer"])
    digest = "0" * 64
    gateway.write_file(
        "/srv/newer/Packages",
        "Package: mosquitto\nVersion: 2.1.2-1\nArchitecture: all\nMaintainer: a test\n"
        f"Filename: ./mosquitto.deb\nSize: 1\nSHA256: {digest}\nDescription: not there\n",
    )
    gateway.write_file("/etc/apt/sources.list.d/newer.list", "deb [trusted=yes] file:/srv/newer ./\n")
    gateway.exec(["apt-get", "update", "-qq"])
    yield
    gateway.exec(["rm", "-r", "/etc/apt/sources.list.d/newer.list", "/srv/newer"])
    gateway.exec(["apt-get", "update", "-qq"])


@pytest.mark.usefixtures("newer_mosquitto")
def test_a_mosquitto_that_the_role_does_not_know_is_refused(alternative: Scenario) -> None:
    _refused(alternative, why=r"has or would get Mosquitto 2\.0\.11\S* and 2\.1\.2-1; this role knows 2\.0")


@pytest.fixture
def expired_root(alternative: Scenario) -> Iterator[Path]:
    """A root certificate that ended a second ago in place of the real one, for one test."""
    path = alternative.ca_home / "root/root.pem"
    real = path.read_bytes()
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.load_pem_x509_certificate(real).subject
    expired = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now - datetime.timedelta(seconds=1))
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(expired.public_bytes(Encoding.PEM))
    yield path
    path.write_bytes(real)


@pytest.mark.usefixtures("expired_root")
def test_an_expired_ca_is_refused(alternative: Scenario) -> None:
    _refused(alternative, why=r"The root certificate \S+root\.pem ended at \d+Z\. Nothing was changed")
