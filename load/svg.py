# SPDX-License-Identifier: Apache-2.0
"""Line charts as SVG, for a page that needs nothing else.

- :func:`chart`: a chart of several lines. :class:`Line`: one of them.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_WIDTH, _HEIGHT = 900, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 10, 30, 30
_TICKS = 5


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    :ivar colour: a, b, c or d, which the page's style sheet defines.
    :ivar points: x and y; the line is broken where y is None.
    """

    name: str
    colour: str
    points: Sequence[tuple[float, float | None]]


def chart(title: str, lines: Sequence[Line], *, logarithmic: bool = False) -> str:
    """Return a chart; x is seconds (or percent), y begins at 0 or is logarithmic."""
    values = [y for line in lines for _, y in line.points if y is not None]
    right = max((x for line in lines for x, _ in line.points), default=1.0) or 1.0
    top = max(values, default=1.0) or 1.0
    if logarithmic:
        low = math.floor(math.log10(max(min((v for v in values if v > 0), default=0.1), 0.001)))
        high = max(math.ceil(math.log10(top)), low + 1)
        ticks = [10.0**power for power in range(low, high + 1)]
    else:
        step = _nice(top / _TICKS)
        ticks = [step * number for number in range(math.ceil(top / step) + 1)]
        low = high = 0
    across = _WIDTH - _LEFT - _RIGHT
    down = _HEIGHT - _TOP - _BOTTOM

    def place_x(value: float) -> float:
        return _LEFT + across * value / right

    def place_y(value: float) -> float:
        share = (math.log10(max(value, 10.0**low)) - low) / (high - low) if logarithmic else value / ticks[-1]
        return _TOP + down * (1 - share)

    shown = html.escape(title)
    parts = [
        f"<figure><figcaption>{shown}</figcaption>",
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{shown}" font-size="12" fill="var(--dim)">',
    ]
    for tick in ticks:
        y = place_y(tick)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:,g}</text>'
        )
    step = _nice(right / 8)
    for number in range(int(right / step) + 1):
        x = place_x(step * number)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{step * number:g}</text>')
    at = _LEFT
    for line in lines:
        parts += [
            f'<polyline fill="none" stroke="var(--{line.colour})" stroke-width="1.6" points="'
            + " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in piece)
            + '"/>'
            for piece in _pieces(line)
        ]
        parts.append(
            f'<rect x="{at}" y="9" width="12" height="3" fill="var(--{line.colour})"/>'
            f'<text x="{at + 17}" y="14">{html.escape(line.name)}</text>'
        )
        at += 40 + 7 * len(line.name)
    return "".join([*parts, "</svg></figure>"])


def _pieces(line: Line) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in line.points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    # A single point is drawn as a dash.
    return [piece if len(piece) > 1 else [piece[0], (piece[0][0] + 0.3, piece[0][1])] for piece in pieces if piece]


def _nice(step: float) -> float:
    """Return the next larger step out of 1, 2, 5, 10 ..."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next((power * factor for factor in (1, 2, 5) if power * factor >= step), power * 10)
