# SPDX-License-Identifier: Apache-2.0
"""``python3 -m bednet.token_service``: see :mod:`bednet.token_service.tool`."""

from __future__ import annotations

import sys

from bednet.token_service.tool import main

if __name__ == "__main__":
    sys.exit(main())
