# SPDX-License-Identifier: Apache-2.0
"""What ``policy.yml`` says: roles, rules and tests.

- :func:`read_policy`: makes a :class:`Policy` of a file that was read.
- :class:`Policy`, :class:`PolicyTest`, :class:`TokenOfTest`: what it says.
"""

from __future__ import annotations

import ipaddress
import re
import zoneinfo
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bednet.errors import Problem, TopicError
from bednet.issuers import TokenDevice
from bednet.moment import DAYS, EVERY_DAY, Moment, Window, parse_instant
from bednet.policy import Access, AttributeRule, Effect, Role, Rule, check_template, decide_by
from bednet.shape import did_you_mean
from bednet.when import When, WhenError

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterator, Mapping

    from bednet.errors import Place
    from bednet.moment import Address, Network
    from bednet.yamlfile import Node

_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9])?"
_HOURS = re.compile(rf"({_CLOCK})-({_CLOCK}|24:00(?::00)?)")
_NETWORK = re.compile(r"[0-9a-fA-F.:]+(/[0-9]{1,3})?")
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


@dataclass(frozen=True, slots=True)
class PolicyTest:
    """One topic of a test in policy.yml: what `device` can or cannot do.

    :ivar device: the id of one of devices.yml, or what a token says of one.
    :ivar moment: when and from where; what is unknown in it stands for every time, and for everywhere.
    """

    device: str | TokenDevice
    can: bool
    access: Access
    topic: str
    place: Place
    moment: Moment

    @property
    def name(self) -> str:
        """The id of the device."""
        return self.device if isinstance(self.device, str) else self.device.id


@dataclass(frozen=True)
class TokenOfTest:
    """A device of a test that only a token describes.

    :ivar places: where its keys stand, ``attributes/NAME`` too.
    """

    device: TokenDevice
    place: Place
    places: Mapping[str, Place]


@dataclass(frozen=True)
class Policy:
    """What a policy.yml says.

    :ivar roles: by name, in the order of the file; so are `rules`.
    :ivar tested: the devices that its tests name, each with its place.
    :ivar tokens: those that its tests describe.
    """

    roles: Mapping[str, Role]
    rules: Mapping[str, AttributeRule]
    tests: tuple[PolicyTest, ...]
    tested: tuple[tuple[str, Place], ...]
    tokens: tuple[TokenOfTest, ...] = ()


def read_policy(root: Node, problems: list[Problem]) -> Policy:
    """Return what a policy.yml says, and add what is wrong with it to `problems`.

    :param root: the file, whose shape was checked already; what has the wrong shape is passed over.
    """
    reader = _Reader(problems)
    tests = tuple(reader.tests(root))
    return Policy(reader.roles(root), reader.rules(root), tests, tuple(reader.tested), tuple(reader.tokens))


def _text(node: Node | None) -> str:
    return node.value if node is not None and isinstance(node.value, str) else ""


def _texts(node: Node | None) -> list[tuple[str, Place]]:
    elements = node.elements() if node is not None else ()
    return [(element.value, element.place) for element in elements if isinstance(element.value, str)]


def _seconds(clock: str) -> int:
    hours, minutes, seconds = (*(int(part) for part in clock.split(":")), 0)[:3]
    return hours * 3600 + minutes * 60 + seconds


class _Reader:
    """Collects problems instead of stopping at the first."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.tested: list[tuple[str, Place]] = []
        self.tokens: list[TokenOfTest] = []
        self._zones: set[str] = set()

    def refuse(self, place: Place, code: str, message: str, cure: str, *, warning: bool = False) -> None:
        self.problems.append(Problem(place, code, message, cure, warning))

    def roles(self, root: Node) -> dict[str, Role]:
        roles: dict[str, Role] = {}
        stated = root.get("roles")
        for name, node in stated.items() if stated else ():
            place = stated.keys[name] if stated else node.place
            rules = tuple(self._lines(f"role/{name}", f"role '{name}'", node))
            roles[name] = Role(name, _text(node.get("description")), rules, place)
        return roles

    def rules(self, root: Node) -> dict[str, AttributeRule]:
        rules: dict[str, AttributeRule] = {}
        stated = root.get("rules")
        for node in stated.elements() if stated else ():
            name = node.get("name")
            if name is None or not isinstance(name.value, str):
                continue
            if first := rules.get(name.value):
                message = f"the rule '{first.name}' stands here again; it stands in line {first.place.line} already"
                self.refuse(name.place, "rule-twice", message, "rename one of the two, or join them")
                continue
            source = f"rule '{name.value}'"
            during = self._during(source, node.get("during"))
            networks = tuple(self._networks(source, node.get("from")))
            lines = tuple(self._lines(f"rule/{name.value}", source, node, during, networks))
            when = self._when(source, node.get("when"))
            rules[name.value] = AttributeRule(name.value, _text(node.get("description")), when, lines, name.place)
        return rules

    def _when(self, source: str, node: Node | None) -> When | None:
        if node is None or not isinstance(node.value, str):
            return None
        try:
            return When(node.value, node.place)
        except WhenError as error:
            self.refuse(node.place, error.code, f"{source}: {error}", error.cure)
            return None

    def _lines(
        self,
        identity: str,
        source: str,
        node: Node,
        during: tuple[Window, ...] = (),
        networks: tuple[Network, ...] = (),
    ) -> Iterator[Rule]:
        for effect in Effect:
            lists = node.get(effect)
            for access in Access:
                for number, (template, place) in enumerate(_texts(lists.get(access) if lists else None)):
                    try:
                        check_template(template, access)
                    except TopicError as error:
                        self.refuse(place, error.code, f"{source}: {error}", error.cure)
                    else:
                        rule_id = f"{identity}/{effect}/{access}/{number}"
                        yield Rule(rule_id, source, effect, access, template, place, during, networks)

    def _during(self, source: str, node: Node | None) -> tuple[Window, ...]:
        return tuple(
            window
            for entry in (node.elements() if node is not None else ())
            if (window := self._window(source, entry)) is not None
        )

    def _window(self, source: str, node: Node) -> Window | None:
        days = frozenset(DAYS.index(day) for day, _ in _texts(node.get("days")) if day in DAYS)
        hours, zone = node.get("hours"), node.get("zone")
        start, end = 0, 86400
        sound = True
        if hours is not None and isinstance(hours.value, str):
            if match := _HOURS.fullmatch(hours.value):
                start, end = _seconds(match[1]), _seconds(match[2])
            else:
                message = f"{source}: 'hours' is {hours.value!r}"
                cure = 'write two times of day, as in "06:00-22:00"; the second may be 24:00, or before the first'
                self.refuse(hours.place, "bad-hours", message, cure)
                sound = False
        if zone is None or not isinstance(zone.value, str):
            return None
        known = self._zones = self._zones or zoneinfo.available_timezones()  # reads many files
        if zone.value not in known:
            message = f"{source}: the time zone {zone.value!r} is not known"
            cure = (
                f"{did_you_mean(zone.value, known)}Write the name of a zone of the IANA database, as in Europe/Berlin"
            )
            if not known:
                cure = "install the package tzdata on this machine; it knows no time zone at all"
            self.refuse(zone.place, "bad-zone", message, cure)
            sound = False
        if not sound:
            return None
        window = Window(days or EVERY_DAY, start, end, zone.value)
        if window.always:
            message = f"{source}: this window of 'during' is open at any time"
            cure = "add 'days' or 'hours', or take 'during' out"
            self.refuse(node.place, "window-always", message, cure, warning=True)
        return window

    def _networks(self, source: str, node: Node | None) -> Iterator[Network]:
        for text, place in _texts(node):
            network = self._network(source, text, place)
            if network is not None:
                yield network

    def _network(self, source: str, text: str, place: Place) -> Network | None:
        message = f"{source}: {text!r} is not a network"
        cure = "write an address and the length of its prefix, as in 10.20.0.0/16 or 2001:db8::/32"
        try:
            if not _NETWORK.fullmatch(text):
                raise ValueError
            network = ipaddress.ip_network(text, strict=False)
        except ValueError:
            self.refuse(place, "bad-network", message, cure)
            return None
        stated = text.partition("/")[0]
        if ipaddress.ip_address(stated) != network.network_address:
            message = f"{source}: the network {text!r} has bits beyond its prefix"
            cure = f"write {network} for the whole network, or {stated} for the one address"
            self.refuse(place, "bad-network", message, cure)
            return None
        if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_MAPPED):
            address = network.network_address.ipv4_mapped
            message = f"{source}: {text!r} is an IPv4 network in the form of IPv6"
            self.refuse(place, "bad-network", message, f"write {address}/{network.prefixlen - 96}")
            return None
        return network

    def tests(self, root: Node) -> Iterator[PolicyTest]:
        stated = root.get("tests")
        for entry in stated.elements() if stated else ():
            device = self._tested(entry)
            if device is None:
                continue
            name = device if isinstance(device, str) else device.id
            moment = Moment(self._at(name, entry.get("at")), self._from(name, entry.get("from")))
            for expectation in ("can", "cannot"):
                lists = entry.get(expectation)
                for access in Access:
                    for topic, place in _texts(lists.get(access) if lists else None):
                        try:
                            decide_by((), access, topic)  # checks the topic
                        except TopicError as error:
                            self.refuse(place, error.code, f"test of '{name}': {error}", error.cure)
                        else:
                            yield PolicyTest(device, expectation == "can", access, topic, place, moment)

    def _tested(self, entry: Node) -> str | TokenDevice | None:
        """Return the device of a test; None when its shape is wrong."""
        device, token = entry.get("device"), entry.get("token")
        if device is not None and isinstance(device.value, str):
            self.tested.append((device.value, device.place))
            return device.value
        if token is None:
            return None
        issuer, name, stated = _text(token.get("issuer")), _text(token.get("id")), token.get("attributes")
        roles = tuple(text for text, _ in _texts(token.get("roles")))
        values = dict(stated.items()) if stated is not None else {}
        texts = {key: value.value for key, value in values.items() if isinstance(value.value, str)}
        if not issuer or not name or not roles or len(texts) < len(values):
            return None
        found = TokenDevice(issuer, name, roles, texts)
        places = {key: value.place for key, value in token.items()}
        places |= {f"attributes/{key}": value.place for key, value in values.items()}
        self.tokens.append(TokenOfTest(found, token.place, places))
        return found

    def _at(self, device: str, node: Node | None) -> dt.datetime | None:
        if node is None or not isinstance(node.value, str):
            return None
        try:
            return parse_instant(node.value)
        except ValueError as error:
            message = f"test of '{device}': 'at' is {node.value!r}: {error}"
            cure = 'write date, time and offset, as in "2026-03-29T02:30:00+01:00"'
            self.refuse(node.place, "bad-time", message, cure)
            return None

    def _from(self, device: str, node: Node | None) -> Address | None:
        if node is None or not isinstance(node.value, str):
            return None
        try:
            return ipaddress.ip_address(node.value)
        except ValueError:
            message = f"test of '{device}': 'from' is {node.value!r}, which is not an IP address"
            self.refuse(node.place, "bad-address", message, "write one address, as in 10.20.1.5 or 2001:db8::5")
            return None
