# SPDX-License-Identifier: Apache-2.0
"""What devices at work notice when their gateway is restarted, killed, without power, or given new files.

The sharp edges: a PUBACK says that the gateway has a message, not that it is on disk; a reload that drops clients looks
like one that works until somebody counts connections; and a revocation list can close the door on everybody.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bednet import probe
from bednet.probe import NOT_AUTHORIZED, NothingArrivedError, Outcome, Session
from testbed import villains
from tests.live import Site, other_site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from testbed.lab import Host
    from tests.conftest import Plant

pytestmark = pytest.mark.lab

SENSORS = ["temp-101", "temp-102", "temp-103", "vib-111", "plc-1-filler"]
READER = "historian"
# How long one device waits for anything to work again; systemd restarts the broker after a second, paho tries each.
PATIENCE_S = 30.0
ROUND = 25
# Between two messages of a device: without it they outrun one reader, whose queue (1000 messages) then overflows.
PAUSE_S = 0.01
TLS = "/etc/mosquitto/tls"


@dataclass
class Load:
    """Devices that publish at QoS 1, each the next message when the one before is acknowledged, and one that reads all.

    :ivar acknowledged: device -> numbers that the gateway has acknowledged to it.
    :ivar heard: device -> numbers that the reader has got, in order.
    """

    sessions: dict[str, Session]
    reader: Session
    acknowledged: dict[str, list[int]] = field(default_factory=dict)
    heard: dict[str, list[int]] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _moved: threading.Condition = field(default_factory=threading.Condition)
    _failures: list[str] = field(default_factory=list)

    def play(self, device: str) -> None:
        """Publish until told to stop."""
        session, number = self.sessions[device], 0
        topic = f"sensors/{device}/sequence"
        while not self._stop.is_set():
            mid = session.send(topic, b"%d" % number)
            if not self._acknowledge(session, mid):
                self._failures.append(f"{device}: no acknowledgement of {number} within {PATIENCE_S:g} s")
                return
            with self._moved:
                self.acknowledged[device].append(number)
                self._moved.notify_all()
            number += 1
            self._stop.wait(PAUSE_S)

    @staticmethod
    def _acknowledge(session: Session, mid: int) -> bool:
        deadline = time.monotonic() + PATIENCE_S
        while (left := deadline - time.monotonic()) > 0:
            try:
                return session.acknowledged(mid, timeout=left).granted
            except NothingArrivedError:
                # The connection was lost; paho sends the message again when it is back.
                try:
                    session.wait_connections(session.connections + 1, min(left, 1.0))
                except NothingArrivedError:
                    continue
        return False

    def go_on(self, messages: int = ROUND) -> None:
        """Wait until every device has had some more messages acknowledged."""
        with self._moved:
            goal = {device: len(numbers) + messages for device, numbers in self.acknowledged.items()}
            done = self._moved.wait_for(
                lambda: self._failures or all(len(self.acknowledged[name]) >= count for name, count in goal.items()),
                PATIENCE_S,
            )
        assert not self._failures
        assert done, f"devices are stuck: {goal} wanted, { {n: len(a) for n, a in self.acknowledged.items()} } there"

    @property
    def reconnections(self) -> int:
        """How often devices and reader had to come back."""
        return sum(session.connections - 1 for session in [*self.sessions.values(), self.reader])

    def finish(self) -> None:
        """Stop publishing, and collect what the reader got."""
        self._stop.set()

    def collect(self) -> None:
        """Let the reader have what is still on its way, then note what it has."""
        for message in [*self.reader.take(), *self.reader.settle()]:
            device = message.topic.split("/")[1]
            if message.topic == f"sensors/{device}/sequence":
                self.heard.setdefault(device, []).append(int(message.payload))

    @property
    def total(self) -> int:
        """How many messages were acknowledged."""
        return sum(map(len, self.acknowledged.values()))

    @property
    def lost(self) -> int:
        """How many messages were acknowledged and never came to the reader."""
        return sum(len(set(numbers) - set(self.heard.get(name, ()))) for name, numbers in self.acknowledged.items())

    @property
    def doubled(self) -> int:
        """How many messages came more than once, which QoS 1 allows."""
        return sum(len(numbers) - len(set(numbers)) for numbers in self.heard.values())


@contextmanager
def load(plant: Plant, gateway: str = "gateway-1", *, reconnect: bool) -> Iterator[Load]:
    """Let devices work at a gateway; when this ends they have stopped, and what was heard is collected."""
    with ExitStack() as stack:
        with plant.session(READER, gateway):
            pass  # what an earlier test left for it is gone
        how = {"reconnect": reconnect, "timeout": PATIENCE_S}
        reader = stack.enter_context(plant.session(READER, gateway, clean=False, expiry=600, client_id=READER, **how))
        reader.subscribe("sensors/#")
        sessions = {name: stack.enter_context(plant.session(name, gateway, **how)) for name in SENSORS}
        work = Load(sessions, reader, {name: [] for name in SENSORS})
        threads = [threading.Thread(target=work.play, args=(name,)) for name in SENSORS]
        for thread in threads:
            thread.start()
        try:
            work.go_on()
            yield work
            work.go_on()
        finally:
            work.finish()
            for thread in threads:
                thread.join(PATIENCE_S)
        work.collect()
    with plant.session(READER, gateway):
        pass


def main_pid(host: Host) -> str:
    return host.exec(["systemctl", "show", "--property=MainPID", "--value", "mosquitto"]).stdout.strip()


def await_on(host: Host, condition: str, *args: str) -> None:
    """Wait on the host until a shell command says yes; its first argument is $1."""
    loop = f"until {condition}; do sleep 0.05; done"
    host.exec(["sh", "-c", loop, "sh", *args], timeout_s=20)


# What the broker has said since the cursor in $1.
JOURNAL = 'journalctl -u mosquitto --after-cursor="$1" -q -o cat'


def journal_cursor(host: Host) -> str:
    told = host.exec(["journalctl", "-u", "mosquitto", "-n", "0", "--show-cursor", "-q"]).stdout
    return told.split("cursor: ")[-1].strip()


def kill(host: Host) -> None:
    """Kill the broker as a crash does; returns when systemd has started another."""
    pid = main_pid(host)
    host.exec(["kill", "-KILL", pid])
    await_on(
        host,
        'p=$(systemctl show --property=MainPID --value mosquitto); [ "$p" != 0 ] && [ "$p" != "$1" ] && '
        "systemctl is-active --quiet mosquitto",
        pid,
    )


def save(host: Host) -> None:
    """Let the broker write its database now."""
    database = "/var/lib/mosquitto/mosquitto.db"
    host.exec(["rm", "-f", database])
    host.exec(["kill", "-USR1", main_pid(host)])
    await_on(host, f"[ -s {database} ] && ! [ -e {database}.new ]")


# --- restarted, killed, without power


def test_devices_lose_nothing_when_their_gateway_is_restarted(plant: Plant, measured: Callable[[str], None]) -> None:
    host = plant.lab.hosts["gateway-1"]
    with load(plant, reconnect=True) as work:
        begin = time.monotonic()
        host.exec(["systemctl", "restart", "mosquitto"])
        work.go_on()
        gap = time.monotonic() - begin
    assert work.reconnections >= len(SENSORS) + 1
    assert work.lost == 0
    measured(
        f"gateway restarted under load: {work.total} messages acknowledged, {work.lost} lost, {work.doubled} doubled; "
        f"everybody at work again after {gap:.1f} s"
    )


def test_devices_come_back_when_their_gateway_is_killed_and_the_loss_is_counted(
    plant: Plant, measured: Callable[[str], None]
) -> None:
    host = plant.lab.hosts["gateway-1"]
    before = main_pid(host)
    with load(plant, reconnect=True) as work:
        begin = time.monotonic()
        kill(host)
        work.go_on()
        gap = time.monotonic() - begin
    assert main_pid(host) != before
    assert work.reconnections >= len(SENSORS) + 1
    # The reader was there: what may be lost is what was on its way to it, and what the devices published before it was
    # back, as its session was not yet on disk.
    assert work.lost < work.total
    for name in SENSORS:
        assert work.heard[name][-1] == work.acknowledged[name][-1], f"{name} is not heard any more"
    measured(
        f"gateway killed (SIGKILL) under load: {work.total} messages acknowledged, {work.lost} lost, {work.doubled} "
        f"doubled; everybody at work again after {gap:.1f} s"
    )


@pytest.mark.parametrize("end", ["restart", "SIGKILL", "SIGKILL after a save"])
def test_what_waits_for_a_sleeping_device_survives_a_restart_but_a_kill_only_if_it_was_saved(
    plant: Plant, measured: Callable[[str], None], end: str
) -> None:
    """PUBACK goes out before the save: with Mosquitto 2.0, acknowledged is not the same as on disk."""
    host = plant.lab.hosts["gateway-2"]
    count = 50
    with plant.session("plc-2-filler", "gateway-2"):
        pass
    asleep = {"clean": False, "client_id": "plc-2-filler", "expiry": 600}
    with plant.session("plc-2-filler", "gateway-2", **asleep) as plc:
        plc.subscribe("commands/plc-2-filler/#")
    # A killed broker goes back to its last save, with messages of earlier days: these are today's.
    today = [f"{end} {number} {time.monotonic_ns()}".encode() for number in range(count)]
    with plant.session("line-2", "gateway-2") as line:
        for payload in today:
            assert line.publish("commands/plc-2-filler/step", payload).granted
    if end == "restart":
        host.exec(["systemctl", "restart", "mosquitto"])
    else:
        if end == "SIGKILL after a save":
            save(host)
        kill(host)
    with plant.session("plc-2-filler", "gateway-2", **{**asleep, "expiry": 0}) as plc:
        plc.subscribe("commands/plc-2-filler/#")
        lost = len(set(today) - {message.payload for message in plc.settle()})
    assert lost == (count if end == "SIGKILL" else 0)
    measured(f"gateway ended by {end} while {count} acknowledged messages waited for a device: {lost} lost")


def test_a_gateway_that_loses_power_comes_back_and_the_other_one_notices_nothing(
    plant: Plant, measured: Callable[[str], None]
) -> None:
    host = plant.lab.hosts["gateway-2"]
    with (
        plant.session("temp-201", "gateway-1") as neighbour,
        plant.session("temp-202", "gateway-2", reconnect=True, timeout=PATIENCE_S, keepalive=5) as sensor,
    ):
        begin = time.monotonic()
        host.kill()
        assert neighbour.publish("sensors/temp-201/temperature", b"1").granted
        host.start()
        sensor.wait_connections(2, PATIENCE_S)
        assert sensor.publish("sensors/temp-202/temperature", b"2").granted
        gap = time.monotonic() - begin
        assert neighbour.publish("sensors/temp-201/temperature", b"3").granted
        assert neighbour.connections == 1
    measured(f"gateway without power and back: its device at work again after {gap:.1f} s")


# --- new files under load


@contextmanager
def changed(host: Host, path: str, data: bytes, mode: str = "0444") -> Iterator[None]:
    """Give the broker another file and let it reload; afterwards the old one again."""
    before = host.read_file(path)
    host.write_file(path, data, mode=mode, owner="mosquitto:mosquitto")
    try:
        reload(host)
        yield
    finally:
        host.write_file(path, before, mode=mode, owner="mosquitto:mosquitto")
        reload(host)


def reload(host: Host) -> None:
    """Let the broker take up its files; returns when it has said that it does."""
    cursor = journal_cursor(host)
    host.exec(["systemctl", "reload", "mosquitto"])
    await_on(host, f'{JOURNAL} | grep -q "Reloading config"', cursor)


def presented(plant: Plant, gateway: str = "gateway-1") -> x509.Certificate:
    seen = probe.handshake(plant.mtls(gateway), plant.certificate("temp-104"))
    assert seen.certificate is not None, seen
    return x509.load_der_x509_certificate(seen.certificate)


def test_a_gateways_certificate_is_rotated_under_load_and_no_client_is_dropped(
    plant: Plant, measured: Callable[[str], None]
) -> None:
    host, ca = plant.lab.hosts["gateway-1"], plant.lab.hosts["authority"]
    old = presented(plant)
    pid = main_pid(host)
    names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    key = serialization.load_pem_private_key(host.read_file(f"{TLS}/server.key"), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gateway-1")]))
        .add_extension(names.value, critical=False)
        .sign(key, hashes.SHA256())
    )
    left = (old.not_valid_after_utc - plant.now()) / timedelta(days=1)
    request = {
        "name": "gateway-1",
        "csr": csr.public_bytes(serialization.Encoding.PEM).decode(),
        "dns": names.value.get_values_for_type(x509.DNSName),
        "ip": [str(address) for address in names.value.get_values_for_type(x509.IPAddress)],
        "days": left + 2,
        "renew_before_days": left + 1,
        "crl_url": None,
    }
    with load(plant, reconnect=False) as work:
        signed = json.loads(ca.exec(["bednet-ca", "sign-server"], input=json.dumps(request)).stdout)
        host.write_file(f"{TLS}/server.pem", signed["chain"], mode="0400", owner="mosquitto:mosquitto")
        reload(host)
        new = presented(plant)
        work.go_on()
    assert new.serial_number != old.serial_number
    assert new.not_valid_after_utc > old.not_valid_after_utc - timedelta(minutes=1)
    assert main_pid(host) == pid
    assert work.reconnections == 0
    assert work.lost == 0
    measured(
        f"server certificate rotated under load: {work.total} messages acknowledged, {work.lost} lost, "
        f"{work.reconnections} clients dropped"
    )


def test_rights_change_under_load_for_those_connected_and_no_client_is_dropped(
    plant: Plant, measured: Callable[[str], None]
) -> None:
    host = plant.lab.hosts["gateway-1"]

    def change(site: Site) -> None:
        own = "device.id == 'temp-104'"
        site.add_rule("other", when=own, allow={"publish": ["recipes/#"]}, deny={"publish": ["sensors/temp-104/#"]})

    def granted(device: Session) -> tuple[bool, bool]:
        codes = [device.publish(topic, b"1").code for topic in ("sensors/temp-104/temperature", "recipes/x")]
        assert set(codes) <= {0, 0x10, NOT_AUTHORIZED}
        return codes[0] != NOT_AUTHORIZED, codes[1] != NOT_AUTHORIZED

    with load(plant, reconnect=False) as work, plant.session("temp-104") as device:
        cursor = journal_cursor(host)
        assert granted(device) == (True, False)
        with other_site(plant, host, change):
            # At once: whoever has written the store has changed what the next message is held against.
            assert granted(device) == (False, True)
            work.go_on()
        assert granted(device) == (True, False)
        assert device.connections == 1
        said = host.exec(["journalctl", "-u", "mosquitto", f"--after-cursor={cursor}", "-q", "-o", "cat"]).stdout
        assert "Reloading config" not in said
    assert work.reconnections == 0
    assert work.lost == 0
    measured(f"rights changed twice under load: {work.total} messages acknowledged, 0 lost, 0 clients dropped")


def revocation_list(plant: Plant, *serials: int, ends: timedelta = timedelta(days=1)) -> bytes:
    """Sign a revocation list as the CA would, in place of the present one."""
    ca = x509.load_pem_x509_certificate(plant.issuing.certificate)
    key = serialization.load_pem_private_key(plant.issuing.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    now = plant.now()
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.subject)
        .last_update(now - timedelta(days=2))
        .next_update(now + ends)
        .add_extension(x509.CRLNumber(1), critical=False)
    )
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_a_revocation_is_taken_up_under_load_and_no_other_client_is_dropped(plant: Plant) -> None:
    host = plant.lab.hosts["gateway-1"]
    lost = villains.credential_of(plant.issuing, "temp-104", plant.now())
    serial = x509.load_pem_x509_certificate(lost.certificate).serial_number
    credentials = plant.keep("to-be-revoked", lost)
    assert probe.enter(plant.mtls(), credentials).accepted
    with load(plant, reconnect=False) as work:
        with (
            Session(plant.mtls(), credentials) as inside,
            changed(host, f"{TLS}/issuing.crl.pem", revocation_list(plant, serial)),
        ):
            for version in ("1.2", "1.3"):
                seen = probe.handshake(plant.mtls(), credentials, offer=probe.Offer(version, version))
                assert (seen.outcome, seen.reason) == (Outcome.ALERT, "certificate revoked")
            # The list is looked at when a client connects: who is inside stays, unless the store says so too
            # (test_changes.py), which roll-outs see to.
            assert inside.publish("sensors/temp-104/temperature", b"still here").granted
            assert probe.enter(plant.mtls(), plant.certificate("temp-104")).accepted
            work.go_on()
        assert probe.enter(plant.mtls(), credentials).accepted
    assert work.reconnections == 0
    assert work.lost == 0


def test_a_revocation_list_that_has_run_out_lets_nobody_in_and_drops_nobody(plant: Plant) -> None:
    """Fail closed: no device comes in on a list that may hide a revocation; those inside go on."""
    host = plant.lab.hosts["gateway-1"]
    with load(plant, reconnect=False) as work:
        with changed(host, f"{TLS}/issuing.crl.pem", revocation_list(plant, ends=-timedelta(hours=1))):
            seen = probe.handshake(plant.mtls(), plant.certificate("temp-104"))
            assert (seen.outcome, seen.reason) == (Outcome.ALERT, "certificate expired")
            work.go_on()
        assert probe.enter(plant.mtls(), plant.certificate("temp-104")).accepted
    assert work.reconnections == 0


# --- a full disk


@contextmanager
def full_disk(host: Host) -> Iterator[str]:
    """Leave the broker not one byte to write its state to; returns its folder."""
    folder = "/var/lib/mosquitto"
    host.exec(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0777", "full", folder])
    try:
        host.exec(["sh", "-c", f"head -c 1M /dev/zero > {folder}/ballast"], check=False)
        inside = f"/proc/{main_pid(host)}/root{folder}"
        assert host.exec(["df", "--output=avail", inside]).stdout.split()[-1] == "0", "the broker sees another disk"
        yield folder
    finally:
        host.exec(["umount", "--lazy", folder])


def test_a_gateway_with_a_full_disk_keeps_its_site_running(plant: Plant, measured: Callable[[str], None]) -> None:
    host = plant.lab.hosts["gateway-1"]
    pid = main_pid(host)
    with load(plant, reconnect=False) as work:
        with full_disk(host) as folder:
            cursor = journal_cursor(host)
            host.exec(["kill", "-USR1", pid])
            # The save fails with an error or, with less than a buffer (4 KiB) to write, leaves an empty file instead of
            # what was there, without a word.
            await_on(host, f'{JOURNAL} | grep -q "No space left" || [ -e {folder}/mosquitto.db ]', cursor)
            assert host.exec(["find", folder, "-name", "mosquitto.db", "-size", "+0"]).stdout == ""
            work.go_on(100)
            assert probe.enter(plant.mtls(), plant.certificate("temp-104")).accepted
        # With space again, the next save makes up for it: the broker has lost nothing itself.
        save(host)
        work.go_on()
    assert main_pid(host) == pid
    assert work.reconnections == 0
    assert work.lost == 0
    measured(f"gateway with a full disk: {work.total} messages acknowledged, {work.lost} lost, 0 clients dropped")


def test_a_gateway_with_a_full_disk_can_be_restarted(plant: Plant) -> None:
    host = plant.lab.hosts["gateway-2"]
    try:
        with full_disk(host):
            host.exec(["systemctl", "restart", "mosquitto"])
            with plant.session("temp-201", "gateway-2") as sensor:
                assert sensor.publish("sensors/temp-201/temperature", b"1").granted
                assert sensor.publish("sensors/temp-202/temperature", b"1").code == NOT_AUTHORIZED
    finally:
        # It runs on the disk that is no longer there.
        host.exec(["systemctl", "restart", "mosquitto"])
