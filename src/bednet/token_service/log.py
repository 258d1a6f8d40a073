# SPDX-License-Identifier: Apache-2.0
"""The log: one JSON object a line on stderr, which systemd's journal keeps.

- :func:`set_up`: sends this package's records there, and keeps libraries from logging what they should not.
- :func:`event`: writes one line.

Ids, reasons and the ``jti`` of tokens are logged; tokens, secrets, assertions, codes and keys never are.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback

LOGGER = "bednet.token_service"
logger = logging.getLogger(LOGGER)

# Authlib logs whole tokens at the level debug, SQLAlchemy statements at info.
_TALKATIVE = ("authlib", "sqlalchemy", "alembic", "werkzeug")


class JsonFormatter(logging.Formatter):
    """Makes a record one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; of an exception its type and place, as its text may quote what was sent."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0]:
            frames = traceback.extract_tb(record.exc_info[2])
            line["exception"] = record.exc_info[0].__name__
            line["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return json.dumps(line, ensure_ascii=True)


def set_up(level: str) -> None:
    """Send this package's records from a level on to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    handler.set_name(LOGGER)
    for old in [one for one in logger.handlers if one.get_name() == LOGGER]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)


def event(level: int, name: str, **fields: object) -> None:
    """Write one line; fields that are None are left out."""
    known = {key: value for key, value in fields.items() if value is not None}
    logger.log(level, name, extra={"fields": known})
