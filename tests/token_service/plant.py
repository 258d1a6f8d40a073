# SPDX-License-Identifier: Apache-2.0
"""A plant with a token service, without network: its devices, their credentials, and a clock that a test sets."""

from __future__ import annotations

import base64
import datetime as dt
import functools
import hashlib
import json
import socket
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bednet.token_service import config, jose, keys, site
from bednet.token_service.app import make_app
from bednet.token_service.clients import ASSERTION_TYPE
from tests.base64url import decode, encode, encode_part

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from flask import Flask
    from werkzeug.test import TestResponse

    from bednet.token_service.database import Database

ISSUER = "https://tokens.plant.example:8443"
SITE_AUDIENCE, GATEWAY = "mqtts://plant.example", "mqtts://gateway-1.plant.example"
START = 1_800_000_000
"""2027-01-15T08:00:00Z, when tests begin."""

UNIX = SimpleNamespace(family=socket.AF_UNIX)
TCP = SimpleNamespace(family=socket.AF_INET)
SECRETS = {"meter-1": "s3cret-of-the-meter_0123456789abcdef", "hmi-1": "s3cret-of-the-hmi_0123456789abcdefghi"}

RULES: list[dict[str, Any]] = [
    {"effect": "allow", "access": "publish", "topic": ["sensors/", 1, "/", 0, "/#"]},
    {"effect": "allow", "access": "subscribe", "topic": ["commands/", 0, "/#"]},
    {"effect": "allow", "access": "subscribe", "topic": ["at-night/#"], "networks": ["10.0.0.0/8"]},
    {"effect": "deny", "access": "publish", "topic": ["sensors/+/+/secret/#"]},
    {"effect": "deny", "access": "subscribe", "topic": ["commands/", 0, "/now"], "networks": ["10.0.0.0/8"]},
]
DEVICES: list[dict[str, Any]] = [
    {"device": "boss", "authentication": ["certificate"]},
    {"device": "edge-1", "authentication": ["token"], "token": "tls_client_auth"},
    {"device": "edge-2", "authentication": ["token"], "token": "tls_client_auth"},
    {"device": "ends-1", "authentication": ["token"], "token": "tls_client_auth", "until": START + 100},
    {"device": "gone-1", "authentication": ["token"], "token": "tls_client_auth", "revoked": "keyCompromise"},
    {"device": "hmi-1", "authentication": ["certificate", "token"], "token": "client_secret_basic"},
    {"device": "idle-1", "authentication": ["token"], "token": "tls_client_auth", "profile": "idle", "values": []},
    {"device": "meter-1", "authentication": ["token"], "token": "client_secret_basic"},
    {"device": "pump-1", "authentication": ["token"], "token": "private_key_jwt"},
    {"device": "temp-101", "authentication": ["certificate"]},
    {"device": "watcher", "authentication": ["certificate"]},
]
ISSUER_LINE: dict[str, Any] = {
    "issuer": ISSUER,
    "name": "site",
    "service": True,
    "audience": [SITE_AUDIENCE],
    "algorithms": ["ES256", "EdDSA"],
    "leeway": 30,
    "longest": 3600,
    "typ": ["at+jwt"],
    "scope": "aif",
    "claim": "sub",
    "prefix": "",
    "roles": None,
    "keys": None,
    "jwks_url": None,
}


def secret_hash(secret: str, iterations: int = 100) -> str:
    """Hash a client secret as the CA does."""
    digest = hashlib.pbkdf2_hmac("sha512", secret.encode(), b"salt-of-a-test", iterations, 64)
    salt, text = (base64.b64encode(part).decode() for part in (b"salt-of-a-test", digest))
    return f"$7${iterations}${salt}${text}"


def compiled(devices: list[dict[str, Any]] | None = None, **changes: Any) -> list[str]:
    """Return the lines of a compiled site; `changes` go to its issuer."""
    base: dict[str, Any] = {"profile": "sensor", "values": ["hall-1"], "until": None, "revoked": None, "token": None}
    lines: list[dict[str, Any]] = [{**base, **device} for device in (DEVICES if devices is None else devices)]
    rules = [{"id": f"r{number}", "during": [], "networks": [], **rule} for number, rule in enumerate(RULES)]
    header = {"bednet-compiled": 2, "zones": 0, "profiles": 2, "issuers": 1, "devices": len(lines)}
    profiles = [
        {"profile": "idle", "names": [], "rules": []},
        {"profile": "sensor", "names": ["location"], "rules": rules},
    ]
    return [json.dumps(line) + "\n" for line in (header, *profiles, {**ISSUER_LINE, **changes}, *lines)]


_KEY = ec.generate_private_key(ec.SECP256R1())


_DAY = dt.timedelta(days=1)


def certificate(subject: str, serial: int = 4711, key: Any = _KEY, end: int = START + 90 * 86_400) -> x509.Certificate:
    """Make a certificate; that it is the CA's is nginx's to find out."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    last = dt.datetime.fromtimestamp(end, dt.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), serial, last - 100 * _DAY, last)
    return builder.sign(_KEY, hashes.SHA256())


def pem(made: x509.Certificate) -> str:
    """Return it as nginx's ``$ssl_client_escaped_cert`` does."""
    return quote(made.public_bytes(serialization.Encoding.PEM).decode(), safe="")


def thumbprint(made: x509.Certificate) -> str:
    """Return its ``x5t#S256``."""
    return encode(made.fingerprint(hashes.SHA256()))


def from_nginx(made: x509.Certificate | None) -> dict[str, str]:
    """Return the headers that nginx sets."""
    if made is None:
        return {"X-Bednet-Client-Verify": "NONE", "X-Bednet-Client-Address": "192.0.2.7"}
    return {
        "X-Bednet-Client-Verify": "SUCCESS",
        "X-Bednet-Client-Cert": pem(made),
        "X-Bednet-Client-Address": "192.0.2.7",
    }


def basic(user: str, password: str) -> str:
    """Return a header ``Authorization``."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@dataclass
class Clock:
    """The time, as a test says."""

    now: int = START

    def __call__(self) -> int:
        return self.now


@dataclass
class Plant:
    """The service, and whoever talks to it."""

    settings: config.Config
    database: Database
    clock: Clock
    pump_key: ec.EllipticCurvePrivateKey
    log: Path
    made: dict[str, x509.Certificate] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)
    """All that must not be in the log."""

    def __post_init__(self) -> None:
        self.app = self.make_app()
        self._jti = 0

    def make_app(self) -> Flask:
        """Make the application: another worker over the same database."""
        return make_app(self.settings, database=self.database, now=self.clock)

    def certificate(self, subject: str) -> x509.Certificate:
        """Return a device's certificate."""
        return self.made.setdefault(subject, certificate(subject))

    def secrets(self) -> dict[str, dict[str, str]]:
        """Return what the CA hands over."""
        return {
            "client_secrets": {device: secret_hash(secret) for device, secret in SECRETS.items()},
            "certificates": {"pump-1": certified(self.pump_key)},
            "revoked_serials": {},
        }

    def apply(self, lines: list[str] | None = None, **secrets: Any) -> dict[str, Any]:
        """Apply a site."""
        data = site.read(compiled() if lines is None else lines, {**self.secrets(), **secrets}, self.settings)
        return site.apply(self.database, data, self.clock.now)

    def rotate(self, **arguments: Any) -> dict[str, Any]:
        """Make a new signing key."""
        arguments = {"token_seconds": self.settings.token_seconds, "now": self.clock.now, **arguments}
        with self.database.writing() as connection:
            return keys.rotate(connection, keys.Keys(self.settings.keys_dir), self.settings.algorithm, **arguments)

    def request(
        self,
        method: str,
        path: str,
        data: Any = None,
        *,
        certificate: x509.Certificate | None = None,
        authorization: str | None = None,
        headers: Mapping[str, str] | None = None,
        socket: Any = UNIX,
        app: Flask | None = None,
        **more: Any,
    ) -> TestResponse:
        """Send a request as nginx would hand it over."""
        sent = {**from_nginx(certificate), **(headers or {})}
        if authorization is not None:
            sent["Authorization"] = authorization
        client, environ = (app or self.app).test_client(), {"gunicorn.socket": socket}
        response = client.open(path, method=method, data=data, headers=sent, environ_overrides=environ, **more)
        if response.mimetype == "application/json" and isinstance(found := response.get_json(silent=True), dict):
            self.sent.extend(found[name] for name in ("access_token", "device_code", "user_code") if name in found)
        return response

    def post(self, path: str, data: Any = None, **arguments: Any) -> TestResponse:
        """Send a form."""
        return self.request("POST", path, data, **arguments)

    def get(self, path: str, **arguments: Any) -> TestResponse:
        """Get a document."""
        return self.request("GET", path, **arguments)

    def token(self, device: str = "edge-1", /, **parameters: Any) -> TestResponse:
        """Ask for a token by certificate."""
        form = {"grant_type": "client_credentials", "client_id": device, **parameters}
        return self.post("/token", form, certificate=self.certificate(device))

    def token_by_secret(self, device: str = "meter-1", secret: str | None = None, **arguments: Any) -> TestResponse:
        """Ask for a token by secret."""
        header = basic(device, SECRETS.get(device, "") if secret is None else secret)
        return self.post("/token", {"grant_type": "client_credentials"}, authorization=header, **arguments)

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Return the claims of a new assertion of pump-1; one that is changed to None is left out."""
        self._jti += 1
        claims = {
            "iss": "pump-1",
            "sub": "pump-1",
            "aud": ISSUER,
            "iat": self.clock.now,
            "exp": self.clock.now + 60,
            "jti": f"jti-{self._jti}",
            **changes,
        }
        return {name: value for name, value in claims.items() if value is not None}

    def assertion(self, *, key: Any = None, header: Mapping[str, Any] | None = None, **changes: Any) -> str:
        """Sign an assertion."""
        return jose.sign(key or self.pump_key, dict(header or {"typ": "JWT"}), self.claims(**changes))

    def token_by_assertion(self, assertion: str | None = None, **arguments: Any) -> TestResponse:
        """Ask for a token by signed assertion."""
        text = self.assertion() if assertion is None else assertion
        self.sent.append(text)
        form = {
            "grant_type": "client_credentials",
            "client_assertion_type": ASSERTION_TYPE,
            "client_assertion": text,
            **arguments.pop("form", {}),
        }
        return self.post("/token", form, **arguments)

    def lines(self) -> list[dict[str, Any]]:
        """Return the log so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def reason(self) -> str:
        """Return why the last request was refused."""
        return next((str(line["reason"]) for line in reversed(self.lines()) if "reason" in line), "nothing was refused")


@functools.cache
def certified(key: Any, device: str = "pump-1", **how: Any) -> str:
    """Return the certificate of a private key as the CA hands it over; `how` is for :func:`certificate`."""
    return certificate(device, key=key, **how).public_bytes(serialization.Encoding.PEM).decode()


def claims_of(response: TestResponse) -> dict[str, Any]:
    """Return the claims of the token in an answer."""
    assert response.status_code == 200, response.get_data(as_text=True)
    return jose.parse(response.json["access_token"]).claims  # type: ignore[index]


def header_of(response: TestResponse) -> dict[str, Any]:
    """Return the header of the token in an answer."""
    return jose.parse(response.json["access_token"]).header  # type: ignore[index]


def scope_of(text: str) -> list[Any]:
    """Read a scope as a broker does."""
    found = json.loads(decode(text))
    assert isinstance(found, list)
    return found


def scope_text(*entries: Any) -> str:
    """Write a scope as a device does."""
    return encode_part(list(entries))


def refused(plant: Plant, response: TestResponse, error: str, reason: str, status: int = 400) -> None:
    """Make sure that a request was refused, with this code for the client and this reason in the log alone."""
    found = (response.status_code, response.json and response.json.get("error"), plant.reason())
    assert found == (status, error, reason)
    assert reason not in response.get_data(as_text=True) or reason == error.replace("_", "-")
    assert response.headers["Cache-Control"] == "no-store"
