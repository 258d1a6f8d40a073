# SPDX-License-Identifier: Apache-2.0
"""Sites made up for a test.

- fixture ``site_folder``: a site folder with helpers to fill it, load it and look at what is refused.
- fixtures ``policy_page`` and ``documented_codes``: docs/policy.md, and the codes in its table of problems.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bednet.commands import checked_site
from bednet.errors import Problem, SiteError

if TYPE_CHECKING:
    from bednet.site import Site

DEVICES = """\
version: 1
devices:
  - id: temp-101
    location: hall-1
    roles: [sensor]
"""
POLICY = """\
version: 1
roles:
  sensor:
    allow:
      publish: ["sensors/{device.id}/#"]
"""


@dataclass(frozen=True)
class SiteFolder:
    """A site's folder; both files are good until a test writes others."""

    path: Path
    documented_codes: frozenset[str]

    def write(self, *, devices: str | bytes = DEVICES, policy: str | bytes = POLICY) -> None:
        """Write the two files as they are."""
        for name, content in (("devices.yml", devices), ("policy.yml", policy)):
            raw = content if isinstance(content, bytes) else content.encode()
            (self.path / name).write_bytes(raw)

    def write_data(self, *, devices: list[object], roles: dict[str, object], tests: list[object] | None = None) -> None:
        """Write the two files from Python objects; JSON is YAML."""
        self.write(
            devices=json.dumps({"version": 1, "devices": devices}),
            policy=json.dumps({"version": 1, "roles": roles, "tests": tests or []}),
        )

    def load(self, key_type: str = "P-256") -> Site:
        """Read the site and run every check."""
        return checked_site(self.path, key_type)

    def problems(self, key_type: str = "P-256") -> list[Problem]:
        """Return why the site is refused."""
        with pytest.raises(SiteError) as refusal:
            self.load(key_type)
        problems = list(refusal.value.problems)
        assert {problem.code for problem in problems} <= self.documented_codes
        return problems

    def problem(self, code: str, key_type: str = "P-256") -> Problem:
        """Return the only problem with this code."""
        problems = self.problems(key_type)
        found = [problem for problem in problems if problem.code == code]
        assert len(found) == 1, "\n".join(str(problem) for problem in problems)
        return found[0]


@pytest.fixture(scope="session")
def policy_page() -> str:
    """The text of docs/policy.md."""
    return (Path(__file__).parents[3] / "docs" / "policy.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def documented_codes(policy_page: str) -> frozenset[str]:
    """The codes in the first column of the table of problems."""
    rows = re.findall(
        r"^\| (`[a-z0-9-]+`(?:, `[a-z0-9-]+`)*) \|", policy_page.split("## Problems and what")[1], re.MULTILINE
    )
    return frozenset(code for row in rows for code in re.findall(r"`([a-z0-9-]+)`", row))


@pytest.fixture
def site_folder(tmp_path: Path, documented_codes: frozenset[str]) -> SiteFolder:
    """A site folder with two good files, for one test."""
    (tmp_path / "csr").mkdir()
    folder = SiteFolder(tmp_path, documented_codes)
    folder.write()
    return folder
