# SPDX-License-Identifier: Apache-2.0
"""How far the monotonic clocks of several machines are apart, and how well that is known.

- :class:`Echo`: one question and its answer; :func:`estimate`: what the best of them say.
- :class:`Clock`: another machine's clock before and after the run; :func:`error_ms`: what that means for a latency.

As in NTP (RFC 5905, 8): who asks at t0 and has the answer at t1 knows that the other clock showed `at` between the two,
so the middle is wrong by half of the way there and back at most. The fastest answer says it best.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

#: How often each machine is asked, before and after.
ROUNDS = 25


@dataclass(frozen=True)
class Echo:
    """A question that was asked and answered: our clock before and after, and theirs, in nanoseconds."""

    asked_ns: int
    at_ns: int
    answered_ns: int


def estimate(echoes: Sequence[Echo]) -> tuple[int, int]:
    """Return by how much the other clock is ahead, and the error of that at most, in nanoseconds.

    :param echoes: one at least.
    """
    best = min(echoes, key=lambda echo: echo.answered_ns - echo.asked_ns)
    half = (best.answered_ns - best.asked_ns + 1) // 2
    return best.at_ns - (best.asked_ns + best.answered_ns) // 2, half


@dataclass(frozen=True)
class Clock:
    """A generator machine's clock, against that of the machine that leads the run.

    :ivar ahead_ns: by how much it was ahead before the run, `error_ns` by how much that may be wrong.
    :ivar drift_ns: by how much more it was ahead after the run; None where it could not be asked any more.
    """

    host: str
    clock: int
    ahead_ns: int
    error_ns: int
    drift_ns: int | None = None

    @property
    def bound_ns(self) -> int:
        """How far what was taken for its time may have been from the truth, at any moment of the run."""
        return self.error_ns + abs(self.drift_ns or 0)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Clock:
        """Return what :meth:`to_json` told."""
        return cls(**data)


def error_ms(clocks: Iterable[Clock]) -> float:
    """Return by how much a latency from one of the machines to another may be wrong, at most."""
    bounds = sorted((clock.bound_ns for clock in clocks), reverse=True)
    return sum(bounds[:2]) / 1e6


def ahead_of(own: int, clocks: Iterable[Clock]) -> dict[int, int]:
    """Return by how many nanoseconds each clock is ahead of one of them, by their ids.

    :param own: the id of that one.
    """
    known = {clock.clock: clock.ahead_ns for clock in clocks}
    mine = known.get(own, 0)
    return {own: 0, **{clock: ahead - mine for clock, ahead in known.items()}}
