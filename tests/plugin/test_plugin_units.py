# SPDX-License-Identifier: Apache-2.0
"""The plugin's unit tests under sanitizers, its fuzz targets for a bounded time, what the shared library shows."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.plugin.gateway import SOURCE, build, plugin_path

if TYPE_CHECKING:
    from pathlib import Path

FUZZ_SECONDS = 3
ABOUT_TWO_CORES = "--jobs=2"
TARGETS = {path.stem for path in (SOURCE / "fuzz").glob("*.c")} - {"replay"}


def make(folder: Path, target: str, *variables: str) -> str:
    """Make a target outside of the checkout, and return what it said."""
    for tool in ("make", "cc", "pkg-config"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine: install gcc, make and pkg-config")
    done = subprocess.run(
        ["make", ABOUT_TWO_CORES, "-C", str(SOURCE), f"BUILD={folder}", target, *variables],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is built with sanitizers, so that it is built once for all tests of this file."""
    return tmp_path_factory.mktemp("sanitized")


def test_it_compiles_without_a_warning() -> None:
    # With -Werror, as everything that these tests build; only what no other test has built is built now.
    assert build("bednet_plugin.so").exists()


def test_the_unit_tests_pass_under_sanitizers_and_without_memory(sanitized: Path) -> None:
    assert "All unit tests passed." in make(sanitized, "check")


def test_what_fuzzing_found_and_the_seeds_are_survived(sanitized: Path) -> None:
    said = make(sanitized, "replay")
    assert set(re.findall(r"replay-(\w+): \d+ inputs played", said)) == TARGETS


@pytest.mark.full
def test_no_input_breaks_a_parser(tmp_path: Path) -> None:
    """For a bounded time, from the seeds; `make -C src/plugin fuzz FUZZ_SECONDS=...` does it for longer."""
    if shutil.which("clang") is None:
        pytest.skip("no clang with libFuzzer on this machine: install clang and libclang-rt-dev")
    said = make(tmp_path, "fuzz", f"FUZZ_SECONDS={FUZZ_SECONDS}")
    counts = {name: int(count) for name, count in re.findall(r"(\w+): (\d+) inputs, no finding", said)}
    assert set(counts) == TARGETS
    assert min(counts.values()) > 1000, counts


def test_the_library_shows_the_broker_three_functions_and_nothing_else() -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm on this machine: install binutils")
    told = subprocess.run(
        ["nm", "-D", "--defined-only", str(plugin_path())], capture_output=True, text=True, check=True
    ).stdout
    shown = {line.split()[-1].split("@")[0] for line in told.splitlines() if line.split()[-2] in "TDB"}
    assert shown == {"mosquitto_plugin_version", "mosquitto_plugin_init", "mosquitto_plugin_cleanup"}


def test_it_wants_nothing_of_the_broker_that_2_0_11_does_not_have() -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm on this machine: install binutils")
    told = subprocess.run(
        ["nm", "-D", "--undefined-only", str(plugin_path())], capture_output=True, text=True, check=True
    ).stdout
    wanted = {line.split()[-1] for line in told.splitlines() if "mosquitto_" in line}
    assert wanted == {
        "mosquitto_callback_register",
        "mosquitto_callback_unregister",
        "mosquitto_client_address",
        "mosquitto_client_certificate",
        "mosquitto_client_id",
        "mosquitto_client_protocol",
        "mosquitto_client_protocol_version",
        "mosquitto_client_username",
        "mosquitto_kick_client_by_username",
        "mosquitto_log_printf",
        "mosquitto_set_username",
    }
