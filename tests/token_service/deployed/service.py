# SPDX-License-Identifier: Apache-2.0
"""The token service as it is deployed: gunicorn behind nginx with the role's configuration, and a CA for both sides.

- :func:`deploy`: run one, for a block.
- :class:`Deployed`: talk to it over TLS, run its tool, read its log.

The service and its tool are run by the Python that runs the tests, with what that has by itself: in a container these
are Debian's libraries, whatever the tests were given.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import http.client
import ipaddress
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.token_service.plant import GATEWAY, SECRETS, SITE_AUDIENCE, certified, compiled, secret_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

NGINX = os.environ.get("BEDNET_NGINX") or shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
ROOT = Path(__file__).parents[3]
ROLE = ROOT / "roles/token_service"
FORM = ("Content-Type", "application/x-www-form-urlencoded")
DEADLINE_SECONDS = 30
TIMEOUT_SECONDS = 20


@dataclass
class Authority:
    """A CA for a test: a root that signs servers and devices."""

    folder: Path
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    made: dict[str, x509.Certificate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"CA {self.folder.name}")])
        self.certificate = self._sign(self.name, self.key, ca=True, days=30)
        self.path = self._write("ca.pem", self.certificate.public_bytes(serialization.Encoding.PEM))

    def _write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        *,
        ca: bool = False,
        days: int = 1,
        server: bool = False,
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        builder = x509.CertificateBuilder(
            self.name,
            subject,
            key.public_key(),
            x509.random_serial_number(),
            min(now, now + dt.timedelta(days=days)) - dt.timedelta(hours=1),
            now + dt.timedelta(days=days),
        ).add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
        if server:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if ca:
            usage = x509.KeyUsage(
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
            builder = builder.add_extension(usage, critical=True)
        else:
            power = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
            builder = builder.add_extension(x509.ExtendedKeyUsage([power]), critical=False)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return builder.add_extension(identifier, critical=False).sign(self.key, hashes.SHA256())

    def issue(self, name: str, *, server: bool = False, days: int = 1) -> tuple[str, str]:
        """Issue a certificate. :returns: the files of it and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = self._sign(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key, server=server, days=days)
        self.made[name] = made
        plain = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        chain = made.public_bytes(serialization.Encoding.PEM)
        return str(self._write(f"{name}.pem", chain)), str(self._write(f"{name}.key", plain))


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        """The body of one that is JSON."""
        assert self.headers.get_content_type() == "application/json", self.body
        found: dict[str, Any] = json.loads(self.body)
        return found


@dataclass
class Deployed:
    """A running service."""

    issuer: str
    ca: Authority
    folder: Path
    pump_key: ec.EllipticCurvePrivateKey

    @property
    def port(self) -> int:
        """Where nginx listens, on 127.0.0.1."""
        return int(self.issuer.rpartition(":")[2])

    def log(self) -> str:
        """All that the service and nginx said."""
        return (self.folder / "gunicorn.log").read_text() + (self.folder / "nginx.log").read_text()

    def lines(self) -> list[dict[str, Any]]:
        """The service's own log so far."""
        text = (self.folder / "gunicorn.log").read_text()
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def reason(self) -> str:
        """Return why the service refused the last request that it refused."""
        return next((str(line["reason"]) for line in reversed(self.lines()) if "reason" in line), "nothing was refused")

    def context(self, files: tuple[str, str] | None = None) -> ssl.SSLContext:
        """Return what a client's TLS is made with; `files` are its certificate and key."""
        made = ssl.create_default_context(cafile=str(self.ca.path))
        if files:
            made.load_cert_chain(*files)
        return made

    def connect(self, files: tuple[str, str] | None = None, source: str = "127.0.0.1") -> http.client.HTTPSConnection:
        """Return a connection that is not open yet, from an address of this machine."""
        return http.client.HTTPSConnection(
            "localhost",
            self.port,
            context=self.context(files),
            timeout=TIMEOUT_SECONDS,
            source_address=(source, 0),
        )

    def send(
        self,
        method: str,
        path: str,
        body: str = "",
        files: tuple[str, str] | None = None,
        headers: Sequence[tuple[str, str]] = (),
        source: str = "127.0.0.1",
    ) -> Answer:
        """Send one request over TLS, with whatever headers, each as often as it is there."""
        with contextlib.closing(self.connect(files, source)) as connection:
            connection.putrequest(method, path)
            for name, value in (*headers, *((FORM, ("Content-Length", str(len(body)))) if method == "POST" else ())):
                connection.putheader(name, value)
            connection.endheaders(body.encode() if body else None)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def post(
        self,
        path: str,
        body: str,
        files: tuple[str, str] | None = None,
        headers: Sequence[tuple[str, str]] = (),
        source: str = "127.0.0.1",
    ) -> tuple[int, dict[str, Any]]:
        """Send a form; the answer is JSON."""
        answer = self.send("POST", path, body, files, headers, source)
        return answer.status, answer.json

    def tool(self, *words: str, stdin: str = "", status: int = 0) -> dict[str, Any]:
        """Run the service's tool, as the operator does, with the right time."""
        done = subprocess.run(
            [sys.executable, "-m", "bednet.token_service", "--config", str(self.folder / "config.json"), *words],
            check=False,
            capture_output=True,
            text=True,
            input=stdin,
            env=own_environment(),
        )
        assert done.returncode == status, done.stderr
        found: dict[str, Any] = json.loads(done.stdout) if done.stdout else {"stderr": done.stderr}
        return found

    def apply(self, **changes: object) -> dict[str, Any]:
        """Take over the site, with these secrets changed."""
        secrets = {
            "client_secrets": {"meter-1": secret_hash(SECRETS["meter-1"])},
            "certificates": {"pump-1": certified(self.pump_key, end=int(time.time()) + 3600)},
            "revoked_serials": {},
            **changes,
        }
        return self.tool("apply", str(self.folder / "compiled"), stdin=json.dumps(secrets))


def own_environment(**more: str) -> dict[str, str]:
    """Return the environment of the service: its own code, and nothing that the tests were given."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), **more}


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def await_(ready: Callable[[], object], processes: Sequence[subprocess.Popen[bytes]], log: Callable[[], str]) -> None:
    """Wait until something is done without an OSError, while the processes live."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        assert all(process.poll() is None for process in processes), log()
        with contextlib.suppress(OSError):
            ready()
            return
        assert time.monotonic() < deadline, log()
        # There is nothing to wait on: a socket that does not exist yet.
        time.sleep(0.02)


def role_values() -> dict[str, Any]:
    """Return the role's defaults and constants."""
    files = (ROLE / "defaults/main.yml", ROLE / "vars/main.yml")
    return {name: value for file in files for name, value in yaml.safe_load(file.read_text()).items()}


def nginx_configuration(folder: Path, port: int, limits: Mapping[str, int]) -> str:
    """Render the role's template for this folder; `limits` take the place of the role's defaults."""
    values = {
        **role_values(),
        "ansible_managed": "of a test",
        "token_service_name": "localhost",
        "token_service_port": port,
        "token_service_bind_address": "127.0.0.1",
        "__token_service_tls_dir": str(folder / "tls"),
        "__token_service_nginx_cache": str(folder / "cache"),
        "__token_service_socket": str(folder / "app.sock"),
        **limits,
    }
    template = (ROLE / "templates/nginx.conf.j2").read_text()
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)  # noqa: S701 - no HTML
    return environment.from_string(template).render(values).replace("/run/bednet-token-nginx", str(folder / "run"))


MANY = {
    "token_service_requests_per_second": 1000,
    "token_service_burst": 1000,
    "token_service_connections": 100,
}
"""Limits that no test runs into which is not about them."""


@contextlib.contextmanager
def deploy(
    folder: Path, *, limits: Mapping[str, int] = MANY, environment: Mapping[str, str] | None = None
) -> Iterator[Deployed]:
    """Run a service behind nginx in an empty folder.

    :param environment: further variables for the service, which its tool does not get.
    """
    for name in ("keys", "run", "tls"):
        (folder / name).mkdir()
    # nginx's worker is nobody's when root starts it.
    for parent in [folder, *folder.parents[:3], folder / "run"]:
        parent.chmod(0o755)
    port = free_port()
    issuer = f"https://localhost:{port}"
    ca = Authority(folder / "tls")
    certificate, key = ca.issue("localhost", server=True)
    (folder / "tls/server.pem").write_bytes(Path(certificate).read_bytes())
    (folder / "tls/server.key").write_bytes(Path(key).read_bytes())
    settings = {
        "issuer": issuer,
        "audiences": [SITE_AUDIENCE],
        "gateways": [GATEWAY],
        "database": f"sqlite:///{folder}/tokens.db",
        "keys_dir": str(folder / "keys"),
        "approvers": ["boss"],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "compiled").write_text("".join(compiled(issuer=issuer)))
    (folder / "nginx.conf").write_text(nginx_configuration(folder, port, limits))
    found = Deployed(issuer, ca, folder, ec.generate_private_key(ec.SECP256R1()))
    found.tool("migrate")
    found.apply()
    found.tool("rotate", "--if-none")
    processes: list[subprocess.Popen[bytes]] = []
    with (folder / "gunicorn.log").open("wb") as one, (folder / "nginx.log").open("wb") as two:
        try:
            command = [sys.executable, "-m", "gunicorn", "--config", "python:bednet.token_service.server"]
            application = f'bednet.token_service:create_app("{folder}/config.json")'
            bind = ["--bind", f"unix:{folder}/app.sock", "--umask", "0", application]
            own = own_environment(**(environment or {}))
            processes.append(subprocess.Popen([*command, *bind], stderr=one, stdout=one, env=own))
            await_(lambda: _connect(folder / "app.sock"), processes, found.log)
            arguments = [str(NGINX), "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]
            processes.append(subprocess.Popen(arguments, stderr=two, stdout=two))
            await_(lambda: socket.create_connection(("127.0.0.1", port), 5).close(), processes, found.log)
            yield found
        finally:
            for process in reversed(processes):
                process.terminate()
                process.wait(DEADLINE_SECONDS)


def _connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as found:
        found.connect(str(path))
