# SPDX-License-Identifier: Apache-2.0
"""RFC 8628 as people and devices go about it: over TLS, with the approver's own certificate, to a token.

What codes, times and forms do is in test_device_authorization.py. The sharp edge here: who an approver is comes from
nginx alone.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest

from bednet.token_service import jose
from tests.token_service.deployed.service import Authority
from tests.token_service.plant import pem

if TYPE_CHECKING:
    from pathlib import Path

    from tests.token_service.deployed.service import Answer, Deployed

GRANT = "urn:ietf:params:oauth:grant-type:device_code"


def ask(deployed: Deployed) -> dict[str, Any]:
    """Let meter-1 ask, which has nothing yet to prove itself with."""
    status, asked = deployed.post("/device_authorization", "client_id=meter-1")
    assert status == 200
    return asked


def poll(deployed: Deployed, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    form = {"grant_type": GRANT, "client_id": "meter-1", "device_code": asked["device_code"]}
    return deployed.post("/token", urlencode(form))


def browse(deployed: Deployed, asked: dict[str, Any], action: str, files: tuple[str, str]) -> Answer:
    """Open the page that the device shows, and do something on it."""
    assert asked["verification_uri_complete"].startswith(deployed.issuer)
    page = deployed.send("GET", asked["verification_uri_complete"].removeprefix(deployed.issuer), files=files)
    assert page.status == 200, page.body
    text = page.body.decode()
    assert asked["user_code"] in text
    found = re.search('name="csrf" value="([^"]+)"', text)
    assert found is not None
    form = {"csrf": found[1], "action": action, "user_code": asked["user_code"], "device": "meter-1"}
    return deployed.send("POST", "/device", urlencode(form), files, [("Origin", deployed.issuer)])


def test_device_is_approved_on_the_page_and_gets_its_token(deployed: Deployed) -> None:
    boss = deployed.ca.issue("boss")
    asked = ask(deployed)
    status, told = poll(deployed, asked)
    assert (status, told["error"]) == (400, "authorization_pending")
    looked = browse(deployed, asked, "look", boss)
    assert looked.status == 200
    # What the approver compares: the device, and the address that nginx saw.
    assert "<dd>meter-1</dd>" in looked.body.decode()
    assert "<dd>127.0.0.1</dd>" in looked.body.decode()
    assert "meter-1 was approved" in browse(deployed, asked, "approve", boss).body.decode()
    status, token = poll(deployed, asked)
    assert status == 200
    claims = jose.parse(token["access_token"]).claims
    assert (claims["sub"], claims["iss"]) == ("meter-1", deployed.issuer)
    assert deployed.lines()[-1] | {"event": "issued", "approver": "boss"} == deployed.lines()[-1]
    status, told = poll(deployed, asked)
    assert (status, told["error"], deployed.reason()) == (400, "invalid_grant", "device-code-unknown")


def test_device_that_is_denied_on_the_page_gets_none(deployed: Deployed) -> None:
    asked = ask(deployed)
    assert "meter-1 was denied" in browse(deployed, asked, "deny", deployed.ca.issue("boss")).body.decode()
    status, told = poll(deployed, asked)
    assert (status, told["error"]) == (400, "access_denied")


@pytest.mark.parametrize(
    ("who", "reason"),
    [("nobody", "no-certificate"), ("edge-2", "not-an-approver"), ("a forger", "no-certificate")],
)
def test_who_is_no_approver_sees_no_page_and_approves_nothing(deployed: Deployed, who: str, reason: str) -> None:
    files = deployed.ca.issue(who) if who == "edge-2" else None
    deployed.ca.issue("boss")
    forged = [("X-Bednet-Client-Verify", "SUCCESS"), ("X-Bednet-Client-Cert", pem(deployed.ca.made["boss"]))]
    headers = forged if who == "a forger" else []
    asked = ask(deployed)
    form = {"csrf": "1.x", "action": "approve", "user_code": asked["user_code"], "device": "meter-1"}
    for method, body in (("GET", ""), ("POST", urlencode(form))):
        answer = deployed.send(method, "/device", body, files, headers)
        assert (answer.status, deployed.reason()) == (403, reason)
        assert "csrf" not in answer.body.decode()
    assert poll(deployed, asked)[1]["error"] == "authorization_pending"
    deployed.tool("approve", asked["user_code"], "--device", "meter-1", "--deny")


def test_approver_of_another_ca_gets_no_further_than_nginx(deployed: Deployed, tmp_path: Path) -> None:
    answer = deployed.send("GET", "/device", files=Authority(tmp_path).issue("boss"))
    assert (answer.status, answer.json["error"]) == (401, "invalid_client")


def test_approval_by_the_tool_is_seen_by_the_running_service(deployed: Deployed) -> None:
    for words, status in (((), 200), (("--deny",), 400)):
        asked = ask(deployed)
        deployed.tool("approve", asked["user_code"], "--device", "meter-1", *words)
        assert poll(deployed, asked)[0] == status
