# SPDX-License-Identifier: Apache-2.0
"""What a container needs that boots systemd.

- :data:`COMMAND`: the shell's words that become systemd.
- :data:`OPTIONS`, :data:`TMPFS`: what the engine is told.
- :func:`await_running`: wait until it has booted.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import docker.errors

from testbed.common import LabError

if TYPE_CHECKING:
    from docker.models.containers import Container

# systemd wants its cgroup tree writable (with cgroup v2 Docker mounts it read-only), and LoadCredential fails silently
# where mounts are not shared.
COMMAND = (
    "mount --make-rshared / && "
    "{ [ ! -f /sys/fs/cgroup/cgroup.controllers ] || mount -o remount,rw /sys/fs/cgroup; } && exec /sbin/init"
)
OPTIONS: dict[str, Any] = {
    "cap_add": ["SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE"],
    "security_opt": ["seccomp=unconfined", "apparmor=unconfined"],
    "cgroupns": "private",
    "stop_signal": "SIGRTMIN+3",
}
TMPFS = {"/run": "exec,mode=755", "/run/lock": "", "/tmp": ""}  # noqa: S108 - the container's own
DEADLINE_S = 60.0


def await_running(container: Container, what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait until systemd in a container says that the system is up.

    :param what: what a message calls it.
    :param deadline_s: seconds.
    :raises LabError: when it died, did not come up in time, or came up with failed units.
    """
    deadline = time.monotonic() + deadline_s
    said = ""
    while time.monotonic() < deadline:
        container.reload()
        if container.status not in {"running", "created"}:
            raise _error(container, f"{what} died while it booted (it is `{container.status}`).")
        try:
            # The first calls may find no bus yet.
            said = _said(container, "systemctl", "is-system-running", "--wait")
        except docker.errors.APIError as exc:
            said = str(exc)
        if said == "running":
            return
        if said == "degraded":
            failed = _said(container, "systemctl", "--failed", "--no-legend", "--plain")
            raise _error(container, f"{what} booted, but units failed: {' '.join(failed.split())}.")
        time.sleep(0.05)
    raise _error(container, f"{what} did not boot within {deadline_s:.0f} s (systemd says: {said}).")


def _said(container: Container, *command: str) -> str:
    output: Any = container.exec_run(list(command)).output
    return str(output.decode(errors="replace").strip())


def _error(container: Container, what: str) -> LabError:
    log = container.logs().decode(errors="replace")
    with contextlib.suppress(docker.errors.APIError):
        log += _said(container, "journalctl", "--boot", "--no-pager", "--lines=40", "--priority=warning")
    cure = "See the log above; a machine whose engine may not give a container CAP_SYS_ADMIN cannot run the lab."
    if "Too many open files" in log or "inotify" in log:
        # Every systemd takes some of what the kernel grants to one user, and all hosts are the same user.
        cure = "Take another lab down, or raise the limit: sysctl fs.inotify.max_user_instances=1024"
    return LabError(what, cure=cure, log=log)
