# SPDX-License-Identifier: Apache-2.0
"""MQTT by hand, where a client library would not do it: over TLS-PSK, and over resumed TLS sessions."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import ssl
import struct
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from bednet.probe import connect_packet, mqtt_packet, publish_packet

if TYPE_CHECKING:
    from types import TracebackType

    from tests.plugin.gateway import Gateway

DEADLINE = 10.0  # seconds


class PSK:
    """A device with a pre-shared key: OpenSSL's client, which carries our bytes. A context manager."""

    def __init__(self, gateway: Gateway, identity: str, key: str, *, client_id: str | None = None) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("no openssl on this machine, and Python has no TLS-PSK before 3.13: install openssl")
        self._command = [
            *("openssl", "s_client", "-quiet", "-tls1_2", "-cipher", "PSK", "-psk", key),
            *("-psk_identity", identity, "-connect", f"127.0.0.1:{gateway.ports['psk']}"),
        ]
        self._client_id = client_id or identity
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PSK:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process
        self._process.kill()
        self._process.communicate()

    def _send(self, packet: bytes) -> None:
        assert self._process
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(packet)
            self._process.stdin.flush()

    def receive(self, size: int) -> bytes:
        """Return so many bytes, or fewer when the connection ends before."""
        assert self._process
        assert self._process.stdout
        data = b""
        deadline = time.monotonic() + DEADLINE
        while len(data) < size:
            ready, _, _ = select.select([self._process.stdout], [], [], deadline - time.monotonic())
            assert ready, f"no answer; so far: {data!r}"
            more = os.read(self._process.stdout.fileno(), size - len(data))
            if not more:
                break
            data += more
        return data

    def connect(self, version: int = 4) -> int | None:
        """Say CONNECT and return the code of the CONNACK; None when there is none."""
        self._send(connect_packet(self._client_id, version=4 if version == 4 else 5))
        connack = self.receive(4 if version == 4 else 2)
        return connack[3] if len(connack) >= 4 else None

    def subscribe(self, topic_filter: str) -> int:
        """Return the code of the SUBACK."""
        raw = topic_filter.encode()
        self._send(mqtt_packet(0x82, b"\x00\x01" + struct.pack(">H", len(raw)) + raw + b"\x01"))
        return self.receive(5)[4]

    def publish(self, topic: str, payload: bytes) -> bytes:
        """Publish with QoS 1 and return the PUBACK, or nothing when the connection is gone."""
        self._send(publish_packet(topic, payload, version=4))
        return self.receive(4)


class Resumable:
    """A TLS client that remembers its session, and comes back with it."""

    def __init__(self, gateway: Gateway, certificate: str, key: str, version: ssl.TLSVersion) -> None:
        self._context = ssl.create_default_context(cafile=str(gateway.authority.folder / "ca.pem"))
        self._context.load_cert_chain(certificate, key)
        self._context.minimum_version = self._context.maximum_version = version
        self._port = gateway.ports["mtls"]
        self._session: ssl.SSLSession | None = None
        self.reused = False

    def enter(self, device: str, *, username: str | None = None, password: str | None = None) -> int:
        """Connect, say CONNECT, and return the code of the CONNACK."""
        with (
            socket.create_connection(("127.0.0.1", self._port), DEADLINE) as raw,
            self._context.wrap_socket(
                raw, server_hostname="gateway-1.plant.example", session=self._session
            ) as connection,
        ):
            connection.sendall(connect_packet(device, username=username, password=password, version=4))
            connack = connection.recv(4)
            # TLS 1.3 hands out its tickets after the handshake, so they are here by now.
            self._session = connection.session
            self.reused = bool(connection.session_reused)
        return connack[3]


class InPieces:
    """A TLS client that has its records in its hands, to send them as a slow network does. A context manager."""

    def __init__(self, gateway: Gateway, certificate: str, key: str) -> None:
        context = ssl.create_default_context(cafile=str(gateway.authority.folder / "ca.pem"))
        context.load_cert_chain(certificate, key)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname="gateway-1.plant.example")
        self._port = gateway.ports["mtls"]

    def __enter__(self) -> InPieces:
        self._raw = socket.create_connection(("127.0.0.1", self._port), DEADLINE)
        self._raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            try:
                self._tls.do_handshake()
                self.send(self._out.read())
                return self
            except ssl.SSLWantReadError:
                self.send(self._out.read())
                self._in.write(self._raw.recv(65536))

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._raw.close()

    def record(self, data: bytes) -> bytes:
        """Return the record, or records, that this becomes; it is not sent."""
        self._tls.write(data)
        return self._out.read()

    def send(self, raw: bytes) -> None:
        """Send bytes of a record."""
        self._raw.sendall(raw)

    def receive(self, size: int) -> bytes:
        """Return so many bytes of what the other side says, or fewer when it ends the connection before."""
        data = b""
        while len(data) < size:
            try:
                more = self._tls.read(size - len(data))
            except ssl.SSLWantReadError:
                raw = self._raw.recv(65536)
                if not raw:
                    break
                self._in.write(raw)
                continue
            except (ssl.SSLError, OSError):
                break
            if not more:
                break
            data += more
        return data
