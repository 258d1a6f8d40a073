# SPDX-License-Identifier: Apache-2.0
"""Who is revoked, whose time is over, what a changed policy takes away: at once, for those connected, and nobody else.

The sharp edges: a session that stays because nobody looked at it again, the last words of a device that is gone (its
will, what it retained, what waits for it), and a reload that takes somebody for new who is not.
"""

from __future__ import annotations

import datetime as dt
import secrets
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from bednet import probe
from bednet.probe import NOT_AUTHORIZED, Credentials, NotAdmittedError, Session, Will
from tests.live import CONNECT_REFUSED, Audit, Site, other_site, revoked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bednet.probe import Version
    from testbed.lab import Host
    from tests.conftest import Plant

pytestmark = pytest.mark.lab

VERSIONS: list[Version] = [4, 5]
ADMINISTRATIVE_ACTION = 0x98
A_SECOND = 1.0
PSK_DEVICE = "level-900"


@pytest.fixture(scope="module")
def gateway(plant: Plant) -> Host:
    return plant.lab.hosts["gateway-1"]


@pytest.fixture
def audit(gateway: Host) -> Audit:
    return Audit(gateway)


def reloads(host: Host) -> int:
    return host.exec(["journalctl", "-u", "mosquitto", "-o", "cat"]).stdout.count("Reloading config")


def started(host: Host) -> str:
    return host.exec(["systemctl", "show", "mosquitto", "--property=MainPID,ExecMainStartTimestamp"]).stdout


# --- revocation


@pytest.mark.parametrize("version", VERSIONS)
def test_a_revoked_device_is_off_within_a_second_and_leaves_no_last_words(
    plant: Plant, gateway: Host, audit: Audit, measured: Callable[[str], None], version: Version
) -> None:
    will = Will("sensors/temp-103/state", b"a last word", retain=True)
    with (
        plant.session("historian") as historian,
        plant.session("temp-102") as neighbour,
        plant.session("temp-103", version=version, will=will) as victim,
    ):
        historian.subscribe("#")
        assert victim.publish("sensors/temp-103/temperature", b"21").granted
        with revoked(plant, gateway, "temp-103"):
            begin = time.monotonic()
            goodbye = victim.wait_goodbye(A_SECOND)
            took = time.monotonic() - begin
            assert goodbye.code == (ADMINISTRATIVE_ACTION if version == 5 else None)
            gone = audit.line(event="disconnected", device="temp-103")
            assert (gone["reason"], gone["client_id"]) == ("revoked", "temp-103")
            answer = probe.enter(plant.mtls(), plant.certificate("temp-103"), version=version)
            assert answer.code == CONNECT_REFUSED[version]
            audit.line(event="refused", action="connect", device="temp-103", reason="revoked")
            assert neighbour.publish("sensors/temp-102/temperature", b"fence").granted
            assert [message.payload for message in historian.settle()] == [b"21", b"fence"]
            assert neighbour.goodbye is None
    assert probe.enter(plant.mtls(), plant.certificate("temp-103")).accepted
    measured(f"a revoked device was off {took * 1000:.0f} ms after `bednet-store revoke` was done")


def test_what_a_revoked_device_has_retained_is_shown_to_nobody_who_comes_later(
    plant: Plant, gateway: Host, audit: Audit
) -> None:
    topic = "sensors/temp-103/mode"

    def shown() -> list[bytes]:
        with plant.session("tablet-jo") as late:
            late.subscribe("sensors/temp-103/#")
            return [message.payload for message in late.settle()]

    with plant.session("temp-103") as sensor:
        assert sensor.publish(topic, b"on", retain=True).granted
    try:
        assert shown() == [b"on"]
        with revoked(plant, gateway, "temp-103"):
            assert shown() == []
            audit.line(action="publish", device="temp-103", topic=topic, reason="revoked")
        # The way back: it is a device again, and so is what it said.
        assert shown() == [b"on"]
    finally:
        with plant.session("temp-103") as sensor:
            sensor.publish(topic, b"", retain=True)


def test_what_waits_for_a_revoked_device_does_not_grow(plant: Plant, gateway: Host, audit: Audit) -> None:
    topic = "commands/plc-1-packer/step"
    with plant.session("plc-1-packer"):
        pass
    with plant.session("plc-1-packer", clean=False, expiry=600) as asleep:
        assert asleep.subscribe("commands/plc-1-packer/#")[0].granted
    with plant.session("line-1") as line:
        assert line.publish(topic, b"before").granted
        with revoked(plant, gateway, "plc-1-packer"):
            assert line.publish(topic, b"meanwhile").granted
            audit.line(action="deliver", device="plc-1-packer", topic=topic, reason="revoked")
            with pytest.raises(NotAdmittedError):
                plant.session("plc-1-packer", clean=False, expiry=600).open()
        assert line.publish(topic, b"after").granted
    with plant.session("plc-1-packer", clean=False, expiry=0) as awake:
        awake.until(lambda message: message.payload == b"after", "what came when it was a device again")
        assert b"meanwhile" not in {message.payload for message in awake.settle()}


def test_every_way_to_come_in_is_closed(plant: Plant, gateway: Host, audit: Audit) -> None:
    """A device with a certificate and a password, on both gateways; the other one has not been told yet."""
    by_password = Session(plant.passwords(), plant.password("tablet-jo"))
    with plant.session("tablet-jo", "gateway-2") as elsewhere, by_password, plant.session("energy-1") as meter:
        with revoked(plant, gateway, "tablet-jo"):
            by_password.wait_goodbye(A_SECOND)
            for listener, credentials in (
                (plant.mtls(), plant.certificate("tablet-jo")),
                (plant.passwords(), plant.password("tablet-jo")),
            ):
                assert probe.enter(listener, credentials).code == NOT_AUTHORIZED
            audit.await_lines(2, event="refused", action="connect", device="tablet-jo", reason="revoked")
            elsewhere.settle()
        with revoked(plant, gateway, "energy-1"):
            meter.wait_goodbye(A_SECOND)
        assert probe.enter(plant.passwords(), plant.password("energy-1")).accepted


def test_a_stolen_certificate_is_off_within_a_second_and_its_device_stays(
    plant: Plant, gateway: Host, audit: Audit
) -> None:
    """Not the device, but one of its certificates: an older one, by its serial number."""
    stolen = plant.other_certificate("temp-104")
    with Session(plant.mtls(), stolen) as thief:
        thief.settle()
        serials = {f"{plant.serial(stolen):x}": "keyCompromise"}
        with other_site(plant, gateway, lambda _: None, revoked_serials=serials):
            thief.wait_goodbye(A_SECOND)
            audit.line(event="disconnected", device="temp-104", reason="certificate-revoked")
            with plant.session("temp-104") as device:
                assert device.publish("sensors/temp-104/temperature", b"1").granted
            # No certificate revocation list of this gateway names it: the store is enough.
            assert probe.enter(plant.mtls(), stolen).code == NOT_AUTHORIZED
            audit.line(event="refused", action="connect", device="temp-104", reason="certificate-revoked")
        assert probe.enter(plant.mtls(), stolen).accepted


# --- a pre-shared key


@pytest.fixture
def key() -> bytes:
    return secrets.token_bytes(32)


def with_psk_device(site: Site) -> None:
    site.devices["devices"].append(
        {"id": PSK_DEVICE, "location": "hall-1", "roles": ["sensor"], "authentication": ["psk"]}
    )


def test_a_device_with_a_pre_shared_key_does_what_it_may_until_it_is_revoked(
    plant: Plant, gateway: Host, audit: Audit, key: bytes
) -> None:
    credentials = Credentials(psk_identity=PSK_DEVICE, psk=key)
    with other_site(plant, gateway, with_psk_device, psk={PSK_DEVICE: key.hex()}), plant.session("historian") as reader:
        reader.subscribe("#")
        with Session(plant.keys(), credentials) as device:
            assert device.publish(f"sensors/{PSK_DEVICE}/level", b"7").granted
            assert device.publish("sensors/temp-101/temperature", b"7").code == NOT_AUTHORIZED
            assert [told.code for told in device.subscribe(f"commands/{PSK_DEVICE}/#", "#")] == [1, NOT_AUTHORIZED]
            audit.line(action="publish", device=PSK_DEVICE, topic="sensors/temp-101/temperature", reason="not-allowed")
            gateway.exec(["systemctl", "reload", "mosquitto"])
            assert device.publish(f"sensors/{PSK_DEVICE}/level", b"8").granted
            gateway.exec(["bednet-store", "revoke", PSK_DEVICE, "--reason", "keyCompromise"])
            device.wait_goodbye(A_SECOND)
            audit.line(event="disconnected", device=PSK_DEVICE, reason="revoked")
        assert [message.payload for message in reader.settle()] == [b"7", b"8"]
        assert not probe.enter(plant.keys(), credentials).accepted
        audit.line(event="refused", action="connect", device=PSK_DEVICE, reason="revoked")


# --- an end


def test_access_ends_when_it_is_said_to(plant: Plant, gateway: Host, audit: Audit) -> None:
    will = Will("sensors/temp-103/state", b"a last word")
    end = dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(seconds=4)

    def change(site: Site) -> None:
        site.device("temp-103")["until"] = end.strftime("%Y-%m-%dT%H:%M:%SZ")

    with (
        plant.session("historian") as historian,
        plant.session("temp-103", will=will) as guest,
        other_site(plant, gateway, change),
    ):
        historian.subscribe("#")
        assert guest.publish("sensors/temp-103/temperature", b"in time").granted
        assert dt.datetime.now(dt.UTC) < end, "this machine is too busy: its time was over before it began"
        goodbye = guest.wait_goodbye(6)
        late = (dt.datetime.now(dt.UTC) - end).total_seconds()
        assert goodbye.code == ADMINISTRATIVE_ACTION
        assert 0 <= late < A_SECOND
        audit.line(event="disconnected", device="temp-103", reason="until")
        assert probe.enter(plant.mtls(), plant.certificate("temp-103")).code == NOT_AUTHORIZED
        audit.line(event="refused", action="connect", device="temp-103", reason="until")
        assert [message.payload for message in historian.settle()] == [b"in time"]
    assert probe.enter(plant.mtls(), plant.certificate("temp-103")).accepted


# --- another policy


def test_a_subscription_that_stands_brings_nothing_any_more_that_is_no_longer_granted(
    plant: Plant, gateway: Host, audit: Audit
) -> None:
    """Nobody asks again for a subscription that was granted: what is delivered is looked at each time."""
    before = started(gateway), reloads(gateway)
    topic = "sensors/temp-101/temperature"

    def change(site: Site) -> None:
        site.add_rule("blind", when="device.id == 'hmi-1'", deny={"subscribe": ["sensors/temp-101/#"]})

    with ExitStack() as stack:
        hmi, other, sensor, neighbour = (
            stack.enter_context(plant.session(name)) for name in ("hmi-1", "line-1", "temp-101", "temp-102")
        )
        for session in (hmi, other):
            assert session.subscribe("sensors/+/#")[0].granted
        assert sensor.publish(topic, b"1").granted
        assert [message.payload for message in hmi.settle()] == [b"1"]
        with other_site(plant, gateway, change) as done:
            assert done["changed_devices"] == 1
            assert sensor.publish(topic, b"2").granted
            assert neighbour.publish("sensors/temp-102/temperature", b"3").granted
            assert [message.payload for message in hmi.settle()] == [b"3"]
            told = audit.line(action="deliver", device="hmi-1", topic=topic)
            assert (told["reason"], told["rule"]) == ("denied", "rule/blind/deny/subscribe/0")
            # Of a new subscription a part would be hidden.
            assert hmi.subscribe("sensors/+/#")[0].code == NOT_AUTHORIZED
            told = audit.line(action="subscribe", device="hmi-1", topic="sensors/+/#")
            assert (told["reason"], told["rule"]) == ("partly", "rule/blind/deny/subscribe/0")
        assert sensor.publish(topic, b"4").granted
        assert [message.payload for message in hmi.settle()] == [b"4"]
        assert [message.payload for message in other.settle()] == [b"1", b"2", b"3", b"4"]
        assert {session.connections for session in (hmi, other, sensor, neighbour)} == {1}
    assert (started(gateway), reloads(gateway)) == before


def test_a_rule_holds_from_its_networks_only(plant: Plant, gateway: Host, audit: Audit) -> None:
    """The same device, from the devices' host and from this one."""
    host = plant.lab.hosts["devices"]
    topics = {"from there": ("devices/x", True), "not from there": ("elsewhere/x", False)}

    def change(site: Site) -> None:
        there = [f"{host.address}/32"]
        site.add_rule("there", when="device.id == 'temp-101'", **{"from": there}, allow={"publish": ["devices/#"]})
        site.add_rule("all", when="device.id == 'temp-101'", allow={"publish": ["elsewhere/#"]})
        site.add_rule("but", when="device.id == 'temp-101'", **{"from": there}, deny={"publish": ["elsewhere/#"]})

    with (
        other_site(plant, gateway, change),
        plant.session("historian") as historian,
        plant.session("temp-101") as here,
        plant.files_on(host, "temp-101") as options,
    ):
        historian.subscribe("#")
        assert here.publish("devices/x", b"here").code == NOT_AUTHORIZED
        assert here.publish("elsewhere/x", b"here").granted
        audit.line(action="publish", device="temp-101", topic="devices/x", reason="not-allowed")
        assert [message.payload for message in historian.settle()] == [b"here"]
        here.close()
        for payload, (topic, may) in topics.items():
            words = ["mosquitto_pub", "-h", gateway.address, "-p", "8883", "-V", "5", "-i", "temp-101", *options]
            told = host.exec([*words, "-q", "1", "-t", topic, "-m", payload], check=False, timeout_s=20)
            assert told.rc == 0, told
            assert ("Not authorized" not in told.stderr) == may, told
        assert [message.payload for message in historian.settle()] == [b"from there"]
        line = audit.line(action="publish", topic="elsewhere/x", address=host.address)
        assert (line["reason"], line["rule"]) == ("denied", "rule/but/deny/publish/0")


def test_a_rule_holds_at_its_hours_only(plant: Plant, gateway: Host, audit: Audit) -> None:
    """The hours are far from now, so that no clock strikes meanwhile."""
    zone = "Asia/Kathmandu"
    now = dt.datetime.now(dt.timezone(dt.timedelta(hours=5, minutes=45)))

    def hours(begin: int, end: int) -> str:
        return "-".join(f"{now + dt.timedelta(hours=offset):%H:%M}" for offset in (begin, end))

    def change(site: Site) -> None:
        for name, (begin, end) in {"now": (-5, 5), "later": (5, 10), "before": (-10, -5)}.items():
            during = [{"hours": hours(begin, end), "zone": zone}]
            site.add_rule(name, when="device.id == 'temp-101'", during=during, allow={"publish": [f"{name}/#"]})
            site.add_rule(
                f"{name}-not",
                when="device.id == 'temp-102'",
                during=during,
                deny={"publish": [f"sensors/temp-102/{name}"]},
            )

    with other_site(plant, gateway, change), plant.session("temp-101") as one, plant.session("temp-102") as two:
        assert [one.publish(f"{name}/x", b"1").code < 0x80 for name in ("now", "later", "before")] == [
            True,
            False,
            False,
        ]
        assert [two.publish(f"sensors/temp-102/{name}", b"1").code < 0x80 for name in ("now", "later", "before")] == [
            False, True, True,
        ]  # fmt: skip
        audit.line(action="publish", device="temp-101", topic="later/x", reason="not-allowed")
        told = audit.line(action="publish", device="temp-102", topic="sensors/temp-102/now", reason="denied")
        assert told["rule"] == "rule/now-not/deny/publish/0"


@pytest.mark.full
def test_a_window_closes_on_the_minute(plant: Plant, gateway: Host) -> None:
    """At its last second a rule holds, and from its end on no more; up to 65 seconds of waiting."""
    end = dt.datetime.now(dt.UTC).replace(second=0, microsecond=0) + dt.timedelta(minutes=1)
    if (end - dt.datetime.now(dt.UTC)).total_seconds() < 5:
        end += dt.timedelta(minutes=1)

    def change(site: Site) -> None:
        hours = f"{end - dt.timedelta(hours=2):%H:%M}-{end:%H:%M}"
        during = [{"hours": hours, "zone": "UTC"}]
        site.add_rule("window", when="device.id == 'temp-101'", during=during, allow={"publish": ["window/#"]})

    with other_site(plant, gateway, change), plant.session("temp-101") as device:
        granted = []
        while (begun := dt.datetime.now(dt.UTC)) < end + dt.timedelta(seconds=1):
            answer = device.publish("window/x", b"1").granted
            granted.append((begun, dt.datetime.now(dt.UTC), answer))
            time.sleep(0.02)
        assert {answer for _, done, answer in granted if done < end} == {True}
        assert {answer for begun, _, answer in granted if begun >= end} == {False}
        assert device.goodbye is None


# --- a reload


@pytest.fixture
def waiting(plant: Plant) -> Iterator[None]:
    """A message waits for a device that is away."""
    with plant.session("plc-1-filler"):
        pass
    with plant.session("plc-1-filler", clean=False, expiry=600) as asleep:
        asleep.subscribe("commands/plc-1-filler/#")
    with plant.session("line-1") as line:
        assert line.publish("commands/plc-1-filler/step", b"waiting").granted
    yield
    with plant.session("plc-1-filler"):
        pass


def test_a_reload_drops_nobody_whatever_they_came_in_with(
    plant: Plant, gateway: Host, key: bytes, waiting: None
) -> None:
    """The broker asks the plugin again who everybody is, with less at hand than when they came."""
    with ExitStack() as stack:
        stack.enter_context(other_site(plant, gateway, with_psk_device, psk={PSK_DEVICE: key.hex()}))
        sessions = [stack.enter_context(plant.session(name)) for name in ("temp-101", "line-1", "energy-1", "energy-2")]
        sessions.append(stack.enter_context(Session(plant.passwords(), plant.password("tablet-jo"), version=4)))
        sessions.append(stack.enter_context(Session(plant.keys(), Credentials(psk_identity=PSK_DEVICE, psk=key))))
        before, pid = reloads(gateway), started(gateway)
        for count in range(1, 4):
            gateway.exec(["systemctl", "reload", "mosquitto"])
            for session in sessions:
                session.settle()
            assert reloads(gateway) == before + count
        assert {session.connections for session in sessions} == {1}
        assert all(session.goodbye is None for session in sessions)
    assert started(gateway) == pid
    with plant.session("plc-1-filler", clean=False, expiry=0) as awake:
        assert awake.resumed
        awake.until(lambda message: message.payload == b"waiting", "the message that waited")
