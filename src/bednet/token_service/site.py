# SPDX-License-Identifier: Apache-2.0
"""What the service knows of the site: the compiled site (docs/store.md) and the CA's secrets, put into the database.

- :func:`read`: reads the compiled site and the secrets, and refuses what is unsound.
- :func:`apply`: makes the database say the same, and tells what changed.
- :func:`add_serials`: takes over which certificates a newer list of the CA revokes.

Only devices that may get a token are kept, and the people of the configuration.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from bednet.errors import BednetError
from bednet.token_service import certified, jose, revocation
from bednet.token_service.config import DEVICE_ID
from bednet.token_service.database import devices, marks, meta, profiles, revoked_serials

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from bednet.token_service.config import Config
    from bednet.token_service.database import Database
    from bednet.token_service.jose import Json

FORMAT = 2
METHODS = ("tls_client_auth", "private_key_jwt", "client_secret_basic")
REASONS = (
    "unspecified",
    "keyCompromise",
    "affiliationChanged",
    "superseded",
    "cessationOfOperation",
    "privilegeWithdrawn",
)
MOST_ITERATIONS = 10_000
# As many as the CA hashes with: it makes all secrets that come here.
ITERATIONS = 101
TOLD = 100
_SECRETS = {"client_secrets", "certificates", "revoked_serials"}
_CRL_NUMBER = "crl_number"
_SEEN = "crl-number"  # the row of `meta`
_HASH_FORM = re.compile(r"\$7\$([1-9][0-9]{0,8})\$([A-Za-z0-9+/=]+)\$([A-Za-z0-9+/=]+)")
_HASH_BYTES = 64
_SERIAL = re.compile(r"[0-9A-Fa-f]{1,40}")


class Refused(BednetError):  # noqa: N818 - a refusal is an answer, not a fault of the program
    """Nothing was changed; the message is one sentence with its cure."""

    code = "refused"


class SecretHash(NamedTuple):
    """What a client secret is checked against: PBKDF2 with HMAC-SHA-512 (RFC 8018, 5.2)."""

    iterations: int
    salt: bytes
    digest: bytes

    @classmethod
    def parse(cls, text: str) -> SecretHash:
        """Read ``$7$iterations$salt$hash``, as in Mosquitto's password file.

        :raises ValueError: when it is something else.
        """
        match = _HASH_FORM.fullmatch(text)
        if not match or int(match[1]) > MOST_ITERATIONS:
            raise ValueError(f"is not of the form $7$iterations$salt$hash with at most {MOST_ITERATIONS} iterations")
        try:
            salt, digest = (base64.b64decode(match[group], validate=True) for group in (2, 3))
        except binascii.Error:
            raise ValueError("has a salt or hash that is not base64") from None
        if not salt or len(digest) != _HASH_BYTES:
            raise ValueError(f"has no salt, or no hash of {_HASH_BYTES} bytes")
        return cls(int(match[1]), salt, digest)

    def matches(self, secret: str) -> bool:
        """Say whether this is the hash of a secret; in the same time, whichever it is."""
        found = hashlib.pbkdf2_hmac("sha512", secret.encode(), self.salt, self.iterations, _HASH_BYTES)
        return hmac.compare_digest(found, self.digest)


@dataclass
class SiteData:
    """A compiled site with its secrets, as rows of tables.

    :ivar reinstated: by device id, when the site last let it in again, in unix seconds.
    :ivar crl_number: of the CA's list of revoked serial numbers; None when it is not known.
    """

    issuer: Json
    reinstated: dict[str, int] = field(default_factory=dict)
    crl_number: int | None = None
    devices: dict[str, Json] = field(default_factory=dict)
    profiles: dict[str, str] = field(default_factory=dict)
    serials: dict[str, str] = field(default_factory=dict)
    without_secret: list[str] = field(default_factory=list)
    unused_secrets: list[str] = field(default_factory=list)


class _Lines:
    """The lines of a compiled site, one JSON object each."""

    def __init__(self, lines: Iterable[str], name: str) -> None:
        self._lines = iter(lines)
        self._name = name
        self._number = 0

    def refused(self, message: str) -> Refused:
        return Refused(f"{self._name}:{self._number}: {message}. Cure: make it again with bednet compile --output")

    def next(self, kind: str) -> Json:
        self._number += 1
        try:
            line = next(self._lines, None)
        except UnicodeDecodeError:
            raise self.refused("the line is not UTF-8") from None
        if line is None:
            raise self.refused("the file ends too early")
        if not line.endswith("\n"):
            raise self.refused("the line has no end")
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            raise self.refused("the line is not JSON") from None
        if not isinstance(data, dict) or kind not in data:
            raise self.refused(f"the line must be an object with {kind!r}")
        return data

    def end(self) -> None:
        if next(self._lines, None) is not None:
            self._number += 1
            raise self.refused("more lines than the first line says")


def read(lines: Iterable[str], secrets: object, config: Config, name: str = "the compiled site") -> SiteData:
    """Read a compiled site, and the secrets that come with it.

    :param secrets: ``client_secrets`` (hash by id), ``certificates`` (PEM by id, of one certificate or more) and
        ``revoked_serials`` (reason by hexadecimal number), which may be empty; and ``crl_number``, which may be left
        out.
    :raises Refused: when anything is not as docs/token-service.md and docs/store.md say, or the site's own issuer is
        not that of the configuration.
    """
    known = _read_secrets(secrets)
    source = _Lines(lines, name)
    header = source.next("bednet-compiled")
    if header["bednet-compiled"] != FORMAT:
        raise source.refused(f"the format is {header['bednet-compiled']!r}, and this service reads format {FORMAT}")
    counts: dict[str, int] = {}
    for kind in ("zones", "profiles", "issuers", "devices"):
        count = header.get(kind)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise source.refused(f"{kind!r} is no number")
        counts[kind] = count
    for _ in range(counts["zones"]):
        source.next("zone")
    rules = dict(_profile(source) for _ in range(counts["profiles"]))
    if len(rules) != counts["profiles"]:
        raise source.refused("a profile is listed twice")
    issuer = None
    for _ in range(counts["issuers"]):
        entry = source.next("issuer")
        if entry.get("service") is True:
            issuer = _issuer(entry, config, source)
    data = SiteData(
        issuer=issuer or _no_issuer(config), serials=known["revoked_serials"], crl_number=known.get(_CRL_NUMBER)
    )
    unused = set(known["client_secrets"]) | set(known["certificates"])
    last = ""
    for _ in range(counts["devices"]):
        entry = source.next("device")
        row = _device(entry, rules, known, source)
        if row["id"] <= last:
            raise source.refused(f"device {row['id']!r} stands behind {last!r}, not in order")
        last = row["id"]
        if row["method"] is None and row["id"] not in config.people:
            continue
        unused.discard(row["id"])
        if mark := _mark(entry, source):
            data.reinstated[row["id"]] = mark
        data.devices[row["id"]] = row
        data.profiles[row["profile"]] = rules[row["profile"]]
        if row["revoked"] is None and _lacks_secret(row):
            data.without_secret.append(row["id"])
    source.end()
    data.unused_secrets = sorted(unused)
    return data


def _no_issuer(config: Config) -> Json:
    message = f"policy.yml has no issuer with 'service: true', and this service is {config.issuer}"
    raise Refused(f"{message}. Cure: add it to 'issuers' of policy.yml")


def _issuer(entry: Json, config: Config, source: _Lines) -> Json:
    if entry["issuer"] != config.issuer:
        raise Refused(
            f"the site's own issuer is {entry['issuer']!r}, and this service is {config.issuer!r}. "
            "Cure: correct 'issuers' of policy.yml, or the name of the token service"
        )
    audiences, longest, algorithms = entry.get("audience"), entry.get("longest"), entry.get("algorithms")
    if not isinstance(audiences, list) or not set(config.audiences) <= set(map(str, audiences)):
        raise Refused(
            f"brokers accept {audiences!r} as audience, and this service issues for {list(config.audiences)!r}. "
            "Cure: correct 'audience' in 'issuers' of policy.yml"
        )
    if not isinstance(longest, int) or config.token_seconds > longest:
        raise Refused(
            f"brokers refuse tokens that are valid for more than {longest!r} seconds, and those of this service are "
            f"for {config.token_seconds}. Cure: correct 'longest' in 'issuers' of policy.yml, or token_seconds"
        )
    if not isinstance(algorithms, list) or config.algorithm not in algorithms:
        raise Refused(
            f"brokers accept {algorithms!r}, and this service signs with {config.algorithm}. "
            "Cure: correct 'algorithms' in 'issuers' of policy.yml"
        )
    return {"issuer": config.issuer, "audience": audiences, "longest": longest, "leeway": entry.get("leeway", 30)}


def _profile(source: _Lines) -> tuple[str, str]:
    entry = source.next("profile")
    name, rules = entry["profile"], []
    if not isinstance(name, str) or not name:
        raise source.refused("a profile without a name")
    for rule in entry.get("rules") or []:
        try:
            effect, access, topic = rule["effect"], rule["access"], rule["topic"]
            conditional = bool(rule["during"] or rule["networks"])
        except (TypeError, KeyError):
            raise source.refused(f"profile {name!r} has a rule that is none") from None
        if effect not in ("allow", "deny") or access not in ("publish", "subscribe") or not _is_topic(topic):
            raise source.refused(f"profile {name!r} has a rule that is none")
        # The broker knows time and address; a token may only say less than the policy does at its widest.
        if effect == "allow" or not conditional:
            rules.append([effect, access, topic])
    return name, json.dumps(rules, ensure_ascii=False)


def _is_topic(topic: object) -> bool:
    return (
        isinstance(topic, list)
        and bool(topic)
        and all(isinstance(part, (str, int)) and not isinstance(part, bool) for part in topic)
    )


def _device(entry: Json, rules: Mapping[str, str], known: Json, source: _Lines) -> Json:
    device_id, profile, values = entry["device"], entry.get("profile"), entry.get("values")
    if not isinstance(device_id, str) or not DEVICE_ID.fullmatch(device_id):
        raise source.refused(f"{device_id!r} cannot be a device's id")
    if profile not in rules:
        raise source.refused(f"device {device_id!r} has the profile {profile!r}, which the file does not list")
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise source.refused(f"device {device_id!r} has values that are no text")
    method, until, revoked = entry.get("token"), entry.get("until"), entry.get("revoked")
    authentication = entry.get("authentication")
    if method is not None and method not in METHODS:
        raise source.refused(f"device {device_id!r} authenticates to the service by {method!r}, which is unknown")
    if not isinstance(authentication, list) or (method is not None) != ("token" in authentication):
        raise source.refused(f"device {device_id!r} has a way to authenticate that does not fit its 'token'")
    if until is not None and (not isinstance(until, int) or isinstance(until, bool)):
        raise source.refused(f"device {device_id!r} has an end that is no time")
    if revoked is not None and revoked not in REASONS:
        raise source.refused(f"device {device_id!r} is revoked for {revoked!r}, which is no reason")
    in_service = revoked is None
    return {
        "id": device_id,
        "profile": profile,
        "placeholders": json.dumps(values, ensure_ascii=False),
        "method": method,
        "certificate": "certificate" in authentication,
        "until": until,
        "revoked": revoked,
        "secret": known["client_secrets"].get(device_id) if method == "client_secret_basic" and in_service else None,
        "certificates": known["certificates"].get(device_id) if method == "private_key_jwt" and in_service else None,
    }


def _mark(entry: Json, source: _Lines) -> int:
    mark = entry.get("reinstated") or 0
    if not isinstance(mark, int) or isinstance(mark, bool) or mark < 0:
        raise source.refused(f"device {entry['device']!r} was let in again at no time that can be")
    return mark


def _lacks_secret(row: Json) -> bool:
    needed = {"client_secret_basic": "secret", "private_key_jwt": "certificates"}.get(row["method"])
    return needed is not None and row[needed] is None


def _read_secrets(secrets: object) -> Json:
    cure = "Cure: give them as the role does; see docs/token-service.md"
    if not isinstance(secrets, dict) or secrets.keys() - {_CRL_NUMBER} != _SECRETS:
        raise Refused(f"the secrets must be a JSON object with {', '.join(sorted(_SECRETS))}. {cure}")
    number = secrets.get(_CRL_NUMBER)
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
        raise Refused(f"{_CRL_NUMBER} must be a whole number. {cure}")
    for name in _SECRETS:
        values = secrets[name]
        if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
            raise Refused(f"{name} must be a JSON object of strings. {cure}")
    for device_id, text in secrets["client_secrets"].items():
        try:
            SecretHash.parse(text)
        except ValueError as exc:
            raise Refused(f"the client secret of {device_id} {exc}. Cure: let bednet-ca make it") from None
    for device_id, pem in secrets["certificates"].items():
        try:
            certified.load(device_id, pem)
        except jose.JoseError as exc:
            raise Refused(f"the certificates of {device_id}: {exc}. Cure: let bednet-ca hand them over") from None
    return {**secrets, "revoked_serials": _read_serials(secrets["revoked_serials"], cure)}


def _read_serials(told: Mapping[str, str], cure: str) -> dict[str, str]:
    serials: dict[str, str] = {}
    for serial, reason in told.items():
        if not _SERIAL.fullmatch(serial) or reason not in REASONS:
            raise Refused(f"revoked_serials: {serial!r} with the reason {reason!r} cannot be. {cure}")
        serials[certified.serial_text(int(serial, 16))] = reason
    return serials


class _Marks:
    """Who may come back (docs/store.md): a revoked device only with a later mark than any that was seen of it."""

    def __init__(self, connection: sa.engine.Connection) -> None:
        self._known = {row["device"]: row for row in _rows(connection, marks)}
        self._new: dict[str, Json] = {}
        self.reinstated: list[Json] = []
        self.kept: list[Json] = []

    def of(self, device_id: str) -> Json:
        return self._known.get(device_id, {"device": device_id, "reinstated": 0, "gone": None})

    def judge(self, row: Json, before: Json | None, latest: int) -> Json:
        """Return what a device's row shall be."""
        mark = self.of(row["id"])
        reason = mark["gone"] if before is None else before["revoked"]
        if row["revoked"] is None and reason is not None:
            told = {"device": row["id"], "reason": reason}
            if latest > mark["reinstated"]:
                self.reinstated.append(told)
            else:
                self.kept.append(told)
                row = {**row, "revoked": reason, "secret": None, "certificates": None}
        self._note({**mark, "reinstated": max(latest, mark["reinstated"]), "gone": None})
        return row

    def leave(self, row: Json) -> None:
        """Note that the site lists a device no more."""
        self._note({**self.of(row["id"]), "gone": row["revoked"]})

    def _note(self, mark: Json) -> None:
        if mark != self.of(mark["device"]):
            self._new[mark["device"]] = mark

    def write(self, connection: sa.engine.Connection) -> None:
        """Write what is new."""
        if self._new:
            gone = [{"gone_id": device_id} for device_id in self._new]
            connection.execute(marks.delete().where(marks.c.device == sa.bindparam("gone_id")), gone)
            connection.execute(marks.insert(), list(self._new.values()))


def apply(database: Database, data: SiteData, now: int, *, check: bool = False) -> Json:
    """Make the database say what the site says, in one transaction.

    A device that is revoked from now on, or gone, gets a cutoff: its tokens of before are in the revocation list. One
    that is revoked here comes back only with a later mark of the site; and serial numbers of an older list than was
    seen are only added: nobody brings a revoked device back by older files.

    :param check: tell what would change, and change nothing.
    :returns: ``changed``; numbers ``added``, ``changed_devices``, ``removed``, ``profiles``, ``revoked_serials`` of
        what is different, and ``devices`` in all; ``older_crl``; ``revoked``: ids; ``reinstated`` and
        ``kept_revoked``: ids and reasons; ``without_secret``: devices in service that lack what they prove themselves
        with; ``unused_secrets`` (the first 100 of each).
    :raises Unavailable: when the database cannot be written.
    """
    with database.reading() if check else database.writing() as connection:
        if not check:
            database.take_turns(connection)
        # Locked: what is being issued to them or revoked is waited for, and seen.
        old = {row["id"]: row for row in _rows(connection, devices, lock=not check)}
        judged = _Marks(connection)
        rows = {key: judged.judge(row, old.get(key), data.reinstated.get(key, 0)) for key, row in data.devices.items()}
        added = [row for key, row in rows.items() if key not in old]
        changed = [row for key, row in rows.items() if key in old and old[key] != row]
        removed = sorted(old.keys() - rows.keys())
        for key in removed:
            judged.leave(old[key])
        revoked = [row["id"] for row in changed if row["revoked"] is not None and old[row["id"]]["revoked"] is None]
        old_profiles = {row["name"]: row["rules"] for row in _rows(connection, profiles)}
        old_serials = {row["serial"]: row["reason"] for row in _rows(connection, revoked_serials)}
        serials, number, older = _serials(connection, data, old_serials)
        wanted = {"issuer": json.dumps(data.issuer, sort_keys=True), **number}
        known = {row["name"]: row["value"] for row in _rows(connection, meta)}
        values = {name: value for name, value in wanted.items() if known.get(name) != value}
        different_profiles = len(old_profiles.items() ^ data.profiles.items())
        different_serials = len(old_serials.items() ^ serials.items())
        if not check:
            _replace(connection, devices, added, changed, removed)
            judged.write(connection)
            if different_profiles:
                _exchange(connection, profiles, old_profiles, data.profiles)
            if different_serials:
                _exchange(connection, revoked_serials, old_serials, serials)
            for name, value in values.items():
                database.insert_or_update(connection, meta, {"name": name, "value": value})
            for device_id in removed + revoked:
                revocation.end_tokens(database, connection, device_id, now)
        return {
            "changed": bool(added or changed or removed or different_profiles or different_serials or values),
            "added": len(added),
            "changed_devices": len(changed),
            "removed": len(removed),
            "profiles": different_profiles,
            "revoked_serials": different_serials,
            "older_crl": older,
            "devices": len(rows),
            "revoked": sorted(revoked)[:TOLD],
            "reinstated": judged.reinstated[:TOLD],
            "kept_revoked": judged.kept[:TOLD],
            "without_secret": data.without_secret[:TOLD],
            "unused_secrets": data.unused_secrets[:TOLD],
        }


def add_serials(database: Database, told: object) -> Json:
    """Take over which certificates a list of the CA revokes. What is no longer on it is for :func:`apply` to forget.

    :param told: ``crl_number`` and ``revoked_serials`` of a list that was verified. With the number that the database
        has seen, or a lower one, it is nothing new.
    :returns: ``changed``; ``revoked_serials`` that are new or have another reason; ``older_crl``; ``crl_number``: the
        newest one that was seen.
    :raises Refused: when it is something else.
    :raises Unavailable: when the database cannot be written.
    """
    cure = "Cure: give what crl_fetch.py --serials says"
    if not isinstance(told, dict) or told.keys() != {_CRL_NUMBER, "revoked_serials"}:
        raise Refused(f"this is not {_CRL_NUMBER} and revoked_serials. {cure}")
    number, listed = told[_CRL_NUMBER], told["revoked_serials"]
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise Refused(f"{_CRL_NUMBER} must be a whole number. {cure}")
    if not isinstance(listed, dict) or not all(isinstance(reason, str) for reason in listed.values()):
        raise Refused(f"revoked_serials must be a JSON object of strings. {cure}")
    new = _read_serials(listed, cure)
    with database.writing() as connection:
        database.take_turns(connection)
        seen = crl_number(connection)
        different = 0
        if seen is None or number > seen:
            old = {row["serial"]: row["reason"] for row in _rows(connection, revoked_serials)}
            different = sum(old.get(serial) != reason for serial, reason in new.items())
            _exchange(connection, revoked_serials, old, {**old, **new})
            database.insert_or_update(connection, meta, {"name": _SEEN, "value": str(number)})
    return {
        "changed": bool(different),
        "revoked_serials": different,
        "older_crl": seen is not None and number < seen,
        "crl_number": number if seen is None else max(number, seen),
    }


def crl_number(connection: sa.engine.Connection) -> int | None:
    """Return the number of the CA's newest list that was seen (RFC 5280, 5.2.3)."""
    seen = connection.execute(sa.select(meta.c.value).where(meta.c.name == _SEEN)).scalar()
    return None if seen is None else int(seen)


def _serials(
    connection: sa.engine.Connection, data: SiteData, old: dict[str, str]
) -> tuple[dict[str, str], dict[str, str], bool]:
    """Return the serial numbers to keep, the number of the newest list that was seen, and whether this one is older."""
    seen = crl_number(connection)
    if seen is not None and (data.crl_number is None or data.crl_number < seen):
        return {**old, **data.serials}, {}, True
    return data.serials, {} if data.crl_number is None else {_SEEN: str(data.crl_number)}, False


def _rows(connection: sa.engine.Connection, table: sa.Table, *, lock: bool = False) -> Iterator[dict[str, Any]]:
    rows = sa.select(table)
    for row in connection.execute(rows.with_for_update() if lock else rows).mappings():
        yield dict(row)


def _replace(
    connection: sa.engine.Connection, table: sa.Table, added: list[Json], changed: list[Json], removed: list[str]
) -> None:
    if removed:
        connection.execute(table.delete().where(table.c.id == sa.bindparam("gone")), [{"gone": key} for key in removed])
    if changed:
        # The row stays, so that whoever waits for it finds it.
        names = [column.name for column in table.columns if column.name != "id"]
        columns: dict[str, Any] = {name: sa.bindparam(f"new_{name}") for name in names}
        rows = [{f"new_{name}": value for name, value in row.items()} for row in changed]
        connection.execute(table.update().where(table.c.id == sa.bindparam("new_id")).values(**columns), rows)
    if added:
        connection.execute(table.insert(), added)


def _exchange(connection: sa.engine.Connection, table: sa.Table, old: dict[str, str], new: dict[str, str]) -> None:
    """Make a table of two columns say what `new` says."""
    key, value = (column.name for column in table.columns)
    gone = [name for name, what in old.items() if new.get(name) != what]
    if gone:
        statement = table.delete().where(table.c[key] == sa.bindparam("gone"))
        connection.execute(statement, [{"gone": name} for name in gone])
    if rows := [{key: name, value: what} for name, what in new.items() if old.get(name) != what]:
        connection.execute(table.insert(), rows)
