# SPDX-License-Identifier: Apache-2.0
"""The clock of a running service: set back, set far ahead, and right again. libfaketime shows it another time.

nginx and the tool have the right time all along, as an operator who looks at the host has.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bednet.token_service import jose
from tests.token_service.deployed.service import DEADLINE_SECONDS, deploy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.token_service.deployed.service import Deployed

EDGE = "grant_type=client_credentials&client_id=edge-1"
LIBRARY = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)


class Host:
    """A deployed service, and the clock that it sees."""

    def __init__(self, deployed: Deployed, file: Path) -> None:
        self.deployed, self._file = deployed, file
        self.files = deployed.ca.issue("edge-1")

    def set(self, offset: str) -> None:
        """Set the service's clock, as in ``+10d`` or ``-1h``."""
        self._file.write_text(offset)

    def ask(self) -> tuple[int, dict[str, Any]]:
        """Ask for a token."""
        return self.deployed.post("/token", EDGE, self.files)

    def until(self, status: int) -> dict[str, Any]:
        """Ask until the answer has a status: until the service has seen its clock."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (answer := self.ask())[0] != status:
            assert time.monotonic() < deadline, self.deployed.log()
        return answer[1]

    def is_active(self, token: str) -> bool:
        """Ask the service whether a token is good."""
        status, told = self.deployed.post("/introspect", f"client_id=edge-1&token={token}", self.files)
        assert status == 200, told
        return bool(told["active"])


@pytest.fixture(scope="module")
def host(nginx: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A service whose clock is right until a test sets it, and right again after each, for this file."""
    if LIBRARY is None:
        pytest.skip("no libfaketime here: install it")
    folder = tmp_path_factory.mktemp("clock")
    file = tmp_path_factory.mktemp("offset") / "offset"
    file.write_text("+0")
    environment = {
        "LD_PRELOAD": str(LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with deploy(folder, environment=environment) as deployed:
        yield Host(deployed, file)


def test_clock_that_is_set_back_stops_new_tokens_until_it_is_right(host: Host) -> None:
    token = host.until(200)["access_token"]
    host.set("-1h")
    told = host.until(503)
    assert told["error"] == "temporarily_unavailable"
    line = host.deployed.lines()[-1]
    assert (line["event"], line["reason"], line["client"]) == ("unavailable", "clock", "edge-1")
    assert "the newest token was issued at" in line["problem"]
    # What was issued before goes on: it can be looked at, and the keys that it is verified with are there.
    assert host.is_active(token)
    assert host.deployed.send("GET", "/jwks.json").status == 200
    assert host.deployed.send("GET", "/healthz").status == 503
    host.set("+0")
    assert host.is_active(host.until(200)["access_token"])


def test_clock_that_was_far_ahead_is_forgiven_by_the_operator(host: Host) -> None:
    before = host.until(200)["access_token"]
    host.set("+10d")
    deadline = time.monotonic() + DEADLINE_SECONDS
    while jose.parse(wrong := host.until(200)["access_token"]).claims["iat"] < time.time() + 86_400:
        assert time.monotonic() < deadline
    host.set("+0")
    host.until(503)
    assert host.deployed.reason() == "clock"
    # The tool has seen the right time all along: it says what is the matter, and nothing is forgiven by itself.
    (problem,) = host.deployed.tool("status", status=1)["problems"]
    assert "purge --future" in problem
    assert "clock" in host.deployed.tool("purge", status=1)["stderr"]
    assert host.ask()[0] == 503
    told = host.deployed.tool("purge", "--future")
    assert (told["changed"], told["undone"] >= 1) == (True, True)
    assert host.ask()[0] == 200
    assert (host.is_active(before), host.is_active(wrong)) == (True, False)
