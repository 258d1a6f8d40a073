# SPDX-License-Identifier: Apache-2.0
"""The lab: hosts that boot systemd, a network of their own, and a site folder that reaches them over SSH.

- :class:`Lab`: up, attach, down; its hosts; running a playbook against them.
- :class:`Host`: one host: run a command, read and write files, restart, kill, pause, disconnect.
- :class:`Result`, :class:`PlayResult`: what a command and a playbook did.

A lab that is not `persistent` goes away with the process that made it, even when that is killed: a process of its own
waits for that (:mod:`testbed.reaper`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

# Ryuk, the reaper of testcontainers, is an image from a registry; ours needs none. Read when it is imported.
os.environ["TESTCONTAINERS_RYUK_DISABLED"] = "true"

import docker.errors
import yaml
from docker.types import EndpointConfig, IPAMConfig, IPAMPool
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network
from testcontainers.core.waiting_utils import WaitStrategy

from testbed import boot, engine, image, package, things
from testbed.common import CHECKOUT, STATE, LabError, run, say, step, tail_of

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from testcontainers.core.waiting_utils import WaitStrategyTarget

DOMAIN = "plant.example"
FIELD_HOSTS = ("devices", "attacker")
SUBNET_TRIES = 64


@dataclass(frozen=True)
class Result:
    """What a command on a host did.

    :param rc: its exit code.
    :param raw: its standard output, as bytes.
    :param stderr: its standard error.
    """

    rc: int
    raw: bytes
    stderr: str

    @property
    def stdout(self) -> str:
        """Its standard output as text; bytes that are no UTF-8 are replaced."""
        return self.raw.decode(errors="replace")


@dataclass(frozen=True)
class PlayResult:
    """What a playbook did.

    :param rc: the exit code of ansible-playbook.
    :param stats: host -> {ok, changed, failures, unreachable, skipped, rescued, ignored}.
    :param failures: {host, task, message} of each failed task.
    :param changed_tasks: {host, task} of each task that changed something.
    :param stdout: all that it printed.
    """

    rc: int
    stats: dict[str, dict[str, int]]
    failures: list[dict[str, str]]
    changed_tasks: list[dict[str, str]]
    stdout: str

    @property
    def changed(self) -> int:
        """How many tasks changed something, over all hosts."""
        return sum(host["changed"] for host in self.stats.values())

    @property
    def failed(self) -> int:
        """How many tasks failed and hosts were out of reach, over all hosts."""
        return sum(host["failures"] + host["unreachable"] for host in self.stats.values())


class SystemdRunning(WaitStrategy):
    """Waits until systemd says that the system is up; a host that has died fails at once."""

    def __init__(self, name: str, deadline_s: float = boot.DEADLINE_S) -> None:
        super().__init__()
        self._name = name
        self._deadline_s = deadline_s

    def wait_until_ready(self, container: WaitStrategyTarget) -> None:
        """Wait.

        :raises LabError: when the host died, did not come up in time, or came up with failed units.
        """
        boot.await_running(container.get_wrapped_container(), f"Host {self._name}", self._deadline_s)


class Host:
    """One host of a lab.

    :param name: its name in the lab, such as `gateway-1`.
    :param address: its IPv4 address in the lab's network.
    """

    def __init__(self, lab: Lab, name: str, address: str, container: str) -> None:
        self._lab = lab
        self.name = name
        self.address = address
        self.container = container

    @property
    def fqdn(self) -> str:
        """Its name for other hosts of the lab."""
        return f"{self.name}.{DOMAIN}"

    def exec(
        self,
        command: Sequence[str],
        *,
        check: bool = True,
        input: bytes | str | None = None,  # noqa: A002 - as subprocess.run calls it
        user: str = "root",
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 120,
    ) -> Result:
        """Run a command on the host (no shell: pass ``["sh", "-c", ...]`` for one).

        Secrets belong into `input`; arguments can be read by everyone on the host.

        :param check: refuse an exit code other than 0.
        :raises LabError: when the command failed and `check` is set, took too long, or the host is not running.
        """
        api = self._lab.docker.api
        words = list(command)
        try:
            job = api.exec_create(
                self.container,
                words,
                stdin=input is not None,
                user=user,
                environment=dict(environment) if environment else None,
            )["Id"]
            stream = api.exec_start(job, socket=True)
        except docker.errors.APIError as exc:
            raise LabError(
                f"Running {shlex.join(words[:3])} on {self.name} failed: {exc.explanation}",
                cure=f"See `python -m testbed status`; the host may be stopped or paused (lab {self._lab.name}).",
            ) from exc
        # docker-py hands out a file over the socket; the socket itself can be half closed and given a deadline.
        raw: socket.socket = getattr(stream, "_sock")  # noqa: B009 - an attribute that the type does not tell of
        reader: io.BufferedReader = getattr(stream, "_response").raw._fp.fp  # noqa: B009 - likewise
        try:
            out, err = _talk(raw, reader, input.encode() if isinstance(input, str) else input, timeout_s)
        except TimeoutError as exc:
            raise LabError(
                f"{shlex.join(words[:3])} on {self.name} took longer than {timeout_s:.0f} s.",
                cure="See what the host is doing: `python -m testbed exec`.",
            ) from exc
        finally:
            stream.close()
            raw.close()  # the file over it leaves it open
        rc = api.exec_inspect(job)["ExitCode"]
        result = Result(-1 if rc is None else rc, out, err.decode(errors="replace"))
        if check and result.rc != 0:
            raise LabError(
                f"{shlex.join(words[:6])} on {self.name} exited with {result.rc}.",
                cure="See what it says above.",
                log=result.stdout + result.stderr,
            )
        return result

    def read_file(self, path: str) -> bytes:
        """Return a file's contents.

        :raises LabError: when it cannot be read.
        """
        return self.exec(["cat", "--", path]).raw

    def write_file(self, path: str, data: bytes | str, *, mode: str = "0644", owner: str = "root:root") -> None:
        """Put a file in place in one step: it never is half written, nor readable by more than `mode` says."""
        self.exec(
            [
                "sh",
                "-ceu",
                'umask 077; t=$(mktemp "$1.XXXXXX"); cat >"$t"; chown "$3" "$t"; chmod "$2" "$t"; mv -f "$t" "$1"',
                "sh",
                path,
                mode,
                owner,
            ],
            input=data,
        )

    def restart(self) -> None:
        """Shut the host down in good order and boot it again; returns when it is up."""
        self._lab.docker.api.restart(self.container, timeout=20)
        self._await_boot()

    def kill(self) -> None:
        """Cut the power: the host is gone until :meth:`start`."""
        self._lab.docker.api.kill(self.container)

    def start(self) -> None:
        """Boot a host that was killed; returns when it is up."""
        self._lab.docker.api.start(self.container)
        self._await_boot()

    def _await_boot(self) -> None:
        target = self._lab.docker.containers.get(self.container)

        class Target:
            def get_wrapped_container(self) -> Any:
                return target

        SystemdRunning(self.name).wait_until_ready(Target())  # type: ignore[arg-type] # only this much is asked for

    def pause(self) -> None:
        """Freeze every process of the host; its connections stay open and nothing answers."""
        self._lab.docker.api.pause(self.container)

    def unpause(self) -> None:
        """Let a frozen host go on."""
        self._lab.docker.api.unpause(self.container)

    def disconnect(self) -> None:
        """Pull the network cable."""
        self._lab.docker.api.disconnect_container_from_network(self.container, self._lab.network, force=True)

    def connect(self) -> None:
        """Plug the network cable in again, with the address and names as before."""
        self._lab.docker.api.connect_container_to_network(
            self.container, self._lab.network, ipv4_address=self.address, aliases=_aliases(self.name)
        )


def _aliases(name: str) -> list[str]:
    # The first gateway issues tokens, under a name of its own.
    return [name, f"{name}.{DOMAIN}", *([f"tokens.{DOMAIN}"] if name == "gateway-1" else [])]


def _talk(raw: socket.socket, reader: io.BufferedReader, data: bytes | None, timeout_s: float) -> tuple[bytes, bytes]:
    """Feed a command its input and collect what it prints, until it ends.

    The engine sends frames: one byte for the stream, three of nothing, four for the length, then as many bytes.

    :param reader: what the answer's head was read through. The first frames may have come in one piece with the head,
        and wait in its buffer: who reads from the socket itself loses them.
    """
    deadline = time.monotonic() + timeout_s
    raw.settimeout(timeout_s)
    parts: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}

    def read(count: int) -> bytes:
        got = bytearray()
        while len(got) < count:
            raw.settimeout(max(0.01, deadline - time.monotonic()))
            chunk = reader.read1(min(65536, count - len(got)))
            if not chunk:
                break
            got += chunk
        return bytes(got)

    def feed() -> None:
        # A command may end without reading its input.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, OSError):
            raw.sendall(data or b"")
            raw.shutdown(socket.SHUT_WR)

    with ThreadPoolExecutor(max_workers=1) as pool:
        # Side by side with reading: a command that prints while it reads would else stop both.
        if data is not None:
            pool.submit(feed)
        while len(header := read(8)) == 8:  # noqa: PLR2004 - the length of a frame's head
            stream, length = struct.unpack(">BxxxL", header)
            parts.setdefault(stream, bytearray()).extend(read(length))
    return bytes(parts[1]), bytes(parts[2])


@dataclass(frozen=True)
class Shape:
    """What a lab consists of.

    :param suite: the Debian release of its hosts.
    :param gateways: how many gateways.
    :param ca: where the CA lives: on a host of its own (`authority`), on a gateway (its name) or here (`localhost`).
    :param field: whether there is a host for devices and one for an attacker.
    """

    suite: str = "trixie"
    gateways: int = 2
    ca: str = "authority"
    field: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be built.

        :raises LabError: when it names an unknown suite, too many gateways or an unknown place for the CA.
        """
        if self.suite not in image.SUITES:
            raise LabError(f"There is no suite `{self.suite}`.", cure=f"Choose one of {', '.join(image.SUITES)}.")
        if not 1 <= self.gateways <= 100:  # noqa: PLR2004 - what the addresses below have room for
            raise LabError(f"A lab has 1 to 100 gateways, not {self.gateways}.", cure="Choose another number.")
        if self.ca not in {"authority", "localhost", *self.gateway_names}:
            raise LabError(
                f"The CA cannot live on `{self.ca}`.", cure="Choose `authority`, `localhost` or the name of a gateway."
            )

    @property
    def gateway_names(self) -> tuple[str, ...]:
        """The gateways' names."""
        return tuple(f"gateway-{number}" for number in range(1, self.gateways + 1))

    @property
    def site_hosts(self) -> dict[str, int]:
        """The containers that are in the inventory, each with the last number of its address."""
        hosts = {name: 20 + number for number, name in enumerate(self.gateway_names, start=1)}
        return {"authority": 10, **hosts} if self.ca == "authority" else hosts

    @property
    def hosts(self) -> dict[str, int]:
        """All containers, each with the last number of its address."""
        return {**self.site_hosts, **({"devices": 200, "attacker": 210} if self.field else {})}


@dataclass
class _Guard:
    """What keeps a lab from being left behind: a lock on its name, and the reaper."""

    lock: int
    reaper: subprocess.Popen[bytes] | None = None
    uses: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def release(self, *, keep: bool) -> None:
        """Let go; `keep` tells the reaper to leave the lab alone."""
        if self.reaper is not None and self.reaper.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                if keep:
                    self.reaper.stdin.write(b"k")
                self.reaper.stdin.close()
            self.reaper.wait(timeout=60)
            self.reaper = None
        self.uses.close()
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1


class Lab:
    """A lab that is up. Make one with :meth:`up` or :meth:`attach`; it is a context manager that takes it down again.

    :param name: its name in this checkout.
    """

    def __init__(self, name: str, shape: Shape, subnet: str, containers: dict[str, str]) -> None:
        self.name = name
        self.shape = shape
        self.subnet = subnet
        self.run = things.run_id(name)
        self.network = f"bednet-{self.run}"
        self.docker = engine.client(timeout_s=600)
        self.folder = STATE / "labs" / name
        base = ipaddress.ip_network(subnet).network_address
        self.hosts = {
            host: Host(self, host, str(base + number), containers[host])
            for host, number in shape.hosts.items()
            if host in containers
        }
        self._guard: _Guard | None = None

    # Coming up

    @classmethod
    def up(
        cls,
        name: str,
        suite: str = "trixie",
        gateways: int = 2,
        ca: str = "authority",
        *,
        field: bool = True,
        persistent: bool = False,
    ) -> Lab:
        """Bring a lab up; what an earlier one of the same name left behind is removed first.

        :param ca: `authority` for a host of its own, the name of a gateway, or `localhost` for the control machine.
        :param persistent: it stays when this process ends; else it goes with the process, however that ends.
        :raises LabError: when the name is in use, or something could not be brought up (then nothing is left).
        """
        check_name(name)
        shape = Shape(suite, gateways, ca, field)
        guard = _Guard(_take_name(name))
        try:
            with step("Docker engine"):
                engine.ensure()
                guard.uses.enter_context(engine.in_use())
            with step(f"Host images and the plugin's package ({suite})"), ThreadPoolExecutor(max_workers=2) as pool:
                packaging = pool.submit(package.ensure, suite)
                images = image.ensure((suite,))[suite]
                packaging.result()
            with step(f"Lab `{name}`: {', '.join(shape.hosts)}"):
                return cls._boot(name, shape, images, guard, persistent=persistent)
        except BaseException:
            guard.release(keep=False)
            raise

    @classmethod
    def _boot(cls, name: str, shape: Shape, images: image.Images, guard: _Guard, *, persistent: bool) -> Lab:
        run_of_lab = things.run_id(name)
        folder = STATE / "labs" / name
        connection = engine.client()
        try:
            things.close_connections(things.control_dir(name))
            things.remove(connection, run_of_lab)
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True, mode=0o700)
            things.control_dir(name).mkdir(mode=0o700)
            guard.reaper = _start_reaper(run_of_lab, things.control_dir(name), folder)
            owner = things.PERSISTENT if persistent else things.this_process()
            labels = things.labels(run_of_lab, name, owner)
            try:
                _make_key(folder)
                network, subnet = _make_network(f"bednet-{run_of_lab}", labels, run_of_lab)
                lab = cls(name, shape, subnet, {})
                lab._guard = guard
                lab._boot_hosts(images, network, labels)
                lab._write_site()
                lab._write_state(persistent=persistent)
            except BaseException:
                things.remove(connection, run_of_lab)
                things.close_connections(things.control_dir(name))
                shutil.rmtree(folder, ignore_errors=True)
                raise
        finally:
            connection.close()
        if persistent:
            guard.release(keep=True)
            lab._guard = None
        return lab

    def _boot_hosts(self, images: image.Images, network: Network, labels: dict[str, str]) -> None:
        base = ipaddress.ip_network(self.subnet).network_address
        public = (self.folder / "id_ed25519.pub").read_text(encoding="ascii")

        def boot_host(item: tuple[str, int]) -> tuple[Host, str]:
            name, number = item
            address = str(base + number)
            container = (
                DockerContainer(images.field if name in FIELD_HOSTS else images.host)
                .with_name(f"{self.network}-{name}")
                .with_command(["/bin/sh", "-c", boot.COMMAND])
                .with_network(network)
                .waiting_for(SystemdRunning(name))
                .with_kwargs(
                    hostname=name,
                    domainname=DOMAIN,
                    labels={**labels, "mqtt.bednet.host": name},
                    **boot.OPTIONS,
                    networking_config={
                        network.name: EndpointConfig("1.41", aliases=_aliases(name), ipv4_address=address)
                    },
                )
            )
            for path, options in boot.TMPFS.items():
                container.with_tmpfs_mount(path, options)
            container.start()
            host = Host(self, name, address, container.get_container_id())
            container.get_docker_client().client.close()
            return host, self._let_operator_in(host, public) if name in self.shape.site_hosts else ""

        with ThreadPoolExecutor(max_workers=len(self.shape.hosts)) as pool:
            booted = list(pool.map(boot_host, self.shape.hosts.items()))
        self.hosts = {host.name: host for host, _ in booted}
        (self.folder / "known_hosts").write_text("".join(line for _, line in booted), encoding="ascii")

    @staticmethod
    def _let_operator_in(host: Host, public: str) -> str:
        """Hand the operator's public key over; return the host's own key, read behind the network's back."""
        told = host.exec(
            [
                "sh",
                "-ceu",
                'cd /home/operator/.ssh; umask 077; cat >"$1"; chown operator:operator "$1"; cat "$2"',
                "sh",
                "authorized_keys",
                "/etc/ssh/ssh_host_ed25519_key.pub",
            ],
            input=public,
        )
        kind, key = told.stdout.split()[:2]
        return f"{host.address} {kind} {key}\n"

    @property
    def site(self) -> Path:
        """The generated site folder: what an inventory of a real site looks like, with the lab's addresses."""
        return self.folder / "site"

    @property
    def vault_password_file(self) -> Path:
        """The password of the site's Ansible Vault."""
        return self.folder / "vault-password"

    def _write_site(self) -> None:
        source = CHECKOUT / "inventories/lab"
        if not (source / "hosts.yml").exists():
            raise LabError(f"{source}/hosts.yml is missing.", cure="Restore inventories/lab from git.")
        # Links are followed: a lab's site is a copy that a test may change.
        shutil.copytree(source, self.site, symlinks=False)
        hosts_file = self.site / "hosts.yml"
        inventory = reshape(yaml.safe_load(hosts_file.read_text(encoding="utf-8")), self.shape)
        _write_yaml(hosts_file, inventory)
        ssh = shlex.join(
            [
                *("-F", "none", "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=yes"),
                *("-o", f"UserKnownHostsFile={self.folder / 'known_hosts'}", "-o", "GlobalKnownHostsFile=/dev/null"),
            ]
        )
        for name in self.shape.site_hosts:
            _write_yaml(
                vars_folder(self.site / "host_vars", name) / "connection.yml",
                {
                    "ansible_host": self.hosts[name].address,
                    "ansible_user": "operator",
                    "ansible_ssh_private_key_file": str(self.folder / "id_ed25519"),
                    "ansible_ssh_common_args": ssh,
                },
            )
        self._write_vault()

    def _write_vault(self) -> None:
        _write_secret(self.vault_password_file, secrets.token_urlsafe(32) + "\n")
        target = vars_folder(self.site / "group_vars", "all") / "vault.yml"
        run(
            [
                _tool("ansible-vault"),
                "encrypt",
                f"--output={target}",
                "-",
            ],
            what="Encrypting the site's secrets",
            cure="See whether `.venv/bin/ansible-vault` works.",
            stdin=f"vault_ca_root_passphrase: {secrets.token_urlsafe(32)}\n".encode(),
            env=self.ansible_env(),
        )

    def _write_state(self, *, persistent: bool) -> None:
        state = {
            "name": self.name,
            "persistent": persistent,
            "suite": self.shape.suite,
            "gateways": self.shape.gateways,
            "ca": self.shape.ca,
            "field": self.shape.field,
            "subnet": self.subnet,
            "containers": {host.name: host.container for host in self.hosts.values()},
        }
        draft = self.folder / "lab.json.tmp"
        draft.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        draft.rename(self.folder / "lab.json")

    @classmethod
    def attach(cls, name: str) -> Lab:
        """Return a lab of this checkout that is up already.

        :raises LabError: when there is none of that name, or its hosts are not all there.
        """
        check_name(name)
        cure = f"Run `python -m testbed up {name}`."
        try:
            state = json.loads((STATE / "labs" / name / "lab.json").read_text(encoding="utf-8"))
        except FileNotFoundError as exc:
            raise LabError(f"There is no lab `{name}`.", cure=cure) from exc
        lab = cls(
            name,
            Shape(state["suite"], state["gateways"], state["ca"], state["field"]),
            state["subnet"],
            state["containers"],
        )
        try:
            found = {run.id: run for run in things.runs(lab.docker)}.get(lab.run)
            up = {container for container, is_ in (found.containers if found else {}).items() if is_ == "running"}
            missing = sorted(host for host in lab.shape.hosts if f"{lab.network}-{host}" not in up)
            if missing:
                raise LabError(f"Of the lab `{name}` these hosts are not running: {', '.join(missing)}.", cure=cure)
        except BaseException:
            lab.close()
            raise
        return lab

    # Going down

    def down(self) -> None:
        """Remove the lab: hosts, network, SSH connections and its folder. Harmless when done twice."""
        things.close_connections(things.control_dir(self.name))
        things.remove(self.docker, self.run)
        if self._guard is not None:
            self._guard.release(keep=True)
            self._guard = None
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let go of the lab without taking it down."""
        self.docker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    # Ansible

    def ansible_env(self) -> dict[str, str]:
        """Return the environment in which Ansible's commands, and those of `bednet` that call them, reach the lab."""
        home = self.folder / "ansible"
        return {
            # `bednet` and the other commands of this environment come first, as for a user who activated it.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "ANSIBLE_CONFIG": str(CHECKOUT / "ansible.cfg"),
            "ANSIBLE_HOME": str(home),
            "ANSIBLE_LOCAL_TEMP": str(home / "tmp"),
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(things.control_dir(self.name)),
            "ANSIBLE_VAULT_PASSWORD_FILE": str(self.vault_password_file),
            # Ansible refuses to run in a locale that is not UTF-8.
            "LC_ALL": "C.UTF-8",
        }

    def play(
        self,
        playbook: str,
        *args: str,
        check: bool = True,
        site: Path | None = None,
        env: Mapping[str, str] | None = None,
        echo: Literal["", "all", "tasks"] = "",
        timeout_s: float = 900,
    ) -> PlayResult:
        """Run a playbook against the lab, over SSH, as an operator would.

        :param playbook: a file of `playbooks/`, or a path.
        :param args: further arguments of ansible-playbook.
        :param check: refuse a playbook that failed.
        :param site: another site folder than the lab's own.
        :param env: further environment variables.
        :param echo: what to show while it runs: nothing, `tasks` (their names) or `all`. All of it is also added to
            `ansible.log` in the lab's folder.
        :raises LabError: when it failed and `check` is set, or took too long.
        """
        path = CHECKOUT / "playbooks" / playbook
        if not path.exists() and Path(playbook).exists():
            path = Path(playbook).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="play-") as folder:
            stats_file = Path(folder) / "stats.json"
            process = subprocess.Popen(
                [_tool("ansible-playbook"), "--inventory", str(site or self.site), str(path), *args],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=CHECKOUT,
                env={
                    **os.environ,
                    **self.ansible_env(),
                    "ANSIBLE_CALLBACK_PLUGINS": str(Path(__file__).parent / "callback_plugins"),
                    "ANSIBLE_CALLBACKS_ENABLED": "bednet_stats",
                    "ANSIBLE_FORCE_COLOR": "1" if echo == "all" and sys.stderr.isatty() else "0",
                    "BEDNET_STATS": str(stats_file),
                    **(env or {}),
                },
            )
            stdout = _follow(process, path.name, timeout_s, echo)
            with (self.folder / "ansible.log").open("a", encoding="utf-8") as log:
                log.write(stdout)
            told = json.loads(stats_file.read_text(encoding="utf-8")) if stats_file.exists() else {}
        result = PlayResult(
            process.returncode, told.get("stats", {}), told.get("failures", []), told.get("changed", []), stdout
        )
        if check and result.rc != 0:
            failed = "\n".join(f"{f['host']}: {f['task']}: {f['message']}" for f in result.failures)
            raise LabError(
                f"{path.name} failed (exit code {result.rc}).",
                cure="Read the failed task above; `python -m testbed ssh HOST` opens a shell on the host.",
                log=failed or tail_of(stdout, 40),
            )
        return result


def _follow(process: subprocess.Popen[bytes], name: str, timeout_s: float, echo: Literal["", "all", "tasks"]) -> str:
    """Collect what ansible-playbook prints until it ends."""
    assert process.stdout is not None  # noqa: S101 - for the type checker: it was asked for
    deadline = time.monotonic() + timeout_s
    collected: list[str] = []
    os.set_blocking(process.stdout.fileno(), True)
    with ThreadPoolExecutor(max_workers=1) as pool:

        def read() -> None:
            for raw in process.stdout or ():
                line = raw.decode(errors="replace")
                collected.append(line)
                if echo == "all":
                    print(line, end="", file=sys.stderr, flush=True)
                elif echo == "tasks" and (task := re.match(r"(?:PLAY|TASK|RUNNING HANDLER) \[(.+)\] \*", line)):
                    indent = "    " if line.startswith("PLAY") else "      - "
                    print(f"{indent}{task[1]}", file=sys.stderr, flush=True)

        reader = pool.submit(read)
        try:
            process.wait(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as exc:
            process.kill()
            process.wait()
            raise LabError(
                f"{name} took longer than {timeout_s:.0f} s and was stopped.",
                cure="See at which task it stood, above.",
                log="".join(collected[-40:]),
            ) from exc
        except BaseException:
            process.terminate()
            process.wait()
            raise
        reader.result()
    process.stdout.close()
    return "".join(collected)


def check_name(name: str) -> None:
    """Refuse a name that is no good for containers and folders.

    :raises LabError: when it is.
    """
    if not (name.isascii() and name.replace("-", "").isalnum() and name == name.lower() and len(name) <= 24):  # noqa: PLR2004
        raise LabError(
            f"`{name}` is no name for a lab.",
            cure="Use up to 24 lower-case letters, digits and hyphens, such as `dev`.",
        )


def _take_name(name: str) -> int:
    """Lock the name of a lab for as long as this process holds the descriptor."""
    path = STATE / "locks" / f"lab-{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(descriptor)
        raise LabError(
            f"Another process holds the lab `{name}` of this checkout.",
            cure="Wait for it to end, or choose another name.",
        ) from exc
    return descriptor


def _start_reaper(run_of_lab: str, control_dir: Path, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "testbed.reaper", run_of_lab, str(control_dir), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=CHECKOUT,
        start_new_session=True,
    )


def _make_key(folder: Path) -> None:
    run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "bednet-lab", "-f", folder / "id_ed25519"],
        what="Making the operator's SSH key",
        cure="Install an SSH client (Debian: openssh-client).",
    )


def _tool(name: str) -> str:
    """Return a command of the environment that this process runs in."""
    return str(Path(sys.executable).parent / name)


def candidate_subnets(seed: str) -> Iterator[ipaddress.IPv4Network]:
    """Yield networks to try, derived from a seed: the same lab gets the same addresses where it can."""
    for number in range(SUBNET_TRIES):
        digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
        # 10.64 to 10.191: the lower ones are most often used by companies, the upper ones by Kubernetes and VPNs.
        yield ipaddress.IPv4Network((f"10.{64 + digest[0] % 128}.{digest[1]}.0", 24))


def used_networks(routes: str, resolvers: str) -> list[ipaddress.IPv4Network]:
    """Return the networks that this machine needs: those it has routes to, and its name servers.

    :param routes: the text of /proc/net/route.
    :param resolvers: the text of /etc/resolv.conf.
    """
    used = []
    for line in routes.splitlines()[1:]:
        fields = line.split()
        address, mask = (struct.unpack("<L", bytes.fromhex(fields[index]))[0] for index in (1, 7))
        if mask:
            # The kernel prints the bytes as they lie in memory.
            used.append(
                ipaddress.IPv4Network(
                    (socket.inet_ntoa(struct.pack(">L", address)), str(ipaddress.IPv4Address(mask))), strict=False
                )
            )
    for line in resolvers.splitlines():
        words = line.split()
        if words[:1] == ["nameserver"] and len(words) > 1:
            with contextlib.suppress(ValueError):
                used.append(ipaddress.IPv4Network(words[1]))
    return used


def _make_network(name: str, labels: dict[str, str], seed: str) -> tuple[Network, str]:
    used = used_networks(_text("/proc/net/route"), _text("/etc/resolv.conf"))
    refused = ""
    for subnet in candidate_subnets(seed):
        if any(subnet.overlaps(other) for other in used):
            continue
        network = Network(
            docker_network_kw={
                "driver": "bridge",
                "labels": labels,
                "ipam": IPAMConfig(pool_configs=[IPAMPool(subnet=str(subnet), gateway=str(subnet[1]))]),
            }
        )
        network.name = name
        try:
            return network.create(), str(subnet)
        except docker.errors.APIError as exc:
            # Another lab has this one: the next.
            refused = str(exc.explanation)
            if "overlap" not in refused.lower():
                raise LabError("The engine made no network for the lab.", cure=refused) from exc
    raise LabError(
        f"No free network was found for the lab in {SUBNET_TRIES} tries (the last answer: {refused or 'in use here'}).",
        cure="See `docker network ls`; `python -m testbed sweep` removes what killed labs left behind.",
    )


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def reshape(inventory: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Return an inventory with the hosts of a shape; variables of hosts that stay are kept."""

    def hosts(group: str, names: Sequence[str]) -> dict[str, Any]:
        old = inventory.get(group, {}).get("hosts") or {}
        return {**inventory.get(group, {}), "hosts": {name: old.get(name) for name in names}}

    # The control machine is named so that Ansible's scratch files lie in the checkout and not in the user's home.
    here = {
        "ansible_connection": "local",
        "ansible_python_interpreter": "{{ ansible_playbook_python }}",
        "ansible_remote_tmp": str(STATE / "ansible/tmp"),
    }
    shaped = {**inventory, "gateways": hosts("gateways", shape.gateway_names), "ca": hosts("ca", [shape.ca])}
    if shape.ca == "localhost":
        shaped["ca"]["hosts"]["localhost"] = here
    else:
        shaped["ungrouped"] = {"hosts": {"localhost": here}}
    return shaped


def vars_folder(parent: Path, name: str) -> Path:
    """Return the folder for a group's or host's variables; where there is a file of that name it becomes part of it.

    Ansible reads either the folder or the file, not both.
    """
    folder = parent / name
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in (".yml", ".yaml", ".json"):
        if (file := parent / f"{name}{suffix}").exists():
            file.rename(folder / f"main{suffix}")
    return folder


def _write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text("---\n" + yaml.safe_dump(dict(data), sort_keys=False, width=1000), encoding="utf-8")


def _write_secret(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)


__all__ = ["Host", "Lab", "PlayResult", "Result", "Shape", "say"]
