# SPDX-License-Identifier: Apache-2.0
"""Test identities go away, whatever becomes of the run: after it, after an error in it, and after it was killed.

`site.yml` is not run here: what stands in for it notes what it was asked, and makes the bundles that a CA would make.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import tarfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from bednet.errors import Place
from bednet.site import Device, load_site
from load import identities
from load.describe import Described, describe, shell
from load.identities import Identities, IdentitiesError
from tests.load.conftest import EXAMPLE

if TYPE_CHECKING:
    from collections.abc import Callable

DESCRIBED = Described((), "acl_file", {})


class Plays:
    """Stands in for Ansible.

    :ivar asked: the playbooks and their arguments.
    :ivar packed_as: what stands before each name in what the CA packs.
    :ivar fails: when to fail.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.packed_as = ""
        self.fails: Callable[[str, str], bool] = lambda _playbook, _arguments: False

    def __call__(self, site: Path, playbook: Path, *arguments: str, deadline_s: float = 0) -> None:
        words = " ".join(arguments)
        self.asked.append((playbook.name, words))
        if self.fails(playbook.name, words):
            raise IdentitiesError(f"{playbook.name} failed.")
        if playbook.name == "bundles.yml":
            told = dict(item.split("=", 1) for item in arguments if "=" in item)
            folder = Path(told["load_bundles_to"])
            with tarfile.open(folder / ".bundles.tar", "w") as tar:
                for key in folder.glob("*/key.pem"):
                    for name in ("certificate.pem", "ca.pem"):
                        tar.addfile(tarfile.TarInfo(f"{self.packed_as}{key.parent.name}/{name}"), io.BytesIO())

    @property
    def taken_back(self) -> list[str]:
        """How site.yml was run with the site's own files."""
        return [words for name, words in self.asked if name == "site.yml" and "bednet_site_dir" not in words]


@pytest.fixture
def plays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Plays:
    """Playbooks that only note what they were asked."""
    made = Plays()
    monkeypatch.setattr(identities, "play", made)
    monkeypatch.setattr(identities, "STATE", tmp_path)
    return made


def templates() -> list[str]:
    return ["temp-101", "temp-102", "historian"]


def nothing_left(tmp_path: Path, made: Identities) -> bool:
    return not list((tmp_path / "pending").iterdir()) and not made._folder.exists()


def test_identities_live_as_long_as_the_run(plays: Plays, tmp_path: Path) -> None:
    made = Identities(EXAMPLE, templates(), DESCRIBED)
    with made:
        assert len(made.bundles) == 4
        keys = [folder / "key.pem" for folder in made.bundles.values()]
        assert all(key.stat().st_mode & 0o777 == 0o600 for key in keys)
        assert made._folder.stat().st_mode & 0o077 == 0
        (enrolled,) = [words for name, words in plays.asked if name == "site.yml"]
        assert '"enrolment_validity_days": 1' in enrolled
        assert "--tags enrolment" in enrolled
        # A run that is at work is nobody's leftover.
        assert identities.leftovers() == []
        assert len(list((tmp_path / "pending").glob("*.json"))) == 1
    assert plays.taken_back == ["--tags enrolment -e enrolment_revoke_at_most=4"]
    assert nothing_left(tmp_path, made)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_the_run_takes_them_back(plays: Plays, tmp_path: Path, error: type[BaseException]) -> None:
    made = Identities(EXAMPLE, templates(), DESCRIBED)
    with pytest.raises(error), made:
        raise error
    assert len(plays.taken_back) == 1
    assert nothing_left(tmp_path, made)


def test_an_enrolment_that_fails_half_way_is_taken_back(plays: Plays, tmp_path: Path) -> None:
    plays.fails = lambda _, words: "bednet_site_dir" in words
    made = Identities(EXAMPLE, templates(), DESCRIBED)
    with pytest.raises(IdentitiesError, match=r"site\.yml failed"), made:
        pytest.fail("there is nothing to run with")
    assert len(plays.taken_back) == 1
    assert nothing_left(tmp_path, made)


def test_a_ca_that_packs_what_is_no_bundle_is_not_believed_and_all_is_taken_back(plays: Plays, tmp_path: Path) -> None:
    plays.packed_as = "../"
    made = Identities(EXAMPLE, templates(), DESCRIBED)
    with pytest.raises(IdentitiesError, match=r"no bundle: \.\./.*Cure:"), made:
        pytest.fail("there is nothing to run with")
    assert len(plays.taken_back) == 1
    assert nothing_left(tmp_path, made)


def test_a_policy_that_cannot_be_copied_touches_nothing(plays: Plays, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for name in ("devices.yml", "policy.yml"):
        (site / name).write_text((EXAMPLE / name).read_text().replace("temp-101", "temp.101"))
    made = Identities(site, ["temp-102"], DESCRIBED)
    with pytest.raises(Exception, match="id-dot"), made:
        pytest.fail("there is nothing to run with")
    assert plays.asked == []
    assert not made._folder.exists()


def test_identities_that_cannot_be_taken_back_are_named_and_remembered(plays: Plays, tmp_path: Path) -> None:
    plays.fails = lambda name, words: name == "site.yml" and "bednet_site_dir" not in words
    made = Identities(EXAMPLE, templates(), DESCRIBED)
    with pytest.raises(IdentitiesError, match=r"still enrolled(.|\n)*enrolment_revoke_at_most=4"), made:
        pass
    assert not made._folder.exists()
    (left,) = identities.leftovers()
    assert identities.read_pending(left) == identities.Pending(made.run, str(EXAMPLE), 4)


@pytest.mark.parametrize(("word", "count"), [(b"", 1), (b"done", 0)])
def test_the_guard_takes_back_what_a_killed_run_left(
    plays: Plays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: bytes, count: int
) -> None:
    """The run's end of the pipe is closed by its death, or it says first that all is well."""
    pending, folder = tmp_path / "abc.json", tmp_path / "keys"
    pending.write_text(json.dumps({"run": "abc", "site": str(EXAMPLE), "count": 7}))
    folder.mkdir()
    read, write = os.pipe()
    os.write(write, word)
    os.close(write)
    with os.fdopen(read) as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        assert identities.main(pending, folder) == 0
    assert plays.taken_back == ["--tags enrolment -e enrolment_revoke_at_most=7"] * count
    assert pending.exists() is folder.exists() is (count == 0)


def test_a_gateway_is_watched_the_way_ansible_reaches_it() -> None:
    host = {"address": "192.0.2.11", "user": "operator", "port": 2222, "key": "/k", "connection": "ssh"}
    words = shell({**host, "arguments": "-o UserKnownHostsFile='/a b'"})
    assert words[:1] == ("ssh",)
    assert words[words.index("-p") + 1] == "2222"
    assert words[words.index("-i") + 1] == "/k"
    assert "UserKnownHostsFile=/a b" in words
    assert words[-6:] == ("operator@192.0.2.11", "sudo", "-n", "sh", "-s", "--")
    assert shell({**host, "arguments": "", "connection": "local"}) == ("sudo", "-n", "sh", "-s", "--")


# The site's own devices: one that is missing from the copy of the lists would be revoked.


def write_list(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write devices in the format that the file's name says, the last line without an end."""
    match path.suffix:
        case ".yml":
            text = yaml.safe_dump({"version": 1, "devices": entries})
        case ".json":
            text = json.dumps({"version": 1, "devices": entries})
        case ".jsonl":
            text = "\n".join(map(json.dumps, entries))
        case _:
            rows = []
            for entry in entries:
                cells = {key: " ".join(value) if isinstance(value, list) else value for key, value in entry.items()}
                attributes = entry.get("attributes", {})
                cells.pop("attributes", None)
                rows.append(cells | {f"attributes.{name}": value for name, value in attributes.items()})
            out = io.StringIO()
            table = csv.DictWriter(out, sorted({name for row in rows for name in row}), delimiter=";")
            table.writeheader()
            table.writerows(rows)
            text = out.getvalue()
    path.write_text(text.rstrip("\n"), encoding="utf-8")


def listed_in(folder: Path, *names: str) -> Path:
    """Make a site whose devices, the example's and one with a CSR, are dealt out to lists of these names."""
    folder.mkdir()
    (folder / "csr").mkdir()
    shutil.copyfile(EXAMPLE / "policy.yml", folder / "policy.yml")
    entries = yaml.safe_load((EXAMPLE / "devices.yml").read_text(encoding="utf-8"))["devices"]
    entries.append({"id": "own-key", "location": "hall-1", "roles": ["sensor"], "enrolment": "csr"})
    identities._make_key(folder.parent / "own-key", folder / "csr/own-key.csr", "own-key")
    for number, name in enumerate(names):
        write_list(folder / name, entries[number :: len(names)])
    return folder


def what_is_said(device: Device) -> Device:
    """Return a device without where that stands."""
    return replace(device, place=Place("", 0), places={})


LISTS = ("devices.yml", "devices.csv", "devices.json", "devices.jsonl")


@pytest.mark.parametrize("names", [*((name,) for name in LISTS), LISTS, LISTS[:2], LISTS[1:3], LISTS[2:]])
def test_what_is_enrolled_is_exactly_the_sites_devices_and_the_runs(tmp_path: Path, names: tuple[str, ...]) -> None:
    source, target = listed_in(tmp_path / "source", *names), tmp_path / "target"
    before = load_site(source).devices
    models = ["temp-101", "line-1", "energy-1", "own-key"]
    added = identities.make_site(source, target, "abc123", models, now=datetime.now(UTC), until=True)
    after = load_site(target).devices
    assert len(before) > 20
    assert before["own-key"].csr is not None
    assert set(after) == {*before, *added}
    assert len(after) == len(before) + len(models) + 1
    for name, device in before.items():
        assert what_is_said(after[name]) == what_is_said(device)
    for name, model in zip(added, models, strict=False):
        mine, its = after[name], before[model]
        assert (mine.location, mine.type, mine.attributes) == (its.location, its.type, its.attributes)
        assert mine.roles == tuple(f"load-{role}" for role in its.roles)
        assert mine.authentication == its.authentication
    # The lists of the site itself stay as they are.
    assert load_site(source).devices == before


def test_a_copy_in_which_a_device_is_missing_is_not_enrolled(
    plays: Plays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = listed_in(tmp_path / "source", "devices.yml")
    write_list(source / "devices.csv", [{"id": "temp-999", "location": "hall-1", "roles": ["sensor"]}])
    monkeypatch.setattr(identities, "LISTS", ("devices.yml",))
    made = Identities(source, templates(), DESCRIBED)
    with pytest.raises(IdentitiesError, match="differs from it in 1 devices, such as temp-999; nothing was"), made:
        pytest.fail("there is nothing to run with")
    assert plays.asked == []


# What the inventory says


@pytest.mark.parametrize(
    ("stated", "found"),
    [
        ({}, "plugin"),
        ({"gateway-2": "acl_file"}, "acl_file"),
        ({"gateway-1": "acl_file", "gateway-2": "plugin"}, "acl_file"),
    ],
)
def test_the_plugin_decides_only_where_every_gateway_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: dict[str, str], found: str
) -> None:
    monkeypatch.setenv("ANSIBLE_HOME", str(tmp_path / "ansible"))
    site = tmp_path / "site"
    shutil.copytree(EXAMPLE, site)
    hosts = yaml.safe_load((site / "hosts.yml").read_text(encoding="utf-8"))
    for group in hosts.values():
        for name, said in group["hosts"].items():
            # A host that stands in several groups says what it is in one of them.
            its = group["hosts"][name] = {**(said or {}), "ansible_connection": "local"}
            its["ansible_python_interpreter"] = sys.executable
            if name in stated:
                its["mosquitto_access_control"] = stated[name]
    (site / "hosts.yml").write_text(yaml.safe_dump(hosts), encoding="utf-8")
    told = describe(site)
    assert told.access_control == found
    assert [gateway.name for gateway in told.gateways] == ["gateway-1", "gateway-2"]


def test_names_that_other_readers_take_for_something_else_stay_names(tmp_path: Path) -> None:
    """For YAML 1.1 `on` is the truth and `0101` is 65; in a site's files they are text."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "policy.yml").write_text(
        "version: 1\n"
        "roles:\n"
        "  on: {description: 12:30, allow: {publish: [no/0101/x]}}\n"
        "  ear: {allow: {subscribe: [no/#]}}\n"
        "rules:\n"
        "  - {name: off, when: \"'yes' in device.tags\", deny: {publish: [no/0101/y]}}\n",
        encoding="utf-8",
    )
    (source / "devices.yml").write_text(
        "version: 1\ndevices:\n"
        "  - {id: a1, location: y, roles: [on], tags: [yes]}\n"
        "  - {id: b2, location: y, roles: [ear]}\n",
        encoding="utf-8",
    )
    name, *_ = identities.make_site(source, tmp_path / "site", "abc123", ["a1"], now=datetime.now(UTC), until=False)
    site = load_site(tmp_path / "site")
    assert site.devices[name].roles == ("load-on",)
    assert site.devices["a1"].roles == ("on",)
    assert [grant.topic_filter for grant in site.grants[name]] == ["load/no/0101/x", "load/no/0101/y"]
    assert site.roles["on"].description == "12:30"
