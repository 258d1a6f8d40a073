# SPDX-License-Identifier: Apache-2.0
"""Plays the devices of a plant: each with its own credentials, connection, habits and counters.

Runs on the lab's host `devices`, from a zip file that also holds paho-mqtt, :mod:`bednet.psk` and :mod:`bednet.client`:
nothing but Python is needed there, and cryptography for devices that sign their requests for tokens.

- :func:`main`: ``devices.pyz PLAN STATUS`` plays until SIGTERM.
- :class:`Device`: one device.
- :class:`Ledger`: what a reader has heard, and what it has missed.

The plan is JSON: ``{"devices": [{"id", "bundle", "protocol", "authentication", "gateways": [{"address", "port"}],
"publish": [{"topic", "every_s", "quantity", "unit", "base", "swing"}], "subscribe": [filter]}]}``; `protocol` is 4
(MQTT 3.1.1) or 5, and a device with several gateways talks to all of them at once. A device with `token` speaks MQTT 5,
and renews its tokens in the session.

Every message carries the number it has in its topic (`seq`, from 1), so that whoever listens can count what was lost.
The status file is JSON, written anew every second: ``{"at", "devices": {id: counters}}``.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import ssl
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from bednet import psk
from bednet.client import TokenClient, TokenSource

if TYPE_CHECKING:
    from paho.mqtt.reasoncodes import ReasonCode

logger = logging.getLogger("devices")

MQTT_5 = 5
KEEPALIVE_S = 20
#: Within this time every device speaks for the first time.
FIRST_WORDS_S = 2.0
BACKOFF_FIRST_S = 1
BACKOFF_LAST_S = 30
#: What a device accepts as an interval: not so short that a mistake floods the gateway.
SHORTEST_INTERVAL_S, LONGEST_INTERVAL_S = 0.2, 60.0
#: How long a gateway keeps what a device missed while it was away.
SESSION_EXPIRY_S = 3600
#: What a device keeps for a gateway that is away; then it drops the newest, and counts that.
QUEUE_MESSAGES = 1000
#: How many gaps in a topic are remembered, in case what is missing comes late.
REMEMBERED_GAPS = 10_000


@dataclass(frozen=True)
class Habit:
    """Something that a device publishes again and again.

    :param topic: where.
    :param every_s: how often, in seconds.
    :param quantity: what is measured; the key of the value in the message.
    :param unit: its unit (UCUM).
    :param base: the value around which it swings.
    :param swing: how far.
    """

    topic: str
    every_s: float
    quantity: str
    unit: str
    base: float
    swing: float


@dataclass
class Due:
    """When a device's habit is due next, on the monotonic clock."""

    at: float
    device: Device
    habit: Habit


@dataclass
class Counters:
    """What one device did.

    :param published: messages that a gateway acknowledged.
    :param sent: messages handed to the client; those not acknowledged yet are under way.
    :param dropped: messages thrown away as the queue was full.
    :param received: messages that arrived.
    :param commands: of those, the ones addressed to this device by name.
    :param reconnects: connections made after the first.
    :param renewals: tokens renewed in the session.
    :param refused: connections, subscriptions and publishes that a gateway refused.
    :param connected: how many gateways it is connected to now.
    :param error: the last thing that went wrong, or nothing.
    """

    sent: int = 0
    published: int = 0
    dropped: int = 0
    received: int = 0
    commands: int = 0
    reconnects: int = 0
    renewals: int = 0
    refused: int = 0
    connected: int = 0
    error: str = ""


@dataclass
class Ledger:
    """What a reader has heard of one topic.

    :param first: the number of the first message heard.
    :param last: the highest number heard.
    :param count: how many different messages were heard.
    :param duplicates: how many were heard again (QoS 1 allows it).
    :param open: numbers between first and last that were not heard (yet).
    """

    first: int = 0
    last: int = 0
    count: int = 0
    duplicates: int = 0
    open: set[int] = field(default_factory=set)

    def hear(self, number: int) -> None:
        """Take a message into account."""
        if self.count == 0:
            self.first = self.last = number
            self.count = 1
        elif number > self.last:
            missed = range(self.last + 1, number)
            if len(self.open) + len(missed) <= REMEMBERED_GAPS:
                self.open.update(missed)
            self.last = number
            self.count += 1
        elif number in self.open:
            self.open.discard(number)
            self.count += 1
        else:
            self.duplicates += 1

    @property
    def missing(self) -> int:
        """How many messages between the first and the last were never heard."""
        return self.last - self.first + 1 - self.count if self.count else 0


class Device:
    """One device, with a connection to each of its gateways.

    :param plan: its entry in the plan.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self.id: str = plan["id"]
        self.habits = [Habit(**entry) for entry in plan["publish"]]
        self.counters = Counters()
        self.pace_s: float | None = None
        self.ledgers: dict[str, Ledger] = {}
        self._lock = threading.Lock()
        self._plan = plan
        self._numbers: dict[str, int] = {}
        self._sessions = [self._session(gateway) for gateway in plan["gateways"]]

    def _session(self, gateway: dict[str, Any]) -> mqtt.Client:
        new = self._plan["protocol"] == MQTT_5
        if self._plan["authentication"] == "token":
            source = TokenSource.of_bundle(Path(self._plan["bundle"]))
            client: mqtt.Client = TokenClient(source, on_renewed=self._renewed)
            client.user_data_set({"connects": 0, "up": False})
            return self._set_up(client, gateway, new=True)
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self.id,
            protocol=mqtt.MQTTv5 if new else mqtt.MQTTv311,
            # With MQTT 5 the question is put at each connect.
            clean_session=None if new else False,
            userdata={"connects": 0, "up": False},
        )
        bundle = Path(self._plan["bundle"])
        context = ssl.create_default_context(cafile=str(bundle / "ca.pem"))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self._plan["authentication"] == "certificate":
            context.load_cert_chain(bundle / "certificate.pem", bundle / "key.pem")
        elif self._plan["authentication"] == "psk":
            # The gateway has no certificate here: who has the key is the gateway.
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            context.set_ciphers("ECDHE-PSK-CHACHA20-POLY1305")
            psk.offer(context, self.id, bytes.fromhex((bundle / "psk").read_text(encoding="ascii")))
        else:
            client.username_pw_set(self.id, (bundle / "password").read_text(encoding="utf-8").rstrip("\n"))
        client.tls_set_context(context)
        return self._set_up(client, gateway, new=new)

    def _set_up(self, client: mqtt.Client, gateway: dict[str, Any], *, new: bool) -> mqtt.Client:
        client.reconnect_delay_set(BACKOFF_FIRST_S, BACKOFF_LAST_S)
        client.max_queued_messages_set(QUEUE_MESSAGES)
        client.on_connect = self._connected
        client.on_connect_fail = self._unreachable
        client.on_disconnect = self._disconnected
        client.on_subscribe = self._subscribed
        client.on_publish = self._published
        client.on_message = self._received
        if new:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call] # paho leaves it open
            properties.SessionExpiryInterval = SESSION_EXPIRY_S
            client.connect_async(
                gateway["address"], gateway["port"], KEEPALIVE_S, clean_start=False, properties=properties
            )
        else:
            client.connect_async(gateway["address"], gateway["port"], KEEPALIVE_S)
        return client

    def start(self) -> None:
        """Connect, and stay connected."""
        for session in self._sessions:
            session.loop_start()

    def stop(self) -> None:
        """Say good-bye to the gateways."""
        for session in self._sessions:
            session.disconnect()
        for session in self._sessions:
            session.loop_stop()

    def act(self, habit: Habit, now: float) -> None:
        """Publish one message, to every gateway.

        :param now: seconds since the epoch.
        """
        topic = habit.topic
        with self._lock:
            number = self._numbers[topic] = self._numbers.get(topic, 0) + 1
        payload = {
            "device": self.id,
            "seq": number,
            "at": datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds"),
            habit.quantity: reading(habit, now, number),
            "unit": habit.unit,
        }
        for session in self._sessions:
            info = session.publish(topic, json.dumps(payload), qos=1)
            with self._lock:
                if info.rc == mqtt.MQTT_ERR_QUEUE_SIZE:
                    self.counters.dropped += 1
                else:
                    self.counters.sent += 1

    def _refuse(self, what: str) -> None:
        with self._lock:
            self.counters.refused += 1
            self.counters.error = what
        logger.warning("%s: %s", self.id, what)

    def _connected(
        self, client: mqtt.Client, state: Any, _flags: Any, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._refuse(f"connection refused: {reason}")
            return
        with self._lock:
            self.counters.reconnects += bool(state["connects"])
            self.counters.connected += not state["up"]
            self.counters.error = ""
            state["connects"] += 1
            state["up"] = True
        for topic_filter in self._plan["subscribe"]:
            client.subscribe(topic_filter, qos=1)

    def _renewed(self, outcome: object) -> None:
        with self._lock:
            if isinstance(outcome, Exception):
                self.counters.error = f"no new token: {outcome}"
            else:
                self.counters.renewals += 1

    def _unreachable(self, _client: mqtt.Client, _state: Any) -> None:
        cause = sys.exc_info()[1]
        with self._lock:
            self.counters.error = f"no connection: {cause}"
        logger.info("%s: no connection: %s", self.id, cause)

    def _disconnected(
        self, _client: mqtt.Client, state: Any, _flags: Any, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        with self._lock:
            self.counters.connected -= bool(state["up"])
            state["up"] = False
            self.counters.error = f"disconnected: {reason}"

    def _subscribed(
        self, _client: mqtt.Client, _state: Any, _mid: int, reasons: list[ReasonCode], _properties: Properties | None
    ) -> None:
        for reason in reasons:
            if reason.is_failure:
                self._refuse(f"subscription refused: {reason}")

    def _published(
        self, _client: mqtt.Client, _state: Any, _mid: int, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._refuse(f"publish refused: {reason}")
            return
        with self._lock:
            self.counters.published += 1

    def _received(self, _client: mqtt.Client, _state: Any, message: mqtt.MQTTMessage) -> None:
        try:
            told = json.loads(message.payload)
            number = int(told["seq"]) if told["device"] != self.id else None
        except (ValueError, KeyError, TypeError):
            # Somebody else's message (an attacker's, a person's at a prompt): heard, but it has no number.
            number = None
        if message.topic == f"commands/{self.id}/interval":
            self.obey(message.payload)
        with self._lock:
            self.counters.received += 1
            self.counters.commands += message.topic.startswith(f"commands/{self.id}/")
            if number is not None:
                self.ledgers.setdefault(message.topic, Ledger()).hear(number)

    def obey(self, payload: bytes | bytearray) -> None:
        """Take the command to measure every so many seconds: a number, or an object with the key `interval`."""
        try:
            told = json.loads(payload)
            seconds = float(told["interval"] if isinstance(told, dict) else told)
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: a command that is no interval", self.id)
            return
        self.pace_s = min(max(seconds, SHORTEST_INTERVAL_S), LONGEST_INTERVAL_S)

    def report(self) -> dict[str, Any]:
        """Return its counters, and for a reader what it heard: {topics, heard, missing, duplicates}."""
        with self._lock:
            ledgers = list(self.ledgers.values())
            return {
                **asdict(self.counters),
                "protocol": self._plan["protocol"],
                "topics": len(ledgers),
                "heard": sum(ledger.count for ledger in ledgers),
                "missing": sum(ledger.missing for ledger in ledgers),
                "duplicates": sum(ledger.duplicates for ledger in ledgers),
            }


def reading(habit: Habit, now: float, number: int) -> float:
    """Return a plausible measurement: a slow wave with some unrest on it."""
    wave = math.sin(now / 60 + len(habit.topic))
    unrest = math.sin(number * 12.9898) * 0.1
    return round(habit.base + habit.swing * (wave + unrest), 2)


def write_status(path: Path, devices: list[Device]) -> None:
    """Write the counters of all devices, in one step."""
    status = {"at": datetime.now(UTC).isoformat(), "devices": {device.id: device.report() for device in devices}}
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(status), encoding="utf-8")
    draft.replace(path)


def main(plan: Path, status: Path) -> int:
    """Play until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    devices = [Device(entry) for entry in json.loads(plan.read_text(encoding="utf-8"))["devices"]]
    end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.set())
    for device in devices:
        device.start()
    logger.info("playing %d devices", len(devices))
    begin = time.monotonic()
    schedule = [Due(begin, device, habit) for device in devices for habit in device.habits]
    for index, due in enumerate(schedule):
        # Spread out, so that they do not all speak at once; also who speaks seldom is heard soon.
        due.at += min(due.habit.every_s, FIRST_WORDS_S) * index / len(schedule)
    told = 0.0
    while not end.wait(0.05):
        clock = time.monotonic()
        for due in schedule:
            if due.at <= clock:
                due.device.act(due.habit, time.time())
                due.at += due.device.pace_s or due.habit.every_s
        if clock - told >= 1:
            write_status(status, devices)
            told = clock
    for device in devices:
        device.stop()
    write_status(status, devices)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
