# SPDX-License-Identifier: Apache-2.0
"""The token service: OAuth 2.0 for the devices of a site.

- :func:`create_app`: the WSGI application, for gunicorn.

docs/token-service.md has its endpoints, its errors and its tool; this package needs Authlib, Flask, SQLAlchemy, Alembic
and cryptography in the versions of Debian 12 or later, and of bednet only ``bednet.topics`` and ``bednet.errors``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask


def create_app(config_path: str) -> Flask:
    """Make the WSGI application.

    :param config_path: see :mod:`bednet.token_service.config`.
    :raises ConfigError: when the file cannot be used.
    """
    # The tool and its migrations do without the framework.
    from bednet.token_service.app import make_app  # noqa: PLC0415
    from bednet.token_service.config import load  # noqa: PLC0415

    return make_app(load(config_path))
