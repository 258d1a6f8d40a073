# SPDX-License-Identifier: Apache-2.0
"""RFC 8705, 2: client authentication by certificate; and what a client could forge of it."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.token_service.plant import (
    START,
    TCP,
    UNIX,
    certificate,
    claims_of,
    from_nginx,
    pem,
    refused,
    thumbprint,
)

if TYPE_CHECKING:
    from tests.token_service.plant import Plant

BEGIN, END = dt.datetime(2027, 1, 1, tzinfo=dt.UTC), dt.datetime(2027, 4, 1, tzinfo=dt.UTC)
FORM = {"grant_type": "client_credentials", "client_id": "edge-1"}


def send(
    plant: Plant, headers: dict[str, str] | list[tuple[str, str]], form: dict[str, str] | None = None, **more: Any
) -> Any:
    """Send headers as they are, not as nginx would."""
    return plant.app.test_client().post(
        "/token", data=form or FORM, headers=headers, environ_overrides={"gunicorn.socket": more.get("socket", UNIX)}
    )


def test_certificate_of_the_device_is_enough(plant: Plant) -> None:
    assert claims_of(plant.token("edge-1"))["sub"] == "edge-1"


def test_client_id_is_required_section_2(plant: Plant) -> None:
    response = plant.post("/token", {"grant_type": "client_credentials"}, certificate=plant.certificate("edge-1"))
    refused(plant, response, "invalid_client", "no-client-id", 401)


def test_certificate_of_another_device_is_refused(plant: Plant) -> None:
    response = plant.post("/token", FORM, certificate=plant.certificate("edge-2"))
    refused(plant, response, "invalid_client", "client-id-mismatch", 401)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("gone-1", "revoked"),
        ("meter-1", "wrong-method"),
        ("pump-1", "wrong-method"),
        ("boss", "wrong-method"),
        ("watcher", "wrong-method"),
        ("temp-101", "unknown-client"),
        ("stranger", "unknown-client"),
        ("bednet-probe", "unknown-client"),
    ],
)
def test_who_is_not_registered_for_it_is_refused_section_2_1(plant: Plant, device: str, reason: str) -> None:
    refused(plant, plant.token(device), "invalid_client", reason, 401)


def test_revoked_serial_number_is_refused(plant: Plant) -> None:
    plant.apply(revoked_serials={"00ABCDEF": "superseded"})
    form = {**FORM}
    assert plant.post("/token", form, certificate=certificate("edge-1", 0xABCDEE)).status_code == 200
    response = plant.post("/token", form, certificate=certificate("edge-1", 0xABCDEF))
    refused(plant, response, "invalid_client", "certificate-revoked", 401)


def test_revoked_certificate_beside_a_secret_is_refused(plant: Plant) -> None:
    plant.apply(revoked_serials={"ABC": "keyCompromise"})
    response = plant.token_by_secret(certificate=certificate("meter-1", 0xABC))
    refused(plant, response, "invalid_client", "certificate-revoked", 401)


def test_certificate_of_another_beside_a_secret_is_refused(plant: Plant) -> None:
    response = plant.token_by_secret(certificate=plant.certificate("edge-1"))
    refused(plant, response, "invalid_client", "certificate-mismatch", 401)


def test_certificate_of_another_beside_an_assertion_is_refused(plant: Plant) -> None:
    response = plant.token_by_assertion(certificate=plant.certificate("edge-1"))
    refused(plant, response, "invalid_client", "certificate-mismatch", 401)


def test_device_with_a_certificate_must_come_with_it(plant: Plant) -> None:
    refused(plant, plant.token_by_secret("hmi-1"), "invalid_client", "no-certificate", 401)
    mine = plant.certificate("hmi-1")
    assert claims_of(plant.token_by_secret("hmi-1", certificate=mine))["cnf"] == {"x5t#S256": thumbprint(mine)}


# What nginx would not say


def test_headers_are_believed_from_the_unix_socket_alone(plant: Plant) -> None:
    headers = from_nginx(plant.certificate("edge-1"))
    for socket in (TCP, None):
        refused(plant, send(plant, headers, socket=socket), "invalid_client", "certificate-header-untrusted", 401)
        assert "address" not in plant.lines()[-1]
    assert send(plant, headers).status_code == 200


@pytest.mark.parametrize("verify", ["FAILED:certificate has expired", "FAILED", "success", "SUCCESS ", "1", "", "NONE"])
def test_certificate_that_nginx_has_not_verified_is_refused(plant: Plant, verify: str) -> None:
    headers = {"X-Bednet-Client-Verify": verify, "X-Bednet-Client-Cert": pem(plant.certificate("edge-1"))}
    refused(plant, send(plant, headers), "invalid_client", "certificate-not-verified", 401)


def test_certificate_without_a_word_of_nginx_is_refused(plant: Plant) -> None:
    headers = {"X-Bednet-Client-Cert": pem(plant.certificate("edge-1"))}
    refused(plant, send(plant, headers), "invalid_client", "certificate-not-verified", 401)


def test_success_without_a_certificate_is_refused(plant: Plant) -> None:
    refused(
        plant, send(plant, {"X-Bednet-Client-Verify": "SUCCESS"}), "invalid_client", "certificate-header-malformed", 401
    )


@pytest.mark.parametrize("twice", ["X-Bednet-Client-Verify", "X-Bednet-Client-Cert", "X_Bednet_Client_Verify"])
def test_header_that_is_there_twice_is_refused(plant: Plant, twice: str) -> None:
    real = from_nginx(plant.certificate("edge-1"))
    forged = "SUCCESS" if twice.endswith("Verify") else pem(certificate("edge-2"))
    refused(plant, send(plant, [*real.items(), (twice, forged)]), "invalid_client", "certificate-header-twice", 401)
    refused(plant, send(plant, [(twice, forged), *real.items()]), "invalid_client", "certificate-header-twice", 401)


def test_forged_header_beside_nginx_saying_none_is_refused(plant: Plant) -> None:
    # An underscore makes the same variable of WSGI; nginx sends no header that is empty.
    headers = {"X-Bednet-Client-Verify": "NONE", "X_Bednet_Client_Cert": pem(certificate("edge-1"))}
    refused(plant, send(plant, headers), "invalid_client", "certificate-not-verified", 401)


@pytest.mark.parametrize(
    "text",
    ["x", "%ff%fe", "-----BEGIN CERTIFICATE-----", "MIIB", "A" * 20_000, "%00"],
)
def test_header_that_is_no_certificate_is_refused(plant: Plant, text: str) -> None:
    headers = {"X-Bednet-Client-Verify": "SUCCESS", "X-Bednet-Client-Cert": text}
    refused(plant, send(plant, headers), "invalid_client", "certificate-header-malformed", 401)


def test_two_certificates_in_one_header_are_refused(plant: Plant) -> None:
    two = pem(certificate("edge-1")) + "%0A" + pem(certificate("edge-2"))
    headers = {"X-Bednet-Client-Verify": "SUCCESS", "X-Bednet-Client-Cert": two}
    refused(plant, send(plant, headers), "invalid_client", "certificate-header-malformed", 401)


@pytest.mark.parametrize(
    "names",
    [[], ["edge-1", "edge-2"], ["edge-1", "edge-1"], ["edge 1"], ["-edge"], ["édge"], ["a/b"]],
)
def test_subject_that_is_no_device_is_refused_section_2_1_2(plant: Plant, names: list[str]) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name, _validate=False) for name in names])
    made = x509.CertificateBuilder(subject, subject, key.public_key(), 1, BEGIN, END).sign(key, hashes.SHA256())
    headers = {"X-Bednet-Client-Verify": "SUCCESS", "X-Bednet-Client-Cert": pem(made)}
    refused(plant, send(plant, headers), "invalid_client", "certificate-subject", 401)


def test_id_in_another_place_of_the_certificate_counts_for_nothing(plant: Plant) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, "edge-2"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "edge-1"),
        ]
    )
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1, BEGIN, END)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("edge-1")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    response = plant.post("/token", FORM, certificate=made)
    refused(plant, response, "invalid_client", "client-id-mismatch", 401)


def test_renewed_certificate_needs_no_registration(plant: Plant) -> None:
    renewed = certificate("edge-1", 99, ec.generate_private_key(ec.SECP256R1()))
    assert claims_of(plant.post("/token", FORM, certificate=renewed))["cnf"] == {"x5t#S256": thumbprint(renewed)}
    assert plant.clock.now == START


def test_who_was_refused_is_in_the_log(plant: Plant) -> None:
    plant.token("gone-1")
    line = plant.lines()[-1]
    assert {line[name] for name in ("client", "address", "endpoint")} == {"gone-1", "192.0.2.7", "/token"}
    assert line["event"] == "refused"
