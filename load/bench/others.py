# SPDX-License-Identifier: Apache-2.0
"""Brokers of other makers, set up as near to Mosquitto with client certificates and without access control as can be.

- :class:`Nats`, :class:`RabbitMQ`: from Debian.
- :class:`Aedes`, :class:`Amqtt`: from npm and PyPI (:mod:`load.bench.peers`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from load.bench.brokers import Broker
from load.bench.peers import FOLDER, versions
from load.bench.stage import SERVER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NATS, RABBITMQ, AEDES, AMQTT = "nats-server", "RabbitMQ", "aedes", "amqtt"
_RABBITMQ = "/usr/lib/rabbitmq/bin/rabbitmq-server"


def _debian_version(package: str) -> str:
    words = ["dpkg-query", "--show", "--showformat=${Version}", package]
    said = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    return f"{package} {said}".strip()


class Nats(Broker):
    """nats-server's MQTT. Its QoS 1 goes through JetStream, in files."""

    def command(self) -> Sequence[str]:
        """See :meth:`load.bench.brokers.Broker.command`."""
        certificate, key = self.stage.identity(SERVER)
        configuration = {
            "server_name": "bench",
            "listen": "127.0.0.1:-1",
            "jetstream": {"store_dir": str(self.folder / "jetstream")},
            "mqtt": {
                "listen": f"127.0.0.1:{self.port}",
                "tls": {
                    "cert_file": str(certificate),
                    "key_file": str(key),
                    "ca_file": str(self.stage.ca),
                    "verify": True,
                },
            },
        }
        path = self.folder / "nats.json"
        path.write_text(json.dumps(configuration))
        return ["nats-server", "--config", str(path)]

    def version(self) -> str:
        """See :meth:`load.bench.brokers.Broker.version`."""
        return _debian_version("nats-server")


class RabbitMQ(Broker):
    """RabbitMQ with its MQTT plugin. Its schedulers do not wait busily, else idle ones would count."""

    family = True

    def prepare(self) -> None:
        """See :meth:`load.bench.brokers.Broker.prepare`."""
        (self.folder / "plugins").write_text("[rabbitmq_mqtt].\n")

    def command(self) -> Sequence[str]:
        """See :meth:`load.bench.brokers.Broker.command`."""
        certificate, key = self.stage.identity(SERVER)
        (self.folder / "rabbitmq.conf").write_text(
            f"""\
listeners.tcp = none
mqtt.listeners.tcp = none
mqtt.listeners.ssl.1 = 127.0.0.1:{self.port}
mqtt.allow_anonymous = true
anonymous_login_user = guest
anonymous_login_pass = guest
mqtt.prefetch = 100
mqtt.tcp_listen_options.nodelay = true
ssl_options.cacertfile = {self.stage.ca}
ssl_options.certfile = {certificate}
ssl_options.keyfile = {key}
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
ssl_options.versions.1 = tlsv1.3
ssl_options.versions.2 = tlsv1.2
log.console = true
log.console.level = error
log.file = false
"""
        )
        return [_RABBITMQ]

    def environment(self) -> Mapping[str, str]:
        """See :meth:`load.bench.brokers.Broker.environment`."""
        return {
            "HOME": str(self.folder),
            "RABBITMQ_NODENAME": "bench@localhost",
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "logs"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
        }

    def version(self) -> str:
        """See :meth:`load.bench.brokers.Broker.version`."""
        return _debian_version("rabbitmq-server")


class Aedes(Broker):
    """aedes, from npm."""

    def prepare(self) -> None:
        """See :meth:`load.bench.brokers.Broker.prepare`."""
        if self.stage.programs.node_modules is None:
            raise FileNotFoundError("npm's packages are not there")
        shutil.copy(FOLDER / "aedes.mjs", self.folder)
        # Node looks for packages beside the script.
        (self.folder / "node_modules").symlink_to(self.stage.programs.node_modules)

    def command(self) -> Sequence[str]:
        """See :meth:`load.bench.brokers.Broker.command`."""
        certificate, key = self.stage.identity(SERVER)
        return ["node", "aedes.mjs", str(self.port), str(certificate), str(key), str(self.stage.ca)]

    def version(self) -> str:
        """See :meth:`load.bench.brokers.Broker.version`."""
        node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=False).stdout.strip()
        return f"aedes {versions()['aedes']} on node {node}"


class Amqtt(Broker):
    """amqtt, from PyPI."""

    def command(self) -> Sequence[str]:
        """See :meth:`load.bench.brokers.Broker.command`."""
        certificate, key = self.stage.identity(SERVER)
        script = str(FOLDER / "amqtt_broker.py")
        return [sys.executable, script, str(self.port), str(certificate), str(key), str(self.stage.ca)]

    def environment(self) -> Mapping[str, str]:
        """See :meth:`load.bench.brokers.Broker.environment`."""
        if self.stage.programs.python_peers is None:
            raise FileNotFoundError("PyPI's packages are not there")
        return {"PYTHONPATH": str(self.stage.programs.python_peers)}

    def version(self) -> str:
        """See :meth:`load.bench.brokers.Broker.version`."""
        return f"amqtt {versions()['amqtt']} on Python {sys.version.split()[0]}"


#: The brokers of other makers, by name, and where each is from.
CLASSES: Mapping[str, type[Broker]] = {NATS: Nats, RABBITMQ: RabbitMQ, AEDES: Aedes, AMQTT: Amqtt}
FROM: Mapping[str, str] = {NATS: "Debian", RABBITMQ: "Debian", AEDES: "npm", AMQTT: "PyPI"}
PROGRAMS: Mapping[str, str] = {NATS: "nats-server", RABBITMQ: _RABBITMQ, AEDES: "node", AMQTT: sys.executable}


def absent(name: str, node_modules: Path | None, python_peers: Path | None) -> str | None:
    """Return why a broker cannot be measured here; None when it can."""
    if shutil.which(PROGRAMS[name]) is None and not Path(PROGRAMS[name]).exists():
        return f"{PROGRAMS[name]} is not installed"
    if name == AEDES and node_modules is None:
        return "npm's packages could not be had"
    if name == AMQTT and python_peers is None:
        return "PyPI's packages could not be had"
    return None
