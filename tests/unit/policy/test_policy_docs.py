# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/policy.md, run in their order in a site folder called ``plant``, and one called ``before``."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

import pytest

from bednet.acl_file import compile_acl_file
from bednet.cli import main
from bednet.commands import checked_site

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = re.compile(r"^```([a-z]+) ?([a-z./]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def console(text: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the commands of a console block; return the block as it should have been."""
    lines = []
    for command in re.findall(r"^\$ bednet (.*)$", text, re.MULTILINE):
        exit_code = main(shlex.split(command))
        output = capsys.readouterr()
        lines.append(f"$ bednet {command}\n{output.out}{output.err}")
        if exit_code:
            lines.append(f"exit code {exit_code}\n")
    return "".join(lines)


def test_every_example_says_what_happens(
    policy_page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "plant"
    for site in ("plant", "before"):
        (tmp_path / site).mkdir()
    kinds = []
    for kind, name, text in BLOCK.findall(policy_page):
        kinds.append(kind)
        if kind in ("yaml", "json"):
            (tmp_path / name if "/" in name else folder / name).write_text(text, encoding="utf-8")
        elif kind == "console":
            assert console(text, capsys) == text
        elif kind == "acl":
            assert compile_acl_file(checked_site(folder, access_control="acl_file")) == text
        else:
            pytest.fail(f"nobody runs blocks of the kind {kind!r}")
    assert len(kinds) == policy_page.count("\n```") // 2, "a block was not understood"
    assert set(kinds) == {"yaml", "json", "console", "acl"}
