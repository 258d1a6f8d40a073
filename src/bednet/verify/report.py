# SPDX-License-Identifier: Apache-2.0
"""What a run found: :class:`Report`, its file, and :func:`read_report`, which reads that again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from bednet.verify.task import Scope, VerifyError, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

REPORT_VERSION = 1


@dataclass(frozen=True)
class Result:
    """What a check said about a gateway, or a host of the token service."""

    layer: str
    check: str
    gateway: str
    evidence: str
    passed: bool
    bite: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """The results of one run.

    :param expected: gateway name -> number of checks that had to run there.
    """

    started: datetime
    seconds: float
    checks: Scope
    expected: Mapping[str, int]
    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        """Whether every check ran on every gateway, at least one on each, and all of them passed."""
        ran = {name: sum(result.gateway == name for result in self.results) for name in self.expected}
        return (
            bool(self.expected)
            and all(ran[name] >= max(count, 1) for name, count in self.expected.items())
            and all(result.passed for result in self.results)
        )

    def write(self, path: Path) -> None:
        """Write the report as JSON; it holds no secret."""
        document = {
            "version": REPORT_VERSION,
            "started": self.started.isoformat(),
            "seconds": round(self.seconds, 3),
            "checks": self.checks,
            "passed": self.passed,
            "expected": dict(self.expected),
            "results": [asdict(result) for result in self.results],
        }
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_report(path: Path) -> Report:
    """Read what :meth:`Report.write` wrote.

    :raises VerifyError: if the file is no such report.
    """
    document = read_json(path)
    if document.get("version") != REPORT_VERSION:
        raise VerifyError(f"{path}: not a report of version {REPORT_VERSION} of `bednet verify`")
    try:
        return Report(
            datetime.fromisoformat(document["started"]),
            float(document["seconds"]),
            document["checks"],
            {str(name): int(count) for name, count in document["expected"].items()},
            tuple(Result(**result) for result in document["results"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise VerifyError(f"{path}: not a whole report: {exc!r}") from exc
