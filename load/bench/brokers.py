# SPDX-License-Identifier: Apache-2.0
"""The brokers that are compared, and what a running one uses of the machine.

- :class:`Broker`: what they have in common; entered, it runs.
- :class:`Mosquitto`: with different ways to decide who may do what, and with options changed (:class:`Variant`).
- :class:`Server`: `openssl s_server`, which has TLS and nothing else: the limit.

Brokers of other makers are in :mod:`load.bench.others`. Every broker has the same TLS settings and limits. Of the
devices that one knows only a few connect; the others are what it has to carry.
"""

from __future__ import annotations

import base64
import getpass
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from load.bench.stage import ADMIN, READER, READERS, SERVER, Kind, Stage, device
from load.bench.wire import Client, Endpoint, WireError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Self

PLAINTEXT, OPEN, ACL_FILE, DYNAMIC_SECURITY, BEDNET = "plaintext", "mTLS", "acl_file", "dynamic-security", "bednet"
OPENSSL = "openssl s_server"
START_DEADLINE_S = 60.0
_STOP_DEADLINE_S = 30
# The devices that a broker knows where a kind does not say.
_FEW = 100


class Broker(ABC):
    """A broker of one kind, to be entered; it has its files in a folder of its own.

    :ivar port: where it listens, while it runs.
    :ivar members: its processes, likewise.
    :ivar started_s: how long it took from its start to its first answer, in seconds.
    """

    #: Whether it asks for client certificates.
    tls = True
    #: Whether it speaks MQTT.
    mqtt = True
    #: Whether the processes that it starts count as well.
    family = False

    def __init__(self, stage: Stage, kind: Kind) -> None:
        self.stage, self.kind = stage, kind
        self.folder = stage.folder / re.sub(r"[^A-Za-z0-9.]+", "-", f"{kind.name}-{kind.devices}")
        self._log = self.folder / "log"
        if not self.folder.exists():
            self.folder.mkdir()
            self.prepare()

    def prepare(self) -> None:  # noqa: B027 - most need nothing
        """Make what it needs, once."""

    @abstractmethod
    def command(self) -> Sequence[str]:
        """Write its configuration for :attr:`port` and return its command line."""

    def environment(self) -> Mapping[str, str]:
        """Return further environment variables."""
        return {}

    def version(self) -> str:
        """Return its name and version for the report."""
        return ""

    def __enter__(self) -> Self:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        command = list(self.command())
        with self._log.open("ab") as log:
            begin = time.monotonic()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, **self.environment()},
                # Whatever it starts is stopped with it.
                start_new_session=True,
            )
        while True:
            try:
                self.ready()
                break
            except (OSError, WireError) as error:
                if self.process.poll() is not None or time.monotonic() - begin > START_DEADLINE_S:
                    self.stop()
                    raise WireError(f"{self.kind} did not start: {error}. {self.log()}") from None
                time.sleep(0.002)
        self.started_s = time.monotonic() - begin
        self.members = self._find_members()
        return self

    def log(self) -> str:
        """Return the end of what it said."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-2000:]

    def ready(self) -> None:
        """Return when it answers.

        :raises OSError: when it does not yet; a :class:`load.bench.wire.WireError` says the same.
        """
        with self.client(READER):
            return

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it and all that it started."""
        for number, patience_s in ((signal.SIGTERM, _STOP_DEADLINE_S), (signal.SIGKILL, None)):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                return
            try:
                self.process.wait(patience_s)
            except subprocess.TimeoutExpired:
                continue

    def _find_members(self) -> list[int]:
        """Return the processes of its session."""
        if not self.family:
            return [self.process.pid]
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            # The name, in brackets, may contain anything.
            with_session = entry.read_text(errors="replace").rpartition(")")[2].split()
            if int(with_session[3]) == self.process.pid:
                found.append(int(entry.parent.name))
        return found

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens."""
        return Endpoint(self.port)

    def client(self, name: str, *, tls12: bool = False) -> Client:
        """Return a client with a certificate of this name, not yet connected."""
        tls = self.stage.context(name, tls12=tls12) if self.tls else None
        return Client(self.endpoint, name, tls, mqtt=self.mqtt)

    def cpu_s(self) -> float:
        """Return the CPU time that it has used, in seconds, to the nanosecond (schedstat of all its threads)."""
        total = 0
        for member in self.members:
            for task in Path(f"/proc/{member}/task").iterdir():
                total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def memory_bytes(self) -> int:
        """Return its resident memory, of which pages of files are a part."""
        total = 0
        for member in self.members:
            for line in Path(f"/proc/{member}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1]) * 1024
        return total

    def reload(self) -> None:
        """Send it a SIGHUP."""
        self.process.send_signal(signal.SIGHUP)


@dataclass(frozen=True)
class Variant:
    """What is different about a Mosquitto.

    :param lines: lines of mosquitto.conf; an option that is named replaces what there is.
    :param openssl: settings of OpenSSL (OPENSSL_CONF), likewise.
    :param server_key: the kind of the server's key.
    :param crl_entries: how many certificates its CRL names; None: no CRL.
    :param environment: further environment variables.
    :param unit: lines of the unit of systemd that it is; None: a process and no unit.
    :param sysctls: what is written below /proc/sys, in a network namespace of its own; None: in that of all.
    """

    lines: tuple[str, ...] = ()
    openssl: Mapping[str, str] = field(default_factory=dict)
    server_key: str = "P-256"
    crl_entries: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    unit: tuple[str, ...] | None = None
    sysctls: Mapping[str, str] | None = None


class Mosquitto(Broker):
    """A Mosquitto."""

    def __init__(self, stage: Stage, kind: Kind, way: str | None = None, variant: Variant | None = None) -> None:
        """Make one.

        :param way: who decides; by default the kind's name says it.
        """
        self.way, self.variant = way or kind.name, variant or Variant()
        self.devices = kind.devices or _FEW
        self.tls = self.way != PLAINTEXT
        super().__init__(stage, kind)

    @property
    def store(self) -> Path:
        """Where bednet's store is."""
        return self.folder / "store"

    @property
    def acl_file(self) -> Path:
        """Where the acl_file is."""
        return self.folder / "acl"

    def prepare(self) -> None:
        """Tell it who may do what."""
        if self.way == ACL_FILE:
            self.write_acl_file()
        elif self.way == DYNAMIC_SECURITY:
            (self.folder / "dynamic-security.json").write_text(json.dumps(_dynamic_security(range(self.devices))))
        elif self.way == BEDNET:
            compiled = self.folder / "compiled.jsonl"
            with compiled.open("w", encoding="utf-8") as stream:
                stream.writelines(compiled_site(self.devices))
            words = [sys.executable, "-m", "bednet.store", "--store", str(self.store), "apply", str(compiled)]
            nothing = json.dumps({"passwords": {}, "psk": {}, "revoked_serials": {}}).encode()
            subprocess.run(words, check=True, input=nothing, stdout=subprocess.DEVNULL)

    def write_acl_file(self, extra: str = "") -> None:
        """Write the acl_file: a section for each device."""
        with self.acl_file.open("w", encoding="utf-8") as stream:
            for name in (READER, *READERS):
                stream.write(f"user {name}\ntopic read #\n")
            for number in range(self.devices):
                name = device(number)
                stream.write(f"user {name}\ntopic write sensors/{name}/#\ntopic read commands/{name}/#\n")
            stream.write(extra)

    def _lines(self) -> list[str]:
        lines = [
            f"listener {self.port} 127.0.0.1",
            # It runs as whoever measures; as root it would become another user, who cannot read this folder.
            f"user {getpass.getuser()}",
            "log_dest stderr",
            "log_type error",
            "log_type warning",
            "set_tcp_nodelay true",
            "max_queued_messages 0",
            "max_inflight_messages 100",
            "sys_interval 0",
            f"allow_anonymous {'false' if self.tls else 'true'}",
        ]
        if self.tls:
            certificate, key = self.stage.identity(SERVER, self.variant.server_key)
            lines += [f"certfile {certificate}", f"keyfile {key}", f"cafile {self.stage.ca}"]
            lines += ["require_certificate true", "tls_version tlsv1.2"]
            if self.variant.crl_entries is not None:
                lines.append(f"crlfile {self.stage.revocation_list(self.variant.crl_entries)}")
        if self.way in {OPEN, ACL_FILE, DYNAMIC_SECURITY}:
            lines += ["use_identity_as_username true", "use_username_as_clientid true"]
        if self.way == ACL_FILE:
            lines += [f"acl_file {self.acl_file}"]
        elif self.way == DYNAMIC_SECURITY:
            lines += [
                f"plugin {self.stage.programs.dynamic_security}",
                f"plugin_opt_config_file {self.folder / 'dynamic-security.json'}",
            ]
        elif self.way == BEDNET:
            lines += [f"plugin {self.stage.programs.bednet_plugin}", f"plugin_opt_store {self.store}"]
        return replace_options(lines, self.variant.lines)

    def command(self) -> Sequence[str]:
        """See :meth:`Broker.command`."""
        configuration = self.folder / "mosquitto.conf"
        configuration.write_text("\n".join(self._lines()) + "\n")
        return [self.stage.programs.mosquitto, "-c", str(configuration)]

    def environment(self) -> Mapping[str, str]:
        """See :meth:`Broker.environment`."""
        if not self.variant.openssl:
            return self.variant.environment
        settings = {"MinProtocol": "TLSv1.2", "Groups": "X25519:P-256", **self.variant.openssl}
        path = self.folder / "openssl.cnf"
        head = "openssl_conf = init\n[init]\nssl_conf = module\n[module]\nsystem_default = defaults\n[defaults]\n"
        path.write_text(head + "".join(f"{name} = {value}\n" for name, value in settings.items() if value))
        return {"OPENSSL_CONF": str(path), **self.variant.environment}

    def version(self) -> str:
        """See :meth:`Broker.version`."""
        said = subprocess.run([self.stage.programs.mosquitto, "-h"], capture_output=True, text=True, check=False).stdout
        return (said.splitlines() or ["mosquitto"])[0].replace(" version", "")


class Server(Broker):
    """OpenSSL's own server, which sends lines back: a handshake and no broker."""

    mqtt = False

    def command(self) -> Sequence[str]:
        """See :meth:`Broker.command`."""
        certificate, key = self.stage.identity(SERVER)
        words = ["openssl", "s_server", "-accept", f"127.0.0.1:{self.port}", "-cert", str(certificate)]
        words += ["-key", str(key), "-CAfile", str(self.stage.ca), "-Verify", "1", "-verify_return_error"]
        return [*words, "-quiet", "-rev"]

    def version(self) -> str:
        """See :meth:`Broker.version`."""
        said = subprocess.run(["openssl", "version"], capture_output=True, text=True, check=False).stdout
        return " ".join(said.split()[:2])


def replace_options(lines: Sequence[str], changed: Sequence[str]) -> list[str]:
    """Return the lines of a configuration with some options replaced by others of the same name.

    An option without a value is left out; one that was not there is put at the end.
    """
    names = {line.split()[0] for line in changed}
    kept = [line for line in lines if line.split()[0] not in names]
    return kept + [line for line in changed if len(line.split()) > 1]


def compiled_site(devices: int) -> Iterator[str]:
    """Yield the lines of a compiled site (docs/store.md) with this many devices, readers and an admin."""
    ids = sorted([READER, *READERS, ADMIN, *(device(number) for number in range(devices))])
    yield json.dumps({"bednet-compiled": 2, "zones": 0, "profiles": 2, "issuers": 0, "devices": len(ids)}) + "\n"

    def rule(profile: str, access: str, topic: list[str | int]) -> dict[str, object]:
        identifier = f"role/{profile}/allow/{access}/0"
        return {"id": identifier, "effect": "allow", "access": access, "topic": topic, "during": [], "networks": []}

    sensor = [rule("sensor", "publish", ["sensors/", 0, "/#"]), rule("sensor", "subscribe", ["commands/", 0, "/#"])]
    yield json.dumps({"profile": "reader", "names": [], "rules": [rule("reader", "subscribe", ["#"])]}) + "\n"
    yield json.dumps({"profile": "sensor", "names": [], "rules": sensor}) + "\n"
    others = {READER, ADMIN, *READERS}
    for name in ids:
        profile = "reader" if name in others else "sensor"
        entry = {"device": name, "profile": profile, "values": [], "authentication": ["certificate"], "token": None}
        yield json.dumps({**entry, "until": None, "revoked": None}) + "\n"


def _dynamic_security(numbers: range) -> dict[str, object]:
    """Return dynamic-security.json: a role for each device, since its roles know no placeholders."""
    salt, iterations = os.urandom(12), 101
    digest = hashlib.pbkdf2_hmac("sha512", os.urandom(32), salt, iterations)
    secret = {
        "password": base64.b64encode(digest).decode(),
        "salt": base64.b64encode(salt).decode(),
        "iterations": iterations,
    }

    def acl(kind: str, topic: str) -> dict[str, object]:
        return {"acltype": kind, "topic": topic, "priority": 0, "allow": True}

    everything = [acl("subscribePattern", "#"), acl("publishClientReceive", "#"), acl("unsubscribePattern", "#")]
    control = [acl("publishClientSend", "$CONTROL/#"), acl("subscribePattern", "$CONTROL/#")]
    control += [acl("publishClientReceive", "$CONTROL/#")]
    roles = [{"rolename": READER, "acls": everything}, {"rolename": ADMIN, "acls": control}]
    clients = [{"username": name, "roles": [{"rolename": READER}], **secret} for name in (READER, *READERS)]
    clients.append({"username": ADMIN, "roles": [{"rolename": ADMIN}], **secret})
    for number in numbers:
        name = device(number)
        acls = [
            acl("publishClientSend", f"sensors/{name}/#"),
            acl("publishClientReceive", f"commands/{name}/#"),
            acl("subscribePattern", f"commands/{name}/#"),
        ]
        roles.append({"rolename": name, "acls": acls})
        clients.append({"username": name, "roles": [{"rolename": name}], **secret})
    access = {"publishClientSend": False, "publishClientReceive": False, "subscribe": False, "unsubscribe": True}
    return {"defaultACLAccess": access, "clients": clients, "roles": roles}
