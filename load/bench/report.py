# SPDX-License-Identifier: Apache-2.0
"""docs/benchmarks.md and its picture, out of what :mod:`load.bench.rounds` and the compiler's own measurement say.

- :func:`page`: the page's text.
- :func:`goals`: what we want to hold, and whether it does.
- :func:`picture`: an SVG of the stalls.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BASELINE = "mTLS"
BIG = "bednet, 1,000,000 devices"
CPU_RATIO, MEMORY_MB, STALL_MS, REVOKE_MS, START_S = 1.05, 25, 20, 100, 1
COMPILE_S, COMPILE_MB, CHANGE_MS = 60, 1000, 50

_ROWS = (
    ("qos0_s", "QoS 0, s CPU per 100,000", "{:.2f}"),
    ("qos1_s", "QoS 1, s CPU per 100,000", "{:.2f}"),
    ("connect_cpu_ms", "ms CPU per connection", "{:.2f}"),
    ("memory_mb", "memory, MB", "{:.0f}"),
    ("start_s", "start, s", "{:.2f}"),
    ("stall_ms", "stall at a change, ms", "{:.0f}"),
)
_INTRODUCTION = """\
What access control costs a broker. `make bench` starts each broker once in a round, in an order that changes, and
writes this page. {rounds} rounds on {date}; {mosquitto}; {processor}; {system}. Generator and broker share the
machine, a virtual one with neighbours: look at the ratios and the spread, not at the last digit. A cell is the
median of the rounds, with the smallest and the largest.

CPU is that of the broker's process (schedstat), so it does not depend on how fast the generator is. Messages have
64 bytes and go from one device to one subscriber. All but plaintext use TLS with client certificates (P-256), the
same settings everywhere, and full handshakes. Devices that do not connect are known to the broker all the same.
"""
_STALL = """\
A stall is the longest round trip of a client that pings each millisecond while one device's rights change (acl_file: a
reload; dynamic-security: addClientRole; bednet: a commit to the store). Without a change the longest was {quiet}.
"""
_NOT_MEASURED = """\
## Not measured

- A Raspberry Pi, arm64, more than one machine, a network between generator and broker.
- Fan-out and fan-in with many connections at once; QoS 2; WebSockets; resumed handshakes.
- Peers other than Mosquitto.
"""


class Goal(NamedTuple):
    """Something that we want to hold."""

    what: str
    wanted: str
    measured: str
    holds: bool


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """Return the median of the ratios, round by round: one round meets the same noise."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def goals(measured: Mapping[str, Any], compiling: Mapping[str, Mapping[str, float]]) -> list[Goal]:
    """Hold the measurements against what we want.

    :param measured: what :func:`load.bench.rounds.run` returns.
    :param compiling: what :func:`load.bench.compiling.measure` returns for 1,000,000 devices.
    """
    kinds = measured["kinds"]
    base, big, found = kinds[BASELINE], kinds[BIG], []
    for name in (kind for kind in kinds if kind.startswith("bednet")):
        for key, words in (("qos0_s", "QoS 0"), ("qos1_s", "QoS 1")):
            value = ratio(kinds[name][key], base[key])
            wanted = f"at most {CPU_RATIO} of {BASELINE}"
            found.append(Goal(f"CPU per message, {words}, {name}", wanted, f"{value:.2f}", value <= CPU_RATIO))
    more = statistics.median(big["memory_mb"]) - statistics.median(base["memory_mb"])
    what = "memory above the broker without access control, 1,000,000 devices"
    found.append(Goal(what, f"at most {MEMORY_MB} MB", f"{more:.1f} MB", more <= MEMORY_MB))
    stall = statistics.median(big["stall_ms"])
    what = "stall at a change, 1,000,000 devices"
    found.append(Goal(what, f"at most {STALL_MS} ms", f"{stall:.1f} ms", stall <= STALL_MS))
    revoke = percentile(big["revoke_ms"], 0.99)
    what = "from revocation to disconnect, p99, 1,000 clients under load"
    found.append(Goal(what, f"under {REVOKE_MS} ms", f"{revoke:.0f} ms", revoke < REVOKE_MS))
    start = statistics.median(big["start_s"])
    found.append(Goal("start with 1,000,000 devices", f"under {START_S} s", f"{start:.2f} s", start < START_S))
    seconds, megabytes = compiling["compile"]["seconds"], compiling["compile"]["peak_mb"]
    change = compiling["one device"]["median_ms"]
    holds = seconds < COMPILE_S and megabytes < COMPILE_MB
    wanted = f"under {COMPILE_S} s and {COMPILE_MB} MB"
    found.append(Goal("compiling 1,000,000 devices", wanted, f"{seconds:.0f} s, {megabytes:.0f} MB", holds))
    what = "storing one changed device of 1,000,000"
    found.append(Goal(what, f"under {CHANGE_MS} ms", f"{change:.1f} ms", change < CHANGE_MS))
    return found


def _cell(values: Sequence[float] | None, form: str) -> str:
    if not values:
        return "-"
    middle = form.format(statistics.median(values))
    return f"{middle} ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else middle


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def page(measured: Mapping[str, Any], compiling: Mapping[str, Mapping[str, float]]) -> str:
    """Return docs/benchmarks.md; for the parameters see :func:`goals`."""
    kinds = measured["kinds"]
    quiet = ", ".join(
        f"{statistics.median(values['quiet_ms']):.1f} ms ({name})"
        for name, values in kinds.items()
        if "quiet_ms" in values
    )
    lines = ["# Benchmarks", "", "<!-- written by `make bench`; the words are in load/bench/report.py -->", ""]
    lines += [_INTRODUCTION.format(rounds=measured["rounds"], **measured["machine"])]
    lines += [_row(["broker", *(title for _, title, _ in _ROWS)]), "|---" * (len(_ROWS) + 1) + "|"]
    lines += [_row([name, *(_cell(values.get(key), form) for key, _, form in _ROWS)]) for name, values in kinds.items()]
    lines += ["", *textwrap.wrap(_STALL.format(quiet=quiet), 120), ""]
    lines += ["![The longest round trip of a client while rights change](benchmarks.svg)", "", "## The goals", ""]
    lines += [_row(["what", "goal", "measured", "holds"]), "|---" * 4 + "|"]
    for goal in goals(measured, compiling):
        lines.append(_row([goal.what, goal.wanted, goal.measured, "yes" if goal.holds else "**no**"]))
    lines += ["", f"A ratio is the median of the ratios round by round, to {BASELINE} without access control.", ""]
    for name, values in kinds.items():
        if "revoke_ms" in values:
            times = values["revoke_ms"]
            figures = f"median {statistics.median(times):.1f} ms, p99 {percentile(times, 0.99):.1f} ms"
            lines.append(
                f"- From revocation to disconnect, {name}: {figures}, longest {max(times):.1f} ms, {len(times)} times."
            )
    lines += ["", "## From the site's files to a store of 1,000,000 devices", ""]
    lines += [_row(["step", "wall clock, s", "CPU, s", "peak memory, MB"]), "|---" * 4 + "|"]
    for step, used in compiling.items():
        if "cpu_seconds" in used:
            cells = [f"{used['seconds']:.1f}", f"{used['cpu_seconds']:.1f}", f"{used['peak_mb']:.0f}"]
            lines.append(_row([step, *cells]))
    one, sizes = compiling["one device"], compiling["sizes"]
    lines += [
        "",
        f"One device that is known to have changed: median {one['median_ms']} ms, worst {one['worst_ms']} ms.",
    ]
    lines += [f"The compiled site has {sizes['compiled_mb']} MB, the store {sizes['store_mb']} MB."]
    return "\n".join([*lines, "", _NOT_MEASURED])


def picture(measured: Mapping[str, Any]) -> str:
    """Return an SVG: the stall at a change, by broker, on a logarithmic scale."""
    kinds = measured["kinds"].items()
    bars = [(name, statistics.median(values["stall_ms"])) for name, values in kinds if values.get("stall_ms")]
    left, right, height, top, width = 250, 90, 26, 40, 760
    tall = top + height * len(bars) + 40
    low, high = 0.1, 10 ** math.ceil(math.log10(max(value for _, value in bars)))

    def x(value: float) -> float:
        return left + (width - left - right) * math.log(max(value, low) / low) / math.log(high / low)

    font = 'font-family="sans-serif" font-size="13"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" {font}>',
        f'<rect width="{width}" height="{tall}" fill="white"/>',
        f'<text x="{left}" y="20" font-weight="bold">The longest round trip while rights change, ms</text>',
    ]
    tick = low
    while tick <= high * 1.001:
        out.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top - 8}" y2="{tall - 30}" stroke="#ddd"/>')
        out.append(f'<text x="{x(tick):.1f}" y="{tall - 12}" text-anchor="middle" fill="#555">{tick:g}</text>')
        tick *= 10
    for number, (name, value) in enumerate(bars):
        y = top + number * height
        color = "#2a6f4e" if name.startswith("bednet") else "#999"
        out.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        bar = f'<rect x="{left}" y="{y}" width="{max(1.0, x(value) - left):.1f}" height="{height - 8}" fill="{color}"/>'
        out += [bar, f'<text x="{x(value) + 6:.1f}" y="{y + 14}">{value:.1f}</text>']
    return "\n".join([*out, "</svg>", ""])
