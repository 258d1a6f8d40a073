# SPDX-License-Identifier: Apache-2.0
"""One load run: generator, observer and verdict.

- :func:`run`: plays a plan and returns the report.
- :func:`generate`: plays a plan in a process of its own, Locust's, and returns what it counted.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bednet.errors import BednetError
from load.clocks import Clock
from load.plan import RESTART
from load.remote import Workers
from load.report import Report
from load.slo import Threshold, judge
from load.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future

    from load.observe import Observer
    from load.plan import Plan
    from load.remote import Share

CHECKOUT = Path(__file__).resolve().parent.parent
_POLL_S = 0.1
#: What a run may take beyond its own time: starting Locust, connecting, writing.
SLACK_S = 90.0
#: How long workers on other hosts may take to be there.
WORKERS_S = 60


class RunError(BednetError):
    """The generator could not do its work; the message says why."""

    code = "load-run"


@dataclass(frozen=True)
class Generated:
    """What the generator told.

    :ivar began_s: the monotonic clock when the load began; 0 where it never did.
    :ivar notes: sentences for the report.
    :ivar machines: what the generators on other hosts ran on, and `clocks` how far their clocks were apart.
    """

    tally: Tally
    complete: bool
    interrupted: bool
    began_s: float
    notes: tuple[str, ...] = ()
    machines: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    clocks: tuple[Clock, ...] = ()


def generate(
    plan: Plan,
    *,
    web_port: int | None = None,
    restart: Callable[[], str] | None = None,
    shares: Sequence[Share] = (),
) -> Generated:
    """Play a plan in Locust; Ctrl-C ends it early, and what was counted until then is returned.

    :param restart: restarts the broker when the plan wants it, and returns what went wrong, or nothing.
    :param web_port: show Locust's web interface on this port of the loopback interface; it stays until Ctrl-C.
    :param shares: what each of several other hosts plays; nothing is all of it here.
    :raises RunError: when Locust ends without telling anything.
    :raises RemoteError: when a host cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="bednet-load-") as name:
        folder = Path(name)
        plan_file, result, log = folder / "plan.json", folder / "result.json", folder / "locust.log"
        plan.write(plan_file)
        words = [sys.executable, "-m", "locust", "-f", str(CHECKOUT / "load/locustfile.py"), "--loglevel", "ERROR"]
        words += ["--plan", str(plan_file), "--result", str(result), "--stop-timeout", "1"]
        port = _free_port() if shares else 0
        if shares:
            words += ["--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", str(port)]
            words += ["--expect-workers", str(plan.generators), "--expect-workers-max-wait", str(WORKERS_S)]
        elif plan.generators > 1:
            words += ["--processes", str(plan.generators)]
        if web_port is None:
            words += ["--headless", "--only-summary"]
        else:
            words += ["--autostart", "--web-host", "127.0.0.1", "--web-port", str(web_port)]
        path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("wb") as out, ExitStack() as stack:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path},
                # Ctrl-C reaches us alone: told twice, it would stop in the middle of writing what it has.
                start_new_session=True,
            )
            stack.callback(_end, process)
            workers = (
                stack.enter_context(Workers(plan, shares, port, _deadline_s(plan) + WORKERS_S)) if shares else None
            )
            pool = stack.enter_context(ThreadPoolExecutor(max_workers=1))
            restarting = _Restarting(pool, result.with_suffix(RESTART), restart)
            interrupted = _await(process, plan, result, restarting, workers, web=web_port is not None)
            lost = workers.lost() if workers is not None and (interrupted or not result.exists()) else ""
            # Locust's end is that of its workers.
            _end(process)
        if not result.exists():
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            if lost:
                raise RunError(f"A host that generates load was lost: {lost}. Cure: see what it says above.")
            raise RunError(
                f"The load generator ended (exit code {process.returncode}) and told nothing"
                f"{': ' + said[-1] if said else ''}. Cure: read what it says above."
            )
        told = json.loads(result.read_text(encoding="utf-8"))
    return Generated(
        Tally.from_json(told["tally"]),
        told["complete"],
        told["interrupted"] or interrupted,
        told["began_s"],
        (
            *(restarting.told(told["began_s"]) if plan.restart else ()),
            *((f"A host that generates load was lost in the run: {lost}.",) if lost else ()),
        ),
        {name: facts for name, facts in told.get("machines", {}).items() if name},
        tuple(Clock.from_json(clock) for clock in told.get("clocks", ())),
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class _Restarting:
    """Restarts the broker, once, when the generator asks for it."""

    def __init__(self, pool: ThreadPoolExecutor, asked: Path, restart: Callable[[], str] | None) -> None:
        self._pool = pool
        self._asked = asked
        self._restart = restart
        self._work: Future[str] | None = None
        self._from_s = self._took_s = 0.0

    def look(self) -> None:
        """Begin where it is asked for."""
        if self._work is None and self._restart is not None and self._asked.exists():
            self._from_s = time.monotonic()
            self._work = self._pool.submit(self._do)

    def _do(self) -> str:
        assert self._restart is not None
        problem = self._restart()
        self._took_s = time.monotonic() - self._from_s
        return problem

    def told(self, began_s: float) -> tuple[str, ...]:
        """Return a sentence about it for the report."""
        if self._work is None:
            return ("The broker was to be restarted, and the run ended before.",)
        problem = self._work.result()
        if problem:
            return (f"The broker was to be restarted, and that failed: {problem}",)
        at = self._from_s - began_s
        return (f"The broker was restarted {at:.1f} s after the load began; that took {self._took_s:.1f} s.",)


def _await(
    process: subprocess.Popen[bytes],
    plan: Plan,
    result: Path,
    restarting: _Restarting,
    workers: Workers | None,
    *,
    web: bool,
) -> bool:
    """Wait for the generator; return whether it was interrupted."""
    deadline = time.monotonic() + _deadline_s(plan)
    try:
        while process.poll() is None and (web or time.monotonic() < deadline):
            if web and result.exists():
                sys.stderr.write("    The run is over; the charts stay until Ctrl-C.\n")
                process.wait()
                return False
            restarting.look()
            if workers is not None and workers.lost() and not result.exists():
                _end(process)
                return True
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        over = web and result.exists()
        _end(process)
        return not over
    except BaseException:
        _end(process)
        raise
    if process.poll() is None:
        _end(process)
        return True
    return False


def _deadline_s(plan: Plan) -> float:
    last = max((player.connect_at_s for player in plan.players), default=0.0)
    return last + plan.warmup_s + plan.duration_s + 2 * plan.drain_s + SLACK_S


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let the generator end, write what it has, and go."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run(
    plan: Plan,
    thresholds: Sequence[Threshold],
    observer: Observer | None,
    *,
    identities: str,
    notes: Sequence[str] = (),
    web_port: int | None = None,
    restart: Callable[[], str] | None = None,
    shares: Sequence[Share] = (),
) -> Report:
    """Play a plan, watch the broker meanwhile, and judge.

    :param identities: one sentence for the report about whose certificates are used.
    :raises RunError: when the generator told nothing.
    """
    started = datetime.now(UTC)
    if observer is not None:
        observer.start()
    try:
        generated = generate(plan, web_port=web_port, restart=restart, shares=shares)
    finally:
        observation = observer.stop() if observer is not None else None
    judgement = judge(
        thresholds,
        generated.tally,
        observation,
        complete=generated.complete,
        interrupted=generated.interrupted,
    )
    return Report(
        started,
        generated.began_s,
        plan,
        generated.tally,
        observation,
        judgement,
        generated.complete,
        generated.interrupted,
        identities,
        (*notes, *generated.notes),
        generated.machines,
        generated.clocks,
    )
