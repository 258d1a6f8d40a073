# SPDX-License-Identifier: Apache-2.0
"""Two instances of the token service on Debian 12, behind one name, with PostgreSQL from Debian.

The sharp edges: a program that needs newer libraries than Debian 12 has, an instance whose key the gateways do not
have, a stolen key of one instance that goes on being good, a revocation that the other instance does not know, and a
new database that knows nothing of what went before.
"""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING

import pytest
import yaml

from bednet.client import TokenError, TokenSource
from bednet.probe import Credentials, Session, enter
from bednet.store import token_key
from testbed.lab import Lab
from tests.conftest import Plant
from tests.live import refused_for
from tests.tokens.conftest import QUICK, claims, header
from tests.tokens.logs import check_silence, logs_of, secrets_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bednet.client import Token

pytestmark = [pytest.mark.lab, pytest.mark.full]

HOSTS = ("gateway-1", "gateway-2")
DATABASE = """
DEBIAN_FRONTEND=noninteractive apt-get -qq update
DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends postgresql >/dev/null
cd /etc/postgresql/*/main
echo "listen_addresses = '*'" >>postgresql.conf
echo "hostssl bednet bednet $1 scram-sha-256" >>pg_hba.conf
systemctl restart 'postgresql@*'
cd /
runuser -u postgres -- psql --quiet --set=ON_ERROR_STOP=1
runuser -u postgres -- createdb --owner=bednet bednet
"""
ANOTHER_DATABASE = """
cd /etc/postgresql/*/main
echo "hostssl another bednet $1 scram-sha-256" >>pg_hba.conf
systemctl reload 'postgresql@*'
cd /
runuser -u postgres -- createdb --owner=bednet another
"""
VARIABLES = "group_vars/all/zz-database.yml"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    """A site whose token service is on both gateways, and its database on the CA's host."""
    with Lab.up("instances", suite="bookworm", field=False) as lab:
        password = secrets.token_urlsafe(24)
        statement = f"CREATE ROLE bednet LOGIN PASSWORD '{password}';"
        lab.hosts["authority"].exec(["sh", "-ec", DATABASE, "sh", lab.subnet], input=statement, timeout_s=300)
        hosts = yaml.safe_load((lab.site / "hosts.yml").read_text(encoding="utf-8"))
        hosts["token_service"] = {"hosts": dict.fromkeys(HOSTS)}
        (lab.site / "hosts.yml").write_text(yaml.safe_dump(hosts), encoding="utf-8")
        variables = {
            "token_service_database_url": "postgresql://bednet@authority.plant.example/bednet",
            "token_service_database_password": password,
        }
        (lab.site / VARIABLES).write_text(yaml.safe_dump(variables), encoding="utf-8")
        lab.play("site.yml")
        assert lab.play("site.yml").changed_tasks == []
        folder = tmp_path_factory.mktemp("instances")
        folder.chmod(0o700)
        plant = Plant(lab, folder)
        plant.fetch_bundles()
        yield plant


def _source(plant: Plant, instance: str, device: str = "edge-2") -> TokenSource:
    return TokenSource.of_bundle(plant.folder / device, address=plant.lab.hosts[instance].address)


def _shown(token: Token) -> Credentials:
    return Credentials(username="edge-2", password=token.text)


def _accepted_everywhere(plant: Plant) -> dict[str, Token]:
    """Get a token from each instance, and make sure that every gateway takes it. :returns: the tokens by instance."""
    found = {instance: _source(plant, instance).get() for instance in HOSTS}
    for instance, token in found.items():
        for gateway in HOSTS:
            assert enter(plant.passwords(gateway), _shown(token)).accepted, (instance, gateway)
    # Each signs with a key of its own.
    assert len({header(token)["kid"] for token in found.values()}) == len(HOSTS)
    return found


def _gateways_refuse(plant: Plant, token: Token, reason: str, gateways: tuple[str, ...] = HOSTS) -> None:
    for gateway in gateways:
        host = plant.lab.hosts[gateway]
        assert refused_for(host, plant.passwords(gateway), _shown(token)) == reason, gateway


def _kids(tokens: dict[str, Token]) -> set[str]:
    return {header(token)["kid"] for token in tokens.values()}


def test_every_gateway_takes_the_tokens_of_every_instance(pair: Plant) -> None:
    _accepted_everywhere(pair)


def test_what_one_instance_revoked_is_known_to_the_other_and_to_the_gateways(pair: Plant) -> None:
    token = _source(pair, "gateway-1").get()
    pair.lab.hosts["gateway-2"].exec(["bednet-token-service", "revoke", f"--jti={claims(token)['jti']}"])
    for gateway in HOSTS:
        # As the timer does.
        pair.lab.hosts[gateway].exec(["systemctl", "start", "bednet-token-fetch.service"])
    _gateways_refuse(pair, token, "token-revoked")


def test_every_instance_gets_a_new_key_and_every_gateway_has_it_first(pair: Plant) -> None:
    before = _accepted_everywhere(pair)
    result = pair.lab.play("rotate_token_keys.yml")
    for instance in HOSTS:
        assert f"{instance} signs with " in result.stdout
    assert not _kids(_accepted_everywhere(pair)) & _kids(before)
    # What the old ones signed is good as long as it says.
    for gateway, token in zip(HOSTS, before.values(), strict=True):
        assert enter(pair.passwords(gateway), _shown(token)).accepted


def test_a_stolen_key_is_good_at_no_instance_and_one_that_is_away_is_named(pair: Plant) -> None:
    """docs/operations.md, "A signing key that may have leaked": one command, whosever key it was."""
    before, away = _accepted_everywhere(pair), pair.lab.hosts["gateway-2"]
    away.disconnect()
    try:
        # Where nothing was stolen no instance goes ahead of the others.
        planned = pair.lab.play("rotate_token_keys.yml", check=False, env=QUICK)
        signs = header(_source(pair, "gateway-1").get())["kid"]
        result = pair.lab.play("rotate_token_keys.yml", "-e", "compromised=true", check=False, env=QUICK)
    finally:
        away.connect()
    assert planned.rc != 0
    assert "gateway-2 made no new key: see above. Put that right" in " ".join(planned.stdout.split())
    assert signs == header(before["gateway-1"])["kid"]
    said = " ".join(result.stdout.split())
    assert result.rc != 0
    assert "gateway-2 may still take what an old key signs: see above." in said
    assert "gateway-2 made no new key: see above. What its old one signs is good everywhere." in said
    _gateways_refuse(pair, before["gateway-1"], "token-key", ("gateway-1",))

    with Session(pair.passwords("gateway-1"), _shown(before["gateway-2"])) as session:
        pair.lab.play("rotate_token_keys.yml", "-e", "compromised=true")
        session.wait_goodbye(1)
    for token in before.values():
        _gateways_refuse(pair, token, "token-key")
    assert not _kids(_accepted_everywhere(pair)) & _kids(before)


def test_without_the_database_there_is_a_clear_error_and_afterwards_tokens_again(pair: Plant) -> None:
    host = pair.lab.hosts["authority"]
    host.exec(["systemctl", "stop", "postgresql@*"])
    try:
        with pytest.raises(TokenError, match="temporarily_unavailable") as caught:
            _source(pair, "gateway-1").get()
        assert caught.value.again
    finally:
        host.exec(["sh", "-c", "systemctl start postgresql"])
    assert _source(pair, "gateway-1").get().seconds == 900


def test_the_password_of_the_database_is_for_the_service_alone(pair: Plant) -> None:
    path = "/etc/bednet-token-service/database_password"
    assert pair.lab.hosts["gateway-1"].exec(["stat", "-c", "%a %U:%G", path]).stdout.split() == [
        "640",
        "root:bednet-token",
    ]


def test_every_check_of_verify_passes_there(pair: Plant) -> None:
    assert pair.lab.play("verify.yml").failed == 0


def test_a_new_database_ends_the_tokens_from_before_and_gateways_forget_no_revocation(pair: Plant) -> None:
    """docs/operations.md, "Several instances of the token service"."""
    lab, before = pair.lab, _accepted_everywhere(pair)
    revoked = _source(pair, "gateway-1").get()
    lab.play("revoke_token.yml", "-e", f"jti={claims(revoked)['jti']}")
    lab.hosts["authority"].exec(["sh", "-ec", ANOTHER_DATABASE, "sh", lab.subnet], timeout_s=60)
    path = lab.site / VARIABLES
    variables = yaml.safe_load(path.read_text(encoding="utf-8"))
    variables |= {"token_service_database_url": "postgresql://bednet@authority.plant.example/another"}
    path.write_text(yaml.safe_dump(variables), encoding="utf-8")
    with Session(pair.passwords("gateway-1"), _shown(before["gateway-2"])) as session:
        lab.play("site.yml")
        session.wait_goodbye(1)
    _gateways_refuse(pair, before["gateway-1"], "token-key")
    assert not _kids(_accepted_everywhere(pair)) & _kids(before)
    kept = token_key(claims(revoked)["iss"], claims(revoked)["jti"]).hex()
    for gateway in HOSTS:
        told = [json.loads(line) for line in lab.hosts[gateway].exec(["bednet-store", "dump"]).stdout.splitlines()]
        assert kept in {line.get("revoked_token") for line in told}
    assert lab.play("site.yml").changed_tasks == []


def test_neither_the_databases_password_nor_a_token_is_in_any_log(pair: Plant) -> None:
    path = "/etc/bednet-token-service/database_password"
    password = pair.lab.hosts["gateway-1"].exec(["cat", path]).raw.strip()
    logs = logs_of(pair.lab)
    # The logs are the ones: the service's own, and that of the database server, where the password was set.
    assert b'"event": "issued"' in logs["gateway-2"]
    assert b"database system is ready" in logs["authority"]
    check_silence(logs, secrets_of(pair.folder) | {"the database's password": password})
