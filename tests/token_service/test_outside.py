# SPDX-License-Identifier: Apache-2.0
"""The service as it is deployed: gunicorn behind nginx with the role's configuration, TLS, and clients of others.

nginx is the one on the PATH (or in ``BEDNET_NGINX``). Without it these tests are skipped, and say so; the lab's suites
ask the same of a deployed service.
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
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import authlib
import jinja2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bednet.token_service import config, jose, tool
from tests.token_service.plant import (
    GATEWAY,
    SECRETS,
    SITE_AUDIENCE,
    certified,
    compiled,
    pem,
    secret_hash,
    thumbprint,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NGINX = os.environ.get("BEDNET_NGINX") or shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "roles/token_service/templates/nginx.conf.j2"
DEADLINE_SECONDS = 30
pytestmark = pytest.mark.skipif(NGINX is None, reason="no nginx here: install it, or name it in BEDNET_NGINX")


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


@dataclass
class Deployed:
    """A running service."""

    issuer: str
    ca: Authority
    folder: Path
    pump_key: ec.EllipticCurvePrivateKey

    @property
    def port(self) -> int:
        return int(self.issuer.rpartition(":")[2])

    def log(self) -> str:
        return (self.folder / "gunicorn.log").read_text() + (self.folder / "nginx.log").read_text()

    def context(self, files: tuple[str, str] | None = None) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=str(self.ca.path))
        if files:
            made.load_cert_chain(*files)
        return made

    def post(
        self, path: str, body: str, files: tuple[str, str] | None = None, headers: list[tuple[str, str]] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Send a form over TLS, with whatever headers."""
        connection = http.client.HTTPSConnection("localhost", self.port, context=self.context(files), timeout=20)
        with contextlib.closing(connection):
            connection.putrequest("POST", path)
            sent = [("Content-Type", "application/x-www-form-urlencoded"), ("Content-Length", str(len(body)))]
            for name, value in [*sent, *(headers or [])]:
                connection.putheader(name, value)
            connection.endheaders(body.encode())
            response = connection.getresponse()
            return response.status, json.loads(response.read())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(what: Callable[[], object], processes: list[subprocess.Popen[bytes]], log: Callable[[], str]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        assert all(process.poll() is None for process in processes), log()
        with contextlib.suppress(OSError):
            what()
            return
        assert time.monotonic() < deadline, log()
        # There is nothing to wait on: a socket that does not exist yet.
        time.sleep(0.02)


def nginx_configuration(folder: Path, port: int) -> str:
    """Render the role's template for this folder."""
    values = {
        "ansible_managed": "of a test",
        "token_service_name": "localhost",
        "token_service_port": port,
        "token_service_bind_address": "127.0.0.1",
        "token_service_requests_per_second": 1000,
        "token_service_burst": 1000,
        "token_service_connections": 100,
        "token_service_tls_minimum": "1.2",
        "__token_service_tls_dir": str(folder / "tls"),
        "__token_service_socket": str(folder / "app.sock"),
        "__token_service_tls12_ciphers": ["ECDHE-ECDSA-AES128-GCM-SHA256"],
        "__token_service_tls13_ciphers": ["TLS_AES_128_GCM_SHA256"],
        "__token_service_tls_groups": ["prime256v1"],
    }
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(TEMPLATE.read_text())  # noqa: S701
    return template.render(values).replace("/run/bednet-token-nginx", str(folder / "run"))


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """The service behind nginx, for the tests of this file."""
    folder = tmp_path_factory.mktemp("deployed")
    for name in ("keys", "run", "tls"):
        (folder / name).mkdir()
    # nginx's worker is nobody's when root starts it.
    for parent in [folder, *folder.parents[:2], folder / "run"]:
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
    pump_key = ec.generate_private_key(ec.SECP256R1())
    (folder / "compiled").write_text("".join(compiled(issuer=issuer)))
    secrets = {
        "client_secrets": {"meter-1": secret_hash(SECRETS["meter-1"])},
        "certificates": {"pump-1": certified(pump_key, end=int(time.time()) + 3600)},
        "revoked_serials": {},
    }
    work = tool.Tool(config.load(folder / "config.json"), int(time.time()))
    work.migrate()
    work.apply(folder / "compiled", secrets, check=False)
    work.rotate(sign_after=0, retire_after=None, if_none=True)
    work.database.close()
    (folder / "nginx.conf").write_text(nginx_configuration(folder, port))
    found = Deployed(issuer, ca, folder, pump_key)
    processes: list[subprocess.Popen[bytes]] = []
    with (folder / "gunicorn.log").open("wb") as one, (folder / "nginx.log").open("wb") as two:
        try:
            command = [sys.executable, "-m", "gunicorn", "--config", "python:bednet.token_service.server"]
            application = f'bednet.token_service:create_app("{folder}/config.json")'
            bind = ["--bind", f"unix:{folder}/app.sock", "--umask", "0", application]
            environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
            processes.append(subprocess.Popen([*command, *bind], stderr=one, stdout=one, env=environment))
            wait_for(lambda: _connect(folder / "app.sock"), processes, found.log)
            arguments = [str(NGINX), "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]
            processes.append(subprocess.Popen(arguments, stderr=two, stdout=two))
            wait_for(lambda: socket.create_connection(("127.0.0.1", port), 5).close(), processes, found.log)
            yield found
        finally:
            for process in reversed(processes):
                process.terminate()
                process.wait(DEADLINE_SECONDS)


def _connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as found:
        found.connect(str(path))


# Clients of others


def test_requests_oauthlib_gets_a_token_by_certificate(deployed: Deployed) -> None:
    oauthlib = pytest.importorskip("oauthlib.oauth2", reason="requests-oauthlib is not installed")
    sessions = pytest.importorskip("requests_oauthlib", reason="requests-oauthlib is not installed")
    files = deployed.ca.issue("edge-1")
    session = sessions.OAuth2Session(client=oauthlib.BackendApplicationClient(client_id="edge-1"))
    session.trust_env = False
    token = session.fetch_token(
        f"{deployed.issuer}/token", cert=files, verify=str(deployed.ca.path), include_client_id=True
    )
    claims = jose.parse(token["access_token"]).claims
    assert claims["cnf"] == {"x5t#S256": thumbprint(deployed.ca.made["edge-1"])}
    assert claims["iss"] == deployed.issuer


def test_requests_oauthlib_gets_a_token_by_secret(deployed: Deployed) -> None:
    oauthlib = pytest.importorskip("oauthlib.oauth2", reason="requests-oauthlib is not installed")
    sessions = pytest.importorskip("requests_oauthlib", reason="requests-oauthlib is not installed")
    session = sessions.OAuth2Session(client=oauthlib.BackendApplicationClient(client_id="meter-1"))
    session.trust_env = False
    arguments = {"verify": str(deployed.ca.path), "client_id": "meter-1"}
    url = f"{deployed.issuer}/token"
    token = session.fetch_token(url, client_secret=SECRETS["meter-1"], **arguments)
    assert jose.parse(token["access_token"]).claims["sub"] == "meter-1"
    with pytest.raises(oauthlib.OAuth2Error, match="invalid_client"):
        session.fetch_token(url, client_secret="wrong", **arguments)  # noqa: S106


def authlib_session(**arguments: Any) -> Any:
    client = pytest.importorskip("authlib.integrations.requests_client", reason="requests is not installed")
    session = client.OAuth2Session(**arguments)
    session.trust_env = False
    return session


@pytest.mark.filterwarnings("ignore:.*joserfc:DeprecationWarning", "ignore:authlib.jose module is deprecated")
def test_authlib_gets_and_ends_a_token_by_assertion(deployed: Deployed) -> None:
    from authlib.oauth2.rfc7523 import PrivateKeyJWT  # noqa: PLC0415

    url = f"{deployed.issuer}/token"
    plain = deployed.pump_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    secret: Any = plain.decode()
    if tuple(map(int, authlib.__version__.split(".")[:2])) > (1, 6):
        # Later ones take keys of joserfc, and warn of others.
        secret = pytest.importorskip("joserfc.jwk").ECKey.import_key(plain)
    session = authlib_session(
        client_id="pump-1",
        client_secret=secret,
        token_endpoint_auth_method="private_key_jwt",  # noqa: S106
        revocation_endpoint_auth_method="private_key_jwt",
    )
    session.register_client_auth_method(PrivateKeyJWT(url, alg="ES256"))
    ca = str(deployed.ca.path)
    token = session.fetch_token(url, grant_type="client_credentials", verify=ca)
    assert jose.parse(token["access_token"]).claims["cnf"] == {"jwk": jose.public_jwk(deployed.pump_key.public_key())}
    found = session.introspect_token(f"{deployed.issuer}/introspect", token["access_token"], verify=ca).json()
    assert (found["active"], found["sub"]) == (True, "pump-1")
    assert session.revoke_token(f"{deployed.issuer}/revoke", token["access_token"], verify=ca).status_code == 200
    found = session.introspect_token(f"{deployed.issuer}/introspect", token["access_token"], verify=ca).json()
    assert found == {"active": False}


def test_metadata_lead_to_the_keys_that_verify_a_token(deployed: Deployed) -> None:
    def get(url: str) -> Any:
        with urllib.request.urlopen(url, context=deployed.context(), timeout=20) as answer:  # noqa: S310
            return json.load(answer)

    metadata = get(f"{deployed.issuer}/.well-known/oauth-authorization-server")
    assert metadata["issuer"] == deployed.issuer
    (key,) = get(metadata["jwks_uri"])["keys"]
    body = "grant_type=client_credentials&client_id=edge-1"
    _, answer = deployed.post("/token", body, deployed.ca.issue("edge-1"))
    parsed = jose.parse(answer["access_token"])
    assert parsed.header["kid"] == key["kid"]
    point = b"\x04" + jose.decode(key["x"]) + jose.decode(key["y"])
    jose.verify(parsed, ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point), ["ES256"])


def test_curl_gets_a_token_as_the_page_says(deployed: Deployed) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl here")
    certificate, key = deployed.ca.issue("edge-1")
    command = [curl, "-sS", "--cacert", str(deployed.ca.path), "--cert", certificate, "--key", key]
    form = ["-d", "grant_type=client_credentials", "-d", "client_id=edge-1", f"{deployed.issuer}/token"]
    done = subprocess.run([*command, *form], check=True, capture_output=True, env={"PATH": "/usr/bin:/bin"})
    assert json.loads(done.stdout)["token_type"] == "Bearer"  # noqa: S105


# What a client could forge


EDGE = "grant_type=client_credentials&client_id=edge-1"


@pytest.mark.parametrize("separator", ["-", "_"])
@pytest.mark.parametrize("own", [False, True])
def test_headers_of_a_client_never_count(deployed: Deployed, separator: str, own: bool) -> None:
    deployed.ca.issue("edge-1")
    forged = [
        (f"X{separator}Bednet{separator}Client{separator}Verify", "SUCCESS"),
        (f"X{separator}Bednet{separator}Client{separator}Cert", pem(deployed.ca.made["edge-1"])),
    ]
    files = deployed.ca.issue("edge-2") if own else None
    status, answer = deployed.post("/token", EDGE, files, forged)
    assert (status, answer["error"]) == (401, "invalid_client")
    # One's own certificate counts as before.
    if own:
        body = EDGE.replace("edge-1", "edge-2")
        assert deployed.post("/token", body, files, forged)[0] == 200


@pytest.mark.parametrize("days", [0, 1])
def test_certificate_of_another_ca_is_refused(deployed: Deployed, tmp_path: Path, days: int) -> None:
    ca = Authority(tmp_path) if days else deployed.ca
    files = ca.issue("edge-1", days=days or -1)
    status, answer = deployed.post("/token", EDGE, files)
    assert (status in (400, 401), answer["error"]) == (True, "invalid_client")


def test_certificate_of_a_server_is_refused(deployed: Deployed) -> None:
    status, answer = deployed.post("/token", EDGE, deployed.ca.issue("edge-1", server=True))
    assert (status in (400, 401), answer["error"]) == (True, "invalid_client")


def test_revoked_certificate_is_refused_by_the_service(deployed: Deployed) -> None:
    files = deployed.ca.issue("edge-2")
    body = EDGE.replace("edge-1", "edge-2")
    assert deployed.post("/token", body, files)[0] == 200
    work = tool.Tool(config.load(deployed.folder / "config.json"), int(time.time()))
    secrets = {
        "client_secrets": {"meter-1": secret_hash(SECRETS["meter-1"])},
        "certificates": {"pump-1": certified(deployed.pump_key, end=int(time.time()) + 3600)},
        "revoked_serials": {f"{deployed.ca.made['edge-2'].serial_number:X}": "superseded"},
    }
    work.apply(deployed.folder / "compiled", secrets, check=False)
    work.database.close()
    status, answer = deployed.post("/token", body, files)
    assert (status, answer["error"]) == (401, "invalid_client")
    assert '"certificate-revoked"' in deployed.log()


def test_request_of_64_kilobytes_is_refused(deployed: Deployed) -> None:
    status, answer = deployed.post("/token", EDGE + "&scope=" + "A" * 65_536, deployed.ca.issue("edge-1"))
    assert (status, answer["error"]) == (413, "invalid_request")


def test_nothing_secret_is_in_the_logs(deployed: Deployed) -> None:
    _, answer = deployed.post("/token", EDGE, deployed.ca.issue("edge-1"))
    assert answer["access_token"] not in deployed.log()
    assert SECRETS["meter-1"] not in deployed.log()
    assert "eyJ" not in deployed.log()
