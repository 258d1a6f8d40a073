# SPDX-License-Identifier: Apache-2.0
"""The checks of tokens at a gateway: :data:`TOKENS`."""

from __future__ import annotations

from bednet import probe
from bednet.probe import Answer, Credentials, Outcome
from bednet.verify.authentication import NOT_AUTHORIZED_CODES, has_passwords
from bednet.verify.check import AUTHENTICATION, Check
from bednet.verify.jws import encode_part, read_part
from bednet.verify.target import NoTokenError, Purse, Target
from bednet.verify.verdict import Verdict, everywhere, joined


def _purse(target: Target) -> Purse:
    if target.tokens is None:
        raise NoTokenError("there is no token service, so nothing was learnt")
    return target.tokens


def _shown(target: Target, token: str, certificate: Credentials | None = None) -> Credentials:
    """Return a token as the password, with the probe's certificate or another one."""
    own = certificate or target.certificate
    return Credentials(own.certificate, own.key, target.identity.id, token)


def _token_accepted(target: Target) -> Verdict:
    """Show a token of each host of the service: the gateway must have the keys of all."""
    verdicts = []
    for source in _purse(target).services:
        seen = probe.enter(target.mtls, _shown(target, _purse(target).token(source)))
        said = "accepted" if seen.accepted else str(seen)
        verdicts.append((f"of {source.service.name}", Verdict(seen.accepted, said)))
    return joined(verdicts, ": ")


def _token_refused(seen: Answer) -> Verdict:
    refused = seen.outcome is Outcome.REFUSED and seen.code in NOT_AUTHORIZED_CODES
    return Verdict(refused, f"refused: {seen.reason} (0x{seen.code:02x})" if refused and seen.code else str(seen))


def _bare_token_refused(target: Target) -> Verdict:
    shown = Credentials(username=target.identity.id, password=_purse(target).token())
    return everywhere(target.password_listeners, lambda listener: _token_refused(probe.enter(listener, shown)))


def _token_with_another_certificate_refused(target: Target) -> Verdict:
    other = target.identity.other
    if other is None:
        return Verdict(False, "there is no other certificate, so nothing was learnt")
    # The control: it is not the certificate that is refused.
    control = probe.enter(target.mtls, other)
    if not control.accepted:
        return Verdict(False, f"the other certificate alone is refused, so nothing was learnt: {control}")
    return _token_refused(probe.enter(target.mtls, _shown(target, _purse(target).token(), other)))


def _token_for_another_refused(target: Target) -> Verdict:
    token = _purse(target).token(audience=target.elsewhere)
    verdict = _token_refused(probe.enter(target.mtls, _shown(target, token)))
    return Verdict(verdict.passed, f"one for {target.elsewhere} is {verdict.evidence}")


def _altered_token_refused(target: Target) -> Verdict:
    token = _purse(target).token()
    header, claims, signature = token.split(".")
    # A second less of life: all else of it holds.
    other = read_part(claims)
    other["exp"] = int(other["exp"]) - 1
    altered = f"{header}.{encode_part(other)}.{signature}"
    return _token_refused(probe.enter(target.mtls, _shown(target, altered)))


def _has_tokens(target: Target) -> bool:
    return target.tokens is not None


TOKENS: tuple[Check[Target], ...] = (
    Check(AUTHENTICATION, "a fresh token is accepted", True, _token_accepted, session=True, applies=_has_tokens),
    Check(
        AUTHENTICATION,
        "a token without its certificate is refused",
        False,
        _bare_token_refused,
        session=True,
        applies=lambda target: _has_tokens(target) and has_passwords(target),
    ),
    Check(
        AUTHENTICATION,
        "a token with another certificate is refused",
        False,
        _token_with_another_certificate_refused,
        session=True,
        applies=lambda target: _has_tokens(target) and target.identity.other is not None,
    ),
    Check(
        AUTHENTICATION,
        "a token for another gateway is refused",
        False,
        _token_for_another_refused,
        session=True,
        applies=lambda target: target.elsewhere is not None,
    ),
    Check(
        AUTHENTICATION,
        "a token that was altered is refused",
        False,
        _altered_token_refused,
        session=True,
        applies=_has_tokens,
    ),
)
