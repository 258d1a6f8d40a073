# SPDX-License-Identifier: Apache-2.0
"""Carry a folder of Python to a host as one JSON object.

``read FOLDER`` prints {path: text} of what lies there, links followed. ``write FOLDER [--check]`` reads that on stdin and
brings the folder to it: what differs is written, what is not in it is deleted. It prints {"changed": [paths]}.
"""

import json
import os
import sys
from pathlib import Path

SUFFIXES = {".py", ".html", ".css", ".json", ".ini", ".mako", ".txt", ".yaml", ".yml"}
FORGOTTEN = "__pycache__"


def files(folder: Path) -> list[Path]:
    """List what counts in a folder; Python's own cache does not."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name != FORGOTTEN]
        found += [Path(parent, name) for name in names]
    return sorted(found)


def main(what: str, folder: Path, check: bool) -> None:
    """Read or write."""
    if what == "read":
        wanted = [path for path in files(folder) if path.suffix in SUFFIXES]
        json.dump({str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in wanted}, sys.stdout)
        return
    wanted = json.load(sys.stdin)
    changed = []
    os.umask(0o022)
    for name, text in wanted.items():
        path = folder / name
        if path.is_file() and path.read_bytes() == text.encode():
            continue
        changed.append(name)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}.new")
            draft.write_bytes(text.encode())
            draft.replace(path)
    for path in files(folder):
        name = str(path.relative_to(folder))
        if name not in wanted:
            changed.append(name)
            if not check:
                path.unlink()
    json.dump({"changed": changed}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), "--check" in sys.argv[3:])
