# SPDX-License-Identifier: Apache-2.0
"""The package of the other architecture in that architecture's broker, its processor played by an emulator.

Run by test_brokers.py in a container; this file's name keeps it from being run anywhere else. The sharp edge is the
layout of the store and of the broker's structures, which C leaves to the architecture. What is not shown here: a store
that changes under the broker. LMDB's locks differ between architectures, and a host has but one of them.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.plugin.gateway import Gateway, Site, password_record
from tests.plugin.pki import Authority

if TYPE_CHECKING:
    from collections.abc import Iterator

# ELF's number of a machine, by Debian's name.
MACHINES = {"amd64": 62, "arm64": 183}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA."""
    return Authority.make(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Gateway]:
    """The broker with the plugin, for the whole file."""
    folder = tmp_path_factory.mktemp("gateway")
    site = Site(folder / "store")
    for device in ("temp-1", "temp-2"):
        site.add(device, "certificate", "password")
        site.passwords[device] = password_record(f"password of {device}")
    site.add("gone", "certificate", revoked="keyCompromise")
    site.apply()
    (site.folder / "lock.mdb").unlink()
    with Gateway(folder, site, authority) as running:
        yield running


@pytest.mark.parametrize("path", ["/usr/sbin/mosquitto", os.environ.get("BEDNET_PLUGIN", "/dev/null")])
def test_program_is_of_the_other_architecture(path: str) -> None:
    [machine] = struct.unpack_from("<H", Path(path).read_bytes(), 18)
    assert machine == MACHINES[os.environ["BEDNET_ARCHITECTURE"]]


def test_device_is_let_in_by_its_certificate_and_kept_to_its_topics(gateway: Gateway, authority: Authority) -> None:
    with gateway.session("temp-1", authority.device("temp-1")) as session:
        assert session.publish("sensors/temp-1/t", b"1").granted
        assert not session.publish("sensors/temp-2/t", b"1").granted
        assert not session.publish("sensors/temp-1/raw/t", b"1").granted
    event = gateway.audited(event="refused", action="publish", topic="sensors/temp-1/raw/t")
    assert (event["reason"], event["rule"]) == ("denied", "role/sensor/deny/publish/3")


def test_device_is_let_in_by_its_password(gateway: Gateway) -> None:
    gateway.admitted(gateway.credentials("temp-2"), on="password", client_id="temp-2")


def test_others_are_kept_out(gateway: Gateway, authority: Authority) -> None:
    gateway.refused(authority.device("gone").credentials, client_id="gone")
    assert gateway.audited(event="refused", device="gone")["reason"] == "revoked"
    gateway.refused(authority.device("nobody").credentials, client_id="nobody")
    assert gateway.audited(event="refused", device="nobody")["reason"] == "unknown-device"
    gateway.refused(gateway.credentials("temp-1"), on="password", client_id="temp-2")
    assert gateway.audited(event="refused", client_id="temp-2")["reason"] == "client-id"
