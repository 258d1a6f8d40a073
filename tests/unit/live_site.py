# SPDX-License-Identifier: Apache-2.0
"""A token service and a gateway in this process, over TLS: as much of both as a device's client notices.

- :class:`Service`: gives tokens to whoever shows a certificate, bound to it (RFC 8705, 3), and fails when told to.
- :class:`Broker`: lets in and renews who shows a token and the certificate that it is bound to, by OAUTHBEARER.

What a token is signed with, what it permits and what the audit says is asked of the real ones, in tests/tokens.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socketserver
import ssl
import struct
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from tests.plugin.pki import Authority

LOCAL = "127.0.0.1"
DEADLINE_S = 10.0
CONNECT, CONNACK, PUBLISH, PUBACK, PING, DISCONNECT, AUTH = 0x10, 0x20, 0x30, 0x40, 0xC0, 0xE0, 0xF0
REFUSED = 0x87


def settings(authority: Authority) -> ssl.SSLContext:
    """Return a server's settings: clients may show a certificate of this CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.folder / "server.pem", authority.folder / "server.key")
    context.load_verify_locations(authority.folder / "ca.pem")
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def fingerprint(connection: Any) -> str:
    """Return what the client at the other end has shown; empty if it has shown nothing."""
    shown = connection.getpeercert(binary_form=True)
    return hashlib.sha256(shown).hexdigest() if shown else ""


class _Server:
    """A server over TLS; a context manager, and it may go and come back in between."""

    def __init__(self, authority: Authority) -> None:
        self._settings = settings(authority)
        self._changed = threading.Condition()
        self._running: tuple[socketserver.BaseServer, threading.Thread] | None = None
        self.port = 0

    def _make(self, port: int) -> socketserver.TCPServer:
        raise NotImplementedError

    def secured(self, plain: socket.socket) -> ssl.SSLSocket:
        plain.settimeout(DEADLINE_S)
        return self._settings.wrap_socket(plain, server_side=True)

    def start(self) -> None:
        """Answer, on the port of before."""
        server = self._make(self.port)
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        self._running = server, thread

    def stop(self) -> None:
        """Be gone: whoever connects is refused by the kernel."""
        if self._running is not None:
            (server, thread), self._running = self._running, None
            server.shutdown()
            thread.join()
            server.server_close()

    def note(self, notes: list[Any], what: Any) -> None:
        with self._changed:
            notes.append(what)
            self._changed.notify_all()

    def until(self, ready: Callable[[], object], what: str) -> None:
        """Wait for something that it notes."""
        with self._changed:
            assert self._changed.wait_for(ready, DEADLINE_S), f"{what} does not happen: {vars(self)}"

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Service(_Server):
    """A token service.

    :ivar seconds: how long its tokens are good.
    :ivar failing: how many of the next requests are answered with `failure`: a status, and an error of OAuth.
    :ivar wait: what Retry-After says there, in seconds; None where nothing is said.
    :ivar asked: how many requests there were.
    :ivar given: the certificates that tokens were given to, one for each.
    """

    def __init__(self, authority: Authority, seconds: float = 900.0) -> None:
        super().__init__(authority)
        self.authority = authority
        self.seconds, self.failing = seconds, 0
        self.failure = 503, "temporarily_unavailable"
        self.wait: int | None = None
        self.asked = 0
        self.given: list[str] = []

    @property
    def issuer(self) -> str:
        return f"https://{LOCAL}:{self.port}"

    def bundle(self, folder: Path, device: str = "edge-1") -> Path:
        """Make the bundle of a device that gets its tokens here by its certificate."""
        issued = self.authority.device(device).credentials
        assert issued.certificate is not None
        assert issued.key is not None
        folder.mkdir()
        shutil.copy(self.authority.folder / "ca.pem", folder)
        shutil.copy(issued.certificate, folder / "certificate.pem")
        shutil.copy(issued.key, folder / "key.pem")
        told = {"id": device, "token": {"method": "tls_client_auth", "issuer": self.issuer}}
        (folder / "client.json").write_text(json.dumps(told), encoding="utf-8")
        return folder

    def answer(self, shown: str) -> tuple[int, dict[str, Any]]:
        self.asked += 1
        if self.failing > 0:
            self.failing -= 1
            status, error = self.failure
            return status, {"error": error}
        self.note(self.given, shown)
        token = f"{len(self.given)}.{shown}"
        return 200, {"access_token": token, "token_type": "Bearer", "expires_in": self.seconds, "scope": "W10"}

    def _make(self, port: int) -> socketserver.TCPServer:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                self.request = service.secured(self.request)
                super().setup()

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                status, body = service.answer(fingerprint(self.connection))
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if "error" in body and service.wait is not None:
                    self.send_header("Retry-After", str(service.wait))
                self.end_headers()
                self.wfile.write(data)

            def finish(self) -> None:
                super().finish()
                self.request.close()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
                """Write nothing."""

        return _Threads((LOCAL, port), Handler)


class _Threads(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of handshakes that a test breaks off."""


class Broker(_Server):
    """A gateway, for one device: it reads what comes first, first, also of two connections of that device's.

    :ivar events: what it saw: `("connect", certificate, clean start)`, `("renewed", certificate)`, `("goodbye",)`,
        `("lost",)`, and `("refused", reason)` with the reasons of the audit.
    :ivar expiries: how long the sessions were to be kept, one for each CONNECT; None where nothing was said.
    :ivar answers: what renewals are answered with.
    """

    def __init__(self, authority: Authority) -> None:
        super().__init__(authority)
        self.events: list[tuple[object, ...]] = []
        self.expiries: list[int | None] = []
        self.answers = 0x00
        self._open: list[ssl.SSLSocket] = []
        self._turn = threading.Lock()

    def drop(self) -> None:
        """End all connections without a word."""
        while self._open:
            with suppress(OSError):
                self._open.pop().shutdown(2)

    def kinds(self) -> list[object]:
        """Return what it saw, without how."""
        return [event[0] for event in self.events]

    def stop(self) -> None:
        self.drop()
        super().stop()

    def judge(self, told: Properties, shown: str) -> bool:
        """Say whether a token is bound to what was shown."""
        data: bytes = getattr(told, "AuthenticationData", b"")
        token = data.decode().partition("auth=Bearer ")[2].rstrip("\x01")
        if token.partition(".")[2] == shown:
            return True
        self.note(self.events, ("refused", "token-binding"))
        return False

    def serve(self, connection: ssl.SSLSocket) -> None:
        self._open.append(connection)
        shown = fingerprint(connection)
        # A broker has one thread; these may be late, and a good-bye would be seen after the connection that follows.
        with self._turn, connection.makefile("rb") as stream:
            while head := stream.read(1):
                body = stream.read(_length(stream))
                kind = head[0] & 0xF0
                if kind == CONNECT:
                    told = _properties(PacketTypes.CONNECT, body[10:])
                    self.expiries.append(getattr(told, "SessionExpiryInterval", None))
                    self.note(self.events, ("connect", shown, bool(body[7] & 0x02)))
                    good = self.judge(told, shown)
                    connection.sendall(bytes([CONNACK, 3, 0, 0 if good else REFUSED, 0]))
                    if not good:
                        return
                elif kind == AUTH:
                    if not self.judge(_properties(PacketTypes.AUTH, body[1:]), shown):
                        connection.sendall(bytes([DISCONNECT, 1, REFUSED]))
                        return
                    self.note(self.events, ("renewed", shown))
                    connection.sendall(bytes([AUTH, 2, self.answers, 0]))
                elif kind == PUBLISH:
                    (size,) = struct.unpack_from(">H", body)
                    connection.sendall(bytes([PUBACK, 2]) + body[2 + size : 4 + size])
                elif kind == PING:
                    connection.sendall(b"\xd0\x00")
                elif kind == DISCONNECT:
                    self.note(self.events, ("goodbye",))
                    return
            self.note(self.events, ("lost",))

    def _make(self, port: int) -> socketserver.TCPServer:
        broker = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with suppress(OSError), broker.secured(self.request) as connection:
                    broker.serve(connection)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address, daemon_threads = True, True

        return Server((LOCAL, port), Handler)


def _length(stream: Any) -> int:
    length, shift = 0, 0
    while True:
        byte: int = stream.read(1)[0]
        length |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return length


def _properties(packet: int, data: bytes) -> Properties:
    told = Properties(packet)  # type: ignore[no-untyped-call] # paho leaves it open
    told.unpack(data)  # type: ignore[no-untyped-call] # likewise
    return told
