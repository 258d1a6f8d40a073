# SPDX-License-Identifier: Apache-2.0
"""The tool of a gateway: keeps the store that the broker's plugin decides from.

``bednet-store [--store DIR] COMMAND`` writes one JSON object on stdout. Commands:

- ``apply COMPILED``: the store becomes what the compiled site says. Secrets come as JSON on stdin.
- ``put``: writes one device, whose profile and line are on stdin as a compiled site has them; it keeps its secrets.
- ``revoke ID --reason R``: the device is refused from now on, and its secrets are forgotten.
- ``reinstate ID``: the way back; its secrets come with the next ``apply``. Not after a key compromise.
- ``crl``: refuses the certificates that the CA's list names, which comes verified, as JSON on stdin.
- ``keys ISS``: the public keys that an issuer of tokens signs with, as a JWKS on stdin.
- ``kids ISS``: the names of those keys that it has.
- ``revoke-token ISS JTI EXP DEVICE``, ``cutoff DEVICE [SECONDS]``: refuse one token, or all that a device got so far.
- ``revocations ISS``: the same from the list of the site's own token service, on stdin.
- ``status``: read-only health of the store; exit code 1 when somebody has to act.
- ``dump [ID]``: what the store says, as JSON lines, without secrets.

This file runs alone: Python 3.11 and python3-lmdb 1.4 or later, nothing else. docs/store.md has the layout of records.

Every command that writes does so in one transaction of LMDB: a reader, or a run after a power cut, sees all of it or
nothing. Only differences are written, and each changed device, profile and certificate is named in a change log.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime as dt
import errno
import fcntl
import grp
import hashlib
import io
import ipaddress
import itertools
import json
import os
import re
import struct
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

try:
    import lmdb
except ImportError:  # who only reads a compiled site does without it
    lmdb = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

Json: TypeAlias = dict[str, Any]
_T = TypeVar("_T")
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

STORE = Path("/var/lib/bednet/store")
GROUP = "mosquitto"
FOLDER_MODE, DATA_MODE, LOCK_MODE = 0o750, 0o640, 0o660
MAGIC, LAYOUT = b"BEDNETST", 2
# Address space, not disk or memory. A million devices need about an eighth of it, and a run that rewrites all of them
# twice that; when it is not enough the map is doubled, up to the larger number.
MAP_SIZE, MOST_MAP = 1 << 30, 1 << 36
# How long to wait for another run. An apply of a million devices takes about 20 s.
WAIT_SECONDS = 120.0

DATABASES_1 = (b"meta", b"devices", b"profiles", b"zones", b"revoked", b"changes")
"""Those of layout 1, which ``apply`` brings to this one; what is in them did not change."""
DATABASES = (*DATABASES_1, b"issuers", b"keys", b"tokens", b"cutoffs", b"marks")
META, CRL = b"meta", b"crl"
# CRLReason, RFC 5280, 5.3.1; those that a site can state.
REASONS = {
    "unspecified": 0,
    "keyCompromise": 1,
    "affiliationChanged": 3,
    "superseded": 4,
    "cessationOfOperation": 5,
    "privilegeWithdrawn": 9,
}
REASON_NAMES = {number: name for name, number in REASONS.items()}
COMPROMISED = REASONS["keyCompromise"]
REVOKED, CERTIFICATE, PASSWORD, PSK, TOKEN = 1, 2, 4, 8, 16
ALLOW, DENY = 1, 2
EFFECTS = {"allow": ALLOW, "deny": DENY}
PUBLISH, SUBSCRIBE = 1, 2
ACCESSES = {"publish": PUBLISH, "subscribe": SUBSCRIBE}
DEVICE_CHANGED, SERIAL_CHANGED, PROFILE_CHANGED, EVERYTHING_CHANGED = 1, 2, 3, 4
ISSUER_CHANGED, TOKEN_CHANGED, CUTOFF_CHANGED = 5, 6, 7
SILENT = 0
"""No kind of change: what no reader has to be told of."""
CHANGES_KEPT, CHANGES_AT_ONCE = 65_536, 4_096
AUTHENTICATION = ("certificate", "password", "psk", "token")
TOKEN_AUTHENTICATION = ("tls_client_auth", "private_key_jwt", "client_secret_basic")
ALGORITHMS = {"ES256": 1, "EdDSA": 2, "RS256": 4, "PS256": 8}
AIF_SCOPE, ROLES_MAPPED, OWN_SERVICE, ROLES_SPACED = 1, 2, 4, 8
SCOPES = {"policy": 0, "aif": AIF_SCOPE}
MOST_LEEWAY, MOST_KEYS = 300, 64
MOST_JWKS, MOST_REVOCATIONS = 1 << 20, 1 << 24  # bytes
MOST_PUT, MOST_CRL = 1 << 23, 1 << 26  # a profile and a device; a list of 16 MiB
# A modulus of more bits makes checking a signature slow, and the broker has one thread.
RSA_BITS = range(2048, 8193)
DEVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
RESERVED, PROBE = "bednet-", "bednet-probe"
# A value stands for a placeholder within a topic filter. These would reach into other topics.
UNSAFE_VALUE = re.compile(r"[+#/\x00-\x1f\x7f]|^\$|^\s|\s$")
PLACEHOLDER = 0xFF  # occurs nowhere in UTF-8
# The broker has one thread, and checking a password stops it: 10,000 iterations are some 9 ms.
MOST_ITERATIONS = 10_000
PASSWORD_FORM = re.compile(r"\$7\$([1-9][0-9]{0,8})\$([A-Za-z0-9+/=]+)\$([A-Za-z0-9+/=]+)")
HASH_BYTES = 64  # SHA-512
PSK_BYTES = range(16, 65)
DAY_SECONDS, EVERY_DAY = 86_400, 0b1111111
ADDRESS_BYTES = {4: 4, 6: 16}
# What the length of a text, or a number of things, can be in a record.
TEXT8, TEXT16 = 0xFF, 0xFFFF
# Names of things are told, but no more than this many of each.
TOLD = 100
# A revoked token is remembered until it has ended for every broker, whose clocks may differ and which give a leeway.
TOKEN_KEPT_SECONDS = 300
# Clocks differ by minutes. A token service that was taken over could else shut a device out for good.
_LATEST_CUTOFF = TOKEN_KEPT_SECONDS  # seconds from now
_MOST_JTI, _MOST_SECONDS = 1024, 1 << 62
_MOST_CRL_NUMBER = (1 << 64) - 1

_U16, _U32, _U64, _BIG_U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q"), struct.Struct(">Q")
_META = struct.Struct("<8sIIQQQ")
_FLAGS_AT = 1  # then the reason
_DEVICE = struct.Struct("<BBBB8sq")
_PROFILE = struct.Struct("<BBH")
_RULE = struct.Struct("<BBBB")
_WINDOW = struct.Struct("<BBHII4s")
_TRANSITION = struct.Struct("<qi")
_ISSUER = struct.Struct("<BBHII")
_KEY = struct.Struct("<BB")
_SECONDS = struct.Struct("<q")
_MARK = struct.Struct("<qB")
# LMDB's own meta page on this machine (lmdb 0.9, mdb.c, MDB_meta): behind a page header, one in each of the first two
# pages; the one with the higher transaction number is the current one.
_LMDB_HEADER = struct.calcsize("@N") + 8
_LMDB_META = struct.Struct("@IIPN" + "IHHNNNNN" * 2 + "NN")
_PAGE_SIZES = range(256, (1 << 16) + 1)
_LMDB_MAGIC, _LMDB_VERSION = 0xBEEFC0DE, 1

_FOREIGN = "it is an LMDB environment, but not a store of bednet"
_BUSY = "another bednet-store is at work, for {:g} seconds so far. Cure: look what it does, or try again later"

# LMDB tells no more than a number; of a page that was written in part it says that it is an I/O error.
_NO_ROOM = {os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)}


class Refused(Exception):  # noqa: N818  (a refusal is an answer, not a fault of the program)
    """Nothing was changed; the message is one sentence with its cure."""


class Damaged(Exception):  # noqa: N818  (likewise: it says what is so)
    """A record is not what layout 2 says; the message tells what is wrong with it."""


# ---------------------------------------------------------------------------------------------------------------------
# Records: layout 2
# ---------------------------------------------------------------------------------------------------------------------


def profile_key(name: str) -> bytes:
    """Return what stands for a profile in the store."""
    return hashlib.sha256(name.encode()).digest()[:8]


def zone_key(name: str) -> bytes:
    """Return what stands for a time zone in the store."""
    return hashlib.sha256(name.encode()).digest()[:4]


def serial_key(serial: str) -> bytes:
    """Return the key of a certificate's serial number, given in hexadecimal digits.

    :raises ValueError: when it is none, or none that a certificate can have (RFC 5280, 4.1.2.2).
    """
    if not re.fullmatch(r"[0-9A-Fa-f]{1,40}", serial) or not (number := int(serial, 16)):
        raise ValueError(f"{serial!r} is not a certificate's serial number in hexadecimal")
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def issuer_key(iss: str) -> bytes:
    """Return what stands for an issuer of tokens in the store."""
    return hashlib.sha256(iss.encode()).digest()[:8]


def key_key(iss: str, kid: str) -> bytes:
    """Return what stands for a key of an issuer; `kid` is empty for one without a name."""
    return issuer_key(iss) + hashlib.sha256(kid.encode()).digest()[:8]


def token_key(iss: str, jti: str) -> bytes:
    """Return what stands for a revoked token."""
    return hashlib.sha256(iss.encode() + b"\0" + jti.encode()).digest()[:16]


def _text8(value: bytes) -> bytes:
    return bytes((len(value),)) + value


def _text16(value: bytes) -> bytes:
    return _U16.pack(len(value)) + value


class _Parser:
    """Takes a record apart; whatever is missing or left over is damage."""

    def __init__(self, record: bytes) -> None:
        self._record = record
        self._at = 0

    def take(self, size: int) -> bytes:
        taken = self._record[self._at : self._at + size]
        if len(taken) != size:
            raise Damaged("it ends too early")
        self._at += size
        return taken

    def unpack(self, form: struct.Struct) -> tuple[Any, ...]:
        return form.unpack(self.take(form.size))

    def text8(self) -> bytes:
        return self.take(self.take(1)[0])

    def text16(self) -> bytes:
        return self.take(self.unpack(_U16)[0])

    def words(self, read: Callable[[_Parser], bytes]) -> tuple[str, ...]:
        return tuple(read(self).decode() for _ in range(self.take(1)[0]))

    def done(self) -> None:
        if self._at != len(self._record):
            raise Damaged(f"it has {len(self._record) - self._at} bytes too many")


class Password(NamedTuple):
    """What a password is checked against: PBKDF2 with HMAC-SHA-512 (RFC 8018, 5.2)."""

    iterations: int
    salt: bytes
    hash: bytes

    @classmethod
    def parse(cls, text: str) -> Password:
        """Read ``$7$iterations$salt$hash``, the form of a line of Mosquitto's password file.

        :raises ValueError: when it is something else, or would stop the broker for too long at each login.
        """
        match = PASSWORD_FORM.fullmatch(text)
        if not match:
            raise ValueError("is not of the form $7$iterations$salt$hash")
        try:
            salt, digest = (base64.b64decode(match[group], validate=True) for group in (2, 3))
        except ValueError:
            raise ValueError("has a salt or hash that is not base64") from None
        iterations = int(match[1])
        if iterations > MOST_ITERATIONS:
            raise ValueError(f"has {iterations} iterations, and the broker can bear {MOST_ITERATIONS}")
        if not 1 <= len(salt) <= TEXT8 or len(digest) != HASH_BYTES:
            raise ValueError(f"has no salt of 1 to {TEXT8} bytes or no hash of {HASH_BYTES} bytes")
        return cls(iterations, salt, digest)


class Device(NamedTuple):
    """A record of the database ``devices``.

    :ivar profile: see :func:`profile_key`.
    :ivar until: unix seconds; 0 for no end.
    :ivar revoked: the number of the reason; None while the device is in service. A revoked device has no secrets.
    """

    profile: bytes
    values: tuple[str, ...] = ()
    certificate: bool = False
    password: Password | None = None
    psk: bytes | None = None
    until: int = 0
    revoked: int | None = None
    token: bool = False

    def encode(self) -> bytes:
        """Return the record's bytes."""
        profile, values, certificate, password, psk, until, revoked, token = self
        flags = (CERTIFICATE if certificate else 0) | (TOKEN if token else 0)
        end = b""
        if revoked is not None:
            flags |= REVOKED
        else:
            if password is not None:
                flags |= PASSWORD
                end = _U32.pack(password.iterations) + _text8(password.salt) + _text8(password.hash)
            if psk is not None:
                flags |= PSK
                end += _text8(psk)
        start = _DEVICE.pack(1, flags, revoked or 0, len(values), profile, until)
        return b"".join((start, *[_text8(value.encode()) for value in values], end))

    @classmethod
    def decode(cls, record: bytes) -> Device:
        """Read a record.

        :raises Damaged: when it is not exactly what :meth:`encode` makes.
        """
        parser = _Parser(record)
        version, flags, reason, count, profile, until = parser.unpack(_DEVICE)
        if version != 1:
            raise Damaged(f"its version is {version}")
        if flags & ~(REVOKED | CERTIFICATE | PASSWORD | PSK | TOKEN) or (flags & REVOKED and flags & (PASSWORD | PSK)):
            raise Damaged(f"its flags are {flags:#04x}")
        if reason not in REASON_NAMES or (reason and not flags & REVOKED):
            raise Damaged(f"its reason is {reason}")
        if until < 0:
            raise Damaged(f"its end is {until}")
        try:
            values = tuple(parser.text8().decode() for _ in range(count))
        except UnicodeDecodeError:
            raise Damaged("a value is not UTF-8") from None
        password = psk = None
        if flags & PASSWORD:
            (iterations,) = parser.unpack(_U32)
            password = Password(iterations, parser.text8(), parser.text8())
            if not (1 <= iterations <= MOST_ITERATIONS and password.salt and len(password.hash) == HASH_BYTES):
                raise Damaged("its password cannot be checked")
        if flags & PSK:
            psk = parser.text8()
            if len(psk) not in PSK_BYTES:
                raise Damaged(f"its pre-shared key has {len(psk)} bytes")
        parser.done()
        revoked = reason if flags & REVOKED else None
        return cls(profile, values, bool(flags & CERTIFICATE), password, psk, until, revoked, bool(flags & TOKEN))


class Window(NamedTuple):
    """When a rule holds.

    :ivar days: bit 0 is Monday.
    :ivar start: seconds of the day in the zone's time; ``end`` likewise, on the next day when it is not after `start`.
    :ivar zone: see :func:`zone_key`.
    """

    days: int
    start: int
    end: int
    zone: bytes


class Rule(NamedTuple):
    """A rule of a profile.

    :ivar topic: text in UTF-8, in which 0xFF and a byte n stand for the device's id (0) or its n-th value.
    """

    id: str
    effect: int
    access: int
    windows: tuple[Window, ...]
    networks: tuple[Network, ...]
    topic: bytes


def encode_profile(rules: Iterable[Rule]) -> bytes:
    """Return the record of a profile."""
    rules = tuple(rules)
    parts = [_PROFILE.pack(1, 0, len(rules))]
    for rule in rules:
        parts.append(_text8(rule.id.encode()))
        parts.append(_RULE.pack(rule.effect, rule.access, len(rule.windows), len(rule.networks)))
        parts += [_WINDOW.pack(window.days, 0, 0, window.start, window.end, window.zone) for window in rule.windows]
        for network in rule.networks:
            parts.append(bytes((network.version, network.prefixlen)) + network.network_address.packed)
        parts.append(_U16.pack(len(rule.topic)) + rule.topic)
    return b"".join(parts)


def decode_profile(record: bytes) -> tuple[Rule, ...]:
    """Read the record of a profile.

    :raises Damaged: when it is not exactly what :func:`encode_profile` makes.
    """
    parser = _Parser(record)
    version, zero, count = parser.unpack(_PROFILE)
    if version != 1 or zero:
        raise Damaged(f"its version is {version}")
    rules = tuple(_decode_rule(parser) for _ in range(count))
    parser.done()
    return rules


def _decode_rule(parser: _Parser) -> Rule:
    try:
        name = parser.text8().decode()
    except UnicodeDecodeError:
        raise Damaged("the id of a rule is not UTF-8") from None
    effect, access, window_count, network_count = parser.unpack(_RULE)
    if effect not in EFFECTS.values() or access not in ACCESSES.values():
        raise Damaged(f"rule {name!r} has the effect {effect} on the access {access}")
    windows = []
    for _ in range(window_count):
        days, zero8, zero16, start, end, zone = parser.unpack(_WINDOW)
        if zero8 or zero16 or not 1 <= days <= EVERY_DAY or start >= DAY_SECONDS or end > DAY_SECONDS:
            raise Damaged(f"rule {name!r} has a window that cannot be")
        windows.append(Window(days, start, end, zone))
    networks: list[Network] = []
    for _ in range(network_count):
        family, prefix = parser.take(2)
        if family not in ADDRESS_BYTES:
            raise Damaged(f"rule {name!r} has a network of the family {family}")
        try:
            address = parser.take(ADDRESS_BYTES[family])
            networks.append(ipaddress.ip_network((address, prefix)))
        except ValueError:
            raise Damaged(f"rule {name!r} has a network that cannot be") from None
    (size,) = parser.unpack(_U16)
    topic = parser.take(size)
    try:
        shown = topic_parts(topic)
    except UnicodeDecodeError:
        shown = []
    if not shown:
        raise Damaged(f"rule {name!r} has a topic that cannot be")
    return Rule(name, effect, access, tuple(windows), tuple(networks), topic)


def topic_parts(topic: bytes) -> list[str | int]:
    """Return a rule's topic as the compiled site writes it: texts and numbers of placeholders."""
    parts: list[str | int] = []
    # Texts and numbers take turns.
    for turn, part in enumerate(re.split(rb"\xff(.)", topic, flags=re.DOTALL)):
        if turn % 2:
            parts.append(part[0])
        elif part:
            parts.append(part.decode())
    return parts


def encode_zone(transitions: Iterable[tuple[int, int]]) -> bytes:
    """Return the record of a time zone: from which UTC second on it has which offset, in seconds."""
    packed = [_TRANSITION.pack(*transition) for transition in transitions]
    return _U32.pack(len(packed)) + b"".join(packed)


def decode_zone(record: bytes) -> tuple[tuple[int, int], ...]:
    """Read the record of a time zone.

    :raises Damaged: when it is not exactly what :func:`encode_zone` makes.
    """
    parser = _Parser(record)
    (count,) = parser.unpack(_U32)
    transitions = tuple(_TRANSITION.iter_unpack(parser.take(count * _TRANSITION.size)))
    parser.done()
    if not transitions or any(a[0] >= b[0] for a, b in itertools.pairwise(transitions)):
        raise Damaged("its changes are not in order of time")
    return transitions


class RoleMapping(NamedTuple):
    """What a role of an issuer means here.

    :ivar value: of the claim.
    :ivar profile: see :func:`profile_key`.
    :ivar claims: where in the token the profile's values are; dotted paths.
    """

    value: str
    profile: bytes
    claims: tuple[str, ...] = ()


class Issuer(NamedTuple):
    """A record of the database ``issuers``.

    :ivar iss: exactly as tokens have it.
    :ivar audience: any of them must be in a token.
    :ivar typ: of the header, in lower case and without ``application/``; empty text for a header without.
    :ivar algorithms: the sum of those of ``ALGORITHMS``.
    :ivar flags: the sum of ``AIF_SCOPE``, ``ROLES_MAPPED``, ``OWN_SERVICE``, ``ROLES_SPACED``.
    :ivar leeway: seconds; so is ``longest``.
    :ivar claim: where the device's id is, without `prefix`.
    :ivar roles: where the roles are; empty when they do not count.
    """

    iss: str
    audience: tuple[str, ...]
    typ: tuple[str, ...] = ("at+jwt",)
    algorithms: int = ALGORITHMS["ES256"]
    flags: int = 0
    leeway: int = 30
    longest: int = DAY_SECONDS
    claim: str = "sub"
    prefix: str = ""
    roles: str = ""
    mappings: tuple[RoleMapping, ...] = ()

    def encode(self) -> bytes:
        """Return the record's bytes."""
        parts = [
            _ISSUER.pack(1, self.flags, self.algorithms, self.leeway, self.longest),
            _text16(self.iss.encode()),
            bytes((len(self.audience),)),
            *(_text16(audience.encode()) for audience in self.audience),
            bytes((len(self.typ),)),
            *(_text8(typ.encode()) for typ in self.typ),
            *(_text8(text.encode()) for text in (self.claim, self.prefix, self.roles)),
            bytes((len(self.mappings),)),
        ]
        for mapping in self.mappings:
            parts += [_text16(mapping.value.encode()), mapping.profile, bytes((len(mapping.claims),))]
            parts += [_text8(claim.encode()) for claim in mapping.claims]
        return b"".join(parts)

    @classmethod
    def decode(cls, record: bytes) -> Issuer:
        """Read a record.

        :raises Damaged: when it is not what :meth:`encode` makes.
        """
        parser = _Parser(record)
        version, flags, algorithms, leeway, longest = parser.unpack(_ISSUER)
        if version != 1:
            raise Damaged(f"its version is {version}")
        known = AIF_SCOPE | ROLES_MAPPED | OWN_SERVICE | ROLES_SPACED
        if flags & ~known or (flags & ROLES_SPACED and not flags & ROLES_MAPPED):
            raise Damaged(f"its flags are {flags:#04x}")
        if not algorithms or algorithms & ~sum(ALGORITHMS.values()):
            raise Damaged(f"its algorithms are {algorithms:#06x}")
        if leeway > MOST_LEEWAY or not longest:
            raise Damaged("its times cannot be")
        try:
            iss = parser.text16().decode()
            audience, typ = parser.words(_Parser.text16), parser.words(_Parser.text8)
            claim, prefix, roles = (parser.text8().decode() for _ in range(3))
            mappings = tuple(
                RoleMapping(parser.text16().decode(), parser.take(8), parser.words(_Parser.text8))
                for _ in range(parser.take(1)[0])
            )
        except UnicodeDecodeError:
            raise Damaged("a text in it is not UTF-8") from None
        parser.done()
        if not (iss and audience and typ and claim) or bool(roles) is not bool(flags & ROLES_MAPPED):
            raise Damaged("something in it is empty")
        return cls(iss, audience, typ, algorithms, flags, leeway, longest, claim, prefix, roles, mappings)


class Key(NamedTuple):
    """A record of the database ``keys``: a public key that tokens are signed with.

    :ivar algorithm: one of those of ``ALGORITHMS``.
    :ivar kid: its name; empty when it has none.
    :ivar spki: SubjectPublicKeyInfo (RFC 5280, 4.1.2.7) in DER.
    """

    algorithm: int
    kid: str
    spki: bytes

    def encode(self) -> bytes:
        """Return the record's bytes."""
        return _KEY.pack(1, self.algorithm) + _text8(self.kid.encode()) + _text16(self.spki)

    @classmethod
    def decode(cls, record: bytes) -> Key:
        """Read a record.

        :raises Damaged: when it is not what :meth:`encode` makes.
        """
        parser = _Parser(record)
        version, algorithm = parser.unpack(_KEY)
        if version != 1:
            raise Damaged(f"its version is {version}")
        if algorithm not in ALGORITHMS.values():
            raise Damaged(f"its algorithm is {algorithm}")
        try:
            kid = parser.text8().decode()
        except UnicodeDecodeError:
            raise Damaged("its name is not UTF-8") from None
        spki = parser.text16()
        parser.done()
        if not spki:
            raise Damaged("there is no key in it")
        return cls(algorithm, kid, spki)


def encode_seconds(seconds: int) -> bytes:
    """Return a record of ``tokens`` (when it ends) or ``cutoffs`` (until when tokens are refused), in unix seconds."""
    return _SECONDS.pack(seconds)


def decode_seconds(record: bytes) -> int:
    """Read such a record.

    :raises Damaged: when it is none.
    """
    parser = _Parser(record)
    seconds: int = parser.unpack(_SECONDS)[0]
    parser.done()
    return seconds


class Mark(NamedTuple):
    """A record of the database ``marks``: what the store remembers of a device beside its record.

    :ivar reinstated: the latest of the site's marks of it, in unix seconds; 0 for none.
    :ivar gone: the number of the reason for which it was revoked when the site no longer listed it; None otherwise.
    """

    reinstated: int = 0
    gone: int | None = None

    def encode(self) -> bytes | None:
        """Return the record's bytes; None when there is nothing to remember."""
        if self == Mark():
            return None
        return _MARK.pack(self.reinstated, 0 if self.gone is None else self.gone + 1)

    @classmethod
    def decode(cls, record: bytes | None) -> Mark:
        """Read a record.

        :raises Damaged: when it is not what :meth:`encode` makes.
        """
        if record is None:
            return cls()
        parser = _Parser(record)
        reinstated, gone = parser.unpack(_MARK)
        parser.done()
        if reinstated < 0 or (gone and gone - 1 not in REASON_NAMES) or not (reinstated or gone):
            raise Damaged("it is no mark")
        return cls(reinstated, gone - 1 if gone else None)


# --- Public keys as issuers publish them: JWK (RFC 7517), told apart by RFC 7518, 6 and RFC 8037, 2

_P256 = 2**256 - 2**224 + 2**192 + 2**96 - 1
_P256_B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
# AlgorithmIdentifier and the beginning of the BIT STRING around it: RFC 5480, 2.1.1.1; RFC 8410, 4; RFC 8017, A.1.
_P256_SPKI = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
_ED25519_SPKI = bytes.fromhex("302a300506032b6570032100")
_RSA_ALGORITHM = bytes.fromhex("300d06092a864886f70d0101010500")
_PRIVATE = ("d", "p", "q", "dp", "dq", "qi", "oth", "k")
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*")
_MOST_EXPONENT = 1 << 32


class Unusable(Exception):  # noqa: N818  (likewise)
    """No token can be checked with this key; the message says why."""


def _number(jwk: Json, name: str, size: int | None = None) -> bytes:
    text = jwk.get(name)
    if not isinstance(text, str) or not text or not _BASE64URL.fullmatch(text) or len(text) % 4 == 1:
        raise Unusable(f"its {name!r} is not base64url")
    value = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if size is not None and len(value) != size:
        raise Unusable(f"its {name!r} has {len(value)} bytes, not {size}")
    return value


def _der(tag: int, content: bytes) -> bytes:
    """Return a DER value (X.690, 8.1)."""
    size = len(content)
    length = bytes((size,)) if size < 128 else size.to_bytes((size.bit_length() + 7) // 8, "big")  # noqa: PLR2004
    return bytes((tag,)) + (length if size < 128 else bytes((0x80 | len(length),)) + length) + content  # noqa: PLR2004


def _der_whole(number: int) -> bytes:
    return _der(2, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _rsa(jwk: Json) -> bytes:
    modulus, exponent = (int.from_bytes(_number(jwk, name), "big") for name in ("n", "e"))
    if modulus.bit_length() not in RSA_BITS:
        sizes = f"{RSA_BITS.start} to {RSA_BITS.stop - 1}"
        raise Unusable(f"its modulus has {modulus.bit_length()} bits, and {sizes} are good")
    if not modulus % 2 or not exponent % 2 or not 3 <= exponent <= _MOST_EXPONENT:  # noqa: PLR2004
        raise Unusable("its modulus or exponent cannot be")
    body = _der(0x30, _der_whole(modulus) + _der_whole(exponent))
    return _der(0x30, _RSA_ALGORITHM + _der(3, b"\0" + body))


def key_of(jwk: object, allowed: int) -> Key:
    """Make a key of one that an issuer publishes.

    :param allowed: the sum of the algorithms that its tokens may have; an RSA key without ``alg`` is for RS256 when
        that is among them.
    :raises Unusable: when it is for something else, or too weak, or no public key at all.
    """
    if not isinstance(jwk, dict):
        raise Unusable("it is not a JSON object")
    if is_secret(jwk):
        raise Unusable("it is a private or secret key, which an issuer never gives away")
    kid = jwk.get("kid", "")
    if not isinstance(kid, str) or not _encodable(kid) or len(kid.encode()) > TEXT8:
        raise Unusable(f"its 'kid' is not text of at most {TEXT8} bytes")
    operations = jwk.get("key_ops", ["verify"])
    if jwk.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        raise Unusable("it is not for signatures")
    kinds = {("EC", "P-256"): "ES256", ("OKP", "Ed25519"): "EdDSA"}
    named = jwk.get("alg")
    if jwk.get("kty") == "RSA":
        usual = "RS256" if allowed & ALGORITHMS["RS256"] or not allowed & ALGORITHMS["PS256"] else "PS256"
        algorithm, spki = named if named in ("RS256", "PS256") else usual, _rsa(jwk)
    else:
        try:
            algorithm = kinds[jwk.get("kty"), jwk.get("crv")]  # type: ignore[index]
        except (KeyError, TypeError):
            raise Unusable(f"its kind is {jwk.get('kty')!r} {jwk.get('crv')!r}, which is none of ours") from None
        if algorithm == "ES256":
            x, y = _number(jwk, "x", 32), _number(jwk, "y", 32)
            left, right = (int.from_bytes(part, "big") for part in (x, y))
            if max(left, right) >= _P256 or (right * right - left**3 + 3 * left - _P256_B) % _P256:
                raise Unusable("it is no point of P-256")
            spki = _P256_SPKI + x + y
        else:
            spki = _ED25519_SPKI + _number(jwk, "x", 32)
    if named not in (None, algorithm, *(["Ed25519"] if algorithm == "EdDSA" else [])):
        raise Unusable(f"its algorithm is {named!r}, not {algorithm}")
    if not ALGORITHMS[algorithm] & allowed:
        raise Unusable(f"it is for {algorithm}, which the issuer is not allowed")
    return Key(ALGORITHMS[algorithm], kid, spki)


def is_secret(jwk: Json) -> bool:
    """Say whether it has more than an issuer gives away."""
    return any(name in jwk for name in _PRIVATE)


def is_usable(jwk: object, allowed: int) -> bool:
    """Say whether :func:`key_of` would make a key of it."""
    try:
        key_of(jwk, allowed)
    except Unusable:
        return False
    return True


def keys_of(jwks: Iterable[object], allowed: int) -> tuple[dict[str, Key], list[str]]:
    """Make keys of those that an issuer publishes.

    :returns: the usable ones by ``kid``, and why the others are not.
    :raises ValueError: when none is usable, two have one name, or there are too many.
    """
    keys: dict[str, Key] = {}
    unusable = []
    for number, jwk in enumerate(jwks, 1):
        try:
            key = key_of(jwk, allowed)
        except Unusable as exc:
            unusable.append(f"key {number}: {exc}")
            continue
        if keys.setdefault(key.kid, key) is not key:
            raise ValueError(f"two keys have the 'kid' {key.kid!r}")
    if len(keys) > MOST_KEYS:
        raise ValueError(f"there are {len(keys)} keys, and {MOST_KEYS} are the most")
    if not keys:
        raise ValueError(f"no key is usable{': ' if unusable else ''}{'; '.join(unusable[:5])}")
    return keys, unusable


class Meta(NamedTuple):
    """The record ``meta`` of the database ``meta``.

    :ivar layout: of the store that it is in.
    """

    last_change: int = 0
    devices: int = 0
    profiles: int = 0
    layout: int = LAYOUT

    def encode(self) -> bytes:
        """Return the record's bytes."""
        return _META.pack(MAGIC, self.layout, 0, *self[:3])

    @classmethod
    def decode(cls, record: bytes | None) -> Meta:
        """Read the record.

        :raises Damaged: when it is of a layout that this tool does not know, or none of ours.
        """
        if record is None or record[:8] != MAGIC or len(record) != _META.size:
            raise Damaged(_FOREIGN)
        (layout,) = _U32.unpack_from(record, 8)
        if layout not in (1, LAYOUT):
            raise Damaged(f"it has layout {layout}, and this tool knows layout {LAYOUT}")
        _, _, zero, *counts = _META.unpack(record)
        if zero:
            raise Damaged("its record 'meta' is damaged")
        last_change, devices, profiles = counts
        return cls(last_change, devices, profiles, layout)


# ---------------------------------------------------------------------------------------------------------------------
# What comes in: the compiled site and the secrets
# ---------------------------------------------------------------------------------------------------------------------

_HEADER_KEYS = {"bednet-compiled", "zones", "profiles", "issuers", "devices"}
_ZONE_KEYS = {"zone", "transitions"}
_PROFILE_KEYS = {"profile", "names", "rules"}
_RULE_KEYS = {"id", "effect", "access", "topic", "during", "networks"}
_WINDOW_KEYS = {"days", "from", "to", "zone"}
_ISSUER_KEYS = {
    "issuer",
    "name",
    "service",
    "audience",
    "algorithms",
    "leeway",
    "longest",
    "typ",
    "scope",
    "claim",
    "prefix",
    "roles",
    "keys",
    "jwks_url",
}
_ROLES_KEYS, _ROLE_KEYS = {"claim", "map"}, {"value", "profile", "claims"}
_SEPARATOR = "separator"
_DEVICE_KEYS = {"device", "profile", "values", "authentication", "token", "until", "revoked"}
_SECRETS_KEYS = {"passwords", "psk", "revoked_serials"}
_REINSTATED = "reinstated"


COMPILED = 2
"""The format of the compiled site."""


class _Unsound(Exception):  # noqa: N818  (becomes a Refused with its line)
    """What is wrong with a line of the compiled site."""


def _object(data: object, keys: set[str], what: str) -> Json:
    if not isinstance(data, dict) or data.keys() != keys:
        raise _Unsound(f"{what} must be an object with {', '.join(sorted(keys))}")
    return data


def _whole(data: object, low: int, high: int, what: str) -> int:
    if not isinstance(data, int) or isinstance(data, bool) or not low <= data <= high:
        raise _Unsound(f"{what} must be a whole number from {low} to {high}")
    return data


def _text(data: object, what: str, most: int = TEXT8) -> str:
    if not isinstance(data, str) or not data or len(data.encode(errors="replace")) > most or not _encodable(data):
        raise _Unsound(f"{what} must be text of 1 to {most} bytes")
    return data


def _encodable(text: str) -> bool:
    """Say whether it is Unicode without lone surrogates and NUL, as MQTT wants it (MQTT 5, 1.5.4)."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _texts(data: object, what: str, most: int = TEXT8, *, least: int = 1, empty: bool = False) -> tuple[str, ...]:
    """Return a list of different texts, of which one may be empty when `empty`."""
    if not isinstance(data, list) or not least <= len(data) <= TEXT8:
        raise _Unsound(f"{what} must be a list of {least} to {TEXT8} texts")
    words = tuple(word if empty and word == "" else _text(word, what, most) for word in data)
    if least and len(set(words)) != len(words):
        raise _Unsound(f"{what} has something twice")
    return words


def _list(data: object, what: str, most: int) -> list[Any]:
    if not isinstance(data, list) or len(data) > most:
        raise _Unsound(f"{what} must be a list of at most {most}")
    return data


class Secrets:
    """What comes apart from the compiled site, for devices that are in service.

    :ivar passwords: by device id, as in Mosquitto's password file.
    :ivar psk: by device id, pre-shared keys in hexadecimal.
    :ivar serials: revoked certificates: see :func:`serial_key`, and the number of the reason.
    :ivar crl_number: of the CA's list of them, which grows (RFC 5280, 5.2.3); None when it is not known.
    """

    def __init__(self, data: object) -> None:
        """Read the object that ``apply`` gets on stdin.

        :raises Refused: when a field is missing, unknown or of the wrong kind.
        """
        cure = "Cure: give them as the role does; see docs/store.md"
        if not isinstance(data, dict) or data.keys() - {"crl_number"} != _SECRETS_KEYS:
            raise Refused(f"the secrets must be a JSON object with {', '.join(sorted(_SECRETS_KEYS))}. {cure}")
        number = data.get("crl_number")
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
            raise Refused(f"crl_number must be a whole number. {cure}")
        # RFC 5280 allows 20 octets. Two such numbers are one here, and the list is taken for an older one.
        self.crl_number: int | None = None if number is None else min(number, _MOST_CRL_NUMBER)
        for name in _SECRETS_KEYS:
            value = data[name]
            if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
                raise Refused(f"{name} must be a JSON object of strings. {cure}")
        self.passwords: dict[str, str] = data["passwords"]
        self.psk: dict[str, str] = data["psk"]
        self.serials: dict[bytes, int] = {}
        for serial, reason in data["revoked_serials"].items():
            if reason not in REASONS:
                raise Refused(f"revoked_serials: {reason!r} is not a reason. Cure: use {', '.join(REASONS)}")
            try:
                key = serial_key(serial)
            except ValueError as exc:
                raise Refused(f"revoked_serials: {exc}. {cure}") from None
            if key in self.serials:
                raise Refused(f"revoked_serials: {serial} is there twice. {cure}")
            self.serials[key] = REASONS[reason]

    def password(self, device: str) -> Password | None:
        """Return what a device's password is checked against; None when there is none.

        :raises Refused: when it cannot be used. The message does not show it.
        """
        if (text := self.passwords.get(device)) is None:
            return None
        try:
            return Password.parse(text)
        except ValueError as exc:
            raise Refused(f"the password of {device} {exc}. Cure: let bednet-ca make it") from None

    def key(self, device: str) -> bytes | None:
        """Return a device's pre-shared key; None when there is none.

        :raises Refused: when it cannot be used. The message does not show it.
        """
        if (text := self.psk.get(device)) is None:
            return None
        sizes = f"{PSK_BYTES.start} to {PSK_BYTES.stop - 1} bytes"
        if not re.fullmatch(r"(?:[0-9A-Fa-f]{2})+", text) or len(text) // 2 not in PSK_BYTES:
            raise Refused(f"the pre-shared key of {device} is not {sizes} in hexadecimal. Cure: let bednet-ca make it")
        return bytes.fromhex(text)


class Compiled:
    """Reads a compiled site line by line: its zones and profiles at once, its devices as they are asked for.

    :ivar zones: records by key, likewise ``profiles``; complete once :meth:`devices` has begun.
    :ivar issuers: by ``iss``, likewise.
    :ivar keys: by ``iss``, the keys of each issuer that the site gives, by ``kid``; None for one whose keys come later.
    :ivar token_methods: by device id, how it proves itself to the site's token service; as :meth:`devices` goes on.
    :ivar reinstated: by device id, when the site last reinstated it, in unix seconds; as :meth:`devices` goes on.
    :ivar ways: how the device of :meth:`only_device` authenticates; ``profile`` the record of its profile.
    :ivar without_secret: ids of devices in service that lack the secret of a way to authenticate.
    """

    def __init__(self, lines: Iterable[str], secrets: Secrets, name: str = "the compiled site") -> None:
        self.secrets = secrets
        self.without_secret: list[str] = []
        self.unused_passwords, self.unused_psk = set(secrets.passwords), set(secrets.psk)
        self._name = name
        self._lines = enumerate(lines, 1)
        self._line = 0
        self.zones: dict[bytes, bytes] = {}
        self.profiles: dict[bytes, bytes] = {}
        self.issuers: dict[str, Issuer] = {}
        self.keys: dict[str, dict[str, Key] | None] = {}
        self.token_methods: dict[str, str] = {}
        self.reinstated: dict[str, int] = {}
        self.ways: tuple[str, ...] = ()
        self.profile = b""
        self._any_zone = False
        self._known: dict[str, tuple[bytes, int]] = {}
        """By a profile's name: its key, and how many values its devices have."""

    def _refused(self, message: str) -> Refused:
        return Refused(f"{self._name}:{self._line}: {message}. Cure: make it again with bednet compile --output")

    def _next(self) -> object:
        try:
            self._line, line = next(self._lines)
        except StopIteration:
            self._line += 1
            raise _Unsound("the file ends too early") from None
        except UnicodeDecodeError:
            self._line += 1
            raise _Unsound("the line is not UTF-8") from None
        if not line.endswith("\n"):
            raise _Unsound("the line has no end")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise _Unsound("the line is not JSON") from None

    def devices(self) -> Iterator[tuple[bytes, Device]]:
        """Go through all devices, in order of their ids; the last step makes sure that nothing follows.

        :raises Refused: at the first line that is not what ``bednet compile`` writes, or a secret that cannot be used.
        """
        try:
            header = self._next()
            form = header.get("bednet-compiled") if isinstance(header, dict) else None
            if form is not None and form != COMPILED:
                raise _Unsound(f"the format is {form!r}, and this tool reads format {COMPILED}")
            header = _object(header, _HEADER_KEYS, "the first line")
            counts = [
                _whole(header[name], 0, 1 << 32, f"'{name}'") for name in ("zones", "profiles", "issuers", "devices")
            ]
            for _ in range(counts[0]):
                self._zone(self._next())
            for _ in range(counts[1]):
                self._profile(self._next())
            for _ in range(counts[2]):
                self._issuer(self._next())
            last = ""
            for _ in range(counts[3]):
                entry = self._entry(self._next())
                device_id = entry["device"]
                device = self._device(entry)
                if device_id <= last:
                    wrong = "is listed twice" if device_id == last else f"stands after {last!r}, not in order"
                    raise _Unsound(f"device {device_id!r} {wrong}")
                last = device_id
                yield device_id.encode(), device
            if next(self._lines, None) is not None:
                self._line += 1
                raise _Unsound("more lines than the first line says")
        except _Unsound as exc:
            raise self._refused(str(exc)) from None

    def only_device(self) -> tuple[bytes, Device]:
        """Read two lines: a profile, and the device that has it. Its zones are those that the store has.

        :raises Refused: when it is not what ``bednet compile`` writes, or a secret cannot be used.
        """
        try:
            self._any_zone = True
            self._profile(self._next())
            entry = self._entry(self._next())
            device = self._device(entry)
            if entry["device"] == PROBE:
                raise _Unsound(f"{PROBE!r} is no device of the site")
            if next(self._lines, None) is not None:
                self._line += 1
                raise _Unsound("more lines than a profile and a device")
            self.ways, self.profile = tuple(entry["authentication"]), self.profiles[device.profile]
            return entry["device"].encode(), device
        except _Unsound as exc:
            cure = "give what bednet compile --device or --entry says"
            raise Refused(f"{self._name}:{self._line}: {exc}. Cure: {cure}") from None

    def _zone(self, data: object) -> None:
        entry = _object(data, _ZONE_KEYS, "a zone")
        name = _text(entry["zone"], "a zone's name")
        transitions: list[tuple[int, int]] = []
        for pair in _list(entry["transitions"], "transitions", TEXT16):
            try:
                second, offset = pair
            except (TypeError, ValueError):
                raise _Unsound(f"zone {name!r}: a transition must be [second, offset]") from None
            _whole(second, -(1 << 62), 1 << 62, f"zone {name!r}: a second")
            _whole(offset, -DAY_SECONDS, DAY_SECONDS, f"zone {name!r}: an offset")
            if transitions and second <= transitions[-1][0]:
                raise _Unsound(f"zone {name!r}: transitions out of order")
            transitions.append((second, offset))
        if not transitions:
            raise _Unsound(f"zone {name!r} has no transitions")
        if self.zones.setdefault(zone_key(name), record := encode_zone(transitions)) is not record:
            raise _Unsound(f"zone {name!r} is listed twice")

    def _profile(self, data: object) -> None:
        entry = _object(data, _PROFILE_KEYS, "a profile")
        name = _text(entry["profile"], "a profile's key", 1 << 20)
        names = _list(entry["names"], "names", TEXT8)
        for placeholder in names:
            _text(placeholder, f"profile {name!r}: a name")
        rules = _list(entry["rules"], "rules", TEXT16)
        record = encode_profile(self._rule(rule, len(names)) for rule in rules)
        key = profile_key(name)
        if name in self._known or self.profiles.setdefault(key, record) is not record:
            raise _Unsound(f"profile {name!r} is listed twice")
        self._known[name] = key, len(names)

    def _rule(self, data: object, names: int) -> Rule:
        entry = _object(data, _RULE_KEYS, "a rule")
        name = _text(entry["id"], "a rule's id")
        try:
            effect, access = EFFECTS[entry["effect"]], ACCESSES[entry["access"]]
        except (KeyError, TypeError):
            raise _Unsound(f"rule {name!r} has no effect or access that is known") from None
        windows = []
        for data_of in _list(entry["during"], f"rule {name!r}: during", TEXT8):
            window = _object(data_of, _WINDOW_KEYS, f"rule {name!r}: a window")
            zone = zone_key(_text(window["zone"], f"rule {name!r}: a zone"))
            if zone not in self.zones and not self._any_zone:
                raise _Unsound(f"rule {name!r}: there is no zone {window['zone']!r}")
            days = _whole(window["days"], 1, EVERY_DAY, f"rule {name!r}: days")
            start = _whole(window["from"], 0, DAY_SECONDS - 1, f"rule {name!r}: from")
            windows.append(Window(days, start, _whole(window["to"], 0, DAY_SECONDS, f"rule {name!r}: to"), zone))
        networks = []
        for text in _list(entry["networks"], f"rule {name!r}: networks", TEXT8):
            try:
                networks.append(ipaddress.ip_network(_text(text, f"rule {name!r}: a network")))
            except ValueError:
                raise _Unsound(f"rule {name!r}: {text!r} is not a network") from None
        topic = self._topic(entry["topic"], names, name)
        return Rule(name, effect, access, tuple(windows), tuple(networks), topic)

    @staticmethod
    def _topic(data: object, names: int, rule: str) -> bytes:
        parts = []
        for part in _list(data, f"rule {rule!r}: topic", TEXT16):
            if isinstance(part, str):
                parts.append(_text(part, f"rule {rule!r}: topic", TEXT16).encode())
            else:
                parts.append(bytes((PLACEHOLDER, _whole(part, 0, names, f"rule {rule!r}: a placeholder"))))
        topic = b"".join(parts)
        if not 1 <= len(topic) <= TEXT16:
            raise _Unsound(f"rule {rule!r}: the topic is empty or longer than {TEXT16} bytes")
        return topic

    def _issuer(self, data: object) -> None:
        entry = _object(data, _ISSUER_KEYS, "an issuer")
        iss = _text(entry["issuer"], "an issuer", TEXT16)
        what = f"issuer {iss!r}"
        if iss in self.issuers:
            raise _Unsound(f"{what} is listed twice")
        _text(entry["name"], f"{what}: name")
        if not isinstance(entry["service"], bool):
            raise _Unsound(f"{what}: service must be true or false")
        algorithms = _texts(entry["algorithms"], f"{what}: algorithms")
        if not set(algorithms) <= ALGORITHMS.keys():
            raise _Unsound(f"{what}: algorithms must be of {', '.join(ALGORITHMS)}")
        if not isinstance(scope := entry["scope"], str) or scope not in SCOPES:
            raise _Unsound(f"{what}: scope must be {' or '.join(SCOPES)}")
        typ = _texts(entry["typ"], f"{what}: typ", empty=True)
        if any(word != word.lower().removeprefix("application/") for word in typ):
            raise _Unsound(f"{what}: typ must be in lower case, without 'application/'")
        prefix = entry["prefix"]
        if prefix != "" and not (isinstance(prefix, str) and DEVICE_ID.fullmatch(prefix)):
            raise _Unsound(f"{what}: no device's id can begin with {prefix!r}")
        if (url := entry["jwks_url"]) is not None and not _text(url, f"{what}: jwks_url", TEXT16).startswith(
            "https://"
        ):
            raise _Unsound(f"{what}: jwks_url must begin with https://")
        flags = SCOPES[scope] | (OWN_SERVICE if entry["service"] else 0)
        roles, mappings = self._roles(entry["roles"], what)
        spaced = bool(roles) and _SEPARATOR in entry["roles"]
        if roles and not prefix:
            raise _Unsound(f"{what} makes devices of roles, and has no prefix for their ids")
        if entry["service"] and (roles or any(other.flags & OWN_SERVICE for other in self.issuers.values())):
            raise _Unsound(f"{what}: a second service, or one that makes devices of roles")
        issuer = Issuer(
            iss,
            _texts(entry["audience"], f"{what}: audience", TEXT16),
            typ,
            sum(ALGORITHMS[name] for name in set(algorithms)),
            flags | (ROLES_MAPPED if roles else 0) | (ROLES_SPACED if spaced else 0),
            _whole(entry["leeway"], 0, MOST_LEEWAY, f"{what}: leeway"),
            _whole(entry["longest"], 1, (1 << 32) - 1, f"{what}: longest"),
            _text(entry["claim"], f"{what}: claim"),
            prefix,
            roles,
            mappings,
        )
        self.issuers[iss] = issuer
        self.keys[iss] = None
        if (jwks := entry["keys"]) is not None:
            try:
                self.keys[iss], _ = keys_of(_list(jwks, f"{what}: keys", TEXT16), issuer.algorithms)
            except ValueError as exc:
                raise _Unsound(f"{what}: {exc}") from None

    def _roles(self, data: object, what: str) -> tuple[str, tuple[RoleMapping, ...]]:
        if data is None:
            return "", ()
        keys = _ROLES_KEYS | ({_SEPARATOR} if isinstance(data, dict) and _SEPARATOR in data else set())
        entry = _object(data, keys, f"{what}: roles")
        if entry.get(_SEPARATOR, " ") != " ":
            raise _Unsound(f"{what}: a separator of roles must be one space")
        mappings: list[RoleMapping] = []
        for item in _list(entry["map"], f"{what}: map", TEXT8):
            mapping = _object(item, _ROLE_KEYS, f"{what}: a role")
            value = _text(mapping["value"], f"{what}: a role's value", TEXT16)
            claims = _texts(mapping["claims"], f"{what}: claims", least=0)
            try:
                key, count = self._known[mapping["profile"]]
            except (KeyError, TypeError):
                raise _Unsound(f"{what}: there is no profile {mapping['profile']!r}") from None
            if len(claims) != count:
                raise _Unsound(f"{what}: {value!r} has not the {count} claims of its profile")
            if any(value == other.value for other in mappings):
                raise _Unsound(f"{what}: {value!r} is mapped twice")
            mappings.append(RoleMapping(value, key, claims))
        if not mappings:
            raise _Unsound(f"{what}: no role is mapped")
        return _text(entry["claim"], f"{what}: the claim of its roles"), tuple(mappings)

    @staticmethod
    def _entry(data: object) -> Json:
        """Check the keys of a device; the mark of a reinstatement is only there when there is one."""
        if isinstance(data, dict) and _REINSTATED in data:
            return {
                _REINSTATED: data[_REINSTATED],
                **_object({k: data[k] for k in data if k != _REINSTATED}, _DEVICE_KEYS, "a device"),
            }
        return _object(data, _DEVICE_KEYS, "a device")

    def _device(self, entry: Json) -> Device:  # noqa: PLR0912 - one for each refusal
        device_id, profile = entry["device"], entry["profile"]
        if (
            not isinstance(device_id, str)
            or not DEVICE_ID.fullmatch(device_id)
            or (device_id[:7].lower() == RESERVED and device_id != PROBE)
        ):
            raise _Unsound(f"{device_id!r} cannot be a device's id")
        try:
            key, count = self._known[profile]
        except (KeyError, TypeError):
            raise _Unsound(f"device {device_id!r} has the profile {profile!r}, which the file does not list") from None
        values = entry["values"]
        if not isinstance(values, list) or len(values) != count:
            raise _Unsound(f"device {device_id!r} has not the {count} values of its profile")
        for value in values:
            if not isinstance(value, str) or not value or UNSAFE_VALUE.search(value):
                raise _Unsound(f"device {device_id!r} has the value {value!r}, which cannot stand in a topic")
            if not value.isascii() or len(value) > TEXT8:
                _text(value, f"device {device_id!r}: a value")
        authentication = entry["authentication"]
        if not isinstance(authentication, list) or not authentication:
            raise _Unsound(f"device {device_id!r} has no way to authenticate")
        for way in authentication:
            if way not in AUTHENTICATION:
                raise _Unsound(f"device {device_id!r} authenticates with {way!r}, which is unknown")
        method = entry["token"]
        if (method is not None) is not ("token" in authentication) or method not in (None, *TOKEN_AUTHENTICATION):
            raise _Unsound(f"device {device_id!r} gets its tokens with {method!r}, which cannot be")
        if method is not None:
            self.token_methods[device_id] = method
        if _REINSTATED in entry:
            mark = _whole(entry[_REINSTATED], 1, _MOST_SECONDS, f"device {device_id!r}: {_REINSTATED}")
            self.reinstated[device_id] = mark
        until, reason = entry["until"], entry["revoked"]
        if until is None:
            until = 0
        else:
            _whole(until, 1, 1 << 62, f"device {device_id!r}: until")
        if reason is not None:
            if not isinstance(reason, str) or reason not in REASONS:
                raise _Unsound(f"device {device_id!r} is revoked for {reason!r}, which is no reason")
            return Device(
                key,
                tuple(values),
                "certificate" in authentication,
                until=until,
                revoked=REASONS[reason],
                token=method is not None,
            )
        password, psk = self._secrets_of(device_id, authentication)
        return Device(
            key, tuple(values), "certificate" in authentication, password, psk, until, token=method is not None
        )

    def _secrets_of(self, device_id: str, authentication: list[str]) -> tuple[Password | None, bytes | None]:
        password = psk = None
        if "password" in authentication:
            password = self.secrets.password(device_id)
            self.unused_passwords.discard(device_id)
        if "psk" in authentication:
            psk = self.secrets.key(device_id)
            self.unused_psk.discard(device_id)
        bare = ("certificate" in authentication) + ("token" in authentication)
        if len(authentication) != bare + (password is not None) + (psk is not None):
            self.without_secret.append(device_id)
        return password, psk


# ---------------------------------------------------------------------------------------------------------------------
# The store
# ---------------------------------------------------------------------------------------------------------------------


class _Changes:
    """The change log of one transaction."""

    def __init__(self) -> None:
        self._subjects: list[tuple[int, bytes]] = []
        self.everything = False

    def add(self, kind: int, subject: bytes) -> None:
        self._subjects.append((kind, subject))
        if kind == EVERYTHING_CHANGED or len(self._subjects) > CHANGES_AT_ONCE:
            self.everything = True
        if self.everything:
            self._subjects = [(EVERYTHING_CHANGED, b"")]

    def __len__(self) -> int:
        return len(self._subjects)

    def write(self, transaction: lmdb.Transaction, database: Any, last: int) -> None:
        """Append to the log, and drop what is too old.

        :param last: the number of the last entry so far.
        """
        for number, (kind, subject) in enumerate(self._subjects, last + 1):
            transaction.put(_BIG_U64.pack(number), bytes((kind,)) + subject, db=database)
        last += len(self._subjects)
        with transaction.cursor(database) as cursor:
            while cursor.first() and _BIG_U64.unpack(cursor.key())[0] <= last - CHANGES_KEPT:
                cursor.delete()


class _Old(NamedTuple):
    """What the store said before: a snapshot that stays as it is while the new state is written."""

    transaction: lmdb.Transaction | None
    databases: Mapping[bytes, Any]
    meta: Meta

    def items(self, database: bytes) -> Iterator[tuple[bytes, bytes]]:
        if self.transaction is not None and database in self.databases:
            with self.transaction.cursor(self.databases[database]) as cursor:
                for key, record in cursor.iternext():
                    yield bytes(key), bytes(record)

    def get(self, database: bytes, key: bytes) -> bytes | None:
        if self.transaction is None or database not in self.databases:
            return None
        record = self.transaction.get(key, db=self.databases[database])
        return None if record is None else bytes(record)


class _Run:
    """One transaction in the making; without a transaction to write to it only counts."""

    def __init__(self, old: _Old, write: lmdb.Transaction | None, databases: Mapping[bytes, Any]) -> None:
        self.old = old
        self.changes = _Changes()
        self.changed = False
        self._write = write
        self._databases = databases
        self._count = {b"devices": old.meta.devices, b"profiles": old.meta.profiles}

    def set(self, database: bytes, kind: int, key: bytes, before: bytes | None, after: bytes | None) -> None:
        """Note one difference; it gets into the change log unless its kind is ``SILENT``."""
        self.changed = True
        if kind != SILENT:
            self.changes.add(kind, key if kind != EVERYTHING_CHANGED else b"")
        if database in self._count:
            self._count[database] += (after is not None) - (before is not None)
        if self._write is None:
            return
        if after is None:
            self._write.delete(key, db=self._databases[database])
        else:
            # In an empty database everything comes in order: LMDB then fills its pages, and needs no search.
            append = self.old.transaction is None and database == b"devices"
            self._write.put(key, after, append=append, db=self._databases[database])

    def remember(self, key: bytes, before: bytes | None, mark: Mark) -> None:
        """Note what is to be remembered of a device."""
        # A damaged one stays as it is, for `status --deep` to name.
        if mark.reinstated < _MOST_SECONDS and (after := mark.encode()) != before:
            self.set(b"marks", SILENT, key, before, after)

    def merge(
        self,
        database: bytes,
        kind: int,
        new: Iterable[tuple[bytes, bytes]],
        note: Callable[[bytes, bytes | None, bytes | None], bytes | None] | None = None,
    ) -> dict[str, int]:
        """Make a database what `new` says, which is in order of keys.

        :param note: hears of each difference, and may say that the record shall be another.
        :returns: how much of it is different.
        """
        tally = {"added": 0, "changed": 0, "removed": 0}
        for key, before, wanted in _differences(self.old.items(database), new):
            after = note(key, before, wanted) if note else wanted
            if after == before:
                continue
            tally["added" if before is None else "removed" if after is None else "changed"] += 1
            self.set(database, kind, key, before, after)
        return tally

    def finish(self) -> Meta:
        """Write the change log and the meta record. :returns: what that says."""
        last = self.old.meta.last_change
        if self.old.meta.layout != LAYOUT:
            self.changed = True
            self.changes.add(EVERYTHING_CHANGED, b"")
        meta = Meta(last + len(self.changes), self._count[b"devices"], self._count[b"profiles"])
        if self._write is not None and (meta != self.old.meta or self.old.transaction is None):
            self.changes.write(self._write, self._databases[b"changes"], last)
            self._write.put(META, meta.encode(), db=self._databases[b"meta"])
        return meta


def _differences(
    old: Iterator[tuple[bytes, bytes]], new: Iterable[tuple[bytes, bytes]]
) -> Iterator[tuple[bytes, bytes | None, bytes | None]]:
    """Compare two sequences that are in order of their keys: key, value before, value after."""
    mine = next(old, None)
    for key, after in new:
        while mine is not None and mine[0] < key:
            yield mine[0], mine[1], None
            mine = next(old, None)
        if mine is not None and mine[0] == key:
            if mine[1] != after:
                yield key, mine[1], after
            mine = next(old, None)
        else:
            yield key, None, after
    while mine is not None:
        yield mine[0], mine[1], None
        mine = next(old, None)


class CompiledFile:
    """A file with a compiled site; it can be gone through again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def __iter__(self) -> Iterator[str]:
        with self.path.open(encoding="utf-8", newline="\n") as stream:
            yield from stream


class Store:
    """The store in a folder. Every method opens it, does one thing as a whole, and closes it.

    :ivar folder: is made when it is missing; the one above it must be there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        group: str | None = None,
        map_size: int = MAP_SIZE,
        wait: float = WAIT_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Name a store; nothing is opened yet.

        :param group: whose members may read it; None for ``mosquitto``, or nobody's when there is no such group.
        :param map_size: bytes of address space to begin with.
        :param wait: seconds to wait for another run.
        :param clock: gives the time, in unix seconds.
        :raises Refused: when there is no such group, or no lmdb.
        """
        if lmdb is None:
            raise Refused(
                "the Python module lmdb is missing. Cure: run playbooks/site.yml, which installs python3-lmdb"
            )
        self.folder = folder
        self._map_size = map_size
        self._wait = wait
        self._clock = clock
        self._gid: int | None = None
        try:
            self._gid = grp.getgrnam(group or GROUP).gr_gid
        except KeyError:
            if group is not None:
                raise Refused(f"there is no group {group!r}. Cure: install mosquitto, or name its group") from None

    @property
    def data(self) -> Path:
        """The file that holds everything."""
        return self.folder / "data.mdb"

    def apply(self, lines: Iterable[str], secrets: object, *, check: bool = False) -> Json:
        """Make the store what a compiled site says.

        The compiled site is the truth, save that it may be older than a revocation: a device that is revoked here comes
        back only with a later mark of a reinstatement than the store has seen. Others are named in ``kept_revoked``.

        :param lines: of the compiled site, such as a :class:`CompiledFile`.
        :param secrets: see :class:`Secrets`.
        :param check: tell what would change, and change nothing.
        :returns: ``changed``; how many devices were ``added``, ``changed_devices``, ``removed``; ``profiles``,
            ``zones``, ``issuers``, ``revoked_serials`` that are different; ``reinstated``: ids and old reasons of
            devices that are no longer revoked; ``kept_revoked``: of those that the site would let in, and that stay
            out; ``older_crl``: the CA's list is older than one that was here; ``without_secret``: devices in service
            that lack the password or key of a way to authenticate, ``unused_secrets``: ids with a secret that no
            device can use (the first 100 of each); ``devices`` in the store; ``files``: owners and modes that were put
            right.
        :raises Refused: nothing was changed.
        """
        known = secrets if isinstance(secrets, Secrets) else Secrets(secrets)
        name = str(lines) if isinstance(lines, CompiledFile) else "the compiled site"
        again = iter(lines) is not lines

        def work(run: _Run) -> Json:
            return _apply(run, Compiled(lines, known, name))

        return self._change(work, check=check, again=again, upgrade=True)

    def put(self, lines: str, secrets: object = None) -> Json:
        """Write one device, without looking at any other.

        :param lines: its profile and itself, each in a line as in a compiled site. The profile must be the store's own:
            what it says is what the device's values were chosen for.
        :param secrets: see :class:`Secrets`; what is not for this device is left alone. None: it keeps those it has.
        :returns: as for :meth:`apply`, as far as it is about one device.
        :raises Refused: when a line is unsound, the store has not this profile, or the device is revoked there and
            these lines know of no later reinstatement.
        """
        given = Secrets({name: {} for name in _SECRETS_KEYS}) if secrets is None else secrets
        known_secrets = given if isinstance(given, Secrets) else Secrets(given)
        compiled = Compiled(io.StringIO(lines, newline="\n"), known_secrets, "stdin")
        key, device = compiled.only_device()
        name = key.decode()

        def work(run: _Run) -> Json:
            profile = run.old.get(b"profiles", device.profile)
            if profile is None:
                raise Refused(
                    f"the store has no device with the roles and rules of {name} so far. Cure: run playbooks/site.yml"
                )
            if profile != compiled.profile:
                raise Refused(
                    f"the profile of {name} says something else in the store: it was made by another policy. "
                    "Cure: run playbooks/site.yml"
                )
            before, kept = run.old.get(b"devices", key), device
            if secrets is None and before is not None and device.revoked is None:
                known = _sound(name, before)
                kept = device._replace(
                    password=known.password if "password" in compiled.ways else None,
                    psk=known.psk if "psk" in compiled.ways else None,
                )
            guard = _Guard(run, lambda of: run.old.get(b"marks", of))
            after: bytes | None = kept.encode()
            latest = compiled.reinstated.get(name, 0)
            if after != before:
                _keep_compromised(run, key, before, kept, latest)
                after = guard.settle(key, before, after, latest)
            if guard.kept:
                raise Refused(
                    f"{name} is revoked ({guard.kept[0]['reason']}), and was not reinstated since, for all this says. "
                    "Cure: playbooks/reinstate.yml, or a later 'reinstated' where its entry is made"
                )
            guard.remember(compiled.reinstated)
            if after is not None and after != before:
                run.set(b"devices", DEVICE_CHANGED, key, before, after)
            held = {"password": kept.password, "psk": kept.psk}
            lacks = [way for way in compiled.ways if way in held and held[way] is None and kept.revoked is None]
            return {
                "device": name,
                "revoked": guard.revoked,
                "reinstated": guard.reinstated,
                "without_secret": [name] if lacks else [],
            }

        return self._change(work, new=False)

    def get(self, device_id: str) -> Device | None:
        """Return one device's record, secrets and all.

        :raises Refused: when it is damaged.
        """
        with self._reading() as old:
            record = old.get(b"devices", device_id.encode())
        return None if record is None else _sound(device_id, record)

    def revoke(self, device_id: str, reason: str, reinstated: int = 0) -> Json:
        """Refuse a device from now on, and forget its secrets.

        :param reinstated: the mark of the reinstatement that the site had until now, in unix seconds: with no later one
            does it come back, even if that mark has not come as far as this store.
        :raises Refused: when the store does not know the device, or its key is compromised and this is another reason.
        """
        if reason not in REASONS:
            raise Refused(f"{reason!r} is not a reason. Cure: use {', '.join(REASONS)}")

        def work(device: Device) -> Device:
            if device.revoked == COMPROMISED and REASONS[reason] != COMPROMISED:
                raise Refused(
                    f"{device_id} is revoked for keyCompromise, and that cannot be made less. "
                    "Cure: revoke it for that reason, or leave it"
                )
            return device._replace(revoked=REASONS[reason], password=None, psk=None)

        return self._alter(device_id, work, reinstated)

    def reinstate(self, device_id: str) -> Json:
        """Let a revoked device in again; its secrets come with the next ``apply``.

        :raises Refused: when the store does not know the device, or its key is compromised.
        """

        def work(device: Device) -> Device:
            if device.revoked == COMPROMISED:
                raise Refused(
                    f"the key of {device_id} is compromised: whoever has it would come back too. Cure: with the device "
                    "in good hands, write 'reinstated' in place of 'revoked' in devices.yml, and run "
                    "playbooks/site.yml, which gives it new keys"
                )
            return device._replace(revoked=None)

        return self._alter(device_id, work)

    def _alter(self, device_id: str, change: Callable[[Device], Device], reinstated: int = 0) -> Json:
        def work(run: _Run) -> Json:
            key = device_id.encode(errors="replace")
            before = run.old.get(b"devices", key) if DEVICE_ID.fullmatch(device_id) else None
            if before is None:
                raise Refused(f"the store has no device {device_id!r}. Cure: name one that it has")
            device = change(_sound(device_id, before))
            if (after := device.encode()) != before:
                run.set(b"devices", DEVICE_CHANGED, key, before, after)
            known = run.old.get(b"marks", key)
            if reinstated > _mark(known).reinstated:
                run.remember(key, known, Mark(reinstated))
            return {"device": device_id, "revoked": None if device.revoked is None else REASON_NAMES[device.revoked]}

        return self._change(work, new=False)

    def add_serials(self, data: object) -> Json:
        """Refuse the certificates that a list of the CA names. What is no longer on it is for :meth:`apply` to forget.

        :param data: ``crl_number`` and ``revoked_serials``, see :class:`Secrets`, from a list that was verified. With
            the number that the store has seen, or a lower one, it is nothing new.
        :returns: ``changed``; ``revoked_serials`` that are new or have another reason; ``older_crl``.
        :raises Refused: when it is something else.
        """
        if not isinstance(data, dict) or data.keys() != {"crl_number", "revoked_serials"} or data["crl_number"] is None:
            raise Refused("this is not crl_number and revoked_serials. Cure: give what crl_fetch.py --serials says")
        secrets = Secrets({"passwords": {}, "psk": {}, **data})
        number = secrets.crl_number or 0

        def work(run: _Run) -> Json:
            known = run.old.get(META, CRL)
            last = _crl_number(known)
            added = 0
            if number > last or number == _MOST_CRL_NUMBER:
                for key, reason in sorted(secrets.serials.items()):
                    before, after = run.old.get(b"revoked", key), bytes((reason,))
                    if after != before:
                        run.set(b"revoked", SERIAL_CHANGED, key, before, after)
                        added += 1
                if (record := _U64.pack(number)) != known:
                    run.set(META, SILENT, CRL, known, record)
            return {"revoked_serials": added, "older_crl": number < last}

        return self._change(work, new=False)

    def set_keys(self, iss: str, jwks: object) -> Json:
        """Make the keys of an issuer those that it publishes, and no others.

        :param jwks: JWK Set (RFC 7517, 5).
        :raises Refused: when the store does not know the issuer, or no key is usable: then the old ones stay.
        """
        cure = "Cure: look what the issuer publishes, and which algorithms policy.yml allows it"
        if not isinstance(jwks, dict) or not isinstance(jwks.get("keys"), list):
            raise Refused(f"the keys of {iss!r} are no JWK Set (RFC 7517, 5). {cure}")

        def work(run: _Run) -> Json:
            issuer = _issuer(run.old, iss)
            try:
                keys, unusable = keys_of(jwks["keys"], issuer.algorithms)
            except ValueError as exc:
                raise Refused(f"the keys of {iss!r}: {exc}. {cure}") from None
            if _replace_keys(run, iss, keys):
                run.changes.add(ISSUER_CHANGED, issuer_key(iss))
            return {"issuer": iss, "keys": sorted(keys), "unusable": unusable[:TOLD]}

        return self._change(work, new=False)

    def kids(self, iss: str) -> Json:
        """Name the keys of an issuer that the store has; one without a name is an empty text.

        :raises Refused: when the store does not know the issuer, or cannot be read.
        """
        with self._reading() as old:
            if old.transaction is None:
                raise Refused(f"{self.folder}: there is no store. Cure: run playbooks/site.yml")
            _issuer(old, iss)
            records = [(key, record) for key, record in old.items(b"keys") if key[:8] == issuer_key(iss)]
            kids = [self._decoded(Key.decode, key, record).kid for key, record in records]
        return {"issuer": iss, "kids": sorted(kids)}

    def revoke_token(self, iss: str, jti: str, expires: int, device_id: str) -> Json:
        """Refuse one token from now on.

        :param expires: when it ends by itself, in unix seconds; it is forgotten some time later. A time that is later
            than that of any token of the issuer that is good now is taken for the latest of these.
        :raises Refused: when the store does not know the issuer, or something cannot be.
        """

        def work(run: _Run) -> Json:
            return {"tokens": self._add_tokens(run, _issuer(run.old, iss), [(jti, expires, device_id)])}

        return self._change(work, new=False)

    def cutoff(self, device_id: str, until: int | None = None) -> Json:
        """Refuse all tokens that a device got until then, in unix seconds. It is never taken back.

        A time in the future, beyond what clocks differ by, is taken for the present.

        :param until: None for all that would be good at this moment, whoever issued them: up to the leeway of an issuer
            whose prefix the id has, the clock of that one may be ahead.
        :raises Refused: when there can be no such device or time.
        """

        def work(run: _Run) -> Json:
            seconds = int(self._clock()) + _ahead(run.old, device_id) if until is None else until
            return {"cutoffs": self._add_cutoffs(run, {device_id: seconds})}

        return self._change(work, new=False)

    def revocations(self, iss: str, payload: object) -> Json:
        """Take over what the site's own token service revoked; what it does not list stays revoked.

        :param payload: of its signed list, which somebody has verified: ``iss``, ``tokens`` (each with ``jti``,
            ``exp``, ``device``), ``cutoffs`` (by device, in unix seconds).
        :raises Refused: when it is of another issuer, or something in it cannot be.
        """
        cure = "Cure: fetch the list of the site's own token service again"
        if not isinstance(payload, dict) or payload.get("iss") != iss:
            raise Refused(f"this is no list of revocations of {iss!r}. {cure}")
        listed, cutoffs = payload.get("tokens"), payload.get("cutoffs")
        if not isinstance(listed, list) or not isinstance(cutoffs, dict):
            raise Refused(f"the list of {iss!r} lacks 'tokens' or 'cutoffs'. {cure}")
        if not all(isinstance(token, dict) for token in listed):
            raise Refused(f"the list of {iss!r} names a token that is no object. {cure}")
        tokens = [(token.get("jti"), token.get("exp"), token.get("device")) for token in listed]

        def work(run: _Run) -> Json:
            issuer = _issuer(run.old, iss)
            if not issuer.flags & OWN_SERVICE:
                raise Refused(
                    f"{iss!r} is not the site's own token service, and no other may refuse tokens here. "
                    "Cure: see 'service' in policy.yml"
                )
            return {"tokens": self._add_tokens(run, issuer, tokens), "cutoffs": self._add_cutoffs(run, cutoffs)}

        return self._change(work, new=False)

    def _add_tokens(self, run: _Run, issuer: Issuer, tokens: Iterable[tuple[object, object, object]]) -> int:
        """Note revoked tokens, and forget those that ended long ago. :returns: how many are new."""
        now = int(self._clock())
        # What is good now was issued at most `leeway` ahead, and lasts at most `longest`. What a token service that was
        # taken over says of later times would never be forgotten. Not less than a day: `longest` may grow again.
        latest = now + issuer.leeway + max(issuer.longest, DAY_SECONDS)
        new: dict[bytes, bytes] = {}
        for jti, expires, device_id in tokens:
            if not isinstance(jti, str) or not jti or len(jti) > _MOST_JTI or not _encodable(jti):
                raise Refused(f"{jti!r} is not a token's 'jti'. Cure: give it as the token has it")
            seconds, subject = min(_seconds(expires), latest), _device_id(device_id)
            key, record = token_key(issuer.iss, jti), encode_seconds(seconds)
            if seconds + TOKEN_KEPT_SECONDS > now and key not in new and run.old.get(b"tokens", key) is None:
                new[key] = record
                run.set(b"tokens", SILENT, key, None, record)
                run.changes.add(TOKEN_CHANGED, key + subject)
        if new:
            for key, record in run.old.items(b"tokens"):
                if len(record) != _SECONDS.size or decode_seconds(record) + TOKEN_KEPT_SECONDS <= now:
                    run.set(b"tokens", SILENT, key, record, None)
        return len(new)

    def _add_cutoffs(self, run: _Run, cutoffs: Mapping[object, object]) -> int:
        """Move the ends of old tokens forward, never back. :returns: how many were moved."""
        latest = int(self._clock()) + _LATEST_CUTOFF
        moved = 0
        for device_id, until in cutoffs.items():
            key, seconds = _device_id(device_id), min(_seconds(until), latest)
            before = run.old.get(b"cutoffs", key)
            if before is None or len(before) != _SECONDS.size or decode_seconds(before) < seconds:
                run.set(b"cutoffs", CUTOFF_CHANGED, key, before, encode_seconds(seconds))
                moved += 1
        return moved

    def status(self, *, deep: bool = False) -> Json:
        """Summarise the store; ``problems`` says what somebody has to do.

        :param deep: read every record.
        :raises Refused: when there is no store that could be read.
        """
        with self._reading() as old:
            transaction = old.transaction
            if transaction is None:
                raise Refused(f"{self.folder}: there is no store. Cure: run playbooks/site.yml")
            keyed = {key[:8] for key, _ in old.items(b"keys")}
            keyless = [_shown_issuer(record) for key, record in old.items(b"issuers") if key not in keyed]
            counts = {name: transaction.stat(old.databases[name])["entries"] for name in DATABASES}
            problems = [f"{thing}. Cure: run playbooks/site.yml" for thing in self._permissions()]
            if (counts[b"devices"], counts[b"profiles"]) != (old.meta.devices, old.meta.profiles):
                problems.append("the number of devices or profiles is not what the store says. " + self._damage_cure)
            if deep:
                problems += [f"{thing}. {self._damage_cure}" for thing in itertools.islice(_damage(old), TOLD)]
        geometry = _geometry(self.data)
        return {
            "problems": problems,
            "layout": LAYOUT,
            "last_change": old.meta.last_change,
            **{name.decode(): counts[name] for name in DATABASES if name != b"meta"},
            "issuers_without_keys": keyless,
            "bytes": self.data.stat().st_size,
            "map_size": geometry.map_size if geometry else 0,
        }

    def dump(self, device_id: str | None = None) -> Iterator[Json]:
        """Go through what the store says, or only through one device and its profile; secrets are left out.

        :raises Refused: when there is no store, no such device, or a record is damaged.
        """
        with self._reading() as old:
            if old.transaction is None:
                raise Refused(f"{self.folder}: there is no store. Cure: run playbooks/site.yml")
            if device_id is not None:
                record = old.get(b"devices", device_id.encode(errors="replace") or b"\0")
                if record is None:
                    raise Refused(f"the store has no device {device_id!r}. Cure: name one that it has")
                device = _sound(device_id, record)
                yield _show_device(device_id, device)
                profile = old.get(b"profiles", device.profile) or b""
                yield _show_profile(device.profile, self._decoded(decode_profile, device.profile, profile))
                return
            yield {"bednet-store": LAYOUT, **old.meta._asdict()}
            for key, record in old.items(b"zones"):
                yield {
                    "zone": key.hex(),
                    "transitions": [list(pair) for pair in self._decoded(decode_zone, key, record)],
                }
            for key, record in old.items(b"profiles"):
                yield _show_profile(key, self._decoded(decode_profile, key, record))
            for key, record in old.items(b"devices"):
                yield _show_device(key.decode(), _sound(key.decode(), record))
            for key, record in old.items(b"revoked"):
                yield {"revoked_serial": key.hex(), "reason": REASON_NAMES.get(record[0])}
            for key, record in old.items(b"issuers"):
                yield _show_issuer(self._decoded(Issuer.decode, key, record))
            for key, record in old.items(b"keys"):
                kept = self._decoded(Key.decode, key, record)
                yield {"key": kept.kid, "issuer": key[:8].hex(), "algorithm": _name(ALGORITHMS, kept.algorithm)}
            for key, record in old.items(b"tokens"):
                yield {"revoked_token": key.hex(), "ends": self._decoded(decode_seconds, key, record)}
            for key, record in old.items(b"cutoffs"):
                yield {"cutoff": key.decode(), "until": self._decoded(decode_seconds, key, record)}
            for key, record in old.items(b"marks"):
                mark = self._decoded(Mark.decode, key, record)
                gone = None if mark.gone is None else REASON_NAMES[mark.gone]
                yield {"mark": key.decode(), "reinstated": mark.reinstated or None, "gone": gone}

    def _decoded(self, decode: Callable[[bytes], _T], key: bytes, record: bytes) -> _T:
        try:
            return decode(record)
        except Damaged as exc:
            raise self._refusal(f"the record {key.hex()} is damaged: {exc}") from None

    def raw(self) -> Iterator[tuple[bytes, bytes, bytes]]:
        """Go through everything as it is stored: database, key, record."""
        with self._reading() as old:
            for database in DATABASES:
                for key, record in old.items(database):
                    yield database, key, record

    # What is common to all of them

    @property
    def _damage_cure(self) -> str:
        return (
            f"Cure: stop the broker, move {self.folder} away, and run playbooks/site.yml, which makes it anew "
            "from the site"
        )

    def _refusal(self, message: str) -> Refused:
        return Refused(f"{self.folder}: {message}. {self._damage_cure}")

    def _change(
        self,
        work: Callable[[_Run], Json],
        *,
        check: bool = False,
        new: bool = True,
        again: bool = True,
        upgrade: bool = False,
    ) -> Json:
        """Do some work in one transaction.

        :param new: a store that is not there yet may be made.
        :param again: the work can be done again, with more room.
        :param upgrade: an older layout becomes the present one.
        """
        with self._refusals():
            if check:
                with self._reading(upgrade=upgrade) as old:
                    answer = work(run := _Run(old, None, {}))
                    return self._answer(answer, run, run.finish(), self._permissions())
            if not new and not self._exists():
                raise Refused(f"{self.folder}: there is no store. Cure: run playbooks/site.yml")
            files = self._permissions()
            self._make_folder()
            with self._alone():
                size = max(self._map_size, geometry.map_size if (geometry := self._geometry()) else 0)
                while True:
                    try:
                        answer, run, meta = self._write(work, size, upgrade=upgrade)
                        break
                    except lmdb.MapFullError:
                        if not again or size >= MOST_MAP:
                            raise Refused(
                                f"{self.folder}: {size >> 10} KiB are not enough. Cure: see 'Room' in docs/store.md"
                            ) from None
                        size *= 2
                self._permissions(repair=True)
                return self._answer(answer, run, meta, files)

    @staticmethod
    def _answer(answer: Json, run: _Run, meta: Meta, files: list[str]) -> Json:
        return {
            "changed": run.changed or bool(files),
            **answer,
            "everything": run.changes.everything,
            "devices": meta.devices,
            "last_change": meta.last_change,
            "files": files,
        }

    def _write(self, work: Callable[[_Run], Json], size: int, *, upgrade: bool) -> tuple[Json, _Run, Meta]:
        with contextlib.ExitStack() as stack:
            stack.callback(os.umask, os.umask(0o077))
            environment = stack.enter_context(
                lmdb.open(str(self.folder), map_size=size, max_dbs=len(DATABASES), mode=DATA_MODE)
            )
            # A run that was killed leaves its place in the table of readers, and would keep old pages from being used.
            environment.reader_check()
            old = self._snapshot(environment, stack, upgrade=upgrade)
            write = self._begin(environment)
            try:
                missing = [name for name in DATABASES if name not in old.databases]
                databases = {**old.databases, **{name: environment.open_db(name, txn=write) for name in missing}}
                answer = work(run := _Run(old, write, databases))
                meta = run.finish()
            except BaseException:
                write.abort()
                raise
            if run.changed or old.transaction is None:
                write.commit()
            else:
                write.abort()
        self._lengthen()
        return answer, run, meta

    def _begin(self, environment: lmdb.Environment) -> lmdb.Transaction:
        with _watched(self._wait):
            return environment.begin(write=True)

    def _lengthen(self) -> None:
        """Make the file as long as LMDB says: pages at its end that came and went in one transaction are not written.

        Whoever opens it takes a shorter file for a truncated one.
        """
        size = self.data.stat().st_size
        with self.data.open("r+b") as stream:
            if (geometry := _read_geometry(stream.read(1 << 17))) and geometry.size > size:
                stream.truncate(geometry.size)
                os.fsync(stream.fileno())

    def _snapshot(self, environment: lmdb.Environment, stack: contextlib.ExitStack, *, upgrade: bool = False) -> _Old:
        """Begin to read, after a look at whether it is a store at all; of an older layout only to `upgrade` it."""
        with environment.begin() as transaction:
            with transaction.cursor() as cursor:
                names = tuple(cursor.iternext(values=False))
            if not names:
                return _Old(None, {}, Meta())
            if set(names) not in (set(DATABASES), set(DATABASES_1)):
                raise self._refusal(_FOREIGN)
        # A database that was opened in a transaction is everybody's once that has ended well.
        if environment.flags()["readonly"]:
            databases = {name: environment.open_db(name, create=False) for name in names}
        else:
            with self._begin(environment) as none:
                databases = {name: environment.open_db(name, txn=none, create=False) for name in names}
        transaction = stack.enter_context(environment.begin())
        try:
            meta = Meta.decode(transaction.get(META, db=databases[b"meta"]))
        except Damaged as exc:
            raise self._refusal(str(exc)) from None
        if (meta.layout == LAYOUT) is not (len(databases) == len(DATABASES)):
            raise self._refusal(_FOREIGN)
        if meta.layout != LAYOUT and not upgrade:
            raise Refused(
                f"{self.folder}: it has layout {meta.layout}, and this tool works with layout {LAYOUT}. "
                "Cure: run playbooks/site.yml, which brings it to that"
            )
        return _Old(transaction, databases, meta)

    @contextlib.contextmanager
    def _reading(self, *, upgrade: bool = False) -> Iterator[_Old]:
        """Read what is there, and change nothing; a store that is not there is empty."""
        with self._refusals(), contextlib.ExitStack() as stack:
            if not self._exists():
                yield _Old(None, {}, Meta())
                return
            environment = stack.enter_context(
                lmdb.open(
                    str(self.folder),
                    map_size=max(self._map_size, geometry.map_size if (geometry := self._geometry()) else 0),
                    max_dbs=len(DATABASES),
                    readonly=True,
                    create=False,
                    lock=(self.folder / "lock.mdb").exists(),
                )
            )
            yield self._snapshot(environment, stack, upgrade=upgrade)

    def _exists(self) -> bool:
        try:
            return self.data.stat().st_size > 0
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _geometry(self) -> _Geometry | None:
        """Look at the file before LMDB maps it: a page that is missing would end this process with a signal."""
        try:
            return _geometry(self.data)
        except Damaged as exc:
            raise self._refusal(str(exc)) from None

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """Tell in words what LMDB and the file system have against it."""
        try:
            yield
        except lmdb.MapFullError:
            raise
        except lmdb.ReadersFullError:
            raise Refused(f"{self.folder}: too many readers. Cure: end those that are not the broker") from None
        except OSError as exc:
            where = exc.filename or self.folder
            raise Refused(f"{where}: {_words(exc)}. Cure: make room or give access, and run it again") from None
        except lmdb.Error as exc:
            words = _words(exc)
            if words in _NO_ROOM:
                cure = "make room on the disk, or look whether it is broken, and run it again"
                raise Refused(f"{self.folder}: {words}. Cure: {cure}") from None
            raise self._refusal(f"LMDB says: {words}") from None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let a playbook and an operator take turns, and say so when a turn is too long."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            deadline = time.monotonic() + self._wait
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise Refused(_BUSY.format(self._wait)) from None
                    time.sleep(0.05)
            yield
        finally:
            os.close(descriptor)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(mode=FOLDER_MODE)
        except FileExistsError:
            pass
        except FileNotFoundError:
            message = f"{self.folder.parent}: there is no such folder. Cure: run playbooks/site.yml, which makes it"
            raise Refused(message) from None

    def _permissions(self, *, repair: bool = False) -> list[str]:
        """Say which owners and modes are not as they must be: nobody but root writes, the broker reads."""
        wrong = []
        user, group = os.geteuid(), self._gid
        for path, mode in ((self.folder, FOLDER_MODE), (self.data, DATA_MODE), (self.folder / "lock.mdb", LOCK_MODE)):
            try:
                found = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                wrong.append(f"{path} is missing")
                continue
            owner = f"{user}:{found.st_gid if group is None else group}"
            if f"{found.st_uid}:{found.st_gid}" != owner:
                wrong.append(f"{path} has the owner {found.st_uid}:{found.st_gid}, not {owner}")
                if repair:
                    os.chown(path, user, -1 if group is None else group)
            if found.st_mode & 0o7777 != mode:
                wrong.append(f"{path} has the mode {found.st_mode & 0o7777:04o}, not {mode:04o}")
                if repair:
                    path.chmod(mode)
        return wrong


class _Geometry(NamedTuple):
    """What LMDB's meta page says; sizes in bytes.

    :ivar size: where the last page ends.
    """

    size: int
    map_size: int


def _geometry(path: Path) -> _Geometry | None:
    """Return the geometry of an LMDB data file; None when it does not exist or is empty.

    :raises Damaged: when it is none, or shorter than it says.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(1 << 17)
            length = stream.seek(0, os.SEEK_END)
    except FileNotFoundError:
        return None
    if not length:
        return None
    found = _read_geometry(start)
    if found is None:
        raise Damaged("data.mdb is not a data file of LMDB 0.9 on a machine of this kind")
    if length < found.size:
        raise Damaged(f"data.mdb is cut off: it has {length} bytes of {found.size}")
    return found


def _read_geometry(start: bytes) -> _Geometry | None:
    metas = []
    offset = _LMDB_HEADER
    for _ in range(2):
        if len(start) < offset + _LMDB_META.size:
            return None
        magic, version, _, map_size, page_size, *_, last_page, number = _LMDB_META.unpack_from(start, offset)
        if (magic, version) != (_LMDB_MAGIC, _LMDB_VERSION) or page_size not in _PAGE_SIZES:
            return None
        metas.append((number, (last_page + 1) * page_size, map_size))
        offset += page_size
    return _Geometry(*max(metas)[1:])


@contextlib.contextmanager
def _watched(seconds: float) -> Iterator[None]:
    """End this process when LMDB's own lock cannot be had: who holds it is no bednet-store, and nothing else helps."""

    def stuck() -> None:
        sys.stderr.write(f"bednet-store: {_BUSY.format(seconds)}\n")
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, stuck)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _words(exc: Exception) -> str:
    return getattr(exc, "strerror", None) or str(exc).split(": ", 1)[-1]


class _Guard:
    """Keeps revoked devices out that the site would let in without a later mark than the store has seen.

    :ivar reinstated: ids and reasons of those that it lets in again; ``kept`` of those that stay out.
    :ivar revoked: ids of those that the site revokes.
    """

    def __init__(self, run: _Run, mark_of: Callable[[bytes], bytes | None]) -> None:
        """Begin.

        :param mark_of: gives the record of a device's mark.
        """
        self._run, self._mark_of = run, mark_of
        self._settled: set[bytes] = set()
        self.reinstated: list[Json] = []
        self.kept: list[Json] = []
        self.revoked: list[str] = []

    def settle(self, key: bytes, before: bytes | None, after: bytes | None, latest: int) -> bytes | None:
        """Say what the record of a device shall be.

        :param after: as the site has it; None when the site no longer lists it.
        :param latest: the site's mark.
        """
        record = self._mark_of(key)
        mark = _mark(record)
        reason = mark.gone if before is None else _revoked(before)
        if after is None:
            # Forgotten by the site, and not by the store: who has an older list of devices must not bring it back.
            self._run.remember(key, record, mark._replace(gone=reason))
            return None
        if _revoked(after) is not None:
            if reason is None:
                self.revoked.append(key.decode())
        elif reason is not None:
            told = {"device": key.decode(), "reason": REASON_NAMES[reason]}
            if latest > mark.reinstated:
                self.reinstated.append(told)
            else:
                self.kept.append(told)
                after = Device.decode(after)._replace(revoked=reason, password=None, psk=None).encode()
        self._settled.add(key)
        self._run.remember(key, record, Mark(max(latest, mark.reinstated)))
        return after

    def remember(self, marks: Mapping[str, int]) -> None:
        """Note the marks of devices whose records are as they were."""
        for device_id, latest in marks.items():
            key = device_id.encode()
            if key not in self._settled and latest > _mark(record := self._mark_of(key)).reinstated:
                self._run.remember(key, record, Mark(latest))


def _apply(run: _Run, compiled: Compiled) -> Json:
    guard = _Guard(run, dict(run.old.items(b"marks")).get)

    def note(key: bytes, before: bytes | None, after: bytes | None) -> bytes | None:
        return guard.settle(key, before, after, compiled.reinstated.get(key.decode(), 0))

    new = ((key, device.encode()) for key, device in compiled.devices())
    devices = run.merge(b"devices", DEVICE_CHANGED, new, note)
    guard.remember(compiled.reinstated)
    profiles = run.merge(b"profiles", PROFILE_CHANGED, sorted(compiled.profiles.items()))
    zones = run.merge(b"zones", EVERYTHING_CHANGED, sorted(compiled.zones.items()))
    serials, older = _apply_serials(run, compiled.secrets)
    issuers = _apply_issuers(run, compiled)
    return {
        "added": devices["added"],
        "changed_devices": devices["changed"],
        "removed": devices["removed"],
        "profiles": sum(profiles.values()),
        "zones": sum(zones.values()),
        "issuers": issuers,
        "revoked_serials": serials,
        "older_crl": older,
        "revoked": guard.revoked,
        "reinstated": guard.reinstated,
        "kept_revoked": guard.kept,
        "without_secret": sorted(compiled.without_secret)[:TOLD],
        "unused_secrets": sorted(compiled.unused_passwords | compiled.unused_psk)[:TOLD],
    }


def _revoked(record: bytes) -> int | None:
    """Return for which reason a device's record says that it is revoked; None when it does not, or is no record."""
    if len(record) <= _FLAGS_AT + 1 or record[0] != 1 or not record[_FLAGS_AT] & REVOKED:
        return None
    return record[_FLAGS_AT + 1] if record[_FLAGS_AT + 1] in REASON_NAMES else REASONS["unspecified"]


def _mark(record: bytes | None) -> Mark:
    try:
        return Mark.decode(record)
    except Damaged:
        # Rather out than in: no site has a later mark than this.
        return Mark(_MOST_SECONDS)


def _crl_number(record: bytes | None) -> int:
    """Return the highest number of the CA's list so far."""
    return int(_U64.unpack(record)[0]) if record is not None and len(record) == _U64.size else 0


def _keep_compromised(run: _Run, key: bytes, before: bytes | None, device: Device, latest: int) -> None:
    """Refuse to make a compromise of a key less, unless the device was reinstated since."""
    mark = _mark(run.old.get(b"marks", key))
    reason = mark.gone if before is None else _revoked(before)
    if reason == COMPROMISED and device.revoked not in (None, COMPROMISED) and latest <= mark.reinstated:
        raise Refused(
            f"{key.decode()} is revoked for keyCompromise, and that cannot be made less. "
            "Cure: revoke it for that reason, or leave it"
        )


def _apply_serials(run: _Run, secrets: Secrets) -> tuple[int, bool]:
    """Take over which certificates are revoked. An older list of the CA, or one of unknown age, takes none away.

    :returns: how many are different, and whether the list is older than one that was here.
    """
    known = run.old.get(META, CRL)
    number = secrets.crl_number
    last = _crl_number(known)
    wanted = {key: bytes((reason,)) for key, reason in secrets.serials.items()}
    if number is None or number < last:
        wanted = {**wanted, **dict(run.old.items(b"revoked"))}
    elif (record := _U64.pack(number)) != known:
        run.set(META, SILENT, CRL, known, record)
    different = run.merge(b"revoked", SERIAL_CHANGED, sorted(wanted.items()))
    return sum(different.values()), number is not None and number < last


def _apply_issuers(run: _Run, compiled: Compiled) -> int:
    """Make issuers and keys what the site says. :returns: how many issuers are different."""
    different: set[bytes] = set()
    wanted = sorted((issuer_key(iss), issuer.encode()) for iss, issuer in compiled.issuers.items())

    def note(key: bytes, _before: bytes | None, after: bytes | None) -> bytes | None:
        different.add(key)
        return after

    run.merge(b"issuers", SILENT, wanted, note)
    for iss, keys in compiled.keys.items():
        if keys is not None and _replace_keys(run, iss, keys):
            different.add(issuer_key(iss))
    known = {key for key, _ in wanted}
    for key, record in run.old.items(b"keys"):
        if key[:8] not in known:
            run.set(b"keys", SILENT, key, record, None)
            different.add(key[:8])
    for key in sorted(different):
        run.changes.add(ISSUER_CHANGED, key)
    return len(different)


def _replace_keys(run: _Run, iss: str, keys: Mapping[str, Key]) -> bool:
    """Make the keys of an issuer these. :returns: whether they were others."""
    issuer = issuer_key(iss)
    old = ((key, record) for key, record in run.old.items(b"keys") if key[:8] == issuer)
    new = sorted((key_key(iss, kid), key.encode()) for kid, key in keys.items())
    differences = list(_differences(old, new))
    for key, before, after in differences:
        run.set(b"keys", SILENT, key, before, after)
    return bool(differences)


def _issuer(old: _Old, iss: str) -> Issuer:
    record = old.get(b"issuers", issuer_key(iss)) if _encodable(iss) else None
    try:
        issuer = None if record is None else Issuer.decode(record)
    except Damaged as exc:
        raise Refused(f"the record of {iss!r} is damaged: {exc}. Cure: run playbooks/site.yml") from None
    if issuer is None or issuer.iss != iss:
        raise Refused(f"the store has no issuer {iss!r}. Cure: name one of policy.yml, and run playbooks/site.yml")
    return issuer


def _ahead(old: _Old, device_id: str) -> int:
    """Return by how many seconds the `iat` of a device's token may be ahead, and the token be taken."""
    leeways = [0]
    for _, record in old.items(b"issuers"):
        try:
            issuer = Issuer.decode(record)
        except Damaged:
            # Nobody can say any more; what ends too much is better here than what ends too little.
            return MOST_LEEWAY
        if device_id.startswith(issuer.prefix):
            leeways.append(issuer.leeway)
    return max(leeways)


def _device_id(value: object) -> bytes:
    if not isinstance(value, str) or not DEVICE_ID.fullmatch(value):
        raise Refused(f"{value!r} cannot be a device's id. Cure: name one as devices.yml does")
    return value.encode()


def _seconds(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MOST_SECONDS:
        raise Refused(f"{value!r} is not a time in unix seconds. Cure: give a whole number of seconds")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# What the store says, for people
# ---------------------------------------------------------------------------------------------------------------------


def _sound(device_id: str, record: bytes) -> Device:
    try:
        return Device.decode(record)
    except Damaged as exc:
        raise Refused(f"the record of {device_id} is damaged: {exc}. Cure: run playbooks/site.yml") from None


def _show_device(device_id: str, device: Device) -> Json:
    ways = {
        "certificate": device.certificate,
        "password": device.password,
        "psk": device.psk,
        "token": device.token,
    }
    return {
        "device": device_id,
        "profile": device.profile.hex(),
        "values": list(device.values),
        "authentication": [way for way, held in ways.items() if held],
        "until": device.until or None,
        "revoked": None if device.revoked is None else REASON_NAMES[device.revoked],
    }


def _show_profile(key: bytes, rules: Iterable[Rule]) -> Json:
    return {
        "profile": key.hex(),
        "rules": [
            {
                "id": rule.id,
                "effect": _name(EFFECTS, rule.effect),
                "access": _name(ACCESSES, rule.access),
                "topic": topic_parts(rule.topic),
                "during": [
                    {"days": window.days, "from": window.start, "to": window.end, "zone": window.zone.hex()}
                    for window in rule.windows
                ],
                "networks": [str(network) for network in rule.networks],
            }
            for rule in rules
        ],
    }


def _show_issuer(issuer: Issuer) -> Json:
    roles = [
        {"value": role.value, "profile": role.profile.hex(), "claims": list(role.claims)} for role in issuer.mappings
    ]
    separator = {_SEPARATOR: " "} if issuer.flags & ROLES_SPACED else {}
    return {
        "issuer": issuer.iss,
        "service": bool(issuer.flags & OWN_SERVICE),
        "audience": list(issuer.audience),
        "algorithms": [name for name, bit in ALGORITHMS.items() if issuer.algorithms & bit],
        "leeway": issuer.leeway,
        "longest": issuer.longest,
        "typ": list(issuer.typ),
        "scope": _name(SCOPES, issuer.flags & AIF_SCOPE),
        "claim": issuer.claim,
        "prefix": issuer.prefix,
        "roles": {"claim": issuer.roles, **separator, "map": roles} if issuer.flags & ROLES_MAPPED else None,
    }


def _shown_issuer(record: bytes) -> str:
    try:
        return Issuer.decode(record).iss
    except Damaged:
        return "?"


def _name(names: Mapping[str, int], number: int) -> str:
    return next(name for name, value in names.items() if value == number)


def _values_needed(rules: Iterable[Rule]) -> int:
    return max((part for rule in rules for part in topic_parts(rule.topic) if isinstance(part, int)), default=0)


def _damage(old: _Old) -> Iterator[str]:
    """Read every record, and say what is wrong with it and with what it refers to."""
    zones, profiles = set(), dict[bytes, int]()
    for key, record in old.items(b"zones"):
        try:
            zones.add(key)
            decode_zone(record)
        except Damaged as exc:
            yield f"zone {key.hex()}: {exc}"
    for key, record in old.items(b"profiles"):
        profiles[key] = 0
        try:
            rules = decode_profile(record)
        except Damaged as exc:
            yield f"profile {key.hex()}: {exc}"
            continue
        profiles[key] = _values_needed(rules)
        if not {window.zone for rule in rules for window in rule.windows} <= zones:
            yield f"profile {key.hex()}: a zone is missing"
    for key, record in old.items(b"devices"):
        try:
            device = Device.decode(record)
        except Damaged as exc:
            yield f"device {key.decode(errors='replace')}: {exc}"
            continue
        if device.profile not in profiles:
            yield f"device {key.decode()}: its profile is missing"
        elif len(device.values) < profiles[device.profile]:
            yield f"device {key.decode()}: it lacks values for its profile"
    for key, record in old.items(b"revoked"):
        if len(record) != 1 or record[0] not in REASON_NAMES:
            yield f"serial number {key.hex()}: it has no reason"
    yield from _token_damage(old, profiles)


def _token_damage(old: _Old, profiles: Mapping[bytes, int]) -> Iterator[str]:
    """Say what is wrong with issuers, keys and what was revoked of tokens.

    :param profiles: how many values each needs.
    """
    issuers = set()
    for key, record in old.items(b"issuers"):
        try:
            issuer = Issuer.decode(record)
        except Damaged as exc:
            yield f"issuer {key.hex()}: {exc}"
            continue
        issuers.add(key)
        if issuer_key(issuer.iss) != key:
            yield f"issuer {issuer.iss}: it stands in the wrong place"
        for mapping in issuer.mappings:
            if mapping.profile not in profiles:
                yield f"issuer {issuer.iss}: a profile is missing"
            elif len(mapping.claims) < profiles[mapping.profile]:
                yield f"issuer {issuer.iss}: it lacks claims for a profile"
    for key, record in old.items(b"keys"):
        try:
            if hashlib.sha256(Key.decode(record).kid.encode()).digest()[:8] != key[8:] or key[:8] not in issuers:
                yield f"key {key.hex()}: it stands in the wrong place"
        except Damaged as exc:
            yield f"key {key.hex()}: {exc}"
    readers: dict[bytes, tuple[str, Callable[[bytes], object]]] = {
        b"tokens": ("revoked token", decode_seconds),
        b"cutoffs": ("cutoff", decode_seconds),
        b"marks": ("mark", Mark.decode),
    }
    for database, (what, decode) in readers.items():
        for key, record in old.items(database):
            try:
                decode(record)
            except Damaged as exc:
                yield f"{what} {key.hex()}: {exc}"


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def _instant(text: str) -> int:
    """Read a time as devices.yml has it (RFC 3339). :returns: unix seconds."""
    try:
        at = dt.datetime.fromisoformat(text)
    except ValueError:
        at = dt.datetime.min
    if at.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 2026-12-31T17:00:00Z")
    return int(at.timestamp())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bednet-store",
        description="Keep the store that the broker's plugin decides from. One JSON object on stdout; exit code 0 "
        "fine, 1 refused or a problem found, 2 the command line is wrong.",
    )
    parser.add_argument("--store", type=Path, default=STORE, metavar="DIR", help="the store (default: %(default)s)")
    parser.add_argument("--group", help=f"who may read the store (default: {GROUP}, if there is such a group)")
    # They may stand behind the command as well.
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--store", type=Path, default=argparse.SUPPRESS, metavar="DIR", help=argparse.SUPPRESS)
    common.add_argument("--group", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    apply = commands.add_parser(
        "apply", parents=[common], help="make the store what a compiled site says; secrets as JSON on stdin"
    )
    apply.add_argument("compiled", type=Path, metavar="COMPILED", help="what bednet compile --output wrote")
    apply.add_argument("--check", action="store_true", help="dry run: tell what would change, and write nothing")
    commands.add_parser(
        "put", parents=[common], help="write one device: on stdin what bednet compile --device or --entry says"
    )
    revoke = commands.add_parser("revoke", parents=[common], help="refuse a device from now on")
    revoke.add_argument("--reason", required=True, choices=REASONS, help="RFC 5280, 5.3.1")
    reinstate = commands.add_parser(
        "reinstate", parents=[common], help="let a revoked device in again, not after keyCompromise"
    )
    for command in (revoke, reinstate):
        command.add_argument("device", metavar="ID")
    revoke.add_argument(
        "--reinstated",
        type=_instant,
        default=0,
        metavar="TIME",
        help="its 'reinstated' in devices.yml, if any: no such or older one lets it in again",
    )
    commands.add_parser(
        "crl", parents=[common], help="refuse the certificates that the CA's verified list names: JSON on stdin"
    )
    keys = commands.add_parser("keys", parents=[common], help="take over an issuer's public keys: a JWKS on stdin")
    token = commands.add_parser("revoke-token", parents=[common], help="refuse one token from now on")
    token.add_argument("issuer", metavar="ISS", help="its issuer")
    token.add_argument("jti", metavar="JTI", help="its name")
    token.add_argument("expires", type=int, metavar="EXP", help="when it ends, in unix seconds")
    token.add_argument("device", metavar="DEVICE", help="whose it is")
    cutoff = commands.add_parser("cutoff", parents=[common], help="refuse all tokens that a device got until then")
    cutoff.add_argument("device", metavar="DEVICE")
    cutoff.add_argument(
        "until", type=int, nargs="?", metavar="SECONDS", help="unix seconds; else whatever would be good at this moment"
    )
    revocations = commands.add_parser(
        "revocations", parents=[common], help="refuse what the site's token service revoked: its verified list on stdin"
    )
    kids = commands.add_parser("kids", parents=[common], help="name the keys of an issuer that the store has")
    for command in (keys, kids, revocations):
        command.add_argument("issuer", metavar="ISS", help="the issuer, as in policy.yml")
    status = commands.add_parser("status", parents=[common], help="read-only health of the store")
    status.add_argument("--deep", action="store_true", help="read every record")
    dump = commands.add_parser("dump", parents=[common], help="what the store says, as JSON lines, without secrets")
    dump.add_argument("device", nargs="?", metavar="ID")
    return parser


def _from_stdin(most: int = MOST_JWKS) -> object:
    """Read JSON that came from a network."""
    text = _bytes_from_stdin(most, "look where it comes from")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Refused("stdin is not JSON. Cure: look where it comes from") from None


def _text_from_stdin() -> str:
    cure = "give what bednet compile --device or --entry says"
    try:
        return _bytes_from_stdin(MOST_PUT, cure).decode()
    except UnicodeDecodeError:
        raise Refused(f"stdin is not UTF-8. Cure: {cure}") from None


def _bytes_from_stdin(most: int, cure: str) -> bytes:
    text = sys.stdin.buffer.read(most + 1)
    if len(text) > most:
        raise Refused(f"stdin has more than {most} bytes. Cure: {cure}")
    return text


def _run(options: argparse.Namespace) -> int:  # noqa: PLR0912 - one for each command
    store = Store(options.store, group=options.group)
    match options.command:
        case "apply":
            secrets = json.loads(sys.stdin.read())
            result = store.apply(CompiledFile(options.compiled), secrets, check=options.check)
        case "put":
            result = store.put(_text_from_stdin())
        case "crl":
            result = store.add_serials(_from_stdin(MOST_CRL))
        case "keys":
            result = store.set_keys(options.issuer, _from_stdin())
        case "kids":
            result = store.kids(options.issuer)
        case "revoke-token":
            result = store.revoke_token(options.issuer, options.jti, options.expires, options.device)
        case "cutoff":
            result = store.cutoff(options.device, options.until)
        case "revocations":
            result = store.revocations(options.issuer, _from_stdin(MOST_REVOCATIONS))
        case "revoke":
            result = store.revoke(options.device, options.reason, options.reinstated)
        case "reinstate":
            result = store.reinstate(options.device)
        case "status":
            result = store.status(deep=options.deep)
        case _:
            for line in store.dump(options.device):
                sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
            return 0
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    if problems := result.get("problems"):
        sys.stderr.write(f"bednet-store {options.command}: {'; '.join(problems)}\n")
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. :returns: the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except Refused as exc:
        sys.stderr.write(f"bednet-store {options.command}: {exc}\n")
    except ValueError:
        # Not the text itself: it holds secrets.
        sys.stderr.write("bednet-store: stdin is not JSON. Cure: give the secrets; see docs/store.md\n")
    except BrokenPipeError:
        # Whoever read what we say has enough, as `head` has.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


if __name__ == "__main__":
    sys.exit(main())
