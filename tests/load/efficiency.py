# SPDX-License-Identifier: Apache-2.0
"""Messages for each second of a generator's CPU: `efficiency.py bare|ours PLAN QOS`, in a process of its own.

- :func:`bare`: a loop over paho-mqtt, on its own sockets, without gevent, with nothing counted.
- :func:`ours`: the generator as a load run plays it: schedule, stamps, ledgers and histograms.

Both publish as one device, over TLS with its certificate, as fast as they can; CPU seconds are what counts, so that
other work on the machine does little harm.
"""

from __future__ import annotations

import select
import ssl
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from load.plan import Plan

SECONDS = 2.0
INFLIGHT = 20


def bare(plan: Plan, qos: int) -> float:
    """Return how many messages a bare loop publishes in a second of CPU."""
    import paho.mqtt.client as paho  # noqa: PLC0415 - before anything of gevent's
    from paho.mqtt.enums import CallbackAPIVersion  # noqa: PLC0415

    player = plan.players[0]
    bundle, topic = Path(player.bundle), player.streams[0].topic
    context = ssl.create_default_context(cafile=plan.ca)
    context.check_hostname = False
    context.load_cert_chain(bundle / "certificate.pem", bundle / "key.pem")
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=player.id, protocol=paho.MQTTv5)
    client.tls_set_context(context)
    client.max_inflight_messages_set(INFLIGHT)
    client.connect(plan.gateway.address, plan.gateway.mtls_port)
    while not client.is_connected():
        client.loop(0.1)
    wire = client.socket()
    assert isinstance(wire, ssl.SSLSocket)
    payload = bytes(player.streams[0].payload_bytes)
    count, unanswered = 0, [0]

    def answered(*_: object) -> None:
        unanswered[0] -= 1

    client.on_publish = answered if qos else None
    cpu, end = time.process_time(), time.monotonic() + SECONDS
    while time.monotonic() < end:
        client.publish(topic, payload, qos)
        count += 1
        unanswered[0] += bool(qos)
        while unanswered[0] >= INFLIGHT:
            select.select([wire], [], [], 1)
            client.loop_read()
        if client.want_write():
            select.select([], [wire], [], 1)
            client.loop_write()
    used = time.process_time() - cpu
    client.disconnect()
    return count / used


def ours(plan: Plan) -> float:
    """Return how many messages our generator publishes in a second of CPU."""
    import gevent  # noqa: PLC0415
    from gevent import monkey  # noqa: PLC0415

    # As Locust does.
    monkey.patch_all()
    from load.generator import Generator  # noqa: PLC0415

    generator = Generator(plan, plan.players)
    lives = [gevent.spawn(generator.live, device) for device in generator.devices]
    assert generator.await_connected()
    generator.load()
    tally = generator.finish()
    gevent.killall(lives)
    return sum(tally.sent.values()) / tally.cpu_s


def main() -> None:
    """Print the number."""
    from load.plan import read_plan  # noqa: PLC0415

    kind, file, qos = sys.argv[1:]
    plan = read_plan(Path(file))
    player = plan.players[0]
    # One stream, near to what a busy core can: what is refused for a full queue would cost and not count.
    every_s = 0.000_033 if qos == "0" else 0.000_125
    stream = replace(player.streams[0], qos=int(qos), every_s=every_s, offset_s=0.0, audience=())
    player = replace(player, protocol=5, subscribe=(), streams=(stream,), connect_at_s=0.0)
    plan = replace(plan, players=(player,), warmup_s=0.0, duration_s=SECONDS, drain_s=4.0)
    print(round(bare(plan, int(qos)) if kind == "bare" else ours(plan)))  # noqa: T201 - its only output


if __name__ == "__main__":
    main()
