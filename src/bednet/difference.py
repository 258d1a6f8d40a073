# SPDX-License-Identifier: Apache-2.0
"""What a change of a site means for its devices.

- :func:`difference`: which devices gain and lose what, and who may sign tokens for them, in words.

Devices to which the same happens are told together. What is compared is what the rules mean: a rule that moves, or
that another one covers, is no change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bednet import topics
from bednet.issuers import ROLE_PROFILE
from bednet.lint import implies
from bednet.moment import instant_text
from bednet.policy import Access, Effect, placeholders

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bednet.devices import Device
    from bednet.issuers import Issuer
    from bednet.policy import Rule
    from bednet.site import Site
    from bednet.yamlfile import Scalar

SHOWN = 5
"""How many devices of a group are named."""


@dataclass(frozen=True)
class _Line:
    """A rule with what changed filled in; other placeholders stay as they are written."""

    rule: Rule
    topic: str


@dataclass(frozen=True)
class _Change:
    """What happens to a device; devices to which the same happens are one group.

    :ivar old: the profile that it had; None when it had no access. `new` likewise.
    :ivar values: placeholders whose value changes: name, old, new.
    :ivar notes: what happens besides rules, in words that begin with + or -.
    """

    what: str
    old: str | None
    new: str | None
    values: tuple[tuple[str, Scalar, Scalar], ...]
    notes: tuple[str, ...]


def difference(old: Site, new: Site) -> str:
    """Return what devices gain and lose from one site to another, with a line end."""
    groups: dict[_Change, list[str]] = defaultdict(list)
    names = {
        (number, key): {name for rule in rules for name in placeholders(rule.template)}
        for number, site in enumerate((old, new))
        for key, rules in site.profiles.items()
    }
    same_rules: dict[tuple[str, str], bool] = {}
    for device_id in sorted({*old.devices, *new.devices}):
        before, after = old.devices.get(device_id), new.devices.get(device_id)
        had, has = _key(old, before), _key(new, after)
        if before is None or after is None:
            what = "new" if before is None else "gone"
            groups[_Change(what, had, has, (), tuple(_notes(before, after)))].append(device_id)
            continue
        wanted = names.get((0, old.profile_of[device_id]), set()) | names.get((1, new.profile_of[device_id]), set())
        values = tuple(
            (name, before.value(name), after.value(name))
            for name in sorted(wanted)
            if before.value(name) != after.value(name)
        )
        notes = tuple(_notes(before, after))
        if not values and not notes and had is not None and has is not None:
            pair = (had, has)
            if pair not in same_rules:
                same_rules[pair] = not any(_lines(old, new, _Change("changed", had, has, (), ())))
            if same_rules[pair]:
                continue
        if values or notes or had is not None or has is not None:
            groups[_Change("changed", had, has, values, notes)].append(device_id)
    told = [(change, ids, list(_lines(old, new, change))) for change, ids in groups.items()]
    told = [(change, ids, lines) for change, ids, lines in told if change.what != "changed" or lines or change.notes]
    return _text(old, new, told) + "".join(f"\n{block}\n" for block in _issuers(old, new))


def _text(old: Site, new: Site, told: list[tuple[_Change, list[str], list[str]]]) -> str:
    counts = {
        what: sum(len(ids) for change, ids, _ in told if change.what == what) for what in ("new", "gone", "changed")
    }
    same = len(new.devices) - counts["new"] - counts["changed"]
    head = (
        f"Devices: {len(old.devices)} before, {len(new.devices)} now. "
        f"New: {counts['new']}. Gone: {counts['gone']}. Changed: {counts['changed']}. As before: {same}.\n"
    )
    blocks = []
    for change, ids, lines in told:
        title = f"{_few(ids)}: {change.what}"
        if change.values:
            title += ", " + ", ".join(f"{name} {_word(was)} -> {_word(is_)}" for name, was, is_ in change.values)
        blocks.append("\n".join([title, *(f"  {note}" for note in change.notes), *(f"  {line}" for line in lines)]))
    return "\n\n".join([head.rstrip("\n"), *blocks]) + "\n"


def _word(value: Scalar) -> str:
    return "(none)" if value is None else str(value)


def _few(ids: list[str]) -> str:
    shown = ", ".join(ids[:SHOWN])
    return shown if len(ids) <= SHOWN else f"{len(ids)} devices ({shown} and {len(ids) - SHOWN} more)"


def _key(site: Site, device: Device | None) -> str | None:
    return None if device is None or device.revoked is not None else site.profile_of[device.id]


def _notes(before: Device | None, after: Device | None) -> Iterator[str]:
    """Say what happens to a device besides its rules."""
    if after is not None and after.revoked is not None:
        if before is None or before.revoked is None:
            yield f"- all access: revoked, {after.revoked}"
        return
    if before is not None and before.revoked is not None and after is not None:
        yield f"+ access: no longer revoked, which was {before.revoked}"
        before = None
    ways_before = before.authentication if before is not None else ()
    ways_after = after.authentication if after is not None else ()
    yield from (f"+ authentication by {way}" for way in ways_after if way not in ways_before)
    old_method = before.token_authentication if before is not None else None
    new_method = after.token_authentication if after is not None else None
    if old_method and new_method and old_method != new_method:
        yield f"+ tokens by {new_method}"
        yield f"- tokens by {old_method}"
    if after is not None:
        yield from (f"- authentication by {way}" for way in ways_before if way not in ways_after)
    was, is_ = (device.until if device is not None else None for device in (before, after))
    if after is not None and was != is_:
        sign = "+" if is_ is None or (was is not None and was < is_) else "-"
        then = "" if was is None else f", before: {instant_text(was)}"
        yield f"{sign} access " + ("without an end" if is_ is None else f"until {instant_text(is_)}") + then


def _issuers(old: Site, new: Site) -> Iterator[str]:
    """Go through the issuers of tokens with which something happens, a block for each."""
    for name in sorted({*old.issuers, *new.issuers}):
        before, after = old.issuers.get(name), new.issuers.get(name)
        lines = []
        if before is not None and after is not None:
            lines += [f"{field} {was} -> {is_}" for field, was, is_ in _fields(before, after) if was != is_]
        for value in sorted({*(before.roles if before else ()), *(after.roles if after else ())}):
            rights = list(_lines_of(_given(old, before, value), _given(new, after, value)))
            lines += [f"who has {value!r} in its token:", *(f"  {line}" for line in rights)] if rights else []
        what = "new" if before is None else "gone" if after is None else "changed"
        if lines or what != "changed":
            present = after or before
            yield "\n".join(
                [f"issuer {name} ({present.issuer if present else ''}): {what}", *(f"  {line}" for line in lines)]
            )


def _fields(before: Issuer, after: Issuer) -> Iterator[tuple[str, str, str]]:
    names = (
        *("issuer", "service", "audience", "algorithms", "leeway", "longest", "typ", "scope", "claim", "prefix"),
        *("roles_claim", "roles_separator", "attributes", "jwks_url"),
    )
    for name in names:
        yield name, _shown(getattr(before, name)), _shown(getattr(after, name))
    was, is_ = ([str(jwk.get("kid", "(no kid)")) for jwk in issuer.keys or ()] for issuer in (before, after))
    yield "keys", ", ".join(was) or "(none)", ", ".join(is_) or "(none)"
    if was == is_ and before.keys != after.keys:
        yield "keys", "some", "others of the same names"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {item}" for key, item in value.items()) or "(none)"
    return "(none)" if value in (None, "") else "(a space)" if value == " " else str(value)


def _given(site: Site, issuer: Issuer | None, value: str) -> list[_Line]:
    """Return the rules that a value in a token of an issuer gives."""
    role = issuer.roles.get(value) if issuer is not None else None
    return _meant(site.role_profiles[f"{ROLE_PROFILE}{role}"] if role is not None else (), {})


def _lines(old: Site, new: Site, change: _Change) -> Iterator[str]:
    """Say what a group gains and loses."""
    had = _meant(old.profiles[change.old] if change.old is not None else (), {n: v for n, v, _ in change.values})
    has = _meant(new.profiles[change.new] if change.new is not None else (), {n: v for n, _, v in change.values})
    yield from _lines_of(had, has)


def _lines_of(had: list[_Line], has: list[_Line]) -> Iterator[str]:
    for access in Access:
        before, after = (_Lists(lines, access) for lines in (had, has))
        for line in after.allows:
            if not _in(line, before.allows):
                yield _told("+", access, line, "")
        for line in before.denies:
            if not _in(line, after.denies) and _touches(line, after.allows) and before.allows:
                yield _told("+", access, line, ", no longer denied")
        for line in before.allows:
            if not _in(line, after.allows):
                yield _told("-", access, line, _rest(line, after.allows))
        for line in after.denies:
            if not _in(line, before.denies) and _touches(line, before.allows):
                yield _told("-", access, line, ", denied now")


class _Lists:
    def __init__(self, lines: Iterable[_Line], access: Access) -> None:
        held = [line for line in lines if line.rule.access is access]
        self.allows = [line for line in held if line.rule.effect is Effect.ALLOW]
        self.denies = [line for line in held if line.rule.effect is Effect.DENY]


def _meant(rules: Iterable[Rule], values: dict[str, Scalar]) -> list[_Line]:
    lines = []
    for rule in rules:
        topic = rule.template
        for name, value in values.items():
            topic = topic.replace(f"{{device.{name}}}", str(value))
        lines.append(_Line(rule, topic))
    return lines


def _in(line: _Line, others: Iterable[_Line]) -> bool:
    return any(topics.covers(other.topic, line.topic) and implies(line.rule, other.rule) for other in others)


def _touches(line: _Line, others: Iterable[_Line]) -> bool:
    # A level with a placeholder may be anything without a wildcard; '+' stands for it.
    wide = _wide(line.topic)
    return any(topics.overlaps(wide, _wide(other.topic)) for other in others)


def _wide(topic: str) -> str:
    return "/".join("+" if "{device." in level else level for level in topic.split("/"))


def _rest(line: _Line, others: Iterable[_Line]) -> str:
    """Say under which condition a lost permission stays."""
    for other in others:
        if other.rule.conditional and topics.covers(other.topic, line.topic):
            return f", but for {other.rule.conditions}"
    return ""


def _told(sign: str, access: Access, line: _Line, rest: str) -> str:
    only = f" {line.rule.conditions}" if line.rule.conditional else ""
    return f"{sign} {access} {line.topic}{only}{rest} ({line.rule.source}, {line.rule.place})"
