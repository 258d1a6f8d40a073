# SPDX-License-Identifier: Apache-2.0
"""A proxy between load generator and broker that misbehaves on purpose, and counts what it did.

- :class:`Proxy`: speaks TLS to the generator and plain MQTT to a broker; what a :class:`Mischief` says happens to the
  messages that the broker delivers.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PUBLISH = 3


@dataclass
class Mischief:
    """What happens to deliveries.

    :ivar drop: of so many deliveries on a connection one is lost; 0 is none.
    :ivar twice: of so many one comes twice.
    :ivar swap: of so many one comes after the next of its topic.
    :ivar delay_s: how much later each comes.
    :ivar freeze: from when to when, in seconds after the first delivery, nothing goes through.
    :ivar die_s: after the first delivery, when everything is closed; 0 is never.
    """

    drop: int = 0
    twice: int = 0
    swap: int = 0
    delay_s: float = 0.0
    freeze: tuple[float, float] = (0.0, 0.0)
    die_s: float = 0.0


class Proxy:
    """Accepts as long as the context lasts.

    :ivar port: where.
    :ivar dropped: how many deliveries it lost; likewise `doubled` and `swapped`.
    """

    def __init__(self, folder: Path, broker: tuple[str, int], mischief: Mischief) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self._broker = broker
        self._mischief = mischief
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self.dropped = self.doubled = self.swapped = 0
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._first = 0.0
        self._over = threading.Event()

    def __enter__(self) -> Proxy:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        for thread in self._threads:
            thread.join(10)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _end(self) -> None:
        self._over.set()
        # A thread that accepts is woken by this, and not by close alone.
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def break_all(self) -> None:
        """Break every connection, as a restart does; new ones are taken."""
        while self._open:
            one = self._open.pop()
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        # Whoever connects at the very end is not waited for.
        connection.settimeout(2)
        try:
            tls = self._context.wrap_socket(connection, server_side=True)
            tls.settimeout(None)
            broker = socket.create_connection(self._broker)
        except OSError:
            connection.close()
            return
        self._open += [tls, broker]
        for one in (tls, broker):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._start(self._deliver, broker, tls)
        with suppress(OSError):
            while data := tls.recv(65536):
                broker.sendall(data)
        for one in (tls, broker):
            with suppress(OSError):
                one.close()

    def _deliver(self, broker: socket.socket, tls: ssl.SSLSocket) -> None:
        count, held = 0, b""
        with suppress(OSError):
            for packet in packets(broker):
                if packet[0] >> 4 != PUBLISH:
                    tls.sendall(packet)
                    continue
                self._wait()
                count += 1
                mischief = self._mischief
                if mischief.drop and count % mischief.drop == 0:
                    with self._lock:
                        self.dropped += 1
                    continue
                if mischief.swap and count % mischief.swap == 1 and not held:
                    held = packet
                    continue
                tls.sendall(packet)
                # Order is kept, or not, within a topic.
                if held and topic_of(held) == topic_of(packet):
                    tls.sendall(held)
                    held = b""
                    with self._lock:
                        self.swapped += 1
                if mischief.twice and count % mischief.twice == 0:
                    tls.sendall(packet)
                    with self._lock:
                        self.doubled += 1
        if held:
            # Nothing came after it, so it never came.
            with self._lock:
                self.dropped += 1

    def _wait(self) -> None:
        with self._lock:
            self._first = self._first or time.monotonic()
        past = time.monotonic() - self._first
        begin, end = self._mischief.freeze
        if begin <= past < end:
            self._over.wait(end - past)
        if self._mischief.die_s and past > self._mischief.die_s:
            self._end()
        if self._mischief.delay_s:
            self._over.wait(self._mischief.delay_s)


def topic_of(publish: bytes) -> bytes:
    """Return the topic of a PUBLISH (MQTT 5, 3.3.2)."""
    begin = 2
    while publish[begin - 1] & 0x80:
        begin += 1
    length = int.from_bytes(publish[begin : begin + 2], "big")
    return publish[begin + 2 : begin + 2 + length]


def packets(connection: socket.socket) -> Iterator[bytes]:
    """Yield whole MQTT packets (MQTT 5, 2.1)."""
    data = b""
    while True:
        size = _size(data)
        if size and len(data) >= size:
            yield data[:size]
            data = data[size:]
            continue
        piece = connection.recv(65536)
        if not piece:
            return
        data += piece


def _size(data: bytes) -> int:
    """Return the length of the packet that begins here; 0 where it cannot be told yet."""
    length = 0
    for place, byte in enumerate(data[1:5]):
        length |= (byte & 0x7F) << (7 * place)
        if not byte & 0x80:
            return 2 + place + length
    return 0
