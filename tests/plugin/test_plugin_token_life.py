# SPDX-License-Identifier: Apache-2.0
"""What a token permits while it lasts, and what becomes of its session, its will and its queue when it ends."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from bednet.probe import Will
from tests.plugin.clock import Clock
from tests.plugin.gateway import allow
from tests.plugin.tokens import ADMINISTRATIVE, MINUTE, TokenSite, guest, scope, shown, thumbprint, token_site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.plugin.conftest import Start
    from tests.plugin.gateway import Gateway
    from tests.plugin.pki import Authority


@pytest.fixture
def site(tmp_path: Path) -> TokenSite:
    """A site whose devices use tokens."""
    return token_site(tmp_path / "store")


@pytest.fixture
def gateway(start: Start) -> Gateway:
    """A broker that shows itself on a plain listener."""
    return start(listeners=("plain",), options={"login_failures": "1000"})


@pytest.fixture
def timed(start: Start, tmp_path: Path) -> Iterator[tuple[Gateway, Clock]]:
    """A broker whose clock stands where the test has set it."""
    with Clock(tmp_path) as clock:
        clock.set(int(time.time()))
        options = {"login_failures": "1000"}
        gateway = start(
            listeners=("plain",), preload=str(clock.library), environment=clock.environment, options=options
        )
        yield gateway, clock


# --- scope and policy: both must allow it


def test_a_scope_that_is_narrower_than_the_policy_holds(site: TokenSite, gateway: Gateway) -> None:
    narrow = scope(("sensors/tok-1/t", ["pub"]), ("commands/tok-1/+", ["sub"]))
    with (
        guest(gateway, site.issuers[0].token("tok-1", scope=narrow), "tok-1") as session,
        guest(gateway, site.issuers[0].token("tok-2"), "tok-2") as other,
    ):
        assert session.publish("sensors/tok-1/t", b"1").granted
        assert not session.publish("sensors/tok-1/u", b"1").granted
        assert gateway.audited(action="publish", device="tok-1", reason="token-scope")["topic"] == "sensors/tok-1/u"
        assert session.subscribe("commands/tok-1/a")[0].granted
        assert session.subscribe("commands/tok-1/+")[0].granted
        for wider in ("commands/tok-1/#", "commands/tok-1/a/b", "sensors/tok-1/t", "$share/g/commands/tok-1/#"):
            assert not session.subscribe(wider)[0].granted
            gateway.audited(action="subscribe", device="tok-1", reason="token-scope", topic=wider)
        assert session.subscribe("$share/g/commands/tok-1/+")[0].granted
        # No scope at all: only the policy says what the other one may do.
        assert other.publish("sensors/tok-2/u", b"1").granted


def test_a_scope_that_is_wider_than_the_policy_gives_nothing(site: TokenSite, gateway: Gateway) -> None:
    with guest(gateway, site.issuers[0].token("tok-1"), "tok-1") as session:
        assert not session.publish("sensors/tok-2/t", b"1").granted
        gateway.audited(device="tok-1", reason="not-allowed", topic="sensors/tok-2/t")
        assert not session.publish("sensors/tok-1/raw/t", b"1").granted
        gateway.audited(device="tok-1", reason="denied", topic="sensors/tok-1/raw/t")
        assert not session.subscribe("#")[0].granted


def test_an_empty_scope_permits_nothing(site: TokenSite, gateway: Gateway) -> None:
    """RFC 9431, 2.3."""
    with guest(gateway, site.issuers[0].token("tok-1", scope=scope()), "tok-1") as session:
        assert not session.publish("sensors/tok-1/t", b"1").granted
        assert not session.subscribe("sensors/tok-1/#")[0].granted
    gateway.audited(device="tok-1", reason="token-scope", action="subscribe")


def test_a_scope_does_not_limit_tokens_of_issuers_that_the_policy_limits(site: TokenSite, gateway: Gateway) -> None:
    issuer = site.issuers[1]
    claims: dict[str, Any] = {"aud": "mqtt-broker", "realm_access": {"roles": "plant-reader"}}
    token = issuer.token("x", azp="a", scope=scope(("nothing", ["sub"])), **claims)
    with guest(gateway, token, "kc-a") as session:
        assert session.subscribe("halls/1")[0].granted


# --- the end


@pytest.mark.parametrize("leeway", [0, 30])
def test_messages_are_refused_from_the_second_of_the_end(
    site: TokenSite, timed: tuple[Gateway, Clock], leeway: int
) -> None:
    """In both directions; and the connection is closed, without its will. The leeway counts here as to come in."""
    site.issuers[0].line["leeway"] = leeway
    gateway, clock = timed
    second = int(time.time())
    clock.set(second)
    token = site.issuers[0].token("tok-1", iat=second, exp=second + 10)
    watcher = site.issuers[0].token("tok-2", iat=second, exp=second + 10 * MINUTE)
    site.profiles["sensor"] += [allow("subscribe", "sensors/#"), allow("publish", "commands/#")]
    site.apply()
    will = Will("sensors/tok-1/will", b"gone")
    with (
        guest(gateway, watcher, "tok-2") as other,
        guest(gateway, token, "tok-1", will=will) as session,
    ):
        assert other.subscribe("sensors/tok-1/#")[0].granted
        assert session.subscribe("commands/tok-1")[0].granted
        clock.set(second + 9 + leeway)
        assert session.publish("sensors/tok-1/t", b"last").granted
        assert other.publish("commands/tok-1", b"last").granted
        session.until(lambda message: message.payload == b"last", "the last message")
        assert gateway.count(event="disconnected") == 0
        clock.set(second + 10 + leeway)
        # At once, before the tick that closes the connection: each message is asked about.
        session.send("sensors/tok-1/t", b"too late")
        assert other.publish("commands/tok-1", b"too late").granted
        goodbye = session.wait_goodbye()
        assert goodbye.code == ADMINISTRATIVE
        assert not session.take()
        gateway.audited(event="disconnected", device="tok-1", reason="token-expired")
        assert other.publish("sensors/tok-2/fence", b"1").granted
        assert other.subscribe("sensors/tok-2/#")[0].granted
        seen = other.fence("sensors/tok-2/fence")
    assert [message.payload for message in seen if message.topic.startswith("sensors/tok-1/")] == [b"last"]


def test_a_session_ends_in_time_by_the_real_clock(site: TokenSite, gateway: Gateway) -> None:
    second = int(time.time())
    with guest(gateway, site.issuers[0].token("tok-1", exp=second + 2), "tok-1") as session:
        session.wait_goodbye()
        ended = time.time()
    assert second + 2 <= ended < second + 3
    gateway.audited(event="disconnected", device="tok-1", reason="token-expired")


def test_a_token_ends_with_its_certificate(site: TokenSite, start: Start, authority: Authority) -> None:
    gateway = start(listeners=("mtls",))
    issued = authority.device("both-1")
    bound = site.issuers[0].token("both-1", cnf={"x5t#S256": thumbprint(issued.certificate)})
    with guest(gateway, bound, "both-1", on="mtls", certificate=issued.credentials) as session:
        assert session.publish("sensors/both-1/t", b"1").granted
        site.revoked_serials[issued.serial] = "keyCompromise"
        site.apply()
        session.wait_goodbye()
    gateway.audited(event="disconnected", device="both-1", reason="certificate-revoked")


# --- wills and queues


@pytest.mark.parametrize("ended", [False, True])
def test_the_will_of_an_ended_token_is_not_sent(site: TokenSite, timed: tuple[Gateway, Clock], ended: bool) -> None:
    gateway, clock = timed
    second = int(time.time())
    site.profiles["sensor"].append(allow("subscribe", "sensors/#"))
    site.apply()
    token = site.issuers[0].token("tok-1", iat=second, exp=second + 10)
    watcher = site.issuers[0].token("tok-2", iat=second, exp=second + 10 * MINUTE)
    clock.set(second)
    with guest(gateway, watcher, "tok-2") as other:
        assert other.subscribe("sensors/#")[0].granted
        session = guest(gateway, token, "tok-1", clean=False, expiry=3600)
        properties = Properties(PacketTypes.WILLMESSAGE)  # type: ignore[no-untyped-call]
        properties.WillDelayInterval = 2
        session.client.will_set("sensors/tok-1/will", b"gone", 1, properties=properties)
        session.open()
        session.die()
        gateway.left("tok-1")
        if ended:
            clock.set(second + 11)
            gateway.audited(action="publish", device="tok-1", reason="token-expired", topic="sensors/tok-1/will")
        else:
            clock.set(second + 3)
            other.until(lambda message: message.payload == b"gone", "the will")


def test_a_will_outside_of_the_scope_is_not_sent(site: TokenSite, gateway: Gateway) -> None:
    token = site.issuers[0].token("tok-1", scope=scope(("sensors/tok-1/t", ["pub"])))
    session = guest(gateway, token, "tok-1", will=Will("sensors/tok-1/will", b"gone"))
    session.open()
    session.die()
    gateway.audited(action="publish", device="tok-1", reason="token-scope", topic="sensors/tok-1/will")


def test_nothing_is_queued_from_the_end_on(site: TokenSite, timed: tuple[Gateway, Clock]) -> None:
    gateway, clock = timed
    second = int(time.time())
    clock.set(second)
    site.profiles["sensor"].append(allow("publish", "commands/#"))
    site.apply()
    issuer = site.issuers[0]
    narrow = scope(("commands/tok-1/a", ["sub"]), ("commands/tok-1/b", ["sub"]))
    token = issuer.token("tok-1", iat=second, exp=second + 10, scope=narrow)
    with guest(gateway, token, "tok-1", clean=False, expiry=3600) as session:
        assert session.subscribe("commands/tok-1/a")[0].granted
        assert session.subscribe("commands/tok-1/b")[0].granted
    gateway.left("tok-1")
    sender = issuer.token("tok-2", iat=second, exp=second + 10 * MINUTE)
    with guest(gateway, sender, "tok-2") as other:
        clock.set(second + 9)
        assert other.publish("commands/tok-1/a", b"in time").granted
        clock.set(second + 10)
        assert other.publish("commands/tok-1/b", b"too late").granted
    gateway.audited(action="deliver", device="tok-1", reason="token-expired", topic="commands/tok-1/b")
    renewed = issuer.token("tok-1", iat=second, exp=second + 10 * MINUTE)
    with guest(gateway, renewed, "tok-1", clean=False, expiry=3600) as session:
        assert session.resumed
        seen = session.until(lambda message: message.payload == b"in time", "what was queued")
        assert session.publish("commands/tok-1/b", b"fence").granted
        seen += session.until(lambda message: message.payload == b"fence", "the fence")
    assert [message.payload for message in seen] == [b"in time", b"fence"]


def test_after_a_restart_nothing_is_queued_for_who_needs_a_token(site: TokenSite, start: Start) -> None:
    gateway = start(listeners=("plain",), persistence=True)
    site.profiles["sensor"].append(allow("publish", "commands/#"))
    site.apply()
    with guest(gateway, site.issuers[0].token("tok-1"), "tok-1", clean=False, expiry=3600) as session:
        assert session.subscribe("commands/tok-1/#")[0].granted
    gateway.left("tok-1")
    gateway.stop()
    gateway.start()
    with guest(gateway, site.issuers[0].token("tok-2"), "tok-2") as other:
        assert other.publish("commands/tok-1/a", b"1").granted
    gateway.audited(action="deliver", device="tok-1", reason="token-expired")
    with guest(gateway, site.issuers[0].token("tok-1"), "tok-1", clean=False, expiry=3600) as session:
        assert session.resumed
        assert session.publish("commands/tok-1/a", b"2").granted
        assert [m.payload for m in session.until(lambda message: message.payload == b"2", "the second")] == [b"2"]


def test_the_way_of_the_last_session_counts(site: TokenSite, start: Start, authority: Authority) -> None:
    """A queue is not limited any more by a token of long ago."""
    gateway = start(listeners=("mtls", "plain"))
    site.profiles["sensor"].append(allow("publish", "commands/#"))
    site.apply()
    issued = authority.device("both-1")
    narrow = site.issuers[0].token("both-1", scope=scope(("commands/both-1/a", ["sub"])))
    with guest(gateway, narrow, "both-1", clean=False, expiry=3600) as session:
        assert session.subscribe("commands/both-1/a")[0].granted
    gateway.left("both-1")
    with gateway.session("both-1", issued, clean=False, expiry=3600) as session:
        assert session.subscribe("commands/both-1/#")[0].granted
    gateway.wait(lambda: gateway.text().count("Client both-1") >= 2, "the second end")
    with guest(gateway, site.issuers[0].token("tok-2"), "tok-2") as other:
        assert other.publish("commands/both-1/b", b"1").granted
    with gateway.session("both-1", issued, clean=False, expiry=3600) as session:
        session.until(lambda message: message.payload == b"1", "what was queued")


def test_a_retained_message_outlives_the_token_that_it_came_with(site: TokenSite, gateway: Gateway) -> None:
    """What counts is that its device keeps the right, as for other devices."""
    second = int(time.time())
    with guest(gateway, site.issuers[0].token("tok-1", exp=second + 2), "tok-1") as session:
        assert session.publish("sensors/tok-1/t", b"kept", retain=True).granted
        session.wait_goodbye()
    site.profiles["sensor"].append(allow("subscribe", "sensors/#"))
    site.apply()
    with guest(gateway, site.issuers[0].token("tok-2"), "tok-2") as other:
        assert other.subscribe("sensors/tok-1/t")[0].granted
        other.until(lambda message: message.payload == b"kept", "the retained message")


# --- changes


def _revoke(site: TokenSite) -> None:
    site.store.revoke_token(site.issuers[0].iss, "the token", int(time.time()) + MINUTE, "tok-1")


def _cut_off(site: TokenSite) -> None:
    site.store.cutoff("tok-1", int(time.time()))


def _drop_key(site: TokenSite) -> None:
    site.issuers[0].rotate("key-2")
    site.issuers[0].keys.pop(0)
    site.apply()


def _replace_key(site: TokenSite) -> None:
    """Another key under the same name."""
    site.issuers[0].rotate("key-1")
    site.issuers[0].keys.pop(0)
    site.apply()


def _drop_issuer(site: TokenSite) -> None:
    site.issuers.pop(0)
    site.apply()


def _other_audience(site: TokenSite) -> None:
    site.issuers[0].line["audience"] = ["mqtts://other.example"]
    site.apply()


def _no_token(site: TokenSite) -> None:
    site.change("tok-1", authentication=["certificate"], token=None)


def _revoke_device(site: TokenSite) -> None:
    site.store.revoke("tok-1", "keyCompromise")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_revoke, "token-revoked"),
        (_cut_off, "token-revoked"),
        (_drop_key, "token-key"),
        (_replace_key, "token-key"),
        (_drop_issuer, "token-issuer"),
        (_other_audience, "token-audience"),
        (_no_token, "method"),
        (_revoke_device, "revoked"),
    ],
)
def test_a_change_ends_the_session_and_nobody_elses(
    site: TokenSite, gateway: Gateway, change: Callable[[TokenSite], None], reason: str
) -> None:
    token = site.issuers[0].token("tok-1", jti="the token")
    with guest(gateway, token, "tok-1") as session, gateway.session("temp-1", on="plain") as other:
        assert session.publish("sensors/tok-1/t", b"1").granted
        change(site)
        session.wait_goodbye()
        gateway.audited(event="disconnected", device="tok-1", reason=reason)
        assert other.publish("sensors/temp-1/t", b"1").granted
    gateway.refused(shown(token, "tok-1"), on="plain", client_id="tok-1")


def test_a_rotation_with_overlap_ends_nothing(site: TokenSite, gateway: Gateway) -> None:
    with guest(gateway, site.issuers[0].token("tok-1"), "tok-1") as session:
        site.issuers[0].rotate("key-2")
        site.apply()
        gateway.admitted(shown(site.issuers[0].token("tok-2"), "tok-2"), on="plain", client_id="tok-2")
        assert session.publish("sensors/tok-1/t", b"1").granted
    assert not list(gateway.audit())


def test_what_roles_mean_may_change(site: TokenSite, gateway: Gateway) -> None:
    claims: dict[str, Any] = {
        "aud": "mqtt-broker",
        "plant": {"location": "hall-7"},
        "realm_access": {"roles": ["plant-sensor"]},
    }
    token = site.issuers[1].token("x", azp="a", **claims)
    with guest(gateway, token, "kc-a") as session:
        assert session.publish("sensors/hall-7/kc-a/t", b"1").granted
        site.profiles["role:sensor"] = [allow("publish", "other/", 0)]
        site.names["role:sensor"] = ["location"]
        site.apply()
        assert not session.publish("sensors/hall-7/kc-a/t", b"1").granted
        assert session.publish("other/kc-a", b"1").granted
        # Once devices.yml has it, it is what that says.
        site.add("kc-a", "token")
        site.apply()
        assert session.publish("sensors/kc-a/t", b"1").granted
        site.change("kc-a", authentication=["certificate"], token=None)
        session.wait_goodbye()
    gateway.audited(event="disconnected", device="kc-a", reason="method")


def test_sighup_drops_nobody(site: TokenSite, timed: tuple[Gateway, Clock]) -> None:
    """The broker asks for every session again, with what it remembers."""
    gateway, clock = timed
    second = int(time.time())
    clock.set(second)
    token = site.issuers[0].token("tok-1", iat=second, exp=second + 10)
    with guest(gateway, token, "tok-1") as session:
        for _ in range(3):
            gateway.reload()
            assert session.publish("sensors/tok-1/t", b"1").granted
        clock.set(second + 10)
        gateway.reload()
        session.wait_goodbye()
    assert gateway.count(event="refused", action="connect") == 0
    gateway.audited(event="disconnected", device="tok-1", reason="token-expired")
