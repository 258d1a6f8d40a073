# SPDX-License-Identifier: Apache-2.0
"""The blocks of docs/issuers.md: each is a policy that the check accepts as it stands, and that gets to the gateways.

Sharp edges: a block that nobody ever parsed, keys that the provider publishes and that the store cannot use, the one
snippet of docs/operations.md, and the defaults, with which no token of any of them is good. tests/plugin/
test_plugin_providers.py shows the same blocks' tokens to a live broker.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from bednet import compiled, store
from bednet.cli import main
from bednet.commands import checked_site
from bednet.errors import SiteError
from tests.providers import PAGE, block, documented, write_site
from tests.unit.store.sites import secrets

if TYPE_CHECKING:
    from bednet.site import Site
    from tests.providers import Json, Provider

PROVIDERS = documented()
OPERATIONS = (Path(__file__).parents[3] / "docs/operations.md").read_text(encoding="utf-8")
# With the devices of a site these are none.
HARMLESS = {"unused-role", "wide-filter"}
every_provider = pytest.mark.parametrize("name", PROVIDERS)


def checked(folder: Path, *providers: Provider) -> Site:
    write_site(folder, *providers)
    site = checked_site(folder)
    assert {warning.code for warning in site.warnings} <= HARMLESS
    return site


def in_store(folder: Path, site: Site) -> store.Store:
    """Make a store of a site, as a deployment does."""
    kept = store.Store(folder / "store")
    kept.apply(list(compiled.lines(site)), secrets())
    return kept


def test_every_provider_has_a_block() -> None:
    assert set(PROVIDERS) == {"keycloak", "entra", "entra-people", "auth0", "kubernetes", "google"}


@every_provider
def test_a_block_is_accepted_as_it_stands(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text of the page itself, behind that of its roles; its comments must not make it another one."""
    provider = PROVIDERS[name]
    write_site(tmp_path, provider)
    (tmp_path / "policy.yml").write_text(block("roles") + block(name), encoding="utf-8")
    assert main(["check", str(tmp_path)]) == 0
    told = capsys.readouterr()
    lists = [test.get(kind, {}) for test in provider.block["tests"] for kind in ("can", "cannot")]
    tests = sum(len(topics) for accesses in lists for topics in accesses.values())
    assert f"Issuers of tokens: 1. Policy tests: {tests}." in told.out
    assert set(re.findall(r"\[([a-z-]+)\]$", told.err, re.MULTILINE)) <= HARMLESS


@every_provider
def test_what_a_provider_publishes_are_keys_for_its_block(name: str, tmp_path: Path) -> None:
    provider = PROVIDERS[name]
    plant = in_store(tmp_path, checked(tmp_path, provider))
    if "jwks_url" in provider.issuer:
        assert plant.status()["issuers_without_keys"] == [provider.issuer["issuer"]]
        plant.set_keys(provider.issuer["issuer"], {"keys": provider.keys})
    assert plant.status(deep=True) | {"issuers_without_keys": [], "problems": []} == plant.status(deep=True)
    kept = [line for line in plant.dump() if "key" in line]
    signing = {key["kid"] for key in provider.keys if key["use"] == "sig"}
    assert {(line["key"], line["algorithm"]) for line in kept} == {(kid, "RS256") for kid in signing}


@every_provider
def test_the_page_s_token_is_the_one_that_its_test_describes(name: str) -> None:
    """By the claims of its block; the live broker says whether that is what the plugin makes of it."""
    provider = PROVIDERS[name]
    device = provider.issuer["device"]
    assert provider.described["id"] == device["prefix"] + _at(provider.claims, device["claim"])
    stated = _at(provider.claims, provider.issuer["roles"]["claim"])
    words = stated if isinstance(stated, list) else stated.split(provider.issuer["roles"].get("separator"))
    mapped = [role for value, role in provider.issuer["roles"]["map"].items() if value in words]
    assert provider.described["roles"] == mapped
    times = provider.claims
    assert 0 < times["exp"] - times["iat"] <= provider.issuer.get("longest", 86400)


def _at(claims: Json, path: str) -> str | list[str]:
    found: object = claims
    for part in [path] if path in claims else re.split(r"\.(?!io\.)", path):
        assert isinstance(found, dict)
        found = found[part]
    assert isinstance(found, str | list)
    return found


def test_blocks_stand_beside_each_other(tmp_path: Path) -> None:
    """All but the second one of Entra ID, whose issuer is the first one's."""
    several = [provider for name, provider in PROVIDERS.items() if name != "entra-people"]
    assert len(checked(tmp_path, *several).issuers) == len(several)
    with pytest.raises(SiteError) as refusal:
        checked(tmp_path, *PROVIDERS.values())
    assert "issuer-twice" in {problem.code for problem in refusal.value.problems}


@every_provider
def test_with_the_defaults_no_key_of_theirs_is_usable(name: str, tmp_path: Path) -> None:
    """The sentence and the cure that the page promises, of the check and of the gateway."""
    provider = documented()[name]
    del provider.issuer["algorithms"]
    provider.issuer.pop("jwks_url", None)
    provider.issuer["jwks_file"] = "keys.json"
    write_site(tmp_path, provider)
    with pytest.raises(SiteError) as refusal:
        checked_site(tmp_path)
    (problem,) = refusal.value.problems
    assert problem.code == "jwks-file"
    assert "no key is usable: key 1: it is " in problem.message
    assert "it is for RS256, which the issuer is not allowed" in problem.message
    assert problem.cure == "write 'algorithms: [RS256]', if that is what it signs with"
    del provider.issuer["jwks_file"]
    provider.issuer["jwks_url"] = "https://keys.example/jwks"
    plant = in_store(tmp_path, checked(tmp_path, provider))
    with pytest.raises(store.Refused, match=r"which the issuer is not allowed.*which algorithms policy\.yml allows it"):
        plant.set_keys(provider.issuer["issuer"], {"keys": provider.keys})


def test_the_page_quotes_what_is_said() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "no key is usable: key 1: it is for RS256, which the issuer is not allowed" in page
    for reason in ("algorithm", "type", "issuer", "key", "audience", "lifetime", "claims", "expired", "early"):
        assert f"`token-{reason}`" in page.split("## What goes wrong")[1]


def test_a_pod_asks_for_the_audience_of_its_block() -> None:
    (volume,) = yaml.safe_load(block("pod"))["volumes"]
    (source,) = volume["projected"]["sources"]
    issuer = PROVIDERS["kubernetes"].issuer
    assert source["serviceAccountToken"]["audience"] in issuer["audience"]
    # What the kubelet gives at least (core/v1, ServiceAccountTokenProjection).
    assert 600 <= source["serviceAccountToken"]["expirationSeconds"] <= issuer["longest"]


def test_the_command_of_the_page_shows_a_token(tmp_path: Path) -> None:
    (command,) = re.findall(r"^```sh\n(cut .*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    provider = PROVIDERS["entra-people"]
    (tmp_path / "token").write_text(provider.token(), encoding="utf-8")
    shown = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30
    ).stdout
    header, claims = (yaml.safe_load(line) for line in shown.splitlines())
    assert header == provider.header
    assert claims["scp"] == provider.claims["scp"]


def test_the_snippet_of_the_manual_is_accepted(tmp_path: Path) -> None:
    section = OPERATIONS.split("## Other identity providers")[1].split("\n## ")[0]
    (snippet,) = re.findall(r"^```yaml\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    issuer = PROVIDERS["keycloak"].issuer
    write_site(tmp_path)
    (tmp_path / "policy.yml").write_text(block("roles") + snippet, encoding="utf-8")
    (found,) = checked_site(tmp_path).issuers.values()
    assert (found.algorithms, found.typ) == (("RS256",), ("jwt",))
    assert (found.issuer, found.jwks_url) == (issuer["issuer"], issuer["jwks_url"])
