# SPDX-License-Identifier: Apache-2.0
"""The command ``bednet load``, which hands over to the load tests of the checkout.

- :func:`add_parser`: adds it to the command line.

The load tests (``load/``) are no part of the package: they need Locust, and gevent changes Python's own modules. So
they run in a process of their own, with this one's environment.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bednet.errors import BednetError

if TYPE_CHECKING:
    import argparse

CHECKOUT = Path(__file__).resolve().parents[2]


class LoadError(BednetError):
    """The load tests are not there; the message says what to do."""

    code = "load"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command; everything after its name is for the load tests, ``--help`` too."""
    # No character begins an option here.
    parser = subparsers.add_parser(
        "load", help="load a deployed gateway, and say whether it keeps up", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("rest", nargs="*")
    parser.set_defaults(run=_load)


def _load(arguments: argparse.Namespace) -> int:
    if not (CHECKOUT / "load/__main__.py").exists():
        raise LoadError("bednet: the load tests are not here. Cure: run this from a checkout, after `make venv`.")
    path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "load", *arguments.rest]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})  # noqa: S606 - no shell is wanted
