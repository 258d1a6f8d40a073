# SPDX-License-Identifier: Apache-2.0
"""The service as it is deployed, with clients of others over TLS, and what a client could forge.

The sharp edges: what nginx hands over that it should not, and a client that is content with less than the RFCs say.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import ssl
import subprocess
import urllib.request
from typing import TYPE_CHECKING, Any

import authlib
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bednet.token_service import jose
from tests.token_service.deployed.service import FORM, Authority
from tests.token_service.plant import SECRETS, pem, thumbprint

if TYPE_CHECKING:
    from pathlib import Path

    from tests.token_service.deployed.service import Deployed


# Clients of others


def test_requests_oauthlib_gets_a_token_by_certificate(deployed: Deployed) -> None:
    oauthlib = pytest.importorskip("oauthlib.oauth2", reason="requests-oauthlib is not installed")
    sessions = pytest.importorskip("requests_oauthlib", reason="requests-oauthlib is not installed")
    files = deployed.ca.issue("edge-1")
    session = sessions.OAuth2Session(client=oauthlib.BackendApplicationClient(client_id="edge-1"))
    session.trust_env = False
    token = session.fetch_token(
        f"{deployed.issuer}/token", cert=files, verify=str(deployed.ca.path), include_client_id=True
    )
    claims = jose.parse(token["access_token"]).claims
    assert claims["cnf"] == {"x5t#S256": thumbprint(deployed.ca.made["edge-1"])}
    assert claims["iss"] == deployed.issuer


def test_requests_oauthlib_gets_a_token_by_secret(deployed: Deployed) -> None:
    oauthlib = pytest.importorskip("oauthlib.oauth2", reason="requests-oauthlib is not installed")
    sessions = pytest.importorskip("requests_oauthlib", reason="requests-oauthlib is not installed")
    session = sessions.OAuth2Session(client=oauthlib.BackendApplicationClient(client_id="meter-1"))
    session.trust_env = False
    arguments = {"verify": str(deployed.ca.path), "client_id": "meter-1"}
    url = f"{deployed.issuer}/token"
    token = session.fetch_token(url, client_secret=SECRETS["meter-1"], **arguments)
    assert jose.parse(token["access_token"]).claims["sub"] == "meter-1"
    with pytest.raises(oauthlib.OAuth2Error, match="invalid_client"):
        session.fetch_token(url, client_secret="wrong", **arguments)  # noqa: S106


def authlib_session(**arguments: Any) -> Any:
    client = pytest.importorskip("authlib.integrations.requests_client", reason="requests is not installed")
    session = client.OAuth2Session(**arguments)
    session.trust_env = False
    return session


@pytest.mark.filterwarnings("ignore:.*joserfc:DeprecationWarning", "ignore:authlib.jose module is deprecated")
def test_authlib_gets_and_ends_a_token_by_assertion(deployed: Deployed) -> None:
    from authlib.oauth2.rfc7523 import PrivateKeyJWT  # noqa: PLC0415

    url = f"{deployed.issuer}/token"
    plain = deployed.pump_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    secret: Any = plain.decode()
    if tuple(map(int, authlib.__version__.split(".")[:2])) > (1, 6):
        # Later ones take keys of joserfc, and warn of others.
        secret = pytest.importorskip("joserfc.jwk").ECKey.import_key(plain)
    session = authlib_session(
        client_id="pump-1",
        client_secret=secret,
        token_endpoint_auth_method="private_key_jwt",  # noqa: S106
        revocation_endpoint_auth_method="private_key_jwt",
    )
    session.register_client_auth_method(PrivateKeyJWT(url, alg="ES256"))
    ca = str(deployed.ca.path)
    token = session.fetch_token(url, grant_type="client_credentials", verify=ca)
    assert jose.parse(token["access_token"]).claims["cnf"] == {"jwk": jose.public_jwk(deployed.pump_key.public_key())}
    found = session.introspect_token(f"{deployed.issuer}/introspect", token["access_token"], verify=ca).json()
    assert (found["active"], found["sub"]) == (True, "pump-1")
    assert session.revoke_token(f"{deployed.issuer}/revoke", token["access_token"], verify=ca).status_code == 200
    found = session.introspect_token(f"{deployed.issuer}/introspect", token["access_token"], verify=ca).json()
    assert found == {"active": False}


def test_metadata_lead_to_the_keys_that_verify_a_token(deployed: Deployed) -> None:
    def get(url: str) -> Any:
        with urllib.request.urlopen(url, context=deployed.context(), timeout=20) as answer:  # noqa: S310
            return json.load(answer)

    metadata = get(f"{deployed.issuer}/.well-known/oauth-authorization-server")
    assert metadata["issuer"] == deployed.issuer
    (key,) = get(metadata["jwks_uri"])["keys"]
    body = "grant_type=client_credentials&client_id=edge-1"
    _, answer = deployed.post("/token", body, deployed.ca.issue("edge-1"))
    parsed = jose.parse(answer["access_token"])
    assert parsed.header["kid"] == key["kid"]
    point = b"\x04" + jose.decode(key["x"]) + jose.decode(key["y"])
    jose.verify(parsed, ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point), ["ES256"])


def test_curl_gets_a_token_as_the_page_says(deployed: Deployed) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl here")
    certificate, key = deployed.ca.issue("edge-1")
    command = [curl, "-sS", "--cacert", str(deployed.ca.path), "--cert", certificate, "--key", key]
    form = ["-d", "grant_type=client_credentials", "-d", "client_id=edge-1", f"{deployed.issuer}/token"]
    done = subprocess.run([*command, *form], check=True, capture_output=True, env={"PATH": "/usr/bin:/bin"})
    assert json.loads(done.stdout)["token_type"] == "Bearer"  # noqa: S105


# What a client could forge


EDGE = "grant_type=client_credentials&client_id=edge-1"


@pytest.mark.parametrize("separator", ["-", "_"])
@pytest.mark.parametrize(("own", "reason"), [(False, "no-authentication"), (True, "client-id-mismatch")])
def test_headers_of_a_client_never_count(deployed: Deployed, separator: str, own: bool, reason: str) -> None:
    deployed.ca.issue("edge-1")
    forged = [
        (f"X{separator}Bednet{separator}Client{separator}Verify", "SUCCESS"),
        (f"X{separator}Bednet{separator}Client{separator}Cert", pem(deployed.ca.made["edge-1"])),
        (f"X{separator}Bednet{separator}Client{separator}Address", "192.0.2.99"),
        (f"X{separator}Forwarded{separator}For", "192.0.2.99"),
    ]
    files = deployed.ca.issue("edge-2") if own else None
    status, answer = deployed.post("/token", EDGE, files, forged)
    assert (status, answer["error"], deployed.reason()) == (401, "invalid_client", reason)
    assert deployed.lines()[-1]["address"] == "127.0.0.1"
    # One's own certificate counts as before.
    if own:
        body = EDGE.replace("edge-1", "edge-2")
        assert deployed.post("/token", body, files, forged)[0] == 200


@pytest.mark.parametrize("villain", ["of another CA", "of yesterday", "of a server"])
def test_certificate_that_is_no_clients_of_the_site_gets_no_further_than_nginx(
    deployed: Deployed, tmp_path: Path, villain: str
) -> None:
    ca = Authority(tmp_path) if villain == "of another CA" else deployed.ca
    files = ca.issue("edge-1", days=-1 if villain == "of yesterday" else 1, server=villain == "of a server")
    before = deployed.lines()
    status, answer = deployed.post("/token", EDGE, files)
    assert (status, answer["error"]) == (401, "invalid_client")
    assert answer["error_description"] == "the client certificate is not valid at this site"
    assert deployed.lines() == before
    # Nor is it told any more about what everybody may know.
    assert deployed.send("GET", "/jwks.json", files=files).status == 401


def test_revoked_certificate_is_refused_by_the_service(deployed: Deployed) -> None:
    files = deployed.ca.issue("edge-2")
    body = EDGE.replace("edge-1", "edge-2")
    assert deployed.post("/token", body, files)[0] == 200
    deployed.apply(revoked_serials={f"{deployed.ca.made['edge-2'].serial_number:X}": "superseded"})
    status, answer = deployed.post("/token", body, files)
    assert (status, answer["error"], deployed.reason()) == (401, "invalid_client", "certificate-revoked")


def test_without_tls_nobody_is_answered_or_sent_on_rfc_9700_section_2_6(deployed: Deployed) -> None:
    before = deployed.lines()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", deployed.port, timeout=20)) as connection:
        connection.request("POST", "/token", EDGE, dict([FORM]))
        response = connection.getresponse()
        assert (response.status, response.headers["Location"]) == (400, None)
        assert b"plain HTTP request was sent to HTTPS port" in response.read()
    assert deployed.lines() == before


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_tls_before_1_2_is_refused(deployed: Deployed) -> None:
    context = deployed.context()
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with socket.create_connection(("127.0.0.1", deployed.port), 20) as plain, pytest.raises(ssl.SSLError) as caught:
        context.wrap_socket(plain, server_hostname="localhost")
    assert caught.value.reason == "TLSV1_ALERT_PROTOCOL_VERSION"


def test_nothing_secret_is_in_the_logs(deployed: Deployed) -> None:
    _, answer = deployed.post("/token", EDGE, deployed.ca.issue("edge-1"))
    assert answer["access_token"] not in deployed.log()
    assert SECRETS["meter-1"] not in deployed.log()
    assert "eyJ" not in deployed.log()
