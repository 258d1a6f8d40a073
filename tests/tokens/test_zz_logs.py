# SPDX-License-Identifier: Apache-2.0
"""The last test of all suites on the lab: nothing secret of this run stands in any log of any host.

The sharp edge: a secret that somebody logs where nobody looks, in a form that nobody looks for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bednet.probe import enter
from tests.conftest import Plant
from tests.tokens.conftest import claims
from tests.tokens.logs import SECRET_FILES, check_silence, logs_of, secrets_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.tokens.conftest import Tokens

pytestmark = pytest.mark.lab


def test_no_token_secret_or_key_of_this_run_is_in_any_log(plant: Plant, tokens: Tokens, tmp_path: Path) -> None:
    token = tokens.source("edge-2").get()
    assert enter(tokens.listener("edge-2", "gateway-2"), tokens.credentials("edge-2", token)).accepted
    asked = tokens.onboard("edge-2")
    # What the devices had when the run began, and what some were given anew meanwhile.
    now = Plant(plant.lab, tmp_path)
    now.fetch_bundles()
    secrets = secrets_of(plant.folder) | {f"new {name}": secret for name, secret in secrets_of(now.folder).items()}
    assert {name.rpartition("/")[2] for name in secrets} >= set(SECRET_FILES)
    for code in ("device_code", "user_code"):
        secrets[code] = asked[code].encode()
    secrets["user_code, as it is typed"] = asked["user_code"].replace("-", "").encode()
    logs = logs_of(plant.lab)
    # The logs are the ones: they tell of the token that was just issued, who asked to be let in, and who came in.
    assert claims(token)["jti"].encode() in logs["gateway-1"]
    assert b'"event": "device-asks", "client": "edge-2"' in logs["gateway-1"]
    assert b"as edge-2" in logs["gateway-2"]
    assert b"token_service" in logs["ansible.log"]
    check_silence(logs, secrets)
