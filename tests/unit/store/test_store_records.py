# SPDX-License-Identifier: Apache-2.0
"""Layout 2 of the store's records, byte for byte.

The plugin reads these bytes in C. Each golden record below is written out by hand from docs/store.md, field by field,
so that neither side can drift: whoever changes a byte here changes the layout, and must give it a new number.
"""

from __future__ import annotations

import hashlib
import ipaddress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bednet import store
from tests.unit.store import sites

if TYPE_CHECKING:
    from collections.abc import Callable

PROFILE = bytes.fromhex("0102030405060708")
ZONE = bytes.fromhex("a1a2a3a4")

DEVICES = {
    "the least": (
        store.Device(PROFILE, certificate=True),
        "01 02 00 00  0102030405060708  0000000000000000",
    ),
    "values and an end": (
        store.Device(PROFILE, ("hall-1", "ä"), certificate=True, until=0x1122334455),
        "01 02 00 02  0102030405060708  5544332211000000  06 68616c6c2d31  02 c3a4",
    ),
    "revoked": (
        store.Device(PROFILE, ("1",), certificate=True, revoked=1),
        "01 03 01 01  0102030405060708  0000000000000000  01 31",
    ),
    "revoked for no reason, without a certificate": (
        store.Device(PROFILE, revoked=0),
        "01 01 00 00  0102030405060708  0000000000000000",
    ),
    "a password": (
        store.Device(PROFILE, password=store.Password(101, sites.SALT, sites.HASH)),
        (
            "01 04 00 00  0102030405060708  0000000000000000  65000000"
            "0c 000102030405060708090a0b"
            "40 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
            "202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f"
        ),
    ),
    "a pre-shared key": (
        store.Device(PROFILE, psk=bytes.fromhex(sites.PSK)),
        "01 08 00 00  0102030405060708  0000000000000000  10 00112233445566778899aabbccddeeff",
    ),
    "a token": (
        store.Device(PROFILE, token=True),
        "01 10 00 00  0102030405060708  0000000000000000",
    ),
    "a token that is refused, as its device is": (
        store.Device(PROFILE, certificate=True, token=True, revoked=4),
        "01 13 04 00  0102030405060708  0000000000000000",
    ),
    "everything": (
        store.Device(PROFILE, ("x",), True, store.Password(1, b"s", bytes(64)), bytes(16), 1),
        f"01 0e 00 01  0102030405060708  0100000000000000  01 78  01000000 01 73 40 {'00' * 64}  10 {'00' * 16}",
    ),
}

PROFILES = {
    "no rules": ((), "01 00 0000"),
    "one rule": (
        (store.Rule("r/0", store.ALLOW, store.PUBLISH, (), (), b"a/\xff\x00/#"),),
        "01 00 0100  03 722f30  01 01 00 00  0600 612fff002f23",
    ),
    "windows, networks, two rules": (
        (
            store.Rule(
                "w",
                store.DENY,
                store.SUBSCRIBE,
                (store.Window(0b0011111, 21_600, 79_200, ZONE), store.Window(64, 79_200, 0, ZONE)),
                (ipaddress.ip_network("10.20.0.0/16"), ipaddress.ip_network("2001:db8::/32")),
                b"\xff\x01",
            ),
            store.Rule("x", store.ALLOW, store.SUBSCRIBE, (), (), b"#"),
        ),
        (
            "01 00 0200"
            "01 77  02 02 02 02"
            "1f 00 0000 60540000 60350100 a1a2a3a4"
            "40 00 0000 60350100 00000000 a1a2a3a4"
            "04 10 0a140000"
            "06 20 20010db8000000000000000000000000"
            "0200 ff01"
            "01 78  01 02 00 00  0100 23"
        ),
    ),
}

ZONES = {
    "one offset": (((-62_135_596_800, 0),), "01000000  00096e88f1ffffff 00000000"),
    "two": (
        ((-62_135_596_800, 3_208), (1_743_296_400, -3_600)),
        "02000000  00096e88f1ffffff 880c0000  9097e86700000000 f0f1ffff",
    ),
}


ISSUERS = {
    "the least": (
        store.Issuer("https://i", ("a",)),
        ("01 00 0100  1e000000 80510100  0900 68747470733a2f2f6901 0100 61  01 06 61742b6a7774  03 737562  00  00  00"),
    ),
    "the site's own service": (
        store.Issuer("i", ("a", "bc"), ("at+jwt", ""), 3, store.AIF_SCOPE | store.OWN_SERVICE, 0, 900),
        "01 05 0300  00000000 84030000  0100 69  02 0100 61 0200 6263  02 06 61742b6a7774 00  03 737562  00  00  00",
    ),
    "roles": (
        store.Issuer(
            "i",
            ("a",),
            ("jwt",),
            12,
            store.ROLES_MAPPED,
            300,
            1,
            "azp",
            "kc-",
            "r.s",
            (store.RoleMapping("v", PROFILE), store.RoleMapping("w", PROFILE, ("l", "m.n"))),
        ),
        (
            "01 02 0c00  2c010000 01000000  0100 69  01 0100 61  01 03 6a7774  03 617a70  03 6b632d  03 722e73"
            "02  0100 76 0102030405060708 00  0100 77 0102030405060708 02 01 6c 03 6d2e6e"
        ),
    ),
    "roles in one text": (
        store.Issuer(
            "i",
            ("a",),
            ("",),
            4,
            store.ROLES_MAPPED | store.ROLES_SPACED,
            roles="scp",
            mappings=(store.RoleMapping("v", PROFILE),),
        ),
        (
            "01 0a 0400  1e000000 80510100  0100 69  01 0100 61  01 00  03 737562  00  03 736370"
            "01  0100 76 0102030405060708 00"
        ),
    ),
}

KEYS = {
    "ES256": (store.Key(1, "k1", b"spki"), "01 01  02 6b31  0400 73706b69"),
    "no name": (store.Key(8, "", b"s"), "01 08  00  0100 73"),
}


@pytest.mark.parametrize("name", ISSUERS)
def test_an_issuer_has_these_bytes(name: str) -> None:
    issuer, record = ISSUERS[name]
    assert issuer.encode().hex() == bytes.fromhex(record).hex()
    assert store.Issuer.decode(bytes.fromhex(record)) == issuer


@pytest.mark.parametrize("name", KEYS)
def test_a_key_has_these_bytes(name: str) -> None:
    key, record = KEYS[name]
    assert key.encode().hex() == bytes.fromhex(record).hex()
    assert store.Key.decode(bytes.fromhex(record)) == key


def test_a_time_has_these_bytes() -> None:
    assert store.encode_seconds(0x1122334455) == bytes.fromhex("5544332211000000")
    assert store.decode_seconds(bytes.fromhex("5544332211000000")) == 0x1122334455


def test_keys_of_what_belongs_to_tokens_are_the_beginnings_of_digests() -> None:
    iss, other = hashlib.sha256(b"https://i").digest(), hashlib.sha256(b"").digest()
    assert store.issuer_key("https://i") == iss[:8]
    assert store.key_key("https://i", "k") == iss[:8] + hashlib.sha256(b"k").digest()[:8]
    assert store.key_key("https://i", "") == iss[:8] + other[:8]
    assert store.token_key("https://i", "j") == hashlib.sha256(b"https://i\0j").digest()[:16]


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_has_these_bytes(name: str) -> None:
    device, record = DEVICES[name]
    assert device.encode().hex() == bytes.fromhex(record).hex()
    assert store.Device.decode(bytes.fromhex(record)) == device


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_has_these_bytes(name: str) -> None:
    rules, record = PROFILES[name]
    assert store.encode_profile(rules).hex() == bytes.fromhex(record).hex()
    assert store.decode_profile(bytes.fromhex(record)) == rules


@pytest.mark.parametrize("name", ZONES)
def test_a_zone_has_these_bytes(name: str) -> None:
    changes, record = ZONES[name]
    assert store.encode_zone(changes).hex() == bytes.fromhex(record).hex()
    assert store.decode_zone(bytes.fromhex(record)) == changes


def test_the_meta_record_has_these_bytes() -> None:
    record = bytes.fromhex("4245444e45545354 02000000 00000000 0300000000000000 0200000000000000 0100000000000000")
    assert store.Meta(3, 2, 1).encode() == record
    assert store.Meta.decode(record) == store.Meta(3, 2, 1)
    older = record[:8] + b"\1" + record[9:]
    assert store.Meta.decode(older) == store.Meta(3, 2, 1, layout=1)
    with pytest.raises(store.Damaged, match="layout 3, and this tool knows layout 2"):
        store.Meta.decode(record[:8] + b"\3" + record[9:])


def test_keys_are_the_beginnings_of_digests_as_they_stand() -> None:
    assert store.profile_key("sensor") == hashlib.sha256(b"sensor").digest()[:8]
    assert store.zone_key("Europe/Berlin") == bytes.fromhex("99f0b5e4")


@pytest.mark.parametrize(("serial", "key"), [("0A1b", "0a1b"), ("0000ff", "ff"), ("100", "0100"), ("1", "01")])
def test_a_serial_number_has_no_leading_zeros(serial: str, key: str) -> None:
    assert store.serial_key(serial).hex() == key


@pytest.mark.parametrize("serial", ["", "0", "00", "xyz", "-1", " 1", "1" * 41, "0x1"])
def test_what_no_certificate_can_have_is_no_serial_number(serial: str) -> None:
    with pytest.raises(ValueError, match="not a certificate's serial number"):
        store.serial_key(serial)


passwords = st.builds(
    store.Password, st.integers(1, 10_000), st.binary(min_size=1, max_size=255), st.binary(min_size=64, max_size=64)
)


@settings(deadline=None)
@given(
    st.binary(min_size=8, max_size=8),
    st.lists(sites.values, max_size=4).map(tuple),
    st.booleans(),
    st.none() | passwords,
    st.none() | st.binary(min_size=16, max_size=64),
    st.integers(0, 1 << 62),
    st.none() | st.sampled_from(sorted(store.REASON_NAMES)),
    st.booleans(),
)
def test_a_device_comes_back_as_it_went(
    profile: bytes,
    values: tuple[str, ...],
    certificate: bool,
    password: store.Password | None,
    psk: bytes | None,
    until: int,
    revoked: int | None,
    token: bool,
) -> None:
    if revoked is not None:
        password = psk = None
    device = store.Device(profile, values, certificate, password, psk, until, revoked, token)
    assert store.Device.decode(device.encode()) == device


def test_a_revoked_device_leaves_no_secret_in_its_record() -> None:
    with_secrets = store.Device(PROFILE, password=store.Password(101, sites.SALT, sites.HASH), psk=b"k" * 16, revoked=1)
    assert with_secrets.encode() == store.Device(PROFILE, revoked=1).encode()


def _records() -> list[tuple[str, Callable[[bytes], object], bytes]]:
    return [
        *((name, store.Device.decode, bytes.fromhex(record)) for name, (_, record) in DEVICES.items()),
        *((name, store.decode_profile, bytes.fromhex(record)) for name, (_, record) in PROFILES.items()),
        *((name, store.decode_zone, bytes.fromhex(record)) for name, (_, record) in ZONES.items()),
        *((name, store.Issuer.decode, bytes.fromhex(record)) for name, (_, record) in ISSUERS.items()),
        *((name, store.Key.decode, bytes.fromhex(record)) for name, (_, record) in KEYS.items()),
        ("a time", store.decode_seconds, bytes(8)),
    ]


@pytest.mark.parametrize(("decode", "record"), [entry[1:] for entry in _records()], ids=[e[0] for e in _records()])
def test_a_record_is_damaged_wherever_it_is_cut_off_and_when_it_is_longer(
    decode: Callable[[bytes], object], record: bytes
) -> None:
    for length in range(len(record)):
        with pytest.raises(store.Damaged):
            decode(record[:length])
    with pytest.raises(store.Damaged, match="1 bytes too many"):
        decode(record + b"\0")


@settings(deadline=None)
@given(st.sampled_from(_records()), st.data())
def test_a_record_with_other_bytes_is_damaged_or_says_something_else(
    entry: tuple[str, Callable[[bytes], object], bytes], data: st.DataObject
) -> None:
    _, decode, record = entry
    at = data.draw(st.integers(0, len(record) - 1))
    changed = bytearray(record)
    changed[at] ^= data.draw(st.integers(1, 255))
    try:
        found = decode(bytes(changed))
    except store.Damaged:
        return
    assert found != decode(record)


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_whatever_a_record_is_it_is_read_or_called_damaged(record: bytes) -> None:
    try:
        found = store.Device.decode(record)
    except store.Damaged:
        return
    assert found.encode() == record


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ("02 02 00 00  0102030405060708  0000000000000000", "version is 2"),
        ("01 22 00 00  0102030405060708  0000000000000000", "flags are 0x22"),
        ("01 05 00 00  0102030405060708  0000000000000000", "flags are 0x05"),  # revoked, and with a password
        ("01 02 01 00  0102030405060708  0000000000000000", "reason is 1"),  # a reason, and not revoked
        ("01 01 07 00  0102030405060708  0000000000000000", "reason is 7"),
        ("01 02 00 00  0102030405060708  ffffffffffffffff", "end is -1"),
        ("01 02 00 01  0102030405060708  0000000000000000 01 ff", "not UTF-8"),
        ("01 08 00 00  0102030405060708  0000000000000000 01 00", "pre-shared key has 1 bytes"),
        (f"01 04 00 00  0102030405060708  0000000000000000 00000000 01 00 40{'00' * 64}", "password cannot be checked"),
    ],
)
def test_a_device_that_cannot_be_is_damaged(record: str, why: str) -> None:
    with pytest.raises(store.Damaged, match=why):
        store.Device.decode(bytes.fromhex(record))


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ("02 00 0000", "version is 2"),
        ("01 00 0100  01 78  03 01 00 00  0100 23", "effect 3"),
        ("01 00 0100  01 78  01 03 00 00  0100 23", "on the access 3"),
        ("01 00 0100  01 78  01 01 01 00  80 00 0000 00000000 00000000 a1a2a3a4 0100 23", "window that cannot be"),
        ("01 00 0100  01 78  01 01 01 00  01 00 0000 80510100 00000000 a1a2a3a4 0100 23", "window that cannot be"),
        ("01 00 0100  01 78  01 01 00 01  05 00 00000000 0100 23", "family 5"),
        ("01 00 0100  01 78  01 01 00 01  04 21 00000000 0100 23", "network that cannot be"),
        ("01 00 0100  01 78  01 01 00 01  04 08 0a010000 0100 23", "network that cannot be"),  # host bits
        ("01 00 0100  01 78  01 01 00 00  0000", "topic that cannot be"),
        ("01 00 0100  01 78  01 01 00 00  0100 ff", "topic that cannot be"),  # a placeholder without its number
        ("01 00 0100  01 78  01 01 00 00  0100 c3", "topic that cannot be"),
    ],
)
def test_a_profile_that_cannot_be_is_damaged(record: str, why: str) -> None:
    with pytest.raises(store.Damaged, match=why):
        store.decode_profile(bytes.fromhex(record))


def test_a_placeholder_255_is_told_from_the_byte_that_announces_it() -> None:
    assert store.topic_parts(b"a/\xff\xff/b") == ["a/", 255, "/b"]
