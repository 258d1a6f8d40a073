# SPDX-License-Identifier: Apache-2.0
"""The ``bednet`` command.

Exit codes: 0 fine, 1 a problem was found (told on stderr), 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from bednet import commands, load_command, revocation, token_command
from bednet.errors import BednetError, TopicError
from bednet.verify import command as verify_command

if TYPE_CHECKING:
    from collections.abc import Sequence

# A module offers commands by add_parser(subparsers); each command sets `run`, which takes the parsed arguments and
# returns the exit code.
MODULES = (commands, revocation, token_command, verify_command, load_command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bednet",
        description="bednet: a net over Eclipse Mosquitto.",
        epilog="Exit codes: 0 fine, 1 a problem was found, 2 the command line is wrong.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in MODULES:
        module.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    :param arguments: the words after ``bednet``; those of the process when None.
    :returns: the exit code.
    """
    parsed = _parser().parse_args(arguments)
    try:
        exit_code: int = parsed.run(parsed)
    except TopicError as error:
        print(f"bednet: {error}. Cure: {error.cure}. [{error.code}]", file=sys.stderr)
        return 1
    except BednetError as error:
        print(error, file=sys.stderr)
        return 1
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
