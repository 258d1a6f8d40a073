# SPDX-License-Identifier: Apache-2.0
"""The WSGI application of the token service: paths, and what every request has to pass.

- :func:`make_app`: makes it.

Every request is looked at in the same order: where it came from and with which certificate, then its form, and only
then what it wants.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from bednet.token_service import log, openapi, page, peer
from bednet.token_service.clients import ASSERTION_ALGORITHMS, CLIENT_CREDENTIALS, DEVICE_CODE
from bednet.token_service.database import Database, Unavailable
from bednet.token_service.log import event
from bednet.token_service.oauth import METHODS, NO_STORE, Context, Server, context, error_response, refused
from bednet.token_service.refusal import DESCRIPTIONS, Refusal
from bednet.token_service.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bednet.token_service.config import Config

MOST_BYTES = 16_384
"""Of a request's body; a token and an assertion have 8192 each at the most."""

MOST_PARAMETERS = 20
RETRY_SECONDS = 5
PLAIN: dict[str, Any] = {"provide_automatic_options": False}
FORM = "application/x-www-form-urlencoded"
_FORM_PATHS = ("/token", "/introspect", "/revoke", "/device_authorization", "/device")
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "invalid_request"}
_PUBLIC = {"Cache-Control": "public, max-age=60", "X-Content-Type-Options": "nosniff"}


class _BehindProxy:
    """Tells the framework the public address: that of the configuration, whatever a client says."""

    def __init__(self, application: Callable[..., Iterable[bytes]], issuer: str) -> None:
        self._application = application
        self._host = urlsplit(issuer).netloc

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        environ["wsgi.url_scheme"] = "https"
        environ["HTTP_HOST"] = self._host
        return self._application(environ, start_response)


def make_app(config: Config, *, database: Database | None = None, now: Callable[[], int] | None = None) -> Flask:
    """Make the application.

    :param database: the configuration's when None.
    :param now: returns the time in unix seconds; the clock when None.
    :raises ConfigError: when the database of the configuration cannot be.
    """
    log.set_up(config.log_level)
    service = Service(config, database or Database.of(config), now or (lambda: int(time.time())))
    app = Flask("bednet.token_service", static_folder=None, template_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=MOST_BYTES)
    app.extensions["bednet"] = service
    app.wsgi_app = _BehindProxy(app.wsgi_app, config.issuer)  # type: ignore[method-assign]
    _add_guards(app, service)
    _add_errors(app)
    _add_oauth(app, service)
    _add_documents(app, service)
    return app


# ---------------------------------------------------------------------------------------------------------------------
# What every request has to pass
# ---------------------------------------------------------------------------------------------------------------------


def _add_guards(app: Flask, service: Service) -> None:
    @app.before_request
    def look() -> None:
        g.endpoint = request.path if request.url_rule is not None else None
        g.context = Context(None, peer.address_of(request.environ), secrets.token_hex(6))
        try:
            certificate = peer.certificate_of(request.environ)
        except peer.PeerRefused as exc:
            raise Refusal("invalid_client", exc.reason) from exc
        g.context = Context(certificate, context().address, context().number)
        if request.method == "POST" and request.path in _FORM_PATHS:
            _read_form()
            service.check()

    @app.after_request
    def number(response: Response) -> Response:
        if "context" in g:
            response.headers["X-Request-Id"] = context().number
        return response


def _read_form() -> None:
    """Read the parameters strictly (RFC 6749, 3.2, appendix B): in the body alone, in UTF-8, each once."""
    mine = context()
    if request.query_string:
        raise Refusal("invalid_request", "parameters-in-url")
    if request.mimetype != FORM:
        raise Refusal("invalid_request", "content-type")
    body = request.get_data(cache=True)
    try:
        pairs = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            encoding="utf-8",
            errors="strict",
            max_num_fields=MOST_PARAMETERS,
        )
    except ValueError:
        raise Refusal("invalid_request", "form-malformed") from None
    for name, value in pairs:
        # RFC 6749, 3.1: without a value it counts as left out.
        if not value:
            continue
        if "\0" in value or not name.isprintable():
            raise Refusal("invalid_request", "form-malformed")
        if name == "resource":
            mine.resources.append(value)
        elif name in mine.form:
            raise Refusal("invalid_request", "parameter-twice")
        else:
            mine.form[name] = value
    mine.authorization = request.headers.get("Authorization")


def _add_errors(app: Flask) -> None:
    @app.errorhandler(Refusal)
    def refuse(exc: Refusal) -> Response:
        refused(logging.WARNING, exc.error, exc.reason)
        if request.path == "/device":
            return page.error(DESCRIPTIONS[exc.error], exc.status_code)
        return error_response(exc.error, exc.status_code)

    @app.errorhandler(Unavailable)
    def wait(exc: Unavailable) -> Response:
        event(
            logging.ERROR,
            "unavailable",
            reason=exc.code,
            problem=str(exc),
            client=context().who,
            endpoint=g.get("endpoint"),
            request=context().number,
        )
        return error_response("temporarily_unavailable", 503, retry_after=RETRY_SECONDS)

    @app.errorhandler(HTTPException)
    def http(exc: HTTPException) -> Response:
        status = exc.code or 500
        code = _CODES.get(status, "invalid_request" if status < 500 else "server_error")  # noqa: PLR2004
        refused(logging.WARNING, code, f"http-{status}")
        response = error_response(code, status)
        for name, value in exc.get_headers():
            if name == "Allow":
                response.headers[name] = value
        return response

    @app.errorhandler(Exception)
    def broken(exc: Exception) -> Response:
        fields = {"endpoint": g.get("endpoint"), "request": context().number}
        log.logger.error("error", exc_info=exc, extra={"fields": fields})
        return error_response("server_error", 500)


# ---------------------------------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------------------------------


def _add_oauth(app: Flask, service: Service) -> None:
    server = Server(service)

    @app.post("/token", **PLAIN)
    def token() -> Response:
        if "grant_type" not in context().form:
            raise Refusal("invalid_request", "no-grant-type")
        return _answer(server.create_token_response())

    @app.post("/introspect", **PLAIN)
    def introspect() -> Response:
        return _answer(server.create_endpoint_response("introspection"))

    @app.post("/revoke", **PLAIN)
    def revoke() -> Response:
        return _answer(server.create_endpoint_response("revocation"))

    @app.post("/device_authorization", **PLAIN)
    def device_authorization() -> Response:
        return _answer(server.create_endpoint_response("device_authorization"))

    @app.get("/device", **PLAIN)
    def device_form() -> Response:
        service.check()
        return page.answer(service, None, request.args.get("user_code", ""), None)

    @app.post("/device", **PLAIN)
    def device() -> Response:
        return page.answer(service, context().form, "", request.headers.get("Origin"))


def _answer(response: Any) -> Response:
    made: Response = response
    return made


def _add_documents(app: Flask, service: Service) -> None:
    metadata = json.dumps(metadata_of(service.config))
    description = json.dumps(openapi.describe(service.config))

    @app.get("/.well-known/oauth-authorization-server", **PLAIN)
    def well_known() -> Response:
        return Response(metadata, mimetype="application/json", headers=_PUBLIC)

    @app.get("/openapi.json", **PLAIN)
    def openapi_json() -> Response:
        return Response(description, mimetype="application/json", headers=_PUBLIC)

    @app.get("/jwks.json", **PLAIN)
    def jwks() -> Response:
        return Response(json.dumps(service.jwks()), mimetype="application/jwk-set+json", headers=_PUBLIC)

    @app.get("/revocations", **PLAIN)
    def revocations() -> Response:
        headers = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
        return Response(service.revocations(), mimetype="application/jwt", headers=headers)

    @app.get("/healthz", **PLAIN)
    def healthz() -> Response:
        service.health()
        return Response('{"status": "ok"}', headers=NO_STORE)


def metadata_of(config: Config) -> dict[str, Any]:
    """Return the metadata of RFC 8414, 2."""
    issuer = config.issuer
    endpoint = {
        "auth_methods_supported": METHODS,
        "auth_signing_alg_values_supported": list(ASSERTION_ALGORITHMS),
    }
    metadata: dict[str, Any] = {
        "issuer": issuer,
        "token_endpoint": config.token_endpoint,
        "jwks_uri": f"{issuer}/jwks.json",
        "response_types_supported": [],
        "grant_types_supported": [CLIENT_CREDENTIALS, DEVICE_CODE],
        "introspection_endpoint": f"{issuer}/introspect",
        "revocation_endpoint": f"{issuer}/revoke",
        "device_authorization_endpoint": f"{issuer}/device_authorization",
        "tls_client_certificate_bound_access_tokens": True,
    }
    for name in ("token", "introspection", "revocation"):
        metadata |= {f"{name}_endpoint_{key}": value for key, value in endpoint.items()}
    return metadata
