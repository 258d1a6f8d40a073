# SPDX-License-Identifier: Apache-2.0
"""Several instances over one PostgreSQL: a real server, with a password, that stops and comes back.

The server is the one that ``pg_config`` or Debian's folders lead to. Without one these tests are skipped, and say so.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from bednet.token_service import keys, revocation, site
from bednet.token_service.database import SCHEMA, Database, devices, tokens
from bednet.token_service.migrations import upgrade
from tests.token_service.conftest import settings_of
from tests.token_service.plant import DEVICES, START, Clock, Plant, claims_of, compiled, header_of, refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cryptography.hazmat.primitives.asymmetric import ec
    from werkzeug.test import TestResponse

PASSWORD = "pässword with spaces @:/"  # noqa: S105 - of a server that lives as long as this file's tests


def _binaries() -> Path | None:
    """Find the server's programs."""
    candidates = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if program := shutil.which("pg_config"):
        found = subprocess.run([program, "--bindir"], check=True, capture_output=True, text=True).stdout.strip()
        candidates.insert(0, Path(found))
    return next(
        (folder for folder in candidates if (folder / "initdb").exists() and (folder / "postgres").exists()), None
    )


BINARIES = _binaries()
pytestmark = pytest.mark.skipif(BINARIES is None, reason="no PostgreSQL server here: install the package postgresql")


class Server:
    """A PostgreSQL server in a folder of its own, which nobody reaches but by its Unix socket."""

    def __init__(self, folder: Path) -> None:
        assert BINARIES is not None
        self._folder, self._binaries = folder, BINARIES
        self._user: int | None = None
        if os.geteuid() == 0:
            # PostgreSQL does not run as root.
            who = next((name for name in ("postgres", "nobody") if _exists(name)), "nobody")
            self._user = pwd.getpwnam(who).pw_uid
            os.chown(folder, self._user, -1)

    @property
    def url(self) -> str:
        """What goes into the configuration."""
        return f"postgresql://bednet@/bednet?host={self._folder}"

    def _run(self, *command: str, **more: Any) -> None:
        program = str(self._binaries / command[0])
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PGPASSWORD": PASSWORD}
        done = subprocess.run(
            [program, *command[1:]],
            check=False,
            capture_output=True,
            text=True,
            user=self._user,
            env=environment,
            cwd="/",
            **more,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def make(self) -> None:
        """Make the cluster and the database."""
        secret = self._folder / "password"
        secret.write_text(PASSWORD)
        if self._user is not None:
            os.chown(secret, self._user, -1)
        options = ["--auth=scram-sha-256", f"--pwfile={secret}", "--encoding=UTF8", "--no-sync", "--username=bednet"]
        self._run("initdb", "-D", str(self._folder / "data"), *options)
        self.start()
        self._run("createdb", "-h", str(self._folder), "-U", "bednet", "bednet")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-c listen_addresses= -c unix_socket_directories={self._folder} -c fsync=off"
        log = str(self._folder / "log")
        self._run("pg_ctl", "-D", str(self._folder / "data"), "-o", options, "-l", log, "-w", "-t", "60", "start")

    def stop(self) -> None:
        """Stop it, whoever is connected."""
        self._run("pg_ctl", "-D", str(self._folder / "data"), "-m", "immediate", "-w", "stop")


def _exists(name: str) -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwnam(name))
    return False


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server, for the tests of this file."""
    # Not pytest's folder, which only its owner may enter; and the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="bednet-pg-") as name:
        found = Server(Path(name))
        found.make()
        yield found
        found.stop()


@pytest.fixture
def plants(server: Server, tmp_path: Path, pump_key: ec.EllipticCurvePrivateKey) -> Iterator[list[Plant]]:
    """Two instances of the service over one database, each with keys of its own."""
    import logging  # noqa: PLC0415

    from bednet.token_service import log  # noqa: PLC0415

    (tmp_path / "password").write_text(PASSWORD + "\n")
    found, clock = [], Clock()
    handler = logging.FileHandler(tmp_path / "log")
    handler.setFormatter(log.JsonFormatter())
    log.logger.addHandler(handler)
    for number in (1, 2):
        folder = tmp_path / str(number)
        (folder / "keys").mkdir(mode=0o700, parents=True)
        settings = settings_of(folder, database=server.url, database_password_file=str(tmp_path / "password"))
        found.append(Plant(settings, Database.of(settings, wait=1), clock, pump_key, tmp_path / "log"))
    first = found[0].database
    with first.engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    assert upgrade(first) == (None, SCHEMA)
    assert upgrade(found[1].database) == (SCHEMA, SCHEMA)
    found[0].apply()
    for plant in found:
        plant.rotate()
    yield found
    log.logger.removeHandler(handler)
    handler.close()
    for plant in found:
        plant.database.close()
    assert PASSWORD not in (tmp_path / "log").read_text()


def test_each_instance_gives_tokens_that_the_other_knows(plants: list[Plant]) -> None:
    one, two = plants
    first, second = one.token(), two.token()
    assert header_of(first)["kid"] != header_of(second)["kid"]
    assert {header_of(first)["kid"], header_of(second)["kid"]} == {
        key["kid"] for key in (one.get("/jwks.json").json or {})["keys"]
    }
    form = {"client_id": "edge-1", "token": (first.json or {})["access_token"]}
    answer = two.post("/revoke", form, certificate=one.certificate("edge-1"))
    assert answer.status_code == 200
    answer = one.post("/introspect", form, certificate=one.certificate("edge-1"))
    assert answer.json == {"active": False}


def test_applying_on_the_second_instance_changes_nothing(plants: list[Plant]) -> None:
    assert plants[1].apply()["changed"] is False


def test_instances_that_are_deployed_at_once_take_turns(plants: list[Plant]) -> None:
    first = plants[0].database
    with first.engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    migrated: list[object] = []
    applied: list[bool] = []

    def deploy(plant: Plant) -> None:
        with contextlib.closing(Database.of(plant.settings, wait=20)) as database:
            migrated.append(upgrade(database)[0])
        applied.append(plant.apply()["changed"])

    threads = [threading.Thread(target=deploy, args=(plant,)) for plant in plants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(migrated, key=str) == [SCHEMA, None]
    assert sorted(applied) == [False, True]


def test_replay_at_the_other_instance_is_refused(plants: list[Plant]) -> None:
    one, two = plants
    assertion = one.assertion()
    assert one.token_by_assertion(assertion).status_code == 200
    refused(two, two.token_by_assertion(assertion), "invalid_client", "assertion-replayed", 401)


def test_replay_at_both_instances_at_once_gives_one_token(plants: list[Plant]) -> None:
    assertion = plants[0].assertion()
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda plant=plant: answers.append(plant.token_by_assertion(assertion).status_code))
        for plant in plants * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200] + [401] * 7


def test_device_request_at_one_instance_is_approved_at_the_other(plants: list[Plant]) -> None:
    from tests.token_service.test_device_authorization import ask, poll, submit  # noqa: PLC0415

    one, two = plants
    asked = ask(one)
    assert submit(two, "approve", asked["user_code"]).status_code == 200
    assert claims_of(poll(one, asked["device_code"]))["sub"] == "meter-1"


def test_device_code_at_both_instances_at_once_gives_one_token(plants: list[Plant]) -> None:
    from tests.token_service.test_device_authorization import ask, poll, submit  # noqa: PLC0415

    asked = ask(plants[0])
    submit(plants[0], "approve", asked["user_code"])
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda plant=plant: answers.append(poll(plant, asked["device_code"]).status_code))
        for plant in plants * 3
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200] + [400] * 5


def test_tokens_given_back_at_both_instances_at_once_make_one_cutoff(
    plants: list[Plant], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocation, "MOST_OWN", 2)
    certificate = plants[0].certificate("edge-1")
    given = [(plants[0].token().json or {})["access_token"] for _ in range(12)]
    answers: list[int] = []

    def give_back(plant: Plant, token: str) -> None:
        form = {"client_id": "edge-1", "token": token}
        answers.append(plant.post("/revoke", form, certificate=certificate).status_code)

    threads = [
        threading.Thread(target=give_back, args=(plants[number % 2], token)) for number, token in enumerate(given)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 12
    with plants[0].database.reading() as connection:
        assert revocation.listed(connection, START) == {"tokens": [], "cutoffs": {"edge-1": START}}
    assert [line["event"] for line in plants[0].lines()].count("revoked-all") == 1


def test_server_that_stops_is_told_and_that_comes_back_is_used(plants: list[Plant], server: Server) -> None:
    plant = plants[0]
    assert plant.token().status_code == 200
    server.stop()
    try:
        for _ in range(2):
            response = plant.token()
            assert (response.status_code, (response.json or {})["error"]) == (503, "temporarily_unavailable")
            assert plant.reason() == "database-unreachable"
    finally:
        server.start()
    assert plant.token().status_code == 200


def test_locked_table_is_told(plants: list[Plant]) -> None:
    one, two = plants
    with two.database.engine.connect() as connection, connection.begin():
        connection.execute(sa.text("LOCK TABLE tokens IN ACCESS EXCLUSIVE MODE"))
        response = one.token()
        assert (response.status_code, one.reason()) == (503, "database-locked")
    assert one.token().status_code == 200


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        # There is nothing to wait on: a lock of PostgreSQL's that somebody waits for.
        time.sleep(0.02)


def somebody_waits(plant: Plant) -> bool:
    with plant.database.reading() as connection:
        waiting = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        return bool(connection.execute(waiting).scalar())


def revoke(plant: Plant) -> None:
    with contextlib.closing(Database.of(plant.settings, wait=20)) as database, database.writing() as connection:
        revocation.revoke_device(database, connection, "edge-1", START, reason="superseded")


def apply_without(plant: Plant) -> None:
    lines = compiled([row for row in DEVICES if row["device"] != "edge-1"])
    with contextlib.closing(Database.of(plant.settings, wait=20)) as database:
        site.apply(database, site.read(lines, plant.secrets(), plant.settings), START)


def apply_revoked(plant: Plant) -> None:
    rows = [{**row, "revoked": "superseded"} if row["device"] == "edge-1" else row for row in DEVICES]
    with contextlib.closing(Database.of(plant.settings, wait=20)) as database:
        site.apply(database, site.read(compiled(rows), plant.secrets(), plant.settings), START)


@pytest.mark.parametrize("end", [revoke, apply_without, apply_revoked])
def test_token_that_is_being_issued_while_its_device_is_revoked_elsewhere_ends_too(
    plants: list[Plant], monkeypatch: pytest.MonkeyPatch, end: Callable[[Plant], None]
) -> None:
    one, two = plants
    one.clock.now = START + 5
    one.certificate("edge-1")
    signing, may_sign = threading.Event(), threading.Event()
    real = keys.Signer.sign

    def sign(*arguments: Any) -> str:
        signing.set()
        may_sign.wait(20)
        return real(*arguments)

    monkeypatch.setattr(keys.Signer, "sign", sign)
    answers: list[TestResponse] = []
    issuing = threading.Thread(target=lambda: answers.append(one.token()))
    ending = threading.Thread(target=lambda: end(two))
    issuing.start()
    assert signing.wait(20)
    ending.start()
    wait_until(lambda: not ending.is_alive() or somebody_waits(two))
    may_sign.set()
    for thread in (issuing, ending):
        thread.join()
    claims = claims_of(answers[0])
    with two.database.reading() as connection:
        assert revocation.is_revoked(connection, claims["jti"], "edge-1", claims["iat"])
        assert revocation.listed(connection, START + 5)["cutoffs"] == {"edge-1": START + 5}
    refused(one, one.token(), "invalid_client", "revoked" if end is not apply_without else "unknown-client", 401)


def test_revocation_waits_for_a_site_that_is_being_applied_and_is_not_undone_by_it(
    plants: list[Plant], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = plants
    judging, may_go = threading.Event(), threading.Event()
    real = site._serials

    def serials(*arguments: Any) -> Any:
        judging.set()
        may_go.wait(20)
        return real(*arguments)

    monkeypatch.setattr(site, "_serials", serials)
    # Something of the device changes, so that its row is written.
    lines = compiled([{**row, "values": ["hall-2"]} if row["device"] == "edge-1" else row for row in DEVICES])
    applying = threading.Thread(target=lambda: one.apply(lines))
    revoking = threading.Thread(target=lambda: revoke(two))
    applying.start()
    assert judging.wait(20)
    revoking.start()
    wait_until(lambda: not revoking.is_alive() or somebody_waits(two))
    may_go.set()
    for thread in (applying, revoking):
        thread.join()
    refused(one, one.token(), "invalid_client", "revoked", 401)


def test_device_that_a_site_changes_goes_on_getting_tokens_meanwhile(
    plants: list[Plant], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = plants
    one.certificate("edge-1")
    writing, may_go = threading.Event(), threading.Event()
    real = site._Marks.write

    def write(*arguments: Any) -> None:
        writing.set()
        may_go.wait(20)
        real(*arguments)

    monkeypatch.setattr(site._Marks, "write", write)
    lines = compiled([{**row, "values": ["hall-2"]} if row["device"] == "edge-1" else row for row in DEVICES])
    applying = threading.Thread(target=lambda: two.apply(lines))
    answers: list[TestResponse] = []
    issuing = threading.Thread(target=lambda: answers.append(one.token()))
    applying.start()
    assert writing.wait(20)
    issuing.start()
    wait_until(lambda: not issuing.is_alive() or somebody_waits(two))
    may_go.set()
    for thread in (applying, issuing):
        thread.join()
    assert answers[0].status_code == 200


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        ("SELECT max(iat) FROM tokens WHERE revoked IS NULL", "ix_tokens_live"),
        ("SELECT exp FROM tokens WHERE device = 'edge-1' AND exp > 7 ORDER BY exp LIMIT 200", "ix_tokens_device"),
        ("SELECT jti FROM tokens WHERE revoked IS NOT NULL AND exp > 7", "ix_tokens_ended"),
    ],
)
def test_index_leads_to_the_few_rows_that_count(plants: list[Plant], statement: str, index: str) -> None:
    rows = [
        {"jti": f"{count}", "device": f"device-{count % 100}", "iat": START, "exp": START + 900, "revoked": None}
        for count in range(5000)
    ]
    with plants[0].database.writing() as connection:
        connection.execute(tokens.insert(), rows)
        connection.execute(sa.text("ANALYZE tokens"))
        found = connection.execute(sa.text(f"EXPLAIN {statement}")).scalars().all()
    assert index in "; ".join(found)


def test_clock_of_one_instance_behind_the_other_is_noticed(plants: list[Plant]) -> None:
    one, two = plants
    one.clock.now = START + 100
    assert one.token().status_code == 200
    two.clock.now = START + 70
    assert two.token().status_code == 200
    two.clock.now = START + 69
    assert (two.token().status_code, two.reason()) == (503, "clock")


def test_purge_of_one_instance_leaves_the_keys_of_the_other(plants: list[Plant]) -> None:
    one, two = plants
    two.rotate(sign_after=0, retire_after=0)
    with one.database.writing() as connection:
        assert keys.purge(connection, keys.Keys(one.settings.keys_dir), START) == []
    with two.database.writing() as connection:
        assert len(keys.purge(connection, keys.Keys(two.settings.keys_dir), START)) == 1


def test_wrong_password_is_told_and_not_shown(plants: list[Plant], tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("a-wrong-password")
    settings = settings_of(
        tmp_path / "1", database=plants[0].settings.database, database_password_file=str(tmp_path / "wrong")
    )
    plant = Plant(settings, Database.of(settings, wait=1), Clock(), plants[0].pump_key, tmp_path / "log")
    assert plant.get("/healthz").status_code == 503
    assert "a-wrong-password" not in plant.log.read_text()


def test_everything_is_in_the_one_database(plants: list[Plant]) -> None:
    for plant in plants:
        plant.token()
        with plant.database.reading() as connection:
            assert connection.execute(sa.select(sa.func.count()).select_from(devices)).scalar() == 10
    with plants[0].database.reading() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(tokens)).scalar() == 2
