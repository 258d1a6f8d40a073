# SPDX-License-Identifier: Apache-2.0
"""The brokers that are compared: one Mosquitto, with different ways to decide who may do what.

- :class:`Kind`: a way, and for how many devices.
- :class:`Stage`: a folder with a CA and the certificates of the devices that connect.
- :class:`Broker`: a running one, and what it uses of the machine.

Every broker has the same TLS settings and limits. Of the devices that a broker knows only a few connect; the others are
what it has to carry.
"""

from __future__ import annotations

import base64
import getpass
import hashlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from load.bench.wire import Client, Endpoint, WireError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator
    from typing import Self

PLAINTEXT, OPEN, ACL_FILE, DYNAMIC_SECURITY, BEDNET = "plaintext", "mTLS", "acl_file", "dynamic-security", "bednet"
READER, ADMIN = "reader", "admin"
START_DEADLINE_S = 120.0
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


@dataclass(frozen=True)
class Kind:
    """A way to decide, for a number of devices (0 where the broker knows none)."""

    name: str
    devices: int = 0

    def __str__(self) -> str:
        return f"{self.name}, {self.devices:,} devices" if self.devices else self.name


def device(number: int) -> str:
    """Return the id of a device."""
    return f"d{number:07d}"


@dataclass(frozen=True)
class Programs:
    """What is run, as paths."""

    mosquitto: str
    bednet_plugin: str
    dynamic_security: str


@dataclass
class Stage:
    """A folder with a CA, a server's certificate, and certificates made on demand."""

    folder: Path
    programs: Programs
    _contexts: dict[str, ssl.SSLContext] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._now = datetime.now(UTC)
        self.ca = self.folder / "ca.pem"
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench CA")])
        certificate = (
            self._builder(name, self._key.public_key(), name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_SIGNS_CERTIFICATES, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self._issuer = name
        self.ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self.identity("server")

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, issuer: x509.Name
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now - timedelta(hours=1))
            .not_valid_after(self._now + timedelta(days=2))
            # Python 3.13 wants both in a chain.
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )

    def identity(self, name: str) -> tuple[Path, Path]:
        """Return the paths of a certificate and its key, P-256, made when first asked for."""
        certificate, key_path = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        if not certificate.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            usage = ExtendedKeyUsageOID.SERVER_AUTH if name == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
            address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
            made = (
                self._builder(subject, key.public_key(), self._issuer)
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


@dataclass
class Broker:
    """A broker of one kind, to be entered; it has its files in a folder of its own."""

    stage: Stage
    kind: Kind

    def __post_init__(self) -> None:
        self.folder = self.stage.folder / f"{self.kind.name}-{self.kind.devices}"
        self.store = self.folder / "store"
        self.acl_file = self.folder / "acl"
        self._log = self.folder / "log"
        if not self.folder.exists():
            self.folder.mkdir()
            self._prepare()

    def _prepare(self) -> None:
        numbers = range(self.kind.devices)
        if self.kind.name == ACL_FILE:
            self.write_acl_file()
        elif self.kind.name == DYNAMIC_SECURITY:
            (self.folder / "dynamic-security.json").write_text(json.dumps(_dynamic_security(numbers)))
        elif self.kind.name == BEDNET:
            compiled = self.folder / "compiled.jsonl"
            with compiled.open("w", encoding="utf-8") as stream:
                stream.writelines(compiled_site(self.kind.devices))
            words = [sys.executable, "-m", "bednet.store", "--store", str(self.store), "apply", str(compiled)]
            nothing = json.dumps({"passwords": {}, "psk": {}, "revoked_serials": {}}).encode()
            subprocess.run(words, check=True, input=nothing, stdout=subprocess.DEVNULL)

    def write_acl_file(self, extra: str = "") -> None:
        """Write the acl_file: a section for each device."""
        with self.acl_file.open("w", encoding="utf-8") as stream:
            stream.write(f"user {READER}\ntopic read #\n")
            for number in range(self.kind.devices):
                name = device(number)
                stream.write(f"user {name}\ntopic write sensors/{name}/#\ntopic read commands/{name}/#\n")
            stream.write(extra)

    def _configuration(self, port: int) -> str:
        lines = [
            f"listener {port} 127.0.0.1",
            # It runs as whoever measures; as root it would become another user, who cannot read this folder.
            f"user {getpass.getuser()}",
            "log_dest stderr",
            "log_type error",
            "log_type warning",
            "set_tcp_nodelay true",
            "max_queued_messages 0",
            "max_inflight_messages 100",
            "sys_interval 0",
            f"allow_anonymous {'true' if self.kind.name == PLAINTEXT else 'false'}",
        ]
        if self.kind.name != PLAINTEXT:
            certificate, key = self.stage.identity("server")
            lines += [f"certfile {certificate}", f"keyfile {key}", f"cafile {self.stage.ca}"]
            lines += ["require_certificate true", "tls_version tlsv1.2"]
        if self.kind.name in {OPEN, ACL_FILE, DYNAMIC_SECURITY}:
            lines += ["use_identity_as_username true", "use_username_as_clientid true"]
        if self.kind.name == ACL_FILE:
            lines += [f"acl_file {self.acl_file}"]
        elif self.kind.name == DYNAMIC_SECURITY:
            lines += [
                f"plugin {self.stage.programs.dynamic_security}",
                f"plugin_opt_config_file {self.folder / 'dynamic-security.json'}",
            ]
        elif self.kind.name == BEDNET:
            lines += [f"plugin {self.stage.programs.bednet_plugin}", f"plugin_opt_store {self.store}"]
        return "\n".join(lines) + "\n"

    def __enter__(self) -> Self:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        configuration = self.folder / "mosquitto.conf"
        configuration.write_text(self._configuration(self.port))
        with self._log.open("ab") as log:
            begin = time.monotonic()
            words = [self.stage.programs.mosquitto, "-c", str(configuration)]
            self.process = subprocess.Popen(words, stderr=log, stdout=log)
        while True:
            try:
                with self.client(READER if self.kind.name != PLAINTEXT else device(0)):
                    break
            except (ConnectionError, TimeoutError):
                if self.process.poll() is not None or time.monotonic() - begin > START_DEADLINE_S:
                    self.process.kill()
                    raise WireError(f"{self.kind} did not start: {self._log.read_text()[-2000:]}") from None
                time.sleep(0.002)
        self.started_s = time.monotonic() - begin
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens."""
        return Endpoint(self.port, None if self.kind.name == PLAINTEXT else self.stage.ca)

    def client(self, name: str) -> Client:
        """Return a client with a device's certificate, not yet connected."""
        if self.kind.name == PLAINTEXT:
            return Client(self.endpoint, name, None)
        certificate, key = self.stage.identity(name)
        return Client(self.endpoint, name, self.endpoint.context(certificate, key))

    def cpu_s(self) -> float:
        """Return the CPU time that it has used, in seconds, to the nanosecond (schedstat of all its threads)."""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def memory_bytes(self) -> int:
        """Return its resident memory, of which pages of files are a part."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise WireError(f"{self.kind} is gone")

    def reload(self) -> None:
        """Send it a SIGHUP."""
        self.process.send_signal(signal.SIGHUP)


def compiled_site(devices: int) -> Iterator[str]:
    """Yield the lines of a compiled site (docs/store.md) with this many devices, a reader and an admin."""
    ids = sorted([READER, ADMIN, *(device(number) for number in range(devices))])
    yield json.dumps({"bednet-compiled": 2, "zones": 0, "profiles": 2, "issuers": 0, "devices": len(ids)}) + "\n"

    def rule(profile: str, access: str, topic: list[str | int]) -> dict[str, object]:
        identifier = f"role/{profile}/allow/{access}/0"
        return {"id": identifier, "effect": "allow", "access": access, "topic": topic, "during": [], "networks": []}

    sensor = [rule("sensor", "publish", ["sensors/", 0, "/#"]), rule("sensor", "subscribe", ["commands/", 0, "/#"])]
    yield json.dumps({"profile": "reader", "names": [], "rules": [rule("reader", "subscribe", ["#"])]}) + "\n"
    yield json.dumps({"profile": "sensor", "names": [], "rules": sensor}) + "\n"
    for name in ids:
        profile = "reader" if name in {READER, ADMIN} else "sensor"
        entry = {"device": name, "profile": profile, "values": [], "authentication": ["certificate"]}
        yield json.dumps({**entry, "token": None, "until": None, "revoked": None}) + "\n"


def _dynamic_security(numbers: range) -> dict[str, object]:
    """Return dynamic-security.json: a role for each device, since its roles know no placeholders."""
    salt, iterations = os.urandom(12), 101
    digest = hashlib.pbkdf2_hmac("sha512", os.urandom(32), salt, iterations)
    secret = {
        "password": base64.b64encode(digest).decode(),
        "salt": base64.b64encode(salt).decode(),
        "iterations": iterations,
    }

    def acl(kind: str, topic: str) -> dict[str, object]:
        return {"acltype": kind, "topic": topic, "priority": 0, "allow": True}

    everything = [acl("subscribePattern", "#"), acl("publishClientReceive", "#"), acl("unsubscribePattern", "#")]
    control = [acl("publishClientSend", "$CONTROL/#"), acl("subscribePattern", "$CONTROL/#")]
    control += [acl("publishClientReceive", "$CONTROL/#")]
    roles = [{"rolename": READER, "acls": everything}, {"rolename": ADMIN, "acls": control}]
    clients = [{"username": name, "roles": [{"rolename": name}], **secret} for name in (READER, ADMIN)]
    for number in numbers:
        name = device(number)
        acls = [
            acl("publishClientSend", f"sensors/{name}/#"),
            acl("publishClientReceive", f"commands/{name}/#"),
            acl("subscribePattern", f"commands/{name}/#"),
        ]
        roles.append({"rolename": name, "acls": acls})
        clients.append({"username": name, "roles": [{"rolename": name}], **secret})
    access = {"publishClientSend": False, "publishClientReceive": False, "subscribe": False, "unsubscribe": True}
    return {"defaultACLAccess": access, "clients": clients, "roles": roles}
