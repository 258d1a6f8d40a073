# SPDX-License-Identifier: Apache-2.0
"""Who is let in with a certificate: the plant's devices, and nobody else, each refused for a reason of its own.

The sharp edges: a certificate refused for the wrong reason (it would be let in once that reason is gone), an
alert that in TLS 1.3 arrives only after the handshake, and a certificate of our own CA whose name is a trap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bednet import probe
from bednet.probe import NOBODY, NOT_AUTHORIZED, Credentials, Listener, Offer, Outcome, Session
from testbed import villains
from testbed.villains import VILLAINS
from tests.live import CONNECT_REFUSED, Audit

if TYPE_CHECKING:
    from bednet.probe import Version
    from tests.conftest import Plant

pytestmark = pytest.mark.lab

GATEWAYS = ["gateway-1", "gateway-2"]
VERSIONS: list[Version] = [4, 5]
REFUSED_BY_TLS = [kind for kind, villain in VILLAINS.items() if villain.purpose == "sslclient" and villain.alert]
LEFT_TO_THE_BROKER = [
    kind for kind, villain in VILLAINS.items() if villain.purpose == "sslclient" and not villain.alert
]


def anything(version: str) -> Offer:
    """Offer this version, and lower our own OpenSSL's guard: it is the gateway that must refuse."""
    return Offer(version, version, ciphers="DEFAULT:@SECLEVEL=0")


@pytest.mark.parametrize("gateway", GATEWAYS)
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_a_device_with_its_certificate_is_let_in(plant: Plant, gateway: str, version: str) -> None:
    answer = probe.enter(plant.mtls(gateway), plant.certificate("temp-101"), offer=Offer(version, version))
    assert answer.accepted, answer
    assert answer.tls is not None
    assert answer.tls.hello is not None
    assert answer.tls.hello.version == version


def test_every_device_of_the_plant_is_let_in_on_every_gateway(plant: Plant) -> None:
    assert len(plant.with_certificate) >= 18
    for gateway in GATEWAYS:
        for device in plant.with_certificate:
            answer = probe.enter(plant.mtls(gateway), plant.certificate(device), version=4)
            assert answer.accepted, f"{device} on {gateway}: {answer}"


@pytest.mark.parametrize(("version", "reason"), [("1.2", "handshake failure"), ("1.3", "certificate required")])
@pytest.mark.parametrize("gateway", GATEWAYS)
def test_no_certificate_is_refused(plant: Plant, gateway: str, version: str, reason: str) -> None:
    seen = probe.handshake(plant.mtls(gateway), NOBODY, offer=Offer(version, version))
    assert (seen.outcome, seen.reason) == (Outcome.ALERT, reason)
    # In TLS 1.2 that alert has many causes; here the gateway had agreed to everything but the certificate.
    assert seen.hello is not None


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("kind", REFUSED_BY_TLS)
def test_a_bad_certificate_is_refused_for_its_own_reason(plant: Plant, kind: str, version: str) -> None:
    seen = probe.handshake(plant.mtls(), plant.villain(kind), offer=anything(version))
    assert (seen.outcome, seen.reason) == (Outcome.ALERT, VILLAINS[kind].alert), VILLAINS[kind].what


@pytest.mark.parametrize("kind", REFUSED_BY_TLS)
def test_a_bad_certificate_is_refused_on_the_second_gateway_too(plant: Plant, kind: str) -> None:
    seen = probe.handshake(plant.mtls("gateway-2"), plant.villain(kind), offer=anything("1.3"))
    assert (seen.outcome, seen.reason) == (Outcome.ALERT, VILLAINS[kind].alert), VILLAINS[kind].what


def test_our_villains_are_refused_for_nothing_but_what_is_wrong_with_them(plant: Plant) -> None:
    """The control: a good certificate made in the same way is let in."""
    good = villains.credential_of(plant.issuing, "temp-101", plant.now())
    answer = probe.enter(plant.mtls(), plant.keep("good", good), offer=anything("1.3"))
    assert answer.accepted, answer


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_a_revoked_certificate_is_refused_as_revoked(plant: Plant, gateway: str) -> None:
    canary = plant.canary()
    for version in ("1.2", "1.3"):
        seen = probe.handshake(plant.mtls(gateway), canary, offer=Offer(version, version))
        assert (seen.outcome, seen.reason) == (Outcome.ALERT, "certificate revoked")


def test_a_revoked_device_has_no_bundle_and_stays_out(plant: Plant) -> None:
    assert plant.site.devices["vib-212"].revoked == "keyCompromise"
    assert not (plant.folder / "vib-212").exists()
    # Were its key not only lost but its revocation too: a new certificate in its name is refused for what it names.
    forged = plant.keep("vib-212", villains.credential_of(plant.issuing, "vib-212", plant.now()))
    refused(plant, forged, "vib-212", reason="revoked", device="vib-212")


def refused(plant: Plant, credentials: Credentials, client_id: str, **audit: str) -> None:
    """See that the broker lets nobody in, in both versions of MQTT, and writes down why."""
    written = Audit(plant.lab.hosts["gateway-1"])
    for version in VERSIONS:
        answer = probe.enter(plant.mtls(), credentials, client_id=client_id, version=version)
        assert (answer.outcome, answer.code) == (Outcome.REFUSED, CONNECT_REFUSED[version]), answer
    written.line(action="connect", client_id=client_id, **audit)


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_a_gateways_own_certificate_is_no_clients(plant: Plant, gateway: str) -> None:
    host = plant.lab.hosts[gateway]
    stolen = plant.keep(
        f"stolen-{gateway}",
        villains.Credential(
            host.read_file("/etc/mosquitto/tls/server.pem"), host.read_file("/etc/mosquitto/tls/server.key")
        ),
    )
    for target in GATEWAYS:
        seen = probe.handshake(plant.mtls(target), stolen)
        assert (seen.outcome, seen.reason) == (Outcome.ALERT, "unsupported certificate")


@pytest.mark.parametrize("kind", [kind for kind in LEFT_TO_THE_BROKER if kind != "other-device"])
def test_a_certificate_of_ours_with_a_trap_for_a_name_opens_nothing(plant: Plant, kind: str) -> None:
    # The name is no device's, whatever the client calls itself.
    refused(plant, plant.villain(kind), "temp-101", reason="unknown-device")


@pytest.mark.parametrize("name", ["line-1", "historian", "tablet-jo", "bednet-probe", "#", "TEMP-101", "temp-101 "])
def test_the_name_in_the_certificate_counts_and_not_what_its_bearer_says(plant: Plant, name: str) -> None:
    own = plant.certificate("temp-101")
    posing = Credentials(own.certificate, own.key, username=name, password="whatever")  # noqa: S106
    refused(plant, posing, name, reason="username", device="temp-101")
    refused(plant, posing, "temp-101", reason="username", device="temp-101")
    refused(plant, own, name, reason="client-id", device="temp-101")


def test_a_certificate_beside_which_its_own_name_is_said_is_let_in(plant: Plant) -> None:
    """The control: it was the name that was refused. The password is nobody's, and nobody asks for it."""
    own = plant.certificate("temp-101")
    same = Credentials(own.certificate, own.key, username="temp-101", password="whatever")  # noqa: S106
    with Session(plant.mtls(), same) as session:
        assert session.publish("commands/plc-1-filler/start", b"1").code == NOT_AUTHORIZED
        assert session.publish("sensors/temp-101/temperature", b"21").granted


def test_a_certificate_and_another_devices_password_are_refused(plant: Plant) -> None:
    own, tablet = plant.certificate("temp-101"), plant.password("tablet-jo")
    both = Credentials(own.certificate, own.key, tablet.username, tablet.password)
    refused(plant, both, "temp-101", reason="username", device="temp-101")
    refused(plant, both, "tablet-jo", reason="username", device="temp-101")


def test_a_certificate_alone_does_not_open_the_password_listener(plant: Plant) -> None:
    answer = probe.enter(plant.passwords(), plant.certificate("temp-101"))
    assert (answer.outcome, answer.code) == (Outcome.REFUSED, NOT_AUTHORIZED)


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_a_password_does_not_open_the_certificate_listener(plant: Plant, gateway: str) -> None:
    answer = probe.enter(plant.mtls(gateway), plant.password("tablet-jo"))
    assert (answer.outcome, answer.reason) == (Outcome.ALERT, "certificate required")


@pytest.mark.parametrize("kind", ["client-as-server", "wrong-ca-server"])
def test_a_device_refuses_a_false_gateway(plant: Plant, kind: str) -> None:
    """What the device checks is the same as what the probe checks: chain, name and purpose."""
    host = plant.lab.hosts["gateway-1"]
    made = villains.make(kind, plant.issuing, now=plant.now(), dns=[host.fqdn], ip=[host.address])
    credentials = plant.keep(kind, made)
    with plant.false_gateway(credentials) as port:
        seen = probe.handshake(Listener("127.0.0.1", port, plant.ca, host.fqdn))
    assert seen.outcome is Outcome.DISTRUSTED
    assert seen.reason == VILLAINS[kind].reason


def test_a_device_that_trusts_another_ca_refuses_our_gateways(plant: Plant) -> None:
    lonely = plant.villain("lonely-ca")
    real = plant.mtls()
    seen = probe.handshake(Listener(real.host, real.port, lonely.certificate, real.server_name))
    assert seen.outcome is Outcome.DISTRUSTED
    assert "unable to get local issuer certificate" in seen.reason


def test_a_gateway_is_refused_under_another_gateways_name(plant: Plant) -> None:
    one, two = plant.mtls("gateway-1"), plant.mtls("gateway-2")
    seen = probe.handshake(Listener(one.host, one.port, plant.ca, two.server_name), plant.certificate("temp-101"))
    assert seen.outcome is Outcome.DISTRUSTED
    assert "Hostname mismatch" in seen.reason
