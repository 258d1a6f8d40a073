# SPDX-License-Identifier: Apache-2.0
"""docs/benchmarks.md and its pictures, out of what was measured.

- :func:`page`: the page's text.
- :func:`goals`: what we want to hold, and whether it does.
- :func:`pictures`: SVGs.
- :func:`ratios`, :func:`cell`: arithmetic and cells, for other pages as well.

What was measured is a mapping from part to figures: ``brokers`` (:func:`load.bench.rounds.run`), ``compiling``
(:func:`load.bench.compiling.measure`), ``tokens`` (:func:`load.bench.tokens.run`). A part that is not there is said to
be missing.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

BASELINE = "mTLS"
BIG = "bednet, 1,000,000 devices"
CPU_RATIO, MEMORY_MB, STALL_MS, REVOKE_MS, START_S = 1.05, 25, 20, 100, 1
COMPILE_S, COMPILE_MB, CHANGE_MS = 60, 1000, 50
TOKEN_RATIO, SERVICE_MB = 1.10, 80
_WIDTH = 120
_BUSY = 1.5
_TAIL = 0.025
# A latency says more of the generator than of the broker when the generator itself is later than this.
_LATE_MS = 5
_OURS, _OTHERS, _LIGHT = "#2a6f4e", "#999", "#cfcfcf"

_MESSAGES = (
    ("in0_s", "fan-in, QoS 0"),
    ("in1_s", "fan-in, QoS 1"),
    ("out0_s", "fan-out, QoS 0"),
    ("out1_s", "fan-out, QoS 1"),
)
_CONNECTIONS = (
    ("full_cpu_ms", "full: ms CPU", "{:.2f}"),
    ("full_wall_ms", "ms until CONNACK", "{:.1f}"),
    ("resumed_cpu_ms", "resumed: ms CPU", "{:.2f}"),
    ("resumed_wall_ms", "ms until CONNACK", "{:.1f}"),
    ("memory_mb", "memory, MB", "{:.0f}"),
    ("connected_mb", "with 1,000 connections (more), MB", "{:.0f}"),
    ("start_s", "start, s", "{:.2f}"),
)
_RATIOS = (*_MESSAGES, ("full_cpu_ms", "full handshake"), ("resumed_cpu_ms", "resumed handshake"))
_INTRODUCTION = """\
What messages, connections and changes cost a broker, ours beside others. `make bench` measures it and writes this page.
Generator and brokers share one machine, a virtual one with neighbours: look at the ratios and the spread, not at the
last digit. A cell is the median of the rounds; after ± stands half of what lies between the quartiles.
"""
_HOW = """\
{rounds} rounds on {date}{scaled}. {processor}; {system}. All brokers run side by side, and all but one idle: in each
round each thing is measured of all of them, one right after the other, in an order that changes.
CPU is that of the broker's processes (schedstat), so it does not depend on how fast the generator is. Messages have 64
bytes, each sent on its own. Fan-in: 20 devices to one subscriber. Fan-out: one device to 20 subscribers; what counts
is a delivery. All but plaintext use TLS 1.3 with client certificates (P-256, X25519, AES-128-GCM). Devices that do not
connect are known to the broker all the same. The brokers of other makers let everybody in who has a certificate.
"""
_HALF = """\
Half load is the pace that keeps half of a core busy, by the cost of a message (fan-in, QoS 0), and at most 40,000
messages a second, which is what the generator keeps up with. Messages are due at fixed times, and a latency counts from
then. The generator itself was late by {late:.1f} ms (p99, median of all). {lost}
"""
_RATIO = """\
The median of the ratios round by round, and the interval that holds it by 95 % (by the order of the values). bednet's
ratio is to a measurement of mTLS right beside its own, for messages several times in a round.
"""
_STALL = """\
A stall is the longest round trip of a client that pings each millisecond while one device's rights change (acl_file: a
reload; dynamic-security: addClientRole; bednet: a commit to the store).
"""
_NOT_MEASURED = """\
## Not measured

- A Raspberry Pi, arm64, more than one machine, a network between generator and broker.
- QoS 2, WebSockets, retained messages, brokers in clusters, persistence.
- Throughput: a rate would say as much of the generator. For what one gateway holds see [load.md](load.md).
"""


class Goal(NamedTuple):
    """Something that we want to hold.

    :param holds: None where the noise hides it: it was missed, and what would hold lies within the interval.
    """

    what: str
    wanted: str
    measured: str
    holds: bool | None


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Return the ratios, round by round: one round meets the same noise."""
    return [a / b for a, b in zip(of, to, strict=True) if b]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return an interval that holds the true median by 95 %, by the order of the values alone.

    Of fewer than six values it is all that there is.
    """
    ordered, size = sorted(values), len(values)
    tail, out = 0.0, 0
    while (tail := tail + math.comb(size, out) / 2**size) <= _TAIL:
        out += 1
    out = max(0, out - 1)
    return ordered[out], ordered[size - 1 - out]


def cell(values: Sequence[float] | None, form: str) -> str:
    """Return the median and, where there is more than one value, the spread in percent."""
    if not values:
        return "-"
    middle = statistics.median(values)
    low, high = quartiles(values)
    spread = f" ±{(high - low) / 2 / middle * 100:.0f} %" if len(values) > 1 and middle else ""
    return form.format(middle) + spread


def ratio_cell(of: Sequence[float] | None, to: Sequence[float] | None) -> str:
    """Return the median of the ratios with its interval."""
    if not of or not to or len(of) != len(to):
        return "-"
    found = ratios(of, to)
    low, high = interval(found)
    return f"{statistics.median(found):.2f} ({low:.2f} to {high:.2f})"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def prose(text: str) -> list[str]:
    """Return the lines of a paragraph."""
    return textwrap.wrap(" ".join(text.split()), _WIDTH, break_on_hyphens=False, break_long_words=False)


def goals(measured: Mapping[str, Any]) -> list[Goal]:
    """Hold what was measured against what we want; of parts that are missing there are no goals."""
    found: list[Goal] = []
    if kinds := measured.get("brokers", {}).get("kinds"):
        found += _broker_goals(kinds)
    if "compiling" in measured:
        figures = measured["compiling"]["figures"]
        seconds, megabytes = figures["compile"]["seconds"], figures["compile"]["peak_mb"]
        change = figures["one device"]["median_ms"]
        holds = seconds < COMPILE_S and megabytes < COMPILE_MB
        wanted = f"under {COMPILE_S} s and {COMPILE_MB} MB"
        found.append(Goal("compiling 1,000,000 devices", wanted, f"{seconds:.0f} s, {megabytes:.0f} MB", holds))
        what = "one changed device of 1,000,000, from its entry to the store"
        found.append(Goal(what, f"under {CHANGE_MS} ms", f"{change:.1f} ms", change < CHANGE_MS))
    if "tokens" in measured:
        found += _token_goals(measured["tokens"])
    return found


def _ratio_goal(what: str, wanted: str, of: Sequence[float], to: Sequence[float], limit: float) -> Goal:
    found = ratios(of, to)
    holds: bool | None = statistics.median(found) <= limit
    if not holds and interval(found)[0] <= limit:
        holds = None
    return Goal(what, wanted, ratio_cell(of, to), holds)


def _token_goals(part: Mapping[str, Any]) -> list[Goal]:
    (_, without), *shown = part["connections"].items()
    wanted = f"at most {TOKEN_RATIO:.2f} of the same without a token"
    found = [
        _ratio_goal(f"CPU per connection with {what}", wanted, values, without, TOKEN_RATIO) for what, values in shown
    ]
    ours = next(iter(part["services"].values()))
    memory = statistics.median(ours["memory_mb"])
    return [
        *found,
        Goal("memory of the token service", f"under {SERVICE_MB} MB", f"{memory:.0f} MB", memory < SERVICE_MB),
    ]


def _broker_goals(kinds: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Goal]:
    found: list[Goal] = []
    base = kinds.get(BASELINE, {})
    for name in (kind for kind in kinds if kind.startswith("bednet")):
        for key, words in _MESSAGES:
            of, to = kinds[name].get(key), kinds[name].get(f"base_{key}", base.get(key))
            if of and to:
                wanted = f"at most {CPU_RATIO} of {BASELINE}"
                found.append(_ratio_goal(f"CPU per message, {words}, {name}", wanted, of, to, CPU_RATIO))
    if (big := kinds.get(BIG)) is None:
        return found
    if "memory_mb" in base:
        more = statistics.median(big["memory_mb"]) - statistics.median(base["memory_mb"])
        what = "memory above the broker without access control, 1,000,000 devices"
        found.append(Goal(what, f"at most {MEMORY_MB} MB", f"{more:.1f} MB", more <= MEMORY_MB))
    if "stall_ms" in big:
        stall = statistics.median(big["stall_ms"])
        what = "stall at a change, 1,000,000 devices"
        found.append(Goal(what, f"at most {STALL_MS} ms", f"{stall:.1f} ms", stall <= STALL_MS))
    if "revoke_ms" in big:
        revoke = percentile(big["revoke_ms"], 0.99)
        what = "from revocation to disconnect, p99, 1,000 clients under load"
        found.append(Goal(what, f"under {REVOKE_MS} ms", f"{revoke:.0f} ms", revoke < REVOKE_MS))
    start = statistics.median(big["start_s"])
    found.append(Goal("start with 1,000,000 devices", f"under {START_S} s", f"{start:.2f} s", start < START_S))
    return found


def page(measured: Mapping[str, Any], name: str = "benchmarks") -> str:
    """Return docs/benchmarks.md.

    :param name: the beginning of the pictures' names.
    """
    lines = ["# Benchmarks", "", "<!-- written by `make bench`; the words are in load/bench/report.py -->", ""]
    lines += [*prose(_INTRODUCTION), ""]
    if "brokers" in measured:
        lines += _brokers(measured["brokers"], name)
    else:
        lines += ["## Brokers", "", "Not measured yet: `python -m load.bench --only brokers`.", ""]
    if found := goals(measured):
        lines += ["## The goals", ""]
        words = {True: "yes", False: "**no**", None: "**the noise hides it**"}
        rows = [[goal.what, goal.wanted, goal.measured, words[goal.holds]] for goal in found]
        lines += [*table(["what", "goal", "measured", "holds"], rows), ""]
    if "compiling" in measured:
        lines += _compiling(measured["compiling"])
    else:
        lines += ["## The compiler and the store", "", "Not measured yet: `python -m load.bench --only compiling`.", ""]
    if "tokens" in measured:
        lines += _tokens(measured["tokens"])
    else:
        lines += ["## Tokens", "", "Not measured yet: `python -m load.bench --only tokens`.", ""]
    return "\n".join([*lines, _NOT_MEASURED])


def busy(figures: Mapping[str, Any]) -> list[str]:
    """Return the lines of a warning where something else kept the machine busy."""
    load = figures["machine"]["load"]
    if load < _BUSY:
        return []
    said = f"**Something else kept the machine busy (load average {load:.1f} at the beginning): noisy figures.**"
    return [*prose(said), ""]


def _how(figures: Mapping[str, Any]) -> str:
    # A quick look must not pass for more.
    scaled = f" (a quick look: {figures['scale']:g} of the usual amount)" if figures["scale"] != 1 else ""
    return _HOW.format(rounds=figures["rounds"], scaled=scaled, **figures["machine"])


def _brokers(figures: Mapping[str, Any], picture: str) -> list[str]:
    kinds, missing = figures["kinds"], figures["missing"]
    absent = [f"- **{name}: not measured.** {why}." for name, why in missing.items()]
    absent += [f"- **{name}: not measured to the end.** {why}." for name, why in figures["failed"].items()]
    lines = ["## Brokers", "", *prose(_how(figures)), "", *busy(figures), *absent, *([""] if absent else [])]
    speaking = {name: values for name, values in kinds.items() if "in0_s" in values}

    def row(name: str, cells: Sequence[str]) -> list[str]:
        return [f"**{name}**" if name.startswith("bednet") else name, *cells]

    def gone(width: int) -> list[list[str]]:
        return [[name, "not measured", *["-"] * (width - 2)] for name in missing]

    titles = ["broker", *(title for _, title in _MESSAGES), "p50 / p99 at half load, ms", "messages/s then"]
    rows = []
    for name, values in speaking.items():
        cells = [cell(values.get(key), "{:.2f}") for key, _ in _MESSAGES]
        if paced := values.get("paced_p99_ms"):
            late = statistics.median(values["paced_late_p99_ms"]) > _LATE_MS
            said = f"{statistics.median(values['paced_p50_ms']):.1f} / {cell(paced, '{:.1f}')}"
            cells.append(f"{said} (the generator was late)" if late else said)
            cells.append(f"{statistics.median(values['paced_per_s']):,.0f}")
        rows.append(row(name, cells + ["-"] * (len(titles) - 1 - len(cells))))
    lines += ["### Messages: CPU seconds per 100,000", "", *table(titles, rows + gone(len(titles))), ""]
    lines += [f"![CPU seconds per 100,000 messages]({picture}-messages.svg)", ""]
    late = [value for values in speaking.values() for value in values.get("paced_late_p99_ms", [])]
    if late:
        losers = {name: sum(values.get("paced_lost", [])) for name, values in speaking.items()}
        lost = ", ".join(f"{name} {count:.0f}" for name, count in losers.items() if count)
        said = f"Messages that did not arrive within a second: {lost}." if lost else "No message was lost."
        lines += [*prose(_HALF.format(late=statistics.median(late), lost=said)), ""]

    titles = ["broker", *(title for _, title, _ in _CONNECTIONS)]
    rows = []
    for name, values in kinds.items():
        cells = [cell(values.get(key), form) for key, _, form in _CONNECTIONS]
        if "resumed_share" in values and "resumed_cpu_ms" not in values:
            cells[2] = "does not resume"
        if with_many := values.get("connected_mb"):
            cells[5] += f" (+{statistics.median(with_many) - statistics.median(values['memory_mb']):.0f})"
        rows.append(row(name, cells))
    lines += ["### Connections: CPU, latency, memory", "", *table(titles, rows + gone(len(titles))), ""]
    lines += [f"![ms of CPU for a connection]({picture}-connections.svg)", ""]
    lines += [
        *prose(
            "`openssl s_server` does the same handshake and nothing else: the limit of what OpenSSL permits. What a "
            "broker has once had and given back, as dynamic-security when it read its file, it takes first for "
            "connections."
        ),
        "",
    ]

    if base := kinds.get(BASELINE):
        titles = ["broker", *(title for _, title in _RATIOS)]
        rows = [
            row(name, [ratio_cell(values.get(key), values.get(f"base_{key}", base.get(key))) for key, _ in _RATIOS])
            for name, values in kinds.items()
            if name != BASELINE
        ]
        lines += [f"### CPU, as a ratio to {BASELINE} without access control", ""]
        lines += [*prose(_RATIO), "", *table(titles, rows), ""]

    changing = {name: values for name, values in kinds.items() if values.get("stall_ms")}
    if changing:
        rows = [
            row(name, [cell(values["stall_ms"], "{:.1f}"), cell(values["quiet_ms"], "{:.1f}")])
            for name, values in changing.items()
        ]
        lines += ["### A change of rights: stalls", "", *prose(_STALL), ""]
        lines += [*table(["broker", "longest round trip at a change, ms", "without a change, ms"], rows), ""]
        lines += [f"![The longest round trip of a client while rights change]({picture}-stalls.svg)", ""]
    for name, values in kinds.items():
        if times := values.get("revoke_ms"):
            said = f"median {statistics.median(times):.1f} ms, p99 {percentile(times, 0.99):.1f} ms"
            lines.append(
                f"- From revocation to disconnect, {name}: {said}, longest {max(times):.1f} ms, {len(times)} times."
            )
    versions = list(dict.fromkeys(figures["versions"].values()))
    return [*lines, f"- Versions: {', '.join(versions)}.", ""]


def _compiling(part: Mapping[str, Any]) -> list[str]:
    figures = part["figures"]
    rows = [
        [step, f"{used['seconds']:.1f}", f"{used['cpu_seconds']:.1f}", f"{used['peak_mb']:.0f}"]
        for step, used in figures.items()
        if "cpu_seconds" in used
    ]
    one, sizes = figures["one device"], figures["sizes"]
    lines = ["## From the site's files to a store of 1,000,000 devices", ""]
    lines += [*table(["step", "wall clock, s", "CPU, s", "peak memory, MB"], rows), ""]
    parts = ""
    if "put_median_ms" in one:
        parts = f" (compiling its entry {one['compile_median_ms']} ms, storing it {one['put_median_ms']} ms)"
    said = f"""\
        One device that is known to have changed: median {one["median_ms"]} ms{parts}, worst {one["worst_ms"]} ms.
        The compiled site has {sizes["compiled_mb"]} MB, the store {sizes["store_mb"]} MB. Measured once, on
        {part["date"]}."""
    return [*lines, *prose(said), ""]


_TOKENS = """\
{rounds} rounds on {date}{scaled}. Each token is asked for on a connection of its own, by tls_client_auth: a full TLS
1.3 handshake with client certificates (P-256), then `POST /token`. Both services stand behind nginx as the role sets it
up, but for its limits of requests, and sign with ES256 a JWT that is bound to the certificate. bednet's keeps what it
knows in SQLite and cuts the scope down to the policy; oidc-provider keeps everything in its memory and has one scope.
CPU is that of nginx and the service together. The tokens a second are those of {clients} clients on the same machine,
with which the service shares its cores.
"""
_LIMIT = """\
The limit is what cannot be left out: the handshake (`openssl s_server`, {handshake:.2f} ms of CPU) and one signature
({signature:.3f} ms); its tokens a second are those of one core. The token has {size} bytes. The broker refuses the same
token with a false signature ({refused}), so it is looked at.
"""
_AGAIN = """\
A token is new to a broker once in its life, a quarter of an hour by default: when it is renewed in the session, or when
a device that cannot do that connects with it. A device that lost its connection comes back with the token that it has,
and the broker remembers which signatures it has checked. In a round connections of the three kinds are measured in
turn, {turns} times {connections} of each; the ratio is the median of those of {connections} to the {connections} of the
same turn. The limit is the connection with a certificate and the check of one signature ({verification:.3f} ms, in a
loop).
"""


def _tokens(part: Mapping[str, Any]) -> list[str]:
    scaled = f" (a quick look: {part['scale']:g} of the usual amount)" if part["scale"] != 1 else ""
    middle = statistics.median
    rows = []
    for name, values in part["services"].items():
        alone, many = values["alone_ms"], values["busy_ms"]
        cells = [cell(values["cpu_ms"], "{:.2f}"), f"{middle(alone):.1f} / {percentile(alone, 0.99):.1f}"]
        cells += [cell(values["per_s"], "{:.0f}"), f"{middle(many):.1f} / {percentile(many, 0.99):.1f}"]
        rows.append([f"**{name}**" if name.startswith("bednet") else name, *cells, cell(values["memory_mb"], "{:.0f}")])
    limit = part["limit"]
    least = [a + b for a, b in zip(limit["handshake_ms"], limit["signature_ms"], strict=True)]
    walls = [wall + middle(limit["signature_ms"]) for wall in limit["handshake_wall_ms"]]
    alone = f"{middle(walls):.1f} / {percentile(walls, 0.99):.1f}"
    rows.append(["the limit", cell(least, "{:.2f}"), alone, f"{1000 / middle(least):.0f}", "-", "-"])
    rows += [[name, "not measured", "-", "-", "-", "-"] for name in part["missing"]]
    titles = ["service", "ms CPU for a token", "one client: p50 / p99, ms"]
    titles += ["side by side: tokens/s", "p50 / p99, ms", "memory, MB"]
    lines = ["## Tokens", ""]
    said = _TOKENS.format(rounds=part["rounds"], date=part["machine"]["date"], scaled=scaled, clients=4)
    lines += [*prose(said), "", *busy(part), *table(titles, rows), ""]
    for name, why in part["missing"].items():
        lines += [*prose(f"**{name}: not measured.** {why}."), ""]
    figures = {"handshake": middle(limit["handshake_ms"]), "signature": middle(limit["signature_ms"])}
    figures["verification"] = middle(limit["verification_ms"])
    lines += [*prose(_LIMIT.format(**figures, size=part["token_bytes"], refused=part["refused"])), ""]
    without = next(iter(part["connections"].values()))
    checked = [a + b for a, b in zip(without, limit["verification_ms"], strict=True)]
    rows = [[name, cell(values, "{:.2f}"), ratio_cell(values, without)] for name, values in part["connections"].items()]
    rows.append(["the limit for a new token", cell(checked, "{:.2f}"), ratio_cell(checked, without)])
    lines += [*table(["a connection with", "broker's CPU, ms", "ratio"], rows), ""]
    return [*lines, *prose(_AGAIN.format(**figures, turns=part["turns"], connections=part["connections_in_turn"])), ""]


class Bar(NamedTuple):
    """A bar of a picture: its name, its value, and a second one that is drawn lightly below it."""

    name: str
    value: float
    second: float | None = None


def chart(title: str, bars: Sequence[Bar], legend: tuple[str, str] | None = None, form: str = "{:.1f}") -> str:
    """Return an SVG with horizontal bars on a logarithmic scale."""
    values = [value for bar in bars for value in (bar.value, bar.second) if value]
    left, right, height, top, width = 250, 110, 26, 44, 760
    tall = top + height * len(bars) + 40
    low = 10.0 ** math.floor(math.log10(max(min(values), 1e-3)))
    high = 10.0 ** math.ceil(math.log10(max(*values, low * 1.01)))

    def x(value: float) -> float:
        return left + (width - left - right) * math.log(max(value, low) / low) / math.log(high / low)

    font = 'font-family="sans-serif" font-size="13"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" {font}>',
        f'<rect width="{width}" height="{tall}" fill="white"/>',
        f'<text x="10" y="20" font-weight="bold">{escape(title)} (logarithmic)</text>',
    ]
    if legend:
        for place, (color, words) in enumerate(zip((_OTHERS, _LIGHT), legend, strict=True)):
            out.append(f'<rect x="{width - 190 + place * 95}" y="10" width="12" height="12" fill="{color}"/>')
            out.append(f'<text x="{width - 174 + place * 95}" y="21">{escape(words)}</text>')
    tick = low
    while tick <= high * 1.001:
        out.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top - 8}" y2="{tall - 30}" stroke="#ddd"/>')
        out.append(f'<text x="{x(tick):.1f}" y="{tall - 12}" text-anchor="middle" fill="#555">{tick:g}</text>')
        tick *= 10
    for number, bar in enumerate(bars):
        y = top + number * height
        color = _OURS if bar.name.startswith("bednet") else _OTHERS
        out.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(bar.name)}</text>')
        said, tall_bar = form.format(bar.value), height - 8
        if bar.second:
            light, tall_bar = "#a9cdbb" if color == _OURS else _LIGHT, tall_bar // 2
            wide = max(1.0, x(bar.second) - left)
            out.append(f'<rect x="{left}" y="{y + tall_bar}" width="{wide:.1f}" height="{tall_bar}" fill="{light}"/>')
            said += f" / {form.format(bar.second)}"
        wide = max(1.0, x(bar.value) - left)
        out.append(f'<rect x="{left}" y="{y}" width="{wide:.1f}" height="{tall_bar}" fill="{color}"/>')
        end = max(x(bar.value), x(bar.second or low))
        out.append(f'<text x="{end + 6:.1f}" y="{y + 14}">{said}</text>')
    return "\n".join([*out, "</svg>", ""])


def pictures(measured: Mapping[str, Any]) -> dict[str, str]:
    """Return SVGs by the ends of their names."""
    kinds = measured.get("brokers", {}).get("kinds", {})
    found = {}
    middle = statistics.median
    if stalls := [Bar(name, middle(values["stall_ms"])) for name, values in kinds.items() if values.get("stall_ms")]:
        found["stalls"] = chart("The longest round trip of a client while rights change, ms", stalls)
    costs = [
        Bar(name, middle(values["in0_s"]), middle(values["in1_s"]))
        for name, values in kinds.items()
        if "in0_s" in values
    ]
    if costs:
        title = "CPU seconds per 100,000 messages, fan-in"
        found["messages"] = chart(title, costs, ("QoS 0", "QoS 1"), "{:.2f}")
    handshakes = [
        Bar(
            name,
            middle(values["full_cpu_ms"]),
            middle(values["resumed_cpu_ms"]) if "resumed_cpu_ms" in values else None,
        )
        for name, values in kinds.items()
        if "full_cpu_ms" in values
    ]
    if handshakes:
        found["connections"] = chart("ms of CPU for a connection", handshakes, ("full", "resumed"), "{:.2f}")
    return found
