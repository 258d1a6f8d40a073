# SPDX-License-Identifier: Apache-2.0
"""A session belongs to an identity: nobody gets another's by asking for its client id.

The sharp edge: MQTT lets a client name its session. Whoever could name another's would end it, inherit its
subscriptions, and be handed the messages that wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bednet.probe import SESSION_TAKEN_OVER, NothingArrivedError, Session

if TYPE_CHECKING:
    from bednet.probe import Version
    from tests.conftest import Plant

pytestmark = pytest.mark.lab

VERSIONS: list[Version] = [4, 5]


def test_another_devices_client_id_does_not_end_its_session(plant: Plant) -> None:
    with plant.session("line-1") as victim:
        victim.subscribe("sensors/temp-101/#")
        for thief in ("temp-102", "energy-1"):
            with plant.session(thief, client_id="line-1") as session:
                # A round trip each: had it been taken over, it would be over by now.
                session.settle()
                victim.settle()
        with plant.session("temp-101") as sensor:
            sensor.publish("sensors/temp-101/temperature", b"21.5")
        assert [message.payload for message in victim.settle()] == [b"21.5"]
        assert victim.goodbye is None


@pytest.mark.parametrize("version", VERSIONS)
def test_the_queue_of_another_devices_session_is_not_inherited(plant: Plant, version: Version) -> None:
    with plant.session("plc-1-filler", clean=False, client_id="plc-1-filler", version=version) as victim:
        victim.subscribe("commands/plc-1-filler/#")
    with plant.session("line-1") as line:
        assert line.publish("commands/plc-1-filler/speed", b"a secret recipe").granted
    for thief in ("temp-102", "plc-1-packer"):
        with plant.session(thief, version=version):
            pass  # nothing of its own is left that could be resumed
        with plant.session(thief, clean=False, expiry=0, client_id="plc-1-filler", version=version) as session:
            assert not session.resumed
            assert session.settle() == []
    # The control: it is all there for its owner.
    with plant.session("plc-1-filler", clean=False, expiry=0, client_id="plc-1-filler", version=version) as victim:
        assert victim.resumed
        victim.until(lambda message: message.payload == b"a secret recipe", "the message that waited")
    with plant.session("plc-1-filler", client_id="plc-1-filler", version=version) as victim:
        assert not victim.resumed


def test_a_device_has_one_session_whatever_client_ids_it_asks_for(plant: Plant) -> None:
    with plant.session("temp-103", client_id="one") as first, plant.session("temp-103", client_id="two") as second:
        goodbye = first.wait_goodbye()
        assert goodbye.code in (SESSION_TAKEN_OVER, None)
        assert second.publish("sensors/temp-103/temperature", b"4").granted


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
