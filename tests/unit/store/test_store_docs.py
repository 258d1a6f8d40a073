# SPDX-License-Identifier: Apache-2.0
"""docs/store.md says what is so."""

from __future__ import annotations

import re
from pathlib import Path

from bednet import store
from tests.unit.store.sites import secrets

PAGE = (Path(__file__).parents[3] / "docs/store.md").read_text(encoding="utf-8")


def test_the_compiled_site_of_the_manual_can_be_applied(tmp_path: Path) -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    result = store.Store(tmp_path / "store").apply(example.splitlines(keepends=True), secrets())
    named = set(re.findall(r"^\| `(\w+)` \| ", PAGE, re.MULTILINE))
    assert result["devices"] == 3
    assert {"revoked", "reinstated", "without_secret", "unused_secrets", "files"} <= named & result.keys()
    assert [key for key in result if f"`{key}`" not in PAGE] == []


def test_every_command_of_the_manual_is_one_of_the_tool() -> None:
    documented = {match.split()[0] for match in re.findall(r"^\| `bednet-store ([^`]+)`", PAGE, re.MULTILINE)}
    help_text = store._parser().format_help()
    assert documented == set(re.findall(r"^    ([\w-]+)(?: +\w|$)", help_text, re.MULTILINE))


def test_the_numbers_of_the_manual_are_those_of_the_tool() -> None:
    assert f"The newest {store.CHANGES_KEPT:,} entries" in PAGE
    assert f"More than {store.CHANGES_AT_ONCE:,} changes" in PAGE
    assert f"(1 to {store.MOST_ITERATIONS:,})" in PAGE
    assert f"text8 key ({store.PSK_BYTES.start} to {store.PSK_BYTES.stop - 1})" in PAGE
    assert f"The map, {store.MAP_SIZE >> 30} GiB" in PAGE
    assert f"up to {store.MOST_MAP >> 30} GiB" in PAGE
    assert store.WAIT_SECONDS == 120
