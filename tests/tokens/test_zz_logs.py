# SPDX-License-Identifier: Apache-2.0
"""The last test of all suites on the lab: nothing secret of this run stands in any log of any host.

The sharp edge: a secret that somebody logs where nobody looks.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.tokens.conftest import claims

if TYPE_CHECKING:
    from tests.conftest import Plant
    from tests.tokens.conftest import Tokens

pytestmark = pytest.mark.lab

LOGS = """
journalctl --no-pager --all --output=cat
find /var/log -type f -not -path '/var/log/journal/*' -exec cat {} +
"""
# A signed token of any kind, and any private key.
TOKEN = re.compile(rb"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}")
KEY = re.compile(rb"PRIVATE KEY-----")
SECRET_FILES = ("password", "psk", "client_secret", "key.pem")


def _secrets(plant: Plant) -> dict[str, bytes]:
    """Return whatever the devices' bundles hold that is secret; of a key its first line."""
    found = {}
    for path in sorted(plant.folder.glob("*/*")):
        if path.name in SECRET_FILES:
            text = path.read_bytes().strip()
            found[f"{path.parent.name}/{path.name}"] = text.splitlines()[1] if path.name == "key.pem" else text
    return found


def test_no_token_secret_or_key_of_this_run_is_in_any_log(plant: Plant, tokens: Tokens) -> None:
    token = tokens.source("edge-2").get()
    secrets = _secrets(plant)
    assert {name.partition("/")[2] for name in secrets} == set(SECRET_FILES)
    logs = {name: host.exec(["sh", "-c", LOGS]).raw for name, host in plant.lab.hosts.items()}
    # The logs are the ones: they tell of the token that was just issued, and of who came in.
    assert claims(token)["jti"].encode() in logs["gateway-1"]
    assert b"as edge-2" in logs["gateway-2"]
    for name, log in logs.items():
        assert TOKEN.search(log) is None, f"{name} logs a token"
        assert KEY.search(log) is None, f"{name} logs a key"
        assert [what for what, secret in secrets.items() if secret in log] == [], f"{name} logs a secret"
    # Nor in what the playbooks told here.
    told = (plant.lab.folder / "ansible.log").read_bytes()
    assert TOKEN.search(told) is None
    assert [what for what, secret in secrets.items() if secret in told] == []
