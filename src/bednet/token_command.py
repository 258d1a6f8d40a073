# SPDX-License-Identifier: Apache-2.0
"""The command ``bednet token``: gets a token for a device of a site, with what its bundle holds.

- :func:`add_parser`: adds it to the command line.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bednet.errors import BednetError
from bednet.site import load_site

if TYPE_CHECKING:
    import argparse

    from bednet.client import TokenSource


class TokenCommandError(BednetError):
    """There is no token; the message says what to do."""

    code = "token"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("token", help="get a token for a device, from the site's token service")
    parser.add_argument("site", type=Path, metavar="SITE", help="the site's folder")
    parser.add_argument("--device", required=True, metavar="ID", help="whose token")
    parser.add_argument(
        "--bundle", type=Path, default=Path(), metavar="DIR", help="the device's bundle (default: the current folder)"
    )
    parser.add_argument("--key", type=Path, metavar="FILE", help="the key of a device that made its own")
    parser.add_argument("--address", metavar="HOST", help="where the service is, if its name leads nowhere from here")
    parser.add_argument("--resource", metavar="URI", help="for one gateway alone, as mqtts://NAME (RFC 8707)")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write it there, readable by you alone; not on stdout"
    )
    parser.set_defaults(run=_token)


def _token(arguments: argparse.Namespace) -> int:
    from bednet.client import TokenError  # noqa: PLC0415 - paho is for this command alone

    site = load_site(arguments.site)
    device = site.devices.get(arguments.device)
    if device is None:
        raise TokenCommandError(
            f"bednet token: {arguments.site} has no device {arguments.device}. Cure: name one of it"
        )
    if "token" not in device.authentication:
        raise TokenCommandError(
            f"bednet token: {device.id} has no tokens. Cure: give it `authentication: [token]` and run site.yml"
        )
    try:
        token = _source(arguments).get()
    except TokenError as exc:
        cure = "try again in a while" if exc.again else "see the journal of bednet-token-service on its host"
        raise TokenCommandError(f"bednet token: {exc}" if exc.cure else f"bednet token: {exc}. Cure: {cure}") from exc
    except FileNotFoundError as exc:
        message = f"bednet token: {arguments.bundle.absolute()} is no bundle: it has no client.json"
        raise TokenCommandError(f"{message}. Cure: name the folder of {device.id}'s bundle with --bundle") from exc
    except (ValueError, OSError) as exc:
        raise TokenCommandError(f"bednet token: {exc}. Cure: name the folder of this device's bundle") from exc
    if arguments.output is None:
        sys.stdout.write(f"{token.text}\n")
        return 0
    try:
        _write(arguments.output, token.text)
    except OSError as exc:
        raise TokenCommandError(f"bednet token: {arguments.output}: {exc.strerror}. Cure: name another file") from exc
    return 0


def _source(arguments: argparse.Namespace) -> TokenSource:
    from bednet.client import TokenSource  # noqa: PLC0415

    more = {name: getattr(arguments, name) for name in ("key", "address", "resource")}
    folder = arguments.bundle.absolute()
    source = TokenSource.of_bundle(folder, **{name: value for name, value in more.items() if value})
    if source.device != arguments.device:
        raise ValueError(f"{folder} is the bundle of {source.device}")
    return source


def _write(path: Path, text: str) -> None:
    """Write a file that nobody else can read, in one step."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"{text}\n")
    draft.replace(path)
