# SPDX-License-Identifier: Apache-2.0
"""Fetch a site's certificate revocation list onto a gateway (RFC 5280 section 5).

Runs on the gateway as a user without rights, from a systemd timer, with the standard library and ``cryptography`` (38
and later) only. The list comes over plain HTTP and is believed for its signature alone (what that user hands on is
looked at once more, with ``--file -``, before it reaches the broker): it goes on only if

- the issuing CA in ``--ca`` signed it,
- it is in force now, and
- its number is not below that of the list that is there: an attacker who replays an older list would bring a revoked
  certificate back to life.

:func:`accept` is the decision; everything around it reads and writes files. With ``--serials`` it says what the list in
use says, as ``bednet-store crl`` wants it: the broker looks at the file in handshakes, and its plugin, which ends
sessions that are open, at the store. A token service has no such file, and is told the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

# A list of 100,000 revoked certificates with their reasons has some 7 MB in PEM.
MAX_BYTES = 16 * 1024 * 1024
TIMEOUT_SECONDS = 20.0
# A gateway without a clock chip may be a little behind the CA that has just signed.
CLOCK_SKEW = timedelta(minutes=5)


# RFC 5280, 5.3.1; those that a store knows. Any other is as good as no reason.
REASONS = (
    "unspecified",
    "keyCompromise",
    "affiliationChanged",
    "superseded",
    "cessationOfOperation",
    "privilegeWithdrawn",
)


class RefusedError(Exception):
    """The list that was fetched is not to be used; the message says why."""


def _utc(moment: datetime | None) -> datetime | None:
    # cryptography before 42 gives UTC without saying so.
    return moment if moment is None or moment.tzinfo else moment.replace(tzinfo=UTC)


def _times(crl: x509.CertificateRevocationList) -> tuple[datetime | None, datetime | None]:
    if hasattr(crl, "next_update_utc"):
        return crl.last_update_utc, crl.next_update_utc
    return _utc(crl.last_update), _utc(crl.next_update)


def _number(crl: x509.CertificateRevocationList) -> int:
    try:
        return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    except x509.ExtensionNotFound:
        raise RefusedError(
            "it has no CRL number (RFC 5280 5.2.3), so an old one could not be told from a new one"
        ) from None


def _load(data: bytes) -> x509.CertificateRevocationList:
    try:
        if data.lstrip().startswith(b"-----BEGIN"):
            return x509.load_pem_x509_crl(data)
        return x509.load_der_x509_crl(data)
    except ValueError as exc:
        raise RefusedError(f"it is not a certificate revocation list: {exc}") from exc


def accept(fetched: bytes, *, ca: bytes, present: bytes | None, now: datetime) -> bytes:
    """Decide whether a fetched list may take the place of the present one.

    :param fetched: the list, DER or PEM.
    :param ca: the site's CA certificates, PEM; one of them must have signed the list.
    :param present: the list in use, DER or PEM; None if there is none yet.
    :param now: an aware datetime.
    :returns: the list to use, PEM; byte for byte the present one if the fetched one has the same number.
    :raises RefusedError: when the fetched list must not be used.
    """
    crl = _signed(fetched, ca)
    last_update, next_update = _times(crl)
    if last_update is None or last_update > now + CLOCK_SKEW:
        raise RefusedError(f"it is not in force before {last_update}; is this gateway's clock right?")
    if next_update is None or next_update <= now:
        raise RefusedError(f"it ran out at {next_update}; does bednet-ca-crl.timer run on the CA host?")
    if present is not None:
        number, present_number = _number(crl), _number(_load(present))
        if number < present_number:
            raise RefusedError(f"it is older (number {number}) than the one in use (number {present_number})")
        if number == present_number:
            return present
    else:
        _number(crl)
    return crl.public_bytes(Encoding.PEM)


def _signed(data: bytes, ca: bytes) -> x509.CertificateRevocationList:
    crl = _load(data)
    signers = [cert for cert in _certificates(ca) if cert.subject == crl.issuer]
    if not any(crl.is_signature_valid(cert.public_key()) for cert in signers):  # type: ignore[arg-type]
        raise RefusedError("no CA of this site signed it")
    return crl


def serials(present: bytes, *, ca: bytes) -> dict[str, object]:
    """Return what a list says, whether or not it is still in force: who was revoked stays so.

    :returns: ``{"crl_number": N, "revoked_serials": {HEX: reason}}``.
    :raises RefusedError: when none of the CA certificates in `ca` signed it, or it has no number.
    """
    crl = _signed(present, ca)
    revoked = {f"{entry.serial_number:040x}": _reason(entry) for entry in crl}
    return {"crl_number": _number(crl), "revoked_serials": revoked}


def _reason(entry: x509.RevokedCertificate) -> str:
    try:
        reason = str(entry.extensions.get_extension_for_class(x509.CRLReason).value.reason.value)
    except x509.ExtensionNotFound:
        return REASONS[0]
    return reason if reason in REASONS else REASONS[0]


def _certificates(pem: bytes) -> list[x509.Certificate]:
    # load_pem_x509_certificates came with cryptography 39; Debian 12 has 38.
    end = b"-----END CERTIFICATE-----"
    return [x509.load_pem_x509_certificate(part + end) for part in pem.split(end) if b"-----BEGIN" in part]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object, **__: object) -> None:
        """Follow none; the redirect's own code is then an error."""


def fetch(url: str) -> bytes:
    """Fetch at most :data:`MAX_BYTES` from an http or https URL.

    :raises RefusedError: when more than that comes.
    :raises OSError: when nothing comes.
    """
    if not url.startswith(("http://", "https://")):
        raise RefusedError(f"{url} is neither an http nor an https URL")
    # No proxy of the environment: the CA host is on the plant's own network. And no redirect: whoever answers there
    # must not choose whom else this gateway talks to.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
    with opener.open(url, timeout=TIMEOUT_SECONDS) as response:
        return _read(response)


def _read(stream: BinaryIO) -> bytes:
    data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise RefusedError(f"it is larger than {MAX_BYTES} bytes")
    return data


def main(argv: list[str] | None = None) -> int:
    """Fetch, decide, write; the exit code is 0 only when ``--output`` holds a list that may be used.

    With ``--serials``: say what is in the list in use.
    """
    parser = argparse.ArgumentParser(description="Fetch a site's certificate revocation list.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--url", help="where to fetch it from")
    source.add_argument("--file", choices=["-"], help="read it from standard input instead")
    source.add_argument("--serials", action="store_true", help="fetch nothing; say as JSON what the list in use says")
    parser.add_argument("--ca", required=True, type=Path, help="the site's CA certificates, PEM")
    parser.add_argument("--present", required=True, type=Path, help="the list in use; with --serials -: on stdin")
    parser.add_argument("--output", type=Path, help="where the list to use is written, PEM; -: on stdout")
    args = parser.parse_args(argv)
    if (args.output is None) is not args.serials:
        parser.error("argument --output: goes with --url and --file, and with nothing else")
    if args.serials:
        return _say_serials(args.present, args.ca)
    if args.present == Path("-"):
        parser.error("argument --present: - goes with --serials only")
    try:
        present = args.present.read_bytes() if args.present.exists() else None
        fetched = fetch(args.url) if args.url else _read(sys.stdin.buffer)
        pem = accept(fetched, ca=args.ca.read_bytes(), present=present, now=datetime.now(UTC))
    except (RefusedError, OSError) as exc:
        whence = args.url or "standard input"
        sys.stderr.write(f"The list from {whence} is not used: {exc}. The broker keeps the one it has.\n")
        return 1
    if args.output == Path("-"):
        sys.stdout.buffer.write(pem)
        sys.stdout.buffer.flush()
        return 0
    scratch = args.output.with_suffix(".new")
    with scratch.open("wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(args.output)
    return 0


def _say_serials(present: Path, ca: Path) -> int:
    try:
        data = _read(sys.stdin.buffer) if present == Path("-") else present.read_bytes()
        told = serials(data, ca=ca.read_bytes())
    except (RefusedError, OSError) as exc:
        sys.stderr.write(f"The list {present} is not handed on: {exc}. What was known before stays.\n")
        return 1
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
