# SPDX-License-Identifier: Apache-2.0
"""Devices from lists that other programs write: the same devices and the same refusals, whatever the list looks like.

Sharp edges pinned down here: what spreadsheets do to a CSV (semicolons, BOM, quotes, empty columns), a JSON file that
is read piece by piece, and the quick look at an entry, which must never pass what the schema refuses.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bednet import devices_import
from bednet.devices_import import load_devices
from bednet.errors import Place, SiteError
from bednet.shape import check_shape
from bednet.site import load_site

if TYPE_CHECKING:
    from bednet.devices import Device
    from bednet.errors import Problem

NOWHERE = Place("", 0)
FILES = ("devices.csv", "devices.json", "devices.jsonl")

ENTRIES: list[dict[str, Any]] = [
    {"id": "temp-101", "location": "hall-1", "roles": ["sensor"]},
    {
        "id": "0101",
        "location": "2",
        "roles": ["sensor", "display"],
        "type": "panel",
        "tags": ["FactoryFloor", "Cold_Store"],
        "attributes": {"line": 7, "slot": "007", "rate": 0.5, "spare": True, "name": "Tür, links"},
        "authentication": ["certificate", "password"],
        "key_types": ["P-256", "RSA-2048"],
        "until": "2026-12-31T18:00:00+01:00",
        "revoked": "keyCompromise",
    },
    {"id": "c", "location": "hall-1", "roles": [], "enrolment": "csr"},
]
TABLE = [
    [
        *("id", "location", "roles", "type", "tags"),
        *(f"attributes.{name}" for name in ("line", "slot", "rate", "spare", "name")),
        *("authentication", "key_types", "until", "revoked", "enrolment"),
    ],
    ["temp-101", "hall-1", "sensor", *[""] * 12],
    [
        *("0101", "2", "sensor, display", "panel", "FactoryFloor|Cold_Store", "7", "007", "0.5", "true", "Tür, links"),
        *("certificate password", "P-256;RSA-2048", "2026-12-31T18:00:00+01:00", "keyCompromise", ""),
    ],
    ["c", "hall-1", *[""] * 12, "csr"],
]


def table(separator: str, end: str = "\n", space: str = "") -> str:
    """Return the devices above as CSV, with quotes around whatever might need them."""
    rows = [
        separator.join(f'{space}"{cell}"' if re.search(r"[,; ]", cell) else space + cell + space for cell in row)
        for row in TABLE
    ]
    return "".join(row + end for row in rows)


LISTS = {
    "commas": ("devices.csv", table(",")),
    "semicolons": ("devices.csv", table(";")),
    "tabs": ("devices.csv", table("\t")),
    "as Excel writes it": ("devices.csv", "\ufeff" + table(";", "\r\n")),
    "with Excel's first line": ("devices.csv", "sep=;\r\n" + table(";", "\r\n")),
    "empty columns and rows": (
        "devices.csv",
        "".join(f"{row};;\n" for row in table(";").splitlines()) + ";" * 16 + "\n\n",
    ),
    "spaces around cells": ("devices.csv", table(";", space="  ")),
    "a file in JSON": ("devices.json", json.dumps({"version": 1, "devices": ENTRIES})),
    "a file in JSON, the other way round": ("devices.json", json.dumps({"devices": ENTRIES, "version": 1}, indent=4)),
    "a list in JSON": ("devices.json", "\ufeff" + json.dumps(ENTRIES, ensure_ascii=False) + "\n\n"),
    "lines of JSON": ("devices.jsonl", "".join(json.dumps(entry) + "\n" for entry in ENTRIES)),
    "lines of JSON with room": ("devices.jsonl", "\n".join(json.dumps(entry) + "\r\n" for entry in ENTRIES)),
}


def bare(devices: dict[str, Device] | None) -> dict[str, Device]:
    """Return devices without the places where they stand."""
    assert devices is not None
    return {name: replace(device, place=NOWHERE, places={}) for name, device in devices.items()}


def load(folder: Path) -> tuple[dict[str, Device] | None, list[Problem]]:
    problems: list[Problem] = []
    return load_devices(folder, problems), problems


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, Device]:
    """What the devices are when a devices.yml says so."""
    folder = tmp_path / "yml"
    folder.mkdir()
    (folder / "devices.yml").write_text(json.dumps({"version": 1, "devices": ENTRIES}))
    devices, problems = load(folder)
    assert problems == []
    return bare(devices)


def test_the_devices_are_what_they_shall_be(expected: dict[str, Device]) -> None:
    assert list(expected) == ["temp-101", "0101", "c"]
    panel = expected["0101"]
    assert panel.attributes == {"line": 7, "slot": "007", "rate": 0.5, "spare": True, "name": "Tür, links"}
    assert panel.attributes["spare"] is True
    assert panel.until == datetime(2026, 12, 31, 17, tzinfo=UTC)
    assert panel.revoked == "keyCompromise"


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_a_list_says_the_same_as_a_devices_yml(
    tmp_path: Path, expected: dict[str, Device], monkeypatch: pytest.MonkeyPatch, name: str, piece: int
) -> None:
    file, text = LISTS[name]
    monkeypatch.setattr(devices_import, "_CHUNK", piece)
    (tmp_path / file).write_text(text, encoding="utf-8", newline="")
    devices, problems = load(tmp_path)
    assert problems == []
    assert bare(devices) == expected


def test_several_lists_are_one_site(tmp_path: Path) -> None:
    (tmp_path / "devices.yml").write_text(
        "version: 1\ndevices:\n  - id: y\n    location: hall-1\n    roles: [sensor]\n"
    )
    (tmp_path / "devices.csv").write_text("id,location,roles\nt,hall-1,sensor\n")
    (tmp_path / "devices.json").write_text('[{"id": "j", "location": "hall-1", "roles": ["sensor"]}]')
    (tmp_path / "devices.jsonl").write_text('{"id": "l", "location": "hall-1", "roles": ["sensor"]}\n')
    (tmp_path / "policy.yml").write_text("version: 1\nroles:\n  sensor:\n    allow: {publish: [a]}\n")
    site = load_site(tmp_path)
    assert sorted(site.devices) == ["j", "l", "t", "y"]
    assert str(site.devices["t"].place) == f"{tmp_path / 'devices.csv'}:2"
    assert str(site.devices["y"].place) == f"{tmp_path / 'devices.yml'}:3"


def test_a_site_needs_one_list_at_least(tmp_path: Path) -> None:
    devices, problems = load(tmp_path)
    assert devices is None
    assert [(problem.code, problem.place) for problem in problems] == [
        ("file-missing", Place(str(tmp_path / "devices.yml"), 1))
    ]


CSV, JSON, LINES = FILES
HEADER = "id,location,roles\n"
GOOD = '{"id": "a", "location": "x", "roles": []}'

REFUSED: list[tuple[str, str, str | bytes, list[tuple[int, str, str]]]] = [
    ("an empty table", CSV, "", [(1, "file-empty", "the file is empty. Cure: begin the file with the names")]),
    ("nothing but Excel's line", CSV, "sep=,\n", [(1, "file-empty", "the file is empty")]),
    ("a space behind quotes", CSV, f'{HEADER}a,x,"r" \n', [(2, "csv-syntax", "not valid CSV")]),
    (
        "a column in capitals",
        CSV,
        "ID,location,roles\n",
        [
            (1, "unknown-column", "'ID'. Cure: did you mean 'id'? An attribute's column is called 'attributes.ID'"),
            (1, "missing-column", "there is no column 'id'. Cure: let the first line name the columns"),
        ],
    ),
    ("a word for revoked", CSV, "id,location,roles,revokd\n", [(1, "unknown-column", "did you mean 'revoked'?")]),
    ("an attribute without a name", CSV, "id,location,roles,attributes.\n", [(1, "unknown-column", "'attributes.'")]),
    ("a column for all attributes", CSV, "id,location,roles,attributes\n", [(1, "unknown-column", "'attributes'")]),
    ("a column twice", CSV, "id,location,roles,id\n", [(1, "column-twice", "the column 'id' stands here twice")]),
    (
        "no header",
        CSV,
        "temp-101,hall-1,sensor\n",
        [
            (1, "unknown-column", "unknown column 'temp-101'"),
            (1, "unknown-column", "unknown column 'hall-1'"),
            (1, "unknown-column", "unknown column 'sensor'"),
            (1, "missing-column", "there is no column 'id', 'location', 'roles'"),
        ],
    ),
    (
        "too many cells",
        CSV,
        f"{HEADER}a,x,r\nb,x,r,s\n",
        [(3, "csv-ragged", "this row has 4 cells, and the header has 3. Cure: put text with separators")],
    ),
    (
        "too few cells",
        CSV,
        f"{HEADER}a,x\nb,x,r\nc\n",
        [(2, "csv-ragged", "this row has 2 cells"), (4, "csv-ragged", "this row has 1 cells")],
    ),
    (
        "a cell without a column",
        CSV,
        "id,location,roles,\na,x,r,y\n",
        [(2, "csv-ragged", "cell 4 is 'y', and its column")],
    ),
    (
        "text behind a quote",
        CSV,
        f'{HEADER}a,x,r\nb,x,"r"s\n',
        [(3, "csv-syntax", "not valid CSV: ',' expected after '\"'")],
    ),
    (
        "a quote that stays open",
        CSV,
        f'{HEADER}a,x,"r\nb,x,r\n',
        [(2, "csv-syntax", "the row that begins here is not valid")],
    ),
    ("an endless cell", CSV, f'{HEADER}a,x,"{"r" * 200_000}"\n', [(2, "csv-syntax", "field larger than field limit")]),
    (
        "another encoding",
        CSV,
        HEADER.encode() + "a,x,r\nb,Tür,r\n".encode("latin-1"),
        [(3, "not-utf8", "byte 0xFC is not UTF-8. Cure: save the file in the encoding UTF-8 (in Excel: 'CSV UTF-8')")],
    ),
    ("Excel's Unicode", CSV, HEADER.encode("utf-16"), [(1, "not-utf8", "byte 0xFF is not UTF-8")]),
    ("a NUL", CSV, f"{HEADER}a,x,r\nb,x\0,r\n", [(3, "csv-control", "the invisible character U+0000")]),
    ("no id", CSV, f"{HEADER}a,x,r\n,x,r\n", [(3, "missing-key", "device number 2: 'id' missing. Cure: add 'id'")]),
    ("no location", CSV, f"{HEADER}a,,r\n", [(2, "missing-key", "device 'a': 'location' missing")]),
    ("a bad id", CSV, f"{HEADER}a/b,x,r\n", [(2, "id-wildcard", "device id 'a/b' contains '/'")]),
    ("a reserved id", CSV, f"{HEADER}bednet-probe,x,r\n", [(2, "id-reserved", "begins with 'bednet-'")]),
    ("a bad location", CSV, f"{HEADER}a,hall 1,r\n", [(2, "bad-name", "device 'a': 'location' is 'hall 1'")]),
    ("a role twice", CSV, f"{HEADER}a,x,r r\n", [(2, "listed-twice", "device 'a': 'roles' contains 'r' twice")]),
    (
        "a wrong reason",
        CSV,
        "id,location,roles,revoked\na,x,r,stolen\n",
        [(2, "bad-value", "device 'a': 'revoked' is 'stolen'")],
    ),
    ("a wrong end", CSV, "id,location,roles,until\na,x,r,31.12.2026\n", [(2, "bad-time", "'until' is '31.12.2026'")]),
    (
        "an attribute with a name that is taken",
        CSV,
        "id,location,roles,attributes.type\na,x,r,t\n",
        [(2, "attribute-name", "an attribute cannot be called 'type'")],
    ),
    (
        "an attribute with a bad name",
        CSV,
        "id,location,roles,attributes.a b\na,x,r,t\n",
        [(2, "bad-name", "'a b' is not a valid")],
    ),
    (
        "twice in a table",
        CSV,
        f"{HEADER}a,x,r\nb,x,r\na,x,r\n",
        [
            (
                4,
                "device-twice",
                "device 'a' is listed again; it is listed in line 2 already. Cure: remove the entry in line 4 or",
            )
        ],
    ),
    ("a row over two lines", CSV, f'{HEADER}a,x,"r\ns"\nb/,x,r\n', [(4, "id-wildcard", "device id 'b/'")]),
    ("an empty file", JSON, " \n", [(1, "file-empty", "the file is empty")]),
    ("a text", JSON, '\n"devices"', [(2, "wrong-type", "the file must be an object or a list of devices")]),
    ("no version", JSON, '{"devices": []}', [(1, "missing-key", "'version' missing")]),
    ("no devices", JSON, '{"version": 1}', [(1, "missing-key", "'devices' missing")]),
    ("another version", JSON, '{"version": 2,\n"devices": []}', [(1, "version", "'version' is the number 2")]),
    (
        "another key",
        JSON,
        '{"version": 1, "devices": [],\n"device": []}',
        [(2, "unknown-key", "unknown key 'device'. Cure: did you mean 'devices'?")],
    ),
    (
        "devices that are none",
        JSON,
        '{"version": 1, "devices": {}}',
        [(1, "wrong-type", "'devices' is an empty mapping")],
    ),
    (
        "a key twice",
        JSON,
        '{"version": 1, "devices": [],\n"version": 1}',
        [(2, "duplicate-key", "the key 'version' stands here again")],
    ),
    (
        "a key twice in a device",
        JSON,
        '[\n{"id": "a", "id": "b"}]',
        [(2, "duplicate-key", "the key 'id' stands here twice")],
    ),
    ("a key that is a number", JSON, "{1: 2}", [(1, "json-syntax", "a key must be text in quotes")]),
    ("no colon", JSON, '{"version" 1}', [(1, "json-syntax", "':' must stand here")]),
    (
        "no comma",
        JSON,
        f"[\n{GOOD}\n{GOOD}]",
        [(3, "json-syntax", "',' must stand here, or before. Cure: check quotes, commas")],
    ),
    ("cut off", JSON, f'[{GOOD},\n{{"id": "b",\n"loc', [(3, "json-syntax", "not valid JSON: Unterminated string")]),
    ("cut off behind a device", JSON, f"[\n{GOOD}\n", [(3, "json-syntax", "',' must stand here")]),
    ("a comma too many", JSON, f"[{GOOD},\n]", [(2, "json-syntax", "not valid JSON: Expecting value")]),
    ("something behind", JSON, f"[{GOOD}]\n]", [(2, "json-syntax", "something follows the end")]),
    (
        "a number that is none",
        JSON,
        '[{"id": "a", "attributes": {"x": NaN}}]',
        [(1, "json-syntax", "NaN is no number of JSON")],
    ),
    ("too deep", JSON, "[" * 5_000, [(1, "json-syntax", "not valid JSON")]),
    ("a device that is a text", JSON, f'[{GOOD},\n"b"]', [(2, "wrong-type", "device number 2 is 'b'")]),
    (
        "an id that is a number",
        JSON,
        '[\n{"id": 7,\n"location": "x", "roles": []}]',
        [(2, "wrong-type", "device number 1: 'id' is the number 7")],
    ),
    (
        "an unknown key",
        JSON,
        '[{"id": "a", "location": "x", "roles": [], "rolls": []}]',
        [(1, "unknown-key", "device 'a': unknown key 'rolls'. Cure: did you mean 'roles'?")],
    ),
    (
        "a wrong way in",
        JSON,
        '[{"id": "a", "location": "x", "roles": [], "authentication": ["word"]}]',
        [(1, "bad-value", "device 'a': element 1 of 'authentication' is 'word'")],
    ),
    (
        "a role that is a list",
        JSON,
        '[{"id": "a", "location": "x", "roles": [["r"]]}]',
        [(1, "wrong-type", "element 1 of 'roles' is a list")],
    ),
    (
        "a line that is no JSON",
        LINES,
        f"{GOOD}\n\n{{'id': 'b'}}\n",
        [(3, "json-syntax", "not valid JSON: Expecting property name")],
    ),
    ("two devices in a line", LINES, f"{GOOD} {GOOD}\n", [(1, "json-syntax", "not valid JSON: Extra data")]),
    (
        "a list in a line",
        LINES,
        f"[{GOOD}]\n",
        [(1, "wrong-type", "this line is not an object. Cure: write a device in each line")],
    ),
    (
        "a key twice in a line",
        LINES,
        '{"id": "a", "id": "b"}\n',
        [(1, "duplicate-key", "the key 'id' stands here twice")],
    ),
    ("twice in lines", LINES, f"{GOOD}\n{GOOD}\n", [(2, "device-twice", "it is listed in line 1 already")]),
]


@pytest.mark.parametrize("piece", [5, 1 << 20])
@pytest.mark.parametrize(
    ("file", "content", "expectations"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_what_is_wrong_is_told_with_file_line_and_cure(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    content: str | bytes,
    expectations: list[tuple[int, str, str]],
    piece: int,
) -> None:
    monkeypatch.setattr(devices_import, "_CHUNK", piece)
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    _, problems = load(tmp_path)
    told = [str(problem) for problem in problems]
    assert len(told) == len(expectations), told
    for text, (line, code, words) in zip(told, expectations, strict=True):
        assert text.startswith(f"{tmp_path / file}:{line}: ")
        assert words in text
        assert text.endswith(f". [{code}]")
        assert ". Cure: " in text


def test_a_device_in_two_files_is_refused_with_both_places(tmp_path: Path) -> None:
    (tmp_path / CSV).write_text(f"{HEADER}a,x,r\n")
    (tmp_path / LINES).write_text(f"\n{GOOD}\n")
    _, (problem,) = load(tmp_path)
    first = tmp_path / CSV
    assert str(problem) == (
        f"{tmp_path / LINES}:2: device 'a' is listed again; it is listed in {first}:2 already. "
        f"Cure: remove the entry here or the one in {first}:2. [device-twice]"
    )


def test_a_role_that_the_policy_lacks_is_told_with_the_line_of_the_table(tmp_path: Path) -> None:
    (tmp_path / CSV).write_text(f"{HEADER}a,x,sensor\nb,x,senser\n")
    (tmp_path / "policy.yml").write_text("version: 1\nroles:\n  sensor:\n    allow: {publish: [a]}\n")
    with pytest.raises(SiteError, match=r"devices\.csv:3: device 'b' has the role 'senser'.*did you mean 'sensor'"):
        load_site(tmp_path)


def test_a_list_that_stops_early_does_not_make_its_devices_unknown(tmp_path: Path) -> None:
    (tmp_path / CSV).write_text(f'{HEADER}a,x,"sensor\n')
    (tmp_path / "policy.yml").write_text(
        "version: 1\nroles:\n  sensor:\n    allow: {publish: [a]}\ntests:\n  - device: a\n    can: {publish: [a]}\n"
    )
    with pytest.raises(SiteError) as refusal:
        load_site(tmp_path)
    assert [problem.code for problem in refusal.value.problems] == ["csv-syntax"]


def test_a_list_that_is_wrong_all_over_is_not_read_to_its_end(tmp_path: Path) -> None:
    rows = devices_import.MOST_PROBLEMS + 5
    (tmp_path / CSV).write_text(HEADER + "a/b,x,r\n" * rows)
    devices, problems = load(tmp_path)
    assert devices is None
    assert [problem.code for problem in problems[-2:]] == ["id-wildcard", "too-many-problems"]
    assert len(problems) == devices_import.MOST_PROBLEMS + 1


def test_a_list_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / JSON).mkdir()
    devices, (problem,) = load(tmp_path)
    assert devices is None
    assert "the file cannot be read (Is a directory)" in str(problem)


words = st.sampled_from(
    ["a", "sensor", "hall-1", "P-256", "certificate", "csr", "keyCompromise", "", "a b", "x" * 65, "a\n"]
)
scalars = st.one_of(words, st.integers(-3, 3), st.booleans(), st.none(), st.floats(allow_nan=False), st.just(1 << 70))
anything = st.one_of(scalars, st.lists(scalars, max_size=3), st.dictionaries(words, scalars, max_size=2))
entries = st.fixed_dictionaries(
    {"id": st.one_of(words, scalars), "location": words, "roles": st.lists(words, max_size=2)},
    optional={
        "type": st.one_of(words, anything),
        "tags": st.one_of(st.lists(words, max_size=3), anything),
        "attributes": st.one_of(st.dictionaries(words, scalars, max_size=2), anything),
        "authentication": st.one_of(
            st.lists(st.sampled_from(["certificate", "password", "psk"]), max_size=3), anything
        ),
        "key_types": st.one_of(st.lists(st.sampled_from(["P-256", "Ed25519"]), max_size=3), anything),
        "enrolment": anything,
        "until": anything,
        "revoked": anything,
        "more": anything,
    },
)


@settings(deadline=None)
@given(st.one_of(entries, anything))
def test_the_quick_look_passes_nothing_that_the_schema_refuses(entry: object) -> None:
    if devices_import._Shape().is_sound(entry):
        root = devices_import._node({"version": 1, "devices": [entry]}, NOWHERE)
        assert check_shape("devices", root) == []


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["id"])
def test_the_quick_look_passes_what_is_usual(entry: dict[str, Any]) -> None:
    assert devices_import._Shape().is_sound(entry)


def test_every_code_is_in_the_manual() -> None:
    page = (Path(__file__).parents[3] / "docs/devices.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([a-z0-9-]+)`", page, re.MULTILINE))
    policy = (Path(__file__).parents[3] / "docs/policy.md").read_text(encoding="utf-8")
    codes = {code for row in REFUSED for _, code, _ in row[3]} | {"too-many-problems", "file-unreadable"}
    assert codes - documented <= set(re.findall(r"`([a-z0-9-]+)`", policy))
    assert documented <= codes
