# SPDX-License-Identifier: Apache-2.0
"""Whether the clock can be right: a token with a wrong time would be refused, or live too long.

- :func:`check`: refuses to sign while it cannot.
"""

from __future__ import annotations

import sqlalchemy as sa

from bednet.token_service.database import Unavailable, tokens

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
    newest = connection.execute(sa.select(sa.func.max(tokens.c.iat))).scalar()
    if newest is not None and now < newest - TOLERANCE:
        raise Unavailable("clock", f"the clock shows {now}, and the newest token was issued at {newest}")
