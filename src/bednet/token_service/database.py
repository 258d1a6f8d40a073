# SPDX-License-Identifier: Apache-2.0
"""The database of the token service: SQLite, or PostgreSQL for several instances.

- :class:`Database`: connections and transactions; what fails becomes :class:`Unavailable`.
- the tables, as the newest migration leaves them (``migrations/``).

Times are unix seconds. Nothing that lets anybody in is stored as it is: of secrets, device codes, user codes and the
``jti`` of assertions there are only hashes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import threading
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.pool import QueuePool

from bednet.errors import BednetError
from bednet.token_service.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bednet.token_service.config import Config

SCHEMA = "0003"
"""The newest migration."""

WAIT_SECONDS = 3
"""How long to wait for another writer, or for a connection, before the answer is 503."""

POOL_SIZE, POOL_OVERFLOW = 4, 8

TURN = 0x6265646E6574
"""The number of PostgreSQL's advisory lock: "bednet"."""

metadata = sa.MetaData()

meta = sa.Table(
    "meta",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

devices = sa.Table(
    "devices",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("profile", sa.Text, nullable=False),
    sa.Column("placeholders", sa.Text, nullable=False),  # JSON: the values of the profile's placeholders
    sa.Column("method", sa.String(32)),  # none: the service knows it, and gives it no token
    sa.Column("certificate", sa.Boolean, nullable=False),  # it may also come to the broker by certificate alone
    sa.Column("until", sa.BigInteger),
    sa.Column("revoked", sa.String(32)),
    sa.Column("secret", sa.Text),
    sa.Column("certificates", sa.Text),  # PEM: of the keys that it signs with
)

profiles = sa.Table(
    "profiles",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("rules", sa.Text, nullable=False),  # JSON: [[effect, access, [text or number, ...]], ...]
)

revoked_serials = sa.Table(
    "revoked_serials",
    metadata,
    sa.Column("serial", sa.String(40), primary_key=True),  # hexadecimal, lower case, no leading zeros
    sa.Column("reason", sa.String(32), nullable=False),
)

signing_keys = sa.Table(
    "signing_keys",
    metadata,
    sa.Column("kid", sa.String(64), primary_key=True),
    sa.Column("algorithm", sa.String(8), nullable=False),
    sa.Column("jwk", sa.Text, nullable=False),  # the public half
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("signs_from", sa.BigInteger, nullable=False),
    sa.Column("retires_at", sa.BigInteger),  # from then on it is in no JWKS
)

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("jti", sa.String(64), primary_key=True),
    sa.Column("device", sa.String(64), nullable=False),
    sa.Column("iat", sa.BigInteger, nullable=False, index=True),
    sa.Column("exp", sa.BigInteger, nullable=False, index=True),
    sa.Column("revoked", sa.BigInteger),
    sa.Index("ix_tokens_device", "device", "exp"),
)
_live, _ended = tokens.c.revoked.is_(None), tokens.c.revoked.is_not(None)
sa.Index("ix_tokens_live", tokens.c.iat, sqlite_where=_live, postgresql_where=_live)
sa.Index("ix_tokens_ended", tokens.c.exp, sqlite_where=_ended, postgresql_where=_ended)

cutoffs = sa.Table(
    "cutoffs",
    metadata,
    sa.Column("device", sa.String(64), primary_key=True),
    sa.Column("at", sa.BigInteger, nullable=False),  # tokens with iat <= at are refused
)

marks = sa.Table(
    "marks",
    metadata,
    sa.Column("device", sa.String(64), primary_key=True),
    sa.Column("reinstated", sa.BigInteger, nullable=False),  # the latest of the site's marks; 0 for none
    sa.Column("gone", sa.String(32)),  # why it was revoked when the site ceased to list it
)

assertions = sa.Table(
    "assertions",
    metadata,
    sa.Column("used", sa.String(64), primary_key=True),  # SHA-256 of client id, NUL, jti; hexadecimal
    sa.Column("exp", sa.BigInteger, nullable=False, index=True),
)

device_requests = sa.Table(
    "device_requests",
    metadata,
    sa.Column("device_code", sa.String(64), primary_key=True),  # SHA-256, hexadecimal; likewise user_code
    sa.Column("user_code", sa.String(64), nullable=False, unique=True),
    sa.Column("device", sa.String(64), nullable=False, index=True),
    sa.Column("scope", sa.Text),
    sa.Column("address", sa.String(64), nullable=False),
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("exp", sa.BigInteger, nullable=False, index=True),
    sa.Column("interval", sa.Integer, nullable=False),
    sa.Column("polled", sa.BigInteger),
    sa.Column("state", sa.String(8), nullable=False),  # pending, approved, denied
    sa.Column("approver", sa.String(64)),
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("who", sa.String(80), primary_key=True),
    sa.Column("since", sa.BigInteger, nullable=False),
    sa.Column("count", sa.Integer, nullable=False),
)


class Unavailable(BednetError):  # noqa: N818 - it says what is so
    """The service cannot answer now; nothing was changed, and the client shall come again.

    :ivar code: for the operator: ``database-locked``, ``database-full``, ``database-read-only``, ``database-schema``,
        ``database-unreachable``, ``database-error``, ``clock``, ``signing-key``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


_SIGNS = (
    ("database-locked", re.compile("database (table )?is locked|lock timeout|statement timeout")),
    ("database-full", re.compile("disk is full|disk I/O error|No space left|[Dd]isk quota")),
    ("database-read-only", re.compile("readonly database|read-only transaction")),
    ("database-schema", re.compile("no such (table|column)|relation .* does not exist|column .* does not exist")),
    ("database-unreachable", re.compile("unable to open|connect|server closed|terminat|QueuePool|recovery mode")),
)


def unavailable(exc: Exception) -> Unavailable:
    """Say in one word what a database error means for the operator. SQL and parameters stay out of it."""
    text = str(getattr(exc, "orig", None) or exc)
    code = next((code for code, sign in _SIGNS if sign.search(text)), "database-error")
    return Unavailable(code, text.splitlines()[0][:200] if text else type(exc).__name__)


class Database:
    """The database behind a URL; safe to share between threads. Nothing is opened before it is used."""

    def __init__(self, url: str, password: str | None = None, *, wait: float = WAIT_SECONDS) -> None:
        """Name a database.

        :param url: as SQLAlchemy writes it, ``sqlite:////path`` or ``postgresql://user@host/name``.
        :param wait: seconds to wait for a lock or a connection.
        :raises ConfigError: when it is no such URL, or its driver is missing.
        """
        try:
            parsed = make_url(url)
        except sa.exc.ArgumentError as exc:
            raise ConfigError("'database' is no URL of SQLAlchemy. Cure: see docs/token-service.md") from exc
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self._wait = wait
        # SQLite has one writer. Threads that queue here are served in turn; SQLite's own waiting is a lottery.
        self._writer = threading.Lock()
        arguments: dict[str, Any] = {"pool_size": POOL_SIZE, "max_overflow": POOL_OVERFLOW, "pool_timeout": wait}
        if self.is_sqlite:
            if not parsed.database or not parsed.database.startswith("/"):
                raise ConfigError("'database' names no file. Cure: write sqlite:////PATH, with four slashes")
            arguments["connect_args"] = {"timeout": wait, "check_same_thread": False}
        elif parsed.get_backend_name() == "postgresql":
            if parsed.password is not None:
                raise ConfigError("'database' holds a password. Cure: put it into 'database_password_file'")
            parsed = parsed.set(drivername=_postgresql_driver(parsed.drivername), password=password)
            milliseconds = int(wait * 1000)
            options = f"-c lock_timeout={milliseconds} -c statement_timeout={2 * milliseconds}"
            arguments["connect_args"] = {"connect_timeout": max(2, int(wait)), "options": options}
            arguments["pool_pre_ping"] = True
        else:
            raise ConfigError(f"'database' is {parsed.drivername!r}. Cure: use sqlite or postgresql")
        # A statement in a message may carry what belongs in no log.
        self.engine = sa.create_engine(parsed, poolclass=QueuePool, hide_parameters=True, **arguments)
        if self.is_sqlite:
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)

    @classmethod
    def of(cls, config: Config, *, wait: float = WAIT_SECONDS) -> Database:
        """Name the database of a configuration.

        :raises ConfigError: see above, or when the file with the password cannot be read.
        """
        password = None
        if (path := config.database_password_file) is not None:
            try:
                password = path.read_text(encoding="utf-8").rstrip("\n")
            except (OSError, UnicodeDecodeError) as exc:
                message = f"{path}: the database's password cannot be read. Cure: run playbooks/site.yml"
                raise ConfigError(message) from exc
        return cls(config.database, password, wait=wait)

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.engine.Connection]:
        """Open a transaction that only reads.

        :raises Unavailable: when the database does not answer.
        """
        with self._errors(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.engine.Connection]:
        """Open a transaction that is committed when the block ends well.

        :raises Unavailable: when the database does not answer, is locked for too long, or has no room.
        :raises sqlalchemy.exc.IntegrityError: when something is there already.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._errors())
            if self.is_sqlite:
                if not self._writer.acquire(timeout=self._wait):
                    raise Unavailable("database-locked", "another request is writing for too long")
                stack.callback(self._writer.release)
            connection = stack.enter_context(self.engine.connect())
            connection = connection.execution_options(bednet_write=True)
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.IntegrityError:
            raise
        except (sa.exc.SQLAlchemyError, OSError) as exc:
            raise unavailable(exc) from exc

    def check_schema(self) -> None:
        """Make sure that the tables are those of this program.

        :raises Unavailable: when they are not (``database-schema``), or the database does not answer.
        """
        with self.reading() as connection:
            found = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
        if found != SCHEMA:
            raise Unavailable("database-schema", f"the database has the schema {found}, and this program {SCHEMA}")

    def take_turns(self, connection: sa.engine.Connection) -> None:
        """Wait until no other tool changes the whole: several instances are deployed at once. SQLite has one writer."""
        if not self.is_sqlite:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(TURN)))

    def insert_or_update(self, connection: sa.engine.Connection, table: sa.Table, row: dict[str, Any]) -> None:
        """Write a row, whether its key is there or not."""
        (key,) = table.primary_key.columns
        changed = connection.execute(
            table.update().where(key == row[key.name]).values(**{k: v for k, v in row.items() if k != key.name})
        )
        if not changed.rowcount:
            connection.execute(table.insert().values(**row))

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _postgresql_driver(asked: str) -> str:
    """Choose the driver: Debian 12 has SQLAlchemy 1.4, which knows psycopg2 only; later ones know psycopg."""
    if "+" in asked:
        return asked
    if int(sa.__version__.split(".", 1)[0]) > 1 and importlib.util.find_spec("psycopg"):
        return "postgresql+psycopg"
    if importlib.util.find_spec("psycopg2"):
        return "postgresql+psycopg2"
    raise ConfigError("no driver of PostgreSQL. Cure: install python3-psycopg (Debian 12: python3-psycopg2)")


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # SQLAlchemy begins transactions (below), not Python's module.
    connection.isolation_level = None
    cursor = connection.cursor()
    try:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "cache_size = -1000"):
            cursor.execute(f"PRAGMA {pragma}")
    finally:
        cursor.close()


def _begin_sqlite(connection: sa.engine.Connection) -> None:
    # A transaction that begins by reading and goes on to write would fail at once when another one wrote meanwhile.
    write = connection.get_execution_options().get("bednet_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
