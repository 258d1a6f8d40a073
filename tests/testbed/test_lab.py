# SPDX-License-Identifier: Apache-2.0
"""The lab keeps its promises: nothing is left behind, labs do not meet, failures say which host and why.

The sharp edge is SIGKILL: no handler runs, so another process has to notice, also in the middle of booting.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from testcontainers.core.container import DockerContainer

from testbed import engine, things
from testbed.common import CHECKOUT, STATE, LabError
from testbed.lab import Lab, SystemdRunning

if TYPE_CHECKING:
    from collections.abc import Callable

    from docker import DockerClient

pytestmark = pytest.mark.lab

DEADLINE_S = 40

PLAYBOOK = """
- hosts: gateways
  gather_facts: false
  become: true
  tasks:
    - name: Say who we are
      ansible.builtin.command: id -un
      register: who
    - name: Insist on root and a passphrase
      ansible.builtin.assert:
        that: [who.stdout == 'root', vault_ca_root_passphrase | length > 20]
"""

FAILING = """
- hosts: gateways
  gather_facts: false
  tasks:
    - name: Fall over
      ansible.builtin.fail:
        msg: the reason why
"""

OWNER = """
import sys, time
from pathlib import Path
from testbed.lab import Lab
lab = Lab.up("killed", gateways=1, ca="gateway-1", field=False)
lab.play(sys.argv[1])
print("up", flush=True)
time.sleep(300)
"""


def eventually(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.1)


def own_run(connection: DockerClient, name: str) -> things.Run | None:
    return next((run for run in things.runs(connection) if run.id == things.run_id(name)), None)


def processes_naming(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in command:
            found.append(command)
    return found


def start_owner(tmp_path: Path) -> subprocess.Popen[str]:
    playbook = tmp_path / "play.yml"
    playbook.write_text(PLAYBOOK)
    return subprocess.Popen(
        [sys.executable, "-c", OWNER, str(playbook)], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    )


def test_nothing_is_left_when_the_owner_is_killed(docker_client: DockerClient, tmp_path: Path) -> None:
    owner = start_owner(tmp_path)
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        run = own_run(docker_client, "killed")
        assert run is not None
        assert list(run.containers.values()) == ["running"]
        # The shared SSH connection of the play is a process of its own, and waits for the next play.
        sockets = str(things.control_dir("killed"))
        assert processes_naming(sockets)
        owner.send_signal(signal.SIGKILL)
    eventually(lambda: own_run(docker_client, "killed") is None, "containers and network gone")
    eventually(lambda: not processes_naming(sockets), "SSH connections and reaper gone")
    assert not Path(sockets).exists()
    eventually(lambda: not (STATE / "labs/killed").exists(), "the folder with the lab's keys gone")


def test_nothing_is_left_when_the_owner_is_killed_while_hosts_boot(docker_client: DockerClient, tmp_path: Path) -> None:
    owner = start_owner(tmp_path)
    with owner:
        eventually(lambda: own_run(docker_client, "killed") is not None, "the network is there")
        owner.send_signal(signal.SIGKILL)
    eventually(lambda: not processes_naming(f"testbed.reaper {things.run_id('killed')}"), "reaper gone")
    assert own_run(docker_client, "killed") is None


def test_two_labs_run_side_by_side(small: Lab, tmp_path: Path) -> None:
    playbook = tmp_path / "play.yml"
    playbook.write_text(PLAYBOOK)
    with Lab.up("beside", gateways=1, ca="gateway-1", field=False) as other:
        assert other.subnet != small.subnet
        assert other.hosts["gateway-1"].container != small.hosts["gateway-1"].container
        assert other.play(str(playbook)).failed == 0
        found = {run.name for run in things.runs(small.docker)}
        assert {"small", "beside"} <= found
    assert own_run(small.docker, "beside") is None
    assert small.play(str(playbook)).failed == 0
    assert not (STATE / "labs/beside").exists()


def test_a_name_in_use_is_refused(small: Lab) -> None:
    assert small.name == "small"
    with pytest.raises(LabError, match="Another process holds the lab `small`"):
        Lab.up("small", gateways=1, ca="gateway-1", field=False)
    assert own_run(small.docker, "small") is not None


def test_sweep_removes_what_is_abandoned_and_nothing_else(
    small: Lab, docker_client: DockerClient, tmp_path: Path
) -> None:
    ended = subprocess.Popen(["true"])
    start = engine.process_start(ended.pid)
    ended.wait()
    dead = things.labels("dead-000000", "dead", f"{ended.pid}:{start}")
    orphan = things.labels("orphan-000000", "orphan", things.PERSISTENT)
    orphan[things.LABEL_CHECKOUT] = str(tmp_path / "was-removed")
    kept = things.labels("kept-000000", "kept", things.PERSISTENT)
    try:
        for labels in (dead, orphan, kept):
            docker_client.networks.create(f"bednet-{labels[things.LABEL_NAME]}-test", labels=labels)
        docker_client.containers.create(image_of(small), ["true"], labels=dead)
        swept = {run.id for run in things.sweep(docker_client)}
        assert {"dead-000000", "orphan-000000"} <= swept
        left = {run.id for run in things.runs(docker_client)}
        assert {"kept-000000", small.run} <= left
        assert not {"dead-000000", "orphan-000000"} & left
    finally:
        for run in ("dead-000000", "orphan-000000", "kept-000000"):
            things.remove(docker_client, run)


def image_of(lab: Lab) -> str:
    return str(lab.docker.api.inspect_container(lab.hosts["gateway-1"].container)["Image"])


def test_attach_finds_a_lab_and_names_what_is_missing(small: Lab) -> None:
    again = Lab.attach("small")
    try:
        assert again.hosts["gateway-1"].address == small.hosts["gateway-1"].address
        assert again.hosts["gateway-1"].exec(["hostname"]).stdout == "gateway-1\n"
    finally:
        again.close()
    with pytest.raises(LabError, match=r"There is no lab `nowhere`.*\n.*testbed up nowhere"):
        Lab.attach("nowhere")
    small.hosts["gateway-1"].kill()
    try:
        with pytest.raises(LabError, match="not running: gateway-1"):
            Lab.attach("small")
        with pytest.raises(LabError, match=r"on gateway-1 failed: .* is not running"):
            small.hosts["gateway-1"].exec(["true"])
    finally:
        small.hosts["gateway-1"].start()


def test_a_host_comes_back_with_its_address_after_a_pulled_cable(small: Lab, tmp_path: Path) -> None:
    playbook = tmp_path / "play.yml"
    playbook.write_text(PLAYBOOK)
    host = small.hosts["gateway-1"]
    host.disconnect()
    assert "eth0" not in host.exec(["ip", "-brief", "address"]).stdout
    host.connect()
    assert host.address in host.exec(["ip", "-brief", "address"]).stdout
    assert small.play(str(playbook)).failed == 0


def test_exec_passes_input_and_reports_failure(small: Lab) -> None:
    host = small.hosts["gateway-1"]
    data = bytes(range(256)) * 1000
    assert host.exec(["cat"], input=data).raw == data
    with pytest.raises(LabError, match=r"on gateway-1 exited with 3(?s:.*)the reason"):
        host.exec(["sh", "-c", "echo the reason >&2; exit 3"])
    with pytest.raises(LabError, match=r"took longer than 1 s"):
        host.exec(["sleep", "20"], timeout_s=1)


def test_a_written_file_has_its_mode_from_the_first_byte(small: Lab) -> None:
    host = small.hosts["gateway-1"]
    host.write_file("/run/secret", "word", mode="0640", owner="root:operator")
    assert host.exec(["stat", "-c", "%a %U %G", "/run/secret"]).stdout == "640 root operator\n"
    assert host.read_file("/run/secret") == b"word"
    assert host.exec(["sh", "-c", "ls /run/secret*"]).stdout == "/run/secret\n"


def test_play_counts_and_tells_what_failed(small: Lab, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yml", tmp_path / "bad.yml"
    good.write_text(PLAYBOOK)
    bad.write_text(FAILING)
    done = small.play(str(good))
    assert (done.changed, done.failed) == (1, 0)
    assert done.changed_tasks == [{"host": "gateway-1", "task": "Say who we are"}]
    with pytest.raises(LabError, match=r"bad.yml failed(?s:.*)gateway-1: Fall over: the reason why"):
        small.play(str(bad))
    assert small.play(str(bad), check=False).failed == 1


def test_a_host_with_another_key_is_not_believed(small: Lab, tmp_path: Path) -> None:
    playbook = tmp_path / "play.yml"
    playbook.write_text(PLAYBOOK)
    known = small.folder / "known_hosts"
    true = known.read_text(encoding="ascii")
    public = (small.folder / "id_ed25519.pub").read_text(encoding="ascii").split()[1]
    things.close_connections(things.control_dir("small"))
    things.control_dir("small").mkdir(mode=0o700)
    try:
        known.write_text(f"{small.hosts['gateway-1'].address} ssh-ed25519 {public}\n", encoding="ascii")
        done = small.play(str(playbook), check=False)
    finally:
        known.write_text(true, encoding="ascii")
    assert done.stats["gateway-1"]["unreachable"] == 1
    assert "Host key verification failed" in done.failures[0]["message"]


def test_secrets_of_a_lab_are_for_its_owner_only(small: Lab) -> None:
    assert small.folder.stat().st_mode & 0o077 == 0
    for name in ("id_ed25519", "vault-password"):
        assert (small.folder / name).stat().st_mode & 0o077 == 0, name
    vault = (small.site / "group_vars/all/vault.yml").read_text(encoding="ascii")
    assert vault.startswith("$ANSIBLE_VAULT;")
    state = json.loads((small.folder / "lab.json").read_text(encoding="utf-8"))
    assert state["containers"] == {"gateway-1": small.hosts["gateway-1"].container}


def test_no_port_of_the_machine_is_taken(small: Lab) -> None:
    inspected = small.docker.api.inspect_container(small.hosts["gateway-1"].container)
    assert not inspected["HostConfig"]["PortBindings"]
    assert not any(inspected["NetworkSettings"]["Ports"].values())


def test_a_host_that_dies_while_it_boots_shows_its_log(small: Lab) -> None:
    container = (
        DockerContainer(image_of(small))
        .with_command(["/bin/sh", "-c", "echo this is what went wrong; exit 3"])
        .with_kwargs(labels=things.labels("dying-000000", "dying", things.this_process()))
        .waiting_for(SystemdRunning("dying", deadline_s=10))
    )
    try:
        with pytest.raises(LabError, match=r"Host dying died while it booted(?s:.*)this is what went wrong"):
            container.start()
    finally:
        container.stop()
