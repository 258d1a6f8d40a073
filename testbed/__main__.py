# SPDX-License-Identifier: Apache-2.0
"""The lab's command: ``python -m testbed --help``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from typing import TYPE_CHECKING

from testbed import engine, image, package, things, workbench
from testbed.common import CHECKOUT, STATE, LabError, run, step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except LabError as exc:
        print(f"testbed: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("testbed: stopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m testbed", description="The lab: hosts to deploy to and to attack.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, help_: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_, description=help_)
        sub.set_defaults(run=run)
        return sub

    up = command("up", _up, "Bring a lab up that stays until `down`.")
    up.add_argument("name", nargs="?", default="dev", help="its name (default: dev)")
    up.add_argument("--suite", choices=image.SUITES, default="trixie", help="the Debian release of its hosts")
    up.add_argument("--gateways", type=int, default=2, help="how many gateways (default: 2)")
    up.add_argument(
        "--ca", default="authority", help="where the CA lives: authority (a host of its own), gateway-N or localhost"
    )
    up.add_argument("--no-field", dest="field", action="store_false", help="without hosts for devices and an attacker")
    up.add_argument("--keep", action="store_true", help="leave a lab that is up already as it is")

    down = command("down", _down, "Take a lab down.")
    down.add_argument("name", nargs="?", default="dev", help="its name (default: dev)")
    down.add_argument("--every", action="store_true", help="all labs of this checkout")
    down.add_argument("--stop-engine", action="store_true", help="stop the engine, if we started it and nobody uses it")

    demo = command("demo", _demo, "Deploy a secured site onto a lab, let its devices talk, and verify every layer.")
    demo.add_argument("--suite", choices=image.SUITES, default="trixie", help="the Debian release of its hosts")

    verify = command("verify", _verify, "Probe a lab's gateways from outside.")
    verify.add_argument("--lab", default="demo", help="which lab (default: demo)")

    command("status", _status, "Show the labs on this machine.")

    sweep = command("sweep", _sweep, "Remove what killed runs left behind.")
    sweep.add_argument("--all", action="store_true", help="also the labs that are in use")

    play = command("play", _play, "Run a playbook against a lab: play [--lab NAME] site.yml [arguments].")
    play.add_argument("--lab", default="dev", help="which lab (default: dev)")
    play.add_argument("playbook", help="a file of playbooks/, or a path")
    play.add_argument("arguments", nargs=argparse.REMAINDER, help="further arguments of ansible-playbook")

    ssh = command("ssh", _ssh, "Open a shell on a host over SSH, as the operator, or run a command there.")
    ssh.add_argument("--lab", default="dev", help="which lab (default: dev)")
    ssh.add_argument("host", help="such as gateway-1")
    ssh.add_argument("arguments", nargs=argparse.REMAINDER, help="a command")

    exec_ = command("exec", _exec, "Run a command on a host as root, past its network; input is passed on if piped.")
    exec_.add_argument("--lab", default="dev", help="which lab (default: dev)")
    exec_.add_argument("host", help="such as gateway-1")
    exec_.add_argument("arguments", nargs=argparse.REMAINDER, help="the command")

    engine_ = command("engine", _engine, "Start an engine where none answers (up), stop ours when idle (down).")
    engine_.add_argument("action", choices=("up", "down"))

    images = command("images", _images, "Build the host images that are missing.")
    images.add_argument("suites", nargs="*", default=["trixie"], help="trixie (default), bookworm")
    images.add_argument(
        "--kinds", default="host,field", help=f"which (default: host,field); also {', '.join(list(image.LAYERS)[1:])}"
    )

    package_ = command("package", _package, "Build the broker's plugin as a Debian package, where it is not there yet.")
    package_.add_argument("--suite", choices=tuple(package.RELEASES), default="trixie", help="the Debian release")
    package_.add_argument(
        "--arch",
        choices=package.ARCHITECTURES,
        default=image.ARCHITECTURE,
        help=f"the gateways' architecture (default: {image.ARCHITECTURE}, as this machine)",
    )

    _add_suites(command)
    command("purge", _purge, "Remove all labs, our images, and the engine if we installed it.")
    return parser


def _add_suites(command: Callable[[str, object, str], argparse.ArgumentParser]) -> None:
    tests = command(
        "plugin-tests", _plugin_tests, "Run the plugin's tests in a container, against the broker of a Debian release."
    )
    tests.add_argument("--suite", choices=tuple(workbench.BROKERS), default="trixie", help="the Debian release")
    tests.add_argument("--foreign", action="store_true", help=f"against the broker of {image.FOREIGN}, emulated")
    tests.add_argument("--clang", action="store_true", help="with clang, which the fuzz targets are built by")
    tests.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of pytest (default: tests/plugin)")

    service = command(
        "service-tests", _service_tests, "Run the token service's tests in a container with what its hosts have."
    )
    service.add_argument("--suite", choices=image.SUITES, default="trixie", help="the Debian release")
    service.add_argument("--debian", action="store_true", help="the tests use Debian's libraries too")
    service.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="arguments of pytest (default: tests/token_service/deployed)"
    )


def _up(args: argparse.Namespace) -> int:
    from testbed.lab import Lab, Shape  # noqa: PLC0415 - testcontainers takes half a second to import

    if args.keep:
        try:
            lab = Lab.attach(args.name)
        except LabError:
            pass
        else:
            lab.close()
            if lab.shape == Shape(args.suite, args.gateways, args.ca, args.field):
                print(lab.site)
                return 0
    lab = Lab.up(args.name, args.suite, args.gateways, args.ca, field=args.field, persistent=True)
    for host in lab.hosts.values():
        print(f"{host.name:12} {host.address}", file=sys.stderr)
    print(lab.site)
    lab.close()
    return 0


def _down(args: argparse.Namespace) -> int:
    from testbed.lab import check_name  # noqa: PLC0415

    check_name(args.name)
    names = {args.name}
    if args.every:
        names = {path.name for path in (STATE / "labs").iterdir()} if (STATE / "labs").is_dir() else set()
    if engine.answers():
        connection = engine.client()
        try:
            if args.every:
                names |= {run.name for run in things.runs(connection) if run.checkout == CHECKOUT}
            for name in sorted(names):
                with step(f"Removing the lab `{name}`"):
                    things.remove(connection, things.run_id(name))
        finally:
            connection.close()
    for name in names:
        things.close_connections(things.control_dir(name))
        shutil.rmtree(STATE / "labs" / name, ignore_errors=True)
    if args.stop_engine:
        print(engine.stop_if_ours())
    return 0


def _demo(args: argparse.Namespace) -> int:
    from testbed.demo import demo  # noqa: PLC0415

    return demo(args.suite)


def _verify(args: argparse.Namespace) -> int:
    from testbed.demo import verify  # noqa: PLC0415

    return verify(args.lab)


def _status(_: argparse.Namespace) -> int:
    if not engine.answers():
        print("No Docker engine answers, so no lab is up.")
        return 0
    connection = engine.client()
    try:
        found = things.runs(connection)
    finally:
        connection.close()
    for lab in found:
        kind = "abandoned" if lab.abandoned else "stays until `down`" if lab.persistent else f"of process {lab.owner}"
        print(f"{lab.name} ({kind}; {lab.checkout})")
        for container, state in lab.containers.items():
            print(f"    {container:40} {state}")
    if not found:
        print("No lab is up.")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    if not engine.answers():
        print("No Docker engine answers, so nothing is left behind on it.")
        return 0
    connection = engine.client()
    try:
        gone = things.sweep(connection, everything=args.all)
    finally:
        connection.close()
    print(f"Removed {len(gone)} labs." if gone else "Nothing was left behind.")
    return 0


def _play(args: argparse.Namespace) -> int:
    from testbed.lab import Lab  # noqa: PLC0415

    lab = Lab.attach(args.lab)
    try:
        return lab.play(args.playbook, *args.arguments, check=False, echo="all", timeout_s=3600).rc
    finally:
        lab.close()


def _ssh(args: argparse.Namespace) -> int:
    from testbed.lab import Lab  # noqa: PLC0415

    lab = Lab.attach(args.lab)
    lab.close()
    if args.host not in lab.shape.site_hosts:
        raise LabError(
            f"`{args.host}` cannot be reached over SSH.", cure=f"Choose one of {', '.join(lab.shape.site_hosts)}."
        )
    command = [
        *("ssh", "-F", "none", "-i", str(lab.folder / "id_ed25519"), "-o", "IdentitiesOnly=yes"),
        *("-o", "StrictHostKeyChecking=yes", "-o", f"UserKnownHostsFile={lab.folder / 'known_hosts'}"),
        f"operator@{lab.hosts[args.host].address}",
        *_after_dashes(args.arguments),
    ]
    os.execvp(command[0], command)  # noqa: S606 - no shell is wanted


def _exec(args: argparse.Namespace) -> int:
    from testbed.lab import Lab  # noqa: PLC0415

    lab = Lab.attach(args.lab)
    try:
        if args.host not in lab.hosts:
            raise LabError(f"There is no host `{args.host}`.", cure=f"Choose one of {', '.join(lab.hosts)}.")
        command = _after_dashes(args.arguments)
        if not command:
            raise LabError(
                "No command was given.", cure=f"Try `python -m testbed exec {args.host} -- systemctl status`."
            )
        piped = None if sys.stdin.isatty() else sys.stdin.buffer.read()
        result = lab.hosts[args.host].exec(command, check=False, input=piped, timeout_s=3600)
    finally:
        lab.close()
    sys.stdout.buffer.write(result.raw)
    sys.stderr.write(result.stderr)
    return result.rc


def _after_dashes(words: list[str]) -> list[str]:
    return words[1:] if words[:1] == ["--"] else words


def _engine(args: argparse.Namespace) -> int:
    if args.action == "up":
        with step("Docker engine"):
            engine.ensure()
    else:
        print(engine.stop_if_ours())
    return 0


def _images(args: argparse.Namespace) -> int:
    engine.ensure()
    kinds = tuple(args.kinds.split(","))
    if unknown := set(kinds) - {"host", *image.LAYERS}:
        raise LabError(
            f"There is no image called {', '.join(sorted(unknown))}.",
            cure=f"Choose from host, {', '.join(image.LAYERS)}.",
        )
    for suite, names in image.ensure(tuple(args.suites), kinds).items():
        print(f"{suite}: {' '.join(names[kind] for kind in kinds)}")
    return 0


def _package(args: argparse.Namespace) -> int:
    print(package.ensure(args.suite, args.arch))
    return 0


def _plugin_tests(args: argparse.Namespace) -> int:
    arguments = _after_dashes(args.arguments) or ["tests/plugin"]
    return workbench.run_tests(
        args.suite, arguments, foreign=args.foreign, clang=args.clang, echo=True, timeout_s=3600
    ).rc


def _service_tests(args: argparse.Namespace) -> int:
    arguments = _after_dashes(args.arguments) or ["tests/token_service/deployed"]
    return workbench.run_service_tests(args.suite, arguments, debian=args.debian, echo=True, timeout_s=3600).rc


def _purge(_: argparse.Namespace) -> int:
    if engine.answers():
        connection = engine.client()
        try:
            others = [lab for lab in things.runs(connection) if lab.checkout != CHECKOUT and not lab.abandoned]
            if others:
                raise LabError(
                    f"Labs of other checkouts are up: {', '.join(f'{lab.name} of {lab.checkout}' for lab in others)}.",
                    cure="Take them down there first: purge takes the images that they run on.",
                )
            for lab in things.sweep(connection, everything=True):
                things.close_connections(things.control_dir(lab.name))
        finally:
            connection.close()
    shutil.rmtree(STATE / "labs", ignore_errors=True)
    for sentence in engine.purge():
        print(sentence)
    # What the bootstrap had to install for Python's venv module.
    record = STATE / "bootstrap-packages"
    if record.exists():
        packages = record.read_text(encoding="ascii").split()
        run(["apt-get", "purge", "--yes", *packages], what="Removing packages", cure="Run it by hand.")
        record.unlink()
        print(f"Removed {', '.join(packages)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
