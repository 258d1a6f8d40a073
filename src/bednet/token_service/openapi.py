# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI 3.1 description of the token service.

- :func:`describe`: returns it; schemathesis holds the service against it (tests/token_service).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bednet.token_service.clients import ASSERTION_TYPE, CLIENT_CREDENTIALS, DEVICE_CODE

if TYPE_CHECKING:
    from bednet.token_service.config import Config

# A form has each name once, and no NUL (RFC 6749, appendix B).
_TEXT = {"type": "string", "minLength": 1, "pattern": "^[^\\u0000]*$"}
_MOST_PARAMETERS = 20
_AUTHENTICATION = {
    "client_id": {**_TEXT, "maxLength": 64, "description": "The device's id; needed with a client certificate."},
    "client_assertion_type": {"type": "string", "const": ASSERTION_TYPE},
    "client_assertion": {**_TEXT, "description": "A signed JWT (RFC 7523, 2.2), at most 8192 bytes."},
}
_ERRORS = {
    "400": "Refused; 'error' says why (RFC 6749, 5.2).",
    "401": "The client could not be authenticated, or its certificate is not of the site.",
    "403": "Not an approver.",
    "413": "The request is too large.",
    "429": "Too many requests from this address; or of a device too many requests or tokens are open; or wrong codes.",
    "431": "The headers are too large.",
    "503": "The service cannot answer now.",
}
# Of any request: nginx answers it when there are too many, they are too large, or the service is not there.
_EVERYWHERE = ("401", "429", "431", "503")
_WAIT = {"Retry-After": {"description": "Seconds (RFC 9110, 10.2.3).", "schema": {"type": "integer", "minimum": 1}}}
# RFC 7662, 2.2: of a token that is over nothing else is told.
_INACTIVE = {
    "type": "object",
    "required": ["active"],
    "properties": {"active": {"const": False}},
    "additionalProperties": False,
}
_TIME = {"type": "integer", "description": "Unix seconds."}
_ACTIVE = {
    "type": "object",
    "required": ["active", "token_type", "iss", "sub", "client_id", "aud", "iat", "exp", "jti", "scope"],
    "properties": {
        "active": {"const": True},
        "token_type": {"enum": ["Bearer", "PoP"]},
        **{name: {"type": "string"} for name in ("iss", "sub", "client_id", "jti", "scope")},
        "aud": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
        "iat": _TIME,
        "exp": _TIME,
        "cnf": {"type": "object", "description": "What it is bound to (RFC 8705, 3.1; RFC 7800)."},
    },
}
_HTML = {"text/html": {"schema": {"type": "string"}}}


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _answers(good: dict[str, Any], *codes: str, page: bool = False) -> dict[str, Any]:
    """Return what may be answered; on the page for people the service itself refuses in HTML, and nginx in JSON."""
    answers = {"200": good}
    for code in sorted({*codes, *_EVERYWHERE}):
        answers[code] = {"description": _ERRORS[code], "content": {**_json("Error"), **(_HTML if page else {})}}
        if code in ("429", "503"):
            answers[code]["headers"] = _WAIT
    return answers


def _form(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "maxProperties": _MOST_PARAMETERS,
        "propertyNames": {"pattern": "^[a-z_]+$"},
        # What it does not know it passes over (RFC 6749, 3.2).
        "additionalProperties": _TEXT,
    }
    return {"required": True, "content": {"application/x-www-form-urlencoded": {"schema": schema}}}


def _post(summary: str, form: dict[str, Any], schema: str | None, *codes: str) -> dict[str, Any]:
    good: dict[str, Any] = {"description": "Done."}
    good["content"] = _json(schema) if schema else {"application/json": {"schema": {"type": "object"}}}
    return {
        "post": {
            "summary": summary,
            "operationId": summary.split(" (", 1)[0].replace(" ", "-").lower(),
            "requestBody": form,
            "responses": _answers(good, "400", "413", *codes),
            "security": [{"certificate": []}, {"secret": []}, {}],
        }
    }


def _get(summary: str, media: str, schema: dict[str, Any]) -> dict[str, Any]:
    good = {"description": summary, "content": {media: {"schema": schema} if schema else {}}}
    return {
        "get": {
            "summary": summary,
            "operationId": summary.split(" (", 1)[0].replace(" ", "-").lower(),
            "responses": _answers(good),
            "security": [{}],
        }
    }


def _device_page() -> dict[str, Any]:
    form = {
        "csrf": {**_TEXT, "description": "From the form that the page showed to this approver, not long ago."},
        "action": {"type": "string", "enum": ["look", "approve", "deny"]},
        "user_code": {**_TEXT, "description": "The code that the device shows."},
        "device": {**_TEXT, "maxLength": 64, "description": "The device's id, to approve or deny it."},
    }
    page = {"description": "A form.", "content": _HTML}
    return {
        "get": {
            "summary": "The page for a human who approves a device (RFC 8628, 3.3)",
            "operationId": "device-page",
            "parameters": [{"name": "user_code", "in": "query", "required": False, "schema": {"type": "string"}}],
            "responses": _answers(page, "403", page=True),
            "security": [{"certificate": []}],
        },
        "post": {
            "summary": "What the human does on it (RFC 8628, 3.3)",
            "operationId": "decide",
            "requestBody": _form(form, "csrf", "action", "user_code"),
            "responses": _answers(page, "400", "403", "413", page=True),
            "security": [{"certificate": []}],
        },
    }


def describe(config: Config) -> dict[str, Any]:
    """Return the description of the service of a configuration."""
    token = {
        "grant_type": {"type": "string", "enum": [CLIENT_CREDENTIALS, DEVICE_CODE]},
        "scope": {**_TEXT, "description": "AIF-MQTT (RFC 9431, 3), base64url; left out: all that the policy allows."},
        "resource": {**_TEXT, "description": "One broker (RFC 8707); left out: every broker of the site."},
        "device_code": {**_TEXT, "description": "With the device code grant (RFC 8628, 3.4)."},
        **_AUTHENTICATION,
    }
    of_token = {"token": _TEXT, "token_type_hint": _TEXT, **_AUTHENTICATION}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "bednet token service",
            "version": "1",
            "description": "OAuth 2.0 for the devices of an MQTT site.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": config.issuer}],
        "paths": {
            "/token": _post("Get a token (RFC 6749, 3.2)", _form(token, "grant_type"), "Token"),
            "/introspect": _post("Look at a token (RFC 7662)", _form(of_token, "token"), "Introspection"),
            "/revoke": _post("End a token (RFC 7009)", _form(of_token, "token"), None),
            "/device_authorization": _post(
                "Ask to be let in (RFC 8628, 3.1)",
                _form({"scope": token["scope"], "resource": token["resource"], **_AUTHENTICATION}),
                "DeviceAuthorization",
            ),
            "/device": _device_page(),
            "/.well-known/oauth-authorization-server": _get(
                "Metadata (RFC 8414)", "application/json", {"type": "object", "required": ["issuer", "token_endpoint"]}
            ),
            "/jwks.json": _get(
                "Public keys (RFC 7517)", "application/jwk-set+json", {"type": "object", "required": ["keys"]}
            ),
            "/revocations": _get("Revoked tokens, signed", "application/jwt", {}),
            "/healthz": _get("Health", "application/json", {"type": "object", "required": ["status"]}),
            "/openapi.json": _get("This description", "application/json", {"type": "object", "required": ["openapi"]}),
        },
        "components": {
            "securitySchemes": {
                "certificate": {"type": "mutualTLS", "description": "RFC 8705"},
                "secret": {"type": "http", "scheme": "basic"},
            },
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["error", "error_description"],
                    "properties": {"error": {"type": "string"}, "error_description": {"type": "string"}},
                },
                "Token": {
                    "type": "object",
                    "required": ["access_token", "token_type", "expires_in", "scope"],
                    "properties": {
                        "access_token": {"type": "string"},
                        "token_type": {"enum": ["Bearer", "PoP"]},
                        "expires_in": {"type": "integer", "minimum": 1},
                        "scope": {"type": "string"},
                    },
                },
                "Introspection": {"oneOf": [_INACTIVE, _ACTIVE]},
                "DeviceAuthorization": {
                    "type": "object",
                    "required": ["device_code", "user_code", "verification_uri", "expires_in", "interval"],
                    "properties": {
                        "device_code": {"type": "string"},
                        "user_code": {"type": "string", "pattern": "^[B-Z]{4}-[B-Z]{4}$"},
                        "verification_uri": {"type": "string", "format": "uri"},
                        "verification_uri_complete": {"type": "string", "format": "uri"},
                        "expires_in": {"type": "integer"},
                        "interval": {"type": "integer"},
                    },
                },
            },
        },
    }
