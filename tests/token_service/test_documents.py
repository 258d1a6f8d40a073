# SPDX-License-Identifier: Apache-2.0
"""RFC 8414 (metadata), RFC 7517 (keys and their rotation), and the health of the service."""

from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING, Any

import pytest
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata

from bednet.token_service import jose, keys
from bednet.token_service.app import make_app
from tests.token_service.conftest import settings_of
from tests.token_service.plant import ISSUER, START, TCP, header_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.token_service.plant import Plant


def kids(plant: Plant) -> list[str]:
    return [key["kid"] for key in (plant.get("/jwks.json").json or {})["keys"]]


def test_metadata_are_valid_rfc_8414_section_2(plant: Plant) -> None:
    found = plant.get("/.well-known/oauth-authorization-server").json or {}
    # RFC 8414 wants response types though there is no authorization endpoint; none is what there is.
    AuthorizationServerMetadata({**found, "response_types_supported": ["none"]}).validate()
    assert found["issuer"] == ISSUER
    assert found["response_types_supported"] == []
    assert found["tls_client_certificate_bound_access_tokens"] is True
    assert set(found["token_endpoint_auth_methods_supported"]) == {
        "tls_client_auth",
        "private_key_jwt",
        "client_secret_basic",
    }
    assert "none" not in found["token_endpoint_auth_signing_alg_values_supported"]


def test_every_endpoint_of_the_metadata_is_there(plant: Plant) -> None:
    found = plant.get("/.well-known/oauth-authorization-server").json or {}
    for name, url in found.items():
        if name.endswith("_endpoint"):
            assert plant.post(url.removeprefix(ISSUER), {"a": "b"}).status_code in (400, 401), name
    assert plant.get(found["jwks_uri"].removeprefix(ISSUER)).status_code == 200


def test_addresses_are_those_of_the_configuration_whatever_the_client_says(plant: Plant) -> None:
    found = plant.get(
        "/.well-known/oauth-authorization-server",
        headers={"Host": "evil.example", "X-Forwarded-Host": "evil.example", "Forwarded": "host=evil.example"},
    )
    assert "evil" not in found.get_data(as_text=True)


@pytest.mark.parametrize("path", ["/.well-known/oauth-authorization-server", "/jwks.json", "/openapi.json", "/healthz"])
def test_documents_are_for_everybody(plant: Plant, path: str) -> None:
    client = plant.app.test_client()
    assert client.get(path, environ_overrides={"gunicorn.socket": TCP}).status_code == 200


# Keys


def test_set_has_the_public_half_alone_rfc_7517_section_5(plant: Plant) -> None:
    response = plant.get("/jwks.json")
    assert response.mimetype == "application/jwk-set+json"
    (key,) = (response.json or {})["keys"]
    assert set(key) == {"kty", "crv", "x", "y", "kid", "use", "alg"}
    assert (key["use"], key["alg"]) == ("sig", "ES256")
    assert key["kid"] == jose.thumbprint({name: key[name] for name in ("kty", "crv", "x", "y")})


def test_private_key_is_nobody_elses(plant: Plant) -> None:
    (path,) = plant.settings.keys_dir.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_new_key_is_published_before_it_signs_and_the_old_one_until_its_tokens_are_over(plant: Plant) -> None:
    (old,) = kids(plant)
    answer = plant.rotate(sign_after=900)
    new = answer["kid"]
    assert answer == {"kid": new, "signs_from": START + 900, "retired": [old], "retires_at": START + 900 + 900 + 300}
    for now, signs, there in (
        (START, old, {old, new}),
        (START + 899, old, {old, new}),
        (START + 900, new, {old, new}),
        (START + 900 + 1199, new, {old, new}),
        (START + 900 + 1200, new, {new}),
    ):
        plant.clock.now = now
        assert (header_of(plant.token())["kid"], set(kids(plant))) == (signs, there)


def test_token_of_the_old_keys_last_second_is_over_before_the_key_is(plant: Plant) -> None:
    answer = plant.rotate(sign_after=900)
    last = answer["signs_from"] - 1
    assert last + plant.settings.token_seconds + keys.LEEWAY < answer["retires_at"]


def test_first_key_signs_at_once(make_plant: Callable[..., Plant]) -> None:
    plant = make_plant(rotate=False)
    assert plant.rotate(sign_after=900)["signs_from"] == START
    assert plant.token().status_code == 200


def test_key_that_waits_signs_when_it_is_activated(plant: Plant) -> None:
    new = plant.rotate(sign_after=900)["kid"]
    with plant.database.writing() as connection:
        assert keys.activate(connection, keys.Keys(plant.settings.keys_dir), START) == [new]
        assert keys.activate(connection, keys.Keys(plant.settings.keys_dir), START) == []
    assert header_of(plant.token())["kid"] == new


def test_stolen_key_is_gone_at_once(plant: Plant) -> None:
    (old,) = kids(plant)
    plant.rotate(sign_after=0, retire_after=0)
    assert old not in kids(plant)
    assert header_of(plant.token())["kid"] != old


def test_second_rotation_does_not_prolong_the_first(plant: Plant) -> None:
    (old,) = kids(plant)
    plant.rotate(sign_after=0)
    plant.clock.now = START + 1000
    plant.rotate(sign_after=0)
    plant.clock.now = START + 1200
    assert old not in kids(plant)
    assert len(kids(plant)) == 2


def test_instances_sign_with_their_own_key_and_publish_all(plant: Plant, make_plant: Callable[..., Plant]) -> None:
    folder = plant.log.parent / "other-keys"
    folder.mkdir(mode=0o700)
    settings = settings_of(plant.log.parent, keys_dir=str(folder))
    other = make_app(settings, database=plant.database, now=plant.clock)
    mine = kids(plant)
    with plant.database.writing() as connection:
        theirs = keys.rotate(connection, keys.Keys(folder), "ES256", token_seconds=900, now=START, sign_after=900)
    assert (theirs["retired"], theirs["signs_from"]) == ([], START)
    assert sorted(kids(plant)) == sorted([*mine, theirs["kid"]])
    form = {"grant_type": "client_credentials", "client_id": "edge-1"}
    there = plant.post("/token", form, certificate=plant.certificate("edge-1"), app=other)
    assert (header_of(plant.token())["kid"], header_of(there)["kid"]) == (mine[0], theirs["kid"])
    found = plant.post(
        "/introspect",
        {"client_id": "edge-1", "token": (there.json or {})["access_token"]},
        certificate=plant.certificate("edge-1"),
    )
    assert (found.json or {})["active"] is True


def test_files_of_keys_that_are_over_are_deleted(plant: Plant) -> None:
    (old,) = kids(plant)
    new = plant.rotate(sign_after=0)["kid"]
    mine = keys.Keys(plant.settings.keys_dir)
    for now, gone, left in ((START + 1199, [], {old, new}), (START + 1200, [old], {new})):
        with plant.database.writing() as connection:
            assert (keys.purge(connection, mine, now), mine.own()) == (gone, left)


# Health


def test_healthy_service_says_so(plant: Plant) -> None:
    response = plant.get("/healthz")
    assert (response.status_code, json.loads(response.get_data())) == (200, {"status": "ok"})


def test_openapi_names_every_path(plant: Plant) -> None:
    described: dict[str, Any] = (plant.get("/openapi.json").json or {})["paths"]
    rules = {str(rule) for rule in plant.app.url_map.iter_rules()}
    assert set(described) == rules
