# SPDX-License-Identifier: Apache-2.0
"""The checks of a host of the token service: :data:`SERVICE_CHECKS`."""

from __future__ import annotations

import base64
import json
import secrets
from datetime import UTC, datetime
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from bednet import probe
from bednet.probe import Credentials, Listener, Outcome, Reply
from bednet.site import PROBE_OWN, PROBE_READ_ONLY, PROBE_WRITE_ONLY
from bednet.verify.check import ACCESS, AUTHENTICATION, ENCRYPTION, LIMITS, REACHABILITY, Check
from bednet.verify.jws import encode_part, read_part
from bednet.verify.target import OK, ServiceTarget
from bednet.verify.tls import TLS
from bednet.verify.verdict import Verdict, alert, joined

_BAD_REQUEST, _UNAUTHORIZED, _TOO_LARGE = 400, 401, 413
# What the role allows (token_service_token_seconds), in seconds.
_LONGEST_TOKEN = 86_400
_REQUEST_BYTES = 16 * 1024
_PRIVATE = {"d", "p", "q", "dp", "dq", "qi", "oth", "k"}


def _service_answers(target: ServiceTarget) -> Verdict:
    reached = probe.tcp(target.service.address, target.service.port)
    if not reached.accepted:
        return Verdict(False, f"{reached}")
    # Whether its certificate is to be trusted is another check's question.
    where = Listener(target.service.address, target.service.port, server_name=target.service.server_name)
    seen = probe.request(where, "GET", "/healthz")
    return Verdict(seen.status == OK, "is well" if seen.status == OK else str(seen))


ANSWERING: Check[ServiceTarget] = Check(REACHABILITY, "the token service answers", True, _service_answers)
"""Runs first on each host of the token service, as :data:`~bednet.verify.gateway.REACHABLE` does on gateways."""


def _plaintext_http_refused(target: ServiceTarget) -> Verdict:
    plain = Listener(target.service.address, target.service.port, server_name=target.service.server_name, tls=False)
    seen = probe.request(plain, "GET", "/.well-known/oauth-authorization-server")
    # nginx says so in HTTP; other servers send an alert, or hang up.
    refused = seen.outcome in (Outcome.ALERT, Outcome.CLOSED, Outcome.RESET) or seen.status == _BAD_REQUEST
    return Verdict(refused, str(seen) if refused else f"an unencrypted request was answered: {seen}")


def _metadata_right(target: ServiceTarget) -> Verdict:
    seen = target.get("/.well-known/oauth-authorization-server")
    told, issuer = seen.json(), target.service.issuer
    if seen.status != OK or told.get("issuer") != issuer:
        return Verdict(False, f"{seen}, issuer {told.get('issuer')!r}, expected {issuer}")
    urls = {name: told[name] for name in told if name.endswith("_endpoint") or name == "jwks_uri"}
    if not {"token_endpoint", "jwks_uri"} <= urls.keys():
        return Verdict(False, "there is no token_endpoint, or no jwks_uri")
    foreign = [name for name, url in urls.items() if not str(url).startswith(f"{issuer}/")]
    if foreign:
        return Verdict(False, f"points elsewhere: {', '.join(sorted(foreign))}")
    return Verdict(True, f"{issuer}, and {len(urls)} endpoints below it")


def _keys_public(target: ServiceTarget) -> Verdict:
    seen = target.get("/jwks.json")
    keys = seen.json().get("keys")
    if seen.status != OK or not isinstance(keys, list) or not keys or not all(isinstance(key, dict) for key in keys):
        return Verdict(False, f"{seen}, and no JWK Set")
    if found := sorted(name for key in keys for name in _PRIVATE & key.keys()):
        return Verdict(False, f"the whole world can read the private members {', '.join(found)}")
    kinds = sorted({f"{key.get('kty')} {key.get('crv', '')}".strip() for key in keys})
    return Verdict(True, f"{len(keys)} of {', '.join(kinds)}")


def _invalid_client(seen: Reply) -> Verdict:
    """Pass on the answer of RFC 6749, 5.2, to a client that did not prove who it is."""
    return Verdict(seen.status == _UNAUTHORIZED and seen.json().get("error") == "invalid_client", str(seen))


def _no_proof_refused(target: ServiceTarget) -> Verdict:
    nameless = target.ask(grant_type="client_credentials")
    verdicts = [("with a name", _invalid_client(target.ask_as_probe())), ("without one", _invalid_client(nameless))]
    return joined(verdicts, ": ")


def _wrong_secret_refused(target: ServiceTarget) -> Verdict:
    verdicts = []
    for label, name in (("for the probe", target.identity.id), ("for nobody", probe.made_up_name())):
        shown = Credentials(username=name, password=secrets.token_hex(16))
        verdicts.append((label, _invalid_client(target.ask(shown, grant_type="client_credentials"))))
    return joined(verdicts, ": ")


def _unsigned_assertion_refused(target: ServiceTarget) -> Verdict:
    """Show an assertion (RFC 7523, 2.2) of which only the signature is missing."""
    now = int(datetime.now(UTC).timestamp())
    claims = {"iss": target.identity.id, "sub": target.identity.id, "aud": target.service.issuer, "iat": now}
    claims |= {"exp": now + 60, "jti": secrets.token_hex(8)}
    assertion = f"{encode_part({'alg': 'none', 'typ': 'JWT'})}.{encode_part(claims)}."
    kind = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
    return _invalid_client(target.ask_as_probe(client_assertion_type=kind, client_assertion=assertion))


def _false_certificate_gets_none(target: ServiceTarget) -> Verdict:
    forgeries = {
        "self-signed": target.forgeries.self_signed,
        "of a false CA": target.forgeries.false_ca,
        "with our key id": target.forgeries.copied_key_id,
    }
    verdicts = []
    for label, forgery in forgeries.items():
        seen = target.ask_as_probe(forgery)
        # nginx refuses it when it has read the request. Others may do so in TLS, which only who waits for it sees.
        verdict = _invalid_client(seen)
        if seen.status is None:
            verdict = alert(probe.handshake(target.listener, forgery), "unknown ca", "decrypt error", "bad certificate")
        verdicts.append((label, verdict))
    return joined(verdicts, ": ")


def _claimed_certificate_gets_none(target: ServiceTarget) -> Verdict:
    """Say in headers of our own what the front says of those who have shown a certificate: the probe's, a good one."""
    leaf = x509.load_pem_x509_certificate(target.identity.certificate.read_bytes())
    pem = quote(leaf.public_bytes(serialization.Encoding.PEM).decode(), safe="")
    said = {"Verify": "SUCCESS", "Cert": pem, "Address": "127.0.0.1"}
    verdicts = []
    for label, mark in (("with dashes", "-"), ("with underscores", "_")):
        headers = [(mark.join(("X", "Bednet", "Client", name)), value) for name, value in said.items()]
        verdicts.append((label, _invalid_client(target.ask_as_probe(headers=headers))))
    return joined(verdicts, ": ")


def _token_is_bound(target: ServiceTarget) -> Verdict:
    reply = target.purse.reply(target)
    token = target.purse.token(target)
    parts = token.split(".")
    header, claims = (read_part(part) for part in (parts[:2] if len(parts) == 3 else ("", "")))  # noqa: PLR2004 - a JWS
    digest = x509.load_pem_x509_certificate(target.identity.certificate.read_bytes()).fingerprint(hashes.SHA256())
    own = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    wanted = {"iss": target.service.issuer, "sub": target.identity.id, "client_id": target.identity.id}
    wrong = [name for name, value in wanted.items() if claims.get(name) != value]
    if header.get("typ") != "at+jwt" or wrong:
        return Verdict(False, f"not a token of RFC 9068 for the probe: {', '.join(wrong) or 'typ'} is wrong")
    if claims.get("cnf") != {"x5t#S256": own}:
        return Verdict(False, "the token is not bound to the certificate that it was given for")
    seconds = claims.get("exp", 0) - claims.get("iat", 0)
    if reply.headers.get("cache-control") != "no-store" or not 0 < seconds <= _LONGEST_TOKEN:
        return Verdict(False, f"good for {seconds} s, Cache-Control {reply.headers.get('cache-control')!r}")
    return Verdict(True, f"for {seconds} s, bound to the certificate")


def _token_says_no_more(target: ServiceTarget) -> Verdict:
    branches = {(f"{PROBE_OWN}/#", "pub"), (f"{PROBE_OWN}/#", "sub"), (f"{PROBE_READ_ONLY}/#", "sub")}
    branches.add((f"{PROBE_WRITE_ONLY}/#", "pub"))
    everything = encode_part([["#", ["pub", "sub"]]])
    asked = {
        "nothing": target.purse.reply(target),
        "everything": target.ask_as_probe(target.certificate, scope=everything),
    }
    verdicts = []
    for what, reply in asked.items():
        said = _granted(reply)
        if said is None:
            verdict = Verdict(False, f"no scope in the form of RFC 9431, 3: {reply}")
        else:
            more = sorted(f"{way} {topic}" for topic, way in said - branches)
            words = f"granted too much: {', '.join(more[:3])}" if more else f"{len(said)} grants of the policy"
            verdict = Verdict(bool(said) and not more, words)
        verdicts.append((f"asked for {what}", verdict))
    return joined(verdicts, ": ")


def _granted(reply: Reply) -> set[tuple[str, str]] | None:
    """Return the grants in the token of an answer: topic filters, each with `pub` or `sub`; None for no token."""
    parts = str(reply.json().get("access_token", "")).split(".") if reply.status == OK else []
    scope = read_part(parts[1]).get("scope") if len(parts) == 3 else None  # noqa: PLR2004 - a JWS
    try:
        text = str(scope)
        entries = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        return {(str(topic), str(way)) for topic, ways in entries for way in ways}
    except (ValueError, TypeError, RecursionError):
        return None


def _strangers_learn_nothing(target: ServiceTarget) -> Verdict:
    token = target.purse.token(target)
    verdicts = [(path, _invalid_client(target.ask(path=path, token=token))) for path in ("/introspect", "/revoke")]
    return joined(verdicts, ": ")


def _large_request_refused(target: ServiceTarget) -> Verdict:
    control = target.ask_as_probe(padding="x" * (_REQUEST_BYTES - 1024))
    if control.status == _TOO_LARGE:
        return Verdict(False, f"a request below {_REQUEST_BYTES} bytes was refused: {control}")
    seen = target.ask_as_probe(padding="x" * _REQUEST_BYTES)
    return Verdict(seen.status == _TOO_LARGE, f"above {_REQUEST_BYTES} bytes: {seen}")


SERVICE_CHECKS: tuple[Check[ServiceTarget], ...] = (
    ANSWERING,
    Check(ENCRYPTION, "plaintext HTTP is refused", True, _plaintext_http_refused),
    *TLS,
    Check(AUTHENTICATION, "the metadata names the issuer", False, _metadata_right),
    Check(AUTHENTICATION, "the published keys hold nothing private", False, _keys_public),
    Check(AUTHENTICATION, "nobody gets a token without proof", True, _no_proof_refused),
    Check(AUTHENTICATION, "a wrong secret gets no token", False, _wrong_secret_refused),
    Check(AUTHENTICATION, "an assertion that nobody signed gets no token", False, _unsigned_assertion_refused),
    Check(AUTHENTICATION, "a certificate of a false CA gets no token", False, _false_certificate_gets_none),
    Check(AUTHENTICATION, "a certificate that is only claimed gets no token", False, _claimed_certificate_gets_none),
    Check(AUTHENTICATION, "the probe gets a token that is bound to its certificate", True, _token_is_bound),
    Check(ACCESS, "a token says no more than the policy", False, _token_says_no_more),
    Check(ACCESS, "strangers learn and revoke no token", False, _strangers_learn_nothing),
    Check(LIMITS, "a request above the limit is refused", False, _large_request_refused),
)
