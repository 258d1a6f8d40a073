# SPDX-License-Identifier: Apache-2.0
"""What an attacker in the plant's network can read, change, and send again: nothing that helps.

The sharp edge: an attack that fails because it was done badly proves nothing. Each one here has a control, in which the
same attack on a broker without a net, or on a client that checks nothing, does succeed.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from bednet import probe
from bednet.probe import Listener, Session
from testbed.attacker import plaintext_gateway

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.attacker import Attacker
    from testbed.lab import Host, Result
    from tests.conftest import Plant

pytestmark = pytest.mark.lab

FOLDER = "/run/wire"
SENSOR = "temp-101"
METER = "energy-1"
OPENSSL_CONF = """\
openssl_conf = init
[init]
ssl_conf = modules
[modules]
system_default = limits
[limits]
MinProtocol = TLSv{version}
MaxProtocol = TLSv{version}
"""


@dataclass(frozen=True)
class Victim:
    """The host of the plant's devices, with mosquitto_pub and two devices' credentials."""

    host: Host
    gateway: Host

    def publish(
        self, *options: str, port: int, topic: str, payload: str, tls: str = "1.3", config: str = FOLDER
    ) -> Result:
        """Publish one message as a device does; credentials come from files.

        :param config: where mosquitto_pub's own configuration file lies, with user name and password.
        """
        return self.host.exec(
            ["mosquitto_pub", "-h", self.gateway.address, "-p", str(port), "-q", "1", "-t", topic, "-s", *options],
            input=payload,
            check=False,
            environment={"XDG_CONFIG_HOME": config, "OPENSSL_CONF": f"{FOLDER}/tls-{tls}.cnf"},
            timeout_s=30,
        )

    def with_certificate(self, payload: str, tls: str = "1.3") -> Result:
        """Publish as the sensor."""
        files = ["--cafile", f"{FOLDER}/ca.pem", "--cert", f"{FOLDER}/certificate.pem", "--key", f"{FOLDER}/key.pem"]
        topic = f"sensors/{SENSOR}/temperature"
        return self.publish(
            *files, "-i", SENSOR, port=8883, topic=topic, payload=payload, tls=tls, config="/nonexistent"
        )

    def with_password(self, payload: str, tls: str = "1.3") -> Result:
        """Publish as the meter; mosquitto_pub reads user name and password from its own configuration file."""
        options = ("--cafile", f"{FOLDER}/ca.pem", "-i", METER)
        return self.publish(*options, port=8884, topic=f"factory/hall-1/energy/{METER}", payload=payload, tls=tls)


def secret(plant: Plant) -> str:
    password = plant.password(METER).password
    assert isinstance(password, str)
    return password


@pytest.fixture(scope="module")
def victim(plant: Plant) -> Iterator[Victim]:
    """A host with devices, for this module's tests."""
    host = plant.lab.hosts["devices"]
    host.exec(["mkdir", "-p", "-m", "0700", FOLDER])
    for name in ("ca.pem", "certificate.pem", "key.pem"):
        host.write_file(f"{FOLDER}/{name}", (plant.folder / SENSOR / name).read_bytes(), mode="0600")
    host.write_file(f"{FOLDER}/mosquitto_pub", f"-u {METER}\n-P {secret(plant)}\n", mode="0600")
    # mosquitto_pub's own option for TLS 1.2 allows 1.3 as well.
    for version in ("1.2", "1.3"):
        host.write_file(f"{FOLDER}/tls-{version}.cnf", OPENSSL_CONF.format(version=version))
    yield Victim(host, plant.lab.hosts["gateway-1"])
    host.exec(["rm", "-rf", FOLDER])


@pytest.fixture
def payload() -> str:
    """A message that is nowhere else."""
    return f"the recipe is {secrets.token_hex(8)}"


def test_the_attacker_reads_what_is_not_encrypted(victim: Victim, attacker: Attacker, payload: str) -> None:
    """The control of the next tests: the attacker is on the path, and the search finds what is there."""
    with (
        plaintext_gateway(victim.gateway) as port,
        attacker.on_path("devices", "gateway-1"),
        attacker.sniff(f"tcp port {port}") as capture,
    ):
        told = victim.publish(port=port, topic=f"sensors/{SENSOR}/temperature", payload=payload)
        assert told.rc == 0, told.stderr
    assert capture.contains(payload.encode())
    assert capture.contains(f"sensors/{SENSOR}/temperature".encode())
    assert capture.contains(METER.encode())  # user name and password go with it


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_nothing_is_readable_on_the_wire(
    plant: Plant, victim: Victim, attacker: Attacker, payload: str, version: str
) -> None:
    with plant.session("historian") as historian:
        historian.subscribe("#")
        with attacker.on_path("devices", "gateway-1"), attacker.sniff("tcp port 8883 or tcp port 8884") as capture:
            for told in (victim.with_certificate(payload, version), victim.with_password(payload, version)):
                assert told.rc == 0, told.stderr
        # It did go over that wire ...
        assert [message.payload.decode() for message in historian.settle()] == [payload, payload]
    assert capture.pcap.count(b"\x16\x03\x01") >= 2  # two ClientHellos
    # ... and is not to be found there.
    for words in (payload, payload[-16:], "sensors/", "factory/", METER, secret(plant)):
        assert not capture.contains(words.encode()), words
    # In TLS 1.2 the client's certificate is sent in the clear, and its name with it; in 1.3 it is not.
    assert capture.contains(SENSOR.encode()) is (version == "1.2")


def test_a_man_in_the_middle_with_a_false_ca_fails(
    plant: Plant, victim: Victim, attacker: Attacker, payload: str
) -> None:
    with plant.session("historian") as historian:
        historian.subscribe("#")
        with attacker.in_the_middle("devices", "gateway-1", 8884, tls=True) as middle:
            told = victim.with_password(payload)
            event = middle.await_event("refused", "handshake")
        assert historian.settle() == []
    assert told.rc != 0
    assert event["event"] == "refused"
    # The victim's last word: who signed this is unknown or, since the false CA bears our CA's name, has not signed it.
    assert re.search(r"(?i)unknown.ca|decrypt.error", event["reason"]), event
    assert middle.client_pieces() == []
    assert victim.with_password(payload).rc == 0  # without the man in the middle it works


def test_a_man_in_the_middle_reads_a_client_that_checks_nothing(
    plant: Plant, victim: Victim, attacker: Attacker
) -> None:
    """The control: the middle is real, and a client without a CA falls for it."""
    password = secret(plant)
    hello = probe.connect_packet(METER, username=METER, password=password, version=4)
    careless = (
        "import socket, ssl, sys\n"
        "context = ssl._create_unverified_context()\n"
        f"with socket.create_connection(('{victim.gateway.address}', 8884), 10) as raw:\n"
        "    with context.wrap_socket(raw) as tls:\n"
        "        tls.sendall(sys.stdin.buffer.read())\n"
        "        print(tls.recv(4).hex())\n"
    )
    with attacker.in_the_middle("devices", "gateway-1", 8884, tls=True) as middle:
        told = victim.host.exec(["python3", "-c", careless], input=hello, timeout_s=30)
        assert middle.await_event("refused", "handshake")["event"] == "handshake"
        assert password.encode() in b"".join(middle.client_pieces())
    assert told.stdout.strip() == "20020000"  # the gateway let the man in the middle in, with our password


def test_what_was_recorded_cannot_be_sent_again(plant: Plant, victim: Victim, attacker: Attacker, payload: str) -> None:
    with plant.session("historian") as historian:
        historian.subscribe("#")
        for port, publish in ((8883, victim.with_certificate), (8884, victim.with_password)):
            with attacker.in_the_middle("devices", "gateway-1", port, tls=False) as middle:
                told = publish(payload)
                assert told.rc == 0, told.stderr
                middle.await_event("end")
                pieces = middle.client_pieces()
            assert [message.payload.decode() for message in historian.settle()] == [payload]
            assert sum(map(len, pieces)) > 500  # a whole conversation
            replayed = attacker.replay("gateway-1", port, pieces)
            assert replayed.end != "open"
            # A handshake was begun, with other randoms; nothing of what was replayed is good in it.
            assert replayed.answer[:1] == b"\x16"
            assert historian.settle() == []


def test_what_was_recorded_without_tls_can_be_sent_again(victim: Victim, attacker: Attacker, payload: str) -> None:
    """The control: on a broker without a net the same replay is a second message."""
    with (
        plaintext_gateway(victim.gateway) as port,
        Session(Listener(victim.gateway.address, port, tls=False)) as reader,
    ):
        reader.subscribe("#")
        with attacker.in_the_middle("devices", "gateway-1", port, tls=False) as middle:
            told = victim.publish(port=port, topic="sensors/x", payload=payload)
            assert told.rc == 0, told.stderr
            middle.await_event("end")
            pieces = middle.client_pieces()
        attacker.replay("gateway-1", port, pieces)
        heard = [message.payload.decode() for message in reader.settle()]
    assert heard == [payload, payload]


@pytest.mark.parametrize("change", ["a bit flipped", "sent twice", "cut short and mended"])
def test_a_message_that_was_changed_on_its_way_ends_the_connection(plant: Plant, payload: str, change: str) -> None:
    topic = f"sensors/{SENSOR}/temperature"
    with plant.session("historian") as historian:
        historian.subscribe("#")
        with probe.dial(plant.mtls(), plant.certificate(SENSOR)) as wire:
            wire.send(probe.connect_packet(SENSOR))
            assert wire.packet()[3] == 0
            records = wire.seal(probe.publish_packet(topic, payload.encode()))
            if change == "a bit flipped":
                wire.send_sealed(records[:-1] + bytes([records[-1] ^ 0x01]))
            elif change == "sent twice":
                wire.send_sealed(records)
                assert wire.packet()[0] == 0x40  # the PUBACK of the true one
                wire.send_sealed(records)
            else:
                wire.send_sealed(records[:3] + (len(records) - 6).to_bytes(2) + records[5:-1])
            with pytest.raises(OSError, match=r"(?i)bad.record.mac"):
                wire.receive()
        with plant.session(SENSOR) as sensor:
            assert sensor.publish(topic, b"fence").granted
        heard = [message.payload.decode() for message in historian.settle()]
    assert heard == ([payload, "fence"] if change == "sent twice" else ["fence"])


def test_messages_arrive_as_they_were_sent(plant: Plant) -> None:
    """The control: bytes of every kind come through unchanged."""
    with plant.session("historian") as historian, plant.session(SENSOR) as sensor:
        historian.subscribe("#")
        sent = [bytes(range(256)), b"", b"\0", secrets.token_bytes(60000), json.dumps({"t": 21.5}).encode()]
        for data in sent:
            assert sensor.publish(f"sensors/{SENSOR}/raw", data).granted
        assert [message.payload for message in historian.settle()] == sent
