# SPDX-License-Identifier: Apache-2.0
"""The commands check, compile and explain: what they print where, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bednet.acl_file import compile_acl_file
from bednet.cli import main
from bednet.site import load_site

if TYPE_CHECKING:
    from tests.unit.policy.conftest import SiteFolder

EXAMPLE = Path(__file__).parents[3] / "inventories" / "example-plant"


def test_compile_prints_one_json_object(site_folder: SiteFolder, capsys: pytest.CaptureFixture[str]) -> None:
    site_folder.write(
        devices="version: 1\ndevices:\n"
        "  - {id: b, location: l, roles: [sensor], authentication: [password, certificate]}\n"
        "  - {id: a, location: l, roles: [sensor], enrolment: csr}\n"
        "  - {id: c, location: l, roles: [sensor], revoked: keyCompromise}\n"
    )
    assert main(["compile", str(site_folder.path)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    result = json.loads(output.out)
    # The plugin decides unless told otherwise, as for check and explain.
    assert result["acl_file"] is None
    assert main(["compile", str(site_folder.path), "--access-control", "acl_file"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {**result, "acl_file": compile_acl_file(load_site(site_folder.path))}
    bundle = {
        "authentication": ["certificate"],
        "token": None,
        "enrolment": "bundle",
        "csr": None,
        "revoked": None,
    }
    assert result["devices"] == [
        {**bundle, "id": "a", "enrolment": "csr"},
        {**bundle, "id": "b", "authentication": ["password", "certificate"]},
        {**bundle, "id": "c", "revoked": "keyCompromise"},
    ]
    assert result["summary"] == {
        "devices": 3,
        "active": 2,
        "revoked": 1,
        "certificate": 2,
        "password": 1,
        "psk": 0,
        "token": 0,
        "waiting_for_csr": 1,
        "roles": 1,
        "rules": 0,
        "issuers": 0,
        "tests": 0,
    }


def test_compile_prints_the_line_of_one_device_as_it_is_in_the_whole(
    site_folder: SiteFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site_folder.write()
    whole = tmp_path / "site.jsonl"
    assert main(["compile", str(site_folder.path), "--output", str(whole)]) == 0
    capsys.readouterr()
    assert main(["compile", str(site_folder.path), "--device", "temp-101"]) == 0
    assert capsys.readouterr().out in whole.read_text(encoding="utf-8").splitlines(keepends=True)
    assert main(["compile", str(site_folder.path), "--device", "temp-1"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "there is no device 'temp-1'" in told.err
    assert "did you mean 'temp-101'?" in told.err
    for words in (["--output", str(whole)], ["--access-control", "acl_file"]):
        with pytest.raises(SystemExit) as stop:
            main(["compile", str(site_folder.path), "--device", "temp-101", *words])
        assert stop.value.code == 2


@pytest.mark.parametrize("command", ["check", "compile"])
def test_a_refused_site_prints_its_problems_and_nothing_else(
    site_folder: SiteFolder, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    site_folder.write(policy="version: 1\nroles:\n  sensor:\n    allow: {publish: [a/#/b, c+]}\n")
    assert main([command, str(site_folder.path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 2
    start = f"{site_folder.path / 'policy.yml'}:4: role 'sensor': topic filter"
    assert lines[0].startswith(f"{start} 'a/#/b' has '#' in level 2")
    assert ". Cure: let # be the whole last level" in lines[0]
    assert lines[0].endswith(" [topic-hash]")
    assert lines[1].startswith(f"{start} 'c+'")


@pytest.mark.parametrize("command", ["check", "compile"])
def test_every_kind_of_check_runs(site_folder: SiteFolder, capsys: pytest.CaptureFixture[str], command: str) -> None:
    site_folder.write_data(
        devices=[{"id": "d", "location": "l", "roles": ["r"], "key_types": ["P-384"]}],
        roles={"r": {"allow": {"publish": ["a/#"], "subscribe": ["a/#"]}, "deny": {"publish": ["a/x"]}}},
        tests=[{"device": "d", "can": {"publish": ["a/x"]}}],
    )
    acl_file = ["--access-control", "acl_file"]
    assert main([command, str(site_folder.path), *acl_file]) == 1
    errors = capsys.readouterr().err
    for code in ("test-failed", "acl-one-sided-deny", "key-type"):
        assert f"[{code}]" in errors
    assert main([command, str(site_folder.path), "--key-type", "P-384", *acl_file]) == 1
    assert "[key-type]" not in capsys.readouterr().err
    assert main([command, str(site_folder.path), "--access-control", "plugin"]) == 1
    errors = capsys.readouterr().err
    assert "[test-failed]" in errors
    assert "[acl-" not in errors


def test_warnings_go_to_stderr_and_refuse_nothing(site_folder: SiteFolder, capsys: pytest.CaptureFixture[str]) -> None:
    site_folder.write(policy='version: 1\nroles:\n  sensor: {allow: {publish: ["a"]}}\n  spare: {}\n')
    assert main(["compile", str(site_folder.path)]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["summary"]["roles"] == 2
    assert "policy.yml:4: warning: no device has the role 'spare'" in output.err


def test_check_says_what_it_saw(site_folder: SiteFolder, capsys: pytest.CaptureFixture[str]) -> None:
    site_folder.write(devices="version: 1\ndevices: [{id: a, location: l, roles: [sensor], enrolment: csr}]\n")
    assert main(["check", str(site_folder.path)]) == 0
    path = site_folder.path
    assert capsys.readouterr().out == (
        f"{path}: fine. Devices: 1 (revoked: 0). Roles: 1. Policy tests: 0.\na waits for {path}/csr/a.csr\n"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--publish", "sensors/temp-101/t"],
            "temp-101 may publish to sensors/temp-101/t\n  because role 'sensor' allows",
        ),
        (
            ["--publish", "x"],
            "temp-101 may NOT publish to x\n  because no rule allows publish 'x', and silence is deny\n",
        ),
        (["--subscribe", "#"], "temp-101 may NOT subscribe to #\n  because no rule allows"),
    ],
)
def test_explain_names_the_rule(
    site_folder: SiteFolder, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    explain = ["explain", str(site_folder.path), "--device", "temp-101", *words]
    assert main(explain) == 0
    output = capsys.readouterr().out
    assert output.startswith(expected)
    assert ("policy.yml:5)" in output) is ("may publish" in output)
    assert ("  rule role/sensor/allow/publish/0\n" in output) is ("may publish" in output)
    assert "SUBSCRIBE" not in output
    assert main([*explain, "--access-control", "acl_file"]) == 0
    output = capsys.readouterr().out
    assert ("accepts the SUBSCRIBE all the same and delivers nothing" in output) is (words[0] == "--subscribe")


def test_explain_refuses_an_unknown_device_and_a_bad_topic(
    site_folder: SiteFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(site_folder.path), "--device", "temp-110", "--publish", "a"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "there is no device 'temp-110'" in output.err
    assert "did you mean 'temp-101'?" in output.err
    assert main(["explain", str(site_folder.path), "--device", "temp-101", "--publish", "a/+"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "bednet: topic 'a/+' contains the wildcard '+'" in output.err
    assert "Cure: name one topic" in output.err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["check"],
        ["compile", "x", "--key-type", "P-521"],
        ["explain", "x", "--device", "d"],
        ["explain", "x", "--device", "d", "--publish", "a", "--subscribe", "b"],
        ["explain", "x", "--publish", "a"],
        ["explain", "x", "--device", "d", "--publish", "a", "--strictest"],
    ],
)
def test_a_wrong_command_line_is_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: bednet" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "compile"])
@pytest.mark.parametrize("words", [[], ["--access-control", "plugin"]])
def test_strictest_is_for_an_acl_file_only(command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, str(EXAMPLE), "--strictest", *words])
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert f"bednet {command}: error: argument --strictest: needs --access-control acl_file" in output.err


# The example plant


@pytest.mark.parametrize("mode", [["plugin"], ["acl_file", "--strictest"]])
def test_the_example_plant_compiles_without_a_warning(capsys: pytest.CaptureFixture[str], mode: list[str]) -> None:
    assert main(["compile", str(EXAMPLE), "--access-control", *mode]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    summary = json.loads(output.out)["summary"]
    assert (summary["devices"], summary["revoked"], summary["waiting_for_csr"]) == (28, 1, 1)
    assert (summary["password"], summary["psk"], summary["token"]) == (3, 1, 3)
    assert (summary["roles"], summary["rules"], summary["issuers"]) == (7, 5, 1)


def test_an_acl_file_cannot_say_all_of_the_example_plant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(EXAMPLE), "--access-control", "acl_file"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line.rsplit(" ", 1)[1] for line in errors] == [
        "[acl-psk]",
        *["[acl-token]"] * 3,
        *["[acl-condition]"] * 3,
    ]
    for line, name in zip(errors[-3:], ("shift-log", "maintenance-window", "reports-in-the-office"), strict=True):
        assert f": rule '{name}' allows " in line


def test_the_example_plants_small_module_holds_a_key_type_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(EXAMPLE), "--key-type", "RSA-2048"]) == 1
    lines = (EXAMPLE / "devices.yml").read_text(encoding="utf-8").splitlines()
    line = lines.index("    key_types: [P-256]") + 1
    assert f"devices.yml:{line}: device 'temp-104' cannot verify RSA-2048" in capsys.readouterr().err
