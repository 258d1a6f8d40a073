# SPDX-License-Identifier: Apache-2.0
"""A device's side of tokens: get one, connect with it, renew it in the session.

- :class:`TokenSource`: gets tokens from a token service, by one of the three ways that it takes.
- :class:`Token`: one of them.
- :class:`TokenClient`: a paho client (MQTT 5) that connects with a token and keeps itself authorised.
- :class:`TokenError`: no token; says why, and whether it is of use to ask again.

::

    source = TokenSource.of_bundle(Path("edge-1"))
    client = TokenClient(source)
    client.connect("gateway-1.plant.example", 8883)
    client.loop_start()

This file needs paho-mqtt 2 and, for `private_key_jwt` and the method `ace`, cryptography; a device may carry it alone.

All files are read anew when they are needed, so a certificate that is renewed in place is taken up without a restart.

paho sends no AUTH packets. :class:`TokenClient` adds those that authentication takes (MQTT 5, 4.12), with two
methods of paho's own, `_packet_queue` and `_packet_handle`; all that depends on them is in :class:`_Reauthentication`.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import logging
import secrets
import socket
import ssl
import struct
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.exception import MQTTException
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

METHODS = ("tls_client_auth", "private_key_jwt", "client_secret_basic")
CURVES = {"secp256r1": "ES256", "secp384r1": "ES384"}
PROOF_ALGORITHMS = ("ES256", "EdDSA")
OAUTHBEARER, ACE = "OAUTHBEARER", "ace"
ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
ASSERTION_SECONDS = 60
TIMEOUT_SECONDS = 15.0
MOST_BYTES = 65_536
#: A token is renewed when this much of its life is over; what is left is for a service that is down.
RENEW_AT = 0.5
#: How long to wait after a renewal that failed, in seconds: at first, and at most.
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 2.0, 60.0
#: The longest that a service is believed when it says how long to wait, in seconds.
MOST_WAIT_SECONDS = 3600.0
#: How much of its life a token must have left, in seconds, so that connecting with it is worth the while.
LEAST_SECONDS = 5.0
HTTP_OK, HTTP_SERVER_ERROR, HTTP_TOO_MANY = 200, 500, 429
#: How long what each side makes up for the method `ace` is, in bytes (RFC 9431, 2.2.4.2.2).
NONCE_BYTES = 8
_REAUTHENTICATE, _CONTINUE, _SUCCESS = 0x19, 0x18, 0x00
_CONNECT, _AUTH, _CONNACK, _DISCONNECT, _FAILURE = 0x10, 0xF0, 0x20, 0xE0, 0x80


class TokenError(OSError):
    """There is no token. It is an OSError so that paho, which connects again after those, does so after this one.

    :ivar error: the code of RFC 6749, 5.2, such as `invalid_client`; `unreachable` when nobody answered; `files` when
        something of the device's own cannot be read.
    :ivar again: whether it may be different in a while.
    :ivar cure: what to do, where there is more to say than `again`; the message ends with it.
    :ivar wait: for how many seconds the service does not want to be asked again (RFC 9110, 10.2.3); 0 where it does not
        say.
    """

    def __init__(self, error: str, message: str, *, again: bool, cure: str = "", wait: float = 0.0) -> None:
        super().__init__(f"{message}. Cure: {cure}" if cure else message)
        self.error = error
        self.again = again
        self.cure = cure
        self.wait = wait


@contextmanager
def _reading(*files: Path | None, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Make one error of all that the reading of keys, certificates and secrets raises.

    A file may be half written, or of another pair than the next one, while somebody renews them: it is read again.

    :raises TokenError: naming the files.
    """
    expected: tuple[type[Exception], ...] = (OSError, ValueError, TypeError, *also)
    try:
        yield
    except expected as exc:
        names = " and ".join(str(file) for file in files if file is not None)
        why = (exc.strerror or exc) if isinstance(exc, OSError) else exc
        cure = (
            "put the files of the bundle there, whole, as PEM without a password; "
            "of a device that made its own key, say where that is"
        )
        raise TokenError("files", f"{names}: cannot be read: {why}", again=True, cure=cure) from exc


@dataclass(frozen=True)
class Token:
    """An access token.

    :ivar text: what the broker is shown; it is a secret, and not in the repr.
    :ivar begin: when it was asked for, in seconds of the monotonic clock: a device's other clock may be wrong.
    :ivar seconds: how long from then on it is good.
    :ivar scope: what it is good for, as the service said it (RFC 9431, 3: base64url of AIF).
    :ivar credential: what its device proved itself with: :meth:`TokenSource.credential`.
    """

    text: str = field(repr=False)
    begin: float
    seconds: float
    scope: str
    credential: str = ""

    def left(self, now: float) -> float:
        """Return for how many seconds it is good yet.

        :param now: of the monotonic clock.
        """
        return self.begin + self.seconds - now


@dataclass(frozen=True)
class TokenSource:
    """Where a device gets its tokens, and how it proves itself there.

    :param device: its id.
    :param issuer: the token service's URL, as `client.json` of the bundle has it.
    :param method: `tls_client_auth` (RFC 8705), `private_key_jwt` (RFC 7523) or `client_secret_basic` (RFC 6749,
        2.3.1).
    :param ca: the site's CA certificates, PEM.
    :param certificate: for `tls_client_auth`, PEM, and `key` its key. With `private_key_jwt` it is shown as well, and
        tokens are bound to it; without it they are bound to the key, and good for the method `ace` only.
    :param key: for `private_key_jwt`: also the key to sign with, PEM.
    :param client_secret: for `client_secret_basic`: the file with the secret.
    :param resource: ask for a token for this audience alone (RFC 8707), such as `mqtts://gateway-1.plant.example`.
    :param scope: ask for less than the policy grants: base64url of AIF (RFC 9431, 3).
    :param address: connect there instead of looking the service's name up; the name is checked all the same.
    :raises ValueError: when something that the method needs is missing.
    """

    device: str
    issuer: str
    method: str
    ca: Path
    certificate: Path | None = None
    key: Path | None = None
    client_secret: Path | None = None
    resource: str | None = None
    scope: str | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        needed = {
            "tls_client_auth": self.certificate is not None and self.key is not None,
            "private_key_jwt": self.key is not None,
            "client_secret_basic": self.client_secret is not None,
        }
        if self.method not in needed:
            raise ValueError(f"{self.method!r} is no method of {', '.join(METHODS)}")
        if not needed[self.method]:
            raise ValueError(f"{self.method} needs more: see the parameters of TokenSource")
        if urlsplit(self.issuer).scheme != "https" or not urlsplit(self.issuer).hostname:
            raise ValueError(f"{self.issuer!r} is no https URL")

    @classmethod
    def of_bundle(cls, folder: Path, **more: Any) -> TokenSource:
        """Make one of the bundle that the CA made for a device.

        :param folder: the bundle; of a device that made its own key, `key` says where that is.
        :param more: any of the parameters above, instead of what the bundle says.
        :raises ValueError: when the bundle is of no device with tokens from the site's own service.
        :raises OSError: when its `client.json` cannot be read.
        """
        try:
            client = json.loads((folder / "client.json").read_text(encoding="utf-8"))
            told = {"device": client["id"], "method": client["token"]["method"], "issuer": client["token"]["issuer"]}
        except (KeyError, TypeError, ValueError):
            told = {"issuer": None}
        if told["issuer"] is None:
            raise ValueError(f"{folder} is no bundle of a device that gets tokens from the site's own service")
        files = {
            "tls_client_auth": {"certificate": folder / "certificate.pem", "key": folder / "key.pem"},
            "private_key_jwt": {"certificate": folder / "certificate.pem", "key": folder / "key.pem"},
            "client_secret_basic": {"client_secret": folder / "client_secret"},
        }
        return cls(**{**told, "ca": folder / "ca.pem", **files.get(told["method"], {}), **more})

    @property
    def is_bound(self) -> bool:
        """Whether its tokens are of use only together with the certificate (RFC 8705, 3)."""
        return self.certificate is not None

    def credential(self) -> str:
        """Return a hash of what tokens are bound to, the certificate or else the key; empty where they are not.

        :raises TokenError: when it cannot be read.
        """
        file = self.certificate or self.key
        if file is None:
            return ""
        with _reading(file):
            return hashlib.sha256(file.read_bytes()).hexdigest()

    def context(self) -> ssl.SSLContext:
        """Return the TLS settings for the token service, and for a broker that is shown such a token.

        :raises TokenError: when a file cannot be read, or the key is not the certificate's.
        """
        with _reading(self.ca):
            context = ssl.create_default_context(cafile=str(self.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.certificate is not None:
            with _reading(self.certificate, self.key):
                # Without a password OpenSSL would ask for one, on the terminal.
                context.load_cert_chain(self.certificate, self.key, password="")
        return context

    def get(self) -> Token:
        """Get a token (RFC 6749, 4.4).

        :raises TokenError: when there is none.
        """
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
        form = {"grant_type": "client_credentials"}
        form |= {"resource": self.resource} if self.resource else {}
        form |= {"scope": self.scope} if self.scope else {}
        begin = time.monotonic()
        # First: a certificate that is renewed meanwhile is then taken for one to come, which does no harm.
        credential = self.credential()
        if self.method == "client_secret_basic" and self.client_secret is not None:
            with _reading(self.client_secret):
                secret = self.client_secret.read_text(encoding="utf-8").strip()
            pair = f"{quote(self.device, safe='')}:{quote(secret, safe='')}"
            headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        elif self.method == "private_key_jwt":
            form |= {"client_assertion_type": ASSERTION_TYPE, "client_assertion": self._assertion(int(time.time()))}
        else:
            form["client_id"] = self.device
        try:
            status, retry_after, body = self._post(urlencode(form), headers)
        except TokenError:
            raise
        except (OSError, http.client.HTTPException) as exc:
            raise TokenError("unreachable", f"{self.issuer}: {exc}", again=True) from exc
        again = status >= HTTP_SERVER_ERROR or status == HTTP_TOO_MANY
        wait = _seconds(retry_after) if again else 0.0
        try:
            answer = json.loads(body)
            if status == HTTP_OK:
                text, seconds = str(answer["access_token"]), float(answer["expires_in"])
                return Token(text, begin, seconds, str(answer.get("scope", "")), credential)
            error, words = str(answer["error"]), str(answer.get("error_description", ""))
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            message = f"{self.issuer} answers with the status {status}, and with nothing of OAuth"
            raise TokenError("unreachable", message, again=again, wait=wait) from exc
        message = f"{self.issuer}: {error}" + (f": {words}" if words else "")
        raise TokenError(error, message, again=again, wait=wait)

    def _post(self, form: str, headers: dict[str, str]) -> tuple[int, str, bytes]:
        """Ask. :returns: the status, what Retry-After says, and the body."""
        parts, context = urlsplit(self.issuer), self.context()
        connection = http.client.HTTPSConnection(str(parts.hostname), parts.port or 443, timeout=TIMEOUT_SECONDS)
        try:
            plain = socket.create_connection((self.address or connection.host, connection.port), TIMEOUT_SECONDS)
            # Handed over before it connects: the address may be another one than the name's.
            connection.sock = context.wrap_socket(plain, server_hostname=connection.host)
            connection.request("POST", "/token", form, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheader("Retry-After", ""), answer.read(MOST_BYTES)
        finally:
            connection.close()

    def _assertion(self, now: int) -> str:
        """Sign an assertion (RFC 7523, 2.2 and 3)."""
        claims = {
            "iss": self.device,
            "sub": self.device,
            "aud": self.issuer,
            "iat": now,
            "exp": now + ASSERTION_SECONDS,
            "jti": secrets.token_urlsafe(16),
        }
        algorithm, sign = self._signer()
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in ({"alg": algorithm, "typ": "JWT"}, claims))
        return f"{signed}.{_base64url(sign(signed.encode()))}"

    def prove(self, nonce: bytes) -> bytes:
        """Answer the question of the method `ace` (RFC 9431, 2.2.4.2.2): a nonce of our own, and both signed.

        :raises TokenError: when the question is of another length, or the key of a kind that gateways do not take for
            it: P-256 and Ed25519 are.
        """
        # Whoever chose more of what is signed could have an assertion signed.
        if len(nonce) != NONCE_BYTES:
            raise TokenError("question", f"a nonce of {len(nonce)} bytes instead of {NONCE_BYTES}", again=False)
        algorithm, sign = self._signer()
        if algorithm not in PROOF_ALGORITHMS:
            message = (
                f"{self.key} signs with {algorithm}; gateways take {', '.join(PROOF_ALGORITHMS)} for the method ace"
            )
            raise TokenError("key", message, again=False)
        own = secrets.token_bytes(NONCE_BYTES)
        return own + sign(nonce + own)

    def _signer(self) -> tuple[str, Callable[[bytes], bytes]]:
        """Return by which algorithm the key signs (RFC 7518, 3.1; RFC 8037), and what does it."""
        from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - not for every method
        from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils  # noqa: PLC0415

        if self.key is None:
            raise TokenError("key", "there is no key to sign with", again=False)
        with _reading(self.key, also=(UnsupportedAlgorithm,)):
            key = serialization.load_pem_private_key(self.key.read_bytes(), None)
        if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in CURVES:
            curve, size = key, (key.curve.key_size + 7) // 8
            hashed = hashes.SHA256() if CURVES[key.curve.name] == "ES256" else hashes.SHA384()

            def sign(data: bytes) -> bytes:
                pair = utils.decode_dss_signature(curve.sign(data, ec.ECDSA(hashed)))
                return b"".join(number.to_bytes(size, "big") for number in pair)

            return CURVES[key.curve.name], sign
        if isinstance(key, ed25519.Ed25519PrivateKey):
            return "EdDSA", key.sign
        if isinstance(key, rsa.RSAPrivateKey):
            modulus = key
            return "RS256", lambda data: modulus.sign(data, padding.PKCS1v15(), hashes.SHA256())
        raise TokenError("key", f"{self.key} is of a kind that cannot sign here", again=False)


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class _Secret(Properties):
    """Properties that paho may write into its log: it logs those of CONNECT, and here they hold a token."""

    def __str__(self) -> str:
        return "[a token]"


def oauthbearer(token: str, packet: int) -> Properties:
    """Return the properties of CONNECT or AUTH that show a token (RFC 7628, 3.1).

    :param packet: `PacketTypes.CONNECT` or `PacketTypes.AUTH`.
    """
    properties = _Secret(packet)  # type: ignore[no-untyped-call] # likewise
    properties.AuthenticationMethod = OAUTHBEARER
    properties.AuthenticationData = f"n,,\x01auth=Bearer {token}\x01\x01".encode()
    return properties


def ace(token: str, packet: int) -> Properties:
    """Return the properties of CONNECT or AUTH that show a token and let the gateway ask for a proof (RFC 9431).

    :param packet: as for :func:`oauthbearer`.
    """
    properties = _Secret(packet)  # type: ignore[no-untyped-call] # likewise
    properties.AuthenticationMethod = ACE
    properties.AuthenticationData = struct.pack(">H", len(token)) + token.encode()
    return properties


class _Anew(ssl.SSLContext):
    """TLS settings that are read from the files for each connection: paho takes settings only once.

    To load another chain into settings that are kept would not do: if its key is of another kind it stands beside the
    first, and OpenSSL may show that.

    :ivar credential: what the last connection showed: :meth:`TokenSource.credential`.
    """

    source: TokenSource
    credential: str

    def __new__(cls, source: TokenSource) -> _Anew:
        context = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        context.source, context.credential = source, ""
        return context

    def wrap_socket(self, *arguments: Any, **how: Any) -> ssl.SSLSocket:
        """Begin TLS with what the files hold now.

        :raises TokenError: when they cannot be read.
        """
        # In this order, as in TokenSource.get.
        credential = self.source.credential()
        context = self.source.context()
        context.check_hostname = self.check_hostname
        self.credential = credential
        return context.wrap_socket(*arguments, **how)


class _Reauthentication(mqtt.Client):
    """paho with AUTH packets (MQTT 5, 3.15). Tested with 2.1; what is below uses two methods that are paho's own.

    :ivar asking: that a gateway was sent something that it answers with a question: until it is content it takes
        nothing but AUTH packets and a DISCONNECT, so all else is held back. It begins before CONNECT.
    """

    def __init__(self, device: str) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, client_id=device, protocol=mqtt.MQTTv5)
        self.asking = False
        self._held: list[tuple[Any, ...]] = []
        self._order = threading.RLock()

    def reauthenticate(self, properties: Properties, *, asking: bool = False) -> None:
        """Send an AUTH packet with the reason 0x19, re-authenticate.

        :param asking: whether it will be answered with a question.
        """
        with self._order:
            self.asking = asking
            self._send_auth(_REAUTHENTICATE, properties)

    def _send_auth(self, reason: int, properties: Properties) -> None:
        body = bytes([reason]) + properties.pack()  # type: ignore[no-untyped-call] # paho leaves it open
        packet = bytearray([_AUTH])
        self._pack_remaining_length(packet, len(body))
        self._packet_queue(_AUTH, packet + body, 0, 0)

    def asked(self, data: bytes) -> Properties:
        """Return what a question is answered with; for the class that inherits."""
        raise NotImplementedError

    def authenticated(self, reason: int) -> None:
        """Take the answer; for the class that inherits."""

    def leave(self) -> None:
        """Say good-bye in words that paho does not know of: it takes the connection for lost, and comes again."""
        self._packet_queue(_DISCONNECT, bytes([_DISCONNECT, 0]), 0, 0)

    def _packet_queue(self, command: int, *packet: Any) -> MQTTErrorCode:
        with self._order:
            if self.asking and command & 0xF0 not in (_CONNECT, _AUTH, _DISCONNECT):
                self._held.append((command, *packet))
                return MQTTErrorCode.MQTT_ERR_SUCCESS
            return super()._packet_queue(command, *packet)

    def answered(self) -> None:
        """Send what was held back; what becomes of it where there is no connection any more is paho's business."""
        with self._order:
            self.asking = False
            held, self._held = self._held, []
            for packet in held:
                super()._packet_queue(*packet)

    def admitted(self) -> None:
        """Take the news that a CONNECT was accepted; for the class that inherits."""

    def refused(self) -> None:
        """Take the news that a CONNECT was refused; likewise."""

    def _answer(self, data: bytes) -> MQTTErrorCode:
        told = Properties(PacketTypes.AUTH)  # type: ignore[no-untyped-call] # paho leaves it open
        try:
            told.unpack(data)  # type: ignore[no-untyped-call] # likewise
            answer = self.asked(getattr(told, "AuthenticationData", b""))
        except (MQTTException, TokenError, ValueError, IndexError, struct.error) as exc:
            # paho closes the connection, and comes again later.
            logger.warning("a gateway's question cannot be answered: %s", exc)
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        self._send_auth(_CONTINUE, answer)
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _packet_handle(self) -> MQTTErrorCode:
        command, data = self._in_packet["command"], bytes(self._in_packet["packet"])
        if command == _AUTH and data[:1] == bytes([_CONTINUE]):
            return self._answer(data[1:])
        if command == _AUTH:
            self.answered()
            self.authenticated(data[0] if data else _SUCCESS)
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        if command == _CONNACK and len(data) > 1:
            if data[1] >= _FAILURE:
                self.refused()
            else:
                self.answered()
                result = super()._packet_handle()
                # Last, for only now paho knows that it is connected.
                self.admitted()
                return result
        return super()._packet_handle()


class TokenClient(_Reauthentication):
    """A paho client (MQTT 5) that keeps itself authorised.

    It gets a token when it connects, shows it by enhanced authentication (`OAUTHBEARER`), and renews it in the session
    when half of its life is over: no reconnect, and nothing is lost. When no new token can be had, it asks again, and
    the session goes on until the token ends; the gateway closes it then, and paho connects again as soon as there is
    a token. Use it as any paho client; `connect`, `loop_start` and the callbacks are paho's.

    Where the certificate was renewed in place, the next renewal connects anew, since the gateway knows the old one:
    with a DISCONNECT, so no will is sent, and without a clean start unless `connect` was told so. What comes in that
    second is kept if the session has an expiry, as for any connection that is lost.

    With the method `ace` (RFC 9431) the gateway asks for a proof that the token's key is this device's. That is for
    tokens that are bound to a key, and no certificate comes along (`private_key_jwt`): they are good for nothing else.

    :param source: where its tokens come from; TLS is set from it, with the certificate if tokens are bound to that.
    :param proves: whether to go by `ace`; by default where nothing else would do.
    :param on_renewed: called after each renewal with the new token's life in seconds, or the error, after which it is
        tried again; from paho's thread or the renewing one.
    :raises ValueError: when there is no key to go by `ace`.
    :raises TokenError: when the source's files cannot be read: see :class:`TokenSource`.
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        on_renewed: Callable[[float | TokenError], None] | None = None,
        proves: bool | None = None,
    ) -> None:
        super().__init__(source.device)
        self.source = source
        self.proves = proves if proves is not None else source.key is not None and not source.is_bound
        if self.proves and source.key is None:
            raise ValueError("the method ace needs a key: see the parameters of TokenSource")
        self.renewals = 0
        self._on_renewed = on_renewed
        self._token: Token | None = None
        self._next: Token | None = None
        self._begun: Token | None = None
        self._more: Properties | None = None
        self._timer: threading.Timer | None = None
        self._left = False
        self._pause = 0.0
        self._wait: TokenError | None = None
        self._wait_until = 0.0
        self._guard = threading.RLock()
        # Files that are missing are told of here, and not in paho's thread.
        source.context()
        self._tls = _Anew(source)
        self.tls_set_context(self._tls)

    def connect_async(self, host: str, port: int = 8883, *arguments: Any, **how: Any) -> None:
        """Say where to connect, as paho does; the token is shown beside the properties that are given."""
        super().connect_async(host, port, *arguments, **how)
        self._more = self._connect_properties

    def _shown(self) -> Properties:
        """Return the properties of CONNECT, with a token that is worth showing."""
        with self._guard:
            token = self._token
            if (
                token is None
                or token.left(time.monotonic()) < LEAST_SECONDS
                or token.credential != self.source.credential()
            ):
                token = self._token = self._get()
            self._begun = token
            shown = (ace if self.proves else oauthbearer)(token.text, PacketTypes.CONNECT)
        for name in shown.names:
            attribute = name.replace(" ", "")
            if not attribute.startswith("Authentication") and hasattr(self._more, attribute):
                setattr(shown, attribute, getattr(self._more, attribute))
        return shown

    def _get(self) -> Token:
        """Get a token to connect with; paho may connect sooner than the service wants to be asked again."""
        left = self._wait_until - time.monotonic()
        if self._wait is not None and left > 0:
            raise TokenError(self._wait.error, f"{self._wait}, {left:.0f} s to wait", again=True, wait=left)
        self._wait = None
        try:
            return self.source.get()
        except TokenError as exc:
            self._heed(exc)
            raise

    def _heed(self, error: TokenError) -> None:
        if error.wait > 0:
            self._wait, self._wait_until = error, time.monotonic() + error.wait

    def reconnect(self) -> MQTTErrorCode:
        """Connect again, as paho does by itself, with a token that is good.

        :raises TokenError: when there is none; paho tries again later.
        """
        self._left = False
        try:
            self._connect_properties = self._shown()
        except TokenError as exc:
            logger.warning("%s: no token to connect with: %s", self.source.device, exc)
            raise
        except Exception as exc:
            error = _told(exc)
            logger.warning("%s: no token to connect with: %s", self.source.device, error)
            # Of anything but an OSError paho's thread would die.
            raise error from exc
        with self._order:
            # A connection that was lost between question and answer.
            self.answered()
            self.asking = self.proves
        return super().reconnect()

    def disconnect(self, *arguments: Any, **how: Any) -> MQTTErrorCode:
        """Say good-bye, and renew no more."""
        with self._guard:
            self._left = True
            if self._timer is not None:
                self._timer.cancel()
        return super().disconnect(*arguments, **how)

    def renew(self) -> None:
        """Renew now: get a token, and show it in the session, or in a new one if the certificate is another one.

        :raises TokenError: when there is none.
        """
        token = self.source.get()
        with self._guard:
            # Whatever comes in between: a new connection begins with the newer one.
            if not self.is_connected():
                self._token = token
                return
            self._next = token
            anew = self.source.is_bound and token.credential != self._tls.credential
            if anew:
                self._token = token
        if anew:
            logger.info("%s: connects anew, with the certificate that it has now", self.source.device)
            self.leave()
            return
        shown = (ace if self.proves else oauthbearer)(token.text, PacketTypes.AUTH)
        self.reauthenticate(shown, asking=self.proves)

    def asked(self, data: bytes) -> Properties:
        """Answer a gateway's question.

        :raises TokenError: when that cannot be, or it may not ask one.
        """
        if not self.proves:
            raise TokenError("question", "the token was shown by OAUTHBEARER, which has no questions", again=False)
        properties = Properties(PacketTypes.AUTH)  # type: ignore[no-untyped-call] # paho leaves it open
        properties.AuthenticationMethod = ACE
        properties.AuthenticationData = self.source.prove(data)
        return properties

    def authenticated(self, reason: int) -> None:
        """Take the gateway's answer to a renewal."""
        with self._guard:
            token, self._next = self._next, None
            if token is None:
                logger.warning("%s: an answer with the reason 0x%02x to no question", self.source.device, reason)
                return
            if reason == _SUCCESS:
                self._token = token
        if reason == _SUCCESS:
            self._renewed(token, token.seconds * RENEW_AT)
        else:
            self._failed(TokenError("refused", f"the gateway answers with the reason 0x{reason:02x}", again=True))

    def admitted(self) -> None:
        """Count the half of the token's life from when it was asked for, not from now."""
        with self._guard:
            token, renewed = self._begun, self._next
            self._next = None
        if token is None:
            return
        due = token.left(time.monotonic()) - token.seconds * (1 - RENEW_AT)
        if token is renewed:
            self._renewed(token, due)
        else:
            # A gateway that refuses renewals and lets the older token in again gets no new one for each time.
            self._renew_in(max(due, self._pause))

    def refused(self) -> None:
        """Forget a token that a gateway does not take, or does not take any more."""
        with self._guard:
            self._token = self._next = None

    def _renewed(self, token: Token, due: float) -> None:
        with self._guard:
            self.renewals += 1
            self._pause = 0.0
            self._renew_in(due)
        logger.info("%s: renewed, good for %.0f s", self.source.device, token.seconds)
        self._tell(token.seconds)

    def _failed(self, error: TokenError) -> None:
        logger.warning("%s: no new token: %s", self.source.device, error)
        with self._guard:
            # Until one is accepted, whoever refuses: each try may take a new token, of which a device has so many.
            self._pause = min(max(RETRY_SECONDS, self._pause * 2), LONGEST_RETRY_SECONDS)
            self._heed(error)
            self._renew_in(max(self._pause, error.wait))
        self._tell(error)

    def _tell(self, what: float | TokenError) -> None:
        if self._on_renewed is None:
            return
        try:
            self._on_renewed(what)
        except Exception:
            logger.exception("%s: on_renewed fails; renewing goes on", self.source.device)

    def _renew_in(self, seconds: float) -> None:
        with self._guard:
            if self._left:
                return
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(max(0.0, seconds), self._renew_by_timer)
            self._timer.daemon = True
            self._timer.start()

    def _renew_by_timer(self) -> None:
        try:
            self.renew()
        except Exception as exc:
            # Whatever it is, the next renewal must come.
            self._failed(_told(exc))


def _seconds(text: str) -> float:
    """Return how long Retry-After says to wait; 0 for a date, which a device without a clock could not tell."""
    return min(float(text), MOST_WAIT_SECONDS) if text.isascii() and text.isdecimal() else 0.0


def _told(exc: Exception) -> TokenError:
    """Return an error as one that paho takes and on_renewed is told.

    Of one that nobody expects only the kind and the place are said: its words might be a secret's.
    """
    if isinstance(exc, TokenError):
        return exc
    frame = traceback.extract_tb(exc.__traceback__)[-1]
    message = f"{type(exc).__name__} in {frame.name} ({frame.filename}:{frame.lineno})"
    error = TokenError("unexpected", message, again=True, cure="report it; it is tried again meanwhile")
    error.__cause__ = exc
    return error


__all__ = ["METHODS", "Token", "TokenClient", "TokenError", "TokenSource", "ace", "oauthbearer"]
