# SPDX-License-Identifier: Apache-2.0
"""What ``bednet compile --output`` writes is what the site means, and what ``bednet-store`` takes.

Sharp edges pinned down here: a profile's key outlives a change of its rules, a time zone's offsets are right to the
second on both sides of each change, and a file is replaced as a whole or not at all.
"""

from __future__ import annotations

import datetime as dt
import errno
import json
import os
import zoneinfo
from bisect import bisect_right
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bednet import cli, compiled, store
from bednet.site import PROBE_ID, load_site, probe_grants
from tests.unit.store.sites import content, secrets

if TYPE_CHECKING:
    from bednet.policy import Grant
    from bednet.site import Site

EXAMPLE = Path(__file__).parents[3] / "inventories/example-plant"
POLICY = """\
version: 1
roles:
  sensor:
    allow: {publish: ["sensors/{device.id}/#"], subscribe: ["{device.location}/{device.line}/{device.id}"]}
    deny: {publish: ["sensors/{device.id}/secret"]}
  display:
    allow: {subscribe: ["sensors/+/#"]}
rules:
  - name: shift
    when: "device.location == 'hall-1'"
    during:
      - {days: [mon, sun], hours: "06:00-22:00", zone: Europe/Berlin}
      - {hours: "22:00-06:00", zone: America/New_York}
    from: [10.20.0.0/16, "2001:db8::/32"]
    allow: {publish: ["factory/{device.line}"]}
"""
DEVICES: list[dict[str, Any]] = [
    {"id": "z", "location": "hall-2", "roles": ["sensor", "display"], "attributes": {"line": 12}},
    {
        "id": "B",
        "location": "hall-1",
        "roles": ["sensor"],
        "attributes": {"line": "ü"},
        "until": "2027-01-01T00:00:00Z",
    },
    {"id": "a", "location": "hall-1", "roles": ["sensor"], "attributes": {"line": "x"}, "revoked": "superseded"},
    {"id": "d", "location": "hall-1", "roles": [], "attributes": {"line": "x"}, "authentication": ["psk", "password"]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A site of four devices, for one test."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "policy.yml").write_text(POLICY)
    (folder / "devices.json").write_text(json.dumps(DEVICES))
    return folder


def meant(grants: tuple[Grant, ...]) -> list[dict[str, Any]]:
    """Return rules with the topics of one device, in the words of a dump."""
    return [
        {
            "id": grant.rule.id,
            "effect": grant.rule.effect,
            "access": grant.rule.access,
            "topic": grant.topic_filter,
            "during": [
                {
                    "days": sum(1 << day for day in window.days),
                    "from": window.start,
                    "to": window.end,
                    "zone": store.zone_key(window.zone).hex(),
                }
                for window in grant.rule.during
            ],
            "networks": [str(network) for network in grant.rule.networks],
        }
        for grant in grants
    ]


def stored(plant: store.Store) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return each device of a store with its rules, placeholders filled in."""
    lines = list(plant.dump())
    profiles = {line["profile"]: line["rules"] for line in lines if "rules" in line}
    found = {}
    for line in lines:
        if "device" in line:
            values = [line["device"], *line["values"]]
            found[line["device"]] = (
                line,
                [
                    rule | {"topic": "".join(values[part] if isinstance(part, int) else part for part in rule["topic"])}
                    for rule in profiles[line["profile"]]
                ],
            )
    return found


def apply(site: Site, folder: Path) -> store.Store:
    plant = store.Store(folder)
    plant.apply(list(compiled.lines(site)), secrets())
    return plant


@pytest.mark.parametrize("which", ["made up", "example-plant"])
def test_the_store_of_a_site_means_what_the_site_means(folder: Path, tmp_path: Path, which: str) -> None:
    site = load_site(folder if which == "made up" else EXAMPLE)
    plant = apply(site, tmp_path / "store")
    found = stored(plant)
    assert found.keys() == site.devices.keys() | {PROBE_ID}
    assert found[PROBE_ID][1] == meant(probe_grants())
    for name, device in site.devices.items():
        line, rules = found[name]
        assert line["revoked"] == device.revoked
        assert line["until"] == (None if device.until is None else device.until.timestamp())
        assert ("certificate" in line["authentication"]) is ("certificate" in device.authentication)
        if device.revoked is None:
            assert rules == meant(site.grants[name])
    assert plant.status(deep=True)["problems"] == []


def test_the_lines_are_in_order_and_as_many_as_the_first_one_says(folder: Path) -> None:
    header, *entries = map(json.loads, compiled.lines(load_site(folder)))
    assert header == {"bednet-compiled": 2, "zones": 2, "profiles": 4, "issuers": 0, "devices": 5}
    kinds = ["zone" if "zone" in entry else "rules" if "rules" in entry else "device" for entry in entries]
    assert kinds == ["zone"] * 2 + ["rules"] * 4 + ["device"] * 5
    assert [entry["device"] for entry in entries[6:]] == ["B", "a", "bednet-probe", "d", "z"]
    probe = entries[8]
    assert (probe["profile"], probe["authentication"]) == ("*bednet-probe", ["certificate", "password", "psk"])
    end = dt.datetime(2027, 1, 1, tzinfo=dt.UTC).timestamp()
    assert entries[6] == {
        "device": "B",
        "profile": entries[6]["profile"],
        "values": ["hall-1", "ü"],
        "authentication": ["certificate"],
        "token": None,
        "until": end,
        "revoked": None,
    }


def test_the_probe_gets_tokens_where_the_site_has_a_service_of_its_own() -> None:
    site = load_site(EXAMPLE)
    for issuers, ways, method in ((site.issuers, ["token"], "tls_client_auth"), ({}, [], None)):
        lines = map(json.loads, compiled.lines(replace(site, issuers=issuers)))
        probe = next(line for line in lines if line.get("device") == PROBE_ID)
        assert probe["authentication"] == ["certificate", "password", "psk", *ways]
        assert probe["token"] == method


def test_a_device_alone_has_the_lines_that_it_has_among_the_others(folder: Path) -> None:
    site = load_site(folder)
    lines = list(compiled.lines(site))
    alone = [compiled.device_lines(site, name).splitlines(keepends=True) for name in sorted(site.devices)]
    assert [device for _, device in alone] == [line for line in lines if json.loads(line).get("device") in site.devices]
    assert all(profile in lines and json.loads(profile)["profile"] in device for profile, device in alone)
    with pytest.raises(KeyError):
        compiled.device_lines(site, "nobody")


def test_a_change_of_a_role_changes_its_profiles_and_no_device(folder: Path, tmp_path: Path) -> None:
    plant = apply(load_site(folder), tmp_path / "store")
    (folder / "policy.yml").write_text(POLICY.replace("sensors/+/#", "sensors/#"))
    result = plant.apply(list(compiled.lines(load_site(folder))), secrets())
    assert (result["profiles"], result["changed_devices"]) == (1, 0)


def test_a_change_of_one_device_changes_that(folder: Path, tmp_path: Path) -> None:
    plant = apply(load_site(folder), tmp_path / "store")
    (folder / "devices.json").write_text(json.dumps([*DEVICES[:3], {**DEVICES[3], "location": "hall-2"}]))
    result = plant.apply(list(compiled.lines(load_site(folder))), secrets())
    assert (result["changed_devices"], result["added"], result["removed"]) == (1, 0, 0)


# Time zones

ZONES = ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "Africa/Casablanca", "UTC")
_INSTANTS = st.datetimes(dt.datetime(1, 1, 3), dt.datetime(2100, 12, 31), timezones=st.just(dt.UTC))


def offset_of(zone: str, at: dt.datetime) -> int:
    changes = compiled.transitions(zone)
    return changes[bisect_right([second for second, _ in changes], int(at.timestamp() // 1)) - 1][1]


@settings(deadline=None)
@given(st.sampled_from(ZONES), _INSTANTS)
@example("Europe/Berlin", dt.datetime(2100, 7, 1, tzinfo=dt.UTC))
@example("America/New_York", dt.datetime(1, 1, 3, tzinfo=dt.UTC))
def test_a_zone_has_the_offset_that_python_knows(zone: str, at: dt.datetime) -> None:
    expected = at.astimezone(zoneinfo.ZoneInfo(zone)).utcoffset()
    assert expected == dt.timedelta(seconds=offset_of(zone, at))


@pytest.mark.parametrize("zone", ZONES)
def test_each_change_of_a_zone_is_right_to_the_second(zone: str) -> None:
    info = zoneinfo.ZoneInfo(zone)
    first, *others = compiled.transitions(zone)
    assert first[0] == compiled.BEGIN_OF_TIME
    before = first[1]
    for second, offset in others:
        at = dt.datetime.fromtimestamp(second, dt.UTC)
        assert at.astimezone(info).utcoffset() == dt.timedelta(seconds=offset)
        assert (at - dt.timedelta(seconds=1)).astimezone(info).utcoffset() == dt.timedelta(seconds=before)
        assert offset != before
        before = offset


def test_the_changes_reach_to_the_year_2100() -> None:
    changes = compiled.transitions("Europe/Berlin")
    assert dt.datetime.fromtimestamp(changes[-1][0], dt.UTC) == dt.datetime(2100, 10, 31, 1, tzinfo=dt.UTC)
    assert compiled.transitions("UTC") == ((compiled.BEGIN_OF_TIME, 0),)


# The file, and the command


def test_the_command_writes_the_file_and_lists_the_devices(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "compiled.jsonl"
    assert cli.main(["compile", str(folder), "--output", str(output)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["acl_file"] is None
    assert [device["id"] for device in printed["devices"]] == ["B", "a", "d", "z"]
    assert output.read_text(encoding="utf-8") == "".join(compiled.lines(load_site(folder)))
    assert output.stat().st_mode & 0o777 == 0o600
    direct, file = tmp_path / "direct", tmp_path / "file"
    store.Store(file).apply(store.CompiledFile(output), secrets())
    assert content(file) == content(apply(load_site(folder), direct).folder)


def test_a_site_that_is_wrong_leaves_the_file_as_it_was(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "compiled.jsonl"
    output.write_text("what was before")
    (folder / "devices.json").write_text("[]]")
    assert cli.main(["compile", str(folder), "--output", str(output)]) == 1
    assert "something follows the end" in capsys.readouterr().err
    assert output.read_text() == "what was before"


def test_a_disk_that_is_full_leaves_the_file_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = tmp_path / "compiled.jsonl"
    output.write_text("what was before")
    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["compile", str(folder), "--output", str(output)]) == 1
    assert "No space left on device. Cure:" in capsys.readouterr().err
    assert output.read_text() == "what was before"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_file_that_cannot_be_written_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", str(folder), "--output", str(folder / "none" / "x")]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "No such file or directory. Cure: name a file that you may write" in told.err
