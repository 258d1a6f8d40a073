# SPDX-License-Identifier: Apache-2.0
"""The demonstration: from bare hosts to a verified site, in front of the user.

- :func:`demo`: bring the lab up (or use the one that is up), deploy, let the devices talk, verify, show.
- :func:`verify`: probe a lab's gateways once more.

Each step says what it does and how long it took; one that fails says what to do.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bednet.verify.report import read_report
from bednet.verify.table import summary, table
from bednet.verify.task import VerifyError
from testbed import engine, package
from testbed.common import CHECKOUT, LabError, step
from testbed.field import HOME, Field, FieldStatus
from testbed.lab import DOMAIN, Lab, Shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bednet.verify.report import Report

NAME = "demo"
#: The device that is left to the user: it would else be thrown out by its own player, and throw that out in turn.
HAND = "tablet-jo"
FLOW_DEADLINE_S = 60
WIDTH = 130


@dataclass(frozen=True)
class Line:
    """A command line for the user to paste.

    :param title: what it shows.
    :param shown: the line.
    :param words: the command itself, as it runs on the devices' host in the folder of the device's bundle.
    :param expected: words of its output that show that it did what the title says.
    """

    title: str
    shown: str
    words: tuple[str, ...]
    expected: str


def demo(suite: str) -> int:
    """Show everything; return 0 if every check passed.

    :raises LabError: when a step fails.
    """
    begin = time.monotonic()
    lab = _lab(suite)
    with engine.in_use():
        try:
            with step("Deploying the site: ansible-playbook playbooks/site.yml, over SSH"):
                done = lab.play("site.yml", echo="tasks")
                _say(f"{done.changed} changes on {len(done.stats)} hosts; the whole output is in {_log(lab)}")
            field = Field(lab)
            with step("Starting the devices"):
                names = field.deploy(without=(HAND,))
                _say(f"{len(names)} devices connect, each with credentials of its own")
            with step("Waiting until telemetry flows"):
                status = field.await_flow(FLOW_DEADLINE_S)
            report = _verify(lab)
            status = field.status()
            lines = _lines(lab)
            with step("Trying the command lines below"):
                for line in lines:
                    _try(lab, line)
            _show(report, status, lines, lab, time.monotonic() - begin)
        finally:
            lab.close()
    return 0 if report.passed else 1


def verify(name: str) -> int:
    """Probe a lab's gateways from outside and show what was found; return 0 if the net holds.

    :raises LabError: when there is no such lab, or the probes could not run.
    """
    lab = Lab.attach(name)
    try:
        report = _verify(lab)
    finally:
        lab.close()
    console = _console()
    console.print(table(report))
    console.print(summary(report), style="bold green" if report.passed else "bold red", highlight=False)
    return 0 if report.passed else 1


def _console() -> Console:
    """Return where the tables go; where that is no terminal they get room enough to be read."""
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)


def _lab(suite: str) -> Lab:
    if engine.answers():
        try:
            lab = Lab.attach(NAME)
        except LabError:
            # None is up, or not all of it: it is made anew.
            pass
        else:
            if lab.shape == Shape(suite):
                _say(f"The lab `{NAME}` is up already and is used again (`make demo-down` takes it away).")
                # The checkout may have moved on since.
                package.ensure(suite)
                return lab
            lab.close()
    return Lab.up(NAME, suite, persistent=True)


def _verify(lab: Lab) -> Report:
    path = lab.folder / "verification.json"
    path.unlink(missing_ok=True)
    with step("Verifying from outside: ansible-playbook playbooks/verify.yml"):
        done = lab.play("verify.yml", "-e", f"verification_report={path}", check=False, echo="tasks")
        try:
            return read_report(path)
        except (VerifyError, OSError) as exc:
            failed = "\n".join(f"{f['host']}: {f['task']}: {f['message']}" for f in done.failures)
            raise LabError(
                "The probes could not run.",
                cure=f"See {_log(lab)}; a site that was never deployed needs `make demo` first.",
                log=failed or done.stdout,
            ) from exc


def _lines(lab: Lab) -> list[Line]:
    gateway = f"{lab.shape.gateway_names[0]}.{DOMAIN}"
    common = (
        *("-h", gateway, "-p", "8883", "--cafile", "ca.pem", "--cert", "certificate.pem", "--key", "key.pem"),
        *("-i", HAND),
    )
    told = (
        (
            f"Listen as {HAND} to what the sensors of hall 1 say (five messages):",
            ("mosquitto_sub", *common, "-t", "sensors/#", "-v", "-C", "5", "-W", "30"),
            "sensors/",
        ),
        (
            f"Tell a sensor to measure twice as often, as {HAND}, who may:",
            ("mosquitto_pub", *common, "-V", "5", "-q", "1", "-t", "commands/temp-101/interval", "-m", "1", "-d"),
            "received PUBACK (Mid: 1, RC:0)",
        ),
        (
            f"Be refused: pretend to be a sensor, which {HAND} may not:",
            ("mosquitto_pub", *common, "-V", "5", "-q", "1", "-t", "sensors/temp-101/temperature", "-m", "99"),
            "Not authorized",
        ),
    )
    prefix = _prefix(lab)
    return [Line(title, f"{prefix} {shlex.join(words)}", words, expected) for title, words, expected in told]


def _prefix(lab: Lab) -> str:
    """Return what comes before a command so that it runs on the devices' host, beside the bundle of the device."""
    folder = f"{HOME}/bundles/{HAND}"
    container = f"{lab.network}-devices"
    for docker in ("docker", "/usr/bin/docker"):
        # A client may be too new for the engine (29 does not speak to 20.10).
        found = shutil.which(docker)
        if found and subprocess.run([found, "version"], capture_output=True, check=False).returncode == 0:
            return f"{docker} exec -w {folder} {container}"
    python = shlex.quote(str(CHECKOUT / ".venv/bin/python"))
    return f"{python} -m testbed exec --lab {lab.name} devices -- env -C {folder}"


def _try(lab: Lab, line: Line) -> None:
    """Run a line that is about to be shown: what we show must work.

    :raises LabError: when it does not do what its title says.
    """
    done = lab.hosts["devices"].exec(
        ["env", "-C", f"{HOME}/bundles/{HAND}", *line.words], check=False, timeout_s=FLOW_DEADLINE_S
    )
    if line.expected not in done.stdout + done.stderr:
        raise LabError(
            f"`{line.words[0]}` did not do what it should: {line.title}",
            cure="See the broker's log: python -m testbed exec --lab demo gateway-1 -- journalctl -u mosquitto -n 40",
            log=done.stdout + done.stderr,
        )


def _show(report: Report, status: FieldStatus, lines: Sequence[Line], lab: Lab, seconds: float) -> None:
    console = _console()
    console.print()
    console.print(table(report))
    console.print(_traffic(status))
    console.print(summary(report), style="bold green" if report.passed else "bold red", highlight=False)
    missing = status.total("missing")
    console.print(
        f"{len(status.devices)} devices: {status.total('published')} messages acknowledged, "
        f"{status.total('received')} received, {missing} missing.",
        highlight=False,
    )
    console.print(
        f"\nThe lab stays up; `make demo-down` takes it away. To paste (lab `{lab.name}`):\n", highlight=False
    )
    for line in lines:
        console.print(f"# {line.title}", style="dim", highlight=False, soft_wrap=True)
        # Printed as it is: a line that is wrapped or styled cannot be pasted.
        print(line.shown + "\n", flush=True)
    if not report.passed:
        console.print("What to do: see the checks marked FAIL above.", style="bold red")
    console.print(f"All of it took {seconds:.0f} s.", style="dim", highlight=False)


def _traffic(status: FieldStatus) -> Table:
    """Return the counters in groups: one row for each protocol and for those who listen."""
    drawn = Table(title="Telemetry", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("device", "MQTT", "acknowledged", "received", "of these numbered", "missing", "refused"):
        drawn.add_column(column, justify="left" if column == "device" else "right")
    for name, counters in status.devices.items():
        drawn.add_row(
            name,
            "5" if counters["protocol"] == 5 else "3.1.1",  # noqa: PLR2004 - the protocol's own number
            *(str(counters[key]) for key in ("published", "received", "heard", "missing", "refused")),
        )
    return drawn


def _log(lab: Lab) -> str:
    return str((lab.folder / "ansible.log").relative_to(CHECKOUT))


def _say(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)
