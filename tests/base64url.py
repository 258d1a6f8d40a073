# SPDX-License-Identifier: Apache-2.0
"""base64url without padding (RFC 7515, 2), for all suites.

It is written and read here a second time on purpose: what the service, the client and the plugin make of it is held
against this. Nothing but the standard library is needed, since some suites run where there is little else.
"""

from __future__ import annotations

import base64
import json


def encode(data: bytes) -> str:
    """Return bytes as text."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def encode_part(content: object) -> str:
    """Return the header or the claims of a token; bytes go in as they are."""
    return encode(content if isinstance(content, bytes) else json.dumps(content).encode())


def decode(text: str) -> bytes:
    """Return what :func:`encode` was given."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
