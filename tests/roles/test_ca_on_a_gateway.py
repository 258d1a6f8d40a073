# SPDX-License-Identifier: Apache-2.0
"""The smallest site there is: one gateway that is the CA's host too, as on a single Raspberry Pi.

The sharp edges: two roles that write into the same folders and meet on the same ports, a CRL that the host fetches from
itself, and a second run that changes something because each role undoes what the other did.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from testbed.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.lab import PlayResult

pytestmark = [pytest.mark.lab, pytest.mark.full]


@pytest.fixture(scope="module")
def runs() -> Iterator[tuple[Lab, PlayResult, PlayResult]]:
    """A host that shall be gateway and CA, and what a first and a second run of site.yml did on it."""
    with Lab.up("ca-on-gateway", gateways=1, ca="gateway-1", field=False) as lab:
        yield lab, lab.play("site.yml"), lab.play("site.yml")


def test_one_host_can_be_gateway_and_ca(runs: tuple[Lab, PlayResult, PlayResult]) -> None:
    lab, converged, again = runs
    assert list(converged.stats) == ["gateway-1"]
    assert converged.changed > 0
    assert again.changed_tasks == []
    verified = lab.play("verify.yml")
    assert verified.failed == 0
    assert verified.changed == 0


def test_it_listens_on_what_both_must_and_nothing_else(runs: tuple[Lab, PlayResult, PlayResult]) -> None:
    sockets = runs[0].hosts["gateway-1"].exec(["ss", "-Hltn"]).stdout
    # 127.0.0.11 is the resolver that Docker gives each container.
    ports = {int(line.split()[3].rsplit(":", 1)[1]) for line in sockets.splitlines() if "127.0.0.11" not in line}
    assert ports == {22, 8443, 8880, 8883, 8884, 8885}


def test_it_fetches_its_list_from_itself_and_the_broker_cannot_read_the_ca_s_key(
    runs: tuple[Lab, PlayResult, PlayResult],
) -> None:
    gateway = runs[0].hosts["gateway-1"]
    gateway.exec(["systemctl", "start", "bednet-ca-crl.service", "bednet-crl-fetch.service"])
    key = "/var/lib/bednet-ca/issuing/issuing.key"
    gateway.exec(["test", "-f", key])
    for user in ("mosquitto", "nobody"):
        assert gateway.exec(["cat", key], user=user, check=False).stderr.endswith("Permission denied\n")


# Signs a list with so many entries more, as the CA that has revoked as many certificates.
_LONG_LIST = """
import datetime, sys
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

home = "/var/lib/bednet-ca"
key = serialization.load_pem_private_key(open(f"{home}/issuing/issuing.key", "rb").read(), None)
last = x509.load_pem_x509_crl(open(f"{home}/publish/issuing.crl.pem", "rb").read())
now = datetime.datetime.utcnow()
day = datetime.timedelta(days=1)
crl = x509.CertificateRevocationListBuilder().issuer_name(last.issuer).last_update(now).next_update(now + day)
for extension in last.extensions:
    value = extension.value
    if isinstance(value, x509.CRLNumber):
        value = x509.CRLNumber(value.crl_number + 1)
    crl = crl.add_extension(value, extension.critical)
for number in range(int(sys.argv[1])):
    revoked = x509.RevokedCertificateBuilder().serial_number(2**120 + number).revocation_date(now)
    crl = crl.add_revoked_certificate(revoked.build())
signed = crl.sign(key, hashes.SHA256())
for name, form in (("issuing.crl", "DER"), ("issuing.crl.pem", "PEM")):
    open(f"{home}/publish/{name}", "wb").write(signed.public_bytes(getattr(serialization.Encoding, form)))
"""


def test_a_long_list_is_fetched_again_and_again(runs: tuple[Lab, PlayResult, PlayResult]) -> None:
    """More than the megabyte that systemd allows credentials, in which the list in use once came to its fetcher.

    The last test of this lab: the CA knows nothing of these certificates.
    """
    gateway = runs[0].hosts["gateway-1"]
    for entries in (30_000, 60_000):
        gateway.exec(["python3", "-", str(entries)], input=_LONG_LIST)
        gateway.exec(["systemctl", "start", "bednet-crl-fetch.service", "bednet-token-fetch.service"])
        present = gateway.read_file("/etc/mosquitto/tls/issuing.crl.pem")
        assert len(present) > 1 << 20
        assert present == gateway.read_file("/var/lib/bednet-ca/publish/issuing.crl.pem")
        assert json.loads(gateway.exec(["bednet-store", "status"]).stdout)["revoked"] >= entries
    assert gateway.exec(["systemctl", "is-active", "mosquitto"]).stdout == "active\n"
