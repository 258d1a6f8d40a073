# SPDX-License-Identifier: Apache-2.0
"""A live gateway with bednet's plugin: what it writes down about refusals, and its store, changed under it.

- :class:`Audit`: the lines that the plugin writes into the journal from now on.
- :func:`refused_for`: shows a gateway what it must refuse, and returns its reason.
- :func:`other_site`: another policy, other devices in one gateway's store, for as long as a test needs them.
- :func:`revoked`: a device that one gateway's store refuses.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from cryptography import x509

from bednet import compiled
from bednet.probe import NOT_AUTHORIZED, Outcome, enter
from bednet.site import PROBE_ID, load_site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bednet.probe import Credentials, Listener
    from bednet.site import Site as LoadedSite
    from testbed.lab import Host
    from tests.conftest import Plant

DEADLINE_S = 5.0
POLL_S = 0.05
CA_SECRETS = "/var/lib/bednet-ca/state/passwords.json"
DEPLOYED = "/var/lib/bednet/site.jsonl"

# The plugin writes 50 lines a second at most (mosquitto_audit_rate): a test that wants to see one lets a storm pass.
BUSY = 20
_CURSOR = """
while [ "$(journalctl -u mosquitto --since=-1s -q -o cat | grep -c '^{"bednet":"audit"')" -ge "$1" ]; do sleep 0.1; done
journalctl -u mosquitto -n 0 --show-cursor -q
"""

# What bednet's gateways answer: MQTT 3.1.1 (3.2.2.3 and 3.9.3), MQTT 5 (3.2.2.2 and 3.9.3).
CONNECT_REFUSED = {4: 5, 5: 0x87}
SUBSCRIBE_REFUSED = {4: 0x80, 5: 0x87}

Json = dict[str, Any]


class Audit:
    """What the plugin of a gateway writes into the journal, from the moment on when this was made."""

    def __init__(self, host: Host) -> None:
        self._host = host
        told = host.exec(["sh", "-c", _CURSOR, "sh", str(BUSY)], timeout_s=20).stdout
        self._cursor = told.split("cursor: ")[-1].strip()

    def lines(self, **wanted: object) -> list[Json]:
        """Return the lines so far that say all this."""
        told = self._host.exec(
            ["journalctl", "-u", "mosquitto", f"--after-cursor={self._cursor}", "-q", "-o", "cat"], check=False
        ).stdout
        found = [json.loads(line) for line in told.splitlines() if line.startswith('{"bednet":"audit"')]
        return [line for line in found if wanted.items() <= line.items()]

    def await_lines(self, count: int, **wanted: object) -> list[Json]:
        """Wait for so many lines that say all this."""
        deadline = time.monotonic() + DEADLINE_S
        while len(found := self.lines(**wanted)) < count:
            assert time.monotonic() < deadline, f"not {count} lines of {wanted} are written down, but {self.lines()}"
            time.sleep(POLL_S)
        return found

    def line(self, **wanted: object) -> Json:
        """Wait for a line that says all this; return the first."""
        return self.await_lines(1, **wanted)[0]


def refused_for(host: Host, listener: Listener, shown: Credentials) -> str:
    """Show a gateway in MQTT 5 what it must refuse; return the reason that it writes down."""
    audit = Audit(host)
    answer = enter(listener, shown)
    assert (answer.outcome, answer.code) == (Outcome.REFUSED, NOT_AUTHORIZED), host.name
    return str(audit.line(event="refused", action="connect")["reason"])


def _secrets(plant: Plant, host: Host) -> Json:
    """What a gateway gets from the CA beside the compiled site."""
    kept = json.loads(plant.lab.hosts[plant.lab.shape.ca].read_file(CA_SECRETS))
    told = [json.loads(line) for line in host.exec(["bednet-store", "dump"]).stdout.splitlines()]
    serials = {line["revoked_serial"]: line["reason"] for line in told if "revoked_serial" in line}
    crl = x509.load_pem_x509_crl(host.read_file("/etc/mosquitto/tls/issuing.crl.pem"))
    return {
        "passwords": kept.get("passwords", {}),
        "psk": kept.get("psk", {}),
        "revoked_serials": serials,
        "crl_number": crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number,
    }


def _apply(host: Host, path: str, secrets: Json) -> Json:
    told: Json = json.loads(host.exec(["bednet-store", "apply", path], input=json.dumps(secrets)).stdout)
    return told


@contextmanager
def other_site(
    plant: Plant, host: Host, change: Callable[[Site], None], **secrets: Mapping[str, str]
) -> Iterator[Json]:
    """Apply a changed site to the store of one gateway, as site.yml would; afterwards it is as it was.

    :param change: changes what devices.yml and policy.yml say.
    :param secrets: more of them than the CA has: `psk` (device: key in hexadecimal) or `revoked_serials`.
    :return: what `bednet-store apply` did.
    """
    path, kept = "/run/bednet-other-site.jsonl", _secrets(plant, host)
    lines = map(json.loads, compiled.lines(changed_site(plant, change)))
    # Whom an earlier test revoked comes back, as after reinstate.yml.
    mark = {"reinstated": int(time.time())}
    entries = [line | mark if "device" in line and line["device"] != PROBE_ID else line for line in lines]
    host.write_file(path, "".join(f"{json.dumps(entry)}\n" for entry in entries), mode="0644")
    try:
        yield _apply(host, path, kept | {name: {**kept[name], **more} for name, more in secrets.items()})
    finally:
        _apply(host, DEPLOYED, kept)
        host.exec(["rm", "-f", path])


@contextmanager
def revoked(plant: Plant, host: Host, device: str) -> Iterator[None]:
    """Revoke a device at one gateway, as revoke.yml does; afterwards it is let in again."""
    kept = _secrets(plant, host)
    host.exec(["bednet-store", "revoke", device, "--reason", "superseded"])
    try:
        yield
    finally:
        host.exec(["bednet-store", "reinstate", device])
        _apply(host, DEPLOYED, kept)


@dataclass(frozen=True)
class Site:
    """What the files of a site say."""

    devices: Json
    policy: Json

    def device(self, name: str) -> Json:
        """Return the entry of a device."""
        return next(entry for entry in self.devices["devices"] if entry["id"] == name)

    def add_rule(self, name: str, **what: Any) -> None:
        """Add an attribute rule."""
        self.policy.setdefault("rules", []).append({"name": name, **what})


def changed_site(plant: Plant, change: Callable[[Site], None]) -> LoadedSite:
    """Return the lab's site with changes."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "site"
        shutil.copytree(plant.lab.site, copy)
        files = {name: copy / f"{name}.yml" for name in ("devices", "policy")}
        site = Site(**{name: yaml.safe_load(file.read_text(encoding="utf-8")) for name, file in files.items()})
        change(site)
        for name, file in files.items():
            # JSON is YAML; the other way of writing it has aliases, which a site's files may not.
            file.write_text(json.dumps(getattr(site, name), indent=1), encoding="utf-8")
        return load_site(copy)
