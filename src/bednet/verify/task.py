# SPDX-License-Identifier: Apache-2.0
"""What to verify, and as whom: the input file of `bednet verify`, which the role `verification` writes.

- :class:`Gateway`, :class:`Service`: the places to look at, as they claim to be configured.
- :class:`Identity`: who looks.
- :func:`read_input`: all of it, an :class:`Input`, from the file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bednet.errors import BednetError
from bednet.probe import Credentials

if TYPE_CHECKING:
    from collections.abc import Mapping


class VerifyError(BednetError):
    """The input or report file cannot be used; the message says what is wrong with it."""

    code = "verify"


Scope = Literal["bite", "all"]

# Where the role puts its listeners unless told otherwise: certificates, passwords, keys shared beforehand, WebSockets.
USUAL_PORTS = (8883, 8884, 8885, 9001)


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


def read_input(path: Path) -> Input:
    """Read the input file of `bednet verify`.

    :raises VerifyError: if it is unreadable, has unknown, missing or mistyped keys, or names no gateway.
    """
    document = read_json(path)
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    :raises VerifyError: if it holds none, or cannot be read.
    """
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
