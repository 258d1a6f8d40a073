# SPDX-License-Identifier: Apache-2.0
"""What the suite of tokens shares: the lab's token service, and the devices that get tokens from it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from bednet.client import Token, TokenClient, TokenError, TokenSource
from bednet.probe import Credentials
from tests.base64url import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from bednet.probe import Listener
    from testbed.lab import Host
    from tests.conftest import Plant

DEADLINE_S = 10.0
#: Of a playbook: a host that was disconnected is given up at once, over no connection that was kept either.
QUICK = {"ANSIBLE_TIMEOUT": "3", "ANSIBLE_SSH_RETRIES": "0", "ANSIBLE_SSH_ARGS": "-o ConnectTimeout=3"}


def claims(token: Token | str) -> dict[str, Any]:
    """Read what a token says."""
    return _part(token, 1)


def header(token: Token | str) -> dict[str, Any]:
    """Read what a token says of itself: how it is signed, and with which key."""
    return _part(token, 0)


def _part(token: Token | str, number: int) -> dict[str, Any]:
    part = (token if isinstance(token, str) else token.text).split(".")[number]
    told: dict[str, Any] = json.loads(decode(part))
    return told


@dataclass(frozen=True)
class Tokens:
    """The token service of the lab."""

    plant: Plant

    @property
    def host(self) -> Host:
        """Its host."""
        return self.plant.lab.hosts["gateway-1"]

    def source(self, device: str, **more: Any) -> TokenSource:
        """Return where a device gets its tokens."""
        return TokenSource.of_bundle(self.plant.folder / device, address=self.host.address, **more)

    def is_bound(self, device: str) -> bool:
        """Whether its tokens are of use only together with its certificate."""
        return self.source(device).is_bound

    def listener(self, device: str, gateway: str = "gateway-1") -> Listener:
        """Return where a device shows its tokens."""
        return self.plant.mtls(gateway) if self.is_bound(device) else self.plant.passwords(gateway)

    def credentials(self, device: str, token: Token) -> Credentials:
        """Return what it shows there."""
        if not self.is_bound(device):
            return Credentials(username=device, password=token.text)
        own = self.plant.certificate(device)
        return Credentials(own.certificate, own.key, username=device, password=token.text)

    def tool(self, *words: str) -> dict[str, Any]:
        """Run the service's tool on its host."""
        told: dict[str, Any] = json.loads(self.host.exec(["bednet-token-service", *words]).stdout)
        return told

    def kids(self, gateway: str) -> set[str]:
        """Name the keys of the service that a gateway's store has."""
        issuer = str(self.tool("status")["issuer"])
        told = json.loads(self.plant.lab.hosts[gateway].exec(["bednet-store", "kids", issuer]).stdout)
        return set(told["kids"])

    def onboard(self, device: str) -> dict[str, Any]:
        """Let a device ask to be let in, by its name alone (RFC 8628, 3.1); returns its codes, which go nowhere."""
        source = self.source(device)
        where = urlsplit(source.issuer)
        connection = http.client.HTTPSConnection(str(where.hostname), where.port, timeout=DEADLINE_S)
        with contextlib.closing(connection):
            plain = socket.create_connection((self.host.address, connection.port), DEADLINE_S)
            connection.sock = source.context().wrap_socket(plain, server_hostname=connection.host)
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            connection.request("POST", "/device_authorization", urlencode({"client_id": device}), headers)
            told: dict[str, Any] = json.load(connection.getresponse())
        assert "device_code" in told, told
        return told

    def why_none(self, device: str) -> TokenError:
        """Return why a device gets no token."""
        with pytest.raises(TokenError) as caught:
            self.source(device).get()
        return caught.value

    def await_health(self) -> None:
        """Wait until it gives tokens again."""
        deadline = time.monotonic() + 20
        while True:
            try:
                self.source("edge-2").get()
            except TokenError:
                assert time.monotonic() < deadline, "the token service does not come back"
                time.sleep(0.2)
            else:
                return


class Connected:
    """A device with bednet.client, as a context manager: entered when it is let in.

    :param expiry: for how many seconds the gateway keeps its session when it is gone.
    :param how: parameters of its source of tokens, instead of what its bundle says.
    :ivar resumed: for each connection whether it found its session.
    """

    def __init__(
        self, tokens: Tokens, device: str, gateway: str = "gateway-1", *subscriptions: str, expiry: int = 0, **how: Any
    ) -> None:
        self.renewed: list[float | TokenError] = []
        self.heard: list[bytes] = []
        self.lost: list[str] = []
        self.resumed: list[bool] = []
        self.connections = 0
        self._expiry = expiry
        self._changed = threading.Condition()
        source = tokens.source(device, **how)
        self.client = TokenClient(source, on_renewed=self._note(self.renewed))
        self.client.on_connect = self._connected
        self.client.on_message = self._received
        self.client.on_disconnect = self._disconnected
        self._subscriptions = subscriptions
        listener = (tokens.plant.mtls if source.is_bound else tokens.plant.passwords)(gateway)
        self._where = listener.host, listener.port

    def _note(self, notes: list[Any]) -> Callable[[Any], None]:
        def note(what: Any) -> None:
            with self._changed:
                notes.append(what)
                self._changed.notify_all()

        return note

    def _connected(self, client: Any, _data: Any, flags: Any, reason: Any, _more: Any) -> None:
        if not reason.is_failure:
            self.resumed.append(flags.session_present)
            for topic in self._subscriptions:
                client.subscribe(topic, qos=1)
            with self._changed:
                self.connections += 1
                self._changed.notify_all()

    def _received(self, _client: Any, _data: Any, message: Any) -> None:
        self._note(self.heard)(message.payload)

    def _disconnected(self, _client: Any, _data: Any, _flags: Any, reason: Any, _more: Any) -> None:
        self._note(self.lost)(str(reason))

    def until(self, ready: Callable[[], object], what: str) -> None:
        """Wait for something that it notes."""
        with self._changed:
            assert self._changed.wait_for(ready, DEADLINE_S), f"{what} does not happen: {self.lost} {self.renewed}"

    def await_return(self) -> None:
        """Wait until its session was ended, and the next began."""
        self.until(lambda: self.lost, "the end of the session")
        self.until(lambda: self.connections > 1, "a new session")

    def await_renewals(self, count: int) -> None:
        """Wait until its token was renewed so many times."""
        self.until(lambda: len(self.renewed) >= count, "a renewal")

    def publish(self, topic: str, payload: bytes) -> bool:
        """Publish, and say whether the gateway took it."""
        info = self.client.publish(topic, payload, qos=1)
        info.wait_for_publish(DEADLINE_S)
        return info.is_published()

    def __enter__(self) -> Connected:
        self.client.reconnect_delay_set(1, 2)
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call] # paho leaves it open
        properties.SessionExpiryInterval = self._expiry
        self.client.connect(*self._where, properties=properties)
        self.client.loop_start()
        self.until(lambda: self.connections, "a connection")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture(scope="session")
def tokens(plant: Plant) -> Tokens:
    """The lab's token service, for the whole run."""
    return Tokens(plant)


@pytest.fixture
def again(tokens: Tokens) -> Iterator[None]:
    """Whatever a test does to the service: afterwards it gives tokens again."""
    yield
    tokens.host.exec(["systemctl", "start", "bednet-token-service.socket", "bednet-token-service.service"])
    tokens.await_health()
