# SPDX-License-Identifier: Apache-2.0
"""Topic names and topic filters (MQTT 5, section 4.7).

- :func:`check_name`, :func:`check_filter`: refuse what is not a topic name, not a topic filter.
- :func:`unshare`: the filter inside ``$share/GROUP/FILTER``.
- :func:`matches`: does a filter match a topic name?
- :func:`covers`: does a filter match everything that another one matches?
- :func:`widest`: of many filters those that no other one covers.
- :func:`intersection`, :func:`overlaps`: what two filters both match, and whether there is anything.

Everything here follows the rule of 4.7.2: a filter that begins with a wildcard does not match a topic name that
begins with ``$``. ``#`` therefore neither matches nor covers ``$SYS/#``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from bednet.errors import TopicError

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_BYTES = 65535
"""The longest UTF-8 string that MQTT can carry, in bytes (MQTT 5, 1.5.4)."""

SHARE = "$share"

# NUL and surrogates are forbidden (MQTT 5, 1.5.4); control characters and non-characters only advised against, but
# Mosquitto disconnects clients that send them (lib/utf8_mosq.c), so a rule about them could never be used.
_NON_CHARACTERS = "".join(f"{chr(plane << 16 | low)}" for plane in range(17) for low in (0xFFFE, 0xFFFF))
_FORBIDDEN = re.compile(f"[\\x00-\\x1f\\x7f-\\x9f\\ufdd0-\\ufdef{_NON_CHARACTERS}]|(?P<surrogate>[\\ud800-\\udfff])")


def _short(text: str) -> str:
    longest = 80
    return repr(text) if len(text) <= longest else f"{text[:longest]!r}..."


def _check_text(text: str, what: str) -> None:
    if not text:
        raise TopicError("topic-empty", f"an empty {what}", f"write the {what}, or leave the line out")
    if found := _FORBIDDEN.search(text):
        code = ord(found[0])
        why = "which MQTT forbids" if code == 0 or found["surrogate"] else "for which brokers drop the connection"
        message = f"{what} {_short(text)} contains the character U+{code:04X}, {why}"
        raise TopicError("topic-character", message, "take it out; topics are printable text in UTF-8")
    size = len(text.encode())
    if size > MAX_BYTES:
        message = f"{what} of {size} bytes (it begins {text[:30]!r}); MQTT allows {MAX_BYTES}"
        raise TopicError("topic-too-long", message, "shorten it")


def check_name(name: str) -> None:
    """Refuse what is not a topic name: what a PUBLISH may carry.

    Stricter than the standard in one point: control characters, which it only advises against (MQTT 5, 1.5.4), are
    refused, since Mosquitto disconnects clients that send them.

    :raises TopicError: when `name` is empty, too long, or has a wildcard, NUL or another forbidden character.
    """
    _check_text(name, "topic")
    for wildcard in "+#":
        if wildcard in name:
            message = f"topic {_short(name)} contains the wildcard '{wildcard}'; one publishes to one topic"
            raise TopicError("topic-wildcard", message, "name one topic, without + and #")


def check_filter(topic_filter: str) -> None:
    """Refuse what is not a topic filter: what a SUBSCRIBE may carry. ``$share/...`` must be unwrapped before.

    :raises TopicError: when `topic_filter` is empty, too long, has a forbidden character, or a wildcard that does
        not fill its level, or a ``#`` that is not last (MQTT 5, 4.7.1).
    """
    _check_text(topic_filter, "topic filter")
    levels = topic_filter.split("/")
    for number, level in enumerate(levels, start=1):
        if "#" in level and (level != "#" or number != len(levels)):
            message = (
                f"topic filter {_short(topic_filter)} has '#' in level {number}, where it is neither alone nor last"
            )
            raise TopicError(
                "topic-hash", message, "let # be the whole last level, as in a/b/#, or use + for one level"
            )
        if "+" in level and level != "+":
            message = f"topic filter {_short(topic_filter)} has '+' together with other characters in level {number}"
            raise TopicError(
                "topic-plus", message, "let + be a whole level, as in a/+/b; there is no part-of-a-level wildcard"
            )


def unshare(topic_filter: str) -> str:
    """Return the filter inside ``$share/GROUP/FILTER``, any other filter as it is (MQTT 5, 4.8.2).

    :raises TopicError: when it begins with ``$share/`` but has no group or no filter, or a wildcard in the group.
    """
    if topic_filter != SHARE and not topic_filter.startswith(SHARE + "/"):
        return topic_filter
    _, group, inner = (*topic_filter.split("/", 2), "", "")[:3]
    if not group or not inner or "+" in group or "#" in group:
        message = f"shared subscription {_short(topic_filter)} has no valid group or no filter"
        raise TopicError("topic-share", message, "write $share/GROUP/FILTER; the group has no + and #")
    return inner


def _levels(topic_filter: str) -> list[str]:
    # Every topic has a first level, so '#' says the same as '+/#'; one spelling spares a special case below.
    levels = topic_filter.split("/")
    return ["+", "#"] if levels == ["#"] else levels


def matches(topic_filter: str, name: str) -> bool:
    """Say whether a valid filter matches a valid topic name, by the rules of MQTT 5, 4.7."""
    # A topic name is a filter without wildcards, which matches itself alone.
    return covers(topic_filter, name)


def covers(granted: str, requested: str) -> bool:
    """Say whether every topic name that `requested` matches is matched by `granted`, both valid filters."""
    ours, theirs = _levels(granted), _levels(requested)
    if ours[0] == "+" and theirs[0].startswith("$"):
        return False
    for number, level in enumerate(ours):
        if level == "#":
            return True  # also the parent: a/# covers a
        if number == len(theirs) or theirs[number] == "#":
            return False
        if level not in ("+", theirs[number]):
            return False
    return len(ours) == len(theirs)


class _Tree:
    """Filters by their levels; `ends` where one of them has its last level."""

    __slots__ = ("below", "ends")

    def __init__(self) -> None:
        self.below: dict[str, _Tree] = {}
        self.ends = False

    def add(self, levels: tuple[str, ...]) -> None:
        node = self
        for level in levels:
            node = node.below.setdefault(level, _Tree())
        node.ends = True

    def covers(self, levels: tuple[str, ...]) -> bool:
        """Say whether a filter of the tree, other than this one itself, covers it; as :func:`covers` does."""
        # All beginnings of filters that cover what was looked at, and whether they are this filter's own.
        nodes = [(self, True)]
        for number, level in enumerate(levels):
            longer = []
            for node, own in nodes:
                if "#" in node.below and not (own and level == "#"):
                    return True
                if (same := node.below.get(level)) is not None and level != "#":
                    longer.append((same, own))
                if level not in ("+", "#") and (number or not level.startswith("$")) and "+" in node.below:
                    longer.append((node.below["+"], False))
            nodes = longer
        return any("#" in node.below or (node.ends and not own) for node, own in nodes)


def widest(filters: Iterable[str]) -> list[str]:
    """Return the valid filters that no other one of them covers; of two that say the same the first stays."""
    found: dict[tuple[str, ...], str] = {}
    tree = _Tree()
    for topic_filter in filters:
        levels = tuple(_levels(topic_filter))
        found.setdefault(levels, topic_filter)
        tree.add(levels)
    return [topic_filter for levels, topic_filter in found.items() if not tree.covers(levels)]


def intersection(one: str, other: str) -> str | None:
    """Return the filter that matches exactly what both valid filters match; None when that is nothing."""
    left, right = _levels(one), _levels(other)
    if {"+"} & {left[0], right[0]} and (left[0].startswith("$") or right[0].startswith("$")):
        return None
    both: list[str] = []
    for number in range(max(len(left), len(right)) + 1):
        if left[number : number + 1] == ["#"]:
            both += right[number:]
            break
        if right[number : number + 1] == ["#"]:
            both += left[number:]
            break
        if number == len(left) == len(right):
            break
        if number >= len(left) or number >= len(right):
            return None
        if left[number] == "+":
            both.append(right[number])
        elif right[number] in ("+", left[number]):
            both.append(left[number])
        else:
            return None
    if both == [""]:
        return None  # what '/#' and '+' both match has one level, an empty one, and no topic name is empty
    return "#" if both == ["+", "#"] else "/".join(both)


def overlaps(one: str, other: str) -> bool:
    """Say whether some topic name is matched by both valid filters."""
    return intersection(one, other) is not None
