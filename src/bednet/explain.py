# SPDX-License-Identifier: Apache-2.0
"""Decisions in words.

- :func:`explanation`: a decision, the rule that gives it, and how long it stays like that.
- :func:`changes_at`: when a decision will turn.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import TYPE_CHECKING

from bednet.moment import instant_text, within
from bednet.policy import Access, Effect
from bednet.site import decide

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bednet.moment import Address, Moment
    from bednet.policy import Decision, Rule
    from bednet.site import Site, TokenDevice

LOOK_AHEAD_DAYS = 16
"""Windows come again each week; two weeks and a bit see past a week in which the clocks skip one."""


def changes_at(site: Site, device: str | TokenDevice, access: Access, topic: str, moment: Moment) -> dt.datetime | None:
    """Return when the decision turns, counted from `moment`; None when that is not within the next days or never.

    :param device: the id of one of devices.yml, or what a token says of one.
    :raises TopicError: when `topic` is not a topic name (publish) or not a topic filter (subscribe).
    """
    if moment.at is None or (isinstance(device, str) and device not in site.devices):
        return None
    now = decide(site, device, access, topic, moment).allowed
    windows = {window for grant in site.grants_of(device) for window in grant.rule.during}
    edges = {edge for window in windows for edge in window.edges(moment.at, LOOK_AHEAD_DAYS)}
    until = _end(site, device)
    if until is not None and until > moment.at:
        edges.add(until)
    for edge in sorted(edges):
        if decide(site, device, access, topic, replace(moment, at=edge)).allowed is not now:
            return edge
    return None


def explanation(
    site: Site,
    device: str | TokenDevice,
    access: Access,
    topic: str,
    moment: Moment,
    *,
    access_control: str = "plugin",
) -> tuple[Decision, str]:
    """Decide, and say it in words, with a line end.

    :param device: the id of one of devices.yml, or what a token says of one.
    :param access_control: what decides on the gateways, ``plugin`` or ``acl_file``.
    :raises TopicError: when `topic` is not a topic name (publish) or not a topic filter (subscribe).
    """
    decision = decide(site, device, access, topic, moment)
    name = device if isinstance(device, str) else device.id
    may = "may" if decision.allowed else "may NOT"
    verb = "publish" if access is Access.PUBLISH else "subscribe"
    asked = [f"at {moment.at.isoformat()}" if moment.at else "", f"from {moment.address}" if moment.address else ""]
    lines = [" ".join(part for part in (f"{name} {may} {verb} to {topic}", *asked) if part)]
    lines.append(f"  because {decision.reason}")
    if decision.rule is not None:
        lines.append(f"  rule {decision.rule.id}")
    lines += [f"  {line}" for line in _conditions(decision, moment)]
    if (end := changes_at(site, device, access, topic, moment)) is not None:
        lines.append(f"  until {_shown(end, moment)}")
    elif moment.at is None and decision.allowed and (until := _end(site, device)) is not None:
        lines.append(f"  until {instant_text(until)}, when its access ends")
    if access is Access.SUBSCRIBE and not decision.allowed:
        lines += _subscription(decision, access_control)
    return decision, "\n".join(lines) + "\n"


def _end(site: Site, device: str | TokenDevice) -> dt.datetime | None:
    listed = site.devices.get(device) if isinstance(device, str) else None
    return listed.until if listed is not None else None


def _shown(end: dt.datetime, moment: Moment) -> str:
    zone = moment.at.tzinfo if moment.at is not None else dt.UTC
    return instant_text(end) if zone is dt.UTC else end.astimezone(zone).isoformat()


def _conditions(decision: Decision, moment: Moment) -> Iterator[str]:
    """Say what is missing for another answer, and what was not asked."""
    rules: list[Rule] = list(decision.missed[:1])
    if decision.rule is not None and decision.rule.effect is Effect.DENY and decision.rule.holds(moment) is None:
        rules.append(decision.rule)
    for rule in rules:
        what = "it allows" if rule.effect is Effect.ALLOW else "it denies"
        if rule.during and moment.at is None:
            yield f"{what} that at certain times only: ask with --at"
        elif rule.during and moment.at is not None and not any(window.holds(moment.at) for window in rule.during):
            opens = [edge for window in rule.during if (edge := window.next_change(moment.at)) is not None]
            yield (
                f"the time is outside; {what} that again at {_shown(min(opens), moment)}"
                if opens
                else ("the time is outside")
            )
        if rule.networks and moment.address is None:
            yield f"{what} that from certain addresses only: ask with --from"
        elif moment.address is not None and not _near(moment.address, rule):
            yield f"{moment.address} is in none of its networks"


def _near(address: Address, rule: Rule) -> bool:
    return not rule.networks or any(within(address, network) for network in rule.networks)


def _subscription(decision: Decision, access_control: str) -> list[str]:
    parts = [f"    {part}" for part in decision.parts]
    if access_control == "plugin":
        return ["  These parts of it are allowed:", *parts] if parts else []
    if parts:
        return [
            "  Mosquitto with an acl_file accepts the SUBSCRIBE all the same and delivers only what is allowed in:",
            *parts,
        ]
    return ["  Mosquitto with an acl_file accepts the SUBSCRIBE all the same and delivers nothing."]
