# SPDX-License-Identifier: Apache-2.0
"""Test identities that are made for a run and taken back after it, whatever happens.

- :func:`make_site`: a site's files with the run's own devices added, under roles of their own.
- :class:`Identities`: enrols them with `playbooks/site.yml`, and takes them back the same way.
- :func:`main`: the guard, a process that takes them back when the run that made them was killed.
- :func:`leftovers`: runs whose identities were not taken back, because the machine was switched off for example.

The load devices are copies of the site's: same roles, same rules, in a branch of topics of their own: where a sensor
may publish to `sensors/{device.id}/#`, its copy may to `load/sensors/{device.id}/#`. So the policy under load is the
site's, and no device of the plant takes a load test for the truth, except those whose rules begin with a wildcard.

Certificates live for a day. Keys are made here, in a folder that is removed with the run, and go nowhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bednet.client import METHODS
from bednet.errors import BednetError, SiteError
from bednet.site import load_site
from bednet.yamlfile import load
from load.bundles import unpack
from load.plan import CERTIFICATE, TOKEN
from load.planning import BEARER, way_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from load.describe import Described

CHECKOUT = Path(__file__).resolve().parent.parent
STATE = CHECKOUT / ".bednet/load"
PREFIX = "load-"
TAG = "bednet-load"
WATCHER = "load-watcher"
#: All lists of devices that a site may have (docs/devices.md).
LISTS = ("devices.yml", "devices.csv", "devices.json", "devices.jsonl")
BRANCH = "load"
VALIDITY_DAYS = 1
# Certificates of others are not to be renewed by the way, with a day's validity of ours.
RENEW_BEFORE_DAYS = 0.01
PLAY_DEADLINE_S = 1800


class IdentitiesError(BednetError):
    """Test identities could not be made or taken back; the message says what to do."""

    code = "load-identities"


@dataclass(frozen=True)
class Pending:
    """A run whose identities are not taken back yet.

    :ivar count: how many there are at most.
    """

    run: str
    site: str
    count: int


def make_site(
    source: Path,
    target: Path,
    run: str,
    templates: Sequence[str],
    *,
    now: datetime,
    until: bool,
    way: str | None = None,
    method: str | None = None,
) -> list[str]:
    """Write a site's files into a folder, with the run's devices added; return their ids, the watcher's last.

    The site's own lists are copied as they are, whatever their format: a device that is missing from the copy would be
    revoked.

    :param templates: which device of the site each is a copy of.
    :param way: how they come in; None is as their models do. :param method: likewise how those with tokens prove
        themselves to the token service.
    :param until: whether access may be given an end (only bednet's plugin knows how to keep it).
    :raises IdentitiesError: when the copy does not list the site's devices and the run's, and no others.
    :raises SiteError: when anything in the site's files is wrong.
    """
    listed = load_site(source).devices
    policy = _policy(source / "policy.yml")
    (target / "csr").mkdir(parents=True)
    lists = [source / name for name in LISTS if (source / name).exists()]
    keys = [source / issuer["jwks_file"] for issuer in policy.get("issuers", ()) if issuer.get("jwks_file")]
    for file in (*lists, *keys, *(source / "csr").glob("*.csr")):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    added: list[dict[str, Any]] = []
    for number, template in enumerate(templates, start=1):
        like = listed[template]
        entry: dict[str, Any] = {
            "id": f"{PREFIX}{run}-{number:05d}",
            "location": like.location,
            "roles": [f"{PREFIX}{role}" for role in like.roles],
            "tags": [*like.tags, TAG],
        }
        if like.type is not None:
            entry["type"] = like.type
        if like.attributes:
            entry["attributes"] = dict(like.attributes)
        entry["authentication"] = [way or way_of(like)]
        if entry["authentication"] == [TOKEN]:
            entry["token_authentication"] = method or like.token_authentication or METHODS[0]
        if entry["authentication"] == [CERTIFICATE] or entry.get("token_authentication", BEARER) != BEARER:
            entry["enrolment"] = "csr"
        added.append(entry)
    # One more, who hears what the broker tells of itself.
    watcher = {"id": f"{PREFIX}{run}-watcher", "location": next(iter(listed.values())).location, "tags": [TAG]}
    added.append(watcher | {"roles": [WATCHER], "authentication": ["certificate"], "enrolment": "csr"})
    if until:
        end = (now + timedelta(days=VALIDITY_DAYS)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        for entry in added:
            entry["until"] = end
    policy["roles"][WATCHER] = {"allow": {"subscribe": ["$SYS/#"]}}
    used = {role for template in templates for role in listed[template].roles}
    policy["roles"] |= {f"{PREFIX}{role}": _branch(policy["roles"][role]) for role in sorted(used)}
    if policy.get("rules"):
        policy["rules"] = [_limited(rule, mine=False) for rule in policy["rules"]] + [
            _limited(rule, mine=True) for rule in policy["rules"]
        ]
    # JSON is YAML in which every text is in quotes.
    (target / "policy.yml").write_text(json.dumps(policy, indent=1, ensure_ascii=False), encoding="utf-8")
    # To a list in lines something can be added without a look at what it says.
    with (target / "devices.jsonl").open("a", encoding="utf-8") as lines:
        lines.write("".join(f"\n{json.dumps(entry)}" for entry in added) + "\n")
    ids = [entry["id"] for entry in added]
    wrong = load_site(target).devices.keys() ^ {*listed, *ids}
    if wrong:
        raise IdentitiesError(
            f"The copy of {source} for the run differs from it in {len(wrong)} devices, such as {min(wrong)}; nothing "
            "was enrolled or revoked. Cure: see that nobody changes the site's files, and try again."
        )
    return ids


def _policy(path: Path) -> dict[str, Any]:
    """Read a policy as the site's own reader does: for YAML 1.1 a role called `on` would be the truth.

    :raises SiteError: when it cannot be read.
    """
    root, problems = load(path)
    if root is None or problems:
        raise SiteError(problems)
    plain: Any = root.plain()
    policy: dict[str, Any] = plain
    return policy


def _branch(rules: Mapping[str, Any]) -> dict[str, Any]:
    """Return a role's rules, moved into the branch of topics for load tests."""
    moved = dict(rules)
    for effect in ("allow", "deny"):
        if effect in rules:
            moved[effect] = {
                access: [topic if topic.startswith("$") else f"{BRANCH}/{topic}" for topic in topics]
                for access, topics in rules[effect].items()
            }
    return moved


def _limited(rule: Mapping[str, Any], *, mine: bool) -> dict[str, Any]:
    """Return a rule by attributes that holds for the run's devices alone (moved), or for all but them."""
    made = _branch(rule) if mine else dict(rule)
    ours = f"'{TAG}' in device.tags"
    condition = ours if mine else f"!({ours})"
    made["when"] = f"{condition} && ({rule['when']})" if rule.get("when") else condition
    if mine:
        made["name"] = f"{PREFIX}{rule['name']}"
    return made


def _make_key(folder: Path, csr: Path, name: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    folder.mkdir(mode=0o700)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    descriptor = os.open(folder / "key.pem", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    csr.write_bytes(request.public_bytes(serialization.Encoding.PEM))


def play(site: Path, playbook: Path, *arguments: str, deadline_s: float = PLAY_DEADLINE_S) -> None:
    """Run a playbook against a site.

    :raises IdentitiesError: when it fails, with the end of what it said.
    """
    environment = {"ANSIBLE_CONFIG": str(CHECKOUT / "ansible.cfg"), "LC_ALL": "C.UTF-8", **os.environ}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(site), str(playbook), *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=deadline_s, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise IdentitiesError(
            f"{playbook.name} took longer than {deadline_s:.0f} s. Cure: see whether the site's hosts answer."
        ) from exc
    if done.returncode != 0:
        said = (done.stdout + done.stderr).decode(errors="replace").rstrip().splitlines()
        tail = "\n".join(f"    | {line}" for line in said[-25:])
        raise IdentitiesError(
            f"{playbook.name} failed on {site}:\n{tail}\n"
            "Cure: see that every host answers, and that what Ansible needs is there (the vault's password, say): "
            f"`ansible-playbook -i {site} playbooks/site.yml --check`."
        )


class Identities:
    """The identities of one run; a context that takes them back when it is left.

    :ivar ids: what they are called.
    :ivar bundles: by id, the folder with its credentials.
    :ivar site: the folder with the site's files and the run's devices in them.
    """

    def __init__(
        self,
        site: Path,
        templates: Sequence[str],
        described: Described,
        *,
        way: str | None = None,
        method: str | None = None,
    ) -> None:
        self.source = site.resolve()
        self.run = secrets.token_hex(3)
        self.ids: list[str] = []
        self.bundles: dict[str, Path] = {}
        self._templates = list(templates)
        self._way, self._method = way, method
        self._described = described
        self._folder = Path(tempfile.mkdtemp(prefix="bednet-load-"))
        self.site = self._folder / "site"
        self._pending: Path | None = None
        self._lock = -1
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _make(self) -> None:
        until = self._described.access_control == "plugin"
        self.ids = make_site(
            *(self.source, self.site, self.run, self._templates),
            now=datetime.now(UTC),
            until=until,
            way=self._way,
            method=self._method,
        )
        bundles = self._folder / "bundles"
        bundles.mkdir(mode=0o700)
        made = load_site(self.site).devices
        for name in self.ids:
            if made[name].enrolment == "csr":
                _make_key(bundles / name, self.site / "csr" / f"{name}.csr", name)
        self._remember()
        play(
            self.source,
            CHECKOUT / "playbooks/site.yml",
            *("--tags", "enrolment", "-e", f"bednet_site_dir={self.site}"),
            *("-e", json.dumps({"enrolment_validity_days": VALIDITY_DAYS})),
            *("-e", json.dumps({"enrolment_renew_before_days": RENEW_BEFORE_DAYS})),
        )
        play(
            self.source,
            CHECKOUT / "load/playbooks/bundles.yml",
            *("-e", f"load_bundles_prefix={PREFIX}{self.run}-", "-e", f"load_bundles_to={bundles}"),
        )
        archive = bundles / ".bundles.tar"
        try:
            with archive.open("rb") as packed:
                unpack(packed, bundles)
        except (ValueError, tarfile.TarError) as exc:
            raise IdentitiesError(f"What the CA packed is no bundle: {exc}. Cure: look at the CA's host.") from None
        archive.unlink()
        self.bundles = {name: bundles / name for name in self.ids}
        missing = [name for name in self.ids if not (bundles / name / "ca.pem").exists()]
        if missing:
            raise IdentitiesError(f"The CA made no bundle for {', '.join(missing[:5])}. Cure: look at what it says.")

    def _remember(self) -> None:
        """Write down that there will be something to take back, and let somebody else see to it should we be killed."""
        folder = STATE / "pending"
        folder.mkdir(parents=True, exist_ok=True)
        self._pending = folder / f"{self.run}.json"
        draft = self._pending.with_suffix(".tmp")
        draft.write_text(
            json.dumps({"run": self.run, "site": str(self.source), "count": len(self.ids)}), encoding="utf-8"
        )
        draft.replace(self._pending)
        self._lock = os.open(self._pending, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        log = (folder / f"{self.run}.log").open("wb")
        with log:
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "load.identities", str(self._pending), str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )

    def _leave(self) -> None:
        """Take back what was made; the folder with the keys goes first."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._pending is None:
            return
        try:
            take_back(read_pending(self._pending))
        except KeyboardInterrupt:
            # Whoever is in a hurry does not wait: the guard goes on alone.
            self._release_guard(b"")
            raise
        except IdentitiesError as exc:
            self._release_guard()
            raise IdentitiesError(
                f"{exc}\nThe test identities {PREFIX}{self.run}-* are still enrolled; their certificates end within a "
                f"day. Cure: `ansible-playbook -i {self.source} playbooks/site.yml --tags enrolment "
                f"-e enrolment_revoke_at_most={len(self.ids)}`, or let the next `bednet load` do it."
            ) from exc
        self._pending.unlink(missing_ok=True)
        self._release_guard()
        self._pending.with_suffix(".log").unlink(missing_ok=True)
        self._pending = None

    def _release_guard(self, word: bytes = b"done") -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        if self._guard is not None and self._guard.stdin is not None:
            with contextlib.suppress(OSError):
                self._guard.stdin.write(word)
                self._guard.stdin.close()
            if word:
                self._guard.wait(10)
            self._guard = None


def take_back(pending: Pending) -> None:
    """Enrol what the site's own files list, and nothing else: the run's identities are revoked.

    :raises IdentitiesError: when that fails.
    """
    play(
        Path(pending.site),
        CHECKOUT / "playbooks/site.yml",
        *("--tags", "enrolment", "-e", f"enrolment_revoke_at_most={pending.count}"),
    )


def read_pending(path: Path) -> Pending:
    """Read what a run wrote down.

    :raises IdentitiesError: when it cannot be read.
    """
    try:
        return Pending(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as exc:
        raise IdentitiesError(f"{path}: cannot be read: {exc}. Cure: remove it, and run site.yml.") from exc


def leftovers() -> list[Path]:
    """Return the files of runs that are over and whose identities were not taken back."""
    found = []
    for path in sorted((STATE / "pending").glob("*.json")):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # its run, or its guard, is at work
            found.append(path)
    return found


def main(pending: Path, folder: Path) -> int:
    """Wait until the run ends; if it ended without taking its identities back, do it.

    The lock is inherited by nobody: as long as this works, the file is locked by this process.
    """
    if sys.stdin.buffer.read().strip() == b"done":
        return 0
    shutil.rmtree(folder, ignore_errors=True)
    with pending.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        take_back(read_pending(pending))
        pending.unlink(missing_ok=True)
    pending.with_suffix(".log").unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
