# SPDX-License-Identifier: Apache-2.0
"""Host images, built from Debian itself: no image registry is needed.

- :func:`ensure`: the images of a suite, built where they are not there yet.
- :data:`SUITES`: what can be built.
- :class:`Images`: the names of a suite's images.

A host image is a Debian with nothing but what a freshly installed server has: systemd, an SSH server, Python for
Ansible, sudo and an account named `operator`. The field image has in addition what devices and attackers use. Each is
tagged with a hash of its recipe, so a changed recipe is built anew, and checkouts share what is equal.

Where mmdebstrap cannot work (not root, or not a Debian) the base comes from a registry instead: `debian:SUITE-slim`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import docker
import docker.errors

from testbed import engine
from testbed.common import LABEL, STATE, LabError, debian_like, is_root, locked, run, say

SUITES = ("trixie", "bookworm")

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
FIELD_PACKAGES = ("mosquitto-clients", "nftables", "openssl", "python3-cryptography", "tcpdump")

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
    """The names of a suite's images.

    :param host: a bare Debian server.
    :param field: the same with the tools of devices and attackers.
    """

    host: str
    field: str


@dataclass(frozen=True)
class Mirror:
    """Where packages come from; empty strings mean mmdebstrap's own default."""

    debian: str = ""
    security: str = ""

    def sources(self, suite: str) -> list[str]:
        """Return the lines of an APT sources list for a suite; none for the default."""
        if not self.debian:
            return []
        lines = [f"deb {self.debian} {suite} main", f"deb {self.debian} {suite}-updates main"]
        if self.security:
            lines.append(f"deb {self.security} {suite}-security main")
        return lines


def ensure(suites: tuple[str, ...] = ("trixie",)) -> dict[str, Images]:
    """Build the images that are missing, several suites side by side.

    :return: suite -> the names of its images.
    :raises LabError: when a suite is unknown or an image cannot be built.
    """
    for suite in suites:
        if suite not in SUITES:
            raise LabError(f"There is no host image for `{suite}`.", cure=f"Choose one of {', '.join(SUITES)}.")
    mirror = find_mirror()
    names = {suite: names_of(suite, mirror) for suite in suites}
    missing = [suite for suite in suites if not (_exists(names[suite].host) and _exists(names[suite].field))]
    if missing:
        with ThreadPoolExecutor(max_workers=len(missing)) as pool:
            list(pool.map(lambda suite: _build(suite, names[suite], mirror), missing))
    return names


def names_of(suite: str, mirror: Mirror) -> Images:
    """Return the names of a suite's images: the same recipe always has the same name."""
    base = "debootstrap" if _can_bootstrap() else "registry"
    recipe = "\0".join((base, suite, *HOST_PACKAGES, *mirror.sources(suite), CUSTOMIZE))
    host = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    field = hashlib.sha256("\0".join((recipe, *FIELD_PACKAGES)).encode()).hexdigest()[:12]
    return Images(f"bednet/host:{suite}-{host}", f"bednet/field:{suite}-{field}")


def find_mirror() -> Mirror:
    """Ask apt which Debian mirror this machine uses; the default where it uses none (or is no Debian)."""
    if shutil.which("apt-get") is None:
        return Mirror()
    mirror = _ask_apt()
    if not mirror.debian and is_root() and debian_like():
        # Without fetched lists apt does not know whose repository a line of its sources names.
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


def _build(suite: str, names: Images, mirror: Mirror) -> None:
    # Two runs of this checkout that find the image missing build it once.
    with locked(STATE / "locks" / f"image-{suite}"):
        if not _exists(names.host):
            say(f"building the host image for {suite}")
            if _can_bootstrap():
                _bootstrap(suite, names.host, mirror)
            else:
                _build_on_registry_base(suite, names.host)
        if not _exists(names.field):
            say(f"building the field image for {suite}")
            _docker_build(
                names.field,
                f"FROM {names.host}\n"
                "RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "
                f"{' '.join(FIELD_PACKAGES)} && rm -rf /var/lib/apt/lists/*\n",
            )


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
    names = ("/" / path).parent.glob(f"debian-archive-{suite}-*")
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
