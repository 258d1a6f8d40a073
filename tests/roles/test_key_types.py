# SPDX-License-Identifier: Apache-2.0
"""CAs with other keys than the default's: Ed25519, P-384 and RSA-3072, each deployed on Debian 13 from bare hosts.

The sharp edges: a digest that Ed25519 does not take, a cipher list without the key's kind, a broker or a device that
cannot use what the CA signed, and a second run that makes keys anew because it reads the old ones otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from bednet.verify.report import Report, read_report
from testbed.lab import Lab
from tests.scenario import forget_key_types, forget_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.lab import PlayResult

pytestmark = [pytest.mark.lab, pytest.mark.full]


@dataclass(frozen=True)
class Deployed:
    """A site whose CA has keys of a kind.

    :ivar refused: the run with the devices of the example, one of which cannot verify such keys.
    """

    key_type: str
    lab: Lab
    refused: PlayResult
    converge: PlayResult
    again: PlayResult
    verify: PlayResult
    report: Report


@pytest.fixture(scope="module", params=["Ed25519", "P-384", "RSA-3072"])
def deployed(request: pytest.FixtureRequest) -> Iterator[Deployed]:
    """One gateway and a CA host, with site.yml run on them twice and verify.yml once."""
    key_type: str = request.param
    with Lab.up(f"keys-{key_type.lower()}", gateways=1, field=False) as lab:
        # The last file of the folder wins.
        variables = {"ca_key_type": key_type, "ca_organization": f"{key_type} Plant"}
        (lab.site / "group_vars/all/zz-key-type.yml").write_text(yaml.safe_dump(variables), encoding="utf-8")
        refused = lab.play("site.yml", check=False)
        forget_key_types(lab.site)
        forget_tokens(lab.site)
        path = lab.folder / "report.json"
        yield Deployed(
            key_type,
            lab,
            refused,
            lab.play("site.yml"),
            lab.play("site.yml"),
            lab.play("verify.yml", "-e", f"verification_report={path}", check=False),
            read_report(path),
        )


def _kind(certificate: x509.Certificate) -> str:
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        return {"secp256r1": "P-256", "secp384r1": "P-384"}[key.curve.name]
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA-{key.key_size}"
    assert isinstance(key, ed25519.Ed25519PublicKey)
    return "Ed25519"


def test_a_device_that_cannot_verify_such_keys_stops_the_run_before_anything_is_changed(deployed: Deployed) -> None:
    assert deployed.refused.rc != 0
    assert f"device 'temp-104' cannot verify {deployed.key_type}" in deployed.refused.stdout
    assert deployed.refused.changed == 0


def test_a_first_run_converges_and_a_second_changes_nothing(deployed: Deployed) -> None:
    assert deployed.converge.failed == 0
    assert deployed.converge.changed > 0
    assert deployed.again.failed == 0
    assert deployed.again.changed_tasks == []


def test_ca_gateway_and_devices_all_have_such_keys(deployed: Deployed) -> None:
    home = "/var/lib/bednet-ca"
    authority, gateway = deployed.lab.hosts["authority"], deployed.lab.hosts["gateway-1"]
    files = [
        (authority, f"{home}/root/root.pem"),
        (authority, f"{home}/issuing/issuing.pem"),
        (authority, f"{home}/bundles/temp-101/certificate.pem"),
        (gateway, "/etc/mosquitto/tls/server.pem"),
    ]
    kinds = {path: _kind(x509.load_pem_x509_certificate(host.read_file(path))) for host, path in files}
    assert set(kinds.values()) == {deployed.key_type}, kinds


def test_every_check_of_verify_passes(deployed: Deployed) -> None:
    assert [result for result in deployed.report.results if not result.passed] == []
    assert deployed.report.passed
    assert deployed.verify.failed == 0
    assert deployed.verify.changed == 0
    # It was not a run of the few checks that end a deployment.
    assert len(deployed.report.results) > 30
