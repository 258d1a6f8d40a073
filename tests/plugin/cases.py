# SPDX-License-Identifier: Apache-2.0
"""What both judges are asked: generated sites, and questions near to what their rules say, where judges may differ.

- :func:`tried`: a :class:`Case`, which is a site, and questions about it.
- :func:`by_python`: what Python's evaluator says, in the plugin's words.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import zoneinfo
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from bednet.errors import Place, TopicError
from bednet.moment import Moment, Window
from bednet.policy import Access, Decision, Effect, Grant, Rule, Verdict, decide_by, fill_in, placeholders
from tests.plugin import judge
from tests.unit.store import sites

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BEGIN_OF_TIME = -62135596800
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe", "Africa/Casablanca")
DEVICES = ("temp-1", "hmi-2", "x")
VALUES = {"location": ("hall-1", "hall-2"), "line": ("1", "2", "a b")}
NETWORKS = (
    "10.0.0.0/8",
    "10.20.1.0/24",
    "10.20.1.5/32",
    "0.0.0.0/0",
    "2001:db8::/32",
    "2001:db8::1/128",
    "::/0",
    "10.64.0.0/10",
)
ADDRESSES = (
    None,
    "10.20.1.5",
    "10.20.2.5",
    "10.127.255.255",
    "192.168.1.1",
    "2001:db8::1",
    "2001:db9::1",
    "::ffff:10.20.1.5",
)
WORDS = ("a", "b", "temp-1", "hall-1", "$SYS", "")
VERDICTS = {
    Verdict.ALLOWED: "allowed",
    Verdict.DENIED: "denied",
    Verdict.NOT_ALLOWED: "not-allowed",
    Verdict.PARTLY: "partly",
}


def transitions(name: str) -> list[tuple[int, int]]:
    """Return a zone's changes, found otherwise than bednet.compiled finds them: hour by hour, for few years."""
    zone = zoneinfo.ZoneInfo(name)
    at = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    found = [(BEGIN_OF_TIME, int((at.astimezone(zone).utcoffset() or dt.timedelta()).total_seconds()))]
    while at.year < 2028:
        at += dt.timedelta(minutes=30)
        offset = int((at.astimezone(zone).utcoffset() or dt.timedelta()).total_seconds())
        if offset != found[-1][1]:
            found.append((int(at.timestamp()), offset))
    return found


TRANSITIONS = {name: transitions(name) for name in ZONES}
# Around what makes a difference: every change of the clocks, midnights, and the edges of hours.
TURNS = sorted({second for pairs in TRANSITIONS.values() for second, _ in pairs if second > 0})
TIMES = st.one_of(
    st.none(),
    st.builds(lambda turn, delta: turn + delta, st.sampled_from(TURNS), st.integers(-7200, 7200)),
    st.builds(
        lambda turn, delta: turn + delta, st.sampled_from(TURNS), st.sampled_from([-3601, -3600, -1, 0, 1, 3599, 3600])
    ),
    st.integers(1704067200 + 86400, 1830297600 - 86400),
)
SECONDS = st.one_of(st.sampled_from([0, 1, 3600, 7200, 10800, 21600, 79200, 86399]), st.integers(0, 86399))
WINDOWS = st.builds(
    Window,
    st.one_of(st.just(frozenset(range(7))), st.frozensets(st.integers(0, 6), min_size=1)),
    SECONDS,
    st.one_of(SECONDS, st.just(86400)),
    st.sampled_from(ZONES),
)
LEVELS = st.one_of(st.sampled_from((*WORDS, "+", "{device.id}", "{device.location}", "{device.line}")), st.just("+"))
TEMPLATES = st.builds(
    lambda levels, end: "/".join([*levels, *end]),
    st.lists(LEVELS, min_size=0, max_size=4),
    st.sampled_from([[], ["#"]]),
).filter(bool)
NAMES = st.lists(st.sampled_from((*WORDS, "hmi-2", "1", "ä")), min_size=1, max_size=4).map("/".join).filter(bool)
FILTERS = st.builds(
    lambda share, levels, end: share + "/".join([*levels, *end]),
    st.sampled_from(["", "", "", "", "$share/g/", "$share//", "$share/", "$sharex/"]),
    st.lists(st.sampled_from((*WORDS, "hmi-2", "1", "+", "+", "a+", "#x")), max_size=4),
    st.sampled_from([[], [], ["#"]]),
).filter(bool)


@dataclass(frozen=True)
class Case:
    """A generated site.

    :ivar values: by device, what stands for each placeholder.
    """

    rules: tuple[Rule, ...]
    values: dict[str, dict[str, str]]

    def lines(self, authentication: str = "certificate", others: Mapping[str, list[Any]] | None = None) -> list[str]:
        """Return it compiled.

        :param others: devices with rules of their own, as a compiled site has them.
        """
        others = others or {}
        names = sorted({name for rule in self.rules for name in placeholders(rule.template)} - {"id"})
        profile = sites.profile("p", *[self._rule(rule, names) for rule in self.rules], names=names)
        profile["rules"] = profile["rules"] if self.rules else []
        devices = [
            sites.device(device, "p", authentication, values=[self.values[device][name] for name in names])
            for device in DEVICES
            if device not in others
        ]
        devices += [sites.device(device, f"own-{device}", authentication) for device in others]
        zones = [{"zone": name, "transitions": TRANSITIONS[name]} for name in ZONES]
        profiles = [profile, *(sites.profile(f"own-{device}", *rules) for device, rules in others.items())]
        return sites.compiled(sorted(devices, key=lambda device: device["device"]), profiles, zones)

    @staticmethod
    def _rule(rule: Rule, names: list[str]) -> dict[str, Any]:
        # The template in pieces: what is in braces becomes the number of its placeholder.
        topic: list[str | int] = []
        for number, piece in enumerate(rule.template.replace("}", "{").split("{")):
            if number % 2:
                name = piece.removeprefix("device.")
                topic.append(0 if name == "id" else names.index(name) + 1)
            elif piece:
                topic.append(piece)
        during = [
            {"days": sum(1 << day for day in w.days), "from": w.start, "to": w.end, "zone": w.zone} for w in rule.during
        ]
        return {
            "id": rule.id,
            "effect": str(rule.effect),
            "access": str(rule.access),
            "topic": topic,
            "during": during,
            "networks": [str(network) for network in rule.networks],
        }

    def grants(self, device: str) -> list[Grant]:
        values = {"id": device, **self.values[device]}
        return [Grant(rule, fill_in(rule.template, values)) for rule in self.rules]


def a_rule(number: int, effect: Effect, access: Access, template: str, during: Any, networks: Any) -> Rule:
    return Rule(
        f"role/r/{effect}/{access}/{number}",
        "role 'r'",
        effect,
        access,
        template,
        Place("p", 1),
        during,
        networks,
    )


@st.composite
def cases(draw: st.DrawFn, among: Sequence[str] = NETWORKS) -> Case:
    nothing: st.SearchStrategy[tuple[Any, ...]] = st.just(())
    windows = st.one_of(nothing, nothing, st.lists(WINDOWS, min_size=1, max_size=3).map(tuple))
    networks = st.one_of(
        nothing,
        st.lists(st.sampled_from(among), min_size=1, max_size=3, unique=True).map(
            lambda texts: tuple(ipaddress.ip_network(text) for text in texts)
        ),
    )
    effects = st.sampled_from([Effect.ALLOW, Effect.ALLOW, Effect.DENY])
    drawn = [
        (draw(effects), draw(st.sampled_from(list(Access))), draw(TEMPLATES), draw(windows), draw(networks))
        for _ in range(draw(st.integers(0, 6)))
    ]
    # Where nothing is allowed, no deny is of interest.
    for access in draw(st.sampled_from([[], [Access.SUBSCRIBE], list(Access)])):
        drawn.append((Effect.ALLOW, access, "#", draw(windows), draw(networks)))
    rules = tuple(a_rule(number, *parts) for number, parts in enumerate(drawn))
    values = {device: {name: draw(st.sampled_from(choices)) for name, choices in VALUES.items()} for device in DEVICES}
    return Case(rules, values)


@st.composite
def edges(draw: st.DrawFn, case: Case) -> int | None:
    """Make a time at which a window of a site opens or closes, or a second off; any other where it has none."""
    windows = [window for rule in case.rules for window in rule.during]
    at = draw(TIMES)
    if at is None or not windows or not draw(st.sampled_from([True, True, False])):
        return at
    window = draw(st.sampled_from(windows))
    day = dt.datetime.fromtimestamp(at, zoneinfo.ZoneInfo(window.zone)).replace(hour=0, minute=0, second=0)
    while day.weekday() not in window.days:
        day += dt.timedelta(days=1)
    edge = draw(st.sampled_from([window.start, window.end])) + draw(st.sampled_from([-1, 0, 0, 1]))
    # On the wall: a day is not always 24 hours long.
    return int((day + dt.timedelta(seconds=edge)).timestamp())


Question = tuple[str, int, str, int | None, str | None]
"""A device, an access, a topic, Unix seconds, an address."""


@st.composite
def questions_about(
    draw: st.DrawFn,
    case: Case,
    times: st.SearchStrategy[int | None] | None = None,
    addresses: Sequence[str | None] = ADDRESSES,
    count: int = 40,
) -> list[Question]:
    """Make questions about a site; some of them near to what its rules say."""
    questions: list[Question] = []
    times = edges(case) if times is None else times
    conditional = [rule for rule in case.rules if rule.conditional] or list(case.rules)
    for _ in range(count):
        device = draw(st.sampled_from(DEVICES))
        topic = draw(st.one_of(FILTERS, NAMES))
        access = draw(st.sampled_from([judge.PUBLISH, judge.SUBSCRIBE, judge.SUBSCRIBE, judge.DELIVER]))
        how = draw(st.sampled_from(["made up", "near", "at it", "at it"])) if case.rules else "made up"
        if how == "near":
            levels = draw(st.sampled_from(case.grants(device))).topic_filter.split("/")
            at = draw(st.integers(0, len(levels) - 1))
            word = draw(st.sampled_from([levels[at], "+", "#", "a"]))
            topic = "/".join([*levels[:at], word] if word == "#" else [*levels[:at], word, *levels[at + 1 :]]) or "a"
        elif how == "at it":
            # What a rule speaks of, so that it depends on its conditions.
            rule = draw(st.sampled_from(conditional))
            topic = fill_in(rule.template, {"id": device, **case.values[device]})
            ways = [judge.PUBLISH] if rule.access is Access.PUBLISH else [judge.SUBSCRIBE, judge.DELIVER]
            access = draw(st.sampled_from(ways))
        if access != judge.SUBSCRIBE and (how == "at it" or draw(st.booleans())):
            topic = topic.replace("+", "a").replace("#", "b")
        questions.append((device, access, topic, draw(times), draw(st.sampled_from(addresses))))
    return questions


@st.composite
def tried(draw: st.DrawFn) -> tuple[Case, list[Question]]:
    """Make a site and questions about it."""
    case = draw(cases())
    return case, draw(questions_about(case))


def by_python(case: Case, question: Question) -> tuple[str, str]:
    """Return what Python says, in the plugin's words."""
    device, access, topic, at, address = question
    moment = Moment(
        None if at is None else dt.datetime.fromtimestamp(at, dt.UTC),
        None if address is None else ipaddress.ip_address(address),
    )
    try:
        decision: Decision = decide_by(
            case.grants(device),
            Access.PUBLISH if access == judge.PUBLISH else Access.SUBSCRIBE,
            topic,
            moment,
            delivery=access == judge.DELIVER,
        )
    except TopicError:
        return "not-allowed", ""
    return VERDICTS[decision.verdict], decision.rule.id if decision.rule else ""
