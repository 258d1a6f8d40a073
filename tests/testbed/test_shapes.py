# SPDX-License-Identifier: Apache-2.0
"""What the lab is made of, without an engine: shapes, addresses, mirrors, inventories, plans and counters."""

from __future__ import annotations

import io
import ipaddress
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from testbed import common, field, image, things
from testbed.common import CHECKOUT, LabError
from testbed.device import Device, Habit, Ledger, reading
from testbed.lab import Shape, candidate_subnets, check_name, reshape, used_networks, vars_folder

PLANT = CHECKOUT / "inventories/example-plant"

ROUTES = """\
Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
eth0	00000000	0100A8C0	0003	0	0	0	00000000	0	0	0
eth0	0000A8C0	00000000	0001	0	0	0	00FFFFFF	0	0	0
tun0	0000400A	00000000	0001	0	0	0	0000FCFF	0	0	0
"""


def test_networks_that_the_machine_needs_are_known() -> None:
    used = used_networks(ROUTES, "search x\nnameserver 10.255.255.53\nnameserver fe80::1%eth0\n")
    assert [str(network) for network in used] == ["192.168.0.0/24", "10.64.0.0/14", "10.255.255.53/32"]


def test_candidates_are_private_differ_and_do_not_change() -> None:
    networks = list(candidate_subnets("demo-abc"))
    assert networks == list(candidate_subnets("demo-abc"))
    assert networks != list(candidate_subnets("test-abc"))
    assert len(set(networks)) > 50
    inside = ipaddress.IPv4Network("10.64.0.0/10"), ipaddress.IPv4Network("10.128.0.0/10")
    assert all(any(network.subnet_of(part) for part in inside) for network in networks)


@pytest.mark.parametrize("name", ["", "Demo", "a_b", "a/b", "..", "x" * 25, "dé"])
def test_a_name_that_is_no_good_for_a_container_is_refused(name: str) -> None:
    with pytest.raises(LabError, match="is no name for a lab"):
        check_name(name)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"suite": "potato"}, "There is no suite `potato`"),
        ({"gateways": 0}, "1 to 100 gateways, not 0"),
        ({"gateways": 101}, "1 to 100 gateways, not 101"),
        ({"ca": "gateway-3"}, "The CA cannot live on `gateway-3`"),
    ],
)
def test_a_lab_that_cannot_be_built_is_refused(shape: dict[str, Any], reason: str) -> None:
    with pytest.raises(LabError, match=reason):
        Shape(**shape)


def test_every_host_has_an_address_of_its_own() -> None:
    numbers = list(Shape(gateways=100).hosts.values())
    assert len(set(numbers)) == len(numbers) == 103
    assert all(1 < number < 255 for number in numbers)


def test_reshaping_keeps_the_variables_of_hosts_that_stay() -> None:
    old = {"ca": {"hosts": {"authority": None}}, "gateways": {"hosts": {"gateway-1": {"x": 1}, "gateway-2": None}}}
    shaped = reshape(old, Shape(gateways=3, ca="gateway-2"))
    assert shaped["gateways"]["hosts"] == {"gateway-1": {"x": 1}, "gateway-2": None, "gateway-3": None}
    assert shaped["ca"]["hosts"] == {"gateway-2": None}
    assert reshape(old, Shape(gateways=1, ca="localhost"))["ca"]["hosts"]["localhost"]["ansible_connection"] == "local"
    assert list(Shape(ca="localhost").site_hosts) == ["gateway-1", "gateway-2"]


def test_a_file_of_variables_becomes_part_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "all.yml").write_text("x: 1\n")
    folder = vars_folder(tmp_path, "all")
    assert (folder / "main.yml").read_text() == "x: 1\n"
    assert not (tmp_path / "all.yml").exists()


def test_ssh_sockets_move_to_a_short_path_where_the_checkouts_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(things, "STATE", Path("/home/me/bednet/.bednet"))
    assert things.control_dir("demo") == Path("/home/me/bednet/.bednet/labs/demo/ssh")
    monkeypatch.setattr(things, "STATE", Path("/home/me/" + "deep/" * 12 + ".bednet"))
    short = things.control_dir("demo")
    assert len(str(short)) <= things.CONTROL_DIR_MAX
    assert things.run_id("demo") in short.name


def test_the_machines_debian_mirror_is_used() -> None:
    listing = (
        "Somebody|Tools|https://tools.example/apt/\n"
        "Debian|Debian|file:/media/disk/\n"
        "Debian|Debian|http://mirror.example/debian/\n"
        "Debian|Debian-Security|http://mirror.example/debian-security/\n"
        "Debian|Debian|http://other.example/debian/\n"
    )
    mirror = image.parse_indextargets(listing)
    assert mirror == image.Mirror("http://mirror.example/debian", "http://mirror.example/debian-security")
    assert mirror.sources("trixie")[0] == "deb http://mirror.example/debian trixie main"
    assert len(mirror.sources("trixie")) == 3


def test_without_a_debian_mirror_the_default_is_used() -> None:
    assert image.parse_indextargets("Ubuntu|Ubuntu|http://mirror.example/ubuntu/\n").sources("trixie") == []


def test_an_image_is_named_by_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = image.Mirror("http://mirror.example/debian")
    before = image.names_of("trixie", mirror)
    assert before == image.names_of("trixie", mirror)
    assert before.host != image.names_of("bookworm", mirror).host
    assert before.host != image.names_of("trixie", image.Mirror()).host
    monkeypatch.setitem(image.LAYERS, "field", image.Layer("host", ("one-more",)))
    after = image.names_of("trixie", mirror)
    assert (before.host == after.host, before.field == after.field) == (True, False)
    monkeypatch.setattr(image, "CUSTOMIZE", "true\n")
    assert image.names_of("trixie", mirror).host != before.host


def test_an_unknown_suite_is_refused() -> None:
    with pytest.raises(LabError, match="no image of `potato`"):
        image.ensure(("potato",))


def test_a_failing_command_shows_the_end_of_its_log() -> None:
    script = "for i in $(seq 100); do echo line $i; done; exit 4"
    with pytest.raises(LabError, match=r"Trying failed: sh exited with 4(?s:.*)line 100\nWhat to do: wait") as caught:
        common.run(["sh", "-c", script], what="Trying", cure="wait")
    assert "line 75\n" not in str(caught.value)
    with pytest.raises(LabError, match="no-such-command is not there"):
        common.run(["no-such-command"], what="Trying", cure="wait")


# The devices


def clients(*without: str) -> dict[str, dict[str, Any]]:
    ports = {"mtls_port": 8883, "password_port": 8884, "psk_port": 8885}
    gateways = [{"name": f"g{n}", "address": f"10.0.0.{n}", **ports} for n in (1, 2)]
    return {
        device["id"]: {
            "authentication": device.get("authentication", ["certificate"]),
            "token": {"method": device.get("token_authentication", "tls_client_auth")},
            "gateways": gateways,
        }
        for device in plant()
        if device["id"] not in without
    }


def plant() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = yaml.safe_load((PLANT / "devices.yml").read_text())["devices"]
    return devices


def test_only_devices_with_a_bundle_and_its_key_are_played() -> None:
    entries = {entry["id"]: entry for entry in field.plan(plant(), clients("temp-102", "vib-212"))}
    # vib-113 made its own key, which nobody else has.
    assert set(entries) == {device["id"] for device in plant()} - {"temp-102", "vib-212", "vib-113"}


def test_both_protocols_ways_and_gateways_are_used() -> None:
    entries = {entry["id"]: entry for entry in field.plan(plant(), clients())}
    # Tokens are renewed in MQTT 5 only; the others take turns.
    others = [entry["protocol"] for entry in entries.values() if entry["authentication"] != "token"]
    assert {entry["protocol"] for entry in entries.values() if entry["authentication"] == "token"} == {5}
    assert abs(others.count(5) - len(others) / 2) <= 2
    assert entries["temp-101"]["gateways"] == [{"address": "10.0.0.1", "port": 8883}]
    assert entries["temp-201"]["gateways"] == [{"address": "10.0.0.2", "port": 8883}]
    assert entries["energy-1"]["gateways"] == [{"address": "10.0.0.1", "port": 8884}]
    # Who reads everything is at every gateway.
    assert len(entries["historian"]["gateways"]) == 2
    assert not entries["historian"]["publish"]


def test_every_device_of_the_example_has_a_habit() -> None:
    for entry in field.plan(plant(), clients()):
        assert entry["publish"] or entry["subscribe"], entry["id"]


def test_a_ledger_tells_lost_late_and_repeated_messages_apart() -> None:
    ledger = Ledger()
    for number in (5, 6, 9, 6, 7):
        ledger.hear(number)
    assert (ledger.count, ledger.missing, ledger.duplicates) == (4, 1, 1)
    ledger.hear(8)
    assert ledger.missing == 0
    # Heard from the beginning of a player that was started anew: nothing is lost between two lives.
    assert Ledger().missing == 0


def test_readings_stay_within_their_swing() -> None:
    habit = Habit("sensors/x/temperature", 2, "temperature", "Cel", 20.0, 3.0)
    values = [reading(habit, float(second), second) for second in range(1000)]
    assert 16.5 < min(values) < 18
    assert 22 < max(values) < 23.5


@pytest.mark.parametrize(
    ("payload", "pace"),
    [
        (b"1", 1.0),
        (b'{"interval": 5}', 5.0),
        (b"0", 0.2),
        (b"1e9", 60.0),
        (b"soon", None),
        (b"{}", None),
        (b"[1]", None),
    ],
)
def test_a_device_obeys_an_interval_and_nothing_else(payload: bytes, pace: float | None) -> None:
    device = Device({"id": "x", "publish": [], "subscribe": [], "gateways": []})
    device.obey(payload)
    assert device.pace_s == pace


def test_the_player_is_one_file_with_all_that_it_needs() -> None:
    with zipfile.ZipFile(io.BytesIO(field.player_zip())) as archive:
        names = archive.namelist()
    assert {"__main__.py", "paho/__init__.py", "paho/mqtt/client.py"} <= set(names)
    assert len(names) == len(set(names))
