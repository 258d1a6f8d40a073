# SPDX-License-Identifier: Apache-2.0
"""Who connects, says and hears what in a load run, as the generator needs to know it.

- :class:`Plan`, :class:`Player`, :class:`Stream`: what was decided (:mod:`load.planning`); :func:`read_plan` and
  :meth:`Plan.write` carry it to the generator, on whatever machine that runs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bednet.errors import BednetError

if TYPE_CHECKING:
    from pathlib import Path

VERSION = 3
CERTIFICATE, PASSWORD, PSK, TOKEN = "certificate", "password", "psk", "token"
#: How devices can come in; one that has several ways takes the first of these.
WAYS = (CERTIFICATE, PASSWORD, PSK, TOKEN)
TELEMETRY, COMMANDS, ANSWERS, FLOOD, TRESPASS, SLOW = "telemetry", "commands", "answers", "flood", "trespass", "slow"
#: How the file is called, beside the result, by which the generator asks for a restart of the broker.
RESTART = ".restart"
#: What a verdict looks at; what floods, or is read too slowly on purpose, is reported and may be lost.
JUDGED = (TELEMETRY, COMMANDS, ANSWERS)


class PlanError(BednetError):
    """A profile cannot be played on this site; the message says why."""

    code = "load-plan"


@dataclass(frozen=True)
class Gateway:
    """The gateway under load, as the site describes it.

    :ivar websockets: whether devices with passwords speak MQTT over WebSockets in this run.
    """

    name: str
    address: str
    server_name: str
    mtls_port: int
    password_port: int | None
    psk_port: int | None = None
    websockets_port: int | None = None
    websockets: bool = False

    def port(self, way: str, *, bound: bool = True) -> int | None:
        """Return where devices come in that way; None where they cannot.

        :param bound: with tokens that are bound to a certificate, which is shown as well.
        """
        return {
            CERTIFICATE: self.mtls_port,
            PASSWORD: self.websockets_port if self.websockets else self.password_port,
            PSK: self.psk_port,
            TOKEN: self.mtls_port if bound else self.password_port,
        }[way]


@dataclass(frozen=True)
class Stream:
    """One device's messages to one topic.

    :ivar kind: telemetry, commands, answers, flood or trespass.
    :ivar every_s: the time between two messages; 0 for answers, which come when asked.
    :ivar offset_s: when the first is due, after the start.
    :ivar answers: for answers, the numbers of the streams of commands that they answer.
    :ivar audience: who hears it: [whose, qos, how many], where whose is its kind, or slow.
    """

    number: int
    kind: str
    topic: str
    qos: int
    payload_bytes: int
    every_s: float
    offset_s: float
    answers: tuple[int, ...] = ()
    audience: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class Player:
    """A device as it is played.

    :ivar authentication: one of :data:`WAYS`.
    :ivar bundle: the folder with its credentials.
    :ivar connect_at_s: when it connects, after the beginning of the run.
    :ivar subscribe: topic filters, each with its QoS.
    :ivar slow_s: how long it does not read, in each period of twice that; 0 for a good reader.
    :ivar bound: whether its tokens, if it comes in by one, are bound to a certificate.
    """

    id: str
    authentication: str
    bundle: str
    protocol: int
    clean: bool
    connect_at_s: float
    subscribe: tuple[tuple[str, int], ...]
    streams: tuple[Stream, ...]
    slow_s: float = 0.0
    bound: bool = True


@dataclass(frozen=True)
class Plan:
    """All that the generator needs to know.

    :ivar run: a number that is in every payload.
    :ivar generators: how many processes share the players.
    :ivar connect_deadline_s: how long after the last connection was due the load begins without those that have not
        made it.
    :ivar cut_at_s: when every connection breaks, after the warm-up; 0 is never. Each device cuts its own, or, with
        `restart`, whoever started the generator restarts the broker then.
    :ivar renew_every_s: how often devices with tokens renew theirs in the session; 0 is never.
    :ivar token_address: where the token service is reached; empty where its name leads there.
    :ivar drain_s: how long what is under way may take after the last message was due.
    """

    run: int
    site: str
    profile: str
    gateway: Gateway
    ca: str
    duration_s: float
    warmup_s: float
    drain_s: float
    connect_deadline_s: float
    cut_at_s: float
    reconnect_within_s: float
    restart: bool
    players: tuple[Player, ...]
    generators: int = 1
    renew_every_s: float = 0.0
    token_address: str = ""

    @property
    def streams(self) -> list[Stream]:
        """The streams of all players."""
        return [stream for player in self.players for stream in player.streams]

    @property
    def devices(self) -> int:
        """How many play a device; who only watches the broker's own figures is none."""
        return sum(
            bool(player.streams) or any(not heard.startswith("$") for heard, _ in player.subscribe)
            for player in self.players
        )

    @property
    def offered_per_s(self) -> float:
        """How many messages per second are published by schedule."""
        return sum(1 / stream.every_s for stream in self.streams if stream.every_s)

    @property
    def delivered_per_s(self) -> float:
        """How many messages per second the gateway has to deliver for that, answers left out."""
        return sum(
            sum(count for _, _, count in stream.audience) / stream.every_s for stream in self.streams if stream.every_s
        )

    def write(self, path: Path) -> None:
        """Write it as JSON; it names credentials and holds none."""
        path.write_text(json.dumps({"version": VERSION, **asdict(self)}), encoding="utf-8")


def read_plan(path: Path) -> Plan:
    """Read what :meth:`Plan.write` wrote.

    :raises PlanError: when it is no such file.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("version") != VERSION:
            raise PlanError(f"{path}: a plan of another version. Cure: let `bednet load` write it anew.")
        players = tuple(
            Player(
                **{
                    **entry,
                    "subscribe": tuple((name, qos) for name, qos in entry["subscribe"]),
                    "streams": tuple(
                        Stream(
                            **{
                                **stream,
                                "answers": tuple(stream["answers"]),
                                "audience": tuple((a, b, c) for a, b, c in stream["audience"]),
                            }
                        )
                        for stream in entry["streams"]
                    ),
                }
            )
            for entry in data.pop("players")
        )
        return Plan(gateway=Gateway(**data.pop("gateway")), players=players, **data)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise PlanError(f"{path}: not a plan of `bednet load`: {exc!r}") from exc
