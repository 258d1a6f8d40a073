# SPDX-License-Identifier: Apache-2.0
"""Who is let in. The reason of each refusal stands in the audit, and nowhere else: a client learns nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.plugin.gateway import Gateway, Site
    from tests.plugin.pki import Authority


def test_a_certificate_lets_its_device_in(gateway: Gateway, authority: Authority) -> None:
    with gateway.session("temp-1", authority.device("temp-1")) as session:
        assert session.publish("sensors/temp-1/t", b"1").granted
        assert not session.publish("sensors/temp-2/t", b"1").granted
    event = gateway.audited(event="refused", action="publish", topic="sensors/temp-2/t")
    assert event["reason"] == "not-allowed"
