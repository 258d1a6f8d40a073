# SPDX-License-Identifier: Apache-2.0
"""What is measured of a running broker.

- :class:`Crowd`: clients that stay connected, and what messages between them cost.
- :func:`connects`: what a connection costs, with a full handshake and with a resumed one.
- :func:`latency`: how long messages take at a pace.
- :func:`memory`: what connections need.
- :func:`stall`, :func:`revocations`: what a change of rights does.

CPU is that of the broker's process (schedstat), never a rate: a rate says as much of the generator.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import select
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from load.bench import wire
from load.bench.brokers import ACL_FILE, BEDNET, DYNAMIC_SECURITY, Broker, Mosquitto
from load.bench.stage import ADMIN, READER, READERS, device

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Self

PAYLOAD = bytes(64)
#: Publishers of a fan-in and subscribers of a fan-out.
WIDTH = 20
#: Messages that each publisher sends before it waits: enough that nobody idles, too few to count as a queue.
BURST = 25
PING_PACE_S = 0.001
# Who does what, so that no two connect as the same device.
_CONNECTS, _PACED, _CHANGED, _FIRST_REVOKED, _FIRST_IDLE = 30, 31, 32, 100, 1000
#: More than this the generator does not keep up with, beside a broker on two cores.
MOST_PER_S = 40_000
_CONNECTING_THREADS = 4


def _in(number: int) -> str:
    return f"sensors/{device(number)}/in"


def _paced(number: int) -> str:
    # None that the crowd has subscribed to.
    return f"sensors/{device(number)}/paced"


class Crowd:
    """Clients that stay connected: devices that publish, one reader of all of them, many readers of one."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        enter = self._stack.enter_context
        try:
            self._publishers = [enter(self._broker.client(device(number))) for number in range(WIDTH)]
            self._reader = enter(self._broker.client(READERS[0]))
            self._reader.subscribe("sensors/+/in", 1)
            self._readers = [enter(self._broker.client(name)) for name in READERS[1 : WIDTH + 1]]
            for reader in self._readers:
                reader.subscribe(f"sensors/{device(0)}/out", 1)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def fan_in(self, qos: int, seconds: float) -> float:
        """Return the broker's CPU seconds per 100,000 messages from many devices to one subscriber."""
        packets = [_packets(_in(number), qos) for number in range(WIDTH)]

        def turn() -> None:
            # One after the other and each on its own, as devices do.
            for number in range(BURST):
                for publisher, own in zip(self._publishers, packets, strict=True):
                    publisher.send(own[number])
            self._reader.count(WIDTH * BURST, acknowledge=qos > 0)
            if qos:
                for publisher in self._publishers:
                    _acknowledged(publisher)

        return self._per_100k(turn, seconds)

    def fan_out(self, qos: int, seconds: float) -> float:
        """Return the broker's CPU seconds per 100,000 deliveries of one device's messages to many subscribers."""
        packets = _packets(f"sensors/{device(0)}/out", qos)

        def turn() -> None:
            for packet in packets:
                self._publishers[0].send(packet)
            for reader in self._readers:
                reader.count(BURST, acknowledge=qos > 0)
            if qos:
                _acknowledged(self._publishers[0])

        return self._per_100k(turn, seconds)

    def _per_100k(self, turn: Callable[[], None], seconds: float) -> float:
        turns, before, end = 0, self._broker.cpu_s(), time.monotonic() + seconds
        while not turns or time.monotonic() < end:
            turn()
            turns += 1
        return (self._broker.cpu_s() - before) * 100_000 / (turns * WIDTH * BURST)


def _packets(topic: str, qos: int) -> list[bytes]:
    return [wire.publish(topic, PAYLOAD, qos, number + 1) for number in range(BURST)]


def _acknowledged(publisher: wire.Client) -> None:
    got = 0
    while got < BURST:
        got += publisher.acknowledged()


class Connects(NamedTuple):
    """What a connection costs.

    :param cpu_ms: the broker's CPU.
    :param wall_ms: until the CONNACK, as the client sees it, median.
    :param resumed: the share of connections that resumed a TLS session.
    :param walls_ms: the same of each connection.
    """

    cpu_ms: float
    wall_ms: float
    resumed: float
    walls_ms: Sequence[float]


def connects(
    broker: Broker, count: int, *, resume: bool = False, tls12: bool = False, passwords: Sequence[str] = ()
) -> Connects:
    """Connect again and again, as one device; the passwords are shown in turn."""
    client = broker.client(device(_CONNECTS), tls12=tls12)
    times, resumed = [], 0
    if resume:
        with client:
            client.session = _session(client)
    before = broker.cpu_s()
    for number in range(count):
        client.password = passwords[number % len(passwords)] if passwords else None
        begin = time.perf_counter()
        with client:
            times.append(time.perf_counter() - begin)
            if resume:
                resumed += bool(getattr(client.socket, "session_reused", False))
                # TLS 1.3 gives a new ticket each time, to be used once.
                client.session = _session(client)
    cpu_ms = (broker.cpu_s() - before) * 1000 / count
    walls_ms = [time_s * 1000 for time_s in times]
    return Connects(cpu_ms, sorted(walls_ms)[count // 2], resumed / count, walls_ms)


def _session(client: wire.Client) -> ssl.SSLSession | None:
    session: ssl.SSLSession | None = getattr(client.socket, "session", None)
    return session


class Latency(NamedTuple):
    """How long messages took, from when they were due to when they arrived.

    :param per_s: the pace.
    :param lost: how many did not arrive within a second after the last.
    :param late_p99_ms: how late the generator was: what it adds of its own.
    """

    per_s: int
    p50_ms: float
    p99_ms: float
    lost: int
    late_p99_ms: float


def latency(broker: Broker, per_s: int, seconds: float) -> Latency:
    """Let one device publish at a pace (QoS 0), from a process of its own, and look when its messages arrive."""
    topic = _paced(_PACED)
    packet = wire.publish(topic, PAYLOAD)
    tail = struct.Struct(f"!{len(packet) - len(PAYLOAD)}xQ{len(PAYLOAD) - 8}x")
    took: list[float] = []
    with broker.client(READER) as reader:
        reader.subscribe(topic)
        with _Sender(broker, _PACED, per_s, seconds) as sender:
            begin, pace = sender.begin, sender.pace
            wanted, left = sender.total, b""
            reader.socket.settimeout(1.0)
            end = begin + seconds + 1
            while len(took) < wanted and time.monotonic() < end:
                try:
                    more = reader.socket.recv(wire.CHUNK)
                except TimeoutError:
                    continue
                if not more:
                    raise wire.WireError("the broker closed the connection")
                now = time.monotonic()
                data = left + more
                whole = len(data) // len(packet) * len(packet)
                took += [now - begin - pace.due(sequence) for (sequence,) in tail.iter_unpack(data[:whole])]
                left = data[whole:]
            late = sender.late_p99_ms()
    took.sort()
    if not took:
        raise wire.WireError(f"{broker.kind}: no message arrived at {per_s}/s")
    middle, high = took[len(took) // 2], took[math.ceil(0.99 * len(took)) - 1]
    return Latency(per_s, middle * 1000, high * 1000, wanted - len(took), late)


class Pace(NamedTuple):
    """Messages in bursts, a burst each millisecond or as seldom as the pace asks.

    :param each: messages in a burst.
    :param interval_s: between bursts.
    """

    each: int
    interval_s: float

    @classmethod
    def of(cls, per_s: int) -> Self:
        """Return the pace of so many messages a second."""
        each = max(1, round(per_s / 1000))
        return cls(each, each / per_s)

    def due(self, sequence: int) -> float:
        """Return when a message is due, in seconds after the first."""
        return sequence // self.each * self.interval_s


class _Sender:
    """A process that publishes at a pace; entered, it begins soon."""

    def __init__(self, broker: Broker, number: int, per_s: int, seconds: float) -> None:
        self.pace = Pace.of(per_s)
        self.total = max(1, round(seconds / self.pace.interval_s)) * self.pace.each
        paths = [str(broker.stage.ca), *map(str, broker.stage.identity(device(number)))] if broker.tls else []
        words = [sys.executable, "-m", "load.bench.sender", str(broker.port), device(number), _paced(number)]
        words += [str(per_s), str(self.total), *paths]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout

    def __enter__(self) -> Self:
        if self._answers.readline() != "ready\n":
            raise wire.WireError("the sender could not connect")
        self.begin = time.monotonic() + 0.02
        self._orders.write(f"{self.begin!r}\n")
        self._orders.flush()
        return self

    def late_p99_ms(self) -> float:
        """Wait for its end. :returns: how late it was."""
        return float(self._answers.readline() or "nan")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._orders.close()
        self._answers.close()


def memory(broker: Broker, connections: int) -> int:
    """Return the bytes of the broker's memory while it has many idle connections more.

    What it needs for one is not told: what a broker has once had and given back, it takes first.
    """
    with contextlib.ExitStack() as stack:
        clients = [broker.client(device(_FIRST_IDLE + number)) for number in range(connections)]
        # The handshakes' sums are done outside of Python's lock.
        with ThreadPoolExecutor(_CONNECTING_THREADS) as pool:
            list(pool.map(stack.enter_context, clients))
        return broker.memory_bytes()


class Pinger:
    """Pings a broker each millisecond from a thread and keeps the round trips."""

    def __init__(self, client: wire.Client) -> None:
        self._client = client
        self._stop = threading.Event()
        self.trips: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
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
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout

    def __enter__(self) -> Self:
        self._line()
        return self

    def __exit__(self, *_: object) -> None:
        self._orders.close()
        self._process.wait(30)
        self._answers.close()

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


def stall(broker: Mosquitto) -> tuple[float, float]:
    """Change one device's rights while a client pings.

    :returns: the longest round trip at the change, and in a stretch as long without one, in ms.
    """
    # A reload of the acl_file takes time that grows with the square of the devices.
    settle_s = 1.2 if broker.way == ACL_FILE else 0.5
    name = device(_CHANGED)
    with broker.client(READER) as client, Pinger(client) as pinger:
        changed: Callable[[], tuple[float, float]]
        with contextlib.ExitStack() as stack:
            if broker.way == ACL_FILE:
                broker.write_acl_file("user d-new\ntopic write sensors/d-new/#\n")

                def changed() -> tuple[float, float]:
                    begin = time.monotonic()
                    broker.reload()
                    return begin, begin
            elif broker.way == DYNAMIC_SECURITY:
                admin = stack.enter_context(broker.client(ADMIN))
                admin.subscribe("$CONTROL/dynamic-security/v1/response")

                def order(command: str) -> tuple[float, float]:
                    role = {"command": command, "username": name, "rolename": READER}
                    packet = wire.publish("$CONTROL/dynamic-security/v1", json.dumps({"commands": [role]}).encode())
                    begin = time.monotonic()
                    admin.send(packet)
                    said = next(body for kind, body in admin.packets() if kind == wire.PUBLISH)
                    end = time.monotonic()
                    # What is refused, or there already, would be no change.
                    if command.encode() not in said or b'"error"' in said:
                        raise wire.WireError(f"{broker.kind}: {command} was answered with {said[-200:]!r}")
                    return begin, end

                # Taken back below: to add what is there already changes nothing.
                def changed() -> tuple[float, float]:
                    return order("addClientRole")
            else:
                writer = stack.enter_context(Writer(broker.store))

                def changed() -> tuple[float, float]:
                    return writer("revoke", name)

            quiet = time.monotonic()
            time.sleep(settle_s)
            begin, end = changed()
            time.sleep(settle_s)
            # A ping that a reload holds up ends when the reload does.
            client_done = time.monotonic()
            if broker.way == BEDNET:
                writer("reinstate", name)
            elif broker.way == DYNAMIC_SECURITY:
                order("removeClientRole")
        during = (begin, max(end, client_done))
    return pinger.worst_ms(*during), pinger.worst_ms(quiet, begin)


def revocations(broker: Mosquitto, clients: int, count: int, load_per_s: int) -> list[float]:
    """Revoke connected devices under load, one by one. :returns: ms from the change to the closed connection."""
    times = []
    names = [device(_FIRST_REVOKED + number) for number in range(clients)]
    with contextlib.ExitStack() as stack:
        poll = select.epoll()
        stack.callback(poll.close)
        files = {name: stack.enter_context(broker.client(name)).socket.fileno() for name in names}
        stack.enter_context(_Sender(broker, _PACED, load_per_s, 600))
        writer = stack.enter_context(Writer(broker.store))
        for name in names[:count]:
            poll.register(files[name], select.EPOLLIN | select.EPOLLRDHUP)
            begin, _ = writer("revoke", name)
            if not poll.poll(10):
                raise wire.WireError(f"{name} is still connected 10 s after it was revoked")
            times.append((time.monotonic() - begin) * 1000)
            poll.unregister(files[name])
            time.sleep(random.uniform(0.005, 0.03))  # noqa: S311 - spreads the changes over the broker's ticks
        for name in names[:count]:
            writer("reinstate", name)
    return times


def half_load(qos0_s: Sequence[float]) -> int:
    """Return the pace that keeps half a core busy, in messages per second, given CPU seconds per 100,000."""
    middle = sorted(qos0_s)[len(qos0_s) // 2]
    return max(10, min(MOST_PER_S, round(0.5 * 100_000 / middle)))
