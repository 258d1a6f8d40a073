# SPDX-License-Identifier: Apache-2.0
"""The report on a load run: one HTML page that needs nothing else, and the same as JSON.

- :class:`Report`: everything that is in it.
- :func:`write`: both files.
- :func:`summary`: a few lines for the terminal.
"""

from __future__ import annotations

import html
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from bednet.errors import BednetError
from load.machine import this_machine
from load.measure import merged
from load.observe import CPU_MAX
from load.plan import JUDGED, SLOW
from load.slo import FIGURES, Judgement, Status, Verdict, figures, number
from load.svg import Line, chart

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from load.clocks import Clock
    from load.observe import Observation
    from load.plan import Plan
    from load.tally import Tally

VERSION = 1
_MAX_MS = 1e9
#: What is shown of the broker's own topics; the JSON report has all of them.
BROKER_FIGURES = {
    "$SYS/broker/version": "version",
    "$SYS/broker/clients/connected": "clients connected",
    "$SYS/broker/clients/disconnected": "clients away whose session is kept",
    "$SYS/broker/messages/received": "packets received",
    "$SYS/broker/messages/sent": "packets sent",
    "$SYS/broker/publish/messages/received": "publishes received",
    "$SYS/broker/publish/messages/sent": "publishes sent",
    "$SYS/broker/publish/messages/dropped": "publishes dropped",
    "$SYS/broker/store/messages/count": "messages held",
    "$SYS/broker/heap/current": "heap, bytes",
}


class ReportError(BednetError):
    """The report cannot be written; the message says where and why."""

    code = "load-report"


@dataclass(frozen=True)
class Report:
    """A run, from plan to verdict.

    :ivar began_s: this machine's monotonic clock at the start of the schedule; 0 where it never began.
    :ivar identities: one sentence about whose certificates were used.
    :ivar machines: by host, what each generator ran on; empty where it was this machine.
    :ivar clocks: those of the generators' machines.
    :ivar notes: sentences that a reader must know, such as that generator and broker shared a machine.
    """

    started: datetime
    began_s: float
    plan: Plan
    tally: Tally
    observation: Observation | None
    judgement: Judgement
    complete: bool
    interrupted: bool
    identities: str
    notes: tuple[str, ...] = ()
    machines: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    clocks: tuple[Clock, ...] = ()

    @property
    def partial(self) -> bool:
        """Whether the run did not come to its end."""
        return self.interrupted or not self.complete

    @property
    def sent_per_s(self) -> float:
        """How many messages were sent in a second, answers among them."""
        return sum(self.tally.sent.values()) / self.tally.wall_s if self.tally.busy_s else 0.0

    @property
    def received_per_s(self) -> float:
        """How many were delivered in a second."""
        unique = sum(delivery.unique for delivery in self.tally.deliveries.values())
        return unique / self.tally.wall_s if self.tally.busy_s else 0.0


def broke_first(report: Report) -> str:
    """Say what went out of bounds first, second by second; empty where nothing did."""
    limits = {
        finding.threshold.figure: finding.threshold.value
        for finding in report.judgement.findings
        if not finding.threshold.at_least
    }
    events: list[tuple[float, str]] = []
    warm = int(report.plan.warmup_s)
    for second, counted in enumerate(report.tally.seconds):
        if second < warm:
            continue
        lag = counted.lag.percentile_ms(99)
        if lag is not None and lag > 50:  # noqa: PLR2004 - the limit of load.slo
            events.append((second, f"the generator was late by {lag:.0f} ms"))
        late = counted.latency.percentile_ms(99)
        if late is not None and late > limits.get("latency_p99_ms", _MAX_MS):
            events.append((second, f"deliveries took {late:.0f} ms (p99 of that second)"))
        if counted.connected and counted.connected < len(report.plan.players) and not report.plan.cut_at_s:
            events.append((second, f"{len(report.plan.players) - counted.connected} devices were not connected"))
    cores = report.observation.cores if report.observation else 1.0
    for sample in report.observation.samples if report.observation and report.began_s else ():
        if sample.cpu_percent / cores > limits.get("broker_cpu_percent", _MAX_MS):
            of = "a core" if cores == 1 else f"the {100 * cores:.0f} % of a core that it may use"
            used = f"the broker used {sample.cpu_percent / cores:.0f} % of {of}"
            events.append((sample.at_s - report.began_s, used))
        if sample.memory_mib > limits.get("broker_memory_mib", _MAX_MS):
            events.append((sample.at_s - report.began_s, f"the broker held {sample.memory_mib:.0f} MiB"))
    events = [event for event in events if event[0] >= 0]
    if not events:
        return ""
    at, what = min(events)
    return f"{what}, {at:.0f} s after the load began"


def not_measured(report: Report) -> list[str]:
    """Say what this run does not tell."""
    told = ["What the network between generator and gateway costs: it is part of every latency."]
    if report.observation is None or report.observation.problem:
        why = report.observation.problem if report.observation else "nobody watched it"
        told.append(f"The broker's CPU, memory and sockets ({why}).")
    elif not report.observation.journal:
        told.append("What the broker's journal says of the time of the run.")
    if not report.tally.scheduled["trespass"]:
        told.append("Whether forbidden messages are refused under load (profile `mixed` tries it).")
    if not report.tally.renewals:
        told.append("Renewing tokens (profile `token-renewal`).")
    else:
        told.append("The CPU of the token service, which every renewal needs.")
    if not report.tally.reconnects:
        told.append("Reconnecting (profile `reconnect-storm`).")
    told.append("Latencies of messages that were lost: a lost message counts as lost, not as slow.")
    if not report.tally.broker_after:
        told.append("What the broker tells of itself under $SYS: nobody who was played may hear it.")
    if len(report.tally.deliveries) and not any(qos == 2 for _, qos in report.tally.deliveries):  # noqa: PLR2004
        told.append("QoS 2.")
    return told


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as plain data."""
    found = figures(report.tally, report.observation)
    return {
        "version": VERSION,
        "started": report.started.isoformat(),
        "partial": report.partial,
        "verdict": report.judgement.verdict,
        "reasons": list(report.judgement.reasons),
        "broke_first": broke_first(report),
        "generator_limited": list(report.judgement.generator_limited),
        "not_measured": not_measured(report),
        "notes": list(report.notes),
        "identities": report.identities,
        "profile": report.plan.profile,
        "site": report.plan.site,
        "gateway": asdict(report.plan.gateway),
        "devices": report.plan.devices,
        "offered_per_s": report.plan.offered_per_s,
        "sent_per_s": report.sent_per_s,
        "received_per_s": report.received_per_s,
        "duration_s": report.plan.duration_s,
        "figures": found,
        "thresholds": [
            {
                "figure": finding.threshold.figure,
                "at_least" if finding.threshold.at_least else "at_most": finding.threshold.value,
                "found": finding.found,
                "status": finding.status,
            }
            for finding in report.judgement.findings
        ],
        "generator": this_machine(),
        "generators": {name: dict(facts) for name, facts in report.machines.items()},
        "clocks": [clock.to_json() for clock in report.clocks],
        "broker": {
            **(report.observation.host if report.observation else {}),
            "journal": report.observation.journal if report.observation else {},
            "samples": [asdict(sample) for sample in report.observation.samples] if report.observation else [],
        },
        "tally": report.tally.to_json(),
    }


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write report.html and report.json into a folder, each in one step.

    :raises ReportError: when that fails; a full disk leaves no half report.
    """
    written = write_text(folder / "report.json", json.dumps(as_json(report), indent=1))
    return write_text(folder / "report.html", as_html(report)), written


def write_text(path: Path, text: str) -> Path:
    """Write a file in one step: a full disk leaves no half of it.

    :raises ReportError: when that fails.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as exc:
        raise ReportError(
            f"The report cannot be written to {path.parent}: {exc.strerror}. Cure: make room there, or name another "
            "folder with --report. What was found is above."
        ) from exc
    return path


def check_writable(folder: Path) -> None:
    """Refuse, before a run, a folder that no report can be written to.

    :raises ReportError: when it cannot.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as exc:
        raise ReportError(
            f"No report can be written to {folder}: {exc.strerror}. Cure: name another folder with --report."
        ) from exc


def headline(report: Report) -> str:
    """Return the verdict in one sentence."""
    plan, verdict = report.plan, report.judgement.verdict
    what = f"{plan.devices} devices, {report.sent_per_s:.0f} messages/s in, {report.received_per_s:.0f}/s out"
    if verdict is Verdict.PASSED:
        return f"PASSED: {plan.gateway.name} carries {what}."
    if verdict is Verdict.FAILED:
        return f"FAILED: {plan.gateway.name} does not keep to the thresholds at {what}."
    if report.judgement.generator_limited:
        return f"INCONCLUSIVE: the generator was the limit at {what}; this is no verdict on {plan.gateway.name}."
    return f"INCONCLUSIVE: this run is no verdict on {plan.gateway.name} at {what}."


def summary(report: Report) -> str:
    """Return what a person at the terminal wants to know."""
    found = figures(report.tally, report.observation)
    lines = [headline(report)]
    if report.partial:
        lines.append("This report is PARTIAL: the run did not come to its end.")
    lines += [f"  {reason}" for reason in report.judgement.reasons]
    first = broke_first(report)
    if first:
        lines.append(f"  First out of bounds: {first}.")
    width = max(len(name) for name in FIGURES)
    for finding in report.judgement.findings:
        shown = "-" if finding.found is None else number(finding.found)
        lines.append(
            f"  {finding.threshold.figure:{width}} {shown:>12}   {finding.threshold!s:24} {finding.status.value}"
        )
    judged = {finding.threshold.figure for finding in report.judgement.findings}
    for name in ("duplicates", "disordered", "unsent", "connect_failures"):
        value = found[name]
        if name not in judged and value:
            lines.append(f"  {name:{width}} {number(value):>12}")
    for reason, count in report.tally.connect_failures.most_common(5):
        lines.append(f"  {count} attempts to connect failed: {reason}")
    for reason, count in report.tally.renewal_failures.most_common(5):
        lines.append(f"  {count} renewals failed: {reason}")
    for reason, count in report.tally.lost_connections.most_common(5):
        lines.append(f"  {count} connections broke: {reason}")
    return "\n".join(lines)


_STYLE = """
:root { color-scheme: light dark; --fg:#1b1f24; --dim:#59636e; --bg:#fff; --line:#d1d9e0; --ok:#1a7f37; --bad:#cf222e;
  --unsure:#9a6700; --a:#0969da; --b:#bc4c00; --c:#8250df; --d:#1a7f37 }
@media (prefers-color-scheme: dark) { :root { --fg:#e6edf3; --dim:#9198a1; --bg:#0d1117; --line:#3d444d; --ok:#3fb950;
  --bad:#f85149; --unsure:#d29922; --a:#4493f8; --b:#db6d28; --c:#ab7df8; --d:#3fb950 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--fg); background: var(--bg); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0 }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap } td.w { white-space: nowrap }
.verdict { font-size: 1.15rem; font-weight: 600; border-left: .4rem solid; padding: .4rem .8rem }
.passed, .met { color: var(--ok) } .failed, .broken { color: var(--bad) } .inconclusive, .not { color: var(--unsure) }
.partial { border: 2px solid var(--bad); padding: .4rem .8rem; font-weight: 600 }
.dim { color: var(--dim) } svg { max-width: 100%; height: auto } figure { margin: 1rem 0 }
figcaption { color: var(--dim) }
"""


def as_html(report: Report) -> str:
    """Return the report as one page."""
    plan, tally = report.plan, report.tally
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>bednet load: {_(plan.profile)} on {_(plan.gateway.name)}</title><style>{_STYLE}</style>",
        f"<h1>Load test: profile {_(plan.profile)} on {_(plan.gateway.name)}</h1>",
        f'<p class="verdict {report.judgement.verdict.value}">{_(headline(report))}</p>',
    ]
    if report.partial:
        parts.append('<p class="partial">Partial report: the run did not come to its end.</p>')
    parts.append(_list(report.judgement.reasons))
    first = broke_first(report)
    parts.append(f"<p>First out of bounds: {_(first)}.</p>" if first else "<p>Nothing went out of bounds.</p>")
    parts += ["<h2>Thresholds</h2>", _thresholds(report)]
    parts += ["<h2>What was delivered</h2>", _deliveries(tally)]
    parts.append("<h2>Over time</h2><p class='dim'>Across: seconds since the schedule began.</p>")
    parts += _charts(report)
    parts += ["<h2>Connections and refusals</h2>", _connections(report)]
    parts += ["<h2>Generator and gateway</h2>", _machines(report)]
    parts += ["<h2>What was not measured</h2>", _list([*not_measured(report), *report.notes])]
    parts.append(
        f'<p class="dim">Begun {_(report.started.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))}; site '
        f"{_(plan.site)}. {_(report.identities)} Latencies count from the moment a message was due, so that what had "
        f"to wait is not hidden; the warm-up of {plan.warmup_s:g} s is left out of them, and of nothing else. "
        "docs/load.md tells how to read this page.</p></html>"
    )
    return "\n".join(parts)


def _(text: object) -> str:
    return html.escape(str(text))


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_(sentence)}</li>' for sentence in sentences)}</ul>" if sentences else ""


def _row(cells: Sequence[object], numbers: Sequence[int] = ()) -> str:
    return (
        "<tr>"
        + "".join(f'<td class="n">{_(c)}</td>' if at in numbers else f"<td>{_(c)}</td>" for at, c in enumerate(cells))
        + "</tr>"
    )


def _head(*names: str) -> str:
    return f"<tr>{''.join(f'<th>{_(name)}</th>' for name in names)}</tr>"


def _thresholds(report: Report) -> str:
    rows = []
    for finding in report.judgement.findings:
        unit, meaning = FIGURES[finding.threshold.figure]
        shown = "-" if finding.found is None else f"{number(finding.found)} {unit}".strip()
        css = "not" if finding.status is Status.NOT_MEASURED else finding.status.value
        rows.append(
            f"<tr><td>{_(finding.threshold.figure)}</td><td class='n'>{_(shown)}</td>"
            f"<td class='w'>{_(finding.threshold)}</td><td class='{css}'>{_(finding.status.value)}</td>"
            f"<td class='dim'>{_(meaning)}</td></tr>"
        )
    return f"<table>{_head('figure', 'found', 'must be', '', 'meaning')}{''.join(rows)}</table>"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _deliveries(tally: Tally) -> str:
    rows = []
    for (kind, qos), counted in sorted(tally.deliveries.items()):
        latency = counted.latency
        name = f"{kind} readers" if kind == SLOW else kind
        rows.append(
            _row(
                [
                    name if kind in JUDGED else f"{name} (not judged)",
                    qos,
                    *(f"{value:,}" for value in (counted.expected, counted.unique, counted.lost)),
                    *(f"{value:,}" for value in (counted.duplicates, counted.disordered)),
                    *(_ms(latency.percentile_ms(percent)) for percent in (50, 99, 99.9, 100)),
                ],
                range(1, 11),
            )
        )
    return (
        "<table>"
        + _head(
            *("kind", "QoS", "asked for", "delivered", "lost", "twice", "out of order"),
            *("p50 ms", "p99 ms", "p99.9 ms", "max ms"),
        )
        + "".join(rows)
        + "</table>"
    )


def _charts(report: Report) -> list[str]:
    # The last one is not over.
    seconds = report.tally.seconds[:-1]
    if len(seconds) < 2:  # noqa: PLR2004 - a line needs two points
        return ["<p>The run was too short to draw.</p>"]
    at = list(range(len(seconds)))
    parts = [
        chart(
            "Messages per second",
            [
                Line("sent", "a", [(t, float(s.sent)) for t, s in zip(at, seconds, strict=True)]),
                Line("delivered", "b", [(t, float(s.received)) for t, s in zip(at, seconds, strict=True)]),
            ],
        ),
        chart(
            "Delivery in milliseconds, from the moment a message was due",
            [
                Line("p50", "a", _percentiles(report, 50)),
                Line("p99", "b", _percentiles(report, 99)),
                Line("generator late, p99", "c", [(t, s.lag.percentile_ms(99)) for t, s in enumerate(seconds)]),
            ],
            logarithmic=True,
        ),
        chart("Devices connected", [Line("connected", "a", [(t, float(s.connected)) for t, s in enumerate(seconds)])]),
    ]
    watched = [s for s in report.observation.samples if s.at_s >= report.began_s] if report.observation else []
    if len(watched) > 1 and report.began_s:
        times = [sample.at_s - report.began_s for sample in watched]
        parts.append(
            chart(
                "CPU in percent of one core",
                [
                    Line("broker", "a", [(t, s.cpu_percent) for t, s in zip(times, watched, strict=True)]),
                    Line("generator", "c", [(t, 100 * s.cpu_s) for t, s in enumerate(seconds)]),
                ],
            )
        )
        parts.append(
            chart(
                "The broker's memory in MiB",
                [Line("resident", "a", [(t, s.memory_mib) for t, s in zip(times, watched, strict=True)])],
            )
        )
    judged = merged(d.latency for (kind, _), d in report.tally.deliveries.items() if kind in JUDGED)
    if judged.count:
        points: list[tuple[float, float | None]] = []
        seen = 0
        for upper, count in judged.steps_ms():
            seen += count
            points.append((seen / judged.count * 100, max(upper, 0.001)))
        parts.append(chart("Delivery in milliseconds, by percentile", [Line("all", "a", points)], logarithmic=True))
    return parts


def _percentiles(report: Report, percent: float) -> list[tuple[float, float | None]]:
    return [(t, second.latency.percentile_ms(percent)) for t, second in enumerate(report.tally.seconds[:-1])]


def _connections(report: Report) -> str:
    tally = report.tally
    rows = [
        ["connections made", f"{tally.connects:,}"],
        ["CONNACK p50 / p99 / max, ms", " / ".join(_ms(tally.connect.percentile_ms(p)) for p in (50, 99, 100))],
        ["reconnections", f"{tally.reconnects:,}"],
        ["reconnect p50 / p99 / max, ms", " / ".join(_ms(tally.reconnect.percentile_ms(p)) for p in (50, 99, 100))],
        ["tokens renewed in the session", f"{tally.renewals:,}"],
        ["renewal p50 / p99 / max, ms", " / ".join(_ms(tally.renewal.percentile_ms(p)) for p in (50, 99, 100))],
        ["connections cut on purpose", f"{tally.cut:,}"],
        ["from the first of these until all were back, ms", _ms(tally.all_back_ms)],
        ["publishes acknowledged (QoS 1 and 2)", f"{tally.acknowledged:,}"],
        ["forbidden publishes refused, as they must be", f"{tally.refused_wanted:,}"],
        ["forbidden publishes that got through", f"{tally.breaches:,}"],
        ["messages of others, heard besides", f"{tally.foreign:,}"],
        ["bytes to / from the gateway, TLS included", f"{tally.bytes_sent:,} / {tally.bytes_received:,}"],
    ]
    for name, counts in (
        ("TLS", tally.tls),
        ("attempts to connect that failed", tally.connect_failures),
        ("connections that broke", tally.lost_connections),
        ("renewals of tokens that failed", tally.renewal_failures),
        ("publishes refused though granted", tally.refused),
        ("subscriptions refused though granted", tally.subscribe_refusals),
        ("due and not sent", tally.unsent),
    ):
        rows += [[f"{name}: {reason}", f"{count:,}"] for reason, count in counts.most_common(10)]
    return f"<table>{''.join(_row(row, (1,)) for row in rows)}</table>"


def _machines(report: Report) -> str:
    tally = report.tally
    share = 100 * tally.cpu_s / tally.busy_s if tally.busy_s else 0.0
    handled = sum(tally.sent.values()) + sum(d.unique for d in tally.deliveries.values())
    generator = {} if report.machines else this_machine()
    generator |= {
        "processes": str(tally.processes),
        "CPU used": f"{share:.0f} % of a core for each process, the busiest {100 * tally.busiest:.0f} %",
        "messages per CPU second": f"{handled / tally.cpu_s:,.0f}" if tally.cpu_s else "-",
        "late, p99": f"{_ms(tally.lag.percentile_ms(99))} ms",
    }
    seen = report.observation
    gateway = dict(seen.host) if seen else {}
    for name, meaning in BROKER_FIGURES.items():
        before, after = tally.broker_before.get(name), tally.broker_after.get(name)
        if before is not None and after is not None:
            gateway[f"$SYS: {meaning}"] = after if before == after else f"{before}, later {after}"
    for noise in ("tick", "page", "since", "pid", *CPU_MAX):
        gateway.pop(noise, None)
    if seen and seen.samples:
        of = "a core" if seen.cores == 1 else f"the {100 * seen.cores:.0f} % of a core that it may use"
        gateway["CPU, busiest five seconds"] = f"{_ms(seen.cpu_percent)} % of {of}"
        gateway["memory, peak"] = f"{_ms(seen.memory_mib)} MiB"
        gateway["memory available on the host, least"] = f"{_ms(min(s.available_mib for s in seen.samples))} MiB"
        files = [sample.files for sample in seen.samples if sample.files is not None]
        gateway["open files, most"] = str(max(files)) if files else "-"
        gateway |= {f"journal: {name}": f"{count:,} lines" for name, count in seen.journal.items()}
    if seen and seen.died:
        gateway["broker's process"] = "gone before the end"
    if report.clocks:
        generator["latency between its machines"] = f"right to {tally.clock_error_ms:.2f} ms"
    machines = []
    for host, its in report.machines.items():
        facts = dict(its)
        for clock in report.clocks:
            if clock.host == host:
                facts["clock, ahead of the leader's"] = (
                    f"{clock.ahead_ns / 1e6:,.3f} ms, right to {clock.error_ns / 1e6:.3f} ms"
                )
                drift = "unknown" if clock.drift_ns is None else f"{clock.drift_ns / 1e6:.3f} ms"
                facts["clock, drift in the run"] = drift
        machines.append((f"Generator on {host}", facts))
    tables = []
    for title, facts in (("Generator", generator), *machines, ("Gateway", gateway)):
        rows = "".join(_row(pair) for pair in facts.items()) or _row(["nothing is known", ""])
        tables.append(f"<table><tr><th colspan='2'>{title}</th></tr>{rows}</table>")
    return "".join(tables)
