# SPDX-License-Identifier: Apache-2.0
"""`bednet verify` must never pass on a token service that gives tokens away, or a gateway that takes any.

The sharp edge, as for brokers: each service and each gateway here is lax in one way, and exactly the checks that look
at it fail. A strict one, the control, passes.
"""

from __future__ import annotations

import json
import shutil
import ssl
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from socketserver import BaseRequestHandler, TCPServer
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from bednet import probe
from bednet.probe import Credentials, Listener, Outcome
from bednet.verify import run, task
from bednet.verify.forgeries import Forgeries, false_certificate, make_forgeries
from bednet.verify.gateway import GATEWAY_CHECKS, REACHABLE
from bednet.verify.jws import read_part
from bednet.verify.run import verify
from bednet.verify.service import ANSWERING, SERVICE_CHECKS
from bednet.verify.table import summary
from bednet.verify.target import Purse, ServiceTarget, Target
from bednet.verify.task import Gateway, Identity, Input
from tests.base64url import decode, encode_part
from tests.verify import brokers
from tests.verify.services import (
    INVALID_CLIENT,
    NAME,
    OTHER,
    SITE,
    Answer,
    Door,
    Peer,
    Service,
    bound,
    server_context,
    strict,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bednet.verify.report import Report

SERVER = ExtendedKeyUsageOID.SERVER_AUTH


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> brokers.PKI:
    """A CA, and certificates for a gateway, a token service, and the probe, which has two."""
    pki = brokers.PKI.make(tmp_path_factory.mktemp("pki"), brokers.now())
    pki.issue("tokens", brokers.now(), common_name=NAME, dns=[NAME], usage=[SERVER])
    pki.issue("other", brokers.now(), common_name=brokers.PROBE)
    return pki


@pytest.fixture
def pki(made: brokers.PKI, tmp_path: Path) -> brokers.PKI:
    """A copy that a test may change."""
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    return replace(made, folder=tmp_path)


def identity(pki: brokers.PKI) -> Identity:
    return replace(pki.identity(), other=Credentials(pki.folder / "other.pem", pki.folder / "other.key"))


def look(pki: brokers.PKI, place: task.Service, *gateways: Gateway) -> Report:
    canary = Credentials(pki.folder / "canary.pem", pki.folder / "canary.key")
    return verify(Input(gateways, identity(pki), canary, "all", (place,)), started=brokers.now())


def failed(report: Report) -> dict[str, str]:
    return {result.check: result.evidence for result in report.results if not result.passed}


def test_verify_passes_on_a_strict_token_service(pki: brokers.PKI) -> None:
    with Service(pki) as service:
        report = look(pki, service.place)
    assert failed(report) == {}
    assert report.passed
    assert [result.check for result in report.results] == [check.name for check in SERVICE_CHECKS]
    assert summary(report).startswith("The net holds: 23 checks passed on 0 gateways and 1 token service in ")
    for path in ("probe.pem", "other.pem"):
        assert (pki.folder / path).exists()
    # The report is for anybody.
    assert not any(token in json.dumps([result.evidence for result in report.results]) for token in service.issued)


def test_a_token_service_that_is_down_is_one_clear_failure(pki: brokers.PKI) -> None:
    with Service(pki) as service:
        place = service.place
    report = look(pki, place)
    assert not report.passed
    assert [result.check for result in report.results] == ["the token service answers"]
    assert "connection refused" in report.results[0].evidence
    assert report.expected == {place.name: 1}


def test_a_token_service_that_is_down_is_no_failure_of_gateways(
    pki: brokers.PKI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their checks of tokens are left out where there is no token to show, and go by another host's where there is."""
    of_tokens = [check for check in GATEWAY_CHECKS if check.name in AT_GATEWAYS]
    monkeypatch.setattr(run, "GATEWAY_CHECKS", (REACHABLE, *of_tokens))
    monkeypatch.setattr(run, "SERVICE_CHECKS", (ANSWERING,))
    with Service(pki) as service:
        down = service.place
    with ExitStack() as stack:
        service = stack.enter_context(Service(pki))
        mtls, passwords = (stack.enter_context(Door(service, strict, mtls=mtls)) for mtls in (True, False))
        gateway = Gateway("gateway-1", brokers.LOCAL, brokers.SERVER_NAME, mtls.port, passwords.port)
        alone = look(pki, down, gateway)
        both = down, replace(service.place, name="up")
        beside = verify(Input((gateway,), identity(pki), Credentials(), "all", both), started=brokers.now())
    assert [(result.gateway, result.check, result.passed) for result in alone.results] == [
        ("gateway-1", "the gateway answers", True),
        (down.name, "the token service answers", False),
    ]
    assert not alone.passed
    assert failed(beside).keys() == {"the token service answers"}
    assert not beside.passed
    assert beside.expected == {"gateway-1": 1 + len(AT_GATEWAYS), down.name: 1, "up": 1}
    assert {result.evidence for result in beside.results if result.check == "a fresh token is accepted"} == {
        "of up: accepted"
    }


def test_a_gateway_that_is_down_does_not_hide_the_token_service(pki: brokers.PKI) -> None:
    with Service(pki) as service:
        report = look(pki, service.place, brokers.Ports.some().gateway())
    assert not report.passed
    assert set(failed(report)) == {"the gateway answers"}
    assert report.expected == {"gateway-1": 1, "tokens:1": 23}


class Plaintext(Service):
    """Answers without TLS as well."""

    def wraps(self, request: Any, context: ssl.SSLContext) -> Any:
        first = request.recv(1, 2)  # MSG_PEEK
        return super().wraps(request, context) if first == b"\x16" else _Bare(request)


class _Bare:
    """A plain socket in the place of one with TLS."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def __enter__(self) -> Any:
        return self._sock

    def __exit__(self, *_: object) -> None:
        self._sock.close()


class AnotherIssuer(Service):
    def metadata(self) -> dict[str, Any]:
        return super().metadata() | {"issuer": "https://tokens.plant.example"}


class PointsElsewhere(Service):
    def metadata(self) -> dict[str, Any]:
        return super().metadata() | {"token_endpoint": "https://tokens.plant.example.evil.example/token"}


class Private(Service):
    def keys(self) -> dict[str, Any]:
        keys = super().keys()["keys"]
        return {"keys": [*keys, keys[0] | {"kid": "two", "d": "AA"}]}


class NoKeys(Service):
    def keys(self) -> dict[str, Any]:
        return {"keys": []}


class Generous(Service):
    """Gives a token to whoever says a name."""

    def posts(self, path: str, form: dict[str, str], headers: dict[str, str], peer: Peer | None) -> Answer:
        bare = (
            "Authorization" not in headers
            and "client_assertion" not in form
            and "X-Bednet-Client-Verify" not in headers
        )
        named = form.get("client_id") and path == "/token" and bare and "X_Bednet_Client_Verify" not in headers
        return self.token(form, peer) if named else super().posts(path, form, headers, peer)


class Passwords(Service):
    """Does not look at secrets."""

    def posts(self, path: str, form: dict[str, str], headers: dict[str, str], peer: Peer | None) -> Answer:
        return self.token(form, peer) if "Authorization" in headers else super().posts(path, form, headers, peer)


class Assertions(Service):
    """Does not look at signatures."""

    def posts(self, path: str, form: dict[str, str], headers: dict[str, str], peer: Peer | None) -> Answer:
        return self.token(form, peer) if "client_assertion" in form else super().posts(path, form, headers, peer)


class Believing(Service):
    """Believes a header that a client sends."""

    header = "X-Bednet-Client-Cert"

    def posts(self, path: str, form: dict[str, str], headers: dict[str, str], peer: Peer | None) -> Answer:
        return self.token(form, peer) if self.header in headers else super().posts(path, form, headers, peer)


class BelievingUnderscores(Believing):
    header = "X_Bednet_Client_Cert"


class Unbound(Service):
    def claims(self, claims: dict[str, Any]) -> dict[str, Any]:
        return {name: claim for name, claim in claims.items() if name != "cnf"}


class OfAnother(Service):
    def claims(self, claims: dict[str, Any]) -> dict[str, Any]:
        return claims | {"sub": "temp-101"}


class Forever(Service):
    def claims(self, claims: dict[str, Any]) -> dict[str, Any]:
        return claims | {"exp": int(time.time()) + 10 * 86400}


class Cached(Service):
    caching = "max-age=3600"


class OfNoType(Service):
    typ = "JWT"


class Wide(Service):
    """Grants whatever is asked for."""

    def scope(self, form: dict[str, str]) -> list[list[Any]]:
        asked = form.get("scope")
        return super().scope(form) if asked is None else json.loads(decode(asked))


class Wider(Service):
    """Grants more than the policy to all."""

    def scope(self, form: dict[str, str]) -> list[list[Any]]:
        return [*super().scope(form), ["sensors/#", ["sub"]]]


class Open(Service):
    """Tells strangers about tokens."""

    def posts(self, path: str, form: dict[str, str], headers: dict[str, str], peer: Peer | None) -> Answer:
        return Answer(200, {"active": True}) if path == "/introspect" else super().posts(path, form, headers, peer)


class Obedient(Service):
    """Lets strangers revoke."""

    def posts(self, path: str, form: dict[str, str], headers: dict[str, str], peer: Peer | None) -> Answer:
        return Answer(200, {}) if path == "/revoke" else super().posts(path, form, headers, peer)


class Patient(Service):
    """Takes requests of any size."""

    def too_large(self, form: dict[str, str], peer: Peer | None) -> Answer:
        return INVALID_CLIENT


class Wordless(Service):
    """Refuses with a status that says something else."""

    def posts(self, path: str, form: dict[str, str], headers: dict[str, str], peer: Peer | None) -> Answer:
        answer = super().posts(path, form, headers, peer)
        return Answer(400, answer.body) if answer == INVALID_CLIENT else answer


TOKENS = "the probe gets a token that is bound to its certificate"
REFUSALS = {
    "nobody gets a token without proof",
    "a wrong secret gets no token",
    "an assertion that nobody signed gets no token",
    "a certificate that is only claimed gets no token",
    "strangers learn and revoke no token",
}
LAX: list[tuple[type[Service], set[str], str]] = [
    (Plaintext, {"plaintext HTTP is refused"}, "an unencrypted request was answered: status 200"),
    (AnotherIssuer, {"the metadata names the issuer"}, "issuer 'https://tokens.plant.example', expected https://"),
    (PointsElsewhere, {"the metadata names the issuer"}, "points elsewhere: token_endpoint"),
    (Private, {"the published keys hold nothing private"}, "can read the private members d"),
    (NoKeys, {"the published keys hold nothing private"}, "no JWK Set"),
    (Generous, {"nobody gets a token without proof"}, "with a name: status 200"),
    (Passwords, {"a wrong secret gets no token"}, "for the probe, for nobody: status 200"),
    (Assertions, {"an assertion that nobody signed gets no token"}, "status 200"),
    (Believing, {"a certificate that is only claimed gets no token"}, "with dashes: status 200"),
    (BelievingUnderscores, {"a certificate that is only claimed gets no token"}, "with underscores: status 200"),
    (Unbound, {TOKENS}, "not bound to the certificate that it was given for"),
    (OfAnother, {TOKENS}, "sub is wrong"),
    (Forever, {TOKENS}, "good for 864000 s"),
    (Cached, {TOKENS}, "Cache-Control 'max-age=3600'"),
    (OfNoType, {TOKENS}, "typ is wrong"),
    (Wide, {"a token says no more than the policy"}, "asked for everything: granted too much: pub #, sub #"),
    (Wider, {"a token says no more than the policy"}, "granted too much: sub sensors/#"),
    (Open, {"strangers learn and revoke no token"}, "/introspect: status 200"),
    (Obedient, {"strangers learn and revoke no token"}, "/revoke: status 200"),
    (Patient, {"a request above the limit is refused"}, "above 16384 bytes: status 401"),
    (Wordless, REFUSALS, "status 400, invalid_client"),
]


@pytest.mark.parametrize(("kind", "fails", "sees"), LAX, ids=lambda value: getattr(value, "__name__", ""))
def test_verify_fails_exactly_where_a_token_service_is_lax(
    pki: brokers.PKI, kind: type[Service], fails: set[str], sees: str
) -> None:
    with kind(pki) as service:
        report = look(pki, service.place)
    found = failed(report)
    assert set(found) == fails, found
    assert any(sees in evidence for evidence in found.values()), found


WITHOUT_TRUST = {
    "the token service answers",
    "plaintext HTTP is refused",
    "TLS versions that are not configured are refused",
    "broken ciphers are refused",
    "CBC ciphers are refused",
    "ciphers without forward secrecy are refused",
    "the server's certificate is for servers only",
    "the server's certificate is valid",
}


def _old(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(f"{brokers.STRONG}:ECDHE-ECDSA-AES128-SHA")


def _only_new(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3


@pytest.mark.parametrize(
    ("change", "fails", "sees"),
    [
        (_old, {"CBC ciphers are refused"}, "accepted: TLS 1.2, ECDHE-ECDSA-AES128-SHA"),
        (
            _only_new,
            # Where no good suite is taken either, a refusal of bad ones says nothing.
            {
                "TLS 1.2 is spoken with strong ciphers",
                "broken ciphers are refused",
                "CBC ciphers are refused",
                "ciphers without forward secrecy are refused",
            },
            "protocol version",
        ),
    ],
)
def test_verify_looks_at_the_tls_of_a_token_service(
    pki: brokers.PKI, change: Callable[[ssl.SSLContext], None], fails: set[str], sees: str
) -> None:
    context = server_context(pki)
    change(context)
    with Service(pki, context) as service:
        found = failed(look(pki, service.place))
    assert set(found) == fails, found
    assert any(sees in evidence for evidence in found.values()), found


@pytest.mark.parametrize(
    ("how", "fails", "sees"),
    [
        (
            {"dns": ["elsewhere.plant.example"]},
            # With who is not trusted nobody speaks.
            {check.name for check in SERVICE_CHECKS} - WITHOUT_TRUST,
            "not in the certificate",
        ),
        (
            {"usage": [SERVER, ExtendedKeyUsageOID.CLIENT_AUTH]},
            {"the server's certificate is for servers only"},
            "clientA",
        ),
    ],
)
def test_verify_looks_at_the_certificate_of_a_token_service(
    pki: brokers.PKI, how: dict[str, Any], fails: set[str], sees: str
) -> None:
    pki.issue("tokens", brokers.now(), **{"common_name": NAME, "dns": [NAME], "usage": [SERVER], **how})
    with Service(pki) as service:
        found = failed(look(pki, service.place))
    assert set(found) == fails, found
    assert any(sees in evidence for evidence in found.values()), found


def test_verify_sees_that_certificates_of_any_ca_are_taken(pki: brokers.PKI, monkeypatch: pytest.MonkeyPatch) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name, subject = brokers._name("another CA"), brokers._name(brokers.PROBE)
    root = false_certificate(name, name, key, key, ca=True)
    leaf_key = ec.generate_private_key(ec.SECP256R1())
    leaf = false_certificate(subject, name, leaf_key, key)
    (pki.folder / "false.pem").write_bytes(brokers.pem(leaf))
    brokers.write_key(pki.folder / "false.key", leaf_key)
    forged = Credentials(pki.folder / "false.pem", pki.folder / "false.key")

    @contextmanager
    def forgeries(_: Identity) -> Iterator[Forgeries]:
        yield Forgeries(forged, forged, forged)

    monkeypatch.setattr(run, "make_forgeries", forgeries)
    context = server_context(pki)
    with Service(pki, context) as service:
        assert failed(look(pki, service.place)) == {}
    context = server_context(pki)
    context.load_verify_locations(cadata=brokers.pem(root).decode())
    with Service(pki, context) as service:
        found = failed(look(pki, service.place))
    assert found == {
        "a certificate of a false CA gets no token": "self-signed, of a false CA, with our key id: status 200"
    }


# --- gateways that take tokens

AT_GATEWAYS = {
    "a fresh token is accepted",
    "a token without its certificate is refused",
    "a token with another certificate is refused",
    "a token for another gateway is refused",
    "a token that was altered is refused",
}


def no_audience(service: Service, peer: Peer | None, password: str | None) -> bool:
    claims = service.issued.get(password or "")
    return strict(service, peer, password) or (claims is not None and claims["aud"] == OTHER and bound(claims, peer))


def no_binding(service: Service, peer: Peer | None, password: str | None) -> bool:
    claims = service.issued.get(password or "")
    return strict(service, peer, password) or (claims is not None and claims["aud"] == SITE)


def no_signature(service: Service, peer: Peer | None, password: str | None) -> bool:
    # What it says of itself counts.
    if password is None or password.count(".") != 2:
        return strict(service, peer, password)
    said = read_part(password.split(".")[1])
    return said["aud"] == SITE and bound(said, peer)


def no_tokens(service: Service, peer: Peer | None, password: str | None) -> bool:
    return password is None and strict(service, peer, password)


def nothing_else(service: Service, peer: Peer | None, password: str | None) -> bool:
    return password is not None and strict(service, peer, password)


@pytest.mark.parametrize(
    ("decides", "fails", "sees"),
    [
        (strict, set(), ""),
        (no_audience, {"a token for another gateway is refused"}, f"one for {OTHER} is accepted"),
        (
            no_binding,
            {"a token without its certificate is refused", "a token with another certificate is refused"},
            "accepted",
        ),
        (no_signature, {"a token that was altered is refused"}, "accepted"),
        (no_tokens, {"a fresh token is accepted"}, "of tokens:1: refused: not authorized (0x87)"),
        (nothing_else, {"a token with another certificate is refused"}, "alone is refused, so nothing was learnt"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_verify_fails_exactly_where_a_gateway_is_lax_with_tokens(
    pki: brokers.PKI, decides: Any, fails: set[str], sees: str
) -> None:
    with ExitStack() as stack:
        service = stack.enter_context(Service(pki))
        mtls, passwords = (stack.enter_context(Door(service, decides, mtls=mtls)) for mtls in (True, False))
        found = failed_at_a_gateway(pki, service, mtls, passwords)
    assert set(found) == fails, found
    assert not fails or any(sees in evidence for evidence in found.values()), found


def failed_at_a_gateway(pki: brokers.PKI, service: Service, mtls: Door, passwords: Door) -> dict[str, str]:
    """Run the checks that are about tokens against a gateway; all of them must be there."""
    gateway = Gateway("gateway-1", brokers.LOCAL, brokers.SERVER_NAME, mtls.port, passwords.port)
    with make_forgeries(identity(pki)) as forgeries:
        purse = Purse()
        purse.services.append(ServiceTarget(service.place, identity(pki), forgeries, purse))
        target = Target(gateway, identity(pki), Credentials(), forgeries, purse)
        checks = [check for check in GATEWAY_CHECKS if check.name in AT_GATEWAYS and check.applies(target)]
        assert {check.name for check in checks} == AT_GATEWAYS
        results = [run._run(check, target, time.monotonic() + 20) for check in checks]
    return {result.check: result.evidence for result in results if not result.passed}


class Stingy(Service):
    """Gives nobody a token."""

    def posts(self, path: str, form: dict[str, str], headers: dict[str, str], peer: Peer | None) -> Answer:
        return INVALID_CLIENT


def test_without_a_token_nothing_is_proven_at_a_gateway(pki: brokers.PKI) -> None:
    with ExitStack() as stack:
        service = stack.enter_context(Stingy(pki))
        mtls, passwords = (stack.enter_context(Door(service, strict, mtls=mtls)) for mtls in (True, False))
        found = failed_at_a_gateway(pki, service, mtls, passwords)
    assert set(found) == AT_GATEWAYS
    assert set(found.values()) == {
        "tokens:1 gives the probe no token, so nothing was learnt: status 401, invalid_client"
    }


def test_a_site_without_a_token_service_has_no_checks_of_tokens(pki: brokers.PKI) -> None:
    gateway = Gateway("gateway-1", brokers.LOCAL, brokers.SERVER_NAME)
    with make_forgeries(identity(pki)) as forgeries:
        purse = Purse()
        purse.services.append(ServiceTarget(task.Service("t", "192.0.2.1", NAME), identity(pki), forgeries, purse))
        for target in (
            Target(gateway, identity(pki), Credentials(), forgeries),
            # Stock Mosquitto has no tokens.
            Target(replace(gateway, access_control="acl_file"), identity(pki), Credentials(), forgeries, purse),
        ):
            assert not any(check.name in AT_GATEWAYS and check.applies(target) for check in GATEWAY_CHECKS)


# --- the probe


def test_a_secret_is_not_sent_to_who_knows_whom(pki: brokers.PKI) -> None:
    secret = Credentials(username="a", password=brokers.PASSWORD)
    for listener in (Listener("192.0.2.1", 1), Listener("192.0.2.1", 1, pki.folder / "ca.pem", tls=False)):
        with pytest.raises(ValueError, match="a password is not sent to a server whose certificate is not checked"):
            probe.request(listener, "GET", "/", credentials=secret)


def test_what_is_no_http_is_told_so(pki: brokers.PKI) -> None:
    with Service(pki) as service, Door(service, strict, mtls=False) as door:
        seen = probe.request(Listener(brokers.LOCAL, door.port, tls=False), "GET", "/")
        assert seen.outcome in (Outcome.ALERT, Outcome.CLOSED, Outcome.RESET)
        assert seen.status is None
        wrong = Listener(brokers.LOCAL, service.place.port, pki.folder / "ca.pem", "elsewhere.plant.example")
        assert probe.request(wrong, "GET", "/").outcome is Outcome.DISTRUSTED
    assert probe.request(wrong, "GET", "/").outcome is Outcome.UNREACHABLE
    # What an answer says is for the report; what it holds may be a token.
    reply = probe.Reply(Outcome.ACCEPTED, "answered", 200, {}, b'{"access_token": "secret"}')
    assert "secret" not in f"{reply} {reply!r}"
    assert (
        str(probe.Reply(Outcome.ACCEPTED, "answered", 401, {}, b'{"error": "invalid_client"}'))
        == "status 401, invalid_client"
    )
    for odd in ("x" * 41, "eyJ.eyJ.AA", "invalid client", ""):
        said = probe.Reply(Outcome.ACCEPTED, "answered", 401, {}, json.dumps({"error": odd}).encode())
        assert str(said) == "status 401"


class _Says:
    """A server that answers a request with bytes, and closes the connection."""

    def __init__(self, answer: bytes) -> None:
        class Handler(BaseRequestHandler):
            def handle(self) -> None:
                self.request.recv(65536)
                with suppress(OSError):
                    self.request.sendall(answer)

        self.server = TCPServer((brokers.LOCAL, 0), Handler)

    def __enter__(self) -> Listener:
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self._thread.start()
        return Listener(brokers.LOCAL, self.server.server_address[1], tls=False)

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@pytest.mark.parametrize(
    ("answer", "outcome", "says"),
    [
        (b"SSH-2.0-x\r\n", Outcome.MISMATCH, "11 bytes that are no HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", Outcome.MISMATCH, "40 bytes that are no HTTP"),
        # The status is said; what is not there counts for nothing.
        (b"HTTP/1.1 200 OK\r\nCache-Con", Outcome.ACCEPTED, "status 200"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (1 << 20), Outcome.ACCEPTED, "status 200"),
    ],
    ids=["of another protocol", "broken off in the body", "broken off in the head", "without an end"],
)
def test_an_answer_that_is_odd_is_read_as_what_it_is(answer: bytes, outcome: Outcome, says: str) -> None:
    with _Says(answer) as listener:
        seen = probe.request(listener, "GET", "/")
    assert seen.outcome is outcome, seen
    assert says in str(seen)
    # However much comes, no more of it is kept.
    assert len(seen.body) <= 1 << 20
    assert seen.headers == {}
    assert seen.json() == {}


def test_a_token_reads_as_it_was_written() -> None:
    assert read_part(encode_part({"a": 1})) == {"a": 1}
    for broken in ("", "!", encode_part([1]), encode_part(b"\xff")):
        assert read_part(broken) == {}
