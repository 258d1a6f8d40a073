# SPDX-License-Identifier: Apache-2.0
"""A gateway fetches another identity provider's keys from a real HTTPS server, by its timer.

The sharp edges: a server whose CA nobody has named, keys that are gone from the gateway with the server, and a key that
the provider has given up and that goes on being good.
"""

from __future__ import annotations

import copy
import datetime as dt
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from bednet.probe import Credentials, enter
from tests import providers
from tests.live import other_site, refused_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.lab import Host
    from tests.conftest import Plant
    from tests.live import Site

# Most of its time update-ca-certificates takes, which goes through all that Debian trusts.
pytestmark = [pytest.mark.lab, pytest.mark.full]

ISSUER = "https://gateway-1.plant.example:8899/realms/plant"
FOLDER, UNIT = "/run/foreign-issuer", "foreign-issuer.service"
CONFIGURATION = f"""
daemon off;
pid {FOLDER}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    server {{
        listen 8899 ssl;
        ssl_certificate {FOLDER}/server.pem;
        ssl_certificate_key {FOLDER}/server.key;
        root {FOLDER}/www;
    }}
}}
"""
NAMED_CA = "/usr/local/share/ca-certificates/foreign-issuer.crt"
ISSUERS = "/usr/local/lib/bednet/issuers.json"
FETCH = "bednet-token-fetch.service"
TIMER_FOLDER = "/run/systemd/system/bednet-token-fetch.timer.d"
DEADLINE_S = 60.0


@dataclass
class Provider:
    """A Keycloak on a host of the lab: nginx, and a file with its public keys; its tokens are those of docs/issuers.md.

    :ivar numbers: by the name of a key, which one of :func:`tests.providers.keys` it is.
    """

    host: Host
    root: bytes
    keycloak: providers.Provider = field(default_factory=lambda: providers.documented()["keycloak"])
    numbers: dict[str, int] = field(default_factory=lambda: {"first": 0, "second": 1})

    def publish(self, *names: str) -> None:
        """Publish these keys, one for encryption, and no others."""
        keys = [key for key in self.keycloak.keys if key["use"] == "enc"]
        keys += [providers.published_key(self.numbers[name], name, alg="RS256", use="sig") for name in names]
        self.host.write_file(f"{FOLDER}/www/realms/plant/certs", json.dumps({"keys": keys}), mode="0644")

    def start(self) -> None:
        """Answer."""
        self.host.exec(
            ["systemd-run", "--quiet", f"--unit={UNIT}", "nginx", "-e", "stderr", "-c", f"{FOLDER}/nginx.conf"]
        )

    def stop(self) -> None:
        """Answer no more."""
        self.host.exec(["systemctl", "stop", UNIT], check=False)
        self.host.exec(["systemctl", "reset-failed", UNIT], check=False)

    def token(self, kid: str) -> Credentials:
        """Sign a token for one of its devices."""
        token = self.keycloak.token(header={"kid": kid}, key=self.numbers[kid], iss=ISSUER, azp="cart-8", jti=kid)
        return Credentials(username="kc-cart-8", password=token)


def _describe(site: Site) -> None:
    """Add the page's block, with this provider's address and a role of the example plant."""
    issuer = copy.deepcopy(providers.documented()["keycloak"].issuer)
    del issuer["attributes"]
    issuer["roles"]["map"] = {"plant-robot": "sensor"}
    site.policy.setdefault("issuers", []).append({**issuer, "issuer": ISSUER, "jwks_url": f"{ISSUER}/certs"})


def _chain(now: dt.datetime) -> tuple[bytes, bytes, bytes]:
    """Make a CA and a server's certificate, as strictly as Debian 13's Python wants them; returns both, and the key."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "the operator's other CA")])
    uses = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
    ) | dict.fromkeys(("encipher_only", "decipher_only"), False)

    def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder(root, subject, public, x509.random_serial_number())
        made = made.not_valid_before(now - dt.timedelta(hours=1)).not_valid_after(now + dt.timedelta(days=1))
        made = made.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
        return made.add_extension(issuer, critical=False)

    ca = builder(root, ca_key.public_key()).add_extension(x509.BasicConstraints(True, 0), critical=True)
    ca = ca.add_extension(x509.KeyUsage(**uses, key_cert_sign=True, crl_sign=True), critical=True)
    leaf = builder(x509.Name([]), key.public_key())
    leaf = leaf.add_extension(x509.SubjectAlternativeName([x509.DNSName("gateway-1.plant.example")]), critical=True)
    leaf = leaf.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    own = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    one, two = (made.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM) for made in (ca, leaf))
    return one, two, own


@pytest.fixture
def provider(plant: Plant) -> Iterator[Provider]:
    """A provider that does not answer yet, and the second gateway, which has been told of it as its role tells it."""
    root, certificate, key = _chain(plant.now())
    found, gateway = Provider(plant.lab.hosts["gateway-1"], root), plant.lab.hosts["gateway-2"]
    found.host.exec(["mkdir", "-p", f"{FOLDER}/www/realms/plant"])
    found.host.write_file(f"{FOLDER}/nginx.conf", CONFIGURATION)
    found.host.write_file(f"{FOLDER}/server.pem", certificate)
    found.host.write_file(f"{FOLDER}/server.key", key, mode="0600")
    before = gateway.read_file(ISSUERS)
    told = json.loads(before)
    told["issuers"].append(
        {"issuer": ISSUER, "jwks_url": f"{ISSUER}/certs", "revocations_url": None, "addresses": None}
    )
    gateway.write_file(ISSUERS, json.dumps(told))
    try:
        yield found
    finally:
        found.stop()
        found.host.exec(["rm", "-rf", FOLDER])
        gateway.write_file(ISSUERS, before)
        gateway.exec(["rm", "-rf", NAMED_CA, TIMER_FOLDER])
        gateway.exec(["sh", "-c", "update-ca-certificates >/dev/null 2>&1; systemctl daemon-reload"])
        gateway.exec(["systemctl", "restart", "bednet-token-fetch.timer"])
        gateway.exec(["systemctl", "start", FETCH])


def _fetches(gateway: Host) -> str:
    """Fetch as the timer does; returns what is complained of."""
    done = gateway.exec(["systemctl", "start", FETCH], check=False)
    told = gateway.exec(["journalctl", "-u", FETCH, "-n", "6", "-o", "cat"]).stdout if done.rc else ""
    gateway.exec(["systemctl", "reset-failed", FETCH], check=False)
    return told


def _keyless(gateway: Host) -> list[str]:
    status = json.loads(gateway.exec(["bednet-store", "status"]).stdout)
    names: list[str] = status["issuers_without_keys"]
    return names


def test_keys_of_another_provider_are_fetched_kept_and_replaced(plant: Plant, provider: Provider) -> None:
    gateway, where = plant.lab.hosts["gateway-2"], plant.passwords("gateway-2")
    provider.publish("first")
    provider.start()
    with other_site(plant, gateway, _describe):
        # A CA that nobody has named.
        assert f"From {ISSUER} nothing new is used: " in (told := _fetches(gateway))
        assert "certificate verify failed" in told
        assert _keyless(gateway) == [ISSUER]
        assert refused_for(gateway, where, provider.token("first")) == "token-key"

        # The operator names it, as for everything else on a Debian host; the timer does the rest.
        gateway.write_file(NAMED_CA, provider.root)
        gateway.exec(["update-ca-certificates"])
        gateway.exec(["mkdir", "-p", TIMER_FOLDER])
        gateway.write_file(
            f"{TIMER_FOLDER}/quick.conf",
            "[Timer]\nOnCalendar=\nOnCalendar=*:*:0/2\nRandomizedDelaySec=0\nAccuracySec=100ms\n",
        )
        gateway.exec(["sh", "-c", "systemctl daemon-reload; systemctl restart bednet-token-fetch.timer"])
        deadline = time.monotonic() + DEADLINE_S
        while _keyless(gateway):
            assert time.monotonic() < deadline, "the timer does not fetch the keys"
            time.sleep(0.2)
        gateway.exec(["systemctl", "stop", "bednet-token-fetch.timer"])
        assert enter(where, provider.token("first")).accepted

        # The provider is down: what was fetched stays, and somebody hears of it.
        provider.stop()
        assert "The broker keeps what it has." in _fetches(gateway)
        assert enter(where, provider.token("first")).accepted

        # It comes back with another key: the old one is good no longer.
        provider.publish("second")
        provider.start()
        assert _fetches(gateway) == ""
        assert enter(where, provider.token("second")).accepted
        assert refused_for(gateway, where, provider.token("first")) == "token-key"
