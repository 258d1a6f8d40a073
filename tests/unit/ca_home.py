# SPDX-License-Identifier: Apache-2.0
"""A CA's home for the tests: what the role ``ca`` makes, made with cryptography.

It runs with every library version that ``bednet-ca`` runs with, and makes a root and an issuing CA on demand.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from bednet import ca

if TYPE_CHECKING:
    from pathlib import Path

START = datetime(2026, 1, 1, tzinfo=UTC)
ISSUING_DAYS = 1800
ROOT_DAYS = 3650
CA_USAGE = x509.KeyUsage(
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


def subject(name: str | None, organisation: str = "Plant Example") -> x509.Name:
    """Build a name as our CAs have it: O, CN."""
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation)]
    return x509.Name(parts + ([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name is not None else []))


def hash_for(key: object) -> hashes.SHA256 | None:
    """Choose the hash a key signs with."""
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()


def make_ca(
    key: ca.PrivateKey,
    name: str,
    *,
    start: datetime = START,
    days: float = ISSUING_DAYS,
    path_length: int | None = 0,
    issuer: tuple[x509.Certificate, ca.PrivateKey] | None = None,
    constraints: x509.NameConstraints | None = None,
) -> x509.Certificate:
    """Make a CA certificate, signed by ``issuer`` or by itself."""
    signer = issuer[1] if issuer else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject(name))
        .issuer_name(issuer[0].subject if issuer else subject(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(CA_USAGE, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if constraints:
        builder = builder.add_extension(constraints, critical=True)
    return builder.sign(signer, hash_for(signer))


CONSTRAINTS = x509.NameConstraints(
    permitted_subtrees=[
        x509.DNSName("plant.example"),
        x509.DNSName("gateway-1"),
        x509.IPAddress(ipaddress.ip_network("10.20.0.0/16")),
    ],
    excluded_subtrees=[x509.DNSName("office.plant.example"), x509.IPAddress(ipaddress.ip_network("::/0"))],
)


@dataclass(frozen=True)
class Home:
    """One CA's folder, and the commands with sensible requests."""

    path: Path

    def run(self, command: str, request: object, now: datetime, *, check: bool = False) -> Any:
        """Run a command of the tool."""
        return ca.run(command, request, home=self.path, now=now, check=check)

    def sync(self, devices: list[dict[str, Any]], now: datetime, *, check: bool = False, **more: Any) -> Any:
        """Run sync-devices with these devices."""
        request = {"devices": devices, "days": 90, "renew_before_days": 30, "revoke_at_most": 1000, "gateways": []}
        return self.run("sync-devices", {**request, **more}, now, check=check)

    def entries(self) -> dict[str, ca.Entry]:
        """Read the index as the tool does."""
        return ca.Store(self.path, check=True).entries

    def crl(self) -> x509.CertificateRevocationList:
        """Read the published CRL."""
        return x509.load_der_x509_crl((self.path / "publish/issuing.crl").read_bytes())

    def listed(self) -> dict[str, str]:
        """Read the published CRL as serial -> reason."""
        return {f"{revoked.serial_number:040x}": ca._reason(revoked) for revoked in self.crl()}

    def issuer(self) -> tuple[x509.Certificate, ca.PrivateKey]:
        """Return the issuing CA's certificate and key."""
        authority = ca.Authority.load(self.path)
        return authority.issuing, authority.key

    def snapshot(self) -> dict[str, bytes]:
        """Read all files, to tell whether anything was written."""
        return {str(file.relative_to(self.path)): file.read_bytes() for file in self.path.rglob("*") if file.is_file()}


def make_home(
    path: Path,
    *,
    key_type: str = "P-256",
    start: datetime = START,
    issuing_days: float = ISSUING_DAYS,
    root_days: float = ROOT_DAYS,
    constraints: x509.NameConstraints | None = CONSTRAINTS,
) -> Home:
    """Make root and issuing CA in a folder."""
    root_key, key = ca.make_key(key_type), ca.make_key(key_type)
    root = make_ca(root_key, "Plant Example root CA", start=start, days=root_days, path_length=1)
    issuing = make_ca(
        key,
        "Plant Example issuing CA",
        start=start,
        days=issuing_days,
        issuer=(root, root_key),
        constraints=constraints,
    )
    for folder in ("root", "issuing"):
        (path / folder).mkdir(parents=True, exist_ok=True)
    (path / "root/root.pem").write_bytes(root.public_bytes(Encoding.PEM))
    (path / "issuing/issuing.pem").write_bytes(issuing.public_bytes(Encoding.PEM))
    (path / "issuing/issuing.key").touch(mode=0o600)
    (path / "issuing/issuing.key").write_text(ca.key_pem(key))
    return Home(path)


def make_csr(
    key: Any,
    name: str | None,
    *,
    dns: tuple[str, ...] = (),
    ip: tuple[str, ...] = (),
    extensions: tuple[x509.ExtensionType, ...] = (),
) -> str:
    """Make a CSR as a device or gateway does."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name is not None else [])
    )
    names: list[x509.GeneralName] = [x509.DNSName(item) for item in dns]
    names += [x509.IPAddress(ipaddress.ip_address(item)) for item in ip]
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, hash_for(key)).public_bytes(Encoding.PEM).decode()


def small_rsa(bits: int) -> rsa.RSAPrivateKey:
    """Make an RSA key that nobody should accept."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)
