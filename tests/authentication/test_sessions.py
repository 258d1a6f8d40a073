# SPDX-License-Identifier: Apache-2.0
"""A session belongs to an identity: nobody gets another's by asking for its client id.

The sharp edge: MQTT lets a client name its session. Whoever could name another's would end it, inherit its
subscriptions, and be handed the messages that wait for it. So the gateway refuses whoever does not give its own name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bednet import probe
from bednet.probe import NOT_AUTHORIZED, SESSION_TAKEN_OVER, NotAdmittedError, NothingArrivedError, Session
from tests.live import CONNECT_REFUSED, Audit

if TYPE_CHECKING:
    from bednet.probe import Version
    from tests.conftest import Plant

pytestmark = pytest.mark.lab

VERSIONS: list[Version] = [4, 5]


@pytest.mark.parametrize("version", VERSIONS)
def test_another_devices_client_id_is_refused_and_does_not_end_its_session(plant: Plant, version: Version) -> None:
    audit = Audit(plant.lab.hosts["gateway-1"])
    with plant.session("line-1") as victim:
        victim.subscribe("sensors/temp-101/#")
        for thief in ("temp-102", "energy-1"):
            with pytest.raises(NotAdmittedError) as refusal:
                plant.session(thief, client_id="line-1", version=version).open()
            assert refusal.value.answer.code == CONNECT_REFUSED[version]
            audit.line(action="connect", device=thief, client_id="line-1", reason="client-id")
        with plant.session("temp-101") as sensor:
            sensor.publish("sensors/temp-101/temperature", b"21.5")
        assert [message.payload for message in victim.settle()] == [b"21.5"]
        assert victim.goodbye is None


@pytest.mark.parametrize("version", VERSIONS)
def test_the_queue_of_another_devices_session_is_not_inherited(plant: Plant, version: Version) -> None:
    with plant.session("plc-1-filler", clean=False, version=version) as victim:
        victim.subscribe("commands/plc-1-filler/#")
    with plant.session("line-1") as line:
        assert line.publish("commands/plc-1-filler/speed", b"a secret recipe").granted
    for thief in ("temp-102", "plc-1-packer"):
        with pytest.raises(NotAdmittedError) as refusal:
            plant.session(thief, clean=False, expiry=0, client_id="plc-1-filler", version=version).open()
        assert refusal.value.answer.code == CONNECT_REFUSED[version]
    # The control: it is all there for its owner.
    with plant.session("plc-1-filler", clean=False, expiry=0, version=version) as victim:
        assert victim.resumed
        victim.until(lambda message: message.payload == b"a secret recipe", "the message that waited")
    with plant.session("plc-1-filler", version=version) as victim:
        assert not victim.resumed


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["one", "Temp-103", "temp-103 ", "temp-1030", "$temp-103", "é"])
def test_a_device_has_no_client_id_but_its_own(plant: Plant, name: str, version: Version) -> None:
    with plant.session("temp-103") as first:
        with pytest.raises(NotAdmittedError) as refusal:
            plant.session("temp-103", client_id=name, version=version).open()
        assert refusal.value.answer.code == CONNECT_REFUSED[version]
        assert first.publish("sensors/temp-103/temperature", b"4").granted


def test_a_device_has_one_session(plant: Plant) -> None:
    with plant.session("temp-103") as first, plant.session("temp-103") as second:
        goodbye = first.wait_goodbye()
        assert goodbye.code in (SESSION_TAKEN_OVER, None)
        assert second.publish("sensors/temp-103/temperature", b"4").granted


def test_a_client_id_is_not_made_up_for_a_device(plant: Plant) -> None:
    """An empty client id asks the gateway for one (MQTT 5, 3.1.3.1)."""
    audit = Audit(plant.lab.hosts["gateway-1"])
    with probe.dial(plant.mtls(), plant.certificate("temp-103")) as raw:
        raw.send(probe.connect_packet(""))
        assert raw.packet()[3] == NOT_AUTHORIZED
    audit.line(action="connect", device="temp-103", reason="client-id")


def test_certificate_and_password_of_one_device_share_its_session(plant: Plant) -> None:
    with plant.session("tablet-jo") as first, Session(plant.passwords(), plant.password("tablet-jo")) as second:
        first.wait_goodbye()
        second.settle()


def test_a_session_on_one_gateway_does_not_end_that_on_another(plant: Plant) -> None:
    with plant.session("historian", "gateway-1") as one, plant.session("historian", "gateway-2") as two:
        two.settle()
        one.settle()
        with pytest.raises(NothingArrivedError, match="still alive"):
            one.wait_goodbye(0)
