# SPDX-License-Identifier: Apache-2.0
"""Mosquitto brokers for the tests of `bednet verify`: one as a gateway should be, and ones that are lax on purpose.

- :class:`PKI`: a root, an issuing CA, a server's certificate, the probe's and the revoked canary's, in a folder.
- :func:`configuration`: mosquitto.conf of a strict gateway, with what a test wants otherwise.
- :class:`LabStage`, :class:`LocalStage`: where brokers run; each shows a broker's log when a test failed.
"""

from __future__ import annotations

import base64
import hashlib
import io
import ipaddress
import os
import secrets
import socket
import subprocess
import tarfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bednet.site import PROBE_OWN, PROBE_READ_ONLY, PROBE_WRITE_ONLY
from bednet.verify.task import Gateway, Identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from testbed.lab import Host

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

PROBE = "bednet-probe"
SERVER_NAME = "gateway-1.plant.example"
LOCAL = "127.0.0.1"
CONF = "mosquitto.conf"
OPENSSL_CONF = "openssl.cnf"
# What holds for WebSockets listeners as well, which do not look at tls_version in Mosquitto 2.0.11.
AT_LEAST_1_2 = """\
openssl_conf = init
[init]
ssl_conf = modules
[modules]
system_default = limits
[limits]
MinProtocol = TLSv1.2
"""
PASSWORD = secrets.token_urlsafe(16)
ACL = f"""user {PROBE}
topic readwrite {PROBE_OWN}/#
topic read {PROBE_READ_ONLY}/#
topic write {PROBE_WRITE_ONLY}/#
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
    address: str = LOCAL

    @classmethod
    def make(cls, folder: Path, now: datetime, address: str = LOCAL) -> PKI:
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
        pki = cls(folder, root, issuing, issuing_key, address)
        (folder / "ca.pem").write_bytes(pem(root, issuing))
        pki.issue("server", now, dns=[SERVER_NAME], ip=[address], usage=[ExtendedKeyUsageOID.SERVER_AUTH])
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
        )


@dataclass(frozen=True)
class Ports:
    """The ports of a broker."""

    mtls: int
    password: int
    plaintext: int
    off: int

    @classmethod
    def some(cls) -> Ports:
        """Return ports that hardly anybody uses, below those that systems give out by themselves."""
        base = 20000 + 4 * secrets.randbelow(3000)
        return cls(base, base + 1, base + 2, base + 3)

    def gateway(self, name: str = "gateway-1", address: str = LOCAL) -> Gateway:
        """Return how such a broker describes itself to `bednet verify`."""
        return Gateway(
            name,
            address,
            SERVER_NAME,
            mtls_port=self.mtls,
            password_port=self.password,
            access_control="acl_file",
            plaintext_port=self.plaintext,
            # The usual ones are those of the gateway that is deployed on the same host.
            closed_ports=(self.off,),
            max_packet_size=65536,
        )


Options = dict[str, str | None]


def configuration(
    ports: Ports,
    *,
    both: Mapping[str, str | None] | None = None,
    mtls: Mapping[str, str | None] | None = None,
    password: Mapping[str, str | None] | None = None,
    more: str = "",
    max_packet_size: int | None = 65536,
    global_options: str = "",
) -> str:
    """Return the mosquitto.conf of a strict gateway, changed as a test wants it; an option that is None is left out.

    :param both: options of both listeners.
    :param more: lines at the end, such as one more listener.
    """
    common: Options = {
        "certfile": "server.pem",
        "keyfile": "server.key",
        "tls_version": "tlsv1.2",
        "ciphers": STRONG,
        "allow_anonymous": "false",
        "acl_file": "acl",
        "password_file": "passwords",
        "use_username_as_clientid": "true",
        **(both or {}),
    }
    certificates: Options = {
        **common,
        "cafile": "ca.pem",
        "crlfile": "crl.pem",
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
        lines.append("user root")  # who may read the folder; on a lab's host it is root, too
    if max_packet_size:
        lines += [f"max_packet_size {max_packet_size}", f"message_size_limit {max_packet_size}"]
    if global_options:
        lines.append(global_options)
    for port, options in ((ports.mtls, certificates), (ports.password, {**common, **(password or {})})):
        lines.append(f"listener {port}")
        lines += [f"{name} {value}" for name, value in options.items() if value is not None]
    return "\n".join([*lines, more]) + "\n"


class Stage(Protocol):
    """Where brokers run.

    :ivar address: where they are reached.
    """

    address: str

    def run(self, folder: Path, ports: Ports, text: str, openssl: str = "") -> AbstractContextManager[None]:
        """Run a broker with a folder's files and a configuration, as long as the context lasts.

        :param openssl: an openssl.cnf for the broker; empty is OpenSSL's own default.
        :raises AssertionError: when it does not listen in time; its log says why.
        """


def await_listening(address: str, ports: Ports, log: Callable[[], str]) -> None:
    """Wait until a broker listens; there is no event for that."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            for port in (ports.mtls, ports.password):
                socket.create_connection((address, port), 1).close()
        except ConnectionRefusedError:
            time.sleep(0.01)
        else:
            return
    raise AssertionError(f"the broker does not listen:\n{log()}")


class LocalStage:
    """Runs brokers as processes of this machine."""

    address = LOCAL

    def __init__(self, program: str) -> None:
        self._program = program

    @contextmanager
    def run(self, folder: Path, ports: Ports, text: str, openssl: str = "") -> Iterator[None]:
        """Run a broker."""
        (folder / CONF).write_text(text, encoding="utf-8")
        (folder / OPENSSL_CONF).write_text(openssl, encoding="utf-8")
        log = folder / "mosquitto.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [self._program, "-c", CONF],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stderr=file,
                env={**os.environ, "OPENSSL_CONF": str(folder / OPENSSL_CONF)},
            )
        try:
            await_listening(self.address, ports, log.read_text)
            yield
        except BaseException:
            print(log.read_text()[-3000:])  # noqa: T201 - pytest shows it with the failure
            raise
        finally:
            process.kill()
            process.wait()


class LabStage:
    """Runs brokers beside the one that is deployed on a gateway of the lab, from the same package."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.address = host.address

    @contextmanager
    def run(self, folder: Path, ports: Ports, text: str, openssl: str = "") -> Iterator[None]:
        """Run a broker."""
        (folder / CONF).write_text(text, encoding="utf-8")
        (folder / OPENSSL_CONF).write_text(openssl, encoding="utf-8")
        there = f"/run/lax-{ports.mtls}"
        unit = f"lax-{ports.mtls}.service"
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.add(folder, arcname=".")
        start = (
            'mkdir -m 0700 "$1"; tar -C "$1" -xf - --no-same-owner; '
            'systemd-run --quiet --unit="$2" --working-directory="$1" --property=RuntimeMaxSec=120 '
            '--setenv=OPENSSL_CONF="$1/$4" mosquitto -c "$3"'
        )
        self._host.exec(["sh", "-ceu", start, "sh", there, unit, CONF, OPENSSL_CONF], input=buffer.getvalue())

        def log() -> str:
            return self._host.exec(["journalctl", "-u", unit, "-n", "50", "-o", "cat", "--no-pager"]).stdout

        try:
            await_listening(self.address, ports, log)
            yield
        except BaseException:
            print(log())  # noqa: T201 - pytest shows it with the failure
            raise
        finally:
            stop = 'systemctl stop "$2"; systemctl reset-failed "$2" 2>/dev/null; rm -rf "$1"'
            self._host.exec(["sh", "-c", stop, "sh", there, unit])


def now() -> datetime:
    """Return the time: a live broker looks at the real clock."""
    return datetime.now(UTC)
