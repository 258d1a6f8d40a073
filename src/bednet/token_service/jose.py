# SPDX-License-Identifier: Apache-2.0
"""Signed JSON: as much of RFC 7515, 7517, 7518 and 7638 as the token service needs, and no more.

- :func:`sign`, :func:`parse`, :func:`verify`: compact JWS.
- :func:`public_jwk`, :func:`thumbprint`: keys as JSON.
- :func:`algorithms_of`: what a key may be used for here.

What is signed with is decided by the key and by the caller, never by the token: each kind of key has its algorithms.
docs/decisions/0014-token-service.md says why this is no library's.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils

from bednet.errors import BednetError

if TYPE_CHECKING:
    from collections.abc import Collection

Json: TypeAlias = dict[str, Any]
PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PublicKey: TypeAlias = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey

LONGEST = 8192
"""Bytes of a token; the plugin reads no longer one either."""

LEAST_RSA_BITS = 2048
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*")
_CURVES = {"secp256r1": ("P-256", "ES256", 32), "secp384r1": ("P-384", "ES384", 48)}
_HASHES: dict[str, hashes.HashAlgorithm] = {"ES256": hashes.SHA256(), "ES384": hashes.SHA384()}


class JoseError(BednetError):
    """A token or key is refused; the message is for the operator and holds nothing of the token.

    :ivar code: ``malformed``, ``algorithm``, ``signature`` or ``key``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, repr=False)
class Parsed:
    """A token taken apart; nothing in it is true before :func:`verify`."""

    header: Json
    claims: Json
    signed: bytes
    signature: bytes


def encode(data: bytes) -> str:
    """Return base64url without padding (RFC 7515, 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode(text: str) -> bytes:
    """Read base64url without padding, in its only spelling.

    :raises JoseError: when it is something else.
    """
    if not _BASE64URL.fullmatch(text):
        raise JoseError("malformed", "it is not base64url")
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise JoseError("malformed", "it is not base64url") from None
    if encode(data) != text:
        raise JoseError("malformed", "its base64url has bits that mean nothing")
    return data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def strict_json(data: bytes) -> object:
    """Read JSON (RFC 8259) in which no object has a name twice.

    :raises ValueError: when it is something else, or too deep.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is too deep") from None


def compact_json(data: object) -> bytes:
    """Write JSON without spaces."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()


def algorithms_of(key: PublicKey) -> tuple[str, ...]:
    """Return the algorithms that a key may verify with (RFC 7518, 3.1; RFC 8037, 3.1).

    :raises JoseError: when it is of no kind that may be used here.
    """
    if isinstance(key, ed25519.Ed25519PublicKey):
        return ("EdDSA",)
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return (_CURVES[key.curve.name][1],)
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= LEAST_RSA_BITS:
        return ("PS256", "RS256")
    raise JoseError("key", "the key is none of P-256, P-384, Ed25519 and RSA of 2048 bits or more")


def sign(key: PrivateKey, header: Json, claims: Json) -> str:
    """Return a compact JWS (RFC 7515, 7.1).

    :param header: all but ``alg``, which follows from the key: ES256 or EdDSA.
    """
    (algorithm,) = algorithms_of(key.public_key())
    parts = (compact_json({"alg": algorithm, **header}), compact_json(claims))
    signed = ".".join(map(encode, parts)).encode()
    if isinstance(key, ed25519.Ed25519PrivateKey):
        signature = key.sign(signed)
    else:
        size = _CURVES[key.curve.name][2]
        pair = utils.decode_dss_signature(key.sign(signed, ec.ECDSA(_HASHES[algorithm])))
        signature = b"".join(number.to_bytes(size, "big") for number in pair)
    return f"{signed.decode()}.{encode(signature)}"


def parse(token: str) -> Parsed:
    """Take a compact JWS with claims apart.

    :raises JoseError: when it is too long or malformed, has a name twice, or asks to understand more (``crit``).
    """
    if len(token) > LONGEST:
        raise JoseError("malformed", f"it is longer than {LONGEST} bytes")
    parts = token.split(".")
    if len(parts) != 3:  # noqa: PLR2004 - header, claims, signature
        raise JoseError("malformed", "it has not three parts")
    try:
        header, claims = (strict_json(decode(part)) for part in parts[:2])
    except ValueError:
        raise JoseError("malformed", "its header or claims are not JSON, or have a name twice") from None
    if not isinstance(header, dict) or not isinstance(claims, dict):
        raise JoseError("malformed", "its header or claims are no JSON object")
    # RFC 7515, 4.1.11: what is critical and not understood is refused; and keys are ours to choose, not the header's.
    if unwanted := sorted(header.keys() & {"crit", "b64", "jku", "jwk", "x5u", "x5c"}):
        raise JoseError("malformed", f"its header has {unwanted[0]!r}")
    return Parsed(header, claims, ".".join(parts[:2]).encode(), decode(parts[2]))


def verify(parsed: Parsed, key: PublicKey, algorithms: Collection[str]) -> None:
    """Make sure that a token was signed with a key.

    :param algorithms: those that the caller accepts; of these the key's own kind leaves one or two.
    :raises JoseError: when it was not.
    """
    algorithm = parsed.header.get("alg")
    if algorithm not in algorithms_of(key) or algorithm not in algorithms:
        raise JoseError("algorithm", "its algorithm is not one that this key is used with")
    try:
        _check(parsed, key, algorithm)
    except InvalidSignature:
        raise JoseError("signature", "its signature is wrong") from None


def _check(parsed: Parsed, key: PublicKey, algorithm: str) -> None:
    if isinstance(key, ed25519.Ed25519PublicKey):
        key.verify(parsed.signature, parsed.signed)
    elif isinstance(key, ec.EllipticCurvePublicKey):
        size = _CURVES[key.curve.name][2]
        if len(parsed.signature) != 2 * size:
            raise InvalidSignature
        pair = (int.from_bytes(parsed.signature[at : at + size], "big") for at in (0, size))
        key.verify(utils.encode_dss_signature(*pair), parsed.signed, ec.ECDSA(_HASHES[algorithm]))
    elif algorithm == "PS256":
        # RFC 7518, 3.5: the salt is as long as the hash.
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256.digest_size)
        key.verify(parsed.signature, parsed.signed, pss, hashes.SHA256())
    else:
        key.verify(parsed.signature, parsed.signed, padding.PKCS1v15(), hashes.SHA256())


def public_jwk(key: PublicKey) -> Json:
    """Return the required members of a public key (RFC 7518, 6; RFC 8037, 2)."""
    if isinstance(key, ed25519.Ed25519PublicKey):
        raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return {"crv": "Ed25519", "kty": "OKP", "x": encode(raw)}
    if isinstance(key, ec.EllipticCurvePublicKey):
        name, _, size = _CURVES[key.curve.name]
        point = key.public_numbers()
        return {
            "crv": name,
            "kty": "EC",
            "x": encode(point.x.to_bytes(size, "big")),
            "y": encode(point.y.to_bytes(size, "big")),
        }
    numbers = key.public_numbers()
    return {"e": encode(_shortest(numbers.e)), "kty": "RSA", "n": encode(_shortest(numbers.n))}


def _shortest(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def thumbprint(jwk: Json) -> str:
    """Return the thumbprint of what :func:`public_jwk` returns (RFC 7638): SHA-256, base64url."""
    return encode(hashlib.sha256(compact_json(dict(sorted(jwk.items())))).digest())
