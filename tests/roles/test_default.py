# SPDX-License-Identifier: Apache-2.0
"""The scenario `default`: Debian 13, two gateways, the CA on a host of its own, and the days after.

The sharp edges: a second run that changes something, a reload that drops clients, a change that no running broker has
taken up, a roll-out that goes on past a gateway without a net, and a private key away from the host that made it.
"""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bednet.probe import NOT_AUTHORIZED, Outcome, enter, handshake
from bednet.verify.report import read_report
from testbed.villains import Credential

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from testbed.lab import Host, Lab
    from tests.conftest import Plant
    from tests.scenario import Scenario

pytestmark = pytest.mark.lab

GATEWAYS = ("gateway-1", "gateway-2")
SERVICE = "gateway-1:8443"  # the host of the token service, as verify.yml reports it
ENROL = ("--tags", "enrolment", "--skip-tags", "verification")
BUNDLES = "/var/lib/bednet-ca/bundles"
CRL = "/etc/mosquitto/tls/issuing.crl.pem"


@pytest.fixture
def site_as_it_was(request: pytest.FixtureRequest, lab: Lab, plant: Plant) -> Iterator[Path]:
    """The lab's site folder, whose devices.yml a test may change and rolls back; put back after it.

    After a test that failed it is rolled out, too.
    """
    devices = lab.site / "devices.yml"
    before, failed = devices.read_text(encoding="utf-8"), request.session.testsfailed
    yield lab.site
    if devices.read_text(encoding="utf-8") != before:
        devices.write_text(before, encoding="utf-8")
        if request.session.testsfailed > failed:
            lab.play("site.yml", *ENROL)
        plant.fetch_bundles()


def _started(host: Host) -> str:
    return host.exec(["systemctl", "show", "mosquitto", "--property=MainPID,ExecMainStartTimestamp"]).stdout


def _all_started(lab: Lab) -> dict[str, str]:
    return {name: _started(lab.hosts[name]) for name in GATEWAYS}


# --- check, converge, again


@pytest.mark.full
def test_check_mode_tells_what_it_would_do_on_fresh_hosts(deployment: Scenario) -> None:
    told = {(task["host"], task["task"].split(" : ")[-1]) for task in deployment.check.changed_tasks}
    assert ("authority", "Report what a real run would make on this fresh host") in told
    assert ("authority", "Report what a real run would issue on this fresh host") in told
    for gateway in ("gateway-1", "gateway-2"):
        assert (gateway, "Report what a real run would configure on this fresh host") in told


@pytest.mark.full
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
    keys = [path for path in found.split() if not path.startswith("/var/lib/bednet-token-service/keys/")]
    assert keys == ["/etc/mosquitto/tls/server.key"]
    for run in deployment.runs:
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


@pytest.mark.parametrize(
    ("host", "timer"),
    [
        ("authority", "bednet-ca-crl.timer"),
        ("gateway-1", "bednet-crl-fetch.timer"),
        ("gateway-2", "bednet-crl-fetch.timer"),
        ("gateway-1", "bednet-token-crl.timer"),
    ],
)
def test_the_list_of_revoked_certificates_is_kept_fresh_by_timers(lab: Lab, host: str, timer: str) -> None:
    show = ["systemctl", "show", timer, "--property=UnitFileState,ActiveState,SubState,NextElapseUSecRealtime"]
    deadline = time.monotonic() + 60
    # It may be at work just now, and knows its next time when that is done.
    while True:
        state = dict(line.split("=", 1) for line in lab.hosts[host].exec(show).stdout.splitlines())
        if state["SubState"] != "running" or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert state.pop("NextElapseUSecRealtime")
    assert state == {"UnitFileState": "enabled", "ActiveState": "active", "SubState": "waiting"}


@pytest.mark.parametrize(("host", "ports"), [("gateway-1", {22, 8443, 8883, 8884, 8885}), ("authority", {22, 8880})])
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


def _own_key(device: str) -> tuple[Credential, str]:
    """Return what a device makes for itself: a key (the certificate is still to come), and its CSR."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Credential(b"", private), csr.public_bytes(pem).decode()


def _add(site: Path, device: str, *more: str) -> None:
    with (site / "devices.yml").open("a", encoding="utf-8") as file:
        file.write("".join([f"\n  - id: {device}\n    location: hall-1\n    roles: [sensor]\n", *more]))


def _public_key(plant: Plant, device: str) -> bytes:
    certificate = x509.load_pem_x509_certificate((plant.folder / device / "certificate.pem").read_bytes())
    return certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def test_devices_come_and_go_while_all_others_stay_connected(  # noqa: PLR0915 - sessions stay open from one to the other
    lab: Lab, plant: Plant, site_as_it_was: Path
) -> None:
    """What docs/operations.md promises, "Add a device" and "Revoke a device", in one roll-out, and the way back.

    temp-999 gets its key from the CA, vib-998 made its own. temp-102 has a certificate, energy-2 a password.
    """
    devices = site_as_it_was / "devices.yml"
    before, brokers = devices.read_text(encoding="utf-8"), _all_started(lab)
    lines = {"temp-102": "keyCompromise", "energy-2": "cessationOfOperation"}
    changed = before
    for name, reason in lines.items():
        changed = changed.replace(f"  - id: {name}\n", f"  - id: {name}\n    revoked: {reason}\n")
    own, csr = _own_key("vib-998")
    certificate, password = plant.certificate("temp-102"), plant.password("energy-2")
    key = _public_key(plant, "temp-102")
    topic, command = "sensors/temp-102/temperature", "commands/temp-102/interval"
    with plant.session("temp-102") as sensor, plant.session("energy-2") as meter, plant.session("tablet-jo") as boss:
        sensor.subscribe("commands/temp-102/#")
        assert sensor.publish(topic, b"21").granted
        assert boss.publish(command, b"2").granted
        sensor.until(lambda message: message.topic == command, "the command, before")
        assert meter.publish("factory/hall-2/energy/energy-2", b"84").granted

        devices.write_text(changed, encoding="utf-8")
        _add(site_as_it_was, "temp-999")
        _add(site_as_it_was, "vib-998", "    enrolment: csr\n")
        request = site_as_it_was / "csr/vib-998.csr"
        request.parent.mkdir(exist_ok=True)
        request.write_text(csr, encoding="ascii")
        try:
            result = lab.play("site.yml", *ENROL)
        finally:
            request.unlink()
        assert "issued: temp-999, vib-998" in result.stdout
        assert "revoked: temp-102" in result.stdout
        assert {host: stats["failures"] for host, stats in result.stats.items()} == dict.fromkeys(
            ("authority", *GATEWAYS), 0
        )
        # The CRL is reloaded, the store speaks for itself: nobody is restarted.
        assert _all_started(lab) == brokers

        for revoked in (meter, sensor):
            revoked.wait_goodbye()
        assert boss.publish(command, b"3").granted
        assert sensor.take() == []
        plant.fetch_bundles()
        with plant.session("temp-999") as device:
            assert device.publish("sensors/temp-999/temperature", b"21").granted
            assert device.publish("sensors/temp-101/temperature", b"21").code == NOT_AUTHORIZED
        assert boss.goodbye is None
    # The CA has no key of vib-998; with the key that it made itself it is let in.
    assert not (plant.folder / "vib-998/key.pem").exists()
    kept = plant.keep("vib-998", Credential((plant.folder / "vib-998/certificate.pem").read_bytes(), own.key))
    answer = enter(plant.mtls("gateway-2"), kept)
    assert answer.accepted, answer
    for gateway in GATEWAYS:
        seen = handshake(plant.mtls(gateway), certificate)
        assert (seen.outcome, seen.reason) == (Outcome.ALERT, "certificate revoked")
        refusal = enter(plant.passwords(gateway), password, version=5)
        assert (refusal.outcome, refusal.code) == (Outcome.REFUSED, NOT_AUTHORIZED)
    left = lab.hosts["authority"].exec(["ls", BUNDLES]).stdout.split()
    assert {"tablet-jo", "temp-999"} <= set(left)
    assert not set(lines) & set(left)

    back, now = before, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    for name in lines:
        back = back.replace(f"  - id: {name}\n", f'  - id: {name}\n    reinstated: "{now}"\n')
    devices.write_text(back, encoding="utf-8")
    result = lab.play("site.yml", *ENROL)
    assert re.search(r"issued: .*\btemp-102\b", result.stdout)
    assert re.search(r"revoked: temp-999, vib-998\b", result.stdout)
    for gone in (certificate, kept):
        seen = handshake(plant.mtls(), gone)
        assert (seen.outcome, seen.reason) == (Outcome.ALERT, "certificate revoked")
    plant.fetch_bundles()
    assert _public_key(plant, "temp-102") != key
    with plant.session("temp-102", gateway="gateway-2") as sensor, plant.session("energy-2") as meter:
        assert sensor.publish(topic, b"21").granted
        assert meter.publish("factory/hall-2/energy/energy-2", b"84").granted
    assert plant.password("energy-2").password != password.password


@pytest.mark.full
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


def _number(crl: x509.CertificateRevocationList) -> int:
    return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


@pytest.fixture
def list_is_due(lab: Lab) -> Iterator[None]:
    """The unit that renews the CRL finds it due, for one test: with the days of the site, and hardly any patience."""
    authority, folder = lab.hosts["authority"], "/etc/systemd/system/bednet-ca-crl.service.d"
    authority.exec(["mkdir", "-p", folder])
    # Due when less than 6.99999 of 7 days are left, which is a second after it was signed.
    asked = '{"days": 7, "refresh_before_days": 6.99999}'
    authority.write_file(f"{folder}/due.conf", f"[Service]\nStandardInputText=\nStandardInputText={asked}\n")
    authority.exec(["systemctl", "daemon-reload"])
    yield
    authority.exec(["rm", "-r", folder])
    authority.exec(["systemctl", "daemon-reload"])


@pytest.mark.usefixtures("list_is_due")
def test_a_list_that_the_timers_renew_reaches_a_gateway_without_a_playbook(lab: Lab) -> None:
    """Both units do their work inside their sandboxes."""
    gateway, authority = lab.hosts["gateway-2"], lab.hosts["authority"]
    pid = _started(gateway)
    path = "/var/lib/bednet-ca/publish/issuing.crl"
    before = x509.load_der_x509_crl(authority.read_file(path))
    authority.exec(["systemctl", "start", "bednet-ca-crl.service"])
    published = _number(x509.load_der_x509_crl(authority.read_file(path)))
    assert published > _number(before)
    gateway.exec(["systemctl", "start", "bednet-crl-fetch.service"])
    present = x509.load_pem_x509_crl(gateway.read_file(CRL))
    assert _number(present) == published
    # The store was told as well: a list of that number is nothing new to it.
    told = json.dumps({"crl_number": published, "revoked_serials": {"0a": "superseded"}})
    assert json.loads(gateway.exec(["bednet-store", "crl"], input=told).stdout)["revoked_serials"] == 0
    # For the tests that follow, which ask what else a run changes.
    lab.hosts["gateway-1"].exec(["systemctl", "start", "bednet-crl-fetch.service"])
    assert _started(gateway) == pid
    assert "Reloading config" in gateway.exec(["journalctl", "--unit=mosquitto", "--lines=50"]).stdout
    _a_fetcher_that_was_taken_over_brings_no_older_list_back(gateway, before)


def _a_fetcher_that_was_taken_over_brings_no_older_list_back(
    gateway: Host, older: x509.CertificateRevocationList
) -> None:
    present, folder = gateway.read_file(CRL), "/run/systemd/system/bednet-crl-fetch.service.d"
    gateway.write_file("/run/older.crl.pem", older.public_bytes(serialization.Encoding.PEM))
    gateway.exec(["mkdir", "-p", folder])
    try:
        for fetched, why in (
            ("cp ${CREDENTIALS_DIRECTORY}/older", "it is older"),
            ("cp /etc/hostname", "it is not a certificate revocation list"),
            ("ln -sf /etc/shadow", ""),
        ):
            taken = f"ExecStart=/bin/{fetched} ${{STATE_DIRECTORY}}/issuing.crl.pem"
            gateway.write_file(
                f"{folder}/taken.conf", f"[Service]\nLoadCredential=older:/run/older.crl.pem\nExecStart=\n{taken}\n"
            )
            gateway.exec(["systemctl", "daemon-reload"])
            assert gateway.exec(["systemctl", "start", "bednet-crl-fetch.service"], check=False).rc != 0
            journal = gateway.exec(["journalctl", "--unit=bednet-crl-fetch", "--lines=8", "--output=cat"]).stdout
            assert why in journal
            assert "root:" not in journal
            assert gateway.read_file(CRL) == present
            assert gateway.exec(["ls", f"{CRL}.new"], check=False).rc != 0
    finally:
        gateway.exec(["sh", "-c", f"rm -r {folder} /run/older.crl.pem; systemctl daemon-reload"])
        gateway.exec(["systemctl", "reset-failed", "bednet-crl-fetch.service"])
    # The next run of the true one mends its folder.
    gateway.exec(["systemctl", "start", "bednet-crl-fetch.service"])


@pytest.mark.full
def test_a_run_for_one_gateway_and_the_ca_leaves_the_other_alone(lab: Lab) -> None:
    before = _all_started(lab)
    result = lab.play("site.yml", "--limit", "authority:gateway-2", "--skip-tags", "verification")
    assert sorted(result.stats) == ["authority", "gateway-2"]
    assert result.changed_tasks == []
    assert _all_started(lab) == before


@pytest.mark.full
def test_a_file_that_no_running_broker_has_read_is_taken_up_by_the_next_run(lab: Lab) -> None:
    gateway = lab.hosts["gateway-1"]
    # What an interrupted run leaves: the file is in place, the broker was not told.
    gateway.exec(["touch", CRL])
    pid = _started(gateway)
    result = lab.play("site.yml", "--limit", "gateway-1", "--tags", "mosquitto", "--skip-tags", "verification")
    changed = {task["task"].split(" : ")[-1] for task in result.changed_tasks}
    # Other tests may have left store and compiled site behind the site.
    assert changed - {"Ensure the store says what the site says", "Ensure the compiled site is on the gateway"} == {
        "See which reloadable files the running broker has not taken up",
        "Ensure the broker has taken up its files",
    }
    assert _started(gateway) == pid
    assert list(result.stats) == ["gateway-1"]


@pytest.mark.full
def test_a_gateway_out_of_reach_stops_the_run_before_anything_is_changed(lab: Lab, site_as_it_was: Path) -> None:
    devices = site_as_it_was / "devices.yml"
    before, pid = devices.read_text(encoding="utf-8"), _started(lab.hosts["gateway-1"])
    _add(site_as_it_was, "temp-997")
    lab.hosts["gateway-2"].disconnect()
    try:
        result = lab.play("site.yml", check=False, env={"ANSIBLE_TIMEOUT": "3", "ANSIBLE_SSH_RETRIES": "0"})
    finally:
        lab.hosts["gateway-2"].connect()
        devices.write_text(before, encoding="utf-8")
    assert result.rc != 0
    assert result.stats["gateway-2"]["unreachable"] == 1
    assert [failure["host"] for failure in result.failures] == ["gateway-2"]
    # A connection of an earlier run that breaks may be told first.
    told = result.failures[0]["message"]
    assert "Failed to connect to the host via ssh: " in told
    assert re.search(r"port 22: (Connection timed out|No route to host)", told)
    assert result.changed == 0
    # Nobody was enrolled, and the other gateway's broker goes on.
    assert lab.hosts["authority"].exec(["ls", f"{BUNDLES}/temp-997"], check=False).rc != 0
    assert _started(lab.hosts["gateway-1"]) == pid


# --- a net that does not hold


def _failing(lab: Lab) -> dict[str, set[str]]:
    """Return what verify.yml finds wrong: gateway, or host of the token service -> names of checks."""
    path = lab.folder / "verification.json"
    path.unlink(missing_ok=True)
    result = lab.play("verify.yml", "-e", f"verification_report={path}", check=False)
    report = read_report(path)
    assert (result.rc == 0) == report.passed
    assert set(report.expected) == {*GATEWAYS, SERVICE}
    return {
        name: {entry.check for entry in report.results if entry.gateway == name and not entry.passed}
        for name in report.expected
    }


def _secrets(lab: Lab) -> dict[str, object]:
    """What the CA hands to its gateways."""
    state = "/var/lib/bednet-ca/state"
    kept, index = (
        json.loads(lab.hosts["authority"].read_file(f"{state}/{name}.json")) for name in ("passwords", "index")
    )
    serials = {
        serial: entry["reason"]
        for serial, entry in index["certificates"].items()
        if "reason" in entry and entry["kind"] != "server"
    }
    return {"passwords": kept["passwords"], "psk": kept["psk"], "revoked_serials": serials}


@pytest.fixture
def lax_policy(lab: Lab, request: pytest.FixtureRequest) -> Iterator[None]:
    """gateway-1 with a rule too many about the probe in its store, for one test."""
    gateway, path = lab.hosts["gateway-1"], "/var/lib/bednet/site.jsonl"
    strict, secrets = gateway.read_file(path).decode().splitlines(), json.dumps(_secrets(lab))

    def apply(lines: list[str]) -> None:
        gateway.write_file("/run/site.jsonl", "".join(f"{line}\n" for line in lines), mode="0644")
        gateway.exec(["bednet-store", "apply", "/run/site.jsonl"], input=secrets)

    rule = {"id": "test/lax", "effect": "allow", "access": request.param, "topic": ["#"], "during": [], "networks": []}
    lax = [json.loads(line) for line in strict]
    next(line for line in lax if line.get("profile") == "*bednet-probe" and "rules" in line)["rules"].append(rule)
    apply([json.dumps(line) for line in lax])
    yield
    apply(strict)
    gateway.exec(["rm", "/run/site.jsonl"])


@pytest.mark.parametrize(
    ("lax_policy", "caught"),
    [
        (
            "subscribe",
            {
                "# shows nothing of others",
                "+ shows nothing of others",
                "a shared subscription shows nothing of others",
                "a forbidden subscription shows nothing",
            },
        ),
        pytest.param(
            "publish",
            {
                "a forbidden publish is refused",
                "a forbidden publish of MQTT 3.1.1 is dropped",
                "a will on a forbidden topic is dropped",
                "nothing is retained on a forbidden topic",
            },
            marks=pytest.mark.full,
        ),
    ],
    indirect=["lax_policy"],
)
@pytest.mark.usefixtures("lax_policy")
def test_verify_catches_a_policy_that_allows_too_much(lab: Lab, caught: set[str]) -> None:
    assert _failing(lab) == {"gateway-1": caught, "gateway-2": set(), SERVICE: set()}


@pytest.fixture
def lax_broker(lab: Lab) -> Iterator[str]:
    """gateway-1 with a broker that lets everybody do everything, for one test."""
    gateway = lab.hosts["gateway-1"]
    strict = gateway.read_file("/etc/mosquitto/mosquitto.conf").decode()
    lax, lines = re.subn(r"(?m)^plugin(_opt_\w+)? .*\n", "", strict)
    assert lines > 1
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


@pytest.mark.full
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
    found = _failing(lab)
    assert {
        "nobody gets in without credentials",
        "a wrong password is refused",
        "an unknown user is refused",
        "the client id is bound to the identity",
        "a forbidden publish is refused",
        "a forbidden subscription shows nothing",
    } <= found["gateway-1"]
    assert found["gateway-2"] == set()
