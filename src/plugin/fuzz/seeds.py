# SPDX-License-Identifier: Apache-2.0
"""Writes the seeds of the fuzz targets into fuzz/seeds: sound inputs of each kind, made by bednet-store's own code.

Run it as ``python src/plugin/fuzz/seeds.py`` when the layout of records changes. Seeds that were found by fuzzing lie
beside them, under names of their own.
"""

from __future__ import annotations

import base64
import datetime as dt
import ipaddress
import json
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bednet import store

SEEDS = Path(__file__).parent / "seeds"


def write(target: str, name: str, data: bytes) -> None:
    """Write one seed."""
    (SEEDS / target).mkdir(parents=True, exist_ok=True)
    (SEEDS / target / name).write_bytes(data)


def devices() -> None:
    """Write records of devices."""
    profile = bytes(range(8))
    password = store.Password(101, b"salt of 12 b", bytes(64))
    write("device", "certificate", store.Device(profile, certificate=True).encode())
    write(
        "device",
        "values",
        store.Device(profile, ("hall-1", "1", "\u00e4"), certificate=True, until=1800000000).encode(),
    )
    write("device", "all", store.Device(profile, ("hall-1",), True, password, bytes(range(16)), 1).encode())
    write("device", "revoked", store.Device(profile, certificate=True, revoked=1).encode())


def profiles() -> None:
    """Write records of profiles."""
    zone = store.zone_key("Europe/Berlin")
    windows = (store.Window(127, 21600, 79200, zone), store.Window(1, 79200, 3600, zone))
    networks = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("2001:db8::/32"))
    rules = [
        store.Rule("role/sensor/allow/publish/0", 1, 1, (), (), b"sensors/\xff\x00/#"),
        store.Rule("role/sensor/allow/subscribe/0", 1, 2, windows, networks, b"halls/\xff\x01/+"),
        store.Rule("role/sensor/deny/subscribe/0", 2, 2, (), networks[:1], b"halls/+/\xff\x02"),
        store.Rule("role/admin/allow/publish/0", 1, 1, windows[:1], (), b"#"),
    ]
    for number in range(len(rules) + 1):
        write("profile", f"{number}-rules", store.encode_profile(rules[:number]))


def topics() -> None:
    """Write pairs of filters, and shared subscriptions."""
    pairs = ["#\na/b", "a/+/c\na/#", "+/#\n$SYS/#", "a/b\na/b", "/+\n+/a", "a/#\n#", "+\n/#", "//\n+/+/+"]
    for number, pair in enumerate(pairs):
        write("filter", f"pair-{number}", pair.encode())
    for number, text in enumerate(
        ["$share/g/a/#", "$share//a", "$share/g", "$share", "$shared/x", "a/b", "$share/+/a"]
    ):
        write("share", f"filter-{number}", text.encode())


def certificates() -> None:
    """Write certificates and their subjects, good and odd."""
    key = ec.generate_private_key(ec.SECP256R1())
    for number, names in enumerate([["temp-1"], ["temp-1", "temp-2"], [], ["a/b"]]):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
        begin = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "CA")]))
            .public_key(key.public_key())
            .serial_number(0x80 + number)
            .not_valid_before(begin)
            .not_valid_after(begin + dt.timedelta(days=1))
            .sign(key, hashes.SHA256())
        )
        write("certificate", f"certificate-{number}", certificate.public_bytes(serialization.Encoding.DER))
        write("certificate", f"name-{number}", subject.public_bytes())


def texts() -> None:
    """Write what clients may send."""
    for number, text in enumerate(
        ["sensors/temp-1/t", '"},{"\\', "\u00e4\u20ac\U0001f600", "a" * 400, "\u2028\x7f\x01"]
    ):
        write("audit", f"text-{number}", text.encode())
    write("audit", "not-utf-8", b"\xc0\xaf\xed\xa0\x80\xff\xf4\x90\x80\x80")


def others() -> None:
    """Write the small records, and addresses."""
    write("other", "meta", store.Meta(1, 2, 3).encode())
    write("other", "zone", store.encode_zone([(-62135596800, 3208), (0, 3600), (1732492800, 7200)]))
    write("other", "change", (7).to_bytes(8, "big") + b"\x01temp-1")
    for name, address in {"v4": b"10.20.1.5", "v6": b"2001:db8::1", "mapped": b"::ffff:10.20.1.5"}.items():
        write("other", name, address)


def issuers() -> None:
    """Write records of issuers and keys."""
    own = store.Issuer("https://tokens.plant.example", ("mqtts://plant.example",), flags=store.AIF_SCOPE)
    mappings = (store.RoleMapping("sensor", bytes(range(8)), ("hall", "a.desk")), store.RoleMapping("b", bytes(8)))
    other = store.Issuer(
        "https://sso.example", ("a", "b"), ("at+jwt", ""), 15, store.ROLES_MAPPED, 0, 60, "azp", "x-", "r.s", mappings
    )
    words = other._replace(flags=store.ROLES_MAPPED | store.ROLES_SPACED, roles="scope")
    for name, issuer in {"own": own, "roles": other, "words": words}.items():
        write("issuer", name, issuer.encode())
    for name, algorithm in store.ALGORITHMS.items():
        write("issuer", f"key-{name.lower()}", store.Key(algorithm, "kid", b"SubjectPublicKeyInfo").encode())
    write("issuer", "seconds", store.encode_seconds(1800000000))


def tokens() -> None:
    """Write tokens: as they come, and taken apart; for the store that fuzz/token.c makes."""
    header = {"alg": "ES256", "typ": "at+jwt", "kid": "k"}
    usual = {"iss": "a", "aud": ["m"], "iat": 1000, "exp": 1100.5, "sub": "d"}
    scope = _base64url(json.dumps([["a/#", ["pub"]], ["+/b", ["pub", "sub"]]]).encode())
    roles = {"iss": "b", "sub": "1", "a": {"r": ["s", "t"]}, "k": {"io": {"v": "hall-1"}}}
    dotted = {"iss": "b", "sub": "1", "a.r": "t  s", "k.io": {"v": "hall-1"}, "k": {"io": {"v": "hall-2"}}}
    key = {"kty": "OKP", "crv": "Ed25519", "x": _base64url(bytes(range(32)))}
    cases: dict[str, dict[str, object]] = {
        "scope": {**usual, "scope": scope, "jti": "1", "nbf": 1000},
        "roles": {**usual, **roles},
        "dotted": {**usual, **dotted},
        "certificate": {**usual, "scope": scope, "cnf": {"x5t#S256": _base64url(bytes(32))}},
        "key": {**usual, "scope": scope, "cnf": {"jwk": key}},
        "own-audience": {**usual, "aud": "own", "scope": _base64url(b"[]")},
    }
    for name, claims in cases.items():
        texts = [json.dumps(part).encode() for part in (header, claims)]
        write("token", f"parts-{name}", b"\n".join(texts))
        write("token", f"token-{name}", ".".join(map(_base64url, [*texts, bytes(64)])).encode())
    write("token", "pretty", b"\n".join([json.dumps(header).encode(), json.dumps(usual, indent=2).encode()]))
    write("token", "twice", b'{"alg":"ES256"}\n{"iss":"a","\\u0069ss":"a"}')
    write("token", "nul", b'{"alg":"ES256"}\n{"iss":"a\\u0000"}')
    many = {**usual, **dict.fromkeys(map(str, range(60)))}
    write("token", "members", b"\n".join(json.dumps(part).encode() for part in (header, many)))
    write("token", "nested", b'{"alg":"ES256"}\n{"iss":[[[[[[[[["a"]]]]]]]]]}')


def messages() -> None:
    """Write authentication data."""
    write("auth", "bearer", b"n,a=tok-1,\x01host=gateway-1\x01port=8883\x01auth=Bearer eyJ.eyJ.AAAA\x01\x01")
    write("auth", "bearer-short", b"y,,\x01auth=Bearer eyJ.eyJ.AAAA\x01\x01")
    write("auth", "ace", b"\x00\x0ceyJ.eyJ.AAAA")
    write("auth", "ace-proof", bytes(8) + bytes(range(64)))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


if __name__ == "__main__":
    devices()
    profiles()
    topics()
    certificates()
    texts()
    others()
    issuers()
    tokens()
    messages()
