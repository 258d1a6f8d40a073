# SPDX-License-Identifier: Apache-2.0
"""What the tests of the lab itself share: one small lab, and a connection to the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from testbed import engine
from testbed.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator

    from docker import DockerClient


@pytest.fixture(scope="package")
def small() -> Iterator[Lab]:
    """A lab of one host, for the whole package; tests leave it as they found it."""
    with Lab.up("small", gateways=1, ca="gateway-1", field=False) as lab:
        yield lab


@pytest.fixture
def docker_client(small: Lab) -> Iterator[DockerClient]:
    """A connection to the engine that runs the small lab."""
    assert small.docker.ping()
    connection = engine.client()
    yield connection
    connection.close()
