# SPDX-License-Identifier: Apache-2.0
"""Indexes with which a token is issued as fast beside a million others as beside none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Replace the index of all tokens by when they were revoked: nearly all are not, and SQLite would scan these."""
    op.drop_index("ix_tokens_revoked", table_name="tokens")
    for name, column, those in (
        ("ix_tokens_live", "iat", "revoked IS NULL"),
        ("ix_tokens_ended", "exp", "revoked IS NOT NULL"),
    ):
        op.create_index(name, "tokens", [column], sqlite_where=sa.text(those), postgresql_where=sa.text(those))
    op.create_index("ix_tokens_device", "tokens", ["device", "exp"])
