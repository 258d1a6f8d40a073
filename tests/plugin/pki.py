# SPDX-License-Identifier: Apache-2.0
"""A CA for the tests of the plugin, and certificates as a good CA would not issue them."""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bednet.probe import Credentials

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SERVER_NAME = "gateway-1.plant.example"
HOUR = dt.timedelta(hours=1)
_OTHER_USAGES = ("content_commitment", "data_encipherment", "decipher_only", "digital_signature", "encipher_only")
CA_USAGE = x509.KeyUsage(
    key_cert_sign=True,
    crl_sign=True,
    key_agreement=False,
    key_encipherment=False,
    **dict.fromkeys(_OTHER_USAGES, False),
)


def now() -> dt.datetime:
    """Return the time: a live broker looks at the real clock."""
    return dt.datetime.now(dt.UTC)


def common_name(text: str) -> x509.NameAttribute[str]:
    return x509.NameAttribute(NameOID.COMMON_NAME, text)


@dataclass(frozen=True)
class Issued:
    """A certificate that was issued.

    :ivar serial: as the store takes it, in hexadecimal.
    """

    credentials: Credentials
    certificate: x509.Certificate

    @property
    def serial(self) -> str:
        return f"{self.certificate.serial_number:x}"

    @property
    def ends(self) -> dt.datetime:
        return self.certificate.not_valid_after_utc


@dataclass(frozen=True)
class Authority:
    """A CA in a folder, with a server's certificate."""

    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, folder: Path) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([common_name("test CA")])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now() - 24 * HOUR)
            .not_valid_after(now() + 24 * HOUR)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            # Python 3.13 and later want to see it.
            .add_extension(CA_USAGE, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        authority = cls(folder, certificate, key)
        (folder / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        authority.issue("server", [common_name(SERVER_NAME)], server=True)
        return authority

    def device(self, device: str, *, ends: dt.datetime | None = None, key: rsa.RSAPrivateKey | None = None) -> Issued:
        """Issue what a good CA issues to a device, by default with a new key on P-256."""
        return self.issue(device, [common_name(device)], ends=ends, key=key)

    def issue(
        self,
        file: str,
        subject: Sequence[x509.NameAttribute[str]],
        *,
        ends: dt.datetime | None = None,
        server: bool = False,
        key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
    ) -> Issued:
        """Issue a certificate with any subject."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(subject))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now() - HOUR)
            .not_valid_after(ends or now() + HOUR)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if server:
            names = [x509.DNSName(SERVER_NAME), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        if not server:
            file = f"{file}-{certificate.serial_number:x}"  # a device may have several
        path, key_path = self.folder / f"{file}.pem", self.folder / f"{file}.key"
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_path.touch(mode=0o600)
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return Issued(Credentials(path, key_path), certificate)
