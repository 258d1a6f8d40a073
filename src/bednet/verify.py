# SPDX-License-Identifier: Apache-2.0
"""Prove from outside that the net of a deployed site holds: the checks behind `bednet verify` and `bednet report`.

Offers:

- :data:`CHECKS`: every check of a gateway, each a :class:`Check` with its layer, its sentence and the function that
  runs it; :data:`SERVICE_CHECKS`: those of a host of the token service.
- :func:`read_input`: the gateways, the hosts of the token service and the probe's identity, from the JSON file that the
  role `verification` writes.
- :func:`verify`: run the checks against all of them; returns a :class:`Report`.
- :func:`read_report`, :meth:`Report.write`: a report as a JSON file. :func:`table`: a report as a table for people.
- :func:`add_parser`: the subcommands `verify` and `report` of the command line.

A check passes only on the answer it expects. Whatever else happens - another alert, a timeout, a closed port, an error
in the check itself - is a failure: an open broker must never pass because the probe did not understand what it saw.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import ipaddress
import json
import logging
import secrets
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bednet import probe
from bednet.errors import BednetError
from bednet.probe import (
    Answer,
    Credentials,
    Handshake,
    Listener,
    NothingArrivedError,
    Offer,
    Outcome,
    Reply,
    Session,
    Will,
)
from bednet.site import PROBE_OWN, PROBE_READ_ONLY, PROBE_WRITE_ONLY

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence

logger = logging.getLogger(__name__)

Scope = Literal["bite", "all"]

# No gateway is given more than this (seconds): checks that have not begun by then fail.
GATEWAY_BUDGET = 60.0
# Handshakes that run side by side against one gateway; a broker has one thread.
_LANES = 3
# Characters; whatever a gateway says of itself may be very long.
_LONGEST_EVIDENCE = 1000
# How often a session is left behind to die before it counts as nothing learnt.
_DEATHS = 3

REPORT_VERSION = 1

# Where the role puts its listeners unless told otherwise: certificates, passwords, keys shared beforehand, WebSockets.
USUAL_PORTS = (8883, 8884, 8885, 9001)


class VerifyError(BednetError):
    """The input or report file cannot be used; the message says what is wrong with it."""

    code = "verify"


# --- What goes in and what comes out --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gateway:
    """A gateway as it claims to be configured.

    :param address: where the probe connects to, an IP address or a name.
    :param server_name: the DNS name that the server's certificate carries.
    :param password_port: None where passwords are off.
    :param psk_port: None where pre-shared keys are off.
    :param websockets_port: None where WebSockets are off.
    :param plaintext_port: the port of unencrypted MQTT, which must be closed.
    :param closed_ports: further ports that must be closed; None: the usual ports of listeners that this gateway does
        not have, or has elsewhere (see :attr:`off`).
    :param access_control: who decides there, "plugin" or "acl_file": Mosquitto with an acl_file grants every SUBSCRIBE
        and replaces a client id, where the plugin refuses.
    :param tls_versions: those that must be accepted ("1.2", "1.3"); every other one must be refused.
    :param max_packet_size: bytes.
    """

    name: str
    address: str
    server_name: str
    mtls_port: int = 8883
    password_port: int | None = 8884
    psk_port: int | None = None
    websockets_port: int | None = None
    access_control: str = "plugin"
    plaintext_port: int = 1883
    closed_ports: tuple[int, ...] | None = None
    tls_versions: tuple[str, ...] = ("1.2", "1.3")
    max_packet_size: int = 65536

    @property
    def off(self) -> tuple[int, ...]:
        """The ports where a listener could have been forgotten, beside that for plaintext; they must be closed."""
        if self.closed_ports is not None:
            return self.closed_ports
        own = {self.mtls_port, self.password_port, self.psk_port, self.websockets_port, self.plaintext_port}
        return tuple(port for port in USUAL_PORTS if port not in own)


@dataclass(frozen=True)
class Service:
    """A host of the token service as it claims to be configured.

    :param name: another one than any gateway's; the report goes by it.
    :param server_name: the DNS name that its certificate carries; several hosts may stand behind one.
    :param audiences: for whom a token may be asked beside the whole site (RFC 8707): ``mqtts://`` and a gateway's name.
    """

    name: str
    address: str
    server_name: str
    port: int = 8443
    tls_versions: tuple[str, ...] = ("1.2", "1.3")
    audiences: tuple[str, ...] = ()

    @property
    def issuer(self) -> str:
        """What it calls itself (RFC 8414, 2)."""
        return f"https://{self.server_name}:{self.port}"


@dataclass(frozen=True)
class Identity:
    """The identity that the checks use, ``bednet-probe``; its grants are built into the policy (:mod:`bednet.site`).

    :param ca: PEM file with the site's root CA, and perhaps its issuing CA.
    :param psk: its pre-shared key; None will do where no gateway has a listener for one.
    :param other: a second certificate of the same identity with a key of its own: a token is bound to one of the two.
    """

    id: str
    certificate: Path
    key: Path
    ca: Path
    password: str = field(repr=False)
    psk: bytes | None = field(default=None, repr=False)
    other: Credentials | None = None


@dataclass(frozen=True)
class Input:
    """What to verify, and as whom."""

    gateways: tuple[Gateway, ...]
    identity: Identity
    canary: Credentials
    checks: Scope = "all"
    services: tuple[Service, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What one check saw: enough for an operator to understand it, never a secret."""

    passed: bool
    evidence: str

    def __post_init__(self) -> None:
        """Take out what a hostile gateway could do to a terminal with a reason or a topic of its own."""
        said = self.evidence if len(self.evidence) <= _LONGEST_EVIDENCE else f"{self.evidence[:_LONGEST_EVIDENCE]}..."
        object.__setattr__(
            self, "evidence", "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in said)
        )


class Place(Protocol):
    """What a gateway and a host of the token service have in common."""

    @property
    def name(self) -> str:
        """By which the report goes."""

    @property
    def address(self) -> str:
        """Where the probe connects to."""

    @property
    def server_name(self) -> str:
        """The name that its certificate carries."""

    @property
    def tls_versions(self) -> tuple[str, ...]:
        """Those that must be accepted."""


class Doors(Protocol):
    """The TLS listeners of a place, and what opens them."""

    @property
    def place(self) -> Place:
        """Whose they are."""

    @property
    def listeners(self) -> list[Listener]:
        """Every TLS listener."""

    @property
    def with_certificate(self) -> list[Listener]:
        """Those that show a certificate."""

    @property
    def has_address(self) -> bool:
        """Whether the certificate must carry the address, too."""

    def credentials(self, listener: Listener) -> Credentials:
        """Return what completes a handshake there."""


T_contra = TypeVar("T_contra", bound=Doors, contravariant=True)


@dataclass(frozen=True)
class Check(Generic[T_contra]):
    """One check.

    :param layer: encryption, authentication, access control, limits or reachability.
    :param name: a short sentence that is true when the check passes.
    :param bite: whether it is one of the few that end a deployment.
    :param session: whether it takes the identity's session, or would on a lax gateway; a gateway holds one session for
        an identity, so these run one after the other.
    :param applies: whether there is anything to check there.
    """

    layer: str
    name: str
    bite: bool
    run: Callable[[T_contra], Verdict]
    session: bool = False
    applies: Callable[[T_contra], bool] = lambda _: True


@dataclass(frozen=True)
class Result:
    """What a check said about a gateway, or a host of the token service."""

    layer: str
    check: str
    gateway: str
    evidence: str
    passed: bool
    bite: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """The results of one run.

    :param expected: gateway name -> number of checks that had to run there.
    """

    started: datetime
    seconds: float
    checks: Scope
    expected: Mapping[str, int]
    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        """Whether every check ran on every gateway, at least one on each, and all of them passed."""
        ran = {name: sum(result.gateway == name for result in self.results) for name in self.expected}
        return (
            bool(self.expected)
            and all(ran[name] >= max(count, 1) for name, count in self.expected.items())
            and all(result.passed for result in self.results)
        )

    def write(self, path: Path) -> None:
        """Write the report as JSON; it holds no secret."""
        document = {
            "version": REPORT_VERSION,
            "started": self.started.isoformat(),
            "seconds": round(self.seconds, 3),
            "checks": self.checks,
            "passed": self.passed,
            "expected": dict(self.expected),
            "results": [asdict(result) for result in self.results],
        }
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_report(path: Path) -> Report:
    """Read what :meth:`Report.write` wrote.

    :raises VerifyError: if the file is no such report.
    """
    document = _read_json(path)
    if document.get("version") != REPORT_VERSION:
        raise VerifyError(f"{path}: not a report of version {REPORT_VERSION} of `bednet verify`")
    try:
        return Report(
            datetime.fromisoformat(document["started"]),
            float(document["seconds"]),
            document["checks"],
            {str(name): int(count) for name, count in document["expected"].items()},
            tuple(Result(**result) for result in document["results"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise VerifyError(f"{path}: not a whole report: {exc!r}") from exc


def read_input(path: Path) -> Input:
    """Read the input file of `bednet verify`.

    :raises VerifyError: if it is unreadable, has unknown, missing or mistyped keys, or names no gateway.
    """
    document = _read_json(path)
    _only(document, {"gateways", "token_services", "identity", "canary", "checks"}, f"{path}")
    try:
        gateways = tuple(
            _gateway(item, f"{path}: gateway {number}") for number, item in enumerate(document["gateways"], 1)
        )
        if not isinstance(document.get("token_services", []), list):
            raise VerifyError(f"{path}: token_services: expected a list")
        services = tuple(
            _service(item, f"{path}: token service {number}")
            for number, item in enumerate(document.get("token_services", []), 1)
        )
        identity = _identity(document["identity"], f"{path}: identity")
        _only(document["canary"], {"certificate", "key"}, f"{path}: canary")
        canary = Credentials(Path(document["canary"]["certificate"]), Path(document["canary"]["key"]))
        checks: Scope = document.get("checks", "all")
    except KeyError as exc:
        raise VerifyError(f"{path}: {exc} is missing") from exc
    except (TypeError, AttributeError) as exc:
        raise VerifyError(f"{path}: not what the role `verification` writes: {exc}") from exc
    if checks not in ("bite", "all"):
        raise VerifyError(f'{path}: checks is {checks!r}, expected "bite" or "all"')
    if not gateways:
        raise VerifyError(f"{path}: no gateway to verify")
    if identity.psk is None and any(gateway.psk_port is not None for gateway in gateways):
        raise VerifyError(f"{path}: identity: psk_file is missing, and a gateway has a listener for pre-shared keys")
    if len({gateway.name for gateway in gateways}) != len(gateways):
        raise VerifyError(f"{path}: two gateways have the same name")
    names = [gateway.name for gateway in gateways] + [service.name for service in services]
    if len(set(names)) != len(names):
        raise VerifyError(f"{path}: a host of the token service has the name of another one, or of a gateway")
    other = identity.other or Credentials()
    files = (
        identity.certificate,
        identity.key,
        identity.ca,
        canary.certificate,
        canary.key,
        other.certificate,
        other.key,
    )
    for file in files:
        if file is not None and not file.is_file():
            raise VerifyError(f"{path}: there is no file {file}")
    return Input(gateways, identity, canary, checks, services)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise VerifyError(f"{path}: cannot be read as JSON: {exc}") from exc
    if not isinstance(document, dict):
        raise VerifyError(f"{path}: expected a JSON object")
    return document


def _only(item: Mapping[str, object], known: set[str], where: str) -> None:
    if unknown := set(item) - known:
        raise VerifyError(f"{where}: unknown key {', '.join(sorted(unknown))}")


def _gateway(item: Mapping[str, Any], where: str) -> Gateway:
    _only(item, set(Gateway.__dataclass_fields__), where)
    lists = {name: tuple(item[name]) for name in ("tls_versions", "closed_ports") if item.get(name) is not None}
    gateway = Gateway(**{**item, **lists})
    if not gateway.tls_versions or set(gateway.tls_versions) - {"1.2", "1.3"}:
        raise VerifyError(f'{where}: tls_versions is {list(gateway.tls_versions)}, expected "1.2", "1.3" or both')
    for name in ("mtls_port", "plaintext_port", "max_packet_size"):
        if type(getattr(gateway, name)) is not int:
            raise VerifyError(f"{where}: {name} is not a number")
    if gateway.access_control not in ("plugin", "acl_file"):
        raise VerifyError(f'{where}: access_control is {gateway.access_control!r}, expected "plugin" or "acl_file"')
    for name in ("password_port", "psk_port", "websockets_port"):
        if getattr(gateway, name) is not None and type(getattr(gateway, name)) is not int:
            raise VerifyError(f"{where}: {name} is neither a number nor null")
    if any(type(port) is not int for port in gateway.off):
        raise VerifyError(f"{where}: closed_ports is {list(gateway.off)}, expected numbers")
    return gateway


def _service(item: Mapping[str, Any], where: str) -> Service:
    _only(item, set(Service.__dataclass_fields__), where)
    lists = {name: tuple(item[name]) for name in ("tls_versions", "audiences") if item.get(name) is not None}
    service = Service(**{**item, **lists})
    if not service.tls_versions or set(service.tls_versions) - {"1.2", "1.3"}:
        raise VerifyError(f'{where}: tls_versions is {list(service.tls_versions)}, expected "1.2", "1.3" or both')
    if type(service.port) is not int:
        raise VerifyError(f"{where}: port is not a number")
    if not all(isinstance(audience, str) for audience in service.audiences):
        raise VerifyError(f"{where}: audiences is {list(service.audiences)}, expected words")
    return service


def _identity(item: Mapping[str, Any], where: str) -> Identity:
    _only(item, {"id", "certificate", "key", "ca", "password_file", "psk_file", "other"}, where)
    password = _secret(item["password_file"], f"{where}: the password file")
    psk = None
    if item.get("psk_file") is not None:
        try:
            psk = bytes.fromhex(_secret(item["psk_file"], f"{where}: the file with the pre-shared key"))
        except ValueError:
            # Without the text itself, and without the error, which holds a part of it.
            raise VerifyError(f"{where}: the pre-shared key is not in hexadecimal digits") from None
    other = None
    if item.get("other") is not None:
        _only(item["other"], {"certificate", "key"}, f"{where}: other")
        other = Credentials(Path(item["other"]["certificate"]), Path(item["other"]["key"]))
    return Identity(
        item["id"],
        Path(item["certificate"]),
        Path(item["key"]),
        Path(item["ca"]),
        password=password,
        psk=psk,
        other=other,
    )


def _secret(file: str, what: str) -> str:
    try:
        secret = Path(file).read_text(encoding="utf-8").strip()
    except OSError as exc:
        raise VerifyError(f"{what} cannot be read: {exc.strerror}") from exc
    if not secret:
        raise VerifyError(f"{what} is empty")
    return secret


# --- What a check is given ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forgeries:
    """Certificates that nobody should accept, in the probe's name."""

    self_signed: Credentials
    false_ca: Credentials
    copied_key_id: Credentials


@dataclass(frozen=True)
class Target:
    """A gateway, and everything a check needs to knock on its doors."""

    gateway: Gateway
    identity: Identity
    canary: Credentials
    forgeries: Forgeries
    purse: Purse | None = None

    @property
    def place(self) -> Place:
        """The gateway."""
        return self.gateway

    @property
    def has_address(self) -> bool:
        """A gateway's certificate carries its address: devices need no name service."""
        return True

    @property
    def tokens(self) -> Purse | None:
        """Tokens of the probe, where the gateway takes any."""
        return self.purse if self.gateway.access_control == "plugin" else None

    @property
    def elsewhere(self) -> str | None:
        """For whom a token may be asked that is not for this gateway; None where there is nobody else."""
        own = f"mqtts://{self.gateway.server_name}"
        audiences = self.tokens.services[0].service.audiences if self.tokens else ()
        return next((audience for audience in audiences if audience != own), None)

    def listener(self, port: int, *, websockets: bool = False) -> Listener:
        """Return a TLS listener whose certificate is checked against the site's CA."""
        return Listener(self.gateway.address, port, self.identity.ca, self.gateway.server_name, websockets=websockets)

    @property
    def mtls(self) -> Listener:
        """The listener for certificates."""
        return self.listener(self.gateway.mtls_port)

    @property
    def password_listeners(self) -> list[Listener]:
        """The listeners for user names and passwords."""
        found = []
        if self.gateway.password_port is not None:
            found.append(self.listener(self.gateway.password_port))
        if self.gateway.websockets_port is not None:
            found.append(self.listener(self.gateway.websockets_port, websockets=True))
        return found

    @property
    def psk_listeners(self) -> list[Listener]:
        """The listener for pre-shared keys, if there is one; it has no certificate to check."""
        if self.gateway.psk_port is None:
            return []
        return [Listener(self.gateway.address, self.gateway.psk_port, server_name=self.gateway.server_name)]

    @property
    def with_certificate(self) -> list[Listener]:
        """The listeners that show a certificate of the gateway."""
        return [self.mtls, *self.password_listeners]

    @property
    def listeners(self) -> list[Listener]:
        """Every TLS listener."""
        return [*self.with_certificate, *self.psk_listeners]

    @property
    def certificate(self) -> Credentials:
        """The probe's certificate."""
        return Credentials(self.identity.certificate, self.identity.key)

    @property
    def password(self) -> Credentials:
        """The probe's password."""
        return Credentials(username=self.identity.id, password=self.identity.password)

    def credentials(self, listener: Listener) -> Credentials:
        """Return what this listener lets the probe in with."""
        if listener.port == self.gateway.psk_port:
            return self.psk
        return self.certificate if listener.port == self.gateway.mtls_port else self.password

    @property
    def psk(self) -> Credentials:
        """The probe's pre-shared key."""
        return Credentials(psk_identity=self.identity.id, psk=self.identity.psk)

    def binds_client_ids(self, listener: Listener) -> bool:
        """Whether another client id than the identity's is refused; elsewhere it is replaced."""
        return self.gateway.access_control == "plugin" and listener.port != self.gateway.psk_port

    def own(self) -> str:
        """Return a topic that the probe may use and nobody has used yet."""
        return f"{PROBE_OWN}/{secrets.token_hex(6)}"

    def unwritable(self) -> str:
        """Return a topic that the probe may read and not publish, and nobody has used yet."""
        return f"{PROBE_READ_ONLY}/{secrets.token_hex(6)}"

    def unreadable(self) -> str:
        """Return a topic that the probe may publish and not read, and nobody has used yet."""
        return f"{PROBE_WRITE_ONLY}/{secrets.token_hex(6)}"

    def watch(self, session: Session) -> None:
        """Subscribe everything through which a forbidden message could reach the probe, and the fence's topic."""
        session.subscribe("#", f"{PROBE_READ_ONLY}/#", f"{PROBE_OWN}/#")


@dataclass(frozen=True)
class ServiceTarget:
    """A host of the token service, and everything a check needs to knock on its door."""

    service: Service
    identity: Identity
    forgeries: Forgeries
    purse: Purse

    @property
    def place(self) -> Place:
        """The host."""
        return self.service

    @property
    def listener(self) -> Listener:
        """Its one listener."""
        return Listener(self.service.address, self.service.port, self.identity.ca, self.service.server_name)

    @property
    def listeners(self) -> list[Listener]:
        """Its one listener."""
        return [self.listener]

    @property
    def with_certificate(self) -> list[Listener]:
        """Its one listener."""
        return [self.listener]

    @property
    def has_address(self) -> bool:
        """Its certificate carries the name that all of its hosts have."""
        return False

    @property
    def certificate(self) -> Credentials:
        """The probe's certificate."""
        return Credentials(self.identity.certificate, self.identity.key)

    def credentials(self, _: Listener) -> Credentials:
        """Return nothing: whoever has no certificate may ask as well."""
        return probe.NOBODY

    def get(self, path: str) -> Reply:
        """Get a document."""
        return probe.request(self.listener, "GET", path)

    def ask(
        self,
        credentials: Credentials = probe.NOBODY,
        path: str = "/token",
        *,
        headers: Sequence[tuple[str, str]] = (),
        **form: str,
    ) -> Reply:
        """Ask as OAuth 2.0 does (RFC 6749, 4.4.2); nothing else is in the form than what is given."""
        return probe.request(self.listener, "POST", path, credentials=credentials, form=form, headers=headers)

    def ask_as_probe(
        self, credentials: Credentials = probe.NOBODY, *, headers: Sequence[tuple[str, str]] = (), **more: str
    ) -> Reply:
        """Ask for a token in the probe's name."""
        return self.ask(
            credentials, headers=headers, grant_type="client_credentials", client_id=self.identity.id, **more
        )


class NoTokenError(probe.ProbeError):
    """The token service gave none, so nothing can be learnt with one."""


class Purse:
    """Tokens of the probe, each asked for when it is wanted first; they live longer than any run.

    :ivar services: where they come from.
    """

    def __init__(self) -> None:
        self.services: list[ServiceTarget] = []
        self._held: dict[tuple[str, str | None], Reply] = {}
        self._guard = threading.Lock()

    def reply(self, target: ServiceTarget, audience: str | None = None) -> Reply:
        """Return what this host of the token service answers to the probe with its certificate.

        :param audience: ask for a token for this one alone (RFC 8707).
        """
        key = target.service.name, audience
        with self._guard:
            if key not in self._held:
                more: dict[str, str] = {} if audience is None else {"resource": audience}
                self._held[key] = target.ask_as_probe(target.certificate, headers=(), **more)
            return self._held[key]

    def token(self, target: ServiceTarget | None = None, audience: str | None = None) -> str:
        """Return a token.

        :param target: default: the first host.
        :raises NoTokenError: when the service gives none.
        """
        asked = target or self.services[0]
        reply = self.reply(asked, audience)
        token = reply.json().get("access_token") if reply.status == _OK else None
        if not isinstance(token, str):
            raise NoTokenError(f"{asked.service.name} gives the probe no token, so nothing was learnt: {reply}")
        return token


def _everywhere(listeners: Sequence[Listener], look: Callable[[Listener], Verdict]) -> Verdict:
    """Hold one check against several listeners: it passes if it passes on each."""
    verdicts = [(listener, look(listener)) for listener in listeners]
    if not verdicts:
        return Verdict(False, "no listener to look at")
    # What is the same everywhere is said once.
    evidence: dict[str, list[int]] = {}
    for listener, verdict in verdicts:
        evidence.setdefault(("" if verdict.passed else "NOT: ") + verdict.evidence, []).append(listener.port)
    text = "; ".join(f"{', '.join(map(str, ports))}: {words}" for words, ports in evidence.items())
    return Verdict(all(verdict.passed for _, verdict in verdicts), text)


def _each_listener(look: Callable[[Target, Listener], Verdict]) -> Callable[[Target], Verdict]:
    return lambda target: _everywhere(target.listeners, lambda listener: look(target, listener))


def _alert(seen: Handshake, *reasons: str) -> Verdict:
    """Pass if the server refused with one of these alerts."""
    if seen.accepted:
        return Verdict(False, f"accepted: {seen}")
    if seen.outcome is Outcome.ALERT and seen.reason in reasons:
        return Verdict(True, f"refused: {seen.reason}")
    return Verdict(False, f"{seen}, expected the alert {' or '.join(reasons)}")


# --- Reachability ---------------------------------------------------------------------------------------------------


def _answers(target: Target) -> Verdict:
    def look(listener: Listener) -> Verdict:
        reached = probe.tcp(listener.host, listener.port)
        if not reached.accepted:
            return Verdict(False, f"{reached}")
        seen = probe.hello(listener, "1.2", tuple(probe.STRONG_SUITES), timeout=3)
        if seen.outcome in (Outcome.ACCEPTED, Outcome.ALERT):
            return Verdict(True, "speaks TLS")
        return Verdict(False, f"accepts connections but does not speak TLS: {seen}")

    return _everywhere(target.listeners, look)


REACHABLE: Check[Target] = Check("reachability", "the gateway answers", True, _answers)
"""Runs first on each gateway; where it fails, the other checks would learn nothing and are left out."""


# --- Encryption -----------------------------------------------------------------------------------------------------


def _closed(target: Target, port: int) -> Verdict:
    seen = probe.tcp(target.gateway.address, port, timeout=2)
    if seen.outcome in (Outcome.UNREACHABLE, Outcome.TIMEOUT):
        return Verdict(True, seen.reason)
    said = probe.enter(Listener(target.gateway.address, port, tls=False), version=4)
    return Verdict(False, f"is open; to plaintext MQTT it says: {said}")


def _plaintext_closed(target: Target) -> Verdict:
    port = target.gateway.plaintext_port
    return _joined([(str(port), _closed(target, port))])


def _off_closed(target: Target) -> Verdict:
    return _joined([(str(port), _closed(target, port)) for port in target.gateway.off])


def _plaintext_refused(target: Target) -> Verdict:
    def look(listener: Listener) -> Verdict:
        seen = probe.enter(Listener(listener.host, listener.port, tls=False), version=4)
        if seen.outcome in (Outcome.ALERT, Outcome.CLOSED, Outcome.RESET):
            return Verdict(True, str(seen))
        return Verdict(False, f"an unencrypted CONNECT was answered: {seen}")

    return _everywhere(target.listeners, look)


_ANY_SUITE = (
    *probe.STRONG_SUITES,
    *probe.CBC_SUITES,
    *probe.STATIC_KEY_SUITES,
    *probe.BROKEN_SUITES,
    *probe.STRONG_PSK_SUITES,
    *probe.CBC_PSK_SUITES,
    *probe.STATIC_PSK_SUITES,
)


def _old_tls_refused(target: Doors) -> Verdict:
    def look(listener: Listener) -> Verdict:
        verdicts = [
            (f"TLS {version}", _alert(probe.hello(listener, version, _ANY_SUITE), "protocol version"))
            for version in ("1.0", "1.1", "1.2")
            if version not in target.place.tls_versions
        ]
        if "1.3" not in target.place.tls_versions:
            seen = probe.handshake(listener, target.credentials(listener), offer=Offer("1.3", "1.3"))
            verdicts.append(("TLS 1.3", _alert(seen, "protocol version")))
        return _joined(verdicts)

    return _everywhere(target.listeners, look)


def _joined(verdicts: Sequence[tuple[str, Verdict]], between: str = " ") -> Verdict:
    """Put verdicts with the same evidence in one phrase.

    :param between: what stands between their labels and the evidence.
    """
    groups: dict[str, list[str]] = {}
    for label, verdict in verdicts:
        groups.setdefault(verdict.evidence, []).append(label)
    text = "; ".join(f"{', '.join(labels)}{between}{words}" for words, labels in groups.items())
    return Verdict(all(verdict.passed for _, verdict in verdicts), text)


def _suites_refused(with_certificate: Mapping[int, str], with_psk: Mapping[int, str]) -> Callable[[Doors], Verdict]:
    def run(target: Doors) -> Verdict:
        def look(listener: Listener) -> Verdict:
            # All of a family, whatever the listener is for: it takes the first one that it can.
            suites = (*with_certificate, *with_psk)
            if "1.2" in target.place.tls_versions:
                # The control: the same hello with good suites is understood.
                control = probe.hello(listener, "1.2", (*probe.STRONG_SUITES, *probe.STRONG_PSK_SUITES))
                if not control.accepted:
                    return Verdict(False, f"not even a good suite was accepted: {control}")
                seen = probe.hello(listener, "1.2", suites)
                return _alert(seen, "handshake failure", "insufficient security")
            return _alert(probe.hello(listener, "1.2", suites), "protocol version")

        return _everywhere(target.listeners, look)

    return run


def _version_accepted(version: str) -> Callable[[Doors], Verdict]:
    def run(target: Doors) -> Verdict:
        def look(listener: Listener) -> Verdict:
            seen = probe.handshake(listener, target.credentials(listener), offer=Offer(version, version))
            if not (seen.accepted and seen.hello):
                return Verdict(False, str(seen))
            good = seen.hello.version == version and seen.hello.cipher.startswith(("ECDHE-", "DHE-", "TLS_"))
            aead = "GCM" in seen.hello.cipher or "POLY1305" in seen.hello.cipher or "CCM" in seen.hello.cipher
            return Verdict(good and aead, seen.hello.cipher)

        return _everywhere(target.listeners, look)

    return run


def _chain_trusted(target: Doors) -> Verdict:
    def look(listener: Listener) -> Verdict:
        seen = probe.handshake(listener, target.credentials(listener))
        if not (seen.accepted and seen.certificate):
            return Verdict(False, str(seen))
        issuer = _common_name(x509.load_der_x509_certificate(seen.certificate).issuer)
        return Verdict(True, f"issued by {issuer}")

    return _everywhere(target.with_certificate, look)


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


def _certificate(target: Doors, listener: Listener) -> x509.Certificate | Handshake:
    # Whether it is to be trusted is another check's question.
    seen = probe.handshake(
        Listener(listener.host, listener.port, server_name=listener.server_name), target.credentials(listener)
    )
    return x509.load_der_x509_certificate(seen.certificate) if seen.certificate else seen


def _names_right(target: Doors) -> Verdict:
    def look(listener: Listener) -> Verdict:
        certificate = _certificate(target, listener)
        if isinstance(certificate, Handshake):
            return Verdict(False, str(certificate))
        dns, addresses = _alternative_names(certificate)
        wanted_dns, wanted_addresses = {target.place.server_name}, set()
        if target.has_address:
            try:
                wanted_addresses.add(ipaddress.ip_address(target.place.address))
            except ValueError:
                wanted_dns.add(target.place.address)
        missing = [*sorted(wanted_dns - dns), *map(str, wanted_addresses - addresses)]
        if missing:
            return Verdict(False, f"not in the certificate: {', '.join(missing)}")
        return Verdict(True, ", ".join([*sorted(wanted_dns), *map(str, wanted_addresses)]))

    return _everywhere(target.with_certificate, look)


def _alternative_names(
    certificate: x509.Certificate,
) -> tuple[set[str], set[ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set(), set()
    addresses = {
        item
        for item in names.get_values_for_type(x509.IPAddress)
        if isinstance(item, ipaddress.IPv4Address | ipaddress.IPv6Address)
    }
    return set(names.get_values_for_type(x509.DNSName)), addresses


def _server_usage_only(target: Doors) -> Verdict:
    def look(listener: Listener) -> Verdict:
        certificate = _certificate(target, listener)
        if isinstance(certificate, Handshake):
            return Verdict(False, str(certificate))
        try:
            usage = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        except x509.ExtensionNotFound:
            return Verdict(False, "no extended key usage: good for anything")
        if usage != {ExtendedKeyUsageOID.SERVER_AUTH}:
            return Verdict(False, "good for more than a server: " + ", ".join(sorted(oid._name for oid in usage)))
        with contextlib.suppress(x509.ExtensionNotFound):
            if certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
                return Verdict(False, "the server's certificate may issue others")
        return Verdict(True, "server authentication only")

    return _everywhere(target.with_certificate, look)


def _still_valid(target: Doors) -> Verdict:
    def look(listener: Listener) -> Verdict:
        certificate = _certificate(target, listener)
        if isinstance(certificate, Handshake):
            return Verdict(False, str(certificate))
        now = datetime.now(UTC)
        left = certificate.not_valid_after_utc - now
        if certificate.not_valid_before_utc > now:
            return Verdict(False, f"not valid before {certificate.not_valid_before_utc:%Y-%m-%d}")
        return Verdict(
            left > timedelta(0),
            f"{left // timedelta(days=1)} days left, until {certificate.not_valid_after_utc:%Y-%m-%d}",
        )

    return _everywhere(target.with_certificate, look)


# --- Authentication -------------------------------------------------------------------------------------------------


def _no_certificate_refused(target: Target) -> Verdict:
    reasons = {"1.2": "handshake failure", "1.3": "certificate required"}
    verdicts = []
    for version in target.gateway.tls_versions:
        seen = probe.handshake(target.mtls, offer=Offer(version, version))
        verdict = _alert(seen, reasons[version])
        if verdict.passed and seen.hello is None:
            # The alert of TLS 1.2 for a missing certificate is also the one for a refused offer.
            verdict = Verdict(False, f"refused before a certificate was asked for: {seen}")
        verdicts.append((f"TLS {version}", verdict))
    return _joined(verdicts)


def _forgery_refused(pick: Callable[[Target], Mapping[str, Credentials]], *reasons: str) -> Callable[[Target], Verdict]:
    def run(target: Target) -> Verdict:
        verdicts = []
        for label, credentials in pick(target).items():
            for version in target.gateway.tls_versions:
                seen = probe.handshake(target.mtls, credentials, offer=Offer(version, version))
                verdicts.append((f"TLS {version}{label}", _alert(seen, *reasons)))
        return _joined(verdicts)

    return run


def _certificate_accepted(target: Target) -> Verdict:
    seen = probe.enter(target.mtls, target.certificate)
    return Verdict(seen.accepted, str(seen))


def _password_accepted(target: Target) -> Verdict:
    def look(listener: Listener) -> Verdict:
        seen = probe.enter(listener, target.password)
        return Verdict(seen.accepted, "accepted" if seen.accepted else str(seen))

    return _everywhere(target.password_listeners, look)


_NOT_AUTHORIZED = (4, 5, 0x86, 0x87)


def _password_refused(pick: Callable[[Target], Credentials]) -> Callable[[Target], Verdict]:
    def run(target: Target) -> Verdict:
        def look(listener: Listener) -> Verdict:
            answers: list[tuple[probe.Version, Answer]] = [
                (version, probe.enter(listener, pick(target), version=version)) for version in (4, 5)
            ]
            for version, answer in answers:
                if not (answer.outcome is Outcome.REFUSED and answer.code in _NOT_AUTHORIZED):
                    return Verdict(False, f"MQTT {_NAMES[version]}: {answer}")
            return Verdict(
                True, f"refused: {answers[-1][1].reason} ({answers[0][1].code} and 0x{answers[1][1].code:02x})"
            )

        return _everywhere(target.password_listeners, look)

    return run


def _unsigned(target: Target) -> str:
    """Make up an access token (RFC 9068) for the probe that has no signature: `alg` is none (RFC 8725, 2.1)."""
    now = int(datetime.now(UTC).timestamp())
    claims = {"iss": "https://nobody.invalid", "sub": target.identity.id, "client_id": target.identity.id}
    claims |= {"aud": f"mqtts://{target.gateway.server_name}", "jti": secrets.token_hex(8)}
    parts = ({"alg": "none", "typ": "at+jwt"}, claims | {"iat": now, "exp": now + 60})
    encoded = (base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts)
    # Two dots and something behind each: with nothing there a gateway would take it for a password.
    return f"{'.'.join(encoded)}.AA"


def _psk_accepted(target: Target) -> Verdict:
    def look(listener: Listener) -> Verdict:
        verdicts = []
        for version in target.gateway.tls_versions:
            seen = probe.enter(listener, target.psk, offer=Offer(version, version))
            verdicts.append((f"TLS {version}", Verdict(seen.accepted, "accepted" if seen.accepted else str(seen))))
        return _joined(verdicts)

    return _everywhere(target.psk_listeners, look)


# What an OpenSSL server says: in TLS 1.2 the client's Finished cannot be read, in 1.3 its binder is wrong.
_WRONG_PSK = {"1.2": ("bad record mac", "decrypt error"), "1.3": ("decrypt error", "illegal parameter")}
# In TLS 1.3 it goes on without the key, and has no certificate to go on with.
_UNKNOWN_PSK = {
    # The plugin answers as it answers a wrong key, so that nobody learns which names there are; others say more.
    "1.2": ("unknown psk identity", *_WRONG_PSK["1.2"]),
    "1.3": ("handshake failure", *_WRONG_PSK["1.3"]),
}
# The server has nothing that such a client speaks.
_NO_PSK = {"1.2": ("handshake failure",), "1.3": ("handshake failure",)}


def _psk_refused(
    pick: Callable[[Target], Credentials], reasons: Mapping[str, tuple[str, ...]]
) -> Callable[[Target], Verdict]:
    def run(target: Target) -> Verdict:
        def look(listener: Listener) -> Verdict:
            verdicts = []
            for version in target.gateway.tls_versions:
                seen = probe.handshake(listener, pick(target), offer=Offer(version, version))
                verdicts.append((f"TLS {version}", _alert(seen, *reasons[version])))
            return _joined(verdicts)

        return _everywhere(target.psk_listeners, look)

    return run


def _client_id_bound(target: Target) -> Verdict:
    def refuses(listener: Listener) -> Verdict:
        answers: list[tuple[probe.Version, Answer]] = []
        for version in (4, 5):
            answer = probe.enter(
                listener, target.credentials(listener), client_id=probe.made_up_name(), version=version
            )
            answers.append((version, answer))
            if not (answer.outcome is Outcome.REFUSED and answer.code in _NOT_AUTHORIZED):
                return Verdict(False, f"another client id than the identity's, MQTT {_NAMES[version]}: {answer}")
        return Verdict(True, f"another client id is refused: {answers[-1][1].reason}")

    def replaces(listener: Listener) -> Verdict:
        credentials = target.credentials(listener)
        with (
            Session(listener, credentials, client_id=probe.made_up_name()) as first,
            Session(listener, credentials, client_id=probe.made_up_name()),
        ):
            try:
                goodbye = first.wait_goodbye(2)
            except NothingArrivedError:
                return Verdict(False, "one identity holds two sessions under two client ids")
        return Verdict(True, f"a second client id ends the first's session: {goodbye}")

    # paho's WebSockets client notices the end of a session as the others do, but the broker handles them alike.
    return _everywhere(
        target.listeners,
        lambda listener: (refuses if target.binds_client_ids(listener) else replaces)(listener),
    )


_NAMES = {4: "3.1.1", 5: "5"}


def _identity_from_certificate(target: Target) -> Verdict:
    topic = target.own()
    # Nobody's name, so that no device is disturbed should the gateway believe it.
    posing = Credentials(target.identity.certificate, target.identity.key, probe.made_up_name(), None)
    if target.binds_client_ids(target.mtls):
        for client_id in (target.identity.id, posing.client_id):
            answer = probe.enter(target.mtls, posing, client_id=client_id)
            if not (answer.outcome is Outcome.REFUSED and answer.code in _NOT_AUTHORIZED):
                return Verdict(False, f"a user name that is not the certificate's was answered: {answer}")
        return Verdict(True, f"a user name that is not the certificate's is refused: {answer.reason}")
    with Session(target.mtls, posing) as session:
        receipt = session.publish(topic, b"who am I?")
    if receipt.granted:
        return Verdict(True, "a user name beside the certificate changes nothing")
    return Verdict(False, f"a user name beside the certificate took away the probe's rights: {receipt}")


# --- Tokens at a gateway --------------------------------------------------------------------------------------------


def _purse(target: Target) -> Purse:
    if target.tokens is None:
        raise NoTokenError("there is no token service, so nothing was learnt")
    return target.tokens


def _shown(target: Target, token: str, certificate: Credentials | None = None) -> Credentials:
    """Return a token as the password, with the probe's certificate or another one."""
    own = certificate or target.certificate
    return Credentials(own.certificate, own.key, target.identity.id, token)


def _token_accepted(target: Target) -> Verdict:
    """Show a token of each host of the service: the gateway must have the keys of all."""
    verdicts = []
    for source in _purse(target).services:
        seen = probe.enter(target.mtls, _shown(target, _purse(target).token(source)))
        said = "accepted" if seen.accepted else str(seen)
        verdicts.append((f"of {source.service.name}", Verdict(seen.accepted, said)))
    return _joined(verdicts, ": ")


def _token_refused(seen: Answer) -> Verdict:
    refused = seen.outcome is Outcome.REFUSED and seen.code in _NOT_AUTHORIZED
    return Verdict(refused, f"refused: {seen.reason} (0x{seen.code:02x})" if refused and seen.code else str(seen))


def _bare_token_refused(target: Target) -> Verdict:
    shown = Credentials(username=target.identity.id, password=_purse(target).token())
    return _everywhere(target.password_listeners, lambda listener: _token_refused(probe.enter(listener, shown)))


def _token_with_another_certificate_refused(target: Target) -> Verdict:
    other = target.identity.other
    if other is None:
        return Verdict(False, "there is no other certificate, so nothing was learnt")
    # The control: it is not the certificate that is refused.
    control = probe.enter(target.mtls, other)
    if not control.accepted:
        return Verdict(False, f"the other certificate alone is refused, so nothing was learnt: {control}")
    return _token_refused(probe.enter(target.mtls, _shown(target, _purse(target).token(), other)))


def _token_for_another_refused(target: Target) -> Verdict:
    token = _purse(target).token(audience=target.elsewhere)
    verdict = _token_refused(probe.enter(target.mtls, _shown(target, token)))
    return Verdict(verdict.passed, f"one for {target.elsewhere} is {verdict.evidence}")


def _altered_token_refused(target: Target) -> Verdict:
    token = _purse(target).token()
    header, claims, signature = token.split(".")
    # A second less of life: all else of it holds.
    other = _read_part(claims)
    other["exp"] = int(other["exp"]) - 1
    altered = f"{header}.{_part(other)}.{signature}"
    return _token_refused(probe.enter(target.mtls, _shown(target, altered)))


def _part(content: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()


def _read_part(text: str) -> dict[str, Any]:
    """Read the header or the claims of a token; of what is none, nothing."""
    try:
        content = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, RecursionError, binascii.Error):
        return {}
    return content if isinstance(content, dict) else {}


# --- The token service ----------------------------------------------------------------------------------------------

_OK, _BAD_REQUEST, _UNAUTHORIZED, _TOO_LARGE = 200, 400, 401, 413
# What the role allows (token_service_token_seconds), in seconds.
_LONGEST_TOKEN = 86_400
_REQUEST_BYTES = 16 * 1024
_PRIVATE = {"d", "p", "q", "dp", "dq", "qi", "oth", "k"}


def _service_answers(target: ServiceTarget) -> Verdict:
    reached = probe.tcp(target.service.address, target.service.port)
    if not reached.accepted:
        return Verdict(False, f"{reached}")
    # Whether its certificate is to be trusted is another check's question.
    where = Listener(target.service.address, target.service.port, server_name=target.service.server_name)
    seen = probe.request(where, "GET", "/healthz")
    return Verdict(seen.status == _OK, "is well" if seen.status == _OK else str(seen))


ANSWERING: Check[ServiceTarget] = Check("reachability", "the token service answers", True, _service_answers)
"""Runs first on each host of the token service, as :data:`REACHABLE` does on gateways."""


def _plaintext_http_refused(target: ServiceTarget) -> Verdict:
    plain = Listener(target.service.address, target.service.port, server_name=target.service.server_name, tls=False)
    seen = probe.request(plain, "GET", "/.well-known/oauth-authorization-server")
    # nginx says so in HTTP; other servers send an alert, or hang up.
    refused = seen.outcome in (Outcome.ALERT, Outcome.CLOSED, Outcome.RESET) or seen.status == _BAD_REQUEST
    return Verdict(refused, str(seen) if refused else f"an unencrypted request was answered: {seen}")


def _metadata_right(target: ServiceTarget) -> Verdict:
    seen = target.get("/.well-known/oauth-authorization-server")
    told, issuer = seen.json(), target.service.issuer
    if seen.status != _OK or told.get("issuer") != issuer:
        return Verdict(False, f"{seen}, issuer {told.get('issuer')!r}, expected {issuer}")
    urls = {name: told[name] for name in told if name.endswith("_endpoint") or name == "jwks_uri"}
    if not {"token_endpoint", "jwks_uri"} <= urls.keys():
        return Verdict(False, "there is no token_endpoint, or no jwks_uri")
    foreign = [name for name, url in urls.items() if not str(url).startswith(f"{issuer}/")]
    if foreign:
        return Verdict(False, f"points elsewhere: {', '.join(sorted(foreign))}")
    return Verdict(True, f"{issuer}, and {len(urls)} endpoints below it")


def _keys_public(target: ServiceTarget) -> Verdict:
    seen = target.get("/jwks.json")
    keys = seen.json().get("keys")
    if seen.status != _OK or not isinstance(keys, list) or not keys or not all(isinstance(key, dict) for key in keys):
        return Verdict(False, f"{seen}, and no JWK Set")
    if found := sorted(name for key in keys for name in _PRIVATE & key.keys()):
        return Verdict(False, f"the whole world can read the private members {', '.join(found)}")
    kinds = sorted({f"{key.get('kty')} {key.get('crv', '')}".strip() for key in keys})
    return Verdict(True, f"{len(keys)} of {', '.join(kinds)}")


def _invalid_client(seen: Reply) -> Verdict:
    """Pass on the answer of RFC 6749, 5.2, to a client that did not prove who it is."""
    return Verdict(seen.status == _UNAUTHORIZED and seen.json().get("error") == "invalid_client", str(seen))


def _no_proof_refused(target: ServiceTarget) -> Verdict:
    nameless = target.ask(grant_type="client_credentials")
    verdicts = [("with a name", _invalid_client(target.ask_as_probe())), ("without one", _invalid_client(nameless))]
    return _joined(verdicts, ": ")


def _wrong_secret_refused(target: ServiceTarget) -> Verdict:
    verdicts = []
    for label, name in (("for the probe", target.identity.id), ("for nobody", probe.made_up_name())):
        shown = Credentials(username=name, password=secrets.token_hex(16))
        verdicts.append((label, _invalid_client(target.ask(shown, grant_type="client_credentials"))))
    return _joined(verdicts, ": ")


def _unsigned_assertion_refused(target: ServiceTarget) -> Verdict:
    """Show an assertion (RFC 7523, 2.2) of which only the signature is missing."""
    now = int(datetime.now(UTC).timestamp())
    claims = {"iss": target.identity.id, "sub": target.identity.id, "aud": target.service.issuer, "iat": now}
    claims |= {"exp": now + 60, "jti": secrets.token_hex(8)}
    assertion = f"{_part({'alg': 'none', 'typ': 'JWT'})}.{_part(claims)}."
    kind = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
    return _invalid_client(target.ask_as_probe(client_assertion_type=kind, client_assertion=assertion))


def _false_certificate_gets_none(target: ServiceTarget) -> Verdict:
    forgeries = {
        "self-signed": target.forgeries.self_signed,
        "of a false CA": target.forgeries.false_ca,
        "with our key id": target.forgeries.copied_key_id,
    }
    verdicts = []
    for label, forgery in forgeries.items():
        seen = target.ask_as_probe(forgery)
        # nginx refuses it when it has read the request. Others may do so in TLS, which only who waits for it sees.
        verdict = _invalid_client(seen)
        if seen.status is None:
            verdict = _alert(
                probe.handshake(target.listener, forgery), "unknown ca", "decrypt error", "bad certificate"
            )
        verdicts.append((label, verdict))
    return _joined(verdicts, ": ")


def _claimed_certificate_gets_none(target: ServiceTarget) -> Verdict:
    """Say in headers of our own what the front says of those who have shown a certificate: the probe's, a good one."""
    leaf = x509.load_pem_x509_certificate(target.identity.certificate.read_bytes())
    pem = quote(leaf.public_bytes(serialization.Encoding.PEM).decode(), safe="")
    said = {"Verify": "SUCCESS", "Cert": pem, "Address": "127.0.0.1"}
    verdicts = []
    for label, mark in (("with dashes", "-"), ("with underscores", "_")):
        headers = [(mark.join(("X", "Bednet", "Client", name)), value) for name, value in said.items()]
        verdicts.append((label, _invalid_client(target.ask_as_probe(headers=headers))))
    return _joined(verdicts, ": ")


def _token_is_bound(target: ServiceTarget) -> Verdict:
    reply = target.purse.reply(target)
    token = target.purse.token(target)
    parts = token.split(".")
    header, claims = (_read_part(part) for part in (parts[:2] if len(parts) == 3 else ("", "")))  # noqa: PLR2004 - a JWS
    digest = x509.load_pem_x509_certificate(target.identity.certificate.read_bytes()).fingerprint(hashes.SHA256())
    own = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    wanted = {"iss": target.service.issuer, "sub": target.identity.id, "client_id": target.identity.id}
    wrong = [name for name, value in wanted.items() if claims.get(name) != value]
    if header.get("typ") != "at+jwt" or wrong:
        return Verdict(False, f"not a token of RFC 9068 for the probe: {', '.join(wrong) or 'typ'} is wrong")
    if claims.get("cnf") != {"x5t#S256": own}:
        return Verdict(False, "the token is not bound to the certificate that it was given for")
    seconds = claims.get("exp", 0) - claims.get("iat", 0)
    if reply.headers.get("cache-control") != "no-store" or not 0 < seconds <= _LONGEST_TOKEN:
        return Verdict(False, f"good for {seconds} s, Cache-Control {reply.headers.get('cache-control')!r}")
    return Verdict(True, f"for {seconds} s, bound to the certificate")


def _token_says_no_more(target: ServiceTarget) -> Verdict:
    branches = {(f"{PROBE_OWN}/#", "pub"), (f"{PROBE_OWN}/#", "sub"), (f"{PROBE_READ_ONLY}/#", "sub")}
    branches.add((f"{PROBE_WRITE_ONLY}/#", "pub"))
    everything = _part([["#", ["pub", "sub"]]])
    asked = {
        "nothing": target.purse.reply(target),
        "everything": target.ask_as_probe(target.certificate, scope=everything),
    }
    verdicts = []
    for what, reply in asked.items():
        said = _granted(reply)
        if said is None:
            verdict = Verdict(False, f"no scope in the form of RFC 9431, 3: {reply}")
        else:
            more = sorted(f"{way} {topic}" for topic, way in said - branches)
            words = f"granted too much: {', '.join(more[:3])}" if more else f"{len(said)} grants of the policy"
            verdict = Verdict(bool(said) and not more, words)
        verdicts.append((f"asked for {what}", verdict))
    return _joined(verdicts, ": ")


def _granted(reply: Reply) -> set[tuple[str, str]] | None:
    """Return the grants in the token of an answer: topic filters, each with `pub` or `sub`; None for no token."""
    parts = str(reply.json().get("access_token", "")).split(".") if reply.status == _OK else []
    scope = _read_part(parts[1]).get("scope") if len(parts) == 3 else None  # noqa: PLR2004 - a JWS
    try:
        text = str(scope)
        entries = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        return {(str(topic), str(way)) for topic, ways in entries for way in ways}
    except (ValueError, TypeError, RecursionError):
        return None


def _strangers_learn_nothing(target: ServiceTarget) -> Verdict:
    token = target.purse.token(target)
    verdicts = [(path, _invalid_client(target.ask(path=path, token=token))) for path in ("/introspect", "/revoke")]
    return _joined(verdicts, ": ")


def _large_request_refused(target: ServiceTarget) -> Verdict:
    control = target.ask_as_probe(padding="x" * (_REQUEST_BYTES - 1024))
    if control.status == _TOO_LARGE:
        return Verdict(False, f"a request below {_REQUEST_BYTES} bytes was refused: {control}")
    seen = target.ask_as_probe(padding="x" * _REQUEST_BYTES)
    return Verdict(seen.status == _TOO_LARGE, f"above {_REQUEST_BYTES} bytes: {seen}")


# --- Access control -------------------------------------------------------------------------------------------------


def _own_topic_works(target: Target) -> Verdict:
    def look(listener: Listener) -> Verdict:
        topic, payload = target.own(), secrets.token_bytes(16)
        with Session(listener, target.credentials(listener)) as session:
            session.subscribe(topic)
            begin = time.monotonic()
            receipt = session.publish(topic, payload)
            if not receipt.granted:
                return Verdict(False, f"publish to {topic} refused: {receipt}")
            session.until(lambda message: message.payload == payload, f"the message on {topic}")
        return Verdict(True, f"published and received, {(time.monotonic() - begin) * 1000:.0f} ms")

    return _everywhere(target.listeners, look)


def _said(messages: Sequence[probe.Message]) -> str:
    shown = ", ".join(str(message) for message in messages[:3])
    return shown + (f" and {len(messages) - 3} more" if len(messages) > 3 else "")  # noqa: PLR2004


def _forbidden_publish_refused(target: Target, listener: Listener) -> Verdict:
    with Session(listener, target.credentials(listener)) as session:
        target.watch(session)
        topic = target.unwritable()
        receipt = session.publish(topic, b"bednet verify: this must not arrive")
        arrived = [message for message in session.fence(target.own()) if message.topic == topic]
    if arrived:
        return Verdict(False, f"a forbidden message was delivered: {_said(arrived)}")
    if receipt.code != probe.NOT_AUTHORIZED:
        return Verdict(False, f"a forbidden publish was not refused: {receipt}")
    return Verdict(True, f"{receipt}; a later permitted message arrived, this one did not")


def _forbidden_publish_dropped(target: Target, listener: Listener) -> Verdict:
    with Session(listener, target.credentials(listener), version=4) as session:
        target.watch(session)
        topic = target.unwritable()
        for qos in (0, 1, 2):
            session.publish(topic, b"bednet verify: this must not arrive", qos=qos)
        arrived = [message for message in session.fence(target.own()) if message.topic == topic]
    if arrived:
        return Verdict(False, f"a forbidden message was delivered: {_said(arrived)}")
    return Verdict(True, "QoS 0, 1 and 2 not delivered, though MQTT 3.1.1 acknowledges them")


def _filter_shows_nothing(pick: Callable[[Target, str], str]) -> Callable[[Target, Listener], Verdict]:
    """Return a check that a subscription shows nothing but what the probe may read.

    :param pick: the topic filter, from a topic that the probe may not read.
    """

    def run(target: Target, listener: Listener) -> Verdict:
        topic = target.unreadable()
        topic_filter = pick(target, topic)
        readable = (f"{PROBE_OWN}/", f"{PROBE_READ_ONLY}/")
        with Session(listener, target.credentials(listener)) as session:
            fence = target.own()
            session.subscribe(fence)
            granted = session.subscribe(topic_filter)[0]
            receipt = session.publish(topic, b"bednet verify: this must not arrive")
            arrived = session.fence(fence)
        if not receipt.granted:
            return Verdict(False, f"publish to {topic} refused, so nothing was learnt: {receipt}")
        leaks = [message for message in arrived if not message.topic.startswith(readable)]
        if leaks:
            return Verdict(False, f"{topic_filter} shows {_said(leaks)}")
        if target.gateway.access_control == "plugin" and granted.code != probe.NOT_AUTHORIZED:
            return Verdict(False, f"SUBSCRIBE to {topic_filter} was not refused: {granted}")
        return Verdict(True, f"SUBSCRIBE answered {granted}; nothing forbidden arrived")

    return run


def _plus_signs(_: Target, topic: str) -> str:
    return "/".join("+" for _ in topic.split("/"))


def _forbidden_will_dropped(target: Target, listener: Listener) -> Verdict:
    """Leave a session behind, die, and look in it for the will.

    An identity has one session, so nobody but that session can watch while it dies.
    """

    def dies(topic: str) -> list[probe.Message]:
        will = Will(topic, b"bednet verify: a will")
        name = target.identity.id
        with Session(listener, target.credentials(listener), client_id=name, clean=False, will=will) as session:
            target.watch(session)
            session.die()
        with Session(listener, target.credentials(listener), client_id=name, clean=False, expiry=0) as session:
            if not session.resumed:
                raise NothingArrivedError("the session that was left behind is gone")
            return [message for message in session.fence(target.own()) if message.topic == topic]

    def learns(topic: str) -> list[probe.Message]:
        # A broker that notices late that a WebSocket is gone takes the session that came back for the one that went.
        for _ in range(_DEATHS - 1):
            with contextlib.suppress(NothingArrivedError):
                return dies(topic)
        return dies(topic)

    # Who comes back before the broker has noticed the loss takes over, and the will is not sent.
    if not any(learns(target.own()) for _ in range(_DEATHS)):
        return Verdict(False, "not even a permitted will arrived, so nothing was learnt")
    if arrived := learns(target.unwritable()):
        return Verdict(False, f"a forbidden will was delivered: {_said(arrived)}")
    return Verdict(True, "a permitted will arrived, a forbidden one did not")


def _forbidden_retained_dropped(target: Target, listener: Listener) -> Verdict:
    def stored(topic: str) -> bool:
        with Session(listener, target.credentials(listener)) as session:
            session.publish(topic, b"bednet verify: retained", retain=True)
        with Session(listener, target.credentials(listener)) as session:
            target.watch(session)
            found = [message for message in session.fence(target.own()) if message.topic == topic]
            session.publish(topic, b"", retain=True)
        return bool(found)

    if not stored(target.own()):
        return Verdict(False, "not even a permitted retained message was stored, so nothing was learnt")
    if stored(target.unwritable()):
        return Verdict(False, "a forbidden retained message was stored (and has been removed)")
    return Verdict(True, "a permitted one is stored, a forbidden one is not")


# --- Limits ---------------------------------------------------------------------------------------------------------


def _large_packet_refused(target: Target, listener: Listener) -> Verdict:
    limit, margin = target.gateway.max_packet_size, 64
    topic = target.own()
    with Session(listener, target.credentials(listener)) as session:
        receipt = session.publish(topic, bytes(limit - len(topic) - margin))
        if not receipt.granted:
            return Verdict(False, f"a packet just below {limit} bytes was refused: {receipt}")
    with Session(listener, target.credentials(listener)) as session:
        mid = session.send(topic, bytes(limit + margin))
        try:
            receipt = session.acknowledged(mid)
        except NothingArrivedError:
            goodbye = session.wait_goodbye(0)
            return Verdict(True, f"just below {limit} bytes accepted, just above: {goodbye}")
    if receipt.code == probe.PACKET_TOO_LARGE:
        return Verdict(True, f"just below {limit} bytes accepted, just above: {receipt}")
    return Verdict(False, f"a packet above {limit} bytes was answered: {receipt}")


# --- The list -------------------------------------------------------------------------------------------------------


def _speaks(version: str) -> Callable[[Doors], bool]:
    return lambda target: version in target.place.tls_versions


def _has_psk(target: Target) -> bool:
    return target.gateway.psk_port is not None


def _has_passwords(target: Target) -> bool:
    return bool(target.password_listeners)


def _has_tokens(target: Target) -> bool:
    return target.tokens is not None


_REACHABILITY, _ENCRYPTION, _AUTHENTICATION = "reachability", "encryption", "authentication"
_ACCESS, _LIMITS = "access control", "limits"
LAYERS = (_REACHABILITY, _ENCRYPTION, _AUTHENTICATION, _ACCESS, _LIMITS)

_TLS: tuple[Check[Doors], ...] = (
    Check(_ENCRYPTION, "TLS versions that are not configured are refused", False, _old_tls_refused),
    Check(
        _ENCRYPTION, "broken ciphers are refused", False, _suites_refused(probe.BROKEN_SUITES, probe.BROKEN_PSK_SUITES)
    ),
    Check(_ENCRYPTION, "CBC ciphers are refused", False, _suites_refused(probe.CBC_SUITES, probe.CBC_PSK_SUITES)),
    Check(
        _ENCRYPTION,
        "ciphers without forward secrecy are refused",
        False,
        _suites_refused(probe.STATIC_KEY_SUITES, probe.STATIC_PSK_SUITES),
    ),
    Check(
        _ENCRYPTION, "TLS 1.2 is spoken with strong ciphers", False, _version_accepted("1.2"), applies=_speaks("1.2")
    ),
    Check(_ENCRYPTION, "TLS 1.3 is spoken", False, _version_accepted("1.3"), applies=_speaks("1.3")),
    Check(_ENCRYPTION, "the server's certificate chains to the site's CA", False, _chain_trusted),
    Check(_ENCRYPTION, "the server's certificate carries its names", False, _names_right),
    Check(_ENCRYPTION, "the server's certificate is for servers only", False, _server_usage_only),
    Check(_ENCRYPTION, "the server's certificate is valid", False, _still_valid),
)

CHECKS: tuple[Check[Target], ...] = (
    REACHABLE,
    Check(_ENCRYPTION, "the plaintext port is closed", True, _plaintext_closed),
    Check(
        _ENCRYPTION,
        "listeners that are off are closed",
        False,
        _off_closed,
        applies=lambda target: bool(target.gateway.off),
    ),
    Check(_ENCRYPTION, "plaintext MQTT is refused", True, _plaintext_refused),
    *_TLS,
    Check(_AUTHENTICATION, "no certificate is refused", True, _no_certificate_refused),
    Check(
        _AUTHENTICATION,
        "a self-signed certificate is refused",
        False,
        _forgery_refused(lambda target: {"": target.forgeries.self_signed}, "unknown ca"),
    ),
    Check(
        _AUTHENTICATION,
        "a certificate of a false CA with our names is refused",
        False,
        _forgery_refused(
            lambda target: {"": target.forgeries.false_ca, " with our key id": target.forgeries.copied_key_id},
            "unknown ca",
            "decrypt error",
            "bad certificate",
        ),
    ),
    Check(
        _AUTHENTICATION,
        "a revoked certificate is refused as revoked",
        True,
        _forgery_refused(lambda target: {"": target.canary}, "certificate revoked"),
    ),
    Check(_AUTHENTICATION, "the probe's certificate is accepted", False, _certificate_accepted, session=True),
    Check(
        _AUTHENTICATION,
        "nobody gets in without credentials",
        True,
        _password_refused(lambda _: Credentials()),
        applies=_has_passwords,
    ),
    Check(
        _AUTHENTICATION,
        "a wrong password is refused",
        False,
        _password_refused(lambda target: Credentials(username=target.identity.id, password=secrets.token_hex(16))),
        session=True,
        applies=_has_passwords,
    ),
    Check(
        _AUTHENTICATION,
        "an empty password is refused",
        False,
        _password_refused(lambda target: Credentials(username=target.identity.id, password="")),
        session=True,
        applies=_has_passwords,
    ),
    Check(
        _AUTHENTICATION,
        "a token that nobody signed is refused",
        False,
        _password_refused(lambda target: Credentials(username=target.identity.id, password=_unsigned(target))),
        session=True,
        applies=_has_passwords,
    ),
    Check(
        _AUTHENTICATION,
        "an unknown user is refused",
        False,
        _password_refused(lambda target: Credentials(username=probe.made_up_name(), password=target.identity.password)),
        applies=_has_passwords,
    ),
    Check(
        _AUTHENTICATION,
        "the probe's password is accepted",
        False,
        _password_accepted,
        session=True,
        applies=_has_passwords,
    ),
    Check(
        _AUTHENTICATION,
        "nobody gets in without a pre-shared key",
        True,
        _psk_refused(lambda target: target.certificate, _NO_PSK),
        applies=_has_psk,
    ),
    Check(
        _AUTHENTICATION,
        "a wrong pre-shared key is refused",
        True,
        _psk_refused(
            lambda target: Credentials(psk_identity=target.identity.id, psk=secrets.token_bytes(32)), _WRONG_PSK
        ),
        applies=_has_psk,
    ),
    Check(
        _AUTHENTICATION,
        "an unknown pre-shared key identity is refused",
        False,
        _psk_refused(
            lambda target: Credentials(psk_identity=probe.made_up_name(), psk=target.identity.psk), _UNKNOWN_PSK
        ),
        applies=_has_psk,
    ),
    Check(
        _AUTHENTICATION, "the probe's pre-shared key is accepted", False, _psk_accepted, session=True, applies=_has_psk
    ),
    Check(_AUTHENTICATION, "a fresh token is accepted", True, _token_accepted, session=True, applies=_has_tokens),
    Check(
        _AUTHENTICATION,
        "a token without its certificate is refused",
        False,
        _bare_token_refused,
        session=True,
        applies=lambda target: _has_tokens(target) and _has_passwords(target),
    ),
    Check(
        _AUTHENTICATION,
        "a token with another certificate is refused",
        False,
        _token_with_another_certificate_refused,
        session=True,
        applies=lambda target: _has_tokens(target) and target.identity.other is not None,
    ),
    Check(
        _AUTHENTICATION,
        "a token for another gateway is refused",
        False,
        _token_for_another_refused,
        session=True,
        applies=lambda target: target.elsewhere is not None,
    ),
    Check(
        _AUTHENTICATION,
        "a token that was altered is refused",
        False,
        _altered_token_refused,
        session=True,
        applies=_has_tokens,
    ),
    Check(_AUTHENTICATION, "the client id is bound to the identity", False, _client_id_bound, session=True),
    Check(_AUTHENTICATION, "the identity is the certificate's", False, _identity_from_certificate, session=True),
    Check(_ACCESS, "the probe's own topic works", True, _own_topic_works, session=True),
    Check(_ACCESS, "a forbidden publish is refused", True, _each_listener(_forbidden_publish_refused), session=True),
    Check(
        _ACCESS,
        "a forbidden publish of MQTT 3.1.1 is dropped",
        False,
        _each_listener(_forbidden_publish_dropped),
        session=True,
    ),
    Check(
        _ACCESS,
        "# shows nothing of others",
        False,
        _each_listener(_filter_shows_nothing(lambda _, __: "#")),
        session=True,
    ),
    Check(
        _ACCESS, "+ shows nothing of others", False, _each_listener(_filter_shows_nothing(_plus_signs)), session=True
    ),
    Check(
        _ACCESS,
        "$SYS shows nothing",
        False,
        _each_listener(_filter_shows_nothing(lambda _, __: "$SYS/#")),
        session=True,
    ),
    Check(
        _ACCESS,
        "a shared subscription shows nothing of others",
        False,
        _each_listener(_filter_shows_nothing(lambda _, __: "$share/bednet/#")),
        session=True,
    ),
    Check(
        _ACCESS,
        "a forbidden subscription shows nothing",
        False,
        _each_listener(_filter_shows_nothing(lambda _, topic: topic)),
        session=True,
    ),
    Check(
        _ACCESS, "a will on a forbidden topic is dropped", False, _each_listener(_forbidden_will_dropped), session=True
    ),
    Check(
        _ACCESS,
        "nothing is retained on a forbidden topic",
        False,
        _each_listener(_forbidden_retained_dropped),
        session=True,
    ),
    Check(_LIMITS, "a packet above the limit is refused", False, _each_listener(_large_packet_refused), session=True),
)


SERVICE_CHECKS: tuple[Check[ServiceTarget], ...] = (
    ANSWERING,
    Check(_ENCRYPTION, "plaintext HTTP is refused", True, _plaintext_http_refused),
    *_TLS,
    Check(_AUTHENTICATION, "the metadata names the issuer", False, _metadata_right),
    Check(_AUTHENTICATION, "the published keys hold nothing private", False, _keys_public),
    Check(_AUTHENTICATION, "nobody gets a token without proof", True, _no_proof_refused),
    Check(_AUTHENTICATION, "a wrong secret gets no token", False, _wrong_secret_refused),
    Check(_AUTHENTICATION, "an assertion that nobody signed gets no token", False, _unsigned_assertion_refused),
    Check(_AUTHENTICATION, "a certificate of a false CA gets no token", False, _false_certificate_gets_none),
    Check(_AUTHENTICATION, "a certificate that is only claimed gets no token", False, _claimed_certificate_gets_none),
    Check(_AUTHENTICATION, "the probe gets a token that is bound to its certificate", True, _token_is_bound),
    Check(_ACCESS, "a token says no more than the policy", False, _token_says_no_more),
    Check(_ACCESS, "strangers learn and revoke no token", False, _strangers_learn_nothing),
    Check(_LIMITS, "a request above the limit is refused", False, _large_request_refused),
)


def checks_of(scope: Scope) -> tuple[Check[Target], ...]:
    """Return the checks of a gateway in a scope, in the order of a report."""
    return _of_scope(CHECKS, scope)


def _of_scope(checks: tuple[Check[T_contra], ...], scope: Scope) -> tuple[Check[T_contra], ...]:
    return tuple(check for check in checks if scope == "all" or check.bite)


# --- Running them ---------------------------------------------------------------------------------------------------


def verify(task: Input, *, started: datetime, budget: float = GATEWAY_BUDGET) -> Report:
    """Run the checks against every gateway, side by side where they do not disturb each other.

    :param started: the time that the report carries; aware.
    :param budget: seconds for each gateway.
    :raises VerifyError: if the probe's certificate cannot be read.
    """
    begin = time.monotonic()
    checks, of_services = checks_of(task.checks), _of_scope(SERVICE_CHECKS, task.checks)
    deadline = begin + budget
    with _forgeries(task.identity) as forgeries, ThreadPoolExecutor(max_workers=8) as pool:
        purse = Purse()
        services = [ServiceTarget(service, task.identity, forgeries, purse) for service in task.services]
        answers = list(pool.map(lambda service: _run(ANSWERING, service, deadline), services))
        # A place that does not answer has one result that says so, and none that would only repeat it: gateways are
        # shown tokens of the others, or none.
        purse.services += [service for service, answer in zip(services, answers, strict=True) if answer.passed]
        known = purse if purse.services else None
        targets = [Target(gateway, task.identity, task.canary, forgeries, known) for gateway in task.gateways]
        runs = [
            *(pool.submit(_verify_gateway, target, checks, deadline) for target in targets),
            *(
                pool.submit(_verify_place, service, answer, of_services, deadline)
                for service, answer in zip(services, answers, strict=True)
            ),
        ]
        results = [result for run in runs for result in run.result()]
        silent = {result.gateway for result in results if result.check in _FIRST and not result.passed}
        expected = {target.place.name: sum(check.applies(target) for check in checks) for target in targets}
        expected |= {service.place.name: sum(check.applies(service) for check in of_services) for service in services}
    expected |= dict.fromkeys(silent, 1)
    return Report(started, time.monotonic() - begin, task.checks, expected, tuple(results))


_FIRST = (REACHABLE.name, ANSWERING.name)


def _verify_gateway(target: Target, checks: Sequence[Check[Target]], deadline: float) -> list[Result]:
    return _verify_place(target, _run(REACHABLE, target, deadline), checks, deadline)


def _verify_place(target: T_contra, first: Result, checks: Sequence[Check[T_contra]], deadline: float) -> list[Result]:
    """Run the rest of the checks where the first, of the place itself, has passed."""
    if not first.passed:
        return [first]
    rest = [check for check in checks if check.name != first.check and check.applies(target)]
    found: dict[str, Result] = {first.check: first}
    lanes: list[list[Check[T_contra]]] = [[check for check in rest if check.session]]
    others = [check for check in rest if not check.session]
    lanes.extend(others[number::_LANES] for number in range(_LANES))
    with ThreadPoolExecutor(max_workers=len(lanes)) as pool:
        for results in pool.map(lambda lane: [_run(check, target, deadline) for check in lane], lanes):
            found.update((result.check, result) for result in results)
    return [found[check.name] for check in checks if check.name in found]


def _run(check: Check[T_contra], target: T_contra, deadline: float) -> Result:
    begin = time.monotonic()
    if begin > deadline:
        verdict = Verdict(False, "not run: it took too long to answer the checks before")
    else:
        try:
            verdict = check.run(target)
        except probe.ProbeError as exc:
            verdict = Verdict(False, str(exc))
        except Exception as exc:  # a broken check must not pass, nor hide the others' results
            logger.debug("check %r failed", check.name, exc_info=True)
            verdict = Verdict(False, f"the check itself failed: {type(exc).__name__}: {exc}")
    seconds = round(time.monotonic() - begin, 3)
    return Result(check.layer, check.name, target.place.name, verdict.evidence, verdict.passed, check.bite, seconds)


@contextlib.contextmanager
def _forgeries(identity: Identity) -> Iterator[Forgeries]:
    """Make certificates in the probe's name that no gateway may accept; they go away with the context."""
    try:
        leaf = x509.load_pem_x509_certificate(identity.certificate.read_bytes())
    except (OSError, ValueError) as exc:
        raise VerifyError(f"{identity.certificate}: not a certificate: {exc}") from exc
    with tempfile.TemporaryDirectory(prefix="bednet-verify-") as folder:
        place = Path(folder)
        false_key = ec.generate_private_key(ec.SECP256R1())
        false_ca = _false_certificate(leaf.issuer, leaf.issuer, false_key, false_key, ca=True)

        def made(
            name: str, issuer: x509.Name, signer: ec.EllipticCurvePrivateKey | None, key_id: bytes | None
        ) -> Credentials:
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = _false_certificate(leaf.subject, issuer, key, signer or key, key_id=key_id)
            pem, key_file = place / f"{name}.pem", place / f"{name}.key"
            chain = [certificate] if signer is None else [certificate, false_ca]
            pem.write_bytes(b"".join(item.public_bytes(serialization.Encoding.PEM) for item in chain))
            key_file.write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                )
            )
            return Credentials(pem, key_file)

        try:
            true_id = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        except x509.ExtensionNotFound:
            true_id = None
        false_id = x509.SubjectKeyIdentifier.from_public_key(false_key.public_key()).digest
        yield Forgeries(
            made("self-signed", leaf.subject, None, None),
            made("false-ca", leaf.issuer, false_key, false_id),
            made("copied-key-id", leaf.issuer, false_key, true_id),
        )


def _false_certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    *,
    ca: bool = False,
    key_id: bytes | None = None,
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
    )
    if ca:
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    else:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    if key_id is not None:
        builder = builder.add_extension(x509.AuthorityKeyIdentifier(key_id, None, None), critical=False)
    return builder.sign(signer, hashes.SHA256())


# --- For people -----------------------------------------------------------------------------------------------------


def table(report: Report) -> Table:
    """Return a report as a table: layer, check, gateway, evidence, pass or FAIL."""
    drawn = Table(
        title=f"bednet verify, {report.started:%Y-%m-%d %H:%M:%S %Z}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        expand=True,
    )
    drawn.add_column("layer", no_wrap=True)
    drawn.add_column("check", ratio=5)
    drawn.add_column("gateway", no_wrap=True)
    drawn.add_column("evidence", ratio=8)
    drawn.add_column("", no_wrap=True)
    layer = check = ""
    for result in sorted(report.results, key=lambda result: _ORDER.get(result.check, len(_ORDER))):
        if layer not in ("", result.layer):
            drawn.add_section()
        drawn.add_row(
            Text("" if result.layer == layer else result.layer),
            Text("" if result.check == check else result.check),
            Text(result.gateway),
            Text(result.evidence),
            Text("pass", style="green") if result.passed else Text("FAIL", style="bold red"),
        )
        layer, check = result.layer, result.check
    return drawn


_ALL = [(check.layer, check.name) for check in CHECKS] + [(check.layer, check.name) for check in SERVICE_CHECKS]
_ALL.sort(key=lambda item: LAYERS.index(item[0]))
_ORDER = {name: number for number, (_, name) in enumerate(dict.fromkeys(_ALL))}


def _of_services(report: Report) -> set[str]:
    return {result.gateway for result in report.results if result.check == ANSWERING.name}


def summary(report: Report) -> str:
    """Return the one sentence that a run ends with."""
    failed = sum(not result.passed for result in report.results)
    services = sum(name in _of_services(report) for name in report.expected)
    counts = [(len(report.expected) - services, "gateway"), (services, "token service")]
    where = " and ".join(
        f"{count} {what}{'s' if count != 1 else ''}" for count, what in counts if count or what == "gateway"
    )
    if report.passed:
        return f"The net holds: {len(report.results)} checks passed on {where} in {report.seconds:.1f} s."
    if failed:
        return f"The net does NOT hold: {failed} of {len(report.results)} checks failed on {where}."
    return f"Nothing is proven: not every check ran on {where}."


def _print_report(report: Report, console: Console) -> int:
    console.print(table(report))
    console.print(summary(report), style="bold green" if report.passed else "bold red", highlight=False)
    return 0 if report.passed else 1


def _command_verify(arguments: argparse.Namespace) -> int:
    report = verify(read_input(arguments.input), started=datetime.now(UTC))
    if arguments.report:
        report.write(arguments.report)
    return _print_report(report, Console())


def _command_report(arguments: argparse.Namespace) -> int:
    return _print_report(read_report(arguments.report), Console())


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `verify` and `report` to the command line; each sets ``run``, from arguments to exit code.

    ``run`` raises :class:`VerifyError` where a file cannot be used.
    """
    one = commands.add_parser(
        "verify",
        help="probe the gateways of a deployed site from outside; exit code 0 only if the net holds",
        description="Probe the gateways of a deployed site from outside. Exit code 0 only if every check passed.",
    )
    one.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="FILE",
        help="what to verify and as whom (JSON, see docs/verification.md)",
    )
    one.add_argument("--report", type=Path, metavar="OUT.json", help="also write the results as JSON")
    one.set_defaults(run=_command_verify)
    two = commands.add_parser("report", help="print the table of a report that `bednet verify` wrote")
    two.add_argument("report", type=Path, metavar="OUT.json")
    two.set_defaults(run=_command_report)
