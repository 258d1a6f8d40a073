# SPDX-License-Identifier: Apache-2.0
"""What the demonstration shows works: the devices talk through the gateways, and the lines to paste do what they say.

The sharp edges: a device that never says a word and is not missed, a message lost between two counters that both look
good, and a command line that was right in an earlier version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from testbed import demo
from testbed.common import LabError
from testbed.field import UNIT, Field

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.lab import Lab

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def field(lab: Lab) -> Iterator[Field]:
    """The plant's devices at work, but for the one that is left to the user; other tests take their parts after it."""
    own = Field(lab)
    started = own.deploy(without=(demo.HAND,))
    assert demo.HAND not in started
    yield own
    own.stop()
    assert lab.hosts["devices"].exec(["systemctl", "is-active", UNIT], check=False).stdout.strip() == "inactive"
    with pytest.raises(LabError, match="The devices are not running"):
        own.status()


def test_telemetry_flows_in_both_protocols_and_nothing_is_missing(field: Field) -> None:
    status = field.await_flow(demo.FLOW_DEADLINE_S)
    assert len(status.devices) >= 20
    assert status.publishers
    assert status.readers
    for protocol in (4, 5):
        said = [device["published"] for device in status.devices.values() if device["protocol"] == protocol]
        assert len(said) >= 5
        assert sum(said) > 0
    assert status.total("received") > status.total("published") > 0
    assert status.total("heard") > 0
    assert status.total("missing") == 0
    assert status.total("refused") == 0


def test_the_lines_that_the_demonstration_shows_do_what_they_say(field: Field) -> None:
    lines = demo._lines(field.lab)
    assert [line.words[0] for line in lines] == ["mosquitto_sub", "mosquitto_pub", "mosquitto_pub"]
    for line in lines:
        demo._try(field.lab, line)
    with pytest.raises(LabError, match="did not do what it should"):
        demo._try(field.lab, demo.Line("nonsense", "true", ("true",), "Not authorized"))
