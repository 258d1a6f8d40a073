# SPDX-License-Identifier: Apache-2.0
"""Scopes in the form AIF-MQTT (RFC 9431, 3): ``[["sensors/a/#", ["pub"]], ...]`` in JSON, base64url.

- :func:`parse`, :func:`show`: between text and :data:`Scope`.
- :func:`grant`: cuts what is asked down to what a policy allows.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TypeAlias

from bednet import topics
from bednet.errors import BednetError, TopicError
from bednet.token_service import jose

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Permission: TypeAlias = tuple[str, str]
"""``pub`` or ``sub``, and a topic filter."""

Scope: TypeAlias = tuple[Permission, ...]

ACCESSES = {"publish": "pub", "subscribe": "sub"}
MOST_ENTRIES = 100
"""Entries of a scope that is asked for."""

ROOM = jose.LONGEST * 9 // 16
"""Bytes of JSON that a scope can have in a token, which is base64 of base64: three quarters of three quarters."""

ENTRY = len('["",["pub"]],')
"""Bytes of an entry beside its filter, at least: no token has room for more than 329 filters of one access."""


class ScopeError(BednetError):
    """A scope is refused.

    :ivar code: ``scope-malformed``, ``scope-topic``, ``scope-empty`` or ``scope-too-large``, for the log.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def parse(text: str) -> Scope:
    """Read a scope.

    :raises ScopeError: when it is none, or has too many entries.
    """
    try:
        data = jose.strict_json(jose.decode(text))
    except (jose.JoseError, ValueError):
        raise ScopeError("scope-malformed", "it is not JSON in base64url") from None
    if not isinstance(data, list) or not 1 <= len(data) <= MOST_ENTRIES:
        raise ScopeError("scope-malformed", f"it is no list of 1 to {MOST_ENTRIES} entries")
    found: dict[Permission, None] = {}
    for entry in data:
        match entry:
            case [str(topic), [*accesses]] if accesses and all(access in ("pub", "sub") for access in accesses):
                pass
            case _:
                raise ScopeError("scope-malformed", 'an entry is not [filter, ["pub", "sub"]]')
        try:
            topics.check_filter(topic)
        except TopicError as exc:
            raise ScopeError("scope-topic", f"{exc.code}") from exc
        if topic.split("/", 1)[0] == topics.SHARE:
            raise ScopeError("scope-topic", "topic-share: a scope names the filter within, as the policy does")
        found.update(dict.fromkeys((access, topic) for access in accesses))
    return tuple(found)


def show(scope: Iterable[Permission]) -> str:
    """Write a scope: each filter once, in the order of their first use."""
    entries: dict[str, list[str]] = {}
    for access, topic in scope:
        entries.setdefault(topic, []).append(access)
    data = [[topic, sorted(set(accesses))] for topic, accesses in entries.items()]
    return jose.encode(jose.compact_json(data))


def grant(asked: Scope | None, allowed: Sequence[Permission], denied: Sequence[Permission]) -> Scope:
    """Cut a scope down to what a policy allows: never more than was asked for, never more than is allowed.

    What a deny takes away in part stays: the broker refuses it there.

    :param asked: None for all.
    :raises ScopeError: when nothing is left (``scope-empty``), or more than a token has room for (``scope-too-large``).
    """
    rules = _widest(allowed)
    found: dict[Permission, None] = {}
    room = dict.fromkeys(ACCESSES.values(), ROOM)
    # Asked for may be a hundred filters that each overlap each rule: what fits into no token is never compared.
    for access, topic in rules if asked is None else _cut(_widest(asked), rules):
        if (access, topic) in found:
            continue
        found[access, topic] = None
        room[access] -= len(topic.encode()) + ENTRY
        if room[access] < 0:
            raise ScopeError("scope-too-large", "the policy allows more of it than a token has room for")
    left = _widest(
        (access, topic)
        for access, topic in found
        if not any(kind == access and topics.covers(wide, topic) for kind, wide in denied)
    )
    if not left:
        raise ScopeError("scope-empty", "the policy allows nothing of it")
    return tuple(left)


def _widest(permissions: Iterable[Permission]) -> list[Permission]:
    """Leave out what others of these permit as well."""
    found = dict.fromkeys(permissions)
    wide = {kind: set(topics.widest(topic for access, topic in found if access == kind)) for kind in ACCESSES.values()}
    return [(access, topic) for access, topic in found if topic in wide[access]]


def _cut(asked: Iterable[Permission], rules: Sequence[Permission]) -> Iterator[Permission]:
    for access, topic in asked:
        for kind, wide in rules:
            if kind == access and (both := topics.intersection(topic, wide)) is not None:
                yield access, both


def permissions(rules: str, placeholders: str, device: str) -> tuple[list[Permission], list[Permission]]:
    """Return what a profile of the database allows a device, and what it denies.

    :param rules: JSON, likewise `placeholders`: columns of the tables ``profiles`` and ``devices``.
    """
    values = [device, *json.loads(placeholders)]
    found: dict[str, list[Permission]] = {"allow": [], "deny": []}
    for effect, access, topic in json.loads(rules):
        text = "".join(part if isinstance(part, str) else values[part] for part in topic)
        found[effect].append((ACCESSES[access], text))
    return found["allow"], found["deny"]
