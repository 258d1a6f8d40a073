# SPDX-License-Identifier: Apache-2.0
"""The generator of one process: plays its share of a plan's devices, and counts.

- :class:`Generator`: connects everybody, keeps the schedule, waits for what is under way, tells its tally.
- :class:`Phase`: where it stands.

There is one schedule for all devices of the process, and no loop that waits for an answer before it goes on: what is
due is sent when it is due, or as soon as the generator can, and how late it was is measured (`lag`).
"""

from __future__ import annotations

import enum
import heapq
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import gevent
from gevent.event import Event

from bednet.client import TokenSource
from load import measure
from load.client import MQTT_5, ConnectError, Connection, Login
from load.plan import CERTIFICATE, COMMANDS, JUDGED, PASSWORD, PSK, SLOW, TOKEN, TRESPASS
from load.tally import Tally
from load.tls import client_context, psk_context

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping, Sequence

    from load.plan import Plan, Player, Stream

_SECOND_NS = 1_000_000_000
#: A device that could not connect, or lost its connection, tries again after so many seconds.
RETRY_S = 1.0
#: So many messages at a stretch, then what arrives gets its turn.
_STRETCH = 32
_TEND_S = 5.0
#: What is kept of a figure that the broker tells of itself.
_BROKER_BYTES = 100


def _secret(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConnectError(f"credentials cannot be read: {exc}") from exc


def _waited_s() -> float:
    """Return for how long this thread has waited for a core; 0 where the kernel does not tell."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / _SECOND_NS
    except (OSError, ValueError, IndexError):
        return 0.0


class Phase(enum.StrEnum):
    """Where a generator stands."""

    CONNECTING = "connecting"
    LOADING = "loading"
    DRAINING = "draining"
    OVER = "over"


class Device:
    """A player on the stage: one connection, and what it has heard."""

    def __init__(self, player: Player, login: Login, stage: Generator) -> None:
        self.player = player
        self.ledgers: dict[int, measure.Ledger] = {}
        self.connection = Connection(login, self, acknowledged=any(stream.qos for stream in player.streams))
        self.ready = False
        self.gone = Event()
        self._stage = stage
        self._trespassing: dict[int, None] = {}
        self._numbers: dict[int, int] = defaultdict(int)
        self._qos_of: dict[int, int] = {}
        self._answers = {answer: stream for stream in player.streams for answer in stream.answers}

    def send(self, stream: Stream, due_ns: int) -> None:
        """Publish one message."""
        stage = self._stage
        number = self._numbers[stream.number] = self._numbers[stream.number] + 1
        tally, kind = stage.tally, stream.kind
        tally.scheduled[kind] += 1
        payload = measure.stamped(stage.run, stage.clock, stream.number, number, due_ns, stage.padding(stream))
        mid = self.connection.publish(stream.topic, payload, stream.qos)
        if mid:
            tally.sent[kind] += 1
            stage.now.sent += 1
            if kind == TRESPASS:
                self._trespassing[mid] = None
        else:
            tally.unsent[kind] += 1

    def drop(self, stream: Stream) -> None:
        """Count a message that was due and could not be sent in time."""
        self._numbers[stream.number] += 1
        self._stage.tally.scheduled[stream.kind] += 1
        self._stage.tally.unsent[stream.kind] += 1

    def scheduled(self, stream: Stream) -> int:
        """Return how many messages of a stream were due so far."""
        return self._numbers[stream.number]

    # What the connection tells

    def received(self, topic: bytes, payload: bytes | bytearray, qos: int) -> None:
        """Take a message."""
        stage = self._stage
        head = measure.read_stamp(payload)
        if head is None or head.run != stage.run:
            if topic.startswith(b"$SYS/"):
                name, told = topic.decode(), payload[:_BROKER_BYTES].decode(errors="replace")
                stage.tally.broker_before.setdefault(name, told)
                stage.tally.broker_after[name] = told
            else:
                stage.tally.foreign += 1
            return
        kind = stage.kind_of[head.stream]
        if kind == TRESPASS:
            stage.tally.breaches += 1
            return
        whose = SLOW if self.player.slow_s else kind
        delivery = stage.tally.delivery(whose, qos)
        ledger = self.ledgers.get(head.stream)
        if ledger is None:
            ledger = self.ledgers[head.stream] = measure.Ledger()
            self._qos_of[head.stream] = qos
        if not ledger.hear(head.number):
            return
        stage.now.received += 1
        stage.arrived += 1
        ahead = stage.ahead.get(head.clock)
        if ahead is not None and (due := head.due_ns - ahead) >= stage.measured_from_ns:
            taken = time.monotonic_ns() - due
            delivery.latency.add(taken)
            if whose in JUDGED:
                stage.now.latency.add(taken)
        # Others may hear the command, and do not answer.
        if kind == COMMANDS and (answer := self._answers.get(head.stream)) is not None:
            # Due when the command was: the answer's latency is that of the round trip.
            self.send(answer, head.due_ns - (ahead or 0))

    def acknowledged(self, mid: int, refused: str) -> None:
        """Take the answer to a publish."""
        tally = self._stage.tally
        if self._trespassing and mid in self._trespassing:
            del self._trespassing[mid]
            if refused:
                tally.refused_wanted += 1
            else:
                tally.breaches += 1
        elif refused:
            tally.refused[refused] += 1
        else:
            tally.acknowledged += 1

    def lost(self, reason: str) -> None:
        """Hear that the connection broke."""
        if self._stage.breaking:
            self._stage.broken(self)
        else:
            self._stage.tally.lost_connections[reason] += 1
        self.gone.set()

    def settle(self) -> None:
        """Add what it heard, and what others should have heard of it, to the tally."""
        tally = self._stage.tally
        for number, ledger in self.ledgers.items():
            kind = self._stage.kind_of[number]
            delivery = tally.delivery(SLOW if self.player.slow_s else kind, self._qos_of[number])
            delivery.unique += ledger.unique
            delivery.duplicates += ledger.duplicates
            delivery.disordered += ledger.disordered
        for stream in self.player.streams:
            for whose, qos, count in stream.audience:
                tally.delivery(whose, qos).expected += count * self._numbers[stream.number]


class Generator:
    """Plays some of a plan's devices.

    :param players: those of this process.
    :ivar tally: what it counted; whole when :meth:`finish` has returned.
    :ivar ahead: by how many nanoseconds other machines' clocks are ahead of ours, as far as that is known.
    :ivar phase: where it stands.
    :ivar breaking: whether a connection that breaks now does so on purpose; `cut_due` is set when that begins.
    :ivar enough: to be set when all processes together have heard all that was said.
    """

    def __init__(self, plan: Plan, players: Sequence[Player]) -> None:
        self.plan = plan
        self.tally = Tally()
        self.phase = Phase.CONNECTING
        self.clock = measure.clock_id()
        self.run = plan.run
        self.ahead: Mapping[int, int] = {self.clock: 0}
        self.arrived = 0
        self.kind_of = {stream.number: stream.kind for stream in plan.streams}
        self.now = self.tally.second(0)
        self.measured_from_ns = 0
        self.begin_ns = 0
        self.end_ns = 0
        self.interrupted = False
        # Since a cut, or from when a restart is due: who lost its connection and is not back yet.
        self.breaking = False
        self._up_then = 0
        self._away: set[Device] = set()
        self._padding: dict[int, bytes] = {}
        self._shared: ssl.SSLContext | None = None
        self._over = Event()
        self.cut_due = Event()
        self.enough = Event()
        self._started = Event()
        self._first_ns = time.monotonic_ns()
        self._cpu_begin = time.process_time()
        self.devices = [Device(player, self._login(player), self) for player in players]
        self._helpers: list[gevent.Greenlet] = []

    def _login(self, player: Player) -> Login:
        bundle, gateway, ca = Path(player.bundle), self.plan.gateway, Path(self.plan.ca)
        password = source = None
        if player.authentication == CERTIFICATE:
            context = client_context(ca, bundle / "certificate.pem", bundle / "key.pem")
        elif player.authentication == TOKEN:
            if player.bound:
                context = client_context(ca, bundle / "certificate.pem", bundle / "key.pem")
            else:
                self._shared = context = self._shared or client_context(ca)
            try:
                source = TokenSource.of_bundle(bundle, address=self.plan.token_address or None)
            except (OSError, ValueError) as exc:
                raise ConnectError(f"credentials cannot be read: {exc}") from exc
        elif player.authentication == PSK:
            try:
                key = bytes.fromhex(_secret(bundle / "psk"))
            except ValueError as exc:
                raise ConnectError("credentials cannot be read: a pre-shared key that is not in hex") from exc
            context = psk_context(player.id, key)
        else:
            self._shared = context = self._shared or client_context(ca)
            password = _secret(bundle / "password")
        port = gateway.port(player.authentication, bound=player.bound)
        assert port is not None
        return Login(
            player.id,
            gateway.address,
            port,
            gateway.server_name,
            context,
            password,
            source,
            player.protocol if player.clean else MQTT_5,
            player.clean,
            websockets=gateway.websockets and player.authentication == PASSWORD,
        )

    def padding(self, stream: Stream) -> bytes:
        """Return what brings a payload of a stream to its size."""
        size = stream.payload_bytes
        made = self._padding.get(size)
        if made is None:
            made = self._padding[size] = bytes(size - measure.HEAD_BYTES)
        return made

    @property
    def connected(self) -> int:
        """How many devices are connected now."""
        return sum(device.connection.up for device in self.devices)

    # A device's life, which Locust's users live

    def live(self, device: Device) -> None:
        """Connect a device when it is due, and keep it connected until the run is over."""
        due_ns = self._first_ns + int(device.player.connect_at_s * _SECOND_NS)
        self._sleep_until(due_ns)
        first = True
        while not self._over.is_set():
            try:
                device.connection.connect()
                if first or device.player.clean or not device.connection.session_present:
                    self._subscribe(device)
            except ConnectError as exc:
                if not self._over.is_set():
                    self.tally.connect_failures[exc.reason] += 1
                self._over.wait(RETRY_S)
                continue
            taken = time.monotonic_ns() - due_ns
            (self.tally.connect if first else self.tally.reconnect).add(taken)
            if first:
                self.tally.connects += 1
                transport = device.connection.transport
                if transport is not None:
                    self.tally.tls[f"{transport.version} {transport.cipher}"] += 1
            else:
                self.tally.reconnects += 1
            first, device.ready = False, True
            self._back(device)
            device.gone.clear()
            device.gone.wait()
            self._count_bytes(device)
            if self._over.is_set():
                break
            due_ns = self._back_at_ns(device)
            self._sleep_until(due_ns)

    def _back_at_ns(self, device: Device) -> int:
        """Return when a device that lost its connection comes back."""
        now = time.monotonic_ns()
        if self.plan.reconnect_within_s:
            share = (self.devices.index(device) * 0.6180339887) % 1
            return now + int(share * self.plan.reconnect_within_s * _SECOND_NS)
        return now + int(RETRY_S * _SECOND_NS)

    def broken(self, device: Device) -> None:
        """Count a connection that broke on purpose."""
        self._away.add(device)
        self.tally.cut += 1
        self.tally.broken_at_ns = self.tally.broken_at_ns or time.monotonic_ns()
        self.tally.back_at_ns = 0

    def _back(self, device: Device) -> None:
        """See whether all are back after a cut; from then on what breaks has broken by itself."""
        self._away.discard(device)
        if self.breaking and not self._away and self.tally.cut >= self._up_then:
            self.tally.back_at_ns = time.monotonic_ns()
            self.breaking = False

    def _subscribe(self, device: Device) -> None:
        if device.player.subscribe:
            for refused in device.connection.subscribe(device.player.subscribe):
                if refused:
                    self.tally.subscribe_refusals[refused] += 1

    def _count_bytes(self, device: Device) -> None:
        transport = device.connection.transport
        if transport is not None:
            self.tally.bytes_sent += transport.sent_bytes
            self.tally.bytes_received += transport.received_bytes
            transport.sent_bytes = transport.received_bytes = 0

    def _sleep_until(self, due_ns: int) -> None:
        self._over.wait(max(0.0, (due_ns - time.monotonic_ns()) / _SECOND_NS))

    # The run

    def await_connected(self) -> bool:
        """Wait until every device is connected, or has had its time; return whether any is."""
        last = max((device.player.connect_at_s for device in self.devices), default=0.0)
        deadline = self._first_ns + int((last + self.plan.connect_deadline_s) * _SECOND_NS)
        while time.monotonic_ns() < deadline and not self.interrupted:
            if all(device.ready for device in self.devices):
                break
            gevent.sleep(0.02)
        return any(device.ready for device in self.devices)

    def load(self) -> None:
        """Keep the schedule to its end, then wait for what is under way."""
        plan = self.plan
        self.begin_ns = time.monotonic_ns()
        self.measured_from_ns = self.begin_ns + int(plan.warmup_s * _SECOND_NS)
        self.end_ns = self.measured_from_ns + int(plan.duration_s * _SECOND_NS)
        self.phase = Phase.LOADING
        cpu, waited = time.process_time(), _waited_s()
        self._helpers = [gevent.spawn(self._keep_seconds), gevent.spawn(self._tend)]
        if plan.cut_at_s:
            self._helpers.append(gevent.spawn(self._cut))
        if plan.renew_every_s:
            self._helpers += [gevent.spawn(self._renew, d) for d in self.devices if d.player.authentication == TOKEN]
        self._helpers += [gevent.spawn(self._read_slowly, device) for device in self.devices if device.player.slow_s]
        self._keep_schedule()
        self.tally.cpu_s = time.process_time() - cpu
        self.tally.busy_s = (time.monotonic_ns() - self.begin_ns) / _SECOND_NS
        self.tally.busiest = self.tally.cpu_s / self.tally.busy_s
        self.tally.wanting = (self.tally.cpu_s + _waited_s() - waited) / self.tally.busy_s
        self.phase = Phase.DRAINING
        self._drain()

    def _keep_schedule(self) -> None:
        begin, end = self.begin_ns, self.end_ns
        # What is due before the end is sent, even if late, but not for ever.
        give_up = end + int(self.plan.drain_s * _SECOND_NS)
        due: list[tuple[int, int, int, Device, Stream]] = []
        for device in self.devices:
            for stream in device.player.streams:
                if stream.every_s:
                    step = int(stream.every_s * _SECOND_NS)
                    due.append((begin + int(stream.offset_s * _SECOND_NS), stream.number, step, device, stream))
        heapq.heapify(due)
        stretch = 0
        while due and not self.interrupted:
            at, number, step, device, stream = due[0]
            if at >= end:
                break
            now = time.monotonic_ns()
            if at > now:
                stretch = 0
                gevent.sleep(min((at - now) / _SECOND_NS, 0.05))
                continue
            if now > give_up:
                device.drop(stream)
            else:
                device.send(stream, at)
                self.now.lag.add(now - at)
            heapq.heapreplace(due, (at + step, number, step, device, stream))
            stretch += 1
            if stretch >= _STRETCH:
                stretch = 0
                gevent.sleep(0)
        while not self.interrupted and time.monotonic_ns() < end:
            gevent.sleep(0.02)

    def expected(self) -> int:
        """Return how many deliveries the messages sent so far by this process ask for."""
        return sum(
            count * device.scheduled(stream)
            for device in self.devices
            for stream in device.player.streams
            for _, _, count in stream.audience
        )

    def _drain(self) -> None:
        deadline = time.monotonic() + self.plan.drain_s
        whole = len(self.devices) == len(self.plan.players)
        while time.monotonic() < deadline and not self.interrupted:
            # Only who plays all devices can know that nothing is missing any more.
            if self.enough.is_set() or (whole and self.arrived >= self.expected()):
                # A duplicate comes late or never.
                gevent.sleep(0.2)
                return
            gevent.sleep(0.02)

    def finish(self) -> Tally:
        """Disconnect everybody and return the tally."""
        if self.phase is not Phase.OVER:
            for second in self.tally.seconds:
                self.tally.lag.merge(second.lag)
        self.phase = Phase.OVER
        self._over.set()
        gevent.killall(self._helpers)
        self.tally.never_connected = sum(not device.ready for device in self.devices)
        for device in self.devices:
            device.gone.set()
            self._count_bytes(device)
            device.connection.close()
            device.settle()
        return self.tally

    # What goes on beside

    def _keep_seconds(self) -> None:
        number, cpu = 0, time.process_time()
        while True:
            gevent.sleep(max(0.0, (self.begin_ns + (number + 1) * _SECOND_NS - time.monotonic_ns()) / _SECOND_NS))
            used = time.process_time()
            self.now.cpu_s, cpu = used - cpu, used
            self.now.connected = self.connected
            number += 1
            self.now = self.tally.second(number)

    def _tend(self) -> None:
        while True:
            gevent.sleep(_TEND_S)
            for device in self.devices:
                if device.connection.up:
                    device.connection.tend()

    def _cut(self) -> None:
        self._sleep_until(self.measured_from_ns + int(self.plan.cut_at_s * _SECOND_NS))
        self.breaking, self._up_then = True, self.connected
        self.cut_due.set()
        if self.plan.restart:
            # Whoever started this process sees to it.
            return
        for device in self.devices:
            if device.connection.up:
                self._count_bytes(device)
                device.connection.cut()
                self.broken(device)
                device.gone.set()

    def _renew(self, device: Device) -> None:
        """Renew a device's token by a schedule of its own, whether the answers come in time or not."""
        step = int(self.plan.renew_every_s * _SECOND_NS)
        share = (self.plan.players.index(device.player) * 0.6180339887) % 1
        due_ns = self.begin_ns + int(share * step)
        while due_ns < self.end_ns:
            self._sleep_until(due_ns)
            try:
                device.connection.renew()
            except ConnectError as exc:
                self.tally.renewal_failures[exc.reason] += 1
            else:
                self.tally.renewals += 1
                self.tally.renewal.add(time.monotonic_ns() - due_ns)
            due_ns += step

    def _read_slowly(self, device: Device) -> None:
        while True:
            gevent.sleep(device.player.slow_s)
            device.connection.pause()
            gevent.sleep(device.player.slow_s)
            device.connection.resume()
