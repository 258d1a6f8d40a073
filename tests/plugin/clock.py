# SPDX-License-Identifier: Apache-2.0
"""The time that the plugin of these tests sees: :class:`Clock` stands still where the test has set it, or jumps."""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import TracebackType


class Clock:
    """A clock for a broker and its plugin: give its `library` to LD_PRELOAD, and its `environment`. A context manager.

    :ivar library: the shared library that answers the broker, made by this machine's compiler.
    """

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no compiler on this machine: install gcc")
        self.library = folder / "clock.so"
        self._file = folder / "clock"
        self._file.write_bytes(bytes(24))
        source = Path(__file__).with_name("clock.c")
        words = ("-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
        subprocess.run([compiler, *words, "-o", str(self.library), str(source)], check=True)
        with self._file.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 24)

    @property
    def environment(self) -> dict[str, str]:
        return {"BEDNET_TEST_CLOCK": str(self._file)}

    def set(self, second: int) -> None:
        """Let it be this second for the plugin, in Unix seconds, from its next question on; 0 is the real time."""
        struct.pack_into("=q", self._page, 0, second)

    def advance(self, seconds: int) -> None:
        """Let so many seconds have gone by since the broker began, beyond those that have."""
        struct.pack_into("=q", self._page, 8, seconds)

    def leap(self, seconds: int) -> None:
        """Let the wall clock, and nothing else, be so many seconds ahead: as if somebody had set it."""
        struct.pack_into("=q", self._page, 16, seconds)

    def __enter__(self) -> Clock:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._page.close()
