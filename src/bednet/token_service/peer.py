# SPDX-License-Identifier: Apache-2.0
"""Who is at the other end of the TLS connection, as nginx tells it.

- :func:`certificate_of`: the verified client certificate of a request.

nginx sets two headers on each request, ``X-Bednet-Client-Verify`` and ``X-Bednet-Client-Cert``, and so takes the place
of whatever a client sends under these names. They are believed only when they come through the Unix socket, which
nobody but nginx may open, and only when they fit together; all else is a refusal, and never "no certificate".
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from bednet.token_service import jose
from bednet.token_service.certified import serial_text
from bednet.token_service.config import DEVICE_ID

if TYPE_CHECKING:
    from collections.abc import Mapping

VERIFY, CERTIFICATE, ADDRESS = (
    "HTTP_X_BEDNET_CLIENT_VERIFY",
    "HTTP_X_BEDNET_CLIENT_CERT",
    "HTTP_X_BEDNET_CLIENT_ADDRESS",
)
SOCKET = "gunicorn.socket"
LONGEST = 16_384
LONGEST_ADDRESS = 45


class PeerRefused(Exception):  # noqa: N818 - a refusal is an answer
    """The request claims a certificate in a way that nginx would not.

    :ivar reason: for the log.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Certificate:
    """A client certificate that nginx has verified.

    :ivar subject: its common name, the id of a device or person.
    :ivar serial: as the database has it.
    :ivar x5t: the ``x5t#S256`` of tokens that are bound to it (RFC 8705, 3.1).
    """

    subject: str
    serial: str
    x5t: str


def is_trusted(environ: Mapping[str, Any]) -> bool:
    """Say whether a request came through the Unix socket."""
    family = getattr(environ.get(SOCKET), "family", None)
    return family == socket.AF_UNIX


def address_of(environ: Mapping[str, Any]) -> str | None:
    """Return the client's address, as nginx tells it."""
    text = str(environ.get(ADDRESS, ""))
    return (
        text
        if is_trusted(environ) and 0 < len(text) <= LONGEST_ADDRESS and text.isascii() and text.isprintable()
        else None
    )


def certificate_of(environ: Mapping[str, Any]) -> Certificate | None:
    """Return the verified client certificate of a request; None when it came without one.

    :raises PeerRefused: when the headers cannot be nginx's, or the certificate names nobody.
    """
    verify, text = str(environ.get(VERIFY, "")), str(environ.get(CERTIFICATE, ""))
    if not verify and not text:
        return None
    if not is_trusted(environ):
        raise PeerRefused("certificate-header-untrusted")
    # A header that was sent twice arrives joined by a comma, which neither value can have.
    if "," in verify or "," in text:
        raise PeerRefused("certificate-header-twice")
    if verify == "NONE" and not text:
        return None
    if verify != "SUCCESS":
        raise PeerRefused("certificate-not-verified")
    if not text or len(text) > LONGEST:
        raise PeerRefused("certificate-header-malformed")
    try:
        pem = unquote(text, errors="strict").encode("ascii")
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except ValueError:
        raise PeerRefused("certificate-header-malformed") from None
    if pem.count(b"-----BEGIN") != 1:
        raise PeerRefused("certificate-header-malformed")
    subject = names[0].value if len(names) == 1 else ""
    if not isinstance(subject, str) or not DEVICE_ID.fullmatch(subject):
        raise PeerRefused("certificate-subject")
    x5t = jose.encode(certificate.fingerprint(hashes.SHA256()))
    return Certificate(subject, serial_text(certificate.serial_number), x5t)
