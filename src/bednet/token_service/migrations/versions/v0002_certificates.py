# SPDX-License-Identifier: Apache-2.0
"""Of devices that sign their requests, certificates in place of bare keys: these can be revoked, and run out."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Rename the column. What is in it comes anew with the site, which the role applies right after this."""
    op.execute("UPDATE devices SET public_key = NULL")
    op.execute("ALTER TABLE devices RENAME COLUMN public_key TO certificates")
