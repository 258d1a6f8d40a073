# SPDX-License-Identifier: Apache-2.0
"""What is odd about a policy, though nothing in it is wrong.

- :func:`odd_rules`: rules that nobody has, rules that change nothing, and filters that grant more than they seem.
- :func:`implies`: does one rule's condition hold whenever the other's does?

A rule that only some devices have for nothing is fine: roles overlap. One that changes nothing for any device is
told. A wide filter is not told when a test of the policy says that some device can use it: then it is meant.
"""

from __future__ import annotations

from collections import defaultdict
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING

from bednet import topics
from bednet.errors import Problem
from bednet.policy import Access, Effect, Rule, decide_by
from bednet.shape import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bednet.site import Site

_OWN = "{device.id}"


def odd_rules(site: Site) -> Iterator[Problem]:
    """Go through the warnings about the rules of a site."""
    yield from _unused(site)
    holders: dict[Rule, list[str]] = defaultdict(list)
    for key, rules in site.profiles.items():
        for rule in dict.fromkeys(rules):
            holders[rule].append(key)
    yield from _without_effect(site.profiles, holders)
    yield from _wide(site, list(holders))


def _unused(site: Site) -> Iterator[Problem]:
    held = {rule.id for kept in (site.profiles, site.role_profiles) for rules in kept.values() for rule in rules}
    attributes: set[str] | None = None
    for rule in site.rules.values():
        if not rule.rules or rule.rules[0].id in held:
            continue
        cure = "correct its 'when', or remove the rule"
        if rule.when is not None and rule.when.reads is not None:
            if attributes is None:
                attributes = {name for device in site.devices.values() for name in device.attributes}
            known = {"id", "location", "type", "tags", "roles", "attributes", *attributes}
            for name in sorted(rule.when.reads - known):
                cure = f"no device has '{name}'; {did_you_mean(name, known)}Correct its 'when', or remove the rule"
        place = rule.place if rule.when is None else rule.when.place
        yield Problem(place, "unused-rule", f"rule '{rule.name}' is for no device", cure, warning=True)


def implies(one: Rule, other: Rule) -> bool:
    """Say whether `other` holds at each moment at which `one` does. False when that cannot be seen easily."""
    times = not other.during or (bool(one.during) and set(one.during) <= set(other.during))
    places = not other.networks or (
        bool(one.networks) and all(any(_inside(inner, outer) for outer in other.networks) for inner in one.networks)
    )
    return times and places


def _inside(inner: object, outer: object) -> bool:
    if isinstance(inner, IPv4Network) and isinstance(outer, IPv4Network):
        return inner.subnet_of(outer)
    return isinstance(inner, IPv6Network) and isinstance(outer, IPv6Network) and inner.subnet_of(outer)


def _without_effect(profiles: Mapping[str, tuple[Rule, ...]], holders: Mapping[Rule, list[str]]) -> Iterator[Problem]:
    """Go through rules that change nothing in any profile that has them."""
    order = {rule: number for number, rule in enumerate(holders)}
    known: dict[tuple[Rule, Rule], bool] = {}

    def swallows(other: Rule, rule: Rule) -> bool:
        """Say whether `rule` changes nothing where `other` is."""
        if other.access is not rule.access or other is rule:
            return False
        if other.effect is not rule.effect and other.effect is Effect.ALLOW:
            return False
        pair = (other, rule)
        if pair not in known:
            known[pair] = topics.covers(other.template, rule.template) and implies(rule, other)
        if not known[pair]:
            return False
        # Of two that say the same the first stays.
        same = other.effect is rule.effect and topics.covers(rule.template, other.template) and implies(other, rule)
        return not same or order[other] < order[rule]

    for rule, keys in holders.items():
        reasons = [next((other for other in profiles[key] if swallows(other, rule)), None) for key in keys]
        if None in reasons or reasons[0] is None:
            continue
        other = reasons[0]
        if other.effect is rule.effect:
            message = f"{_what(rule)} changes nothing: {other} does it already"
            cure = "remove one of the two"
            if rule.conditional and not other.conditional:
                cure = "remove one of the two; as it is, the condition of this one has no effect"
            yield Problem(rule.place, "rule-covered", message, cure, warning=True)
        else:
            message = f"{_what(rule)} never holds: {other}, and deny wins"
            yield Problem(rule.place, "allow-denied", message, "remove one of the two", warning=True)


def _what(rule: Rule) -> str:
    return f"{rule.source}: {rule.effect} {rule.access} '{rule.template}'"


def _wide(site: Site, rules: list[Rule]) -> Iterator[Problem]:
    """Go through allow rules that reach further than a reader may think."""
    allows = [rule for rule in rules if rule.effect is Effect.ALLOW]
    own = [(rule, rule.template.split("/").index(_OWN)) for rule in allows if _OWN in rule.template.split("/")]
    meant = _meant(site)
    for rule in allows:
        first = rule.template.split("/", 1)[0]
        if first in ("#", "+"):
            if meant(rule, 0):
                continue
            all_of_it = rule.template in ("#", "+/#")
            message = f"{_what(rule)} reaches into every branch, " + (
                "all that anybody says" if all_of_it else "those to come too"
            )
            yield Problem(rule.place, "wide-filter", message, _wide_cure(rule), warning=True)
            continue
        for other, level in own:
            if other.access is rule.access and _wild(rule.template, level) and _meet(rule.template, other.template):
                if not meant(rule, level):
                    message = (
                        f"{_what(rule)} reaches into the branches of other devices, which {other.source} keeps apart "
                        f"with '{other.template}'"
                    )
                    yield Problem(rule.place, "wide-filter", message, _wide_cure(rule, level), warning=True)
                break


def _wide_cure(rule: Rule, level: int = 0) -> str:
    narrower = "write {device.id} in place of the wildcard" if level else "name the branches"
    if rule.access is Access.SUBSCRIBE:
        return f"{narrower}; or, if it is meant, say so in a test: can subscribe '{rule.template}'"
    return f"{narrower}; or, if it is meant, say so in a test: can publish to a topic that is not the device's own"


def _wild(template: str, level: int) -> bool:
    levels = template.split("/")
    return levels[level : level + 1] == ["+"] or (levels[-1] == "#" and len(levels) - 1 <= level)


def _meet(one: str, other: str) -> bool:
    return topics.overlaps(one, other)


def _meant(site: Site) -> Callable[[Rule, int], bool]:
    """Return what says whether a test that holds is decided by a rule, with something else than the device's own id."""
    levels_of: dict[Rule, list[tuple[str, list[str]]]] = defaultdict(list)
    for test in site.tests:
        if not test.can or (isinstance(test.device, str) and test.device not in site.devices):
            continue
        # A revoked device has no grants.
        decision = decide_by(site.grants_of(test.device), test.access, test.topic, test.moment)
        if decision.allowed and decision.rule is not None:
            levels_of[decision.rule].append((test.name, topics.unshare(test.topic).split("/")))

    def meant(rule: Rule, level: int) -> bool:
        if level == 0 and rule.access is Access.SUBSCRIBE:
            return any(levels[0] in ("#", "+") for _, levels in levels_of[rule])
        if level == 0:
            return len({levels[0] for _, levels in levels_of[rule]}) > 1
        return any(
            levels[level : level + 1] not in ([], [device]) or levels[-1] == "#" for device, levels in levels_of[rule]
        )

    return meant
