# SPDX-License-Identifier: Apache-2.0
"""What a generator process counted; the tallies of several processes add up.

- :class:`Tally`: the counts.
- :class:`Second`: one second of them.
- :class:`Delivery`: what was delivered of one kind.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from load.measure import Histogram

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass
class Delivery:
    """What was delivered of one kind at one QoS.

    :ivar expected: how many deliveries the schedule asked for.
    :ivar unique: how many of them happened.
    :ivar duplicates: how many more came a second time.
    :ivar disordered: how many came after a later one.
    :ivar latency: from the moment a message was due to its arrival; what was due in the warm-up is left out.
    """

    expected: int = 0
    unique: int = 0
    duplicates: int = 0
    disordered: int = 0
    latency: Histogram = field(default_factory=Histogram)

    @property
    def lost(self) -> int:
        """How many never arrived."""
        return max(0, self.expected - self.unique)


@dataclass
class Second:
    """One second of the run.

    :ivar sent: messages handed to the network.
    :ivar received: deliveries.
    :ivar connected: devices that are connected at its end.
    :ivar latency: of the deliveries that a verdict looks at.
    :ivar lag: by how much the generator itself was late.
    :ivar cpu_s: CPU time of the generator.
    """

    sent: int = 0
    received: int = 0
    connected: int = 0
    cpu_s: float = 0.0
    latency: Histogram = field(default_factory=Histogram)
    lag: Histogram = field(default_factory=Histogram)


@dataclass
class Tally:
    """Everything that was counted.

    :ivar scheduled: messages that were due, by kind.
    :ivar sent: of those, what was handed to the network or is kept for it.
    :ivar unsent: what was not: the connection was down (QoS 0), the queue full, or the generator too slow.
    :ivar acknowledged: publishes of QoS 1 and 2 that the gateway acknowledged.
    :ivar refused: what it refused though the policy grants it, by reason.
    :ivar refused_wanted: publishes to forbidden topics that were refused, as they must be.
    :ivar breaches: publishes to forbidden topics that were acknowledged as good, and deliveries of such.
    :ivar connects: first connections made.
    :ivar reconnects: connections made again.
    :ivar connect_failures: attempts that failed, by reason.
    :ivar never_connected: devices that never succeeded.
    :ivar connect: time from the moment a connection was due to CONNACK and SUBACK; `reconnect` likewise, after a cut.
    :ivar lost_connections: by reason, connections that broke and were not cut on purpose.
    :ivar renewals: tokens that were renewed in the session; `renewal` from when that was due until it was done,
        `renewal_failures` those that were not, by reason.
    :ivar cut: connections that broke on purpose: cut by the device, or by a restart of the broker.
    :ivar broken_at_ns: when the first of them broke, and `back_at_ns` when the last was back (0: not all are), by the
        reference clock of the run.
    :ivar foreign: messages that were not of this run.
    :ivar broker_before: what the broker told of itself under $SYS when somebody who may hear it had subscribed;
        `broker_after` what it told last.
    :ivar clock_error_ms: by how much a latency from one generator's machine to another's may be wrong, at most.
    :ivar busiest: the largest share of a core that one process used, from 0 to 1.
    :ivar wanting: the largest share of the time in which one process used a core or waited for one, from 0 to 1.
    :ivar cpu_s: CPU time of all processes while they kept the schedule; `busy_s` how long they did.
    :ivar deliveries: by kind and QoS, such as ("telemetry", 1).
    :ivar tls: by version and cipher, how many connections.
    :ivar seconds: from the start of the schedule.
    """

    scheduled: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    unsent: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    refused_wanted: int = 0
    breaches: int = 0
    connects: int = 0
    reconnects: int = 0
    connect_failures: Counter[str] = field(default_factory=Counter)
    never_connected: int = 0
    connect: Histogram = field(default_factory=Histogram)
    reconnect: Histogram = field(default_factory=Histogram)
    subscribe_refusals: Counter[str] = field(default_factory=Counter)
    lost_connections: Counter[str] = field(default_factory=Counter)
    renewals: int = 0
    renewal: Histogram = field(default_factory=Histogram)
    renewal_failures: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    broken_at_ns: int = 0
    back_at_ns: int = 0
    foreign: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    tls: Counter[str] = field(default_factory=Counter)
    lag: Histogram = field(default_factory=Histogram)
    clock_error_ms: float = 0.0
    busiest: float = 0.0
    wanting: float = 0.0
    cpu_s: float = 0.0
    busy_s: float = 0.0
    processes: int = 1
    broker_before: dict[str, str] = field(default_factory=dict)
    broker_after: dict[str, str] = field(default_factory=dict)
    deliveries: dict[tuple[str, int], Delivery] = field(default_factory=dict)
    seconds: list[Second] = field(default_factory=list)

    @property
    def all_back_ms(self) -> float | None:
        """From the first connection that broke on purpose until all were back; None where they never were."""
        return (self.back_at_ns - self.broken_at_ns) / 1e6 if self.broken_at_ns and self.back_at_ns else None

    @property
    def wall_s(self) -> float:
        """How long the load lasted; the time of each process is in `busy_s`."""
        return self.busy_s / self.processes

    def delivery(self, kind: str, qos: int) -> Delivery:
        """Return the counts of one kind and QoS."""
        found = self.deliveries.get((kind, qos))
        if found is None:
            found = self.deliveries[kind, qos] = Delivery()
        return found

    def second(self, number: int) -> Second:
        """Return one second, counted from 0."""
        while len(self.seconds) <= number:
            self.seconds.append(Second())
        return self.seconds[number]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        plain = {name: _plain(value) for name, value in vars(self).items() if name not in ("deliveries", "seconds")}
        plain["deliveries"] = [
            {"kind": kind, "qos": qos, **{name: _plain(value) for name, value in vars(delivery).items()}}
            for (kind, qos), delivery in sorted(self.deliveries.items())
        ]
        plain["seconds"] = [{name: _plain(value) for name, value in vars(second).items()} for second in self.seconds]
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tally:
        """Return what :meth:`to_json` told."""
        tally = cls()
        for name, value in data.items():
            if name not in ("deliveries", "seconds"):
                setattr(tally, name, _lively(getattr(tally, name), value))
        for entry in data["deliveries"]:
            delivery = tally.delivery(entry["kind"], entry["qos"])
            for name in vars(delivery):
                setattr(delivery, name, _lively(getattr(delivery, name), entry[name]))
        for entry in data["seconds"]:
            tally.seconds.append(Second(**{n: _lively(v, entry[n]) for n, v in vars(Second()).items()}))
        return tally

    def merge(self, other: Tally) -> None:
        """Take in what another process counted in the same run."""
        broken = [at for at in (self.broken_at_ns, other.broken_at_ns) if at]
        # Who had no connection cannot say that all are back, and need not.
        back = [tally.back_at_ns for tally in (self, other) if tally.broken_at_ns]
        latest = max(back) if back and all(back) else 0
        busiest, error = max(self.busiest, other.busiest), max(self.clock_error_ms, other.clock_error_ms)
        wanting = max(self.wanting, other.wanting)
        for name, value in vars(other).items():
            if name not in ("deliveries", "seconds"):
                setattr(self, name, _sum(getattr(self, name), value))
        for (kind, qos), theirs in other.deliveries.items():
            ours = self.delivery(kind, qos)
            for name, value in vars(theirs).items():
                setattr(ours, name, _sum(getattr(ours, name), value))
        for number, second in enumerate(other.seconds):
            mine = self.second(number)
            for name, value in vars(second).items():
                setattr(mine, name, _sum(getattr(mine, name), value))
        self.busiest, self.wanting, self.clock_error_ms = busiest, wanting, error
        self.broken_at_ns, self.back_at_ns = min(broken, default=0), latest


def _plain(value: Any) -> Any:
    return value.to_json() if isinstance(value, Histogram) else dict(value) if isinstance(value, Counter) else value


def _lively(like: Any, value: Any) -> Any:
    if isinstance(like, Histogram):
        return Histogram.from_json(value)
    return Counter(value) if isinstance(like, Counter) else value


def _sum(mine: Any, theirs: Any) -> Any:
    if isinstance(mine, Histogram):
        mine.merge(theirs)
        return mine
    if isinstance(mine, dict) and not isinstance(mine, Counter):
        return {**mine, **theirs}
    return mine + theirs
