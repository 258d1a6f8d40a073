# SPDX-License-Identifier: Apache-2.0
"""Runs a program behind the system call filter of the role's unit: ``confined.py PROGRAM ARGUMENT...``.

A container that measures has no systemd; the same list of calls, as systemd-analyze tells it, is given to libseccomp,
as systemd does it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys

#: As in roles/mosquitto/templates/_hardening.j2.
ALLOWED, DENIED = ("@system-service",), ("@privileged", "@resources", "@mount", "@debug")
# seccomp.h
_ALLOW, _ERRNO, _UNKNOWN = 0x7FFF0000, 0x00050000, -1


def calls(*groups: str) -> set[str]:
    """Return the names of the system calls of groups, as systemd knows them."""
    said = subprocess.run(["systemd-analyze", "syscall-filter", *groups], check=True, capture_output=True, text=True)
    words = {line.strip() for line in said.stdout.splitlines() if line.startswith(" ") and "#" not in line} - {""}
    inner = {word for word in words if word.startswith("@")}
    return (words - inner) | (calls(*sorted(inner)) if inner else set())


def confine(names: set[str]) -> int:
    """Allow this process, and what it becomes, these calls and no others. :returns: how many the kernel knows.

    :raises OSError: when the filter cannot be made or loaded.
    """
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_rule_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint]
    library.seccomp_load.argtypes = [ctypes.c_void_p]
    context = library.seccomp_init(_ERRNO | errno.EPERM)
    known = 0
    for name in sorted(names):
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number != _UNKNOWN and library.seccomp_rule_add(context, _ALLOW, number, 0) == 0:
            known += 1
    if known < len(names) // 2:
        raise OSError(errno.ENOSYS, "libseccomp knows too few of the system calls")
    if (failed := library.seccomp_load(context)) != 0:
        raise OSError(-failed, "the filter was not loaded")
    return known


def main() -> None:
    """Become the program."""
    count = confine(calls(*ALLOWED) - calls(*DENIED))
    sys.stderr.write(f"{count} system calls are allowed\n")
    sys.stderr.flush()
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606 - our own words, and no shell


if __name__ == "__main__":
    main()
