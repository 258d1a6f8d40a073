# SPDX-License-Identifier: Apache-2.0
"""The checkout is an Ansible collection as well: it builds, installs, and carries what its roles need and no more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def _galaxy(home: Path, *words: str) -> None:
    program = Path(sys.executable).parent / "ansible-galaxy"
    environment = {**os.environ, "ANSIBLE_HOME": str(home / "ansible"), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [program, "collection", *words], cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_collection_installs_with_all_that_its_roles_need(tmp_path: Path) -> None:
    _galaxy(tmp_path, "build", "--output-path", str(tmp_path))
    archive = next(tmp_path.glob("bednet-mqtt-*.tar.gz"))
    _galaxy(tmp_path, "install", str(archive), "-p", str(tmp_path), "--no-deps", "--offline")
    installed = tmp_path / "ansible_collections/bednet/mqtt"
    # Links of the checkout are files here.
    for path, original in (
        ("roles/ca/files/ca.py", "src/bednet/ca.py"),
        ("roles/mosquitto/files/crl_fetch.py", "src/bednet/crl_fetch.py"),
        ("roles/mosquitto/templates/_hardening.j2", "roles/ca/templates/_hardening.j2"),
    ):
        assert (installed / path).read_bytes() == (CHECKOUT / original).read_bytes()
    assert (installed / "playbooks/site.yml").exists()
    # No state, no keys, no environment.
    for path in (".bednet", ".venv", ".git"):
        assert not (installed / path).exists()
    assert not list(installed.rglob("vault.yml"))
