# SPDX-License-Identifier: Apache-2.0
"""MQTT over WebSockets as the generator speaks it: however the network cuts it, and whatever the server says."""

from __future__ import annotations

import base64
import hashlib
import socket
import ssl
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load.tls import ConnectError, client_context
from load.websocket import BINARY, CLOSE, CONTINUED, PING, PONG, Frames, WebSocket, frame
from tests.verify import brokers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZES = (0, 1, 125, 126, 127, 65_535, 65_536)
TEXT = 0x1


def told(payload: bytes, opcode: int = BINARY, *, last: bool = True) -> bytes:
    """Return a server's frame."""
    size = len(payload)
    head = bytes([(0x80 if last else 0) | opcode])
    if size < 126:
        head += bytes([size])
    elif size < 65_536:
        head += b"\x7e" + size.to_bytes(2)
    else:
        head += b"\x7f" + size.to_bytes(8)
    return head + payload


def understood(data: bytes) -> tuple[int, bytes]:
    """Return what a server makes of a client's frame: its opcode and its payload."""
    assert data[0] & 0x80
    assert data[1] & 0x80, "a client masks what it sends"
    wide = {126: 2, 127: 8}.get(data[1] & 0x7F, 0)
    size = int.from_bytes(data[2 : 2 + wide]) if wide else data[1] & 0x7F
    key, payload = data[2 + wide : 6 + wide], data[6 + wide :]
    assert len(payload) == size
    return data[0] & 0x0F, bytes(byte ^ key[at % 4] for at, byte in enumerate(payload))


@pytest.mark.parametrize("size", SIZES)
def test_a_frame_of_any_size_is_masked_and_comes_back(size: int) -> None:
    data = bytes(at * 7 % 256 for at in range(size))
    assert understood(frame(data)) == (BINARY, data)
    frames = Frames()
    assert frames.take(told(data)) == data
    assert not frames.ended


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=6), st.lists(st.integers(1, 200), max_size=12))
def test_what_arrives_is_whole_however_it_is_cut(payloads: list[bytes], cuts: list[int]) -> None:
    data = b"".join(told(payload) for payload in payloads)
    frames, found, at = Frames(), b"", 0
    for cut in [*cuts, len(data)]:
        found += frames.take(data[at : at + cut])
        at += cut
    assert found == b"".join(payloads)


def test_a_message_in_pieces_is_one_and_pings_are_kept_for_an_answer() -> None:
    frames = Frames()
    data = told(b"one", last=False) + told(b"are you there", PING) + told(b"two", CONTINUED) + told(b"", PONG)
    assert frames.take(data) == b"onetwo"
    assert frames.pings == [b"are you there"]


@pytest.mark.parametrize("opcode", [CLOSE, TEXT])
def test_nothing_is_taken_after_the_end(opcode: int) -> None:
    frames = Frames()
    assert frames.take(told(b"before") + told(b"", opcode) + told(b"after")) == b"before"
    assert frames.ended


def accepted(key: str) -> bytes:
    digest = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode(), usedforsecurity=False).digest()
    lines = ["HTTP/1.1 101 Switching Protocols", "Upgrade: WebSocket", "Connection: Upgrade"]
    lines += [f"Sec-WebSocket-Accept: {base64.b64encode(digest).decode()}", "Sec-WebSocket-Protocol: mqtt", "", ""]
    return "\r\n".join(lines).encode()


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> brokers.PKI:
    """A CA and a server's certificate."""
    return brokers.PKI.make(tmp_path_factory.mktemp("pki"), datetime.now(UTC))


@contextmanager
def server(folder: Path, answer: Callable[[str], bytes], heard: list[bytes]) -> Iterator[int]:
    """Run a server for one connection that answers the upgrade, and keeps what it hears after that."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        plain, _ = listening.accept()
        with plain, context.wrap_socket(plain, server_side=True) as tls:
            asked = b""
            while not asked.endswith(b"\r\n\r\n"):
                asked += tls.recv(4096)
            lines = asked.decode().split("\r\n")
            assert lines[0] == "GET /mqtt HTTP/1.1"
            key = next(line.partition(": ")[2] for line in lines if line.startswith("Sec-WebSocket-Key"))
            tls.sendall(answer(key))
            tls.settimeout(10)
            while piece := tls.recv(4096):
                heard.append(piece)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        thread.join(10)
        listening.close()


def connected(pki: brokers.PKI, port: int, deadline_s: float = 10) -> WebSocket:
    context = client_context(pki.folder / "ca.pem")
    return WebSocket("127.0.0.1", port, brokers.SERVER_NAME, context, deadline_s)


def received(connection: WebSocket, count: int) -> bytes:
    """Return so many bytes, or what came before the end."""
    found, until = b"", time.monotonic() + 10
    while len(found) < count and time.monotonic() < until:
        try:
            piece = connection.recv(count - len(found))
        except BlockingIOError:
            time.sleep(0.002)
            continue
        if not piece:
            break
        found += piece
    return found


def test_what_came_with_the_answer_is_not_lost_and_pings_are_answered(pki: brokers.PKI) -> None:
    heard: list[bytes] = []
    rest = told(b"first") + told(b"ping", PING) + told(b"second") + told(b"", CLOSE)
    with server(pki.folder, lambda key: accepted(key) + rest, heard) as port:
        connection = connected(pki, port)
        assert connection.send(b"hello") == 5
        assert received(connection, 11) == b"firstsecond"
        # The end.
        assert connection.recv(1) == b""
        connection.close()
    data = b"".join(heard)
    assert understood(data[:11]) == (BINARY, b"hello")
    assert understood(data[11:]) == (PONG, b"ping")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda _: b"HTTP/1.1 403 Forbidden\r\n\r\n", "WebSockets: the upgrade was answered with 403"),
        (lambda _: b"\r\n\r\n", "WebSockets: the upgrade was answered with nothing of HTTP"),
        (lambda _: accepted("another key"), "WebSockets: the gateway agreed to something else"),
        (lambda key: accepted(key).replace(b": mqtt", b": chat"), "WebSockets: the gateway agreed to something else"),
        (lambda _: b"x" * 20_000, "WebSockets: no answer to the upgrade"),
    ],
)
def test_a_server_that_does_not_speak_mqtt_over_websockets_is_told(
    pki: brokers.PKI, answer: Callable[[str], bytes], reason: str
) -> None:
    with server(pki.folder, answer, []) as port, pytest.raises(ConnectError) as caught:
        connected(pki, port)
    assert caught.value.reason == reason


def test_a_server_that_says_nothing_is_not_waited_for_for_ever(pki: brokers.PKI) -> None:
    with server(pki.folder, lambda _: b"HTTP/1.1 101", []) as port, pytest.raises(ConnectError, match="timed out"):
        connected(pki, port, 0.5)
