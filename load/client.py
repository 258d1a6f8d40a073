# SPDX-License-Identifier: Apache-2.0
"""A device's connection: paho-mqtt, driven by gevent's loop without a thread or greenlet of its own.

- :class:`Connection`: connect, subscribe, publish, close; what arrives is handed to a function.
- :class:`Login`: who connects, where to, and how.

Importing this module gives paho locks of C in place of gevent's, which are written in Python: all runs on one thread,
and no call into paho ever waits.
"""

from __future__ import annotations

import _thread
import threading
import time
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import paho.mqtt.client as paho
from gevent import monkey
from gevent.event import AsyncResult
from gevent.hub import get_hub
from gevent.timeout import Timeout
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from bednet.client import LEAST_SECONDS, TokenError, oauthbearer
from load.tls import ConnectError, Transport
from load.websocket import WebSocket

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

    from paho.mqtt.reasoncodes import ReasonCode

    from bednet.client import Token, TokenSource

_READ, _WRITE = 1, 2
_AUTH, _REAUTHENTICATE = 0xF0, 0x19
# After so many packets others get their turn.
_TURN = 200
MQTT_5 = 5


class _NobodyWaits:
    """Stands in for the condition that paho makes for each message, so that a thread can wait for it; none does."""

    __slots__ = ()

    def __enter__(self) -> _NobodyWaits:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def notify(self, _count: int = 1) -> None:
        """Tell nobody."""

    def wait(self, _timeout: float | None = None) -> None:
        """Refuse to wait."""
        raise RuntimeError("nobody waits for a message in the load generator")


_SINGLE_THREADED = types.SimpleNamespace(
    **{
        **vars(threading),
        "RLock": _thread.RLock,
        "Lock": monkey.get_original("_thread", "allocate_lock"),
        # Made for each message and hardly ever waited for.
        "Condition": _NobodyWaits,
    }
)
vars(paho)["threading"] = _SINGLE_THREADED


@dataclass(frozen=True)
class Login:
    """Who connects, where to, and how.

    :ivar server_name: the name in the gateway's certificate.
    :ivar source: where its tokens come from; None where it comes in by something else.
    :ivar password: None where the certificate in the context says it all.
    :ivar clean: begin a new session; otherwise take up the old one, which the gateway keeps for an hour.
    :ivar inflight: how many of its QoS 1 and 2 messages may be under way at once.
    :ivar queue: how many more it keeps for a gateway that is slow; then it drops, and counts that.
    :ivar websockets: speak MQTT over WebSockets.
    """

    id: str
    address: str
    port: int
    server_name: str
    context: ssl.SSLContext
    password: str | None = None
    source: TokenSource | None = None
    protocol: int = MQTT_5
    clean: bool = True
    keepalive_s: int = 60
    inflight: int = 20
    queue: int = 10_000
    deadline_s: float = 30.0
    websockets: bool = False


def _token(source: TokenSource) -> Token:
    try:
        return source.get()
    except TokenError as exc:
        raise ConnectError(f"no token: {exc.error}") from exc
    except ImportError as exc:
        raise ConnectError(f"no token: this machine's Python lacks {exc.name}") from exc


class Owner(Protocol):
    """Whom a connection tells what happens."""

    def received(self, topic: bytes, payload: bytes | bytearray, qos: int) -> None:
        """Take a message."""

    def acknowledged(self, mid: int, refused: str) -> None:
        """Take the answer to a publish of QoS 1 or 2: the reason it was refused for, or nothing."""

    def lost(self, reason: str) -> None:
        """Hear that the connection was lost."""


class _Client(paho.Client):
    """paho, with our transport instead of its own."""

    login: Login
    wire: Transport | None = None

    def _create_socket(self) -> Any:
        # paho connects to the name that it checks the certificate against; gateways are often reached by address.
        login = self.login
        kind = WebSocket if login.websockets else Transport
        self.wire = kind(login.address, login.port, login.server_name, login.context, login.deadline_s)
        return self.wire


class _TokenClient(_Client):
    """paho with AUTH packets (MQTT 5, 3.15)."""

    answer: AsyncResult | None = None

    def reauthenticate(self, token: str) -> None:
        """Show a new token in the session."""
        body = bytes([_REAUTHENTICATE]) + oauthbearer(token, PacketTypes.AUTH).pack()  # type: ignore[no-untyped-call]
        packet = bytearray([_AUTH])
        self._pack_remaining_length(packet, len(body))
        self._packet_queue(_AUTH, packet + body, 0, 0)

    def _packet_handle(self) -> MQTTErrorCode:
        if self._in_packet["command"] != _AUTH:
            return super()._packet_handle()
        if self.answer is not None:
            data = self._in_packet["packet"]
            self.answer.set(data[0] if data else 0)
        return paho.MQTT_ERR_SUCCESS


class Connection:
    """One device's connection.

    :param acknowledged: tell the owner of acknowledgements. paho builds objects for each message then, QoS 0 too.
    """

    def __init__(self, login: Login, owner: Owner, *, acknowledged: bool = True) -> None:
        self.login = login
        self._owner = owner
        self._token: Token | None = None
        self._client = client = (_TokenClient if login.source else _Client)(
            CallbackAPIVersion.VERSION2,
            client_id=login.id,
            protocol=paho.MQTTv5 if login.protocol == MQTT_5 else paho.MQTTv311,
            clean_session=None if login.protocol == MQTT_5 else login.clean,
            reconnect_on_failure=False,
        )
        client.login = login
        client.suppress_exceptions = False
        if login.password is not None:
            client.username_pw_set(login.id, login.password)
        client.max_inflight_messages_set(login.inflight)
        client.max_queued_messages_set(login.queue)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        if acknowledged:
            client.on_publish = self._on_publish
        client.on_message = self._on_message
        self._answers: dict[int, AsyncResult] = {}
        self._connack: AsyncResult | None = None
        self._watchers: list[Any] = []
        self._write_watcher: Any = None
        self._closing = False
        self._reading = True
        self.session_present = False

    @property
    def up(self) -> bool:
        """Whether the gateway has let it in, and it has not gone since."""
        return bool(self._client.is_connected())

    @property
    def transport(self) -> Transport | None:
        """The connection under it; None before the first."""
        return self._client.wire

    def connect(self) -> None:
        """Connect, and wait to be let in.

        :raises ConnectError: when that does not happen before the deadline.
        """
        login, client = self.login, self._client
        self._closing = False
        self._connack = AsyncResult()
        try:
            if login.protocol == MQTT_5:
                properties = self._authenticating()
                properties.SessionExpiryInterval = 0 if login.clean else 3600
                client.connect(
                    login.address, login.port, login.keepalive_s, clean_start=login.clean, properties=properties
                )
            else:
                client.connect(login.address, login.port, login.keepalive_s)
            self._watch()
            with Timeout(login.deadline_s, ConnectError("no CONNACK in time")):
                refused = self._connack.get()
        except BaseException:
            self._drop()
            raise
        finally:
            self._connack = None
        if refused:
            self._drop()
            raise ConnectError(refused)

    def _authenticating(self) -> Properties:
        """Return the properties of CONNECT, with a token that is good where it comes in by one."""
        source = self.login.source
        if source is None:
            return Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        if self._token is None or self._token.left(time.monotonic()) < LEAST_SECONDS:
            self._token = _token(source)
        return oauthbearer(self._token.text, PacketTypes.CONNECT)

    def renew(self, deadline_s: float = 30) -> None:
        """Get a new token, show it in the session, and wait until it is taken.

        :raises ConnectError: when there is none, or it is refused, or nobody answers in time.
        """
        client, source = self._client, self.login.source
        assert source is not None
        assert isinstance(client, _TokenClient)
        token = _token(source)
        if not self.up:
            raise ConnectError("the connection was lost")
        client.answer = AsyncResult()
        try:
            client.reauthenticate(token.text)
            self.flush()
            with Timeout(deadline_s, ConnectError("no AUTH in time")):
                reason = client.answer.get()
        finally:
            client.answer = None
        if reason:
            raise ConnectError(f"AUTH: 0x{reason:02X}")
        self._token = token

    def subscribe(self, filters: Sequence[tuple[str, int]], deadline_s: float = 30) -> list[str]:
        """Subscribe, and wait for the answer: for each filter the reason it was refused for, or nothing.

        :raises ConnectError: when no answer comes in time.
        """
        new = self.login.protocol == MQTT_5
        topics: Any = [(name, SubscribeOptions(qos=qos) if new else qos) for name, qos in filters]
        rc, mid = self._client.subscribe(topics)
        if rc != paho.MQTT_ERR_SUCCESS or mid is None:
            raise ConnectError("the connection was lost")
        answer = self._answers[mid] = AsyncResult()
        self.flush()
        try:
            with Timeout(deadline_s, ConnectError("no SUBACK in time")):
                reasons: list[str] = answer.get()
        finally:
            self._answers.pop(mid, None)
        return reasons

    def publish(self, topic: str, payload: bytes, qos: int) -> int:
        """Publish; returns the packet's number, or 0 where it could not be sent or kept.

        For QoS 0 that is a connection that is down; for QoS 1 and 2 a full queue.
        """
        info = self._client.publish(topic, payload, qos)
        transport = self._client.wire
        if transport is not None and transport.waiting:
            self.flush()
        if info.rc == paho.MQTT_ERR_SUCCESS or (qos and info.rc == paho.MQTT_ERR_NO_CONN):
            return info.mid
        return 0

    def pause(self) -> None:
        """Read nothing until :meth:`resume`: the network's buffers fill, then the gateway's queue."""
        self._reading = False
        if self._watchers:
            self._watchers[0].stop()

    def resume(self) -> None:
        """Read again."""
        self._reading = True
        if self._watchers:
            self._watchers[0].start(self._readable)
            self._readable()

    def tend(self) -> None:
        """Keep the connection alive; to be called every few seconds."""
        self._client.loop_misc()
        self.flush()

    def close(self) -> None:
        """Say good-bye and close."""
        self._closing = True
        self._client.disconnect()
        self.flush()
        self._drop()

    def cut(self) -> None:
        """Close without a word, as a device does that loses its power."""
        self._closing = True
        self._drop()
        self._client._sock_close()

    # Driven by the loop

    def _watch(self) -> None:
        self._drop_watchers()
        transport = self._client.wire
        assert transport is not None
        reader = get_hub().loop.io(transport.fileno(), _READ)
        self._watchers = [reader]
        self._write_watcher = get_hub().loop.io(transport.fileno(), _WRITE)
        self._watchers.append(self._write_watcher)
        if self._reading:
            reader.start(self._readable)
        self.flush()

    def _readable(self) -> None:
        client, transport = self._client, self._client.wire
        if transport is None:
            return
        transport.dry = False
        for _ in range(_TURN):
            if client.loop_read() != paho.MQTT_ERR_SUCCESS or client.socket() is None or transport.dry:
                break
        else:
            if self._reading:
                get_hub().loop.run_callback(self._readable)
        self.flush()

    def flush(self) -> None:
        """Send what waits; where the network takes no more, go on when it does."""
        client, transport = self._client, self._client.wire
        if client.socket() is None or transport is None:
            return
        if client.want_write() and client.loop_write() != paho.MQTT_ERR_SUCCESS:
            return
        try:
            transport.flush()
        except OSError:
            # Reading will find the same, and say so.
            return
        if (transport.waiting or client.want_write()) and self._write_watcher is not None:
            self._write_watcher.start(self._writable)

    def _writable(self) -> None:
        if self._write_watcher is not None:
            self._write_watcher.stop()
        self.flush()

    def _drop_watchers(self) -> None:
        for watcher in self._watchers:
            watcher.stop()
            watcher.close()
        self._watchers = []
        self._write_watcher = None

    def _drop(self) -> None:
        self._drop_watchers()
        if self._client.wire is not None:
            self._client.wire.close()

    # paho's callbacks

    def _on_connect(self, _c: Any, _u: Any, flags: Any, reason: ReasonCode, _p: Properties | None) -> None:
        self.session_present = bool(flags.session_present)
        if self._connack is not None:
            self._connack.set(f"CONNACK: {reason}" if reason.is_failure else "")

    def _on_disconnect(self, _c: Any, _u: Any, _flags: Any, reason: ReasonCode, _p: Properties | None) -> None:
        self._drop_watchers()
        if isinstance(self._client, _TokenClient) and self._client.answer is not None:
            self._client.answer.set_exception(ConnectError("the connection was lost"))
        for answer in list(self._answers.values()):
            answer.set_exception(ConnectError("the connection was lost"))
        if self._connack is not None:
            if not self._connack.ready():
                self._connack.set("the gateway hung up before CONNACK")
        elif not self._closing:
            self._owner.lost(str(reason))

    def _on_subscribe(self, _c: Any, _u: Any, mid: int, reasons: Sequence[ReasonCode], _p: Properties | None) -> None:
        answer = self._answers.get(mid)
        if answer is not None:
            answer.set([str(reason) if reason.is_failure else "" for reason in reasons])

    def _on_publish(self, _c: Any, _u: Any, mid: int, reason: ReasonCode, _p: Properties | None) -> None:
        self._owner.acknowledged(mid, str(reason) if reason.is_failure else "")

    def _on_message(self, _c: Any, _u: Any, message: paho.MQTTMessage) -> None:
        self._owner.received(message._topic, message.payload, message.qos)


__all__ = ["ConnectError", "Connection", "Login", "Owner"]
