# SPDX-License-Identifier: Apache-2.0
"""Keys as issuers of tokens publish them (RFC 7517), made with ``cryptography``."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.base64url import encode


def number(value: int, size: int | None = None) -> str:
    """Return a number as base64url (RFC 7518, 2)."""
    return encode(value.to_bytes(size or (value.bit_length() + 7) // 8, "big"))


def jwk(key: Any, **more: object) -> dict[str, Any]:
    """Return a public key, or a private one of a curve, as JWK."""
    found: dict[str, Any]
    if isinstance(key, ec.EllipticCurvePrivateKey):
        private = number(key.private_numbers().private_value, 32)
        return jwk(key.public_key(), d=private, **more)
    if isinstance(key, ec.EllipticCurvePublicKey):
        size = (key.curve.key_size + 7) // 8
        point = key.public_numbers()
        curve = {"secp256r1": "P-256", "secp384r1": "P-384"}[key.curve.name]
        found = {"kty": "EC", "crv": curve, "x": number(point.x, size), "y": number(point.y, size)}
    elif isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        found = {"kty": "RSA", "n": number(numbers.n), "e": number(numbers.e)}
    else:
        assert isinstance(key, ed25519.Ed25519PublicKey)
        found = {"kty": "OKP", "crv": "Ed25519", "x": number(int.from_bytes(key.public_bytes_raw(), "big"), 32)}
    return found | more


def spki(key: Any) -> bytes:
    """Return what the store keeps of a public key."""
    der: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return der
