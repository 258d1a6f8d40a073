# SPDX-License-Identifier: Apache-2.0
"""The server's settings, with a process as systemd starts one: how fast it stops, and what becomes of requests."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 30
APPLICATION = """
def application(environ, start_response):
    if environ["PATH_INFO"] == "/slow":
        with open("{pipe}") as pipe:
            pipe.read()
    start_response("200 OK", [("Content-Length", "0")])
    return []
"""


# As sd_listen_fds(3) says: the socket is number 3, and the process is told that it is for it.
ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Unit:
    """A socket as systemd keeps one, and processes that serve it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.pipe = folder / "pipe"
        os.mkfifo(self.pipe)
        (folder / "application.py").write_text(APPLICATION.format(pipe=self.pipe))
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(folder / "socket"))
        self._socket.listen()
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        """Start a process."""
        number = self._socket.fileno()
        settings = ["--config", "python:bednet.token_service.server", "application:application"]
        started = subprocess.Popen(
            [sys.executable, "-c", ACTIVATE, str(number), "-m", "gunicorn", *settings],
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(self._folder), *sys.path))},
            pass_fds=[number],
        )
        self._processes.append(started)
        return started

    def enter(self) -> int:
        """Wait until the application works on the slow request. :returns: what to close for it to answer."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            with contextlib.suppress(OSError):
                return os.open(self.pipe, os.O_WRONLY | os.O_NONBLOCK)
            assert time.monotonic() < deadline
            # There is nothing to wait on: the other end of a pipe that nobody has opened.
            time.sleep(0.02)

    def ask(self, path: str) -> socket.socket:
        """Send a request as nginx does: one for each connection."""
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(DEADLINE_SECONDS)
        made.connect(str(self._folder / "socket"))
        made.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return made

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._socket.close()


def answer(asked: socket.socket) -> bytes:
    """Read the answer, and hang up as nginx does."""
    with contextlib.closing(asked):
        return asked.recv(4096).split(b"\r\n", 1)[0]


@pytest.fixture
def unit(tmp_path: Path) -> Iterator[Unit]:
    """A service without processes, for one test."""
    made = Unit(tmp_path)
    yield made
    made.close()


def test_service_stops_within_a_second_when_idle(unit: Unit) -> None:
    took = []
    for _ in range(3):
        process = unit.start()
        assert answer(unit.ask("/")) == b"HTTP/1.1 200 OK"
        begun = time.monotonic()
        process.terminate()
        assert process.wait(DEADLINE_SECONDS) == 0
        took.append(time.monotonic() - begun)
    # One of three may be slow: the machine does other things too.
    assert sorted(took)[1] < 1, took


def test_stopping_service_answers_what_it_has_and_leaves_the_rest_to_the_next(unit: Unit) -> None:
    first = unit.start()
    slow = unit.ask("/slow")
    pipe = unit.enter()
    first.terminate()
    # The first of these may still be answered by the first process, and none may be lost.
    later = [unit.ask("/") for _ in range(100)]
    second = unit.start()
    assert {answer(asked) for asked in later} == {b"HTTP/1.1 200 OK"}
    assert first.poll() is None
    os.close(pipe)
    assert answer(slow) == b"HTTP/1.1 200 OK"
    assert first.wait(DEADLINE_SECONDS) == 0
    assert second.poll() is None
