# SPDX-License-Identifier: Apache-2.0
"""The devices of a site.

- :class:`Device`: one device, after all checks of its own entry.
- :class:`Collector`: makes devices of the entries of any file, and of the requests in ``csr/``.
- :func:`bad_id`, :func:`bad_value`: why a text cannot be a device's id, or stand in a topic.
- :func:`unusable_key_types`: devices that cannot verify certificates with the CA's type of key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from bednet import csr, topics
from bednet.errors import Place, Problem, TopicError
from bednet.moment import parse_instant

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Hashable, Iterable, Mapping
    from pathlib import Path

    from bednet.yamlfile import Node, Scalar

KEY_METHODS = ("tls_client_auth", "private_key_jwt")
"""Ways to show the token service who one is that need a key (RFC 8705, 2.1; OpenID Connect Core 1.0, 9)."""

KEY_TYPES = ("P-256", "P-384", "RSA-2048", "RSA-3072", "RSA-4096", "Ed25519")
RESERVED_PREFIX = "bednet-"
MAX_VALUE_BYTES = 255
"""The longest value that may stand for a placeholder, in bytes of UTF-8: the gateway's store holds no longer one."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_MAX_ID = 64
TAKEN_NAMES = (
    "id",
    "location",
    "type",
    "roles",
    "tags",
    "attributes",
    "authentication",
    "enrolment",
    "key_types",
    "until",
    "revoked",
    "reinstated",
    "token_authentication",
    "csr",
)
"""What a device entry says elsewhere; an attribute of that name would be taken for it."""

_T = TypeVar("_T")
_MOST_KEPT = 200_000
"""How many different values are kept once for all devices that have them."""

_NOTHING: Mapping[str, Scalar] = MappingProxyType({})
_NOWHERE: Mapping[str, Place] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Device:
    """A device of devices.yml.

    :ivar csr: the PEM of ``csr/<id>.csr``; None for a device that waits for it, and for bundles.
    :ivar key_types: the key types that its TLS stack can verify; empty for all.
    :ivar until: when its access ends, in UTC and whole seconds; None for never.
    :ivar revoked: the reason in the words of RFC 5280, 5.3.1; None while the device is in service.
    :ivar reinstated: when it was last let in again; None for never.
    :ivar token_authentication: how it shows the site's token service who it is; None when it gets no tokens there.
    :ivar places: where the values of its entry stand, by key or ``attributes/NAME``, as far as they are known;
        ``place`` is that of the id.
    """

    id: str
    location: str
    roles: tuple[str, ...]
    place: Place
    type: str | None = None
    tags: tuple[str, ...] = ()
    attributes: Mapping[str, Scalar] = field(default_factory=lambda: _NOTHING)
    authentication: tuple[str, ...] = ("certificate",)
    enrolment: str = "bundle"
    csr: str | None = None
    key_types: tuple[str, ...] = ()
    until: dt.datetime | None = None
    revoked: str | None = None
    reinstated: dt.datetime | None = None
    token_authentication: str | None = None
    places: Mapping[str, Place] = field(default_factory=lambda: _NOWHERE)

    def value(self, name: str) -> Scalar:
        """Return what ``{device.NAME}`` means for it; None when it has none."""
        match name:
            case "id":
                return self.id
            case "location":
                return self.location
            case "type":
                return self.type
            case _:
                return self.attributes.get(name)

    @property
    def certified(self) -> bool:
        """True when the CA issues it a certificate: for the broker, or for the token service."""
        return "certificate" in self.authentication or self.token_authentication in KEY_METHODS

    def place_of(self, key: str) -> Place:
        """Return where `key` stands, or else the device."""
        return self.places.get(key, self.place)


BUILT_IN_NAMES = ("id", "location", "type")
"""What placeholders may name besides attributes."""


def unusable_key_types(devices: Iterable[Device], key_type: str) -> list[Problem]:
    """Return a problem for each device in service that cannot verify certificates with keys of `key_type`."""
    problems = []
    for device in devices:
        if device.revoked is None and device.key_types and key_type not in device.key_types:
            known = ", ".join(device.key_types)
            message = f"device '{device.id}' cannot verify {key_type}, the key type of the CA; it can: {known}"
            cure = f"let the CA use a key type that every device can verify, or correct 'key_types' of '{device.id}'"
            problems.append(Problem(device.place_of("key_types"), "key-type", message, cure))
    return problems


def bad_id(identifier: str) -> tuple[str, str, str] | None:  # noqa: PLR0911 - one for each refusal
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


def bad_value(value: Scalar) -> str | None:
    """Say why a value cannot stand in a topic; None when it can."""
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
    if (size := len(text.encode())) > MAX_VALUE_BYTES:
        return f"has {size} bytes, and a value in a topic at most {MAX_VALUE_BYTES}"
    return None


class Collector:
    """Makes devices of entries that come from one file or several; collects problems instead of stopping at the first.

    :ivar devices: by id, what has been found so far.
    """

    def __init__(self, folder: Path, problems: list[Problem]) -> None:
        self.folder = folder
        self.problems = problems
        self.devices: dict[str, Device] = {}
        # A million devices have few kinds of roles, tags and attributes: what is the same is kept once.
        self._same: dict[Hashable, Any] = {}

    def _refuse(self, place: Place, code: str, message: str, cure: str) -> None:
        self.problems.append(Problem(place, code, message, cure))

    def add_file(self, root: Node) -> None:
        """Take the devices of a ``devices.yml``."""
        entries = root.get("devices")
        for node in entries.elements() if entries else ():
            entry = node.plain()
            if isinstance(entry, dict):
                places = {key: value.place for key, value in node.items()}
                attributes = node.get("attributes")
                if attributes is not None:
                    places |= {f"attributes/{name}": value.place for name, value in attributes.items()}
                self.add(entry, node.place, places)

    def add(self, entry: Mapping[str, Any], place: Place, places: Mapping[str, Place] = _NOWHERE) -> None:
        """Take one entry, whose shape was checked already; what has the wrong shape is passed over.

        :param places: where its values stand, as far as that is known better than `place`.
        """
        identifier = entry.get("id")
        if not isinstance(identifier, str):
            return
        place = places.get("id", place)
        if bad := bad_id(identifier):
            self._refuse(place, *bad)
            return
        if first := self.devices.get(identifier):
            same_file = first.place.file == place.file
            listed = f"in line {first.place.line}" if same_file else f"in {first.place}"
            message = f"device '{first.id}' is listed again; it is listed {listed} already"
            again = f"in line {place.line}" if same_file else "here"
            self._refuse(place, "device-twice", message, f"remove the entry {again} or the one {listed}")
            return
        self.devices[identifier] = self._device(identifier, entry, place, places)

    def finish(self) -> dict[str, Device]:
        """Compare the devices with ``csr/``, and return them."""
        self._check_csr_folder(self.devices)
        return self.devices

    def _device(self, identifier: str, entry: Mapping[str, Any], place: Place, places: Mapping[str, Place]) -> Device:
        authentication = self._words(entry.get("authentication")) or ("certificate",)
        enrolment = entry.get("enrolment")
        revoked = entry.get("revoked")
        request = None
        method = entry.get("token_authentication")
        if method is not None and "token" not in authentication:
            message = f"device '{identifier}' has 'token_authentication' but does not authenticate with a token"
            cure = "remove 'token_authentication', or add 'token' to 'authentication'"
            self._refuse(places.get("token_authentication", place), "no-token", message, cure)
        if "token" in authentication:
            method = method if isinstance(method, str) else KEY_METHODS[0]
        if enrolment == "csr":
            if "certificate" not in authentication and method not in KEY_METHODS:
                message = f"device '{identifier}' has 'enrolment: csr' but does not authenticate with a certificate"
                cure = "remove 'enrolment', or add 'certificate' to 'authentication'"
                self._refuse(places.get("enrolment", place), "csr-without-certificate", message, cure)
            elif not isinstance(revoked, str):
                request, problem = csr.read(self.folder / "csr" / f"{identifier}.csr", identifier)
                self.problems += [problem] if problem else []
        until, reinstated = entry.get("until"), entry.get("reinstated")
        return Device(
            id=identifier,
            location=self._word(entry.get("location")) or "",
            roles=self._words(entry.get("roles")),
            place=place,
            type=self._word(entry.get("type")),
            tags=self._words(entry.get("tags")),
            attributes=self._attributes(identifier, entry.get("attributes"), place, places),
            authentication=authentication,
            enrolment=enrolment if isinstance(enrolment, str) else "bundle",
            csr=request,
            key_types=self._words(entry.get("key_types")),
            until=self._instant(identifier, "until", until, place, places),
            revoked=revoked if isinstance(revoked, str) else None,
            reinstated=self._instant(identifier, "reinstated", reinstated, place, places),
            token_authentication=method if isinstance(method, str) else None,
            places=places,
        )

    def _word(self, value: object) -> str | None:
        if not isinstance(value, str) or not value:
            return None
        return self._keep(value, value)

    def _words(self, value: object) -> tuple[str, ...]:
        if not value or not isinstance(value, list):
            return ()
        words = tuple(word for word in value if isinstance(word, str))
        return self._keep(words, words)

    def _attributes(
        self, identifier: str, stated: object, place: Place, places: Mapping[str, Place]
    ) -> Mapping[str, Scalar]:
        if not stated or not isinstance(stated, dict):
            return _NOTHING
        attributes: dict[str, Scalar] = {}
        for name, value in stated.items():
            if name in TAKEN_NAMES:
                message = f"device '{identifier}': an attribute cannot be called '{name}', which means something else"
                cure = "choose another name for the attribute"
                self._refuse(places.get(f"attributes/{name}", place), "attribute-name", message, cure)
            elif not isinstance(value, list | dict):
                attributes[name] = value
        if not attributes:
            return _NOTHING
        # 1, 1.0 and true are one key to a dict, and three things to a policy.
        return self._keep(tuple((name, value.__class__, value) for name, value in attributes.items()), attributes)

    def _keep(self, key: Hashable, value: _T) -> _T:
        """Return what stands for `value` already, or else `value`."""
        kept: _T | None = self._same.get(key)
        if kept is not None:
            return kept
        if len(self._same) < _MOST_KEPT:
            self._same[key] = value
        return value

    def _instant(
        self, identifier: str, key: str, text: object, place: Place, places: Mapping[str, Place]
    ) -> dt.datetime | None:
        if not isinstance(text, str):
            return None
        place = places.get(key, place)
        try:
            instant = parse_instant(text)
        except ValueError as error:
            message = f"device '{identifier}': '{key}' is {text!r}: {error}"
            cure = 'write date, time and offset, as in "2026-12-31T17:00:00Z" or "2026-12-31T18:00:00+01:00"'
            self._refuse(place, "bad-time", message, cure)
            return None
        if instant.microsecond or instant.timestamp() <= 0:
            message = f"device '{identifier}': '{key}' is {text!r}; it counts whole seconds, after 1970"
            self._refuse(place, "bad-time", message, "leave the fraction away")
            return None
        return instant

    def _check_csr_folder(self, devices: Mapping[str, Device]) -> None:
        known: dict[bytes, Device] = {}
        for device in devices.values():
            if device.csr is None:
                continue
            first = known.setdefault(csr.public_key(device.csr), device)
            if first is not device:
                place = Place(str(self.folder / "csr" / f"{device.id}.csr"), 1)
                message = f"the key in this CSR is also the key of device '{first.id}'"
                self._refuse(place, "csr-same-key", message, "let each device make a key of its own")
        for path in sorted((self.folder / "csr").glob("*.csr")):
            device_of = devices.get(path.stem)
            if device_of is None or device_of.enrolment != "csr":
                message = f"no device '{path.stem}' with 'enrolment: csr' uses this CSR"
                cure = "add 'enrolment: csr' to the device in devices.yml, or delete the file"
                self.problems.append(Problem(Place(str(path), 1), "csr-unused", message, cure, warning=True))
