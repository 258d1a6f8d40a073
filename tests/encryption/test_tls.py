# SPDX-License-Identifier: Apache-2.0
"""What the gateways speak: TLS 1.2 and 1.3 with the configured suites and groups, and nothing else.

The sharp edges: a refusal that is our own OpenSSL's and not the gateway's (so the ClientHellos for what is old are made
by hand, and a control shows that the gateway understands them), and the alert "handshake failure", which a gateway also
sends when it has agreed to a weak suite and only then misses a certificate (so what counts is the ServerHello).
"""

from __future__ import annotations

import ssl
import warnings
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from bednet import probe
from bednet.probe import Listener, Offer, Outcome
from tests.verify import brokers

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Plant

pytestmark = pytest.mark.lab

GATEWAYS = ["gateway-1", "gateway-2"]
LISTENERS = ["certificates", "passwords"]
# What the role configures (roles/mosquitto/defaults) and a P-256 server key can use.
TLS12 = {"ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305"}
TLS13 = {"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"}


def listener(plant: Plant, gateway: str, kind: str) -> Listener:
    return plant.mtls(gateway) if kind == "certificates" else plant.passwords(gateway)


def refusal(seen: probe.Handshake, *reasons: str) -> None:
    assert seen.hello is None, f"the gateway chose {seen.hello}"
    assert seen.outcome is Outcome.ALERT, seen
    assert seen.reason in reasons


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_the_plaintext_port_is_closed(plant: Plant, gateway: str) -> None:
    seen = probe.tcp(plant.lab.hosts[gateway].address, 1883)
    assert (seen.outcome, seen.reason) == (Outcome.UNREACHABLE, "connection refused")


@pytest.mark.parametrize("kind", LISTENERS)
@pytest.mark.parametrize("gateway", GATEWAYS)
def test_unencrypted_mqtt_is_not_answered(plant: Plant, gateway: str, kind: str) -> None:
    there = listener(plant, gateway, kind)
    for version in (4, 5):
        seen = probe.enter(Listener(there.host, there.port, tls=False), version=version)
        assert seen.outcome in (Outcome.ALERT, Outcome.CLOSED, Outcome.RESET), seen


@pytest.mark.parametrize("version", ["SSL 3.0", "1.0", "1.1"])
@pytest.mark.parametrize("kind", LISTENERS)
@pytest.mark.parametrize("gateway", GATEWAYS)
def test_an_old_version_of_tls_is_refused(plant: Plant, gateway: str, kind: str, version: str) -> None:
    suites = [*probe.STRONG_SUITES, *probe.CBC_SUITES, *probe.STATIC_KEY_SUITES, *probe.BROKEN_SUITES]
    # SSL 3.0 had no alert of that name yet (RFC 6101 5.4.2).
    reason = "handshake failure" if version == "SSL 3.0" else "protocol version"
    refusal(probe.hello(listener(plant, gateway, kind), version, suites), reason)


@pytest.mark.parametrize("kind", LISTENERS)
def test_a_client_that_speaks_old_and_new_is_not_talked_down(plant: Plant, kind: str) -> None:
    offer = Offer("1.0", "1.2", ciphers="ALL:COMPLEMENTOFALL:@SECLEVEL=0")
    seen = probe.handshake(listener(plant, "gateway-1", kind), plant.certificate("temp-101"), offer=offer)
    assert seen.accepted, seen
    assert seen.hello is not None
    assert seen.hello.version == "1.2"
    assert seen.hello.cipher in TLS12


@pytest.mark.parametrize("kind", LISTENERS)
@pytest.mark.parametrize("gateway", GATEWAYS)
def test_of_all_suites_of_tls_1_2_only_the_configured_ones_are_accepted(plant: Plant, gateway: str, kind: str) -> None:
    names = {number: name for number, name in probe.suite_names().items() if number not in probe.TLS13_SUITES}
    assert len(names) > 150
    there = listener(plant, gateway, kind)
    accepted = set()
    for number, name in names.items():
        seen = probe.hello(there, "1.2", [number])
        if seen.accepted:
            accepted.add(name)
        else:
            refusal(seen, "handshake failure")
    assert accepted == TLS12


@pytest.mark.parametrize("kind", LISTENERS)
@pytest.mark.parametrize("gateway", GATEWAYS)
def test_of_all_suites_of_tls_1_3_only_the_configured_ones_are_accepted(plant: Plant, gateway: str, kind: str) -> None:
    there = listener(plant, gateway, kind)
    accepted = set()
    for number, name in probe.TLS13_SUITES.items():
        seen = probe.hello(there, "1.3", [number])
        if seen.accepted:
            accepted.add(name)
        else:
            refusal(seen, "handshake failure")
    assert accepted == TLS13


@pytest.mark.parametrize(("group", "accepted"), [("prime256v1", True), ("secp384r1", True), ("secp521r1", False)])
@pytest.mark.parametrize("kind", LISTENERS)
def test_only_the_configured_groups_are_accepted(plant: Plant, kind: str, group: str, *, accepted: bool) -> None:
    # In TLS 1.2 the groups offered must hold the curve of the certificate, too (RFC 8422 5.1): 1.3 tells them apart.
    seen = probe.handshake(
        listener(plant, "gateway-1", kind), plant.certificate("temp-101"), offer=Offer("1.3", "1.3", group=group)
    )
    if accepted:
        assert seen.accepted, seen
    else:
        refusal(seen, "handshake failure")


@pytest.mark.parametrize("ours", [Offer("1.0", "1.1", ciphers="ALL:@SECLEVEL=0"), Offer("1.2", "1.2", "AES128-SHA")])
def test_what_is_refused_could_have_been_spoken_by_our_own_openssl(plant: Plant, ours: Offer) -> None:
    """A second opinion: OpenSSL's own client instead of a hand-made hello; the control completes the same handshake."""
    control = in_process_handshake(ours, plant.folder)
    assert control in ("TLSv1.1", "TLSv1.2")
    seen = probe.handshake(plant.mtls(), plant.certificate("temp-101"), offer=ours)
    refusal(seen, "protocol version" if ours.maximum == "1.1" else "handshake failure")


def in_process_handshake(offer: Offer, folder: Path) -> str | None:
    """Let our OpenSSL talk to itself, with its guard down; return the version that they agreed on."""
    place = folder / "in-process"
    place.mkdir(mode=0o700, exist_ok=True)
    pki = brokers.PKI.make(place, brokers.now())
    pki.issue("rsa", brokers.now(), key=rsa.generate_private_key(65537, 2048))
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        server_context.minimum_version = ssl.TLSVersion.TLSv1
    server_context.set_ciphers("ALL:@SECLEVEL=0")
    server_context.load_cert_chain(place / "rsa.pem", place / "rsa.key")
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = probe.tls_context(offer).wrap_bio(back, there)
    server = server_context.wrap_bio(there, back, server_side=True)
    waiting = [client, server]
    for _ in range(10):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                continue
    assert not waiting
    return client.version()


@pytest.mark.parametrize("kind", LISTENERS)
@pytest.mark.parametrize("gateway", GATEWAYS)
def test_the_gateways_certificate_names_it_and_is_good_for_a_server_only(plant: Plant, gateway: str, kind: str) -> None:
    there = listener(plant, gateway, kind)
    seen = probe.handshake(there, plant.certificate("temp-101"))
    assert seen.accepted, seen  # chain and name were checked against what every device trusts
    assert seen.certificate is not None
    certificate = x509.load_der_x509_certificate(seen.certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    host = plant.lab.hosts[gateway]
    assert host.fqdn in names.get_values_for_type(x509.DNSName)
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == [host.address]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_a_device_may_reach_a_gateway_by_its_address(plant: Plant) -> None:
    there = plant.mtls()
    assert probe.enter(Listener(there.host, there.port, plant.ca), plant.certificate("temp-101")).accepted


def test_gateways_do_not_share_a_key(plant: Plant) -> None:
    keys = set()
    for gateway in GATEWAYS:
        seen = probe.handshake(plant.mtls(gateway), plant.certificate("temp-101"))
        assert seen.certificate is not None
        public = x509.load_der_x509_certificate(seen.certificate).public_key()
        keys.add(public.public_numbers() if hasattr(public, "public_numbers") else public)
    assert len(keys) == len(GATEWAYS)
