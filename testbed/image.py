# SPDX-License-Identifier: Apache-2.0
"""Images, built from Debian itself: no image registry is needed.

- :func:`ensure`: the images of a suite, built where they are not there yet.
- :data:`SUITES`: the releases that hosts can have; :data:`EVERY_SUITE`: those that can be built at all.
- :class:`Images`: the names of a suite's images; :data:`LAYERS`: what is in those that stand on the host image.

A host image is a Debian with nothing but what a freshly installed server has: systemd, an SSH server, Python for
Ansible, sudo and an account named `operator`. The other images are that and some packages more. Each is tagged with a
hash of its recipe, so a changed recipe is built anew, and checkouts share what is equal.

Where mmdebstrap cannot work (not root, or not a Debian) the base comes from a registry instead: `debian:SUITE-slim`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import platform
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import docker
import docker.errors

from testbed import engine
from testbed.common import LABEL, STATE, LabError, debian_like, is_root, locked, run, say

if TYPE_CHECKING:
    from collections.abc import Sequence

SUITES = ("trixie", "bookworm")
#: forky is not released: it is there for its Mosquitto 2.1, to test the plugin against.
EVERY_SUITE = (*SUITES, "forky")

#: This machine's architecture as Debian calls it, and the one that packages are cross-built for.
ARCHITECTURE = {"aarch64": "arm64"}.get(platform.machine(), "amd64")
FOREIGN = {"amd64": "arm64", "arm64": "amd64"}[ARCHITECTURE]
# What the names of compilers for it contain.
_FOREIGN_TRIPLET = {"amd64": "x86-64-linux-gnu", "arm64": "aarch64-linux-gnu"}[FOREIGN]

#: What a freshly installed Debian server has, and Ansible needs (python3-minimal is too small for it).
HOST_PACKAGES = (
    "ca-certificates",
    "dbus",
    "iproute2",
    "openssh-server",
    "procps",
    "python3",
    "python3-apt",
    "sudo",
    "systemd",
    "systemd-sysv",
)
FIELD_PACKAGES = ("curl", "mosquitto-clients", "nftables", "openssl", "python3-cryptography", "tcpdump")
#: gcc rather than build-essential: a third of the latter is C++, which nothing here is written in.
BUILDER_PACKAGES = (
    "debhelper",
    "gcc",
    "libc6-dev",
    "liblmdb-dev",
    "libmosquitto-dev",
    "libssl-dev",
    "make",
    "mosquitto-dev",
    "pkgconf",
)
#: Brokers to measure ours against, what the token service needs, and nginx in front of it.
PEER_PACKAGES = (
    "gunicorn",
    "nats-server",
    "nginx",
    "nodejs",
    "openssl",
    "python3-alembic",
    "python3-authlib",
    "python3-flask",
    "python3-psycopg",
    "python3-sqlalchemy",
    "rabbitmq-server",
)
#: What the role token_service installs on either release, with its tests' other needs: a database server, a clock to
#: set, and a client.
SERVICE_PACKAGES = (
    "curl",
    "gunicorn",
    "libfaketime",
    "nginx",
    "postgresql",
    "python3-alembic",
    "python3-authlib",
    "python3-cryptography",
    "python3-flask",
    "python3-psycopg",
    "python3-psycopg2",
    "python3-sqlalchemy",
)
CROSS_LIBRARIES = ("libc6-dev", "liblmdb-dev", "libmosquitto-dev", "libssl-dev", "pkgconf")
ADD_FOREIGN = f"dpkg --add-architecture {FOREIGN}"


@dataclass(frozen=True)
class Layer:
    """An image that is another one and some packages more.

    :param base: the image that it stands on.
    :param packages: what is installed.
    :param before: a command that runs first.
    """

    base: str
    packages: tuple[str, ...]
    before: str = ""


LAYERS = {
    # Devices and attackers.
    "field": Layer("host", FIELD_PACKAGES),
    # Builds the broker's plugin as a package for this machine's architecture; the broker is there too.
    "builder": Layer("host", BUILDER_PACKAGES),
    # The same for the other architecture.
    "cross": Layer(
        "builder",
        (
            f"gcc-{_FOREIGN_TRIPLET}",
            *(f"{package}:{FOREIGN}" for package in CROSS_LIBRARIES),
        ),
        ADD_FOREIGN,
    ),
    # A broker of the other architecture, and what its processor is played by.
    "emulator": Layer(
        "host",
        (
            "python3-lmdb",
            "qemu-user",
            *(f"{package}:{FOREIGN}" for package in ("liblmdb0", "mosquitto")),
        ),
        ADD_FOREIGN,
    ),
    # Runs the plugin's tests.
    "bench": Layer("builder", ("python3-lmdb",)),
    # Runs those of the token service's tests that need nginx, PostgreSQL, or Debian's libraries.
    "service": Layer("host", SERVICE_PACKAGES),
    # Has other brokers to compare with, and what the token service needs; load/bench/peers has what Debian has not.
    "peers": Layer("bench", PEER_PACKAGES),
    # Also builds what only clang can: the fuzz targets.
    "fuzz": Layer("bench", ("clang", "libclang-rt-dev")),
    # Looks a package over.
    "lint": Layer("builder", ("blhc", "lintian")),
}

# Runs once in the new system. Host keys and the machine id are made at the first start, so that no two hosts share
# them; one key type is enough for the lab and saves the time of an RSA key. Timers that fetch packages by themselves
# would hold apt's lock just when a role wants it.
CUSTOMIZE = """\
set -eu
rm -f /etc/ssh/ssh_host_*
: > /etc/machine-id
useradd --create-home --shell /bin/bash --gid operator operator
install -d -m 0700 -o operator -g operator /home/operator/.ssh
printf 'operator ALL=(ALL:ALL) NOPASSWD: ALL\\n' > /etc/sudoers.d/operator
chmod 0440 /etc/sudoers.d/operator
printf 'HostKey /etc/ssh/ssh_host_ed25519_key\\nPasswordAuthentication no\\nUseDNS no\\n' \\
    > /etc/ssh/sshd_config.d/lab.conf
mkdir -p /etc/systemd/system/ssh.service.d
cat > /etc/systemd/system/ssh.service.d/lab.conf <<'EOF'
[Service]
ExecStartPre=
ExecStartPre=/bin/sh -c 'f=/etc/ssh/ssh_host_ed25519_key; test -s $f || ssh-keygen -q -t ed25519 -N "" -f $f'
ExecStartPre=/usr/sbin/sshd -t
EOF
systemctl enable ssh.service
systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \\
    getty.target systemd-firstboot.service systemd-networkd-wait-online.service \\
    systemd-ask-password-console.path systemd-ask-password-wall.path
cat > /etc/dpkg/dpkg.cfg.d/lab <<'EOF'
force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/man/*
path-exclude=/usr/share/locale/*
EOF
printf 'Acquire::Languages "none";\\nAcquire::Retries "3";\\n' > /etc/apt/apt.conf.d/99lab
printf 'LANG=C.UTF-8\\n' > /etc/default/locale
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log /usr/share/doc/* /usr/share/man/* \\
    /usr/share/locale/*
# Else every first boot rebuilds the linker's cache and the journal's catalogue.
touch /etc/.updated /var/.updated
"""

BUILD_TIMEOUT_S = 900


@dataclass(frozen=True)
class Images:
    """The names of a suite's images: what is in them is told by :data:`LAYERS`; `host` is a bare Debian server."""

    host: str
    field: str
    builder: str
    cross: str
    emulator: str
    bench: str
    service: str
    peers: str
    fuzz: str
    lint: str

    def __getitem__(self, kind: str) -> str:
        """Return the name of an image of a kind."""
        return str(getattr(self, kind))


@dataclass(frozen=True)
class Mirror:
    """Where packages come from; empty strings mean mmdebstrap's own default."""

    debian: str = ""
    security: str = ""

    def sources(self, suite: str) -> list[str]:
        """Return the lines of an APT sources list for a suite; none for the default."""
        if not self.debian:
            return []
        lines = [f"deb {self.debian} {suite} main"]
        if suite in SUITES:
            lines.append(f"deb {self.debian} {suite}-updates main")
        if self.security and suite in SUITES:
            lines.append(f"deb {self.security} {suite}-security main")
        return lines


def ensure(suites: Sequence[str] = ("trixie",), kinds: Sequence[str] = ("host", "field")) -> dict[str, Images]:
    """Build the images that are missing, side by side.

    :param kinds: which images of each suite; those that they stand on come with them.
    :return: suite -> the names of its images, of which those asked for are there.
    :raises LabError: when a suite is unknown or an image cannot be built.
    """
    for suite in suites:
        if suite not in EVERY_SUITE:
            raise LabError(f"There is no image of `{suite}`.", cure=f"Choose one of {', '.join(EVERY_SUITE)}.")
    mirror = find_mirror()
    names = {suite: names_of(suite, mirror) for suite in suites}
    missing = [(suite, kind) for suite in suites for kind in kinds if not _exists(names[suite][kind])]
    if missing:
        with ThreadPoolExecutor(max_workers=len(missing)) as pool:
            list(pool.map(lambda item: _build(item[0], item[1], names[item[0]], mirror), missing))
    return names


def names_of(suite: str, mirror: Mirror) -> Images:
    """Return the names of a suite's images: the same recipe always has the same name."""
    base = "debootstrap" if _can_bootstrap() else "registry"
    recipes = {"host": "\0".join((base, suite, *HOST_PACKAGES, *mirror.sources(suite), CUSTOMIZE))}
    for kind, layer in LAYERS.items():
        recipes[kind] = "\0".join((recipes[layer.base], *filter(None, [layer.before]), *layer.packages))
    return Images(
        **{
            kind: f"bednet/{kind}:{suite}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
            for kind, recipe in recipes.items()
        }
    )


def find_mirror() -> Mirror:
    """Ask apt which Debian mirror this machine uses; the default where it uses none (or is no Debian)."""
    if shutil.which("apt-get") is None:
        return Mirror()
    mirror = _ask_apt()
    if not mirror.debian and is_root() and debian_like():
        # Without fetched lists apt does not know whose repository a line of its sources names. Others ask at the same
        # time, and apt lets one fetch them.
        with locked(STATE / "locks" / "apt"):
            mirror = _ask_apt()
            if not mirror.debian:
                engine.apt_update()
                mirror = _ask_apt()
    return mirror


def _ask_apt() -> Mirror:
    listing = run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)", "Created-By: Packages"],
        what="Asking apt for the Debian mirror",
        cure="See whether `apt-get indextargets` works on this machine.",
    )
    return parse_indextargets(listing)


def parse_indextargets(listing: str) -> Mirror:
    """Read the lines ORIGIN|LABEL|REPO_URI of `apt-get indextargets`.

    Mirrors that only this machine can reach (file:, cdrom:, localhost) are left out.
    """
    found: dict[str, str] = {}
    for line in listing.splitlines():
        origin, _, rest = line.partition("|")
        label, _, uri = rest.partition("|")
        remote = uri.startswith(("http://", "https://")) and not uri.split("//")[1].startswith(("localhost", "127."))
        if origin == "Debian" and remote:
            found.setdefault(label, uri.rstrip("/"))
    return Mirror(found.get("Debian", ""), found.get("Debian-Security", ""))


def _exists(name: str) -> bool:
    connection = engine.client()
    try:
        connection.images.get(name)
    except docker.errors.ImageNotFound:
        return False
    finally:
        connection.close()
    return True


def _can_bootstrap() -> bool:
    return is_root() and shutil.which("apt-get") is not None and debian_like()


def _build(suite: str, kind: str, names: Images, mirror: Mirror) -> None:
    if kind != "host":
        _build(suite, LAYERS[kind].base, names, mirror)
    # Two that find an image missing build it once, whether they are runs of this checkout or threads of this process.
    with locked(STATE / "locks" / f"image-{suite}-{kind}"):
        if _exists(names[kind]):
            return
        say(f"building the {kind} image for {suite}")
        if kind == "host":
            if _can_bootstrap():
                _bootstrap(suite, names.host, mirror)
            else:
                _build_on_registry_base(suite, names.host)
        else:
            layer = LAYERS[kind]
            commands = (
                layer.before,
                "apt-get update",
                "DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "
                + " ".join(layer.packages),
                # Else the packages themselves stay in the image, beside what was unpacked.
                "apt-get clean",
                "rm -rf /var/lib/apt/lists/*",
            )
            _docker_build(names[kind], f"FROM {names[layer.base]}\nRUN {' && '.join(filter(None, commands))}\n")


# A mirror that stands still keeps a testing release whose date has run out.
_STALE_RELEASE = {"forky": ('--aptopt=Acquire::Check-Valid-Until "false"',)}


def _bootstrap(suite: str, name: str, mirror: Mirror) -> None:
    tools = _mmdebstrap()
    keyring = _keyring(suite)
    scratch = STATE / "images"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=f"{suite}-") as folder:
        tar = Path(folder) / "root.tar"
        hook = Path(folder) / "customize"
        hook.write_text("#!/bin/sh\nexec chroot \"$1\" /bin/sh <<'CUSTOMIZE'\n" + CUSTOMIZE + "CUSTOMIZE\n")
        hook.chmod(0o755)
        run(
            [
                "mmdebstrap",
                "--variant=minbase",
                f"--include={','.join(HOST_PACKAGES)}",
                f"--keyring={keyring}",
                "--dpkgopt=path-exclude=/usr/share/doc/*",
                "--dpkgopt=path-exclude=/usr/share/man/*",
                "--dpkgopt=path-exclude=/usr/share/locale/*",
                "--dpkgopt=force-unsafe-io",
                '--aptopt=Acquire::Languages "none"',
                *_STALE_RELEASE.get(suite, ()),
                f"--customize-hook={hook}",
                "--format=tar",
                suite,
                str(tar),
                *mirror.sources(suite),
            ],
            what=f"Building the {suite} host image",
            cure="See whether the Debian mirror of this machine answers (`apt-get update`) and try again; "
            f"{STATE / 'images'} needs about 1 GB of room.",
            # Its own temporary tree would else lie in /tmp, outside the checkout.
            env={"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "TMPDIR": folder, "LC_ALL": "C.UTF-8"},
            timeout_s=BUILD_TIMEOUT_S,
        )
        repository, _, tag = name.partition(":")
        connection = engine.client(timeout_s=BUILD_TIMEOUT_S)
        try:
            connection.api.import_image_from_file(
                str(tar), repository=repository, tag=tag, changes=[f"LABEL {LABEL}=image", "ENV LANG=C.UTF-8"]
            )
        finally:
            connection.close()


def _mmdebstrap() -> Path:
    """Return the folder that holds mmdebstrap: from PATH, or unpacked from its package without installing it."""
    if found := shutil.which("mmdebstrap"):
        return Path(found).parent
    return _unpacked("mmdebstrap") / "usr/bin"


def _keyring(suite: str) -> Path:
    """Return the keys of Debian's archive: an installed keyring that knows the suite, or one unpacked for us."""
    path = Path("usr/share/keyrings/debian-archive-keyring.gpg")
    # What is not released yet is signed with the keys of the release before it.
    signer = suite if suite in SUITES else SUITES[0]
    names = ("/" / path).parent.glob(f"debian-archive-{signer}-*")
    if ("/" / path).exists() and any(names):
        return "/" / path
    return _unpacked("debian-archive-keyring") / path


def _unpacked(package: str) -> Path:
    """Fetch a package and unpack it into the state folder, where nobody has done so yet."""
    target = STATE / "tools" / package
    with locked(STATE / "locks" / f"tool-{package}"):
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            cure = f"Run `apt-get install {package}` by hand and try again."
            what = f"Fetching {package}"
            command = ["apt-get", "download", "-o", "APT::Sandbox::User=root", package]
            try:
                run(command, what=what, cure=cure, cwd=Path(folder))
            except LabError:
                engine.apt_update()
                run(command, what=what, cure=cure, cwd=Path(folder))
            archive = next(Path(folder).glob("*.deb"))
            unpacked = Path(folder) / "unpacked"
            run(["dpkg", "--extract", archive, unpacked], what=f"Unpacking {package}", cure=cure)
            unpacked.rename(target)
    return target


def _build_on_registry_base(suite: str, name: str) -> None:
    _docker_build(
        name,
        f"FROM debian:{suite}-slim\n"
        "RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "
        f"{' '.join(HOST_PACKAGES)}\n"
        f"RUN echo {base64.b64encode(CUSTOMIZE.encode()).decode()} | base64 -d | sh\n",
    )


def _docker_build(name: str, dockerfile: str) -> None:
    connection = engine.client(timeout_s=BUILD_TIMEOUT_S)
    try:
        connection.images.build(
            fileobj=io.BytesIO(dockerfile.encode()), tag=name, labels={LABEL: "image"}, rm=True, forcerm=True
        )
    except docker.errors.BuildError as exc:
        log = "".join(str(line.get("stream") or line.get("error") or "") for line in exc.build_log)
        raise LabError(
            f"Building {name} failed: {exc.msg}",
            cure="See whether containers on this machine reach the Debian mirror (for debian:* as base: a registry).",
            log=log,
        ) from exc
    finally:
        connection.close()
