# SPDX-License-Identifier: Apache-2.0
"""The tool of the token service's host: ``bednet-token-service [--config FILE] COMMAND``.

Each command writes one JSON object on stdout, with ``changed`` where it may change something. Exit code 0: done, 1:
refused, or somebody has to act, 2: the command line is wrong. docs/token-service.md has the commands.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from bednet.errors import BednetError
from bednet.token_service import clock, config, keys, revocation, site
from bednet.token_service.database import (
    SCHEMA,
    Database,
    Unavailable,
    cutoffs,
    device_requests,
    devices,
    signing_keys,
    tokens,
)
from bednet.token_service.keys import Keys
from bednet.token_service.site import Refused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bednet.token_service.jose import Json

PROGRAM = "bednet-token-service"
WAIT_SECONDS = 30
"""A playbook may wait longer than a device."""


class Tool:
    """The commands, over one configuration; `now` is the time in unix seconds."""

    def __init__(self, settings: config.Config, now: int) -> None:
        self.settings = settings
        self.now = now
        self.database = Database.of(settings, wait=WAIT_SECONDS)
        self.keys = Keys(settings.keys_dir)

    def migrate(self) -> Json:
        """Bring the database to the newest schema."""
        # Alembic is large, and the service does without it.
        from bednet.token_service.migrations import upgrade  # noqa: PLC0415

        logging.getLogger("alembic").setLevel(logging.WARNING)
        before, after = upgrade(self.database)
        return {"changed": before != after, "before": before, "schema": after}

    def apply(self, path: Path, secrets: object, *, check: bool) -> Json:
        """Make the database say what the compiled site says."""
        data = site.read(_file(path), secrets, self.settings, str(path))
        return site.apply(self.database, data, self.now, check=check)

    def crl(self, told: object) -> Json:
        """Refuse the certificates that the CA's verified list names."""
        return site.add_serials(self.database, told)

    def rotate(self, *, sign_after: int, retire_after: int | None, if_none: bool) -> Json:
        """Make a new signing key."""
        with self.database.writing() as connection:
            if if_none and self._usable(connection):
                return {"changed": False}
            answer = keys.rotate(
                connection,
                self.keys,
                self.settings.algorithm,
                token_seconds=self.settings.token_seconds,
                now=self.now,
                sign_after=sign_after,
                retire_after=retire_after,
            )
        return {"changed": True, "issuer": self.settings.issuer, **answer}

    def _usable(self, connection: sa.engine.Connection) -> bool:
        rows = connection.execute(sa.select(signing_keys.c.kid).where(signing_keys.c.retires_at.is_(None)))
        return bool({row.kid for row in rows} & self.keys.own())

    def activate(self) -> Json:
        """Let a key that waits sign from now on."""
        with self.database.writing() as connection:
            kids = keys.activate(connection, self.keys, self.now)
        return {"changed": bool(kids), "kids": kids}

    def jwks(self) -> Json:
        """Return the JWK Set as the service publishes it."""
        with self.database.reading() as connection:
            return {"keys": keys.published(connection, self.now)}

    def revoke(self, *, jti: str | None, device: str | None, reason: str | None, reinstated: int = 0) -> Json:
        """End a token, or all of a device's."""
        with self.database.writing() as connection:
            if device is not None:
                if not config.DEVICE_ID.fullmatch(device):
                    raise Refused(f"{device!r} cannot be a device's id. Cure: name one of devices.yml")
                changed = revocation.revoke_device(
                    self.database, connection, device, self.now, reason=reason, reinstated=reinstated
                )
                at = connection.execute(sa.select(cutoffs.c.at).where(cutoffs.c.device == device)).scalar()
                answer = {"changed": changed, "device": device, "cutoff": at, "revoked": reason}
                return {"issuer": self.settings.issuer, **answer}
            row = connection.execute(sa.select(tokens).where(tokens.c.jti == jti)).mappings().first()
            if row is None:
                raise Refused("the service knows no token with this jti. Cure: take the jti from the token or the log")
            changed = revocation.revoke_token(connection, row["jti"], self.now)
            answer = {"changed": changed, "jti": row["jti"], "device": row["device"], "exp": row["exp"]}
            return {"issuer": self.settings.issuer, **answer}

    def approve(self, user_code: str, device: str, *, deny: bool) -> Json:
        """Decide a request of RFC 8628."""
        from bednet.token_service import onboarding  # noqa: PLC0415

        with self.database.writing() as connection:
            found = onboarding.find(connection, user_code, self.now)
            if found is None or found.device != device:
                raise Refused(
                    f"there is no open request with this code for {device!r}. Cure: read the code from the device "
                    "again; it is good for ten minutes"
                )
            onboarding.decide(connection, found, approved=not deny, approver="*tool")
        return {"changed": True, "device": device, "approved": not deny}

    def purge(self, *, future: bool) -> Json:
        """Forget what is over."""
        with self.database.writing() as connection:
            undone = clock.forget_future(connection, self.now) if future else 0
            clock.check(connection, self.now)
            rows = revocation.purge(connection, self.now)
            kids = keys.purge(connection, self.keys, self.now)
        return {"changed": bool(rows or kids or undone), "rows": rows, "keys": kids, "undone": undone}

    def status(self) -> Json:
        """Summarise the service; ``problems`` says what somebody has to do."""
        problems: list[str] = []
        answer: Json = {"problems": problems, "schema": SCHEMA, "issuer": self.settings.issuer}
        try:
            self.database.check_schema()
            with self.database.reading() as connection:
                for name, table in (("devices", devices), ("tokens", tokens), ("requests", device_requests)):
                    answer[name] = connection.execute(sa.select(sa.func.count()).select_from(table)).scalar()
                answer["crl_number"] = site.crl_number(connection)
                answer["published_keys"] = [key["kid"] for key in keys.published(connection, self.now)]
                try:
                    answer["signs_with"] = self.keys.signer(connection, self.now).kid
                except Unavailable as exc:
                    problems.append(f"{exc}. Cure: run '{PROGRAM} rotate'")
                try:
                    clock.check(connection, self.now)
                except Unavailable as exc:
                    problems.append(
                        f"{exc}. Cure: set the clock; if it was ahead and is right now, '{PROGRAM} purge --future'"
                    )
        except Unavailable as exc:
            problems.append(f"{exc.code}: {exc}. Cure: see 'The database' in docs/token-service.md")
        return answer


def _file(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", newline="\n") as stream:
            yield from stream
    except OSError as exc:
        raise Refused(f"{path}: {exc.strerror}. Cure: name what bednet compile --output wrote") from exc


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Keep the token service of a bednet site.")
    parser.add_argument("--config", type=Path, default=config.PATH, metavar="FILE", help="default: %(default)s")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("migrate", help="bring the database to the newest schema, or make it")
    apply = commands.add_parser("apply", help="take over a compiled site; secrets as JSON on stdin")
    apply.add_argument("compiled", type=Path, metavar="COMPILED", help="what bednet compile --output wrote")
    apply.add_argument("--check", action="store_true", help="dry run: tell what would change")
    commands.add_parser("crl", help="refuse the certificates that the CA's verified list names: JSON on stdin")
    rotate = commands.add_parser("rotate", help="make a new signing key, which is published at once and signs later")
    rotate.add_argument("--if-none", action="store_true", help="only when this instance has no key")
    rotate.add_argument(
        "--sign-after",
        type=_seconds,
        default=keys.SIGN_AFTER,
        metavar="SECONDS",
        help="when the new key begins to sign (default: %(default)s; at once when it is the first)",
    )
    rotate.add_argument(
        "--retire-after",
        type=_seconds,
        metavar="SECONDS",
        help="how long after that the older keys stay published (default: until their last token is over); "
        "0 ends every session with a token of theirs",
    )
    commands.add_parser("activate", help="let a key that waits sign now: all brokers have it")
    commands.add_parser("keys", help="print the public keys, as a JWK Set")
    revoke = commands.add_parser("revoke", help="end one token, or all tokens of a device")
    which = revoke.add_mutually_exclusive_group(required=True)
    which.add_argument("--jti", help="the token's id, as it stands in the token and in the log")
    which.add_argument("--device", metavar="ID")
    revoke.add_argument(
        "--reinstated",
        type=_instant,
        default=0,
        metavar="TIME",
        help="with --reason: its 'reinstated' in devices.yml, if any: no such or older one lets it in again",
    )
    revoke.add_argument(
        "--reason",
        choices=site.REASONS,
        help="with --device: it gets no new token either, until the site reinstates it",
    )
    approve = commands.add_parser("approve", help="let a device in that shows a code (RFC 8628)")
    approve.add_argument("user_code", metavar="USER_CODE")
    approve.add_argument("--device", required=True, metavar="ID", help="the device that shows the code")
    approve.add_argument("--deny", action="store_true", help="refuse it")
    purge = commands.add_parser("purge", help="forget tokens, requests and keys that are over")
    purge.add_argument(
        "--future",
        action="store_true",
        help="the clock was ahead and is right now: end the tokens of that time, and go on",
    )
    commands.add_parser("status", help="health; exit code 1 when somebody has to act")
    return parser


def _instant(text: str) -> int:
    try:
        at = dt.datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise argparse.ArgumentTypeError("write a date and time with an offset, as in 2026-12-31T17:00:00Z")
    return int(at.timestamp())


def _seconds(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 30 * 86_400:
        raise argparse.ArgumentTypeError("it must be from 0 to a month")
    return value


def _run(options: argparse.Namespace) -> Json:  # noqa: PLR0911 - one for each command
    settings = config.load(options.config)
    _become_owner(settings.keys_dir)
    tool = Tool(settings, int(time.time()))
    with contextlib.closing(tool.database):
        match options.command:
            case "migrate":
                return tool.migrate()
            case "apply":
                return tool.apply(options.compiled, _stdin(), check=options.check)
            case "crl":
                return tool.crl(_stdin())
            case "rotate":
                return tool.rotate(
                    sign_after=options.sign_after, retire_after=options.retire_after, if_none=options.if_none
                )
            case "activate":
                return tool.activate()
            case "keys":
                return tool.jwks()
            case "revoke":
                return tool.revoke(
                    jti=options.jti, device=options.device, reason=options.reason, reinstated=options.reinstated
                )
            case "approve":
                return tool.approve(options.user_code, options.device, deny=options.deny)
            case "purge":
                return tool.purge(future=options.future)
            case _:
                return tool.status()


def _become_owner(keys_dir: Path) -> None:
    """Go on as the service's user when started by root: a file that root made would lock the service out."""
    try:
        owner = keys_dir.stat()
    except OSError as exc:
        raise Refused(f"{keys_dir}: {exc.strerror}. Cure: run playbooks/site.yml, which makes it") from exc
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.setgroups([])
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)


def _stdin() -> object:
    try:
        return json.loads(sys.stdin.read())
    except ValueError:
        # Not the text itself: it holds secrets.
        raise Refused("stdin is not JSON. Cure: give the secrets; see docs/token-service.md") from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. :returns: the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "revoke" and options.reason and not options.device:
        parser.error("--reason goes with --device")
    try:
        answer = _run(options)
    except (BednetError, OSError) as exc:
        cure = ". Cure: see 'The database' in docs/token-service.md" if isinstance(exc, Unavailable) else ""
        sys.stderr.write(f"{PROGRAM} {options.command}: {exc}{cure}\n")
        return 1
    sys.stdout.write(json.dumps(answer, indent=1) + "\n")
    if problems := answer.get("problems"):
        sys.stderr.write(f"{PROGRAM} {options.command}: {'; '.join(problems)}\n")
        return 1
    return 0
