# SPDX-License-Identifier: Apache-2.0
"""Two instances of the token service on Debian 12, behind one name, with PostgreSQL from Debian.

The sharp edges: a program that needs newer libraries than Debian 12 has, an instance whose key the gateways do not
have, and a revocation that the other instance does not know.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest
import yaml

from bednet.client import TokenError, TokenSource
from bednet.probe import NOT_AUTHORIZED, Credentials, enter
from testbed.lab import Lab
from tests.conftest import Plant
from tests.tokens.conftest import claims
from tests.tokens.logs import check_silence, logs_of, secrets_of

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        (lab.site / "group_vars/all/zz-database.yml").write_text(yaml.safe_dump(variables), encoding="utf-8")
        lab.play("site.yml")
        assert lab.play("site.yml").changed_tasks == []
        folder = tmp_path_factory.mktemp("instances")
        folder.chmod(0o700)
        plant = Plant(lab, folder)
        plant.fetch_bundles()
        yield plant


def _source(plant: Plant, instance: str, device: str = "edge-2") -> TokenSource:
    return TokenSource.of_bundle(plant.folder / device, address=plant.lab.hosts[instance].address)


def test_every_gateway_takes_the_tokens_of_every_instance(pair: Plant) -> None:
    signed = {}
    for instance in HOSTS:
        token = _source(pair, instance).get()
        signed[instance] = token.text.split(".")[0]
        for gateway in HOSTS:
            shown = Credentials(username="edge-2", password=token.text)
            assert enter(pair.passwords(gateway), shown).accepted, (instance, gateway)
    # Each with a key of its own.
    assert len(set(signed.values())) == 2


def test_what_one_instance_revoked_is_known_to_the_other_and_to_the_gateways(pair: Plant) -> None:
    token = _source(pair, "gateway-1").get()
    pair.lab.hosts["gateway-2"].exec(["bednet-token-service", "revoke", "--jti", claims(token)["jti"]])
    for gateway in HOSTS:
        # As the timer does.
        pair.lab.hosts[gateway].exec(["systemctl", "start", "bednet-token-fetch.service"])
        shown = Credentials(username="edge-2", password=token.text)
        assert enter(pair.passwords(gateway), shown).code == NOT_AUTHORIZED


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


def test_neither_the_databases_password_nor_a_token_is_in_any_log(pair: Plant) -> None:
    path = "/etc/bednet-token-service/database_password"
    password = pair.lab.hosts["gateway-1"].exec(["cat", path]).raw.strip()
    logs = logs_of(pair.lab)
    # The logs are the ones: the service's own, and that of the database server, where the password was set.
    assert b'"event": "issued"' in logs["gateway-2"]
    assert b"database system is ready" in logs["authority"]
    check_silence(logs, secrets_of(pair.folder) | {"the database's password": password})
