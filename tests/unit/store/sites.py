# SPDX-License-Identifier: Apache-2.0
"""Compiled sites for the tests of the store: made by hand, or generated."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from bednet import store

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

Json = dict[str, Any]
BERLIN = {"zone": "Europe/Berlin", "transitions": [[-62135596800, 3208], [-2422054408, 3600]]}
SALT, HASH = bytes(range(12)), bytes(range(64))
PASSWORD = f"$7$101${base64.b64encode(SALT).decode()}${base64.b64encode(HASH).decode()}"
OTHER_PASSWORD = f"$7$101${base64.b64encode(SALT[::-1]).decode()}${base64.b64encode(HASH).decode()}"
PSK = "00112233445566778899aabbccddeeff"


def rule(name: str = "role/sensor/allow/publish/0", *topic: str | int, **more: Any) -> Json:
    return {
        "id": name,
        "effect": name.split("/")[2],
        "access": name.split("/")[3],
        "topic": list(topic) or ["sensors/", 0, "/#"],
        "during": [],
        "networks": [],
        **more,
    }


def profile(key: str = "sensor", *rules: Json, names: Iterable[str] = ()) -> Json:
    return {"profile": key, "names": list(names), "rules": list(rules) or [rule()]}


def device(name: str, key: str = "sensor", *authentication: str, **more: Any) -> Json:
    return {
        "device": name,
        "profile": key,
        "values": [],
        "authentication": list(authentication) or ["certificate"],
        "token": "tls_client_auth" if "token" in authentication else None,
        "until": None,
        "revoked": None,
        **more,
    }


def compiled(
    devices: Iterable[Json] = (),
    profiles: Iterable[Json] | None = None,
    zones: Iterable[Json] = (),
    issuers: Iterable[Json] = (),
) -> list[str]:
    """Return the lines of a compiled site; the devices stand in the order in which they are given."""
    profiles = [profile()] if profiles is None else list(profiles)
    counted = {"zones": list(zones), "profiles": profiles, "issuers": list(issuers), "devices": list(devices)}
    header = {"bednet-compiled": 2, **{name: len(entries) for name, entries in counted.items()}}
    return [json.dumps(entry) + "\n" for entry in [header, *(entry for part in counted.values() for entry in part)]]


def issuer(iss: str = "https://tokens.plant.example:8443", **more: Any) -> Json:
    """Return an issuer's line; keys come later."""
    return {
        "issuer": iss,
        "name": "site",
        "service": False,
        "audience": ["mqtts://plant.example"],
        "algorithms": ["ES256"],
        "leeway": 30,
        "longest": 86400,
        "typ": ["at+jwt"],
        "scope": "policy",
        "claim": "sub",
        "prefix": "",
        "roles": None,
        "keys": None,
        "jwks_url": None,
        **more,
    }


def many(number: int, *, location: str = "hall-1") -> list[str]:
    """Return a site of so many sensors, all at one place."""
    rules = rule("role/sensor/allow/publish/0", "sensors/", 1, "/", 0, "/#")
    devices = (device(f"sensor-{index:06}", values=[location]) for index in range(number))
    return compiled(devices, [profile("sensor", rules, names=["location"])])


def secrets(**given: Json) -> Json:
    return {"passwords": {}, "psk": {}, "revoked_serials": {}, **given}


def content(folder: Path) -> dict[tuple[bytes, bytes], bytes]:
    """Return all that a store says, less its change log."""
    everything = {(database, key): record for database, key, record in store.Store(folder).raw()}
    meta = store.Meta.decode(everything.pop((b"meta", b"meta")))
    counts = {name: sum(database == name for database, _ in everything) for name in (b"devices", b"profiles")}
    assert (meta.devices, meta.profiles) == (counts[b"devices"], counts[b"profiles"])
    return {name: record for name, record in everything.items() if name[0] != b"changes"}


def changes(folder: Path, after: int = 0) -> list[tuple[int, bytes]]:
    """Return the change log behind a number: kinds and subjects."""
    log = [
        (int.from_bytes(key, "big"), record) for name, key, record in store.Store(folder).raw() if name == b"changes"
    ]
    return [(record[0], record[1:]) for number, record in log if number > after]


# What hypothesis makes: few names, so that two sites have much in common.

_IDS = [*(f"dev-{number}" for number in range(8)), "A", "Z-1", "a_b", "bednet-probe"]
_ZONES = ["Europe/Berlin", "UTC", "Asia/Kathmandu"]
_texts = st.text(st.characters(codec="utf-8", exclude_characters="+#/\0", exclude_categories=["Cc", "Z"]), min_size=1)
values = _texts.filter(lambda text: not text.startswith("$") and len(text.encode()) <= 255)


def _networks() -> st.SearchStrategy[str]:
    return st.sampled_from(["10.20.0.0/16", "10.20.1.5/32", "0.0.0.0/0", "2001:db8::/32", "::/0", "fe80::1/128"])


def _windows() -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries(
        {
            "days": st.integers(1, 127),
            "from": st.integers(0, 86_399),
            "to": st.integers(0, 86_400),
            "zone": st.sampled_from(_ZONES),
        }
    )


def _rules(names: int) -> st.SearchStrategy[Json]:
    part = st.one_of(st.sampled_from(["sensors/", "/", "+/", "a/b", "/#", "ä"]), st.integers(0, names))
    return st.builds(
        lambda effect, access, topic, during, networks: rule(
            f"role/r/{effect}/{access}/0", *topic, during=during, networks=networks
        ),
        st.sampled_from(["allow", "deny"]),
        st.sampled_from(["publish", "subscribe"]),
        st.lists(part, min_size=1, max_size=4),
        st.lists(_windows(), max_size=2),
        st.lists(_networks(), max_size=2),
    )


@st.composite
def sites(draw: st.DrawFn) -> tuple[list[str], Json]:
    """Make a compiled site and its secrets."""
    zones = [{"zone": zone, "transitions": [[-62135596800, draw(st.integers(-3, 3)) * 900]]} for zone in _ZONES]
    counts = {key: draw(st.integers(0, 2)) for key in draw(st.sets(st.sampled_from("pqr"), min_size=1))}
    profiles = [
        {
            "profile": key,
            "names": [f"n{number}" for number in range(count)],
            "rules": draw(st.lists(_rules(count), max_size=2)),
        }
        for key, count in counts.items()
    ]
    devices, given = [], secrets()
    for name in sorted(draw(st.sets(st.sampled_from(_IDS)))):
        key = draw(st.sampled_from(sorted(counts)))
        ways = draw(st.sets(st.sampled_from(store.AUTHENTICATION), min_size=1))
        devices.append(
            device(
                name,
                key,
                *sorted(ways),
                values=[draw(values) for _ in range(counts[key])],
                until=draw(st.one_of(st.none(), st.integers(1, 1 << 40))),
                revoked=draw(st.one_of(st.none(), st.sampled_from(sorted(store.REASONS)))),
            )
        )
        if draw(st.booleans()):
            given["passwords"][name] = draw(st.sampled_from([PASSWORD, OTHER_PASSWORD]))
            given["psk"][name] = draw(st.sampled_from([PSK, PSK[::-1]]))
    serials = st.dictionaries(st.sampled_from(["01", "0a1b", "ff00ff"]), st.sampled_from(sorted(store.REASONS)))
    given["revoked_serials"] = draw(serials)
    return compiled(devices, profiles, zones), given


def read_lines(lines: Iterable[str]) -> Iterator[Json]:
    """Take lines for what they are."""
    return map(json.loads, lines)
