# SPDX-License-Identifier: Apache-2.0
"""The token service in containers that have what its hosts have: nginx, PostgreSQL, and each release's libraries.

On this machine these tests (tests/token_service/deployed) would be left out where a program is missing; here nothing
may be. The sharp edges: libraries of Debian 12 that are years older than the pinned ones, and what nginx lets through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from testbed import image
from testbed.workbench import PytestRun, run_service_tests

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.lab

DEPLOYED = "tests/token_service/deployed"
POSTGRESQL, CLOCK = f"{DEPLOYED}/test_postgresql.py", f"{DEPLOYED}/test_clock.py"
AUTHLIB = {"trixie": "1.6.", "bookworm": "1.2."}
# bookworm's turn comes where time is no matter.
SUITES = [pytest.param(suite, marks=[] if suite == "trixie" else pytest.mark.full, id=suite) for suite in image.SUITES]


def check(tested: PytestRun, suite: str, at_least: int, *left_out: str) -> None:
    """See that pytest ran, beside the release's libraries; nothing failed, or was left out for any other reason."""
    assert tested.rc == 0, f"{', '.join(tested.failed)}\n{tested.log[-20000:]}"
    assert f"python3-authlib\t{AUTHLIB[suite]}" in tested.log
    assert tested.passed >= at_least, tested.log[-4000:]
    assert not {name: why for name, why in tested.skipped.items() if not why.endswith(left_out)}


@pytest.mark.parametrize("suite", SUITES)
def test_clients_of_others_are_served_through_nginx(suite: str, measured: Callable[[str], None]) -> None:
    # Under Debian 12's libfaketime (0.9.10) Python cannot sleep. The service reads its clock in the same way there.
    elsewhere = (POSTGRESQL, *([CLOCK] if suite == "bookworm" else []))
    tested = run_service_tests(suite, (DEPLOYED, *(f"--ignore={path}" for path in elsewhere)))
    check(tested, suite, 28)
    measured(f"token service behind nginx on {suite}: {tested.passed} tests in {tested.seconds:.0f} s")


@pytest.mark.parametrize("suite", SUITES)
def test_instances_share_a_database_of_postgresql(suite: str, measured: Callable[[str], None]) -> None:
    tested = run_service_tests(suite, (POSTGRESQL,), debian=True)
    check(tested, suite, 14)
    measured(f"token service over PostgreSQL on {suite}: {tested.passed} tests in {tested.seconds:.0f} s")


@pytest.mark.full
@pytest.mark.parametrize("suite", image.SUITES)
def test_service_passes_all_of_its_tests_with_the_libraries_of_a_release(
    suite: str, measured: Callable[[str], None]
) -> None:
    # schemathesis has no package in Debian; all else needs no more than a host of the service has, but for comparisons.
    elsewhere = (f"--ignore={DEPLOYED}", "--ignore=tests/token_service/test_openapi.py")
    tested = run_service_tests(suite, ("tests/token_service", *elsewhere), debian=True)
    check(
        tested,
        suite,
        500,
        "the implementation to compare with is not installed",
        "this is a host of the service, and no control machine",
    )
    measured(f"token service with the libraries of {suite}: {tested.passed} tests in {tested.seconds:.0f} s")
