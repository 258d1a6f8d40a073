# SPDX-License-Identifier: Apache-2.0
"""Whom nginx counts together: what it makes of an address, read out of the role's template.

The sharp edge: a single IPv6 host has a whole /64, and texts of addresses are abbreviated.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

TEMPLATE = Path(__file__).parents[2] / "roles/token_service/templates/nginx.conf.j2"
GROUPS = [
    (re.compile(pattern.replace("(?<", "(?P<")), name)
    for pattern, name in re.findall(r'"~(\S+)" "\$([a-z]+)::";', TEMPLATE.read_text(encoding="utf-8"))
]


def network(address: str) -> str:
    """Return what nginx makes of an address."""
    for pattern, name in GROUPS:
        if match := pattern.search(address):
            return f"{match[name]}::"
    return address


def test_ipv4_addresses_count_by_themselves() -> None:
    assert len(GROUPS) == 2
    assert [network(text) for text in ("192.0.2.1", "192.0.2.2")] == ["192.0.2.1", "192.0.2.2"]


@given(st.integers(0, 2**64 - 1), st.sets(st.integers(0, 2**64 - 1), min_size=3))
def test_a_host_with_a_whole_network_counts_twice_at_most(prefix: int, hosts: set[int]) -> None:
    """Twice where zeros of the network are abbreviated in one address, and zeros of the host in another."""
    found = {network(str(ipaddress.IPv6Address(prefix << 64 | host))) for host in hosts}
    assert all(found)
    assert len(found) <= 2


FOUR = st.lists(st.integers(1, 0xFFFF), min_size=4, max_size=4)


@given(FOUR, FOUR, FOUR)
def test_networks_are_told_apart(one: list[int], other: list[int], host: list[int]) -> None:
    first, second = (network(":".join(f"{group:x}" for group in (*prefix, *host))) for prefix in (one, other))
    assert (first == second) is (one == other)
