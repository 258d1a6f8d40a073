# SPDX-License-Identifier: Apache-2.0
"""Identity providers as docs/issuers.md has them: its blocks of policy.yml, its tokens, and keys as they publish them.

- :func:`documented`: each provider with its block and its token, as they stand on the page.
- :class:`Provider`: signs that token, or one that differs from it, with fresh keys; writes the block into a site.
- :func:`write_site`: a site of some providers' blocks.

What a JWK Set looks like is told apart by provider: Keycloak has a key for encryption beside the others, Entra ID names
no algorithm, most give certificates along.
"""

from __future__ import annotations

import base64
import copy
import datetime as dt
import functools
import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from tests.base64url import encode, encode_part

Json = dict[str, Any]
PAGE = Path(__file__).parents[1] / "docs" / "issuers.md"
_BLOCK = re.compile(r"^```(yaml|json) ([a-z0-9-]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_PROVIDERS = {"roles", "pod"}


def _number(value: int) -> str:
    return encode(value.to_bytes((value.bit_length() + 7) // 8, "big"))


@functools.cache
def keys() -> tuple[rsa.RSAPrivateKey, rsa.RSAPrivateKey]:
    """Return two keys, made once: that of the signatures, and another one of the same provider."""
    return rsa.generate_private_key(65537, 2048), rsa.generate_private_key(65537, 2048)


@functools.cache
def _certificate(number: int) -> bytes:
    key = keys()[number]
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "plant")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 4711)
    builder = builder.not_valid_before(dt.datetime(2026, 1, 1)).not_valid_after(dt.datetime(2036, 1, 1))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def _jwk(number: int, kid: str, **more: object) -> Json:
    numbers = keys()[number].public_key().public_numbers()
    return {"kid": kid, "kty": "RSA", "n": _number(numbers.n), "e": "AQAB", **more}


def published_key(number: int, kid: str, **more: object) -> Json:
    """Return one of :func:`keys` as most providers publish it, with its certificate."""
    der = _certificate(number)
    thumbprint = encode(hashlib.sha1(der).digest())  # noqa: S324 - RFC 7517, 4.8 says so
    return _jwk(number, kid, x5c=[base64.b64encode(der).decode()], x5t=thumbprint, **more)


def _published(name: str, kid: str) -> list[Json]:
    """Return the keys of a provider, of which the first for signatures is `kid`."""
    if name == "keycloak":
        other = published_key(1, "enc-1", alg="RSA-OAEP", use="enc")
        return [other, published_key(0, kid, alg="RS256", use="sig")]
    if name.startswith("entra"):
        more: Json = {"use": "sig", "issuer": "https://login.microsoftonline.com/{tenantid}/v2.0"}
        return [published_key(0, kid, **more), published_key(1, "next", **more)]
    if name == "auth0":
        usual = {"alg": "RS256", "use": "sig"}
        return [published_key(0, kid, **usual), published_key(1, "next", **usual)]
    if name == "kubernetes":
        return [_jwk(0, kid, alg="RS256", use="sig")]
    return [_jwk(1, "older", alg="RS256", use="sig"), _jwk(0, kid, alg="RS256", use="sig")]


@dataclass
class Provider:
    """A provider, as the page has it.

    :ivar block: its part of policy.yml: ``issuers`` and ``tests``.
    :ivar header: of the page's token; so are `claims`.
    """

    name: str
    block: Json
    header: Json
    claims: Json
    keys: list[Json] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = _published(self.name, self.header["kid"])

    @property
    def issuer(self) -> Json:
        """Its entry of ``issuers``."""
        (entry,) = self.block["issuers"]
        found: Json = entry
        return found

    @property
    def described(self) -> Json:
        """What the test of its block says of the page's token."""
        found: Json = self.block["tests"][0]["token"]
        return found

    def token(self, *, header: Json | None = None, key: int = 0, **more: Any) -> str:
        """Sign the page's token, moved to now; a claim or member that is `...` is left out.

        :param header: members that are other than usual.
        :param key: which one of :func:`keys`.
        :param more: claims that are other than usual; ``iat``, ``nbf`` and ``exp`` are seconds from now.
        """
        now = int(time.time())
        claims = copy.deepcopy(self.claims)
        for name in ("iat", "nbf", "exp"):
            if name in claims:
                claims[name] = now + claims[name] - self.claims["iat"]
            if type(more.get(name)) is int:
                claims[name] = now + more.pop(name)
        parts = ({**self.header, **(header or {})}, {**claims, **more})
        kept = [{name: value for name, value in part.items() if value is not ...} for part in parts]
        text = ".".join(map(encode_part, kept))
        if kept[0]["alg"] == "PS256":
            signature = keys()[key].sign(text.encode(), padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())
        else:
            signature = keys()[key].sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{text}.{encode(signature)}"


def _blocks() -> dict[tuple[str, str], str]:
    text = PAGE.read_text(encoding="utf-8")
    found = {(kind, name): content for kind, name, content in _BLOCK.findall(text)}
    assert len(found) == len(re.findall(r"^```(?:yaml|json)", text, re.MULTILINE)), "a block was not understood"
    return found


def documented() -> dict[str, Provider]:
    """Return the providers of the page, by the name of their blocks."""
    blocks = _blocks()
    names = [name for kind, name in blocks if kind == "yaml" and name not in NOT_PROVIDERS]
    assert set(names) == {name for kind, name in blocks if kind == "json"}, "a block without its token"
    return {
        name: Provider(name, yaml.safe_load(blocks["yaml", name]), **json.loads(blocks["json", name])) for name in names
    }


def block(name: str) -> str:
    """Return a block of YAML as it stands on the page."""
    return _blocks()["yaml", name]


def write_site(folder: Path, *providers: Provider) -> None:
    """Write a site with the blocks of these providers, as they are, and the keys that it has to hold."""
    policy: Json = yaml.safe_load(block("roles"))
    for key in ("issuers", "tests"):
        policy[key] = [entry for provider in providers for entry in provider.block.get(key, [])]
    (folder / "policy.yml").write_text(yaml.safe_dump(policy, sort_keys=False), encoding="utf-8")
    (folder / "devices.yml").write_text("version: 1\ndevices: []\n", encoding="utf-8")
    for provider in providers:
        if file := provider.issuer.get("jwks_file"):
            (folder / file).write_text(json.dumps({"keys": provider.keys}), encoding="utf-8")
