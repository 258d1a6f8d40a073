# SPDX-License-Identifier: Apache-2.0
"""What runs on a host of the group load_generators: as many processes of Locust as the host is given shares.

`python -m load.worker PORT NAME SHARE ...`; :mod:`load.remote` starts it, in a unit of systemd's, with a folder that is
gone with the unit. It ends when its standard input does: then whoever started it is gone, or wants it to end.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

STOP_S = 10.0


def main(arguments: Sequence[str]) -> int:
    """Run a process for each share until all have ended, or standard input has; returns the worst exit code."""
    port, name, *shares = arguments
    folder = Path.cwd()
    words = [sys.executable, "-m", "locust", "-f", str(folder / "load/locustfile.py"), "--loglevel", "ERROR"]
    words += ["--worker", "--master-host", "127.0.0.1", "--master-port", port, "--headless", "--only-summary"]
    words += ["--plan", str(folder / "plan.json"), "--result", str(folder / "result.json"), "--stop-timeout", "1"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "HOME": str(folder), "BEDNET_LOAD_HOST": name}
    processes = [
        subprocess.Popen(
            [*words, "--share", share], stdin=subprocess.DEVNULL, stdout=sys.stderr, cwd=folder, env=environment
        )
        for share in shares
    ]

    def watch() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in processes:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()

    threading.Thread(target=watch, daemon=True).start()
    return max(abs(process.wait()) for process in processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
