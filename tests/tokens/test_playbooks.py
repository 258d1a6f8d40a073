# SPDX-License-Identifier: Apache-2.0
"""Rotating the token service's keys, and revoking tokens, on the deployed site, by the playbooks.

The sharp edges: a key that signs before every gateway has it, an old key that goes while its tokens are out, and a
revocation that waits for a timer or hits others.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from bednet.probe import NOT_AUTHORIZED, enter
from tests.live import Audit
from tests.tokens.conftest import Connected, claims

if TYPE_CHECKING:
    from testbed.lab import Lab
    from tests.tokens.conftest import Tokens

pytestmark = pytest.mark.lab

GATEWAYS = ("gateway-1", "gateway-2")


def _kid(tokens: Tokens) -> str:
    return str(tokens.tool("status")["signs_with"])


@pytest.mark.full
def test_keys_are_rotated_and_no_connection_fails(lab: Lab, tokens: Tokens) -> None:
    """All the while a device gets a token, goes to a gateway with it, and the next token to the other."""
    before, old = _kid(tokens), tokens.source("edge-2").get()
    answers, stop = [], threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            for gateway in GATEWAYS:
                shown = tokens.credentials("edge-2", tokens.source("edge-2").get())
                answers.append(enter(tokens.listener("edge-2", gateway), shown))

    with Connected(tokens, "edge-1") as first, Connected(tokens, "edge-3", "gateway-2") as second:
        thread = threading.Thread(target=come_and_go)
        thread.start()
        try:
            result = lab.play("rotate_token_keys.yml")
        finally:
            stop.set()
            thread.join()
        assert "every gateway has it" in " ".join(result.stdout.split())
        for device in (first, second):
            device.client.renew()
            device.await_renewals(1)
            assert device.lost == []
    assert len(answers) > 4
    assert [answer for answer in answers if not answer.accepted] == []
    after = _kid(tokens)
    assert after != before
    assert {key["kid"] for key in tokens.tool("keys")["keys"]} >= {before, after}
    # A token of the old key is good as long as it says.
    for gateway in GATEWAYS:
        assert enter(tokens.listener("edge-2", gateway), tokens.credentials("edge-2", old)).accepted


def test_a_revoked_token_is_gone_at_once_and_everywhere_and_no_other(lab: Lab, tokens: Tokens) -> None:
    source = tokens.source("edge-2")
    leaked, kept = source.get(), source.get()
    with Connected(tokens, "edge-1") as other, Connected(tokens, "edge-2", "gateway-2") as own:
        # The session's own token is another one, and stays.
        result = lab.play("revoke_token.yml", "-e", f"jti={claims(leaked)['jti']}")
        assert "Refused by gateway-1, gateway-2." in result.stdout
        for gateway in GATEWAYS:
            audit = Audit(lab.hosts[gateway])
            answer = enter(tokens.listener("edge-2", gateway), tokens.credentials("edge-2", leaked))
            assert answer.code == NOT_AUTHORIZED
            assert audit.line(event="refused", action="connect")["reason"] == "token-revoked"
        assert (own.lost, other.lost) == ([], [])

        lab.play("revoke_token.yml", "-e", "device=edge-2")
        own.until(lambda: own.lost, "the end of the session")
        # The helper comes back with a new token; those from before are refused.
        own.until(lambda: own.connections > 1, "a new session")
        assert other.lost == []
    answer = enter(tokens.listener("edge-2"), tokens.credentials("edge-2", kept))
    assert answer.code == NOT_AUTHORIZED
    assert enter(tokens.listener("edge-2"), tokens.credentials("edge-2", source.get())).accepted


def test_what_cannot_be_meant_is_refused_and_nothing_is_revoked(lab: Lab) -> None:
    result = lab.play("revoke_token.yml", "-e", "device=edge-2", "-e", "jti=one", check=False)
    assert result.rc != 0
    assert "Say either -e jti=JTI" in result.failures[0]["message"]
    assert result.changed == 0
    result = lab.play("revoke_token.yml", "-e", "jti=never-issued", check=False)
    assert "knows no token with this jti" in result.failures[0]["message"]
