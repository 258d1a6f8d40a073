# SPDX-License-Identifier: Apache-2.0
"""The certificates of devices that sign their requests, as the CA hands them over: read strictly, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from bednet.token_service import certified, jose
from tests.token_service.plant import START
from tests.token_service.plant import certified as pem_of

KEY = ec.generate_private_key(ec.SECP256R1())


def test_certificates_one_after_the_other_are_all_read() -> None:
    made: list[Any] = [KEY, ed25519.Ed25519PrivateKey.generate()]
    found = certified.load("pump-1", "".join(pem_of(key, serial=171 + n, end=START + n) for n, key in enumerate(made)))
    assert [jose.public_jwk(one.key) for one in found] == [jose.public_jwk(key.public_key()) for key in made]
    assert [(one.serial, one.not_after) for one in found] == [("ab", START), ("ac", START + 1)]


@pytest.mark.parametrize("text", ["", "x", "{}x", "{}-----BEGIN CERTIFICATE-----\n", "{}{}AAAA"])
def test_certificates_with_anything_else_between_are_refused(text: str) -> None:
    with pytest.raises(jose.JoseError, match="no certificate in PEM"):
        certified.load("pump-1", text.replace("{}", pem_of(KEY)))


def test_what_is_no_certificate_is_refused() -> None:
    with pytest.raises(jose.JoseError, match="no certificate in PEM"):
        certified.load("pump-1", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")


def test_certificate_of_another_device_is_refused() -> None:
    with pytest.raises(jose.JoseError, match="another's"):
        certified.load("pump-2", pem_of(KEY))


def test_certificate_of_a_weak_key_is_refused() -> None:
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505 - it is to be refused
    with pytest.raises(jose.JoseError, match="none of P-256"):
        certified.load("pump-1", pem_of(weak))
