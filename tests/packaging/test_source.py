# SPDX-License-Identifier: Apache-2.0
"""What a package is named after and when it is built anew: no container is needed to tell.

The sharp edge: a role installs a package when its version is another one, so two packages that differ must never
share a version, and a later source must have the higher one.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest

from testbed import package
from testbed.common import LabError
from testbed.job import File
from testbed.package import NAME, Source

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

#: What is not ours: as its makers wrote it.
YYJSON = package.SOURCE / "yyjson"
CHANGELOG = f"""{NAME} (0.1.0) unstable; urgency=medium

  * First.

 -- Some One <some.one@plant.example>  Sun, 22 Nov 2026 12:00:00 +0000
"""
EPOCH = 1_790_000_000


def source(files: Mapping[str, str] | None = None, epoch: int = EPOCH) -> Source:
    text = {"Makefile": "all:\n", "debian/changelog": CHANGELOG, **(files or {})}
    return Source({path: File(data.encode()) for path, data in text.items()}, epoch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plugin's folder under git, with everything committed."""
    found = tmp_path / "plugin"
    (found / "debian").mkdir(parents=True)
    (found / "Makefile").write_text("all:\n")
    (found / "plugin.c").write_text("int x;\n")
    (found / "debian/changelog").write_text(CHANGELOG)
    (tmp_path / ".gitignore").write_text("build/\n")
    git(tmp_path, "init", "--quiet")
    commit(tmp_path, EPOCH)
    return found


def git(where: Path, *arguments: str, **environment: str) -> None:
    identity = {f"GIT_{who}_{what}": "a@plant.example" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["git", *arguments], cwd=where, env={**os.environ, **identity, **environment}, check=True)


def commit(where: Path, epoch: int) -> None:
    git(where, "add", "--all")
    git(
        where, "commit", "--quiet", "--message=x", GIT_AUTHOR_DATE=f"{epoch} +0000", GIT_COMMITTER_DATE=f"{epoch} +0000"
    )


def test_version_names_release_time_and_suite() -> None:
    found = source()
    assert found.version("trixie") == f"0.1.0+20260921141320.{found.digest[:8]}+deb13"
    assert found.version("bookworm").endswith("+deb12")


def test_every_byte_and_the_mode_of_a_file_make_another_version() -> None:
    changed = source({"plugin.c": "int x;\n"})
    mode = Source({**changed.files, "plugin.c": File(b"int x;\n", executable=True)}, EPOCH)
    moved = source({"plugin.h": "int x;\n"})
    versions = {one.version("trixie") for one in (source(), changed, mode, moved)}
    assert len(versions) == 4


def test_builder_with_another_recipe_makes_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = source().digest
    monkeypatch.setattr("testbed.image.BUILDER_PACKAGES", ("clang",))
    assert source().digest != before


@pytest.mark.skipif(shutil.which("dpkg") is None, reason="dpkg, which orders versions, is not on this machine")
def test_later_source_and_later_suite_have_the_higher_version() -> None:
    ordered = [
        source().version("bookworm"),
        source().version("trixie"),
        source(epoch=EPOCH + 1).version("bookworm"),
        source({"plugin.c": "int x;\n"}, EPOCH + 86400).version("bookworm"),
        source({"debian/changelog": CHANGELOG.replace("0.1.0", "0.1.1")}).version("bookworm"),
    ]
    for lower, higher in itertools.pairwise(ordered):
        assert subprocess.run(["dpkg", "--compare-versions", lower, "lt", higher], check=False).returncode == 0


def test_build_finds_its_version_and_time_on_top_of_the_changelog() -> None:
    found = source()
    text = found.for_suite("bookworm")["debian/changelog"].data.decode()
    assert text.startswith(f"{NAME} ({found.version('bookworm')}) bookworm; urgency=medium\n")
    assert " -- Some One <some.one@plant.example>  Mon, 21 Sep 2026 14:13:20 +0000\n" in text
    assert text.endswith(CHANGELOG)


@pytest.mark.parametrize("text", ["", "otherpackage (0.1.0) unstable; urgency=low\n", f"{NAME} 0.1.0\n"])
def test_changelog_without_a_version_is_refused(text: str) -> None:
    with pytest.raises(LabError, match="does not begin with"):
        source({"debian/changelog": text}).version("trixie")


def test_committed_source_has_the_time_of_its_commit(folder: Path) -> None:
    assert package.read_source(folder).epoch == EPOCH


def test_commit_that_touches_something_else_changes_nothing(folder: Path) -> None:
    before = package.read_source(folder)
    (folder.parent / "README").write_text("x\n")
    commit(folder.parent, EPOCH + 99)
    assert package.read_source(folder) == before


def test_changed_source_is_newer_than_its_commit(folder: Path) -> None:
    (folder / "plugin.c").write_text("int y;\n")
    found = package.read_source(folder)
    assert found.files["plugin.c"].data == b"int y;\n"
    assert abs(found.epoch - time.time()) < 60


def test_file_that_git_does_not_know_yet_is_part_of_the_source(folder: Path) -> None:
    (folder / "new.c").write_text("int y;\n")
    assert "new.c" in package.read_source(folder).files


def test_results_of_a_build_are_no_source(folder: Path) -> None:
    before = package.read_source(folder)
    (folder / "build").mkdir()
    (folder / "build/plugin.so").write_text("x")
    assert package.read_source(folder) == before


def test_tests_of_the_plugin_make_no_other_package(folder: Path) -> None:
    before = package.read_source(folder)
    (folder / "tests").mkdir()
    (folder / "tests/unit.c").write_text("int y;\n")
    assert package.read_source(folder) == before
    commit(folder.parent, EPOCH + 99)
    assert package.read_source(folder) == before


def test_source_without_git_is_read_without_results_of_a_build(folder: Path) -> None:
    before = package.read_source(folder).files
    shutil.rmtree(folder.parent / ".git")
    (folder / "build").mkdir()
    (folder / "build/plugin.so").write_text("x")
    (folder / "plugin.o").write_text("x")
    assert package.read_source(folder).files == before


def test_folder_without_a_plugin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="There is no plugin in"):
        package.read_source(tmp_path)


@pytest.mark.parametrize(("suite", "architecture"), [("forky", "amd64"), ("trixie", "riscv64"), ("potato", "amd64")])
def test_package_for_what_is_not_supported_is_refused(suite: str, architecture: str) -> None:
    with pytest.raises(LabError, match="There is no package for") as failure:
        package.ensure(suite, architecture)
    assert "Choose one of" in str(failure.value)


class Builder:
    """Stands where the container's build does, and counts."""

    def __init__(self) -> None:
        self.calls = 0
        self.answer = {"p_1_amd64.deb": b"deb", "p_1_amd64.buildinfo": b"info"}

    def __call__(self, *_: object) -> dict[str, bytes]:
        self.calls += 1
        return {**self.answer, "build.log": b"log"}


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> Builder:
    """A builder that needs no container; packages go to a folder of the test's own."""
    found = Builder()
    monkeypatch.setattr(package, "build", found)
    monkeypatch.setattr(package, "PACKAGES", tmp_path / "packages")
    monkeypatch.setattr(package, "STATE", tmp_path / "state")
    real = package.read_source
    monkeypatch.setattr(package, "read_source", lambda: real(folder))
    return found


def test_package_is_built_once_and_again_when_its_source_changes(builder: Builder, folder: Path) -> None:
    first = package.ensure("trixie", "amd64")
    assert package.ensure("trixie", "amd64") == first
    assert builder.calls == 1
    (folder / "plugin.c").write_text("int y;\n")
    builder.answer = {"p_2_amd64.deb": b"deb2"}
    second = package.ensure("trixie", "amd64")
    assert builder.calls == 2
    # One package lies there: a role that takes what it finds finds the new one.
    assert [path.name for path in second.parent.glob("*.deb")] == ["p_2_amd64.deb"]
    assert not list(second.parent.glob("*.buildinfo"))


def test_each_suite_and_architecture_has_a_folder(builder: Builder) -> None:
    paths = {package.ensure(suite, arch).parent for suite in ("trixie", "bookworm") for arch in ("amd64", "arm64")}
    assert {path.relative_to(package.PACKAGES).as_posix() for path in paths} == {
        *("trixie/amd64", "trixie/arm64", "bookworm/amd64", "bookworm/arm64")
    }
    assert builder.calls == 4


def test_labs_that_come_up_side_by_side_build_it_once(builder: Builder) -> None:
    found = []
    threads = [threading.Thread(target=lambda: found.append(package.ensure("trixie", "amd64"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(found)) == 1
    assert len(found) == 4
    assert builder.calls == 1


def test_build_that_failed_leaves_the_package_before_it_unused(builder: Builder, folder: Path) -> None:
    package.ensure("trixie", "amd64")
    (folder / "plugin.c").write_text("int y;\n")
    builder.answer = {}
    with pytest.raises(LabError, match="made 0 packages"):
        package.ensure("trixie", "amd64")
    builder.answer = {"p_2_amd64.deb": b"deb2"}
    assert package.ensure("trixie", "amd64").name == "p_2_amd64.deb"


def test_what_is_not_ours_is_as_its_makers_wrote_it() -> None:
    lines = (YYJSON / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split() for line in lines)}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in YYJSON.iterdir()}
    assert {name: found.pop(name, None) for name in listed} == listed
    assert set(found) == {"README.md", "SHA256SUMS"}
