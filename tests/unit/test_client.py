# SPDX-License-Identifier: Apache-2.0
"""A device's side of tokens, without a gateway: what it asks for, what it makes of answers, what it lets nobody see.

The sharp edges: a token in a log or a repr, an error that is taken for the end when it is not, or the other way round,
an assertion that another service could use as well, and a gateway that has something signed for it.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from typing import TYPE_CHECKING, Any

import paho.mqtt.client as mqtt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes

from bednet.client import Token, TokenClient, TokenError, TokenSource, ace, oauthbearer
from tests.base64url import decode
from tests.unit.ca_home import START, make_home

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ISSUER = "https://tokens.plant.example:8443"
SECRET = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJlZGdlLTEifQ.c2lnbmF0dXJl"  # noqa: S105 - opens nothing


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundles of three devices, as the CA makes them."""
    home = make_home(tmp_path_factory.mktemp("ca"))
    methods = ("tls_client_auth", "client_secret_basic", "private_key_jwt")
    devices = [{"id": method, "authentication": ["token"], "token": method} for method in methods]
    home.sync([*devices, {"id": "temp-1"}], START, token_issuer=ISSUER)
    return home.path / "bundles"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, dict[str, str]]]]:
    """Answers with what a test says; returns the forms and headers that were sent."""

    def answer(status: int, body: object, retry_after: str = "") -> list[tuple[str, dict[str, str]]]:
        sent: list[tuple[str, dict[str, str]]] = []

        def post(_self: TokenSource, form: str, headers: dict[str, str]) -> tuple[int, str, bytes]:
            sent.append((form, headers))
            return status, retry_after, body if isinstance(body, bytes) else json.dumps(body).encode()

        monkeypatch.setattr(TokenSource, "_post", post)
        return sent

    return answer


GOOD = {"access_token": SECRET, "token_type": "Bearer", "expires_in": 900, "scope": "W10"}


def test_a_secret_is_sent_in_the_header_and_nowhere_else(bundles: Path, service: Any) -> None:
    sent = service(200, GOOD)
    token = TokenSource.of_bundle(bundles / "client_secret_basic").get()
    assert (token.text, token.seconds, token.scope) == (SECRET, 900.0, "W10")
    form, headers = sent[0]
    assert form == "grant_type=client_credentials"
    secret = (bundles / "client_secret_basic/client_secret").read_text(encoding="ascii").strip()
    assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")).decode() == f"client_secret_basic:{secret}"


def test_an_assertion_is_for_this_service_alone_and_new_each_time(bundles: Path, service: Any) -> None:
    """RFC 7523, 3."""
    sent = service(200, GOOD)
    source = TokenSource.of_bundle(bundles / "private_key_jwt")
    source.get()
    source.get()
    seen = set()
    for form, headers in sent:
        assert "Authorization" not in headers
        fields = dict(part.split("=", 1) for part in form.split("&"))
        header, payload, signature = fields["client_assertion"].split(".")
        said = json.loads(decode(payload))
        assert (said["iss"], said["sub"], said["aud"]) == ("private_key_jwt", "private_key_jwt", ISSUER)
        assert said["exp"] - said["iat"] == 60
        seen.add(said["jti"])
        raw = decode(signature)
        pair = utils.encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
        certificate = x509.load_pem_x509_certificate((bundles / "private_key_jwt/certificate.pem").read_bytes())
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(pair, f"{header}.{payload}".encode(), ec.ECDSA(hashes.SHA256()))
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("status", "body", "error", "again"),
    [
        (401, {"error": "invalid_client", "error_description": "no"}, "invalid_client", False),
        (400, {"error": "invalid_scope"}, "invalid_scope", False),
        (503, {"error": "temporarily_unavailable"}, "temporarily_unavailable", True),
        (429, {"error": "temporarily_unavailable"}, "temporarily_unavailable", True),
        (502, b"<html>", "unreachable", True),
        (404, b"<html>", "unreachable", False),
        (429, b"<html>", "unreachable", True),
        (200, b"[]", "unreachable", False),
        (200, {"access_token": SECRET}, "unreachable", False),
    ],
)
def test_an_error_says_whether_to_ask_again(
    bundles: Path, service: Any, status: int, body: object, error: str, again: bool
) -> None:
    service(status, body)
    with pytest.raises(TokenError) as caught:
        TokenSource.of_bundle(bundles / "tls_client_auth").get()
    assert (caught.value.error, caught.value.again, caught.value.wait) == (error, again, 0.0)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("body", [{"error": "temporarily_unavailable"}, b"<html>"])
@pytest.mark.parametrize(
    ("status", "retry_after", "wait"),
    [
        (503, "5", 5.0),
        (429, "120", 120.0),
        # Nobody keeps a device off for longer than an hour.
        (503, "3600", 3600.0),
        (503, "3601", 3600.0),
        (503, "9" * 400, 3600.0),
        (503, "-1", 0.0),
        (503, "soon", 0.0),
        (503, "\u0665", 0.0),
        (503, "Fri, 31 Dec 1999 23:59:59 GMT", 0.0),
        # What asking again does not cure, waiting does not either.
        (401, "5", 0.0),
    ],
)
def test_an_error_says_how_long_the_service_wants_to_be_left_alone(
    bundles: Path, service: Any, status: int, retry_after: str, wait: float, body: object
) -> None:
    """RFC 9110, 10.2.3."""
    service(status, body, retry_after)
    with pytest.raises(TokenError) as caught:
        TokenSource.of_bundle(bundles / "tls_client_auth").get()
    assert caught.value.wait == wait


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"method": "password"}, "is no method of"),
        ({"client_secret": None}, "needs more"),
        ({"issuer": "http://tokens.plant.example"}, "is no https URL"),
    ],
)
def test_what_cannot_work_is_refused(bundles: Path, change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TokenSource.of_bundle(bundles / "client_secret_basic", **change)


def test_a_bundle_without_tokens_is_refused(bundles: Path) -> None:
    with pytest.raises(ValueError, match="no bundle of a device that gets tokens"):
        TokenSource.of_bundle(bundles / "temp-1")


def test_a_token_stands_in_no_repr_and_in_no_log_of_paho(
    bundles: Path, service: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    service(200, GOOD)
    caplog.set_level(logging.DEBUG)
    client = TokenClient(TokenSource.of_bundle(bundles / "client_secret_basic"))
    client.enable_logger()
    packets: list[bytes] = []
    monkeypatch.setattr(client, "_packet_queue", lambda _command, packet, *_: packets.append(bytes(packet)))
    client._connect_properties = client._shown()
    client._send_connect(60)
    assert SECRET.encode() in packets[0]
    assert "Sending CONNECT" in caplog.text
    assert SECRET not in caplog.text
    assert SECRET not in repr(Token(SECRET, 0.0, 900.0, ""))


def test_a_renewal_is_one_auth_packet(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MQTT 5, 3.15, and RFC 7628, 3.1."""
    client = TokenClient(TokenSource.of_bundle(bundles / "client_secret_basic"))
    packets: list[bytes] = []
    monkeypatch.setattr(client, "_packet_queue", lambda _command, packet, *_: packets.append(bytes(packet)))
    client.reauthenticate(oauthbearer("TOKEN", PacketTypes.AUTH))
    data = b"n,,\x01auth=Bearer TOKEN\x01\x01"
    properties = b"\x15\x00\x0bOAUTHBEARER" + b"\x16" + len(data).to_bytes(2, "big") + data
    body = b"\x19" + bytes([len(properties)]) + properties
    assert packets == [b"\xf0" + bytes([len(body)]) + body]


# --- the method ace (RFC 9431, 2.2.4.2.2)

NONCE = b"8 bytes!"


def question(nonce: bytes) -> bytes:
    """Return the rest of an AUTH packet with the reason 0x18 and a nonce."""
    properties = b"\x15\x00\x03ace\x16" + len(nonce).to_bytes(2, "big") + nonce
    return bytes([0x18, len(properties)]) + properties


@pytest.fixture
def prover(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TokenClient, list[bytes]]:
    """A client with a token that is bound to its key alone, and the packets that paho would send."""
    client = TokenClient(TokenSource.of_bundle(bundles / "private_key_jwt", certificate=None))
    packets: list[bytes] = []

    def queue(_self: mqtt.Client, _command: int, packet: bytes, *_: object) -> MQTTErrorCode:
        packets.append(bytes(packet))
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    monkeypatch.setattr(mqtt.Client, "_packet_queue", queue)
    return client, packets


def hear(client: TokenClient, body: bytes) -> MQTTErrorCode:
    """Let a client take an AUTH packet."""
    client._in_packet["command"], client._in_packet["packet"] = 0xF0, bytearray(body)
    return client._packet_handle()


def test_where_nothing_else_would_do_the_key_is_proved(bundles: Path) -> None:
    source = TokenSource.of_bundle(bundles / "private_key_jwt")
    assert not TokenClient(source).proves
    assert TokenClient(source, proves=True).proves
    assert TokenClient(TokenSource.of_bundle(bundles / "private_key_jwt", certificate=None)).proves
    secret = TokenSource.of_bundle(bundles / "client_secret_basic")
    assert not TokenClient(secret).proves
    with pytest.raises(ValueError, match="the method ace needs a key"):
        TokenClient(secret, proves=True)
    shown: Any = ace("TOKEN", PacketTypes.CONNECT)
    assert (shown.AuthenticationMethod, shown.AuthenticationData) == ("ace", b"\x00\x05TOKEN")
    assert "TOKEN" not in str(shown)


def test_a_question_is_answered_with_both_nonces_signed(prover: tuple[TokenClient, list[bytes]], bundles: Path) -> None:
    client, packets = prover
    for _ in range(2):
        assert hear(client, question(NONCE)) is MQTTErrorCode.MQTT_ERR_SUCCESS
    answers = []
    certificate = x509.load_pem_x509_certificate((bundles / "private_key_jwt/certificate.pem").read_bytes())
    public = certificate.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    for packet in packets:
        head, data = packet[: 2 + 2 + 6 + 3], packet[13:]
        assert (
            head
            == b"\xf0" + bytes([len(packet) - 2]) + b"\x18" + bytes([len(packet) - 4]) + b"\x15\x00\x03ace\x16\x00\x48"
        )
        own, signature = data[:8], data[8:]
        pair = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
        public.verify(utils.encode_dss_signature(*pair), NONCE + own, ec.ECDSA(hashes.SHA256()))
        answers.append(own)
    assert answers[0] != answers[1]


@pytest.mark.parametrize("nonce", [b"", b"7 bytes", b"9 bytes..", b"eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJlZGdlLTEi"])
def test_a_gateway_cannot_have_signed_what_it_likes(prover: tuple[TokenClient, list[bytes]], nonce: bytes) -> None:
    client, packets = prover
    assert hear(client, question(nonce)) is MQTTErrorCode.MQTT_ERR_PROTOCOL
    assert packets == []


@pytest.mark.parametrize("body", [b"\x18", b"\x18\x05\x15\x00", b"\x18\x01\xff", b"\x18\x00"])
def test_a_question_that_is_none_ends_the_connection(prover: tuple[TokenClient, list[bytes]], body: bytes) -> None:
    client, packets = prover
    assert hear(client, body) is MQTTErrorCode.MQTT_ERR_PROTOCOL
    assert packets == []


def test_who_shows_a_token_alone_signs_nothing(bundles: Path, prover: tuple[TokenClient, list[bytes]]) -> None:
    client = TokenClient(TokenSource.of_bundle(bundles / "private_key_jwt"))
    assert hear(client, question(NONCE)) is MQTTErrorCode.MQTT_ERR_PROTOCOL
    assert prover[1] == []


def test_until_the_gateway_is_content_it_is_sent_nothing_else(prover: tuple[TokenClient, list[bytes]]) -> None:
    """Mosquitto closes a connection that publishes between question and answer."""
    client, packets = prover
    client.reauthenticate(ace("TOKEN", PacketTypes.AUTH), asking=True)
    client._packet_queue(0x32, b"a publish", 1, 1)
    client._packet_queue(0xC0, b"a ping", 0, 0)
    hear(client, question(NONCE))
    assert [packet[:1] for packet in packets] == [b"\xf0", b"\xf0"]
    hear(client, b"")
    assert packets[2:] == [b"a publish", b"a ping"]
    client._packet_queue(0x32, b"another", 2, 1)
    assert packets[4:] == [b"another"]


def test_what_was_held_back_is_not_forgotten_with_the_connection(
    prover: tuple[TokenClient, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, packets = prover
    client._token = Token(SECRET, time.monotonic(), 900.0, "", client.source.credential())
    client.reauthenticate(ace("TOKEN", PacketTypes.AUTH), asking=True)
    client._packet_queue(0x32, b"a publish", 1, 1)
    seen = []
    monkeypatch.setattr(mqtt.Client, "reconnect", lambda _self: seen.append(packets[-1]))
    client.reconnect()
    client.disconnect()
    assert seen == [b"a publish"]


@pytest.fixture
def connecting(
    prover: tuple[TokenClient, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> tuple[TokenClient, list[bytes]]:
    """A client that has sent its CONNECT; the gateway has not answered yet."""
    client, packets = prover
    client._token = Token(SECRET, time.monotonic(), 900.0, "", client.source.credential())
    monkeypatch.setattr(mqtt.Client, "reconnect", lambda paho: paho._packet_queue(0x10, b"a connect", 0, 0))
    client.reconnect()
    return client, packets


def connack(client: TokenClient, reason: int) -> None:
    """Let a client take a CONNACK."""
    client._in_packet["command"], client._in_packet["packet"] = 0x20, bytearray([0, reason, 0])
    client._packet_handle()


def test_what_is_published_while_it_connects_is_sent_when_it_is_in(connecting: tuple[TokenClient, list[bytes]]) -> None:
    """Mosquitto closes a connection that publishes between CONNECT and CONNACK, too."""
    client, packets = connecting
    client._packet_queue(0x32, b"a publish", 1, 1)
    hear(client, question(NONCE))
    client.disconnect()
    assert packets[0] == b"a connect"
    assert [packet[:1] for packet in packets[1:]] == [b"\xf0"]
    connack(client, 0)
    assert packets[2:] == [b"a publish"]
    client._packet_queue(0x32, b"another", 2, 1)
    assert packets[3:] == [b"another"]


def test_what_was_published_goes_to_no_gateway_that_refused(connecting: tuple[TokenClient, list[bytes]]) -> None:
    client, packets = connecting
    client._packet_queue(0x32, b"a publish", 1, 1)
    connack(client, 0x87)
    assert packets == [b"a connect"]
    client._token = Token(SECRET, time.monotonic(), 900.0, "", client.source.credential())
    client.reconnect()
    client.disconnect()
    # Before the CONNECT it is in the hands of paho, which forgets it or repeats it, as its QoS says.
    assert packets == [b"a connect", b"a publish", b"a connect"]


def test_who_has_no_question_to_expect_holds_nothing_back(
    bundles: Path, prover: tuple[TokenClient, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, packets = TokenClient(TokenSource.of_bundle(bundles / "private_key_jwt")), prover[1]
    client._token = Token(SECRET, time.monotonic(), 900.0, "", client.source.credential())
    monkeypatch.setattr(mqtt.Client, "reconnect", lambda _paho: None)
    client.reconnect()
    client.disconnect()
    client._packet_queue(0x32, b"a publish", 1, 1)
    assert packets == [b"a publish"]
