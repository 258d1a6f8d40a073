# SPDX-License-Identifier: Apache-2.0
"""How a device proves itself to the token service.

- :class:`Client`: a device, as Authlib sees it.
- :func:`authenticate`: by certificate (RFC 8705, 2), signed assertion (RFC 7523, 2.2) or secret (RFC 6749, 2.3.1).

A device has exactly one of these ways, that of devices.yml; another one is refused even when it would hold.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

import sqlalchemy as sa
from authlib.oauth2.rfc6749 import ClientMixin

from bednet.token_service import certified, jose
from bednet.token_service.config import DEVICE_ID
from bednet.token_service.database import assertions, devices, revoked_serials
from bednet.token_service.refusal import Refusal
from bednet.token_service.site import ITERATIONS, SecretHash

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bednet.token_service.certified import Certified
    from bednet.token_service.config import Config
    from bednet.token_service.database import Database
    from bednet.token_service.jose import Json, PublicKey
    from bednet.token_service.peer import Certificate

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
CLIENT_CREDENTIALS, DEVICE_CODE = "client_credentials", "urn:ietf:params:oauth:grant-type:device_code"
ASSERTION_ALGORITHMS = ("ES256", "ES384", "EdDSA", "PS256", "RS256")
ASSERTION_SECONDS = 3600
"""How long an assertion may be valid: what client libraries use, and as long as its ``jti`` has to be remembered."""

LEEWAY = 30
"""Seconds that the clocks of device and service may be apart."""

LONGEST_JTI = 256
_TYPES = (None, "JWT", "client-authentication+jwt")
# A secret that nobody has: an unknown client shall take as long as a wrong secret.
_NOBODY = SecretHash(ITERATIONS, b"nobody", bytes(64))


class Client(ClientMixin):  # type: ignore[misc] # Authlib has no types
    """A device, and what this request tells about it.

    :ivar certificate: the verified certificate that it came with, its own.
    :ivar jwk: the key that its assertion was signed with.
    :ivar has_revoked_certificate: whether the certificate that came along is revoked.
    """

    def __init__(self, row: Json, certificate: Certificate | None = None, jwk: Json | None = None) -> None:
        self.row = row
        self.id: str = row["id"]
        self.certificate = certificate
        self.jwk = jwk
        self.has_revoked_certificate = False

    def get_client_id(self) -> str:
        """Return the device's id."""
        return self.id

    def check_grant_type(self, grant_type: str) -> bool:
        """Say whether the device may use a grant; there are no refresh tokens (RFC 6749, 4.4.3)."""
        return grant_type in (CLIENT_CREDENTIALS, DEVICE_CODE)

    def check_endpoint_auth_method(self, method: str, _endpoint: str) -> bool:
        """Say whether this is the device's way to prove itself."""
        return bool(method == self.row["method"])


@dataclass
class Proof:
    """What a request proves itself with.

    :ivar form: the parameters of its body.
    :ivar authorization: the header ``Authorization``.
    :ivar claimed: for the log, who it says it is from; filled in by :func:`authenticate`.
    """

    form: Mapping[str, str]
    authorization: str | None
    certificate: Certificate | None
    claimed: str | None = None

    def method(self) -> str | None:
        """Return which way it is.

        :raises Refusal: when it is more than one (RFC 6749, 2.3), or one that is not offered.
        """
        ways = []
        if self.authorization is not None:
            ways.append("client_secret_basic")
        if "client_assertion" in self.form or "client_assertion_type" in self.form:
            ways.append("private_key_jwt")
        if "client_secret" in self.form:
            ways.append("client_secret_post")
        if len(ways) > 1:
            raise Refusal("invalid_request", "two-authentications")
        if "client_secret_post" in ways:
            raise Refusal("invalid_client", "secret-in-body")
        if ways:
            return ways[0]
        return None if self.certificate is None else "tls_client_auth"


def authenticate(
    config: Config, database: Database, proof: Proof, now: int, *, public: bool, people: tuple[str, ...] = ()
) -> Client:
    """Find out which device a request is from.

    :param public: a device without a key of its own may also just name itself; somebody approves it (RFC 8628).
    :param people: ids that may come by certificate though they get no token: introspectors.
    :raises Refusal: when it is not certain, or the device is not in service.
    """
    method = proof.method()
    match method:
        case "client_secret_basic":
            client = _by_secret(database, proof)
        case "private_key_jwt":
            client = _by_assertion(config, database, proof, now)
        case "tls_client_auth":
            client = _by_certificate(database, proof, people)
        case _ if public and "client_id" in proof.form:
            client = _by_name(database, proof)
        case _:
            raise Refusal("invalid_client", "no-authentication")
    _check_service(client, now)
    return _bind(client, proof)


def _query(database: Database, client_id: str, certificate: Certificate | None) -> Client | None:
    """Return a device, and whether the certificate that it came with is revoked, also when nginx has an older CRL."""
    if not DEVICE_ID.fullmatch(client_id):
        return None
    with database.reading() as connection:
        row = connection.execute(sa.select(devices).where(devices.c.id == client_id)).mappings().first()
        if row is None:
            return None
        client = Client(dict(row))
        if certificate is not None:
            serial = sa.select(revoked_serials.c.serial).where(revoked_serials.c.serial == certificate.serial)
            client.has_revoked_certificate = connection.execute(serial).first() is not None
    return client


def _named(proof: Proof, client_id: str) -> None:
    if DEVICE_ID.fullmatch(client_id):
        proof.claimed = client_id
    if proof.form.get("client_id", client_id) != client_id:
        raise Refusal("invalid_client", "client-id-mismatch")


def _is_way(client: Client | None, method: str) -> Client:
    if client is None:
        raise Refusal("invalid_client", "unknown-client")
    if client.row["method"] != method:
        raise Refusal("invalid_client", "wrong-method")
    return client


def _by_secret(database: Database, proof: Proof) -> Client:
    client_id, secret = _basic(proof.authorization or "")
    _named(proof, client_id)
    client = _query(database, client_id, proof.certificate)
    text = None if client is None else client.row["secret"]
    right = (_NOBODY if text is None else SecretHash.parse(text)).matches(secret)
    client = _is_way(client, "client_secret_basic")
    if client.row["revoked"] is not None:
        raise Refusal("invalid_client", "revoked")
    if text is None:
        raise Refusal("invalid_client", "no-secret-known")
    if not right:
        raise Refusal("invalid_client", "wrong-secret")
    return client


def _basic(header: str) -> tuple[str, str]:
    """Read the id and secret of RFC 6749, 2.3.1."""
    scheme, _, text = header.partition(" ")
    if scheme.lower() != "basic":
        raise Refusal("invalid_client", "authorization-scheme")
    try:
        pair = base64.b64decode(text.strip(), validate=True).decode("utf-8")
        client_id, colon, secret = pair.partition(":")
        client_id, secret = (unquote_plus(part, errors="strict") for part in (client_id, secret))
    except ValueError:
        raise Refusal("invalid_client", "authorization-malformed") from None
    if not colon or not client_id or not secret:
        raise Refusal("invalid_client", "authorization-malformed")
    return client_id, secret


def _by_certificate(database: Database, proof: Proof, people: tuple[str, ...]) -> Client:
    certificate = proof.certificate
    if certificate is None or "client_id" not in proof.form:
        # RFC 8705, 2: the client must say who it is.
        raise Refusal("invalid_client", "no-client-id")
    _named(proof, certificate.subject)
    client = _query(database, certificate.subject, certificate)
    if client is not None and client.id in people and client.row["method"] is None:
        return client
    return _is_way(client, "tls_client_auth")


def _by_name(database: Database, proof: Proof) -> Client:
    _named(proof, proof.form["client_id"])
    return _is_way(_query(database, proof.form["client_id"], proof.certificate), "client_secret_basic")


def _by_assertion(config: Config, database: Database, proof: Proof, now: int) -> Client:
    if proof.form.get("client_assertion_type") != ASSERTION_TYPE:
        raise Refusal("invalid_client", "assertion-type")
    try:
        parsed = jose.parse(proof.form.get("client_assertion", ""))
    except jose.JoseError as exc:
        raise Refusal("invalid_client", f"assertion-{exc.code}") from exc
    if parsed.header.get("typ") not in _TYPES:
        raise Refusal("invalid_client", "assertion-typ")
    client_id = parsed.claims.get("sub")
    if not isinstance(client_id, str) or parsed.claims.get("iss") != client_id:
        raise Refusal("invalid_client", "assertion-subject")
    _named(proof, client_id)
    client = _is_way(_query(database, client_id, proof.certificate), "private_key_jwt")
    if client.row["revoked"] is not None:
        raise Refusal("invalid_client", "revoked")
    if client.row["certificates"] is None:
        raise Refusal("invalid_client", "no-key-known")
    key = _key_that_signed(database, parsed, certified.load(client_id, client.row["certificates"]), now)
    exp, jti = check_assertion(config, parsed.claims, now)
    _use_once(database, client_id, jti, exp)
    client.jwk = jose.public_jwk(key)
    return client


def _key_that_signed(database: Database, parsed: jose.Parsed, candidates: Sequence[Certified], now: int) -> PublicKey:
    """Find the device's key that an assertion was signed with: it has two while a new bundle is on its way.

    One of its certificates must be good: of a renewed certificate the key may be that of the older one.
    """
    reasons, signed = [], []
    for candidate in candidates:
        try:
            jose.verify(parsed, candidate.key, ASSERTION_ALGORITHMS)
        except jose.JoseError as exc:
            reasons.append(exc)
        else:
            signed.append(candidate)
    if not signed:
        # Of a key that fits the algorithm the reason says more.
        worst = next((exc for exc in reasons if exc.code == "signature"), reasons[0])
        raise Refusal("invalid_client", f"assertion-{worst.code}") from worst
    revoked = _revoked(database, [candidate.serial for candidate in signed])
    left = [candidate for candidate in signed if candidate.serial not in revoked]
    if not left:
        raise Refusal("invalid_client", "certificate-revoked")
    if all(now > candidate.not_after for candidate in left):
        raise Refusal("invalid_client", "certificate-expired")
    return left[0].key


def _revoked(database: Database, serials: Sequence[str]) -> set[str]:
    statement = sa.select(revoked_serials.c.serial).where(revoked_serials.c.serial.in_(serials))
    with database.reading() as connection:
        return set(connection.execute(statement).scalars())


def _time(claims: Json, name: str) -> int | float | None:
    value = claims.get(name)
    if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
        raise Refusal("invalid_client", f"assertion-{name}")
    return value


def check_assertion(config: Config, claims: Json, now: int) -> tuple[int, str]:
    """Check the claims of an assertion whose signature is right (RFC 7523, 3).

    ``aud`` must be this service alone: an assertion that somebody else can use as well could be handed on.

    :returns: its ``exp`` and ``jti``.
    :raises Refusal: when one of them does not hold.
    """
    audience = claims.get("aud")
    if isinstance(audience, list) and len(audience) == 1:
        audience = audience[0]
    if audience not in (config.issuer, config.token_endpoint):
        raise Refusal("invalid_client", "assertion-audience")
    exp, nbf, iat = (_time(claims, name) for name in ("exp", "nbf", "iat"))
    if exp is None:
        raise Refusal("invalid_client", "assertion-exp")
    if now >= exp + LEEWAY:
        raise Refusal("invalid_client", "assertion-expired")
    if exp > now + ASSERTION_SECONDS + LEEWAY:
        raise Refusal("invalid_client", "assertion-lifetime")
    if (nbf is not None and nbf > now + LEEWAY) or (iat is not None and iat > now + LEEWAY):
        raise Refusal("invalid_client", "assertion-early")
    if iat is not None and iat < now - ASSERTION_SECONDS - LEEWAY:
        raise Refusal("invalid_client", "assertion-old")
    jti = claims.get("jti")
    if not isinstance(jti, str) or not 1 <= len(jti) <= LONGEST_JTI:
        raise Refusal("invalid_client", "assertion-jti")
    return int(exp) + LEEWAY + 1, jti


def _use_once(database: Database, client_id: str, jti: str, exp: int) -> None:
    """Note an assertion; the database knows it for all workers and instances, and after a restart."""
    used = hashlib.sha256(f"{client_id}\0{jti}".encode(errors="surrogatepass")).hexdigest()
    try:
        with database.writing() as connection:
            connection.execute(assertions.insert().values(used=used, exp=exp))
    except sa.exc.IntegrityError as exc:
        raise Refusal("invalid_client", "assertion-replayed") from exc


def _check_service(client: Client, now: int) -> None:
    if client.row["revoked"] is not None:
        raise Refusal("invalid_client", "revoked")
    if client.row["until"] is not None and now >= client.row["until"]:
        raise Refusal("invalid_client", "until")


def _bind(client: Client, proof: Proof) -> Client:
    """Take down the certificate that a device came with; a device that has one must come with it."""
    certificate = proof.certificate
    if certificate is None:
        if client.row["certificate"] and client.jwk is None:
            # Its token would be bound to nothing, though it could be (RFC 8705, 3).
            raise Refusal("invalid_client", "no-certificate")
        return client
    if certificate.subject != client.id:
        raise Refusal("invalid_client", "certificate-mismatch")
    if client.has_revoked_certificate:
        raise Refusal("invalid_client", "certificate-revoked")
    client.certificate = certificate
    return client


def find_person(database: Database, ids: tuple[str, ...], certificate: Certificate | None, now: int) -> str:
    """Return which of some people a certificate belongs to.

    :raises Refusal: when it is none of theirs, or they are not in service.
    """
    if certificate is None:
        raise Refusal("access_denied", "no-certificate", status=403)
    if certificate.subject not in ids:
        raise Refusal("access_denied", "not-an-approver", status=403)
    client = _query(database, certificate.subject, certificate)
    if client is None:
        raise Refusal("access_denied", "unknown-client", status=403)
    try:
        _check_service(client, now)
        _bind(client, Proof({}, None, certificate))
    except Refusal as exc:
        raise Refusal("access_denied", exc.reason, status=403) from exc
    return certificate.subject
