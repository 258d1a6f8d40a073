# SPDX-License-Identifier: Apache-2.0
"""Fetch onto a gateway what tokens are checked against.

That is issuers' public keys, and what the site's own token service has revoked. This runs from a systemd timer, with
the standard library and ``cryptography`` (38 and later) only, in two steps:

- ``fetch`` talks to the network, as a user without rights. Each JWK Set (RFC 7517, 5) comes over TLS from the issuer
  itself: from the own service's addresses, under its name and the site's CA; from other issuers by their URL, under the
  system's CAs or the site's. The list of revocations must be signed by a key of that set, be of this issuer, and in
  force.
- ``hand-over`` reads what that user left, and gives it to ``bednet-store``. It talks to nobody.

What could not be fetched changes nothing: the store keeps the keys that it has. Both steps read one JSON file,
``{"issuers": [{"issuer", "jwks_url", "revocations_url", "addresses"}]}``; `addresses` is null but for the own service.

:func:`accept_jwks` and :func:`accept_revocations` decide; everything around them reads and writes.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hashlib
import http.client
import json
import os
import queue
import re
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, utils

if TYPE_CHECKING:
    from collections.abc import Iterator

Json: TypeAlias = dict[str, Any]

MAX_JWKS_BYTES = 256 * 1024
# A list of 100,000 revoked tokens has some 10 MB.
MAX_REVOCATIONS_BYTES = 32 * 1024 * 1024
TIMEOUT_SECONDS = 10.0
# For all issuers together, who are asked at the same time: one that is slow on purpose holds up nobody but itself.
DEADLINE_SECONDS = 60.0
# A gateway without a clock chip may be a little behind the service that has just signed.
CLOCK_SKEW = timedelta(minutes=5)
MOST_KEYS = 100
P256_BYTES = 32
HTTP_OK = 200
STORE_TIMEOUT_SECONDS = 120


class RefusedError(Exception):
    """What was fetched is not to be used; the message says why."""


def accept_jwks(data: bytes) -> Json:
    """Decide whether this is a JWK Set that a store may look at (which keys are usable is the store's to say).

    :raises RefusedError: when it is none.
    """
    try:
        jwks = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise RefusedError("it is not JSON, or too deep") from exc
    keys = jwks.get("keys") if isinstance(jwks, dict) else None
    if not isinstance(keys, list) or not all(isinstance(key, dict) for key in keys):
        raise RefusedError("it is no JWK Set (RFC 7517, 5)")
    if not 0 < len(keys) <= MOST_KEYS:
        raise RefusedError(f"it has {len(keys)} keys; 1 to {MOST_KEYS} are believed")
    private = {"d", "p", "q", "dp", "dq", "qi", "oth", "k"}
    if any(private & set(key) for key in keys):
        raise RefusedError("it has a private or secret key, which the whole world can read now")
    return {"keys": keys}


def accept_revocations(data: bytes, *, issuer: str, jwks: Json, now: datetime) -> Json:
    """Decide whether this is the issuer's list of revocations: a JWS (RFC 7515) by one of its keys, and in force.

    :param now: an aware datetime.
    :returns: what it says.
    :raises RefusedError: when it must not be used.
    """
    parts = data.strip().split(b".")
    if len(parts) != 3:  # noqa: PLR2004 - RFC 7515, 7.1
        raise RefusedError("it is no signed list (RFC 7515, 7.1)")
    header, payload = _object(parts[0]), _object(parts[1])
    if str(header.get("typ", "")).lower() != "revocations+jwt":
        raise RefusedError(f"it is of the type {header.get('typ')!r}, not revocations+jwt")
    if "crit" in header:
        raise RefusedError("it wants extensions (crit) that nobody knows here")
    key = next((key for key in jwks["keys"] if key.get("kid") is not None and key["kid"] == header.get("kid")), None)
    if key is None:
        raise RefusedError("the key that it names is not one of the issuer's")
    _verify(key, header.get("alg"), b".".join(parts[:2]), _decode(parts[2]))
    if payload.get("iss") != issuer:
        raise RefusedError(f"it is of {payload.get('iss')!r}")
    begin, end = payload.get("iat"), payload.get("exp")
    if not isinstance(begin, int) or not isinstance(end, int):
        raise RefusedError("it does not say from and until when it holds")
    if begin > (now + CLOCK_SKEW).timestamp():
        raise RefusedError("it is of the future; is this gateway's clock right?")
    if end <= now.timestamp():
        raise RefusedError("it has run out")
    return payload


def _decode(text: bytes | str) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    if not re.fullmatch(rb"[A-Za-z0-9_-]*", data):
        raise RefusedError("it is not base64url")
    try:
        return base64.urlsafe_b64decode(data + b"=" * (-len(data) % 4))
    except binascii.Error as exc:
        raise RefusedError("it is not base64url") from exc


def _object(part: bytes) -> Json:
    try:
        value = json.loads(_decode(part))
    except (ValueError, RecursionError) as exc:
        raise RefusedError("it does not hold JSON, or is too deep") from exc
    if not isinstance(value, dict):
        raise RefusedError("it does not hold a JSON object")
    return value


def _verify(key: Json, algorithm: object, signed: bytes, signature: bytes) -> None:
    """Check a signature by the algorithms that the token service has (RFC 7518, 3.4; RFC 8037, 3.1)."""
    kind = (key.get("kty"), key.get("crv"), algorithm)
    try:
        if kind == ("EC", "P-256", "ES256"):
            x, y = (int.from_bytes(_decode(str(key.get(name, ""))), "big") for name in "xy")
            if len(signature) != 2 * P256_BYTES:
                raise RefusedError("its signature is not valid")
            r, s = (int.from_bytes(half, "big") for half in (signature[:P256_BYTES], signature[P256_BYTES:]))
            point = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
            point.verify(utils.encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))
        elif kind == ("OKP", "Ed25519", "EdDSA"):
            ed25519.Ed25519PublicKey.from_public_bytes(_decode(str(key.get("x", "")))).verify(signature, signed)
        else:
            raise RefusedError(f"it is signed with {algorithm!r}, which does not go with its key")
    except (InvalidSignature, ValueError) as exc:
        raise RefusedError("its signature is not valid") from exc


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object, **__: object) -> None:
        """Follow none; the redirect's own code is then an error."""


def _limited(data: bytes, most: int) -> bytes:
    if len(data) > most:
        raise RefusedError(f"it is larger than {most} bytes")
    return data


def fetch_from(addresses: list[str], url: str, context: ssl.SSLContext, most: int) -> bytes:
    """Fetch from the first of these addresses that answers; the certificate must be that of the URL's name.

    :raises RefusedError: when it answers with something else than a document of at most `most` bytes.
    :raises OSError: when none answers.
    """
    parts = urlsplit(url)
    port = parts.port or 443
    problem: OSError = OSError("there is no address to ask")
    for address in addresses:
        try:
            with (
                socket.create_connection((address, port), TIMEOUT_SECONDS) as plain,
                context.wrap_socket(plain, server_hostname=parts.hostname) as tls,
            ):
                request = f"GET {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n"
                tls.sendall(request.encode("ascii"))
                answer = http.client.HTTPResponse(tls)
                answer.begin()
                if answer.status != HTTP_OK:
                    raise RefusedError(f"{address} answers with the status {answer.status}")
                return _limited(answer.read(most + 1), most)
        except (OSError, http.client.HTTPException) as exc:
            problem = OSError(f"{address}: {exc}")
    raise problem


def fetch(url: str, context: ssl.SSLContext, most: int) -> bytes:
    """Fetch from an https URL.

    :raises RefusedError: when more than `most` bytes come, or the URL is none.
    :raises OSError: when nothing comes.
    """
    if not url.startswith("https://"):
        raise RefusedError(f"{url} is no https URL")
    # No proxy of the environment, and no redirect: whoever answers must not choose whom else this gateway talks to.
    handlers = (urllib.request.ProxyHandler({}), _NoRedirect(), urllib.request.HTTPSHandler(context=context))
    with urllib.request.build_opener(*handlers).open(url, timeout=TIMEOUT_SECONDS) as response:
        return _limited(response.read(most + 1), most)


def _context(ca: Path, crl: Path | None, *, own: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca)) if own else ssl.create_default_context()
    if not own:
        context.load_verify_locations(cafile=str(ca))
    elif crl is not None:
        # The keys that the own service signs with are believed for its certificate alone.
        context.load_verify_locations(cafile=str(crl))
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def name_of(issuer: str, what: str) -> str:
    """Return the name of the file in which something of an issuer is left."""
    return f"{hashlib.sha256(issuer.encode()).hexdigest()[:32]}.{what}.json"


def _fetch_one(entry: Json, context: ssl.SSLContext, now: datetime) -> Iterator[tuple[str, Json]]:
    """Fetch what an issuer has, and yield it with its name, one thing after the other."""
    issuer, addresses = entry["issuer"], entry["addresses"]

    def get(url: str, most: int) -> bytes:
        return fetch(url, context, most) if addresses is None else fetch_from(addresses, url, context, most)

    jwks = accept_jwks(get(entry["jwks_url"], MAX_JWKS_BYTES))
    yield "jwks", jwks
    if entry["revocations_url"] is not None:
        told = get(entry["revocations_url"], MAX_REVOCATIONS_BYTES)
        yield "revocations", accept_revocations(told, issuer=issuer, jwks=jwks, now=now)


def fetch_all(
    issuers: list[Json], ca: Path, output: Path, now: datetime, *, crl: Path | None = None, within: float | None = None
) -> dict[str, str]:
    """Fetch what can be fetched into a folder.

    :param crl: the site's list of revoked certificates, PEM; its own service's is looked up there.
    :param within: seconds for all of it; default: :data:`DEADLINE_SECONDS`.
    :returns: issuer -> why nothing of it, or not all, is there.
    """
    for old in output.glob("*.json"):
        old.unlink()
    problems: dict[str, str] = {}
    arrived: queue.SimpleQueue[tuple[str, str | None, Any]] = queue.SimpleQueue()

    def ask(entry: Json) -> None:
        issuer = entry["issuer"]
        try:
            for what, content in _fetch_one(entry, _context(ca, crl, own=entry["addresses"] is not None), now):
                arrived.put((issuer, what, content))
        except (RefusedError, OSError, http.client.HTTPException) as exc:
            arrived.put((issuer, None, str(exc)))
        except Exception as exc:
            arrived.put((issuer, None, f"it cannot be read ({type(exc).__name__})"))
        else:
            arrived.put((issuer, None, None))

    for entry in issuers:
        threading.Thread(target=ask, args=(entry,), daemon=True).start()
    waiting = [entry["issuer"] for entry in issuers]
    deadline = time.monotonic() + (DEADLINE_SECONDS if within is None else within)
    while waiting:
        try:
            issuer, what, content = arrived.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            problems |= dict.fromkeys(waiting, "it takes too long to answer")
            break
        if what is not None:
            (output / name_of(issuer, what)).write_text(json.dumps(content), encoding="utf-8")
            continue
        waiting.remove(issuer)
        if content is not None:
            problems[issuer] = content
    (output / "problems.json").write_text(json.dumps(problems), encoding="utf-8")
    return problems


def _read(path: Path, most: int) -> bytes | None:
    """Read a plain file that somebody without rights left; a link there would lead root astray."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise RefusedError("it is no plain file")
        return _limited(file.read(most + 1), most)


def hand_over(issuers: list[Json], folder: Path, store: str) -> Json:
    """Give the store what was fetched.

    :returns: ``{"changed": bool, "problems": {issuer: why}}``
    """
    changed, problems = False, dict[str, str]()
    try:
        found = json.loads(_read(folder / "problems.json", MAX_JWKS_BYTES) or b"{}")
        told = {str(issuer): str(why)[:500] for issuer, why in found.items()}
    except (ValueError, AttributeError, OSError, RefusedError):
        told = {}
    for entry in issuers:
        issuer = entry["issuer"]
        for what, command, most in (
            ("jwks", "keys", MAX_JWKS_BYTES),
            ("revocations", "revocations", MAX_REVOCATIONS_BYTES),
        ):
            try:
                data = _read(folder / name_of(issuer, what), most)
            except (OSError, RefusedError) as exc:
                problems[issuer] = str(exc)
                break
            if data is None:
                if what == "jwks" or entry["revocations_url"] is not None:
                    problems.setdefault(issuer, told.get(issuer, "nothing was fetched"))
                break
            done = subprocess.run(
                [store, command, issuer], input=data, capture_output=True, check=False, timeout=STORE_TIMEOUT_SECONDS
            )
            if done.returncode != 0:
                problems[issuer] = done.stderr.decode(errors="replace").strip()[:1000]
                break
            changed = changed or bool(json.loads(done.stdout)["changed"])
    return {"changed": changed, "problems": problems}


def main(argv: list[str] | None = None) -> int:
    """Fetch, or hand over; the exit code of `hand-over` is 0 only when all of it is in the store."""
    parser = argparse.ArgumentParser(description="Fetch issuers' keys and revocations onto a gateway.")
    parser.add_argument("--config", required=True, type=Path, help="which issuers there are")
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("fetch", help="fetch into a folder")
    step.add_argument("--ca", required=True, type=Path, help="the site's CA certificates, PEM")
    step.add_argument("--crl", type=Path, help="the site's list of revoked certificates, PEM")
    step.add_argument("--output", required=True, type=Path, help="a folder of this user's")
    step = steps.add_parser("hand-over", help="give what was fetched to the store; prints what was done")
    step.add_argument("--input", required=True, type=Path, help="that folder")
    step.add_argument("--store", default="/usr/local/sbin/bednet-store", help="the store's tool")
    step.add_argument("--report", type=Path, help="also write what was done into this file")
    arguments = parser.parse_args(argv)
    issuers = json.loads(arguments.config.read_text(encoding="utf-8"))["issuers"]
    if arguments.step == "fetch":
        fetch_all(issuers, arguments.ca, arguments.output, datetime.now(UTC), crl=arguments.crl)
        return 0
    report = hand_over(issuers, arguments.input, arguments.store)
    for issuer, why in report["problems"].items():
        sys.stderr.write(f"From {issuer} nothing new is used: {why}. The broker keeps what it has.\n")
    if arguments.report is not None:
        arguments.report.write_text(json.dumps(report), encoding="utf-8")
    sys.stdout.write(json.dumps(report) + "\n")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
