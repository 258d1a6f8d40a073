# SPDX-License-Identifier: Apache-2.0
"""As much of MQTT 3.1.1 (OASIS standard) as a load generator needs, on blocking sockets.

paho-mqtt spends more of the machine on a message than the broker does; here packets are made ahead and answers are only
counted, so that one core is enough to keep a broker busy.

- :class:`Client`: a connection: connect, subscribe, send what was made ahead, count what arrives.
- :func:`publish`: the bytes of a PUBLISH.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import ssl
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

CONNACK, PUBLISH, PUBACK, SUBACK, PINGRESP = 2, 3, 4, 9, 13
PINGREQ_PACKET, DISCONNECT_PACKET = b"\xc0\x00", b"\xe0\x00"
TIMEOUT_S = 60.0
_REFUSED = 0x80
CHUNK = 262_144
_CLONE_NEWNET = 0x40000000


class WireError(Exception):
    """The broker said something that ends the measurement."""


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("!H", len(data)) + data


def _length(size: int) -> bytes:
    out = bytearray()
    while True:
        size, digit = divmod(size, 128)
        out.append(digit | 0x80 if size else digit)
        if not size:
            return bytes(out)


def _set_namespace(descriptor: int) -> None:
    """Take this thread into a network namespace (setns(2))."""
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def publish(topic: str, payload: bytes, qos: int = 0, packet_id: int = 0) -> bytes:
    """Return a PUBLISH packet (3.3)."""
    body = _text(topic) + (struct.pack("!H", packet_id) if qos else b"") + payload
    return bytes([0x30 | qos << 1]) + _length(len(body)) + body


@dataclass(frozen=True)
class Endpoint:
    """Where a broker listens, and what to trust; no `ca` means plaintext.

    :ivar namespace: the file of its network namespace, where that is not ours.
    """

    port: int
    ca: Path | None = None
    host: str = "127.0.0.1"
    namespace: Path | None = None

    def connect(self) -> socket.socket:
        """Return a TCP connection. A socket stays in the namespace in which it was made.

        :raises OSError: when there is none.
        """
        with contextlib.ExitStack() as stack:
            if self.namespace is not None:
                ours = stack.enter_context(Path(f"/proc/self/task/{threading.get_native_id()}/ns/net").open("rb"))
                theirs = stack.enter_context(self.namespace.open("rb"))
                stack.callback(_set_namespace, ours.fileno())
                _set_namespace(theirs.fileno())
            return socket.create_connection((self.host, self.port), TIMEOUT_S)

    def context(self, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext | None:
        """Return the TLS settings of a client that may hold a certificate."""
        if self.ca is None:
            return None
        context = ssl.create_default_context(cafile=str(self.ca))
        context.check_hostname = False
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        return context


@dataclass
class Client:
    """One connection, to be entered.

    :ivar tls: TLS settings; None for plaintext.
    :ivar password: with the client id as the user name; None where a certificate speaks.
    :ivar session: a TLS session to resume.
    :ivar mqtt: whether it speaks MQTT; otherwise it exchanges a line with a server that sends lines back.
    """

    endpoint: Endpoint
    client_id: str
    tls: ssl.SSLContext | None
    password: str | None = None
    session: ssl.SSLSession | None = None
    mqtt: bool = True
    _left: bytes = field(default=b"", repr=False)

    def __enter__(self) -> Self:
        plain = self.endpoint.connect()
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket: socket.socket = (
            self.tls.wrap_socket(plain, server_hostname=self.endpoint.host, session=self.session) if self.tls else plain
        )
        if not self.mqtt:
            self.send(b"line\n")
            if not self.socket.recv(CHUNK):
                raise WireError("the server closed the connection")
            return self
        flags = 0x02 | (0xC0 if self.password is not None else 0)
        body = _text("MQTT") + bytes([4, flags]) + struct.pack("!H", 600) + _text(self.client_id)
        if self.password is not None:
            body += _text(self.client_id) + _text(self.password)
        self.send(b"\x10" + _length(len(body)) + body)
        for kind, payload in self.packets():
            if kind != CONNACK or payload[1] != 0:
                raise WireError(f"{self.client_id}: CONNECT was answered with {kind} {payload[:2].hex()}")
            break
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes | bytearray) -> None:
        """Send bytes, all of them."""
        self.socket.sendall(data)

    def packets(self) -> Iterator[tuple[int, bytes]]:
        """Yield each packet that arrives: its type, and its variable header and payload.

        :raises WireError: when the broker closes the connection.
        """
        while True:
            while (end := _end(self._left, 0)) is not None:
                kind, body = self._left[0] >> 4, self._left[slice(*end)]
                self._left = self._left[end[1] :]
                yield kind, body
            more = self.socket.recv(CHUNK)
            if not more:
                raise WireError(f"{self.client_id}: the broker closed the connection")
            self._left += more

    def subscribe(self, topic_filter: str, qos: int = 0) -> None:
        """Subscribe, and wait for the SUBACK to grant it."""
        body = struct.pack("!H", 1) + _text(topic_filter) + bytes([qos])
        self.send(b"\x82" + _length(len(body)) + body)
        for kind, payload in self.packets():
            if kind != SUBACK or payload[2] == _REFUSED:
                raise WireError(f"{self.client_id}: SUBSCRIBE to {topic_filter} was answered with {kind}")
            return

    def ping(self) -> None:
        """Send a PINGREQ and wait for its answer."""
        self.send(PINGREQ_PACKET)
        for kind, _ in self.packets():
            if kind == PINGRESP:
                return

    def count(self, wanted: int, *, acknowledge: bool = False) -> int:
        """Read until `wanted` PUBLISH packets have arrived; QoS 1 packets are acknowledged if told to.

        :returns: how many arrived.
        """
        arrived, acks = 0, bytearray()
        while arrived < wanted:
            more = self.socket.recv(CHUNK)
            if not more:
                raise WireError(f"{self.client_id}: the broker closed the connection after {arrived} messages")
            data, place = self._left + more, 0
            while (end := _end(data, place)) is not None:
                start, stop = end
                if data[place] >> 4 == PUBLISH:
                    arrived += 1
                    if acknowledge and data[place] & 6:
                        topic = struct.unpack_from("!H", data, start)[0]
                        acks += b"\x40\x02" + data[start + 2 + topic : start + 4 + topic]
                place = stop
            self._left = data[place:]
            if acks:
                self.send(bytes(acks))
                acks.clear()
        return arrived

    def acknowledged(self) -> int:
        """Wait for something to arrive. :returns: how many PUBACKs did."""
        more = self.socket.recv(CHUNK)
        if not more:
            raise WireError(f"{self.client_id}: the broker closed the connection")
        data, place, found = self._left + more, 0, 0
        while (end := _end(data, place)) is not None:
            found += data[place] >> 4 == PUBACK
            place = end[1]
        self._left = data[place:]
        return found


def _end(data: bytes, place: int) -> tuple[int, int] | None:
    """Return where the body of the packet at `place` begins and ends; None when it is not all there yet."""
    size, shift, at = 0, 0, place + 1
    while at < len(data):
        digit = data[at]
        size |= (digit & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not digit & 0x80:
            return (at, at + size) if at + size <= len(data) else None
    return None
