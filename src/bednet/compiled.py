# SPDX-License-Identifier: Apache-2.0
"""The compiled site: what the gateways' stores are made from.

- :func:`write`: writes a site as JSON lines, in the form that ``bednet-store apply`` reads (docs/store.md).
- :func:`write_file`: the same into a file, which is replaced as a whole.
- :func:`device_lines`: the lines of one device, for a caller who knows what changed.
- :func:`transitions`: the changes of a time zone's offset.

Nothing in it is secret: passwords, keys and the serial numbers of revoked certificates come from the CA.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import os
import re
import tempfile
import zoneinfo
from pathlib import Path
from typing import TYPE_CHECKING

from bednet.issuers import ROLE_PROFILE
from bednet.policy import placeholders
from bednet.site import PROBE_ID, probe_grants

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import TextIO

    from bednet.devices import Device
    from bednet.issuers import Issuer
    from bednet.policy import Rule, Window
    from bednet.site import Site

PROBE_PROFILE = f"*{PROBE_ID}"
"""The key of the probe's profile; no role has such a name."""

BEGIN_OF_TIME = -62_135_596_800
"""0001-01-01T00:00:00Z, where Python's calendar begins, in unix seconds."""

LAST_YEAR = 2100
_FIRST_CHANGE = dt.datetime(1800, 1, 1, tzinfo=dt.UTC)
_DAY, _SECOND = dt.timedelta(days=1), dt.timedelta(seconds=1)
_PARTS = re.compile(r"\{device\.([A-Za-z][A-Za-z0-9_]*)\}")


def write(site: Site, stream: TextIO) -> None:
    """Write a site: a header, its time zones, its profiles, its devices in order of their ids."""
    stream.writelines(lines(site))


def write_file(site: Site, path: Path) -> None:
    """Write a site to a file: all of it, or the file stays as it is.

    :raises OSError: when it cannot be written.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as stream:
            write(site, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def lines(site: Site) -> Iterator[str]:
    """Go through the lines of the compiled site, each with its end."""
    profiles = {**site.profiles, **site.role_profiles, PROBE_PROFILE: tuple(grant.rule for grant in probe_grants())}
    windows = {window for rules in profiles.values() for rule in rules for window in rule.during}
    zones = sorted({window.zone for window in windows})
    header = {
        "bednet-compiled": 2,
        "zones": len(zones),
        "profiles": len(profiles),
        "issuers": len(site.issuers),
        "devices": len(site.devices) + 1,
    }
    yield _line(header)
    for zone in zones:
        yield _line({"zone": zone, "transitions": transitions(zone)})
    names = {key: _names(rules) for key, rules in profiles.items()}
    for key in sorted(profiles):
        yield _profile(key, names[key], profiles[key])
    for name in sorted(site.issuers):
        yield _line(_issuer(site.issuers[name], names))
    # It tries whatever the site has, so also the site's own token service.
    serves = any(issuer.service for issuer in site.issuers.values())
    probe = {
        "device": PROBE_ID,
        "profile": PROBE_PROFILE,
        "values": [],
        "authentication": ["certificate", "password", "psk", *(["token"] if serves else [])],
        "token": "tls_client_auth" if serves else None,
        "until": None,
        "revoked": None,
    }
    quoted = {key: json.dumps(key) for key in profiles}
    ways: dict[tuple[str, ...], str] = {}
    for device_id in sorted((*site.devices, PROBE_ID)):
        if device_id == PROBE_ID:
            yield _line(probe)
            continue
        key = site.profile_of[device_id]
        yield _device(site.devices[device_id], quoted[key], names[key], ways)


def device_lines(site: Site, device_id: str) -> str:
    """Return the lines of a device's profile and of the device, which are the same as in the whole.

    :raises KeyError: when the site has no such device.
    """
    key = site.profile_of[device_id]
    rules = site.profiles[key]
    names = _names(rules)
    return _profile(key, names, rules) + _device(site.devices[device_id], json.dumps(key), names, {})


def _line(data: object) -> str:
    return json.dumps(data, ensure_ascii=False) + "\n"


def _profile(key: str, names: list[str], rules: Iterable[Rule]) -> str:
    return _line({"profile": key, "names": names, "rules": [_rule(rule, names) for rule in rules]})


def _device(device: Device, profile: str, names: Iterable[str], ways: dict[tuple[str, ...], str]) -> str:
    """Put a device's line together; a million of them shall not take long. An id needs no quoting."""
    authentication = ways.get(device.authentication)
    if authentication is None:
        authentication = ways[device.authentication] = json.dumps(device.authentication)
    values = json.dumps([str(device.value(name)) for name in names], ensure_ascii=False) if names else "[]"
    until = "null" if device.until is None else int(device.until.timestamp())
    revoked = "null" if device.revoked is None else f'"{device.revoked}"'
    token = "null" if device.token_authentication is None else f'"{device.token_authentication}"'
    # Few have it.
    mark = "" if device.reinstated is None else f', "reinstated": {int(device.reinstated.timestamp())}'
    return (
        f'{{"device": "{device.id}", "profile": {profile}, "values": {values}, '
        f'"authentication": {authentication}, "token": {token}, "until": {until}, '
        f'"revoked": {revoked}{mark}}}\n'
    )


def _issuer(issuer: Issuer, names: Mapping[str, list[str]]) -> dict[str, object]:
    """Return what a gateway has to know of an issuer.

    :param names: by a profile's key, its placeholders.
    """
    roles: dict[str, object] | None = None
    if issuer.roles_claim is not None:
        mapped = []
        for value, role in issuer.roles.items():
            key = f"{ROLE_PROFILE}{role}"
            claims = [issuer.attributes[name] for name in names[key]]
            mapped.append({"value": value, "profile": key, "claims": claims})
        separator = {"separator": issuer.roles_separator} if issuer.roles_separator else {}
        roles = {"claim": issuer.roles_claim, **separator, "map": mapped}
    return {
        "issuer": issuer.issuer,
        "name": issuer.name,
        "service": issuer.service,
        "audience": issuer.audience,
        "algorithms": issuer.algorithms,
        "leeway": issuer.leeway,
        "longest": issuer.longest,
        "typ": issuer.typ,
        "scope": issuer.scope,
        "claim": issuer.claim,
        "prefix": issuer.prefix,
        "roles": roles,
        "keys": issuer.keys,
        "jwks_url": issuer.jwks_url,
    }


def _names(rules: Iterable[Rule]) -> list[str]:
    """Return the placeholders of a profile in the order of their first use, less the id, which needs no value."""
    found = dict.fromkeys(name for rule in rules for name in placeholders(rule.template))
    return [name for name in found if name != "id"]


def _rule(rule: Rule, names: list[str]) -> dict[str, object]:
    parts: list[str | int] = []
    # Text and names of placeholders take turns.
    for number, part in enumerate(_PARTS.split(rule.template)):
        if number % 2:
            parts.append(0 if part == "id" else names.index(part) + 1)
        elif part:
            parts.append(part)
    return {
        "id": rule.id,
        "effect": str(rule.effect),
        "access": str(rule.access),
        "topic": parts,
        "during": [_window(window) for window in rule.during],
        "networks": [str(network) for network in rule.networks],
    }


def _window(window: Window) -> Mapping[str, object]:
    days = sum(1 << day for day in window.days)
    return {"days": days, "from": window.start, "to": window.end, "zone": window.zone}


@functools.cache
def transitions(name: str) -> tuple[tuple[int, int], ...]:
    """Return from which UTC second on a time zone has which offset, in seconds; the first holds since ever.

    The zone's data is asked day by day from 1800 to 2100: no zone changes twice within a day, there and back.

    :raises zoneinfo.ZoneInfoNotFoundError: when there is no such zone.
    """
    zone = zoneinfo.ZoneInfo(name)

    def offset(at: dt.datetime) -> int:
        return int((at.astimezone(zone).utcoffset() or dt.timedelta()).total_seconds())

    before, at = offset(_FIRST_CHANGE), _FIRST_CHANGE
    found = [(BEGIN_OF_TIME, before)]
    while at.year <= LAST_YEAR:
        day = at + _DAY
        if (after := offset(day)) != before:
            low, high = at, day
            while high - low > _SECOND:
                middle = low + _SECOND * ((high - low) // _SECOND // 2)
                low, high = (middle, high) if offset(middle) == before else (low, middle)
            found.append((int(high.timestamp()), after))
            before = after
        at = day
    return tuple(found)
