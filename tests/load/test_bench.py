# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own arithmetic, its generator against a broker's end that we hold, and what its pages say.

The sharpest edges: a ratio that is noise must not be called a difference, what could not be had must be named, and a
partial run must not lose the figures of the other parts.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

from load.bench import __main__ as command
from load.bench import compiling, report, tokens, tuning, wire
from load.bench.brokers import compiled_site, replace_options
from load.bench.measure import PAYLOAD, Pace, half_load
from load.bench.peers import FOLDER, versions
from testbed.common import CHECKOUT

if TYPE_CHECKING:
    from pathlib import Path

MACHINE = {"processor": "a processor", "system": "a system", "date": "2026-01-01", "load": 0.3}


def kind(cost: float, **more: list[float]) -> dict[str, list[float]]:
    """Return the figures of a broker, for three rounds."""
    keys = ("in0_s", "in1_s", "out0_s", "out1_s", "full_cpu_ms", "full_wall_ms", "resumed_cpu_ms", "resumed_wall_ms")
    return {key: [cost, cost * 1.01, cost * 0.99] for key in keys} | {"start_s": [0.01], "memory_mb": [10.0]} | more


@pytest.fixture
def measured() -> dict[str, Any]:
    """Return what a run could have measured: ours costs 1.02 of the baseline, and one peer is missing."""
    changes = {"stall_ms": [2.0], "quiet_ms": [0.2], "revoke_ms": [1.0, 2.0, 90.0]}
    kinds = {"plaintext": kind(0.8), "mTLS": kind(1.0), report.BIG: kind(1.02, **changes), "aedes": kind(5.0)}
    del kinds["aedes"]["resumed_cpu_ms"]
    kinds["aedes"]["resumed_share"] = [0.0]
    return {
        "brokers": {
            "rounds": 3,
            "scale": 1.0,
            "machine": MACHINE,
            "kinds": kinds,
            "versions": {"mTLS": "mosquitto 2.0.21"},
            "missing": {"amqtt": "PyPI's packages could not be had"},
            "failed": {"aedes": "it ended with 1"},
        }
    }


@pytest.fixture
def with_tokens(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the same, and what tokens cost; the peer could not be had."""
    service = {"cpu_ms": [4.0, 4.4], "alone_ms": [5.0, 6.0], "per_s": [200.0, 220.0], "busy_ms": [9.0, 30.0]}
    part = {
        "rounds": 2,
        "scale": 1.0,
        "machine": MACHINE,
        "services": {tokens.OURS: {**service, "memory_mb": [64.0]}},
        "limit": {
            "handshake_ms": [1.2, 1.2],
            "handshake_wall_ms": [1.9, 1.95, 2.95],
            "signature_ms": [0.05, 0.05],
            "verification_ms": [0.04, 0.04],
        },
        "turns": 1,
        "connections_in_turn": 10,
        "connections": {tokens.WITHOUT: [1.0, 1.0], tokens.WITH: [1.05, 1.07], tokens.AGAIN: [1.01, 1.02]},
        "versions": {},
        "token_bytes": 630,
        "refused": "no",
        "missing": {tokens.OIDC: "npm's packages could not be had"},
    }
    return {**measured, "tokens": part}


def test_ratios_are_taken_round_by_round() -> None:
    assert report.ratios([2.0, 3.0], [1.0, 2.0]) == [2.0, 1.5]
    with pytest.raises(ValueError, match="longer"):
        report.ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("ratios", "clear"),
    [
        ([0.95, 0.96, 0.94, 0.95, 0.96, 0.94], True),
        # A handful says nothing.
        ([0.5, 0.5, 0.5, 0.5, 0.5], False),
        # One that goes astray among twelve does not hide what eleven say.
        ([0.9] * 11 + [1.5], True),
        ([0.9] * 8 + [1.1] * 4, False),
        ([1.10, 1.08, 1.12, 1.09, 1.10, 1.11], True),
        # Both sides of 1.
        ([0.90, 1.10, 0.95, 1.04, 0.92, 1.08], False),
        # On one side, but by less than this machine can tell.
        ([1.01, 1.02, 1.015, 1.01, 1.02, 1.01], False),
        ([1.0] * 6, False),
    ],
)
def test_only_what_stands_out_of_the_noise_is_a_difference(ratios: list[float], clear: bool) -> None:
    assert tuning.clear(ratios) is clear


def test_the_interval_of_the_median_goes_by_the_order_of_the_values() -> None:
    # The probability that the median lies outside of the 3rd to the 10th of twelve values is 3.9 %.
    assert report.interval([float(number) for number in range(12)]) == (2.0, 9.0)
    assert report.interval([float(number) for number in range(6)]) == (0.0, 5.0)
    assert report.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert report.interval([1.0]) == (1.0, 1.0)


def test_a_cell_has_the_median_and_half_of_what_lies_between_the_quartiles() -> None:
    assert report.cell([1.0, 2.0, 3.0], "{:.1f}") == "2.0 ±25 %"
    assert report.cell([2.0], "{:.1f}") == "2.0"
    assert report.cell(None, "{:.1f}") == "-"


def test_percentiles_are_of_nearest_rank() -> None:
    values = [float(number) for number in range(1, 101)]
    assert (report.percentile(values, 0.5), report.percentile(values, 0.99), report.percentile(values, 1)) == (
        50,
        99,
        100,
    )


def test_half_load_keeps_half_a_core_busy_and_the_generator_within_what_it_can() -> None:
    assert half_load([10.0, 10.0, 10.0]) == 5000
    assert half_load([0.1]) == 40_000


@pytest.mark.parametrize(("per_s", "each", "interval_s"), [(40_000, 40, 0.001), (1000, 1, 0.001), (100, 1, 0.01)])
def test_a_pace_has_a_burst_each_millisecond_or_as_seldom_as_it_must(per_s: int, each: int, interval_s: float) -> None:
    pace = Pace.of(per_s)
    assert pace == (each, interval_s)
    assert pace.due(0) == 0
    # After a second as many as the pace says.
    assert pace.due(per_s) == pytest.approx(1)


def test_a_goal_that_is_missed_is_said_to_be_missed(measured: dict[str, Any]) -> None:
    held = {goal.what: goal.holds for goal in report.goals(measured)}
    assert held[f"CPU per message, fan-in, QoS 1, {report.BIG}"]
    assert held["from revocation to disconnect, p99, 1,000 clients under load"]
    measured["brokers"]["kinds"][report.BIG]["in1_s"] = [1.06, 1.07, 1.05]
    measured["brokers"]["kinds"][report.BIG]["revoke_ms"] = [1.0, 100.0]
    held = {goal.what: goal.holds for goal in report.goals(measured)}
    assert not held[f"CPU per message, fan-in, QoS 1, {report.BIG}"]
    assert not held["from revocation to disconnect, p99, 1,000 clients under load"]


def test_a_goal_that_the_noise_hides_is_neither_held_nor_missed(measured: dict[str, Any]) -> None:
    what = f"CPU per message, fan-out, QoS 0, {report.BIG}"
    ours = measured["brokers"]["kinds"][report.BIG]
    for values, holds in (([1.2, 1.3, 1.1], False), ([1.2, 1.3, 0.9], None), ([1.0, 1.3, 0.9], True)):
        # What was measured right beside goes before the baseline of the whole round.
        ours |= {"out0_s": values, "base_out0_s": [1.0, 1.0, 1.0]}
        assert {goal.what: goal.holds for goal in report.goals(measured)}[what] is holds
    assert "the noise hides it" not in report.page(measured)


def test_the_page_names_what_could_not_be_measured(measured: dict[str, Any]) -> None:
    page = report.page(measured)
    assert "- **amqtt: not measured.** PyPI's packages could not be had." in page
    assert "| amqtt | not measured |" in page
    assert "- **aedes: not measured to the end.** it ended with 1." in page
    assert re.search(r"\| aedes \|.*\| does not resume \|", page)
    assert "Not measured yet: `python -m load.bench --only compiling`." in page


@pytest.mark.parametrize(("late_ms", "said"), [(0.2, False), (60.0, True)])
def test_a_latency_of_a_late_generator_is_marked(measured: dict[str, Any], late_ms: float, said: bool) -> None:
    paced = {"paced_p50_ms": [1.0], "paced_p99_ms": [2.0], "paced_per_s": [40_000.0], "paced_lost": [0.0]}
    measured["brokers"]["kinds"]["mTLS"] |= {**paced, "paced_late_p99_ms": [late_ms]}
    assert ("1.0 / 2.0 (the generator was late)" in report.page(measured)) is said


def test_a_quick_look_does_not_pass_for_more(measured: dict[str, Any]) -> None:
    assert "quick look" not in report.page(measured)
    measured["brokers"]["scale"] = 0.1
    assert "a quick look: 0.1 of the usual amount" in report.page(measured)


def test_figures_of_a_busy_machine_are_marked(with_tokens: dict[str, Any]) -> None:
    assert "kept the machine busy" not in report.page(with_tokens)
    with_tokens["tokens"]["machine"] = {**MACHINE, "load": 9.0}
    page = report.page(with_tokens)
    assert page.count("kept the machine busy (load average 9.0") == 1
    assert page.index("## Tokens") < page.index("kept the machine busy")


def test_all_rows_of_a_table_are_as_wide_as_its_head(measured: dict[str, Any]) -> None:
    width = None
    for line in report.page(measured).splitlines():
        width = (width or line.count("|")) if line.startswith("|") else None
        assert width is None or line.count("|") == width, line


def test_pictures_are_svg_and_show_each_broker(measured: dict[str, Any]) -> None:
    pictures = report.pictures(measured)
    assert set(pictures) == {"messages", "connections", "stalls"}
    assert all(name in pictures["messages"] for name in measured["brokers"]["kinds"])


def test_a_partial_run_keeps_the_figures_of_the_other_parts(
    measured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.with_suffix(".json").write_text(json.dumps({"format": command.FORMAT, **measured}))
    step = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_mb": 1.0}
    figures = {
        "compile": step,
        "one device": {"median_ms": 1.0, "worst_ms": 2.0},
        "sizes": {"compiled_mb": 1.0, "store_mb": 1.0},
    }
    monkeypatch.setattr(compiling, "measure", lambda *_: figures)
    command.bench("trixie", page, ["compiling"], [])
    kept = json.loads(page.with_suffix(".json").read_text())
    assert kept["brokers"] == measured["brokers"]
    assert kept["compiling"]["figures"] == figures
    assert "| mTLS |" in page.read_text()
    assert "compiling 1,000,000 devices" in page.read_text()


def test_figures_of_another_form_are_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"rounds": 3, "kinds": {}, "machine": {}, "compiling": {"compile": {}}}))
    assert command.load(path) == {}
    assert command.load(tmp_path / "none.json") == {}


def test_tokens_have_their_table_and_their_goals(with_tokens: dict[str, Any]) -> None:
    page = report.page(with_tokens)
    # The limit: a handshake of 1.2 ms and a signature of 0.05 ms.
    assert "| the limit | 1.25 ±0 % | 2.0 / 3.0 | 800 | - | - |" in page
    # The connection of 1.0 ms and the check of a signature, 0.04 ms.
    assert "| the limit for a new token | 1.04 ±0 % | 1.04 (1.04 to 1.04) |" in page
    assert "**oidc-provider: not measured.** npm's packages could not be had." in page
    held = {goal.what: goal.holds for goal in report.goals(with_tokens)}
    assert held[f"CPU per connection with {tokens.WITH}"]
    assert held[f"CPU per connection with {tokens.AGAIN}"]
    assert held["memory of the token service"]
    with_tokens["tokens"]["connections"][tokens.WITH] = [1.11, 1.12]
    with_tokens["tokens"]["services"][tokens.OURS]["memory_mb"] = [80.0]
    held = {goal.what: goal.holds for goal in report.goals(with_tokens)}
    assert not held[f"CPU per connection with {tokens.WITH}"]
    assert held[f"CPU per connection with {tokens.AGAIN}"]
    assert not held["memory of the token service"]


def test_the_front_is_the_roles_own(tmp_path: Path) -> None:
    text = tokens.nginx_configuration(tmp_path, tmp_path / "tls", tmp_path / "app.sock", 18443)
    assert "listen 127.0.0.1:18443 ssl;" in text
    assert f"proxy_pass http://unix:{tmp_path}/app.sock:;" in text
    # Nothing of the host's own.
    assert "/run/bednet" not in text
    assert "/etc/bednet" not in text


def test_the_site_with_tokens_has_one_issuer_and_one_device_that_shows_them() -> None:
    lines = [json.loads(line) for line in tokens.site_with_tokens()]
    header = lines[0]
    assert header["issuers"] == 1
    assert len(lines) == 1 + header["profiles"] + header["issuers"] + header["devices"]
    assert "issuer" in lines[1 + header["profiles"]]
    assert [line["device"] for line in lines if line.get("token")] == [tokens.DEVICE]


def test_a_service_that_refuses_is_no_service_that_is_fast() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"HTTP/1.1 429 Too Many Requests\r\n\r\n{}")
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(wire.WireError, match="429"):
            tokens._exchange(ours, b"")


def test_an_option_that_is_named_replaces_what_there_is() -> None:
    lines = ["log_type error", "log_type warning", "persistence true", "sys_interval 10"]
    assert replace_options(lines, ["log_type all", "sys_interval 0", "memory_limit 1"]) == [
        "persistence true",
        "log_type all",
        "sys_interval 0",
        "memory_limit 1",
    ]


def test_tuning_begins_with_what_the_role_writes() -> None:
    template = (CHECKOUT / "roles/mosquitto/templates/mosquitto.conf.j2").read_text(encoding="utf-8")
    defaults = (CHECKOUT / "roles/mosquitto/defaults/main.yml").read_text(encoding="utf-8")
    values = dict(re.findall(r"^(mosquitto_\w+): (\S+)$", defaults, re.MULTILINE))
    for line in tuning.ROLE_LINES:
        option, value = line.split()
        written = re.search(rf"^{option} (?:{re.escape(value)}|{{{{ (\w+)(?: \| int)? }}}})$", template, re.MULTILINE)
        assert written, f"the role does not write {option}"
        assert written[1] is None or values[written[1]] == value, line


def test_each_setting_changes_something() -> None:
    base = tuning.Setting(tuning.BASE, "").variant
    for setting in tuning.SETTINGS:
        assert setting.variant != base or setting.tls12, setting.name
    assert len({setting.name for setting in tuning.SETTINGS}) == len(tuning.SETTINGS)


def test_what_is_pinned_is_pinned_to_one_version_and_names_no_registry() -> None:
    assert set(versions()) == {"aedes", "oidc-provider", "amqtt"}
    for name in ("package.json", "package-lock.json", "requirements.lock"):
        text = (FOLDER / name).read_text(encoding="utf-8")
        assert '"resolved"' not in text
        assert "--index-url" not in text


def test_the_compiled_site_has_as_many_lines_as_it_says() -> None:
    lines = [json.loads(line) for line in compiled_site(5)]
    header, ids = lines[0], [line["device"] for line in lines if "device" in line]
    assert len(lines) == 1 + header["profiles"] + header["devices"]
    assert ids == sorted(ids)


def test_the_generator_counts_messages_however_they_are_cut() -> None:
    ours, theirs = socket.socketpair()
    client = wire.Client(wire.Endpoint(0), "d", None)
    client.socket = ours
    stream = b"".join(wire.publish("a/b", PAYLOAD, 1, number + 1) for number in range(50))

    def send() -> None:
        for start in range(0, len(stream), 7):
            theirs.sendall(stream[start : start + 7])

    thread = threading.Thread(target=send)
    thread.start()
    with ours, theirs:
        assert client.count(50, acknowledge=True) == 50
        thread.join()
        answer = b""
        while len(answer) < 200:
            answer += theirs.recv(4096)
        assert answer == b"".join(b"\x40\x02" + number.to_bytes(2, "big") for number in range(1, 51))
        theirs.shutdown(socket.SHUT_RDWR)
        with pytest.raises(wire.WireError, match="closed the connection after 0 messages"):
            client.count(1)
