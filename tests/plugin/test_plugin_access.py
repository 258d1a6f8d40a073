# SPDX-License-Identifier: Apache-2.0
"""What a client may do, at each place where the broker asks: publish, subscribe, deliver, wills, offline sessions."""

from __future__ import annotations

import datetime as dt
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from bednet.probe import Credentials, NothingArrivedError, Will, connect_packet, dial, mqtt_packet, publish_packet
from tests.plugin.gateway import Guest, allow, deny

if TYPE_CHECKING:
    from bednet.probe import Version
    from tests.plugin.conftest import Start
    from tests.plugin.gateway import Gateway, Site

UTC = [(-62135596800, 0)]


def on_plain(gateway: Gateway, device: str = "temp-1", **more: Any) -> Guest:
    return gateway.session(device, on="plain", **more)


def add(site: Site, device: str, profile: str = "sensor", **more: Any) -> str:
    """Add a device that comes in by its password."""
    site.passwords[device] = site.passwords["temp-1"]
    return site.add(device, "password", profile=profile, **more)


@pytest.fixture
def reader(site: Site) -> str:
    """A device that may read what the sensors say, except for what is raw; it has temp-1's password."""
    site.profiles["reader"] = [
        allow("subscribe", "sensors/#"),
        allow("subscribe", "plant/#"),
        deny("subscribe", "plant/secret/#"),
        allow("publish", "sensors/fence"),
    ]
    add(site, "reader", "reader")
    site.apply()
    return "reader"


def as_reader(gateway: Gateway, reader: str, **more: Any) -> Guest:
    credentials = Credentials(username=reader, password=gateway.credentials("temp-1").password)
    return Guest(gateway.listener("plain"), credentials, client_id=reader, **more)


# --- publish


@pytest.mark.parametrize("qos", [0, 1, 2])
@pytest.mark.parametrize("version", [4, 5])
def test_what_is_not_allowed_reaches_nobody(gateway: Gateway, reader: str, qos: int, version: Version) -> None:
    """MQTT 5 says so to the publisher, MQTT 3.1.1 says nothing; the message goes nowhere either way."""
    with as_reader(gateway, reader) as listening, on_plain(gateway, version=version) as sensor:
        listening.subscribe("sensors/#")
        for topic in ("sensors/temp-2/t", "sensors/temp-1/raw/t", "sensors"):
            receipt = sensor.publish(topic, b"no", qos=qos)
            if qos == 1 and version == 5:
                assert receipt.code == 0x87
        assert listening.fence("sensors/temp-1/t", through=sensor) == []
    assert gateway.audited(topic="sensors/temp-2/t")["reason"] == "not-allowed"
    event = gateway.audited(topic="sensors/temp-1/raw/t")
    assert (event["reason"], event["rule"]) == ("denied", "role/sensor/deny/publish/3")
    assert (event["event"], event["action"], event["device"]) == ("refused", "publish", "temp-1")


def test_topics_that_are_none_do_not_reach_a_rule(site: Site, gateway: Gateway) -> None:
    """The broker closes such connections before it asks; whatever it asks, a wildcard is not a topic name."""
    site.profiles["sensor"] = [allow("publish", "#"), allow("subscribe", "#")]
    site.apply()
    for topic in ("a/+/b", "a/#", "#"):
        with dial(gateway.listener("plain")) as channel:
            credentials = gateway.credentials("temp-1")
            channel.send(connect_packet("temp-1", username="temp-1", password=credentials.password, version=4))
            assert channel.packet()[3] == 0
            channel.send(publish_packet(topic, b"x", version=4))
            assert channel.packet() == b""


def test_the_broker_s_own_topics_are_out_of_reach_of_wildcards(site: Site, gateway: Gateway) -> None:
    site.profiles["sensor"] = [allow("publish", "#"), allow("subscribe", "#")]
    site.apply()
    with on_plain(gateway) as session:
        assert session.subscribe("#")[0].granted
        assert not session.subscribe("$SYS/#")[0].granted
        assert not session.subscribe("$SYS/broker/version")[0].granted
        assert not session.publish("$SYS/broker/version", b"x").granted
        assert not session.publish("$CONTROL/dynamic-security/v1", b"x").granted
        gateway.wait(lambda: gateway.count(action="subscribe") == 2, "the refusals")
    site.profiles["sensor"].append(allow("subscribe", "$SYS/broker/uptime"))
    site.apply()
    with on_plain(gateway) as session:
        assert session.subscribe("$SYS/broker/uptime")[0].granted
        session.until(lambda message: message.topic == "$SYS/broker/uptime", "what the broker says")


# --- subscribe


@pytest.mark.parametrize(
    ("topic_filter", "reason", "rule"),
    [
        ("sensors/#", None, None),
        ("sensors/+/t", None, None),
        ("plant/open/#", None, None),
        ("sensors", None, None),
        ("#", "partly", "role/reader/deny/subscribe/2"),
        ("+/+/t", "partly", "role/reader/deny/subscribe/2"),
        ("plant/#", "partly", "role/reader/deny/subscribe/2"),
        ("plant/secret/x", "denied", "role/reader/deny/subscribe/2"),
        ("plant/secret/#", "denied", "role/reader/deny/subscribe/2"),
        ("other/#", "not-allowed", None),
        ("sensor", "not-allowed", None),
        ("$share/g/sensors/#", None, None),
        ("$share/g/plant/#", "partly", "role/reader/deny/subscribe/2"),
        ("$share/g/other", "not-allowed", None),
        ("$share/g/plant/secret/x", "denied", "role/reader/deny/subscribe/2"),
        ("$sharesensors/#", "not-allowed", None),
    ],
)
def test_the_whole_filter_must_be_granted(
    gateway: Gateway, reader: str, topic_filter: str, reason: str | None, rule: str | None
) -> None:
    with as_reader(gateway, reader) as session:
        receipt = session.subscribe(topic_filter)[0]
    if reason is None:
        assert receipt.granted
        assert gateway.count(action="subscribe") == 0
    else:
        assert receipt.code == 0x87
        event = gateway.audited(action="subscribe", topic=topic_filter)
        assert (event["reason"], event.get("rule")) == (reason, rule)


@pytest.mark.parametrize(
    "topic_filter", ["$share", "$share/", "$share/g", "$share/g/", "$share//sensors/#", "$share/+/x"]
)
def test_malformed_shared_subscriptions_bring_nothing(site: Site, start: Start, topic_filter: str) -> None:
    site.profiles["sensor"] = [allow("publish", "#"), allow("subscribe", "#")]
    site.apply()
    gateway = start()
    raw = topic_filter.encode()
    with dial(gateway.listener("plain")) as channel:
        password = gateway.credentials("temp-1").password
        channel.send(connect_packet("temp-1", username="temp-1", password=password, version=4))
        assert channel.packet()[3] == 0
        channel.send(mqtt_packet(0x82, b"\x00\x01" + len(raw).to_bytes(2, "big") + raw + b"\x00"))
        answer = channel.packet()
    # A refusal, or the end of the connection: versions differ in what they look at first.
    assert answer in (b"\x90\x03\x00\x01\x80", b""), answer


def test_one_filter_of_several_may_be_refused(gateway: Gateway, reader: str) -> None:
    with as_reader(gateway, reader) as session:
        codes = [receipt.code for receipt in session.subscribe("sensors/#", "other/#", "plant/open")]
    assert codes == [1, 0x87, 1]


def test_one_may_always_unsubscribe(site: Site, gateway: Gateway, reader: str) -> None:
    with as_reader(gateway, reader) as session:
        session.subscribe("sensors/#")
        site.profiles["reader"] = [deny("subscribe", "#")]
        site.apply()
        assert session.unsubscribe("sensors/#")[0].granted


# --- delivery


def test_a_subscription_from_before_brings_nothing_that_is_forbidden_now(
    site: Site, gateway: Gateway, reader: str
) -> None:
    with as_reader(gateway, reader) as listening, on_plain(gateway) as sensor:
        listening.subscribe("sensors/#")
        site.profiles["reader"].append(deny("subscribe", "sensors/temp-1/private"))
        site.apply()
        sensor.publish("sensors/temp-1/private", b"no")
        assert listening.fence("sensors/temp-1/t", through=sensor) == []
    event = gateway.audited(action="deliver", topic="sensors/temp-1/private")
    assert (event["device"], event["reason"], event["rule"]) == ("reader", "denied", "role/reader/deny/subscribe/4")


def test_retained_messages_are_delivered_by_the_rules_of_now(site: Site, gateway: Gateway, reader: str) -> None:
    with on_plain(gateway) as sensor:
        sensor.publish("sensors/temp-1/a", b"kept", retain=True)
        sensor.publish("sensors/temp-1/b", b"kept too", retain=True)
    # The whole filter is granted by one rule, and what is denied is denied for moments that are not now.
    never = [{"days": 1 << (dt.datetime.now(dt.UTC).weekday() + 3) % 7, "from": 3600, "to": 7200, "zone": "UTC"}]
    site.zones["UTC"] = UTC
    site.profiles["reader"].append({**deny("subscribe", "sensors/temp-1/b"), "during": never})
    site.apply()
    with as_reader(gateway, reader) as listening:
        listening.subscribe("sensors/#")
        got = {message.topic for message in listening.settle() if message.retained}
        assert got == {"sensors/temp-1/a", "sensors/temp-1/b"}
        site.profiles["reader"][-1] = deny("subscribe", "sensors/temp-1/b")
        site.apply()
        assert not listening.subscribe("sensors/#")[0].granted, "a deny touches it"
        assert listening.subscribe("sensors/temp-1/a")[0].granted
        assert {message.topic for message in listening.settle()} == {"sensors/temp-1/a"}


def test_a_retained_message_is_shown_while_its_publisher_keeps_the_right(site: Site, start: Start, reader: str) -> None:
    """Where the broker looks at its source. When and from where it was published was looked at when it came."""
    never = [{"days": 1 << (dt.datetime.now(dt.UTC).weekday() + 3) % 7, "from": 3600, "to": 7200, "zone": "UTC"}]
    site.zones["UTC"] = UTC
    here = allow("publish", "plant/here", networks=["127.0.0.0/8"])
    site.profiles["sensor"] = [here, allow("publish", "sensors/", 0, "/#")]
    site.apply()
    gateway = start(more="check_retain_source true")
    with on_plain(gateway) as sensor, as_reader(gateway, reader) as listening:

        def shown(topic: str) -> bool:
            listening.subscribe(topic)
            return any(message.retained for message in listening.settle())

        assert sensor.publish("plant/here", b"kept", retain=True, qos=1).granted
        assert shown("plant/here")
        site.profiles["sensor"][0] = {**here, "during": never}
        site.apply()
        assert sensor.publish("plant/here", b"not now", retain=True, qos=1).code == 0x87
        assert shown("plant/here"), "at other times it may still"
        site.profiles["sensor"].append({**deny("publish", "plant/here"), "during": never})
        site.apply()
        assert shown("plant/here"), "it is denied at times only"
        site.profiles["sensor"][-1] = deny("publish", "plant/here")
        site.apply()
        assert not shown("plant/here")
        site.profiles["sensor"][:] = [allow("publish", "sensors/", 0, "/#")]
        site.apply()
        assert not shown("plant/here")


def test_an_offline_session_gets_what_its_device_may_have(site: Site, gateway: Gateway, reader: str) -> None:
    """Decided when a message comes for it, and once more when it comes back for it."""
    with as_reader(gateway, reader, clean=False, version=4) as listening:
        listening.subscribe("sensors/#")
        listening.client.disconnect()
        listening.wait_goodbye()
        gateway.left("reader")
    with on_plain(gateway) as sensor:
        sensor.publish("sensors/temp-1/one", b"1")
        sensor.publish("sensors/temp-1/two", b"2")
        site.profiles["reader"].append(deny("subscribe", "sensors/temp-1/three"))
        site.apply()
        sensor.publish("sensors/temp-1/three", b"3")
        gateway.audited(action="deliver", device="reader", topic="sensors/temp-1/three", reason="denied")
        site.profiles["reader"].append(deny("subscribe", "sensors/temp-1/two"))
        site.apply()
        with as_reader(gateway, reader, clean=False, version=4) as listening:
            assert listening.resumed
            got = listening.fence("sensors/temp-1/t", through=sensor)
    assert [message.topic for message in got] == ["sensors/temp-1/one"]
    gateway.audited(action="deliver", device="reader", topic="sensors/temp-1/two", reason="denied")


def test_an_offline_session_of_a_revoked_device_gets_nothing(site: Site, gateway: Gateway, reader: str) -> None:
    with as_reader(gateway, reader, clean=False) as listening:
        listening.subscribe("sensors/#")
    gateway.left("reader")
    site.store.revoke("reader", "superseded")
    with on_plain(gateway) as sensor:
        sensor.publish("sensors/temp-1/t", b"1")
    gateway.audited(action="deliver", device="reader", reason="revoked")
    site.store.reinstate("reader")
    site.apply()
    with as_reader(gateway, reader, clean=False) as listening:
        assert listening.settle() == []


def test_offline_sessions_outlive_a_restart_of_the_broker(site: Site, start: Start, reader: str) -> None:
    """They come back from disk with a user name and without a connection, which the plugin has never seen."""
    first = start(persistence=True)
    with as_reader(first, reader, clean=False, version=4) as listening:
        listening.subscribe("sensors/#")
    assert first.stop() == 0
    first.start()
    with on_plain(first) as sensor:
        sensor.publish("sensors/temp-1/t", b"1")
    with as_reader(first, reader, clean=False, version=4) as listening:
        assert listening.resumed
        listening.until(lambda message: message.topic == "sensors/temp-1/t", "what came while it was offline")


# --- wills


@pytest.mark.parametrize(("topic", "goes"), [("sensors/temp-1/gone", True), ("sensors/temp-2/gone", False)])
def test_a_will_is_a_publish_of_its_device(gateway: Gateway, reader: str, topic: str, goes: bool) -> None:
    """The broker asks when the client is gone, after it has said so."""
    with as_reader(gateway, reader) as listening:
        listening.subscribe("sensors/#")
        with on_plain(gateway, will=Will(topic, b"gone")) as sensor:
            sensor.die()
        if goes:
            listening.until(lambda message: message.topic == topic, "the will")
        else:
            gateway.audited(action="publish", topic=topic, reason="not-allowed", device="temp-1")
            assert listening.fence("sensors/fence") == []


def test_a_will_is_sent_from_the_address_that_its_client_had(site: Site, gateway: Gateway, reader: str) -> None:
    site.profiles["sensor"] = [allow("publish", "sensors/", 0, "/#", networks=["127.0.0.0/8"])]
    site.apply()
    with as_reader(gateway, reader) as listening:
        listening.subscribe("sensors/#")
        with on_plain(gateway, will=Will("sensors/temp-1/gone", b"gone")) as sensor:
            assert sensor.publish("sensors/temp-1/t", b"1").granted
            sensor.die()
        listening.until(lambda message: message.topic == "sensors/temp-1/gone", "the will")


# --- times and networks


def test_a_rule_for_a_network_holds_from_there(site: Site, gateway: Gateway) -> None:
    site.profiles["sensor"] = [
        allow("publish", "here/#", networks=["127.0.0.0/8"]),
        allow("publish", "there/#", networks=["10.0.0.0/8", "2001:db8::/32"]),
        allow("publish", "not-here/#"),
        deny("publish", "not-here/#", networks=["127.0.0.1/32"]),
        allow("publish", "not-there/#"),
        deny("publish", "not-there/#", networks=["10.0.0.0/8"]),
    ]
    site.apply()
    with on_plain(gateway) as session:
        told = {name: session.publish(f"{name}/x", b"1").granted for name in ("here", "there", "not-here", "not-there")}
    assert told == {"here": True, "there": False, "not-here": False, "not-there": True}
    assert gateway.audited(topic="not-here/x")["rule"] == "role/sensor/deny/publish/3"


def test_an_offline_session_is_nowhere(site: Site, gateway: Gateway) -> None:
    """The broker remembers the address of its last connection, which says nothing about where it will be read."""
    site.profiles["reader"] = [
        allow("subscribe", "sensors/temp-1/allowed-here", networks=["127.0.0.0/8"]),
        allow("subscribe", "sensors/temp-1/denied-elsewhere"),
        deny("subscribe", "sensors/temp-1/denied-elsewhere", networks=["10.0.0.0/8"]),
        allow("subscribe", "sensors/temp-1/open"),
    ]
    add(site, "reader", "reader")
    site.apply()
    names = ("allowed-here", "denied-elsewhere", "open")
    filters = [f"sensors/temp-1/{name}" for name in names]
    with as_reader(gateway, "reader", clean=False) as listening, on_plain(gateway) as sensor:
        assert all(receipt.granted for receipt in listening.subscribe(*filters))
        for topic in filters:
            sensor.publish(topic, b"online")
        listening.until(lambda message: message.topic == filters[-1], "the last one")
        listening.client.disconnect()
        listening.wait_goodbye()
        gateway.left("reader")
        for topic in filters:
            sensor.publish(topic, b"offline")
    gateway.audited(action="deliver", topic=filters[0], reason="not-allowed")
    gateway.audited(action="deliver", topic=filters[1], reason="denied")
    with as_reader(gateway, "reader", clean=False) as listening:
        got = [message.topic for message in listening.settle()]
    assert got == [filters[2]]


def test_a_window_opens_and_closes_for_a_connected_client_at_the_second(site: Site, start: Start) -> None:
    def seconds(at: int) -> int:
        return at % 86400

    site.zones["UTC"] = UTC
    gateway = start()
    told: list[tuple[float, float, bool]] = []
    with on_plain(gateway) as session:
        # On a busy machine the change may take longer than the time until it is to bite: then once more.
        for lead in (2, 5, 10):
            begin = int(time.time()) + lead
            if seconds(begin) > 86390:
                pytest.skip("midnight is too near")
            window = {"days": 127, "from": seconds(begin), "to": seconds(begin + 1), "zone": "UTC"}
            site.profiles["sensor"] = [allow("publish", "sensors/#", during=[window])]
            site.apply()
            if time.time() < begin - 0.5:
                break
        while time.time() < begin + 1.5:
            before = time.time()
            granted = session.publish(f"sensors/{uuid.uuid4().hex}", b"1").granted
            told.append((before, time.time(), granted))
    inside = [granted for before, after, granted in told if begin + 0.02 <= before and after < begin + 1]
    outside = [granted for before, after, granted in told if after < begin or before >= begin + 1.02]
    assert inside
    assert all(inside)
    assert outside
    assert not any(outside)


def test_the_clock_on_the_wall_decides_across_daylight_saving(site: Site, gateway: Gateway) -> None:
    """Two zones that differ in when their clocks change: what is open in one is shut in the other."""
    now = int(time.time())
    window = {"days": 127, "from": now % 86400 // 3600 * 3600, "to": now % 86400 // 3600 * 3600 + 3600}
    if now % 3600 > 3590 or now % 86400 >= 79200:
        pytest.skip("the hour, or the day, is about to end")
    site.zones = {
        "Test/Winter": UTC,
        "Test/Summer": [UTC[0], (now - 3600, 3600)],
        "Test/Later": [UTC[0], (now + 3600, 3600)],
    }
    site.profiles["sensor"] = [
        allow("publish", f"{name}/#", during=[{**window, "zone": f"Test/{name}"}])
        for name in ("Winter", "Summer", "Later")
    ]
    site.apply()
    with on_plain(gateway) as session:
        told = {name: session.publish(f"{name}/x", b"1").granted for name in ("Winter", "Summer", "Later")}
    assert told == {"Winter": True, "Summer": False, "Later": True}


def test_a_kept_topic_alias_does_not_get_around_a_change(site: Site, gateway: Gateway) -> None:
    """What is checked is the topic that an alias stands for, each time."""
    credentials = gateway.credentials("temp-1")
    topic = b"\x00\x10sensors/temp-1/t"
    with dial(gateway.listener("plain")) as channel:
        channel.send(connect_packet("temp-1", username="temp-1", password=credentials.password, version=5))
        assert channel.packet()[3] == 0
        channel.send(mqtt_packet(0x32, topic + b"\x00\x01" + b"\x03\x23\x00\x01" + b"x"))
        assert channel.packet()[4] < 0x80
        site.profiles["sensor"].append(deny("publish", "sensors/temp-1/t"))
        site.apply()
        channel.send(mqtt_packet(0x32, b"\x00\x00" + b"\x00\x02" + b"\x03\x23\x00\x01" + b"x"))
        assert channel.packet()[4] == 0x87
    gateway.audited(topic="sensors/temp-1/t", reason="denied")


def test_nothing_arrives_is_what_the_fence_proves(gateway: Gateway, reader: str) -> None:
    """The tests above rely on it: a fence that does not arrive is an error, not a silence."""
    with as_reader(gateway, reader, timeout=0.5) as listening, pytest.raises(NothingArrivedError):
        listening.fence("sensors/fence")
