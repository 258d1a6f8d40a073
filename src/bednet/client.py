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

paho sends no AUTH packets. :class:`TokenClient` adds those that authentication takes (MQTT 5, 4.12), with two
methods of paho's own, `_packet_queue` and `_packet_handle`; all that depends on them is in :class:`_Reauthentication`.
"""

from __future__ import annotations

import base64
import http.client
import json
import logging
import secrets
import socket
import ssl
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.exception import MQTTException
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

if TYPE_CHECKING:
    from collections.abc import Callable
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
#: How much of its life a token must have left, in seconds, so that connecting with it is worth the while.
LEAST_SECONDS = 5.0
HTTP_OK, HTTP_SERVER_ERROR, HTTP_TOO_MANY = 200, 500, 429
#: How long what each side makes up for the method `ace` is, in bytes (RFC 9431, 2.2.4.2.2).
NONCE_BYTES = 8
_REAUTHENTICATE, _CONTINUE, _SUCCESS = 0x19, 0x18, 0x00
_CONNECT, _AUTH, _CONNACK, _DISCONNECT, _FAILURE = 0x10, 0xF0, 0x20, 0xE0, 0x80


class TokenError(OSError):
    """There is no token. It is an OSError so that paho, which connects again after those, does so after this one.

    :ivar error: the code of RFC 6749, 5.2, such as `invalid_client`; `unreachable` when nobody answered.
    :ivar again: whether it may be different in a while.
    """

    def __init__(self, error: str, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.error = error
        self.again = again


@dataclass(frozen=True)
class Token:
    """An access token.

    :ivar text: what the broker is shown; it is a secret, and not in the repr.
    :ivar begin: when it was asked for, in seconds of the monotonic clock: a device's other clock may be wrong.
    :ivar seconds: how long from then on it is good.
    :ivar scope: what it is good for, as the service said it (RFC 9431, 3: base64url of AIF).
    """

    text: str = field(repr=False)
    begin: float
    seconds: float
    scope: str

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

    def context(self) -> ssl.SSLContext:
        """Return the TLS settings for the token service, and for a broker that is shown such a token."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.certificate is not None:
            context.load_cert_chain(self.certificate, self.key)
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
        try:
            if self.method == "client_secret_basic" and self.client_secret is not None:
                secret = self.client_secret.read_text(encoding="utf-8").strip()
                pair = f"{quote(self.device, safe='')}:{quote(secret, safe='')}"
                headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
            elif self.method == "private_key_jwt":
                form |= {"client_assertion_type": ASSERTION_TYPE, "client_assertion": self._assertion(int(time.time()))}
            else:
                form["client_id"] = self.device
            status, body = self._post(urlencode(form), headers)
        except (OSError, http.client.HTTPException) as exc:
            raise TokenError("unreachable", f"{self.issuer}: {exc}", again=True) from exc
        try:
            answer = json.loads(body)
            if status == HTTP_OK:
                text, seconds = str(answer["access_token"]), float(answer["expires_in"])
                return Token(text, begin, seconds, str(answer.get("scope", "")))
            error, words = str(answer["error"]), str(answer.get("error_description", ""))
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            message = f"{self.issuer} answers with the status {status}, and with nothing of OAuth"
            raise TokenError("unreachable", message, again=status >= HTTP_SERVER_ERROR) from exc
        again = status >= HTTP_SERVER_ERROR or status == HTTP_TOO_MANY
        raise TokenError(error, f"{self.issuer}: {error}: {words}", again=again)

    def _post(self, form: str, headers: dict[str, str]) -> tuple[int, bytes]:
        parts = urlsplit(self.issuer)
        connection = http.client.HTTPSConnection(str(parts.hostname), parts.port or 443, timeout=TIMEOUT_SECONDS)
        try:
            plain = socket.create_connection((self.address or connection.host, connection.port), TIMEOUT_SECONDS)
            # Handed over before it connects: the address may be another one than the name's.
            connection.sock = self.context().wrap_socket(plain, server_hostname=connection.host)
            connection.request("POST", "/token", form, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(MOST_BYTES)
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
        from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415 - not for every method
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils  # noqa: PLC0415

        if self.key is None:
            raise TokenError("key", "there is no key to sign with", again=False)
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
        return super()._packet_handle()


class TokenClient(_Reauthentication):
    """A paho client (MQTT 5) that keeps itself authorised.

    It gets a token when it connects, shows it by enhanced authentication (`OAUTHBEARER`), and renews it in the session
    when half of its life is over: no reconnect, and nothing is lost. When no new token can be had, it asks again, and
    the session goes on until the token ends; the gateway closes it then, and paho connects again as soon as there is
    a token. Use it as any paho client; `connect`, `loop_start` and the callbacks are paho's.

    With the method `ace` (RFC 9431) the gateway asks for a proof that the token's key is this device's. That is for
    tokens that are bound to a key, and no certificate comes along (`private_key_jwt`): they are good for nothing else.

    :param source: where its tokens come from; TLS is set from it, with the certificate if tokens are bound to that.
    :param proves: whether to go by `ace`; by default where nothing else would do.
    :raises ValueError: when there is no key for that.
    :param on_renewed: called after each renewal with the new token's life in seconds, or the error; from paho's thread
        or the renewing one.
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
        self._more: Properties | None = None
        self._timer: threading.Timer | None = None
        self._guard = threading.RLock()
        self.tls_set_context(source.context())

    def connect_async(self, host: str, port: int = 8883, *arguments: Any, **how: Any) -> None:
        """Say where to connect, as paho does; the token is shown beside the properties that are given."""
        self._more = how.pop("properties", None)
        super().connect_async(host, port, *arguments, **how)

    def _shown(self) -> Properties:
        """Return the properties of CONNECT, with a token that is worth showing."""
        with self._guard:
            if self._token is None or self._token.left(time.monotonic()) < LEAST_SECONDS:
                self._token = self.source.get()
            shown = (ace if self.proves else oauthbearer)(self._token.text, PacketTypes.CONNECT)
        for name in shown.names:
            attribute = name.replace(" ", "")
            if not attribute.startswith("Authentication") and hasattr(self._more, attribute):
                setattr(shown, attribute, getattr(self._more, attribute))
        return shown

    def reconnect(self) -> MQTTErrorCode:
        """Connect again, as paho does by itself, with a token that is good.

        :raises TokenError: when there is none; paho tries again later.
        """
        self._connect_properties = self._shown()
        with self._order:
            # A connection that was lost between question and answer.
            self.answered()
            self.asking = self.proves
        with self._guard:
            if self._token is not None:
                self._renew_in(self._token.left(time.monotonic()) - self._token.seconds * (1 - RENEW_AT))
        return super().reconnect()

    def disconnect(self, *arguments: Any, **how: Any) -> MQTTErrorCode:
        """Say good-bye, and renew no more."""
        with self._guard:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        return super().disconnect(*arguments, **how)

    def renew(self) -> None:
        """Renew now: get a token, and show it in the session.

        :raises TokenError: when there is none.
        """
        token = self.source.get()
        with self._guard:
            self._next = token
            # Whatever comes in between: a new connection begins with the newer one.
            if not self.is_connected():
                self._token = token
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
            if reason != _SUCCESS or token is None:
                logger.warning("%s: a renewal was answered with the reason 0x%02x", self.source.device, reason)
                return
            self._token = token
            self.renewals += 1
            self._renew_in(token.seconds * RENEW_AT)
        logger.info("%s: renewed, good for %.0f s", self.source.device, token.seconds)
        if self._on_renewed is not None:
            self._on_renewed(token.seconds)

    def refused(self) -> None:
        """Forget a token that a gateway does not take, or does not take any more."""
        with self._guard:
            self._token = None

    def _renew_in(self, seconds: float, retry: float = RETRY_SECONDS) -> None:
        with self._guard:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(max(0.0, seconds), self._renew_by_timer, (retry,))
            self._timer.daemon = True
            self._timer.start()

    def _renew_by_timer(self, retry: float) -> None:
        try:
            self.renew()
        except TokenError as exc:
            logger.warning("%s: no new token: %s", self.source.device, exc)
            with self._guard:
                # Without a timer somebody has said good-bye meanwhile.
                if self._timer is not None:
                    self._renew_in(retry, min(retry * 2, LONGEST_RETRY_SECONDS))
            if self._on_renewed is not None:
                self._on_renewed(exc)


__all__ = ["METHODS", "Token", "TokenClient", "TokenError", "TokenSource", "ace", "oauthbearer"]
