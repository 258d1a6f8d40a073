# SPDX-License-Identifier: Apache-2.0
"""The operator's tool, its answers and exit codes; and the configuration that it and the service read."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from bednet.token_service import config, tool
from bednet.token_service.app import make_app
from bednet.token_service.database import SCHEMA, Database, devices
from bednet.token_service.migrations import upgrade
from tests.token_service.plant import GATEWAY, ISSUER, SITE_AUDIENCE, UNIX, claims_of, compiled, secret_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flask.testing import FlaskClient

NO_SECRETS: dict[str, Any] = {"client_secrets": {}, "certificates": {}, "revoked_serials": {}}
SECONDS = 1_800_000_000


class Run:
    """Runs the tool as a playbook does."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **changes: object
    ) -> None:
        self.folder, self._patch, self._capsys = folder, monkeypatch, capsys
        self.keys = folder / "keys"
        self.keys.mkdir()
        self.now = SECONDS
        self.settings = {
            "issuer": ISSUER,
            "audiences": [SITE_AUDIENCE],
            "database": f"sqlite:///{folder}/tokens.db",
            "keys_dir": str(self.keys),
            **changes,
        }
        (folder / "config.json").write_text(json.dumps(self.settings))
        monkeypatch.setattr("bednet.token_service.tool.time.time", lambda: self.now + 0.5)

    def __call__(self, *arguments: str, stdin: str = "", status: int = 0) -> Any:
        self._patch.setattr("sys.stdin", io.StringIO(stdin))
        code = tool.main(["--config", str(self.folder / "config.json"), *arguments])
        out, err = self._capsys.readouterr()
        assert code == status, err
        return json.loads(out) if not code or out else err

    def apply(self, lines: list[str] | None = None, secrets: Any = None, **more: Any) -> Any:
        path = self.folder / "compiled"
        path.write_text("".join(lines or compiled()))
        return self("apply", str(path), stdin=json.dumps(NO_SECRETS if secrets is None else secrets), **more)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The tool on a host with nothing on it but a configuration."""
    return Run(tmp_path, monkeypatch, capsys)


@pytest.fixture
def deployed(run: Run) -> Run:
    """The tool on a host that was deployed."""
    run("migrate")
    run.apply()
    run("rotate", "--if-none")
    return run


def test_deployment_changes_everything_once(run: Run) -> None:
    steps: list[Callable[[], Any]] = [lambda: run("migrate"), run.apply, lambda: run("rotate", "--if-none")]
    assert [step()["changed"] for step in steps] == [True, True, True]
    assert [step()["changed"] for step in steps] == [False, False, False]
    answer = run("status")
    assert answer["problems"] == []
    assert [answer["signs_with"]] == answer["published_keys"]


def test_dry_run_changes_nothing(run: Run) -> None:
    run("migrate")
    path = run.folder / "compiled"
    path.write_text("".join(compiled()))
    for _ in range(2):
        assert run("apply", str(path), "--check", stdin=json.dumps(NO_SECRETS))["added"] == 8


def test_before_the_migration_every_command_says_what_is_missing(run: Run) -> None:
    path = run.folder / "compiled"
    path.write_text("".join(compiled()))
    assert "no such table" in run("apply", str(path), stdin=json.dumps(NO_SECRETS), status=1)
    for command in (["rotate"], ["keys"], ["activate"], ["purge"], ["revoke", "--device", "edge-1"]):
        assert "no such table" in run(*command, status=1)
    assert run("status", status=1)["problems"]


def test_list_of_the_ca_is_taken_over(deployed: Run) -> None:
    told = {"crl_number": 3, "revoked_serials": {"AB": "superseded"}}
    first, second = (deployed("crl", stdin=json.dumps(told)) for _ in range(2))
    assert first == {"changed": True, "revoked_serials": 1, "older_crl": False, "crl_number": 3}
    assert second == {"changed": False, "revoked_serials": 0, "older_crl": False, "crl_number": 3}
    assert deployed("status")["crl_number"] == 3


def test_list_of_the_ca_that_did_not_come_is_refused(deployed: Run) -> None:
    """The unit hands on nothing at all where what was fetched is not the CA's."""
    assert "stdin is not JSON" in deployed("crl", stdin="", status=1)
    assert "not crl_number and revoked_serials" in deployed("crl", stdin="{}", status=1)
    assert deployed("status")["crl_number"] is None


def test_database_of_an_older_schema_is_brought_to_the_newest_and_loses_nothing_else(run: Run) -> None:
    database = Database(f"sqlite:///{run.folder}/tokens.db")
    upgrade(database, "0001")
    row = {"id": "pump-1", "profile": "p", "placeholders": "[]", "certificate": False, "public_key": "PEM", "until": 5}
    with database.writing() as connection:
        connection.execute(sa.text(f"INSERT INTO devices ({', '.join(row)}) VALUES (:{', :'.join(row)})"), row)  # noqa: S608
    assert run("status", status=1)["problems"]
    assert run("migrate") == {"changed": True, "before": "0001", "schema": SCHEMA}
    with database.reading() as connection:
        found = connection.execute(sa.select(devices)).mappings().one()
    database.close()
    # A bare key could be of a certificate that is revoked; the site brings certificates.
    assert (found["id"], found["until"], found["certificates"]) == ("pump-1", 5, None)
    assert run.apply()["changed_devices"] == 1


def test_keys_are_rotated_distributed_and_activated(deployed: Run) -> None:
    (old,) = (key["kid"] for key in deployed("keys")["keys"])
    deployed.now += 1
    answer = deployed("rotate")
    assert (answer["retired"], answer["signs_from"]) == ([old], SECONDS + 1 + 900)
    assert [key["kid"] for key in deployed("keys")["keys"]] == [old, answer["kid"]]
    assert deployed("status")["signs_with"] == old
    assert deployed("activate") == {"changed": True, "kids": [answer["kid"]]}
    assert deployed("activate") == {"changed": False, "kids": []}
    assert deployed("status")["signs_with"] == answer["kid"]
    deployed.now = answer["retires_at"]
    assert deployed("purge") == {"changed": True, "rows": 0, "keys": [old], "undone": 0}
    assert len(list(deployed.keys.iterdir())) == 1


def test_stolen_key_is_gone_at_once(deployed: Run) -> None:
    (old,) = (key["kid"] for key in deployed("keys")["keys"])
    deployed("rotate", "--sign-after", "0", "--retire-after", "0")
    assert old not in json.dumps(deployed("keys"))


def test_only_public_keys_are_printed(deployed: Run) -> None:
    assert all("d" not in key for key in deployed("keys")["keys"])


def test_all_tokens_of_a_device_are_ended(deployed: Run) -> None:
    answer = deployed("revoke", "--device", "edge-1")
    assert answer == {"issuer": ISSUER, "changed": True, "device": "edge-1", "cutoff": SECONDS, "revoked": None}
    assert deployed("revoke", "--device", "edge-1")["changed"] is False
    # A second later it may be that of a token which nobody has recorded: of a stolen key, of an older database.
    deployed.now += 1
    again = deployed("revoke", "--device", "edge-1")
    assert (again["changed"], again["cutoff"]) == (True, answer["cutoff"] + 1)


def test_one_token_is_ended_though_its_name_begins_like_an_option(deployed: Run) -> None:
    """A jti is base64url: one in 64 begins with '-'."""
    jti, exp = "-c7fNTupp6sYvvGNatJRNQ", SECONDS + 900
    with contextlib.closing(sqlite3.connect(deployed.folder / "tokens.db")) as connection, connection:
        connection.execute("INSERT INTO tokens (jti, device, iat, exp) VALUES (?, 'edge-1', ?, ?)", (jti, SECONDS, exp))
    told = {"issuer": ISSUER, "jti": jti, "device": "edge-1", "exp": exp}
    assert deployed("revoke", f"--jti={jti}") == {"changed": True, **told}
    assert deployed("revoke", f"--jti={jti}") == {"changed": False, **told}


def test_device_is_kept_out_until_the_site_lets_it_in_again(deployed: Run) -> None:
    assert (
        deployed("revoke", "--device", "edge-1", "--reason", "keyCompromise", "--reinstated", "1970-01-01T00:00:05Z")[
            "changed"
        ]
        is True
    )
    assert (
        deployed("revoke", "--device", "edge-1", "--reason", "keyCompromise", "--reinstated", "1970-01-01T00:00:05Z")[
            "changed"
        ]
        is False
    )
    told = [{"device": "edge-1", "reason": "keyCompromise"}]
    for mark, reinstated in ((None, []), (5, []), (6, told)):
        lines = [
            line.replace('"device": "edge-1"', f'"device": "edge-1", "reinstated": {mark or "null"}')
            for line in compiled()
        ]
        assert deployed.apply(lines)["reinstated"] == reinstated


@pytest.fixture
def client(deployed: Run) -> Iterator[FlaskClient]:
    """Asks the service, whose tool `deployed` is."""
    settings = config.parse(deployed.settings)
    with contextlib.closing(Database.of(settings)) as database:
        yield make_app(settings, database=database, now=lambda: deployed.now).test_client()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ((), {"changed": True, "device": "meter-1", "approved": True}),
        (("--deny",), {"changed": True, "device": "meter-1", "approved": False}),
    ],
)
def test_device_that_shows_a_code_is_approved_or_denied(
    deployed: Run, client: FlaskClient, words: tuple[str, ...], answer: dict[str, Any]
) -> None:
    def post(path: str, **form: str) -> Any:
        return client.post(path, data={"client_id": "meter-1", **form}, environ_overrides={"gunicorn.socket": UNIX})

    asked = post("/device_authorization").json
    grant = {"grant_type": "urn:ietf:params:oauth:grant-type:device_code", "device_code": asked["device_code"]}
    assert post("/token", **grant).json["error"] == "authorization_pending"
    assert deployed("approve", asked["user_code"].lower(), "--device", "meter-1", *words) == answer
    told = post("/token", **grant)
    if answer["approved"]:
        assert (told.status_code, claims_of(told)["sub"]) == (200, "meter-1")
    else:
        assert (told.status_code, told.json["error"]) == (400, "access_denied")
    # It was decided, once and for all.
    text = deployed("approve", asked["user_code"], "--device", "meter-1", status=1)
    assert "no open request with this code" in text


def test_code_of_another_device_is_not_approved(deployed: Run, client: FlaskClient) -> None:
    form = {"client_id": "meter-1"}
    asked: Any = client.post("/device_authorization", data=form, environ_overrides={"gunicorn.socket": UNIX}).json
    text = deployed("approve", asked["user_code"], "--device", "hmi-1", status=1)
    assert "no open request with this code for 'hmi-1'" in text
    deployed.now += 600
    assert "no open request" in deployed("approve", asked["user_code"], "--device", "meter-1", status=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["revoke", "--jti", "unknown"], "no token with this jti"),
        (["revoke", "--device", "a b"], "cannot be a device's id"),
        (["approve", "BBBB-BBBB", "--device", "meter-1"], "no open request with this code"),
        (["apply", "/nonexistent"], "No such file"),
    ],
)
def test_refusals_name_the_cure(deployed: Run, arguments: list[str], message: str) -> None:
    text = deployed(*arguments, stdin=json.dumps(NO_SECRETS), status=1)
    assert message in text
    assert "Cure: " in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["revoke"],
        ["revoke", "--jti", "a", "--device", "b"],
        ["revoke", "--jti", "a", "--reason", "superseded"],
        ["revoke", "--device", "a", "--reason", "because"],
        ["rotate", "--sign-after", "-1"],
        ["rotate", "--retire-after", "x"],
        ["approve", "BBBB-BBBB"],
        ["revoke", "--device", "a", "--reason", "superseded", "--reinstated", "5"],
        ["revoke", "--device", "a", "--reason", "superseded", "--reinstated", "2026-01-01T00:00:00"],
    ],
)
def test_wrong_command_line_is_refused(deployed: Run, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        deployed(*arguments)
    assert caught.value.code == 2


def test_secrets_that_are_no_json_are_not_shown(deployed: Run) -> None:
    path = deployed.folder / "compiled"
    text = deployed("apply", str(path), stdin='{"client_secrets": {"a": "t0p-secret"', status=1)
    assert "stdin is not JSON" in text
    assert "t0p-secret" not in text
    secret = {**NO_SECRETS, "client_secrets": {"meter-1": secret_hash("x")[:-3]}}
    text = deployed.apply(secrets=secret, status=1)
    assert "meter-1" in text
    assert secret["client_secrets"]["meter-1"] not in text


def test_clock_that_is_wrong_is_told(deployed: Run) -> None:
    deployed.now = 1000
    assert any("the clock shows" in problem for problem in deployed("status", status=1)["problems"])
    assert "before this program was made" in deployed("purge", status=1)


def test_missing_key_is_told(deployed: Run) -> None:
    for path in deployed.keys.iterdir():
        path.unlink()
    assert any("no key in" in problem for problem in deployed("status", status=1)["problems"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_root_goes_on_as_the_owner_of_the_keys(deployed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, object]] = []
    for name in ("setgroups", "setgid", "setuid"):
        monkeypatch.setattr(os, name, lambda value, name=name: called.append((name, value)))
    os.chown(deployed.keys, 12345, 23456)
    deployed("keys")
    assert called == [("setgroups", []), ("setgid", 23456), ("setuid", 12345)]


# The configuration


def parse(**changes: object) -> config.Config:
    good = {
        "issuer": ISSUER,
        "audiences": [SITE_AUDIENCE],
        "database": "sqlite:////var/lib/x/tokens.db",
        "keys_dir": "/var/lib/x/keys",
    }
    return config.parse({name: value for name, value in {**good, **changes}.items() if value != "missing"})


def test_defaults_are_those_of_the_page() -> None:
    found = parse()
    assert (found.algorithm, found.token_seconds, found.gateways, found.approvers) == ("ES256", 900, (), ())
    assert found.token_endpoint == f"{ISSUER}/token"
    assert parse(gateways=[GATEWAY]).gateways == (GATEWAY,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"issuer": "missing"}, "'issuer' is missing"),
        ({"isuer": "x"}, "'isuer' is unknown"),
        ({"issuer": "http://tokens.example"}, "https://NAME"),
        ({"issuer": f"{ISSUER}/"}, "https://NAME"),
        ({"issuer": f"{ISSUER}/a"}, "https://NAME"),
        ({"issuer": f"{ISSUER}?a"}, "https://NAME"),
        ({"issuer": "https://u:p@tokens.example"}, "https://NAME"),
        ({"issuer": "https://"}, "https://NAME"),
        ({"issuer": 7}, "is not text"),
        ({"issuer": "https://a\n.example"}, "is not text"),
        ({"audiences": []}, "has 0 entries"),
        ({"audiences": "mqtts://a.example"}, "is no list"),
        ({"audiences": ["a", "a"]}, "something twice"),
        ({"audiences": ["plant"]}, "write a URI"),
        ({"gateways": ["mqtts://a.example#x"]}, "write a URI"),
        ({"approvers": ["a b"]}, "cannot be a device's id"),
        ({"introspectors": [7]}, "is not text"),
        ({"keys_dir": "keys"}, "from the root on"),
        ({"algorithm": "RS256"}, "one of ES256, EdDSA"),
        ({"algorithm": "none"}, "one of ES256, EdDSA"),
        ({"token_seconds": 29}, "30 to 86400"),
        ({"token_seconds": 86_401}, "30 to 86400"),
        ({"token_seconds": True}, "30 to 86400"),
        ({"token_seconds": "900"}, "30 to 86400"),
        ({"log_level": "trace"}, "one of debug"),
    ],
)
def test_wrong_configuration_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(config.ConfigError, match=message):
        parse(**changes)


@pytest.mark.parametrize("text", ["", "[]", "\xff", "{"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(config.ConfigError, match="JSON"):
        config.load(path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("x", "no URL"),
        ("sqlite://", "four slashes"),
        ("sqlite:///relative.db", "four slashes"),
        ("mysql://host/db", "use sqlite or postgresql"),
        ("postgresql://user:secret@host/db", "holds a password"),
    ],
)
def test_database_that_cannot_be_is_refused(
    tmp_path: Path, url: str, message: str, monkeypatch: Any, capsys: Any
) -> None:
    run = Run(tmp_path, monkeypatch, capsys, database=url)
    text = run("status", status=1)
    assert message in text
    assert "secret" not in text
