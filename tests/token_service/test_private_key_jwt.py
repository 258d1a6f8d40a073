# SPDX-License-Identifier: Apache-2.0
"""RFC 7523: client authentication by an assertion that the device has signed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import hashes, hmac, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from bednet.token_service import jose, revocation, site
from tests.base64url import decode, encode, encode_part
from tests.token_service.plant import (
    DEVICES,
    GATEWAY,
    ISSUER,
    SITE_AUDIENCE,
    START,
    certified,
    claims_of,
    compiled,
    refused,
    thumbprint,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.token_service.plant import Plant


HEADER_TWICE = b'{"alg": "ES256", "alg": "none"}'
NOT_A_NUMBER = b'{"sub": "pump-1", "iss": "pump-1", "exp": NaN}'


def test_assertion_is_enough(plant: Plant) -> None:
    assert claims_of(plant.token_by_assertion())["sub"] == "pump-1"


@pytest.mark.parametrize("audience", [ISSUER, f"{ISSUER}/token", [ISSUER], [f"{ISSUER}/token"]])
def test_audience_is_this_service_section_3_3(plant: Plant, audience: object) -> None:
    assert plant.token_by_assertion(plant.assertion(aud=audience)).status_code == 200


@pytest.mark.parametrize(
    "audience",
    [
        None,
        "",
        "https://other.example",
        f"{ISSUER}/",
        f"{ISSUER}/revoke",
        SITE_AUDIENCE,
        [],
        [ISSUER, "https://other.example"],
        [ISSUER, f"{ISSUER}/token"],
        {"aud": ISSUER},
        7,
    ],
)
def test_assertion_for_somebody_else_is_refused_section_3_3(plant: Plant, audience: object) -> None:
    response = plant.token_by_assertion(plant.assertion(aud=audience))
    refused(plant, response, "invalid_client", "assertion-audience", 401)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iss": "edge-1"}, "assertion-subject"),
        ({"iss": None}, "assertion-subject"),
        ({"sub": None}, "assertion-subject"),
        ({"sub": ["pump-1"], "iss": ["pump-1"]}, "assertion-subject"),
        ({"sub": "pump-2", "iss": "pump-2"}, "unknown-client"),
        ({"sub": "edge-1", "iss": "edge-1"}, "wrong-method"),
        ({"sub": "meter-1", "iss": "meter-1"}, "wrong-method"),
        ({"exp": None}, "assertion-exp"),
        ({"exp": str(START + 60)}, "assertion-exp"),
        ({"exp": True}, "assertion-exp"),
        ({"exp": 10**400}, "assertion-lifetime"),
        ({"iat": "now"}, "assertion-iat"),
        ({"nbf": [START]}, "assertion-nbf"),
        ({"jti": None}, "assertion-jti"),
        ({"jti": ""}, "assertion-jti"),
        ({"jti": 7}, "assertion-jti"),
        ({"jti": "x" * 257}, "assertion-jti"),
    ],
)
def test_wrong_claims_are_refused_section_3(plant: Plant, changes: dict[str, Any], reason: str) -> None:
    refused(plant, plant.token_by_assertion(plant.assertion(**changes)), "invalid_client", reason, 401)


@pytest.mark.parametrize(
    ("changes", "good", "bad", "reason"),
    [
        ({"exp": START}, START + 29, START + 30, "assertion-expired"),
        ({"exp": START + 3630}, START, START - 1, "assertion-lifetime"),
        ({"nbf": START + 30}, START, START - 1, "assertion-early"),
        ({"iat": START + 30}, START, START - 1, "assertion-early"),
        ({"iat": START - 3630}, START, START + 1, "assertion-old"),
    ],
)
def test_times_hold_to_the_second_section_3_4_to_3_6(
    plant: Plant, changes: dict[str, Any], good: int, bad: int, reason: str
) -> None:
    def assertion() -> str:
        plant.clock.now = START
        return plant.assertion(**{"exp": START + 100, "iat": None, **changes})

    right, wrong = assertion(), assertion()
    plant.clock.now = bad
    refused(plant, plant.token_by_assertion(wrong), "invalid_client", reason, 401)
    plant.clock.now = good
    assert plant.token_by_assertion(right).status_code == 200


def test_assertion_without_iat_is_enough_section_3_6(plant: Plant) -> None:
    assert plant.token_by_assertion(plant.assertion(iat=None)).status_code == 200


# Replay (section 3.7)


def test_replay_is_refused(plant: Plant) -> None:
    assertion = plant.assertion()
    assert plant.token_by_assertion(assertion).status_code == 200
    refused(plant, plant.token_by_assertion(assertion), "invalid_client", "assertion-replayed", 401)


def test_replay_at_another_worker_is_refused(plant: Plant) -> None:
    assertion = plant.assertion()
    assert plant.token_by_assertion(assertion).status_code == 200
    other = plant.make_app()
    refused(plant, plant.token_by_assertion(assertion, app=other), "invalid_client", "assertion-replayed", 401)


def test_replay_in_the_last_second_after_a_purge_is_refused(plant: Plant) -> None:
    assertion = plant.assertion(exp=START + 60)
    assert plant.token_by_assertion(assertion).status_code == 200
    plant.clock.now = START + 60 + 29
    with plant.database.writing() as connection:
        revocation.purge(connection, plant.clock.now)
    refused(plant, plant.token_by_assertion(assertion), "invalid_client", "assertion-replayed", 401)


def test_jti_in_another_token_of_the_device_is_refused(plant: Plant) -> None:
    assert plant.token_by_assertion(plant.assertion(jti="same")).status_code == 200
    response = plant.token_by_assertion(plant.assertion(jti="same", exp=START + 90))
    refused(plant, response, "invalid_client", "assertion-replayed", 401)


def test_jti_of_another_device_is_nobody_elses(plant: Plant) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    pump_2 = {"device": "pump-2", "authentication": ["token"], "token": "private_key_jwt"}
    certificates = {**plant.secrets()["certificates"], "pump-2": certified(key, "pump-2")}
    plant.apply(compiled(sorted([*DEVICES, pump_2], key=lambda row: str(row["device"]))), certificates=certificates)
    assert plant.token_by_assertion(plant.assertion(jti="same")).status_code == 200
    other = plant.assertion(key=key, iss="pump-2", sub="pump-2", jti="same")
    assert plant.token_by_assertion(other).status_code == 200


def test_replay_of_a_refused_request_is_refused(plant: Plant) -> None:
    assertion = plant.assertion()
    refused(plant, plant.token_by_assertion(assertion, form={"scope": "x"}), "invalid_scope", "scope-malformed")
    refused(plant, plant.token_by_assertion(assertion), "invalid_client", "assertion-replayed", 401)


def test_assertion_with_a_wrong_signature_uses_up_nothing(plant: Plant) -> None:
    stranger = ec.generate_private_key(ec.SECP256R1())
    response = plant.token_by_assertion(plant.assertion(key=stranger, jti="mine"))
    refused(plant, response, "invalid_client", "assertion-signature", 401)
    assert plant.token_by_assertion(plant.assertion(jti="mine")).status_code == 200


# The signature


def test_alg_none_is_refused(plant: Plant) -> None:
    for algorithm in ("none", "None", "NONE", "nOnE"):
        for signature in ("", "x"):
            signed = f"{encode_part({'alg': algorithm, 'typ': 'JWT'})}.{encode_part(plant.claims())}"
            text = f"{signed}.{encode(signature.encode())}"
            refused(plant, plant.token_by_assertion(text), "invalid_client", "assertion-algorithm", 401)


def test_hs256_with_the_public_key_is_refused(plant: Plant) -> None:
    public = plant.pump_key.public_key()
    for form in (
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
    ):
        signed = f"{encode_part({'alg': 'HS256', 'typ': 'JWT'})}.{encode_part(plant.claims())}"
        mac = hmac.HMAC(form, hashes.SHA256())
        mac.update(signed.encode())
        response = plant.token_by_assertion(f"{signed}.{encode(mac.finalize())}")
        refused(plant, response, "invalid_client", "assertion-algorithm", 401)


@pytest.mark.parametrize("name", ["jwk", "jku", "x5c", "x5u", "crit", "b64"])
def test_key_from_the_header_is_refused(plant: Plant, name: str) -> None:
    stranger = ec.generate_private_key(ec.SECP256R1())
    jwk = jose.public_jwk(stranger.public_key())
    text = plant.assertion(key=stranger, header={"typ": "JWT", name: jwk})
    refused(plant, plant.token_by_assertion(text), "invalid_client", "assertion-malformed", 401)


@pytest.mark.parametrize("kid", ["../../etc/passwd", "' OR 1=1 --", "", "x" * 4000])
def test_kid_of_the_header_decides_nothing(plant: Plant, kid: str) -> None:
    assert plant.token_by_assertion(plant.assertion(header={"typ": "JWT", "kid": kid})).status_code == 200


@pytest.mark.parametrize("typ", ["at+jwt", "revocations+jwt", "jwt", 7])
def test_token_of_another_type_is_refused(plant: Plant, typ: object) -> None:
    text = plant.assertion(header={"typ": typ})
    refused(plant, plant.token_by_assertion(text), "invalid_client", "assertion-typ", 401)


def test_access_token_is_no_assertion(plant: Plant) -> None:
    token = (plant.token_by_assertion().json or {})["access_token"]
    refused(plant, plant.token_by_assertion(token), "invalid_client", "assertion-typ", 401)


def test_assertion_that_was_changed_is_refused(plant: Plant) -> None:
    header, claims, signature = plant.assertion().split(".")
    other = encode_part({**json.loads(decode(claims)), "exp": START + 200})
    zero = encode(bytes(64))
    for text in (f"{header}.{other}.{signature}", f"{header}.{claims}.{zero}", f"{header}.{claims}.{signature[:-2]}"):
        refused(plant, plant.token_by_assertion(text), "invalid_client", "assertion-signature", 401)


def test_signature_in_der_is_refused(plant: Plant) -> None:
    signed = f"{encode_part({'alg': 'ES256', 'typ': 'JWT'})}.{encode_part(plant.claims())}"
    der = plant.pump_key.sign(signed.encode(), ec.ECDSA(hashes.SHA256()))
    response = plant.token_by_assertion(f"{signed}.{encode(der)}")
    refused(plant, response, "invalid_client", "assertion-signature", 401)


def _sent(plant: Plant) -> dict[str, str]:
    header, claims, signature = plant.assertion().split(".")
    twice = json.dumps(plant.claims())[:-1] + ', "sub": "edge-1"}'
    return {
        "nothing": ".",
        "one part": "x",
        "two parts": f"{header}.{claims}",
        "four parts": f"{header}.{claims}.{signature}.{signature}",
        "truncated": f"{header}.{claims}"[:-7] + f".{signature}",
        "padded": f"{header}=.{claims}.{signature}",
        "standard base64": f"{header}.{claims}.+/{signature}",
        "bits that mean nothing": f"{header}.{claims}.{signature[:-1]}" + ("B" if signature[-1] != "B" else "C"),
        "not UTF-8": f"{encode(bytes((255, 254)))}.{claims}.{signature}",
        "claims are a list": f"{header}.{encode_part([1])}.{signature}",
        "claims twice": f"{header}.{encode(twice.encode())}.{signature}",
        "header twice": f"{encode(HEADER_TWICE)}.{claims}.{signature}",
        "NaN": f"{header}.{encode(NOT_A_NUMBER)}.{signature}",
        "deep": f"{header}.{encode(b'[' * 3000)}.{signature}",
        "8193 bytes": "x" * 8193,
        "unicode": "é.é.é",
    }


def test_malformed_assertions_are_refused_as_that_and_no_signature_is_looked_at(plant: Plant) -> None:
    told = {}
    for name, text in _sent(plant).items():
        response = plant.token_by_assertion(text)
        assert response.status_code == 401, name
        told[name] = plant.reason()
    assert told == dict.fromkeys(told, "assertion-malformed")


@pytest.mark.parametrize(
    "form",
    [
        {"client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:saml2-bearer"},
        {"client_assertion_type": ""},
    ],
)
def test_assertion_type_is_that_of_section_2_2(plant: Plant, form: dict[str, str]) -> None:
    response = plant.token_by_assertion(form=form)
    refused(plant, response, "invalid_client", "assertion-type", 401)


def test_client_id_beside_the_assertion_must_be_the_same_section_4_2_of_rfc_7521(plant: Plant) -> None:
    assert plant.token_by_assertion(form={"client_id": "pump-1"}).status_code == 200
    response = plant.token_by_assertion(form={"client_id": "edge-1"})
    refused(plant, response, "invalid_client", "client-id-mismatch", 401)


# Keys


@pytest.mark.parametrize(
    "make",
    [
        lambda: ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate,
        lambda: rsa.generate_private_key(65537, 2048),
    ],
    ids=["P-384", "Ed25519", "RSA-2048"],
)
def test_every_kind_of_key_that_the_ca_certifies_works(plant: Plant, make: Callable[[], Any]) -> None:
    key = make()
    plant.apply(certificates={"pump-1": certified(key)})
    if isinstance(key, rsa.RSAPrivateKey):
        signed = f"{encode_part({'alg': 'PS256'})}.{encode_part(plant.claims())}"
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
        text = f"{signed}.{encode(key.sign(signed.encode(), pss, hashes.SHA256()))}"
        other = f"{encode_part({'alg': 'RS256'})}.{encode_part(plant.claims())}"
        response = plant.token_by_assertion(
            f"{other}.{encode(key.sign(other.encode(), padding.PKCS1v15(), hashes.SHA256()))}"
        )
        assert response.status_code == 200
    else:
        text = plant.assertion(key=key)
    found = claims_of(plant.token_by_assertion(text))["cnf"]
    assert found == {"jwk": jose.public_jwk(key.public_key())}
    assert "d" not in found["jwk"]


def test_former_key_works_until_the_device_has_its_new_bundle(plant: Plant) -> None:
    new = ec.generate_private_key(ec.SECP256R1())
    former = plant.pump_key
    plant.apply(certificates={"pump-1": certified(new) + certified(former)})
    for key in (former, new):
        assert claims_of(plant.token_by_assertion(plant.assertion(key=key)))["cnf"] == {
            "jwk": jose.public_jwk(key.public_key())
        }
    stranger = ec.generate_private_key(ec.SECP256R1())
    refused(
        plant, plant.token_by_assertion(plant.assertion(key=stranger)), "invalid_client", "assertion-signature", 401
    )
    plant.apply(certificates={"pump-1": certified(new)})
    refused(plant, plant.token_by_assertion(plant.assertion(key=former)), "invalid_client", "assertion-signature", 401)


def test_key_of_a_certificate_that_the_ca_revoked_is_refused(plant: Plant) -> None:
    new, former = ec.generate_private_key(ec.SECP256R1()), plant.pump_key
    plant.apply(certificates={"pump-1": certified(new, serial=0xAB12) + certified(former, serial=0xCD)})
    site.add_serials(plant.database, {"crl_number": 7, "revoked_serials": {"00AB12": "keyCompromise"}})
    refused(plant, plant.token_by_assertion(plant.assertion(key=new)), "invalid_client", "certificate-revoked", 401)
    assert plant.token_by_assertion(plant.assertion(key=former)).status_code == 200
    stranger = ec.generate_private_key(ec.SECP256R1())
    refused(
        plant, plant.token_by_assertion(plant.assertion(key=stranger)), "invalid_client", "assertion-signature", 401
    )


def test_key_that_was_certified_twice_is_good_while_one_of_the_certificates_is(plant: Plant) -> None:
    """A device that renews with the key that it has: the CA revokes the older certificate, as superseded."""
    pems = [certified(plant.pump_key, serial=serial, end=plant.clock.now + serial) for serial in (20, 10)]
    plant.apply(certificates={"pump-1": "".join(pems)}, revoked_serials={"a": "superseded"})
    assert plant.token_by_assertion().status_code == 200
    plant.apply(certificates={"pump-1": "".join(pems)}, revoked_serials={"14": "superseded"})
    assert plant.token_by_assertion().status_code == 200
    plant.clock.now += 11  # the one that is left has run out
    refused(plant, plant.token_by_assertion(), "invalid_client", "certificate-expired", 401)


def test_key_is_good_up_to_the_last_second_of_its_certificate(plant: Plant) -> None:
    plant.apply(certificates={"pump-1": certified(plant.pump_key, end=plant.clock.now + 100)})
    plant.clock.now += 100
    assert plant.token_by_assertion().status_code == 200
    plant.clock.now += 1
    refused(plant, plant.token_by_assertion(), "invalid_client", "certificate-expired", 401)


def test_former_key_may_be_of_another_kind(plant: Plant) -> None:
    """The algorithm of neither key is taken for the other's."""
    new, former = ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())
    plant.apply(certificates={"pump-1": certified(new) + certified(former)})
    for key in (former, new):
        assert plant.token_by_assertion(plant.assertion(key=key)).status_code == 200
    other = ec.generate_private_key(ec.SECP256R1())
    refused(plant, plant.token_by_assertion(plant.assertion(key=other)), "invalid_client", "assertion-algorithm", 401)
    forged = plant.assertion(key=ec.generate_private_key(ec.SECP384R1()))
    refused(plant, plant.token_by_assertion(forged), "invalid_client", "assertion-signature", 401)


def test_former_key_of_the_device_is_refused(plant: Plant) -> None:
    plant.apply(certificates={"pump-1": certified(ec.generate_private_key(ec.SECP256R1()))})
    refused(plant, plant.token_by_assertion(), "invalid_client", "assertion-signature", 401)


def test_key_of_a_revoked_device_is_refused(plant: Plant) -> None:
    plant.apply(compiled([{**row, "revoked": "superseded"} if row["device"] == "pump-1" else row for row in DEVICES]))
    refused(plant, plant.token_by_assertion(), "invalid_client", "revoked", 401)


def test_device_whose_key_the_ca_has_not_handed_over_is_refused(plant: Plant) -> None:
    plant.apply(certificates={})
    refused(plant, plant.token_by_assertion(), "invalid_client", "no-key-known", 401)


def test_token_is_bound_to_the_certificate_when_there_is_one(plant: Plant) -> None:
    mine = plant.certificate("pump-1")
    response = plant.token_by_assertion(certificate=mine)
    assert claims_of(response)["cnf"] == {"x5t#S256": thumbprint(mine)}
    assert (response.json or {})["token_type"] == "Bearer"  # noqa: S105


def test_gateway_is_no_audience_of_an_assertion(plant: Plant) -> None:
    response = plant.token_by_assertion(plant.assertion(aud=GATEWAY))
    refused(plant, response, "invalid_client", "assertion-audience", 401)
