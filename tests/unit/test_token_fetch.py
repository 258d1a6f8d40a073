# SPDX-License-Identifier: Apache-2.0
"""What gateways fetch to check tokens against: which lists are believed, and what root hands to the store.

The sharp edges: a list that somebody else signed, an old one, a private key that an issuer published by mistake, and a
link where a user without rights was to leave a file.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, utils
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from bednet import token_fetch
from bednet.token_fetch import RefusedError, accept_jwks, accept_revocations
from tests.base64url import encode, encode_part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
ISSUER = "https://tokens.plant.example:8443"
SAID = {
    "iss": ISSUER,
    "iat": int(NOW.timestamp()) - 60,
    "exp": int(NOW.timestamp()) + 60,
    "tokens": [{"jti": "one", "exp": 1_800_000_000, "device": "edge-1"}],
    "cutoffs": {"edge-2": 1_790_000_000},
}
EC_KEY, OTHER, ED_KEY = (
    ec.generate_private_key(ec.SECP256R1()),
    ec.generate_private_key(ec.SECP256R1()),
    ed25519.Ed25519PrivateKey.generate(),
)


def jwks() -> dict[str, Any]:
    numbers = EC_KEY.public_key().public_numbers()
    x = ED_KEY.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return {
        "keys": [
            {"kty": "EC", "crv": "P-256", "kid": "ec"}
            | {name: encode(getattr(numbers, name).to_bytes(32, "big")) for name in "xy"},
            {"kty": "OKP", "crv": "Ed25519", "kid": "ed", "x": encode(x)},
        ]
    }


def signed(claims: object = SAID, key: Any = EC_KEY, **header: object) -> bytes:
    first = {"alg": "ES256", "typ": "revocations+jwt", "kid": "ec"} | header
    data = ".".join(map(encode_part, (first, claims))).encode()
    if isinstance(key, ed25519.Ed25519PrivateKey):
        signature = key.sign(data)
    else:
        pair = utils.decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
        signature = b"".join(number.to_bytes(32, "big") for number in pair)
    return data + b"." + encode(signature).encode()


def accept(data: bytes, now: datetime = NOW) -> dict[str, Any]:
    return accept_revocations(data, issuer=ISSUER, jwks=jwks(), now=now)


@pytest.mark.parametrize("data", [signed(), signed(key=ED_KEY, alg="EdDSA", kid="ed"), signed() + b"\n"])
def test_a_list_that_the_issuer_signed_is_believed(data: bytes) -> None:
    assert accept(data) == SAID


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no signed list"),
        (b"a.b", "no signed list"),
        (b"!.b.c", "not base64url"),
        (b"bm8.bm8.bm8", "does not hold JSON"),
        (b"W10.W10.W10", "does not hold a JSON object"),
        (signed(key=OTHER), "signature is not valid"),
        (signed()[:-2], "signature is not valid"),
        (signed(alg="none"), "signed with 'none'"),
        (signed(alg="HS256"), "signed with 'HS256'"),
        (signed(alg="EdDSA"), "signed with 'EdDSA'"),
        (signed(kid="ed"), "signed with 'ES256'"),
        (signed(kid="another"), "not one of the issuer's"),
        (signed(kid=None), "not one of the issuer's"),
        (signed(typ="at+jwt"), "of the type 'at\\+jwt'"),
        (signed(crit=["exp"]), "wants extensions"),
        (signed(SAID | {"iss": "https://other.example"}), "of 'https://other.example'"),
        (signed(SAID | {"exp": "soon"}), "does not say from and until when"),
        (signed(SAID | {"iat": int(NOW.timestamp()) + 301}), "of the future"),
    ],
)
def test_a_list_that_cannot_be_the_issuers_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        accept(data)


def test_a_list_is_good_until_its_last_second_and_not_at_it() -> None:
    end = datetime.fromtimestamp(int(str(SAID["exp"])), UTC)
    assert accept(signed(), end - timedelta(seconds=1)) == SAID
    with pytest.raises(RefusedError, match="has run out"):
        accept(signed(), end)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"{", "not JSON"),
        (b"[]", "no JWK Set"),
        (b'{"keys": {}}', "no JWK Set"),
        (b'{"keys": [1]}', "no JWK Set"),
        (b'{"keys": []}', "has 0 keys"),
        (json.dumps({"keys": [{"kty": "EC"}] * 101}).encode(), "has 101 keys"),
        (b'{"keys": [{"kty": "EC", "d": "AA"}]}', "private or secret key"),
        (b'{"keys": [{"kty": "oct", "k": "AA"}]}', "private or secret key"),
    ],
)
def test_what_is_no_set_of_public_keys_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        accept_jwks(data)


def test_of_a_set_only_its_keys_are_handed_on() -> None:
    assert accept_jwks(json.dumps(jwks() | {"more": "words"}).encode()) == jwks()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A program in the place of bednet-store that writes down what it is given."""
    program = tmp_path / "store"
    program.write_text(
        f'#!/bin/sh\nprintf "%s %s " "$1" "$2" >>{tmp_path}/calls; cat >>{tmp_path}/calls; echo >>{tmp_path}/calls\n'
        'case $2 in *refused*) echo "no usable key" >&2; exit 1;; esac\necho "{\\"changed\\": true}"\n',
        encoding="ascii",
    )
    program.chmod(0o755)
    return program


def entry(issuer: str, **more: object) -> dict[str, Any]:
    return {"issuer": issuer, "jwks_url": "", "revocations_url": None, "addresses": None, **more}


def test_what_was_fetched_is_handed_over_and_what_was_not_is_told(tmp_path: Path, store: Path) -> None:
    folder = tmp_path / "fetched"
    folder.mkdir()
    other = "https://sso.example"
    (folder / token_fetch.name_of(ISSUER, "jwks")).write_text("{1}", encoding="ascii")
    (folder / token_fetch.name_of(ISSUER, "revocations")).write_text("{2}", encoding="ascii")
    (folder / "problems.json").write_text(json.dumps({other: "nobody answers"}), encoding="ascii")
    issuers = [entry(ISSUER, revocations_url="https://x"), entry(other), entry("https://third.example")]
    report = token_fetch.hand_over(issuers, folder, str(store))
    problems = {other: "nobody answers", "https://third.example": "nothing was fetched"}
    assert report == {"changed": True, "problems": problems}
    calls = (tmp_path / "calls").read_text(encoding="ascii").splitlines()
    assert calls == [f"keys {ISSUER} {{1}}", f"revocations {ISSUER} {{2}}"]


def test_keys_that_the_store_refuses_hold_up_no_other_issuer(tmp_path: Path, store: Path) -> None:
    issuers = [entry("https://refused.example"), entry(ISSUER)]
    for issuer in issuers:
        (tmp_path / token_fetch.name_of(issuer["issuer"], "jwks")).write_text("{}", encoding="ascii")
    report = token_fetch.hand_over(issuers, tmp_path, str(store))
    assert report == {"changed": True, "problems": {"https://refused.example": "no usable key"}}


def test_a_link_that_was_left_is_not_followed(tmp_path: Path, store: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of root", encoding="ascii")
    (tmp_path / token_fetch.name_of(ISSUER, "jwks")).symlink_to(secret)
    report = token_fetch.hand_over([entry(ISSUER)], tmp_path, str(store))
    assert report["changed"] is False
    assert "symbolic links" in report["problems"][ISSUER]
    assert not (tmp_path / "calls").exists()


def test_what_is_too_large_is_not_read(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_fetch, "MAX_JWKS_BYTES", 10)
    (tmp_path / token_fetch.name_of(ISSUER, "jwks")).write_text("x" * 11, encoding="ascii")
    report = token_fetch.hand_over([entry(ISSUER)], tmp_path, str(store))
    assert report["problems"] == {ISSUER: "it is larger than 10 bytes"}


def test_only_https_is_fetched_from() -> None:
    with pytest.raises(RefusedError, match="no https URL"):
        token_fetch.fetch("http://sso.example/jwks", ssl.create_default_context(), 10)


def test_a_pipe_that_was_left_is_no_file(tmp_path: Path, store: Path) -> None:
    os.mkfifo(tmp_path / token_fetch.name_of(ISSUER, "jwks"))
    report = token_fetch.hand_over([entry(ISSUER)], tmp_path, str(store))
    assert report["problems"] == {ISSUER: "it is no plain file"}


# --- over the network


class Place:
    """A server under a name, with a certificate of a CA of its own, and that CA's list."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "CA")])
        ca = self._certificate(self._name, self._key.public_key(), [(x509.BasicConstraints(True, 0), True)])
        (folder / "ca.pem").write_bytes(ca.public_bytes(Encoding.PEM))
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tokens")])
        alternative = x509.SubjectAlternativeName([x509.DNSName("tokens.plant.example")])
        self.certificate = self._certificate(name, key.public_key(), [(alternative, False)])
        (folder / "server.pem").write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            + self.certificate.public_bytes(Encoding.PEM)
        )

    def _certificate(self, name: x509.Name, key: Any, extensions: list[tuple[Any, bool]]) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(self._name).public_key(key)
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
        own = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        marks = [(x509.SubjectKeyIdentifier.from_public_key(key), False), (own, False)]
        for extension, critical in [*extensions, *marks, *([(usage, True)] if name == self._name else [])]:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key, hashes.SHA256())

    def list_of(self, *serials: int) -> Path:
        now = datetime.now(UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self._name)
        builder = builder.last_update(now - timedelta(hours=1)).next_update(now + timedelta(hours=1))
        for serial in serials:
            revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now)
            builder = builder.add_revoked_certificate(revoked.build())
        path = self.folder / "crl.pem"
        path.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))
        return path

    @contextmanager
    def answering(self, say: Callable[[ssl.SSLSocket], None]) -> Iterator[dict[str, Any]]:
        """Serve, and yield the issuer's entry."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "server.pem")
        with socket.create_server(("127.0.0.1", 0)) as listening:
            url = f"https://tokens.plant.example:{listening.getsockname()[1]}"

            def serve() -> None:
                with suppress(OSError):
                    while True:
                        plain, _ = listening.accept()
                        with suppress(OSError), context.wrap_socket(plain, server_side=True) as tls:
                            tls.recv(4096)
                            say(tls)

            threading.Thread(target=serve, daemon=True).start()
            yield entry(url, jwks_url=f"{url}/jwks", addresses=["127.0.0.1"])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def say(body: bytes) -> Callable[[ssl.SSLSocket], None]:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return lambda tls: tls.sendall(head + body)


def fetched(issuers: list[dict[str, Any]], place: Place, **more: Any) -> dict[str, str]:
    output = place.folder / "fetched"
    output.mkdir(exist_ok=True)
    return token_fetch.fetch_all(issuers, place.folder / "ca.pem", output, NOW, **more)


def test_keys_come_from_a_certificate_that_is_not_revoked(place: Place) -> None:
    with place.answering(say(json.dumps(jwks()).encode())) as own:
        assert fetched([own], place, crl=place.list_of(1, 2)) == {}
        path = place.folder / "fetched" / token_fetch.name_of(own["issuer"], "jwks")
        assert json.loads(path.read_text(encoding="utf-8")) == jwks()
        told = fetched([own], place, crl=place.list_of(place.certificate.serial_number))
        assert "certificate revoked" in told[own["issuer"]]
        assert not path.exists()


def test_without_a_list_that_can_be_read_nothing_is_believed(place: Place) -> None:
    with place.answering(say(json.dumps(jwks()).encode())) as own:
        assert fetched([own], place, crl=place.folder / "none.pem").keys() == {own["issuer"]}
        assert not list((place.folder / "fetched").glob("*.jwks.json"))


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"keys": ' + b"[" * 100_000, b"\xff", b""])
def test_what_an_issuer_sends_stops_no_other(place: Place, body: bytes) -> None:
    with place.answering(say(body)) as bad, place.answering(say(json.dumps(jwks()).encode())) as good:
        told = fetched([bad, good], place, crl=place.list_of())
    assert told == {bad["issuer"]: "it is not JSON, or too deep"}
    assert (place.folder / "fetched" / token_fetch.name_of(good["issuer"], "jwks")).exists()


def test_an_issuer_that_is_slow_on_purpose_stops_no_other(place: Place) -> None:
    enough = threading.Event()

    def drip(tls: ssl.SSLSocket) -> None:
        while not enough.wait(0.05):
            tls.send(b"x")

    with place.answering(drip) as bad, place.answering(say(json.dumps(jwks()).encode())) as good:
        told = fetched([bad, good], place, crl=place.list_of(), within=5.0)
        enough.set()
    assert told == {bad["issuer"]: "it takes too long to answer"}
    assert (place.folder / "fetched" / token_fetch.name_of(good["issuer"], "jwks")).exists()
