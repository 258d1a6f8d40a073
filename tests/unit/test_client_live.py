# SPDX-License-Identifier: Apache-2.0
"""bednet.client over real connections: its files are renewed under it, its service fails, and it goes on by itself.

The sharp edges: a certificate that is renewed in place and locks its device out, a file that is half written when it is
read, and a renewing thread that dies without a word.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from bednet import client as module
from bednet.client import TokenClient, TokenError, TokenSource
from tests.plugin.pki import Authority, Issued
from tests.unit.live_site import DEADLINE_S, LOCAL, Broker, Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

QUICK_S = 0.05


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA, for the tests of this file."""
    return Authority.make(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def service(authority: Authority) -> Iterator[Service]:
    """A token service, for one test."""
    with Service(authority) as service:
        yield service


@pytest.fixture
def broker(authority: Authority) -> Iterator[Broker]:
    """A gateway, for one test."""
    with Broker(authority) as broker:
        yield broker


class Device:
    """A device with a certificate, and a client that is not connected yet; a context manager."""

    def __init__(self, authority: Authority, service: Service, folder: Path) -> None:
        self.authority, self.folder = authority, folder
        self.certificate, self.key = folder / "certificate.pem", folder / "key.pem"
        self.renew_files()
        self.source = TokenSource(
            "edge-1", service.issuer, "tls_client_auth", authority.folder / "ca.pem", self.certificate, self.key
        )
        self.told: list[float | TokenError] = []
        self.connected = 0
        self._changed = threading.Condition()
        self.client = TokenClient(self.source, on_renewed=self.hear)
        self.client.on_connect = self._in
        self.client.reconnect_delay_set(0, 1)

    def hear(self, what: float | TokenError) -> None:
        with self._changed:
            self.told.append(what)
            self._changed.notify_all()

    def _in(self, *_: Any) -> None:
        with self._changed:
            self.connected += 1
            self._changed.notify_all()

    def renew_files(self, key: rsa.RSAPrivateKey | None = None) -> Issued:
        """Put another certificate, with another key, in the place of the one that is there."""
        issued = self.authority.device("edge-1", key=key)
        for made, place in ((issued.credentials.certificate, self.certificate), (issued.credentials.key, self.key)):
            assert made is not None
            draft = place.with_suffix(".new")
            shutil.copy(made, draft)
            draft.replace(place)
        return issued

    def until(self, ready: Callable[[], object], what: str) -> None:
        with self._changed:
            assert self._changed.wait_for(ready, DEADLINE_S), f"{what} does not happen: {self.told}"

    def go(self, broker: Broker) -> None:
        self.client.connect(LOCAL, broker.port)
        self.client.loop_start()
        self.until(lambda: self.connected, "a connection")

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()
        # paho's pair of sockets.
        self.client.on_connect = None


@pytest.fixture
def device(authority: Authority, service: Service, broker: Broker, tmp_path: Path) -> Iterator[Device]:
    """A device, for one test; it goes before those that it talks to."""
    with Device(authority, service, tmp_path) as device:
        yield device


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewals that failed are tried again soon."""
    monkeypatch.setattr(module, "RETRY_SECONDS", QUICK_S)


# --- a certificate that is renewed in place


@pytest.mark.parametrize("kind", ["of the same kind", "of another kind"])
def test_a_renewed_certificate_is_taken_up_by_the_next_renewal(
    device: Device, service: Service, broker: Broker, kind: str
) -> None:
    """The gateway knows the old one, so a token that is bound to the new one would be refused in this session."""
    device.go(broker)
    device.client.renew()
    device.until(lambda: len(device.told) == 1, "a renewal in the session")
    key = rsa.generate_private_key(65537, 2048) if kind == "of another kind" else None
    device.renew_files(key)
    device.client.renew()
    device.until(lambda: len(device.told) == 2, "a renewal by a new connection")
    device.client.renew()
    device.until(lambda: len(device.told) == 3, "a renewal in the new session")
    old, new = service.given[0], service.given[-1]
    assert old != new
    assert broker.events == [
        ("connect", old, True),
        ("renewed", old),
        # With a word, so that no will is sent, and back without a clean start: the session is kept.
        ("goodbye",),
        ("connect", new, False),
        ("renewed", new),
    ]
    assert device.told == [900.0] * 3
    assert (device.client.renewals, device.connected) == (3, 2)
    # One token for each renewal: that of the second is the one that the new connection began with.
    assert service.given == [old, old, new, new]


def test_a_connection_that_is_lost_comes_back_with_the_renewed_certificate_and_a_token_for_it(
    device: Device, service: Service, broker: Broker
) -> None:
    device.go(broker)
    device.renew_files()
    broker.drop()
    device.until(lambda: device.connected == 2, "a new connection")
    old, new = service.given
    assert [event for event in broker.events if event[0] != "lost"] == [("connect", old, True), ("connect", new, False)]


def test_a_connection_that_is_lost_comes_back_with_the_token_that_it_has(
    device: Device, service: Service, broker: Broker
) -> None:
    device.go(broker)
    broker.drop()
    device.until(lambda: device.connected == 2, "a new connection")
    assert len(service.given) == 1


def test_a_half_renewed_pair_of_files_breaks_nothing_and_is_read_again(
    device: Device, broker: Broker, quick: None
) -> None:
    device.go(broker)
    old = device.key.read_bytes()
    device.renew_files()
    new = device.key.read_bytes()
    device.key.write_bytes(old)
    device.client._renew_in(0)
    device.until(lambda: len(device.told) >= 2, "two renewals that fail")
    assert broker.kinds() == ["connect"]
    device.key.write_bytes(new)
    device.until(lambda: device.told[-1] == 900.0, "a renewal")
    assert {error.error for error in device.told[:-1] if isinstance(error, TokenError)} == {"files"}
    assert broker.kinds() == ["connect", "goodbye", "connect"]


def test_names_are_checked_as_paho_was_told(device: Device, broker: Broker) -> None:
    """Its tls_insecure_set goes by the settings that it was given once."""
    with socket.create_connection((LOCAL, broker.port)) as plain, pytest.raises(ssl.SSLError, match="localhost"):
        device.client._tls.wrap_socket(plain, server_hostname="localhost")
    device.client.tls_insecure_set(True)
    device.client.connect("localhost", broker.port)
    device.client.loop_start()
    device.until(lambda: device.connected, "a connection")


def test_what_connect_is_told_counts_for_each_connection(device: Device, broker: Broker) -> None:
    """Beside the token, that is: without its expiry no session is kept."""
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call] # paho leaves it open
    properties.SessionExpiryInterval = 60
    device.client.connect(LOCAL, broker.port, properties=properties)
    device.client.loop_start()
    device.until(lambda: device.connected, "a connection")
    device.renew_files()
    device.client.renew()
    device.until(lambda: device.connected == 2, "a new connection")
    assert broker.expiries == [60, 60]


# --- what cannot be read

ENCRYPTED = serialization.BestAvailableEncryption(b"a password")


def encrypted() -> bytes:
    """Return a key that takes a password."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, ENCRYPTED)


@pytest.mark.parametrize("method", ["tls_client_auth", "private_key_jwt"])
@pytest.mark.parametrize("key", [b"", b"-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49", None, "encrypted"])
def test_a_key_that_cannot_be_read_is_told_with_its_file_and_a_cure(
    device: Device, method: str, key: bytes | str | None
) -> None:
    certificate = device.certificate if method == "tls_client_auth" else None
    source = TokenSource("edge-1", "https://127.0.0.1:1", method, device.source.ca, certificate, device.key)
    if key is None:
        device.key.unlink()
    else:
        device.key.write_bytes(encrypted() if isinstance(key, str) else key)
    with pytest.raises(TokenError, match=r"key\.pem.*: cannot be read: .*\. Cure: put the files") as caught:
        source.get()
    assert (caught.value.error, caught.value.again) == ("files", True)
    assert "MIGHAgEAMBMGByqGSM49" not in str(caught.value)


def test_a_secret_or_a_ca_that_cannot_be_read_is_told_likewise(device: Device, service: Service) -> None:
    secret = device.folder / "client_secret"
    source = TokenSource("edge-2", service.issuer, "client_secret_basic", device.source.ca, client_secret=secret)
    with pytest.raises(TokenError, match=r"client_secret: cannot be read: No such file or directory\. Cure: put"):
        source.get()
    secret.write_bytes(b"\xff\xfe")
    with pytest.raises(TokenError, match=r"client_secret: cannot be read: 'utf-8' codec"):
        source.get()
    secret.write_text("a secret")
    empty = device.folder / "ca.pem"
    empty.touch()
    other = TokenSource("edge-2", service.issuer, "client_secret_basic", empty, client_secret=secret)
    with pytest.raises(TokenError, match=r"ca\.pem: cannot be read"):
        other.get()
    assert service.given == []


# --- renewing by itself


def test_a_token_is_renewed_by_itself_when_half_of_its_life_is_over(
    device: Device, service: Service, broker: Broker
) -> None:
    service.seconds = 4.0
    begin = time.monotonic()
    device.go(broker)
    device.until(lambda: len(device.told) == 2, "two renewals")
    assert device.told == [4.0, 4.0]
    # Two seconds for each, of tokens that were asked for a moment before.
    assert 3.9 < time.monotonic() - begin < 8.0
    assert broker.kinds() == ["connect", "renewed", "renewed"]


def test_a_service_that_fails_twice_costs_no_connection(
    device: Device, service: Service, broker: Broker, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    service.seconds = 1.0
    device.go(broker)
    service.failing = 2
    device.until(lambda: 1.0 in device.told, "a renewal")
    errors = device.told[: device.told.index(1.0)]
    assert [error.error for error in errors if isinstance(error, TokenError)] == ["temporarily_unavailable"] * 2
    assert broker.kinds()[:2] == ["connect", "renewed"]
    assert device.connected == 1
    told = [record for record in caplog.records if "no new token" in record.message]
    assert len(told) == 2


def test_a_service_that_nobody_answers_for_is_asked_until_it_does(
    device: Device, service: Service, broker: Broker, quick: None
) -> None:
    device.go(broker)
    service.stop()
    device.client._renew_in(0)
    device.until(lambda: len(device.told) >= 2, "two failures")
    for error in device.told:
        assert isinstance(error, TokenError)
        assert (error.error, error.again) == ("unreachable", True)
        assert isinstance(error.__cause__, ConnectionRefusedError)
    info = device.client.publish("sensors/edge-1/t", b"1", qos=1)
    info.wait_for_publish(DEADLINE_S)
    assert info.is_published()
    service.start()
    device.until(lambda: device.told[-1] == 900.0, "a renewal")
    assert (broker.kinds(), device.connected) == (["connect", "renewed"], 1)


def test_whatever_happens_the_next_renewal_comes(
    device: Device, broker: Broker, quick: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device.go(broker)
    good, left = TokenSource.get, [RuntimeError("words that may be a secret's"), KeyError("others"), MemoryError()]

    def get(source: TokenSource) -> Any:
        if left:
            raise left.pop(0)
        return good(source)

    monkeypatch.setattr(TokenSource, "get", get)
    device.client._renew_in(0)
    device.until(lambda: device.told and device.told[-1] == 900.0, "a renewal")
    errors = device.told[:-1]
    for error, kind in zip(errors, (RuntimeError, KeyError, MemoryError), strict=True):
        assert isinstance(error, TokenError)
        assert (error.error, error.again, type(error.__cause__)) == ("unexpected", True, kind)
        assert f"{kind.__name__} in get (" in str(error)
        assert "Cure: " in str(error)
    assert caplog.text.count("no new token") == 3
    assert "secret's" not in caplog.text
    assert (broker.kinds(), device.connected) == (["connect", "renewed"], 1)


def test_a_reconnect_survives_whatever_happens(device: Device, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of anything but an OSError paho's thread would die."""
    device.go(broker)
    good, left = TokenSource.get, [RuntimeError("never seen before")]

    def get(source: TokenSource) -> Any:
        if left:
            raise left.pop(0)
        return good(source)

    monkeypatch.setattr(TokenSource, "get", get)
    device.client._token = None
    broker.drop()
    device.until(lambda: device.connected == 2, "a new connection")
    assert left == []


def test_a_callback_that_fails_ends_nothing(
    device: Device, service: Service, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    service.seconds = 0.6
    seen = threading.Semaphore(0)

    def fail(_what: object) -> None:
        seen.release()
        raise RuntimeError("of the application")

    device.client._on_renewed = fail
    device.go(broker)
    for _ in range(2):
        assert seen.acquire(timeout=DEADLINE_S)
    assert "on_renewed fails" in caplog.text
    assert (broker.kinds()[:2], device.connected) == (["connect", "renewed"], 1)


def test_a_renewal_that_the_gateway_does_not_take_is_tried_again(device: Device, broker: Broker, quick: None) -> None:
    device.go(broker)
    broker.answers = 0x83
    device.client.renew()
    device.until(lambda: device.told, "an error")
    broker.answers = 0x00
    device.until(lambda: device.told[-1] == 900.0, "a renewal")
    assert isinstance(device.told[0], TokenError)
    assert device.told[0].error == "refused"
    assert "0x83" in str(device.told[0])


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Callable[[], None]]]:
    """Timers that wait for a test to let them go off: how long they would have waited, and what they do."""
    made: list[tuple[float, Callable[[], None]]] = []

    class Timer:
        daemon = False

        def __init__(self, seconds: float, do: Callable[[], None]) -> None:
            made.append((seconds, do))

        def start(self) -> None: ...

        def cancel(self) -> None: ...

    monkeypatch.setattr(threading, "Timer", Timer)
    return made


def test_waits_between_renewals_that_fail_grow_and_have_a_bound(
    device: Device, service: Service, broker: Broker, timers: list[tuple[float, Callable[[], None]]]
) -> None:
    device.go(broker)
    device.client._renew_in(0)
    service.failing = 8
    for _ in range(8):
        timers[-1][1]()
    assert [seconds for seconds, _ in timers[-8:]] == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    timers[-1][1]()
    device.until(lambda: device.told[-1] == 900.0, "a renewal")
    # After a success it begins anew.
    assert timers[-1][0] == 450.0
    service.failing = 1
    timers[-1][1]()
    assert timers[-1][0] == 2.0


def test_a_service_that_wants_to_be_left_alone_is(
    device: Device, service: Service, broker: Broker, timers: list[tuple[float, Callable[[], None]]]
) -> None:
    """RFC 9110, 10.2.3."""
    device.go(broker)
    device.client._renew_in(0)
    service.failing, service.wait = 2, 30
    timers[-1][1]()
    timers[-1][1]()
    # What is doubled each time is less, and is still counted.
    assert [seconds for seconds, _ in timers[-2:]] == [30.0, 30.0]
    service.failing, service.wait = 4, 1
    for _ in range(4):
        timers[-1][1]()
    assert [seconds for seconds, _ in timers[-4:]] == [8.0, 16.0, 32.0, 60.0]
    timers[-1][1]()
    device.until(lambda: device.told[-1] == 900.0, "a renewal")


def test_a_connection_that_is_lost_does_not_ask_sooner_than_the_service_wants(
    device: Device, service: Service, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    """Paho connects again after a second: with the token that it has, or else when the service may be asked."""
    device.go(broker)
    service.failing, service.wait = 1, 3
    device.client._token = None
    asked, begin = service.asked, time.monotonic()
    broker.drop()
    device.until(lambda: device.connected == 2, "a new connection")
    assert time.monotonic() - begin >= 3.0
    assert service.asked == asked + 2
    told = [record.message for record in caplog.records if "no token to connect with" in record.message]
    assert len(told) >= 2
    assert "s to wait" in told[-1]


def test_gateway_that_refuses_renewals_uses_up_no_tokens(
    device: Device, service: Service, broker: Broker, timers: list[tuple[float, Callable[[], None]]]
) -> None:
    """A device has so many in its life. The service gives one each time, so its word does not end the waiting."""
    device.go(broker)
    broker.answers = 0x87
    device.client._renew_in(0)
    for number in range(1, 7):
        timers[-1][1]()
        device.until(lambda count=number: len(device.told) == count, "a refusal")  # type: ignore[misc]
    assert [seconds for seconds, _ in timers[-6:]] == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0]
    assert {error.error for error in device.told if isinstance(error, TokenError)} == {"refused"}
    # Nor does a new connection, with a token that is past its half.
    device.client._token = replace(device.source.get(), begin=time.monotonic() - 600)
    broker.drop()
    device.until(lambda: device.connected == 2, "a new connection")
    deadline = time.monotonic() + DEADLINE_S
    while len(timers) < 8:
        assert time.monotonic() < deadline, "no renewal is planned"
        time.sleep(0.01)
    assert timers[-1][0] == 60.0
    broker.answers = 0
    timers[-1][1]()
    device.until(lambda: device.told[-1] == 900.0, "a renewal")
    assert timers[-1][0] == 450.0


def test_after_good_bye_nothing_is_renewed(
    device: Device, service: Service, broker: Broker, timers: list[tuple[float, Callable[[], None]]]
) -> None:
    device.go(broker)
    broker.until(lambda: broker.events, "a connection")
    device.client.disconnect()
    count = len(timers)
    service.failing = 1
    timers[-1][1]()
    assert isinstance(device.told[-1], TokenError)
    assert len(timers) == count


def test_a_token_that_is_past_its_half_when_a_connection_begins_is_renewed_at_once(
    device: Device, broker: Broker, timers: list[tuple[float, Callable[[], None]]]
) -> None:
    """Not before the gateway has answered: a renewal would find no connection, and nobody would ask for the next."""
    device.client._token = replace(device.source.get(), begin=time.monotonic() - 600)
    device.client.connect(LOCAL, broker.port)
    assert timers == []
    deadline = time.monotonic() + DEADLINE_S
    while not timers:
        assert time.monotonic() < deadline, "no renewal is planned"
        device.client.loop(0.1)
    assert [seconds for seconds, _ in timers] == [0.0]
    timers[0][1]()
    while not device.told:
        assert time.monotonic() < deadline, "the renewal is not answered"
        device.client.loop(0.1)
    assert device.told == [900.0]
    assert broker.kinds() == ["connect", "renewed"]
