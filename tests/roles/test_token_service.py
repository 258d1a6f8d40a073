# SPDX-License-Identifier: Apache-2.0
"""The token service with as many variables as can be other than their defaults, on a host of its own (`full`).

Its host is no gateway. The sharp edges: a value that no broker would take, found before anything is changed; what only
works since a gateway's files lie on the same host; and keys that are signed with by one side and unknown to the other.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest
import yaml

from bednet.client import TokenSource
from bednet.probe import Credentials, Listener, Offer, Outcome, enter, handshake
from bednet.verify.report import read_report
from testbed.lab import Lab
from tests.conftest import Plant
from tests.live import refused_for
from tests.tokens.conftest import claims, header

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bednet.verify.report import Report
    from testbed.lab import Host, PlayResult

pytestmark = [pytest.mark.lab, pytest.mark.full, pytest.mark.timeout(1800)]

GATEWAY, HOST = "gateway-1", "gateway-2"
PORT = 9443
VARIABLES = {
    "token_service_name": "sts.plant.example",
    "token_service_port": PORT,
    "token_service_bind_address": "{{ ansible_host }}",
    "token_service_algorithm": "EdDSA",
    "token_service_token_seconds": 300,
    "token_service_tls_minimum": "1.3",
    "token_service_key_type": "P-384",
    "token_service_approvers": ["tablet-jo"],
    "token_service_introspectors": ["historian"],
    "token_service_requests_per_second": 200,
    "token_service_burst": 300,
    "token_service_connections": 20,
    "token_service_threads": 2,
    "token_service_log_level": "debug",
    "token_service_server_validity_days": 90,
    "token_service_renew_before_days": 20,
    "token_service_free_space_mib": 32,
    "token_service_clock_skew_seconds": 20,
    "token_service_crl_fetch_calendar": "*:0/20",
}
ISSUER = {
    "name": "site",
    "issuer": f"https://sts.plant.example:{PORT}",
    "audience": ["mqtts://plant.example"],
    "service": True,
    "algorithms": ["EdDSA"],
    "longest": 300,
    "leeway": 5,
}
REFUSALS: dict[str, tuple[tuple[str, ...], str]] = {
    "another issuer": (("token_service_port=9444",), "every broker would refuse its tokens"),
    "an algorithm": (("token_service_algorithm=ES256",), "would sign with ES256 for 300 s, but the policy's issuer"),
    "a lifetime": (("token_service_token_seconds=301",), "would sign with EdDSA for 301 s, but the policy's issuer"),
    "a kind of key": (("token_service_key_type=DSA",), "token_service_key_type one of"),
    "a password in the URL": (
        ("token_service_database_url=postgresql://bednet:secret@db.plant.example/bednet",),
        "The password is no part of it",
    ),
    "another database": (
        ("token_service_database_url=mysql://bednet@db/bednet",),
        "not EMPTY (SQLite), and not postgresql",
    ),
    "a full disk": (("token_service_free_space_mib=99999999",), "and 99999999 are wanted. Nothing was changed."),
}


@dataclass(frozen=True)
class Deployed:
    """The site, and what happened on the way.

    :ivar refused: by what was wrong, the run that was refused.
    """

    plant: Plant
    refused: dict[str, PlayResult]
    check: PlayResult
    converge: PlayResult
    again: PlayResult
    report: Report

    @property
    def host(self) -> Host:
        """The token service's host."""
        return self.plant.lab.hosts[HOST]

    def source(self, device: str, **more: Any) -> TokenSource:
        """Return where a device gets its tokens."""
        return TokenSource.of_bundle(self.plant.folder / device, address=self.host.address, **more)

    def send(self, method: str, path: str, body: dict[str, str], who: str) -> tuple[int, str]:
        """Send a form with somebody's certificate."""
        context = ssl.create_default_context(cafile=str(self.plant.ca))
        own = self.plant.certificate(who)
        assert own.certificate is not None
        context.load_cert_chain(own.certificate, own.key)
        # Its name is looked up nowhere.
        context.check_hostname = False
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        with contextlib.closing(http.client.HTTPSConnection(self.host.address, PORT, context=context)) as connection:
            connection.request(method, path, urlencode(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()


def edit(path: Path, **changes: Any) -> None:
    told = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**told, **changes}, sort_keys=False), encoding="utf-8")


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """A CA host, one gateway and a host for the token service: refused, checked, converged, run again and verified."""
    with Lab.up("sts", field=False) as lab:
        hosts = yaml.safe_load((lab.site / "hosts.yml").read_text(encoding="utf-8"))
        hosts["token_service"] = {"hosts": {HOST: hosts["gateways"]["hosts"].pop(HOST)}}
        (lab.site / "hosts.yml").write_text(yaml.safe_dump(hosts), encoding="utf-8")
        edit(lab.site / "policy.yml", issuers=[ISSUER])
        (lab.site / "group_vars/all/zz-token-service.yml").write_text(yaml.safe_dump(VARIABLES), encoding="utf-8")
        refused = {
            what: lab.play("site.yml", *(word for value in values for word in ("-e", value)), check=False)
            for what, (values, _) in REFUSALS.items()
        }
        check, converge, again = (lab.play("site.yml", *words) for words in (("--check",), (), ()))
        path = lab.folder / "report.json"
        lab.play("verify.yml", "-e", f"verification_report={path}", check=False)
        folder = tmp_path_factory.mktemp("sts")
        folder.chmod(0o700)
        plant = Plant(lab, folder)
        plant.fetch_bundles()
        yield Deployed(plant, refused, check, converge, again, read_report(path))


@pytest.mark.parametrize("what", REFUSALS)
def test_values_that_cannot_be_are_refused_before_anything_is_changed(deployed: Deployed, what: str) -> None:
    result = deployed.refused[what]
    assert result.rc != 0
    assert REFUSALS[what][1] in re.sub(r"\s+", " ", result.stdout)
    assert "secret@" not in result.stdout
    assert result.changed == 0


def test_a_check_run_tells_what_would_come_and_a_second_run_changes_nothing(deployed: Deployed) -> None:
    assert deployed.check.failed == 0
    assert "a signing key (EdDSA)" in deployed.check.stdout
    assert deployed.converge.failed == 0
    assert deployed.again.changed_tasks == []


def test_every_check_of_verify_passes(deployed: Deployed) -> None:
    assert [result for result in deployed.report.results if not result.passed] == []
    assert {result.gateway for result in deployed.report.results} == {GATEWAY, f"{HOST}:{PORT}"}


def test_tokens_that_it_signs_with_ed25519_let_devices_in(deployed: Deployed) -> None:
    plant = deployed.plant
    for device in ("edge-1", "edge-3"):
        token = deployed.source(device).get()
        said = claims(token)
        assert header(token)["alg"] == "EdDSA"
        assert (said["iss"], said["exp"] - said["iat"]) == (ISSUER["issuer"], 300)
        own = plant.certificate(device)
        shown = Credentials(own.certificate, own.key, username=device, password=token.text)
        assert enter(plant.mtls(GATEWAY), shown).accepted
        # Its owner's certificate is what it is bound to.
        stolen = Credentials(username=device, password=token.text)
        assert refused_for(plant.lab.hosts[GATEWAY], plant.passwords(GATEWAY), stolen) == "token-binding"
    token = deployed.source("edge-2").get()
    assert enter(plant.passwords(GATEWAY), Credentials(username="edge-2", password=token.text)).accepted


def test_it_listens_at_one_address_and_takes_tls_1_3_alone(deployed: Deployed) -> None:
    told = deployed.host.exec(["ss", "-Hltn"]).stdout
    assert [line.split()[3] for line in told.splitlines() if f":{PORT}" in line] == [f"{deployed.host.address}:{PORT}"]
    front = Listener(deployed.host.address, PORT, deployed.plant.ca, "sts.plant.example")
    hello = handshake(front).hello
    assert hello is not None
    assert hello.version == "1.3"
    seen = handshake(front, offer=Offer(maximum="1.2"))
    assert (seen.outcome, seen.reason) == (Outcome.ALERT, "protocol version")


def test_introspectors_and_approvers_are_those_that_were_named(deployed: Deployed) -> None:
    token = deployed.source("edge-2").get().text
    status, body = deployed.send("POST", "/introspect", {"token": token, "client_id": "historian"}, "historian")
    assert (status, json.loads(body)["active"], json.loads(body)["sub"]) == (200, True, "edge-2")
    status, body = deployed.send("POST", "/introspect", {"token": token, "client_id": "tablet-jo"}, "tablet-jo")
    assert (status, json.loads(body)["error"]) == (401, "invalid_client")
    assert deployed.send("GET", "/device", {}, "tablet-jo")[0] == 200
    status, body = deployed.send("GET", "/device", {}, "historian")
    assert status == 403
    assert "user_code" not in body
    journal = deployed.host.exec(["journalctl", "--unit=bednet-token-service", "--output=cat"]).stdout
    lines = [json.loads(line) for line in journal.splitlines() if line.startswith("{")]
    reasons = [line["reason"] for line in lines if line["event"] == "refused"]
    assert reasons[-2:] == ["wrong-method", "not-an-approver"]


@pytest.mark.parametrize(
    "unit", ["bednet-token-service", "bednet-token-nginx", "bednet-token-crl", "bednet-token-purge"]
)
def test_exposure_of_its_units_is_low_there_too(deployed: Deployed, unit: str) -> None:
    told = deployed.host.exec(["systemd-analyze", "security", "--no-pager", f"{unit}.service"]).stdout
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert exposure is not None
    assert float(exposure[1]) <= 2.0


def test_its_host_has_nothing_of_a_gateway(deployed: Deployed) -> None:
    assert deployed.host.exec(["sh", "-c", "command -v mosquitto bednet-store"], check=False).stdout == ""
    deployed.host.exec(["systemctl", "start", "bednet-token-crl.service"])
    told = json.loads(deployed.host.exec(["bednet-token-service", "status"]).stdout)
    assert told["problems"] == []
    assert told["crl_number"] > 0
