# SPDX-License-Identifier: Apache-2.0
"""What is measured, in rounds that take the brokers in turn: ``python -m load.bench.rounds`` prints JSON.

Each round starts every kind of broker once, in an order of its own, so that what else the machine does meets all alike.
What is compared is CPU time of the broker's process (schedstat), never a rate: a rate says as much of the generator.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import select
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from load.bench import wire
from load.bench.brokers import (
    ACL_FILE,
    ADMIN,
    BEDNET,
    DYNAMIC_SECURITY,
    OPEN,
    PLAINTEXT,
    READER,
    Broker,
    Kind,
    Programs,
    Stage,
    device,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PAYLOAD = bytes(64)
# Messages that the subscriber may be behind: enough that nobody waits, too few to count as a queue.
WINDOW = 500
PING_PACE_S = 0.001


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def messages(broker: Broker, count: int, qos: int) -> float:
    """Return the CPU seconds of the broker per 100,000 messages from one device to one subscriber."""
    sender = device(0)
    topic = f"sensors/{sender}/temperature"
    packets = [wire.publish(topic, PAYLOAD, qos, number % 60_000 + 1) for number in range(WINDOW)]
    with broker.client(READER) as reader, broker.client(sender) as publisher:
        reader.subscribe("#", qos)
        before = broker.cpu_s()
        for _ in range(count // WINDOW):
            for packet in packets:
                publisher.send(packet)
            acknowledged = 0
            reader.count(WINDOW, acknowledge=qos > 0)
            while qos and acknowledged < WINDOW:
                acknowledged += publisher.acknowledged()
        return (broker.cpu_s() - before) * 100_000 / (count // WINDOW * WINDOW)


def connects(broker: Broker, count: int) -> tuple[float, float]:
    """Return ms of the broker's CPU, and ms until the CONNACK, for a connection with a full handshake."""
    client = broker.client(device(1))
    times = []
    before = broker.cpu_s()
    for _ in range(count):
        begin = time.perf_counter()
        with client:
            times.append(time.perf_counter() - begin)
    return (broker.cpu_s() - before) * 1000 / count, sorted(times)[count // 2] * 1000


class Pinger:
    """Pings a broker each millisecond from a thread and keeps the round trips."""

    def __init__(self, client: wire.Client) -> None:
        self._client = client
        self._stop = threading.Event()
        self.trips: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Pinger:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            begin = time.monotonic()
            self._client.ping()
            self.trips.append((begin, time.monotonic() - begin))
            self._stop.wait(PING_PACE_S)

    def worst_ms(self, begin: float, end: float) -> float:
        """Return the longest round trip, in ms, that was under way between two moments of time.monotonic()."""
        return max((trip for at, trip in self.trips if at <= end and at + trip >= begin), default=0.0) * 1000


# Runs beside the measurement, so that what it does to the store is not done by the process that measures. It prints
# time.monotonic() before and after each change; the clock is the machine's, the same in all processes.
_WRITER = """\
import pathlib, sys, time
from bednet.store import Store
store = Store(pathlib.Path(sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:
    action, name = line.split()
    begin = time.monotonic()
    store.revoke(name, "privilegeWithdrawn") if action == "revoke" else store.reinstate(name)
    print(repr(begin), repr(time.monotonic()), flush=True)
"""


class Writer:
    """Changes a store from a process of its own."""

    def __init__(self, store: Path) -> None:
        words = [sys.executable, "-c", _WRITER, str(store)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("a process without pipes")
        self._orders, self._answers = self._process.stdin, self._process.stdout

    def __enter__(self) -> Writer:
        self._line()
        return self

    def __exit__(self, *_: object) -> None:
        self._orders.close()
        self._process.wait(30)

    def _line(self) -> str:
        line = self._answers.readline()
        if not line:
            raise RuntimeError("the store's writer died")
        return line

    def __call__(self, action: str, name: str) -> tuple[float, float]:
        """Change a device. :returns: time.monotonic() before and after."""
        self._orders.write(f"{action} {name}\n")
        self._orders.flush()
        begin, end = self._line().split()
        return float(begin), float(end)


def stall(broker: Broker, settle_s: float) -> tuple[float, float]:
    """Change one device's rights while a client pings.

    :returns: the longest round trip at the change, and in a stretch as long without one, in ms.
    """
    with broker.client(READER) as client, Pinger(client) as pinger:
        changed: Callable[[], tuple[float, float]]
        with contextlib.ExitStack() as stack:
            if broker.kind.name == ACL_FILE:
                broker.write_acl_file("user d-new\ntopic write sensors/d-new/#\n")

                def changed() -> tuple[float, float]:
                    begin = time.monotonic()
                    broker.reload()
                    return begin, begin
            elif broker.kind.name == DYNAMIC_SECURITY:
                admin = stack.enter_context(broker.client(ADMIN))
                admin.subscribe("$CONTROL/dynamic-security/v1/response")
                role = {"command": "addClientRole", "username": device(2), "rolename": READER}
                order = wire.publish("$CONTROL/dynamic-security/v1", json.dumps({"commands": [role]}).encode())

                def changed() -> tuple[float, float]:
                    begin = time.monotonic()
                    admin.send(order)
                    admin.count(1)
                    return begin, time.monotonic()
            else:
                writer = stack.enter_context(Writer(broker.store))

                def changed() -> tuple[float, float]:
                    return writer("revoke", device(2))

            quiet = time.monotonic()
            time.sleep(settle_s)
            begin, end = changed()
            time.sleep(settle_s)
            # A ping that a reload holds up ends when the reload does.
            client_done = time.monotonic()
            if broker.kind.name == BEDNET:
                writer("reinstate", device(2))
        during = (begin, max(end, client_done))
    return pinger.worst_ms(*during), pinger.worst_ms(quiet, begin)


def revocations(broker: Broker, clients: int, count: int, load_per_s: int) -> list[float]:
    """Revoke connected devices under load, one by one. :returns: ms from the change to the closed connection."""
    times = []
    with contextlib.ExitStack() as stack:
        poll = select.epoll()
        stack.callback(poll.close)
        connected: dict[int, str] = {}
        for number in range(10, 10 + clients):
            name = device(number)
            client = stack.enter_context(broker.client(name))
            connected[client.socket.fileno()] = name
        files = {name: descriptor for descriptor, name in connected.items()}
        words = [sys.executable, "-m", "load.bench.rounds", "--paced", str(broker.port), str(load_per_s)]
        words += [str(broker.stage.ca), *map(str, broker.stage.identity(device(0)))]
        loader = subprocess.Popen(words)
        stack.callback(loader.wait, 30)
        stack.callback(loader.terminate)
        writer = stack.enter_context(Writer(broker.store))
        for number in range(10, 10 + count):
            name = device(number)
            poll.register(files[name], select.EPOLLIN | select.EPOLLRDHUP)
            begin, _ = writer("revoke", name)
            if not poll.poll(10):
                raise wire.WireError(f"{name} is still connected 10 s after it was revoked")
            times.append((time.monotonic() - begin) * 1000)
            poll.unregister(files[name])
            time.sleep(random.uniform(0.005, 0.03))  # noqa: S311 - spreads the changes over the broker's ticks
        for number in range(10, 10 + count):
            writer("reinstate", device(number))
    return times


def paced(port: int, per_s: int, ca: Path, certificate: Path, key: Path) -> None:
    """Publish at a pace until the process is ended."""
    endpoint = wire.Endpoint(port, ca)
    packet = wire.publish(f"sensors/{device(0)}/temperature", PAYLOAD)
    with wire.Client(endpoint, device(0), endpoint.context(certificate, key)) as client:
        due = time.monotonic()
        while True:
            client.send(packet * max(1, per_s // 1000))
            due += 0.001
            time.sleep(max(0.0, due - time.monotonic()))


def run(programs: Programs, rounds: int, scale: float, kinds: Sequence[Kind]) -> dict[str, object]:
    """Measure all kinds.

    :param scale: 1 for the figures that are published; less for a quick look.
    """
    results: dict[str, dict[str, list[float]]] = {str(kind): {} for kind in kinds}

    def keep(kind: Kind, what: str, value: float) -> None:
        results[str(kind)].setdefault(what, []).append(value)

    count, handshakes = int(100_000 * scale) // WINDOW * WINDOW, max(20, int(300 * scale))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        stage = Stage(Path(folder), programs)
        for number in range(rounds):
            for kind in random.sample(list(kinds), len(kinds)):
                _say(f"round {number + 1} of {rounds}: {kind}")
                with Broker(stage, kind) as broker:
                    keep(kind, "start_s", broker.started_s)
                    keep(kind, "qos0_s", messages(broker, count, 0))
                    keep(kind, "qos1_s", messages(broker, count // 2, 1))
                    cpu, wall = connects(broker, handshakes)
                    keep(kind, "connect_cpu_ms", cpu)
                    keep(kind, "connect_wall_ms", wall)
                    keep(kind, "memory_mb", broker.memory_bytes() / 1e6)
                    if kind.name in {ACL_FILE, DYNAMIC_SECURITY, BEDNET}:
                        # A reload of the acl_file takes time that grows with the square of the devices.
                        worst, quiet = stall(broker, 2.0 if kind.name == ACL_FILE else 0.5)
                        keep(kind, "stall_ms", worst)
                        keep(kind, "quiet_ms", quiet)
                    if kind.name == BEDNET and number == 0:
                        clients = min(1000, kind.devices - 10)
                        _say(f"revoking, with {clients} clients connected")
                        done = revocations(broker, clients, max(20, int(300 * scale)), 2000)
                        results[str(kind)]["revoke_ms"] = done
    return {"rounds": rounds, "scale": scale, "machine": machine(programs), "kinds": results}


def machine(programs: Programs) -> dict[str, str]:
    """Say what this ran on."""
    said = subprocess.run([programs.mosquitto, "-h"], capture_output=True, text=True, check=False).stdout
    models = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "mosquitto": (said.splitlines() or ["unknown"])[0],
        "processor": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


KINDS = (
    Kind(PLAINTEXT),
    Kind(OPEN),
    Kind(ACL_FILE, 10_000),
    Kind(DYNAMIC_SECURITY, 10_000),
    Kind(DYNAMIC_SECURITY, 50_000),
    Kind(BEDNET, 10_000),
    Kind(BEDNET, 1_000_000),
)


def main() -> int:
    """Run the benchmark, or (``--paced``) the load beside a measurement."""
    if sys.argv[1:2] == ["--paced"]:
        port, per_s, *paths = sys.argv[2:]
        with contextlib.suppress(wire.WireError, OSError):
            paced(int(port), int(per_s), *map(Path, paths))
        return 0
    parser = argparse.ArgumentParser(description="Measure brokers in interleaved rounds; prints JSON.")
    parser.add_argument("--mosquitto", default="/usr/sbin/mosquitto")
    parser.add_argument("--plugin", default="/usr/lib/bednet/bednet_plugin.so")
    parser.add_argument("--dynamic-security", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="less than 1 for a quick look")
    parser.add_argument("--only", action="append", help="only kinds with this name; can be given again")
    arguments = parser.parse_args()
    kinds = [kind for kind in KINDS if not arguments.only or kind.name in arguments.only]
    programs = Programs(arguments.mosquitto, arguments.plugin, arguments.dynamic_security)
    json.dump(run(programs, arguments.rounds, arguments.scale, kinds), sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
