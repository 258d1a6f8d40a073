# SPDX-License-Identifier: Apache-2.0
"""Capacity search: how much a gateway holds before a threshold breaks.

- :func:`limit`: whose limit a run met.
- :func:`search`: doubles the pace until a run does not pass, then narrows it down. :class:`Found`: what came out.

The number of devices stays, and with it the identities; the time between their messages is what changes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from load import report as reports
from load.slo import GENERATOR_CPU_PERCENT, Status, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from load.profiles import Profile
    from load.report import Report

#: The search ends when the highest load that held and the lowest that did not are this near.
NEAR = 1.2
MOST_RUNS = 18
#: So often a run is made whose end says nothing about the gateway.
TRIES = 3
CPU = "broker_cpu_percent"
UNSEEN = "none that was seen on the broker"
#: A broker that uses so much of what it may use is at its limit.
BUSY_PERCENT = 75.0


@dataclass(frozen=True)
class Found:
    """What a search found.

    :ivar steps: the runs in their order, each with the factor by which the profile's pace was raised.
    :ivar held: the run with the highest load that passed; None where none did.
    :ivar broke: the one with the lowest load that did not; None where none broke.
    """

    steps: tuple[tuple[float, Report], ...]
    held: Report | None
    broke: Report | None

    @property
    def verdict(self) -> Verdict:
        """Whether the limit was found, and is the gateway's."""
        if self.held is None:
            return self.broke.judgement.verdict if self.broke else Verdict.INCONCLUSIVE
        if self.broke is None or not (self.broke.judgement.verdict is Verdict.FAILED or is_gateways(self.broke)):
            return Verdict.INCONCLUSIVE
        return Verdict.PASSED

    def sentence(self) -> str:
        """Say what the gateway holds."""
        if self.held is None:
            if self.broke is not None and self.broke.judgement.generator_limited and not is_gateways(self.broke):
                return "The GENERATOR was too slow for the profile's own load: nothing is known about the gateway."
            return "Not even the profile's own load passed; search from a smaller one (--devices, --every)."
        plan = self.held.plan
        holds = (
            f"{plan.gateway.name} holds {plan.devices} devices at {self.held.sent_per_s:.0f} messages/s in and "
            f"{self.held.received_per_s:.0f}/s out"
        )
        seen = self.held.observation
        if seen is not None and seen.cores < 1:
            holds += f", with {100 * seen.cores:.0f} % of a core for its broker"
        if self.broke is None:
            return f"At least: {holds}. Its limit was not found in {len(self.steps)} runs."
        if self.verdict is Verdict.PASSED:
            reasons = self.broke.judgement.reasons
            if self.broke.judgement.generator_limited:
                # By the CPU alone: what else it missed may be the generator's.
                first = next(reason for reason in reasons if reason.startswith(CPU)).rstrip(".")
            else:
                first = reports.broke_first(self.broke) or reasons[0].rstrip(".")
            met = limit(self.broke)
            return f"{holds}. Its limit is {met}. At {self.broke.plan.offered_per_s:.0f}/s in, first: {first}."
        if self.broke.judgement.generator_limited:
            return (
                f"At least: {holds}. At {self.broke.plan.offered_per_s:.0f}/s in the GENERATOR was the limit, and not "
                "the gateway: this is no limit of the gateway's."
            )
        return f"At least: {holds}. The run at {self.broke.plan.offered_per_s:.0f}/s in said nothing."

    def summary(self) -> str:
        """Return the search as a few lines for the terminal."""
        lines = ["  factor   in/s   out/s   p99 ms   broker %   verdict"]
        for factor, report in self.steps:
            found = reports.as_json(report)["figures"]
            shown = [found["latency_p99_ms"], found["broker_cpu_percent"]]
            late, cpu = ("-" if value is None else f"{value:.1f}" for value in shown)
            verdict = report.judgement.verdict.value
            rates = f"{report.sent_per_s:6.0f} {report.received_per_s:7.0f}"
            lines.append(f"  {factor:6.2f} {rates} {late:>8} {cpu:>10}   {verdict}")
        return "\n".join([*lines, self.sentence()])

    def write(self, folder: Path) -> list[Path]:
        """Write the reports on the last run that held and the first that did not, and search.json; return the files."""
        written = []
        for name, report in (("held", self.held), ("broke", self.broke)):
            if report is not None:
                written.append(reports.write(report, folder / name)[0])
        steps = [{"factor": factor, **reports.as_json(report)} for factor, report in self.steps]
        for step in steps:
            del step["tally"]
        broke = self.broke
        document = {
            "version": 1,
            "verdict": self.verdict,
            "sentence": self.sentence(),
            "limit": limit(broke) if broke and broke.judgement.verdict is not Verdict.PASSED else "",
            "steps": steps,
        }
        return [*written, reports.write_text(folder / "search.json", json.dumps(document, indent=1))]


def limit(report: Report) -> str:
    """Say whose limit a run met that did not pass."""
    seen = report.observation
    if report.judgement.generator_limited and not is_gateways(report):
        return "the GENERATOR's, and not the gateway's"
    if seen is not None and seen.died:
        return "that the broker died"
    cpu = seen.cpu_percent if seen is not None else None
    if seen is not None and cpu is not None and (cpu >= BUSY_PERCENT or _is_cpu_broken(report)):
        of = "the core" if seen.cores == 1 else f"the {100 * seen.cores:.0f} % of a core"
        return f"the broker's CPU ({cpu:.0f} % of {of} that it may use)"
    dropped = _dropped(report)
    if dropped:
        return (
            f"what the broker keeps for a reader that is too slow: it dropped {dropped:,} messages with CPU to spare "
            "(mosquitto_max_queued_messages, mosquitto_max_inflight_messages)"
        )
    broken = ", ".join(item.threshold.figure for item in report.judgement.findings if item.status is Status.BROKEN)
    return f"{UNSEEN} ({broken or 'the run did not come to its end'}): look at the network"


def _dropped(report: Report) -> int:
    """Return how many messages the broker says that it dropped during the run."""
    told = (report.tally.broker_before, report.tally.broker_after)
    before, after = (counts.get("$SYS/broker/publish/messages/dropped", "0") for counts in told)
    return max(0, int(after) - int(before)) if before.isdigit() and after.isdigit() else 0


def search(
    profile: Profile, attempt: Callable[[Profile, int], Report], *, say: Callable[[str], None], processes: range
) -> Found:
    """Raise the pace until a run does not pass, then narrow the limit down.

    Machines are busy for moments, so a run that failed for nothing that was seen on the broker, or in which the
    generator was too slow, is made again. One that passes passed: noise only takes.

    :param attempt: runs a profile with so many processes of the generator.
    :param say: told how it goes.
    :param processes: how many there may be: the least at first, one more when one has filled its core.
    """
    steps: list[tuple[float, Report]] = []
    held: tuple[float, Report] | None = None
    broke: tuple[float, Report] | None = None
    factor, count = 1.0, processes.start
    while len(steps) < MOST_RUNS:
        tries = 0
        while tries < TRIES:
            report = attempt(_faster(profile, factor), count)
            steps.append((factor, report))
            believed = report.interrupted or report.judgement.verdict is Verdict.PASSED or is_gateways(report)
            if believed or len(steps) == MOST_RUNS:
                break
            if is_filled(report) and count + 1 in processes:
                # The next run is another one, and no repetition.
                count += 1
            else:
                tries += 1
            if tries < TRIES:
                say(f"{factor:.2f} times the load: {_why(report)}; once more")
        say(f"{factor:.2f} times the load: {report.judgement.verdict.value}")
        if report.judgement.verdict is Verdict.PASSED:
            held = (factor, report)
        else:
            broke = (factor, report)
        if report.interrupted or held is None:
            break
        if broke is None:
            factor *= 2
        elif broke[0] / held[0] <= NEAR:
            break
        else:
            factor = (broke[0] * held[0]) ** 0.5
    return Found(tuple(steps), held[1] if held else None, broke[1] if broke else None)


def is_gateways(report: Report) -> bool:
    """Say whether a run met a limit that was seen on the gateway.

    A broker that uses too much CPU does so however late the generator is: that could only spare it work.
    """
    if report.judgement.generator_limited:
        return _is_cpu_broken(report)
    return report.judgement.verdict is Verdict.FAILED and not limit(report).startswith(UNSEEN)


def _is_cpu_broken(report: Report) -> bool:
    return any(item.threshold.figure == CPU and item.status is Status.BROKEN for item in report.judgement.findings)


def is_filled(report: Report) -> bool:
    """Say whether a process of the generator filled its core."""
    return 100 * report.tally.busiest > GENERATOR_CPU_PERCENT


def _why(report: Report) -> str:
    if report.judgement.generator_limited:
        return "the generator was too slow" + (", for it filled its core" if is_filled(report) else "")
    return "nothing was seen on the broker that would explain why it failed"


def _faster(profile: Profile, factor: float) -> Profile:
    return replace(
        profile,
        every_s=profile.every_s / factor,
        command_every_s=profile.command_every_s / factor,
        flood_per_s=profile.flood_per_s * factor,
    )
