# SPDX-License-Identifier: Apache-2.0
"""The commands about a site's policy: ``bednet check``, ``compile``, ``explain``, ``issuers``, ``diff``, ``policy``.

- :func:`add_parser`: adds them to the command line.
- :func:`checked_site`: reads a site and runs every check, for other commands that need one.
- :func:`checked_one`: reads its policy and one device that comes from elsewhere, and runs every check of these two.
"""

from __future__ import annotations

import argparse
import datetime as dt
import ipaddress
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bednet import compiled
from bednet.acl_file import acl_problems, compile_acl_file
from bednet.difference import difference
from bednet.errors import SiteError
from bednet.explain import explanation
from bednet.issuers import TokenDevice, token_faults
from bednet.matrix import matrix_of
from bednet.moment import parse_instant
from bednet.policy import Access, Moment, Verdict
from bednet.shape import did_you_mean
from bednet.site import KEY_TYPES, Device, Site, failing_tests, load_one, load_site, unusable_key_types

if TYPE_CHECKING:
    from bednet.moment import Address

DEFAULT_KEY_TYPE = "P-256"
MOST_ENTRY = 1 << 22
"""The longest entry of a device, in bytes."""
ACCESS_CONTROLS = ("plugin", "acl_file")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands of this module; each sets ``run``, a function of the arguments that returns the exit code."""
    check = subparsers.add_parser("check", help="check a site's devices.yml and policy.yml and run the policy's tests")
    check.set_defaults(run=_check)
    compiler = subparsers.add_parser("compile", help="print a site's devices, and with acl_file that file, as JSON")
    compiler.set_defaults(run=_compile)
    compiler.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="write the compiled site to FILE as well, which bednet-store reads; what is printed stays the same",
    )
    one = compiler.add_mutually_exclusive_group()
    one.add_argument(
        "--device", metavar="ID", help="print nothing but one device's lines of the compiled site, for bednet-store put"
    )
    one.add_argument(
        "--entry",
        metavar="FILE",
        help="the same for a device whose entry is in FILE (-: stdin), as JSON; of the site only policy.yml is read",
    )
    for parser in (check, compiler):
        # A function, since only the parser can say that its command line is wrong.
        parser.set_defaults(refuse=parser.error)
        parser.add_argument(
            "--key-type",
            choices=KEY_TYPES,
            default=DEFAULT_KEY_TYPE,
            help=f"the CA's type of key, which every device must be able to verify (default: {DEFAULT_KEY_TYPE})",
        )
        parser.add_argument(
            "--strictest",
            action="store_true",
            help="with --access-control acl_file: where it cannot say what the policy says, let it allow less",
        )
    explain = subparsers.add_parser("explain", help="say whether a device may do something, and which rule decides")
    explain.set_defaults(run=_explain)
    explain.set_defaults(refuse=explain.error)
    explain.add_argument("--device", required=True, metavar="ID", help="the device's id")
    explain.add_argument(
        "--issuer", metavar="NAME", help="ask about a device that only a token of this issuer describes"
    )
    explain.add_argument("--role", action="append", default=[], metavar="ROLE", help="a role that its token gives")
    explain.add_argument(
        "--attribute",
        action="append",
        default=[],
        type=_attribute,
        metavar="NAME=VALUE",
        help="what its token says for a placeholder",
    )
    wish = explain.add_mutually_exclusive_group(required=True)
    wish.add_argument("--publish", metavar="TOPIC", help="the topic to publish to")
    wish.add_argument("--subscribe", metavar="FILTER", help="the topic filter to subscribe to")
    for parser in (check, compiler, explain):
        parser.add_argument(
            "--access-control",
            choices=ACCESS_CONTROLS,
            default=ACCESS_CONTROLS[0],
            help=f"what decides on the gateways, as mosquitto_access_control says (default: {ACCESS_CONTROLS[0]})",
        )
    issuers = subparsers.add_parser("issuers", help="say whose tokens may be for a device, as JSON")
    issuers.set_defaults(run=_issuers)
    issuers.add_argument("--device", required=True, metavar="ID", help="the device's id")
    issuers.add_argument(
        "--issuer", metavar="ISS", help="refuse when this is not the one, or is the site's own service"
    )
    differ = subparsers.add_parser("diff", help="say which devices gain and lose what from one site to another")
    differ.set_defaults(run=_diff)
    differ.add_argument("old", type=Path, metavar="OLD", help="the site's folder as it was")
    differ.add_argument("new", type=Path, metavar="NEW", help="the site's folder as it is to be")
    policy = subparsers.add_parser("policy", help="look at a policy as a whole")
    views = policy.add_subparsers(required=True, metavar="VIEW")
    matrix = views.add_parser("matrix", help="show who may do what, as a table or as a picture")
    matrix.set_defaults(run=_matrix)
    matrix.add_argument("--output", type=Path, metavar="FILE.svg", help="draw a picture in place of the table")
    for parser in (explain, matrix):
        parser.add_argument("--at", type=_instant, metavar="TIME", help="when, as in 2026-03-29T02:30:00+01:00, or now")
        parser.add_argument("--from", type=_address, dest="address", metavar="IP", help="the address it comes from")
    for parser in (check, compiler, explain, issuers, matrix):
        parser.add_argument("site", type=Path, metavar="SITE", help="the site's folder, such as inventories/lab")


def _instant(text: str) -> dt.datetime:
    if text == "now":
        return dt.datetime.now(dt.UTC)
    try:
        parse_instant(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    # The offset stays as it was written, for the answer.
    return dt.datetime.fromisoformat(text.upper().replace(" ", "T"))


def _attribute(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, as in location=hall-1")
    return name, value


def _address(text: str) -> Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def checked_site(
    folder: Path, key_type: str = DEFAULT_KEY_TYPE, access_control: str = "plugin", *, strictest: bool = False
) -> Site:
    """Read a site, run the policy's tests, and make sure that it can be compiled.

    :param access_control: ``plugin`` or ``acl_file``, which cannot express every policy.
    :param strictest: with ``acl_file``, take a stricter policy for good.
    :raises SiteError: with all problems found.
    """
    site = load_site(folder)
    problems = [*failing_tests(site), *unusable_key_types(site.devices.values(), key_type)]
    if access_control == "acl_file":
        problems += acl_problems(site, strictest=strictest)
    if problems:
        raise SiteError(problems)
    return site


def checked_one(folder: Path, entry: bytes, file: str, key_type: str = DEFAULT_KEY_TYPE) -> tuple[Site, Device]:
    """Read a site's policy and one device, whatever the site's lists say, and run the policy's tests of that device.

    :param entry: the device as a JSON object; `file` is where it comes from, for messages.
    :returns: a site with that device alone, and the device.
    :raises SiteError: with all problems found. What only the other devices can tell is not looked for:
        :func:`bednet.site.load_one`.
    """
    site, device = load_one(folder, entry, file)
    if problems := [*failing_tests(site), *unusable_key_types([device], key_type)]:
        raise SiteError(problems)
    return site, device


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
        "psk": sum("psk" in device.authentication for device in active),
        "token": sum("token" in device.authentication for device in active),
        "waiting_for_csr": sum(_waits(device) for device in active),
        "roles": len(site.roles),
        "rules": len(site.rules),
        "issuers": len(site.issuers),
        "tests": len(site.tests),
    }


def _asked(arguments: argparse.Namespace) -> Site:
    """Return the site that check and compile are about."""
    if arguments.strictest and arguments.access_control != "acl_file":
        arguments.refuse("argument --strictest: needs --access-control acl_file")
    return checked_site(arguments.site, arguments.key_type, arguments.access_control, strictest=arguments.strictest)


def _check(arguments: argparse.Namespace) -> int:
    site = _asked(arguments)
    _warn(site)
    counts = _summary(site)
    rules = f"Rules: {len(site.rules)}. " if site.rules else ""
    rules += f"Issuers of tokens: {len(site.issuers)}. " if site.issuers else ""
    sys.stdout.write(
        f"{arguments.site}: fine. Devices: {counts['devices']} (revoked: {counts['revoked']}). "
        f"Roles: {counts['roles']}. {rules}Policy tests: {counts['tests']}.\n"
    )
    for device in site.devices.values():
        if _waits(device):
            sys.stdout.write(f"{device.id} waits for {arguments.site / 'csr' / device.id}.csr\n")
    return 0


def _compile(arguments: argparse.Namespace) -> int:
    for option in ("device", "entry"):
        if getattr(arguments, option) is not None and (
            arguments.output is not None or arguments.access_control != "plugin"
        ):
            arguments.refuse(f"argument --{option}: goes with neither --output nor --access-control acl_file")
    if arguments.entry is not None:
        return _compile_entry(arguments)
    site = _asked(arguments)
    if arguments.device is not None:
        if arguments.device not in site.devices:
            near = did_you_mean(arguments.device, site.devices)
            sys.stderr.write(
                f"bednet: there is no device {arguments.device!r} in {arguments.site}. Cure: {near}Name one of its "
                "lists [unknown-device]\n"
            )
            return 1
        sys.stdout.write(compiled.device_lines(site, arguments.device))
        return 0
    acl_file = compile_acl_file(site, strictest=arguments.strictest) if arguments.access_control == "acl_file" else None
    if arguments.output is not None:
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
    issuers = [
        {name: getattr(issuer, name) for name in ("name", "issuer", "service", "algorithms", "longest", "jwks_url")}
        | {"audience": issuer.audience}
        for issuer in site.issuers.values()
    ]
    sys.stdout.write(f'\n  ],\n  "issuers": {json.dumps(issuers)},\n  "summary": {json.dumps(_summary(site))}\n}}\n')
    return 0


def _compile_entry(arguments: argparse.Namespace) -> int:
    if arguments.strictest:
        arguments.refuse("argument --strictest: needs --access-control acl_file")
    file = "stdin" if arguments.entry == "-" else arguments.entry
    try:
        if arguments.entry == "-":
            raw = sys.stdin.buffer.read(MOST_ENTRY + 1)
        else:
            with Path(arguments.entry).open("rb") as stream:
                raw = stream.read(MOST_ENTRY + 1)
    except OSError as error:
        sys.stderr.write(f"bednet: {file}: {error.strerror}. Cure: name a file that you may read\n")
        return 1
    if len(raw) > MOST_ENTRY:
        sys.stderr.write(f"bednet: {file}: more than {MOST_ENTRY} bytes. Cure: give one device alone\n")
        return 1
    site, device = checked_one(arguments.site, raw, file, arguments.key_type)
    _warn(site)
    sys.stdout.write(compiled.device_lines(site, device.id))
    return 0


def _listed(device: Device) -> dict[str, object]:
    return {
        "id": device.id,
        "authentication": device.authentication,
        "token": device.token_authentication,
        "enrolment": device.enrolment,
        "csr": device.csr,
        "revoked": device.revoked,
    }


def _explain(arguments: argparse.Namespace) -> int:
    if arguments.issuer is None and (arguments.role or arguments.attribute):
        arguments.refuse("arguments --role and --attribute: need --issuer")
    if arguments.issuer is not None and arguments.access_control == "acl_file":
        arguments.refuse("argument --issuer: tokens need the plugin, and goes not with --access-control acl_file")
    site = load_site(arguments.site)
    access = Access.SUBSCRIBE if arguments.publish is None else Access.PUBLISH
    topic = arguments.subscribe if arguments.publish is None else arguments.publish
    moment = Moment(arguments.at, arguments.address)
    device: str | TokenDevice = arguments.device
    if arguments.issuer is not None:
        device = TokenDevice(arguments.issuer, arguments.device, tuple(arguments.role), dict(arguments.attribute))
        if faults := list(token_faults(device, site.issuers, site.role_profiles, site.devices)):
            for fault in faults:
                sys.stderr.write(f"bednet: {fault.message}. Cure: {fault.cure}. [{fault.code}]\n")
            return 1
    decision, words = explanation(site, device, access, topic, moment, access_control=arguments.access_control)
    if decision.verdict is Verdict.UNKNOWN_DEVICE:
        cure = "name a device that is listed there"
        if any(issuer.roles for issuer in site.issuers.values()):
            cure += "; or say with --issuer, --role and --attribute what its token says"
        sys.stderr.write(f"bednet: {decision.reason}. Cure: {cure}. [unknown-device]\n")
        return 1
    sys.stdout.write(words)
    return 0


def _issuers(arguments: argparse.Namespace) -> int:
    site = load_site(arguments.site)
    device, wanted = arguments.device, arguments.issuer
    listed = device in site.devices
    able = [issuer for issuer in site.issuers.values() if device.startswith(issuer.prefix) and (listed or issuer.roles)]
    message = cure = code = ""
    if not listed and not able:
        message = (
            f"there is no device {device!r} in {arguments.site}, and no issuer of policy.yml gives such an id roles"
        )
        cure = f"{did_you_mean(device, site.devices)}Name one of its lists, or an id with the prefix of such an issuer"
        code = "unknown-device"
    elif wanted is not None:
        known = {issuer.issuer: issuer for issuer in site.issuers.values()}
        issuer = known.get(wanted)
        if issuer is None:
            message = f"{arguments.site}/policy.yml has no issuer {wanted!r}"
            cure = f"{did_you_mean(wanted, known)}Name one as its tokens do: {', '.join(known) or 'there is none'}"
            code = "unknown-issuer"
        elif issuer.service:
            message = f"{wanted} is the site's own token service"
            cure = "say the token's jti alone; the service knows the rest"
            code = "own-service"
        elif issuer not in able:
            message = f"no token of issuer '{issuer.name}' is for {device!r}"
            cure = f"name the device as gateways do, with the prefix '{issuer.prefix}', or another issuer"
            code = "wrong-issuer"
    if message:
        sys.stderr.write(f"bednet: {message}. Cure: {cure}. [{code}]\n")
        return 1
    shown = [{"name": issuer.name, "issuer": issuer.issuer, "service": issuer.service} for issuer in able]
    sys.stdout.write(json.dumps({"device": device, "listed": listed, "issuers": shown}) + "\n")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    sys.stdout.write(difference(load_site(arguments.old), load_site(arguments.new)))
    return 0


def _matrix(arguments: argparse.Namespace) -> int:
    matrix = matrix_of(load_site(arguments.site), Moment(arguments.at, arguments.address))
    if arguments.output is None:
        sys.stdout.write(matrix.text())
        return 0
    if arguments.output.suffix != ".svg":
        sys.stderr.write(f"bednet: {arguments.output}: only SVG is drawn here. Cure: end the name with .svg\n")
        return 1
    try:
        arguments.output.write_text(matrix.svg(), encoding="utf-8")
    except OSError as error:
        sys.stderr.write(f"bednet: {arguments.output}: {error.strerror}. Cure: name a file that you may write\n")
        return 1
    return 0
