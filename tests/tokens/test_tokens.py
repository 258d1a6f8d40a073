# SPDX-License-Identifier: Apache-2.0
"""Tokens on the deployed site: who comes in with one, who does not, and what holds when the service does not.

The sharp edges: a token that is good at a gateway or in hands that it was not made for, a renewal that costs the
connection, a service that is down and takes those down with it who have a token, and an answer that says nothing.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import urllib3.util.connection
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from bednet import cli
from bednet.client import TokenSource
from bednet.probe import NOT_AUTHORIZED, Credentials, Listener, Outcome, enter, request
from tests.base64url import encode, encode_part
from tests.live import Audit, other_site
from tests.tokens.conftest import Connected, claims
from tests.unit.jwks import jwk

if TYPE_CHECKING:
    from tests.conftest import Plant
    from tests.live import Site
    from tests.tokens.conftest import Tokens

pytestmark = pytest.mark.lab

METHODS = {"edge-1": "tls_client_auth", "edge-2": "client_secret_basic", "edge-3": "private_key_jwt"}
REFUSED = {4: 5, 5: NOT_AUTHORIZED}
every_device = pytest.mark.parametrize("device", METHODS)


# --- who comes in


@every_device
def test_a_device_gets_a_token_by_the_method_that_the_site_gives_it(tokens: Tokens, device: str) -> None:
    source = tokens.source(device)
    assert source.method == METHODS[device]
    told = claims(source.get())
    assert (told["iss"], told["sub"], told["aud"]) == (source.issuer, device, "mqtts://plant.example")
    assert told["exp"] - told["iat"] == 900
    assert ("x5t#S256" in told.get("cnf", {})) == source.is_bound


@every_device
@pytest.mark.parametrize("version", [4, 5])
def test_a_token_as_password_lets_its_device_in_at_every_gateway(tokens: Tokens, device: str, version: Any) -> None:
    token = tokens.source(device).get()
    for gateway in ("gateway-1", "gateway-2"):
        where = tokens.listener(device, gateway)
        answer = enter(where, tokens.credentials(device, token), version=version)
        assert answer.accepted, answer


@every_device
def test_a_token_is_renewed_in_the_session_and_nothing_is_lost(plant: Plant, tokens: Tokens, device: str) -> None:
    """Enhanced authentication and re-authentication (MQTT 5, 4.12) by OAUTHBEARER (RFC 7628)."""
    with (
        Connected(tokens, device, "gateway-1", f"commands/{device}/#") as own,
        plant.session("tablet-jo") as boss,
    ):
        for number in range(3):
            assert boss.publish(f"commands/{device}/interval", b"%d" % number).granted
            own.client.renew()
            own.await_renewals(number + 1)
            assert own.publish(f"sensors/{device}/temperature", b"21")
        own.until(lambda: len(own.heard) == 3, "the third command")
        assert own.heard == [b"0", b"1", b"2"]
        assert own.renewed == [900.0] * 3
        assert (own.connections, own.lost) == (1, [])


def test_a_token_of_a_key_alone_comes_in_by_its_proof_and_is_renewed_under_load(tokens: Tokens) -> None:
    """The method `ace` (RFC 9431, 2.2.4.2.2 and 4): no certificate comes along."""
    token = tokens.source("edge-3", certificate=None).get()
    assert set(claims(token)["cnf"]) == {"jwk"}
    shown = Credentials(username="edge-3", password=token.text)
    _refused_in_both_versions(tokens, "gateway-2", tokens.plant.passwords("gateway-2"), shown, "token-binding")
    stop, sent = threading.Event(), []
    with Connected(tokens, "edge-3", "gateway-2", certificate=None) as own:

        def talk() -> None:
            while not stop.is_set():
                sent.append(own.publish("sensors/edge-3/temperature", b"21"))

        thread = threading.Thread(target=talk)
        thread.start()
        try:
            for number in range(3):
                own.client.renew()
                own.await_renewals(number + 1)
        finally:
            stop.set()
            thread.join()
        assert own.renewed == [900.0] * 3
        assert (own.connections, own.lost) == (1, [])
    assert all(sent)
    assert len(sent) > 3


def test_a_certificate_that_is_renewed_in_place_costs_neither_a_refusal_nor_a_message(
    plant: Plant, tokens: Tokens, tmp_path: Path
) -> None:
    """The next token is bound to the new certificate, which a gateway sees in a new connection only."""
    files = {"certificate": tmp_path / "certificate.pem", "key": tmp_path / "key.pem"}

    def put(credentials: Credentials) -> None:
        for name, place in files.items():
            draft = place.with_suffix(".new")
            shutil.copy(getattr(credentials, name), draft)
            draft.replace(place)

    put(plant.certificate("edge-1"))
    audit = Audit(tokens.host)
    with (
        Connected(tokens, "edge-1", "gateway-1", "commands/edge-1/#", expiry=60, **files) as own,
        plant.session("tablet-jo") as boss,
    ):
        own.client.renew()
        own.await_renewals(1)
        assert (own.connections, own.lost) == (1, [])
        put(plant.other_certificate("edge-1"))
        own.client.renew()
        own.until(lambda: own.lost, "the end of the connection that was made with the old one")
        assert boss.publish("commands/edge-1/interval", b"meanwhile").granted
        own.await_renewals(2)
        own.until(lambda: own.heard, "what was published meanwhile")
        own.client.renew()
        own.await_renewals(3)
        assert own.publish("sensors/edge-1/temperature", b"21")
        assert (own.renewed, own.heard) == ([900.0] * 3, [b"meanwhile"])
        assert own.resumed == [False, True]
        # Whoever shows it beside the old one is refused for it, so these lines are looked for in the right place.
        token = own.client.source.get()
        old = plant.certificate("edge-1")
        mixed = Credentials(old.certificate, old.key, username="edge-1", password=token.text)
        assert audit.lines(client_id="edge-1") == []
        _refused_in_both_versions(tokens, "gateway-1", plant.mtls(), mixed, "token-binding")


def test_bednet_token_gets_one_for_a_device_by_its_bundle(
    plant: Plant,
    tokens: Tokens,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(plant.folder / "edge-2")
    words = ["token", str(plant.lab.site), "--device", "edge-2", "--address", tokens.host.address]
    assert cli.main(words) == 0
    assert claims(capsys.readouterr().out.strip())["sub"] == "edge-2"
    output = tmp_path / "token"
    assert cli.main([*words, "--output", str(output)]) == 0
    assert capsys.readouterr().out == ""
    assert output.stat().st_mode & 0o777 == 0o600
    assert claims(output.read_text(encoding="ascii"))["sub"] == "edge-2"
    for device, why in (("edge-1", "is the bundle of edge-2"), ("temp-101", "has no tokens"), ("no-9", "no device")):
        assert cli.main([*words[:3], device, *words[4:]]) == 1
        assert why in capsys.readouterr().err


# --- who does not


def _refused_in_both_versions(tokens: Tokens, gateway: str, where: Any, credentials: Credentials, reason: str) -> None:
    for version in (4, 5):
        audit = Audit(tokens.plant.lab.hosts[gateway])
        answer = enter(where, credentials, version=version)
        assert (answer.outcome, answer.code) == (Outcome.REFUSED, REFUSED[version])
        assert audit.line(event="refused", action="connect")["reason"] == reason


def test_a_bound_token_is_of_no_use_without_its_certificate(plant: Plant, tokens: Tokens) -> None:
    stolen = tokens.source("edge-1").get()
    bare = Credentials(username="edge-1", password=stolen.text)
    _refused_in_both_versions(tokens, "gateway-2", plant.passwords("gateway-2"), bare, "token-binding")


def test_a_bound_token_is_of_no_use_with_the_certificate_of_another_device(plant: Plant, tokens: Tokens) -> None:
    stolen, thief = tokens.source("edge-1").get(), plant.certificate("edge-3")
    mixed = Credentials(thief.certificate, thief.key, username="edge-1", password=stolen.text)
    _refused_in_both_versions(tokens, "gateway-2", plant.mtls("gateway-2"), mixed, "token-binding")


def test_a_certificate_alone_does_not_let_a_device_with_tokens_in(plant: Plant, tokens: Tokens) -> None:
    _refused_in_both_versions(tokens, "gateway-1", plant.mtls(), plant.certificate("edge-1"), "method")


def test_a_token_for_one_gateway_is_refused_by_the_other(tokens: Tokens) -> None:
    """RFC 8707: stolen on its way to one gateway, it opens no other."""
    token = tokens.source("edge-2", resource="mqtts://gateway-1.plant.example").get()
    shown = tokens.credentials("edge-2", token)
    assert enter(tokens.listener("edge-2"), shown).accepted
    _refused_in_both_versions(tokens, "gateway-2", tokens.listener("edge-2", "gateway-2"), shown, "token-audience")


def _forged(token: str, *, header: dict[str, str], key: ec.EllipticCurvePrivateKey | None) -> str:
    """Return what a token says, with another header and signature."""
    signed = f"{encode_part(header)}.{token.split('.')[1]}"
    if key is None:
        return f"{signed}."
    pair = utils.decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{signed}.{encode(b''.join(number.to_bytes(32, 'big') for number in pair))}"


@pytest.mark.parametrize("kind", ["alg-none", "another-key"])
def test_a_token_that_the_service_did_not_sign_is_refused(tokens: Tokens, kind: str) -> None:
    token = tokens.source("edge-2").get().text
    kid = tokens.tool("keys")["keys"][-1]["kid"]
    if kind == "alg-none":
        forged, reason = (
            _forged(token, header={"alg": "none", "typ": "at+jwt", "kid": kid}, key=None),
            "token-algorithm",
        )
    else:
        key = ec.generate_private_key(ec.SECP256R1())
        forged = _forged(token, header={"alg": "ES256", "typ": "at+jwt", "kid": kid}, key=key)
        reason = "token-signature"
    shown = Credentials(username="edge-2", password=forged)
    _refused_in_both_versions(tokens, "gateway-1", tokens.listener("edge-2"), shown, reason)


def test_a_flood_of_bad_tokens_is_not_noticed_by_others(plant: Plant, tokens: Tokens, measured: Any) -> None:
    where, key = tokens.listener("edge-2"), ec.generate_private_key(ec.SECP256R1())
    kid = tokens.tool("keys")["keys"][-1]["kid"]
    token = tokens.source("edge-2").get().text
    forged = _forged(token, header={"alg": "ES256", "typ": "at+jwt", "kid": kid}, key=key)
    # In a name of its own: ten failures, and whoever has the name from this address must wait, the real one too.
    bad, stop, refused = Credentials(username="flooder", password=forged), threading.Event(), []
    audit = Audit(tokens.host)

    def flood() -> None:
        while not stop.is_set():
            refused.append(enter(where, bad).accepted)

    def took(count: int) -> list[float]:
        waits = []
        for number in range(count):
            begin = time.monotonic()
            assert victim.publish("sensors/temp-101/temperature", b"%d" % number).granted
            waits.append(time.monotonic() - begin)
        return waits

    with plant.session("temp-101") as victim:
        calm = took(50)
        threads = [threading.Thread(target=flood) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            busy = took(200)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert not any(refused)
    assert len(refused) > 20
    reasons = {line["reason"] for line in audit.lines(event="refused", client_id="flooder")}
    assert reasons == {"token-signature", "throttled"}
    # The generator takes part of the machine too: what must not happen is that one waits for the others.
    assert max(busy) < 1.0
    measured(
        f"Publishing while {len(refused)} bad tokens were refused: median {statistics.median(busy) * 1000:.1f} ms "
        f"(calm: {statistics.median(calm) * 1000:.1f} ms), slowest {max(busy) * 1000:.0f} ms"
    )


# --- other issuers


def test_devices_of_another_identity_provider_come_in_by_its_key(plant: Plant, tokens: Tokens) -> None:
    """Its tokens name no device of devices.yml: a claim gives the id, another one the role."""
    key, now = ec.generate_private_key(ec.SECP256R1()), int(time.time())
    file = plant.lab.site / "sso.jwks.json"
    file.write_text(json.dumps({"keys": [jwk(key.public_key(), kid="one", alg="ES256")]}), encoding="utf-8")
    said = {
        "iss": "https://sso.plant.example/realms/plant",
        "aud": "mqtt-broker",
        "azp": "cart-7",
        "exp": now + 300,
        "iat": now,
        "jti": "one",
        "realm_access": {"roles": ["plant-sensor", "staff"]},
    }

    def sign(typ: str = "JWT", **other: object) -> Credentials:
        token = _forged(f".{encode_part(said | other)}", header={"alg": "ES256", "typ": typ, "kid": "one"}, key=key)
        return Credentials(username="kc-cart-7", password=token)

    def change(site: Site) -> None:
        site.policy.setdefault("issuers", []).append(
            {
                "name": "sso",
                "issuer": said["iss"],
                "audience": ["mqtt-broker"],
                "jwks_file": "sso.jwks.json",
                "typ": ["JWT"],
                "device": {"claim": "azp", "prefix": "kc-"},
                "roles": {"claim": "realm_access.roles", "map": {"plant-sensor": "sensor"}},
            }
        )

    host, where = plant.lab.hosts["gateway-2"], plant.passwords("gateway-2")
    try:
        with other_site(plant, host, change):
            assert enter(where, sign()).accepted
            _refused_in_both_versions(tokens, "gateway-2", where, sign(aud="mqtts://plant.example"), "token-audience")
            _refused_in_both_versions(tokens, "gateway-2", where, sign(exp=now - 60), "token-expired")
            # In the name of the site's own service, with a key that is not its own.
            own = sign("at+jwt", iss=tokens.source("edge-2").issuer, aud="mqtts://plant.example", sub="edge-2")
            _refused_in_both_versions(tokens, "gateway-2", where, own, "token-key")
    finally:
        file.unlink()
    # As soon as the site does not name the provider any more.
    _refused_in_both_versions(tokens, "gateway-2", where, sign(), "token-issuer")


# --- the service in trouble


@pytest.mark.usefixtures("again")
def test_with_the_service_down_tokens_go_on_and_a_new_one_gives_a_clear_error(plant: Plant, tokens: Tokens) -> None:
    token = tokens.source("edge-2").get()
    with Connected(tokens, "edge-1") as own:
        tokens.host.exec(["systemctl", "stop", "bednet-token-service.socket", "bednet-token-service.service"])
        assert own.publish("sensors/edge-1/temperature", b"21")
        assert enter(tokens.listener("edge-2"), tokens.credentials("edge-2", token)).accepted
        error = tokens.why_none("edge-2")
        assert (error.error, error.again) == ("temporarily_unavailable", True)
        assert "tokens that you have stay good" in str(error)
        # Gateways keep the keys that they have, and say so.
        gateway = plant.lab.hosts["gateway-2"]
        assert gateway.exec(["systemctl", "start", "bednet-token-fetch.service"], check=False).rc != 0
        told = gateway.exec(["journalctl", "-u", "bednet-token-fetch", "-n", "20", "-o", "cat"]).stdout
        assert "answers with the status 503. The broker keeps what it has." in told
        gateway.exec(["systemctl", "reset-failed", "bednet-token-fetch.service"])
        assert enter(tokens.listener("edge-2", "gateway-2"), tokens.credentials("edge-2", token)).accepted
        assert own.lost == []


DATABASE = "/var/lib/bednet-token-service/tokens.db"
# A Python program, as the service's user.
AS_SERVICE = ("setpriv", "--reuid=bednet-token", "--regid=bednet-token", "--clear-groups", "python3", "-c")
# Until its mark is gone, or for as long as a test may last.
LOCK = """
import os, sqlite3, sys, time
database, end = sqlite3.connect(sys.argv[1]), time.monotonic() + 20
database.execute("BEGIN EXCLUSIVE")
os.mkdir(sys.argv[2])
while os.path.isdir(sys.argv[2]) and time.monotonic() < end:
    time.sleep(0.05)
"""
AHEAD = """
import sqlite3, sys, time
now = int(time.time())
with sqlite3.connect(sys.argv[1]) as database:
    row = ("of-tomorrow", "edge-1", now + 3600, now + 4500)
    database.execute("INSERT INTO tokens (jti, device, iat, exp) VALUES (?, ?, ?, ?)", row)
"""
BACK = """
import sqlite3, sys
with sqlite3.connect(sys.argv[1]) as database:
    database.execute("DELETE FROM tokens WHERE jti = 'of-tomorrow'")
"""


def _unavailable(tokens: Tokens, reason: str) -> None:
    error = tokens.why_none("edge-2")
    assert (error.error, error.again) == ("temporarily_unavailable", True)
    told = tokens.host.exec(["journalctl", "-u", "bednet-token-service", "-n", "20", "-o", "cat"]).stdout
    lines = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert lines[-1]["event"] == "unavailable"
    assert lines[-1]["reason"] == reason


@pytest.mark.usefixtures("again")
def test_with_its_database_locked_the_service_says_so_in_time(tokens: Tokens) -> None:
    mark = "/run/database-is-locked"
    lock = threading.Thread(target=lambda: tokens.host.exec(["python3", "-c", LOCK, DATABASE, mark], check=False))
    lock.start()
    try:
        deadline = time.monotonic() + 10
        while tokens.host.exec(["test", "-d", mark], check=False).rc != 0:
            assert time.monotonic() < deadline, "the database is not locked"
            time.sleep(0.05)
        begin = time.monotonic()
        _unavailable(tokens, "database-locked")
        # Before nginx loses patience, and the client.
        assert time.monotonic() - begin < 10
    finally:
        tokens.host.exec(["rmdir", mark], check=False)
        lock.join()


@pytest.mark.usefixtures("again")
def test_with_its_disk_full_the_service_gives_no_token_that_it_cannot_record(tokens: Tokens) -> None:
    home = "/var/lib/bednet-token-service"
    units = ["bednet-token-service.socket", "bednet-token-service.service"]
    tokens.host.exec(["systemctl", "stop", *units])
    script = (
        'cp -a "$1" /run/token-service-home; mount -t tmpfs -o size=4m,mode=0700 none "$1"; '
        'cp -a /run/token-service-home/. "$1/"; '
        'chown bednet-token: "$1"; dd if=/dev/zero of="$1/filler" bs=4k 2>/dev/null || true'
    )
    tokens.host.exec(["sh", "-ec", script, "sh", home])
    try:
        tokens.host.exec(["systemctl", "start", *units])
        _unavailable(tokens, "database-full")
    finally:
        tokens.host.exec(["systemctl", "stop", *units])
        tokens.host.exec(["sh", "-ec", 'umount "$1"; rm -rf /run/token-service-home', "sh", home])


@pytest.mark.usefixtures("again")
def test_with_its_clock_turned_back_the_service_gives_no_token(tokens: Tokens) -> None:
    """As far as the service can tell: its newest token is of the future."""
    tokens.host.exec([*AS_SERVICE, AHEAD, DATABASE])
    try:
        _unavailable(tokens, "clock")
    finally:
        tokens.host.exec([*AS_SERVICE, BACK, DATABASE])


# --- what it costs, and how it is kept


def test_the_service_is_small(tokens: Tokens, measured: Any) -> None:
    def ask(device: str) -> None:
        assert tokens.source(device).get().seconds > 0

    script = (
        "for unit in bednet-token-service bednet-token-nginx; do main=$(systemctl show $unit -p MainPID --value); "
        "for pid in $main $(pgrep -P $main); do cat /proc/$pid/status /proc/$pid/smaps_rollup; done; done"
    )
    # More at once than it has threads, by each way to prove oneself, and no more than one address may ask. A thread
    # comes when it is needed, and stays, with a stack and a heap: how many do is the machine's affair, a few have to.
    with ThreadPoolExecutor(max_workers=24) as pool:
        list(pool.map(ask, [*METHODS] * 12))
    told = tokens.host.exec(["sh", "-ec", script]).stdout
    threads = max(int(count) for count in re.findall(r"^Threads:\s+(\d+)$", told, re.MULTILINE))
    assert threads > 4
    parts = [int(kb) for kb in re.findall(r"^Pss: +(\d+) kB$", told, re.MULTILINE)]
    # The service's two processes, and nginx's two and the one that tends its cache.
    assert len(parts) == 5
    assert sum(parts) < 80_000
    measured(
        f"Memory of the token service and its front, all processes, proportional: {sum(parts) / 1000:.0f} MB, "
        f"{threads} threads"
    )


@pytest.mark.parametrize(
    "unit",
    ["bednet-token-service", "bednet-token-nginx", "bednet-token-purge", "bednet-token-crl", "bednet-token-fetch"],
)
def test_exposure_of_every_unit_is_low(tokens: Tokens, unit: str) -> None:
    told = tokens.host.exec(["systemd-analyze", "security", "--no-pager", f"{unit}.service"]).stdout
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert exposure is not None
    assert float(exposure[1]) <= 2.0


def test_keys_stay_on_the_host_and_with_those_who_use_them(tokens: Tokens) -> None:
    told = tokens.host.exec(
        ["sh", "-ec", "stat -c '%a %U' /etc/bednet-token-service/tls/server.key /var/lib/bednet-token-service/keys/*"]
    ).stdout.splitlines()
    assert told[0] == "400 bednet-token-nginx"
    assert set(told[1:]) == {"600 bednet-token"}
    assert tokens.host.exec(["stat", "-c", "%a %U:%G", "/run/bednet-token-service/app.sock"]).stdout.split() == [
        "660",
        "bednet-token:bednet-token-nginx",
    ]


PURGE = "bednet-token-purge.timer"
AT_ONCE = "[Timer]\nOnCalendar=\nOnActiveSec=100ms\nRandomizedDelaySec=0\nAccuracySec=100ms\n"
# A token and an assertion that are over, for longer than clocks differ, and two that are not yet.
RUN_OUT = """
import sqlite3, sys, time
now = int(time.time())
with sqlite3.connect(sys.argv[1]) as database:
    for name, end in (("over", now - 301), ("not-yet", now - 200)):
        row = (f"purge-{name}", "edge-1", end - 900, end)
        database.execute("INSERT INTO tokens (jti, device, iat, exp) VALUES (?, ?, ?, ?)", row)
        database.execute("INSERT INTO assertions (used, exp) VALUES (?, ?)", (f"purge-{name}", end))
"""
LEFT = """
import sqlite3, sys
with sqlite3.connect(sys.argv[1]) as database:
    for statement in sys.argv[2:]:
        print(*(row[0] for row in database.execute(statement)))
"""
LOOK = ("SELECT jti FROM tokens WHERE jti LIKE 'purge-%'", "SELECT used FROM assertions WHERE used LIKE 'purge-%'")
FORGET = ("DELETE FROM tokens WHERE jti LIKE 'purge-%'", "DELETE FROM assertions WHERE used LIKE 'purge-%'")


def test_what_has_run_out_is_thrown_away_by_a_timer_and_nothing_else(tokens: Tokens) -> None:
    told = tokens.host.exec(["systemctl", "show", PURGE, "-p", "UnitFileState,ActiveState"]).stdout
    assert set(told.split()) == {"UnitFileState=enabled", "ActiveState=active"}
    # The newest token stays in any case.
    tokens.source("edge-2").get()

    def left() -> list[str]:
        return tokens.host.exec([*AS_SERVICE, LEFT, DATABASE, *LOOK]).stdout.splitlines()

    quick = f"/run/systemd/system/{PURGE}.d"
    tokens.host.exec([*AS_SERVICE, RUN_OUT, DATABASE])
    try:
        assert [set(line.split()) for line in left()] == [{"purge-over", "purge-not-yet"}] * 2
        tokens.host.exec(["mkdir", "-p", quick])
        tokens.host.write_file(f"{quick}/at-once.conf", AT_ONCE)
        tokens.host.exec(["sh", "-ec", f"systemctl daemon-reload; systemctl restart {PURGE}"])
        deadline = time.monotonic() + 20
        while "purge-over" in " ".join(left()):
            assert time.monotonic() < deadline, "the timer throws nothing away"
            time.sleep(0.1)
        assert left() == ["purge-not-yet"] * 2
    finally:
        tokens.host.exec([*AS_SERVICE, LEFT, DATABASE, *FORGET])
        tokens.host.exec(["rm", "-rf", quick])
        tokens.host.exec(["sh", "-ec", f"systemctl daemon-reload; systemctl restart {PURGE}"])


@pytest.mark.parametrize(
    "kind",
    [
        "expired",
        "not-yet-valid",
        "wrong-ca",
        "wrong-ca-same-key-identifier",
        "self-signed",
        "server-as-client",
        "leaf-as-ca",
        "path-length",
    ],
)
def test_a_certificate_that_does_not_hold_is_refused_by_the_front_in_words_of_oauth(
    plant: Plant, tokens: Tokens, kind: str
) -> None:
    """By itself nginx would say 400, with a page of HTML (its errors 495 and 496)."""
    where = Listener(tokens.host.address, 8443, plant.ca, "tokens.plant.example")
    form = {"grant_type": "client_credentials", "client_id": "temp-101"}
    answer = request(where, "POST", "/token", credentials=plant.villain(kind), form=form)
    assert (answer.status, answer.json()["error"]) == (401, "invalid_client")
    assert answer.json()["error_description"] == "the client certificate is not valid at this site"
    assert answer.headers["cache-control"] == "no-store"


def test_nobody_gets_a_token_in_the_name_of_another(plant: Plant, tokens: Tokens) -> None:
    own = plant.certificate("temp-101")
    for source in (
        tokens.source("edge-1", certificate=own.certificate, key=own.key),
        tokens.source("edge-3", certificate=own.certificate, key=own.key),
        TokenSource(
            "temp-101",
            tokens.source("edge-1").issuer,
            "tls_client_auth",
            plant.ca,
            own.certificate,
            own.key,
            address=tokens.host.address,
        ),
    ):
        with pytest.raises(OSError, match=r"invalid_client|unauthorized_client") as caught:
            source.get()
        assert getattr(caught.value, "again", None) is False


# --- as the page for device makers says (docs/tokens.md)

PAGE = Path(__file__).parents[2] / "docs/tokens.md"


def _commands(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_commands_of_the_page_for_device_makers_do_what_it_says(plant: Plant, tokens: Tokens) -> None:
    """An outside OAuth client (curl) and an ordinary MQTT client (mosquitto_pub), on a host that knows the names."""
    by_certificate, by_secret, publish = _commands("sh")
    host = plant.lab.hosts["devices"]
    folder = "/run/device-maker"
    try:
        for device in ("edge-1", "edge-2"):
            host.exec(["mkdir", "-p", "-m", "0700", f"{folder}/{device}"])
            for path in (plant.folder / device).iterdir():
                host.write_file(f"{folder}/{device}/{path.name}", path.read_bytes(), mode="0600")
        answer = json.loads(host.exec(["env", "-C", f"{folder}/edge-1", "sh", "-ec", by_certificate]).stdout)
        assert claims(answer["access_token"])["sub"] == "edge-1"
        assert set(answer) == {"access_token", "token_type", "expires_in", "scope"}
        told = json.loads(host.exec(["env", "-C", f"{folder}/edge-2", "sh", "-ec", by_secret]).stdout)
        assert claims(told["access_token"])["sub"] == "edge-2"
        with plant.session("historian") as reader:
            reader.subscribe("sensors/edge-1/#")
            words = ["env", "-C", f"{folder}/edge-1", "sh", "-ec", f"read -r TOKEN; {publish}"]
            host.exec(words, input=f"{answer['access_token']}\n")
            reader.until(lambda message: message.topic == "sensors/edge-1/rms", "what was published")
    finally:
        host.exec(["rm", "-rf", folder])


LIBRARIES = {"from requests_oauthlib": "edge-1", "from authlib": "edge-3"}


def test_every_example_in_python_is_one_of_those_that_are_run_here() -> None:
    """As all of the shell are, by the test above; that of `bednet token` is run in tests/unit."""
    assert all(sum(word in text for word in (*LIBRARIES, "TokenClient")) == 1 for text in _commands("python"))
    assert len(_commands("python")) == len(LIBRARIES) + 1


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_oauth_library_gets_a_token_as_the_page_says(
    plant: Plant, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    (code,) = (text for text in _commands("python") if library in text)
    device = LIBRARIES[library]
    connect = urllib3.util.connection.create_connection

    def to_the_lab(address: tuple[str, int], *arguments: Any, **how: Any) -> Any:
        assert address == ("tokens.plant.example", 8443)
        return connect((tokens.host.address, 8443), *arguments, **how)

    monkeypatch.setattr(urllib3.util.connection, "create_connection", to_the_lab)
    monkeypatch.chdir(plant.folder / device)
    found: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), found)  # noqa: S102 - our own page
    token = claims(found["token"])
    assert token["sub"] == device
    assert tokens.source(device).method == METHODS[device]
    # So it is good at the port for certificates.
    shown = Credentials(plant.folder / device / "certificate.pem", plant.folder / device / "key.pem", device)
    assert enter(tokens.listener(device), replace(shown, password=found["token"]), version=5).accepted


def test_the_helper_works_as_the_page_says(plant: Plant, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (text for text in _commands("python") if "TokenClient" in text)
    names = {"tokens.plant.example": tokens.host.address, "gateway-1.plant.example": tokens.host.address}
    connect = socket.create_connection

    def to_the_lab(address: tuple[str, int], *arguments: Any, **how: Any) -> socket.socket:
        return connect((names.get(address[0], address[0]), address[1]), *arguments, **how)

    monkeypatch.setattr(socket, "create_connection", to_the_lab)
    monkeypatch.chdir(plant.folder / "edge-1")
    found: dict[str, Any] = {}
    with plant.session("historian") as reader:
        reader.subscribe("sensors/edge-1/#")
        exec(compile(code, str(PAGE), "exec"), found)  # noqa: S102 - our own page
        reader.until(lambda message: message.topic == "sensors/edge-1/rms", "what was published")
    found["client"].disconnect()
    found["client"].loop_stop()
