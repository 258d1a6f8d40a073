# SPDX-License-Identifier: Apache-2.0
"""Reading YAML: every value knows its line, and what plain YAML of a site may not contain is refused, all at once."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from bednet import yamlfile
from bednet.errors import Place

if TYPE_CHECKING:
    from pathlib import Path


def load(tmp_path: Path, content: str | bytes) -> tuple[yamlfile.Node | None, list[tuple[int, str, str, str]]]:
    path = tmp_path / "file.yml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    root, problems = yamlfile.load(path)
    assert all(problem.place.file == str(path) for problem in problems)
    return root, [(problem.place.line, problem.code, problem.message, problem.cure) for problem in problems]


@pytest.mark.parametrize(
    ("content", "line", "code", "message", "cure"),
    [
        ("", 1, "file-empty", "the file is empty", "begin it with 'version: 1'"),
        ("# only a comment\n", 1, "file-empty", "the file is empty", "begin it with"),
        ("---\n", 1, "file-empty", "the file is empty", "begin it with"),
        ("\n- a\n- b\n", 2, "wrong-type", "must be a mapping", "begin it with"),
        ("just words\n", 1, "wrong-type", "must be a mapping", "begin it with"),
        (b"a: 1\nb: \xe9\n", 2, "not-utf8", "byte 0xE9 is not UTF-8", "encoding UTF-8"),
        ("a: 1\n".encode("utf-16"), 1, "not-utf8", "byte 0xFF", "encoding UTF-8"),
        ("a: 1\nb: \x07\n", 2, "yaml-control", "invisible character U\\+0007", "delete it"),
        ("a:\n\t- b\n", 2, "yaml-tab", "a tab, where YAML wants spaces", "indent with spaces"),
        ("a:\n  - b\n c: d\n", 3, "yaml-syntax", "not valid YAML", "check indentation"),
        ("a: [1, 2\nb: 3\n", 2, "yaml-syntax", "flow sequence that begins in line 1", "brackets"),
        ("a: [s/{device.id}/#]\n", 1, "yaml-syntax", "not valid YAML", "put each topic with {...} in quotes"),
        ("a: 1\na: 2\n", 2, "duplicate-key", "'a' stands here again; it stands in line 1", "remove one of the two"),
        ("a:\n  b: 1\n  c: 1\n  b: 2\n", 4, "duplicate-key", "in line 2 already", "remove one"),
        ("1: a\n", 1, "yaml-key", "a key must be text, not 1", "in quotes"),
        ("true: a\n", 1, "yaml-key", "a key must be text, not True", "in quotes"),
        ("? [a]\n: b\n", 1, "yaml-key", "not a list or mapping", "in quotes"),
        ("a: *b\n", 1, "yaml-alias", r"'\*b' refers to another value", "write the value out"),
        ("a: &b 1\n", 1, "yaml-alias", "'&b' names a value", "write the value out"),
        ("a: !!python/name:os.system x\n", 1, "yaml-tag", "the YAML tag", "write the plain value"),
        ("a: !vault x\n", 1, "yaml-tag", "the YAML tag '!vault'", "write the plain value"),
        ("a: 1\n---\nb: 1\n", 2, "yaml-documents", "a second document begins here", "take this '---' out"),
        ("a: " + "[" * 40 + "]" * 40, 1, "yaml-depth", "nested more than 32 levels", "check brackets"),
        ("a: " + "[" * 100000, 1, "yaml-depth", "nested more than 32 levels", "check brackets"),
        ("a: " + "{a: " * 5000, 1, "yaml-depth", "nested more than 32 levels", "check brackets"),
    ],
)
def test_what_is_no_plain_yaml_is_refused(
    tmp_path: Path,
    documented_codes: frozenset[str],
    content: str | bytes,
    line: int,
    code: str,
    message: str,
    cure: str,
) -> None:
    _, problems = load(tmp_path, content)
    assert [(found_line, found_code) for found_line, found_code, _, _ in problems] == [(line, code)]
    assert re.search(message, problems[0][2])
    assert code in documented_codes
    assert cure in problems[0][3]


def test_an_alias_bomb_is_refused_without_being_unfolded(tmp_path: Path) -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    root, problems = load(tmp_path, bomb)
    assert root is None
    assert {code for _, code, _, _ in problems} == {"yaml-alias"}
    assert len(problems) == 9 + 8 * 9


def test_a_missing_file_is_a_problem_with_a_cure(tmp_path: Path) -> None:
    root, problems = yamlfile.load(tmp_path / "none.yml")
    assert root is None
    assert [(problem.code, problem.message) for problem in problems] == [("file-missing", "there is no such file")]
    assert "create it" in problems[0].cure


def test_a_folder_in_place_of_a_file_is_a_problem(tmp_path: Path) -> None:
    _, problems = yamlfile.load(tmp_path)
    assert [(problem.code, problem.cure) for problem in problems] == [
        ("file-unreadable", "make it a file that you may read")
    ]


def test_a_huge_file_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yamlfile, "MAX_FILE_BYTES", 1024 * 1024)
    _, problems = load(tmp_path, b"#" * (1024 * 1024 + 1))
    assert [code for _, code, _, _ in problems] == ["file-too-large"]
    assert load(tmp_path, b"a: 1" + b"\n" * (1024 * 1024 - 4))[1] == []


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    root, problems = load(tmp_path, "a: 1\na: 2\n3: x\nb: !!set {}\nb: 1\n")
    assert root is not None
    assert [(line, code) for line, code, _, _ in problems] == [
        (2, "duplicate-key"),
        (3, "yaml-key"),
        (4, "yaml-tag"),
        (5, "duplicate-key"),
    ]
    assert root.plain() == {"a": 1, "b": {}}, "the first of two stands"


def test_values_and_keys_know_their_line(tmp_path: Path) -> None:
    root, problems = load(tmp_path, "\ufeff# comment\na: 1\nlist:\n  - x\n  -\n    y: {z: 2,\n      zz: 3}\n")
    assert problems == []
    assert root is not None
    file = str(tmp_path / "file.yml")
    assert root.keys["list"] == Place(file, 3)
    assert root.at(["list", 0]).place == Place(file, 4)
    assert root.at(["list", 1, "y", "zz"]).place == Place(file, 7)
    assert root.at(["list", 1, "y"]).keys["zz"] == Place(file, 7)
    assert root.at(["list", 9, "y"]).place == Place(file, 4), "follows a path as far as it leads"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("0101", "0101"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("1e9", "1e9"),
        ("9" * 5000, "9" * 5000),
        ("-7", -7),
        ("1.5", 1.5),
        ("'1'", "1"),
        ("true", True),
        ("'true'", "true"),
        ("null", None),
        ("~", None),
        ("", None),
        ("sensors/{device.id}/#", "sensors/{device.id}/#"),
        ("#", None),
    ],
)
def test_unquoted_words_mean_what_they_look_like(tmp_path: Path, written: str, value: object) -> None:
    root, problems = load(tmp_path, f"a: {written}\n")
    assert problems == []
    assert root is not None
    assert root.plain() == {"a": value}
