# SPDX-License-Identifier: Apache-2.0
"""Whom a token lets in. Each refusal has its reason in the audit, and the client learns nothing."""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import ssl
import time
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from bednet.probe import connect_packet, enter
from tests.base64url import decode, encode, encode_part
from tests.plugin.clock import Clock
from tests.plugin.gateway import Gateway, broker_program, plugin_path, waited_s
from tests.plugin.mqtt import InPieces, Resumable
from tests.plugin.pki import now
from tests.plugin.tokens import (
    AUDIENCE,
    AUTH,
    MINUTE,
    SUCCESS,
    Enhanced,
    Issuer,
    TokenSite,
    bearer,
    guest,
    jwk,
    one_more,
    public_pem,
    scope,
    shown,
    sign,
    thumbprint,
    token_site,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bednet.probe import Version
    from tests.plugin.conftest import Start
    from tests.plugin.pki import Authority

AT_ONCE = {"login_failures": "1000", "audit_rate": "1000"}


@pytest.fixture
def site(tmp_path: Path) -> TokenSite:
    """A site whose devices use tokens."""
    return token_site(tmp_path / "store")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[tuple[Gateway, TokenSite]]:
    """A broker for all that changes nothing; it does not make those wait who fail."""
    plugin_path()
    broker_program()
    folder = tmp_path_factory.mktemp("tokens")
    site = token_site(folder / "store")
    listeners = ("password", "mtls", "websockets", "plain")
    with Gateway(folder, site, authority, options=AT_ONCE, listeners=listeners) as gateway:
        yield gateway, site


# --- who is let in


@pytest.mark.parametrize("on", ["password", "websockets"])
@pytest.mark.parametrize("version", [4, 5])
def test_a_token_lets_its_device_in(shared: tuple[Gateway, TokenSite], on: str, version: Version) -> None:
    gateway, site = shared
    token = site.issuers[0].token("tok-1")
    gateway.admitted(shown(token, "tok-1"), on=on, client_id="tok-1", version=version)


@pytest.mark.parametrize("algorithm", ["ES256", "Ed25519", "RS256", "PS256"])
def test_another_library_s_tokens_are_understood(site: TokenSite, start: Start, algorithm: str) -> None:
    """joserfc, which OAuth libraries build on, signs these; other tests sign by hand. Ed25519 is RFC 9864's name."""
    jwt, jwk_module = pytest.importorskip("joserfc.jwt"), pytest.importorskip("joserfc.jwk")
    kind: tuple[str, Any] = {"ES256": ("EC", "P-256"), "Ed25519": ("OKP", "Ed25519")}.get(algorithm, ("RSA", 2048))
    key = jwk_module.generate_key(*kind)
    issuer = Issuer("https://joserfc.example", "EdDSA" if algorithm == "Ed25519" else algorithm)
    issuer.keys = [{**key.as_dict(private=False), "kid": "j", "alg": algorithm}]
    site.issuers = [issuer]
    site.apply()
    gateway = start(listeners=("plain",))
    header = {"alg": algorithm, "typ": "at+jwt", "kid": "j"}
    token = jwt.encode(header, issuer.claims("tok-1"), key, algorithms=[algorithm])
    gateway.admitted(shown(token, "tok-1"), on="plain", client_id="tok-1")


def test_mqtt_5_needs_no_user_name(shared: tuple[Gateway, TokenSite]) -> None:
    gateway, site = shared
    with socket.create_connection(("127.0.0.1", gateway.ports["plain"]), 10) as plain:
        plain.sendall(connect_packet("tok-1", password=site.issuers[0].token("tok-1")))
        assert plain.recv(5)[3:4] == b"\0"


@pytest.mark.parametrize("audience", [AUDIENCE, [AUDIENCE], ["mqtts://elsewhere.example", AUDIENCE]])
def test_one_audience_of_several_is_enough(shared: tuple[Gateway, TokenSite], audience: object) -> None:
    gateway, site = shared
    gateway.admitted(shown(site.issuers[0].token("tok-1", aud=audience), "tok-1"), on="plain", client_id="tok-1")


@pytest.mark.parametrize("typ", ["at+jwt", "AT+JWT", "application/at+jwt", "Application/At+Jwt"])
def test_a_type_is_compared_as_media_types_are(shared: tuple[Gateway, TokenSite], typ: str) -> None:
    """RFC 7515, 4.1.9."""
    gateway, site = shared
    token = site.issuers[0].token("tok-1", header={"typ": typ})
    gateway.admitted(shown(token, "tok-1"), on="plain", client_id="tok-1")


@pytest.mark.parametrize("algorithm", ["ES256", "EdDSA", "RS256", "PS256"])
def test_each_algorithm_lets_in_and_keeps_out(site: TokenSite, start: Start, algorithm: str) -> None:
    issuer, other = Issuer("https://a.example", algorithm), Issuer("https://a.example", algorithm)
    site.issuers = [issuer]
    site.apply()
    gateway = start(listeners=("plain",))
    gateway.admitted(shown(issuer.token("tok-1"), "tok-1"), on="plain", client_id="tok-1")
    gateway.refused(shown(other.token("tok-1"), "tok-1"), on="plain", client_id="tok-1")
    gateway.audited(device="tok-1", reason="token-signature")


def test_a_certificate_and_a_token_must_both_hold(shared: tuple[Gateway, TokenSite], authority: Authority) -> None:
    gateway, site = shared
    issuer = site.issuers[0]
    mine, another = authority.device("tok-1"), authority.device("tok-1")
    bound = issuer.token("tok-1", cnf={"x5t#S256": thumbprint(mine.certificate)})
    gateway.admitted(shown(bound, "tok-1", mine.credentials), client_id="tok-1")
    gateway.admitted(shown(issuer.token("tok-1"), "tok-1", mine.credentials), client_id="tok-1")
    # A certificate alone is no way of this device to come in; and as today, it is for others.
    gateway.refused(mine.credentials, client_id="tok-1")
    gateway.audited(device="tok-1", reason="method")
    gateway.admitted(authority.device("both-1").credentials, client_id="both-1")
    for credentials, on in (
        (shown(bound, "tok-1", another.credentials), "mtls"),
        (shown(bound, "tok-1"), "password"),
        (shown(bound, "tok-1"), "plain"),
    ):
        with one_more(gateway, reason="token-binding"):
            gateway.refused(credentials, on=on, client_id="tok-1")
    # The certificate of another device, with a token that is bound to it by mistake
    other = authority.device("both-1")
    token = issuer.token("tok-1", cnf={"x5t#S256": thumbprint(other.certificate)})
    with one_more(gateway, reason="token-binding", device="both-1"):
        gateway.refused(shown(token, "tok-1", other.credentials), client_id="tok-1")


def test_a_token_does_not_help_a_revoked_certificate(site: TokenSite, start: Start, authority: Authority) -> None:
    issued = authority.device("both-1")
    site.revoked_serials[issued.serial] = "keyCompromise"
    site.apply()
    gateway = start(listeners=("mtls",))
    token = site.issuers[0].token("both-1")
    gateway.refused(shown(token, "both-1", issued.credentials), client_id="both-1")
    gateway.audited(device="both-1", reason="certificate-revoked")


@pytest.mark.parametrize(
    "cnf",
    [
        {},
        None,
        [],
        {"x5t#S256": "AAAA"},
        {"x5t#S256": 1},
        {"jkt": "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"},
        {"kid": "a key that we do not know"},
    ],
)
def test_what_is_bound_in_a_way_that_is_not_known_is_nobodys(
    shared: tuple[Gateway, TokenSite], authority: Authority, cnf: object
) -> None:
    gateway, site = shared
    token = site.issuers[0].token("tok-1", cnf=cnf)
    with one_more(gateway, reason="token-binding"):
        gateway.refused(shown(token, "tok-1", authority.device("tok-1").credentials), client_id="tok-1")


def test_a_gateway_takes_tokens_for_itself_and_no_other_does(site: TokenSite, start: Start) -> None:
    """A token that was stolen from one gateway is of no use at another."""
    gateway = start(listeners=("plain",), options={"audience": "mqtts://gateway-1.plant.example"})
    token = site.issuers[0].token("tok-1", aud="mqtts://gateway-1.plant.example")
    gateway.admitted(shown(token, "tok-1"), on="plain", client_id="tok-1")
    gateway.admitted(shown(site.issuers[0].token("tok-1"), "tok-1"), on="plain", client_id="tok-1")
    stolen = site.issuers[0].token("tok-1", aud="mqtts://gateway-2.plant.example")
    gateway.refused(shown(stolen, "tok-1"), on="plain", client_id="tok-1")
    gateway.audited(device="tok-1", reason="token-audience")


# --- who is not


def _bad_signature(issuer: Issuer) -> str:
    head, payload, _ = issuer.token("tok-1").split(".")
    _, _, other = issuer.token("tok-1").split(".")
    return f"{head}.{payload}.{other}"


def _changed(issuer: Issuer) -> str:
    head, _, signature = issuer.token("tok-1").split(".")
    return f"{head}.{encode_part(issuer.claims('tok-1', jti='another'))}.{signature}"


def _signed(issuer: Issuer, payload: bytes, **header: Any) -> str:
    return issuer.token("tok-1", header=header, payload=payload)


def _twice(issuer: Issuer) -> str:
    text = json.dumps(issuer.claims("tok-1"))
    return _signed(issuer, f'{text[:-1]}, "sub": "tok-2"}}'.encode())


def _der(issuer: Issuer) -> str:
    """Sign as X.509 does it, and not as JWS does."""
    text = issuer.token("tok-1").rpartition(".")[0]
    raw = sign(issuer.key, "ES256", text.encode())
    return f"{text}.{encode(b'0E' + raw)}"


NOW = "the time of the test"
HOUR = 60 * MINUTE

MALFORMED: dict[str, Callable[[Issuer], str | bytes]] = {
    "64 KB": lambda issuer: issuer.token("tok-1", more="x" * 48000),
    "a byte more than 8192": lambda issuer: issuer.token("tok-1") + "A" * (8193 - len(issuer.token("tok-1"))),
    "truncated": lambda issuer: issuer.token("tok-1").rpartition(".")[0][:-9] + ".AAAA",
    "no signature": lambda issuer: issuer.token("tok-1").rpartition(".")[0] + ".A",
    "not UTF-8": lambda issuer: _signed(issuer, b'{"iss": "https://tokens.plant.example:8443", "sub": "\xff"}'),
    "over-long UTF-8": lambda issuer: _signed(issuer, b'{"iss": "\xc0\xaf"}'),
    "half a surrogate": lambda issuer: _signed(issuer, b'{"iss": "\\ud800"}'),
    "a NUL": lambda issuer: _signed(issuer, b'{"sub": "tok-1\\u0000x"}'),
    "a claim twice": _twice,
    "a member of the header twice": lambda issuer: issuer.token(
        "tok-1", header=b'{"alg": "ES256", "typ": "at+jwt", "kid": "key-1", "alg": "ES256"}'
    ),
    "a list for claims": lambda issuer: _signed(issuer, b"[]"),
    "no JSON": lambda issuer: _signed(issuer, b"{"),
    "more behind it": lambda issuer: _signed(issuer, b"{} {}"),
    "deep": lambda issuer: _signed(issuer, b'{"a": ' + b"[" * 3000 + b"]" * 3000 + b"}"),
    "an endless number": lambda issuer: _signed(issuer, b'{"exp": ' + b"9" * 400 + b"}"),
    "padding": lambda issuer: issuer.token("tok-1") + "=",
    "other base64": lambda issuer: issuer.token("tok-1").replace("_", "/").replace("-", "+") + "+",
    "crit": lambda issuer: issuer.token("tok-1", header={"crit": ["b64"], "b64": False}),
    "a key's name that is no text": lambda issuer: issuer.token("tok-1", header={"kid": ["key-1"]}),
    "a type that is no text": lambda issuer: issuer.token("tok-1", header={"typ": 1}),
    "no algorithm": lambda issuer: issuer.token("tok-1", header={"alg": ...}),
    "an algorithm that is no text": lambda issuer: issuer.token("tok-1", header={"alg": None}),
}
BAD: dict[str, tuple[str, Callable[[Issuer], str | bytes]]] = {
    **{f"malformed: {name}": ("token-malformed", make) for name, make in MALFORMED.items()},
    "alg none": ("token-algorithm", lambda issuer: issuer.unsigned("tok-1")),
    "alg None": ("token-algorithm", lambda issuer: issuer.token("tok-1", header={"alg": "None"})),
    "HS256 with the public key": ("token-algorithm", lambda issuer: issuer.by_hmac("tok-1", public_pem(issuer.key))),
    "HS256 with nothing": ("token-algorithm", lambda issuer: issuer.by_hmac("tok-1", b"")),
    "ES384": ("token-algorithm", lambda issuer: issuer.token("tok-1", header={"alg": "ES384"})),
    "an algorithm that the issuer may not use": (
        "token-algorithm",
        lambda issuer: issuer.token("tok-1", header={"alg": "RS256"}),
    ),
    "a type of other tokens": ("token-type", lambda issuer: issuer.token("tok-1", header={"typ": "JWT"})),
    "an ID token": ("token-type", lambda issuer: issuer.token("tok-1", header={"typ": "id+jwt"})),
    "a type that begins well": ("token-type", lambda issuer: issuer.token("tok-1", header={"typ": "at+jwt2"})),
    "no type": ("token-type", lambda issuer: issuer.token("tok-1", header={"typ": ...})),
    "another issuer": ("token-issuer", lambda issuer: issuer.token("tok-1", iss="https://evil.example")),
    "an issuer with a slash more": ("token-issuer", lambda issuer: issuer.token("tok-1", iss=issuer.iss + "/")),
    "no issuer": ("token-issuer", lambda issuer: issuer.token("tok-1", iss=...)),
    "an issuer that is no text": ("token-issuer", lambda issuer: issuer.token("tok-1", iss=[issuer.iss])),
    "no key": ("token-key", lambda issuer: issuer.token("tok-1", header={"kid": ...})),
    "another key": ("token-key", lambda issuer: issuer.token("tok-1", header={"kid": "key-2"})),
    "a key in a file": ("token-key", lambda issuer: issuer.token("tok-1", header={"kid": "../../../dev/null"})),
    "a key in a database": ("token-key", lambda issuer: issuer.token("tok-1", header={"kid": "x' OR '1'='1"})),
    "a long name of a key": ("token-key", lambda issuer: issuer.token("tok-1", header={"kid": "k" * 4000})),
    "a signature of another token": ("token-signature", _bad_signature),
    "changed claims": ("token-signature", _changed),
    "a signature in DER": ("token-signature", _der),
    "a signature of zeros": (
        "token-signature",
        lambda issuer: issuer.token("tok-1").rpartition(".")[0] + "." + encode(bytes(64)),
    ),
    "an empty signature": ("token-signature", lambda issuer: issuer.token("tok-1").rpartition(".")[0] + "."),
    "another audience": ("token-audience", lambda issuer: issuer.token("tok-1", aud="mqtts://other.example")),
    "an audience that begins well": ("token-audience", lambda issuer: issuer.token("tok-1", aud=AUDIENCE + ".evil")),
    "no audience": ("token-audience", lambda issuer: issuer.token("tok-1", aud=...)),
    "no audience in a list": ("token-audience", lambda issuer: issuer.token("tok-1", aud=[[AUDIENCE], 1, None])),
    "expired": ("token-expired", lambda issuer: issuer.token("tok-1", exp=int(time.time()) - 1)),
    "not yet valid": ("token-early", lambda issuer: issuer.token("tok-1", nbf=int(time.time()) + MINUTE)),
    "issued in the future": (
        "token-early",
        lambda issuer: issuer.token("tok-1", iat=int(time.time()) + MINUTE, exp=int(time.time()) + HOUR),
    ),
    "good for too long": ("token-lifetime", lambda issuer: issuer.token("tok-1", exp=int(time.time()) + 25 * HOUR)),
    "no end": ("token-claims", lambda issuer: issuer.token("tok-1", exp=...)),
    "an end that is text": ("token-claims", lambda issuer: issuer.token("tok-1", exp="9999999999")),
    "an end before all times": ("token-claims", lambda issuer: issuer.token("tok-1", exp=-1)),
    "an end beyond all times": ("token-claims", lambda issuer: issuer.token("tok-1", exp=1 << 62)),
    "an end like 1e300": ("token-claims", lambda issuer: issuer.token("tok-1", exp=1e300)),
    "no beginning": ("token-claims", lambda issuer: issuer.token("tok-1", iat=...)),
    "nbf that is text": ("token-claims", lambda issuer: issuer.token("tok-1", nbf="0")),
    "no name of its own": ("token-claims", lambda issuer: issuer.token("tok-1", jti=...)),
    "no device": ("token-claims", lambda issuer: issuer.token("tok-1", sub=...)),
    "a device that is no text": ("token-claims", lambda issuer: issuer.token("tok-1", sub=["tok-1"])),
    "a device that is a filter": ("token-claims", lambda issuer: issuer.token("tok-1", sub="+")),
    "a long name of a device": ("token-claims", lambda issuer: issuer.token("tok-1", sub="t" * 65)),
    "no scope": ("token-scope", lambda issuer: issuer.token("tok-1", scope=...)),
    "a scope in words": ("token-scope", lambda issuer: issuer.token("tok-1", scope="openid profile")),
    "a scope that is a list": ("token-scope", lambda issuer: issuer.token("tok-1", scope=[["#", ["pub"]]])),
    "a scope of an object": ("token-scope", lambda issuer: issuer.token("tok-1", scope=encode_part({"#": ["pub"]}))),
    "a permission that is none": ("token-scope", lambda issuer: issuer.token("tok-1", scope=scope(("#", ["all"])))),
    "no permission": ("token-scope", lambda issuer: issuer.token("tok-1", scope=scope(("#", [])))),
    "a filter that is none": ("token-scope", lambda issuer: issuer.token("tok-1", scope=scope(("a#", ["pub"])))),
    "a permission cut short": ("token-scope", lambda issuer: issuer.token("tok-1", scope=encode_part([["#"]]))),
    "deep scope": ("token-scope", lambda issuer: issuer.token("tok-1", scope=encode(b"[" * 900 + b"]" * 900))),
    "a device that nobody knows": ("unknown-device", lambda issuer: issuer.token("tok-9")),
    "a device without tokens": ("method", lambda issuer: issuer.token("temp-1")),
    "of another device": ("username", lambda issuer: issuer.token("tok-2")),
    "for who has a key": ("token-binding", lambda issuer: issuer.token("tok-1", cnf={"jwk": jwk(issuer.key)})),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_token_is_refused(shared: tuple[Gateway, TokenSite], case: str) -> None:
    gateway, site = shared
    reason, make = BAD[case]
    with one_more(gateway, event="refused", reason=reason, device="tok-1"):
        gateway.refused(shown(make(site.issuers[0]), "tok-1"), on="plain", client_id="tok-1")
    # Whoever fails leaves nothing behind: the next one with a good token comes in.
    gateway.admitted(shown(site.issuers[0].token("tok-1"), "tok-1"), on="plain", client_id="tok-1")


def test_another_client_id_is_refused(shared: tuple[Gateway, TokenSite]) -> None:
    gateway, site = shared
    gateway.refused(shown(site.issuers[0].token("tok-1"), "tok-1"), on="plain", client_id="tok-2")
    gateway.audited(device="tok-1", client_id="tok-2", reason="client-id")


def test_the_site_s_own_service_alone_speaks_of_the_probe(site: TokenSite, start: Start) -> None:
    """The probe may come with a token; one without cnf of an issuer without a prefix would let anybody in as it."""
    site.add("bednet-probe", "token")
    own, other = site.issuers[0], Issuer("https://other.example")
    site.issuers.append(other)
    site.apply()
    gateway = start(listeners=("plain",), options=AT_ONCE)
    gateway.admitted(shown(other.token("tok-1"), "tok-1"), on="plain", client_id="tok-1")
    gateway.refused(shown(other.token("bednet-probe"), "bednet-probe"), on="plain", client_id="bednet-probe")
    gateway.audited(device="bednet-probe", reason="token-claims")
    gateway.admitted(shown(own.token("bednet-probe"), "bednet-probe"), on="plain", client_id="bednet-probe")


def test_an_issuer_cannot_speak_for_another(site: TokenSite, start: Start) -> None:
    """Two issuers may call their keys alike; and the key in a token's header is nobody's."""
    ours, theirs = site.issuers[0], Issuer("https://other.example", kid="key-1")
    site.issuers.append(theirs)
    site.apply()
    gateway = start(listeners=("plain",), options=AT_ONCE)
    gateway.refused(shown(theirs.token("tok-1", iss=ours.iss), "tok-1"), on="plain", client_id="tok-1")
    gateway.audited(device="tok-1", reason="token-signature")
    evil = Issuer(ours.iss, kid="key-1")
    for header in ({"jwk": jwk(evil.key)}, {"jku": "https://evil.example/jwks.json"}, {"x5c": ["AAAA"]}):
        with one_more(gateway, reason="token-signature"):
            gateway.refused(shown(evil.token("tok-1", header=header), "tok-1"), on="plain", client_id="tok-1")


def test_a_key_is_for_its_own_algorithm(site: TokenSite, start: Start) -> None:
    """An RSA key for PS256 checks no RS256, though the issuer may use both."""
    issuer = Issuer("https://rsa.example", "PS256", line={"algorithms": ["PS256", "RS256", "ES256"]})
    site.issuers = [issuer]
    site.apply()
    gateway = start(listeners=("plain",))
    gateway.admitted(shown(issuer.token("tok-1"), "tok-1"), on="plain", client_id="tok-1")
    for algorithm in ("RS256", "ES256"):
        token = issuer.token("tok-1", header={"alg": algorithm})
        with one_more(gateway, reason="token-algorithm"):
            gateway.refused(shown(token, "tok-1"), on="plain", client_id="tok-1")


# --- devices of other issuers


def foreign(issuer: Issuer, **more: Any) -> str:
    claims = {
        "azp": "probe",
        "aud": "mqtt-broker",
        "scope": "openid",
        "realm_access": {"roles": ["plant-sensor", "offline"]},
        "plant": {"location": "hall-7"},
    }
    return issuer.token("whoever", **{**claims, **more})


def test_roles_of_another_issuer_are_rights_here(shared: tuple[Gateway, TokenSite]) -> None:
    gateway, site = shared
    token = foreign(site.issuers[1])
    with guest(gateway, token, "kc-probe") as session:
        assert session.publish("sensors/hall-7/kc-probe/t", b"1").granted
        assert not session.publish("sensors/hall-8/kc-probe/t", b"1").granted
        assert not session.subscribe("halls/1")[0].granted
    both = foreign(site.issuers[1], azp="both", realm_access={"roles": ["plant-sensor", "plant-reader"]})
    with guest(gateway, both, "kc-both") as session:
        assert session.publish("sensors/hall-7/kc-both/t", b"1").granted
        assert session.subscribe("halls/1")[0].granted
        # What one role denies, another does not allow.
        assert not session.subscribe("halls/secret/1")[0].granted


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"realm_access": {"roles": []}}, "token-claims"),
        ({"realm_access": {"roles": "admin"}}, "token-claims"),
        ({"realm_access": ...}, "token-claims"),
        ({"plant": {"location": "+"}}, "token-claims"),
        ({"plant": {"location": "a/b"}}, "token-claims"),
        ({"plant": {"location": ""}}, "token-claims"),
        ({"plant": {"location": 7}}, "token-claims"),
        ({"plant": {"location": "h" * 256}}, "token-claims"),
        ({"plant": ...}, "token-claims"),
        ({"azp": "pro/be"}, "token-claims"),
        ({"azp": ""}, "username"),
        ({"aud": AUDIENCE}, "token-audience"),
    ],
)
def test_what_is_not_mapped_is_nothing(shared: tuple[Gateway, TokenSite], claims: dict[str, Any], reason: str) -> None:
    gateway, site = shared
    with one_more(gateway, reason=reason, device="kc-probe"):
        gateway.refused(shown(foreign(site.issuers[1], **claims), "kc-probe"), on="plain", client_id="kc-probe")


def test_names_with_dots_are_found(site: TokenSite, start: Start) -> None:
    """Auth0 puts its own claims under URLs."""
    issuer = Issuer("https://auth0.example/", line={"claim": "https://plant.example/device"})
    site.issuers = [issuer]
    site.apply()
    gateway = start(listeners=("plain",))
    claims: dict[str, Any] = {"https://plant.example/device": "tok-1"}
    token = issuer.token("x", **claims)
    gateway.admitted(shown(token, "tok-1"), on="plain", client_id="tok-1")


# --- to the second


@pytest.mark.parametrize("leeway", [0, 30])
def test_times_hold_to_the_second(site: TokenSite, start: Start, tmp_path: Path, leeway: int) -> None:
    """Of the site's own service; 30 is what policy.yml has unless it says otherwise (docs/policy.md)."""
    site.issuers[0].line["leeway"] = leeway
    site.apply()
    second = int(time.time())
    issuer = site.issuers[0]
    token = issuer.token("tok-1", iat=second, nbf=second, exp=second + 100)
    with Clock(tmp_path) as clock:
        gateway = start(
            listeners=("plain",), preload=str(clock.library), environment=clock.environment, options=AT_ONCE
        )
        for at, reason in (
            (-leeway - 1, "token-early"),
            (-leeway, None),
            (50, None),
            (100 + leeway - 1, None),
            (100 + leeway, "token-expired"),
            (100 + leeway + 1, "token-expired"),
        ):
            clock.set(second + at)
            if reason:
                with one_more(gateway, event="refused", reason=reason):
                    gateway.refused(shown(token, "tok-1"), on="plain", client_id="tok-1")
            else:
                gateway.admitted(shown(token, "tok-1"), on="plain", client_id="tok-1")
        clock.set(second + 50)
        longest = 86400
        gateway.admitted(
            shown(issuer.token("tok-1", iat=second, exp=second + longest), "tok-1"), on="plain", client_id="tok-1"
        )
        too_long = issuer.token("tok-1", iat=second, exp=second + longest + 1)
        gateway.refused(shown(too_long, "tok-1"), on="plain", client_id="tok-1")
        gateway.audited(reason="token-lifetime")
        # Parts of a second, as some issuers write them, never make a token good for longer.
        clock.set(second + 100 + leeway - 1)
        parts = issuer.token("tok-1", iat=second + 0.5, exp=second + 99.9)
        gateway.refused(shown(parts, "tok-1"), on="plain", client_id="tok-1")
        gateway.wait(lambda: gateway.count(event="refused", reason="token-expired") == 3, "the last refusal")


# --- many of them


def test_who_fails_often_must_wait_and_nobody_else(site: TokenSite, start: Start) -> None:
    gateway = start(listeners=("plain",), options={"login_failures": "3", "audit_rate": "1000"})
    bad, good = shown(_changed(site.issuers[0]), "tok-1"), shown(site.issuers[0].token("tok-1"), "tok-1")
    for _ in range(3):
        gateway.refused(bad, on="plain", client_id="tok-1")
    gateway.refused(bad, on="plain", client_id="tok-1")
    gateway.refused(good, on="plain", client_id="tok-1")
    gateway.audited(device="tok-1", reason="throttled")
    assert gateway.count(reason="token-signature") == 3
    gateway.admitted(shown(site.issuers[0].token("tok-2"), "tok-2"), on="plain", client_id="tok-2")


def test_a_stranger_at_the_same_address_ends_no_session_and_stops_no_certificate(
    site: TokenSite, start: Start, authority: Authority
) -> None:
    """Behind one NAT anybody can fail in a device's name; but has neither its session nor its certificate."""
    gateway = start(listeners=("plain", "password", "mtls"), options={"login_failures": "3", "audit_rate": "1000"})
    issuer, issued = site.issuers[0], authority.device("both-1")
    binding = {"x5t#S256": thumbprint(issued.certificate)}
    with Enhanced(gateway, "tok-1") as client:
        assert client.connect("OAUTHBEARER", bearer(issuer.token("tok-1"))).code == SUCCESS
        for device in ("tok-1", "both-1"):
            for _ in range(4):
                gateway.refused(shown(_changed(issuer), device), on="plain", client_id=device)
            gateway.audited(event="refused", client_id=device, reason="throttled")
        gateway.refused(shown(issuer.token("tok-1"), "tok-1"), on="plain", client_id="tok-1")
        packet = client.reauthenticate(bearer(issuer.token("tok-1")))
        assert (packet.kind, packet.code) == (AUTH, SUCCESS)
        assert client.publish("sensors/tok-1/t", b"1").code == SUCCESS
    good = shown(issuer.token("both-1", cnf=binding), "both-1", issued.credentials)
    gateway.admitted(good, on="mtls", client_id="both-1")
    # Who has proved who it is must answer for its own failures, and for nobody else's.
    for _ in range(3):
        gateway.refused(shown(_changed(issuer), "both-1", issued.credentials), on="mtls", client_id="both-1")
    with one_more(gateway, client_id="both-1", reason="throttled"):
        gateway.refused(good, on="mtls", client_id="both-1")


def test_a_certificate_that_is_revoked_does_not_count_against_its_device(
    site: TokenSite, start: Start, authority: Authority
) -> None:
    """TLS does not look at it when a session is resumed: whoever stole it keeps its device out no longer."""
    gateway = start(listeners=("mtls",), options={"login_failures": "3", "audit_rate": "1000"})
    stolen, issued, issuer = authority.device("both-1"), authority.device("both-1"), site.issuers[0]
    thief = Resumable(gateway, str(stolen.credentials.certificate), str(stolen.credentials.key), ssl.TLSVersion.TLSv1_2)
    assert thief.enter("both-1") == 0
    site.revoked_serials[stolen.serial] = "keyCompromise"
    site.apply()
    like_one = "eyJ.x.x"
    for _ in range(5):
        assert thief.enter("both-1", username="both-1", password=like_one) == 5
    assert thief.reused, "a new handshake would have been refused by TLS"
    gateway.wait(lambda: gateway.count(client_id="both-1", reason="certificate-revoked") == 5, "the last refusal")
    good = issuer.token("both-1", cnf={"x5t#S256": thumbprint(issued.certificate)})
    gateway.admitted(shown(good, "both-1", issued.credentials), on="mtls", client_id="both-1")
    assert gateway.count(reason="throttled") == gateway.count(reason="token-malformed") == 0


@pytest.mark.parametrize("spread", [False, True], ids=["one-address", "many-addresses"])
def test_a_flood_of_bad_tokens_is_not_noticed_by_others(site: TokenSite, start: Start, spread: bool) -> None:
    """From one address most are refused unseen; from many each costs the broker a signature, and no more than that."""
    gateway = start(listeners=("plain", "password"), options={"audit_rate": "1000"})
    bad = connect_packet("tok-1", username="tok-1", password=_changed(site.issuers[0]))
    waits: dict[str, list[float]] = {"calm": [], "flooded": []}
    with guest(gateway, site.issuers[0].token("tok-2"), "tok-2") as session:
        for kind, width in (("calm", 0), ("flooded", 25)):
            for number in range(40):
                with ExitStack() as stack:
                    for other in range(width):
                        source = f"127.0.{1 + number}.{1 + other}" if spread else "127.0.0.1"
                        where = ("127.0.0.1", gateway.ports["plain"])
                        flood = stack.enter_context(socket.create_connection(where, 10, (source, 0)))
                        flood.sendall(bad)
                    begin = time.monotonic() - waited_s(gateway.pid, os.getpid())
                    assert session.publish("sensors/tok-2/t", b"1").granted
                    waits[kind].append(time.monotonic() - waited_s(gateway.pid, os.getpid()) - begin)
    # 25 connections are some milliseconds of the broker's time.
    calm, flooded = (sorted(times) for times in waits.values())
    assert flooded[20] < calm[20] + 0.05, waits
    assert flooded[-1] < calm[-1] + 0.5, waits
    reasons = Counter(event["reason"] for event in gateway.audit() if event["device"] == "tok-1")
    # The audit leaves out lines of its own in a flood.
    assert reasons.total() >= 100
    if spread:
        assert set(reasons) == {"token-signature"}
    else:
        # Ten of them a minute got as far as their signature.
        assert set(reasons) == {"token-signature", "throttled"}
        assert reasons["token-signature"] <= 11


def test_no_token_is_ever_written_down(site: TokenSite, start: Start, authority: Authority) -> None:
    """Nor one that came as a user name (RFC 9431, 6.1). A client id the broker writes down itself."""
    gateway = start(more="log_type all", listeners=("plain", "mtls", "password"), options=AT_ONCE)
    issuer = site.issuers[0]
    good, bad = issuer.token("tok-1"), _changed(issuer)
    gateway.admitted(shown(good, "tok-1"), on="plain", client_id="tok-1")
    gateway.refused(shown(bad, "tok-1"), on="password", client_id="tok-1")
    gateway.refused(shown("password", good), on="plain", client_id="tok-1")
    gateway.refused(shown("password", "ace" + good), on="plain", client_id="tok-1")
    enter(gateway.listener("mtls"), shown(bad, "tok-1", authority.device("tok-1").credentials), client_id="tok-1")
    gateway.audited(device="(a token)", reason="unknown-device")
    text = gateway.text()
    for token in (good, bad):
        for piece in token.split("."):
            assert piece[:12] not in text
            assert piece[-12:] not in text


# --- what the store says


def test_an_issuer_that_is_gone_lets_nobody_in(site: TokenSite, start: Start) -> None:
    gateway = start(listeners=("plain",))
    token = site.issuers[0].token("tok-1")
    gateway.admitted(shown(token, "tok-1"), on="plain", client_id="tok-1")
    site.issuers.pop(0)
    site.apply()
    gateway.refused(shown(token, "tok-1"), on="plain", client_id="tok-1")
    gateway.audited(device="tok-1", reason="token-issuer")


def test_keys_are_rotated_with_overlap(site: TokenSite, start: Start) -> None:
    gateway = start(listeners=("plain",), options=AT_ONCE)
    issuer = site.issuers[0]
    old = issuer.token("tok-1")
    issuer.rotate("key-2")
    gateway.refused(shown(issuer.token("tok-1"), "tok-1"), on="plain", client_id="tok-1")
    gateway.audited(device="tok-1", reason="token-key")
    site.apply()
    gateway.admitted(shown(old, "tok-1"), on="plain", client_id="tok-1")
    gateway.admitted(shown(issuer.token("tok-1"), "tok-1"), on="plain", client_id="tok-1")
    issuer.keys.pop(0)
    site.apply()
    with one_more(gateway, reason="token-key"):
        gateway.refused(shown(old, "tok-1"), on="plain", client_id="tok-1")
    gateway.admitted(shown(issuer.token("tok-1"), "tok-1"), on="plain", client_id="tok-1")


def test_a_key_without_a_name_is_found(site: TokenSite, start: Start) -> None:
    issuer = Issuer("https://nameless.example")
    issuer.keys = [jwk(issuer.key)]
    site.issuers = [issuer]
    site.apply()
    gateway = start(listeners=("plain",))
    gateway.admitted(shown(issuer.token("tok-1", header={"kid": ...}), "tok-1"), on="plain", client_id="tok-1")
    gateway.refused(shown(issuer.token("tok-1"), "tok-1"), on="plain", client_id="tok-1")
    gateway.audited(reason="token-key")


def test_revoked_tokens_and_cutoffs_to_the_second(site: TokenSite, start: Start) -> None:
    gateway = start(listeners=("plain",), options=AT_ONCE)
    issuer, second = site.issuers[0], int(time.time())
    token, other = issuer.token("tok-1", jti="one"), issuer.token("tok-1", jti="two", iat=second - 9)
    site.store.revoke_token(issuer.iss, "one", second + HOUR, "tok-1")
    gateway.refused(shown(token, "tok-1"), on="plain", client_id="tok-1")
    gateway.audited(device="tok-1", reason="token-revoked")
    gateway.admitted(shown(other, "tok-1"), on="plain", client_id="tok-1")
    for cutoff, refused in ((second - 10, False), (second - 9, True)):
        site.store.cutoff("tok-1", cutoff)
        if refused:
            with one_more(gateway, reason="token-revoked"):
                gateway.refused(shown(other, "tok-1"), on="plain", client_id="tok-1")
        else:
            gateway.admitted(shown(other, "tok-1"), on="plain", client_id="tok-1")
    gateway.admitted(shown(issuer.token("tok-1", iat=second - 8), "tok-1"), on="plain", client_id="tok-1")


def test_a_device_that_is_revoked_or_ended_has_no_use_for_a_token(site: TokenSite, start: Start) -> None:
    gateway = start(listeners=("plain",))
    site.change("tok-1", until=int((now() - dt.timedelta(seconds=1)).timestamp()))
    gateway.refused(shown(site.issuers[0].token("tok-1"), "tok-1"), on="plain", client_id="tok-1")
    gateway.audited(device="tok-1", reason="until")
    site.store.revoke("tok-2", "keyCompromise")
    gateway.refused(shown(site.issuers[0].token("tok-2"), "tok-2"), on="plain", client_id="tok-2")
    gateway.audited(device="tok-2", reason="revoked")


def test_a_password_that_is_no_token_is_a_password(site: TokenSite, start: Start) -> None:
    gateway = start(listeners=("plain",))
    gateway.admitted(gateway.credentials("temp-1"), on="plain", client_id="temp-1")
    gateway.refused(shown("eyJ.only-one-dot", "temp-1"), on="plain", client_id="temp-1")
    gateway.audited(device="temp-1", reason="password")
    gateway.refused(shown("eyJ.three.dots.", "temp-1"), on="plain", client_id="temp-1")
    gateway.wait(lambda: gateway.count(device="temp-1", reason="password") == 2, "the second refusal")


@pytest.mark.parametrize("algorithm", ["ES256", "EdDSA", "RS256", "PS256"])
def test_a_refused_signature_ends_nobody_elses_connection(
    site: TokenSite, start: Start, authority: Authority, algorithm: str
) -> None:
    """OpenSSL keeps one queue of errors for all; 2.0.11 takes what another left there for one of its connection.

    So it is when a record comes in two pieces, and at any write that must wait.
    """
    site.issuers = [issuer := Issuer("https://one.example", algorithm)]
    site.apply()
    gateway = start(listeners=("mtls", "plain"), options=AT_ONCE)
    files = authority.device("both-1").credentials
    head, claims, signature = issuer.token("tok-1").split(".")
    # As long as it should be, and no signature at all.
    false = f"{head}.{claims}.{encode(bytes(len(decode(signature))))}"
    with (
        InPieces(gateway, str(files.certificate), str(files.key)) as victim,
        guest(gateway, issuer.token("tok-2"), "tok-2") as witness,
    ):
        victim.send(victim.record(connect_packet("both-1", version=4)))
        assert victim.receive(4) == bytes([0x20, 2, 0, 0])
        for _ in range(3):
            gateway.refused(shown(false, "tok-1"), on="plain", client_id="tok-1")
            ping = victim.record(b"\xc0\x00")
            victim.send(ping[:10])
            # The broker has one thread: it has read those before it answers this.
            assert witness.publish("sensors/tok-2/t", b"x").granted
            victim.send(ping[10:])
            assert victim.receive(2) == b"\xd0\x00", "the connection ended: see the broker's log"
    gateway.audited(action="connect", device="tok-1", reason="token-signature")
