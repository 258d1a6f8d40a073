# SPDX-License-Identifier: Apache-2.0
"""RFC 9068 and RFC 8705, 3: what is in a token; RFC 8707: for whom it is; RFC 7800: to which key it is bound."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from bednet.token_service import jose, keys
from bednet.token_service.database import tokens
from tests.token_service.conftest import settings_of
from tests.token_service.plant import (
    GATEWAY,
    ISSUER,
    SITE_AUDIENCE,
    START,
    claims_of,
    compiled,
    header_of,
    refused,
    thumbprint,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.token_service.plant import Plant


def test_header_says_what_it_is_section_2_1(plant: Plant) -> None:
    header = header_of(plant.token())
    assert header == {"alg": "ES256", "typ": "at+jwt", "kid": next(iter(keys.Keys(plant.settings.keys_dir).own()))}


def test_all_claims_of_section_2_2_are_there(plant: Plant) -> None:
    claims = claims_of(plant.token())
    assert {name: claims[name] for name in ("iss", "sub", "client_id", "aud", "iat", "exp")} == {
        "iss": ISSUER,
        "sub": "edge-1",
        "client_id": "edge-1",
        "aud": SITE_AUDIENCE,
        "iat": START,
        "exp": START + 900,
    }
    assert len(claims["jti"]) >= 22
    assert set(claims) == {"iss", "sub", "client_id", "aud", "iat", "exp", "jti", "scope", "cnf"}


def test_signature_holds_for_the_published_key(plant: Plant) -> None:
    response = plant.token()
    with plant.database.reading() as connection:
        public = keys.public_keys(connection, START)
    parsed = jose.parse((response.json or {})["access_token"])
    jose.verify(parsed, public[parsed.header["kid"]], ["ES256"])


def test_each_token_has_a_jti_of_its_own(plant: Plant) -> None:
    found = [claims_of(plant.token())["jti"] for _ in range(5)]
    assert len(set(found)) == 5
    # Nobody guesses the next: no place of it is always the same, but the last one may be, which holds two bits.
    assert min(len(set(place)) for place in list(zip(*found, strict=True))[:21]) > 1


def test_every_token_is_recorded(plant: Plant) -> None:
    claims = claims_of(plant.token())
    with plant.database.reading() as connection:
        (row,) = connection.execute(sa.select(tokens)).mappings().all()
    assert dict(row) == {
        "jti": claims["jti"],
        "device": "edge-1",
        "iat": START,
        "exp": START + 900,
        "revoked": None,
    }


def test_eddsa_by_configuration(make_plant: Callable[..., Plant]) -> None:
    plant = make_plant(algorithm="EdDSA")
    assert header_of(plant.token())["alg"] == "EdDSA"
    (key,) = (plant.get("/jwks.json").json or {})["keys"]
    assert (set(key), key["crv"]) == ({"kty", "crv", "x", "kid", "use", "alg"}, "Ed25519")


def test_lifetime_by_configuration(make_plant: Callable[..., Plant]) -> None:
    plant = make_plant(token_seconds=60)
    response = plant.token()
    assert (claims_of(response)["exp"], (response.json or {})["expires_in"]) == (START + 60, 60)
    # It ends later than that.
    assert claims_of(plant.token("ends-1"))["exp"] == START + 60


# Bound to a key (RFC 8705, 3.1; RFC 7800, 3.2)


def test_token_is_bound_to_the_certificate_that_it_was_got_with(plant: Plant) -> None:
    assert claims_of(plant.token())["cnf"] == {"x5t#S256": thumbprint(plant.certificate("edge-1"))}


def test_token_by_assertion_is_bound_to_the_key(plant: Plant) -> None:
    response = plant.token_by_assertion()
    assert claims_of(response)["cnf"] == {"jwk": jose.public_jwk(plant.pump_key.public_key())}
    assert (response.json or {})["token_type"] == "PoP"  # noqa: S105


def test_token_by_secret_is_bound_to_nothing(plant: Plant) -> None:
    assert "cnf" not in claims_of(plant.token_by_secret())
    assert plant.lines()[-1]["bound"] == "nothing"


def test_token_by_secret_is_bound_to_a_certificate_that_came_along(plant: Plant) -> None:
    mine = plant.certificate("meter-1")
    assert claims_of(plant.token_by_secret(certificate=mine))["cnf"] == {"x5t#S256": thumbprint(mine)}


# Resource (RFC 8707, 2)


@pytest.mark.parametrize("resource", [SITE_AUDIENCE, GATEWAY])
def test_token_is_for_the_resource_that_was_named(plant: Plant, resource: str) -> None:
    assert claims_of(plant.token(resource=resource))["aud"] == resource


@pytest.mark.parametrize(
    "resource",
    ["mqtts://gateway-9.plant.example", f"{GATEWAY}/", GATEWAY.upper(), f"{GATEWAY}#x", "x", ISSUER, "mqtts://"],
)
def test_unknown_resource_is_refused(plant: Plant, resource: str) -> None:
    refused(plant, plant.token(resource=resource), "invalid_target", "unknown-resource")


def test_two_resources_are_refused(plant: Plant) -> None:
    response = plant.token(resource=[SITE_AUDIENCE, GATEWAY])
    refused(plant, response, "invalid_target", "two-resources")


def test_site_with_several_audiences_gets_them_all_by_default(make_plant: Callable[..., Plant]) -> None:
    both = ["mqtts://a.example", "mqtts://b.example"]
    plant = make_plant(apply=False, audiences=both)
    plant.apply(compiled(audience=both))
    assert claims_of(plant.token())["aud"] == both
    assert claims_of(plant.token(resource=both[1]))["aud"] == both[1]


def test_settings_are_those_of_the_configuration_alone(plant: Plant) -> None:
    claims = claims_of(plant.token(expires_in="999999", exp="999999", aud="x", sub="edge-2", iss="x"))
    assert (claims["exp"], claims["aud"], claims["sub"]) == (START + 900, SITE_AUDIENCE, "edge-1")
    assert settings_of(plant.log.parent).token_seconds == 900
