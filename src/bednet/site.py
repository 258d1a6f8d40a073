# SPDX-License-Identifier: Apache-2.0
"""A site: its devices and its policy, read from one folder and checked.

- :func:`load_site`: reads the devices, ``policy.yml`` and ``csr/``, and refuses what is wrong with them.
- :func:`load_one`: reads ``policy.yml`` alone, for one device whose entry comes from elsewhere.
- :func:`decide`: may a device publish or subscribe to this, at this moment, and which rule says so?
- :func:`failing_tests`: the tests of policy.yml that do not hold.
- :func:`probe_grants`: what the reserved identity of ``bednet verify`` may do.
- :class:`Site`: what a site says, after all checks.

Devices that are alike share their rules: what holds for a device is its profile, a tuple of rules, and its own values
for the placeholders in them. Nothing is kept per device beyond that, so that a million of them fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from bednet import topics
from bednet.devices import (
    BUILT_IN_NAMES,
    KEY_TYPES,
    MAX_VALUE_BYTES,
    RESERVED_PREFIX,
    TAKEN_NAMES,
    Device,
    bad_value,
    unusable_key_types,
)
from bednet.devices_import import load_devices, read_entry
from bednet.errors import Place, Problem, SiteError, TopicError
from bednet.issuers import (
    Issuer,
    TokenDevice,
    missing_claims,
    read_issuers,
    role_profiles,
    token_faults,
    token_grants,
)
from bednet.lint import odd_rules
from bednet.moment import UNKNOWN, instant_text
from bednet.policy import Access, Decision, Effect, Grant, Role, Rule, Verdict, decide_by, fill_in, placeholders
from bednet.policy_file import Policy, PolicyTest, read_policy
from bednet.shape import check_shape, did_you_mean
from bednet.when import DEVICE_KEYS, WhenError
from bednet.yamlfile import load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from bednet.moment import Moment
    from bednet.policy import AttributeRule
    from bednet.yamlfile import Node, Scalar

    _Read: TypeAlias = Callable[[Device], tuple[object, ...]]

__all__ = [
    "KEY_TYPES",
    "PROBE_ID",
    "PROBE_OWN",
    "PROBE_READ_ONLY",
    "PROBE_WRITE_ONLY",
    "RESERVED_PREFIX",
    "Device",
    "PolicyTest",
    "Site",
    "TokenDevice",
    "decide",
    "failing_tests",
    "load_one",
    "load_site",
    "probe_grants",
    "unusable_key_types",
]

PROBE_ID = "bednet-probe"
# The branches of the identity of `bednet verify`. It has one session on a gateway, so it must be able to watch both
# sides of the access control by itself: what it may read and not publish, and what it may publish and not read.
PROBE_OWN = "bednet/probe/own"
PROBE_READ_ONLY = "bednet/probe/read-only"
PROBE_WRITE_ONLY = "bednet/probe/write-only"

_MEMO_SIZE = 100_000
"""How many answers of a `when` are remembered, in entries of some 200 bytes."""


@dataclass(frozen=True)
class Site:
    """A site whose files are in order.

    :ivar rules: the attribute rules of policy.yml by name.
    :ivar profiles: by key, the rules that devices share; the key says which roles and attribute rules they come from.
    :ivar profile_of: the key of each device, revoked ones too.
    :ivar issuers: who may sign tokens, by name.
    :ivar role_profiles: likewise for devices that only a token describes, by the role that it gives.
    :ivar grants: by device id, what its rules mean for it; nothing for a revoked device. Made when asked for.
    :ivar warnings: what is odd, but no reason to refuse.
    """

    folder: Path
    devices: Mapping[str, Device]
    roles: Mapping[str, Role]
    rules: Mapping[str, AttributeRule]
    profiles: Mapping[str, tuple[Rule, ...]]
    profile_of: Mapping[str, str]
    grants: Mapping[str, tuple[Grant, ...]]
    tests: tuple[PolicyTest, ...]
    warnings: tuple[Problem, ...]
    issuers: Mapping[str, Issuer] = field(default_factory=dict)
    role_profiles: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)

    def grants_of(self, device: str | TokenDevice) -> tuple[Grant, ...]:
        """Return the rules of a device with its own values filled in; none for a revoked one.

        :param device: the id of one of devices.yml, or what a token says of one.
        :raises KeyError: when devices.yml does not list it.
        """
        if isinstance(device, TokenDevice):
            return token_grants(device, self.issuers[device.issuer], self.role_profiles)
        return self.grants[device]


class Grants(Mapping[str, tuple[Grant, ...]]):
    """The rules of each device with its own values filled in, made when asked for."""

    def __init__(
        self,
        devices: Mapping[str, Device],
        profiles: Mapping[str, tuple[Rule, ...]],
        profile_of: Mapping[str, str],
    ) -> None:
        self._devices = devices
        self._profiles = profiles
        self._profile_of = profile_of

    def __getitem__(self, device_id: str) -> tuple[Grant, ...]:
        device = self._devices[device_id]
        if device.revoked is not None:
            return ()
        return tuple(Grant(rule, filled(rule, device)) for rule in self._profiles[self._profile_of[device_id]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._devices)

    def __len__(self) -> int:
        return len(self._devices)


def filled(rule: Rule, device: Device) -> str:
    """Return the topic filter that a rule means for a device, which has every value that it needs."""
    names = placeholders(rule.template)
    return fill_in(rule.template, {name: str(device.value(name)) for name in names}) if names else rule.template


def load_site(folder: Path, devices: Mapping[str, Device] | None = None) -> Site:
    """Read and check the site in `folder`.

    :param devices: by id, in place of the folder's lists, when they come from elsewhere; each was checked by itself.
    :raises SiteError: when anything in its files is wrong, with all problems that could be found.
    """
    problems: list[Problem] = []
    policy, issuers = _load_policy(folder, problems)
    if devices is None:
        devices = load_devices(folder, problems)
    site = _assembled(folder, devices, policy, issuers, problems)
    warnings = [*(problem for problem in problems if problem.warning), *odd_rules(site)]
    return replace(site, warnings=tuple(sorted(warnings, key=lambda problem: problem.place)))


def load_one(folder: Path, entry: bytes, file: str) -> tuple[Site, Device]:
    """Read the policy of the site in `folder`, and one device, which need not be in its lists: these are not read.

    All of the policy is checked, and all of the device that does not depend on others. Not checked is whether another
    device has its id or its key, and what is odd about the policy. Of the policy's tests those of the device are left.

    :param entry: a JSON object with the keys of a device.
    :param file: where that comes from, for messages.
    :returns: a site with this device alone, and the device.
    :raises SiteError: when anything in the policy or the entry is wrong.
    """
    problems: list[Problem] = []
    policy, issuers = _load_policy(folder, problems)
    device = read_entry(entry, file, folder, problems)
    devices = None if device is None else {device.id: device}
    site = _assembled(folder, devices, policy, issuers, problems, whole=False)
    if device is None:
        raise SiteError(problems)  # which it never is without a problem
    if device.csr is not None:
        message = f"nobody looked whether the key in the CSR of '{device.id}' is another device's as well"
        cure = "let bednet check look at the whole site before the CA signs it"
        problems.append(Problem(device.place, "csr-alone", message, cure, warning=True))
    warnings = tuple(problem for problem in problems if problem.warning and problem.code != "unused-role")
    return replace(site, warnings=warnings), device


def _load_policy(folder: Path, problems: list[Problem]) -> tuple[Policy | None, dict[str, Issuer]]:
    if not folder.is_dir():
        cure = "name a folder with devices.yml and policy.yml, such as inventories/example-plant"
        raise SiteError([Problem(Place(str(folder), 1), "file-missing", "there is no such folder", cure)])
    root = _load(folder, "policy", problems)
    if root is None:
        return None, {}
    policy = read_policy(root, problems)
    return policy, read_issuers(root, folder, policy.roles, problems)


def _assembled(
    folder: Path,
    devices: Mapping[str, Device] | None,
    policy: Policy | None,
    issuers: Mapping[str, Issuer],
    problems: list[Problem],
    *,
    whole: bool = True,
) -> Site:
    """Bring devices and policy together.

    :param devices: None when they could not be read; `policy` likewise.
    :param whole: these are all devices of the site.
    :raises SiteError: when there is a problem, earlier ones included, that is no warning.
    """
    known = policy or Policy({}, {}, (), ())
    given = role_profiles(issuers.values(), known.roles, known.rules)
    problems += missing_claims(issuers.values(), given)
    assembly = _Assembly(devices or {}, known, issuers, problems, whole=whole)
    if policy is not None and devices is not None:
        assembly.run()
    errors = [problem for problem in problems if not problem.warning]
    if errors:
        raise SiteError(errors)
    return Site(
        folder=folder,
        devices=assembly.devices,
        roles=known.roles,
        rules=known.rules,
        profiles=assembly.profiles,
        profile_of=assembly.profile_of,
        grants=Grants(assembly.devices, assembly.profiles, assembly.profile_of),
        tests=known.tests if whole else tuple(test for test in known.tests if _is_of(test, assembly.devices)),
        warnings=(),
        issuers=issuers,
        role_profiles=given,
    )


def _is_of(test: PolicyTest, devices: Mapping[str, Device]) -> bool:
    return isinstance(test.device, str) and test.device in devices


def _load(folder: Path, name: str, problems: list[Problem]) -> Node | None:
    root, found = load(folder / f"{name}.yml")
    problems += found
    if root is not None:
        problems += check_shape(name, root)
    return root


def decide(
    site: Site,
    device_id: str | TokenDevice,
    access: Access,
    topic: str,
    moment: Moment = UNKNOWN,
    *,
    delivery: bool = False,
    generous: bool = False,
) -> Decision:
    """Decide whether a device may publish to a topic name, or subscribe to a topic filter.

    The arguments are those of :func:`bednet.policy.decide_by`. At an unknown time a device's access has not ended.

    :param device_id: or what a token says of it, with which :func:`bednet.issuers.token_faults` finds no fault.
    :raises TopicError: when `topic` is not a topic name (publish, delivery) or not a topic filter (subscribe).
    """
    if isinstance(device_id, TokenDevice) or device_id == PROBE_ID:
        grants = probe_grants() if device_id == PROBE_ID else site.grants_of(device_id)
        return decide_by(grants, access, topic, moment, delivery=delivery, generous=generous)
    device = site.devices.get(device_id)
    if device is None:
        near = did_you_mean(device_id, site.devices)
        reason = f"there is no device {device_id!r} in {site.folder / 'devices.yml'}"
        for issuer in site.issuers.values():
            if issuer.roles and device_id.startswith(issuer.prefix):
                roles = ", ".join(dict.fromkeys(issuer.roles.values()))
                reason += f"; a token of issuer '{issuer.name}' gives it what that says, of the roles {roles}"
                return Decision(False, Verdict.UNKNOWN_DEVICE, f"{reason} ({issuer.place})")
        return Decision(False, Verdict.UNKNOWN_DEVICE, f"{reason}; {near.strip()}" if near else reason)
    if device.revoked is not None:
        place = device.place_of("revoked")
        return Decision(False, Verdict.REVOKED, f"the device is revoked: {device.revoked} ({place})")
    if device.until is not None and moment.at is not None and moment.at >= device.until:
        reason = f"the device's access ended at {instant_text(device.until)} ({device.place_of('until')})"
        return Decision(False, Verdict.ENDED, reason)
    return decide_by(site.grants[device_id], access, topic, moment, delivery=delivery, generous=generous)


def probe_grants() -> tuple[Grant, ...]:
    """Return what the reserved identity of ``bednet verify`` may do, whatever the policy says."""
    place = Place("built in", 1)
    allowed = (
        (Access.PUBLISH, PROBE_OWN),
        (Access.SUBSCRIBE, PROBE_OWN),
        (Access.SUBSCRIBE, PROBE_READ_ONLY),
        (Access.PUBLISH, PROBE_WRITE_ONLY),
    )
    rules = [
        Rule(
            f"role/{PROBE_ID}/allow/{access}/{[other for other, _ in allowed[:number]].count(access)}",
            f"role '{PROBE_ID}'",
            Effect.ALLOW,
            access,
            f"{branch}/#",
            place,
        )
        for number, (access, branch) in enumerate(allowed)
    ]
    return tuple(Grant(rule, rule.template) for rule in rules)


def failing_tests(site: Site) -> list[Problem]:
    """Return a problem for each line of the policy's tests that does not hold.

    A test without a time must hold at every time, one without an address from everywhere. What a revoked device could
    do is no longer tested: revoking it in a hurry must not fail for its tests.
    """
    problems = []
    for test in site.tests:
        device = site.devices.get(test.device) if isinstance(test.device, str) else None
        if test.can and device is not None and device.revoked is not None:
            continue
        decision = decide(site, test.device, test.access, test.topic, test.moment, generous=not test.can)
        if decision.allowed is test.can:
            continue
        must, does = ("can", "cannot") if test.can else ("cannot", "can")
        preposition = "publish" if test.access is Access.PUBLISH else "subscribe to"
        message = f"test failed: '{test.name}' {must} {preposition} '{test.topic}', but it {does}: {decision.reason}"
        cure = "correct the rule or the test"
        rules = [*decision.missed, *([decision.rule] if decision.rule is not None else [])]
        missing = [
            f"'{key}'"
            for key, absent, needed in (
                ("at", test.moment.at is None, any(rule.during for rule in rules)),
                ("from", test.moment.address is None, any(rule.networks for rule in rules)),
            )
            if absent and needed
        ]
        if missing:
            cure += f"; a test without {' and '.join(missing)} must hold always"
        problems.append(Problem(test.place, "test-failed", message, cure))
    return problems


class _Assembly:
    """Brings devices and policy together; collects problems instead of stopping at the first."""

    def __init__(
        self,
        devices: Mapping[str, Device],
        policy: Policy,
        issuers: Mapping[str, Issuer],
        problems: list[Problem],
        *,
        whole: bool = True,
    ) -> None:
        self.whole = whole
        self.devices = devices
        self.policy = policy
        self.issuers = issuers
        self.problems = problems
        self.profiles: dict[str, tuple[Rule, ...]] = {}
        self.profile_of: dict[str, str] = {}
        self._names: set[str] | None = None

    def refuse(self, place: Place, code: str, message: str, cure: str, *, warning: bool = False) -> None:
        self.problems.append(Problem(place, code, message, cure, warning))

    def _attributes(self) -> set[str] | None:
        """Return the names of all attributes that any device has, None when that is not known here.

        They are only needed to say what is wrong.
        """
        if not self.whole:
            return None
        if self._names is None:
            self._names = {name for device in self.devices.values() for name in device.attributes}
        return self._names

    def run(self) -> None:
        """Find the profiles, and check roles, values and tests."""
        self._check_roles()
        self._find_profiles()
        self._check_values()
        if self.whole:
            self._check_tests()
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Tell of devices that wait for a token, while nobody may sign any."""
        waiting = [device for device in self.devices.values() if "token" in device.authentication]
        if waiting and not self.issuers:
            first = waiting[0]
            message = (
                f"{_few([device.id for device in waiting])}: to authenticate with a token, and no issuer may sign one"
            )
            cure = "add the site's token service to 'issuers' in policy.yml"
            self.refuse(first.place_of("authentication"), "no-issuer", message, cure, warning=True)

    def _check_roles(self) -> None:
        roles = self.policy.roles
        used = {role for issuer in self.issuers.values() for role in issuer.roles.values()}
        sound: set[tuple[str, ...]] = set()
        for device in self.devices.values():
            if device.roles in sound:
                continue
            used.update(device.roles)
            if all(role in roles for role in device.roles):
                sound.add(device.roles)
                continue
            for role in device.roles:
                if role not in roles:
                    message = f"device '{device.id}' has the role '{role}', which policy.yml does not define"
                    names = ", ".join(roles) or "none"
                    cure = f"{did_you_mean(role, roles)}The roles of policy.yml are: {names}"
                    self.refuse(device.place_of("roles"), "unknown-role", message, cure)
        for role_without in roles.values():
            if role_without.name not in used:
                message = f"no device has the role '{role_without.name}'"
                cure = "give it to a device in devices.yml, or remove it"
                self.refuse(role_without.place, "unused-role", message, cure, warning=True)

    def _find_profiles(self) -> None:
        matching = _Matching(self.policy.rules)
        keys: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {}
        for device_id, device in self.devices.items():
            signature = (device.roles, matching.rules_of(device))
            key = keys.get(signature)
            if key is None:
                key = keys[signature] = self._profile(*signature)
            self.profile_of[device_id] = key
        self.problems += matching.problems(self._attributes)

    def _profile(self, roles: tuple[str, ...], rules: tuple[str, ...]) -> str:
        held = [name for name in self.policy.roles if name in roles]
        # No name begins with "-"; a key is never empty.
        key = ("+".join(sorted(held)) or "-") + ("|" + "+".join(sorted(rules)) if rules else "")
        if key not in self.profiles:
            owners: list[Role | AttributeRule] = [self.policy.roles[name] for name in held]
            owners += [self.policy.rules[name] for name in rules]
            self.profiles[key] = tuple(rule for owner in owners for rule in owner.rules)
        return key

    def _check_values(self) -> None:
        needs = {key: _Needs(rules) for key, rules in self.profiles.items()}
        good: set[Scalar] = set()
        # A value that is missing in many places is told once for each device, or once for all.
        told: dict[tuple[Place, str], Problem] = {}
        for device_id, device in self.devices.items():
            need = needs[self.profile_of[device_id]]
            sound = True
            for name, rule in need.names:
                value = device.value(name)
                if value.__class__ is str and value in good:
                    continue
                if value not in (None, "") and bad_value(value) is None:
                    if isinstance(value, str) and len(good) < _MEMO_SIZE:
                        good.add(value)
                    continue
                problem = _bad_value_problem(rule, device, name, self._attributes())
                told.setdefault((problem.place, name), problem)
                sound = False
            if sound and need.per_device:
                self._check_filled(need.per_device, device)
        self.problems += told.values()

    def _check_filled(self, rules: Iterable[Rule], device: Device) -> None:
        """Check what is wrong with a rule for one device only, though each of its values is fine."""
        for rule in rules:
            topic_filter = filled(rule, device)
            try:
                topics.check_filter(topic_filter)
            except TopicError as error:
                self.refuse(rule.place, error.code, f"{rule.source} for device '{device.id}': {error}", error.cure)
            if topic_filter.split("/", 1)[0] == "bednet":
                message = (
                    f"{rule.source} for device '{device.id}': topic {topic_filter!r} is under 'bednet/', which is "
                    f"reserved for bednet's own probes"
                )
                self.refuse(rule.place, "topic-reserved", message, "let the topic begin with a word of its own")

    def _check_tests(self) -> None:
        for device, place in self.policy.tested:
            if device not in self.devices:
                message = f"a test names the device {device!r}, which devices.yml does not list"
                cure = f"{did_you_mean(device, self.devices)}Use the id of a device, or 'token' for one of a token"
                self.refuse(place, "test-unknown-device", message, cure)
        given = role_profiles(self.issuers.values(), self.policy.roles, self.policy.rules)
        for token in self.policy.tokens:
            for fault in token_faults(token.device, self.issuers, given, self.devices):
                message = f"test of '{token.device.id}': {fault.message}"
                self.refuse(token.places.get(fault.key, token.place), fault.code, message, fault.cure)


class _Matching:
    """Which attribute rules a device has. Devices that are alike in what a `when` reads are asked about once."""

    def __init__(self, rules: Mapping[str, AttributeRule]) -> None:
        self._names = tuple(rules)
        self._unconditional = tuple(name for name, rule in rules.items() if rule.when is None)
        groups: dict[frozenset[str] | None, list[AttributeRule]] = {}
        for rule in rules.values():
            if rule.when is not None:
                reads = None if rule.when.reads is None or "id" in rule.when.reads else rule.when.reads
                groups.setdefault(reads, []).append(rule)
        self._groups: list[tuple[_Read | None, list[AttributeRule], dict[tuple[object, ...], tuple[str, ...]]]] = [
            (_reader(reads), members, {}) for reads, members in groups.items()
        ]
        self._failures: dict[tuple[str, str], tuple[Place, WhenError, list[str]]] = {}
        self._failed = 0
        self._order: dict[tuple[str, ...], tuple[str, ...]] = {}

    def rules_of(self, device: Device) -> tuple[str, ...]:
        """Return the names of the rules that a device has, in the order of policy.yml."""
        found = self._unconditional
        for read, members, memo in self._groups:
            if read is None:
                found += self._ask(members, device)
                continue
            key = read(device)
            answer = memo.get(key)
            if answer is None:
                failures = self._failed
                answer = self._ask(members, device)
                if self._failed == failures:  # else each device is to be named
                    if len(memo) >= _MEMO_SIZE:
                        memo.clear()
                    memo[key] = answer
            found += answer
        return self._ordered(found)

    def _ordered(self, found: tuple[str, ...]) -> tuple[str, ...]:
        if found not in self._order:
            self._order[found] = tuple(name for name in self._names if name in found)
        return self._order[found]

    def _ask(self, members: Iterable[AttributeRule], device: Device) -> tuple[str, ...]:
        matching = []
        for rule in members:
            if rule.when is None:
                continue
            try:
                if rule.when.matches(device):
                    matching.append(rule.name)
            except WhenError as error:
                failure = self._failures.setdefault((rule.name, str(error)), (rule.when.place, error, []))
                failure[2].append(device.id)
                self._failed += 1
        return tuple(matching)

    def problems(self, attributes: Callable[[], set[str] | None]) -> Iterator[Problem]:
        """Go through the expressions that had no answer for some devices.

        :param attributes: gives the names of all attributes that any device has, None when that is not known.
        """
        for (rule, _), (place, error, devices) in self._failures.items():
            message, cure = f"rule '{rule}': {error}, for {_few(devices)}", error.cure
            known = attributes() if error.missing is not None else None
            if error.missing is not None and known is not None and error.missing not in known:
                message = f"rule '{rule}': no device has the attribute '{error.missing}' that 'when' needs"
                cure = f"{did_you_mean(error.missing, {*DEVICE_KEYS, *known})}A condition can read "
                cure += f"{', '.join(DEVICE_KEYS)} and each attribute of devices.yml"
            yield Problem(place, error.code, message, cure)


def _few(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"  # noqa: PLR2004 - the three shown


def _reader(reads: frozenset[str] | None) -> _Read | None:
    """Return what tells devices apart for an expression that reads these keys; None when that is everything."""
    if reads is None:
        return None
    built_in = [name for name in sorted(reads) if name in TAKEN_NAMES]
    others = [name for name in sorted(reads) if name not in TAKEN_NAMES]

    def read(device: Device) -> tuple[object, ...]:
        values: list[object] = [
            tuple(device.attributes.items()) if name == "attributes" else getattr(device, name) for name in built_in
        ]
        for name in others:
            value = device.attributes.get(name)
            # 1, 1.0 and true are one key to a dict, and three things to an expression.
            values.append(value if value.__class__ is str else (value.__class__, value))
        return tuple(values)

    return read


class _Needs:
    """What the rules of a profile want to know of a device.

    :ivar names: the placeholders, each with the first rule that has it.
    :ivar per_device: rules whose topics must be looked at for each device: their first level comes from it, or they
        may become too long.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        names: dict[str, Rule] = {}
        self.per_device: list[Rule] = []
        for rule in rules:
            wanted = placeholders(rule.template)
            for name in wanted:
                names.setdefault(name, rule)
            longest = len(rule.template.encode()) + MAX_VALUE_BYTES * len(wanted)
            if placeholders(rule.template.split("/", 1)[0]) or (wanted and longest > topics.MAX_BYTES):
                self.per_device.append(rule)
        self.names = tuple(names.items())


def _bad_value_problem(rule: Rule, device: Device, name: str, attributes: set[str] | None) -> Problem:
    """Say why nothing can stand for ``{device.NAME}`` in a rule.

    :param attributes: the names of all attributes that any device has; None when that is not known.
    """
    value = device.value(name)
    built_in = name in BUILT_IN_NAMES
    if not built_in and value is None and attributes is not None and name not in attributes:
        message = f"{rule.source}: no device has the attribute of {{device.{name}}}"
        cure = f"{did_you_mean(name, {*BUILT_IN_NAMES, *attributes})}Add '{name}' to 'attributes' in devices.yml"
        return Problem(rule.place, "placeholder-value-missing", message, cure)
    if value is None or (built_in and value == ""):
        message = f"device '{device.id}' has no '{name}', which {rule} needs"
        where = "" if built_in else " to 'attributes'"
        way_out = "take the role from it" if rule.id.startswith("role/") else f"add has(device.{name}) to the 'when'"
        cure = f"add '{name}'{where} of the device, or {way_out}"
        return Problem(device.place, "placeholder-value-missing", message, cure)
    message = f"device '{device.id}': '{name}' {bad_value(value)}; it is used by {rule}"
    cure = f"write a '{name}' without + # and /, in quotes when it is a number with a point"
    return Problem(device.place_of(name if built_in else f"attributes/{name}"), "placeholder-value", message, cure)
