# SPDX-License-Identifier: Apache-2.0
"""Whatever a site lives through - devices come, go, leak, return; runs are cut off anywhere - the CA keeps its word.

- Every certificate that was ever on disk is in the index, under a serial of its own, and stays there.
- What is good is never issued again; what is revoked is in the CRL until it has expired.
- Nothing outlives the issuing CA, and no key returns after keyCompromise.
- A dry run tells what the real run then does, and a second run does nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bednet import ca
from tests.unit.ca_home import ISSUING_DAYS, START, make_csr, make_home

if TYPE_CHECKING:
    from collections.abc import Iterator

IDS = st.sampled_from(["temp-1", "temp-2", "plc-1", "hmi-1"])
AUTHENTICATION = st.sampled_from(
    [["certificate"], ["password"], ["psk"], ["certificate", "password"], ["certificate", "password", "psk"]]
)
DAYS, RENEW = timedelta(days=90), timedelta(days=30)
LAST = START + timedelta(days=ISSUING_DAYS) - RENEW - timedelta(seconds=1)


class CutOffError(BaseException):
    """The machine lost power."""


@contextmanager
def cut_off_after(steps: int | None) -> Iterator[None]:
    """Let a run die before its n-th change to the disk; None lets it live. Syncing is left out."""
    left = [steps]

    def count(change: Any) -> Any:
        def counted(*arguments: Any) -> None:
            if left[0] is not None:
                if left[0] == 0:
                    raise CutOffError
                left[0] -= 1
            change(*arguments)

        return counted

    with (
        mock.patch.object(ca, "_rename", count(ca._rename)),
        mock.patch.object(shutil, "rmtree", count(shutil.rmtree)),
        mock.patch.object(ca, "_fsync", return_value=None),
        mock.patch.object(os, "sync", return_value=None),
    ):
        yield


class SiteLife(RuleBasedStateMachine):
    """A site and its CA."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="bednet-ca-"))
        self.home = make_home(self.folder / "ca")
        self.now = START + timedelta(days=1)
        self.devices: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, ca.PrivateKey] = {}
        self.seen: dict[str, str] = {}  # serial -> PEM
        self.picked_up: set[str] = set()
        self.settled = False

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # --- what happens to a site ---

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        for name in ("temp-1", "temp-2"):
            self.add(name, data.draw(AUTHENTICATION))

    @rule(name=IDS, authentication=AUTHENTICATION)
    def add(self, name: str, authentication: list[str]) -> None:
        self.settled = False
        self.devices[name] = {"id": name, "authentication": authentication}

    @rule(name=IDS, late=st.booleans())
    def enrol_by_csr(self, name: str, late: bool) -> None:
        if name in self.devices:
            self.settled = False
            self.keys[name] = ca.make_key("P-256")
            csr = None if late else make_csr(self.keys[name], name)
            self.devices[name] |= {"enrolment": "csr", "csr": csr}

    @rule(name=IDS)
    def enrol_by_bundle(self, name: str) -> None:
        if name in self.devices:
            self.settled = False
            self.devices[name] |= {"enrolment": "bundle", "csr": None}

    @rule(name=IDS)
    def remove(self, name: str) -> None:
        self.settled = self.settled and name not in self.devices
        self.devices.pop(name, None)

    @rule(name=IDS, reason=st.sampled_from(ca.REASONS))
    def revoke(self, name: str, reason: str) -> None:
        if name in self.devices:
            self.settled = False
            self.devices[name]["revoked"] = reason

    @rule(name=IDS)
    def reinstate(self, name: str) -> None:
        if name in self.devices:
            self.settled = False
            self.devices[name]["revoked"] = None

    @rule(name=IDS)
    def pick_up(self, name: str) -> None:
        """The operator carries the key to the device and deletes it here."""
        key = self.home.path / f"bundles/{name}/key.pem"
        if key.exists():
            key.unlink()
            self.picked_up.add(name)

    @rule(days=st.sampled_from([1 / 86400, 0.5, 1, 29, 30, 59, 60, 61, 90, 91, 400]))
    def pass_time(self, days: float) -> None:
        self.go_to(self.now + timedelta(days=days))

    @rule(which=st.integers(0, 99), seconds=st.sampled_from([-1, 0, 1]), window=st.booleans())
    @precondition(lambda self: self.seen)
    def go_to_the_edge(self, which: int, seconds: int, window: bool) -> None:
        """Go to the very second in which a certificate becomes due or ends."""
        # Serials are random; dates are what a replay finds again.
        certificates = [x509.load_pem_x509_certificate(pem.encode()) for pem in self.seen.values()]
        ends = sorted({ca.moment(certificate, "not_valid_after") for certificate in certificates})
        end = ends[which % len(ends)]
        self.go_to(end - (RENEW if window else timedelta(0)) + timedelta(seconds=seconds))

    def go_to(self, now: Any) -> None:
        if self.now < now <= LAST:
            self.now, self.settled = now, False

    # --- what the operator and the timer do ---

    @rule(steps=st.integers(0, 40))
    def sync_that_is_cut_off(self, steps: int) -> None:
        self.settled = False
        if self.leaked_csr():
            return
        try:
            with cut_off_after(steps):
                self.home.sync(list(self.devices.values()), self.now)
        except CutOffError:
            pass
        # Whatever lies there now was issued, even if nobody was told.
        self.look()

    @rule(name=IDS, reason=st.sampled_from(ca.REASONS), steps=st.one_of(st.none(), st.integers(0, 8)))
    def revoke_at_once(self, name: str, reason: str, steps: int | None) -> None:
        """What playbooks/revoke.yml does: the list of devices first, then the CA, perhaps not to its end."""
        if name not in self.devices:
            return
        self.devices[name]["revoked"] = reason
        self.settled = False
        try:
            with cut_off_after(steps):
                self.home.run("revoke", {"id": name, "reason": reason}, self.now)
        except CutOffError:
            return
        assert not (self.home.path / "bundles" / name).exists()
        kept = ca.Store(self.home.path, check=True)
        assert name not in {*kept.passwords, *kept.psk, *kept.pending}
        listed = self.home.listed()
        for entry in self.home.entries().values():
            if entry.id == name and not entry.expired(self.now):
                assert listed[entry.serial] == entry.reason

    @rule()
    def renew_crl(self) -> None:
        with cut_off_after(None):
            self.home.run("crl", {"days": 7, "refresh_before_days": 2}, self.now)

    @rule()
    def sync(self) -> None:
        devices = list(self.devices.values())
        before, index = self.home.snapshot(), self.home.entries()
        if self.leaked_csr():
            with pytest.raises(ca.Refused, match="was revoked for keyCompromise"):
                self.home.sync(devices, self.now)
            assert self.home.snapshot() == before
            return
        good = {name: serial for name in self.devices if (serial := self.good(name, index))}
        with cut_off_after(None):
            dry = self.home.sync(devices, self.now, check=True)
            assert self.home.snapshot() == before
            answer = self.home.sync(devices, self.now)
            again = self.home.sync(devices, self.now)
        for part in ("changed", "issued", "renewed", "revoked", "waiting", "removed"):
            assert dry[part] == answer[part], part
        assert again["changed"] is False
        assert not {*answer["issued"], *answer["renewed"]} & set(good)
        self.picked_up -= {*answer["issued"], *answer["renewed"]}
        self.look()
        self.settled = True
        self.check_settled(answer)

    # --- what must hold ---

    def leaked_csr(self) -> bool:
        """Whether a device that shall get a certificate comes with a key that was revoked for keyCompromise."""
        leaked = {entry.key for entry in self.home.entries().values() if entry.reason == "keyCompromise"}
        for name, device in self.devices.items():
            # A device that is being revoked for it in this very run is not asked for its CSR.
            asked = device.get("csr") and not device.get("revoked") and "certificate" in device["authentication"]
            if asked and ca.fingerprint(self.keys[name].public_key()) in leaked:
                return True
        return False

    def good(self, name: str, index: dict[str, ca.Entry]) -> str | None:
        """Say which certificate of a device needs no other, in the test's own words."""
        device = self.devices[name]
        if device.get("revoked") or "certificate" not in device["authentication"]:
            return None
        for entry in index.values():
            if (
                entry.id != name
                or entry.kind != "device"
                or entry.reason
                or ca.unstamp(entry.not_after) <= self.now + RENEW
            ):
                continue
            if device.get("csr"):
                if entry.key == ca.fingerprint(self.keys[name].public_key()):
                    return entry.serial
            elif device.get("enrolment", "bundle") == entry.enrolment:
                return entry.serial
        return None

    def look(self) -> None:
        """Remember every certificate that can be seen anywhere."""
        for file in self.home.path.rglob("*.pem"):
            if file.parent.name == "issued" or file.name == "certificate.pem":
                pem = file.read_text()
                number = x509.load_pem_x509_certificate(pem.encode()).serial_number
                self.seen[f"{number:040x}"] = pem

    @invariant()
    def every_certificate_is_in_the_index_and_ends_with_the_issuing_ca(self) -> None:
        index = self.home.entries()
        issuing, _ = self.home.issuer()
        end = ca.moment(issuing, "not_valid_after")
        for number, pem in self.seen.items():
            certificate = x509.load_pem_x509_certificate(pem.encode())
            entry = index[number]
            assert entry.not_after == ca.stamp(ca.moment(certificate, "not_valid_after"))
            assert entry.key == ca.fingerprint(certificate.public_key())  # type: ignore[arg-type]
            assert ca.moment(certificate, "not_valid_after") <= end

    @invariant()
    def revoked_certificates_are_in_the_crl_until_they_expire(self) -> None:
        if self.settled:
            listed = self.home.listed()
            for entry in self.home.entries().values():
                if entry.reason and not entry.expired(self.now):
                    assert listed.get(entry.serial) == entry.reason
            assert len(listed) == len(set(listed))
            for number in sorted(listed):
                assert self.home.entries()[number].reason is not None

    def check_settled(self, answer: dict[str, Any]) -> None:
        """Hold the files against the list of devices."""
        index = self.home.entries()
        lines = [line.split(":")[0] for line in answer["password_file"].splitlines()]
        passwords = [n for n, d in self.devices.items() if "password" in d["authentication"] and not d.get("revoked")]
        assert lines == sorted(["bednet-probe", *passwords]) == sorted(answer["passwords"])
        keys = [n for n, d in self.devices.items() if "psk" in d["authentication"] and not d.get("revoked")]
        assert sorted(answer["psk"]) == sorted(["bednet-probe", *keys])
        compromised = {entry.key for entry in index.values() if entry.reason == "keyCompromise"}
        for entry in index.values():
            if entry.kind == "device" and entry.reason is None and not entry.expired(self.now):
                device = self.devices[entry.id]
                assert not device.get("revoked")
                assert "certificate" in device["authentication"]
                assert entry.key not in compromised
        bundles = {folder.name for folder in (self.home.path / "bundles").glob("*")}
        assert bundles <= set(self.devices)
        for name, device in self.devices.items():
            folder = self.home.path / "bundles" / name
            if device.get("revoked"):
                assert not folder.exists()
                continue
            assert (folder / "password").exists() == ("password" in device["authentication"])
            assert (folder / "psk").exists() == ("psk" in device["authentication"])
            if "psk" in device["authentication"]:
                assert (folder / "psk").read_text() == answer["psk"][name]
            if "certificate" not in device["authentication"]:
                assert not (folder / "certificate.pem").exists()
                continue
            serial = self.good(name, index)
            if device.get("enrolment") == "csr" and device["csr"] is None:
                assert name in answer["waiting"]
                continue
            assert serial is not None
            certificate = x509.load_pem_x509_certificate((folder / "certificate.pem").read_bytes())
            assert f"{certificate.serial_number:040x}" == serial
            if device.get("enrolment", "bundle") == "csr":
                assert not (folder / "key.pem").exists()
            elif name not in self.picked_up:
                key = load_pem_private_key((folder / "key.pem").read_bytes(), password=None).public_key()
                assert ca.fingerprint(key) == index[serial].key  # type: ignore[arg-type]
        assert b'"pending": {}' in (self.home.path / "state/passwords.json").read_bytes()


SiteLife.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestSiteLife = SiteLife.TestCase
