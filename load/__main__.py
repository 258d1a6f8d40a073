# SPDX-License-Identifier: Apache-2.0
"""The command behind `bednet load` and `make load`.

- :func:`main`: `python -m load SITE --profile P` loads a deployed site.
- :func:`parse`: the command line alone.

Exit codes: 0 the gateway keeps to the thresholds, 1 it does not or something went wrong, 2 the command line is wrong,
3 nothing can be said (the generator was the limit, the run was interrupted, something was not measured).
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bednet.client import METHODS
from bednet.errors import BednetError, SiteError
from bednet.site import load_site
from load import report as reports
from load.describe import Described, describe
from load.identities import CHECKOUT, STATE, Identities, leftovers, read_pending, take_back
from load.observe import Observer, restart
from load.plan import CERTIFICATE, PASSWORD, PSK, TOKEN, WAYS, Gateway, Plan, PlanError
from load.planning import BEARER, choose, is_bound, make_plan, playable, reaches, way_of
from load.profiles import PROFILES, Profile
from load.remote import ask, deal
from load.run import run
from load.search import search
from load.slo import Threshold, Verdict, read_slo

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bednet.site import Site
    from load.remote import Share

PROG = "bednet load"
#: The least that the kernel gives in the short turns that a broker should have, in percent of a core.
SMALLEST_CPU = 10
EXIT = {Verdict.PASSED: 0, Verdict.FAILED: 1, Verdict.INCONCLUSIVE: 3}


def parser(prog: str = PROG, *, lab: bool = False) -> argparse.ArgumentParser:
    """Return the parser of the command line.

    :param lab: with what only a lab can do.
    """
    made = argparse.ArgumentParser(
        prog=prog,
        description="Load a deployed gateway as a plant would, and say whether it keeps to the thresholds.",
        epilog="Profiles: "
        + " ".join(f"{name}: {profile.habit}" for name, profile in PROFILES.items())
        + " Exit codes: 0 passed, 1 failed, 2 the command line is wrong, 3 nothing can be said.",
    )
    made.add_argument("site", type=Path, metavar="SITE", help="the site's folder, such as inventories/example-plant")
    made.add_argument("--profile", choices=tuple(PROFILES), default="steady", help="the habit (default: steady)")
    made.add_argument("--gateway", metavar="NAME", help="which gateway (default: the first)")
    made.add_argument("--devices", type=_whole, metavar="N", help="how many devices (default: the profile's)")
    made.add_argument("--every", type=_positive, metavar="S", help="seconds between two messages to a topic")
    made.add_argument("--qos", type=int, choices=(0, 1, 2), help="of telemetry, commands and answers")
    made.add_argument("--payload", type=_whole, metavar="BYTES", help="the size of a message (at least 32)")
    made.add_argument("--duration", type=_positive, metavar="S", help="how long it is measured, in seconds")
    made.add_argument("--slo", type=Path, default=CHECKOUT / "load/slo.yml", metavar="FILE", help="the thresholds")
    made.add_argument("--report", type=Path, metavar="FOLDER", help="where the report goes (default: .bednet/load/...)")
    made.add_argument(
        "--bundles",
        type=Path,
        metavar="FOLDER",
        help="play the site's own devices, whose bundles lie there, in their own topics, and make no test identities",
    )
    made.add_argument(
        "--authentication",
        choices=WAYS,
        metavar="WAY",
        help=f"how test identities come in: {', '.join(WAYS)} (default: as the devices that they are copies of)",
    )
    made.add_argument(
        "--token-method",
        choices=METHODS,
        metavar="METHOD",
        help=f"with tokens: how test identities prove themselves to the token service: {', '.join(METHODS)} "
        f"(default: as the devices that they are copies of, and {METHODS[0]} where those have no tokens)",
    )
    made.add_argument(
        "--websockets",
        action="store_true",
        help="devices with passwords, and all test identities are such then, speak MQTT over WebSockets",
    )
    made.add_argument("--generators", type=_whole, metavar="N", help="how many processes load (default: 1)")
    made.add_argument(
        "--remote",
        action="store_true",
        help="let the hosts of the group load_generators, prepared by playbooks/load.yml, generate the load; "
        "--generators is then the number of processes on each (default: one for each core)",
    )
    made.add_argument(
        "--restart-broker",
        action=argparse.BooleanOptionalAction,
        help="with reconnect-storm: restart the gateway's broker, over SSH, so that every client of it loses its "
        "connection; without it the test devices cut theirs (default: no; in the lab of make load: yes)",
    )
    made.add_argument("--web", type=_whole, nargs="?", const=8089, metavar="PORT", help="show Locust's web interface")
    made.add_argument(
        "--search",
        action="store_true",
        help="raise the load, from the profile's, until a threshold breaks, and say what the gateway holds",
    )
    if lab:
        made.add_argument(
            "--gateway-cpu",
            type=_whole,
            metavar="PERCENT",
            help="give the lab's gateway so much of a core and no more, as a stand-in for a small one",
        )
    return made


def _whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def adjusted(profile: Profile, arguments: argparse.Namespace) -> Profile:
    """Return a profile with what the command line wants otherwise."""
    wanted: dict[str, Any] = {
        "devices": arguments.devices,
        "every_s": arguments.every,
        "qos": arguments.qos,
        "payload_bytes": arguments.payload,
        "duration_s": arguments.duration,
    }
    return replace(profile, **{name: value for name, value in wanted.items() if value is not None})


def parse(arguments: Sequence[str] | None = None, prog: str = PROG, *, lab: bool = False) -> argparse.Namespace:
    """Read the command line.

    :raises SystemExit: with 2 when it is wrong, and with 0 for `--help`; what is to be said was said.
    """
    made = parser(prog, lab=lab)
    parsed = made.parse_args(arguments)
    if parsed.search and parsed.web is not None:
        made.error("--search makes many runs; --web shows one. Choose one of them.")
    wanted = PROFILES[parsed.profile].authentication
    if wanted and parsed.authentication not in (None, wanted):
        made.error(f"--profile {parsed.profile} is for devices that come in by {wanted}.")
    parsed.authentication = parsed.authentication or wanted or (PASSWORD if parsed.websockets else None)
    if parsed.websockets and parsed.authentication != PASSWORD:
        made.error("--websockets is for devices that come in by password.")
    if parsed.token_method and (parsed.authentication != TOKEN or parsed.bundles):
        made.error("--token-method goes with --authentication token, and with test identities.")
    if parsed.restart_broker and not PROFILES[parsed.profile].cut_at:
        made.error("--restart-broker goes with --profile reconnect-storm.")
    if lab and parsed.gateway_cpu is not None and not SMALLEST_CPU <= parsed.gateway_cpu <= 100:  # noqa: PLR2004
        made.error(f"--gateway-cpu is a number from {SMALLEST_CPU} to 100.")
    return parsed


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command; returns the exit code."""
    return execute(parse(arguments, prog))


def execute(parsed: argparse.Namespace, notes: Sequence[str] = ()) -> int:
    """Do what the command line says; returns the exit code.

    :param notes: sentences for the report.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _load(parsed, notes)
    except SiteError as error:
        sys.stderr.write(f"{error}\n")
    except BednetError as error:
        sys.stderr.write(f"bednet: {error}\n")
    except KeyboardInterrupt:
        sys.stderr.write("bednet: interrupted before the load began; there is no report.\n")
        return EXIT[Verdict.INCONCLUSIVE]
    return 1


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _load(parsed: argparse.Namespace, notes: Sequence[str]) -> int:
    profile = adjusted(PROFILES[parsed.profile], parsed)
    # Everything that can be wrong without touching the site.
    thresholds = read_slo(parsed.slo, parsed.profile, tuple(PROFILES))
    site = load_site(parsed.site)
    folder = parsed.report or STATE / "reports" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{parsed.profile}"
    reports.check_writable(folder)
    for pending in leftovers():
        _say(f"Taking back the test identities that a run left behind ({pending.stem})")
        take_back(read_pending(pending))
        pending.unlink(missing_ok=True)
    _say(f"Asking {parsed.site} about its gateways")
    described = describe(parsed.site)
    gateway = chosen(described, parsed.gateway, websockets=parsed.websockets)
    shares = _deal(parsed, described) if parsed.remote else ()
    with ExitStack() as stack:
        if parsed.bundles:
            bundles = {
                device.id: parsed.bundles / device.id
                for device in site.devices.values()
                if (way := way_of(device, parsed.authentication)) is not None
                and device.revoked is None
                and reaches(device, gateway, way)
                and _complete(parsed.bundles / device.id, way, bound=is_bound(device))
            }
            bundles = dict(list(bundles.items())[: parsed.devices or len(bundles)])
            if not bundles:
                raise PlanError(
                    f"There is no bundle in {parsed.bundles} with what a device needs to come in by "
                    f"{parsed.authentication or 'any way'}. Cure: see docs/load.md."
                )
            identities = "The site's own devices were played, in their own topics."
            played = site
        else:
            templates = choose(site, profile.devices, gateway, way=parsed.authentication, method=parsed.token_method)
            _say(f"Making {len(templates)} test identities, good for a day; they are taken back after the run")
            _check_way(parsed.authentication, gateway, described, method=parsed.token_method)
            made = stack.enter_context(
                Identities(*(parsed.site, templates, described), way=parsed.authentication, method=parsed.token_method)
            )
            bundles, played = made.bundles, load_site(made.site)
            identities = f"{len(bundles)} test identities were made for the run and taken back after it."
        notes = (
            *notes,
            *_left_out(site, gateway, parsed.authentication, None if parsed.bundles else parsed.token_method),
        )
        job = _Job(parsed, profile, thresholds, played, gateway, bundles, described, identities, folder, notes, shares)
        return job.search() if parsed.search else job.once()


def chosen(described: Described, name: str | None, *, websockets: bool) -> Gateway:
    """Return the gateway to load.

    :raises PlanError: when there is none of that name, or it does not speak what it shall.
    """
    gateway = replace(described.gateway(name), websockets=websockets)
    if websockets and gateway.websockets_port is None:
        raise PlanError(
            f"{gateway.name} has no listener for WebSockets. Cure: set mosquitto_websockets_port, run site.yml."
        )
    return gateway


def _deal(parsed: argparse.Namespace, described: Described) -> tuple[Share, ...]:
    """Ask the hosts that generate load whether they are there, and deal the work out to them.

    :raises PlanError: when there are none. :raises RemoteError: when one is not prepared.
    """
    hosts = described.generators
    if not hosts:
        raise PlanError("The inventory has no group load_generators. Cure: see docs/load.md, More than one machine.")
    _say(f"Asking {', '.join(host.name for host in hosts)} to generate load")
    found = [ask(host) for host in hosts]
    return deal(hosts, [parsed.generators or processes for processes in found])


def _check_way(way: str | None, gateway: Gateway, described: Described, *, method: str | None = None) -> None:
    """Refuse a way in that the gateway does not have, before anything is made.

    :raises PlanError: when it has not.
    """
    if way in (PSK, TOKEN) and described.access_control != "plugin":
        raise PlanError(
            f"--authentication {way} needs bednet's plugin on every gateway. Cure: choose another way, or deploy it."
        )
    if way == TOKEN and described.token_address is None:
        raise PlanError("The inventory has no group token_service. Cure: see docs/tokens.md, or choose another way.")
    if way == TOKEN and method == BEARER and gateway.password_port is None:
        raise PlanError(
            f"{gateway.name} has no listener for tokens by {method}. Cure: set mosquitto_password_port, run site.yml."
        )
    if way is not None and gateway.port(way) is None:
        raise PlanError(
            f"{gateway.name} has no listener for --authentication {way}. Cure: set mosquitto_{way}_port, run site.yml."
        )


def _complete(bundle: Path, way: str, *, bound: bool) -> bool:
    needed = {
        CERTIFICATE: ("certificate.pem", "key.pem"),
        PASSWORD: ("password",),
        PSK: ("psk",),
        TOKEN: ("client.json", *(("certificate.pem", "key.pem") if bound else ("client_secret",))),
    }[way]
    return all((bundle / name).exists() for name in (*needed, "ca.pem"))


def _left_out(site: Site, gateway: Gateway, way: str | None, method: str | None) -> tuple[str, ...]:
    """Say which of the site's devices could not be played."""
    names = [
        device.id
        for device in site.devices.values()
        if device.revoked is None and not (playable(device) and reaches(device, gateway, way, method))
    ]
    if not names:
        return ()
    shown = ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")  # noqa: PLR2004 - enough to see which
    return (f"{gateway.name} has no listener for some devices, and they were not played: {shown}.",)


@dataclass(frozen=True)
class _Job:
    """A run, or several in search of the limit, with all that they have in common."""

    parsed: argparse.Namespace
    profile: Profile
    thresholds: Sequence[Threshold]
    site: Site
    gateway: Gateway
    bundles: Mapping[str, Path]
    described: Described
    identities: str
    folder: Path
    notes: Sequence[str]
    shares: Sequence[Share]

    def _plan(self, profile: Profile, processes: int) -> Plan:
        return make_plan(
            *(self.site, self.gateway, self.parsed.profile, profile, self.bundles),
            way=self.parsed.authentication,
            restart=bool(self.parsed.restart_broker),
            token_address=self.described.token_address or "",
            generators=processes,
        )

    @property
    def _processes(self) -> int:
        """How many processes generate load, unless a search takes more."""
        return sum(len(share.shares) for share in self.shares) or self.parsed.generators or 1

    def _run(self, profile: Profile, processes: int) -> reports.Report:
        plan = self._plan(profile, processes)
        _say(
            f"Profile {plan.profile}: {plan.devices} devices on {plan.gateway.name}, {plan.offered_per_s:.0f} "
            f"messages/s in, {plan.delivered_per_s:.0f}/s out, for {plan.warmup_s + plan.duration_s:.0f} s"
        )
        shell = self.described.shells[self.gateway.name]
        notes = list(self.notes)
        if plan.restart:
            _say(f"The broker on {plan.gateway.name} will be RESTARTED in this run, with all its clients, yours too")
        if plan.gateway.websockets:
            notes.append("Devices with passwords spoke MQTT over WebSockets.")
        if plan.cut_at_s and not plan.restart:
            notes.append("The test devices cut their connections themselves; the broker was not restarted.")
        observer = Observer(shell, follow=plan.restart)
        return run(
            plan,
            self.thresholds,
            observer,
            identities=self.identities,
            notes=notes,
            web_port=self.parsed.web,
            restart=partial(restart, shell),
            shares=self.shares,
        )

    def once(self) -> int:
        report = self._run(self.profile, self._processes)
        sys.stdout.write(reports.summary(report) + "\n")
        page, data = reports.write(report, self.folder)
        sys.stdout.write(f"Report: {page}\n        {data}\n")
        return EXIT[report.judgement.verdict]

    def search(self) -> int:
        least = self._processes
        # Who says how many there shall be, gets as many.
        most = least if self.shares or self.parsed.generators else max(least, os.cpu_count() or 1)
        found = search(self.profile, self._run, say=_say, processes=range(least, most + 1))
        sys.stdout.write(found.summary() + "\n")
        for page in found.write(self.folder):
            sys.stdout.write(f"Report: {page}\n")
        return EXIT[found.verdict]


def _say(text: str) -> None:
    sys.stderr.write(f"==> {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
