# SPDX-License-Identifier: Apache-2.0
"""Looks into a Debian package without dpkg, which not every control machine has (deb(5)).

- :func:`members`: the archive's members.
- :func:`control`: the fields of its control file.
- :func:`contents`: the files that it installs.
"""

from __future__ import annotations

import io
import tarfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MAGIC = b"!<arch>\n"
HEADER = 60


def members(package: Path) -> dict[str, bytes]:
    """Return name -> bytes of an ar archive's members."""
    data = package.read_bytes()
    assert data.startswith(MAGIC), f"{package} is no ar archive"
    found = {}
    at = len(MAGIC)
    while at < len(data):
        header = data[at : at + HEADER]
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        at += HEADER
        found[name] = data[at : at + size]
        at += size + size % 2
    return found


def _tar(package: Path, stem: str) -> tarfile.TarFile:
    [data] = [data for name, data in members(package).items() if name.startswith(f"{stem}.tar")]
    return tarfile.open(fileobj=io.BytesIO(data))


def control(package: Path) -> dict[str, str]:
    """Return the fields of the control file; continued lines are joined."""
    with _tar(package, "control") as tar:
        raw = tar.extractfile("./control")
        assert raw is not None
        text = raw.read().decode()
    fields: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith(" "):
            fields[name] += line
        else:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return fields


def scripts(package: Path) -> set[str]:
    """Return what else lies beside the control file: maintainer scripts, triggers, conffiles."""
    with _tar(package, "control") as tar:
        return {entry.name.removeprefix("./") for entry in tar if entry.isfile()} - {"control", "md5sums"}


def contents(package: Path) -> dict[str, tarfile.TarInfo]:
    """Return path -> entry of the files that it installs."""
    with _tar(package, "data") as tar:
        return {entry.name.removeprefix("."): entry for entry in tar if not entry.isdir()}


def read(package: Path, path: str) -> bytes:
    """Return the bytes of a file that it installs."""
    with _tar(package, "data") as tar:
        raw = tar.extractfile(f".{path}")
        assert raw is not None
        return raw.read()
