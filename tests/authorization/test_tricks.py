# SPDX-License-Identifier: Apache-2.0
"""Ways around topic rules: wildcards, shared subscriptions, wills, retained messages, sessions left behind.

The sharp edge: all of these reach the access check by another path through the broker than a plain publish does. A
subscription that was refused must bring nothing all the same: "nothing arrives" is proven by a message that does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bednet import probe
from bednet.probe import NOT_AUTHORIZED, NothingArrivedError, Will
from tests.live import SUBSCRIBE_REFUSED, Audit

if TYPE_CHECKING:
    from bednet.probe import Version
    from tests.conftest import Plant

pytestmark = pytest.mark.lab

VERSIONS: list[Version] = [4, 5]
SPY_FILTERS = [
    "#",
    "+/+/+",
    "+/#",
    "sensors/#",
    "sensors/+/temperature",
    "sensors/temp-101/#",
    "sensors/temp-101/temperature",
    "$share/spies/#",
    "$share/spies/sensors/#",
    "$share/spies/sensors/temp-101/temperature",
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("topic_filter", SPY_FILTERS)
def test_a_subscription_that_is_not_granted_is_refused_and_shows_nothing(
    plant: Plant, topic_filter: str, version: Version
) -> None:
    audit = Audit(plant.lab.hosts["gateway-1"])
    with (
        plant.session("temp-102", version=version) as spy,
        plant.session("temp-101") as sensor,
        plant.session("historian") as control,
    ):
        control.subscribe(topic_filter.removeprefix("$share/spies/"))
        assert spy.subscribe(topic_filter)[0].code == SUBSCRIBE_REFUSED[version]
        assert sensor.publish("sensors/temp-101/temperature", b"21.5").granted
        assert spy.settle() == []
        assert [message.payload for message in control.settle()] == [b"21.5"]
        # It may read its own commands, which some of these filters include; a part of a filter is not granted.
        some = topic_filter.removeprefix("$share/spies/") in ("#", "+/#", "+/+/+")
        told = audit.line(action="subscribe", topic=topic_filter, reason="partly" if some else "not-allowed")
    assert (told["device"], told["client_id"], told["event"]) == ("temp-102", "temp-102", "refused")
    assert told.get("rule") == ("role/sensor/allow/subscribe/0" if some else None)


def test_of_several_filters_those_that_are_not_granted_are_refused(plant: Plant) -> None:
    with plant.session("temp-102") as sensor, plant.session("line-1") as line:
        codes = [told.code for told in sensor.subscribe("#", "commands/temp-102/#", "commands/temp-101/#")]
        assert codes == [NOT_AUTHORIZED, 1, NOT_AUTHORIZED]
        assert line.publish("commands/temp-101/interval", b"not yours").granted
        assert line.publish("commands/temp-102/interval", b"yours").granted
        assert [message.payload for message in sensor.settle()] == [b"yours"]


@pytest.mark.parametrize("topic_filter", ["$SYS/#", "$SYS/broker/uptime", "$SYS/+/uptime", "$SYS/broker/version"])
@pytest.mark.parametrize("spy", ["temp-101", "historian", "line-1", "energy-1", "tablet-jo"])
def test_the_brokers_own_figures_are_shown_to_nobody_who_was_not_named(
    plant: Plant, spy: str, topic_filter: str
) -> None:
    with plant.session(spy) as session:
        assert session.subscribe(topic_filter)[0].code == NOT_AUTHORIZED
        # They are retained: whoever may read them has them at once.
        assert session.settle() == []


def test_the_brokers_own_figures_are_shown_to_the_technician(plant: Plant) -> None:
    """The control: there is something to be seen."""
    with plant.session("tablet-jo") as session:
        session.subscribe("$SYS/broker/clients/connected")
        session.until(lambda message: message.topic == "$SYS/broker/clients/connected", "the number of clients", 15)


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_what_mqtt_3_1_1_may_not_publish_is_acknowledged_and_dropped(plant: Plant, qos: int) -> None:
    with plant.session("historian") as historian, plant.session("temp-102", version=4) as rogue:
        historian.subscribe("#")
        for topic in ("sensors/temp-101/temperature", "commands/temp-101/interval", "factory/hall-1/alarms/ack"):
            # 3.1.1 has no other answer than "received".
            assert rogue.publish(topic, b"forged", qos=qos).code == 0
        assert rogue.publish("sensors/temp-102/temperature", b"true", qos=qos).code == 0
        rogue.settle()
        assert [message.payload for message in historian.settle()] == [b"true"]


@pytest.mark.parametrize("topic", ["sensors/+/temperature", "sensors/#", "#", "+", "sensors/temp-101/+", "", "a\0b"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_publish_to_a_wildcard_ends_the_connection_and_reaches_nobody(
    plant: Plant, topic: str, version: Version
) -> None:
    with plant.session("historian") as historian:
        historian.subscribe("#")
        with probe.dial(plant.mtls(), plant.certificate("temp-101")) as raw:
            raw.send(probe.connect_packet("temp-101", version=version))
            assert raw.packet()[3] == 0
            raw.send(probe.publish_packet(topic, b"to all", version=version))
            answer = raw.packet()
            # A DISCONNECT packet (MQTT 5), or nothing but the end.
            assert answer == b"" or answer[0] == 0xE0
        with plant.session("temp-101") as sensor:
            assert sensor.publish("sensors/temp-101/temperature", b"fence").granted
        assert [message.payload for message in historian.settle()] == [b"fence"]


def test_a_will_on_a_forbidden_topic_is_not_published(plant: Plant) -> None:
    with plant.session("historian") as historian, plant.session("plc-1-filler") as plc:
        historian.subscribe("#")
        plc.subscribe("commands/plc-1-filler/#")
        audit = Audit(plant.lab.hosts["gateway-1"])
        for version in VERSIONS:
            for topic in ("commands/plc-1-filler/stop", "sensors/temp-102/temperature", "$SYS/broker/uptime"):
                for retain in (False, True):
                    will = Will(topic, b"a last forged word", retain=retain)
                    with plant.session("temp-101", version=version, will=will) as dying:
                        dying.die()
        with plant.session("temp-101") as sensor:
            assert sensor.publish("sensors/temp-101/temperature", b"fence").granted
        assert [message.payload for message in historian.settle()] == [b"fence"]
        assert plc.settle() == []
    audit.line(action="publish", device="temp-101", topic="commands/plc-1-filler/stop", reason="not-allowed")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_will_on_a_permitted_topic_is_published(plant: Plant, version: Version) -> None:
    """The control: wills work, and are seen."""
    with plant.session("historian") as historian:
        historian.subscribe("#")
        will = Will("sensors/temp-101/state", b"gone")
        with plant.session("temp-101", version=version, will=will) as dying:
            dying.die()
        historian.until(lambda message: message.payload == b"gone", "the will")


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_is_retained_on_a_forbidden_topic(plant: Plant, version: Version) -> None:
    forbidden = ["sensors/temp-102/state", "commands/temp-101/mode", "factory/hall-1/state", "$SYS/x", "x"]
    with plant.session("temp-101", version=version) as sensor:
        for topic in forbidden:
            sensor.publish(topic, b"forged", retain=True)
        sensor.publish("sensors/temp-101/state", b"on", retain=True)
        sensor.settle()
    with plant.session("historian") as historian:
        historian.subscribe("#")
        kept = {message.topic: message.payload for message in historian.settle() if message.retained}
    with plant.session("temp-101") as sensor:
        sensor.publish("sensors/temp-101/state", b"", retain=True)
    assert kept.get("sensors/temp-101/state") == b"on"
    assert not set(forbidden) & set(kept)


def test_a_retained_message_is_not_shown_to_those_who_may_not_read_it(plant: Plant) -> None:
    with plant.session("line-1") as line:
        assert line.publish("commands/plc-1-filler/mode", b"a recipe", retain=True).granted
        try:
            for spy in ("temp-101", "plc-1-packer", "hmi-1", "energy-1", "line-2", "tablet-jo"):
                with plant.session(spy) as session:
                    asked = session.subscribe("#", "commands/#", "commands/plc-1-filler/mode")
                    assert {told.code for told in asked} == {NOT_AUTHORIZED}
                    assert session.settle() == []
            with plant.session("plc-1-filler") as owner:
                owner.subscribe("commands/plc-1-filler/#")
                assert [message.payload for message in owner.settle()] == [b"a recipe"]
        finally:
            line.publish("commands/plc-1-filler/mode", b"", retain=True)


def test_a_session_left_behind_collects_nothing_forbidden(plant: Plant) -> None:
    with plant.session("temp-102", clean=False, client_id="temp-102") as spy:
        codes = [told.code for told in spy.subscribe("#", "sensors/#", "commands/#", "commands/temp-102/#")]
        assert codes == [*[NOT_AUTHORIZED] * 3, 1]
    with plant.session("temp-101") as sensor, plant.session("line-1") as line:
        assert sensor.publish("sensors/temp-101/temperature", b"not for you").granted
        assert line.publish("commands/temp-101/interval", b"nor this").granted
        assert line.publish("commands/temp-102/interval", b"for you").granted
    with plant.session("temp-102", clean=False, expiry=0, client_id="temp-102") as spy:
        assert spy.resumed
        got = spy.until(lambda message: message.payload == b"for you", "the message that waited")
        assert {message.payload for message in [*got, *spy.settle()]} == {b"for you"}


def test_after_unsubscribing_nothing_arrives(plant: Plant) -> None:
    with plant.session("temp-101") as sensor, plant.session("line-1") as line:
        sensor.subscribe("commands/temp-101/#")
        line.publish("commands/temp-101/interval", b"1")
        sensor.unsubscribe("commands/temp-101/#")
        assert [message.payload for message in sensor.take()] == [b"1"]
        line.publish("commands/temp-101/interval", b"2")
        assert sensor.settle() == []


def test_unsubscribing_is_no_way_to_end_anothers_subscription(plant: Plant) -> None:
    with plant.session("plc-1-filler") as victim, plant.session("temp-101") as rogue, plant.session("line-1") as line:
        victim.subscribe("commands/plc-1-filler/#")
        rogue.unsubscribe("commands/plc-1-filler/#", "#")
        line.publish("commands/plc-1-filler/start", b"go")
        assert [message.payload for message in victim.settle()] == [b"go"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stranger_in_a_shared_group_does_not_swallow_the_others_messages(plant: Plant, version: Version) -> None:
    """Granted and filtered at delivery, as an acl_file does, the stranger's share of the messages would be lost."""
    group = "$share/controllers/sensors/+/temperature"
    with (
        plant.session("line-1") as line,
        plant.session("line-2") as other,
        plant.session("temp-101") as sensor,
        plant.session("temp-102", version=version) as stranger,
    ):
        for session in (line, other):
            assert session.subscribe(group)[0].granted
        assert stranger.subscribe(group)[0].code == SUBSCRIBE_REFUSED[version]
        for number in range(10):
            assert sensor.publish("sensors/temp-101/temperature", b"%d" % number).granted
        shares = [[int(message.payload) for message in session.settle()] for session in (line, other)]
        assert sorted([*shares[0], *shares[1]]) == list(range(10))
        # The control: it is dealt out.
        assert all(shares)
        assert stranger.settle() == []


def test_the_probe_may_touch_nothing_of_the_plant(plant: Plant) -> None:
    with plant.probe() as session:
        for topic in ("sensors/temp-101/temperature", "commands/temp-101/interval", "bednet/x", "bednet/forbidden/x"):
            assert session.publish(topic, b"1").code == NOT_AUTHORIZED
        asked = session.subscribe("#", "sensors/#", "commands/#", "factory/#", "$SYS/#", "bednet/#")
        assert {told.code for told in asked} == {NOT_AUTHORIZED}
        with plant.session("temp-101") as sensor:
            assert sensor.publish("sensors/temp-101/temperature", b"21.5").granted
        assert session.settle() == []


def test_a_device_may_not_meddle_with_the_probes_branch(plant: Plant) -> None:
    with plant.session("line-1") as line:
        assert line.publish("bednet/probe/x", b"1").code == NOT_AUTHORIZED


def test_a_packet_above_the_limit_ends_the_connection(plant: Plant) -> None:
    with plant.session("historian") as historian:
        historian.subscribe("#")
        with plant.session("temp-101") as sensor:
            mid = sensor.send("sensors/temp-101/temperature", bytes(65536 + 64))
            try:
                assert sensor.acknowledged(mid).code == probe.PACKET_TOO_LARGE
            except NothingArrivedError:
                sensor.wait_goodbye(0)
        with plant.session("temp-101") as sensor:
            assert sensor.publish("sensors/temp-101/temperature", bytes(65536 - 128)).granted
        assert [len(message.payload) for message in historian.settle()] == [65536 - 128]
