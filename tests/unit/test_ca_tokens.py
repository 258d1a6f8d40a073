# SPDX-License-Identifier: Apache-2.0
"""What the CA does for tokens: the devices' means to get one, and what the token service is told.

The sharp edges: a secret that gateways are told though they never need it, a renewal that locks out a device whose
bundle is still under way, and a token service that gets a gateway's names, or a gateway that gets its.
"""

from __future__ import annotations

import ast
import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from bednet import ca
from bednet.token_service import certified, clients, site
from tests.token_service.conftest import settings_of
from tests.token_service.plant import compiled
from tests.unit.ca_home import START, Home, make_csr, make_home

NOW = START + timedelta(days=10)
NAME = "tokens.plant.example"
ISSUER = f"https://{NAME}:8443"
GATEWAY = {
    "name": "gateway-1",
    "address": "gateway-1.plant.example",
    "mtls_port": 8883,
    "password_port": 8884,
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A CA's folder."""
    return make_home(tmp_path / "ca")


def token(name: str, method: str = "tls_client_auth", **more: Any) -> dict[str, Any]:
    return {"id": name, "authentication": ["token"], "token": method, **more}


def ask(name: str = "gateway-1", dns: tuple[str, ...] = (NAME,), key: Any = None, **more: Any) -> dict[str, Any]:
    csr = make_csr(key or ec.generate_private_key(ec.SECP256R1()), name, dns=dns)
    asked = {"name": name, "csr": csr, "days": 90, "renew_before_days": 30, "dns": list(dns), "ip": []}
    service = {"purpose": "token_service", "private_key_jwt": []}
    return {**asked, **service, **more}


def read(home: Home, device: str, name: str) -> str:
    return (home.path / "bundles" / device / name).read_text(encoding="utf-8")


def files(home: Home, device: str) -> set[str]:
    return {path.name for path in (home.path / "bundles" / device).iterdir()}


@pytest.mark.parametrize(
    ("method", "secret", "place", "told"),
    [
        ("tls_client_auth", {"key.pem", "certificate.pem"}, "8883", "--cert certificate.pem --key key.pem"),
        ("private_key_jwt", {"key.pem", "certificate.pem"}, "8883", "client_assertion_type="),
        ("client_secret_basic", {"client_secret"}, "8884", 'user = "edge-1:'),
    ],
)
def test_a_bundle_has_what_its_device_gets_a_token_with(
    home: Home, method: str, secret: set[str], place: str, told: str
) -> None:
    home.sync([token("edge-1", method)], NOW, gateways=[GATEWAY], token_issuer=ISSUER)
    assert files(home, "edge-1") == {"ca.pem", "client.json", "README.txt"} | secret
    client = json.loads(read(home, "edge-1", "client.json"))
    assert client["authentication"] == ["token"]
    assert client["token"] == {"method": method, "issuer": ISSUER}
    text = read(home, "edge-1", "README.txt")
    assert told in text
    assert f"{ISSUER}/token" in text
    assert f"Show it over TLS to gateway-1.plant.example:{place}" in text
    # The certificate alone lets nobody in; so nobody is told to come with it.
    assert "With its certificate" not in text


def test_a_site_that_issues_no_tokens_says_so_in_the_bundle(home: Home) -> None:
    home.sync([token("edge-1")], NOW, gateways=[GATEWAY])
    assert json.loads(read(home, "edge-1", "client.json"))["token"] == {"method": "tls_client_auth", "issuer": None}
    assert "the site itself issues none" in read(home, "edge-1", "README.txt")


def test_a_client_secret_has_256_bits_and_is_kept_as_a_hash(home: Home) -> None:
    home.sync([token("edge-1", "client_secret_basic"), token("edge-2", "client_secret_basic")], NOW)
    secrets = {name: read(home, name, "client_secret").strip() for name in ("edge-1", "edge-2")}
    assert len(set(secrets.values())) == 2
    kept = (home.path / "state/passwords.json").read_text(encoding="utf-8")
    for name, secret in secrets.items():
        assert len(secret) == 43
        assert secret not in kept
        assert ca.is_password(secret, json.loads(kept)["client_secrets"][name])
        assert (home.path / "bundles" / name / "client_secret").stat().st_mode & 0o777 == 0o600
    again = home.sync([token("edge-1", "client_secret_basic"), token("edge-2", "client_secret_basic")], NOW)
    assert again["changed"] is False


def test_each_server_is_told_what_it_needs_and_nothing_else(home: Home) -> None:
    devices = [
        token("edge-1", "client_secret_basic"),
        token("edge-2", "private_key_jwt"),
        token("edge-3"),
        {"id": "meter-1", "authentication": ["password", "psk"]},
    ]
    home.sync(devices, NOW)
    service = home.run("sign-server", ask(private_key_jwt=["edge-2"]), NOW)
    assert set(service["client_secrets"]) == {"edge-1"}
    assert set(service["certificates"]) == {"edge-2"}
    assert read(home, "edge-2", "certificate.pem").startswith(service["certificates"]["edge-2"])
    gateway = home.run("sign-server", _gateway(), NOW)
    assert not {"client_secrets", "certificates"} & set(gateway)
    assert set(gateway["passwords"]) == {"meter-1", "bednet-probe"}
    assert service["revoked_serials"] == gateway["revoked_serials"] != {}


def hand_over(home: Home, folder: Path, **more: Any) -> site.SiteData:
    """Let the service read what the CA says of a site without devices, as the role hands it over."""
    told = home.run("sign-server", ask(**more), NOW)
    tasks = (Path(__file__).parents[2] / "roles/token_service/tasks/site.yml").read_text(encoding="utf-8")
    found = re.search(r"__token_service_from_ca .*?selectattr\('key', 'in', (\[.*?\])\)", tasks)
    assert found
    return site.read(compiled([]), {name: told[name] for name in ast.literal_eval(found[1])}, settings_of(folder))


def test_the_token_service_tells_an_older_list_by_what_the_ca_says(home: Home, tmp_path: Path) -> None:
    home.sync([token("edge-1")], NOW)
    key = ca.make_key("P-256")
    before = hand_over(home, tmp_path, key=key)
    home.run("revoke", {"id": "edge-1", "reason": "keyCompromise"}, NOW)
    after = hand_over(home, tmp_path, key=key)
    assert len(after.serials) == len(before.serials) + 1
    assert before.crl_number is not None
    assert after.crl_number is not None
    assert after.crl_number > before.crl_number
    assert after.crl_number == home.crl().extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def test_who_is_unknown_costs_the_token_service_as_much_as_a_wrong_secret(home: Home) -> None:
    """Else the time that a refusal takes says which devices there are."""
    home.sync([token("edge-1", "client_secret_basic")], NOW)
    told = home.run("sign-server", ask(), NOW)["client_secrets"]["edge-1"]
    assert clients._NOBODY.iterations == site.SecretHash.parse(told).iterations


def _print(key: Any) -> str:
    return ca.fingerprint(key)


def _gateway(name: str = "gateway-1", dns: tuple[str, ...] = ("gateway-1.plant.example",)) -> dict[str, Any]:
    asked = ask(name, dns)
    del asked["purpose"], asked["private_key_jwt"]
    return asked


def test_a_gateway_has_a_certificate_as_such_and_another_as_a_token_service(home: Home) -> None:
    gateway, service = home.run("sign-server", _gateway(), NOW), home.run("sign-server", ask(), NOW)
    kinds = {entry.serial: (entry.kind, entry.reason) for entry in home.entries().values()}
    assert kinds[gateway["serial"]] == ("server", None)
    assert kinds[service["serial"]] == ("token-service", None)
    certificate = x509.load_pem_x509_certificate(service["certificate"].encode())
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_several_instances_stand_behind_one_name_and_no_gateway_gets_it(home: Home) -> None:
    for host in ("gateway-1", "vm-1"):
        assert home.run("sign-server", ask(host), NOW)["certificate"]
    with pytest.raises(ca.Refused, match=r"gateway-2 asks for DNS:tokens.plant.example, which the certificate of"):
        home.run("sign-server", _gateway("gateway-2", (NAME,)), NOW)
    home.run("sign-server", _gateway(), NOW)
    with pytest.raises(ca.Refused, match=r"vm-2 asks for DNS:gateway-1.plant.example"):
        home.run("sign-server", ask("vm-2", ("gateway-1.plant.example",)), NOW)


def test_a_host_that_is_no_token_service_any_more_loses_that_certificate_only(home: Home) -> None:
    gateway, service = home.run("sign-server", _gateway(), NOW), home.run("sign-server", ask(), NOW)
    home.sync([], NOW, servers=["gateway-1"], token_services=["gateway-1"])
    assert home.entries()[service["serial"]].reason is None
    home.sync([], NOW, servers=["gateway-1"], token_services=[])
    assert home.entries()[service["serial"]].reason == "cessationOfOperation"
    assert home.entries()[gateway["serial"]].reason is None


def test_a_renewed_device_may_sign_with_either_key_until_the_older_one_ends(home: Home) -> None:
    """Its new bundle is on its way for days: until then it has the older key only."""
    devices = [token("edge-1", "private_key_jwt")]
    home.sync(devices, NOW)
    first = read(home, "edge-1", "certificate.pem")
    later = NOW + timedelta(days=61)
    assert home.sync(devices, later)["renewed"] == ["edge-1"]
    second = read(home, "edge-1", "certificate.pem")
    asked = ask(private_key_jwt=["edge-1"])

    def keys(now: Any) -> list[str]:
        told = home.run("sign-server", asked, now)["certificates"]["edge-1"]
        return [_print(one.key) for one in certified.load("edge-1", told)]

    wanted = [_print(x509.load_pem_x509_certificate(pem.encode()).public_key()) for pem in (second, first)]
    assert keys(later) == wanted
    assert keys(later + timedelta(days=30)) == wanted[:1]


@pytest.mark.parametrize("method", ["client_secret_basic", "private_key_jwt"])
def test_a_revoked_device_is_unknown_to_the_token_service(home: Home, method: str) -> None:
    devices = [token("edge-1", method), token("edge-2", method)]
    home.sync(devices, NOW)
    done = home.run("revoke", {"id": "edge-1", "reason": "keyCompromise"}, NOW)
    assert done["changed"]
    assert done["withdrawn"] == (["edge-1"] if method == "client_secret_basic" else [])
    told = home.run("sign-server", ask(private_key_jwt=["edge-1", "edge-2"]), NOW)
    assert set(told["client_secrets"] | told["certificates"]) == {"edge-2"}
    assert not (home.path / "bundles/edge-1").exists()


def test_a_device_that_changes_its_method_keeps_nothing_of_the_other(home: Home) -> None:
    home.sync([token("edge-1", "client_secret_basic")], NOW)
    done = home.sync([token("edge-1", "tls_client_auth")], NOW)
    assert done["withdrawn"] == ["edge-1"]
    assert files(home, "edge-1") == {"ca.pem", "client.json", "README.txt", "key.pem", "certificate.pem"}
    home.sync([token("edge-1", "client_secret_basic")], NOW)
    assert files(home, "edge-1") == {"ca.pem", "client.json", "README.txt", "client_secret"}
    assert {entry.reason for entry in home.entries().values() if entry.id == "edge-1"} == {"cessationOfOperation"}


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (ask(purpose="printer"), "has unknown fields: private_key_jwt"),
        ({**_gateway(), "purpose": "printer"}, "purpose must be one of gateway, token_service, not 'printer'"),
        ({**_gateway(), "private_key_jwt": []}, "has unknown fields: private_key_jwt"),
        ({**_gateway(), "purpose": "token_service"}, 'lacks "private_key_jwt"'),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused(home: Home, request_: dict[str, Any], match: str) -> None:
    with pytest.raises(ca.Refused, match=match):
        home.run("sign-server", request_, NOW)
