# SPDX-License-Identifier: Apache-2.0
"""The Python packages that a generator's host needs, downloaded here: its host needs no way to a package index.

- :func:`needed`: Locust, paho-mqtt and all that they need, as they are locked in requirements.lock, with hashes.
- :func:`bundle`: one archive of them, for a host's Python and machine.
- :func:`main`: `python -m load.wheels --python 3.13 --machine x86_64 --to FILE`; says `made` or `there`.

Debian has no package of Locust, and Debian 12 has paho-mqtt 1.6; so a generator's host has the versions that this
checkout is tested with, in an environment of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from bednet.errors import BednetError
from load.identities import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The last is for devices that get their tokens by private_key_jwt.
ROOTS = ("locust", "gevent", "paho-mqtt", "cryptography")
#: glibc of Debian 12 is 2.36: wheels for these run there, newest first.
GLIBC = ("2_36", "2_35", "2_34", "2_31", "2_28", "2_27", "2_26", "2_24", "2_17", "2_12", "2_5")
DEADLINE_S = 600


class WheelsError(BednetError):
    """The packages for a generator's host could not be put together; the message says what to do."""

    code = "load-wheels"


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def locked(lock: str) -> dict[str, str]:
    """Return each package's entry in a requirements.lock, with its hashes, by its name."""
    entries: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lock.splitlines():
        if found := re.match(r"([A-Za-z0-9][A-Za-z0-9._-]*)==", line):
            current = entries.setdefault(_name(found[1]), [])
        if not line.lstrip().startswith("#"):
            current.append(line)
    return {name: "\n".join(lines).rstrip(" \\\n") for name, lines in entries.items()}


def needed(lock: str, python: str, machine: str) -> str:
    """Return the part of a requirements.lock that a generator's host needs.

    :param python: its Python, such as "3.13". :param machine: its processor, such as "x86_64".
    :raises WheelsError: when the lock has not all of them.
    """
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "platform_machine": machine,
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
    }
    entries = locked(lock)
    found: dict[str, str] = {}
    waiting: list[tuple[str, str]] = [(name, "") for name in ROOTS]
    seen: set[tuple[str, str]] = set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if name not in entries:
            raise WheelsError(f"{name} is not in requirements.lock. Cure: `make lock`.")
        found[name] = entries[name]
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            # Only other Pythons need it; what it needs itself, pip will miss and name.
            continue
        for text in requires:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra}):
                waiting += [(_name(requirement.name), wanted) for wanted in ("", *sorted(requirement.extras))]
    return "".join(f"{found[name]}\n" for name in sorted(found))


def bundle(python: str, machine: str, target: Path) -> bool:
    """Make an archive with the wheels and their requirements.txt; return whether that was necessary.

    :raises WheelsError: when they cannot be had.
    """
    requirements = needed((CHECKOUT / "requirements.lock").read_text(encoding="utf-8"), python, machine)
    digest = hashlib.sha256(f"{python} {machine}\n{requirements}".encode()).hexdigest()
    stamp = target.with_suffix(".sha256")
    if target.exists() and stamp.exists() and stamp.read_text(encoding="ascii") == digest:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="wheels-") as name:
        folder = Path(name)
        (folder / "requirements.txt").write_text(requirements, encoding="utf-8")
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        words += ["--only-binary=:all:", "--require-hashes", "--implementation=cp", f"--python-version={python}"]
        words += [f"--platform=manylinux_{version}_{machine}" for version in GLIBC]
        words += [f"--platform=manylinux2014_{machine}", f"--dest={folder}", "-r", str(folder / "requirements.txt")]
        try:
            done = subprocess.run(words, capture_output=True, timeout=DEADLINE_S, check=False)
        except subprocess.TimeoutExpired as exc:
            raise WheelsError(f"Downloading Python packages took longer than {DEADLINE_S} s.") from exc
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()[-5:]
            tail = "\n".join(f"    | {line}" for line in said)
            raise WheelsError(
                f"The Python packages for Python {python} on {machine} cannot be downloaded:\n{tail}\n"
                "Cure: see whether this machine reaches its Python package index, and whether there are packages for "
                "such a machine (there are none for 32 bits)."
            )
        draft = folder / "wheels.tar"
        with tarfile.open(draft, "w") as tar:
            for file in sorted(folder.iterdir()):
                if file != draft:
                    tar.add(file, file.name)
        draft.replace(target)
    stamp.write_text(digest, encoding="ascii")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m load.wheels", description="Packages for a generator's host.")
    parser.add_argument("--python", required=True, metavar="X.Y", help="its Python")
    parser.add_argument("--machine", required=True, help="its processor, as `uname -m` says")
    parser.add_argument("--to", required=True, type=Path, metavar="FILE", help="the archive")
    parsed = parser.parse_args(arguments)
    try:
        made = bundle(parsed.python, parsed.machine, parsed.to)
    except WheelsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("made\n" if made else "there\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
