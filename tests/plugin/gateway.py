# SPDX-License-Identifier: Apache-2.0
"""A broker with the plugin and a store, run as a process of this machine.

- :class:`Site`: what the store says; changed in place and applied as `bednet-store` does it.
- :class:`Gateway`: the broker. Its audit is read from its log.
- :func:`plugin_path`, :func:`broker_program`: what is tested; BEDNET_PLUGIN and BEDNET_MOSQUITTO name others.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bednet import store
from bednet.probe import Credentials, Listener, Outcome, Session, Version, enter
from tests.unit.store import sites

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from types import TracebackType

    from tests.plugin.pki import Authority, Issued

SOURCE = Path(__file__).parents[2] / "src" / "plugin"
LOCAL = "127.0.0.1"
DEADLINE = 10.0  # seconds that an event may take
Json = dict[str, Any]


def waited_s(*pids: int) -> float:
    """Return how long the threads of these processes have waited for a CPU, in seconds (schedstat).

    What is left of a time without it is what they did and what they waited for on purpose, however busy the machine is.
    """
    tasks = (task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir())
    return sum(int((task / "schedstat").read_text(encoding="ascii").split()[1]) for task in tasks) / 1e9


@functools.cache
def broker_program() -> str:
    """Return the broker that is tested, or skip the test."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
    program = os.environ.get("BEDNET_MOSQUITTO") or shutil.which("mosquitto", path=path)
    if program is None:
        pytest.skip("no Mosquitto on this machine: install mosquitto, or name one in BEDNET_MOSQUITTO")
    return program


@functools.cache
def broker_version() -> tuple[int, ...]:
    """Return the version of the broker that is tested."""
    told = subprocess.run([broker_program(), "-h"], capture_output=True, text=True, check=False).stdout
    return tuple(int(part) for part in told.split("version", 1)[1].split()[0].split("."))


@functools.cache
def build(target: str) -> Path:
    """Make a target of src/plugin, outside of the checkout, or skip the test. A warning of the compiler is an error."""
    if not (shutil.which("make") and shutil.which("cc") and shutil.which("pkg-config")):
        pytest.skip("no compiler on this machine: install gcc, make and pkg-config")
    folder = Path(tempfile.gettempdir()) / f"bednet-plugin-{os.getuid()}-{os.getpid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / target
    done = subprocess.run(
        ["make", "-C", str(SOURCE), f"BUILD={folder}", str(path), "CFLAGS=-O2 -g -Werror"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@functools.cache
def plugin_path() -> Path:
    """Return the plugin that is tested."""
    given = os.environ.get("BEDNET_PLUGIN")
    return Path(given) if given else build("bednet_plugin.so")


def password_record(password: str, iterations: int = 101) -> str:
    """Return a password as bednet-ca hashes it."""
    salt = os.urandom(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, iterations)
    return f"$7${iterations}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def allow(access: str, *topic: str | int, **more: Any) -> Json:
    """Return a rule of a profile; its topic is text, and 0 for the device's id."""
    return {"effect": "allow", "access": access, "topic": list(topic), "during": [], "networks": [], **more}


def deny(access: str, *topic: str | int, **more: Any) -> Json:
    return {**allow(access, *topic, **more), "effect": "deny"}


SENSOR = (
    allow("publish", "sensors/", 0, "/#"),
    allow("subscribe", "sensors/", 0, "/#"),
    allow("subscribe", "commands/", 0, "/#"),
    deny("publish", "sensors/", 0, "/raw/#"),
)
"""What a device of these tests may do unless the test says otherwise."""


@dataclass
class Site:
    """A site whose every change is applied at once.

    :ivar folder: of the store.
    """

    folder: Path
    devices: dict[str, Json] = field(default_factory=dict)
    profiles: dict[str, list[Json]] = field(default_factory=lambda: {"sensor": list(SENSOR)})
    zones: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    passwords: dict[str, str] = field(default_factory=dict)
    psk: dict[str, str] = field(default_factory=dict)
    revoked_serials: dict[str, str] = field(default_factory=dict)
    map_size: int = store.MAP_SIZE

    @property
    def store(self) -> store.Store:
        return store.Store(self.folder, map_size=self.map_size)

    def add(self, device: str, *authentication: str, profile: str = "sensor", **more: Any) -> str:
        """Add a device; say apply() when done."""
        self.devices[device] = sites.device(device, profile, *authentication, **more)
        return device

    def lines(self) -> list[str]:
        profiles = []
        for name, rules in self.profiles.items():
            named = [
                {"id": f"role/{name}/{rule['effect']}/{rule['access']}/{number}", **rule}
                for number, rule in enumerate(rules)
            ]
            profiles.append({"profile": name, "names": [], "rules": named})
        zones = [{"zone": name, "transitions": pairs} for name, pairs in self.zones.items()]
        return sites.compiled([self.devices[name] for name in sorted(self.devices)], profiles, zones)

    def apply(self) -> Json:
        """Make the store what the site says."""
        known = {name: self.passwords[name] for name in self.passwords if name in self.devices}
        return self.store.apply(
            self.lines(), sites.secrets(passwords=known, psk=self.psk, revoked_serials=self.revoked_serials)
        )

    def change(self, device: str, **more: Any) -> Json:
        """Change one device."""
        self.devices[device] = {**self.devices[device], **more}
        return self.apply()


def free_port(*, but: Collection[int] = ()) -> int:
    """Return a port that nobody listens on; below those that systems give out, so that nobody else is given it.

    :param but: ports that are taken, though nobody listens on them yet.
    """
    while True:
        port = 15000 + secrets.randbelow(15000)
        if port in but:
            continue
        with socket.socket() as probe:
            try:
                probe.bind((LOCAL, port))
            except OSError:
                continue
        return port


class Guest(Session):
    """A session that leaves nothing to the garbage collector, which would complain of paho's pair of sockets."""

    def close(self) -> None:
        super().close()
        for name in ("connect", "disconnect", "message", "publish", "subscribe", "unsubscribe"):
            setattr(self.client, f"on_{name}", None)


class Gateway:
    """A broker with the plugin: a context manager that shows the broker's log when the test fails.

    Its listeners: ``mtls``, ``password`` and ``psk`` over TLS, ``websockets`` where the broker has it, ``plain`` for
    tests that are about something else, ``everywhere``, which is that on all addresses of the machine.

    :param each: further lines of the configuration, by listener.
    """

    def __init__(
        self,
        folder: Path,
        site: Site,
        authority: Authority,
        *,
        options: Mapping[str, str] | None = None,
        more: str = "",
        per_listener: bool = False,
        listeners: tuple[str, ...] = ("mtls", "password", "psk", "websockets", "plain"),
        persistence: bool = False,
        plugin: Path | None = None,
        preload: str = "",
        environment: Mapping[str, str] | None = None,
        each: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.folder, self.site, self.authority = folder, site, authority
        self.options = {"store": str(site.folder), **(options or {})}
        self.more, self.per_listener, self.listeners, self.persistence = more, per_listener, listeners, persistence
        self.plugin, self.preload, self.environment = plugin or plugin_path(), preload, environment or {}
        self.each = each or {}
        self.ports: dict[str, int] = {}
        for name in listeners:
            self.ports[name] = free_port(but=self.ports.values())
        self.log = folder / "mosquitto.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def configuration(self) -> str:
        plugin = [f"plugin {self.plugin}", *(f"plugin_opt_{name} {value}" for name, value in self.options.items())]
        server = [f"certfile {self.authority.folder}/server.pem", f"keyfile {self.authority.folder}/server.key"]
        lines = [
            f"per_listener_settings {'true' if self.per_listener else 'false'}",
            *([] if self.per_listener else ["allow_anonymous false", *plugin]),
            *(["user root"] if os.geteuid() == 0 else []),
            "set_tcp_nodelay true",
            "sys_interval 1",
            "log_dest stderr",
            *(f"log_type {kind}" for kind in ("error", "warning", "notice", "information")),
            f"persistence {'true' if self.persistence else 'false'}",
            *([f"persistence_location {self.folder}/"] if self.persistence else []),
            *([self.more] if self.more else []),
        ]
        for name, port in self.ports.items():
            lines.append(f"listener {port}" if name == "everywhere" else f"listener {port} {LOCAL}")
            if self.per_listener:
                lines += ["allow_anonymous false", *plugin]
            if name in ("mtls", "password"):
                lines += [*server, "tls_version tlsv1.2"]
            if name == "mtls":
                lines += [f"cafile {self.authority.folder}/ca.pem", "require_certificate true"]
            elif name == "psk":
                lines += ["psk_hint bednet", "tls_version tlsv1.2", "ciphers ECDHE-PSK-CHACHA20-POLY1305"]
                lines += ["use_identity_as_username true", "use_username_as_clientid true"]
            elif name == "websockets":
                lines.append("protocol websockets")
            lines += self.each.get(name, ())
        return "\n".join(lines) + "\n"

    def start(self) -> None:
        """Start the broker and wait until it listens."""
        path = self.folder / "mosquitto.conf"
        path.write_text(self.configuration(), encoding="utf-8")
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "LC_ALL": "C.UTF-8", **self.environment}
        if self.preload:
            environment["LD_PRELOAD"] = self.preload
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [broker_program(), "-c", str(path)], stdin=subprocess.DEVNULL, stderr=log, env=environment
            )
        deadline = time.monotonic() + DEADLINE
        for port in self.ports.values():
            while True:
                if self._process.poll() is not None:
                    raise AssertionError(f"the broker does not run:\n{self.text()}")
                try:
                    socket.create_connection((LOCAL, port), 1).close()
                    break
                except ConnectionRefusedError:
                    assert time.monotonic() < deadline, f"nobody listens on {port}:\n{self.text()}"
                    time.sleep(0.01)

    def refuses_to_start(self) -> str:
        """Start the broker, see it end by itself, and return what it said."""
        with pytest.raises(AssertionError, match="does not run"):
            self.start()
        assert self._process
        assert self._process.wait(DEADLINE) > 0, "a signal ended it"
        return self.text()

    def stop(self) -> int:
        """End the broker as its unit would, and return its exit code."""
        assert self._process
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(DEADLINE)
        finally:
            self.kill()

    def kill(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def reload(self) -> None:
        """Send SIGHUP and wait until the broker has done what it does then."""
        seen = self.text().count("Reloading config")
        again = 0.0

        def done() -> bool:
            nonlocal again
            # A signal that comes while the last one is being served is lost.
            if time.monotonic() > again:
                os.kill(self.pid, signal.SIGHUP)
                again = time.monotonic() + 0.5
            return self.text().count("Reloading config") > seen

        self.wait(done, "the reload")

    def __enter__(self) -> Gateway:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is not None:
            print(self.text()[-4000:])  # noqa: T201 - pytest shows it with the failure
        ended = self._process is not None and self._process.poll() is not None
        self.kill()
        if exc is None:
            assert not ended, f"the broker ended by itself:\n{self.text()[-4000:]}"
            assert "runtime error" not in self.text()
            assert "Sanitizer" not in self.text()

    # What it says

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def wait(self, ready: Callable[[], object], what: str, timeout: float = DEADLINE) -> None:
        """Wait for something that there is no event for.

        :raises AssertionError: when it does not come in time; the broker's log says why.
        """
        deadline = time.monotonic() + timeout
        while not ready():
            assert self._process is None or self._process.poll() is None, f"the broker ended:\n{self.text()[-4000:]}"
            assert time.monotonic() < deadline, f"{what} did not come:\n{self.text()[-4000:]}"
            time.sleep(0.005)

    def audit(self) -> Iterator[Json]:
        """Go through the audit, the oldest first. A line of it begins so: client ids stand in others, as they are."""
        for line in self.text().split("\n")[:-1]:
            _, _, message = line.partition(": ")
            if message.startswith('{"bednet":"audit"'):
                yield json.loads(message)

    def audited(self, **wanted: Any) -> Json:
        """Wait for a line of the audit in which all this stands, and return the newest."""
        found: list[Json] = []

        def ready() -> bool:
            found[:] = [event for event in self.audit() if wanted.items() <= event.items()]
            return bool(found)

        self.wait(ready, f"an audit line with {wanted}")
        return found[-1]

    def left(self, device: str) -> None:
        """Wait until the broker has seen a device go: other connections may be served before its last words are."""
        told = re.compile(rf"Client {device}( \[[^]]*\])? (disconnected|closed)")
        self.wait(lambda: told.search(self.text()), f"the end of {device}")

    def count(self, **wanted: Any) -> int:
        return sum(wanted.items() <= event.items() for event in self.audit())

    # How one gets in

    def listener(self, name: str = "mtls") -> Listener:
        if name in ("plain", "websockets"):
            return Listener(LOCAL, self.ports[name], tls=False, websockets=name == "websockets")
        return Listener(LOCAL, self.ports[name], self.authority.folder / "ca.pem", "gateway-1.plant.example")

    def session(self, device: str, issued: Issued | None = None, *, on: str = "mtls", **more: Any) -> Guest:
        """Return a session of a device, by its certificate or, on another listener, by its password."""
        credentials = issued.credentials if issued else self.credentials(device)
        return Guest(self.listener(on), credentials, client_id=device, **more)

    def credentials(self, device: str) -> Credentials:
        return Credentials(username=device, password=f"password of {device}")

    def refused(
        self,
        credentials: Credentials,
        *,
        on: str = "mtls",
        client_id: str,
        version: Version = 5,
    ) -> None:
        """See that somebody is not let in, and is told nothing but that."""
        answer = enter(self.listener(on), credentials, client_id=client_id, version=version)
        assert (answer.outcome, answer.code) == (Outcome.REFUSED, 5 if version == 4 else 0x87), answer

    def admitted(self, credentials: Credentials, *, on: str = "mtls", client_id: str, version: Version = 5) -> None:
        """See that somebody is let in."""
        answer = enter(self.listener(on), credentials, client_id=client_id, version=version)
        assert answer.accepted, answer
