# SPDX-License-Identifier: Apache-2.0
"""The checks of TLS and of the server's certificate, wherever it is spoken: :data:`TLS`."""

from __future__ import annotations

import contextlib
import ipaddress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bednet import probe
from bednet.probe import Handshake, Listener, Offer
from bednet.verify.check import ENCRYPTION, Check
from bednet.verify.verdict import Verdict, alert, everywhere, joined

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bednet.verify.target import Doors

_ANY_SUITE = (
    *probe.STRONG_SUITES,
    *probe.CBC_SUITES,
    *probe.STATIC_KEY_SUITES,
    *probe.BROKEN_SUITES,
    *probe.STRONG_PSK_SUITES,
    *probe.CBC_PSK_SUITES,
    *probe.STATIC_PSK_SUITES,
)


def _old_tls_refused(target: Doors) -> Verdict:
    def look(listener: Listener) -> Verdict:
        verdicts = [
            (f"TLS {version}", alert(probe.hello(listener, version, _ANY_SUITE), "protocol version"))
            for version in ("1.0", "1.1", "1.2")
            if version not in target.place.tls_versions
        ]
        if "1.3" not in target.place.tls_versions:
            seen = probe.handshake(listener, target.credentials(listener), offer=Offer("1.3", "1.3"))
            verdicts.append(("TLS 1.3", alert(seen, "protocol version")))
        return joined(verdicts)

    return everywhere(target.listeners, look)


def _suites_refused(with_certificate: Mapping[int, str], with_psk: Mapping[int, str]) -> Callable[[Doors], Verdict]:
    def run(target: Doors) -> Verdict:
        def look(listener: Listener) -> Verdict:
            # All of a family, whatever the listener is for: it takes the first one that it can.
            suites = (*with_certificate, *with_psk)
            if "1.2" in target.place.tls_versions:
                # The control: the same hello with good suites is understood.
                control = probe.hello(listener, "1.2", (*probe.STRONG_SUITES, *probe.STRONG_PSK_SUITES))
                if not control.accepted:
                    return Verdict(False, f"not even a good suite was accepted: {control}")
                seen = probe.hello(listener, "1.2", suites)
                return alert(seen, "handshake failure", "insufficient security")
            return alert(probe.hello(listener, "1.2", suites), "protocol version")

        return everywhere(target.listeners, look)

    return run


def _version_accepted(version: str) -> Callable[[Doors], Verdict]:
    def run(target: Doors) -> Verdict:
        def look(listener: Listener) -> Verdict:
            seen = probe.handshake(listener, target.credentials(listener), offer=Offer(version, version))
            if not (seen.accepted and seen.hello):
                return Verdict(False, str(seen))
            good = seen.hello.version == version and seen.hello.cipher.startswith(("ECDHE-", "DHE-", "TLS_"))
            aead = "GCM" in seen.hello.cipher or "POLY1305" in seen.hello.cipher or "CCM" in seen.hello.cipher
            return Verdict(good and aead, seen.hello.cipher)

        return everywhere(target.listeners, look)

    return run


def _chain_trusted(target: Doors) -> Verdict:
    def look(listener: Listener) -> Verdict:
        seen = probe.handshake(listener, target.credentials(listener))
        if not (seen.accepted and seen.certificate):
            return Verdict(False, str(seen))
        issuer = _common_name(x509.load_der_x509_certificate(seen.certificate).issuer)
        return Verdict(True, f"issued by {issuer}")

    return everywhere(target.with_certificate, look)


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


def _certificate(target: Doors, listener: Listener) -> x509.Certificate | Handshake:
    # Whether it is to be trusted is another check's question.
    seen = probe.handshake(
        Listener(listener.host, listener.port, server_name=listener.server_name), target.credentials(listener)
    )
    return x509.load_der_x509_certificate(seen.certificate) if seen.certificate else seen


def _names_right(target: Doors) -> Verdict:
    def look(listener: Listener) -> Verdict:
        certificate = _certificate(target, listener)
        if isinstance(certificate, Handshake):
            return Verdict(False, str(certificate))
        dns, addresses = _alternative_names(certificate)
        wanted_dns, wanted_addresses = {target.place.server_name}, set()
        if target.has_address:
            try:
                wanted_addresses.add(ipaddress.ip_address(target.place.address))
            except ValueError:
                wanted_dns.add(target.place.address)
        missing = [*sorted(wanted_dns - dns), *map(str, wanted_addresses - addresses)]
        if missing:
            return Verdict(False, f"not in the certificate: {', '.join(missing)}")
        return Verdict(True, ", ".join([*sorted(wanted_dns), *map(str, wanted_addresses)]))

    return everywhere(target.with_certificate, look)


def _alternative_names(
    certificate: x509.Certificate,
) -> tuple[set[str], set[ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set(), set()
    addresses = {
        item
        for item in names.get_values_for_type(x509.IPAddress)
        if isinstance(item, ipaddress.IPv4Address | ipaddress.IPv6Address)
    }
    return set(names.get_values_for_type(x509.DNSName)), addresses


def _server_usage_only(target: Doors) -> Verdict:
    def look(listener: Listener) -> Verdict:
        certificate = _certificate(target, listener)
        if isinstance(certificate, Handshake):
            return Verdict(False, str(certificate))
        try:
            usage = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        except x509.ExtensionNotFound:
            return Verdict(False, "no extended key usage: good for anything")
        if usage != {ExtendedKeyUsageOID.SERVER_AUTH}:
            return Verdict(False, "good for more than a server: " + ", ".join(sorted(oid._name for oid in usage)))
        with contextlib.suppress(x509.ExtensionNotFound):
            if certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
                return Verdict(False, "the server's certificate may issue others")
        return Verdict(True, "server authentication only")

    return everywhere(target.with_certificate, look)


def _still_valid(target: Doors) -> Verdict:
    def look(listener: Listener) -> Verdict:
        certificate = _certificate(target, listener)
        if isinstance(certificate, Handshake):
            return Verdict(False, str(certificate))
        now = datetime.now(UTC)
        left = certificate.not_valid_after_utc - now
        if certificate.not_valid_before_utc > now:
            return Verdict(False, f"not valid before {certificate.not_valid_before_utc:%Y-%m-%d}")
        return Verdict(
            left > timedelta(0),
            f"{left // timedelta(days=1)} days left, until {certificate.not_valid_after_utc:%Y-%m-%d}",
        )

    return everywhere(target.with_certificate, look)


def _speaks(version: str) -> Callable[[Doors], bool]:
    return lambda target: version in target.place.tls_versions


TLS: tuple[Check[Doors], ...] = (
    Check(ENCRYPTION, "TLS versions that are not configured are refused", False, _old_tls_refused),
    Check(
        ENCRYPTION, "broken ciphers are refused", False, _suites_refused(probe.BROKEN_SUITES, probe.BROKEN_PSK_SUITES)
    ),
    Check(ENCRYPTION, "CBC ciphers are refused", False, _suites_refused(probe.CBC_SUITES, probe.CBC_PSK_SUITES)),
    Check(
        ENCRYPTION,
        "ciphers without forward secrecy are refused",
        False,
        _suites_refused(probe.STATIC_KEY_SUITES, probe.STATIC_PSK_SUITES),
    ),
    Check(ENCRYPTION, "TLS 1.2 is spoken with strong ciphers", False, _version_accepted("1.2"), applies=_speaks("1.2")),
    Check(ENCRYPTION, "TLS 1.3 is spoken", False, _version_accepted("1.3"), applies=_speaks("1.3")),
    Check(ENCRYPTION, "the server's certificate chains to the site's CA", False, _chain_trusted),
    Check(ENCRYPTION, "the server's certificate carries its names", False, _names_right),
    Check(ENCRYPTION, "the server's certificate is for servers only", False, _server_usage_only),
    Check(ENCRYPTION, "the server's certificate is valid", False, _still_valid),
)
