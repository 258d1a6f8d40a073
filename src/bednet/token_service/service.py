# SPDX-License-Identifier: Apache-2.0
"""What the token service does, apart from HTTP.

- :class:`Service`: issues tokens, looks at them, revokes them, and tells what brokers must know.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from bednet.token_service import clock, jose, keys, onboarding, revocation, scope
from bednet.token_service.clients import CLIENT_CREDENTIALS, Client
from bednet.token_service.database import Unavailable, cutoffs, devices, meta, profiles, tokens
from bednet.token_service.keys import Keys
from bednet.token_service.log import event
from bednet.token_service.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from bednet.token_service.config import Config
    from bednet.token_service.database import Database
    from bednet.token_service.jose import Json
    from bednet.token_service.onboarding import Request
    from bednet.token_service.scope import Scope

TYP, LIST_TYP = "at+jwt", "revocations+jwt"
MOST_TOKENS = 200
"""Tokens of one device that are not over yet. One that renews at half of a token's life has three."""

LIST_REUSED = 60
"""Seconds that a signed revocation list with the same content is used again."""


@dataclass(frozen=True)
class Issued:
    """A token of this service, taken apart and verified."""

    claims: Json
    revoked: bool

    @property
    def device(self) -> str:
        """The id of the device that it is for."""
        return str(self.claims["sub"])

    def is_active(self, now: int) -> bool:
        """Say whether a broker would take it; at the second of its ``exp`` it is over (RFC 7519, 4.1.4)."""
        return not self.revoked and now < self.claims["exp"]


class Service:
    """The token service over one configuration and one database; safe to share between threads.

    :ivar now: returns the time in unix seconds.
    """

    def __init__(self, config: Config, database: Database, now: Callable[[], int]) -> None:
        self.config = config
        self.database = database
        self.now = now
        self.keys = Keys(config.keys_dir)
        self._lock = threading.Lock()
        self._list: tuple[int, str, str] | None = None
        """When it was signed, its content, the signed list."""
        self._schema_is_right = False

    def check(self) -> None:
        """Make sure that the database is this program's; asked until it was right once.

        :raises Unavailable: when it is not.
        """
        if not self._schema_is_right:
            self.database.check_schema()
            self._schema_is_right = True

    def audience(self, resources: list[str]) -> list[str]:
        """Return the ``aud`` of a token for the resources that were named (RFC 8707, 2).

        :raises Refusal: when there are several, or one that this service issues nothing for.
        """
        if not resources:
            return list(self.config.audiences)
        if len(resources) > 1:
            raise Refusal("invalid_target", "two-resources")
        if resources[0] not in self.config.audiences + self.config.gateways:
            raise Refusal("invalid_target", "unknown-resource")
        return resources

    @staticmethod
    def asked(text: str | None) -> Scope | None:
        """Read the scope of a request; None when there is none.

        :raises Refusal: when it is none of RFC 9431.
        """
        if not text:
            return None
        try:
            return scope.parse(text)
        except scope.ScopeError as exc:
            raise Refusal("invalid_scope", exc.code) from exc

    def issue(
        self, client: Client, asked: str | None, resources: list[str], grant_type: str, request: Request | None = None
    ) -> Json:
        """Issue a token: sign it, and record it in the same transaction.

        :param request: the request of RFC 8628 that it answers, which is used up.
        :returns: the answer of RFC 6749, 5.1.
        :raises Refusal: when the policy allows nothing of it, or the device has too many tokens.
        :raises Unavailable: when it cannot be recorded, the clock is wrong, or there is no key; nothing is issued then.
        """
        audience, wanted, now = self.audience(resources), self.asked(asked), self.now()
        # Before others have to wait. A policy that changes meanwhile counts nonetheless: brokers demand it as well.
        granted = self._granted(client, wanted)
        with self.database.writing() as connection:
            clock.check(connection, now)
            if request is not None and not onboarding.take(connection, request):
                raise Refusal("invalid_grant", "device-code-used")
            # Locked: who revokes the device meanwhile waits, and finds this token.
            device = sa.select(devices).where(devices.c.id == client.id).with_for_update()
            row = connection.execute(device).mappings().first()
            if row is None or row["revoked"] is not None:
                raise Refusal("invalid_client", "revoked")
            self._check_number(connection, client.id, now)
            signer = self.keys.signer(connection, now)
            cutoff = connection.execute(sa.select(cutoffs.c.at).where(cutoffs.c.device == client.id)).scalar()
            # A token of the very second of a cutoff would be refused.
            iat = now if cutoff is None or cutoff < now else cutoff + 1
            exp = min(now + self.config.token_seconds, row["until"] or now + self.config.token_seconds)
            if iat - now > clock.TOLERANCE or exp <= iat:
                times = [f"a cutoff at {cutoff}"] if cutoff is not None else []
                times += [f"its end at {row['until']}"] if row["until"] is not None else []
                raise Unavailable("clock", f"the clock shows {now}, and {client.id} has {' and '.join(times)}")
            claims: Json = {
                "iss": self.config.issuer,
                "sub": client.id,
                "client_id": client.id,
                "aud": audience[0] if len(audience) == 1 else audience,
                "iat": iat,
                "exp": exp,
                "jti": secrets.token_urlsafe(16),
                "scope": scope.show(granted),
            }
            kind = "Bearer"
            if client.certificate is not None:
                claims["cnf"] = {"x5t#S256": client.certificate.x5t}
            elif client.jwk is not None:
                claims["cnf"], kind = {"jwk": client.jwk}, "PoP"
            token = signer.sign(TYP, claims)
            if len(token) > jose.LONGEST:
                raise Refusal("invalid_scope", "scope-too-large")
            connection.execute(tokens.insert().values(jti=claims["jti"], device=client.id, iat=iat, exp=exp))
        event(
            logging.INFO,
            "issued",
            client=client.id,
            jti=claims["jti"],
            exp=exp,
            aud=audience,
            grant=grant_type if grant_type != CLIENT_CREDENTIALS else None,
            bound=next(iter(claims.get("cnf", {})), "nothing"),
            approver=None if request is None else request.approver,
        )
        return {"access_token": token, "token_type": kind, "expires_in": exp - now, "scope": claims["scope"]}

    def _granted(self, client: Client, wanted: Scope | None) -> Scope:
        with self.database.reading() as connection:
            named = sa.select(profiles.c.rules).where(profiles.c.name == client.row["profile"])
            rules = connection.execute(named).scalar()
        allowed, denied = scope.permissions(rules or "[]", client.row["placeholders"], client.id)
        try:
            return scope.grant(wanted, allowed, denied)
        except scope.ScopeError as exc:
            raise Refusal("invalid_scope", exc.code) from exc

    @staticmethod
    def _check_number(connection: sa.engine.Connection, device: str, now: int) -> None:
        """Refuse a device that has as many tokens as it may; revoked ones count, as they are in the database too."""
        ends = sa.select(tokens.c.exp).where(tokens.c.device == device).where(tokens.c.exp > now)
        some = ends.order_by(tokens.c.exp).limit(MOST_TOKENS).subquery()
        count, first = connection.execute(sa.select(sa.func.count(), sa.func.min(some.c.exp))).one()
        if count >= MOST_TOKENS:
            raise Refusal("temporarily_unavailable", "too-many-tokens", status=429, retry_after=first - now)

    def look(self, token: str) -> Issued | None:
        """Take a token of this service apart (RFC 7662, 2); None when it is none, or signed by a key that is gone."""
        try:
            parsed = jose.parse(token)
        except jose.JoseError:
            return None
        with self.database.reading() as connection:
            public = keys.public_keys(connection, self.now())
            key = public.get(str(parsed.header.get("kid")))
            if key is None or parsed.header.get("typ") != TYP:
                return None
            try:
                jose.verify(parsed, key, ("ES256", "EdDSA"))
            except jose.JoseError:
                return None
            claims = parsed.claims
            if claims.get("iss") != self.config.issuer:
                return None
            revoked = revocation.is_revoked(connection, claims["jti"], claims["sub"], claims["iat"])
        return Issued(claims, revoked)

    def revoke(self, issued: Issued) -> tuple[bool, int | None]:
        """End a token for its own device (RFC 7009, 2.1).

        :returns: whether it was valid until now; and the cutoff, if all of the device's ended with it.
        """
        with self.database.writing() as connection:
            return revocation.revoke_own(self.database, connection, issued.claims["jti"], issued.device, self.now())

    def jwks(self) -> Json:
        """Return the JWK Set."""
        with self.database.reading() as connection:
            return {"keys": keys.published(connection, self.now())}

    def revocations(self) -> str:
        """Return the signed revocation list; one with the same content and key serves several requests."""
        now = self.now()
        with self.database.reading() as connection:
            clock.check(connection, now)
            content = revocation.listed(connection, now)
            signer = self.keys.signer(connection, now)
            # Brokers refuse what a key signed that is published no more.
            text = json.dumps([signer.kid, content])
            with self._lock:
                if self._list and self._list[1] == text and 0 <= now - self._list[0] < LIST_REUSED:
                    return self._list[2]
        claims = {"iss": self.config.issuer, "iat": now, "exp": now + revocation.LIST_SECONDS, **content}
        signed = signer.sign(LIST_TYP, claims)
        with self._lock:
            self._list = (now, text, signed)
        return signed

    def health(self) -> None:
        """Make sure that a token could be issued now.

        :raises Unavailable: when it could not.
        """
        self.database.check_schema()
        with self.database.reading() as connection:
            self.keys.signer(connection, self.now())
            clock.check(connection, self.now())

    def form_key(self) -> bytes:
        """Return the key that forms are signed with.

        :raises Unavailable: when the database has none.
        """
        with self.database.reading() as connection:
            key = connection.execute(sa.select(meta.c.value).where(meta.c.name == "form-key")).scalar()
        if not key:
            raise Unavailable("database-schema", "the database has no form-key, which a migration makes")
        return str(key).encode()
