# SPDX-License-Identifier: Apache-2.0
"""The checks of a gateway: :data:`GATEWAY_CHECKS`, with those of what is open there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bednet import probe
from bednet.probe import Listener, Outcome
from bednet.verify.access_control import ACCESS_CONTROL
from bednet.verify.authentication import CREDENTIALS, IDENTITY
from bednet.verify.check import ENCRYPTION, REACHABILITY, Check
from bednet.verify.limits import SIZES
from bednet.verify.tls import TLS
from bednet.verify.tokens import TOKENS
from bednet.verify.verdict import Verdict, everywhere, joined

if TYPE_CHECKING:
    from bednet.verify.target import Target


def _answers(target: Target) -> Verdict:
    def look(listener: Listener) -> Verdict:
        reached = probe.tcp(listener.host, listener.port)
        if not reached.accepted:
            return Verdict(False, f"{reached}")
        seen = probe.hello(listener, "1.2", tuple(probe.STRONG_SUITES), timeout=3)
        if seen.outcome in (Outcome.ACCEPTED, Outcome.ALERT):
            return Verdict(True, "speaks TLS")
        return Verdict(False, f"accepts connections but does not speak TLS: {seen}")

    return everywhere(target.listeners, look)


REACHABLE: Check[Target] = Check(REACHABILITY, "the gateway answers", True, _answers)
"""Runs first on each gateway; where it fails, the other checks would learn nothing and are left out."""


def _closed(target: Target, port: int) -> Verdict:
    seen = probe.tcp(target.gateway.address, port, timeout=2)
    if seen.outcome in (Outcome.UNREACHABLE, Outcome.TIMEOUT):
        return Verdict(True, seen.reason)
    said = probe.enter(Listener(target.gateway.address, port, tls=False), version=4)
    return Verdict(False, f"is open; to plaintext MQTT it says: {said}")


def _plaintext_closed(target: Target) -> Verdict:
    port = target.gateway.plaintext_port
    return joined([(str(port), _closed(target, port))])


def _off_closed(target: Target) -> Verdict:
    return joined([(str(port), _closed(target, port)) for port in target.gateway.off])


def _plaintext_refused(target: Target) -> Verdict:
    def look(listener: Listener) -> Verdict:
        seen = probe.enter(Listener(listener.host, listener.port, tls=False), version=4)
        if seen.outcome in (Outcome.ALERT, Outcome.CLOSED, Outcome.RESET):
            return Verdict(True, str(seen))
        return Verdict(False, f"an unencrypted CONNECT was answered: {seen}")

    return everywhere(target.listeners, look)


GATEWAY_CHECKS: tuple[Check[Target], ...] = (
    REACHABLE,
    Check(ENCRYPTION, "the plaintext port is closed", True, _plaintext_closed),
    Check(
        ENCRYPTION,
        "listeners that are off are closed",
        False,
        _off_closed,
        applies=lambda target: bool(target.gateway.off),
    ),
    Check(ENCRYPTION, "plaintext MQTT is refused", True, _plaintext_refused),
    *TLS,
    *CREDENTIALS,
    *TOKENS,
    *IDENTITY,
    *ACCESS_CONTROL,
    *SIZES,
)
