# SPDX-License-Identifier: Apache-2.0
"""The pages keep what they promise: links lead somewhere, snippets are accepted, variables and tags exist.

The sharp edges: a heading that was renamed under its links, a device snippet that `bednet check` would refuse, an
inventory that Ansible reads differently, a variable or tag that is only in the text. The examples of docs/policy.md
have tests of their own, in tests/unit/policy.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bednet.commands import checked_site
from bednet.site import load_site

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("roles/*/README.md")})
OPERATIONS = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
ROLES = ("ca", "enrolment", "mosquitto", "token_service", "verification")
# Of programs, and of RFC 8628.
PROGRAMS = {"mosquitto_pub", "mosquitto_sub", "mosquitto_passwd", "verification_uri"}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def _anchors(page: Path) -> set[str]:
    """Name the headings of a page as GitHub does."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _snippets(text: str) -> list[Any]:
    return [yaml.safe_load(snippet) for snippet in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def _variables() -> set[str]:
    specs = [yaml.safe_load((ROOT / "roles" / role / "meta/argument_specs.yml").read_text("utf-8")) for role in ROLES]
    return {name for spec in specs for name in spec["argument_specs"]["main"]["options"]}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target} leads nowhere"
        assert file.is_relative_to(ROOT), f"{target} leads out of the checkout"
        if anchor:
            assert anchor in _anchors(file), f"{target}: no such heading"


def test_what_roles_call_by_name_is_a_heading_of_operations() -> None:
    """Messages of the roles send people to a heading of docs/operations.md."""
    tasks = "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("roles/*/tasks/*.yml")))
    named = re.findall(r'docs/operations\.md, "([^"]+)"', tasks)
    assert named
    assert set(named) <= set(re.findall(r"^## (.*)$", OPERATIONS, re.MULTILINE))


@every_page
def test_variables_in_the_text_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(rf"(?<![\w/-])(?:{'|'.join(ROLES)})_[a-z0-9_]+\b(?!\.py)", text))
    assert named - _variables() - PROGRAMS == set()


def test_device_snippets_are_accepted(tmp_path: Path) -> None:
    """Every device of docs/operations.md, one after the other, is a device that the site's check accepts."""
    lists = [snippet for snippet in _snippets(OPERATIONS) if isinstance(snippet, list)]
    assert len(lists) >= 3
    allow = {"publish": ["sensors/{device.id}/#"]}
    (tmp_path / "policy.yml").write_text(yaml.safe_dump({"version": 1, "roles": {"sensor": {"allow": allow}}}), "utf-8")
    devices = [device for snippet in lists for device in snippet]
    (tmp_path / "devices.yml").write_text(yaml.safe_dump({"version": 1, "devices": devices}), "utf-8")
    site = checked_site(tmp_path, "P-256")
    assert [device.id for device in site.devices.values()] == [device["id"] for device in devices]


@pytest.mark.parametrize("page", ["tokens", "plugin"])
def test_the_last_second_of_a_token_is_that_of_the_example_plant(page: str) -> None:
    """That gateways hold to it is in tests/plugin/test_plugin_token.py."""
    (service,) = (issuer for issuer in load_site(ROOT / "inventories/example-plant").issuers.values() if issuer.service)
    named = re.findall(r"`exp` \+ (\d+)", (ROOT / f"docs/{page}.md").read_text(encoding="utf-8"))
    assert [int(number) for number in named] == [service.leeway - 1, service.leeway]


def test_inventory_snippets_are_read_as_meant(tmp_path: Path) -> None:
    snippets = [snippet for snippet in _snippets(OPERATIONS) if isinstance(snippet, dict) and "ca" in snippet]
    assert len(snippets) == 2
    for number, snippet in enumerate(snippets):
        hosts = tmp_path / f"{number}.yml"
        hosts.write_text(yaml.safe_dump(snippet), encoding="utf-8")
        done = subprocess.run(
            [Path(sys.executable).with_name("ansible-inventory"), "-i", hosts, "--list"],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "ANSIBLE_HOME": str(tmp_path), "LC_ALL": "C.UTF-8"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert "WARNING" not in done.stderr
        inventory = json.loads(done.stdout)
        assert inventory["ca"]["hosts"] == list(snippet["ca"]["hosts"])


def test_tags_in_commands_exist() -> None:
    playbook = yaml.safe_load((ROOT / "playbooks/site.yml").read_text(encoding="utf-8"))
    # load_generator is load.yml's, which is no part of a site.
    tags = {role.name for role in (ROOT / "roles").iterdir()} - {"load_generator"}
    known = set(re.findall(r"\w+", " ".join(str(tag) for play in playbook for tag in _tags(play)))) | {"always"}
    used = {tag for page in PAGES for tag in re.findall(r"--tags[ =](\w+)", page.read_text(encoding="utf-8"))}
    assert used
    assert used <= known
    assert tags <= known, "a role of site.yml cannot be run by its tag"


def _tags(data: object) -> list[object]:
    if isinstance(data, list):
        return [tag for item in data for tag in _tags(item)]
    if isinstance(data, dict):
        return [*data.get("tags", []), *(tag for key, value in data.items() if key != "tags" for tag in _tags(value))]
    return []
