# SPDX-License-Identifier: Apache-2.0
"""What the tests of the plugin share: a CA, a site with a few devices, a broker with the plugin.

They run wherever there is a Mosquitto and a compiler; BEDNET_MOSQUITTO and BEDNET_PLUGIN name others than those of this
machine and this checkout. Each test has a broker of its own unless it says otherwise.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from tests.plugin.gateway import Gateway, Site, broker_program, password_record, plugin_path
from tests.plugin.pki import Authority

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = "00112233445566778899aabbccddeeff"
"""The pre-shared key of device psk-1; it begins with a zero byte, which careless conversions lose."""


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA; for the whole run."""
    return Authority.make(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site with a few devices, applied."""
    site = Site(tmp_path / "store")
    for device in ("temp-1", "temp-2"):
        site.add(device, "certificate", "password")
        site.passwords[device] = password_record(f"password of {device}")
    site.add("cert-only", "certificate")
    site.add("psk-1", "psk")
    site.psk["psk-1"] = KEY
    site.apply()
    return site


class Start(Protocol):
    """Starts a broker with a site; it runs until the test ends."""

    def __call__(self, **options: Any) -> Gateway: ...


@pytest.fixture
def start(tmp_path: Path, site: Site, authority: Authority) -> Iterator[Start]:
    """Starts brokers."""
    plugin_path()
    broker_program()
    with ExitStack() as stack:

        def run(**options: Any) -> Gateway:
            return stack.enter_context(Gateway(tmp_path, site, authority, **options))

        yield run


@pytest.fixture
def gateway(start: Start) -> Gateway:
    """A broker with the usual configuration."""
    return start()
