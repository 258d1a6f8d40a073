# SPDX-License-Identifier: Apache-2.0
"""The checks of what is too large for a gateway: :data:`SIZES`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bednet import probe
from bednet.probe import Listener, NothingArrivedError, Session
from bednet.verify.check import LIMITS, Check
from bednet.verify.verdict import Verdict, each_listener

if TYPE_CHECKING:
    from bednet.verify.target import Target


def _large_packet_refused(target: Target, listener: Listener) -> Verdict:
    limit, margin = target.gateway.max_packet_size, 64
    topic = target.own()
    with Session(listener, target.credentials(listener)) as session:
        receipt = session.publish(topic, bytes(limit - len(topic) - margin))
        if not receipt.granted:
            return Verdict(False, f"a packet just below {limit} bytes was refused: {receipt}")
    with Session(listener, target.credentials(listener)) as session:
        mid = session.send(topic, bytes(limit + margin))
        try:
            receipt = session.acknowledged(mid)
        except NothingArrivedError:
            goodbye = session.wait_goodbye(0)
            return Verdict(True, f"just below {limit} bytes accepted, just above: {goodbye}")
    if receipt.code == probe.PACKET_TOO_LARGE:
        return Verdict(True, f"just below {limit} bytes accepted, just above: {receipt}")
    return Verdict(False, f"a packet above {limit} bytes was answered: {receipt}")


SIZES: tuple[Check[Target], ...] = (
    Check(LIMITS, "a packet above the limit is refused", False, each_listener(_large_packet_refused), session=True),
)
