# SPDX-License-Identifier: Apache-2.0
"""Gateways on which bednet's plugin decides: what lies there, revoke.yml and reinstate.yml, pre-shared keys.

The sharp edges: a broker that could write what it decides from, a device that stays in at one gateway because another
one is out of reach, a mode that leaves something for the other, and a package that is not there.
"""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING

import pytest

from bednet.probe import NOT_AUTHORIZED, Credentials, Listener, Offer, Outcome, Session, enter, handshake

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from testbed.lab import Host, Lab
    from tests.conftest import Plant

pytestmark = pytest.mark.lab

GATEWAYS = ("gateway-1", "gateway-2")
STORE = "/var/lib/bednet/store"
PSK_PORT = 8885
ENROL = ("--tags", "enrolment", "--skip-tags", "verification")
AS_ACL_FILE = ("-e", "mosquitto_access_control=acl_file", "-e", "mosquitto_acl_file_strictest=true")
"""The example's policy has rules that an acl_file cannot express."""


def _started(host: Host) -> str:
    return host.exec(["systemctl", "show", "mosquitto", "--property=MainPID,ExecMainStartTimestamp"]).stdout


def _stored(host: Host, device: str) -> dict[str, object]:
    """What the store says about a device."""
    told: dict[str, object] = json.loads(host.exec(["bednet-store", "dump", device]).stdout.splitlines()[0])
    return told


def _without_marks(devices: str) -> str:
    """Return a devices.yml less the marks of reinstated devices."""
    return re.sub(r'\n    reinstated: "[0-9TZ:-]+"', "", devices)


# --- what lies on a gateway


def test_the_broker_reads_its_store_and_writes_nothing_but_the_table_of_readers(lab: Lab) -> None:
    gateway = lab.hosts["gateway-1"]
    paths = ("/var/lib/bednet", STORE, f"{STORE}/data.mdb", f"{STORE}/lock.mdb", "/var/lib/bednet/site.jsonl")
    told = gateway.exec(["stat", "-c", "%a %U:%G", *paths]).stdout.splitlines()
    assert told == [
        "750 root:mosquitto", "750 bednet-store:mosquitto", "640 bednet-store:mosquitto", "660 bednet-store:mosquitto",
        "640 root:bednet-store",
    ]  # fmt: skip
    pid = gateway.exec(["systemctl", "show", "mosquitto", "--property=MainPID", "--value"]).stdout.strip()
    maps = gateway.exec(["cat", f"/proc/{pid}/maps"]).stdout
    modes = {
        line.split()[-1]: line.split()[1]
        for line in maps.splitlines()
        if line.endswith((".mdb", "bednet_plugin.so")) and line.split()[1] != "r-xp"
    }
    # What it decides from is read-only in its memory; in its name space so is all of the folder but the one file.
    assert modes[f"{STORE}/data.mdb"] == "r--s"
    assert modes[f"{STORE}/lock.mdb"] == "rw-s"
    # An upgraded package is taken up by a restart in the same run.
    assert "/usr/lib/bednet/bednet_plugin.so" in modes
    mounts = gateway.exec(["cat", f"/proc/{pid}/mountinfo"]).stdout
    writable = [line.split()[4] for line in mounts.splitlines() if line.split()[5].startswith("rw")]
    assert [path for path in writable if path.startswith("/var/lib/bednet")] == [f"{STORE}/lock.mdb"]


def test_nothing_of_mosquittos_own_access_control_is_there(lab: Lab) -> None:
    gateway = lab.hosts["gateway-2"]
    assert gateway.exec(["ls", "/etc/mosquitto/acl_file", "/etc/mosquitto/password_file"], check=False).stdout == ""
    lines = gateway.read_file("/etc/mosquitto/mosquitto.conf").decode().splitlines()
    words = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert not {"acl_file", "password_file", "psk_file", "allow_zero_length_clientid"} & set(words)
    # Only where the handshake itself proves an identity may it stand in for the plugin's own look.
    places = [number for number, word in enumerate(words) if word == "use_identity_as_username"]
    assert [words[:place].count("listener") for place in places] == [3]
    assert "plugin /usr/lib/bednet/bednet_plugin.so" in lines


@pytest.mark.full
def test_a_missing_package_is_refused_before_anything_is_changed(lab: Lab, tmp_path: Path) -> None:
    before = _started(lab.hosts["gateway-1"])
    result = lab.play("site.yml", "-e", f"mosquitto_plugin_packages_dir={tmp_path}", check=False)
    assert result.rc != 0
    said = re.sub(r"\s+", " ", result.stdout)
    pattern = f"{tmp_path}/trixie/amd64/mosquitto-plugin-bednet_*.deb"
    assert f"no package of the plugin for gateway-1: {pattern}. Nothing was changed." in said
    assert "make deb SUITE=trixie ARCH=amd64" in said
    assert result.changed == 0
    assert _started(lab.hosts["gateway-1"]) == before


@pytest.mark.full
def test_a_package_of_another_source_is_refused_before_anything_is_changed(lab: Lab, tmp_path: Path) -> None:
    folder = tmp_path / "trixie" / "amd64"
    folder.mkdir(parents=True)
    old = folder / "mosquitto-plugin-bednet_0.1.0+20260101000000.00000000+deb13_amd64.deb"
    old.touch()
    result = lab.play("site.yml", "-e", f"mosquitto_plugin_packages_dir={tmp_path}", check=False)
    assert result.rc != 0
    said = re.sub(r"\s+", " ", result.stdout)
    assert f"for gateway-1, {old}, was not built from the src/plugin of this checkout. Nothing was changed." in said
    assert "Build it again with `make deb SUITE=trixie ARCH=amd64`" in said
    assert result.changed == 0


@pytest.mark.full
def test_pre_shared_keys_without_the_plugin_are_refused(lab: Lab) -> None:
    result = lab.play("site.yml", *AS_ACL_FILE, check=False)
    assert result.rc != 0
    assert "switches TLS 1.3 off on every listener" in re.sub(r"\s+", " ", result.stdout)
    assert result.changed == 0


# --- off the net, and back


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("-e", "device=temp-203"), "reason is missing: -e device=DEVICE -e reason=REASON"),
        (("-e", "device=temp-203", "-e", "reason=stolen"), "'stolen' is no reason for a revocation. Cure: one of key"),
        (("-e", "device=temp-999", "-e", "reason=superseded"), "device 'temp-999' is not listed in devices.yml"),
        (
            ("-e", "device=temp-203", "-e", "reason=superseded", "--limit", "gateway-1"),
            "With --limit the device would stay in at authority, gateway-2. Nothing was changed",
        ),
    ],
)
def test_a_revocation_that_cannot_be_meant_is_refused(lab: Lab, arguments: tuple[str, ...], why: str) -> None:
    before = (lab.site / "devices.yml").read_bytes()
    result = lab.play("revoke.yml", *arguments, check=False)
    assert result.rc != 0
    assert why in re.sub(r"\s+", " ", result.stdout)
    assert result.changed == 0
    assert (lab.site / "devices.yml").read_bytes() == before


def test_a_device_is_revoked_everywhere_at_once_and_comes_back_with_new_keys(
    lab: Lab, plant: Plant, measured: Callable[[str], None]
) -> None:
    """What docs/operations.md promises, "Revoke a device" and "Reinstate a device"."""
    device, topic = "tablet-jo", "commands/temp-101/interval"
    devices = lab.site / "devices.yml"
    before = devices.read_text(encoding="utf-8")
    certificate, password = plant.certificate(device), plant.password(device)
    brokers = {name: _started(lab.hosts[name]) for name in GATEWAYS}
    wish = ("-e", f"device={device}", "-e", "reason=privilegeWithdrawn")
    with (
        plant.session(device) as first,
        Session(plant.passwords("gateway-2"), password) as second,
        plant.session("temp-101") as other,
    ):
        assert first.publish(topic, b"2").granted
        assert second.publish(topic, b"2").granted
        check = lab.play("revoke.yml", *wish, "--check")
        assert first.goodbye is None
        assert devices.read_text(encoding="utf-8") == before
        # The store of one gateway alone: how long until its broker acts on it.
        lab.hosts["gateway-1"].exec(["bednet-store", "revoke", device, "--reason", "privilegeWithdrawn"])
        begin = time.monotonic()
        goodbye = first.wait_goodbye(1)
        measured(f"closed {(time.monotonic() - begin) * 1000:.0f} ms after `bednet-store revoke` returned ({goodbye})")
        assert second.goodbye is None
        result = lab.play("revoke.yml", *wish)
        second.wait_goodbye(1)
        assert other.goodbye is None
        assert other.publish("sensors/temp-101/temperature", b"21").granted
    told, real = ({(task["host"], task["task"]) for task in run.changed_tasks} for run in (check, result))
    assert ("gateway-2", "mosquitto : Ensure the store refuses it, and forgets its secrets") in told & real
    assert "    revoked: privilegeWithdrawn\n" in devices.read_text(encoding="utf-8")
    for name in GATEWAYS:
        seen = handshake(plant.mtls(name), certificate)
        assert (seen.outcome, seen.reason) == (Outcome.ALERT, "certificate revoked")
        refusal = enter(plant.passwords(name), password)
        assert (refusal.outcome, refusal.code) == (Outcome.REFUSED, NOT_AUTHORIZED)
        assert _stored(lab.hosts[name], device)["revoked"] == "privilegeWithdrawn"
    assert lab.hosts["authority"].exec(["ls", f"/var/lib/bednet-ca/bundles/{device}"], check=False).rc != 0
    assert lab.play("revoke.yml", *wish).changed_tasks == []

    back = lab.play("reinstate.yml", "-e", f"device={device}")
    assert re.search(rf"issued: {device}\b", back.stdout)
    assert _without_marks(devices.read_text(encoding="utf-8")) == _without_marks(before)
    # Nobody was restarted for any of this.
    assert {name: _started(lab.hosts[name]) for name in GATEWAYS} == brokers
    seen = handshake(plant.mtls(), certificate)
    assert (seen.outcome, seen.reason) == (Outcome.ALERT, "certificate revoked")
    plant.fetch_bundles()
    assert plant.password(device).password != password.password
    for listener, credentials in (
        (plant.mtls("gateway-1"), plant.certificate(device)),
        (plant.passwords("gateway-2"), plant.password(device)),
    ):
        assert enter(listener, credentials).accepted


@pytest.mark.full
def test_a_gateway_out_of_reach_is_named_and_the_others_are_done(lab: Lab, plant: Plant) -> None:
    device, devices = "temp-202", lab.site / "devices.yml"
    before = devices.read_text(encoding="utf-8")
    wish = ("-e", f"device={device}", "-e", "reason=superseded")
    quick = {"ANSIBLE_TIMEOUT": "3", "ANSIBLE_SSH_RETRIES": "0"}
    try:
        with plant.session(device, gateway="gateway-1") as session:
            lab.hosts["gateway-2"].disconnect()
            try:
                result = lab.play("revoke.yml", *wish, check=False, env=quick)
            finally:
                lab.hosts["gateway-2"].connect()
            session.wait_goodbye(1)
        assert result.rc != 0
        said = re.sub(r"\s+", " ", result.stdout)
        assert f"{device} is NOT yet refused by gateway-2: see above. Everybody else has done it." in said
        assert _stored(lab.hosts["gateway-1"], device)["revoked"] == "superseded"
        assert _stored(lab.hosts["gateway-2"], device)["revoked"] is None
        again = lab.play("revoke.yml", *wish)
        assert {task["host"] for task in again.changed_tasks} == {"gateway-2"}
        assert _stored(lab.hosts["gateway-2"], device)["revoked"] == "superseded"
    finally:
        if devices.read_text(encoding="utf-8") != before:
            lab.play("reinstate.yml", "-e", f"device={device}")
            plant.fetch_bundles()
    assert _without_marks(devices.read_text(encoding="utf-8")) == _without_marks(before)


@pytest.mark.full
def test_a_certificate_that_the_ca_alone_has_revoked_is_cut_off_once_the_list_is_fetched(
    lab: Lab, plant: Plant, measured: Callable[[str], None]
) -> None:
    """No playbook told the gateways: the timer's unit did, and of certificates only."""
    device, gateway = "tablet-jo", lab.hosts["gateway-1"]
    certificate, password = plant.certificate(device), plant.password(device)
    wish = json.dumps({"id": device, "reason": "cessationOfOperation"})
    pid = _started(gateway)
    try:
        with (
            plant.session(device) as session,
            plant.session("temp-101") as other,
            Session(plant.passwords("gateway-2"), password) as elsewhere,
        ):
            revoked = json.loads(lab.hosts["authority"].exec(["bednet-ca", "revoke"], input=wish).stdout)
            assert {entry["id"] for entry in revoked["revoked"]} == {device}
            gateway.exec(["systemctl", "start", "bednet-crl-fetch.service"])
            begin = time.monotonic()
            goodbye = session.wait_goodbye(1)
            waited = (time.monotonic() - begin) * 1000
            measured(f"revoked at the CA alone: closed {waited:.0f} ms after the list was fetched ({goodbye})")
            # The other gateway has not fetched it.
            assert elsewhere.goodbye is None
            assert other.goodbye is None
        seen = handshake(plant.mtls("gateway-1"), certificate)
        assert (seen.outcome, seen.reason) == (Outcome.ALERT, "certificate revoked")
        assert _stored(gateway, device)["revoked"] is None
        assert enter(plant.passwords("gateway-1"), password).accepted
        assert _started(gateway) == pid
    finally:
        # It is listed as before, so it gets new ones.
        lab.play("site.yml", *ENROL)
        plant.fetch_bundles()
    assert enter(plant.mtls("gateway-1"), plant.certificate(device)).accepted
    assert lab.play("site.yml", *ENROL).changed_tasks == []


@pytest.mark.full
def test_a_roll_out_from_files_that_know_of_no_revocation_brings_nobody_back(lab: Lab, plant: Plant) -> None:
    """docs/store.md, "Who is revoked stays so"."""
    device, devices = "temp-103", lab.site / "devices.yml"
    before = devices.read_text(encoding="utf-8")
    lab.hosts["gateway-1"].exec(["bednet-store", "revoke", device, "--reason", "superseded"])
    try:
        result = lab.play("site.yml", *ENROL, check=False)
        assert result.rc != 0
        said = re.sub(r"\s+", " ", result.stdout)
        assert f"gateway-1 keeps {device} out: its store says revoked (superseded)" in said
        assert "playbooks/reinstate.yml -e device=ID -e again=true" in said
        assert {name: _stored(lab.hosts[name], device)["revoked"] for name in GATEWAYS} == {
            "gateway-1": "superseded",
            "gateway-2": None,
        }
    finally:
        lab.play("reinstate.yml", "-e", f"device={device}", "-e", "again=true")
    assert _stored(lab.hosts["gateway-1"], device)["revoked"] is None
    assert _without_marks(devices.read_text(encoding="utf-8")) == _without_marks(before)


# --- pre-shared keys


@pytest.fixture
def gauge(lab: Lab, plant: Plant) -> Iterator[Credentials]:
    """A device with a pre-shared key, listed and enrolled for one test."""
    devices = lab.site / "devices.yml"
    before = devices.read_text(encoding="utf-8")
    devices.write_text(
        before + "\n  - id: level-121\n    location: hall-1\n    roles: [sensor]\n    authentication: [psk]\n",
        encoding="utf-8",
    )
    try:
        lab.play("site.yml", *ENROL)
        plant.fetch_bundles()
        yield Credentials(
            psk_identity="level-121", psk=bytes.fromhex((plant.folder / "level-121/psk").read_text(encoding="ascii"))
        )
    finally:
        devices.write_text(before, encoding="utf-8")
        lab.play("site.yml", *ENROL)


@pytest.mark.full
def test_a_device_with_a_pre_shared_key_does_what_it_may_until_it_is_revoked(
    lab: Lab, plant: Plant, gauge: Credentials
) -> None:
    client = json.loads((plant.folder / "level-121/client.json").read_text(encoding="utf-8"))
    assert client["psk_identity"] == "level-121"
    assert {gateway["psk_port"] for gateway in client["gateways"]} == {PSK_PORT}
    assert not (plant.folder / "level-121/key.pem").exists()
    listeners = {name: Listener(lab.hosts[name].address, PSK_PORT) for name in GATEWAYS}
    for version, cipher in (
        ("1.2", "ECDHE-PSK-CHACHA20-POLY1305"),
        ("1.3", "TLS_(AES_128_GCM|CHACHA20_POLY1305)_SHA256"),
    ):
        seen = handshake(listeners["gateway-2"], gauge, offer=Offer(version, version))
        assert seen.hello is not None
        assert (seen.accepted, seen.hello.version) == (True, version)
        assert re.fullmatch(cipher, seen.hello.cipher)
    # The other listeners have lost nothing by it.
    assert handshake(plant.mtls(), plant.certificate("temp-101"), offer=Offer("1.3", "1.3")).accepted
    # Nobody learns by it which names have a key.
    other = Credentials(psk_identity="temp-101", psk=gauge.psk)
    wrong = Credentials(psk_identity="level-121", psk=bytes(byte ^ 1 for byte in gauge.psk or b""))
    answers = [enter(listeners["gateway-1"], credentials) for credentials in (other, wrong)]
    assert [(answer.outcome, answer.reason) for answer in answers] == [(Outcome.ALERT, "decrypt error")] * 2
    with Session(listeners["gateway-1"], gauge, client_id="temp-101") as session, plant.session("temp-101") as namesake:
        assert session.publish("sensors/level-121/level", b"7").granted
        assert session.publish("sensors/temp-101/temperature", b"7").code == NOT_AUTHORIZED
        assert session.subscribe("commands/level-121/#", "#")[1].code == NOT_AUTHORIZED
        # The handshake names the client, whatever it calls itself: nobody else's session is taken.
        assert namesake.goodbye is None
        lab.play("revoke.yml", "-e", "device=level-121", "-e", "reason=keyCompromise")
        session.wait_goodbye(1)
    for listener in listeners.values():
        assert not enter(listener, gauge).accepted
    result = lab.play("reinstate.yml", "-e", "device=level-121", check=False)
    assert result.rc != 0
    assert "level-121 was revoked for keyCompromise" in re.sub(r"\s+", " ", result.stdout)
    assert result.changed == 0


# --- the other way, and back


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_gateway_goes_over_to_the_other_way_and_back_and_keeps_nothing(lab: Lab, plant: Plant) -> None:
    gateway = lab.hosts["gateway-1"]
    own = ["/etc/mosquitto/acl_file", "/etc/mosquitto/password_file"]
    ours = ["/var/lib/bednet", "/usr/local/sbin/bednet-store", "/usr/lib/bednet/bednet_plugin.so"]
    ways = {
        "acl_file": ((*AS_ACL_FILE, "-e", "mosquitto_psk_port=0"), own, ours),
        "plugin": ((), ours, own),
    }
    for way, (arguments, there, gone) in ways.items():
        check = lab.play("site.yml", "--check", *arguments)
        assert ("gateway-1", "mosquitto : Ensure the broker is configured") in {
            (task["host"], task["task"]) for task in check.changed_tasks
        }
        lab.play("site.yml", *arguments)
        assert gateway.exec(["ls", "-d", *there]).stdout.splitlines() == sorted(there)
        assert gateway.exec(["ls", "-d", *gone], check=False).stdout == ""
        assert ("mosquitto-plugin-bednet" in gateway.exec(["dpkg", "--get-selections"]).stdout) == (way == "plugin")
        assert lab.play("site.yml", *arguments).changed_tasks == []
        assert lab.play("verify.yml", *arguments).failed == 0
        with plant.session("temp-101") as session:
            assert session.subscribe("#")[0].granted == (way == "acl_file")
