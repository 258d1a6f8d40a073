# SPDX-License-Identifier: Apache-2.0
"""Tokens that are over before their time (RFC 7009), and the list of them that brokers fetch.

- :func:`revoke_token`, :func:`revoke_device`: ends one token, or all of a device's so far.
- :func:`revoke_own`: ends a token for its own device, which cannot make the list long.
- :func:`is_revoked`: says whether a token is over.
- :func:`listed`: the content of the revocation list (docs/token-service.md).
- :func:`purge`: forgets what is over in any case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from bednet.token_service.database import assertions, attempts, cutoffs, device_requests, devices, marks, tokens

if TYPE_CHECKING:
    from bednet.token_service.database import Database
    from bednet.token_service.jose import Json

LEEWAY = 300
"""Seconds that a revoked token is listed after its end; an issuer's leeway is at most that."""

CUTOFF_SECONDS = 86_400 + LEEWAY
"""How long a cutoff is listed: no token of this service is valid for more than a day."""

MOST_OWN = 32
"""Tokens that a device has ended and that are listed one by one; with the next one all that it has so far end.

With some 200 bytes for each, brokers take the lists (16 MiB) of thousands of devices that do nothing but this.
"""

LIST_SECONDS = 3600
"""How long a list is good."""


def revoke_token(connection: sa.engine.Connection, jti: str, now: int) -> bool:
    """End one token. :returns: whether it was valid until now."""
    found = connection.execute(
        tokens.update().where(tokens.c.jti == jti).where(tokens.c.revoked.is_(None)).values(revoked=now)
    )
    return bool(found.rowcount)


def revoke_own(
    database: Database, connection: sa.engine.Connection, jti: str, device: str, now: int
) -> tuple[bool, int | None]:
    """End a token that its own device gives back (RFC 7009, 2.1).

    With more than :data:`MOST_OWN` of them a cutoff takes their place: every token of the device so far ends, and the
    list has one line for it. A cutoff never lies ahead of the clock, else a device in a hurry would push the times of
    its own tokens into the future; so what it ends in the very second of its cutoff is listed until it ends one more.

    :returns: whether it was valid until now; and the cutoff, if there is a new one.
    """
    if not revoke_token(connection, jti, now):
        return False, None
    listed_ones = sa.select(sa.func.count()).select_from(_LISTED).where(*_listed(now)).where(tokens.c.device == device)
    if (connection.execute(listed_ones).scalar() or 0) <= MOST_OWN:
        return True, None
    # Two instances must not both make the first cutoff, and the later of two cutoffs counts.
    database.take_turns(connection)
    before = connection.execute(sa.select(cutoffs.c.at).where(cutoffs.c.device == device)).scalar()
    if before is not None and before >= now:
        return True, None
    database.insert_or_update(connection, cutoffs, {"device": device, "at": now})
    return True, now


def revoke_device(
    database: Database,
    connection: sa.engine.Connection,
    device: str,
    now: int,
    *,
    reason: str | None = None,
    reinstated: int = 0,
) -> bool:
    """End every token that a device has.

    :param reason: the device gets no new one either, until the site reinstates it.
    :param reinstated: the mark that the site had of it until now: with no later one it comes back (docs/store.md).
    :returns: whether that is new: False when no token was issued since it was done last.
    """
    # A token that is being issued is waited for, and ends too; so does one that was issued ahead of this clock.
    connection.execute(sa.select(devices.c.id).where(devices.c.id == device).with_for_update()).first()
    # Whoever is told to end all tokens means those, too, that this database does not know: of a stolen key.
    new = end_tokens(database, connection, device, now, unknown=reason is None)
    _forget_ended(connection, device)
    if reason is not None:
        locked = connection.execute(
            devices.update()
            .where(devices.c.id == device)
            .where(sa.or_(devices.c.revoked.is_(None), devices.c.revoked != reason))
            .values(revoked=reason, secret=None, certificates=None)
        )
        new = new or bool(locked.rowcount)
        mark = connection.execute(sa.select(marks.c.reinstated).where(marks.c.device == device)).scalar()
        if reinstated > (mark or 0):
            database.insert_or_update(connection, marks, {"device": device, "reinstated": reinstated, "gone": None})
            new = True
    return new


def _forget_ended(connection: sa.engine.Connection, device: str) -> None:
    """Forget tokens that a device's cutoff ends: they count no more among those that it may have."""
    at = connection.execute(sa.select(cutoffs.c.at).where(cutoffs.c.device == device)).scalar()
    # The newest token stays: a clock that jumps back is known by it.
    newest = connection.execute(sa.select(sa.func.max(tokens.c.iat))).scalar()
    if at is not None and newest is not None:
        over = tokens.delete().where(tokens.c.device == device).where(tokens.c.iat <= at)
        connection.execute(over.where(tokens.c.iat < newest))


def end_tokens(
    database: Database, connection: sa.engine.Connection, device: str, now: int, *, unknown: bool = False
) -> bool:
    """Give a device a cutoff behind every token that was issued to it, and never an earlier one than it has.

    :param connection: has locked the device, so that none is being issued.
    :param unknown: tokens that are not recorded end, too: the cutoff is not before `now` in any case.
    :returns: False when no token was issued since its last cutoff, which then stays.
    """
    before = connection.execute(sa.select(cutoffs.c.at).where(cutoffs.c.device == device)).scalar()
    live = sa.select(sa.func.max(tokens.c.iat)).where(tokens.c.device == device).where(tokens.c.revoked.is_(None))
    newest = connection.execute(live).scalar()
    if before is not None and (newest or 0) <= before and not (unknown and before < now):
        return False
    database.insert_or_update(connection, cutoffs, {"device": device, "at": max(now, newest or 0)})
    return True


def is_revoked(connection: sa.engine.Connection, jti: str, device: str, iat: int) -> bool:
    """Say whether a token is over: revoked, issued before its device's cutoff, or never recorded."""
    row = connection.execute(sa.select(tokens.c.revoked).where(tokens.c.jti == jti)).first()
    at = connection.execute(sa.select(cutoffs.c.at).where(cutoffs.c.device == device)).scalar()
    return row is None or row.revoked is not None or (at is not None and iat <= at)


_LISTED = tokens.outerjoin(cutoffs, tokens.c.device == cutoffs.c.device)


def _listed(now: int) -> tuple[sa.sql.ColumnElement[bool], ...]:
    """Return what holds of a token that is listed by itself: its device's cutoff, if any, does not end it anyway."""
    return (
        tokens.c.revoked.is_not(None),
        tokens.c.exp > now - LEEWAY,
        sa.or_(cutoffs.c.at.is_(None), cutoffs.c.at < tokens.c.iat),
    )


def listed(connection: sa.engine.Connection, now: int) -> Json:
    """Return ``tokens`` and ``cutoffs`` of the revocation list."""
    rows = connection.execute(
        sa.select(tokens.c.jti, tokens.c.exp, tokens.c.device)
        .select_from(_LISTED)
        .where(*_listed(now))
        .order_by(tokens.c.exp, tokens.c.jti)
    )
    ends = connection.execute(
        sa.select(cutoffs.c.device, cutoffs.c.at).where(cutoffs.c.at > now - CUTOFF_SECONDS).order_by(cutoffs.c.device)
    )
    return {
        "tokens": [{"jti": row.jti, "exp": row.exp, "device": row.device} for row in rows],
        "cutoffs": {row.device: row.at for row in ends},
    }


def purge(connection: sa.engine.Connection, now: int) -> int:
    """Forget what is over. :returns: how many rows went."""
    # The newest token stays: a clock that jumps back is known by it.
    newest = connection.execute(sa.select(sa.func.max(tokens.c.iat))).scalar()
    gone = 0
    for statement in (
        tokens.delete().where(tokens.c.exp <= now - LEEWAY).where(tokens.c.iat < (newest or 0)),
        cutoffs.delete().where(cutoffs.c.at <= now - CUTOFF_SECONDS),
        assertions.delete().where(assertions.c.exp <= now - LEEWAY),
        device_requests.delete().where(device_requests.c.exp <= now - LEEWAY),
        attempts.delete().where(attempts.c.since <= now - 86_400),
    ):
        gone += connection.execute(statement).rowcount
    return gone
