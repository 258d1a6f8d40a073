# SPDX-License-Identifier: Apache-2.0
"""What a gateway believes of a list that came over plain HTTP.

The sharp edges: a list of another CA with the same name, one that runs out this very second, and an old list, rightly
signed, replayed to bring a revoked certificate back to life.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from bednet import crl_fetch, store

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

NOW = datetime(2026, 3, 29, 1, 30, tzinfo=UTC)
SECOND = timedelta(seconds=1)


@dataclass(frozen=True)
class Authority:
    """A CA made for one test."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, name: str = "Example Plant issuing CA") -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(NOW - timedelta(days=1))
            .not_valid_after(NOW + timedelta(days=100))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def crl(
        self,
        number: int | None = 7,
        *,
        last_update: datetime = NOW - timedelta(hours=1),
        next_update: datetime = NOW + timedelta(days=7),
        encoding: Encoding = Encoding.DER,
        revoked: Mapping[int, x509.ReasonFlags | None] | None = None,
    ) -> bytes:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(last_update)
            .next_update(next_update)
        )
        if number is not None:
            builder = builder.add_extension(x509.CRLNumber(number), critical=False)
        for serial, reason in (revoked or {}).items():
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(last_update)
            if reason is not None:
                entry = entry.add_extension(x509.CRLReason(reason), critical=False)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self.key, hashes.SHA256()).public_bytes(encoding)


@pytest.fixture(scope="module")
def authority() -> Authority:
    """One CA for all tests of this file."""
    return Authority.make()


def test_a_newer_list_is_taken_as_pem(authority: Authority) -> None:
    accepted = crl_fetch.accept(authority.crl(8), ca=authority.pem, present=authority.crl(7), now=NOW)
    assert crl_fetch._number(x509.load_pem_x509_crl(accepted)) == 8


def test_the_first_list_needs_no_predecessor(authority: Authority) -> None:
    accepted = crl_fetch.accept(authority.crl(1, encoding=Encoding.PEM), ca=authority.pem, present=None, now=NOW)
    assert x509.load_pem_x509_crl(accepted).issuer == authority.certificate.subject


def test_the_same_list_leaves_the_present_one_byte_for_byte(authority: Authority) -> None:
    present = authority.crl(7, encoding=Encoding.PEM)
    assert crl_fetch.accept(authority.crl(7), ca=authority.pem, present=present, now=NOW) == present


def test_the_signer_is_found_among_several_certificates(authority: Authority) -> None:
    both = Authority.make("Example Plant root CA").pem + authority.pem
    assert crl_fetch.accept(authority.crl(), ca=both, present=None, now=NOW)


def test_an_older_list_is_refused_though_it_is_signed(authority: Authority) -> None:
    with pytest.raises(crl_fetch.RefusedError, match=r"older \(number 6\) than the one in use \(number 7\)"):
        crl_fetch.accept(authority.crl(6), ca=authority.pem, present=authority.crl(7), now=NOW)


def test_a_list_of_a_false_ca_with_our_name_is_refused(authority: Authority) -> None:
    with pytest.raises(crl_fetch.RefusedError, match="no CA of this site signed it"):
        crl_fetch.accept(Authority.make().crl(99), ca=authority.pem, present=None, now=NOW)


def test_a_list_of_another_ca_is_refused(authority: Authority) -> None:
    with pytest.raises(crl_fetch.RefusedError, match="no CA of this site signed it"):
        crl_fetch.accept(Authority.make("Other").crl(), ca=authority.pem, present=None, now=NOW)


def test_a_list_without_a_number_is_refused(authority: Authority) -> None:
    with pytest.raises(crl_fetch.RefusedError, match="no CRL number"):
        crl_fetch.accept(authority.crl(None), ca=authority.pem, present=None, now=NOW)


@pytest.mark.parametrize("left", [timedelta(0), -SECOND])
def test_a_list_that_ran_out_is_refused(authority: Authority, left: timedelta) -> None:
    with pytest.raises(crl_fetch.RefusedError, match="ran out"):
        crl_fetch.accept(authority.crl(next_update=NOW + left), ca=authority.pem, present=None, now=NOW)


def test_a_list_in_its_last_second_is_taken(authority: Authority) -> None:
    assert crl_fetch.accept(authority.crl(next_update=NOW + SECOND), ca=authority.pem, present=None, now=NOW)


def test_a_list_from_the_future_is_refused_beyond_the_skew(authority: Authority) -> None:
    skew = crl_fetch.CLOCK_SKEW
    assert crl_fetch.accept(authority.crl(last_update=NOW + skew), ca=authority.pem, present=None, now=NOW)
    with pytest.raises(crl_fetch.RefusedError, match="is this gateway's clock right"):
        crl_fetch.accept(authority.crl(last_update=NOW + skew + SECOND), ca=authority.pem, present=None, now=NOW)


@pytest.mark.parametrize("junk", [b"", b"<html>", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"])
def test_what_is_no_list_is_refused(authority: Authority, junk: bytes) -> None:
    with pytest.raises(crl_fetch.RefusedError, match="not a certificate revocation list"):
        crl_fetch.accept(junk, ca=authority.pem, present=None, now=NOW)


@pytest.fixture
def served() -> Iterator[tuple[str, dict[str, bytes]]]:
    """A web server on loopback that serves what the test puts into the dict, for one test."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = files.get(self.path)
            self.send_response(302 if self.path == "/moved" else 404 if body is None else 200)
            if self.path == "/moved":
                self.send_header("Location", "/issuing.crl")
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's own name
            """Stay quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", files
        server.shutdown()
        thread.join(10)


def _run(url: str, folder: Path) -> int:
    return crl_fetch.main(
        [
            "--url",
            url,
            "--ca",
            str(folder / "ca.pem"),
            "--present",
            str(folder / "present"),
            "--output",
            str(folder / "out"),
        ]
    )


def test_the_command_writes_what_it_fetched(
    authority: Authority, served: tuple[str, dict[str, bytes]], tmp_path: Path
) -> None:
    url, files = served
    now = datetime.now(UTC)
    files["/issuing.crl"] = authority.crl(3, last_update=now - SECOND, next_update=now + timedelta(days=1))
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    assert _run(f"{url}/issuing.crl", tmp_path) == 0
    assert crl_fetch._number(x509.load_pem_x509_crl((tmp_path / "out").read_bytes())) == 3


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/missing", "404"), ("/moved", "302"), ("/junk", "not a certificate revocation list"), ("/huge", "larger than")],
)
def test_the_command_leaves_the_output_alone_when_it_refuses(
    authority: Authority,
    served: tuple[str, dict[str, bytes]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    path: str,
    reason: str,
) -> None:
    url, files = served
    files["/junk"] = b"junk"
    files["/issuing.crl"] = authority.crl(3)
    files["/huge"] = b"0" * (crl_fetch.MAX_BYTES + 1)
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    (tmp_path / "out").write_bytes(b"as it was")
    assert _run(url + path, tmp_path) == 1
    assert (tmp_path / "out").read_bytes() == b"as it was"
    message = capsys.readouterr().err
    assert reason in message
    assert "keeps the one it has" in message


def _check(folder: Path, handed_on: bytes) -> subprocess.CompletedProcess[bytes]:
    """Run the command as root's side of the unit does: a list on standard input, what may be used on its output."""
    files = ["--ca", str(folder / "ca.pem"), "--present", str(folder / "present")]
    command = [sys.executable, "-I", crl_fetch.__file__, "--file", "-", *files, "--output", "-"]
    return subprocess.run(command, input=handed_on, capture_output=True, check=False)


def test_what_is_handed_on_is_decided_upon_once_more(authority: Authority, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    lists = [
        authority.crl(number, last_update=now - SECOND, next_update=now + timedelta(days=1)) for number in (3, 4, 5)
    ]
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    (tmp_path / "present").write_bytes(lists[1])
    newer = _check(tmp_path, lists[2])
    assert newer.returncode == 0
    assert crl_fetch._number(x509.load_pem_x509_crl(newer.stdout)) == 5
    for handed_on, why in (
        (lists[0], b"it is older (number 3) than the one in use (number 4)"),
        (b"", b"not a certificate revocation list"),
        (b"0" * (crl_fetch.MAX_BYTES + 1), b"larger than"),
    ):
        told = _check(tmp_path, handed_on)
        assert told.returncode == 1
        assert told.stdout == b""
        assert why in told.stderr


def _serials(folder: Path, present: bytes, *, piped: bool = False) -> subprocess.CompletedProcess[bytes]:
    """Run the command as the units do, a gateway's with a file, a token service's with a pipe."""
    (folder / "present").write_bytes(present)
    files = ["--ca", str(folder / "ca.pem"), "--present", "-" if piped else str(folder / "present")]
    return subprocess.run(
        [sys.executable, "-I", crl_fetch.__file__, "--serials", *files],
        input=present if piped else b"",
        capture_output=True,
        check=False,
    )


def test_the_list_in_use_is_told_to_the_store_in_force_or_not(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    reasons = {
        0xAB: x509.ReasonFlags.key_compromise,
        (1 << 159) - 1: None,
        7: x509.ReasonFlags.certificate_hold,
        8: x509.ReasonFlags.privilege_withdrawn,
    }
    for encoding, piped in ((Encoding.PEM, False), (Encoding.DER, False), (Encoding.PEM, True)):
        done = _serials(tmp_path, authority.crl(9, revoked=reasons, encoding=encoding), piped=piped)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told == {
            "crl_number": 9,
            "revoked_serials": {
                f"{0xAB:040x}": "keyCompromise",
                "7" + "f" * 39: "unspecified",
                f"{7:040x}": "unspecified",
                f"{8:040x}": "privilegeWithdrawn",
            },
        }
        # What the store makes of it.
        secrets = store.Secrets({"passwords": {}, "psk": {}, **told})
        assert secrets.serials == {b"\xab": 1, b"\x7f" + b"\xff" * 19: 0, b"\x07": 0, b"\x08": 9}
    assert set(crl_fetch.REASONS) == set(store.REASONS)


@pytest.mark.parametrize("what", ["another CA's", "no list", "without a number", "nothing"])
def test_a_list_that_is_not_the_sites_is_not_told_to_the_store(authority: Authority, tmp_path: Path, what: str) -> None:
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    present, why = {
        "another CA's": (Authority.make().crl(9, revoked={1: None}), b"no CA of this site signed it"),
        "no list": (b"junk", b"not a certificate revocation list"),
        "without a number": (authority.crl(None, revoked={1: None}), b"it has no CRL number"),
        "nothing": (b"", b"not a certificate revocation list"),
    }[what]
    piped = _serials(tmp_path, present, piped=True)
    assert (piped.returncode, piped.stdout, why in piped.stderr) == (1, b"", True)
    done = _serials(tmp_path, present)
    assert done.returncode == 1
    assert done.stdout == b""
    assert why in done.stderr
    assert b"What was known before stays" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--present", "p", "--serials", "--output", "x"],
        ["--present", "p", "--url", "http://ca/issuing.crl"],
        ["--present", "p", "--serials", "--file", "-"],
        ["--present", "-", "--file", "-", "--output", "x"],
    ],
)
def test_options_that_do_not_go_together_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        crl_fetch.main(["--ca", "c", *words])
    assert stop.value.code == 2


def test_a_url_that_is_no_web_address_is_refused() -> None:
    with pytest.raises(crl_fetch.RefusedError, match="neither an http nor an https URL"):
        crl_fetch.fetch("file:///etc/passwd")
