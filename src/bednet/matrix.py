# SPDX-License-Identifier: Apache-2.0
"""Who may do what, at one glance.

- :func:`matrix_of`: makes a :class:`Matrix` of a site.
- :class:`Matrix`: topics against devices, as text and as a picture.

The topics are those of the rules, with ``+`` in place of placeholders, and those of the policy's tests. Devices that
may do the same share a column; whoever can make no difference to the answer is not even asked, so that the size of a
site does not matter.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from bednet import topics
from bednet.issuers import ROLE_PROFILE
from bednet.policy import Access, Grant, Verdict, decide_filter, fill_in, placeholders

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bednet.devices import Device
    from bednet.moment import Moment
    from bednet.site import Site

COLUMNS = 20
"""How many columns of devices a table on the terminal has; further ones follow below it."""

_SHOWN = 3
_LEGEND = "P publish, S subscribe, small: a part of it, *: depends on time or address, dot: neither"


@dataclass(frozen=True)
class Answer:
    """How much of a topic filter is allowed: 0 nothing, 1 a part, 2 all.

    :ivar sure: at every moment that is asked about.
    :ivar possible: at the best of them.
    """

    sure: int
    possible: int

    def letter(self, full: str) -> str:
        """Return the answer as one letter, with a star when it depends on the moment."""
        if self.possible == 0:
            return ""
        return (full if self.possible == 2 else full.lower()) + ("*" if self.sure != self.possible else "")  # noqa: PLR2004 - see the class


Column = tuple[tuple[Answer, Answer], ...]


@dataclass(frozen=True)
class Matrix:
    """Topics against groups of devices.

    :ivar groups: the devices of each column; the first of them are named.
    :ivar columns: for each group, the answers for publish and subscribe, in the order of `topics`.
    """

    title: str
    topics: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    columns: tuple[Column, ...]

    def text(self) -> str:
        """Return a table for a terminal, with a line end."""
        number_width = len(str(len(self.groups)))
        lines = [self.title, ""]
        lines += [f"{number:>{number_width}}  {_few(ids)}" for number, ids in enumerate(self.groups, start=1)]
        width = max([len(topic) for topic in self.topics], default=0)
        for start in range(0, len(self.groups), COLUMNS):
            shown = range(start, min(start + COLUMNS, len(self.groups)))
            lines += ["", "  ".join([" " * width, *(f"{number + 1:<4}" for number in shown)]).rstrip()]
            for row, topic in enumerate(self.topics):
                cells = [_cell(self.columns[number][row]) for number in shown]
                lines.append("  ".join([f"{topic:<{width}}", *(f"{cell:<4}" for cell in cells)]).rstrip())
        return "\n".join([*lines, "", _LEGEND]) + "\n"

    def svg(self) -> str:
        """Return a picture: a row for each topic, a column for each group, publish on the left of a cell."""
        return _svg(self)


def _few(ids: tuple[str, ...], most: int = _SHOWN) -> str:
    shown = ", ".join(ids[:most])
    return shown if len(ids) <= most else f"{shown} and {len(ids) - most} more"


def _cell(answers: tuple[Answer, Answer]) -> str:
    publish, subscribe = answers
    return publish.letter("P") + subscribe.letter("S") or "."


def matrix_of(site: Site, moment: Moment) -> Matrix:
    """Return who may do what at a moment; what the moment leaves open is marked."""
    wanted = _topics(site)
    text = "\n".join(wanted)
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    names = {
        key: sorted({name for rule in rules for name in placeholders(rule.template)})
        for key, rules in site.profiles.items()
    }
    for device_id, device in site.devices.items():
        key = site.profile_of[device_id]
        if _out(device, moment):
            alike[(None,)].append(device_id)
            continue
        # A value that none of the topics mentions can make no difference.
        values = (value if (value := str(device.value(name))) in text else None for name in names[key])
        alike[key, *values].append(device_id)
    columns: dict[Column, list[str]] = defaultdict(list)
    order = {device_id: number for number, device_id in enumerate(site.devices)}
    for signature, ids in alike.items():
        grants = () if signature == (None,) else site.grants[ids[0]]
        columns[_column(grants, wanted, moment)].extend(ids)
    for issuer in site.issuers.values():
        for value, role in issuer.roles.items():
            # What a token says is not known: what stands for it is no word of a topic.
            given = tuple(
                Grant(rule, fill_in(rule.template, {name: f"<{name}>" for name in placeholders(rule.template)}))
                for rule in site.role_profiles[f"{ROLE_PROFILE}{role}"]
            )
            name = f"{issuer.prefix}.. with {value!r} of {issuer.name}"
            order[name] = len(order)
            columns[_column(given, wanted, moment)].append(name)
    for ids in columns.values():
        ids.sort(key=order.__getitem__)
    return Matrix(
        title=f"{site.folder}: who may do what"
        + (f", at {moment.at.isoformat()}" if moment.at is not None else "")
        + (f", from {moment.address}" if moment.address is not None else ""),
        topics=tuple(wanted),
        groups=tuple(tuple(ids) for ids in columns.values()),
        columns=tuple(columns),
    )


def _out(device: Device, moment: Moment) -> bool:
    ended = device.until is not None and moment.at is not None and moment.at >= device.until
    return ended or device.revoked is not None


def _topics(site: Site) -> list[str]:
    found = {
        "/".join("+" if placeholders(level) else level for level in rule.template.split("/"))
        for rules in (*site.profiles.values(), *site.role_profiles.values())
        for rule in rules
    }
    found |= {topics.unshare(test.topic) for test in site.tests}
    return sorted(found, key=lambda topic: topic.split("/"))


def _column(grants: Iterable[Grant], wanted: Iterable[str], moment: Moment) -> Column:
    grants = tuple(grants)

    def ask(access: Access, topic: str) -> Answer:
        levels = []
        for generous in (False, True):
            decision = decide_filter(grants, access, topic, moment, generous=generous)
            levels.append(2 if decision.allowed else 1 if decision.verdict is Verdict.PARTLY else 0)
        return Answer(levels[0], levels[1])

    return tuple((ask(Access.PUBLISH, topic), ask(Access.SUBSCRIBE, topic)) for topic in wanted)


# The picture

_WIDTH, _HEIGHT = 34, 22
_PUBLISH, _SUBSCRIBE = "#b45309", "#1d4ed8"
_STYLE = """\
text { font: 12px ui-monospace, "DejaVu Sans Mono", monospace; fill: #111827; }
.head { font-weight: bold; font-size: 14px; }
.grid { stroke: #e5e7eb; stroke-width: 1; }
"""


_HATCH = """\
<defs><pattern id="part" width="4" height="4" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<rect width="2" height="4" fill="#ffffff" fill-opacity="0.8"/></pattern></defs>"""


def _svg(matrix: Matrix) -> str:
    left = 16 + 7.4 * max([len(topic) for topic in matrix.topics], default=0)
    names = [_few(ids, 1) for ids in matrix.groups]
    slope = 0.7  # of the headings: sine and cosine of 45 degrees, near enough
    rise = 7.4 * slope * max([len(name) for name in names], default=0)
    top = 60 + rise
    width = max(left + _WIDTH * len(names) + rise + 24, 700)
    height = top + _HEIGHT * len(matrix.topics) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">',
        f"<title>{escape(matrix.title)}</title>",
        f"<style>\n{_STYLE}</style>",
        _HATCH,
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text class="head" x="12" y="24">{escape(matrix.title)}</text>',
    ]
    for number, name in enumerate(names):
        x, y = left + _WIDTH * (number + 0.5), top - 8
        parts.append(f'<text transform="translate({x:.0f} {y:.0f}) rotate(-45)">{escape(name)}</text>')
    for row, topic in enumerate(matrix.topics):
        y = top + _HEIGHT * row
        parts.append(
            f'<line class="grid" x1="12" y1="{y:.0f}" x2="{left + _WIDTH * len(names):.0f}" y2="{y:.0f}"/>'
            f'<text x="12" y="{y + 15:.0f}">{escape(topic)}</text>'
        )
        for number, column in enumerate(matrix.columns):
            x = left + _WIDTH * number
            what = f"{names[number]}: {topic}"
            parts += _half(column[row][0], x + 3, y + 3, _PUBLISH, f"{what}: publish")
            parts += _half(column[row][1], x + 18, y + 3, _SUBSCRIBE, f"{what}: subscribe")
    x, y = 12.0, top + _HEIGHT * len(matrix.topics) + 30
    for answer, colour, label in (
        (Answer(2, 2), _PUBLISH, "publish"),
        (Answer(2, 2), _SUBSCRIBE, "subscribe"),
        (Answer(1, 1), _SUBSCRIBE, "a part of it"),
        (Answer(0, 2), _SUBSCRIBE, "depends on time or address"),
    ):
        parts += _half(answer, x, y - 12, colour, label)
        parts.append(f'<text x="{x + 20:.0f}" y="{y:.0f}">{label}</text>')
        x += 48 + 7.4 * len(label)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _half(answer: Answer, x: float, y: float, colour: str, title: str) -> list[str]:
    """Draw one half of a cell: filled for all, hatched for a part, an outline where it depends on the moment."""
    if answer.possible == 0:
        return []
    box = f'x="{x:.0f}" y="{y:.0f}" width="13" height="16" rx="2"'
    extent = "all" if answer.possible == 2 else "a part"  # noqa: PLR2004 - see Answer
    depends = answer.sure != answer.possible
    title = escape(f"{title} {extent}" + (", depends on time or address" if depends else ""))
    fill = (
        f'fill="{colour}"'
        if not depends
        else f'fill="{colour}" fill-opacity="0.15" stroke="{colour}" stroke-dasharray="3 2"'
    )
    parts = [f"<rect {box} {fill}><title>{title}</title></rect>"]
    if answer.possible == 1:
        parts.append(f'<rect {box} fill="url(#part)" pointer-events="none"/>')
    return parts
