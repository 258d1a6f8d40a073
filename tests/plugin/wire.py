# SPDX-License-Identifier: Apache-2.0
"""Many questions over one MQTT 5 connection: packets are sent in a row, and the answers read when all are sent.

- :class:`Wire`: a connection. It may come from a chosen address of this machine.
- :func:`has_ipv6`: whether this machine has ::1.

A client library asks one thing after the other and keeps a thread for each connection; thousands of cases need less.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bednet.probe import mqtt_packet

if TYPE_CHECKING:
    from types import TracebackType

DEADLINE = 10.0  # seconds
FOREVER = 0xFFFFFFFF  # of a session's expiry
CONNACK, PUBLISH, PUBACK, SUBACK, UNSUBACK, PINGRESP = 2, 3, 4, 9, 11, 13
SUBSCRIPTION_IDENTIFIER = 0x0B


def has_ipv6() -> bool:
    """Say whether this machine can connect to itself over IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Arrival:
    """A message that came.

    :ivar subscriptions: the identifiers of the subscriptions that brought it.
    """

    topic: str
    payload: bytes
    retained: bool
    subscriptions: frozenset[int]


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack(">H", len(raw)) + raw


def _variable(data: bytes, at: int) -> tuple[int, int]:
    """Return a variable byte integer (MQTT 5, 1.5.5) and where the next begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        shift += 7
        if byte < 0x80:
            return value, at


@dataclass
class Wire:
    """A connection of a device, opened by :meth:`connect`. A context manager.

    :ivar arrivals: the messages that came, in their order; whoever has seen them clears the list.
    """

    port: int
    device: str
    password: str
    arrivals: list[Arrival] = field(default_factory=list)
    _socket: socket.socket | None = None
    _out: bytearray = field(default_factory=bytearray)
    _in: bytearray = field(default_factory=bytearray)
    _answers: dict[int, int] = field(default_factory=dict)
    _last: int = 0

    @property
    def open(self) -> bool:
        return self._socket is not None

    def connect(self, source: str, *, clean: bool = False) -> tuple[int, bool]:
        """Connect from an address; the session lasts for ever unless `clean` begins it anew.

        :return: the code of the CONNACK, and whether the broker had the session.
        """
        target = "::1" if ":" in source else "127.0.0.1"
        self._socket = socket.create_connection((target, self.port), DEADLINE, source_address=(source, 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._in.clear()
        self._out.clear()
        self._answers.clear()
        properties = b"\x05\x11" + struct.pack(">I", FOREVER)
        body = b"\x00\x04MQTT\x05" + bytes([0xC2 if clean else 0xC0]) + b"\x00\x00" + properties
        self._out += mqtt_packet(0x10, body + _text(self.device) + _text(self.device) + _text(self.password))
        kind, packet = self._exchange(CONNACK)
        assert kind == CONNACK, f"{self.device} from {source}: no CONNACK"
        return packet[1], bool(packet[0] & 1)

    def close(self) -> None:
        """Say DISCONNECT, and wait until the broker has closed: it knows then that the device is gone."""
        if self._socket is None:
            return
        with self._socket:
            self._socket.sendall(b"\xe0\x00")
            self._socket.settimeout(DEADLINE)
            while self._socket.recv(65536):
                pass
        self._socket = None

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._socket is not None:
            self._socket.close()

    # What is sent with the next flush; each returns a number to ask for its answer by.

    def _number(self) -> int:
        self._last = self._last % 65535 + 1
        return self._last

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        """Publish with QoS 1."""
        number = self._number()
        self._out += mqtt_packet(0x33 if retain else 0x32, _text(topic) + struct.pack(">H", number) + b"\0" + payload)
        return number

    def subscribe(self, topic_filter: str, *, identifier: int = 0) -> int:
        """Subscribe with QoS 0; with an identifier, what is retained is sent, too."""
        number = self._number()
        properties = b"\0"
        if identifier:
            assert 0 < identifier < 128
            properties = bytes([2, SUBSCRIPTION_IDENTIFIER, identifier])
        option = b"\x00" if identifier else b"\x20"
        self._out += mqtt_packet(0x82, struct.pack(">H", number) + properties + _text(topic_filter) + option)
        return number

    def unsubscribe(self, topic_filter: str) -> int:
        number = self._number()
        self._out += mqtt_packet(0xA2, struct.pack(">H", number) + b"\0" + _text(topic_filter))
        return number

    def flush(self) -> dict[int, int]:
        """Send all that, and return the reason code of each: by then what the broker had to send before has come."""
        self._out += b"\xc0\x00"
        self._exchange(PINGRESP)
        answers = dict(self._answers)
        self._answers.clear()
        return answers

    def _exchange(self, awaited: int) -> tuple[int, bytes]:
        """Send what is to be sent, and read up to a packet of this kind."""
        assert self._socket is not None
        self._socket.settimeout(DEADLINE)
        self._socket.sendall(self._out)
        self._out.clear()
        while True:
            while (packet := self._take()) is None:
                more = self._socket.recv(65536)
                if not more:
                    raise AssertionError(f"the broker closed the connection of {self.device}")
                self._in += more
            kind, body = packet
            self._read(kind >> 4, kind, body)
            if kind >> 4 == awaited:
                return awaited, body

    def _take(self) -> tuple[int, bytes] | None:
        size = shift = 0
        for at in range(1, 5):
            if at >= len(self._in):
                return None
            size |= (self._in[at] & 0x7F) << shift
            shift += 7
            if self._in[at] < 0x80:
                break
        begin = at + 1
        if len(self._in) < begin + size:
            return None
        kind, body = self._in[0], bytes(self._in[begin : begin + size])
        del self._in[: begin + size]
        return kind, body

    def _read(self, kind: int, header: int, body: bytes) -> None:
        if kind == PUBLISH:
            assert not header & 0x06, "it subscribes with QoS 0"
            end = 2 + int.from_bytes(body[:2])
            size, at = _variable(body, end)
            until = at + size
            found = set()
            while at < until:
                assert body[at] == SUBSCRIPTION_IDENTIFIER, f"property {body[at]:#x}"
                identifier, at = _variable(body, at + 1)
                found.add(identifier)
            self.arrivals.append(Arrival(body[2:end].decode(), body[until:], bool(header & 1), frozenset(found)))
        elif kind == PUBACK:
            self._answers[int.from_bytes(body[:2])] = body[2] if len(body) > 2 else 0
        elif kind in (SUBACK, UNSUBACK):
            size, begin = _variable(body, 2)
            self._answers[int.from_bytes(body[:2])] = body[begin + size]
        else:
            assert kind in (CONNACK, PINGRESP), f"packet {kind}: {body!r}"
