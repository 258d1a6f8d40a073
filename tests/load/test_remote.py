# SPDX-License-Identifier: Apache-2.0
"""Generators on other hosts: who gets which credentials, that nothing stays, and how far clocks are apart."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from load import clocks, remote, wheels
from load.__main__ import _deal, main, parse
from load.bundles import unpack
from load.clocks import Clock, Echo
from load.describe import Described, GeneratorHost
from load.plan import Gateway, Plan, PlanError, read_plan
from load.planning import make_plan
from load.profiles import PROFILES
from load.remote import RemoteError, Share, Workers
from testbed.lab import Lab
from tests.conftest import BUNDLES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bednet.site import Site
    from testbed.lab import Host

NAMES = ("temp-101", "plc-1-filler", "line-1", "historian")
MARK = "-----BEGIN PRIVATE KEY----- of "
CHECKOUT = Path(__file__).resolve().parents[2]


def host(name: str, *, processes: int = 1, says: str = "4") -> GeneratorHost:
    """Return a host whose shell says something instead of doing what it is asked."""
    return GeneratorHost(name, (("sh", "-c", f"echo {says}"), ()), "/usr/local/lib/bednet-load", processes)


@pytest.fixture
def plan(example: Site, tmp_path: Path) -> Plan:
    """Four devices, two shares, and credentials that say whose they are."""
    for name in NAMES:
        bundle = tmp_path / "bundles" / name
        bundle.mkdir(parents=True)
        (bundle / "key.pem").write_text(MARK + name)
        for other in ("certificate.pem", "ca.pem"):
            (bundle / other).write_text(other)
        (bundle / "notes.txt").write_text("of no use to a generator")
    gateway = Gateway("gateway-1", "192.0.2.11", "gateway-1.plant.example", 8883, None)
    bundles = {name: tmp_path / "bundles" / name for name in NAMES}
    return make_plan(example, gateway, "steady", PROFILES["steady"], bundles, generators=2)


# What travels


def test_every_share_is_dealt_once() -> None:
    dealt = remote.deal([host("a"), host("b"), host("c")], [2, 1, 3])
    assert [share.shares for share in dealt] == [(0, 1), (2,), (3, 4, 5)]


def test_a_host_gets_the_credentials_of_those_that_it_plays_and_of_no_others(plan: Plan, tmp_path: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(remote.archive(plan, Share(host("a"), (0,))))) as first:
        names = {name.split("/")[1] for name in first.getnames() if name.startswith("bundles/")}
        assert names == {"temp-101", "line-1"}
        whole = b"".join(found.read() for entry in first if (found := first.extractfile(entry)) is not None)
        assert b"of temp-101" in whole
        assert b"of historian" not in whole
        assert not any("notes" in name or name.startswith("/") or ".." in name for name in first.getnames())
        assert {entry.mode for entry in first} == {0o600}
        (tmp_path / "there.json").write_bytes(first.extractfile("plan.json").read())  # type: ignore[union-attr]
    there = read_plan(tmp_path / "there.json")
    assert [player.bundle for player in there.players] == [f"bundles/{name}" for name in NAMES]
    assert there.ca == "ca.pem"
    # Nothing of this machine travels.
    assert str(tmp_path) not in (tmp_path / "there.json").read_text().replace(plan.site, "")


def test_no_secret_stands_in_a_command_line_and_the_unit_ends_by_itself(plan: Plan) -> None:
    reached = replace(host("a"), reach=(("ssh", "-p", "22"), ("operator@192.0.2.30",)))
    command = Workers(plan, (), 5557, 90).command(Share(reached, (0, 1)))
    assert command[:3] == ["ssh", "-p", "22"]
    forward = command[command.index("-R") + 1]
    assert forward.startswith("127.0.0.1:")
    assert forward.endswith(":127.0.0.1:5557")
    assert command[-2] == "operator@192.0.2.30"
    for wanted in ("DynamicUser=yes", "RuntimeDirectoryMode=0700", "RuntimeMaxSec=90", "RuntimeDirectory=bednet-load-"):
        assert f"--property={wanted}" in command[-1]
    assert "PRIVATE" not in " ".join(command)
    assert str(Path(plan.players[0].bundle)) not in " ".join(command)


@pytest.mark.parametrize(
    ("says", "said"),
    [("unprepared", "is not prepared to generate load. Cure: `ansible-"), ("no >&2; exit 1", "does not answer: no")],
)
def test_a_host_that_cannot_is_told_before_anything_is_made(says: str, said: str) -> None:
    with pytest.raises(RemoteError) as refused:
        remote.ask(host("a", says=says))
    assert said in str(refused.value)


def test_a_host_runs_a_process_for_each_core_unless_told_otherwise() -> None:
    assert remote.ask(host("a", processes=0)) == 4
    assert remote.ask(host("a", processes=2)) == 2


# Clocks

moments = st.integers(min_value=0, max_value=10**15)


@given(st.integers(min_value=-(10**15), max_value=10**15), st.lists(st.tuples(moments, moments, moments), min_size=1))
def test_what_is_said_of_a_clock_is_never_more_wrong_than_is_said(ahead: int, ways: list[tuple[int, int, int]]) -> None:
    """Whatever the ways there and back take, each for itself."""
    echoes = [Echo(asked, asked + there + ahead, asked + there + back) for asked, there, back in ways]
    found, error = clocks.estimate(echoes)
    assert abs(found - ahead) <= error
    assert error <= min(there + back for _, there, back in ways) // 2 + 1


def test_a_latency_between_two_machines_has_the_error_of_both() -> None:
    known = [Clock("a", 1, 0, 300_000, -100_000), Clock("b", 2, 0, 200_000, None), Clock("c", 3, 0, 50_000, 10_000)]
    assert clocks.error_ms(known) == pytest.approx(0.6)
    assert clocks.error_ms([]) == 0


def test_each_machine_knows_the_others_clocks_by_its_own() -> None:
    known = [Clock("a", 1, 500, 0), Clock("b", 2, -200, 0), Clock("", 9, 0, 0)]
    assert clocks.ahead_of(9, known) == {1: 500, 2: -200, 9: 0}
    assert clocks.ahead_of(1, known) == {1: 0, 2: -700, 9: -500}
    assert clocks.ahead_of(7, []) == {7: 0}


# What a host needs


LOCK = """\
locust==2.0 ; python_version < '4' \\
    --hash=sha256:aa \\
    --hash=sha256:bb
    # via bednet
gevent==1.0 \\
    --hash=sha256:cc
paho-mqtt==2.0 \\
    --hash=sha256:dd
ansible==1.0 \\
    --hash=sha256:ee
"""


def test_what_is_locked_is_taken_over_hash_by_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "ROOTS", ("locust", "gevent", "paho-mqtt"))
    needs = {"locust": ["gevent>=1", "dev-tool; extra == 'dev'", "old; python_version < '3.10'"]}
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needs.get(name, []))
    found = wheels.needed(LOCK, "3.13", "x86_64")
    assert found.count("--hash") == 4
    assert "locust==2.0 ; python_version < '4' \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n" in found
    assert "ansible" not in found


def test_a_package_that_is_not_locked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "ROOTS", ("locust", "gevent", "paho-mqtt"))
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["Surprise[x]>1"] if name == "gevent" else [])
    with pytest.raises(wheels.WheelsError, match="surprise is not in requirements"):
        wheels.needed(LOCK, "3.13", "x86_64")


def test_the_shipped_lock_has_all_that_a_host_needs() -> None:
    found = wheels.needed((CHECKOUT / "requirements.lock").read_text(encoding="utf-8"), "3.13", "aarch64")
    # cryptography signs for devices that get their tokens by private_key_jwt.
    assert {"locust", "gevent", "paho-mqtt", "pyzmq", "msgpack", "cryptography", "cffi"} <= set(wheels.locked(found))
    assert "ansible-core" not in wheels.locked(found)


# On two hosts of a lab


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, Path]]:
    """A lab with one gateway and two hosts that generate load, and everybody's bundles."""
    with Lab.up("load-remote", gateways=3, field=False) as lab:
        hosts = lab.site / "hosts.yml"
        inventory = yaml.safe_load(hosts.read_text(encoding="utf-8"))
        for group in inventory.values():
            for number in (2, 3):
                group.get("hosts", {}).pop(f"gateway-{number}", None)
        inventory["load_generators"] = {"hosts": {"generator-1": None, "generator-2": None}}
        hosts.write_text(yaml.safe_dump(inventory), encoding="utf-8")
        for number in (1, 2):
            (lab.site / f"host_vars/gateway-{number + 1}").rename(lab.site / f"host_vars/generator-{number}")
        lab.play("site.yml")
        folder = tmp_path_factory.mktemp("bundles")
        folder.chmod(0o700)
        packed = lab.hosts["authority"].exec(["tar", "-C", BUNDLES, "-cf", "-", "."]).raw
        unpack(io.BytesIO(packed), folder)
        yield lab, folder


def await_that(what: Callable[[], bool], why: str, deadline_s: float = 60) -> None:
    until = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < until, why
        time.sleep(0.2)


def left_on(machine: Host) -> str:
    """Return what a run has left on a host: its unit, its folder, and its processes."""
    look = "ls -d /run/bednet-load-* 2>/dev/null; pgrep --full [l]oad.locustfile; "
    units = "systemctl list-units --all --no-legend --plain 'bednet-load-*'"
    return machine.exec(["sh", "-c", look + units], check=False).stdout.strip()


# Its clock is 1,000 s ahead: a time namespace of its own (time_namespaces(7)).
AHEAD = """\
#!/bin/sh
exec unshare --user --map-current-user --time --monotonic 1000 --fork --kill-child {0}/python3 "$@"
"""


@pytest.mark.lab
@pytest.mark.full
def test_two_hosts_share_the_work_and_keep_nothing(
    far: tuple[Lab, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab, bundles = far
    machines = [lab.hosts["gateway-2"], lab.hosts["gateway-3"]]
    for name, value in lab.ansible_env().items():
        monkeypatch.setenv(name, value)
    arguments = [str(lab.site), "--remote", "--generators", "1", "--bundles", str(bundles), "--every", "0.5"]

    assert main(arguments) == 1
    assert "generator-1 is not prepared to generate load. Cure: `ansible-playbook" in capsys.readouterr().err
    assert lab.play("load.yml").changed > 0
    assert lab.play("load.yml").changed == 0

    binaries = "/usr/local/lib/bednet-load/venv/bin"
    machines[1].exec(["rm", f"{binaries}/python"])
    machines[1].write_file(f"{binaries}/python", AHEAD.format(binaries), mode="0755")
    code = main([*arguments, "--profile", "mixed", "--duration", "5", "--report", str(tmp_path / "report")])
    assert code in (0, 3), capsys.readouterr().out
    told = json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8"))
    assert set(told["generators"]) == {"generator-1", "generator-2"}
    assert told["figures"]["delivered_share"] == 1
    assert told["figures"]["latency_p99_ms"] < 1000
    # Of the two clocks one is that of this machine, as containers have it.
    (clock,) = told["clocks"]
    assert clock["host"] == "generator-2"
    assert abs(clock["ahead_ns"] - 1000 * 10**9) <= clock["error_ns"] < 20e6
    assert 0 < told["tally"]["clock_error_ms"] < 40
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    assert "Generator on generator-2" in page
    assert f"{clock['ahead_ns'] / 1e6:,.3f} ms" in page
    assert [left_on(machine) for machine in machines] == ["", ""]

    # Killed in the middle.
    with subprocess.Popen(
        [sys.executable, "-m", "load", *arguments, "--duration", "300", "--report", str(tmp_path / "killed")],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        stderr=subprocess.DEVNULL,
    ) as run:
        there = "find /run/bednet-load-* -type f"
        find = f"{there} -name key.pem -perm 0600 | head -n 1; {there} -perm /077"
        try:
            await_that(
                lambda: machines[0].exec(["sh", "-c", find], check=False).stdout.count("key.pem") == 1,
                "no private key, or one that others may read",
            )
        finally:
            run.send_signal(signal.SIGKILL)
    for machine in machines:
        await_that(lambda machine=machine: not left_on(machine), f"{machine.name} keeps {left_on(machine)}")  # type: ignore[misc]

    assert lab.play("load.yml", "-e", "load_generator_state=absent").changed == 2
    assert main(arguments) == 1


def test_a_site_without_such_hosts_says_so(example: Site) -> None:
    with pytest.raises(PlanError, match="has no group load_generators"):
        _deal(parse([str(example.folder), "--remote"]), Described((), "plugin", {}))
