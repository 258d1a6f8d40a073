# SPDX-License-Identifier: Apache-2.0
"""The endpoints of OAuth 2.0, as Authlib's classes with our devices, tokens and reasons.

- :class:`Server`: the authorization server; its answers to ``/token``, ``/introspect``, ``/revoke``,
  ``/device_authorization``.

The classes run with Authlib 1.2 (Debian 12) to 1.9. What differs between these is left alone: how clients
authenticate, how tokens look and what errors say is decided here.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from authlib.integrations.flask_oauth2 import AuthorizationServer
from authlib.oauth2.rfc6749.grants import ClientCredentialsGrant
from authlib.oauth2.rfc7009 import RevocationEndpoint
from authlib.oauth2.rfc7662 import IntrospectionEndpoint
from authlib.oauth2.rfc8628 import DeviceAuthorizationEndpoint, DeviceCodeGrant
from flask import Response, g

from bednet.token_service import onboarding
from bednet.token_service.clients import Client, Proof, authenticate
from bednet.token_service.log import event
from bednet.token_service.refusal import DESCRIPTIONS, Refusal

if TYPE_CHECKING:
    from authlib.oauth2 import OAuth2Error

    from bednet.token_service.jose import Json
    from bednet.token_service.onboarding import Request
    from bednet.token_service.peer import Certificate
    from bednet.token_service.service import Issued, Service

METHODS = ["tls_client_auth", "private_key_jwt", "client_secret_basic"]
ONBOARDING_METHODS = [*METHODS, "none"]
NO_STORE = [("Content-Type", "application/json"), ("Cache-Control", "no-store"), ("Pragma", "no-cache")]


class Context:
    """What belongs to one request, in ``flask.g.context``.

    :ivar form: the parameters of its body, each once.
    :ivar resources: the values of ``resource``, which alone may be there several times.
    :ivar who: whom the log names, as soon as somebody was named.
    """

    def __init__(self, certificate: Certificate | None, address: str | None, number: str) -> None:
        self.certificate = certificate
        self.address = address
        self.number = number
        self.form: dict[str, str] = {}
        self.resources: list[str] = []
        self.authorization: str | None = None
        self.who: str | None = None if certificate is None else certificate.subject
        self.request: Request | None = None


def context() -> Context:
    """Return the request's own."""
    found: Context = g.context
    return found


def error_response(error: str, status: int, *, retry_after: int | None = None) -> Response:
    """Answer as RFC 6749, 5.2 says."""
    body = {"error": error, "error_description": DESCRIPTIONS[error]}
    response = Response(json.dumps(body), status=status, headers=NO_STORE)
    if error == "invalid_client":
        response.headers["WWW-Authenticate"] = 'Basic realm="bednet", charset="UTF-8"'
    if retry_after is not None:
        response.headers["Retry-After"] = str(retry_after)
    return response


class Server(AuthorizationServer):  # type: ignore[misc] # Authlib has no types
    """Authlib's server, over a :class:`bednet.token_service.service.Service`."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self.service = service
        for grant in (_ClientCredentials, _DeviceCode):
            self.register_grant(grant)
        for endpoint in (_Introspection, _Revocation, _DeviceAuthorization):
            self.register_endpoint(endpoint)

    def authenticate_client(self, _request: object, methods: list[str], endpoint: str = "token") -> Client:
        """Find out which device it is, in the ways of :mod:`bednet.token_service.clients`."""
        mine = context()
        service = self.service
        proof = Proof(mine.form, mine.authorization, mine.certificate)
        try:
            return authenticate(
                service.config,
                service.database,
                proof,
                service.now(),
                public="none" in methods,
                people=service.config.introspectors if endpoint == "introspection" else (),
            )
        finally:
            mine.who = proof.claimed or mine.who

    def validate_requested_scope(self, scope: str | None, _state: object = None) -> None:
        """Refuse what is no scope of RFC 9431, before anything is done."""
        self.service.asked(scope)

    def generate_token(  # noqa: PLR0917 - as Authlib calls it
        self,
        grant_type: str,
        client: Client,
        user: object = None,
        scope: str | None = None,
        expires_in: int | None = None,
        include_refresh_token: bool = True,
    ) -> Json:
        """Issue a token, which is recorded when this returns. Approvers, times and refreshing are not the client's."""
        del user, expires_in, include_refresh_token
        mine = context()
        return self.service.issue(client, scope, mine.resources, grant_type, mine.request)

    def save_token(self, token: Json, request: object) -> None:
        """Do nothing: a token that was not recorded was not made."""

    def send_signal(self, name: str, *args: object, **kwargs: object) -> None:
        """Do nothing: nobody listens."""

    def handle_error_response(self, _request: object, error: OAuth2Error) -> Response:
        """Answer with a code and its sentence; the reason goes to the log."""
        code = error.error if error.error in DESCRIPTIONS else "invalid_request"
        # A device that waits for a human is no news.
        waits = code in ("authorization_pending", "slow_down") and not isinstance(error, Refusal)
        level = logging.DEBUG if waits else logging.WARNING
        refused(level, code, getattr(error, "reason", None) or code.replace("_", "-"))
        status = getattr(error, "status_code", 400)
        retry_after = getattr(error, "retry_after", None)
        return error_response(code, 401 if code == "invalid_client" else status, retry_after=retry_after)


def refused(level: int, code: str, reason: str) -> None:
    """Log a refusal."""
    mine = context()
    event(
        level,
        "refused",
        error=code,
        reason=reason,
        client=mine.who,
        address=mine.address,
        endpoint=g.get("endpoint"),
        request=mine.number,
    )


class _ClientCredentials(ClientCredentialsGrant):  # type: ignore[misc]
    """RFC 6749, 4.4."""

    TOKEN_ENDPOINT_AUTH_METHODS = METHODS


class _Credential:
    """A request of RFC 8628, as Authlib sees it."""

    def __init__(self, request: Request, now: int) -> None:
        self.request = request
        self._now = now

    def get_client_id(self) -> str:
        return self.request.device

    def get_scope(self) -> str | None:
        return self.request.scope

    def get_user_code(self) -> _Credential:
        # Authlib asks by it for the decision, which the request has.
        return self

    def is_expired(self) -> bool:
        return self._now >= self.request.exp


class _DeviceCode(DeviceCodeGrant):  # type: ignore[misc]
    """RFC 8628, 3.4 and 3.5."""

    TOKEN_ENDPOINT_AUTH_METHODS = ONBOARDING_METHODS

    def query_device_credential(self, device_code: str) -> _Credential:
        service: Service = self.server.service
        with service.database.reading() as connection:
            request = onboarding.of_device_code(connection, device_code)
        if request is None:
            raise Refusal("invalid_grant", "device-code-unknown")
        if request.device != context().who:
            raise Refusal("invalid_grant", "device-code-of-another")
        context().request = request
        return _Credential(request, service.now())

    def query_user_grant(self, credential: _Credential) -> tuple[str | None, bool] | None:
        request = credential.request
        return None if request.state == "pending" else (request.approver, request.state == "approved")

    def should_slow_down(self, credential: _Credential) -> bool:
        service: Service = self.server.service
        with service.database.writing() as connection:
            return onboarding.poll(connection, credential.request, service.now())


class _DeviceAuthorization(DeviceAuthorizationEndpoint):  # type: ignore[misc]
    """RFC 8628, 3.1 and 3.2."""

    CLIENT_AUTH_METHODS = ONBOARDING_METHODS
    EXPIRES_IN, INTERVAL = onboarding.EXPIRES_IN, onboarding.INTERVAL

    def generate_user_code(self) -> str:
        return onboarding.new_user_code()

    def generate_device_code(self) -> str:
        return onboarding.new_device_code()

    def get_verification_uri(self) -> str:
        return f"{self.server.service.config.issuer}/device"

    def save_device_credential(self, _client_id: str, scope: str | None, data: Json) -> None:
        mine, service = context(), self.server.service
        if mine.resources:
            service.audience(mine.resources)
        if scope is not None and len(scope) > onboarding.MOST_SCOPE:
            raise Refusal("invalid_scope", "scope-too-large")
        device = str(mine.who)
        with service.database.writing() as connection:
            opened = onboarding.open_request(
                connection,
                device_code=data["device_code"],
                user_code=data["user_code"],
                device=device,
                scope=scope,
                address=mine.address or "",
                now=service.now(),
            )
        if not opened:
            raise Refusal("slow_down", "too-many-requests", status=429)
        event(logging.INFO, "device-asks", client=device, address=mine.address, request=mine.number)


def _token_parameter() -> str:
    token = context().form.get("token")
    if not token:
        raise Refusal("invalid_request", "no-token")
    return token


class _Introspection(IntrospectionEndpoint):  # type: ignore[misc]
    """RFC 7662. A device may look at its own tokens; all of them only who is an introspector by configuration."""

    ENDPOINT_NAME = "introspection"
    CLIENT_AUTH_METHODS = METHODS

    def authenticate_token(self, _request: object, client: Client) -> Issued | None:
        service: Service = self.server.service
        issued = service.look(_token_parameter())
        if issued is None or client.id in (issued.device, *service.config.introspectors):
            return issued
        # RFC 7662, 2.2: who may not know gets the same answer as for no token.
        refused(logging.WARNING, "inactive", "not-your-token")
        return None

    def create_introspection_payload(self, token: Issued | None) -> Json:
        if token is None or not token.is_active(self.server.service.now()):
            return {"active": False}
        return {
            "active": True,
            "token_type": "PoP" if "jwk" in token.claims.get("cnf", {}) else "Bearer",
            **token.claims,
        }


class _Revocation(RevocationEndpoint):  # type: ignore[misc]
    """RFC 7009. A device may end its own tokens; the operator's tool ends all others."""

    ENDPOINT_NAME = "revocation"
    CLIENT_AUTH_METHODS = METHODS

    def authenticate_token(self, _request: object, client: Client) -> Issued | None:
        issued: Issued | None = self.server.service.look(_token_parameter())
        if issued is not None and issued.device != client.id:
            raise Refusal("invalid_grant", "not-your-token")
        # RFC 7009, 2.2: a token that is none is as good as revoked.
        return issued

    def revoke_token(self, token: Issued, _request: object) -> None:
        ended, cutoff = self.server.service.revoke(token)
        if ended:
            event(logging.INFO, "revoked", client=token.device, jti=token.claims["jti"], request=context().number)
        if cutoff is not None:
            event(logging.WARNING, "revoked-all", client=token.device, cutoff=cutoff, request=context().number)
