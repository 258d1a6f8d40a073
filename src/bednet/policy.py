# SPDX-License-Identifier: Apache-2.0
"""The policy: rules, what they grant to a device, and the decision.

- :class:`Rule`, :class:`Role`, :class:`AttributeRule`: what policy.yml says.
- :class:`Grant`: a rule as it applies to one device, its placeholders filled in.
- :class:`Window`, :class:`Moment`: times and addresses (:mod:`bednet.moment`).
- :func:`decide_by`: may the holder of these grants do this, at this moment, and which rule says so?
- :func:`decide_filter`: the same about all topics of a filter at once, also for publish.
- :func:`check_template`, :func:`placeholders`, :func:`fill_in`: topics with ``{device.id}`` and the like.

A deny wins over any allow, wherever the two stand; what no rule allows is denied.
"""

from __future__ import annotations

import enum
import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bednet import topics
from bednet.errors import TopicError
from bednet.moment import UNKNOWN, Moment, Window, all_of, any_of, within

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from bednet.errors import Place
    from bednet.moment import Network
    from bednet.when import When

__all__ = [
    "UNKNOWN",
    "Access",
    "AttributeRule",
    "Decision",
    "Effect",
    "Grant",
    "Moment",
    "Role",
    "Rule",
    "Verdict",
    "Window",
    "check_template",
    "decide_by",
    "decide_filter",
    "fill_in",
    "placeholders",
]

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_PLACEHOLDER_NAME = re.compile(r"device\.([A-Za-z][A-Za-z0-9_]*)")


class Access(enum.StrEnum):
    """What a client does with a topic."""

    PUBLISH = "publish"
    SUBSCRIBE = "subscribe"

    @property
    def other(self) -> Access:
        """The one that this is not."""
        return Access.SUBSCRIBE if self is Access.PUBLISH else Access.PUBLISH


class Effect(enum.StrEnum):
    """What a rule does; the values are the words of policy.yml."""

    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of policy.yml: an effect on one access to one topic filter, perhaps at certain moments only.

    :ivar id: stable while the line keeps its place: ``role/sensor/allow/publish/0``.
    :ivar source: where it stands, in words: ``role 'sensor'``.
    :ivar template: the topic filter as written, with placeholders.
    :ivar during: the windows in one of which it holds; empty for any time.
    :ivar networks: the networks from one of which it holds; empty for any address.
    """

    id: str
    source: str
    effect: Effect
    access: Access
    template: str
    place: Place
    during: tuple[Window, ...] = ()
    networks: tuple[Network, ...] = ()

    @property
    def conditional(self) -> bool:
        """True when it depends on the moment."""
        return bool(self.during or self.networks)

    @property
    def conditions(self) -> str:
        """When and from where it holds, in words; empty for always."""
        times = " or ".join(str(window) for window in self.during)
        places = "from " + " or ".join(str(network) for network in self.networks) if self.networks else ""
        return ", ".join(part for part in (times, places) if part)

    def holds(self, moment: Moment) -> bool | None:
        """Say whether it holds at this moment; None when that depends on what the moment leaves open."""
        return all_of(
            (
                any_of(_open(window, moment) for window in self.during) if self.during else True,
                self._near(moment) if self.networks else True,
            )
        )

    def _near(self, moment: Moment) -> bool | None:
        address = moment.address
        return None if address is None else any(within(address, network) for network in self.networks)

    def __str__(self) -> str:
        verb = "allows" if self.effect is Effect.ALLOW else "denies"
        only = f" only {self.conditions}" if self.conditional else ""
        return f"{self.source} {verb} {self.access} '{self.template}'{only} ({self.place})"


def _open(window: Window, moment: Moment) -> bool | None:
    if moment.at is None:
        return True if window.always else None
    return window.holds(moment.at)


@dataclass(frozen=True)
class Role:
    """A role of policy.yml: devices have it because devices.yml says so."""

    name: str
    description: str
    rules: tuple[Rule, ...]
    place: Place


@dataclass(frozen=True)
class AttributeRule:
    """A rule of policy.yml: devices have it because of what they are.

    :ivar when: which devices; None for all.
    """

    name: str
    description: str
    when: When | None
    rules: tuple[Rule, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Grant:
    """A rule as it applies to one device.

    :ivar topic_filter: the rule's filter with every placeholder filled in.
    """

    rule: Rule
    topic_filter: str


class Verdict(enum.StrEnum):
    """Why a decision is what it is."""

    ALLOWED = "allowed"
    DENIED = "denied"
    """A deny rule covers all that was asked for, or all of it that is allowed."""
    NOT_ALLOWED = "not allowed"
    """No rule allows any of it."""
    PARTLY = "partly"
    """A topic filter of which some topics are allowed and others are not, or not by one rule alone."""
    REVOKED = "revoked"
    ENDED = "ended"
    """The time that devices.yml gives the device is over."""
    UNKNOWN_DEVICE = "unknown device"


@dataclass(frozen=True)
class Decision:
    """May it, and why.

    :ivar allowed: True only when everything that was asked for is allowed.
    :ivar reason: a sentence without its full stop, with the file and line of the rule that decides.
    :ivar rule: the deciding rule; None when there is none (no rule allows it, the device is revoked or unknown).
    :ivar parts: for ``Verdict.PARTLY``, the filters that are allowed within the requested one, less what is denied.
    :ivar missed: allow rules that would have covered it at another time or from another address.
    """

    allowed: bool
    verdict: Verdict
    reason: str
    rule: Rule | None = None
    parts: tuple[str, ...] = ()
    missed: tuple[Rule, ...] = ()


def _counts(rule: Rule, moment: Moment, *, generous: bool) -> bool:
    """Say whether a rule takes part in a decision."""
    holds = rule.holds(moment)
    return (rule.effect is Effect.ALLOW) is generous if holds is None else holds


def decide_by(
    grants: Iterable[Grant],
    access: Access,
    topic: str,
    moment: Moment = UNKNOWN,
    *,
    delivery: bool = False,
    generous: bool = False,
) -> Decision:
    """Decide whether the holder of `grants` may publish to a topic or subscribe to a filter.

    A subscription is allowed when one allow rule covers the whole filter and no deny rule touches any of it.
    ``$share/GROUP/FILTER`` is decided as FILTER. A rule counts only at the moments for which it is made; where the
    moment leaves that open, an allow rule does not count and a deny rule does, as in the broker.

    :param delivery: `topic` is the name of a message's topic, and the question is whether a subscriber may get it.
    :param generous: where the moment leaves it open, an allow rule counts and a deny rule does not: what is refused
        then is refused at every time and from everywhere.
    :raises TopicError: when `topic` is not a topic name (publish, delivery) or not a topic filter (subscribe).
    :raises ValueError: when `delivery` is asked of a publish.
    """
    if delivery and access is Access.PUBLISH:
        raise ValueError("a delivery is decided by the subscribe rules")
    if access is Access.PUBLISH or delivery:
        topics.check_name(topic)
    else:
        topic = topics.unshare(topic)
        topics.check_filter(topic)
    return decide_filter(grants, access, topic, moment, generous=generous)


def decide_filter(
    grants: Iterable[Grant], access: Access, topic: str, moment: Moment = UNKNOWN, *, generous: bool = False
) -> Decision:
    """Decide about every topic of a valid filter at once, for either access; see :func:`decide_by`.

    :param topic: not checked, and not unwrapped from ``$share``.
    """
    touching = [
        (grant, common)
        for grant in grants
        if grant.rule.access is access and (common := topics.intersection(grant.topic_filter, topic)) is not None
    ]
    counting = [(grant, common) for grant, common in touching if _counts(grant.rule, moment, generous=generous)]
    denies = [grant for grant, _ in counting if grant.rule.effect is Effect.DENY]
    for deny in denies:
        if topics.covers(deny.topic_filter, topic):
            return Decision(False, Verdict.DENIED, str(deny.rule), deny.rule)
    allows = [(grant, common) for grant, common in counting if grant.rule.effect is Effect.ALLOW]
    if not denies:
        for grant, _ in allows:
            if topics.covers(grant.topic_filter, topic):
                return Decision(True, Verdict.ALLOWED, str(grant.rule), grant.rule)
    missed = _missed(touching, topic, moment) if not denies else ()
    but = "".join(f"; {rule}" for rule in missed[:1])
    if not allows:
        reason = f"no rule allows {access} '{topic}', and silence is deny"
        if missed:
            when = "at every time and from everywhere" if moment == UNKNOWN else "at this moment"
            reason = f"no rule allows {access} '{topic}' {when}{but}"
        return Decision(False, Verdict.NOT_ALLOWED, reason, missed=missed)
    left = [(g, c) for g, c in allows if not any(topics.covers(deny.topic_filter, c) for deny in denies)]
    if not left:
        return Decision(False, Verdict.DENIED, str(denies[0].rule), denies[0].rule)
    rule = denies[0].rule if denies else left[0][0].rule
    reason = f"only a part of '{topic}' is allowed: {rule}{but}"
    return Decision(False, Verdict.PARTLY, reason, rule, tuple(dict.fromkeys(common for _, common in left)), missed)


def _missed(touching: Iterable[tuple[Grant, str]], topic: str, moment: Moment) -> tuple[Rule, ...]:
    return tuple(
        grant.rule
        for grant, _ in touching
        if grant.rule.effect is Effect.ALLOW
        and grant.rule.holds(moment) is not True
        and topics.covers(grant.topic_filter, topic)
    )


@functools.lru_cache(maxsize=4096)
def placeholders(template: str) -> tuple[str, ...]:
    """Return the names after ``device.`` in the placeholders of a checked template."""
    return tuple(match[1] for inner in _PLACEHOLDER.findall(template) if (match := _PLACEHOLDER_NAME.fullmatch(inner)))


def check_template(template: str, access: Access) -> None:
    """Refuse a topic of a rule that is wrong for every device.

    :raises TopicError: when it is not a valid topic filter around its placeholders, has a brace or placeholder that
        is none of ours, or names topics that a rule cannot grant (``$share/...``, ``$`` topics, ``bednet/...``).
    """
    for inner in _PLACEHOLDER.findall(template):
        if not _PLACEHOLDER_NAME.fullmatch(inner):
            message = f"unknown placeholder {'{' + inner + '}'!r} in topic {template!r}"
            cure = "use {device.id}, {device.location}, {device.type} or {device.NAME}, where NAME is an attribute"
            raise TopicError("placeholder-unknown", message, cure)
    bare = _PLACEHOLDER.sub("x", template)
    if "{" in bare or "}" in bare:
        message = f"a brace without its partner in topic {template!r}"
        raise TopicError("placeholder-brace", message, "write placeholders as {device.id}; topics have no other braces")
    first = template.split("/", maxsplit=1)[0]
    if first == topics.SHARE:
        message = f"shared subscription {template!r} in a rule"
        cure = "write the filter without $share/GROUP/; a rule on a filter holds for shared subscriptions to it too"
        raise TopicError("topic-share-in-rule", message, cure)
    topics.check_filter(bare)
    if first.startswith("$") and (first != "$SYS" or access is Access.PUBLISH):
        message = f"topic {template!r} of '{access}' begins with '$'; such topics belong to the broker"
        raise TopicError(
            "topic-dollar", message, "take it out; only '$SYS' topics can be granted, and only to subscribe"
        )
    if first == "bednet":
        message = f"topic {template!r} is under 'bednet/', which is reserved for bednet's own probes"
        raise TopicError("topic-reserved", message, "use another first level")


def fill_in(template: str, values: Mapping[str, str]) -> str:
    """Return the topic filter that a checked template means for a device.

    :param values: by placeholder name; every name in :func:`placeholders` must be there.
    """
    return _PLACEHOLDER.sub(lambda match: values[match[1].removeprefix("device.")], template)
