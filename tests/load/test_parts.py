# SPDX-License-Identifier: Apache-2.0
"""The parts around a run: identities of its own, the watched broker, the report, the search, the command line."""

from __future__ import annotations

import html.parser
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from bednet.commands import checked_site
from bednet.policy import Access
from bednet.site import Site, decide, load_site
from load import identities, lab, observe, search
from load import report as reports
from load.__main__ import chosen, main
from load.describe import Described
from load.plan import Gateway, PlanError
from load.planning import make_plan
from load.profiles import PROFILES, Profile
from load.report import Report, ReportError
from load.slo import Threshold, Verdict, judge
from testbed.common import LabError
from testbed.lab import Lab
from tests.load.conftest import EXAMPLE
from tests.load.test_slo import KEPT, good, watched

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
GATEWAY = Gateway("gateway-1", "127.0.0.1", "gateway-1.plant.example", 8883, 8884, 8885)


# Identities


@pytest.fixture
def made(tmp_path: Path) -> list[str]:
    """A site with four load devices, copies of a sensor, a PLC, a meter and a reader."""
    templates = ["temp-101", "plc-1-filler", "energy-1", "historian"]
    return identities.make_site(EXAMPLE, tmp_path / "site", "abc123", templates, now=NOW, until=False)


def test_load_devices_live_in_a_branch_of_their_own(made: list[str], tmp_path: Path) -> None:
    site = checked_site(tmp_path / "site", "P-256")
    sensor, plc, _, historian, watcher = made
    assert decide(site, watcher, Access.SUBSCRIBE, "$SYS/#").allowed
    assert decide(site, sensor, Access.PUBLISH, f"load/sensors/{sensor}/value").allowed
    assert decide(site, plc, Access.SUBSCRIBE, "load/factory/hall-1/line-1/setpoint/#").allowed
    assert decide(site, historian, Access.SUBSCRIBE, "load/#").allowed
    for name in made:
        for topic in (f"sensors/{name}/value", "sensors/temp-101/value", "commands/temp-101/interval"):
            assert not decide(site, name, Access.PUBLISH, topic).allowed
        for topic in ("#", "sensors/#", f"commands/{name}/#", "factory/#"):
            assert not decide(site, name, Access.SUBSCRIBE, topic).allowed
    # A deny goes along.
    assert not decide(site, plc, Access.PUBLISH, f"load/sensors/{plc}/safety/stop").allowed


def test_the_sites_own_devices_keep_their_rights(made: list[str], tmp_path: Path, example: Site) -> None:
    site = checked_site(tmp_path / "site", "P-256")
    for name in example.devices:
        before = [(g.rule.effect, g.rule.access, g.topic_filter) for g in example.grants[name]]
        after = [(g.rule.effect, g.rule.access, g.topic_filter) for g in site.grants[name]]
        assert after == before
    assert set(site.devices) - set(example.devices) == set(made)


def test_load_devices_come_in_as_they_are_told(tmp_path: Path) -> None:
    templates = ["temp-101", "energy-1"]
    *names, watcher = identities.make_site(
        EXAMPLE, tmp_path / "site", "abc123", templates, now=NOW, until=True, way="psk"
    )
    site = load_site(tmp_path / "site")
    assert {site.devices[name].authentication for name in names} == {("psk",)}
    assert {site.devices[name].enrolment for name in names} == {"bundle"}
    assert site.devices[watcher].authentication == ("certificate",)


@pytest.mark.parametrize(
    ("method", "methods"),
    [
        (None, ["tls_client_auth", "client_secret_basic", "private_key_jwt", "tls_client_auth"]),
        ("private_key_jwt", ["private_key_jwt"] * 4),
        ("client_secret_basic", ["client_secret_basic"] * 4),
    ],
)
def test_load_devices_get_tokens_as_their_models_do_or_as_they_are_told(
    tmp_path: Path, method: str | None, methods: list[str]
) -> None:
    templates = ["edge-1", "edge-2", "edge-3", "temp-101"]
    *names, _ = identities.make_site(
        EXAMPLE, tmp_path / "site", "abc123", templates, now=NOW, until=True, way="token", method=method
    )
    made = [load_site(tmp_path / "site").devices[name] for name in names]
    assert [device.token_authentication for device in made] == methods
    # Who proves itself with a key has made it here; a secret is made by the CA.
    assert [device.enrolment for device in made] == [
        "bundle" if method == "client_secret_basic" else "csr" for method in methods
    ]


def test_load_devices_come_in_as_their_models_do(made: list[str], tmp_path: Path) -> None:
    site = checked_site(tmp_path / "site", "P-256")
    assert [site.devices[name].authentication for name in made] == [
        ("certificate",),
        ("certificate",),
        ("password",),
        ("certificate",),
        ("certificate",),
    ]
    assert {site.devices[name].enrolment for name in made if "certificate" in site.devices[name].authentication} == {
        "csr"
    }


def test_access_ends_within_a_day_where_that_can_be_said(tmp_path: Path) -> None:
    identities.make_site(EXAMPLE, tmp_path / "site", "abc123", ["temp-101"], now=NOW, until=True)
    site = load_site(tmp_path / "site")
    ends = {device.until for device in site.devices.values() if identities.TAG in device.tags}
    assert ends == {datetime(2026, 3, 2, 12, tzinfo=UTC)}


def test_rules_by_attributes_are_moved_too(tmp_path: Path) -> None:
    rule = {
        "name": "floor",
        "when": "device.location == 'hall-1' || device.location == 'hall-2'",
        "allow": {"publish": ["floor/{device.id}"]},
    }
    source = tmp_path / "source"
    source.mkdir()
    policy = yaml.safe_load((EXAMPLE / "policy.yml").read_text())
    (source / "policy.yml").write_text(yaml.safe_dump({**policy, "rules": [*policy.get("rules", []), rule]}))
    (source / "devices.yml").write_text((EXAMPLE / "devices.yml").read_text())
    name, _ = identities.make_site(source, tmp_path / "site", "abc123", ["temp-101"], now=NOW, until=False)
    site = checked_site(tmp_path / "site", "P-256")
    assert decide(site, name, Access.PUBLISH, f"load/floor/{name}").allowed
    assert not decide(site, name, Access.PUBLISH, f"floor/{name}").allowed
    assert decide(site, "temp-101", Access.PUBLISH, "floor/temp-101").allowed
    assert not decide(site, "temp-101", Access.PUBLISH, "load/floor/temp-101").allowed


@pytest.mark.parametrize(
    ("rule", "reaches"),
    [("#", True), ("+/+/#", True), ("+/sensors/+/+", True), ("sensors/#", False), ("$SYS/#", False)],
)
def test_rules_that_begin_with_a_wildcard_reach_the_load_and_no_others(
    tmp_path: Path, rule: str, reaches: bool
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    policy = yaml.safe_load((EXAMPLE / "policy.yml").read_text())
    policy["roles"]["listener"] = {"allow": {"subscribe": [rule]}}
    (source / "policy.yml").write_text(yaml.safe_dump(policy))
    (source / "devices.yml").write_text((EXAMPLE / "devices.yml").read_text())
    (source / "devices.jsonl").write_text('{"id": "ear", "location": "hall-1", "roles": ["listener"]}')
    name, _ = identities.make_site(source, tmp_path / "site", "abc123", ["temp-101"], now=NOW, until=False)
    site = checked_site(tmp_path / "site", "P-256")
    assert decide(site, "ear", Access.SUBSCRIBE, f"load/sensors/{name}/value").allowed is reaches


def test_a_run_that_is_at_work_leaves_nothing_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "STATE", tmp_path)
    folder = tmp_path / "pending"
    folder.mkdir()
    (folder / "dead.json").write_text('{"run": "dead", "site": "s", "count": 3}')
    (folder / "live.json").write_text('{"run": "live", "site": "s", "count": 3}')
    hold = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, folder / "live.json"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert [path.stem for path in identities.leftovers()] == ["dead"]
        holder.communicate()
    assert identities.read_pending(folder / "dead.json") == identities.Pending("dead", "s", 3)
    assert [path.stem for path in identities.leftovers()] == ["dead", "live"]


# The broker


def script(second: int, ticks: int, *, rss: int = 2048, files: int = 9) -> list[tuple[float, str]]:
    stat = f"1 (a (b) c) S {' '.join(['0'] * 10)} {ticks} 0 0"
    lines = [f"T {second}.00", f"S {stat}", f"C cpu {second * 100} 0 0 {second * 100} 0 0 0 0", f"F {files}"]
    lines += [f"M VmRSS: {rss}", "M VmHWM: 4096", "M MemAvailable: 1048576", "E"]
    return [(float(second), line) for line in lines]


def test_what_proc_says_is_read() -> None:
    head = [(0.0, "H tick 100"), (0.0, "H cores 4"), (0.0, "H broker mosquitto version 2.0.21")]
    seen = observe.parse([*head, *script(10, 500), *script(11, 525), *script(13, 625, rss=3072)])
    assert [sample.cpu_percent for sample in seen.samples] == [25, 50]
    assert [sample.host_percent for sample in seen.samples] == [50, 50]
    assert seen.samples[1].memory_mib == 3
    assert seen.samples[0].files == 9
    assert seen.peak_memory_mib == 4
    assert seen.host["cores"] == "4"
    assert not seen.died


def test_a_broker_that_died_is_told() -> None:
    seen = observe.parse([*script(1, 0), *script(2, 1), *script(3, 2), (4.0, "X the broker's process is gone")])
    assert seen.died
    assert seen.memory_mib is None


def test_a_broker_that_was_restarted_is_watched_on() -> None:
    again = [*script(5, 10), *script(6, 20), *script(7, 30, rss=3072)]
    seen = observe.parse([*script(1, 900), *script(2, 910), (3.0, "R 77"), *again])
    assert [sample.cpu_percent for sample in seen.samples] == [10, 10, 10]
    assert seen.restarts == 1
    assert not seen.died
    assert seen.memory_mib == 3


@pytest.mark.parametrize(
    ("lines", "cores"),
    [
        ((), 1.0),
        (("H cpu_max_unit max 100000", "H cpu_max_host -1 100000"), 1.0),
        (("H cpu_max_unit 25000 100000",), 0.25),
        (("H cpu_max_host 2000 10000",), 0.2),
        (("H cpu_max_unit 25000 100000", "H cpu_max_host 2000 10000"), 0.2),
        (("H cpu_max_unit 400000 100000",), 1.0),
        (("H cpu_max_unit 1000 0",), 1.0),
    ],
)
def test_a_quota_is_what_a_brokers_cpu_is_held_against(lines: tuple[str, ...], cores: float) -> None:
    samples = [line for second in range(7) for line in script(second, second * 10)]
    seen = observe.parse([*((0.0, line) for line in lines), *samples])
    assert seen.cores == cores
    assert seen.cpu_percent == pytest.approx(10 / cores)


def test_a_restart_that_is_refused_is_told_in_the_shells_words() -> None:
    refused = observe.restart(["sh", "-c", "echo 'sudo: a password is required' >&2; exit 1", "--"])
    assert refused == "sudo: a password is required"
    assert "No such file" in observe.restart(["/nowhere/ssh"])
    assert (
        observe.restart(["sh", "-c", "read line; test \"$line\" = 'systemctl restart mosquitto.service'", "--"]) == ""
    )


def test_noise_from_a_shell_is_no_sample() -> None:
    assert observe.parse([(0.0, "Welcome"), (0.0, ""), (0.0, "S x"), (1.0, "E"), (2.0, "E")]).samples == ()


def test_a_shell_that_refuses_is_told_in_its_words() -> None:
    observer = observe.Observer(["sh", "-c", "echo 'sudo: a password is required' >&2; exit 1", "--"])
    observer.start()
    assert observer.stop().problem == "sudo: a password is required"


def test_a_shell_that_is_not_there_is_told() -> None:
    observer = observe.Observer(["/nowhere/ssh"])
    observer.start()
    assert "No such file" in observer.stop().problem


# The report


def report(example: Site, tally: object = None, **changes: object) -> Report:
    plan = make_plan(
        example,
        GATEWAY,
        "steady",
        PROFILES["steady"],
        {name: Path("/x") for name in ("temp-101", "line-1", "historian")},
    )
    counted = good()
    for second in range(5):
        counted.second(second).sent = second
    seen = watched()
    judgement = judge(KEPT, counted, seen, complete=True)
    made = Report(NOW, 1.0, plan, counted, seen, judgement, True, False, "Test.")
    return replace(made, **changes)  # type: ignore[arg-type]


class Checker(html.parser.HTMLParser):
    """Sees whether every element is closed."""

    VOID = frozenset({"meta", "line", "rect", "polyline", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not (name in ("src", "href") and value), "the page needs something else"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(example: Site) -> None:
    page = reports.as_html(report(example))
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert {"svg", "table", "polyline"} <= checker.seen
    assert "PASSED: gateway-1 carries 3 devices" in page
    assert "Partial" not in page


def test_the_page_tells_how_little_memory_was_left(example: Site) -> None:
    seen = watched(seconds=2)
    least = replace(seen.samples[0], available_mib=123.4)
    page = reports.as_html(report(example, observation=replace(seen, samples=(*seen.samples, least))))
    assert "<td>memory available on the host, least</td><td>123.4 MiB</td>" in page


def test_a_partial_report_says_so(example: Site, tmp_path: Path) -> None:
    partial = report(example, interrupted=True)
    assert "Partial report" in reports.as_html(partial)
    assert "PARTIAL" in reports.summary(partial)
    reports.write(partial, tmp_path / "new")
    assert json.loads((tmp_path / "new/report.json").read_text())["partial"] is True


def test_what_a_gateway_says_is_not_taken_for_markup(example: Site) -> None:
    bad = report(example, observation=replace(watched(), host={"cpu": "<script>alert(1)</script>"}))
    assert "<script>" not in reports.as_html(bad)


def test_a_report_names_what_broke_first(example: Site) -> None:
    slow = report(example)
    for second in (3, 4):
        slow.tally.second(second).latency.add(900_000_000)
        slow.tally.second(second).connected = 3
    assert reports.broke_first(slow).startswith("deliveries took 9")
    assert reports.broke_first(slow).endswith("3 s after the load began")
    assert reports.broke_first(report(example)) == ""


def test_a_report_names_what_was_not_measured(example: Site) -> None:
    told = " ".join(reports.not_measured(report(example, observation=None)))
    assert "CPU, memory and sockets" in told
    assert "forbidden" in told
    assert "$SYS" in told


def test_a_full_disk_leaves_no_half_report(example: Site, tmp_path: Path) -> None:
    # A folder in the way of the file: writing succeeds, and putting it in place does not.
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html/x").touch()
    with pytest.raises(ReportError, match="The report cannot be written"):
        reports.write(report(example), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json"}


# The search


def attempts(example: Site, limit: float, verdict: Verdict) -> tuple[list[float], search.Found]:
    """Search against a gateway that holds so many times the profile's load."""
    tried: list[float] = []

    def attempt(profile: Profile, _: int) -> Report:
        factor = 1 / profile.every_s
        tried.append(factor)
        held = factor <= limit
        made = report(example)
        judgement = replace(
            made.judgement,
            verdict=Verdict.PASSED if held else verdict,
            reasons=() if held else ("latency_p99_ms is 900.",),
            generator_limited=("It was late.",) if not held and verdict is Verdict.INCONCLUSIVE else (),
        )
        return replace(made, judgement=judgement)

    return tried, search.search(Profile("", every_s=1.0), attempt, say=lambda _: None, processes=range(1, 2))


def test_a_search_finds_the_knee(example: Site) -> None:
    tried, found = attempts(example, 11.0, Verdict.FAILED)
    assert tried[:5] == [1, 2, 4, 8, 16]
    held = max(factor for factor, step in found.steps if step.judgement.verdict is Verdict.PASSED)
    assert 11 / search.NEAR <= held <= 11
    assert found.verdict is Verdict.PASSED
    assert "first: latency_p99_ms is 900" in found.sentence()
    assert "Its limit is none that was seen on the broker" in found.sentence()


def test_a_search_says_whose_limit_it_met(example: Site) -> None:
    """The broker's CPU, the queue of a reader with CPU to spare, the broker's death, or the generator."""
    slow = report(example)
    busy = replace(watched(), samples=tuple(replace(s, cpu_percent=90.0) for s in watched().samples))
    assert search.limit(replace(slow, observation=busy)) == "the broker's CPU (90 % of the core that it may use)"
    small = tuple(replace(sample, cpu_percent=18.0) for sample in watched().samples)
    quota = replace(watched(), samples=small, host={"cpu_max_host": "2000 10000"})
    assert "(90 % of the 20 % of a core that it may use)" in search.limit(replace(slow, observation=quota))
    dropping = report(example)
    dropping.tally.broker_before["$SYS/broker/publish/messages/dropped"] = "7"
    dropping.tally.broker_after["$SYS/broker/publish/messages/dropped"] = "1207"
    assert "it dropped 1,200 messages with CPU to spare" in search.limit(dropping)
    assert search.limit(replace(slow, observation=replace(watched(), died=True))) == "that the broker died"
    judgement = replace(slow.judgement, generator_limited=("late",))
    assert search.limit(replace(slow, observation=busy, judgement=judgement)).startswith("the GENERATOR's")


def test_a_search_tries_once_more_where_the_generator_was_too_slow(example: Site) -> None:
    """A machine that was busy for a moment ends no search."""
    tried: list[float] = []

    def attempt(profile: Profile, _: int) -> Report:
        factor = 1 / profile.every_s
        tried.append(factor)
        made = report(example)
        if factor > 4:
            broken = replace(made.judgement, verdict=Verdict.FAILED, reasons=("latency_p99_ms is 900.",))
            return replace(made, judgement=broken)
        if factor == 2 and tried.count(2) == 1:
            limited = replace(made.judgement, verdict=Verdict.INCONCLUSIVE, generator_limited=("It was late.",))
            return replace(made, judgement=limited)
        return made

    found = search.search(Profile("", every_s=1.0), attempt, say=lambda _: None, processes=range(1, 2))
    assert tried[:4] == [1, 2, 2, 4]
    assert found.verdict is Verdict.PASSED


def test_a_search_believes_a_failure_that_has_no_cause_only_when_it_comes_again(example: Site) -> None:
    tried: list[float] = []

    def attempt(profile: Profile, _: int) -> Report:
        factor = 1 / profile.every_s
        tried.append(factor)
        made = report(example)
        # A machine that was busy for a moment at 2, and the gateway's limit at 4.
        failed = replace(made.judgement, verdict=Verdict.FAILED, reasons=("latency_p99_ms is 900.",))
        if factor == 2 and tried.count(2) == 1:
            return replace(made, judgement=failed)
        if factor >= 4:
            busy = replace(watched(), samples=tuple(replace(s, cpu_percent=90.0) for s in watched().samples))
            return replace(made, judgement=failed, observation=busy)
        return made

    found = search.search(Profile("", every_s=1.0), attempt, say=lambda _: None, processes=range(1, 2))
    # What the broker's CPU explains is believed at once.
    assert tried[:5] == [1, 2, 2, 4, pytest.approx(8**0.5)]
    assert found.verdict is Verdict.PASSED
    assert "Its limit is the broker's CPU" in found.sentence()


def test_a_broker_at_its_limit_is_told_though_the_generator_was_late(example: Site) -> None:
    busy = replace(watched(), samples=tuple(replace(s, cpu_percent=90.0) for s in watched().samples))

    def attempt(profile: Profile, _: int) -> Report:
        if profile.every_s == 1:
            return report(example)
        tally = good()
        for _count in range(200):
            tally.lag.add(90_000_000)
        judgement = judge((*KEPT, Threshold("broker_cpu_percent", False, 80)), tally, busy, complete=True)
        assert judgement.verdict is Verdict.INCONCLUSIVE
        return replace(report(example), tally=tally, observation=busy, judgement=judgement)

    found = search.search(Profile("", every_s=1.0), attempt, say=lambda _: None, processes=range(1, 2))
    assert found.verdict is Verdict.PASSED
    assert "Its limit is the broker's CPU (90 % of the core that it may use)" in found.sentence()
    assert "first: broker_cpu_percent is 90 %" in found.sentence()
    assert "GENERATOR" not in found.sentence()


def test_a_search_takes_more_processes_where_one_filled_its_core(example: Site) -> None:
    took: list[tuple[float, int]] = []

    def attempt(profile: Profile, processes: int) -> Report:
        factor = 1 / profile.every_s
        took.append((factor, processes))
        made = report(example)
        if factor > 2 * processes:
            tally = good()
            tally.busiest = 0.97
            judgement = judge(KEPT, tally, watched(), complete=True)
            return replace(made, tally=tally, judgement=judgement)
        return made

    # As many at one load as it takes: a run that earned one is no repetition.
    search.search(Profile("", every_s=1 / 15), attempt, say=lambda _: None, processes=range(1, 9))
    assert [processes for _, processes in took[:8]] == list(range(1, 9))
    took.clear()
    found = search.search(Profile("", every_s=1.0), attempt, say=lambda _: None, processes=range(1, 4))
    assert took[:5] == [(1, 1), (2, 1), (4, 1), (4, 2), (8, 2)]
    assert max(processes for _, processes in took) == 3
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.sentence().startswith("At least")


def test_a_search_that_meets_the_generators_limit_claims_none_of_the_gateways(example: Site) -> None:
    _, found = attempts(example, 3.0, Verdict.INCONCLUSIVE)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "GENERATOR was the limit" in found.sentence()
    assert found.sentence().startswith("At least")


def test_a_search_from_too_much_says_so(example: Site) -> None:
    tried, found = attempts(example, 0.5, Verdict.FAILED)
    # It failed for nothing that was seen on the broker.
    assert tried == [1] * search.TRIES
    assert found.verdict is Verdict.FAILED
    assert "Not even" in found.sentence()
    _, found = attempts(example, 0.5, Verdict.INCONCLUSIVE)
    assert found.sentence().startswith("The GENERATOR was too slow for the profile's own load")


def test_a_search_without_end_ends(example: Site, tmp_path: Path) -> None:
    tried, found = attempts(example, 1e9, Verdict.FAILED)
    assert len(tried) == search.MOST_RUNS
    assert found.verdict is Verdict.INCONCLUSIVE
    found.write(tmp_path)
    document = json.loads((tmp_path / "search.json").read_text())
    assert document["verdict"] == "inconclusive"
    assert len(document["steps"]) == search.MOST_RUNS


# Locust's charts


def test_the_charts_go_on_for_as_long_as_the_run_does() -> None:
    """Locust makes the percentiles of the last ten seconds of copies, which it makes where it counts itself."""
    script = """if True:
        import time, types
        import gevent
        from locust.stats import RequestStats
        from load import locustfile
        from load.tally import Tally

        clock, seen = [1000.0], []
        environment = types.SimpleNamespace(stats=RequestStats())
        tally = Tally()
        time.time = lambda: clock[0]

        def second(_):
            clock[0] += 1
            tally.delivery("telemetry", 1).latency.add(20_000_000)
            seen.append(environment.stats.total.get_current_response_time_percentile(0.99))
            if len(seen) == 30:
                raise SystemExit(print(seen[15:]))

        gevent.sleep = second
        locustfile._charts(environment, types.SimpleNamespace(tally=tally))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [20] * 15


# The command line: what is wrong is said before anything is touched


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/nowhere"], "there is no such folder"),
        ([str(EXAMPLE), "--slo", "/nowhere/slo.yml"], "/nowhere/slo.yml:1: there is no such file"),
        ([str(EXAMPLE), "--slo", str(EXAMPLE / "devices.yml")], "not a file of thresholds|unknown key devices"),
        ([str(EXAMPLE), "--report", "/dev/null/x"], "No report can be written"),
    ],
)
def test_bad_input_is_refused_in_words(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("load.__main__.STATE", tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert any(part in error for part in said.split("|"))
    assert "Cure" in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["--profile", "calm"],
        ["--devices", "0"],
        ["--duration", "-1"],
        ["--every", "nan"],
        ["--qos", "3"],
        ["--search", "--web"],
        ["--restart-broker"],
        ["--authentication", "charm"],
        ["--gateway-cpu", "20"],
    ],
)
def test_a_wrong_command_line_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(EXAMPLE), *arguments])
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "usage: make load"),
        (["--profil=calm"], 2, "invalid choice: 'calm'"),
        (["--deviecs", "3"], 2, "unrecognized arguments: --deviecs 3"),
        (["inventories/other"], 2, "unrecognized arguments: inventories/other"),
        (["--search", "--web"], 2, "Choose one of them"),
        (["--gateway-cpu", "9"], 2, "from 10 to 100"),
        (["--profile=token-renewal", "--authentication=psk"], 2, "for devices that come in by token"),
        (["--restart-broker"], 2, "goes with --profile reconnect-storm"),
        (["--websockets", "--authentication=psk"], 2, "for devices that come in by password"),
        (["--websockets", "--profile=token-renewal"], 2, "for devices that come in by password"),
        (["--token-method=private_key_jwt"], 2, "goes with --authentication token"),
        (["--slo", "/nowhere/slo.yml"], 1, "/nowhere/slo.yml:1: there is no such file"),
    ],
)
def test_no_lab_is_made_for_a_wrong_command_line(
    arguments: list[str],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[object] = []

    def up(*given: object, **_: object) -> object:
        made.append(given)
        raise LabError("A lab was made.", cure="None.")

    monkeypatch.setattr(Lab, "up", up)
    try:
        ended: object = lab.main(arguments)
    except SystemExit as error:
        ended = error.code
    told = capsys.readouterr()
    assert made == []
    assert ended == code
    assert said in told.out + told.err


def test_a_site_out_of_reach_is_told_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    shutil.copytree(EXAMPLE, site)
    hosts = yaml.safe_load((site / "hosts.yml").read_text())
    for group in hosts.values():
        for name in group["hosts"]:
            # Nobody listens there.
            group["hosts"][name] = {"ansible_host": "127.0.0.1", "ansible_port": 1}
    (site / "hosts.yml").write_text(yaml.safe_dump(hosts))
    for module in (identities, sys.modules["load.__main__"]):
        monkeypatch.setattr(module, "STATE", tmp_path / "state")
    monkeypatch.setenv("ANSIBLE_HOME", str(tmp_path / "ansible"))
    assert main([str(site)]) == 1
    error = capsys.readouterr().err
    assert "Connection refused" in error
    assert "Cure: see that every host answers" in error
    assert not (tmp_path / "state/pending").exists()


def test_a_gateway_that_does_not_speak_websockets_is_not_asked_to() -> None:
    described = Described((GATEWAY,), "plugin", {})
    with pytest.raises(PlanError, match=r"no listener for WebSockets\. Cure: set mosquitto_websockets_port"):
        chosen(described, None, websockets=True)
    assert not chosen(described, "gateway-1", websockets=False).websockets
    speaks = replace(GATEWAY, websockets_port=9001)
    assert chosen(replace(described, gateways=(speaks,)), None, websockets=True).port("password") == 9001


def test_bednet_load_hands_everything_over() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bednet.cli", "load", "/nowhere", "--profile", "mixed"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "/nowhere" in done.stderr
    assert "there is no such folder" in done.stderr


def test_thresholds_read_like_sentences() -> None:
    assert str(Threshold("latency_p99_ms", False, 500)) == "at most 500 ms"
    assert str(Threshold("delivered_share", True, 0.999)) == "at least 0.999"
