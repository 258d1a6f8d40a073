# SPDX-License-Identifier: Apache-2.0
"""The checks of what the probe may publish and see at a gateway: :data:`ACCESS_CONTROL`."""

from __future__ import annotations

import contextlib
import secrets
import time
from typing import TYPE_CHECKING

from bednet import probe
from bednet.probe import Listener, NothingArrivedError, Session, Will
from bednet.site import PROBE_OWN, PROBE_READ_ONLY
from bednet.verify.check import ACCESS, Check
from bednet.verify.verdict import Verdict, each_listener, everywhere

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bednet.verify.target import Target

# How often a session is left behind to die before it counts as nothing learnt.
_DEATHS = 3


def _own_topic_works(target: Target) -> Verdict:
    def look(listener: Listener) -> Verdict:
        topic, payload = target.own(), secrets.token_bytes(16)
        with Session(listener, target.credentials(listener)) as session:
            session.subscribe(topic)
            begin = time.monotonic()
            receipt = session.publish(topic, payload)
            if not receipt.granted:
                return Verdict(False, f"publish to {topic} refused: {receipt}")
            session.until(lambda message: message.payload == payload, f"the message on {topic}")
        return Verdict(True, f"published and received, {(time.monotonic() - begin) * 1000:.0f} ms")

    return everywhere(target.listeners, look)


def _said(messages: Sequence[probe.Message]) -> str:
    shown = ", ".join(str(message) for message in messages[:3])
    return shown + (f" and {len(messages) - 3} more" if len(messages) > 3 else "")  # noqa: PLR2004


def _forbidden_publish_refused(target: Target, listener: Listener) -> Verdict:
    with Session(listener, target.credentials(listener)) as session:
        target.watch(session)
        topic = target.unwritable()
        receipt = session.publish(topic, b"bednet verify: this must not arrive")
        arrived = [message for message in session.fence(target.own()) if message.topic == topic]
    if arrived:
        return Verdict(False, f"a forbidden message was delivered: {_said(arrived)}")
    if receipt.code != probe.NOT_AUTHORIZED:
        return Verdict(False, f"a forbidden publish was not refused: {receipt}")
    return Verdict(True, f"{receipt}; a later permitted message arrived, this one did not")


def _forbidden_publish_dropped(target: Target, listener: Listener) -> Verdict:
    with Session(listener, target.credentials(listener), version=4) as session:
        target.watch(session)
        topic = target.unwritable()
        for qos in (0, 1, 2):
            session.publish(topic, b"bednet verify: this must not arrive", qos=qos)
        arrived = [message for message in session.fence(target.own()) if message.topic == topic]
    if arrived:
        return Verdict(False, f"a forbidden message was delivered: {_said(arrived)}")
    return Verdict(True, "QoS 0, 1 and 2 not delivered, though MQTT 3.1.1 acknowledges them")


def _filter_shows_nothing(pick: Callable[[Target, str], str]) -> Callable[[Target, Listener], Verdict]:
    """Return a check that a subscription shows nothing but what the probe may read.

    :param pick: the topic filter, from a topic that the probe may not read.
    """

    def run(target: Target, listener: Listener) -> Verdict:
        topic = target.unreadable()
        topic_filter = pick(target, topic)
        readable = (f"{PROBE_OWN}/", f"{PROBE_READ_ONLY}/")
        with Session(listener, target.credentials(listener)) as session:
            fence = target.own()
            session.subscribe(fence)
            granted = session.subscribe(topic_filter)[0]
            receipt = session.publish(topic, b"bednet verify: this must not arrive")
            arrived = session.fence(fence)
        if not receipt.granted:
            return Verdict(False, f"publish to {topic} refused, so nothing was learnt: {receipt}")
        leaks = [message for message in arrived if not message.topic.startswith(readable)]
        if leaks:
            return Verdict(False, f"{topic_filter} shows {_said(leaks)}")
        if target.gateway.access_control == "plugin" and granted.code != probe.NOT_AUTHORIZED:
            return Verdict(False, f"SUBSCRIBE to {topic_filter} was not refused: {granted}")
        return Verdict(True, f"SUBSCRIBE answered {granted}; nothing forbidden arrived")

    return run


def _plus_signs(_: Target, topic: str) -> str:
    return "/".join("+" for _ in topic.split("/"))


def _forbidden_will_dropped(target: Target, listener: Listener) -> Verdict:
    """Leave a session behind, die, and look in it for the will.

    An identity has one session, so nobody but that session can watch while it dies.
    """

    def dies(topic: str) -> list[probe.Message]:
        will = Will(topic, b"bednet verify: a will")
        name = target.identity.id
        with Session(listener, target.credentials(listener), client_id=name, clean=False, will=will) as session:
            target.watch(session)
            session.die()
        with Session(listener, target.credentials(listener), client_id=name, clean=False, expiry=0) as session:
            if not session.resumed:
                raise NothingArrivedError("the session that was left behind is gone")
            return [message for message in session.fence(target.own()) if message.topic == topic]

    def learns(topic: str) -> list[probe.Message]:
        # A broker that notices late that a WebSocket is gone takes the session that came back for the one that went.
        for _ in range(_DEATHS - 1):
            with contextlib.suppress(NothingArrivedError):
                return dies(topic)
        return dies(topic)

    # Who comes back before the broker has noticed the loss takes over, and the will is not sent.
    if not any(learns(target.own()) for _ in range(_DEATHS)):
        return Verdict(False, "not even a permitted will arrived, so nothing was learnt")
    if arrived := learns(target.unwritable()):
        return Verdict(False, f"a forbidden will was delivered: {_said(arrived)}")
    return Verdict(True, "a permitted will arrived, a forbidden one did not")


def _forbidden_retained_dropped(target: Target, listener: Listener) -> Verdict:
    def stored(topic: str) -> bool:
        with Session(listener, target.credentials(listener)) as session:
            session.publish(topic, b"bednet verify: retained", retain=True)
        with Session(listener, target.credentials(listener)) as session:
            target.watch(session)
            found = [message for message in session.fence(target.own()) if message.topic == topic]
            session.publish(topic, b"", retain=True)
        return bool(found)

    if not stored(target.own()):
        return Verdict(False, "not even a permitted retained message was stored, so nothing was learnt")
    if stored(target.unwritable()):
        return Verdict(False, "a forbidden retained message was stored (and has been removed)")
    return Verdict(True, "a permitted one is stored, a forbidden one is not")


ACCESS_CONTROL: tuple[Check[Target], ...] = (
    Check(ACCESS, "the probe's own topic works", True, _own_topic_works, session=True),
    Check(ACCESS, "a forbidden publish is refused", True, each_listener(_forbidden_publish_refused), session=True),
    Check(
        ACCESS,
        "a forbidden publish of MQTT 3.1.1 is dropped",
        False,
        each_listener(_forbidden_publish_dropped),
        session=True,
    ),
    Check(
        ACCESS,
        "# shows nothing of others",
        False,
        each_listener(_filter_shows_nothing(lambda _, __: "#")),
        session=True,
    ),
    Check(ACCESS, "+ shows nothing of others", False, each_listener(_filter_shows_nothing(_plus_signs)), session=True),
    Check(
        ACCESS,
        "$SYS shows nothing",
        False,
        each_listener(_filter_shows_nothing(lambda _, __: "$SYS/#")),
        session=True,
    ),
    Check(
        ACCESS,
        "a shared subscription shows nothing of others",
        False,
        each_listener(_filter_shows_nothing(lambda _, __: "$share/bednet/#")),
        session=True,
    ),
    Check(
        ACCESS,
        "a forbidden subscription shows nothing",
        False,
        each_listener(_filter_shows_nothing(lambda _, topic: topic)),
        session=True,
    ),
    Check(
        ACCESS, "a will on a forbidden topic is dropped", False, each_listener(_forbidden_will_dropped), session=True
    ),
    Check(
        ACCESS,
        "nothing is retained on a forbidden topic",
        False,
        each_listener(_forbidden_retained_dropped),
        session=True,
    ),
)
