# SPDX-License-Identifier: Apache-2.0
"""What Locust runs: a user is a device of the plan, with its habits.

`bednet load` writes the plan and starts Locust with this file; by hand it is

    locust -f load/locustfile.py --headless --plan plan.json --result result.json

The users share one generator (:mod:`load.generator`), which keeps the schedule; Locust spawns and stops them, and shows
the charts. What each message took is counted in the generator and handed to Locust's statistics once a second: an event
for each message would cost more than the message.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import gevent
from gevent.event import AsyncResult, Event
from locust import User, events, stats, task
from locust.runners import MasterRunner, WorkerRunner
from locust.stats import bucket_response_time

from load.client import ConnectError
from load.clocks import ROUNDS, Clock, Echo, ahead_of, error_ms, estimate
from load.generator import Generator, Phase
from load.machine import this_machine
from load.measure import clock_id
from load.plan import RESTART, Plan, PlanError, read_plan
from load.tally import Tally

if TYPE_CHECKING:
    from locust.argument_parser import LocustArgumentParser
    from locust.env import Environment

    from load.measure import Histogram

#: What this machine is called in the inventory; empty on the one that leads the run.
HOST = os.environ.get("BEDNET_LOAD_HOST", "")
PROGRESS_S = 5.0
SPAWN_PER_S = 1000.0
#: The exit code where nobody could connect.
NOBODY = 4
#: How often workers tell how much they have heard when the schedule is over.
DRAIN_S = 0.1
#: How long the leader of several processes waits for what they counted when it is stopped.
STOP_S = 10.0


# Locust's charts show these.
stats.PERCENTILES_TO_CHART = [0.5, 0.99]


class Stage:
    """What this process has to do with the run.

    :ivar plan: None before Locust has read its command line.
    :ivar generator: None before the run begins, and in the process that only leads others.
    :ivar share: which share of the plan it plays; -1 where Locust's number of the process says so.
    :ivar ready: the leader's: by process, its machine and clock. :ivar clocks: those of other machines than ours.
    :ivar drained: by process, how much it has heard after the schedule's end, and made others hear.
    :ivar ahead_ns: a worker's: by how much its clock is ahead of the leader's.
    :ivar go: set when every process has its devices connected.
    :ivar told: the leader's: what the others counted.
    """

    plan: Plan | None = None
    generator: Generator | None = None
    result: Path
    taken = 0
    share = -1
    drained: ClassVar[dict[str, tuple[int, int]]] = {}
    ready: ClassVar[dict[str, tuple[str, int]]] = {}
    clocks: ClassVar[list[Clock]] = []
    echoes: ClassVar[list[Echo]] = []
    echo: AsyncResult | None = None
    ahead_ns = 0
    go = Event()
    told: ClassVar[list[dict[str, Any]]] = []


class PlantDevice(User):
    """A device of the plant: it connects when the plan says so, and stays until the run is over."""

    @task
    def live(self) -> None:
        """Play one device of this process that nobody plays yet."""
        generator = Stage.generator
        assert generator is not None
        if Stage.taken < len(generator.devices):
            Stage.taken += 1
            generator.live(generator.devices[Stage.taken - 1])
        while True:
            gevent.sleep(3600)


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator] # Locust leaves it open
def _options(parser: LocustArgumentParser, **_: Any) -> None:
    # Not for the web interface: they are decided before it is there.
    for name, meaning in (("plan", "who plays what; `bednet load` writes it"), ("result", "where the tally goes")):
        parser.add_argument(f"--{name}", metavar="FILE", help=meaning, include_in_web_ui=False)
    share = "which share of the plan this worker plays; left out, Locust's own number of it"
    parser.add_argument("--share", type=int, default=-1, metavar="N", help=share, include_in_web_ui=False)


@events.init.add_listener  # type: ignore[untyped-decorator]
def _init(environment: Environment, **_: Any) -> None:
    options: Any = environment.parsed_options
    if not options.plan or not options.result:
        sys.exit("bednet: --plan and --result are missing. Cure: start it with `bednet load`, or name the two files.")
    # A socket for each device, and Locust's own.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        Stage.plan = plan = read_plan(Path(options.plan))
        runner = environment.runner
        if isinstance(runner, MasterRunner):
            runner.register_message("bednet-ready", _all_ready)
            runner.register_message("bednet-tally", _collect)
            runner.register_message("bednet-restart", _ask_restart)
            runner.register_message("bednet-clock", _clock_told)
            runner.register_message("bednet-drain", _drained)
        elif isinstance(runner, WorkerRunner):
            Stage.share = options.share
            runner.register_message("bednet-go", _go)
            runner.register_message("bednet-clock", _tell_clock)
            runner.register_message("bednet-enough", _enough)
            runner.register_message("bednet-stop", _stop)
        else:
            Stage.generator = Generator(plan, plan.players)
            Stage.go.set()
    except (PlanError, ConnectError) as exc:
        sys.exit(f"bednet: {exc}")
    Stage.result = Path(options.result)
    # Its table at the end says less than our report.
    logging.getLogger("locust.stats_logger").disabled = True
    # The same number of users for each process, some of whom may have nothing to play.
    options.num_users = math.ceil(len(plan.players) / plan.generators) * plan.generators
    options.spawn_rate = SPAWN_PER_S


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def _start(environment: Environment, **_: Any) -> None:
    plan, runner = Stage.plan, environment.runner
    assert plan is not None
    if isinstance(runner, MasterRunner):
        gevent.spawn(_lead, environment)
        return
    if isinstance(runner, WorkerRunner):
        # Before this process is told to spawn users, it has been told which one it is.
        share = Stage.share if Stage.share >= 0 else runner.worker_index
        Stage.generator = Generator(plan, plan.players[share :: plan.generators])
    gevent.spawn(_run, environment)


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def _quitting(environment: Environment, **_: Any) -> None:
    """Tell what there is when Locust is stopped in the middle."""
    generator, plan = Stage.generator, Stage.plan
    if isinstance(environment.runner, MasterRunner):
        if plan is not None and not Stage.result.exists():
            environment.runner.send_message("bednet-stop")
            with gevent.Timeout(STOP_S, False):
                while len(Stage.told) < plan.generators:
                    gevent.sleep(0.05)
            _write_all(interrupted=True)
    elif generator is not None and generator.phase is not Phase.OVER:
        generator.interrupted = True
        _tell(environment, generator, generator.finish(), complete=False)


def _run(environment: Environment) -> None:
    generator, plan, runner = Stage.generator, Stage.plan, environment.runner
    assert generator is not None
    assert plan is not None
    assert runner is not None
    helpers = [gevent.spawn(_charts, environment, generator), gevent.spawn(_orphaned, generator)]
    if isinstance(runner, WorkerRunner):
        helpers.append(gevent.spawn(_tell_drained, generator, runner))
    if plan.restart:
        helpers.append(gevent.spawn(_want_restart, generator, runner))
    if not isinstance(runner, WorkerRunner) or runner.worker_index == 0:
        helpers.append(gevent.spawn(_progress, generator))
    any_ = generator.await_connected()
    if isinstance(runner, WorkerRunner):
        runner.send_message("bednet-ready", {"clock": generator.clock, "host": HOST})
        while not Stage.go.wait(0.1) and not generator.interrupted:
            pass
    if any_ and not generator.interrupted:
        _say(f"{generator.connected} of {len(generator.devices)} devices are connected; the load begins")
        generator.load()
    if generator.phase is Phase.OVER:
        return
    if not any_:
        environment.process_exit_code = NOBODY
    complete = any_ and not generator.interrupted
    _tell(environment, generator, generator.finish(), complete=complete)
    gevent.killall(helpers)
    if isinstance(runner, WorkerRunner):
        return
    if environment.web_ui is None:
        runner.quit()
    else:
        runner.stop()


# Several processes: one leads, and Locust carries the messages


def _all_ready(environment: Environment, msg: Any, **_: Any) -> None:
    """Begin when every process has its devices connected."""
    assert Stage.plan is not None
    Stage.ready[msg.node_id] = (msg.data["host"], msg.data["clock"])
    if len(Stage.ready) == Stage.plan.generators:
        gevent.spawn(_begin, environment.runner)


def _begin(runner: Any) -> None:
    """Find out how far the machines' clocks are apart, and let all begin."""
    Stage.clocks = _ask_clocks(runner)
    runner.send_message("bednet-go", {"own": clock_id(), "clocks": [clock.to_json() for clock in Stage.clocks]})


def _ask_clocks(runner: Any) -> list[Clock]:
    """Ask one process of each machine but ours what time it is."""
    own = clock_id()
    found = []
    for node, (host, clock) in {clock: (node, (host, clock)) for node, (host, clock) in Stage.ready.items()}.values():
        if clock == own:
            continue
        Stage.echoes.clear()
        for number in range(ROUNDS):
            asked = time.monotonic_ns()
            Stage.echo = AsyncResult()
            runner.send_message("bednet-clock", {"number": number}, node)
            with gevent.Timeout(1.0, False):
                answered, at = Stage.echo.get()
                Stage.echoes.append(Echo(asked, at, answered))
        if Stage.echoes:
            found.append(Clock(host, clock, *estimate(Stage.echoes)))
    return found


def _clock_told(msg: Any, **_: Any) -> None:
    if Stage.echo is not None:
        Stage.echo.set((time.monotonic_ns(), msg.data["at_ns"]))


def _tell_clock(environment: Environment, **_: Any) -> None:
    runner: Any = environment.runner
    runner.send_message("bednet-clock", {"at_ns": time.monotonic_ns()})


def _go(msg: Any, **_: Any) -> None:
    clocks = [Clock.from_json(clock) for clock in msg.data["clocks"]]
    assert Stage.generator is not None
    own = Stage.generator.clock
    Stage.generator.ahead = ahead_of(own, [*clocks, Clock("", msg.data["own"], 0, 0)])
    Stage.ahead_ns = next((clock.ahead_ns for clock in clocks if clock.clock == own), 0)
    Stage.go.set()


def _collect(msg: Any, **_: Any) -> None:
    Stage.told.append(msg.data)


def _tell_drained(generator: Generator, runner: WorkerRunner) -> None:
    """Tell the leader, from the end of the schedule on, how much this process has heard and made others hear."""
    while True:
        gevent.sleep(DRAIN_S)
        if generator.phase is Phase.DRAINING:
            runner.send_message("bednet-drain", {"arrived": generator.arrived, "expected": generator.expected()})


def _drained(environment: Environment, msg: Any, **_: Any) -> None:
    assert Stage.plan is not None
    runner: Any = environment.runner
    Stage.drained[msg.node_id] = (msg.data["arrived"], msg.data["expected"])
    if len(Stage.drained) == Stage.plan.generators:
        arrived, expected = (sum(counts) for counts in zip(*Stage.drained.values(), strict=True))
        if arrived >= expected:
            runner.send_message("bednet-enough")


def _enough(**_: Any) -> None:
    if Stage.generator is not None:
        Stage.generator.enough.set()


def _stop(**_: Any) -> None:
    if Stage.generator is not None:
        Stage.generator.interrupted = True


def _lead(environment: Environment) -> None:
    """Wait until every process has told its tally, and write one for all."""
    assert Stage.plan is not None
    assert environment.runner is not None
    parent = os.getppid()
    while len(Stage.told) < Stage.plan.generators:
        gevent.sleep(0.1)
        if os.getppid() != parent:
            environment.runner.quit()
            return
    if not Stage.result.exists():
        if Stage.clocks:
            later = {clock.clock: clock.ahead_ns for clock in _ask_clocks(environment.runner)}
            Stage.clocks = [
                replace(clock, drift_ns=later[clock.clock] - clock.ahead_ns) if clock.clock in later else clock
                for clock in Stage.clocks
            ]
        _write_all(interrupted=False)
    if environment.web_ui is None:
        environment.runner.quit()
    else:
        environment.runner.stop()


def _write_all(*, interrupted: bool) -> None:
    """Write one tally for all processes; one that told nothing makes the run incomplete."""
    assert Stage.plan is not None
    whole: Tally | None = None
    for told in Stage.told:
        tally = Tally.from_json(told["tally"])
        if whole is None:
            whole = tally
        else:
            whole.merge(tally)
    if whole is None:
        return
    whole.clock_error_ms = error_ms(Stage.clocks)
    _write(
        {
            "clocks": [clock.to_json() for clock in Stage.clocks],
            "machines": {told["host"]: told["machine"] for told in Stage.told},
            "complete": len(Stage.told) == Stage.plan.generators and all(told["complete"] for told in Stage.told),
            "interrupted": interrupted or any(told["interrupted"] for told in Stage.told),
            "began_s": min(told["began_s"] for told in Stage.told),
            "tally": whole.to_json(),
        }
    )


def _tell(environment: Environment, generator: Generator, tally: Tally, *, complete: bool) -> None:
    for name in ("broken_at_ns", "back_at_ns"):
        if moment := getattr(tally, name):
            setattr(tally, name, moment - Stage.ahead_ns)
    document = {
        "host": HOST,
        "machine": this_machine(),
        "complete": complete,
        "interrupted": generator.interrupted,
        "began_s": (generator.begin_ns - Stage.ahead_ns) / 1e9 if generator.begin_ns else 0.0,
        "tally": tally.to_json(),
    }
    if isinstance(environment.runner, WorkerRunner):
        environment.runner.send_message("bednet-tally", document)
    else:
        _write(document)


def _write(document: dict[str, Any]) -> None:
    draft = Stage.result.with_suffix(".tmp")
    draft.write_text(json.dumps(document), encoding="utf-8")
    draft.replace(Stage.result)


def _orphaned(generator: Generator) -> None:
    """End when whoever started us is gone: nobody will read the result, and the identities are being taken back."""
    parent = os.getppid()
    while os.getppid() == parent:
        gevent.sleep(0.5)
    generator.interrupted = True


def _want_restart(generator: Generator, runner: Any) -> None:
    """Tell whoever started the run that the broker is to be restarted now."""
    generator.cut_due.wait()
    if isinstance(runner, WorkerRunner):
        runner.send_message("bednet-restart")
    else:
        _ask_restart()


def _ask_restart(**_: Any) -> None:
    Stage.result.with_suffix(RESTART).touch()


def _say(text: str) -> None:
    sys.stderr.write(f"    {text}\n")
    sys.stderr.flush()


def _progress(generator: Generator) -> None:
    total = generator.plan.warmup_s + generator.plan.duration_s
    while True:
        gevent.sleep(PROGRESS_S)
        tally = generator.tally
        if generator.phase is Phase.CONNECTING:
            _say(f"{generator.connected} of {len(generator.devices)} devices are connected")
            continue
        past = (time.monotonic_ns() - generator.begin_ns) / 1e9
        seconds = tally.seconds[-6:-1]
        sent = sum(second.sent for second in seconds) / max(1, len(seconds))
        received = sum(second.received for second in seconds) / max(1, len(seconds))
        shown = seconds[-1].latency.percentile_ms(99) if seconds else None
        _say(
            f"{min(past, total):4.0f} of {total:.0f} s: {generator.connected} connected, {sent:.0f} messages/s sent, "
            f"{received:.0f} delivered, p99 {'-' if shown is None else f'{shown:.1f} ms'}"
        )


def _charts(environment: Environment, generator: Generator) -> None:
    """Hand what was counted to Locust's statistics, for its tables and charts."""
    told: dict[str, int] = {}
    while True:
        gevent.sleep(1.0)
        tally = generator.tally
        shown = {("connect", "CONNACK"): tally.connect, ("reconnect", "CONNACK"): tally.reconnect}
        shown["renew", "AUTH"] = tally.renewal
        for (kind, qos), delivery in tally.deliveries.items():
            shown[f"{kind} QoS {qos}", "deliver"] = delivery.latency
        now = time.time()
        for entry in (environment.stats.total, *environment.stats.entries.values()):
            if entry.use_response_times_cache:
                # Of these its charts make percentiles of the last ten seconds.
                entry._cache_response_times(int(now) - 1)
        for (name, method), histogram in shown.items():
            _log(environment, name, method, histogram, told)


def _log(environment: Environment, name: str, method: str, histogram: Histogram, told: dict[str, int]) -> None:
    """Log what a histogram has counted since the last time, a bucket at a time."""
    now = time.time()
    for exact, count in histogram.steps_ms():
        key = f"{method} {name} {exact}"
        milliseconds = round(exact)
        new = count - told.get(key, 0)
        told[key] = count
        if not new:
            continue
        for entry in (environment.stats.get(name, method), environment.stats.total):
            if entry.num_requests == 0:
                entry.start_time = now
            entry.num_requests += new
            entry.num_reqs_per_sec[int(now)] = entry.num_reqs_per_sec.get(int(now), 0) + new
            entry.last_request_timestamp = now
            entry.total_response_time += milliseconds * new
            low = entry.min_response_time
            entry.min_response_time = milliseconds if low is None else min(low, milliseconds)
            entry.max_response_time = max(entry.max_response_time, milliseconds)
            bucket = bucket_response_time(milliseconds)
            entry.response_times[bucket] = entry.response_times.get(bucket, 0) + new
