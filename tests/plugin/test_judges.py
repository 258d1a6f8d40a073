# SPDX-License-Identifier: Apache-2.0
"""Two judges, one law: Python's decide_by and the plugin's C give the same answer, with the same reason and rule.

Sites, topics, times and addresses are generated. Most cases ask the C code directly, by way of the store that
bednet-store wrote; a smaller number go through a live broker.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import tempfile
import time
import zoneinfo
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from bednet import store, topics
from bednet.errors import Place, TopicError
from bednet.moment import Moment, Window
from bednet.policy import Access, Decision, Effect, Grant, Rule, Verdict, decide_by, fill_in, placeholders
from tests.plugin import judge
from tests.plugin.gateway import password_record
from tests.unit.store import sites

if TYPE_CHECKING:
    from bednet.probe import Session
    from tests.plugin.conftest import Start
    from tests.plugin.gateway import Site

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

    def lines(self, authentication: str = "certificate") -> list[str]:
        names = sorted({name for rule in self.rules for name in placeholders(rule.template)} - {"id"})
        profile = sites.profile("p", *[self._rule(rule, names) for rule in self.rules], names=names)
        if not self.rules:
            profile["rules"] = []
        devices = [
            sites.device(device, "p", authentication, values=[self.values[device][name] for name in names])
            for device in sorted(DEVICES)
        ]
        zones = [{"zone": name, "transitions": TRANSITIONS[name]} for name in ZONES]
        return sites.compiled(devices, [profile], zones)

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
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(0, 6))
    nothing: st.SearchStrategy[tuple[Any, ...]] = st.just(())
    windows = st.one_of(nothing, nothing, st.lists(WINDOWS, min_size=1, max_size=3).map(tuple))
    networks = st.one_of(
        nothing,
        nothing,
        st.lists(st.sampled_from(NETWORKS), min_size=1, max_size=3, unique=True).map(
            lambda texts: tuple(ipaddress.ip_network(text) for text in texts)
        ),
    )
    effects = [Effect.ALLOW, Effect.ALLOW, Effect.DENY]
    rules = tuple(
        a_rule(
            number,
            draw(st.sampled_from(effects)),
            draw(st.sampled_from(list(Access))),
            draw(TEMPLATES),
            draw(windows),
            draw(networks),
        )
        for number in range(count)
    )
    values = {device: {name: draw(st.sampled_from(choices)) for name, choices in VALUES.items()} for device in DEVICES}
    return Case(rules, values)


Question = tuple[str, int, str, int | None, str | None]
"""A device, an access, a topic, Unix seconds, an address."""


@st.composite
def tried(
    draw: st.DrawFn, times: st.SearchStrategy[int | None] = TIMES, count: int = 40
) -> tuple[Case, list[Question]]:
    """A site and questions about it; some of them near to what its rules say, where judges may differ."""
    case = draw(cases())
    questions: list[Question] = []
    for _ in range(count):
        device = draw(st.sampled_from(DEVICES))
        topic = draw(st.one_of(FILTERS, NAMES))
        near = draw(st.booleans())
        if case.rules and near:
            levels = draw(st.sampled_from(case.grants(device))).topic_filter.split("/")
            at = draw(st.integers(0, len(levels) - 1))
            word = draw(st.sampled_from([levels[at], "+", "#", "a"]))
            topic = "/".join([*levels[:at], word] if word == "#" else [*levels[:at], word, *levels[at + 1 :]]) or "a"
        access = draw(st.sampled_from([judge.PUBLISH, judge.SUBSCRIBE, judge.SUBSCRIBE, judge.DELIVER]))
        if access != judge.SUBSCRIBE and draw(st.booleans()):
            topic = topic.replace("+", "a").replace("#", "b")
        questions.append((device, access, topic, draw(times), draw(st.sampled_from(ADDRESSES))))
    return case, questions


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


def test_both_judges_agree_on_thousands_of_cases() -> None:
    answers: dict[str, int] = {}

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(tried())
    @example(
        (
            Case(
                (
                    a_rule(0, Effect.ALLOW, Access.SUBSCRIBE, "#", (), ()),
                    a_rule(1, Effect.DENY, Access.SUBSCRIBE, "a/+", (), ()),
                ),
                {device: {"location": "hall-1", "line": "1"} for device in DEVICES},
            ),
            [("x", judge.SUBSCRIBE, topic, None, None) for topic in ("#", "a/#", "b/#", "+/+", "$SYS/#", "a")],
        )
    )
    def ask(case_and_questions: tuple[Case, list[Question]]) -> None:
        case, questions = case_and_questions
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "store"
            store.Store(path).apply(case.lines(), sites.secrets())
            with judge.Judge(path) as plugin:
                for question in questions:
                    answer = plugin.decide(*question)
                    assert answer == by_python(case, question), question
                    answers[answer[0]] = answers.get(answer[0], 0) + 1

    ask()
    # Agreement on refusals alone would prove little.
    assert sum(answers.values()) >= 5000, answers
    for answer, least in {"allowed": 200, "denied": 100, "not-allowed": 1000, "partly": 20}.items():
        assert answers.get(answer, 0) >= least, answers


@settings(max_examples=3000, deadline=None)
@given(one=FILTERS, other=st.one_of(FILTERS, NAMES))
def test_filters_cover_and_meet_alike(one: str, other: str) -> None:
    def sound(text: str) -> bool:
        try:
            topics.check_filter(text)
        except TopicError:
            return False
        return True

    assert judge.filter_ok(one) is sound(one)
    assert judge.filter_ok(other) is sound(other)
    if sound(one) and sound(other):
        assert judge.covers(one, other) is topics.covers(one, other)
        assert judge.intersection(one, other) == topics.intersection(one, other)


@settings(max_examples=1000, deadline=None)
@given(
    raw=st.one_of(st.binary(max_size=300), st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass"))),
    room=st.integers(6, 400),
)
def test_whatever_a_client_sends_is_a_json_string_in_ascii(raw: bytes, room: int) -> None:
    told = json.loads(f'"{judge.escape(raw, room)}"')
    whole = raw.decode(errors="replace")
    assert told.isprintable() or not whole.isprintable()
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return
    # Cut short or not, what is told is how it begins.
    assert text == told or (told.endswith("\u2026") and text.startswith(told[:-1]))


@pytest.mark.parametrize(("name", "size"), [("temp-1", 6), ("a" * 64, 64)], ids=["short", "as long as can be"])
def test_ids_of_every_length_are_known(tmp_path: Path, name: str, size: int) -> None:
    assert len(name) == size
    store.Store(tmp_path / "store").apply(
        sites.compiled([sites.device(name, "p")], [sites.profile("p", sites.rule("role/s/allow/publish/0", "s/", 0))]),
        sites.secrets(),
    )
    with judge.Judge(tmp_path / "store") as plugin:
        assert plugin.decide(name, judge.PUBLISH, f"s/{name}") == ("allowed", "role/s/allow/publish/0")
        assert plugin.decide(name[:-1], judge.PUBLISH, f"s/{name}") == ("unknown-device", "")


@pytest.mark.parametrize("seconds", [-1, 0, 1])
def test_access_ends_at_the_very_second(tmp_path: Path, seconds: int) -> None:
    until = 1_800_000_000
    store.Store(tmp_path / "store").apply(
        sites.compiled(
            [sites.device("temp-1", "p", until=until)],
            [sites.profile("p", sites.rule("role/s/allow/publish/0", "s/#"))],
        ),
        sites.secrets(),
    )
    with judge.Judge(tmp_path / "store") as plugin:
        reason, _ = plugin.decide("temp-1", judge.PUBLISH, "s/1", until + seconds)
    assert reason == ("allowed" if seconds < 0 else "until")


def test_a_live_broker_decides_the_same(site: Site, start: Start) -> None:
    """The devices stay connected while the site changes under them: they are told what holds at that time."""
    asked = {True: 0, False: 0}
    for device in DEVICES:
        site.passwords[device] = password_record(f"password of {device}")

    with ExitStack() as stack:
        sessions: dict[str, Session] = {}

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
        @given(tried(times=st.none(), count=25))
        def ask(case_and_questions: tuple[Case, list[Question]]) -> None:
            case, questions = case_and_questions
            lines = case.lines(authentication="password")
            site.store.apply(lines, sites.secrets(passwords={name: site.passwords[name] for name in DEVICES}))
            if not sessions:
                gateway = start(listeners=("plain",), options={"audit_rate": "1000"})
                sessions.update({name: stack.enter_context(gateway.session(name, on="plain")) for name in DEVICES})
            for device, access, topic, _, _ in questions:
                if access == judge.DELIVER or not speakable(access, topic):
                    continue
                told = []
                for _ in range(2):
                    # A window may open or close in between.
                    told.append(by_python(case, (device, access, topic, int(time.time()), "127.0.0.1"))[0] == "allowed")
                    if len(told) == 1:
                        if access == judge.PUBLISH:
                            granted = sessions[device].publish(topic, b"x").granted
                        else:
                            granted = sessions[device].subscribe(topic)[0].granted
                assert granted in told, (device, access, topic)
                asked[granted] += 1

        ask()
    assert asked[True] >= 8, asked
    assert asked[False] >= 100, asked


def speakable(access: int, topic: str) -> bool:
    """Say whether it comes as far as the plugin: the broker itself refuses what is malformed, and to write to $SYS."""
    try:
        (topics.check_name if access == judge.PUBLISH else topics.check_filter)(topics.unshare(topic))
    except TopicError:
        return False
    return access == judge.SUBSCRIBE or not topic.startswith("$")
