# SPDX-License-Identifier: Apache-2.0
"""The certificates of devices that sign their requests, as the site's CA hands them over.

- :func:`load`: reads them.
- :class:`Certified`: a key, and how long it is one.
- :func:`serial_text`: a certificate's serial number as the database has it.

That the CA signed them is for the role to see to, which brings them from the CA itself.
"""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.oid import NameOID

from bednet.token_service import jose

if TYPE_CHECKING:
    from bednet.token_service.jose import PublicKey

_PEM_LAST_LINE = "-----END CERTIFICATE-----"
_PEM_END = re.compile(rf"(?<=\n){_PEM_LAST_LINE}(?:\n|$)")


@dataclass(frozen=True)
class Certified:
    """A device's key.

    :ivar serial: the certificate's, as the database has it.
    :ivar not_after: the last second in which it is good, in unix seconds.
    """

    key: PublicKey
    serial: str
    not_after: int


def load(device: str, pem: str) -> tuple[Certified, ...]:
    """Read a device's certificates in PEM, one after the other, at least one.

    :raises jose.JoseError: when it is anything else, one of them is another's, or has a key of no kind that may be
        used here (``key``).
    """
    *blocks, rest = _PEM_END.split(pem)
    if not blocks or rest.strip():
        raise jose.JoseError("key", "it is no certificate in PEM")
    return tuple(_load_one(device, f"{block}{_PEM_LAST_LINE}\n") for block in blocks)


def _load_one(device: str, pem: str) -> Certified:
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        key: Any = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise jose.JoseError("key", "it is no certificate in PEM, or its key is of no kind that is known") from None
    if [name.value for name in names] != [device]:
        raise jose.JoseError("key", "the certificate is another's")
    jose.algorithms_of(key)
    return Certified(key, serial_text(certificate.serial_number), int(_not_after(certificate).timestamp()))


def _not_after(certificate: x509.Certificate) -> dt.datetime:
    # cryptography before 42, as Debian 12 has it, gives UTC without saying so.
    if hasattr(certificate, "not_valid_after_utc"):
        return certificate.not_valid_after_utc
    return certificate.not_valid_after.replace(tzinfo=dt.UTC)


def serial_text(number: int) -> str:
    """Return a certificate's serial number as the database has it."""
    return f"{number:x}"
