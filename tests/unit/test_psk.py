# SPDX-License-Identifier: Apache-2.0
"""Pre-shared keys as our own client offers them, against OpenSSL's server.

The sharp edges: a server that lets us in without having used the key, a context of Python's that is not what we take it
for, and TLS 1.3, which Python's own function does not offer.
"""

from __future__ import annotations

import secrets
import socket
import ssl
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from bednet import psk
from bednet.probe import Credentials, Listener, Offer, Outcome, handshake
from tests.unit.ca_home import make_home

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "level-121"
KEY = secrets.token_bytes(32)
VERSIONS = {
    "1.2": {"ECDHE-PSK-CHACHA20-POLY1305"},
    # Such a key goes with the suites that hash with SHA-256.
    "1.3": {"TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256"},
}
each_version = pytest.mark.parametrize("version", VERSIONS)


@contextmanager
def _server(*options: str) -> Iterator[Listener]:
    """OpenSSL's server on this machine; the key, made for this run, is in its arguments."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-quiet", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline, "OpenSSL's server did not start"
        yield Listener("127.0.0.1", port)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server() -> Iterator[Listener]:
    """A server that has a key and no certificate."""
    with _server("-nocert", "-psk_identity", NAME, "-psk", KEY.hex(), "-cipher", *VERSIONS["1.2"]) as listener:
        yield listener


@each_version
def test_the_right_key_is_let_in(server: Listener, version: str) -> None:
    seen = handshake(server, Credentials(psk_identity=NAME, psk=KEY), offer=Offer(version, version))
    assert seen.accepted, seen
    assert seen.hello is not None
    assert seen.hello.version == version
    assert seen.hello.cipher in VERSIONS[version]
    assert seen.certificate is None


@each_version
def test_another_key_is_refused(server: Listener, version: str) -> None:
    seen = handshake(server, Credentials(psk_identity=NAME, psk=secrets.token_bytes(32)), offer=Offer(version, version))
    assert seen.outcome is Outcome.ALERT
    assert seen.reason in {"bad record mac", "decrypt error", "illegal parameter"}


def test_a_server_that_shows_a_certificate_instead_has_proven_nothing(tmp_path: Path) -> None:
    home = make_home(tmp_path / "ca").path
    files = ("-cert", str(home / "issuing/issuing.pem"), "-key", str(home / "issuing/issuing.key"))
    with _server(*files, "-tls1_3") as listener:
        # Such a client without a key gets in there.
        assert handshake(listener, offer=Offer("1.3", "1.3")).accepted
        seen = handshake(listener, Credentials(psk_identity=NAME, psk=KEY), offer=Offer("1.3", "1.3"))
    assert not seen.accepted
    assert "showed a certificate" in seen.reason


@pytest.mark.parametrize("identity", ["", "a\0b", "x" * 129])
def test_an_identity_that_cannot_be_is_refused(identity: str) -> None:
    with pytest.raises(psk.UnavailableError, match="an identity has 1 to 128 bytes and no NUL"):
        psk.offer(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), identity, KEY)
