# SPDX-License-Identifier: Apache-2.0
"""Look at an MQTT listener from outside and say what it did, in words: the one probe of `bednet verify` and the suites.

Offers:

- :func:`tcp`: does a port answer at all.
- :func:`handshake`: a TLS handshake with a chosen :class:`Offer` and certificate or pre-shared key; what came of it.
- :func:`hello`: a hand-made ClientHello for what this machine's OpenSSL may no longer offer (TLS 1.0, RC4, export
  ciphers): the refusal seen is the server's, never our own library's.
- :func:`enter`: the same, followed by an MQTT CONNECT; who was let in, and who was told no and why.
- :class:`Session`: a live MQTT session (3.1.1 or 5) whose events are waited for, never slept for.
- :meth:`Session.fence`: the proof that nothing arrives: a permitted message sent later has arrived.
- :func:`dial`, :class:`Channel`, :func:`connect_packet`, ...: raw bytes, where a library is too well-behaved.
- :func:`request`: one HTTP request to a token service, over the same TLS; what came of it as a :class:`Reply`.

Nothing here raises on a refusal: a refusal is what a probe looks for, so it comes back as a value. What raises is a
:class:`ProbeError`: the probe could not find out.
"""

from __future__ import annotations

import base64
import functools
import http.client
import io
import json
import os
import re
import secrets
import socket
import ssl
import struct
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlencode

import paho.mqtt.client as paho
from cryptography import x509
from cryptography.x509.oid import NameOID
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from bednet import psk
from bednet.errors import BednetError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

TIMEOUT = 5.0
"""Seconds that a probe waits for one answer."""

# After a TLS 1.3 handshake the server still checks our certificate. If it is content it sends session tickets, else an
# alert; a server that sends neither is given this long (seconds) before we speak.
_VERDICT_GRACE = 0.5

TLS_VERSIONS = {
    "1.0": ssl.TLSVersion.TLSv1,
    "1.1": ssl.TLSVersion.TLSv1_1,
    "1.2": ssl.TLSVersion.TLSv1_2,
    "1.3": ssl.TLSVersion.TLSv1_3,
}

# MQTT 3.1.1, table 3.1
_CONNACK_3 = {
    0: "accepted",
    1: "unacceptable protocol version",
    2: "client id refused",
    3: "server unavailable",
    4: "bad user name or password",
    5: "not authorized",
}

NOT_AUTHORIZED = 0x87
PACKET_TOO_LARGE = 0x95
SESSION_TAKEN_OVER = 0x8E

Version = Literal[4, 5]
"""MQTT 3.1.1 is protocol level 4, MQTT 5 is 5."""


class ProbeError(BednetError):
    """The probe could not find out what it was asked."""

    code = "probe"


class NothingArrivedError(ProbeError):
    """What was waited for did not come before the deadline, or the connection was lost while waiting."""


class NotAdmittedError(ProbeError):
    """A session was wanted and the gateway did not let us in; ``answer`` says what it did instead."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(str(answer))
        self.answer = answer


class Outcome(StrEnum):
    """How an attempt ended."""

    ACCEPTED = "accepted"
    REFUSED = "refused"  # MQTT said no: CONNACK with a reason
    ALERT = "TLS alert"  # the server said no in TLS
    CLOSED = "closed without a word"
    RESET = "connection reset"
    TIMEOUT = "no answer in time"
    UNREACHABLE = "unreachable"  # no TCP connection
    DISTRUSTED = "server not trusted"  # we said no: the server's certificate is not what we want
    MISMATCH = "not what we speak"  # an answer that is no TLS, or no MQTT
    CANNOT_OFFER = "cannot be offered from here"  # our own OpenSSL refuses: nothing was learnt about the server


@dataclass(frozen=True)
class Listener:
    """Where to knock.

    :param host: address or name to connect to.
    :param port: TCP port.
    :param ca: PEM file of the site's CA; the server's certificate is checked against it. None: not checked, which is
        for looking only: no password is sent there.
    :param server_name: the name that the server's certificate must carry (SNI); default ``host``.
    :param websockets: MQTT over WebSockets.
    :param tls: False speaks plain TCP.
    """

    host: str
    port: int
    ca: Path | None = None
    server_name: str | None = None
    websockets: bool = False
    tls: bool = True

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Credentials:
    """Who we say we are: a client certificate with its key (PEM files), a user name with a password, or nothing.

    :param psk: a pre-shared key with its identity; it replaces certificates on both sides.
    """

    certificate: Path | None = None
    key: Path | None = None
    username: str | None = None
    password: str | bytes | None = field(default=None, repr=False)
    psk_identity: str | None = None
    psk: bytes | None = field(default=None, repr=False)

    @property
    def client_id(self) -> str:
        """The client id that goes with them: the identity, which a gateway asks for; or one made up."""
        return self.username or self.psk_identity or _common_name(self.certificate) or made_up_name()


NOBODY = Credentials()


def _common_name(certificate: Path | None) -> str | None:
    """Return the CN in a PEM file; None when there is none that could be a client id."""
    if certificate is None:
        return None
    try:
        subject = x509.load_pem_x509_certificate(certificate.read_bytes()).subject
        names = [str(name.value) for name in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except (OSError, ValueError):
        # Some certificates are made to be odd.
        return None
    return names[0] if names and names[0].isprintable() else None


@dataclass(frozen=True)
class Offer:
    """What the client offers in its TLS ClientHello.

    :param minimum: lowest version, "1.0" to "1.3".
    :param maximum: highest version.
    :param ciphers: OpenSSL cipher list for TLS 1.2 and below; None is OpenSSL's default.
    :param group: the one elliptic curve offered, by OpenSSL's name (``prime256v1``); None is OpenSSL's default list.
    """

    minimum: str = "1.2"
    maximum: str = "1.3"
    ciphers: str | None = None
    group: str | None = None

    def __str__(self) -> str:
        versions = self.minimum if self.minimum == self.maximum else f"{self.minimum} to {self.maximum}"
        return f"TLS {versions}" + (f" with {self.ciphers}" if self.ciphers else "")


MODERN = Offer()


@dataclass(frozen=True)
class ServerHello:
    """What the server chose in its ServerHello (RFC 8446 4.1.3): version, and cipher suite by OpenSSL's name."""

    version: str
    cipher: str


@dataclass(frozen=True)
class Handshake:
    """What came of a TLS handshake.

    :param outcome: :attr:`Outcome.ACCEPTED` only if the server has also accepted our certificate (or asked for none).
    :param reason: the alert's name of RFC 8446 6.2 in words ("certificate required"), or what else happened.
    :param hello: what the server chose; None if it refused before choosing. A server that has chosen a weak suite and
        then misses our certificate sends the same alert as one that has refused the suite: this tells them apart.
    :param certificate: the server's certificate, DER.
    """

    outcome: Outcome
    reason: str
    hello: ServerHello | None = None
    certificate: bytes | None = None

    @property
    def accepted(self) -> bool:
        """Whether the handshake was completed by both sides."""
        return self.outcome is Outcome.ACCEPTED

    def __str__(self) -> str:
        if self.accepted and self.hello:
            return f"TLS {self.hello.version}, {self.hello.cipher}"
        return _phrase(self.outcome, self.reason)


@dataclass(frozen=True)
class Answer:
    """What came of an attempt to connect.

    :param reason: the alert's or the CONNACK's reason in words, or what else happened.
    :param code: the CONNACK's return code (MQTT 3.1.1: 0 to 5) or reason code (MQTT 5); None without a CONNACK.
    :param tls: the handshake before it; None if there was none.
    """

    outcome: Outcome
    reason: str
    code: int | None = None
    tls: Handshake | None = None

    @property
    def accepted(self) -> bool:
        """Whether the client was let in."""
        return self.outcome is Outcome.ACCEPTED

    def __str__(self) -> str:
        if self.accepted:
            return f"accepted ({self.tls})" if self.tls else "accepted"
        text = _phrase(self.outcome, self.reason)
        return text if self.code is None else f"{text} (0x{self.code:02x})"


def _phrase(outcome: Outcome, reason: str) -> str:
    return f"{outcome}: {reason}" if reason and reason != outcome.value else outcome.value


# --- TCP ------------------------------------------------------------------------------------------------------------


def tcp(host: str, port: int, timeout: float = TIMEOUT) -> Answer:
    """Say whether a TCP port answers; a closed one is UNREACHABLE with "connection refused", a filtered one TIMEOUT."""
    try:
        socket.create_connection((host, port), timeout).close()
    except OSError as exc:
        return _tcp_failure(exc)
    return Answer(Outcome.ACCEPTED, "TCP connection accepted")


def _tcp_failure(exc: OSError) -> Answer:
    if isinstance(exc, TimeoutError):
        return Answer(Outcome.TIMEOUT, "no TCP connection")
    if isinstance(exc, ConnectionRefusedError):
        return Answer(Outcome.UNREACHABLE, "connection refused")
    if isinstance(exc, socket.gaierror):
        return Answer(Outcome.UNREACHABLE, "name not known")
    return Answer(Outcome.UNREACHABLE, (exc.strerror or str(exc)).lower())


# --- TLS ------------------------------------------------------------------------------------------------------------

_context_lock = threading.Lock()


class _NamedContext(ssl.SSLContext):
    """A context that asks for one server name, whatever host paho connects to."""

    server_name: str | None = None
    psk_only = False

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:  # ours: *args are the standard library's own
        kwargs["server_hostname"] = self.server_name or kwargs.get("server_hostname")
        wrapped = super().wrap_socket(*args, **kwargs)
        try:
            wrapped.do_handshake()
            if self.psk_only:
                _check_psk(wrapped)
        except BaseException:
            # paho would leave it open.
            wrapped.close()
            raise
        return wrapped


# All that OpenSSL has of TLS 1.2 with a pre-shared key, forward secrecy by elliptic curves, and AEAD.
_PSK_SUITES = "ECDHE-PSK-CHACHA20-POLY1305"


class _NotProvenError(ssl.SSLError):
    """The server came with a certificate where it should have used our key."""


def _check_psk(tls: ssl.SSLSocket | ssl.SSLObject) -> None:
    """Refuse a server that came with a certificate instead: nothing has been proven by our key then."""
    if tls.getpeercert(binary_form=True) is not None:
        raise _NotProvenError(1, "the server showed a certificate and did not use the pre-shared key")


def tls_context(
    offer: Offer = MODERN,
    credentials: Credentials = NOBODY,
    ca: Path | None = None,
    server_name: str | None = None,
) -> ssl.SSLContext:
    """Return a client's TLS context that offers exactly ``offer``.

    :param ca: PEM file that the server's certificate must chain to; None checks nothing.
    :param server_name: asked for and checked instead of the host connected to.
    :raises ProbeError: if this machine's OpenSSL cannot offer it, or a file is no certificate or key.
    """
    context = _NamedContext(ssl.PROTOCOL_TLS_CLIENT)
    context.server_name = server_name
    try:
        if ca is None:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        else:
            context.load_verify_locations(cafile=ca)
        # Python warns of the old versions; we offer them in order to be refused.
        with _context_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = TLS_VERSIONS[offer.minimum]
            context.maximum_version = TLS_VERSIONS[offer.maximum]
        if credentials.psk is not None:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            context.psk_only = True
            psk.offer(context, credentials.psk_identity or "", credentials.psk)
        if offer.ciphers or credentials.psk is not None:
            context.set_ciphers(offer.ciphers or _PSK_SUITES)
        if offer.group:
            context.set_ecdh_curve(offer.group)
        if credentials.certificate:
            context.load_cert_chain(credentials.certificate, credentials.key)
    except (ssl.SSLError, ValueError, OSError, psk.UnavailableError) as exc:
        raise ProbeError(f"{offer} cannot be offered from here: {exc}") from exc
    return context


class Channel:
    """A connection, TLS or plain, that carries the bytes it is given. Close it, or use it as a context manager.

    :ivar hello: what the server chose in its ServerHello, or None.
    :ivar certificate: the server's certificate, DER, or None.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext | None = None, server_name: str | None = None):
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._first = bytearray()
        self._early = b""
        self._tls = (
            None if context is None else context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        )
        self.hello: ServerHello | None = None
        self.certificate: bytes | None = None

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection without a word of goodbye."""
        self._sock.close()

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self._sock.sendall(data)

    def _fill(self, deadline: float) -> None:
        self._sock.settimeout(max(deadline - time.monotonic(), 0.001))
        data = self._sock.recv(65536)
        if self.hello is None and len(self._first) < 16384:  # noqa: PLR2004 - the largest TLS record (RFC 8446 5.1)
            self._first += data
            self.hello = _parse_server_hello(bytes(self._first))
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def shake_hands(self, timeout: float = TIMEOUT, grace: float = _VERDICT_GRACE) -> None:
        """Complete the TLS handshake and wait until the server has judged our certificate.

        :param grace: seconds that a server is given which says nothing of its own accord after a TLS 1.3 handshake.
        :raises OSError: as :mod:`ssl` does, on a refusal by either side or a lost connection.
        """
        if self._tls is None:
            return
        deadline = time.monotonic() + timeout
        try:
            while True:
                try:
                    self._tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    self._flush()
                    self._fill(deadline)
        finally:
            with suppress(OSError):
                self._flush()
        self.certificate = self._tls.getpeercert(binary_form=True)
        if getattr(self._tls.context, "psk_only", False):
            _check_psk(self._tls)
        if self._tls.version() == "TLSv1.3" and grace > 0:
            with suppress(TimeoutError):
                self._fill(min(deadline, time.monotonic() + grace))
            with suppress(ssl.SSLWantReadError):
                self._early = self._tls.read(1)

    def send(self, data: bytes) -> None:
        """Send bytes.

        :raises OSError: if the connection is lost.
        """
        self._sock.sendall(self.seal(data))

    def seal(self, data: bytes) -> bytes:
        """Return what goes over the wire for ``data``: the next TLS records, or ``data`` itself without TLS."""
        if self._tls is None:
            return data
        self._tls.write(data)
        return self._outgoing.read()

    def send_sealed(self, records: bytes) -> None:
        """Send bytes as they are: what :meth:`seal` made, and a test may have changed.

        :raises OSError: if the connection is lost.
        """
        self._sock.sendall(records)

    def receive(self, timeout: float = TIMEOUT) -> bytes:
        """Return the next bytes from the server; ``b""`` when it has closed.

        :raises TimeoutError: if none came within ``timeout`` seconds.
        :raises OSError: on a TLS alert or a lost connection.
        """
        if self._early:
            early, self._early = self._early, b""
            return early
        deadline = time.monotonic() + timeout
        if self._tls is None:
            self._sock.settimeout(max(deadline - time.monotonic(), 0.001))
            return self._sock.recv(65536)
        while True:
            try:
                return self._tls.read(65536)
            except ssl.SSLWantReadError:
                self._fill(deadline)
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""

    def packet(self, timeout: float = TIMEOUT) -> bytes:
        """Return one whole MQTT packet; what there is of it if the server closes in its middle.

        :raises OSError: as :meth:`receive`.
        """
        data = b""
        deadline = time.monotonic() + timeout
        while (size := _packet_size(data)) is None or len(data) < size:
            more = self.receive(max(deadline - time.monotonic(), 0.001))
            if not more:
                return data
            data += more
        self._early = data[size:] + self._early
        return data[:size]


def _packet_size(data: bytes) -> int | None:
    """Return the size of the MQTT packet that ``data`` begins, in bytes, or None if too little of it is there."""
    length = shift = 0
    for index, byte in enumerate(data[1:5], start=1):
        length |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return 1 + index + length
    return None


def dial(
    listener: Listener, credentials: Credentials = NOBODY, *, offer: Offer = MODERN, timeout: float = TIMEOUT
) -> Channel:
    """Open a raw connection to a listener, TLS handshake included; the caller closes it.

    :raises ProbeError: if our side cannot make the offer.
    :raises OSError: on a refusal or a lost connection, as :mod:`socket` and :mod:`ssl` do.
    """
    context = tls_context(offer, credentials, listener.ca) if listener.tls else None
    channel = Channel(
        socket.create_connection((listener.host, listener.port), timeout),
        context,
        listener.server_name or listener.host,
    )
    try:
        channel.shake_hands(timeout)
    except BaseException:
        channel.close()
        raise
    return channel


def handshake(
    listener: Listener, credentials: Credentials = NOBODY, *, offer: Offer = MODERN, timeout: float = TIMEOUT
) -> Handshake:
    """Do a TLS handshake and say what came of it, the server's verdict on our certificate included."""
    seen, channel = _handshake(listener, credentials, offer, timeout)
    if channel is not None:
        channel.close()
    return seen


def _handshake(
    listener: Listener, credentials: Credentials, offer: Offer, timeout: float, grace: float = _VERDICT_GRACE
) -> tuple[Handshake, Channel | None]:
    try:
        context = tls_context(offer, credentials, listener.ca)
    except ProbeError as exc:
        return Handshake(Outcome.CANNOT_OFFER, str(exc)), None
    try:
        sock = socket.create_connection((listener.host, listener.port), timeout)
    except OSError as exc:
        failure = _tcp_failure(exc)
        return Handshake(failure.outcome, failure.reason), None
    channel = Channel(sock, context, listener.server_name or listener.host)
    try:
        channel.shake_hands(timeout, grace)
    except OSError as exc:
        channel.close()
        outcome, reason = _tls_failure(exc)
        return Handshake(outcome, reason, channel.hello, channel.certificate), None
    return Handshake(Outcome.ACCEPTED, "accepted", channel.hello, channel.certificate), channel


def _tls_failure(exc: OSError) -> tuple[Outcome, str]:  # noqa: PLR0911 - a table of cases
    if isinstance(exc, _NotProvenError):
        return Outcome.DISTRUSTED, exc.args[1]
    if isinstance(exc, ssl.SSLCertVerificationError):
        return Outcome.DISTRUSTED, exc.verify_message or str(exc)
    if isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return Outcome.CLOSED, Outcome.CLOSED.value
    if isinstance(exc, ssl.SSLError):
        reason = exc.reason or str(exc)
        if match := re.search(r"ALERT_([A-Z_]+)", reason):
            return Outcome.ALERT, match[1].lower().replace("_", " ")
        if match := re.search(r"alert number (\d+)", str(exc)):
            return Outcome.ALERT, _ALERTS.get(int(match[1]), f"alert {match[1]}")
        if match := re.search(r"alert ([a-z ]+) \(", str(exc)):  # one that Python has no name for
            return Outcome.ALERT, match[1]
        if "UNEXPECTED_EOF" in reason:
            return Outcome.CLOSED, Outcome.CLOSED.value
        if reason.startswith("NO_") or reason == "UNSUPPORTED_PROTOCOL":
            return Outcome.CANNOT_OFFER, reason.lower().replace("_", " ")
        return Outcome.MISMATCH, reason.lower().replace("_", " ")
    if isinstance(exc, TimeoutError):
        return Outcome.TIMEOUT, Outcome.TIMEOUT.value
    if isinstance(exc, ConnectionError):
        return Outcome.RESET, Outcome.RESET.value
    return Outcome.MISMATCH, str(exc)


# RFC 8446 6.2, and those of RFC 5246 7.2 that old servers send.
_ALERTS = {
    0: "close notify",
    10: "unexpected message",
    20: "bad record mac",
    22: "record overflow",
    40: "handshake failure",
    42: "bad certificate",
    43: "unsupported certificate",
    44: "certificate revoked",
    45: "certificate expired",
    46: "certificate unknown",
    47: "illegal parameter",
    48: "unknown ca",
    49: "access denied",
    50: "decode error",
    51: "decrypt error",
    70: "protocol version",
    71: "insufficient security",
    80: "internal error",
    86: "inappropriate fallback",
    109: "missing extension",
    112: "unrecognized name",
    115: "unknown psk identity",
    116: "certificate required",
    120: "no application protocol",
}

# --- A hand-made ClientHello ----------------------------------------------------------------------------------------

_HELLO_VERSIONS = {"SSL 3.0": 0x0300, "1.0": 0x0301, "1.1": 0x0302, "1.2": 0x0303, "1.3": 0x0304}
_VERSION_NAMES = {number: name for name, number in _HELLO_VERSIONS.items()}

# Cipher suites by IANA number with OpenSSL's name (ciphers(1)), in the families that a listener must refuse.
STRONG_SUITES = {
    0xC02B: "ECDHE-ECDSA-AES128-GCM-SHA256",
    0xC02C: "ECDHE-ECDSA-AES256-GCM-SHA384",
    0xC02F: "ECDHE-RSA-AES128-GCM-SHA256",
    0xC030: "ECDHE-RSA-AES256-GCM-SHA384",
    0xCCA8: "ECDHE-RSA-CHACHA20-POLY1305",
    0xCCA9: "ECDHE-ECDSA-CHACHA20-POLY1305",
}
BROKEN_SUITES = {
    0x0001: "NULL-MD5",
    0x0002: "NULL-SHA",
    0x003B: "NULL-SHA256",
    0xC006: "ECDHE-ECDSA-NULL-SHA",
    0xC010: "ECDHE-RSA-NULL-SHA",
    0x0003: "EXP-RC4-MD5",
    0x0008: "EXP-DES-CBC-SHA",
    0x0014: "EXP-EDH-RSA-DES-CBC-SHA",
    0x0004: "RC4-MD5",
    0x0005: "RC4-SHA",
    0xC007: "ECDHE-ECDSA-RC4-SHA",
    0xC011: "ECDHE-RSA-RC4-SHA",
    0x0009: "DES-CBC-SHA",
    0x000A: "DES-CBC3-SHA",
    0x0016: "DHE-RSA-DES-CBC3-SHA",
    0xC008: "ECDHE-ECDSA-DES-CBC3-SHA",
    0xC012: "ECDHE-RSA-DES-CBC3-SHA",
    0x0034: "ADH-AES128-SHA",
    0x00A6: "ADH-AES128-GCM-SHA256",
    0xC015: "AECDH-NULL-SHA",
    0xC018: "AECDH-AES128-SHA",
    0xC019: "AECDH-AES256-SHA",
}
CBC_SUITES = {
    0xC009: "ECDHE-ECDSA-AES128-SHA",
    0xC00A: "ECDHE-ECDSA-AES256-SHA",
    0xC013: "ECDHE-RSA-AES128-SHA",
    0xC014: "ECDHE-RSA-AES256-SHA",
    0xC023: "ECDHE-ECDSA-AES128-SHA256",
    0xC024: "ECDHE-ECDSA-AES256-SHA384",
    0xC027: "ECDHE-RSA-AES128-SHA256",
    0xC028: "ECDHE-RSA-AES256-SHA384",
    0x0033: "DHE-RSA-AES128-SHA",
    0x0039: "DHE-RSA-AES256-SHA",
    0x0067: "DHE-RSA-AES128-SHA256",
    0x006B: "DHE-RSA-AES256-SHA256",
    0xC072: "ECDHE-ECDSA-CAMELLIA128-SHA256",
    0xC073: "ECDHE-ECDSA-CAMELLIA256-SHA384",
    0xC076: "ECDHE-RSA-CAMELLIA128-SHA256",
    0xC077: "ECDHE-RSA-CAMELLIA256-SHA384",
}
STATIC_KEY_SUITES = {
    0x002F: "AES128-SHA",
    0x0035: "AES256-SHA",
    0x003C: "AES128-SHA256",
    0x003D: "AES256-SHA256",
    0x009C: "AES128-GCM-SHA256",
    0x009D: "AES256-GCM-SHA384",
    0xC09C: "AES128-CCM",
    0xC09D: "AES256-CCM",
}
# With a pre-shared key: the same families.
STRONG_PSK_SUITES = {0xCCAC: "ECDHE-PSK-CHACHA20-POLY1305"}
BROKEN_PSK_SUITES = {
    0x002C: "PSK-NULL-SHA",
    0x002D: "DHE-PSK-NULL-SHA",
    0x00B0: "PSK-NULL-SHA256",
    0xC039: "ECDHE-PSK-NULL-SHA",
    0xC03A: "ECDHE-PSK-NULL-SHA256",
    0x008A: "PSK-RC4-SHA",
    0x008E: "DHE-PSK-RC4-SHA",
    0xC033: "ECDHE-PSK-RC4-SHA",
    0x008B: "PSK-3DES-EDE-CBC-SHA",
    0x008F: "DHE-PSK-3DES-EDE-CBC-SHA",
    0xC034: "ECDHE-PSK-3DES-EDE-CBC-SHA",
}
CBC_PSK_SUITES = {
    0x0090: "DHE-PSK-AES128-CBC-SHA",
    0x0091: "DHE-PSK-AES256-CBC-SHA",
    0x00B2: "DHE-PSK-AES128-CBC-SHA256",
    0x00B3: "DHE-PSK-AES256-CBC-SHA384",
    0xC035: "ECDHE-PSK-AES128-CBC-SHA",
    0xC036: "ECDHE-PSK-AES256-CBC-SHA",
    0xC037: "ECDHE-PSK-AES128-CBC-SHA256",
    0xC038: "ECDHE-PSK-AES256-CBC-SHA384",
}
STATIC_PSK_SUITES = {
    0x008C: "PSK-AES128-CBC-SHA",
    0x008D: "PSK-AES256-CBC-SHA",
    0x00A8: "PSK-AES128-GCM-SHA256",
    0x00A9: "PSK-AES256-GCM-SHA384",
    0x00AE: "PSK-AES128-CBC-SHA256",
    0x00AF: "PSK-AES256-CBC-SHA384",
    0xC0A4: "PSK-AES128-CCM",
    0xC0A5: "PSK-AES256-CCM",
    0xC0A8: "PSK-AES128-CCM8",
    0xCCAB: "PSK-CHACHA20-POLY1305",
}
TLS13_SUITES = {
    0x1301: "TLS_AES_128_GCM_SHA256",
    0x1302: "TLS_AES_256_GCM_SHA384",
    0x1303: "TLS_CHACHA20_POLY1305_SHA256",
    0x1304: "TLS_AES_128_CCM_SHA256",
    0x1305: "TLS_AES_128_CCM_8_SHA256",
}


@functools.cache
def suite_names() -> dict[int, str]:
    """Return every cipher suite that we know: IANA number -> OpenSSL's name."""
    known = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    known.set_ciphers("ALL:COMPLEMENTOFALL:@SECLEVEL=0")
    ours = BROKEN_SUITES | CBC_SUITES | STATIC_KEY_SUITES | STRONG_SUITES | TLS13_SUITES
    ours |= BROKEN_PSK_SUITES | CBC_PSK_SUITES | STATIC_PSK_SUITES | STRONG_PSK_SUITES
    return {cipher["id"] & 0xFFFF: cipher["name"] for cipher in known.get_ciphers()} | ours


def hello(listener: Listener, version: str, suites: Sequence[int], timeout: float = TIMEOUT) -> Handshake:
    """Send a hand-made ClientHello and say how the server answers; the handshake goes no further.

    :param version: the only one offered: "SSL 3.0", "1.0", "1.1", "1.2" or "1.3".
    :param suites: IANA numbers of the cipher suites offered.
    :returns: ACCEPTED with the server's choice, or ALERT with its reason, or what else happened.
    """
    try:
        with socket.create_connection((listener.host, listener.port), timeout) as sock:
            sock.sendall(_client_hello(_HELLO_VERSIONS[version], suites, listener.server_name or listener.host))
            deadline = time.monotonic() + timeout
            data = b""
            while True:
                sock.settimeout(max(deadline - time.monotonic(), 0.001))
                more = sock.recv(65536)
                data += more
                if chosen := _parse_server_hello(data):
                    return Handshake(Outcome.ACCEPTED, "accepted", chosen)
                if len(data) >= 7 and data[0] == 0x15:  # noqa: PLR2004 - an alert record: 5 bytes, level, description
                    return Handshake(Outcome.ALERT, _ALERTS.get(data[6], f"alert {data[6]}"))
                if not more:
                    outcome = Outcome.MISMATCH if data else Outcome.CLOSED
                    return Handshake(outcome, outcome.value)
    except TimeoutError:
        return Handshake(Outcome.TIMEOUT, Outcome.TIMEOUT.value)
    except ConnectionResetError:
        return Handshake(Outcome.RESET, Outcome.RESET.value)
    except OSError as exc:
        failure = _tcp_failure(exc)
        return Handshake(failure.outcome, failure.reason)


def _client_hello(version: int, suites: Sequence[int], server_name: str) -> bytes:
    def vector(data: bytes, size: int) -> bytes:
        return len(data).to_bytes(size) + data

    def extension(number: int, data: bytes) -> bytes:
        return number.to_bytes(2) + vector(data, 2)

    extensions = (
        extension(0x000A, vector(bytes.fromhex("001d001700180019"), 2))  # x25519, P-256, P-384, P-521
        + extension(0x000B, b"\x01\x00")  # uncompressed points
        + extension(0xFF01, b"\x00")  # secure renegotiation (RFC 5746)
        + extension(0x000D, vector(bytes.fromhex("04030503060308070804080508060401050106010203" + "0201"), 2))
    )
    if not re.fullmatch(r"[0-9.]+|.*:.*", server_name):  # RFC 6066 3: no addresses
        extensions += extension(0x0000, vector(b"\x00" + vector(server_name.encode("idna"), 2), 2))
    if version == _HELLO_VERSIONS["1.3"]:
        share = b"\x00\x1d" + vector(secrets.token_bytes(32), 2)  # x25519: any 32 bytes are a public key
        extensions += (
            extension(0x002B, vector(version.to_bytes(2), 1))
            + extension(0x0033, vector(share, 2))
            + extension(0x002D, vector(b"\x01", 1))
        )
    body = (
        min(version, 0x0303).to_bytes(2)
        + secrets.token_bytes(32)
        + vector(b"", 1)
        + vector(b"".join(suite.to_bytes(2) for suite in suites), 2)
        + b"\x01\x00"
        + vector(extensions, 2)
    )
    return b"\x16" + min(version, 0x0301).to_bytes(2) + vector(b"\x01" + vector(body, 3), 2)


def _parse_server_hello(data: bytes) -> ServerHello | None:
    """Return what the server chose if ``data`` begins with a whole ServerHello record (RFC 8446 4.1.3), else None."""
    if len(data) < 5 or data[0] != 0x16 or len(data) < 9 or data[5] != 0x02:  # noqa: PLR2004 - header sizes
        return None
    body = data[9 : 9 + int.from_bytes(data[6:9])]
    if len(body) < int.from_bytes(data[6:9]):
        return None
    version = int.from_bytes(body[:2])
    at = 35 + body[34]
    suite = int.from_bytes(body[at : at + 2])
    at += 5
    while at + 4 <= len(body):
        number, size = struct.unpack_from(">HH", body, at)
        if number == 0x002B:  # noqa: PLR2004 - supported_versions: the real version of TLS 1.3
            version = int.from_bytes(body[at + 4 : at + 6])
        at += 4 + size
    return ServerHello(
        _VERSION_NAMES.get(version, f"0x{version:04x}"), suite_names().get(suite, f"suite 0x{suite:04x}")
    )


# --- MQTT, by hand --------------------------------------------------------------------------------------------------


def _text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack(">H", len(data)) + data


def mqtt_packet(header: int, body: bytes) -> bytes:
    """Return an MQTT packet: first byte, remaining length (MQTT 5, 1.5.5), body."""
    length, size = len(body), b""
    while True:
        length, digit = divmod(length, 128)
        size += bytes([digit | (0x80 if length else 0)])
        if not length:
            return bytes([header]) + size + body


def connect_packet(
    client_id: str,
    *,
    username: str | None = None,
    password: str | bytes | None = None,
    version: Version = 5,
    clean: bool = True,
    keepalive: int = 30,
) -> bytes:
    """Return a CONNECT packet (MQTT 5, 3.1); ``keepalive`` in seconds."""
    flags = (0x02 if clean else 0) | (0x80 if username is not None else 0) | (0x40 if password is not None else 0)
    body = _text("MQTT") + bytes([version, flags]) + struct.pack(">H", keepalive)
    body += b"\x00" if version == 5 else b""  # noqa: PLR2004 - no properties
    body += _text(client_id)
    body += _text(username) if username is not None else b""
    body += _text(password) if password is not None else b""
    return mqtt_packet(0x10, body)


def publish_packet(topic: str | bytes, payload: bytes, *, version: Version = 5, retain: bool = False) -> bytes:
    """Return a PUBLISH packet with QoS 1 and packet id 1 for any topic, wildcards and bad UTF-8 included."""
    body = _text(topic) + b"\x00\x01" + (b"\x00" if version == 5 else b"") + payload  # noqa: PLR2004
    return mqtt_packet(0x32 | (0x01 if retain else 0), body)


DISCONNECT_PACKET = b"\xe0\x00"


def enter(
    listener: Listener,
    credentials: Credentials = NOBODY,
    *,
    offer: Offer = MODERN,
    client_id: str | None = None,
    version: Version = 5,
    timeout: float = TIMEOUT,
) -> Answer:
    """Try to be let in - TCP, TLS, MQTT CONNECT - say what the server answered, and leave again.

    :param client_id: default: the identity (:attr:`Credentials.client_id`).
    :param timeout: seconds for each of the three.
    :raises ValueError: if a password would go to a server whose certificate is not checked.
    """
    _guard_password(listener, credentials)
    if listener.websockets:
        try:
            with Session(listener, credentials, client_id=client_id, version=version, timeout=timeout):
                return Answer(Outcome.ACCEPTED, "accepted", 0)
        except NotAdmittedError as exc:
            return exc.answer
    tls: Handshake | None = None
    if listener.tls:
        tls, channel = _handshake(listener, credentials, offer, timeout)
        if channel is None:
            return Answer(tls.outcome, tls.reason, None, tls)
    else:
        try:
            channel = Channel(socket.create_connection((listener.host, listener.port), timeout))
        except OSError as exc:
            return _tcp_failure(exc)
    packet = connect_packet(
        client_id or credentials.client_id,
        username=credentials.username,
        password=credentials.password,
        version=version,
    )
    with channel:
        try:
            channel.send(packet)
            answer = _read_connack(channel.packet(timeout), version, tls)
            if answer.accepted:
                channel.send(DISCONNECT_PACKET)
        except OSError as exc:
            outcome, reason = _tls_failure(exc)
            return Answer(outcome, reason, None, tls)
    return answer


def made_up_name() -> str:
    """Return a client id that nobody else has."""
    return f"nobody-{secrets.token_hex(6)}"


def _guard_password(listener: Listener, credentials: Credentials) -> None:
    if listener.tls and listener.ca is None and credentials.password:
        raise ValueError("a password is not sent to a server whose certificate is not checked: give the listener a ca")


def _read_connack(data: bytes, version: Version, tls: Handshake | None) -> Answer:
    if not data:
        return Answer(Outcome.CLOSED, Outcome.CLOSED.value, None, tls)
    if data[0] == 0x15 and len(data) >= 7:  # noqa: PLR2004 - a TLS alert to a plaintext client
        return Answer(Outcome.ALERT, _ALERTS.get(data[6], f"alert {data[6]}"), None, tls)
    if data[0] != 0x20 or len(data) < 4:  # noqa: PLR2004 - CONNACK is at least 4 bytes (MQTT 3.1.1, 3.2)
        return Answer(Outcome.MISMATCH, f"{len(data)} bytes that are no CONNACK", None, tls)
    return _connack_answer(data[3], version, tls)


def _connack_answer(code: int, version: Version, tls: Handshake | None = None) -> Answer:
    outcome = Outcome.ACCEPTED if code == 0 else Outcome.REFUSED
    if version == 4:  # noqa: PLR2004
        return Answer(outcome, _CONNACK_3.get(code, f"return code {code}"), code, tls)
    return Answer(outcome, "accepted" if code == 0 else _reason_name(PacketTypes.CONNACK, code), code, tls)


def _reason_name(packet: int, code: int) -> str:
    try:
        return ReasonCode(packet, identifier=code).getName().lower()
    except (KeyError, AssertionError):
        return f"reason 0x{code:02x}"


# --- MQTT sessions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """A message that arrived."""

    topic: str
    payload: bytes
    qos: int
    retained: bool

    def __str__(self) -> str:
        return f"{self.topic} ({len(self.payload)} bytes{', retained' if self.retained else ''})"


@dataclass(frozen=True)
class Will:
    """What the gateway shall publish when the session ends without a DISCONNECT."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False


@dataclass(frozen=True)
class Receipt:
    """How the gateway acknowledged a packet of ours.

    :param code: MQTT 5 reason code; in MQTT 3.1.1 always 0 for a PUBACK, which says nothing about access.
    """

    code: int
    reason: str

    @property
    def granted(self) -> bool:
        """Whether the code stands for success. For MQTT 3.1.1 that is no proof: look at who receives the message."""
        return self.code < 0x80  # noqa: PLR2004 - MQTT 5, 2.4

    def __str__(self) -> str:
        return f"{self.reason} (0x{self.code:02x})"


@dataclass(frozen=True)
class Goodbye:
    """How a session ended: by us, by the gateway with a DISCONNECT and its reason code, or by a lost connection."""

    reason: str
    code: int | None = None

    def __str__(self) -> str:
        return self.reason if self.code is None else f"{self.reason} (0x{self.code:02x})"


class Session:
    """An MQTT session over paho-mqtt, used as a context manager: entered when the CONNACK says yes.

    :param client_id: default: the identity (:attr:`Credentials.client_id`), as bednet's gateways want it.
    :param version: 4 for MQTT 3.1.1, 5 for MQTT 5.
    :param clean: False resumes the session that the gateway holds, and leaves one behind.
    :param expiry: seconds that the gateway shall hold a session left behind (MQTT 5 only).
    :param will: published by the gateway when the session ends by :meth:`die`.
    :param keepalive: seconds.
    :param timeout: seconds that each wait lasts at most, unless it is told otherwise.
    :param reconnect: come back after a lost connection, send again what was not acknowledged, and subscribe again if
        the gateway has forgotten the session: what a good device does, and a probe does not.
    :raises NotAdmittedError: on entering, if the gateway does not let us in.
    """

    def __init__(
        self,
        listener: Listener,
        credentials: Credentials = NOBODY,
        *,
        client_id: str | None = None,
        version: Version = 5,
        clean: bool = True,
        expiry: int = 60,
        will: Will | None = None,
        keepalive: int = 30,
        timeout: float = TIMEOUT,
        reconnect: bool = False,
    ) -> None:
        _guard_password(listener, credentials)
        self.listener = listener
        self.version = version
        self.timeout = timeout
        self.goodbye: Goodbye | None = None
        self.resumed = False
        self.connections = 0
        self._clean = clean
        self._expiry = expiry
        self._keepalive = keepalive
        self._changed = threading.Condition()
        self._answer: Answer | None = None
        self._receipts: dict[int, list[Receipt]] = {}
        self._messages: list[Message] = []
        self._reconnect = reconnect
        self._subscriptions: dict[str, int] = {}
        mqtt5 = version == 5  # noqa: PLR2004
        self.client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id or credentials.client_id,
            clean_session=None if mqtt5 else clean,
            protocol=MQTTProtocolVersion.MQTTv5 if mqtt5 else MQTTProtocolVersion.MQTTv311,
            transport="websockets" if listener.websockets else "tcp",
            reconnect_on_failure=reconnect,
        )
        self.client.connect_timeout = timeout
        self.client.reconnect_delay_set(min_delay=1, max_delay=2)
        if listener.tls:
            self.client.tls_set_context(tls_context(MODERN, credentials, listener.ca, listener.server_name))
            if listener.ca is None:
                self.client.tls_insecure_set(True)
        if credentials.username is not None:
            password = credentials.password
            self.client.username_pw_set(
                credentials.username, password.decode() if isinstance(password, bytes) else password
            )
        if will:
            self.client.will_set(will.topic, will.payload, will.qos, will.retain)
        self.client.on_connect = self._on_connect
        self.client.on_disconnect = self._on_disconnect
        self.client.on_message = self._on_message
        self.client.on_publish = self._on_publish
        self.client.on_subscribe = self._on_subscribe
        self.client.on_unsubscribe = self._on_subscribe

    # paho calls these from its network thread.

    def _on_connect(self, client: paho.Client, _data: Any, flags: Any, reason: ReasonCode, _properties: Any) -> None:
        with self._changed:
            code = int(reason.value)
            if self.version == 4:  # noqa: PLR2004 - paho translates 3.1.1's return codes; give them back
                code = _PAHO_3.get(reason.getName(), code)
            self._answer = _connack_answer(code, self.version)
            if self._answer.accepted:
                self.connections += 1
                self.goodbye = None
                self.resumed = bool(flags.session_present)
                if self._reconnect and not self.resumed and self._subscriptions:
                    client.subscribe(list(self._subscriptions.items()))
            self._changed.notify_all()

    def _on_disconnect(self, _client: Any, _data: Any, flags: Any, reason: ReasonCode, _properties: Any) -> None:
        with self._changed:
            told = flags.is_disconnect_packet_from_server
            self.goodbye = Goodbye(
                reason.getName().lower() if told else "connection lost", int(reason.value) if told else None
            )
            self._changed.notify_all()

    def _on_message(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        with self._changed:
            self._messages.append(Message(message.topic, bytes(message.payload), message.qos, bool(message.retain)))
            self._changed.notify_all()

    def _on_publish(self, _client: Any, _data: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        self._receive_receipts(mid, [reason])

    def _on_subscribe(self, _client: Any, _data: Any, mid: int, reasons: list[ReasonCode], _properties: Any) -> None:
        self._receive_receipts(mid, reasons)

    def _receive_receipts(self, mid: int, reasons: list[ReasonCode]) -> None:
        with self._changed:
            self._receipts[mid] = [Receipt(int(reason.value), reason.getName().lower()) for reason in reasons]
            self._changed.notify_all()

    def __enter__(self) -> Session:
        self.open()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Connect and wait for the CONNACK.

        :raises NotAdmittedError: if the gateway does not let us in.
        """
        properties = None
        if self.version == 5 and not self._clean:  # noqa: PLR2004
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = self._expiry
        try:
            self.client.connect(
                self.listener.host,
                self.listener.port,
                keepalive=self._keepalive,
                clean_start=self._clean if self.version == 5 else paho.MQTT_CLEAN_START_FIRST_ONLY,  # noqa: PLR2004
                properties=properties,
            )
        except ssl.SSLError as exc:
            raise NotAdmittedError(Answer(*_tls_failure(exc))) from exc
        except ConnectionResetError as exc:
            raise NotAdmittedError(Answer(Outcome.RESET, Outcome.RESET.value)) from exc
        except paho.WebsocketConnectionError as exc:
            raise NotAdmittedError(Answer(Outcome.MISMATCH, str(exc) or "no WebSockets there")) from exc
        except OSError as exc:
            raise NotAdmittedError(_tcp_failure(exc)) from exc
        self.client.loop_start()
        with self._changed:
            self._changed.wait_for(lambda: self._answer or self.goodbye, self.timeout)
            answer = self._answer
        if answer is None or not answer.accepted:
            self.close()
            late = Outcome.CLOSED if self.goodbye else Outcome.TIMEOUT
            raise NotAdmittedError(answer or Answer(late, late.value))

    def close(self) -> None:
        """Say DISCONNECT and end; a will is not published."""
        self.client.disconnect()
        self.client.loop_stop()

    def die(self) -> None:
        """End as a device without power does: without DISCONNECT, so the gateway publishes the will."""
        held = self.client.socket()
        if held is not None:
            # Whatever paho has wrapped around it, the connection below ends here.
            with socket.socket(fileno=os.dup(held.fileno())) as sock, suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.wait_goodbye()
        self.client.loop_stop()

    def _wait(self, ready: Callable[[], object], what: str, timeout: float | None) -> None:
        """Wait, with the lock held, until ``ready`` is true."""
        limit = self.timeout if timeout is None else timeout
        self._changed.wait_for(lambda: ready() or self.goodbye, limit)
        if not ready():
            cause = f"the session ended: {self.goodbye}" if self.goodbye else f"nothing within {limit:g} s"
            raise NothingArrivedError(f"{what} did not come, {cause}")

    def _receipt(self, mid: int | None, what: str, timeout: float | None) -> list[Receipt]:
        if mid is None:
            raise NothingArrivedError(f"{what} did not come: not connected ({self.goodbye})")
        with self._changed:
            self._wait(lambda: mid in self._receipts, what, timeout)
            return self._receipts.pop(mid)

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, timeout: float | None = None
    ) -> Receipt:
        """Publish and wait for the acknowledgement (with QoS 0: until it is sent).

        :raises NothingArrivedError: if none comes, or the gateway ends the session instead.
        """
        return self.acknowledged(self.send(topic, payload, qos=qos, retain=retain), timeout=timeout)

    def send(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> int:
        """Publish without waiting; :meth:`acknowledged` waits for the packet id that this returns."""
        return self.client.publish(topic, payload, qos, retain).mid

    def acknowledged(self, mid: int, *, timeout: float | None = None) -> Receipt:
        """Return the acknowledgement of a message that was sent before.

        :raises NothingArrivedError: if none comes.
        """
        return self._receipt(mid, "the acknowledgement of a PUBLISH", timeout)[0]

    def subscribe(self, *filters: str, qos: int = 1) -> list[Receipt]:
        """Subscribe and return what was granted, one receipt for each filter.

        :raises NothingArrivedError: if no SUBACK comes.
        """
        if self.version == 5:  # noqa: PLR2004
            _, mid = self.client.subscribe([(name, SubscribeOptions(qos=qos)) for name in filters])
        else:
            _, mid = self.client.subscribe([(name, qos) for name in filters])
        self._subscriptions.update(dict.fromkeys(filters, qos))
        return self._receipt(mid, "the SUBACK", None)

    def unsubscribe(self, *filters: str) -> list[Receipt]:
        """Unsubscribe and wait for the UNSUBACK.

        :raises NothingArrivedError: if none comes.
        """
        _, mid = self.client.unsubscribe(list(filters))
        for name in filters:
            self._subscriptions.pop(name, None)
        return self._receipt(mid, "the UNSUBACK", None)

    def take(self) -> list[Message]:
        """Return the messages that have arrived since the last look."""
        with self._changed:
            taken, self._messages = self._messages, []
        return taken

    def until(self, wanted: Callable[[Message], bool], what: str, timeout: float | None = None) -> list[Message]:
        """Wait for a message; return what arrived up to it, itself last.

        :raises NothingArrivedError: if it does not come.
        """

        def position() -> int | None:
            return next((index for index, message in enumerate(self._messages, 1) if wanted(message)), None)

        with self._changed:
            self._wait(position, what, timeout)
            at = position()
            taken, self._messages = self._messages[:at], self._messages[at:]
        return taken

    def fence(self, topic: str, *, through: Session | None = None, timeout: float | None = None) -> list[Message]:
        """Return what arrived before a message that is sent now on a permitted topic: what is not in it did not come.

        A gateway handles what one session sends in order. So once the fence, sent after a forbidden message, is
        here, the forbidden one will not come any more.

        :param topic: one that ``through`` may publish and this session has subscribed.
        :param through: the session that sent the forbidden messages; default: this one.
        :raises NothingArrivedError: if the fence itself does not arrive: then nothing is proven.
        """
        token = secrets.token_bytes(12)
        sender = through or self
        receipt = sender.publish(topic, token, timeout=timeout)
        if not receipt.granted:
            raise NothingArrivedError(f"the permitted message on {topic} was refused: {receipt}")
        return self.until(lambda message: message.payload == token, f"the permitted message on {topic}", timeout)[:-1]

    def settle(self) -> list[Message]:
        """Return all that the gateway had sent us by now: it answers a request of ours after what it sent before.

        The fence of those who may not subscribe to anything. What another session published is among it once that
        session has its acknowledgement.

        :raises NothingArrivedError: if the gateway does not answer.
        """
        taken: list[Message] = []
        while True:
            self.unsubscribe(f"bednet/never/{secrets.token_hex(6)}")
            # With QoS 1 and 2 the gateway holds messages back while too many are unacknowledged (receive maximum), so
            # only a round that brought nothing was the last one.
            more = self.take()
            taken += more
            if not more:
                return taken

    def wait_goodbye(self, timeout: float | None = None) -> Goodbye:
        """Wait until the session has ended, and say how.

        :raises NothingArrivedError: if it is still alive after ``timeout`` seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.goodbye, self.timeout if timeout is None else timeout)
            if self.goodbye is None:
                raise NothingArrivedError("the session is still alive")
            return self.goodbye

    def wait_connections(self, count: int, timeout: float | None = None) -> None:
        """Wait until the session has been let in ``count`` times (the first one included).

        :raises NothingArrivedError: if that does not happen.
        """
        with self._changed:
            limit = self.timeout if timeout is None else timeout
            if not self._changed.wait_for(lambda: self.connections >= count, limit):
                raise NothingArrivedError(f"{self.connections} connections instead of {count} within {limit:g} s")


# paho-mqtt 2 gives 3.1.1's return codes the names of MQTT 5 (convert_connack_rc_to_reason_code).
_PAHO_3 = {
    "Success": 0,
    "Unsupported protocol version": 1,
    "Client identifier not valid": 2,
    "Server unavailable": 3,
    "Bad user name or password": 4,
    "Not authorized": 5,
}


# --- HTTP -----------------------------------------------------------------------------------------------------------

_MOST_REPLY = 1 << 20
# RFC 6749, 5.2; what looks otherwise is no such code, and could be anything.
_ERROR = re.compile(r"[a-z_]{1,40}")


@dataclass(frozen=True)
class Reply:
    """What came of an HTTP request.

    :param outcome: ACCEPTED for any answer in HTTP, whatever its status; else what happened instead.
    :param status: None without an answer in HTTP.
    :param headers: by their names in lower case; of one that comes twice the last.
    """

    outcome: Outcome
    reason: str
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)
    tls: Handshake | None = None

    def json(self) -> dict[str, Any]:
        """Return the JSON object that it carries; an empty one where it carries none."""
        try:
            document = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return document if isinstance(document, dict) else {}

    def __str__(self) -> str:
        """Say what an operator may see: never the body, which may be a token."""
        if self.status is None:
            return _phrase(self.outcome, self.reason)
        error = self.json().get("error")
        known = isinstance(error, str) and _ERROR.fullmatch(error)
        return f"status {self.status}" + (f", {error}" if known else "")


class _Received:
    """Bytes that were received, in the form that the standard library reads an HTTP response from."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def request(
    listener: Listener,
    method: str,
    path: str,
    *,
    credentials: Credentials = NOBODY,
    form: Mapping[str, str] | None = None,
    headers: Sequence[tuple[str, str]] = (),
    timeout: float = TIMEOUT,
) -> Reply:
    """Send one HTTP/1.1 request, over TLS or, to a listener without, in the clear; redirects are not followed.

    :param credentials: the client certificate to show, or a user name and password for HTTP's own authentication
        (RFC 7617).
    :param form: sent as the body, in the form that OAuth 2.0 has (RFC 6749, appendix B).
    :param headers: sent as they are, beside `Host` and what the body needs.
    :param timeout: seconds for the handshake, and again for the answer.
    :raises ValueError: if a password would go to a server whose certificate is not checked.
    """
    if credentials.password and (listener.ca is None or not listener.tls):
        raise ValueError("a password is not sent to a server whose certificate is not checked: give the listener a ca")
    tls: Handshake | None = None
    if listener.tls:
        tls, opened = _handshake(listener, credentials, MODERN, timeout, 0)
        if opened is None:
            return Reply(tls.outcome, tls.reason, tls=tls)
        channel = opened
    else:
        try:
            channel = Channel(socket.create_connection((listener.host, listener.port), timeout))
        except OSError as exc:
            failure = _tcp_failure(exc)
            return Reply(failure.outcome, failure.reason)
    with channel:
        try:
            channel.send(_http_request(listener, f"{method} {path}", credentials, form, headers))
            data = _receive_all(channel, timeout)
        except OSError as exc:
            outcome, reason = _tls_failure(exc)
            return Reply(outcome, reason, tls=tls)
    return _read_reply(data, method, tls)


def _read_reply(data: bytes, method: str, tls: Handshake | None) -> Reply:
    if not data:
        return Reply(Outcome.CLOSED, Outcome.CLOSED.value, tls=tls)
    if data[0] == 0x15 and len(data) >= 7:  # noqa: PLR2004 - a TLS alert to a client without TLS
        return Reply(Outcome.ALERT, _ALERTS.get(data[6], f"alert {data[6]}"), tls=tls)
    answer = http.client.HTTPResponse(cast("socket.socket", _Received(data)), method=method)
    try:
        answer.begin()
        body = answer.read()
    except (http.client.HTTPException, OSError, ValueError):
        return Reply(Outcome.MISMATCH, f"{len(data)} bytes that are no HTTP", tls=tls)
    told = {name.lower(): value for name, value in answer.getheaders()}
    return Reply(Outcome.ACCEPTED, "answered", answer.status, told, body, tls)


def _http_request(
    listener: Listener,
    what: str,
    credentials: Credentials,
    form: Mapping[str, str] | None,
    headers: Sequence[tuple[str, str]],
) -> bytes:
    body = urlencode(form).encode("ascii") if form is not None else b""
    lines = [("Host", f"{listener.server_name or listener.host}:{listener.port}"), ("Connection", "close"), *headers]
    if credentials.username is not None:
        password = credentials.password or ""
        secret = password if isinstance(password, bytes) else password.encode()
        pair = base64.b64encode(credentials.username.encode() + b":" + secret).decode("ascii")
        lines.append(("Authorization", f"Basic {pair}"))
    if form is not None:
        lines += [("Content-Type", "application/x-www-form-urlencoded"), ("Content-Length", str(len(body)))]
    text = "".join(f"{name}: {value}\r\n" for name, value in lines)
    return f"{what} HTTP/1.1\r\n{text}\r\n".encode("latin-1") + body


def _receive_all(channel: Channel, timeout: float) -> bytes:
    """Return all that comes until the server closes; what came before it broke off is an answer as well."""
    deadline, data = time.monotonic() + timeout, b""
    while len(data) < _MOST_REPLY:
        try:
            more = channel.receive(max(deadline - time.monotonic(), 0.001))
        except OSError:
            if data:
                break
            raise
        if not more:
            break
        data += more
    return data
