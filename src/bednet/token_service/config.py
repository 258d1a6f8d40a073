# SPDX-License-Identifier: Apache-2.0
"""The configuration of the token service: one JSON object in one file.

- :class:`Config`: what it says.
- :func:`load`: reads it, and refuses whatever it does not know.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bednet.errors import BednetError

PATH = Path("/etc/bednet-token-service/config.json")
ALGORITHMS = ("ES256", "EdDSA")
LOG_LEVELS = ("debug", "info", "warning", "error")
DEVICE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
TOKEN_SECONDS = range(30, 86_401)
MOST_AUDIENCES = 255

_REQUIRED = {"issuer", "audiences", "database", "keys_dir"}
_OPTIONAL: dict[str, Any] = {
    "gateways": [],
    "database_password_file": None,
    "algorithm": "ES256",
    "token_seconds": 900,
    "approvers": [],
    "introspectors": [],
    "log_level": "info",
}


class ConfigError(BednetError):
    """The configuration cannot be used; the message says why, and what to do."""

    code = "config"


@dataclass(frozen=True)
class Config:
    """What the configuration says.

    :ivar issuer: the ``iss`` of every token: an https URL without path, query and fragment (RFC 8414, 2).
    :ivar audiences: what a token is for when the client names no resource; the site's brokers, all of them.
    :ivar gateways: what a client may ask for instead (RFC 8707): ``mqtts://`` and the DNS name of one gateway.
    :ivar database: a URL of SQLAlchemy; the password of PostgreSQL is not in it.
    :ivar keys_dir: where the private keys of this instance are.
    :ivar algorithm: of new signing keys: ES256 or EdDSA.
    :ivar token_seconds: how long a token is valid.
    :ivar approvers: ids whose client certificate may approve devices (RFC 8628).
    :ivar introspectors: ids that may look at every token (RFC 7662); others see their own.
    """

    issuer: str
    audiences: tuple[str, ...]
    database: str
    keys_dir: Path
    gateways: tuple[str, ...] = ()
    database_password_file: Path | None = None
    algorithm: str = "ES256"
    token_seconds: int = 900
    approvers: tuple[str, ...] = ()
    introspectors: tuple[str, ...] = ()
    log_level: str = "info"

    @property
    def token_endpoint(self) -> str:
        """The URL of the token endpoint."""
        return f"{self.issuer}/token"

    @property
    def people(self) -> frozenset[str]:
        """Ids that the service must know although they may have no way to get a token."""
        return frozenset(self.approvers) | frozenset(self.introspectors)


def load(path: str | Path) -> Config:
    """Read the configuration.

    :raises ConfigError: when the file is missing, or anything in it is unknown or not as docs/token-service.md says.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}. Cure: run playbooks/site.yml, which writes it") from exc
    except ValueError as exc:
        raise ConfigError(f"{path}: it is not JSON in UTF-8. Cure: run playbooks/site.yml, which writes it") from exc
    try:
        return parse(data)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def parse(data: object) -> Config:
    """Make a configuration of a JSON object.

    :raises ConfigError: see :func:`load`.
    """
    if not isinstance(data, dict):
        raise ConfigError("it is no JSON object. Cure: see docs/token-service.md")
    if unknown := sorted(data.keys() - _REQUIRED - _OPTIONAL.keys()):
        raise ConfigError(f"{unknown[0]!r} is unknown. Cure: take it out; docs/token-service.md has the names")
    if missing := sorted(_REQUIRED - data.keys()):
        raise ConfigError(f"{missing[0]!r} is missing. Cure: add it; docs/token-service.md says what it is")
    values: dict[str, Any] = {**_OPTIONAL, **data}
    password_file = values["database_password_file"]
    return Config(
        issuer=_issuer(values["issuer"]),
        audiences=_audiences(values["audiences"], "audiences", least=1),
        gateways=_audiences(values["gateways"], "gateways", least=0),
        database=_text(values["database"], "database"),
        database_password_file=None if password_file is None else _path(password_file, "database_password_file"),
        keys_dir=_path(values["keys_dir"], "keys_dir"),
        algorithm=_one_of(values["algorithm"], ALGORITHMS, "algorithm"),
        token_seconds=_seconds(values["token_seconds"]),
        approvers=_ids(values["approvers"], "approvers"),
        introspectors=_ids(values["introspectors"], "introspectors"),
        log_level=_one_of(values["log_level"], LOG_LEVELS, "log_level"),
    )


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ConfigError(f"{name!r} is not text. Cure: write it in quotes")
    return value


def _issuer(value: object) -> str:
    text = _text(value, "issuer")
    parts = urlsplit(text)
    if parts.scheme != "https" or not parts.hostname or text != f"https://{parts.netloc}" or "@" in parts.netloc:
        message = f"'issuer' is {text!r}. Cure: write https://NAME or https://NAME:PORT, without anything behind it"
        raise ConfigError(message)
    return text


def _list(value: object, name: str) -> list[str]:
    if not isinstance(value, list) or len(set(map(str, value))) != len(value):
        raise ConfigError(f"{name!r} is no list, or has something twice. Cure: write a list of text")
    return [_text(item, name) for item in value]


def _audiences(value: object, name: str, *, least: int) -> tuple[str, ...]:
    texts = _list(value, name)
    if not least <= len(texts) <= MOST_AUDIENCES:
        raise ConfigError(f"{name!r} has {len(texts)} entries. Cure: write {least} to {MOST_AUDIENCES}")
    for text in texts:
        # RFC 8707, 2: an absolute URI without a fragment.
        parts = urlsplit(text)
        if not parts.scheme or not parts.netloc or parts.fragment or " " in text:
            raise ConfigError(f"{name!r} has {text!r}. Cure: write a URI, such as mqtts://plant.example")
    return tuple(texts)


def _ids(value: object, name: str) -> tuple[str, ...]:
    texts = _list(value, name)
    for text in texts:
        if not DEVICE_ID.fullmatch(text):
            raise ConfigError(f"{name!r} has {text!r}, which cannot be a device's id. Cure: write ids of devices.yml")
    return tuple(texts)


def _path(value: object, name: str) -> Path:
    path = Path(_text(value, name))
    if not path.is_absolute():
        raise ConfigError(f"{name!r} is {str(path)!r}. Cure: write a path from the root on")
    return path


def _one_of(value: object, words: tuple[str, ...], name: str) -> str:
    if not isinstance(value, str) or value not in words:
        raise ConfigError(f"{name!r} is {value!r}. Cure: write one of {', '.join(words)}")
    return value


def _seconds(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value not in TOKEN_SECONDS:
        limits = f"{TOKEN_SECONDS.start} to {TOKEN_SECONDS.stop - 1}"
        raise ConfigError(f"'token_seconds' is {value!r}. Cure: write a whole number of seconds, {limits}")
    return value
