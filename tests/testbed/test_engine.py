# SPDX-License-Identifier: Apache-2.0
"""Bad states of a machine's engine, each with its way out.

The engine under test is played by a small script: the real one serves other labs meanwhile. The sharp edge is what a
killed engine leaves in /run: a pid file whose number belongs to somebody else keeps a new one from starting for ever.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from testbed import engine
from testbed.common import LabError, locked

if TYPE_CHECKING:
    from collections.abc import Iterator

# Answers what docker-py asks at its start, and how many containers run.
FAKE_ENGINE = """\
#!{python}
import http.server, json, os, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = {{"/version": {{"ApiVersion": "1.41"}}}}.get(self.path)
        if "/containers/json" in self.path:
            body = json.load(open({busy!r})) if os.path.exists({busy!r}) else []
        raw = b"OK" if body is None else json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(raw)
    def log_message(self, *args):
        pass
class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    def get_request(self):
        request, _ = super().get_request()
        return request, ("", 0)
Server({socket!r}, Handler).serve_forever()
"""


@pytest.fixture
def places(tmp_path: Path) -> engine.Places:
    """Where an engine keeps its things, away from the machine's own."""
    found = engine.Places(tmp_path / "data", tmp_path / "run")
    found.data.mkdir()
    found.run.mkdir()
    return found


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A machine on which no engine answers; the path where one could."""
    path = str(tmp_path / "docker.sock")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
    return path


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in front of PATH, for programs that play others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def write_pid(path: Path, pid: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{pid}\n")


def test_the_pid_file_of_an_engine_that_is_gone_is_removed(places: engine.Places) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    write_pid(places.run / "docker.pid", gone.pid)
    assert engine.clear_stale(places) == [places.run / "docker.pid"]
    assert not (places.run / "docker.pid").exists()


def test_a_pid_file_whose_number_is_another_program_now_is_removed(places: engine.Places) -> None:
    write_pid(places.run / "docker.pid", os.getpid())
    write_pid(places.run / "docker/containerd/containerd.pid", os.getpid())
    assert len(engine.clear_stale(places)) == 2


def test_an_empty_pid_file_is_removed(places: engine.Places) -> None:
    (places.run / "docker.pid").write_text("")
    assert engine.clear_stale(places) == [places.run / "docker.pid"]


def test_the_pid_file_of_a_living_engine_stays(places: engine.Places, program: Path) -> None:
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program / "dockerd")
    with subprocess.Popen([program / "dockerd", "60"]) as living:
        write_pid(places.run / "docker.pid", living.pid)
        try:
            assert engine.clear_stale(places) == []
        finally:
            living.kill()


def test_a_socket_that_nobody_listens_on_is_removed(places: engine.Places) -> None:
    path = places.run / "containerd/containerd.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert engine.clear_stale(places) == [path]


def test_a_socket_that_is_listened_on_stays(places: engine.Places) -> None:
    path = places.run / "containerd/containerd.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen()
        assert engine.clear_stale(places) == []


def test_process_start_knows_the_living_from_the_dead() -> None:
    assert engine.process_start(os.getpid()) is not None
    # Ended and not waited for: a zombie does not count as running.
    zombie = subprocess.Popen(["true"])
    deadline = time.monotonic() + 10
    while engine.process_start(zombie.pid) is not None:
        assert time.monotonic() < deadline
    zombie.wait()


def test_an_engine_that_does_not_start_shows_its_log_and_a_cure(
    places: engine.Places, program: Path, no_engine: str
) -> None:
    assert not Path(no_engine).exists()
    fake = program / "dockerd"
    fake.write_text("#!/bin/sh\necho 'failed to write: no space left on device'; exit 1\n")
    fake.chmod(0o755)
    with pytest.raises(LabError, match=r"ended at its start \(exit code 1\)(?s:.*)no space left(?s:.*)Make room"):
        engine._start(places)


def test_an_engine_elsewhere_that_does_not_answer_is_named(places: engine.Places, no_engine: str) -> None:
    with pytest.raises(LabError, match=rf"No Docker engine answers at unix://{no_engine}(?s:.*)unset DOCKER_HOST"):
        engine.ensure(places)


@pytest.mark.parametrize(
    ("root", "debian", "reason"),
    [(False, True, "this user is not root"), (True, False, "neither Debian nor Ubuntu")],
)
def test_where_nothing_can_be_installed_it_says_what_to_install(
    places: engine.Places, monkeypatch: pytest.MonkeyPatch, root: bool, debian: bool, reason: str
) -> None:
    monkeypatch.setattr(engine, "answers", lambda: False)
    monkeypatch.setattr(engine, "configured_host", lambda: None)
    monkeypatch.setattr(engine, "is_root", lambda: root)
    monkeypatch.setattr(engine, "debian_like", lambda: debian)
    monkeypatch.setattr("testbed.engine.shutil.which", lambda _: None)
    with pytest.raises(LabError, match=rf"{reason}(?s:.*)apt-get install docker.io iptables"):
        engine.ensure(places)


@pytest.fixture
def started(places: engine.Places, program: Path, no_engine: str, tmp_path: Path) -> Iterator[Path]:
    """An engine that we started; yields the file that says which containers run on it."""
    busy = tmp_path / "busy.json"
    fake = program / "dockerd"
    fake.write_text(FAKE_ENGINE.format(python=sys.executable, socket=no_engine, busy=str(busy)))
    fake.chmod(0o755)
    engine._start(places)
    yield busy
    busy.unlink(missing_ok=True)
    engine.stop_if_ours(places)


def test_an_engine_of_ours_is_stopped_when_idle(
    places: engine.Places, started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "is_root", lambda: True)
    assert not started.exists()
    record = engine.read_record(places)
    assert engine.process_start(record.pid) == record.pid_start
    # A session of its own: Ctrl-C at our terminal does not reach it.
    assert os.getsid(record.pid) == record.pid
    assert "is stopped" in engine.stop_if_ours(places)
    assert engine.process_start(record.pid) is None
    assert "No Docker engine that we started is running" in engine.stop_if_ours(places)


def test_an_engine_of_ours_stays_while_containers_run(
    places: engine.Places, started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "is_root", lambda: True)
    started.write_text(json.dumps([{"Id": "1", "Names": ["/somebody-elses"]}]))
    assert "containers run on it (somebody-elses)" in engine.stop_if_ours(places)
    assert engine.process_start(engine.read_record(places).pid) is not None


def test_an_engine_of_ours_stays_while_another_process_uses_it(
    places: engine.Places, started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "is_root", lambda: True)
    assert not started.exists()
    with engine.in_use(places):
        assert "another lab uses it" in engine.stop_if_ours(places)
    assert engine.process_start(engine.read_record(places).pid) is not None


def test_an_engine_that_was_there_before_us_is_left_alone(places: engine.Places) -> None:
    assert "was there before us" in engine.stop_if_ours(places)


def test_a_record_that_cannot_be_read_is_refused_with_a_cure(places: engine.Places) -> None:
    places.record.write_text("{")
    with pytest.raises(LabError, match=r"cannot be read(?s:.*)Remove it"):
        engine.read_record(places)


def test_a_lock_is_shared_by_users_and_held_alone_by_whoever_stops(places: engine.Places) -> None:
    with locked(places.lock, shared=True) as one, locked(places.lock, shared=True, wait=False) as two:
        assert (one, two) == (True, True)
        with locked(places.lock, wait=False) as alone:
            assert not alone
    with locked(places.lock, wait=False) as alone:
        assert alone
