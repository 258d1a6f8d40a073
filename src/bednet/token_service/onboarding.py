# SPDX-License-Identifier: Apache-2.0
"""Device authorization (RFC 8628): requests of devices that a human approves.

- :func:`open_request`: a device asks; it gets a device code to poll with, and a user code to show.
- :func:`find`, :func:`decide`: a human looks at the request behind a user code, and decides.
- :func:`poll`: the device asks whether it was decided.
- :func:`may_look`, :func:`note_failure`: counts wrong codes, so that none can be found by trying.

Both codes are stored as hashes: who reads the database can neither poll nor approve.
"""

from __future__ import annotations

import collections
import hashlib
import ipaddress
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from bednet.token_service.database import attempts, device_requests

if TYPE_CHECKING:
    from bednet.token_service.database import Database

EXPIRES_IN, INTERVAL = 600, 5
"""Seconds that a request is open, and between two polls (RFC 8628, 3.2)."""

SLOWER = 5
"""Seconds that the interval grows by when a device polls too fast (RFC 8628, 3.5)."""

ALPHABET = "BCDFGHJKLMNPQRSTVWXZ"
"""Letters that make no words and look like no digits (RFC 8628, 6.1)."""

CODE_LETTERS = 8
"""20^8 codes, some 2^34. With :data:`MOST_LOOKS` tries for each approver nobody finds an open one."""

MOST_OPEN = 3
"""Requests of one device from one network that may be open at a time: a stranger's must not keep the device out."""

MOST_REQUESTS = 1000
"""Requests in the database: with :data:`MOST_SCOPE` each, a few megabytes at the most."""

MOST_SCOPE = 4096
"""Characters of a scope that is kept until somebody has decided."""

KEPT = 60
"""Seconds that a request which is over is kept for its device to be told so."""

HOST, SITE = 64, 48
"""Bits of an IPv6 address that a host has one of, and that a provider gives to one customer (RFC 6177, 2)."""

MOST_LOOKS, LOOKS_SECONDS = 10, 600
"""User codes that one approver may enter in vain, and in which time."""


@dataclass(frozen=True)
class Request:
    """An open or decided request; times are unix seconds.

    :ivar key: what the database knows the device code by.
    :ivar state: ``pending``, ``approved`` or ``denied``.
    :ivar address: where it was asked from.
    """

    key: str
    device: str
    scope: str | None
    address: str
    created: int
    exp: int
    interval: int
    polled: int | None
    state: str
    approver: str | None


def _hash(code: str) -> str:
    return hashlib.sha256(code.encode(errors="replace")).hexdigest()


def _plain(user_code: str) -> str:
    """Leave out what people add or change when they type a code (RFC 8628, 6.1)."""
    return "".join(letter for letter in user_code.upper() if letter in ALPHABET)


def new_user_code() -> str:
    """Return a new user code, as people read it."""
    letters = "".join(secrets.choice(ALPHABET) for _ in range(CODE_LETTERS))
    return f"{letters[:4]}-{letters[4:]}"


def new_device_code() -> str:
    """Return a new device code, of 256 bits."""
    return secrets.token_urlsafe(32)


def open_request(
    connection: sa.engine.Connection,
    *,
    device_code: str,
    user_code: str,
    device: str,
    scope: str | None,
    address: str,
    now: int,
) -> bool:
    """Open a request.

    When there are too many in all, one makes room that nobody has approved: the oldest from wherever the most are
    from. To refuse the new one instead would let whoever fills the table keep everybody out; to drop the oldest of all
    would let them push out everybody else's.

    :returns: False when too many of the device are open from that network, or nothing can make room.
    """
    address = address[:64]
    connection.execute(device_requests.delete().where(device_requests.c.exp <= now - KEPT))
    mine = connection.execute(
        sa.select(device_requests.c.address)
        .where(device_requests.c.device == device)
        .where(device_requests.c.state == "pending")
        .where(device_requests.c.exp > now)
    ).scalars()
    if sum(network(other, HOST) == network(address, HOST) for other in mine) >= MOST_OPEN:
        return False
    if not _make_room(connection):
        return False
    connection.execute(
        device_requests.insert().values(
            device_code=_hash(device_code),
            user_code=_hash(_plain(user_code)),
            device=device,
            scope=scope or None,
            address=address,
            created=now,
            exp=now + EXPIRES_IN,
            interval=INTERVAL,
            state="pending",
        )
    )
    return True


def network(address: str, bits: int) -> str:
    """Return where an address is from: of IPv6 its first bits, of IPv4 the whole."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is None:
        return str(ipaddress.IPv6Network((int(found), bits), strict=False))
    return str(getattr(found, "ipv4_mapped", None) or found)


def _make_room(connection: sa.engine.Connection) -> bool:
    """Drop a request that was not approved if there are as many as there may be. :returns: whether there is room."""
    count = connection.execute(sa.select(sa.func.count()).select_from(device_requests)).scalar() or 0
    if count < MOST_REQUESTS:
        return True
    columns = device_requests.c
    rows = connection.execute(
        sa.select(columns.device_code, columns.address)
        .where(columns.state != "approved")
        .order_by(columns.created, columns.device_code)
    ).all()
    if not rows:
        return False
    places = [network(row.address, SITE) for row in rows]
    ((most, _),) = collections.Counter(places).most_common(1)
    gone = rows[places.index(most)].device_code
    connection.execute(device_requests.delete().where(columns.device_code == gone))
    return True


def _request(row: sa.engine.RowMapping | None) -> Request | None:
    if row is None:
        return None
    return Request(
        key=row["device_code"],
        device=row["device"],
        scope=row["scope"],
        address=row["address"],
        created=row["created"],
        exp=row["exp"],
        interval=row["interval"],
        polled=row["polled"],
        state=row["state"],
        approver=row["approver"],
    )


def find(connection: sa.engine.Connection, user_code: str, now: int) -> Request | None:
    """Return the open request behind a user code, however it is typed."""
    row = connection.execute(
        sa.select(device_requests)
        .where(device_requests.c.user_code == _hash(_plain(user_code)))
        .where(device_requests.c.state == "pending")
        .where(device_requests.c.exp > now)
    ).mappings()
    return _request(row.first())


def decide(connection: sa.engine.Connection, request: Request, *, approved: bool, approver: str) -> bool:
    """Approve or deny an open request. :returns: whether it was still open."""
    changed = connection.execute(
        device_requests.update()
        .where(device_requests.c.device_code == request.key)
        .where(device_requests.c.state == "pending")
        .values(state="approved" if approved else "denied", approver=approver)
    )
    return bool(changed.rowcount)


def of_device_code(connection: sa.engine.Connection, device_code: str) -> Request | None:
    """Return the request behind a device code, whatever its state."""
    row = connection.execute(
        sa.select(device_requests).where(device_requests.c.device_code == _hash(device_code))
    ).mappings()
    return _request(row.first())


def poll(connection: sa.engine.Connection, request: Request, now: int) -> bool:
    """Note a poll of a pending request. :returns: whether it came too soon; the interval grows then."""
    too_soon = request.polled is not None and now < request.polled + request.interval
    interval = request.interval + SLOWER if too_soon else request.interval
    connection.execute(
        device_requests.update()
        .where(device_requests.c.device_code == request.key)
        .values(polled=now, interval=interval)
    )
    return too_soon


def take(connection: sa.engine.Connection, request: Request) -> bool:
    """Use up an approved request: a device code gives one token. :returns: whether it was there."""
    gone = connection.execute(
        device_requests.delete()
        .where(device_requests.c.device_code == request.key)
        .where(device_requests.c.state == "approved")
    )
    return bool(gone.rowcount)


def may_look(connection: sa.engine.Connection, who: str, now: int) -> bool:
    """Say whether an approver may enter another code, after so many wrong ones."""
    row = connection.execute(sa.select(attempts).where(attempts.c.who == who)).mappings().first()
    return row is None or _is_over(row["since"], now) or row["count"] < MOST_LOOKS


def _is_over(since: int, now: int) -> bool:
    return now >= since + LOOKS_SECONDS


def note_failure(database: Database, connection: sa.engine.Connection, who: str, now: int) -> None:
    """Count a code that was wrong."""
    row = connection.execute(sa.select(attempts).where(attempts.c.who == who)).mappings().first()
    if row is None or _is_over(row["since"], now):
        since, count = now, 1
    else:
        since, count = row["since"], row["count"] + 1
    database.insert_or_update(connection, attempts, {"who": who, "since": since, "count": count})
