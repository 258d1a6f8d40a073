# SPDX-License-Identifier: Apache-2.0
"""Who may publish and read what in the example plant, rule by rule, on a live gateway.

The table below is written by hand from what the plant needs, not computed from policy.yml: it says of each topic who
may publish it and who may read it, and so of everybody else that they may not.

The sharp edges: a filter of which a device may read a part, a delivery that nobody looks at because the subscription
was granted, a refusal that the client sees and that all the same went out.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from bednet.probe import NOT_AUTHORIZED

if TYPE_CHECKING:
    from bednet.probe import Session
    from tests.conftest import Plant

    Everyone = dict[str, Session]

pytestmark = pytest.mark.lab

LINES = {"line-1", "line-2"}
HMIS = {"hmi-1", "hmi-2"}
SEES_SENSORS = LINES | HMIS | {"tablet-jo", "historian"}
SEES_HALL_1 = {"line-1", "hmi-1", "tablet-jo", "historian"}
SEES_HALL_2 = {"line-2", "hmi-2", "tablet-jo", "historian"}
NOBODY: set[str] = set()


@dataclass(frozen=True)
class Row:
    """A topic, who may publish it and who may read it."""

    topic: str
    writers: set[str]
    readers: set[str]

    def __str__(self) -> str:
        return self.topic


COMMANDERS = LINES | {"tablet-jo"}

PLANT = [
    # sensor, plc: what a device measures
    Row("sensors/temp-101/temperature", {"temp-101"}, SEES_SENSORS),
    Row("sensors/temp-101", {"temp-101"}, SEES_SENSORS),  # a/# matches a, too
    Row("sensors/temp-101/a/b/c", {"temp-101"}, SEES_SENSORS),
    Row("sensors/vib-211/rms", {"vib-211"}, SEES_SENSORS),
    Row("sensors/plc-1-filler/level", {"plc-1-filler"}, SEES_SENSORS),
    # deny: the safety circuit talks for itself
    Row("sensors/plc-1-filler/safety/stop", NOBODY, SEES_SENSORS),
    Row("sensors/plc-1-filler/safety", NOBODY, SEES_SENSORS),
    Row("sensors/temp-101/safety/stop", {"temp-101"}, SEES_SENSORS),  # that rule is the PLCs' alone
    # line-controller, technician: commands
    Row("commands/temp-101/interval", COMMANDERS, {"temp-101", "historian"}),
    Row("commands/plc-1-filler/start", COMMANDERS, {"plc-1-filler", "historian"}),
    Row("commands/plc-2-packer/start", COMMANDERS, {"plc-2-packer", "historian"}),
    Row("commands/nobody/start", COMMANDERS, {"historian"}),
    Row("commands", NOBODY, {"historian"}),  # commands/+/# has a second level
    # deny: firmware is the technician's business
    Row("commands/plc-1-filler/firmware/update", {"tablet-jo"}, {"plc-1-filler", "historian"}),
    Row("commands/temp-101/firmware", {"tablet-jo"}, {"temp-101", "historian"}),
    Row("commands/temp-101/firmwares", COMMANDERS, {"temp-101", "historian"}),
    # the halls
    Row("factory/hall-1/line-1/setpoint/speed", {"line-1"}, SEES_HALL_1 | {"plc-1-filler", "plc-1-packer"}),
    Row("factory/hall-2/line-2/setpoint/speed", {"line-2"}, SEES_HALL_2 | {"plc-2-filler", "plc-2-packer"}),
    Row("factory/hall-2/line-1/setpoint/speed", NOBODY, SEES_HALL_2),
    Row("factory/hall-1/line-1/filler/state", {"plc-1-filler", "line-1"}, SEES_HALL_1),
    Row("factory/hall-1/line-1/packer/state", {"plc-1-packer", "line-1"}, SEES_HALL_1),
    Row("factory/hall-1/line-1/filler/state/x", {"line-1"}, SEES_HALL_1),
    Row("factory/hall-1/alarms/ack", {"hmi-1"}, SEES_HALL_1),
    Row("factory/hall-2/alarms/ack", {"hmi-2"}, SEES_HALL_2),
    Row("factory/hall-1/alarms/raise", NOBODY, SEES_HALL_1),
    Row("factory/hall-1/energy/energy-1", {"energy-1"}, SEES_HALL_1),
    Row("factory/hall-1/energy/energy-2", NOBODY, SEES_HALL_1),
    Row("factory/hall-2/energy/energy-2", {"energy-2"}, SEES_HALL_2),
    Row("factory", NOBODY, {"tablet-jo", "historian"}),
    # what nobody has a rule for
    Row("recipes/secret", NOBODY, {"historian"}),
    Row("bednet/probe/x", NOBODY, {"historian"}),
]

TRICKS = [
    # nearly one's own topic
    Row("sensors/temp-1011/temperature", NOBODY, SEES_SENSORS),
    Row("sensors/temp-10/temperature", NOBODY, SEES_SENSORS),
    Row("Sensors/temp-101/temperature", NOBODY, {"historian"}),
    Row("sensors/Temp-101/temperature", NOBODY, SEES_SENSORS),
    Row("/sensors/temp-101/temperature", NOBODY, {"historian"}),
    Row("sensors//temp-101/temperature", NOBODY, SEES_SENSORS),
    Row("sensors/temp-102/../temp-101/temperature", {"temp-102"}, SEES_SENSORS),  # dots mean nothing in MQTT
    Row("sensors/ temp-101/temperature", NOBODY, SEES_SENSORS),
    Row("sensors/temp-101 /temperature", NOBODY, SEES_SENSORS),
    Row("sensors/temp\N{NON-BREAKING HYPHEN}101/temperature", NOBODY, SEES_SENSORS),
    Row("sensors/%74emp-101/temperature", NOBODY, SEES_SENSORS),
    Row("sensors", NOBODY, {"tablet-jo", "historian"}),
    # a level that MQTT treats in its own way
    Row("$share/group/sensors/temp-101/temperature", NOBODY, NOBODY),
    Row("$SYS/broker/uptime", NOBODY, NOBODY),
    Row("$SYS/broker/clients/connected", NOBODY, {"tablet-jo"}),
    Row("$CONTROL/dynamic-security/v1", NOBODY, NOBODY),
    Row("$sensors/temp-101/temperature", NOBODY, NOBODY),
]


@pytest.mark.parametrize("row", [*PLANT, *TRICKS], ids=str)
def test_a_topic_is_published_by_those_who_may_and_by_nobody_else(everyone: Everyone, row: Row) -> None:
    mids = {name: session.send(row.topic, name.encode()) for name, session in everyone.items()}
    codes = {name: everyone[name].acknowledged(mid).code for name, mid in mids.items()}
    # Granted is 0, or 0x10 where nobody has subscribed.
    assert {name for name, code in codes.items() if code < 0x80} == row.writers
    assert {code for name, code in codes.items() if name not in row.writers} == {NOT_AUTHORIZED}
    # ... and what was refused did not go out all the same.
    heard = {message.payload.decode() for session in everyone.values() for message in session.settle()}
    assert heard <= row.writers


@pytest.mark.parametrize("row", [row for row in PLANT if row.writers], ids=str)
def test_a_message_reaches_those_who_may_read_it_and_nobody_else(everyone: Everyone, row: Row) -> None:
    """Everyone has asked for #, and for whatever anybody may read."""
    for writer in sorted(row.writers):
        token = secrets.token_bytes(8)
        assert everyone[writer].publish(row.topic, token).granted
        heard = {name: [message.payload for message in session.settle()] for name, session in everyone.items()}
        assert {name for name, payloads in heard.items() if token in payloads} == row.readers


# A topic filter, and who may subscribe to it: those who may read all of it.
FILTERS = {
    "#": {"historian"},
    "+": {"historian"},
    "+/#": {"historian"},
    "sensors/#": {"tablet-jo", "historian"},
    "sensors": {"tablet-jo", "historian"},
    "sensors/+/#": SEES_SENSORS,
    "sensors/+": SEES_SENSORS,
    "sensors/temp-101/#": SEES_SENSORS,
    "sensors/temp-101/temperature": SEES_SENSORS,
    "sensors//temperature": SEES_SENSORS,
    "+/temp-101/temperature": {"historian"},
    "commands/#": {"historian"},
    "commands/+/interval": {"historian"},
    "commands/temp-101/#": {"temp-101", "historian"},
    "commands/temp-101": {"temp-101", "historian"},
    "commands/temp-101/+": {"temp-101", "historian"},
    "commands/temp-1011/#": {"historian"},
    "factory/#": {"tablet-jo", "historian"},
    "factory/+/alarms/#": {"tablet-jo", "historian"},
    "factory/hall-1/#": SEES_HALL_1,
    "factory/hall-2/+/+/state": SEES_HALL_2,
    "factory/hall-1/line-1/setpoint/#": SEES_HALL_1 | {"plc-1-filler", "plc-1-packer"},
    "recipes/#": {"historian"},
    "bednet/probe/#": {"historian"},
    # a share of it is the same to the policy
    "$share/group/#": {"historian"},
    "$share/group/sensors/+/#": SEES_SENSORS,
    "$share/group/commands/temp-101/#": {"temp-101", "historian"},
    "$share/sensors/commands/temp-102/#": {"temp-102", "historian"},
    # the broker's own figures must be named
    "$SYS/#": NOBODY,
    "$SYS/broker/uptime": NOBODY,
    "$SYS/broker/clients/#": {"tablet-jo"},
    "$SYS/broker/clients/connected": {"tablet-jo"},
    "$share/group/$SYS/broker/clients/#": {"tablet-jo"},
    "$CONTROL/#": NOBODY,
    "+/broker/clients/#": {"historian"},
}


@pytest.mark.parametrize("topic_filter", FILTERS)
def test_a_filter_is_granted_to_those_who_may_read_all_of_it_and_to_nobody_else(
    plant: Plant, everyone: Everyone, topic_filter: str
) -> None:
    codes = {}
    for name, session in everyone.items():
        codes[name] = session.subscribe(topic_filter)[0].code
        if topic_filter not in ("#", *plant.filters):
            session.unsubscribe(topic_filter)
        session.take()
    assert {name for name, code in codes.items() if code < 0x80} == FILTERS[topic_filter]
    assert {code for name, code in codes.items() if name not in FILTERS[topic_filter]} == {NOT_AUTHORIZED}


def test_the_table_knows_every_device_that_has_credentials(plant: Plant, everyone: Everyone) -> None:
    known = set().union(*(row.writers | row.readers for row in PLANT))
    roles = {role for device in known for role in plant.site.devices[device].roles}
    assert roles == set(plant.site.roles)
    assert len(everyone) >= 20
