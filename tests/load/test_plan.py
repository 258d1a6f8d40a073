# SPDX-License-Identifier: Apache-2.0
"""A plan asks for nothing that the policy does not grant, and knows exactly who should hear what."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from bednet import topics
from bednet.policy import Access
from bednet.site import Site, decide, load_site
from load.plan import (
    ANSWERS,
    COMMANDS,
    FLOOD,
    SLOW,
    TRESPASS,
    Gateway,
    Plan,
    PlanError,
    read_plan,
)
from load.planning import choose, make_plan, playable, reaches
from load.profiles import PROFILES, Profile

GATEWAY = Gateway("gateway-1", "127.0.0.1", "gateway-1.plant.example", 8883, 8884, 8885)


def everyone(site: Site) -> dict[str, Path]:
    return {name: Path("/nowhere") / name for name, device in site.devices.items() if playable(device)}


def planned(site: Site, name: str, **changes: Any) -> Plan:
    return make_plan(site, GATEWAY, name, replace(PROFILES[name], **changes), everyone(site))


@pytest.mark.parametrize("name", PROFILES)
def test_only_what_the_policy_grants_is_asked_for(example: Site, name: str) -> None:
    plan = planned(example, name)
    for player in plan.players:
        for heard, _ in player.subscribe:
            assert decide(example, player.id, Access.SUBSCRIBE, heard).allowed
        for stream in player.streams:
            assert decide(example, player.id, Access.PUBLISH, stream.topic).allowed is (stream.kind != TRESPASS)


@pytest.mark.parametrize("name", PROFILES)
def test_the_audience_is_everybody_who_subscribed_and_may_hear(example: Site, name: str) -> None:
    plan = planned(example, name)
    assert any(stream.audience for stream in plan.streams)
    for stream in plan.streams:
        hearers = [
            player
            for player in plan.players
            if any(topics.matches(heard, stream.topic) for heard, _ in player.subscribe)
        ]
        count = sum(number for _, _, number in stream.audience)
        assert count == (0 if stream.kind == TRESPASS else len(hearers)), stream.topic


def test_a_plan_survives_its_journey(example: Site, tmp_path: Path) -> None:
    plan = planned(example, "mixed")
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 0}', '{"version": 1, "players": [{}]}'])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match="plan"):
        read_plan(tmp_path / "plan.json")


def test_commands_go_to_those_who_hear_them_and_answers_come_back(example: Site) -> None:
    plan = planned(example, "commands")
    streams = {stream.number: stream for stream in plan.streams}
    owners = {stream.number: player for player in plan.players for stream in player.streams}
    answered = [stream for stream in plan.streams if stream.kind == ANSWERS]
    assert len(answered) >= 10
    for answer in answered:
        (number,) = answer.answers
        command = streams[number]
        assert command.kind == COMMANDS
        target, commander = owners[answer.number], owners[number]
        assert target.id in command.topic.split("/")
        assert any(topics.matches(heard, command.topic) for heard, _ in target.subscribe)
        assert any(topics.matches(heard, answer.topic) for heard, _ in commander.subscribe)
    assert sum(stream.kind == COMMANDS for stream in plan.streams) == len(answered)


def test_one_device_floods_and_says_nothing_else(example: Site) -> None:
    plan = planned(example, "noisy-neighbour", flood_per_s=500)
    (noisy,) = [player for player in plan.players if FLOOD in {stream.kind for stream in player.streams}]
    (stream,) = noisy.streams
    assert (stream.qos, stream.every_s) == (0, 0.002)


def test_some_readers_are_slow_and_not_all(example: Site) -> None:
    plan = planned(example, "slow-readers")
    slow = {player.id for player in plan.players if player.slow_s}
    heard = {(whose == SLOW) for stream in plan.streams for whose, _, _ in stream.audience}
    assert slow
    assert heard == {True, False}


def test_a_device_has_a_pace_of_its_own(example: Site) -> None:
    device = replace(example.devices["temp-101"], attributes={"publish_every_s": 7})
    site = replace(example, devices={**example.devices, "temp-101": device})
    pace = {player.id: {stream.every_s for stream in player.streams} for player in planned(site, "steady").players}
    assert pace["temp-101"] == {7.0}
    assert pace["temp-102"] == {1.0}


def test_a_device_has_a_qos_and_a_size_of_its_own(example: Site) -> None:
    device = replace(example.devices["temp-101"], attributes={"publish_qos": 0, "publish_bytes": 2000})
    site = replace(example, devices={**example.devices, "temp-101": device})
    streams = {player.id: player.streams for player in planned(site, "steady").players}
    assert {(stream.qos, stream.payload_bytes) for stream in streams["temp-101"]} == {(0, 2000)}
    assert {(stream.qos, stream.payload_bytes) for stream in streams["temp-102"]} == {(1, 128)}
    assert {qos for stream in streams["temp-101"] for _, qos, _ in stream.audience} == {0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("publish_every_s", value) for value in (0, -1, "often", True)),
        *(("publish_qos", value) for value in (3, 0.5, "1", True)),
        *(("publish_bytes", value) for value in (31, 100.5, "big")),
    ],
)
def test_an_attribute_that_makes_no_sense_is_refused(example: Site, name: str, value: Any) -> None:
    device = replace(example.devices["temp-101"], attributes={name: value})
    site = replace(example, devices={**example.devices, "temp-101": device})
    with pytest.raises(PlanError, match=rf"devices\.yml:\d+: `{name}` of 'temp-101'"):
        planned(site, "steady")


def test_devices_with_passwords_go_where_websockets_are_spoken(example: Site) -> None:
    gateway = replace(GATEWAY, websockets_port=9001, websockets=True)
    assert gateway.port("password") == 9001
    assert gateway.port("certificate") == 8883
    assert not reaches(example.devices["energy-1"], replace(gateway, websockets_port=None))


def test_tokens_that_are_bound_to_nothing_go_where_no_certificate_is_asked_for(example: Site) -> None:
    bundles = {name: Path("/x") for name in ("edge-1", "edge-2", "edge-3", "historian")}
    plan = make_plan(example, GATEWAY, "steady", PROFILES["steady"], bundles)
    ports = {player.id: GATEWAY.port(player.authentication, bound=player.bound) for player in plan.players}
    assert ports == {"edge-1": 8883, "edge-2": 8884, "edge-3": 8883, "historian": 8883}
    alone = replace(GATEWAY, password_port=None)
    assert not reaches(example.devices["edge-2"], alone)
    # Its copy may get tokens in another way: bound ones, which go where certificates go.
    assert reaches(example.devices["edge-2"], alone, method="private_key_jwt")
    assert "edge-2" not in choose(example, 100, alone, way="token")
    assert "edge-2" in choose(example, 100, alone, way="token", method="tls_client_auth")
    with pytest.raises(PlanError, match="`edge-2` comes in by token, and gateway-1 has no listener"):
        make_plan(example, alone, "steady", PROFILES["steady"], bundles)


def test_a_plant_grows_by_those_who_tell(example: Site) -> None:
    chosen = choose(example, 200)
    assert len(chosen) == 200
    counts = {name: chosen.count(name) for name in example.devices}
    assert counts["vib-212"] == 0  # revoked
    assert counts["historian"] == counts["line-1"] == counts["hmi-2"] == 1
    assert min(counts["temp-101"], counts["plc-1-filler"], counts["energy-1"]) >= 8


@pytest.mark.parametrize("count", [2, 4, 10, 23, 24])
def test_few_devices_are_those_who_tell_and_somebody_who_listens(example: Site, count: int) -> None:
    chosen = choose(example, count)
    assert len(chosen) == len(set(chosen)) == min(count, 23) or len(chosen) == count
    plan = make_plan(example, GATEWAY, "steady", PROFILES["steady"], {name: Path("/x") for name in set(chosen)})
    assert plan.delivered_per_s > 0


def site_of(tmp_path: Path, roles: dict[str, Any], devices: list[dict[str, Any]]) -> Site:
    (tmp_path / "policy.yml").write_text(yaml.safe_dump({"version": 1, "roles": roles}))
    (tmp_path / "devices.yml").write_text(yaml.safe_dump({"version": 1, "devices": devices}))
    return load_site(tmp_path)


MUTE = {"mute": {"allow": {"subscribe": ["x/#"]}}}
TELLER = {"teller": {"allow": {"publish": ["t/{device.id}/#"]}}}


@pytest.mark.parametrize(
    ("roles", "profile", "said"),
    [
        (MUTE, Profile("", telemetry=True), "Nobody has anything to say"),
        (TELLER, Profile(""), "Nobody hears"),
        (TELLER, Profile("", telemetry=False, command_every_s=1), "may command another"),
        (TELLER, Profile("", slow_s=1), "For slow readers there must be two"),
        (MUTE, Profile("", flood_per_s=10), "no device that could flood"),
    ],
)
def test_a_profile_that_a_site_cannot_play_is_refused(
    tmp_path: Path, roles: dict[str, Any], profile: Profile, said: str
) -> None:
    role = next(iter(roles))
    site = site_of(tmp_path, roles, [{"id": name, "location": "here", "roles": [role]} for name in ("a1", "b2")])
    with pytest.raises(PlanError, match=said):
        make_plan(site, GATEWAY, "some", profile, everyone(site))


def test_password_devices_need_a_listener(example: Site) -> None:
    with pytest.raises(PlanError, match="comes in by password, and gateway-1 has no listener"):
        make_plan(example, replace(GATEWAY, password_port=None), "steady", PROFILES["steady"], everyone(example))


def test_devices_come_in_by_the_way_that_is_wanted_where_they_can(example: Site) -> None:
    gateway = replace(GATEWAY, psk_port=8885)
    both = replace(example.devices["tablet-jo"], authentication=("psk", "password"))
    site = replace(example, devices={**example.devices, "tablet-jo": both})

    def ways(way: str | None) -> dict[str, str]:
        plan = make_plan(site, gateway, "steady", PROFILES["steady"], everyone(site), way=way)
        return {player.id: player.authentication for player in plan.players}

    assert {ways(way)["tablet-jo"] for way in (None, "certificate", "password")} == {"password"}
    assert ways("psk")["tablet-jo"] == "psk"
    assert ways("psk")["temp-101"] == "certificate"
    with pytest.raises(PlanError, match="comes in by psk, and gateway-1 has no listener for that"):
        make_plan(site, replace(GATEWAY, psk_port=None), "steady", PROFILES["steady"], everyone(site), way="psk")


def test_nobody_is_chosen_who_could_not_come_in(example: Site) -> None:
    """A copy of a device would be made for nothing where the gateway has no listener for it."""
    assert "level-201" in choose(example, 100, GATEWAY)
    without = replace(GATEWAY, psk_port=None, password_port=None)
    chosen = choose(example, 100, without)
    assert {"level-201", "energy-1"}.isdisjoint(chosen)
    # Where all come in another way, its own is no matter.
    assert "level-201" in choose(example, 100, without, way="certificate")
    everybody = {name: Path("/x") for name in dict.fromkeys(chosen)}
    assert make_plan(example, without, "steady", PROFILES["steady"], everybody).devices > 10


def test_devices_that_cannot_be_played_are_refused_and_never_chosen(example: Site) -> None:
    device = replace(example.devices["temp-101"], authentication=("carrier-pigeon",))
    site = replace(example, devices={**example.devices, "temp-101": device})
    assert "temp-101" not in choose(site, 100)
    with pytest.raises(PlanError, match="by none of certificate, password, psk, token"):
        make_plan(site, GATEWAY, "steady", PROFILES["steady"], {"temp-101": Path("/x"), "historian": Path("/x")})


def test_a_site_in_which_nobody_tells_anything_is_not_multiplied(tmp_path: Path) -> None:
    site = site_of(tmp_path, MUTE, [{"id": "a1", "location": "here", "roles": ["mute"]}])
    with pytest.raises(PlanError, match="No device of this site may publish"):
        choose(site, 10)


def test_messages_do_not_bunch(example: Site) -> None:
    plan = planned(example, "steady")
    offsets = sorted(stream.offset_s for stream in plan.streams)
    gaps = [after - before for before, after in pairwise(offsets)]
    assert max(gaps) < 4 / len(offsets)
