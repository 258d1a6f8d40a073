# SPDX-License-Identifier: Apache-2.0
"""MQTT 5 enhanced authentication: OAUTHBEARER (RFC 7628), `ace` with proof of possession (RFC 9431), and renewal."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from bednet.client import Token, TokenClient, TokenSource
from bednet.probe import connect_packet
from tests.base64url import encode
from tests.plugin.gateway import LOCAL, allow, broker_version
from tests.plugin.tokens import (
    ADMINISTRATIVE,
    AUTH,
    BAD_METHOD,
    CONNACK,
    CONTINUE,
    DISCONNECT,
    MINUTE,
    NOT_AUTHORIZED,
    PUBACK,
    SUBACK,
    SUCCESS,
    Enhanced,
    TokenSite,
    ace,
    bearer,
    guest,
    jwk,
    new_key,
    prove,
    scope,
    shown,
    thumbprint,
    token_site,
)

if TYPE_CHECKING:
    from pathlib import Path

    from paho.mqtt.properties import Properties

    from tests.plugin.conftest import Start
    from tests.plugin.gateway import Gateway
    from tests.plugin.pki import Authority
    from tests.plugin.tokens import Key, Packet

BEARER, ACE = "OAUTHBEARER", "ace"


@pytest.fixture
def site(tmp_path: Path) -> TokenSite:
    """A site whose devices use tokens."""
    return token_site(tmp_path / "store")


@pytest.fixture
def gateway(start: Start) -> Gateway:
    """A broker that makes nobody wait."""
    options = {"login_failures": "1000", "audit_rate": "1000"}
    return start(listeners=("password", "mtls", "plain", "psk"), options=options)


@pytest.fixture(scope="module", params=["ES256", "EdDSA"])
def key(request: pytest.FixtureRequest) -> Key:
    """The key of a device, of both kinds."""
    return new_key(request.param)


def connected(packet: Packet) -> bool:
    return (packet.kind, packet.code) == (CONNACK, SUCCESS)


def turned_away(packet: Packet) -> bool:
    return (packet.kind, packet.code) == (CONNACK, NOT_AUTHORIZED)


def refused_renewal(packet: Packet) -> bool:
    """Whether it is what a broker says to a session whose renewal it refuses; 2.0.11 sends a second CONNACK."""
    return packet.code == NOT_AUTHORIZED and packet.kind == (CONNACK if broker_version() < (2, 0, 16) else DISCONNECT)


# --- OAUTHBEARER


@pytest.mark.parametrize("on", ["password", "plain"])
def test_a_bearer_token_lets_in(site: TokenSite, gateway: Gateway, on: str) -> None:
    with Enhanced(gateway, "tok-1", on=on) as client:
        assert connected(client.connect(BEARER, bearer(site.issuers[0].token("tok-1"))))
        assert client.publish("sensors/tok-1/t", b"1").code == SUCCESS
        assert client.publish("sensors/tok-2/t", b"1").code == NOT_AUTHORIZED
    gateway.audited(action="publish", device="tok-1", reason="not-allowed")


def test_the_name_in_the_message_is_the_devices(site: TokenSite, gateway: Gateway) -> None:
    token = site.issuers[0].token("tok-1")
    with Enhanced(gateway, "tok-1") as client:
        assert connected(client.connect(BEARER, bearer(token, name="tok-1"), username="tok-1"))
    with Enhanced(gateway, "tok-1") as client:
        assert turned_away(client.connect(BEARER, bearer(token, name="tok-2")))
    gateway.audited(event="refused", reason="username")
    with Enhanced(gateway, "tok-1") as client:
        assert turned_away(client.connect(BEARER, bearer(token), username="tok-2"))
    gateway.audited(event="refused", reason="username", device="tok-2")


def test_the_client_id_is_bound_here_too(site: TokenSite, gateway: Gateway) -> None:
    with Enhanced(gateway, "tok-2") as client:
        assert turned_away(client.connect(BEARER, bearer(site.issuers[0].token("tok-1"))))
    gateway.audited(event="refused", client_id="tok-2", reason="client-id")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        b"n,,",
        b"n,,\x01\x01",
        b"n,,\x01auth=Bearer \x01\x01",
        b"n,,\x01auth=Basic dG9rLTE6eA==\x01\x01",
        b"n,,\x01auth=Bearer TOKEN\x01",
        b"n,,\x01auth=Bearer TOKEN\x01\x01more",
        b"n,,\x01auth=Bearer TOKEN\x01auth=Bearer TOKEN\x01\x01",
        b"n,x=y,\x01auth=Bearer TOKEN\x01\x01",
        b"p=tls-exporter,,\x01auth=Bearer TOKEN\x01\x01",
        b"n,,auth=Bearer TOKEN\x01\x01",
        b"TOKEN",
    ],
)
def test_what_is_no_oauthbearer_is_refused(site: TokenSite, gateway: Gateway, data: bytes) -> None:
    token = site.issuers[0].token("tok-1").encode()
    with Enhanced(gateway, "tok-1") as client:
        assert turned_away(client.connect(BEARER, data.replace(b"TOKEN", token)))
    gateway.audited(event="refused", reason="token-malformed")


def test_bad_tokens_are_refused_as_in_passwords(site: TokenSite, gateway: Gateway, authority: Authority) -> None:
    issuer, issued = site.issuers[0], authority.device("tok-1")
    bound = issuer.token("tok-1", cnf={"x5t#S256": thumbprint(issued.certificate)})
    cases: list[tuple[str, str]] = [
        (issuer.unsigned("tok-1"), "token-algorithm"),
        (issuer.token("tok-1", exp=int(time.time())), "token-expired"),
        (issuer.token("tok-1", aud="mqtts://elsewhere.example"), "token-audience"),
        (issuer.token("tok-1", more="x" * 40000), "token-malformed"),
        (issuer.token("tok-9"), "unknown-device"),
        (issuer.token("temp-1"), "method"),
        (bound, "token-binding"),
        (issuer.token("tok-1", cnf={"jwk": jwk(new_key("ES256"))}), "token-binding"),
    ]
    for token, reason in cases:
        with Enhanced(gateway, "tok-1") as client:
            assert turned_away(client.connect(BEARER, bearer(token)))
        gateway.audited(event="refused", client_id="tok-1", reason=reason)
    with Enhanced(gateway, "tok-1", issued.credentials, on="mtls") as client:
        assert connected(client.connect(BEARER, bearer(bound)))


def test_other_methods_are_not_supported(site: TokenSite, gateway: Gateway) -> None:
    for method in ("SCRAM-SHA-256", "oauthbearer", "ACE", "PLAIN"):
        with Enhanced(gateway, "tok-1") as client:
            packet = client.connect(method, bearer(site.issuers[0].token("tok-1")))
            assert (packet.kind, packet.code) == (CONNACK, BAD_METHOD)
    gateway.audited(event="refused", reason="method")


def test_who_is_refused_must_wait(site: TokenSite, start: Start) -> None:
    gateway = start(listeners=("password",), options={"login_failures": "2"})
    for _ in range(2):
        with Enhanced(gateway, "tok-1") as client:
            assert turned_away(client.connect(BEARER, b"nothing"))
    with Enhanced(gateway, "tok-1") as client:
        assert turned_away(client.connect(BEARER, bearer(site.issuers[0].token("tok-1"))))
    gateway.audited(event="refused", reason="throttled")


# --- renewal


def test_a_session_is_renewed_while_it_publishes(site: TokenSite, gateway: Gateway) -> None:
    issuer = site.issuers[0]
    with Enhanced(gateway, "tok-1") as client:
        second = int(time.time())
        assert connected(client.connect(BEARER, bearer(issuer.token("tok-1", exp=second + 2))))
        assert client.subscribe("commands/tok-1/#").kind == SUBACK
        for number in range(5):
            assert client.publish("sensors/tok-1/t", b"%d" % number).code == SUCCESS
            packet = client.reauthenticate(bearer(issuer.token("tok-1", exp=second + 3 + number)))
            assert (packet.kind, packet.code) == (AUTH, SUCCESS)
        # The first one is long over when this is answered.
        gateway.wait(lambda: time.time() > second + 3, "the end of the first token")
        assert client.publish("sensors/tok-1/t", b"last").code == SUCCESS
        packet = client.read()
        assert (packet.kind, packet.code) == (DISCONNECT, ADMINISTRATIVE)
        assert second + 7 <= time.time() < second + 8.5
    gateway.audited(event="disconnected", device="tok-1", reason="token-expired")


def test_a_renewed_scope_counts_from_then_on(site: TokenSite, gateway: Gateway) -> None:
    issuer = site.issuers[0]
    with Enhanced(gateway, "tok-1") as client:
        assert connected(client.connect(BEARER, bearer(issuer.token("tok-1"))))
        assert client.publish("sensors/tok-1/t", b"1").code == SUCCESS
        narrow = issuer.token("tok-1", scope=scope(("sensors/tok-1/u", ["pub"])))
        assert client.reauthenticate(bearer(narrow)).code == SUCCESS
        assert client.publish("sensors/tok-1/t", b"1").code == NOT_AUTHORIZED
        assert client.publish("sensors/tok-1/u", b"1").code == SUCCESS
    gateway.audited(action="publish", device="tok-1", reason="token-scope")


def _expired(site: TokenSite) -> bytes:
    return bearer(site.issuers[0].token("tok-1", exp=int(time.time()) - 1))


def _of_another(site: TokenSite) -> bytes:
    return bearer(site.issuers[0].token("tok-2"))


def _nothing(_: TokenSite) -> bytes:
    return b""


def _not_signed(site: TokenSite) -> bytes:
    return bearer(site.issuers[0].unsigned("tok-1"))


def _revoked(site: TokenSite) -> bytes:
    issuer = site.issuers[0]
    site.store.revoke_token(issuer.iss, "renewed", int(time.time()) + MINUTE, "tok-1")
    return bearer(issuer.token("tok-1", jti="renewed"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_expired, "token-expired"),
        (_of_another, "token-binding"),
        (_nothing, "token-malformed"),
        (_not_signed, "token-algorithm"),
        (_revoked, "token-revoked"),
    ],
)
def test_a_bad_renewal_ends_the_session(site: TokenSite, gateway: Gateway, make: Any, reason: str) -> None:
    with Enhanced(gateway, "tok-1") as client:
        assert connected(client.connect(BEARER, bearer(site.issuers[0].token("tok-1"))))
        assert refused_renewal(client.reauthenticate(make(site)))
        assert client.read().kind in (0, DISCONNECT)
    gateway.audited(event="refused", action="connect", device="tok-1", reason=reason)


def test_a_session_that_began_with_a_password_is_not_renewed(site: TokenSite, gateway: Gateway) -> None:
    """The broker knows no method for it; so a token in the password is renewed by another connection."""
    token = site.issuers[0].token("tok-1")
    with Enhanced(gateway, "tok-1") as client:
        client.raw(connect_packet("tok-1", username="tok-1", password=token))
        assert connected(client.read())
        client.auth(0x19, bearer(token), method=BEARER)
        assert client.read().kind in (0, DISCONNECT)
    gateway.admitted(shown(token, "tok-1"), on="plain", client_id="tok-1")


def test_another_connection_with_a_new_token_takes_over(site: TokenSite, gateway: Gateway) -> None:
    """For clients that cannot renew: the old session goes, its queue stays, and its token limits nothing any more."""
    issuer = site.issuers[0]
    narrow = scope(("commands/tok-1/#", ["sub"]))
    with guest(gateway, issuer.token("tok-1", scope=narrow), "tok-1", clean=False) as old:
        assert old.subscribe("commands/tok-1/#")[0].granted
        with guest(gateway, issuer.token("tok-1"), "tok-1", clean=False) as session:
            old.wait_goodbye()
            assert session.resumed
            assert session.publish("sensors/tok-1/t", b"1").granted


# --- ace


def bound(site: TokenSite, key: Key, **more: Any) -> str:
    return site.issuers[0].token("tok-1", cnf={"jwk": jwk(key)}, **more)


def test_the_owner_of_the_key_is_let_in(site: TokenSite, gateway: Gateway, key: Key) -> None:
    """RFC 9431, 2.2.4.2.2; the same again to renew (4)."""
    with Enhanced(gateway, "tok-1") as client:
        packet = client.connect(ACE, ace(bound(site, key)))
        assert (packet.kind, packet.code, len(packet.data)) == (AUTH, CONTINUE, 8)
        first = packet.data
        assert connected(client.answer(prove(key, packet.data)))
        assert client.publish("sensors/tok-1/t", b"1").code == SUCCESS
        packet = client.reauthenticate(ace(bound(site, key)))
        assert (packet.kind, packet.code, len(packet.data)) == (AUTH, CONTINUE, 8)
        assert packet.data != first
        packet = client.answer(prove(key, packet.data))
        assert (packet.kind, packet.code) == (AUTH, SUCCESS)
        assert client.publish("sensors/tok-1/t", b"1").code == SUCCESS
    assert not list(gateway.audit())


class Eager(TokenClient):
    """A device that publishes while it is asked for its proof."""

    def asked(self, data: bytes) -> Properties:
        self.told = self.publish("sensors/tok-1/t", b"1", qos=1)
        return super().asked(data)


def test_a_device_that_publishes_while_it_connects_gets_in_and_its_message_through(
    site: TokenSite,
    gateway: Gateway,
    authority: Authority,
    key: Key,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bednet.client holds back what the broker would close the connection for."""
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    monkeypatch.setattr(TokenSource, "get", lambda _self: Token(bound(site, key), time.monotonic(), 600.0, ""))
    source = TokenSource(
        "tok-1",
        site.issuers[0].iss,
        "private_key_jwt",
        authority.folder / "ca.pem",
        key=tmp_path / "key.pem",
    )
    client = Eager(source)
    client.connect(LOCAL, gateway.ports["password"])
    client.loop_start()
    try:
        gateway.wait(client.is_connected, "a connection")
        client.told.wait_for_publish(10)
        assert client.told.is_published()
    finally:
        client.disconnect()
        client.loop_stop()
    assert not list(gateway.audit())


def test_the_key_of_the_certificate_proves_as_well(site: TokenSite, gateway: Gateway, authority: Authority) -> None:
    issued = authority.device("tok-1")
    assert issued.credentials.key
    own: Any = load_pem_private_key(issued.credentials.key.read_bytes(), None)
    token = site.issuers[0].token("tok-1", cnf={"x5t#S256": thumbprint(issued.certificate)})
    with Enhanced(gateway, "tok-1", issued.credentials, on="mtls") as client:
        packet = client.connect(ACE, ace(token))
        assert connected(client.answer(prove(own, packet.data)))
    with Enhanced(gateway, "tok-1") as client:
        assert turned_away(client.connect(ACE, ace(token)))
    gateway.audited(reason="token-binding")


def _wrong_key(_: Key, nonce: bytes) -> bytes:
    return prove(new_key("ES256"), nonce)


def _other_nonce(key: Key, nonce: bytes) -> bytes:
    return prove(key, bytes(8) if nonce != bytes(8) else nonce[::-1] + b"x")


def _changed_nonce(key: Key, nonce: bytes) -> bytes:
    return b"x" + prove(key, nonce)[1:]


def _cut(key: Key, nonce: bytes) -> bytes:
    return prove(key, nonce)[:-1]


def _longer(key: Key, nonce: bytes) -> bytes:
    return prove(key, nonce) + b"x"


def _empty(_: Key, __: bytes) -> bytes:
    return b""


def _nonce_alone(_: Key, __: bytes) -> bytes:
    return b"8 bytes."


def _zeros(_: Key, __: bytes) -> bytes:
    return bytes(72)


@pytest.mark.parametrize(
    "make", [_wrong_key, _other_nonce, _changed_nonce, _cut, _longer, _empty, _nonce_alone, _zeros]
)
def test_whoever_has_only_the_token_is_not_let_in(site: TokenSite, gateway: Gateway, key: Key, make: Any) -> None:
    with Enhanced(gateway, "tok-1") as client:
        packet = client.connect(ACE, ace(bound(site, key)))
        assert packet.code == CONTINUE
        assert turned_away(client.answer(make(key, packet.data)))
    gateway.audited(event="refused", action="connect", device="tok-1", reason="token-proof")


def test_an_answer_counts_once_and_for_its_own_question(site: TokenSite, gateway: Gateway, key: Key) -> None:
    with Enhanced(gateway, "tok-1") as one, Enhanced(gateway, "tok-1") as other:
        first, second = (client.connect(ACE, ace(bound(site, key))) for client in (one, other))
        assert first.data != second.data
        assert turned_away(other.answer(prove(key, first.data)))
        assert connected(one.answer(prove(key, first.data)))


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x00\x00", b"\x00\x01", b"\xff\xffabc"])
def test_what_is_no_ace_is_refused(gateway: Gateway, data: bytes) -> None:
    with Enhanced(gateway, "tok-1") as client:
        assert turned_away(client.connect(ACE, data))
    gateway.audited(event="refused", reason="token-malformed")


def test_a_proof_over_what_tls_exports_is_not_taken(site: TokenSite, gateway: Gateway, key: Key) -> None:
    """RFC 9431, 2.2.4.2.1: no plugin sees it."""
    with Enhanced(gateway, "tok-1") as client:
        assert turned_away(client.connect(ACE, ace(bound(site, key)) + bytes(64)))
    gateway.audited(event="refused", reason="token-proof")


@pytest.mark.parametrize(
    "cnf",
    [
        ...,
        {"jwk": {"kty": "oct", "k": encode(bytes(32))}},
        {"jwk": {"kty": "EC", "crv": "P-256", "x": encode(bytes(32)), "y": encode(bytes(32))}},
        {"jwk": {"kty": "EC", "crv": "P-256", "x": encode(bytes(31)), "y": encode(bytes(32))}},
        {"jwk": {"kty": "EC", "crv": "P-384", "x": encode(bytes(48)), "y": encode(bytes(48))}},
        {"jwk": {"kty": "OKP", "crv": "X25519", "x": encode(bytes(32))}},
        {"jwk": {"kty": "RSA", "n": "AQAB", "e": "AQAB"}},
        {"jwk": {}},
        {"jwk": "key"},
        {"kid": "key-1"},
    ],
)
def test_a_token_without_a_key_to_prove_is_refused(site: TokenSite, gateway: Gateway, cnf: Any) -> None:
    with Enhanced(gateway, "tok-1") as client:
        assert turned_away(client.connect(ACE, ace(site.issuers[0].token("tok-1", cnf=cnf))))
    gateway.audited(event="refused", reason="token-binding")


def test_a_bad_token_is_not_even_asked(site: TokenSite, gateway: Gateway, key: Key) -> None:
    for more, reason in (
        ({"exp": int(time.time())}, "token-expired"),
        ({"aud": "mqtts://elsewhere.example"}, "token-audience"),
    ):
        with Enhanced(gateway, "tok-1") as client:
            assert turned_away(client.connect(ACE, ace(bound(site, key, **more))))
        gateway.audited(event="refused", reason=reason)
    with Enhanced(gateway, "tok-2") as client:
        assert turned_away(client.connect(ACE, ace(bound(site, key))))
    gateway.audited(event="refused", client_id="tok-2", reason="client-id")


def test_what_was_revoked_while_it_was_asked_stays_out(site: TokenSite, gateway: Gateway, key: Key) -> None:
    with Enhanced(gateway, "tok-1") as client:
        packet = client.connect(ACE, ace(bound(site, key, jti="asked")))
        site.store.revoke_token(site.issuers[0].iss, "asked", int(time.time()) + MINUTE, "tok-1")
        assert turned_away(client.answer(prove(key, packet.data)))
    gateway.audited(event="refused", device="tok-1", reason="token-revoked")


def test_who_has_not_answered_can_do_nothing(site: TokenSite, gateway: Gateway, key: Key) -> None:
    """Not even leave a will: it has no name yet."""
    site.profiles["sensor"].append(allow("subscribe", "sensors/#"))
    site.apply()
    with guest(gateway, site.issuers[0].token("tok-2"), "tok-2") as other:
        assert other.subscribe("sensors/#")[0].granted
        will = ("sensors/tok-1/will", b"gone")
        with Enhanced(gateway, "tok-1") as client:
            assert client.connect(ACE, ace(bound(site, key)), username="tok-1", will=will).code == CONTINUE
        gateway.audited(action="publish", client_id="tok-1", reason="client-id", topic=will[0])
        with Enhanced(gateway, "tok-1") as client:
            assert client.connect(ACE, ace(bound(site, key))).code == CONTINUE
            assert client.publish("sensors/tok-1/t", b"1").kind in (0, DISCONNECT)
        seen = other.fence("sensors/tok-2/fence")
    assert not seen


def test_who_does_not_answer_is_sent_away(site: TokenSite, gateway: Gateway) -> None:
    """The broker would let it stay as long as it likes. Which kind of key it would show plays no part."""
    with Enhanced(gateway, "tok-1") as client:
        begin = time.monotonic()
        assert client.connect(ACE, ace(bound(site, new_key("ES256")))).code == CONTINUE
        packet = client.read(within=20.0)
        assert packet.kind in (0, DISCONNECT)
        assert 9 < time.monotonic() - begin < 13
    gateway.audited(event="refused", device="tok-1", reason="token-proof")


def test_open_questions_are_few(site: TokenSite, gateway: Gateway, key: Key) -> None:
    """Who asks for more loses the first of its own; other devices are not touched."""
    other = site.issuers[0].token("tok-2", cnf={"jwk": jwk(key)})
    with ExitStack() as stack:
        second = stack.enter_context(Enhanced(gateway, "tok-2"))
        question = second.connect(ACE, ace(other))
        clients = [stack.enter_context(Enhanced(gateway, "tok-1")) for _ in range(6)]
        asked = [client.connect(ACE, ace(bound(site, key))) for client in clients]
        assert clients[0].read().kind in (0, DISCONNECT)
        assert clients[1].read().kind in (0, DISCONNECT)
        assert connected(clients[5].answer(prove(key, asked[5].data)))
        assert connected(second.answer(prove(key, question.data)))
    gateway.audited(event="refused", device="tok-1", reason="token-proof")


# --- what a broker makes of odd packets


def test_an_empty_auth_packet_ends_the_session_and_not_the_broker(site: TokenSite, gateway: Gateway) -> None:
    """Mosquitto takes it for an answer, in any state; to refuse or to grant it would leave it with freed memory."""
    token = site.issuers[0].token("tok-1")
    for _ in range(3):
        with Enhanced(gateway, "tok-1") as client:
            assert connected(client.connect(BEARER, bearer(token), expiry=60))
            client.raw(b"\xf0\x00\xf0\x00\xf0\x00")
            packets = [client.read() for _ in range(5)]
            assert packets[-1].kind == 0
        gateway.audited(event="disconnected", device="tok-1", reason="token-proof")
    with guest(gateway, token, "tok-1") as session:
        assert session.publish("sensors/tok-1/t", b"1").granted


def test_an_empty_auth_packet_is_no_proof(site: TokenSite, gateway: Gateway, key: Key) -> None:
    with Enhanced(gateway, "tok-1") as client:
        assert client.connect(ACE, ace(bound(site, key))).code == CONTINUE
        client.raw(b"\xf0\x00")
        assert turned_away(client.read())
    with Enhanced(gateway, "tok-1") as client:
        packet = client.connect(ACE, ace(bound(site, key)))
        assert connected(client.answer(prove(key, packet.data)))
        assert client.reauthenticate(ace(bound(site, key))).code == CONTINUE
        client.raw(b"\xf0\x00")
        assert refused_renewal(client.read())
    gateway.wait(lambda: gateway.count(event="refused", reason="token-proof") == 2, "both refusals")


def test_a_publish_while_it_is_asked_ends_the_session(site: TokenSite, gateway: Gateway, key: Key) -> None:
    """What Mosquitto does; the token that was good goes on for the will and the queue."""
    with Enhanced(gateway, "tok-1") as client:
        packet = client.connect(ACE, ace(bound(site, key)))
        assert connected(client.answer(prove(key, packet.data)))
        assert client.reauthenticate(ace(bound(site, key))).code == CONTINUE
        assert client.publish("sensors/tok-1/t", b"1").kind in (0, DISCONNECT)
    with Enhanced(gateway, "tok-1") as client:
        packet = client.connect(ACE, ace(bound(site, key)))
        assert connected(client.answer(prove(key, packet.data)))
        assert client.publish("sensors/tok-1/t", b"1").kind == PUBACK


def test_sighup_drops_nobody(site: TokenSite, gateway: Gateway, key: Key) -> None:
    with Enhanced(gateway, "tok-1") as client, Enhanced(gateway, "tok-2") as other:
        packet = client.connect(ACE, ace(bound(site, key)))
        gateway.reload()
        assert connected(client.answer(prove(key, packet.data)))
        assert connected(other.connect(BEARER, bearer(site.issuers[0].token("tok-2"))))
        gateway.reload()
        assert client.publish("sensors/tok-1/t", b"1").code == SUCCESS
        assert other.publish("sensors/tok-2/t", b"1").code == SUCCESS
        assert other.reauthenticate(bearer(site.issuers[0].token("tok-2"))).code == SUCCESS


def test_no_token_is_ever_written_down(site: TokenSite, start: Start, key: Key) -> None:
    gateway = start(more="log_type all", listeners=("password",))
    good, bad = bound(site, key), site.issuers[0].token("tok-1", exp=int(time.time()))
    with Enhanced(gateway, "tok-1") as client:
        packet = client.connect(ACE, ace(good))
        assert connected(client.answer(prove(key, packet.data)))
        assert client.reauthenticate(ace(good)).code == CONTINUE
    with Enhanced(gateway, "tok-1") as client:
        assert turned_away(client.connect(BEARER, bearer(bad)))
    gateway.audited(event="refused", reason="token-expired")
    text = gateway.text()
    for token in (good, bad):
        for piece in token.split("."):
            assert piece[:12] not in text
            assert piece[-12:] not in text
