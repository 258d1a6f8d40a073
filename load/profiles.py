# SPDX-License-Identifier: Apache-2.0
"""The profiles: habits of real plants, as data.

- :class:`Profile`: what one of them says.
- :data:`PROFILES`: all of them, by name.

A profile says how often and how; who, and to which topics, comes from the site (:mod:`load.planning`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """A habit.

    :ivar habit: one sentence for people.
    :ivar devices: how many devices, unless told otherwise.
    :ivar every_s: the time between two messages of a device to one of its topics, in seconds. A device's own pace
        (`attributes: {publish_every_s: 10}` in devices.yml) goes before it.
    :ivar qos: the QoS of telemetry and of what listens to it.
    :ivar payload_bytes: the size of a message.
    :ivar connects_per_s: how many devices connect in a second.
    :ivar duration_s: how long it is measured, after everybody is connected.
    :ivar clean: whether devices begin a new session at each connect; otherwise the gateway keeps what they miss.
    :ivar telemetry: whether devices publish what they measure.
    :ivar command_every_s: how often each device is sent a command, which it answers; 0 is never.
    :ivar cut_at: the share of the duration after which every connection is cut at once; 0 is never.
    :ivar reconnect_within_s: after a cut each device comes back at a moment of its own within this time.
    :ivar slow_s: how long slow readers do not read, in each period of twice that; 0 is no slow readers.
    :ivar flood_per_s: messages per second of one device that floods its topic, at QoS 0; 0 is none.
    :ivar trespass_every_s: how often one device publishes where it may not; 0 is never.
    :ivar renew_every_s: how often devices get a new token and show it in the session; 0 is never.
    :ivar authentication: how all test identities come in; empty is each as its model does.
    """

    habit: str
    devices: int = 100
    every_s: float = 1.0
    qos: int = 1
    payload_bytes: int = 128
    connects_per_s: float = 50.0
    duration_s: float = 60.0
    clean: bool = True
    telemetry: bool = True
    command_every_s: float = 0.0
    cut_at: float = 0.0
    reconnect_within_s: float = 0.0
    slow_s: float = 0.0
    flood_per_s: float = 0.0
    trespass_every_s: float = 0.0
    renew_every_s: float = 0.0
    authentication: str = ""


PROFILES = {
    "steady": Profile("Every device says what it measures, second after second; who may listen does."),
    "connect-storm": Profile(
        "The shift begins: all devices connect within moments, and then say little.",
        connects_per_s=200.0,
        every_s=10.0,
        duration_s=20.0,
    ),
    "reconnect-storm": Profile(
        "Every connection breaks at once, as when a broker restarts; all come back within two seconds, and want what "
        "they missed.",
        clean=False,
        cut_at=0.3,
        reconnect_within_s=2.0,
        duration_s=40.0,
    ),
    "commands": Profile(
        "Whoever may command sends each device a command, and the device answers; nothing else is said.",
        telemetry=False,
        command_every_s=1.0,
    ),
    "slow-readers": Profile(
        "Telemetry, while those who listen stop reading for seconds at a time; one of them reads steadily.",
        slow_s=4.0,
    ),
    "noisy-neighbour": Profile(
        "Telemetry, while one device floods the gateway with all that it may publish.", flood_per_s=2000.0
    ),
    "mixed": Profile(
        "A plant on a working day: telemetry, commands with answers, and one device that tries what it may not.",
        command_every_s=5.0,
        trespass_every_s=1.0,
    ),
    "token-renewal": Profile(
        "Every device comes in by a token and renews it in the session every few seconds; telemetry goes on meanwhile.",
        devices=40,
        connects_per_s=10.0,
        duration_s=30.0,
        renew_every_s=5.0,
        authentication="token",
    ),
}
