# SPDX-License-Identifier: Apache-2.0
"""Whether the clock can be right: a token with a wrong time would be refused, or live too long.

- :func:`check`: refuses to sign while it cannot.
- :func:`forget_future`: the way on when it was ahead, and is right again.
"""

from __future__ import annotations

import sqlalchemy as sa

from bednet.token_service.database import Unavailable, cutoffs, signing_keys, tokens

BUILT = 1_795_000_000
"""2026-11-18: no clock that is right shows less. A Pi without a battery begins at its last shutdown, or in 1970."""

TOLERANCE = 30
"""Seconds that the clocks of several instances may be apart, and that a correction may turn one back."""


def check(connection: sa.engine.Connection, now: int) -> None:
    """Make sure that a token may be issued now.

    :raises Unavailable: when the clock is before this program, or behind the newest token that was issued.
    """
    if now < BUILT:
        raise Unavailable("clock", f"the clock shows {now}, which is before this program was made ({BUILT})")
    newest = connection.execute(sa.select(sa.func.max(tokens.c.iat)).where(tokens.c.revoked.is_(None))).scalar()
    if newest is not None and now < newest - TOLERANCE:
        raise Unavailable("clock", f"the clock shows {now}, and the newest token was issued at {newest}")


def forget_future(connection: sa.engine.Connection, now: int) -> int:
    """Undo what was done while the clock was ahead: tokens of that time end, and cutoffs and keys of it hold from now.

    :param now: the right time, as somebody has made sure.
    :returns: how much that was.
    :raises Unavailable: when it cannot be right (``clock``).
    """
    if now < BUILT:
        check(connection, now)
    changed = 0
    for statement in (
        tokens.update().where(tokens.c.iat > now + TOLERANCE).where(tokens.c.revoked.is_(None)).values(revoked=now),
        cutoffs.update().where(cutoffs.c.at > now).values(at=now),
        signing_keys.update().where(signing_keys.c.created > now).values(created=now, signs_from=now),
    ):
        changed += connection.execute(statement).rowcount
    return changed
