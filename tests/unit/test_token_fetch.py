# SPDX-License-Identifier: Apache-2.0
"""What gateways fetch to check tokens against: which lists are believed, and what root hands to the store.

The sharp edges: a list that somebody else signed, an old one, a private key that an issuer published by mistake, and a
link where a user without rights was to leave a file.
"""

from __future__ import annotations

import base64
import json
import ssl
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from bednet import token_fetch
from bednet.token_fetch import RefusedError, accept_jwks, accept_revocations

if TYPE_CHECKING:
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


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


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
    data = ".".join(encode(json.dumps(part).encode()) for part in (first, claims)).encode()
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
