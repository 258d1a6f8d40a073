# SPDX-License-Identifier: Apache-2.0
"""A script in a container of its own, without a network: files go in, an exit code, a log and files come out.

The script is all that runs there, or, where it wants units, systemd runs beside it.

- :func:`run_job`: do it.
- :class:`Outcome`: what it did.

What the script sees lies in :data:`FOLDER`. What it leaves in ``FOLDER/out`` is brought back. The container is removed
in the end; that of a run that was killed is found by its labels (``python -m testbed sweep``).
"""

from __future__ import annotations

import io
import posixpath
import secrets
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import requests
from docker.types import Mount

from testbed import boot, engine, things
from testbed.common import LabError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from docker import APIClient
    from docker.models.containers import Container

FOLDER = "/job"
# Debian's numbers of the user and group who own nothing.
NOBODY, NOGROUP = 65534, 65534


@dataclass(frozen=True)
class Outcome:
    """What a job did.

    :param rc: the exit code of its script.
    :param log: what it printed on both outputs.
    :param files: path below ``out`` -> contents, of the regular files that it left there.
    """

    rc: int
    log: str
    files: dict[str, bytes]


@dataclass(frozen=True)
class File:
    """A file for a job.

    :param data: its contents.
    :param executable: whether it is a program.
    :param mtime: when it last changed, in Unix seconds.
    """

    data: bytes
    executable: bool = False
    mtime: int = 0


def run_job(
    image: str,
    script: str,
    files: Mapping[str, File],
    *,
    what: str,
    cure: str,
    arguments: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    mounts: Mapping[Path, str] | None = None,
    hostname: str = "job",
    root: bool = False,
    systemd: bool = False,
    check: bool = True,
    echo: bool = False,
    timeout_s: float = 300,
) -> Outcome:
    """Run a shell script in a fresh container of an image, in :data:`FOLDER`, as a user who owns nothing else.

    :param script: for ``sh -eu``; its arguments are `arguments`.
    :param files: path below :data:`FOLDER` -> file.
    :param what: the beginning of the sentence that a failure says, such as "Building the package".
    :param mounts: folders of this machine -> where the script sees them, read-only.
    :param root: as root of the container instead.
    :param systemd: boot systemd first, without the units that packages brought; the script may then mount, and make
        namespaces.
    :param check: refuse an exit code other than 0.
    :param echo: show what it prints as it comes, on standard error.
    :raises LabError: when it failed and `check` is set, or took longer than the time given.
    """
    run = things.run_id(f"job-{secrets.token_hex(4)}")
    connection = engine.client(timeout_s=60)
    with engine.in_use():
        command = ["/bin/sh", "-ceu", script, "job", *arguments]
        user = "0:0" if root else f"{NOBODY}:{NOGROUP}"
        options: dict[str, Any] = {"security_opt": ["no-new-privileges"]}
        if systemd:
            # Less than the usual target, so that no unit of a package is started.
            options = {**boot.OPTIONS, "tmpfs": boot.TMPFS}
        container = connection.containers.create(
            image,
            command=["/bin/sh", "-c", f"{boot.COMMAND} --unit=basic.target"] if systemd else command,
            name=f"bednet-{run}",
            hostname=hostname,
            user="0:0" if systemd else user,
            working_dir=FOLDER,
            environment={"HOME": FOLDER, "LC_ALL": "C.UTF-8", **(environment or {})},
            network_mode="none",
            **options,
            mounts=[
                Mount(target, str(source), type="bind", read_only=True) for source, target in (mounts or {}).items()
            ],
            labels=things.labels(run, "job", things.this_process()),
        )
        try:
            container.put_archive("/", _pack(files))
            container.start()
            if systemd:
                boot.await_running(container, f"{what}: its container")
                done = _run_beside(connection.api, container, command, user, timeout_s, echo=echo)
                if done is None:
                    raise LabError(f"{what} took longer than {timeout_s:.0f} s and was stopped.", cure=cure)
                rc, log = done
            else:
                rc, log = _follow(container, what, cure, timeout_s, echo=echo)
            outcome = Outcome(rc, log, _unpack(container))
        finally:
            container.remove(force=True, v=True)
            connection.close()
    if check and outcome.rc != 0:
        raise LabError(f"{what} failed: its script exited with {outcome.rc}.", cure=cure, log=outcome.log)
    return outcome


def _follow(container: Container, what: str, cure: str, timeout_s: float, *, echo: bool) -> tuple[int, str]:
    def show() -> None:
        for chunk in container.logs(stream=True, follow=True):
            print(chunk.decode(errors="replace"), end="", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(max_workers=1) as pool:
        if echo:
            pool.submit(show)
        try:
            rc = int(container.wait(timeout=timeout_s)["StatusCode"])
        except requests.RequestException as exc:
            container.kill()
            raise LabError(
                f"{what} took longer than {timeout_s:.0f} s and was stopped.",
                cure=cure,
                log=container.logs().decode(errors="replace"),
            ) from exc
        except BaseException:
            container.kill()
            raise
    return rc, container.logs().decode(errors="replace")


def _run_beside(
    api: APIClient, container: Container, command: list[str], user: str, timeout_s: float, *, echo: bool
) -> tuple[int, str] | None:
    """Run a command in a container beside its systemd; None when it took too long."""
    made = api.exec_create(container.id, command, user=user, workdir=FOLDER)["Id"]
    late = threading.Event()

    def stop() -> None:
        late.set()
        container.kill()

    timer = threading.Timer(timeout_s, stop)
    timer.start()
    log = []
    try:
        for chunk in api.exec_start(made, stream=True):
            log.append(chunk.decode(errors="replace"))
            if echo:
                print(log[-1], end="", file=sys.stderr, flush=True)
    finally:
        timer.cancel()
    return None if late.is_set() else (int(api.exec_inspect(made)["ExitCode"]), "".join(log))


def _pack(files: Mapping[str, File]) -> bytes:
    folders = {FOLDER.lstrip("/"), f"{FOLDER.lstrip('/')}/out"}
    for path in files:
        parent = posixpath.dirname(path)
        while parent:
            folders.add(f"{FOLDER.lstrip('/')}/{parent}")
            parent = posixpath.dirname(parent)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for folder in sorted(folders):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, 0o755, NOBODY, NOGROUP
            tar.addfile(entry)
        for path, file in sorted(files.items()):
            entry = tarfile.TarInfo(f"{FOLDER.lstrip('/')}/{path}")
            entry.size, entry.mtime, entry.mode = len(file.data), file.mtime, 0o755 if file.executable else 0o644
            entry.uid, entry.gid = NOBODY, NOGROUP
            tar.addfile(entry, io.BytesIO(file.data))
    return packed.getvalue()


def _unpack(container: Container) -> dict[str, bytes]:
    stream, _ = container.get_archive(f"{FOLDER}/out")
    found = {}
    with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as tar:
        for entry in tar:
            # Read, never unpacked: nothing in it can reach a path of this machine.
            if entry.isfile() and (data := tar.extractfile(entry)) is not None:
                found[entry.name.removeprefix("out/")] = data.read()
    return found
