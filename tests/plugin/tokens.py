# SPDX-License-Identifier: Apache-2.0
"""Access tokens for the tests of the plugin: issuers that sign whatever they are told, and enhanced authentication.

- :class:`Issuer`: makes tokens, sound and unsound ones.
- :class:`TokenSite`: a site with issuers.
- :class:`Enhanced`: a client that authenticates by AUTH packets, byte by byte.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import struct
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from bednet.probe import NOBODY, Channel, Credentials, dial, mqtt_packet
from tests.base64url import encode, encode_part
from tests.plugin.gateway import Guest, Site, allow, deny, password_record
from tests.unit.store import sites

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from cryptography import x509

    from tests.plugin.gateway import Gateway

Json = dict[str, Any]
Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
AUDIENCE = "mqtts://plant.example"
MINUTE = 60


def scope(*permissions: tuple[str, list[str]]) -> str:
    """Return a scope in the form AIF-MQTT (RFC 9431, 2.3)."""
    return encode_part([list(permission) for permission in permissions])


EVERYTHING = scope(("#", ["pub", "sub"]))


def thumbprint(certificate: x509.Certificate) -> str:
    """Return what binds a token to a certificate (RFC 8705, 3.1)."""
    return encode(certificate.fingerprint(hashes.SHA256()))


def new_key(algorithm: str) -> Key:
    if algorithm == "ES256":
        return ec.generate_private_key(ec.SECP256R1())
    if algorithm == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    return rsa.generate_private_key(65537, 2048)


def sign(key: Key, algorithm: str, data: bytes) -> bytes:
    """Return a signature as JWS has it (RFC 7518, 3)."""
    if isinstance(key, ec.EllipticCurvePrivateKey):
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
        size = (key.key_size + 7) // 8
        return r.to_bytes(size, "big") + s.to_bytes(size, "big")
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(data)
    if algorithm == "PS256":
        return key.sign(data, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())
    return key.sign(data, padding.PKCS1v15(), hashes.SHA256())


def jwk(key: Key, kid: str | None = None, algorithm: str | None = None) -> Json:
    """Return the public key (RFC 7517)."""
    public = key.public_key()
    if isinstance(public, ec.EllipticCurvePublicKey):
        numbers = public.public_numbers()
        x, y = (encode(number.to_bytes(32, "big")) for number in (numbers.x, numbers.y))
        made: Json = {"kty": "EC", "crv": "P-256", "x": x, "y": y}
    elif isinstance(public, ed25519.Ed25519PublicKey):
        raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        made = {"kty": "OKP", "crv": "Ed25519", "x": encode(raw)}
    else:
        modulus = public.public_numbers().n
        made = {"kty": "RSA", "n": encode(modulus.to_bytes((modulus.bit_length() + 7) // 8, "big")), "e": "AQAB"}
    return {**made, **({"kid": kid} if kid else {}), **({"alg": algorithm} if algorithm else {})}


def public_pem(key: Key) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@dataclass
class Issuer:
    """Somebody who signs tokens.

    :ivar line: what the site says of it, beyond what is usual.
    """

    iss: str
    algorithm: str = "ES256"
    kid: str = "key-1"
    line: Json = field(default_factory=dict)
    typ: str = "at+jwt"
    key: Key = field(init=False)
    keys: list[Json] = field(init=False)

    def __post_init__(self) -> None:
        self.key = new_key(self.algorithm)
        self.keys = [jwk(self.key, self.kid, self.algorithm)]

    def rotate(self, kid: str) -> None:
        """Sign with a new key from now on; the old one stays in `keys`."""
        self.key, self.kid = new_key(self.algorithm), kid
        self.keys.append(jwk(self.key, kid, self.algorithm))

    def claims(self, device: str, **more: Any) -> Json:
        now = int(time.time())
        usual = {
            "iss": self.iss,
            "sub": device,
            "client_id": device,
            "aud": AUDIENCE,
            "iat": now,
            "exp": now + 10 * MINUTE,
            "jti": secrets.token_hex(8),
            "scope": EVERYTHING,
        }
        return {name: value for name, value in {**usual, **more}.items() if value is not ...}

    def header(self, **more: Any) -> Json:
        usual = {"alg": self.algorithm, "typ": self.typ, "kid": self.kid}
        return {name: value for name, value in {**usual, **more}.items() if value is not ...}

    def token(
        self, device: str, *, header: Json | bytes | None = None, payload: bytes | None = None, **more: Any
    ) -> str:
        """Return a token; a claim that is `...` is left out.

        :param header: members that are other than usual, or all of it as it is.
        :param payload: all of it as it is.
        """
        head = header if isinstance(header, bytes) else self.header(**(header or {}))
        text = f"{encode_part(head)}.{encode_part(payload if payload is not None else self.claims(device, **more))}"
        return f"{text}.{encode(sign(self.key, self.algorithm, text.encode()))}"

    def unsigned(self, device: str, **more: Any) -> str:
        return f"{encode_part(self.header(alg='none'))}.{encode_part(self.claims(device, **more))}."

    def by_hmac(self, device: str, secret: bytes) -> str:
        """Return a token that is signed by HS256."""
        text = f"{encode_part(self.header(alg='HS256'))}.{encode_part(self.claims(device))}"
        return f"{text}.{encode(hmac.new(secret, text.encode(), hashlib.sha256).digest())}"


@dataclass
class TokenSite(Site):
    """A site with issuers of tokens.

    :ivar names: of the values that a profile takes.
    """

    issuers: list[Issuer] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        parts: dict[str, list[Json]] = {"zone": [], "profile": [], "device": []}
        for line in map(json.loads, super().lines()[1:]):
            parts[next(iter(line))].append(line)
        for line in parts["profile"]:
            line["names"] = self.names.get(line["profile"], [])
        issuers = [
            sites.issuer(
                issuer.iss,
                **{"name": f"issuer-{number}", "algorithms": [issuer.algorithm], "keys": issuer.keys, **issuer.line},
            )
            for number, issuer in enumerate(self.issuers)
        ]
        return sites.compiled(parts["device"], parts["profile"], parts["zone"], issuers)


def token_site(folder: Path) -> TokenSite:
    """Make and apply a site whose devices use tokens: of its own service, and of somebody else who gives roles."""
    site = TokenSite(folder)
    site.issuers = [
        Issuer("https://tokens.plant.example:8443", line={"service": True, "scope": "aif", "leeway": 0}),
        Issuer(
            "https://sso.example/realms/plant",
            typ="JWT",
            line={
                "audience": ["mqtt-broker", "other"],
                "typ": ["at+jwt", "jwt"],
                "claim": "azp",
                "prefix": "kc-",
                "roles": {
                    "claim": "realm_access.roles",
                    "map": [
                        {"value": "plant-sensor", "profile": "role:sensor", "claims": ["plant.location"]},
                        {"value": "plant-reader", "profile": "role:reader", "claims": []},
                    ],
                },
            },
        ),
    ]
    site.profiles["role:sensor"] = [
        allow("publish", "sensors/", 1, "/", 0, "/#"),
        deny("subscribe", "halls/secret/#"),
    ]
    site.profiles["role:reader"] = [allow("subscribe", "halls/#")]
    site.names["role:sensor"] = ["location"]
    for device in ("tok-1", "tok-2"):
        site.add(device, "token")
    site.add("both-1", "certificate", "token")
    site.add("temp-1", "password")
    site.passwords["temp-1"] = password_record("password of temp-1")
    site.add("psk-1", "psk", "token")
    site.psk["psk-1"] = "00112233445566778899aabbccddeeff"
    site.apply()
    return site


def shown(token: str | bytes, device: str, certificate: Credentials = NOBODY) -> Credentials:
    """Return a token as the password, beside a certificate or without one."""
    return Credentials(certificate.certificate, certificate.key, username=device, password=token)


def guest(
    gateway: Gateway, token: str, device: str, *, on: str = "plain", certificate: Credentials = NOBODY, **more: Any
) -> Guest:
    """Return a session of a device with a token as its password."""
    return Guest(gateway.listener(on), shown(token, device, certificate), client_id=device, **more)


@contextmanager
def one_more(gateway: Gateway, **wanted: Any) -> Iterator[None]:
    """See that what happens meanwhile makes one line of the audit in which all this stands."""
    seen = gateway.count(**wanted)
    yield
    gateway.wait(lambda: gateway.count(**wanted) > seen, f"an audit line with {wanted}")
    assert gateway.count(**wanted) == seen + 1


# --- MQTT 5 enhanced authentication

CONNACK, PUBLISH, PUBACK, SUBACK, DISCONNECT, AUTH = 2, 3, 4, 9, 14, 15
NO_SUBSCRIBERS = 0x10
SUCCESS, CONTINUE, REAUTHENTICATE, NOT_AUTHORIZED, BAD_METHOD, ADMINISTRATIVE = 0x00, 0x18, 0x19, 0x87, 0x8C, 0x98
_METHOD, _DATA, _EXPIRY = 0x15, 0x16, 0x11
# How long properties are (MQTT 5, 2.2.2.2): bytes, or "b" for two bytes of length and so many.
_SIZES: dict[int, int | str] = {
    **dict.fromkeys((0x24, 0x25, 0x28, 0x29, 0x2A), 1),
    **dict.fromkeys((0x13, 0x21, 0x22), 2),
    **dict.fromkeys((0x11, 0x27), 4),
    **dict.fromkeys((_METHOD, _DATA, 0x12, 0x1A, 0x1C, 0x1F), "b"),
}


def bearer(token: str | bytes, *, name: str = "", more: bytes = b"host=gateway-1\x01port=8883\x01") -> bytes:
    """Return the first message of OAUTHBEARER (RFC 7628, 3.1)."""
    raw = token.encode() if isinstance(token, str) else token
    return b"n," + (f"a={name}".encode() if name else b"") + b",\x01" + more + b"auth=Bearer " + raw + b"\x01\x01"


def ace(token: str) -> bytes:
    """Return the first message of `ace` (RFC 9431, 2.2.4.2.2)."""
    return struct.pack(">H", len(token)) + token.encode()


def prove(key: Key, nonce: bytes, own: bytes = b"8 bytes.") -> bytes:
    """Return the second one, for P-256 and Ed25519."""
    return own + sign(key, "", nonce + own)


def _binary(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


@dataclass(frozen=True)
class Packet:
    """What the broker sent.

    :ivar code: the reason code; None for packets that have none.
    :ivar data: authentication data.
    """

    kind: int
    code: int | None
    data: bytes = b""


class Enhanced:
    """A client that shows itself by AUTH packets. A context manager; leaving it just ends the connection."""

    def __init__(
        self, gateway: Gateway, device: str, credentials: Credentials = NOBODY, *, on: str = "password"
    ) -> None:
        self.device = device
        self._channel: Channel = dial(gateway.listener(on), credentials)
        self._method = ""
        self._next = 0

    def __enter__(self) -> Enhanced:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()

    def connect(
        self,
        method: str,
        data: bytes,
        *,
        username: str | None = None,
        will: tuple[str, bytes] | None = None,
        expiry: int = 0,
        clean: bool = True,
    ) -> Packet:
        """Say CONNECT and return the answer, a CONNACK or an AUTH."""
        self._method = method
        properties = b"\x15" + _binary(method.encode()) + b"\x16" + _binary(data) + b"\x11" + struct.pack(">I", expiry)
        flags = (0x02 if clean else 0) | (0x80 if username else 0) | (0x0C if will else 0)
        body = b"\x00\x04MQTT\x05" + bytes([flags]) + b"\x00\x1e" + _variable(len(properties)) + properties
        body += _binary(self.device.encode())
        if will:
            body += b"\x00" + _binary(will[0].encode()) + _binary(will[1])
        self._channel.send(mqtt_packet(0x10, body + (_binary(username.encode()) if username else b"")))
        return self.read()

    def auth(self, code: int, data: bytes, *, method: str | None = None) -> None:
        """Send AUTH."""
        properties = b"\x15" + _binary((method or self._method).encode()) + b"\x16" + _binary(data)
        self._channel.send(mqtt_packet(0xF0, bytes([code]) + _variable(len(properties)) + properties))

    def reauthenticate(self, data: bytes) -> Packet:
        self.auth(REAUTHENTICATE, data)
        return self.read()

    def answer(self, data: bytes) -> Packet:
        self.auth(CONTINUE, data)
        return self.read()

    def raw(self, packet: bytes) -> None:
        self._channel.send(packet)

    def publish(self, topic: str, payload: bytes) -> Packet:
        """Publish with QoS 1 and return the answer."""
        self._next += 1
        self.raw(mqtt_packet(0x32, _binary(topic.encode()) + struct.pack(">H", self._next) + b"\x00" + payload))
        return self.read()

    def subscribe(self, topic_filter: str) -> Packet:
        self._next += 1
        self.raw(mqtt_packet(0x82, struct.pack(">H", self._next) + b"\x00" + _binary(topic_filter.encode()) + b"\x01"))
        return self.read()

    def read(self, *, within: float = 10.0) -> Packet:
        """Return the next packet; of kind 0 when the broker has closed. It has so many seconds."""
        try:
            data = self._channel.packet(within)
        except ConnectionResetError:
            data = b""
        if not data:
            return Packet(0, None)
        kind, at = data[0] >> 4, 1
        while data[at] & 0x80:
            at += 1
        body = data[at + 1 :]
        if kind == CONNACK:
            return Packet(kind, body[1], _auth_data(body[2:]))
        if kind in (AUTH, DISCONNECT):
            return Packet(kind, body[0] if body else SUCCESS, _auth_data(body[1:]))
        if kind == PUBACK:
            # That nobody has subscribed to it is a success too.
            return Packet(kind, body[2] if len(body) > 2 and body[2] != NO_SUBSCRIBERS else SUCCESS)
        return Packet(kind, body[-1] if kind == SUBACK else None, body)


def _variable(number: int) -> bytes:
    out = bytearray()
    while True:
        number, low = divmod(number, 128)
        out.append(low | (0x80 if number else 0))
        if not number:
            return bytes(out)


def _auth_data(raw: bytes) -> bytes:
    """Return the authentication data among properties."""
    at = 0
    while at < len(raw) and raw[at] & 0x80:
        at += 1
    at += 1
    while at < len(raw):
        name = raw[at]
        size = _SIZES[name]
        at += 1
        if isinstance(size, str):
            (size,) = struct.unpack_from(">H", raw, at)
            at += 2
        if name == _DATA:
            return raw[at : at + size]
        at += size
    return b""
