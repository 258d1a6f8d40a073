# SPDX-License-Identifier: Apache-2.0
"""A TLS connection for paho-mqtt that thousands of which fit on one thread.

- :class:`Transport`: connects, shakes hands, and is then as paho wants a socket: it never blocks.
- :func:`client_context`: what a device trusts and shows; :func:`psk_context`: a pre-shared key instead.

gevent's TLS sockets cost a switch and several calls in Python for each of paho's reads, of which there are three for a
message. Here the cipher works in memory (:class:`ssl.SSLObject`), the network is read in large pieces, and only
connecting waits.
"""

from __future__ import annotations

import ssl
import time
from typing import TYPE_CHECKING

from gevent import monkey, socket
from gevent.hub import get_hub

from bednet import psk

if TYPE_CHECKING:
    from pathlib import Path

# Never blocks: with a deadline of 0, gevent's own would only cost time.
_RawSocket = monkey.get_original("socket", "socket")
READ, WRITE = 1, 2
_PIECE_BYTES = 65536


class ConnectError(Exception):
    """A connection could not be made.

    :ivar reason: a few words with few values: they are counted.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def client_context(ca: Path, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """Return a context that trusts the site's CA alone, and shows a certificate if there is one.

    :raises ConnectError: when a file is missing or is not what it should be.
    """
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(ca)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as exc:
        raise ConnectError(f"credentials cannot be read: {exc}") from exc
    return context


class _PSKContext(ssl.SSLContext):
    """Offers a pre-shared key; a gateway that comes with a certificate has proven nothing."""


def psk_context(identity: str, key: bytes) -> ssl.SSLContext:
    """Return a context that proves itself, and has the gateway prove itself, by a pre-shared key.

    :raises ConnectError: when this machine's Python cannot.
    """
    context = _PSKContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # In TLS 1.2 the one that a gateway takes; those of TLS 1.3 come besides.
    context.set_ciphers("ECDHE-PSK-CHACHA20-POLY1305")
    try:
        psk.offer(context, identity, key)
    except psk.UnavailableError as exc:
        raise ConnectError(f"a pre-shared key cannot be offered: {exc}") from exc
    return context


class Transport:
    """A TLS connection, seen by paho as a socket that does not block.

    :ivar received_bytes: bytes that came over the network, and `sent_bytes` those that went.
    :ivar dry: set when a read found nothing more; whoever learns that the network has something takes it back.
    :ivar version: the TLS version, such as "TLSv1.3"; `cipher` its name; `resumed` whether an earlier session was
        taken up again.
    """

    def __init__(self, address: str, port: int, server_name: str, context: ssl.SSLContext, deadline_s: float) -> None:
        """Connect and shake hands, letting others run meanwhile.

        :raises ConnectError: when that fails or takes longer than the deadline.
        """
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        self._clear = b""
        self._at = 0
        self._unsent = b""
        self.dry = False
        self.received_bytes = self.sent_bytes = 0
        until = time.monotonic() + deadline_s
        try:
            connecting = socket.create_connection((address, port), timeout=deadline_s)
        except TimeoutError as exc:
            raise ConnectError("connecting timed out") from exc
        except OSError as exc:
            raise ConnectError(f"connecting failed: {exc.strerror or exc}") from exc
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        family, kind = connecting.family, connecting.type
        self._socket = _RawSocket(family, kind, fileno=connecting.detach())
        self._socket.setblocking(False)
        try:
            self._shake_hands(until)
            if isinstance(context, _PSKContext) and self._tls.getpeercert(binary_form=True) is not None:
                raise ConnectError("the gateway came with a certificate and did not use the pre-shared key")
        except BaseException:
            self._socket.close()
            raise
        self.version = self._tls.version() or ""
        cipher = self._tls.cipher()
        self.cipher = cipher[0] if cipher else ""
        self.resumed = bool(self._tls.session_reused)

    def _shake_hands(self, until: float) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush_handshake(until)
                self._wait(READ, until)
                try:
                    piece = self._socket.recv(_PIECE_BYTES)
                except BlockingIOError:
                    continue
                except OSError as exc:
                    raise ConnectError(f"TLS handshake: {exc.strerror}") from exc
                if not piece:
                    raise ConnectError("TLS handshake: the gateway hung up") from None
                self.received_bytes += len(piece)
                self._incoming.write(piece)
            except ssl.SSLCertVerificationError as exc:
                raise ConnectError(f"the gateway's certificate: {exc.verify_message}") from exc
            except ssl.SSLError as exc:
                raise ConnectError(f"TLS handshake: {exc.reason}") from exc
            else:
                self._flush_handshake(until)
                return

    def _flush_handshake(self, until: float) -> None:
        self._unsent += self._outgoing.read()
        try:
            while not self._flush():
                self._wait(WRITE, until)
        except OSError as exc:
            raise ConnectError(f"TLS handshake: {exc.strerror}") from exc

    def _wait(self, event: int, until: float) -> None:
        hub = get_hub()
        with_deadline = socket.timeout("TLS handshake timed out")
        left = until - time.monotonic()
        if left <= 0:
            raise ConnectError("TLS handshake timed out")
        try:
            socket.wait(hub.loop.io(self._socket.fileno(), event), timeout=left, timeout_exc=with_deadline)
        except TimeoutError as exc:
            raise ConnectError("TLS handshake timed out") from exc

    # What paho calls

    def fileno(self) -> int:
        """Return the descriptor."""
        return int(self._socket.fileno())

    def setblocking(self, flag: bool) -> None:
        """Accept what is the case anyway."""
        if flag:
            raise ValueError("this connection never blocks")

    def pending(self) -> int:
        """Return how many bytes wait that were deciphered already."""
        return len(self._clear) - self._at

    def recv(self, count: int) -> bytes:
        """Return up to `count` bytes; none at the end.

        :raises BlockingIOError: when there are none now.
        """
        at = self._at
        if at == len(self._clear):
            self._fill()
            at = 0
        piece = self._clear[at : at + count]
        self._at = at + len(piece)
        return piece

    def _fill(self) -> None:
        try:
            self._clear = self._tls.read(_PIECE_BYTES)
        except ssl.SSLWantReadError:
            try:
                piece = self._socket.recv(_PIECE_BYTES)
            except BlockingIOError:
                self.dry = True
                raise
            if piece:
                self.received_bytes += len(piece)
                self._incoming.write(piece)
            else:
                self._incoming.write_eof()
            try:
                self._clear = self._tls.read(_PIECE_BYTES)
            except ssl.SSLWantReadError:
                self._clear, self._at, self.dry = b"", 0, len(piece) < _PIECE_BYTES
                raise BlockingIOError from None
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                self._clear = b""
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            self._clear = b""
        self._at = 0

    def send(self, data: bytes | bytearray) -> int:
        """Take in all of the data, and send what the network takes now.

        :raises BlockingIOError: when data taken in before is still waiting.
        """
        if self._unsent and not self._flush():
            raise BlockingIOError
        self._tls.write(data)
        self._unsent = self._outgoing.read()
        self._flush()
        return len(data)

    @property
    def waiting(self) -> bool:
        """Whether something that was taken in has not been sent."""
        return bool(self._unsent)

    def flush(self) -> None:
        """Send what waits, as far as the network takes it.

        :raises OSError: when the connection is lost.
        """
        self._flush()

    def _flush(self) -> bool:
        while self._unsent:
            try:
                count = self._socket.send(self._unsent)
            except BlockingIOError:
                return False
            self.sent_bytes += count
            self._unsent = self._unsent[count:]
        return True

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()
