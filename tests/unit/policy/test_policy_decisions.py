# SPDX-License-Identifier: Apache-2.0
"""Decisions and the acl_file: what is allowed, what is refused and why, and that Mosquitto will see it the same way.

The acl_file is read back by :class:`Broker`, which follows what Mosquitto 2.0 does (``aclfile__parse`` and
``mosquitto_acl_check_default`` in src/security_default.c, ``acl__check_dollar`` in src/security.c).
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from bednet.acl_file import acl_problems, compile_acl_file
from bednet.errors import SiteError, TopicError
from bednet.policy import Access, Verdict
from bednet.site import Site, decide, failing_tests, load_site

if TYPE_CHECKING:
    from tests.unit.policy.conftest import SiteFolder

PUBLISH, SUBSCRIBE = Access.PUBLISH, Access.SUBSCRIBE


@dataclass
class Broker:
    """Mosquitto 2.0's reading of an acl_file, for clients with a user name."""

    lines: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    @classmethod
    def reading(cls, acl_file: str) -> Broker:
        """Parse; a line that the broker would not take fails the test."""
        broker, user = cls(), None
        for line in acl_file.split("\n"):
            words = line.rstrip(" \t\n\v\f\r")
            if words.startswith("#") or not words:
                continue
            keyword, _, rest = words.lstrip(" ").partition(" ")
            if keyword == "user":
                user = rest.strip(" ")
                continue
            assert keyword == "topic", line
            assert user is not None, "a topic before the first user is for clients without a name"
            word, _, topic = rest.lstrip(" ").partition(" ")
            assert word in ("read", "write", "readwrite", "deny"), line
            topic = topic.strip(" ")
            assert topic, line
            assert topic.count("/") <= 200, line
            listed = broker.lines.setdefault(user, [])
            listed.insert(0 if word == "deny" else len(listed), (word, topic))
        return broker

    def grants(self, user: str, access: Access, topic: str) -> bool:
        """Check a publish, or the delivery of a message."""
        if topic.startswith("$share") or (topic.startswith("$SYS") and access is PUBLISH):
            return False
        wanted = ("write", "readwrite") if access is PUBLISH else ("read", "readwrite")
        for word, pattern in self.lines.get(user, []):
            if (topic[0] == "$") != (pattern[0] == "$") or not topic_matches_sub(pattern, topic):
                continue
            if word == "deny":
                return False
            if word in wanted:
                return True
        return False


def allows(site: Site, device: str, access: Access, topic: str) -> bool:
    return decide(site, device, access, topic).allowed


DEVICES: list[object] = [{"id": "d1", "location": "l1", "roles": ["r"]}]


def site_of(site_folder: SiteFolder, **lists: list[str]) -> Site:
    """A site of one device `d1` whose role has these lists: allow_publish, deny_subscribe, and so on."""
    role: dict[str, Any] = {}
    for name, topics in lists.items():
        effect, access = name.split("_")
        role.setdefault(effect, {})[access] = topics
    site_folder.write_data(devices=DEVICES, roles={"r": role})
    return load_site(site_folder.path)


@pytest.mark.parametrize(
    ("access", "topic", "verdict"),
    [
        (PUBLISH, "a/d1/x", Verdict.ALLOWED),
        (PUBLISH, "a/d1", Verdict.ALLOWED),
        (PUBLISH, "a/d2/x", Verdict.NOT_ALLOWED),
        (PUBLISH, "a", Verdict.NOT_ALLOWED),
        (PUBLISH, "A/d1/x", Verdict.NOT_ALLOWED),
        (PUBLISH, "/a/d1/x", Verdict.NOT_ALLOWED),
        (PUBLISH, "a/d1/secret/x", Verdict.DENIED),
        (PUBLISH, "a/d1/secret", Verdict.DENIED),
        (PUBLISH, "b/x", Verdict.NOT_ALLOWED),
        (PUBLISH, "z/x", Verdict.DENIED),
        (PUBLISH, "$SYS/x", Verdict.NOT_ALLOWED),
        (PUBLISH, "$share/g/a/d1/x", Verdict.NOT_ALLOWED),
        (SUBSCRIBE, "b/#", Verdict.ALLOWED),
        (SUBSCRIBE, "b/+/x", Verdict.ALLOWED),
        (SUBSCRIBE, "b", Verdict.ALLOWED),
        (SUBSCRIBE, "$share/g/b/#", Verdict.ALLOWED),
        (SUBSCRIBE, "c/d/e", Verdict.ALLOWED),
        (SUBSCRIBE, "c/#", Verdict.PARTLY),
        (SUBSCRIBE, "c/+", Verdict.PARTLY),
        (SUBSCRIBE, "c/no", Verdict.DENIED),
        (SUBSCRIBE, "#", Verdict.PARTLY),
        (SUBSCRIBE, "+/#", Verdict.PARTLY),
        (SUBSCRIBE, "$share/g/#", Verdict.PARTLY),
        (SUBSCRIBE, "+/no", Verdict.PARTLY),
        (SUBSCRIBE, "a/d1/x", Verdict.NOT_ALLOWED),
        (SUBSCRIBE, "a/#", Verdict.NOT_ALLOWED),
        (SUBSCRIBE, "$SYS/#", Verdict.NOT_ALLOWED),
        (SUBSCRIBE, "e/+/x", Verdict.DENIED),
    ],
)
def test_a_decision_says_why(site_folder: SiteFolder, access: Access, topic: str, verdict: Verdict) -> None:
    site = site_of(
        site_folder,
        allow_publish=["a/{device.id}/#"],
        deny_publish=["a/+/secret/#", "z/#"],
        allow_subscribe=["b/#", "c/#", "e/+/x"],
        deny_subscribe=["c/no", "e/#"],
    )
    decision = decide(site, "d1", access, topic)
    assert decision.verdict is verdict
    assert decision.allowed is (verdict is Verdict.ALLOWED)
    assert (decision.rule is None) is (verdict is Verdict.NOT_ALLOWED)
    if decision.rule is not None:
        assert str(decision.rule.place) in decision.reason
        assert (decision.rule.effect == "deny") is (verdict is Verdict.DENIED or "c/no" in decision.reason)


def test_a_partly_allowed_filter_names_its_allowed_parts(site_folder: SiteFolder) -> None:
    site = site_of(site_folder, allow_subscribe=["b/#", "c/+"], deny_subscribe=["c/#"])
    assert decide(site, "d1", SUBSCRIBE, "#").parts == ("b/#",)
    assert decide(site, "d1", SUBSCRIBE, "+/x").parts == ("b/x",)


@pytest.mark.parametrize("device", ["d9", "D1", "", "d1 ", "bednet-canary"])
def test_an_unknown_device_may_do_nothing(site_folder: SiteFolder, device: str) -> None:
    site = site_of(site_folder, allow_publish=["#"], allow_subscribe=["#"])
    decision = decide(site, device, PUBLISH, "a")
    assert (decision.allowed, decision.verdict) == (False, Verdict.UNKNOWN_DEVICE)
    assert f"there is no device {device!r}" in decision.reason


def test_a_revoked_device_may_do_nothing_and_has_no_section(site_folder: SiteFolder) -> None:
    revoked = {"id": "d1", "location": "l1", "roles": ["r"], "revoked": "keyCompromise"}
    site_folder.write_data(devices=[revoked], roles={"r": {"allow": {"publish": ["#"], "subscribe": ["#"]}}})
    site = load_site(site_folder.path)
    for access in Access:
        decision = decide(site, "d1", access, "a")
        assert (decision.allowed, decision.verdict) == (False, Verdict.REVOKED)
        assert "revoked: keyCompromise" in decision.reason
    assert "user d1" not in compile_acl_file(site)
    assert site.grants["d1"] == ()


def test_revoking_a_device_does_not_wait_for_the_policys_tests(site_folder: SiteFolder) -> None:
    roles: dict[str, object] = {"r": {"allow": {"publish": ["a"]}}}
    tests: list[object] = [{"device": "d1", "can": {"publish": ["a"]}, "cannot": {"publish": ["b"]}}]
    in_service: dict[str, object] = {"id": "d1", "location": "l1", "roles": ["r"]}
    site_folder.write_data(devices=[in_service], roles={"r": {"allow": {"publish": ["c"]}}}, tests=tests)
    assert [problem.code for problem in failing_tests(load_site(site_folder.path))] == ["test-failed"]
    site_folder.write_data(devices=[{**in_service, "revoked": "keyCompromise"}], roles=roles, tests=tests)
    assert failing_tests(load_site(site_folder.path)) == []


def test_the_probe_may_do_its_own_thing_only(site_folder: SiteFolder) -> None:
    site = site_of(site_folder, allow_publish=["#"], allow_subscribe=["#"])
    broker = Broker.reading(compile_acl_file(site))
    for topic, allowed in (
        ("bednet/probe/own/x", {PUBLISH, SUBSCRIBE}),
        ("bednet/probe/read-only/x", {SUBSCRIBE}),
        ("bednet/probe/write-only/x", {PUBLISH}),
        ("bednet/probe/x", set()),
        ("bednet/x", set()),
        ("a", set()),
        ("$SYS/broker/uptime", set()),
    ):
        for access in Access:
            assert decide(site, "bednet-probe", access, topic).allowed is (access in allowed)
            assert broker.grants("bednet-probe", access, topic) is (access in allowed)


@pytest.mark.parametrize(
    ("access", "topic"), [(PUBLISH, "a/+"), (PUBLISH, ""), (SUBSCRIBE, "a+"), (SUBSCRIBE, "$share/g")]
)
def test_what_is_no_topic_is_not_decided(site_folder: SiteFolder, access: Access, topic: str) -> None:
    site = site_of(site_folder, allow_publish=["#"], allow_subscribe=["#"])
    with pytest.raises(TopicError):
        decide(site, "d1", access, topic)


# The acl_file


def acl_lines(site: Site, device: str = "d1") -> list[str]:
    section = compile_acl_file(site).split(f"user {device}\n")[1].split("\n\n")[0]
    return section.strip().split("\n")


def test_the_acl_file_has_denies_first_and_joins_both_accesses(site_folder: SiteFolder) -> None:
    site = site_of(
        site_folder,
        allow_publish=["b/#", "a"],
        allow_subscribe=["b/#", "c"],
        deny_publish=["b/x"],
        deny_subscribe=["b/x"],
    )
    assert acl_lines(site) == ["topic deny b/x", "topic write a", "topic readwrite b/#", "topic read c"]


def test_the_acl_file_does_not_depend_on_the_order_of_the_files(site_folder: SiteFolder) -> None:
    devices: list[object] = [{"id": f"d{n}", "location": "l", "roles": ["r"]} for n in range(3)]
    role = {"allow": {"publish": ["b", "a"], "subscribe": ["d", "c"]}}
    site_folder.write_data(devices=devices, roles={"r": role})
    one = compile_acl_file(load_site(site_folder.path))
    role = {"allow": {"subscribe": ["c", "d"], "publish": ["a", "b"]}}
    site_folder.write_data(devices=devices[::-1], roles={"r": role})
    assert compile_acl_file(load_site(site_folder.path)) == one
    assert one.startswith("# Access control list for Eclipse Mosquitto 2.0, made by `bednet compile`.\n# Do not edit")


def test_a_deny_that_meets_no_allow_is_left_to_silence(site_folder: SiteFolder) -> None:
    site = site_of(site_folder, allow_subscribe=["a/#"], deny_publish=["a/#"])
    assert acl_lines(site) == ["topic read a/#"]
    assert not allows(site, "d1", PUBLISH, "a/x")


def test_a_deny_is_narrowed_to_what_it_takes_away(site_folder: SiteFolder) -> None:
    site = site_of(site_folder, allow_publish=["a/#"], deny_publish=["+/x"], allow_subscribe=["b/#"])
    assert acl_lines(site) == ["topic deny a/x", "topic write a/#", "topic read b/#"]


@pytest.mark.parametrize(("one", "other"), [("publish", "subscribe"), ("subscribe", "publish")])
def test_a_deny_of_one_access_where_the_other_is_allowed_is_refused(
    site_folder: SiteFolder, one: str, other: str
) -> None:
    lists = {f"allow_{one}": ["a/#"], f"deny_{one}": ["a/x/#"], f"allow_{other}": ["a/+/y"]}
    site = site_of(site_folder, **lists)
    (problem,) = acl_problems(site)
    assert problem.code == "acl-one-sided-deny"
    assert f"role 'r' denies {one} 'a/x/#'" in problem.message
    assert f"role 'r' allows {other} 'a/+/y'" in problem.message
    assert "both hold for 'a/x/y'" in problem.message
    assert "acl_file can only deny both accesses" in problem.message
    assert f"deny {other} there too" in problem.cure
    with pytest.raises(SiteError, match="acl-one-sided-deny"):
        compile_acl_file(site)
    cured = site_of(site_folder, **lists, **{f"deny_{other}": ["a/x/#"]})
    assert acl_problems(cured) == []


def test_a_deny_of_both_accesses_must_hold_for_the_same_topics(site_folder: SiteFolder) -> None:
    both = {"allow_publish": ["a/#"], "allow_subscribe": ["a/#"], "deny_publish": ["a/x/#"]}
    assert [problem.code for problem in acl_problems(site_of(site_folder, **both, deny_subscribe=["a/x/y"]))] == [
        "acl-one-sided-deny"
    ]
    assert acl_lines(site_of(site_folder, **both, deny_subscribe=["a/x/#"])) == [
        "topic deny a/x/#",
        "topic readwrite a/#",
    ]


def test_a_problem_of_many_devices_is_told_once(site_folder: SiteFolder) -> None:
    devices: list[object] = [{"id": f"d{n}", "location": "l", "roles": ["r"]} for n in range(50)]
    role = {"allow": {"publish": ["a/#"], "subscribe": ["a/#"]}, "deny": {"publish": ["a/x"]}}
    site_folder.write_data(devices=devices, roles={"r": role})
    assert [problem.code for problem in acl_problems(load_site(site_folder.path))] == ["acl-one-sided-deny"]


@pytest.mark.parametrize("topic", [" a", "a ", "a/b/ ", " "])
def test_spaces_that_the_broker_would_drop_are_refused(site_folder: SiteFolder, topic: str) -> None:
    (problem,) = acl_problems(site_of(site_folder, allow_publish=[topic]))
    assert problem.code == "acl-space"
    assert "begins or ends with a space" in problem.message
    assert "drops it and would mean another topic" in problem.cure


def test_spaces_within_a_topic_reach_the_broker(site_folder: SiteFolder) -> None:
    site = site_of(site_folder, allow_publish=["a  b/ c"])
    assert Broker.reading(compile_acl_file(site)).grants("d1", PUBLISH, "a  b/ c")


def test_more_levels_than_the_broker_takes_are_refused(site_folder: SiteFolder) -> None:
    assert acl_problems(site_of(site_folder, allow_publish=["/" * 200])) == []
    (problem,) = acl_problems(site_of(site_folder, allow_publish=["/" * 201]))
    assert problem.code == "acl-levels"
    assert "201 '/'; Mosquitto takes 200" in problem.message


def test_percent_signs_are_plain_text(site_folder: SiteFolder) -> None:
    site = site_of(site_folder, allow_publish=["a/%u/%c"])
    assert acl_lines(site) == ["topic write a/%u/%c"]


def test_the_brokers_own_topics_must_be_named(site_folder: SiteFolder) -> None:
    everything = site_of(site_folder, allow_subscribe=["#"])
    assert not Broker.reading(compile_acl_file(everything)).grants("d1", SUBSCRIBE, "$SYS/broker/uptime")
    named = site_of(site_folder, allow_subscribe=["$SYS/broker/#"])
    assert Broker.reading(compile_acl_file(named)).grants("d1", SUBSCRIBE, "$SYS/broker/uptime")
    assert not allows(named, "d1", SUBSCRIBE, "broker/uptime")


# Generated policies

LEVELS = ("a", "b", "{device.id}", "{device.location}", "+")
NAMES = ["/".join(levels) for n in range(1, 5) for levels in itertools.product(("a", "b", "d1", "l1", "z"), repeat=n)]
NAMES += ["$SYS", "$SYS/a", "$share/g/a", "$a/b"]

templates = st.builds(
    lambda levels, tail: "/".join([*levels, *tail]),
    st.lists(st.sampled_from(LEVELS), max_size=3),
    st.sampled_from([[], ["#"]]),
).filter(bool)
topic_lists = st.lists(templates, max_size=3, unique=True)
access_lists = st.fixed_dictionaries(
    {
        "publish": topic_lists,
        "subscribe": st.lists(templates | st.sampled_from(["$SYS/#", "$SYS/+"]), max_size=3, unique=True),
    }
)
roles = st.fixed_dictionaries({"allow": access_lists}, optional={"deny": access_lists})


def model(held: list[dict[str, Any]], device: str, access: Access, name: str) -> bool:
    """The policy in one sentence: some allow matches and no deny does."""

    def says(effect: str) -> bool:
        values = {"{device.id}": device, "{device.location}": "l1"}
        for role in held:
            for template in role.get(effect, {}).get(access, []):
                topic_filter = "/".join(values.get(level, level) for level in template.split("/"))
                if topic_matches_sub(topic_filter, name):
                    return True
        return False

    return says("allow") and not says("deny")


@settings(max_examples=60, deadline=None)
@given(roles, roles, st.lists(st.sampled_from(NAMES), min_size=30, max_size=60, unique=True))
def test_evaluator_model_and_broker_agree(one: dict[str, Any], two: dict[str, Any], names: list[str]) -> None:
    held = {"d1": ["one", "two"], "d2": ["one"]}
    devices = [{"id": name, "location": "l1", "roles": roles_held} for name, roles_held in held.items()]
    both = {"one": one, "two": two}
    with tempfile.TemporaryDirectory() as folder:
        for file, content in (("devices", {"devices": devices}), ("policy", {"roles": both})):
            (Path(folder) / f"{file}.yml").write_text(repr({"version": 1, **content}), encoding="utf-8")
        site = load_site(Path(folder))
    broker = None if acl_problems(site) else Broker.reading(compile_acl_file(site))
    event("refused for acl_file" if broker is None else "compiled")
    for device, name, access in itertools.product(held, names, Access):
        allowed = allows(site, device, access, name) if access is PUBLISH or not name.startswith("$share/") else False
        assert allowed is model([both[role] for role in held[device]], device, access, name)
        if broker is not None:
            assert broker.grants(device, access, name) is allowed


@settings(max_examples=100, deadline=None)
@given(roles, templates)
def test_an_allowed_subscription_delivers_nothing_that_is_refused(role: dict[str, Any], template: str) -> None:
    wanted = template.replace("{device.id}", "d1").replace("{device.location}", "l1")
    with tempfile.TemporaryDirectory() as folder:
        for file, content in (
            ("devices", {"devices": [{"id": "d1", "location": "l1", "roles": ["r"]}]}),
            ("policy", {"roles": {"r": role}}),
        ):
            (Path(folder) / f"{file}.yml").write_text(repr({"version": 1, **content}), encoding="utf-8")
        site = load_site(Path(folder))
    decision = decide(site, "d1", SUBSCRIBE, wanted)
    event(decision.verdict)
    readable = {name for name in NAMES if topic_matches_sub(wanted, name) and model([role], "d1", SUBSCRIBE, name)}
    matching = {name for name in NAMES if topic_matches_sub(wanted, name)}
    if decision.allowed:
        assert readable == matching
    elif decision.verdict is Verdict.PARTLY:
        assert all(any(topic_matches_sub(part, name) for part in decision.parts) for name in readable)
    else:
        assert readable == set()
