# SPDX-License-Identifier: Apache-2.0
"""Run the checks: :func:`verify`."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from bednet import probe
from bednet.verify.check import Check, T_contra, of_scope
from bednet.verify.forgeries import make_forgeries
from bednet.verify.gateway import GATEWAY_CHECKS, REACHABLE
from bednet.verify.report import Report, Result
from bednet.verify.service import ANSWERING, SERVICE_CHECKS
from bednet.verify.target import Purse, ServiceTarget, Target
from bednet.verify.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from bednet.verify.task import Input

logger = logging.getLogger(__name__)

# No gateway is given more than this (seconds): checks that have not begun by then fail.
GATEWAY_BUDGET = 60.0
# Handshakes that run side by side against one gateway; a broker has one thread.
_LANES = 3

_FIRST = (REACHABLE.name, ANSWERING.name)


def verify(task: Input, *, started: datetime, budget: float = GATEWAY_BUDGET) -> Report:
    """Run the checks against every gateway, side by side where they do not disturb each other.

    :param started: the time that the report carries; aware.
    :param budget: seconds for each gateway.
    :raises VerifyError: if the probe's certificate cannot be read.
    """
    begin = time.monotonic()
    checks, of_services = of_scope(GATEWAY_CHECKS, task.checks), of_scope(SERVICE_CHECKS, task.checks)
    deadline = begin + budget
    with make_forgeries(task.identity) as forgeries, ThreadPoolExecutor(max_workers=8) as pool:
        purse = Purse()
        services = [ServiceTarget(service, task.identity, forgeries, purse) for service in task.services]
        answers = list(pool.map(lambda service: _run(ANSWERING, service, deadline), services))
        # A place that does not answer has one result that says so, and none that would only repeat it: gateways are
        # shown tokens of the others, or none.
        purse.services += [service for service, answer in zip(services, answers, strict=True) if answer.passed]
        known = purse if purse.services else None
        targets = [Target(gateway, task.identity, task.canary, forgeries, known) for gateway in task.gateways]
        runs = [
            *(pool.submit(_verify_gateway, target, checks, deadline) for target in targets),
            *(
                pool.submit(_verify_place, service, answer, of_services, deadline)
                for service, answer in zip(services, answers, strict=True)
            ),
        ]
        results = [result for run in runs for result in run.result()]
        silent = {result.gateway for result in results if result.check in _FIRST and not result.passed}
        expected = {target.place.name: sum(check.applies(target) for check in checks) for target in targets}
        expected |= {service.place.name: sum(check.applies(service) for check in of_services) for service in services}
    expected |= dict.fromkeys(silent, 1)
    return Report(started, time.monotonic() - begin, task.checks, expected, tuple(results))


def _verify_gateway(target: Target, checks: Sequence[Check[Target]], deadline: float) -> list[Result]:
    return _verify_place(target, _run(REACHABLE, target, deadline), checks, deadline)


def _verify_place(target: T_contra, first: Result, checks: Sequence[Check[T_contra]], deadline: float) -> list[Result]:
    """Run the rest of the checks where the first, of the place itself, has passed."""
    if not first.passed:
        return [first]
    rest = [check for check in checks if check.name != first.check and check.applies(target)]
    found: dict[str, Result] = {first.check: first}
    lanes: list[list[Check[T_contra]]] = [[check for check in rest if check.session]]
    others = [check for check in rest if not check.session]
    lanes.extend(others[number::_LANES] for number in range(_LANES))
    with ThreadPoolExecutor(max_workers=len(lanes)) as pool:
        for results in pool.map(lambda lane: [_run(check, target, deadline) for check in lane], lanes):
            found.update((result.check, result) for result in results)
    return [found[check.name] for check in checks if check.name in found]


def _run(check: Check[T_contra], target: T_contra, deadline: float) -> Result:
    begin = time.monotonic()
    if begin > deadline:
        verdict = Verdict(False, "not run: it took too long to answer the checks before")
    else:
        try:
            verdict = check.run(target)
        except probe.ProbeError as exc:
            verdict = Verdict(False, str(exc))
        except Exception as exc:  # a broken check must not pass, nor hide the others' results
            logger.debug("check %r failed", check.name, exc_info=True)
            verdict = Verdict(False, f"the check itself failed: {type(exc).__name__}: {exc}")
    seconds = round(time.monotonic() - begin, 3)
    return Result(check.layer, check.name, target.place.name, verdict.evidence, verdict.passed, check.bite, seconds)
