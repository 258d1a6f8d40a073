# SPDX-License-Identifier: Apache-2.0
"""MQTT over WebSockets for paho-mqtt that thousands of which fit on one thread.

- :class:`WebSocket`: a :class:`load.tls.Transport` with WebSockets (RFC 6455; MQTT 5, section 6) above its TLS.
- :class:`Frames`: what arrives, taken apart; :func:`frame`: what is sent, put together.

paho's own wrapper waits for the upgrade byte by byte, and masks what it sends byte by byte.
"""

from __future__ import annotations

import base64
import os
import time
from hashlib import sha1
from typing import TYPE_CHECKING

from load.tls import READ, ConnectError, Transport

if TYPE_CHECKING:
    import ssl

PATH = "/mqtt"
CONTINUED, BINARY, CLOSE, PING, PONG = 0x0, 0x2, 0x8, 0x9, 0xA
_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_HEAD_BYTES = 16_384
_SHORT, _LONG = 126, 127
_SWITCHING = "101"


def frame(data: bytes | bytearray, opcode: int = BINARY) -> bytes:
    """Return a client's frame (RFC 6455, 5.2 and 5.3)."""
    size, key = len(data), os.urandom(4)
    head = bytes([0x80 | opcode])
    if size < _SHORT:
        head += bytes([0x80 | size])
    elif size < 1 << 16:
        head += bytes([0x80 | _SHORT]) + size.to_bytes(2)
    else:
        head += bytes([0x80 | _LONG]) + size.to_bytes(8)
    # As two long numbers: byte by byte it would cost more than all the rest.
    mask = int.from_bytes((key * (size // 4 + 1))[:size])
    return head + key + (int.from_bytes(data) ^ mask).to_bytes(size)


class Frames:
    """What a server sends, taken apart however it is cut.

    :ivar ended: whether the server has closed, or sent what is none of MQTT's.
    :ivar pings: what is to be answered.
    """

    def __init__(self, data: bytes = b"") -> None:
        self._data = data
        self.ended = False
        self.pings: list[bytes] = []

    def take(self, data: bytes) -> bytes:
        """Take what arrived; return what it carries, as far as frames are whole."""
        data, place = self._data + data, 0
        found = []
        while not self.ended and (inside := _inside(data, place)) is not None:
            begin, end = inside
            opcode, payload = data[place] & 0x0F, data[begin:end]
            if opcode in (BINARY, CONTINUED):
                found.append(payload)
            elif opcode == PING:
                self.pings.append(payload)
            elif opcode != PONG:
                self.ended = True
            place = end
        self._data = data[place:]
        return b"".join(found)


def _inside(data: bytes, place: int) -> tuple[int, int] | None:
    """Return where the payload of the frame at `place` begins and ends; None when it is not all there yet."""
    begin = place + 2
    if len(data) < begin:
        return None
    # A server masks nothing (RFC 6455, 5.1).
    size = data[place + 1] & 0x7F
    if size >= _SHORT:
        wide = 2 if size == _SHORT else 8
        size = int.from_bytes(data[begin : begin + wide])
        begin += wide
    # Half a length is less than the whole, and so is what is there.
    return (begin, begin + size) if len(data) >= begin + size else None


class WebSocket(Transport):
    """A connection with WebSockets above TLS, seen by paho as a socket that does not block."""

    def __init__(self, address: str, port: int, server_name: str, context: ssl.SSLContext, deadline_s: float) -> None:
        """Connect, shake hands and upgrade, letting others run meanwhile.

        :raises ConnectError: when that fails or takes longer than the deadline.
        """
        until = time.monotonic() + deadline_s
        super().__init__(address, port, server_name, context, deadline_s)
        try:
            self._frames = Frames(self._upgrade(f"{server_name}:{port}", until))
        except BaseException:
            self.close()
            raise

    def _upgrade(self, host: str, until: float) -> bytes:
        """Ask for WebSockets (RFC 6455, 4.1); return what came after the answer."""
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [f"GET {PATH} HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade"]
        lines += [f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Protocol: mqtt", "", ""]
        super().send("\r\n".join(lines).encode())
        told = b""
        while b"\r\n\r\n" not in told:
            try:
                super()._fill()
            except BlockingIOError:
                try:
                    self._wait(READ, until)
                except ConnectError as exc:
                    raise ConnectError("WebSockets: the upgrade timed out") from exc
                continue
            except OSError as exc:
                raise ConnectError(f"WebSockets: {exc.strerror}") from exc
            told += self._clear
            if not self._clear or len(told) > _HEAD_BYTES:
                raise ConnectError("WebSockets: no answer to the upgrade")
            self._clear = b""
        head, _, rest = told.partition(b"\r\n\r\n")
        status, *fields = head.decode("latin-1").split("\r\n")
        word = [*status.split(), "", ""][1]
        if word != _SWITCHING:
            raise ConnectError(f"WebSockets: the upgrade was answered with {word or 'nothing of HTTP'}")
        said = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in fields)}
        # What the RFC wants; it protects nothing.
        wanted = base64.b64encode(sha1((key + _GUID).encode(), usedforsecurity=False).digest()).decode()
        if said.get("sec-websocket-accept") != wanted or said.get("sec-websocket-protocol") != "mqtt":
            raise ConnectError("WebSockets: the gateway agreed to something else")
        return rest

    def _fill(self) -> None:
        payload = self._take(b"")
        while not payload and not self._frames.ended:
            self._clear, self._at = b"", 0
            super()._fill()
            if not self._clear:
                return
            payload = self._take(self._clear)
        self._clear, self._at = payload, 0

    def _take(self, data: bytes) -> bytes:
        payload = self._frames.take(data)
        if self._frames.pings:
            # Behind what waits, whether the network takes anything now or not.
            for ping in self._frames.pings:
                self._tls.write(frame(ping, PONG))
            self._frames.pings.clear()
            self._unsent += self._outgoing.read()
            self._flush()
        return payload

    def send(self, data: bytes | bytearray) -> int:
        """See :meth:`load.tls.Transport.send`."""
        super().send(frame(data))
        return len(data)
