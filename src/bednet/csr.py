# SPDX-License-Identifier: Apache-2.0
"""Certificate signing requests that devices made themselves (PKCS #10, RFC 2986).

- :func:`read`: reads and checks ``csr/<id>.csr`` of a site.
- :func:`public_key`: what tells two keys apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from bednet.errors import Place, Problem

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 64 * 1024
_RSA_BITS = (2048, 3072, 4096)


def read(path: Path, device_id: str) -> tuple[str | None, Problem | None]:  # noqa: PLR0911 - one for each refusal
    """Read the CSR of a device.

    :returns: its PEM; or None when there is no such file (the device waits), or with the problem when it is unusable.
    """
    place = Place(str(path), 1)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES)
    except FileNotFoundError:
        return None, None
    except OSError as error:
        message = f"the CSR cannot be read ({error.strerror})"
        return None, Problem(place, "file-unreadable", message, "make it a file that you may read")
    if b"PRIVATE KEY" in raw:
        cure = "delete the file here and in version control, make a new key on the device, and bring its CSR only"
        return None, Problem(place, "csr-private-key", "this file holds a private key, which is now known here", cure)
    try:
        request = x509.load_pem_x509_csr(raw)
        signed = request.is_signature_valid
        key = request.public_key()
        names = [str(name.value) for name in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature):
        cure = f"make it on the device: openssl req -new -key KEY -subj /CN={device_id} -out {device_id}.csr"
        return None, Problem(place, "csr-invalid", "the file is not a certificate signing request in PEM form", cure)
    if not signed:
        message = "the signature of this CSR is wrong, so the sender may not hold the key"
        return None, Problem(place, "csr-signature", message, "bring the CSR from the device again")
    if not _usable(key):
        cure = "make a P-256, P-384, RSA-2048, RSA-3072, RSA-4096 or Ed25519 key on the device, and a new CSR"
        return None, Problem(place, "csr-key", "the key in this CSR is of a type that bednet does not certify", cure)
    if names not in ([], [device_id]):
        message = f"this CSR was made for {names[0]!r}, not for '{device_id}'"
        cure = f"give the file the name of its device, or make the CSR with -subj /CN={device_id}"
        return None, Problem(place, "csr-name", message, cure)
    return request.public_bytes(serialization.Encoding.PEM).decode("ascii"), None


def _usable(key: object) -> bool:
    if isinstance(key, rsa.RSAPublicKey):
        return key.key_size in _RSA_BITS
    if isinstance(key, ec.EllipticCurvePublicKey):
        return isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1)
    return isinstance(key, ed25519.Ed25519PublicKey)


def public_key(pem: str) -> bytes:
    """Return the public key of a checked CSR as DER (SubjectPublicKeyInfo)."""
    key = x509.load_pem_x509_csr(pem.encode("ascii")).public_key()
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
