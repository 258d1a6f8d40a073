# SPDX-License-Identifier: Apache-2.0
"""What a Mosquitto does that surprises, where no other test shows it; README.md lists all of it, each with its test."""

from __future__ import annotations

import ast
import re
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from bednet.probe import Credentials, Outcome, connect_packet, dial, enter, publish_packet
from tests.plugin.clock import Clock
from tests.plugin.conftest import KEY
from tests.plugin.gateway import broker_version, password_record
from tests.plugin.mqtt import PSK

if TYPE_CHECKING:
    from tests.plugin.conftest import Start
    from tests.plugin.gateway import Gateway, Site
    from tests.plugin.pki import Authority

TESTS = Path(__file__).parents[1]


def test_a_listener_that_takes_the_identity_for_granted_asks_nobody(start: Start, authority: Authority) -> None:
    """use_identity_as_username skips BASIC_AUTH: no binding of the client id, no look at the certificate's number.

    What the plugin is asked later it still decides: nothing is done under another's client id.
    """
    gateway = start(listeners=("mtls",), each={"mtls": ["use_identity_as_username true"]})
    issued = authority.device("temp-1")
    answer = enter(gateway.listener(), issued.credentials, client_id="temp-2")
    assert answer.accepted, "the broker asks since some version: roles and docs may say so"
    assert not list(gateway.audit())
    with dial(gateway.listener(), issued.credentials) as channel:
        channel.send(connect_packet("temp-2", version=5))
        assert channel.packet()[3] == 0
        channel.send(publish_packet("sensors/temp-1/t", b"x"))
        assert channel.packet()[4] == 0x87
    gateway.audited(action="publish", device="temp-1", client_id="temp-2", reason="client-id")
    with gateway.session("temp-1", issued) as session:
        assert not session.publish("sensors/temp-2/t", b"x").granted


def test_a_pre_shared_key_names_nobody_unless_the_listener_says_so(start: Start) -> None:
    """Without use_identity_as_username BASIC_AUTH comes without the identity: nobody is let in."""
    plain = ["use_identity_as_username false", "use_username_as_clientid false"]
    gateway = start(listeners=("psk",), each={"psk": plain})
    with PSK(gateway, "psk-1", KEY) as device:
        assert device.connect() == 5
    gateway.audited(event="refused", action="connect", reason="unknown-device", client_id="psk-1")


def test_an_acl_file_and_a_password_file_beside_the_plugin_decide_nothing(
    site: Site, start: Start, tmp_path: Path
) -> None:
    """The plugin is asked first, and answers: whatever it left to somebody else would be theirs to grant."""
    acl_file, password_file = tmp_path / "acl", tmp_path / "passwords"
    acl_file.write_text("topic readwrite #\nuser temp-1\ntopic readwrite #\n", encoding="ascii")
    password_file.write_text(f"stranger:{password_record('guess')}\n", encoding="ascii")
    for path in (acl_file, password_file):
        path.chmod(0o600)
    gateway = start(listeners=("plain",), more=f"acl_file {acl_file}\npassword_file {password_file}")
    with gateway.session("temp-1", on="plain") as session:
        assert not session.publish("other/x", b"1").granted
        assert not session.subscribe("#")[0].granted
        assert session.publish("sensors/temp-1/t", b"1").granted
    stranger = Credentials(username="stranger", password="guess")  # noqa: S106
    gateway.refused(stranger, on="plain", client_id="stranger")
    # Nor do they take away.
    gateway.admitted(gateway.credentials("temp-2"), on="plain", client_id="temp-2")


def test_mqtt_3_knows_no_password_without_a_user_name(gateway: Gateway) -> None:
    with dial(gateway.listener("plain")) as channel:
        channel.send(connect_packet("temp-1", password="password of temp-1", version=4))  # noqa: S106
        answer = channel.packet()
    assert answer == b"" or answer[3] != 0


# --- connections that say nothing


def closed(connection: socket.socket) -> bool:
    """Say whether the broker has closed a connection."""
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False


def test_a_connection_that_says_nothing_is_held_for_long(start: Start, tmp_path: Path) -> None:
    """96 s in 2.0, 31 s in 2.1, and no option for it; what there is is a limit for each listener: the next test."""
    with ExitStack() as stack:
        clock = stack.enter_context(Clock(tmp_path))
        gateway = start(listeners=("plain",), preload=str(clock.library), environment=clock.environment)
        silent = stack.enter_context(socket.create_connection(("127.0.0.1", gateway.ports["plain"])))
        gateway.admitted(gateway.credentials("temp-1"), on="plain", client_id="temp-1")
        clock.advance(80 if broker_version() < (2, 1) else 20)
        # Some rounds of the broker's loop, in which it would have closed it.
        for _ in range(3):
            gateway.admitted(gateway.credentials("temp-1"), on="plain", client_id="temp-1")
        assert not closed(silent)
        clock.advance(110)
        gateway.wait(lambda: closed(silent), "the end of the connection")
        gateway.admitted(gateway.credentials("temp-1"), on="plain", client_id="temp-1")


def test_silent_strangers_fill_no_listener_but_the_one_they_are_at(start: Start, tmp_path: Path) -> None:
    """max_connections counts them; devices that come by another listener do not feel it, and it passes."""
    with ExitStack() as stack:
        clock = stack.enter_context(Clock(tmp_path))
        gateway = start(
            listeners=("mtls", "password", "plain"),
            each={"plain": ["max_connections 5"]},
            preload=str(clock.library),
            environment=clock.environment,
        )
        address = ("127.0.0.1", gateway.ports["plain"])
        silent = [stack.enter_context(socket.create_connection(address)) for _ in range(5)]
        device = gateway.credentials("temp-1")

        def outcome() -> Outcome:
            return enter(gateway.listener("plain"), device, client_id="temp-1").outcome

        if broker_version() < (2, 0, 21):
            # 2.0.11 counts a connection down twice that ends before it said who it is: its limit is soon none.
            def limitless() -> bool:
                socket.create_connection(address).close()
                return outcome() is Outcome.ACCEPTED

            gateway.wait(limitless, "the end of the listener's limit")
        else:
            gateway.wait(lambda: outcome() in (Outcome.CLOSED, Outcome.RESET), "the listener's limit")
        gateway.admitted(device, on="password", client_id="temp-1")
        clock.advance(110)
        gateway.wait(lambda: all(closed(connection) for connection in silent), "the end of the strangers")
        gateway.admitted(device, on="plain", client_id="temp-1")


# --- a clock that is set


def test_a_leap_of_the_wall_clock_ends_sessions_in_2_0_21(start: Start, tmp_path: Path) -> None:
    """It forgets to choose a clock that nobody sets (fixed in 2.0.22): to its keep-alives a leap is a long silence."""
    with Clock(tmp_path) as clock:
        gateway = start(listeners=("plain",), preload=str(clock.library), environment=clock.environment)
        with gateway.session("temp-1", on="plain") as session:
            assert session.publish("sensors/temp-1/t", b"1").granted
            clock.leap(86400)
            gateway.admitted(gateway.credentials("temp-2"), on="plain", client_id="temp-2")
            if broker_version() == (2, 0, 21):
                assert session.wait_goodbye().code in (None, 0x8D)
            else:
                assert session.publish("sensors/temp-1/t", b"2").granted
        # Once, and nobody has to wait for it.
        gateway.admitted(gateway.credentials("temp-1"), on="plain", client_id="temp-1")


# --- the list


def test_every_trap_of_the_list_has_a_test_that_there_is() -> None:
    rows = [
        line.split("|")
        for line in Path(__file__).with_name("README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| what")
    ]
    assert len(rows) > 40
    defined: dict[str, set[str]] = {}
    for _, what, proof, _ in rows:
        named = re.findall(r"`([\w/]+)\.(py|c)::(\w+)`", proof)
        assert named, f"no test for: {what}"
        for path, ending, name in named:
            file = f"{path}.{ending}"
            if file not in defined:
                source = (TESTS.parent / file if ending == "c" else TESTS / file).read_text(encoding="utf-8")
                defined[file] = (
                    set(re.findall(r"^static void (test_\w+)", source, re.MULTILINE))
                    if ending == "c"
                    else {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
                )
            assert name in defined[file], f"{file} has no {name}"


def test_the_plugin_s_clock_is_the_one_that_these_tests_set(site: Site, start: Start, tmp_path: Path) -> None:
    """Tests of times rely on it: a shim that is not loaded would leave them with the real time."""
    site.change("temp-1", until=1_800_000_000)
    with Clock(tmp_path) as clock:
        gateway = start(listeners=("plain",), preload=str(clock.library), environment=clock.environment)
        device = gateway.credentials("temp-1")
        clock.set(1_799_999_999)
        gateway.admitted(device, on="plain", client_id="temp-1")
        clock.set(1_800_000_000)
        gateway.refused(device, on="plain", client_id="temp-1")
    gateway.audited(reason="until", device="temp-1")
