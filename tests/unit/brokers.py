# SPDX-License-Identifier: Apache-2.0
"""Mosquitto brokers for the tests of `bednet verify`: one as a gateway should be, and ones that are lax on purpose.

- :class:`PKI`: a root, an issuing CA, a server's certificate, the probe's and the revoked canary's, in a folder.
- :func:`configuration`: mosquitto.conf of a strict gateway, with what a test wants otherwise.
- :class:`LocalBroker`: a broker process of this machine, as a context manager that shows its log when a test failed.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import os
import secrets
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bednet.verify import Gateway, Identity

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

PROBE = "bednet-probe"
SERVER_NAME = "gateway-1.plant.example"
ADDRESS = "127.0.0.1"
PASSWORD = secrets.token_urlsafe(16)
ACL = f"""user {PROBE}
topic readwrite bednet/probe/own/#
topic read bednet/probe/read-only/#
topic write bednet/probe/write-only/#
"""
STRONG = "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES128-GCM-SHA256"


def pem(*certificates: x509.Certificate) -> bytes:
    """Return certificates one after the other."""
    return b"".join(item.public_bytes(serialization.Encoding.PEM) for item in certificates)


def write_key(path: Path, key: Key) -> None:
    """Write a key that only this user can read."""
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def password_hash(password: str) -> str:
    """Return the hash of a password as mosquitto_passwd writes it: $7$, PBKDF2-SHA512."""
    salt, iterations = os.urandom(12), 101
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, iterations)
    return f"$7${iterations}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


@dataclass(frozen=True)
class PKI:
    """A CA in a folder; :meth:`make` makes what a strict gateway needs."""

    folder: Path
    root: x509.Certificate
    issuing: x509.Certificate
    issuing_key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, folder: Path, now: datetime) -> PKI:
        """Make the CA, and certificates for the server, the probe and the canary; the canary's is revoked."""
        root_key, issuing_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

        def authority(
            name: str, key: ec.EllipticCurvePrivateKey, issuer: str, signer: ec.EllipticCurvePrivateKey
        ) -> Any:
            return (
                x509.CertificateBuilder()
                .subject_name(_name(name))
                .issuer_name(_name(issuer))
                .public_key(key.public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - timedelta(days=1))
                .not_valid_after(now + timedelta(days=30))
                .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
                .sign(signer, hashes.SHA256())
            )

        root = authority("test root", root_key, "test root", root_key)
        issuing = authority("test issuing CA", issuing_key, "test root", root_key)
        pki = cls(folder, root, issuing, issuing_key)
        (folder / "ca.pem").write_bytes(pem(root, issuing))
        pki.issue("server", now, dns=[SERVER_NAME], ip=[ADDRESS], usage=[ExtendedKeyUsageOID.SERVER_AUTH])
        pki.issue("probe", now, common_name=PROBE)
        canary = pki.issue("canary", now, common_name="bednet-canary")
        crl = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(issuing.subject)
            .last_update(now - timedelta(hours=1))
            .next_update(now + timedelta(days=1))
            .add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(canary.serial_number)
                .revocation_date(now - timedelta(hours=1))
                .build()
            )
            .sign(issuing_key, hashes.SHA256())
        )
        (folder / "crl.pem").write_bytes(crl.public_bytes(serialization.Encoding.PEM))
        (folder / "passwords").write_text(f"{PROBE}:{password_hash(PASSWORD)}\n", encoding="utf-8")
        (folder / "acl").write_text(ACL, encoding="utf-8")
        return pki

    def issue(
        self,
        file: str,
        now: datetime,
        *,
        common_name: str = SERVER_NAME,
        dns: list[str] | None = None,
        ip: list[str] | None = None,
        usage: list[x509.ObjectIdentifier] | None = None,
        ends: timedelta = timedelta(days=10),
        key: Key | None = None,
    ) -> x509.Certificate:
        """Issue a certificate into ``FILE.pem`` (with its chain) and ``FILE.key``."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.DNSName(item) for item in dns or []]
        names += [x509.IPAddress(ipaddress.ip_address(item)) for item in ip or []]
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(common_name))
            .issuer_name(self.issuing.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=2))
            .not_valid_after(now + ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage or [ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.issuing_key.public_key()), critical=False
            )
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self.issuing_key, hashes.SHA256())
        (self.folder / f"{file}.pem").write_bytes(pem(certificate, self.issuing))
        write_key(self.folder / f"{file}.key", key)
        return certificate

    def identity(self) -> Identity:
        """Return the probe's identity."""
        return Identity(
            PROBE,
            self.folder / "probe.pem",
            self.folder / "probe.key",
            self.folder / "ca.pem",
            password=PASSWORD,
            topic="bednet/probe/own",
            unwritable_topic="bednet/probe/read-only",
            unreadable_topic="bednet/probe/write-only",
        )


@dataclass(frozen=True)
class Ports:
    """The ports of a broker."""

    mtls: int
    password: int
    plaintext: int

    @classmethod
    def free(cls) -> Ports:
        """Return three ports that nobody uses now."""
        sockets = [socket.create_server((ADDRESS, 0)) for _ in range(3)]
        ports = [item.getsockname()[1] for item in sockets]
        for item in sockets:
            item.close()
        return cls(*ports)

    def gateway(self, name: str = "gateway-1") -> Gateway:
        """Return how such a broker describes itself to `bednet verify`."""
        return Gateway(
            name,
            ADDRESS,
            SERVER_NAME,
            mtls_port=self.mtls,
            password_port=self.password,
            plaintext_port=self.plaintext,
            max_packet_size=65536,
        )


Options = dict[str, str | None]


def configuration(
    folder: Path,
    ports: Ports,
    *,
    both: Mapping[str, str | None] | None = None,
    mtls: Mapping[str, str | None] | None = None,
    password: Mapping[str, str | None] | None = None,
    more: str = "",
    max_packet_size: int | None = 65536,
) -> str:
    """Return the mosquitto.conf of a strict gateway, changed as a test wants it; an option that is None is left out.

    :param both: options of both listeners.
    :param more: lines at the end, such as one more listener.
    """
    common: Options = {
        "certfile": f"{folder}/server.pem",
        "keyfile": f"{folder}/server.key",
        "tls_version": "tlsv1.2",
        "ciphers": STRONG,
        "allow_anonymous": "false",
        "acl_file": f"{folder}/acl",
        "password_file": f"{folder}/passwords",
        "use_username_as_clientid": "true",
        **(both or {}),
    }
    certificates: Options = {
        **common,
        "cafile": f"{folder}/ca.pem",
        "crlfile": f"{folder}/crl.pem",
        "require_certificate": "true",
        "use_identity_as_username": "true",
        **(mtls or {}),
    }
    lines = [
        "per_listener_settings true",
        "set_tcp_nodelay true",
        "persistence false",
        "log_dest stderr",
        "sys_interval 1",
    ]
    if os.geteuid() == 0:
        lines.append("user root")
    if max_packet_size:
        lines.append(f"max_packet_size {max_packet_size}")
    for port, options in ((ports.mtls, certificates), (ports.password, {**common, **(password or {})})):
        lines.append(f"listener {port} {ADDRESS}")
        lines += [f"{name} {value}" for name, value in options.items() if value is not None]
    return "\n".join([*lines, more]) + "\n"


def mosquitto() -> str | None:
    """Return the broker's program on this machine, or None."""
    return os.environ.get("BEDNET_MOSQUITTO") or shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")


class LocalBroker:
    """A broker on this machine; a context manager that ends it."""

    def __init__(self, program: str, folder: Path, ports: Ports, text: str) -> None:
        self._program, self._folder, self._ports = program, folder, ports
        (folder / "mosquitto.conf").write_text(text, encoding="utf-8")
        self._log = folder / "mosquitto.log"

    def __enter__(self) -> LocalBroker:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [self._program, "-c", str(self._folder / "mosquitto.conf")], stdin=subprocess.DEVNULL, stderr=log
            )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise AssertionError(f"the broker did not start:\n{self._log.read_text()}")
            try:
                for port in (self._ports.mtls, self._ports.password):
                    socket.create_connection((ADDRESS, port), 1).close()
            except ConnectionRefusedError:
                time.sleep(0.01)  # there is no event for "it listens"
            else:
                return self
        self.__exit__()
        raise AssertionError(f"the broker does not listen:\n{self._log.read_text()}")

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        if exc and exc[0] is not None:
            print(self._log.read_text()[-3000:])  # noqa: T201 - pytest shows it with the failure


def now() -> datetime:
    """Return the time: a live broker looks at the real clock."""
    return datetime.now(UTC)
