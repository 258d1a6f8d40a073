# SPDX-License-Identifier: Apache-2.0
"""Without the plugin: a live Mosquitto that follows what `bednet compile` writes does what Python's evaluator says.

Policies are generated. Where an acl_file can say what the policy says, each PUBLISH and each delivery must agree with
the evaluator; every SUBSCRIBE is granted, as Mosquitto's acl_file does. With --strictest nothing more than the policy
allows may pass, now or at any other time. Refusals to compile are counted, so that agreement is not bought with them.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bednet.acl_file import acl_problems, compile_acl_file
from bednet.policy import Access
from bednet.site import decide, load_site
from tests.plugin.gateway import Gateway
from tests.plugin.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bednet.site import Site as PolicySite
    from tests.plugin.gateway import Site
    from tests.plugin.pki import Authority

CARRIER = "carrier"
DEVICES = ("d1", "d2")
LEVELS = ("a", "b", "{device.id}", "{device.location}", "+")
NAMES = st.lists(st.sampled_from(("a", "b", "d1", "l1", "z", "", "ä")), min_size=1, max_size=4).map("/".join)
TEMPLATES = st.builds(
    lambda levels, tail: "/".join([*levels, *tail]),
    st.lists(st.sampled_from(LEVELS), max_size=3),
    st.sampled_from([[], ["#"]]),
).filter(bool)
TOPICS = st.lists(TEMPLATES, max_size=3, unique=True)
LISTS = st.fixed_dictionaries({"publish": TOPICS, "subscribe": TOPICS})
ALLOWS = st.one_of(LISTS, st.just({"publish": ["#"], "subscribe": ["#"]}))
# What may be said in an acl_file denies both.
DENIES = st.one_of(LISTS, TOPICS.map(lambda topics: {"publish": topics, "subscribe": topics}))
CONDITIONS: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [
        {},
        {},
        {"from": ["10.0.0.0/8"]},
        {"during": [{"days": ["mon", "sun"], "hours": "06:00-22:00", "zone": "UTC"}]},
    ]
)


@st.composite
def policies(draw: st.DrawFn, *, conditions: bool) -> dict[str, Any]:
    roles = {name: {"allow": draw(ALLOWS), "deny": draw(DENIES)} for name in ("one", "two")}
    policy: dict[str, Any] = {"version": 1, "roles": roles}
    if conditions:
        policy["rules"] = [{"name": "more", "allow": draw(LISTS), "deny": draw(DENIES), **draw(CONDITIONS)}]
    return policy


def site_of(folder: Path, policy: dict[str, Any]) -> PolicySite:
    held = {"d1": ["one", "two"], "d2": ["one"]}
    devices = [{"id": name, "location": "l1", "roles": roles} for name, roles in held.items()]
    for name, content in (("devices", {"version": 1, "devices": devices}), ("policy", policy)):
        # JSON is YAML.
        (folder / f"{name}.yml").write_text(json.dumps(content), encoding="utf-8")
    return load_site(folder)


class Plain(Gateway):
    """A broker with an acl_file instead of the plugin; whoever connects is who it says."""

    @property
    def acl_file(self) -> Path:
        return self.folder / "acl_file"

    def configuration(self) -> str:
        lines = ["allow_anonymous true", f"acl_file {self.acl_file}", "log_dest stderr", "log_type all"]
        return "\n".join([*lines, "user root", f"listener {self.ports['everywhere']}"]) + "\n"

    def follow(self, acl_file: str) -> None:
        """Let the broker follow another file from now on."""
        self.acl_file.write_text(f"{acl_file}\nuser {CARRIER}\ntopic readwrite #\n", encoding="utf-8")
        self.acl_file.chmod(0o600)
        if self._process is None:
            self.start()
        else:
            self.reload()


@pytest.fixture
def broker(tmp_path: Path, site: Site, authority: Authority) -> Iterator[Plain]:
    """A broker that has not begun yet; of the other tests' site and plugin it knows nothing."""
    gateway = Plain(tmp_path, site, authority, listeners=("everywhere",), plugin=tmp_path)
    yield gateway
    gateway.kill()


class Stage:
    """A broker, devices that subscribe to everything, and one that says anything."""

    def __init__(self, broker: Plain, stack: ExitStack) -> None:
        self.broker, self._stack = broker, stack
        self.wires: dict[str, Wire] = {}

    def follow(self, acl_file: str) -> None:
        self.broker.follow(acl_file)
        if not self.wires:
            for device in (*DEVICES, CARRIER):
                self.wires[device] = self._stack.enter_context(Wire(self.broker.ports["everywhere"], device, "x"))
                assert self.wires[device].connect("127.0.0.1", clean=True) == (0, False)
        for device in DEVICES:
            number = self.wires[device].subscribe("#")
            assert self.wires[device].flush() == {number: 0}, "an acl_file grants every SUBSCRIBE"

    def ask(self, names: list[str]) -> dict[tuple[str, Access, str], bool]:
        """Return whether each device may publish to each name, and whether it gets what is published there."""
        told: dict[tuple[str, Access, str], bool] = {}
        for device in DEVICES:
            numbers = {name: self.wires[device].publish(name, b"") for name in names}
            codes = self.wires[device].flush()
            told |= {(device, Access.PUBLISH, name): codes[number] < 0x80 for name, number in numbers.items()}
        tokens = {secrets.token_bytes(8): name for name in names}
        for token, name in tokens.items():
            self.wires[CARRIER].publish(name, token)
        assert all(code < 0x80 for code in self.wires[CARRIER].flush().values())
        for device in DEVICES:
            wire = self.wires[device]
            wire.flush()
            came = {arrival.payload for arrival in wire.arrivals}
            wire.arrivals.clear()
            told |= {(device, Access.SUBSCRIBE, name): token in came for token, name in tokens.items()}
        return told


def allows(site: PolicySite, device: str, access: Access, name: str) -> bool:
    """Say what the evaluator says of a publish or a delivery, at a time and from an address that are not known."""
    return decide(site, device, access, name, delivery=access is Access.SUBSCRIBE).allowed


QUESTIONS = st.lists(NAMES.filter(bool), min_size=25, max_size=25, unique=True)
USUAL: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate]}


@pytest.mark.parametrize(
    ("examples", "least"), [(35, 1000), pytest.param(300, 8000, marks=[pytest.mark.full, pytest.mark.timeout(900)])]
)
def test_a_broker_with_an_acl_file_decides_as_python_does(
    broker: Plain, tmp_path: Path, examples: int, least: int
) -> None:
    count: Counter[str] = Counter()
    with ExitStack() as stack:
        stage = Stage(broker, stack)

        @settings(max_examples=examples, **USUAL)
        @given(policies(conditions=False), QUESTIONS)
        def ask(policy: dict[str, Any], names: list[str]) -> None:
            site = site_of(tmp_path, policy)
            if acl_problems(site):
                count["cannot be said"] += 1
                return
            count["compiled"] += 1
            stage.follow(compile_acl_file(site))
            for question, told in stage.ask(names).items():
                assert told is allows(site, *question), (question, policy)
                count[f"{question[1]} {told}"] += 1

        ask()
    assert sum(count.values()) - count["compiled"] - count["cannot be said"] >= least, count
    for access in Access:
        assert min(count[f"{access} {told}"] for told in (True, False)) >= least // 20, count


@pytest.mark.parametrize(
    ("examples", "least"), [(20, 1000), pytest.param(200, 8000, marks=[pytest.mark.full, pytest.mark.timeout(900)])]
)
def test_the_strictest_acl_file_lets_nothing_pass_that_the_policy_refuses(
    broker: Plain, tmp_path: Path, examples: int, least: int
) -> None:
    """Of a policy with times, networks and one-sided denies, which an acl_file cannot say."""
    count: Counter[str] = Counter()
    with ExitStack() as stack:
        stage = Stage(broker, stack)

        @settings(max_examples=examples, **USUAL)
        @given(policies(conditions=True), QUESTIONS)
        def ask(policy: dict[str, Any], names: list[str]) -> None:
            site = site_of(tmp_path, policy)
            assert not acl_problems(site, strictest=True)
            count["stricter" if acl_problems(site) else "the same"] += 1
            stage.follow(compile_acl_file(site, strictest=True))
            for question, told in stage.ask(names).items():
                assert not told or allows(site, *question), (question, policy)
                count[f"{question[1]} {told}"] += 1

        ask()
    assert count["stricter"] >= examples // 4, count
    assert sum(count.values()) >= least, count
    for access in Access:
        assert min(count[f"{access} {told}"] for told in (True, False)) >= least // 40, count
