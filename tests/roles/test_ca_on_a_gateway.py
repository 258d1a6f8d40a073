# SPDX-License-Identifier: Apache-2.0
"""The smallest site there is: one gateway that is the CA's host too, as on a single Raspberry Pi.

The sharp edges: two roles that write into the same folders and meet on the same ports, a CRL that the host fetches from
itself, and a second run that changes something because each role undoes what the other did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from testbed.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.lab import PlayResult

pytestmark = [pytest.mark.lab, pytest.mark.full]


@pytest.fixture(scope="module")
def runs() -> Iterator[tuple[Lab, PlayResult, PlayResult]]:
    """A host that shall be gateway and CA, and what a first and a second run of site.yml did on it."""
    with Lab.up("ca-on-gateway", gateways=1, ca="gateway-1", field=False) as lab:
        yield lab, lab.play("site.yml"), lab.play("site.yml")


def test_one_host_can_be_gateway_and_ca(runs: tuple[Lab, PlayResult, PlayResult]) -> None:
    lab, converged, again = runs
    assert list(converged.stats) == ["gateway-1"]
    assert converged.changed > 0
    assert again.changed_tasks == []
    verified = lab.play("verify.yml")
    assert verified.failed == 0
    assert verified.changed == 0


def test_it_listens_on_what_both_must_and_nothing_else(runs: tuple[Lab, PlayResult, PlayResult]) -> None:
    sockets = runs[0].hosts["gateway-1"].exec(["ss", "-Hltn"]).stdout
    # 127.0.0.11 is the resolver that Docker gives each container.
    ports = {int(line.split()[3].rsplit(":", 1)[1]) for line in sockets.splitlines() if "127.0.0.11" not in line}
    assert ports == {22, 8443, 8880, 8883, 8884, 8885}


def test_it_fetches_its_list_from_itself_and_the_broker_cannot_read_the_ca_s_key(
    runs: tuple[Lab, PlayResult, PlayResult],
) -> None:
    gateway = runs[0].hosts["gateway-1"]
    gateway.exec(["systemctl", "start", "bednet-ca-crl.service", "bednet-crl-fetch.service"])
    key = "/var/lib/bednet-ca/issuing/issuing.key"
    gateway.exec(["test", "-f", key])
    for user in ("mosquitto", "nobody"):
        assert gateway.exec(["cat", key], user=user, check=False).stderr.endswith("Permission denied\n")
