# SPDX-License-Identifier: Apache-2.0
"""The page on which a human approves a device (RFC 8628, 3.3).

- :func:`answer`: one request of an approver, who is known by client certificate.

Two steps: the code that the device shows, then what is behind it, with the device's id to be typed in. So nobody
approves by one click what somebody else began (RFC 8628, 5.4). Each form proves that it was made for its approver.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from html import escape
from typing import TYPE_CHECKING

from flask import Response, render_template_string

from bednet.token_service import onboarding, scope
from bednet.token_service.clients import find_person
from bednet.token_service.log import event
from bednet.token_service.oauth import context
from bednet.token_service.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bednet.token_service.onboarding import Request
    from bednet.token_service.service import Service

FORM_SECONDS = 600
"""How long a form is good."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Let a device in</title></head><body><main>
<h1>Let a device in</h1>
{% if message %}<p role="alert"><strong>{{ message }}</strong></p>{% endif %}
{% if request %}
<p>Compare this with what you see in front of you. Approve only a device that you started yourself, just now.</p>
<dl><dt>Device</dt><dd>{{ request.device }}</dd><dt>Asked at</dt><dd>{{ asked_at }} (UTC)</dd>
<dt>From the address</dt><dd>{{ request.address or "unknown" }}</dd><dt>Wants</dt>
{% for line in wants %}<dd>{{ line }}</dd>{% endfor %}</dl>
<form method="post" action="/device"><input type="hidden" name="csrf" value="{{ csrf }}">
<input type="hidden" name="user_code" value="{{ user_code }}">
<p><label>Type the device's id: <input name="device" required maxlength="64" autocomplete="off"></label></p>
<p><button name="action" value="approve">Approve</button> <button name="action" value="deny">Deny</button></p></form>
{% elif not done %}
<form method="post" action="/device"><input type="hidden" name="csrf" value="{{ csrf }}">
<p><label>The code that the device shows:
<input name="user_code" value="{{ user_code }}" required maxlength="32" autocomplete="off"></label></p>
<p><button name="action" value="look">Continue</button></p></form>
{% endif %}
<p>You are {{ approver }}.</p>
</main></body></html>
"""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    # With no-referrer a browser sends "Origin: null" even with the page's own form.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_ACTIONS = ("look", "approve", "deny")


def _proof(service: Service, approver: str, until: int) -> str:
    text = f"{approver}\0{until}".encode()
    return f"{until}.{hmac.new(service.form_key(), text, hashlib.sha256).hexdigest()}"


def check_proof(service: Service, approver: str, proof: str, now: int) -> None:
    """Make sure that a form was made by this page, for this approver, not long ago.

    :raises Refusal: when it was not: somebody else's page has sent the approver's browser here.
    """
    until, _, _ = proof.partition(".")
    if not until.isascii() or not until.isdigit() or len(until) > 12:  # noqa: PLR2004 - far beyond any time
        raise Refusal("access_denied", "csrf", status=403)
    if not hmac.compare_digest(_proof(service, approver, int(until)).encode(), proof.encode(errors="replace")):
        raise Refusal("access_denied", "csrf", status=403)
    if not now < int(until) <= now + FORM_SECONDS:
        raise Refusal("access_denied", "form-expired", status=403)


def _wants(request: Request) -> list[str]:
    if request.scope is None:
        return ["all that the policy allows it"]
    words = {"pub": "publish to", "sub": "subscribe to"}
    return [f"{words[access]} {topic}" for access, topic in scope.parse(request.scope)]


def _render(service: Service, approver: str, status: int = 200, **values: object) -> Response:
    text = render_template_string(
        _PAGE,
        **{"message": "", "request": None, "done": False, "user_code": "", "asked_at": "", "wants": [], **values},
        approver=approver,
        csrf=_proof(service, approver, service.now() + FORM_SECONDS),
    )
    return Response(text, status=status, mimetype="text/html", headers=_HEADERS)


def error(message: str, status: int) -> Response:
    """Answer somebody who is let no further."""
    text = f"<!doctype html><html lang=en><title>Refused</title><h1>Refused</h1><p>{escape(message)}</p></html>"
    return Response(text, status=status, mimetype="text/html", headers=_HEADERS)


def answer(service: Service, form: Mapping[str, str] | None, shown_code: str, origin: str | None) -> Response:
    """Answer an approver.

    :param form: of a POST; None for a GET.
    :param shown_code: the code of the URL (RFC 8628, 3.3.1), which fills the first form.
    :param origin: the header ``Origin``, if there is one.
    :raises Refusal: when it is no approver, or the form is not ours.
    """
    now = service.now()
    approver = find_person(service.database, service.config.approvers, context().certificate, now)
    if form is None:
        return _render(service, approver, user_code=shown_code[:32])
    if origin is not None and origin != service.config.issuer:
        raise Refusal("access_denied", "csrf", status=403)
    check_proof(service, approver, form.get("csrf", ""), now)
    action, code = form.get("action"), form.get("user_code", "")
    if action not in _ACTIONS or not code:
        raise Refusal("invalid_request", "form")
    with service.database.writing() as connection:
        allowed = onboarding.may_look(connection, approver, now)
        request = onboarding.find(connection, code, now) if allowed else None
        if request is None or (action != "look" and form.get("device") != request.device):
            onboarding.note_failure(service.database, connection, approver, now)
        elif action != "look":
            onboarding.decide(connection, request, approved=action == "approve", approver=approver)
    if not allowed:
        event(logging.WARNING, "refused", reason="too-many-codes", client=approver, endpoint="device")
        return _render(service, approver, 429, message="Too many wrong codes. Wait ten minutes.", done=True)
    if request is None:
        event(logging.WARNING, "refused", reason="user-code-unknown", client=approver, endpoint="device")
        return _render(service, approver, 400, message="No open request has this code. Read it from the device again.")
    if action == "look":
        asked_at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(request.created))
        return _render(service, approver, request=request, user_code=code, asked_at=asked_at, wants=_wants(request))
    if form.get("device") != request.device:
        event(logging.WARNING, "refused", reason="device-mismatch", client=approver, endpoint="device")
        return _render(service, approver, 400, message="This is not the id of the device behind the code.")
    word = "approved" if action == "approve" else "denied"
    event(logging.INFO, f"device-{word}", client=request.device, approver=approver, address=request.address)
    return _render(service, approver, message=f"{request.device} was {word}.", done=True)
