# SPDX-License-Identifier: Apache-2.0
"""``make bench``: measure in a container with a release's broker and our package, and write docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

from load.bench import compiling, report
from testbed import engine, image, package
from testbed.common import CHECKOUT, LabError, step
from testbed.job import File, run_job
from testbed.workbench import BROKERS, python_packages

_CHECKOUT, _PYTHON = "/checkout", "/opt/python"
_SCRIPT = f"""\
dpkg-deb --extract plugin.deb plugin
exec python3 -m load.bench.rounds --plugin "$PWD/plugin/usr/lib/bednet/bednet_plugin.so" \\
    --dynamic-security /usr/lib/{platform.machine()}-linux-gnu/mosquitto_dynamic_security.so "$@" > out/measured.json
"""
DEVICES = 1_000_000
TIMEOUT_S = 3600


def main() -> int:
    """Measure everything and write the page; the exit code says whether it could be measured, not how it went."""
    parser = argparse.ArgumentParser(description="Measure what access control costs, and write docs/benchmarks.md.")
    parser.add_argument("--suite", default="trixie", choices=sorted(package.RELEASES), help="whose broker is measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="less than 1 for a quick look")
    parser.add_argument("--output", default="docs/benchmarks", help="the page and the picture, without .md and .svg")
    arguments = parser.parse_args()
    try:
        with step("The compiler and the store, 1,000,000 devices"), tempfile.TemporaryDirectory() as folder:
            compiled = compiling.measure(DEVICES, Path(folder))
        with step(f"Brokers in turn, {arguments.rounds} rounds"):
            engine.ensure()
            done = run_job(
                image.ensure((arguments.suite,), ("bench",))[arguments.suite]["bench"],
                _SCRIPT,
                {"plugin.deb": File(package.ensure(arguments.suite).read_bytes())},
                what="Measuring",
                cure="See what it said last.",
                arguments=("--rounds", str(arguments.rounds), "--scale", str(arguments.scale)),
                environment={
                    "PYTHONPATH": f"{_PYTHON}:{_CHECKOUT}/src:{_CHECKOUT}",
                    "PYTHONDONTWRITEBYTECODE": "1",
                    # Keys and stores of a million devices; the container's own file system is no slower.
                    "TMPDIR": "/job",
                },
                mounts={CHECKOUT: _CHECKOUT, python_packages(BROKERS[arguments.suite].python): _PYTHON},
                # The store gives itself to the broker's group.
                root=True,
                echo=True,
                timeout_s=TIMEOUT_S,
            )
    except LabError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    measured = json.loads(done.files["measured.json"])
    page = CHECKOUT / f"{arguments.output}.md"
    page.write_text(report.page(measured, compiled), encoding="utf-8")
    page.with_suffix(".svg").write_text(report.picture(measured), encoding="utf-8")
    page.with_suffix(".json").write_text(json.dumps({**measured, "compiling": compiled}, indent=1) + "\n")
    sys.stderr.write(f"{page}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
