# SPDX-License-Identifier: Apache-2.0
"""A token service and the door of a gateway that honours its tokens, for the tests of `bednet verify`.

They are what a strict site looks like from outside, and nothing more: small servers of this machine, of which a test
changes what it wants otherwise. That the real ones look the same is for the suites that run on the lab to say.

- :class:`Service`: the token service; its methods are its answers, and a lax one overrides one of them.
- :class:`Door`: listeners of a gateway, which let in whom :meth:`Door.decides` lets in.
"""

from __future__ import annotations

import json
import secrets
import ssl
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseRequestHandler, TCPServer, ThreadingTCPServer
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from bednet.site import PROBE_OWN, PROBE_READ_ONLY, PROBE_WRITE_ONLY
from bednet.verify import task
from tests.base64url import encode, encode_part
from tests.verify import brokers

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

NAME = "tokens.plant.example"
SITE, OWN, OTHER = "mqtts://plant.example", f"mqtts://{brokers.SERVER_NAME}", "mqtts://gateway-2.plant.example"
MOST_BYTES = 16 * 1024
SECONDS = 900
SCOPE = [[f"{PROBE_OWN}/#", ["pub", "sub"]], [f"{PROBE_READ_ONLY}/#", ["sub"]], [f"{PROBE_WRITE_ONLY}/#", ["pub"]]]
JWK = {"kty": "EC", "crv": "P-256", "kid": "one", "x": "AA", "y": "AA"}


class Peer(NamedTuple):
    """Who shows a certificate."""

    subject: str
    thumbprint: str


class Answer(NamedTuple):
    """What a request is answered with."""

    status: int
    body: dict[str, Any]


INVALID_CLIENT = Answer(401, {"error": "invalid_client"})


def server_context(pki: brokers.PKI, file: str = "tokens") -> ssl.SSLContext:
    """Return how a strict service speaks TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(brokers.STRONG)
    context.load_cert_chain(pki.folder / f"{file}.pem", pki.folder / f"{file}.key")
    context.load_verify_locations(pki.folder / "ca.pem")
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def peer_of(connection: object) -> Peer | None:
    """Return who is at the other end of a TLS connection."""
    der = connection.getpeercert(binary_form=True) if isinstance(connection, ssl.SSLSocket) else None
    if der is None:
        return None
    certificate = x509.load_der_x509_certificate(der)
    subject = str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    return Peer(subject, encode(certificate.fingerprint(hashes.SHA256())))


class _Running:
    """A server in a thread, as a context manager."""

    server: TCPServer

    def __enter__(self) -> Any:
        # Polls rarely: `shutdown` waits for a poll.
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


class Service(_Running):
    """The token service; a lax one is a class of its own that inherits, and overrides one of its answers."""

    typ = "at+jwt"

    def __init__(self, pki: brokers.PKI, context: ssl.SSLContext | None = None) -> None:
        self.pki = pki
        self.issued: dict[str, dict[str, Any]] = {}
        mine, tls = self, context or server_context(pki)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def do_GET(self) -> None:
                self._answer(mine.gets(self.path))

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                form = {name: values[0] for name, values in parse_qs(self.rfile.read(length).decode()).items()}
                if length > MOST_BYTES:
                    self._answer(mine.too_large(form, peer_of(self.connection)))
                else:
                    self._answer(mine.posts(self.path, form, dict(self.headers), peer_of(self.connection)))

            def _answer(self, answer: Answer) -> None:
                body = json.dumps(answer.body).encode()
                self.send_response(answer.status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", mine.caching)
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = True

        class Server(ThreadingHTTPServer):
            def finish_request(self, request: Any, client_address: Any) -> None:
                with suppress(OSError):
                    wrapped = mine.wraps(request, tls)
                    with wrapped:
                        super().finish_request(wrapped, client_address)

        self.server = Server((brokers.LOCAL, 0), Handler)

    caching = "no-store"

    @property
    def place(self) -> task.Service:
        """How it describes itself to `bednet verify`."""
        return task.Service("tokens:1", brokers.LOCAL, NAME, self.server.server_address[1], audiences=(OWN, OTHER))

    def wraps(self, request: Any, context: ssl.SSLContext) -> Any:
        """Take a connection."""
        return context.wrap_socket(request, server_side=True)

    def gets(self, path: str) -> Answer:
        """Answer a GET."""
        documents = {
            "/healthz": {"status": "ok"},
            "/.well-known/oauth-authorization-server": self.metadata(),
            "/jwks.json": self.keys(),
        }
        return Answer(200, documents[path]) if path in documents else Answer(404, {})

    def metadata(self) -> dict[str, Any]:
        """Return the document of RFC 8414."""
        issuer = self.place.issuer
        return {"issuer": issuer, "token_endpoint": f"{issuer}/token", "jwks_uri": f"{issuer}/jwks.json"}

    def keys(self) -> dict[str, Any]:
        """Return the JWK Set."""
        return {"keys": [JWK]}

    def too_large(self, form: dict[str, str], peer: Peer | None) -> Answer:
        """Answer what is larger than anything that a client could mean."""
        return Answer(413, {"error": "invalid_request"})

    def posts(self, path: str, form: dict[str, str], headers: dict[str, str], peer: Peer | None) -> Answer:
        """Answer a POST."""
        if path != "/token" or peer is None or peer.subject != form.get("client_id"):
            return INVALID_CLIENT
        return self.token(form, peer)

    def token(self, form: dict[str, str], peer: Peer | None) -> Answer:
        """Give a token."""
        now = int(time.time())
        claims = {
            "iss": self.place.issuer,
            "sub": brokers.PROBE,
            "client_id": brokers.PROBE,
            "aud": form.get("resource", SITE),
            "iat": now,
            "exp": now + SECONDS,
            "jti": secrets.token_hex(4),
            "scope": encode_part(self.scope(form)),
        }
        if peer is not None:
            claims["cnf"] = {"x5t#S256": peer.thumbprint}
        claims = self.claims(claims)
        text = (
            f"{encode_part({'alg': 'ES256', 'typ': self.typ, 'kid': 'one'})}.{encode_part(claims)}.{encode(b'signed')}"
        )
        self.issued[text] = claims
        return Answer(200, {"access_token": text, "token_type": "Bearer", "expires_in": SECONDS})

    def claims(self, claims: dict[str, Any]) -> dict[str, Any]:
        """Return what the token says, from what it should say."""
        return claims

    def scope(self, form: dict[str, str]) -> list[list[Any]]:
        """Return what is granted."""
        return SCOPE


class Door(_Running):
    """A listener of a gateway: with certificates, or for passwords."""

    def __init__(
        self, service: Service, decides: Callable[[Service, Peer | None, str | None], bool], *, mtls: bool
    ) -> None:
        context = server_context(service.pki, "server")
        context.verify_mode = ssl.CERT_REQUIRED if mtls else ssl.CERT_NONE

        class Handler(BaseRequestHandler):
            def handle(self) -> None:
                with suppress(OSError), context.wrap_socket(self.request, server_side=True) as tls:
                    packet = tls.recv(65536)
                    version, password = password_of(packet)
                    code = 0 if decides(service, peer_of(tls), password) else {4: 5, 5: 0x87}[version]
                    tls.sendall(bytes((0x20, 2, 0, code)) if version == 4 else bytes((0x20, 3, 0, code, 0)))
                    tls.recv(16)

        class Server(ThreadingTCPServer):
            daemon_threads = True

        self.server = Server((brokers.LOCAL, 0), Handler)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server.server_address[1])


def password_of(packet: bytes) -> tuple[int, str | None]:
    """Return the version and the password of a CONNECT, which is whole and sound."""
    at = 1
    while packet[at] & 0x80:
        at += 1
    body = packet[at + 1 :]
    version, flags, rest = body[6], body[7], body[10:]
    if version == 5:
        rest = rest[1 + rest[0] :]
    texts = []
    while rest:
        size = int.from_bytes(rest[:2])
        texts.append(rest[2 : 2 + size].decode())
        rest = rest[2 + size :]
    return version, texts[-1] if flags & 0x40 else None


def strict(service: Service, peer: Peer | None, password: str | None) -> bool:
    """Decide as a gateway does: whose certificate it is, and whether the token is one, for here, and this client's."""
    if password is None:
        return peer is not None and peer.subject == brokers.PROBE
    claims = service.issued.get(password)
    return claims is not None and claims["aud"] in (SITE, OWN) and bound(claims, peer)


def bound(claims: dict[str, Any], peer: Peer | None) -> bool:
    """Whether a token is this client's."""
    return peer is not None and claims["cnf"]["x5t#S256"] == peer.thumbprint
