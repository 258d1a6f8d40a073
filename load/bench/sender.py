# SPDX-License-Identifier: Apache-2.0
"""Publishes at a pace: ``sender.py PORT DEVICE TOPIC PER_SECOND TOTAL [CA CERTIFICATE KEY]``.

It connects, says "ready", reads from its standard input when to begin (time.monotonic()), sends, and says how late its
bursts were (p99, ms). Each payload begins with the message's number, eight bytes, big-endian.
"""

from __future__ import annotations

import contextlib
import math
import struct
import sys
import time
from pathlib import Path

from load.bench import wire
from load.bench.measure import PAYLOAD, Pace


def main(port: str, name: str, topic: str, per_s: str, total: str, *paths: str) -> None:
    """Send it all; the schedule does not wait for a broker that falls behind, and a late burst goes out at once."""
    ca, certificate, key = map(Path, paths) if paths else (None, None, None)
    endpoint, pace = wire.Endpoint(int(port), ca), Pace.of(int(per_s))
    packet = wire.publish(topic, PAYLOAD)
    number = struct.Struct("!Q")
    at = len(packet) - len(PAYLOAD)
    message, late = bytearray(packet), []
    with wire.Client(endpoint, name, endpoint.context(certificate, key)) as client:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        begin = float(sys.stdin.readline())
        for sequence in range(0, int(total), pace.each):
            due = begin + pace.due(sequence)
            while (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            late.append(time.monotonic() - due)
            for offset in range(pace.each):
                number.pack_into(message, at, sequence + offset)
                client.send(message)
        late.sort()
        sys.stdout.write(f"{late[math.ceil(0.99 * len(late)) - 1] * 1000:.3f}\n")
        sys.stdout.flush()
        # Whoever started it ends it, when all has arrived.
        sys.stdin.readline()


if __name__ == "__main__":
    with contextlib.suppress(wire.WireError, OSError):
        main(*sys.argv[1:])
