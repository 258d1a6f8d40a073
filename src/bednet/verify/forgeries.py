# SPDX-License-Identifier: Apache-2.0
"""Certificates in the probe's name that nobody should accept, made for one run."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from bednet.probe import Credentials
from bednet.verify.task import Identity, VerifyError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Forgeries:
    """Certificates that nobody should accept, in the probe's name."""

    self_signed: Credentials
    false_ca: Credentials
    copied_key_id: Credentials


@contextlib.contextmanager
def make_forgeries(identity: Identity) -> Iterator[Forgeries]:
    """Make certificates in the probe's name that no gateway may accept; they go away with the context."""
    try:
        leaf = x509.load_pem_x509_certificate(identity.certificate.read_bytes())
    except (OSError, ValueError) as exc:
        raise VerifyError(f"{identity.certificate}: not a certificate: {exc}") from exc
    with tempfile.TemporaryDirectory(prefix="bednet-verify-") as folder:
        place = Path(folder)
        false_key = ec.generate_private_key(ec.SECP256R1())
        false_ca = false_certificate(leaf.issuer, leaf.issuer, false_key, false_key, ca=True)

        def made(
            name: str, issuer: x509.Name, signer: ec.EllipticCurvePrivateKey | None, key_id: bytes | None
        ) -> Credentials:
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = false_certificate(leaf.subject, issuer, key, signer or key, key_id=key_id)
            pem, key_file = place / f"{name}.pem", place / f"{name}.key"
            chain = [certificate] if signer is None else [certificate, false_ca]
            pem.write_bytes(b"".join(item.public_bytes(serialization.Encoding.PEM) for item in chain))
            key_file.write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                )
            )
            return Credentials(pem, key_file)

        try:
            true_id = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        except x509.ExtensionNotFound:
            true_id = None
        false_id = x509.SubjectKeyIdentifier.from_public_key(false_key.public_key()).digest
        yield Forgeries(
            made("self-signed", leaf.subject, None, None),
            made("false-ca", leaf.issuer, false_key, false_id),
            made("copied-key-id", leaf.issuer, false_key, true_id),
        )


def false_certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    *,
    ca: bool = False,
    key_id: bytes | None = None,
) -> x509.Certificate:
    """Issue a certificate for a client, or a CA, that is good from an hour ago for a day.

    :param key_id: what it says of its issuer's key.
    """
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
    )
    if ca:
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    else:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    if key_id is not None:
        builder = builder.add_extension(x509.AuthorityKeyIdentifier(key_id, None, None), critical=False)
    return builder.sign(signer, hashes.SHA256())
