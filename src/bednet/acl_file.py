# SPDX-License-Identifier: Apache-2.0
"""The policy in Mosquitto's own words: an acl_file for Mosquitto 2.0.

- :func:`compile_acl_file`: one section per device, exactly what the policy says, or a refusal; or, if told so, the
  strictest file that comes near it.
- :func:`acl_problems`: what an acl_file cannot say of a site.

What the file can and cannot say (Mosquitto 2.0.11 and 2.0.20, src/security_default.c and src/security.c):

- ``deny`` refuses a topic for publish and for delivery alike, and is looked at before everything else.
- ``read`` is checked when a message is delivered; every SUBSCRIBE is granted.
- A line's topic loses the white space around it, and a topic with more than 200 separators makes the broker refuse
  the whole file.
- In ``topic`` lines ``%c`` and ``%u`` are plain text; ``pattern`` lines are not used here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bednet import topics
from bednet.errors import Problem, SiteError
from bednet.moment import instant_text
from bednet.policy import Access, Effect, Grant
from bednet.site import PROBE_ID, probe_grants

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from bednet.devices import Device
    from bednet.site import Site

MAX_SEPARATORS = 200
"""TOPIC_HIERARCHY_LIMIT of Mosquitto's src/mosquitto_broker_internal.h."""

_HEADER = """\
# Access control list for Eclipse Mosquitto 2.0, made by `bednet compile`.
# Do not edit: change devices.yml or policy.yml of the site and deploy again.
# A user without a section, and a topic without a line, is denied.
"""


def compile_acl_file(site: Site, *, strictest: bool = False) -> str:
    """Return the acl_file of a site; the same site gives the same text.

    :param strictest: where the file cannot say what the policy says, let it allow less: an allow rule with a condition
        is left out, a deny rule with a condition holds always, a deny of one access denies both, and a device whose
        access has an end, or that has nothing but a pre-shared key or tokens, is left out.
    :raises SiteError: when an acl_file cannot say what the policy says.
    """
    problems = acl_problems(site, strictest=strictest)
    if problems:
        raise SiteError(problems)
    sections = [_section(PROBE_ID, "reserved: the identity of bednet verify", probe_grants())]
    for device in sorted(site.devices.values(), key=lambda device: device.id):
        if _has_section(device):
            grants = _strict(site.grants[device.id]) if strictest else site.grants[device.id]
            sections.append(_section(device.id, f"roles: {', '.join(device.roles)}", grants))
    return "\n".join([_HEADER, *sections])


def _has_section(device: Device) -> bool:
    return device.revoked is None and device.until is None and not set(device.authentication) <= {"psk", "token"}


def _strict(grants: Iterable[Grant]) -> list[Grant]:
    """Leave out what an acl_file would allow too much of; what it would deny too much of stays."""
    return [
        grant
        for grant in grants
        if grant.rule.effect is Effect.DENY or not (grant.rule.conditional or _unwritable(grant.topic_filter))
    ]


def _unwritable(topic_filter: str) -> bool:
    return topic_filter != topic_filter.strip(" ") or topic_filter.count("/") > MAX_SEPARATORS


def acl_problems(site: Site, *, strictest: bool = False) -> list[Problem]:
    """Return what the policy says and an acl_file cannot, each told once for all devices that it concerns.

    :param strictest: as for :func:`compile_acl_file`; what remains are denies that cannot be written at all.
    """
    problems: dict[object, Problem] = {}
    if not strictest:
        problems |= _conditions(site)
    for device_id in site.devices:
        grants: Sequence[Grant] = site.grants[device_id]
        if strictest:
            held = _strict(grants) if _has_section(site.devices[device_id]) else []
            denies = [(deny, common) for access in Access for deny, common in _needed_denies(held, access)]
            for deny, common in denies:
                problems |= _written(deny, common)
            continue
        for grant in grants:
            problems |= {
                key: problem for key, problem in _written(grant, grant.topic_filter).items() if key not in problems
            }
        for deny, allow, common in _one_sided(grants):
            message = (
                f"device '{device_id}': {deny.rule} but {allow.rule}; both hold for '{common}', and "
                f"Mosquitto's acl_file can only deny both accesses to a topic"
            )
            cure = f"deny {deny.rule.access.other} there too, or write the lists so that they do not meet{_CURE}"
            problem = Problem(deny.rule.place, "acl-one-sided-deny", message, cure)
            problems.setdefault(("deny", deny.rule, allow.rule), problem)
    return list(problems.values())


_CURE = "; or deploy with the plugin, or with --strictest (mosquitto_acl_file_strictest)"


def _conditions(site: Site) -> dict[object, Problem]:
    """Return what depends on the moment, which an acl_file does not know, and keys, for which it is no help."""
    problems: dict[object, Problem] = {}
    for rule in dict.fromkeys(rule for rules in site.profiles.values() for rule in rules if rule.conditional):
        message = f"{rule}; Mosquitto's acl_file knows neither times nor addresses"
        effect = "allows nothing" if rule.effect is Effect.ALLOW else "denies always"
        cure = f"deploy with the plugin; or with --strictest (mosquitto_acl_file_strictest), which {effect} here"
        problems["condition", rule] = Problem(rule.place, "acl-condition", message, cure)
    for device in site.devices.values():
        if device.revoked is not None:
            continue
        if device.until is not None:
            message = f"device '{device.id}' has access until {instant_text(device.until)}; an acl_file knows no times"
            cure = "deploy with the plugin; or with --strictest (mosquitto_acl_file_strictest), without the device"
            problems["until", device.id] = Problem(device.place_of("until"), "acl-until", message, cure)
        if "psk" in device.authentication:
            message = f"device '{device.id}' authenticates with a pre-shared key, which needs the plugin"
            cure = "deploy with the plugin; or with --strictest (mosquitto_acl_file_strictest), without the key"
            problems["psk", device.id] = Problem(device.place_of("authentication"), "acl-psk", message, cure)
        if "token" in device.authentication:
            message = f"device '{device.id}' authenticates with tokens, which need the plugin"
            cure = "deploy with the plugin; or with --strictest (mosquitto_acl_file_strictest), without its tokens"
            problems["token", device.id] = Problem(device.place_of("authentication"), "acl-token", message, cure)
    for issuer in site.issuers.values():
        if issuer.roles:
            message = f"issuer '{issuer.name}' says by tokens who a device is, which needs the plugin"
            cure = "deploy with the plugin; or with --strictest (mosquitto_acl_file_strictest), without the issuer"
            problems["issuer", issuer.name] = Problem(issuer.place, "acl-issuer", message, cure)
    return problems


def _written(grant: Grant, topic_filter: str) -> dict[object, Problem]:
    """Return what the file cannot hold of a topic."""
    rule = grant.rule
    problems: dict[object, Problem] = {}
    if topic_filter != topic_filter.strip(" "):
        message = f"{rule.source}: topic {topic_filter!r} begins or ends with a space"
        cure = "take the space away; Mosquitto's acl_file drops it and would mean another topic"
        problems["space", rule] = Problem(rule.place, "acl-space", message, cure)
    if (separators := topic_filter.count("/")) > MAX_SEPARATORS:
        message = f"{rule.source}: a topic with {separators} '/'; Mosquitto takes {MAX_SEPARATORS}"
        problems["levels", rule] = Problem(rule.place, "acl-levels", message, "use fewer levels")
    return problems


def _select(grants: Sequence[Grant], effect: Effect, access: Access) -> list[Grant]:
    return [grant for grant in grants if grant.rule.effect is effect and grant.rule.access is access]


def _needed_denies(grants: Sequence[Grant], access: Access) -> Iterator[tuple[Grant, str]]:
    """Go through what must be denied: where a deny meets an allow of the same access. Elsewhere silence denies."""
    for deny in _select(grants, Effect.DENY, access):
        for allow in _select(grants, Effect.ALLOW, access):
            common = topics.intersection(deny.topic_filter, allow.topic_filter)
            if common is not None:
                yield deny, common


def _one_sided(grants: Sequence[Grant]) -> Iterator[tuple[Grant, Grant, str]]:
    """Go through denies that would take the other access away, where the policy allows it."""
    for access in Access:
        for deny, denied in _needed_denies(grants, access):
            for allow in _select(grants, Effect.ALLOW, access.other):
                common = topics.intersection(denied, allow.topic_filter)
                others = _select(grants, Effect.DENY, access.other)
                if common is not None and not any(topics.covers(other.topic_filter, common) for other in others):
                    yield deny, allow, common


def _section(user: str, comment: str, grants: Sequence[Grant]) -> str:
    denied = {topic_filter for access in Access for _, topic_filter in _needed_denies(grants, access)}
    written = {grant.topic_filter for grant in _select(grants, Effect.ALLOW, Access.PUBLISH)}
    read = {grant.topic_filter for grant in _select(grants, Effect.ALLOW, Access.SUBSCRIBE)}
    lines = [f"# {comment}", f"user {user}"]
    lines += [f"topic deny {topic_filter}" for topic_filter in sorted(denied)]
    for topic_filter in sorted(written | read):
        word = "readwrite" if topic_filter in written & read else "write" if topic_filter in written else "read"
        lines.append(f"topic {word} {topic_filter}")
    return "\n".join(lines) + "\n"
