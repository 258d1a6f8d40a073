# SPDX-License-Identifier: Apache-2.0
"""What the CA's tool signs, keeps, renews, revokes and refuses.

Sharp edges pinned down here: the second at which a renewal is due, a refusal that must leave every file as it was, and
the dry run, which must say what the real run then does.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import io
import json
import os
import subprocess
import sys
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bednet import ca, crl_fetch
from tests.unit.ca_home import START, Home, hash_for, make_ca, make_csr, make_home, small_rsa

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = START + timedelta(days=10)
SECOND, DAY = timedelta(seconds=1), timedelta(days=1)
GATEWAYS = [
    {
        "name": "gateway-1",
        "address": "gateway-1.plant.example",
        "mtls_port": 8883,
        "password_port": 8884,
        "psk_port": 8885,
    }
]
NAMES = {"dns": ["gateway-1.plant.example", "gateway-1"], "ip": ["10.20.0.11"]}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A CA's folder as the role ``ca`` leaves it, for one test."""
    return make_home(tmp_path / "ca")


@pytest.fixture(scope="module")
def gateway_key() -> ca.PrivateKey:
    """A gateway's key; nobody changes it."""
    return ca.make_key("P-256")


def device(name: str, *authentication: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "authentication": list(authentication) or ["certificate"], **more}


def server_request(key: Any, **more: Any) -> dict[str, Any]:
    csr = make_csr(key, "gateway-1", dns=tuple(NAMES["dns"]), ip=tuple(NAMES["ip"]))
    return {"name": "gateway-1", "csr": csr, "days": 90, "renew_before_days": 30, **NAMES, **more}


def load(pem: str | bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.encode() if isinstance(pem, str) else pem)


def serial(pem: str | bytes) -> str:
    return f"{load(pem).serial_number:040x}"


def key_of(thing: Any) -> str:
    """Name the public key of a certificate or private key (they compare by identity in cryptography 38)."""
    return ca.fingerprint(thing.public_key())


def current(home: Home, name: str) -> ca.Entry:
    """The one certificate of a device that is neither revoked nor replaced by a later one."""
    found = [entry for entry in home.entries().values() if entry.id == name and entry.reason is None]
    return max(found, key=lambda entry: entry.not_after)


def refused(home: Home, command: str, request: object, match: str, now: Any = NOW) -> None:
    """Assert that both the run and the dry run refuse, for this reason, and leave every file as it was."""
    before = home.snapshot()
    for check in (True, False):
        with pytest.raises(ca.Refused, match=match) as caught:
            home.run(command, request, now, check=check)
        assert "Cure: " in str(caught.value)
    assert home.snapshot() == before


def sync_request(devices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    base = {"days": 90, "renew_before_days": 30, "revoke_at_most": 1000, "gateways": []}
    return {"devices": devices, **base, **more}


def openssl_verify(home: Home, chain: str, purpose: str, now: Any) -> str:
    """Let openssl judge at a given moment, with our CRL."""
    file = home.path.parent / "chain.pem"
    file.write_text(chain)
    command = ["openssl", "verify", "-purpose", purpose, "-crl_check", "-attime", str(int(now.timestamp()))]
    command += ["-CAfile", str(home.path / "publish/ca.pem"), "-CRLfile", str(home.path / "publish/issuing.crl.pem")]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, check=False, timeout=30)
    return done.stdout + done.stderr


# --- sign-server -----------------------------------------------------------------------------------------------------


def test_server_certificate_has_only_the_powers_of_a_server(home: Home, gateway_key: Any) -> None:
    url = "http://ca.plant.example/issuing.crl"
    answer = home.run("sign-server", server_request(gateway_key, crl_url=url), NOW)
    certificate = load(answer["certificate"])
    extensions = certificate.extensions
    issuing, _ = home.issuer()
    assert certificate.subject.rfc4514_string() == "CN=gateway-1,O=Plant Example"
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca) == (True, False)
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_encipherment
    assert not usage.value.key_cert_sign
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == sorted(NAMES["dns"])
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == NAMES["ip"]
    identifier = issuing.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier == identifier
    assert extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    points = extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    assert points[0].full_name == [x509.UniformResourceIdentifier(url)]
    assert ca.moment(certificate, "not_valid_after") == NOW + 90 * DAY
    assert answer["not_after"] == ca.stamp(NOW + 90 * DAY)
    assert answer["serial"] == serial(answer["certificate"])
    assert answer["chain"] == answer["certificate"] + (home.path / "issuing/issuing.pem").read_text()
    assert answer["ca"] == (home.path / "publish/ca.pem").read_text()
    assert openssl_verify(home, answer["certificate"], "sslserver", NOW).endswith(": OK\n")
    assert "unsuitable certificate purpose" in openssl_verify(home, answer["certificate"], "sslclient", NOW)


def test_server_certificate_for_rsa_key_may_encipher_keys(home: Home) -> None:
    answer = home.run("sign-server", server_request(ca.make_key("RSA-2048")), NOW)
    assert load(answer["certificate"]).extensions.get_extension_for_class(x509.KeyUsage).value.key_encipherment


@pytest.mark.parametrize(
    ("later", "renewed"),
    [(0 * DAY, False), (60 * DAY - SECOND, False), (60 * DAY, True), (60 * DAY + SECOND, True), (200 * DAY, True)],
)
def test_server_certificate_is_renewed_from_the_second_on_that_it_is_due(
    home: Home, gateway_key: Any, later: timedelta, renewed: bool
) -> None:
    first = home.run("sign-server", server_request(gateway_key), NOW)
    home.run("crl", {"days": 7, "refresh_before_days": 2}, NOW + later)
    dry = home.run("sign-server", server_request(gateway_key), NOW + later, check=True)
    again = home.run("sign-server", server_request(gateway_key), NOW + later)
    assert dry["changed"] == again["changed"] == (again["serial"] != first["serial"]) == renewed
    assert dry["certificate"] == (None if renewed else first["certificate"])
    assert home.entries()[first["serial"]].reason is None


def test_server_certificate_for_other_names_is_new_and_the_old_one_stays_good(home: Home, gateway_key: Any) -> None:
    first = home.run("sign-server", server_request(gateway_key), NOW)
    csr = make_csr(gateway_key, "gateway-1", dns=("gateway-1",))
    second = home.run("sign-server", server_request(gateway_key, csr=csr, dns=["gateway-1"], ip=[]), NOW)
    assert second["changed"]
    assert first["serial"] != second["serial"]
    assert home.listed() == {}


def test_a_gateway_does_not_get_the_names_of_another_one(home: Home, gateway_key: Any) -> None:
    home.run("sign-server", server_request(gateway_key), NOW)
    with pytest.raises(ca.Refused, match=r"gateway-2 asks for DNS:.*which the certificate of gateway-1 has"):
        home.run("sign-server", server_request(ca.make_key("P-256"), name="gateway-2"), NOW)


def test_the_names_of_a_gateway_that_left_are_free_again(home: Home, gateway_key: Any) -> None:
    first = home.run("sign-server", server_request(gateway_key), NOW)
    answer = home.run("sync-devices", sync_request([], servers=["gateway-2"]), NOW)
    assert answer["revoked"] == [{"id": "gateway-1", "serial": first["serial"], "reason": "cessationOfOperation"}]
    assert home.run("sign-server", server_request(ca.make_key("P-256"), name="gateway-2"), NOW)["changed"]


def test_a_gateway_that_stays_keeps_its_certificate(home: Home, gateway_key: Any) -> None:
    home.run("sign-server", server_request(gateway_key), NOW)
    home.run("sync-devices", sync_request([], servers=["gateway-1"]), NOW)
    assert not home.run("sign-server", server_request(gateway_key), NOW)["changed"]


def test_server_certificate_of_a_replaced_key_is_revoked_as_superseded(home: Home, gateway_key: Any) -> None:
    first = home.run("sign-server", server_request(gateway_key), NOW)
    second = home.run("sign-server", server_request(ca.make_key("P-256")), NOW)
    assert home.listed() == {first["serial"]: "superseded"}
    assert "certificate revoked" in openssl_verify(home, first["certificate"], "sslserver", NOW)
    assert openssl_verify(home, second["certificate"], "sslserver", NOW).endswith(": OK\n")


@pytest.mark.parametrize(
    ("dns", "ip", "match"),
    [
        (["gateway-1.elsewhere.example"], [], "DNS name gateway-1.elsewhere.example is outside the name constraints"),
        (["badplant.example"], [], "DNS name badplant.example is outside"),
        (["gw.office.plant.example"], [], "DNS name gw.office.plant.example is outside"),
        (["gateway-1"], ["10.21.0.1"], "IP address 10.21.0.1 is outside"),
        (["gateway-1"], ["fd00::1"], "IP address fd00::1 is outside"),
        (["*.plant.example"], [], "is not a host name"),
        (["gateway-1."], [], "is not a host name"),
        ([], [], "no DNS name and no IP address"),
        (["gateway-1"], ["10.20.0.300"], "10.20.0.300"),
        (["gateway-1"], ["10.20.0.0/24"], "10.20.0.0/24"),
    ],
)
def test_server_names_that_clients_would_refuse_are_refused(
    home: Home, gateway_key: Any, dns: list[str], ip: list[str], match: str
) -> None:
    good_ip = tuple(address for address in ip if "/" not in address and "300" not in address)
    csr = make_csr(gateway_key, "gateway-1", dns=tuple(dns), ip=good_ip)
    refused(home, "sign-server", server_request(gateway_key, csr=csr, dns=dns, ip=ip), match)


def test_server_name_with_a_dot_counts_as_dns_name_when_there_is_no_other(home: Home, gateway_key: Any) -> None:
    csr = make_csr(gateway_key, None, ip=("10.20.0.11",))
    request = server_request(gateway_key, csr=csr, dns=[], ip=["10.20.0.11"])
    refused(home, "sign-server", {**request, "name": "gw.elsewhere.example"}, "gw.elsewhere.example is outside")
    answer = home.run("sign-server", {**request, "name": "gw.plant.example"}, NOW)
    assert openssl_verify(home, answer["certificate"], "sslserver", NOW).endswith(": OK\n")


def test_ca_without_name_constraints_signs_any_name(tmp_path: Path, gateway_key: Any) -> None:
    home = make_home(tmp_path / "ca", constraints=None)
    csr = make_csr(gateway_key, None, dns=("gateway.elsewhere.example",))
    request = server_request(gateway_key, csr=csr, dns=["gateway.elsewhere.example"], ip=[])
    assert home.run("sign-server", request, NOW)["changed"]


def test_subject_outside_directory_name_constraint_is_refused(tmp_path: Path, gateway_key: Any) -> None:
    other = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Other Plant")])
    ours = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Plant Example")])
    for name, good in ((other, False), (ours, True)):
        constraints = x509.NameConstraints([x509.DirectoryName(name)], None)
        home = make_home(tmp_path / str(good), constraints=constraints)
        if good:
            assert home.run("sign-server", server_request(gateway_key), NOW)["changed"]
        else:
            refused(home, "sign-server", server_request(gateway_key), "subject .*O=Plant Example is outside")


@pytest.mark.parametrize(
    ("dns", "ip"),
    [
        (("gateway-1",), ("10.20.0.11",)),
        (("gateway-1", "gateway-1.plant.example", "extra.plant.example"), ("10.20.0.11",)),
        (("gateway-1", "gateway-1.plant.example"), ()),
        ((), ()),
    ],
)
def test_server_csr_for_other_names_than_the_request_is_refused(
    home: Home, gateway_key: Any, dns: tuple[str, ...], ip: tuple[str, ...]
) -> None:
    csr = make_csr(gateway_key, "gateway-1", dns=dns, ip=ip)
    refused(
        home, "sign-server", server_request(gateway_key, csr=csr), "the CSR of gateway-1 is for .*, the request for"
    )


def test_server_csr_with_an_e_mail_address_is_refused(home: Home, gateway_key: Any) -> None:
    names = [x509.DNSName("gateway-1"), x509.RFC822Name("root@plant.example")]
    csr = make_csr(gateway_key, None, extensions=(x509.SubjectAlternativeName(names),))
    request = server_request(gateway_key, csr=csr, dns=["gateway-1"], ip=[])
    refused(home, "sign-server", request, "RFC822Name:root@plant.example")


def test_server_name_that_no_cn_can_hold_is_refused(home: Home, gateway_key: Any) -> None:
    for name in ("g" * 65, "", "gateway/1", "gateway\n1"):
        refused(home, "sign-server", {**server_request(gateway_key), "name": name}, "cannot be a gateway's name")


def test_server_lifetime_that_would_renew_at_every_run_is_refused(home: Home, gateway_key: Any) -> None:
    refused(home, "sign-server", server_request(gateway_key, renew_before_days=90), "every run would issue anew")


# --- keys in CSRs ----------------------------------------------------------------------------------------------------

BAD_KEYS: dict[str, Callable[[], Any]] = {
    "RSA-1024": lambda: small_rsa(1024),
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    "Ed448": ed448.Ed448PrivateKey.generate,
    "DSA": lambda: dsa.generate_private_key(2048),
}


@pytest.mark.parametrize("kind", sorted(BAD_KEYS))
def test_csr_with_unsuitable_key_is_refused_by_name(home: Home, kind: str) -> None:
    key = BAD_KEYS[kind]()
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    digest = None if kind == "Ed448" else hash_for(key)
    csr = builder.sign(key, digest).public_bytes(Encoding.PEM).decode()
    match = f"the CSR of temp-1 has a key of type {kind}"
    refused(home, "sync-devices", sync_request([device("temp-1", enrolment="csr", csr=csr)]), match)
    refused(home, "probe", {"csr": csr}, f"the CSR of bednet-probe has a key of type {kind}")


@pytest.mark.parametrize("kind", ["P-256", "P-384", "RSA-2048", "Ed25519"])
def test_csr_with_suitable_key_is_signed(home: Home, kind: str) -> None:
    key = ca.make_key(kind)
    home.sync([device("temp-1", enrolment="csr", csr=make_csr(key, "temp-1"))], NOW)
    pem = (home.path / "bundles/temp-1/certificate.pem").read_text()
    assert ca.key_name(load(pem).public_key()) == kind
    assert openssl_verify(home, pem, "sslclient", NOW).endswith(": OK\n")
    assert not (home.path / "bundles/temp-1/key.pem").exists()


def test_csr_that_its_key_did_not_sign_is_refused(home: Home) -> None:
    der = bytearray(
        x509.load_pem_x509_csr(make_csr(ca.make_key("Ed25519"), "temp-1").encode()).public_bytes(Encoding.DER)
    )
    der[-1] ^= 1
    csr = f"-----BEGIN CERTIFICATE REQUEST-----\n{base64.encodebytes(der).decode()}-----END CERTIFICATE REQUEST-----\n"
    request = sync_request([device("temp-1", enrolment="csr", csr=csr)])
    refused(home, "sync-devices", request, "is not signed with its own key")


def test_csr_that_is_none_is_refused(home: Home) -> None:
    request = sync_request([device("temp-1", enrolment="csr", csr="-----BEGIN NONSENSE-----")])
    refused(home, "sync-devices", request, "the CSR of temp-1 cannot be read")


def test_csr_for_another_device_is_refused(home: Home) -> None:
    key = ca.make_key("P-256")
    two = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in ("temp-1", "plc-1")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(two)
    for csr in (make_csr(key, "plc-1"), builder.sign(key, hash_for(key)).public_bytes(Encoding.PEM).decode()):
        request = sync_request([device("temp-1", enrolment="csr", csr=csr)])
        refused(home, "sync-devices", request, "the CSR of temp-1 is for .*'plc-1'")
    refused(home, "probe", {"csr": make_csr(key, "temp-1")}, "the CSR of bednet-probe is for 'temp-1'")


@pytest.mark.parametrize("empty", [True, False])
def test_csr_without_a_name_is_signed_for_its_device(home: Home, empty: bool) -> None:
    key = ca.make_key("P-256")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about the empty CN
        try:
            names = [x509.NameAttribute(NameOID.COMMON_NAME, "", _validate=False)] if empty else []
        except (TypeError, ValueError):
            pytest.skip("this cryptography cannot make an empty CN")
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names))
        csr = builder.sign(key, hash_for(key)).public_bytes(Encoding.PEM).decode()
    home.sync([device("temp-1", enrolment="csr", csr=csr)], NOW)
    pem = (home.path / "bundles/temp-1/certificate.pem").read_bytes()
    assert load(pem).subject.rfc4514_string() == "CN=temp-1,O=Plant Example"


def test_nothing_but_the_key_is_taken_from_a_device_csr(home: Home) -> None:
    wishes = (
        x509.BasicConstraints(ca=True, path_length=None),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.SubjectAlternativeName([x509.DNSName("gateway-1")]),
    )
    key = ca.make_key("P-256")
    home.sync([device("temp-1", enrolment="csr", csr=make_csr(key, "temp-1", extensions=wishes))], NOW)
    certificate = load((home.path / "bundles/temp-1/certificate.pem").read_bytes())
    extensions = certificate.extensions
    assert key_of(certificate) == key_of(key)
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    with pytest.raises(x509.ExtensionNotFound):
        extensions.get_extension_for_class(x509.SubjectAlternativeName)


def test_one_key_serves_one_identity(home: Home, gateway_key: Any) -> None:
    key = ca.make_key("P-256")
    both = [device(name, enrolment="csr", csr=make_csr(key, None)) for name in ("temp-1", "temp-2")]
    refused(home, "sync-devices", sync_request(both), "the CSRs of temp-1 and temp-2 have the same key")
    home.sync(both[:1], NOW)
    refused(home, "sync-devices", sync_request(both), "the key in the CSR of temp-2 belongs to temp-1")
    refused(home, "sign-server", server_request(key), "the key in the CSR of gateway-1 belongs to temp-1")
    home.run("sign-server", server_request(gateway_key), NOW)
    thief = device("temp-3", enrolment="csr", csr=make_csr(gateway_key, None))
    refused(home, "sync-devices", sync_request([*both[:1], thief]), "temp-3 belongs to gateway-1")


def test_renamed_device_keeps_its_key(home: Home) -> None:
    key = ca.make_key("P-256")
    home.sync([device("temp-1", enrolment="csr", csr=make_csr(key, None))], NOW)
    answer = home.sync([device("temp-2", enrolment="csr", csr=make_csr(key, None))], NOW)
    assert (answer["removed"], answer["issued"]) == (["temp-1"], ["temp-2"])


# --- sync-devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["P-256", "P-384", "RSA-2048", "Ed25519"])
def test_bundle_has_what_a_device_needs(tmp_path: Path, kind: str) -> None:
    home = make_home(tmp_path / "ca", key_type=kind)
    devices = [device("temp-1", "certificate", "password", "psk")]
    answer = home.sync(devices, NOW, key_type=kind, gateways=GATEWAYS)
    bundle = home.path / "bundles/temp-1"
    assert answer["bundles"] == str(home.path / "bundles")
    assert {file.name for file in bundle.iterdir()} == {
        "key.pem", "certificate.pem", "ca.pem", "password", "psk", "client.json", "README.txt",
    }  # fmt: skip
    for folder in (home.path / "bundles", bundle):
        assert folder.stat().st_mode & 0o777 == 0o700
    for file in [*bundle.iterdir(), home.path / "state/passwords.json", home.path / "state/index.json"]:
        assert file.stat().st_mode & 0o777 == 0o600
    chain = (bundle / "certificate.pem").read_text()
    key = load_pem_private_key((bundle / "key.pem").read_bytes(), password=None)
    assert key_of(key) == key_of(load(chain))
    assert ca.key_name(key.public_key()) == kind
    assert chain.endswith((home.path / "issuing/issuing.pem").read_text())
    assert openssl_verify(home, chain, "sslclient", NOW).endswith(": OK\n")
    assert "unsuitable certificate purpose" in openssl_verify(home, chain, "sslserver", NOW)
    assert load(chain).subject.rfc4514_string() == "CN=temp-1,O=Plant Example"
    assert json.loads((bundle / "client.json").read_text()) == {
        "id": "temp-1",
        "authentication": ["certificate", "password", "psk"],
        "psk_identity": "temp-1",
        "gateways": GATEWAYS,
    }
    text = (bundle / "README.txt").read_text()
    for part in (
        "gateway-1.plant.example:8883",
        "gateway-1.plant.example:8884",
        "gateway-1.plant.example:8885",
        "identity temp-1, the key is the content of the file psk",
        "The client id must be temp-1.",
        "made by the CA and travels",
        "delete",
    ):
        assert part in text


def test_a_device_password_is_in_its_bundle_and_nowhere_else(home: Home) -> None:
    home.sync([device("temp-1", "password")], NOW)
    password = (home.path / "bundles/temp-1/password").read_text().strip()
    holders = [
        str(file.relative_to(home.path))
        for file in home.path.rglob("*")
        if file.is_file() and password in file.read_text(errors="replace")
    ]
    assert holders == ["bundles/temp-1/password"]


def test_a_site_without_a_password_listener_is_no_reason_to_refuse(home: Home) -> None:
    request = sync_request([device("temp-1", "certificate", "password", "psk")])
    request["gateways"] = [{"name": "gateway-1", "address": "192.0.2.11", "mtls_port": 8883, "password_port": None}]
    ca.run("sync-devices", request, home=home.path, now=NOW)
    text = (home.path / "bundles/temp-1/README.txt").read_text()
    assert "With its password, over TLS: no gateway" in text
    assert "With its pre-shared key, over TLS: no gateway" in text


def test_a_pre_shared_key_is_kept_for_the_gateways_and_readable_by_nobody_else(home: Home) -> None:
    devices = [device("temp-1", "psk"), device("temp-2", "psk", "certificate"), device("plc-1", "password")]
    answer = home.sync(devices, NOW, gateways=GATEWAYS)
    assert list(answer["psk"]) == ["temp-1", "temp-2", "bednet-probe"]
    keys = {name: (home.path / f"bundles/{name}/psk").read_text() for name in ("temp-1", "temp-2")}
    assert keys == {name: answer["psk"][name] for name in keys}
    assert all(len(bytes.fromhex(key)) == 32 for key in keys.values())
    assert len(set(answer["psk"].values())) == 3
    holders = [
        (str(file.relative_to(home.path)), file.stat().st_mode & 0o777)
        for file in home.path.rglob("*")
        if file.is_file() and keys["temp-1"] in file.read_text(errors="replace")
    ]
    assert sorted(holders) == [("bundles/temp-1/psk", 0o600), ("state/passwords.json", 0o600)]
    assert {file.name for file in (home.path / "bundles/temp-1").iterdir()} == {
        "psk", "ca.pem", "client.json", "README.txt",
    }  # fmt: skip
    # A gateway that comes later is given the same keys.
    assert home.sync(devices, NOW + DAY, gateways=GATEWAYS)["changed"] is False
    assert home.run("sign-server", server_request(ca.make_key("P-256")), NOW + DAY)["psk"] == answer["psk"]
    assert home.run("probe", {"csr": make_csr(ca.make_key("P-256"), None)}, NOW)["psk"] == answer["psk"]["bednet-probe"]


def test_device_without_psk_authentication_loses_its_key_only(home: Home) -> None:
    home.sync([device("temp-1", "certificate", "psk")], NOW)
    answer = home.sync([device("temp-1")], NOW, revoke_at_most=0)
    assert (answer["revoked"], answer["withdrawn"], list(answer["psk"])) == ([], ["temp-1"], ["bednet-probe"])
    assert not (home.path / "bundles/temp-1/psk").exists()
    assert (home.path / "bundles/temp-1/key.pem").exists()


def test_gateways_are_told_the_hashes_and_every_revoked_serial_number(home: Home, gateway_key: Any) -> None:
    home.sync([device("temp-1", "certificate", "password"), device("temp-2")], NOW)
    old = current(home, "temp-1")
    home.sync([device("temp-1", "certificate", "password", revoked="superseded"), device("temp-2")], NOW)
    told = home.run("sign-server", server_request(gateway_key), NOW)
    assert list(told["passwords"]) == ["bednet-probe"]
    assert told["password_file"] == f"bednet-probe:{told['passwords']['bednet-probe']}\n"
    canary = next(entry for entry in home.entries().values() if entry.kind == "canary")
    assert told["revoked_serials"] == {old.serial: "superseded", canary.serial: "cessationOfOperation"}
    # A key of its own instead: the old server certificate is revoked. They are told exactly what the CRL says.
    again = home.run("sign-server", server_request(ca.make_key("P-256")), NOW)
    server = next(entry for entry in home.entries().values() if entry.kind == "server" and entry.reason)
    assert again["revoked_serials"] == {**told["revoked_serials"], server.serial: "superseded"}
    assert crl_fetch.serials(again["crl"].encode(), ca=again["ca"].encode()) == {
        "crl_number": again["crl_number"],
        "revoked_serials": again["revoked_serials"],
    }
    later = home.run("sign-server", server_request(gateway_key), NOW + 91 * DAY)
    assert old.serial not in later["revoked_serials"]


def test_password_file_has_the_hashes_that_mosquitto_expects(home: Home) -> None:
    devices = [device("temp-2", "password"), device("temp-1", "password", "certificate"), device("plc-1")]
    text = home.sync(devices, NOW)["password_file"]
    assert home.sync(devices, NOW + DAY)["password_file"] == text
    lines = dict(line.split(":") for line in text.splitlines())
    assert list(lines) == ["bednet-probe", "temp-1", "temp-2"]
    for name in ("temp-1", "temp-2"):
        password = (home.path / f"bundles/{name}/password").read_text()
        assert len(base64.urlsafe_b64decode(password + "=")) == 32
        _, kind, iterations, salt, digest = lines[name].split("$")
        assert (kind, iterations, len(base64.b64decode(salt))) == ("7", "101", 12)
        expected = hashlib.pbkdf2_hmac("sha512", password.encode(), base64.b64decode(salt), 101)
        assert base64.b64decode(digest) == expected


def test_second_run_changes_nothing(home: Home) -> None:
    devices = [device("temp-1"), device("temp-2", "password"), device("plc-1", enrolment="csr")]
    first = home.sync(devices, NOW, gateways=GATEWAYS)
    before = {file: file.stat().st_mtime_ns for file in home.path.rglob("*")}
    second = home.sync(devices, NOW + DAY, gateways=GATEWAYS)
    assert (first["changed"], second["changed"]) == (True, False)
    assert first["issued"] == ["temp-1"]
    assert first["waiting"] == second["waiting"] == ["plc-1"]
    assert second["issued"] == second["renewed"] == second["revoked"] == second["removed"] == []
    assert {file: file.stat().st_mtime_ns for file in home.path.rglob("*")} == before


def test_dry_run_tells_the_truth_and_writes_nothing(home: Home) -> None:
    steps = [
        [device("temp-1"), device("temp-2", "password")],
        [device("temp-1"), device("temp-2", "password")],
        [device("temp-1", revoked="keyCompromise"), device("temp-3")],
        [device("temp-1"), device("temp-3", "password")],
        [device("temp-1"), device("temp-3", "password")],
        [],
        [],
    ]
    told = []
    for devices in steps:
        before = home.snapshot()
        dry = home.sync(devices, NOW, check=True)
        assert home.snapshot() == before
        real = home.sync(devices, NOW)
        for part in ("changed", "issued", "renewed", "revoked", "waiting", "removed"):
            assert dry[part] == real[part], (devices, part)
        told.append(dry["changed"])
    assert told == [True, False, True, True, False, True, False]


def test_bundle_is_rewritten_only_when_its_content_changes(home: Home) -> None:
    home.sync([device("temp-1")], NOW, gateways=GATEWAYS)
    bundle = home.path / "bundles/temp-1"
    before = {file.name: file.stat().st_ino for file in bundle.iterdir()}
    answer = home.sync([device("temp-1")], NOW, gateways=[{**GATEWAYS[0], "mtls_port": 18883}])
    assert answer["changed"]
    assert not answer["renewed"]
    after = {file.name: file.stat().st_ino for file in bundle.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"client.json", "README.txt"}


@pytest.mark.parametrize(
    ("later", "renewed"), [(60 * DAY - SECOND, False), (60 * DAY, True), (60 * DAY + SECOND, True), (91 * DAY, True)]
)
def test_device_certificate_is_renewed_from_the_second_on_that_it_is_due(
    home: Home, later: timedelta, renewed: bool
) -> None:
    home.sync([device("temp-1")], NOW)
    before = current(home, "temp-1")
    answer = home.sync([device("temp-1")], NOW + later)
    assert answer["renewed"] == (["temp-1"] if renewed else [])
    assert answer["issued"] == answer["revoked"] == []
    after = current(home, "temp-1")
    assert (after.serial != before.serial) == (after.key != before.key) == renewed
    # The device goes on with the old one until it has picked up the new bundle.
    assert home.entries()[before.serial].reason is None


def test_device_key_stays_when_its_csr_is_renewed(home: Home) -> None:
    devices = [device("temp-1", enrolment="csr", csr=make_csr(ca.make_key("P-256"), "temp-1"))]
    assert home.sync(devices, NOW)["issued"] == ["temp-1"]
    before = current(home, "temp-1")
    assert home.sync(devices, NOW + 60 * DAY)["renewed"] == ["temp-1"]
    assert current(home, "temp-1").key == before.key
    assert current(home, "temp-1").serial != before.serial


def test_new_csr_supersedes_the_certificate_of_the_old_key(home: Home) -> None:
    home.sync([device("temp-1", enrolment="csr", csr=make_csr(ca.make_key("P-256"), "temp-1"))], NOW)
    old = current(home, "temp-1")
    devices = [device("temp-1", enrolment="csr", csr=make_csr(ca.make_key("P-384"), "temp-1"))]
    answer = home.sync(devices, NOW)
    assert answer["revoked"] == [{"id": "temp-1", "serial": old.serial, "reason": "superseded"}]
    assert answer["issued"] == ["temp-1"]
    assert home.listed()[old.serial] == "superseded"


def test_csr_that_is_late_or_gone_takes_nothing_away(home: Home) -> None:
    home.sync([device("temp-1")], NOW)
    old = current(home, "temp-1")
    answer = home.sync([device("temp-1", enrolment="csr")], NOW)
    assert (answer["waiting"], answer["revoked"], answer["changed"]) == (["temp-1"], [], False)
    answer = home.sync([device("temp-1", enrolment="csr", csr=make_csr(ca.make_key("P-256"), "temp-1"))], NOW)
    assert answer["revoked"] == [{"id": "temp-1", "serial": old.serial, "reason": "superseded"}]
    assert not (home.path / "bundles/temp-1/key.pem").exists()
    new = current(home, "temp-1")
    assert home.sync([device("temp-1", enrolment="csr")], NOW)["changed"] is False
    answer = home.sync([device("temp-1")], NOW)
    assert answer["revoked"] == [{"id": "temp-1", "serial": new.serial, "reason": "superseded"}]
    assert (home.path / "bundles/temp-1/key.pem").exists()


@pytest.mark.parametrize("reason", ca.REASONS)
def test_revoked_device_loses_everything(home: Home, reason: str) -> None:
    home.sync([device("temp-1", "certificate", "password", "psk"), device("temp-2")], NOW)
    home.sync([device("temp-1", "certificate", "password", "psk"), device("temp-2")], NOW + 60 * DAY)  # a second one
    serials = {entry.serial for entry in home.entries().values() if entry.id == "temp-1"}
    assert len(serials) == 2
    chain = (home.path / "bundles/temp-1/certificate.pem").read_text()
    later = NOW + 61 * DAY
    devices = [device("temp-1", "certificate", "password", "psk", revoked=reason), device("temp-2")]
    answer = home.sync(devices, later)
    assert answer["withdrawn"] == ["temp-1"]
    assert {item["serial"] for item in answer["revoked"]} == serials
    assert {(item["id"], item["reason"]) for item in answer["revoked"]} == {("temp-1", reason)}
    assert {home.listed()[number] for number in serials} == {reason}
    assert "certificate revoked" in openssl_verify(home, chain, "sslclient", later)
    assert "temp-1:" not in answer["password_file"]
    assert "temp-1" not in (home.path / "state/passwords.json").read_text()
    assert not (home.path / "bundles/temp-1").exists()
    assert home.sync(devices, later)["changed"] is False
    for revoked in home.crl():
        if f"{revoked.serial_number:040x}" in serials:
            # RFC 5280 5.3.1: unspecified is said by leaving the reason out.
            assert len(revoked.extensions) == (0 if reason == "unspecified" else 1)


@pytest.mark.parametrize("reason", ca.REASONS)
def test_revoking_one_device_does_what_a_sync_does(home: Home, reason: str) -> None:
    ways = ("certificate", "password", "psk")
    home.sync([device("temp-1", *ways), device("temp-2", *ways)], NOW)
    old, before = current(home, "temp-1"), home.snapshot()
    dry = home.run("revoke", {"id": "temp-1", "reason": reason}, NOW, check=True)
    assert home.snapshot() == before
    answer = home.run("revoke", {"id": "temp-1", "reason": reason}, NOW)
    for told in (dry, answer):
        assert (told["changed"], told["withdrawn"]) == (True, ["temp-1"])
        assert told["revoked"] == [{"id": "temp-1", "serial": old.serial, "reason": reason}]
    assert answer["revoked_serials"][old.serial] == reason
    assert x509.load_pem_x509_crl(answer["crl"].encode()) == home.crl()
    assert home.listed()[old.serial] == reason
    assert "temp-1" not in (home.path / "state/passwords.json").read_text()
    assert not (home.path / "bundles/temp-1").exists()
    assert {file.name for file in (home.path / "bundles/temp-2").iterdir()} >= {"key.pem", "password", "psk"}
    assert home.run("revoke", {"id": "temp-1", "reason": reason}, NOW)["changed"] is False
    listed = [device("temp-1", *ways, revoked=reason), device("temp-2", *ways)]
    assert home.sync(listed, NOW, revoke_at_most=0)["changed"] is False


def test_revoking_again_makes_it_worse_but_never_better(home: Home) -> None:
    home.sync([device("temp-1")], NOW)
    old = current(home, "temp-1")
    for reason, now_listed in (
        ("superseded", "superseded"),
        ("keyCompromise", "keyCompromise"),
        ("superseded", "keyCompromise"),
    ):
        home.run("revoke", {"id": "temp-1", "reason": reason}, NOW)
        assert home.listed()[old.serial] == now_listed


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({"id": "bednet-probe", "reason": "superseded"}, "'bednet-probe' cannot be a device's id"),
        ({"id": "temp/1", "reason": "superseded"}, "'temp/1' cannot be a device's id"),
        ({"id": "temp-1", "reason": "removeFromCRL"}, "revoked must be one of unspecified, keyCompromise"),
        ({"id": "temp-1"}, 'lacks "reason"'),
        ({"id": "temp-1", "reason": "superseded", "force": True}, "unknown fields: force"),
    ],
)
def test_a_revocation_that_cannot_be_is_refused(home: Home, request_: dict[str, Any], match: str) -> None:
    home.sync([device("temp-1")], NOW)
    refused(home, "revoke", request_, match)


def test_revoking_a_device_that_never_had_anything_changes_nothing(home: Home) -> None:
    home.sync([device("temp-1")], NOW)
    assert home.run("revoke", {"id": "vib-113", "reason": "keyCompromise"}, NOW)["changed"] is False


def test_device_no_longer_listed_loses_everything(home: Home) -> None:
    home.sync([device("temp-1", "certificate", "password"), device("temp-2", "password")], NOW)
    old = current(home, "temp-1")
    answer = home.sync([], NOW)
    assert answer["removed"] == ["temp-1", "temp-2"]
    assert answer["revoked"] == [{"id": "temp-1", "serial": old.serial, "reason": "cessationOfOperation"}]
    assert answer["password_file"].startswith("bednet-probe:")
    assert answer["password_file"].count("\n") == 1
    assert list((home.path / "bundles").iterdir()) == []


def test_device_without_certificate_authentication_loses_its_certificate_only(home: Home) -> None:
    first = home.sync([device("temp-1", "certificate", "password")], NOW)
    old = current(home, "temp-1")
    answer = home.sync([device("temp-1", "password")], NOW)
    assert answer["revoked"] == [{"id": "temp-1", "serial": old.serial, "reason": "cessationOfOperation"}]
    assert answer["password_file"] == first["password_file"]
    left = {file.name for file in (home.path / "bundles/temp-1").iterdir()}
    assert left == {"ca.pem", "password", "client.json", "README.txt"}


def test_device_without_password_authentication_loses_its_password_only(home: Home) -> None:
    home.sync([device("temp-1", "certificate", "password")], NOW)
    answer = home.sync([device("temp-1")], NOW)
    assert (answer["revoked"], answer["changed"]) == ([], True)
    assert "temp-1:" not in answer["password_file"]
    assert not (home.path / "bundles/temp-1/password").exists()
    assert (home.path / "bundles/temp-1/key.pem").exists()


def test_more_revocations_than_allowed_at_once_are_refused(home: Home) -> None:
    devices = [device("temp-1"), device("temp-2", "psk"), device("temp-3"), device("plc-1")]
    home.sync(devices, NOW)
    left = [device("temp-3", revoked="superseded"), device("plc-1", "password")]
    request = sync_request(left, revoke_at_most=3)
    refused(
        home, "sync-devices", request, r"revoke 4 devices at once \(plc-1, temp-1, temp-2, temp-3\).*raise revoke_at_m"
    )
    assert home.sync(left, NOW, revoke_at_most=4)["changed"]
    # What is revoked already does not count again.
    assert home.sync(left, NOW, revoke_at_most=0)["changed"] is False


def test_replaced_keys_count_as_revocations(home: Home) -> None:
    home.sync([device("temp-1", enrolment="csr", csr=make_csr(ca.make_key("P-256"), "temp-1"))], NOW)
    devices = [device("temp-1", enrolment="csr", csr=make_csr(ca.make_key("P-256"), "temp-1"))]
    refused(home, "sync-devices", sync_request(devices, revoke_at_most=0), r"revoke 1 devices at once \(temp-1\)")


def test_reinstated_device_gets_a_new_key_and_password(home: Home) -> None:
    devices = [device("temp-1", "certificate", "password", "psk")]
    first = home.sync(devices, NOW)
    old = current(home, "temp-1")
    home.sync([device("temp-1", "certificate", "password", "psk", revoked="superseded")], NOW)
    again = home.sync(devices, NOW)
    assert again["issued"] == ["temp-1"]
    assert current(home, "temp-1").key != old.key
    assert home.listed()[old.serial] == "superseded"
    assert again["password_file"] != first["password_file"]
    assert again["psk"]["temp-1"] != first["psk"]["temp-1"]


def test_compromised_key_is_refused_for_ever_and_everywhere(home: Home) -> None:
    key = ca.make_key("P-256")
    csr = make_csr(key, None)
    home.sync([device("temp-1", enrolment="csr", csr=csr)], NOW)
    home.sync([device("temp-1", enrolment="csr", csr=csr, revoked="keyCompromise")], NOW)
    match = "was revoked for keyCompromise .*Cure: make a new key"
    for later in (NOW, NOW + 400 * DAY):
        for name in ("temp-1", "temp-2"):
            request = sync_request([device(name, enrolment="csr", csr=csr)])
            refused(home, "sync-devices", request, match, later)
        refused(home, "sign-server", server_request(key), match, later)
        refused(home, "probe", {"csr": csr}, match, later)


def test_key_revoked_for_a_harmless_reason_may_come_back(home: Home) -> None:
    csr = make_csr(ca.make_key("P-256"), None)
    home.sync([device("temp-1", enrolment="csr", csr=csr)], NOW)
    home.sync([device("temp-1", enrolment="csr", csr=csr, revoked="privilegeWithdrawn")], NOW)
    assert home.sync([device("temp-1", enrolment="csr", csr=csr)], NOW)["issued"] == ["temp-1"]


@pytest.mark.parametrize("later", [0 * DAY, 100 * DAY])
def test_compromise_found_out_later_is_remembered(home: Home, later: timedelta) -> None:
    """Once removed, or even expired; the key lives on in the device that made it."""
    csr = make_csr(ca.make_key("P-256"), None)
    home.sync([device("temp-1", enrolment="csr", csr=csr)], NOW)
    old = current(home, "temp-1")
    home.sync([], NOW)
    answer = home.sync([device("temp-1", revoked="keyCompromise")], NOW + later, revoke_at_most=0)
    assert answer["revoked"] == [{"id": "temp-1", "serial": old.serial, "reason": "keyCompromise"}]
    if not later:
        assert home.listed()[old.serial] == "keyCompromise"
    request = sync_request([device("temp-1", enrolment="csr", csr=csr)])
    refused(home, "sync-devices", request, "revoked for keyCompromise", NOW + later)


def test_secret_that_the_operator_deleted_after_pick_up_stays_deleted(home: Home) -> None:
    devices = [device("temp-1", "certificate", "password", "psk")]
    first = home.sync(devices, NOW)
    before = current(home, "temp-1")
    for name in ("key.pem", "password", "psk"):
        (home.path / "bundles/temp-1" / name).unlink()
    again = home.sync(devices, NOW + DAY)
    assert again["changed"] is False
    assert again["password_file"] == first["password_file"]
    assert current(home, "temp-1") == before
    assert not (home.path / "bundles/temp-1/key.pem").exists()
    # The renewal brings a new key; the password goes on.
    home.sync(devices, NOW + 60 * DAY)
    assert (home.path / "bundles/temp-1/key.pem").exists()
    assert not (home.path / "bundles/temp-1/password").exists()
    assert not (home.path / "bundles/temp-1/psk").exists()


def test_bundle_that_the_operator_took_away_comes_back_without_its_secrets(home: Home) -> None:
    home.sync([device("temp-1")], NOW)
    for file in (home.path / "bundles/temp-1").iterdir():
        file.unlink()
    (home.path / "bundles/temp-1").rmdir()
    answer = home.sync([device("temp-1")], NOW)
    assert (answer["changed"], answer["issued"]) == (True, [])
    assert not (home.path / "bundles/temp-1/key.pem").exists()


def test_new_issuing_key_signs_everything_again(home: Home, gateway_key: Any) -> None:
    home.sync([device("temp-1"), device("temp-2", revoked="superseded")], NOW)
    first = home.run("sign-server", server_request(gateway_key), NOW)
    make_home(home.path)  # another root and issuing CA of the same names
    answer = home.sync([device("temp-1")], NOW)
    assert answer["renewed"] == ["temp-1"]
    second = home.run("sign-server", server_request(gateway_key), NOW)
    assert second["serial"] != first["serial"]
    chain = (home.path / "bundles/temp-1/certificate.pem").read_text()
    assert openssl_verify(home, chain, "sslclient", NOW).endswith(": OK\n")
    assert home.sync([device("temp-1")], NOW)["changed"] is False


@pytest.mark.parametrize(
    ("devices", "more", "match"),
    [
        ([device("temp-1"), device("temp-1")], {}, "device temp-1 is listed twice"),
        ([device("bednet-probe")], {}, "'bednet-probe' cannot be a device's id"),
        ([device("temp/1")], {}, "'temp/1' cannot be a device's id"),
        ([device("temp+")], {}, "cannot be a device's id"),
        ([device("#")], {}, "cannot be a device's id"),
        ([device("temp-1\n")], {}, "cannot be a device's id"),
        ([device("../../etc")], {}, "cannot be a device's id"),
        ([device("t" * 65)], {}, "cannot be a device's id"),
        ([device("")], {}, "cannot be a device's id"),
        ([device("temp-1", "kerberos")], {}, "device temp-1: authentication must be some of"),
        ([device("temp-1", "token")], {}, "device temp-1: token must be one of"),
        ([device("temp-1", "token", token="tls")], {}, "device temp-1: token must be one of"),  # noqa: S106 - a method
        ([device("temp-1", token="tls_client_auth")], {}, "device temp-1: token must be one of"),  # noqa: S106 - a method
        ([{"id": "temp-1", "authentication": []}], {}, "device temp-1: authentication must be some of"),
        ([device("temp-1", enrolment="scep")], {}, "enrolment must be bundle or csr, not 'scep'"),
        ([device("temp-1", revoked="certificateHold")], {}, "device temp-1: revoked must be one of"),
        ([device("temp-1", colour="red")], {}, "device temp-1 has unknown fields: colour"),
        (["temp-1"], {}, "a device must be a JSON object, not str"),
        ([], {"key_type": "RSA-1024"}, "key_type must be one of .* not 'RSA-1024'"),
        ([], {"days": 0}, '"days" must be a number of days above 0'),
        ([], {"days": True}, '"days" must be a number of days'),
        ([], {"days": "90"}, "must be a number of days, not '90'"),
        ([], {"renew_before_days": 90}, "every run would issue anew"),
        ([], {"revoke_at_most": None}, '"revoke_at_most" must be a whole number'),
        ([], {"gateways": [{"name": "gateway-1"}]}, 'a gateway lacks "address"'),
        ([], {"colour": "red"}, "sync-devices has unknown fields: colour"),
    ],
)
def test_bad_request_is_refused(home: Home, devices: list[Any], more: dict[str, Any], match: str) -> None:
    refused(home, "sync-devices", sync_request(devices, **more), match)


# --- the issuing CA's own end ----------------------------------------------------------------------------------------


def test_nothing_outlives_the_issuing_ca(tmp_path: Path, gateway_key: Any) -> None:
    home = make_home(tmp_path / "ca", issuing_days=60)
    end = START + 60 * DAY
    home.sync([device("temp-1")], NOW)
    home.run("sign-server", server_request(gateway_key), NOW)
    home.run("probe", {"csr": make_csr(ca.make_key("P-256"), None), "days": 10}, end - 7 * DAY)
    assert {entry.not_after for entry in home.entries().values()} == {ca.stamp(end)}
    for file in (home.path / "issued").iterdir():
        assert ca.moment(load(file.read_bytes()), "not_valid_after") == end
    assert home.sync([device("temp-1")], NOW)["changed"] is False


@pytest.mark.parametrize(("before_window", "good"), [(SECOND, True), (0 * SECOND, False), (-SECOND, False)])
def test_certificate_that_would_be_due_at_once_is_refused(
    tmp_path: Path, gateway_key: Any, before_window: timedelta, good: bool
) -> None:
    home = make_home(tmp_path / "ca", issuing_days=60)
    now = START + 30 * DAY - before_window
    if good:
        assert home.sync([device("temp-1")], now)["issued"] == ["temp-1"]
        assert home.run("sign-server", server_request(gateway_key), now)["changed"]
    else:
        match = "the issuing CA expires on 2026-03-02T00:00:00Z, within the renewal window"
        refused(home, "sync-devices", sync_request([device("temp-1")]), match, now)
        refused(home, "sign-server", server_request(gateway_key), match, now)


REQUESTS: list[tuple[str, Any]] = [
    ("sync-devices", sync_request([device("temp-1")])),
    ("sign-server", server_request(ca.make_key("P-256"))),
    ("probe", {"csr": make_csr(ca.make_key("P-256"), None)}),
    ("crl", {"days": 7, "refresh_before_days": 2}),
]


@pytest.mark.parametrize(("command", "request_"), REQUESTS)
def test_ca_that_is_not_sound_signs_nothing(home: Home, tmp_path: Path, command: str, request_: Any) -> None:
    end = START + 1800 * DAY
    home.run(command, request_, NOW)
    refused(home, command, request_, "the issuing CA expired on 2030-12-06T00:00:00Z. Cure: renew", end + SECOND)
    refused(
        home, command, request_, "root CA is not valid before 2026-01-01T00:00:00Z. Cure: set the clock", START - SECOND
    )
    short = make_home(tmp_path / "short", root_days=5)
    refused(short, command, request_, "the root CA expired on 2026-01-06T00:00:00Z")
    other = make_home(tmp_path / "other")
    theirs = {name: (other.path / name).read_bytes() for name in ("issuing/issuing.key", "root/root.pem")}
    ours = {name: (home.path / name).read_bytes() for name in theirs}
    for name, match in (
        ("issuing/issuing.key", "issuing.key does not belong to issuing.pem"),
        ("root/root.pem", "issuing.pem is not signed by root.pem"),
    ):
        (home.path / name).write_bytes(theirs[name])
        refused(home, command, request_, match)
        (home.path / name).write_bytes(ours[name])
    (home.path / "issuing/issuing.key").chmod(0o644)
    refused(home, command, request_, "issuing.key can be read by others. Cure: chmod 640")
    (home.path / "issuing/issuing.key").chmod(0o600)
    (home.path / "issuing/issuing.key").rename(tmp_path / "kept")
    refused(home, command, request_, "issuing.key: No such file or directory. Cure: run playbooks/site.yml")


def test_ca_at_its_last_second_still_signs_a_crl(home: Home) -> None:
    assert home.run("crl", {"days": 7, "refresh_before_days": 2}, START + 1800 * DAY)["changed"]


def test_issuing_certificate_that_may_not_sign_is_refused(home: Home) -> None:
    home.sync([device("temp-1")], NOW)
    issued = home.entries()[current(home, "temp-1").serial]
    assert issued.pem is not None
    root_key = ca.make_key("P-256")
    root = make_ca(root_key, "root")
    key = ca.make_key("P-256")
    leaf = (
        x509.CertificateBuilder()
        .subject_name(root.subject)
        .issuer_name(root.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(START)
        .not_valid_after(START + 1800 * DAY)
        .sign(root_key, hash_for(root_key))
    )
    (home.path / "root/root.pem").write_bytes(root.public_bytes(Encoding.PEM))
    (home.path / "issuing/issuing.pem").write_bytes(leaf.public_bytes(Encoding.PEM))
    (home.path / "issuing/issuing.key").write_text(ca.key_pem(key))
    refused(home, "crl", {"days": 7, "refresh_before_days": 2}, "issuing.pem may not sign certificates and CRLs")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"certificates": {"01": {"id": "x"}}}', '{"certificates": []}'])
def test_damaged_index_is_refused_not_replaced(home: Home, content: str) -> None:
    home.sync([device("temp-1")], NOW)
    (home.path / "state/index.json").write_text(content)
    refused(home, "sync-devices", sync_request([]), "is damaged .*Cure: restore")


# --- probe -----------------------------------------------------------------------------------------------------------


def test_probe_identity_is_short_lived_and_its_password_known_to_the_gateways(home: Home) -> None:
    synced = home.sync([], NOW)
    csr = make_csr(ca.make_key("P-256"), "bednet-probe")
    dry = home.run("probe", {"csr": csr}, NOW, check=True)
    answer = home.run("probe", {"csr": csr}, NOW)
    assert (dry["changed"], dry["certificate"], answer["changed"]) == (True, None, True)
    certificate = load(answer["certificate"])
    assert ca.moment(certificate, "not_valid_after") == NOW + DAY
    assert openssl_verify(home, answer["chain"], "sslclient", NOW).endswith(": OK\n")
    _, _, _, salt, digest = synced["password_file"].split(":")[1].strip().split("$")
    expected = hashlib.pbkdf2_hmac("sha512", answer["password"].encode(), base64.b64decode(salt), 101)
    assert base64.b64decode(digest) == expected
    again = home.run("probe", {"csr": csr}, NOW + DAY / 2 - SECOND)
    assert (again["changed"], again["certificate"]) == (False, answer["certificate"])
    later = home.run("probe", {"csr": csr}, NOW + DAY / 2)
    assert later["certificate"] != answer["certificate"]
    assert later["password"] == answer["password"]
    # Another key revokes nothing: a probe must not make the gateways load a new CRL.
    crl = home.crl()
    home.run("probe", {"csr": make_csr(ca.make_key("P-256"), None)}, NOW)
    assert home.crl() == crl


def test_canary_is_revoked_and_stays_the_same(home: Home) -> None:
    home.sync([], NOW)
    listed = home.listed()
    csr = make_csr(ca.make_key("P-256"), None)
    answer = home.run("probe", {"csr": csr}, NOW)
    canary = load(answer["canary_certificate"])
    assert home.listed() == listed == {serial(answer["canary_certificate"]): "cessationOfOperation"}
    assert canary.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "bednet-canary"
    key = load_pem_private_key(answer["canary_key"].encode(), password=None)
    assert key_of(key) == key_of(canary)
    assert "certificate revoked" in openssl_verify(home, answer["canary_certificate"], "sslclient", NOW)
    for later, same in ((364 * DAY - SECOND, True), (364 * DAY, False)):
        again = home.run("probe", {"csr": csr}, NOW + later)
        assert (again["canary_certificate"] == answer["canary_certificate"]) == same


def test_canary_is_made_anew_early_by_sync_which_a_roll_out_follows(home: Home) -> None:
    home.sync([], NOW)
    first = set(home.listed())
    assert home.sync([], NOW + 305 * DAY - SECOND)["changed"] is False
    assert home.sync([], NOW + 305 * DAY)["changed"] is True
    assert len(set(home.listed()) - first) == 1


def test_canary_near_the_end_of_the_issuing_ca_is_not_made_anew_in_vain(tmp_path: Path) -> None:
    home = make_home(tmp_path / "ca", issuing_days=50)
    home.sync([], NOW)
    assert home.sync([], NOW + 30 * DAY)["changed"] is False


# --- crl -------------------------------------------------------------------------------------------------------------

CRL = {"days": 7, "refresh_before_days": 2}


def number(home: Home) -> int:
    return home.crl().extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


@pytest.mark.parametrize(("later", "renewed"), [(5 * DAY - SECOND, False), (5 * DAY, True), (30 * DAY, True)])
def test_crl_is_renewed_from_the_second_on_that_it_is_due(home: Home, later: timedelta, renewed: bool) -> None:
    assert home.run("crl", CRL, NOW)["changed"]
    first, before = number(home), home.snapshot()
    assert home.run("crl", CRL, NOW + later, check=True)["changed"] == renewed
    assert home.snapshot() == before
    answer = home.run("crl", CRL, NOW + later)
    assert answer["changed"] == answer["renewed"] == (number(home) > first) == renewed
    assert answer["next_update"] == ca.stamp(NOW + 7 * DAY + (later if renewed else 0 * DAY))


def test_crl_says_who_signed_it_and_is_the_same_in_both_forms(home: Home) -> None:
    home.run("crl", CRL, NOW)
    crl, (issuing, _) = home.crl(), home.issuer()
    identifier = issuing.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier == identifier
    assert crl.issuer == issuing.subject
    assert crl.is_signature_valid(issuing.public_key())  # type: ignore[arg-type]
    pem = x509.load_pem_x509_crl((home.path / "publish/issuing.crl.pem").read_bytes())
    assert pem.public_bytes(Encoding.DER) == (home.path / "publish/issuing.crl").read_bytes()
    (home.path / "publish/issuing.crl.pem").write_text("half of it")
    assert home.run("crl", CRL, NOW)["changed"]
    pem = x509.load_pem_x509_crl((home.path / "publish/issuing.crl.pem").read_bytes())
    assert pem == crl


def test_each_crl_seems_newer_than_the_last_even_in_the_first_hour(home: Home) -> None:
    # Of two lists of one issuer OpenSSL takes the one with the later thisUpdate.
    seen = []
    for number in range(3):
        home.sync(
            [device("temp-1"), device("temp-2", revoked="superseded")] if number else [device("temp-2")],
            NOW + number * SECOND,
        )
        home.run("crl", {"days": 7 + number, "refresh_before_days": 6.9 + number}, NOW + number * SECOND + SECOND)
        seen.append(ca.moment(home.crl(), "last_update"))
    assert seen == sorted(set(seen))


def test_crl_number_grows_even_within_a_second_and_when_the_last_crl_is_lost(home: Home) -> None:
    numbers = []
    for index in range(3):
        home.sync([device("temp-1")], NOW)
        home.sync([device("temp-1", revoked="superseded")], NOW)
        numbers.append(number(home))
        assert len(home.listed()) == index + 2  # and the canary
    assert numbers == sorted(set(numbers))
    (home.path / "publish/issuing.crl").unlink()
    home.run("crl", CRL, NOW + 5 * SECOND)
    assert number(home) > numbers[-1]
    assert len(home.listed()) == 4


def test_crl_that_is_damaged_or_of_another_key_is_made_anew(home: Home, tmp_path: Path) -> None:
    other = make_home(tmp_path / "other")
    other.run("crl", CRL, NOW)
    home.run("crl", CRL, NOW)
    for content in (b"", b"\x30\x03\x02\x01\x01", (other.path / "publish/issuing.crl").read_bytes()):
        (home.path / "publish/issuing.crl").write_bytes(content)
        assert home.run("crl", CRL, NOW)["changed"]
        assert home.crl().is_signature_valid(home.issuer()[0].public_key())  # type: ignore[arg-type]


def test_expired_certificate_leaves_the_crl_after_one_more_appearance(home: Home) -> None:
    home.sync([device("temp-1")], NOW)
    old = current(home, "temp-1").serial
    home.sync([], NOW)
    expiry = NOW + 90 * DAY
    for now, listed in (
        (expiry, True),  # the second of notAfter is still within validity
        (expiry + 6 * DAY, True),  # expired; no CRL has listed it past its end so far
        (expiry + 12 * DAY, False),
        (expiry + 18 * DAY, False),  # and it does not come back
    ):
        assert home.run("crl", CRL, now)["renewed"]
        assert (old in home.listed()) == listed, now


def test_crl_from_a_clock_that_ran_ahead_does_not_hide_a_revocation(home: Home) -> None:
    home.sync([device("temp-1")], NOW)
    home.run("crl", CRL, NOW + 200 * DAY)
    home.sync([device("temp-1", revoked="keyCompromise")], NOW)
    assert "keyCompromise" in home.listed().values()


def test_crl_follows_a_changed_lifetime_and_keeps_it(home: Home) -> None:
    home.run("crl", CRL, NOW)
    longer = {"days": 30, "refresh_before_days": 10}
    assert home.run("crl", longer, NOW + DAY)["next_update"] == ca.stamp(NOW + 31 * DAY)
    assert home.run("crl", longer, NOW + DAY)["changed"] is False
    home.sync([device("temp-1")], NOW + 2 * DAY)
    assert ca.moment(home.crl(), "next_update") == NOW + 32 * DAY


def test_crl_that_every_run_would_sign_is_refused(home: Home) -> None:
    refused(home, "crl", {"days": 7, "refresh_before_days": 7}, "every run would sign a CRL")


# --- status ----------------------------------------------------------------------------------------------------------


def test_status_of_a_sound_ca_counts_and_writes_nothing(home: Home, gateway_key: Any) -> None:
    home.sync([device("temp-1"), device("temp-2", "password")], NOW)
    home.sync([device("temp-1", revoked="superseded"), device("temp-2", "password"), device("temp-3")], NOW)
    home.run("sign-server", server_request(gateway_key), NOW)
    before = home.snapshot()
    answer = home.run("status", {}, NOW)
    assert home.snapshot() == before
    assert answer["problems"] == []
    assert answer["issuing"]["not_after"] == "2030-12-06T00:00:00Z"
    assert answer["root"]["key_type"] == answer["issuing"]["key_type"] == "P-256"
    assert answer["crl"] == {"next_update": ca.stamp(NOW + 7 * DAY), "revoked": 2}
    assert answer["certificates"] == {
        "device": {"valid": 1, "expired": 0, "revoked": 1},
        "server": {"valid": 1, "expired": 0, "revoked": 0},
        "canary": {"valid": 0, "expired": 0, "revoked": 1},
    }
    assert (answer["passwords"], answer["psk"]) == (2, 1)


@pytest.mark.parametrize(
    ("warn", "now", "match"),
    [
        (30, START + 1770 * DAY, None),
        (30, START + 1770 * DAY + SECOND, "issuing CA expires on 2030-12-06T00:00:00Z"),
        (31, START + 1770 * DAY, "issuing CA expires on"),
        (0, START + 1800 * DAY, None),
        (0, START + 1800 * DAY + SECOND, "issuing CA expired on"),
        (0, START + 3650 * DAY + SECOND, "root CA expired on"),
    ],
)
def test_status_warns_from_the_second_on_that_it_should(home: Home, warn: int, now: Any, match: str | None) -> None:
    if now <= START + 1800 * DAY:
        home.run("crl", CRL, now)
    found = [text for text in home.run("status", {"warn_days": warn}, now)["problems"] if "CA exp" in text]
    assert bool(found) == bool(match)
    assert match is None or any(match in text for text in found)


def test_status_finds_a_crl_that_is_missing_stale_or_short_of_a_revocation(home: Home) -> None:
    assert "there is no CRL of this issuing CA" in home.run("status", {}, NOW)["problems"][0]
    home.sync([device("temp-1")], NOW)
    kept = (home.path / "publish/issuing.crl").read_bytes()
    assert home.run("status", {}, NOW + 7 * DAY)["problems"] == []
    assert "the CRL is stale since" in home.run("status", {}, NOW + 7 * DAY + SECOND)["problems"][0]
    home.sync([], NOW)
    (home.path / "publish/issuing.crl").write_bytes(kept)
    assert "the CRL lacks a revocation" in home.run("status", {}, NOW)["problems"][0]


# --- as a program ----------------------------------------------------------------------------------------------------


def start(home: Home, *arguments: str, stdin: str) -> subprocess.CompletedProcess[str]:
    """Run the file alone, as the CA host does: isolated from this checkout's packages."""
    command = [sys.executable, "-I", "-W", "error", str(Path(ca.__file__)), "--home", str(home.path), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def today(tmp_path: Path) -> Home:
    """A CA that is good by the machine's clock."""
    return make_home(tmp_path / "today", start=datetime.now(UTC) - DAY)


def test_program_speaks_json_and_runs_alone(today: Home) -> None:
    request = json.dumps(sync_request([device("temp-1", "certificate", "password")]))
    dry = start(today, "--check", "sync-devices", stdin=request)
    real = start(today, "sync-devices", stdin=request)
    again = start(today, "sync-devices", stdin=request)
    assert [done.returncode for done in (dry, real, again)] == [0, 0, 0], real.stderr
    assert [json.loads(done.stdout)["changed"] for done in (dry, real, again)] == [True, True, False]
    assert (dry.stderr, real.stderr) == ("", "")
    done = start(today, "status", stdin="")
    assert (done.returncode, done.stderr) == (0, "")


def test_program_says_in_one_line_why_it_refuses(today: Home) -> None:
    done = start(today, "sync-devices", stdin=json.dumps(sync_request([device("temp-1"), device("temp-1")])))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "bednet-ca sync-devices: device temp-1 is listed twice. Cure: remove one\n"
    done = start(today, "crl", stdin="{\"password\": 'hunter2'")
    assert (done.returncode, done.stdout) == (1, "")
    assert "stdin is not JSON" in done.stderr
    assert "hunter2" not in done.stderr
    done = start(today, "status", stdin="{}")
    assert done.returncode == 1
    assert done.stderr.startswith("bednet-ca status: there is no CRL")
    assert json.loads(done.stdout)["problems"]


def test_program_without_a_ca_says_what_to_run(tmp_path: Path) -> None:
    done = start(Home(tmp_path / "none"), "status", stdin="{}")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "none: No such file or directory. Cure: run playbooks/site.yml, whose role ca makes it\n"
    )


def test_full_disk_is_said_and_the_next_run_completes_the_work(
    today: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_temporary: Path, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    request = json.dumps(sync_request([device("temp-1")]))
    with monkeypatch.context() as patch:
        patch.setattr(ca, "_rename", full)
        patch.setattr(sys, "stdin", io.StringIO(request))
        assert ca.main(["--home", str(today.path), "sync-devices"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "No space left on device. Cure: make room" in err
    done = start(today, "sync-devices", stdin=request)
    assert json.loads(done.stdout)["issued"] == ["temp-1"]


@pytest.mark.parametrize(
    ("command", "check", "reader_may"), [("crl", False, False), ("crl", True, True), ("status", False, True)]
)
def test_writers_take_turns_and_readers_share(
    home: Home, monkeypatch: pytest.MonkeyPatch, command: str, check: bool, reader_may: bool
) -> None:
    tried = {}

    def try_lock(*_: object) -> dict[str, Any]:
        for name, kind in (("reader", fcntl.LOCK_SH), ("writer", fcntl.LOCK_EX)):
            descriptor = os.open(home.path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                tried[name] = True
            except BlockingIOError:
                tried[name] = False
            finally:
                os.close(descriptor)
        return {}

    monkeypatch.setitem(ca.COMMANDS, command, try_lock)
    home.run(command, {}, NOW, check=check)
    assert tried == {"reader": reader_may, "writer": False}
