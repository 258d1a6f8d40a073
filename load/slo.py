# SPDX-License-Identifier: Apache-2.0
"""Thresholds, and the verdict on a run.

- :func:`read_slo`: thresholds from a file, for a profile.
- :func:`figures`: what the thresholds speak of, out of what was counted and observed.
- :func:`judge`: the verdict: passed, failed or inconclusive, and why.

A run passes only when everything was measured that a threshold asks for, nothing broke, the run came to its end, and
the generator was fast enough to know.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bednet.errors import BednetError
from bednet.yamlfile import load
from load.measure import merged
from load.plan import JUDGED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from load.observe import Observation
    from load.tally import Tally

VERSION = 1
#: Above this share of a core, or above this lag, the generator is what limits the run.
GENERATOR_CPU_PERCENT = 90.0
#: A process that used less of a core than this share has nothing to do, even if it waits for its turn.
SHORT_FROM = 0.5
GENERATOR_LAG_P99_MS = 50.0
#: Latencies between machines whose clocks are known no better are no basis for a verdict.
CLOCK_ERROR_MS = 10.0

#: Every figure, with its unit and what it is.
FIGURES: Mapping[str, tuple[str, str]] = {
    "delivered_share": ("", "share of the deliveries asked for that happened"),
    "lost_qos_1_and_2": ("", "deliveries at QoS 1 and 2 that never happened"),
    "lost": ("", "deliveries that never happened"),
    "duplicates": ("", "deliveries that came a second time"),
    "disordered": ("", "deliveries that came after a later one"),
    "latency_p50_ms": ("ms", "half of the deliveries took no longer"),
    "latency_p99_ms": ("ms", "99 % of the deliveries took no longer"),
    "latency_p99_9_ms": ("ms", "99.9 % of the deliveries took no longer"),
    "connect_p99_ms": ("ms", "99 % of the first connections took no longer"),
    "reconnect_p99_ms": ("ms", "99 % of the reconnections took no longer"),
    "all_back_ms": ("ms", "from the first connection cut on purpose until all were back"),
    "renewal_p99_ms": ("ms", "99 % of the tokens were renewed in the session within this"),
    "renewal_failures": ("", "renewals of tokens that failed"),
    "never_connected": ("", "devices that never connected"),
    "connect_failures": ("", "attempts to connect that failed"),
    "lost_connections": ("", "connections that broke by themselves"),
    "refused_unwanted": ("", "publishes and subscriptions refused though granted"),
    "refused_wanted": ("", "forbidden publishes refused, as they must be"),
    "breaches": ("", "forbidden publishes that got through"),
    "unsent": ("", "messages due that could not be handed over"),
    "broker_cpu_percent": ("%", "CPU of the broker in its busiest five seconds, of what it may use: one core or less"),
    "broker_memory_mib": ("MiB", "memory of the broker at its peak"),
}


class SLOError(BednetError):
    """A file of thresholds cannot be used; the message says which line of it."""

    code = "load-slo"


class Verdict(enum.StrEnum):
    """What a run says about a gateway."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"


class Status(enum.StrEnum):
    """How a threshold stands."""

    MET = "met"
    BROKEN = "broken"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Threshold:
    """What a figure must be: at least, or at most, this."""

    figure: str
    at_least: bool
    value: float

    def met(self, found: float) -> bool:
        """Say whether a figure is good enough."""
        return found >= self.value if self.at_least else found <= self.value

    def __str__(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.value:g} {FIGURES[self.figure][0]}".rstrip()


@dataclass(frozen=True)
class Finding:
    """A threshold, held against what was found."""

    threshold: Threshold
    found: float | None
    status: Status


@dataclass(frozen=True)
class Judgement:
    """The verdict, and what it rests on.

    :ivar reasons: whole sentences: what broke, or why nothing can be said.
    :ivar generator_limited: why the generator, and not the gateway, was the limit; empty where it was not.
    """

    verdict: Verdict
    findings: tuple[Finding, ...]
    reasons: tuple[str, ...]
    generator_limited: tuple[str, ...]


def read_slo(path: Path, profile: str, profiles: Sequence[str]) -> tuple[Threshold, ...]:
    """Read the thresholds that hold for a profile.

    :param profiles: the names that may occur.
    :raises SLOError: when the file cannot be read, or says something that is not understood.
    """
    root, problems = load(path)
    if problems or root is None:
        raise SLOError("\n".join(str(problem) for problem in problems))
    document = root.plain()
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise SLOError(f"{path}: not a file of thresholds of version {VERSION}. Cure: see load/slo.yml for the form.")
    if unknown := set(document) - {"version", "thresholds", "profiles"}:
        raise SLOError(f"{path}: unknown key {', '.join(sorted(map(str, unknown)))}. Cure: take it out.")
    common = _mapping(path, document.get("thresholds"), "thresholds")
    special = _mapping(path, document.get("profiles") or {}, "profiles")
    if unknown := set(special) - set(profiles):
        raise SLOError(
            f"{path}: there is no profile {', '.join(sorted(map(str, unknown)))}. Cure: use {', '.join(profiles)}."
        )
    for name in special:
        for figure, entry in _mapping(path, special[name], f"profiles: {name}").items():
            if entry is not None or figure not in FIGURES:
                _threshold(path, figure, entry)
    chosen = {**common, **_mapping(path, special.get(profile) or {}, f"profiles: {profile}")}
    thresholds = tuple(_threshold(path, figure, entry) for figure, entry in chosen.items() if entry is not None)
    if not thresholds:
        raise SLOError(f"{path}: no threshold holds for `{profile}`, so nothing could fail. Cure: state at least one.")
    return thresholds


def _mapping(path: Path, data: object, where: str) -> dict[str, object]:
    if not isinstance(data, dict):
        raise SLOError(f"{path}: `{where}` is not a list of names with values. Cure: see load/slo.yml for the form.")
    return data


def _threshold(path: Path, figure: object, entry: object) -> Threshold:
    if figure not in FIGURES:
        raise SLOError(f"{path}: there is no figure `{figure}`. Cure: use one of {', '.join(FIGURES)}.")
    if not isinstance(entry, dict) or len(entry) != 1 or not set(entry) <= {"at_least", "at_most"}:
        raise SLOError(
            f"{path}: `{figure}` is {entry!r}. Cure: write {{at_most: NUMBER}} or {{at_least: NUMBER}}, or null to "
            "drop it."
        )
    ((kind, value),) = entry.items()
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or value < 0:  # noqa: PLR0124
        raise SLOError(f"{path}: `{figure}: {kind}` is {value!r}. Cure: write a number that is not negative.")
    return Threshold(str(figure), kind == "at_least", float(value))


def figures(tally: Tally, observation: Observation | None) -> dict[str, float | None]:
    """Return what was found; None for what was not measured."""
    judged = [(qos, delivery) for (kind, qos), delivery in tally.deliveries.items() if kind in JUDGED]
    expected = sum(delivery.expected for _, delivery in judged)
    latency = merged(delivery.latency for _, delivery in judged)
    failed = sum(tally.renewal_failures.values())
    return {
        "delivered_share": sum(min(d.unique, d.expected) for _, d in judged) / expected if expected else None,
        "lost_qos_1_and_2": sum(delivery.lost for qos, delivery in judged if qos) if expected else None,
        "lost": sum(delivery.lost for _, delivery in judged) if expected else None,
        "duplicates": sum(delivery.duplicates for _, delivery in judged),
        "disordered": sum(delivery.disordered for _, delivery in judged),
        "latency_p50_ms": latency.percentile_ms(50),
        "latency_p99_ms": latency.percentile_ms(99),
        "latency_p99_9_ms": latency.percentile_ms(99.9),
        "connect_p99_ms": tally.connect.percentile_ms(99),
        "reconnect_p99_ms": tally.reconnect.percentile_ms(99),
        "all_back_ms": tally.all_back_ms,
        "renewal_p99_ms": tally.renewal.percentile_ms(99),
        "renewal_failures": failed if tally.renewals or failed else None,
        "never_connected": tally.never_connected,
        "connect_failures": sum(tally.connect_failures.values()),
        "lost_connections": sum(tally.lost_connections.values()),
        "refused_unwanted": sum(tally.refused.values()) + sum(tally.subscribe_refusals.values()),
        "refused_wanted": tally.refused_wanted,
        "breaches": tally.breaches,
        "unsent": sum(tally.unsent[kind] for kind in JUDGED),
        "broker_cpu_percent": observation.cpu_percent if observation else None,
        "broker_memory_mib": observation.memory_mib if observation else None,
    }


def generator_limits(tally: Tally) -> tuple[str, ...]:
    """Say why the generator was the limit; nothing where it was not."""
    reasons = []
    share = 100 * max(tally.busiest, tally.cpu_s / tally.busy_s if tally.busy_s else 0.0)
    if share > GENERATOR_CPU_PERCENT:
        reasons.append(
            f"A process of the generator used {share:.0f} % of a core (at most {GENERATOR_CPU_PERCENT:.0f} %)."
        )
    if tally.clock_error_ms > CLOCK_ERROR_MS:
        reasons.append(
            f"The clocks of the generator's machines are known to {tally.clock_error_ms:.1f} ms only (at most "
            f"{CLOCK_ERROR_MS:.0f} ms)."
        )
    lag = tally.lag.percentile_ms(99)
    if lag is not None and lag > GENERATOR_LAG_P99_MS:
        reasons.append(
            f"The generator itself was late: 1 % of its messages by more than {lag:.0f} ms "
            f"(at most {GENERATOR_LAG_P99_MS:.0f} ms)."
        )
    return tuple(reasons)


def _shortage(tally: Tally) -> tuple[str, ...]:
    """Say that the generator wanted more of a core than it got.

    It may have read too slowly then, and the gateway's queues for it have filled. Where all was well nevertheless, it
    was well: this explains what broke, and takes no pass away.
    """
    share = 100 * tally.wanting
    if share <= GENERATOR_CPU_PERCENT or tally.busiest < SHORT_FROM:
        return ()
    said = f"A process of the generator used a core, or waited for one, {share:.0f} % of the time"
    return (f"{said} (at most {GENERATOR_CPU_PERCENT:.0f} %).",)


def judge(
    thresholds: Sequence[Threshold],
    tally: Tally,
    observation: Observation | None,
    *,
    complete: bool,
    interrupted: bool = False,
) -> Judgement:
    """Return the verdict.

    What the generator could have caused itself is not held against the gateway: then nothing can be said. A forbidden
    message that got through is the gateway's fault in any case.

    :param complete: whether the run came to its end.
    """
    found = figures(tally, observation)
    findings = []
    for threshold in thresholds:
        value = found[threshold.figure]
        status = Status.NOT_MEASURED if value is None else Status.MET if threshold.met(value) else Status.BROKEN
        findings.append(Finding(threshold, value, status))
    broken = [finding for finding in findings if finding.status is Status.BROKEN]
    missing = [finding for finding in findings if finding.status is Status.NOT_MEASURED]
    limits = generator_limits(tally)
    if broken and not limits:
        limits = _shortage(tally)
    reasons = [_sentence(finding) for finding in broken]
    reasons += [f"Not measured: {FIGURES[item.threshold.figure][1]} ({item.threshold.figure})." for item in missing]
    if interrupted:
        reasons.append("The run was interrupted; these are the figures until then.")
    elif not complete:
        reasons.append("The run did not come to its end.")
    reasons += [f"{limit} What is found here is no more than the generator's own limit." for limit in limits]
    if any(finding.threshold.figure == "breaches" for finding in broken):
        verdict = Verdict.FAILED
    elif limits or interrupted:
        verdict = Verdict.INCONCLUSIVE
    elif broken:
        verdict = Verdict.FAILED
    elif missing or not complete:
        verdict = Verdict.INCONCLUSIVE
    else:
        verdict = Verdict.PASSED
    return Judgement(verdict, tuple(findings), tuple(reasons), limits)


def _sentence(finding: Finding) -> str:
    unit, meaning = FIGURES[finding.threshold.figure]
    assert finding.found is not None
    return f"{finding.threshold.figure} is {number(finding.found)} {unit}".rstrip() + (
        f"; it must be {finding.threshold} ({meaning})."
    )


def number(value: float) -> str:
    """Return a number for people."""
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.6f}".rstrip("0") if abs(value) < 1 else f"{value:,.1f}"
