# SPDX-License-Identifier: Apache-2.0
"""The commands check, compile and explain: what they print where, and their exit codes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bednet import commands
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
    profile, device = capsys.readouterr().out.splitlines(keepends=True)
    assert json.loads(profile)["profile"] == json.loads(device)["profile"] == "sensor"
    assert {profile, device} <= set(whole.read_text(encoding="utf-8").splitlines(keepends=True))
    assert main(["compile", str(site_folder.path), "--device", "temp-1"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "there is no device 'temp-1'" in told.err
    assert "did you mean 'temp-101'?" in told.err
    for words in (["--output", str(whole)], ["--access-control", "acl_file"]):
        with pytest.raises(SystemExit) as stop:
            main(["compile", str(site_folder.path), "--device", "temp-101", *words])
        assert stop.value.code == 2


PLANT = """\
version: 1
roles:
  sensor:
    allow: {publish: ["sensors/{device.id}/#"]}
  plc:
    allow: {publish: ["plc/{device.line}/#"]}
rules:
  - name: floor
    when: "'FactoryFloor' in device.tags"
    during: [{hours: "06:00-22:00", zone: Europe/Berlin}]
    from: [10.0.0.0/8]
    allow: {publish: ["factory/{device.location}/#"]}
  - name: fast
    when: "has(device.line) && device.line > 5"
    deny: {publish: ["plc/7/slow"]}
tests:
  - {device: temp-101, can: {publish: [sensors/temp-101/x]}, cannot: {publish: [sensors/temp-102/x]}}
  - {device: temp-102, can: {publish: [sensors/temp-102/x]}}
"""


def entry_of(folder: Path, entry: object, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Compile an entry that lies in a file beside the site: the exit code, and what was printed where."""
    file = folder.parent / "entry.json"
    file.write_text(entry if isinstance(entry, str) else json.dumps(entry), encoding="utf-8")
    code = main(["compile", str(folder), "--entry", str(file), *words])
    told = capsys.readouterr()
    return code, told.out, told.err


ENTRIES: list[dict[str, object]] = [
    {"id": "temp-101", "location": "hall-1", "roles": ["sensor"]},
    {"id": "temp-102", "location": "hall-2", "roles": ["sensor"], "tags": ["FactoryFloor"], "revoked": "superseded"},
    {"id": "plc-1", "location": "hall-1", "roles": ["sensor", "plc"], "attributes": {"line": 7}},
    {"id": "plc-2", "location": "Ü-1", "roles": ["plc"], "tags": ["FactoryFloor"], "attributes": {"line": 2}},
    {
        "id": "edge-1",
        "location": "hall-1",
        "roles": [],
        "authentication": ["token", "psk"],
        "until": "2030-01-01T00:00:00Z",
        "reinstated": "2026-01-01T00:00:00Z",
    },
]


def test_an_entry_that_comes_from_elsewhere_is_compiled_as_it_is_among_all_devices(
    site_folder: SiteFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [{**entry, "location": str(entry["location"]).replace("Ü", "U")} for entry in ENTRIES]
    site_folder.write(devices=json.dumps({"version": 1, "devices": entries}), policy=PLANT)
    whole = tmp_path / "site.jsonl"
    assert main(["compile", str(site_folder.path), "--output", str(whole)]) == 0
    lines = set(whole.read_text(encoding="utf-8").splitlines(keepends=True))
    # The site's lists are not looked at: neither that they are there, nor what is in them.
    (site_folder.path / "devices.yml").write_text("nonsense: [")
    (site_folder.path / "devices.csv").write_text("nonsense")
    capsys.readouterr()
    for entry in entries:
        code, out, err = entry_of(site_folder.path, entry, capsys)
        assert code == 0, err
        assert "no-issuer" in err if "token" in str(entry) else err == ""
        profile, device = out.splitlines(keepends=True)
        assert json.loads(device)["device"] == entry["id"]
        assert json.loads(profile)["profile"] == json.loads(device)["profile"]
        assert {profile, device} <= lines


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ('{"id": "a", "id": "b"}', "duplicate-key"),
        ('{"id": "a"', "json-syntax"),
        ("[]", "wrong-type"),
        ("{}", "missing-key"),
        ({**ENTRIES[0], "rolse": []}, "unknown-key"),
        ({**ENTRIES[0], "id": 7}, "wrong-type"),
        ({**ENTRIES[0], "id": "a/#"}, "id-wildcard"),
        ({**ENTRIES[0], "id": "bednet-probe"}, "id-reserved"),
        ({**ENTRIES[0], "roles": ["senser"]}, "unknown-role"),
        ({**ENTRIES[0], "roles": "sensor"}, "wrong-type"),
        ({**ENTRIES[0], "revoked": "because"}, "bad-value"),
        ({**ENTRIES[0], "until": "soon"}, "bad-time"),
        ({**ENTRIES[0], "attributes": {"roles": "x"}}, "attribute-name"),
        ({**ENTRIES[2], "attributes": {"line": 7.5}}, "placeholder-value"),
        ({**ENTRIES[2], "attributes": {}}, "placeholder-value-missing"),
        ({**ENTRIES[2], "attributes": {"line": "x"}}, "when-failed"),
        ({**ENTRIES[0], "key_types": ["RSA-2048"]}, "key-type"),
        # Its tests are run, and no other's.
        ({**ENTRIES[0], "roles": []}, "test-failed"),
    ],
)
def test_an_entry_that_is_wrong_is_refused_by_itself(
    site_folder: SiteFolder, capsys: pytest.CaptureFixture[str], entry: object, code: str
) -> None:
    site_folder.write(policy=PLANT)
    exit_code, out, err = entry_of(site_folder.path, entry, capsys)
    assert (exit_code, out) == (1, "")
    assert f"[{code}]" in err
    assert {line.rpartition("[")[2].rstrip("]") for line in err.splitlines()} == {code}
    # Nobody knows here what other devices have.
    assert "no device has" not in err


def test_an_entry_is_refused_while_the_policy_is_wrong(
    site_folder: SiteFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    site_folder.write(policy=PLANT.replace("plc/7/slow", "plc/#/slow"))
    assert entry_of(site_folder.path, ENTRIES[0], capsys)[:2] == (1, "")
    assert entry_of(site_folder.path / "none", ENTRIES[0], capsys)[:2] == (1, "")
    (site_folder.path / "policy.yml").unlink()
    code, out, err = entry_of(site_folder.path, ENTRIES[0], capsys)
    assert (code, out) == (1, "")
    assert "[file-missing]" in err


def test_an_entry_with_a_csr_says_that_its_key_was_not_compared(
    site_folder: SiteFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    site_folder.write(policy=PLANT)
    csr = site_folder.path / "csr" / "temp-101.csr"
    entry = {**ENTRIES[0], "enrolment": "csr"}
    assert entry_of(site_folder.path, entry, capsys)[2] == ""
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    csr.write_bytes(request.public_bytes(serialization.Encoding.PEM))
    code, out, err = entry_of(site_folder.path, entry, capsys)
    assert (code, len(out.splitlines())) == (0, 2)
    assert "warning: nobody looked whether the key in the CSR of 'temp-101' is another device's" in err
    csr.write_text("junk")
    code, out, err = entry_of(site_folder.path, entry, capsys)
    assert (code, out) == (1, "")
    assert "[csr-invalid]" in err


def test_an_entry_comes_by_stdin_as_well(
    site_folder: SiteFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site_folder.write()

    def given(raw: bytes) -> tuple[int, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
        code = main(["compile", str(site_folder.path), "--entry", "-"])
        told = capsys.readouterr()
        assert (told.out == "") is (code == 1)
        return code, told.out + told.err

    assert given(json.dumps(ENTRIES[0]).encode())[0] == 0
    assert given(b"")[1].startswith("stdin:1: not valid JSON")
    assert "stdin:2: byte 0xFF is not UTF-8" in given(b'{\n"id": "\xff"}')[1]
    assert "more than 4194304 bytes" in given(b" " * (commands.MOST_ENTRY + 1))[1]


@pytest.mark.parametrize(
    "words", [["--output", "x"], ["--access-control", "acl_file"], ["--strictest"], ["--device", "temp-101"]]
)
def test_options_that_do_not_go_with_an_entry_are_refused(
    site_folder: SiteFolder, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    site_folder.write()
    with pytest.raises(SystemExit) as stop:
        entry_of(site_folder.path, ENTRIES[0], capsys, *words)
    assert stop.value.code == 2
    assert capsys.readouterr().out == ""


def test_an_entry_that_is_not_there_is_refused(site_folder: SiteFolder, capsys: pytest.CaptureFixture[str]) -> None:
    site_folder.write()
    assert main(["compile", str(site_folder.path), "--entry", str(site_folder.path / "none.json")]) == 1
    assert "No such file or directory. Cure: name a file" in capsys.readouterr().err


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
