# SPDX-License-Identifier: Apache-2.0
"""The parts of a token (RFC 7515, 7.1), written and read without a look at its signature."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any


def encode_part(content: object) -> str:
    """Write a header or claims as they stand in a token."""
    return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()


def read_part(text: str) -> dict[str, Any]:
    """Read the header or the claims of a token; of what is none, nothing."""
    try:
        content = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, RecursionError, binascii.Error):
        return {}
    return content if isinstance(content, dict) else {}
