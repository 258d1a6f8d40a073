# SPDX-License-Identifier: Apache-2.0
"""A Docker engine that answers, whatever the machine looked like before.

- :func:`ensure`: use the engine that answers; else install Debian's and start it.
- :func:`stop_if_ours`: stop an engine that we started, when nothing uses it any more.
- :func:`purge`: take away the engine that we installed, with its data.
- :func:`client`: a connection to the engine.

What we installed and started is written down beside the engine's data, not in the checkout: the engine belongs to
the machine, and another checkout must know as well whose it is. We speak to the engine over its socket and let the
protocol's version be negotiated, so a `docker` command that is newer than the engine does not matter.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import docker
import docker.errors
import requests
from docker.context import ContextAPI

from testbed.common import LABEL, LabError, debian_like, is_root, locked, run, say, tail_of

if TYPE_CHECKING:
    from collections.abc import Iterator

ENGINE_PACKAGES = ("docker.io", "iptables")
DEFAULT_SOCKET = "unix:///var/run/docker.sock"
_detached: list[subprocess.Popen[bytes]] = []


@atexit.register
def _let_go() -> None:
    """Python complains of a child that still runs when its object goes; these are meant to."""
    for daemon in _detached:
        daemon.returncode = daemon.returncode or 0


START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 30.0

INSTALL_HINT = (
    "Install Docker Engine (Debian or Ubuntu: `apt-get install docker.io iptables`; elsewhere see "
    "https://docs.docker.com/engine/install/), start it, let this user speak to it (group `docker`), and try again."
)


@dataclass(frozen=True)
class Places:
    """Where an engine of ours keeps its things; the defaults are Docker's own, tests give others."""

    data: Path = Path("/var/lib/docker")
    run: Path = Path("/run")

    @property
    def record(self) -> Path:
        """What we installed and started."""
        return self.data / "bednet-engine.json"

    @property
    def lock(self) -> Path:
        """Shared by all who use the engine, held alone by whoever starts or stops it."""
        return self.data / "bednet-engine.lock"

    @property
    def log(self) -> Path:
        """The log of an engine that we started."""
        return self.data / "bednet-engine.log"


@dataclass(frozen=True)
class Record:
    """What we did to this machine.

    :param packages: the packages that were not there before we installed the engine.
    :param pid: the process of the engine that we started; 0 where we started none, or systemd did it for us.
    :param pid_start: when that process began, in clock ticks since boot: a pid alone may belong to another by now.
    :param unit: whether we asked systemd to start the engine.
    """

    packages: tuple[str, ...] = ()
    pid: int = 0
    pid_start: int = 0
    unit: bool = field(default=False)


class NoEngineError(LabError):
    """No engine answers."""


def configured_host() -> str | None:
    """Return where the user wants the engine to be: DOCKER_HOST, or the chosen `docker context`; None for neither."""
    if host := os.environ.get("DOCKER_HOST"):
        return host
    context = ContextAPI.get_current_context()
    return None if context is None or context.Name == "default" else str(context.Host)


def client(timeout_s: int = 120) -> docker.DockerClient:
    """Return a connection to the engine; the caller closes it.

    :raises LabError: when no engine answers.
    """
    host = configured_host()
    try:
        _knock(host or DEFAULT_SOCKET)
        if host and "DOCKER_HOST" not in os.environ:
            connection = docker.DockerClient(base_url=host, timeout=timeout_s)
        else:
            connection = docker.from_env(timeout=timeout_s)
        connection.ping()
    except (docker.errors.DockerException, requests.RequestException, OSError) as exc:
        raise NoEngineError(f"No Docker engine answers ({exc}).", cure="Run `python -m testbed engine up`.") from exc
    return connection


def _knock(host: str) -> None:
    """See whether somebody listens on a Unix socket, before docker-py does: it leaves its socket open on failure."""
    if not host.startswith("unix://"):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(host.removeprefix("unix://"))
        except PermissionError as exc:
            raise LabError(
                "A Docker engine is running, but this user may not speak to it.",
                cure="Add the user to the group `docker` (`usermod -aG docker USER`, log in again), or run as root.",
            ) from exc


def answers() -> bool:
    """Tell whether a Docker engine answers right now.

    :raises LabError: when one is there, but not for this user.
    """
    try:
        client(timeout_s=10).close()
    except NoEngineError:
        return False
    return True


# How long another process may take to install and start the engine.
TURN_S = 300.0


def ensure(places: Places | None = None) -> None:
    """Make sure that an engine answers.

    :raises LabError: when none answers and none can be started here.
    """
    if answers():
        return
    places = places or Places()
    if host := configured_host():
        raise LabError(
            f"No Docker engine answers at {host}.",
            cure="Start that engine, or unset DOCKER_HOST (or run `docker context use default`).",
        )
    if not is_root():
        raise LabError("No Docker engine answers, and this user is not root.", cure=INSTALL_HINT)
    if shutil.which("dockerd") is None and not debian_like():
        raise LabError("No Docker engine is installed, and this is neither Debian nor Ubuntu.", cure=INSTALL_HINT)
    places.data.mkdir(mode=0o710, parents=True, exist_ok=True)
    deadline = time.monotonic() + TURN_S
    # Not a lock that is waited for: who starts the engine goes on to use it, and keeps the lock, shared, all that time.
    while not answers():
        with locked(places.lock, wait=False) as alone:
            if alone and not answers():
                if shutil.which("dockerd") is None or shutil.which("iptables") is None:
                    _install(places)
                if not answers():
                    _start(places)
                return
        if time.monotonic() > deadline:
            raise LabError(
                f"Another process has held the Docker engine for {TURN_S:.0f} s, and it does not answer.",
                cure="End that process (`python -m testbed status` names its labs), or start the engine yourself.",
            )
        time.sleep(0.2)


@contextlib.contextmanager
def in_use(places: Places | None = None) -> Iterator[None]:
    """Keep an engine that we started from being stopped by another process meanwhile."""
    places = places or Places()
    if not places.record.exists() or not os.access(places.data, os.W_OK):
        yield
        return
    with locked(places.lock, shared=True):
        yield


def read_record(places: Places) -> Record:
    """Read what we did to this machine; an empty record where we did nothing."""
    try:
        raw = json.loads(places.record.read_text(encoding="utf-8"))
        return Record(tuple(raw["packages"]), int(raw["pid"]), int(raw["pid_start"]), bool(raw["unit"]))
    except FileNotFoundError:
        return Record()
    except (ValueError, KeyError, TypeError) as exc:
        raise LabError(
            f"{places.record} cannot be read: {exc!r}.", cure="Remove it; then `make purge` leaves the engine in place."
        ) from exc


def _write_record(places: Places, record: Record) -> None:
    draft = places.record.with_suffix(".tmp")
    draft.write_text(json.dumps(asdict(record)) + "\n", encoding="utf-8")
    draft.replace(places.record)


# Installing


def _installed() -> set[str]:
    listing = run(
        ["dpkg-query", "-W", "-f", "${binary:Package} ${db:Status-Abbrev}\n"],
        what="Reading the list of installed packages",
        cure="See whether dpkg works on this machine.",
    )
    return {line.split()[0] for line in listing.splitlines() if line.split()[1:2] == ["ii"]}


def apt_install_command(packages: tuple[str, ...]) -> list[str]:
    """Return the command that installs packages without asking and without anything merely recommended."""
    return ["apt-get", "install", "--yes", "--no-install-recommends", *packages]


def _install(places: Places) -> None:
    say(f"installing {' and '.join(ENGINE_PACKAGES)} from Debian")
    before = _installed()
    apt_install(ENGINE_PACKAGES)
    old = read_record(places)
    fresh = sorted(_installed() - before)
    _write_record(places, Record(tuple(sorted({*old.packages, *fresh}))))


def apt_install(packages: tuple[str, ...]) -> None:
    """Install packages, with fresh package lists where the lists at hand do not do.

    :raises LabError: when apt-get fails with fresh lists too.
    """
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    command = apt_install_command(packages)
    cure = f"Run `{' '.join(command)}` by hand and see what it says; the machine needs a Debian mirror in reach."
    try:
        run(command, what=f"Installing {' '.join(packages)}", cure=cure, env=env)
    except LabError:
        # Lists that were never fetched, or name files that the mirror no longer has.
        apt_update()
        run(command, what=f"Installing {' '.join(packages)}", cure=cure, env=env)


def apt_update() -> None:
    """Fetch the package lists.

    :raises LabError: when apt-get fails.
    """
    say("fetching the package lists")
    run(
        ["apt-get", "update"],
        what="Fetching the package lists",
        cure="Run `apt-get update` by hand and see what it says.",
        env={"DEBIAN_FRONTEND": "noninteractive"},
    )


# Starting


def _start(places: Places) -> None:
    say("starting the Docker engine")
    clear_stale(places)
    record = read_record(places)
    if (places.run / "systemd/system").is_dir():
        try:
            run(["systemctl", "start", "docker"], what="Starting docker.service", cure="")
        except LabError as exc:
            journal = subprocess.run(
                ["journalctl", "-u", "docker", "-n", "40", "--no-pager"], capture_output=True, check=False
            )
            raise LabError(
                "The Docker engine did not start.",
                cure="See `systemctl status docker` and `journalctl -u docker`.",
                log=journal.stdout.decode(errors="replace") or exc.log,
            ) from exc
        _write_record(places, Record(record.packages, unit=True))
        _await_answer(places, None)
        return
    with places.log.open("wb") as log:
        # A session of its own: the engine outlives us, and Ctrl-C at our terminal does not reach it.
        daemon = subprocess.Popen(
            ["dockerd", "--data-root", str(places.data)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd="/",
        )
    _detached.append(daemon)
    _write_record(places, Record(record.packages, daemon.pid, process_start(daemon.pid) or 0))
    _await_answer(places, daemon)


def _await_answer(places: Places, daemon: subprocess.Popen[bytes] | None) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while not answers():
        died = daemon is not None and daemon.poll() is not None
        if died or time.monotonic() > deadline:
            log = places.log.read_text(encoding="utf-8", errors="replace") if daemon is not None else ""
            what = (
                f"The Docker engine ended at its start (exit code {daemon.returncode})."
                if daemon is not None and died
                else f"The Docker engine did not answer within {START_DEADLINE_S:.0f} s."
            )
            raise LabError(what, cure=_cure_for(log, places), log=log)
        time.sleep(0.2)


def _cure_for(log: str, places: Places) -> str:
    """Return what helps against the usual reasons why an engine does not start."""
    tail = tail_of(log, 60)
    if "no space left" in tail:
        return f"Make room on the disk that holds {places.data}."
    if "iptables" in tail:
        return "The kernel or this container does not let the engine set up its network; run on a machine that does."
    if "permission denied" in tail or "operation not permitted" in tail:
        return "This machine does not let root run an engine (a container without rights?); run on one that does."
    return f"The whole log is in {places.log}; a machine where `dockerd` starts by hand is needed."


def process_start(pid: int) -> int | None:
    """Return when a process began, in clock ticks since boot; None when there is no such process (or a zombie)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in brackets may hold blanks and brackets: fields count from the last closing one (proc(5)).
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def _program_of(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except (FileNotFoundError, ProcessLookupError):
        return None


def clear_stale(places: Places) -> list[Path]:
    """Remove what an engine that was killed left behind and a new one would trip over.

    A pid file counts as stale when its process is gone or is another program by now: where /run is kept over
    reboots the number is soon given to somebody else, and dockerd then refuses to start for ever.

    :return: what was removed.
    """
    removed = []
    for path, program in (
        (places.run / "docker.pid", "dockerd"),
        (places.run / "docker/containerd/containerd.pid", "containerd"),
    ):
        try:
            text = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            continue
        if not text.isdigit() or process_start(int(text)) is None or _program_of(int(text)) != program:
            removed.append(path)
    # A socket nobody listens on: dockerd takes the file as a sign that the system's containerd runs, and waits for it.
    for path in (places.run / "containerd/containerd.sock", places.run / "docker/containerd/containerd.sock"):
        if path.exists() and not _listening(path):
            removed.append(path)
    for path in removed:
        say(f"removing {path}, left by an engine that was killed")
        path.unlink(missing_ok=True)
    return removed


def _listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


# Stopping


def stop_if_ours(places: Places | None = None) -> str:
    """Stop the engine when we started it and nothing uses it.

    :return: one sentence: what was done, or why not.
    :raises LabError: when the engine does not end.
    """
    places = places or Places()
    if not is_root() or not places.record.exists():
        return "The Docker engine stays: it was there before us."
    with locked(places.lock, wait=False) as alone:
        if not alone:
            return "The Docker engine stays: another lab uses it."
        record = read_record(places)
        if not record.unit and (record.pid == 0 or process_start(record.pid) != record.pid_start):
            return "No Docker engine that we started is running."
        if answers() and (busy := _busy()):
            return f"The Docker engine stays: containers run on it ({', '.join(sorted(busy)[:4])})."
        if record.unit:
            run(
                ["systemctl", "stop", "docker.service", "docker.socket"],
                what="Stopping docker.service",
                cure="See `systemctl status docker`.",
            )
        else:
            _end(record.pid, record.pid_start, places)
        _write_record(places, Record(record.packages))
    return "The Docker engine that we started is stopped; its images stay cached (`make purge` takes them away)."


def _busy() -> list[str]:
    """Return the names of the containers that run, whoever's they are."""
    connection = client()
    try:
        return [item["Names"][0].lstrip("/") for item in connection.api.containers()]
    finally:
        connection.close()


def _end(pid: int, pid_start: int, places: Places) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_DEADLINE_S
    while process_start(pid) == pid_start or any(daemon.pid == pid and daemon.poll() is None for daemon in _detached):
        if time.monotonic() > deadline:
            raise LabError(
                f"The Docker engine (process {pid}) did not end within {STOP_DEADLINE_S:.0f} s.",
                cure=f"See {places.log}; end the process by hand.",
            )
        time.sleep(0.1)


def purge(places: Places | None = None) -> list[str]:
    """Take away our images, and where we installed the engine, the engine with all its data.

    Labs must be down. An engine that was there before us keeps everything that is not ours.

    :return: sentences: what was done.
    :raises LabError: when something still runs on an engine that is to be removed.
    """
    places = places or Places()
    done = []
    if answers():
        done.append(_remove_images())
    if not is_root() or not places.record.exists():
        done.append("The Docker engine stays: it was there before us.")
        return done
    done.append(stop_if_ours(places))
    if answers():
        return done
    record = read_record(places)
    if not record.packages:
        places.record.unlink()
        done.append("The engine's packages stay: they were there before us.")
        return done
    run(
        ["apt-get", "purge", "--yes", *record.packages],
        what="Removing the packages that we installed",
        cure="Run `apt-get purge` for them by hand.",
        env={"DEBIAN_FRONTEND": "noninteractive"},
    )
    done.append(f"Removed the packages that we installed: {', '.join(record.packages)}.")
    if shutil.which("ip"):
        subprocess.run(["ip", "link", "delete", "docker0"], capture_output=True, check=False)
    folders = [places.data, places.run / "docker", Path("/etc/docker")]
    if "containerd" in record.packages:
        folders += [places.data.parent / "containerd", places.run / "containerd"]
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)
    for name in ("docker.pid", "docker.sock"):
        (places.run / name).unlink(missing_ok=True)
    done.append(f"Removed the engine's data in {places.data}.")
    return done


def _remove_images() -> str:
    connection = client()
    try:
        images = connection.images.list(filters={"label": LABEL})
        for image in images:
            connection.images.remove(str(image.id), force=True)
    finally:
        connection.close()
    return f"Removed {len(images)} host images."
