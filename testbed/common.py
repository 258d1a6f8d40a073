# SPDX-License-Identifier: Apache-2.0
"""What the parts of the lab share: where state lies, how an error speaks, locks and progress.

- :class:`LabError`: every failure of the lab that a person can do something about.
- :data:`CHECKOUT`, :data:`STATE`: the checkout, and the folder in it that git ignores.
- :func:`step`: prints what is being done, and how long it took.
- :func:`locked`: an advisory lock on a file, between processes.
- :func:`run`: a command whose failure carries the end of its output.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

CHECKOUT = Path(__file__).resolve().parent.parent
STATE = CHECKOUT / ".bednet"

#: On everything that the testbed makes, whichever checkout and lab it belongs to.
LABEL = "mqtt.bednet.testbed"
#: The run (one lab of one checkout) that a container or network belongs to.
LABEL_RUN = "mqtt.bednet.run"

TAIL_LINES = 25


class LabError(Exception):
    """Something about the lab failed.

    :param what: one sentence: what was tried and what was found.
    :param cure: what a person can do about it.
    :param log: the end of the log that tells why; empty where there is none.
    """

    def __init__(self, what: str, *, cure: str, log: str = "") -> None:
        self.what = what
        self.cure = cure
        self.log = log
        tail = f"\n{indent(tail_of(log))}" if log.strip() else ""
        super().__init__(f"{what}{tail}\nWhat to do: {cure}")


def tail_of(text: str, lines: int = TAIL_LINES) -> str:
    """Return the last lines of a log, without trailing blanks."""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def indent(text: str) -> str:
    """Return the text with each line moved in, as quoted logs are shown."""
    return "\n".join(f"    | {line}" for line in text.splitlines())


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Print a step when it begins and how many seconds it took when it ends, to standard error."""
    print(f"==> {title}", file=sys.stderr, flush=True)
    begin = time.monotonic()
    try:
        yield
    except BaseException:
        print(f"    failed after {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
        raise
    print(f"    done in {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print one line of progress inside a step, to standard error."""
    print(f"    {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold an advisory lock on a file; the kernel gives it back when the process dies.

    :param shared: many may hold it at once, but nobody alone.
    :param wait: wait for the lock; otherwise yield False at once where it is taken.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(descriptor, mode if wait else mode | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def run(
    command: Sequence[str | Path],
    *,
    what: str,
    cure: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: bytes | None = None,
    timeout_s: float = 600,
) -> str:
    """Run a command and return what it printed on standard output.

    :param what: the beginning of the sentence that a failure says, such as "Installing docker.io".
    :param env: variables added to those of this process.
    :raises LabError: when the command is missing, exits other than 0, or takes longer than the time given.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError as exc:
        raise LabError(f"{what} failed: {words[0]} is not there.", cure=cure) from exc
    except subprocess.TimeoutExpired as exc:
        raise LabError(
            f"{what} took longer than {timeout_s:.0f} s and was stopped.",
            cure=cure,
            log=(exc.stderr or b"").decode(errors="replace"),
        ) from exc
    if done.returncode != 0:
        raise LabError(
            f"{what} failed: {words[0]} exited with {done.returncode}.",
            cure=cure,
            log=(done.stdout + done.stderr).decode(errors="replace"),
        )
    return done.stdout.decode(errors="replace")


def debian_like() -> bool:
    """Tell whether this machine is Debian or Ubuntu (or says that it is like them)."""
    try:
        text = Path("/etc/os-release").read_text(encoding="utf-8")
    except OSError:
        return False
    words: set[str] = set()
    for line in text.splitlines():
        key, _, value = line.partition("=")
        if key in {"ID", "ID_LIKE"}:
            words.update(value.strip().strip("\"'").split())
    return bool(words & {"debian", "ubuntu"})


def is_root() -> bool:
    """Tell whether this process may install packages and start an engine."""
    return os.geteuid() == 0
