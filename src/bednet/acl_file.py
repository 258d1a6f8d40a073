# SPDX-License-Identifier: Apache-2.0
"""The policy in Mosquitto's own words: an acl_file for Mosquitto 2.0.

- :func:`compile_acl_file`: one section per device, exactly what the policy says, or a refusal.
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
from bednet.policy import Access, Effect, Grant
from bednet.site import PROBE_ID, probe_grants

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bednet.site import Site

MAX_SEPARATORS = 200
"""TOPIC_HIERARCHY_LIMIT of Mosquitto's src/mosquitto_broker_internal.h."""

_HEADER = """\
# Access control list for Eclipse Mosquitto 2.0, made by `bednet compile`.
# Do not edit: change devices.yml or policy.yml of the site and deploy again.
# A user without a section, and a topic without a line, is denied.
"""


def compile_acl_file(site: Site) -> str:
    """Return the acl_file of a site; the same site gives the same text.

    :raises SiteError: when an acl_file cannot say exactly what the policy says.
    """
    problems = acl_problems(site)
    if problems:
        raise SiteError(problems)
    sections = [_section(PROBE_ID, "reserved: the identity of bednet verify", probe_grants())]
    for device in sorted(site.devices.values(), key=lambda device: device.id):
        if device.revoked is None:
            sections.append(_section(device.id, f"roles: {', '.join(device.roles)}", site.grants[device.id]))
    return "\n".join([_HEADER, *sections])


def acl_problems(site: Site) -> list[Problem]:
    """Return what the policy says and an acl_file cannot, each told once for all devices that it concerns."""
    problems: dict[object, Problem] = {}
    for rule in dict.fromkeys(rule for rules in site.profiles.values() for rule in rules if rule.conditional):
        message = f"{rule}; Mosquitto's acl_file knows neither times nor addresses"
        problems["condition", rule] = Problem(rule.place, "acl-condition", message, "use the plugin, or take it out")
    for device in site.devices.values():
        if device.until is not None and device.revoked is None:
            message = f"device '{device.id}' has access until a time; Mosquitto's acl_file knows no times"
            problems["until", device.id] = Problem(device.place_of("until"), "acl-until", message, "use the plugin")
    for device_id, grants in site.grants.items():
        for grant in grants:
            if grant.topic_filter != grant.topic_filter.strip(" "):
                message = f"{grant.rule.source}: topic {grant.topic_filter!r} begins or ends with a space"
                cure = "take the space away; Mosquitto's acl_file drops it and would mean another topic"
                problem = Problem(grant.rule.place, "acl-space", message, cure)
                problems.setdefault(("space", grant.rule), problem)
            if (separators := grant.topic_filter.count("/")) > MAX_SEPARATORS:
                message = f"{grant.rule.source}: a topic with {separators} '/'; Mosquitto takes {MAX_SEPARATORS}"
                problem = Problem(grant.rule.place, "acl-levels", message, "use fewer levels")
                problems.setdefault(("levels", grant.rule), problem)
        for deny, allow, common in _one_sided(grants):
            message = (
                f"device '{device_id}': {deny.rule} but {allow.rule}; both hold for '{common}', and "
                f"Mosquitto's acl_file can only deny both accesses to a topic"
            )
            cure = f"deny {deny.rule.access.other} there too, or write the lists so that they do not meet"
            problem = Problem(deny.rule.place, "acl-one-sided-deny", message, cure)
            problems.setdefault(("deny", deny.rule, allow.rule), problem)
    return list(problems.values())


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
