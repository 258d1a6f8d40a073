# SPDX-License-Identifier: Apache-2.0
"""What happens when clock, database, disk or key are not as they should be: a clear error, and no token."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import sqlite3
import threading
import time
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from bednet.token_service import clock, database, keys, revocation
from bednet.token_service.database import Database, tokens
from tests.token_service.plant import START, certificate, claims_of, refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from werkzeug.test import TestResponse

    from tests.token_service.plant import Plant


def unavailable(plant: Plant, response: TestResponse, reason: str) -> None:
    """Make sure that the service says to come again, gives no token, and tells the operator why."""
    body = response.json or {}
    assert (response.status_code, body["error"], plant.reason()) == (503, "temporarily_unavailable", reason)
    assert set(body) == {"error", "error_description"}
    assert int(response.headers["Retry-After"]) > 0
    line = plant.lines()[-1]
    assert (line["event"], line["level"]) == ("unavailable", "error")
    assert line["problem"]


def recorded(plant: Plant) -> int:
    with plant.database.reading() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(tokens)).scalar() or 0)


# The clock


def test_clock_before_this_program_was_made_signs_nothing(plant: Plant) -> None:
    plant.clock.now = clock.BUILT - 1000
    plant.apply()
    plant.rotate(sign_after=0)
    for now, reason in ((0, "clock"), (clock.BUILT - 1, "clock")):
        plant.clock.now = now
        unavailable(plant, plant.token(), reason)
    plant.clock.now = clock.BUILT
    assert plant.token().status_code == 200


@pytest.mark.parametrize(("back", "status"), [(0, 200), (30, 200), (31, 503), (86_400, 503)])
def test_clock_that_jumped_back_behind_the_newest_token_signs_nothing(plant: Plant, back: int, status: int) -> None:
    plant.clock.now = START + 100_000
    assert plant.token("edge-2").status_code == 200
    plant.clock.now = START + 100_000 - back
    response = plant.token()
    assert response.status_code == status
    if status == 503:
        unavailable(plant, response, "clock")
        unavailable(plant, plant.get("/healthz"), "clock")
        assert recorded(plant) == 1
        # When the clock is right again, it goes on.
        plant.clock.now = START + 100_000
        assert plant.token().status_code == 200


@pytest.mark.parametrize(("ahead", "status"), [(29, 200), (30, 503)])
def test_cutoff_far_ahead_of_the_clock_stops_the_tokens_of_its_device(plant: Plant, ahead: int, status: int) -> None:
    with plant.database.writing() as connection:
        revocation.revoke_device(plant.database, connection, "edge-1", START + ahead)
    response = plant.token()
    assert response.status_code == status
    if status == 200:
        assert claims_of(response)["iat"] == START + ahead + 1
    else:
        unavailable(plant, response, "clock")
    assert plant.token("edge-2").status_code == 200


def test_token_that_would_begin_when_its_device_ends_is_not_issued(plant: Plant) -> None:
    plant.clock.now = START + 99
    with plant.database.writing() as connection:
        revocation.revoke_device(plant.database, connection, "ends-1", START + 99)
    unavailable(plant, plant.token("ends-1"), "clock")
    assert f"a cutoff at {START + 99} and its end at {START + 100}" in plant.lines()[-1]["problem"]
    assert recorded(plant) == 0


def test_revocation_list_is_not_signed_with_a_wrong_clock(plant: Plant) -> None:
    plant.token()
    plant.clock.now = START - 31
    unavailable(plant, plant.get("/revocations"), "clock")


def test_existing_tokens_can_be_looked_at_with_a_wrong_clock(plant: Plant) -> None:
    token = (plant.token().json or {})["access_token"]
    plant.clock.now = START - 1000
    form = {"client_id": "edge-1", "token": token}
    response = plant.post("/introspect", form, certificate=plant.certificate("edge-1"))
    assert (response.json or {})["active"] is True


def test_clock_that_was_ahead_is_forgiven_when_the_operator_says_so(plant: Plant) -> None:
    old = (plant.token().json or {})["access_token"]
    plant.clock.now = START + 10_000_000
    wrong = (plant.token().json or {})["access_token"]
    plant.rotate(sign_after=0)
    with plant.database.writing() as connection:
        revocation.revoke_device(plant.database, connection, "edge-2", plant.clock.now)
    plant.clock.now = START + 5
    unavailable(plant, plant.token(), "clock")
    with plant.database.writing() as connection:
        assert clock.forget_future(connection, plant.clock.now) == 3
        assert clock.forget_future(connection, plant.clock.now) == 0
    assert plant.token().status_code == 200
    assert plant.token("edge-2").status_code == 200
    for token, active in ((old, True), (wrong, False)):
        form = {"client_id": "edge-1", "token": token}
        answer = plant.post("/introspect", form, certificate=plant.certificate("edge-1"))
        assert (answer.json or {})["active"] is active


def test_clock_that_cannot_be_right_forgives_nothing(plant: Plant) -> None:
    plant.token()
    with plant.database.writing() as connection, pytest.raises(database.Unavailable, match="before this program"):
        clock.forget_future(connection, clock.BUILT - 1)
    assert plant.token().status_code == 200


# The key


def test_without_a_key_nothing_is_issued(make_plant: Callable[..., Plant]) -> None:
    plant = make_plant(rotate=False)
    unavailable(plant, plant.token(), "signing-key")
    unavailable(plant, plant.get("/healthz"), "signing-key")
    assert (plant.get("/jwks.json").json or {}) == {"keys": []}


def test_key_whose_file_is_gone_signs_nothing(plant: Plant) -> None:
    shutil.rmtree(plant.settings.keys_dir)
    unavailable(plant, plant.token(), "signing-key")


@pytest.mark.parametrize("content", ["", "x", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_key_that_is_broken_signs_nothing(plant: Plant, content: str) -> None:
    (path,) = plant.settings.keys_dir.iterdir()
    path.write_text(content)
    unavailable(plant, plant.token(), "signing-key")


def test_retired_key_signs_nothing_when_the_new_one_is_gone(plant: Plant) -> None:
    new = plant.rotate(sign_after=0, retire_after=0)["kid"]
    (plant.settings.keys_dir / f"{new}.pem").unlink()
    unavailable(plant, plant.token(), "signing-key")


def test_key_that_could_not_be_recorded_leaves_no_file(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys.Keys(plant.settings.keys_dir).own()

    def broken(*_arguments: object, **_more: object) -> None:
        raise database.Unavailable("database-full", "disk is full")

    monkeypatch.setattr("bednet.token_service.keys.json.dumps", broken)
    with pytest.raises(database.Unavailable, match="disk is full"):
        plant.rotate()
    assert keys.Keys(plant.settings.keys_dir).own() == before


# Many tokens


def fill(plant: Plant, number: int, *, device: str = "edge-2", exp: int = START + 900) -> None:
    """Record tokens as if they had been issued."""
    rows = [
        {"jti": f"{device}-{exp}-{count}", "device": device, "iat": START, "exp": exp, "revoked": None}
        for count in range(number)
    ]
    with plant.database.writing() as connection:
        connection.execute(tokens.insert(), rows)


def test_issuing_and_health_take_no_longer_beside_many_tokens(plant: Plant) -> None:
    def seconds() -> float:
        """Return the least of the program's own time, which others do not disturb."""
        took = []
        for _ in range(15):
            begun = time.process_time()
            assert plant.token().status_code == 200
            assert plant.get("/healthz").status_code == 200
            took.append(time.process_time() - begun)
        return min(took)

    before = seconds()
    for number in range(1000):
        fill(plant, 200, device=f"device-{number}")
    assert seconds() < 2 * before


def plan(plant: Plant, statement: str) -> str:
    explain = "EXPLAIN QUERY PLAN " if plant.database.is_sqlite else "EXPLAIN "
    with plant.database.reading() as connection:
        return "; ".join(str(row[-1]) for row in connection.execute(sa.text(explain + statement)))


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        ("SELECT max(iat) FROM tokens WHERE revoked IS NULL", "ix_tokens_live"),
        (
            "SELECT exp FROM tokens WHERE device = 'a' AND exp > 7 ORDER BY exp LIMIT 200",
            "ix_tokens_device (device=? AND exp>?)",
        ),
        ("SELECT jti FROM tokens WHERE revoked IS NOT NULL AND exp > 7", "ix_tokens_ended (exp>?)"),
    ],
)
def test_index_leads_to_the_few_rows_that_count(plant: Plant, statement: str, index: str) -> None:
    assert index in plan(plant, statement)


def test_device_has_at_most_two_hundred_tokens_that_are_not_over(plant: Plant) -> None:
    fill(plant, 100, device="edge-1", exp=START + 10)
    fill(plant, 99, device="edge-1", exp=START + 20)
    assert plant.token().status_code == 200
    for now, wait in ((START, 10), (START + 9, 1)):
        plant.clock.now = now
        response = plant.token()
        refused(plant, response, "temporarily_unavailable", "too-many-tokens", 429)
        assert response.headers["Retry-After"] == str(wait)
    assert recorded(plant) == 200
    assert plant.token("edge-2").status_code == 200
    plant.clock.now = START + 10
    assert plant.token().status_code == 200


def test_revoked_tokens_count_as_long_as_they_are_remembered(plant: Plant) -> None:
    fill(plant, 200, device="edge-1")
    with plant.database.writing() as connection:
        connection.execute(tokens.update().values(revoked=START))
    refused(plant, plant.token(), "temporarily_unavailable", "too-many-tokens", 429)


def test_device_whose_tokens_the_operator_has_ended_gets_new_ones_at_once(plant: Plant) -> None:
    """A thief took them; those that it gives back itself count, else there would be no limit."""
    assert plant.token("edge-2").status_code == 200
    fill(plant, 200, device="edge-1")
    refused(plant, plant.token(), "temporarily_unavailable", "too-many-tokens", 429)
    plant.clock.now = START + 5
    assert plant.token("edge-2").status_code == 200
    with plant.database.writing() as connection:
        assert revocation.revoke_device(plant.database, connection, "edge-1", START + 5)
    assert plant.token().status_code == 200
    with plant.database.reading() as connection:
        assert revocation.is_revoked(connection, "none", "edge-1", START)


# The database


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


def test_locked_database_is_told_and_passes(plant: Plant) -> None:
    with locked(plant.log.parent / "tokens.db"):
        unavailable(plant, plant.token(), "database-locked")
        unavailable(plant, plant.token_by_assertion(), "database-locked")
        # Reading goes on: keys, revocations, looking at tokens.
        assert plant.get("/jwks.json").status_code == 200
        assert plant.get("/revocations").status_code == 200
    assert plant.token().status_code == 200
    assert recorded(plant) == 1


def test_writer_within_the_process_is_waited_for_and_told(plant: Plant) -> None:
    begun, done = threading.Event(), threading.Event()

    def write() -> None:
        with plant.database.writing():
            begun.set()
            done.wait(20)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert begun.wait(20)
        unavailable(plant, plant.token(), "database-locked")
    finally:
        done.set()
        thread.join()
    assert plant.token().status_code == 200


def test_many_threads_get_tokens_at_once(make_plant: Callable[..., Plant]) -> None:
    plant = make_plant(wait=20)
    plant.certificate("edge-1")
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(plant.token().status_code)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (answers, recorded(plant)) == ([200] * 16, 16)


def test_replay_by_many_threads_at_once_gives_one_token(make_plant: Callable[..., Plant]) -> None:
    plant = make_plant(wait=20)
    assertion = plant.assertion()
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(plant.token_by_assertion(assertion).status_code))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200] + [401] * 7


def _limit(plant: Plant, pages: int) -> None:
    def prepare(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages}")

    plant.database.engine.dispose()
    sa.event.listen(plant.database.engine, "connect", prepare)


def test_full_disk_is_told_and_gives_no_token(plant: Plant) -> None:
    # SQLite says the same when it may grow no more as when the disk is full.
    _limit(plant, 1)
    answers = [plant.token_by_secret() for _ in range(200)]
    first = next(number for number, answer in enumerate(answers) if answer.status_code != 200)
    unavailable(plant, answers[first], "database-full")
    assert {answer.status_code for answer in answers[first:]} == {503}
    assert recorded(plant) == first


def test_database_that_may_only_be_read_is_told(plant: Plant) -> None:
    def prepare(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA query_only = ON")

    plant.database.engine.dispose()
    sa.event.listen(plant.database.engine, "connect", prepare)
    unavailable(plant, plant.token(), "database-read-only")


def test_missing_database_is_told(make_plant: Callable[..., Plant]) -> None:
    plant = make_plant(database="sqlite:////nonexistent/tokens.db", apply=False, rotate=False)
    unavailable(plant, plant.token(), "database-unreachable")
    unavailable(plant, plant.get("/healthz"), "database-unreachable")


def test_database_of_another_schema_is_refused(plant: Plant) -> None:
    with plant.database.writing() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    unavailable(plant, plant.token(), "database-schema")


def test_database_without_tables_is_told(make_plant: Callable[..., Plant], tmp_path: Path) -> None:
    plant = make_plant(database=f"sqlite:///{tmp_path}/empty.db", apply=False, rotate=False)
    unavailable(plant, plant.token(), "database-schema")


def test_token_that_cannot_be_committed_is_not_given(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    real = plant.database.engine.dialect.do_commit
    writes = 0

    def commit(connection: sqlite3.Connection) -> None:
        nonlocal writes
        if connection.in_transaction:
            writes += 1
            raise sqlite3.OperationalError("database or disk is full")
        real(connection)  # type: ignore[arg-type] # as SQLAlchemy calls it

    assert plant.token("edge-2").status_code == 200
    monkeypatch.setattr(plant.database.engine.dialect, "do_commit", commit)
    response = plant.token_by_secret()
    unavailable(plant, response, "database-full")
    monkeypatch.undo()
    assert (writes > 0, recorded(plant)) == (True, 1)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("database is locked", "database-locked"),
        ("canceling statement due to lock timeout", "database-locked"),
        ("database or disk is full", "database-full"),
        ("could not extend file: No space left on device", "database-full"),
        ("disk I/O error", "database-full"),
        ("could not extend file: Disk quota exceeded", "database-full"),
        ("attempt to write a readonly database", "database-read-only"),
        ("cannot execute INSERT in a read-only transaction", "database-read-only"),
        ("no such table: tokens", "database-schema"),
        ('relation "tokens" does not exist', "database-schema"),
        ("unable to open database file", "database-unreachable"),
        ("connection refused", "database-unreachable"),
        ("server closed the connection unexpectedly", "database-unreachable"),
        ("something new", "database-error"),
    ],
)
def test_operator_is_told_what_is_the_matter(text: str, code: str) -> None:
    assert database.unavailable(RuntimeError(text)).code == code


# The log


def test_no_secret_is_ever_logged(make_plant: Callable[..., Plant]) -> None:
    plant = make_plant(log_level="debug")
    mine = plant.token()
    token = (mine.json or {})["access_token"]
    header = base64.b64encode(b"meter-1:a-wrong-secret-of-the-meter").decode()
    plant.sent.extend((token, token.split(".")[2], header, "a-wrong-secret-of-the-meter"))
    plant.post("/token", {"grant_type": "client_credentials"}, authorization=f"Basic {header}")
    plant.token_by_secret()
    plant.token_by_assertion()
    plant.token_by_assertion(plant.assertion(aud="x"))
    plant.token_by_assertion("eyJhbGciOiJub25lIn0.eyJzdWIiOiJwdW1wLTEifQ.")
    for path in ("/introspect", "/revoke"):
        plant.post(path, {"client_id": "edge-1", "token": token}, certificate=plant.certificate("edge-1"))
        plant.post(path, {"client_id": "edge-2", "token": token}, certificate=certificate("edge-2"))
    text = plant.log.read_text()
    assert "eyJ" not in text
    assert "PRIVATE" not in text
    for file in plant.settings.keys_dir.iterdir():
        assert not [line for line in file.read_text().splitlines()[1:-1] if line in text]
    for line in text.splitlines():
        assert json.loads(line)["event"]


def test_line_breaks_cannot_forge_log_lines(plant: Plant) -> None:
    form = {"grant_type": "client_credentials", "client_id": 'x\n{"event": "issued"}'}
    plant.post("/token", form)
    plant.post("/device_authorization", form)
    assert {line["event"] for line in plant.lines()} == {"refused"}


def test_libraries_do_not_log_tokens_whatever_the_level(
    make_plant: Callable[..., Plant], caplog: pytest.LogCaptureFixture
) -> None:
    plant = make_plant(log_level="debug")
    with caplog.at_level("DEBUG"):
        token = (plant.token().json or {})["access_token"]
    assert token not in caplog.text
    assert plant.lines()[-1]["event"] == "issued"
    assert Database(plant.settings.database).engine.hide_parameters
