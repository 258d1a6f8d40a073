# SPDX-License-Identifier: Apache-2.0
"""When and from where: what a rule may be tied to.

- :class:`Moment`: a time and an address, either of which may be unknown.
- :class:`Window`: hours of certain days on the clocks of a time zone.
- :func:`parse_instant`: a date and time as RFC 3339 writes them.

What is unknown stays unknown: conditions answer True, False or None, and ``all_of`` and ``any_of`` join such answers
by Kleene's logic, so that a condition counts as decided only when no completion of the moment could turn it.
"""

from __future__ import annotations

import datetime as dt
import functools
import itertools
import re
import zoneinfo
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
EVERY_DAY = frozenset(range(7))
DAY_SECONDS = 86400

_INSTANT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def parse_instant(text: str) -> dt.datetime:
    """Return the instant of ``2026-03-29T02:30:00+01:00`` as UTC (RFC 3339, 5.6).

    :raises ValueError: when `text` is no such date and time, when its offset is missing, or for a leap second.
    """
    match = _INSTANT.fullmatch(text)
    if match is None:
        raise ValueError("not a date and time of RFC 3339 with an offset")
    # Beyond microseconds nothing here tells times apart.
    fraction = (match[1] or "")[:7]
    zone = "+00:00" if match[2] in "Zz" else match[2]
    return dt.datetime.fromisoformat(
        f"{text[:10]}T{text[11:19]}{fraction.ljust(7, '0') if fraction else ''}{zone}"
    ).astimezone(dt.UTC)


def instant_text(at: dt.datetime) -> str:
    """Return an instant as RFC 3339 writes it, in UTC."""
    form = "%Y-%m-%dT%H:%M:%SZ" if at.microsecond == 0 else "%Y-%m-%dT%H:%M:%S.%fZ"
    return at.astimezone(dt.UTC).strftime(form)


@dataclass(frozen=True, slots=True)
class Moment:
    """A time and an address.

    :ivar at: aware; None when it may be any time.
    :ivar address: the peer's; None when it may be any, or none at all, as that of a session without a connection.
    :raises ValueError: when `at` is not aware.
    """

    at: dt.datetime | None = None
    address: Address | None = None

    def __post_init__(self) -> None:
        if self.at is not None and self.at.tzinfo is None:
            raise ValueError("a moment's time needs a time zone")


UNKNOWN = Moment()
"""Any time, any address."""


def all_of(answers: Iterable[bool | None]) -> bool | None:
    """Join answers by 'and': False wins, then None."""
    joined: bool | None = True
    for answer in answers:
        if answer is False:
            return False
        if answer is None:
            joined = None
    return joined


def any_of(answers: Iterable[bool | None]) -> bool | None:
    """Join answers by 'or': True wins, then None."""
    joined: bool | None = False
    for answer in answers:
        if answer is True:
            return True
        if answer is None:
            joined = None
    return joined


@functools.cache
def _zone(name: str) -> zoneinfo.ZoneInfo:
    return zoneinfo.ZoneInfo(name)


@dataclass(frozen=True, slots=True)
class Window:
    """Hours of certain days, on the clocks of a zone.

    The clocks decide, and nothing else: hours that they skip do not happen, hours that they show twice count twice.

    :ivar days: on which it begins; 0 is Monday.
    :ivar start: seconds since midnight, the first that is within.
    :ivar end: seconds since midnight, the first that is not; 86400 is the end of the day. When it is not after
        `start`, the window runs past midnight and belongs to the day on which it began.
    :ivar zone: an IANA name.
    """

    days: frozenset[int]
    start: int
    end: int
    zone: str

    @property
    def always(self) -> bool:
        """True when it never closes."""
        return self.days == EVERY_DAY and (self.start == self.end or (self.start, self.end) == (0, DAY_SECONDS))

    def holds(self, at: dt.datetime) -> bool:
        """Say whether an aware `at` is within."""
        local = at.astimezone(_zone(self.zone))
        day = local.weekday()
        second = local.hour * 3600 + local.minute * 60 + local.second
        if self.start < self.end:
            return day in self.days and self.start <= second < self.end
        return (day in self.days and second >= self.start) or ((day - 1) % 7 in self.days and second < self.end)

    def next_change(self, at: dt.datetime, *, days: int = 16) -> dt.datetime | None:
        """Return the first instant after `at` when it opens or closes; None when that is not within `days` days.

        Sixteen days are enough for a weekly window whose hour the clocks skip once.
        """
        now = self.holds(at)
        for candidate in self.edges(at, days):
            if self.holds(candidate) is not now:
                return candidate
        return None

    def edges(self, at: dt.datetime, days: int) -> list[dt.datetime]:
        """List the instants of the next `days` days when the answer may change: on the clock, and with the clock."""
        zone = _zone(self.zone)
        first = at.astimezone(zone).date()
        edges: set[dt.datetime] = set()
        for number in range(-1, days + 1):
            midnight = dt.datetime.combine(first, dt.time()) + dt.timedelta(days=number)
            for second in (0, self.start, self.end):
                wall = midnight + dt.timedelta(seconds=second)
                edges |= {wall.replace(tzinfo=zone, fold=fold).astimezone(dt.UTC) for fold in (0, 1)}
        steps = [at.astimezone(dt.UTC) + dt.timedelta(hours=6 * number) for number in range(4 * days + 1)]
        for low, high in itertools.pairwise(steps):
            if low.astimezone(zone).utcoffset() != high.astimezone(zone).utcoffset():
                edges.add(self._transition(low, high))
        return sorted(edge for edge in edges if at < edge <= steps[-1])

    def _transition(self, low: dt.datetime, high: dt.datetime) -> dt.datetime:
        zone = _zone(self.zone)
        before = low.astimezone(zone).utcoffset()
        while high - low > dt.timedelta(seconds=1):
            middle = low + (high - low) / 2
            low, high = (middle, high) if middle.astimezone(zone).utcoffset() == before else (low, middle)
        return high.replace(microsecond=0)

    def __str__(self) -> str:
        names = [DAYS[day] for day in sorted(self.days)]
        first, last = min(self.days), max(self.days)
        if self.days == EVERY_DAY:
            days = "every day"
        elif len(names) > 2 and last - first == len(names) - 1:  # noqa: PLR2004 - "mon-tue" is no shorter
            days = f"{DAYS[first]}-{DAYS[last]}"
        else:
            days = ", ".join(names)
        hours = "" if (self.start, self.end) == (0, DAY_SECONDS) else f" {clock(self.start)}-{clock(self.end)}"
        return f"{days}{hours} {self.zone}"


def clock(second: int) -> str:
    """Return seconds since midnight as ``06:00``, with seconds only when there are any."""
    hours, rest = divmod(second, 3600)
    text = f"{hours:02}:{rest // 60:02}"
    return f"{text}:{rest % 60:02}" if rest % 60 else text


def within(address: Address, network: Network) -> bool:
    """Say whether an address is in a network; ``::ffff:10.0.0.1`` (RFC 4291, 2.5.5.2) is 10.0.0.1."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.version == network.version and address in network
