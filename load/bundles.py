# SPDX-License-Identifier: Apache-2.0
"""Bundles of devices, as a CA's host packs them."""

from __future__ import annotations

import tarfile
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def unpack(packed: IO[bytes], folder: Path) -> None:
    """Write a tar's files below a folder, for their owner alone; nothing is written unless all of it may be.

    Python has filters for that (PEP 706), but not Debian 12's 3.11.2.

    :raises ValueError: when it holds a link, a device, or what would lie elsewhere.
    """
    with tarfile.open(fileobj=packed) as tar:
        for entry in tar:
            path = PurePosixPath(entry.name)
            if not (entry.isreg() or entry.isdir()) or path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{entry.name}: no file or folder of a bundle")
        for entry in tar:
            if (data := tar.extractfile(entry)) is not None:
                target = folder / entry.name
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                target.touch(mode=0o600, exist_ok=False)
                target.write_bytes(data.read())
