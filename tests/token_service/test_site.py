# SPDX-License-Identifier: Apache-2.0
"""What the service takes over from the compiled site and the CA, what it refuses, and who may come back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from bednet.token_service import clock, revocation, site
from bednet.token_service.database import cutoffs, devices, revoked_serials
from tests.token_service.plant import DEVICES, ISSUER, START, compiled, refused, secret_hash

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.token_service.plant import Plant


def changed(device: str, /, **changes: Any) -> list[str]:
    return compiled([{**row, **changes} if row["device"] == device else row for row in DEVICES])


def without(device: str) -> list[str]:
    return compiled([row for row in DEVICES if row["device"] != device])


def test_only_devices_with_tokens_and_people_are_kept(plant: Plant) -> None:
    with plant.database.reading() as connection:
        found = {row.id for row in connection.execute(sa.select(devices.c.id))}
    assert found == {row["device"] for row in DEVICES} - {"temp-101"}


def test_applying_twice_changes_nothing(plant: Plant) -> None:
    assert plant.apply()["changed"] is False


def test_answer_says_what_is_different(plant: Plant) -> None:
    answer = plant.apply(changed("edge-1", values=["hall-2"]))
    assert (answer["changed"], answer["changed_devices"], answer["added"], answer["removed"]) == (True, 1, 0, 0)
    assert plant.apply(without("edge-1"))["removed"] == 1
    assert plant.apply()["added"] == 1


def test_check_changes_nothing(plant: Plant) -> None:
    data = site.read(without("edge-1"), plant.secrets(), plant.settings)
    assert site.apply(plant.database, data, START, check=True)["removed"] == 1
    assert plant.token().status_code == 200
    assert site.apply(plant.database, data, START)["removed"] == 1


def test_missing_and_unused_secrets_are_named(plant: Plant) -> None:
    answer = plant.apply(client_secrets={"edge-1": secret_hash("x")}, certificates={})
    assert answer["without_secret"] == ["hmi-1", "meter-1", "pump-1"]
    assert answer["unused_secrets"] == []
    assert plant.apply(client_secrets={"nobody": secret_hash("x")})["unused_secrets"] == ["nobody"]


def test_zones_and_foreign_issuers_are_passed_over(plant: Plant) -> None:
    lines = compiled()
    header = {**json.loads(lines[0]), "zones": 1, "issuers": 2}
    foreign = {**json.loads(lines[3]), "issuer": "https://sso.example", "service": False}
    zone = {"zone": "Europe/Berlin", "transitions": [[0, 3600]]}
    lines = [json.dumps(line) + "\n" for line in (header, zone)] + lines[1:4] + [json.dumps(foreign) + "\n"] + lines[4:]
    assert plant.apply(lines)["changed"] is False


def test_what_the_compiler_writes_is_taken_over(make_plant: Callable[..., Plant], tmp_path: Any) -> None:
    pytest.importorskip("jsonschema", reason="this is a host of the service, and no control machine")
    from bednet.compiled import lines  # noqa: PLC0415
    from bednet.site import load_site  # noqa: PLC0415

    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "devices.yml").write_text(
        "version: 1\ndevices:\n"
        "  - {id: edge-1, location: hall-1, roles: [sensor], authentication: [token]}\n"
        "  - {id: temp-1, location: hall-1, roles: [sensor]}\n"
    )
    (folder / "policy.yml").write_text(
        "version: 1\nroles:\n  sensor:\n    allow: {publish: ['sensors/{device.location}/{device.id}/#']}\n"
        f"issuers:\n  - {{name: site, issuer: '{ISSUER}', audience: ['mqtts://plant.example'], service: true}}\n"
    )
    plant = make_plant(apply=False)
    answer = plant.apply(list(lines(load_site(folder))))
    # edge-1, and the probe of verify.yml.
    assert (answer["added"], answer["without_secret"]) == (2, [])
    assert plant.token().status_code == 200
    refused(plant, plant.token("temp-1"), "invalid_client", "unknown-client", 401)


def _line(lines: list[str], number: int, text: str | None) -> list[str]:
    return [*lines[:number], *([] if text is None else [text]), *lines[number + 1 :]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the file ends too early"),
        (["x\n"], ":1: the line is not JSON"),
        (['{"bednet-compiled": 1}\n'], "reads format 2"),
        (
            _line(compiled(), 0, '{"bednet-compiled": 2, "zones": 0, "profiles": 2, "issuers": 1, "devices": true}\n'),
            "'devices' is no number",
        ),
        (compiled()[:-1], "the file ends too early"),
        ([*compiled(), "{}\n"], "more lines than the first line says"),
        ([*compiled()[:-1], compiled()[-1].rstrip("\n")], "the line has no end"),
        (_line(compiled(), 1, compiled()[2]), "a profile is listed twice"),
        (_line(compiled(), 4, compiled()[5]), "not in order"),
        (changed("edge-1", profile="x"), "which the file does not list"),
        (changed("edge-1", values="hall-1"), "values that are no text"),
        (changed("edge-1", values=[""]), "values that are no text"),
        (changed("edge-1", token="x"), "which is unknown"),  # noqa: S106
        (changed("edge-1", token=None), "does not fit its 'token'"),
        (changed("temp-101", token="tls_client_auth"), "does not fit its 'token'"),  # noqa: S106
        (changed("edge-1", revoked="because"), "which is no reason"),
        (changed("edge-1", until="soon"), "an end that is no time"),
        (changed("edge-1", reinstated=-1), "no time that can be"),
        (changed("edge-1", device="edge 1"), "cannot be a device's id"),
    ],
)
def test_unsound_site_is_refused_and_nothing_changes(plant: Plant, lines: list[str], message: str) -> None:
    with pytest.raises(site.Refused, match=message):
        plant.apply(lines)
    assert plant.apply()["changed"] is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"service": False}, "no issuer with 'service: true'"),
        ({"issuer": "https://other.example"}, "own issuer is 'https://other.example'"),
        ({"audience": ["mqtts://other.example"]}, "brokers accept"),
        ({"longest": 899}, "more than 899 seconds"),
        ({"algorithms": ["RS256"]}, "signs with ES256"),
    ],
)
def test_site_whose_brokers_would_refuse_our_tokens_is_refused(
    plant: Plant, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(site.Refused, match=message):
        plant.apply(compiled(**changes))


@pytest.mark.parametrize(
    ("secrets", "message"),
    [
        (None, "must be a JSON object with"),
        ([], "must be a JSON object with"),
        ({"client_secrets": {}, "certificates": {}}, "must be a JSON object with"),
        ({"client_secrets": {}, "certificates": {}, "revoked_serials": {}, "x": {}}, "must be a JSON object with"),
        ({"client_secrets": [], "certificates": {}, "revoked_serials": {}}, "object of strings"),
        ({"client_secrets": {"a": 1}, "certificates": {}, "revoked_serials": {}}, "object of strings"),
        ({"client_secrets": {"a": "plain"}, "certificates": {}, "revoked_serials": {}}, r"the form \$7\$"),
        (
            {"client_secrets": {"a": "$7$20000$YQ==$YQ=="}, "certificates": {}, "revoked_serials": {}},
            "most 10000",
        ),
        ({"client_secrets": {"a": "$7$1$YQ==$YQ=="}, "certificates": {}, "revoked_serials": {}}, "no hash of 64"),
        ({"client_secrets": {}, "certificates": {"a": "x"}, "revoked_serials": {}}, "no certificate in PEM"),
        ({"client_secrets": {}, "certificates": {}, "revoked_serials": {"xyz": "superseded"}}, "cannot be"),
        ({"client_secrets": {}, "certificates": {}, "revoked_serials": {"AB": "x"}}, "cannot be"),
        ({"client_secrets": {}, "certificates": {}, "revoked_serials": {}, "crl_number": "7"}, "whole number"),
    ],
)
def test_unsound_secrets_are_refused_and_not_shown(plant: Plant, secrets: Any, message: str) -> None:
    with pytest.raises(site.Refused, match=message) as caught:
        site.read(compiled(), secrets, plant.settings)
    assert "plain" not in str(caught.value)


# Who may come back (docs/store.md)


def test_older_files_bring_no_revoked_device_back(plant: Plant) -> None:
    plant.apply(changed("edge-1", revoked="superseded"))
    answer = plant.apply()
    assert answer["kept_revoked"] == [{"device": "edge-1", "reason": "superseded"}]
    assert answer["changed"] is False
    refused(plant, plant.token(), "invalid_client", "revoked", 401)


@pytest.mark.parametrize(("mark", "back"), [(100, False), (99, False), (101, True)])
def test_device_comes_back_with_a_later_mark_alone(plant: Plant, mark: int, back: bool) -> None:
    plant.apply(changed("edge-1", reinstated=100))
    plant.apply(changed("edge-1", revoked="superseded"))
    answer = plant.apply(changed("edge-1", reinstated=mark))
    told = [{"device": "edge-1", "reason": "superseded"}]
    assert (answer["reinstated"], answer["kept_revoked"]) == ((told, []) if back else ([], told))
    assert (plant.token().status_code == 200) is back


def test_device_that_was_revoked_and_forgotten_comes_back_with_a_mark_alone(plant: Plant) -> None:
    plant.apply(changed("edge-1", revoked="superseded"))
    plant.apply(without("edge-1"))
    assert plant.apply()["kept_revoked"] == [{"device": "edge-1", "reason": "superseded"}]
    refused(plant, plant.token(), "invalid_client", "revoked", 401)
    assert plant.apply(changed("edge-1", reinstated=1))["kept_revoked"] == []
    assert plant.token().status_code == 200


def test_secret_of_a_device_that_is_kept_out_is_forgotten(plant: Plant) -> None:
    plant.apply(changed("meter-1", revoked="superseded"))
    plant.apply()
    with plant.database.reading() as connection:
        assert connection.execute(sa.select(devices.c.secret).where(devices.c.id == "meter-1")).scalar() is None


def test_older_list_of_certificates_takes_nothing_back(plant: Plant) -> None:
    plant.apply(revoked_serials={"AB": "superseded"}, crl_number=7)
    answer = plant.apply(revoked_serials={"CD": "superseded"}, crl_number=6)
    assert (answer["older_crl"], answer["revoked_serials"]) == (True, 1)
    assert plant.apply(revoked_serials={})["older_crl"] is True
    answer = plant.apply(revoked_serials={"AB": "superseded"}, crl_number=7)
    assert (answer["older_crl"], answer["revoked_serials"]) == (False, 1)
    assert plant.apply(revoked_serials={}, crl_number=8)["revoked_serials"] == 1


def test_ten_thousand_devices_are_applied_and_changed(make_plant: Callable[..., Plant]) -> None:
    plant = make_plant(apply=False)
    rows = [
        {"device": f"d{number:05}", "authentication": ["token"], "token": "tls_client_auth"} for number in range(10_000)
    ]
    assert plant.apply(compiled(rows))["added"] == 10_000
    assert plant.apply(compiled(rows))["changed"] is False
    assert plant.apply(compiled(rows[1:]))["removed"] == 1


def _serials_of(plant: Plant) -> dict[str, str]:
    with plant.database.reading() as connection:
        return {row.serial: row.reason for row in connection.execute(sa.select(revoked_serials))}


def test_list_of_the_ca_only_adds(plant: Plant) -> None:
    """What is no longer on it has run out, or the list is another's: taking away is for a roll-out."""
    plant.apply(revoked_serials={"0A": "superseded"}, crl_number=4)
    added = site.add_serials(plant.database, {"crl_number": 5, "revoked_serials": {"00B": "keyCompromise"}})
    assert added == {"changed": True, "revoked_serials": 1, "older_crl": False, "crl_number": 5}
    assert _serials_of(plant) == {"a": "superseded", "b": "keyCompromise"}
    changed = site.add_serials(plant.database, {"crl_number": 6, "revoked_serials": {"0A": "keyCompromise"}})
    assert changed == {"changed": True, "revoked_serials": 1, "older_crl": False, "crl_number": 6}
    again = site.add_serials(plant.database, {"crl_number": 7, "revoked_serials": {"0A": "keyCompromise"}})
    assert again == {"changed": False, "revoked_serials": 0, "older_crl": False, "crl_number": 7}
    assert _serials_of(plant) == {"a": "keyCompromise", "b": "keyCompromise"}


@pytest.mark.parametrize(("number", "older"), [(6, True), (7, False)])
def test_list_of_the_ca_that_was_seen_or_is_older_says_nothing_new(plant: Plant, number: int, older: bool) -> None:
    plant.apply(crl_number=7)
    told = site.add_serials(plant.database, {"crl_number": number, "revoked_serials": {"C": "superseded"}})
    assert told == {"changed": False, "revoked_serials": 0, "older_crl": older, "crl_number": 7}
    assert _serials_of(plant) == {}


def test_roll_out_that_began_before_a_list_was_fetched_brings_no_certificate_back(plant: Plant) -> None:
    plant.apply(crl_number=7)
    site.add_serials(plant.database, {"crl_number": 8, "revoked_serials": {"C": "superseded"}})
    assert plant.apply(crl_number=7)["older_crl"] is True
    assert _serials_of(plant) == {"c": "superseded"}
    assert plant.apply(crl_number=8, revoked_serials={"D": "superseded"})["older_crl"] is False
    assert _serials_of(plant) == {"d": "superseded"}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (None, "not crl_number and revoked_serials"),
        ({"revoked_serials": {}}, "not crl_number and revoked_serials"),
        ({"crl_number": 1, "revoked_serials": {}, "more": 1}, "not crl_number and revoked_serials"),
        ({"crl_number": None, "revoked_serials": {}}, "crl_number must be a whole number"),
        ({"crl_number": True, "revoked_serials": {}}, "crl_number must be a whole number"),
        ({"crl_number": -1, "revoked_serials": {}}, "crl_number must be a whole number"),
        ({"crl_number": 1, "revoked_serials": ["A"]}, "must be a JSON object of strings"),
        ({"crl_number": 1, "revoked_serials": {"A": 1}}, "must be a JSON object of strings"),
        ({"crl_number": 1, "revoked_serials": {"xyz": "superseded"}}, "'xyz' with the reason 'superseded' cannot be"),
        ({"crl_number": 1, "revoked_serials": {"A": "x"}}, "'A' with the reason 'x' cannot be"),
    ],
)
def test_list_of_the_ca_that_is_none_is_refused(plant: Plant, told: Any, message: str) -> None:
    with pytest.raises(site.Refused, match=message):
        site.add_serials(plant.database, told)
    assert _serials_of(plant) == {}


def test_certificate_on_a_list_of_the_ca_opens_nothing(plant: Plant) -> None:
    assert plant.token("edge-1").status_code == 200
    serial = f"{plant.certificate('edge-1').serial_number:040X}"
    site.add_serials(plant.database, {"crl_number": 1, "revoked_serials": {serial: "keyCompromise"}})
    refused(plant, plant.token("edge-1"), "invalid_client", "certificate-revoked", 401)


# Cutoffs


def active(plant: Plant, token: str) -> bool:
    form = {"client_id": "watcher", "token": token}
    answer = plant.post("/introspect", form, certificate=plant.certificate("watcher"))
    return bool((answer.json or {})["active"])


def cutoff(plant: Plant, device: str = "edge-1") -> int | None:
    with plant.database.reading() as connection:
        return connection.execute(sa.select(cutoffs.c.at).where(cutoffs.c.device == device)).scalar()


@pytest.mark.parametrize("lines", [without("edge-1"), changed("edge-1", revoked="superseded")], ids=["gone", "revoked"])
def test_token_that_was_issued_while_the_tool_was_reading_ends_too(plant: Plant, lines: list[str]) -> None:
    started = plant.clock.now
    plant.clock.now += 2
    token = (plant.token().json or {})["access_token"]
    data = site.read(lines, plant.secrets(), plant.settings)
    site.apply(plant.database, data, started)
    assert cutoff(plant) == START + 2
    assert not active(plant, token)


@pytest.mark.parametrize("lines", [without("edge-1"), changed("edge-1", revoked="superseded")], ids=["gone", "revoked"])
def test_later_cutoff_is_never_moved_back(plant: Plant, lines: list[str]) -> None:
    token = (plant.token().json or {})["access_token"]
    with plant.database.writing() as connection:
        revocation.revoke_device(plant.database, connection, "edge-1", START + 5)
    site.apply(plant.database, site.read(lines, plant.secrets(), plant.settings), START)
    assert cutoff(plant) == START + 5
    assert not active(plant, token)


def test_token_that_the_clock_dated_ahead_and_that_is_over_moves_no_cutoff(plant: Plant) -> None:
    plant.clock.now = START + 10_000
    plant.token()
    plant.clock.now = START
    with plant.database.writing() as connection:
        clock.forget_future(connection, START)
    plant.apply(changed("edge-1", revoked="superseded"))
    assert cutoff(plant) == START
