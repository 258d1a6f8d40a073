# SPDX-License-Identifier: Apache-2.0
"""What Alembic runs: the migrations, in the transaction that it is given."""

from __future__ import annotations

from alembic import context

from bednet.token_service.database import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
context.run_migrations()
