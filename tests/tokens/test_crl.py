# SPDX-License-Identifier: Apache-2.0
"""The token service and certificates that the CA alone has revoked: it fetches the CRL, and believes only the CA."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from bednet.client import TokenError

if TYPE_CHECKING:
    from testbed.lab import Lab
    from tests.conftest import Plant
    from tests.tokens.conftest import Tokens

pytestmark = pytest.mark.lab

UNIT = "bednet-token-crl.service"
LIST = "/var/lib/private/bednet-token-crl/issuing.crl.pem"
FOLDER = f"/run/systemd/system/{UNIT}.d"
ENROL = ("--tags", "enrolment")


def fetch(tokens: Tokens, *, check: bool = True) -> int:
    return tokens.host.exec(["systemctl", "start", UNIT], check=check).rc


def refusals(tokens: Tokens) -> list[dict[str, str]]:
    journal = tokens.host.exec(["journalctl", "--unit=bednet-token-service", "--output=cat", "--lines=50"]).stdout
    lines = [json.loads(line) for line in journal.splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") == "refused"]


def test_what_the_fetcher_hands_on_is_believed_for_the_ca_s_signature_alone(tokens: Tokens) -> None:
    fetch(tokens)
    known = tokens.tool("status")["crl_number"]
    assert known > 0
    tokens.host.exec(["mkdir", "-p", FOLDER])
    try:
        # A link there is not even opened.
        for taken, why in (
            ("cp /etc/hostname", "it is not a certificate revocation list"),
            ("ln -sf /etc/shadow", "control process exited, code=exited, status=1/FAILURE"),
        ):
            since = tokens.host.exec(["date", "+%s.%N"]).stdout.strip()
            exec_start = f"ExecStart=/bin/{taken} ${{STATE_DIRECTORY}}/issuing.crl.pem"
            tokens.host.write_file(f"{FOLDER}/taken.conf", f"[Service]\nExecStart=\n{exec_start}\n")
            tokens.host.exec(["systemctl", "daemon-reload"])
            assert fetch(tokens, check=False) != 0
            told = ["journalctl", f"--unit={UNIT}", f"--since=@{since}", "--output=cat"]
            journal = tokens.host.exec(told).stdout
            assert why.lower() in journal.lower()
            assert tokens.host.exec(["test", "-L", LIST], check=False).rc == (0 if "ln" in taken else 1)
            assert "root:" not in journal
            assert tokens.tool("status")["crl_number"] == known
    finally:
        tokens.host.exec(["sh", "-c", f"rm -r {FOLDER}; systemctl daemon-reload; systemctl reset-failed {UNIT}"])
        tokens.host.exec(["rm", "-f", LIST])
    assert tokens.source("edge-2").get()
    fetch(tokens)
    assert tokens.tool("status")["crl_number"] == known


@pytest.mark.full
@pytest.mark.parametrize("device", ["edge-1", "edge-3"])
def test_certificate_that_the_ca_alone_has_revoked_gets_no_tokens_once_the_list_is_fetched(
    lab: Lab, plant: Plant, tokens: Tokens, device: str
) -> None:
    """edge-3 signs: it is the key of that certificate that opens nothing any more, with the certificate or without."""
    assert tokens.source(device).get()
    wish = json.dumps({"id": device, "reason": "keyCompromise"})
    try:
        revoked = json.loads(lab.hosts["authority"].exec(["bednet-ca", "revoke"], input=wish).stdout)
        assert {entry["id"] for entry in revoked["revoked"]} == {device}
        fetch(tokens)
        how = [{}] if device == "edge-1" else [{}, {"certificate": None}]
        for more in how:
            with pytest.raises(TokenError) as caught:
                tokens.source(device, **more).get()
            assert caught.value.error == "invalid_client"
            last = refusals(tokens)[-1]
            assert (last["client"], last["reason"]) == (device, "certificate-revoked")
        assert tokens.source("edge-2").get()
    finally:
        # It is listed as before, so it gets new ones.
        lab.play("site.yml", *ENROL)
        plant.fetch_bundles()
    assert tokens.source(device).get()
