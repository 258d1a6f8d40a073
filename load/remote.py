# SPDX-License-Identifier: Apache-2.0
"""Generators on other hosts: Locust's own distributed mode, through SSH.

- :func:`deal`: which host plays what.
- :class:`Workers`: started with their share of the plan and the identities in it, and gone when the context is left.

Locust's master listens on this machine's loopback interface only, and a host reaches it through the SSH connection that
started its workers (`ssh -R`). Through the same connection go the code, the plan and the credentials of those devices
that the host plays: into a folder of a unit of systemd's (`RuntimeDirectory`, in memory, readable by the unit's own
user alone), which systemd removes when the unit ends. It ends with the connection, or when its time is up, whatever
happens.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shlex
import subprocess
import tarfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from bednet.errors import BednetError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from load.describe import GeneratorHost
    from load.plan import Plan

CHECKOUT = Path(__file__).resolve().parent.parent
#: Of the package, what the generator imports.
PACKAGE = ("__init__.py", "client.py", "errors.py", "psk.py")
ROOM_S = 30.0
# Below the ports that Linux gives out by itself, above those of well-known services.
_PORTS = range(20000, 32000)
CREDENTIALS = ("ca.pem", "certificate.pem", "client.json", "client_secret", "key.pem", "password", "psk")

# Run on the host by the unit. The archive's length stands before it, as standard input goes on.
_UNPACK = """\
import io, os, runpy, sys, tarfile
os.umask(0o077)
folder = os.environ["RUNTIME_DIRECTORY"]
os.chdir(folder)
size = int(sys.stdin.buffer.readline())
with tarfile.open(fileobj=io.BytesIO(sys.stdin.buffer.read(size))) as tar:
    tar.extractall()
sys.path.insert(0, folder)
sys.argv[0] = "load.worker"
runpy.run_module("load.worker", run_name="__main__")
"""


class RemoteError(BednetError):
    """A host of the group load_generators cannot do its part; the message says why."""

    code = "load-remote"


@dataclass(frozen=True)
class Share:
    """What a host plays: players SHARE, SHARE + N, ... of the plan, for each of its shares."""

    host: GeneratorHost
    shares: tuple[int, ...]


def ask(host: GeneratorHost) -> int:
    """Ask a host whether it is prepared; return how many processes it runs.

    :raises RemoteError: when it is not, or does not answer.
    """
    script = f"test -x {shlex.quote(host.home)}/venv/bin/locust && nproc || echo unprepared\n"
    try:
        done = subprocess.run(host.shell, input=script.encode(), capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise RemoteError(f"{host.name} does not answer: {exc}. Cure: see `ansible -m ping {host.name}`.") from exc
    said = done.stdout.decode(errors="replace").split()
    if done.returncode != 0 or not said:
        tail = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RemoteError(f"{host.name} does not answer: {' '.join(tail)}. Cure: see `ansible -m ping {host.name}`.")
    if not said[-1].isdigit():
        raise RemoteError(
            f"{host.name} is not prepared to generate load. Cure: `ansible-playbook -i SITE playbooks/load.yml`."
        )
    return host.processes or int(said[-1])


def deal(hosts: Sequence[GeneratorHost], processes: Sequence[int]) -> tuple[Share, ...]:
    """Deal shares out to hosts, one for each process."""
    shares = []
    number = 0
    for host, count in zip(hosts, processes, strict=True):
        shares.append(Share(host, tuple(range(number, number + count))))
        number += count
    return tuple(shares)


def archive(plan: Plan, share: Share) -> bytes:
    """Return what a host needs: code, plan, and the credentials of those that it plays, and of no others."""
    out = io.BytesIO()
    mine = {player.id for number in share.shares for player in plan.players[number :: plan.generators]}
    players = tuple(replace(player, bundle=f"bundles/{player.id}") for player in plan.players)
    document = json.dumps({"version": _version(), **asdict(replace(plan, players=players, ca="ca.pem"))})

    with tarfile.open(fileobj=out, mode="w") as tar:

        def add(name: str, data: bytes) -> None:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o600
            tar.addfile(entry, io.BytesIO(data))

        for file in sorted((CHECKOUT / "load").glob("*.py")):
            add(f"load/{file.name}", file.read_bytes())
        for name in PACKAGE:
            add(f"bednet/{name}", (CHECKOUT / "src/bednet" / name).read_bytes())
        add("plan.json", document.encode())
        add("ca.pem", Path(plan.ca).read_bytes())
        for player in plan.players:
            if player.id in mine:
                for name in CREDENTIALS:
                    file = Path(player.bundle) / name
                    if file.exists():
                        add(f"bundles/{player.id}/{name}", file.read_bytes())
    return out.getvalue()


def _version() -> int:
    from load.plan import VERSION  # noqa: PLC0415 - a name that says more there

    return VERSION


class Workers:
    """The workers of a run, on all hosts; a context that ends them when it is left.

    :param port: where Locust's master listens, on this machine's loopback interface.
    :param deadline_s: after so many seconds systemd ends them, whatever became of us.
    """

    def __init__(self, plan: Plan, shares: Sequence[Share], port: int, deadline_s: float) -> None:
        self._plan = plan
        self._shares = list(shares)
        self._port = port
        self._deadline_s = deadline_s
        self._run = secrets.token_hex(4)
        self._processes: list[tuple[Share, subprocess.Popen[bytes]]] = []
        self._said: dict[str, list[str]] = {share.host.name: [] for share in shares}
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        try:
            for share in self._shares:
                self._start(share)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def unit(self) -> str:
        """The unit's name on each host."""
        return f"bednet-load-{self._run}"

    def command(self, share: Share) -> list[str]:
        """Return the command that starts a host's workers; it holds no secret."""
        words, target = share.host.reach
        # On this machine itself there is nothing to forward.
        port = secrets.choice(_PORTS) if target else self._port
        options = {
            "DynamicUser": "yes",
            "RuntimeDirectory": self.unit,
            "RuntimeDirectoryMode": "0700",
            "RuntimeMaxSec": f"{self._deadline_s:.0f}",
            "TimeoutStopSec": "15",
            "LimitNOFILE": "1048576",
            "UMask": "0077",
            "ProtectSystem": "strict",
            "ProtectHome": "yes",
            "PrivateTmp": "yes",
            "PrivateDevices": "yes",
            "ProtectKernelTunables": "yes",
            "ProtectControlGroups": "yes",
            "CapabilityBoundingSet": "",
            "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
            "LimitCORE": "0",
        }
        remote = ["sudo", "-n", "systemd-run", "--quiet", "--pipe", "--wait", "--collect", f"--unit={self.unit}"]
        remote += [f"--property={name}={value}" for name, value in options.items()]
        remote += [f"{share.host.home}/venv/bin/python", "-I", "-c", _UNPACK, str(port), share.host.name]
        remote += [str(number) for number in share.shares]
        if not target:
            return remote
        forward = f"127.0.0.1:{port}:127.0.0.1:{self._port}"
        own = ["-o", "ControlPath=none", "-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=5"]
        own += ["-o", "ServerAliveCountMax=3", "-R", forward]
        return [*words, *own, *target, shlex.join(remote)]

    def _start(self, share: Share) -> None:
        try:
            process = subprocess.Popen(
                self.command(share),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as exc:
            raise RemoteError(f"{share.host.name}: {exc}") from exc
        self._processes.append((share, process))
        thread = threading.Thread(target=self._read, args=(share, process), daemon=True)
        thread.start()
        self._threads.append(thread)
        data = archive(self._plan, share)
        assert process.stdin is not None
        # A host that refuses hangs up in the middle, and says why.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{len(data)}\n".encode() + data)
            process.stdin.flush()

    def _read(self, share: Share, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            text = line.decode(errors="replace").rstrip()
            self._said[share.host.name].append(text)
            if text.startswith("    "):
                os.write(2, f"    {share.host.name}:{text[3:]}\n".encode())

    def lost(self) -> str:
        """Return what became of a host that ended before the run; empty where none has."""
        for share, process in self._processes:
            if process.poll() is not None:
                said = [line for line in self._said[share.host.name] if not line.startswith("    ") and line][-1:]
                return f"{share.host.name} ended (exit code {process.returncode}){': ' + said[0] if said else ''}"
        return ""

    def _end(self) -> None:
        """End the workers, and see that nothing of them stays."""
        for _, process in self._processes:
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        until = time.monotonic() + ROOM_S
        left = []
        for share, process in self._processes:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                left.append(share.host)
        for thread in self._threads:
            thread.join(5)
        for _, process in self._processes:
            if process.stderr is not None:
                process.stderr.close()
        for host in left:
            self._stop(host)

    def _stop(self, host: GeneratorHost) -> None:
        """Stop a host's unit by another connection; where that fails too, its time runs out by itself."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            script = f"systemctl stop {self.unit}.service\n".encode()
            subprocess.run(host.shell, input=script, capture_output=True, timeout=30, check=False)
