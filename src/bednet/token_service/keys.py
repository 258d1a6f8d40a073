# SPDX-License-Identifier: Apache-2.0
"""The signing keys: made on this host, published by the database, rotated with an overlap.

- :class:`Keys`: signs with the key whose time has come, and tells which keys are valid.
- :func:`rotate`, :func:`activate`: a new key, published before it signs; and the moment from which it signs.
- :func:`published`: the JWK Set (RFC 7517, 5).

A private key is a file of this instance, and never leaves its host. Several instances publish their public keys in one
database, and each signs with its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from bednet.token_service import jose
from bednet.token_service.database import Unavailable, signing_keys

if TYPE_CHECKING:
    from pathlib import Path

    from bednet.token_service.jose import Json, PrivateKey, PublicKey

logger = logging.getLogger(__name__)

SIGN_AFTER = 900
"""Seconds between a key's publication and its first signature: three rounds of the brokers' timer."""

LEEWAY = 300
"""Seconds that a key stays published after its last token is over; an issuer's leeway is at most that."""

_SUFFIX = ".pem"


@dataclass(frozen=True)
class Signer:
    """A key to sign with now."""

    kid: str
    private: PrivateKey

    def sign(self, typ: str, claims: Json) -> str:
        """Return a signed token of a type (RFC 8725, 3.11)."""
        return jose.sign(self.private, {"typ": typ, "kid": self.kid}, claims)


class Keys:
    """The private keys of this instance. Files are read once; which of them signs is asked of the database."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._private: dict[str, PrivateKey] = {}
        self._lock = threading.Lock()

    def signer(self, connection: sa.engine.Connection, now: int) -> Signer:
        """Return the key to sign with.

        :raises Unavailable: when this instance has none whose time has come (``signing-key``).
        """
        rows = connection.execute(
            sa.select(signing_keys.c.kid)
            .where(signing_keys.c.signs_from <= now)
            .where(sa.or_(signing_keys.c.retires_at.is_(None), signing_keys.c.retires_at > now))
            .order_by(
                signing_keys.c.signs_from.desc(),
                # In the second of an activation: the one that nobody has retired.
                signing_keys.c.retires_at.is_(None).desc(),
                signing_keys.c.created.desc(),
            )
        )
        for (kid,) in rows:
            if private := self._load(kid):
                return Signer(kid, private)
        raise Unavailable("signing-key", f"no key in {self._folder} is published and may sign now")

    def _load(self, kid: str) -> PrivateKey | None:
        with self._lock:
            if kid not in self._private:
                try:
                    data = (self._folder / f"{kid}{_SUFFIX}").read_bytes()
                except FileNotFoundError:
                    return None  # another instance's
                except OSError as exc:
                    raise Unavailable("signing-key", f"{self._folder}: {exc.strerror}") from exc
                try:
                    key = serialization.load_pem_private_key(data, None)
                except (ValueError, TypeError) as exc:
                    raise Unavailable("signing-key", f"{self._folder}/{kid}{_SUFFIX} is no private key") from exc
                if not isinstance(key, (ec.EllipticCurvePrivateKey, ed25519.Ed25519PrivateKey)):
                    raise Unavailable("signing-key", f"{self._folder}/{kid}{_SUFFIX} is of the wrong kind")
                self._private[kid] = key
            return self._private[kid]

    def own(self) -> set[str]:
        """Return the ids of the keys that this instance has."""
        with contextlib.suppress(FileNotFoundError):
            return {path.name.removesuffix(_SUFFIX) for path in self._folder.glob(f"*{_SUFFIX}")}
        return set()

    def make(self, algorithm: str) -> Json:
        """Make a key, and store it so that nobody else can read it. :returns: its public half, with ``kid``."""
        private: PrivateKey
        private = (
            ed25519.Ed25519PrivateKey.generate() if algorithm == "EdDSA" else ec.generate_private_key(ec.SECP256R1())
        )
        jwk = jose.public_jwk(private.public_key())
        kid = jose.thumbprint(jwk)
        pem = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = self._folder / f"{kid}{_SUFFIX}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(pem)
            stream.flush()
            os.fsync(stream.fileno())
        return {**jwk, "kid": kid, "use": "sig", "alg": algorithm}

    def forget(self, kid: str) -> None:
        """Delete a key that signs no more."""
        with self._lock:
            self._private.pop(kid, None)
            (self._folder / f"{kid}{_SUFFIX}").unlink(missing_ok=True)


def published(connection: sa.engine.Connection, now: int) -> list[Json]:
    """Return the keys that a token may be signed with: those that sign, that will, and whose tokens are not over."""
    rows = connection.execute(
        sa.select(signing_keys.c.jwk)
        .where(sa.or_(signing_keys.c.retires_at.is_(None), signing_keys.c.retires_at > now))
        .order_by(signing_keys.c.created, signing_keys.c.kid)
    )
    return [json.loads(row.jwk) for row in rows]


def public_keys(connection: sa.engine.Connection, now: int) -> dict[str, PublicKey]:
    """Return the published keys by their ids."""
    return {jwk["kid"]: _public(jwk) for jwk in published(connection, now)}


def _public(jwk: Json) -> PublicKey:
    x = jose.decode(jwk["x"])
    if jwk["kty"] == "OKP":
        return ed25519.Ed25519PublicKey.from_public_bytes(x)
    return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + x + jose.decode(jwk["y"]))


def rotate(
    connection: sa.engine.Connection,
    keys: Keys,
    algorithm: str,
    *,
    token_seconds: int,
    now: int,
    sign_after: int = SIGN_AFTER,
    retire_after: int | None = None,
) -> Json:
    """Make a new key for this instance; the older ones stay published until their last token is over.

    :param sign_after: seconds until the new key signs; 0 when there is none before it, whatever is given.
    :param retire_after: seconds after that until the older ones leave the JWK Set; None for as long as their tokens
        and :data:`LEEWAY` last. 0 ends every session with a token of theirs: for a key that was stolen.
    :returns: ``kid``, ``signs_from``, ``retired``: ids of the older ones, ``retires_at``.
    """
    older = [
        row.kid
        for row in connection.execute(
            sa.select(signing_keys.c.kid).where(
                sa.or_(signing_keys.c.retires_at.is_(None), signing_keys.c.retires_at > now)
            )
        )
        if row.kid in keys.own()
    ]
    signs_from = now + sign_after if older else now
    retires_at = signs_from + (token_seconds + LEEWAY if retire_after is None else retire_after)
    jwk = keys.make(algorithm)
    try:
        connection.execute(
            signing_keys.insert().values(
                kid=jwk["kid"], algorithm=algorithm, jwk=json.dumps(jwk), created=now, signs_from=signs_from
            )
        )
        connection.execute(
            signing_keys.update()
            .where(signing_keys.c.kid.in_(older))
            .where(sa.or_(signing_keys.c.retires_at.is_(None), signing_keys.c.retires_at > retires_at))
            .values(retires_at=retires_at)
        )
    except BaseException:
        keys.forget(jwk["kid"])
        raise
    return {"kid": jwk["kid"], "signs_from": signs_from, "retired": sorted(older), "retires_at": retires_at}


def activate(connection: sa.engine.Connection, keys: Keys, now: int) -> list[str]:
    """Let keys of this instance that wait sign from now on: every broker has them. :returns: their ids."""
    rows = connection.execute(sa.select(signing_keys.c.kid).where(signing_keys.c.signs_from > now))
    waiting = sorted({row.kid for row in rows} & keys.own())
    connection.execute(signing_keys.update().where(signing_keys.c.kid.in_(waiting)).values(signs_from=now))
    return waiting


def purge(connection: sa.engine.Connection, keys: Keys, now: int) -> list[str]:
    """Forget keys that are published no more, and delete this instance's files of them. :returns: their ids."""
    over = signing_keys.c.retires_at <= now
    gone = [row.kid for row in connection.execute(sa.select(signing_keys.c.kid).where(over))]
    own = keys.own()
    # Another instance deletes its own file, and the row with it; a row alone is of no use to anybody after a week.
    for kid in gone:
        if kid in own:
            keys.forget(kid)
    mine = [kid for kid in gone if kid in own]
    connection.execute(signing_keys.delete().where(signing_keys.c.kid.in_(mine)))
    connection.execute(signing_keys.delete().where(signing_keys.c.retires_at <= now - 7 * 86_400))
    return sorted(mine)
