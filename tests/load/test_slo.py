# SPDX-License-Identifier: Apache-2.0
"""The verdict: a pass needs everything measured and kept, a whole run, and a generator that was fast enough to know.

A pass on a gateway that loses messages is the worst that could happen here, so most of this is about when there is no
pass.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from load.observe import Observation, Sample
from load.profiles import PROFILES
from load.slo import SLOError, Status, Threshold, Verdict, figures, judge, read_slo
from load.tally import Tally

SHIPPED = Path(__file__).resolve().parents[2] / "load/slo.yml"
KEPT = (Threshold("delivered_share", True, 0.999), Threshold("latency_p99_ms", False, 500))


def good(expected: int = 1000) -> Tally:
    """A run in which everything arrived in a millisecond."""
    tally = Tally()
    delivery = tally.delivery("telemetry", 1)
    delivery.expected = delivery.unique = expected
    for _ in range(expected):
        delivery.latency.add(1_000_000)
    tally.connect.add(20_000_000)
    tally.lag.add(100_000)
    tally.cpu_s, tally.busy_s = 1.0, 10.0
    return tally


def watched(cpu: float = 20.0, memory: float = 12.0, seconds: int = 10, *, died: bool = False) -> Observation:
    """A broker that was seen."""
    sample = Sample(0.0, cpu, 30.0, memory, 20, 1000.0)
    return Observation({}, (sample,) * seconds, memory, {}, died)


def test_a_good_run_passes() -> None:
    found = judge(KEPT, good(), watched(), complete=True)
    assert found.verdict is Verdict.PASSED
    assert found.reasons == ()


def test_losses_fail() -> None:
    tally = good()
    tally.delivery("telemetry", 1).unique -= 2
    found = judge(KEPT, tally, watched(), complete=True)
    assert found.verdict is Verdict.FAILED
    assert any("delivered_share is 0.998" in reason for reason in found.reasons)


def test_messages_that_came_twice_do_not_make_up_for_lost_ones() -> None:
    tally = good()
    delivery = tally.delivery("telemetry", 1)
    delivery.unique -= 5
    delivery.duplicates += 5
    # Nor do those of another kind that came more often than asked for.
    extra = tally.delivery("commands", 1)
    extra.expected, extra.unique = 1, 100
    assert judge(KEPT, tally, watched(), complete=True).verdict is Verdict.FAILED


def test_slowness_fails() -> None:
    tally = good()
    for _ in range(11):
        tally.delivery("telemetry", 1).latency.add(900_000_000)
    found = judge(KEPT, tally, watched(), complete=True)
    assert found.verdict is Verdict.FAILED
    assert any("latency_p99_ms" in reason for reason in found.reasons)


def test_what_was_not_measured_is_no_pass() -> None:
    found = judge((*KEPT, Threshold("broker_cpu_percent", False, 80)), good(), None, complete=True)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.findings[-1].status is Status.NOT_MEASURED
    assert any("Not measured" in reason for reason in found.reasons)


@pytest.mark.parametrize("seen", [watched(seconds=4), watched(died=True), Observation(problem="no sudo")])
def test_a_broker_seen_too_short_or_dead_has_no_figure(seen: Observation) -> None:
    threshold = Threshold("broker_cpu_percent", False, 80)
    assert judge((threshold,), good(), seen, complete=True).verdict is Verdict.INCONCLUSIVE


def test_nothing_delivered_and_nothing_asked_for_is_no_pass() -> None:
    assert judge(KEPT, Tally(), watched(), complete=True).verdict is Verdict.INCONCLUSIVE


def test_an_interrupted_or_broken_off_run_is_no_pass() -> None:
    assert judge(KEPT, good(), watched(), complete=True, interrupted=True).verdict is Verdict.INCONCLUSIVE
    assert judge(KEPT, good(), watched(), complete=False).verdict is Verdict.INCONCLUSIVE


def test_a_busy_generator_says_nothing_about_the_gateway() -> None:
    tally = good()
    tally.cpu_s = 9.9
    found = judge(KEPT, tally, watched(), complete=True)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "generator" in found.generator_limited[0]


def test_a_late_generator_is_never_called_the_gateways_fault() -> None:
    tally = good()
    for _ in range(100):
        tally.lag.add(200_000_000)
        tally.delivery("telemetry", 1).latency.add(900_000_000)
    found = judge(KEPT, tally, watched(), complete=True)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert any("late" in reason for reason in found.generator_limited)


def test_a_breach_fails_whatever_the_generator_did() -> None:
    tally = good()
    tally.breaches, tally.cpu_s = 1, 9.9
    found = judge((*KEPT, Threshold("breaches", False, 0)), tally, watched(), complete=True)
    assert found.verdict is Verdict.FAILED


def test_floods_and_slow_readers_are_not_held_against_the_gateway() -> None:
    tally = good()
    for kind in ("flood", "slow"):
        delivery = tally.delivery(kind, 0)
        delivery.expected, delivery.unique = 10_000, 10
        delivery.latency.add(60_000_000_000)
    assert judge(KEPT, tally, watched(), complete=True).verdict is Verdict.PASSED


def test_renewals_that_fail_are_told_and_none_at_all_is_no_pass() -> None:
    tally = good()
    threshold = Threshold("renewal_failures", False, 0)
    assert judge((threshold,), tally, watched(), complete=True).verdict is Verdict.INCONCLUSIVE
    tally.renewals = 9
    assert judge((threshold,), tally, watched(), complete=True).verdict is Verdict.PASSED
    tally.renewal_failures["no token: unreachable"] += 1
    assert judge((threshold,), tally, watched(), complete=True).verdict is Verdict.FAILED
    tally.renewals = 0
    assert judge((threshold,), tally, watched(), complete=True).verdict is Verdict.FAILED


def test_clocks_that_are_not_known_well_say_nothing_about_the_gateway() -> None:
    tally = good()
    tally.clock_error_ms = 9.9
    assert judge(KEPT, tally, watched(), complete=True).verdict is Verdict.PASSED
    tally.clock_error_ms = 10.1
    found = judge(KEPT, tally, watched(), complete=True)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "clocks" in found.generator_limited[0]


def test_one_process_at_its_limit_is_not_hidden_by_idle_ones() -> None:
    tally = good()
    tally.processes, tally.busiest = 4, 0.95
    found = judge(KEPT, tally, watched(), complete=True)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.generator_limited[0].startswith("A process of the generator used 95 %")


def test_a_generator_that_had_to_wait_for_a_core_is_not_held_against_the_gateway() -> None:
    """Its readers were slow then, and the gateway's queues for them full; but what passed has passed."""
    tally = good()
    tally.busiest, tally.wanting = 0.6, 0.95
    assert judge(KEPT, tally, watched(), complete=True).verdict is Verdict.PASSED
    for histogram in (delivery.latency for delivery in tally.deliveries.values()):
        for _ in range(10_000):
            histogram.add(3_000_000_000)
    judgement = judge(KEPT, tally, watched(), complete=True)
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert "waited for one, 95 % of the time" in judgement.generator_limited[0]
    for tally.busiest, tally.wanting in ((0.6, 0.8), (0.2, 0.95)):
        assert judge(KEPT, tally, watched(), complete=True).verdict is Verdict.FAILED


def test_lost_messages_are_told_by_qos() -> None:
    tally = good()
    for qos in (0, 1, 2):
        delivery = tally.delivery("commands", qos)
        delivery.expected, delivery.unique = 10, 9
    found = figures(tally, None)
    assert found["lost"] == 3
    assert found["lost_qos_1_and_2"] == 2


def test_the_broker_is_judged_by_its_busiest_five_seconds() -> None:
    quiet, busy = Sample(0.0, 10.0, 0.0, 1.0, 1, 1.0), Sample(0.0, 90.0, 0.0, 1.0, 1, 1.0)
    assert Observation({}, (quiet,) * 9 + (busy,) * 5 + (quiet,) * 9).cpu_percent == 90
    assert Observation({}, (quiet,) * 9 + (busy,) * 4 + (quiet,) * 9).cpu_percent == 74


@pytest.mark.parametrize("profile", PROFILES)
def test_the_shipped_thresholds_can_be_read_for_every_profile(profile: str) -> None:
    names = {threshold.figure for threshold in read_slo(SHIPPED, profile, tuple(PROFILES))}
    assert {"delivered_share", "lost_qos_1_and_2", "latency_p99_ms", "breaches"} <= names


def test_a_profile_changes_and_drops_single_thresholds(tmp_path: Path) -> None:
    file = tmp_path / "slo.yml"
    file.write_text(
        yaml.safe_dump(
            {
                "version": 1,
                "thresholds": {"lost": {"at_most": 0}, "latency_p99_ms": {"at_most": 5}},
                "profiles": {"mixed": {"lost": None, "latency_p99_ms": {"at_most": 7}}},
            }
        )
    )
    assert read_slo(file, "mixed", ("mixed",)) == (Threshold("latency_p99_ms", False, 7),)
    assert Threshold("lost", False, 0) in read_slo(file, "steady", ("mixed", "steady"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid YAML"),
        ("[]", "the file must be a mapping"),
        ("version: 2", "not a file of thresholds"),
        ("version: 1\nthreshold: {}", "unknown key threshold"),
        ("version: 1", "`thresholds` is not a list"),
        ("version: 1\nthresholds: {}", "nothing could fail"),
        ("version: 1\nthresholds: {lost: null}", "nothing could fail"),
        ("version: 1\nthresholds: {latency_p98_ms: {at_most: 1}}", "no figure `latency_p98_ms`"),
        ("version: 1\nthresholds: {lost: 0}", "Cure: write {at_most: NUMBER}"),
        ("version: 1\nthresholds: {lost: {at_most: 0, at_least: 0}}", "Cure: write {at_most: NUMBER}"),
        ("version: 1\nthresholds: {lost: {below: 0}}", "Cure: write {at_most: NUMBER}"),
        ("version: 1\nthresholds: {lost: {at_most: none}}", "a number that is not negative"),
        ("version: 1\nthresholds: {lost: {at_most: true}}", "a number that is not negative"),
        ("version: 1\nthresholds: {lost: {at_most: .nan}}", "a number that is not negative"),
        ("version: 1\nthresholds: {lost: {at_most: -1}}", "a number that is not negative"),
        ("version: 1\nthresholds: {lost: {at_most: 0}}\nprofiles: {calm: {}}", "no profile calm"),
        ("version: 1\nthresholds: {lost: {at_most: 0}}\nprofiles: {steady: {found: null}}", "no figure `found`"),
        ("version: 1\nthresholds: {lost: {at_most: 0}}\nprofiles: {steady: [lost]}", "is not a list of names"),
    ],
)
def test_thresholds_that_cannot_be_read_are_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "slo.yml"
    file.write_text(text)
    with pytest.raises(SLOError, match=r"slo\.yml") as refused:
        read_slo(file, "steady", ("steady",))
    assert said in str(refused.value)


def test_a_file_of_thresholds_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SLOError, match="there is no such file"):
        read_slo(tmp_path / "none.yml", "steady", ("steady",))
