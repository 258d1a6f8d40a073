# SPDX-License-Identifier: Apache-2.0
"""`bednet token SITE --device D`: from the folder of the device's bundle, and from elsewhere.

The sharp edges: the wrong folder, another device's bundle, a token that others can read.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bednet import cli
from tests.plugin.pki import Authority
from tests.unit.live_site import Service

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SITE, PAGE = str(ROOT / "inventories/example-plant"), ROOT / "docs/tokens.md"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A token service, for one test."""
    folder = tmp_path / "ca"
    folder.mkdir()
    with Service(Authority.make(folder)) as service:
        yield service


@pytest.fixture
def bundle(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundle of edge-1, for one test, which is in its folder."""
    folder = service.bundle(tmp_path / "edge-1")
    monkeypatch.chdir(folder)
    return folder


def test_in_the_folder_of_a_bundle_it_takes_no_more_than_the_device(
    bundle: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["token", SITE, "--device", "edge-1"]) == 0
    assert capsys.readouterr().out == f"1.{service.given[0]}\n"


def test_the_command_of_the_page_for_device_makers_does_what_it_says(bundle: Path, service: Service) -> None:
    commands = re.findall(r"^    (bednet token .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 1
    words = shlex.split(commands[0])[1:]
    assert words[1] == "/srv/plant"
    assert cli.main([words[0], SITE, *words[2:]]) == 0
    assert (bundle / "token").read_text(encoding="ascii") == f"1.{service.given[0]}\n"


def test_from_elsewhere_the_bundle_is_named(
    bundle: Path, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["token", SITE, "--device", "edge-1", "--bundle", "edge-1", "--output", "token"]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "token").read_text(encoding="ascii") == f"1.{service.given[0]}\n"
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run the command, which is to fail; returns what it says."""
    assert cli.main(["token", SITE, *words]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    return err.rstrip("\n")


def test_where_no_bundle_is_it_says_where_it_looked_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told(capsys, "--device", "edge-1") == (
        f"bednet token: {tmp_path} is no bundle: it has no client.json. "
        "Cure: name the folder of edge-1's bundle with --bundle"
    )
    assert f"{tmp_path}/nowhere is no bundle" in told(capsys, "--device", "edge-1", "--bundle", "nowhere")


def test_what_cannot_be_is_told_with_a_cure_and_asks_nobody(
    bundle: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    for device, why in (
        ("no-9", f"{SITE} has no device no-9. Cure: name one of it"),
        ("temp-101", "temp-101 has no tokens. Cure: give it `authentication: [token]` and run site.yml"),
        ("edge-2", f"{bundle} is the bundle of edge-1. Cure: name the folder of this device's bundle"),
    ):
        assert told(capsys, "--device", device) == f"bednet token: {why}"
    (bundle / "client.json").write_text('{"id": "edge-1", "token"', encoding="utf-8")
    assert f"{bundle} is no bundle of a device that gets tokens" in told(capsys, "--device", "edge-1")
    assert service.given == []


def test_a_key_that_is_not_in_the_bundle_is_named_with_a_cure(
    bundle: Path, service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.key"
    (bundle / "key.pem").rename(own)
    said = told(capsys, "--device", "edge-1")
    assert f"{bundle}/certificate.pem and {bundle}/key.pem: cannot be read: No such file" in said
    assert said.count("Cure: ") == 1
    assert cli.main(["token", SITE, "--device", "edge-1", "--key", str(own)]) == 0
    assert capsys.readouterr().out == f"1.{service.given[0]}\n"


def test_a_service_that_cannot_answer_is_told_apart_from_one_that_does_not_want_to(
    bundle: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.failing = 2
    assert told(capsys, "--device", "edge-1").endswith("temporarily_unavailable. Cure: try again in a while")
    service.failure = 401, "invalid_client"
    assert told(capsys, "--device", "edge-1").endswith(
        "invalid_client. Cure: see the journal of bednet-token-service on its host"
    )
    service.stop()
    said = told(capsys, "--device", "edge-1")
    assert f"{service.issuer}: [Errno 111] Connection refused. Cure: try again in a while" in said
