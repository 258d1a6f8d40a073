# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI 3.1 description of the token service.

- :func:`describe`: returns it; schemathesis holds the service against it (tests/token_service).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bednet.token_service.clients import ASSERTION_TYPE, CLIENT_CREDENTIALS, DEVICE_CODE

if TYPE_CHECKING:
    from bednet.token_service.config import Config

_TEXT = {"type": "string", "minLength": 1}
_AUTHENTICATION = {
    "client_id": {**_TEXT, "maxLength": 64, "description": "The device's id; needed with a client certificate."},
    "client_assertion_type": {"type": "string", "const": ASSERTION_TYPE},
    "client_assertion": {**_TEXT, "description": "A signed JWT (RFC 7523, 2.2), at most 8192 bytes."},
}
_ERRORS = {
    "400": "Refused; 'error' says why (RFC 6749, 5.2).",
    "401": "The client could not be authenticated.",
    "413": "The request is too large.",
    "429": "Too many requests are open.",
    "503": "The service cannot answer now.",
}


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _answers(good: dict[str, Any], *codes: str) -> dict[str, Any]:
    bad = {code: {"description": _ERRORS[code], "content": _json("Error")} for code in codes}
    return {"200": good, **bad}


def _form(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {"required": True, "content": {"application/x-www-form-urlencoded": {"schema": schema}}}


def _post(summary: str, form: dict[str, Any], schema: str | None, *codes: str) -> dict[str, Any]:
    good: dict[str, Any] = {"description": "Done."}
    good["content"] = _json(schema) if schema else {"application/json": {"schema": {"type": "object"}}}
    return {
        "post": {
            "summary": summary,
            "operationId": summary.split(" (", 1)[0].replace(" ", "-").lower(),
            "requestBody": form,
            "responses": _answers(good, "400", "401", "413", "503", *codes),
            "security": [{"certificate": []}, {"secret": []}, {}],
        }
    }


def _get(summary: str, media: str, schema: dict[str, Any]) -> dict[str, Any]:
    good = {"description": summary, "content": {media: {"schema": schema} if schema else {}}}
    return {
        "get": {
            "summary": summary,
            "operationId": summary.split(" (", 1)[0].replace(" ", "-").lower(),
            "responses": _answers(good, "401", "503"),
            "security": [{}],
        }
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
    html = {"text/html": {"schema": {"type": "string"}}}
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
                "429",
            ),
            "/device": {
                "get": {
                    "summary": "The page for a human who approves a device (RFC 8628, 3.3)",
                    "operationId": "device-page",
                    "parameters": [
                        {"name": "user_code", "in": "query", "required": False, "schema": {"type": "string"}}
                    ],
                    "responses": {
                        "200": {"description": "A form.", "content": html},
                        "401": {"description": _ERRORS["401"], "content": html},
                        "403": {"description": "Not an approver.", "content": html},
                        "503": {"description": _ERRORS["503"], "content": _json("Error")},
                    },
                    "security": [{"certificate": []}],
                }
            },
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
                "Introspection": {
                    "type": "object",
                    "required": ["active"],
                    "properties": {"active": {"type": "boolean"}},
                },
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
