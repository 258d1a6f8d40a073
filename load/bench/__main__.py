# SPDX-License-Identifier: Apache-2.0
"""``make bench``: measure in a container with a release's broker and our package, and write docs/benchmarks.md.

``python -m load.bench tuning`` measures what settings change and writes docs/tuning.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from load.bench import compiling, report, tuning
from load.bench.peers.fetch import fetch
from load.bench.stage import OPENSSL_CONFIGURATION
from testbed import engine, image, package
from testbed.common import CHECKOUT, LabError, step
from testbed.job import File, run_job
from testbed.workbench import BROKERS, python_packages

if TYPE_CHECKING:
    from collections.abc import Sequence

_CHECKOUT, _PYTHON, _NODE_MODULES, _PYTHON_PEERS = "/checkout", "/opt/python", "/opt/npm/node_modules", "/opt/peers"
_SCRIPT = f"""\
dpkg-deb --extract plugin.deb plugin
module=$1
shift
exec python3 -m "$module" --plugin "$PWD/plugin/usr/lib/bednet/bednet_plugin.so" \\
    --dynamic-security /usr/lib/{platform.machine()}-linux-gnu/mosquitto_dynamic_security.so "$@" > out/measured.json
"""
DEVICES = 1_000_000
TIMEOUT_S = 3600
#: Of the JSON beside the page; figures of another form are measured anew.
FORMAT = 3
PARTS = ("compiling", "brokers", "tokens")


def measured_in_container(
    suite: str,
    module: str,
    arguments: Sequence[str],
    what: str,
    *,
    openssl: str = OPENSSL_CONFIGURATION,
    systemd: bool = False,
) -> dict[str, Any]:
    """Run a module that measures, in a container with other brokers and our package.

    :param openssl: what the generator's OpenSSL is told. :param systemd: whether units can be made.
    :return: the JSON that it printed.
    :raises LabError: when it failed.
    """
    engine.ensure()
    python = BROKERS[suite].python
    peers = fetch(python)
    mounts = {CHECKOUT: _CHECKOUT, python_packages(python): _PYTHON}
    words = [module, *arguments]
    if peers.node_modules:
        mounts[peers.node_modules] = _NODE_MODULES
        words += ["--node-modules", _NODE_MODULES]
    if peers.python:
        mounts[peers.python] = _PYTHON_PEERS
        words += ["--python-peers", _PYTHON_PEERS]
    for source, why in peers.missing.items():
        sys.stderr.write(f"what {source} has is left out: {why}\n")
    done = run_job(
        image.ensure((suite,), ("peers",))[suite]["peers"],
        _SCRIPT,
        {
            "plugin.deb": File(package.ensure(suite).read_bytes()),
            "openssl.cnf": File(openssl.encode()),
        },
        what=what,
        cure="See what it said last.",
        arguments=tuple(words),
        environment={
            "PYTHONPATH": f"{_PYTHON}:{_CHECKOUT}/src:{_CHECKOUT}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OPENSSL_CONF": "/job/openssl.cnf",
            # Keys and stores of a million devices; the container's own file system is no slower.
            "TMPDIR": "/job",
        },
        mounts=mounts,
        # The store gives itself to the broker's group.
        root=True,
        systemd=systemd,
        echo=True,
        timeout_s=TIMEOUT_S,
    )
    figures: dict[str, Any] = json.loads(done.files["measured.json"])
    return figures


def load(path: Path) -> dict[str, Any]:
    """Return what earlier runs measured, by part; nothing where there is no file of today's form."""
    with contextlib.suppress(FileNotFoundError):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found.get("format") == FORMAT:
            return {part: figures for part, figures in found.items() if part in PARTS}
    return {}


def main() -> int:
    """Measure and write the page; the exit code says whether it could be measured, not how it went."""
    parser = argparse.ArgumentParser(description="Measure brokers, ours beside others, and write docs/benchmarks.md.")
    parser.add_argument("what", nargs="?", default="brokers", choices=["brokers", "tuning"])
    parser.add_argument("--suite", default="trixie", choices=sorted(package.RELEASES), help="whose broker is measured")
    parser.add_argument("--only", action="append", choices=PARTS, help="only this part; the other figures stay")
    parser.add_argument("--kind", action="append", default=[], help="only brokers with this name; can be given again")
    parser.add_argument("--rounds", type=int, help="by default 12 of brokers and settings, 20 of tokens")
    parser.add_argument("--scale", type=float, default=1.0, help="less than 1 for a quick look")
    parser.add_argument("--output", help="the page and its pictures, without .md and .svg")
    arguments = parser.parse_args()
    common = ["--scale", str(arguments.scale), *(["--rounds", str(arguments.rounds)] if arguments.rounds else [])]
    common += [word for name in arguments.kind for word in ("--kind", name)]
    try:
        if arguments.what == "tuning":
            tune(arguments.suite, CHECKOUT / f"{arguments.output or 'docs/tuning'}.md", common)
        else:
            bench(
                arguments.suite,
                CHECKOUT / f"{arguments.output or 'docs/benchmarks'}.md",
                arguments.only or PARTS,
                common,
            )
    except LabError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def tune(suite: str, page: Path, arguments: Sequence[str]) -> None:
    """Measure what settings change, and write its page."""
    with step("Settings side by side"):
        # The broker's settings are to decide.
        figures = measured_in_container(
            suite, "load.bench.tuning", arguments, "Measuring settings", openssl="", systemd=True
        )
    page.write_text(tuning.page(figures), encoding="utf-8")
    page.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.stderr.write(f"{page}\n")


def bench(suite: str, page: Path, parts: Sequence[str], arguments: Sequence[str]) -> None:
    """Measure the parts and write the page, with what earlier runs say of the others."""
    measured = load(page.with_suffix(".json"))

    def keep(part: str, figures: dict[str, Any]) -> None:
        """Write what there is, so that a failure later loses nothing."""
        measured[part] = figures
        page.write_text(report.page(measured, page.stem), encoding="utf-8")
        for name, picture in report.pictures(measured).items():
            page.with_name(f"{page.stem}-{name}.svg").write_text(picture, encoding="utf-8")
        page.with_suffix(".json").write_text(
            json.dumps({"format": FORMAT, **measured}, indent=1) + "\n", encoding="utf-8"
        )

    if "compiling" in parts:
        with step("The compiler and the store, 1,000,000 devices"), tempfile.TemporaryDirectory() as folder:
            figures = compiling.measure(DEVICES, Path(folder))
        keep("compiling", {"figures": figures, "date": time.strftime("%Y-%m-%d", time.gmtime())})
    if "brokers" in parts:
        with step("Brokers side by side"):
            figures = measured_in_container(suite, "load.bench.rounds", arguments, "Measuring brokers")
        keep("brokers", figures)
    if "tokens" in parts:
        with step("Tokens"):
            figures = measured_in_container(suite, "load.bench.tokens", arguments, "Measuring tokens")
        keep("tokens", figures)
    sys.stderr.write(f"{page}\n")


if __name__ == "__main__":
    sys.exit(main())
