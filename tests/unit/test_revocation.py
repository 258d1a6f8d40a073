# SPDX-License-Identifier: Apache-2.0
"""Revoking in the text of devices.yml.

The sharp edges: a comment or an order that is lost, another device that is hit, a form of YAML that is edited wrongly
instead of refused, a compromise that is taken back, and a file that a crash leaves half written.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import re
from importlib import resources
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bednet import ca, revocation
from bednet.cli import main
from bednet.errors import SiteError
from bednet.revocation import Edit, RevocationError, reinstate_text, revoke_text

NOW = dt.datetime(2026, 11, 22, 19, 10, tzinfo=dt.UTC)
EARLIER, LATER = NOW - dt.timedelta(days=1), dt.datetime(2027, 1, 1, tzinfo=dt.UTC)
MARK = '"2026-11-22T19:10:00Z"'
EXAMPLE = Path(__file__).resolve().parents[2] / "inventories/example-plant/devices.yml"

PLANT = """\
# The plant
version: 1
devices:
  # Hall 1
  - id: temp-101   # the old one
    location: hall-1
    roles: [sensor]

  - location: "hall-2"  # id comes later
    id: temp-102
    roles:
      - sensor
  - {id: temp-103, location: hall-1, roles: [sensor]}  # in one line
  -   id: vib-212
      roles: [sensor]
      # Fell off a lorry.
      revoked: superseded
      location: hall-2
# The end
"""


def _devices(text: str) -> dict[str, dict[str, object]]:
    return {device["id"]: device for device in yaml.safe_load(text)["devices"]}


def test_the_reasons_are_those_of_the_schema_and_of_the_ca() -> None:
    schema = json.loads((resources.files("bednet") / "schemas/devices.schema.json").read_text(encoding="utf-8"))

    def find(node: object) -> list[str] | None:
        if isinstance(node, dict):
            if "revoked" in node.get("properties", {}):
                enum: list[str] = node["properties"]["revoked"]["enum"]
                return enum
            return next((found for value in node.values() if (found := find(value))), None)
        return None

    assert find(schema) == list(revocation.REASONS)
    assert set(revocation.REASONS) == set(ca.REASONS)


@pytest.mark.parametrize(
    ("device", "old", "new"),
    [
        (
            "temp-101",
            "  - id: temp-101   # the old one\n",
            "  - id: temp-101   # the old one\n    revoked: keyCompromise\n",
        ),
        ("temp-102", "    id: temp-102\n", "    id: temp-102\n    revoked: keyCompromise\n"),
        ("temp-103", "{id: temp-103,", "{id: temp-103, revoked: keyCompromise,"),
        ("vib-212", "revoked: superseded", "revoked: keyCompromise"),
    ],
)
def test_one_place_changes_and_nothing_else(device: str, old: str, new: str) -> None:
    edit = revoke_text(PLANT, device, "keyCompromise")
    assert edit.text == PLANT.replace(old, new, 1) != PLANT
    assert edit.changed
    assert _devices(edit.text)[device]["revoked"] == "keyCompromise"
    again = revoke_text(edit.text, device, "keyCompromise")
    assert (again.text, again.changed, again.before) == (edit.text, False, "keyCompromise")


@pytest.mark.parametrize("device", ["temp-101", "temp-102", "temp-103"])
def test_who_comes_back_has_a_mark_in_place_of_the_reason(device: str) -> None:
    revoked = revoke_text(PLANT, device, "superseded")
    back = reinstate_text(revoked.text, device, NOW)
    marked = revoked.text.replace("revoked: superseded", f"reinstated: {MARK}", 1)
    assert back == Edit(marked, True, revoked.line, "superseded")
    assert _devices(marked)[device]["reinstated"] == MARK.strip('"')
    assert reinstate_text(marked, device, LATER) == Edit(marked, False, revoked.line, None, MARK.strip('"'))
    assert reinstate_text(PLANT, device, NOW) == Edit(PLANT, False, revoked.line, None)


@pytest.mark.parametrize("device", ["temp-101", "temp-102", "temp-103"])
def test_each_mark_is_later_than_the_one_before_whatever_the_clock_says(device: str) -> None:
    text = revoke_text(PLANT, device, "superseded").text
    text = reinstate_text(text, device, NOW).text
    again = revoke_text(text, device, "superseded")
    assert again.reinstated == MARK.strip('"')
    for clock, mark in (
        (LATER, "2027-01-01T00:00:00Z"),
        (NOW, "2026-11-22T19:10:01Z"),
        (EARLIER, "2026-11-22T19:10:01Z"),
    ):
        back = reinstate_text(again.text, device, clock)
        assert _devices(back.text)[device] == {**_devices(PLANT)[device], "reinstated": mark}
        assert back.text.count("reinstated") == 1


@pytest.mark.parametrize("device", ["temp-101", "temp-102", "temp-103"])
def test_a_device_that_only_a_gateway_keeps_out_gets_a_mark_when_that_is_asked_for(device: str) -> None:
    first = reinstate_text(PLANT, device, NOW, again=True)
    assert (first.changed, _devices(first.text)[device]["reinstated"]) == (True, MARK.strip('"'))
    second = reinstate_text(first.text, device, NOW, again=True)
    assert _devices(second.text)[device]["reinstated"] == "2026-11-22T19:10:01Z"
    compromised = revoke_text(first.text, device, "keyCompromise").text
    with pytest.raises(RevocationError, match="was revoked for keyCompromise"):
        reinstate_text(compromised, device, NOW, again=True)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("devices:\n- id: a\n  revoked: superseded\n  location: x\n", "devices:\n- id: a\n  location: x\n"),
        ("devices:\n- id: a\n  revoked: superseded", "devices:\n- id: a\n"),
        ("devices:\n- id: a\n  revoked: superseded  # lost\n", "devices:\n- id: a\n  # lost\n"),
        ("devices:\n- revoked: superseded\n  id: a\n", "devices:\n- id: a\n"),
        ("devices: [{revoked: superseded, id: a}]\n", "devices: [{id: a}]\n"),
        ("devices: [{id: a, revoked: superseded}]\n", "devices: [{id: a}]\n"),
        ("devices: [{id: a, revoked: 'superseded', x: y}]\n", "devices: [{id: a, x: y}]\n"),
        ("devices:\r\n- id: a\r\n  revoked: superseded\r\n  x: y\r\n", "devices:\r\n- id: a\r\n  x: y\r\n"),
    ],
)
def test_a_revocation_is_taken_out_in_every_form(text: str, left: str) -> None:
    """Beside an older mark, which becomes a later one; without one the new mark takes its place."""
    newline = ", " if "{" in text else "\r\n  " if "\r" in text else "\n  "
    older, newer = (f"id: a{newline}reinstated: {mark}" for mark in ('"2025-01-01T00:00:00Z"', MARK))
    back = reinstate_text(text.replace("id: a", older), "a", NOW).text
    assert back == left.replace("id: a", newer)
    alone = reinstate_text(text, "a", NOW).text
    assert yaml.safe_load(alone) == yaml.safe_load(back)
    assert ("# lost" in alone) == ("# lost" in text)


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("devices:\n- id: a", "devices:\n- id: a\n  revoked: superseded"),
        ("devices:\n- id: a\n  revoked:\n", "devices:\n- id: a\n  revoked: superseded\n"),
        ("devices:\n- id: a\n  revoked: null # not yet\n", "devices:\n- id: a\n  revoked: superseded # not yet\n"),
        ("devices:\n- id: a\n  revoked: ~\n", "devices:\n- id: a\n  revoked: superseded\n"),
        ('devices: [{"id": "a"}]\n', 'devices: [{"id": "a", revoked: superseded}]\n'),
        ("devices:\r\n- id: a\r\n  x: y\r\n", "devices:\r\n- id: a\r\n  revoked: superseded\r\n  x: y\r\n"),
        # Characters of several bytes before it, and a list and a mapping within.
        (
            "name: Gießerei °C\ndevices:\n- tags: [ä, {b: c}]\n  id: a\n- id: b\n",
            "name: Gießerei °C\ndevices:\n- tags: [ä, {b: c}]\n  id: a\n  revoked: superseded\n- id: b\n",
        ),
    ],
)
def test_a_revocation_is_written_in_every_form(text: str, becomes: str) -> None:
    assert revoke_text(text, "a", "superseded").text == becomes


@pytest.mark.parametrize(
    ("text", "device", "reason", "why"),
    [
        (PLANT, "temp-101", "lost", "'lost' is no reason for a revocation. Cure: one of keyCompromise, cess"),
        (PLANT, "temp-999", "superseded", "'temp-999' is not listed in devices.yml. Cure: look how its id is"),
        (PLANT, "bednet-probe", "superseded", "'bednet-probe' is not listed"),
        (PLANT, "vib-212", "unspecified", "devices.yml:14: vib-212 is revoked already, for superseded. Cure: leave it"),
        (
            "devices:\n- id: a\n- id: a\n",
            "a",
            "superseded",
            "devices.yml:3: device 'a' is listed again.* line 2 already",
        ),
        ("devices:\n- id: a\n  id: a\n", "a", "superseded", "devices.yml:3: the key 'id' stands here again"),
        ("", "a", "superseded", "'a' is not listed"),
        ("[a]", "a", "superseded", "'a' is not listed"),
        ("devices:\n- a\n- {}\n", "a", "superseded", "'a' is not listed"),
        # A form that the edit would get wrong.
        (
            "devices:\n- ? id\n  : a\n",
            "a",
            "superseded",
            "devices.yml:2: .*not changed here. Cure: write `revoked: s",
        ),
    ],
)
def test_what_cannot_be_revoked_is_refused_with_its_cure(text: str, device: str, reason: str, why: str) -> None:
    with pytest.raises(RevocationError, match=why):
        revoke_text(text, device, reason)


def test_a_compromise_is_never_taken_back() -> None:
    text = revoke_text(PLANT, "vib-212", "keyCompromise").text
    with pytest.raises(RevocationError, match=r"vib-212 was revoked for keyCompromise: .* Cure: .*gives it new keys"):
        reinstate_text(text, "vib-212", NOW)
    with pytest.raises(RevocationError, match="vib-212 is revoked already, for keyCompromise"):
        revoke_text(text, "vib-212", "superseded")


def test_a_comment_that_would_be_lost_is_a_reason_to_refuse() -> None:
    text = "devices:\n- revoked: superseded # the comment\n  reinstated: 2025-01-01T00:00:00Z\n  id: a\n"
    with pytest.raises(
        RevocationError, match=f"Cure: write `reinstated: {MARK}` in place of `revoked` into its entry by"
    ):
        reinstate_text(text, "a", NOW)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_every_device_of_the_example_can_go_and_come_back(data: st.DataObject) -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    names = [name for name, device in _devices(text).items() if "revoked" not in device]
    gone = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1, max_size=6))
    reason = data.draw(st.sampled_from([reason for reason in revocation.REASONS if reason != "keyCompromise"]))
    revoked = text
    for name in gone:
        revoked = revoke_text(revoked, name, reason).text
    expected = _devices(text)
    for name in gone:
        expected[name]["revoked"] = reason
    assert _devices(revoked) == expected
    for name in data.draw(st.permutations(gone)):
        revoked = reinstate_text(revoked, name, NOW).text
    for name in gone:
        del expected[name]["revoked"]
        expected[name]["reinstated"] = MARK.strip('"')
    assert _devices(revoked) == expected


# --- files


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site's folder that has nothing but a devices.yml, for one test."""
    (tmp_path / "devices.yml").write_text(PLANT, encoding="utf-8")
    (tmp_path / "devices.yml").chmod(0o640)
    return tmp_path


def test_the_commands_say_what_they_did(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = site / "devices.yml"
    for words, said in (
        (["revoke", "temp-102", "superseded", "--check"], "would say that temp-102 is revoked for superseded."),
        (["revoke", "temp-102", "superseded"], "temp-102 is revoked for superseded."),
        (["revoke", "temp-102", "superseded"], "temp-102 is revoked for superseded. Nothing was changed."),
        (
            ["reinstate", "temp-102", "--check"],
            "would say that temp-102 is in service (it was revoked for superseded).",
        ),
        (["reinstate", "temp-102"], "temp-102 is in service (it was revoked for superseded)."),
        (["reinstate", "temp-102"], "temp-102 is in service. Nothing was changed."),
    ):
        command, *rest = words
        before = file.read_text(encoding="utf-8")
        assert main([command, str(site), *rest]) == 0
        assert capsys.readouterr().out == f"{file}:9: {said}\n"
        assert (file.read_text(encoding="utf-8") == before) == ("--check" in words or "Nothing" in said)
        assert file.stat().st_mode & 0o777 == 0o640
    assert re.sub(r'\n    reinstated: "[0-9TZ:-]+"', "", file.read_text(encoding="utf-8")) == PLANT
    assert [path.name for path in site.iterdir()] == ["devices.yml"]


def test_the_commands_refuse_in_words(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["revoke", str(site), "temp-1", "superseded"]) == 1
    told = capsys.readouterr()
    assert (told.out, told.err.startswith("device 'temp-1' is not listed in devices.yml. Cure: ")) == ("", True)
    assert main(["revoke", str(site / "nowhere"), "temp-1", "superseded"]) == 1
    assert "nowhere: No such file or directory. Cure: name the site's folder" in capsys.readouterr().err
    (site / "devices.yml").write_text("devices: [\n", encoding="utf-8")
    assert main(["reinstate", str(site), "temp-1"]) == 1
    assert "devices.yml:2: " in capsys.readouterr().err


def test_other_mistakes_of_the_site_hold_no_revocation_up(site: Path) -> None:
    (site / "policy.yml").write_text("roles: [", encoding="utf-8")
    (site / "devices.yml").write_text(PLANT.replace("roles: [sensor]", "rolez: [nobody]"), encoding="utf-8")
    assert revocation.revoke(site, "temp-101", "unspecified").changed


def test_text_that_is_no_utf_8_is_refused(site: Path) -> None:
    (site / "devices.yml").write_bytes(PLANT.replace("The plant", "Gie\xdferei").encode("latin-1"))
    with pytest.raises((SiteError, RevocationError), match="UTF-8"):
        revocation.revoke(site, "temp-101", "unspecified")


def test_a_link_stays_a_link(site: Path) -> None:
    (site / "devices.yml").rename(site / "real.yml")
    (site / "devices.yml").symlink_to("real.yml")
    revocation.revoke(site, "temp-101", "unspecified")
    assert (site / "devices.yml").is_symlink()
    assert "revoked: unspecified" in (site / "real.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(site: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(site))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(RevocationError, match="No space left on device"):
        revocation.revoke(site, "temp-101", "unspecified")
    monkeypatch.undo()
    assert (site / "devices.yml").read_text(encoding="utf-8") == PLANT
    assert [path.name for path in site.iterdir()] == ["devices.yml"]


LIST = "id,location,roles,revoked\ntemp-901,hall-1,sensor,\ntemp-902,hall-1,sensor,superseded\n"


@pytest.mark.parametrize("with_yaml", [True, False])
def test_a_list_that_another_program_writes_is_not_changed_but_heeded(
    site: Path, with_yaml: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its revocations come from where the list comes from; revoke.yml then goes on to the gateways."""
    if with_yaml:
        (site / "devices.yml").write_text("version: 1\ndevices: []\n", encoding="utf-8")
    else:
        (site / "devices.yml").unlink()
    (site / "devices.csv").write_text(LIST, encoding="utf-8")
    with pytest.raises(
        RevocationError, match=r"devices\.csv:2: temp-901 stands in a list .* Cure: write 'superseded' as"
    ):
        revocation.revoke(site, "temp-901", "superseded")
    with pytest.raises(
        RevocationError, match=r"devices\.csv:3: temp-902 stands in a list .* Cure: empty its `revoked`"
    ):
        revocation.reinstate(site, "temp-902", NOW)
    with pytest.raises(RevocationError, match=f"empty its `revoked`, write {MARK} as its `reinstated` where that list"):
        revocation.reinstate(site, "temp-901", NOW, again=True)
    with pytest.raises(RevocationError, match="'temp-903' is not listed"):
        revocation.revoke(site, "temp-903", "superseded")
    assert main(["revoke", str(site), "temp-902", "superseded"]) == 0
    assert (
        capsys.readouterr().out == f"{site}/devices.csv:3: temp-902 is revoked for superseded. Nothing was changed.\n"
    )
    assert main(["reinstate", str(site), "temp-901"]) == 0
    assert (site / "devices.csv").read_text(encoding="utf-8") == LIST
    (site / "devices.csv").write_text(LIST.replace("superseded", "keyCompromise"), encoding="utf-8")
    with pytest.raises(RevocationError, match="is revoked for keyCompromise, and that cannot be taken back"):
        revocation.reinstate(site, "temp-902", NOW)
