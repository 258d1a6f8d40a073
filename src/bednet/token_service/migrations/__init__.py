# SPDX-License-Identifier: Apache-2.0
"""The database's migrations; ``bednet-token-service migrate`` runs them.

- :func:`upgrade`: brings a database to the newest schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext

if TYPE_CHECKING:
    from bednet.token_service.database import Database


def upgrade(database: Database, schema: str = "head") -> tuple[str | None, str | None]:
    """Bring a database to the newest schema, or to an older one. :returns: the schema before and after."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    with database.writing() as connection:
        database.take_turns(connection)
        context = MigrationContext.configure(connection)
        before = context.get_current_revision()
        config.attributes["connection"] = connection
        command.upgrade(config, schema)
        return before, context.get_current_revision()
