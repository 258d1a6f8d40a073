# SPDX-License-Identifier: Apache-2.0
"""Suites that need what a Debian release has, each in a container of that release.

- :func:`run_tests`: run pytest there for the plugin, on this checkout, with its package or a build with sanitizers.
- :func:`run_service_tests`: the same for the token service, which there has nginx, PostgreSQL and Debian's libraries.
- :data:`BROKERS`: which release holds which broker.
- :func:`python_packages`: the pinned Python packages for the Python of a release.

The checkout is mounted read-only; the packages are those of requirements.lock, fetched by this environment's pip, so
that the tests run in the container with what they run with here. What a gateway has from Debian is Debian's:
python3-lmdb, and all that the token service stands on.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from packaging.requirements import Requirement

from testbed import engine, image, package
from testbed.common import CHECKOUT, STATE, locked, run, say
from testbed.job import File, Outcome, run_job

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Release:
    """What a Debian release holds.

    :param broker: its version of Mosquitto.
    :param python: its version of Python.
    """

    broker: str
    python: str


BROKERS = {
    "bookworm": Release("2.0.11", "3.11"),
    "trixie": Release("2.0.21", "3.13"),
    "forky": Release("2.1.2", "3.14"),
}

#: What the tests import, directly; what these need comes with them.
ROOTS = (
    "cel-expr-python",
    "cryptography",
    "hypothesis",
    "joserfc",
    "jsonschema",
    "paho-mqtt",
    "pytest",
    "pytest-timeout",
    "PyYAML",
    "rich",
)

#: What the clients of the deployed token service are made of, and the tests that play them.
CLIENT_ROOTS = (
    "alembic",
    "Authlib",
    "cryptography",
    "Flask",
    "Jinja2",
    "pytest",
    "pytest-timeout",
    "PyYAML",
    "requests-oauthlib",
    "SQLAlchemy",
)
#: pytest, and what the tests read files and make up data with: the rest is Debian's.
PYTEST_ROOTS = ("hypothesis", "pytest", "pytest-timeout", "PyYAML")

PLUGIN = "usr/lib/bednet/bednet_plugin.so"
# Where the container sees this machine's folders.
_CHECKOUT, _PYTHON = "/checkout", "/opt/python"
_PYTEST = (
    f"exec python3 -m pytest -c {_CHECKOUT}/pyproject.toml --rootdir={_CHECKOUT} -p no:cacheprovider "
    "--junitxml=out/report.xml"
)

SCRIPT = f"""\
export PATH="$PWD/bin:$PATH"
mkdir plugin
if [ -e plugin.deb ]; then
    dpkg-deb --extract plugin.deb plugin
else
    cp -R {_CHECKOUT}/src/plugin source
    make -C source clean
    make -C source
    make -C source install DESTDIR="$PWD/plugin"
fi
mosquitto -h | head -n 1
export BEDNET_PLUGIN="$PWD/plugin/{PLUGIN}"
{_PYTEST} --confcutdir={_CHECKOUT}/tests/plugin "$@"
"""

SERVICE_SCRIPT = f"""\
/usr/sbin/nginx -v
/usr/lib/postgresql/*/bin/postgres --version
dpkg-query --show gunicorn python3-authlib python3-flask python3-sqlalchemy
{_PYTEST} --confcutdir={_CHECKOUT}/tests/token_service "$@"
"""

_ENVIRONMENT = {"PYTHONPATH": f"{_PYTHON}:{_CHECKOUT}/src:{_CHECKOUT}", "PYTHONDONTWRITEBYTECODE": "1"}

# Comes first on PATH where the broker is of another architecture than this machine.
EMULATED_BROKER = """\
#!/bin/sh
exec {qemu} /usr/sbin/mosquitto "$@"
"""
_QEMU = {"arm64": "qemu-aarch64", "amd64": "qemu-x86_64"}


@dataclass(frozen=True)
class PytestRun:
    """What pytest said.

    :param rc: its exit code; 0 where nothing failed.
    :param log: all that it printed.
    :param passed: how many tests passed.
    :param skipped: name -> why, of the tests that did not run.
    :param failed: the names of the tests that failed.
    :param seconds: how long the tests took.
    """

    rc: int
    log: str
    passed: int
    skipped: dict[str, str]
    failed: list[str]
    seconds: float


def run_tests(
    suite: str,
    arguments: Sequence[str],
    *,
    foreign: bool = False,
    clang: bool = False,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600,
    echo: bool = False,
) -> PytestRun:
    """Run pytest in a container of a release, against that release's broker.

    :param arguments: further arguments of pytest; paths are relative to the checkout.
    :param foreign: use the broker and the package of the other architecture, played by an emulator.
    :param clang: have clang there, for the fuzz targets.
    :param environment: further environment variables.
    :param echo: show what pytest prints as it comes.
    :raises LabError: when the container cannot be made, or takes longer than the time given.
    """
    engine.ensure()
    kind = "emulator" if foreign else "fuzz" if clang else "bench"
    name = image.ensure((suite,), (kind,))[suite][kind]
    files: dict[str, File] = {}
    if suite in package.RELEASES:
        architecture = image.FOREIGN if foreign else image.ARCHITECTURE
        files["plugin.deb"] = File(package.ensure(suite, architecture).read_bytes())
    if foreign:
        wrapper = EMULATED_BROKER.format(qemu=_QEMU[image.FOREIGN])
        files["bin/mosquitto"] = File(wrapper.encode(), executable=True)
    done = run_job(
        name,
        SCRIPT,
        files,
        what=f"Running the plugin's tests on {suite}",
        cure="See the last test that it names.",
        arguments=_there(arguments),
        environment={
            **_ENVIRONMENT,
            "BEDNET_ARCHITECTURE": image.FOREIGN if foreign else image.ARCHITECTURE,
            **(environment or {}),
        },
        # As bednet-store runs on a gateway: it gives the store to the broker's group.
        root=True,
        mounts={CHECKOUT: _CHECKOUT, python_packages(BROKERS[suite].python): _PYTHON},
        check=False,
        echo=echo,
        timeout_s=timeout_s,
    )
    return read_outcome(done)


def run_service_tests(
    suite: str, arguments: Sequence[str], *, debian: bool = False, timeout_s: float = 600, echo: bool = False
) -> PytestRun:
    """Run pytest in a container of a release that has what the token service's hosts have.

    The service that a test starts is run by Debian's Python with Debian's libraries.

    :param arguments: further arguments of pytest; paths are relative to the checkout.
    :param debian: the tests themselves use Debian's libraries too, so that the service within them is as deployed.
    :param echo: show what pytest prints as it comes.
    :raises LabError: when the container cannot be made, or takes longer than the time given.
    """
    engine.ensure()
    packages = (
        python_packages(BROKERS[suite].python, PYTEST_ROOTS, "pytest")
        if debian
        else python_packages(BROKERS[suite].python, CLIENT_ROOTS, "clients")
    )
    done = run_job(
        image.ensure((suite,), ("service",))[suite]["service"],
        SERVICE_SCRIPT,
        {},
        what=f"Running the token service's tests on {suite}",
        cure="See the last test that it names.",
        arguments=_there(arguments),
        environment=_ENVIRONMENT,
        # nginx and PostgreSQL have users of their own there.
        root=True,
        mounts={CHECKOUT: _CHECKOUT, packages: _PYTHON},
        check=False,
        echo=echo,
        timeout_s=timeout_s,
    )
    return read_outcome(done)


def _there(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return pytest's arguments with the paths that the container has, also those behind ``--ignore=``."""
    split = [word.rpartition("=") for word in arguments]
    return tuple(
        f"{option}{equals}{_CHECKOUT}/{path}" if path and (CHECKOUT / path).exists() else f"{option}{equals}{path}"
        for option, equals, path in split
    )


def read_outcome(done: Outcome) -> PytestRun:
    """Read pytest's report; a run that never got as far as to write one has its exit code and its log."""
    passed, seconds = 0, 0.0
    skipped: dict[str, str] = {}
    failed: list[str] = []
    if (report := done.files.get("report.xml")) is not None:
        for case in ET.fromstring(report).iter("testcase"):  # noqa: S314 - our own pytest wrote it
            name = f"{case.get('classname')}::{case.get('name')}"
            seconds += float(case.get("time", "0"))
            if (why := case.find("skipped")) is not None:
                skipped[name] = why.get("message", "")
            elif case.find("failure") is not None or case.find("error") is not None:
                failed.append(name)
            else:
                passed += 1
    return PytestRun(done.rc, done.log, passed, skipped, failed, seconds)


def python_packages(version: str, roots: Sequence[str] = ROOTS, whose: str = "plugin") -> Path:
    """Return a folder with the pinned packages that the tests import, for a version of Python; fetched once.

    :param version: such as "3.13".
    :param whose: names the set: what was fetched for it before goes when it changes.
    :raises LabError: when they cannot be fetched.
    """
    lines = pinned((CHECKOUT / "requirements.lock").read_text(encoding="utf-8"), needed(version, roots))
    target = STATE / "python" / f"{whose}-{version}-{sha256(lines.encode()).hexdigest()[:12]}"
    with locked(STATE / "locks" / f"python-{whose}-{version}"):
        if target.exists():
            return target
        say(f"fetching the tests' packages for Python {version}")
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f"{whose}-{version}-*"):
            shutil.rmtree(old)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            (Path(folder) / "requirements.txt").write_text(lines, encoding="utf-8")
            run(
                [
                    *(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps"),
                    *("--require-hashes", "--only-binary=:all:", "--python-version", version),
                    *("--target", f"{folder}/packages", "--requirement", f"{folder}/requirements.txt"),
                ],
                what=f"Fetching the tests' packages for Python {version}",
                cure="See whether this machine reaches its Python package index.",
            )
            (Path(folder) / "packages").rename(target)
    return target


def needed(version: str, roots: Sequence[str]) -> set[str]:
    """Return the names of packages and of all that they need, as installed here, on another version of Python."""
    environment = {"python_version": version, "python_full_version": f"{version}.0", "extra": ""}
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = _canonical(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            # Needed there and not here: pinned all the same, for the lock knows every version.
            continue
        for text in requirements:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                waiting.append(requirement.name)
    return found


def pinned(lock: str, names: set[str]) -> str:
    """Return the part of requirements.lock that pins the packages of these names."""
    kept = []
    keeping = False
    for line in lock.splitlines(keepends=True):
        if told := re.match(r"([A-Za-z0-9][A-Za-z0-9._-]*)==", line):
            keeping = _canonical(told[1]) in names
        if keeping and not line.lstrip().startswith("#"):
            kept.append(line)
    return "".join(kept)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
