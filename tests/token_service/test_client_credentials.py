# SPDX-License-Identifier: Apache-2.0
"""RFC 6749: the client credentials grant, its errors, and client authentication by secret."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bednet.token_service.service import Service
from bednet.token_service.site import SecretHash
from tests.token_service.plant import DEVICES, SECRETS, START, basic, claims_of, compiled, refused, secret_hash

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.token_service.plant import Plant

GRANT = {"grant_type": "client_credentials"}


def test_answer_is_that_of_section_5_1(plant: Plant) -> None:
    response = plant.token_by_secret()
    assert response.status_code == 200
    assert set(response.json or {}) == {"access_token", "token_type", "expires_in", "scope"}
    assert (response.json or {})["token_type"] == "Bearer"  # noqa: S105
    assert (response.json or {})["expires_in"] == 900
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Pragma"] == "no-cache"
    assert response.headers["Content-Type"] == "application/json"


def test_no_refresh_token_is_issued_section_4_4_3(plant: Plant) -> None:
    assert "refresh_token" not in (plant.token_by_secret().json or {})


def test_secret_may_be_form_encoded_section_2_3_1(plant: Plant) -> None:
    header = basic("meter%2D1", SECRETS["meter-1"].replace("-", "%2D"))
    assert plant.post("/token", GRANT, authorization=header).status_code == 200


def test_parameter_without_value_counts_as_left_out_section_3_1(plant: Plant) -> None:
    response = plant.post(
        "/token", {**GRANT, "scope": "", "client_id": ""}, authorization=basic("meter-1", SECRETS["meter-1"])
    )
    assert response.status_code == 200


def test_unknown_parameter_is_ignored_section_3_2(plant: Plant) -> None:
    response = plant.post("/token", {**GRANT, "colour": "red"}, authorization=basic("meter-1", SECRETS["meter-1"]))
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (basic("meter-1", "wrong"), "wrong-secret"),
        (basic("meter-1", SECRETS["meter-1"][:-1]), "wrong-secret"),
        (basic("meter-1", SECRETS["hmi-1"]), "wrong-secret"),
        (basic("meter-2", SECRETS["meter-1"]), "unknown-client"),
        (basic("METER-1", SECRETS["meter-1"]), "unknown-client"),
        (basic("x' OR '1'='1", "x"), "unknown-client"),
        (basic("temp-101", "x"), "unknown-client"),
        (basic("edge-1", SECRETS["meter-1"]), "wrong-method"),
        (basic("boss", "x"), "wrong-method"),
        (basic("meter-1", ""), "authorization-malformed"),
        (basic("", "x"), "authorization-malformed"),
        ("Basic", "authorization-malformed"),
        ("Basic !!!!", "authorization-malformed"),
        ("Basic é", "authorization-malformed"),
        ("Basic ÿÿÿÿ", "authorization-malformed"),
        ("Basic bWV0ZXItMQ==", "authorization-malformed"),
        ("Basic /////w==", "authorization-malformed"),
        ("Bearer abc", "authorization-scheme"),
        ("", "authorization-scheme"),
    ],
)
def test_wrong_secret_is_refused_section_5_2(plant: Plant, header: str, reason: str) -> None:
    response = plant.post("/token", GRANT, authorization=header)
    refused(plant, response, "invalid_client", reason, 401)
    assert response.headers["WWW-Authenticate"].startswith("Basic ")


def test_what_a_client_learns_is_the_same_for_all_of_them(plant: Plant) -> None:
    answers = {
        plant.post("/token", GRANT, authorization=header).get_data()
        for header in (basic("meter-1", "wrong"), basic("nobody", "wrong"), basic("edge-1", "wrong"))
    }
    assert len(answers) == 1


def test_unknown_client_costs_a_hash_as_well(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = SecretHash.matches

    def note(mine: SecretHash, secret: str) -> bool:
        hashed.append(secret)
        return real(mine, secret)

    monkeypatch.setattr(SecretHash, "matches", note)
    plant.post("/token", GRANT, authorization=basic("nobody", "guess"))
    assert hashed == ["guess"]


def test_secret_of_a_revoked_device_is_refused(plant: Plant) -> None:
    plant.apply(compiled([{**row, "revoked": "superseded"} if row["device"] == "meter-1" else row for row in DEVICES]))
    refused(plant, plant.token_by_secret(), "invalid_client", "revoked", 401)


def test_secret_that_was_replaced_opens_nothing(plant: Plant) -> None:
    new = SECRETS["meter-1"].replace("s3cret", "n3w")
    assert plant.token_by_secret().status_code == 200
    plant.apply(client_secrets={device: secret_hash(new) for device in SECRETS})
    refused(plant, plant.token_by_secret(), "invalid_client", "wrong-secret", 401)
    assert plant.token_by_secret(secret=new).status_code == 200


def test_device_without_a_secret_from_the_ca_is_refused(plant: Plant) -> None:
    plant.apply(client_secrets={})
    refused(plant, plant.token_by_secret(), "invalid_client", "no-secret-known", 401)


@pytest.mark.parametrize(
    ("form", "error", "reason", "status"),
    [
        ({"a": "b"}, "invalid_request", "no-grant-type", 400),
        ({"grant_type": ""}, "invalid_request", "no-grant-type", 400),
        ({"grant_type": "Client_Credentials"}, "unsupported_grant_type", "unsupported-grant-type", 400),
        ({**GRANT, "client_id": "hmi-1"}, "invalid_client", "client-id-mismatch", 401),
        ({**GRANT, "scope": "openid"}, "invalid_scope", "scope-malformed", 400),
        ({**GRANT, "client_secret": "x"}, "invalid_request", "two-authentications", 400),
        ({**GRANT, "client_assertion": "x"}, "invalid_request", "two-authentications", 400),
    ],
)
def test_wrong_requests_are_refused_section_5_2(
    plant: Plant, form: dict[str, str], error: str, reason: str, status: int
) -> None:
    response = plant.post("/token", form, authorization=basic("meter-1", SECRETS["meter-1"]))
    refused(plant, response, error, reason, status)


def test_secret_in_the_body_is_not_offered_section_2_3_1(plant: Plant) -> None:
    form = {**GRANT, "client_id": "meter-1", "client_secret": SECRETS["meter-1"]}
    refused(plant, plant.post("/token", form), "invalid_client", "secret-in-body", 401)


def test_device_that_proves_nothing_is_refused(plant: Plant) -> None:
    response = plant.post("/token", {**GRANT, "client_id": "meter-1"})
    refused(plant, response, "invalid_client", "no-authentication", 401)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"grant_type=client_credentials&grant_type=client_credentials", "parameter-twice"),
        (b"grant_type=client_credentials&scope=a&scope=b", "parameter-twice"),
        (b"grant_type=client_credentials&scope=%ff%fe", "form-malformed"),
        (b"grant_type=client_credentials&scope=\xff\xfe", "form-malformed"),
        (b"grant_type=client_credentials&scope=a%00b", "form-malformed"),
        (b"grant_type=client_credentials" + b"&a=b" * 20, "form-malformed"),
    ],
)
def test_malformed_form_is_refused_section_3_2(plant: Plant, body: bytes, reason: str) -> None:
    header = basic("meter-1", SECRETS["meter-1"])
    response = plant.post("/token", body, authorization=header, content_type="application/x-www-form-urlencoded")
    refused(plant, response, "invalid_request", reason)


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=x", "text/plain", ""])
def test_only_a_form_is_taken(plant: Plant, content_type: str) -> None:
    header = basic("meter-1", SECRETS["meter-1"])
    body = b"grant_type=client_credentials"
    response = plant.post("/token", body, authorization=header, content_type=content_type)
    refused(plant, response, "invalid_request", "content-type")


def test_parameters_in_the_url_are_refused_section_2_3_1(plant: Plant) -> None:
    header = basic("meter-1", SECRETS["meter-1"])
    response = plant.post("/token?grant_type=client_credentials", GRANT, authorization=header)
    refused(plant, response, "invalid_request", "parameters-in-url")


@pytest.mark.parametrize(("size", "reason"), [(16_384, "scope-malformed"), (16_385, "http-413"), (65_536, "http-413")])
def test_body_has_at_most_16_kib(plant: Plant, size: int, reason: str) -> None:
    body = "grant_type=client_credentials&scope=".ljust(size, "A")
    header, form = basic("meter-1", SECRETS["meter-1"]), "application/x-www-form-urlencoded"
    response = plant.post("/token", body, authorization=header, content_type=form)
    status, error = (413, "invalid_request") if reason == "http-413" else (400, "invalid_scope")
    refused(plant, response, error, reason, status)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_only_post_is_used_section_3_2(plant: Plant, method: str) -> None:
    response = plant.request(method, "/token")
    refused(plant, response, "method_not_allowed", "http-405", 405)
    assert response.headers["Allow"] == "POST"


def test_unknown_path_is_refused_in_json(plant: Plant) -> None:
    refused(plant, plant.get("/authorize"), "not_found", "http-404", 404)


def test_device_is_refused_from_the_second_of_its_end(plant: Plant) -> None:
    plant.clock.now = START + 99
    response = plant.token("ends-1")
    assert claims_of(response)["exp"] == START + 100
    assert (response.json or {})["expires_in"] == 1
    plant.clock.now = START + 100
    refused(plant, plant.token("ends-1"), "invalid_client", "until", 401)


@pytest.mark.parametrize("change", [{"revoked": "superseded"}, {"until": START + 10}, None])
def test_what_happens_to_a_device_while_its_token_is_made_counts(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, change: dict[str, object] | None
) -> None:
    real = Service._granted
    rows = [{**row, **(change or {})} if row["device"] == "edge-1" else row for row in DEVICES]

    def meanwhile(*arguments: Any) -> Any:
        plant.apply(compiled([row for row in rows if change or row["device"] != "edge-1"]))
        return real(*arguments)

    monkeypatch.setattr(Service, "_granted", meanwhile)
    response = plant.token()
    if change and "until" in change:
        assert claims_of(response)["exp"] == START + 10
    else:
        refused(plant, response, "invalid_client", "revoked", 401)


def test_unforeseen_error_tells_the_client_nothing(
    make_plant: Callable[..., Plant], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = make_plant()
    secret = SECRETS["meter-1"]

    def broken(*_arguments: object) -> None:
        raise RuntimeError(f"it broke on {secret}")

    monkeypatch.setattr("bednet.token_service.service.Service._granted", broken)
    plant.sent.append(secret)
    response = plant.token_by_secret()
    assert (response.status_code, (response.json or {})["error"]) == (500, "server_error")
    assert "RuntimeError" not in response.get_data(as_text=True)
    assert plant.lines()[-1]["exception"] == "RuntimeError"
    assert plant.lines()[-1]["level"] == "error"
