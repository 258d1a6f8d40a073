# SPDX-License-Identifier: Apache-2.0
"""The service against its OpenAPI description: schemathesis sends what fits it and what does not.

Once as a stranger, who is refused in the ways that are described; and once with what is needed to be answered: a
certificate or secret, a scope that the policy allows, a token, an approver's form.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from bednet.token_service.database import device_requests
from tests.token_service.plant import (
    GATEWAY,
    SECRETS,
    SITE_AUDIENCE,
    UNIX,
    basic,
    from_nginx,
    scope_text,
)
from tests.token_service.test_device_authorization import ask, csrf

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

positive_data_acceptance = pytest.importorskip("schemathesis.specs.openapi.checks").positive_data_acceptance

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.token_service.plant import Plant

EXAMPLES = 15
PATHS = [
    ("POST", "/token"),
    ("POST", "/introspect"),
    ("POST", "/revoke"),
    ("POST", "/device_authorization"),
    ("GET", "/device"),
    ("POST", "/device"),
    ("GET", "/.well-known/oauth-authorization-server"),
    ("GET", "/jwks.json"),
    ("GET", "/revocations"),
    ("GET", "/healthz"),
    ("GET", "/openapi.json"),
]


Asked = tuple[tuple[str, str], ...] | None
# What the policy allows a sensor, and no scope at all.
SCOPES: tuple[Asked, ...] = (
    None,
    (("commands/{}/#", "sub"),),
    (("sensors/hall-1/{}/t", "pub"), ("commands/{}/#", "sub")),
)
RESOURCES = (None, SITE_AUDIENCE, GATEWAY)
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def as_nginx(application: Any, subject: Callable[[], dict[str, str]] = lambda: from_nginx(None)) -> Any:
    """Put the Unix socket and nginx's word before an application.

    :param subject: the headers that nginx sets for the next client; those of one without a certificate by default.
    """

    def wrapped(environ: dict[str, Any], start_response: Any) -> Any:
        told = {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in subject().items()}
        return application({**environ, "gunicorn.socket": UNIX, **told}, start_response)

    return wrapped


def test_every_path_is_described_and_tried_with_every_method(plant: Plant) -> None:
    described = plant.get("/openapi.json").json or {}
    found = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}
    assert found == set(PATHS)
    served = {(method, rule.rule) for rule in plant.app.url_map.iter_rules() for method in rule.methods or ()}
    # Flask answers HEAD as it does GET, without a body.
    assert {(method, path) for method, path in served if method != "HEAD"} == found


def test_what_nginx_answers_is_described_everywhere(plant: Plant) -> None:
    described = plant.get("/openapi.json").json or {}
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            for code in ("401", "429", "431", "503", *(["413"] if method == "post" else [])):
                answer = operation["responses"][code]
                assert "application/json" in answer["content"], (method, path, code)
                assert ("Retry-After" in answer.get("headers", {})) is (code in ("429", "503")), (method, path, code)


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
@pytest.mark.parametrize(("method", "path"), PATHS)
def test_service_is_as_described(plant: Plant, method: str, path: str, mode: str) -> None:
    schema = schemathesis.openapi.from_wsgi("/openapi.json", as_nginx(plant.app))
    seen: list[int] = []

    @SETTINGS
    @given(schema[path][method].as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
    def run(case: Any) -> None:
        # What fits the description may still be refused with 400: RFC 6749, 5.2 has no other code for a wrong scope.
        seen.append(case.call_and_validate(excluded_checks=[positive_data_acceptance]).status_code)

    if mode == "NEGATIVE" and method == "GET" and path != "/device":
        with pytest.raises(Unsatisfiable):
            run()  # a document takes no parameters that could be wrong
        return
    run()
    assert seen
    assert max(seen) < 500


class Known:
    """Somebody whom the service answers: the form that it sends to each endpoint, and what nginx says of it."""

    def __init__(self, plant: Plant, path: str) -> None:
        self.plant, self.path = plant, path
        self.addresses = itertools.count(1)
        self.device = "meter-1" if path == "/device_authorization" else "edge-1"
        self.headers = {"Authorization": basic("meter-1", SECRETS["meter-1"])} if self.device == "meter-1" else {}

    def from_nginx(self) -> dict[str, str]:
        """Return what nginx says. Each request comes from another address: of one only three may be open."""
        who = {"/device": "boss", "/device_authorization": None}.get(self.path, self.device)
        told = from_nginx(None if who is None else self.plant.certificate(who))
        return {**told, "X-Bednet-Client-Address": f"192.0.2.{next(self.addresses)}"}

    def form(self, generated: dict[str, Any], scope: Asked, resource: str | None) -> dict[str, Any]:
        """Put what counts into a form that was made up. What the device does not need it does not send."""
        own: dict[str, Any] = {
            "client_id": self.device,
            "client_assertion": None,
            "client_assertion_type": None,
            "client_secret": None,
        }
        match self.path:
            case "/token":
                own |= {"grant_type": "client_credentials", "device_code": None}
            case "/introspect" | "/revoke":
                own["token"] = (self.plant.token().json or {})["access_token"]
            case "/device":
                code = ask(self.plant)["user_code"]
                with self.plant.database.writing() as connection:
                    # Each time a device asks from the same address.
                    connection.execute(device_requests.update().values(address="elsewhere"))
                return generated | {"csrf": csrf(self.plant), "user_code": code, "device": "meter-1"}
        if self.path in ("/token", "/device_authorization"):
            own |= {
                "scope": scope and scope_text(*([topic.format(self.device), [access]] for topic, access in scope)),
                "resource": resource,
            }
        return {name: value for name, value in {**generated, **own}.items() if value is not None}


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_who_is_known_is_answered_as_described(plant: Plant, method: str, path: str) -> None:
    known = Known(plant, path)
    schema = schemathesis.openapi.from_wsgi("/openapi.json", as_nginx(plant.app, known.from_nginx))
    seen: list[int] = []

    @SETTINGS
    @given(
        schema[path][method].as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE),
        st.sampled_from(SCOPES),
        st.sampled_from(RESOURCES),
    )
    def run(case: Any, scope: Asked, resource: str | None) -> None:
        if method == "POST":
            case.body = known.form(case.body, scope, resource)
        # All checks, that of acceptance too: what fits the description and comes from somebody known is not refused.
        answer = case.call_and_validate(headers=known.headers)
        seen.append(answer.status_code)
        assert path != "/introspect" or answer.json()["active"] is True

    run()
    assert seen
    assert set(seen) == {200}, plant.reason()
