# SPDX-License-Identifier: Apache-2.0
"""The broker, watched from beside while it is loaded.

- :class:`Observer`: runs a small script on the gateway (over SSH, or here) that tells once a second what /proc says.
- :func:`restart`: restarts the broker, as an operator would.
- :class:`Observation`: what it told; :class:`Sample`: one second of it.
- :func:`parse`: the script's lines.

The script needs nothing on the gateway but a shell. What it costs is in the figures of the host, not of the broker.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_WINDOW = 5
#: Where the script tells of limits to the CPU: of the broker's unit, and of the whole host where that is a container.
CPU_MAX = ("cpu_max_unit", "cpu_max_host")

# $1: the broker's process id, or - for that of the unit; $2: `follow` where the unit will be restarted.
SCRIPT = r"""
unit_pid() { systemctl show --property=MainPID --value mosquitto.service; }
pid=$1 follow=$2
[ "$pid" != - ] || pid=$(unit_pid)
echo "H tick $(getconf CLK_TCK)"
echo "H page $(getconf PAGESIZE)"
echo "H since $(date +%s)"
echo "H kernel $(uname -srm)"
echo "H cores $(nproc)"
model=$(tr -d '\0' </proc/device-tree/model 2>/dev/null) ||
    model=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -n 1)
echo "H cpu $model"
echo "H memory $(sed -n 's/^MemTotal: *//p' /proc/meminfo)"
echo "H system $(. /etc/os-release && echo "$PRETTY_NAME")"
echo "H broker $(mosquitto -h 2>/dev/null | head -n 1)"
echo "H pid $pid"
at=/sys/fs/cgroup
echo "H cpu_max_unit $(cat "$at$(sed -n 's/^0:://p' /proc/"$pid"/cgroup)/cpu.max" 2>/dev/null)"
# Of a container, whichever version of control groups its host has.
echo "H cpu_max_host $(cat $at/cpu.max $at/cpu/cpu.cfs_quota_us $at/cpu/cpu.cfs_period_us 2>/dev/null | tr '\n' ' ')"
while :; do
while read -r line </proc/"$pid"/stat; do
    read -r up _ </proc/uptime
    echo "T $up"
    echo "S $line"
    read -r cpu </proc/stat
    echo "C $cpu"
    set -- /proc/"$pid"/fd/*
    echo "F $#"
    while read -r key value _; do
        case $key in VmHWM:|VmRSS:) echo "M $key $value" ;; MemAvailable:) echo "M $key $value" ;; esac
    done <<EOT
$(cat /proc/"$pid"/status /proc/meminfo 2>/dev/null)
EOT
    echo E
    sleep 1
done 2>/dev/null
[ "$follow" = follow ] || break
tries=0
until new=$(unit_pid) && [ "$new" != 0 ] && [ "$new" != "$pid" ] || [ $tries = 60 ]; do
    tries=$((tries + 1))
    sleep 1
done
[ $tries != 60 ] || break
pid=$new
echo "R $pid"
done
echo "X the broker's process is gone"
"""

# What the broker's journal says of the time of the run.
_JOURNAL = r"""
since=$1
journalctl --unit=mosquitto.service --since="@$since" --output=cat --no-pager 2>/dev/null | awk '
    /"bednet":"audit"/ { audit++ }
    /[Dd]enied|not authori[sz]ed/ { denied++ }
    /dropped/ { dropped++ }
    /[Ee]rror/ { errors++ }
    { lines++ }
    END { printf "lines=%d audit=%d denied=%d dropped=%d errors=%d\n", lines, audit, denied, dropped, errors }'
"""


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment.

    :ivar at_s: seconds of this machine's monotonic clock.
    :ivar cpu_percent: the broker's, of one core, since the sample before; `host_percent` that of all cores of the host.
    :ivar files: open files of the broker, which are its sockets and a handful more; None where they cannot be seen.
    :ivar available_mib: memory of the host that could still be had.
    """

    at_s: float
    cpu_percent: float
    host_percent: float
    memory_mib: float
    files: int | None
    available_mib: float


@dataclass(frozen=True)
class Observation:
    """What was seen of the broker.

    :ivar host: what the gateway says of itself: kernel, cores, cpu, memory, system, broker.
    :ivar peak_memory_mib: the highest resident set of the broker since it was started.
    :ivar journal: how many lines of its journal spoke of what, during the run.
    :ivar restarts: how often it was started anew during the run.
    :ivar died: whether the broker's process was gone before the end.
    :ivar problem: why there is nothing to see; empty where there is.
    """

    host: dict[str, str] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    peak_memory_mib: float | None = None
    journal: dict[str, int] = field(default_factory=dict)
    died: bool = False
    problem: str = ""
    restarts: int = 0

    @property
    def cores(self) -> float:
        """What the broker may use: one core, since it has one thread, or less where it has a quota."""
        found = 1.0
        for name in CPU_MAX:
            # The quota and its period; `max` or -1 for no quota.
            words = self.host.get(name, "").split()
            if len(words) == 2 and all(word.isdigit() and int(word) for word in words):  # noqa: PLR2004
                found = min(found, int(words[0]) / int(words[1]))
        return found

    @property
    def cpu_percent(self) -> float | None:
        """The broker's CPU in its busiest five seconds, of what it may use; None where it was not seen so long."""
        values = [sample.cpu_percent for sample in self.samples]
        if self.died or len(values) < _WINDOW:
            return None
        most = max(sum(values[at : at + _WINDOW]) / _WINDOW for at in range(len(values) - _WINDOW + 1))
        return most / self.cores

    @property
    def memory_mib(self) -> float | None:
        """The broker's largest resident set during the run, in MiB; None where it was not seen."""
        return max(sample.memory_mib for sample in self.samples) if self.samples and not self.died else None


class Observer:
    """Watches one broker.

    :param shell: a command that runs a shell script given on its standard input, with arguments after `-s --`, such as
        ``["ssh", HOST, "sudo", "-n", "sh", "-s", "--"]``.
    :param pid: the broker's process; empty for that of the unit mosquitto.service.
    :param follow: whether the unit will be restarted, and its next process is to be watched then.
    """

    def __init__(self, shell: Sequence[str], pid: str = "", *, follow: bool = False) -> None:
        self._shell = list(shell)
        self._pid = pid
        self._follow = follow
        self._lines: list[tuple[float, str]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = b""
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch."""
        try:
            self._process = subprocess.Popen(
                [*self._shell, self._pid or "-", "follow" if self._follow else "stay"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as exc:
            self._errors = str(exc).encode()
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(SCRIPT.encode())
            self._process.stdin.close()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append((time.monotonic(), line.decode(errors="replace").rstrip("\n")))

    def stop(self) -> Observation:
        """End watching, and tell what was seen."""
        process = self._process
        if process is not None:
            if not self._lines:
                # A shell that refuses says why, and ends by itself.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2)
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if self._thread is not None:
                self._thread.join(5)
            assert process.stderr is not None
            assert process.stdout is not None
            self._errors += process.stderr.read()
            process.stdout.close()
            process.stderr.close()
        seen = parse(self._lines)
        if not seen.samples:
            said = self._errors.decode(errors="replace").strip().splitlines()
            return Observation(seen.host, problem=said[-1] if said else "The gateway's shell told nothing.")
        journal = {} if self._pid else self._read_journal(seen.host.get("since", "0"))
        return replace(seen, journal=journal)

    def _read_journal(self, since: str) -> dict[str, int]:
        try:
            told = subprocess.run(
                [*self._shell, since], input=_JOURNAL.encode(), capture_output=True, timeout=30, check=False
            ).stdout.decode(errors="replace")
        except (OSError, subprocess.TimeoutExpired):
            return {}
        pairs = [word.partition("=") for word in told.split()]
        return {name: int(value) for name, _, value in pairs if value.isdigit()}


def restart(shell: Sequence[str]) -> str:
    """Restart the broker; return what went wrong, or nothing.

    :param shell: as for :class:`Observer`.
    """
    try:
        done = subprocess.run(
            list(shell), input=b"systemctl restart mosquitto.service\n", capture_output=True, timeout=90, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return str(exc)
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return "" if done.returncode == 0 else said[-1] if said else f"exit code {done.returncode}"


def parse(lines: Sequence[tuple[float, str]]) -> Observation:
    """Return what the script told, line by line, each with the moment it arrived."""
    host: dict[str, str] = {}
    samples: list[Sample] = []
    current: dict[str, str] = {}
    before: dict[str, str] = {}
    peak = None
    died = False
    restarts = 0
    for at, line in lines:
        kind, _, rest = line.partition(" ")
        if kind == "H":
            name, _, value = rest.partition(" ")
            host[name] = value.strip()
        elif kind == "M":
            name, _, value = rest.partition(" ")
            current[name.rstrip(":")] = value
        elif kind == "X":
            died = bool(samples)
        elif kind == "R":
            # Another process, which has used no CPU yet.
            before, current = {}, {}
            restarts += 1
        elif kind == "E":
            if before:
                sample = _sample(at, before, current, float(host.get("tick", "100")))
                if sample is not None:
                    samples.append(sample)
            if current.get("VmHWM", "").isdigit():
                peak = int(current["VmHWM"]) / 1024
            before, current = current, {}
        elif kind:
            current[kind] = rest
    return Observation(host, tuple(samples), peak, died=died, restarts=restarts)


def _sample(at: float, before: dict[str, str], now: dict[str, str], tick: float) -> Sample | None:
    try:
        seconds = float(now["T"]) - float(before["T"])
        # After the name in parentheses: utime and stime are the 12th and 13th (proc(5), fields 14 and 15).
        used = [sum(map(int, told["S"].rpartition(")")[2].split()[11:13])) for told in (before, now)]
        host = [[int(word) for word in told["C"].split()[1:9]] for told in (before, now)]
        whole = sum(host[1]) - sum(host[0])
        idle = sum(host[1][3:5]) - sum(host[0][3:5])
        files = int(now["F"])
        return Sample(
            at,
            100 * (used[1] - used[0]) / tick / seconds,
            100 * (whole - idle) / whole if whole else 0.0,
            int(now["VmRSS"]) / 1024,
            # The pattern itself is one word where nothing may be listed.
            files if files > 1 else None,
            int(now["MemAvailable"]) / 1024,
        )
    except (KeyError, ValueError, ZeroDivisionError, IndexError):
        return None
