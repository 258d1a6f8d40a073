# SPDX-License-Identifier: Apache-2.0
"""amqtt behind TLS with client certificates: amqtt_broker.py PORT CERTIFICATE KEY CA."""

from __future__ import annotations

import asyncio
import logging
import sys

from amqtt.broker import Broker  # type: ignore[import-not-found]


async def serve(port: str, certificate: str, key: str, ca: str) -> None:
    """Run it until the process is ended."""
    listener = {"type": "tcp", "bind": f"127.0.0.1:{port}", "max_connections": 5000, "ssl": True}
    listener |= {"certfile": certificate, "keyfile": key, "cafile": ca}
    anonymous = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
    await Broker({"listeners": {"default": listener}, "plugins": anonymous}).start()
    await asyncio.Event().wait()


logging.basicConfig(level=logging.ERROR)
asyncio.run(serve(*sys.argv[1:]))
