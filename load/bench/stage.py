# SPDX-License-Identifier: Apache-2.0
"""What the brokers of a benchmark share: who there is, and the certificates.

- :class:`Kind`: a broker, and for how many devices.
- :class:`Programs`: what is run.
- :class:`Stage`: a folder with a CA and the certificates of those that connect.
- :data:`OPENSSL_CONFIGURATION`: what makes TLS the same for all.
"""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from pathlib import Path

READER, ADMIN, SERVER = "reader", "admin", "server"
#: Those that read what a device publishes to many.
READERS = tuple(f"{READER}-{number:02d}" for number in range(21))
#: For OPENSSL_CONF of the generator and of the brokers that use OpenSSL. The key exchange and the cipher are those that
#: bednet's role puts first, and the generator offers no other, so that all brokers do the same sums.
OPENSSL_CONFIGURATION = """\
openssl_conf = init
[init]
ssl_conf = module
[module]
system_default = defaults
[defaults]
MinProtocol = TLSv1.2
Groups = X25519:P-256
Ciphersuites = TLS_AES_128_GCM_SHA256
"""
_SIGNS_CERTIFICATES = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)
_Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True)
class Kind:
    """A broker that is measured: its name, and the devices that it knows (0 where it knows none)."""

    name: str
    devices: int = 0

    def __str__(self) -> str:
        return f"{self.name}, {self.devices:,} devices" if self.devices else self.name


def device(number: int) -> str:
    """Return the id of a device."""
    return f"d{number:07d}"


@dataclass(frozen=True)
class Programs:
    """What is run.

    :param node_modules: the folder with npm's packages; None where there is none.
    :param python_peers: the folder with PyPI's packages that are compared with; None where there is none.
    """

    mosquitto: str
    bednet_plugin: str
    dynamic_security: str
    node_modules: Path | None = None
    python_peers: Path | None = None


def _new_key(kind: str) -> _Key:
    if kind == "RSA-2048":
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    if kind == "Ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(ec.SECP384R1() if kind == "P-384" else ec.SECP256R1())


@dataclass
class Stage:
    """A folder with a CA, a server's certificate, and certificates made on demand."""

    folder: Path
    programs: Programs
    _contexts: dict[tuple[str, bool], ssl.SSLContext] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._now = datetime.now(UTC)
        self.ca = self.folder / "ca.pem"
        self._issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench CA")])
        certificate = (
            self._builder(self._issuer, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_SIGNS_CERTIFICATES, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject: x509.Name, key: _Key) -> x509.CertificateBuilder:
        public = key.public_key()
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._issuer)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now - timedelta(hours=1))
            .not_valid_after(self._now + timedelta(days=2))
            # Python 3.13 wants both in a chain.
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )

    def identity(self, name: str, key_type: str = "P-256") -> tuple[Path, Path]:
        """Return the paths of a certificate and its key, made when first asked for."""
        stem = name if key_type == "P-256" else f"{name}-{key_type}"
        certificate, key_path = self.folder / f"{stem}.pem", self.folder / f"{stem}.key"
        if not certificate.exists():
            key = _new_key(key_type)
            usage = ExtendedKeyUsageOID.SERVER_AUTH if name == SERVER else ExtendedKeyUsageOID.CLIENT_AUTH
            address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
            made = (
                self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key)
                .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
                .add_extension(address, critical=False)
                .sign(self._key, hashes.SHA256())
            )
            key_path.touch(mode=0o600)
            key_path.write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                )
            )
            certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        return certificate, key_path

    def revocation_list(self, entries: int) -> Path:
        """Return the path of a CRL of the CA that names so many certificates, made when first asked for."""
        path = self.folder / f"crl-{entries}.pem"
        if not path.exists():
            builder = x509.CertificateRevocationListBuilder().issuer_name(self._issuer)
            builder = builder.last_update(self._now - timedelta(hours=1)).next_update(self._now + timedelta(days=2))
            builder = builder.add_extension(x509.CRLNumber(1), critical=False).add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            for _ in range(entries):
                entry = x509.RevokedCertificateBuilder().serial_number(x509.random_serial_number())
                builder = builder.add_revoked_certificate(entry.revocation_date(self._now).build())
            path.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return path

    def context(self, name: str, *, tls12: bool = False) -> ssl.SSLContext:
        """Return the TLS settings of a client with its certificate; the same each time, as sessions are bound to them.

        :param tls12: whether it speaks TLS 1.2 and nothing newer.
        """
        if (name, tls12) not in self._contexts:
            context = ssl.create_default_context(cafile=str(self.ca))
            context.check_hostname = False
            context.load_cert_chain(*self.identity(name))
            if tls12:
                context.maximum_version = ssl.TLSVersion.TLSv1_2
            self._contexts[name, tls12] = context
        return self._contexts[name, tls12]
