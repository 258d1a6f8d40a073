# SPDX-License-Identifier: Apache-2.0
"""Write what a play did as JSON, for the program that ran it.

The file that BEDNET_STATS names gets one object: `stats` (host -> ok, changed, failures, unreachable, skipped, ...) and
`failures` (a list of host, task, message). Results under no_log arrive here censored already.
"""

from __future__ import annotations

import json
import os
from typing import Any

from ansible.plugins.callback import CallbackBase  # type: ignore[import-untyped] # Ansible has no type hints

DOCUMENTATION = """
    name: bednet_stats
    type: aggregate
    short_description: writes what a play did as JSON
    description: Writes the statistics of each host and the failed tasks to the file that BEDNET_STATS names.
"""


class CallbackModule(CallbackBase):  # type: ignore[misc] # as above
    """Collects failures while the play runs and writes the file when it ends."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "bednet_stats"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self.failed: list[dict[str, str]] = []
        self.changed: list[dict[str, str]] = []

    def v2_runner_on_ok(self, result: Any) -> None:
        """Note a task that changed something, so that a second run can say which one did."""
        if result.result.get("changed"):
            self.changed.append({"host": result.host.get_name(), "task": result.task.get_name()})

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """Note a task that failed and was not meant to."""
        if not ignore_errors:
            self._note(result)

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """Note a host that could not be reached."""
        self._note(result)

    def _note(self, result: Any) -> None:
        told = result.result
        message = told.get("msg") or told.get("censored") or told.get("stderr") or told.get("exception") or ""
        self.failed.append({"host": result.host.get_name(), "task": result.task.get_name(), "message": str(message)})

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Write the file."""
        path = os.environ.get("BEDNET_STATS")
        if not path:
            return
        hosts = {host: stats.summarize(host) for host in sorted(stats.processed)}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"stats": hosts, "failures": self.failed, "changed": self.changed}, file)
