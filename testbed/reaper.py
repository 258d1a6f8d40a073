# SPDX-License-Identifier: Apache-2.0
"""Removes a lab when the process that it belongs to ends, however it ends.

Started as a process of its own by :class:`testbed.lab.Lab`. It waits on a pipe whose other end only its parent holds;
the kernel closes that end even when the parent is killed. It is no thread and no exit handler for that reason.

Usage: ``python -m testbed.reaper RUN CONTROL_DIR FOLDER``, with the pipe as standard input. The byte ``k`` (keep) tells
it to leave the lab alone.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path

# Imported before the wait: the checkout may be gone when the time comes.
from testbed import engine, things
from testbed.common import LabError

SECOND_LOOK_S = 2.0


def main(run: str, control_dir: Path, folder: Path) -> int:
    """Wait for the end of the parent, then remove its run, and the folder with its keys."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    word = sys.stdin.buffer.read()
    if b"k" in word:
        return 0
    try:
        connection = engine.client()
    except LabError:
        # No engine, no containers.
        shutil.rmtree(folder, ignore_errors=True)
        return 0
    try:
        things.remove(connection, run)
        # A request that its parent sent just before the end may still be at work in the engine.
        time.sleep(SECOND_LOOK_S)
        things.remove(connection, run)
    finally:
        connection.close()
        things.close_connections(control_dir)
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
