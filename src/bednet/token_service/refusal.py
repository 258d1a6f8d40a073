# SPDX-License-Identifier: Apache-2.0
"""Refusals: a code of RFC 6749 for the client, the reason for the log.

- :class:`Refusal`: what is raised.
- :data:`DESCRIPTIONS`: the one sentence that a client gets with each code; it tells nobody what was right.
"""

from __future__ import annotations

from authlib.oauth2 import OAuth2Error

DESCRIPTIONS = {
    "invalid_request": "The request is malformed, or has a parameter too many or too few.",
    "invalid_client": "The client could not be authenticated.",
    "invalid_grant": "The code is unknown or used, or the token is not yours.",
    "unauthorized_client": "This client may not do that.",
    "unsupported_grant_type": "The grant type is not supported.",
    "invalid_scope": "The scope is malformed or too large, or the policy allows nothing of it.",
    "invalid_target": "Tokens for this resource are not issued here.",
    "authorization_pending": "Nobody has decided yet.",
    "slow_down": "Polled too fast; wait five seconds longer from now on.",
    "access_denied": "The request was denied.",
    "expired_token": "The device code has expired; begin again.",
    "temporarily_unavailable": "The service cannot answer now; try again later.",
    "not_found": "There is nothing here.",
    "method_not_allowed": "This method is not used here.",
    "server_error": "Something went wrong; the operator's log says what.",
}


class Refusal(OAuth2Error):  # type: ignore[misc] # noqa: N818 - Authlib has no types; a refusal is an answer
    """A request is refused.

    :ivar error: for the client (RFC 6749, 5.2; RFC 8628, 3.5; RFC 8707, 2).
    :ivar reason: for the log, short and stable; docs/token-service.md lists them.
    :ivar retry_after: seconds after which it may be another answer, if that is known.
    """

    def __init__(self, error: str, reason: str, *, status: int | None = None, retry_after: int | None = None) -> None:
        super().__init__(status_code=status or (401 if error == "invalid_client" else 400))
        self.error = error
        self.reason = reason
        self.retry_after = retry_after
