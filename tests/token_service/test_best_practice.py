# SPDX-License-Identifier: Apache-2.0
"""RFC 9700, the security practice of OAuth 2.0, as far as a service without redirects is concerned by it.

The sharp edge of each test is the attack of its section, and why it comes to nothing here. What other files hold up:
header forgery at the proxy (section 4.13) test_tls_client_auth.py and deployed/test_outside.py, the page in a frame
(4.16) test_device_authorization.py, scope within the policy (2.3) test_scope.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bednet.token_service import jose
from tests.token_service.plant import (
    GATEWAY,
    ISSUER,
    SECRETS,
    SITE_AUDIENCE,
    basic,
    claims_of,
    refused,
    scope_of,
    scope_text,
    thumbprint,
)
from tests.token_service.test_device_authorization import ask, poll, submit

if TYPE_CHECKING:
    from tests.token_service.plant import Plant

CREDENTIALS = {"grant_type": "client_credentials"}
FORMS = ("/token", "/introspect", "/revoke", "/device_authorization", "/device")
DOCUMENTS = ("/.well-known/oauth-authorization-server", "/jwks.json", "/revocations", "/healthz", "/openapi.json")


def metadata(plant: Plant) -> dict[str, Any]:
    return plant.get(DOCUMENTS[0]).json or {}


# Grants


@pytest.mark.parametrize(
    "grant",
    [
        "password",  # 2.4: a person's password in a device's hands
        "authorization_code",  # 2.1: redirects, and all that is done to them
        "implicit",  # 2.1.2: tokens in addresses
        "refresh_token",  # 2.2.2, 4.14: what outlives a token that was stolen
        "urn:ietf:params:oauth:grant-type:jwt-bearer",
        "urn:ietf:params:oauth:grant-type:token-exchange",  # 2.3: a token that becomes one for more
        "urn:ietf:params:oauth:grant-type:saml2-bearer",
    ],
)
def test_grants_that_the_practice_warns_of_are_not_there_sections_2_1_2_and_2_4(plant: Plant, grant: str) -> None:
    token = (plant.token_by_secret().json or {})["access_token"]
    plant.sent.append(token)
    form = {
        "grant_type": grant,
        "username": "boss",
        "password": "x",
        "code": "x",
        "redirect_uri": "https://evil.example/",
        "refresh_token": token,
        "subject_token": token,
        "assertion": token,
    }
    response = plant.post("/token", form, authorization=basic("meter-1", SECRETS["meter-1"]))
    refused(plant, response, "unsupported_grant_type", "unsupported-grant-type")
    assert grant not in metadata(plant)["grant_types_supported"]
    assert "authorization_endpoint" not in metadata(plant)


# Who stole a token


def test_token_is_bound_to_its_device_wherever_that_can_be_section_2_2_1(plant: Plant) -> None:
    by_certificate = {"x5t#S256": thumbprint(plant.certificate("edge-1"))}
    assert claims_of(plant.token())["cnf"] == by_certificate
    assert claims_of(plant.token_by_assertion())["cnf"] == {"jwk": jose.public_jwk(plant.pump_key.public_key())}
    # Who could be bound by a certificate and leaves it out gets no bearer token instead: a thief would do just that.
    mine = plant.certificate("hmi-1")
    assert claims_of(plant.token_by_secret("hmi-1", certificate=mine))["cnf"] == {"x5t#S256": thumbprint(mine)}
    refused(plant, plant.token_by_secret("hmi-1"), "invalid_client", "no-certificate", 401)


def test_what_a_device_is_told_to_be_bound_by_is_in_the_metadata_section_2_2_1(plant: Plant) -> None:
    assert metadata(plant)["tls_client_certificate_bound_access_tokens"] is True


@pytest.mark.parametrize("path", ["/token", "/introspect", "/revoke"])
def test_stolen_token_opens_nothing_here_section_4_9(plant: Plant, path: str) -> None:
    token = (plant.token().json or {})["access_token"]
    plant.sent.append(token)
    form = {**CREDENTIALS, "client_id": "edge-1", "token": token}
    response = plant.post(path, form, authorization=f"Bearer {token}")
    refused(plant, response, "invalid_client", "authorization-scheme", 401)


# Privileges


def test_token_is_for_one_broker_and_one_topic_when_that_is_asked_section_2_3(plant: Plant) -> None:
    asked = [["commands/edge-1/#", ["sub"]]]
    claims = claims_of(plant.token(resource=GATEWAY, scope=scope_text(*asked)))
    assert (claims["aud"], scope_of(claims["scope"])) == (GATEWAY, asked)


def test_token_has_never_more_than_the_policy_and_the_site_section_2_3(plant: Plant) -> None:
    claims = claims_of(plant.token(scope=scope_text(["#", ["pub", "sub"]])))
    everything = claims_of(plant.token())
    # What was granted of all that there is, is what the device has without asking; and never for the service itself.
    assert scope_of(claims["scope"]) == scope_of(everything["scope"])
    assert ["#", ["pub", "sub"]] not in scope_of(claims["scope"])
    assert claims["aud"] == everything["aud"] == SITE_AUDIENCE
    refused(plant, plant.token(resource=ISSUER), "invalid_target", "unknown-resource")


# Clients


@pytest.mark.parametrize(
    ("device", "reason"),
    [("edge-1", "wrong-method"), ("pump-1", "wrong-method"), ("meter-1", "no-authentication")],
)
def test_device_cannot_be_talked_down_to_a_weaker_proof_section_2_5(plant: Plant, device: str, reason: str) -> None:
    form = {**CREDENTIALS, "client_id": device}
    secret = None if device == "meter-1" else basic(device, SECRETS["meter-1"])
    refused(plant, plant.post("/token", form, authorization=secret), "invalid_client", reason, 401)


def test_every_endpoint_wants_proof_and_none_a_secret_in_the_body_section_2_5(plant: Plant) -> None:
    found = metadata(plant)
    for endpoint in ("token", "introspection", "revocation"):
        methods = found[f"{endpoint}_endpoint_auth_methods_supported"]
        assert methods == ["tls_client_auth", "private_key_jwt", "client_secret_basic"]
    for path in ("/token", "/introspect", "/revoke"):
        form = {**CREDENTIALS, "token": "x", "client_id": "meter-1", "client_secret": SECRETS["meter-1"]}
        refused(plant, plant.post(path, form), "invalid_client", "secret-in-body", 401)


def test_who_reads_the_database_can_be_nobody_section_2_5(plant: Plant) -> None:
    asked = ask(plant)
    token = (plant.token_by_secret().json or {})["access_token"]
    (key,) = (path.read_text().splitlines()[1] for path in plant.settings.keys_dir.iterdir())
    secrets = [*SECRETS.values(), asked["device_code"], asked["user_code"], asked["user_code"].replace("-", "")]
    stored = b"".join(path.read_bytes() for path in plant.log.parent.glob("tokens.db*"))
    assert b"meter-1" in stored
    assert [text for text in (*secrets, token, key) if text.encode() in stored] == []


# Names


def test_token_that_a_person_approved_is_the_devices_and_not_theirs_section_4_15(plant: Plant) -> None:
    asked = ask(plant)
    submit(plant, "approve", asked["user_code"])
    claims = claims_of(poll(plant, asked["device_code"], form={"sub": "boss", "username": "boss"}))
    assert (claims["sub"], claims["client_id"]) == ("meter-1", "meter-1")
    assert "boss" not in claims.values()


def test_device_chooses_no_name_for_itself_section_4_15(plant: Plant) -> None:
    response = plant.token(sub="boss", client_name="boss", iss="https://evil.example")
    claims = claims_of(response)
    assert (claims["sub"], claims["client_id"], claims["iss"]) == ("edge-1", "edge-1", ISSUER)


def test_metadata_lead_nowhere_else_sections_2_6_and_4_4(plant: Plant) -> None:
    found = metadata(plant)
    addresses = {name: value for name, value in found.items() if name.endswith(("_endpoint", "_uri"))}
    assert set(addresses) == {
        "token_endpoint",
        "jwks_uri",
        "introspection_endpoint",
        "revocation_endpoint",
        "device_authorization_endpoint",
    }
    assert all(value.startswith(f"{ISSUER}/") for value in addresses.values())
    # Whose token it is says the token, so that none of another issuer can be mixed up with it.
    assert claims_of(plant.token())["iss"] == found["issuer"] == ISSUER


# Browsers


@pytest.mark.parametrize("path", FORMS)
def test_nothing_that_is_secret_is_taken_from_an_address_section_4_3(plant: Plant, path: str) -> None:
    certificate = plant.certificate("boss" if path == "/device" else "edge-1")
    response = plant.post(f"{path}?token=x&client_id=edge-1", {"client_id": "edge-1"}, certificate=certificate)
    assert (response.status_code, plant.reason()) == (400, "parameters-in-url")


@pytest.mark.parametrize("path", FORMS + DOCUMENTS)
def test_page_of_another_site_may_read_no_answer_section_2_6(plant: Plant, path: str) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for method in ("GET", "POST", "OPTIONS"):
        response = plant.request(method, path, headers=headers)
        assert not [name for name, _ in response.headers if name.lower().startswith("access-control-")]
    # The last one was the question that a browser asks first.
    assert (response.status_code, plant.reason()) == (405, "http-405")


@pytest.mark.parametrize("path", FORMS)
def test_nobody_is_sent_anywhere_sections_4_11_and_4_12(plant: Plant, path: str) -> None:
    form = {**CREDENTIALS, "client_id": "edge-1", "token": "x", "redirect_uri": "https://evil.example/"}
    for certificate in (None, plant.certificate("edge-1")):
        response = plant.post(path, form, certificate=certificate)
        assert response.status_code // 100 in (2, 4)
        assert "Location" not in response.headers
        assert "evil" not in response.get_data(as_text=True)
