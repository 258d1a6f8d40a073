# SPDX-License-Identifier: Apache-2.0
"""The first schema."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables, and the key of the page's form."""
    meta = op.create_table(
        "meta",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_table(
        "devices",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("profile", sa.Text, nullable=False),
        sa.Column("placeholders", sa.Text, nullable=False),
        sa.Column("method", sa.String(32)),
        sa.Column("certificate", sa.Boolean, nullable=False),
        sa.Column("until", sa.BigInteger),
        sa.Column("revoked", sa.String(32)),
        sa.Column("secret", sa.Text),
        sa.Column("public_key", sa.Text),
    )
    op.create_table(
        "profiles",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("rules", sa.Text, nullable=False),
    )
    op.create_table(
        "revoked_serials",
        sa.Column("serial", sa.String(40), primary_key=True),
        sa.Column("reason", sa.String(32), nullable=False),
    )
    op.create_table(
        "signing_keys",
        sa.Column("kid", sa.String(64), primary_key=True),
        sa.Column("algorithm", sa.String(8), nullable=False),
        sa.Column("jwk", sa.Text, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("signs_from", sa.BigInteger, nullable=False),
        sa.Column("retires_at", sa.BigInteger),
    )
    op.create_table(
        "tokens",
        sa.Column("jti", sa.String(64), primary_key=True),
        sa.Column("device", sa.String(64), nullable=False),
        sa.Column("iat", sa.BigInteger, nullable=False),
        sa.Column("exp", sa.BigInteger, nullable=False),
        sa.Column("revoked", sa.BigInteger),
    )
    for column in ("iat", "exp", "revoked"):
        op.create_index(f"ix_tokens_{column}", "tokens", [column])
    op.create_table(
        "cutoffs",
        sa.Column("device", sa.String(64), primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "marks",
        sa.Column("device", sa.String(64), primary_key=True),
        sa.Column("reinstated", sa.BigInteger, nullable=False),
        sa.Column("gone", sa.String(32)),
    )
    op.create_table(
        "assertions",
        sa.Column("used", sa.String(64), primary_key=True),
        sa.Column("exp", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_assertions_exp", "assertions", ["exp"])
    op.create_table(
        "device_requests",
        sa.Column("device_code", sa.String(64), primary_key=True),
        sa.Column("user_code", sa.String(64), nullable=False, unique=True),
        sa.Column("device", sa.String(64), nullable=False),
        sa.Column("scope", sa.Text),
        sa.Column("address", sa.String(64), nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Column("exp", sa.BigInteger, nullable=False),
        sa.Column("interval", sa.Integer, nullable=False),
        sa.Column("polled", sa.BigInteger),
        sa.Column("state", sa.String(8), nullable=False),
        sa.Column("approver", sa.String(64)),
    )
    for column in ("device", "exp"):
        op.create_index(f"ix_device_requests_{column}", "device_requests", [column])
    op.create_table(
        "attempts",
        sa.Column("who", sa.String(80), primary_key=True),
        sa.Column("since", sa.BigInteger, nullable=False),
        sa.Column("count", sa.Integer, nullable=False),
    )
    if meta is not None:
        op.bulk_insert(meta, [{"name": "form-key", "value": secrets.token_hex(32)}])
