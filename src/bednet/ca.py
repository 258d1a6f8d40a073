# SPDX-License-Identifier: Apache-2.0
"""The tool of the CA host: signs, renews and revokes everything that the issuing CA signs.

``bednet-ca [--home DIR] [--check] COMMAND`` reads one JSON object on stdin and writes one on stdout. Commands:

- ``sign-server``: the CSR of a gateway or of the token service becomes its server certificate.
- ``sync-devices``: certificates, passwords, other secrets and bundles follow the site's list of devices.
- ``revoke``: one device loses all of them at once, whatever the state of the site's other files.
- ``probe``: the identity of ``bednet verify``, and the revoked canary.
- ``crl``: renews the revocation list before it gets old.
- ``status``: read-only health of the CA; exit code 1 when somebody has to act.

This file runs alone: Python 3.11 and python3-cryptography 38 or later, nothing else.

No certificate exists that the index does not know. A run writes in this order, each file atomically, under a lock:

1. ``state/passwords.json``: new passwords, client secrets and pre-shared keys, and what is on its way to a bundle
   (``pending``),
2. ``state/index.json``: new certificates, revocations. This is the point of no return,
3. ``publish/``: the CRL, so that a revocation takes effect before anything else,
4. ``issued/``, ``bundles/``: both can be made again from 1 and 2,
5. ``state/passwords.json`` without what has arrived.

A run that was interrupted anywhere is completed by the next one.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import re
import secrets
import shutil
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

PublicKey: TypeAlias = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
PrivateKey: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Json: TypeAlias = dict[str, Any]

HOME = Path("/var/lib/bednet-ca")
# Gateways without a clock of their own may be late: what is signed now is valid a little earlier.
BACKDATE = timedelta(hours=1)
KEY_TYPES = ("P-256", "P-384", "RSA-2048", "RSA-3072", "RSA-4096", "Ed25519")
RSA_BITS = (2048, 4096)
REASONS = (
    "unspecified",
    "keyCompromise",
    "affiliationChanged",
    "superseded",
    "cessationOfOperation",
    "privilegeWithdrawn",
)
AUTHENTICATION = ("certificate", "password", "psk", "token")
# How a device proves itself to the token service (OAuth 2.0; RFC 8705 2.1, RFC 7523, RFC 6749 2.3.1).
TOKEN_AUTHENTICATION = ("tls_client_auth", "private_key_jwt", "client_secret_basic")
# What the CSR that sign-server signs is for. Each is told what it needs, and not what the other needs.
GATEWAY, TOKEN_SERVICE = "gateway", "token_service"
# The kinds of entries in the index that are servers.
SERVERS = {GATEWAY: "server", TOKEN_SERVICE: "token-service"}
# The folders that the tool writes to are its own; the one above them, and the keys of the CAs, are root's.
INDEX = "state/index.json"
PASSWORDS = "state/passwords.json"
DEVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# 64 is what a CN holds (RFC 5280 A.1, ub-common-name).
SERVER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DNS_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
RESERVED = "bednet-"
PROBE, CANARY = "bednet-probe", "bednet-canary"
# The canary outlives many probes, since its renewal changes the CRL on every gateway. sync-devices, which is followed
# by a roll-out of the CRL, renews it early; probe only when it must.
CANARY_LIFE, CANARY_RENEWAL, CANARY_LAST_MOMENT = timedelta(days=365), timedelta(days=60), timedelta(days=1)
DEFAULT_CRL_DAYS = 7.0
MOST_DAYS = 36_500
DEFAULT_WARN_DAYS = 30.0
# Iterations slow down who guesses. Our passwords are 256 random bits, made here, so there is nothing to guess; but each
# connection costs the broker's only thread this work. 101 is Mosquitto's own default, and so is the salt's length.
PASSWORD_ITERATIONS = 101
PASSWORD_SALT_BYTES = 12
PASSWORD_BYTES = 32
# Mosquitto and its clients take a pre-shared key as hex digits.
PSK_BYTES = 32
# From here on one sync of the whole file system is cheaper than one for each file.
FSYNC_EACH = 16


class Refused(Exception):  # noqa: N818  (a refusal is an answer, not a fault of the program)
    """Nothing was changed; the message is one sentence with its cure."""


# ---------------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------------


class Fields:
    """Take the fields of a JSON object one by one; whatever is left in the end is refused."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise Refused(f"{where} must be a JSON object, not {type(data).__name__}. Cure: see bednet-ca --help")
        self._data: Json = dict(data)
        self._where = where

    def __contains__(self, name: str) -> bool:
        return name in self._data

    def take(self, name: str, kinds: tuple[type, ...], expected: str, default: object = ...) -> Any:
        """Take one field of one of these types.

        :raises Refused: when it is missing without a default, or of another type.
        """
        value = self._data.pop(name, default)
        if value is ...:
            raise Refused(f'{self._where} lacks "{name}" ({expected}). Cure: add it')
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if wrong and value is not default:
            raise Refused(f'{self._where}: "{name}" must be {expected}, not {value!r}. Cure: correct it')
        return value

    def text(self, name: str, default: object = ...) -> Any:
        """Take a string; None is allowed where it is the default."""
        return self.take(name, (str,), "a string", default)

    def texts(self, name: str, default: object = ...) -> tuple[str, ...]:
        """Take a list of strings."""
        value = self.take(name, (list,), "a list of strings", default)
        if not all(isinstance(item, str) for item in value):
            raise Refused(f'{self._where}: "{name}" must be a list of strings, not {value!r}. Cure: correct it')
        return tuple(value)

    def days(self, name: str, default: object = ..., *, zero: bool = False) -> timedelta:
        """Take a number of days; zero only where asked for."""
        value = self.take(name, (int, float), "a number of days", default)
        if not 0 <= value <= MOST_DAYS or (value == 0 and not zero):
            raise Refused(f'{self._where}: "{name}" must be a number of days above 0, not {value!r}. Cure: correct it')
        return timedelta(seconds=round(value * 86_400))

    def done(self) -> None:
        """Refuse what nobody took: an option that is ignored is worse than an error."""
        if self._data:
            raise Refused(f"{self._where} has unknown fields: {', '.join(sorted(self._data))}. Cure: remove them")


def _lifetime(fields: Fields) -> tuple[timedelta, timedelta]:
    days, renew = fields.days("days"), fields.days("renew_before_days", zero=True)
    if renew >= days:
        raise Refused(
            f"renew_before_days ({renew / timedelta(days=1):g}) is not less than days ({days / timedelta(days=1):g}): "
            "every run would issue anew. Cure: make it smaller"
        )
    return days, renew


@dataclass(frozen=True)
class Device:
    """A device as the site lists it."""

    id: str
    authentication: tuple[str, ...]
    enrolment: str
    csr: str | None
    revoked: str | None
    token: str | None = None

    @classmethod
    def parse(cls, data: object) -> Device:
        """Read one of ``devices``."""
        fields = Fields(data, "a device")
        name = fields.text("id")
        if not DEVICE_ID.fullmatch(name) or name.startswith(RESERVED):
            raise Refused(
                f"{name!r} cannot be a device's id. Cure: letters, digits, - and _, at most 64, beginning with a "
                f"letter or digit, and not with {RESERVED!r}"
            )
        fields = Fields(data, f"device {name}")
        device = cls(
            id=fields.text("id"),
            authentication=fields.texts("authentication", ["certificate"]),
            enrolment=fields.text("enrolment", "bundle"),
            csr=fields.text("csr", None),
            revoked=fields.text("revoked", None),
            token=fields.text("token", None),
        )
        fields.done()
        if not device.authentication or not set(device.authentication) <= set(AUTHENTICATION):
            raise Refused(
                f"device {name}: authentication must be some of {', '.join(AUTHENTICATION)}. Cure: correct it"
            )
        if device.enrolment not in ("bundle", "csr"):
            raise Refused(f"device {name}: enrolment must be bundle or csr, not {device.enrolment!r}. Cure: correct it")
        if device.revoked is not None and device.revoked not in REASONS:
            raise Refused(f"device {name}: revoked must be one of {', '.join(REASONS)}. Cure: correct it")
        if (device.token in TOKEN_AUTHENTICATION) != ("token" in device.authentication):
            raise Refused(
                f"device {name}: token must be one of {', '.join(TOKEN_AUTHENTICATION)} where authentication has "
                f"token, and null elsewhere, not {device.token!r}. Cure: correct it"
            )
        return device

    @property
    def wants_certificate(self) -> bool:
        """Whether it may hold a certificate: for the brokers, or to prove itself to the token service."""
        return self.revoked is None and (
            "certificate" in self.authentication or self.token in ("tls_client_auth", "private_key_jwt")
        )

    @property
    def wants_password(self) -> bool:
        """Whether it may hold a password."""
        return self.revoked is None and "password" in self.authentication

    @property
    def wants_psk(self) -> bool:
        """Whether it may hold a pre-shared key."""
        return self.revoked is None and "psk" in self.authentication

    @property
    def wants_client_secret(self) -> bool:
        """Whether it may hold a secret for the token service."""
        return self.revoked is None and self.token == "client_secret_basic"  # noqa: S105  (the name of a method)


# ---------------------------------------------------------------------------------------------------------------------
# Keys, CSRs, names
# ---------------------------------------------------------------------------------------------------------------------


def moment(thing: object, name: str) -> datetime:
    """Read a date of a certificate or CRL as aware UTC: ``name`` is ``not_valid_after`` and the like.

    cryptography has the aware ``..._utc`` from 42 on and warns about the naive one since.
    """
    aware = getattr(thing, name + "_utc", None)
    value: datetime = aware if aware is not None else getattr(thing, name)
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def fingerprint(key: PublicKey) -> str:
    """Name a public key: SHA-256 over its SubjectPublicKeyInfo, hex."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def key_name(key: object) -> str:
    """Say of what kind a public key is, in the words of ``KEY_TYPES`` where it is one of them."""
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA-{key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}.get(key.curve.name, key.curve.name)
    if isinstance(key, ed25519.Ed25519PublicKey):
        return "Ed25519"
    if isinstance(key, ed448.Ed448PublicKey):
        return "Ed448"
    return type(key).__name__.strip("_").removesuffix("PublicKey")


def make_key(key_type: str) -> PrivateKey:
    """Make a private key of one of ``KEY_TYPES``."""
    if key_type == "Ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    if key_type.startswith("RSA-"):
        return rsa.generate_private_key(public_exponent=65537, key_size=int(key_type[4:]))
    return ec.generate_private_key({"P-256": ec.SECP256R1, "P-384": ec.SECP384R1}[key_type]())


def hash_password(password: str, salt: bytes) -> str:
    """Return the hash that Mosquitto's password_file holds: PBKDF2 with SHA-512 (RFC 8018 5.2)."""
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, PASSWORD_ITERATIONS)
    return f"$7${PASSWORD_ITERATIONS}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def is_password(password: str, line: str | None) -> bool:
    """Whether a password belongs to a hash that :func:`hash_password` made."""
    return line is not None and hash_password(password, base64.b64decode(line.split("$")[3])) == line


def key_pem(key: PrivateKey) -> str:
    """Write a private key as PKCS #8 PEM, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def read_csr(pem: str, owner: str) -> tuple[x509.CertificateSigningRequest, PublicKey]:
    """Read a CSR whose signature is valid and whose key we accept. Nothing else in it is believed (RFC 2986 4.2).

    :raises Refused: with the reason.
    """
    try:
        csr = x509.load_pem_x509_csr(pem.encode())
        key = csr.public_key()
        valid = csr.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as exc:
        raise Refused(f"the CSR of {owner} cannot be read ({exc}). Cure: make it again") from exc
    if not valid:
        raise Refused(f"the CSR of {owner} is not signed with its own key. Cure: make it again on {owner}")
    kind = key_name(key)
    if isinstance(key, rsa.RSAPublicKey) and RSA_BITS[0] <= key.key_size <= RSA_BITS[1]:
        return csr, key
    if isinstance(key, (ec.EllipticCurvePublicKey, ed25519.Ed25519PublicKey)) and kind in KEY_TYPES:
        return csr, key
    raise Refused(
        f"the CSR of {owner} has a key of type {kind}. Cure: make a key of type P-256, P-384, Ed25519 or RSA with "
        f"{RSA_BITS[0]} to {RSA_BITS[1]} bits"
    )


def _check_common_name(csr: x509.CertificateSigningRequest, device: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about an empty CN, which we accept
        try:
            names = [str(name.value) for name in csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        except ValueError as exc:
            raise Refused(f"the subject in the CSR of {device} cannot be read ({exc}). Cure: make it again") from exc
    if names not in ([], [""], [device]):
        raise Refused(f"the CSR of {device} is for {', '.join(map(repr, names))}. Cure: make it with CN={device}")


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether the issuer's key made this signature (``verify_directly_issued_by`` is newer than Debian 12)."""
    key, data, signature = issuer.public_key(), certificate.tbs_certificate_bytes, certificate.signature
    algorithm = certificate.signature_hash_algorithm
    if certificate.issuer != issuer.subject:
        return False
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, data)
        elif isinstance(key, ec.EllipticCurvePublicKey) and algorithm is not None:
            key.verify(signature, data, ec.ECDSA(algorithm))
        elif isinstance(key, rsa.RSAPublicKey) and algorithm is not None:
            key.verify(signature, data, padding.PKCS1v15(), algorithm)
        else:
            return False
    except InvalidSignature:
        return False
    return True


def check_names(issuing: x509.Certificate, subject: x509.Name, dns: Iterable[str], ip: Iterable[Address]) -> None:
    """Hold names against the name constraints of the issuing CA (RFC 5280 4.2.1.10).

    A certificate outside them would be signed without complaint and refused by every client.

    :raises Refused: naming the first name that is outside.
    """
    try:
        constraints = issuing.extensions.get_extension_for_class(x509.NameConstraints).value
    except x509.ExtensionNotFound:
        return
    permitted, excluded = constraints.permitted_subtrees or [], constraints.excluded_subtrees or []

    def inside(name: object, subtree: x509.GeneralName) -> bool:
        if isinstance(subtree, x509.DNSName) and isinstance(name, str):
            base = subtree.value.lower().lstrip(".")
            return base in ("", name) or name.endswith("." + base)
        if isinstance(subtree, x509.IPAddress) and isinstance(name, (ipaddress.IPv4Address, ipaddress.IPv6Address)):
            network = ipaddress.ip_network(str(subtree.value))
            return name.version == network.version and name in network
        if isinstance(subtree, x509.DirectoryName) and isinstance(name, x509.Name):
            return name.rdns[: len(subtree.value.rdns)] == subtree.value.rdns
        return False

    def check(names: Iterable[object], kind: type[x509.GeneralName], what: str) -> None:
        allowed = [subtree for subtree in permitted if isinstance(subtree, kind)]
        for name in names:
            shown = name.rfc4514_string() if isinstance(name, x509.Name) else name
            if any(inside(name, subtree) for subtree in excluded) or (
                allowed and not any(inside(name, subtree) for subtree in allowed)
            ):
                within = ", ".join(_show(subtree) for subtree in allowed) or "all but what it excludes"
                raise Refused(
                    f"{what} {shown} is outside the name constraints of the issuing CA (permitted: {within}). "
                    "Cure: use a name inside them, or make an issuing CA with wider ones"
                )

    check(dns, x509.DNSName, "DNS name")
    check(ip, x509.IPAddress, "IP address")
    check([subject], x509.DirectoryName, "subject")


def _show(name: x509.GeneralName) -> str:
    value = name.value
    return value.rfc4514_string() if isinstance(value, x509.Name) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# The authority
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Authority:
    """Root, issuing CA and the issuing CA's key."""

    root: x509.Certificate
    issuing: x509.Certificate
    key: PrivateKey

    @classmethod
    def load(cls, home: Path) -> Authority:
        """Read them. :raises Refused: when a file is missing, unreadable or readable by others."""
        path = home / "issuing/issuing.key"
        try:
            root = x509.load_pem_x509_certificate((home / "root/root.pem").read_bytes())
            issuing = x509.load_pem_x509_certificate((home / "issuing/issuing.pem").read_bytes())
            # Its group is the tool's own: the file itself is root's.
            if path.stat().st_mode & 0o037:
                raise Refused(f"{path} can be read by others. Cure: chmod 640 {path}, and think about who read it")
            key = load_pem_private_key(path.read_bytes(), password=None)
        except OSError as exc:
            raise Refused(
                f"{exc.filename}: {exc.strerror}. Cure: run playbooks/site.yml, whose role ca makes it"
            ) from exc
        except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
            raise Refused(f"a certificate or key under {home} cannot be read ({exc}). Cure: restore it") from exc
        if not isinstance(key, (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey, ed25519.Ed25519PrivateKey)):
            raise Refused(
                f"{path} is a key of type {key_name(key.public_key())}. Cure: use one of {', '.join(KEY_TYPES)}"
            )
        return cls(root, issuing, key)

    def problems(self, now: datetime, warn: timedelta = timedelta(0)) -> list[str]:
        """Say what keeps this CA from signing at ``now``, or will within ``warn``."""
        found = []
        for name, certificate in (("root CA", self.root), ("issuing CA", self.issuing)):
            start, end = moment(certificate, "not_valid_before"), moment(certificate, "not_valid_after")
            cure = f"Cure: renew the {name} (role ca), then run playbooks/site.yml"
            if now > end:
                found.append(f"the certificate of the {name} expired on {stamp(end)}. {cure}")
            elif now < start:
                found.append(f"the certificate of the {name} is not valid before {stamp(start)}. Cure: set the clock")
            elif now + warn > end:
                found.append(f"the certificate of the {name} expires on {stamp(end)}. {cure}")
        if fingerprint(self.key.public_key()) != self.id:
            found.append("issuing.key does not belong to issuing.pem. Cure: restore the pair from one backup")
        if not _signed_by(self.issuing, self.root):
            found.append("issuing.pem is not signed by root.pem. Cure: restore the pair from one backup")
        try:
            constraints = self.issuing.extensions.get_extension_for_class(x509.BasicConstraints).value
            usage = self.issuing.extensions.get_extension_for_class(x509.KeyUsage).value
            may_sign = constraints.ca and usage.key_cert_sign and usage.crl_sign
        except x509.ExtensionNotFound:
            may_sign = False
        if not may_sign:
            found.append("issuing.pem may not sign certificates and CRLs. Cure: make it again with the role ca")
        return found

    @cached_property
    def id(self) -> str:
        """The issuing key's fingerprint: what was signed with another key has to be signed again."""
        return fingerprint(self.issuing.public_key())  # type: ignore[arg-type]

    @cached_property
    def issuing_pem(self) -> str:
        """The issuing certificate."""
        return self.issuing.public_bytes(Encoding.PEM).decode()

    @cached_property
    def ca_pem(self) -> str:
        """What a peer trusts: issuing and root certificate."""
        return self.issuing_pem + self.root.public_bytes(Encoding.PEM).decode()

    @cached_property
    def hash(self) -> hashes.SHA256 | hashes.SHA384 | None:
        """The hash that goes with the issuing key."""
        if isinstance(self.key, ed25519.Ed25519PrivateKey):
            return None
        wide = isinstance(self.key, ec.EllipticCurvePrivateKey) and self.key.curve.key_size > 256  # noqa: PLR2004
        return hashes.SHA384() if wide else hashes.SHA256()

    def key_identifier(self) -> x509.AuthorityKeyIdentifier:
        """Name the issuing key in what it signs (RFC 5280 4.2.1.1)."""
        try:
            ski = self.issuing.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        except x509.ExtensionNotFound:
            return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ski)

    def subject(self, name: str) -> x509.Name:
        """Name a leaf: our organisation and its CN."""
        organisation = self.issuing.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[:1]
        return x509.Name([*organisation, x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def end(self, now: datetime, days: timedelta, renew: timedelta) -> datetime:
        """When a certificate made now shall end: never after the issuing CA.

        :raises Refused: when it would have to be renewed at once.
        """
        last = moment(self.issuing, "not_valid_after")
        if last - now <= renew:
            raise Refused(
                f"the issuing CA expires on {stamp(last)}, within the renewal window of what it should sign. "
                "Cure: renew the issuing CA (role ca), then run playbooks/site.yml"
            )
        return min(now + days, last)


# ---------------------------------------------------------------------------------------------------------------------
# The index
# ---------------------------------------------------------------------------------------------------------------------


def stamp(when: datetime) -> str:
    """Write a moment as 2026-01-31T23:59:59Z."""
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def unstamp(text: str) -> datetime:
    """Read what ``stamp`` wrote."""
    return datetime.fromisoformat(text)


@dataclass(frozen=True)
class Entry:
    """One certificate that was ever issued. Dates are what ``stamp`` writes: they sort as they are."""

    serial: str
    id: str
    kind: str  # server, token-service, device, probe, canary
    enrolment: str  # csr: its owner made the key; bundle: we did
    key: str  # fingerprint of its public key
    issuer: str  # fingerprint of the issuing key
    not_before: str
    not_after: str
    names: tuple[str, ...] = ()  # subject alternative names
    reason: str | None = None
    revoked_at: str | None = None
    pem: str | None = None  # until it expires: then issued/ alone has it

    def expired(self, now: datetime) -> bool:
        """Whether it is over: the second of notAfter still counts as valid (RFC 5280 4.1.2.5)."""
        return stamp(now) > self.not_after

    def good(self, authority: Authority, now: datetime, renew: timedelta) -> bool:
        """Whether there is no need for another one."""
        return self.reason is None and self.issuer == authority.id and now < unstamp(self.not_after) - renew


class Store:
    """What lies under ``--home``. In check mode it notes what it would write, and writes nothing."""

    def __init__(self, home: Path, *, check: bool) -> None:
        self.home = home
        self.check = check
        self.changed = False
        self.entries: dict[str, Entry] = {}
        self.crl_days = DEFAULT_CRL_DAYS
        self.passwords: dict[str, str] = {}
        self.psk: dict[str, str] = {}
        self.client_secrets: dict[str, str] = {}
        self.probe_password: str | None = None
        self.pending: dict[str, dict[str, str]] = {}
        self.canary_key: str | None = None
        self._queue: list[tuple[Path, Path]] = []
        self._folders: set[Path] = set()
        self._dirty = False
        self._load()
        self._issued = self.names("issued")

    def _load(self) -> None:
        index, kept = self._json(INDEX), self._json(PASSWORDS)
        try:
            for serial, data in index.get("certificates", {}).items():
                self.entries[serial] = Entry(serial=serial, **{**data, "names": tuple(data.get("names", ()))})
            self.crl_days = float(index.get("crl_days", DEFAULT_CRL_DAYS))
            self.passwords = kept.get("passwords", {})
            self.psk = kept.get("psk", {})
            self.client_secrets = kept.get("client_secrets", {})
            self.pending = kept.get("pending", {})
            self.probe_password = kept.get("probe_password")
            self.canary_key = kept.get("canary_key")
        except (TypeError, ValueError, AttributeError) as exc:
            raise Refused(f"{self.home}/{INDEX} or {PASSWORDS} is damaged ({exc}). Cure: restore a backup") from exc

    def _json(self, name: str) -> Json:
        content = self.read(name)
        try:
            value = json.loads(content) if content is not None else {}
        except ValueError as exc:
            raise Refused(f"{self.home / name} is damaged ({exc}). Cure: restore it from a backup") from exc
        if not isinstance(value, dict):
            raise Refused(f"{self.home / name} is damaged (no JSON object). Cure: restore it from a backup")
        return value

    def read(self, name: str) -> bytes | None:
        """Read a file; None when there is none."""
        try:
            return (self.home / name).read_bytes()
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> set[str]:
        """List a folder; temporary files left by an interrupted run do not count."""
        try:
            return {name for name in os.listdir(self.home / folder) if not name.startswith(".")}
        except FileNotFoundError:
            return set()

    def write(self, name: str, text: str | bytes, mode: int) -> None:
        """Queue a file, unless it has this content already; ``flush`` puts it in place."""
        data = text.encode() if isinstance(text, str) else text
        if self.read(name) == data:
            return
        self.changed = True
        if self.check:
            return
        path = self.home / name
        # One run at a time holds the lock, so the name may be fixed, and a leftover is overwritten.
        temporary = path.with_name(f".{path.name}.tmp")
        if path.parent not in self._folders:
            for folder in reversed(path.relative_to(self.home).parents[:-1]):
                (self.home / folder).mkdir(
                    mode=0o700 if folder.parts[0] in {"bundles", "state"} else 0o755, exist_ok=True
                )
            self._folders.add(path.parent)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
        self._queue.append((temporary, path))

    def flush(self) -> None:
        """Put the queued files in place: content on disk first, then the names, then the folders."""
        if not self._queue:
            return
        many = len(self._queue) > FSYNC_EACH
        if many:
            os.sync()
        for temporary, path in self._queue:
            if not many:
                _fsync(temporary)
            _rename(temporary, path)
        if many:
            os.sync()
        else:
            for folder in sorted({path.parent for _, path in self._queue}):
                _fsync(folder)
        self._queue = []

    def add(self, entry: Entry) -> None:
        """Take a certificate into the index, or replace what the index says about it."""
        self.entries[entry.serial] = entry
        self._dirty = True

    def revoke(self, entry: Entry, reason: str, now: datetime) -> None:
        """Revoke; the date of an earlier revocation stays."""
        self.add(replace(entry, reason=reason, revoked_at=entry.revoked_at or stamp(now)))

    def of(self, name: str, kind: str) -> list[Entry]:
        """All certificates of an identity, the one that lasts longest first."""
        found = [entry for entry in self.entries.values() if entry.id == name and entry.kind == kind]
        return sorted(found, key=lambda entry: entry.not_after, reverse=True)

    def by_key(self) -> dict[str, list[Entry]]:
        """All certificates by the fingerprint of their key."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries.values():
            found.setdefault(entry.key, []).append(entry)
        return found

    def set_crl_days(self, days: float) -> None:
        """Keep the CRL's validity for the commands that refresh it along the way."""
        self._dirty = self._dirty or days != self.crl_days
        self.crl_days = days

    def new_password(self, name: str) -> str:
        """Make an identity's password. Its hash is kept; the password itself is for the bundle alone."""
        password = secrets.token_urlsafe(PASSWORD_BYTES)
        self.passwords[name] = hash_password(password, secrets.token_bytes(PASSWORD_SALT_BYTES))
        return password

    def new_client_secret(self, name: str) -> str:
        """Make a device's secret for the token service, as passwords are made."""
        secret = secrets.token_urlsafe(PASSWORD_BYTES)
        self.client_secrets[name] = hash_password(secret, secrets.token_bytes(PASSWORD_SALT_BYTES))
        return secret

    def new_psk(self, name: str) -> str:
        """Make an identity's pre-shared key, in hex. It is kept: both ends of the handshake need the key itself."""
        self.psk[name] = secrets.token_hex(PSK_BYTES)
        return self.psk[name]

    def password_file(self) -> str:
        """Return what every broker's password_file holds: a line for each device with a password, and the probe's."""
        return "".join(f"{name}:{self.passwords[name]}\n" for name in sorted(self.passwords))

    def save_secrets(self) -> None:
        """Take step 1 and 5 of a run."""
        content: Json = {
            "passwords": self.passwords,
            "psk": self.psk,
            "client_secrets": self.client_secrets,
            "pending": self.pending,
            "probe_password": self.probe_password,
            "canary_key": self.canary_key,
        }
        if any(content.values()) or self.read(PASSWORDS) is not None:
            self.write(PASSWORDS, json.dumps(content, indent=1, sort_keys=True) + "\n", 0o600)
        self.flush()

    def save_index(self, now: datetime) -> None:
        """Step 2 of a run: from here on what was signed counts as issued."""
        if self._dirty:
            lines = []
            for serial, entry in self.entries.items():
                data = {
                    key: value for key, value in asdict(entry).items() if value not in (None, ()) and key != "serial"
                }
                if entry.expired(now):
                    data.pop("pem", None)
                lines.append(f"{json.dumps(serial)}: {json.dumps(data)}")
            body = ",\n".join(lines)
            text = f'{{"version": 1, "crl_days": {json.dumps(self.crl_days)}, "certificates": {{\n{body}\n}}}}\n'
            self.write(INDEX, text, 0o600)
            self.flush()

    def save_issued(self) -> None:
        """Step 4 of a run: also what an interrupted run left undone."""
        for serial, entry in self.entries.items():
            if entry.pem is not None and f"{serial}.pem" not in self._issued:
                self.write(f"issued/{serial}.pem", entry.pem, 0o644)

    def remove_bundle(self, name: str) -> None:
        """Delete a device's bundle."""
        self.changed = True
        if not self.check:
            shutil.rmtree(self.home / "bundles" / name)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(temporary: Path, path: Path) -> None:
    """Put one file in place (the tests let it fail here)."""
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# Signing
# ---------------------------------------------------------------------------------------------------------------------


def issue(
    store: Store,
    authority: Authority,
    key: PublicKey,
    *,
    name: str,
    kind: str,
    enrolment: str,
    now: datetime,
    end: datetime,
    dns: Collection[str] = (),
    ip: Collection[Address] = (),
    crl_url: str | None = None,
) -> Entry:
    """Sign a leaf certificate and take it into the index: for a server, or for a client, never for both.

    In check mode nothing is signed, and the entry has no PEM.

    :raises Refused: when a name is outside the issuing CA's name constraints.
    """
    subject = authority.subject(name)
    # OpenSSL takes a CN with a dot for a DNS name when there is no other.
    check_names(authority.issuing, subject, dns or ([name.lower()] if "." in name else []), ip)
    start = max(now - BACKDATE, moment(authority.issuing, "not_valid_before"))
    server = kind in SERVERS.values()
    serial = x509.random_serial_number()
    while f"{serial:040x}" in store.entries:
        serial = x509.random_serial_number()
    entry = Entry(
        serial=f"{serial:040x}",
        id=name,
        kind=kind,
        enrolment=enrolment,
        key=fingerprint(key),
        issuer=authority.id,
        not_before=stamp(start),
        not_after=stamp(end),
        names=_names(dns, ip),
    )
    if not store.check:
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority.issuing.subject)
            .public_key(key)
            .serial_number(serial)
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(encipherment=server and isinstance(key, rsa.RSAPublicKey)), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(authority.key_identifier(), critical=False)
        )
        if dns or ip:
            alternative = [
                *(x509.DNSName(item) for item in sorted(dns)),
                *(x509.IPAddress(item) for item in _sorted(ip)),
            ]
            builder = builder.add_extension(x509.SubjectAlternativeName(alternative), critical=False)
        if crl_url:
            points = [x509.DistributionPoint([x509.UniformResourceIdentifier(crl_url)], None, None, None)]
            builder = builder.add_extension(x509.CRLDistributionPoints(points), critical=False)
        certificate = builder.sign(authority.key, authority.hash)
        entry = replace(entry, pem=certificate.public_bytes(Encoding.PEM).decode())
    store.add(entry)
    return entry


def _key_usage(*, encipherment: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_encipherment=encipherment,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _sorted(addresses: Iterable[Address]) -> list[Address]:
    return sorted(addresses, key=lambda address: (address.version, int(address)))


def _names(dns: Iterable[str], ip: Iterable[Address]) -> tuple[str, ...]:
    return (*(f"DNS:{name}" for name in sorted(dns)), *(f"IP:{address}" for address in _sorted(ip)))


def _check_key(entries: Iterable[Entry], owner: str, kind: str, now: datetime) -> None:
    """Refuse a key that leaked, and a key that is somebody else's: one key, one identity.

    :param entries: the certificates of this key.
    """
    for entry in entries:
        if entry.reason == "keyCompromise":
            raise Refused(
                f"the key in the CSR of {owner} was revoked for keyCompromise (serial {entry.serial}). "
                f"Cure: make a new key and CSR on {owner}"
            )
        if (entry.id, entry.kind) != (owner, kind) and entry.reason is None and not entry.expired(now):
            raise Refused(
                f"the key in the CSR of {owner} belongs to {entry.id} (serial {entry.serial}). "
                f"Cure: make a key and CSR of its own on {owner}"
            )


def refresh_crl(store: Store, authority: Authority, now: datetime, refresh_before: timedelta | None = None) -> bool:
    """Step 3 of a run: publish ca.pem, and a new CRL when the index has a revocation that the last one lacks.

    With ``refresh_before`` also when the last one is that close to its nextUpdate. Expired certificates leave the list
    after one CRL has listed them past their end (RFC 5280 3.3).
    """
    last = _load_crl(store, authority)
    last_update = moment(last, "last_update") if last is not None else None
    listed = {f"{revoked.serial_number:040x}": _reason(revoked) for revoked in last or ()}
    wanted = {
        entry.serial: entry
        for entry in store.entries.values()
        if entry.reason is not None
        and entry.issuer == authority.id
        and not (entry.expired(now) and last_update is not None and stamp(last_update) > entry.not_after)
    }
    due = last is None or any(listed.get(serial) != entry.reason for serial, entry in wanted.items())
    if last is not None and refresh_before is not None:
        due = due or now >= moment(last, "next_update") - refresh_before
    content: x509.CertificateRevocationList | None = last
    if due:
        store.changed = True
        content = None if store.check else _sign_crl(store, authority, wanted.values(), last, now)
    if content is not None:
        store.write("publish/issuing.crl", content.public_bytes(Encoding.DER), 0o644)
        store.write("publish/issuing.crl.pem", content.public_bytes(Encoding.PEM), 0o644)
    store.write("publish/ca.pem", authority.ca_pem, 0o644)
    store.flush()
    return due


def _load_crl(store: Store, authority: Authority) -> x509.CertificateRevocationList | None:
    """Read the published CRL; one that is damaged or signed by another key counts as none."""
    data = store.read("publish/issuing.crl")
    if data is None:
        return None
    try:
        crl = x509.load_der_x509_crl(data)
        valid = crl.is_signature_valid(authority.issuing.public_key())  # type: ignore[arg-type]
        crl.extensions.get_extension_for_class(x509.CRLNumber)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound):
        return None
    return crl if valid else None


def _reason(revoked: x509.RevokedCertificate) -> str:
    try:
        return str(revoked.extensions.get_extension_for_class(x509.CRLReason).value.reason.value)
    except x509.ExtensionNotFound:
        return "unspecified"


def _sign_crl(
    store: Store,
    authority: Authority,
    entries: Iterable[Entry],
    last: x509.CertificateRevocationList | None,
    now: datetime,
) -> x509.CertificateRevocationList:
    # The clock as number stays monotonic even when publish/ is lost; the last number does when the clock is wrong.
    number = int(now.timestamp())
    if last is not None:
        number = max(number, last.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number + 1)
    # Of two lists OpenSSL takes the one with the later thisUpdate: a new list must never seem as old as the last.
    since = max(now - BACKDATE, moment(authority.issuing, "not_valid_before"))
    if last is not None:
        since = max(since, min(moment(last, "last_update") + timedelta(seconds=1), now))
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.issuing.subject)
        .last_update(since)
        .next_update(now + timedelta(days=store.crl_days))
        .add_extension(authority.key_identifier(), critical=False)
        .add_extension(x509.CRLNumber(number), critical=False)
    )
    for entry in entries:
        revoked = (
            x509.RevokedCertificateBuilder()
            .serial_number(int(entry.serial, 16))
            .revocation_date(unstamp(entry.revoked_at or stamp(now)))
        )
        if entry.reason != "unspecified":  # RFC 5280 5.3.1: left out instead
            revoked = revoked.add_extension(x509.CRLReason(x509.ReasonFlags(entry.reason)), critical=False)
        builder = builder.add_revoked_certificate(revoked.build())
    return builder.sign(authority.key, authority.hash)


def ensure_canary(store: Store, authority: Authority, now: datetime, renew: timedelta) -> Entry:
    """Keep one revoked certificate that every gateway has to refuse, together with its key."""
    longest = stamp(min(now + CANARY_LIFE, moment(authority.issuing, "not_valid_after")))
    for entry in store.of(CANARY, "canary"):
        ours = entry.issuer == authority.id and entry.key == _key_of(store.canary_key) and not entry.expired(now)
        if ours and (now < unstamp(entry.not_after) - renew or entry.not_after == longest):
            return entry
    key = make_key("P-256")
    store.canary_key = key_pem(key)
    end = authority.end(now, CANARY_LIFE, CANARY_LAST_MOMENT)
    public = key.public_key()
    entry = issue(store, authority, public, name=CANARY, kind="canary", enrolment="bundle", now=now, end=end)
    store.revoke(entry, "cessationOfOperation", now)
    return store.entries[entry.serial]


def ensure_probe_psk(store: Store) -> str:
    """Return the pre-shared key of ``bednet verify``."""
    return store.psk.get(PROBE) or store.new_psk(PROBE)


def ensure_probe_password(store: Store) -> str:
    """Return the password of ``bednet verify``, the one password that is kept: it has no bundle."""
    if store.probe_password is None or PROBE not in store.passwords:
        store.probe_password = store.new_password(PROBE)
    return store.probe_password


def _key_of(pem: str | None) -> str | None:
    """Name the public half of a private key in PEM; None when there is none."""
    if pem is None:
        return None
    return fingerprint(load_pem_private_key(pem.encode(), password=None).public_key())  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def sign_server(store: Store, authority: Authority, request: object, now: datetime) -> Json:
    """Sign the CSR of a gateway or of the token service, or return its certificate as long as that is good."""
    fields = Fields(request, "sign-server")
    name, pem, purpose = fields.text("name"), fields.text("csr"), fields.text("purpose", GATEWAY)
    assertions = fields.texts("private_key_jwt") if purpose == TOKEN_SERVICE else ()
    days, renew = _lifetime(fields)
    dns, addresses = [item.lower() for item in fields.texts("dns")], fields.texts("ip")
    crl_url = fields.text("crl_url", None)
    fields.done()
    if purpose not in SERVERS:
        raise Refused(f"sign-server: purpose must be one of {', '.join(SERVERS)}, not {purpose!r}. Cure: correct it")
    kind = SERVERS[purpose]
    if not SERVER_NAME.fullmatch(name):
        raise Refused(
            f"sign-server: {name!r} cannot be a gateway's name. Cure: letters, digits, dot, - and _, at most 64"
        )
    try:
        ip = [ipaddress.ip_address(address) for address in addresses]
    except ValueError as exc:
        raise Refused(f"sign-server {name}: {exc}. Cure: correct it") from exc
    for item in dns:
        if not DNS_NAME.fullmatch(item):
            raise Refused(f"sign-server {name}: {item!r} is not a host name (no wildcards). Cure: correct it")
    if not (dns or ip):
        raise Refused(f"sign-server {name}: no DNS name and no IP address. Cure: name what clients connect to")
    csr, key = read_csr(pem, name)
    names, mark = _names(set(dns), set(ip)), fingerprint(key)
    asked = _names_of(csr)
    if asked != names:
        raise Refused(
            f"the CSR of {name} is for {', '.join(asked) or 'no name'}, the request for {', '.join(names)}. "
            f"Cure: make the CSR with exactly the names of the request"
        )
    _check_key(store.by_key().get(mark, []), name, kind, now)
    mine = store.of(name, kind)
    # A gateway that lies about its names must not get those of another one. Several instances of the token service
    # stand behind one name.
    for entry in store.entries.values():
        taken = sorted(set(entry.names) & set(names))
        other = entry.kind in SERVERS.values() and (entry.id, entry.kind) != (name, kind)
        if entry.kind == kind == SERVERS[TOKEN_SERVICE]:
            other = False
        if other and taken and entry.reason is None and not entry.expired(now):
            raise Refused(
                f"{name} asks for {', '.join(taken)}, which the certificate of {entry.id} has. Cure: correct the "
                f"names, or if {entry.id} is gone, take it out of the inventory and run playbooks/site.yml first"
            )
    good = next((e for e in mine if e.key == mark and e.names == names and e.good(authority, now, renew)), None)
    for entry in mine:
        if entry.key != mark and entry.reason is None and not entry.expired(now):
            store.revoke(entry, "superseded", now)
    entry = good or issue(
        store,
        authority,
        key,
        name=name,
        kind=kind,
        enrolment="csr",
        now=now,
        end=authority.end(now, days, renew),
        dns=set(dns),
        ip=set(ip),
        crl_url=crl_url,
    )
    _save(store, authority, now)
    return {
        "changed": store.changed,
        "certificate": entry.pem,
        "chain": entry.pem and entry.pem + authority.issuing_pem,
        "ca": authority.ca_pem,
        "serial": entry.serial if entry.pem else None,
        "not_after": entry.not_after,
        "crl": (store.read("publish/issuing.crl.pem") or b"").decode(),
        **(_for_gateways(store, now) if purpose == GATEWAY else _for_token_service(store, authority, assertions, now)),
    }


def _for_gateways(store: Store, now: datetime) -> Json:
    """Return what every gateway holds connections against: secrets and revoked serial numbers."""
    return {
        "password_file": store.password_file(),
        "passwords": store.passwords,
        "psk": store.psk,
        "crl_number": _crl_number(store),
        "revoked_serials": _revoked_serials(store, now),
    }


def _crl_number(store: Store) -> int | None:
    """Return the number of the CA's list: by it a server tells an older one from a newer, and lets nobody back in."""
    crl = store.read("publish/issuing.crl.pem")
    if crl is None:
        return None
    return x509.load_pem_x509_crl(crl).extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def _for_token_service(store: Store, authority: Authority, assertions: Iterable[str], now: datetime) -> Json:
    """Return what the token service knows devices by.

    :param assertions: the devices that sign their requests (private_key_jwt): it gets their certificates, the one that
        lasts longest first, as PEM. A device whose new bundle is still under way uses the older key. Certificates, not
        keys: a key is good for as long as its certificate is, and no longer than until that is revoked.
    """
    certificates: dict[str, str] = {}
    for name in assertions:
        pems = [
            entry.pem
            for entry in store.of(name, "device")
            if entry.pem and entry.reason is None and entry.issuer == authority.id and not entry.expired(now)
        ]
        if pems:
            certificates[name] = "".join(pems)
    return {
        "client_secrets": store.client_secrets,
        "certificates": certificates,
        "crl_number": _crl_number(store),
        "revoked_serials": _revoked_serials(store, now),
    }


def _revoked_serials(store: Store, now: datetime) -> dict[str, str]:
    # What has run out is refused for that. Servers are here as they are on the CRL, which gateways hold against this.
    return {
        entry.serial: entry.reason
        for entry in store.entries.values()
        if entry.reason is not None and not entry.expired(now)
    }


def _names_of(csr: x509.CertificateSigningRequest) -> tuple[str, ...]:
    try:
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    except ValueError as exc:
        raise Refused(f"the names in the CSR cannot be read ({exc}). Cure: make it again") from exc
    dns = {name.lower() for name in names.get_values_for_type(x509.DNSName)}
    # Of a CSR these are addresses; networks occur in name constraints only.
    ip = {ipaddress.ip_address(str(address)) for address in names.get_values_for_type(x509.IPAddress)}
    other = [
        f"{type(name).__name__}:{_show(name)}" for name in names if not isinstance(name, (x509.DNSName, x509.IPAddress))
    ]
    return (*_names(dns, ip), *other)


def _save(store: Store, authority: Authority, now: datetime) -> None:
    """Take steps 1 to 4 of a run (4 but for the bundles)."""
    store.save_secrets()
    store.save_index(now)
    refresh_crl(store, authority, now)
    store.save_issued()
    store.flush()


@dataclass(frozen=True)
class Gateway:
    """Where devices connect."""

    name: str
    address: str
    mtls_port: int
    password_port: int | None
    psk_port: int | None = None

    @classmethod
    def parse(cls, data: object) -> Gateway:
        """Read one of ``gateways``."""
        fields = Fields(data, "a gateway")
        gateway = cls(
            name=fields.text("name"),
            address=fields.text("address"),
            mtls_port=fields.take("mtls_port", (int,), "a port"),
            password_port=fields.take("password_port", (int, type(None)), "a port, or null where there is none"),
            psk_port=fields.take("psk_port", (int, type(None)), "a port, or null where there is none", None),
        )
        fields.done()
        return gateway


@dataclass(frozen=True)
class Sync:
    """What sync-devices is asked for."""

    devices: dict[str, Device]
    days: timedelta
    renew: timedelta
    key_type: str
    revoke_at_most: int
    gateways: tuple[Gateway, ...]
    crl_url: str | None
    servers: tuple[str, ...] | None
    token_services: tuple[str, ...] | None
    token_issuer: str | None

    @classmethod
    def parse(cls, data: object) -> Sync:
        """Read the request."""
        fields = Fields(data, "sync-devices")
        devices: dict[str, Device] = {}
        for item in fields.take("devices", (list,), "a list"):
            device = Device.parse(item)
            if device.id in devices:
                raise Refused(f"device {device.id} is listed twice. Cure: remove one")
            devices[device.id] = device
        days, renew = _lifetime(fields)
        sync = cls(
            devices=devices,
            days=days,
            renew=renew,
            key_type=fields.text("key_type", "P-256"),
            revoke_at_most=fields.take("revoke_at_most", (int,), "a whole number"),
            gateways=tuple(Gateway.parse(item) for item in fields.take("gateways", (list,), "a list")),
            crl_url=fields.text("crl_url", None),
            servers=fields.texts("servers") if "servers" in fields else None,
            token_services=fields.texts("token_services") if "token_services" in fields else None,
            token_issuer=fields.text("token_issuer", None),
        )
        fields.done()
        if sync.key_type not in KEY_TYPES:
            raise Refused(f"key_type must be one of {', '.join(KEY_TYPES)}, not {sync.key_type!r}. Cure: correct it")
        return sync


def sync_devices(store: Store, authority: Authority, request: object, now: datetime) -> Json:
    """Let certificates, passwords, pre-shared keys and bundles follow the site's list of devices.

    Everything is decided in memory first: a refusal leaves the files as they were.
    """
    sync = Sync.parse(request)
    devices = list(sync.devices.values())
    gone = _gone(store, sync.devices, now)
    holders = set(store.passwords), set(store.psk), set(store.client_secrets)
    revoked, lost = _revoke(store, devices, gone, now)
    lost |= _withdraw_secrets(store, sync.devices)
    wanted, superseded, waiting = _decide(store, authority, devices, now, sync.renew)
    for entry in superseded:
        store.revoke(entry, "superseded", now)
        revoked.append(store.entries[entry.serial])
        lost.add(entry.id)
    for entry in list(store.entries.values()):
        stays = {"server": sync.servers, "token-service": sync.token_services}.get(entry.kind)
        left = stays is not None and entry.id not in stays
        if left and entry.reason is None and not entry.expired(now):
            store.revoke(entry, "cessationOfOperation", now)
            revoked.append(store.entries[entry.serial])
    if len(lost) > sync.revoke_at_most:
        raise Refused(
            f"this would revoke {len(lost)} devices at once ({', '.join(sorted(lost))}), more than revoke_at_most "
            f"({sync.revoke_at_most}). Cure: check devices.yml; if it is meant, raise revoke_at_most for this run"
        )

    _keep_pending(store)
    issued: list[str] = []
    renewed: list[str] = []
    end = authority.end(now, sync.days, sync.renew) if wanted else now
    for device, csr_key, again in wanted:
        key = csr_key
        if key is None:
            private = make_key("P-256" if store.check else sync.key_type)
            store.pending.setdefault(device.id, {})["key.pem"] = key_pem(private)
            key = private.public_key()
        issue(
            store,
            authority,
            key,
            name=device.id,
            kind="device",
            enrolment=device.enrolment,
            now=now,
            end=end,
            crl_url=sync.crl_url,
        )
        (renewed if again else issued).append(device.id)
    for device in devices:
        if device.wants_password and device.id not in store.passwords:
            store.pending.setdefault(device.id, {})["password"] = store.new_password(device.id)
        if device.wants_psk and device.id not in store.psk:
            store.pending.setdefault(device.id, {})["psk"] = store.new_psk(device.id)
        if device.wants_client_secret and device.id not in store.client_secrets:
            store.pending.setdefault(device.id, {})["client_secret"] = store.new_client_secret(device.id)
    ensure_probe_password(store)
    ensure_probe_psk(store)
    ensure_canary(store, authority, now, CANARY_RENEWAL)

    _save(store, authority, now)
    _write_bundles(store, authority, sync, now)
    store.pending = {}
    store.save_secrets()
    return {
        "changed": store.changed,
        "issued": issued,
        "renewed": renewed,
        "revoked": [{"id": entry.id, "serial": entry.serial, "reason": entry.reason} for entry in revoked],
        # whose password, pre-shared key or client secret is no longer one
        "withdrawn": sorted(
            (holders[0] - set(store.passwords))
            | (holders[1] - set(store.psk))
            | (holders[2] - set(store.client_secrets))
        ),
        "waiting": waiting,
        "removed": gone,
        "bundles": str(store.home / "bundles"),
        **_for_gateways(store, now),
    }


def _withdraw_secrets(store: Store, listed: dict[str, Device]) -> set[str]:
    """Forget passwords, pre-shared keys and client secrets of devices that may no longer have one.

    :returns: those that may not connect at all now.
    """
    lost = set()
    for held, wanted in (
        (store.passwords, {device.id for device in listed.values() if device.wants_password}),
        (store.psk, {device.id for device in listed.values() if device.wants_psk}),
        (store.client_secrets, {device.id for device in listed.values() if device.wants_client_secret}),
    ):
        for name in [name for name in held if not name.startswith(RESERVED) and name not in wanted]:
            del held[name]
            if name not in listed or listed[name].revoked:
                lost.add(name)
    return lost


def revoke(store: Store, authority: Authority, request: object, now: datetime) -> Json:
    """Take everything away from one device. The site's list of devices says so as well, or the next sync gives it back.

    Nothing but the device is looked at: no mistake elsewhere in the site's files holds a revocation up.
    """
    fields = Fields(request, "revoke")
    name, reason = fields.text("id"), fields.text("reason")
    fields.done()
    device = Device.parse({"id": name, "revoked": reason})
    revoked, _ = _revoke(store, [device], [], now)
    secret = (store.passwords, store.psk, store.client_secrets)
    withdrawn = [name for held in secret if held.pop(name, None) is not None]
    store.pending.pop(name, None)
    _save(store, authority, now)
    if name in store.names("bundles"):
        store.remove_bundle(name)
    return {
        "changed": store.changed,
        "revoked": [{"id": entry.id, "serial": entry.serial, "reason": entry.reason} for entry in revoked],
        "withdrawn": sorted(set(withdrawn)),
        "crl": (store.read("publish/issuing.crl.pem") or b"").decode(),
        "revoked_serials": _for_gateways(store, now)["revoked_serials"],
    }


def _keep_pending(store: Store) -> None:
    """Keep what an interrupted run had on its way to a bundle, if it came as far as the index; forget the rest."""
    keys = store.by_key()
    pending = {}
    for name, arriving in store.pending.items():
        owners = keys.get(_key_of(arriving.get("key.pem")) or "", [])
        kept = {"key.pem": arriving["key.pem"]} if any(e.id == name and e.reason is None for e in owners) else {}
        if "password" in arriving and is_password(arriving["password"], store.passwords.get(name)):
            kept["password"] = arriving["password"]
        if "psk" in arriving and arriving["psk"] == store.psk.get(name):
            kept["psk"] = arriving["psk"]
        if "client_secret" in arriving and is_password(arriving["client_secret"], store.client_secrets.get(name)):
            kept["client_secret"] = arriving["client_secret"]
        if kept:
            pending[name] = kept
    store.pending = pending


def _gone(store: Store, listed: Collection[str], now: datetime) -> list[str]:
    """Devices that hold something and are no longer listed."""
    holding = {e.id for e in store.entries.values() if e.kind == "device" and e.reason is None and not e.expired(now)}
    secret = {*store.passwords, *store.psk, *store.client_secrets}
    holding |= {name for name in secret if not name.startswith(RESERVED)}
    holding |= store.names("bundles")
    return sorted(holding - set(listed))


def _revoke(
    store: Store, devices: Iterable[Device], gone: Iterable[str], now: datetime
) -> tuple[list[Entry], set[str]]:
    """Revoke the certificates of devices that may no longer have one.

    :returns: what was revoked now, or for a worse reason than so far; and the ids that lose a good certificate by it.
    """
    reasons = dict.fromkeys(gone, "cessationOfOperation")
    reasons |= {d.id: d.revoked or "cessationOfOperation" for d in devices if not d.wants_certificate}
    revoked, lost = [], set()
    for entry in list(store.entries.values()):
        reason = reasons.get(entry.id)
        if entry.kind != "device" or reason is None:
            continue
        compromised = reason == "keyCompromise"
        # A key that its device made lives on after the certificate: if it leaked, remember that.
        if entry.expired(now) and not (compromised and entry.enrolment == "csr"):
            continue
        if entry.reason is None or (compromised and entry.reason != reason):
            store.revoke(entry, reason, now)
            revoked.append(store.entries[entry.serial])
            if entry.reason is None:
                lost.add(entry.id)
    return revoked, lost


def _decide(
    store: Store, authority: Authority, devices: Iterable[Device], now: datetime, renew: timedelta
) -> tuple[list[tuple[Device, PublicKey | None, bool]], list[Entry], list[str]]:
    """Say who needs a certificate, what that supersedes, and who waits for a CSR.

    :returns: (device, its CSR's key or None for a bundle, whether it is a renewal) of each that needs one; the
        certificates to revoke as superseded; the ids that wait.
    :raises Refused: when a CSR is not acceptable.
    """
    held: dict[str, list[Entry]] = {}
    for entry in store.entries.values():
        if entry.kind == "device" and entry.reason is None:
            held.setdefault(entry.id, []).append(entry)
    keys, claimed = store.by_key(), dict[str, str]()
    wanted, superseded, waiting = [], [], []
    for device in devices:
        mine = held.get(device.id, [])
        key: PublicKey | None = None
        if not device.wants_certificate:
            continue
        if device.enrolment == "bundle":
            same = [entry for entry in mine if entry.enrolment == "bundle"]
        elif device.csr is None:
            waiting.append(device.id)
            continue
        else:
            csr, key = read_csr(device.csr, device.id)
            mark = fingerprint(key)
            _check_common_name(csr, device.id)
            _check_key(keys.get(mark, []), device.id, "device", now)
            if claimed.setdefault(mark, device.id) != device.id:
                raise Refused(
                    f"the CSRs of {claimed[mark]} and {device.id} have the same key. "
                    "Cure: let each device make a key of its own"
                )
            same = [entry for entry in mine if entry.key == mark]
        superseded += [entry for entry in mine if entry not in same and not entry.expired(now)]
        if not any(entry.good(authority, now, renew) for entry in same):
            wanted.append((device, key, bool(same)))
    return wanted, superseded, waiting


def _write_bundles(store: Store, authority: Authority, sync: Sync, now: datetime) -> None:
    """Give each device what it needs in one folder, and remove the folders of those who may have nothing.

    A secret that the operator deleted after pick-up stays deleted.
    """
    current: dict[str, Entry] = {}
    for entry in store.entries.values():
        if entry.kind != "device" or entry.reason is not None or entry.issuer != authority.id or entry.expired(now):
            continue
        if entry.id not in current or entry.not_after >= current[entry.id].not_after:
            current[entry.id] = entry
    existing, wanted = store.names("bundles"), set()
    for device in sync.devices.values():
        held = current.get(device.id) if device.wants_certificate else None
        if held is None and not (device.wants_password or device.wants_psk or device.wants_client_secret):
            continue
        wanted.add(device.id)
        folder = f"bundles/{device.id}"
        files = {"ca.pem": authority.ca_pem, **store.pending.get(device.id, {})}
        allowed = {"ca.pem", "client.json", "README.txt"}
        allowed |= {"password"} if device.wants_password else set()
        allowed |= {"psk"} if device.wants_psk else set()
        allowed |= {"client_secret"} if device.wants_client_secret else set()
        if held is not None:
            files["certificate.pem"] = (held.pem or "") + authority.issuing_pem
            allowed |= {"certificate.pem", "key.pem"} if held.enrolment == "bundle" else {"certificate.pem"}
        client = {
            "id": device.id,
            "authentication": list(device.authentication),
            **({"psk_identity": device.id} if device.wants_psk else {}),
            **({"token": {"method": device.token, "issuer": sync.token_issuer}} if device.token else {}),
            "gateways": [asdict(gateway) for gateway in sync.gateways],
        }
        files["client.json"] = json.dumps(client, indent=2) + "\n"
        files["README.txt"] = _read_me(device, held, sync)
        for name in ("key.pem", *sorted(set(files) - {"key.pem"})):
            if name in files:
                store.write(f"{folder}/{name}", files[name], 0o600)
        every = {"key.pem", "certificate.pem", "password", "psk", "client_secret"}
        for name in store.names(folder) & (every - allowed):
            store.changed = True
            if not store.check:
                (store.home / folder / name).unlink()
    store.flush()
    for name in sorted(existing - wanted):
        store.remove_bundle(name)


def _where_key(entry: Entry) -> str:
    return "key.pem" if entry.enrolment == "bundle" else "that the device made"


def _read_me(device: Device, entry: Entry | None, sync: Sync) -> str:
    lines = [f"{device.id}: what this device needs to connect", ""]
    for_brokers = "certificate" in device.authentication
    mtls = ", ".join(f"{gateway.address}:{gateway.mtls_port}" for gateway in sync.gateways)
    password = ", ".join(f"{g.address}:{g.password_port}" for g in sync.gateways if g.password_port) or "no gateway"
    if entry is not None and for_brokers:
        lines += [
            f"With its certificate, over TLS: {mtls}",
            f"  trust ca.pem, present certificate.pem with the key {_where_key(entry)}.",
        ]
    if device.wants_password:
        lines += [
            f"With its password, over TLS: {password}",
            f"  trust ca.pem, user name {device.id}, the password is the content of the file password.",
        ]
    if device.wants_psk:
        places = ", ".join(f"{g.address}:{g.psk_port}" for g in sync.gateways if g.psk_port) or "no gateway"
        lines += [
            f"With its pre-shared key, over TLS: {places}",
            f"  identity {device.id}, the key is the content of the file psk (hex); TLS 1.3, or TLS 1.2 with",
            "  ECDHE-PSK-CHACHA20-POLY1305. There is no certificate to trust: who has the key is the gateway.",
        ]
    if device.token:
        lines += _read_me_token(device, entry, sync.token_issuer, mtls, password)
    lines += [f"The client id must be {device.id}.", ""]
    if entry is not None and entry.enrolment == "bundle":
        lines += [
            "key.pem: this key was made by the CA and travels. Carry it over a channel that you trust, and delete it",
            "here once the device has it; that is no reason for the CA to make another one.",
        ]
    if device.wants_password:
        lines += ["password: likewise; the CA and the gateways keep its hash only."]
    if device.wants_psk:
        lines += ["psk: likewise; but the CA and the gateways keep the key itself, since a handshake needs it."]
    if device.wants_client_secret:
        lines += ["client_secret: likewise; the CA and the token service keep its hash only."]
    return "\n".join(lines) + "\n"


def _read_me_token(device: Device, entry: Entry | None, issuer: str | None, mtls: str, password: str) -> list[str]:
    """Tell a device how it gets a token and where it shows it (docs/tokens.md says more)."""
    if issuer is None:
        return ["With a token of the identity provider that the site's policy names; the site itself issues none."]
    how = {
        "tls_client_auth": "--cert certificate.pem --key key.pem -d client_id=" + device.id,
        "private_key_jwt": "--cert certificate.pem --key key.pem"
        " -d client_assertion_type=urn:ietf:params:oauth:client-assertion-type:jwt-bearer -d client_assertion@FILE",
        "client_secret_basic": "-K FILE",
    }[device.token or ""]
    key = _where_key(entry) if entry is not None else "of its certificate"
    notes = {
        "private_key_jwt": [
            f"  FILE holds a JWT that is signed with the key {key} (RFC 7523): iss and sub {device.id},",
            f"  aud {issuer}, iat, exp a minute later, and a new jti each time.",
        ],
        "client_secret_basic": [
            f'  FILE holds the line: user = "{device.id}:..." with what is in client_secret for ...'
        ],
    }.get(device.token or "", [])
    # Shown to the token service, the certificate is what its tokens are bound to (RFC 8705, 3).
    bound = device.token != "client_secret_basic"  # noqa: S105  (the name of a method)
    return [
        f"With a token, from {issuer} ({device.token}):",
        f"  curl --cacert ca.pem {how} -d grant_type=client_credentials {issuer}/token",
        *notes,
        f"  Show it over TLS to {mtls if bound else password}: user name {device.id}, the token is the password."
        + (f" Present certificate.pem with the key {_where_key(entry)}." if bound and entry is not None else ""),
        "  Renew it in time: it ends by itself, and so does the connection.",
    ]


def probe(store: Store, authority: Authority, request: object, now: datetime) -> Json:
    """Give ``bednet verify`` its short-lived certificate, its password, and the canary that must be refused."""
    fields = Fields(request, "probe")
    pem, days = fields.text("csr"), fields.days("days", 1)
    fields.done()
    csr, key = read_csr(pem, PROBE)
    _check_common_name(csr, PROBE)
    mark = fingerprint(key)
    _check_key(store.by_key().get(mark, []), PROBE, "probe", now)
    entry = next((e for e in store.of(PROBE, "probe") if e.key == mark and e.good(authority, now, days / 2)), None)
    if entry is None:
        end = authority.end(now, days, days / 2)
        entry = issue(store, authority, key, name=PROBE, kind="probe", enrolment="csr", now=now, end=end)
    password = ensure_probe_password(store)
    psk = ensure_probe_psk(store)
    canary = ensure_canary(store, authority, now, CANARY_LAST_MOMENT)
    _save(store, authority, now)
    return {
        "changed": store.changed,
        "certificate": entry.pem,
        "chain": entry.pem and entry.pem + authority.issuing_pem,
        "ca": authority.ca_pem,
        "password": password,
        "psk": psk,
        "canary_certificate": canary.pem,
        "canary_key": store.canary_key,
    }


def renew_crl(store: Store, authority: Authority, request: object, now: datetime) -> Json:
    """Renew the CRL when it gets old, lacks a revocation, or shall be valid for another time than so far."""
    fields = Fields(request, "crl")
    days, refresh = fields.days("days"), fields.days("refresh_before_days", zero=True)
    fields.done()
    if refresh >= days:
        raise Refused("refresh_before_days is not less than days: every run would sign a CRL. Cure: make it smaller")
    other = days / timedelta(days=1) != store.crl_days
    store.set_crl_days(days / timedelta(days=1))
    store.save_index(now)
    renewed = refresh_crl(store, authority, now, days if other else refresh)
    store.save_issued()
    store.flush()
    last = _load_crl(store, authority)
    return {
        "changed": store.changed,
        "renewed": renewed,
        "next_update": stamp(moment(last, "next_update")) if last is not None else None,
        "revoked": len(last) if last is not None else 0,
    }


def status(store: Store, authority: Authority, request: object, now: datetime) -> Json:
    """Summarise the CA; ``problems`` says what somebody has to do."""
    fields = Fields(request, "status")
    warn = fields.days("warn_days", DEFAULT_WARN_DAYS, zero=True)
    fields.done()
    problems = authority.problems(now, warn)
    last = _load_crl(store, authority)
    if last is None:
        problems.append("there is no CRL of this issuing CA. Cure: bednet-ca crl")
    elif now > moment(last, "next_update"):
        problems.append(f"the CRL is stale since {stamp(moment(last, 'next_update'))}. Cure: look at bednet-ca's timer")
    elif refresh_crl(store, authority, now):
        problems.append("the CRL lacks a revocation that the index has. Cure: bednet-ca crl")
    kinds: dict[str, dict[str, int]] = {}
    for entry in store.entries.values():
        state = "revoked" if entry.reason else "expired" if entry.expired(now) else "valid"
        counts = kinds.setdefault(entry.kind, {"valid": 0, "expired": 0, "revoked": 0})
        counts[state] += 1
    return {
        "problems": problems,
        **{
            name: {
                "not_after": stamp(moment(certificate, "not_valid_after")),
                "key_type": key_name(certificate.public_key()),
                "serial": f"{certificate.serial_number:040x}",
            }
            for name, certificate in (("root", authority.root), ("issuing", authority.issuing))
        },
        "crl": {"next_update": stamp(moment(last, "next_update")), "revoked": len(last)} if last is not None else None,
        "certificates": kinds,
        "passwords": len(store.passwords),
        "psk": len(store.psk),
        "client_secrets": len(store.client_secrets),
    }


HELP = """\
requests (an unknown or missing field is named; [..] may be left out):
  sign-server   name csr days renew_before_days dns:[..] ip:[..] [crl_url] [purpose: gateway or token_service;
                the latter with private_key_jwt:[..]]
  sync-devices  devices:[{id [authentication token enrolment csr revoked]}] days renew_before_days
                revoke_at_most gateways:[{name address mtls_port password_port [psk_port]}] [key_type crl_url servers
                token_services token_issuer]
  revoke        id reason
  probe         csr [days]
  crl           days refresh_before_days
  status        [warn_days]
"""

COMMANDS = {
    "sign-server": sign_server,
    "sync-devices": sync_devices,
    "revoke": revoke,
    "probe": probe,
    "crl": renew_crl,
    "status": status,
}


@contextlib.contextmanager
def _locked(home: Path, *, read_only: bool) -> Iterator[None]:
    """Let the timer and a playbook take turns. The lock is on the folder, so that a dry run makes no file."""
    try:
        descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise Refused(f"{home}: {exc.strerror}. Cure: run playbooks/site.yml, whose role ca makes it") from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if read_only else fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def run(command: str, request: object, *, home: Path, now: datetime, check: bool = False) -> Json:
    """Carry out one command.

    :param request: what came on stdin, as JSON.
    :param now: aware; fractions of a second are cut off.
    :param check: tell what would change, and change nothing. What would be signed is null in the answer.
    :raises Refused: nothing was changed; the message says why and what to do.
    :raises OSError: a file could not be written; the next run completes this one.
    """
    now = now.astimezone(UTC).replace(microsecond=0)
    read_only = check or command == "status"
    with _locked(home, read_only=read_only):
        authority = Authority.load(home)
        if command != "status" and (problems := authority.problems(now)):
            raise Refused("; ".join(problems))
        return COMMANDS[command](Store(home, check=read_only), authority, request, now)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. :returns: the exit code."""
    parser = argparse.ArgumentParser(
        prog="bednet-ca",
        description="Sign, renew and revoke what bednet's issuing CA signs. One JSON object on stdin, one on stdout.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--home", type=Path, default=HOME, help="the CA's folder (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="dry run: tell what would change, and write nothing")
    parser.add_argument("command", choices=COMMANDS)
    options = parser.parse_args(arguments)
    os.umask(0o022)
    try:
        text = sys.stdin.read()
        request = json.loads(text) if text.strip() else {}
        result = run(options.command, request, home=options.home, now=datetime.now(UTC), check=options.check)
    except Refused as exc:
        print(f"bednet-ca {options.command}: {exc}", file=sys.stderr)
        return 1
    except json.JSONDecodeError as exc:
        # Not the text itself: a request may hold what is nobody's business.
        print(f"bednet-ca: stdin is not JSON (line {exc.lineno}: {exc.msg}). Cure: correct it", file=sys.stderr)
        return 1
    except OSError as exc:
        where = exc.filename or options.home
        print(
            f"bednet-ca {options.command}: {where}: {exc.strerror}. Cure: make room or give access, and run it again; "
            "it goes on where it stopped",
            file=sys.stderr,
        )
        return 1
    json.dump(result, sys.stdout, indent=1)
    print()
    if result.get("problems"):
        print(f"bednet-ca {options.command}: {'; '.join(result['problems'])}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
