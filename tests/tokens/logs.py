# SPDX-License-Identifier: Apache-2.0
"""All logs of a lab, and what must not be in them.

- :func:`logs_of`: what every host has logged, and what the playbooks told here.
- :func:`secrets_of`: what bundles hold that is secret, in each form that somebody might log.
- :func:`check_silence`: makes sure that nothing of it is in a log.
"""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from testbed.lab import Lab

LOGS = """
journalctl --no-pager --all --output=cat
find /var/log -type f -not -path '/var/log/journal/*' -exec cat {} +
"""
SECRET_FILES = ("password", "psk", "client_secret", "key.pem")
# Whoever they are of: a signed token of any kind, any private key, and a secret as RFC 7617 sends it.
KINDS = {
    "a token": re.compile(rb"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}"),
    "a key": re.compile(rb"PRIVATE KEY-----"),
    "a header with a secret": re.compile(rb"(?i)\bbasic [a-z0-9+/]{24,}"),
}


def logs_of(lab: Lab) -> dict[str, bytes]:
    """Return name -> log, of every host and of Ansible."""
    found = {name: host.exec(["sh", "-c", LOGS]).raw for name, host in lab.hosts.items()}
    return {**found, "ansible.log": (lab.folder / "ansible.log").read_bytes()}


def secrets_of(bundles: Path) -> dict[str, bytes]:
    """Return DEVICE/FILE -> secret; of a key its first line, and a client secret also as a header sends it."""
    found = {}
    for path in sorted(bundles.glob("*/*")):
        if path.name in SECRET_FILES:
            text = path.read_bytes().strip()
            found[f"{path.parent.name}/{path.name}"] = text.splitlines()[1] if path.name == "key.pem" else text
            if path.name == "client_secret":
                header = base64.b64encode(path.parent.name.encode() + b":" + text)
                found[f"{path.parent.name}/{path.name} in base64"] = header.rstrip(b"=")[:-1]
    return found


def check_silence(logs: Mapping[str, bytes], secrets: Mapping[str, bytes]) -> None:
    """Make sure that no log has a token, a key, or one of these secrets."""
    # A shorter one would be found by chance.
    assert [what for what, secret in secrets.items() if len(secret) < 8] == []
    for name, log in logs.items():
        assert [kind for kind, pattern in KINDS.items() if pattern.search(log)] == [], f"{name} logs what it must not"
        assert [what for what, secret in secrets.items() if secret in log] == [], f"{name} logs a secret"
