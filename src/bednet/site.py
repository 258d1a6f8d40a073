# SPDX-License-Identifier: Apache-2.0
"""A site: its devices and its policy, read from one folder and checked.

- :func:`load_site`: reads ``devices.yml``, ``policy.yml`` and ``csr/`` and refuses what is wrong with them.
- :func:`decide`: may a device publish or subscribe to this, and which rule says so?
- :func:`failing_tests`: the tests of policy.yml that do not hold.
- :func:`unusable_key_types`: devices that cannot verify certificates with the CA's type of key.
- :class:`Site`, :class:`Device`, :class:`PolicyTest`: what a site says, after all checks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bednet import csr, topics
from bednet.errors import Place, Problem, SiteError, TopicError
from bednet.policy import (
    Access,
    Decision,
    Effect,
    Grant,
    Role,
    Rule,
    Verdict,
    check_template,
    decide_by,
    fill_in,
    placeholders,
)
from bednet.shape import check_shape, did_you_mean
from bednet.yamlfile import Node, load

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from bednet.yamlfile import Scalar

KEY_TYPES = ("P-256", "P-384", "RSA-2048", "RSA-3072", "RSA-4096", "Ed25519")
RESERVED_PREFIX = "bednet-"
PROBE_ID = "bednet-probe"
# The branches of the identity of `bednet verify`. It has one session on a gateway, so it must be able to watch both
# sides of the access control by itself: what it may read and not publish, and what it may publish and not read.
PROBE_OWN = "bednet/probe/own"
PROBE_READ_ONLY = "bednet/probe/read-only"
PROBE_WRITE_ONLY = "bednet/probe/write-only"

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_MAX_ID = 64
# What a device entry says elsewhere; an attribute of that name would be taken for it.
_TAKEN_NAMES = (
    "id",
    "location",
    "type",
    "roles",
    "tags",
    "attributes",
    "authentication",
    "enrolment",
    "key_types",
    "revoked",
    "csr",
)


@dataclass(frozen=True)
class Device:
    """A device of devices.yml.

    :ivar csr: the PEM of ``csr/<id>.csr``; None for a device that waits for it, and for bundles.
    :ivar key_types: the key types that its TLS stack can verify; empty for all.
    :ivar revoked: the reason in the words of RFC 5280, 5.3.1; None while the device is in service.
    :ivar places: where the values of its entry stand, by key or ``attributes/NAME``; ``place`` is that of the id.
    """

    id: str
    location: str
    roles: tuple[str, ...]
    place: Place
    type: str | None = None
    tags: tuple[str, ...] = ()
    attributes: Mapping[str, Scalar] = field(default_factory=dict)
    authentication: tuple[str, ...] = ("certificate",)
    enrolment: str = "bundle"
    csr: str | None = None
    key_types: tuple[str, ...] = ()
    revoked: str | None = None
    places: Mapping[str, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class PolicyTest:
    """One topic of a test in policy.yml: what `device` can or cannot do."""

    device: str
    can: bool
    access: Access
    topic: str
    place: Place


@dataclass(frozen=True)
class Site:
    """A site whose files are in order.

    :ivar grants: by device id, what the rules of its roles mean for it; nothing for a revoked device.
    :ivar warnings: what is odd, but no reason to refuse.
    """

    folder: Path
    devices: Mapping[str, Device]
    roles: Mapping[str, Role]
    grants: Mapping[str, tuple[Grant, ...]]
    tests: tuple[PolicyTest, ...]
    warnings: tuple[Problem, ...]


def load_site(folder: Path) -> Site:
    """Read and check the site in `folder`.

    :raises SiteError: when anything in its files is wrong, with all problems that could be found.
    """
    if not folder.is_dir():
        cure = "name a folder with devices.yml and policy.yml, such as inventories/example-plant"
        raise SiteError([Problem(Place(str(folder), 1), "file-missing", "there is no such folder", cure)])
    reader = _Reader(folder)
    site = reader.read()
    errors = [problem for problem in reader.problems if not problem.warning]
    if errors:
        raise SiteError(errors)
    return site


def decide(site: Site, device_id: str, access: Access, topic: str) -> Decision:
    """Decide whether a device may publish to a topic name, or subscribe to a topic filter.

    :raises TopicError: when `topic` is not a topic name (publish) or not a topic filter (subscribe).
    """
    if device_id == PROBE_ID:
        return decide_by(probe_grants(), access, topic)
    device = site.devices.get(device_id)
    if device is None:
        near = did_you_mean(device_id, site.devices)
        reason = f"there is no device {device_id!r} in {site.folder / 'devices.yml'}"
        return Decision(False, Verdict.UNKNOWN_DEVICE, f"{reason}; {near.strip()}" if near else reason)
    if device.revoked is not None:
        place = device.places.get("revoked", device.place)
        return Decision(False, Verdict.REVOKED, f"the device is revoked: {device.revoked} ({place})")
    return decide_by(site.grants[device_id], access, topic)


def probe_grants() -> tuple[Grant, ...]:
    """Return what the reserved identity of ``bednet verify`` may do, whatever the policy says."""
    place = Place("built in", 1)
    allowed = (
        (Access.PUBLISH, PROBE_OWN),
        (Access.SUBSCRIBE, PROBE_OWN),
        (Access.SUBSCRIBE, PROBE_READ_ONLY),
        (Access.PUBLISH, PROBE_WRITE_ONLY),
    )
    rules = [Rule(PROBE_ID, Effect.ALLOW, access, f"{branch}/#", place) for access, branch in allowed]
    return tuple(Grant(rule, rule.template) for rule in rules)


def failing_tests(site: Site) -> list[Problem]:
    """Return a problem for each line of the policy's tests that does not hold.

    What a revoked device could do is no longer tested: revoking it in a hurry must not fail for its tests.
    """
    problems = []
    for test in site.tests:
        device = site.devices.get(test.device)
        if test.can and device is not None and device.revoked is not None:
            continue
        decision = decide(site, test.device, test.access, test.topic)
        if decision.allowed is test.can:
            continue
        must, does = ("can", "cannot") if test.can else ("cannot", "can")
        preposition = "publish" if test.access is Access.PUBLISH else "subscribe to"
        message = f"test failed: '{test.device}' {must} {preposition} '{test.topic}', but it {does}: {decision.reason}"
        problems.append(Problem(test.place, "test-failed", message, "correct the rule or the test"))
    return problems


def unusable_key_types(site: Site, key_type: str) -> list[Problem]:
    """Return a problem for each device in service that cannot verify certificates with keys of `key_type`."""
    problems = []
    for device in site.devices.values():
        if device.revoked is None and device.key_types and key_type not in device.key_types:
            place = device.places.get("key_types", device.place)
            known = ", ".join(device.key_types)
            message = f"device '{device.id}' cannot verify {key_type}, the key type of the CA; it can: {known}"
            cure = f"let the CA use a key type that every device can verify, or correct 'key_types' of '{device.id}'"
            problems.append(Problem(place, "key-type", message, cure))
    return problems


def _bad_id(identifier: str) -> tuple[str, str, str] | None:  # noqa: PLR0911 - one for each refusal
    """Say what is wrong with a device id: code, message, cure."""
    shown = f"device id {identifier!r}"
    if identifier.lower().startswith(RESERVED_PREFIX):
        return "id-reserved", f"{shown} begins with '{RESERVED_PREFIX}', which is reserved", "choose another beginning"
    if _ID.fullmatch(identifier):
        return None
    if not identifier:
        return "id-empty", "the device id is empty", "give the device an id such as temp-101"
    if len(identifier) > _MAX_ID:
        cure = f"use at most {_MAX_ID} characters; a certificate's common name holds no more"
        return "id-too-long", f"{shown} has {len(identifier)} characters", cure
    for character in identifier:
        if character in "+#/":
            cure = "leave out + # and /; they would reach into the topics of other devices"
            return "id-wildcard", f"{shown} contains '{character}', which has a meaning in topics", cure
        if character == ".":
            cure = "use '-' or '_' instead; with a dot OpenSSL takes the certificate's common name for a DNS name"
            return "id-dot", f"{shown} contains a dot", cure
        if not character.isprintable():
            return "id-control", f"{shown} contains the invisible character U+{ord(character):04X}", "take it out"
    cure = "use the letters A-Z and a-z, digits, '_' and '-', and begin with a letter or digit"
    return "id-characters", f"{shown} has characters that an id cannot have", cure


def _bad_value(value: Scalar) -> str | None:
    """Say why a value cannot stand in a topic."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return "is neither text nor a whole number"
    text = str(value)
    for character in "+#/":
        if character in text:
            return f"contains '{character}', which would reach into other topics"
    if text != text.strip() or text.startswith("$"):
        return "begins or ends with a space, or begins with '$'"
    try:
        topics.check_name(text)
    except TopicError as error:
        return f"cannot stand in a topic ({error})"
    return None


def _value(rule: Rule, device: Device, name: str, attributes: set[str]) -> str | Problem:
    """Return what stands for ``{device.NAME}`` in a rule, or why nothing can.

    :param attributes: the names of all attributes that any device has.
    """
    built_in: Mapping[str, Scalar] = {"id": device.id, "location": device.location, "type": device.type}
    value = built_in[name] or None if name in built_in else device.attributes.get(name)
    if value is None and name not in built_in and name not in attributes:
        message = f"role '{rule.role}': no device has the attribute of {{device.{name}}}"
        cure = f"{did_you_mean(name, {*built_in, *attributes})}Add '{name}' to 'attributes' in devices.yml"
        return Problem(rule.place, "placeholder-value-missing", message, cure)
    if value is None:
        message = f"device '{device.id}' has no '{name}', which {rule} needs"
        where = "" if name in built_in else " to 'attributes'"
        cure = f"add '{name}'{where} of the device, or take the role from it"
        return Problem(device.place, "placeholder-value-missing", message, cure)
    if bad := _bad_value(value):
        place = device.places.get(name if name in built_in else f"attributes/{name}", device.place)
        message = f"device '{device.id}': '{name}' {bad}; it is used by {rule}"
        cure = f"write a '{name}' without + # and /, in quotes when it is a number with a point"
        return Problem(place, "placeholder-value", message, cure)
    return str(value)


def _text(node: Node | None, default: str = "") -> str:
    return node.value if node is not None and isinstance(node.value, str) else default


def _texts(node: Node | None) -> list[tuple[str, Place]]:
    elements = node.elements() if node is not None else ()
    return [(element.value, element.place) for element in elements if isinstance(element.value, str)]


class _Reader:
    """Reads one site; collects problems instead of stopping at the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[Problem] = []

    def refuse(self, place: Place, code: str, message: str, cure: str) -> None:
        self.problems.append(Problem(place, code, message, cure))

    def warn(self, place: Place, code: str, message: str, cure: str) -> None:
        self.problems.append(Problem(place, code, message, cure, warning=True))

    def read(self) -> Site:
        """Return the site; it is only good when no problem was found."""
        policy = self._load("policy")
        inventory = self._load("devices")
        devices = self._devices(inventory) if inventory else {}
        roles = self._roles(policy) if policy else {}
        grants: dict[str, tuple[Grant, ...]] = {}
        tests: tuple[PolicyTest, ...] = ()
        if policy and inventory:
            self._check_roles(devices, roles)
            grants = self._grants(devices, roles)
            tests = tuple(self._tests(policy, devices))
        warnings = tuple(problem for problem in self.problems if problem.warning)
        return Site(self.folder, devices, roles, grants, tests, warnings)

    def _load(self, name: str) -> Node | None:
        root, problems = load(self.folder / f"{name}.yml")
        self.problems += problems
        if root is not None:
            self.problems += check_shape(name, root)
        return root

    def _devices(self, root: Node) -> dict[str, Device]:
        devices: dict[str, Device] = {}
        entries = root.get("devices")
        for entry in entries.elements() if entries else ():
            identifier = entry.get("id")
            if identifier is None or not isinstance(identifier.value, str):
                continue
            if bad := _bad_id(identifier.value):
                self.refuse(identifier.place, *bad)
                continue
            if first := devices.get(identifier.value):
                message = f"device '{first.id}' is listed again; it is listed in line {first.place.line} already"
                cure = f"remove the entry in line {identifier.place.line} or the one in line {first.place.line}"
                self.refuse(identifier.place, "device-twice", message, cure)
                continue
            devices[identifier.value] = self._device(identifier.value, identifier.place, entry)
        self._check_csr_folder(devices)
        return devices

    def _device(self, identifier: str, place: Place, entry: Node) -> Device:
        attributes: dict[str, Scalar] = {}
        places = {key: node.place for key, node in entry.items()}
        stated = entry.get("attributes")
        for name, node in stated.items() if stated else ():
            if name in _TAKEN_NAMES:
                message = f"device '{identifier}': an attribute cannot be called '{name}', which means something else"
                self.refuse(node.place, "attribute-name", message, "choose another name for the attribute")
            elif not isinstance(node.value, tuple | dict):
                attributes[name] = node.value
                places[f"attributes/{name}"] = node.place
        authentication = tuple(way for way, _ in _texts(entry.get("authentication"))) or ("certificate",)
        enrolment = _text(entry.get("enrolment"), "bundle")
        revoked = _text(entry.get("revoked")) or None
        request = None
        if enrolment == "csr":
            if "certificate" not in authentication:
                message = f"device '{identifier}' has 'enrolment: csr' but does not authenticate with a certificate"
                cure = "remove 'enrolment', or add 'certificate' to 'authentication'"
                self.refuse(entry.keys["enrolment"], "csr-without-certificate", message, cure)
            elif revoked is None:
                request, problem = csr.read(self.folder / "csr" / f"{identifier}.csr", identifier)
                self.problems += [problem] if problem else []
        return Device(
            id=identifier,
            location=_text(entry.get("location")),
            roles=tuple(role for role, _ in _texts(entry.get("roles"))),
            place=place,
            type=_text(entry.get("type")) or None,
            tags=tuple(tag for tag, _ in _texts(entry.get("tags"))),
            attributes=attributes,
            authentication=authentication,
            enrolment=enrolment,
            csr=request,
            key_types=tuple(key_type for key_type, _ in _texts(entry.get("key_types"))),
            revoked=revoked,
            places=places,
        )

    def _check_csr_folder(self, devices: Mapping[str, Device]) -> None:
        known: dict[bytes, Device] = {}
        for device in devices.values():
            if device.csr is None:
                continue
            first = known.setdefault(csr.public_key(device.csr), device)
            if first is not device:
                place = Place(str(self.folder / "csr" / f"{device.id}.csr"), 1)
                message = f"the key in this CSR is also the key of device '{first.id}'"
                self.refuse(place, "csr-same-key", message, "let each device make a key of its own")
        for path in sorted((self.folder / "csr").glob("*.csr")):
            device_of = devices.get(path.stem)
            if device_of is None or device_of.enrolment != "csr":
                message = f"no device '{path.stem}' with 'enrolment: csr' uses this CSR"
                cure = "add 'enrolment: csr' to the device in devices.yml, or delete the file"
                self.warn(Place(str(path), 1), "csr-unused", message, cure)

    def _roles(self, root: Node) -> dict[str, Role]:
        roles: dict[str, Role] = {}
        stated = root.get("roles")
        for name, node in stated.items() if stated else ():
            rules = tuple(self._rules(name, node))
            place = stated.keys[name] if stated else node.place
            roles[name] = Role(name, _text(node.get("description")), rules, place)
        return roles

    def _rules(self, role: str, node: Node) -> Iterator[Rule]:
        for effect in Effect:
            lists = node.get(effect)
            for access in Access:
                for template, place in _texts(lists.get(access) if lists else None):
                    try:
                        check_template(template, access)
                    except TopicError as error:
                        self.refuse(place, error.code, f"role '{role}': {error}", error.cure)
                    else:
                        yield Rule(role, effect, access, template, place)

    def _check_roles(self, devices: Mapping[str, Device], roles: Mapping[str, Role]) -> None:
        for device in devices.values():
            for role in device.roles:
                if role not in roles:
                    message = f"device '{device.id}' has the role '{role}', which policy.yml does not define"
                    names = ", ".join(roles) or "none"
                    cure = f"{did_you_mean(role, roles)}The roles of policy.yml are: {names}"
                    self.refuse(device.places["roles"], "unknown-role", message, cure)
        used = {role for device in devices.values() for role in device.roles}
        for role_without in roles.values():
            if role_without.name not in used:
                message = f"no device has the role '{role_without.name}'"
                cure = "give it to a device in devices.yml, or remove it"
                self.warn(role_without.place, "unused-role", message, cure)

    def _grants(self, devices: Mapping[str, Device], roles: Mapping[str, Role]) -> dict[str, tuple[Grant, ...]]:
        attributes = {name for device in devices.values() for name in device.attributes}
        grants: dict[str, tuple[Grant, ...]] = {}
        # A value that is missing in many places is told once for each device, or once for all.
        told: dict[tuple[Place, str], Problem] = {}
        for device in devices.values():
            held: list[Grant] = []
            for rule in (rule for role in device.roles if role in roles for rule in roles[role].rules):
                values: dict[str, str] = {}
                for name in placeholders(rule.template):
                    value = _value(rule, device, name, attributes)
                    if isinstance(value, Problem):
                        told.setdefault((value.place, name), value)
                    else:
                        values[name] = value
                if values.keys() >= set(placeholders(rule.template)):
                    held += self._grant(rule, device, values)
            grants[device.id] = () if device.revoked is not None else tuple(held)
        self.problems += told.values()
        return grants

    def _grant(self, rule: Rule, device: Device, values: Mapping[str, str]) -> list[Grant]:
        topic_filter = fill_in(rule.template, values)
        try:
            topics.check_filter(topic_filter)
        except TopicError as error:
            self.refuse(rule.place, error.code, f"role '{rule.role}' for device '{device.id}': {error}", error.cure)
            return []
        return [Grant(rule, topic_filter)]

    def _tests(self, root: Node, devices: Mapping[str, Device]) -> Iterator[PolicyTest]:
        stated = root.get("tests")
        for entry in stated.elements() if stated else ():
            device = entry.get("device")
            if device is None or not isinstance(device.value, str):
                continue
            if device.value not in devices:
                message = f"a test names the device {device.value!r}, which devices.yml does not list"
                cure = f"{did_you_mean(device.value, devices)}Use the id of a device"
                self.refuse(device.place, "test-unknown-device", message, cure)
                continue
            for expectation in ("can", "cannot"):
                lists = entry.get(expectation)
                for access in Access:
                    for topic, place in _texts(lists.get(access) if lists else None):
                        try:
                            decide_by((), access, topic)  # checks the topic
                        except TopicError as error:
                            self.refuse(place, error.code, f"test of '{device.value}': {error}", error.cure)
                        else:
                            yield PolicyTest(device.value, expectation == "can", access, topic, place)
