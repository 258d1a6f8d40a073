# SPDX-License-Identifier: Apache-2.0
"""How a load run is planned.

- :func:`make_plan`: who connects, says and hears what: from a site's devices and policy, and a profile.
- :func:`choose`: which of a site's devices to multiply to come to a number; :func:`way_of`: how one of them comes in.

Nothing here knows a role or topic by name: who tells, who listens and who commands follows from what the policy grants.
"""

from __future__ import annotations

import math
import secrets
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from bednet import topics
from bednet.policy import Access, Effect
from bednet.site import Device, Site, decide
from load.measure import HEAD_BYTES
from load.plan import (
    ANSWERS,
    COMMANDS,
    FLOOD,
    SLOW,
    TELEMETRY,
    TOKEN,
    TRESPASS,
    WAYS,
    Gateway,
    Plan,
    PlanError,
    Player,
    Stream,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from load.profiles import Profile

#: What a device's attributes may say of its telemetry, in place of the profile.
PACE, QOS, BYTES = "publish_every_s", "publish_qos", "publish_bytes"
#: The way to prove itself to the token service by which a device's tokens are bound to nothing.
BEARER = "client_secret_basic"
#: What stands for the `#` of a rule when a device answers a command, and when it is sent one.
ANSWER, COMMAND = "answer", "load"
CONNECT_DEADLINE_S = 20.0
_GOLDEN = (math.sqrt(5) - 1) / 2


def filters(site: Site, device: str) -> list[str]:
    """Return what a device subscribes to: all that it may, and nothing twice. The broker's own figures are left out."""
    granted = [
        grant.topic_filter
        for grant in site.grants[device]
        if grant.rule.effect is Effect.ALLOW
        and grant.rule.access is Access.SUBSCRIBE
        and not grant.topic_filter.startswith("$")
        and decide(site, device, Access.SUBSCRIBE, grant.topic_filter).allowed
    ]
    kept: list[str] = []
    for name in dict.fromkeys(granted):
        if not any(other != name and topics.covers(other, name) for other in granted):
            kept.append(name)
    return kept


def broker_filters(site: Site, device: str) -> list[str]:
    """Return where a device may hear what the broker tells of itself."""
    granted = [
        grant.topic_filter
        for grant in site.grants[device]
        if grant.rule.effect is Effect.ALLOW
        and grant.rule.access is Access.SUBSCRIBE
        and grant.topic_filter.startswith("$SYS/")
        and decide(site, device, Access.SUBSCRIBE, grant.topic_filter).allowed
    ]
    return list(dict.fromkeys(granted))


def own_topics(site: Site, device: Device, word: str) -> list[str]:
    """Return the topics in which a device speaks for itself.

    :param word: what stands for the `#` of a rule.
    """
    found = []
    for grant in site.grants[device.id]:
        if grant.rule.effect is Effect.ALLOW and grant.rule.access is Access.PUBLISH:
            levels = grant.topic_filter.split("/")
            if "+" in levels or levels == ["#"]:
                continue
            topic = "/".join([*levels[:-1], word] if levels[-1] == "#" else levels)
            if decide(site, device.id, Access.PUBLISH, topic).allowed:
                found.append(topic)
    return list(dict.fromkeys(found))


def telemetry_topics(site: Site, device: Device) -> list[str]:
    """Return the topics in which a device says what it measures."""
    return own_topics(site, device, (device.type or "value").replace("/", "-"))


def commands(site: Site, commander: str, target: Device) -> list[str]:
    """Return the topic by which one device commands another; empty where it may not.

    A command is what is addressed to the target by its id, and what the commander may publish to others as well.
    """
    for wide in site.grants[commander]:
        if wide.rule.effect is not Effect.ALLOW or wide.rule.access is not Access.PUBLISH:
            continue
        if not {"+", "#"} & set(wide.topic_filter.split("/")):
            continue
        for heard in filters(site, target.id):
            common = topics.intersection(wide.topic_filter, heard)
            if common is None or target.id not in common.split("/") or "+" in common.split("/"):
                continue
            topic = f"{common.removesuffix('#')}{COMMAND}" if common.endswith("#") else common
            if (
                decide(site, commander, Access.PUBLISH, topic).allowed
                and decide(site, target.id, Access.SUBSCRIBE, topic).allowed
            ):
                return [topic]
    return []


def readers(site: Site, devices: Sequence[Device]) -> set[str]:
    """Return the devices that hear more topics than they speak in."""
    spoken = {topic: device.id for device in devices for topic in telemetry_topics(site, device)}
    found = set()
    for device in devices:
        heard = filters(site, device.id)
        hears = sum(
            any(topics.matches(name, topic) for name in heard) for topic, who in spoken.items() if who != device.id
        )
        if hears > sum(who == device.id for who in spoken.values()):
            found.add(device.id)
    return found


def playable(device: Device) -> bool:
    """Say whether a device can be played: it is in service, and has a way in that the generator knows."""
    return device.revoked is None and way_of(device) is not None


def way_of(device: Device, wanted: str | None = None) -> str | None:
    """Return how a device comes in: the wanted way, or else its first; None where it has none such."""
    for way in WAYS:
        if way in device.authentication and wanted in (None, way):
            return way
    return None


def reaches(device: Device, gateway: Gateway, way: str | None = None, method: str | None = None) -> bool:
    """Say whether a gateway has a listener for the way that a device comes in by.

    :param way: how its copy comes in, whatever its own way is.
    :param method: how its copy gets its tokens, whatever its own method is.
    """
    taken = way or way_of(device)
    return taken is not None and gateway.port(taken, bound=is_bound(device, method)) is not None


def is_bound(device: Device, method: str | None = None) -> bool:
    """Say whether a device's tokens, if it comes in by one, are bound to its certificate.

    :param method: how its copy gets its tokens, whatever its own method is.
    """
    return (method or device.token_authentication) != BEARER


def choose(
    site: Site, count: int, gateway: Gateway | None = None, *, way: str | None = None, method: str | None = None
) -> list[str]:
    """Return which devices to play, one id for each of `count` players.

    All devices that can be played come once, as far as they fit; then those that tell are repeated, and those that hear
    more than they tell are not: a plant grows by sensors, and not by historians.

    :param gateway: leave out whom it has no listener for.
    :param way: how the copies come in.
    :param method: how they get their tokens.
    :raises PlanError: when nobody tells anything.
    """
    devices = [
        device
        for device in site.devices.values()
        if playable(device) and (gateway is None or reaches(device, gateway, way, method))
    ]
    listening = readers(site, devices)
    tellers = [d.id for d in devices if d.id not in listening and telemetry_topics(site, d)]
    if not tellers:
        raise PlanError("No device of this site may publish to a topic of its own. Cure: look at policy.yml.")
    if count <= len(devices):
        # Few players: those who listen come first, since without them nothing is delivered.
        order = [d.id for d in devices if d.id in listening] + [d.id for d in devices if d.id not in listening]
        keep = max(1, count // 4)
        heads = order[: min(keep, len(listening))]
        return [*heads, *[name for name in order if name not in heads][: count - len(heads)]]
    extra = count - len(devices)
    return [device.id for device in devices] + [tellers[number % len(tellers)] for number in range(extra)]


def make_plan(
    site: Site,
    gateway: Gateway,
    name: str,
    profile: Profile,
    bundles: Mapping[str, Path],
    *,
    way: str | None = None,
    restart: bool = False,
    token_address: str = "",
    warmup_s: float = 2.0,
    drain_s: float = 10.0,
    generators: int = 1,
) -> Plan:
    """Decide who does what.

    :param bundles: the devices to play, each with the folder of its credentials.
    :param token_address: where the token service is reached; empty where its name leads there.
    :param restart: where the profile cuts the connections, the broker is restarted for that.
    :param way: how all of them come in that can; None is each by its own first way.
    :raises PlanError: when the profile cannot be played.
    """
    devices = [site.devices[device] for device in bundles if device in site.devices]
    draft = _Draft(site, profile, devices)
    if profile.telemetry:
        draft.telemetry()
    if profile.command_every_s:
        draft.commands()
    if profile.flood_per_s:
        draft.flood()
    if profile.trespass_every_s:
        draft.trespass()
    slow = draft.slow_readers() if profile.slow_s else set()
    if not any(draft.streams.values()):
        raise PlanError(f"Nobody has anything to say in profile `{name}`. Cure: look at policy.yml.")
    players = []
    for number, device in enumerate(devices):
        taken = way_of(device, way) or way_of(device) if device.revoked is None else None
        if taken is None:
            raise PlanError(f"Device `{device.id}` comes in by none of {', '.join(WAYS)}. Cure: leave it out.")
        if not reaches(device, gateway, taken):
            raise PlanError(
                f"Device `{device.id}` comes in by {taken}, and {gateway.name} has no listener for that. Cure: give it "
                "one (mosquitto_password_port, mosquitto_psk_port), or choose another way (--authentication)."
            )
        players.append(
            Player(
                device.id,
                taken,
                str(bundles[device.id]),
                4 if number % 4 == 1 and taken != TOKEN and not _trespasses(draft.streams[device.id]) else 5,
                profile.clean,
                number / profile.connects_per_s,
                (
                    *((heard, profile.qos) for heard in draft.heard[device.id]),
                    *((heard, 0) for heard in broker_filters(site, device.id)),
                ),
                tuple(draft.with_audience(stream, slow) for stream in draft.streams[device.id]),
                profile.slow_s if device.id in slow else 0.0,
                is_bound(device),
            )
        )
    plan = Plan(
        secrets.randbits(32),
        str(site.folder),
        name,
        gateway,
        str(next(iter(bundles.values())) / "ca.pem"),
        profile.duration_s,
        warmup_s,
        drain_s,
        CONNECT_DEADLINE_S,
        profile.cut_at * profile.duration_s,
        profile.reconnect_within_s,
        restart and profile.cut_at > 0,
        tuple(players),
        generators,
        profile.renew_every_s,
        token_address,
    )
    if not any(stream.audience for stream in plan.streams):
        raise PlanError(f"Nobody hears what is said in profile `{name}`. Cure: play more devices, with --devices.")
    return plan


def _trespasses(streams: Iterable[Stream]) -> bool:
    return any(stream.kind == TRESPASS for stream in streams)


def _own(device: Device, name: str, otherwise: float, wanted: str, good: Callable[[float], bool]) -> float:
    """Return what a device's attributes say of its telemetry, or else what the profile does.

    :raises PlanError: when that makes no sense.
    """
    if name not in device.attributes:
        return otherwise
    value = device.attributes[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not good(value):
        raise PlanError(
            f"{device.places.get(f'attributes/{name}', device.place)}: `{name}` of '{device.id}' is {value!r}. "
            f"Cure: write {wanted}."
        )
    return value


class _Draft:
    """A plan while it is made."""

    def __init__(self, site: Site, profile: Profile, devices: Sequence[Device]) -> None:
        self.site = site
        self.profile = profile
        self.devices = devices
        self.heard = {device.id: filters(site, device.id) for device in devices}
        self.streams: dict[str, list[Stream]] = defaultdict(list)
        self._count = 0

    def _add(
        self, device: str, kind: str, topic: str, every_s: float, *, qos: int | None = None, payload: int | None = None
    ) -> Stream:
        self._count += 1
        # Offsets that never bunch, however many there are.
        offset = (self._count * _GOLDEN % 1) * every_s
        size = max(self.profile.payload_bytes if payload is None else payload, HEAD_BYTES)
        stream = Stream(
            self._count, kind, topic, self.profile.qos if qos is None else qos, size, round(every_s, 6), offset
        )
        self.streams[device].append(stream)
        return stream

    def telemetry(self) -> None:
        for device in self.devices:
            pace = _own(device, PACE, self.profile.every_s, "a number of seconds above 0", lambda value: value > 0)
            qos = _own(device, QOS, self.profile.qos, "0, 1 or 2", lambda value: value in (0, 1, 2))
            size = _own(
                *(device, BYTES, self.profile.payload_bytes, f"a whole number, {HEAD_BYTES} or more"),
                lambda value: value >= HEAD_BYTES and value == int(value),
            )
            for topic in telemetry_topics(self.site, device):
                self._add(device.id, TELEMETRY, topic, float(pace), qos=int(qos), payload=int(size))

    def commands(self) -> None:
        """Let each device be commanded by one who may, the work being dealt out among them."""
        by_target: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for commander in self.devices:
            for target in self.devices:
                if target.id != commander.id:
                    by_target[target.id] += [
                        (commander.id, topic) for topic in commands(self.site, commander.id, target)
                    ]
        for number, (name, ways) in enumerate(by_target.items()):
            turn = number % len(ways) if ways else 0
            for by, topic in [*ways[turn:], *ways[:turn]]:
                heard = self.heard[by]
                answers = [
                    spoken
                    for spoken in own_topics(self.site, self.site.devices[name], ANSWER)
                    if any(topics.matches(name, spoken) for name in heard)
                ]
                if answers:
                    command = self._add(by, COMMANDS, topic, self.profile.command_every_s)
                    answer = self._add(name, ANSWERS, answers[0], 0.0)
                    self.streams[name][-1] = replace(answer, answers=(command.number,))
                    break
        if not any(stream.kind == COMMANDS for streams in self.streams.values() for stream in streams):
            raise PlanError(
                "Nobody among the devices may command another and hear its answer. Cure: play more devices "
                "(--devices), or look at policy.yml: a command is a topic with the device's id in it."
            )

    def flood(self) -> None:
        listening = readers(self.site, self.devices)
        for device in reversed(self.devices):
            found = telemetry_topics(self.site, device)
            if device.id not in listening and found:
                # Its ordinary telemetry makes way.
                self.streams[device.id] = []
                self._add(device.id, FLOOD, found[0], 1 / self.profile.flood_per_s, qos=0)
                return
        raise PlanError("There is no device that could flood: nobody tells more than it hears.")

    def trespass(self) -> None:
        """Let one device publish to the topic of another."""
        for trespasser in self.devices:
            for other in self.devices:
                for topic in telemetry_topics(self.site, other):
                    if not decide(self.site, trespasser.id, Access.PUBLISH, topic).allowed:
                        self._add(trespasser.id, TRESPASS, topic, self.profile.trespass_every_s, qos=1)
                        return
        raise PlanError("Every device may publish to every topic, so none can be refused. Cure: look at policy.yml.")

    def slow_readers(self) -> set[str]:
        """Return half of those who listen, at least one, and at least one less than all."""
        listening = [device.id for device in self.devices if device.id in readers(self.site, self.devices)]
        if len(listening) <= 1:
            raise PlanError(
                "For slow readers there must be two devices that hear more than they tell. Cure: play more devices "
                "(--devices)."
            )
        return set(listening[: max(1, len(listening) // 2)])

    def with_audience(self, stream: Stream, slow: Iterable[str]) -> Stream:
        """Return a stream with who hears it."""
        if stream.kind == TRESPASS:
            return stream
        counts: dict[tuple[str, int], int] = defaultdict(int)
        for device in self.devices:
            if any(topics.matches(name, stream.topic) for name in self.heard[device.id]) and (
                decide(self.site, device.id, Access.SUBSCRIBE, stream.topic).allowed
            ):
                whose = SLOW if device.id in slow else stream.kind
                counts[whose, min(stream.qos, self.profile.qos)] += 1
        return replace(stream, audience=tuple((whose, qos, count) for (whose, qos), count in sorted(counts.items())))
