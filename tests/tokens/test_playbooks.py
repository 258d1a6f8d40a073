# SPDX-License-Identifier: Apache-2.0
"""Rotating the token service's keys, and revoking tokens, on the deployed site, by the playbooks.

The sharp edges: a key that signs before every gateway has it, an old key that goes while its tokens are out, a
revocation that waits for a timer or hits others, and a revoked device that goes on getting tokens.
"""

from __future__ import annotations

import json
import shutil
import threading
from typing import TYPE_CHECKING

import pytest

from bednet.client import TokenError, TokenSource
from bednet.probe import NOT_AUTHORIZED, Credentials, Listener, enter, request
from tests.live import Audit
from tests.tokens.conftest import Connected, claims

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from testbed.lab import Lab
    from tests.conftest import Plant
    from tests.tokens.conftest import Tokens

pytestmark = pytest.mark.lab

GATEWAYS = ("gateway-1", "gateway-2")
CONFIG = "/etc/bednet-token-service/config.json"


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
    audit = Audit(tokens.host)
    answer = enter(tokens.listener("edge-2"), tokens.credentials("edge-2", kept))
    assert answer.code == NOT_AUTHORIZED
    assert audit.line(event="refused", action="connect")["reason"] == "token-revoked"
    assert enter(tokens.listener("edge-2"), tokens.credentials("edge-2", source.get())).accepted


def test_what_cannot_be_meant_is_refused_and_nothing_is_revoked(lab: Lab) -> None:
    result = lab.play("revoke_token.yml", "-e", "device=edge-2", "-e", "jti=one", check=False)
    assert result.rc != 0
    assert "Say either -e jti=JTI" in result.failures[0]["message"]
    assert result.changed == 0
    result = lab.play("revoke_token.yml", "-e", "jti=never-issued", check=False)
    assert "knows no token with this jti" in result.failures[0]["message"]


# --- revoke.yml and reinstate.yml


@pytest.fixture
def introspector(tokens: Tokens) -> Iterator[Credentials]:
    """A device that may look at every token, for one test (`token_service_introspectors`)."""

    def restart(text: str) -> None:
        tokens.host.exec(["sh", "-c", 'cat > "$1"', "sh", CONFIG], input=text)
        tokens.host.exec(["systemctl", "restart", "bednet-token-service.service"])
        tokens.await_health()

    before = tokens.host.read_file(CONFIG).decode()
    restart(json.dumps(json.loads(before) | {"introspectors": ["edge-2"]}))
    try:
        secret = (tokens.plant.folder / "edge-2/client_secret").read_text(encoding="ascii").strip()
        yield Credentials(username="edge-2", password=secret)
    finally:
        restart(before)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_revoked_device_gets_no_token_and_is_reinstated_with_the_next(
    lab: Lab, plant: Plant, tokens: Tokens, introspector: Credentials, tmp_path: Path
) -> None:
    """docs/operations.md, "Revoke a device" and "Reinstate a device": at the token service as everywhere else."""
    where = Listener(tokens.host.address, 8443, plant.ca, "tokens.plant.example")

    def is_active(text: str, asking: Credentials = introspector, **form: str) -> object:
        answer = request(where, "POST", "/introspect", credentials=asking, form={"token": text, **form})
        assert answer.status == 200
        return answer.json()["active"]

    token = tokens.source("edge-1").get()
    assert is_active(token.text) is True
    shutil.copytree(plant.folder / "edge-1", tmp_path / "edge-1")
    with Connected(tokens, "edge-1") as own, Connected(tokens, "edge-3", "gateway-2") as other:
        try:
            result = lab.play("revoke.yml", "-e", "device=edge-1", "-e", "reason=privilegeWithdrawn")
            assert ("gateway-1", "token_service : Ensure the token service refuses it") in {
                (task["host"], task["task"]) for task in result.changed_tasks
            }
            own.until(lambda: own.lost, "the end of the session")
            # The helper asks for the next token, and gets none.
            assert tokens.refused("edge-1").error == "invalid_client"
            assert own.connections == 1
            assert is_active(token.text) is False
            for gateway in GATEWAYS:
                assert not enter(tokens.listener("edge-1", gateway), tokens.credentials("edge-1", token)).accepted
            assert other.lost == []
            # A second run finds nothing to do.
            again = lab.play("revoke.yml", "-e", "device=edge-1", "-e", "reason=privilegeWithdrawn")
            assert again.changed_tasks == []
        finally:
            lab.play("reinstate.yml", "-e", "device=edge-1")
            plant.fetch_bundles()
    # Not with what it had.
    with pytest.raises(TokenError, match="invalid_client"):
        TokenSource.of_bundle(tmp_path / "edge-1", address=tokens.host.address).get()
    fresh, own_certificate = tokens.source("edge-1").get(), plant.certificate("edge-1")
    # The roll-out has brought back a service without introspectors: each device its own.
    assert is_active(fresh.text, own_certificate, client_id="edge-1") is True
    assert is_active(token.text, own_certificate, client_id="edge-1") is False
    for gateway in GATEWAYS:
        assert enter(tokens.listener("edge-1", gateway), tokens.credentials("edge-1", fresh)).accepted
