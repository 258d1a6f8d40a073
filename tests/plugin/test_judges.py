# SPDX-License-Identifier: Apache-2.0
"""Two judges, one law: Python's decide_by and the plugin's C give the same answer, with the same reason and rule.

Sites, topics, times and addresses are generated. Here the C code is asked directly, by way of the store that
bednet-store wrote; test_live_judges.py asks it through a live broker.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bednet import store, topics
from bednet.errors import TopicError
from bednet.policy import Access, Effect
from tests.plugin import judge
from tests.plugin.cases import DEVICES, FILTERS, NAMES, Case, Question, a_rule, by_python, tried
from tests.unit.store import sites


@pytest.mark.parametrize(
    ("examples", "share"),
    [pytest.param(100, 0.4), pytest.param(600, 2.4, marks=[pytest.mark.full, pytest.mark.timeout(900)])],
)
def test_both_judges_agree_on_thousands_of_cases(examples: int, share: float) -> None:
    answers: dict[str, int] = {}

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
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
    assert sum(answers.values()) >= 5000 * share, answers
    for answer, least in {"allowed": 200, "denied": 100, "not-allowed": 1000, "partly": 20}.items():
        assert answers.get(answer, 0) >= least * share, answers


@pytest.mark.parametrize("examples", [1000, pytest.param(10000, marks=pytest.mark.full)])
def test_filters_cover_and_meet_alike(examples: int) -> None:
    def sound(text: str) -> bool:
        try:
            topics.check_filter(text)
        except TopicError:
            return False
        return True

    @settings(max_examples=examples, deadline=None)
    @given(one=FILTERS, other=st.one_of(FILTERS, NAMES))
    def ask(one: str, other: str) -> None:
        assert judge.filter_ok(one) is sound(one)
        assert judge.filter_ok(other) is sound(other)
        if sound(one) and sound(other):
            assert judge.covers(one, other) is topics.covers(one, other)
            assert judge.intersection(one, other) == topics.intersection(one, other)

    ask()


RAW = st.one_of(st.binary(max_size=300), st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass")))


@pytest.mark.parametrize("examples", [300, pytest.param(3000, marks=pytest.mark.full)])
def test_whatever_a_client_sends_is_a_json_string_in_ascii(examples: int) -> None:
    settings(max_examples=examples, deadline=None)(given(raw=RAW, room=st.integers(6, 400))(_told_in_ascii))()


def _told_in_ascii(raw: bytes, room: int) -> None:
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
