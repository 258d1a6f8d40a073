# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the token service's tests."""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from bednet.token_service import config, log
from bednet.token_service.database import Database
from bednet.token_service.migrations import upgrade
from tests.token_service.plant import GATEWAY, ISSUER, SECRETS, SITE_AUDIENCE, Clock, Plant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database without content, to copy: migrations take a tenth of a second."""
    path = tmp_path_factory.mktemp("empty") / "tokens.db"
    database = Database(f"sqlite:///{path}")
    upgrade(database)
    database.close()
    return path


@pytest.fixture(scope="session")
def pump_key() -> ec.EllipticCurvePrivateKey:
    """The key of pump-1, for all tests."""
    return ec.generate_private_key(ec.SECP256R1())


def settings_of(folder: Path, **changes: object) -> config.Config:
    """Return a configuration over a folder."""
    return config.parse(
        {
            "issuer": ISSUER,
            "audiences": [SITE_AUDIENCE],
            "gateways": [GATEWAY],
            "database": f"sqlite:///{folder}/tokens.db",
            "keys_dir": str(folder / "keys"),
            "approvers": ["boss"],
            "introspectors": ["watcher"],
            **changes,
        }
    )


@pytest.fixture
def make_plant(
    tmp_path: Path, empty_database: Path, pump_key: ec.EllipticCurvePrivateKey
) -> Iterator[Callable[..., Plant]]:
    """Make a plant with its site applied and a signing key; its log is in a file, and is read again at the end."""
    handlers: list[logging.Handler] = []
    plants: list[Plant] = []

    def make(*, apply: bool = True, rotate: bool = True, wait: float = 0.05, **changes: object) -> Plant:
        shutil.copy(empty_database, tmp_path / "tokens.db")
        (tmp_path / "keys").mkdir(mode=0o700, exist_ok=True)
        settings = settings_of(tmp_path, **changes)
        plant = Plant(settings, Database(settings.database, wait=wait), Clock(), pump_key, tmp_path / "log")
        handler = logging.FileHandler(plant.log)
        handler.setFormatter(log.JsonFormatter())
        log.logger.addHandler(handler)
        handlers.append(handler)
        plants.append(plant)
        if apply:
            plant.apply()
        if rotate:
            plant.rotate()
        return plant

    yield make
    for handler in handlers:
        log.logger.removeHandler(handler)
        handler.close()
    for plant in plants:
        plant.database.close()
        # Whatever a test did: what must not be logged was not. A user code has eight letters.
        text = plant.log.read_text()
        assert not [secret for secret in (*plant.sent, *SECRETS.values()) if len(secret) >= 8 and secret in text]


@pytest.fixture
def plant(make_plant: Callable[..., Plant]) -> Plant:
    """A plant as the others, with nothing special about it."""
    return make_plant()
