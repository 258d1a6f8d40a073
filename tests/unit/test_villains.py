# SPDX-License-Identifier: Apache-2.0
"""Every villain is refused for its own reason, and for no other: by ``openssl verify`` and in a TLS handshake.

The sharp edge: a bad certificate that is refused for the wrong reason proves nothing about the right one.
"""

from __future__ import annotations

import ssl
import subprocess
import warnings
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID

from bednet import ca
from testbed.villains import VILLAINS, Credential, credential_of, make
from tests.unit.ca_home import Home, make_csr, make_home

if TYPE_CHECKING:
    from pathlib import Path

# A handshake has no clock but the machine's.
NOW = datetime.now(UTC).replace(microsecond=0)
REFUSED = sorted(kind for kind, villain in VILLAINS.items() if villain.reason)
ACCEPTED = sorted(kind for kind, villain in VILLAINS.items() if not villain.reason)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A CA with a CRL, for the whole module; no test changes it."""
    home = make_home(tmp_path_factory.mktemp("ca"), start=NOW - 10 * timedelta(days=1))
    home.run("crl", {"days": 7, "refresh_before_days": 2}, NOW)
    return home


@pytest.fixture(scope="module")
def issuing(home: Home) -> Credential:
    """The issuing CA, as the lab's suites read it out of the CA host."""
    return Credential(
        (home.path / "issuing/issuing.pem").read_bytes(), (home.path / "issuing/issuing.key").read_bytes()
    )


def verify(home: Home, folder: Path, credential: Credential, purpose: str, level: int = 2) -> str:
    """Let ``openssl verify`` judge a chain against our CA and CRL. :returns: OK or the first error's text."""
    (folder / "chain.pem").write_bytes(credential.certificate)
    command = ["openssl", "verify", "-purpose", purpose, "-crl_check", "-auth_level", str(level)]
    command += ["-CAfile", str(home.path / "publish/ca.pem"), "-CRLfile", str(home.path / "publish/issuing.crl.pem")]
    command += ["-untrusted", str(folder / "chain.pem"), str(folder / "chain.pem")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    errors = [line.split(": ", 1)[1] for line in done.stderr.splitlines() if line.startswith("error ")]
    if done.returncode == 0:
        return "OK"
    return errors[0].removeprefix(f"{folder}/chain.pem: ").removeprefix("verification failed")


def handshake(home: Home, folder: Path, villain: Credential, purpose: str) -> tuple[str, str]:
    """Shake hands in memory. :returns: what the verifier says, and what the villain is told; OK, OK if accepted."""
    (folder / "villain.pem").write_bytes(villain.certificate)
    (folder / "villain.key").write_bytes(villain.key)
    certificate, key = home.issuer()
    good = credential_of(Credential(certificate.public_bytes(Encoding.PEM), ca.key_pem(key).encode()), "good", NOW)
    (folder / "good.pem").write_bytes(good.certificate)
    (folder / "good.key").write_bytes(good.key)
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    judge, accused = (server, client) if purpose == "sslclient" else (client, server)
    # What OpenSSL refuses is a matter of its level: Debian's default for the judge, none for who wants to cheat.
    judge.set_ciphers("DEFAULT:@SECLEVEL=2")
    accused.set_ciphers("DEFAULT:@SECLEVEL=0")
    judge.verify_mode = ssl.CERT_REQUIRED
    judge.load_verify_locations(home.path / "publish/ca.pem")
    accused.load_cert_chain(folder / "villain.pem", folder / "villain.key")
    if purpose == "sslclient":
        server.load_cert_chain(folder / "good.pem", folder / "good.key")
        client.verify_mode = ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = {
        client: client.wrap_bio(to_client, to_server, server_side=False),
        server: server.wrap_bio(to_server, to_client, server_side=True),
    }
    said = {judge: "OK", accused: "OK"}
    for _ in range(4):
        for context, end in ends.items():
            if said[context] == "OK":
                try:
                    end.do_handshake()
                    end.read(1)
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLCertVerificationError as error:
                    said[context] = str(error.verify_message)
                except ssl.SSLError as error:
                    said[context] = str(error.reason)
    return said[judge], said[accused]


@pytest.mark.parametrize("kind", REFUSED)
def test_villain_is_refused_for_its_own_reason(kind: str, home: Home, issuing: Credential, tmp_path: Path) -> None:
    villain = VILLAINS[kind]
    credential = make(kind, issuing, now=NOW)
    assert verify(home, tmp_path, credential, villain.purpose) == villain.reason
    assert (verify(home, tmp_path, credential, villain.purpose, level=1) == villain.reason) == (villain.level <= 1)


@pytest.mark.parametrize("kind", REFUSED)
def test_handshake_of_villain_fails_with_its_alert(kind: str, home: Home, issuing: Credential, tmp_path: Path) -> None:
    villain = VILLAINS[kind]
    judged, told = handshake(home, tmp_path, make(kind, issuing, now=NOW), villain.purpose)
    assert judged == villain.reason
    assert villain.alert is not None
    # OpenSSL puts the protocol that invented the alert before it.
    assert told.split("_ALERT_")[1] == villain.alert.upper().replace(" ", "_")


@pytest.mark.parametrize("kind", ACCEPTED)
def test_tls_has_nothing_against_a_villain_that_only_has_a_bad_name(
    kind: str, home: Home, issuing: Credential, tmp_path: Path
) -> None:
    credential = make(kind, issuing, now=NOW)
    assert verify(home, tmp_path, credential, "sslclient") == "OK"
    assert handshake(home, tmp_path, credential, "sslclient") == ("OK", "OK")


def test_good_credential_is_accepted(home: Home, issuing: Credential, tmp_path: Path) -> None:
    good = credential_of(issuing, "temp-101", NOW)
    assert verify(home, tmp_path, good, "sslclient") == "OK"
    assert handshake(home, tmp_path, good, "sslclient") == ("OK", "OK")


def test_canary_is_refused_as_revoked(home: Home, tmp_path: Path) -> None:
    answer = home.run("probe", {"csr": _probe_csr()}, NOW)
    issuing_pem = (home.path / "issuing/issuing.pem").read_bytes()
    canary = Credential(answer["canary_certificate"].encode() + issuing_pem, answer["canary_key"].encode())
    assert verify(home, tmp_path, canary, "sslclient") == "certificate revoked"


def _probe_csr() -> str:
    return make_csr(ca.make_key("P-256"), "bednet-probe")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("other-device", ["plc-201"]),
        ("cn-plus", ["+"]),
        ("cn-hash", ["#"]),
        ("cn-slash", ["temp-101/plc-201"]),
        ("cn-nul", ["temp-101\0.evil"]),
        ("cn-empty", [""]),
        ("cn-none", []),
        ("cn-two", ["plc-201", "temp-101"]),
        ("self-signed", ["temp-101"]),
        ("wrong-ca", ["temp-101"]),
    ],
)
def test_villain_bears_the_name_it_claims(kind: str, names: list[str], issuing: Credential) -> None:
    certificate = x509.load_pem_x509_certificate(make(kind, issuing, now=NOW).certificate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about the empty CN
        assert [name.value for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == names


def test_false_ca_has_the_names_of_ours(issuing: Credential) -> None:
    ours = x509.load_pem_x509_certificate(issuing.certificate)
    chain = make("wrong-ca", issuing, now=NOW).certificate.split(b"-----BEGIN")[1:]
    leaf, false = (x509.load_pem_x509_certificate(b"-----BEGIN" + part) for part in chain)
    assert (false.subject, false.issuer) == (ours.subject, ours.issuer)
    assert leaf.issuer == ours.subject
    assert ca.fingerprint(false.public_key()) != ca.fingerprint(ours.public_key())  # type: ignore[arg-type]


def test_key_belongs_to_certificate_of_each_villain(issuing: Credential) -> None:
    for kind in VILLAINS:
        credential = make(kind, issuing, now=NOW)
        key = load_pem_private_key(credential.key, password=None)
        certificate = x509.load_pem_x509_certificate(credential.certificate)
        theirs, own = (thing.public_key() for thing in (certificate, key))
        assert ca.fingerprint(theirs) == ca.fingerprint(own), kind  # type: ignore[arg-type]


def test_sha1_villain_of_an_rsa_ca_is_refused_for_its_digest(tmp_path: Path) -> None:
    home = make_home(tmp_path / "ca", key_type="RSA-2048", start=NOW - timedelta(days=1))
    home.run("crl", {"days": 7, "refresh_before_days": 2}, NOW)
    certificate, key = home.issuer()
    issuing = Credential(certificate.public_bytes(Encoding.PEM), ca.key_pem(key).encode())
    villain = make("sha1", issuing, now=NOW)
    assert verify(home, tmp_path, villain, "sslclient") == VILLAINS["sha1"].reason


def test_sha1_villain_cannot_be_made_by_an_ed25519_ca(tmp_path: Path) -> None:
    home = make_home(tmp_path / "ca", key_type="Ed25519", start=NOW - timedelta(days=1))
    certificate, key = home.issuer()
    issuing = Credential(certificate.public_bytes(Encoding.PEM), ca.key_pem(key).encode())
    with pytest.raises(ValueError, match="no SHA-1 signature"):
        make("sha1", issuing, now=NOW)


def test_gateway_is_refused_by_who_trusts_only_a_ca_that_signed_nothing(
    home: Home, issuing: Credential, tmp_path: Path
) -> None:
    lonely = make("lonely-ca", issuing, now=NOW)
    (tmp_path / "lonely.pem").write_bytes(lonely.certificate)
    (tmp_path / "good.pem").write_bytes(credential_of(issuing, "gateway-1", NOW).certificate)
    command = ["openssl", "verify", "-CAfile", str(tmp_path / "lonely.pem"), str(tmp_path / "good.pem")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode != 0
    assert "unable to get local issuer certificate" in done.stderr
