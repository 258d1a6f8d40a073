# SPDX-License-Identifier: Apache-2.0
"""What the testbed has made on the engine, found by its labels, and how it is taken away.

- :func:`remove`: the containers, the network and the SSH connections of one run.
- :func:`runs`: every run that there is, and whether its owner still lives.
- :func:`sweep`: remove the runs that nobody owns any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import docker.errors

from testbed import engine
from testbed.common import CHECKOUT, LABEL, LABEL_RUN, STATE, say

if TYPE_CHECKING:
    from docker import DockerClient

LABEL_NAME = "mqtt.bednet.name"
LABEL_CHECKOUT = "mqtt.bednet.checkout"
#: `persistent`, or the process that the lab belongs to, as PID:START (clock ticks since boot).
LABEL_OWNER = "mqtt.bednet.owner"
PERSISTENT = "persistent"

# A Unix socket's path has room for 108 bytes with its final NUL (unix(7)). Ansible adds a slash and ten letters; ssh
# binds under a temporary name that is 17 letters longer.
CONTROL_DIR_MAX = 108 - 1 - 1 - 10 - 17


@dataclass(frozen=True)
class Run:
    """One lab as the engine knows it.

    :param id: the value of the run label.
    :param name: what its owner calls it.
    :param checkout: the checkout that made it.
    :param owner: see :data:`LABEL_OWNER`.
    :param containers: container names with their states.
    :param networks: names of networks.
    """

    id: str
    name: str
    checkout: Path
    owner: str
    containers: dict[str, str]
    networks: tuple[str, ...]

    @property
    def persistent(self) -> bool:
        """Whether it is meant to outlive the process that made it."""
        return self.owner == PERSISTENT

    @property
    def abandoned(self) -> bool:
        """Whether nobody will ever take it down: its process is gone, or its checkout is."""
        if self.persistent:
            return not self.checkout.is_dir()
        pid, _, start = self.owner.partition(":")
        began = engine.process_start(int(pid)) if pid.isdigit() else None
        return began is None or str(began) != start


def run_id(name: str) -> str:
    """Return the name of this checkout's lab on the engine, where other checkouts may have one of the same name."""
    return f"{name}-{hashlib.sha256(str(CHECKOUT).encode()).hexdigest()[:6]}"


def labels(run: str, name: str, owner: str) -> dict[str, str]:
    """Return the labels of everything that belongs to a run."""
    return {LABEL: "lab", LABEL_RUN: run, LABEL_NAME: name, LABEL_CHECKOUT: str(CHECKOUT), LABEL_OWNER: owner}


def this_process() -> str:
    """Return this process as an owner label."""
    return f"{os.getpid()}:{engine.process_start(os.getpid())}"


def control_dir(name: str) -> Path:
    """Return where SSH's shared connections of a lab lie: a temporary folder where the checkout's path is long."""
    inside = STATE / "labs" / name / "ssh"
    if len(os.fsencode(inside)) <= CONTROL_DIR_MAX:
        return inside
    return Path(tempfile.gettempdir()) / f"bednet-{run_id(name)}"


def close_connections(folder: Path) -> None:
    """End SSH's shared connections, which would else linger for their ControlPersist time, and remove their folder."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_socket():
            subprocess.run(
                ["ssh", "-F", "none", "-o", f"ControlPath={path}", "-O", "exit", "lab"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
            )
    shutil.rmtree(folder, ignore_errors=True)


def remove(connection: DockerClient, run: str) -> None:
    """Remove the containers and networks of one run, and end its SSH connections.

    What has gone meanwhile counts as removed.
    """
    filters = {"label": f"{LABEL_RUN}={run}"}
    ids = [str(item["Id"]) for item in connection.api.containers(all=True, filters=filters)]
    if ids:
        with ThreadPoolExecutor(max_workers=len(ids)) as pool:
            list(pool.map(lambda item: _remove_container(connection, item), ids))
    for network in connection.networks.list(filters=filters):
        with contextlib.suppress(docker.errors.NotFound):
            network.remove()


def _remove_container(connection: DockerClient, container: str) -> None:
    try:
        connection.api.remove_container(container, force=True, v=True)
    except docker.errors.NotFound:
        return
    except docker.errors.APIError as exc:
        # Two who remove the same container meet here; the other one finishes it.
        if exc.status_code != 409:  # noqa: PLR2004 - HTTP's own number
            raise
        with contextlib.suppress(docker.errors.NotFound):
            connection.api.wait(container, condition="removed", timeout=30)


def runs(connection: DockerClient) -> list[Run]:
    """Return every run on the engine, of whatever checkout."""
    containers: dict[str, dict[str, str]] = {}
    networks: dict[str, list[str]] = {}
    marks: dict[str, dict[str, str]] = {}
    filters = {"label": LABEL_RUN}
    for item in connection.api.containers(all=True, filters=filters):
        run = item["Labels"][LABEL_RUN]
        marks[run] = item["Labels"]
        containers.setdefault(run, {})[item["Names"][0].lstrip("/")] = item["State"]
    for item in connection.api.networks(filters=filters):
        run = item["Labels"][LABEL_RUN]
        marks.setdefault(run, item["Labels"])
        networks.setdefault(run, []).append(item["Name"])
    return [
        Run(
            run,
            mark.get(LABEL_NAME, "?"),
            Path(mark.get(LABEL_CHECKOUT, "?")),
            mark.get(LABEL_OWNER, ""),
            dict(sorted(containers.get(run, {}).items())),
            tuple(networks.get(run, ())),
        )
        for run, mark in sorted(marks.items())
    ]


def sweep(connection: DockerClient, *, everything: bool = False) -> list[Run]:
    """Remove the runs whose owner is gone, of every checkout.

    :param everything: also those that are in use.
    :return: what was removed.
    """
    gone = [run for run in runs(connection) if everything or run.abandoned]
    for run in gone:
        say(f"removing {run.id}: {len(run.containers)} containers of {run.checkout}")
        remove(connection, run.id)
    return gone
