# SPDX-License-Identifier: Apache-2.0
"""Latencies and losses are counted right: percentiles never flatter, and no loss, copy or disorder is missed."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load import measure
from load.measure import Histogram, Ledger, Stamp
from load.tally import Tally

durations = st.lists(st.integers(min_value=0, max_value=10**11), min_size=1, max_size=200)


@given(durations, st.sampled_from([50, 90, 99, 99.9, 100]))
def test_a_percentile_is_never_less_than_the_true_one_and_at_most_a_little_more(values: list[int], p: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    true_us = sorted(values)[math.ceil(len(values) * p / 100) - 1] // 1000
    found = histogram.percentile_ms(p)
    assert found is not None
    assert true_us <= found * 1000 + 1e-6
    assert found * 1000 <= true_us * 1.016 + 1


@given(durations, durations)
def test_two_histograms_add_up_to_one_of_all(one: list[int], other: list[int]) -> None:
    parts = [Histogram(), Histogram()]
    whole = Histogram()
    for part, values in zip(parts, (one, other), strict=True):
        for value in values:
            part.add(value)
            whole.add(value)
    added = measure.merged(Histogram.from_json(json.loads(json.dumps(part.to_json()))) for part in parts)
    assert added.to_json() == whole.to_json()


def test_nothing_counted_has_no_percentile() -> None:
    assert Histogram().percentile_ms(99) is None


def test_a_percentile_is_never_more_than_the_longest() -> None:
    histogram = Histogram()
    histogram.add(1_000_001_000)
    assert histogram.percentile_ms(100) == 1000.001


def test_one_slow_of_a_hundred_is_outside_p99_and_one_of_ninety_nine_inside() -> None:
    histogram = Histogram()
    for _ in range(99):
        histogram.add(1_000_000)
    histogram.add(500_000_000)
    assert histogram.percentile_ms(99) == pytest.approx(1.0, rel=0.016)
    assert histogram.percentile_ms(99.1) == pytest.approx(500, rel=0.016)


@pytest.mark.parametrize(
    ("heard", "unique", "duplicates", "disordered"),
    [
        ([1, 2, 3], 3, 0, 0),
        ([1, 3], 2, 0, 0),  # 2 is lost: whoever knows how many were sent sees it
        ([2, 3], 2, 0, 0),  # the first is lost
        ([1, 1, 2, 2, 2], 2, 3, 0),
        ([1, 3, 2], 3, 0, 1),
        ([3, 1, 2, 2], 3, 1, 2),
        ([5, 4, 5, 4], 2, 2, 1),
    ],
)
def test_a_ledger_tells_loss_copies_and_disorder_apart(
    heard: list[int], unique: int, duplicates: int, disordered: int
) -> None:
    ledger = Ledger()
    fresh = [ledger.hear(number) for number in heard]
    assert (ledger.unique, ledger.duplicates, ledger.disordered) == (unique, duplicates, disordered)
    assert fresh.count(True) == unique


@given(st.lists(st.integers(min_value=1, max_value=30), max_size=100))
def test_a_ledger_counts_each_number_once(heard: list[int]) -> None:
    ledger = Ledger()
    for number in heard:
        ledger.hear(number)
    assert ledger.unique == len(set(heard))
    assert ledger.duplicates == len(heard) - len(set(heard))


def test_a_stamp_comes_back_and_the_payload_has_its_size() -> None:
    head = Stamp(1, 2, 3, 4, 2**63)
    payload = measure.stamp(head, bytes(96))
    assert len(payload) == measure.HEAD_BYTES + 96
    assert measure.read_stamp(payload) == head


@pytest.mark.parametrize("payload", [b"", b"21.5", b'{"seq": 1}' * 9, bytes(measure.HEAD_BYTES), b"bnL1"])
def test_messages_of_others_have_no_stamp(payload: bytes) -> None:
    assert measure.read_stamp(payload) is None


def test_a_tally_survives_its_journey_and_tallies_add_up() -> None:
    tally = Tally()
    tally.scheduled["telemetry"] += 5
    tally.connect.add(5_000_000)
    tally.lost_connections["gone"] += 1
    delivery = tally.delivery("telemetry", 1)
    delivery.expected, delivery.unique = 5, 4
    delivery.latency.add(1_000_000)
    tally.second(2).sent = 3
    back = Tally.from_json(json.loads(json.dumps(tally.to_json())))
    assert back.to_json() == tally.to_json()
    back.merge(tally)
    assert back.processes == 2
    assert back.scheduled["telemetry"] == 10
    assert back.delivery("telemetry", 1).lost == 2
    assert back.delivery("telemetry", 1).latency.count == 2
    assert back.seconds[2].sent == 6


def test_all_are_back_when_the_last_process_has_its_devices_back() -> None:
    def told(broken: int, back: int) -> Tally:
        return Tally(broken_at_ns=broken, back_at_ns=back)

    def whole(*parts: Tally) -> Tally:
        first, *others = parts
        for other in others:
            first.merge(other)
        return first

    assert whole(told(5_000_000, 9_000_000), told(4_000_000, 7_000_000)).all_back_ms == 5.0
    # One process has somebody who never came back.
    assert whole(told(5_000_000, 9_000_000), told(4_000_000, 0)).all_back_ms is None
    assert whole(told(5_000_000, 0), told(4_000_000, 7_000_000)).all_back_ms is None
    # One had no connection that could break.
    assert whole(told(0, 0), told(4_000_000, 7_000_000), told(0, 0)).all_back_ms == 3.0
    assert whole(told(0, 0), told(0, 0)).all_back_ms is None


def test_the_busiest_process_and_the_worst_clock_are_those_of_all() -> None:
    whole = Tally(busiest=0.3, clock_error_ms=0.1)
    whole.merge(Tally(busiest=0.9, clock_error_ms=0.0))
    whole.merge(Tally(busiest=0.2, clock_error_ms=0.4))
    assert (whole.busiest, whole.clock_error_ms) == (0.9, 0.4)


def test_both_ways_to_a_stamp_give_the_same() -> None:
    head = Stamp(7, 8, 9, 10, 11)
    assert measure.stamped(*head, b"xy") == measure.stamp(head, b"xy")
