# SPDX-License-Identifier: Apache-2.0
"""Issuers of tokens, their keys, and what was revoked of tokens, in the store.

Sharp edges: a key that is not what it seems, a set of keys that would lock everybody out, a revocation that is taken
back, an issuer that revokes what is not its own, and what a reader is told of it all.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import lmdb
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from bednet import store
from tests.unit.jwks import jwk, number, spki
from tests.unit.store.sites import changes, compiled, content, device, issuer, profile, rule, secrets

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Json = dict[str, Any]
ISS, OTHER = "https://tokens.plant.example:8443", "https://sso.example/r"
NOW = 1_800_000_000
EC, EC2 = (ec.generate_private_key(ec.SECP256R1()).public_key() for _ in range(2))
ED = ed25519.Ed25519PrivateKey.generate().public_key()
RSA = rsa.generate_private_key(65537, 2048).public_key()
ALL = sum(store.ALGORITHMS.values())


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """The clock of the store, for one test."""
    return Clock()


@pytest.fixture
def plant(tmp_path: Path, clock: Clock) -> store.Store:
    """A store with the site's own service, and a foreign issuer that has a key in the site, for one test."""
    plant = store.Store(tmp_path / "store", clock=clock)
    plant.apply(SITE, secrets())
    return plant


FOREIGN = issuer(OTHER, name="sso", algorithms=["ES256", "RS256"], keys=[jwk(EC2, kid="f")])
SITE = compiled([device("edge-1", "sensor", "token")], issuers=[issuer(service=True, scope="aif"), FOREIGN])


def jwks(*keys: Json) -> Json:
    return {"keys": list(keys)}


def kept(plant: store.Store, iss: str = ISS) -> dict[str, store.Key]:
    """Return the keys of an issuer that the store has."""
    prefix = store.issuer_key(iss)
    found = [store.Key.decode(record) for name, key, record in plant.raw() if name == b"keys" and key[:8] == prefix]
    return {key.kid: key for key in found}


# --- keys


@pytest.mark.parametrize(
    ("key", "algorithm"), [(EC, "ES256"), (ED, "EdDSA"), (RSA, "RS256")], ids=["EC", "Ed25519", "RSA"]
)
def test_a_key_is_kept_as_openssl_reads_it(key: Any, algorithm: str) -> None:
    assert store.key_of(jwk(key, kid="a"), ALL) == store.Key(store.ALGORITHMS[algorithm], "a", spki(key))


@pytest.mark.parametrize("bits", [2048, 3072, 4096])
def test_keys_of_rsa_have_the_der_of_openssl(bits: int) -> None:
    for exponent in (3, 65537):
        key = rsa.generate_private_key(exponent, bits).public_key()
        assert store.key_of(jwk(key), ALL).spki == spki(key)


def test_every_point_of_the_curve_is_one_and_others_are_none() -> None:
    noise = random.Random(7)  # noqa: S311 - no secret
    for _ in range(20):
        key = jwk(ec.generate_private_key(ec.SECP256R1()).public_key())
        assert store.key_of(key, ALL).algorithm == 1
        key["y"] = number(noise.getrandbits(256), 32)
        with pytest.raises(store.Unusable, match=r"no point of P-256"):
            store.key_of(key, ALL)


def test_a_key_of_rsa_without_a_word_is_for_what_its_issuer_may_use() -> None:
    for allowed, alg, expected in ((12, None, 4), (8, None, 8), (12, "PS256", 8), (12, "RS256", 4)):
        key = jwk(RSA) if alg is None else jwk(RSA, alg=alg)
        assert store.key_of(key, allowed).algorithm == expected


GOOD = jwk(EC, kid="a")
UNUSABLE: list[tuple[str, object, str]] = [
    ("text", "x", "not a JSON object"),
    ("private", jwk(ec.generate_private_key(ec.SECP256R1())), "private or secret key"),
    ("shared", {"kty": "oct", "k": "AAAA"}, "private or secret key"),
    ("for encryption", GOOD | {"use": "enc"}, "not for signatures"),
    ("for signing", GOOD | {"key_ops": ["sign"]}, "not for signatures"),
    ("for a number", GOOD | {"key_ops": 5}, "not for signatures"),
    ("for a text", GOOD | {"key_ops": "verify"}, "not for signatures"),
    ("for nothing", GOOD | {"key_ops": None}, "not for signatures"),
    ("for a number", GOOD | {"key_ops": 5}, "not for signatures"),
    ("for a text", GOOD | {"key_ops": "verify"}, "not for signatures"),
    ("for nothing", GOOD | {"key_ops": None}, "not for signatures"),
    ("another algorithm", GOOD | {"alg": "ES384"}, "its algorithm is 'ES384', not ES256"),
    ("of a shared secret", GOOD | {"alg": "HS256"}, "its algorithm is 'HS256', not ES256"),
    ("none", GOOD | {"alg": "none"}, "its algorithm is 'none'"),
    ("an algorithm that is a list", GOOD | {"alg": ["ES256"]}, "its algorithm is"),
    ("another curve", jwk(ec.generate_private_key(ec.SECP384R1()).public_key()), "'EC' 'P-384', which is none of ours"),
    ("no kind", {}, "its kind is None None"),
    ("a kind that is a list", {"kty": ["EC"], "crv": {}}, "which is none of ours"),
    ("no base64url", GOOD | {"x": "+" * 43}, "'x' is not base64url"),
    ("padding", GOOD | {"x": GOOD["x"] + "="}, "'x' is not base64url"),
    ("a short number", GOOD | {"x": "AAAA"}, "'x' has 3 bytes, not 32"),
    ("no number", {key: value for key, value in GOOD.items() if key != "y"}, "'y' is not base64url"),
    ("a short key", jwk(ED) | {"x": "AAAA"}, "'x' has 3 bytes, not 32"),
    ("a weak modulus", jwk(RSA) | {"n": number((1 << 2046) + 1)}, "modulus has 2047 bits"),
    ("a huge modulus", jwk(RSA) | {"n": number((1 << 8192) + 1)}, "modulus has 8193 bits"),
    ("an even modulus", jwk(RSA) | {"n": number(1 << 2047)}, "modulus or exponent cannot be"),
    ("an exponent of one", jwk(RSA) | {"e": "AQ"}, "modulus or exponent cannot be"),
    ("a huge exponent", jwk(RSA) | {"e": number((1 << 64) + 1)}, "modulus or exponent cannot be"),
    ("a long name", GOOD | {"kid": "k" * 256}, "its 'kid' is not text"),
    ("a name with NUL", GOOD | {"kid": "a\0"}, "its 'kid' is not text"),
    ("a name that is a number", GOOD | {"kid": 7}, "its 'kid' is not text"),
]


@pytest.mark.parametrize(("key", "why"), [row[1:] for row in UNUSABLE], ids=[row[0] for row in UNUSABLE])
def test_what_cannot_be_used_is_no_key_and_says_why(key: object, why: str) -> None:
    with pytest.raises(store.Unusable, match=why):
        store.key_of(key, ALL)


MEMBERS = ["kty", "crv", "x", "y", "n", "e", "kid", "use", "key_ops", "alg", "x5c", "x5t", "x5u", "oth"]
WORDS = st.sampled_from(["RSA", "OKP", "EC", "P-256", "sig", "verify", "ES256", "EdDSA"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from([jwk(EC, kid="a"), jwk(ED, kid="a"), jwk(RSA, kid="a")]),
    st.dictionaries(st.sampled_from(MEMBERS), VALUES, min_size=1),
)
def test_a_key_with_whatever_members_hides_no_good_one(key: Json, members: Json) -> None:
    keys, unusable = store.keys_of([key | members, jwk(EC2, kid="good")], ALL)
    assert keys["good"].spki == spki(EC2)
    assert len(keys) + len(unusable) == 2


def test_a_key_for_what_the_issuer_may_not_use_is_none() -> None:
    with pytest.raises(store.Unusable, match="it is for EdDSA, which the issuer is not allowed"):
        store.key_of(jwk(ED), store.ALGORITHMS["ES256"])


def test_keys_are_replaced_all_at_once_and_told(plant: store.Store) -> None:
    assert plant.status()["issuers_without_keys"] == [ISS]
    last = plant.status()["last_change"]
    result = plant.set_keys(ISS, jwks(jwk(EC, kid="a"), jwk(ED, kid="b"), jwk(EC2)))
    assert (result["changed"], result["keys"]) == (True, ["", "a"])
    assert result["unusable"] == ["key 2: it is for EdDSA, which the issuer is not allowed"]
    assert kept(plant) == {"a": store.Key(1, "a", spki(EC)), "": store.Key(1, "", spki(EC2))}
    assert changes(plant.folder, last) == [(store.ISSUER_CHANGED, store.issuer_key(ISS))]
    assert plant.set_keys(ISS, jwks(jwk(EC2), jwk(EC, kid="a")))["changed"] is False
    assert plant.set_keys(ISS, jwks(jwk(EC2, kid="a")))["keys"] == ["a"]
    assert kept(plant) == {"a": store.Key(1, "a", spki(EC2))}
    assert kept(plant, OTHER) == {"f": store.Key(1, "f", spki(EC2))}
    assert plant.status(deep=True)["problems"] == []
    assert plant.status()["issuers_without_keys"] == []


@pytest.mark.parametrize(
    ("iss", "given", "why"),
    [
        (ISS, {"keys": []}, "no key is usable"),
        (ISS, jwks(jwk(ED, kid="b")), "no key is usable: key 1: it is for EdDSA"),
        (ISS, jwks(jwk(EC, kid="a"), jwk(EC2, kid="a")), "two keys have the 'kid' 'a'"),
        (ISS, [], "are no JWK Set"),
        (ISS, {"keys": {}}, "are no JWK Set"),
        ("https://nobody.example", jwks(jwk(EC)), "the store has no issuer 'https://nobody.example'"),
        (ISS + "/", jwks(jwk(EC)), "the store has no issuer"),
    ],
)
def test_keys_that_would_let_nobody_in_leave_the_old_ones(
    plant: store.Store, iss: str, given: object, why: str
) -> None:
    plant.set_keys(ISS, jwks(jwk(EC, kid="a")))
    before = list(plant.raw())
    with pytest.raises(store.Refused, match=why):
        plant.set_keys(iss, given)
    assert list(plant.raw()) == before


def test_too_many_keys_are_refused(plant: store.Store) -> None:
    keys = [jwk(EC, kid=str(index)) for index in range(store.MOST_KEYS + 1)]
    with pytest.raises(
        store.Refused, match=f"there are {store.MOST_KEYS + 1} keys, and {store.MOST_KEYS} are the most"
    ):
        plant.set_keys(ISS, jwks(*keys))


def test_the_site_gives_keys_and_takes_them_and_leaves_those_of_others(plant: store.Store) -> None:
    plant.set_keys(ISS, jwks(jwk(EC, kid="a")))
    last = plant.status()["last_change"]
    assert plant.apply(SITE, secrets())["changed"] is False
    changed = {**FOREIGN, "keys": [jwk(EC, kid="g")], "leeway": 5}
    result = plant.apply(
        compiled([device("edge-1", "sensor", "token")], issuers=[issuer(service=True), changed]), secrets()
    )
    assert result["issuers"] == 2
    assert sorted(changes(plant.folder, last)) == sorted((5, store.issuer_key(iss)) for iss in (ISS, OTHER))
    assert (list(kept(plant)), list(kept(plant, OTHER))) == (["a"], ["g"])
    # Keys from a file that become keys from a URL stay until others come.
    plant.apply(compiled(issuers=[{**changed, "keys": None, "jwks_url": "https://x/k"}]), secrets())
    assert (kept(plant), list(kept(plant, OTHER))) == ({}, ["g"])
    plant.apply(compiled(), secrets())
    assert [name for name, _ in content(plant.folder)] == [b"profiles"]


def test_a_dump_shows_issuers_and_names_of_keys(plant: store.Store) -> None:
    lines = list(plant.dump())
    (foreign,) = (line for line in lines if line.get("issuer") == OTHER)
    assert {key: foreign[key] for key in ("audience", "algorithms", "leeway", "claim", "roles", "service")} == {
        "audience": ["mqtts://plant.example"],
        "algorithms": ["ES256", "RS256"],
        "leeway": 30,
        "claim": "sub",
        "roles": None,
        "service": False,
    }
    assert {"key": "f", "issuer": store.issuer_key(OTHER).hex(), "algorithm": "ES256"} in lines


def test_the_store_names_the_keys_of_an_issuer_and_nothing_else_of_them(plant: store.Store) -> None:
    assert plant.kids(ISS) == {"issuer": ISS, "kids": []}
    plant.set_keys(ISS, jwks(jwk(EC, kid="b"), jwk(EC2)))
    assert plant.kids(ISS) == {"issuer": ISS, "kids": ["", "b"]}
    assert plant.kids(OTHER) == {"issuer": OTHER, "kids": ["f"]}
    with pytest.raises(store.Refused, match=r"the store has no issuer 'https://x'\. Cure: "):
        plant.kids("https://x")


def test_a_store_that_is_not_there_has_no_keys(tmp_path: Path) -> None:
    with pytest.raises(store.Refused, match=r"there is no store\. Cure: run playbooks/site\.yml"):
        store.Store(tmp_path / "none").kids(ISS)


# --- issuers that are unsound


def _role(**more: object) -> Json:
    return {"claim": "r", "map": [{"value": "v", "profile": "sensor", "claims": [], **more}]}


UNSOUND: list[tuple[str, Json, str]] = [
    ("no TLS for keys", issuer(jwks_url="http://x"), "jwks_url must begin with https://"),
    ("an algorithm", issuer(algorithms=["HS256"]), "algorithms must be of ES256, EdDSA, RS256, PS256"),
    ("no algorithm", issuer(algorithms=[]), "algorithms must be a list of 1 to 255 texts"),
    ("an algorithm twice", issuer(algorithms=["ES256", "ES256"]), "algorithms has something twice"),
    ("leeway", issuer(leeway=301), "leeway must be a whole number from 0 to 300"),
    ("longest", issuer(longest=0), "longest must be a whole number from 1"),
    ("typ", issuer(typ=["JWT"]), "typ must be in lower case, without 'application/'"),
    ("typ of a medium", issuer(typ=["application/jwt"]), "typ must be in lower case"),
    ("scope", issuer(scope="all"), "scope must be policy or aif"),
    ("a list for a scope", issuer(scope=[]), "scope must be policy or aif"),
    ("audience", issuer(audience=[]), "audience must be a list of 1 to 255 texts"),
    ("an empty audience", issuer(audience=[""]), "audience must be text of 1 to"),
    ("claim", issuer(claim=""), "claim must be text of 1 to"),
    ("prefix", issuer(prefix="a/"), "no device's id can begin with 'a/'"),
    ("roles without prefix", issuer(roles=_role()), "makes devices of roles, and has no prefix"),
    ("roles of nobody", issuer(prefix="a-", roles={"claim": "r", "map": []}), "no role is mapped"),
    (
        "roles without a claim",
        issuer(prefix="a-", roles={"map": _role()["map"]}),
        "roles must be an object with claim, map",
    ),
    (
        "an odd separator",
        issuer(prefix="a-", roles={**_role(), "separator": ","}),
        "separator of roles must be one space",
    ),
    ("no separator", issuer(prefix="a-", roles={**_role(), "separator": None}), "separator of roles must be one space"),
    ("an unknown profile", issuer(prefix="a-", roles=_role(profile="x")), "there is no profile 'x'"),
    ("too many claims", issuer(prefix="a-", roles=_role(claims=["c"])), "'v' has not the 0 claims of its profile"),
    ("a service with roles", issuer(prefix="a-", service=True, roles=_role()), "second service, or one that makes dev"),
    ("keys", issuer(keys=[]), "no key is usable"),
    ("a weak key", issuer(keys=[{"kty": "RSA", "n": "AQAB", "e": "AQAB"}]), "modulus has 17 bits"),
    ("an unknown field", issuer(more=1), "an issuer must be an object with"),
]


@pytest.mark.parametrize(("entry", "why"), [row[1:] for row in UNSOUND], ids=[row[0] for row in UNSOUND])
def test_an_unsound_issuer_is_refused(plant: store.Store, entry: Json, why: str) -> None:
    before = list(plant.raw())
    with pytest.raises(store.Refused, match=why):
        plant.apply(compiled(issuers=[entry]), secrets())
    assert list(plant.raw()) == before


def test_two_of_one_kind_are_refused(plant: store.Store) -> None:
    for entries, why in (
        ([issuer(), issuer()], "is listed twice"),
        ([issuer(service=True), issuer(OTHER, service=True)], "a second service"),
        ([issuer(prefix="a-", roles={"claim": "r", "map": _role()["map"] * 2})], "'v' is mapped twice"),
    ):
        with pytest.raises(store.Refused, match=why):
            plant.apply(compiled(issuers=entries), secrets())


def test_a_device_says_how_it_gets_tokens_if_and_only_if_it_has_them(plant: store.Store) -> None:
    for entry in (
        device("a", "sensor", "token", token=None),
        device("a", token="tls_client_auth"),  # noqa: S106 - no password
        device("a", "sensor", "token", token="password"),  # noqa: S106 - likewise
        device("a", "sensor", "token", token=["tls_client_auth"]),
    ):
        with pytest.raises(store.Refused, match=r"device 'a' gets its tokens with .*, which cannot be"):
            plant.apply(compiled([entry]), secrets())


def test_roles_of_tokens_get_their_claims(plant: store.Store) -> None:
    rules = rule("role/sensor/allow/publish/0", "s/", 1, "/", 0)
    line = issuer(prefix="a-", roles=_role(claims=["plant.location"]))
    plant.apply(compiled([], [profile("sensor", rules, names=["location"])], issuers=[line]), secrets())
    (shown,) = (entry for entry in plant.dump() if "audience" in entry)
    mapping = {"value": "v", "profile": store.profile_key("sensor").hex(), "claims": ["plant.location"]}
    assert shown["roles"] == {"claim": "r", "map": [mapping]}
    assert plant.status(deep=True)["problems"] == []


def test_roles_may_be_words_of_one_text(plant: store.Store) -> None:
    line = issuer(prefix="a-", roles={**_role(), "separator": " "})
    plant.apply(compiled([], [profile("sensor")], issuers=[line]), secrets())
    (shown,) = (entry for entry in plant.dump() if "audience" in entry)
    assert shown["roles"]["separator"] == " "
    (kept,) = (store.Issuer.decode(record) for name, _, record in plant.raw() if name == b"issuers")
    assert kept.flags == store.ROLES_MAPPED | store.ROLES_SPACED
    # A change of it alone is one.
    assert (
        plant.apply(compiled([], [profile("sensor")], issuers=[issuer(prefix="a-", roles=_role())]), secrets())[
            "issuers"
        ]
        == 1
    )
    (shown,) = (entry for entry in plant.dump() if "audience" in entry)
    assert "separator" not in shown["roles"]


# --- revoked tokens and cutoffs


def tokens(plant: store.Store) -> dict[bytes, int]:
    return {key: store.decode_seconds(record) for name, key, record in plant.raw() if name == b"tokens"}


def cutoffs(plant: store.Store) -> dict[bytes, int]:
    return {key: store.decode_seconds(record) for name, key, record in plant.raw() if name == b"cutoffs"}


def test_a_revoked_token_is_told_and_forgotten_when_it_is_over(plant: store.Store, clock: Clock) -> None:
    last = plant.status()["last_change"]
    assert plant.revoke_token(ISS, "j1", NOW + 900, "edge-1")["changed"] is True
    key = store.token_key(ISS, "j1")
    assert tokens(plant) == {key: NOW + 900}
    assert changes(plant.folder, last) == [(store.TOKEN_CHANGED, key + b"edge-1")]
    assert plant.revoke_token(ISS, "j1", NOW + 900, "edge-1")["changed"] is False
    clock.now = NOW + 900 + store.TOKEN_KEPT_SECONDS - 1
    plant.revoke_token(ISS, "j2", NOW + 5000, "edge-1")
    assert set(tokens(plant)) == {key, store.token_key(ISS, "j2")}
    clock.now += 1
    # One that is over already is nothing new.
    assert plant.revoke_token(ISS, "j3", NOW + 900, "edge-1")["changed"] is False
    plant.revoke_token(ISS, "j4", NOW + 5000, "edge-1")
    assert set(tokens(plant)) == {store.token_key(ISS, name) for name in ("j2", "j4")}


def test_applying_a_site_forgets_no_revocation(plant: store.Store) -> None:
    plant.revoke_token(ISS, "j1", NOW + 900, "edge-1")
    plant.cutoff("edge-1", NOW)
    before = content(plant.folder)
    assert plant.apply(SITE, secrets())["changed"] is False
    plant.apply(compiled(), secrets())
    plant.apply(SITE, secrets())
    assert content(plant.folder) == before


def test_a_cutoff_moves_forward_and_never_back(plant: store.Store) -> None:
    last = plant.status()["last_change"]
    assert plant.cutoff("edge-1", NOW)["cutoffs"] == 1
    for until in (NOW, NOW - 1, 1):
        assert plant.cutoff("edge-1", until)["changed"] is False
    assert plant.cutoff("edge-1", NOW + 1)["changed"] is True
    assert cutoffs(plant) == {b"edge-1": NOW + 1}
    assert changes(plant.folder, last) == [(store.CUTOFF_CHANGED, b"edge-1")] * 2


def test_what_is_said_of_the_far_future_does_not_stay_for_ever(plant: store.Store, clock: Clock) -> None:
    """A token service that was taken over could else shut a device out for good, whoever issues its tokens."""
    plant.revocations(ISS, {**listed("a"), "cutoffs": {"edge-1": 1 << 60}})
    assert cutoffs(plant) == {b"edge-1": NOW + 300}
    plant.cutoff("edge-2", NOW + 301)
    assert cutoffs(plant)[b"edge-2"] == NOW + 300
    plant.revoke_token(ISS, "j1", 1 << 60, "edge-1")
    ends = tokens(plant)[store.token_key(ISS, "j1")]
    # No token that a broker takes ends later: its leeway, and `longest`.
    assert ends == NOW + 30 + 86_400
    clock.now = ends + store.TOKEN_KEPT_SECONDS
    plant.revoke_token(ISS, "j2", int(clock.now) + 900, "edge-1")
    assert store.token_key(ISS, "j1") not in tokens(plant)


YEAR = 366 * 86_400


@pytest.mark.parametrize(("longest", "leeway"), [(YEAR, 30), (YEAR, 300), (60, 0), (store.DAY_SECONDS, 300)])
def test_a_revoked_token_is_remembered_as_long_as_its_issuer_lets_one_live(
    tmp_path: Path, clock: Clock, longest: int, leeway: int
) -> None:
    """A token of a year must not come back after a day: to the second, its issuer's clock as far ahead as it may be.

    Nor one of a day, where an issuer's `longest` is short for a while and grows again.
    The broker takes a token until the second before `exp` + leeway (docs/plugin.md).
    """
    plant = store.Store(tmp_path / "store", clock=clock)
    plant.apply(compiled(issuers=[issuer(service=True), {**FOREIGN, "longest": longest, "leeway": leeway}]), secrets())
    longest = max(longest, store.DAY_SECONDS)
    key, expires = store.token_key(OTHER, "long"), NOW + leeway + longest
    plant.revoke_token(OTHER, "long", expires, "edge-1")
    assert tokens(plant) == {key: expires}
    # What is later is no token's end; it is cut to the last that can be.
    plant.revoke_token(OTHER, "later", expires + 1, "edge-1")
    assert tokens(plant)[store.token_key(OTHER, "later")] == expires
    last_good, forgotten = expires + leeway - 1, expires + store.TOKEN_KEPT_SECONDS
    for moment in (NOW + longest // 2, last_good, forgotten - 1, forgotten):
        clock.now = moment
        # Forgetting goes with the next that is revoked.
        plant.revoke_token(ISS, f"at {moment}", moment + 900, "edge-2")
        assert (key in tokens(plant)) is (moment < forgotten), moment


def test_of_the_sites_own_service_longest_counts_likewise(tmp_path: Path, clock: Clock) -> None:
    plant = store.Store(tmp_path / "store", clock=clock)
    longest = store.DAY_SECONDS + 900
    plant.apply(compiled(issuers=[issuer(service=True, longest=longest, leeway=5)]), secrets())
    entries = [{"jti": "a", "exp": NOW + 5 + longest + 1, "device": "edge-1"}]
    plant.revocations(ISS, {**listed(), "tokens": entries})
    assert tokens(plant) == {store.token_key(ISS, "a"): NOW + 5 + longest}


def test_whatever_would_be_good_now_ends_whose_ever_it_is(tmp_path: Path, clock: Clock) -> None:
    """Without a time: now, and as far ahead as the clock of an issuer of this device may be."""
    plant = store.Store(tmp_path / "store", clock=clock)
    issuers = [
        issuer(service=True, leeway=5),
        issuer(OTHER, prefix="kc-", leeway=120),
        issuer("https://third.example", prefix="kc-x-", leeway=300),
    ]
    plant.apply(compiled(issuers=issuers), secrets())
    clock.now = NOW + 0.9
    for device_id, until in (("edge-1", 5), ("kc-cart", 120), ("kc-x-cart", 300), ("kc", 5)):
        assert plant.cutoff(device_id)["cutoffs"] == 1
        assert cutoffs(plant)[device_id.encode()] == NOW + until
        assert plant.cutoff(device_id)["changed"] is False
    plant.apply(compiled(), secrets())
    plant.cutoff("nobodys")
    assert cutoffs(plant)[b"nobodys"] == NOW
    with lmdb.open(str(plant.folder), max_dbs=len(store.DATABASES)) as environment:
        database = environment.open_db(b"issuers", create=False)
        with environment.begin(write=True) as transaction:
            transaction.put(b"12345678", b"?", db=database)
    plant.cutoff("nobodys")
    assert cutoffs(plant)[b"nobodys"] == NOW + store.MOST_LEEWAY


def listed(*jtis: str, **cut: int) -> Json:
    entries = [{"jti": jti, "exp": NOW + 900, "device": "edge-1"} for jti in jtis]
    return {"iss": ISS, "iat": NOW, "exp": NOW + 60, "tokens": entries, "cutoffs": cut}


def test_a_list_of_revocations_adds_and_takes_nothing_away(plant: store.Store) -> None:
    result = plant.revocations(ISS, listed("a", "b", **{"edge-1": NOW}))
    assert (result["changed"], result["tokens"], result["cutoffs"]) == (True, 2, 1)
    assert plant.revocations(ISS, listed("b", **{"edge-1": NOW - 5}))["changed"] is False
    assert plant.revocations(ISS, listed("c"))["tokens"] == 1
    assert set(tokens(plant)) == {store.token_key(ISS, name) for name in "abc"}
    assert cutoffs(plant) == {b"edge-1": NOW}


@pytest.mark.parametrize(
    ("iss", "payload", "why"),
    [
        (
            OTHER,
            {**listed("a"), "iss": OTHER},
            "is not the site's own token service, and no other may refuse tokens here",
        ),
        (ISS, {**listed("a"), "iss": OTHER}, "this is no list of revocations of"),
        (ISS, [], "this is no list"),
        (ISS, {"iss": ISS}, "lacks 'tokens' or 'cutoffs'"),
        (ISS, {**listed(), "tokens": ["a"]}, "names a token that is no object"),
        (ISS, {**listed(), "tokens": [{"jti": "a", "exp": NOW}]}, "None cannot be a device's id"),
        (ISS, {**listed(), "tokens": [{"exp": NOW, "device": "a"}]}, "None is not a token's 'jti'"),
        (ISS, {**listed(), "tokens": [{"jti": "a", "device": "a"}]}, "None is not a time in unix seconds"),
        (ISS, {**listed(), "tokens": [{"jti": "a", "exp": True, "device": "a"}]}, "True is not a time"),
        (ISS, {**listed("a"), "cutoffs": {"a/b": NOW}}, "'a/b' cannot be a device's id"),
        (ISS, {**listed("a"), "cutoffs": {"a": 1.5}}, "1.5 is not a time"),
    ],
)
def test_a_list_that_cannot_be_is_refused_as_a_whole(plant: store.Store, iss: str, payload: object, why: str) -> None:
    before = list(plant.raw())
    with pytest.raises(store.Refused, match=why):
        plant.revocations(iss, payload)
    assert list(plant.raw()) == before


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (lambda plant: plant.revoke_token("https://x", "j", NOW, "a"), "the store has no issuer 'https://x'"),
        (lambda plant: plant.revoke_token(ISS, "", NOW, "a"), "'' is not a token's 'jti'"),
        (lambda plant: plant.revoke_token(ISS, "j" * 1025, NOW, "a"), "is not a token's 'jti'"),
        (lambda plant: plant.revoke_token(ISS, "j", 0, "a"), "0 is not a time"),
        (lambda plant: plant.revoke_token(ISS, "j", NOW, "-"), "'-' cannot be a device's id"),
        (lambda plant: plant.cutoff("", NOW), "'' cannot be a device's id"),
        (lambda plant: plant.cutoff("a", -1), "-1 is not a time"),
    ],
)
def test_what_cannot_be_revoked_is_refused(plant: store.Store, work: Callable[[store.Store], object], why: str) -> None:
    with pytest.raises(store.Refused, match=why):
        work(plant)


# --- the command


def test_the_tool_takes_keys_and_revocations_on_stdin(
    plant: store.Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(text: str, *words: str) -> tuple[int, str, str]:
        file = tmp_path / "stdin"
        file.write_text(text, encoding="utf-8")
        with file.open(encoding="utf-8") as stream:
            monkeypatch.setattr("sys.stdin", stream)
            code = store.main(["--store", str(plant.folder), *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    code, out, _ = run(json.dumps(jwks(jwk(EC, kid="a"))), "keys", ISS)
    assert (code, json.loads(out)["changed"], list(kept(plant))) == (0, True, ["a"])
    code, out, _ = run(json.dumps(listed("a")), "revocations", ISS)
    assert (code, json.loads(out)["tokens"]) == (0, 1)
    code, out, _ = run("", "revoke-token", ISS, "b", str(NOW + 9_000_000), "edge-1")
    assert (code, json.loads(out)["tokens"]) == (0, 1)
    code, out, _ = run("", "cutoff", "edge-1", str(NOW))
    assert (code, json.loads(out)["cutoffs"]) == (0, 1)
    code, out, _ = run("", "cutoff", "edge-2")
    assert (code, json.loads(out)["cutoffs"]) == (0, 1)
    # A name in base64url may begin like an option.
    code, out, _ = run("", "revoke-token", "--", ISS, "-b", str(NOW + 9_000_000), "edge-1")
    assert (code, json.loads(out)["tokens"]) == (0, 1)
    assert store.token_key(ISS, "-b") in tokens(plant)
    code, out, _ = run("", "kids", ISS)
    assert (code, json.loads(out)) == (0, {"issuer": ISS, "kids": ["a"]})
    for text, why in (("{", "stdin is not JSON"), (" " * (store.MOST_JWKS + 1), f"more than {store.MOST_JWKS} bytes")):
        code, out, err = run(text, "keys", ISS)
        assert (code, out) == (1, "")
        assert why in err
        assert "Cure:" in err


def test_damage_of_what_belongs_to_tokens_is_named(plant: store.Store) -> None:
    key = store.key_key(ISS, "x")
    with lmdb.open(str(plant.folder), max_dbs=len(store.DATABASES)) as environment:
        databases = {name: environment.open_db(name, create=False) for name in store.DATABASES}
        with environment.begin(write=True) as transaction:
            wrong = store.Issuer(OTHER, ("a",), mappings=(store.RoleMapping("v", b"12345678"),)).encode()
            transaction.put(b"12345678", wrong, db=databases[b"issuers"])
            transaction.put(b"1", b"?", db=databases[b"issuers"])
            transaction.put(key, store.Key(1, "y", b"z").encode(), db=databases[b"keys"])
            transaction.put(b"2", b"?", db=databases[b"keys"])
            transaction.put(b"3", b"?", db=databases[b"tokens"])
            transaction.put(b"4", b"?", db=databases[b"cutoffs"])
    problems = "\n".join(plant.status(deep=True)["problems"])
    for found in (
        "issuer 31: it ends too early",
        f"issuer {OTHER}: it stands in the wrong place",
        f"issuer {OTHER}: a profile is missing",
        f"key {key.hex()}: it stands in the wrong place",
        "key 32: it ends too early",
        "revoked token 33: it ends too early",
        "cutoff 34: it ends too early",
    ):
        assert found in problems
