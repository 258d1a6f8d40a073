# SPDX-License-Identifier: Apache-2.0
"""The plugin's package for this machine's architecture: its bytes, its contents, and whether it installs.

The sharp edges: a package whose bytes depend on when and where it was built cannot be checked by anybody; a plugin that
needs a function which the release's broker does not have stops that broker at its next start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from testbed import image, package
from testbed.image import ARCHITECTURE
from testbed.job import File, Outcome, run_job
from tests.packaging import debfile

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.lab

PLUGIN = "/usr/lib/bednet/bednet_plugin.so"
DOCS = f"/usr/share/doc/{package.NAME}"

# Everything that the tests below want to know, in one container: it takes a second to start.
INSPECT = f"""\
dpkg --install package.deb
dpkg-query --show --showformat='${{db:Status-Abbrev}}' {package.NAME} > out/status
dpkg --verify {package.NAME} > out/verify
readelf --wide --dynamic {PLUGIN} > out/dynamic
readelf --wide --program-headers {PLUGIN} > out/segments
readelf --wide --section-headers {PLUGIN} > out/sections
nm --dynamic --defined-only {PLUGIN} > out/exported
nm --dynamic --undefined-only {PLUGIN} > out/imported
ldd -r {PLUGIN} > out/linked 2>&1
nm --dynamic --defined-only /usr/sbin/mosquitto > out/broker
dpkg --purge {package.NAME}
ls -A /usr/lib | grep bednet > out/left || true
"""


@pytest.fixture(scope="module", params=["trixie", "bookworm"])
def suite(request: pytest.FixtureRequest) -> str:
    """A release that there is a package for."""
    return str(request.param)


@pytest.fixture(scope="module")
def built(suite: str) -> Path:
    """The package for a release, as labs deploy it."""
    return package.ensure(suite)


@pytest.fixture(scope="module")
def inspected(suite: str, built: Path) -> Outcome:
    """What was seen as the package was installed on its release and removed again."""
    return run_job(
        image.ensure((suite,), ("builder",))[suite].builder,
        INSPECT,
        {"package.deb": File(built.read_bytes())},
        what="Installing the package",
        cure="See what dpkg says.",
        root=True,
    )


def text(inspected: Outcome, name: str) -> str:
    return inspected.files[name].decode()


def symbols(inspected: Outcome, name: str) -> set[str]:
    return {line.split()[-1].partition("@")[0] for line in text(inspected, name).splitlines()}


def test_second_build_in_another_container_gives_the_same_bytes(suite: str, built: Path) -> None:
    elsewhere = {"TZ": "Pacific/Auckland", "LC_ALL": "C", "USER": "someone", "DEB_VENDOR": "debian"}
    again = package.build(package.read_source(), suite, hostname="elsewhere", environment=elsewhere)
    assert again[built.name] == built.read_bytes()


def test_package_says_what_it_is_and_needs(suite: str, built: Path) -> None:
    control = debfile.control(built)
    assert control["Package"] == "mosquitto-plugin-bednet"
    assert control["Architecture"] == ARCHITECTURE
    assert control["Version"] == package.read_source().version(suite)
    assert built.name == f"mosquitto-plugin-bednet_{control['Version']}_{ARCHITECTURE}.deb"
    needs = {
        name: version for name, _, version in (part.strip().partition(" ") for part in control["Depends"].split(","))
    }
    assert needs.pop("mosquitto") == "(>= 2.0.11)"
    # Found by dpkg-shlibdeps in what the plugin is linked with, each with the version that has what it calls.
    assert {"libc6", "liblmdb0", {"trixie": "libssl3t64", "bookworm": "libssl3"}[suite]} <= set(needs)
    assert all(version.startswith("(>= ") for version in needs.values())
    assert not {name for name in needs if name.endswith("-dev")}


def test_package_brings_the_plugin_and_its_papers_and_nothing_else(built: Path) -> None:
    found = debfile.contents(built)
    assert set(found) == {PLUGIN, f"{DOCS}/changelog.gz", f"{DOCS}/copyright"}
    for path, entry in found.items():
        assert (entry.uname, entry.gname, entry.mode, entry.isfile()) == ("root", "root", 0o644, True), path
    # No script runs as root when it is installed: the role restarts the broker.
    assert debfile.scripts(built) == set()


def test_package_installs_beside_the_broker_and_leaves_nothing(inspected: Outcome) -> None:
    assert text(inspected, "status").strip() == "ii"
    # dpkg's own exclusions (the lab keeps no documentation) are told as missing; nothing else may be.
    assert PLUGIN not in text(inspected, "verify")
    assert text(inspected, "left") == ""


def test_plugin_offers_the_broker_its_three_functions_and_nothing_else(inspected: Outcome) -> None:
    assert symbols(inspected, "exported") == {f"mosquitto_plugin_{name}" for name in ("version", "init", "cleanup")}


def test_broker_of_the_release_has_every_function_that_the_plugin_calls(inspected: Outcome) -> None:
    undefined = {
        line.split()[2] for line in text(inspected, "linked").splitlines() if line.startswith("undefined symbol:")
    }
    assert undefined, "a plugin calls the broker"
    assert undefined <= symbols(inspected, "broker")
    assert "not found" not in text(inspected, "linked")


def test_plugin_is_hardened(inspected: Outcome) -> None:
    dynamic, segments = text(inspected, "dynamic"), text(inspected, "segments")
    assert "GNU_RELRO" in segments
    assert "BIND_NOW" in dynamic or " NOW" in dynamic
    assert "TEXTREL" not in dynamic
    # Nobody can put a library of his own in front of the system's.
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    [stack] = [line for line in segments.splitlines() if "GNU_STACK" in line]
    assert " RW " in stack
    imported = symbols(inspected, "imported")
    assert "__stack_chk_fail" in imported
    assert {name for name in imported if name.endswith("_chk")}
    assert ".debug_info" not in text(inspected, "sections")


@pytest.mark.full
def test_lintian_and_blhc_find_nothing(suite: str, built: Path) -> None:
    done = run_job(
        image.ensure((suite,), ("lint",))[suite].lint,
        """\
cp package/*.deb .
lintian --display-info --pedantic --fail-on error,warning,info,pedantic --allow-root ./*.deb > out/lintian 2>&1 ||
    echo "lintian: $?" >> out/lintian
blhc --all package/build.log > out/blhc 2>&1 || echo "blhc: $?" >> out/blhc
""",
        {f"package/{path.name}": File(path.read_bytes()) for path in (built, built.parent / "build.log")},
        what="Looking the package over",
        cure="See what it says.",
    )
    assert text(done, "lintian") == ""
    assert text(done, "blhc") == ""
