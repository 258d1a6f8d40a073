# SPDX-License-Identifier: Apache-2.0
"""The listener for pre-shared keys: what it speaks, who gets in, and that the other listeners lose nothing by it.

The sharp edges: a broker with pre-shared keys that speaks no TLS 1.3 anywhere any more, suites without forward secrecy
(most of those with such keys), and an identity that is known but has no key.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest

from bednet import probe
from bednet.probe import NOT_AUTHORIZED, Credentials, Offer, Outcome, Session
from tests.live import Audit, Site, other_site

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Plant

pytestmark = pytest.mark.lab

DEVICE = "level-901"
FOLDER = "/run/psk"
# How OpenSSL refuses a key that is wrong, or an identity without one: in TLS 1.2 only the end of the handshake tells.
REFUSALS = {"decrypt error", "bad record mac", "handshake failure", "unknown psk identity", "illegal parameter"}


@pytest.fixture(scope="module")
def level(plant: Plant) -> Iterator[Credentials]:
    """A device with a pre-shared key, in the store of gateway-1."""
    key = secrets.token_bytes(32)

    def change(site: Site) -> None:
        entry = {"id": DEVICE, "location": "hall-1", "roles": ["sensor"], "authentication": ["psk"]}
        site.devices["devices"].append(entry)

    with other_site(plant, plant.lab.hosts["gateway-1"], change, psk={DEVICE: key.hex()}):
        yield Credentials(psk_identity=DEVICE, psk=key)


@pytest.mark.parametrize(
    ("version", "cipher"), [("1.2", "ECDHE-PSK-CHACHA20-POLY1305"), ("1.3", "TLS_AES_128_GCM_SHA256")]
)
def test_a_device_with_its_key_is_let_in(plant: Plant, level: Credentials, version: str, cipher: str) -> None:
    seen = probe.enter(plant.keys(), level, offer=Offer(version, version))
    assert seen.accepted, seen
    assert seen.tls is not None
    assert seen.tls.hello is not None
    assert (seen.tls.hello.version, seen.tls.hello.cipher) == (version, cipher)


def test_the_other_listeners_still_speak_tls_1_3(plant: Plant, level: Credentials) -> None:
    for there, credentials in (
        (plant.mtls(), plant.certificate("temp-101")),
        (plant.passwords(), plant.password("energy-1")),
    ):
        assert probe.enter(there, credentials, offer=Offer("1.3", "1.3")).accepted
    assert probe.enter(plant.keys(), level).accepted


@pytest.mark.parametrize("version", ["SSL 3.0", "1.0", "1.1"])
def test_an_old_version_of_tls_is_refused(plant: Plant, version: str) -> None:
    suites = [*probe.STRONG_PSK_SUITES, *probe.CBC_PSK_SUITES, *probe.STATIC_PSK_SUITES, *probe.BROKEN_PSK_SUITES]
    seen = probe.hello(plant.keys(), version, suites)
    assert seen.hello is None
    assert (seen.outcome, seen.reason) == (
        Outcome.ALERT,
        "handshake failure" if version == "SSL 3.0" else "protocol version",
    )


def test_of_all_suites_with_pre_shared_keys_only_the_strong_one_is_accepted(plant: Plant) -> None:
    weak = {**probe.CBC_PSK_SUITES, **probe.STATIC_PSK_SUITES, **probe.BROKEN_PSK_SUITES}
    assert len(weak) > 10
    for suite, name in weak.items():
        seen = probe.hello(plant.keys(), "1.2", [suite])
        assert (seen.hello, seen.outcome, seen.reason) == (None, Outcome.ALERT, "handshake failure"), name
    for suite, name in probe.STRONG_PSK_SUITES.items():
        seen = probe.hello(plant.keys(), "1.2", [suite])
        assert seen.hello is not None
        assert seen.hello.cipher == name


def test_there_is_no_certificate_and_no_way_in_without_a_key(plant: Plant) -> None:
    for suite, name in {**probe.STRONG_SUITES, **probe.CBC_SUITES, **probe.STATIC_KEY_SUITES}.items():
        seen = probe.hello(plant.keys(), "1.2", [suite])
        assert (seen.hello, seen.outcome, seen.reason) == (None, Outcome.ALERT, "handshake failure"), name
    for credentials in (plant.certificate("temp-101"), plant.password("energy-1")):
        unchecked = Credentials(credentials.certificate, credentials.key, credentials.username)
        assert probe.enter(plant.keys(), unchecked).outcome is Outcome.ALERT


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_a_wrong_key_is_refused(plant: Plant, level: Credentials, version: str) -> None:
    right = level.psk
    assert right is not None
    wrong_ones = (secrets.token_bytes(32), right[:-1], right + b"\0", right[:-1] + bytes([right[-1] ^ 1]), b"\0" * 16)
    for wrong in wrong_ones:
        seen = probe.enter(plant.keys(), Credentials(psk_identity=DEVICE, psk=wrong), offer=Offer(version, version))
        assert seen.outcome is Outcome.ALERT, seen
        assert seen.reason in REFUSALS
    assert probe.enter(plant.keys(), level, offer=Offer(version, version)).accepted


@pytest.mark.parametrize(
    ("identity", "reason"),
    [("temp-101", "method"), ("energy-1", "method"), ("nobody", "unknown-device"), ("#", "unknown-device")],
)
def test_an_identity_without_a_key_is_refused_and_written_down(
    plant: Plant, level: Credentials, identity: str, reason: str
) -> None:
    audit = Audit(plant.lab.hosts["gateway-1"])
    for version in ("1.2", "1.3"):
        posing = Credentials(psk_identity=identity, psk=level.psk)
        seen = probe.enter(plant.keys(), posing, offer=Offer(version, version))
        assert seen.outcome is Outcome.ALERT, seen
        assert seen.reason in REFUSALS
    audit.line(action="connect", device=identity, reason=reason)


def test_the_key_names_the_client_whatever_it_calls_itself(plant: Plant, level: Credentials) -> None:
    with (
        plant.session("temp-101") as namesake,
        Session(plant.keys(), level, client_id="temp-101") as device,
        plant.session("historian") as historian,
    ):
        historian.subscribe("#")
        assert device.publish(f"sensors/{DEVICE}/level", b"7").granted
        assert device.publish("sensors/temp-101/temperature", b"7").code == NOT_AUTHORIZED
        assert device.subscribe("commands/temp-101/#")[0].code == NOT_AUTHORIZED
        assert [message.payload for message in historian.settle()] == [b"7"]
        namesake.settle()
        assert namesake.goodbye is None


def test_a_stock_client_gets_in_with_its_key(plant: Plant, level: Credentials) -> None:
    """mosquitto_pub, which has identity and key from its configuration file."""
    host, gateway = plant.lab.hosts["devices"], plant.lab.hosts["gateway-1"]
    assert level.psk is not None
    host.exec(["mkdir", "-p", "-m", "0700", FOLDER])
    try:
        with plant.session("historian") as historian:
            historian.subscribe("#")
            for key, heard in ((secrets.token_bytes(32), []), (level.psk, [b"stock"])):
                options = (
                    f"--psk-identity {DEVICE}\n--psk {key.hex()}\n-i {DEVICE}\n--ciphers ECDHE-PSK-CHACHA20-POLY1305\n"
                )
                host.write_file(f"{FOLDER}/mosquitto_pub", options, mode="0600")
                where = ["-h", gateway.address, "-p", "8885", "-q", "1", "-t", f"sensors/{DEVICE}/level"]
                told = host.exec(
                    ["mosquitto_pub", *where, "-m", "stock"],
                    check=False,
                    environment={"XDG_CONFIG_HOME": FOLDER},
                    timeout_s=30,
                )
                assert (told.rc == 0) == bool(heard), told
                assert [message.payload for message in historian.settle()] == heard
    finally:
        host.exec(["rm", "-rf", FOLDER])
