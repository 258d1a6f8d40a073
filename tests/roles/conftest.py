# SPDX-License-Identifier: Apache-2.0
"""What the tests of the roles share: the scenario `alternative`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from testbed.lab import Lab
from tests.scenario import Scenario, deploy, forget_key_types, forget_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent


@pytest.fixture(scope="package")
def alternative_before() -> Iterator[Lab]:
    """A bare Debian 12 gateway with alternative.yml's variables, as long as this package's tests last."""
    with Lab.up("alternative", suite="bookworm", gateways=1, ca="localhost", field=False) as lab:
        variables = yaml.safe_load((HERE / "alternative.yml").read_text(encoding="utf-8"))
        variables["ca_home"] = str(lab.folder / "authority")
        # The last file of the folder wins.
        (lab.site / "group_vars/all/zz-alternative.yml").write_text(yaml.safe_dump(variables), encoding="utf-8")
        local = lab.site / "host_vars/localhost"
        local.mkdir(parents=True)
        (local / "main.yml").write_text("ansible_become: false\n", encoding="utf-8")
        yield lab


@pytest.fixture(scope="package")
def alternative(alternative_before: Lab) -> Scenario:
    """The scenario `alternative`: checked, converged (telling all that Ansible can tell) and run again."""
    forget_key_types(alternative_before.site)
    forget_tokens(alternative_before.site)
    return deploy(alternative_before, "-vvv", "--diff")
