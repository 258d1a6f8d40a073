# SPDX-License-Identifier: Apache-2.0
"""The scenario `default`: Debian 13, two gateways, the CA on a host of its own, and the days after.

The sharp edges: a second run that changes something, a reload that drops clients, a change that no running broker has
taken up, a roll-out that goes on past a gateway without a net, and a private key away from the host that made it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from bednet.probe import Credentials, Listener, Outcome, Session, handshake

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from testbed.lab import Host, Lab
    from tests.scenario import Scenario

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def lab(deployment: Scenario) -> Lab:
    """The lab of all suites, deployed."""
    return deployment.lab


@pytest.fixture
def site_as_it_was(lab: Lab) -> Iterator[Path]:
    """The lab's site folder, whose devices.yml a test may change; put back and rolled out again after it."""
    devices = lab.site / "devices.yml"
    before = devices.read_text(encoding="utf-8")
    yield lab.site
    if devices.read_text(encoding="utf-8") != before:
        devices.write_text(before, encoding="utf-8")
        lab.play("site.yml", "--tags", "enrolment", "--skip-tags", "verification")


def _started(host: Host) -> str:
    return host.exec(["systemctl", "show", "mosquitto", "--property=MainPID,ExecMainStartTimestamp"]).stdout


def _listener(lab: Lab, folder: Path, gateway: str = "gateway-1", port: int = 8883) -> Listener:
    ca = folder / "ca.pem"
    ca.write_bytes(lab.hosts["authority"].read_file("/var/lib/bednet-ca/publish/ca.pem"))
    return Listener(lab.hosts[gateway].address, port, ca, f"{gateway}.plant.example")


def _bundle(lab: Lab, device: str, folder: Path) -> Credentials:
    for name in ("certificate.pem", "key.pem"):
        (folder / f"{device}.{name}").write_bytes(
            lab.hosts["authority"].read_file(f"/var/lib/bednet-ca/bundles/{device}/{name}")
        )
    return Credentials(certificate=folder / f"{device}.certificate.pem", key=folder / f"{device}.key.pem")


# --- check, converge, again


def test_check_mode_tells_what_it_would_do_on_fresh_hosts(deployment: Scenario) -> None:
    told = {(task["host"], task["task"].split(" : ")[-1]) for task in deployment.check.changed_tasks}
    assert ("authority", "Report what a real run would make on this fresh host") in told
    assert ("authority", "Report what a real run would issue on this fresh host") in told
    for gateway in ("gateway-1", "gateway-2"):
        assert (gateway, "Report what a real run would configure on this fresh host") in told


def test_check_mode_changes_nothing_on_fresh_hosts(deployment: Scenario) -> None:
    assert "no packages found matching mosquitto" in deployment.traces
    assert deployment.traces.count("No such file") == 2


def test_a_first_run_converges_and_proves_that_the_net_bites(deployment: Scenario) -> None:
    assert deployment.converge.failed == 0
    assert deployment.converge.changed > 0
    assert "forbidden publish" in deployment.converge.stdout.lower()


def test_a_second_run_changes_nothing(deployment: Scenario) -> None:
    assert deployment.again.failed == 0
    assert deployment.again.changed_tasks == []


def test_every_check_of_verify_passes_on_every_gateway(lab: Lab) -> None:
    result = lab.play("verify.yml")
    assert result.failed == 0
    assert result.changed == 0


# --- the CA


def _certificate(lab: Lab, host: str, path: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(lab.hosts[host].read_file(path))


def test_root_and_issuing_ca_have_the_fewest_powers_that_work(lab: Lab) -> None:
    root = _certificate(lab, "authority", "/var/lib/bednet-ca/root/root.pem")
    issuing = _certificate(lab, "authority", "/var/lib/bednet-ca/issuing/issuing.pem")
    for certificate, length in ((root, 1), (issuing, 0)):
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert constraints.value.ca
        assert constraints.value.path_length == length
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
        assert usage.critical
        assert usage.value.key_cert_sign
        assert usage.value.crl_sign
        assert not usage.value.digital_signature
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert key.curve.name == "secp256r1"
    names = issuing.extensions.get_extension_for_class(x509.NameConstraints)
    assert names.critical
    assert "plant.example" in {str(name.value) for name in names.value.permitted_subtrees or ()}
    issuing.verify_directly_issued_by(root)


def test_leaf_certificates_serve_one_purpose_only(lab: Lab) -> None:
    server = _certificate(lab, "gateway-1", "/etc/mosquitto/tls/server.pem")
    device = _certificate(lab, "authority", "/var/lib/bednet-ca/bundles/temp-101/certificate.pem")
    for certificate, purpose in ((server, ExtendedKeyUsageOID.SERVER_AUTH), (device, ExtendedKeyUsageOID.CLIENT_AUTH)):
        assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_private_keys_stay_where_they_were_made(lab: Lab, deployment: Scenario) -> None:
    gateway, authority = lab.hosts["gateway-1"], lab.hosts["authority"]
    assert gateway.exec(["stat", "-c", "%a %U", "/etc/mosquitto/tls/server.key"]).stdout.split() == ["400", "mosquitto"]
    assert authority.exec(["stat", "-c", "%a %U", "/var/lib/bednet-ca/root/root.key"]).stdout.split() == ["600", "root"]
    assert "ENCRYPTED" in authority.exec(["head", "-1", "/var/lib/bednet-ca/root/root.key"]).stdout
    found = gateway.exec(["grep", "-rl", "PRIVATE KEY", "/etc/mosquitto", "/var/lib", "/usr/local"], check=False).stdout
    assert found.split() == ["/etc/mosquitto/tls/server.key"]
    for run in (deployment.check, deployment.converge, deployment.again):
        assert "PRIVATE KEY" not in run.stdout


@pytest.mark.parametrize(
    ("host", "unit", "limit"),
    [
        ("gateway-1", "mosquitto.service", 1.5),
        ("gateway-1", "bednet-crl-fetch.service", 1.5),
        ("authority", "bednet-ca-crl.service", 1.5),
        ("authority", "bednet-ca-publish.service", 1.5),
    ],
)
def test_exposure_of_every_unit_is_low(lab: Lab, host: str, unit: str, limit: float) -> None:
    told = lab.hosts[host].exec(["systemd-analyze", "security", "--no-pager", unit]).stdout
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert exposure is not None
    assert float(exposure[1]) <= limit


@pytest.mark.parametrize(("host", "ports"), [("gateway-1", {22, 8883, 8884}), ("authority", {22, 8880})])
def test_a_host_listens_on_what_it_must_and_nothing_else(lab: Lab, host: str, ports: set[int]) -> None:
    sockets = lab.hosts[host].exec(["ss", "-Hltn"]).stdout
    # 127.0.0.11 is the resolver that Docker gives each container.
    found = {int(line.split()[3].rsplit(":", 1)[1]) for line in sockets.splitlines() if "127.0.0.11" not in line}
    assert found == ports


def test_nothing_but_the_crl_and_the_ca_certificates_is_published(lab: Lab) -> None:
    attacker = lab.hosts["attacker"]
    script = (
        "import sys, urllib.request, urllib.error\n"
        "for path in sys.argv[2:]:\n"
        "    try: print(urllib.request.urlopen(sys.argv[1] + path, timeout=10).status)\n"
        "    except urllib.error.HTTPError as error: print(error.code)\n"
    )
    paths = ["/issuing.crl", "/ca.pem", "/", "/../issuing/issuing.key", "/..%2findex.json", "/passwords.json"]
    told = attacker.exec(["python3", "-", f"http://{lab.hosts['authority'].address}:8880", *paths], input=script).stdout
    assert told.split()[:2] == ["200", "200"]
    assert set(told.split()[2:]) <= {"400", "403", "404"}


# --- the days after


def test_a_device_is_added_with_three_lines_and_nobody_is_dropped(
    lab: Lab, site_as_it_was: Path, tmp_path: Path
) -> None:
    listener = _listener(lab, tmp_path)
    before = {name: _started(lab.hosts[name]) for name in ("gateway-1", "gateway-2")}
    with (site_as_it_was / "devices.yml").open("a", encoding="utf-8") as file:
        file.write("\n  - id: temp-999\n    location: hall-1\n    roles: [sensor]\n")
    with Session(listener, _bundle(lab, "temp-101", tmp_path)) as other:
        result = lab.play("site.yml", "--tags", "enrolment")
        assert "issued: temp-999" in result.stdout
        with Session(listener, _bundle(lab, "temp-999", tmp_path)) as device:
            assert device.client.is_connected()
            assert device.publish("sensors/temp-999/temperature", b"21").granted
            assert not device.publish("sensors/temp-101/temperature", b"21").granted
        assert other.goodbye is None
    # Told to reload, not restarted.
    assert {name: _started(lab.hosts[name]) for name in before} == before


def test_a_revoked_device_is_refused_and_says_so_in_its_certificate(
    lab: Lab, site_as_it_was: Path, tmp_path: Path
) -> None:
    listener, credentials = _listener(lab, tmp_path), _bundle(lab, "temp-102", tmp_path)
    with Session(listener, credentials):
        pass
    devices = site_as_it_was / "devices.yml"
    text = devices.read_text(encoding="utf-8")
    devices.write_text(text.replace("  - id: temp-102\n", "  - id: temp-102\n    revoked: keyCompromise\n"))
    result = lab.play("site.yml", "--tags", "enrolment", "--skip-tags", "verification")
    assert "revoked: temp-102" in result.stdout
    for gateway in ("gateway-1", "gateway-2"):
        answer = handshake(_listener(lab, tmp_path, gateway), credentials)
        assert (answer.outcome, answer.reason) == (Outcome.ALERT, "certificate revoked")
    assert lab.hosts["authority"].exec(["ls", "/var/lib/bednet-ca/bundles/temp-102"], check=False).rc != 0


def test_a_devices_file_that_lost_its_lines_is_refused(lab: Lab, site_as_it_was: Path) -> None:
    devices = site_as_it_was / "devices.yml"
    text = devices.read_text(encoding="utf-8")
    first = text.index("  - id: vib-111")
    devices.write_text(text[:first], encoding="utf-8")
    # The policy's own tests name devices that are gone; without them the list would pass.
    policy = site_as_it_was / "policy.yml"
    rules = policy.read_text(encoding="utf-8")
    policy.write_text(rules[: rules.index("\ntests:")] + "\n", encoding="utf-8")
    try:
        result = lab.play("site.yml", "--tags", "enrolment", check=False)
    finally:
        policy.write_text(rules, encoding="utf-8")
        devices.write_text(text, encoding="utf-8")
    assert result.rc != 0
    assert re.search(r"this would revoke \d+ devices at once", result.failures[0]["message"])
    assert result.changed == 0


def test_a_list_that_the_ca_signed_meanwhile_reaches_a_gateway_without_a_playbook(lab: Lab) -> None:
    gateway, authority = lab.hosts["gateway-2"], lab.hosts["authority"]
    pid = _started(gateway)
    # Any refresh makes a new number; nothing is revoked.
    authority.exec(["/usr/local/sbin/bednet-ca", "crl"], input='{"days": 9, "refresh_before_days": 8}')
    published = x509.load_der_x509_crl(authority.read_file("/var/lib/bednet-ca/publish/issuing.crl"))
    gateway.exec(["systemctl", "start", "bednet-crl-fetch.service"])
    present = x509.load_pem_x509_crl(gateway.read_file("/etc/mosquitto/tls/issuing.crl.pem"))
    assert (
        present.extensions.get_extension_for_class(x509.CRLNumber).value
        == published.extensions.get_extension_for_class(x509.CRLNumber).value
    )
    # For the tests that follow, which ask what else a run changes.
    lab.hosts["gateway-1"].exec(["systemctl", "start", "bednet-crl-fetch.service"])
    assert _started(gateway) == pid
    assert "Reloading config" in gateway.exec(["journalctl", "--unit=mosquitto", "--lines=50"]).stdout


def test_a_file_that_no_running_broker_has_read_is_taken_up_by_the_next_run(lab: Lab) -> None:
    gateway = lab.hosts["gateway-1"]
    # What an interrupted run leaves: the file is in place, the broker was not told.
    gateway.exec(["touch", "/etc/mosquitto/acl_file"])
    pid = _started(gateway)
    result = lab.play("site.yml", "--limit", "gateway-1", "--tags", "mosquitto", "--skip-tags", "verification")
    changed = {task["task"].split(" : ")[-1] for task in result.changed_tasks}
    assert changed == {
        "See which reloadable files the running broker has not taken up",
        "Ensure the broker has taken up its files",
    }
    assert _started(gateway) == pid
    assert list(result.stats) == ["gateway-1"]


def test_a_gateway_out_of_reach_stops_the_run_before_anything_is_changed(lab: Lab, site_as_it_was: Path) -> None:
    with (site_as_it_was / "devices.yml").open("a", encoding="utf-8") as file:
        file.write("\n  - id: temp-998\n    location: hall-1\n    roles: [sensor]\n")
    lab.hosts["gateway-2"].disconnect()
    try:
        result = lab.play("site.yml", check=False, env={"ANSIBLE_TIMEOUT": "3", "ANSIBLE_SSH_RETRIES": "0"})
    finally:
        lab.hosts["gateway-2"].connect()
    assert result.rc != 0
    assert result.stats["gateway-2"]["unreachable"] == 1
    assert result.changed == 0


@pytest.fixture
def lax_broker(lab: Lab) -> Iterator[str]:
    """gateway-1 with a broker that lets everybody do everything, for one test."""
    gateway = lab.hosts["gateway-1"]
    strict = gateway.read_file("/etc/mosquitto/mosquitto.conf").decode()
    lax = re.sub(r"(?m)^(password_file|acl_file) .*\n", "", strict)
    gateway.write_file("/etc/mosquitto/lax.conf", lax.replace("allow_anonymous false", "allow_anonymous true"))
    gateway.exec(["mkdir", "-p", "/etc/systemd/system/mosquitto.service.d"])
    gateway.write_file(
        "/etc/systemd/system/mosquitto.service.d/lax.conf",
        "[Service]\nExecStart=\nExecStart=/usr/sbin/mosquitto -c /etc/mosquitto/lax.conf\n",
    )
    gateway.exec(["chmod", "0644", "/etc/mosquitto/lax.conf"])
    gateway.exec(["systemctl", "daemon-reload"])
    gateway.exec(["systemctl", "restart", "mosquitto"])
    yield "gateway-1"
    gateway.exec(["rm", "-r", "/etc/systemd/system/mosquitto.service.d", "/etc/mosquitto/lax.conf"])
    gateway.exec(["systemctl", "daemon-reload"])
    gateway.exec(["systemctl", "restart", "mosquitto"])


@pytest.mark.usefixtures("lax_broker")
def test_a_roll_out_stops_at_the_first_gateway_whose_net_does_not_hold(lab: Lab) -> None:
    second = _started(lab.hosts["gateway-2"])
    result = lab.play("site.yml", "--tags", "mosquitto", "-e", "bednet_serial=1", check=False)
    assert result.rc != 0
    told = " ".join(failure["message"] for failure in result.failures)
    assert "The net does not hold" in told
    assert result.stats["gateway-1"]["failures"] == 1
    # The second gateway's turn did not come: it was looked at, and left alone.
    assert result.stats["gateway-2"]["changed"] == 0
    assert _started(lab.hosts["gateway-2"]) == second
    verify = lab.play("verify.yml", check=False)
    assert verify.rc != 0
