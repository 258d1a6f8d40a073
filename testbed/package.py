# SPDX-License-Identifier: Apache-2.0
"""The broker's plugin as a Debian package, built in a container, so that no gateway needs a compiler.

- :func:`ensure`: the package for a suite and an architecture, built where it is not there yet.
- :func:`build`: build it, whatever is there.
- :func:`read_source`: what it is built from.

Packages lie in :data:`PACKAGES` as SUITE/ARCHITECTURE/NAME.deb, one in each folder, with the log of the build and
dpkg's record of what it was built with. The same source always gives the same bytes: the version and all times in the
package come from the source, and the build has no network.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import TYPE_CHECKING

from testbed import engine, image
from testbed.common import CHECKOUT, STATE, LabError, locked, say
from testbed.job import File, run_job

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NAME = "mosquitto-plugin-bednet"
SOURCE = CHECKOUT / "src/plugin"
PACKAGES = STATE / "packages"
ARCHITECTURES = ("amd64", "arm64")
# Folders of src/plugin that no package is made from: a better test is no reason to restart brokers.
NOT_PACKAGED = ("build", "fuzz", "tests")
# Each suite's package has a version of its own, so that an upgrade of the system brings the package for it.
RELEASES = {"bookworm": 12, "trixie": 13}
BUILD_TIMEOUT_S = 300

# build-essential is left out of the builder for its C++: dpkg is told not to look for it.
SCRIPT = """\
cd build/source
export DEB_BUILD_OPTIONS="noautodbgsym parallel=$(nproc)"
if [ "$1" != "$(dpkg --print-architecture)" ]; then
    export DEB_BUILD_OPTIONS="nocheck $DEB_BUILD_OPTIONS" DEB_BUILD_PROFILES="cross nocheck"
fi
dpkg-buildpackage --build=binary --no-sign --ignore-builtin-builddeps --host-arch="$1"
cp ../*.deb ../*.buildinfo ../../out/
"""


@dataclass(frozen=True)
class Source:
    """What a package is built from.

    :param files: path below src/plugin -> file.
    :param epoch: when it last changed, in Unix seconds.
    """

    files: Mapping[str, File]
    epoch: int

    @property
    def digest(self) -> str:
        """A hash of everything of ours that decides what the package contains."""
        hashed = hashlib.sha256("\0".join((SCRIPT, *image.BUILDER_PACKAGES)).encode())
        for path, file in sorted(self.files.items()):
            hashed.update(f"\0{path}\0{file.executable}\0{len(file.data)}\0".encode() + file.data)
        return hashed.hexdigest()

    def version(self, suite: str) -> str:
        """Return the package's version: that of the changelog, the source's time and hash, and the suite's number.

        A role installs a package when its version is another one: two packages that differ never share theirs.

        :raises LabError: when the changelog does not begin with a version.
        """
        text = self.files["debian/changelog"].data.decode() if "debian/changelog" in self.files else ""
        told = re.match(rf"{NAME} \(([0-9][0-9.~a-z]*)\) ", text)
        if told is None:
            raise LabError(
                f"{SOURCE}/debian/changelog does not begin with `{NAME} (VERSION)`.",
                cure="Write its first line as Debian does.",
            )
        when = datetime.fromtimestamp(self.epoch, UTC).strftime("%Y%m%d%H%M%S")
        return f"{told[1]}+{when}.{self.digest[:8]}+deb{RELEASES[suite]}"

    def for_suite(self, suite: str) -> dict[str, File]:
        """Return the files with an entry for this build on top of the changelog, which is where dpkg looks."""
        changelog = self.files["debian/changelog"].data.decode()
        maintainer = re.search(r"^ -- (.+>)  ", changelog, re.MULTILINE)
        if maintainer is None:
            raise LabError(
                f"{SOURCE}/debian/changelog names no maintainer.", cure="End its first entry as Debian does."
            )
        entry = (
            f"{NAME} ({self.version(suite)}) {suite}; urgency=medium\n\n"
            f"  * Built for {suite} from a checkout of bednet.\n\n"
            f" -- {maintainer[1]}  {format_datetime(datetime.fromtimestamp(self.epoch, UTC))}\n\n"
        )
        files = {path: File(file.data, file.executable, self.epoch) for path, file in self.files.items()}
        files["debian/changelog"] = File((entry + changelog).encode(), executable=False, mtime=self.epoch)
        return files


def ensure(suite: str = "trixie", architecture: str = image.ARCHITECTURE) -> Path:
    """Return the package for a suite and an architecture; build it if it is not there or its source has changed.

    :raises LabError: when it cannot be built.
    """
    _check(suite, architecture)
    folder = PACKAGES / suite / architecture
    # Labs that come up side by side build it once.
    with locked(STATE / "locks" / f"package-{suite}-{architecture}"):
        source = read_source()
        if (found := _cached(folder, source)) is not None:
            return found
        say(f"building {NAME} for {suite} on {architecture}")
        return _keep(folder, source, build(source, suite, architecture))


def build(
    source: Source,
    suite: str,
    architecture: str = image.ARCHITECTURE,
    *,
    hostname: str = "builder",
    environment: Mapping[str, str] | None = None,
) -> dict[str, bytes]:
    """Build the package in a container of its own.

    :param environment: further environment variables, none of which may show in the package.
    :return: names of files -> contents: the package, dpkg's record of the build, and `build.log`.
    :raises LabError: when that fails.
    """
    _check(suite, architecture)
    engine.ensure()
    kind = "builder" if architecture == image.ARCHITECTURE else "cross"
    name = image.ensure((suite,), (kind,))[suite][kind]
    done = run_job(
        name,
        SCRIPT,
        {f"build/source/{path}": file for path, file in source.for_suite(suite).items()},
        what=f"Building {NAME} for {suite} on {architecture}",
        cure="Read the compiler's words above; `make` in src/plugin says the same where its libraries are installed.",
        arguments=(architecture,),
        hostname=hostname,
        environment=environment,
        timeout_s=BUILD_TIMEOUT_S,
    )
    return {**done.files, "build.log": done.log.encode()}


def _check(suite: str, architecture: str) -> None:
    if suite not in RELEASES:
        raise LabError(f"There is no package for `{suite}`.", cure=f"Choose one of {', '.join(RELEASES)}.")
    if architecture not in ARCHITECTURES:
        raise LabError(f"There is no package for `{architecture}`.", cure=f"Choose one of {', '.join(ARCHITECTURES)}.")


def _cached(folder: Path, source: Source) -> Path | None:
    try:
        digest = (folder / "source").read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None
    found = sorted(folder.glob("*.deb"))
    return found[0] if digest == _identity(source) and len(found) == 1 else None


def _identity(source: Source) -> str:
    return f"{source.epoch} {source.digest}"


def _keep(folder: Path, source: Source, files: Mapping[str, bytes]) -> Path:
    """Put a package in the place of the one before: whoever looks meanwhile finds a whole one."""
    folder.mkdir(parents=True, exist_ok=True)
    packages = [name for name in files if name.endswith(".deb")]
    if len(packages) != 1:
        raise LabError(
            f"The build made {len(packages)} packages ({', '.join(packages) or 'none'}), not one.",
            cure="See src/plugin/debian/control.",
            log=files["build.log"].decode(errors="replace"),
        )
    (folder / "source").unlink(missing_ok=True)
    for name, data in files.items():
        draft = folder / f".{name}"
        draft.write_bytes(data)
        draft.replace(folder / name)
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    (folder / "source").write_text(_identity(source) + "\n", encoding="ascii")
    return folder / packages[0]


def read_source(folder: Path = SOURCE) -> Source:
    """Read what git tracks or would track of the plugin's folder, without its tests.

    Without git, all files but results of a build.

    :raises LabError: when there is no plugin.
    """
    paths = _listed(folder)
    if not any(path == "Makefile" for path in paths):
        raise LabError(f"There is no plugin in {folder}.", cure="Restore src/plugin from git.")
    files = {}
    newest = 0
    for path in paths:
        status = (folder / path).stat()
        files[path] = File((folder / path).read_bytes(), executable=bool(status.st_mode & 0o100))
        newest = max(newest, int(status.st_mtime))
    return Source(files, _commit_time(folder) or newest)


def _listed(folder: Path) -> list[str]:
    told = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if told is not None:
        paths = {path for path in told.split("\0") if path and (folder / path).is_file()}
        return sorted(path for path in paths if path.partition("/")[0] not in NOT_PACKAGED)
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in {".o", ".so"} and path.relative_to(folder).parts[0] not in NOT_PACKAGED
    )


def _commit_time(folder: Path) -> int | None:
    """Return when the folder's newest commit was made; None where it was changed since, or git does not know it."""
    paths = (".", *(f":(exclude){name}" for name in NOT_PACKAGED))
    if _git(folder, "status", "--porcelain", "--", *paths) != "":
        return None
    told = _git(folder, "log", "-1", "--format=%ct", "--", *paths)
    return int(told) if told and told.strip() else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            check=False,
            # Reading must not wait for, nor disturb, somebody who commits.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except OSError:
        return None
    return done.stdout.decode() if done.returncode == 0 else None
