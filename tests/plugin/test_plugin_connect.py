# SPDX-License-Identifier: Apache-2.0
"""Who is let in. The reason of each refusal stands in the audit, and nowhere else: a client learns nothing."""

from __future__ import annotations

import datetime as dt
import itertools
import re
import shutil
import socket
import ssl
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID

from bednet.probe import Credentials, connect_packet, dial, enter
from tests.plugin.conftest import KEY
from tests.plugin.gateway import DEADLINE, password_record
from tests.plugin.mqtt import PSK, Resumable
from tests.plugin.pki import common_name, now
from tests.plugin.wire import Wire

if TYPE_CHECKING:
    from bednet.probe import Version
    from tests.plugin.conftest import Start
    from tests.plugin.gateway import Gateway, Site
    from tests.plugin.pki import Authority, Issued

SECOND = dt.timedelta(seconds=1)


def claim(username: str, password: str) -> Credentials:
    return Credentials(username=username, password=password)


# --- certificates


def test_a_certificate_lets_its_device_in(gateway: Gateway, authority: Authority) -> None:
    issued = authority.device("temp-1")
    with gateway.session("temp-1", issued) as session:
        assert session.publish("sensors/temp-1/t", b"1").granted
    named = Credentials(issued.credentials.certificate, issued.credentials.key, username="temp-1")
    gateway.admitted(named, client_id="temp-1")
    assert not list(gateway.audit())


@pytest.mark.parametrize("version", [4, 5])
def test_a_client_id_that_is_not_the_device_is_refused(
    gateway: Gateway, authority: Authority, version: Version
) -> None:
    issued = authority.device("temp-1")
    gateway.refused(issued.credentials, client_id="temp-2", version=version)
    event = gateway.audited(event="refused", action="connect", reason="client-id")
    assert (event["device"], event["client_id"], event["address"]) == ("temp-1", "temp-2", "127.0.0.1")


def test_nobody_inherits_a_session_by_its_client_id(gateway: Gateway, authority: Authority) -> None:
    """What waits for temp-2 stays where it is when temp-1 asks for it by name."""
    other = authority.device("temp-2")
    with gateway.session("temp-2", other, clean=False) as session:
        session.subscribe("commands/temp-2/#")
    gateway.refused(authority.device("temp-1").credentials, client_id="temp-2")
    with gateway.session("temp-2", other, clean=False) as session:
        assert session.resumed


def test_no_client_id_at_all_is_refused(gateway: Gateway, authority: Authority) -> None:
    """The broker then makes one up, which is not the device's either."""
    with dial(gateway.listener(), authority.device("temp-1").credentials) as channel:
        channel.send(connect_packet("", version=5))
        assert channel.packet()[3] == 0x87
    gateway.audited(reason="client-id", device="temp-1")


def test_another_user_name_than_the_certificate_says_is_refused(gateway: Gateway, authority: Authority) -> None:
    issued = authority.device("temp-1").credentials
    stolen = Credentials(issued.certificate, issued.key, "temp-2", "password of temp-2")
    gateway.refused(stolen, client_id="temp-1")
    gateway.refused(stolen, client_id="temp-2")
    assert gateway.count(reason="username", device="temp-1") == 2


def test_a_device_that_the_store_does_not_know_is_refused(gateway: Gateway, authority: Authority) -> None:
    gateway.refused(authority.device("temp-3").credentials, client_id="temp-3")
    gateway.audited(reason="unknown-device", device="temp-3")


def test_a_certificate_whose_number_is_revoked_is_refused_and_another_one_is_not(
    site: Site, start: Start, authority: Authority
) -> None:
    old, new = authority.device("temp-1"), authority.device("temp-1")
    site.revoked_serials[old.serial] = "superseded"
    site.apply()
    gateway = start()
    gateway.refused(old.credentials, client_id="temp-1")
    gateway.admitted(new.credentials, client_id="temp-1")
    assert [event["reason"] for event in gateway.audit()] == ["certificate-revoked"]


def _two_names(authority: Authority) -> Issued:
    return authority.issue("two", [common_name("temp-1"), common_name("temp-2")])


def _no_name(authority: Authority) -> Issued:
    return authority.issue("none", [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "temp-1")])


def _nul(authority: Authority) -> Issued:
    return authority.issue("nul", [common_name("temp-1\0.evil")])


def _wide(authority: Authority) -> Issued:
    return authority.issue("wide", [x509.NameAttribute(NameOID.COMMON_NAME, "temp-1", _ASN1Type.BMPString)])


def _wildcard(authority: Authority) -> Issued:
    return authority.issue("wildcard", [common_name("+")])


def _path(authority: Authority) -> Issued:
    return authority.issue("path", [common_name("temp-1/#")])


@pytest.mark.parametrize("make", [_two_names, _no_name, _nul, _wide, _wildcard, _path])
def test_a_certificate_without_exactly_one_name_that_is_an_id_is_refused(
    gateway: Gateway, authority: Authority, make: Any
) -> None:
    issued = make(authority)
    for client_id in ("temp-1", "temp-2"):
        gateway.refused(issued.credentials, client_id=client_id)
    assert gateway.count(reason="unknown-device", action="connect") == 2


def test_a_certificate_does_not_stand_for_a_device_that_may_not_use_one(gateway: Gateway, authority: Authority) -> None:
    gateway.refused(authority.device("psk-1").credentials, client_id="psk-1")
    gateway.audited(reason="method", device="psk-1")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS 1.2", "TLS 1.3"])
def test_a_resumed_tls_session_is_looked_at_again(
    site: Site, gateway: Gateway, authority: Authority, version: ssl.TLSVersion
) -> None:
    """TLS does not check a certificate when a session is resumed; the plugin does, with what holds now."""
    issued = authority.device("temp-1")
    client = Resumable(gateway, str(issued.credentials.certificate), str(issued.credentials.key), version)
    assert client.enter("temp-1") == 0
    assert client.enter("temp-1") == 0
    resumed = client.reused
    site.revoked_serials[issued.serial] = "keyCompromise"
    site.apply()
    assert client.enter("temp-1") == 5
    gateway.audited(reason="certificate-revoked", device="temp-1")
    if not resumed:
        pytest.skip("this broker resumed no session; the refusal was that of a new one")


def test_a_resumed_tls_session_does_not_outlive_its_certificate(gateway: Gateway, authority: Authority) -> None:
    issued = authority.device("temp-1", ends=now() + 3 * SECOND)
    client = Resumable(
        gateway, str(issued.credentials.certificate), str(issued.credentials.key), ssl.TLSVersion.TLSv1_2
    )
    assert client.enter("temp-1") == 0
    gateway.wait(lambda: now() > issued.ends + SECOND, "the end of the certificate")
    assert client.enter("temp-1") == 5
    assert client.reused, "a new handshake would have been refused by TLS"
    gateway.audited(event="refused", reason="certificate-time", device="temp-1")


# --- passwords


@pytest.mark.parametrize("on", ["password", "websockets"])
@pytest.mark.parametrize("version", [4, 5])
def test_a_password_lets_its_device_in(gateway: Gateway, on: str, version: Version) -> None:
    with gateway.session("temp-1", on=on, version=version) as session:
        session.subscribe("sensors/temp-1/#")
        assert session.publish("sensors/temp-1/t", b"1").granted
        session.until(lambda message: message.payload == b"1", "the message")
    assert not list(gateway.audit())


@pytest.mark.parametrize("on", ["password", "websockets"])
def test_wrong_passwords_and_names_are_refused(gateway: Gateway, on: str) -> None:
    cases = {
        ("temp-1", "password of temp-2"): "password",
        ("temp-1", ""): "password",
        ("temp-9", "password of temp-1"): "unknown-device",
        ("+", "password of temp-1"): "unknown-device",
        ("x" * 65, "password of temp-1"): "unknown-device",
        ("cert-only", "password of cert-only"): "method",
    }
    for (username, password), reason in cases.items():
        gateway.refused(Credentials(username=username, password=password), on=on, client_id=username)
        gateway.audited(action="connect", reason=reason, device=username)
    gateway.refused(gateway.credentials("temp-1"), on=on, client_id="temp-2")
    gateway.audited(reason="client-id", device="temp-1", client_id="temp-2")


def test_who_says_nothing_about_itself_is_refused(gateway: Gateway) -> None:
    for on in ("password", "plain", "websockets"):
        gateway.refused(Credentials(), on=on, client_id="temp-1")
    event = gateway.audited(reason="unknown-device", client_id="temp-1")
    assert "device" not in event
    # MQTT 5 allows a password without a user name.
    with dial(gateway.listener("plain")) as channel:
        channel.send(connect_packet("temp-1", password=gateway.credentials("temp-1").password, version=5))
        assert channel.packet()[3] == 0x87
    assert gateway.count(reason="unknown-device") == 4
    # And a user name without a password, which is a wrong one.
    gateway.refused(Credentials(username="temp-1"), on="plain", client_id="temp-1")
    gateway.audited(reason="password", device="temp-1")


def test_a_long_password_is_only_a_wrong_one(gateway: Gateway) -> None:
    gateway.refused(claim("temp-1", "x" * 60000), on="password", client_id="temp-1")
    gateway.audited(reason="password")
    gateway.admitted(gateway.credentials("temp-1"), on="password", client_id="temp-1")


def test_a_wrong_password_takes_as_long_for_a_device_that_there_is(site: Site, start: Start) -> None:
    """Ten thousand iterations take milliseconds, one hundred do not; who is unknown costs what is usual."""
    site.passwords["temp-1"] = password_record("password of temp-1", 101)
    site.apply()
    gateway = start(options={"login_failures": "1000", "audit_rate": "1000"})
    times: dict[str, list[float]] = {"temp-1": [], "cert-only": [], "temp-9": []}
    for _, name in itertools.product(range(30), times):  # in turn, on a machine whose speed drifts
        with dial(gateway.listener("plain")) as channel:
            begun = time.perf_counter()
            channel.send(connect_packet(name, username=name, password=name, version=4))
            assert channel.packet()[3] == 5
            times[name].append(time.perf_counter() - begun)
    fastest = {name: min(values) for name, values in times.items()}
    assert max(fastest.values()) < 2 * min(fastest.values()), fastest


def test_enhanced_authentication_is_no_way_in(gateway: Gateway, authority: Authority) -> None:
    """An MQTT 5 client that names an authentication method is not asked for anything else by the broker."""
    method = b"\x15\x00\x01x"
    body = b"\x00\x04MQTT\x05\x02\x00\x1e" + bytes([len(method)]) + method + b"\x00\x06temp-1"
    with dial(gateway.listener(), authority.device("temp-1").credentials) as channel:
        channel.send(bytes([0x10, len(body)]) + body)
        answer = channel.packet()
    assert answer[3] == 0x8C, "bad authentication method"


# --- throttling


def test_failed_logins_are_throttled_for_that_address_and_name_alone(site: Site, start: Start) -> None:
    gateway = start(options={"login_failures": "3"})
    wrong = claim("temp-1", "wrong")
    for _ in range(3):
        gateway.refused(wrong, on="plain", client_id="temp-1")
    assert gateway.count(reason="password") == 3
    # Now not even the right one, from here; others from here come in.
    gateway.refused(gateway.credentials("temp-1"), on="plain", client_id="temp-1")
    gateway.audited(reason="throttled", device="temp-1", address="127.0.0.1")
    gateway.admitted(gateway.credentials("temp-2"), on="plain", client_id="temp-2")
    # From another address the right one does.
    assert _from("127.0.0.2", gateway, "temp-1") == 0


def _from(address: str, gateway: Gateway, device: str, password: str | None = None) -> int:
    """Connect from another address of this machine, by password; return the code of the CONNACK."""
    with socket.create_connection(("127.0.0.1", gateway.ports["plain"]), 5, source_address=(address, 0)) as connection:
        connection.sendall(
            connect_packet(device, username=device, password=password or f"password of {device}", version=4)
        )
        return connection.recv(4)[3]


def test_an_address_that_fails_under_many_names_is_throttled(start: Start) -> None:
    gateway = start(options={"login_failures": "1", "audit_rate": "1000"})
    for number in range(10):
        assert _from("127.0.0.3", gateway, f"guess-{number}") == 5
    assert gateway.count(reason="unknown-device") == 10
    assert _from("127.0.0.3", gateway, "temp-1") == 5
    gateway.audited(reason="throttled", device="temp-1", address="127.0.0.3")
    assert _from("127.0.0.4", gateway, "temp-1") == 0


def test_certificates_are_never_throttled(start: Start, authority: Authority) -> None:
    gateway = start(options={"login_failures": "1"})
    stranger = authority.device("temp-9").credentials
    for _ in range(5):
        gateway.refused(stranger, client_id="temp-9")
        gateway.refused(claim("temp-1", "wrong"), on="password", client_id="temp-1")
    assert gateway.count(reason="throttled", device="temp-1") == 4
    assert gateway.count(reason="unknown-device", device="temp-9") == 5
    gateway.admitted(authority.device("temp-1").credentials, client_id="temp-1")


# --- pre-shared keys


def test_a_pre_shared_key_lets_its_device_in(gateway: Gateway) -> None:
    with PSK(gateway, "psk-1", KEY) as device:
        assert device.connect() == 0
        assert device.subscribe("commands/psk-1/#") == 1
        assert device.subscribe("commands/temp-1/#") == 0x80
        assert device.publish("sensors/psk-1/t", b"1") == b"\x40\x02\x00\x01"
    gateway.audited(action="subscribe", topic="commands/temp-1/#", device="psk-1", reason="not-allowed")


def test_wrong_keys_and_names_get_no_connection(gateway: Gateway) -> None:
    with PSK(gateway, "psk-1", KEY[::-1]) as device:
        assert device.connect() is None
    for name, reason in {"temp-1": "method", "psk-9": "unknown-device", "+": "unknown-device"}.items():
        with PSK(gateway, name, KEY) as device:
            assert device.connect() is None
        gateway.audited(action="connect", reason=reason, device=name)


def _failure(gateway: Gateway, identity: str, version: str) -> list[str]:
    """Shake hands as a device with a wrong key, and return what the server sends: kind and size of each message."""
    command = ["openssl", "s_client", version, *(("-cipher", "PSK") if version == "-tls1_2" else ()), "-msg"]
    command += ["-psk", "f" * 32, "-psk_identity", identity, "-connect", f"127.0.0.1:{gateway.ports['psk']}"]
    done = subprocess.run(command, input=b"", capture_output=True, timeout=DEADLINE, check=False)
    told = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode != 0, told
    alert = re.findall(r"SSL alert number (\d+)", told)
    assert alert, told
    return [*re.findall(r"^<<< .*", told, re.MULTILINE), *alert]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl on this machine: install openssl")
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_a_stranger_does_not_learn_which_names_have_a_key(site: Site, start: Start, version: str) -> None:
    """Neither by the alert nor by the messages before it; who is refused stands in the audit."""
    for name in ("psk-gone", "psk-ended"):
        site.psk[name] = KEY
    site.add("psk-gone", "psk", revoked="superseded")
    site.add("psk-ended", "psk", until=int(time.time()) - 1)
    site.apply()
    gateway = start(listeners=("psk",))
    reasons = {
        "psk-gone": "revoked",
        "psk-ended": "until",
        "temp-1": "method",
        "psk-9": "unknown-device",
        "+": "unknown-device",
        "x" * 65: "unknown-device",
    }
    known = _failure(gateway, "psk-1", version)
    assert known == _failure(gateway, "psk-1", version), "what is compared is always the same"
    for name, reason in reasons.items():
        assert _failure(gateway, name, version) == known, name
        gateway.audited(action="connect", device=name, reason=reason)
    assert gateway.count(device="psk-1") == 0
    with PSK(gateway, "psk-1", KEY) as device:
        assert device.connect() == 0


def test_a_revoked_or_ended_device_gets_no_key(site: Site, gateway: Gateway) -> None:
    site.change("psk-1", until=int(time.time()) - 1)
    with PSK(gateway, "psk-1", KEY) as device:
        assert device.connect() is None
    gateway.audited(reason="until", device="psk-1")
    site.store.revoke("psk-1", "keyCompromise")
    with PSK(gateway, "psk-1", KEY) as device:
        assert device.connect() is None
    gateway.audited(reason="revoked", device="psk-1")


def test_a_key_does_not_open_another_devices_session(gateway: Gateway) -> None:
    """The broker's options for this listener put the identity in place of whatever client id is sent."""
    with PSK(gateway, "psk-1", KEY, client_id="temp-1") as device:
        assert device.connect() == 0
        assert device.publish("sensors/psk-1/t", b"1") == b"\x40\x02\x00\x01"
        assert device.subscribe("commands/temp-1/#") == 0x80
    gateway.audited(action="subscribe", device="psk-1", client_id="psk-1")


def test_the_other_listeners_keep_tls_1_3(gateway: Gateway, authority: Authority) -> None:
    """psk_file would take it from all of them; the plugin's keys do not."""
    answer = enter(gateway.listener(), authority.device("temp-1").credentials, client_id="temp-1")
    assert answer.accepted
    assert answer.tls
    assert "TLS 1.3" in str(answer.tls)


# --- the end of access


def test_access_that_has_ended_is_refused(site: Site, gateway: Gateway, authority: Authority) -> None:
    site.change("temp-1", until=int(time.time()))
    gateway.refused(authority.device("temp-1").credentials, client_id="temp-1")
    gateway.refused(gateway.credentials("temp-1"), on="password", client_id="temp-1")
    assert gateway.count(reason="until", device="temp-1") == 2


def test_a_revoked_device_is_refused_whatever_it_shows(site: Site, gateway: Gateway, authority: Authority) -> None:
    site.store.revoke("temp-1", "cessationOfOperation")
    gateway.refused(authority.device("temp-1").credentials, client_id="temp-1")
    gateway.refused(gateway.credentials("temp-1"), on="password", client_id="temp-1")
    assert gateway.count(reason="revoked", device="temp-1") == 2
    site.store.reinstate("temp-1")
    gateway.admitted(authority.device("temp-1").credentials, client_id="temp-1")


# --- what the audit says


def test_a_name_cannot_write_into_the_log(gateway: Gateway) -> None:
    name = 'x"},\u2028{"bednet":"audit"'
    gateway.refused(claim(name, "x"), on="plain", client_id=name)
    event = gateway.audited(action="connect", device=name)
    assert event["client_id"] == name
    assert all(line.isascii() for line in gateway.text().splitlines() if "audit" in line)


def test_lines_stay_below_what_the_broker_cuts(gateway: Gateway) -> None:
    name = "\u00e4" * 20000
    gateway.refused(claim(name, "x"), on="plain", client_id=name)
    event = gateway.audited(action="connect", reason="unknown-device")
    assert event["device"].startswith("\u00e4\u00e4")
    assert event["device"].endswith("\u2026")
    assert max(len(line) for line in gateway.text().splitlines()) < 1000


def test_the_audit_is_rate_limited_and_says_what_it_left_out(start: Start) -> None:
    gateway = start(options={"audit_rate": "5", "login_failures": "1000"})
    for _ in range(50):
        assert _from("127.0.0.1", gateway, "temp-9") == 5
    assert 1 <= gateway.count() <= 25

    def told() -> bool:
        _from("127.0.0.1", gateway, "temp-8")
        return any(event["device"] == "temp-8" for event in gateway.audit())

    gateway.wait(told, "the next line")
    events = list(gateway.audit())
    first = next(number for number, event in enumerate(events) if event["suppressed"])
    assert events[first]["suppressed"] >= 1
    assert sum(event["suppressed"] for event in events) + len(events) >= 50


def test_a_stranger_s_noise_leaves_lines_for_others(start: Start) -> None:
    """However many names it gives: an address gets a quarter of the lines, its network half of them."""
    gateway = start(options={"audit_rate": "20", "login_failures": "1000"})
    begun = time.monotonic()
    for number in range(200):
        assert _from(f"127.0.0.{1 + number % 50}", gateway, f"guess-{number}") == 5
    assert _from("127.1.0.1", gateway, "other") == 5
    seconds = int(time.monotonic() - begun) + 2
    gateway.audited(device="other", address="127.1.0.1")
    assert gateway.count() - 1 <= 10 * seconds


def test_a_device_s_noise_leaves_lines_for_others(site: Site, start: Start) -> None:
    gateway = start(listeners=("plain",), options={"audit_rate": "20"})
    port, begun = gateway.ports["plain"], time.monotonic()
    with (
        Wire(port, "temp-1", "password of temp-1") as noisy,
        Wire(port, "temp-2", "password of temp-2") as other,
    ):
        assert noisy.connect("127.0.0.1", clean=True) == other.connect("127.0.0.1", clean=True) == (0, False)
        for number in range(500):
            noisy.publish(f"noise/{number}", b"x")
        assert set(noisy.flush().values()) == {0x87}
        refused = other.publish("other/x", b"x")
        assert other.flush()[refused] == 0x87
    gateway.audited(device="temp-2", topic="other/x", reason="not-allowed")
    written = gateway.count(device="temp-1")
    assert written <= 5 * (int(time.monotonic() - begun) + 2)
    assert sum(event["suppressed"] for event in gateway.audit()) == 500 - written


def test_secrets_are_in_no_log(gateway: Gateway) -> None:
    gateway.refused(claim("temp-1", "wrong-but-secret"), on="plain", client_id="temp-1")
    gateway.admitted(gateway.credentials("temp-1"), on="plain", client_id="temp-1")
    gateway.audited(reason="password")
    assert "wrong-but-secret" not in gateway.text()
    assert "password of" not in gateway.text()
