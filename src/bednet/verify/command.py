# SPDX-License-Identifier: Apache-2.0
"""The subcommands `verify` and `report` of the command line."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from bednet.verify.report import Report, read_report
from bednet.verify.run import verify
from bednet.verify.table import summary, table
from bednet.verify.task import read_input

if TYPE_CHECKING:
    import argparse


def _print_report(report: Report, console: Console) -> int:
    console.print(table(report))
    console.print(summary(report), style="bold green" if report.passed else "bold red", highlight=False)
    return 0 if report.passed else 1


def _command_verify(arguments: argparse.Namespace) -> int:
    report = verify(read_input(arguments.input), started=datetime.now(UTC))
    if arguments.report:
        report.write(arguments.report)
    return _print_report(report, Console())


def _command_report(arguments: argparse.Namespace) -> int:
    return _print_report(read_report(arguments.report), Console())


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `verify` and `report` to the command line; each sets ``run``, from arguments to exit code.

    ``run`` raises :class:`VerifyError` where a file cannot be used.
    """
    one = commands.add_parser(
        "verify",
        help="probe the gateways of a deployed site from outside; exit code 0 only if the net holds",
        description="Probe the gateways of a deployed site from outside. Exit code 0 only if every check passed.",
    )
    one.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="FILE",
        help="what to verify and as whom (JSON, see docs/verification.md)",
    )
    one.add_argument("--report", type=Path, metavar="OUT.json", help="also write the results as JSON")
    one.set_defaults(run=_command_verify)
    two = commands.add_parser("report", help="print the table of a report that `bednet verify` wrote")
    two.add_argument("report", type=Path, metavar="OUT.json")
    two.set_defaults(run=_command_report)
