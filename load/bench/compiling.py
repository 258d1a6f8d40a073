# SPDX-License-Identifier: Apache-2.0
"""How long the policy's way to a gateway takes: import, compile, store, and one changed device.

``python -m load.bench.compiling [DEVICES] [FOLDER]`` measures one round and prints it as JSON, times in seconds of wall
clock and of CPU, memory in MB. :func:`measure` does the same for a caller. Each step that needs much memory is a
process of its own, so that its peak is its own.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TypeAlias

from bednet import commands, compiled, store
from bednet.site import load_site

Figures: TypeAlias = dict[str, float]
SECRETS: dict[str, dict[str, str]] = {"passwords": {}, "psk": {}, "revoked_serials": {}}
POLICY = """\
version: 1
roles:
  sensor:
    allow: {publish: ["sensors/{device.id}/#"], subscribe: ["commands/{device.id}/#"]}
  controller:
    allow: {publish: ["commands/{device.location}/{device.line}/#"], subscribe: ["sensors/+/#"]}
rules:
  - name: floor-shift
    when: "'FactoryFloor' in device.tags && device.location == 'hall-1'"
    during: [{days: [mon, tue, wed, thu, fri], hours: "06:00-22:00", zone: Europe/Berlin}]
    from: [10.0.0.0/8]
    allow: {publish: ["factory/{device.line}/#"]}
"""
LAST = "device-0000000"


def write_site(folder: Path, devices: int) -> None:
    """Write a site with so many devices, in fifty places, of two roles and with a tag on every third."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "policy.yml").write_text(POLICY)
    with (folder / "devices.csv").open("w", encoding="utf-8") as stream:
        stream.write("id,location,roles,tags,attributes.line\n")
        for number in range(devices):
            role = "sensor" if number % 10 else "controller"
            tag = "FactoryFloor" if number % 3 == 0 else ""
            stream.write(f"device-{number:07},hall-{number % 50},{role},{tag},{number % 20}\n")


def _step(name: str, *arguments: str) -> Figures:
    """Run one of the steps below in a process of its own."""
    command = [sys.executable, "-m", "load.bench.compiling", f"--{name}", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: Figures = json.loads(done.stdout)
    return figures


def _measured(begin: float) -> Figures:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": round(time.perf_counter() - begin, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def compile_step(site: str, output: str) -> Figures:
    """From the lists to the compiled file."""
    begin = time.perf_counter()
    compiled.write_file(load_site(Path(site)), Path(output))
    return _measured(begin)


def apply_step(lines: str, folder: str) -> Figures:
    """From the compiled file to the store."""
    begin = time.perf_counter()
    result = store.Store(Path(folder)).apply(store.CompiledFile(Path(lines)), SECRETS)
    return {**_measured(begin), "added": result["added"], "changed": result["changed_devices"]}


def one_device(site: Path, folder: Path, rounds: int = 51) -> Figures:
    """Change one device that is known, as a platform's database hands it over. Milliseconds.

    Each round is what ``bednet compile SITE --entry FILE | bednet-store put`` does, without the start of the two
    processes: policy.yml is read and checked anew, the device compiled, and its record written and committed.
    """
    plant = store.Store(folder)
    whole, compiling, storing = list[float](), list[float](), list[float]()
    for number in range(rounds):
        until = f"2096-10-02T07:06:{number % 60:02}Z"
        entry = {"id": LAST, "location": "hall-0", "roles": ["sensor"], "tags": ["FactoryFloor"], "until": until}
        raw = json.dumps({**entry, "attributes": {"line": 0}}).encode()
        begin = time.perf_counter()
        found, device = commands.checked_one(site, raw, "entry")
        lines = compiled.device_lines(found, device.id)
        between = time.perf_counter()
        if not plant.put(lines)["changed"]:
            raise RuntimeError("the device was as it is already")
        end = time.perf_counter()
        whole.append((end - begin) * 1000)
        compiling.append((between - begin) * 1000)
        storing.append((end - between) * 1000)
    return {
        "median_ms": round(statistics.median(whole), 2),
        "worst_ms": round(max(whole), 2),
        "compile_median_ms": round(statistics.median(compiling), 2),
        "put_median_ms": round(statistics.median(storing), 2),
    }


def measure(devices: int, folder: Path) -> dict[str, Figures]:
    """Measure one round in an empty folder."""
    site, lines, plant = folder / "site", folder / "compiled.jsonl", folder / "store"
    write_site(site, devices)
    figures = {"compile": _step("compile", str(site), str(lines))}
    figures["apply, new store"] = _step("apply", str(lines), str(plant))
    figures["sizes"] = {
        "compiled_mb": round(lines.stat().st_size / 1e6, 1),
        "store_mb": round((plant / "data.mdb").stat().st_size / 1e6, 1),
    }
    figures["apply, nothing changed"] = _step("apply", str(lines), str(plant))
    text = lines.read_text(encoding="utf-8")
    lines.write_text(
        text.replace(
            f'"device": "{LAST}", "profile": "controller"', f'"device": "{LAST}", "profile": "sensor"'
        ).replace('"values": ["hall-0", "0"]', '"values": []', 1),
        encoding="utf-8",
    )
    figures["apply, one device changed"] = _step("apply", str(lines), str(plant))
    figures["one device"] = one_device(site, plant)
    return figures


def main(arguments: list[str]) -> None:
    """Run one round, or one step of it."""
    steps = {"--compile": compile_step, "--apply": apply_step}
    if arguments and arguments[0] in steps:
        figures: object = steps[arguments[0]](*arguments[1:])
    else:
        devices = int(arguments[0]) if arguments else 1_000_000
        with tempfile.TemporaryDirectory(dir=arguments[1] if arguments[1:] else None) as folder:
            figures = measure(devices, Path(folder))
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
