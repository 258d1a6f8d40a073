# SPDX-License-Identifier: Apache-2.0
"""What a container needs that boots systemd.

- :data:`COMMAND`: the shell's words that become systemd.
- :data:`OPTIONS`, :data:`TMPFS`: what the engine is told.
"""

from __future__ import annotations

from typing import Any

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
