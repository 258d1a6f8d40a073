# SPDX-License-Identifier: Apache-2.0
"""What settings change: a gateway as the role sets it up, and with one thing changed; prints JSON.

- :data:`SETTINGS`: what is changed.
- :func:`run`: measures them side by side, as :mod:`load.bench.rounds` does with brokers.
- :func:`page`: docs/tuning.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from load.bench import report
from load.bench.brokers import BEDNET, Mosquitto, Variant
from load.bench.rounds import Bench, machine, more_files, programs_of, programs_parser, say
from load.bench.stage import Kind, Programs, Stage
from load.bench.wire import Endpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BASE = "as the role sets it up"
#: What the role's templates write with its defaults (mosquitto.conf.j2, openssl.cnf.j2), as far as it bears on speed.
ROLE_LINES = (
    "max_packet_size 65536",
    "message_size_limit 65536",
    "max_inflight_messages 20",
    "max_queued_messages 1000",
    "max_queued_bytes 1048576",
    "memory_limit 268435456",
    "check_retain_source true",
    "set_tcp_nodelay true",
    "persistence true",
    "autosave_interval 60",
    "sys_interval 10",
    "connection_messages true",
    "max_connections 1000",
)
_CIPHERS = ":".join(
    f"ECDHE-{key}-{cipher}"
    for cipher in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")
    for key in ("ECDSA", "RSA")
)
_AES128, _AES256, _CHACHA20 = "TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"
ROLE_OPENSSL = {
    "MinProtocol": "TLSv1.2",
    "Groups": "X25519:P-256:P-384",
    "CipherString": _CIPHERS,
    "Ciphersuites": f"{_AES128}:{_AES256}:{_CHACHA20}",
}
UNITS = Path("/run/systemd/system")
IN_CONTAINER = Path("/.dockerenv")
SLICE_S = 0.12
HANDSHAKES = 12


@dataclass(frozen=True)
class Setting:
    """One thing that is changed.

    :param name: what, in words.
    :param group: the table that it stands in.
    :param variant: how; see :class:`load.bench.brokers.Variant`.
    :param unit: lines of the [Service] section of the unit that it runs as. :param sysctls: see
        :class:`load.bench.brokers.Variant`.
    :param messages: whether messages are measured, and not only connections.
    :param tls12: whether the client speaks TLS 1.2 and nothing newer.
    """

    name: str
    group: str
    lines: tuple[str, ...] = ()
    openssl: tuple[tuple[str, str], ...] = ()
    server_key: str = "P-256"
    crl_entries: int | None = 0
    environment: tuple[tuple[str, str], ...] = ()
    unit: tuple[str, ...] | None = None
    sysctls: tuple[tuple[str, str], ...] | None = None
    messages: bool = False
    tls12: bool = False

    @property
    def variant(self) -> Variant:
        """The role's settings with this one changed."""
        lines = {line.split()[0]: line for line in (*ROLE_LINES, *self.lines)}
        return Variant(
            (*(line for line in lines.values() if not line.startswith("log_type ")), *self._log_types()),
            {**ROLE_OPENSSL, **dict(self.openssl)},
            self.server_key,
            self.crl_entries,
            dict(self.environment),
            # A namespace is made by a unit.
            () if self.unit is None and self.sysctls is not None else self.unit,
            None if self.sysctls is None else dict(self.sysctls),
        )

    def _log_types(self) -> tuple[str, ...]:
        own = tuple(line for line in self.lines if line.startswith("log_type "))
        return own or tuple(f"log_type {name}" for name in ("error", "warning", "notice", "information"))


_TLS, _CERTIFICATES, _OPTIONS = "TLS", "Certificates and the revocation list", "Mosquitto's options"
_UNIT, _KERNEL = "The unit", "The kernel"
_TEMPLATES = Path(__file__).resolve().parents[2] / "roles/mosquitto/templates"
#: What the role's unit gives up, as far as it is no list of files or ports.
SANDBOX = tuple(
    line
    for name in ("_hardening.j2", "mosquitto.service.j2")
    for line in (_TEMPLATES / name).read_text(encoding="utf-8").splitlines()
    if "=" in line and not line.startswith("#") and (name == "_hardening.j2" or line.startswith("RestrictAddress"))
)
SETTINGS = (
    Setting("a client that speaks TLS 1.2 only", _TLS, tls12=True),
    Setting("TLS 1.3 only", _TLS, openssl=(("MinProtocol", "TLSv1.3"),), lines=("tls_version tlsv1.3",)),
    Setting("key exchange by P-256 only", _TLS, openssl=(("Groups", "P-256"),)),
    Setting("key exchange by X25519MLKEM768 (post-quantum)", _TLS, openssl=(("Groups", "X25519MLKEM768:X25519"),)),
    Setting("one session ticket for each handshake instead of two", _TLS, openssl=(("NumTickets", "1"),)),
    Setting("no session tickets", _TLS, openssl=(("NumTickets", "0"),)),
    Setting("session tickets kept by the server", _TLS, openssl=(("Options", "-SessionTicket"),)),
    Setting("AES-256-GCM", _TLS, openssl=(("Ciphersuites", _AES256),), messages=True),
    Setting("ChaCha20-Poly1305", _TLS, openssl=(("Ciphersuites", _CHACHA20),), messages=True),
    Setting("the kernel does TLS (KTLS)", _TLS, openssl=(("Options", "KTLS"),), messages=True),
    Setting("server key RSA-2048", _CERTIFICATES, server_key="RSA-2048"),
    Setting("server key P-384", _CERTIFICATES, server_key="P-384"),
    Setting("server key Ed25519", _CERTIFICATES, server_key="Ed25519"),
    Setting("no CRL", _CERTIFICATES, crl_entries=None),
    Setting("a CRL of 1,000 certificates", _CERTIFICATES, crl_entries=1000),
    Setting("a CRL of 10,000 certificates", _CERTIFICATES, crl_entries=10_000),
    Setting("set_tcp_nodelay false", _OPTIONS, lines=("set_tcp_nodelay false",), messages=True),
    Setting("max_inflight_messages 100", _OPTIONS, lines=("max_inflight_messages 100",), messages=True),
    Setting("max_inflight_messages 0 (no limit)", _OPTIONS, lines=("max_inflight_messages 0",), messages=True),
    Setting("persistence false", _OPTIONS, lines=("persistence false",), messages=True),
    Setting("sys_interval 0", _OPTIONS, lines=("sys_interval 0",), messages=True),
    Setting(
        "no log of connections", _OPTIONS, lines=("connection_messages false", "log_type error", "log_type warning")
    ),
    # The base is a process of no unit.
    Setting("a unit that gives nothing up", _UNIT, unit=(), messages=True),
    Setting("a unit that gives up what the role's does", _UNIT, unit=SANDBOX, messages=True),
    Setting(
        "only its SystemCallFilter",
        _UNIT,
        unit=tuple(line for line in SANDBOX if line.startswith("SystemCall")),
        messages=True,
    ),
    Setting("LimitNOFILE=524288", _UNIT, unit=("LimitNOFILE=524288",), messages=True),
    Setting("MALLOC_ARENA_MAX=1", _UNIT, environment=(("MALLOC_ARENA_MAX", "1"),), messages=True),
    Setting(
        "memory is given back seldom (MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_: 16 MiB)",
        _UNIT,
        environment=(("MALLOC_TRIM_THRESHOLD_", "16777216"), ("MALLOC_TOP_PAD_", "16777216")),
        messages=True,
    ),
    # Each in a network namespace, and so is the client's end.
    Setting("a network namespace of its own, and nothing changed", _KERNEL, sysctls=(), messages=True),
    *(
        Setting(", ".join(f"{name} {value}" for name, value in sysctls), _KERNEL, sysctls=sysctls, messages=True)
        for sysctls in (
            (("net.core.somaxconn", "65535"),),
            (("net.ipv4.tcp_autocorking", "0"),),
            (("net.ipv4.tcp_slow_start_after_idle", "0"),),
            (("net.ipv4.tcp_timestamps", "0"),),
            (("net.ipv4.tcp_notsent_lowat", "16384"),),
            (("net.ipv4.tcp_rmem", "4096 16384 65536"), ("net.ipv4.tcp_wmem", "4096 16384 65536")),
        )
    ),
)
_MESSAGES = (
    ("in0_s", "fan-in, QoS 0"),
    ("in1_s", "fan-in, QoS 1"),
    ("out0_s", "fan-out, QoS 0"),
    ("out1_s", "fan-out, QoS 1"),
)
_CONNECTIONS = (
    ("full_cpu_ms", "full: ms CPU", "{:.2f}"),
    ("full_wall_ms", "ms until CONNACK", "{:.1f}"),
    ("resumed_cpu_ms", "resumed: ms CPU", "{:.2f}"),
    ("resumed_wall_ms", "ms until CONNACK", "{:.1f}"),
)
#: A difference that we speak of, as a share; less is noise on this machine even where the quartiles agree.
_SPOKEN_OF = 0.03
#: Fewer ratios have no interval that holds their median by 95 %.
_ENOUGH = 6
_INTRODUCTION = """\
What a setting changes, on a gateway that the role sets up with its defaults: a broker with bednet's plugin, and beside
it the same one with one thing changed. `python -m load.bench tuning` measures it and writes this page. Each cell has
the figure and, in brackets, its ratio to the defaults, measured right beside it: the median of the ratios round by
round; bold where it is off by {spoken:.0%} or more and 1 lies outside of the interval that holds the median (95 %, by
the order of the values). The rest is noise. The client offers what OpenSSL offers by itself, so that the broker's
settings decide.
"""

_OF_GROUPS = {
    _UNIT: "The base is a process of no unit; what one costs by itself is in the row of that which gives nothing up.",
    _KERNEL: """\
        Each stands in a network namespace of its own, the client's end too, so they are to be compared with the row in
        which nothing else is changed. Such a setting belongs into a file of /etc/sysctl.d; the role writes none.""",
}
_FOLLOWS = """\
## What follows

- Resumed handshakes save the most, and the broker offers them as it is: a client that keeps its TLS session (Python:
  `SSLSocket.session`) costs about half. A resumed session shows its certificate to the plugin once more, and what has
  been revoked is refused.
- A CRL costs something at each full handshake, and more with its length, for OpenSSL checks its signature each time.
  Where the plugin decides it is a second lock: the plugin knows the serial numbers of revoked certificates itself.
- `set_tcp_nodelay` stays on. Without it bursts get cheaper, and each connection waits some 40 ms for nothing.
- P-256 is the cheapest key for a server, X25519 the cheapest key exchange, AES-128-GCM the cheapest cipher where the
  processor has instructions for it. A post-quantum key exchange costs little beside the handshake.
- A larger `max_inflight_messages` makes bursts of QoS 1 cheaper, as fewer messages go through the queue.
- What the unit takes away from the broker costs nothing that shows.
- The kernel is left as it is. Mosquitto listens with a backlog of 100, so a larger `net.core.somaxconn` is of no use.

## Not measured

- What belongs to the whole machine and to no network namespace: `net.core.busy_poll`, `net.core.netdev_max_backlog`,
  receive packet steering, congestion control (a loopback interface is never congested), `vm.*`, huge pages, the
  processor's clock.
- `CPUWeight`, `Nice`, `MemoryHigh`: they say who goes first where there is too little, and `CPUWeight` and
  `MemoryHigh` only with version 2 of control groups, which this machine had not.
- `SocketBindDeny` and `SocketBindAllow`: they are asked once, when the broker begins to listen.
"""


def run(programs: Programs, rounds: int, scale: float, names: Sequence[str] | None = None) -> dict[str, object]:
    """Measure the settings, or those that are named.

    :param scale: 1 for the figures that are published; less for a quick look.
    """
    more_files()
    where = machine()
    if UNITS.parent.is_dir() and IN_CONTAINER.exists():
        # Never the machine's own. In a container even what belongs to its network namespace is not to be written.
        subprocess.run(["mount", "-o", "remount,rw", "/proc/sys"], check=True)
        UNITS.mkdir(exist_ok=True)
    settings = {BASE: Setting(BASE, "", messages=True)}
    settings |= {setting.name: setting for setting in SETTINGS if not names or setting.name in names}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        Path(folder).chmod(0o755)
        stage = Stage(Path(folder), programs)
        bench = Bench(stack, lambda kind: kind.name != BASE, BASE, lambda _: True)
        for setting in settings.values():
            broker = Gateway(stage, setting)
            with bench.bearing(broker.kind):
                bench.start(broker, crowd=setting.messages)
        old = {setting.name for setting in settings.values() if setting.tls12}
        say("warming up")
        bench.messages(SLICE_S * scale, warm=True)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            bench.messages(SLICE_S * scale)
            bench.handshakes(max(5, int(HANDSHAKES * scale)), old)
    return {
        "rounds": rounds,
        "scale": scale,
        "machine": where,
        "kinds": bench.results,
        "versions": bench.versions,
        "missing": {**bench.missing, **bench.failed},
    }


class Gateway(Mosquitto):
    """A broker with the role's settings, and one changed."""

    def __init__(self, stage: Stage, setting: Setting) -> None:
        super().__init__(stage, Kind(setting.name), BEDNET, setting.variant)

        self._unit = f"bench-{hashlib.sha256(setting.name.encode()).hexdigest()[:12]}.service"
        self._pid = 0

    def _lines(self) -> list[str]:
        return [*super()._lines(), f"persistence_location {self.folder}/"]

    def command(self) -> Sequence[str]:
        """See :meth:`load.bench.brokers.Broker.command`."""
        words, unit, sysctls = super().command(), self.variant.unit, self.variant.sysctls
        if unit is None:
            return words
        lines = ["[Service]", "Type=exec", f"ExecStart={' '.join(words)}", f"WorkingDirectory={self.folder}"]
        lines += [f"StandardError=append:{self._log}", f"ReadWritePaths={self.folder}"]
        lines += [f"Environment={name}={value}" for name, value in self.environment().items()]
        if sysctls is not None:
            lines.append("PrivateNetwork=true")
            for name, value in sysctls.items():
                path = f"/proc/sys/{name.replace('.', '/')}"
                lines.append(f"ExecStartPre=/bin/sh -c 'echo {value} >{path}'")
        (UNITS / self._unit).write_text("\n".join([*lines, *unit]) + "\n", encoding="utf-8")
        subprocess.run(["systemctl", "daemon-reload"], check=True)
        return ["systemctl", "start", "--wait", self._unit]

    @property
    def _main(self) -> int:
        """The unit's process.

        :raises OSError: when there is none yet.
        """
        if not self._pid:
            words = ["systemctl", "show", "--property=MainPID", "--value", self._unit]
            self._pid = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            if not self._pid:
                raise ConnectionRefusedError(f"{self._unit} has no process")
        return self._pid

    def _find_members(self) -> list[int]:
        return super()._find_members() if self.variant.unit is None else [self._main]

    @property
    def endpoint(self) -> Endpoint:
        """See :attr:`load.bench.brokers.Broker.endpoint`."""
        namespace = None if self.variant.sysctls is None else Path(f"/proc/{self._main}/ns/net")
        return Endpoint(self.port, namespace=namespace)

    def stop(self) -> None:
        """See :meth:`load.bench.brokers.Broker.stop`."""
        if self.variant.unit is not None:
            subprocess.run(["systemctl", "stop", self._unit], check=False)
        super().stop()


def clear(ratios: Sequence[float]) -> bool:
    """Say whether ratios show a difference; a handful never does."""
    low, high = report.interval(ratios)
    return len(ratios) >= _ENOUGH and (low > 1 or high < 1) and abs(statistics.median(ratios) - 1) >= _SPOKEN_OF


def _cell(figures: Mapping[str, Sequence[float]], key: str, form: str) -> str:
    values, base = figures.get(key), figures.get(f"base_{key}")
    if not values:
        return "-"
    said = form.format(statistics.median(values))
    if not base or len(base) != len(values):
        return said
    found = report.ratios(values, base)
    ratio = f"{statistics.median(found):.2f}"
    return f"{said} (**{ratio}**)" if clear(found) else f"{said} ({ratio})"


def page(figures: Mapping[str, Any]) -> str:
    """Return docs/tuning.md."""
    kinds, base = figures["kinds"], figures["kinds"][BASE]
    lines = [
        "# Tuning",
        "",
        "<!-- written by `python -m load.bench tuning`; the words are in load/bench/tuning.py -->",
        "",
    ]
    scaled = f" (a quick look: {figures['scale']:g} of the usual amount)" if figures["scale"] != 1 else ""
    lines += [*report.prose(_INTRODUCTION.format(spoken=_SPOKEN_OF)), ""]
    where = f"{figures['rounds']} rounds on {figures['machine']['date']}{scaled}. {figures['machine']['processor']}; "
    where += f"{figures['machine']['system']}; {', '.join(dict.fromkeys(figures['versions'].values()))}."
    lines += [*report.prose(where), "", *report.busy(figures)]
    lines += [f"- **{name}: not measured.** {why}." for name, why in figures["missing"].items()]
    lines += [""] if figures["missing"] else []
    for group in dict.fromkeys(setting.group for setting in SETTINGS):
        names = [setting.name for setting in SETTINGS if setting.group == group and setting.name in kinds]
        if not names:
            continue
        lines += [f"## {group}", ""]
        lines += [*report.prose(_OF_GROUPS[group]), ""] if group in _OF_GROUPS else []
        rows = [[BASE, *(report.cell(base.get(key), form) for key, _, form in _CONNECTIONS)]]
        for name in names:
            cells = [_cell(kinds[name], key, form) for key, _, form in _CONNECTIONS]
            if "resumed_cpu_ms" not in kinds[name]:
                cells[2] = "does not resume"
            rows.append([name, *cells])
        lines += [*report.table(["one connection", *(title for _, title, _ in _CONNECTIONS)], rows), ""]
        speaking = [name for name in names if "in0_s" in kinds[name]]
        if speaking:
            rows = [[BASE, *(report.cell(base.get(key), "{:.2f}") for key, _ in _MESSAGES)]]
            rows += [[name, *(_cell(kinds[name], key, "{:.2f}") for key, _ in _MESSAGES)] for name in speaking]
            lines += [*report.table(["s CPU per 100,000 messages", *(title for _, title in _MESSAGES)], rows), ""]
    return "\n".join([*lines, _FOLLOWS])


def main() -> int:
    """Measure and print JSON."""
    arguments = programs_parser("Measure what settings change; prints JSON.").parse_args()
    json.dump(run(programs_of(arguments), arguments.rounds, arguments.scale, arguments.kind), sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
