# SPDX-License-Identifier: Apache-2.0
"""The checks of who is let in at a gateway, and under which name.

- :data:`CREDENTIALS`: certificates, passwords and pre-shared keys. Tokens: :mod:`bednet.verify.tokens`.
- :data:`IDENTITY`: the client id and the user name.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from bednet import probe
from bednet.probe import Answer, Credentials, Listener, NothingArrivedError, Offer, Outcome, Session
from bednet.verify.check import AUTHENTICATION, Check
from bednet.verify.jws import encode_part
from bednet.verify.verdict import Verdict, alert, everywhere, joined

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bednet.verify.target import Target

# What a CONNACK says to somebody who may not come in, MQTT 3.1.1's codes first.
NOT_AUTHORIZED_CODES = (4, 5, 0x86, 0x87)
_NAMES = {4: "3.1.1", 5: "5"}


def _unsigned(target: Target) -> str:
    """Make up an access token (RFC 9068) for the probe that has no signature: `alg` is none (RFC 8725, 2.1)."""
    now = int(datetime.now(UTC).timestamp())
    claims = {"iss": "https://nobody.invalid", "sub": target.identity.id, "client_id": target.identity.id}
    claims |= {"aud": f"mqtts://{target.gateway.server_name}", "jti": secrets.token_hex(8)}
    parts = ({"alg": "none", "typ": "at+jwt"}, claims | {"iat": now, "exp": now + 60})
    # Two dots and something behind each: with nothing there a gateway would take it for a password.
    return f"{'.'.join(map(encode_part, parts))}.AA"


def _no_certificate_refused(target: Target) -> Verdict:
    reasons = {"1.2": "handshake failure", "1.3": "certificate required"}
    verdicts = []
    for version in target.gateway.tls_versions:
        seen = probe.handshake(target.mtls, offer=Offer(version, version))
        verdict = alert(seen, reasons[version])
        if verdict.passed and seen.hello is None:
            # The alert of TLS 1.2 for a missing certificate is also the one for a refused offer.
            verdict = Verdict(False, f"refused before a certificate was asked for: {seen}")
        verdicts.append((f"TLS {version}", verdict))
    return joined(verdicts)


def _forgery_refused(pick: Callable[[Target], Mapping[str, Credentials]], *reasons: str) -> Callable[[Target], Verdict]:
    def run(target: Target) -> Verdict:
        verdicts = []
        for label, credentials in pick(target).items():
            for version in target.gateway.tls_versions:
                seen = probe.handshake(target.mtls, credentials, offer=Offer(version, version))
                verdicts.append((f"TLS {version}{label}", alert(seen, *reasons)))
        return joined(verdicts)

    return run


def _certificate_accepted(target: Target) -> Verdict:
    seen = probe.enter(target.mtls, target.certificate)
    return Verdict(seen.accepted, str(seen))


def _password_accepted(target: Target) -> Verdict:
    def look(listener: Listener) -> Verdict:
        seen = probe.enter(listener, target.password)
        return Verdict(seen.accepted, "accepted" if seen.accepted else str(seen))

    return everywhere(target.password_listeners, look)


def _password_refused(pick: Callable[[Target], Credentials]) -> Callable[[Target], Verdict]:
    def run(target: Target) -> Verdict:
        def look(listener: Listener) -> Verdict:
            answers: list[tuple[probe.Version, Answer]] = [
                (version, probe.enter(listener, pick(target), version=version)) for version in (4, 5)
            ]
            for version, answer in answers:
                if not (answer.outcome is Outcome.REFUSED and answer.code in NOT_AUTHORIZED_CODES):
                    return Verdict(False, f"MQTT {_NAMES[version]}: {answer}")
            return Verdict(
                True, f"refused: {answers[-1][1].reason} ({answers[0][1].code} and 0x{answers[1][1].code:02x})"
            )

        return everywhere(target.password_listeners, look)

    return run


def _psk_accepted(target: Target) -> Verdict:
    def look(listener: Listener) -> Verdict:
        verdicts = []
        for version in target.gateway.tls_versions:
            seen = probe.enter(listener, target.psk, offer=Offer(version, version))
            verdicts.append((f"TLS {version}", Verdict(seen.accepted, "accepted" if seen.accepted else str(seen))))
        return joined(verdicts)

    return everywhere(target.psk_listeners, look)


# What an OpenSSL server says: in TLS 1.2 the client's Finished cannot be read, in 1.3 its binder is wrong.
_WRONG_PSK = {"1.2": ("bad record mac", "decrypt error"), "1.3": ("decrypt error", "illegal parameter")}

# In TLS 1.3 it goes on without the key, and has no certificate to go on with.
_UNKNOWN_PSK = {
    # The plugin answers as it answers a wrong key, so that nobody learns which names there are; others say more.
    "1.2": ("unknown psk identity", *_WRONG_PSK["1.2"]),
    "1.3": ("handshake failure", *_WRONG_PSK["1.3"]),
}

# The server has nothing that such a client speaks.
_NO_PSK = {"1.2": ("handshake failure",), "1.3": ("handshake failure",)}


def _psk_refused(
    pick: Callable[[Target], Credentials], reasons: Mapping[str, tuple[str, ...]]
) -> Callable[[Target], Verdict]:
    def run(target: Target) -> Verdict:
        def look(listener: Listener) -> Verdict:
            verdicts = []
            for version in target.gateway.tls_versions:
                seen = probe.handshake(listener, pick(target), offer=Offer(version, version))
                verdicts.append((f"TLS {version}", alert(seen, *reasons[version])))
            return joined(verdicts)

        return everywhere(target.psk_listeners, look)

    return run


def _client_id_bound(target: Target) -> Verdict:
    def refuses(listener: Listener) -> Verdict:
        answers: list[tuple[probe.Version, Answer]] = []
        for version in (4, 5):
            answer = probe.enter(
                listener, target.credentials(listener), client_id=probe.made_up_name(), version=version
            )
            answers.append((version, answer))
            if not (answer.outcome is Outcome.REFUSED and answer.code in NOT_AUTHORIZED_CODES):
                return Verdict(False, f"another client id than the identity's, MQTT {_NAMES[version]}: {answer}")
        return Verdict(True, f"another client id is refused: {answers[-1][1].reason}")

    def replaces(listener: Listener) -> Verdict:
        credentials = target.credentials(listener)
        with (
            Session(listener, credentials, client_id=probe.made_up_name()) as first,
            Session(listener, credentials, client_id=probe.made_up_name()),
        ):
            try:
                goodbye = first.wait_goodbye(2)
            except NothingArrivedError:
                return Verdict(False, "one identity holds two sessions under two client ids")
        return Verdict(True, f"a second client id ends the first's session: {goodbye}")

    # paho's WebSockets client notices the end of a session as the others do, but the broker handles them alike.
    return everywhere(
        target.listeners,
        lambda listener: (refuses if target.binds_client_ids(listener) else replaces)(listener),
    )


def _identity_from_certificate(target: Target) -> Verdict:
    topic = target.own()
    # Nobody's name, so that no device is disturbed should the gateway believe it.
    posing = Credentials(target.identity.certificate, target.identity.key, probe.made_up_name(), None)
    if target.binds_client_ids(target.mtls):
        for client_id in (target.identity.id, posing.client_id):
            answer = probe.enter(target.mtls, posing, client_id=client_id)
            if not (answer.outcome is Outcome.REFUSED and answer.code in NOT_AUTHORIZED_CODES):
                return Verdict(False, f"a user name that is not the certificate's was answered: {answer}")
        return Verdict(True, f"a user name that is not the certificate's is refused: {answer.reason}")
    with Session(target.mtls, posing) as session:
        receipt = session.publish(topic, b"who am I?")
    if receipt.granted:
        return Verdict(True, "a user name beside the certificate changes nothing")
    return Verdict(False, f"a user name beside the certificate took away the probe's rights: {receipt}")


def _has_psk(target: Target) -> bool:
    return target.gateway.psk_port is not None


def has_passwords(target: Target) -> bool:
    """Return whether a gateway has a listener for user names and passwords."""
    return bool(target.password_listeners)


CREDENTIALS: tuple[Check[Target], ...] = (
    Check(AUTHENTICATION, "no certificate is refused", True, _no_certificate_refused),
    Check(
        AUTHENTICATION,
        "a self-signed certificate is refused",
        False,
        _forgery_refused(lambda target: {"": target.forgeries.self_signed}, "unknown ca"),
    ),
    Check(
        AUTHENTICATION,
        "a certificate of a false CA with our names is refused",
        False,
        _forgery_refused(
            lambda target: {"": target.forgeries.false_ca, " with our key id": target.forgeries.copied_key_id},
            "unknown ca",
            "decrypt error",
            "bad certificate",
        ),
    ),
    Check(
        AUTHENTICATION,
        "a revoked certificate is refused as revoked",
        True,
        _forgery_refused(lambda target: {"": target.canary}, "certificate revoked"),
    ),
    Check(AUTHENTICATION, "the probe's certificate is accepted", False, _certificate_accepted, session=True),
    Check(
        AUTHENTICATION,
        "nobody gets in without credentials",
        True,
        _password_refused(lambda _: Credentials()),
        applies=has_passwords,
    ),
    Check(
        AUTHENTICATION,
        "a wrong password is refused",
        False,
        _password_refused(lambda target: Credentials(username=target.identity.id, password=secrets.token_hex(16))),
        session=True,
        applies=has_passwords,
    ),
    Check(
        AUTHENTICATION,
        "an empty password is refused",
        False,
        _password_refused(lambda target: Credentials(username=target.identity.id, password="")),
        session=True,
        applies=has_passwords,
    ),
    Check(
        AUTHENTICATION,
        "a token that nobody signed is refused",
        False,
        _password_refused(lambda target: Credentials(username=target.identity.id, password=_unsigned(target))),
        session=True,
        applies=has_passwords,
    ),
    Check(
        AUTHENTICATION,
        "an unknown user is refused",
        False,
        _password_refused(lambda target: Credentials(username=probe.made_up_name(), password=target.identity.password)),
        applies=has_passwords,
    ),
    Check(
        AUTHENTICATION,
        "the probe's password is accepted",
        False,
        _password_accepted,
        session=True,
        applies=has_passwords,
    ),
    Check(
        AUTHENTICATION,
        "nobody gets in without a pre-shared key",
        True,
        _psk_refused(lambda target: target.certificate, _NO_PSK),
        applies=_has_psk,
    ),
    Check(
        AUTHENTICATION,
        "a wrong pre-shared key is refused",
        True,
        _psk_refused(
            lambda target: Credentials(psk_identity=target.identity.id, psk=secrets.token_bytes(32)), _WRONG_PSK
        ),
        applies=_has_psk,
    ),
    Check(
        AUTHENTICATION,
        "an unknown pre-shared key identity is refused",
        False,
        _psk_refused(
            lambda target: Credentials(psk_identity=probe.made_up_name(), psk=target.identity.psk), _UNKNOWN_PSK
        ),
        applies=_has_psk,
    ),
    Check(
        AUTHENTICATION, "the probe's pre-shared key is accepted", False, _psk_accepted, session=True, applies=_has_psk
    ),
)

IDENTITY: tuple[Check[Target], ...] = (
    Check(AUTHENTICATION, "the client id is bound to the identity", False, _client_id_bound, session=True),
    Check(AUTHENTICATION, "the identity is the certificate's", False, _identity_from_certificate, session=True),
)
