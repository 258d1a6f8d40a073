# SPDX-License-Identifier: Apache-2.0
"""What revoke.yml says to a host of the token service that is neither the CA nor a gateway.

The sharp edge: the list of devices was read for others, and this host is not told that the device was let in again
before; then an older copy of the list, which says so, would let it in once more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
MARK = "2026-11-22T20:00:00Z"
PLAY = """
- hosts: token_service
  gather_facts: false
  tasks:
    - ansible.builtin.import_role:
        name: token_service
        tasks_from: revoke.yml
"""


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (f"temp-1 is revoked now (reinstated before, at {MARK}).", [f"--reinstated={MARK}"]),
        ("temp-1 is revoked now.", []),
    ],
    ids=["reinstated before", "never"],
)
def test_a_host_apart_is_told_when_the_device_was_let_in_again(tmp_path: Path, said: str, words: list[str]) -> None:
    inventory = {
        "ca": {"hosts": {"authority": {"__bednet_listed": {"stdout": said}}}},
        "gateways": {"hosts": {"gateway-1": {}}},
        "token_service": {
            "hosts": {"apart": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}}
        },
    }
    # This machine may be a token service: another command is run, which writes down how.
    command, written = tmp_path / "command", tmp_path / "written"
    command.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{written}\nexit 7\n', encoding="ascii")
    command.chmod(0o700)
    (tmp_path / "hosts.json").write_text(json.dumps(inventory), encoding="utf-8")
    (tmp_path / "play.yml").write_text(PLAY, encoding="utf-8")
    done = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "ansible-playbook"), "-i", "hosts.json", "play.yml"),
            *("-e", "device=nobody-at-all", "-e", "reason=superseded", "-e", f"__token_service_command={command}"),
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "ANSIBLE_ROLES_PATH": str(CHECKOUT / "roles"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_LOCALHOST_WARNING": "0",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode != 0
    wanted = ["revoke", "--device", "nobody-at-all", "--reason", "superseded", *words]
    assert written.read_text(encoding="utf-8").splitlines() == wanted, done.stdout + done.stderr
