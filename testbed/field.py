# SPDX-License-Identifier: Apache-2.0
"""The plant in motion: the devices of the lab's site, played on its host `devices`.

- :class:`Field`: bring the bundles over, start the player, read the counters.
- :class:`FieldStatus`: the counters, and whether telemetry flows.
- :func:`plan`: who publishes and subscribes what, from devices.yml and the bundles.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
import zipfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paho.mqtt
import yaml

from bednet import client as token_client
from bednet import psk
from testbed import device as player
from testbed.common import LabError
from testbed.device import Habit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from testbed.lab import Lab, Result

CA_BUNDLES = Path("/var/lib/bednet-ca/bundles")
HOME = "/var/lib/devices"
STATUS = "/run/bednet-devices/status.json"
UNIT = "bednet-devices.service"
POLL_S = 0.5

UNIT_TEXT = f"""\
[Unit]
Description=The devices of the plant
After=network-online.target

[Service]
ExecStart=/usr/bin/python3 {HOME}/devices.pyz {HOME}/plan.json {STATUS}
User=devices
RuntimeDirectory=bednet-devices
RuntimeDirectoryMode=0755
Restart=on-failure
NoNewPrivileges=true
"""

UNPACK = """
id devices >/dev/null 2>&1 || useradd --system --home-dir "$1" --shell /usr/sbin/nologin devices
rm -rf "$1/bundles"
install -d -m 0750 -o devices -g devices "$1" "$1/bundles"
umask 077
tar -C "$1/bundles" -xf - --no-same-owner
chown -R devices: "$1/bundles"
chmod -R u=rwX,go= "$1/bundles"
"""

#: The ways to authenticate, the best first, and the port of a gateway that each is for; a token that is bound to a
#: certificate goes with that.
PORTS = {"certificate": "mtls_port", "password": "password_port", "psk": "psk_port", "token": "password_port"}

#: What a sensor measures, by its type: quantity, unit, base, swing. Sensors without a type are thermometers.
QUANTITIES = {
    "temperature": ("temperature", "Cel", 21.0, 3.0),
    "vibration": ("rms", "mm/s", 2.4, 0.8),
}


@dataclass(frozen=True)
class FieldStatus:
    """The counters at one moment.

    :param at: when they were read, on the devices host.
    :param devices: device id -> its counters (see :class:`testbed.device.Counters`).
    :param publishers: the devices that have something to say.
    :param readers: the devices that listen.
    """

    at: datetime
    devices: dict[str, dict[str, Any]]
    publishers: frozenset[str]
    readers: frozenset[str]

    def total(self, counter: str) -> int:
        """Return the sum of a counter over all devices."""
        return sum(int(counters[counter]) for counters in self.devices.values())

    @property
    def silent(self) -> dict[str, str]:
        """The devices that are not connected, said nothing yet or heard nothing yet, each with the reason."""
        reasons = {}
        for name, counters in self.devices.items():
            if not counters["connected"]:
                reasons[name] = counters["error"] or "not connected"
            elif name in self.publishers and not counters["published"]:
                reasons[name] = counters["error"] or "nothing acknowledged yet"
            elif name in self.readers and not counters["received"]:
                reasons[name] = counters["error"] or "nothing heard yet"
        return reasons


class Field:
    """The devices of a lab.

    :param lab: a lab with field hosts, onto which site.yml was played.
    """

    def __init__(self, lab: Lab) -> None:
        if "devices" not in lab.hosts:
            raise LabError(
                f"The lab `{lab.name}` has no host for devices.", cure="Bring it up without --no-field (field=True)."
            )
        self.lab = lab
        self.host = lab.hosts["devices"]

    def deploy(self, bundles: Path | None = None, *, without: Sequence[str] = ()) -> list[str]:
        """Bring the bundles from the CA's host to the devices' host, and start (or restart) all who have one.

        Keys travel through the engine's socket, in memory: never in an argument, a log or a file on this machine.

        :param bundles: where the bundles lie on the CA's host, if it is not the usual place.
        :param without: devices that get their bundle and are not played: a device has one session, and a test or a
            person who takes its part would fight with the player over it.
        :return: the ids of the devices that were started.
        :raises LabError: when there are no bundles, or the player does not start.
        """
        archive, clients = self._fetch(bundles or CA_BUNDLES)
        self.host.exec(
            [
                "sh",
                "-ceu",
                UNPACK,
                "sh",
                HOME,
            ],
            input=archive,
        )
        devices = yaml.safe_load((self.lab.site / "devices.yml").read_text(encoding="utf-8"))["devices"]
        entries = [entry for entry in plan(devices, clients) if entry["id"] not in without]
        self.host.write_file(f"{HOME}/devices.pyz", player_zip())
        self.host.write_file(f"{HOME}/plan.json", json.dumps({"devices": entries}, indent=1))
        self.host.write_file(f"/etc/systemd/system/{UNIT}", UNIT_TEXT)
        self.host.exec(["systemctl", "daemon-reload"])
        self.restart()
        return [entry["id"] for entry in entries]

    def _fetch(self, bundles: Path) -> tuple[bytes, dict[str, dict[str, Any]]]:
        """Return the bundles as a tar archive, and each device's client.json."""
        cure = "Run `python -m testbed play site.yml` first: it enrols the devices."
        if self.lab.shape.ca == "localhost":
            archive = _tar(bundles, cure)
        else:
            told = self.lab.hosts[self.lab.shape.ca].exec(["tar", "-C", str(bundles), "-cf", "-", "."], check=False)
            if told.rc != 0:
                raise LabError("There are no bundles on the CA's host.", cure=cure, log=told.stderr)
            archive = told.raw
        clients = {}
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in tar:
                path = Path(member.name)
                if path.name == "client.json" and (file := tar.extractfile(member)) is not None:
                    clients[path.parent.name] = json.loads(file.read())
        if not clients:
            raise LabError("No device has a bundle yet.", cure=cure)
        return archive, clients

    def restart(self) -> None:
        """Start all devices anew; their counters begin at zero.

        :raises LabError: when the player does not start.
        """
        self.host.exec(["systemctl", "restart", UNIT])
        self._await(lambda: self._read(check=False).rc == 0, 20, "The devices did not start")

    def stop(self) -> None:
        """Let all devices say good-bye."""
        self.host.exec(["systemctl", "stop", UNIT])

    def _read(self, *, check: bool = True) -> Result:
        return self.host.exec(["cat", STATUS], check=check)

    def status(self) -> FieldStatus:
        """Return the counters of all devices.

        :raises LabError: when the player is not running.
        """
        told = self._read(check=False)
        if told.rc != 0:
            raise LabError("The devices are not running.", cure="Start them with Field.deploy().", log=self.log())
        entries = json.loads(self.host.read_file(f"{HOME}/plan.json"))["devices"]
        raw = json.loads(told.stdout)
        return FieldStatus(
            datetime.fromisoformat(raw["at"]).astimezone(UTC),
            raw["devices"],
            frozenset(entry["id"] for entry in entries if entry["publish"]),
            frozenset(entry["id"] for entry in entries if entry["heard"]),
        )

    def await_flow(self, deadline_s: float = 60) -> FieldStatus:
        """Wait until every device is connected, has published and has heard what it is meant to.

        :raises LabError: when some are still silent at the deadline; it names them and says why.
        """
        return self.await_status(lambda status: not status.silent, deadline_s)

    def await_status(self, done: Callable[[FieldStatus], bool], deadline_s: float = 60) -> FieldStatus:
        """Wait until the counters satisfy a condition.

        :raises LabError: when they do not in time.
        """
        holder: list[FieldStatus] = []

        def good() -> bool:
            holder[:] = [self.status()]
            return done(holder[0])

        try:
            self._await(good, deadline_s, f"The devices were not where they should be within {deadline_s:.0f} s")
        except LabError as exc:
            reasons = "\n".join(f"{name}: {reason}" for name, reason in holder[0].silent.items()) if holder else ""
            raise LabError(exc.what, cure=exc.cure, log=f"{exc.log}\n{reasons}") from exc
        return holder[0]

    def _await(self, good: Callable[[], bool], deadline_s: float, what: str) -> None:
        deadline = time.monotonic() + deadline_s
        while not good():
            if time.monotonic() > deadline:
                raise LabError(
                    f"{what}.",
                    cure="See `journalctl -u bednet-devices` on the host `devices`.",
                    log=self.log(),
                )
            time.sleep(POLL_S)

    def log(self, lines: int = 20) -> str:
        """Return the end of the player's log."""
        return self.host.exec(
            ["journalctl", "-u", UNIT, "-n", str(lines), "--no-pager", "-o", "cat"], check=False
        ).stdout


def _tar(folder: Path, cure: str) -> bytes:
    if not folder.is_dir():
        raise LabError(f"There are no bundles in {folder}.", cure=cure)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, arcname=".")
    return buffer.getvalue()


def player_zip() -> bytes:
    """Return the player with what it imports as one file that a bare Python runs."""
    buffer = io.BytesIO()
    root = Path(paho.mqtt.__file__).parent.parent
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(player.__file__, "__main__.py")
        archive.writestr("bednet/__init__.py", "")
        archive.write(psk.__file__, "bednet/psk.py")
        archive.write(token_client.__file__, "bednet/client.py")
        for path in sorted(root.rglob("*.py")):
            archive.write(path, str(Path("paho") / path.relative_to(root)))
    return buffer.getvalue()


def plan(devices: Sequence[Mapping[str, Any]], clients: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what each device that has a bundle with all that it needs does.

    A hall's devices use the hall's gateway: the locations, in the order of devices.yml, are dealt out to the gateways.
    Who only listens, and to everything, listens at every gateway. Every other device speaks MQTT 5.

    :param devices: the `devices` of devices.yml.
    :param clients: device id -> its client.json.
    """
    locations = list(dict.fromkeys(str(device["location"]) for device in devices))
    entries = []
    for number, device in enumerate(devices):
        client = clients.get(device["id"])
        # The key of a device that made its own is not here, so nobody but the device can play it.
        if client is None or device.get("enrolment") == "csr":
            continue
        habits = _habits(device, devices)
        way = next(way for way in PORTS if way in client["authentication"])
        bound = way == "token" and client["token"]["method"] != "client_secret_basic"
        port = "mtls_port" if bound else PORTS[way]
        gateways = [{"address": gateway["address"], "port": gateway[port]} for gateway in client["gateways"]]
        everywhere = not habits["publish"] and "#" in habits["subscribe"]
        own = locations.index(str(device["location"])) % len(gateways)
        entries.append(
            {
                "id": device["id"],
                "bundle": f"{HOME}/bundles/{device['id']}",
                "protocol": 5 if number % 2 or way == "token" else 4,
                "authentication": way,
                "gateways": gateways if everywhere else [gateways[own]],
                **habits,
            }
        )
    return entries


def _habits(device: Mapping[str, Any], devices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a device of the example plant publishes and subscribes to, by its roles.

    `heard` says whether somebody in the plant speaks to it without being asked.
    """
    name, location = device["id"], device["location"]
    attributes = device.get("attributes", {})
    line = attributes.get("line")
    publish: list[Habit] = []
    subscribe: list[str] = []
    heard = False
    for role in device["roles"]:
        if role == "sensor":
            quantity, unit, base, swing = QUANTITIES.get(device.get("type", "temperature"), ("value", "1", 50.0, 10.0))
            publish.append(Habit(f"sensors/{name}/{quantity}", 2, quantity, unit, base, swing))
            subscribe.append(f"commands/{name}/#")
        elif role == "meter":
            publish.append(Habit(f"factory/{location}/energy/{name}", 5, "power", "kW", 84.0, 20.0))
        elif role == "plc":
            station = attributes.get("station")
            publish.append(Habit(f"sensors/{name}/level", 2, "level", "%", 60.0, 15.0))
            publish.append(Habit(f"factory/{location}/line-{line}/{station}/state", 5, "load", "%", 70.0, 10.0))
            subscribe += [f"commands/{name}/#", f"factory/{location}/line-{line}/setpoint/#"]
            heard = any(
                "line-controller" in other["roles"] and other.get("attributes", {}).get("line") == line
                for other in devices
            )
        elif role == "line-controller":
            publish.append(Habit(f"factory/{location}/line-{line}/setpoint/speed", 4, "speed", "1/min", 42.0, 2.0))
            publish += [
                Habit(f"commands/{other['id']}/speed", 4, "speed", "1/min", 42.0, 2.0)
                for other in devices
                if "plc" in other["roles"] and other.get("attributes", {}).get("line") == line
            ]
            subscribe += ["sensors/+/#", f"factory/{location}/#"]
            heard = True
        elif role == "hmi":
            publish.append(Habit(f"factory/{location}/alarms/ack", 10, "alarm", "1", 4.0, 3.0))
            subscribe += ["sensors/+/#", f"factory/{location}/#"]
            heard = True
        elif role == "technician":
            publish += [
                Habit(f"commands/{other['id']}/interval", 10, "interval", "s", 2.0, 0.0)
                for other in devices
                if "sensor" in other["roles"] and other["location"] == location
            ]
            subscribe += ["sensors/#", "factory/#", "$SYS/broker/clients/#"]
            heard = True
        elif role == "historian":
            subscribe.append("#")
            heard = True
    return {"publish": [asdict(habit) for habit in publish], "subscribe": subscribe, "heard": heard}
