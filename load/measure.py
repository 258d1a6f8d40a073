# SPDX-License-Identifier: Apache-2.0
"""What a load run measures.

- :func:`stamp`, :func:`read_stamp`: the head of every payload: run, clock, stream, number, and when it was due.
- :class:`Histogram`: durations, within 1.6 %, in constant memory; histograms of several processes add up.
- :class:`Ledger`: what one receiver has heard of one stream: lost, twice, out of order.

All moments are nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share; how far the clocks of several
machines are apart is measured (:mod:`load.clocks`). A latency is counted from the
moment a message was due, not from when the generator came round to sending it: a slow broker, or generator, cannot hide
the messages that had to wait (coordinated omission).
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_HEAD = struct.Struct("!4sIIIQQ")
_MAGIC = b"bnL1"
#: The smallest payload, in bytes.
HEAD_BYTES = _HEAD.size

# 64 steps for each power of two.
_STEPS_BITS = 6
_STEPS = 1 << _STEPS_BITS


class Stamp(NamedTuple):
    """The head of a payload.

    :ivar run: the run it belongs to.
    :ivar clock: whose clock `due_ns` is told by (:func:`clock_id`).
    :ivar stream: the number of the stream: one device's messages to one topic.
    :ivar number: its number within the stream, from 1.
    :ivar due_ns: when it was to be sent.
    """

    run: int
    clock: int
    stream: int
    number: int
    due_ns: int


def clock_id() -> int:
    """Return what tells this process's monotonic clock from others: it begins anew with each boot.

    Containers of a machine have its clock, but for those with a time namespace of their own (time_namespaces(7)).
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    try:
        namespace = Path("/proc/self/ns/time").readlink().name
    except OSError:
        namespace = ""
    return zlib.crc32(boot + namespace.encode())


def stamp(head: Stamp, padding: bytes = b"") -> bytes:
    """Return a payload: the head, and what brings it to its size."""
    return _HEAD.pack(_MAGIC, *head) + padding


def stamped(run: int, clock: int, stream: int, number: int, due_ns: int, padding: bytes) -> bytes:  # noqa: PLR0917
    """Return what :func:`stamp` does, without making an object for it first."""
    return _HEAD.pack(_MAGIC, run, clock, stream, number, due_ns) + padding


def read_stamp(payload: bytes | bytearray) -> Stamp | None:
    """Return the head of a payload; None where it is nobody's of ours."""
    if len(payload) < HEAD_BYTES:
        return None
    magic, *rest = _HEAD.unpack_from(payload)
    return Stamp(*rest) if magic == _MAGIC else None


class Histogram:
    """Counts durations in steps of at most 1.6 %.

    :ivar count: how many there are.
    :ivar total_us: their sum, in microseconds.
    :ivar max_us: the longest, in microseconds.
    """

    __slots__ = ("_counts", "count", "max_us", "total_us")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count = 0
        self.total_us = 0
        self.max_us = 0

    def add(self, nanoseconds: int) -> None:
        """Count a duration; a negative one counts as none."""
        us = nanoseconds // 1000
        us = max(us, 0)
        self.count += 1
        self.total_us += us
        self.max_us = max(self.max_us, us)
        index = us
        if us >= _STEPS:
            shift = us.bit_length() - _STEPS_BITS - 1
            index = (shift << _STEPS_BITS) + (us >> shift)
        counts = self._counts
        counts[index] = counts.get(index, 0) + 1

    def percentile_ms(self, percent: float) -> float | None:
        """Return the duration, in milliseconds, that so many percent do not exceed; None where there is none.

        It is never less than the true one, and at most 1.6 % more.
        """
        if not self.count:
            return None
        rank = max(1, -(-self.count * percent // 100))
        seen = 0
        for index in sorted(self._counts):
            seen += self._counts[index]
            if seen >= rank:
                return min(_upper_us(index), self.max_us) / 1000
        return self.max_us / 1000

    def merge(self, other: Histogram) -> None:
        """Take in what another one counted."""
        for index, count in other._counts.items():
            self._counts[index] = self._counts.get(index, 0) + count
        self.count += other.count
        self.total_us += other.total_us
        self.max_us = max(self.max_us, other.max_us)

    def take(self) -> Histogram:
        """Return what was counted so far, and begin anew."""
        taken = Histogram()
        taken._counts, taken.count, taken.total_us, taken.max_us = self._counts, self.count, self.total_us, self.max_us
        self._counts, self.count, self.total_us, self.max_us = {}, 0, 0, 0
        return taken

    def steps_ms(self) -> list[tuple[float, int]]:
        """Return the steps, each with its upper end in milliseconds and how many fell into it."""
        return [(_upper_us(index) / 1000, self._counts[index]) for index in sorted(self._counts)]

    def to_json(self) -> dict[str, object]:
        """Return it as plain data."""
        counts = [[index, self._counts[index]] for index in sorted(self._counts)]
        return {"count": self.count, "total_us": self.total_us, "max_us": self.max_us, "counts": counts}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Histogram:
        """Return what :meth:`to_json` told."""
        made = cls()
        counts = data["counts"]
        assert isinstance(counts, list)
        made._counts = {int(index): int(count) for index, count in counts}
        made.count, made.total_us, made.max_us = (int(str(data[key])) for key in ("count", "total_us", "max_us"))
        return made


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """Return one histogram of all."""
    whole = Histogram()
    for histogram in histograms:
        whole.merge(histogram)
    return whole


def _upper_us(index: int) -> int:
    shift = (index >> _STEPS_BITS) - 1
    if shift <= 0:
        return index
    return (((index & (_STEPS - 1)) + _STEPS + 1) << shift) - 1


class Ledger:
    """What one receiver has heard of one stream.

    :ivar unique: how many different messages.
    :ivar duplicates: how many came again.
    :ivar disordered: how many came after one with a higher number.
    """

    __slots__ = ("_last", "_open", "disordered", "duplicates", "unique")

    def __init__(self) -> None:
        self.unique = 0
        self.duplicates = 0
        self.disordered = 0
        self._last = 0
        self._open: set[int] = set()

    def hear(self, number: int) -> bool:
        """Take a message into account; numbers begin with 1. Returns whether it is heard for the first time."""
        last = self._last
        if number == last + 1:
            self._last = number
        elif number > last:
            self._open.update(range(last + 1, number))
            self._last = number
        elif number in self._open:
            self._open.discard(number)
            self.disordered += 1
        else:
            self.duplicates += 1
            return False
        self.unique += 1
        return True
