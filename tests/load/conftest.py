# SPDX-License-Identifier: Apache-2.0
"""What the tests of the load tests share: the example plant, and how a tally is made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from bednet.site import Site, load_site

EXAMPLE = Path(__file__).resolve().parents[2] / "inventories/example-plant"


@pytest.fixture(scope="session")
def example() -> Site:
    """The example plant's devices and policy."""
    return load_site(EXAMPLE)
