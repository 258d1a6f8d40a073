# SPDX-License-Identifier: Apache-2.0
"""Programs that are compared with, and that Debian does not have: from npm and PyPI, pinned in this folder.

- :data:`FOLDER`: where what they are started with lies.
- :func:`versions`: what is pinned.

:mod:`load.bench.peers.fetch` fetches them. They are not part of what `make` installs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent
REQUIREMENTS = "requirements.lock"


def versions() -> dict[str, str]:
    """Return the versions that are pinned, by package."""
    lock = json.loads((FOLDER / "package.json").read_text(encoding="utf-8"))["dependencies"]
    found = {str(name): str(version) for name, version in lock.items()}
    pinned = re.search(r"^amqtt==(\S+)", (FOLDER / REQUIREMENTS).read_text(encoding="utf-8"), re.MULTILINE)
    if pinned:
        found["amqtt"] = pinned[1]
    return found
