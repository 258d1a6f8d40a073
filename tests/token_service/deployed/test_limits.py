# SPDX-License-Identifier: Apache-2.0
"""What one address may ask of the service, with the limits that the role sets by itself.

The sharp edges: a limit that keeps others out too, an answer that a device cannot read, and clients that say half a
word and wait. Each test comes from an address of its own, so that none has used up what another needs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import selectors
import sqlite3
import ssl
import time
from typing import TYPE_CHECKING

import pytest

from bednet.token_service import jose
from tests.token_service.deployed.service import FORM, TIMEOUT_SECONDS, Answer, deploy, role_values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.token_service.deployed.service import Deployed

EDGE = "grant_type=client_credentials&client_id=edge-1"
RATE, BURST, CONNECTIONS = (
    int(role_values()[f"token_service_{name}"]) for name in ("requests_per_second", "burst", "connections")
)
SLOW_SECONDS = 10
"""After which the role's nginx gives up on a client that says nothing more."""


@pytest.fixture(scope="module")
def limited(nginx: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """The service with the role's own limits, for the tests of this file."""
    with deploy(tmp_path_factory.mktemp("limited"), limits={}) as found:
        yield found


def too_many(answer: Answer) -> None:
    """Make sure that a device is told in its own terms to come again in a second (RFC 6585, 4)."""
    assert (answer.status, answer.json["error"]) == (429, "temporarily_unavailable")
    assert "too many requests from your address" in answer.json["error_description"]
    assert (answer.headers["Retry-After"], answer.headers["Cache-Control"]) == ("1", "no-store")


def test_burst_beyond_the_limit_is_put_off_and_nobody_else_is(limited: Deployed) -> None:
    answers: list[Answer] = []
    with contextlib.closing(limited.connect(source="127.0.0.11")) as connection:
        begun = time.monotonic()
        while time.monotonic() < begun + TIMEOUT_SECONDS and len(answers) < 3 * BURST:
            connection.request("GET", "/.well-known/oauth-authorization-server")
            response = connection.getresponse()
            answers.append(Answer(response.status, response.headers, response.read()))
        taken = time.monotonic() - begun
    served = [answer.status for answer in answers].count(200)
    # As many at once as the role says, and its rate from then on.
    assert BURST <= served <= BURST + RATE * taken + 2
    refused = next(answer for answer in answers if answer.status != 200)
    too_many(refused)
    assert {answer.status for answer in answers} == {200, 429}
    # Who shows a certificate does not share in that, whatever strangers do behind the same address.
    files, other = limited.ca.issue("edge-1"), limited.ca.issue("edge-2")
    assert limited.post("/token", EDGE, files, source="127.0.0.11")[0] == 200
    assert served_before_429(limited, files, "127.0.0.11") > BURST / 2
    # Its limits are its own from wherever it comes, and another's are not touched.
    assert served_before_429(limited, files, "127.0.0.12") < BURST / 2
    assert limited.post("/token", EDGE.replace("edge-1", "edge-2"), other, source="127.0.0.11")[0] == 200


def served_before_429(limited: Deployed, files: tuple[str, str], source: str) -> int:
    """Ask with a certificate, on one connection, until a request is put off: before anybody looks whether it is one."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    with contextlib.closing(limited.connect(files, source)) as connection:
        for served in itertools.count():
            assert time.monotonic() < deadline, f"{served} requests are no limit"
            connection.request("POST", "/token", "grant_type=none", dict([FORM]))
            response = connection.getresponse()
            answer = Answer(response.status, response.headers, response.read())
            if answer.status == 429:
                too_many(answer)
                return served
    raise AssertionError("there is no end to it")


def test_connections_beyond_the_limit_are_put_off_and_end_and_nobody_else_notices(limited: Deployed) -> None:
    files = limited.ca.issue("edge-1")
    head = "POST /token HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
    said = f"{head}Content-Length: {len(EDGE)}\r\n\r\n{EDGE[:-1]}".encode()
    with contextlib.ExitStack() as open_ones:

        def say(what: bytes, source: str) -> ssl.SSLSocket:
            connection = limited.connect(source=source)
            open_ones.callback(connection.close)
            connection.connect()
            assert isinstance(connection.sock, ssl.SSLSocket)
            connection.sock.sendall(what)
            return connection.sock

        begun = time.monotonic()
        # All but the last letter of a body: more of them than the service has threads.
        waiting = [say(said, "127.0.0.21") for _ in range(CONNECTIONS)]
        # All but the last line of the headers.
        waiting += [say(said[: len(head)], "127.0.0.22") for _ in range(CONNECTIONS)]
        # So few requests, and so slowly, that it cannot be the limit of these that answers.
        for _ in range(BURST - CONNECTIONS - 1):
            answer = limited.send("GET", "/jwks.json", source="127.0.0.21")
            if answer.status != 200:
                break
            # nginx reads what was sent when it comes to it.
            time.sleep(2 / RATE)
        too_many(answer)
        # Meanwhile others are served, and at once, also from there: half a request never reaches the service.
        asked = time.monotonic()
        for source in ("127.0.0.21", "127.0.0.23"):
            assert limited.post("/token", EDGE, files, source=source)[0] == 200
        assert time.monotonic() - asked < SLOW_SECONDS / 2
        with selectors.DefaultSelector() as selector:
            for sock in waiting:
                selector.register(sock, selectors.EVENT_READ)
            while selector.get_map():
                events = selector.select(begun + 2 * SLOW_SECONDS - time.monotonic())
                assert events, f"{len(selector.get_map())} of {len(waiting)} slow clients still hold their connections"
                for key, _ in events:
                    assert isinstance(key.fileobj, ssl.SSLSocket)
                    # Nothing was done for them: at most they are told that they took too long.
                    told = key.fileobj.recv(64)
                    assert not told or b" 408 " in told, told
                    selector.unregister(key.fileobj)
        assert time.monotonic() - begun >= SLOW_SECONDS - 1
    assert limited.post("/token", EDGE, files, source="127.0.0.21")[0] == 200


@pytest.mark.parametrize(("size", "status", "reason"), [(16_384, 400, "scope-malformed"), (16_385, 413, None)])
def test_body_has_at_most_16_kib(limited: Deployed, size: int, status: int, reason: str | None) -> None:
    before = limited.lines()
    body = f"{EDGE}&scope=".ljust(size, "A")
    answer = limited.send("POST", "/token", body, limited.ca.issue("edge-1"), source="127.0.0.31")
    assert answer.status == status
    if reason is None:
        assert answer.json["error"] == "invalid_request"
        assert limited.lines() == before
    else:
        assert (answer.json["error"], limited.reason()) == ("invalid_scope", reason)


@pytest.mark.parametrize(("size", "number"), [(8_300, 1), (7_000, 5)])
def test_headers_have_at_most_8_kib_each_and_32_together(limited: Deployed, size: int, number: int) -> None:
    before = limited.lines()
    answer = limited.send("GET", "/jwks.json", headers=[("X-Long", "A" * size)] * number, source="127.0.0.32")
    assert (answer.status, answer.json["error"]) == (431, "invalid_request")
    assert limited.lines() == before


def test_long_list_is_kept_once_for_all_who_read_it_slowly(limited: Deployed) -> None:
    """Not in /run, where nginx would put what does not fit into its buffers, and not once for each reader."""
    now = int(time.time())
    rows = [(f"{number:022d}", f"other-{number}", now, now + 900, now) for number in range(60_000)]
    with contextlib.closing(sqlite3.connect(limited.folder / "tokens.db")) as database, database:
        database.executemany("INSERT INTO tokens (jti, device, iat, exp, revoked) VALUES (?, ?, ?, ?, ?)", rows)
    try:
        made: set[str | None] = set()
        with contextlib.ExitStack() as open_ones:
            readers = [limited.connect(source=f"127.0.0.{42 + number % 4}") for number in range(CONNECTIONS)]
            for connection in readers:
                open_ones.callback(connection.close)
                connection.request("GET", "/revocations")
            # All of them asked before there was one.
            for connection in readers:
                response = connection.getresponse()
                assert response.read(1000)
                made.add(response.headers["X-Request-Id"])
            whole = limited.send("GET", "/revocations", source="127.0.0.41")
            assert whole.status == 200
            assert len(whole.body) > 5_000_000
            # Those with the same number read the same copy; each second there may be a new one.
            assert len(made) < CONNECTIONS / 3
            asked = time.monotonic()
            assert limited.post("/token", EDGE, limited.ca.issue("edge-1"), source="127.0.0.47")[0] == 200
            assert time.monotonic() - asked < SLOW_SECONDS / 2
    finally:
        with contextlib.closing(sqlite3.connect(limited.folder / "tokens.db")) as database, database:
            database.execute("DELETE FROM tokens WHERE jti LIKE '00000000000000000%'")


def test_list_is_never_older_than_a_second(limited: Deployed) -> None:
    files = limited.ca.issue("edge-1")
    assert limited.send("GET", "/revocations", source="127.0.0.48").status == 200
    _, answer = limited.post("/token", EDGE, files, source="127.0.0.48")
    jti = jose.parse(answer["access_token"]).claims["jti"]
    limited.tool("revoke", "--jti", jti)
    begun = time.monotonic()
    while jti not in listed(limited):
        assert time.monotonic() - begun < 3, "the list does not come"


def listed(limited: Deployed) -> list[str]:
    """Return which tokens are in the list that gateways get."""
    payload = limited.send("GET", "/revocations", source="127.0.0.49").body.decode().split(".")[1]
    return [token["jti"] for token in json.loads(jose.decode(payload))["tokens"]]


def test_code_of_a_user_is_in_no_log_when_the_service_is_down(limited: Deployed) -> None:
    hidden = limited.folder / "app.sock.hidden"
    (limited.folder / "app.sock").rename(hidden)
    try:
        answer = limited.send("GET", "/device?user_code=BCDF-GHJK", source="127.0.0.50")
        assert (answer.status, answer.json["error"]) == (503, "temporarily_unavailable")
        assert limited.send("GET", "/jwks.json?asked", source="127.0.0.50").status == 503
    finally:
        hidden.rename(limited.folder / "app.sock")
    assert "/jwks.json?asked" in limited.log()
    assert "BCDF" not in limited.log()
