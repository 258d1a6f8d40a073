# SPDX-License-Identifier: Apache-2.0
"""Fetches the peers that npm and PyPI have.

- :func:`fetch`: folders with them, fetched once by this machine's npm and pip, as they are set up here.
- :class:`Fetched`: where they are, and what could not be had.

Nothing of them is run on this machine, and npm runs no script of a package.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from load.bench.peers import FOLDER, REQUIREMENTS
from testbed.common import STATE, LabError, locked, run, say

if TYPE_CHECKING:
    from collections.abc import Callable

_PACKAGES = ("package.json", "package-lock.json")


@dataclass
class Fetched:
    """Folders with packages.

    :ivar node_modules: npm's; None where they could not be had.
    :ivar python: PyPI's, likewise.
    :ivar missing: "npm" or "PyPI" -> why its packages are not there.
    """

    node_modules: Path | None = None
    python: Path | None = None
    missing: dict[str, str] = field(default_factory=dict)


def fetch(python: str) -> Fetched:
    """Fetch what is not there yet.

    :param python: the version of Python that will run PyPI's, such as "3.13".
    """
    fetched = Fetched()
    try:
        fetched.node_modules = _fetched("npm", _PACKAGES, "", _npm) / "node_modules"
    except LabError as error:
        fetched.missing["npm"] = error.what
    try:
        fetched.python = _fetched("pypi", (REQUIREMENTS,), python, lambda folder: _pip(folder, python)) / "packages"
    except LabError as error:
        fetched.missing["PyPI"] = error.what
    return fetched


def _fetched(name: str, files: tuple[str, ...], more: str, fill: Callable[[Path], None]) -> Path:
    digest = sha256(b"\0".join((more.encode(), *((FOLDER / file).read_bytes() for file in files)))).hexdigest()[:12]
    target = STATE / "peers" / f"{name}-{digest}"
    with locked(STATE / "locks" / f"peers-{name}"):
        if target.exists():
            return target
        say(f"fetching the peers that {name} has")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fresh = Path(folder) / "fresh"
            fresh.mkdir()
            for file in files:
                shutil.copy(FOLDER / file, fresh)
            fill(fresh)
            fresh.rename(target)
    return target


def _npm(folder: Path) -> None:
    if shutil.which("npm") is None:
        raise LabError("This machine has no npm.", cure="Install npm, if you want to compare with what it has.")
    run(
        ["npm", "ci", "--ignore-scripts", "--omit=dev", "--no-audit", "--no-fund", "--loglevel=error"],
        what="Fetching the peers that npm has",
        cure="See whether this machine reaches its npm registry.",
        cwd=folder,
        timeout_s=180,
    )


def _pip(folder: Path, python: str) -> None:
    run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps"),
            *("--require-hashes", "--only-binary=:all:", "--python-version", python),
            *("--target", str(folder / "packages"), "--requirement", str(folder / REQUIREMENTS)),
        ],
        what="Fetching the peers that PyPI has",
        cure="See whether this machine reaches its Python package index.",
        timeout_s=180,
    )
