# SPDX-License-Identifier: Apache-2.0
"""Measures brokers in interleaved rounds: ``python -m load.bench.rounds`` prints JSON.

All brokers run side by side, and all but the one that is measured idle. In each round each thing is measured of all of
them, one right after the other, in an order of its own: what else the machine does then meets all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from load.bench import others
from load.bench.brokers import (
    ACL_FILE,
    BEDNET,
    DYNAMIC_SECURITY,
    OPEN,
    OPENSSL,
    PLAINTEXT,
    Broker,
    Mosquitto,
    Server,
)
from load.bench.measure import Crowd, connects, half_load, latency, memory, revocations, stall
from load.bench.stage import Kind, Programs, Stage
from load.bench.wire import WireError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence

KINDS = (
    Kind(PLAINTEXT),
    Kind(OPEN),
    Kind(ACL_FILE, 10_000),
    Kind(DYNAMIC_SECURITY, 10_000),
    Kind(DYNAMIC_SECURITY, 50_000),
    Kind(BEDNET, 10_000),
    Kind(BEDNET, 1_000_000),
    *map(Kind, others.CLASSES),
    Kind(OPENSSL),
)
#: How long a kind of message is measured in a round, in seconds.
SLICE_S = 0.12
#: How often in a round messages through ours are measured, and beside each time those through what it is compared with.
PAIRS = 3
HANDSHAKES = 12
PACED_ROUNDS, PACED_S = 3, 0.8
STALL_ROUNDS = 3
CONNECTIONS = 1000
REVOCATIONS, REVOKED_UNDER_PER_S = 300, 2000
_FILES = 65_536

Results = dict[str, dict[str, list[float]]]


_BEGIN = time.monotonic()


def say(text: str) -> None:
    """Tell on standard error how far it is, and after how long."""
    sys.stderr.write(f"{time.monotonic() - _BEGIN:6.1f} s  {text}\n")
    sys.stderr.flush()


def make(stage: Stage, kind: Kind) -> Broker:
    """Return a broker of a kind, not yet started."""
    if kind.name in others.CLASSES:
        return others.CLASSES[kind.name](stage, kind)
    return Server(stage, kind) if kind.name == OPENSSL else Mosquitto(stage, kind)


class Bench:
    """Brokers that run side by side, and what was measured of them.

    :ivar results: kind -> what -> a value for each round.
    :ivar missing: kind -> why it is not there.
    :ivar failed: kind -> why it was not measured to the end.
    """

    def __init__(
        self,
        stack: contextlib.ExitStack,
        optional: Callable[[Kind], bool],
        base: str = "",
        paired: Callable[[str], bool] = lambda _: False,
        pairs: int = 1,
    ) -> None:
        """Begin with none.

        :param optional: whether the run goes on without a broker of a kind.
        :param base: what others are compared with.
        :param paired: whether the base is measured once more right beside one, as ``base_...``: for small differences.
        :param pairs: how often that is done in a round, of messages.
        """
        self._stack, self._optional = stack, optional
        self._base, self._paired, self._pairs = base, paired, pairs
        self._brokers: dict[str, Broker] = {}
        self._crowds: dict[str, Crowd] = {}
        self.results: Results = {}
        self.versions: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    @contextlib.contextmanager
    def bearing(self, kind: Kind) -> Iterator[None]:
        """Leave a broker out that fails, where it may; what was measured of it before stays."""
        try:
            yield
        except (OSError, WireError) as error:
            if not self._optional(kind):
                raise
            name = str(kind)
            broker = self._brokers.pop(name, None)
            self._crowds.pop(name, None)
            why = f"{type(error).__name__}: {error}"
            if broker and (rc := broker.process.poll()) is not None:
                why = f"it ended with {rc}. {broker.log()}"
            say(f"{name} is left out: {why}")
            where = self.failed if self.results.get(name, {}).get("in0_s") else self.missing
            where[name] = " ".join(why.split())[:200]
            if name in self.missing:
                self.results.pop(name, None)
                self.versions.pop(name, None)

    def start(self, broker: Broker, *, crowd: bool = True) -> None:
        """Start a broker and connect its crowd."""
        kind, name = broker.kind, str(broker.kind)
        with self.bearing(kind):
            self._stack.enter_context(broker)
            self._brokers[name], self.results[name] = broker, {}
            self.versions[name] = broker.version()
            self.keep(name, "start_s", broker.started_s)
            self.keep(name, "memory_mb", broker.memory_bytes() / 1e6)
            if crowd and broker.mqtt:
                self._crowds[name] = self._stack.enter_context(Crowd(broker))

    def keep(self, name: str, what: str, value: float) -> None:
        """Keep a value."""
        self.results[name].setdefault(what, []).append(value)

    def crowds(self, measure: Callable[[Crowd], float], what: str, *, warm: bool = False) -> None:
        """Measure something of each crowd, in an order of its own."""
        for name, crowd in random.sample(list(self._crowds.items()), len(self._crowds)):
            with self.bearing(self._brokers[name].kind):
                if warm:
                    measure(crowd)
                    continue
                for _ in range(self._pairs if len(self.pair(name)) > 1 else 1):
                    for prefix, other in self.pair(name):
                        self.keep(name, prefix + what, measure(self._crowds[other]))

    def brokers(self, measure: Callable[[str, Broker], None], wanted: Callable[[Broker], bool] | None = None) -> None:
        """Measure something of each broker, in an order of its own."""
        for name, broker in random.sample(list(self._brokers.items()), len(self._brokers)):
            if wanted is None or wanted(broker):
                with self.bearing(broker.kind):
                    measure(name, broker)

    def pair(self, name: str) -> list[tuple[str, str]]:
        """Return what is measured for one: the beginning of the figure's name, and of whom; in an order of its own."""
        found = [("", name)]
        if self._base in self._brokers and name != self._base and self._paired(name):
            found.append(("base_", self._base))
        return random.sample(found, len(found))

    def messages(self, seconds: float, *, warm: bool = False) -> None:
        """Measure messages, in and out, QoS 0 and 1."""
        for qos in (0, 1):
            self.crowds(lambda crowd, qos=qos: crowd.fan_in(qos, seconds), f"in{qos}_s", warm=warm)  # type: ignore[misc]
            self.crowds(lambda crowd, qos=qos: crowd.fan_out(qos, seconds), f"out{qos}_s", warm=warm)  # type: ignore[misc]

    def handshakes(self, count: int, tls12: Container[str] = ()) -> None:
        """Measure connections, with full and with resumed handshakes.

        :param tls12: those whose clients speak TLS 1.2 and nothing newer.
        """

        def one(name: str, broker: Broker) -> None:
            for way, resume in (("full", False), ("resumed", True)):
                for prefix, other in self.pair(name):
                    if resume and not broker.tls:
                        continue
                    found = connects(self._brokers[other], count, resume=resume, tls12=not prefix and name in tls12)
                    if resume:
                        self.keep(name, f"{prefix}resumed_share", found.resumed)
                    # What did not resume is a full handshake once more.
                    if not resume or found.resumed > 0.5:  # noqa: PLR2004
                        self.keep(name, f"{prefix}{way}_cpu_ms", found.cpu_ms)
                        self.keep(name, f"{prefix}{way}_wall_ms", found.wall_ms)

        self.brokers(one)

    def paced(self, seconds: float) -> None:
        """Measure how long messages take at half load."""

        def one(name: str, broker: Broker) -> None:
            found = latency(broker, half_load(self.results[name]["in0_s"]), seconds)
            for what, value in found._asdict().items():
                self.keep(name, f"paced_{what}", value)

        self.brokers(one, lambda broker: broker.mqtt)

    def memory(self, connections: int) -> None:
        """Measure what connections need."""
        self.brokers(
            lambda name, broker: self.keep(name, "connected_mb", memory(broker, connections) / 1e6),
            lambda broker: broker.mqtt,
        )

    def stalls(self) -> None:
        """Measure how long a change of rights holds clients up."""

        def one(name: str, broker: Broker) -> None:
            assert isinstance(broker, Mosquitto)
            worst, quiet = stall(broker)
            self.keep(name, "stall_ms", worst)
            self.keep(name, "quiet_ms", quiet)

        self.brokers(one, lambda broker: broker.kind.name in {ACL_FILE, DYNAMIC_SECURITY, BEDNET})

    def revocations(self, clients: int, count: int) -> None:
        """Measure how long a revoked device stays."""

        def one(name: str, broker: Broker) -> None:
            assert isinstance(broker, Mosquitto)
            self.results[name]["revoke_ms"] = revocations(broker, clients, count, REVOKED_UNDER_PER_S)

        self.brokers(one, lambda broker: broker.kind.name == BEDNET)


def more_files() -> None:
    """Let this process and those that it starts have as many open files as they may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def run(programs: Programs, rounds: int, scale: float, kinds: Sequence[Kind]) -> dict[str, object]:
    """Measure all kinds.

    :param scale: 1 for the figures that are published; less for a quick look.
    """
    more_files()
    where = machine()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        Path(folder).chmod(0o755)
        stage = Stage(Path(folder), programs)
        bench = Bench(
            stack,
            lambda kind: kind.name in others.CLASSES,
            str(Kind(OPEN)),
            lambda name: name.startswith(BEDNET),
            PAIRS,
        )
        for kind in kinds:
            why = None
            if kind.name in others.CLASSES:
                why = others.absent(kind.name, programs.node_modules, programs.python_peers)
            if why:
                say(f"{kind} is left out: {why}")
                bench.missing[str(kind)] = why
                continue
            say(f"starting {kind}")
            # Making one may fail as starting it may.
            with bench.bearing(kind):
                bench.start(make(stage, kind))
        say("warming up")
        # Twice: those that compile while they run are slow at first.
        bench.messages(SLICE_S * scale, warm=True)
        bench.messages(SLICE_S * scale, warm=True)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            bench.messages(SLICE_S * scale)
            bench.handshakes(max(5, int(HANDSHAKES * scale)))
        clients = max(50, int(CONNECTIONS * scale))
        say(f"memory of {clients} connections")
        bench.memory(clients)
        for number in range(min(rounds, PACED_ROUNDS)):
            say(f"messages at half load, {number + 1} of {min(rounds, PACED_ROUNDS)}")
            bench.paced(PACED_S * scale)
        for number in range(min(rounds, STALL_ROUNDS)):
            say(f"changes of rights, {number + 1} of {min(rounds, STALL_ROUNDS)}")
            bench.stalls()
        say(f"revocations, with {clients} clients connected")
        bench.revocations(clients, max(20, int(REVOCATIONS * scale)))
    return {
        "rounds": rounds,
        "scale": scale,
        "machine": where,
        "kinds": bench.results,
        "versions": bench.versions,
        "missing": bench.missing,
        "failed": bench.failed,
    }


def machine() -> dict[str, str | float]:
    """Say what this runs on, and how busy it is before anything is measured (the load average)."""
    models = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "processor": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "load": os.getloadavg()[0],
    }


def programs_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser for the options that say what is run and how long."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--mosquitto", default="/usr/sbin/mosquitto")
    parser.add_argument("--plugin", default="/usr/lib/bednet/bednet_plugin.so")
    parser.add_argument("--dynamic-security", required=True)
    parser.add_argument("--node-modules", type=Path, help="a folder with npm's packages")
    parser.add_argument("--python-peers", type=Path, help="a folder with PyPI's packages")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--scale", type=float, default=1.0, help="less than 1 for a quick look")
    parser.add_argument("--kind", action="append", help="only kinds with this name; can be given again")
    return parser


def programs_of(arguments: argparse.Namespace) -> Programs:
    """Return the programs that the options name."""
    return Programs(
        arguments.mosquitto,
        arguments.plugin,
        arguments.dynamic_security,
        arguments.node_modules,
        arguments.python_peers,
    )


def main() -> int:
    """Run the benchmark."""
    arguments = programs_parser("Measure brokers in interleaved rounds; prints JSON.").parse_args()
    kinds = [kind for kind in KINDS if not arguments.kind or kind.name in arguments.kind]
    json.dump(run(programs_of(arguments), arguments.rounds, arguments.scale, kinds), sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
