# SPDX-License-Identifier: Apache-2.0
"""The plugin's tests (tests/plugin) in containers, against the broker of each release and of the other architecture.

On Debian 13 and 12 the plugin is the one in the package that labs and sites install; on forky, for Mosquitto 2.1, it
is built from source. What `make test` has no time for is marked: forky, the fuzz targets, the emulated broker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from testbed import image, package
from testbed.common import CHECKOUT, LabError
from testbed.workbench import BROKERS, PytestRun, run_tests

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800)]

# What differs most between brokers: how a client comes in, and where the broker asks. Whether the two judges agree in a
# live broker is asked of 2.0.21 here, and of the others by the tests that are marked.
SHORT = tuple(f"tests/plugin/test_{name}.py" for name in ("plugin_connect", "plugin_access"))
QUICK = ("-m", "not full")


def need(suite: str, *kinds: str) -> None:
    """Skip, aloud, where an image cannot be had: what it is made of is not Debian's stable release."""
    try:
        image.ensure((suite,), kinds)
    except LabError as exc:
        pytest.skip(f"no image of {suite} ({', '.join(kinds)}) can be built here: {exc}")


def check(tested: PytestRun, suite: str, at_least: int) -> None:
    """See that pytest ran, with the release's broker, and that nothing failed or was left out for want of something."""
    assert tested.rc == 0, f"{', '.join(tested.failed)}\n{tested.log[-20000:]}"
    assert f"mosquitto version {BROKERS[suite].broker.rpartition('.')[0]}." in tested.log
    assert tested.passed >= at_least, tested.log[-4000:]
    missing = {name: why for name, why in tested.skipped.items() if "no Mosquitto" in why or "no compiler" in why}
    assert not missing


@pytest.mark.parametrize(
    ("suite", "arguments", "at_least"),
    [
        pytest.param("trixie", ("tests/plugin", *QUICK), 50, id="2.0.21"),
        pytest.param("bookworm", (*SHORT, *QUICK), 40, id="2.0.11"),
        pytest.param("bookworm", ("tests/plugin",), 100, id="2.0.11-all", marks=pytest.mark.full),
    ],
)
def test_plugin_passes_its_tests(
    suite: str, arguments: tuple[str, ...], at_least: int, measured: Callable[[str], None]
) -> None:
    tested = run_tests(suite, arguments, timeout_s=1500)
    check(tested, suite, at_least)
    measured(f"plugin on {suite}, Mosquitto {BROKERS[suite].broker}: {tested.passed} tests in {tested.seconds:.0f} s")


@pytest.mark.full
def test_plugin_passes_its_tests_on_mosquitto_2_1(measured: Callable[[str], None]) -> None:
    need("forky", "bench")
    tested = run_tests("forky", ("tests/plugin",), timeout_s=1500)
    check(tested, "forky", 50)
    measured(f"plugin on forky, Mosquitto {BROKERS['forky'].broker}: {tested.passed} tests in {tested.seconds:.0f} s")


@pytest.mark.full
def test_plugin_passes_all_of_its_tests_where_clang_is(measured: Callable[[str], None]) -> None:
    need("trixie", "fuzz")
    tested = run_tests("trixie", ("tests/plugin",), clang=True, timeout_s=1700)
    check(tested, "trixie", 50)
    assert not {name: why for name, why in tested.skipped.items() if "clang" in why}
    measured(f"plugin with clang's fuzz targets: {tested.passed} tests in {tested.seconds:.0f} s")


@pytest.mark.full
@pytest.mark.parametrize("suite", list(package.RELEASES))
def test_cross_built_package_decides_in_a_broker_of_its_architecture(
    suite: str, measured: Callable[[str], None]
) -> None:
    need(suite, "cross", "emulator")
    tested = run_tests(suite, ("tests/packaging/foreign_broker.py",), foreign=True, timeout_s=600)
    check(tested, suite, 5)
    assert not tested.skipped
    measured(f"plugin on {suite} for {image.FOREIGN}, emulated: {tested.passed} tests in {tested.seconds:.0f} s")


def test_outcome_tells_failed_tests_from_skipped_ones(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = CHECKOUT / ".bednet" / tmp_path_factory.mktemp("told").name
    folder.mkdir(parents=True)
    script = folder / "told.py"
    try:
        script.write_text(
            "import pytest\n"
            "def test_good(): pass\n"
            "def test_bad(): assert False\n"
            "def test_left_out(): pytest.skip('for a reason')\n"
        )
        tested = run_tests("trixie", (str(script.relative_to(CHECKOUT)),), timeout_s=120)
    finally:
        script.unlink(missing_ok=True)
        folder.rmdir()
    assert tested.rc == 1
    assert tested.passed == 1
    assert [name.rpartition("::")[2] for name in tested.failed] == ["test_bad"]
    assert list(tested.skipped.values()) == ["for a reason"]
