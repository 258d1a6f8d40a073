# SPDX-License-Identifier: Apache-2.0
"""Who may sign tokens for a site: ``issuers`` of policy.yml.

- :class:`Issuer`: one of them, after all checks.
- :func:`read_issuers`: makes them of a file that was read, and of the keys in the site's folder.
- :func:`role_profiles`: the rules of devices that only a token describes.
- :func:`missing_claims`: what such a token would have to say, and policy.yml does not know where.
- :class:`TokenDevice`: a device as a token describes it; :func:`token_faults`: why there can be none;
  :func:`token_grants`: what it may do.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from bednet import store
from bednet.devices import RESERVED_PREFIX, bad_id, bad_value
from bednet.errors import Place, Problem
from bednet.policy import Effect, Grant, fill_in, placeholders
from bednet.shape import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping
    from pathlib import Path

    from bednet.policy import AttributeRule, Role, Rule
    from bednet.yamlfile import Node

ROLE_PROFILE = "role:"
"""What begins the key of the profile of a role that tokens give; no role's or rule's name has a colon."""

MOST_ROLES = 16
"""Of one token that mean something here: ROLES_MAX of the plugin's token.c, which a test holds against it."""

DEFAULT_LEEWAY, DEFAULT_LONGEST = 30, 86_400
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_PLACEHOLDER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_PUBLIC = ("kty", "crv", "x", "y", "n", "e", "kid", "alg", "use")
_MOST_TEXT = 255
_CLAIM_CURE = "write the name of a claim; a '.' leads into an object, as in realm_access.roles"


@dataclass(frozen=True)
class Issuer:
    """An issuer of tokens.

    :ivar issuer: the ``iss`` of its tokens.
    :ivar service: whether it is the site's own token service.
    :ivar leeway: seconds; so is ``longest``.
    :ivar typ: in lower case, without ``application/``.
    :ivar claim: where the device's id is, without `prefix`.
    :ivar roles_claim: where the roles are that make a device; None when only devices of devices.yml count.
    :ivar roles_separator: what stands between two roles where the claim is one text; empty when a text is one role.
    :ivar roles: by value of that claim, the role.
    :ivar attributes: by placeholder, the claim that is its value.
    :ivar keys: its public keys (RFC 7517, 4), when the site's folder has them.
    :ivar jwks_url: where gateways fetch them.
    :ivar places: where its keys stand in policy.yml, ``roles/VALUE`` and ``attributes/NAME`` too.
    """

    name: str
    issuer: str
    audience: tuple[str, ...]
    place: Place
    service: bool = False
    algorithms: tuple[str, ...] = ("ES256",)
    leeway: int = DEFAULT_LEEWAY
    longest: int = DEFAULT_LONGEST
    typ: tuple[str, ...] = ("at+jwt",)
    scope: str = "policy"
    claim: str = "sub"
    prefix: str = ""
    roles_claim: str | None = None
    roles_separator: str = ""
    roles: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    attributes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    keys: tuple[Mapping[str, Any], ...] | None = None
    jwks_url: str | None = None
    places: Mapping[str, Place] = field(default_factory=lambda: MappingProxyType({}), compare=False)

    def place_of(self, key: str) -> Place:
        """Return where `key` stands, or else the issuer."""
        return self.places.get(key, self.place)


@dataclass(frozen=True)
class TokenDevice:
    """A device that devices.yml does not list, as a token describes it.

    :ivar issuer: the name of the token's issuer in policy.yml.
    :ivar id: the device's, with the issuer's prefix.
    :ivar roles: those of policy.yml that the token gives.
    :ivar attributes: by placeholder, what the token says for it.
    """

    issuer: str
    id: str
    roles: tuple[str, ...]
    attributes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


class Fault(NamedTuple):
    """Why no token describes such a device.

    :ivar key: of the :class:`TokenDevice`: ``issuer``, ``id``, ``roles``, ``attributes``; or ``attributes/NAME``.
    """

    key: str
    code: str
    message: str
    cure: str


def token_faults(
    device: TokenDevice,
    issuers: Mapping[str, Issuer],
    profiles: Mapping[str, tuple[Rule, ...]],
    listed: Container[str] = (),
) -> Iterator[Fault]:
    """Go through the reasons for which the plugin would let nobody in with a token that describes this device.

    :param profiles: of :func:`role_profiles`.
    :param listed: the ids of devices.yml.
    """
    issuer = issuers.get(device.issuer)
    if issuer is None:
        names = ", ".join(issuers) or "none"
        cure = f"{did_you_mean(device.issuer, issuers)}The issuers of policy.yml are: {names}"
        yield Fault("issuer", "unknown-issuer", f"there is no issuer '{device.issuer}' in policy.yml", cure)
        return
    what = f"issuer '{issuer.name}'"
    if not issuer.roles:
        message = f"{what} gives no roles: its tokens are for devices of devices.yml alone"
        yield Fault("issuer", "token-issuer", message, "name a device of devices.yml, or add 'roles' to the issuer")
        return
    if not device.id.startswith(issuer.prefix):
        message = f"no token of {what} is for '{device.id}': its devices' ids begin with '{issuer.prefix}'"
        yield Fault("id", "token-id", message, f"write the whole id, as in {issuer.prefix}{device.id}")
    elif (wrong := bad_id(device.id)) is not None:
        yield Fault("id", *wrong)
    elif device.id in listed:
        message = f"'{device.id}' is in devices.yml, so what a token says of its roles and attributes means nothing"
        yield Fault("id", "token-listed", message, "name it as a device, without a token")
    given = set(issuer.roles.values())
    for role in device.roles:
        if role not in given:
            cure = f"{did_you_mean(role, given)}Its 'map' gives: {', '.join(dict.fromkeys(issuer.roles.values()))}"
            yield Fault("roles", "token-role", f"{what} gives nobody the role '{role}'", cure)
    if not 1 <= len(device.roles) <= MOST_ROLES:
        message = f"'{device.id}' has {len(device.roles)} roles of its token, and 1 to {MOST_ROLES} can be"
        yield Fault("roles", "token-role", message, "name the roles that the token gives it")
    yield from _attribute_faults(device, issuer, profiles)


def _attribute_faults(device: TokenDevice, issuer: Issuer, profiles: Mapping[str, tuple[Rule, ...]]) -> Iterator[Fault]:
    what = f"issuer '{issuer.name}'"
    for name in device.attributes:
        if name not in issuer.attributes:
            message = f"{what} has no claim for {{device.{name}}}"
            cure = (
                f"{did_you_mean(name, issuer.attributes)}Its 'attributes' are: {', '.join(issuer.attributes) or 'none'}"
            )
            yield Fault(f"attributes/{name}", "token-attribute", message, cure)
    told: set[str] = set()
    for role in device.roles:
        for rule in profiles.get(f"{ROLE_PROFILE}{role}", ()) if role in issuer.roles.values() else ():
            for name in placeholders(rule.template):
                if name == "id" or name in told:
                    continue
                told.add(name)
                value = device.attributes.get(name)
                if value is None:
                    message = f"'{device.id}' has no '{name}' of its token, which {rule} needs"
                    cure = f"add '{name}' to its attributes; the claim '{issuer.attributes.get(name, name)}' has it"
                    yield Fault("attributes", "placeholder-value-missing", message, cure)
                elif (wrong := "is empty" if value == "" else bad_value(value)) is not None:
                    message = f"'{device.id}': '{name}' {wrong}; it is used by {rule}"
                    cure = f"write a '{name}' without + # and /; a token with such a claim lets nobody in"
                    yield Fault(f"attributes/{name}", "placeholder-value", message, cure)


def token_grants(device: TokenDevice, issuer: Issuer, profiles: Mapping[str, tuple[Rule, ...]]) -> tuple[Grant, ...]:
    """Return what a device may do of which :func:`token_faults` has nothing to say.

    :param profiles: of :func:`role_profiles`.
    """
    values = {**device.attributes, "id": device.id}
    given = [role for role in dict.fromkeys(issuer.roles.values()) if role in device.roles]
    rules = (rule for role in given for rule in profiles[f"{ROLE_PROFILE}{role}"])
    return tuple(Grant(rule, fill_in(rule.template, values)) for rule in rules)


def read_issuers(root: Node, folder: Path, roles: Mapping[str, Role], problems: list[Problem]) -> dict[str, Issuer]:
    """Return the issuers of a policy.yml by name, and add what is wrong with them to `problems`.

    :param root: the file, whose shape was checked already; what has the wrong shape is passed over.
    :param folder: the site's, where files with keys lie.
    """
    stated = root.get("issuers")
    reader = _Reader(folder, roles, problems)
    for node in stated.elements() if stated else ():
        reader.add(node)
    reader.compare()
    return reader.issuers


def role_profiles(
    issuers: Iterable[Issuer], roles: Mapping[str, Role], rules: Mapping[str, AttributeRule]
) -> dict[str, tuple[Rule, ...]]:
    """Return the profiles of the roles that tokens give, by key.

    Nobody knows of such a device what `when` asks. An allow with a condition is not for it; a deny always is.
    """
    given = sorted({role for issuer in issuers for role in issuer.roles.values() if role in roles})
    common = tuple(
        line for rule in rules.values() for line in rule.rules if rule.when is None or line.effect is Effect.DENY
    )
    return {f"{ROLE_PROFILE}{name}": (*roles[name].rules, *common) for name in given}


def missing_claims(issuers: Iterable[Issuer], profiles: Mapping[str, tuple[Rule, ...]]) -> Iterator[Problem]:
    """Go through what is wrong with roles that tokens give: values that no claim has, and claims that reach too far.

    :param profiles: of :func:`role_profiles`.
    """
    for issuer in issuers:
        wanted: set[str] = set()
        for value, role in issuer.roles.items():
            told: set[str] = set()
            for rule in profiles.get(f"{ROLE_PROFILE}{role}", ()):
                names = [name for name in placeholders(rule.template) if name != "id"]
                wanted.update(names)
                what = f"issuer '{issuer.name}' gives the role '{role}'"
                for name in names:
                    if name not in issuer.attributes and name not in told:
                        told.add(name)
                        message = f"{what}, and says nowhere what {{device.{name}}} is; {rule} needs it"
                        cure = f"add '{name}: CLAIM' to its 'attributes', or do not map to this role"
                        yield Problem(issuer.place_of(f"roles/{value}"), "claim-missing", message, cure)
                first = rule.template.split("/", 1)[0]
                if any(name != "id" for name in placeholders(first)):
                    message = f"{what}, and a claim of its token would be the first level of a topic: {rule}"
                    cure = "let the topic begin with a word of its own, or do not map to this role"
                    yield Problem(issuer.place_of(f"roles/{value}"), "claim-first-level", message, cure)
        for name in issuer.attributes:
            if issuer.roles and name not in wanted:
                message = f"issuer '{issuer.name}': no rule of the roles that it gives has {{device.{name}}}"
                place = issuer.place_of(f"attributes/{name}")
                yield Problem(place, "unused-attribute", message, "correct the name, or take it out", warning=True)


def _text(node: Node | None) -> str | None:
    return node.value if node is not None and isinstance(node.value, str) else None


def _texts(node: Node | None) -> tuple[str, ...]:
    found = [_text(element) for element in node.elements()] if node is not None else []
    return tuple(text for text in found if text is not None)


def _number(node: Node | None, usual: int) -> int:
    return node.value if node is not None and type(node.value) is int else usual


class _Reader:
    def __init__(self, folder: Path, roles: Mapping[str, Role], problems: list[Problem]) -> None:
        self.folder = folder
        self.roles = roles
        self.problems = problems
        self.issuers: dict[str, Issuer] = {}

    def refuse(self, place: Place, code: str, message: str, cure: str, *, warning: bool = False) -> None:
        self.problems.append(Problem(place, code, message, cure, warning))

    def add(self, node: Node) -> None:
        """Read one issuer."""
        name, iss = _text(node.get("name")), _text(node.get("issuer"))
        if name is None or iss is None:
            return
        places = {key: value.place for key, value in node.items()}
        what, place = f"issuer '{name}'", places["name"]
        if name in self.issuers:
            line = self.issuers[name].place.line
            message = f"{what} stands here again; it stands in line {line} already"
            self.refuse(place, "issuer-twice", message, "rename one of the two, or remove it")
            return
        service = node.get("service")
        own = service is not None and service.value is True
        self._check_url(what, "issuer", iss, places["issuer"])
        audience = _texts(node.get("audience"))
        for text in audience:
            if not _sayable(text):
                message = f"{what}: the audience {text!r} is empty, too long or has control characters"
                self.refuse(places["audience"], "bad-audience", message, f"write text of 1 to {_MOST_TEXT} bytes")
        algorithms = _texts(node.get("algorithms")) or ("ES256",)
        scope = _text(node.get("scope")) or ("aif" if own else "policy")
        if own and scope != "aif":
            message = f"{what} is the site's own token service, whose tokens always have a scope"
            self.refuse(places["scope"], "service-scope", message, "take 'scope' out")
        claim, prefix = self._device(what, node.get("device"), own=own)
        typ = tuple(dict.fromkeys(text.lower().removeprefix("application/") for text in _texts(node.get("typ"))))
        roles_claim, separator, roles = self._roles(what, node.get("roles"), prefix, places, own=own)
        self.issuers[name] = Issuer(
            name=name,
            issuer=iss,
            audience=audience,
            place=place,
            service=own,
            algorithms=algorithms,
            leeway=_number(node.get("leeway"), DEFAULT_LEEWAY),
            longest=_number(node.get("longest"), DEFAULT_LONGEST),
            typ=typ or ("at+jwt",),
            scope=scope,
            claim=claim,
            prefix=prefix,
            roles_claim=roles_claim,
            roles_separator=separator,
            roles=roles,
            attributes=self._attributes(what, node.get("attributes"), places, with_roles="roles" in places),
            keys=self._keys(what, node, algorithms, own=own),
            jwks_url=_text(node.get("jwks_url")),
            places=places,
        )

    def _check_url(self, what: str, key: str, url: str, place: Place) -> None:
        message = f"{what}: '{key}' is {url!r}"
        try:
            parts = urllib.parse.urlsplit(url)
            port_is_sound = parts.port != 0
        except ValueError:
            self.refuse(place, "bad-url", f"{message}, which is no URL", "write https://HOST/PATH")
            return
        if parts.scheme != "https":
            cure = "write https://: without TLS anybody on the way could put in another key"
            self.refuse(place, "bad-url", f"{message}, which does not begin with https://", cure)
        elif not parts.hostname or parts.username is not None or not port_is_sound or not _sayable(url) or " " in url:
            self.refuse(place, "bad-url", f"{message}, which is no URL of a host", "write https://HOST/PATH")
        elif key == "issuer" and (parts.query or parts.fragment or url.endswith(("?", "#"))):
            cure = "write it as the issuer's tokens have it; an issuer has neither '?' nor '#' (RFC 8414, 2)"
            self.refuse(place, "bad-url", message, cure)

    def _device(self, what: str, node: Node | None, *, own: bool) -> tuple[str, str]:
        claim, prefix = "sub", ""
        if node is None:
            return claim, prefix
        if own:
            message = f"{what} is the site's own token service: its tokens are for devices by their ids"
            self.refuse(node.place, "service-device", message, "take 'device' out")
        if (stated := node.get("claim")) is not None and (text := _text(stated)) is not None:
            claim = text
            self._check_claim(what, "device/claim", text, stated.place)
        if (stated := node.get("prefix")) is not None and (text := _text(stated)) is not None:
            prefix = text
            if not _PREFIX.fullmatch(text):
                message = f"{what}: no device's id can begin with {text!r}"
                cure = "write at most 32 letters, digits, '_' and '-', beginning with a letter or digit"
                self.refuse(stated.place, "bad-prefix", message, cure)
            elif RESERVED_PREFIX.startswith(text.lower()) or text.lower().startswith(RESERVED_PREFIX):
                message = (
                    f"{what}: with the prefix {text!r} a token could be for an id that begins with '{RESERVED_PREFIX}'"
                )
                cure = "choose another prefix, such as kc-; what begins with 'bednet-' is reserved"
                self.refuse(stated.place, "prefix-reserved", message, cure)
        return claim, prefix

    def _check_claim(self, what: str, key: str, text: str, place: Place) -> None:
        if not _sayable(text) or not all(text.split(".")):
            self.refuse(place, "bad-claim", f"{what}: '{key}' is {text!r}, which is no claim", _CLAIM_CURE)

    def _roles(
        self, what: str, node: Node | None, prefix: str, places: dict[str, Place], *, own: bool
    ) -> tuple[str | None, str, dict[str, str]]:
        if node is None:
            return None, "", {}
        if own:
            message = f"{what} is the site's own token service: devices.yml says which roles its devices have"
            self.refuse(node.place, "service-roles", message, "take 'roles' out")
            return None, "", {}
        if not prefix:
            message = f"{what} gives roles to ids that devices.yml does not have, and has no prefix for them"
            cure = "add 'device: {prefix: \"kc-\"}', so that none of its tokens can be for another's device"
            self.refuse(node.place, "prefix-missing", message, cure)
        claim = node.get("claim")
        if claim is not None and (text := _text(claim)) is not None:
            self._check_claim(what, "roles/claim", text, claim.place)
        separator = _text(node.get("separator")) or ""
        mapped: dict[str, str] = {}
        stated = node.get("map")
        for value, role in stated.items() if stated is not None else ():
            place = stated.keys.get(value, role.place) if stated is not None else role.place
            places[f"roles/{value}"] = place
            if not _sayable(value):
                self.refuse(place, "bad-claim", f"{what}: {value!r} cannot be a claim's value", "write what tokens say")
            elif separator and separator in value:
                message = f"{what}: no role is {value!r}, since 'separator' says that a space stands between two"
                self.refuse(place, "bad-claim", message, "map each word by itself")
            elif (name := _text(role)) is not None and name not in self.roles:
                message = f"{what} gives the role '{name}', which policy.yml does not define"
                names = ", ".join(self.roles) or "none"
                cure = f"{did_you_mean(name, self.roles)}The roles of policy.yml are: {names}"
                self.refuse(role.place, "unknown-role", message, cure)
            elif name is not None:
                mapped[value] = name
        if len(mapped) > store.TEXT8:
            message = f"{what} maps {len(mapped)} values, and {store.TEXT8} are the most"
            self.refuse(node.place, "too-many", message, "map fewer, and let the issuer have fewer roles")
        return _text(claim), separator, mapped

    def _attributes(
        self, what: str, node: Node | None, places: dict[str, Place], *, with_roles: bool
    ) -> dict[str, str]:
        if node is None:
            return {}
        if not with_roles:
            message = f"{what} has 'attributes' and no 'roles': devices.yml says what its devices are"
            self.refuse(node.place, "attributes-without-roles", message, "take 'attributes' out, or add 'roles'")
        found: dict[str, str] = {}
        for name, claim in node.items():
            place = places[f"attributes/{name}"] = node.keys.get(name, claim.place)
            if name == "id" or not _PLACEHOLDER.fullmatch(name):
                message = f"{what}: no claim can be {{device.{name}}}"
                cure = "name a placeholder such as location; 'device' says what the id is"
                self.refuse(place, "attribute-name", message, cure)
            elif (text := _text(claim)) is not None:
                self._check_claim(what, f"attributes/{name}", text, claim.place)
                found[name] = text
        return found

    def _keys(
        self, what: str, node: Node, algorithms: tuple[str, ...], *, own: bool
    ) -> tuple[Mapping[str, Any], ...] | None:
        file, url = node.get("jwks_file"), node.get("jwks_url")
        if own:
            for stated in (file, url):
                if stated is not None:
                    message = f"{what} is the site's own token service, which hands its keys to the gateways itself"
                    self.refuse(stated.place, "service-keys", message, "take it out")
            return None
        if (file is None) is (url is None):
            said = "neither 'jwks_file' nor" if file is None else "both 'jwks_file' and"
            message = f"{what} has {said} 'jwks_url'"
            cure = "say where its public keys are: in a file of the site's folder, or at a URL"
            self.refuse(node.place, "issuer-keys", message, cure)
            return None
        if url is not None and (text := _text(url)) is not None:
            self._check_url(what, "jwks_url", text, url.place)
        return None if file is None or (text := _text(file)) is None else self._file(what, text, file.place, algorithms)

    def _file(
        self, what: str, name: str, place: Place, algorithms: tuple[str, ...]
    ) -> tuple[Mapping[str, Any], ...] | None:
        if not _FILE.fullmatch(name):
            message = f"{what}: 'jwks_file' is {name!r}, which is not the name of a file in the site's folder"
            self.refuse(place, "jwks-file", message, "put the file beside policy.yml, and write its name")
            return None
        path = self.folder / name
        try:
            with path.open("rb") as stream:
                text = stream.read(store.MOST_JWKS + 1)
        except OSError as error:
            message = f"{what}: {path} cannot be read ({error.strerror})"
            self.refuse(place, "jwks-file", message, "put the issuer's public keys there, as its 'jwks_uri' has them")
            return None
        try:
            found = json.loads(text) if len(text) <= store.MOST_JWKS else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or not isinstance(listed := found.get("keys"), list):
            message = f"{what}: {path} is no JWK Set (RFC 7517, 5)"
            self.refuse(place, "jwks-file", message, "write what the issuer's 'jwks_uri' says: {\"keys\": [..]}")
            return None
        if any(isinstance(jwk, dict) and store.is_secret(jwk) for jwk in listed):
            message = f"{what}: {path} has a private or secret key"
            self.refuse(place, "jwks-private", message, "make a new key, and put its public part there alone")
            return None
        allowed = sum(store.ALGORITHMS[algorithm] for algorithm in set(algorithms) & store.ALGORITHMS.keys())
        usable = [jwk for jwk in listed if store.is_usable(jwk, allowed)]
        others = _algorithms_of(jwk for jwk in listed if jwk not in usable)
        try:
            store.keys_of(listed, allowed)
        except ValueError as error:
            message = f"{what}: {path}: {error}"
            cure = f"write the keys with which it signs for {', '.join(algorithms)}, or correct 'algorithms'"
            if others and not usable:
                cure = f"write 'algorithms: [{', '.join(others)}]', if that is what it signs with"
            self.refuse(place, "jwks-file", message, cure)
            return None
        if others:
            message = f"{what}: {path} has keys for {', '.join(others)} too, which its 'algorithms' do not name"
            cure = f"add {', '.join(others)} to 'algorithms', if it signs with them; its tokens are refused otherwise"
            self.refuse(place, "jwks-algorithm", message, cure, warning=True)
        return tuple({key: jwk[key] for key in _PUBLIC if key in jwk} for jwk in usable)

    def compare(self) -> None:
        """Find what is wrong with issuers beside each other."""
        issuers = list(self.issuers.values())
        for number, issuer in enumerate(issuers):
            for other in issuers[:number]:
                if issuer.issuer == other.issuer:
                    message = (
                        f"issuer '{issuer.name}' has the same 'issuer' as '{other.name}' in line {other.place.line}"
                    )
                    self.refuse(issuer.place_of("issuer"), "issuer-twice", message, "remove one of the two")
                if issuer.service and other.service:
                    message = f"issuer '{issuer.name}' is a second token service of the site, beside '{other.name}'"
                    self.refuse(
                        issuer.place_of("service"), "service-twice", message, "let one of them be the site's own"
                    )
                one, two = issuer.prefix, other.prefix
                if issuer.roles and other.roles and one and two and (one.startswith(two) or two.startswith(one)):
                    message = (
                        f"issuer '{issuer.name}' has the prefix {one!r}, and '{other.name}' has {two!r}: "
                        "one id could be of both"
                    )
                    cure = "choose prefixes of which none begins with the other"
                    self.refuse(issuer.place_of("device"), "prefix-overlap", message, cure)
            if not issuer.service and not issuer.prefix and len(issuers) > 1:
                message = (
                    f"issuer '{issuer.name}' has no prefix: it may sign tokens for every device that has 'token' in "
                    "its 'authentication', the other issuers' too"
                )
                cure = "add 'device: {prefix: \"...\"}', if its devices' ids have one"
                self.refuse(issuer.place, "issuer-for-all", message, cure, warning=True)


def _algorithms_of(jwks: Iterable[object]) -> list[str]:
    """Name the algorithms for which there are sound keys."""
    every = sum(store.ALGORITHMS.values())
    found = {store.key_of(jwk, every).algorithm for jwk in jwks if store.is_usable(jwk, every)}
    return [name for name, bit in store.ALGORITHMS.items() if bit in found]


def _sayable(text: str) -> bool:
    return bool(text) and text.isprintable() and len(text.encode(errors="replace")) <= _MOST_TEXT
