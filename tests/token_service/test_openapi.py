# SPDX-License-Identifier: Apache-2.0
"""The service against its OpenAPI description: schemathesis sends what fits it and what does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from tests.token_service.plant import UNIX

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

positive_data_acceptance = pytest.importorskip("schemathesis.specs.openapi.checks").positive_data_acceptance

if TYPE_CHECKING:
    from tests.token_service.plant import Plant

EXAMPLES = 15
PATHS = [
    ("POST", "/token"),
    ("POST", "/introspect"),
    ("POST", "/revoke"),
    ("POST", "/device_authorization"),
    ("GET", "/device"),
    ("GET", "/.well-known/oauth-authorization-server"),
    ("GET", "/jwks.json"),
    ("GET", "/revocations"),
    ("GET", "/healthz"),
    ("GET", "/openapi.json"),
]


def as_nginx(application: Any) -> Any:
    """Put the Unix socket and nginx's word before an application: a client without a certificate."""

    def wrapped(environ: dict[str, Any], start_response: Any) -> Any:
        return application({**environ, "gunicorn.socket": UNIX, "HTTP_X_BEDNET_CLIENT_VERIFY": "NONE"}, start_response)

    return wrapped


def test_every_path_is_tried(plant: Plant) -> None:
    described = plant.get("/openapi.json").json or {}
    found = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}
    assert found == set(PATHS)


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
@pytest.mark.parametrize(("method", "path"), PATHS)
def test_service_is_as_described(plant: Plant, method: str, path: str, mode: str) -> None:
    schema = schemathesis.openapi.from_wsgi("/openapi.json", as_nginx(plant.app))
    seen: list[int] = []

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
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
