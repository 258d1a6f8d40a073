# SPDX-License-Identifier: Apache-2.0
"""A report for people: :func:`table`, and in a sentence :func:`summary`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from bednet.verify.check import LAYERS
from bednet.verify.gateway import GATEWAY_CHECKS
from bednet.verify.service import ANSWERING, SERVICE_CHECKS

if TYPE_CHECKING:
    from bednet.verify.report import Report


def table(report: Report) -> Table:
    """Return a report as a table: layer, check, gateway, evidence, pass or FAIL."""
    drawn = Table(
        title=f"bednet verify, {report.started:%Y-%m-%d %H:%M:%S %Z}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        expand=True,
    )
    drawn.add_column("layer", no_wrap=True)
    drawn.add_column("check", ratio=5)
    drawn.add_column("gateway", no_wrap=True)
    drawn.add_column("evidence", ratio=8)
    drawn.add_column("", no_wrap=True)
    layer = check = ""
    for result in sorted(report.results, key=lambda result: _ORDER.get(result.check, len(_ORDER))):
        if layer not in ("", result.layer):
            drawn.add_section()
        drawn.add_row(
            Text("" if result.layer == layer else result.layer),
            Text("" if result.check == check else result.check),
            Text(result.gateway),
            Text(result.evidence),
            Text("pass", style="green") if result.passed else Text("FAIL", style="bold red"),
        )
        layer, check = result.layer, result.check
    return drawn


_ALL = [(check.layer, check.name) for check in GATEWAY_CHECKS] + [(check.layer, check.name) for check in SERVICE_CHECKS]
_ALL.sort(key=lambda item: LAYERS.index(item[0]))
_ORDER = {name: number for number, (_, name) in enumerate(dict.fromkeys(_ALL))}


def _of_services(report: Report) -> set[str]:
    return {result.gateway for result in report.results if result.check == ANSWERING.name}


def summary(report: Report) -> str:
    """Return the one sentence that a run ends with."""
    failed = sum(not result.passed for result in report.results)
    services = sum(name in _of_services(report) for name in report.expected)
    counts = [(len(report.expected) - services, "gateway"), (services, "token service")]
    where = " and ".join(
        f"{count} {what}{'s' if count != 1 else ''}" for count, what in counts if count or what == "gateway"
    )
    if report.passed:
        return f"The net holds: {len(report.results)} checks passed on {where} in {report.seconds:.1f} s."
    if failed:
        return f"The net does NOT hold: {failed} of {len(report.results)} checks failed on {where}."
    return f"Nothing is proven: not every check ran on {where}."
