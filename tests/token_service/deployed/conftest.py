# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the deployed token service's tests, which tests/packaging runs in containers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.token_service.deployed.service import NGINX, deploy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.token_service.deployed.service import Deployed


@pytest.fixture(scope="session")
def nginx() -> None:
    """Leave out, and say so, what needs nginx on a machine that has none; in the containers nothing may be left out."""
    if NGINX is None:
        pytest.skip("no nginx here: install it, or name it in BEDNET_NGINX")


@pytest.fixture(scope="session")
def deployed(nginx: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """The service behind nginx, for the whole run."""
    with deploy(tmp_path_factory.mktemp("deployed")) as found:
        yield found
