# SPDX-License-Identifier: Apache-2.0
"""The commands about a site's policy: ``bednet check``, ``bednet compile``, ``bednet explain``.

- :func:`add_parser`: adds them to the command line.
- :func:`checked_site`: reads a site and runs every check, for other commands that need one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bednet import compiled
from bednet.acl_file import acl_problems, compile_acl_file
from bednet.errors import SiteError
from bednet.policy import Access, Decision, Verdict
from bednet.site import KEY_TYPES, Device, Site, decide, failing_tests, load_site, unusable_key_types

if TYPE_CHECKING:
    import argparse

DEFAULT_KEY_TYPE = "P-256"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands of this module; each sets ``run``, a function of the arguments that returns the exit code."""
    check = subparsers.add_parser("check", help="check a site's devices.yml and policy.yml and run the policy's tests")
    check.set_defaults(run=_check)
    compiler = subparsers.add_parser("compile", help="print a site's acl_file and devices as JSON")
    compiler.set_defaults(run=_compile)
    compiler.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write the compiled site for bednet-store to FILE; there is no acl_file in what is printed then",
    )
    for parser in (check, compiler):
        parser.add_argument(
            "--key-type",
            choices=KEY_TYPES,
            default=DEFAULT_KEY_TYPE,
            help=f"the CA's type of key, which every device must be able to verify (default: {DEFAULT_KEY_TYPE})",
        )
    explain = subparsers.add_parser("explain", help="say whether a device may do something, and which rule decides")
    explain.set_defaults(run=_explain)
    explain.add_argument("--device", required=True, metavar="ID", help="the device's id")
    wish = explain.add_mutually_exclusive_group(required=True)
    wish.add_argument("--publish", metavar="TOPIC", help="the topic to publish to")
    wish.add_argument("--subscribe", metavar="FILTER", help="the topic filter to subscribe to")
    for parser in (check, compiler, explain):
        parser.add_argument("site", type=Path, metavar="SITE", help="the site's folder, such as inventories/lab")


def checked_site(folder: Path, key_type: str) -> Site:
    """Read a site, run the policy's tests, and make sure that it can be compiled.

    :raises SiteError: with all problems found.
    """
    site = load_site(folder)
    problems = [*failing_tests(site), *acl_problems(site), *unusable_key_types(site.devices.values(), key_type)]
    if problems:
        raise SiteError(problems)
    return site


def _warn(site: Site) -> None:
    for warning in site.warnings:
        sys.stderr.write(f"{warning}\n")


def _waits(device: Device) -> bool:
    return device.enrolment == "csr" and device.csr is None and device.revoked is None


def _summary(site: Site) -> dict[str, int]:
    active = [device for device in site.devices.values() if device.revoked is None]
    return {
        "devices": len(site.devices),
        "active": len(active),
        "revoked": len(site.devices) - len(active),
        "certificate": sum("certificate" in device.authentication for device in active),
        "password": sum("password" in device.authentication for device in active),
        "waiting_for_csr": sum(_waits(device) for device in active),
        "roles": len(site.roles),
        "tests": len(site.tests),
    }


def _check(arguments: argparse.Namespace) -> int:
    site = checked_site(arguments.site, arguments.key_type)
    _warn(site)
    counts = _summary(site)
    sys.stdout.write(
        f"{arguments.site}: fine. Devices: {counts['devices']} (revoked: {counts['revoked']}). "
        f"Roles: {counts['roles']}. Policy tests: {counts['tests']}.\n"
    )
    for device in site.devices.values():
        if _waits(device):
            sys.stdout.write(f"{device.id} waits for {arguments.site / 'csr' / device.id}.csr\n")
    return 0


def _compile(arguments: argparse.Namespace) -> int:
    site = checked_site(arguments.site, arguments.key_type)
    acl_file = None
    if arguments.output is None:
        acl_file = compile_acl_file(site)
    else:
        try:
            compiled.write_file(site, arguments.output)
        except OSError as error:
            sys.stderr.write(f"bednet: {arguments.output}: {error.strerror}. Cure: name a file that you may write\n")
            return 1
    _warn(site)
    # A line for each device, not one text of all of them: there may be a million.
    sys.stdout.write(f'{{\n  "acl_file": {json.dumps(acl_file)},\n  "devices": [')
    for number, device_id in enumerate(sorted(site.devices)):
        sys.stdout.write(",\n    " if number else "\n    ")
        sys.stdout.write(json.dumps(_listed(site.devices[device_id])))
    sys.stdout.write(f'\n  ],\n  "summary": {json.dumps(_summary(site))}\n}}\n')
    return 0


def _listed(device: Device) -> dict[str, object]:
    return {
        "id": device.id,
        "authentication": device.authentication,
        "enrolment": device.enrolment,
        "csr": device.csr,
        "revoked": device.revoked,
    }


def _explain(arguments: argparse.Namespace) -> int:
    site = load_site(arguments.site)
    access = Access.SUBSCRIBE if arguments.publish is None else Access.PUBLISH
    topic = arguments.subscribe if arguments.publish is None else arguments.publish
    decision = decide(site, arguments.device, access, topic)
    if decision.verdict is Verdict.UNKNOWN_DEVICE:
        sys.stderr.write(f"bednet: {decision.reason}. Cure: name a device that is listed there. [unknown-device]\n")
        return 1
    sys.stdout.write(explanation(arguments.device, access, topic, decision))
    return 0


def explanation(device_id: str, access: Access, topic: str, decision: Decision) -> str:
    """Return a decision in words, with a line end."""
    may = "may" if decision.allowed else "may NOT"
    verb = "publish" if access is Access.PUBLISH else "subscribe"
    lines = [f"{device_id} {may} {verb} to {topic}", f"  because {decision.reason}"]
    if decision.parts:
        lines.append(
            "  Mosquitto with an acl_file accepts the SUBSCRIBE all the same and delivers only what is allowed in:"
        )
        lines += [f"    {part}" for part in decision.parts]
    elif access is Access.SUBSCRIBE and not decision.allowed:
        lines.append("  Mosquitto with an acl_file accepts the SUBSCRIBE all the same and delivers nothing.")
    return "\n".join(lines) + "\n"
