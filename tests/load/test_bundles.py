# SPDX-License-Identifier: Apache-2.0
"""What a CA's host packs is unpacked where it belongs, and nowhere else."""

from __future__ import annotations

import io
import tarfile
from typing import TYPE_CHECKING

import pytest

from load.bundles import unpack

if TYPE_CHECKING:
    from pathlib import Path


def packed(*entries: tuple[str, bytes, str]) -> io.BytesIO:
    """Return a tar of names, types and where links lead to; a good file comes first."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, link in (("./good/key.pem", tarfile.REGTYPE, ""), *entries):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.mode, entry.uid = kind, link, 0o4777, 12345
            entry.size = 3 if kind == tarfile.REGTYPE else 0
            tar.addfile(entry, io.BytesIO(b"new") if entry.size else None)
    out.seek(0)
    return out


def test_files_are_their_owner_s_alone(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    # What was there is replaced, and not followed.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"old")
    (tmp_path / "good/key.pem").symlink_to(elsewhere)
    folders = [(name, tarfile.DIRTYPE, "") for name in (".", "./other/")]
    unpack(packed(*folders, ("a/b", tarfile.REGTYPE, "")), tmp_path)
    for name in ("good/key.pem", "a/b"):
        found = (tmp_path / name).lstat()
        assert (found.st_mode, (tmp_path / name).read_bytes()) == (0o100600, b"new")
        assert found.st_uid == tmp_path.stat().st_uid
    assert elsewhere.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("/etc/absolute", tarfile.REGTYPE, ""),
        ("../above", tarfile.REGTYPE, ""),
        ("good/../../above", tarfile.REGTYPE, ""),
        ("..", tarfile.DIRTYPE, ""),
        ("/etc", tarfile.DIRTYPE, ""),
        ("good/link", tarfile.SYMTYPE, "/etc"),
        ("good/link", tarfile.LNKTYPE, "good/key.pem"),
        ("good/device", tarfile.CHRTYPE, ""),
        ("good/pipe", tarfile.FIFOTYPE, ""),
    ],
)
def test_what_is_none_of_a_bundle_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str, kind: bytes, link: str
) -> None:
    folder = tmp_path / "bundles"
    folder.mkdir()
    with pytest.raises(ValueError, match="no file or folder of a bundle") as caught:
        unpack(packed((name, kind, link)), folder)
    assert name in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path != folder] == []
