# SPDX-License-Identifier: Apache-2.0
"""Rotating the token service's keys, and revoking tokens, on the deployed site, by the playbooks.

The sharp edges: a key that signs before every gateway has it, an old key that goes while its tokens are out or stays
when it was stolen, a gateway that is away, a revocation that waits for a timer, hits others, or hits nobody and says
that all is well, another issuer's token, and a revoked device that goes on getting tokens.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from bednet.client import TokenError, TokenSource
from bednet.probe import Credentials, Listener, Outcome, Session, enter, request
from tests import providers
from tests.live import other_site, refused_for
from tests.tokens.conftest import QUICK, Connected, claims, header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bednet.client import Token
    from testbed.lab import Host, Lab, PlayResult
    from tests.conftest import Plant
    from tests.live import Site
    from tests.tokens.conftest import Tokens

pytestmark = pytest.mark.lab

GATEWAYS = ("gateway-1", "gateway-2")
CONFIG = "/etc/bednet-token-service/config.json"
ISSUERS = "/usr/local/lib/bednet/issuers.json"
FETCH, TIMER = "bednet-token-fetch.service", "bednet-token-fetch.timer"
DEADLINE_S = 60.0
LEEWAY_S = 30


def _kid(tokens: Tokens) -> str:
    return str(tokens.tool("status")["signs_with"])


@pytest.mark.full
def test_keys_are_rotated_and_no_connection_fails(lab: Lab, tokens: Tokens) -> None:
    """All the while a device gets a token, goes to a gateway with it, and the next token to the other."""
    before, old = _kid(tokens), tokens.source("edge-2").get()
    answers, stop = [], threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            for gateway in GATEWAYS:
                shown = tokens.credentials("edge-2", tokens.source("edge-2").get())
                answers.append(enter(tokens.listener("edge-2", gateway), shown))

    with Connected(tokens, "edge-1") as first, Connected(tokens, "edge-3", "gateway-2") as second:
        thread = threading.Thread(target=come_and_go)
        thread.start()
        try:
            result = lab.play("rotate_token_keys.yml")
        finally:
            stop.set()
            thread.join()
        assert "every gateway has it" in " ".join(result.stdout.split())
        for device in (first, second):
            device.client.renew()
            device.await_renewals(1)
            assert device.lost == []
    assert len(answers) > 4
    assert [answer for answer in answers if not answer.accepted] == []
    after = _kid(tokens)
    assert after != before
    assert {key["kid"] for key in tokens.tool("keys")["keys"]} >= {before, after}
    # A token of the old key is good as long as it says.
    for gateway in GATEWAYS:
        assert enter(tokens.listener("edge-2", gateway), tokens.credentials("edge-2", old)).accepted


def _said(result: PlayResult) -> str:
    return re.sub(r"\s+", " ", result.stdout)


def _until(ready: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not ready():
        assert time.monotonic() < deadline, f"{what} does not happen"
        time.sleep(0.1)


def _gateways_refuse(
    tokens: Tokens, device: str, token: Token, reason: str, gateways: tuple[str, ...] = GATEWAYS
) -> None:
    """Show a token that gateways must refuse, for this reason."""
    for gateway in gateways:
        host, shown = tokens.plant.lab.hosts[gateway], tokens.credentials(device, token)
        assert refused_for(host, tokens.listener(device, gateway), shown) == reason, gateway


@contextmanager
def _without_timer(gateway: Host) -> Iterator[None]:
    """A gateway that fetches when a test says so, and at the end."""
    gateway.exec(["systemctl", "stop", TIMER])
    try:
        yield
    finally:
        gateway.exec(["systemctl", "start", TIMER, FETCH])


@contextmanager
def _with_an_issuer_that_is_down(gateway: Host) -> Iterator[None]:
    """A gateway that is to fetch from somebody who does not answer."""
    before = gateway.read_file(ISSUERS)
    told = json.loads(before)
    nobody = "https://gateway-1.plant.example:1"
    told["issuers"].append({"issuer": nobody, "jwks_url": f"{nobody}/k", "revocations_url": None, "addresses": None})
    gateway.write_file(ISSUERS, json.dumps(told))
    try:
        yield
    finally:
        gateway.write_file(ISSUERS, before)
        gateway.exec(["systemctl", "start", FETCH])


@contextmanager
def _held_fetch(gateway: Host) -> Iterator[Callable[[], object]]:
    """A run of the unit that has fetched, and hands over when the function is called."""
    folder, hold, held = f"/run/systemd/system/{FETCH}.d", "/run/bednet-hold", "/run/bednet-held"
    unit = gateway.read_file(f"/etc/systemd/system/{FETCH}").decode()
    (hand_over,) = [line for line in unit.splitlines() if line.startswith("ExecStartPost=")]
    wait = f"ExecStartPost=+/bin/sh -c 'touch {held}; while test -e {hold}; do sleep 0.1; done'"
    gateway.exec(["mkdir", "-p", folder])
    gateway.write_file(f"{folder}/hold.conf", f"[Service]\nExecStartPost=\n{wait}\n{hand_over}\n")
    gateway.exec(["touch", hold])
    gateway.exec(["systemctl", "daemon-reload"])
    try:
        gateway.exec(["systemctl", "start", "--no-block", FETCH])
        _until(lambda: gateway.exec(["test", "-e", held], check=False).rc == 0, "a fetch")
        yield lambda: gateway.exec(["rm", "-f", hold])
    finally:
        gateway.exec(["rm", "-rf", hold, held, folder])
        gateway.exec(["systemctl", "daemon-reload"])


@pytest.mark.full
def test_a_key_signs_when_the_stores_have_it_and_not_when_a_unit_says_so(lab: Lab, tokens: Tokens) -> None:
    """Where another issuer is down the unit fails and has the key; where it was under way it is well and lacks it."""
    first, second = (lab.hosts[name] for name in GATEWAYS)
    before = tokens.kids("gateway-2")
    starts = ["pgrep", "-f", f"^systemctl start {FETCH}"]
    with (
        _without_timer(first),
        _without_timer(second),
        _with_an_issuer_that_is_down(first),
        _held_fetch(second) as let_go,
        ThreadPoolExecutor(1) as pool,
    ):
        play = pool.submit(lab.play, "rotate_token_keys.yml")
        try:
            _until(lambda: play.done() or second.exec(starts, check=False).rc == 0, "the playbook's fetch")
        finally:
            let_go()
        result = play.result()
        assert "every gateway has it" in _said(result)
        # Both cases were there.
        assert first.exec(["systemctl", "is-failed", FETCH], check=False).stdout.strip() == "failed"
        assert "RETRYING: [gateway-2]: Ensure the gateway has the keys that are published now" in result.stdout
        assert "RETRYING: [gateway-1]" not in result.stdout
        kid = _kid(tokens)
        assert kid not in before
        for gateway in GATEWAYS:
            assert kid in tokens.kids(gateway)
            token = tokens.source("edge-2").get()
            assert header(token)["kid"] == kid
            assert enter(tokens.listener("edge-2", gateway), tokens.credentials("edge-2", token)).accepted


@pytest.mark.full
def test_a_new_key_waits_for_a_gateway_that_is_away(lab: Lab, tokens: Tokens) -> None:
    gateway, old, published = lab.hosts["gateway-2"], _kid(tokens), set(tokens.tool("status")["published_keys"])
    with _without_timer(gateway):
        gateway.disconnect()
        try:
            result = lab.play("rotate_token_keys.yml", check=False, env=QUICK)
        finally:
            gateway.connect()
        assert result.rc != 0
        said = "gateway-2 did not fetch the new key: see above. It is published, and signs in a quarter of an hour"
        assert said in _said(result)
        (new,) = set(tokens.tool("status")["published_keys"]) - published
        assert _kid(tokens) == header(tokens.source("edge-2").get())["kid"] == old
        assert new in tokens.kids("gateway-1")
        assert new not in tokens.kids("gateway-2")
        # As the timer does.
        gateway.exec(["systemctl", "start", FETCH])
        assert new in tokens.kids("gateway-2")
    # What a quarter of an hour does.
    assert tokens.tool("activate")["kids"] == [new]
    token = tokens.source("edge-2").get()
    assert header(token)["kid"] == new
    assert enter(tokens.listener("edge-2", "gateway-2"), tokens.credentials("edge-2", token)).accepted


@pytest.mark.full
def test_a_stolen_key_is_good_nowhere_once_one_command_was_run(lab: Lab, tokens: Tokens) -> None:
    """docs/operations.md, "A signing key that may have leaked": sessions end, and devices come back with new tokens."""
    stolen, old = tokens.source("edge-2").get(), _kid(tokens)
    with Connected(tokens, "edge-1") as first, Connected(tokens, "edge-3", "gateway-2") as second:
        result = lab.play("rotate_token_keys.yml", "-e", "compromised=true")
        new = _kid(tokens)
        assert f"gateway-1 signs with {new}; every gateway has it, and no gateway takes what an old key" in _said(
            result
        )
        for device in (first, second):
            device.await_return()
    assert tokens.tool("status")["published_keys"] == [new]
    assert old != new
    for gateway in GATEWAYS:
        assert tokens.kids(gateway) == {new}
    _gateways_refuse(tokens, "edge-2", stolen, "token-key")


@pytest.mark.full
def test_a_gateway_that_is_away_when_a_key_was_stolen_is_named(lab: Lab, tokens: Tokens) -> None:
    gateway, stolen = lab.hosts["gateway-2"], tokens.source("edge-2").get()
    with _without_timer(gateway):
        gateway.disconnect()
        try:
            result = lab.play("rotate_token_keys.yml", "-e", "compromised=true", check=False, env=QUICK)
        finally:
            gateway.connect()
        assert result.rc != 0
        said = "gateway-2 may still take what an old key signs: see above. Once they are back, their timers end that"
        assert said in _said(result)
        _gateways_refuse(tokens, "edge-2", stolen, "token-key", ("gateway-1",))
        assert enter(tokens.listener("edge-2", "gateway-2"), tokens.credentials("edge-2", stolen)).accepted
        gateway.exec(["systemctl", "start", FETCH])
    _gateways_refuse(tokens, "edge-2", stolen, "token-key")


def test_a_revoked_token_is_gone_at_once_and_everywhere_and_no_other(lab: Lab, tokens: Tokens) -> None:
    source = tokens.source("edge-2")
    leaked, kept = source.get(), source.get()
    with Connected(tokens, "edge-1") as other, Connected(tokens, "edge-2", "gateway-2") as own:
        # The session's own token is another one, and stays.
        result = lab.play("revoke_token.yml", "-e", f"jti={claims(leaked)['jti']}")
        assert "Refused by gateway-1, gateway-2." in result.stdout
        _gateways_refuse(tokens, "edge-2", leaked, "token-revoked")
        assert (own.lost, other.lost) == ([], [])

        lab.play("revoke_token.yml", "-e", "device=edge-2")
        own.until(lambda: own.lost, "the end of the session")
        # The helper comes back with a new token; those from before are refused.
        own.until(lambda: own.connections > 1, "a new session")
        assert other.lost == []
    _gateways_refuse(tokens, "edge-2", kept, "token-revoked", ("gateway-1",))
    assert enter(tokens.listener("edge-2"), tokens.credentials("edge-2", source.get())).accepted


EITHER = "Say either -e jti=JTI"
full = pytest.mark.full


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (
            "device=egde-2",
            r"there is no device 'egde-2' in .* Cure: did you mean 'edge-2'\? .* Nothing was changed\.",
        ),
        ("jti=-never-issued", "knows no token with this jti"),
        pytest.param("device=edge-2 jti=one", EITHER, marks=full),
        pytest.param("issuer=https://x jti=one exp=1 device=a/b", EITHER, marks=full),
        pytest.param("issuer=https://x jti=one device=edge-2", EITHER, marks=full),
        pytest.param("jti=one exp=1", EITHER, marks=full),
        pytest.param("issuer=https://x jti=one exp=soon device=edge-2", EITHER, marks=full),
        pytest.param("issuer=https://x jti=one exp=1 device=edge-2", "has no issuer 'https://x'", marks=full),
        pytest.param(
            "issuer=https://tokens.plant.example:8443 jti=one exp=1 device=edge-2",
            "is the site's own token service. Cure: say the token's jti alone",
            marks=full,
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_is_revoked(lab: Lab, words: str, why: str) -> None:
    given = [word for variable in words.split() for word in ("-e", variable)]
    result = lab.play("revoke_token.yml", *given, check=False)
    assert result.rc != 0
    assert re.search(why, re.sub(r"\s+", " ", result.failures[0]["message"]))
    assert result.changed == 0


@pytest.mark.full
@pytest.mark.parametrize("playbook", ["revoke_token.yml", "rotate_token_keys.yml"])
def test_a_part_of_the_site_is_refused(lab: Lab, playbook: str) -> None:
    wish = ("-e", "device=edge-2") if playbook == "revoke_token.yml" else ()
    result = lab.play(playbook, *wish, "--limit", "gateway-1", check=False)
    assert re.search(r"With --limit .*gateway-2\b.* Nothing was changed\. Leave --limit out", _said(result))
    assert (result.rc != 0, result.changed) == (True, 0)


def _cutoffs(host: Host) -> dict[str, int]:
    told = map(json.loads, host.exec(["bednet-store", "dump"]).stdout.splitlines())
    return {line["cutoff"]: line["until"] for line in told if "cutoff" in line}


@pytest.mark.full
def test_a_device_that_the_files_no_longer_have_is_cut_off_if_it_is_asked_for(lab: Lab) -> None:
    begin = int(time.time())
    result = lab.play("revoke_token.yml", "-e", "device=egde-2", "-e", "unlisted=true")
    assert "Refused by gateway-1, gateway-2." in result.stdout
    for gateway in GATEWAYS:
        assert _cutoffs(lab.hosts[gateway])["egde-2"] >= begin


@pytest.mark.full
def test_a_host_of_the_token_service_that_is_away_leaves_no_token_good_elsewhere(lab: Lab) -> None:
    begin, away = int(time.time()), lab.hosts["gateway-1"]
    away.disconnect()
    try:
        result = lab.play("revoke_token.yml", "-e", "device=egde-3", "-e", "unlisted=true", check=False, env=QUICK)
    finally:
        away.connect()
    assert result.rc != 0
    assert (
        "It is NOT yet refused by gateway-1: see above. The token service (gateway-1) has NOT been told: see above. "
        "Everybody else has done it. Run this again when they are back."
    ) in _said(result)
    assert _cutoffs(lab.hosts["gateway-2"])["egde-3"] >= begin
    assert _cutoffs(away).get("egde-3", 0) < begin


@pytest.mark.full
def test_a_gateway_that_is_away_when_a_token_is_revoked_is_named_and_learns_it_later(lab: Lab, tokens: Tokens) -> None:
    leaked, gateway = tokens.source("edge-2").get(), lab.hosts["gateway-2"]
    with _without_timer(gateway):
        gateway.disconnect()
        try:
            result = lab.play("revoke_token.yml", "-e", f"jti={claims(leaked)['jti']}", check=False, env=QUICK)
        finally:
            gateway.connect()
        assert result.rc != 0
        said = (
            "It is NOT yet refused by gateway-2: see above. Everybody else has done it. Run this again when they are "
            "back; a token of the site's own service the gateway's timer ends as well, within five minutes of its "
            "return."
        )
        assert said in _said(result)
        _gateways_refuse(tokens, "edge-2", leaked, "token-revoked", ("gateway-1",))
        assert enter(tokens.listener("edge-2", "gateway-2"), tokens.credentials("edge-2", leaked)).accepted
        # As the timer does.
        gateway.exec(["systemctl", "start", FETCH])
        _gateways_refuse(tokens, "edge-2", leaked, "token-revoked", ("gateway-2",))


@pytest.mark.full
def test_where_nobody_can_be_told_of_a_revocation_all_are_named(lab: Lab, tokens: Tokens) -> None:
    token = tokens.source("edge-2").get()
    gateways = [lab.hosts[name] for name in ("gateway-1", "gateway-2")]
    for gateway in gateways:
        gateway.disconnect()
    try:
        result = lab.play("revoke_token.yml", "-e", "device=edge-2", check=False, env=QUICK)
    finally:
        for gateway in gateways:
            gateway.connect()
    assert result.rc != 0
    said = (
        "It is NOT yet refused by gateway-1, gateway-2: see above. The token service (gateway-1) has NOT been told: "
        "see above. Nobody has done it. Run this again when they are back."
    )
    assert said in _said(result)
    assert enter(tokens.listener("edge-2"), tokens.credentials("edge-2", token)).accepted


@pytest.mark.full
def test_a_token_service_that_is_down_leaves_no_token_good(lab: Lab, tokens: Tokens) -> None:
    """It is named; the gateways refuse what would be good at that moment."""
    token = tokens.source("edge-2").get()
    lab.hosts["gateway-1"].exec(["mv", CONFIG, f"{CONFIG}.away"])
    try:
        result = lab.play("revoke_token.yml", "-e", "device=edge-2", check=False)
    finally:
        lab.hosts["gateway-1"].exec(["mv", f"{CONFIG}.away", CONFIG])
    assert result.rc != 0
    assert "The token service (gateway-1) has NOT been told: see above. Everybody else has done it." in _said(result)
    _gateways_refuse(tokens, "edge-2", token, "token-revoked")
    # What would have been good then ends: its clock might have been ahead by the leeway. Then the device is back.
    cutoff = _cutoffs(lab.hosts["gateway-1"])["edge-2"]
    assert cutoff - time.time() <= LEEWAY_S
    _until(lambda: time.time() > cutoff + 1, "the end of the leeway")
    assert enter(tokens.listener("edge-2"), tokens.credentials("edge-2", tokens.source("edge-2").get())).accepted


# --- tokens of another issuer, on a site without a token service

FOREIGN = "https://sso.example/realms/plant"
YEAR_S = 31_536_000


@pytest.fixture
def foreign(lab: Lab, plant: Plant) -> Iterator[Callable[[str], Credentials]]:
    """Makes tokens of an issuer that gives roles; its site has no token service, for one test."""
    keycloak = providers.documented()["keycloak"]
    paths = {name: lab.site / name for name in ("policy.yml", "hosts.yml")}
    before = {path: path.read_text(encoding="utf-8") for path in paths.values()}
    policy, hosts = (yaml.safe_load(before[path]) for path in paths.values())
    policy["issuers"].append(
        {
            "name": "sso",
            "issuer": FOREIGN,
            "audience": ["mqtt-broker"],
            "jwks_file": "sso.jwks.json",
            "algorithms": ["RS256"],
            "typ": ["JWT"],
            "longest": YEAR_S,
            "device": {"claim": "azp", "prefix": "sso-"},
            "roles": {"claim": "groups", "map": {"plant-sensor": "sensor"}},
        }
    )
    del hosts["token_service"]
    keys = lab.site / "sso.jwks.json"
    try:
        keys.write_text(json.dumps({"keys": keycloak.keys}), encoding="utf-8")
        for path, content in ((paths["policy.yml"], policy), (paths["hosts.yml"], hosts)):
            path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        with ExitStack() as stack:
            for gateway in GATEWAYS:
                stack.enter_context(other_site(plant, lab.hosts[gateway], lambda _: None))

            def make(jti: str, *, azp: str = "cart", **said: Any) -> Credentials:
                token = keycloak.token(iss=FOREIGN, azp=azp, groups=["plant-sensor"], jti=jti, **said)
                return Credentials(username=f"sso-{azp}", password=token)

            yield make
    finally:
        keys.unlink()
        for path, text in before.items():
            path.write_text(text, encoding="utf-8")


@pytest.mark.full
def test_another_issuers_tokens_are_revoked_where_there_is_no_token_service(
    lab: Lab, plant: Plant, foreign: Callable[..., Credentials]
) -> None:
    def gateways_refuse(shown: Credentials, reason: str) -> None:
        for gateway in GATEWAYS:
            assert refused_for(lab.hosts[gateway], plant.passwords(gateway), shown) == reason, gateway

    # What is revoked stays so in a lab that stays up; and a name in base64url may begin like an option.
    jti = f"-{secrets.token_urlsafe(8)}"
    leaked, kept = foreign(jti, exp=YEAR_S), foreign("kept", exp=YEAR_S)
    year = claims(str(leaked.password))["exp"]
    with Session(plant.passwords("gateway-2"), leaked) as session:
        result = lab.play("revoke_token.yml", "-e", f"jti={jti}", check=False)
        assert "This site has no token service, so nobody knows a token by its jti alone." in _said(result)
        wish = ("-e", f"issuer={FOREIGN}", "-e", f"jti={jti}", "-e", f"exp={year}", "-e", "device=sso-cart")
        result = lab.play("revoke_token.yml", *wish)
        assert "Refused by gateway-1, gateway-2." in result.stdout
        assert {task["host"] for task in result.changed_tasks} == set(GATEWAYS)
        session.wait_goodbye(1)
    gateways_refuse(leaked, "token-revoked")
    assert lab.play("revoke_token.yml", *wish).changed_tasks == []
    told = [json.loads(line) for line in lab.hosts["gateway-2"].exec(["bednet-store", "dump"]).stdout.splitlines()]
    # Not for a day: for as long as it is good.
    assert year in {line["ends"] for line in told if "revoked_token" in line}

    with Session(plant.passwords("gateway-2"), kept) as session, plant.session("temp-101") as other:
        result = lab.play("revoke_token.yml", "-e", "device=sso-cart")
        assert "Refused by gateway-1, gateway-2." in result.stdout
        session.wait_goodbye(1)
        assert other.goodbye is None
    gateways_refuse(kept, "token-revoked")
    assert enter(plant.passwords("gateway-2"), foreign("other", azp="other")).accepted


@pytest.mark.full
def test_a_device_in_tokens_only_is_kept_out_by_listing_it_as_revoked(
    lab: Lab, plant: Plant, foreign: Callable[..., Credentials]
) -> None:
    """docs/operations.md, "Revoke a token": its issuer may go on, and the id is refused."""
    gateway = lab.hosts["gateway-2"]

    def listed(site: Site) -> None:
        entry = {"id": "sso-tram", "location": "hall-1", "roles": ["sensor"], "authentication": ["token"]}
        site.devices["devices"].append({**entry, "revoked": "privilegeWithdrawn"})

    before, after = (foreign(jti, azp="tram") for jti in ("before", "after"))
    with Session(plant.passwords("gateway-2"), before) as session, other_site(plant, gateway, listed):
        session.wait_goodbye(1)
        assert refused_for(gateway, plant.passwords("gateway-2"), after) == "revoked"


# --- revoke.yml and reinstate.yml


@pytest.fixture
def introspector(tokens: Tokens) -> Iterator[Credentials]:
    """A device that may look at every token, for one test (`token_service_introspectors`)."""

    def restart(text: str) -> None:
        tokens.host.exec(["sh", "-c", 'cat > "$1"', "sh", CONFIG], input=text)
        tokens.host.exec(["systemctl", "restart", "bednet-token-service.service"])
        tokens.await_health()

    before = tokens.host.read_file(CONFIG).decode()
    restart(json.dumps(json.loads(before) | {"introspectors": ["edge-2"]}))
    try:
        secret = (tokens.plant.folder / "edge-2/client_secret").read_text(encoding="ascii").strip()
        yield Credentials(username="edge-2", password=secret)
    finally:
        restart(before)


@pytest.mark.full
def test_a_revoked_device_gets_no_token_and_is_reinstated_with_the_next(
    lab: Lab, plant: Plant, tokens: Tokens, introspector: Credentials, tmp_path: Path
) -> None:
    """docs/operations.md, "Revoke a device" and "Reinstate a device": at the token service as everywhere else."""
    where = Listener(tokens.host.address, 8443, plant.ca, "tokens.plant.example")

    def is_active(text: str, asking: Credentials = introspector, **form: str) -> object:
        answer = request(where, "POST", "/introspect", credentials=asking, form={"token": text, **form})
        assert answer.status == 200
        return answer.json()["active"]

    token = tokens.source("edge-1").get()
    assert is_active(token.text) is True
    shutil.copytree(plant.folder / "edge-1", tmp_path / "edge-1")
    with Connected(tokens, "edge-1") as own, Connected(tokens, "edge-3", "gateway-2") as other:
        try:
            result = lab.play("revoke.yml", "-e", "device=edge-1", "-e", "reason=privilegeWithdrawn")
            assert ("gateway-1", "token_service : Ensure the token service refuses it") in {
                (task["host"], task["task"]) for task in result.changed_tasks
            }
            own.until(lambda: own.lost, "the end of the session")
            # The helper asks for the next token, and gets none.
            assert tokens.why_none("edge-1").error == "invalid_client"
            assert own.connections == 1
            assert is_active(token.text) is False
            for gateway in GATEWAYS:
                answer = enter(tokens.listener("edge-1", gateway), tokens.credentials("edge-1", token))
                assert (answer.outcome, answer.reason) == (Outcome.ALERT, "certificate revoked")
            assert other.lost == []
            # A second run finds nothing to do.
            again = lab.play("revoke.yml", "-e", "device=edge-1", "-e", "reason=privilegeWithdrawn")
            assert again.changed_tasks == []
        finally:
            lab.play("reinstate.yml", "-e", "device=edge-1")
            plant.fetch_bundles()
    # Not with what it had.
    with pytest.raises(TokenError, match="invalid_client"):
        TokenSource.of_bundle(tmp_path / "edge-1", address=tokens.host.address).get()
    fresh, own_certificate = tokens.source("edge-1").get(), plant.certificate("edge-1")
    # The roll-out has brought back a service without introspectors: each device its own.
    assert is_active(fresh.text, own_certificate, client_id="edge-1") is True
    assert is_active(token.text, own_certificate, client_id="edge-1") is False
    for gateway in GATEWAYS:
        assert enter(tokens.listener("edge-1", gateway), tokens.credentials("edge-1", fresh)).accepted
