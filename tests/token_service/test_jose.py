# SPDX-License-Identifier: Apache-2.0
"""RFC 7515, 7517, 7638: our signed JSON against the examples of the standards and against another implementation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from bednet.token_service import jose

# RFC 7515, A.3.1: the example of ES256.
A3_KEY = {
    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
}
A3 = (
    "eyJhbGciOiJFUzI1NiJ9"
    ".eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
    ".DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
)


def p256(jwk: dict[str, str]) -> ec.EllipticCurvePublicKey:
    point = b"\x04" + jose.decode(jwk["x"]) + jose.decode(jwk["y"])
    return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)


def test_example_of_rfc_7515_appendix_a_3_holds() -> None:
    parsed = jose.parse(A3)
    jose.verify(parsed, p256(A3_KEY), ["ES256"])
    assert parsed.claims["iss"] == "joe"


def test_thumbprint_is_that_of_rfc_8037_appendix_a_3() -> None:
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
    assert jose.thumbprint(jwk) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


# RFC 9864 has the name Ed25519 for what RFC 8037 calls EdDSA; brokers know the older one.
@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")
@pytest.mark.parametrize("make", [lambda: ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate])
def test_another_implementation_takes_what_we_sign(make: Any) -> None:
    joserfc = pytest.importorskip("joserfc.jwt", reason="the implementation to compare with is not installed")
    import_key = pytest.importorskip("joserfc.jwk").import_key
    key = make()
    text = jose.sign(key, {"typ": "at+jwt", "kid": "k"}, {"sub": "edge-1", "ü": "é"})
    other = import_key(jose.public_jwk(key.public_key()))
    found = joserfc.decode(text, other, algorithms=["ES256", "EdDSA", "Ed25519"])
    assert (found.header["typ"], found.claims) == ("at+jwt", {"sub": "edge-1", "ü": "é"})


@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")
@pytest.mark.parametrize(
    ("make", "algorithm"),
    [
        (lambda: ec.generate_private_key(ec.SECP256R1()), "ES256"),
        (lambda: ec.generate_private_key(ec.SECP384R1()), "ES384"),
        (ed25519.Ed25519PrivateKey.generate, "EdDSA"),
        (lambda: rsa.generate_private_key(65537, 2048), "RS256"),
        (lambda: rsa.generate_private_key(65537, 2048), "PS256"),
    ],
    ids=["ES256", "ES384", "EdDSA", "RS256", "PS256"],
)
def test_we_take_what_another_implementation_signs(make: Any, algorithm: str) -> None:
    joserfc = pytest.importorskip("joserfc.jwt", reason="the implementation to compare with is not installed")
    import_key = pytest.importorskip("joserfc.jwk").import_key
    key = make()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    kind = {"E": "EC", "R": "RSA", "P": "RSA"}[algorithm[0]] if algorithm != "EdDSA" else "OKP"
    text = joserfc.encode({"alg": algorithm}, {"sub": "x"}, import_key(pem, kind), algorithms=[algorithm])
    jose.verify(jose.parse(text), key.public_key(), [algorithm])
    with pytest.raises(jose.JoseError, match="algorithm"):
        jose.verify(jose.parse(text), key.public_key(), [])
    with pytest.raises(jose.JoseError, match="signature"):
        jose.verify(jose.parse(text[: text.rindex(".")] + ".AAAA"), key.public_key(), [algorithm])


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256K1()).public_key(),
        ec.generate_private_key(ec.SECP521R1()).public_key(),
        rsa.generate_private_key(65537, 1024).public_key(),  # noqa: S505 - it is to be refused
    ],
    ids=["secp256k1", "P-521", "RSA-1024"],
)
def test_weak_and_odd_keys_are_refused(key: Any) -> None:
    with pytest.raises(jose.JoseError, match="none of P-256"):
        jose.algorithms_of(key)


@pytest.mark.parametrize("text", ["a", "ab=", "a+b/", "ab\n", "é", "AB", " AAA"])
def test_base64url_has_one_spelling(text: str) -> None:
    with pytest.raises(jose.JoseError, match="base64url"):
        jose.decode(text)


@given(st.binary(max_size=100))
def test_base64url_reads_as_it_was_written(data: bytes) -> None:
    assert jose.decode(jose.encode(data)) == data


@given(st.text(max_size=200) | st.lists(st.binary(max_size=40).map(jose.encode), max_size=4).map(".".join))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        parsed = jose.parse(text)
    except jose.JoseError:
        return
    assert json.dumps(parsed.header)
    assert len(text) <= jose.LONGEST
